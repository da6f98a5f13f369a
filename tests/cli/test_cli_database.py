"""embstore db: up, down, status, upgrade, check, url, psql."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from sqlalchemy import make_url

from embstore.db import embedded
from embstore.db.engine import Database
from embstore.settings import load

Cli = Callable[..., Result]
CliAt = Callable[[str | None], Cli]

UNREACHABLE = "postgresql://ann:s3cret@127.0.0.1:1/none"


def embstore(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A real process: what psql prints goes past Python."""
    command = [sys.executable, "-m", "embstore", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)


@pytest.fixture
def own_home() -> Iterator[Path]:
    """A folder for an embedded server of the test's own, with a space in its name."""
    with tempfile.TemporaryDirectory(prefix="embstore-tests-") as folder:
        Path(folder).chmod(0o755)
        home = Path(folder) / "my home"
        yield home
        embedded.stop(home, force=True)


def test_the_embedded_server_from_nothing_to_down(own_home: Path, cli_at: CliAt) -> None:
    def cli(*words: str) -> Result:
        return cli_at(None)("db", *words, "--home", str(own_home))

    result = cli("status")
    assert (result.exit_code, own_home.exists()) == (0, False)
    assert "not made yet: the next command does it" in result.stdout

    result = cli("down")
    assert result.stdout == f"the embedded server in '{own_home}' was not running\n"

    result = cli("up")
    assert (
        result.stdout == f"the embedded server in '{own_home}' is running and stays up: 'embstore db down' stops it\n"
    )
    assert embedded.status(own_home).kept

    result = cli("status")
    assert result.exit_code == 0
    assert "ready" in result.stdout.splitlines()[-1]

    address = embstore("db", "url", "--home", str(own_home))
    assert "stays up for whoever connects" in address.stderr
    command: list[str | Path] = [embedded.binary("psql"), "-At", address.stdout.strip()]
    command += ["-c", "select count(*) from items"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "0\n"

    result = cli("down", "--force")
    assert result.stdout == f"the embedded server in '{own_home}' is stopped\n"
    assert not embedded.status(own_home).running

    result = cli("status")
    assert (result.exit_code, embedded.status(own_home).running) == (0, False)
    assert "stopped: the next command starts it" in result.stdout


@pytest.mark.parametrize("command", ["up", "down"])
def test_a_server_of_somebody_elses_is_left_alone(cli_at: CliAt, command: str) -> None:
    result = cli_at(UNREACHABLE)("db", command)
    assert result.exit_code == 2
    assert "'postgresql://ann:***@127.0.0.1:1/none' is not embstore's to start or stop" in result.stderr


def test_status_of_a_database_that_is_ready(cli: Cli) -> None:
    result = cli("db", "status")
    assert result.exit_code == 0
    values = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert values["state"] == "ready"
    assert values["revision"].startswith("0")
    assert values["PostgreSQL"].startswith("18")


def test_status_then_upgrade_then_status(bare_url: str, cli_at: CliAt) -> None:
    cli = cli_at(bare_url)
    result = cli("db", "status")
    assert result.exit_code == 3
    assert result.stdout.endswith("the database is not migrated: type 'embstore db upgrade'\n")
    result = cli("datasets")
    assert (result.exit_code, result.stderr) == (
        3,
        "error: the database is not migrated: type 'embstore db upgrade'\n",
    )
    result = cli("db", "upgrade")
    assert result.exit_code == 0
    assert "is migrated: revision none to 0" in result.stdout
    assert "already" in cli("db", "upgrade").stdout
    assert cli("db", "status").exit_code == 0


def test_a_newer_embstores_database_is_refused(database: Database, cli: Cli) -> None:
    with database.begin() as connection:
        connection.exec_driver_sql("UPDATE embstore.alembic_version SET version_num = '9999'")
    for command in (["db", "upgrade"], ["datasets"], ["db", "backup", "x.dump"]):
        result = cli(*command)
        assert result.exit_code == 3
        assert "revision 9999, made by a newer embstore" in result.stderr
        assert "type 'pip install --upgrade embstore'" in result.stderr


@pytest.mark.parametrize("command", [["db", "status"], ["db", "check"], ["status"], ["sql", "select 1"]])
def test_nobody_answers(cli_at: CliAt, command: list[str]) -> None:
    result = cli_at(UNREACHABLE)(*command)
    assert result.exit_code == 3
    assert "no database at 'postgresql://ann:***@127.0.0.1:1/none'" in result.output
    assert "s3cret" not in result.output
    assert result.output.count("\n") == 1


def test_check_lists_every_check(cli: Cli) -> None:
    result = cli("db", "check")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    names = ["connection", "PostgreSQL", "pgvector", "revision", "vectors", "rights", "connections"]
    assert [line[:2] for line in lines] == [["ok", name] for name in names]


def test_check_leaves_nothing_behind(database: Database, cli: Cli) -> None:
    def tables() -> int:
        with database.begin() as connection:
            return int(connection.exec_driver_sql("SELECT count(*) FROM pg_class").scalar_one())

    before = tables()
    cli("db", "check")
    assert tables() == before


def test_check_finds_too_few_connections(cli: Cli) -> None:
    result = cli("db", "check", DB_MAX_CONNECTIONS="9999")
    assert result.exit_code == 3
    bad = [line for line in result.stdout.splitlines() if line.startswith("BAD")]
    assert bad == [
        "BAD  connections   DB_MAX_CONNECTIONS is 9999, the server lets in 97: lower the one or raise the other"
    ]


def test_check_of_a_database_that_is_not_migrated(bare_url: str, cli_at: CliAt) -> None:
    result = cli_at(bare_url)("db", "check")
    assert result.exit_code == 3
    assert "BAD  pgvector      is not installed" in result.stdout
    assert "BAD  revision      the database is not migrated: type 'embstore db upgrade'" in result.stdout
    assert "ok   connections" in result.stdout


def test_check_names_missing_rights(store: Database, database_url: str, cli_at: CliAt) -> None:
    with store.begin() as connection:
        connection.exec_driver_sql("CREATE ROLE reader LOGIN CONNECTION LIMIT 5")
        connection.exec_driver_sql("GRANT USAGE ON SCHEMA embstore TO reader")
        connection.exec_driver_sql("GRANT ALL ON ALL TABLES IN SCHEMA embstore TO reader")
        connection.exec_driver_sql("REVOKE INSERT ON embstore.embedding_1, embstore.run FROM reader")
    try:
        address = make_url(database_url).set(username="reader").render_as_string()
        result = cli_at(address)("db", "check", DB_MAX_CONNECTIONS="6")
    finally:
        with store.begin() as connection:
            connection.exec_driver_sql("DROP OWNED BY reader; DROP ROLE reader")
    assert result.exit_code == 3
    assert "BAD  rights        role reader may not read and write embedding_1, run: ask the owner" in result.stdout
    assert "DB_MAX_CONNECTIONS is 6, the server lets in 5" in result.stdout


@pytest.mark.parametrize(
    ("address", "shown", "masked"),
    [
        (UNREACHABLE, "postgresql://ann:***@127.0.0.1:1/none", True),
        ("postgresql+psycopg2://ann@h/n", "postgresql://ann@h/n", False),
        ("postgresql://ann@h/n?password=s3cret&sslmode=require", "postgresql://ann:***@h/n?sslmode=require", True),
        ("postgresql://ann@[::1]:2/n", "postgresql://ann@[::1]:2/n", False),
    ],
)
def test_url_shows_no_password(cli_at: CliAt, address: str, shown: str, masked: bool) -> None:
    result = cli_at(address)("db", "url")
    assert (result.exit_code, result.stdout) == (0, f"{shown}\n")
    assert result.stderr == ("the password is not shown: DATABASE_URL has it\n" if masked else "")


def test_psql_gets_the_password_past_other_peoples_eyes(database_url: str) -> None:
    address = make_url(database_url).set(password="s3 cret").render_as_string(hide_password=False)
    shell = r"\! ps -ww -o args= -p $PPID; echo password $PGPASSWORD"
    result = embstore("db", "psql", "-At", "-c", shell, DATABASE_URL=address)
    arguments, password = result.stdout.splitlines()
    assert "postgresql://embstore@/test_" in arguments
    assert "s3" not in arguments
    assert password == "password s3 cret"


def test_psql_finds_the_views_and_gives_its_exit_code(bare_url: str, database_url: str) -> None:
    result = embstore(
        "db", "psql", "-At", "-c", "show search_path", "-c", "select count(*) from items", DATABASE_URL=database_url
    )
    assert (result.returncode, result.stdout) == (0, "public, embstore\n0\n")
    assert embstore("db", "psql", "-c", "select", "-c", "selec", DATABASE_URL=bare_url).returncode == 1


def test_the_errors_of_a_database_never_show_a_password() -> None:
    address = "postgresql://ann:s3cret@h/n?password=0ther"
    assert str(Database(load(database_url=address))) == "'postgresql://ann:***@h/n'"
