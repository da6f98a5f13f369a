"""Units in a row, and the merging of neighbours that do not differ by enough."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embstore.boundaries.stream import Floats

_TINY = 1e-12


class Cut(NamedTuple):
    """A place between two units, and whether it is worth cutting."""

    row: int
    before: float
    """Weight of what lies before it, up to the last cut: a number of files, or of units."""
    after: float
    saved: float
    """Of the squared distances to the means of the units."""
    least: float
    """What it had to save."""


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Units of one set in order: segments of files, or segments of such segments."""

    rows: NDArray[np.int64]
    """First row of each unit, int64 [k]."""
    weights: Floats
    """Files in each unit, float64 [k]; for units of units, how many whole ones they are worth."""
    sums: Floats
    """Weighted sum of its vectors, float64 [k, dim]."""
    noise: Floats
    """Squared distance of a vector of weight 1 from its mean, around here, float64 [k]."""
    least: Floats
    """What a cut before the unit must save at least, if long units lie on both sides, float64 [k]."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def means(self) -> Floats:
        """Mean vectors, float64 [k, dim]."""
        means: Floats = self.sums / np.maximum(self.weights, _TINY)[:, None]
        return means

    def cuts(self, short: float) -> list[Cut]:
        """All k - 1 cuts; `short`: as in `merged`."""
        before, after = self.weights[:-1], self.weights[1:]
        columns = (self.rows[1:], before, after, self._saved(), self._required(short))
        return [Cut(int(row), *map(float, values)) for row, *values in zip(*columns, strict=True)]

    def apart(self, inflation: float = 1.0) -> Floats:
        """Half the squared distance of each two neighbours' means, without what noise alone makes of it, [k - 1].

        `inflation`: how many times as far as independent files would the noise moves a mean.
        """
        step = np.diff(self.means, axis=0)
        blur = inflation * self.noise / np.maximum(self.weights, _TINY)
        apart: Floats = 0.5 * (np.einsum("ij,ij->i", step, step) - blur[1:] - blur[:-1])
        return apart

    def scaled(self, factor: float) -> Chain:
        """The same units; every cut must save `factor` times as much."""
        return Chain(self.rows, self.weights, self.sums, self.noise, factor * self.least)

    def merged(self, short: float, gone: list[Cut] | None = None) -> Chain:
        """Merge two neighbours, those first whose cut is the furthest from its due, until every cut saves enough.

        A cut beside a unit of weight l must save `1 + short / l` times its `least`: the fewer the files, the more their
        own oddities weigh. The cuts that go are added to `gone`.
        """
        merging = _Merging(self, short)
        merging.run(gone)
        kept = np.flatnonzero(merging.alive)
        return Chain(self.rows[kept], merging.weights[kept], merging.sums[kept], self.noise[kept], self.least[kept])

    def _saved(self) -> Floats:
        step = np.diff(self.means, axis=0)
        before, after = self.weights[:-1], self.weights[1:]
        saved: Floats = before * after / np.maximum(before + after, _TINY) * np.einsum("ij,ij->i", step, step)
        return saved

    def _required(self, short: float) -> Floats:
        shorter = np.maximum(1, np.minimum(self.weights[:-1], self.weights[1:]))
        required: Floats = self.least[1:] * (1 + short / shorter)
        return required


class _Merging:
    """Agglomeration of neighbours, the worst cut first, with a heap: of k units in time k log k."""

    def __init__(self, chain: Chain, short: float) -> None:
        count = len(chain)
        self.weights, self.sums = chain.weights.copy(), chain.sums.copy()
        self.alive = np.ones(count, dtype=np.bool_)
        self._chain, self._short = chain, short
        self._next, self._before = list(range(1, count + 1)), list(range(-1, count - 1))
        self._version = [0] * count
        ratios = chain._saved() / np.maximum(chain._required(short), _TINY)
        self._heap: list[tuple[float, int, int]] = [
            (float(ratios[i]), int(i) + 1, 0) for i in np.flatnonzero(ratios < 1)
        ]
        heapq.heapify(self._heap)

    def run(self, gone: list[Cut] | None) -> None:
        """Merge until no cut is left that saves too little."""
        while self._heap:
            _, unit, version = heapq.heappop(self._heap)
            if not self.alive[unit] or version != self._version[unit]:
                continue
            if gone is not None:
                gone.append(self._cut(unit))
            into = self._before[unit]
            self.weights[into] += self.weights[unit]
            self.sums[into] += self.sums[unit]
            self.alive[unit] = False
            following = self._next[into] = self._next[unit]
            if following < len(self.alive):
                self._before[following] = into
            for changed in (into, following):
                if 0 < changed < len(self.alive):
                    self._push(changed)

    def _push(self, unit: int) -> None:
        self._version[unit] += 1
        cut = self._cut(unit)
        if cut.saved < cut.least:
            heapq.heappush(self._heap, (cut.saved / cut.least, unit, self._version[unit]))

    def _cut(self, unit: int) -> Cut:
        """The cut before a unit, as things are now."""
        before, after = self.weights[self._before[unit]], self.weights[unit]
        step = self.sums[self._before[unit]] / max(before, _TINY) - self.sums[unit] / max(after, _TINY)
        saved = before * after / max(before + after, _TINY) * float(step @ step)
        least = self._chain.least[unit] * (1 + self._short / max(1, min(before, after)))
        return Cut(int(self._chain.rows[unit]), float(before), float(after), float(saved), float(least))
