"""`embstore centroids` against the bare average in SQL, and against numpy on the client.

command     the whole `embstore centroids --recompute` with default flags: a process from start to exit, its workers,
            the queue, cohesion and lowest utterance of every speaker
bare        SELECT speaker, avg(embedding) FROM embeddings_bench GROUP BY speaker, into a temporary table: one session
            with 512 MB of work_mem, without parallel workers
parallel    the same with as many parallel workers as the server gives by default
numpy       the vectors by COPY BINARY to the client, in pieces, and summed there in float64 by speaker

Then ten utterances are added to one speaker, and the time of `embstore centroids` is taken that computes it anew, and
that of one for which nothing is left to do: their difference is what one speaker costs.

Memory is the largest resident set of each kind of process, the part of it that is shared with others included.

To load takes a minute. With `--keep FOLDER` the databases stay there, and the next run finds them loaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import arguments, in_turns, memory_watched, ratio, seconds, server, show, show_ratio
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from embstore import vectors
from embstore.db import embedded
from embstore.db.copy import Column, copy_rows, read_rows
from embstore.db.engine import Database
from embstore.settings import Settings

DIM = 256
_PIECE = 50_000

_MODEL = """
INSERT INTO embstore.model (name, media, dim, fingerprint, settings) VALUES ('bench', 'audio', :dim, '', '{}')
"""
_DATASET = "INSERT INTO embstore.dataset (name, media, root) VALUES ('bench', 'audio', '/bench')"
_ITEMS = """
INSERT INTO embstore.item (dataset_id, position, path, speaker)
SELECT 1, n, 's' || n / :each || '/' || n || '.wav', 's' || n / :each FROM generate_series(:first, :last - 1) n
"""
_DONE = """
INSERT INTO embstore.extraction (dataset_id, model_id, item_id, status, finished_at)
SELECT 1, 1, item_id, 'done', now() FROM embstore.item WHERE position >= :first
"""
_CHANGED = """
INSERT INTO embstore.speaker_change (dataset_id, model_id, speaker)
SELECT DISTINCT 1, 1, speaker FROM embstore.item WHERE position >= :first
"""
_RENAME = "UPDATE embstore.item SET speaker = 's0' WHERE position >= :first"
_BARE = "CREATE TEMPORARY TABLE bare AS SELECT speaker, avg(embedding) FROM embstore.embeddings_bench GROUP BY speaker"
_FETCH = """
SELECT substr(i.speaker, 2)::int AS speaker, e.embedding
FROM embstore.item i JOIN embstore.embedding_1 e ON e.dataset_id = 1 AND e.model_id = 1 AND e.item_id = i.item_id
WHERE i.dataset_id = 1 AND i.item_id > {after} AND i.item_id <= {to}
"""


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, items=1_000_000, rounds=3)
    parser.add_argument("--speakers", type=int, nargs="+", default=[1_000, 50_000], help="default: 1000 50000")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the loaded databases here")
    options = parser.parse_args()
    for speakers in options.speakers:
        with server(_folder(options.keep, speakers)) as settings:
            embedded.ensure_running(settings.home)
            database = Database(settings)
            _fill(database, options.items, speakers)
            print(f"{options.items:,} vectors of {DIM} dimensions, {speakers:,} speakers, {options.rounds} in turns")
            _measure(settings, database, options.items, speakers, options.rounds)
            database.close()


def _folder(kept: Path | None, speakers: int) -> Path | None:
    """Where the database with so many speakers is kept, if it is."""
    if kept is None:
        return None
    folder = kept.resolve() / str(speakers)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _measure(settings: Settings, database: Database, items: int, speakers: int, rounds: int) -> None:
    command = _Command(settings)
    command("--recompute")
    with memory_watched(settings) as memory:
        command("--recompute")
    tasks = {
        "command": lambda: command("--recompute"),
        "bare": lambda: seconds(lambda: _bare(database, parallel=False)),
        "parallel": lambda: seconds(lambda: _bare(database, parallel=True)),
        "numpy": lambda: seconds(lambda: _numpy(database, items, speakers)),
    }
    times = in_turns(rounds, tasks)
    show(times, items)
    target = "1.25 or less" if items >= 500 * speakers else "1.5 or less"
    for bare in ("bare", "parallel"):
        show_ratio(f"embstore centroids --recompute / {bare}", ratio(times, "command", bare), target)
    show_ratio("numpy on the client / embstore centroids --recompute", ratio(times, "numpy", "command"), "1 or more")
    print("largest memory: " + ", ".join(f"{kind} {size >> 20} MiB" for kind, size in memory.items()))
    with database.begin() as connection:
        count = int(connection.exec_driver_sql("SELECT count(*) FROM embstore.item").scalar_one())
        _add(connection, count, count + 10, items // speakers)
        connection.execute(text(_RENAME), {"first": count})
    one = command()
    rest = median(command() for _ in range(rounds))
    print(f"ten utterances added to one speaker: {one:.2f} s; nothing to do: {rest:.2f} s\n")


class _Command:
    """`embstore centroids` as a process of its own."""

    def __init__(self, settings: Settings) -> None:
        self._environment = os.environ | {"EMBSTORE_HOME": str(settings.home)}
        # Without the second, modules would be compiled at each start: a user's are, once.
        for name in ("DATABASE_URL", "PYTHONDONTWRITEBYTECODE"):
            self._environment.pop(name, None)

    def __call__(self, *flags: str) -> float:
        words = [sys.executable, "-m", "embstore", "centroids", *flags]
        return seconds(lambda: subprocess.run(words, env=self._environment, capture_output=True, check=True))


def _fill(database: Database, items: int, speakers: int) -> None:
    with database.begin() as connection:
        there = int(connection.exec_driver_sql("SELECT count(*) FROM embstore.item").scalar_one())
    if there:
        if items <= there < items + items // speakers:
            return
        raise SystemExit(f"what is kept has {there:,} vectors, not {items:,}: name another folder")
    with database.begin() as connection:
        connection.execute(text(_MODEL), {"dim": DIM})
        connection.execute(text(_DATASET))
        vectors.create_partition(connection, 1, "bench", DIM)
        _add(connection, 0, items, items // speakers)
    with database.begin() as connection:
        connection.exec_driver_sql("ANALYZE embstore.item, embstore.embedding_1")


def _add(connection: Connection, first: int, last: int, each: int) -> None:
    connection.execute(text(_ITEMS), {"first": first, "last": last, "each": each})
    connection.execute(text(_DONE), {"first": first})
    connection.execute(text(_CHANGED), {"first": first})
    dice = np.random.default_rng(first)
    for at in range(first, last, _PIECE):
        ids = np.arange(at + 1, min(at + _PIECE, last) + 1, dtype=np.int64)
        columns: dict[str, NDArray[Any]] = {
            "dataset_id": np.ones(len(ids), dtype=np.int32),
            "model_id": np.ones(len(ids), dtype=np.int16),
            "item_id": ids,
            "embedding": dice.standard_normal((len(ids), DIM), dtype=np.float32) + 1,
        }
        copy_rows(connection, "embstore.embedding_1", columns)


def _bare(database: Database, *, parallel: bool) -> None:
    with database.begin() as connection:
        connection.exec_driver_sql("SET LOCAL work_mem = '512MB'")
        if not parallel:
            connection.exec_driver_sql("SET LOCAL max_parallel_workers_per_gather = 0")
        connection.exec_driver_sql(_BARE)
        connection.exec_driver_sql("DROP TABLE bare")


def _numpy(database: Database, items: int, speakers: int) -> None:
    sums, counts = np.zeros((speakers, DIM)), np.zeros(speakers)
    columns: dict[str, Column] = {"speaker": (np.dtype(np.int32), None), "embedding": (np.dtype(np.float32), DIM)}
    with database.begin() as connection:
        for after in range(0, items, _PIECE):
            rows = read_rows(connection, _FETCH.format(after=after, to=after + _PIECE), columns)
            order = np.argsort(rows["speaker"], kind="stable")
            names, starts = np.unique(rows["speaker"][order], return_index=True)
            sums[names] += np.add.reduceat(rows["embedding"][order].astype(np.float64), starts, axis=0)
            counts += np.bincount(rows["speaker"], minlength=speakers)
    assert np.isfinite(sums / counts[:, None]).all()


if __name__ == "__main__":
    main()
