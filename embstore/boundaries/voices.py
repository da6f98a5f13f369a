"""Which segments are the same voice coming back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embstore.boundaries.stream import LEAST_NOISE, Floats

APART = 0.15
"""Half the squared distance of two voices' centroids, in units of the noise within a voice, up to which they are one.

Of Resemblyzer's vectors of real speech, 10 files a side: 0.13 at most for two halves of one speaker's files; for two
speakers of one-second words 0.07 at least and 0.8 in the median. Sentences, 5 a side: 0.22 at most, and 1.6 at least.
"""


def same_voices(
    centroids: NDArray[np.float32], counts: NDArray[np.int64], threshold: float | None = None
) -> NDArray[np.int64]:
    """Number of the voice of each segment, int64 [segments], counted from 0 in order of first appearance.

    `centroids`: means of unit vectors [segments, dim], not normalised; `counts`: files in each. The two most similar
    voices are merged, their centroids averaged by files, until none are similar enough (agglomerative clustering with
    the centroid method: Sokal, Michener 1958): as similar as the cosine `threshold`, or if it is not given, as alike as
    the noise within the segments tells; see `APART`. Time and memory grow with the square of the number of segments.
    Raises ValueError if the shapes disagree or a value is not finite.
    """
    means = np.asarray(centroids, dtype=np.float64)
    if means.ndim != 2 or len(means) != len(counts) or not np.isfinite(means).all():
        raise ValueError(f"expected finite centroids [n, dim] and n counts, got {means.shape} and {len(counts)}")
    noise = noise_within(means, counts) if threshold is None else None
    least = threshold if threshold is not None else -APART * noise if noise is not None else np.inf
    return _merged(_Voices(means, np.asarray(counts, dtype=np.float64), noise), least)


def noise_within(means: Floats, counts: NDArray[np.int64]) -> float | None:
    """Median over the segments of the mean squared distance of their unit vectors to their mean.

    A mean of unit vectors is shorter than 1 by just that. None if no segment has two files.
    """
    several = counts > 1
    if not several.any():
        return None
    lost = 1 - np.einsum("ij,ij->i", means[several], means[several])
    return max(float(np.median(lost * counts[several] / (counts[several] - 1))), LEAST_NOISE)


class _Voices:
    """Centroids, and how alike two of them are: the cosine, or the negative of their half squared distance without what
    noise alone makes of it. Either is a product of two vectors, less a number of each."""

    def __init__(self, means: Floats, counts: Floats, noise: float | None) -> None:
        self._noise, self._counts = noise, counts.copy()
        self._sums = means * counts[:, None]
        self._rows, self._less = np.empty_like(means), np.empty(len(means))
        self._place(np.arange(len(means)))

    def __len__(self) -> int:
        return len(self._rows)

    def likeness(self) -> NDArray[np.float32]:
        """Of each two, float32 [n, n]."""
        likeness: NDArray[np.float32] = (self._rows @ self._rows.T - self._less - self._less[:, None]).astype(
            np.float32
        )
        return likeness

    def merge(self, keep: int, gone: int) -> NDArray[np.float32]:
        """Put one into another; returns the likeness of what that makes to all, float32 [n]."""
        self._sums[keep] += self._sums[gone]
        self._counts[keep] += self._counts[gone]
        self._place(np.array([keep]))
        likeness: NDArray[np.float32] = (self._rows @ self._rows[keep] - self._less - self._less[keep]).astype(
            np.float32
        )
        return likeness

    def _place(self, at: NDArray[np.int64]) -> None:
        if self._noise is None:
            norms = np.linalg.norm(self._sums[at], axis=1, keepdims=True)
            self._rows[at] = self._sums[at] / np.where(norms > 0, norms, 1)
            self._less[at] = 0
            return
        rows = self._rows[at] = self._sums[at] / np.maximum(self._counts[at], 1)[:, None]
        self._less[at] = 0.5 * (np.einsum("ij,ij->i", rows, rows) - self._noise / np.maximum(self._counts[at], 1))


def _merged(voices: _Voices, least: float) -> NDArray[np.int64]:
    likeness = voices.likeness()
    np.fill_diagonal(likeness, -np.inf)
    voice = np.arange(len(voices))
    best = likeness.max(axis=1, initial=-np.inf)
    while len(best) and best.max() >= least:
        a = int(np.argmax(best))
        b = int(np.argmax(likeness[a]))
        keep, gone = min(a, b), max(a, b)
        voice[voice == gone] = keep
        stale = np.flatnonzero((best == likeness[:, keep]) | (best == likeness[:, gone]))
        row = voices.merge(keep, gone)
        row[np.isneginf(best)] = -np.inf
        row[[keep, gone]] = -np.inf
        likeness[gone] = likeness[:, gone] = -np.inf
        likeness[keep] = likeness[:, keep] = row
        best = np.maximum(best, row)
        best[stale] = likeness[stale].max(axis=1)
        best[keep], best[gone] = row.max(), -np.inf
    return np.unique(voice, return_inverse=True)[1].astype(np.int64)
