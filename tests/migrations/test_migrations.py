"""Migrations: up, down, up again, and no drift between them and the tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine
from sqlalchemy.dialects.postgresql.base import ischema_names

from embstore import vectors
from embstore.db import migrate
from embstore.db.copy import copy_rows
from embstore.db.engine import Database
from embstore.db.migrate import State, inspect, require_ready
from embstore.db.schema import HEAD, SCHEMA, Vector, metadata
from embstore.errors import DatabaseError, DatabaseNotReady
from embstore.settings import load

READY = State("18.4", 18, "0.8.5", "0.8.5", HEAD)


@pytest.fixture
def bare(bare_url: str) -> Iterator[Database]:
    """A database with nothing in it."""
    database = Database(load(database_url=bare_url))
    yield database
    database.close()


def state(database: Database) -> State:
    with database.begin() as connection:
        return inspect(connection)


def objects(connection: Connection) -> set[str]:
    """Tables, views and indexes of the schema."""
    query = f"SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('{SCHEMA}')"
    return set(connection.exec_driver_sql(query).scalars())


def test_up_down_and_up_again(bare: Database) -> None:
    migrate.upgrade(bare)
    with bare.begin() as connection:
        made = objects(connection)
        _model(connection, dim=4)
    assert {"dataset", "item", "extraction", "embedding", "items", "progress", "failures"} <= made
    migrate.downgrade(bare, "base")
    with bare.begin() as connection:
        assert objects(connection) == {"alembic_version", "alembic_version_pkc"}
    assert state(bare).problem == "the database is not migrated: type 'embstore db upgrade'"
    migrate.upgrade(bare)
    with bare.begin() as connection:
        assert objects(connection) == made
    assert state(bare).problem is None


def test_a_superuser_makes_the_function_for_bytes_which_goes_with_the_extension(bare: Database) -> None:
    for _ in range(2):
        migrate.upgrade(bare)
        with bare.begin() as connection:
            found = connection.exec_driver_sql("SELECT public.embstore_bytes('[1,-2]')").scalar_one()
            assert bytes(found) == np.array([2, 0], "<i2").tobytes() + np.array([1, -2], "<f4").tobytes()
    with bare.begin() as connection:
        connection.exec_driver_sql("DROP EXTENSION vector CASCADE")
        assert connection.exec_driver_sql("SELECT count(*) FROM pg_proc WHERE proname = 'embstore_bytes'").scalar() == 0


def test_up_twice_changes_nothing(database: Database) -> None:
    with database.begin() as connection:
        before = objects(connection)
    migrate.upgrade(database)
    with database.begin() as connection:
        assert objects(connection) == before


def test_the_newest_migration_is_head() -> None:
    spec = find_spec("embstore.migrations")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    config = Config()
    config.set_main_option("script_location", spec.submodule_search_locations[0])
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_current_head() == HEAD
    assert [script.revision for script in scripts.walk_revisions()] == [
        f"{number:04}" for number in range(int(HEAD), 0, -1)
    ]


@pytest.fixture
def _vectors_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ischema_names, "vector", Vector)


@pytest.mark.usefixtures("_vectors_are_known")
def test_migrations_and_tables_agree(database: Database, database_url: str) -> None:
    """As Alembic sees it: tables, columns, types, indexes, foreign keys."""

    def is_ours(name: str | None, kind: str, _parents: object) -> bool:
        if kind == "schema":
            return name == SCHEMA
        return kind != "table" or re.fullmatch(r"embedding_\d+|alembic_version", name or "") is None

    with database.begin() as connection:
        _model(connection, dim=4)
    # The schema that carries the role's name would be the default one, and Alembic leaves that one's name out.
    engine = create_engine(database_url, connect_args={"options": "-c search_path=public"})
    with engine.begin() as connection:
        options = {
            "include_schemas": True,
            "include_name": is_ours,
            "compare_type": True,
            "version_table_schema": SCHEMA,
        }
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_centroids_keep_their_vectors_up_and_down(database: Database) -> None:
    select = "SELECT speaker, status, embedding, stale FROM embstore.speaker_centroids ORDER BY speaker"
    with database.begin() as connection:
        _model(connection, dim=2)
        connection.exec_driver_sql(
            "INSERT INTO embstore.dataset (name, media, root) VALUES ('d', 'audio', '/d');"
            "INSERT INTO embstore.centroid (dataset_id, model_id, speaker, status, average) VALUES"
            " (1, 1, 'ann', 'done', 'mean'), (1, 1, 'bob', 'done', 'mean'), (1, 1, 'cem', 'pending', 'mean');"
            "INSERT INTO embstore.centroid_vector SELECT 1, 1, centroid_id, ARRAY[centroid_id, 0]::real[]::vector"
            " FROM embstore.centroid WHERE status = 'done'"
        )
        before = connection.exec_driver_sql(select).all()
    assert [row[2:] for row in before] == [("[1,0]", False), ("[2,0]", False), (None, True)]
    for move in (lambda: migrate.downgrade(database, "0004"), lambda: migrate.upgrade(database)):
        move()
        with database.begin() as connection:
            assert connection.exec_driver_sql(select).all() == before


def _routines(connection: Connection) -> set[str]:
    """Functions and views, as the server writes them out."""
    return set(
        connection.exec_driver_sql(
            f"SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = to_regnamespace('{SCHEMA}')"
            " UNION ALL SELECT relname || pg_get_viewdef(oid) || coalesce(reloptions::text, '') FROM pg_class"
            f" WHERE relnamespace = to_regnamespace('{SCHEMA}') AND relkind = 'v'"
        ).scalars()
    )


def test_names_of_datasets_up_and_down(database: Database) -> None:
    """Functions and views are as before, with data in the tables and somebody's own view on one of them."""
    with database.begin() as connection:
        _model(connection, dim=2)
        connection.exec_driver_sql(
            "INSERT INTO embstore.dataset (name, media, root) VALUES ('d', 'audio', '/d');"
            "INSERT INTO embstore.item (dataset_id, position, path) VALUES (1, 0, 'a.wav');"
            "INSERT INTO embstore.embedding (dataset_id, model_id, item_id, embedding) VALUES (1, 1, 1, '[1,0]');"
            "CREATE VIEW public.own AS SELECT dataset, path FROM embstore.embeddings_m"
        )
        newest = _routines(connection)
    made: list[set[str]] = []
    for revision in ("0011", "head", "0011", "head"):
        (migrate.upgrade if revision == "head" else migrate.downgrade)(database, revision)
        with database.begin() as connection:
            made.append(_routines(connection))
            assert connection.exec_driver_sql("SELECT * FROM public.own").all() == [("d", "a.wav")]
            count = "SELECT count(*) FROM embstore.nearest('[1,0]', 'm', 5, 'd')"
            assert connection.exec_driver_sql(count).scalar_one() == 1
    assert made[0] == made[2]
    assert made[1] == made[3] == newest
    assert len(newest - made[0]) >= 16


