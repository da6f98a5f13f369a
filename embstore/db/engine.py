"""One process's way to the server: a bounded pool, errors in one line, and patience when the server goes away."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import psycopg2
from psycopg2.extensions import connection as DriverConnection  # noqa: N812
from sqlalchemy import Connection, Engine, create_engine, exc, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError

from embstore.db import embedded
from embstore.db.address import masked
from embstore.errors import DatabaseError, DatabaseUnavailable, UsageError, first_line
from embstore.settings import Settings

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds that a running job waits for a server that went away: a restart, a failover."""

IDLE_SECONDS = float(os.environ.get("EMBSTORE_TEST_IDLE_SECONDS", 60))
"""How long the server waits for a client that has gone silent while it holds others up: it may have been stopped."""

# A half-open connection must not hold up a worker for the two hours that TCP's own defaults take.
_CONNECT_ARGS = {
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 40_000,
    "application_name": "embstore",
    "client_encoding": "utf8",  # PGCLIENTENCODING may ask for one that does not hold every name
}

# 08P01 is PgBouncer's word for a server that it has lost.
_SERVER_GOES_AWAY = {"57P01", "57P02", "57P03", "25P03", "08000", "08001", "08003", "08006", "08P01", "53300"}
_TRY_AGAIN = {"40001", "40P01"}
# Errors while connecting carry no code. A server that speaks another language is waited for in vain.
_REFUSES = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|is not permitted to log in"
    r"|(role|database) \".*\" does not exist|permission denied for database"
    r"|certificate verify failed|does not match host name|root certificate file|server does not support SSL"
)
# Nor does it where it has no room for one more session.
_FULL = re.compile(r"too many (connections|clients)|connection slots are reserved")


class Database:
    """A pool of at most `pool_size` connections to the server that the settings name, or to the embedded one.

    A forked child makes connections of its own, and leaves those of its parent alone.
    """

    def __init__(self, settings: Settings, *, pool_size: int = 1, patience: float = PATIENCE) -> None:
        self._settings = settings
        self._patience = patience
        self._pool_size = pool_size
        self._engine: Engine | None = None
        self._making = threading.Lock()
        self._process = os.getpid()

    @property
    def embedded(self) -> bool:
        """Whether embstore runs the server itself."""
        return self._settings.database_url is None

    @property
    def url(self) -> URL:
        """Address of the server; the embedded one is started if need be."""
        if self._settings.database_url is None:
            return make_url(embedded.ensure_running(self._settings.home))
        return make_url(self._settings.database_url)

    def __str__(self) -> str:
        if self._settings.database_url is None:
            return f"the embedded server in '{self._settings.home}'"
        return f"'{masked(make_url(self._settings.database_url))}'"

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """One transaction. Errors of the server come out as DatabaseError, in one line."""
        try:
            with self._get_engine().begin() as connection:
                yield connection
        except (DBAPIError, psycopg2.Error) as error:
            raise self._translate(error) from error
        except exc.TimeoutError as error:
            raise DatabaseError(
                f"all {self._pool_size} connections are in use by this process: finish reading what is open, or set"
                " DB_MAX_CONNECTIONS higher"
            ) from error
        except ValueError as error:
            raise _unsendable(error) or error from None

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One read-only transaction that sees one state of the database throughout."""
        with self.begin() as connection:
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            yield connection

    @contextmanager
    def autocommit(self) -> Iterator[Connection]:
        """A connection on which every statement is a transaction of its own, for what cannot be run within one."""
        try:
            with self._get_engine().connect() as connection:
                yield connection.execution_options(isolation_level="AUTOCOMMIT")
        except (DBAPIError, psycopg2.Error) as error:
            raise self._translate(error) from error

    def patiently(self, work: Callable[[Connection], T], *, patience: float | None = None) -> T:
        """Run `work` in a transaction; if the server goes away, wait for it and run `work` again.

        A commit whose answer got lost is run again too, so `work` must recognise what it has done already.
        """
        deadline = time.monotonic() + (self._patience if patience is None else patience)
        pause = 0.1
        while True:
            try:
                with self._get_engine().begin() as connection:
                    return work(connection)
            except (DBAPIError, psycopg2.Error, DatabaseUnavailable) as error:
                if not _is_transient(error) or time.monotonic() > deadline:
                    raise self._translate(error) from error
            # Every pooled connection went to the same server, and the embedded one may have to be started again.
            self.close()
            time.sleep(pause)
            pause = min(pause * 2, 2.0)

    def close(self) -> None:
        """Close all connections; the next use opens new ones."""
        self._note_fork()
        with self._making:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.dispose()

    def _note_fork(self) -> None:
        """In a forked child: forget the parent's connections, without a word on them, and its lock."""
        if self._process == os.getpid():
            return
        self._process, self._making = os.getpid(), threading.Lock()
        if self._engine is not None:
            self._engine.dispose(close=False)
            self._engine = None

    def _get_engine(self) -> Engine:
        self._note_fork()
        with self._making:  # two pools would be twice the connections
            if self._engine is None:
                self._engine = create_engine(
                    self.url,
                    pool_size=self._pool_size,
                    max_overflow=0,
                    pool_pre_ping=True,
                    connect_args=_CONNECT_ARGS,
                )
            return self._engine

    def _translate(self, error: Exception) -> DatabaseError:
        if isinstance(error, DatabaseError):
            return error
        cause = error.orig if isinstance(error, DBAPIError) else error
        code = sqlstate(error)
        words = first_line(cause)
        # On a full disk a new session may fail to write its cache.
        if code == "53100" or (not code and "No space left on device" in words):
            return DatabaseError(
                f"the disk of the database is full ({words}): free some space there and run the same command again"
            )
        if code == "42501":
            return DatabaseError(f"{words}: ask the owner of the database for that right")
        if code == "57014" and "statement timeout" in words:
            return DatabaseError(f"{words}, which 'embstore whoami' shows: ask for less at a time, or for more time")
        if code == "53300" or _FULL.search(words):
            return DatabaseUnavailable(f"{self} lets nobody else in ({words}): end other commands, or wait for them")
        # InterfaceError: the rollback on a connection that was cut has taken the place of the first error.
        if not code and isinstance(cause, psycopg2.OperationalError | psycopg2.InterfaceError):
            return DatabaseUnavailable(
                f"no database at {self}: {words}; check DATABASE_URL, or unset it to use the embedded server"
                if not self.embedded
                else f"{self} does not answer: {words}; see server.log there, or type 'embstore db up'"
            )
        return DatabaseError(f"the database refused: {words}")


