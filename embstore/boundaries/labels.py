"""A boundary run's segments as speaker labels of the items, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from embstore.boundaries.result import Boundary, Result
from embstore.boundaries.voices import same_voices
from embstore.db.copy import read_rows
from embstore.errors import EmbstoreError, UsageError

_SUMMARY = """
SELECT r.boundary_run_id AS run, r.dataset_id, d.dataset, r.method, r.items, r.embedded,
    (SELECT count(*) FROM embstore.boundary b
     WHERE b.dataset_id = r.dataset_id AND b.boundary_run_id = r.boundary_run_id) AS boundaries,
    (SELECT count(*) FROM embstore.segment s
     WHERE s.dataset_id = r.dataset_id AND s.boundary_run_id = r.boundary_run_id) AS segments,
    r.found -> 'parameters' AS parameters, r.found -> 'notes' AS notes, r.found -> 'trace' AS trace,
    r.found -> 'expected' AS expected
FROM embstore.boundary_run r JOIN embstore.datasets d USING (dataset_id)
WHERE r.boundary_run_id = :run AND r.status = 'done'
"""
_ENDED = "SELECT status, error FROM embstore.boundary_run WHERE boundary_run_id = :run"
_NEWEST = """
SELECT max(boundary_run_id) FROM embstore.boundary_run
WHERE status = 'done' AND (CAST(:dataset_id AS integer) IS NULL OR dataset_id = :dataset_id)
    AND (CAST(:model_id AS smallint) IS NULL OR model_id = :model_id)
"""
_BOUNDARIES = """
SELECT position, score, confidence FROM embstore.boundary WHERE boundary_run_id = :run ORDER BY position
"""
_SCORES = """
SELECT position, score FROM embstore.boundary_score
WHERE dataset_id = {dataset} AND boundary_run_id = {run} ORDER BY position
"""
_ROOT = """
SELECT d.root FROM embstore.boundary_run r JOIN embstore.dataset d USING (dataset_id) WHERE r.boundary_run_id = :run
"""
_FILES = """
SELECT i.position, i.path FROM embstore.boundary_run r JOIN embstore.item i USING (dataset_id)
WHERE r.boundary_run_id = :run ORDER BY i.position
"""
_POSITIONS = "SELECT position FROM embstore.boundary WHERE boundary_run_id = :run ORDER BY position"
_RUN = """
SELECT r.dataset_id, r.model_id, m.dim,
    (SELECT s.dataset FROM embstore.datasets s WHERE s.dataset_id = r.dataset_id),
    r.status, r.applied_at, r.found ->> 'order', r.items
FROM embstore.boundary_run r
JOIN embstore.model m USING (model_id)
JOIN embstore.dataset d USING (dataset_id)
WHERE r.boundary_run_id = :run
FOR UPDATE OF d
"""
_OTHER = """
SELECT boundary_run_id FROM embstore.boundary_run WHERE dataset_id = :dataset_id AND applied_at IS NOT NULL
"""
_ORDER = """
SELECT i.item_id FROM embstore.boundary_score s
JOIN embstore.item i ON i.dataset_id = s.dataset_id AND i.position = s.position
WHERE s.dataset_id = {dataset} AND s.boundary_run_id = {run} ORDER BY s.position
"""
_CENTROIDS = """
SELECT s.segment, count(*) AS items, avg(l2_normalize(e.embedding)) AS embedding
FROM embstore.segment s
JOIN embstore.item i ON i.dataset_id = s.dataset_id AND i.position BETWEEN s.first_position AND s.last_position
JOIN embstore.embedding_{model} e ON e.dataset_id = i.dataset_id AND e.item_id = i.item_id
WHERE s.dataset_id = {dataset} AND s.boundary_run_id = {run} GROUP BY s.segment ORDER BY s.segment
"""
_SEGMENTS = """
SELECT segment FROM embstore.segment WHERE dataset_id = :dataset_id AND boundary_run_id = :run ORDER BY segment
"""
_SET_VOICES = """
UPDATE embstore.segment s SET voice = v.voice
FROM unnest(CAST(:segments AS integer[]), CAST(:voices AS integer[])) AS v (segment, voice)
WHERE s.dataset_id = :dataset_id AND s.boundary_run_id = :run AND s.segment = v.segment
"""
_REMEMBER = """
INSERT INTO embstore.boundary_undo (dataset_id, boundary_run_id, item_id, speaker)
SELECT dataset_id, :run, item_id, speaker FROM embstore.item WHERE dataset_id = :dataset_id
"""
_LABEL = """
UPDATE embstore.item i SET speaker = 'speaker_' || lpad(s.voice::text, 3, '0')
FROM embstore.segment s
WHERE s.dataset_id = :dataset_id AND s.boundary_run_id = :run AND i.dataset_id = s.dataset_id
    AND i.position BETWEEN s.first_position AND s.last_position
