"""Boundaries of real datasets in a real database: runs, rows, labels and back, through the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from commands import PATIENCE, wait_until
from numpy.typing import NDArray

from embstore import catalog, vectors
from embstore.boundaries import job
from embstore.cli.main import embstore
from embstore.db.engine import Database
from embstore.queue import Refusal, take_lease
from tests.helpers import Facts, ask, at_once, entry, fill

MODEL = Facts("voices", dim=16)
Run = Callable[..., Result]


@pytest.fixture
def run(database_url: str) -> Run:
    """The command on the test's database."""

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(embstore, ["boundaries", *arguments, "--database-url", database_url])

    return call


def voices(lengths: list[int], dim: int = 16, seed: int = 0) -> tuple[NDArray[np.float32], list[int]]:
    """Vectors of one speaker after the other, and the true boundaries."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((len(lengths), dim))
    rows = np.repeat(centres, lengths, axis=0) + 0.3 * random.standard_normal((sum(lengths), dim))
    return rows.astype(np.float32), np.cumsum(lengths)[:-1].tolist()


def store(
    database: Database, rows: NDArray[np.float32], *, dataset: str = "calls", missing: tuple[int, ...] = ()
) -> None:
    """A dataset with these vectors in order; the positions of `missing` have failed instead."""
    with database.begin() as connection:
        items = [entry(f"{i:05}.wav", "somebody") for i in range(len(rows))]
        queue = fill(connection, items, dataset=dataset, model=MODEL)
        token = take_lease(connection)
        keys = queue.claim(connection, token, len(rows))
        there = [i for i in range(len(rows)) if i not in missing]
        vectors.write(connection, queue, token, [keys[i] for i in there], rows[there])
        queue.refuse(connection, token, [Refusal(keys[i], "failed", "decode_error", "broken") for i in missing])


def found(database: Database, number: int = 1) -> list[int]:
    return [
        row[0] for row in ask(database, "SELECT position FROM embstore.boundaries WHERE run = :n ORDER BY 1", n=number)
    ]


def test_a_run_leaves_boundaries_segments_and_a_score_at_every_position(database: Database, run: Run) -> None:
    rows, truth = voices([40, 55, 33, 60])
    store(database, rows)
    result = run()
    assert result.exit_code == 0, result.output
    assert "run 1: 3 boundaries, 4 segments" in result.output
    assert found(database) == truth
    segments = ask(database, "SELECT first_position, last_position, items FROM embstore.segments ORDER BY segment")
    assert segments == [(0, 39, 40), (40, 94, 55), (95, 127, 33), (128, 187, 60)]
    scores = ask(database, "SELECT position, score FROM embstore.boundary_scores ORDER BY position")
    assert [position for position, _ in scores] == list(range(188))
    assert {position for position, score in scores if score > 0.5} >= set(truth)


@pytest.mark.parametrize("method", ["auto", "cosine", "gmm"])
def test_the_same_run_twice_gives_the_same_rows(database: Database, run: Run, method: str) -> None:
    rows, truth = voices([100, 104, 97, 99])
    store(database, rows)
    for _ in range(2):
        result = run("--method", method, "--segment-size", "100")
        assert result.exit_code == 0, result.output
    tables = {
        "boundary": "position, score, confidence",
        "segment": "segment, first_position, last_position",
        "boundary_score": "position, score",
    }
    for table, columns in tables.items():
        one, two = (
            ask(database, f"SELECT {columns} FROM embstore.{table} WHERE boundary_run_id = :n ORDER BY 1", n=n)
            for n in (1, 2)
        )
        assert one == two
    assert found(database) == truth


def test_items_without_a_vector_belong_to_what_is_around_them(database: Database, run: Run) -> None:
    rows, _ = voices([40, 40])
    store(database, rows, missing=(0, 10, 38, 39, 79))
    assert run().exit_code == 0
    assert found(database) == [40]
    segments = ask(database, "SELECT first_position, last_position FROM embstore.segments ORDER BY segment")
    assert segments == [(0, 39), (40, 79)]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_small_sets_have_no_boundary(database: Database, run: Run, count: int) -> None:
    rows, _ = voices([count]) if count else (np.empty((0, 16), np.float32), [])
    store(database, np.concatenate([rows, np.ones((1, 16), np.float32)]), missing=(count,))
    result = run()
    assert result.exit_code == 0, result.output
    assert found(database) == []
    assert ask(database, "SELECT first_position, last_position FROM embstore.segments") == [(0, count)]


def test_several_datasets_are_shared_out(database: Database, run: Run) -> None:
    truths = {}
    for number in range(4):
        rows, truths[f"set{number}"] = voices([50 + number, 40, 60], seed=number)
        store(database, rows, dataset=f"set{number}")
    result = run("--workers", "2", "--json")
    assert result.exit_code == 0, result.output
    reports = json.loads(result.stdout)
    assert {report["dataset"] for report in reports} == set(truths)
    for report in reports:
        assert found(database, report["run"]) == truths[report["dataset"]]


def test_labels_are_written_back_and_taken_away(database: Database, run: Run) -> None:
    rows, _ = voices([40, 40, 40])
    again = np.concatenate([rows, rows[:40]])
    store(database, again)
    assert run().exit_code == 0
    result = run("apply", "1")
    assert result.exit_code == 0, result.output
    speakers = "SELECT speaker, count(*), min(position) FROM embstore.item GROUP BY speaker ORDER BY speaker"
    assert ask(database, speakers) == [(f"speaker_00{n + 1}", 40, 40 * n) for n in range(4)]
    assert ask(database, "SELECT count(*) FROM embstore.speaker_change WHERE speaker LIKE 'speaker\\_%'") == [(4,)]

    refused = run("apply", "1")
    assert refused.exit_code == 2
    assert "embstore boundaries undo 1" in refused.output

    assert run("undo", "1").exit_code == 0
    assert ask(database, speakers) == [("somebody", 160, 0)]
    assert run("undo", "1").exit_code == 2

    result = run("apply", "1", "--threshold", "0.9")
    assert (result.exit_code, "it needs --merge-same" in result.output) == (2, True)
    assert run("apply", "1", "--merge-same", "--threshold=-1").exit_code == 0
    assert ask(database, speakers) == [("speaker_001", 160, 0)]
    assert run("undo", "1").exit_code == 0
    assert run("apply", "1", "--merge-same").exit_code == 0
    assert ask(database, speakers) == [("speaker_001", 80, 0), ("speaker_002", 40, 40), ("speaker_003", 40, 80)]


def test_labels_are_not_written_onto_another_order(database: Database, run: Run) -> None:
    rows, _ = voices([40, 40])
    store(database, rows)
    assert run().exit_code == 0
    with database.begin() as connection:
        connection.exec_driver_sql("UPDATE embstore.item SET position = 79 - position")
    result = run("apply", "1")
    assert result.exit_code == 2
    assert "another order" in result.output
    assert ask(database, "SELECT DISTINCT speaker FROM embstore.item") == [("somebody",)]


def test_a_run_is_judged_by_the_truth(database: Database, run: Run, tmp_path: Path) -> None:
    rows, truth = voices([40, 55, 33, 60])
    store(database, rows)
    assert run().exit_code == 0
    file = tmp_path / "truth.csv"
    file.write_text("position\n" + "\n".join(map(str, truth)), encoding="utf-8")
    result = run("eval", "1", "--truth", str(file), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["exact"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert report["purity"] == report["coverage"] == 1.0
    file.write_text("who\nx\n", encoding="utf-8")
    wrong = run("eval", "1", "--truth", str(file))
    assert (wrong.exit_code, "neither a column 'speaker' nor 'position'" in wrong.output) == (2, True)


def test_errors_name_what_is_wrong(database: Database, run: Run) -> None:
    for arguments, words in (
        (("apply", "7"), "no boundary run 7"),
        (("--dataset", "nowhere"), "no dataset 'nowhere'"),
        (("--model", "nobody"), "no model 'nobody' in the database"),
        (("--method", "magic"), "'magic' is not one of"),
        (("--segment-size", "0"), "0 is not in the range"),
        (("--penalty", "nan"), "nan is not a number that can be compared"),
        (("apply", "1", "--merge-same", "--threshold", "inf"), "inf is not in the range"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert words in result.output


def test_a_flag_without_influence_is_named(database: Database, run: Run) -> None:
    store(database, voices([40, 40])[0])
    result = run("--segment-size", "40", "--penalty", "1")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("has no influence") == 1
    assert "note: --segment-size has no influence on method auto" in result.stderr


def test_a_killed_run_starts_over_and_leaves_nothing_behind(
    database: Database, database_url: str, run: Run, tmp_path: Path
) -> None:
    rows, truth = voices([300] * 40)
    store(database, rows)
    command = [sys.executable, "-m", "embstore", "boundaries", "--method", "gmm", "--segment-size", "300"]
    faults = {"EMBSTORE_TEST_FAULTS": "boundary_write:hang:1", "EMBSTORE_TEST_FAULTS_FOLDER": str(tmp_path)}
    env = os.environ | {"EMBSTORE_TEST_LEASE_SECONDS": "2"} | faults
    process = subprocess.Popen([*command, "--database-url", database_url], start_new_session=True, env=env)
    wait_until((tmp_path / "boundary_write.1").exists, "all to be written and nothing committed")
    assert ask(database, "SELECT status FROM embstore.boundary_run") == [("running",)]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert ask(database, "SELECT count(*) FROM embstore.boundary") == [(0,)]
    result = run("--method", "gmm", "--segment-size", "300")
    assert result.exit_code == 0, result.output
    assert found(database) == truth
    assert ask(database, "SELECT count(*), min(status) FROM embstore.boundary_run") == [(1, "done")]


def test_two_commands_at_once_make_one_run(database: Database, database_url: str) -> None:
    rows, truth = voices([100] * 30)
    store(database, rows)
    command = [sys.executable, "-m", "embstore", "boundaries", "--json", "--database-url", database_url]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # The second one may have come after the first was done: then it made a run of its own.
    numbers = {json.loads(out)[0]["run"] for out, _ in outputs}
    assert ask(database, "SELECT count(*), min(status), max(status) FROM embstore.boundary_run") == [
        (len(numbers), "done", "done")
    ]
    for number in numbers:
        assert found(database, number) == truth
    assert ask(database, "SELECT count(*) FROM embstore.boundary_score") == [(len(rows) * len(numbers),)]


def test_commands_that_begin_at_once_share_a_run(database: Database, run: Run) -> None:
    store(database, voices([40, 40])[0])
    with database.begin() as connection:
        (pair,) = catalog.embedded(connection, None, None)
    model, (dataset,) = pair

    def begin() -> int:
        with database.begin() as connection:
            return job._begin(connection, dataset.dataset_id, model.model_id, job.Options())

    assert len(set(at_once(*[begin] * 4))) == 1
    assert run().exit_code == 0
    assert ask(database, "SELECT count(*), min(status) FROM embstore.boundary_run") == [(1, "done")]


def test_a_run_that_fails_says_why_and_the_next_is_a_new_one(database: Database, run: Run, tmp_path: Path) -> None:
    rows, truth = voices([40, 40])
    store(database, rows)
    assert run().exit_code == 0
    # As three workers leave it that died at it.
    with database.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE embstore.boundary_run SET status = 'running', attempts = 3, claim_token = 99"
        )
    failed = run("--output-dir", str(tmp_path / "out"))
    assert failed.exit_code == 1, failed.output
    assert "run 1 of 'calls' failed: its worker process died, or hung, each of the 3 times" in failed.output
    again = run()
    assert again.exit_code == 0, again.output
    assert found(database, 2) == truth
