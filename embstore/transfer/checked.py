"""What of a table may come in: rows whose vectors are finite and not zero, and whose names the database can hold."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.errors import UsageError
from embstore.sources.base import unstorable
from embstore.sources.listed import LineError, Under
from embstore.transfer.reading import Reader, Spot, Tell
from embstore.transfer.table import Batch


@dataclass(frozen=True)
class Part:
    """Some rows of a table that may come in, as columns of one length."""

    rows: list[Any]
    """What stands for them at their reader."""
    paths: list[str]
    """Relative to the root of the dataset."""
    starts: list[float | None]
    durations: list[float | None]
    speakers: list[str | None]
    vectors: NDArray[np.float32]
    """float32 [n, dim]."""

    def __len__(self) -> int:
        return len(self.rows)


class Checked:
    """The parts of a table that may come in; rows that may not are told of."""

    def __init__(self, reader: Reader, under: Under, tell: Tell) -> None:
        self._reader, self._under, self._tell = reader, under, tell
        self._speakers: dict[str | None, str | None] = {None: None}

    def parts(self) -> Iterator[Part]:
        """Read the table once."""
        for batch in self._reader.batches(self._tell):
            part = self._part(batch)
            if len(part):
                yield part

    def _part(self, batch: Batch) -> Part:
        with np.errstate(over="ignore"):
            matrix = np.ascontiguousarray(batch["embedding"], dtype=np.float32)
        good = _good(matrix)
        nothing: list[Any] = [None] * len(good)
        starts, durations = (batch[name].tolist() if name in batch else nothing for name in ("start", "duration"))
        part = Part(list(batch["row"]), batch["path"], starts, durations, batch.get("speaker", nothing), matrix)
        try:
            return self._as_it_stands(part) if good.all() else self._row_by_row(part, good)
        except LineError:
            return self._row_by_row(part, good)

    def _as_it_stands(self, part: Part) -> Part:
        """A part of which all rows may come in: column by column, which is faster. Raises LineError for another."""
        if None in part.paths:
            raise LineError("a path is missing")
        return replace(
            part,
            paths=list(map(self._under, part.paths)),
            starts=list(map(_start, part.starts)),
            durations=list(map(_duration, part.durations)),
            speakers=list(map(self._speaker, part.speakers)),
        )

    def _row_by_row(self, part: Part, good: NDArray[np.bool_]) -> Part:
        """The rows that may come in; the others are told of."""
        kept: list[int] = []
        rows: list[tuple[str, float | None, float | None, str | None]] = []
        columns = (part.paths, part.starts, part.durations, part.speakers, good.tolist())
        for place, (path, start, duration, speaker, is_good) in enumerate(zip(*columns, strict=True)):
            try:
                if not is_good:
                    raise LineError("the vector is zero, or holds NaN or infinity")
                if path is None:
                    raise LineError("the path is missing")
                rows.append((self._under(path), _start(start), _duration(duration), self._speaker(speaker)))
                kept.append(place)
            except LineError as error:
                self._tell(Spot(self._reader.where(part.rows[place]), str(error)))
        return Part(
            [part.rows[place] for place in kept],
            [row[0] for row in rows],
            [row[1] for row in rows],
            [row[2] for row in rows],
            [row[3] for row in rows],
            part.vectors[kept],
        )

    def _speaker(self, name: str | None) -> str | None:
        if name not in self._speakers:
            if why := unstorable(name or ""):
                raise LineError(f"the speaker {why}")
            self._speakers[name] = (name or "").strip() or None
        return self._speakers[name]


def _good(matrix: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which vectors are finite and not zero."""
    largest = np.maximum(matrix.max(axis=1), -matrix.min(axis=1))
    return np.asarray(np.isfinite(largest) & (largest > 0))


def _start(value: float | None) -> float | None:
    if value is None or math.isnan(value):
        return None
    if not 0 <= value < math.inf:
        raise LineError(f"start {value!r} is not a number of seconds")
    return value + 0.0


def _duration(value: float | None) -> float | None:
    if value is None or math.isnan(value):
        return None
    if not 0 < value < math.inf:
        raise LineError(f"duration {value!r} is not a number of seconds")
    return value


class Names:
    """Every item that a table names, eight bytes each, to find those that it names twice."""

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, part: Part) -> None:
        """Take note of a part."""
        self._hashes.extend(map(hash, zip(part.paths, part.starts, strict=True)))

    def require_different(self, reader: Reader, again: Iterator[Part]) -> None:
        """Raise UsageError if an item is named twice. `again` is what was added, which is only then read once more."""
        hashes = np.frombuffer(self._hashes, dtype=np.int64)
        ordered = np.sort(hashes)
        suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        if not suspects:
            return
        seen: dict[tuple[str, float | None], Any] = {}
        for part in again:
            for key, row in zip(zip(part.paths, part.starts, strict=True), part.rows, strict=True):
                if hash(key) in suspects and (first := seen.setdefault(key, row)) is not row:
                    stretch = "" if key[1] is None else f" from {key[1]:g} s"
                    raise UsageError(
                        f"{reader.where(row)}: '{key[0]}'{stretch} stands there twice, the first time in"
                        f" {reader.where(first)}; nothing was imported"
                    )
