"""Connections cut in the middle of a COPY, before a commit, and after one whose answer never arrives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from audit import ITEMS, Vectors, audit
from commands import Command, Start, Watcher
from proxy import proxy, some

Runs = list[Command]


def is_copy_data(data: bytes) -> bool:
    return data.startswith(b"d")


def is_commit(data: bytes) -> bool:
    return data.startswith(b"Q") and b"COMMIT" in data


@pytest.mark.parametrize(
    ("message", "when"),
    [(is_copy_data, "before"), (is_copy_data, "after"), (is_commit, "before"), (is_commit, "after")],
    ids=["in COPY", "after COPY", "before the commit", "commit without an answer"],
)
def test_a_run_whose_connections_are_cut_again_and_again(
    message: Callable[[bytes], bool],
    when: str,
    start: Start,
    tones: Path,
    database_url: str,
    watcher: Watcher,
    undisturbed: Vectors,
    runs: Runs,
) -> None:
    words = ("extract", str(tones), "--model", "probe", "--workers", "2")
    with proxy(database_url, some(0.4 if message is is_copy_data else 0.15, message), when=when) as between:
        run_until_done(start, *words, DATABASE_URL=between.address, PROBE_SLEEP=0.03)
        assert between.cuts > 1
    watcher.let_leases_run_out()  # those of which no worker knows, as the answer was lost
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}
    attempts = dict(watcher.rows("SELECT attempts, count(*) FROM embstore.extraction GROUP BY 1"))
    assert max(attempts) <= 2, attempts


@pytest.mark.parametrize("when", ["before", "after"])
def test_centroids_whose_commits_are_lost(
    when: str, start: Start, tones: Path, database_url: str, watcher: Watcher, runs: Runs
) -> None:
    assert start("extract", str(tones), "--model", "probe").wait() == 0
    assert start("centroids").wait() == 0
    expected = watcher.rows(
        "SELECT speaker, num_utterances, embedding::text FROM embstore.speaker_centroids ORDER BY 1"
    )
    watcher.rows(
        "UPDATE embstore.centroid SET status = 'pending', num_utterances = NULL; DELETE FROM embstore.centroid_vector"
    )
    with proxy(database_url, some(0.2, is_commit), when=when) as between:
        run_until_done(start, "centroids", "--chunk-size", "1", DATABASE_URL=between.address)
        assert between.cuts > 1
    assert (
        watcher.rows("SELECT speaker, num_utterances, embedding::text FROM embstore.speaker_centroids ORDER BY 1")
        == expected
    )
    assert watcher.rows("SELECT DISTINCT status FROM embstore.centroid") == [("done",)]


def run_until_done(start: Start, *words: str, **env: object) -> None:
    """A worker goes on by itself; what comes before the workers is one transaction, and is told to be run again."""
    for _ in range(20):
        run = start(*words, **env)
        if run.wait() == 0:
            return
        assert run.process.returncode == 3
        assert "error: no database at" in run.err
    raise AssertionError("cut too often")
