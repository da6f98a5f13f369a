"""Everything through PgBouncer in transaction mode, where a session is another one from transaction to transaction."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest
from click.testing import Result
from commands import Command, Start, wait_until, write_tones
from helpers import free_port
from people import People
from sqlalchemy import make_url

from embstore.db.engine import Database

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="there is no program pgbouncer (apt install pgbouncer)")

CONFIGURATION = """
[databases]
* = host={socket} port=5432
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = 2
"""

Cli = Callable[..., Result]
CliAt = Callable[[str | None], Cli]
Through = Callable[[str], str]


@pytest.fixture
def ann(people: People) -> str:
    """A writer in a team."""
    return people.login("ann", people.team("phonetics"), "writer")


@pytest.fixture
def through(database_url: str, ann: str) -> Iterator[Through]:
    """The address by which a login comes to the test's database through PgBouncer, which has two sessions for each."""
    port = free_port()
    url = make_url(database_url)
    folder = Path(tempfile.mkdtemp(prefix="embstore-tests-"))
    folder.chmod(0o755)
    (folder / "users").write_text(f'"embstore" ""\n"{ann}" ""\n')
    (folder / "ini").write_text(CONFIGURATION.format(socket=url.query["host"], port=port, folder=folder))
    assert PGBOUNCER is not None
    command = [PGBOUNCER, *(("-u", "nobody") if os.geteuid() == 0 else ()), folder / "ini"]
    with (folder / "log").open("wb") as log:
        pooler = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")

    def address(login: str) -> str:
        through = url.set(host="127.0.0.1", port=port, username=login, query={})
        return through.render_as_string(hide_password=False)

    def answers() -> bool:
        assert pooler.poll() is None, (folder / "log").read_text()
        try:
            psycopg2.connect(address("embstore").replace("+psycopg2", "")).close()
        except psycopg2.OperationalError:
            return False
        return True

    try:
        wait_until(answers, "PgBouncer to answer")
        yield address
    finally:
        pooler.kill()
        pooler.wait()
        shutil.rmtree(folder)


def test_the_main_job_and_what_comes_after_it(
    through: Through, ann: str, start: Start, cli_at: CliAt, tmp_path: Path
) -> None:
    write_tones(tmp_path / "tones", 40, speakers=4)
    run = start("extract", "tones", "--model", "probe", "--workers", "2", DATABASE_URL=through(ann))
    assert run.wait() == 0, run.err
    assert "40 done + 0 failed + 0 skipped + 0 running + 0 pending = 40 utterances" in run.out
    cli = cli_at(through(ann))
    for words, shown in {
        ("extract",): "nothing is pending",
        ("sql", "select count(*) from items"): "40",
        ("status",): "40 done",
        ("db", "check"): "written and read back, bit for bit",
        ("centroids", "--workers", "2"): "averaged 4",
        ("boundaries",): "finished 1",
        ("search", "1", "--dataset", "tones"): "speaker-",
        ("search", "1", "--dataset", "tones", "--where", "speaker <> 'speaker-0'"): "speaker-",
        ("export", "embeddings", str(tmp_path / "npz")): "wrote 40 vectors",
        ("export", "centroids", str(tmp_path / "means"), "--format", "csv"): "wrote 4 centroids",
        ("models",): "stored",
        ("history",): "extract",
        ("doctor",): "0 problems",
        ("whoami",): "writer",
    }.items():
        result = cli(*words)
        assert (result.exit_code, shown in result.output) == (0, True), (words, result.output)


def test_what_one_command_sets_the_next_one_does_not_find(through: Through, store: Database, cli_at: CliAt) -> None:
    """`sql` makes its session read-only: behind a pooler, that session is everybody's."""
    cli = cli_at(through("embstore"))
    for _ in range(3):
        assert "(1 row)" in cli("sql", "select count(*) from items;").stderr
        assert "add --write" in cli("sql", "delete from embstore.item").stderr
        changed = cli("sql", "--write", "update embstore.item set speaker = speaker")
        assert "UPDATE 13" in changed.stderr, changed.output
    sly = cli("sql", "select 1; commit; delete from embstore.item")
    assert (sly.exit_code, "a query is one statement" in sly.stderr) == (2, True)


def test_what_needs_a_session_of_its_own_says_so(
    through: Through, store: Database, cli_at: CliAt, tmp_path: Path
) -> None:
    cli = cli_at(through("embstore"))
    for words in (
        ("index", "build", "--model", "small"),
        ("index", "drop", "--model", "small"),
        ("db", "backup", str(tmp_path / "b.dump")),
    ):
        result = cli(*words)
        assert result.exit_code == 3, words
        assert "there is a connection pooler: put the server's own address into DATABASE_URL" in result.stderr
        assert result.stderr.count("\n") == 1


def test_psql_and_migrations(through: Through, start: Start, bare_url: str) -> None:
    def typed(*words: str) -> Command:
        command = start(*words, DATABASE_URL=address)
        assert command.wait() == 0, command.err
        return command

    address = make_url(through("embstore")).set(database=make_url(bare_url).database).render_as_string(False)
    assert "is migrated: revision none to" in typed("db", "upgrade").out
    assert typed("db", "psql", "-At", "-c", "select count(*) from embstore.items").out == "0\n"
