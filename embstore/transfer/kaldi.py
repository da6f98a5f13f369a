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
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np

from embstore.errors import UsageError
from embstore.transfer import ark
from embstore.transfer.files import one_word, utterance_id, whole
from embstore.transfer.table import Table


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
