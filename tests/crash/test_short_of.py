"""The server's disk is full, it takes no more connections, or the clocks of the clients are wrong by hours."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psycopg2
import pytest
from audit import ITEMS, Vectors, audit
from commands import PATIENCE, Command, Gate, Start, Watcher, run_in_the_middle, wait_until
from sqlalchemy import make_url

from embstore.db import embedded

Runs = list[Command]

HOURS = 3600
DISK = 120 << 20
"""Bytes of a disk that a new server leaves some room on."""
CONNECTIONS = 15

# Python's own clock of what time it is; `time.monotonic` stays, as it would on a machine whose clock is set wrong.
_WRONG_CLOCK = """
import os, time
_right, _right_ns, _ahead = time.time, time.time_ns, int(os.environ.get("CLOCK_AHEAD", "0"))
time.time = lambda: _right() + _ahead
time.time_ns = lambda: _right_ns() + _ahead * 10**9
"""


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A folder on a real file system of its own that has little room."""
    folder = Path(tempfile.mkdtemp(prefix="embstore-tests-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0755", "tmpfs", folder]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode:
        folder.rmdir()
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield folder
    embedded.stop(folder / "home", force=True)
    umount = ["umount", folder]
    wait_until(lambda: subprocess.run(umount, capture_output=True, check=False).returncode == 0, "its users to go")
    folder.rmdir()


def test_the_disk_is_full_and_a_run_goes_on_when_there_is_room_again(
    start: Start, tones: Path, undisturbed: Vectors, runs: Runs, small_disk: Path, gate: Gate
) -> None:
    words = ("extract", str(tones), "--model", "probe", "--workers", "2")
    home = small_disk / "home"
    env = {"DATABASE_URL": "", "EMBSTORE_HOME": home, "EMBSTORE_TEST_PATIENCE_SECONDS": 2}
    watcher = Watcher(embedded.ensure_running(home))
    assert start("db", "upgrade", **env).wait() == 0
    begin = partial(start, *words, **env, PROBE_SLEEP=0.05, PROBE_GATE=gate.path)
    run, _ = run_in_the_middle(begin, watcher, gate, done=20, items=ITEMS)
    with (small_disk / "other").open("wb", buffering=0) as other, contextlib.suppress(OSError):
        while True:
            other.write(bytes(4096))
    gate.open()
    assert run.wait() == 3, run.err
    assert "the disk of the database is full" in run.err
    (small_disk / "other").unlink()
    before = watcher.count("done")
    assert 20 <= before < ITEMS
    watcher.let_leases_run_out()
    watcher.let_go()
    again = start(*words, **env)
    assert again.wait() == 0, again.err
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


@pytest.fixture
def few_connections(other_home: Path, other_server: str) -> str:
    """The address of a server that takes few connections."""
    Watcher(other_server).rows(f"ALTER SYSTEM SET max_connections = {CONNECTIONS}")
    embedded.stop(other_home, force=True)
    return embedded.ensure_running(other_home)


class Crowd:
    """Connections of somebody else, as many as the server takes."""

    def __init__(self, address: str) -> None:
        self._address = make_url(address).set(drivername="postgresql").render_as_string(hide_password=False)
        self._all = [psycopg2.connect(self._address, application_name="crowd")]
        self._all[0].autocommit = True

    def fill(self) -> bool:
        """Take every connection that is free; whether all are the crowd's."""
        with contextlib.suppress(psycopg2.OperationalError):
            while True:
                self._all.append(psycopg2.connect(self._address, application_name="crowd"))
        return len(self._all) == CONNECTIONS

    def drive_out(self) -> None:
        """End every session of embstore."""
        with self._all[0].cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'embstore'")

    def go(self) -> None:
        """Leave, and be seen by the server to have left."""
        last, *others = self._all
        for connection in others:
            connection.close()
        with last.cursor() as cursor:

            def is_alone() -> bool:
                cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'crowd'")
                return bool(cursor.fetchone() == (1,))

            wait_until(is_alone, "the crowd's sessions to end")
        last.close()


def test_no_connection_is_left_in_the_middle_of_a_run(
    start: Start, tones: Path, undisturbed: Vectors, runs: Runs, few_connections: str
) -> None:
    watcher = Watcher(few_connections)
    watcher.hold_back(1)
    run = start(
        "extract", str(tones), "--model", "probe", "--workers", "2", DATABASE_URL=few_connections, PROBE_SLEEP=0.05
    )
    watcher.wait_for_done(20)
    crowd = Crowd(few_connections)
    crowd.fill()
    crowd.drive_out()
    wait_until(crowd.fill, "the crowd to have every connection")
    other = start("status", DATABASE_URL=few_connections)
    assert other.wait() == 3
    assert "too many clients already" in other.err
    assert run.process.poll() is None
    crowd.go()
    watcher.let_go()
    assert run.wait() == 0, run.err
    watcher.let_leases_run_out()  # those of which no worker knows, as the answer was lost
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


@pytest.fixture
def with_clock(start: Start, tmp_path: Path, probe: Path) -> Callable[..., Command]:
    """Start a command in whose processes it is so many seconds later than it is."""
    folder = tmp_path / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_WRONG_CLOCK)

    def with_clock(ahead: int, *words: str, **env: object) -> Command:
        return start(*words, CLOCK_AHEAD=ahead, PYTHONPATH=os.pathsep.join(map(str, (folder, probe))), **env)

    return with_clock


def test_clocks_that_are_wrong_by_hours_take_nobodys_rows_away(
    with_clock: Callable[..., Command], tones: Path, watcher: Watcher, undisturbed: Vectors, runs: Runs, gate: Gate
) -> None:
    """Leases go by the server's clock: what a killed worker had is taken over in time, and nothing else."""
    words = ("extract", str(tones), "--model", "probe", "--workers", "2")
    env = {"PROBE_SLEEP": 0.03, "PROBE_GATE": gate.path}
    gate.close()
    both = [with_clock(ahead, *words, **env) for ahead in (5 * HOURS, -5 * HOURS)]
    for run in both:
        gate.wait_for(run)
    watcher.hold_back(1)
    gate.open()
    watcher.wait_for_done(40)
    assert watcher.rows("SELECT count(*) FROM embstore.extraction WHERE attempts > 1") == [(0,)]
    killed = both[0].workers()
    both[0].kill_group()
    both[0].process.wait()
    watcher.let_leases_run_out(*killed)
    watcher.let_go()
    assert both[1].wait() == 0, both[1].err
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}
    tokens = "SELECT count(DISTINCT claim_token) FROM embstore.extraction WHERE attempts > 1"
    assert watcher.rows(tokens) <= [(2,)]
    doctor = with_clock(5 * HOURS, "doctor")
    doctor.wait()
    behind = re.search(r"the server is ([\d,]+) s behind this machine", doctor.out)
    assert behind is not None
    assert 5 * HOURS - PATIENCE < int(behind[1].replace(",", "")) <= 5 * HOURS  # less the time to ask for it
