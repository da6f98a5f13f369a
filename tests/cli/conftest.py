"""A store in which every state of an item occurs, and a way to type commands at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from commands import Command, Start, Watcher, install_probe
from odd_items import fill_odd
from sqlalchemy import Connection

from embstore import catalog, vectors
from embstore.cli.main import embstore
from embstore.db.engine import Database
from embstore.models.base import Media, Model
from embstore.queue import Queue, Refusal, end_lease, take_lease
from embstore.register import enqueue, register
from embstore.sources import Entry

Cli = Callable[..., Result]

DONE = np.array([[1, 0, 0.25], [0, 1, -0.5], [0.5, 0.5, 0], [3e-8, 1, 2e9]], dtype=np.float32)
"""The vectors of the first four items of dataset `calls`."""


class Small:
    """The facts of a model of three dimensions, which these tests never load."""

    name = "small"
    media: Media = "audio"
    dim = 3
    settings: Mapping[str, Any] = {"made": "for tests"}

    def fingerprint(self) -> str:
        return "0123456789abcdef"

    def load(self, device: str) -> Model:
        raise NotImplementedError


@pytest.fixture
def cli_at() -> Callable[[str | None], Cli]:
    """What makes a `cli` that types at the database of an address; None: the embedded one of EMBSTORE_HOME."""

    def typed_at(database_url: str | None) -> Cli:
        def run(*words: str, stdin: str | None = None, **env: str) -> Result:
            return CliRunner().invoke(embstore, words, input=stdin, env={"DATABASE_URL": database_url, **env})

        return run

    return typed_at


@pytest.fixture
def cli(database_url: str, cli_at: Callable[[str | None], Cli]) -> Cli:
    """Type a command, as on a shell, at the test's own database."""
    return cli_at(database_url)


@pytest.fixture
def watcher(database_url: str) -> Watcher:
    """A look into the test's own database."""
    return Watcher(database_url)


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    """The folder of an installed package that offers the model `probe`."""
    return install_probe(tmp_path / "site")


@pytest.fixture
def start(database_url: str, tmp_path: Path, probe: Path) -> Iterator[Start]:
    """Start `embstore WORDS` at the test's own database; keywords are environment, but for `terminal`."""
    started: list[Command] = []

    def start(*words: str, terminal: bool = False, **env: object) -> Command:
        given = {"DATABASE_URL": database_url, "PYTHONPATH": probe, **env}
        env = {name: str(value) for name, value in given.items()}
        started.append(Command(words, tmp_path, env, terminal=terminal))
        return started[-1]

    yield start
    for command in started:
        if command.members():
            command.kill_group()
        command.process.wait()


@pytest.fixture
def store(database: Database) -> Database:
    """Dataset `calls`: 10 items by model `small`, 4 done, 2 failed, 1 skipped, 1 running at a dead worker, 2 pending.

    Dataset `books`: 3 items, which no model was asked for.
    """
    with database.begin() as connection:
        model_id = catalog.ensure_model(connection, Small())
        dataset_id = _register(connection, "calls", 10)
        _register(connection, "books", 3)
        enqueue(connection, dataset_id, model_id)
        queue = Queue("embstore.extraction", "item_id", {"dataset_id": dataset_id, "model_id": model_id})
        token = take_lease(connection)
        ids = queue.claim(connection, token, limit=8)
        vectors.write(connection, queue, token, ids[:4], DONE)
        refusals = [
            Refusal(ids[4], "failed", "decode_error", "no header"),
            Refusal(ids[5], "failed", "not_found", "no such file"),
            Refusal(ids[6], "skipped", "no_speech", "nothing left after trimming"),
        ]
        queue.refuse(connection, token, refusals)
        end_lease(connection, token)
    return database


@pytest.fixture
def odd(database: Database) -> Database:
    """Dataset `odd` by model `wide v2`: names and stretches that need care."""
    fill_odd(database)
    return database


def _register(connection: Connection, name: str, count: int) -> int:
    dataset = catalog.ensure_dataset(connection, name, "audio", f"/data/{name}")
    speakers = ("ann", "böb")
    entries = [Entry(f"{speakers[i % 2]}/{i:02}.wav", speakers[i % 2], None, None, 1000, 1) for i in range(count)]
    register(connection, dataset.dataset_id, entries)
    return dataset.dataset_id
