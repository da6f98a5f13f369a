"""Method `cosine`: the lowest similarity of what lies left and right, searched around each expected place.

A change is expected `segment_size` files after the last one found, and searched up to `boundary_window` files around.
What lies left is the mean of the files from `context` before the window up to the split, what lies right the mean from
there to `context` after the window: as at least `context` files are on each side, no split is judged by a handful.
Where the best split lies at the window's edge, or nothing changes, the change is further away: the window is doubled
then, up to half a segment, so that one segment of an odd length does not lose all that follow. What is found so is
judged once more, in a window of the asked size around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.boundaries.result import Boundary, Result, Windows
from embstore.boundaries.stream import Floats, contrast, noise, prefix_sums, stretches

CONTEXT = 200
"""Files on each side of the window; 20 do for long utterances, but not for short words that are sorted by keyword: of
those it takes some keywords, or a change of keyword is taken for one of speaker."""
THRESHOLD = 3.0
"""How much a cut must save, in units of the noise: where nothing changes, any cut saves about 1, the best of some 2."""


@dataclass(frozen=True, slots=True)
class Search:
    """The files around one expected place."""

    rows: NDArray[np.float32]
    """Unit vectors [m, dim]: context, window, context."""
    low: int
    high: int
    """A split may lie before row `low`, before row `high`, or anywhere between."""


Choose = Callable[[Search], tuple[int, list[str]]]
"""Where in `Search.rows` the second speaker begins, and notes."""


def detect(
    windows: Windows,
    total: int,
    *,
    segment_size: int = 1000,
    boundary_window: int = 10,
    context: int = CONTEXT,
    trace: bool = False,
) -> Result:
    """Find the boundaries of an ordered set whose segments have about `segment_size` files.

    `total`: rows that all windows have together. Where nothing changes around an expected place no boundary is noted,
    and the search goes on from there. A boundary's confidence is `1 - threshold / gain`, with the gain among the
    files that were looked at, and three times their noise as the threshold.
    Raises ValueError for sizes below 1, vectors that are not finite, or positions that don't rise.
    """
    walk = Walk("cosine", total, segment_size, boundary_window, context, lowest_similarity, trace=trace)
    return walk.run(windows)


def lowest_similarity(search: Search) -> tuple[int, list[str]]:
    """The split with the lowest cosine of the means on both sides."""
    return search.low + int(np.argmin(similarities(search))), []


def similarities(search: Search) -> Floats:
    """Cosine of the means left and right of each split, float64 [high - low + 1]."""
    left = prefix_sums(search.rows[search.low : search.high])
    left += search.rows[: search.low].sum(axis=0, dtype=np.float64)
    right = left[-1] + search.rows[search.high :].sum(axis=0, dtype=np.float64) - left
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    products: Floats = np.einsum("ij,ij->i", left, right)
    cosines: Floats = np.divide(products, norms, out=np.ones(len(left)), where=norms > 1e-9)
    return cosines


@dataclass(slots=True)
class _Decision:
    expected: int
    reach: int
    best: int
    saved: float
    least: float

    @property
    def taken(self) -> bool:
        return self.saved > self.least

    def explained(self, positions: NDArray[np.int64]) -> str:
        expected = positions[self.expected]
        end = "a boundary" if self.taken else f"no boundary; going on from position {expected}"
        return (
            f"position {expected} expected, searched {self.reach} around: best split at {positions[self.best]} saves"
            f" {self.saved:.3f}, must save {self.least:.3f}: {end}"
        )


@dataclass(slots=True)
class Walk:
    """From one expected place to the next. Keeps the rows around the next place, and one block."""

    method: str
    total: int
    segment_size: int
    boundary_window: int
    context: int
    choose: Choose
    parameters: dict[str, Any] = field(default_factory=dict)
    trace: bool = False
    _last: int = 0
    _notes: dict[str, int] = field(default_factory=dict)
    _decisions: list[_Decision] = field(default_factory=list)
    _widened: int = 0

    def __post_init__(self) -> None:
        for name in ("segment_size", "boundary_window", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and must be 1 or more")

    @property
    def _widest(self) -> int:
        """Files on each side of the expected place at most: more than half a segment would reach the next change."""
        return max(1, (self.segment_size - 1) // 2)

    @property
    def _reach(self) -> int:
        """Files on each side of the expected place at first."""
        return min(self.boundary_window, self._widest)

    @property
    def _furthest(self) -> int:
        """Files on each side of the expected place that a search may look at: at the widest window's edge once more."""
        return self._widest + self._reach + self._margin

    @property
    def _margin(self) -> int:
        """Context on each side; a third of a segment at most, so that it does not reach another change."""
        return max(min(self.context, 20), min(self.context, self.segment_size // 3))

    def run(self, windows: Windows) -> Result:
        """Walk over the whole set."""
        positions, scores = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        held: NDArray[np.float32] | None = None
        first = 0
        for stretch in stretches(windows):
            positions.append(stretch.positions)
            scores.append(contrast(stretch))
            held = stretch.own if held is None else np.concatenate([held, stretch.own])
            while self._can_search(stretch.end, ended=stretch.is_last):
                self._step(held, first)
            begin = min(stretch.end, self._last + self.segment_size - self._furthest)
            begin = max(first, self._last, begin)
            held, first = held[begin - first :].copy(), begin
        return self._result(np.concatenate(positions), np.concatenate(scores))

    def _can_search(self, rows: int, *, ended: bool) -> bool:
        """Whether the files around the next expected place are there.

        At the end of the set, the last segment may be as much longer than expected as any other.
        """
        expected = self._last + self.segment_size
        return expected + self._reach < rows if ended else expected + self._furthest <= rows

    def _step(self, held: NDArray[np.float32], first: int) -> None:
        expected = self._last + self.segment_size
        reach = self._reach
        begin, search = self._search(held, first, expected, reach)
        centre = lowest_similarity(search)[0]
        while reach < self._widest and (_quiet(search, centre) or centre in (search.low, search.high)):
            reach = min(2 * reach, self._widest)
            begin, search = self._search(held, first, expected, reach)
            centre = lowest_similarity(search)[0]
        if reach > self._reach:
            begin, search = self._search(held, first, begin + centre, self._reach)
        at, notes = self.choose(search)
        saved, least = _saved(search.rows, at)
        for note in set(notes):
            self._notes[note] = self._notes.get(note, 0) + 1
        decision = _Decision(expected, reach, begin + at, saved, least)
        self._widened += reach > self._reach
        self._decisions.append(decision)
        self._last = decision.best if decision.taken else expected

    def _search(self, held: NDArray[np.float32], first: int, expected: int, reach: int) -> tuple[int, Search]:
        """The first row and the files around a place."""
        begin = max(self._last, expected - reach - self._margin)
        rows = held[begin - first : expected + reach + self._margin - first]
        low = max(expected - reach, self._last + 1) - begin
        return begin, Search(rows, low, min(expected + reach - begin, len(rows) - 1))

    def _result(self, positions: NDArray[np.int64], scores: NDArray[np.float32]) -> Result:
        asked = {"segment_size": self.segment_size, "boundary_window": self.boundary_window, "context": self.context}
        places, found = len(self._decisions), [d for d in self._decisions if d.taken]
        notes = [f"{note} ({count} of {places} places)" for note, count in sorted(self._notes.items())]
        if self._reach < self.boundary_window:
            notes.append(f"the window of {self.boundary_window} files was narrowed to {self._reach}, half a segment")
        if self._widened:
            notes.append(f"around {self._widened} of {places} expected places the window was widened")
        if quiet := places - len(found):
            notes.append(f"at {quiet} of {places} expected places nothing changes: no boundary there")
        if len(positions) != self.total:
            notes.append(f"{self.total} rows were announced and {len(positions)} came")
        boundaries = [Boundary(int(positions[d.best]), float(scores[d.best]), 1 - d.least / d.saved) for d in found]
        trace = [decision.explained(positions) for decision in self._decisions] if self.trace else []
        expected = [int(positions[decision.expected]) for decision in self._decisions]
        return Result(boundaries, positions, scores, self.method, asked | self.parameters, notes, trace, expected)


def _quiet(search: Search, at: int) -> bool:
    saved, least = _saved(search.rows, at)
    return saved <= least


def _saved(rows: NDArray[np.float32], at: int) -> tuple[float, float]:
    """What the split saves of the squared distances to the mean, and what it must save."""
    left, right = rows[:at].astype(np.float64), rows[at:].astype(np.float64)
    difference = left.mean(axis=0) - right.mean(axis=0)
    saved = len(left) * len(right) / len(rows) * float(difference @ difference)
    return saved, THRESHOLD * noise(rows)
