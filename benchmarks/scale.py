"""Every job at growing sizes, on synthetic vectors: does the cost of an item stay what it was?

register    a scan of so many items into a new dataset, and an extraction for each into the queue
claim       all of them, 256 at a time
write       their vectors of 256 dimensions and their `done`, 256 a transaction
again       the same scan once more, when nothing is new
status      the command `embstore status`
centroids   the command `embstore centroids`: 1,000 items a speaker
unchanged   the same command once more, when nothing has changed
boundaries  the command `embstore boundaries`, method auto, which finds where the speaker changes
search      the ten nearest of one vector among all, exactly: no index

Printed for each size: seconds, microseconds an item, the largest memory of each kind of process, and the sizes of the
tables with their indexes; of claim and write, the first and the last tenth too. At the end, for each step, the exponent
b of seconds = a · items^b, by least squares on the logarithms, for sizes of --from on; b near 1 is linear. --picture
writes the curves as a PNG.

With --folder, databases and figures stay there, and the same command goes on where it was: after --seconds it begins
with nothing more, says so and ends with 75.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import command, memory_watched, seconds, server
from sqlalchemy import text

from embstore import catalog, vectors
from embstore.db.engine import Database
from embstore.queue import Queue, renew_lease, take_lease
from embstore.register import enqueue, register
from embstore.settings import Settings
from embstore.sources import Entry

DIM = 256
A_SPEAKER = 1_000
BATCH = 256
PARTS = 10
LEASE_SECONDS = 86_400.0
GO_ON = 75
_MODEL = """
INSERT INTO embstore.model (name, media, dim, fingerprint, settings) VALUES ('bench', 'audio', :dim, '', '{}')
RETURNING model_id
"""
_CLAIMED = (
    "SELECT item_id FROM embstore.extraction WHERE status = 'running' AND item_id > :after ORDER BY item_id LIMIT :n"
)
_HELD = "SELECT status, count(*), max(item_id) FROM embstore.extraction GROUP BY status"
_NEAREST = """
SELECT item_id FROM embstore.embeddings_bench
ORDER BY embedding <=> (SELECT embedding FROM embstore.embeddings_bench LIMIT 1) LIMIT 10
"""
_SIZES = """
SELECT relname, pg_table_size(relid), pg_indexes_size(relid) FROM pg_stat_user_tables
WHERE schemaname = 'embstore' AND pg_table_size(relid) > 1 << 20 ORDER BY 2 DESC
"""

Figures = dict[str, dict[str, Any]]
"""Of each step: `seconds` of its parts, and `memory`, the peak in bytes of each kind of process."""


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="items")
    parser.add_argument(
        "--from", dest="smallest", type=int, default=0, help="smallest size that the exponent is fitted to"
    )
    parser.add_argument("--picture", type=Path, help="PNG to write the curves to")
    parser.add_argument("--folder", type=Path, help="keep everything there, and go on with what is there")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin with nothing more after so long")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    taken = {size: _of_size(size, options.folder, end) for size in options.sizes}
    curves = {
        step: {size: sum(figures[step]["seconds"]) for size, figures in taken.items()}
        for step in taken[options.sizes[0]]
    }
    exponents = (f"{step} {_exponent(curve, options.smallest):.2f}" for step, curve in curves.items())
    print("\nexponents: " + ", ".join(exponents))
    if options.picture:
        _draw(curves, taken[max(taken)], options.picture)


def _of_size(size: int, folder: Path | None, end: float) -> Figures:
    """Measure what is not measured yet, and print all of it."""
    kept = folder and folder / str(size)
    notes = kept and kept / "figures.json"
    figures: Figures = json.loads(notes.read_text()) if notes and notes.exists() else {}
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
    if "sizes" not in figures:
        with server(kept) as settings:
            store = _Store(Database(settings), size)
            for step in _measure(store, settings, figures):
                if notes:
                    notes.write_text(json.dumps(figures))
                if time.monotonic() > end:
                    print(f"{size:,} items: {step} is measured; run it again to go on")
                    sys.exit(GO_ON)
            figures["sizes"] = store.sizes()
            store.database.close()
        if notes:
            notes.write_text(json.dumps(figures))
    _show(size, figures)
    return {step: figure for step, figure in figures.items() if step != "sizes"}


def _measure(store: _Store, settings: Settings, figures: Figures) -> Iterator[str]:
    """Each part of each step that has no figure yet."""
    steps: dict[str, Sequence[Callable[[], object]]] = {
        "register": [store.register],
        "claim": [partial(store.claim, part) for part in range(PARTS)],
        "write": [partial(store.write, part) for part in range(PARTS)],
        "again": [store.register],
        "status": [partial(command, settings, "status")],
        "centroids": [partial(command, settings, "centroids")],
        "unchanged": [partial(command, settings, "centroids")],
        "boundaries": [partial(command, settings, "boundaries")],
        "search": [store.search],
    }
    for step, parts in steps.items():
        figure = figures.setdefault(step, {"seconds": [], "memory": {}, "load": 0.0})
        for part in parts[len(figure["seconds"]) :]:
            with memory_watched(settings) as memory:
                figure["seconds"].append(seconds(part))
            for kind, peak in memory.items():
                figure["memory"][kind] = max(peak, figure["memory"].get(kind, 0))
            figure["load"] = max(figure["load"], os.getloadavg()[0])
            yield step


class _Store:
    """One dataset of so many items, and what is done with it."""

    def __init__(self, database: Database, size: int) -> None:
        self.database = database
        self._size = size
        with database.begin() as connection:
            model_id = connection.execute(text("SELECT model_id FROM embstore.model")).scalar_one_or_none()
            if model_id is None:
                model_id = connection.execute(text(_MODEL), {"dim": DIM}).scalar_one()
                vectors.create_partition(connection, model_id, "bench", DIM)
                take_lease(connection, LEASE_SECONDS)
            self._token = int(connection.execute(text("SELECT min(token) FROM embstore.lease")).scalar_one())
            renew_lease(connection, self._token, LEASE_SECONDS)
            dataset = catalog.ensure_dataset(connection, "bench", "audio", "/bench")
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

    def claim(self, part: int) -> None:
        """As workers do, but with nothing in between."""
        after = self._come_so_far("running", part)
        left = self._size * (part + 1) // PARTS - self._size * part // PARTS
        while left:
            keys = self.database.patiently(partial(self._claim, min(left, BATCH), after))
            left -= len(keys)
            after = keys[-1]

    def _claim(self, limit: int, after: int, connection: Any) -> list[int]:
        return self._queue.claim(connection, self._token, limit, after)

    def write(self, part: int) -> None:
        """Vectors of a speaker lie around a mean of its own."""
        after = self._come_so_far("done", part)
        first, last = self._size * part // PARTS, self._size * (part + 1) // PARTS
        with self.database.begin() as connection:
            keys = list(connection.execute(text(_CLAIMED), {"after": after, "n": last - first}).scalars())
        dice = np.random.default_rng(part)
        for at in range(0, len(keys), BATCH):
            batch = keys[at : at + BATCH]
            speakers = (first + np.arange(at, at + len(batch))) // A_SPEAKER
            matrix = _means(speakers) + dice.standard_normal((len(batch), DIM), dtype=np.float32)
            with self.database.begin() as connection:
                vectors.write(connection, self._queue, self._token, batch, matrix)

    def _come_so_far(self, status: str, part: int) -> int:
        """The last key that is in a status; that all parts before this one are, and nothing of it."""
        with self.database.begin() as connection:
            rows = {row[0]: row[1:] for row in connection.execute(text(_HELD))}
        number, last = rows.get(status, (0, 0))
        if number != self._size * part // PARTS:
            sys.exit(f"a part was cut off, and is no longer to be measured: remove the folder of {self._size:,} items")
        return int(last)

    def search(self) -> None:
        """Without an index."""
        with self.database.begin() as connection:
            assert len(connection.execute(text(_NEAREST)).all()) == 10

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Bytes of each table that is not tiny, and of its indexes."""
        with self.database.begin() as connection:
            return {row[0]: (int(row[1]), int(row[2])) for row in connection.execute(text(_SIZES))}


