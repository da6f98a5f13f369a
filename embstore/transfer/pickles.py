"""Tables as trees of pickles, as file pipelines keep them: one file an item, in the folders of the audio.

    embeddings    DIR/DATASET/FOLDERS/NAME.pkl, a dict each, and DIR/DATASET/extraction_stats.json
    centroids     DIR/DATASET/SPEAKER.pkl, a dict each, and DIR/centroids.json
    boundaries    DIR/DATASET/boundaries.pkl, one dict of columns

NAME is the audio file's without its ending; with it where several items would be called the same, and with `@START` for
a stretch. docs/transfer.md says what the dicts hold.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.errors import UsageError
from embstore.sources.natural import natural_key
from embstore.sources.speaker import DEFAULT, speaker_rule
from embstore.transfer import unpickle
from embstore.transfer.files import component, folders_and_name, unreadable, utterance_id, whole
from embstore.transfer.table import Batch, Facts, Kind, Spot, Table, read_facts

STATS = "extraction_stats.json"
_ENDING = ".pkl"
_BYTES = 20_000_000
_ROWS = 2_000
_Dict = dict[Any, Any]


def write(folder: Path, table: Table) -> Path:
    """Write the tree below the folder, which is returned."""
    {"embeddings": _write_embeddings, "centroids": _write_centroids, "boundaries": _write_boundaries}[table.facts.kind](
        folder, table
    )
    return folder


def _write_embeddings(folder: Path, table: Table) -> None:
    facts = table.facts
    place = folder / component(facts.dataset or "")
    place.mkdir(parents=True, exist_ok=True)
    # The statistics get their name last, and stand for all of it: a tree without them is not whole.
    (place / STATS).unlink(missing_ok=True)
    for batch in table.batches:
        columns = [batch[name] for name in ("position", "path", "start", "duration", "speaker", "embedding")]
        for row in zip(*columns, strict=True):
            _dump(place / item_file(row[1], _or_none(row[2]), table.contested), _item(facts, *row))
    stats = {**json.loads(facts.to_json()), "embedding_dim": facts.dim, **table.counts}
    with whole(place / STATS) as file:
        file.write(json.dumps(stats, ensure_ascii=False, indent=2).encode() + b"\n")


def _item(
    facts: Facts,
    position: np.int64,
    path: str,
    start: np.float64,
    duration: np.float64,
    speaker: str | None,
    vector: NDArray[np.float32],
) -> _Dict:
    return {
        "embedding": np.array(vector),
        "dataset": facts.dataset,
        "speaker_id": speaker,
        "utterance_id": utterance_id(path, _or_none(start)),
        "original_path": f"{(facts.root or '').rstrip('/')}/{path}",
        "start": _or_none(start),
        "duration": _or_none(duration),
        "position": int(position),
        "model": facts.model,
        "embedding_dim": len(vector),
        "embedding_stats": _stats(vector),
    }


def _write_centroids(folder: Path, table: Table) -> None:
    with whole(folder / "centroids.json") as file:
        file.write(table.facts.to_json().encode() + b"\n")
        for batch in table.batches:
            for row in _rows(batch):
                _dump(folder / speaker_file(row["dataset"], row["speaker"]), _centroid(row))


def _centroid(row: Mapping[str, Any]) -> _Dict:
    return {
        "embedding": np.array(row["embedding"]),
        "dataset": row["dataset"],
        "speaker_id": row["speaker"],
        "num_utterances": int(row["num_utterances"]),
        "failed_utterances": int(row["failed_utterances"]),
        "utterance_list": row["utterance_list"],
        "original_paths": row["original_paths"],
        "embedding_dim": len(row["embedding"]),
        "embedding_stats": _stats(row["embedding"]),
    }


def _write_boundaries(folder: Path, table: Table) -> None:
    facts = table.facts
    whole_columns: _Dict = {}
    for batch in table.batches:
        for name, values in batch.items():
            whole_columns.setdefault(name, []).append(values)
    columns = {
        name: np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [v for part in parts for v in part]
        for name, parts in whole_columns.items()
    }
    place = folder / component(facts.dataset or "") / "boundaries.pkl"
    place.parent.mkdir(parents=True, exist_ok=True)
    _dump(place, {**json.loads(facts.to_json()), **columns})


def _rows(batch: Batch) -> Iterator[dict[str, Any]]:
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def _stats(vector: NDArray[np.float32]) -> dict[str, float]:
    wide = vector.astype(np.float64)
    return {"mean": float(wide.mean()), "std": float(wide.std()), "min": float(wide.min()), "max": float(wide.max())}


def _dump(path: Path, value: _Dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file:
        pickle.dump(value, file, protocol=4)


def _or_none(value: np.float64 | float) -> float | None:
    return None if math.isnan(value) else float(value)


def speaker_file(dataset: str, speaker: str) -> Path:
    """Relative path of a speaker's pickle: a `/` in the name makes folders, and nothing leads out of the export."""
    return Path(component(dataset)) / folders_and_name(speaker, _ENDING)


