"""What a search starts from: a word of the user's, or an array, made into one vector of one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, text

from embstore import catalog, recipes
from embstore.catalog import StoredModel
from embstore.db.engine import Database
from embstore.errors import ItemError, ModelError, UsageError
from embstore.models.base import Model, Recipe

Kind = Literal["file", "item", "speaker", "vector"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SHOWN = 5

_ITEMS = """
SELECT d.dataset, i.dataset_id, i.item_id, i.path, i.start, i.size, i.mtime_ns, vector_send(e.embedding) AS sent
FROM embstore.item i JOIN embstore.datasets d USING (dataset_id)
LEFT JOIN embstore.embedding_{model_id} e
    ON e.dataset_id = i.dataset_id AND e.model_id = {model_id} AND e.item_id = i.item_id
WHERE i.dataset_id = ANY (:datasets) AND {condition}
ORDER BY d.dataset, i.position LIMIT 100
"""
_BY_PATH = "i.path = :name"
_BY_ID = "i.item_id = :item_id"
# A file by its full path: the item whose dataset's root and path make it up.
_BY_FILE = "i.start IS NULL AND i.duration IS NULL AND rtrim(d.root, '/') || '/' || i.path = :file"

_SPEAKERS = """
SELECT d.dataset, d.dataset_id FROM embstore.datasets d
WHERE d.dataset_id = ANY (:datasets)
    AND EXISTS (SELECT FROM embstore.item i WHERE i.dataset_id = d.dataset_id AND i.speaker = :name)
ORDER BY d.dataset
"""
_CENTROID = """
SELECT vector_send(embedding), num_utterances FROM embstore.speaker_centroids
WHERE dataset = :dataset AND model = :model AND speaker = :speaker AND embedding IS NOT NULL AND NOT stale
"""
_AVERAGE = """
SELECT vector_send(avg(e.embedding)), count(*) FROM embstore.item i JOIN embstore.embedding_{model_id} e
    ON e.dataset_id = i.dataset_id AND e.model_id = {model_id} AND e.item_id = i.item_id
WHERE i.dataset_id = :dataset_id AND i.speaker = :speaker
"""


@dataclass(frozen=True)
class Asked:
    """What a search starts from."""

    kind: Kind
    name: str
    """The word itself; of an array `vector`."""
    vector: NDArray[np.float32] | None = None
    """float32 [dim]; None: the file is still to be embedded."""
    dataset: str | None = None
    """Where the item or the speaker is from."""
    item_id: int | None = None
    utterances: int | None = None
    """How many a speaker's vector is the mean of."""


class Embedder:
    """Embeds single files with a stored model; keeps the model that it has loaded last.

    The model is loaded in this process, on its first file: torch and the like are imported then, and not before.
    """

    def __init__(self, options: Mapping[str, str] | None = None, device: str = "cpu") -> None:
        """`options` of the recipe, such as `model_dir`, go before those that the database keeps."""
        self._options = dict(options or {})
        self._device = device
        self._loaded: tuple[str, Model] | None = None

    def embed(self, database: Database, model: StoredModel, path: Path) -> NDArray[np.float32]:
        """One file's vector, float32 [dim].

        Raises ModelError if the model is not here or has other weights, UsageError if the file has no embedding.
        """
        with database.begin() as connection:
            recipe = recipes.find(connection, model.name, self._options)
            fingerprint = recipe.fingerprint()
            if catalog.stored_model(connection, recipe.name, fingerprint) != model.model_id:
                raise ModelError(f"these options make model '{recipe.name}', not '{model.name}': name it with --model")
        try:
            loaded = self._load(recipe, fingerprint)
            return np.asarray(loaded.embed([loaded.prepare(path, None, None)])[0], dtype=np.float32)
        except ItemError as error:
            raise UsageError(f"'{path}' has no embedding by {model.name}: {error.code}, {error.detail}") from None

    def _load(self, recipe: Recipe, fingerprint: str) -> Model:
        if self._loaded is None or self._loaded[0] != fingerprint:
            self._loaded = fingerprint, recipe.load(self._device)
        return self._loaded[1]


