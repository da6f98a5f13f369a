"""Taking datasets and items out again, with all that was computed from them; the files stay where they are.

What belongs to an item goes with it by triggers. Many items go in several transactions, so that no lock and no dead row
is held for long: whatever ends the work in between, the same call goes on with what is left.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from embstore import catalog, sharing
from embstore.catalog import Dataset
from embstore.db.engine import Database, sqlstate
from embstore.errors import UsageError
from embstore.locks import lock_dataset
from embstore.queue import at_work

BATCH = 5_000
"""Items a transaction: with 256 dimensions about 5 MB of vectors."""

Tick = Callable[[int], None]
"""Told how many more items are gone."""

_COUNTS = """
SELECT (SELECT count(*) FROM embstore.item i WHERE i.dataset_id = :dataset_id),
    (SELECT count(DISTINCT i.speaker) FROM embstore.item i WHERE i.dataset_id = :dataset_id),
    (SELECT count(*) FROM embstore.face f WHERE f.dataset_id = :dataset_id),
    (SELECT count(*) FROM embstore.centroid_vector c WHERE c.dataset_id = :dataset_id),
    (SELECT count(*) FROM embstore.boundary_run r WHERE r.dataset_id = :dataset_id)
"""
_COUNTS_OF_ITEMS = """
SELECT count(*), count(DISTINCT i.speaker),
    (SELECT count(*) FROM embstore.face f WHERE f.dataset_id = :dataset_id AND f.item_id = ANY (:item_ids)),
    (SELECT count(*) FROM embstore.centroid_vector v JOIN embstore.centroid c USING (dataset_id, model_id, centroid_id)
     WHERE c.dataset_id = :dataset_id AND c.speaker IN (
        SELECT speaker FROM embstore.item WHERE dataset_id = :dataset_id AND item_id = ANY (:item_ids))),
    (SELECT count(*) FROM embstore.boundary_run r WHERE r.dataset_id = :dataset_id)
FROM embstore.item i WHERE i.dataset_id = :dataset_id AND i.item_id = ANY (:item_ids)
"""
_VECTORS = """
SELECT m.name, count(*) FROM embstore.extraction x JOIN embstore.model m USING (model_id)
WHERE x.dataset_id = :dataset_id AND x.status = 'done'
    AND (CAST(:item_ids AS bigint[]) IS NULL OR x.item_id = ANY (:item_ids))
GROUP BY m.name ORDER BY m.name
"""

_REMOVE_SOME = """
DELETE FROM embstore.item WHERE dataset_id = :dataset_id AND item_id = ANY (ARRAY(
    SELECT item_id FROM embstore.item WHERE dataset_id = :dataset_id ORDER BY item_id LIMIT :size))
"""
_REMOVE = "DELETE FROM embstore.item WHERE dataset_id = :dataset_id AND item_id = ANY (:item_ids)"
_REMOVE_DATASET = "DELETE FROM embstore.dataset WHERE dataset_id = :dataset_id"

_RENUMBER = """
UPDATE embstore.item i SET position = n.place
FROM (SELECT item_id, row_number() OVER (ORDER BY position) - 1 AS place
      FROM embstore.item WHERE dataset_id = :dataset_id) n
WHERE i.dataset_id = :dataset_id AND i.item_id = n.item_id AND i.position <> n.place
"""
# What boundary runs found is told by position, and those are others now. One that is applied stays as far as it takes
# to undo it.
_FORGET_RUNS = (
    "DELETE FROM embstore.boundary_run WHERE dataset_id = :dataset_id AND applied_at IS NULL",
    "DELETE FROM embstore.boundary WHERE dataset_id = :dataset_id",
    "DELETE FROM embstore.segment WHERE dataset_id = :dataset_id",
    "DELETE FROM embstore.boundary_score WHERE dataset_id = :dataset_id",
    """DELETE FROM embstore.boundary_undo u WHERE u.dataset_id = :dataset_id AND NOT EXISTS (
    SELECT FROM embstore.item i WHERE i.dataset_id = u.dataset_id AND i.item_id = u.item_id)""",
)

_NAMED = """
SELECT n.name, i.item_id FROM unnest(CAST(:names AS text[])) AS n (name)
LEFT JOIN embstore.item i
    ON i.dataset_id = :dataset_id AND (i.path = n.name OR starts_with(i.path, rtrim(n.name, '/') || '/'))
