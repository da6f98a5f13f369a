"""Registering: what a scan found becomes items, and pending extractions, by COPY and set-based SQL.

The scan goes into a temporary table; one join against the items that are there says what is new, changed or gone.
Where none are there yet, it goes straight into their table: the server builds its indexes while the rest is still read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, text

from embstore.db.copy import copy_values
from embstore.db.engine import set_local
from embstore.locks import lock_dataset
from embstore.sources import Entry

# COPY knows no row-level security: a role whose rows are checked one by one has to take the other way.
_MAY_FILL = """
SELECT NOT row_security_active('embstore.item')
    AND NOT EXISTS (SELECT FROM embstore.item WHERE dataset_id = :dataset_id)
"""

_SCAN = """
CREATE TEMPORARY TABLE scan (
    dataset_id integer, position bigint, path text, speaker text, start double precision, duration double precision,
    size bigint, mtime_ns bigint
) ON COMMIT DROP
"""
_COLUMNS = "{table} (dataset_id, position, path, speaker, start, duration, size, mtime_ns)"

# An item that has no file now (size is null) keeps what was known of it. One that was imported had none so far: the
# first that is seen is taken for what its vectors were made of, unless a worker could not embed another one meanwhile.
# The vanished come behind the others, so that positions stay without gaps. `coalesce` because a hash join needs plain
# equality, and a start is never negative.
_MISSED = "x.status = 'failed' AND x.error_code = 'not_found'"
_DIFFERENCE = f"""
CREATE TEMPORARY TABLE difference ON COMMIT DROP AS
SELECT s.path, s.speaker, s.start, s.duration, s.size, s.mtime_ns, i.item_id, i.vanished_at,
    s.path IS NULL AS is_gone,
    i.item_id IS NULL AS is_new,
    s.path IS NOT NULL AND i.item_id IS NOT NULL AND (
        s.size IS NOT NULL AND (s.size, s.mtime_ns) IS DISTINCT FROM (i.size, i.mtime_ns) AND NOT i.is_unseen
        OR s.duration IS DISTINCT FROM i.duration) AS is_changed,
    s.size IS NOT NULL AND i.is_missed AS is_back,
    CASE WHEN s.path IS NULL
        THEN :present + row_number() OVER (PARTITION BY s.path IS NULL ORDER BY i.position) - 1 ELSE s.position
    END AS position
FROM scan s
FULL JOIN (
    SELECT *, item_id IN (SELECT item_id FROM embstore.extraction x WHERE x.dataset_id = :dataset_id AND {_MISSED})
        AS is_missed,
        size IS NULL AND item_id NOT IN (SELECT item_id FROM embstore.extraction x
            WHERE x.dataset_id = :dataset_id AND x.status IN ('failed', 'skipped') AND NOT ({_MISSED})) AS is_unseen
    FROM embstore.item WHERE dataset_id = :dataset_id) i
    ON i.path = s.path AND coalesce(i.start, -1) = coalesce(s.start, -1)
WHERE s.path IS NULL OR i.item_id IS NULL OR i.vanished_at IS NOT NULL
    OR (s.speaker, s.duration, s.position) IS DISTINCT FROM (i.speaker, i.duration, i.position)
    OR s.size IS NOT NULL AND (i.is_missed OR (s.size, s.mtime_ns) IS DISTINCT FROM (i.size, i.mtime_ns))
"""

_COUNT = """
SELECT count(*) FILTER (WHERE is_new) AS new, count(*) FILTER (WHERE is_changed) AS changed,
    count(*) FILTER (WHERE is_back) AS back,
    count(*) FILTER (WHERE is_gone AND vanished_at IS NULL) AS vanished,
    count(*) FILTER (WHERE is_gone AND vanished_at IS NOT NULL) AS vanished_before
FROM difference
"""

_INSERT = """
INSERT INTO embstore.item (dataset_id, position, path, start, duration, speaker, size, mtime_ns)
SELECT :dataset_id, position, path, start, duration, speaker, size, mtime_ns
FROM difference WHERE is_new ORDER BY position
"""

_UPDATE = """
UPDATE embstore.item i SET position = d.position, speaker = d.speaker, duration = d.duration,
    size = coalesce(d.size, i.size), mtime_ns = coalesce(d.mtime_ns, i.mtime_ns), vanished_at = NULL
FROM difference d WHERE i.dataset_id = :dataset_id AND i.item_id = d.item_id AND NOT d.is_gone
"""

_VANISH = """
UPDATE embstore.item i SET position = d.position, vanished_at = coalesce(i.vanished_at, now())
FROM difference d WHERE i.dataset_id = :dataset_id AND i.item_id = d.item_id AND d.is_gone
    AND (i.position <> d.position OR i.vanished_at IS NULL)
