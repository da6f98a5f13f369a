"""What a worker waits for: one thing at any moment, so that the shares add up to its time.

device     it embeds
decoding   it has nothing to embed, and something is being decoded
database   nothing is being decoded either: it waits for a claim, or for a write
idle       there is nothing left to claim, and others have not finished yet
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Cause = Literal["decoding", "device", "database", "idle"]
CAUSES: tuple[Cause, ...] = ("decoding", "device", "database")
"""What can be a bottleneck."""


@dataclass
class Waits:
    """Seconds by cause."""

    decoding: float = 0.0
    device: float = 0.0
    database: float = 0.0
    idle: float = 0.0

    def add(self, other: Waits) -> None:
        """Add another worker's, or later ones, to these."""
        self.decoding += other.decoding
        self.device += other.device
        self.database += other.database
        self.idle += other.idle

    @property
    def seconds(self) -> float:
        """All of the time in which there was something to do."""
        return self.decoding + self.device + self.database

    def share(self, cause: Cause) -> float:
        """Share of that time which went to one cause, 0 to 1."""
        spent: float = getattr(self, cause)
        return spent / self.seconds if self.seconds else 0.0

    @property
    def bottleneck(self) -> Cause:
        """What was waited for longest."""
        return max(CAUSES, key=self.share)


class Stopwatch:
    """Takes the time of one thread, which may be read out from others."""

    def __init__(self, blame: Callable[[], Cause]) -> None:
        """`blame()` says what a wait that begins now is for."""
        self._blame = blame
        self._waits = Waits()
        self._since = time.monotonic()
        self._lock = threading.Lock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A wait, which is charged to what it began for."""
        cause = self._blame()
        try:
            yield
        finally:
            self.charge(cause)

    def charge(self, cause: Cause) -> None:
        """Charge all of the time since the last charge to one cause."""
        with self._lock:
            now = time.monotonic()
            self._waits.add(Waits(**{cause: now - self._since}))
            self._since = now

    def lap(self) -> Waits:
        """What was charged since the last lap."""
        with self._lock:
            waits, self._waits = self._waits, Waits()
            return waits
