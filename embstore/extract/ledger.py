"""The one thread of a worker that talks to the database: claims ahead, writes in batches, renews the lease.

    claim --> submit(items) ... decoding, device ... put(outcome) --> vectors and `done`, one transaction
                                                                  --> failed and skipped, another

Nothing is open in the database while items are decoded or embedded.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from sqlalchemy import Connection

from embstore import catalog, vectors
from embstore.catalog import ItemRow
from embstore.db.engine import Database
from embstore.errors import ItemError
from embstore.extract.batching import Outcome
from embstore.progress import Tally
from embstore.queue import LEASE_SECONDS, Queue, Refusal, end_lease, renew_lease, take_lease

BATCH = 256
"""Vectors a transaction: 64 make it half as fast, 1024 no faster."""
FLUSH_SECONDS = 0.5
"""How long a finished item may wait for others before it is written."""
AHEAD_SECONDS = 2.0
"""Work that is claimed ahead: enough to hide a slow claim, little enough that workers finish together."""
MIN_AHEAD, MAX_AHEAD = 16, 4096
_POLL = 0.02
_IDLE = 0.3


class Ledger:
    """Keeps the books of one worker process for one queue at a time."""

    def __init__(
        self,
        database: Database,
        submit: Callable[[Sequence[ItemRow]], None],
        report: Callable[[int, Tally], None],
        stopping: threading.Event,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        """`submit` takes claimed items to the decoders; `report(dataset_id, tally)` is told what was committed."""
        self._database = database
        self._submit = submit
        self._report = report
        self._stopping = stopping
        self._lease_seconds = lease_seconds
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._unwritten: list[Outcome] = []
        self._oldest = 0.0
        self._in_hand = 0
        self._suspects = False
        self._after = 0
        self._not_before = 0.0
        self._rate = 0.0
        self._measured = time.monotonic()
        self._renewed = time.monotonic()
        self.token = database.patiently(lambda c: take_lease(c, lease_seconds))

    def put(self, outcome: Outcome) -> None:
        """Hand in what became of an item; from any thread."""
        self._outcomes.put(outcome)

    def serve(self, work: Queue) -> None:
        """Claim, write and renew until nothing of `work` can be claimed any more and all that was is written.

        When asked to stop: claims no more; returns at once, with finished items written by `close`.
        """
        self._after = 0
        self._not_before = 0.0
        while not self._stopping.is_set():
            self.renew()
            self._collect()
            self._flush(work, now=self._in_hand == len(self._unwritten))
            if not self._claim(work) and self._in_hand == 0:
                return

    def close(self, work: Queue) -> None:
        """Write what is finished, and release the rest."""
        while not self._outcomes.empty():
            self._collect()
        self._flush(work, now=True)
        self._database.patiently(lambda c: work.release(c, self.token))
        self._in_hand = 0

    def leave(self) -> None:
        """End the lease."""
        self._database.patiently(lambda c: end_lease(c, self.token))

    def idle(self) -> None:
        """Keep the lease while there is nothing to do but to wait for others."""
        self.renew()
        self._stopping.wait(_IDLE)

    def renew(self) -> None:
        """Renew the lease, if a quarter of it has passed."""
        if time.monotonic() - self._renewed > self._lease_seconds / 4:
            self._database.patiently(lambda c: renew_lease(c, self.token, self._lease_seconds))
            self._renewed = time.monotonic()

    def _collect(self) -> None:
        """Take finished items over; waits a moment for the first."""
        try:
            self._unwritten.append(self._outcomes.get(timeout=_POLL))
            while len(self._unwritten) < BATCH:
                self._unwritten.append(self._outcomes.get_nowait())
        except queue.Empty:
            pass
        if not self._oldest and self._unwritten:
            self._oldest = time.monotonic()

    def _flush(self, work: Queue, *, now: bool) -> None:
        waited = time.monotonic() - self._oldest
        if not self._unwritten or not (now or len(self._unwritten) >= BATCH or waited > FLUSH_SECONDS):
            return
        outcomes, self._unwritten, self._oldest = self._unwritten, [], 0.0
        done = [o for o in outcomes if not isinstance(o.result, ItemError)]
        if done:
            keys = [o.key for o in done]
            matrix = np.stack([o.result for o in done if not isinstance(o.result, ItemError)])
            self._database.patiently(lambda c: vectors.write(c, work, self.token, keys, matrix))
        refusals = [_refusal(o.key, o.result) for o in outcomes if isinstance(o.result, ItemError)]
        if refusals:
            self._database.patiently(lambda c: work.refuse(c, self.token, refusals))
        self._in_hand -= len(outcomes)
        self._report(work.scope["dataset_id"], _tally(outcomes))
        self._measure(len(outcomes))

    def _measure(self, count: int) -> None:
        """Items a second, smoothed: how much to claim ahead follows from it."""
        now = time.monotonic()
        rate = count / max(now - self._measured, 1e-3)
        self._measured = now
        self._rate = rate if not self._rate else 0.7 * self._rate + 0.3 * rate

    def _claim(self, work: Queue) -> bool:
        """Claim more if it is time to; False if there was nothing to claim."""
        ahead = int(min(max(self._rate * AHEAD_SECONDS, MIN_AHEAD), MAX_AHEAD))
        if (self._suspects and self._in_hand) or self._in_hand > ahead // 2 or time.monotonic() < self._not_before:
            return True
        rows = self._database.patiently(lambda c: self._next(c, work, ahead - self._in_hand))
        self._suspects = False
        if not rows and not self._in_hand:
            rows = self._rescue(work)
        if rows:
            self._in_hand += len(rows)
            self._submit(rows)
        else:
            self._not_before = time.monotonic() + _IDLE
        return bool(rows)

    def _next(self, connection: Connection, work: Queue, limit: int) -> list[ItemRow]:
        keys = work.claim(connection, self.token, limit, self._after)
        if not keys and self._after:
            keys = work.claim(connection, self.token, limit)
        if not keys and not self._in_hand and work.release(connection, self.token):
            # Claimed by a transaction whose answer got lost: nobody else may have them while this lease lives.
            keys = work.claim(connection, self.token, limit)
        self._after = keys[-1] if keys else 0
        return self._items(connection, work, keys)

    def _rescue(self, work: Queue) -> list[ItemRow]:
        def rescue(connection: Connection) -> tuple[list[ItemRow], int]:
            keys, quarantined = work.rescue(connection, self.token)
            return self._items(connection, work, keys), quarantined

        rows, quarantined = self._database.patiently(rescue)
        self._suspects = bool(rows)
        if quarantined:
            self._report(work.scope["dataset_id"], Tally(failed=Counter(worker_died=quarantined)))
        return rows

    def _items(self, connection: Connection, work: Queue, keys: Sequence[int]) -> list[ItemRow]:
        return catalog.items(connection, work.scope["dataset_id"], keys) if keys else []


def _refusal(key: int, error: ItemError) -> Refusal:
    # PostgreSQL's text holds no NUL, and a message should not be longer than a person reads.
    return Refusal(key, error.status, error.code, error.detail.replace("\0", "")[:500])


def _tally(outcomes: Sequence[Outcome]) -> Tally:
    tally = Tally()
    for outcome in outcomes:
        if isinstance(outcome.result, ItemError):
            counts = tally.failed if outcome.result.status == "failed" else tally.skipped
            counts[outcome.result.code] += 1
        else:
            tally.done += 1
            tally.audio_seconds += outcome.seconds
    return tally
