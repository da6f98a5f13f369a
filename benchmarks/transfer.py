"""Vectors out of the database and into it, against bare COPY BINARY of as many bytes.

bare read        COPY (item_id, embedding) of the model's partition TO STDOUT (FORMAT BINARY), as it lies on disk, into
                 memory; no value is looked at
thrown away      the same, but the bytes are not kept: what the server takes to send them
ordered read     all vectors of the dataset by position into one array of numpy's (`store.vectors` of the Python API)
npz, parquet     `embstore export embeddings`, until the file has its name
bare write       COPY (FORMAT BINARY) from the same arrays, in pieces of 1,000 rows and one transaction, into a bare
                 table of the columns dataset_id, model_id, item_id, embedding with the same primary key, and no checks
import           `embstore import embeddings` of an .npz of them into a new dataset: the file is read twice and checked;
                 items with their four indexes, vectors and their `done` are written, a transaction for each 20,000
import, parquet  the same of a Parquet file

Files are in the system's memory when they are read; the server has fsync on. `--keep FOLDER` keeps the database: then
`--part read` and `--part write` can be run one after the other.
"""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psycopg2
from common import arguments, in_turns, memory_watched, ratio, seconds, server, show, show_ratio, temporary_folder
from numpy.typing import NDArray
from sqlalchemy import text

import embstore
from embstore import catalog
from embstore.db.copy import PIECE, encode
from embstore.db.engine import Database
from embstore.db.home import DATABASE, PORT, ROLE, Home
from embstore.settings import Settings
from embstore.transfer import export, load
from embstore.transfer.opened import open_table
from embstore.transfer.origin import Wanted
from embstore.transfer.table import Format
from embstore.vectors import Vectors

DIM = 256
ROWS = 1_000
SPEAKER = 200
NAME, MODEL = "bench", "bench"

_BARE = """
CREATE TABLE IF NOT EXISTS bare (dataset_id integer, model_id smallint, item_id bigint, embedding vector NOT NULL,
    PRIMARY KEY (dataset_id, model_id, item_id));
ALTER TABLE bare ALTER COLUMN embedding SET STORAGE PLAIN
"""
_FILLED = "SELECT count(*) FROM embstore.item i JOIN embstore.dataset d USING (dataset_id) WHERE d.name = 'bench'"
_DELETE = "DELETE FROM embstore.dataset WHERE name <> :name"
_COPY = "COPY bare (dataset_id, model_id, item_id, embedding) FROM STDIN (FORMAT BINARY)"


class _Nowhere:
    """A file that counts what is written into it."""

    def __init__(self) -> None:
        self._size = 0

    def write(self, piece: bytes) -> int:
        self._size += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._size