"""
_RESTORE = """
UPDATE embstore.item i SET speaker = u.speaker
FROM embstore.boundary_undo u
WHERE u.dataset_id = :dataset_id AND u.boundary_run_id = :run AND i.dataset_id = u.dataset_id AND i.item_id = u.item_id
"""
_FORGET = "DELETE FROM embstore.boundary_undo WHERE dataset_id = :dataset_id AND boundary_run_id = :run"
_MARK = """
UPDATE embstore.boundary_run SET applied_at = CASE WHEN :applied THEN now() END WHERE boundary_run_id = :run
"""


_LIST_RUNS = "'embstore sql \"select run, dataset, method, status from boundary_runs\"' lists all"


@dataclass(frozen=True)
class FoundRun:
    """A finished boundary run."""

    run: int
    dataset_id: int
    model_id: int
    dim: int
    dataset: str
    applied: bool
    order: str
    items: int


@dataclass(frozen=True)
class Boundaries:
    """A finished boundary run: what the method found, and in what."""

    run: int
    dataset: str
    items: int
    """Positions of the dataset at that time."""
    embedded: int
    """Positions that had a vector."""
    result: Result

    @property
    def positions(self) -> list[int]:
        """The positions at which another speaker begins, rising."""
        return [boundary.position for boundary in self.result.boundaries]


def ended(connection: Connection, run: int) -> tuple[str, str | None]:
    """A run's status, and why it failed. Raises UsageError for a run that is not there."""
    row = connection.execute(text(_ENDED), {"run": run}).one_or_none()
    if row is None:
        raise UsageError(f"no boundary run {run}: {_LIST_RUNS}")
    return row.status, row.error


def newest(connection: Connection, dataset_id: int | None, model_id: int | None) -> int:
    """The newest finished run, of a dataset and a model if these are given. Raises UsageError for none."""
    run = connection.execute(text(_NEWEST), {"dataset_id": dataset_id, "model_id": model_id}).scalar()
    if run is None:
        raise UsageError("there is no finished boundary run: type 'embstore boundaries' first")
    return int(run)


def summary(connection: Connection, run: int) -> dict[str, Any]:
    """What a finished run found: numbers, parameters, notes, and the explanations if they were asked for.

    Raises UsageError.
    """
    row = connection.execute(text(_SUMMARY), {"run": run}).one_or_none()
    if row is None:
        raise UsageError(f"no finished boundary run {run}: {_LIST_RUNS}")
    return dict(row._mapping)


def result(connection: Connection, run: int) -> Result:
    """A finished run as the method gave it. Raises UsageError."""
    known = summary(connection, run)
    rows = connection.execute(text(_BOUNDARIES), {"run": run}).all()
    scores = read_rows(
        connection,
        _SCORES.format(dataset=known["dataset_id"], run=run),
        {"position": (np.dtype(np.int64), None), "score": (np.dtype(np.float32), None)},
    )
    return Result(
        [Boundary(*row) for row in rows],
        scores["position"],
        scores["score"],
        known["method"],
        known["parameters"],
        known["notes"],
        known["trace"],
        known["expected"],
    )


def read(connection: Connection, run: int) -> Boundaries:
    """A finished run, with what it was made in. Raises UsageError for none, EmbstoreError for one that failed."""
    status, error = ended(connection, run)
    if status == "failed":
        raise EmbstoreError(f"boundary run {run} failed: {error}")
    known = summary(connection, run)
    return Boundaries(run, known["dataset"], known["items"], known["embedded"], result(connection, run))


