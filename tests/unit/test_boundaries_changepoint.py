"""Method auto: real and synthetic sets, the odd cases, and that it is the optimum it claims to be."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from ordered_sets import Order, RealSpeech, cuts, places, synthetic, windows

from embstore.boundaries import exact
from embstore.boundaries.changepoint import detect
from embstore.boundaries.evaluate import matches
from embstore.boundaries.partition import Partition, Place
from embstore.boundaries.result import Result
from embstore.boundaries.stream import BLOCK

READERS = ("librispeech", "librispeech-cut")
WORDS = ("arabic-speech-commands",)


def auto(vectors: NDArray[np.float32], **options: object) -> Result:
    return detect(windows(vectors), len(vectors), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("sources", [READERS, WORDS, ("free-spoken-digits",)], ids=["sentences", "words", "digits"])
@pytest.mark.parametrize(("least", "most"), [(30, 60), (30, 400)])
def test_real_speech(test_data: Path, sources: tuple[str, ...], least: int, most: int) -> None:
    speech = RealSpeech.load(test_data, *sources)
    true = found = agreed = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(least, most, 30)
        ours = places(auto(speech.draw(rng, lengths)))
        true, found = true + 29, found + len(ours)
        agreed += matches(ours, cuts(lengths), 1)
    assert agreed / true >= 0.98
    assert agreed / found >= 0.98


@pytest.mark.parametrize(("size", "speakers"), [(45, 30), (200, 20), (400, 10), (500, 8), (1000, 6), (3000, 4)])
def test_sorted_by_keyword_within_a_speaker(test_data: Path, size: int, speakers: int) -> None:
    speech = RealSpeech.load(test_data, *WORDS)
    true = found = agreed = 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(int(0.8 * size), int(1.2 * size), speakers)
        ours = places(auto(speech.draw(rng, lengths, order="keyword")))
        true, found = true + speakers - 1, found + len(ours)
        agreed += matches(ours, cuts(lengths), 1)
    assert agreed / true >= 0.98
    assert agreed / found >= 0.98


@pytest.mark.parametrize(("seed", "lengths", "order"), [(2, (60, 100, 16), "random"), (1, (800, 1200, 4), "keyword")])
def test_speakers_who_differ_less_than_words_do(
    test_data: Path, seed: int, lengths: tuple[int, int, int], order: Order
) -> None:
    """Draws in which most neighbours are two of three similar speakers."""
    stored = np.load(test_data / "resemblyzer-golden.npz")
    paths = [str(path) for path in stored["path"]]
    speech = RealSpeech.of_files(paths, stored["emb"], *WORDS, half=1)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(*lengths)
    assert places(auto(speech.draw(rng, drawn, order=order))) == cuts(drawn)


def test_the_real_files_themselves(test_data: Path) -> None:
    """Nothing drawn, nothing repeated: each speaker's one-second words once, in random orders, 30 a speaker."""
    stored = np.load(test_data / "resemblyzer-golden.npz")
    by_speaker: dict[str, list[int]] = {}
    for i, path in enumerate(stored["path"]):
        if str(path).startswith(WORDS[0]):
            by_speaker.setdefault(str(stored["speaker"][i]), []).append(i)
    assert {len(rows) for rows in by_speaker.values()} == {30}
    found = agreed = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        order = [i for who in rng.permutation(list(by_speaker)) for i in rng.permutation(by_speaker[str(who)])]
        ours = places(auto(stored["emb"][order]))
        found, agreed = found + len(ours), agreed + matches(ours, cuts([30] * 8), 1)
    assert agreed >= 0.98 * 20 * 7
    assert agreed >= 0.98 * found


def test_one_speaker_sorted_by_keyword_has_no_boundary(test_data: Path) -> None:
    speech = RealSpeech.load(test_data, *WORDS)
    for seed, speaker in enumerate(speech.means):
        assert places(auto(speech.of(np.random.default_rng(seed), speaker, 1000, order="keyword"))) == []


