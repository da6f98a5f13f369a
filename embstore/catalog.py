"""Datasets, models and runs: what is there, by name."""

from __future__ import annotations

import difflib
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from sqlalchemy import Connection, text

from embstore import sharing
from embstore.errors import ModelError, UsageError
from embstore.locks import lock_dataset, run_when_free
from embstore.models.base import Recipe
from embstore.models.named import Named


@dataclass(frozen=True)
class Dataset:
    """A named set of items under one root."""

    dataset_id: int
    name: str
    """`train`; or `asr/train` where one sees several of that name, of different teams."""
    media: str
    root: str
    can_write: bool = True
    """False: it is shared for reading."""


_INSERT = """
INSERT INTO embstore.dataset (name, media, root, team) VALUES (:name, :media, :root, :team)
ON CONFLICT (md5(team), md5(name)) DO NOTHING
"""
_COLUMNS = "d.dataset_id, d.dataset, d.media, d.root, d.can_write"
"""Of the view `datasets`."""


@dataclass(frozen=True)
class StoredModel:
    """A model as the database knows it."""

    model_id: int
    name: str
    dim: int


@dataclass(frozen=True)
class ItemRow:
    """One claimed item, as the decoder needs it: path relative to the root, stretch in seconds or None."""

    item_id: int
    path: str
    start: float | None
    duration: float | None


@dataclass(frozen=True)
class OpenWork:
    """A dataset and a model between which something is left to do."""

    dataset: Dataset
    model: str


def get_dataset(connection: Connection, name: str, *, writing: bool = False) -> Dataset:
    """Find a dataset by name, or by `team/name`.

    Raises UsageError that lists the names there are, or if it is to be written to and shared for reading only.
    """
    found = _named(connection, name)
    if not found:
        names = connection.execute(text("SELECT dataset FROM embstore.datasets ORDER BY dataset")).scalars().all()
        raise UsageError(f"no dataset '{name}': {_known(name, names, 'datasets')}")
    if len(found) > 1:
        raise _ambiguous(name, found)
    if writing and not found[0].can_write:
        raise UsageError(
            f"dataset '{name}' is shared for reading: its team can type 'embstore share {name} --with TEAM --write'"
        )
    return found[0]


def _named(connection: Connection, name: str) -> list[Dataset]:
    """The datasets that a name may mean; the one that is shown under it, if there is one."""
    sql = f"""
    SELECT {_COLUMNS} FROM embstore.datasets d WHERE d.dataset_id IN (SELECT embstore.datasets_called(:name))
    ORDER BY d.dataset
    """
    return [Dataset(*row) for row in connection.execute(text(sql), {"name": name})]


def _ambiguous(name: str, found: Sequence[Dataset]) -> UsageError:
    return UsageError(f"several datasets are called '{name}': say {' or '.join(repr(d.name) for d in found)}")


def datasets(connection: Connection, media: str) -> list[Dataset]:
    """All datasets of one kind of media that one may write to, in the order in which they were made."""
    rows = connection.execute(
        text(f"SELECT {_COLUMNS} FROM embstore.datasets d WHERE media = :media AND can_write ORDER BY dataset_id"),
        {"media": media},
    )
    return [Dataset(*row) for row in rows]


def find_writable(connection: Connection, name: str) -> Dataset | None:
    """The dataset of that name that one may write to, if there is one. Raises UsageError if there are several."""
    found = [dataset for dataset in _named(connection, name) if dataset.can_write]
    if len(found) > 1:
        raise _ambiguous(name, found)
    return found[0] if found else None


def ensure_dataset(connection: Connection, name: str, media: str, root: str) -> Dataset:
    """Find or make a dataset, and lock it until the transaction ends: two runs must not register into it at once.

    A new one belongs to the team of whoever makes it, or to that of a name such as `team/name`. Raises UsageError if
    the name stands for another root, or if there is no one team.
    """
    dataset = find_writable(connection, name) or _make(connection, name, media, root)
    lock_dataset(connection, dataset.dataset_id)
    if dataset.root != root:
        raise UsageError(
            f"dataset '{name}' holds the files of '{dataset.root}', not of '{root}': give --dataset another name"
        )
    if dataset.media != media:
        raise UsageError(
            f"dataset '{name}' holds {dataset.media}, not {media}: type --media {dataset.media},"
            " or give --dataset another name"
        )
    return dataset


