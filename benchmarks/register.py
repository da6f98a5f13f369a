"""Registering a manifest, and the second run over it that finds nothing to do.

stretches   a CSV of --items lines (path, speaker, start, duration) that are stretches of real small files, 1,000 a file
files       a CSV of --items lines that each name a file of their own, none of which exists: a look at each is paid for
first run   open the manifest, read it, look at its files, bring the items into the database and an extraction for each
            into the queue: what `embstore extract MANIFEST` does before its workers start, as it does it
second run  the same again, when nothing is new
raw COPY    the server alone: the same rows from a finished text file into a bare table of the same columns and indexes,
            and from there with one INSERT … SELECT into one like the queue's
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import Times, arguments, ratio, seconds, server, show, show_ratio, temporary_folder
from sqlalchemy import Connection, text

from embstore.db.engine import Database
from embstore.extract.run import register_source
from embstore.register import enqueue
from embstore.sources import open_source

MODEL = 1
A_FILE = 1_000
LENGTH = 2.5

_BARE = """
CREATE TABLE bare_item (LIKE embstore.item INCLUDING INDEXES);
CREATE TABLE bare_extraction (LIKE embstore.extraction INCLUDING INDEXES INCLUDING DEFAULTS)
"""
_COPY = "COPY bare_item (dataset_id, item_id, position, path, start, duration, speaker, size, mtime_ns) FROM STDIN"
_QUEUE = """
INSERT INTO bare_extraction (dataset_id, model_id, item_id) SELECT dataset_id, 1, item_id FROM bare_item
"""


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, items=1_000_000, rounds=3).parse_args()
    runs = ("first run", "second run", "raw COPY")
    times: Times = {f"{kind}, {run}": [] for kind in ("stretches", "files") for run in runs}
    with temporary_folder() as folder, server() as settings:
        manifests = {"stretches": write_stretches(folder, options.items), "files": write_files(folder, options.items)}
        database = Database(settings)
        with database.begin() as connection:
            connection.execute(text(_BARE))
        for _ in range(options.rounds):
            for kind, manifest in manifests.items():
                times[f"{kind}, first run"].append(seconds(partial(run_once, database, manifest, options.items)))
                times[f"{kind}, second run"].append(seconds(partial(run_once, database, manifest, 0)))
                times[f"{kind}, raw COPY"].append(raw_copy(database))
                with database.begin() as connection:
                    connection.execute(text("TRUNCATE embstore.item, embstore.extraction, bare_item, bare_extraction"))
        database.close()
    print(f"{options.items:,} lines, {options.rounds} rounds in turns")
    show(times, options.items)
    for kind in manifests:
        speed = options.items / median(times[f"{kind}, first run"])
        print(f"{kind}: {speed:,.0f} a second   (target: 50,000)")
        show_ratio(
            f"{kind}: first run / raw COPY", ratio(times, f"{kind}, first run", f"{kind}, raw COPY"), "3 or less"
        )


def write_stretches(folder: Path, items: int) -> Path:
    """A manifest whose lines are stretches of files that are there."""
    files = -(-items // A_FILE)
    for number in range(files):
        (folder / f"recording-{number:05}.wav").write_bytes(b"RIFF")
    lines = (
        f"recording-{n // A_FILE:05}.wav,speaker-{n // 500},{n % A_FILE * LENGTH},{LENGTH}\n" for n in range(items)
    )
    return _write(folder / "stretches.csv", "path,speaker,start,duration\n", "".join(lines))


def write_files(folder: Path, items: int) -> Path:
    """A manifest whose lines are files that are not there."""
    lines = (f"corpus/speaker-{n // 500:05}/utterance-{n:08}.flac,speaker-{n // 500:05}\n" for n in range(items))
    return _write(folder / "files.csv", "path,speaker\n", "".join(lines))


def _write(path: Path, header: str, lines: str) -> Path:
    path.write_text(header + lines)
    return path


def run_once(database: Database, manifest: Path, expected: int) -> None:
    """Register a manifest and queue what is new; makes sure that `expected` items were."""
    source = open_source(manifest, extensions=frozenset({".wav"}))
    dataset, registered = register_source(database, source, name=manifest.stem, media="audio")
    with database.begin() as connection:
        queued = enqueue(connection, dataset.dataset_id, MODEL)
    assert (registered.new, queued) == (expected, expected), (registered, queued)


def raw_copy(database: Database) -> float:
    """Copy the rows that were registered into bare tables; returns the seconds."""
    rows = io.StringIO()
    with database.begin() as connection:
        with _cursor(connection) as cursor:
            cursor.copy_expert(_COPY.replace("bare_item", "embstore.item").replace("FROM STDIN", "TO STDOUT"), rows)
        rows.seek(0)

    def copy() -> None:
        with database.begin() as connection:
            with _cursor(connection) as cursor:
                cursor.copy_expert(_COPY, rows, size=1 << 18)
            connection.execute(text(_QUEUE))

    return seconds(copy)


def _cursor(connection: Connection) -> Any:
    driver = connection.connection.driver_connection
    assert driver is not None
    return driver.cursor()


if __name__ == "__main__":
    main()