class Bench:
    """The tasks; each returns its seconds."""

    def __init__(self, database: Database, settings: Settings, folder: Path, items: int) -> None:
        self._database = database
        self._folder = folder
        self._items = items
        self._store = embstore.connect(settings)
        self._raw: Any = psycopg2.connect(
            host=str(Home.at(settings.home).socket), port=PORT, user=ROLE, dbname=DATABASE
        )

    def fill(self) -> None:
        """Bring the vectors in, unless a run before this one has."""
        with self._database.begin() as connection:
            is_filled = connection.execute(text(_FILLED)).scalar_one() == self._items
        if is_filled:
            self._clear()
            return
        path = self._folder / "foreign.npz"
        names = np.array([f"speaker-{i // SPEAKER:05}/{i:08}.wav" for i in range(self._items)])
        speakers = np.array([f"speaker-{i // SPEAKER:05}" for i in range(self._items)])
        np.savez(path, embedding=_matrix(self._items), path=names, speaker=speakers)
        self._import(path, NAME, MODEL)
        with self._database.autocommit() as connection:
            connection.execute(text("VACUUM ANALYZE"))

    def bare_read(self, kept: bool) -> float:
        """Seconds of a COPY that nobody looks at."""
        sink = io.BytesIO() if kept else _Nowhere()
        with self._raw.cursor() as cursor:
            copy = "COPY embstore.embedding_1 (item_id, embedding) TO STDOUT (FORMAT BINARY)"
            taken = seconds(lambda: cursor.copy_expert(copy, sink, size=PIECE))
        self._raw.commit()
        assert sink.tell() > self._items * DIM * 4
        return taken

    def ordered_read(self) -> float:
        """Seconds to read all vectors into one array; as with the bare read, not those to give its memory back."""
        kept: list[Vectors] = []
        return seconds(lambda: kept.append(self._store.vectors(NAME, MODEL)))

    def export(self, form: Format) -> float:
        """Seconds of an export."""
        with self._database.begin() as connection:
            dataset, model = catalog.get_dataset(connection, NAME), catalog.get_model(connection, MODEL)
            return seconds(
                lambda: export.export_embeddings(connection, self._folder / "out", form, model, dataset, force=True)
            )

    def bare_write(self) -> float:
        """Seconds of a COPY into a table without anything."""
        self._clear()
        matrix = _matrix(self._items)
        taken = seconds(lambda: self._write(matrix))
        with self._database.autocommit() as connection:
            connection.execute(text("TRUNCATE bare"))
            connection.execute(text("CHECKPOINT"))
        return taken

    def _write(self, matrix: NDArray[np.float32]) -> None:
        for at in range(0, len(matrix), ROWS):
            part = matrix[at : at + ROWS]
            keys: dict[str, NDArray[np.integer]] = {
                "dataset_id": np.full(len(part), 1, dtype=np.int32),
                "model_id": np.full(len(part), 1, dtype=np.int16),
                "item_id": np.arange(at, at + len(part)),
            }
            with self._raw.cursor() as cursor:
                cursor.copy_expert(_COPY, encode({**keys, "embedding": part}), size=PIECE)
        self._raw.commit()

    def bring_in(self, form: Format) -> float:
        """Seconds of an import into a new dataset."""
        path = self._folder / "out" / f"embeddings.{form}"
        if not path.exists():
            self.export(form)
        taken = seconds(lambda: self._import(path, f"{NAME} {form}", None))
        with self._database.autocommit() as connection:
            connection.execute(text("CHECKPOINT"))
        return taken

    def _clear(self) -> None:
        """Remove what earlier turns have imported."""
        with self._database.autocommit() as connection:
            if connection.execute(text(_DELETE), {"name": NAME}).rowcount:
                connection.execute(text("VACUUM embstore.embedding, embstore.item, embstore.extraction"))

    def _import(self, path: Path, dataset: str, model: str | None) -> None:
        wanted = Wanted(dataset, model, Path("/data/bench"))
        done = load.import_embeddings(self._database, open_table(path), wanted, load.Options())
        assert done.counts.all == self._items, done

    def close(self) -> None:
        """Close the connections."""
        self._raw.close()
        self._store.close()


def _matrix(items: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((items, DIM), dtype=np.float32)


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, items=1_000_000, rounds=3)
    parser.add_argument("--part", choices=("fill", "read", "write", "all"), default="all", help="(default: all)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep database and files here")
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    with temporary_folder() as folder, server(options.keep) as settings:
        database = Database(settings)
        with database.begin() as connection:
            connection.execute(text(_BARE))
        bench = Bench(database, settings, options.keep or folder, options.items)
        print(f"{options.items:,} vectors of {DIM} dimensions")
        print(f"filled in {seconds(bench.fill):.0f} s", flush=True)
        with memory_watched(settings) as largest:
            if options.part in ("read", "all"):
                _measure_reads(bench, options)
            if options.part in ("write", "all"):
                _measure_writes(bench, options)
        print(", ".join(f"{kind} {size >> 20} MiB at most" for kind, size in sorted(largest.items())))
        bench.close()
        database.close()


def _measure_reads(bench: Bench, options: Namespace) -> None:
    tasks: dict[str, Callable[[], float]] = {
        "bare read": partial(bench.bare_read, True),
        "thrown away": partial(bench.bare_read, False),
        "ordered read": bench.ordered_read,
        "npz": partial(bench.export, "npz"),
        "parquet": partial(bench.export, "parquet"),
    }
    times = in_turns(options.rounds, tasks)
    show(times, options.items)
    show_ratio("ordered read / bare COPY BINARY", ratio(times, "ordered read", "bare read"), "1.1 or less")
    show_ratio("the same / bare COPY BINARY thrown away", ratio(times, "ordered read", "thrown away"), "none")
    show_ratio("export as npz / bare COPY BINARY", ratio(times, "npz", "bare read"), "none")
    show_ratio("export as Parquet / bare COPY BINARY", ratio(times, "parquet", "bare read"), "none")


def _measure_writes(bench: Bench, options: Namespace) -> None:
    tasks: dict[str, Callable[[], float]] = {
        "bare write": bench.bare_write,
        "import": partial(bench.bring_in, "npz"),
        "import, parquet": partial(bench.bring_in, "parquet"),
    }
    times = in_turns(options.rounds, tasks)
    show(times, options.items)
    for name in ("import", "import, parquet"):
        show_ratio(f"{name}: speed / bare COPY BINARY's", ratio(times, "bare write", name), "0.5 or more")


if __name__ == "__main__":
    main()