def _make(connection: Connection, name: str, media: str, root: str) -> Dataset:
    team, plain = sharing.place(connection, name)
    values = {"name": plain, "media": media, "root": root, "team": team}
    # Another run may be registering the very same, and not have come to an end.
    run_when_free(connection, _INSERT, values, lambda: f"dataset '{name}' is being made by another run")
    row = connection.execute(
        text(f"SELECT {_COLUMNS} FROM embstore.datasets d WHERE name = :name AND team IS NOT DISTINCT FROM :team"),
        values,
    ).one()
    return Dataset(*row)


def ensure_model(connection: Connection, recipe: Recipe) -> int:
    """Find or make a model by name; returns its model_id. What it was made of is kept with it, if the recipe says so.

    Raises ModelError if the name stands for other weights or settings: their vectors must never be mixed.
    """
    fingerprint = recipe.fingerprint()
    values = {
        "name": recipe.name,
        "media": recipe.media,
        "dim": recipe.dim,
        "fingerprint": fingerprint,
        "settings": json.dumps(dict(recipe.settings)),
        "family": recipe.family if isinstance(recipe, Named) else None,
        "options": json.dumps(dict(recipe.options)) if isinstance(recipe, Named) else None,
    }
    model_id = connection.execute(
        text(
            "SELECT embstore.add_model(:name, :media, :dim, :fingerprint, CAST(:settings AS jsonb), :family,"
            " CAST(:options AS jsonb))"
        ),
        values,
    ).scalar()
    if model_id is not None:
        return int(model_id)
    stored = stored_model(connection, recipe.name, fingerprint)
    assert stored is not None
    return stored


def stored_model(connection: Connection, name: str, fingerprint: str) -> int | None:
    """The model_id of a model, None if it is new. Raises ModelError as `ensure_model` does."""
    row = connection.execute(
        text("SELECT model_id, fingerprint FROM embstore.model WHERE name = :name"), {"name": name}
    ).one_or_none()
    if row is None:
        return None
    if row.fingerprint != fingerprint:
        raise ModelError(
            f"model '{name}' here has other weights or settings than the one of that name in the database "
            f"(fingerprint {fingerprint[:12]}, stored {row.fingerprint[:12]}): their vectors cannot be compared; "
            "use the weights that made the stored ones, or another model name"
        )
    return int(row.model_id)


def items(connection: Connection, dataset_id: int, item_ids: Sequence[int]) -> list[ItemRow]:
    """Paths and stretches of items, in the order of their ids."""
    rows = connection.execute(
        text(
            "SELECT item_id, path, start, duration FROM embstore.item"
            " WHERE dataset_id = :dataset_id AND item_id = ANY (:item_ids) ORDER BY item_id"
        ),
        {"dataset_id": dataset_id, "item_ids": list(item_ids)},
    )
    return [ItemRow(*row) for row in rows]


def open_work(connection: Connection) -> list[OpenWork]:
    """Every dataset one may write to, and model, between which extractions are pending or were left running."""
    rows = connection.execute(
        text(
            f"SELECT {_COLUMNS}, m.name FROM embstore.datasets d CROSS JOIN embstore.model m"
            " WHERE d.can_write AND (EXISTS (SELECT FROM embstore.extraction e WHERE e.dataset_id = d.dataset_id"
            " AND e.model_id = m.model_id AND e.status = 'pending') OR EXISTS (SELECT FROM embstore.extraction e"
            " WHERE e.dataset_id = d.dataset_id AND e.model_id = m.model_id AND e.status = 'running'))"
            " ORDER BY m.model_id, d.dataset_id"
        )
    )
    return [OpenWork(Dataset(*row[:-1]), row[-1]) for row in rows]


def embedded(
    connection: Connection, dataset: str | None, model: str | None, *, writing: bool = False
) -> list[tuple[StoredModel, list[Dataset]]]:
    """For each model, the datasets that have extractions by it: all, or those of the given names.

    `writing`: of those that one may write to. Raises UsageError for a dataset that is unknown or not to be written to,
    and ModelError for an unknown model.
    """
    dataset_id = None if dataset is None else get_dataset(connection, dataset, writing=writing).dataset_id
    if model is not None:
        get_model(connection, model)
    # The least key and not EXISTS: that one is planned as a join, which reads all extractions there are.
    rows = connection.execute(
        text(
            f"SELECT m.model_id, m.name, m.dim, {_COLUMNS}"
            " FROM embstore.model m CROSS JOIN embstore.datasets d"
            " WHERE (SELECT min(x.item_id) FROM embstore.extraction x"
            " WHERE x.dataset_id = d.dataset_id AND x.model_id = m.model_id) IS NOT NULL"
            " AND (CAST(:dataset_id AS integer) IS NULL OR d.dataset_id = :dataset_id)"
            " AND (d.can_write OR NOT :writing)"
            " AND (CAST(:model AS text) IS NULL OR m.name = :model) ORDER BY m.model_id, d.dataset_id"
        ),
        {"dataset_id": dataset_id, "model": model, "writing": writing},
    )
    found: dict[StoredModel, list[Dataset]] = {}
    for row in rows:
        found.setdefault(StoredModel(*row[:3]), []).append(Dataset(*row[3:]))
    return list(found.items())


