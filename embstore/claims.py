"""A worker process's side of the queue: its lease, and what it may claim next."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass

from sqlalchemy import Connection

from embstore import faults
from embstore.db.engine import Database
from embstore.errors import DatabaseError
from embstore.queue import LEASE_SECONDS, Queue, end_lease, renew_lease, take_lease

_BEAT = 1.0
"""Seconds between looks at whether the lease is to be renewed."""


@dataclass(frozen=True)
class Claim:
    """What a worker got."""

    keys: list[int]
    suspects: bool = False
    """One of the rows may have killed a worker: work on nothing else until these are done."""
    quarantined: int = 0
    """Rows that this claim has set aside for having killed too many workers."""


class Claimant:
    """One worker process. It takes a lease when it is made, and claims from one queue at a time."""

    def __init__(self, database: Database, lease_seconds: float = LEASE_SECONDS) -> None:
        self._database = database
        self._seconds = lease_seconds
        self._after = 0
        self._renewed = time.monotonic()
        self.token = database.patiently(lambda c: take_lease(c, lease_seconds))

    def renew(self) -> None:
        """Renew the lease, if a quarter of it has passed. Raises LeaseLost if it was ended from outside."""
        if time.monotonic() - self._renewed > self._seconds / 4:
            self._database.patiently(lambda c: renew_lease(c, self.token, self._seconds))
            self._renewed = time.monotonic()

    def keep(self) -> None:
        """Renew the lease from now on in a thread of its own, which needs a connection: for statements that take long.

        If the lease is lost, what is written under it is refused anyway.
        """
        threading.Thread(target=self._beat, daemon=True, name="lease").start()

    def _beat(self) -> None:
        with contextlib.suppress(DatabaseError):
            while True:
                time.sleep(_BEAT)
                self.renew()

    def leave(self) -> None:
        """End the lease."""
        self._database.patiently(lambda c: end_lease(c, self.token))

    def start(self) -> None:
        """Begin anew with the lowest keys, as at another queue."""
        self._after = 0

    def claim(self, queue: Queue, limit: int, *, idle: bool) -> Claim:
        """Claim up to `limit` pending rows; with none pending, and the worker idle, rows of workers that died."""
        keys = self._database.patiently(lambda c: self._pending(c, queue, limit, idle))
        if keys or not idle:
            faults.reach("claimed")
            return Claim(keys)
        keys, quarantined = self._database.patiently(lambda c: queue.rescue(c, self.token))
        return Claim(keys, suspects=bool(keys), quarantined=quarantined)

    def _pending(self, connection: Connection, queue: Queue, limit: int, idle: bool) -> list[int]:
        keys = queue.claim(connection, self.token, limit, self._after)
        if not keys and self._after:
            keys = queue.claim(connection, self.token, limit)
        if not keys and idle and queue.release(connection, self.token):
            # Claimed by a transaction whose answer got lost: nobody else may have them while this lease lives.
            keys = queue.claim(connection, self.token, limit)
        self._after = keys[-1] if keys else 0
        return keys
