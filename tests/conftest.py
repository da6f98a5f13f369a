"""One PostgreSQL a test process, one migrated template database in it, and a copy of that for each test."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from helpers import own_home
from people import People, people_of
from sqlalchemy import make_url

from embstore.db import embedded, migrate
from embstore.db.engine import Database
from embstore.settings import NAMES, Settings, load

# A shell starts what runs in its background with SIGINT ignored, and so would be all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# And `nohup` with SIGHUP. A child does not inherit a handler, but what comes without one.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

TEMPLATE = "embstore_template"
_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A test must never reach the database that whoever runs the tests works with."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EMBSTORE_HOME", str(tmp_path / "no-home"))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real speech; see its README."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("EMBSTORE_TEST_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"no test data at '{folder}' (set EMBSTORE_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def server_home() -> Iterator[Path]:
    """The home of an embedded server that runs for the session."""
    with own_home() as home:
        embedded.ensure_running(home)
        _execute(embedded.url(home), "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")
        yield home


@pytest.fixture(scope="session")
def template(server_home: Path) -> str:
    """Address of a migrated database without anything in it, which the tests' own are copies of."""
    _execute(embedded.url(server_home), f"CREATE DATABASE {TEMPLATE}")
    address = _address(server_home, TEMPLATE)
    database = Database(load(database_url=address, home=server_home))
    migrate.upgrade(database)
    database.close()
    return address


@pytest.fixture
def bare_url(server_home: Path) -> Iterator[str]:
    """Address of a new database with nothing in it, not even pgvector."""
    yield from _new_database(server_home, "")


@pytest.fixture
def database_url(server_home: Path, template: str) -> Iterator[str]:
    """Address of a new, migrated database."""
    yield from _new_database(server_home, f"TEMPLATE {TEMPLATE} STRATEGY FILE_COPY")


@pytest.fixture
def second_url(server_home: Path, template: str) -> Iterator[str]:
    """Address of another new, migrated database."""
    yield from _new_database(server_home, f"TEMPLATE {TEMPLATE} STRATEGY FILE_COPY")


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    """Settings that name the test's own database."""
    return load(database_url=database_url, home=tmp_path / "no-home")


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    """The test's own, migrated database."""
    database = Database(settings, pool_size=4)
    yield database
    database.close()


@pytest.fixture
def people(database: Database, settings: Settings) -> Iterator[People]:
    """Makes teams and logins, which are gone when the test is over."""
    with people_of(database, settings) as people:
        yield people


def _new_database(home: Path, template: str) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    # What a role has set for a database is not copied with it.
    search_path = f"ALTER ROLE embstore IN DATABASE {name} SET search_path = public, embstore"
    settings = [search_path] if template else []
    _execute(embedded.url(home), f"CREATE DATABASE {name} {template}", *settings)
    try:
        yield _address(home, name)
    finally:
        _execute(embedded.url(home), f"DROP DATABASE {name} WITH (FORCE)")


def _address(home: Path, database: str) -> str:
    return make_url(embedded.url(home)).set(database=database).render_as_string(hide_password=False)


def _execute(address: str, *statements: str) -> None:
    """Run statements outside a transaction, as CREATE DATABASE demands."""
    connection = psycopg2.connect(make_url(address).set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
    finally:
        connection.close()
