"""Every role against every object by every verb, each cell tried by connecting as that role.

`alpha` is a dataset of team A, `beta` one of team B. The owner is no superuser, as on a hosted server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg2
import pytest
from helpers import entry, fill, vectors_of
from people import People, people_of
from psycopg2 import sql
from sqlalchemy import Connection, make_url, text

from embstore import averages, catalog, members, sharing, vectors
from embstore.db import migrate
from embstore.db.engine import Database
from embstore.models.base import Face
from embstore.queue import take_lease
from embstore.settings import load

REFUSED = "refused"
ROLES = ("owner", "writer of A", "reader of A", "reader of B", "reader of C", "nobody")
DATASETS = {"alpha": 1, "beta": 2}

FILLED = {
    "dataset", "dataset_share", "run", "item", "extraction", "embedding", "embedding_1", "face", "speaker_change",
    "centroid", "centroid_vector", "boundary_run", "boundary", "segment", "boundary_score", "boundary_undo",
}  # fmt: skip
"""Tables that hold rows of both datasets here, so that a cell with no row in it means something."""


@dataclass
class Store:
    """A database with two teams in it, and who is who."""

    people: People
    owner: Database
    logins: dict[str, str]
    teams: dict[str, str]

    def session(self, role: str) -> psycopg2.extensions.connection:
        """A bare connection, as psql has one."""
        address = make_url(self.people.address(self.logins[role])).set(drivername="postgresql")
        return psycopg2.connect(address.render_as_string(hide_password=False))


@pytest.fixture
def store(bare_url: str) -> Iterator[Store]:
    superuser = Database(load(database_url=bare_url))
    with people_of(superuser, load(database_url=bare_url)) as people:
        boss = people.login("boss")
        people.execute("ALTER ROLE {} CREATEROLE", boss)
        people.execute("CREATE EXTENSION vector SCHEMA public")
        people.execute("ALTER DATABASE {} OWNER TO {}", str(make_url(bare_url).database), boss)
        for group in (members.READER, members.WRITER):
            # Made by whoever came first on this server; in a new one it would be the boss.
            people.execute("DO $$ BEGIN CREATE ROLE {} NOLOGIN; EXCEPTION WHEN duplicate_object THEN END $$", group)
            people.execute("GRANT {} TO {} WITH ADMIN TRUE, INHERIT FALSE, SET FALSE", group, boss)
        people.execute("GRANT {} TO {}", members.READER, members.WRITER)
        owner = people.connect(boss)
        migrate.upgrade(owner)
        yield _filled(people, owner, boss)
        people.execute("ALTER DATABASE {} OWNER TO CURRENT_USER", str(make_url(bare_url).database))
    superuser.close()


def _filled(people: People, owner: Database, boss: str) -> Store:
    """What a team's members would make by typing commands, and logins of each kind."""
    with owner.begin() as connection:
        a, b, c, d = (people.name(f"team-{letter}") for letter in "abcd")
        for team in (a, b, c, d):
            members.create_team(connection, team)
        logins = {
            "superuser": "embstore",
            "owner": boss,
            "writer of A": people.name("ann"),
            "writer of B": people.name("ben"),
            "reader of A": people.name("rea"),
            "reader of B": people.name("reb"),
            "reader of C": people.name("rec"),
            "nobody": people.login("nobody"),
        }
        for role, kind, team in (
            ("writer of A", "writer", a), ("writer of B", "writer", b), ("reader of A", "reader", a),
            ("reader of B", "reader", b), ("reader of C", "reader", c),
        ):  # fmt: skip
            members.add_member(connection, team, logins[role], kind)  # type: ignore[arg-type]
    for role, dataset in (("writer of A", "alpha"), ("writer of B", "beta")):
        _work(people.connect(logins[role]), dataset, d)
    return Store(people, owner, logins, {"a": a, "b": b, "c": c, "d": d})


