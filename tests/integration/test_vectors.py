"""Vectors in, vectors out: bit for bit, each with its own row, and never one without the other's `done`."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Facts, ask, at_once, entry, extraction, fill, scan, vectors_of
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from embstore import catalog, vectors
from embstore.db.copy import Rows, stream_rows
from embstore.db.engine import Database
from embstore.errors import DatabaseError, ModelError
from embstore.models.base import Face
from embstore.queue import Queue, take_lease
from embstore.register import enqueue, register


def write(connection: Connection, queue: Queue, matrix: NDArray[np.float32]) -> list[int]:
    """Claim as many items as there are vectors, and write these."""
    token = take_lease(connection)
    keys = queue.claim(connection, token, len(matrix))
    vectors.write(connection, queue, token, keys, matrix)
    return keys


def read(database: Database, queue: Queue) -> dict[int, NDArray[np.float32]]:
    """What is stored, taken apart from pgvector's own binary form: dim and unused as int16, then float32."""
    table = f"embstore.embedding_{queue.scope['model_id']}"
    sql = f"SELECT item_id, vector_send(embedding) FROM {table} WHERE dataset_id = :d ORDER BY item_id"
    rows = ask(database, sql, d=queue.scope["dataset_id"])
    return {key: np.frombuffer(bytes(value)[4:], dtype=">f4") for key, value in rows}


def bits(vector: NDArray[np.float32]) -> bytes:
    return vector.astype("<f4").tobytes()


@pytest.mark.parametrize("dim", [1, 2, 256, 1900, 1901, 2000, 16000])
def test_vectors_come_back_bit_for_bit_with_their_own_rows(database: Database, dim: int) -> None:
    dice = np.random.default_rng(dim)
    matrix = dice.integers(0, 2**32, (9, dim), dtype=np.uint32).view(np.float32)  # subnormal, negative zero, 1e38
    matrix = np.where(np.isfinite(matrix), matrix, np.float32(-0.0))
    matrix[:, 0] = [1e-45, 3.4028235e38, -1, 1, 2, 3, 4, 5, 6]
    with database.begin() as connection:
        queue = fill(connection, 12, model=Facts(dim=dim))
        token = take_lease(connection)
        keys = queue.claim(connection, token, 10)
        shuffled = [int(key) for key in dice.permutation(keys[:8])]
        vectors.write(connection, queue, token, shuffled, matrix[:8])
        vectors.write(connection, queue, token, [keys[9]], matrix[8:])
        ids, found = vectors.of_dataset(connection, queue.scope["dataset_id"], queue.scope["model_id"], dim)
    assert (ids.tolist(), found.flags.writeable) == ([*keys[:8], keys[9]], True)
    assert bits(found) == bits(matrix[[*np.argsort(shuffled), 8]])
    stored = read(database, queue)
    assert list(stored) == [*keys[:8], keys[9]]
    for key, vector in zip([*shuffled, keys[9]], matrix, strict=True):
        assert bits(stored[key]) == bits(vector)
    assert dict(ask(database, "SELECT status, count(*) FROM embstore.extraction GROUP BY 1")) == {
        "done": 9,
        "running": 1,
        "pending": 2,
    }


FACES = "SELECT item_id, x, y, width, height, score, faces FROM embstore.face ORDER BY item_id"


def test_faces_lie_beside_their_vectors_and_go_with_them(database: Database) -> None:
    with database.begin() as connection:
        queue = fill(connection, [entry(f"{i}.jpg", "ann") for i in range(6)])
        token = take_lease(connection)
        keys = queue.claim(connection, token, 6)
    faces = {key: Face(key, 1.5, 20, 30.25, 0.5, 40_000 + i) for i, key in enumerate(keys) if i % 2}
    for _ in range(2):  # as after a lost answer
        with database.begin() as connection:
            vectors.write(connection, queue, token, keys[:4][::-1], vectors_of(4), faces)
    expected = [(key, float(key), 1.5, 20.0, 30.25, 0.5, 40_000 + i) for i, key in enumerate(keys) if i in (1, 3)]
    assert ask(database, FACES) == expected
    shown = ask(database, "SELECT dataset, model, path, speaker, faces FROM embstore.faces ORDER BY position")
    assert shown == [("calls", "small", "1.jpg", "ann", 40_001), ("calls", "small", "3.jpg", "ann", 40_003)]
    scan(database, [entry(f"{i}.jpg", "ann", mtime_ns=1 + (i == 1)) for i in range(6)])
    assert ask(database, FACES) == expected[1:]
    with database.begin() as connection:
        connection.exec_driver_sql("DELETE FROM embstore.dataset")
    assert ask(database, FACES) == []


