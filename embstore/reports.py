"""What the commands that look at the store report: exact counts, each from one pass over the tables it counts.

Every function reads in the caller's transaction; where several are to agree with each other, let it be one that is
`REPEATABLE READ`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, text

# One statement, so that items and extractions are counted in one state of the database. Whether the worker of a running
# item is alive is looked up for the running ones alone.
_PROGRESS = """
WITH registered AS (
    SELECT dataset_id, count(*) AS items FROM embstore.item
    WHERE CAST(:dataset_id AS integer) IS NULL OR dataset_id = :dataset_id GROUP BY dataset_id
), counted AS (
    SELECT dataset_id, model_id, status, error_code,
        CASE WHEN status = 'running' THEN NOT embstore.is_alive(claim_token) END AS abandoned,
        count(*) AS items
    FROM embstore.extraction
    WHERE (CAST(:dataset_id AS integer) IS NULL OR dataset_id = :dataset_id)
        AND (CAST(:model_id AS smallint) IS NULL OR model_id = :model_id)
    GROUP BY 1, 2, 3, 4, 5
)
SELECT d.dataset, m.name AS model, coalesce(r.items, 0) AS registered,
    c.status, c.error_code, coalesce(c.abandoned, false) AS abandoned, coalesce(c.items, 0) AS items
FROM embstore.datasets d
LEFT JOIN registered r USING (dataset_id)
LEFT JOIN counted c USING (dataset_id)
LEFT JOIN embstore.model m USING (model_id)
WHERE (CAST(:dataset_id AS integer) IS NULL OR d.dataset_id = :dataset_id)
    AND (CAST(:model_id AS smallint) IS NULL OR c.model_id IS NOT NULL)
ORDER BY d.dataset, m.name, c.status, c.items DESC, c.error_code
"""

# A speaker that changed and whose centroid waits anyway counts once.
_CENTROIDS = """
SELECT d.dataset, m.name, (
    SELECT count(*) FROM embstore.centroid_vector v WHERE v.dataset_id = c.dataset_id AND v.model_id = c.model_id
), c.waiting + (
    SELECT count(DISTINCT g.speaker) FROM embstore.speaker_change g
    WHERE g.dataset_id = c.dataset_id AND g.model_id = c.model_id AND NOT EXISTS (
        SELECT FROM embstore.centroid w WHERE w.dataset_id = g.dataset_id AND w.model_id = g.model_id
            AND w.speaker = g.speaker AND w.status IN ('pending', 'running'))) AS stale
FROM (
    SELECT dataset_id, model_id, count(*) FILTER (WHERE status IN ('pending', 'running')) AS waiting
    FROM embstore.centroid
    WHERE (CAST(:dataset_id AS integer) IS NULL OR dataset_id = :dataset_id)
        AND (CAST(:model_id AS smallint) IS NULL OR model_id = :model_id)
    GROUP BY 1, 2) c
JOIN embstore.datasets d USING (dataset_id)
JOIN embstore.model m USING (model_id)
"""

_REFUSED = """
FROM embstore.extraction e
WHERE e.status = ANY (:statuses)
    AND (CAST(:dataset_id AS integer) IS NULL OR e.dataset_id = :dataset_id)
    AND (CAST(:model_id AS smallint) IS NULL OR e.model_id = :model_id)
    AND (CAST(:code AS text) IS NULL OR e.error_code = :code)
"""

_FAILURES = f"""
SELECT d.dataset, m.name, i.path, i.start, r.status, r.error_code, r.error, r.attempts, r.finished_at
FROM (SELECT e.* {_REFUSED}) r
JOIN embstore.item i USING (dataset_id, item_id)
JOIN embstore.datasets d USING (dataset_id)
JOIN embstore.model m USING (model_id)
ORDER BY d.dataset, m.name, i.position
LIMIT :limit
"""

_REASONS = f"SELECT e.status, e.error_code, count(*) {_REFUSED} GROUP BY 1, 2 ORDER BY 3 DESC, 2"

_SCOPES = f"SELECT DISTINCT e.dataset_id, e.model_id {_REFUSED} ORDER BY 1, 2"

_DATASETS = """
SELECT d.dataset, d.team, d.media, d.root, coalesce(i.items, 0), coalesce(i.speakers, 0), coalesce(i.vanished, 0)
FROM embstore.datasets d
LEFT JOIN (
    SELECT dataset_id, count(*) AS items, count(DISTINCT speaker) AS speakers, count(vanished_at) AS vanished
    FROM embstore.item GROUP BY dataset_id) i USING (dataset_id)
