"""`embstore boundaries` on sets of growing size in a database, against the bare ordered read of the same vectors.

bare      COPY (position, embedding) ORDER BY position TO STDOUT (FORMAT BINARY) in one statement, as any client would
          read them; no value is looked at
read      all vectors by position, in pages, as the methods get them, and nothing else. Both in a process of their own,
          the start of which does not count
cosine    `embstore boundaries --method cosine`: a process from start to exit, its worker, the run's rows written
auto      the same, method auto

The vectors are those of `boundaries.py`: 256 dimensions, segments of N(1000, 100) files. Printed for each size: seconds
in turns, and the largest memory of each kind of process; at the end the exponent b of seconds = a · items^b for each.
--home keeps the sets in a folder of your own, so that the next call finds them loaded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from boundaries import DIM, windows
from common import in_turns, memory_watched, ratio, seconds, server, show, show_ratio
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from embstore import catalog, vectors
from embstore.db import embedded, migrate
from embstore.db.copy import PIECE, copy_rows
from embstore.db.engine import Database, driver_of
from embstore.settings import Settings

SEGMENT = 1000.0
METHODS = ("cosine", "auto")
READS = ("bare", "read")

_BARE = """
COPY (SELECT position, embedding FROM embstore.item JOIN embstore.embedding_{model} USING (dataset_id, item_id)
    WHERE dataset_id = {dataset} AND model_id = {model} ORDER BY position) TO STDOUT (FORMAT BINARY)
"""
_MODEL = """
INSERT INTO embstore.model (name, media, dim, fingerprint, settings) VALUES ('bench', 'audio', :dim, '', '{}')
RETURNING model_id
"""
_ITEMS = """
INSERT INTO embstore.item (dataset_id, position, path)
SELECT :dataset, n, n || '.wav' FROM generate_series(0, :items - 1) n
"""
_IDS = "SELECT min(item_id), max(item_id) FROM embstore.item WHERE dataset_id = :dataset"
_DONE = """
INSERT INTO embstore.extraction (dataset_id, model_id, item_id, status, finished_at)
SELECT dataset_id, :model, item_id, 'done', now() FROM embstore.item WHERE dataset_id = :dataset
"""


def main() -> None:
    """Measure every size and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="sizes of the set")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--methods", choices=METHODS, nargs="*", default=METHODS, help="default: both; none: load only")
    parser.add_argument("--home", type=Path, help="folder to keep the sets in")
    parser.add_argument("--only", choices=READS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        database = Database(Settings(home=options.home))
        print(_read(database, options.only, *options.items))
        database.close()
        return
    curves: dict[str, dict[int, float]] = {}
    with _kept(options.home) if options.home else server() as settings:
        embedded.ensure_running(settings.home)
        database = Database(settings)
        for items in options.items:
            with database.begin() as connection:
                _load(connection, items)
            for task, value in _measure(settings, items, options.rounds, options.methods).items():
                curves.setdefault(task, {})[items] = value
        database.close()
    print("exponents: " + ", ".join(f"{task} {_exponent(curve):.2f}" for task, curve in curves.items()))


@contextmanager
def _kept(home: Path) -> Iterator[Settings]:
    settings = Settings(home=home)
    database = Database(settings)
    migrate.require_ready(database)
    database.close()
    try:
        yield settings
    finally:
        embedded.stop(home, force=True)


def _load(connection: Connection, items: int) -> None:
    """The set of so many items, unless it is there."""
    name = f"bench{items}"
    if connection.execute(text("SELECT 1 FROM embstore.dataset WHERE name = :name"), {"name": name}).first():
        return
    model = connection.execute(text("SELECT model_id FROM embstore.model WHERE name = 'bench'")).scalar()
    if model is None:
        model = connection.execute(text(_MODEL), {"dim": DIM}).scalar_one()
        vectors.create_partition(connection, model, "bench", DIM)
    dataset = catalog.ensure_dataset(connection, name, "audio", f"/{name}").dataset_id
    connection.execute(text(_ITEMS), {"dataset": dataset, "items": items})
    connection.execute(text(_DONE), {"dataset": dataset, "model": model})
    first, last = connection.execute(text(_IDS), {"dataset": dataset}).one()
    assert last - first == items - 1
    for positions, rows in windows(items, SEGMENT, []):
        count = len(rows)
        columns: dict[str, NDArray[Any]] = {
            "dataset_id": np.full(count, dataset, dtype=np.int32),
            "model_id": np.full(count, model, dtype=np.int16),
            "item_id": first + positions,
            "embedding": rows,
        }
        copy_rows(connection, f"embstore.embedding_{model}", columns)
    connection.exec_driver_sql("ANALYZE embstore.item")
    connection.exec_driver_sql(f"ANALYZE embstore.embedding_{model}")


def _measure(settings: Settings, items: int, rounds: int, methods: list[str]) -> dict[str, float]:
    if not methods:
        return {}
    reads = {task: [__file__, "--home", str(settings.home), "--items", str(items), "--only", task] for task in READS}
    command = ["-m", "embstore", "boundaries", "--dataset", f"bench{items}", "--method"]
    words = reads | {method: [*command, method] for method in methods}
    memory: dict[str, dict[str, int]] = {}

    def once(task: str) -> float:
        with memory_watched(settings) as largest:
            if task in reads:
                taken = float(_process(settings, words[task]))
            else:
                taken = seconds(lambda: _process(settings, words[task]))
        memory[task] = {kind: max(size, memory.get(task, {}).get(kind, 0)) for kind, size in largest.items()}
        return taken

    tasks: dict[str, Callable[[], float]] = {task: partial(once, task) for task in words}
    once("read")
    times = in_turns(rounds, tasks)
    print(f"{items:,} vectors of {DIM} dimensions")
    show(times, items)
    for task, kinds in memory.items():
        print(f"{task:7} largest memory: " + ", ".join(f"{k} {v >> 20:,} MiB" for k, v in sorted(kinds.items())))
    for method in methods:
        target = "3 or less" if method == "cosine" else "none"
        show_ratio(f"{method} / bare", ratio(times, method, "bare"), target)
        show_ratio(f"{method} / read", ratio(times, method, "read"), "none")
    sys.stdout.flush()
    return {task: median(taken) for task, taken in times.items()}


def _process(settings: Settings, words: list[str]) -> str:
    environment = os.environ | {"EMBSTORE_HOME": str(settings.home)}
    environment.pop("DATABASE_URL", None)
    return subprocess.run(
        [sys.executable, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def _read(database: Database, task: str, items: int) -> float:
    """How long a reading takes."""
    with database.reading() as connection:
        ((model, (dataset,)),) = catalog.embedded(connection, f"bench{items}", "bench")
        scope = dataset.dataset_id, model.model_id
        if task == "bare":
            return seconds(lambda: _copy(connection, *scope))
        pages = vectors.ordered(connection, *scope, DIM)
        begin = time.perf_counter()
        assert sum(len(page.positions) for page in pages) == items
        return time.perf_counter() - begin


def _copy(connection: Connection, dataset_id: int, model_id: int) -> None:
    with driver_of(connection).cursor() as cursor, Path(os.devnull).open("wb") as nowhere:
        cursor.copy_expert(_BARE.format(dataset=dataset_id, model=model_id), nowhere, size=PIECE)


def _exponent(curve: dict[int, float]) -> float:
    points = [(np.log(size), np.log(value)) for size, value in curve.items()]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 1 else float("nan")


if __name__ == "__main__":
    main()
