"""How many boundaries each method finds, and how many of those it finds are right, on sets whose truth is known.

SPEECH is a folder of recordings, source/speaker/word_number.wav, as embstore's test data have it. embstore embeds them
in a database of its own (--embeddings FILE.npz keeps the vectors for the next call). From these and from synthetic
vectors, ordered sets are drawn: each file is the real mean of its speaker and the real deviation of a file from its
speaker's mean, in random orders and lengths; `tests/ordered_sets.py` says how. Printed for each kind of set and each
method: precision, recall and F1, exact, within 1 and within 5 files, over all sets of that kind.

A kind is called source/lengths/order. Lengths: 30-60 is any number between, 1000~25 a normal distribution of that mean
and deviation, 30..2000 a log-normal one with the median 90, cut off at those. `cosine` and `gmm` are asked for the
mean as segment size, and have a window of 10 files unless the kind says otherwise.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import server
from numpy.typing import NDArray

from embstore import catalog, vectors
from embstore.boundaries import changepoint, mixture, similarity
from embstore.boundaries.evaluate import matches
from embstore.boundaries.result import Result
from embstore.db.engine import Database
from embstore.settings import Settings

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ordered_sets import Order, RealSpeech, cuts, places, synthetic, windows

SENTENCES = ("librispeech", "librispeech-cut")
SOURCES = {
    "sentences": SENTENCES,
    "words": ("arabic-speech-commands",),
    "digits": ("free-spoken-digits",),
    "mixed": (*SENTENCES, "arabic-speech-commands", "free-spoken-digits"),
}
SYNTHETIC: dict[str, dict[str, Any]] = {
    "synthetic": {},
    "loud": {"noise": 0.4},
    "heavy-tailed": {"heavy": True},
    "16-d": {"dim": 16},
    "alike": {"common": 1.5, "noise": 0.2, "dim": 192},
}
TOLERANCES = (0, 1, 5)
METHODS: dict[str, Callable[..., Result]] = {
    "auto": changepoint.detect,
    "cosine": similarity.detect,
    "gmm": mixture.detect,
}
AROUND = ("cosine", "gmm")


@dataclass(frozen=True)
class Kind:
    """A kind of set."""

    source: str
    lengths: str
    order: Order = "random"
    segments: int = 30
    foreign: float = 0.0
    """Share of the files that are somebody else's, each another's."""
    methods: tuple[str, ...] = ("auto",)

    @property
    def name(self) -> str:
        """As it is printed."""
        more = f", {self.foreign:.0%} foreign" if self.foreign else ", alone" if self.segments == 1 else ""
        return f"{self.source}/{self.lengths}/{self.order}{more}"

    @property
    def size(self) -> int:
        """The mean length."""
        return int(self.lengths.split("~")[0])

    def draw_lengths(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Files of each segment."""
        if self.lengths == "30..2000":
            drawn = np.clip(np.exp(rng.normal(4.5, 1, self.segments)), 30, 2000)
        elif "~" in self.lengths:
            mean, deviation = map(float, self.lengths.split("~"))
            drawn = np.maximum(1, np.rint(rng.normal(mean, deviation, self.segments)))
        elif "-" in self.lengths:
            least, most = map(int, self.lengths.split("-"))
            drawn = rng.integers(least, most + 1, self.segments)
        else:
            drawn = np.full(self.segments, int(self.lengths))
        return drawn.astype(np.int64)


def kinds() -> list[Kind]:
    """Those that are measured."""
    found = [
        Kind(s, n) for s in ("sentences", "words", "digits", "mixed") for n in ("30", "30-60", "30-400", "30..2000")
    ]
    for lengths, segments in (
        ("36-54", 30), ("80-120", 30), ("160-240", 20), ("320-480", 10), ("800-1200", 6), ("2400-3600", 4),
        ("30-400", 30), ("30..2000", 30),
    ):  # fmt: skip
        found.append(Kind("words", lengths, "keyword", segments))
        if segments > 4 and lengths != "36-54":
            found.append(Kind("words", lengths, "own keyword", segments))
    found += [Kind("sentences", "30-60", "recordings")]
    found += [Kind(s, "160-240", order) for s in ("sentences", "words") for order in ("recordings", "drift")]  # type: ignore[arg-type]
    found += [Kind(s, "30-200", foreign=0.05) for s in ("sentences", "words")]
    found += [Kind("words", "30", "own files", 8), Kind("words", "30-60", "own files", 20)]
    found += [Kind("words", "30-400", "own files"), Kind("mixed", "30-60", "own files")]
    found += [Kind("synthetic", n) for n in ("30", "30..2000")] + [Kind("loud", n) for n in ("30", "30..2000")]
    found += [Kind("heavy-tailed", "30-400"), Kind("16-d", "30-400"), Kind("alike", "30-60")]
    found += [Kind(s, n) for s in ("sentences", "words", "mixed") for n in ("3-8", "5-15", "10-20", "15-30")]
    return found + around() + alone()


def around() -> list[Kind]:
    """Segments around a size: a fortieth of it is the deviation; ten files more or less; three times the window."""
    found = []
    for source in ("sentences", "words", "digits", "mixed", "synthetic"):
        found += [Kind(source, f"{n}~{n / 40:g}", segments=20, methods=tuple(METHODS)) for n in (60, 200, 1000)]
        found += [Kind(source, f"200~{n}", segments=20, methods=tuple(METHODS)) for n in (5, 10, 30)][1:]
    found += [Kind("words", f"{n}~{n / 40:g}", "keyword", 20, methods=tuple(METHODS)) for n in (200, 1000)]
    return found