def find(
    connection: Connection,
    word: str,
    model: StoredModel,
    kind: Kind | None,
    dataset: str | None,
    *,
    prefer: str | None = None,
) -> Asked:
    """What `word` stands for: a file or `.npy` on disk, an item by its path or id, or a speaker.

    `kind` says which is meant, `dataset` where an item or a speaker is to be looked up; of several, the one of dataset
    `prefer` is taken. A file that is an item, and has not changed since, has its vector already.
    Raises UsageError if it is nothing, or more than one of them.
    """
    datasets = _datasets(connection, model, dataset)
    finders: dict[Kind, Callable[[], list[Asked]]] = {
        "vector": lambda: _vectors(word, kind),
        "file": lambda: _files(connection, word, model, datasets, kind),
        "item": lambda: _items(connection, word, model, datasets),
        "speaker": lambda: _speakers(connection, word, datasets),
    }
    found = [asked for name, finder in finders.items() if kind in (None, name) for asked in finder()]
    # The same item by its file and by its path is one thing.
    distinct = {(one.item_id, *(() if one.item_id is not None else (one.kind, one.dataset))): one for one in found}
    if not distinct:
        raise UsageError(_nothing(word, kind, dataset))
    if len({one.kind for one in distinct.values()}) == 1:
        preferred = {key: one for key, one in distinct.items() if one.dataset == prefer}
        distinct = preferred if len(preferred) == 1 else distinct
    if len(distinct) > 1:
        raise UsageError(_ambiguous(word, list(distinct.values())))
    (asked,) = distinct.values()
    if asked.kind == "speaker":
        return _averaged(connection, asked, model)
    if asked.kind == "item" and asked.vector is None:
        raise UsageError(
            f"item '{asked.name}' of dataset '{asked.dataset}' has no vector by model '{model.name}':"
            f" 'embstore failures' says why, or type 'embstore extract' to go on"
        )
    return asked


def checked(vector: NDArray[Any], dim: int, name: str) -> NDArray[np.float32]:
    """An array as a query, float32 [dim]. Raises UsageError if it cannot be compared with the model's vectors."""
    values = np.asarray(vector)
    if values.ndim == 2 and len(values) == 1:
        values = values[0]
    if values.ndim != 1 or values.dtype.kind not in "fiu":
        raise UsageError(f"{name} is an array of {values.dtype} {list(values.shape)}; one vector of numbers is needed")
    if len(values) != dim:
        raise UsageError(
            f"{name} has {len(values):,} dimensions, the model's vectors have {dim:,}: name the model that made it"
        )
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all() or not values.any():
        raise UsageError(f"{name} holds {'only zeros' if not values.any() else 'values that are not finite'}")
    return values


def _datasets(connection: Connection, model: StoredModel, dataset: str | None) -> list[int]:
    if dataset is not None:
        return [catalog.get_dataset(connection, dataset).dataset_id]
    return [one.dataset_id for _, datasets in catalog.embedded(connection, None, model.name) for one in datasets]


def _vectors(word: str, kind: Kind | None) -> list[Asked]:
    path = Path(word)
    if kind is None and not (path.suffix == ".npy" and path.is_file()):
        return []
    try:
        vector = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UsageError(f"cannot read '{word}': {error.strerror or error}") from None
    except (ValueError, EOFError):
        raise UsageError(f"'{word}' is no array of numpy's (.npy)") from None
    if not isinstance(vector, np.ndarray):
        raise UsageError(f"'{word}' holds several arrays; save the one that is meant with numpy.save")
    return [Asked("vector", word, vector)]


def _files(
    connection: Connection, word: str, model: StoredModel, datasets: Sequence[int], kind: Kind | None
) -> list[Asked]:
    path = Path(word).absolute()
    if not path.exists():
        if kind == "file":
            raise UsageError(f"there is no file '{word}'")
        return []
    if kind is None and (path.suffix == ".npy" or path.is_dir()):
        return []
    rows = _rows(connection, model, datasets, _BY_FILE, file=str(path.resolve()))
    known = [_as_item(row) for row in rows if row.sent is not None and _is_unchanged(path, row)]
    return known[:1] or [Asked("file", word)]


