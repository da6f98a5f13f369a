"""A part of a table into the database: items, vectors and their `done`, in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from embstore import faults, vectors
from embstore.db.copy import Column, copy_rows, copy_values, is_guarded, read_rows
from embstore.db.engine import limit_idle, set_local
from embstore.errors import UsageError
from embstore.locks import lock_dataset
from embstore.transfer.checked import Part

_INCOMING = """
CREATE TEMPORARY TABLE incoming (
    dataset_id integer, model_id smallint, n bigint,
    path text, start double precision, duration double precision, speaker text
) ON COMMIT DROP
"""
_COLUMNS = "incoming (dataset_id, model_id, n, path, start, duration, speaker)"

# The dataset's and the model's numbers come out of the table and not as constants: of a constant that is newer than the
# statistics the planner believes that it has one row, and reads all that there are, by any index, for each row.
# Each half is a condition of the index on path and start. `IS NOT DISTINCT FROM` for both would look at every stretch
# of a recording for each of them.
_FIND = """
SELECT f.n, f.item_id, CASE
    WHEN x.item_id IS NULL THEN {nothing} WHEN x.status = 'done' THEN {done}
    WHEN x.status = 'running' AND embstore.is_alive(x.claim_token) THEN {running} ELSE {undone} END::bigint
FROM (
    SELECT n.dataset_id, n.model_id, n.n, i.item_id FROM incoming n JOIN embstore.item i
        ON i.dataset_id = n.dataset_id AND i.path = n.path AND i.start = n.start
    UNION ALL
    SELECT n.dataset_id, n.model_id, n.n, i.item_id FROM incoming n JOIN embstore.item i
        ON i.dataset_id = n.dataset_id AND i.path = n.path AND i.start IS NULL AND n.start IS NULL) f
LEFT JOIN embstore.extraction x
    ON x.dataset_id = f.dataset_id AND x.model_id = f.model_id AND x.item_id = f.item_id
"""
_NOTHING, _UNDONE, _DONE, _RUNNING = range(4)
_INT: Column = (np.dtype(np.int64), None)

_LAST = "SELECT position FROM embstore.item WHERE dataset_id = :dataset_id ORDER BY position DESC LIMIT 1"
_ITEMS = "embstore.item (dataset_id, position, path, start, duration, speaker)"
_ADDED = "SELECT item_id FROM embstore.item WHERE dataset_id = {dataset} AND position >= {position} ORDER BY position"
_ADD = """
INSERT INTO embstore.item (dataset_id, position, path, start, duration, speaker)
SELECT dataset_id, {position} + row_number() OVER (ORDER BY n), path, start, duration, speaker
FROM incoming WHERE n <> ALL (CAST('{known}' AS bigint[])) ORDER BY n
RETURNING position, item_id
"""

_SLICE = 1 << 20
"""Bytes of vectors that are sent by one COPY."""

_KEYS = "dataset_id = :dataset_id AND model_id = :model_id AND item_id = ANY (CAST(:keys AS bigint[]))"
_NEW_DONE = """
INSERT INTO embstore.extraction (dataset_id, model_id, item_id, status, finished_at)
SELECT :dataset_id, :model_id, key, 'done', clock_timestamp() FROM unnest(CAST(:keys AS bigint[])) key
"""
_NOW_DONE = f"""
UPDATE embstore.extraction SET status = 'done', attempts = 0, claim_token = NULL, error_code = NULL, error = NULL,
    finished_at = clock_timestamp()
WHERE {_KEYS}
"""
# A trigger notes whose centroids are to be computed anew, and it heeds updates: one of each speaker will do.
_NOTED = f"UPDATE embstore.extraction SET finished_at = clock_timestamp() WHERE {_KEYS}"
_NOTE = """
UPDATE embstore.extraction SET finished_at = clock_timestamp()
WHERE dataset_id = :dataset_id AND model_id = :model_id AND item_id = ANY (ARRAY(
    SELECT min(item_id) FROM embstore.item
    WHERE dataset_id = :dataset_id AND item_id = ANY (CAST(:keys AS bigint[])) GROUP BY speaker))
