"""`embstore db`: the database itself."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from sqlalchemy import Connection, text

from embstore import sharing
from embstore.db import embedded, migrate, network
from embstore.db.address import masked, password_of
from embstore.db.copy import copy_rows
from embstore.db.engine import Database
from embstore.db.home import Home
from embstore.db.migrate import inspect, require_ready
from embstore.db.schema import HEAD, MINIMUM_PGVECTOR, MINIMUM_SERVER
from embstore.errors import DatabaseError, EmbstoreError, UsageError
from embstore.settings import Settings
from embstore.words import plural

from . import dump
from .options import opened, pass_settings
from .output import write_pairs
from .programs import programs

NOT_READY = 3


@click.group()
def db() -> None:
    """Start, check, migrate, save and restore the database.

    Without DATABASE_URL it is the embedded server, which starts with the first command that needs it and stops soon
    after the last one.
    """


@db.command()
@click.option(
    "--listen", "where", metavar="HOST:PORT", help="Let logins with a password connect here too; off: no more."
)
@click.option("--unencrypted", is_flag=True, help="Listen even where other machines connect, without TLS.")
@click.option("--force", is_flag=True, help="Start it anew for --listen even if it is in use.")
@pass_settings
def up(where: str | None, unencrypted: bool, force: bool, settings: Settings) -> None:
    """Start the embedded server and keep it running.

    It can be reached by its socket, by you alone. With --listen it is remembered that logins, which 'embstore team'
    makes, reach it by TCP too.

    \b
      embstore db up
      embstore db up --listen 127.0.0.1:5433
      embstore db up --listen off
    """
    _require_embedded(settings, "start it where it runs")
    if where is not None:
        address = None if where.strip().lower() == "off" else network.parse(where)
        if address is not None and not address.is_loopback and not unencrypted:
            raise UsageError(
                f"other machines reach {address}, and the embedded server knows no TLS: listen on "
                f"127.0.0.1:{address.port} and let them come through ssh -L, or add --unencrypted"
            )
        embedded.listen(settings.home, address, force=force)
    with _kept_up(settings) as database:
        click.echo(f"{database} is running and stays up: 'embstore db down' stops it")
    if (remembered := network.recall(Home.at(settings.home))) is not None:
        click.echo(f"it {_network(remembered)}: {remembered.url}")


@db.command()
@click.option("--force", is_flag=True, help="Stop it even if it is in use.")
@pass_settings
def down(force: bool, settings: Settings) -> None:
    """Stop the embedded server."""
    _require_embedded(settings, "stop it where it runs")
    was_running = embedded.stop(settings.home, force=force)
    click.echo(f"the embedded server in '{settings.home}' {'is stopped' if was_running else 'was not running'}")


@db.command()
@pass_settings
def status(settings: Settings) -> None:
    """Show where the database is and whether it is ready; starts nothing."""
    server = embedded.status(settings.home) if settings.database_url is None else None
    if server is not None and not server.running:
        pairs = {
            "database": f"the embedded server in '{settings.home}'",
            "network": _network(network.recall(Home.at(settings.home))),
            "state": "stopped: the next command starts it"
            if server.initialised
            else "not made yet: the next command does it",
        }
        write_pairs(pairs, sys.stdout)
        return
    with opened(settings) as database:
        with database.begin() as connection:
            found = inspect(connection)
            size = connection.execute(text("SELECT pg_size_pretty(pg_database_size(current_database()))")).scalar_one()
        migrates_itself = database.embedded and found.problem is not None and found.can_migrate
    state = "ready" if found.problem is None else found.problem
    if migrates_itself:
        state = "not migrated yet: the next command does it"
    pairs = {
        "database": str(database),
        "PostgreSQL": found.server,
        "pgvector": found.pgvector or "not installed",
        "revision": f"{found.revision or 'none'} (this embstore: {HEAD})",
        "size": size,
        **({} if server is None else {"network": _network(server.listens)}),
        "state": state,
    }
    write_pairs(pairs, sys.stdout)
    if found.problem is not None and not migrates_itself:
        click.get_current_context().exit(NOT_READY)


@db.command()
@pass_settings
def upgrade(settings: Settings) -> None:
    """Migrate the database to what this embstore needs."""
    with opened(settings) as database:
        with database.begin() as connection:
            before = inspect(connection)
        migrate.upgrade(database)
        if before.revision == HEAD:
            click.echo(f"{database} is at revision {HEAD} already")
        else:
            click.echo(f"{database} is migrated: revision {before.revision or 'none'} to {HEAD}")


@db.command()
@pass_settings
def check(settings: Settings) -> None:
    """Check that everything about the database is fit for work."""
    with opened(settings) as database:
        try:
            with database.begin() as connection:
                found = inspect(connection)
        except EmbstoreError as error:
            _report("connection", str(error), False)
            click.get_current_context().exit(NOT_READY)
        _report("connection", f"{database} answers", True)
        if database.embedded and found.can_migrate:
            require_ready(database)
        with database.begin() as connection:
            fit = _checks(connection, settings)
    if not fit:
        click.get_current_context().exit(NOT_READY)


@db.command()
@pass_settings
def url(settings: Settings) -> None:
    """Print the address, for psql and other programs; a password is not shown."""
    with opened(settings) as database:
        if database.embedded:
            with _kept_up(settings):
                pass
            click.echo("the embedded server stays up for whoever connects: 'embstore db down' stops it", err=True)
            click.echo(masked(database.url))
            return
        if password_of(database.url) is not None:
            click.echo("the password is not shown: DATABASE_URL has it", err=True)
        click.echo(masked(database.url))


@db.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@pass_settings
def psql(arguments: tuple[str, ...], settings: Settings) -> None:
    """Open psql on the database; ARGUMENTS go to it.

    \b
      embstore db psql -c "\\d embstore.item"

    The exit code is that of psql.
    """
    with opened(settings) as database:
        if database.embedded:
            require_ready(database)
        process = programs(database).run("psql", arguments)
        # Ctrl+C is meant for psql, which ends a query with it and not itself.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGINT, before)
    click.get_current_context().exit(code)


@db.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@pass_settings
def backup(file: Path, force: bool, settings: Settings) -> None:
    """Save everything embstore holds to FILE.

    While workers run, it holds the state of one moment. The file is in pg_dump's custom format.
    """
    with opened(settings) as database:
        require_ready(database)
        dump.backup(database, programs(database), file, force=force)
        click.echo(f"saved {_contents(database)} to '{file}' ({plural(file.stat().st_size, 'byte')})")


@db.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--force", is_flag=True, help="Drop what the database holds.")
@pass_settings
def restore(file: Path, force: bool, settings: Settings) -> None:
    """Load what 'embstore db backup' saved to FILE into an empty database.

    All of it or nothing. Owners and rights are not restored: everything belongs to the role that restores it. On
    another server than before, teams are empty until 'embstore team create NAME --adopt' takes up a role of that name.
    """
    with opened(settings) as database:
        dump.restore(database, programs(database), file, force=force)
        migrate.upgrade(database)
        click.echo(f"restored {_contents(database)} from '{file}'")


def _network(address: network.Address | str | None) -> str:
    return "none: its socket alone" if address is None else f"listens on {address}, with passwords and without TLS"


def _require_embedded(settings: Settings, instead: str) -> None:
    if settings.database_url is not None:
        raise UsageError(
            f"{Database(settings)} is not embstore's to start or stop: {instead}, or unset DATABASE_URL to use the "
            "embedded server"
        )


@contextmanager
def _kept_up(settings: Settings) -> Iterator[Database]:
    """The embedded server, running until `embstore db down`, and migrated."""
    embedded.keep_up(settings.home)
    with opened(settings) as database:
        require_ready(database)
        yield database


def _contents(database: Database) -> str:
    with database.begin() as connection:
        counts = connection.execute(
            text(
                "SELECT (SELECT count(*) FROM embstore.dataset), (SELECT count(*) FROM embstore.item),"
                " (SELECT count(*) FROM embstore.embedding)"
            )
        ).one()
    return ", ".join(plural(count, noun) for count, noun in zip(counts, ("dataset", "item", "vector"), strict=True))


def _report(name: str, words: str, fit: bool) -> bool:
    click.echo(f"{'ok ' if fit else 'BAD'}  {name:<12}  {words}")
    return fit


def _checks(connection: Connection, settings: Settings) -> bool:
    """Run and print all checks of a server that answers, even when one fails; True if all are well."""
    state = inspect(connection)
    minimum = ".".join(map(str, MINIMUM_PGVECTOR))
    pgvector = "is not installed" if state.pgvector is None else f"{state.pgvector}, {minimum} or later is needed"
    wrong = state.problem
    recent = state.server_major >= MINIMUM_SERVER
    has_vectors = replace(state, server_major=MINIMUM_SERVER, revision=HEAD).problem is None
    results = [
        _report("PostgreSQL", f"{state.server}, {MINIMUM_SERVER} or later is needed", recent),
        _report("pgvector", pgvector, has_vectors),
        _report("revision", wrong or f"{state.revision}, the newest", wrong is None),
        _attempt("vectors", _round_trip, connection) if has_vectors else False,
        _attempt("rights", _rights, connection) if wrong is None else False,
        _connections(connection, settings),
    ]
    return all(results)


def _attempt(name: str, what: Callable[[Connection], str], connection: Connection) -> bool:
    """Run a check in a transaction of its own that is always undone."""
    undone = connection.begin_nested()
    try:
        return _report(name, what(connection), True)
    except EmbstoreError as error:
        return _report(name, str(error), False)
    finally:
        undone.rollback()


def _round_trip(connection: Connection) -> str:
    """Write a vector as workers do and read it back. Raises DatabaseError if it is another then."""
    vector = np.array([[0.1, -2.5e-8, 3e7]], dtype=np.float32)
    connection.exec_driver_sql(
        "CREATE TEMPORARY TABLE embstore_check (item_id bigint, embedding vector) ON COMMIT DROP"
    )
    copy_rows(connection, "embstore_check", {"item_id": np.array([7]), "embedding": vector})
    stored, distance = connection.exec_driver_sql(
        "SELECT embedding, embedding <-> embedding FROM embstore_check WHERE item_id = 7"
    ).one()
    back = np.array([float(value) for value in str(stored).strip("[]").split(",")], dtype=np.float32)
    if not np.array_equal(back, vector[0]) or distance != 0:
        raise DatabaseError(f"a vector came back as another: {vector[0].tolist()} as {stored}")
    return "written and read back, bit for bit"


# With the partitions, as workers write straight into them. Of the catalogue, some columns are enough.
_CLOSED_TABLES = """
SELECT string_agg(relname, ', ' ORDER BY relname) FROM pg_class c
WHERE relnamespace = to_regnamespace('embstore') AND relkind IN ('r', 'p') AND relname <> 'lease' AND NOT (
    has_table_privilege(oid, 'SELECT') AND (relname = 'speaker_change' OR %(kind)s = 'reader' OR NOT EXISTS (
        SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'dataset_id')
    OR has_any_column_privilege(oid, 'INSERT') AND has_any_column_privilege(oid, 'UPDATE')))
