"""Found boundaries against true ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOLERANCES = (0, 1, 5)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many boundaries agree within a tolerance, in positions."""

    tolerance: int
    found: int
    true: int
    matched: int

    @property
    def precision(self) -> float:
        """Share of the found boundaries that are true; 1 if none was found."""
        return self.matched / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        """Share of the true boundaries that were found; 1 if there is none."""
        return self.matched / self.true if self.true else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of both; 0 if both are."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All the figures of one run."""

    agreements: list[Agreement]
    """One for each tolerance."""
    purity: float
    """Share of the items that belong to the main speaker of their found segment: low where speakers are together."""
    coverage: float
    """Share of the items that lie in the main found segment of their true one: low where a speaker was cut up."""


def evaluate(
    found: Iterable[int], truth: Iterable[int], total: int, tolerances: Sequence[int] = TOLERANCES
) -> Evaluation:
    """Compare boundaries of a set of `total` items, positions 0 to total - 1.

    A boundary is the position of the first item after it. Each counts once: a true boundary is matched by one found one
    at most. Purity and coverage are those of segmentation in Bredin 2017, "pyannote.metrics: a toolkit for reproducible
    evaluation, diagnostic, and error analysis of speaker diarization systems"; both are 1 for an empty set.
    Raises ValueError for a boundary outside 1 to total - 1.
    """
    ours, theirs = _cuts(found, total, "found"), _cuts(truth, total, "true")
    agreements = [Agreement(t, len(ours), len(theirs), matches(ours, theirs, t)) for t in tolerances]
    return Evaluation(agreements, _purity(ours, theirs, total), _purity(theirs, ours, total))


def matches(found: Sequence[int] | NDArray[np.int64], truth: Sequence[int] | NDArray[np.int64], tolerance: int) -> int:
    """The largest number of pairs within the tolerance, each boundary in one pair at most; both lists rise.

    Both are points on a line, so pairing the first two that fit never costs a pair later.
    """
    i = j = pairs = 0
    while i < len(found) and j < len(truth):
        if abs(found[i] - truth[j]) <= tolerance:
            pairs, i, j = pairs + 1, i + 1, j + 1
        elif found[i] < truth[j]:
            i += 1
        else:
            j += 1
    return pairs


def _cuts(boundaries: Iterable[int], total: int, name: str) -> NDArray[np.int64]:
    cuts = np.unique(np.array(list(boundaries), dtype=np.int64))
    wrong = cuts[(cuts < 1) | (cuts >= total)]
    if len(wrong):
        raise ValueError(f"{name} boundary {int(wrong[0])} lies outside 1 to {total - 1}")
    return cuts


def _purity(segments: NDArray[np.int64], labels: NDArray[np.int64], total: int) -> float:
    """Sum over the segments of the largest part with one label, as a share of all items."""
    if not total:
        return 1.0
    # Between any two cuts of either kind, both the segment and the label are constant.
    edges = np.unique(np.concatenate([[0, total], segments, labels]))
    lengths = np.diff(edges)
    owner = np.searchsorted(segments, edges[:-1], side="right")
    largest = np.zeros(len(segments) + 1, dtype=np.int64)
    np.maximum.at(largest, owner, lengths)
    return float(largest.sum()) / total
