"""Merging neighbours, and what decides between levels, on cases that can be worked out otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from embstore.boundaries.chain import Chain, Cut
from embstore.boundaries.levels import _is_ordered
from embstore.boundaries.stream import dimensions, due


def chain(values: list[float], weights: list[float], least: float) -> Chain:
    size = np.array(weights)
    rows = np.concatenate([[0], np.cumsum(size)[:-1]]).astype(np.int64)
    even = np.ones(len(size))
    return Chain(rows, size, size[:, None] * np.array(values)[:, None], even, least * even)


def naive(units: Chain, short: float) -> list[int]:
    """Look at all the cuts again after every merge."""
    rows, weights, sums = units.rows.tolist(), units.weights.tolist(), units.sums[:, 0].tolist()
    while len(rows) > 1:
        ratios = []
        for i in range(1, len(rows)):
            a, b = weights[i - 1], weights[i]
            saved = a * b / (a + b) * (sums[i - 1] / a - sums[i] / b) ** 2
            ratios.append(saved / (units.least[0] * (1 + short / max(1, min(a, b)))))
        worst = int(np.argmin(ratios)) + 1
        if ratios[worst - 1] >= 1:
            break
        weights[worst - 1] += weights.pop(worst)
        sums[worst - 1] += sums.pop(worst)
        rows.pop(worst)
    return rows


@pytest.mark.parametrize("short", [0.0, 6.0])
def test_merging_takes_the_worst_cut_first(short: float) -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        units = chain(rng.normal(size=40).tolist(), rng.integers(1, 20, 40).tolist(), 4.0)
        gone: list[Cut] = []
        merged = units.merged(short, gone)
        assert merged.rows.tolist() == naive(units, short)
        assert sorted([cut.row for cut in gone] + merged.rows.tolist()) == units.rows.tolist()
        assert merged.weights.sum() == units.weights.sum()
        assert merged.sums.sum() == pytest.approx(units.sums.sum())
        assert all(cut.saved >= cut.least for cut in merged.cuts(short))
        assert all(cut.saved < cut.least for cut in gone)


def test_a_short_unit_must_differ_by_more() -> None:
    assert len(chain([0, 0.9, 0], [100, 3, 100], 1.0).merged(0.0)) == 3
    assert len(chain([0, 0.9, 0], [100, 3, 100], 1.0).merged(6.0)) == 1


def test_apart_leaves_out_what_noise_makes() -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(4000, 1)) * np.sqrt(1 / 10)
    even = np.ones(4000)
    units = Chain(np.arange(4000) * 10, 10 * even, 10 * means, even, even)
    assert float(units.apart().mean()) == pytest.approx(0, abs=0.01)
    assert float(units.apart(0.0).mean()) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("dim", [4, 16, 64])
def test_dimensions_are_those_that_vary(dim: int) -> None:
    rows: NDArray[np.float64] = np.zeros((6000, 128))
    rows[:, :dim] = np.random.default_rng(0).normal(size=(6000, dim))
    rows[3000:] += 5
    assert dimensions(rows) == pytest.approx(dim, rel=0.15)


def test_chance_rarely_saves_what_is_due() -> None:
    rng = np.random.default_rng(0)
    for dim in (5, 20, 60):
        best = [float((rng.normal(size=(1000, dim)) ** 2).mean(axis=1).max()) for _ in range(100)]
        assert np.mean(np.array(best) > due(1000, dim)) < 0.05
        assert np.median(best) > 0.6 * due(1000, dim)


def test_order_is_looked_for_inside_the_groups() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), 30)
    far, near = rng.normal(size=(6, 16))[groups], rng.normal(size=(180, 16))
    assert _is_ordered(far + near, np.zeros(180))
    assert not _is_ordered(far + near, groups)
    drift = np.cumsum(rng.normal(size=(180, 16)), axis=0)
    assert _is_ordered(drift, np.zeros(180))
    assert _is_ordered(drift, groups)
