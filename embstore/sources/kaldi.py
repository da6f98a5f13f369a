"""A Kaldi data folder as a source: `wav.scp`, and if they are there `segments` and `utt2spk`.

    wav.scp     utterance path                         a recording's path may hold spaces
    segments    utterance recording start end          seconds; an end of -1 is the recording's end
    utt2spk     utterance speaker

The order is that of `segments`, or else of `wav.scp`. A relative path begins at the Kaldi folder if a file is there, or
else at the current folder, as in Kaldi. The root is the deepest folder that holds all recordings, or one that is given.
A path that ends in `|` is a command to Kaldi; embstore runs no commands from data.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from embstore.errors import UsageError
from embstore.sources.base import Kind, Problem, printable, unstorable
from embstore.sources.listed import Item, LineError, ListedSource, Under, absolute, read_lines, seconds
from embstore.sources.speaker import SpeakerRule
from embstore.words import plural

_in_archive = re.compile(r"\.ark:[0-9]+$").search


@dataclass
class KaldiSource(ListedSource):
    """Opening one reads `wav.scp` and `utt2spk`. Raises UsageError where they cannot be read."""

    kind: Kind = field(default="kaldi", init=False)
    folder: Path
    recordings: Recordings
    speaker_of: SpeakerRule | None
    """Overrides `utt2spk`."""

    def __post_init__(self) -> None:
        self._segments = self.folder / "segments"
        speakers = self.folder / "utt2spk"
        self._speakers = read_speakers(speakers) if speakers.exists() and not self.speaker_of else {}

    def _items(self) -> Iterator[Item]:
        self.looked_at = 0
        self.problems.extend(self.recordings.problems)
        return self._stretches() if self._segments.exists() else self._whole()

    def _whole(self) -> Iterator[Item]:
        for utterance, (line, path) in self.recordings.paths.items():
            self.looked_at += 1
            yield line, path, self._speaker(utterance, path), None, None

    def _stretches(self) -> Iterator[Item]:
        for line, text in enumerate(read_lines(self._segments), 1):
            if text.isspace():
                continue
            self.looked_at += 1
            try:
                utterance, path, start, duration = self._stretch(text)
            except LineError as error:
                self._problem(line, str(error))
            else:
                yield line, path, self._speaker(utterance, path), start, duration

    def _stretch(self, text: str) -> tuple[str, str, float | None, float | None]:
        """Utterance, path, start and duration. Raises LineError."""
        words = text.split()
        if len(words) != 4:
            raise LineError(f"{len(words)} words where there must be 4: utterance, recording, start, end")
        utterance, recording, begin, end = words
        if recording not in self.recordings.paths:
            raise LineError(f"the recording '{recording}' has no usable line in wav.scp")
        path = self.recordings.paths[recording][1]
        start = seconds(begin, "start") or 0.0
        if end in ("-1", "-1.0"):
            return utterance, path, start, None
        duration = (seconds(end, "end") or 0.0) - start
        if duration <= 0.0:
            raise LineError(f"the end {end} is not behind the start {begin}")
        # 10.3 - 10.1 is 0.20000000000000107; no recording is timed finer than a nanosecond
        return utterance, path, start, round(duration, 9)

    def _speaker(self, utterance: str, path: str) -> str | None:
        return self.speaker_of(path) if self.speaker_of else self._speakers.get(utterance)

    def _list_name(self) -> str:
        return "segments" if self._segments.exists() else "wav.scp"

    def _nothing(self) -> str:
        return f"nothing to embed in the Kaldi folder '{self.folder}': {plural(self.looked_at, 'utterance')} looked at"


@dataclass
class Recordings:
    """What `wav.scp` names."""

    root: Path
    paths: dict[str, tuple[int, str]]
    """Of each recording its line and its path relative to the root."""
    problems: list[Problem]


def read_recordings(folder: Path, under: Under | None) -> Recordings:
    """Read `wav.scp` of a Kaldi folder; without `under`, the root is found. Raises UsageError."""
    problems: list[Problem] = []
    whole: dict[str, tuple[int, str]] = {}
    for line, text in enumerate(read_lines(folder / "wav.scp"), 1):
        if text.isspace():
            continue
        try:
            name, path = _recording(text, folder)
            if name in whole:
                raise LineError(f"the recording '{name}' stands here twice; only the first counts")
            whole[name] = line, path
        except LineError as error:
            problems.append(Problem("wav.scp", printable(str(error)), line))
    under = under or _common(folder, [path for _, path in whole.values()])
    inside: dict[str, tuple[int, str]] = {}
    for name, (line, path) in whole.items():
        try:
            inside[name] = line, under(path)
        except LineError as error:
            problems.append(Problem("wav.scp", printable(str(error)), line))
    return Recordings(under.root, inside, problems)


def _recording(text: str, folder: Path) -> tuple[str, str]:
    """Name and absolute path on a line of `wav.scp`. Raises LineError."""
    name, *rest = text.strip().split(maxsplit=1)
    if not rest:
        raise LineError("a name without a path")
    path = rest[0]
    if path.endswith("|") or path.startswith("|"):
        raise LineError(f"'{path[:60]}' is a command, and embstore runs none from data; write its output to files")
    if _in_archive(path):
        raise LineError(f"'{path}' is a place in an archive; write the recordings to files of their own")
    if why := unstorable(path):
        raise LineError(f"the path {path[:80]!r} {why}")
    beside = absolute(os.fspath(folder), path)
    if path.startswith("/") or os.path.exists(beside):  # noqa: PTH110 (as in stats.py)
        return name, beside
    here = absolute(os.getcwd(), path)  # noqa: PTH109
    return name, here if os.path.exists(here) else beside  # noqa: PTH110


def _common(folder: Path, paths: list[str]) -> Under:
    """The deepest folder that holds every path; the Kaldi folder itself where there are none."""
    parents = {path.rpartition("/")[0] or "/" for path in paths}
    common = Path(posixpath.commonpath(parents)) if parents else folder
    root = common.resolve()
    return Under(root, root, [common])


def read_speakers(path: Path) -> dict[str, str]:
    """Each utterance's speaker, of an `utt2spk`. Raises UsageError where it cannot be read."""
    speakers: dict[str, str] = {}
    for line, text in enumerate(read_lines(path), 1):
        words = text.split(maxsplit=1)
        if not words:
            continue
        if len(words) != 2 or unstorable(words[1]):
            raise UsageError(f"'{path}' line {line} is not an utterance and its speaker")
        speakers[words[0]] = words[1].rstrip()
    return speakers
