"""Figures on small cases that can be counted by hand, and on random ones against a slow definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ordered_sets import RealSpeech

from embstore.boundaries.evaluate import evaluate, matches
from embstore.boundaries.voices import same_voices


def test_counted_by_hand() -> None:
    result = evaluate([10, 21, 34, 80], [10, 20, 30, 40], 100)
    exact, one, five = result.agreements
    assert [a.matched for a in (exact, one, five)] == [1, 2, 3]
    assert (one.precision, one.recall, one.f1) == (0.5, 0.5, 0.5)
    # Found segments 0-10-21-34-80-100, of which the main speaker has 10, 10, 9, 40, 20 items.
    assert result.purity == pytest.approx(0.89)
    # True segments 0-10-20-30-40-100, of which the main found segment has 10, 10, 9, 6, 40 items.
    assert result.coverage == pytest.approx(0.75)


def test_nothing_found_and_nothing_to_find() -> None:
    none = evaluate([], [50], 100)
    assert (none.agreements[0].precision, none.agreements[0].recall, none.agreements[0].f1) == (1.0, 0.0, 0.0)
    assert (none.purity, none.coverage) == (0.5, 1.0)
    empty = evaluate([], [], 0)
    assert (empty.agreements[0].f1, empty.purity, empty.coverage) == (1.0, 1.0, 1.0)


def test_each_boundary_counts_once() -> None:
    assert matches([9, 10, 11], [10], 5) == 1
    assert matches([10], [9, 11], 5) == 1
    assert evaluate([10, 10], [10], 20).agreements[0].precision == 1.0


@pytest.mark.parametrize("place", [0, 100, -1])
def test_boundaries_outside_are_refused(place: int) -> None:
    with pytest.raises(ValueError, match=f"true boundary {place} lies outside 1 to 99"):
        evaluate([5], [place], 100)


_CUTS = st.lists(st.integers(1, 29), unique=True).map(sorted)


@given(_CUTS, _CUTS)
def test_purity_is_what_counting_items_gives(found: list[int], truth: list[int]) -> None:
    ours, theirs = np.searchsorted(found, np.arange(30), "right"), np.searchsorted(truth, np.arange(30), "right")
    result = evaluate(found, truth, 30)
    assert result.purity == pytest.approx(sum(np.bincount(theirs[ours == s]).max() for s in set(ours)) / 30)
    assert result.coverage == pytest.approx(sum(np.bincount(ours[theirs == s]).max() for s in set(theirs)) / 30)


@given(_CUTS, _CUTS, st.integers(0, 6))
def test_no_pairing_is_larger(found: list[int], truth: list[int], tolerance: int) -> None:
    # Augmenting paths, the textbook's way to the largest matching.
    partner: dict[int, int] = {}

    def pair(place: int, tried: set[int]) -> bool:
        for other in truth:
            if abs(other - place) <= tolerance and other not in tried:
                tried.add(other)
                if other not in partner or pair(partner[other], tried):
                    partner[other] = place
                    return True
        return False

    assert matches(found, truth, tolerance) == sum(pair(place, set()) for place in found)


def test_voices_that_come_back() -> None:
    rng = np.random.default_rng(0)
    voices = rng.normal(size=(6, 32))
    who = [0, 1, 0, 2, 3, 1, 0, 4, 5, 2]
    centroids = (voices[who] + 0.2 * rng.normal(size=(10, 32))).astype(np.float32)
    assert same_voices(centroids, np.full(10, 50), threshold=0.85).tolist() == who
    assert same_voices(centroids, np.full(10, 50), threshold=1.01).tolist() == list(range(10))
    assert same_voices(centroids, np.full(10, 50), threshold=-1).tolist() == [0] * 10
    assert same_voices(centroids[:0], np.empty(0, np.int64)).tolist() == []


@pytest.mark.parametrize(
    ("sources", "least"),
    [(("librispeech", "librispeech-cut"), 3), (("arabic-speech-commands",), 10), (("free-spoken-digits",), 10)],
    ids=["sentences", "words", "digits"],
)
def test_real_voices_that_come_back(test_data: Path, sources: tuple[str, ...], least: int) -> None:
    """Each speaker's own files in two segments, none in both; with a cosine, no threshold does for all three."""
    files = [rows for rows in RealSpeech.load(test_data, *sources).files.values() if len(rows) >= 2 * least]
    wrong = pairs = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        mixed = [rng.permutation(rows) for rows in files]
        parts = [rows[: len(rows) // 2] for rows in mixed] + [rows[len(rows) // 2 :] for rows in mixed]
        centroids = np.stack([rows.mean(axis=0) for rows in parts]).astype(np.float32)
        voice = same_voices(centroids, np.array([len(rows) for rows in parts]))
        one, other = np.triu_indices(len(parts), 1)
        wrong += int(((voice[one] == voice[other]) != (other - one == len(files))).sum())
        pairs += len(one)
    assert wrong <= 0.01 * pairs


def test_the_noise_decides_whether_voices_are_one() -> None:
    rng = np.random.default_rng(1)
    voices = rng.normal(size=(4, 32))
    voices[1] = voices[0] + 0.3 * rng.normal(size=32)
    for noise, found in ((0.1, [0, 1, 2, 3, 0, 1, 2, 3]), (1.5, [0, 0, 1, 2, 0, 0, 1, 2])):
        rows = np.stack([v + noise * rng.normal(size=(400, 32)) for v in [*voices, *voices]])
        rows /= np.linalg.norm(rows, axis=2, keepdims=True)
        assert same_voices(rows.mean(axis=1).astype(np.float32), np.full(8, 400)).tolist() == found
    # A file alone does not tell how much the files of a voice differ.
    assert same_voices(np.ones((3, 2), np.float32), np.ones(3, np.int64)).tolist() == [0, 1, 2]
    assert same_voices(np.ones((3, 2), np.float32), np.full(3, 2)).tolist() == [0, 0, 0]


def test_a_large_segment_outweighs_a_small_one() -> None:
    # Merged first are the two at 20 degrees; their centroid lies where the files are.
    angles = np.radians([0, 20, 45])
    centroids = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    threshold = float(np.cos(np.radians(30)))
    assert same_voices(centroids, np.array([1, 100, 1]), threshold).tolist() == [0, 0, 0]
    assert same_voices(centroids, np.array([100, 1, 1]), threshold).tolist() == [0, 0, 1]


def test_shapes_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="expected finite centroids"):
        same_voices(np.ones((3, 2), np.float32), np.ones(2, np.int64))