def stem(path: str) -> str:
    """A path without the ending of its file's name."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def item_file(path: str, start: float | None, contested: frozenset[str]) -> Path:
    """Relative path of an item's pickle; no two items of a dataset have the same."""
    name = stem(path)
    if start is not None or name in contested:
        name = path
    place = folders_and_name(name, _ENDING)
    last = place.name[: -len(_ENDING)].replace("@", "%40")
    return place.with_name(last + ("" if start is None else f"@{start!r}") + _ENDING)


class Reader:
    """A folder of pickles. Opening it looks for the first one that can be read. Raises UsageError if there is none."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self._kind = kind
        self._folder, self.facts = _base(folder, kind)
        self.dim = (self.facts.dim or 0) if self.facts else 0
        if not next(_files(self._folder), None):
            raise UsageError(f"there are no pickles (*{_ENDING}) in '{folder}'")
        if not self.dim and kind != "boundaries":
            found = (_vector(_load(path)) for path in _files(self._folder) if _is_good(path))
            self.dim = len(next(found, ()))

    def where(self, row: str) -> str:
        """Name a row: its file."""
        return f"'{row}'"

    def batches(self, spot: Callable[[Spot], None]) -> Iterator[Batch]:
        """What the files hold, in natural order of their paths; those that are refused are left out and told of."""
        if self._kind == "boundaries":
            yield from self._columns()
            return
        size = max(1, min(_ROWS, _BYTES // (4 * self.dim + 1000)))
        paths = _files(self._folder)
        read = self._item if self._kind == "embeddings" else self._centroid
        while piece := list(islice(paths, size)):
            rows = []
            for path in piece:
                try:
                    rows.append(read(path))
                except unpickle.Refused as error:
                    spot(Spot(self.where(self._name(path)), str(error)))
            if rows:
                yield _batch(rows)

    def _item(self, path: Path) -> dict[str, Any]:
        found, vector, name = self._found(path)
        inside = name[: -len(_ENDING)]
        by_folder = speaker_rule(DEFAULT)(inside)
        return {
            "row": name,
            "position": _integer(found, "position"),
            "path": _text(found, "original_path") or inside,
            "start": _number(found, "start"),
            "duration": _number(found, "duration"),
            "speaker": _text(found, "speaker_id", "speaker") if _has(found, "speaker_id", "speaker") else by_folder,
            "embedding": vector,
        }

    def _centroid(self, path: Path) -> dict[str, Any]:
        found, vector, name = self._found(path)
        return {
            "row": name,
            "dataset": _text(found, "dataset"),
            "speaker": _text(found, "speaker_id", "speaker") or name[: -len(_ENDING)],
            "embedding": vector,
            "num_utterances": _integer(found, "num_utterances"),
        }

    def _found(self, path: Path) -> tuple[_Dict, NDArray[np.float32], str]:
        value = _load(path)
        vector = _vector(value)
        if len(vector) != self.dim:
            raise unpickle.Refused(f"a vector of {len(vector)} values among those of {self.dim}")
        return (value if isinstance(value, dict) else {}), vector, self._name(path)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _columns(self) -> Iterator[Batch]:
        path = next(_files(self._folder))
        try:
            value = _load(path)
        except unpickle.Refused as error:
            raise UsageError(f"'{path}': {error}") from None
        paths = value.get("path") if isinstance(value, dict) else None
        if not isinstance(paths, list):
            raise UsageError(f"'{path}' holds no boundaries: its 'path' is no list")
        names = {"position": "i", "start": "f", "score": "f", "confidence": "f", "voice": "i"}
        for name, kind in names.items():
            column = value.get(name)
            if not isinstance(column, np.ndarray) or column.dtype.kind != kind or column.shape != (len(paths),):
                raise UsageError(f"'{path}' holds no boundaries: its '{name}' is no column of numbers")
        rows = [f"{self._name(path)}, entry {i + 1}" for i in range(len(paths))]
        yield {"row": rows, "path": paths, **{name: value[name] for name in names}}


def _base(folder: Path, kind: Kind) -> tuple[Path, Facts | None]:
    """The folder of the tree itself, and what it says of itself. Raises UsageError if it holds several trees."""
    if kind == "boundaries":
        found = [*folder.glob("boundaries.pkl"), *folder.glob("*/boundaries.pkl")]
        if len(found) != 1:
            raise UsageError(f"'{folder}' holds {len(found)} files 'boundaries.pkl': name the folder of one")
        try:
            value = _load(found[0])
        except unpickle.Refused as error:
            raise UsageError(f"'{found[0]}': {error}") from None
        told = (
            {key: v for key, v in value.items() if not isinstance(v, list | np.ndarray)}
            if isinstance(value, dict)
            else {}
        )
        return found[0].parent, read_facts(json.dumps(told, default=str), kind, f"'{found[0]}'")
    name = STATS if kind == "embeddings" else "centroids.json"
    places = [path for path in (folder / name, *sorted(folder.glob(f"*/{name}"))) if path.is_file()]
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
    facts = read_facts(text, kind, f"'{places[0]}'") if b'"embstore"' in text[:100] else None
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
    """What a pickle holds. Raises unpickle.Refused."""
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
        value = next((value[name] for name in ("embedding", "centroid", "emb", "vector") if name in value), None)
    if isinstance(value, list | tuple) and all(isinstance(number, int | float) for number in value):
        value = np.array(value, dtype=np.float64)
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise unpickle.Refused("it holds no 'embedding', which is an array of floats")
    if value.ndim == 2 and value.shape[0] == 1:
        value = value[0]
    if value.ndim != 1 or not len(value):
        raise unpickle.Refused(f"its embedding is of {' × '.join(map(str, value.shape))} values, not a vector")
    with np.errstate(over="ignore"):
        return np.asarray(value, dtype=np.float32)


def _has(found: _Dict, *names: str) -> bool:
    return any(name in found for name in names)


def _text(found: _Dict, *names: str) -> str | None:
    for name in names:
        value = found.get(name)
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, str):
            return value or None
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if value is not None:
            raise unpickle.Refused(f"its '{name}' is no text")
    return None


def _number(found: _Dict, name: str) -> float:
    value = found.get(name)
    if value is None:
        return math.nan
    if not isinstance(value, int | float | np.number) or isinstance(value, bool):
        raise unpickle.Refused(f"its '{name}' is no number")
    try:
        return float(value.real)
    except OverflowError:
        raise unpickle.Refused(f"its '{name}' is beyond all measure") from None


def _integer(found: _Dict, name: str) -> int:
    value = _number(found, name)
    return int(value) if 0 <= value < 1 << 53 else -1


def _batch(rows: list[dict[str, Any]]) -> Batch:
    batch: Batch = {name: [row[name] for row in rows] for name in rows[0]}
    for name, dtype in (("position", np.int64), ("num_utterances", np.int64), ("start", float), ("duration", float)):
        if name in batch:
            batch[name] = np.array(batch[name], dtype=dtype)
    batch["embedding"] = np.stack(batch["embedding"])
    return batch