def _work(database: Database, name: str, team_d: str) -> None:
    """Fill every table with rows of one dataset, as its writer."""
    entries = [entry(f"s{i // 4}/{i}.wav", f"s{i // 4}") for i in range(12)]
    with database.begin() as connection:
        queue = fill(connection, entries, dataset=name)
        token = take_lease(connection)
        keys = queue.claim(connection, token, 10)
        faces = {key: Face(1, 2, 30, 40, 0.9, 1) for key in keys[:7]}
        vectors.write(connection, queue, token, keys, vectors_of(10), faces)
        dataset = catalog.get_dataset(connection, name)
        model = catalog.get_model(connection, "small")
        run = catalog.start_run(connection, "extract", dataset.dataset_id, model.model_id, {})
        catalog.end_run(connection, run, dataset.dataset_id, "done", {"done": 10})
        catalog.start_run(connection, "extract", dataset.dataset_id, model.model_id, {})
        averages.refresh(connection, averages.centroid_queue(dataset.dataset_id, model.model_id))
        connection.execute(text(_CENTROID_VECTORS), {"d": dataset.dataset_id})
        connection.execute(text("UPDATE embstore.item SET speaker = 'other' WHERE path = 's1/4.wav'"))
        _find_boundaries(connection, dataset.dataset_id, model.model_id)
        sharing.share(connection, dataset.dataset_id, name, team_d, writing=False)


_CENTROID_VECTORS = """
INSERT INTO embstore.centroid_vector (dataset_id, model_id, centroid_id, embedding)
SELECT dataset_id, model_id, centroid_id, '[1, 2, 3]' FROM embstore.centroid WHERE dataset_id = :d
"""
_BOUNDARY_RUN = """
INSERT INTO embstore.boundary_run (dataset_id, model_id, method, parameters) VALUES (:d, :m, 'auto', '{}')
RETURNING boundary_run_id
"""
_PARTS = {
    "boundary": "position, score, confidence) VALUES (:d, :r, 4, 1, 1)",
    "segment": "segment, first_position, last_position, voice) VALUES (:d, :r, 1, 0, 11, 1)",
    "boundary_score": "position, score) VALUES (:d, :r, 4, 1)",
    "boundary_undo": "item_id, speaker) VALUES (:d, :r, 1, 'x')",
}


def _find_boundaries(connection: Connection, dataset_id: int, model_id: int) -> None:
    run = connection.execute(text(_BOUNDARY_RUN), {"d": dataset_id, "m": model_id}).scalar_one()
    for table, columns in _PARTS.items():
        insert = f"INSERT INTO embstore.{table} (dataset_id, boundary_run_id, {columns}"
        connection.execute(text(insert), {"d": dataset_id, "r": run})


class Session:
    """One role's connection: every statement is tried and undone."""

    def __init__(self, connection: psycopg2.extensions.connection) -> None:
        self._connection = connection

    def __call__(self, statement: str | sql.Composable, *values: Any) -> Any:
        """What a cell shows: the value of a query, the number of rows of a change, or that it was refused."""
        try:
            with self._connection.cursor() as cursor:
                cursor.execute(statement, values or None)
                if cursor.description is None:
                    return cursor.rowcount
                (value,) = cursor.fetchone() or (None,)
                return value
        except psycopg2.errors.InsufficientPrivilege:
            return REFUSED
        except psycopg2.errors.UndefinedObject:
            return 0  # it sees no dataset of that name
        except (psycopg2.errors.UniqueViolation, psycopg2.errors.ForeignKeyViolation):
            return 1  # it came past the rules, which are asked first
        finally:
            self._connection.rollback()


COLUMNS = """
SELECT coalesce(nullif(array_agg(attname::text ORDER BY attnum) FILTER (
        WHERE has_column_privilege(attrelid, attnum, %s)), '{}'), array_agg(attname::text ORDER BY attnum))
FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
"""


def insert(table: str, columns: list[str], row: dict[str, Any]) -> tuple[sql.Composable, str]:
    """A statement that adds this row again, and its value."""
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    return (
        sql.SQL(
            "INSERT INTO embstore.{table} ({names}) OVERRIDING SYSTEM VALUE"
            " SELECT {names} FROM jsonb_populate_record(NULL::embstore.{table}, %s)"
        ).format(table=sql.Identifier(table), names=names),
        json.dumps(row),
    )