"""
_BESIDE = """
SELECT DISTINCT path FROM embstore.item WHERE dataset_id = :dataset_id AND starts_with(path, :start) LIMIT 2000
"""
_OF_SPEAKER = "SELECT item_id FROM embstore.item WHERE dataset_id = :dataset_id AND speaker = :speaker"
_SPEAKERS = "SELECT DISTINCT speaker FROM embstore.item WHERE dataset_id = :dataset_id AND speaker IS NOT NULL"
_VANISHED = "SELECT item_id FROM embstore.item WHERE dataset_id = :dataset_id AND vanished_at IS NOT NULL"
# The rows that a condition of `embstore search` speaks of, too.
_ITEMS = """SELECT i.dataset_id, d.name AS dataset, i.item_id, i.position, i.path, i.start, i.duration, i.speaker,
    i.size, i.vanished_at FROM embstore.item i JOIN embstore.dataset d USING (dataset_id)"""
_WRONG_CONDITION = ("22", "42", "0A", "21", "25")


@dataclass(frozen=True)
class Counts:
    """What goes."""

    items: int
    speakers: int
    faces: int
    centroids: int
    """Of whole datasets; of items: those that become stale."""
    runs: int
    """Boundary runs of the dataset."""
    vectors: Mapping[str, int] = field(default_factory=dict)
    """By model."""


def counts(connection: Connection, dataset_id: int, item_ids: Sequence[int] | None = None) -> Counts:
    """How much there is of a dataset, or of some of its items."""
    values = {"dataset_id": dataset_id, "item_ids": None if item_ids is None else list(item_ids)}
    row = connection.execute(text(_COUNTS if item_ids is None else _COUNTS_OF_ITEMS), values).one()
    vectors = {name: int(number) for name, number in connection.execute(text(_VECTORS), values)}
    return Counts(row[0], row[1], row[2], row[3], row[4], vectors)


def require_idle(connection: Connection, dataset: Dataset) -> None:
    """Raise UsageError while live workers are at the dataset."""
    if busy := at_work(connection, {"dataset_id": dataset.dataset_id}):
        commands = " and ".join(f"'embstore {command}'" for command in busy)
        raise UsageError(f"{commands} is at work on dataset '{dataset.name}': stop it first, with Ctrl+C")


def require_removable(connection: Connection, dataset: Dataset) -> None:
    """Raise UsageError where somebody may not remove a dataset, or not now."""
    sharing.require_own(connection, dataset.dataset_id, dataset.name, "removed")
    require_idle(connection, dataset)


def remove_dataset(database: Database, dataset: Dataset, *, tick: Tick = lambda _: None) -> int:
    """Remove a dataset and all that belongs to it; returns the number of items. Raises UsageError.

    What was run on it stays on record.
    """
    with database.begin() as connection:
        require_removable(connection, dataset)
    values = {"dataset_id": dataset.dataset_id}
    removed = 0
    while number := database.patiently(
        lambda c: int(c.execute(text(_REMOVE_SOME), {**values, "size": BATCH}).rowcount)
    ):
        removed += number
        tick(number)

    def end(connection: Connection) -> None:
        catalog.record(connection, "rm dataset", dataset.dataset_id, {"items": removed})
        connection.execute(text(_REMOVE_DATASET), values)

    database.patiently(end)
    return removed


def remove_items(
    database: Database,
    dataset: Dataset,
    item_ids: Sequence[int],
    *,
    command: str = "rm items",
    tick: Tick = lambda _: None,
    also: Callable[[Connection], None] = lambda _: None,
) -> None:
    """Remove items of a dataset, and all that belongs to them; the positions of the others have no gaps again.

    Centroids of their speakers become stale. `also` is done in the last transaction; `command` is what goes on record.
    Raises UsageError.
    """
    with database.begin() as connection:
        require_idle(connection, dataset)
    ids = sorted(item_ids)
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        is_last = start + BATCH >= len(ids)

        def remove(connection: Connection, batch: Sequence[int] = batch, is_last: bool = is_last) -> None:
            values = {"dataset_id": dataset.dataset_id}
            # Nobody registers meanwhile, and positions are given out by one at a time.
            lock_dataset(connection, dataset.dataset_id)
            connection.execute(text(_REMOVE), {**values, "item_ids": batch})
            if is_last:
                close_gaps(connection, dataset.dataset_id)
                also(connection)
                catalog.record(connection, command, dataset.dataset_id, {"items": len(ids)})

        database.patiently(remove)
        tick(len(batch))


def close_gaps(connection: Connection, dataset_id: int) -> None:
    """Number the items of a dataset anew, and remove what boundary runs have said of other positions."""
    for statement in (_RENUMBER, *_FORGET_RUNS):
        connection.execute(text(statement), {"dataset_id": dataset_id})


def choose(
    connection: Connection,
    dataset: Dataset,
    names: Sequence[str] = (),
    *,
    speaker: str | None = None,
    where: str | None = None,
    vanished: bool = False,
) -> list[int]:
    """The items for which all that is given holds, by id, rising.

    `names` are paths of items, or folders of them; `where` is one SQL expression on the columns of the view `items`,
    for a read-only transaction. Raises UsageError if a name or a speaker is not there, or if nothing is given.
    """
    values = {"dataset_id": dataset.dataset_id}
    found: list[set[int]] = []
    if names:
        found.append(_named(connection, dataset, names))
    if speaker is not None:
        found.append(set(connection.execute(text(_OF_SPEAKER), {**values, "speaker": speaker}).scalars()))
        if not found[-1]:
            known = connection.execute(text(_SPEAKERS), values).scalars().all()
            raise UsageError(f"no speaker '{speaker}' in dataset '{dataset.name}'{near(speaker, known)}")
    if vanished:
        found.append(set(connection.execute(text(_VANISHED), values).scalars()))
    if where is not None:
        found.append(_where(connection, dataset, where))
    if not found:
        raise UsageError("say which items: PATH, --speaker, --where or --vanished; or 'embstore rm dataset' for all")
    return sorted(set.intersection(*found))


def near(name: str, known: Sequence[str]) -> str:
    """`: did you mean 'x'?`, or nothing."""
    found = difflib.get_close_matches(name, known, n=1)
    return f": did you mean '{found[0]}'?" if found else ""


def _named(connection: Connection, dataset: Dataset, names: Sequence[str]) -> set[int]:
    values = {"dataset_id": dataset.dataset_id}
    rows = connection.execute(text(_NAMED), {**values, "names": list(names)}).all()
    for row in rows:
        if row.item_id is None:
            beside = connection.execute(text(_BESIDE), {**values, "start": row.name[:1]}).scalars().all()
            known = {*beside, *(path.rpartition("/")[0] for path in beside)}
            raise UsageError(f"no item or folder '{row.name}' in dataset '{dataset.name}'{near(row.name, list(known))}")
    return {row.item_id for row in rows}


def _where(connection: Connection, dataset: Dataset, condition: str) -> set[int]:
    try:
        connection.execute(text("SET LOCAL search_path = public, embstore"))
        connection.execute(
            text("SELECT embstore.check_condition(:condition, :rows, 'items')"),
            {"condition": condition, "rows": _ITEMS},
        )
        # A line break, as the condition may end with a comment. It holds % and : of its own.
        query = f"SELECT item_id FROM ({_ITEMS}) items WHERE dataset_id = {dataset.dataset_id} AND ({condition}\n)"
        return set(connection.exec_driver_sql(query.replace("%", "%%")).scalars())
    except DBAPIError as error:
        if sqlstate(error)[:2] not in _WRONG_CONDITION:
            raise
        words = getattr(getattr(error.orig, "diag", None), "message_primary", None) or str(error.orig)
        raise UsageError(f"--where: {' '.join(words.split())}") from error
