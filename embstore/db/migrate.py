"""Is the database fit for this embstore, and how it becomes so."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, text

from embstore import faults
from embstore.db.engine import Database, limit_idle
from embstore.db.schema import HEAD, MINIMUM_PGVECTOR, MINIMUM_SERVER, SCHEMA
from embstore.errors import DatabaseNotReady

_MIGRATION_LOCK = 0x656D6273
"""Any number that is embstore's own: 'embs'. Two processes must not migrate at once."""


# Into `public`, wherever the search path points: a schema of the user's own name would come first. The function gives
# the bytes that a vector is in the server's memory, and `vectors` reads them in half of the time. It takes a superuser
# to name one of the server's own. A cast would do without, but then PostgreSQL would compare the bytes of rows that a
# role may not see. As a part of the extension it goes with that, and into no dump that others are to restore.
EXTENSION = """
CREATE EXTENSION IF NOT EXISTS vector SCHEMA public;
DO $$ BEGIN
    IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
        AND to_regprocedure('public.embstore_bytes(vector)') IS NULL
    THEN
        CREATE FUNCTION public.embstore_bytes(vector) RETURNS bytea
            LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE AS 'byteasend';
        ALTER EXTENSION vector ADD FUNCTION public.embstore_bytes(vector);
    END IF;
END $$;
"""


@dataclass(frozen=True)
class State:
    """What a database looks like from here."""

    server: str
    server_major: int
    pgvector: str | None
    pgvector_available: str | None
    revision: str | None

    @property
    def can_migrate(self) -> bool:
        """Whether an upgrade can mend what is wrong."""
        return (
            self.server_major >= MINIMUM_SERVER
            and (self.pgvector or self.pgvector_available) is not None
            and (self.pgvector is None or _version(self.pgvector) >= MINIMUM_PGVECTOR)
            and (self.revision is None or self.revision <= HEAD)
        )

    @property
    def problem(self) -> str | None:
        """Why it cannot be used, with the command to type next; None if it can."""
        minimum = ".".join(map(str, MINIMUM_PGVECTOR))
        if self.server_major < MINIMUM_SERVER:
            return (
                f"PostgreSQL {self.server} is too old: embstore needs {MINIMUM_SERVER} or later; upgrade the server, "
                "or unset DATABASE_URL to use the embedded one"
            )
        if self.pgvector is None and self.pgvector_available is None:
            return (
                f"the server has no pgvector: install its package (postgresql-{self.server_major}-pgvector), "
                "then type 'embstore db upgrade'"
            )
        if self.pgvector is not None and _version(self.pgvector) < MINIMUM_PGVECTOR:
            return (
                f"pgvector {self.pgvector} is too old: embstore needs {minimum} or later; install it and type "
                "\"embstore sql --write 'ALTER EXTENSION vector UPDATE'\""
            )
        if self.revision is None or self.pgvector is None:
            return "the database is not migrated: type 'embstore db upgrade'"
        if self.revision > HEAD:
            return (
                f"the database is at revision {self.revision}, made by a newer embstore than this one ({HEAD}): "
                "type 'pip install --upgrade embstore'"
            )
        if self.revision < HEAD:
            return (
                f"the database is at revision {self.revision}, this embstore needs {HEAD}: type 'embstore db upgrade'"
            )
        return None


def inspect(connection: Connection) -> State:
    """Look at server, extension and revision in one round trip."""
    row = connection.execute(
        text(
            "SELECT current_setting('server_version'), current_setting('server_version_num')::int / 10000,"
            " (SELECT extversion FROM pg_extension WHERE extname = 'vector'),"
            " (SELECT default_version FROM pg_available_extensions WHERE name = 'vector'),"
            " to_regclass(:versions) IS NOT NULL"
        ),
        {"versions": f"{SCHEMA}.alembic_version"},
    ).one()
    revision = None
    if row[4]:
        revision = connection.execute(text(f"SELECT max(version_num) FROM {SCHEMA}.alembic_version")).scalar()
    return State(row[0], row[1], row[2], row[3], revision)


def require_ready(database: Database) -> None:
    """Raise DatabaseNotReady unless the database fits. The embedded one, embstore's own, is migrated on the way."""
    with database.begin() as connection:
        state = inspect(connection)
    if state.problem is None:
        return
    if not (database.embedded and state.can_migrate):
        raise DatabaseNotReady(state.problem)
    upgrade(database)


def upgrade(database: Database, revision: str = "head") -> None:
    """Create the extension and the schema, and run the migrations, in one transaction: all or nothing."""

    def migrate(connection: Connection) -> None:
        state = inspect(connection)
        if not state.can_migrate:
            raise DatabaseNotReady(str(state.problem))
        connection.exec_driver_sql(EXTENSION)
        connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        _become_owner(connection)
        _alembic(connection, "upgrade", revision)
        secure(connection)
        faults.reach("migration")

    _locked(database, migrate)


def secure(connection: Connection) -> None:
    """Set the rules and rights of whatever has none yet, such as tables that a migration has just made."""
    if connection.execute(text(f"SELECT to_regprocedure('{SCHEMA}.secure()')")).scalar() is not None:
        connection.execute(text(f"SELECT {SCHEMA}.secure()"))


def _become_owner(connection: Connection) -> None:
    """Let all that is made belong to the schema's owner, whoever of those who may act for it has typed the command."""
    owner = connection.execute(
        text(
            "SELECT quote_ident(pg_get_userbyid(nspowner)) FROM pg_namespace"
            " WHERE nspname = :schema AND pg_get_userbyid(nspowner) <> current_user"
        ),
        {"schema": SCHEMA},
    ).scalar()
    if owner is not None:
        connection.execute(text(f"SET LOCAL ROLE {owner}"))


def downgrade(database: Database, revision: str) -> None:
    """Go back to an older revision, `base` for none. What the older schema cannot hold is lost."""
    _locked(database, lambda connection: _alembic(connection, "downgrade", revision))


def _locked(database: Database, work: Callable[[Connection], None]) -> None:
    with database.begin() as connection:
        limit_idle(connection)
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        work(connection)


def _alembic(connection: Connection, command: str, revision: str) -> None:
    # Here and not above: Alembic takes longer to import than most commands take.
    import alembic.command
    from alembic.config import Config

    # Found by import, as the folder stands elsewhere in a wheel than in the source tree.
    spec = importlib.util.find_spec("embstore.migrations")
    assert spec is not None
    assert spec.submodule_search_locations
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", spec.submodule_search_locations[0].replace("%", "%%"))
    getattr(alembic.command, command)(config, revision)


def _version(words: str) -> tuple[int, ...]:
    return tuple(int(part) for part in words.split(".") if part.isdigit())
