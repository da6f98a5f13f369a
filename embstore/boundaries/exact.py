"""The best partition into a known number of segments.

Up to 2,000 places it is computed outright (Bellman 1961, "On the approximation of curves by line segments using dynamic
programming"). Beyond that the penalty is sought at which the penalised optimum has that number of segments: it is then
also the best of all partitions into that number.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from embstore.boundaries.partition import Partition, Place, Segment, gain
from embstore.boundaries.stream import Floats
from embstore.words import plural

OUTRIGHT = 2000
"""Places up to which the optimum is computed outright."""
_A_SEGMENT = 8
_ROUNDS = 60


class Pool:
    """The strongest candidates seen so far: memory grows with the number of segments, not with the set."""

    def __init__(self, segments: int, least: int) -> None:
        self._segments = segments
        self._least = least
        self._most = max(OUTRIGHT, _A_SEGMENT * segments)
        self._places: list[Place] = []
        self._strengths: list[float] = []
        self._end: Place | None = None
        self._dropped = False

    def add(self, places: list[Place], strengths: list[float], end: Place) -> None:
        """Take the candidates of the next block, which ends at `end`."""
        self._places += places
        self._strengths += strengths
        self._end = end
        if len(self._places) > 2 * self._most:
            self._thin()

    def _thin(self) -> None:
        if len(self._places) <= self._most:
            return
        self._dropped = True
        strongest = np.sort(np.argsort(-np.array(self._strengths), kind="stable")[: self._most])
        self._places = [self._places[i] for i in strongest]
        self._strengths = [self._strengths[i] for i in strongest]

    def solve(self) -> tuple[list[Segment], str]:
        """The segments, in order, and in words how good they are."""
        if self._end is None:
            return [], "there is nothing to divide"
        self._thin()
        start = Place(0, np.zeros_like(self._end.total), 0, 0.0)
        if len(self._places) <= OUTRIGHT:
            segments = _outright([start, *self._places, self._end], self._segments, self._least)
            words = "the best partition" + (" at the strongest candidates" if self._dropped else "")
        else:
            segments, hit = _by_penalty(start, self._places, self._end, self._segments, self._least)
            words = "the best partition at the candidates" if hit else "a good partition; no penalty has just so many"
        if len(segments) != self._segments:
            words = f"no more than {plural(len(segments), 'segment')} of {plural(self._least, 'file')} fit"
        return segments, words


def _outright(places: list[Place], segments: int, least: int) -> list[Segment]:
    costs = _costs(places, least)
    values, choices = costs[0], []
    for _ in range(1, segments):
        sums = values[:, None] + costs
        choice = np.argmin(sums, axis=0)
        following = sums[choice, np.arange(len(places))]
        if not np.isfinite(following[-1]):
            break
        values = following
        choices.append(choice)
    at, chain = len(places) - 1, [len(places) - 1]
    for choice in reversed(choices):
        at = int(choice[at])
        chain.append(at)
    chain.append(0)
    chain.reverse()
    return [Segment(places[a], places[b]) for a, b in pairwise(chain)]


def _costs(places: list[Place], least: int) -> Floats:
    """Squared distances to the mean of the segment from place i to place j, float64 [m, m]; infinite if too short."""
    totals = np.stack([place.total for place in places])
    counts = np.array([place.count for place in places])
    squares = np.array([place.squares for place in places])
    rows = np.array([place.row for place in places])
    out = np.full((len(places), len(places)), np.inf)
    for i in range(len(places)):
        bend = totals[i + 1 :] - totals[i]
        length = counts[i + 1 :] - counts[i]
        possible = (rows[i + 1 :] - rows[i] >= least) & (length > 0)
        spread = squares[i + 1 :] - squares[i] - np.einsum("ij,ij->i", bend, bend) / np.maximum(length, 1)
        out[i, i + 1 :] = np.where(possible, np.maximum(spread, 0), np.inf)
    # A set shorter than the shortest segment is one segment all the same.
    if not np.isfinite(out[0, -1]):
        out[0, -1] = 0.0
    return out


def _by_penalty(start: Place, places: list[Place], end: Place, segments: int, least: int) -> tuple[list[Segment], bool]:
    """Double the penalty until there are too few segments, then halve the interval; at last thin out the finer side."""
    finest = _penalised(start, places, end, 0.0, least)
    low, high = 0.0, end.squares / max(end.count, 1) / 100
    doubling = True
    for _ in range(_ROUNDS):
        if len(finest) <= segments or high - low < 1e-9 * high:
            break
        middle = high if doubling else 0.5 * (low + high)
        found = _penalised(start, places, end, middle, least)
        if len(found) < segments:
            high, doubling = middle, False
        else:
            low, finest = middle, found
            high = 2 * middle if doubling else high
    return _thinned(finest, segments), len(finest) == segments


def _penalised(start: Place, places: list[Place], end: Place, penalty: float, least: int) -> list[Segment]:
    partition = Partition(start, least=least)
    for place in places:
        partition.add(Place(place.row, place.total, place.count, place.squares, penalty))
    return list(partition.finish(end))


def _thinned(found: list[Segment], segments: int) -> list[Segment]:
    found = list(found)
    saved = [gain(a, b) for a, b in pairwise(found)]
    while len(found) > segments:
        i = int(np.argmin(saved))
        found[i : i + 2] = [Segment(found[i].begin, found[i + 1].end)]
        del saved[i]
        for near in (i - 1, i):
            if 0 <= near < len(saved):
                saved[near] = gain(found[near], found[near + 1])
    return found