ORDER BY d.dataset
"""

_MODELS = """
SELECT m.name, m.media, m.dim, m.fingerprint, coalesce(e.vectors, 0), m.family
FROM embstore.model m
LEFT JOIN (SELECT model_id, count(*) AS vectors FROM embstore.embedding GROUP BY model_id) e USING (model_id)
ORDER BY m.name
"""


class Reason(NamedTuple):
    """How many items have no embedding for one reason."""

    status: str
    code: str
    items: int


class Centroids(NamedTuple):
    """How many centroids there are, and how many speakers the next `embstore centroids` has to compute."""

    computed: int
    stale: int


@dataclass(frozen=True)
class Progress:
    """How far a dataset is with a model: done + failed + skipped + pending + running = registered."""

    dataset: str
    model: str | None
    """None: the dataset has items, but no model was asked to embed them yet."""
    registered: int
    done: int
    failed: int
    skipped: int
    pending: int
    """To be embedded, those that are not queued included."""
    running: int
    unqueued: int
    """Of the pending: registered for another model; naming dataset and model to `extract` queues them."""
    abandoned: int
    """Of the running: left by a worker that is gone; the next run takes them over."""
    reasons: tuple[Reason, ...]
    centroids: Centroids | None = None
    """None: no centroid was asked for yet."""

    @property
    def finished(self) -> int:
        """Items that have ended, in whichever way."""
        return self.done + self.failed + self.skipped

    @property
    def percent(self) -> float:
        """Share of the items that have ended, cut to one place: 100.0 means all of them."""
        return 1000 * self.finished // self.registered / 10 if self.registered else 100.0


class Failure(NamedTuple):
    """An item without an embedding, and why."""

    dataset: str
    model: str
    path: str
    start: float | None
    status: str
    code: str
    error: str | None
    attempts: int
    finished_at: datetime | None


class DatasetSummary(NamedTuple):
    """A dataset in numbers. `speakers` counts those that are named."""

    name: str
    team: str | None
    """That it belongs to; None: to the owner of the database."""
    media: str
    root: str
    items: int
    speakers: int
    vanished: int


class ModelSummary(NamedTuple):
    """A model that has a place in the store."""

    name: str
    media: str
    dim: int
    fingerprint: str
    vectors: int
    family: str | None
    """What makes it; None: made before families were kept."""


class Refused(NamedTuple):
    """Which of the failed and skipped items are meant; None: any."""

    dataset_id: int | None = None
    model_id: int | None = None
    statuses: Sequence[str] = ("failed", "skipped")
    code: str | None = None

    def values(self) -> dict[str, Any]:
        """As SQL parameters."""
        return {**self._asdict(), "statuses": list(self.statuses)}


def progress(connection: Connection, dataset_id: int | None = None, model_id: int | None = None) -> list[Progress]:
    """How far each dataset is with each model that has worked on it, by name."""
    scope = {"dataset_id": dataset_id, "model_id": model_id}
    averaged = {
        (dataset, model): Centroids(*counts) for dataset, model, *counts in connection.execute(text(_CENTROIDS), scope)
    }
    rows = connection.execute(text(_PROGRESS), scope)
    by_scope = groupby(rows, key=lambda row: (row.dataset, row.model, row.registered))
    return [_summed(*key, averaged.get((key[0], key[1])), list(group)) for key, group in by_scope]


def _summed(
    dataset: str, model: str | None, registered: int, centroids: Centroids | None, rows: Iterable[Row[Any]]
) -> Progress:
    counts = dict.fromkeys(("done", "failed", "skipped", "pending", "running"), 0)
    reasons, abandoned = [], 0
    for row in rows:
        if row.status is None:
            continue
        counts[row.status] += row.items
        abandoned += row.items if row.abandoned else 0
        if row.error_code is not None:
            reasons.append(Reason(row.status, row.error_code, row.items))
    unqueued = registered - sum(counts.values())
    counts["pending"] += unqueued
    return Progress(
        dataset,
        model,
        registered,
        **counts,
        unqueued=unqueued,
        abandoned=abandoned,
        reasons=tuple(reasons),
        centroids=centroids,
    )


def failures(connection: Connection, refused: Refused, limit: int | None = None) -> list[Failure]:
    """The items meant by `refused`, at most `limit`, by dataset, model and position."""
    rows = connection.execute(text(_FAILURES), {**refused.values(), "limit": limit})
    return [Failure(*row) for row in rows]


def reasons(connection: Connection, refused: Refused) -> list[Reason]:
    """How many items are meant by `refused`, by reason; the most frequent first."""
    return [Reason(*row) for row in connection.execute(text(_REASONS), refused.values())]


def scopes(connection: Connection, refused: Refused) -> list[dict[str, int]]:
    """The datasets and models between which there are items meant by `refused`, as scopes of the queue."""
    return [dict(row._mapping) for row in connection.execute(text(_SCOPES), refused.values())]


def datasets(connection: Connection) -> list[DatasetSummary]:
    """All datasets, by name."""
    return [DatasetSummary(*row) for row in connection.execute(text(_DATASETS))]


def models(connection: Connection) -> list[ModelSummary]:
    """All models that have a place in the store, by name, with the number of their vectors."""
    return [ModelSummary(*row) for row in connection.execute(text(_MODELS))]
