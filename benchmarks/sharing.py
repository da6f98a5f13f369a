"""What row-level security costs: the same queries by a member of a team, and by a superuser, whom no rule binds.

scan        the distance of one vector to every vector of the model
count       the number of vectors, by reading the table: nothing is done with a row but to apply the rules
centroids   the mean of each speaker's vectors, as `embstore centroids` computes it in SQL
items       the number of items in the view `items`
by index    the ten nearest through the view on the vectors, by an HNSW index
nearest     the same by `embstore.nearest`, which counts first how many items the member sees
write       `embstore.vectors.write`, batches of 256 claimed items: there is no COPY into a table with rules, so what
            a member writes goes through a temporary table

The member sees all the rows that the superuser sees: what is compared is the rules, and not fewer rows. They are spread
over `--datasets` datasets, as the rules compare each row with all of those that one may see. Medians, in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from common import Times, arguments, in_turns, ratio, seconds, server, show, show_ratio
from numpy.typing import NDArray
from sqlalchemy import text

from embstore import catalog, members, vectors
from embstore.db.copy import copy_rows
from embstore.db.embedded import url
from embstore.db.engine import Database
from embstore.queue import Queue, take_lease
from embstore.settings import Settings, load

DIM = 256
BATCH = 256
WRITTEN = 8 * BATCH
EACH = 50

_MODEL = "SELECT embstore.add_model('bench', 'audio', :dim, 'f', '{}', NULL, NULL)"
_DATASETS = """
INSERT INTO embstore.dataset (name, media, root, team)
SELECT 'd' || n, 'audio', '/', 'team' FROM generate_series(1, :n) n
"""
_ITEMS = """
INSERT INTO embstore.item (dataset_id, position, path, speaker)
SELECT 1 + n % :datasets, n / :datasets, n || '.wav', 's' || n / :each FROM generate_series(0, :items - 1) n
"""
_PENDING = """
INSERT INTO embstore.item (dataset_id, position, path) SELECT 1, :items + n, 'w' || n FROM generate_series(1, :more) n
"""
_QUEUE = """
INSERT INTO embstore.extraction (dataset_id, model_id, item_id)
SELECT dataset_id, 1, item_id FROM embstore.item WHERE speaker IS NULL
"""
_INDEX = "CREATE INDEX ON embstore.embedding_1 USING hnsw ((embedding::vector({dim})) vector_cosine_ops)"

_QUERIES = {
    "scan": "SELECT max(embedding <=> CAST(:query AS vector)) FROM embstore.embedding_1",
    "count": "SELECT count(*) FROM embstore.embedding_1",
    "centroids": "SELECT max(vector_norm(mean)) FROM (SELECT i.dataset_id, i.speaker, avg(e.embedding) AS mean"
    " FROM embstore.item i JOIN embstore.embedding_1 e USING (dataset_id, item_id) GROUP BY 1, 2) c",
    "items": "SELECT count(*) FROM embstore.items",
    "by index": "SELECT count(*) FROM (SELECT item_id FROM embstore.embeddings_bench"
    " ORDER BY embedding <=> CAST(:query AS vector) LIMIT 10) n",
    "nearest": "SELECT count(*) FROM embstore.nearest(CAST(:query AS vector), 'bench', 10)",
}
_TARGETS = {"scan": "1.15 or less", "centroids": "1.15 or less", "write": "1.5 or less"}
_RULES = {"count": "SET LOCAL enable_indexonlyscan = off; SET LOCAL enable_indexscan = off"}


class _Asks:
    """One role's session, and what it asks."""

    def __init__(self, database: Database, name: str, query: str) -> None:
        self._database = database
        self._name = name
        self._query = query

    def __call__(self) -> float:
        with self._database.begin() as connection:
            connection.exec_driver_sql("SET LOCAL max_parallel_workers_per_gather = 0; SET LOCAL work_mem = '256MB'")
            if self._name in _RULES:
                connection.exec_driver_sql(_RULES[self._name])
            statement = text(_QUERIES[self._name])
            values = {"query": self._query} if ":query" in _QUERIES[self._name] else {}
            return seconds(lambda: connection.execute(statement, values).scalar_one())


