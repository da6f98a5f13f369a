"""A process is killed in the middle of a centroid range, a boundary run, an index build, an export or a migration."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from audit import ITEMS, audit
from commands import Command, Start, Watcher, wait_until

Runs = list[Command]
Armed = Callable[..., Command]


@pytest.fixture
def armed(start: Start, tmp_path: Path) -> Armed:
    """Start a command that is killed when it first comes to a point."""

    def armed(point: str, *words: str, **env: object) -> Command:
        counts = tmp_path / "faults"
        counts.mkdir(exist_ok=True)
        run = start(*words, EMBSTORE_TEST_FAULTS=f"{point}:kill:1", EMBSTORE_TEST_FAULTS_FOLDER=counts, **env)
        run.wait()
        assert (counts / f"{point}.1").exists(), run.err
        return run

    return armed


@pytest.fixture
def embedded(start: Start, tones: Path) -> None:
    """All of `tones` is embedded."""
    assert start("extract", str(tones), "--model", "probe").wait() == 0


def test_a_worker_is_killed_before_a_range_of_speakers_is_committed(
    embedded: None, armed: Armed, watcher: Watcher, runs: Runs
) -> None:
    run = armed("centroid_range", "centroids", "--workers", "2", "--chunk-size", "2")
    assert run.process.returncode == 0, run.err
    assert watcher.rows("SELECT status, count(*) FROM embstore.centroid GROUP BY 1") == [("done", 10)]
    assert audit(watcher, runs) == {"done": ITEMS}


def test_a_worker_is_killed_before_a_boundary_run_is_committed(
    embedded: None, armed: Armed, start: Start, watcher: Watcher, runs: Runs
) -> None:
    run = armed("boundary_write", "boundaries")
    assert run.process.returncode == 0, run.err
    rows = "SELECT position, score, confidence FROM embstore.boundary ORDER BY 1"
    scores = "SELECT position, score FROM embstore.boundary_score ORDER BY 1"
    found = watcher.rows(rows), watcher.rows(scores)
    assert found[1]
    watcher.rows(
        "DELETE FROM embstore.boundary_run; DELETE FROM embstore.boundary; DELETE FROM embstore.boundary_score"
    )
    assert start("boundaries").wait() == 0
    assert (watcher.rows(rows), watcher.rows(scores)) == found
    assert audit(watcher, runs) == {"done": ITEMS}


def test_the_command_is_killed_in_an_index_build(
    embedded: None, armed: Armed, start: Start, watcher: Watcher, runs: Runs
) -> None:
    run = armed("index_build", "index", "build", "--model", "probe")
    assert run.process.returncode == -signal.SIGKILL
    builds = "SELECT count(*) FROM pg_stat_activity WHERE starts_with(query, 'CREATE INDEX') AND state = 'active'"
    wait_until(lambda: watcher.rows(builds) == [(0,)], "the server to end the build")
    again = start("index", "build", "--model", "probe")
    assert again.wait() == 0 or "has this index already" in again.err
    valid = "SELECT indisvalid FROM pg_index JOIN pg_class c ON c.oid = indexrelid JOIN pg_am a ON a.oid = c.relam"
    assert watcher.rows(f"{valid} WHERE amname = 'hnsw'") == [(True,)]
    assert audit(watcher, runs) == {"done": ITEMS}


def test_the_command_is_killed_in_an_export(
    embedded: None, armed: Armed, start: Start, watcher: Watcher, runs: Runs, tmp_path: Path
) -> None:
    words = ("export", "embeddings", str(tmp_path / "kept"), "--format", "npz")
    run = armed("export", *words)
    assert run.process.returncode == -signal.SIGKILL
    assert not list((tmp_path / "kept").glob("*.npz"))
    assert start(*words).wait() == 0
    assert len(np.load(tmp_path / "kept" / "embeddings.npz")["embedding"]) == ITEMS
    assert audit(watcher, runs) == {"done": ITEMS}


def test_the_command_is_killed_in_a_migration(armed: Armed, start: Start, bare_url: str, runs: Runs) -> None:
    run = armed("migration", "db", "upgrade", DATABASE_URL=bare_url)
    assert run.process.returncode == -signal.SIGKILL
    bare = Watcher(bare_url)
    wait_until(lambda: bare.rows("SELECT to_regnamespace('embstore')::text") == [(None,)], "all of it to be undone")
    assert start("db", "upgrade", DATABASE_URL=bare_url).wait() == 0
    assert start("db", "check", DATABASE_URL=bare_url).wait() == 0
