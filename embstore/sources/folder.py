"""A folder of files as a source: every file with a fitting extension, in natural order of its relative path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from embstore.sources.base import Entry, Kind, Problem, Source, printable, unstorable
from embstore.sources.natural import natural_key
from embstore.sources.speaker import SpeakerRule
from embstore.sources.stats import BATCH, Stats
from embstore.words import plural


class _Row(NamedTuple):
    """A name in a folder; rows sort by their key, which no two names of a folder share."""

    key: tuple[str, str]
    name: str
    is_folder: bool


@dataclass
class FolderSource(Source):
    """Walks a folder, and follows links except back into a folder that it is in.

    Names that begin with a dot are passed over. A link to nowhere is an entry without a size.
    """

    kind: Kind = field(default="folder", init=False)
    extensions: frozenset[str]
    """Lower case, with the dot."""
    speaker_of: SpeakerRule
    looked_at: int = field(default=0, init=False)
    """How many files were seen, whatever their extension."""

    def __post_init__(self) -> None:
        self._base = os.fspath(self.root).rstrip("/") + "/"

    def _entries(self) -> Iterator[Entry]:
        """Depth first, on a stack of its own: folders may be nested deeper than Python may call."""
        self.looked_at = 0
        above = [self._identity("")]
        with Stats() as stats:
            stack = [self._folder("", stats)]
            while stack:
                for found in stack[-1]:
                    if isinstance(found, Entry):
                        yield found
                    elif self._may_enter(found, above):
                        stack.append(self._folder(found + "/", stats))
                        break
                else:
                    stack.pop()
                    above.pop()

    def _may_enter(self, folder: str, above: list[tuple[int, int] | None]) -> bool:
        identity = self._identity(folder)
        if identity is None:
            return False
        if identity in above:
            self._problem(folder, "a link back to a folder above it; not followed")
            return False
        above.append(identity)
        return True

    def _identity(self, folder: str) -> tuple[int, int] | None:
        try:
            found = os.stat(self._base + folder)  # noqa: PTH116 (as in stats.py)
        except OSError as error:
            self._problem(folder, f"unreadable folder: {error.strerror}")
            return None
        return found.st_dev, found.st_ino

    def _folder(self, prefix: str, stats: Stats) -> Iterator[Entry | str]:
        """Entries of one folder, and in their place among them the paths of its subfolders."""
        rows = self._list(prefix)
        for at in range(0, len(rows), BATCH):
            batch = rows[at : at + BATCH]
            facts = iter(stats([f"{self._base}{prefix}{row.name}" for row in batch if not row.is_folder]))
            for row in batch:
                path = prefix + row.name
                if row.is_folder:
                    yield path
                elif (known := next(facts)) is None:
                    self._problem(path, "not a regular file")
                else:
                    yield Entry(path, self.speaker_of(path), None, None, *known)

    def _list(self, prefix: str) -> list[_Row]:
        rows: list[_Row] = []
        try:
            with os.scandir(self._base + prefix) as names:
                for name in names:
                    if not name.name.startswith("."):
                        self._note(name, prefix, rows)
        except OSError as error:
            self._problem(prefix.rstrip("/"), f"unreadable folder: {error.strerror}")
        rows.sort()
        return rows

    def _note(self, found: os.DirEntry[str], prefix: str, rows: list[_Row]) -> None:
        name = found.name
        try:
            is_folder = found.is_dir()
        except OSError as error:
            self._problem(prefix + name, f"unreadable: {error.strerror}")
            return
        if not is_folder:
            self.looked_at += 1
            extension = "".join(name.rpartition(".")[1:]).lower() if "." in name else ""
            if extension not in self.extensions:
                self.ignored[printable(extension)] += 1
                return
        if why := unstorable(prefix + name):
            self._problem(prefix + name, f"the path {why}; rename it")
            return
        rows.append(_Row(natural_key(name), name, is_folder))

    def _problem(self, path: str, reason: str) -> None:
        self.problems.append(Problem(printable(path) or ".", reason))

    def _nothing(self) -> str:
        kinds = " ".join(sorted(self.extensions))
        return f"nothing to embed under '{self.root}': {plural(self.looked_at, 'file')} looked at, none of them {kinds}"