def test_a_matrix_in_any_memory_layout_is_stored_the_same(database: Database) -> None:
    matrix = vectors_of(8, 6)
    with database.begin() as connection:
        queue = fill(connection, 12, model=Facts(dim=3))
        keys = write(connection, queue, matrix[::2, ::-2])
        keys += write(connection, queue, np.asfortranarray(matrix[:4, :3]))
        keys += write(connection, queue, matrix[4:, 3:].astype(">f4"))
    stored = read(database, queue)
    expected = np.concatenate([matrix[::2, ::-2], matrix[:4, :3], matrix[4:, 3:]])
    assert all(bits(stored[key]) == bits(row) for key, row in zip(keys, expected, strict=True))


def test_each_item_gets_its_own_vector_in_whatever_order_they_come(database: Database) -> None:
    matrix = vectors_of(6)
    with database.begin() as connection:
        queue = fill(connection, 6)
        token = take_lease(connection)
        keys = queue.claim(connection, token, 6)
        vectors.write(connection, queue, token, [keys[4], keys[1]], matrix[[4, 1]])
    with database.begin() as connection:  # two of them stand there already
        vectors.write(connection, queue, token, keys[::-1], matrix[::-1])
    stored = read(database, queue)
    assert all(bits(stored[key]) == bits(row) for key, row in zip(keys, matrix, strict=True))


def test_writing_again_after_a_lost_answer_changes_nothing(database: Database) -> None:
    with database.begin() as connection:
        queue = fill(connection, 5)
        token = take_lease(connection)
        keys = queue.claim(connection, token, 5)
        vectors.write(connection, queue, token, keys[1:3], vectors_of(2))
    before = read(database, queue)
    with database.begin() as connection:
        vectors.write(connection, queue, token, keys[1:3], vectors_of(2))
        vectors.write(connection, queue, token, keys, np.ones((5, 3), np.float32))
        vectors.write(connection, queue, token, [], np.empty((0, 3), np.float32))
    after = read(database, queue)
    assert list(after) == keys
    assert [bits(after[key]) for key in keys[1:3]] == [bits(before[key]) for key in keys[1:3]]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([[1, 2], [3, 4]], "embedding_1_vector"),
        ([[1, 2, 3, 4], [5, 6, 7, 8]], "embedding_1_vector"),
        ([[1, 2, 3], [0, 0, -0.0]], "embedding_1_vector"),
        ([[1, 2, 3], [4, float("nan"), 6]], "NaN not allowed in vector"),
        ([[1, 2, 3], [4, float("-inf"), 6]], "infinite value not allowed in vector"),
    ],
)
def test_the_database_itself_refuses_what_is_no_vector_of_the_model(
    database: Database, bad: list[list[float]], words: str
) -> None:
    with database.begin() as connection:
        queue = fill(connection, 2)
    with pytest.raises(DatabaseError, match=words), database.begin() as connection:
        write(connection, queue, np.array(bad, dtype=np.float32))
    assert ask(database, "SELECT DISTINCT status FROM embstore.extraction") == [("pending",)]
    assert ask(database, "SELECT count(*) FROM embstore.embedding") == [(0,)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 100])
def test_pages_come_by_position_and_leave_out_what_has_no_vector(database: Database, size: int) -> None:
    with database.begin() as connection:
        queue = fill(connection, 6)
        matrix = vectors_of(4)
        keys = write(connection, queue, matrix)
        write(connection, fill(connection, 6, dataset="books"), vectors_of(6, seed=1))
        register(connection, queue.scope["dataset_id"], [entry(f"{i:04}.wav") for i in (5, 3, 1, 4, 0)])  # 2 vanished
    with database.begin() as connection:
        pages = list(vectors.ordered(connection, queue.scope["dataset_id"], queue.scope["model_id"], 3, size=size))
        ids, whole = vectors.of_dataset(connection, queue.scope["dataset_id"], queue.scope["model_id"], 3)
    assert ids.tolist() == np.concatenate([page.item_ids for page in pages]).tolist()
    assert bits(whole) == bits(np.concatenate([page.vectors for page in pages]))
    assert all(0 < len(page.positions) <= size for page in pages)
    assert np.concatenate([page.positions for page in pages]).tolist() == [1, 2, 4, 5]
    assert np.concatenate([page.item_ids for page in pages]).tolist() == [keys[i] for i in (3, 1, 0, 2)]
    assert bits(np.concatenate([page.vectors for page in pages])) == bits(matrix[[3, 1, 0, 2]])


