"""Tables as Kaldi folders.

    embeddings    embeddings.ark, .scp; utt2spk, wav.scp, and segments where items are stretches
    centroids     centroids.ark, .scp, keyed by speaker; num_utts
    boundaries    boundaries.ark, .scp: an utterance's score, and its confidence if a boundary is before it;
                  boundaries.utt2spk: the segments' labels

An utterance is named by its path, and `@START` for a stretch; blanks are written `%20`. The facts are in KIND.json.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from embstore.errors import UsageError
from embstore.sources.kaldi import read_recordings
from embstore.sources.listed import read_lines
from embstore.transfer import ark
from embstore.transfer.csvs import facts_beside
from embstore.transfer.files import of_utterance_id, one_word, utterance_id, whole
from embstore.transfer.table import Batch, Kind, Spot, Table

_BYTES = 20_000_000
_ROWS = 20_000
_NONE = math.nan


def write(folder: Path, table: Table) -> Path:
    """Write the table into the folder; returns the path of the archive."""
    kind = table.facts.kind
    path = folder / f"{kind}.ark"
    if kind == "embeddings" and not table.segmented and (folder / "segments").exists():
        raise UsageError(f"'{folder}' holds the segments of other items: name a new folder")
    with ExitStack() as stack:

        def new(name: str) -> IO[bytes]:
            return stack.enter_context(whole(folder / name))

        # The facts get their name last: without them it is some other program's.
        new(f"{kind}.json").write(table.facts.to_json().encode() + b"\n")
        archive = ark.Ark(new(path.name), new(f"{kind}.scp"), os.fspath(path))
        add = {"embeddings": _write_embeddings, "centroids": _write_centroids, "boundaries": _write_boundaries}[kind]
        add(table, archive, new)
    return path


New = Callable[[str], IO[bytes]]


def _write_embeddings(table: Table, archive: ark.Ark, new: New) -> None:
    root = (table.facts.root or "").rstrip("/")
    speakers, recordings = new("utt2spk"), new("wav.scp")
    segments = new("segments") if table.segmented else None
    known: set[str] = set()
    for batch in table.batches:
        columns = (batch["path"], batch["start"].tolist(), batch["duration"].tolist(), batch["speaker"])
        rows = zip(*columns, batch["embedding"], strict=True)
        for path, start, duration, speaker, vector in rows:
            key = utterance_id(path, _or_none(start))
            archive.add(key, vector)
            if speaker is not None:
                speakers.write(f"{key} {one_word(speaker)}\n".encode())
            recording = one_word(path) if segments else key
            if segments:
                end = -1 if math.isnan(duration) else round(_or_zero(start) + duration, 9)
                segments.write(f"{key} {recording} {_or_zero(start)!r} {end!r}\n".encode())
                if recording in known:
                    continue
                known.add(recording)
            recordings.write(f"{recording} {root}/{path}\n".encode())


def _write_centroids(table: Table, archive: ark.Ark, new: New) -> None:
    numbers = new("num_utts")
    for batch in table.batches:
        rows = zip(batch["speaker"], batch["num_utterances"].tolist(), batch["embedding"], strict=True)
        for speaker, number, vector in rows:
            archive.add(one_word(speaker), vector)
            numbers.write(f"{one_word(speaker)} {number}\n".encode())


def _write_boundaries(table: Table, archive: ark.Ark, new: New) -> None:
    speakers = new("boundaries.utt2spk")
    for batch in table.batches:
        columns = (batch["path"], batch["start"].tolist(), batch["voice"].tolist())
        pairs = np.stack([batch["score"], batch["confidence"]], axis=1)
        for path, start, voice, pair in zip(*columns, pairs, strict=True):
            key = utterance_id(path, _or_none(start))
            archive.add(key, pair[:1] if np.isnan(pair[1]) else pair)
            speakers.write(f"{key} speaker_{voice:03}\n".encode())


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


class Reader:
    """An archive or a script file, with what lies beside it. Raises UsageError where that cannot be read."""

    def __init__(self, path: Path, kind: Kind) -> None:
        self._path, self._kind = path, kind
        folder = path.parent
        self.facts = facts_beside(path, kind)
        first = next(ark.read(path), None)
        self.dim = 0 if first is None or kind == "boundaries" else len(first[1])
        self._speakers = _words(folder / ("boundaries.utt2spk" if kind == "boundaries" else "utt2spk"))
        self._numbers = _words(folder / "num_utts") if kind == "centroids" else {}
        self._place = _own if self.facts else _foreign(folder)
        self._durations = _durations(folder) if self.facts and kind == "embeddings" else {}

    def where(self, row: str) -> str:
        """Name a row."""
        return f"'{self._path.name}' entry '{row}'"

    def batches(self, spot: Callable[[Spot], None]) -> Iterator[Batch]:
        """The entries; those that stand for nothing, or are of another length, are left out and told of."""
        size = max(1, min(_ROWS, _BYTES // (4 * self.dim + 200)))
        entries = ark.read(self._path)
        make = {"embeddings": self._embeddings, "centroids": self._centroids, "boundaries": self._boundaries}
        while piece := list(islice(entries, size)):
            batch = make[self._kind](list(self._good(piece, spot)))
            if batch["row"]:
                yield batch

    def _good(self, entries: list[ark.Entry], spot: Callable[[Spot], None]) -> Iterator[tuple[str, Any, Any]]:
        for key, vector in entries:
            if self.dim and len(vector) != self.dim:
                spot(Spot(self.where(key), f"a vector of {len(vector)} values among those of {self.dim}"))
                continue
            if not self.dim and len(vector) not in (1, 2):
                spot(Spot(self.where(key), f"{len(vector)} values, where a score and a confidence are expected"))
                continue
            try:
                yield key, self._place(key), vector
            except ValueError as error:
                spot(Spot(self.where(key), str(error)))

    def _embeddings(self, rows: list[tuple[str, Any, Any]]) -> Batch:
        keys = [key for key, _, _ in rows]
        # Of ours, the place says the start, and `segments` how long it is.
        durations = [self._durations.get(key, place[2]) for key, place, _ in rows]
        return {
            "row": keys,
            "path": [place[0] for _, place, _ in rows],
            "start": np.array([place[1] for _, place, _ in rows], dtype=np.float64),
            "duration": np.array(durations, dtype=np.float64),
            "speaker": [self._speaker(key) for key in keys],
            "embedding": _stacked(rows),
        }

    def _centroids(self, rows: list[tuple[str, Any, Any]]) -> Batch:
        numbers = [self._numbers.get(key, "") for key, _, _ in rows]
        return {
            "row": [key for key, _, _ in rows],
            "speaker": [place[0] for _, place, _ in rows],
            "embedding": _stacked(rows),
            "num_utterances": np.array([int(n) if n.isdecimal() else -1 for n in numbers], dtype=np.int64),
        }

    def _boundaries(self, rows: list[tuple[str, Any, Any]]) -> Batch:
        voices = [(self._speaker(key) or "").rpartition("_")[2] for key, _, _ in rows]
        return {
            "row": [key for key, _, _ in rows],
            "path": [place[0] for _, place, _ in rows],
            "start": np.array([place[1] for _, place, _ in rows], dtype=np.float64),
            "score": np.array([vector[0] for _, _, vector in rows], dtype=np.float32),
            "confidence": np.array([vector[1] if len(vector) > 1 else _NONE for _, _, vector in rows], np.float32),
            "voice": np.array([int(v) if v.isdecimal() else -1 for v in voices], dtype=np.int64),
        }

    def _speaker(self, key: str) -> str | None:
        word = self._speakers.get(key)
        return word if word is None or not self.facts else of_utterance_id(word)[0]


Place = tuple[str, float, float]
"""Path, start and duration; NaN for none."""


def _stacked(rows: list[tuple[str, Any, Any]]) -> Any:
    return np.stack([vector for _, _, vector in rows]) if rows else np.empty((0, 0), dtype=np.float32)


def _own(key: str) -> Place:
    path, start = of_utterance_id(key)
    return path, _NONE if start is None else start, _NONE


def _foreign(folder: Path) -> Callable[[str], Place]:
    """How another program's utterances are found: by `wav.scp` and `segments` if they are there, or else by name."""
    if not (folder / "wav.scp").is_file():
        return lambda key: (key, _NONE, _NONE)
    recordings = read_recordings(folder, None)
    root = os.fspath(recordings.root).rstrip("/")
    paths = {name: f"{root}/{path}" for name, (_, path) in recordings.paths.items()}
    stretches = dict(_stretches(folder))

    def place(key: str) -> Place:
        recording, start, duration = stretches.get(key, (key, _NONE, _NONE))
        if recording not in paths:
            raise ValueError("it has no usable line in wav.scp" if not stretches else "it has no line in segments")
        return paths[recording], start, duration

    return place


def _durations(folder: Path) -> dict[str, float]:
    return {key: duration for key, (_, _, duration) in _stretches(folder)}


def _stretches(folder: Path) -> Iterator[tuple[str, tuple[str, float, float]]]:
    """Recording, start and duration of each utterance in `segments`, if that is there."""
    if not (folder / "segments").is_file():
        return
    for line, text in enumerate(read_lines(folder / "segments"), 1):
        words = text.split()
        try:
            key, recording, start, end = words[0], words[1], float(words[2]), float(words[3])
        except (IndexError, ValueError):
            if not words:
                continue
            raise UsageError(f"'{folder / 'segments'}' line {line} is not utterance, recording, start, end") from None
        yield key, (recording, start, _NONE if end == -1 else round(end - start, 9))


def _words(path: Path) -> dict[str, str]:
    """The word behind each key, of a file that may be missing."""
    if not path.is_file():
        return {}
    lines = (text.split(maxsplit=1) for text in read_lines(path))
    return {words[0]: words[1].strip() for words in lines if len(words) == 2}
