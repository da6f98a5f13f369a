"""Where embeddings lie: one partition and one typed view for each model, and the write that cannot tear."""

from __future__ import annotations

import mmap
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import psycopg2.errors
from numpy.typing import NDArray
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from embstore.db.copy import Column, Rows, copy_rows, read_rows, stream_rows
from embstore.errors import UsageError
from embstore.models.base import Face
from embstore.queue import Queue

_VIEWS_ON = """
SELECT DISTINCT format('embstore.%I', v.relname) FROM pg_depend d
JOIN pg_rewrite r ON r.oid = d.objid AND d.classid = 'pg_rewrite'::regclass
JOIN pg_class v ON v.oid = r.ev_class AND v.relkind = 'v' AND v.relnamespace = 'embstore'::regnamespace
WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = to_regclass(:table)
"""

# The order by the index on the position, then the vectors of a page by their keys: a join would descend the index anew
# for each of them, and take twice as long.
_PLACES = """
SELECT position, item_id FROM embstore.item WHERE dataset_id = {dataset} AND {by} > {last}
ORDER BY {by} LIMIT {size}
"""
_ALL_PLACES = "SELECT position, item_id FROM embstore.item WHERE dataset_id = {dataset}"
_EMBEDDED = (
    "SELECT item_id FROM embstore.extraction WHERE dataset_id = {dataset} AND model_id = {id} AND status = 'done'"
)
_OF_ITEMS = """
SELECT item_id, {embedding} FROM embstore.embedding_{id}
WHERE dataset_id = {dataset} AND model_id = {id} AND item_id {which}
"""
# Whoever may make functions there could make one of that name, but none of the server's own code.
_GIVES_BYTES = """
SELECT EXISTS (SELECT FROM pg_proc p JOIN pg_language l ON l.oid = prolang AND lanname = 'internal'
    WHERE p.oid = to_regprocedure('public.embstore_bytes(vector)') AND prosrc = 'byteasend')
"""
_BYTES_OF_ONE = "SELECT public.embstore_bytes('[1]')"

_COUNT = """
SELECT count(*) FROM embstore.extraction WHERE dataset_id = :dataset_id AND model_id = :model_id AND status = 'done'
"""

_HUGE = 1 << 22
"""Bytes of an array from which on numpy asks for huge pages."""

_INT8 = np.dtype(np.int64), None
_PLACE: dict[str, Column] = {"position": _INT8, "item_id": _INT8}

Order = Literal["position", "item_id"]
ORDERS: tuple[Order, ...] = get_args(Order)


def create_partition(connection: Connection, model_id: int, model: str, dim: int) -> None:
    """Make the place for a new model's vectors, and the view on it; only the owner of the database may."""
    connection.execute(
        text("SELECT embstore.create_partition(CAST(:id AS smallint), :model, :dim)"),
        {"id": model_id, "model": model, "dim": dim},
    )


def views(connection: Connection, model_id: int) -> list[str]:
    """Names of embstore's own views on a model's vectors, with the schema."""
    found = connection.execute(text(_VIEWS_ON), {"table": f"embstore.embedding_{model_id}"}).scalars()
    return sorted(found)


def drop_partition(connection: Connection, model_id: int) -> None:
    """Drop a model's vectors and the views on them.

    Raises UsageError if somebody's own views are made of them, or if they are locked for longer than lock_timeout.
    """
    try:
        for view in views(connection, model_id):
            connection.execute(text(f"DROP VIEW {view}"))
        connection.execute(text(f"DROP TABLE embstore.embedding_{model_id}"))
    except DBAPIError as error:
        if isinstance(error.orig, psycopg2.errors.LockNotAvailable):
            raise UsageError("somebody is reading or writing vectors and does not come to an end: try again") from error
        if isinstance(error.orig, psycopg2.errors.DependentObjectsStillExist):
            detail = " ".join((error.orig.diag.message_detail or "").split())
            raise UsageError(f"something of your own is made of these vectors, drop it first: {detail}") from error
        raise


