"""Sizes and times of many files."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from stat import S_ISREG
from types import TracebackType

Facts = tuple[int | None, int | None] | None
"""Size and mtime_ns; (None, None) for a file that is missing or out of reach; None for what is no regular file."""

BATCH = 1024
"""How many paths one call of Stats should get: enough to share among threads, little enough to stream."""

THREADS = 16
SLOW = 100e-6
"""Seconds for a file beyond which the file system is far away."""


class Stats:
    """Looks up files, in threads where the file system is slow to answer.

    On a local disk one thread is fastest (350,000 files a second on 2 cores, against 320,000 with 4 threads and
    170,000 through `os.scandir`); on a network file system the waiting dominates, and 16 wait at once.
    """

    def __init__(self, threads: int = 1) -> None:
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def __enter__(self) -> Stats:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, paths: Sequence[str]) -> list[Facts]:
        """Facts of each path, in order; links are followed."""
        if self._pool:
            step = -(-len(paths) // THREADS) or 1
            shares = [paths[at : at + step] for at in range(0, len(paths), step)]
            return [facts for share in self._pool.map(_look_up, shares) for facts in share]
        begin = time.perf_counter()
        found = _look_up(paths)
        if time.perf_counter() - begin > SLOW * max(len(paths), THREADS):
            self._pool = ThreadPoolExecutor(THREADS)
        return found


def _look_up(paths: Sequence[str]) -> list[Facts]:
    stat, found = os.stat, list[Facts]()
    for path in paths:
        try:
            facts = stat(path)
        except OSError:
            found.append((None, None))
        else:
            found.append((facts.st_size, facts.st_mtime_ns) if S_ISREG(facts.st_mode) else None)
    return found
