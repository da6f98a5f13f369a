"""What a worker process does: claim, decode, embed, write, all at once in threads with bounded queues between.

    ledger thread      decoding threads            this thread                 ledger thread
    claims rows  --->  model.prepare (files)  ---> model.embed (batches)  ---> vectors and `done`

The only module where models and the database meet.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embstore import faults
from embstore.catalog import ItemRow
from embstore.db.engine import PATIENCE, Database
from embstore.errors import DatabaseError, ItemError, ItemFailed
from embstore.extract.batching import Outcome, Ready, Waiting, embed_each, embeddable
from embstore.extract.ledger import Ledger
from embstore.extract.tuning import UNTUNED, Tuning
from embstore.extract.watchdog import STUCK_SECONDS, Watchdog, decoding_seconds
from embstore.models.base import Model, Prepared, Recipe
from embstore.progress import Tally
from embstore.queue import Queue
from embstore.settings import Settings
from embstore.supervise import Committed, Leased
from embstore.waits import Cause, Stopwatch
from embstore.workers import Channel

_DOUBT_SECONDS = float(os.environ.get("EMBSTORE_TEST_DOUBT_SECONDS", 1))
"""How long a model that has failed from the start is given other items to prove itself on."""


@dataclass(frozen=True)
class Task:
    """One dataset to work on."""

    dataset_id: int
    root: str


@dataclass(frozen=True)
class Job:
    """All that a worker process is told."""

    settings: Settings
    recipe: Recipe
    model_id: int
    tasks: tuple[Task, ...]
    device: str
    decoders: int
    tuning: Tuning = UNTUNED
    patience: float = PATIENCE
    stuck_seconds: float = STUCK_SECONDS


def extraction_queue(dataset_id: int, model_id: int) -> Queue:
    """The queue of one dataset's items for one model."""
    return Queue("embstore.extraction", "item_id", {"dataset_id": dataset_id, "model_id": model_id})


def work(channel: Channel, job: Job) -> None:
    """Body of a worker process: until no item of the job is pending, or until told to stop."""
    model = job.recipe.load(job.device)
    database = Database(job.settings, pool_size=1, patience=job.patience)
    try:
        _Pipeline(channel, job, model, database).run()
    finally:
        database.close()


class _Pipeline:
    def __init__(self, channel: Channel, job: Job, model: Model, database: Database) -> None:
        self._stopping = channel.stopping
        self._job = job
        self._model = model
        self._database = database
        self._waiting = Waiting(job.tuning.buffer << 20)
        model.max_cost = job.tuning.batch or model.max_cost
        self._stopwatch = Stopwatch(self._blame)
        self._watchdog = Watchdog(job.stuck_seconds)
        self._channel = channel
        self._claimed: queue.SimpleQueue[tuple[Path, ItemRow]] = queue.SimpleQueue()
        self._root = Path()
        self._device_done = threading.Event()
        self._books_closed = threading.Event()
        self._error: BaseException | None = None
        self._ledger = Ledger(database, self._submit, self._report, self._stopping, job.tuning)
        channel.send(Leased(self._ledger.claimant.token))

    def run(self) -> None:
        """Start the threads, and feed the device with what they bring."""
        for number in range(self._job.decoders):
            threading.Thread(target=self._decode, name=f"decoder-{number}", daemon=True).start()
        books = threading.Thread(target=self._keep_books, name="ledger", daemon=True)
        books.start()
        try:
            self._feed_device()
        finally:
            if not self._books_closed.is_set():
                self._stopping.set()
            self._device_done.set()
            self._waiting.close()
            books.join()
            self._stopwatch.charge("database")
            self._channel.send(self._stopwatch.lap())
        if self._error is not None:
            raise self._error

    def _feed_device(self) -> None:
        proof: Prepared | None = None
        doubtful: list[Ready] = []
        while not self._over():
            patience = _DOUBT_SECONDS if doubtful else math.inf
            fresh = self._waiting.take(self._model.max_cost, self._over, patience, self._stopwatch.waiting)
            batch = doubtful + fresh
            if not batch or self._over():
                return
            with self._watchdog.limit(sum(ready.prepared.seconds for ready in batch)):
                faults.reach("model")
                outcomes = list(embed_each(self._model, batch, self._job.recipe.dim, proof))
            self._stopwatch.charge("device")
            proof = embeddable(batch, outcomes) or proof
            # As long as the model has embedded nothing at all, a failure is not yet an item's fault.
            doubtful = batch if proof is None and fresh else []
            if not doubtful:
                for outcome in outcomes:
                    self._ledger.put(outcome)

    def _over(self) -> bool:
        return self._stopping.is_set() or self._books_closed.is_set()

    def _blame(self) -> Cause:
        """What the device waits for, if it begins to wait now."""
        if self._waiting.expected:
            return "decoding"
        return "idle" if self._ledger.idling else "database"

    def _report(self, dataset_id: int, tally: Tally) -> None:
        self._channel.send(Committed(dataset_id, tally))
        self._channel.send(self._stopwatch.lap())

    def _submit(self, rows: Sequence[ItemRow]) -> None:
        self._waiting.expect(len(rows))
        for row in rows:
            self._claimed.put((self._root, row))

    def _decode(self) -> None:
        while True:
            root, row = self._claimed.get()
            if not self._waiting.wait_for_room() or self._stopping.is_set():
                continue
            path = root / row.path
            try:
                with self._watchdog.limit(decoding_seconds(path)):
                    faults.reach("decode")
                    prepared = self._model.prepare(path, row.start, row.duration)
            except ItemError as error:
                self._waiting.miss()
                self._ledger.put(Outcome(row.item_id, 0.0, error))
            # A decoder's surprise concerns this file alone. Not only an Exception: a panic in a library written in
            # Rust is none, and would end this thread; nobody would hear of the file again.
            except BaseException as error:  # noqa: BLE001
                words = f"{type(error).__name__}: {error}".splitlines()[0]
                self._waiting.miss()
                self._ledger.put(Outcome(row.item_id, 0.0, ItemFailed("decode_error", words)))
            else:
                self._waiting.put(Ready(row.item_id, prepared))

    def _keep_books(self) -> None:
        queues = [(extraction_queue(task.dataset_id, self._job.model_id), task) for task in self._job.tasks]
        try:
            while not self._stopping.is_set() and queues:
                for work, task in queues:
                    self._root = Path(task.root)
                    self._serve(work)
                queues = [pair for pair in queues if self._database.patiently(pair[0].is_open)]
                if queues:
                    # What is left is running at other workers. They finish it, or their leases run out.
                    self._ledger.idle()
            self._ledger.claimant.leave()
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            self._error = error
            self._give_back()
        finally:
            self._books_closed.set()

    def _give_back(self) -> None:
        """Release what is claimed, if the database lets us: no item is to blame for what ends this worker."""
        token = self._ledger.claimant.token
        with contextlib.suppress(DatabaseError), self._database.begin() as connection:
            for task in self._job.tasks:
                extraction_queue(task.dataset_id, self._job.model_id).release(connection, token)

    def _serve(self, work: Queue) -> None:
        self._ledger.serve(work)
        if self._stopping.is_set():
            while not self._device_done.wait(1.0):
                self._ledger.claimant.renew()
            self._ledger.close(work)
