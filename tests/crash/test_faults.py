"""A worker fails in every way at every point of its work: the run goes on, and nothing is lost, doubled or left.

Every way at every point where EMBSTORE_TEST_SOAK is set (`make soak`); otherwise some of them, in every way and at
every point at least once.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from audit import ITEMS, SHORT_LEASE, Vectors, audit
from commands import Command, Start, Watcher, wait_until

from embstore.workers import ONE_WISH

POINTS = ("claimed", "decode", "model", "before_commit", "after_commit")
SOAK = "EMBSTORE_TEST_SOAK" in os.environ
DEATHS = [(action, point) for action in ("kill", "segv", "term") for point in POINTS]
DEATHS_IN_SHORT = [("kill", point) for point in POINTS] + [
    ("segv", "model"),
    ("term", "decode"),
    ("term", "before_commit"),
]
STOPS = POINTS if SOAK else ("claimed", "model", "before_commit")
HANGS = POINTS if SOAK else ("decode", "after_commit")

Runs = list[Command]


@pytest.fixture
def begin(start: Start, tones: Path, tmp_path: Path) -> Start:
    """Start the main job on `tones` with a fault armed: at the second time that any worker comes to its point."""

    def begin(point: str, action: str, *, number: int = 2, log: bool = False, **env: object) -> Command:
        counts = tmp_path / "faults"
        counts.mkdir(exist_ok=True)
        return start(
            *("extract", str(tones), "--model", "probe", "--workers", "2", *(["--log-json"] if log else [])),
            PROBE_SLEEP=0.005,
            EMBSTORE_TEST_FAULTS=f"{point}:{action}:{number}",
            EMBSTORE_TEST_FAULTS_FOLDER=counts,
            **env,
        )

    return begin


def reached(tmp_path: Path, point: str, number: int = 2) -> bool:
    return (tmp_path / "faults" / f"{point}.{number}").exists()


@pytest.mark.parametrize(("action", "point"), DEATHS if SOAK else DEATHS_IN_SHORT)
def test_a_worker_that_dies_is_replaced(
    action: str, point: str, begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs, tmp_path: Path
) -> None:
    run = begin(point, action)
    assert run.wait() == 0, run.err
    assert reached(tmp_path, point)
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}
    assert max(watcher.rows("SELECT max(attempts) FROM embstore.extraction")[0]) <= 2


@pytest.mark.parametrize("point", STOPS)
def test_a_worker_that_stops_past_its_lease_and_wakes_up_writes_nothing_over(
    point: str, begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs, tmp_path: Path
) -> None:
    run = begin(point, "stop", **SHORT_LEASE)
    sleeper = stopped_worker(run)
    lease = token(watcher, sleeper)
    alive = "SELECT count(*) FROM embstore.lease WHERE token = %s AND expires_at > now()"
    wait_until(lambda: watcher.rows(alive, lease) == [(0,)], "the lease to run out")
    wait_until(lambda: watcher.count("done") == ITEMS, "the other one to do all of it")
    os.kill(sleeper.pid, signal.SIGCONT)
    assert run.wait() == 0, run.err
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


@pytest.mark.parametrize("point", HANGS)
def test_the_command_is_told_to_stop_while_a_worker_hangs(
    point: str, begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs, tmp_path: Path
) -> None:
    """Once: the others finish what they have. Twice: it leaves at once, the one that hangs included."""
    run = begin(point, "hang")
    wait_until(lambda: reached(tmp_path, point), f"a worker at {point}")
    run.process.terminate()
    wait_until(lambda: "again leaves at once" in run.err, "the word that it stops")
    time.sleep(2 * ONE_WISH)
    run.process.terminate()
    assert run.wait() in (130, -signal.SIGTERM)  # the latter if it was just about to end by itself
    assert audit(watcher, runs, expected=undisturbed).get("running") is None
    again = begin(point, "hang", number=10**6)
    assert again.wait() == 0, again.err
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group whose processes may use 400 MB together: the kernel kills the largest one that wants more."""
    own = next((line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line), None)
    if own is None:
        pytest.skip("no memory controller of version 1")
    group = Path("/sys/fs/cgroup/memory" + own.split(":")[2]) / f"embstore-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(400 << 20))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    wait_until(lambda: not (group / "cgroup.procs").read_text(), "the processes to end")
    group.rmdir()


def test_the_kernel_kills_a_worker_for_its_memory(
    begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs, tmp_path: Path, small_memory: Path
) -> None:
    watcher.hold_back(ITEMS)  # nothing is worked on before all of its processes are in the group
    run = begin("model", "memory")
    wait_until(lambda: len(run.workers()) == 2, "both workers")
    for process in run.members():
        (small_memory / "cgroup.procs").write_text(str(process.pid))
    watcher.let_go()
    assert run.wait() == 0, run.err
    assert reached(tmp_path, "model")
    assert "oom_kill 1" in (small_memory / "memory.oom_control").read_text()
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


def test_the_log_tells_what_happened(begin: Start, watcher: Watcher, runs: Runs) -> None:
    run = begin("before_commit", "kill", log=True)
    assert run.wait() == 0, run.err
    events = [json.loads(line) for line in run.err.splitlines()]
    first, last = events[0], events[-1]
    ((number,),) = watcher.rows("SELECT run_id FROM embstore.run")
    assert (first["event"], first["command"], first["workers"]) == ("run_started", "extract", 2)
    assert (last["event"], last["status"], last["embedded"]) == ("run_ended", "done", ITEMS)
    assert first["runs"] == last["runs"] == {"tones": number}
    [death] = [event for event in events if event["event"] == "worker_died"]
    started = [event for event in events if event["event"] == "worker_started"]
    assert len({event["lease"] for event in started}) == len(started) == 3
    assert death["lease"] in {event["lease"] for event in started}
    commits = [event for event in events if event["event"] == "committed"]
    assert sum(event["embedded"] for event in commits) == ITEMS
    assert {event["worker"] for event in commits} <= {0, 1}
    assert {event["run"] for event in commits} == {number}


def stopped_worker(run: Command) -> psutil.Process:
    """The worker that has stopped, once there is one."""
    found: list[psutil.Process] = []

    def look() -> bool:
        found[:] = [w for w in run.workers() if w.status() == psutil.STATUS_STOPPED]
        return bool(found)

    wait_until(look, "a worker that has stopped")
    return found[0]


def token(watcher: Watcher, worker: psutil.Process) -> int:
    """The lease of a worker process."""
    ((number,),) = watcher.rows("SELECT token FROM embstore.lease WHERE worker LIKE %s", f"%:{worker.pid}")
    return int(number)
