"""Windows of vectors made into stretches with context, and what is computed at every place of a stretch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.boundaries.result import Window, Windows

Floats = NDArray[np.float64]

CONTEXT = 20
"""Vectors on each side of a place that its contrast looks at."""
BLOCK = 8192
"""Vectors in a block. The noise is measured around each block, so it is part of the result."""
AROUND = 2048
"""Vectors before and after a block that its stretch holds."""
SMALLEST = 3
"""Rows on each side at the smallest scale of `gains`."""
_TILE = 512
_TINY = 1e-9
_PAIRS = 2048
_LAG = 5
_NEIGHBOURS = 4
_FOREIGN = 2.5
LEAST_NOISE = 1e-4


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1, float32 [n, dim]; rows of zeros stay. Raises ValueError if a value is not finite."""
    rows = np.asarray(vectors, dtype=np.float32)
    norms = np.sqrt(_dot(rows, rows))
    if not np.isfinite(norms).all():
        # Squares of more than 1e19 do not fit into a float32, though the value does.
        norms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    if not np.isfinite(norms).all():
        raise ValueError(f"vector {int(np.flatnonzero(~np.isfinite(norms))[0])} of a window is not finite")
    norms[norms == 0] = 1
    scaled: NDArray[np.float32] = (rows / norms[:, None]).astype(np.float32, copy=False)
    return scaled


def blocks(windows: Windows, size: int = BLOCK, *, normalise: bool = True) -> Iterator[Window]:
    """The same rows cut anew, `size` in each but the last. Raises ValueError where positions do not rise."""
    held: list[Window] = []
    count, last = 0, -1
    for positions, vectors in windows:
        if not len(positions):
            continue
        if len(positions) != len(vectors):
            raise ValueError(f"a window has {len(positions)} positions and {len(vectors)} vectors")
        if positions[0] <= last or (np.diff(positions) <= 0).any():
            raise ValueError(f"positions do not rise around {int(positions[0])}")
        last = int(positions[-1])
        held.append((np.asarray(positions, dtype=np.int64), unit(vectors) if normalise else vectors))
        count += len(positions)
        if count >= size:
            whole = _joined(held)
            full = count - count % size
            for begin in range(0, full, size):
                yield whole[0][begin : begin + size], whole[1][begin : begin + size]
            held, count = [(whole[0][full:].copy(), whole[1][full:].copy())] if count > full else [], count - full
    if count:
        yield _joined(held)


def _joined(windows: list[Window]) -> Window:
    if len(windows) == 1:
        return windows[0]
    return np.concatenate([p for p, _ in windows]), np.concatenate([v for _, v in windows])


@dataclass(frozen=True, slots=True)
class Stretch:
    """One block and what lies around it. Rows are counted from the beginning of the set."""

    first: int
    """Row that `rows[0]` is."""
    begin: int
    end: int
    """The block is rows begin to end, without end."""
    positions: NDArray[np.int64]
    """Of the block's rows."""
    rows: NDArray[np.float32]
    """The block with up to 2,048 rows on each side, [m, dim]."""
    is_last: bool
    """Nothing comes after this block."""

    @property
    def own(self) -> NDArray[np.float32]:
        """The block's rows alone, [end - begin, dim]."""
        return self.rows[self.begin - self.first : self.end - self.first]


def stretches(windows: Windows, *, normalise: bool = True) -> Iterator[Stretch]:
    """Each block once, with its neighbours."""
    before: NDArray[np.float32] | None = None
    current: Window | None = None
    begin = 0
    for following in _ended(blocks(windows, normalise=normalise)):
        if current is not None:
            parts = [x for x in (before, current[1], following[1][:AROUND] if following else None) if x is not None]
            end = begin + len(current[0])
            first = begin - (0 if before is None else len(before))
            yield Stretch(first, begin, end, current[0], np.concatenate(parts), following is None)
            before, begin = current[1][-AROUND:], end
        current = following


