"""Ends a worker process that hangs: its rows come back, the one that made it hang is found out, the run goes on.

A model or a decoder that never returns would otherwise hold its rows for ever, as its worker is alive and renews.
"""

from __future__ import annotations

import faulthandler
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STUCK_SECONDS = 600.0
"""How long decoding or embedding may take beyond what its length explains."""
BYTES_A_SECOND = 100_000
"""A decoder that is slower than this hangs."""
HANGS = 75
"""Exit code of a worker that was ended for hanging."""
_TICK = 0.5


class Watchdog:
    """Watches the pieces of work of one process; each thread has one at a time."""

    def __init__(self, seconds: float = STUCK_SECONDS) -> None:
        self._seconds = seconds
        self._deadlines: dict[int, float] = {}
        self._nowhere = Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process lives
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def limit(self, more: float = 0.0) -> Iterator[None]:
        """End the process if the block takes `more` seconds beyond what anything may take."""
        thread = threading.get_ident()
        self._deadlines[thread] = time.monotonic() + self._seconds + more
        try:
            yield
        finally:
            del self._deadlines[thread]

    def _watch(self) -> None:
        while True:
            if min(list(self._deadlines.values()), default=math.inf) < time.monotonic():
                os._exit(HANGS)
            # For what hangs without letting go of the interpreter, this thread included: a timer outside of it.
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._nowhere)
            time.sleep(_TICK)


def decoding_seconds(path: Path) -> float:
    """How long a file may take to decode because of its size; a missing one has none."""
    try:
        return path.stat().st_size / BYTES_A_SECOND
    except OSError:
        return 0.0