DDL = {
    "TRUNCATE": "TRUNCATE embstore.{} CASCADE",
    "ALTER": "ALTER TABLE embstore.{} ADD CHECK (dataset_id > 0)",
    "INDEX": "CREATE INDEX ON embstore.{} (dataset_id)",
    "TRIGGER": "CREATE TRIGGER t AFTER INSERT ON embstore.{} FOR EACH STATEMENT EXECUTE FUNCTION embstore.stamp_run()",
    "POLICY": "CREATE POLICY mine ON embstore.{} USING (true)",
    "NO RULES": "ALTER TABLE embstore.{} DISABLE ROW LEVEL SECURITY",
    "DROP": "DROP TABLE embstore.{} CASCADE",
    "RULES OFF": "SET LOCAL row_security = off; SELECT count(*) FROM embstore.{}",
}


def cells(session: Session, rows: dict[tuple[str, str], dict[str, Any]]) -> dict[tuple[str, str, str], Any]:
    """Every table and dataset by every verb."""
    found: dict[tuple[str, str, str], Any] = {}
    for (table, dataset), row in rows.items():
        where = f"WHERE dataset_id = {DATASETS[dataset]}"
        name = f"embstore.{table}"
        found[table, dataset, "SELECT"] = session(f"SELECT count(*) FROM {name} {where}")
        found[table, dataset, "LOCK ROWS"] = session(
            f"WITH locked AS (SELECT FROM {name} {where} FOR UPDATE) SELECT count(*) FROM locked"
        )
        found[table, dataset, "INSERT"] = session(*insert(table, allowed(session, "INSERT", table), row))
        column = sql.Identifier(allowed(session, "UPDATE", table)[-1])
        update = sql.SQL(f"UPDATE {name} SET {{0}} = {{0}} {where}").format(column)
        found[table, dataset, "UPDATE"] = session(update)
        found[table, dataset, "DELETE"] = session(f"DELETE FROM {name} {where}")
        for verb, statement in DDL.items():
            found[table, dataset, verb] = session(statement.format(table))
    return found


def allowed(session: Session, verb: str, table: str) -> list[str]:
    """The columns that the session has a right to, or all of them if none."""
    found = session(COLUMNS, verb, f"embstore.{table}")
    if found != REFUSED:
        return list(found)
    return ["dataset_id"]  # not even the table's name means anything to it


def expected(role: str, count: dict[tuple[str, str], int], cell: tuple[str, str, str]) -> Any:
    """What a cell has to show."""
    table, dataset, verb = cell
    rows, mine = count[table, dataset], dataset == {"A": "alpha", "B": "beta"}.get(role[-1])
    if role == "owner":
        return {"INSERT": 1, "TRUNCATE": -1, "RULES OFF": REFUSED}.get(verb, rows if verb not in DDL else -1)
    if role == "nobody" or verb in DDL:
        return REFUSED
    if role.startswith("reader"):
        if verb != "SELECT":
            return REFUSED
        return rows if mine else 0
    if table == "run":  # two of them; one is finished, and what is finished stays as it is
        return {"SELECT": rows, "INSERT": 1, "UPDATE": 1, "LOCK ROWS": 1, "DELETE": REFUSED}[verb] if mine else (
            REFUSED if verb in ("INSERT", "DELETE") else 0
        )  # fmt: skip
    if table == "speaker_change" and verb in ("INSERT", "UPDATE", "LOCK ROWS"):  # triggers write it
        return REFUSED
    if verb == "INSERT":
        return 1 if mine else REFUSED
    if not mine:
        return 0
    if table == "dataset_share" and verb != "SELECT":  # not one's own team's row
        return rows - 1
    return rows


def test_every_cell(store: Store) -> None:
    truth = Session(store.session("superuser"))
    tables = truth(
        "SELECT array_agg(c.relname::text) FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid"
        " WHERE c.relnamespace = 'embstore'::regnamespace AND relkind IN ('r', 'p') AND attname = 'dataset_id'"
    )
    rows, count = {}, {}
    for table in tables:
        for dataset, number in DATASETS.items():
            where = f"FROM embstore.{table} t WHERE dataset_id = {number}"
            if row := truth(f"SELECT to_jsonb(t) {where} LIMIT 1"):
                rows[table, dataset] = row
                count[table, dataset] = truth(f"SELECT count(*) {where}")
    assert {(table, dataset) for table in FILLED for dataset in DATASETS} <= rows.keys()
    for dataset in DATASETS:
        rows["dataset_share", dataset]["team"] = store.teams["c"]  # the own team's stands there already
    wrong = []
    for role in ROLES:
        found = cells(Session(store.session(role)), rows)
        assert len(found) == len(rows) * (5 + len(DDL))
        wrong += [
            (role, *cell, f"shows {shown}", f"not {wanted}")
            for cell, shown in found.items()
            if shown != (wanted := expected(role, count, cell))
        ]
    assert wrong == []


