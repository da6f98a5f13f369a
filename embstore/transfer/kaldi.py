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
from embstore.sources.kaldi import read_recordings, read_speakers
from embstore.sources.listed import read_lines
from embstore.transfer import ark
from embstore.transfer.csvs import facts_beside
from embstore.transfer.files import of_utterance_id, one_word, utterance_id, whole
from embstore.transfer.reading import Spot, Tell, batch_rows, root_of
from embstore.transfer.table import Batch, Table

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

    def __init__(self, path: Path) -> None:
        self._path = path
        folder = path.parent
        self.facts = facts_beside(path)
        self.rows = self.facts.rows if self.facts else None
        first = next(ark.read(path), None)
        self.dim = (self.facts.dim if self.facts else None) or (len(first[1]) if first else 0)
        self._speakers = read_speakers(folder / "utt2spk") if (folder / "utt2spk").is_file() else {}
        self._place, self.root = (_own(folder), root_of(self.facts)) if self.facts else _foreign(folder)

    def where(self, row: str) -> str:
        """Name a row."""
        return f"'{self._path.name}' entry '{row}'"

    def batches(self, tell: Tell) -> Iterator[Batch]:
        """The entries; those that stand for nothing, or are of another length, are left out and told of."""
        size = batch_rows(4 * self.dim + 200)
        entries = ark.read(self._path)
        while piece := list(islice(entries, size)):
            if rows := list(self._good(piece, tell)):
                yield self._batch(rows)

    def _good(self, entries: list[ark.Entry], tell: Tell) -> Iterator[tuple[str, Place, Any]]:
        for key, vector in entries:
            try:
                if len(vector) != self.dim:
                    raise ValueError(f"a vector of {len(vector)} values among those of {self.dim}")
                yield key, self._place(key), vector
            except ValueError as error:
                tell(Spot(self.where(key), str(error)))

    def _batch(self, rows: list[tuple[str, Place, Any]]) -> Batch:
        keys, places, vectors = zip(*rows, strict=True)
        paths, starts, durations = zip(*places, strict=True)
        return {
            "row": list(keys),
            "path": list(paths),
            "start": np.array(starts, dtype=np.float64),
            "duration": np.array(durations, dtype=np.float64),
            "speaker": [self._speaker(key) for key in keys],
            "embedding": np.stack(vectors),
        }

    def _speaker(self, key: str) -> str | None:
        word = self._speakers.get(key)
        return word if word is None or not self.facts else of_utterance_id(word)[0]


Place = tuple[str, float, float]
"""Path, start and duration; NaN for none."""


def _own(folder: Path) -> Callable[[str], Place]:
    """The place that the name of one of our own utterances says; how long it is stands in `segments`."""
    durations = {key: duration for key, (_, _, duration) in _stretches(folder)}

    def place(key: str) -> Place:
        path, start = of_utterance_id(key)
        return path, _NONE if start is None else start, durations.get(key, _NONE)

    return place


def _foreign(folder: Path) -> tuple[Callable[[str], Place], Path | None]:
    """How another program's utterances are found, and under which folder.

    By `wav.scp` and `segments` if they are there, or else by name.
    """
    if not (folder / "wav.scp").is_file():
        return lambda key: (key, _NONE, _NONE), None
    recordings = read_recordings(folder, None)
    root = os.fspath(recordings.root).rstrip("/")
    stretches = dict(_stretches(folder))

    def place(key: str) -> Place:
        recording, start, duration = stretches.get(key, (key, _NONE, _NONE))
        if recording not in recordings.paths:
            raise ValueError("it has no usable line in wav.scp" if not stretches else "it has no line in segments")
        return f"{root}/{recordings.paths[recording][1]}", start, duration

    return place, recordings.root


def _stretches(folder: Path) -> Iterator[tuple[str, tuple[str, float, float]]]:
    """Recording, start and duration of each utterance in `segments`, if that is there."""
    path = folder / "segments"
    for line, text in enumerate(read_lines(path) if path.is_file() else (), 1):
        words = text.split()
        if not words:
            continue
        try:
            key, recording, start, end = words
            begin, until = float(start), float(end)
        except ValueError:
            raise UsageError(f"'{path}' line {line} is not utterance, recording, start, end") from None
        yield key, (recording, begin, _NONE if until == -1 else round(until - begin, 9))