def write(
    connection: Connection,
    queue: Queue,
    token: int,
    item_ids: Sequence[int],
    vectors: NDArray[np.float32],
    faces: Mapping[int, Face] | None = None,
) -> None:
    """Store vectors, float32 [n, dim], and mark their extractions done, in the caller's one transaction.

    `faces` are those of the vectors, by item, where there are any; without them nothing more is written.
    May be repeated after a commit whose outcome is unknown: rows that are done already are left as they are.
    Raises LeaseLost if any of the rows was taken over by another worker; then nothing is written.
    """
    written = np.asarray(queue.finish(connection, token, item_ids), dtype=np.int64)
    if len(written) == 0:
        return
    if len(written) < len(item_ids):
        vectors = vectors[np.isin(item_ids, written)]
    embeddings = np.ascontiguousarray(vectors, dtype=np.float32)
    table = f"embstore.embedding_{queue.scope['model_id']}"
    copy_rows(connection, table, {**_keys(queue, written), "embedding": embeddings})
    if faces:
        _write_faces(connection, queue, written, faces)


def _write_faces(connection: Connection, queue: Queue, written: NDArray[np.int64], faces: Mapping[int, Face]) -> None:
    """Keep which face it is, of those items that have one."""
    with_face = np.array([item_id for item_id in written if item_id in faces], dtype=np.int64)
    values = np.array([faces[item_id] for item_id in with_face], dtype=np.float64).reshape(-1, len(Face._fields))
    columns = {name: values[:, i].astype(np.float32) for i, name in enumerate(Face._fields)}
    counts = values[:, -1].astype(np.int32)
    copy_rows(connection, "embstore.face", {**_keys(queue, with_face), **columns, "faces": counts})


