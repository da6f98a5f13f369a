"""Optimal partitioning: the cuts that minimise squared distances to the segments' means plus a penalty a cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A place that may be cut, and the sums over all rows before it."""

    row: int
    total: Floats
    """Sum of the vectors, float64 [dim]."""
    count: int
    """Vectors in the sum; rows that were left out as foreign do not count."""
    squares: float
    """Sum of their squared lengths."""
    penalty: float = 0.0
    """What a cut here must save at least."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """What lies between two cuts."""

    begin: Place
    end: Place

    @property
    def count(self) -> int:
        """Vectors in it."""
        return self.end.count - self.begin.count

    @property
    def mean(self) -> Floats:
        """Mean vector, float64 [dim]."""
        mean: Floats = (self.end.total - self.begin.total) / max(self.count, 1)
        return mean


def gain(left: Segment, right: Segment) -> float:
    """What the cut between two segments saves: `l·r / (l + r) · |mean left - mean right|²`."""
    difference = left.mean - right.mean
    harmonic = left.count * right.count / max(left.count + right.count, 1)
    return harmonic * float(difference @ difference)


@dataclass(slots=True, eq=False)
class _Node:
    place: Place
    before: _Node | None


class Partition:
    """PELT (Killick, Fearnhead, Eckley 2012, "Optimal detection of changepoints with a linear computational cost").

    Exact over the places it is given. It looks back at all places that can still be the last cut, at once, as arrays.
    Where all of those agree about the past, that is settled and let go, so memory does not grow with the set.
    """

    def __init__(self, start: Place, *, least: int = 1) -> None:
        """`least`: rows that a segment has at least."""
        dim = len(start.total)
        self._least = least
        self._totals = np.zeros((64, dim))
        self._facts = np.zeros((5, 64))
        self._nodes: list[_Node] = []
        self._root = _Node(start, None)
        self._append(self._root, 0.0)

    def add(self, place: Place) -> None:
        """Offer the next place."""
        costs = self._costs(place)
        best = int(np.argmin(costs))
        if not np.isfinite(costs[best]):
            return
        value = costs[best] + place.penalty
        node = _Node(place, self._nodes[best])
        self._forget(place.row, np.isfinite(costs) & (costs >= value))
        self._append(node, value)

    def settled(self) -> Iterator[Segment]:
        """Segments that no later row can change, each once, in order."""
        chains = [self._chain(node) for node in self._nodes]
        if len(chains) < 1:
            return
        agreed = 0
        for nodes in zip(*chains, strict=False):
            if any(node is not nodes[0] for node in nodes):
                break
            agreed += 1
        yield from self._emit(chains[0][:agreed])

    def finish(self, end: Place) -> Iterator[Segment]:
        """The segments that are left, up to the end of the set."""
        if end.row == self._root.place.row:
            return
        costs = self._costs(end)
        best = int(np.argmin(costs))
        # A rest shorter than the shortest segment, before the first cut could be made: it is one segment.
        last = self._nodes[best] if np.isfinite(costs[best]) else self._root
        yield from self._emit([*self._chain(last), _Node(end, last)])

    def _emit(self, chain: list[_Node]) -> Iterator[Segment]:
        for node in chain:
            if node is not self._root:
                yield Segment(self._root.place, node.place)
                self._root = node
        self._root.before = None

    def _chain(self, node: _Node) -> list[_Node]:
        """From the first unsettled cut to `node`."""
        chain = [node]
        while chain[-1] is not self._root and (before := chain[-1].before) is not None:
            chain.append(before)
        return chain[::-1]

    def _costs(self, place: Place) -> Floats:
        """Cost of everything up to `place` for each possible last cut; infinite if that is too close."""
        live = len(self._nodes)
        values, counts, squares, rows, _ = self._facts[:, :live]
        bend = place.total - self._totals[:live]
        length = place.count - counts
        possible = (rows <= place.row - self._least) & (length > 0)
        spread = place.squares - squares - np.einsum("ij,ij->i", bend, bend) / np.maximum(length, 1)
        return np.where(possible, values + np.maximum(spread, 0), np.inf)

    def _forget(self, row: int, worse: NDArray[np.bool_]) -> None:
        """Drop what can't be the last cut any more.

        A cut at `row` is better from now on, but only for segments that are long enough, so the old one stays so long.
        """
        expires = self._facts[4, : len(self._nodes)]
        expires[worse & np.isinf(expires)] = row + self._least
        keep = np.flatnonzero(expires > row)
        if len(keep) < len(self._nodes):
            self._totals[: len(keep)] = self._totals[keep]
            self._facts[:, : len(keep)] = self._facts[:, keep]
            self._nodes = [self._nodes[i] for i in keep]

    def _append(self, node: _Node, value: float) -> None:
        live = len(self._nodes)
        if live == len(self._totals):
            self._totals = np.concatenate([self._totals, np.zeros_like(self._totals)])
            self._facts = np.concatenate([self._facts, np.zeros_like(self._facts)], axis=1)
        place = node.place
        self._totals[live] = place.total
        self._facts[:, live] = value, place.count, place.squares, place.row, np.inf
        self._nodes.append(node)
