"""Boundary detection on datasets: a run is a row of a queue; a worker reads vectors in order and writes what it finds.

All of a run's rows are written in the transaction that marks it done: a killed run has left nothing, and starts over.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from embstore import faults, vectors
from embstore.ahead import ahead
from embstore.boundaries.result import Result, Window
from embstore.boundaries.stream import BLOCK
from embstore.catalog import Dataset, StoredModel
from embstore.claims import Claimant
from embstore.db.copy import copy_rows
from embstore.db.engine import Database
from embstore.progress import Display, Tally
from embstore.queue import Queue, Refusal
from embstore.settings import Settings
from embstore.supervise import PARENT_CONNECTIONS, Committed, Leased, Outcome, Run, Share, check_connections
from embstore.workers import Channel, count_cores

Method = Literal["auto", "cosine", "gmm"]

CONNECTIONS = 2
"""A worker's: one reads, in one long transaction; the other renews the lease."""
_IDLE = 0.3
"""Seconds between looks at what other workers still have."""

# Two commands that start at once with the same parameters work on one run, not on one each.
_LOCK = "SELECT FROM embstore.dataset WHERE dataset_id = :dataset_id FOR NO KEY UPDATE"
_UNFINISHED = """
SELECT boundary_run_id FROM embstore.boundary_run
WHERE dataset_id = :dataset_id AND model_id = :model_id AND method = :method
    AND parameters = CAST(:parameters AS jsonb) AND status IN ('pending', 'running')
"""
_CREATE = """
INSERT INTO embstore.boundary_run (dataset_id, model_id, method, parameters)
VALUES (:dataset_id, :model_id, :method, CAST(:parameters AS jsonb)) RETURNING boundary_run_id
"""
_READ = """
SELECT r.method, r.parameters, m.dim,
    (SELECT count(*) FROM embstore.item i WHERE i.dataset_id = r.dataset_id) AS items,
    (SELECT count(*) FROM embstore.embedding e
     WHERE e.dataset_id = r.dataset_id AND e.model_id = r.model_id) AS embedded
FROM embstore.boundary_run r JOIN embstore.model m USING (model_id)
WHERE r.dataset_id = :dataset_id AND r.model_id = :model_id AND r.boundary_run_id = :run
"""
_NOTE = """
UPDATE embstore.boundary_run SET found = CAST(:found AS jsonb), items = :items, embedded = :embedded
WHERE dataset_id = :dataset_id AND model_id = :model_id AND boundary_run_id = :run
"""


@dataclass(frozen=True)
class Options:
    """What to look for, and how."""

    method: Method = "auto"
    segment_size: int = 1000
    boundary_window: int = 10
    gmm_components: int = 2
    num_speakers: int | None = None
    penalty: float | None = None
    debug: bool = False

    def parameters(self) -> dict[str, Any]:
        """Those that this method looks at."""
        names = {
            "auto": ("num_speakers", "penalty"),
            "cosine": ("segment_size", "boundary_window"),
            "gmm": ("segment_size", "boundary_window", "gmm_components"),
        }[self.method]
        return {name: value for name, value in asdict(self).items() if name in (*names, "debug")}


@dataclass(frozen=True)
class Job:
    """All that a worker process is told."""

    settings: Settings
    model_id: int
    dataset_ids: tuple[int, ...]


def boundary_queue(dataset_id: int, model_id: int) -> Queue:
    """The queue of one dataset's boundary runs for one model."""
    return Queue("embstore.boundary_run", "boundary_run_id", {"dataset_id": dataset_id, "model_id": model_id})


def count_workers(settings: Settings, datasets: int) -> int:
    """How many workers to start for so many datasets. Raises UsageError if more connections are needed than allowed."""
    most = (settings.db_max_connections - PARENT_CONNECTIONS) // CONNECTIONS
    number = min(settings.embedding_workers or min(count_cores(), most), datasets)
    check_connections(settings, number, CONNECTIONS)
    return number


def detect(
    database: Database,
    settings: Settings,
    datasets: Sequence[Dataset],
    model: StoredModel,
    options: Options,
    workers: int,
    *,
    show: Callable[[int], Display],
) -> tuple[Outcome, dict[str, int]]:
    """Detect the boundaries of each dataset: (how it ended, boundary_run_id by dataset name).

    A run that was begun with the same parameters and not finished is finished; otherwise a new one is made.
    """
    with database.begin() as connection:
        runs = {d.name: _begin(connection, d.dataset_id, model.model_id, options) for d in datasets}
    shares = [Share(d, boundary_queue(d.dataset_id, model.model_id)) for d in datasets]
    job = Job(settings, model.model_id, tuple(d.dataset_id for d in datasets))
    parameters = {"method": options.method, **options.parameters()}
    run = Run(database, "boundaries", model.model_id, shares, parameters, each=CONNECTIONS)
    return run.go(work, lambda _runs: [job] * workers, show=show, environ={}), runs


def _begin(connection: Connection, dataset_id: int, model_id: int, options: Options) -> int:
    values = {
        "dataset_id": dataset_id,
        "model_id": model_id,
        "method": options.method,
        "parameters": json.dumps(options.parameters()),
    }
    connection.execute(text(_LOCK), {"dataset_id": dataset_id})
    found = connection.execute(text(_UNFINISHED), values).scalar()
    return int(found if found is not None else connection.execute(text(_CREATE), values).scalar_one())


def work(channel: Channel, job: Job) -> None:
    """Body of a worker process: until no run of the job is pending, or until told to stop."""
    database = Database(job.settings, pool_size=CONNECTIONS)
    try:
        _Worker(channel, job, database).run()
    finally:
        database.close()


