"""Method `gmm`: the search of `cosine`, with each side modelled by a Gaussian mixture.

The files left of the window train one mixture, those right of it another. Each file of the window is judged by the
logarithm of its likelihood ratio; the split is where the sum of those, for what is left of it, is largest: the most
likely change from the one model to the other. The models are those of Reynolds, Rose 1995, "Robust text-independent
speaker identification using Gaussian mixture speaker models", the running sum is that of Page 1954, "Continuous
inspection schemes".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.boundaries.result import Result, Windows
from embstore.boundaries.similarity import CONTEXT, Search, Walk, lowest_similarity
from embstore.boundaries.stream import Floats, noise

COMPONENTS = 2
_DIMENSIONS = 12
_FILES_A_COMPONENT = 20
_FEWEST = 5


class _FitFailed(Exception):
    """Why a side has no mixture."""


def detect(
    windows: Windows,
    total: int,
    *,
    segment_size: int = 1000,
    boundary_window: int = 10,
    components: int = COMPONENTS,
    context: int = CONTEXT,
    trace: bool = False,
) -> Result:
    """Find the boundaries of an ordered set whose segments have about `segment_size` files.

    `components`: Gaussians a side; fewer where a side has fewer than 20 files for each. Where a mixture can't be
    fitted, the place is judged by `cosine`, and the notes say so. All else is as in `similarity.detect`.
    """
    if components < 1:
        raise ValueError(f"components is {components}, and must be 1 or more")
    choose = likeliest_change(components)
    parameters = {"gmm_components": components}
    return Walk("gmm", total, segment_size, boundary_window, context, choose, parameters=parameters, trace=trace).run(
        windows
    )


def likeliest_change(components: int) -> Callable[[Search], tuple[int, list[str]]]:
    """The most likely change from a mixture of the files left of the window to one of those right of it."""

    def choose(search: Search) -> tuple[int, list[str]]:
        notes: list[str] = []
        try:
            ratios = _log_ratios(search, components, notes)
        except _FitFailed as error:
            return lowest_similarity(search)[0], [f"no mixture, judged by cosine instead: {error}"]
        return search.low + int(np.argmax(np.concatenate([[0.0], np.cumsum(ratios)]))), notes

    return choose


def _log_ratios(search: Search, components: int, notes: list[str]) -> Floats:
    """log p(file | left) - log p(file | right) for each file of the window, float64 [high - low]."""
    left, right = search.rows[: search.low], search.rows[search.high :]
    if min(len(left), len(right)) < _FEWEST:
        raise _FitFailed(f"fewer than {_FEWEST} files on one side")
    basis = _directions(left, right)
    spread = noise(search.rows) / search.rows.shape[1]
    sides = [_fit((side @ basis).astype(np.float64), components, spread, notes) for side in (left, right)]
    window = (search.rows[search.low : search.high] @ basis).astype(np.float64)
    if not len(window):
        return np.empty(0)
    ratios: Floats = sides[0].score_samples(window) - sides[1].score_samples(window)
    if not np.isfinite(ratios).all():
        raise _FitFailed("a likelihood is not finite")
    return ratios


def _directions(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """The difference of the means and the main directions of what is left, float32 [dim, at most 12].

    A variance a dimension can't be learnt from 50 files in 256 dimensions.
    """
    apart = left.mean(axis=0) - right.mean(axis=0)
    length = float(np.linalg.norm(apart))
    if length < 1e-6:
        raise _FitFailed("both sides have the same mean")
    apart = apart / length
    centred = np.concatenate([left - left.mean(axis=0), right - right.mean(axis=0)])
    centred -= (centred @ apart)[:, None] * apart
    main = np.linalg.svd(centred, full_matrices=False)[2][: _DIMENSIONS - 1]
    return np.concatenate([apart[None, :], main]).T.astype(np.float32)


def _fit(rows: Floats, components: int, spread: float, notes: list[str]) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    count = max(1, min(components, len(rows) // _FILES_A_COMPONENT))
    if count < components:
        notes.append(f"{count} instead of {components} Gaussians on a side of few files")
    mixture = GaussianMixture(
        count, covariance_type="diag", reg_covar=spread, init_params="k-means++", random_state=0, max_iter=200
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return mixture.fit(rows)
        except (ConvergenceWarning, ValueError, np.linalg.LinAlgError) as error:
            raise _FitFailed(str(error).split("\n")[0]) from error