def files(connection: Connection, run: int) -> Iterator[tuple[int, Path]]:
    """Position and path of every item of a run's dataset, in order."""
    root = Path(connection.execute(text(_ROOT), {"run": run}).scalar_one())
    rows = connection.execution_options(yield_per=10_000).execute(text(_FILES), {"run": run})
    for position, path in rows:
        yield position, root / path


def positions(connection: Connection, run: int) -> list[int]:
    """The positions of a run's boundaries, rising."""
    return list(connection.execute(text(_POSITIONS), {"run": run}).scalars())


def get_run(connection: Connection, run: int) -> FoundRun:
    """Find a finished run, and lock its dataset until the transaction ends. Raises UsageError."""
    row = connection.execute(text(_RUN), {"run": run}).one_or_none()
    if row is None:
        raise UsageError(f"no boundary run {run}: {_LIST_RUNS}")
    dataset_id, model_id, dim, dataset, status, applied_at, order, items = row
    if status != "done":
        raise UsageError(f"boundary run {run} of '{dataset}' is {status}: type 'embstore boundaries' to finish it")
    return FoundRun(run, dataset_id, model_id, dim, dataset, applied_at is not None, order, items)


def merge_voices(connection: Connection, run: FoundRun, threshold: float | None = None) -> int:
    """Find the segments that are the same voice coming back, and number voices; returns how many voices there are.

    Segments without a vector stay voices of their own. `threshold`: cosine of two voices' centroids from which on they
    are one; chosen from the data if it is not given, see `voices.same_voices`.
    """
    rows = read_rows(
        connection,
        _CENTROIDS.format(dataset=run.dataset_id, run=run.run, model=run.model_id),
        {
            "segment": (np.dtype(np.int32), None),
            "items": (np.dtype(np.int64), None),
            "embedding": (np.dtype(np.float32), run.dim),
        },
    )
    merged = same_voices(rows["embedding"], rows["items"], threshold)
    values = {"dataset_id": run.dataset_id, "run": run.run}
    segments = connection.execute(text(_SEGMENTS), values).scalars().all()
    # A segment's voice is known by the first segment that has it; those are numbered in order.
    first = dict(zip(rows["segment"].tolist(), rows["segment"][_first(merged)].tolist(), strict=True))
    names = [first.get(segment, segment) for segment in segments]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names), start=1)}
    voices = [numbers[name] for name in names]
    connection.execute(text(_SET_VOICES), {**values, "segments": list(segments), "voices": voices})
    return len(numbers)


def _first(voices: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each segment, the index of the first with the same voice."""
    _, first, inverse = np.unique(voices, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], dtype=np.int64)


def apply(connection: Connection, run: FoundRun) -> int:
    """Label every item `speaker_001`, `speaker_002`, … by its segment's voice; returns the number of items.

    What the labels were is kept for `undo`. Raises UsageError if a run is applied already, or if the order of the items
    has changed since it was made.
    """
    values = {"dataset_id": run.dataset_id, "run": run.run}
    other = connection.execute(text(_OTHER), values).scalar()
    if other is not None:
        raise UsageError(f"run {other} is applied to '{run.dataset}': type 'embstore boundaries undo {other}' first")
    ids = read_rows(
        connection, _ORDER.format(dataset=run.dataset_id, run=run.run), {"item_id": (np.dtype(np.int64), None)}
    )
    if hashlib.sha256(ids["item_id"].tobytes()).hexdigest() != run.order:
        raise UsageError(
            f"the items of '{run.dataset}' are in another order than when run {run.run} was made: "
            f"type 'embstore boundaries --dataset {run.dataset}' to detect them anew"
        )
    connection.execute(text(_REMEMBER), values)
    labelled = connection.execute(text(_LABEL), values).rowcount
    connection.execute(text(_MARK), {"run": run.run, "applied": True})
    return labelled


def undo(connection: Connection, run: FoundRun) -> int:
    """Give the items the speakers back that they had before the run was applied; returns the number of items."""
    if not run.applied:
        raise UsageError(f"run {run.run} is not applied to '{run.dataset}': there is nothing to undo")
    values = {"dataset_id": run.dataset_id, "run": run.run}
    restored = connection.execute(text(_RESTORE), values).rowcount
    connection.execute(text(_FORGET), values)
    connection.execute(text(_MARK), {"run": run.run, "applied": False})
    return restored