def _ended(windows: Iterator[Window]) -> Iterator[Window | None]:
    yield from windows
    yield None


def noise(rows: NDArray[np.float32]) -> float:
    """The spread of one speaker's vectors: half the median squared distance of neighbours (a sum over dimensions).

    Neighbours in a set that is sorted by keyword share the word, so those five apart are asked too; but not beyond
    three times the first answer, as in short segments these are often two speakers.
    """
    near = _half_distance(rows, 1)
    far = _half_distance(rows, _LAG)
    return max(min(max(near, far), 3 * near), LEAST_NOISE)


def _half_distance(rows: NDArray[np.float32], lag: int) -> float:
    pairs = len(rows) - lag
    if pairs < 1:
        return 0.0
    step = max(1, pairs // _PAIRS)
    difference = rows[:pairs:step] - rows[lag::step]
    return 0.5 * float(np.median(np.einsum("ij,ij->i", difference, difference)))


def dimensions(rows: NDArray[Any], trim: float = 3.0) -> float:
    """In how many dimensions neighbours differ: trace(C)² / trace(C²) of the covariance C of their differences.

    Differences of more than `trim` times the median are left out: those are changes of something else.
    """
    pairs = len(rows) - 1
    picked = np.arange(0, pairs, max(1, pairs // _PAIRS)) if pairs > 0 else np.empty(0, np.int64)
    steps = np.asarray(rows[picked + 1] - rows[picked], dtype=np.float64)
    squares = np.einsum("ij,ij->i", steps, steps)
    kept = squares <= trim * np.median(squares) if len(steps) else np.empty(0, np.bool_)
    steps, squares = steps[kept], squares[kept]
    count = len(steps)
    if count < 4:
        return 2.0
    # The inner product of two independent differences has the variance trace((2C)²); neighbouring ones share a row.
    lags = [count // 2, count // 2 + 1] if count > 400 else range(2, count)
    products = np.concatenate([np.einsum("ij,ij->i", steps[:-lag], steps[lag:]) for lag in lags])
    alike = float(np.mean(products**2))
    return float(np.clip(squares.mean() ** 2 / max(alike, 1e-30), 2, rows.shape[1]))


def due(count: int, dim: float) -> float:
    """What the best of `count` cuts saves at most where nothing changes, in units of the noise.

    The bound of Laurent, Massart 2000, "Adaptive estimation of a quadratic functional by model selection", for a
    chi-squared variable of `dim` degrees of freedom, here of mean 1.
    """
    exponent = float(np.log(max(count, 100)))
    return 1 + 2 * float(np.sqrt(exponent / dim)) + 2 * exponent / dim


def foreign(stretch: Stretch, spread: float) -> NDArray[np.bool_]:
    """Rows of the block that resemble none of the four on either side, bool [end - begin].

    A single file of another voice, or a broken one, is no speaker; left in, it would tear a tight segment apart.
    """
    own = stretch.own
    nearest = np.full(len(own), np.inf)
    offset = stretch.begin - stretch.first
    for lag in [k for n in range(1, _NEIGHBOURS + 1) for k in (-n, n)]:
        low, high = max(0, offset + lag), min(len(stretch.rows), offset + lag + len(own))
        if high <= low:
            continue
        mine = slice(low - lag - offset, high - lag - offset)
        likeness = np.einsum("ij,ij->i", own[mine], stretch.rows[low:high])
        nearest[mine] = np.minimum(nearest[mine], 1 - likeness)
    return np.asarray(np.isfinite(nearest) & (nearest > _FOREIGN * spread))


def contrast(stretch: Stretch) -> NDArray[np.float32]:
    """`1 - cosine` of the mean before each row of the block and the mean from it on, float32 [end - begin].

    Means of up to 20 rows; 0 at the very first row, where nothing lies before.
    """
    out = np.empty(stretch.end - stretch.begin, dtype=np.float32)
    for begin in range(0, len(out), _TILE):
        end = min(begin + _TILE, len(out))
        sums = _sums_of_20(_padded(stretch, stretch.begin + begin - CONTEXT, stretch.begin + end + CONTEXT - 1))
        norms = np.sqrt(_dot(sums, sums))
        products = norms[:-CONTEXT] * norms[CONTEXT:]
        dots = _dot(sums[:-CONTEXT], sums[CONTEXT:])
        cosine = np.divide(dots, products, out=np.ones_like(dots), where=products > _TINY)
        out[begin:end] = np.clip(1 - cosine, 0, 2)
    return out


def _sums_of_20(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each row and the 19 after it, float32 [n - 19, dim]; by doubling, several times faster than running sums."""
    two = rows[:-1] + rows[1:]
    four = two[:-2] + two[2:]
    eight = four[:-4] + four[4:]
    sixteen = eight[:-8] + eight[8:]
    sums: NDArray[np.float32] = sixteen[:-4] + four[16:]
    return sums


def gains(stretch: Stretch, scales: int) -> list[Floats]:
    """What a cut before each row saves, seen with 3, 6, 12 … rows on each side; each float64 [end - begin].

    That is `half / 2 * |mean left - mean right|²`, whose expectation is the noise where nothing changes; 0 where a side
    lacks rows.
    """
    size = stretch.end - stretch.begin
    out = [np.zeros(size) for _ in range(scales)]
    widest = SMALLEST << (scales - 1)
    total = stretch.first + len(stretch.rows)
    for begin in range(0, size, _TILE):
        end = min(begin + _TILE, size)
        low = stretch.begin + begin - widest
        rows = _padded(stretch, low, stretch.begin + end + widest - 1)
        sums = rows[:-2] + rows[1:-1] + rows[2:]
        half = SMALLEST
        for saved in out:
            at = widest - half
            bend = sums[at + half : at + half + end - begin] - sums[at : at + end - begin]
            saved[begin:end] = _dot(bend, bend) / (2 * half)
            if half < widest:
                sums = sums[:-half] + sums[half:]
            half *= 2
    for scale, saved in enumerate(out):
        half = SMALLEST << scale
        saved[: max(0, half - stretch.begin)] = 0
        saved[max(0, total - half + 1 - stretch.begin) :] = 0
    return out


def _padded(stretch: Stretch, low: int, high: int) -> NDArray[np.float32]:
    """Rows low to high of the set, zeros where there are none."""
    inside = stretch.rows[max(low - stretch.first, 0) : max(high - stretch.first, 0)]
    missing = max(stretch.first - low, 0), max(high - stretch.first - len(stretch.rows), 0)
    return np.pad(inside, (missing, (0, 0))) if any(missing) else inside


def _dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    product: NDArray[np.float32] = np.einsum("ij,ij->i", a, b)
    return product


def prefix_sums(rows: NDArray[np.float32]) -> Floats:
    """Sums of the rows before each, float64 [n + 1, dim]."""
    sums = np.zeros((len(rows) + 1, rows.shape[1]))
    for i, row in enumerate(rows):  # `np.cumsum` along the first axis takes three times as long
        np.add(sums[i], row, out=sums[i + 1])
    return sums


def sums_before(rows: NDArray[np.float32], places: NDArray[np.int64]) -> Floats:
    """Sums of the rows before each of a few places, which rise, float64 [places, dim]."""
    edges = np.unique(np.concatenate([[0], places[places < len(rows)]]))
    parts = np.add.reduceat(rows, edges, axis=0, dtype=np.float64)
    sums = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(parts, axis=0)])
    chosen: Floats = sums[np.searchsorted(np.append(edges, len(rows)), places)]
    return chosen


def peaks(values: Floats, reach: int) -> NDArray[np.bool_]:
    """Whether each value is the largest within `reach` of it, bool [n]."""
    padded = np.pad(values, reach, constant_values=-np.inf)
    highest = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1).max(axis=1)
    return np.asarray(values >= highest)