class _Stopped(Exception):
    """The worker was told to stop in the middle of a run."""


class _Worker:
    def __init__(self, channel: Channel, job: Job, database: Database) -> None:
        self._channel = channel
        self._model_id = job.model_id
        self._database = database
        self._queues = [boundary_queue(dataset_id, job.model_id) for dataset_id in job.dataset_ids]
        self._claimant = Claimant(database)
        channel.send(Leased(self._claimant.token))

    def run(self) -> None:
        self._claimant.keep()
        open_queues = self._queues
        while open_queues and not self._channel.stopping.is_set():
            worked = [self._work_on(queue) for queue in open_queues]
            open_queues = [queue for queue in open_queues if self._database.patiently(queue.is_open)]
            if open_queues and not any(worked):
                self._channel.stopping.wait(_IDLE)
        self._claimant.leave()

    def _work_on(self, queue: Queue) -> bool:
        """Work on one run of the queue; False if there was none to claim."""
        self._claimant.start()
        claim = self._claimant.claim(queue, 1, idle=True)
        if claim.quarantined:
            self._report(queue, Tally(failed=Counter(worker_died=claim.quarantined)))
        if not claim.keys:
            return False
        try:
            self._detect(queue, claim.keys[0])
        except _Stopped:
            self._database.patiently(lambda c: queue.release(c, self._claimant.token))
        except ValueError as error:
            refusal = Refusal(claim.keys[0], "failed", "not_detected", str(error)[:500])
            self._database.patiently(lambda c: queue.refuse(c, self._claimant.token, [refusal]))
            self._report(queue, Tally(failed=Counter(not_detected=1)))
        else:
            self._report(queue, Tally(done=1))
        return True

    def _detect(self, queue: Queue, run: int) -> None:
        values = {**queue.scope, "run": run}
        with self._database.reading() as connection:
            row = connection.execute(text(_READ), values).one()
            order = hashlib.sha256()
            with ahead(self._windows(connection, queue, row.dim, order)) as windows:
                result = find(row.method, row.parameters, windows, row.embedded)
        found = {
            "parameters": result.parameters,
            "expected": result.expected,
            "notes": result.notes,
            "trace": result.trace,
            "order": order.hexdigest(),
        }
        notes = {**values, "found": json.dumps(found), "items": row.items, "embedded": row.embedded}
        self._database.patiently(lambda c: self._write(c, queue, run, result, notes))

    def _windows(self, connection: Connection, queue: Queue, dim: int, order: Any) -> Generator[Window]:
        scope, size = queue.scope, vectors.page_size(dim)
        size = size - size % BLOCK or size  # whole blocks, where one fits, need no joining
        for page in vectors.ordered(connection, scope["dataset_id"], scope["model_id"], dim, size=size):
            if self._channel.stopping.is_set():
                raise _Stopped
            order.update(page.item_ids.tobytes())
            yield page.positions, page.vectors

    def _write(self, connection: Connection, queue: Queue, run: int, result: Result, notes: Mapping[str, Any]) -> None:
        if not queue.finish(connection, self._claimant.token, [run]):
            return
        connection.execute(text(_NOTE), notes)
        dataset_id = queue.scope["dataset_id"]
        positions = np.array([b.position for b in result.boundaries], dtype=np.int64)
        columns: dict[str, dict[str, NDArray[Any]]] = {
            "boundary": {
                "position": positions,
                "score": np.array([b.score for b in result.boundaries], dtype=np.float32),
                "confidence": np.array([b.confidence for b in result.boundaries], dtype=np.float32),
            },
            "segment": segments(positions, int(notes["items"])),
            "boundary_score": {"position": result.positions, "score": result.scores},
        }
        for table, values in columns.items():
            count = len(next(iter(values.values())))
            keys = {
                "dataset_id": np.full(count, dataset_id, dtype=np.int32),
                "boundary_run_id": np.full(count, run, dtype=np.int32),
            }
            if count:
                copy_rows(connection, f"embstore.{table}", {**keys, **values})
        faults.reach("boundary_write")

    def _report(self, queue: Queue, tally: Tally) -> None:
        self._channel.send(Committed(queue.scope["dataset_id"], tally))


def find(method: Method, parameters: Mapping[str, Any], windows: Iterator[Window], total: int) -> Result:
    """Run one method; each is imported only where it is used, as scikit-learn takes a second."""
    trace = bool(parameters.get("debug"))
    if method == "auto":
        from embstore.boundaries import changepoint

        chosen = {} if parameters["penalty"] is None else {"beta": parameters["penalty"]}
        return changepoint.detect(windows, total, num_speakers=parameters["num_speakers"], trace=trace, **chosen)
    sizes = {"segment_size": parameters["segment_size"], "boundary_window": parameters["boundary_window"]}
    if method == "cosine":
        from embstore.boundaries import similarity

        return similarity.detect(windows, total, **sizes, trace=trace)
    from embstore.boundaries import mixture

    return mixture.detect(windows, total, **sizes, components=parameters["gmm_components"], trace=trace)


def segments(boundaries: NDArray[np.int64], items: int) -> dict[str, NDArray[Any]]:
    """What lies between the boundaries, over all positions: items without a vector belong to what is around them."""
    first = np.concatenate([np.zeros(min(items, 1), dtype=np.int64), boundaries])
    number = np.arange(1, len(first) + 1, dtype=np.int32)
    last = np.concatenate([first[1:] - 1, np.full(min(items, 1), items - 1, dtype=np.int64)])
    return {"segment": number, "first_position": first, "last_position": last, "voice": number}
