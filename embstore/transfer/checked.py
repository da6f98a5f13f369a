"""What of a table may come in: rows whose vectors are finite and not zero, and whose names the database can hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.sources.base import unstorable
from embstore.sources.listed import LineError, Under
from embstore.transfer.table import Batch, Reader, Spot

Row = tuple[int, int | None, str, str | None, float | None, float | None]
"""Number of the row in the file, from 0; place in the order of the dataset, if the file says one; path, speaker, start
and duration."""


def vectors_of(batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The vectors as float32, and which of them are finite and not zero."""
    with np.errstate(over="ignore"):
        matrix = np.ascontiguousarray(batch["embedding"], dtype=np.float32)
    largest = np.maximum(matrix.max(axis=1), -matrix.min(axis=1))
    return matrix, np.asarray(np.isfinite(largest) & (largest > 0))


class Rows:
    """The rows of a table of embeddings that may come in; the others are told to `spot`."""

    def __init__(self, reader: Reader, under: Under, spot: Callable[[Spot], None]) -> None:
        self._reader, self._under, self._spot = reader, under, spot
        self._speakers: dict[str | None, str | None] = {None: None}
        self.seen = 0
        """Rows of the file so far, the refused ones included."""

    def __iter__(self) -> Iterator[Row]:
        for batch in self._reader.batches(self._spot):
            _, good = vectors_of(batch)
            yield from self._rows(batch, good.tolist())

    def _rows(self, batch: Batch, good: list[bool]) -> Iterator[Row]:
        count = len(good)
        nothing = [None] * count
        positions = batch["position"].tolist() if "position" in batch else [-1] * count
        starts, durations = (batch[name].tolist() if name in batch else nothing for name in ("start", "duration"))
        columns = (batch["row"], batch["path"], batch.get("speaker", nothing), starts, durations, positions, good)
        for row, path, speaker, start, duration, position, is_good in zip(*columns, strict=True):
            number = self.seen
            self.seen += 1
            try:
                if not is_good:
                    raise LineError("the vector is zero, or holds NaN or infinity")
                if path is None:
                    raise LineError("the path is missing")
                yield (
                    number,
                    position if position >= 0 else None,
                    self._under(path),
                    self._speaker(speaker),
                    _seconds(start, "start"),
                    _seconds(duration, "duration"),
                )
            except LineError as error:
                self._spot(Spot(self._reader.where(row), str(error)))

    def _speaker(self, name: str | None) -> str | None:
        if name not in self._speakers:
            if why := unstorable(name or ""):
                raise LineError(f"the speaker {why}")
            self._speakers[name] = (name or "").strip() or None
        return self._speakers[name]


def _seconds(value: Any, what: str) -> float | None:
    if value is None or math.isnan(value):
        return None
    if not 0 <= value < math.inf or (what == "duration" and value == 0):
        raise LineError(f"{what} {value!r} is not a number of seconds")
    return float(value) + 0.0
