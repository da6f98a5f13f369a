"""Runs of the real command over generated sound by a model that takes its time, and a look at what they leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from audit import ITEMS, Vectors, read_vectors
from commands import PATIENCE, Command, Gate, Start, Watcher, install_probe, write_tones
from helpers import own_home
from sqlalchemy import make_url

from embstore.db import embedded, migrate
from embstore.db.engine import Database
from embstore.settings import load


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an installed package that offers the model `probe`."""
    return install_probe(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of short sounds."""
    folder = tmp_path_factory.mktemp("sound") / "tones"
    write_tones(folder, ITEMS)
    return folder


@pytest.fixture(scope="session")
def undisturbed(template: str, tones: Path, probe: Path, tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    """The vectors of `tones`, from a run that nobody disturbs."""
    base = make_url(template)
    connection = psycopg2.connect(base.set(drivername="postgresql", database="embstore").render_as_string(False))
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE undisturbed TEMPLATE {base.database} STRATEGY FILE_COPY")
    connection.close()
    address = base.set(database="undisturbed").render_as_string(hide_password=False)
    env = {"DATABASE_URL": address, "PYTHONPATH": str(probe)}
    run = Command(("extract", str(tones), "--model", "probe"), tmp_path_factory.mktemp("undisturbed"), env)
    assert run.wait() == 0, run.err
    vectors = read_vectors(Watcher(address))
    assert len(vectors) == ITEMS
    return vectors


@pytest.fixture
def watcher(database_url: str) -> Watcher:
    """A look into the test's own database."""
    return Watcher(database_url)


@pytest.fixture
def runs() -> Iterator[list[Command]]:
    """All that the test has started; what is left of it is ended."""
    started: list[Command] = []
    yield started
    for run in started:
        if run.members():
            run.kill_group()
        run.process.wait()


@pytest.fixture
def start(database_url: str, tmp_path: Path, probe: Path, runs: list[Command]) -> Start:
    """Start `embstore WORDS` at the test's own database; keywords are settings of the model and other environment."""

    def start(*words: str, terminal: bool = False, **env: object) -> Command:
        given = {name: str(value) for name, value in env.items()}
        own = {"DATABASE_URL": database_url, "PYTHONPATH": str(probe), "EMBSTORE_TEST_LEASE_SECONDS": 2 * PATIENCE}
        run = Command(words, tmp_path, {name: str(value) for name, value in (own | given).items()}, terminal=terminal)
        runs.append(run)
        return run

    return start


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """A gate before the device, which is open."""
    return Gate(tmp_path / "gate")


@pytest.fixture
def other_home() -> Iterator[Path]:
    """A home of its own, whose server a test may kill."""
    with own_home() as home:
        yield home


@pytest.fixture
def other_server(other_home: Path) -> Iterator[str]:
    """The address of a server that nobody but the test starts and stops, as one behind a DATABASE_URL."""
    address = embedded.ensure_running(other_home)
    database = Database(load(database_url=address, home=other_home))
    migrate.upgrade(database)
    database.close()
    yield address
    embedded.ensure_running(other_home)
