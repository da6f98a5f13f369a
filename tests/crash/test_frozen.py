"""A process is stopped, or its machine freezes, in a transaction that others wait for: not for ever.

What it held is let go by the server after a while. When it wakes up, what it does is refused, or done again.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import psycopg2
import pytest
from audit import ITEMS, SHORT_LEASE, Vectors, audit
from commands import Command, Start, Watcher, wait_until
from proxy import proxy
from sqlalchemy import make_url

Runs = list[Command]
Freeze = Callable[..., Command]


@pytest.fixture
def freeze(start: Start, tmp_path: Path) -> Freeze:
    """Start a command of which a process stops when it first comes to a point; returns when it has."""

    def freeze(point: str, *words: str, **env: object) -> Command:
        counts = tmp_path / "faults"
        counts.mkdir()
        faults = {"EMBSTORE_TEST_FAULTS": f"{point}:stop:1", "EMBSTORE_TEST_FAULTS_FOLDER": counts}
        run = start(*words, EMBSTORE_TEST_IDLE_SECONDS=3, **SHORT_LEASE, **faults, **env)
        wait_until(lambda: stopped(run), f"a process to stop at {point}")
        return run

    return freeze


def stopped(run: Command) -> list[psutil.Process]:
    """Processes of a run that have stopped."""
    found = []
    for process in run.members():
        try:
            if process.status() == psutil.STATUS_STOPPED:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wake(run: Command) -> None:
    for process in stopped(run):
        process.send_signal(signal.SIGCONT)


def test_a_worker_stalls_in_the_middle_of_a_copy_with_its_rows_locked(
    start: Start, tones: Path, database_url: str, watcher: Watcher, undisturbed: Vectors, runs: Runs
) -> None:
    """As on a network that loses everything: the server waits for the rest of the COPY, and no time limit counts."""
    first = itertools.count(1)
    with proxy(database_url, lambda data: data.startswith(b"d") and next(first) == 2, when="never") as between:
        run = start(
            *("extract", str(tones), "--model", "probe", "--workers", "2"),
            DATABASE_URL=between.address,
            PROBE_SLEEP=0.03,
            **SHORT_LEASE,
        )
        assert run.wait() == 0, run.err
        assert between.cuts == 1
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


@pytest.fixture
def embedded(start: Start, tones: Path) -> None:
    """All of `tones` is embedded."""
    assert start("extract", str(tones), "--model", "probe").wait() == 0


def test_a_worker_stops_before_a_range_of_speakers_is_committed(
    embedded: None, freeze: Freeze, watcher: Watcher, runs: Runs
) -> None:
    run = freeze("centroid_range", "centroids", "--workers", "2", "--chunk-size", "2")
    statuses = "SELECT status, count(*) FROM embstore.centroid GROUP BY 1"
    wait_until(lambda: watcher.rows(statuses) == [("done", 10)], "the other one to do all of it")
    before = watcher.rows("SELECT speaker, finished_at FROM embstore.centroid ORDER BY 1")
    wake(run)
    assert run.wait() == 0, run.err
    assert watcher.rows("SELECT speaker, finished_at FROM embstore.centroid ORDER BY 1") == before
    assert audit(watcher, runs) == {"done": ITEMS}


def test_a_worker_stops_before_a_boundary_run_is_committed(
    embedded: None, freeze: Freeze, start: Start, watcher: Watcher, runs: Runs
) -> None:
    run = freeze("boundary_write", "boundaries")
    assert start("boundaries").wait() == 0
    found = "SELECT boundary_run_id, position, score FROM embstore.boundary_score ORDER BY 1, 2"
    before = watcher.rows(found)
    assert len(before) >= ITEMS - 1
    wake(run)
    assert run.wait() == 0, run.err
    assert watcher.rows(found) == before
    assert watcher.rows("SELECT status FROM embstore.boundary_run") == [("done",)]
    assert audit(watcher, runs) == {"done": ITEMS}


def test_the_command_stops_in_an_index_build(
    embedded: None, freeze: Freeze, start: Start, watcher: Watcher, runs: Runs
) -> None:
    run = freeze("index_build", "index", "build", "--model", "probe")
    busy = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database ="
    wait_until(
        lambda: watcher.rows(f"{busy} (SELECT oid FROM pg_database WHERE datname = current_database())") == [(0,)],
        "the server to end its session",
    )
    assert start("index", "drop", "--model", "probe").wait() == 0
    assert start("index", "build", "--model", "probe").wait() == 0
    wake(run)
    run.wait()
    valid = "SELECT indisvalid FROM pg_index JOIN pg_class c ON c.oid = indexrelid JOIN pg_am a ON a.oid = c.relam"
    assert watcher.rows(f"{valid} WHERE amname = 'hnsw'") == [(True,)]
    assert audit(watcher, runs) == {"done": ITEMS}


def test_the_command_stops_in_a_migration(freeze: Freeze, start: Start, bare_url: str, runs: Runs) -> None:
    run = freeze("migration", "db", "upgrade", DATABASE_URL=bare_url)
    assert start("db", "upgrade", DATABASE_URL=bare_url).wait() == 0
    wake(run)
    assert run.wait() == 3
    (line,) = run.err.splitlines()
    assert line.startswith("error: no database at ")
    assert start("db", "check", DATABASE_URL=bare_url).wait() == 0


def test_the_command_stops_in_an_export_and_others_go_on(
    embedded: None, freeze: Freeze, start: Start, tones: Path, tmp_path: Path, watcher: Watcher, runs: Runs
) -> None:
    """It reads one state of the database, which it may keep: nobody waits for it."""
    export = ("export", "embeddings", str(tmp_path / "kept"), "--format", "npz")
    run = freeze("export", *export)
    again = start(*export)
    assert again.wait() == 2
    assert "another export is writing into" in again.err
    assert start("extract", str(tones), "--model", "probe", "--dataset", "more").wait() == 0
    wake(run)
    assert run.wait() == 0, run.err
    assert audit(watcher, runs) == {"done": 2 * ITEMS}


def test_the_command_stops_in_an_import(
    freeze: Freeze, start: Start, tmp_path: Path, watcher: Watcher, runs: Runs
) -> None:
    file = tmp_path / "ten.npz"
    np.savez(file, embedding=np.eye(10, 4, dtype=np.float32) + 1, path=np.array([f"s/{n}.wav" for n in range(10)]))
    words = ("import", "embeddings", str(file), "--dataset", "calls", "--model", "x", "--root", "/data/calls")
    run = freeze("import", *words)
    assert start(*words).wait() == 0
    wake(run)
    assert run.wait() == 0, run.err
    assert audit(watcher, runs) == {"done": 10}


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (
            "INSERT INTO embstore.dataset (name, media, root) VALUES ('tones', 'audio', %s)",
            "is being made by another run",
        ),
        ("SELECT FROM embstore.dataset WHERE root = %s FOR UPDATE", "is being changed (embstore, process "),
    ],
    ids=["new", "there already"],
)
def test_who_waits_for_another_run_is_told_and_can_leave_or_stay(
    held: str, words: str, start: Start, watcher: Watcher, database_url: str, tones: Path
) -> None:
    if "INSERT" not in held:
        assert start("extract", str(tones), "--model", "probe").wait() == 0
    address = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    other = psycopg2.connect(address)
    try:
        other.cursor().execute(held, (str(tones),))
        leaving, staying = (start("extract", str(tones), "--model", "probe") for _ in range(2))
        for run in (leaving, staying):
            wait_until(lambda run=run: words in run.err, "the word that it waits")  # type: ignore[misc]
        leaving.press_ctrl_c()
        assert leaving.wait() == 130
    finally:
        other.close()
    assert staying.wait() == 0, staying.err
    assert audit(watcher, [leaving, staying]) == {"done": ITEMS}
