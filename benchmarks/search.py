"""Search among 200,000 clustered 256-d vectors: recall and speed, beside faiss-cpu and LanceDB on the same data.

exact          embstore.nearest(exact => true): all vectors, one by one
full, half     HNSW (m 16, ef_construction 64), full and half precision, with hnsw.ef_search 40 and 100, in plain SQL on
               the index: ORDER BY … LIMIT 10
nearest        embstore.nearest with that index, which never searches with less than 100
faiss          IndexFlatIP and IndexHNSWFlat (M 16, efConstruction 64), in this process's memory, one thread
lancedb        no index, and IVF_HNSW_SQ (m 16, ef_construction 64) with its own defaults for a search, from a folder

Then filters that keep 50, 10, 1 and 0.1% of the items, by a condition that no index helps, on a column of the items, so
that a scan of the vectors has to look the item up: embstore.nearest against iterative scan alone (hnsw.iterative_scan =
relaxed_order, ef 100, as far as it goes by default), with the full index.

Vectors are of 2,000 speakers with a common part and noise around each; queries are new utterances of such speakers, one
after another. Recall@10 counts what is no farther than the tenth of numpy's. A round is `--queries` queries of each, in
turns. faiss and LanceDB are left out where they are not installed: pip install faiss-cpu lancedb. The server has
shared_buffers = 1GB, so that table and index stay in its memory, as theirs do.

To load and to build takes minutes. With `--keep FOLDER` what was built stays there for the next run: one `--part` then
takes a minute or two, if the run before was of the same or of `full` (there is one index at a time).
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Times, arguments, in_turns, server, show_ratio, temporary_folder
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from embstore import catalog, indexes, vectors
from embstore.db import embedded
from embstore.db.copy import copy_rows
from embstore.db.engine import Database
from embstore.settings import Settings

DIM, SPEAKERS, NOISE, K = 256, 2_000, 0.35, 10
SHARES = (500, 100, 10, 1)
_KEPT = "abs(hashint8(position) % 1000) < {share}"
_PIECE = 50_000

_EXPRESSIONS = {
    "full": "embedding::vector(256) <=> CAST(:query AS vector(256))",
    "half": "l2_normalize(embedding::vector(256))::halfvec(256) <=> CAST(:query AS halfvec(256))",
}
_INDEX = "SELECT item_id FROM embstore.embedding_1 ORDER BY {order} LIMIT 10"
_ITERATIVE = (
    "SELECT e.item_id FROM embstore.embedding_1 e JOIN embstore.item i USING (dataset_id, item_id)"
    " WHERE abs(hashint8(i.position) % 1000) < {share} ORDER BY {order} LIMIT 10"
)
_NEAREST = (
    "SELECT item_id FROM embstore.nearest(CAST(:query AS vector), 'bench', condition => :condition, exact => :exact)"
)

Answer = Callable[[int], Sequence[int]]
"""Item ids for the query of a number."""


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, items=200_000, rounds=3)
    parser.add_argument("--queries", type=int, default=100, help="queries a round (default: 100)")
    parser.add_argument("--part", choices=("all", "full", "half", "filters"), default="all", help="default: all")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the database and the indexes here")
    options = parser.parse_args()
    data, queries = _clustered(options.items, options.queries)
    with _folder(options.keep) as folder, server(folder) as settings:
        _enlarge(settings)
        database = Database(settings, pool_size=2)
        _fill(database, data)
        print(
            f"{options.items:,} vectors of {DIM} dimensions, {options.queries} queries a round, {options.rounds} rounds"
        )
        bench = _Bench(database, data, queries, options.rounds, folder)
        for precision in indexes.PRECISIONS:
            if options.part in ("all", precision):
                bench.index(precision)
        if options.part in ("all", "filters"):
            bench.filters()
        database.close()


class _Bench:
    def __init__(
        self, database: Database, data: NDArray[np.float32], queries: NDArray[np.float32], rounds: int, folder: Path
    ) -> None:
        self._database = database
        self._folder = folder
        self._data = data
        self._queries = queries
        self._rounds = rounds
        self._cosines = queries @ data.T
        self._literals = [str(query.tolist()) for query in queries]

    def index(self, precision: indexes.Precision) -> None:
        """Of one precision, beside the others; it makes room for the next that is built."""
        self._build(precision)
        answers: dict[str, tuple[dict[str, str], Answer]] = {"exact": ({}, self._nearest(exact=True))}
        statement = _INDEX.format(order=_EXPRESSIONS[precision])
        for ef in (40, 100):
            answers[f"{precision} ef {ef}"] = ({"hnsw.ef_search": str(ef)}, partial(self._sql, statement))
        answers[f"nearest, {precision}"] = ({}, self._nearest())
        if precision == "full":
            others = (_faiss, _lancedb)
            answers |= {
                name: ({}, answer)
                for other in others
                for name, answer in other(self._data, self._queries, self._folder)
            }
        self._compare(answers, np.ones(len(self._data), dtype=bool))

    def filters(self) -> None:
        """With the full index in place."""
        self._build("full")
        for share in SHARES:
            condition = _KEPT.format(share=share)
            with self._database.begin() as connection:
                rows = connection.exec_driver_sql(
                    f"SELECT item_id FROM embstore.item WHERE {condition}".replace("%", "%%")
                )
                kept = np.zeros(len(self._data), dtype=bool)
                kept[np.array(rows.scalars().all()) - 1] = True
            iterative = _ITERATIVE.format(share=share, order="e." + _EXPRESSIONS["full"])
            settings = {"hnsw.ef_search": "100", "hnsw.iterative_scan": "relaxed_order"}
            # Made to go by the index, where the planner would rather compare all.
            settings |= dict.fromkeys(("enable_seqscan", "enable_sort", "enable_hashjoin", "enable_mergejoin"), "off")
            print(f"\na filter that keeps {share / 10:g}% of the items")
            times = self._compare(
                {
                    "nearest": ({}, self._nearest(condition=condition)),
                    "iterative scan": (settings, partial(self._sql, iterative)),
                },
                kept,
            )
            ratio = float(np.median(times["iterative scan"]) / np.median(times["nearest"]))
            show_ratio("speed of embstore.nearest / of iterative scan alone", ratio, "above 1 at 1%")

    def _build(self, precision: indexes.Precision) -> None:
        with self._database.begin() as connection:
            model = catalog.get_model(connection, "bench")
            if any(index.precision == precision for index in indexes.find(connection)):
                return
            plan = indexes.plan(connection, model, "hnsw", precision, local=True)
        begin = time.perf_counter()
        indexes.build(self._database, plan, lambda _: None)
        taken = time.perf_counter() - begin
        with self._database.begin() as connection:
            (index,) = indexes.find(connection)
            connection.exec_driver_sql("SELECT sum(length(vector_send(embedding))) FROM embstore.embedding_1")
        print(f"\n{plan.name}: built in {taken:.0f} s with {plan.workers} parallel workers, {index.size >> 20} MiB")

    def _nearest(self, condition: str | None = None, *, exact: bool = False) -> Answer:
        return partial(self._sql, _NEAREST, condition=condition, exact=exact)

    def _sql(self, statement: str, number: int, **values: Any) -> Sequence[int]:
        rows = self._connection.execute(
            text(statement.replace("::", r"\:\:")), {"query": self._literals[number], **values}
        )
        return rows.scalars().all()

    def _compare(self, answers: dict[str, tuple[dict[str, str], Answer]], kept: NDArray[np.bool_]) -> Times:
        most = min(K, int(kept.sum()))
        right = np.sort(self._cosines[:, kept])[:, -most] - 1e-6
        found: dict[str, list[float]] = {}

        def run(name: str) -> float:
            settings, answer = answers[name]
            with self._database.begin() as self._connection:
                self._connection.exec_driver_sql("SELECT '[1]'::vector")  # the extension knows its settings when loaded
                for setting, value in settings.items():
                    self._connection.exec_driver_sql(f"SET LOCAL {setting} = '{value}'")
                begin = time.perf_counter()
                got = [answer(number) for number in range(len(self._queries))]
                taken = time.perf_counter() - begin
            found[name] = [
                float((self._cosines[number, np.asarray(ids, dtype=np.int64) - 1] >= right[number]).sum() / most)
                for number, ids in enumerate(got)
            ]
            return taken

        times = in_turns(self._rounds, {name: partial(run, name) for name in answers})
        _show(times, found, len(self._queries))
        return times


def _show(times: Times, found: dict[str, list[float]], queries: int) -> None:
    width = max(map(len, times))
    print(f"{'':{width}}   recall@{K}   queries/s: {'min':>7} {'median':>9} {'max':>9}")
    for name, taken in times.items():
        rates = " ".join(f"{queries / value:>9,.0f}" for value in (max(taken), float(np.median(taken)), min(taken)))
        print(f"{name:{width}}   {np.mean(found[name]):>9.4f}            {rates}", flush=True)


def _clustered(items: int, queries: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors and queries of unit length, float32 [items, DIM] and [queries, DIM].

    The vectors do not depend on the number of queries, as they may have been kept.
    """
    dice = np.random.default_rng(0)
    means = dice.normal(size=DIM) + dice.normal(size=(SPEAKERS, DIM))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return _utterances(means, items, seed=1), _utterances(means, queries, seed=2)