def driver_of(connection: Connection) -> DriverConnection:
    """psycopg2's own connection, for what SQLAlchemy knows nothing of."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, DriverConnection)
    return driver


def sqlstate(error: BaseException | None) -> str:
    """The server's code for an error, of five characters; empty where there is none, as for a lost connection."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return getattr(cause, "pgcode", None) or ""


def is_pooled(connection: Connection) -> bool:
    """Whether a pooler such as PgBouncer stands in between, so that the session may be another's in the next moment.

    What gives it away: it makes up the number of the server's process that a client is told of.
    """
    told = driver_of(connection).info.backend_pid
    return bool(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() != told)


def require_session(connection: Connection, what: str) -> None:
    """Raise DatabaseError unless this connection has its session to itself, which `what` needs."""
    if is_pooled(connection):
        raise DatabaseError(
            f"{what} needs a session of its own, and between here and the server there is a connection pooler: "
            "put the server's own address into DATABASE_URL for this command"
        )


def _unsendable(error: ValueError) -> UsageError | None:
    """What psycopg2 says of a text that no server takes, for whoever typed it; None for any other error."""
    if isinstance(error, UnicodeEncodeError):
        return UsageError(f"{error.object!a} holds bytes that are no text in UTF-8: no name in a database can")
    if "NUL (0x00)" in str(error):
        return UsageError("a name or a value holds a NUL character: none in a database can")
    return None


def _is_transient(error: Exception) -> bool:
    if isinstance(error, DatabaseUnavailable):
        return True
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = sqlstate(error)
    if not code:
        lost = isinstance(cause, psycopg2.OperationalError | psycopg2.InterfaceError)
        return lost and not _REFUSES.search(str(cause))
    return code in _SERVER_GOES_AWAY or code in _TRY_AGAIN


def set_local(connection: Connection, name: str, value: str) -> None:
    """Set a server parameter until the end of the transaction."""
    connection.execute(text("SELECT set_config(:name, :value, true)"), {"name": name, "value": value})


def limit_idle(connection: Connection) -> None:
    """Have the server end the session if its client goes silent in the middle of this transaction.

    For whatever locks what others wait for: a process that is stopped, or whose machine freezes, would never let go.
    """
    set_local(connection, "idle_in_transaction_session_timeout", f"{IDLE_SECONDS}s")
