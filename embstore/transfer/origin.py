"""Where a table comes from: which dataset and which model of this database it is of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text

from embstore import catalog, recipes
from embstore.catalog import Dataset
from embstore.errors import EmbstoreError, ModelError, UsageError
from embstore.models import registry
from embstore.models.base import Media, Model, Recipe
from embstore.sources.listed import Under
from embstore.transfer.reading import LARGEST_DIM, Reader
from embstore.transfer.table import Facts

_BY_FINGERPRINT = """
SELECT name FROM embstore.model WHERE fingerprint = :fingerprint ORDER BY name <> :name, model_id LIMIT 1
"""
_BY_NAME = "SELECT name, media, dim, fingerprint, settings FROM embstore.model WHERE name = :name"


@dataclass(frozen=True)
class Wanted:
    """What a person says of a table; None: what it says itself, or what there is."""

    dataset: str | None = None
    model: str | None = None
    root: Path | None = None
    media: Media | None = None


@dataclass(frozen=True)
class Carried:
    """A model of which a file tells, or that the database knows; nobody can load it."""

    name: str
    media: Media
    dim: int
    weights: str
    """Their fingerprint; where nobody knows them, what stands for them is the name that a person gave."""
    settings: Mapping[str, Any]

    def fingerprint(self) -> str:
        """As it was carried."""
        return self.weights

    def load(self, device: str) -> Model:
        """Raise ModelError."""
        raise ModelError(f"model '{self.name}' came with a file: what it is made of is not known ({device})")


@dataclass(frozen=True)
class Origin:
    """Where the rows of a table belong."""

    dataset: str
    root: str
    media: Media
    model: Recipe
    under: Under
    there: Dataset | None
    """The dataset, if it is there already."""


def find(connection: Connection, reader: Reader, wanted: Wanted) -> Origin:
    """Where a table belongs; nothing is made yet. Raises UsageError and ModelError."""
    facts = reader.facts
    name = wanted.dataset or (facts.dataset if facts else None)
    there = catalog.find_writable(connection, name) if name else None
    lacking = {
        "--dataset NAME": name is None,
        "--root FOLDER (of the files that were embedded, there or not)": not (there or wanted.root or reader.root),
        "--model NAME": not (wanted.model or (facts and facts.fingerprint)),
    }
    if name is None or any(lacking.values()):
        flags = " and ".join(flag for flag, is_lacking in lacking.items() if is_lacking)
        raise UsageError(f"the file does not say all that is needed: add {flags}")
    root = _root(name, there, reader, wanted)
    media = wanted.media or (facts.media if facts else None) or (there.media if there else None)
    model = _model(connection, facts, wanted.model, reader.dim, media)
    if there and there.media != model.media:
        raise UsageError(f"dataset '{name}' holds {there.media}, not {model.media}: give --dataset another name")
    also = [Path(one) for one in (reader.root, wanted.root) if one is not None]
    return Origin(name, os.fspath(root), model.media, model, Under(root, root, also), there)


def _root(name: str, there: Dataset | None, reader: Reader, wanted: Wanted) -> Path:
    """The root of the dataset. Raises UsageError if it is not known, or if the files of the table are others."""
    given = wanted.root.absolute() if wanted.root else None
    if there is None:
        found = given.resolve() if given else reader.root
        assert found is not None
        return found
    root = Path(there.root)
    if given is not None and root not in (given, given.resolve()):
        raise UsageError(f"dataset '{name}' holds the files of '{root}', not of '{given}': give --dataset another name")
    if given is None and wanted.dataset is None and reader.root not in (None, root):
        raise UsageError(
            f"dataset '{name}' here holds the files of '{root}', that of the file those of '{reader.root}': add"
            f" --dataset {name} if they are the same, or give it another name"
        )
    return root


def _model(connection: Connection, facts: Facts | None, name: str | None, dim: int, media: str | None) -> Recipe:
    """The model in the database, or that is to be made there, that made vectors of `dim` values.

    A file that carries a fingerprint finds its model by it, whatever that is called here; one that carries none needs
    `name`.
    """
    if dim > LARGEST_DIM:
        raise UsageError(f"vectors of {dim:,} values cannot be stored: up to {LARGEST_DIM:,} can")
    fingerprint = facts.fingerprint if facts else None
    if facts is None or fingerprint is None:
        model = _named(connection, name, dim, media)
    else:
        model = _of_fingerprint(connection, facts, fingerprint, name, dim, media)
    if model.dim != dim:
        raise UsageError(
            f"the vectors have {dim} values, those of model '{model.name}' have {model.dim}: give --model another name"
        )
    registry.check_media(model, media)
    return model


def _of_fingerprint(
    connection: Connection, facts: Facts, fingerprint: str, name: str | None, dim: int, media: str | None
) -> Recipe:
    called = facts.model or "?"
    known = connection.execute(text(_BY_FINGERPRINT), {"fingerprint": fingerprint, "name": name or called}).scalar()
    if known is not None:
        if name not in (None, known):
            catalog.stored_model(connection, str(name), fingerprint)
            raise UsageError(f"the vectors are by model '{known}', as this database calls it: leave --model out")
        return _stored(connection, known)
    kept = name or called
    catalog.stored_model(connection, kept, fingerprint)
    installed = _installed(connection, kept)
    if installed is not None and installed.fingerprint() == fingerprint:
        return installed
    if installed is not None and name is not None:
        raise ModelError(
            f"the vectors were made by other weights or settings than those of model '{name}' here (fingerprint"
            f" {fingerprint[:12]}, here {installed.fingerprint()[:12]}): give --model another name"
        )
    if name is None:
        raise UsageError(
            f"the vectors are by a model that is not known here, '{called}', fingerprint {fingerprint[:12]}: add"
            " --model NAME to keep them under a name, under which nothing can be embedded until 'embstore models add'"
            " knows it"
        )
    recipes.check_name(name)
    return Carried(name, _media(media), dim, fingerprint, facts.settings)


def _named(connection: Connection, name: str | None, dim: int, media: str | None) -> Recipe:
    assert name is not None
    if connection.execute(text(_BY_NAME), {"name": name}).one_or_none() is not None:
        return _stored(connection, name)
    if (installed := _installed(connection, name)) is not None:
        return installed
    recipes.check_name(name)
    return Carried(name, _media(media), dim, f"imported:{name}:{dim}", {})


def _media(media: str | None) -> Media:
    return "image" if media == "image" else "audio"


def _stored(connection: Connection, name: str) -> Recipe:
    return Carried(*connection.execute(text(_BY_NAME), {"name": name}).one())


def _installed(connection: Connection, name: str) -> Recipe | None:
    """The model that an installed package offers under this name, if it can be made without further options."""
    if name.partition(":")[0] not in registry.available():
        return None
    try:
        return recipes.find(connection, name, {})
    except EmbstoreError:
        return None
