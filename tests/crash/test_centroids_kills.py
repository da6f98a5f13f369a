"""kill -9 of the command, of one worker and of all while centroids are computed: complete, right, nothing twice."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable

import numpy as np
import pytest
from audit import SHORT_LEASE
from commands import PATIENCE, Command, Watcher, wait_until
from numpy.typing import NDArray

SPEAKERS = 400
UTTERANCES = 30
DIM = 64
CENTROIDS = {"table": "embstore.centroid", "key": "centroid_id"}

Runs = list[Command]
Start = Callable[..., Command]
Mean = NDArray[np.float64]

_FILL = f"""
INSERT INTO embstore.dataset (name, media, root) VALUES ('calls', 'audio', '/data');
INSERT INTO embstore.model (name, media, dim, fingerprint, settings) VALUES ('made', 'audio', {DIM}, '', '{{}}');
CREATE TABLE embstore.embedding_1 PARTITION OF embstore.embedding FOR VALUES IN (1);
INSERT INTO embstore.item (dataset_id, position, path, speaker)
SELECT 1, n, n || '.wav', 'speaker ' || mod(n, {SPEAKERS}) FROM generate_series(0, {SPEAKERS * UTTERANCES - 1}) n;
INSERT INTO embstore.extraction (dataset_id, model_id, item_id) SELECT 1, 1, item_id FROM embstore.item;
INSERT INTO embstore.embedding
SELECT 1, 1, item_id, array(SELECT sin(item_id * 0.37 + d * d) FROM generate_series(1, {DIM}) d)::real[]::vector
FROM embstore.item;
UPDATE embstore.extraction SET status = 'done', finished_at = now();
CREATE FUNCTION take_a_while() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.01); RETURN NULL; END';
CREATE TRIGGER take_a_while AFTER UPDATE ON embstore.centroid EXECUTE FUNCTION take_a_while();
"""
"""Every range takes a while, so that a strike is most likely in the middle of one."""


@pytest.fixture
def expected(watcher: Watcher) -> dict[str, Mean]:
    """A dataset of synthetic speakers; returns their means, by numpy."""
    watcher.rows(_FILL)
    watcher.hold_back(1, **CENTROIDS)  # no run is over before the strike, however slow the test itself is
    rows = watcher.rows(
        "SELECT speaker, embedding::text FROM embstore.embedding JOIN embstore.item USING (dataset_id, item_id)"
    )
    speakers: dict[str, list[list[float]]] = {}
    for speaker, vector in rows:
        speakers.setdefault(speaker, []).append(json.loads(vector))
    assert len(speakers) == SPEAKERS
    return {speaker: np.mean(vectors, axis=0) for speaker, vectors in speakers.items()}


def begin(start: Start, **env: object) -> Command:
    return start("centroids", "--workers", "2", "--chunk-size", "1", **env)


def done(watcher: Watcher) -> dict[int, str]:
    """When each centroid that is done was, by its key."""
    return dict(watcher.rows("SELECT centroid_id, finished_at::text FROM embstore.centroid WHERE status = 'done'"))


def wait_for_done(watcher: Watcher, number: int) -> None:
    wait_until(lambda: len(done(watcher)) >= number, f"{number} centroids")


def check(watcher: Watcher, expected: dict[str, Mean], before: dict[int, str]) -> None:
    """Complete, right, one a speaker, and what was done `before` was left as it was."""
    rows = watcher.rows("SELECT speaker, status, num_utterances, embedding::text FROM embstore.speaker_centroids")
    assert sorted(row[0] for row in rows) == sorted(expected)
    assert {row[1:3] for row in rows} == {("done", UTTERANCES)}
    assert max(np.abs(json.loads(vector) - expected[speaker]).max() for speaker, _, _, vector in rows) <= 1e-6
    assert watcher.rows("SELECT count(*) FROM embstore.speaker_change") == [(0,)]
    after = done(watcher)
    assert {key: after[key] for key in before} == before


def test_a_killed_worker_is_replaced(start: Start, watcher: Watcher, expected: dict[str, Mean], runs: Runs) -> None:
    run = begin(start)
    wait_for_done(watcher, 20)
    run.workers()[0].kill()
    before = done(watcher)
    watcher.let_go(**CENTROIDS)
    assert run.wait() == 0, run.err
    check(watcher, expected, before)
    assert 20 <= len(before) < SPEAKERS


def test_a_killed_command_takes_its_workers_along_and_the_next_goes_on(
    start: Start, watcher: Watcher, expected: dict[str, Mean], runs: Runs
) -> None:
    run = begin(start, EMBSTORE_TEST_ORPHAN_SECONDS=PATIENCE)
    wait_for_done(watcher, 20)
    run.process.kill()
    assert run.wait() == -signal.SIGKILL
    wait_until(lambda: not run.members(), "the workers to leave")
    before = done(watcher)
    assert 20 <= len(before) < SPEAKERS
    assert watcher.rows("SELECT count(*) FROM embstore.centroid WHERE status = 'running'") == [(0,)]
    watcher.let_go(**CENTROIDS)
    assert begin(start).wait() == 0
    check(watcher, expected, before)


def test_everything_killed_at_once_and_going_on(
    start: Start, watcher: Watcher, expected: dict[str, Mean], runs: Runs
) -> None:
    run = begin(start, **SHORT_LEASE)
    wait_for_done(watcher, 20)
    run.kill_group()
    assert run.wait() == -signal.SIGKILL
    wait_until(lambda: not run.members(), "the workers to end")
    before = done(watcher)
    assert 20 <= len(before) < SPEAKERS
    watcher.let_go(**CENTROIDS)
    again = begin(start)
    assert again.wait() == 0, again.err
    check(watcher, expected, before)


def test_ctrl_c_and_going_on(start: Start, watcher: Watcher, expected: dict[str, Mean], runs: Runs) -> None:
    run = begin(start)
    wait_for_done(watcher, 20)
    run.press_ctrl_c()
    assert run.wait() == 130
    assert "interrupted; nothing that was finished is lost: type 'embstore centroids' to go on" in run.out
    before = done(watcher)
    assert 20 <= len(before) < SPEAKERS
    assert watcher.rows("SELECT count(*) FROM embstore.centroid WHERE status = 'running'") == [(0,)]
    watcher.let_go(**CENTROIDS)
    assert begin(start).wait() == 0
    check(watcher, expected, before)