def _utterances(means: NDArray[np.float64], number: int, seed: int) -> NDArray[np.float32]:
    dice = np.random.default_rng(seed)
    rows = means[dice.integers(0, SPEAKERS, number)]
    rows += dice.normal(size=rows.shape) * np.sqrt(NOISE / DIM)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is None:
        with temporary_folder() as folder:
            yield folder
    else:
        kept.mkdir(exist_ok=True)
        kept.chmod(0o755)
        yield kept.resolve()


def _enlarge(settings: Settings) -> None:
    """Give the server room for table and index."""
    database = Database(settings)
    with database.autocommit() as connection:
        connection.exec_driver_sql("ALTER SYSTEM SET shared_buffers = '1GB'")
    database.close()
    embedded.stop(settings.home, force=True)


def _fill(database: Database, data: NDArray[np.float32]) -> None:
    """Store the vectors; those that were kept are the same, if they are as many."""
    with database.begin() as connection:
        there = connection.exec_driver_sql("SELECT count(*) FROM embstore.item").scalar_one()
        if there == len(data):
            connection.exec_driver_sql("SELECT sum(length(vector_send(embedding))) FROM embstore.embedding_1")
            return
        if there:
            raise SystemExit(f"what is kept has {there:,} vectors, not {len(data):,}: name another folder")
        connection.execute(
            text(
                "INSERT INTO embstore.model (name, media, dim, fingerprint, settings)"
                " VALUES ('bench', 'audio', :dim, '', '{}')"
            ),
            {"dim": DIM},
        )
        connection.exec_driver_sql("INSERT INTO embstore.dataset (name, media, root) VALUES ('bench', 'audio', '/b')")
        vectors.create_partition(connection, 1, "bench", DIM)
        connection.execute(
            text(
                "INSERT INTO embstore.item (dataset_id, position, path)"
                " SELECT 1, n, n || '.wav' FROM generate_series(0, :items - 1) n ORDER BY n"
            ),
            {"items": len(data)},
        )
        for at in range(0, len(data), _PIECE):
            _copy(connection, at, data[at : at + _PIECE])
    with database.autocommit() as connection:
        connection.exec_driver_sql("VACUUM (ANALYZE) embstore.item, embstore.embedding_1")