@pytest.mark.parametrize("runs", [False, True], ids=["drift", "recordings"])
def test_what_changes_slowly_within_a_speaker_is_no_boundary(runs: bool) -> None:
    """A quarter of the noise is shared by the files of a recording, or drifts."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(150, 250, 20)
        vectors = synthetic(rng, lengths, noise=0.15).astype(np.float64)
        shared = np.zeros(64)
        for row in vectors:
            fresh = rng.normal(size=64) * np.sqrt(0.05 / 64)
            if runs:
                shared = fresh if rng.random() < 1 / 16 else shared
            else:
                shared = 0.97 * shared + np.sqrt(1 - 0.97**2) * fresh
            row += shared
        ours = places(auto(vectors.astype(np.float32)))
        assert matches(ours, cuts(lengths), 1) >= 0.95 * 19
        assert len(ours) == 19


def test_speakers_sorted_by_likeness_stay_speakers(test_data: Path) -> None:
    # The step that sees through keywords must not take a group of similar speakers for one.
    speech = RealSpeech.load(test_data, *READERS)
    means = np.stack(list(speech.means.values()))
    axis = np.linalg.svd(means - means.mean(axis=0))[2][0]
    names = sorted(speech.means, key=lambda name: float(speech.means[name] @ axis))
    rng = np.random.default_rng(0)
    order = [names[i % 12] for i in range(40)] + [names[12 + i % 12] for i in range(40)]
    lengths = rng.integers(40, 80, len(order))
    vectors = np.concatenate([speech.of(rng, who, int(n)) for who, n in zip(order, lengths, strict=True)])
    assert places(auto(vectors)) == cuts(lengths)


def test_synthetic_sets() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        lengths = np.clip(np.exp(rng.normal(4.5, 1, 40)), 30, 2000).astype(int)
        assert places(auto(synthetic(rng, lengths))) == cuts(lengths)


def test_how_it_is_cut_into_windows_has_no_influence() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(50, 400, 100)
    vectors = synthetic(rng, lengths, dim=16)
    assert len(vectors) > 2 * BLOCK
    one = detect([(np.arange(len(vectors)), vectors)], len(vectors))
    many = detect(windows(vectors, 777), len(vectors))
    assert one.boundaries == many.boundaries
    assert np.array_equal(one.scores, many.scores)
    assert places(one) == cuts(lengths)


def test_lengths_of_vectors_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    vectors = synthetic(rng, [60, 60, 60])
    scaled = vectors * rng.uniform(0.1, 30, len(vectors)).astype(np.float32)[:, None]
    assert places(auto(vectors)) == places(auto(scaled)) == [60, 120]


def test_one_speaker_has_no_boundary(test_data: Path) -> None:
    speech = RealSpeech.load(test_data, *READERS, *WORDS)
    for seed, speaker in enumerate(speech.means):
        assert places(auto(speech.of(np.random.default_rng(seed), speaker, 500))) == []
    assert places(auto(synthetic(np.random.default_rng(0), [20_000], dim=16))) == []


@pytest.mark.parametrize("items", [0, 1, 2, 3])
@pytest.mark.parametrize("num_speakers", [None, 1, 2])
def test_hardly_any_items(items: int, num_speakers: int | None) -> None:
    vectors = synthetic(np.random.default_rng(0), [3])[:items]
    result = auto(vectors, num_speakers=num_speakers)
    assert result.boundaries == []
    assert result.scores.shape == result.positions.shape == (items,)


def test_all_vectors_equal() -> None:
    vectors = np.ones((500, 8), np.float32)
    assert places(auto(vectors)) == []
    vectors[250:] = -1
    assert places(auto(vectors)) == [250]


def test_zeros_are_no_fault() -> None:
    vectors = synthetic(np.random.default_rng(0), [50, 50])
    vectors[[10, 70]] = 0
    assert places(auto(vectors)) == [50]


def test_an_outlier_is_no_speaker() -> None:
    for noise in (0.001, 0.01, 0.15):
        vectors = synthetic(np.random.default_rng(3), [100, 1, 99, 100], noise=noise)
        vectors[101:200] += vectors[:100].mean(axis=0) - vectors[101:200].mean(axis=0)
        assert places(auto(vectors)) == [200]


def test_five_percent_foreign_files(test_data: Path) -> None:
    speech = RealSpeech.load(test_data, *READERS)
    true = found = agreed = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(30, 200, 30)
        vectors = speech.draw(rng, lengths)
        foreign = rng.choice(len(vectors), len(vectors) // 20, replace=False)
        vectors[foreign] = speech.draw(rng, np.ones(len(foreign), np.int64))
        ours = places(auto(vectors))
        true, found = true + 29, found + len(ours)
        agreed += matches(ours, cuts(lengths), 5)
    assert agreed / true >= 0.98
    assert agreed / found >= 0.98


def test_missing_vectors_shift_nothing() -> None:
    vectors = synthetic(np.random.default_rng(4), [100, 100, 100])
    there = np.ones(300, dtype=bool)
    there[95:110] = there[150:160] = False
    positions = np.flatnonzero(there)
    result = detect([(positions, vectors[there])], len(positions))
    # The first file of the second speaker that has a vector.
    assert places(result) == [110, 200]
    assert np.array_equal(result.positions, positions)


def test_two_speakers_who_alternate() -> None:
    rng = np.random.default_rng(5)
    both = [synthetic(rng, [1], noise=0)[0] for _ in range(2)]
    rows = [both[i % 2] + rng.normal(size=(40, 64)) * 0.05 for i in range(20)]
    assert places(auto(np.concatenate(rows).astype(np.float32))) == cuts([40] * 20)


def test_scores_and_confidence() -> None:
    vectors = synthetic(np.random.default_rng(6), [100, 100])
    result = auto(vectors, trace=True)
    (boundary,) = result.boundaries
    assert boundary.score == result.scores[100] == result.scores.max()
    assert 0.5 < boundary.confidence < 1
    assert result.scores[0] == 0
    expected = 1 - _cosine(vectors, 60)
    assert result.scores[60] == pytest.approx(expected, abs=1e-5)
    kept = [line for line in result.trace if not line.startswith("no ")]
    assert len(kept) == 1
    assert kept[0].startswith("cut at position 100: 100 before and 100 after; saves ")


def _cosine(vectors: NDArray[np.float32], at: int) -> float:
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    left, right = units[at - 20 : at].mean(axis=0), units[at : at + 20].mean(axis=0)
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


def test_more_penalty_finds_less() -> None:
    vectors = synthetic(np.random.default_rng(7), [6] * 40, noise=0.3)
    found = [len(auto(vectors, beta=beta).boundaries) for beta in (0.5, 1.5, 5, 50)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1] == 0


def test_wrong_input_is_refused() -> None:
    vectors = np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match="positions do not rise around 0"):
        detect([(np.array([0, 2, 1, 3]), vectors)], 4)
    with pytest.raises(ValueError, match="positions do not rise around 0"):
        detect([(np.arange(4), vectors), (np.arange(4), vectors)], 8)
    vectors[2, 1] = np.nan
    with pytest.raises(ValueError, match="vector 2 of a window is not finite"):
        detect([(np.arange(4), vectors)], 4)
    with pytest.raises(ValueError, match=r"beta 0, .* must be positive"):
        detect([], 0, beta=0)


# What is optimal, by trying everything


def _cost(rows: NDArray[np.float64], edges: tuple[int, ...]) -> float:
    parts = np.split(rows, edges)
    return float(sum(((part - part.mean(axis=0)) ** 2).sum() for part in parts))


def _places(rows: NDArray[np.float64], penalty: float) -> list[Place]:
    return [Place(i, rows[:i].sum(axis=0), i, float((rows[:i] ** 2).sum()), penalty) for i in range(len(rows) + 1)]


@pytest.mark.parametrize("least", [1, 2, 3])
def test_the_partition_is_the_best_of_all(least: int) -> None:
    for seed in range(10):
        rows = np.random.default_rng(seed).normal(size=(10, 2))
        penalty = (0.3, 1.0, 2.0)[seed % 3]
        points = _places(rows, penalty)
        partition = Partition(points[0], least=least)
        found = []
        for place in points[1:-1]:
            partition.add(place)
            found += list(partition.settled())
        found += list(partition.finish(points[-1]))
        ours = tuple(segment.begin.row for segment in found[1:])
        best = min(
            (_cost(rows, edges) + penalty * count, edges)
            for count in range(10)
            for edges in combinations(range(1, 10), count)
            if (np.diff([0, *edges, 10]) >= least).all()
        )
        assert _cost(rows, ours) + penalty * len(ours) == pytest.approx(best[0])


@pytest.mark.parametrize("segments", [1, 2, 3, 4])
def test_a_known_number_is_the_best_of_all(segments: int) -> None:
    for seed in range(10):
        rows = np.random.default_rng(seed).normal(size=(12, 2))
        points = _places(rows, 0)
        pool = exact.Pool(segments, 2)
        pool.add(points[2:-1], [1.0] * len(points[2:-1]), points[-1])
        found, _ = pool.solve()
        best = min(
            _cost(rows, edges)
            for edges in combinations(range(1, 12), segments - 1)
            if (np.diff([0, *edges, 12]) >= 2).all()
        )
        assert _cost(rows, tuple(segment.begin.row for segment in found[1:])) == pytest.approx(best)


def test_a_known_number_of_speakers() -> None:
    rng = np.random.default_rng(8)
    lengths = rng.integers(20, 60, 30)
    vectors = synthetic(rng, lengths, noise=0.4)
    result = auto(vectors, num_speakers=30)
    assert places(result) == cuts(lengths)
    assert result.notes == ["30 segments asked for: the best partition"]
    assert len(auto(vectors, num_speakers=12).boundaries) == 11


def test_a_known_number_among_very_many_places() -> None:
    rng = np.random.default_rng(9)
    lengths = rng.integers(5, 12, 600)
    vectors = synthetic(rng, lengths, noise=0.2, dim=32)
    result = auto(vectors, num_speakers=600)
    assert len(result.boundaries) == 599
    assert matches(places(result), cuts(lengths), 1) >= 0.98 * 599
    assert len(auto(vectors, num_speakers=500).boundaries) == 499