"""

# A changed file's old vector goes with the old status, in one transaction: never a vector without `done`. The status
# goes first: that waits for a worker which is just writing the vector, and then fences it off.
# ANY(ARRAY(…)) and not a join: see `_plan_for_many`.
_PENDING = "status = 'pending', attempts = 0, claim_token = NULL, error_code = NULL, error = NULL, finished_at = NULL"
_START_OVER = f"""
UPDATE embstore.extraction x SET {_PENDING}
WHERE x.dataset_id = :dataset_id AND x.item_id = ANY (ARRAY(SELECT item_id FROM difference WHERE is_changed))
"""
_FORGET_VECTORS = """
DELETE FROM embstore.embedding e
WHERE e.dataset_id = :dataset_id AND e.item_id = ANY (ARRAY(SELECT item_id FROM difference WHERE is_changed))
"""
# A worker did not find the file, and now it is there: unchanged perhaps, as on a disk that was not mounted.
_TRY_AGAIN = f"""
UPDATE embstore.extraction x SET {_PENDING}
WHERE x.dataset_id = :dataset_id AND {_MISSED} AND x.item_id = ANY (ARRAY(SELECT item_id FROM difference WHERE is_back))
"""

_FORGET_FACES = """
DELETE FROM embstore.face f
WHERE f.dataset_id = :dataset_id AND f.item_id = ANY (ARRAY(SELECT item_id FROM difference WHERE is_changed))
"""

_ENQUEUE = """
INSERT INTO embstore.extraction (dataset_id, model_id, item_id)
SELECT i.dataset_id, :model_id, i.item_id FROM embstore.item i
WHERE i.dataset_id = :dataset_id AND NOT EXISTS (
    SELECT FROM embstore.extraction x
    WHERE x.dataset_id = :dataset_id AND x.model_id = :model_id AND x.item_id = i.item_id)
ORDER BY i.item_id
"""


@dataclass(frozen=True)
class Registered:
    """What a scan found, against what was registered before."""

    found: int
    new: int = 0
    changed: int = 0
    vanished: int = 0
    vanished_before: int = 0
    back: int = 0
    """Items that a worker had not found, changed or not."""

    @property
    def unchanged(self) -> int:
        """Items that are as they were."""
        return self.found - self.new - self.changed


def register(connection: Connection, dataset_id: int, entries: Iterable[Entry], *, dry_run: bool = False) -> Registered:
    """Bring the dataset's items in line with a scan, in the caller's transaction.

    The caller holds the lock on the dataset (`catalog.ensure_dataset`). With `dry_run` only the counts are taken.
    """
    values = {"dataset_id": dataset_id}
    if connection.execute(text(_MAY_FILL), values).scalar_one():
        found = sum(1 for _ in entries) if dry_run else _copy(connection, "embstore.item", dataset_id, entries)
        return Registered(found, new=found)
    _plan_for_many(connection)
    connection.execute(text(_SCAN))
    found = _copy(connection, "scan", dataset_id, entries)
    connection.execute(text("ANALYZE scan"))
    connection.execute(text(_DIFFERENCE), {**values, "present": found})
    count = connection.execute(text(_COUNT)).one()
    if not dry_run:
        for sql in (_START_OVER, _FORGET_VECTORS, _FORGET_FACES, _TRY_AGAIN, _UPDATE, _VANISH, _INSERT):
            connection.execute(text(sql), values)
    connection.execute(text("DROP TABLE scan, difference"))
    return Registered(found, count.new, count.changed, count.vanished, count.vanished_before, count.back)


def enqueue(connection: Connection, dataset_id: int, model_id: int) -> int:
    """Make an extraction pending for every item that has none by this model yet; returns their number."""
    _plan_for_many(connection)
    # Items must not be removed, nor this be done twice at once, until it is committed.
    lock_dataset(connection, dataset_id)
    result = connection.execute(text(_ENQUEUE), {"dataset_id": dataset_id, "model_id": model_id})
    return int(result.rowcount)


def _plan_for_many(connection: Connection) -> None:
    """Have the transaction's statements planned for as many rows as there may be.

    The planner can't know: the tables have been filled just now, or were analysed while an interrupted registration was
    under way, and seemed empty. Its nested loops then take hours for a few hundred thousand items.
    """
    set_local(connection, "enable_nestloop", "off")
    set_local(connection, "work_mem", "128MB")


def _copy(connection: Connection, table: str, dataset_id: int, entries: Iterable[Entry]) -> int:
    """Append the entries to `table`, in their order; returns their number. A speaker without a letter is none."""
    rows = (
        (dataset_id, position, e.path, e.speaker, e.start, e.duration, e.size, e.mtime_ns)
        for position, e in enumerate(entries)
    )
    return copy_values(connection, _COLUMNS.format(table=table), rows)
