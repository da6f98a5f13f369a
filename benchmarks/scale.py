"""Every job at growing sizes, on synthetic vectors: does the cost of an item stay what it was?

register    a scan of so many items into a new dataset, and an extraction for each into the queue
claim       all of them, 256 at a time
write       their vectors of 256 dimensions and their `done`, 256 a transaction
again       the same scan once more, when nothing is new
status      the command `embstore status`
centroids   the command `embstore centroids`: 1,000 items a speaker
boundaries  the command `embstore boundaries`, method auto, which finds where the speaker changes
search      the ten nearest of one vector among all, exactly: no index

Printed for each size: seconds, microseconds an item, the largest memory of each kind of process, and the sizes of the
tables with their indexes. At the end, for each step, the exponent b of seconds = a · items^b, by least squares on the
logarithms, for sizes of --from on; b near 1 is linear. --picture writes the curves as a PNG.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from common import memory_watched, seconds, server
from sqlalchemy import text

from embstore import catalog, vectors
from embstore.db.engine import Database
from embstore.queue import Queue, take_lease
from embstore.register import enqueue, register
from embstore.settings import Settings
from embstore.sources import Entry

DIM = 256
A_SPEAKER = 1_000
BATCH = 256
_MODEL = """
INSERT INTO embstore.model (name, media, dim, fingerprint, settings) VALUES ('bench', 'audio', :dim, '', '{}')
RETURNING model_id
"""
_NEAREST = """
SELECT item_id FROM embstore.embeddings_bench
ORDER BY embedding <=> (SELECT embedding FROM embstore.embeddings_bench LIMIT 1) LIMIT 10
"""
_SIZES = """
SELECT pg_table_size('embstore.item'), pg_indexes_size('embstore.item'), pg_table_size('embstore.extraction'),
    pg_indexes_size('embstore.extraction'), pg_table_size('embstore.embedding_1'),
    pg_indexes_size('embstore.embedding_1')
"""


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="items")
    parser.add_argument(
        "--from", dest="smallest", type=int, default=0, help="smallest size that the exponent is fitted to"
    )
    parser.add_argument("--picture", type=Path, help="PNG to write the curves to")
    options = parser.parse_args()
    taken: dict[str, dict[int, float]] = {}
    for size in options.sizes:
        with server() as settings:
            for step, value in _measure(settings, size).items():
                taken.setdefault(step, {})[size] = value
    print(
        "\nexponents: " + ", ".join(f"{step} {_exponent(curve, options.smallest):.2f}" for step, curve in taken.items())
    )
    if options.picture:
        _draw(taken, options.picture)


def _measure(settings: Settings, size: int) -> dict[str, float]:
    store = _Store(Database(settings), size)
    steps: dict[str, Callable[[], object]] = {
        "register": store.register,
        "claim": store.claim,
        "write": store.write,
        "again": store.register,
        "status": partial(_command, settings, "status"),
        "centroids": partial(_command, settings, "centroids"),
        "boundaries": partial(_command, settings, "boundaries"),
        "search": store.search,
    }
    print(f"\n{size:,} items\n{'':10}   {'seconds':>9}   {'µs/item':>8}   memory")
    taken = {}
    for name, step in steps.items():
        with memory_watched(settings) as memory:
            taken[name] = seconds(step)
        largest = ", ".join(f"{kind} {peak >> 20:,} MiB" for kind, peak in sorted(memory.items()))
        print(f"{name:10}   {taken[name]:9.3f}   {1e6 * taken[name] / size:8.1f}   {largest}", flush=True)
    store.show_sizes()
    store.database.close()
    return taken


class _Store:
    """One dataset of so many items, and what is done with it."""

    def __init__(self, database: Database, size: int) -> None:
        self.database = database
        self._size = size
        self._keys: list[int] = []
        with database.begin() as connection:
            model_id = connection.execute(text(_MODEL), {"dim": DIM}).scalar_one()
            vectors.create_partition(connection, model_id, "bench", DIM)
            dataset = catalog.ensure_dataset(connection, "bench", "audio", "/bench")
            self._token = take_lease(connection, 86_400.0)
        self._queue = Queue(
            "embstore.extraction", "item_id", {"dataset_id": dataset.dataset_id, "model_id": int(model_id)}
        )

    def register(self) -> None:
        """As `embstore extract` does, before its workers start."""
        scope = self._queue.scope
        with self.database.begin() as connection:
            register(connection, scope["dataset_id"], _entries(self._size))
        with self.database.begin() as connection:
            enqueue(connection, scope["dataset_id"], scope["model_id"])

    def claim(self) -> None:
        """As workers do, but with nothing in between."""
        after = 0
        while keys := self.database.patiently(partial(self._claim, after)):
            self._keys += keys
            after = keys[-1]

    def _claim(self, after: int, connection: object) -> list[int]:
        return self._queue.claim(connection, self._token, BATCH, after)  # type: ignore[arg-type]

    def write(self) -> None:
        """Vectors of a speaker lie around a mean of its own."""
        dice = np.random.default_rng(0)
        mean = np.zeros(DIM, dtype=np.float32)
        for at in range(0, len(self._keys), BATCH):
            if at // A_SPEAKER != (at - BATCH) // A_SPEAKER:
                mean = dice.standard_normal(DIM, dtype=np.float32)
            keys = self._keys[at : at + BATCH]
            matrix = mean + dice.standard_normal((len(keys), DIM), dtype=np.float32)
            with self.database.begin() as connection:
                vectors.write(connection, self._queue, self._token, keys, matrix)

    def search(self) -> None:
        """Without an index."""
        with self.database.begin() as connection:
            assert len(connection.execute(text(_NEAREST)).all()) == 10

    def show_sizes(self) -> None:
        """Print what the tables and their indexes take."""
        with self.database.begin() as connection:
            sizes = connection.execute(text(_SIZES)).one()
        pairs = zip(("item", "extraction", "embedding"), sizes[::2], sizes[1::2], strict=True)
        print("; ".join(f"{name} {table >> 20:,} + indexes {index >> 20:,} MiB" for name, table, index in pairs))


def _entries(size: int) -> Iterator[Entry]:
    for number in range(size):
        speaker = f"s{number // A_SPEAKER:06}"
        yield Entry(f"{speaker}/{number:09}.wav", speaker, None, None, 32_000, number)


def _command(settings: Settings, word: str) -> None:
    environment = os.environ | {"EMBSTORE_HOME": str(settings.home)}
    environment.pop("DATABASE_URL", None)
    subprocess.run([sys.executable, "-m", "embstore", word], env=environment, capture_output=True, check=True)


def _exponent(curve: dict[int, float], smallest: int) -> float:
    points = [(np.log(size), np.log(value)) for size, value in curve.items() if size >= smallest]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 1 else float("nan")


def _draw(taken: dict[str, dict[int, float]], picture: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for step, curve in taken.items():
        sizes = list(curve)
        axes.loglog(sizes, [1e6 * curve[size] / size for size in sizes], marker="o", label=step)
    axes.set(xlabel="items", ylabel="microseconds an item", title="Cost of an item, by the size of the store")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
