"""A manifest as a source: CSV or TSV with a header, or JSON lines, in the manifest's order.

Columns (or keys) and the other names that they go by, in upper or lower case:

    path       audio_filepath, audio_path, audio, wav, image_path, image, file, filename     required
    speaker    speaker_id, spk, person, identity
    start      offset                  seconds into the file; empty: from its beginning
    duration   duration_s, dur         seconds; empty: to its end

Other columns are passed over. A relative path begins at the manifest's folder, which is the root; with a root of its
own that does not hold the manifest, relative paths begin at that root. TSV knows no line end inside a cell; a cell
that is wholly in quotation marks loses them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from embstore.errors import UsageError
from embstore.sources.base import Kind, unstorable
from embstore.sources.listed import Item, LineError, ListedSource, Under, length, read_lines, seconds
from embstore.sources.speaker import SpeakerRule
from embstore.words import plural

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson")

ALIASES = {
    "path": ("path", "audio_filepath", "audio_path", "audio", "wav", "image_path", "image", "file", "filename"),
    "speaker": ("speaker", "speaker_id", "spk", "person", "identity"),
    "start": ("start", "offset"),
    "duration": ("duration", "duration_s", "dur"),
}

_Row = tuple[int, object, object, object, object]
"""Line, and the raw values of path, speaker, start and duration."""


def manifest_format(path: Path) -> str | None:
    """`.csv`, `.tsv`, `.jsonl` or `.ndjson` by the file's name, with or without `.gz`; None for another file."""
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    return ending if ending in ENDINGS else None


@dataclass
class ManifestSource(ListedSource):
    """Opening one reads its header. Raises UsageError when there is none, or none with a path."""

    kind: Kind = field(default="manifest", init=False)
    manifest: Path
    under: Under
    speaker_of: SpeakerRule | None
    """Overrides the speaker column."""

    def __post_init__(self) -> None:
        self._format = manifest_format(self.manifest)
        if self._is_table():
            self._columns(self._header(self._cells()))

    def _is_table(self) -> bool:
        return self._format in (".csv", ".tsv")

    def _items(self) -> Iterator[Item]:
        self.looked_at = 0
        under, speaker_of = self.under, self.speaker_of
        for line, path, speaker, start, duration in self._table() if self._is_table() else self._objects():
            self.looked_at += 1
            try:
                if not isinstance(path, str):
                    raise LineError("the path is missing" if path is None else "the path is not a text")
                inside = under(path)
                who = speaker_of(inside) if speaker_of else _speaker(speaker)
                yield line, inside, who, seconds(start, "start"), length(duration)
            except LineError as error:
                self._problem(line, str(error))

    def _table(self) -> Iterator[_Row]:
        rows = self._cells()
        header = self._header(rows)
        width = len(header)
        path, speaker, start, duration = self._columns(header)
        for line, cells in rows:
            if len(cells) != width:
                if len(cells) < width or any(cells[width:]):
                    self.looked_at += 1
                    self._problem(line, f"{len(cells)} cells under a header of {width}; quote a cell with a separator")
                    continue
                del cells[width:]
            # A column that the manifest lacks has index -1: this one.
            cells.append("")
            yield line, cells[path], cells[speaker], cells[start], cells[duration]

    def _header(self, rows: Iterator[tuple[int, list[str]]]) -> list[str]:
        _, header = next(rows, (0, None))
        if self.problems:
            raise UsageError(f"the header of '{self.manifest}' cannot be read: {self.problems[0].reason}")
        if header is None:
            raise UsageError(f"'{self.manifest}' is empty; its first line names the columns, such as path,speaker")
        return header

    def _columns(self, names: Sequence[str]) -> list[int]:
        """Where path, speaker, start and duration stand in the header; -1 for none."""
        found = find_columns(names)
        if found[0] < 0:
            shown = ", ".join(name.strip()[:40] for name in names[:20])
            raise UsageError(
                f"'{self.manifest}' has no column for the path: its first line names {shown!r}; "
                f"understood are {', '.join(ALIASES['path'])}"
            )
        return found

    def _cells(self) -> Iterator[tuple[int, list[str]]]:
        """Line and cells of each row that is not blank, the header first."""
        lines = read_lines(self.manifest)
        return self._tsv_cells(lines) if self._format == ".tsv" else self._csv_cells(lines)

    def _tsv_cells(self, lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
        # Not the csv module: most TSV has no quoting, and there a stray quotation mark in a transcript would
        # swallow line after line.
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                cells = line.rstrip("\r\n").split("\t")
                yield number, [_unquoted(cell) for cell in cells] if '"' in line else cells

    def _csv_cells(self, lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
        # strict: a quotation mark that is never closed is an error and not one cell of all that follows.
        reader = csv.reader(lines, strict=True)
        while True:
            begin = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                upto = f" (up to line {reader.line_num})" if reader.line_num > begin else ""
                self.looked_at += 1
                self._problem(begin, f"broken CSV{upto}: {error}")
                continue
            if cells and (len(cells) > 1 or cells[0].strip()):
                yield begin, cells

    def _objects(self) -> Iterator[_Row]:
        names: tuple[str, ...] = ()
        columns = [-1, -1, -1, -1]
        for number, line in enumerate(read_lines(self.manifest), 1):
            if line.isspace():
                continue
            try:
                found = _object(line)
            except LineError as error:
                self.looked_at += 1
                self._problem(number, str(error))
                continue
            if tuple(found) != names:
                names = tuple(found)
                columns = find_columns(names)
            values = [*found.values(), None]
            path, speaker, start, duration = columns
            yield number, values[path], values[speaker], values[start], values[duration]

    def _list_name(self) -> str:
        return self.manifest.name

    def _nothing(self) -> str:
        return f"nothing to embed in '{self.manifest}': {plural(self.looked_at, 'line')} looked at"


def find_columns(names: Sequence[str]) -> list[int]:
    """Positions of path, speaker, start and duration among the names; -1 for none. The first alias that fits wins."""
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        places.setdefault(name.strip().lower(), place)
    return [next((places[alias] for alias in aliases if alias in places), -1) for aliases in ALIASES.values()]


def _object(line: str) -> dict[str, object]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise LineError(f"broken JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError):
        raise LineError("JSON with a number or a nesting beyond all measure") from None
    if not isinstance(found, dict):
        raise LineError('not a JSON object such as {"path": "a.wav", "speaker": "anna"}')
    return found


def _speaker(value: object) -> str | None:
    if isinstance(value, str):
        if why := unstorable(value):
            raise LineError(f"the speaker {why}")
        return value.strip() or None
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise LineError("the speaker is neither a text nor a whole number")


def _unquoted(cell: str) -> str:
    if len(cell) >= 2 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"')
    return cell
