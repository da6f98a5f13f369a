"""Hostile names: each comes back exactly as it went in, or is refused in one line, and nothing else has changed."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
from helpers import Facts, ask, entry, fill, vectors_of
from hypothesis import HealthCheck, assume, example, given, settings
from people import People
from sqlalchemy import Connection, text

from embstore import catalog, lookup, members, vectors
from embstore.db.engine import Database
from embstore.errors import DatabaseError, EmbstoreError, UsageError
from embstore.queue import take_lease
from embstore.register import register
from embstore.search import search
from embstore.sources.base import unstorable

SOAK = "EMBSTORE_TEST_SOAK" in os.environ
EXAMPLES = 300 if SOAK else 20
hostile = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not SOAK,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

PIECES = [
    "'", "''", '"', ";", "--", "/*", "*/", "$$", "$1", "%s", "%(name)s", "%", "%%", "{}", "{0}", ":name", "::", "\\",
    "E'", 'U&"', "\n", "\r", "\t", "\0", "\x1b[31m", "\udcff", "\u202e", "\u00a0", "É", "😀", "/", "..", " ", ",", "(",
    ")", "DROP TABLE embstore.item", "; DELETE FROM embstore.item; --", "') OR true --", "PUBLIC", "embstore", "pg_",
    '"; DROP SCHEMA embstore CASCADE; --', "null", "x" * 70,
]  # fmt: skip
NAMES = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=5).map("".join)
CLASSIC = "a'); DROP SCHEMA embstore CASCADE; --"

CENSUS = """
SELECT 'relation ' || relname || coalesce(relacl::text, '') || relrowsecurity::text FROM pg_class
WHERE relnamespace = 'embstore'::regnamespace
UNION ALL SELECT 'function ' || oid::regprocedure::text || coalesce(proacl::text, '') FROM pg_proc
WHERE pronamespace = 'embstore'::regnamespace
UNION ALL SELECT 'policy ' || polname FROM pg_policy
UNION ALL SELECT 'role ' || rolname FROM pg_roles
UNION ALL SELECT 'member ' || pg_get_userbyid(roleid) || '>' || pg_get_userbyid(member) FROM pg_auth_members
UNION ALL SELECT 'dataset ' || name FROM embstore.dataset
UNION ALL SELECT 'team ' || team FROM embstore.team
UNION ALL SELECT 'model ' || name FROM embstore.model
UNION ALL SELECT 'item ' || path || '>' || coalesce(speaker, 'NULL') FROM embstore.item
UNION ALL SELECT 'share ' || dataset_id || team FROM embstore.dataset_share
UNION ALL SELECT 'vector ' || item_id FROM embstore.embedding
"""


def census(connection: Connection) -> Counter[str]:
    """All that there is: relations with their rights, roles, and rows."""
    return Counter(connection.exec_driver_sql(CENSUS).scalars())


@pytest.fixture(autouse=True)
def refusals() -> Iterator[list[str]]:
    """What was said of names that were refused: one line, and no name of an exception of Python's."""
    _refusals.clear()
    yield _refusals
    assert [words for words in _refusals if "\n" in words or "Error" in words] == []


_refusals: list[str] = []


def added(database: Database, act: Callable[[Connection], object]) -> list[str] | None:
    """What an act adds to all that there is, undone again; None if it was refused. It must take nothing away."""
    try:
        with database.begin() as connection:
            before = census(connection)
            act(connection)
            after = census(connection)
            connection.rollback()
    except EmbstoreError as error:
        _refusals.append(str(error))
        return None
    assert before - after == Counter()
    return sorted((after - before).elements())


@pytest.fixture
def store(database: Database, people: People) -> Database:
    """A team with a dataset of four items, all of which the superuser sees."""
    ann = people.connect(people.login("ann", people.team("asr")))
    with ann.begin() as connection:
        queue = fill(connection, [entry(f"{i}.wav", "ann") for i in range(4)], dataset="calls")
        token = take_lease(connection)
        vectors.write(connection, queue, token, queue.claim(connection, token, 4), vectors_of(4))
    return database


@hostile
@given(name=NAMES)
@example(name=CLASSIC)
@example(name="\0")
@example(name="\udcff")
def test_a_dataset(store: Database, name: str) -> None:
    def act(connection: Connection) -> None:
        made = catalog.ensure_dataset(connection, name, "audio", "/data")
        assert made.name == name
        assert catalog.get_dataset(connection, name) == made
        named = connection.execute(text("SELECT embstore.dataset_called(:name)"), {"name": name}).scalar_one()
        assert named == made.dataset_id

    found = added(store, act)
    assert found == [f"dataset {name}"] or (found is None and re.search("[\0\ud800-\udfff]", name))


@hostile
@given(name=NAMES)
@example(name=CLASSIC)
@example(name='a"b')
@example(name="embstore")
def test_a_team_and_a_member(store: Database, name: str) -> None:
    """A role's name has rules of its own: 63 bytes, and none that means something already."""
    (team,) = ask(store, "SELECT team FROM embstore.team")[0]
    found = added(store, lambda connection: members.create_team(connection, name))
    assert found in (None, [f"role {name}", f"team {name}"])
    found = added(store, lambda connection: members.add_member(connection, team, name, "reader"))
    memberships = sorted([f"member embstore_reader>{name}", f"member {team}>{name}"])
    assert found in (None, memberships, [*memberships, f"role {name}"])  # without the role: it was there
    if re.fullmatch(r"[a-z'\";%{}\\()$:,-]{1,20}", name) and "/" not in name and not name.startswith("pg_"):
        assert found is not None