def _keys(queue: Queue, item_ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The key of each row, as every table below the model has it."""
    return {
        "dataset_id": np.full(len(item_ids), queue.scope["dataset_id"], dtype=np.int32),
        "model_id": np.full(len(item_ids), queue.scope["model_id"], dtype=np.int16),
        "item_id": item_ids,
    }


class Vectors(NamedTuple):
    """Vectors and whose they are, in the same order."""

    ids: NDArray[np.int64]
    """int64 [n]: `item_id`, as the views have it."""
    vectors: NDArray[np.float32]
    """float32 [n, dim]."""


@dataclass(frozen=True)
class Page:
    """Vectors in the order of a dataset."""

    positions: NDArray[np.int64]
    """int64 [n], rising if that is the order."""
    item_ids: NDArray[np.int64]
    """int64 [n]."""
    vectors: NDArray[np.float32]
    """float32 [n, dim]."""


def page_size(dim: int) -> int:
    """How many vectors to read at a time: about 20 MB."""
    return max(100, min(20_000, 5_000_000 // dim))


def count(connection: Connection, dataset_id: int, model_id: int) -> int:
    """How many vectors a dataset has by a model: as many as extractions are done, which takes less to count."""
    scope = {"dataset_id": dataset_id, "model_id": model_id}
    return int(connection.execute(text(_COUNT), scope).scalar_one())


def ordered(
    connection: Connection,
    dataset_id: int,
    model_id: int,
    dim: int,
    *,
    size: int | None = None,
    by: Order = "position",
) -> Generator[Page]:
    """A dataset's vectors in order, those of `size` items at a time; items without a vector are left out.

    Let the caller's transaction be REPEATABLE READ, so that all pages are of one state.
    """
    last, size = -1, size or page_size(dim)
    while True:
        places = read_rows(connection, _PLACES.format(dataset=dataset_id, by=by, last=last, size=size), _PLACE)
        there, vectors = of_items(connection, dataset_id, model_id, dim, places["item_id"])
        if there.any():
            yield Page(places["position"][there], places["item_id"][there], vectors)
        if len(there) < size:
            return
        last = int(places[by][-1])


def of_dataset(connection: Connection, dataset_id: int, model_id: int, dim: int, *, by: Order = "position") -> Vectors:
    """All of a dataset's vectors at once, in order; items without one are left out.

    Let the caller's transaction be REPEATABLE READ, so that order and vectors are of one state.
    """
    total = count(connection, dataset_id, model_id)
    room = _room(total, dim)
    with ThreadPoolExecutor(1) as beside:
        beside.submit(_get_pages, room)
        places = read_rows(connection, _ALL_PLACES.format(dataset=dataset_id), _PLACE)
        item_ids = places["item_id"][np.argsort(places[by])]
        if total < len(item_ids):
            embedded = read_rows(connection, _EMBEDDED.format(dataset=dataset_id, id=model_id), {"item_id": _INT8})
            item_ids = item_ids[np.isin(item_ids, embedded["item_id"])]
    found = room[: len(item_ids)]
    there = _fill(found, connection, dataset_id, model_id, item_ids, _within(item_ids))
    return Vectors(item_ids[there], found if there.all() else found[there])


def of_items(
    connection: Connection, dataset_id: int, model_id: int, dim: int, item_ids: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Which of these different items have a vector, bool [n], and their vectors in that order, float32 [there, dim]."""
    found = _room(len(item_ids), dim)
    there = _fill(found, connection, dataset_id, model_id, item_ids, _which(item_ids))
    return there, found if there.all() else found[there]


def _fill(
    found: NDArray[np.float32],
    connection: Connection,
    dataset_id: int,
    model_id: int,
    item_ids: NDArray[np.int64],
    which: str,
) -> NDArray[np.bool_]:
    """Put the vectors that a condition finds, sent as the server likes best, where they belong; which there are."""
    there = np.zeros(len(item_ids), dtype=np.bool_)
    if not len(item_ids):
        return there
    order = np.argsort(item_ids)
    ids = item_ids[order]

    def put(rows: Rows) -> None:
        at = np.minimum(np.searchsorted(ids, rows["item_id"]), len(ids) - 1)
        wanted = ids[at] == rows["item_id"]
        places = order[at[wanted]]
        there[places] = True
        sent = rows["embedding"]["values"] if column[0].names else rows["embedding"]
        found[places] = sent if wanted.all() else sent[wanted]

    embedding, column = _sent(connection, found.shape[1])
    sql = _OF_ITEMS.format(embedding=embedding, dataset=dataset_id, id=model_id, which=which)
    stream_rows(connection, sql, {"item_id": _INT8, "embedding": column}, put)
    return there


def _sent(connection: Connection, dim: int) -> tuple[str, Column]:
    """What to select for a vector, and how it then comes.

    The server takes more than half of the time of a read to turn the bytes of each value around. Where `db.migrate`
    could make the function for it, vectors come as they lie in the server's memory, if that is little-endian.
    """
    known = connection.info
    if _BYTES_OF_ONE not in known:
        gives = connection.execute(text(_GIVES_BYTES)).scalar_one()
        one = bytes(connection.execute(text(_BYTES_OF_ONE)).scalar_one()) if gives else b""
        known[_BYTES_OF_ONE] = one == np.array((1, 0, [1]), _stored(1)).tobytes()
    if known[_BYTES_OF_ONE]:
        return "public.embstore_bytes(embedding)", (_stored(dim), None)
    return "embedding", (np.dtype(np.float32), dim)


def _stored(dim: int) -> np.dtype[Any]:
    """A vector of pgvector's, after its length."""
    return np.dtype([("dim", "<i2"), ("unused", "<i2"), ("values", "<f4", (dim,))])


def _room(count: int, dim: int) -> NDArray[np.float32]:
    """An array to fill, of the system's small pages.

    For a large one numpy asks for huge pages, and to get one may take longer than the server has room to send on
    meanwhile: 4 ms on a virtual machine, whose host has to find it first. A read took up to half as long again.
    """
    size = 4 * count * dim
    if size < _HUGE:
        return np.empty((count, dim), np.float32)
    return np.frombuffer(mmap.mmap(-1, size, access=mmap.ACCESS_COPY), np.float32).reshape(count, dim)


def _get_pages(room: NDArray[np.float32]) -> None:
    """Touch every page of it: the system takes a fifth of the time to give them that the vectors take to come."""
    room.reshape(-1)[:: mmap.PAGESIZE // room.itemsize] = 0


def _which(item_ids: NDArray[np.int64]) -> str:
    """A condition on items: a range, which is read faster, where it holds not many others."""
    if len(item_ids) and np.ptp(item_ids) < 1.2 * len(item_ids):
        return _within(item_ids)
    return f"= ANY (CAST('{{{','.join(map(str, item_ids.tolist()))}}}' AS bigint[]))"


def _within(item_ids: NDArray[np.int64]) -> str:
    return f"BETWEEN {item_ids.min()} AND {item_ids.max()}" if len(item_ids) else "IS NULL"


def of_each(
    connection: Connection, dataset_id: int, model_id: int, dim: int, item_ids: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The vectors of these items in that order, float32 [n, dim]. Raises UsageError if one has none, or comes twice."""
    if len(np.unique(item_ids)) < len(item_ids):
        raise UsageError("an item is named twice among the ids: give each once")
    found, size = np.empty((len(item_ids), dim), np.float32), page_size(dim)
    for start in range(0, len(item_ids), size):
        page = item_ids[start : start + size]
        there, read = of_items(connection, dataset_id, model_id, dim, page)
        if not there.all():
            raise UsageError(f"item {page[~there][0]} is none of the dataset, or has no vector by the model")
        found[start : start + size] = read
    return found
