"""Ordered sets of one speaker after the other: synthetic ones, and ones from embeddings of real speech."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from embstore.boundaries.result import Result, Window

Floats = NDArray[np.float64]
Order = Literal["random", "keyword", "own keyword", "recordings", "drift", "own files"]
"""How the files of one speaker follow each other.

random        independent of each other
keyword       sorted by keyword, which moves every speaker's vectors alike
own keyword   20 keywords, each of which moves the speaker's vectors in a way of its own besides
recordings    8 to 24 files in a row have a quarter of the noise in common
drift         a quarter of the noise wanders slowly
own files     the speaker's few real files, drawn again and again; each once where there are enough
"""

_SHARED = 0.25
_WANDERING = 0.97


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
    rng: np.random.Generator,
    lengths: Sequence[int] | NDArray[np.int64],
    *,
    noise: float = 0.15,
    dim: int = 64,
    heavy: bool = False,
    common: float = 0.0,
) -> NDArray[np.float32]:
    """A random direction a speaker, and noise around it whose squared length is `noise` in the mean.

    `heavy`: the noise has Student's t distribution with three degrees of freedom, of that scale. `common`: so long is a
    part that all speakers share, beside their own of length 1.
    """
    rows = []
    shared = common * rng.normal(size=dim) if common else np.zeros(dim)
    for length in lengths:
        mean = rng.normal(size=dim) + shared
        size = (length, dim)
        spread = rng.standard_t(3, size) / np.sqrt(3) if heavy else rng.normal(size=size)
        rows.append(mean / np.linalg.norm(mean) + spread * np.sqrt(noise / dim))
    return np.concatenate(rows).astype(np.float32)


@dataclass
class RealSpeech:
    """Embeddings of real utterances, of which there are too few for long segments.

    So a file is its speaker's real mean plus the real deviation of some file from the mean of its speaker, drawn from
    all speakers of the same kind of speech who have at least eight files.
    """

    files: dict[str, Floats]
    """[files, dim] of each speaker."""
    deviations: Floats
    keywords: Floats
    """[words, dim]: how each word moves a vector away from its speaker's mean; empty for sentences."""
    rests: Floats
    """[files, dim]: what is left of the deviations without the word."""

    @classmethod
    def load(cls, test_data: Path, *sources: str) -> RealSpeech:
        """Resemblyzer's, from the golden file; `sources` are folders of the test data."""
        stored = np.load(test_data / "resemblyzer-golden.npz")
        return cls.of_files([str(path) for path in stored["path"]], stored["emb"], *sources)

    @classmethod
    def of_files(
        cls, paths: Sequence[str], embeddings: NDArray[np.float32], *sources: str, half: int | None = None
    ) -> RealSpeech:
        """`paths` are source/speaker/word_number.wav. `half` 0 or 1: every other speaker alone."""
        chosen = [i for i, path in enumerate(paths) if path.split("/")[0] in sources]
        vectors = embeddings[chosen].astype(np.float64)
        speakers = [paths[i].rsplit("/", 1)[0] for i in chosen]
        words = [_word(paths[i]) for i in chosen]
        rows = {name: np.array([s == name for s in speakers]) for name in dict.fromkeys(speakers)}
        means = {name: vectors[at].mean(axis=0) for name, at in rows.items()}
        mine = list(rows) if half is None else list(rows)[half::2]
        many = [name for name in rows if rows[name].sum() >= 8]
        many = [name for name in mine if name in many] or many
        deviations = np.concatenate([_deviations(vectors[rows[name]]) for name in many])
        away = vectors - np.stack([means[name] for name in speakers])
        by_word = [away[[w == word for w in words]] for word in sorted(set(words)) if words.count(word) >= 3]
        empty = np.empty((0, vectors.shape[1]))
        keywords = np.stack([group.mean(axis=0) for group in by_word]) if by_word else empty
        rests = np.concatenate([_deviations(group) for group in by_word]) if by_word else empty
        return cls({name: vectors[rows[name]] for name in mine}, deviations, keywords, rests)

    @property
    def means(self) -> dict[str, Floats]:
        """Mean vector of each speaker."""
        return {name: rows.mean(axis=0) for name, rows in self.files.items()}

    def draw(
        self, rng: np.random.Generator, lengths: NDArray[np.int64], *, order: Order = "random"
    ) -> NDArray[np.float32]:
        """Random speakers one after the other."""
        rows, last = [], ""
        for length in lengths:
            last = str(rng.choice([name for name in self.files if name != last]))
            rows.append(self.of(rng, last, int(length), order=order))
        return np.concatenate(rows)

    def of(
        self, rng: np.random.Generator, speaker: str, length: int, *, order: Order = "random"
    ) -> NDArray[np.float32]:
        """Files of one speaker."""
        own = self.files[speaker]
        if order == "own files":
            rows = own[rng.permutation(len(own))[:length] if length <= len(own) else rng.choice(len(own), length)]
        else:
            rows = own.mean(axis=0) + self._away(rng, length, order)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def _away(self, rng: np.random.Generator, length: int, order: Order) -> Floats:
        if order == "random":
            return self._some(rng, self.deviations, length)
        if order == "keyword":
            words = np.sort(rng.integers(len(self.keywords), size=length))
            return self.keywords[words] + self._some(rng, self.rests, length)
        if order == "own keyword":
            known = rng.choice(len(self.keywords), min(len(self.keywords), 20), replace=False)
            words = np.sort(rng.integers(len(known), size=length))
            said = self.keywords[known] + np.sqrt(0.3) * self._some(rng, self.rests, len(known))
            return said[words] + np.sqrt(0.7) * self._some(rng, self.rests, length)
        shared = self._recordings(rng, length) if order == "recordings" else self._drift(rng, length)
        return np.sqrt(_SHARED) * shared + np.sqrt(1 - _SHARED) * self._some(rng, self.deviations, length)

    def _recordings(self, rng: np.random.Generator, length: int) -> Floats:
        rows: list[Floats] = []
        while len(rows) < length:
            rows += [self._some(rng, self.deviations, 1)[0]] * int(rng.integers(8, 25))
        return np.stack(rows[:length])

    def _drift(self, rng: np.random.Generator, length: int) -> Floats:
        steps = np.sqrt(1 - _WANDERING**2) * self._some(rng, self.deviations, length)
        for before, step in pairwise(steps):
            step += _WANDERING * before
        return steps

    @staticmethod
    def _some(rng: np.random.Generator, rows: Floats, count: int) -> Floats:
        chosen: Floats = rows[rng.integers(len(rows), size=count)]
        return chosen


def _word(path: str) -> str:
    """What a file says, by its name: `zoom_in_03.wav` of any speaker, `7_lucas_2.wav` of Lucas."""
    _, speaker, name = path.rsplit("/", 2)
    return name.rsplit("_", 1)[0].removesuffix(f"_{speaker}")


def _deviations(rows: Floats) -> Floats:
    """From the mean, of the size they have from the true mean."""
    deviations: Floats = (rows - rows.mean(axis=0)) * np.sqrt(len(rows) / (len(rows) - 1))
    return deviations
