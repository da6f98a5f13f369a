"""The recipes that the database keeps: whoever embeds with a model types its name, and nothing else about it.

A model comes into the database with what it was made of: a family and its options. `add` does that under a name of
one's choice, ahead of any run; a run does it under the recipe's own name. The weights stay where they are; a
fingerprint tells whether those at hand are the right ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text

from embstore import catalog, vectors
from embstore.db import schema
from embstore.db.engine import set_local
from embstore.errors import EmbstoreError, ModelError, UsageError
from embstore.models import registry
from embstore.models.named import Named
from embstore.queue import at_work
from embstore.words import plural

_WHERE = ("model_dir", "variant")
"""Options that say where the weights are. One that is given takes the place of any that is kept."""

_PATHS = ("model_dir",)
"""Options that are paths: what the database keeps must not depend on the folder in which somebody typed it."""

_KEPT = "SELECT family, options FROM embstore.model WHERE name = :name"

_SHOWN = """
SELECT m.name, m.family, m.options, m.media, m.dim, m.fingerprint, m.settings, m.created_at,
    (SELECT count(*) FROM embstore.embedding e WHERE e.model_id = m.model_id) AS vectors
FROM embstore.model m WHERE m.name = :name
"""

_LOCK_SECONDS = 10


@dataclass(frozen=True)
class Shown:
    """A model as the database knows it."""

    name: str
    family: str | None
    options: Mapping[str, str] | None
    media: str
    dim: int
    fingerprint: str
    settings: Mapping[str, Any]
    created_at: datetime
    vectors: int
    views: list[str]


def with_whole_paths(options: Mapping[str, str]) -> dict[str, str]:
    """The same options, in which a path is one from the root."""
    return {
        name: str(Path(value).expanduser().resolve()) if name in _PATHS else value for name, value in options.items()
    }


def find(connection: Connection, name: str, options: Mapping[str, str], media: str | None = None) -> Named:
    """What `name` stands for: a model that the database keeps, or a family that is installed, `family:variant` too.

    `options` go before those that are kept; `media` is what it has to embed, if not None. Whether the weights are the
    same is left to `catalog.stored_model`. Raises ModelError and UsageError.
    """
    found = _find(connection, registry.name_for(name, media), options)
    registry.check_media(found, media)
    return found


def _find(connection: Connection, name: str, options: Mapping[str, str]) -> Named:
    kept = connection.execute(text(_KEPT), {"name": name}).one_or_none()
    if kept is None or kept.family is None:
        if kept is not None and name.partition(":")[0] not in registry.available():
            raise ModelError(
                f"model '{name}' was imported with its vectors, and what it is made of is not known: nothing can be"
                f" embedded by it, unless 'embstore models add {name} --family …' finds the same weights"
            )
        return _installed(connection, name, options)
    moved = not options.keys().isdisjoint(_WHERE)
    merged = {key: value for key, value in kept.options.items() if not (moved and key in _WHERE)} | dict(options)
    try:
        return Named(name, kept.family, merged, registry.build(kept.family, merged))
    except EmbstoreError as error:
        if moved or "model_dir" not in merged:
            raise
        hint = f"'{name}' is kept with model_dir={merged['model_dir']}; give --model-dir if it lies elsewhere here"
        raise type(error)(f"{error} ({hint})") from error


def _installed(connection: Connection, name: str, options: Mapping[str, str]) -> Named:
    family, given = registry.resolve(name, options)
    if family not in registry.available() and (kept := _names(connection)):
        known = ", ".join(f"'{one}'" for one in kept)
        try:
            registry.build(family, given)
        except ModelError as error:
            raise ModelError(f"{error}; kept in the database: {known}") from None
    recipe = registry.build(family, given)
    return Named(recipe.name, family, given, recipe)


def _names(connection: Connection) -> list[str]:
    """Names of kept models that are no more than a family's."""
    names = connection.execute(text("SELECT name FROM embstore.model WHERE family <> name ORDER BY name")).scalars()
    return list(names)


def add(connection: Connection, name: str, family: str, options: Mapping[str, str]) -> tuple[Named, bool]:
    """Keep a recipe under a name: (the recipe, whether the name is new). Kept again, its options are replaced.

    Raises UsageError for a name that can't be used, ModelError where it stands for other weights or settings.
    """
    check_name(name, family)
    recipe = Named(name, family, dict(options), registry.build(family, options))
    known = catalog.stored_model(connection, name, recipe.fingerprint()) is not None
    model_id = catalog.ensure_model(connection, recipe)
    if known:  # and otherwise, as a writer may add a model, but not change what others use
        connection.execute(
            text(
                "UPDATE embstore.model SET family = :family, options = CAST(:options AS jsonb)"
                " WHERE model_id = :model_id"
            ),
            {"model_id": model_id, "family": family, "options": json.dumps(dict(options))},
        )
    return recipe, not known


def check_name(name: str, family: str | None = None) -> None:
    """Raise UsageError for a name that a model of this family, None: of none, can't have."""
    start = name.partition(":")[0]
    if not name.isprintable() or name != name.strip() or not name:
        raise UsageError(f"model name {name!r} is empty, or has spaces around it or characters that do not print")
    if name in registry.available() or (start != family and start in registry.available()):
        raise UsageError(f"'{start}' is the name of a family of models; choose another name, such as my-{name}")


def show(connection: Connection, name: str) -> Shown:
    """What the database knows of a model. Raises ModelError for an unknown name."""
    model_id = catalog.get_model(connection, name).model_id
    row = connection.execute(text(_SHOWN), {"name": name}).one()
    return Shown(**row._mapping, views=vectors.views(connection, model_id))


def remove(connection: Connection, name: str, *, with_vectors: bool) -> int:
    """Take a model out of the database, with all that was computed by it; returns the number of its vectors.

    Raises ModelError for an unknown name, UsageError if there are vectors that are not to go, or while it is in use.
    """
    shown = show(connection, name)
    if shown.vectors and not with_vectors:
        raise UsageError(
            f"model '{name}' has {plural(shown.vectors, 'vector')}: add --with-vectors to remove them too, and all"
            " that was computed from them"
        )
    model_id = catalog.get_model(connection, name).model_id
    if at_work(connection, {"model_id": model_id}):
        raise UsageError(f"a run is using model '{name}': stop it first")
    # The partition goes first: afterwards there is no vector left that the deletion of its extraction would delete.
    set_local(connection, "lock_timeout", f"{_LOCK_SECONDS}s")
    vectors.drop_partition(connection, model_id)
    # The log of changes goes last: the deletion of extractions writes into it. What was run stays on record.
    kept = (schema.model, schema.run)
    tables = [table for table in schema.metadata.sorted_tables if "model_id" in table.c and table not in kept]
    for table in sorted(tables, key=lambda table: table is schema.speaker_change):
        connection.execute(table.delete().where(table.c.model_id == model_id))
    connection.execute(schema.model.delete().where(schema.model.c.model_id == model_id))
    return shown.vectors
