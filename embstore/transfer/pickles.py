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
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.transfer.files import component, folders_and_name, utterance_id, whole
from embstore.transfer.table import Batch, Facts, Table

STATS = "extraction_stats.json"
_ENDING = ".pkl"
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
