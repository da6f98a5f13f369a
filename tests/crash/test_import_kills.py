"""kill -9 and Ctrl+C while vectors are imported: what is there is whole, and the same command goes on with the rest."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from audit import audit
from commands import Command, Start, Watcher, wait_until

from embstore.transfer.reading import BATCH_ROWS

ROWS = 3 * BATCH_ROWS - 500
DIM = 4
_STORED = """
SELECT i.position, i.path, encode(vector_send(e.embedding), 'hex')
FROM embstore.embedding e JOIN embstore.item i USING (dataset_id, item_id) ORDER BY i.position
"""

Runs = list[Command]


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def file(matrix: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("import") / "t.npz"
    np.savez(path, embedding=matrix, path=np.array([f"speaker-{i % 30}/{i}.wav" for i in range(ROWS)]))
    return path


@pytest.fixture
def begin(start: Start, file: Path) -> Start:
    """Import three parts of vectors, with a fault perhaps."""

    def begin(**env: object) -> Command:
        flags = ("--dataset", "calls", "--model", "x", "--root", "/data/calls")
        return start("import", "embeddings", str(file), *flags, **env)

    return begin


def check_whole(watcher: Watcher, matrix: np.ndarray) -> None:
    rows = watcher.rows(_STORED)
    assert [row[0] for row in rows] == list(range(ROWS))
    assert [row[1] for row in rows] == [f"speaker-{i % 30}/{i}.wav" for i in range(ROWS)]
    assert [row[2][8:] for row in rows] == [vector.tobytes().hex() for vector in matrix.astype(">f4")]


@pytest.mark.parametrize("action", ["kill", "term"])
def test_ended_in_the_second_part_and_going_on(
    begin: Start, watcher: Watcher, matrix: np.ndarray, runs: Runs, tmp_path: Path, action: str
) -> None:
    run = begin(EMBSTORE_TEST_FAULTS=f"import:{action}:2", EMBSTORE_TEST_FAULTS_FOLDER=tmp_path)
    assert run.wait() == (130 if action == "term" else -signal.SIGKILL)
    wait_until(lambda: watcher.rows(_OTHERS) == [(0,)], "the server to notice")
    assert audit(watcher, runs) == {"done": BATCH_ROWS}
    ended = "interrupted" if action == "term" else "running"
    assert watcher.rows("SELECT status FROM embstore.run") == [(ended,)]
    if action == "term":
        assert "interrupted; nothing that was imported is lost: type the same command to go on" in run.out
        assert f"  imported     {BATCH_ROWS:,}\n" in run.out
    again = begin()
    assert again.wait() == 0, again.err
    assert f"  imported     {ROWS - BATCH_ROWS:,}\n" in again.out
    assert f"  there before {BATCH_ROWS:,}\n" in again.out
    assert audit(watcher, runs) == {"done": ROWS}
    check_whole(watcher, matrix)


_OTHERS = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'embstore'
"""


def test_the_connection_is_cut_in_the_second_part(
    begin: Start, watcher: Watcher, matrix: np.ndarray, runs: Runs, tmp_path: Path
) -> None:
    run = begin(EMBSTORE_TEST_FAULTS="import:stop:2", EMBSTORE_TEST_FAULTS_FOLDER=tmp_path)
    wait_until(lambda: run.members() and run.members()[0].status() == "stopped", "the import to stop")
    watcher.rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'embstore'"
    )
    run.process.send_signal(signal.SIGCONT)
    assert run.wait() == 0, run.err
    assert audit(watcher, runs) == {"done": ROWS}
    check_whole(watcher, matrix)
