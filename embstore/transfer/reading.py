"""What readers of the formats share: what they give, how they name a row, and by which names columns go."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from embstore.errors import UsageError
from embstore.sources.manifest import ALIASES as MANIFEST
from embstore.transfer.table import FIELDS, Batch, Facts, Field

LARGEST_DIM = 16_000
"""Values of a vector that pgvector stores."""
BATCH_BYTES = 20_000_000
BATCH_ROWS = 20_000

COMPUTED = "which are computed and not imported: import the embeddings, then type 'embstore centroids' or 'boundaries'"

ALIASES: Mapping[str, tuple[str, ...]] = {
    "path": ("paths", *MANIFEST["path"][1:], "original_path", "utterance_id"),
    "start": MANIFEST["start"][1:],
    "duration": MANIFEST["duration"][1:],
    "speaker": ("speakers", *MANIFEST["speaker"][1:]),
    "embedding": ("embeddings", "emb", "embs", "vector", "vectors"),
}
"""Other names that columns go by in files of other programs."""
_REQUIRED = ("path", "embedding")
_READ = [field for field in FIELDS["embeddings"] if field.name != "position"]
"""The order of the rows is the order of the items."""

T = TypeVar("T")


class Spot(NamedTuple):
    """A row that cannot be carried, and why."""

    where: str
    """The file, and the row in it, counted from 1."""
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


Tell = Callable[[Spot], None]
"""Is told of rows that cannot be carried; may raise, which ends the reading."""


class Reader(Protocol):
    """A table of embeddings on its way in: a file, or files, that have been opened."""

    facts: Facts | None
    """None: the file says nothing of itself, as those of other programs."""
    dim: int
    """Length of its vectors; 0 where there is none."""
    rows: int | None
    """How many there are, as it says itself; None: it does not."""
    root: Path | None
    """The folder of the items' files, as the table says it; relative paths begin there."""

    def where(self, row: Any) -> str:
        """Name a row, by what stands for it in the column `row` of a batch."""

    def batches(self, tell: Tell) -> Iterator[Batch]:
        """The rows; every batch has a column `row`, too.

        Raises UsageError where a file is damaged as a whole.
        """


def batch_rows(row_bytes: int, most: int = BATCH_ROWS) -> int:
    """How many rows to read at a time: about 20 MB."""
    return max(1, min(most, BATCH_BYTES // max(row_bytes, 1)))


def find_columns(places: Mapping[str, T], what: str) -> list[tuple[T, Field]]:
    """Where the columns of embeddings are, by the names that a file has; upper and lower case are the same.

    `what` begins the UsageError that is raised if one is missing: `'x.npz' has no array`.
    """
    by_name = {name.strip().lower(): place for name, place in reversed(list(places.items()))}
    found = []
    for field in _READ:
        name = next((word for word in (field.name, *ALIASES.get(field.name, ())) if word in by_name), None)
        if name is not None:
            found.append((by_name[name], field))
        elif field.name in _REQUIRED:
            shown = ", ".join(repr(name[:40]) for name in list(places)[:20])
            raise UsageError(f"{what} '{field.name}'; it has {shown or 'none'}")
    return found


_TYPES: Mapping[str, type] = {
    "dataset": str,
    "root": str,
    "media": str,
    "model": str,
    "fingerprint": str,
    "dim": int,
    "settings": dict,
    "rows": int,
}


def read_facts(text: str | bytes, where: str) -> Facts:
    """The facts that a file of embeddings carries. Raises UsageError where they are broken, or of another table."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f"what {where} says of itself is no JSON: it is damaged") from None
    kind = found.get("embstore") if isinstance(found, dict) else None
    if kind in ("centroids", "boundaries"):
        raise UsageError(f"{where} holds {kind}, {COMPUTED}")
    if kind != "embeddings":
        raise UsageError(f"what {where} says of itself was not written by 'embstore export': it is damaged")
    if found.get("version") != 1:
        raise UsageError(f"{where} was written by a newer embstore: type 'pip install --upgrade embstore'")
    values = {name: found[name] for name in _TYPES if found.get(name) is not None}
    for name, value in values.items():
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            raise UsageError(f"what {where} says of itself is damaged: '{name}' is no {_TYPES[name].__name__}")
    if values.get("media", "audio") not in ("audio", "image"):
        raise UsageError(f"{where} holds embeddings of {values['media']!r}, which are neither audio nor images")
    if not values.get("root", "/").startswith("/"):
        raise UsageError(f"what {where} says of itself is damaged: 'root' is not absolute")
    return Facts("embeddings", **values)


def root_of(facts: Facts | None) -> Path | None:
    """The root that the facts name."""
    return Path(posixpath.normpath(facts.root)) if facts and facts.root else None
