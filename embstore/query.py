"""One SQL statement of a person's: run as it stands, read-only unless they say otherwise, its rows as they come."""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import psycopg2
from psycopg2.extensions import cursor as Cursor  # noqa: N812
from sqlalchemy import Connection

from embstore.db.engine import driver_of, is_pooled
from embstore.db.migrate import inspect
from embstore.errors import UsageError

Parameters = Sequence[Any] | Mapping[str, Any]
"""As psycopg2 has them: for `%s`, or for `%(name)s`."""

_SEARCH_PATH = """SET LOCAL search_path = public, embstore"""

_DECLARE = "DECLARE embstore_rows NO SCROLL CURSOR FOR "
_PIECE = 2000
"""Rows that are fetched at a time."""

_COMMENTS = re.compile(r"\s+|--[^\n]*|/\*.*?\*/", re.DOTALL)
_READS = re.compile(r"\(*\s*(select|with|values|table)\b", re.IGNORECASE)

_VECTOR_TYPES = "SELECT oid FROM pg_type WHERE typname IN ('vector', 'halfvec')"

_READ_ONLY = "25006"
_NO_RIGHT = "42501"
_NO_TRANSACTION = "25001"
_UNDEFINED_TABLE = "42P01"


@dataclass(frozen=True)
class Rows(Sequence[Any]):
    """What a query found: named tuples; a vector in them is float32 [dim]."""

    columns: tuple[str, ...]
    rows: list[Any]
    said: str
    """The server's word for what was done: `SELECT 3`, `UPDATE 7`."""

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Answer:
    """What the server says."""

    said: str
    """Its word for what was done: `SELECT 3`, `UPDATE 7`."""
    columns: tuple[str, ...] = ()
    vectors: tuple[int, ...] = ()
    """Which of the columns are vectors, from 0; their values are texts such as `[1,2]`."""
    rows: Iterator[Sequence[Any]] | None = None
    """To be read within the transaction; None: the statement has no rows, not even none."""

    def read(self) -> Rows:
        """All rows, with arrays in the place of vectors."""
        row = namedtuple("Row", self.columns, rename=True)  # type: ignore[misc]
        rows = []
        for values in self.rows or ():
            made = list(values)
            for place in self.vectors:
                if made[place] is not None:
                    made[place] = np.array(made[place].strip("[]").split(","), dtype=np.float32)
            rows.append(row(*made))
        return Rows(self.columns, rows, self.said)


def check(statement: str) -> None:
    """Raise UsageError for a statement that says nothing."""
    if not _COMMENTS.sub("", statement).strip(";"):
        raise UsageError("the query is empty")


def run(
    connection: Connection,
    statement: str,
    parameters: Parameters | None = None,
    *,
    write: bool = False,
    streams: bool = False,
) -> Answer:
    """Run a statement. Without parameters, % and : in it are its own. Errors are psycopg2's: see `explained`.

    `write` lets it change the database. With `streams` the rows of a query come piece by piece, and an error in a later
    one comes after the rows before it.
    """
    driver = driver_of(connection)
    cursor = driver.cursor()
    if not write:
        _forbid_writing(connection, cursor, statement)
    cursor.execute(_SEARCH_PATH)
    cursor.execute(_VECTOR_TYPES)
    vector_types = {oid for (oid,) in cursor.fetchall()}
    streams = streams and _declare(cursor, statement, parameters)
    if streams:
        cursor.execute(f"FETCH {_PIECE} FROM embstore_rows")
    else:
        cursor.execute(statement, parameters)  # through the driver, and not as SQLAlchemy's text, where : is special
    if cursor.description is None:
        return Answer(cursor.statusmessage or "done")
    columns = tuple(column.name for column in cursor.description)
    vectors = tuple(place for place, column in enumerate(cursor.description) if column.type_code in vector_types)
    return Answer(cursor.statusmessage or "done", columns, vectors, _rows(cursor, streams))


def _forbid_writing(connection: Connection, cursor: Cursor, statement: str) -> None:
    """Make the session read-only, as a COMMIT within the query would end what holds for the transaction alone.

    Behind a pooler the session is others' too, and they could not write any more: there it is the transaction, and
    UsageError for a query of several statements, one of which might be that COMMIT.
    """
    if not is_pooled(connection):
        cursor.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
        cursor.connection.commit()
        return
    if ";" in statement.strip().rstrip(";"):
        raise UsageError("through a connection pooler a query is one statement, without a ';' in it")
    cursor.execute("SET TRANSACTION READ ONLY")


def allow_writing(connection: Connection) -> None:
    """Undo what `run` has set for the session, before the connection is used for something else."""
    driver = driver_of(connection)
    driver.rollback()
    if is_pooled(connection):
        return
    with driver.cursor() as cursor:
        cursor.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE")
    driver.commit()


def _declare(cursor: Cursor, statement: str, parameters: Parameters | None) -> bool:
    """Open a cursor on the server for a single reading query; False for anything else, which has not been run then."""
    if not _READS.match(_COMMENTS.sub(" ", statement).strip()) or ";" in statement.strip().rstrip(";"):
        return False
    cursor.execute("SAVEPOINT embstore_declare")
    try:
        # A line break, as the query may begin with a comment and end with one.
        cursor.execute(f"{_DECLARE}\n{statement}", parameters)
    except psycopg2.Error:
        # Wrong, or a WITH that writes: either way plain execution has the better answer.
        cursor.execute("ROLLBACK TO SAVEPOINT embstore_declare")
        return False
    return True


def _rows(cursor: Cursor, streams: bool) -> Iterator[Sequence[Any]]:
    while rows := cursor.fetchall():
        yield from rows
        if not streams:
            return
        cursor.execute(f"FETCH {_PIECE} FROM embstore_rows")


def explained(error: psycopg2.Error, connection: Connection, *, to_write: str) -> Exception:
    """A slip in the statement as UsageError; anything else as it is. `to_write` says how to allow a change.

    The connection is the one that the statement failed on.
    """
    code = error.pgcode or ""
    words = error.diag.message_primary or " ".join(str(error).split())
    if code == _READ_ONLY:
        return UsageError(f"{words}: {to_write} to change the database")
    if code == _NO_TRANSACTION:
        return UsageError(f"{words}: type it in 'embstore db psql'")
    if code == _NO_RIGHT or code[:2] not in ("42", "22", "0A", "23", "P0"):
        return error
    if code == _UNDEFINED_TABLE and (problem := _problem(connection)):
        return UsageError(f"{words}; {problem}")
    position = f" at character {error.diag.statement_position}" if error.diag.statement_position else ""
    hint = f"; {error.diag.message_hint}" if error.diag.message_hint else ""
    return UsageError(" ".join(f"{words}{position}{hint}".split()))


def _problem(connection: Connection) -> str | None:
    """Why the views are missing, if that is the database's state."""
    driver_of(connection).rollback()
    return inspect(connection).problem