def _copy(connection: Connection, at: int, piece: NDArray[np.float32]) -> None:
    count = len(piece)
    columns: dict[str, NDArray[Any]] = {
        "dataset_id": np.ones(count, dtype=np.int32),
        "model_id": np.ones(count, dtype=np.int16),
        "item_id": np.arange(at + 1, at + count + 1, dtype=np.int64),
        "embedding": piece,
    }
    copy_rows(connection, "embstore.embedding_1", columns)


def _faiss(data: NDArray[np.float32], queries: NDArray[np.float32], folder: Path) -> list[tuple[str, Answer]]:
    if importlib.util.find_spec("faiss") is None:
        return []
    import faiss

    flat = faiss.IndexFlatIP(DIM)
    flat.add(data)
    file = folder / "faiss"
    graph: Any
    if file.exists():
        graph = faiss.read_index(str(file))
    else:
        graph = faiss.IndexHNSWFlat(DIM, 16, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = 64
        begin = time.perf_counter()
        graph.add(data)
        print(f"faiss HNSW: built in {time.perf_counter() - begin:.0f} s with all cores")
        faiss.write_index(graph, str(file))
    faiss.omp_set_num_threads(1)

    def exact(number: int) -> Sequence[int]:
        return [int(place) + 1 for place in flat.search(queries[number : number + 1], K)[1][0]]

    def by_graph(number: int, ef: int) -> Sequence[int]:
        graph.hnsw.efSearch = ef
        return [int(place) + 1 for place in graph.search(queries[number : number + 1], K)[1][0] if place >= 0]

    return [
        ("faiss flat", exact),
        ("faiss HNSW ef 40", partial(by_graph, ef=40)),
        ("faiss HNSW ef 100", partial(by_graph, ef=100)),
    ]


def _lancedb(data: NDArray[np.float32], queries: NDArray[np.float32], folder: Path) -> list[tuple[str, Answer]]:
    if importlib.util.find_spec("lancedb") is None:
        return []
    import lancedb
    import pyarrow
    from lancedb.index import HnswSq

    tables = lancedb.connect(folder / "lancedb")
    there = set(tables.list_tables().tables)
    ids = pyarrow.array(np.arange(1, len(data) + 1))
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(data.reshape(-1)), DIM)
    rows = pyarrow.table({"id": ids, "vector": column})
    answers: list[tuple[str, Answer]] = []
    for name in ("flat", "IVF_HNSW_SQ"):
        table = tables.open_table(name) if name in there else tables.create_table(name, rows)
        if name != "flat" and not table.list_indices():
            begin = time.perf_counter()
            table.create_index("vector", config=HnswSq(distance_type="cosine", m=16, ef_construction=64))
            print(f"lancedb {name}: built in {time.perf_counter() - begin:.0f} s with all cores")
        answers.append((f"lancedb {name}", partial(_ask_lancedb, table, queries)))
    return answers


def _ask_lancedb(table: Any, queries: NDArray[np.float32], number: int) -> Sequence[int]:
    found = table.search(queries[number]).distance_type("cosine").limit(K).select(["id", "_distance"]).to_arrow()
    return [int(one) for one in found["id"].to_pylist()]


if __name__ == "__main__":
    main()
