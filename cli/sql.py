"""`embstore sql`: one query in, its rows out, as they come."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import psycopg2
from psycopg2.extensions import connection as DriverConnection  # noqa: N812
from psycopg2.extensions import cursor as Cursor  # noqa: N812
from sqlalchemy import Connection

from embstore.db.migrate import inspect, require_ready
from embstore.errors import UsageError
from embstore.settings import Settings

from .options import interruptible, opened, pass_settings
from .output import FORMATS, Vector, plural, write_rows

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


@click.command()
@click.argument("query", required=False)
@click.option("-f", "--file", "file", type=click.Path(path_type=Path), help="Read the query from a file.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="table", show_default=True, help="How to print.")
@click.option("--write", is_flag=True, help="Allow the query to change the database.")
@pass_settings
def sql(query: str | None, file: Path | None, form: str, write: bool, settings: Settings) -> None:
    """Run a query and print its rows.

    The views embeddings_MODEL, items, progress and failures are found without a prefix. Nothing can be changed unless
    --write is given. With - in the place of the query it is read from standard input.

    \b
      embstore sql "select speaker, count(*) from items group by speaker"
      embstore sql "select * from embeddings_resemblyzer" --format jsonl > vectors.jsonl
    """
    statement = _statement(query, file)
    with opened(settings) as database:
        if database.embedded:
            require_ready(database)
        with database.begin() as connection:
            try:
                count, said = _run(connection, statement, form, write)
            except psycopg2.Error as error:
                raise _explained(error, settings) from error
    click.echo(f"({plural(count, 'row')})" if said is None else said, err=True)


def _statement(query: str | None, file: Path | None) -> str:
    if (query is None) == (file is None):
        raise UsageError("give one query: as an argument, with -f FILE, or - to read it from standard input")
    if file is not None:
        try:
            statement = file.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise UsageError(f"cannot read '{file}': {error.strerror}") from None
        except UnicodeDecodeError:
            raise UsageError(f"'{file}' is not UTF-8 text; save it as UTF-8") from None
    else:
        statement = sys.stdin.read() if query == "-" else str(query)
    if not _COMMENTS.sub("", statement).strip(";"):
        raise UsageError("the query is empty")
    return statement


def _run(connection: Connection, statement: str, form: str, write: bool) -> tuple[int, str | None]:
    """Run and print; returns the number of rows, and what the server said of a statement without rows."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, DriverConnection)
    with interruptible(), driver.cursor() as cursor:
        if not write:
            # For the session, as a COMMIT within the query would end what holds for the transaction alone.
            cursor.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
            driver.commit()
        cursor.execute(_SEARCH_PATH)
        cursor.execute(_VECTOR_TYPES)
        vector_types = {oid for (oid,) in cursor.fetchall()}
        streams = form != "table" and _declare(cursor, statement)
        # Through the driver, without parameters: % and : in a query are the query's own.
        cursor.execute(f"FETCH {_PIECE} FROM embstore_rows" if streams else statement)
        if cursor.description is None:
            return 0, cursor.statusmessage or "done"
        columns = [column.name for column in cursor.description]
        vectors = [place for place, column in enumerate(cursor.description) if column.type_code in vector_types]
        return write_rows(columns, _with_vectors(_rows(cursor, streams), vectors), form, sys.stdout), None


def _declare(cursor: Cursor, statement: str) -> bool:
    """Open a cursor on the server for a single reading query; False for anything else, which has not been run then."""
    if not _READS.match(_COMMENTS.sub(" ", statement).strip()) or ";" in statement.strip().rstrip(";"):
        return False
    cursor.execute("SAVEPOINT embstore_declare")
    try:
        # A line break, as the query may begin with a comment and end with one.
        cursor.execute(f"{_DECLARE}\n{statement}")
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


def _with_vectors(rows: Iterator[Sequence[Any]], places: Sequence[int]) -> Iterator[Sequence[Any]]:
    if not places:
        yield from rows
        return
    for row in rows:
        values = list(row)
        for place in places:
            if values[place] is not None:
                values[place] = Vector(values[place])
        yield values


def _explained(error: psycopg2.Error, settings: Settings) -> Exception:
    """A slip in the query as UsageError; anything else as it is."""
    code = error.pgcode or ""
    words = error.diag.message_primary or " ".join(str(error).split())
    if code == _READ_ONLY:
        return UsageError(f"{words}: add --write to change the database")
    if code == _NO_TRANSACTION:
        return UsageError(f"{words}: type it in 'embstore db psql'")
    if code == _NO_RIGHT or code[:2] not in ("42", "22", "0A", "23", "P0"):
        return error
    if code == _UNDEFINED_TABLE and (problem := _problem(settings)):
        return UsageError(f"{words}; {problem}")
    position = f" at character {error.diag.statement_position}" if error.diag.statement_position else ""
    hint = f"; {error.diag.message_hint}" if error.diag.message_hint else ""
    return UsageError(" ".join(f"{words}{position}{hint}".split()))


def _problem(settings: Settings) -> str | None:
    """Why the views are missing, if that is the database's state."""
    with opened(settings) as database, database.begin() as connection:
        return inspect(connection).problem