def test_rules_up_and_down(database: Database) -> None:
    """Those of the tables that a new model brings, too; and without them the older ones, not none."""
    rules = f"SELECT tablename, policyname, qual, with_check FROM pg_policies WHERE schemaname = '{SCHEMA}'"

    def look() -> set[tuple[str, ...]]:
        with database.begin() as connection:
            return {tuple(map(str, row)) for row in connection.exec_driver_sql(rules)}

    with database.begin() as connection:
        _model(connection, dim=2)
    newest = look()
    migrate.downgrade(database, "0013")
    before = look()
    migrate.upgrade(database)
    assert look() == newest
    assert {row[:2] for row in before} == {row[:2] for row in newest}
    assert any("marks" in row[2] for row in newest)
    assert not any("marks" in row[2] or "my_" in row[2] for row in before)


_COLUMNS = f"""
SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
    pg_get_expr(d.adbin, d.adrelid), col_description(a.attrelid, a.attnum)
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE c.relnamespace = to_regnamespace('{SCHEMA}') AND c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped
    AND c.relname <> 'alembic_version'
ORDER BY c.relname, a.attnum
"""
_CONSTRAINTS = f"""
SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = to_regnamespace('{SCHEMA}') AND conname NOT LIKE 'alembic%%' ORDER BY 1, 2
"""
_INDEXES = (
    f"SELECT indexdef FROM pg_indexes WHERE schemaname = '{SCHEMA}' AND tablename <> 'alembic_version' ORDER BY 1"
)


def test_migrations_and_tables_agree_in_every_detail(database: Database) -> None:
    """What Alembic does not compare: defaults, checks, comments, the order of columns."""
    with database.begin() as connection:
        connection.exec_driver_sql("SET LOCAL search_path = public")
        migrated = [connection.exec_driver_sql(query).all() for query in (_COLUMNS, _CONSTRAINTS, _INDEXES)]
        connection.exec_driver_sql("SET LOCAL client_min_messages = warning; DROP SCHEMA embstore CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA embstore")
        metadata.create_all(connection)
        created = [connection.exec_driver_sql(query).all() for query in (_COLUMNS, _CONSTRAINTS, _INDEXES)]
        connection.rollback()
    for ours, theirs in zip(created, migrated, strict=True):
        assert ours == theirs
        assert len(ours) > 5