@hostile
@given(name=NAMES)
@example(name=CLASSIC)
@example(name="a'b%s")
def test_a_model(store: Database, name: str) -> None:
    def act(connection: Connection) -> None:
        model_id = catalog.ensure_model(connection, Facts(name))
        assert catalog.get_model(connection, name) == catalog.StoredModel(model_id, name, 3)
        view = connection.exec_driver_sql(
            "SELECT relname FROM pg_class WHERE relnamespace = 'embstore'::regnamespace AND relkind = 'v'"
            " ORDER BY oid DESC LIMIT 1"
        ).scalar_one()
        assert re.fullmatch("embeddings_[a-z0-9_]*", view)
        assert connection.exec_driver_sql(f'SELECT count(*) FROM embstore."{view}"').scalar_one() == 0
        nearest = "SELECT count(*) FROM embstore.nearest(CAST('[1,0,0]' AS vector), :name)"
        assert connection.execute(text(nearest), {"name": name}).scalar_one() == 0

    found = added(store, act)
    if found is None:
        assert re.search("[\0\ud800-\udfff]", name) or not 1 <= len(name) <= 200
        return
    assert f"model {name}" in found
    rest = [re.sub(r"\d+|\{.*", "", line) for line in found if not line.startswith("model ")]
    assert [line.split()[0] for line in rest] == ["policy"] * 5 + ["relation"] * 3


@hostile
@given(path=NAMES, speaker=NAMES)
@example(path=CLASSIC, speaker=CLASSIC)
@example(path="\\.", speaker="\\N")
def test_a_path_and_a_speaker(store: Database, path: str, speaker: str) -> None:
    assume(path and not unstorable(path) and not unstorable(speaker))  # those never get as far as this

    def act(connection: Connection) -> None:
        dataset = catalog.get_dataset(connection, "calls")
        register(connection, dataset.dataset_id, [*(entry(f"{i}.wav", "ann") for i in range(4)), entry(path, speaker)])
        query = "SELECT item_id FROM embstore.items WHERE path = :path AND speaker IS NOT DISTINCT FROM :speaker"
        values = {"path": path, "speaker": speaker or None}
        item_id = connection.execute(text(query), values).scalar_one()
        connection.execute(
            text("INSERT INTO embstore.extraction (dataset_id, model_id, item_id) VALUES (:d, 1, :i);"
                 "INSERT INTO embstore.embedding_1 VALUES (:d, 1, :i, '[0,1,0]')"),
            {"d": dataset.dataset_id, "i": item_id},
        )  # fmt: skip
        model = catalog.get_model(connection, "small")
        assert lookup.find(connection, path, model, "item", "calls").item_id == item_id
        if speaker:
            assert lookup.find(connection, speaker, model, "speaker", "calls").utterances in (1, 5)
            nearest = "SELECT item_id FROM embstore.nearest(CAST('[0,1,0]' AS vector), 'small', 1, 'calls', :speaker)"
            assert connection.execute(text(nearest), {"speaker": speaker}).scalar_one() == item_id

    found = added(store, act)
    assert found is not None
    assert [line for line in found if not line.startswith("vector ")] == [f"item {path}>{speaker or 'NULL'}"]
    assert len(found) == 2


@hostile
@given(condition=NAMES)
@example(condition=CLASSIC)
@example(condition="true); DELETE FROM embstore.item; SELECT (true")
def test_a_condition(store: Database, condition: str) -> None:
    with store.begin() as connection:
        before = census(connection)
    for of in ("utterances", "speakers"):
        try:
            search(store, np.array([1, 0, 0], np.float32), where=condition, of=of, timeout=600)  # type: ignore[arg-type]
        except (UsageError, DatabaseError) as error:
            _refusals.append(str(error))
    with store.begin() as connection:
        assert census(connection) == before


def test_a_condition_has_its_callers_rights_and_cannot_write(store: Database, people: People) -> None:
    """Not even by a function that somebody else has made, and that writes; nor can it set the rules aside."""
    with store.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION public.write() RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER AS"
            " $$ BEGIN DELETE FROM embstore.item; RETURN true; END $$"
        )
        before = census(connection)
        (team,) = connection.exec_driver_sql("SELECT team FROM embstore.team").scalars()
    rea = people.connect(people.login("rea", team, "reader"))
    stranger = people.connect(people.login("stranger", people.team("others"), "reader"))
    query = np.array([1, 0, 0], np.float32)
    for condition, said in {
        "public.write()": "read-only transaction",
        "set_config('transaction_read_only', 'off', true) IS NOT NULL AND public.write()": "read-write mode must be",
        "pg_read_file('/etc/passwd') IS NOT NULL": "permission denied",
        "set_config('role', 'embstore', true) IS NOT NULL": "permission denied",
        "(SELECT count(*) FROM pg_authid) > 0": "permission denied",
        "(SELECT count(*) FROM embstore.lease) > 0": "permission denied",
        "set_config('row_security', 'off', true) IS NULL OR (SELECT count(*) FROM embstore.item) > 0": "row-level",
    }.items():
        with pytest.raises(EmbstoreError, match=said):
            search(rea, query, where=condition)
    assert len(search(rea, query, where="(SELECT count(*) FROM embstore.item) = 4")) == 4
    assert len(search(stranger, query, model="small", where="true")) == 0
    with store.begin() as connection:
        after = census(connection)
    assert [
        line for line in (before - after) | (after - before) if line.split()[0] not in ("role", "member", "team")
    ] == []