class _Writes:
    """One role's worker: claims rows, untimed, and writes them."""

    def __init__(self, database: Database, rows: NDArray[np.float32]) -> None:
        self._database = database
        self._queue = Queue("embstore.extraction", "item_id", {"dataset_id": 1, "model_id": 1})
        self._rows = rows
        with database.begin() as connection:
            self._token = take_lease(connection)

    def __call__(self) -> float:
        with self._database.begin() as connection:
            keys = self._queue.claim(connection, self._token, len(self._rows))
        return seconds(lambda: self._write(keys))

    def _write(self, keys: list[int]) -> None:
        for at in range(0, len(keys), BATCH):
            with self._database.begin() as connection:
                batch = slice(at, at + BATCH)
                vectors.write(connection, self._queue, self._token, keys[batch], self._rows[batch])


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, items=50_000, rounds=15)
    parser.add_argument("--part", choices=("tables", "index"), help="only this  [default: all]")
    parser.add_argument("--datasets", type=int, default=4, help="how many they are spread over (default: 4)")
    options = parser.parse_args()
    with server() as settings:
        above = Database(settings, pool_size=2)
        member = Database(_member(above, settings, options.datasets), pool_size=2)
        query = _fill(above, options.items, options.datasets, 2 * WRITTEN * (options.rounds + 1))
        rows = np.random.default_rng(1).standard_normal((WRITTEN, DIM)).astype(np.float32)
        print(f"{options.items:,} vectors of {DIM} dimensions in {options.datasets} datasets, {options.rounds} rounds")
        if options.part != "index":
            _tables(above, member, query, rows, options.rounds)
        if options.part != "tables":
            _index(above, member, query, options.rounds)
        above.close()
        member.close()


def _tables(above: Database, member: Database, query: str, rows: NDArray[np.float32], rounds: int) -> None:
    _compare("write", {"off": _Writes(above, rows), "on": _Writes(member, rows)}, rounds)
    for name in ("scan", "count", "centroids", "items"):
        _compare(name, {"off": _Asks(above, name, query), "on": _Asks(member, name, query)}, rounds)


def _index(above: Database, member: Database, query: str, rounds: int) -> None:
    with above.begin() as connection:
        connection.exec_driver_sql("SET LOCAL maintenance_work_mem = '1GB'")
        connection.exec_driver_sql(_INDEX.format(dim=DIM))
    for name in ("by index", "nearest"):
        _compare(name, {"off": _Asks(above, name, query), "on": _Asks(member, name, query)}, rounds)


def _member(above: Database, settings: Settings, datasets: int) -> Settings:
    """A team with a writer in it and datasets; settings by which the writer connects."""
    with above.begin() as connection:
        members.create_team(connection, "team")
        members.add_member(connection, "team", "ann", "writer")
        connection.execute(text(_DATASETS), {"n": datasets})
        connection.execute(text(_MODEL), {"dim": DIM})
        assert catalog.get_model(connection, "bench").model_id == 1
    address = url(settings.home).replace("embstore@", "ann@")
    return load(database_url=address, home=settings.home)


def _fill(above: Database, items: int, datasets: int, more: int) -> str:
    """Items, their vectors, and `more` that are to be written; returns one vector as text."""
    dice = np.random.default_rng(0)
    with above.begin() as connection:
        connection.execute(text(_ITEMS), {"items": items, "datasets": datasets, "each": EACH * datasets})
        rows = connection.exec_driver_sql("SELECT dataset_id, item_id FROM embstore.item ORDER BY item_id").all()
        for at in range(0, items, 10_000):
            part = np.array(rows[at : at + 10_000], dtype=np.int64)
            matrix = dice.standard_normal((len(part), DIM)).astype(np.float32)
            columns: dict[str, NDArray[Any]] = {
                "dataset_id": part[:, 0].astype(np.int32),
                "model_id": np.ones(len(part), np.int16),
                "item_id": part[:, 1],
                "embedding": matrix,
            }
            copy_rows(connection, "embstore.embedding_1", columns)
        connection.execute(text(_PENDING), {"items": items, "more": more})
        connection.execute(text(_QUEUE))
    with above.begin() as connection:
        connection.exec_driver_sql("ANALYZE")
    return "[" + ",".join(map(str, matrix[0].tolist())) + "]"


def _compare(name: str, tasks: dict[str, Callable[[], float]], rounds: int) -> None:
    for task in tasks.values():
        task()
    times: Times = in_turns(rounds, {f"{name}, rules {way}": task for way, task in tasks.items()})
    show(times)
    show_ratio(
        f"{name}: with the rules / without",
        ratio(times, f"{name}, rules on", f"{name}, rules off"),
        _TARGETS.get(name, "-"),
    )


if __name__ == "__main__":
    main()