@pytest.mark.parametrize("by", vectors.ORDERS)
def test_many_vectors_come_to_their_places_from_wherever_they_lie(database: Database, by: vectors.Order) -> None:
    """Written in another order than that of the ids, which is not that of the dataset; every tenth has none."""
    dice, matrix = np.random.default_rng(0), vectors_of(2000, 800)  # of more than 4 MB
    with database.begin() as connection:
        fill(connection, 500, dataset="before", model=(model := Facts(dim=800)))
        queue = fill(connection, 2000, model=model)
        token = take_lease(connection)
        keys = np.array(queue.claim(connection, token, 2000))
        for part in np.array_split(dice.permutation(np.flatnonzero(np.arange(2000) % 10)), 7):
            vectors.write(connection, queue, token, keys[part], matrix[part])
        order = dice.permutation(2000)
        moved = "UPDATE embstore.item SET position = n FROM unnest(:keys) WITH ORDINALITY o(key, n) WHERE key = item_id"
        connection.execute(text(moved), {"keys": keys[order].tolist()})
    with database.reading() as connection:
        ids, found = vectors.of_dataset(connection, queue.scope["dataset_id"], queue.scope["model_id"], 800, by=by)
    expected = order if by == "position" else np.arange(2000)
    expected = expected[expected % 10 > 0]
    assert ids.tolist() == keys[expected].tolist()
    assert bits(found) == bits(matrix[expected])


@pytest.mark.parametrize("function", ["internal AS 'byteasend'", "", "internal AS 'bytearecv'", "sql RETURN ''::bytea"])
def test_vectors_are_the_same_with_the_function_for_bytes_without_it_and_with_a_false_one(
    database: Database, function: str
) -> None:
    matrix = vectors_of(40, 7)
    with database.begin() as connection:
        queue = fill(connection, 40, model=Facts(dim=7))
        keys = write(connection, queue, matrix)
        name = "FUNCTION public.embstore_bytes(vector)"
        connection.exec_driver_sql(f"ALTER EXTENSION vector DROP {name}; DROP {name}")
        if function:
            connection.exec_driver_sql(f"CREATE {name} RETURNS bytea LANGUAGE {function}")
    database.close()
    with database.reading() as connection:
        ids, found = vectors.of_dataset(connection, queue.scope["dataset_id"], queue.scope["model_id"], 7)
        last = vectors.of_each(connection, queue.scope["dataset_id"], queue.scope["model_id"], 7, np.array([keys[-1]]))
    assert ids.tolist() == keys
    assert bits(found) == bits(matrix)
    assert bits(last) == bits(matrix[-1:])


def test_a_dataset_without_items_and_one_without_vectors_are_empty(database: Database) -> None:
    with database.begin() as connection:
        queue = fill(connection, 5)
        fill(connection, 0, dataset="none")
        for dataset_id in (queue.scope["dataset_id"], catalog.get_dataset(connection, "none").dataset_id):
            ids, found = vectors.of_dataset(connection, dataset_id, queue.scope["model_id"], 3)
            assert (ids.shape, found.shape) == ((0,), (0, 3))


def test_a_read_shows_one_state_of_a_dataset_that_grows(database: Database) -> None:
    with database.begin() as connection:
        queue = fill(connection, 0)

    def grow() -> None:
        for count in range(10, 210, 10):
            with database.begin() as connection:
                fill(connection, count)
                write(connection, queue, vectors_of(count)[-10:])

    def look() -> list[int]:
        seen = [0]
        while seen[-1] < 200:
            with database.reading() as connection:
                _, found = vectors.of_dataset(connection, queue.scope["dataset_id"], queue.scope["model_id"], 3)
            assert bits(found) == bits(vectors_of(200)[: len(found)])
            seen.append(len(found))
        return seen

    _, seen = at_once(grow, look)
    assert seen is not None
    assert seen == sorted(seen)
    assert all(count % 10 == 0 for count in seen)


