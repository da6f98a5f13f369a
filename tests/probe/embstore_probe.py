"""A model as another package would bring it, for tests of the real command.

Its vectors come from the samples alone. Environment:

    PROBE_SLEEP     seconds that the device takes for an item          default 0
    PROBE_SLOW      the same, of a file with `slow` in its name        default 60
    PROBE_DECODE    seconds that decoding takes for an item            default 0
    PROBE_BATCH     items a batch                                      default 8
    PROBE_LOG       file that gets a line for every item embedded
    PROBE_WEIGHTS   other weights, other vectors, another fingerprint  default 1
    PROBE_BROKEN    `always`, or a file: as long as it exists, everything fails
    PROBE_GATE      a file: as long as it exists, batches wait before the device, and a file beside it names the process

A file's name can hold the way in which it goes wrong: see `_misbehave`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embstore.media import audio
from embstore.models.base import Media, Model, Prepared, Recipe

DIM = 16
RATE = 16_000


class Panic(BaseException):
    """As extension modules written in Rust raise it: no subclass of Exception."""


def recipe(options: Mapping[str, str]) -> Recipe:
    """What the entry point names."""
    assert not options
    return ProbeRecipe(os.environ.get("PROBE_WEIGHTS", "1"))


@dataclass(frozen=True)
class ProbeRecipe:
    """Travels to the workers."""

    weights: str
    name: ClassVar[str] = "probe"
    media: ClassVar[Media] = "audio"
    dim: ClassVar[int] = DIM

    @property
    def settings(self) -> Mapping[str, Any]:
        """Facts for people."""
        return {"weights": self.weights}

    def fingerprint(self) -> str:
        """Hash of all that the vectors depend on."""
        return hashlib.sha256(f"probe {self.weights}".encode()).hexdigest()

    def load(self, device: str) -> Model:
        """Nothing to load."""
        return Probe(float(self.weights))


class Probe:
    """A prepared item is its number in the list of paths, then the vector."""

    def __init__(self, weight: float) -> None:
        self.max_cost = int(os.environ.get("PROBE_BATCH", "8"))
        self._weight = weight
        self._sleep = float(os.environ.get("PROBE_SLEEP", "0"))
        self._slow = float(os.environ.get("PROBE_SLOW", "60"))
        self._decode = float(os.environ.get("PROBE_DECODE", "0"))
        self._paths: list[Path] = []
        self._lock = threading.Lock()

    def prepare(self, path: Path, start: float | None, duration: float | None) -> Prepared:
        """Decode an item."""
        if "abort" in path.name:
            os.abort()
        if "decoder-panic" in path.name:
            raise Panic("a decoder panicked")
        time.sleep(self._decode)
        sound = audio.read(path, start, duration, RATE)
        spectrum = np.abs(np.fft.rfft(sound.samples, 4096))[:2048].reshape(DIM, -1).sum(axis=1)
        vector = np.log1p(spectrum) * self._weight
        with self._lock:
            self._paths.append(path)
            number = len(self._paths) - 1
        return Prepared(np.concatenate([[number], vector]).astype(np.float32), sound.seconds, 1)

    def embed(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """Give the vectors, after a while."""
        _pass_gate()
        _check_device()
        vectors = np.stack([item.array[1:] for item in batch])
        for row, item in enumerate(batch):
            path = self._paths[int(item.array[0])]
            time.sleep(self._slow if "slow" in path.name else self._sleep)
            _misbehave(path.name, vectors[row])
        for item in batch:
            _log(self._paths[int(item.array[0])])
        return vectors


def _pass_gate() -> None:
    """Wait for the test to open the gate; see `commands.Gate`."""
    gate = Path(os.environ.get("PROBE_GATE", os.devnull))
    while gate.is_file():
        gate.with_name(f"{gate.name}-{os.getpid()}").touch()
        time.sleep(0.02)


def _check_device() -> None:
    broken = os.environ.get("PROBE_BROKEN")
    if broken and (broken == "always" or Path(broken).exists()):
        raise RuntimeError("the device has fallen off the bus")


def _misbehave(name: str, vector: NDArray[np.float32]) -> None:
    if "poison-segv" in name:
        ctypes.string_at(0)
    if "poison-hang" in name:
        time.sleep(3600)
    if "poison-raise" in name:
        raise ValueError("two lines of\nexplanation")
    if "poison-oom" in name:
        raise MemoryError("no memory for this one")
    if "poison-panic" in name:
        raise Panic("a model panicked")
    if "poison-nan" in name:
        vector[3] = np.nan
    if "poison-zero" in name:
        vector[:] = 0


def _log(path: Path) -> None:
    if log := os.environ.get("PROBE_LOG"):
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()} {path.name}\n")
