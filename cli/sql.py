"""`embstore sql`: one query in, its rows out, as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import psycopg2
from sqlalchemy import Connection

from embstore import query as sql_query
from embstore.db.migrate import require_ready
from embstore.errors import UsageError
from embstore.settings import Settings
from embstore.words import plural

from .options import interruptible, opened, pass_settings
from .output import FORMATS, Vector, write_rows


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
                raise sql_query.explained(error, connection, to_write="add --write") from error
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
    sql_query.check(statement)
    return statement


def _run(connection: Connection, statement: str, form: str, write: bool) -> tuple[int, str | None]:
    """Run and print; returns the number of rows, and what the server said of a statement without rows."""
    with interruptible():
        answer = sql_query.run(connection, statement, write=write, streams=form != "table")
        if answer.rows is None:
            return 0, answer.said
        return write_rows(answer.columns, _with_vectors(answer.rows, answer.vectors), form, sys.stdout), None


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