def _is_unchanged(path: Path, row: Row[Any]) -> bool:
    now = path.stat()
    return (now.st_size, now.st_mtime_ns) == (row.size, row.mtime_ns)


def _items(connection: Connection, word: str, model: StoredModel, datasets: Sequence[int]) -> list[Asked]:
    rows = _rows(connection, model, datasets, _BY_PATH, name=word)
    if word.isascii() and word.isdigit() and len(word) <= 18:
        rows = [*rows, *_rows(connection, model, datasets, _BY_ID, item_id=int(word))]
    return [_as_item(row) for row in rows]


def _rows(
    connection: Connection, model: StoredModel, datasets: Sequence[int], condition: str, **values: Any
) -> Sequence[Row[Any]]:
    statement = _ITEMS.format(model_id=model.model_id, condition=condition)
    return connection.execute(text(statement), {"datasets": list(datasets), **values}).all()


def _as_item(row: Row[Any]) -> Asked:
    name = row.path if row.start is None else f"{row.path} from {row.start:g} s"
    return Asked("item", name, None if row.sent is None else _received(row.sent), row.dataset, row.item_id)


def _speakers(connection: Connection, word: str, datasets: Sequence[int]) -> list[Asked]:
    rows = connection.execute(text(_SPEAKERS), {"datasets": list(datasets), "name": word})
    return [Asked("speaker", word, dataset=row.dataset) for row in rows]


def _averaged(connection: Connection, asked: Asked, model: StoredModel) -> Asked:
    """A speaker with a vector: the centroid, or the mean as it is now where that is missing or stale."""
    assert asked.dataset is not None
    values = {"dataset": asked.dataset, "model": model.name, "speaker": asked.name}
    row = connection.execute(text(_CENTROID), values).one_or_none()
    if row is None:
        dataset_id = catalog.get_dataset(connection, asked.dataset).dataset_id
        average = text(_AVERAGE.format(model_id=model.model_id))
        row = connection.execute(average, {"dataset_id": dataset_id, "speaker": asked.name}).one()
    sent, utterances = row
    if sent is None:
        raise UsageError(
            f"speaker '{asked.name}' of dataset '{asked.dataset}' has no vector by model '{model.name}': "
            f"type 'embstore extract --dataset {asked.dataset} --model {model.name}' first"
        )
    return replace(asked, vector=_received(sent), utterances=utterances)


def _received(sent: Any) -> NDArray[np.float32]:
    return np.frombuffer(bytes(sent), dtype=">f4", offset=4).astype(np.float32)


def _nothing(word: str, kind: Kind | None, dataset: str | None) -> str:
    within = f" in dataset '{dataset}'" if dataset is not None else ""
    if kind in ("item", "speaker"):
        return f"there is no {kind} '{word}'{within} that this model was asked for: 'embstore datasets' lists what is"
    return (
        f"'{word}' is no file, and neither an item's path or id nor a speaker{within}: check the name, or add --model"
    )


def _ambiguous(word: str, found: Sequence[Asked]) -> str:
    kinds = sorted({one.kind for one in found})
    if len(kinds) > 1:
        choices = " or ".join(f"--as {kind}" for kind in kinds)
        names = " and of ".join("an item" if kind == "item" else f"a {kind}" for kind in kinds)
        return f"'{word}' is the name of {names}: add {choices}"
    more = ", …" if len(found) > _SHOWN else ""
    if kinds == ["speaker"]:
        names = ", ".join(f"'{one.dataset}'" for one in found[:_SHOWN])
        return f"speaker '{word}' is in the datasets {names}{more}: add --from DATASET"
    names = ", ".join(f"{one.item_id} ('{one.dataset}', {one.name})" for one in found[:_SHOWN])
    return f"'{word}' is {len(found)} items: {names}{more}; name one by its number and add --as item"