"""
_FORGET_FACES = f"DELETE FROM embstore.face WHERE {_KEYS}"
_FORGET_VECTORS = f"DELETE FROM embstore.embedding WHERE {_KEYS}"


@dataclass(frozen=True)
class Place:
    """Where vectors go."""

    dataset_id: int
    model_id: int
    dim: int
    dataset: str
    """Its name."""


@dataclass
class Counts:
    """What became of rows."""

    imported: int = 0
    replaced: int = 0
    """Had another vector before."""
    there: int = 0
    """Had this vector already."""

    @property
    def all(self) -> int:
        """Rows that were looked at."""
        return self.imported + self.replaced + self.there

    def add(self, other: Counts) -> None:
        """Add others to these."""
        self.imported += other.imported
        self.replaced += other.replaced
        self.there += other.there


@dataclass(frozen=True)
class _Found:
    """What the database knows of the rows of a part."""

    items: NDArray[np.int64]
    """Its item; 0: none."""
    states: NDArray[np.int64]
    same: NDArray[np.bool_]
    """Whether the vector that it has is this one."""

    @property
    def other(self) -> NDArray[np.bool_]:
        """Which have another vector."""
        return np.asarray((self.states == _DONE) & ~self.same)


Where = Callable[[Any], str]


def compare(connection: Connection, place: Place, part: Part, where: Where, *, replace: bool) -> Counts:
    """What `take_in` would do with a part. Raises UsageError as that does."""
    return _counted(_checked(connection, place, part, where, replace))


def take_in(
    connection: Connection, place: Place, part: Part, where: Where, *, replace: bool, alone: int | None = None
) -> Counts:
    """Bring a part into the database, in the caller's one transaction: behind what is there, in its own order.

    Rows whose vector is there already are left as they are, so it may be repeated after a commit whose outcome is not
    known. `where` names a row for the UsageError that is raised if one has another vector, unless `replace` is given,
    or is just being embedded. `alone`: how many items the caller has brought into a dataset that was empty; if there
    are no others now, none of these can be there.
    """
    limit_idle(connection)
    lock_dataset(connection, place.dataset_id)
    last = connection.execute(text(_LAST), {"dataset_id": place.dataset_id}).scalar()
    first = 0 if last is None else int(last) + 1
    if first == alone and not is_guarded(connection, "embstore.item"):
        found = _nothing(part)
        items = _copy_items(connection, place, part, first)
    else:
        found = _checked(connection, place, part, where, replace)
        items = found.items if found.items.all() else _add_items(connection, found.items, first)
    replaced = items[found.other]
    for sql in (_FORGET_FACES, _FORGET_VECTORS):
        _on(connection, place, sql, replaced)
    _on(connection, place, _NEW_DONE, items[found.states == _NOTHING])
    _on(connection, place, _NOW_DONE, items[found.states == _UNDONE])
    new = found.items == 0
    _on(connection, place, _NOTED, _one_of_each(items[new], part.speakers, new))
    written = (found.states != _DONE) | found.other
    _on(connection, place, _NOTE, items[written & ~new])
    _write(connection, place, items[written], part.vectors if written.all() else part.vectors[written])
    faults.reach("import")
    return _counted(found)


def _one_of_each(items: NDArray[np.int64], speakers: Sequence[str | None], new: NDArray[np.bool_]) -> NDArray[np.int64]:
    """One of the new items of each speaker."""
    names = compress(speakers, new.tolist())
    by_speaker = {speaker: item for speaker, item in zip(names, items.tolist(), strict=True) if speaker}
    return np.array(list(by_speaker.values()), dtype=np.int64)


def _checked(connection: Connection, place: Place, part: Part, where: Where, replace: bool) -> _Found:
    found = _find(connection, place, part)
    if len(busy := np.flatnonzero(found.states == _RUNNING)):
        raise UsageError(
            f"'{part.paths[busy[0]]}' of dataset '{place.dataset}' is just being embedded by this model: wait for that"
            " run, or stop it, and type the command again"
        )
    if not replace and found.other.any():
        first = int(np.flatnonzero(found.other)[0])
        raise UsageError(
            f"{where(part.rows[first])}: '{part.paths[first]}' has another vector in dataset '{place.dataset}': add"
            " --replace to take those of the file, or leave it as it is"
        )
    return found


def _find(connection: Connection, place: Place, part: Part) -> _Found:
    # Nested loops over the indexes, however large the dataset seems beside the part.
    for method in ("hashjoin", "mergejoin"):
        set_local(connection, f"enable_{method}", "off")
    connection.execute(text(_INCOMING))
    count = len(part)
    keys = repeat(place.dataset_id, count), repeat(place.model_id, count), range(count)
    rows = zip(*keys, part.paths, part.starts, part.durations, part.speakers, strict=True)
    copy_values(connection, _COLUMNS, rows)
    states = {"nothing": _NOTHING, "undone": _UNDONE, "done": _DONE, "running": _RUNNING}
    known = read_rows(connection, _FIND.format(**states), {"n": _INT, "item_id": _INT, "state": _INT})
    found = _nothing(part)
    found.items[known["n"]] = known["item_id"]
    found.states[known["n"]] = known["state"]
    if len(done := np.flatnonzero(found.states == _DONE)):
        there, stored = vectors.of_items(connection, place.dataset_id, place.model_id, place.dim, found.items[done])
        done = done[there]
        # Bit by bit, as a vector holds no NaN; 0 and -0 are two.
        found.same[done] = (stored.view(np.uint32) == part.vectors[done].view(np.uint32)).all(axis=1)
    return found


def _nothing(part: Part) -> _Found:
    """That the database knows none of the rows."""
    count = len(part)
    return _Found(np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.bool_))


def _copy_items(connection: Connection, place: Place, part: Part, first: int) -> NDArray[np.int64]:
    """Make an item of each row, from the position `first` on; returns them."""
    count = len(part)
    keys = repeat(place.dataset_id, count), range(first, first + count)
    rows = zip(*keys, part.paths, part.starts, part.durations, part.speakers, strict=True)
    copy_values(connection, _ITEMS, rows)
    sql = _ADDED.format(dataset=place.dataset_id, position=first)
    return read_rows(connection, sql, {"item_id": _INT})["item_id"]


def _add_items(connection: Connection, items: NDArray[np.int64], first: int) -> NDArray[np.int64]:
    """Make an item of each row of `incoming` that has none (0), from the position `first` on; returns those of all."""
    sql = _ADD.format(position=first - 1, known=_literal(np.flatnonzero(items)))
    added = read_rows(connection, sql, {"position": _INT, "item_id": _INT})
    items = items.copy()
    items[items == 0] = added["item_id"][np.argsort(added["position"])]
    return items


def _write(connection: Connection, place: Place, items: NDArray[np.int64], matrix: NDArray[np.float32]) -> None:
    # In slices, as memory that was just given back is there at once; for 20 MB at a time the system is asked anew, and
    # to get them takes longer than to fill them.
    size = max(1, _SLICE // (4 * place.dim))
    for at in range(0, len(items), size):
        part = items[at : at + size]
        columns: dict[str, NDArray[Any]] = {
            "dataset_id": np.full(len(part), place.dataset_id, dtype=np.int32),
            "model_id": np.full(len(part), place.model_id, dtype=np.int16),
            "item_id": part,
            "embedding": matrix[at : at + size],
        }
        copy_rows(connection, f"embstore.embedding_{place.model_id}", columns)


def _counted(found: _Found) -> Counts:
    there, replaced = int(found.same.sum()), int(found.other.sum())
    return Counts(len(found.items) - there - replaced, replaced, there)


def _on(connection: Connection, place: Place, sql: str, items: NDArray[np.int64]) -> None:
    """Run a statement on items, if there are any."""
    if len(items):
        values = {"dataset_id": place.dataset_id, "model_id": place.model_id, "keys": _literal(items)}
        connection.execute(text(sql), values)


def _literal(numbers: NDArray[np.int64]) -> str:
    return "{" + ",".join(map(str, numbers.tolist())) + "}"
