"""What the catalogue says of every table, view and function that there is: whoever adds one, the rules hold for it."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import ask, fill
from people import People

from embstore.db.engine import Database

# Each of these begins with something other than the dataset, so that a lookup by it finds rows of others before they
# are taken away, and EXPLAIN counts them. Say here why that tells nothing.
HARMLESS_INDEXES = {
    "dataset_team_name",  # of hashes, which are no comparison: they come after the rules
}

# These look with the rights of the owner. Say here what they tell.
OWNERS_VIEWS = {
    "my_numbers",  # which datasets one sees, and the newest number: the rules ask it, and cannot ask themselves
}

TABLES = """
SELECT c.relname AS name, c.relrowsecurity AS enabled, c.relforcerowsecurity AS forced,
    ARRAY(SELECT format('%%s %%s', polname, polcmd) FROM pg_policy p WHERE p.polrelid = c.oid ORDER BY 1) AS rules,
    ARRAY(SELECT unnest(polroles) FROM pg_policy p WHERE p.polrelid = c.oid AND polname = 'owner') = ARRAY[c.relowner]
        AS owner_is_owner,
    ARRAY(SELECT polname FROM pg_policy p WHERE p.polrelid = c.oid AND polname <> 'owner' AND (
        pg_get_expr(polqual, polrelid) = 'true' OR pg_get_expr(polwithcheck, polrelid) = 'true'))::text[] AS open_rules
FROM pg_class c
WHERE c.relnamespace = 'embstore'::regnamespace AND c.relkind IN ('r', 'p') AND EXISTS (
    SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'dataset_id' AND NOT a.attisdropped)
ORDER BY 1
"""
VIEWS = """
SELECT relname, relkind::text, coalesce(reloptions::text, '') FROM pg_class
WHERE relnamespace = 'embstore'::regnamespace AND relkind IN ('v', 'm', 'f') ORDER BY 1
"""
FUNCTIONS = """
SELECT p.oid::regprocedure::text AS name, p.prosecdef AS definer, coalesce(p.proconfig, '{}') AS settings,
    p.prorettype = 'trigger'::regtype AS is_trigger,
    EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a WHERE a.grantee = 0) AS is_public