def test_views_show_what_the_tables_would(store: Store) -> None:
    truth = Session(store.session("superuser"))
    views = truth("SELECT array_agg(viewname::text) FROM pg_views WHERE schemaname = 'embstore'"
                  " AND viewname <> 'my_numbers'")  # fmt: skip
    filled = {"items", "datasets", "embeddings_small", "faces", "speaker_centroids", "segments"}
    assert filled <= set(views)
    for view in views:
        for dataset in DATASETS:
            query = f"SELECT count(*) FROM embstore.{view} WHERE dataset = '{dataset}'"
            rows = truth(query)
            assert rows > 0 or view not in filled
            shown = {role: Session(store.session(role))(query) for role in ROLES}
            mine = {"A": "alpha", "B": "beta"}
            for role in ROLES[1:-1]:
                assert shown[role] == (rows if mine.get(role[-1]) == dataset else 0), (view, role)
            assert (shown["owner"], shown["nobody"]) == (rows, REFUSED), view
        for role in ROLES[1:]:
            for verb in ("INSERT", "UPDATE", "DELETE"):
                granted = f"SELECT has_any_column_privilege('{store.logins[role]}', 'embstore.{view}', '{verb}')"
                if verb == "DELETE":
                    granted = f"SELECT has_table_privilege('{store.logins[role]}', 'embstore.{view}', '{verb}')"
                assert truth(granted) is False, (view, role)


MODEL = "SELECT embstore.add_model('more', 'audio', 3, 'f', '{}', NULL, NULL)"
CALLS = {
    "SELECT embstore.protect('embstore.item')": ("owner",),
    "SELECT embstore.grant_rights('embstore.item')": ("owner",),
    "SELECT embstore.secure()": ("owner",),
    "SELECT embstore.create_partition(9::smallint, 'nine', 9)": ("owner",),
    MODEL: ("owner", "writer of A"),
    "SELECT embstore.is_alive(1)": ("owner", "writer of A", "reader of A", "reader of B", "reader of C"),
    "SELECT count(*) FROM embstore.nearest_speakers('alpha', 's0', 'small')": ROLES[:-1],
    "SELECT count(*) FROM embstore.outlier_utterances('alpha', 'small')": ROLES[:-1],
    "SELECT count(*) FROM embstore.similar_speakers('alpha', 'small', -1)": ROLES[:-1],
}
CATALOGUE = ("team", "model", "alembic_version")


def test_functions_and_the_catalogue(store: Store) -> None:
    for role in ROLES:
        session = Session(store.session(role))
        for call, callers in CALLS.items():
            assert (session(call) == REFUSED) == (role not in callers), (role, call)
        for table in CATALOGUE:
            assert (session(f"SELECT count(*) FROM embstore.{table}") == REFUSED) == (role == "nobody")
            if role != "owner":
                for change in (f"INSERT INTO embstore.{table} DEFAULT VALUES", f"DELETE FROM embstore.{table}"):
                    assert session(change) == REFUSED, (role, change)
        leases = {"owner": 2, "writer of A": 1}.get(role, REFUSED)
        for statement in ("UPDATE embstore.lease SET expires_at = now()", "DELETE FROM embstore.lease"):
            assert session(statement) == leases, (role, statement)
        assert session("SELECT count(*) FROM embstore.lease") == leases
        assert session("CREATE TEMPORARY TABLE own AS SELECT 1 AS a") == 1
        if role != "owner":
            for forbidden in ("CREATE TABLE embstore.own (a int)", "CREATE ROLE more", "DROP SCHEMA embstore CASCADE"):
                assert session(forbidden) == REFUSED, (role, forbidden)
