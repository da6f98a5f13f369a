"""Trees of pickles as tables: those of `pickles.write`, and those of file pipelines with a pickle an audio file."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.errors import UsageError
from embstore.sources.natural import natural_key
from embstore.sources.speaker import DEFAULT, speaker_rule
from embstore.transfer import unpickle
from embstore.transfer.files import unreadable
from embstore.transfer.pickles import STATS
from embstore.transfer.reading import COMPUTED, Spot, Tell, batch_rows, read_facts, root_of
from embstore.transfer.table import Batch, Facts

_ENDING = ".pkl"
_ROWS = 2_000
_UNKNOWN, _REFUSED = -1, -2
_VECTORS = ("embedding", "emb", "vector")
_PATHS = ("original_path", "audio_path", "path")
_SPEAKERS = ("speaker_id", "speaker")
_Dict = dict[Any, Any]
_by_folder = speaker_rule(DEFAULT)


class Reader:
    """A folder of pickles. Opening it looks for the first one that can be read. Raises UsageError if there is none.

    The order is that of the positions in the pickles, if all say one, from the second reading on; or else the natural
    order of their paths.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.facts = _base(folder)
        self.root = root_of(self.facts)
        self.rows = self.facts.rows if self.facts else None
        self.dim = (self.facts.dim if self.facts else None) or 0
        if not next(_files(self._folder), None):
            raise UsageError(f"there are no pickles (*{_ENDING}) in '{self._folder}'")
        if not self.dim:
            found = (_vector(_load(path)) for path in _files(self._folder) if _is_good(path))
            self.dim = len(next(found, ()))
        self._places: NDArray[np.int64] | None = None
        """Place in the natural order of what comes first, second, …; None: not known yet."""

    def where(self, row: str) -> str:
        """Name a row: its file."""
        return f"'{row}'"

    def batches(self, tell: Tell) -> Iterator[Batch]:
        """What the files hold; those that are refused are left out and told of."""
        size = batch_rows(4 * self.dim + 1000, _ROWS)
        paths, positions = self._ordered(), array("q")
        while piece := list(islice(paths, size)):
            rows = []
            for path in piece:
                try:
                    position, row = self._row(path)
                    rows.append(row)
                except unpickle.Refused as error:
                    position = _REFUSED
                    tell(Spot(self.where(self._name(path)), str(error)))
                positions.append(position)
            if rows:
                yield _batch(rows)
        if self._places is None:
            self._places = _order(np.array(positions, dtype=np.int64))

    def _ordered(self) -> Iterator[Path]:
        if self._places is None or not len(self._places):
            return _files(self._folder)
        names = list(_files(self._folder))
        return (names[place] for place in self._places.tolist() if place < len(names))

    def _row(self, path: Path) -> tuple[int, dict[str, Any]]:
        """The position that a file says, and a row of a batch. Raises Refused."""
        value = _load(path)
        vector = _vector(value)
        if len(vector) != self.dim:
            raise unpickle.Refused(f"a vector of {len(vector)} values among those of {self.dim}")
        found = value if isinstance(value, dict) else {}
        name = self._name(path)
        inside = name[: -len(_ENDING)]
        named = any(key in found for key in _SPEAKERS)
        position = _number(found, "position")
        return int(position) if 0 <= position < 1 << 53 else _UNKNOWN, {
            "row": name,
            "path": _text(found, _PATHS) or inside,
            "start": _number(found, "start"),
            "duration": _number(found, "duration"),
            "speaker": _text(found, _SPEAKERS) if named else _by_folder(inside),
            "embedding": vector,
        }

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def _order(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places in the order of the positions; empty where some have none, or where they are in order anyhow."""
    good = positions[positions != _REFUSED]
    if (good == _UNKNOWN).any() or bool((np.diff(good) > 0).all()):
        return np.empty(0, dtype=np.int64)
    return np.argsort(positions, kind="stable")


def _base(folder: Path) -> tuple[Path, Facts | None]:
    """The folder of the tree itself, and what it says of itself. Raises UsageError if it holds several trees."""
    if (folder / "centroids.json").is_file():
        raise UsageError(f"'{folder}' holds centroids, {COMPUTED}")
    places = [path for path in (folder / STATS, *sorted(folder.glob(f"*/{STATS}"))) if path.is_file()]
    if len(places) > 1 and places[0].parent != folder:
        trees = ", ".join(f"'{place.parent}'" for place in places[:5])
        raise UsageError(f"'{folder}' holds several trees: name one of {trees}")
    if not places:
        return folder, None
    try:
        text = places[0].read_bytes()
    except OSError as error:
        raise unreadable(error, places[0]) from None
    # Other pipelines write a file of this name too.
    facts = read_facts(text, f"'{places[0]}'") if b'"embstore"' in text[:100] else None
    return places[0].parent, facts


def _files(folder: Path) -> Iterator[Path]:
    """The pickles below a folder in natural order; links to folders are not followed, and hidden files passed over."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: natural_key(entry.name))
    except OSError as error:
        raise unreadable(error, folder) from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        elif entry.name.endswith(_ENDING) and entry.is_file():
            yield Path(entry.path)


def _load(path: Path) -> Any:
    """What a pickle holds. Raises Refused."""
    try:
        with path.open("rb") as file:
            data = file.read(unpickle.LARGEST + 1)
    except OSError as error:
        raise unpickle.Refused(f"it cannot be read: {error.strerror}") from None
    if len(data) > unpickle.LARGEST:
        raise unpickle.Refused(f"it is larger than {unpickle.LARGEST >> 20} MB")
    return unpickle.load(data)


def _is_good(path: Path) -> bool:
    try:
        _vector(_load(path))
    except unpickle.Refused:
        return False
    return True


def _vector(value: Any) -> NDArray[np.float32]:
    """The vector of a dict, or a bare one. Raises Refused."""
    if isinstance(value, dict):
        value = next((value[name] for name in _VECTORS if name in value), None)
    if isinstance(value, list | tuple) and all(isinstance(number, float) for number in value):
        value = np.array(value, dtype=np.float64)
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise unpickle.Refused("it holds no 'embedding', which is an array of floats")
    if value.ndim == 2 and value.shape[0] == 1:
        value = value[0]
    if value.ndim != 1 or not len(value):
        raise unpickle.Refused(f"its embedding is of {' × '.join(map(str, value.shape))} values, not a vector")
    with np.errstate(over="ignore"):
        return np.asarray(value, dtype=np.float32)


def _text(found: _Dict, names: tuple[str, ...]) -> str | None:
    for name in names:
        value = found.get(name)
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, str):
            return value or None
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
            return str(value)
        if value is not None:
            raise unpickle.Refused(f"its '{name}' is no text")
    return None


def _number(found: _Dict, name: str) -> float:
    value = found.get(name)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise unpickle.Refused(f"its '{name}' is no number")
    try:
        return float(value)
    except OverflowError:
        raise unpickle.Refused(f"its '{name}' is beyond all measure") from None


def _batch(rows: list[dict[str, Any]]) -> Batch:
    batch: Batch = {name: [row[name] for row in rows] for name in rows[0]}
    for name in ("start", "duration"):
        batch[name] = np.array(batch[name], dtype=np.float64)
    batch["embedding"] = np.stack(batch["embedding"])
    return batch
