"""Ordered sets of one speaker after the other: synthetic ones, and ones from embeddings of real speech."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.boundaries.result import Result, Window

Floats = NDArray[np.float64]


def windows(vectors: NDArray[np.float32], size: int = 1000) -> Iterator[Window]:
    """The set as the methods get it, positions from 0."""
    for begin in range(0, len(vectors), size):
        piece = vectors[begin : begin + size]
        yield np.arange(begin, begin + len(piece)), piece


def places(result: Result) -> list[int]:
    return [boundary.position for boundary in result.boundaries]


def cuts(lengths: Sequence[int] | NDArray[np.int64]) -> list[int]:
    return [int(place) for place in np.cumsum(lengths)[:-1]]


def synthetic(
    rng: np.random.Generator, lengths: Sequence[int] | NDArray[np.int64], *, noise: float = 0.15, dim: int = 64
) -> NDArray[np.float32]:
    """A random direction a speaker, and noise around it whose squared length is `noise` in the mean."""
    rows = []
    for length in lengths:
        mean = rng.normal(size=dim)
        rows.append(mean / np.linalg.norm(mean) + rng.normal(size=(length, dim)) * np.sqrt(noise / dim))
    return np.concatenate(rows).astype(np.float32)


@dataclass
class RealSpeech:
    """Resemblyzer's embeddings of real utterances, of which there are too few for long segments.

    So a file is its speaker's real mean plus the real deviation of some file from the mean of its speaker, drawn from
    all speakers of the same kind of speech who have at least eight files.
    """

    means: dict[str, Floats]
    deviations: Floats
    keywords: Floats
    """[words, dim]: how each word moves a vector away from its speaker's mean; empty for sentences."""
    rests: Floats
    """[files, dim]: what is left of the deviations without the word."""

    @classmethod
    def load(cls, test_data: Path, *sources: str) -> RealSpeech:
        stored = np.load(test_data / "resemblyzer-golden.npz")
        chosen = [i for i, path in enumerate(stored["path"]) if str(path).split("/")[0] in sources]
        vectors = stored["emb"][chosen].astype(np.float64)
        speakers = [str(stored["speaker"][i]) for i in chosen]
        words = [str(stored["path"][i]).rsplit("/", 1)[1].rsplit("_", 1)[0] for i in chosen]
        rows = {name: np.array([s == name for s in speakers]) for name in dict.fromkeys(speakers)}
        means = {name: vectors[at].mean(axis=0) for name, at in rows.items()}
        deviations = np.concatenate([_deviations(vectors[at]) for at in rows.values() if at.sum() >= 8])
        away = vectors - np.stack([means[name] for name in speakers])
        by_word = [away[[w == word for w in words]] for word in sorted(set(words)) if words.count(word) >= 3]
        empty = np.empty((0, vectors.shape[1]))
        keywords = np.stack([group.mean(axis=0) for group in by_word]) if by_word else empty
        rests = np.concatenate([_deviations(group) for group in by_word]) if by_word else empty
        return cls(means, deviations, keywords, rests)

    def draw(self, rng: np.random.Generator, lengths: NDArray[np.int64], *, sort: bool = False) -> NDArray[np.float32]:
        """Random speakers one after the other; `sort`: each one's files are sorted by keyword."""
        rows, last = [], ""
        for length in lengths:
            last = str(rng.choice([name for name in self.means if name != last]))
            rows.append(self.of(rng, last, int(length), sort=sort))
        return np.concatenate(rows)

    def of(self, rng: np.random.Generator, speaker: str, length: int, *, sort: bool = False) -> NDArray[np.float32]:
        """Files of one speaker."""
        rows = np.tile(self.means[speaker], (length, 1))
        if sort:
            rows += self.keywords[np.sort(rng.integers(len(self.keywords), size=length))]
            rows += self.rests[rng.integers(len(self.rests), size=length)]
        else:
            rows += self.deviations[rng.integers(len(self.deviations), size=length)]
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _deviations(rows: Floats) -> Floats:
    """From the mean, of the size they have from the true mean."""
    deviations: Floats = (rows - rows.mean(axis=0)) * np.sqrt(len(rows) / (len(rows) - 1))
    return deviations