def _means(speakers: Any) -> Any:
    """The mean of each of these speakers' vectors, float32 [n, DIM]."""
    own = {speaker: np.random.default_rng(speaker).standard_normal(DIM) for speaker in set(speakers.tolist())}
    return np.array([own[speaker] for speaker in speakers.tolist()], dtype=np.float32)


def _entries(size: int) -> Iterator[Entry]:
    for number in range(size):
        speaker = f"s{number // A_SPEAKER:06}"
        yield Entry(f"{speaker}/{number:09}.wav", speaker, None, None, 32_000, number)


def _show(size: int, figures: Figures) -> None:
    print(f"\n{size:,} items\n{'':10}   {'seconds':>9}   {'µs/item':>8}   memory; load")
    for step, figure in figures.items():
        if step == "sizes":
            continue
        taken, parts = sum(figure["seconds"]), figure["seconds"]
        largest = ", ".join(f"{kind} {peak >> 20:,} MiB" for kind, peak in sorted(figure["memory"].items()))
        tenths = f"; first tenth {parts[0]:.2f} s, last {parts[-1]:.2f} s" if len(parts) > 1 else ""
        print(
            f"{step:10}   {taken:9.3f}   {1e6 * taken / size:8.1f}   {largest}; {figure['load']:.1f}{tenths}",
            flush=True,
        )
    sizes = (
        f"{name} {table >> 20:,} + indexes {index >> 20:,} MiB" for name, (table, index) in figures["sizes"].items()
    )
    print("; ".join(sizes), flush=True)


def _exponent(curve: dict[int, float], smallest: int) -> float:
    points = [(np.log(size), np.log(value)) for size, value in curve.items() if size >= smallest]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 1 else float("nan")


def _draw(curves: dict[str, dict[int, float]], largest: Figures, picture: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (cost, parts) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(2, 1))
    for step, curve in curves.items():
        sizes = list(curve)
        label = f"{step}: {_exponent(curve, 0):.2f}"
        cost.loglog(sizes, [1e6 * curve[size] / size for size in sizes], marker="o", label=label)
    cost.set(xlabel="items", ylabel="microseconds an item", title="Cost of an item; exponent of the whole step's time")
    cost.grid(which="both", alpha=0.3)
    cost.legend(fontsize="small")
    items = max(next(iter(curves.values())))
    for step in ("claim", "write"):
        parts.plot(range(1, PARTS + 1), [1e6 * value * PARTS / items for value in largest[step]["seconds"]], label=step)
    parts.set(xlabel=f"tenths of {items:,} items", ylabel="microseconds an item", title="First to last", ylim=(0, None))
    parts.grid(alpha=0.3)
    parts.legend(fontsize="small")
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    main()
