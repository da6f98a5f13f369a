"""The database restarts, loses its connections, or stays away, in the middle of a run."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from functools import partial
from pathlib import Path

import psycopg2
from audit import ITEMS, Vectors, audit
from commands import PATIENCE, Command, Gate, Start, Watcher, run_in_the_middle, wait_until

from embstore.db import embedded
from embstore.workers import ONE_WISH

Runs = list[Command]


def test_all_connections_are_cut_again_and_again(
    start: Start, tones: Path, watcher: Watcher, undisturbed: Vectors, runs: Runs
) -> None:
    watcher.hold_back(220)
    run = start("extract", str(tones), "--model", "probe", "--workers", "2", PROBE_SLEEP=0.05)
    watcher.wait_for_claims()
    for held_back in (160, 110, 60, 1):
        done = watcher.count("done")
        watcher.hold_back(held_back)
        watcher.rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'embstore'"
        )
        watcher.wait_for_done(done + 20)
    watcher.let_go()
    assert run.wait() == 0, run.err
    watcher.let_leases_run_out()  # those of which no worker knows, as the answer was lost
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


def test_the_embedded_server_is_killed_and_the_run_starts_it_again(
    start: Start, tones: Path, undisturbed: Vectors, runs: Runs, other_home: Path
) -> None:
    watcher = Watcher(embedded.ensure_running(other_home))
    home = {"DATABASE_URL": "", "EMBSTORE_HOME": other_home}
    assert start("db", "upgrade", **home).wait() == 0
    watcher.hold_back(1)
    run = start("extract", str(tones), "--model", "probe", "--workers", "2", **home, PROBE_SLEEP=0.05)
    watcher.wait_for_done(40)
    postmaster = embedded.status(other_home).pid
    assert postmaster is not None
    os.kill(postmaster, signal.SIGKILL)
    wait_until(lambda: embedded.status(other_home).pid not in (None, postmaster), "another server")
    wait_until(lambda: _answers(watcher), "its answer")
    watcher.let_go()
    assert run.wait() == 0, run.err
    watcher.let_leases_run_out()  # those of which no worker knows, as the answer was lost
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


def test_a_server_that_stops_and_starts_is_waited_for(
    start: Start, tones: Path, undisturbed: Vectors, runs: Runs, other_home: Path, other_server: str
) -> None:
    watcher = Watcher(other_server)
    words = ("extract", str(tones), "--model", "probe", "--workers", "2")
    watcher.hold_back(1)
    run = start(*words, DATABASE_URL=other_server, PROBE_SLEEP=0.05)
    watcher.wait_for_done(40)
    embedded.stop(other_home, force=True)
    time.sleep(2)  # longer than a batch takes: everybody notices
    assert run.process.poll() is None
    embedded.ensure_running(other_home)
    watcher.let_go()
    assert run.wait() == 0, run.err
    watcher.let_leases_run_out()  # those of which no worker knows, as the answer was lost
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


def test_a_server_that_stays_away_ends_the_run_and_loses_nothing(
    start: Start, tones: Path, undisturbed: Vectors, runs: Runs, other_home: Path, other_server: str, tmp_path: Path
) -> None:
    watcher = Watcher(other_server)
    words = ("extract", str(tones), "--model", "probe", "--workers", "2")
    env = {"DATABASE_URL": other_server, "PROBE_SLEEP": 0.05, "EMBSTORE_TEST_PATIENCE_SECONDS": 1}
    for done in (30, 80, 130, 180):  # more often than an item may kill its worker
        gate = Gate(tmp_path / f"gate{done}")
        begin = partial(start, *words, **env, PROBE_GATE=gate.path)
        # What a run had in hand is done by the next one, before the server is stopped again.
        run, _ = run_in_the_middle(begin, watcher, gate, done=done, items=ITEMS, held_back=ITEMS - done - 20)
        embedded.stop(other_home, force=True)
        gate.open()
        assert run.wait() == 3
        assert _only_line(run).startswith("error: no database at ")
        embedded.ensure_running(other_home)
        assert watcher.count("done") >= done
        watcher.let_leases_run_out()
    watcher.let_go()
    assert start(*words, **env).wait() == 0
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


def test_ctrl_c_twice_while_the_server_is_away_leaves_at_once(
    start: Start, tones: Path, runs: Runs, other_home: Path, other_server: str
) -> None:
    watcher = Watcher(other_server)
    watcher.hold_back(1)
    env = {"DATABASE_URL": other_server, "PROBE_SLEEP": 0.05, "EMBSTORE_TEST_PATIENCE_SECONDS": 10 * PATIENCE}
    run = start("extract", str(tones), "--model", "probe", **env)
    watcher.wait_for_done(10)
    embedded.stop(other_home, force=True)
    run.press_ctrl_c()
    wait_until(lambda: "again leaves at once" in run.err, "the word that it stops")
    assert run.process.poll() is None
    time.sleep(2 * ONE_WISH)
    run.press_ctrl_c()
    assert run.wait() in (3, 130)  # far less than its patience with the database
    wait_until(lambda: not run.members(), "the workers to end")


def _answers(watcher: Watcher) -> bool:
    with contextlib.suppress(psycopg2.OperationalError):
        return watcher.rows("SELECT 1") == [(1,)]
    return False


def _only_line(run: Command) -> str:
    assert "Traceback" not in run.err
    (line,) = [line for line in run.err.splitlines() if line.startswith("error")]
    return line
