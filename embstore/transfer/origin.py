"""By which model the vectors of a file were made, and where that is in this database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from embstore import catalog, recipes
from embstore.catalog import StoredModel
from embstore.errors import ModelError, UsageError
from embstore.models import registry
from embstore.models.base import Media, Model
from embstore.transfer.table import Facts

LARGEST = 16_000
"""Dimensions that pgvector stores."""

_SAME = "SELECT name FROM embstore.model WHERE fingerprint = :fingerprint ORDER BY name <> :name, model_id LIMIT 1"


@dataclass(frozen=True)
class Carried:
    """A model of which a file tells, or a person; nobody can load it."""

    name: str
    media: Media
    dim: int
    print_: str
    settings: Mapping[str, Any]

    def fingerprint(self) -> str:
        """Of the weights; where nobody knows them, what stands for them is the name that a person gave."""
        return self.print_

    def load(self, device: str) -> Model:
        """Raise ModelError."""
        raise ModelError(f"model '{self.name}' came with a file: what it is made of is not known ({device})")


def ensure(connection: Connection, facts: Facts | None, name: str | None, dim: int, media: Media) -> StoredModel:
    """The model in the database that made vectors of `dim` values; it is made there if need be.

    A file that carries a fingerprint finds its model by it, whatever that is called here. One that carries none needs
    `name`: of a model that is there, of one that is installed, or a new one. Raises UsageError and ModelError.
    """
    if not 0 < dim <= LARGEST:
        raise UsageError(f"vectors of {dim:,} values cannot be stored: 1 to {LARGEST:,} can")
    print_ = facts.fingerprint if facts else None
    if print_ is not None and facts is not None:
        chosen = name or _by_fingerprint(connection, print_, facts.model or "") or facts.model
        if chosen is None:
            raise UsageError("the file does not name its model: add --model NAME")
        catalog.ensure_model(connection, Carried(chosen, media, dim, print_, facts.settings))
        return _fitting(catalog.get_model(connection, chosen), dim)
    if name is None:
        raise UsageError("the file does not say by which model its vectors were made: add --model NAME")
    if name not in _names(connection):
        if name.partition(":")[0] in registry.available():
            catalog.ensure_model(connection, recipes.find(connection, name, {}))
        else:
            catalog.ensure_model(connection, Carried(name, media, dim, f"imported:{name}:{dim}", {}))
    return _fitting(catalog.get_model(connection, name), dim)


def _by_fingerprint(connection: Connection, print_: str, name: str) -> str | None:
    found = connection.execute(text(_SAME), {"fingerprint": print_, "name": name}).scalar()
    return None if found is None else str(found)


def _names(connection: Connection) -> set[str]:
    return set(connection.execute(text("SELECT name FROM embstore.model")).scalars())


def _fitting(model: StoredModel, dim: int) -> StoredModel:
    if model.dim != dim:
        raise UsageError(f"the vectors have {dim} values, those of model '{model.name}' have {model.dim}")
    return model
