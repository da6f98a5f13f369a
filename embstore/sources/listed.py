"""What a manifest and a Kaldi folder share: items that a text file names line by line."""

from __future__ import annotations

import gzip
import math
import os
import posixpath
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from embstore.errors import UsageError
from embstore.sources.base import Entry, Problem, Source, printable, unstorable
from embstore.sources.stats import BATCH, Stats


class LineError(Exception):
    """A line that cannot become an item, and why."""


# A plain tuple: it lives for one batch, and making a named one takes as long as splitting the line.
Item = tuple[int, str, str | None, float | None, float | None]
"""What one line says: its number, path, speaker, start and duration."""


@dataclass
class ListedSource(Source):
    """Gives each item of a list once, with the size and time of its file."""

    looked_at: int = field(default=0, init=False)
    """How many lines held something."""

    @abstractmethod
    def _items(self) -> Iterator[Item]:
        """The list's items, in its order; problems are noted on the way."""

    def _entries(self) -> Iterator[Entry]:
        base = os.fspath(self.root).rstrip("/") + "/"
        items = self._once()
        with Stats() as stats:
            while batch := list(islice(items, BATCH)):
                # The stretches of one recording mostly follow each other: one look serves them all.
                paths = list(dict.fromkeys([item[1] for item in batch]))
                facts = dict(zip(paths, stats([base + path for path in paths]), strict=True))
                for line, path, speaker, start, duration in batch:
                    known = facts[path]
                    if known is None:
                        self._problem(line, f"'{path}' is not a regular file")
                    else:
                        yield Entry(path, speaker, start, duration, *known)
        self.problems.sort(key=lambda problem: (problem.path, problem.line or 0))

    def _once(self) -> Iterator[Item]:
        """Without what the list has named before: path and start are what an item is known by."""
        seen: set[object] = set()
        for item in self._items():
            line, path, _, start, _ = item
            # The bare path where it says all: a tuple for each of a million lines is memory for nothing.
            key: object = path if start is None else (path, start)
            if key in seen:
                stretch = "" if start is None else f" from {start:g} s"
                self._problem(line, f"'{path}'{stretch} stands here twice; only the first counts")
            else:
                seen.add(key)
                yield item

    def _problem(self, line: int, reason: str) -> None:
        self.problems.append(Problem(self._list_name(), printable(reason), line))

    @abstractmethod
    def _list_name(self) -> str:
        """The name of the file whose lines are the items."""


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 text file (`.gz`: compressed), with their ends and without a byte order mark.

    Raises UsageError when it cannot be read or a line is not UTF-8. Only `\\n` ends a line, so that the count is exact.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for raw in file:
                number += 1
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"'{path}' line {number} is not UTF-8 text; save the file as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        cause = getattr(error, "strerror", None) or error
        place = f" after line {number}" if number else ""
        raise UsageError(f"'{path}' cannot be read{place}: {cause}") from None


class Under:
    """Turns the paths that a list names into paths relative to a root, and refuses those that leave it.

    Works on the text alone: a million lines are not worth a million questions to the file system.
    """

    def __init__(self, root: Path, start: Path, also: Iterable[Path] = ()) -> None:
        """`start`: where relative paths begin; `also`: other names of the root, such as the one before links."""
        self.root = root
        self._start = os.fspath(start)
        self._plain_start = start == root
        self._prefixes = list({os.fspath(name).rstrip("/") + "/": None for name in (root, *also)})

    def __call__(self, path: str) -> str:
        """The path relative to the root, without `.`, `..` and doubled slashes. Raises LineError."""
        if not path or path.isspace():
            raise LineError("the path is empty")
        if path[0] != "/":
            return path if self._plain_start and _is_plain(path) else self._normal(path)
        for prefix in self._prefixes:
            if path.startswith(prefix) and _is_plain(path[len(prefix) :]):
                return path[len(prefix) :]
        return self._normal(path)

    def _normal(self, path: str) -> str:
        if why := unstorable(path):
            raise LineError(f"the path {path[:80]!r} {why}")
        if "\n" in path:
            raise LineError(f"the path {path[:80]!r} runs over several lines; is a quotation mark not closed?")
        whole = absolute(self._start, path)
        for prefix in self._prefixes:
            if whole.startswith(prefix) and whole != prefix:
                return whole[len(prefix) :]
        raise LineError(f"'{path}' does not lie under '{self.root}'; name a folder that holds every file with --root")


def absolute(start: str, path: str) -> str:
    """The path, from `start` if it is relative, without `.`, `..` and doubled slashes; links are not looked at."""
    # POSIX gives a path with exactly two slashes in front a meaning of its own; here it has none.
    return posixpath.normpath(posixpath.join(start, path)).replace("//", "/")


def _is_plain(path: str) -> bool:
    """Whether a relative path is sure to be normal as it stands; a false no only costs time."""
    return bool(
        path
        and path[0] != "."
        and path[0] != "/"
        and path[-1] != "/"
        and "/." not in path
        and "//" not in path
        and unstorable(path) is None
        and "\n" not in path
    )


# `str | int | float` would be put together anew at each of a million calls, which takes longer than to read the number.
_NUMERIC = (str, int, float)


def seconds(value: object, what: str) -> float | None:
    """A time in seconds from a cell or a JSON value; None where there is none. Raises LineError."""
    if value is None or value == "":
        return None
    if isinstance(value, _NUMERIC) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            if isinstance(value, str) and value.isspace():
                return None
        else:
            if 0.0 <= number < math.inf:
                return number + 0.0  # a negative zero becomes a plain one
    shown = repr(value[:40]) if isinstance(value, str) else str(value) if isinstance(value, float) else "here"
    raise LineError(f"{what} {shown} is not a number of seconds, 0 or more")


def length(value: object) -> float | None:
    """A duration in seconds, above 0; None where there is none. Raises LineError."""
    number = seconds(value, "duration")
    if number == 0.0:
        raise LineError("duration 0: there is nothing to embed")
    return number