def test_who_breaks_off_a_read_leaves_nothing_behind(database: Database) -> None:
    taken = []

    def take(rows: Rows) -> None:
        taken.append(len(rows["n"]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), database.begin() as connection:
        stream_rows(
            connection, "SELECT * FROM generate_series(1::bigint, 200000)", {"n": (np.dtype(np.int64), None)}, take
        )
    assert 0 < taken[0] < 200_000
    assert len(taken) == 1
    activity = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'COPY%' AND pid <> pg_backend_pid()"
    assert ask(database, activity + " AND state <> 'idle'") == [(0,)]


def test_the_view_shows_typed_vectors_beside_their_items(database: Database) -> None:
    model = Facts(name="Wide-256 v2", dim=256)
    with database.begin() as connection:
        entries = [entry("b.wav", "ann"), entry("a.wav", None, start=1.5, duration=2.0), entry("c.wav")]
        queue = fill(connection, entries, model=model)
        fill(connection, 2, dataset="books", model=Facts(name="other"))
        keys = write(connection, queue, vectors_of(2, 256))
    view = "embeddings_wide_256_v2"
    found = ask(database, f"SELECT dataset, item_id, position, path, start, speaker FROM {view} ORDER BY position")
    assert found == [("calls", keys[0], 0, "b.wav", None, "ann"), ("calls", keys[1], 1, "a.wav", 1.5, None)]
    types = "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attname = 'embedding' AND attrelid = "
    assert ask(database, f"{types} '{view}'::regclass") == [("vector(256)",)]


def test_vectors_that_fit_stay_in_the_row(database: Database) -> None:
    with database.begin() as connection:
        for dim in (1900, 1901):
            catalog.ensure_model(connection, Facts(name=f"d{dim}", dim=dim))
    storage = "SELECT attstorage FROM pg_attribute WHERE attname = 'embedding' AND attrelid = "
    assert ask(database, f"{storage} 'embstore.embedding_1'::regclass") == [("p",)]
    assert ask(database, f"{storage} 'embstore.embedding_2'::regclass") == [("e",)]


def test_models_whose_views_would_have_one_name_get_one_each(database: Database) -> None:
    with database.begin() as connection:
        fill(connection, 1)
        for name in ("a-b.4", "a_b", "a-b", "A b", "模型", "声音", "m" * 70, "m" * 71):
            dataset = catalog.get_dataset(connection, "calls")
            model_id = catalog.ensure_model(connection, Facts(name=name, dim=model_dim(name)))
            enqueue(connection, dataset.dataset_id, model_id)
            write(connection, extraction(dataset.dataset_id, model_id), vectors_of(1, model_dim(name)))
    views = [row[0] for row in ask(database, "SELECT viewname FROM pg_views WHERE viewname LIKE 'embeddings%'")]
    assert len(views) == len(set(views)) == 9
    dims = sorted(row[0] for view in views for row in ask(database, f'SELECT vector_dims(embedding) FROM "{view}"'))
    assert dims == sorted(model_dim(n) for n in ("a-b.4", "a_b", "a-b", "A b", "模型", "声音", "m" * 70, "m" * 71))


def model_dim(name: str) -> int:
    return sum(map(ord, name)) % 1000 + 1


def test_a_model_is_made_once_and_uses_up_no_numbers(database: Database) -> None:
    def ensure() -> int:
        with database.begin() as connection:
            return catalog.ensure_model(connection, Facts())

    (model_id,) = set(at_once(ensure, ensure, ensure))  # 1, unless who took that number came too late
    for _ in range(5):
        assert ensure() == model_id
    with database.begin() as connection:
        following = catalog.ensure_model(connection, Facts(name="next"))
    assert following <= 4  # those that came too late, at once, took a number each


def test_other_weights_under_the_same_name_are_refused(database: Database) -> None:
    with database.begin() as connection:
        catalog.ensure_model(connection, Facts())
    words = r"'small' .*fingerprint ffff, stored 0123456789ab"
    with pytest.raises(ModelError, match=words), database.begin() as connection:
        catalog.ensure_model(connection, Facts(weights="ffff"))
    assert ask(database, "SELECT name, fingerprint FROM embstore.model") == [("small", "0123456789abcdef")]


@pytest.mark.parametrize(
    ("delete", "items", "extractions", "embeddings"),
    [
        ("embstore.extraction WHERE dataset_id = 1 AND item_id <= 2", 10, 8, 8),
        ("embstore.item WHERE dataset_id = 1 AND item_id <= 2", 8, 8, 8),
        ("embstore.dataset WHERE dataset_id = 1", 5, 5, 5),
        ("embstore.dataset", 0, 0, 0),
    ],
)
def test_what_belongs_to_a_deleted_row_goes_with_it(
    database: Database, delete: str, items: int, extractions: int, embeddings: int
) -> None:
    with database.begin() as connection:
        for dataset in ("calls", "books"):
            write(connection, fill(connection, 5, dataset=dataset), vectors_of(5))
    with database.begin() as connection:
        connection.execute(text(f"DELETE FROM {delete}"))
    for table, count in (("item", items), ("extraction", extractions), ("embedding", embeddings)):
        assert ask(database, f"SELECT count(*) FROM embstore.{table}") == [(count,)], table
