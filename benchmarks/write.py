"""Vectors plus status in one transaction, against raw COPY BINARY of the same rows.

embstore    `embstore.vectors.write`, one transaction a batch of 256: the claimed rows of the queue become done, fenced
            by their token, a trigger notes the speakers whose utterances they are (200 a speaker), and the vectors go
            by COPY into the model's partition, with its key and checks
raw 256     nothing but psycopg2: COPY (FORMAT BINARY) from the same arrays, one transaction a batch of 256, into a bare
            table of the same four columns (dataset_id, model_id, item_id, embedding) with the same primary key, and no
            checks
raw 1024    the same with one transaction a batch of 1024
raw whole   the same with all rows in one COPY

All of them pay for turning numpy's arrays into COPY's bytes, and for fsync at each commit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import psycopg2
from common import arguments, in_turns, ratio, seconds, server, show, show_ratio
from numpy.typing import NDArray
from sqlalchemy import text

from embstore import vectors
from embstore.db.copy import PIECE, encode
from embstore.db.engine import Database
from embstore.db.home import DATABASE, PORT, ROLE, Home
from embstore.queue import Queue, take_lease
from embstore.settings import Settings

BATCH = 256
DIM = 256

_MODEL = """
INSERT INTO embstore.model (name, media, dim, fingerprint, settings) VALUES ('bench', 'audio', :dim, '', '{}')
RETURNING model_id
"""
_ITEMS = """
INSERT INTO embstore.item (dataset_id, position, path, speaker)
SELECT 1, n, 'speaker/' || n || '.wav', 'speaker-' || n / 200 FROM generate_series(0, :items - 1) n
"""
_PENDING = """
INSERT INTO embstore.extraction (dataset_id, model_id, item_id) SELECT dataset_id, :model_id, item_id FROM embstore.item
"""
_BARE = """
CREATE TABLE bare (dataset_id integer, model_id smallint, item_id bigint, embedding vector NOT NULL,
    PRIMARY KEY (dataset_id, model_id, item_id));
ALTER TABLE bare ALTER COLUMN embedding SET STORAGE PLAIN
"""
_COPY = "COPY bare (dataset_id, model_id, item_id, embedding) FROM STDIN (FORMAT BINARY)"


class _Embstore:
    """Claims rows, untimed, and writes them."""

    def __init__(self, database: Database, model_id: int, rows: NDArray[np.float32]) -> None:
        self._database = database
        self._queue = Queue("embstore.extraction", "item_id", {"dataset_id": 1, "model_id": model_id})
        self._rows = rows
        self._after = 0
        with database.begin() as connection:
            self._token = take_lease(connection)

    def __call__(self) -> float:
        with self._database.begin() as connection:
            keys = self._queue.claim(connection, self._token, len(self._rows), self._after)
        self._after = keys[-1]
        return seconds(lambda: self._write(keys))

    def _write(self, keys: list[int]) -> None:
        for at in range(0, len(keys), BATCH):
            with self._database.begin() as connection:
                batch = slice(at, at + BATCH)
                vectors.write(connection, self._queue, self._token, keys[batch], self._rows[batch])


class _Raw:
    """Copies rows into the bare table, with keys that no other has used."""

    last_key = 0

    def __init__(self, settings: Settings, batch: int, rows: NDArray[np.float32]) -> None:
        self._connection: Any = psycopg2.connect(
            host=str(Home.at(settings.home).socket), port=PORT, user=ROLE, dbname=DATABASE
        )
        self._batch = batch
        self._rows = rows

    def __call__(self) -> float:
        first = _Raw.last_key + 1
        _Raw.last_key += len(self._rows)
        return seconds(lambda: self._write(first))

    def _write(self, first: int) -> None:
        for at in range(0, len(self._rows), self._batch):
            part = self._rows[at : at + self._batch]
            keys: dict[str, NDArray[np.integer]] = {
                "dataset_id": np.full(len(part), 1, dtype=np.int32),
                "model_id": np.full(len(part), 1, dtype=np.int16),
                "item_id": np.arange(first + at, first + at + len(part)),
            }
            with self._connection.cursor() as cursor:
                cursor.copy_expert(_COPY, encode({**keys, "embedding": part}), size=PIECE)
            self._connection.commit()

    def close(self) -> None:
        self._connection.close()


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, items=5_120, rounds=40).parse_args()
    rows = np.random.default_rng(0).normal(size=(options.items, DIM)).astype(np.float32)
    with server() as settings:
        database = Database(settings)
        with database.begin() as connection:
            model_id = int(connection.execute(text(_MODEL), {"dim": DIM}).scalar_one())
            vectors.create_partition(connection, model_id, "bench", DIM)
            total = options.items * options.rounds
            connection.execute(text(_ITEMS), {"items": total})
            connection.execute(text(_PENDING), {"model_id": model_id})
            connection.execute(text(_BARE))
        raw = {
            "raw 256": _Raw(settings, BATCH, rows),
            "raw 1024": _Raw(settings, 1024, rows),
            "raw whole": _Raw(settings, len(rows), rows),
        }
        times = in_turns(options.rounds, {"embstore": _Embstore(database, model_id, rows), **raw})
        for one in raw.values():
            one.close()
        database.close()
    print(f"{options.items:,} vectors of {DIM} dimensions a round, {options.rounds} rounds in turns")
    show(times, options.items)
    show_ratio(
        "embstore's speed / raw COPY's, both in batches of 256", ratio(times, "raw 256", "embstore"), "0.5 or more"
    )


if __name__ == "__main__":
    main()