def test_a_partition_takes_vectors_of_its_dimension_only(database: Database) -> None:
    def write(vector: list[float]) -> None:
        with database.begin() as connection:
            keys = {"dataset_id": np.array([1]), "model_id": np.array([1], np.int16), "item_id": np.array([1])}
            keys["dataset_id"] = keys["dataset_id"].astype(np.int32)
            copy_rows(connection, "embstore.embedding_1", {**keys, "embedding": np.array([vector], np.float32)})

    with database.begin() as connection:
        _model(connection, dim=3)
        connection.exec_driver_sql(
            "INSERT INTO embstore.dataset (name, media, root) VALUES ('d', 'audio', '/d');"
            "INSERT INTO embstore.item (dataset_id, position, path) VALUES (1, 0, 'a.wav');"
            "INSERT INTO embstore.extraction (dataset_id, model_id, item_id) VALUES (1, 1, 1)"
        )
    for wrong in ([1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0]):
        with pytest.raises(DatabaseError, match="embedding_1_vector"):
            write(wrong)
    for wrong in ([1.0, float("nan"), 0.0], [1.0, float("inf"), 0.0]):
        with pytest.raises(DatabaseError, match="not allowed in vector"):
            write(wrong)
    write([1.0, 0.0, 0.0])
    with database.begin() as connection:
        assert connection.exec_driver_sql("SELECT embedding FROM embstore.embeddings_m").scalar() == "[1,0,0]"


def test_not_migrated(bare: Database) -> None:
    found = state(bare)
    assert (found.pgvector, found.revision, found.can_migrate) == (None, None, True)
    with pytest.raises(DatabaseNotReady, match="is not migrated: type 'embstore db upgrade'"):
        require_ready(bare)


@pytest.mark.parametrize(
    ("revision", "problem"),
    [
        ("9999", f"at revision 9999, made by a newer embstore than this one \\({HEAD}\\): type 'pip install"),
        ("0000", f"at revision 0000, this embstore needs {HEAD}: type 'embstore db upgrade'"),
    ],
)
def test_another_revision(database: Database, revision: str, problem: str) -> None:
    with database.begin() as connection:
        connection.exec_driver_sql(f"UPDATE embstore.alembic_version SET version_num = '{revision}'")
    with pytest.raises(DatabaseNotReady, match=problem):
        require_ready(database)


def test_a_newer_revision_is_not_migrated(database: Database) -> None:
    with database.begin() as connection:
        connection.exec_driver_sql("UPDATE embstore.alembic_version SET version_num = '9999'")
    with pytest.raises(DatabaseNotReady, match="newer embstore"):
        migrate.upgrade(database)


def test_without_the_extension_the_tables_do_not_count(database: Database) -> None:
    with database.begin() as connection:
        connection.exec_driver_sql("DROP EXTENSION vector CASCADE")
    assert state(database).problem == "the database is not migrated: type 'embstore db upgrade'"


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (replace(READY, server="15.8", server_major=15), "PostgreSQL 15.8 is too old: embstore needs 16 or later"),
        (replace(READY, pgvector=None, pgvector_available=None), "install its package (postgresql-18-pgvector)"),
        (replace(READY, pgvector="0.8.3"), "pgvector 0.8.3 is too old: embstore needs 0.8.4 or later"),
        (replace(READY, pgvector="0.8"), "pgvector 0.8 is too old"),
    ],
)
def test_servers_that_will_not_do(found: State, problem: str) -> None:
    assert problem in str(found.problem)
    assert not found.can_migrate


@pytest.mark.parametrize("version", ["0.8.4", "0.8.10", "0.9.0", "1.0"])
def test_versions_are_compared_as_numbers(version: str) -> None:
    assert replace(READY, pgvector=version).problem is None


def _model(connection: Connection, dim: int) -> None:
    connection.exec_driver_sql(
        "INSERT INTO embstore.model (name, media, dim, fingerprint, settings)"
        f" VALUES ('m', 'audio', {dim}, 'f', '{{}}'::jsonb)"
    )
    vectors.create_partition(connection, 1, "m", dim)