def one_pair(connection: Connection, dataset: str | None, model: str | None) -> tuple[StoredModel, Dataset]:
    """A model and a dataset that has vectors by it; either may be left out where there is but one.

    Raises UsageError if it is unclear which is meant, ModelError for an unknown model.
    """
    chosen = one_model(connection, dataset, model)
    if dataset is not None:
        return chosen, get_dataset(connection, dataset)
    datasets = [one for _, them in embedded(connection, None, chosen.name) for one in them]
    if len(datasets) != 1:
        names = ", ".join(f"'{found.name}'" for found in datasets)
        raise UsageError(
            f"there are several datasets, {names}: add --dataset NAME"
            if datasets
            else f"there are no vectors by model '{chosen.name}': type 'embstore extract PATH' first"
        )
    return chosen, datasets[0]


def one_model(
    connection: Connection,
    dataset: str | None,
    model: str | None,
    *,
    prefer: str | None = None,
    first: str = "'embstore extract PATH'",
) -> StoredModel:
    """The model of that name, or the only one that was asked to embed anything of the dataset (None: of any).

    Of several, the one called `prefer` is taken. `first` is what to type if there are none. Raises UsageError and
    ModelError.
    """
    if model is not None:
        return get_model(connection, model)
    models = [found for found, _ in embedded(connection, dataset, None)]
    preferred = models if len(models) == 1 else [found for found in models if found.name == prefer]
    if preferred:
        return preferred[0]
    names = ", ".join(f"'{found.name}'" for found in models)
    raise UsageError(
        f"there are vectors by several models, {names}: add --model NAME"
        if models
        else f"there are no vectors: type {first}"
    )


def get_model(connection: Connection, name: str) -> StoredModel:
    """Find a stored model by name. Raises ModelError that lists the names there are."""
    row = connection.execute(
        text("SELECT model_id, name, dim FROM embstore.model WHERE name = :name"), {"name": name}
    ).one_or_none()
    if row is None:
        names = connection.execute(text("SELECT name FROM embstore.model ORDER BY name")).scalars().all()
        raise ModelError(f"no model '{name}' in the database: {_known(name, names, 'models')}")
    return StoredModel(*row)


def start_run(
    connection: Connection, command: str, dataset_id: int, model_id: int | None, parameters: Mapping[str, Any]
) -> int:
    """Note that a command has begun on a dataset; returns the run_id."""
    return int(
        connection.execute(
            text(
                "INSERT INTO embstore.run (dataset_id, model_id, command, parameters, host, version) VALUES"
                " (:dataset_id, :model_id, :command, CAST(:parameters AS jsonb), :host, :version) RETURNING run_id"
            ),
            {
                "dataset_id": dataset_id,
                "model_id": model_id,
                "command": command,
                "parameters": json.dumps(dict(parameters)),
                "host": socket.gethostname(),
                "version": metadata.version("embstore"),
            },
        ).scalar_one()
    )


def end_run(connection: Connection, run_id: int, dataset_id: int, status: str, counts: Mapping[str, Any]) -> None:
    """Note how a command ended: `done`, `interrupted` or `failed`, and what it counted."""
    connection.execute(
        text(
            "UPDATE embstore.run SET status = :status, counts = CAST(:counts AS jsonb)"
            " WHERE dataset_id = :dataset_id AND run_id = :run_id"
        ),
        {"dataset_id": dataset_id, "run_id": run_id, "status": status, "counts": json.dumps(dict(counts))},
    )


def record(connection: Connection, command: str, dataset_id: int, parameters: Mapping[str, Any]) -> None:
    """Note a command that is done in this one transaction."""
    run_id = start_run(connection, command, dataset_id, None, parameters)
    end_run(connection, run_id, dataset_id, "done", {})


def _known(name: str, names: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean '{near[0]}'? 'embstore {what}' lists all"
    return (
        "known are " + ", ".join(f"'{n}'" for n in names)
        if names
        else "none is registered yet: 'embstore extract PATH'"
    )
