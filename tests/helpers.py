"""What several test files need: the facts of models that are never loaded, small datasets, short queries."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from embstore import catalog, vectors
from embstore.db import embedded
from embstore.db.engine import Database
from embstore.db.home import Home, is_free
from embstore.models.base import Media, Model
from embstore.queue import Queue, take_lease
from embstore.register import Registered, enqueue, register
from embstore.sources import Entry

T = TypeVar("T")
_ports = itertools.count(os.getpid())


@dataclass(frozen=True)
class Facts:
    """A model that the database knows and nobody loads."""

    name: str = "small"
    dim: int = 3
    weights: str = "0123456789abcdef"
    media: Media = "audio"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> str:
        return self.weights

    def load(self, device: str) -> Model:
        raise NotImplementedError


SMALL = Facts()

ITEMS = """
SELECT i.path, i.start, i.position, i.speaker, i.duration, i.size, i.mtime_ns, i.vanished_at IS NOT NULL, x.status,
    e.embedding IS NOT NULL
FROM embstore.item i LEFT JOIN embstore.extraction x USING (dataset_id, item_id)
LEFT JOIN embstore.embedding e USING (dataset_id, model_id, item_id)
ORDER BY i.position, i.item_id
"""


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that other accounts may enter, such as the server's when we are root; pytest's own is closed to them."""
    folder = Path(tempfile.mkdtemp(prefix="embstore-tests-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def own_home() -> Iterator[Path]:
    """A home for an embedded server that nobody else uses; in the end the server is stopped, and all of it removed."""
    with open_folder() as folder:
        home = folder / "home"
        try:
            yield home
        finally:
            embedded.stop(home, force=True)
            place = Home.at(home)
            while not is_free(place, place.keeper_lock):
                time.sleep(0.05)


def entry(path: str, speaker: str | None = None, **facts: Any) -> Entry:
    """An item as a source names it; `facts` are start, duration, size and mtime_ns."""
    return Entry(path, speaker, **{"start": None, "duration": None, "size": 1000, "mtime_ns": 1} | facts)


def extraction(dataset_id: int, model_id: int) -> Queue:
    """The queue of a dataset and a model."""
    return Queue("embstore.extraction", "item_id", {"dataset_id": dataset_id, "model_id": model_id})


def fill(
    connection: Connection, items: int | Sequence[Entry], *, dataset: str = "calls", model: Facts = SMALL
) -> Queue:
    """A dataset of so many items (`0000.wav`, …) or of these, each pending for the model; returns the queue."""
    entries = [entry(f"{i:04}.wav") for i in range(items)] if isinstance(items, int) else items
    dataset_id = catalog.ensure_dataset(connection, dataset, "audio", f"/data/{dataset}").dataset_id
    register(connection, dataset_id, entries)
    model_id = catalog.ensure_model(connection, model)
    enqueue(connection, dataset_id, model_id)
    return extraction(dataset_id, model_id)


def scan(database: Database, entries: Iterable[Entry], *, dry_run: bool = False) -> Registered:
    """Register these entries as the dataset `calls`."""
    with database.begin() as connection:
        dataset = catalog.ensure_dataset(connection, "calls", "audio", "/data/calls")
        return register(connection, dataset.dataset_id, entries, dry_run=dry_run)


def finish_all(database: Database, queue: Queue) -> None:
    """Give every pending item a vector."""
    with database.begin() as connection:
        token = take_lease(connection)
        keys = queue.claim(connection, token, 1000)
        vectors.write(connection, queue, token, keys, vectors_of(len(keys)))


def vectors_of(count: int, dim: int = 3, seed: int = 0) -> NDArray[np.float32]:
    """Random vectors, float32 [count, dim]."""
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def ask(database: Database, sql: str, **values: Any) -> list[tuple[Any, ...]]:
    """The rows of a query, in a transaction of its own."""
    with database.begin() as connection:
        return [tuple(row) for row in connection.execute(text(sql), values)]


def free_port() -> int:
    """A port of the loopback that nothing listens on, and that neither another test nor a connection is given."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:  # below those that the kernel gives away by itself
        port = 20_000 + (worker * 500) % 12_000 + next(_ports) % 500
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


def at_once(*works: Callable[[], T]) -> list[T]:
    """Run functions in threads of their own, all at the same time; their results in order."""
    with ThreadPoolExecutor(len(works)) as threads:
        return [future.result() for future in [threads.submit(work) for work in works]]


# Not of autovacuum, which comes and goes as it likes.
_BLOCKED = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND wait_event_type = 'Lock' AND backend_type = 'client backend'
"""


def wait_until_blocked(database: Database) -> None:
    """Come back when some session of this database waits for a lock of another one."""
    while ask(database, _BLOCKED) == [(0,)]:
        time.sleep(0.01)
