"""Which segments are the same voice coming back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.85
"""Cosine of two voices' centroids from which on they are one; depends on the model."""


def same_voices(
    centroids: NDArray[np.float32], counts: NDArray[np.int64], threshold: float = THRESHOLD
) -> NDArray[np.int64]:
    """Number of the voice of each segment, int64 [segments], counted from 0 in order of first appearance.

    `centroids`: mean vectors [segments, dim], of any length; `counts`: files in each. The two most similar voices are
    merged, their centroids averaged by files, until none are as similar as `threshold` (agglomerative clustering with
    the centroid method: Sokal, Michener 1958). Time and memory grow with the square of the number of segments.
    Raises ValueError if the shapes disagree or a value is not finite.
    """
    sums = np.asarray(centroids, dtype=np.float64)
    if sums.ndim != 2 or len(sums) != len(counts) or not np.isfinite(sums).all():
        raise ValueError(f"expected finite centroids [n, dim] and n counts, got {sums.shape} and {len(counts)}")
    sums = sums * np.asarray(counts, dtype=np.float64)[:, None]
    units = _units(sums)
    likeness = (units @ units.T).astype(np.float32)
    np.fill_diagonal(likeness, -np.inf)
    voice = np.arange(len(sums))
    best = likeness.max(axis=1, initial=-np.inf)
    while len(best) and best.max() >= threshold:
        a = int(np.argmax(best))
        b = int(np.argmax(likeness[a]))
        keep, gone = min(a, b), max(a, b)
        voice[voice == gone] = keep
        sums[keep] += sums[gone]
        units[keep] = _units(sums[keep : keep + 1])[0]
        stale = np.flatnonzero((best == likeness[:, keep]) | (best == likeness[:, gone]))
        row = (units @ units[keep]).astype(np.float32)
        row[np.isneginf(best)] = -np.inf
        row[[keep, gone]] = -np.inf
        likeness[gone] = likeness[:, gone] = -np.inf
        likeness[keep] = likeness[:, keep] = row
        best = np.maximum(best, row)
        best[stale] = likeness[stale].max(axis=1)
        best[keep], best[gone] = row.max(), -np.inf
    return np.unique(voice, return_inverse=True)[1].astype(np.int64)


def _units(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units: NDArray[np.float64] = rows / np.where(norms > 0, norms, 1)
    return units