def alone() -> list[Kind]:
    """One speaker, with nothing to find."""
    found = [Kind(s, n, segments=1) for s in ("sentences", "words") for n in ("500", "5000")]
    found += [Kind("words", n, "keyword", 1) for n in ("300", "1000", "3000")] + [Kind("digits", "500", segments=1)]
    found += [Kind("words", "1000", "own keyword", 1)]
    found += [Kind(s, "1000", o, 1) for s in ("sentences", "words") for o in ("recordings", "drift")]  # type: ignore[arg-type]
    return found + [Kind(s, "2000", segments=1) for s in ("synthetic", "heavy-tailed")]


def main() -> None:
    """Draw, detect, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("speech", type=Path, metavar="SPEECH", help="folder of recordings")
    parser.add_argument("--embeddings", type=Path, metavar="FILE.npz", help="their vectors: read, or made and kept")
    parser.add_argument("--sets", type=int, default=8, help="sets of each kind (default: 8)")
    parser.add_argument("--seed", type=int, default=1000, help="of the first set; the next one has the next")
    parser.add_argument("--half", type=int, choices=[0, 1], help="only every other speaker")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--kinds", nargs="+", metavar="PART", help="only kinds with such a part in their name")
    options = parser.parse_args()
    file = options.embeddings or Path(tempfile.mkdtemp()) / "embeddings.npz"
    if not file.exists():
        embed(options.speech, file)
    stored = np.load(file)
    draw = Drawer([str(path) for path in stored["path"]], stored["embedding"], options.half)
    seeds = range(options.seed, options.seed + options.sets)
    print(f"{'':42}{'true':>6}{'found':>7}" + "".join(f"   {words:21}" for words in ("exact", "within 1", "within 5")))
    print(f"{'':55}" + "   precis. recall  F1    " * len(TOLERANCES))
    for kind in kinds():
        if options.kinds is None or any(part in kind.name for part in options.kinds):
            for method in [m for m in kind.methods if m in options.methods]:
                print(line(kind, method, [draw(kind, seed) for seed in seeds]), flush=True)


def embed(speech: Path, file: Path) -> None:
    """Embed a folder through embstore, and keep paths and vectors."""
    with server() as settings:
        environment = os.environ | {"EMBSTORE_HOME": str(settings.home)}
        environment.pop("DATABASE_URL", None)
        command = [sys.executable, "-m", "embstore", "extract", str(speech), "--dataset", "speech"]
        subprocess.run(command, env=environment, capture_output=True, check=True)
        paths, embeddings = read(settings)
    order = np.argsort(paths)
    np.savez(file, path=np.array(paths)[order], embedding=embeddings[order])


def read(settings: Settings) -> tuple[list[str], NDArray[np.float32]]:
    """Path and vector of every file."""
    database = Database(settings)
    with database.begin() as connection:
        (pair,) = catalog.embedded(connection, "speech", None)
        model, (dataset,) = pair
        pages = list(vectors.ordered(connection, dataset.dataset_id, model.model_id, model.dim))
        names = dict(connection.exec_driver_sql("SELECT position, path FROM embstore.item").all())
    database.close()
    positions = np.concatenate([page.positions for page in pages])
    return [names[int(position)] for position in positions], np.concatenate([page.vectors for page in pages])


class Drawer:
    """Draws sets from files and their vectors."""

    def __init__(self, paths: list[str], embeddings: NDArray[np.float32], half: int | None) -> None:
        self._files = paths, embeddings
        self._half = half
        self._speech: dict[str, RealSpeech] = {}

    def __call__(self, kind: Kind, seed: int) -> tuple[NDArray[np.float32], list[int]]:
        """The vectors of a set, and its true boundaries."""
        rng = np.random.default_rng([seed, *kind.name.encode()])
        lengths = kind.draw_lengths(rng)
        if kind.source in SYNTHETIC:
            return synthetic(rng, lengths, **SYNTHETIC[kind.source]), cuts(lengths)
        speech = self._of(kind.source)
        rows = speech.draw(rng, lengths, order=kind.order)
        others = rng.choice(len(rows), int(len(rows) * kind.foreign), replace=False)
        if len(others):
            rows[others] = speech.draw(rng, np.ones(len(others), dtype=np.int64))
        return rows, cuts(lengths)

    def _of(self, source: str) -> RealSpeech:
        if source not in self._speech:
            # There are only two speakers of digits.
            half = None if source == "digits" else self._half
            self._speech[source] = RealSpeech.of_files(*self._files, *SOURCES[source], half=half)
        return self._speech[source]


def line(kind: Kind, method: str, sets: Iterable[tuple[NDArray[np.float32], list[int]]]) -> str:
    """What a method finds in sets of one kind."""
    true, found, agreed, cut = 0, 0, dict.fromkeys(TOLERANCES, 0), []
    options = {"segment_size": kind.size} if method in AROUND else {}
    for rows, truth in sets:
        ours = places(METHODS[method](windows(rows), len(rows), **options))
        true, found = true + len(truth), found + len(ours)
        cut.append(len(ours))
        for tolerance in TOLERANCES:
            agreed[tolerance] += matches(ours, truth, tolerance)
    words = f"{kind.name:34}  {method:6}{true:6,}{found:7,}"
    if kind.segments == 1:
        return f"{words}   false boundaries in {np.count_nonzero(cut)} of {len(cut)} sets"
    return words + "".join("   " + measures(agreed[tolerance], true, found) for tolerance in TOLERANCES)


def measures(agreed: int, true: int, found: int) -> str:
    """Precision, recall and F1."""
    precision, recall = agreed / found if found else 1.0, agreed / true
    return f"{precision:7.3f} {recall:6.3f} {2 * agreed / (true + found):6.3f}"


if __name__ == "__main__":
    main()