"""


def _rights(connection: Connection) -> str:
    """Whether this role may do what its kind does. Raises DatabaseError that names what is missing."""
    identity = sharing.identify(connection)
    closed = connection.exec_driver_sql(_CLOSED_TABLES, {"kind": identity.kind}).scalar()
    if closed:
        raise DatabaseError(
            f"role {identity.role} may not {'read' if identity.kind == 'reader' else 'read and write'} {closed}: "
            "ask the owner of the database for it"
        )
    if identity.kind == "owner":
        return f"role {identity.role} may read and write everything"
    verb = "read" if identity.kind == "reader" else "read and write"
    return f"role {identity.role} may {verb} what its teams may: 'embstore shares' says what that is"


def _connections(connection: Connection, settings: Settings) -> bool:
    """Whether the server lets in as many connections as the settings allow."""
    limits = connection.exec_driver_sql(
        "SELECT least(current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int"
        " - coalesce(current_setting('reserved_connections', true)::int, 0),"
        " (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user),"
        " (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database()))"
    ).scalar_one()
    wanted = settings.db_max_connections
    fit = wanted <= limits
    words = f"DB_MAX_CONNECTIONS is {wanted}, the server lets in {limits}"
    return _report("connections", words if fit else f"{words}: lower the one or raise the other", fit)
