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

from embstore import catalog, faults, vectors
from embstore.catalog import ItemRow
from embstore.claims import Claimant
from embstore.db.engine import Database
from embstore.errors import ItemError
from embstore.extract.batching import Outcome
from embstore.extract.tuning import UNTUNED, Tuning
from embstore.progress import Tally
from embstore.queue import Queue, Refusal

FLUSH_SECONDS = 0.5
"""How long a finished item may wait for others before it is written."""
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
        tuning: Tuning = UNTUNED,
    ) -> None:
        """`submit` takes claimed items to the decoders; `report(dataset_id, tally)` is told what was committed."""
        self._database = database
        self._submit = submit
        self._report = report
        self._stopping = stopping
        self._tuning = tuning
        self.idling = False
        """Whether there is nothing left to claim, and others have not finished yet."""
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._unwritten: list[Outcome] = []
        self._oldest = 0.0
        self._in_hand = 0
        self._suspects = False
        self._not_before = 0.0
        self._rate = 0.0
        self._measured = time.monotonic()
        self.claimant = Claimant(database)

    def put(self, outcome: Outcome) -> None:
        """Hand in what became of an item; from any thread."""
        self._outcomes.put(outcome)

    def serve(self, work: Queue) -> None:
        """Claim, write and renew until nothing of `work` can be claimed any more and all that was is written.

        When asked to stop: claims no more; returns at once, with finished items written by `close`.
        """
        self.claimant.start()
        self._not_before = 0.0
        while not self._stopping.is_set():
            self.claimant.renew()
            self._collect()
            self._flush(work, now=self._in_hand == len(self._unwritten))
            if not self._claim(work) and self._in_hand == 0:
                return

    def close(self, work: Queue) -> None:
        """Write what is finished, and release the rest."""
        while not self._outcomes.empty():
            self._collect()
        self._flush(work, now=True)
        self._database.patiently(lambda c: work.release(c, self.claimant.token))
        self._in_hand = 0

    def idle(self) -> None:
        """Keep the lease while there is nothing to do but to wait for others."""
        self.idling = True
        self.claimant.renew()
        self._stopping.wait(_IDLE)

    def _collect(self) -> None:
        """Take finished items over; waits a moment for the first."""
        try:
            self._unwritten.append(self._outcomes.get(timeout=_POLL))
            while len(self._unwritten) < self._tuning.commit:
                self._unwritten.append(self._outcomes.get_nowait())
        except queue.Empty:
            pass
        if not self._oldest and self._unwritten:
            self._oldest = time.monotonic()

    def _flush(self, work: Queue, *, now: bool) -> None:
        waited = time.monotonic() - self._oldest
        if not self._unwritten or not (now or len(self._unwritten) >= self._tuning.commit or waited > FLUSH_SECONDS):
            return
        outcomes, self._unwritten, self._oldest = self._unwritten, [], 0.0
        done = [o for o in outcomes if not isinstance(o.result, ItemError)]
        if done:
            self._database.patiently(lambda c: self._write(c, work, done))
            faults.reach("after_commit")
        refusals = [_refusal(o.key, o.result) for o in outcomes if isinstance(o.result, ItemError)]
        if refusals:
            self._database.patiently(lambda c: work.refuse(c, self.claimant.token, refusals))
        self._in_hand -= len(outcomes)
        self._report(work.scope["dataset_id"], _tally(outcomes))
        self._measure(len(outcomes))

    def _write(self, connection: Connection, work: Queue, done: Sequence[Outcome]) -> None:
        matrix = np.stack([o.result for o in done if not isinstance(o.result, ItemError)])
        faces = {o.key: o.face for o in done if o.face is not None}
        vectors.write(connection, work, self.claimant.token, [o.key for o in done], matrix, faces)
        faults.reach("before_commit")

    def _measure(self, count: int) -> None:
        """Items a second, smoothed: how much to claim ahead follows from it."""
        now = time.monotonic()
        rate = count / max(now - self._measured, 1e-3)
        self._measured = now
        self._rate = rate if not self._rate else 0.7 * self._rate + 0.3 * rate

    def _claim(self, work: Queue) -> bool:
        """Claim more if it is time to; False if there was nothing to claim."""
        ahead = int(min(max(self._rate * self._tuning.ahead, MIN_AHEAD), MAX_AHEAD))
        if (self._suspects and self._in_hand) or self._in_hand > ahead // 2 or time.monotonic() < self._not_before:
            return True
        claim = self.claimant.claim(work, ahead - self._in_hand, idle=not self._in_hand)
        self._suspects = claim.suspects
        if claim.quarantined:
            self._report(work.scope["dataset_id"], Tally(failed=Counter(worker_died=claim.quarantined)))
        if claim.keys:
            self.idling = False
            dataset_id = work.scope["dataset_id"]
            self._submit(self._database.patiently(lambda c: catalog.items(c, dataset_id, claim.keys)))
            self._in_hand += len(claim.keys)
        else:
            self._not_before = time.monotonic() + _IDLE
        return bool(claim.keys)


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
