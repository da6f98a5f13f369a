"""Points at which a test can make a process fail. Outside tests, reaching one is a call of an empty function.

EMBSTORE_TEST_FAULTS arms them, as `POINT:ACTION:N`, several with commas between: ACTION happens at the N-th time that
any process of the run reaches POINT, and at no other. EMBSTORE_TEST_FAULTS_FOLDER is where arrivals are counted.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

Point = Literal[
    "claimed",
    "decode",
    "model",
    "before_commit",
    "after_commit",
    "centroid_range",
    "boundary_write",
    "index_build",
    "export",
    "import",
    "migration",
]

_BLOCK = 1 << 24


def _use_up_memory() -> None:
    """Take memory, and use it, until the kernel ends this process: let there be a limit."""
    taken = []
    while True:
        taken.append(bytearray(os.urandom(1024)) * (_BLOCK // 1024))


ACTIONS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: signal.raise_signal(signal.SIGSTOP),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "segv": lambda: ctypes.string_at(0),
    "memory": _use_up_memory,
    "hang": lambda: time.sleep(3600),
}


def _nothing(_point: Point) -> None:
    """What `reach` is as long as nobody has armed a point."""


class _Armed:
    def __init__(self, words: str, folder: Path) -> None:
        self._folder = folder
        self._faults: dict[str, tuple[str, int]] = {}
        for word in words.split(","):
            point, action, number = word.split(":")
            if point not in get_args(Point) or action not in ACTIONS:
                raise ValueError(f"EMBSTORE_TEST_FAULTS: no such fault '{word}'")
            self._faults[point] = (action, int(number))

    def __call__(self, point: Point) -> None:
        if fault := self._faults.get(point):
            action, number = fault
            if self._count(point) == number:
                ACTIONS[action]()

    def _count(self, point: str) -> int:
        """The number of this arrival, from 1, among those of all processes."""
        for number in itertools.count(1):
            try:
                os.close(os.open(self._folder / f"{point}.{number}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return number
        raise AssertionError


reach: Callable[[Point], None] = (
    _Armed(os.environ["EMBSTORE_TEST_FAULTS"], Path(os.environ["EMBSTORE_TEST_FAULTS_FOLDER"]))
    if os.environ.get("EMBSTORE_TEST_FAULTS")
    else _nothing
)
