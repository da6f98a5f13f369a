"""What every source of items gives: entries in order, and what was wrong on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from embstore.errors import UsageError
from embstore.words import plural

Kind = Literal["folder", "manifest", "kaldi"]


# Not frozen: that makes creating one three times as slow, and there may be millions.
@dataclass(slots=True)
class Entry:
    """One item as its source names it."""

    path: str
    """POSIX, relative to the source's root."""
    speaker: str | None
    start: float | None
    """Seconds into the file; None is its beginning."""
    duration: float | None
    """Seconds; None is all of the rest."""
    size: int | None
    """Bytes; None where the file is missing or out of reach. It is an item all the same, and fails when it is read."""
    mtime_ns: int | None
    """Time of the last change, in nanoseconds since 1970; None as for `size`."""


class Problem(NamedTuple):
    """Something that a source names and that cannot become an item."""

    path: str
    """The file or folder, relative to the root; for a manifest the manifest's own name. Always printable UTF-8."""
    reason: str
    line: int | None = None

    def __str__(self) -> str:
        place = self.path if self.line is None else f"{self.path} line {self.line}"
        return f"{place}: {self.reason}"


@dataclass
class Source(ABC):
    """A folder, manifest or Kaldi data folder, opened. Its entries are read as they are asked for."""

    kind: Kind = field(init=False)
    root: Path
    """Absolute and resolved; the path of every entry lies under it."""
    name: str
    """What the dataset is called if nobody says otherwise."""
    problems: list[Problem] = field(default_factory=list, init=False)
    """Filled by `entries`."""
    ignored: Counter[str] = field(default_factory=Counter, init=False)
    """How many files of each extension (`.txt`; `` for none) a folder holds that do not count; filled by `entries`."""

    def entries(self) -> Iterator[Entry]:
        """Every item in the dataset's order, read anew by each call.

        Raises UsageError, at the end, when there was none.
        """
        self.problems.clear()
        self.ignored.clear()
        entries = self._entries()
        first = next(entries, None)
        if first is None:
            raise UsageError(self._nothing() + self._first_problem())
        yield first
        yield from entries

    @abstractmethod
    def _entries(self) -> Iterator[Entry]:
        """The items; problems are noted on the way."""

    @abstractmethod
    def _nothing(self) -> str:
        """Say that there are no items, and what was looked at."""

    def _first_problem(self) -> str:
        if not self.problems:
            return ""
        count = len(self.problems)
        return f" ({plural(count, 'problem')}, first: {self.problems[0]})"


LONGEST = 2500
"""Bytes of a path or a speaker: both stand in an index, whose rows PostgreSQL limits to 2,704."""


def unstorable(text: str) -> str | None:
    """Why a path or a speaker cannot stand in the database, as the end of a sentence; None if it can."""
    if text.isprintable() and len(text) * 4 <= LONGEST:
        return None
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if "\0" in text:
        return "holds a NUL character"
    return f"is longer than {LONGEST} bytes" if size > LONGEST else None


def printable(path: str) -> str:
    """A path as one line of UTF-8 text: control characters, and bytes that are not UTF-8, as `\\xff`-like escapes."""
    return path if path.isprintable() else "".join(map(_escaped, path))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x20 or code == 0x7F or 0xD800 <= code <= 0xDFFF:
        return character.encode("ascii", "backslashreplace").decode() if code > 0x7F else f"\\x{code:02x}"
    return character