FROM pg_proc p WHERE p.pronamespace = 'embstore'::regnamespace ORDER BY 1
"""
PUBLIC = """
SELECT c.relname FROM pg_class c, aclexplode(c.relacl) a
WHERE c.relnamespace = 'embstore'::regnamespace AND a.grantee = 0
UNION ALL SELECT 'schema ' || nspname FROM pg_namespace, aclexplode(nspacl) a
WHERE nspname = 'embstore' AND a.grantee = 0
"""
INDEXES = """
SELECT i.indexrelid::regclass::text, c.relname FROM pg_index i
JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
JOIN pg_class t ON t.oid = i.indrelid AND t.relnamespace = 'embstore'::regnamespace AND t.relrowsecurity
JOIN pg_attribute d ON d.attrelid = t.oid AND d.attname = 'dataset_id'
WHERE m.amname IN ('btree', 'hash', 'gin', 'gist', 'brin') AND i.indkey[0] <> d.attnum ORDER BY 1
"""


@pytest.fixture
def store(database: Database, people: People) -> Database:
    """A store with models, whose partitions and views come after the migrations, and with a team."""
    with database.begin() as connection:
        fill(connection, 2)
    people.login("ann", people.team("asr"), "writer")
    return database


def rows(database: Database, sql: str) -> list[Any]:
    with database.begin() as connection:
        return list(connection.exec_driver_sql(sql).all())


def test_every_table_of_datasets_has_its_rules_and_they_bind_its_owner_too(store: Database) -> None:
    found = rows(store, TABLES)
    names = {row.name for row in found}
    assert {"dataset", "dataset_share", "run", "item", "extraction", "embedding", "embedding_1", "centroid"} <= names
    for row in found:
        assert row.enabled, (
            f"{row.name} lacks row-level security: 'SELECT embstore.secure()' after the migration sets it"
        )
        assert row.forced, row.name
        assert row.owner_is_owner, row.name
        assert row.rules == ["add a", "change w", "owner *", "read r", "remove d"], row.name
        assert row.open_rules == [], row.name


def test_leases_are_their_holders_alone(store: Database) -> None:
    found = ask(store, "SELECT relrowsecurity, relforcerowsecurity FROM pg_class WHERE relname = 'lease'")
    assert found == [(True, True)]


def test_every_view_looks_with_the_eyes_of_whoever_asks(store: Database) -> None:
    found = rows(store, VIEWS)
    assert {"items", "embeddings_small", "datasets", "speaker_centroids"} <= {row[0] for row in found}
    for name, kind, options in found:
        assert kind == "v", f"{name}: what a materialized view or foreign table holds is under no rule"
        if name in OWNERS_VIEWS:
            assert options == "{security_barrier=true}", name
            continue
        assert "security_invoker=true" in options or "security_invoker=on" in options, f"{name} is not security_invoker"


def test_functions_are_nobodys_by_default_and_those_with_the_owners_rights_are_safe(store: Database) -> None:
    found = rows(store, FUNCTIONS)
    assert "add_model(text,text,integer,text,jsonb,text,jsonb)" in {row.name for row in found}
    for row in found:
        assert not row.is_public, f"{row.name} may be called by anybody: 'SELECT embstore.secure()' takes that away"
        if row.definer:
            paths = [setting.partition("=")[2] for setting in row.settings if setting.startswith("search_path=")]
            assert paths == ["pg_catalog, pg_temp"], (
                f"{row.name} runs as the owner: SET search_path = pg_catalog, pg_temp"
            )
        if row.is_trigger and "stamp_run" not in row.name:
            assert row.definer, (
                f"{row.name} clears up or takes notes in tables that whoever fired it may have no right to: make it "
                "SECURITY DEFINER SET search_path = pg_catalog, pg_temp (CREATE OR REPLACE takes both away)"
            )


def test_public_has_nothing(store: Database) -> None:
    assert rows(store, PUBLIC) == []


def test_no_lookup_can_find_a_row_before_the_rules_have_taken_it_away(store: Database) -> None:
    """In an index that begins with the dataset, the rule is part of what is looked up."""
    found = {name for _, name in rows(store, INDEXES)}
    assert found <= HARMLESS_INDEXES, f"put dataset_id first: {found - HARMLESS_INDEXES}"


def test_without_a_team_nobody_is_granted_anything(database: Database) -> None:
    sql = """
    SELECT c.relname FROM pg_class c, aclexplode(c.relacl) a
    WHERE c.relnamespace = 'embstore'::regnamespace AND a.grantee <> c.relowner
    """
    assert rows(database, sql) == []


def test_a_table_that_has_no_rules_yet_gets_them(store: Database) -> None:
    with store.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE embstore.late (dataset_id integer, note text)")
        connection.exec_driver_sql("CREATE FUNCTION embstore.late() RETURNS integer LANGUAGE sql AS 'SELECT 1'")
        connection.exec_driver_sql("SELECT embstore.secure()")
    test_every_table_of_datasets_has_its_rules_and_they_bind_its_owner_too(store)
    test_functions_are_nobodys_by_default_and_those_with_the_owners_rights_are_safe(store)
    granted = """
    SELECT has_table_privilege('embstore_reader', 'embstore.late', 'SELECT'),
        has_table_privilege('embstore_reader', 'embstore.late', 'INSERT'),
        has_table_privilege('embstore_writer', 'embstore.late', 'INSERT')
    """
    assert rows(store, granted) == [(True, False, True)]


def test_where_there_are_teams_statistics_hold_no_names(database: Database, people: People) -> None:
    """Those of before go, and ANALYZE makes none; it still makes those that claims are planned by."""
    sql = """
    SELECT c.relname || '.' || a.attname FROM pg_statistic s
    JOIN pg_attribute a ON a.attrelid = s.starelid AND a.attnum = s.staattnum
    JOIN pg_class c ON c.oid = a.attrelid
    WHERE c.relnamespace = 'embstore'::regnamespace AND c.relrowsecurity AND a.atttypid = 'text'::regtype
        AND s.stakind1 <> 0
    """
    with database.begin() as connection:
        fill(connection, 50)
    with database.begin() as connection:
        connection.exec_driver_sql("ANALYZE")
    assert {("item.path",), ("extraction.status",)} <= set(rows(database, sql))
    people.team("asr")
    assert {name for (name,) in rows(database, sql)} == {"extraction.status"}
    with database.begin() as connection:
        connection.exec_driver_sql("ANALYZE")
    assert {name for (name,) in rows(database, sql)} == {"extraction.status"}
