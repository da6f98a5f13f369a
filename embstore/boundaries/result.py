"""What goes into every method, and what comes out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Window = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Positions [n], rising, and the vectors [n, dim] at them. Positions without a vector are left out."""

Windows = Iterable[Window]
"""The whole set in order. How it is cut into windows has no influence on the result."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """A place where one speaker ends and the next begins."""

    position: int
    """Of the first item with a vector that the new speaker has."""
    score: float
    """The contrast at this position, as in `Result.scores`: 0 where both sides sound the same, 2 at most."""
    confidence: float
    """From 0 (the cut is only just worth making) to 1: `1 - threshold / gain`.

    `gain` is what the cut saves of the squared distances between the vectors and the mean of their segment, and
    `threshold` what it had to save at least; each method says which threshold it has.
    """


@dataclass(frozen=True, slots=True)
class Result:
    """The boundaries of one ordered set."""

    boundaries: list[Boundary]
    positions: NDArray[np.int64]
    """int64 [n]: the positions that had a vector."""
    scores: NDArray[np.float32]
    """float32 [n]: 1 - cosine of the mean of up to 20 vectors before each of them and of the 20 from it on."""
    method: str
    parameters: dict[str, Any]
    """What was asked for and what was chosen from the data, as JSON."""
    notes: list[str] = field(default_factory=list)
    """What a person should know: fallbacks, changed parameters."""
    trace: list[str] = field(default_factory=list)
    """One line a decision, if asked for."""
    expected: list[int] = field(default_factory=list)
    """Positions around which `cosine` and `gmm` searched."""
