"""What commands share: the flags that say which database, and the transaction that they run in."""

from __future__ import annotations

import functools
import math
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import psycopg2
from psycopg2.extensions import POLL_OK, POLL_READ, set_wait_callback
from psycopg2.extensions import connection as DriverConnection  # noqa: N812
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from embstore.db.engine import Database
from embstore.db.migrate import require_ready
from embstore.settings import Settings, load

Command = Callable[..., Any]


def database_options(command: Command) -> Command:
    """Add `--database-url` and `--home`, which reach the command under these names."""
    url = click.option("--database-url", metavar="URL", help="PostgreSQL to use.  [env: DATABASE_URL]")
    home = click.option(
        "--home",
        metavar="FOLDER",
        type=click.Path(path_type=Path),
        help="Folder of the embedded server.  [env: EMBSTORE_HOME]",
    )
    return url(home(command))


def finite(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    """Refuse `nan`, which is in every range, and `inf`."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a number that can be compared")
    return value


def pass_settings(command: Command) -> Command:
    """Add the database's flags; the command gets `settings` in their place."""

    @functools.wraps(command)
    def with_settings(*args: Any, database_url: str | None, home: Path | None, **values: Any) -> Any:
        return command(*args, settings=load(database_url=database_url, home=home), **values)

    return database_options(with_settings)


@contextmanager
def opened(settings: Settings) -> Iterator[Database]:
    """A way to the database of the settings with one connection, closed at the end."""
    database = Database(settings)
    try:
        yield database
    finally:
        database.close()


@contextmanager
def reading(settings: Settings) -> Iterator[Connection]:
    """A read-only transaction that sees one state of the database, which is ready. Ctrl+C ends its query."""
    with opened(settings) as database:
        require_ready(database)
        with database.reading() as connection, interruptible():
            yield connection


@contextmanager
def snapshot(settings: Settings) -> Iterator[Connection]:
    """As `reading`, for COPY, which a query that Ctrl+C ends on the server may not be."""
    with opened(settings) as database:
        require_ready(database)
        with database.reading() as connection:
            yield connection


@contextmanager
def writing(settings: Settings) -> Iterator[Connection]:
    """A transaction in a database that is ready, committed at the end. Ctrl+C ends its query and undoes it."""
    with opened(settings) as database:
        require_ready(database)
        with database.begin() as connection, interruptible():
            yield connection


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl+C cancel a query on the server, which libpq would otherwise sit out. Not for COPY, nor to connect."""
    waiting = _Waiting()
    set_wait_callback(waiting)
    try:
        yield
    except (psycopg2.Error, DBAPIError):
        if not waiting.interrupted:
            raise
    finally:
        set_wait_callback(None)
    if waiting.interrupted:
        raise KeyboardInterrupt


class _Waiting:
    """As psycopg2.extras.wait_select, but remembers that it was Ctrl+C."""

    def __init__(self) -> None:
        self.interrupted = False

    def __call__(self, connection: DriverConnection) -> None:
        while True:
            try:
                state = connection.poll()
                if state == POLL_OK:
                    return
                ends = [connection.fileno()]
                select.select(ends if state == POLL_READ else [], [] if state == POLL_READ else ends, [])
            except KeyboardInterrupt:
                # Not raised from here: psycopg2 would close the connection, and it has yet to be rolled back.
                self.interrupted = True
                with suppress(psycopg2.Error):
                    connection.cancel()
