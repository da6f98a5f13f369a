"""Methods cosine and gmm: real sets around a segment size, recovery from odd lengths, and the odd cases."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from ordered_sets import RealSpeech, cuts, places, synthetic, windows

from embstore.boundaries import mixture, similarity
from embstore.boundaries.evaluate import matches
from embstore.boundaries.stream import BLOCK

SENTENCES = ("librispeech", "librispeech-cut")
WORDS = ("arabic-speech-commands",)
METHODS = pytest.mark.parametrize("method", [similarity, mixture], ids=["cosine", "gmm"])


def _hits(method: ModuleType, speech: RealSpeech, size: int, spread: float, tolerance: int, **options: int) -> float:
    agreed = true = 0
    for seed in range(2):
        rng = np.random.default_rng(seed)
        lengths = np.maximum(5, rng.normal(size, spread, 15)).astype(int)
        vectors = speech.draw(rng, lengths)
        result = method.detect(windows(vectors), len(vectors), segment_size=size, **options)
        agreed += matches(places(result), cuts(lengths), tolerance)
        true += len(lengths) - 1
    return agreed / true


@pytest.mark.parametrize("sources", [SENTENCES, WORDS], ids=["sentences", "words"])
@pytest.mark.parametrize("size", [60, 200])
def test_lengths_that_vary_by_a_fortieth(test_data: Path, sources: tuple[str, ...], size: int) -> None:
    speech = RealSpeech.load(test_data, *sources)
    assert _hits(similarity, speech, size, size / 40, 0) >= 0.95
    assert _hits(mixture, speech, size, size / 40, 5) >= _hits(similarity, speech, size, size / 40, 5)


@METHODS
def test_odd_lengths_do_not_lose_the_track(test_data: Path, method: ModuleType) -> None:
    speech = RealSpeech.load(test_data, *SENTENCES)
    assert _hits(method, speech, 200, 30, 1, boundary_window=10) >= 0.95


@METHODS
def test_every_length_up_to_the_window(method: ModuleType) -> None:
    for drift in (-10, 10):
        lengths = [100 + drift] * 12
        vectors = synthetic(np.random.default_rng(0), lengths)
        result = method.detect(windows(vectors), len(vectors), segment_size=100, boundary_window=10)
        assert places(result) == cuts(lengths)


@METHODS
def test_one_speaker_has_no_boundary(method: ModuleType) -> None:
    vectors = synthetic(np.random.default_rng(1), [1000])
    result = method.detect(windows(vectors), 1000, segment_size=100)
    assert places(result) == []
    assert "at 9 of 9 expected places nothing changes: no boundary there" in result.notes


@METHODS
@pytest.mark.parametrize("items", [0, 1, 2, 99])
def test_fewer_items_than_a_segment(method: ModuleType, items: int) -> None:
    vectors = synthetic(np.random.default_rng(2), [50, 50])[:items]
    result = method.detect(windows(vectors), items, segment_size=100)
    assert (result.boundaries, result.expected) == ([], [])
    assert result.scores.shape == (items,)


@METHODS
def test_a_window_larger_than_a_segment(method: ModuleType) -> None:
    lengths = [50] * 10
    vectors = synthetic(np.random.default_rng(3), lengths)
    result = method.detect(windows(vectors), 500, segment_size=50, boundary_window=500)
    assert places(result) == cuts(lengths)
    assert "the window of 500 files was narrowed to 24, half a segment" in result.notes


@METHODS
def test_all_vectors_equal(method: ModuleType) -> None:
    vectors = np.ones((300, 8), np.float32)
    assert places(method.detect(windows(vectors), 300, segment_size=50)) == []
    vectors[:150, 4:] = vectors[150:, :4] = 0
    assert places(method.detect(windows(vectors), 300, segment_size=150)) == [150]


@METHODS
def test_an_outlier_and_missing_vectors(method: ModuleType) -> None:
    vectors = synthetic(np.random.default_rng(4), [100, 100, 100])
    vectors[97] = vectors[250]
    there = np.ones(300, dtype=bool)
    there[198:206] = False
    positions = np.flatnonzero(there)
    result = method.detect([(positions, vectors[there])], len(positions), segment_size=100)
    assert places(result) == [100, 206]


@METHODS
def test_five_percent_foreign_files(test_data: Path, method: ModuleType) -> None:
    speech = RealSpeech.load(test_data, *SENTENCES)
    found = agreed = true = 0
    for seed in range(2):
        rng = np.random.default_rng(seed)
        lengths = rng.normal(100, 2.5, 10).astype(int)
        vectors = speech.draw(rng, lengths)
        foreign = rng.choice(len(vectors), len(vectors) // 20, replace=False)
        vectors[foreign] = speech.draw(rng, np.ones(len(foreign), np.int64))
        ours = places(method.detect(windows(vectors), len(vectors), segment_size=100))
        true, found = true + len(lengths) - 1, found + len(ours)
        agreed += matches(ours, cuts(lengths), 5)
    assert agreed == found == true


@METHODS
def test_two_speakers_who_alternate(method: ModuleType) -> None:
    rng = np.random.default_rng(5)
    both = [synthetic(rng, [1], noise=0)[0] for _ in range(2)]
    lengths = rng.integers(45, 56, 20)
    rows = [both[i % 2] + rng.normal(size=(n, 64)) * 0.05 for i, n in enumerate(lengths)]
    vectors = np.concatenate(rows).astype(np.float32)
    assert places(method.detect(windows(vectors), len(vectors), segment_size=50)) == cuts(lengths)


@METHODS
def test_how_it_is_cut_into_windows_has_no_influence(method: ModuleType) -> None:
    vectors = synthetic(np.random.default_rng(5), np.random.default_rng(5).integers(390, 410, 50), dim=16)
    one = method.detect([(np.arange(len(vectors)), vectors)], len(vectors), segment_size=400, boundary_window=15)
    many = method.detect(windows(vectors, 333), len(vectors), segment_size=400, boundary_window=15)
    assert one.boundaries == many.boundaries
    assert len(one.boundaries) == 49


@METHODS
def test_a_short_segment_at_the_end_of_a_block(method: ModuleType) -> None:
    # The search around it goes back to the last cut, which lies in the block before.
    lengths = [40] * (BLOCK // 40 - 1) + [22] + [40] * 10
    vectors = synthetic(np.random.default_rng(9), lengths, dim=24)
    result = method.detect(windows(vectors), len(vectors), segment_size=40)
    assert places(result) == cuts(lengths)


def test_trace_and_confidence() -> None:
    vectors = synthetic(np.random.default_rng(6), [100, 102])
    result = similarity.detect(windows(vectors), 202, segment_size=98, boundary_window=10, trace=True)
    assert result.expected == [98, 196][: len(result.expected)]
    assert result.trace[0].startswith("position 98 expected, searched 10 around: best split at 100 saves ")
    shifted = similarity.detect([(np.arange(202) + 7, vectors)], 202, segment_size=98, trace=True)
    assert shifted.trace[0].startswith("position 105 expected, searched 10 around: best split at 107 saves ")
    assert 0.5 < result.boundaries[0].confidence < 1


def test_few_samples_get_fewer_gaussians() -> None:
    vectors = synthetic(np.random.default_rng(7), [30] * 5)
    result = mixture.detect(windows(vectors), 150, segment_size=30, boundary_window=3, components=4)
    assert places(result) == cuts([30] * 5)
    assert any(note == "1 instead of 4 Gaussians on a side of few files (4 of 4 places)" for note in result.notes)


def test_a_fit_that_fails_falls_back_to_cosine_and_says_so() -> None:
    vectors = synthetic(np.random.default_rng(8), [5, 5, 5], noise=0.02)
    options = {"segment_size": 5, "boundary_window": 2}
    result = mixture.detect(windows(vectors), 15, **options)
    assert places(result) == places(similarity.detect(windows(vectors), 15, **options)) == [5, 10]
    assert result.notes[0].startswith("no mixture, judged by cosine instead: fewer than 5 files on one side")


@pytest.mark.parametrize("name", ["segment_size", "boundary_window", "components"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, and must be 1 or more"):
        mixture.detect([], 0, **{name: 0})
