"""float32 out of decimal numbers, rounded once.

NumPy rounds a decimal number to float64 and that to float32. Where the first rounding ends just in the middle between
two float32, the second may take the wrong one. Those are rare, easily found, and looked at again exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


def to_float32(words: Sequence[str]) -> NDArray[np.float32]:
    """The nearest float32 to each number, float32 [n]. Raises ValueError for what is no number."""
    wide = np.array(words, dtype=np.float64)
    with np.errstate(over="ignore"):
        near = wide.astype(np.float32)
    for place in np.flatnonzero(_in_the_middle(wide, near)).tolist():
        exact, middle = Fraction(words[place].strip()), Fraction(float(wide[place]))
        if exact != middle:
            towards = np.float32(np.inf if exact > middle else -np.inf)
            if (near[place] < wide[place]) == (exact > middle):
                near[place] = np.nextafter(near[place], towards)
    return near


def _in_the_middle(wide: NDArray[np.float64], near: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where float64 values lie just between two float32."""
    with np.errstate(invalid="ignore", over="ignore"):
        off = wide - near
        other = np.nextafter(near, np.where(off > 0, np.float32(np.inf), np.float32(-np.inf)))
        middle: NDArray[np.bool_] = (off != 0) & (off == other.astype(np.float64) - wide)
    return middle


def to_decimal(vector: NDArray[np.float32]) -> str:
    """Numbers with commas between; nine digits tell each float32 from every other."""
    return ",".join(["%.9g"] * len(vector)) % tuple(vector.tolist())
