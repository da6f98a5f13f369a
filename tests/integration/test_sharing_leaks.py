"""Ways to learn of another team's rows without reading them: those that are shut, and those that are left open.

docs/sharing.md lists the open ones; the tests of them fail where it says too much.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg2
import pytest
from helpers import entry, fill, finish_all, vectors_of
from people import People
from sqlalchemy import make_url

from embstore import catalog
from embstore.db.engine import Database

SECRETS = 300
VECTOR = np.array([3, 0], "<i2").tobytes() + vectors_of(SECRETS)[200].astype("<f4").tobytes()
"""One of team A's, as bytes."""


@dataclass
class Spy:
    """A writer of team B, who knows how team A names things, and looks for what there is."""

    address: str
    team: str
    other_team: str
    other: Database
    """As somebody of team A."""
    owner: Database

    def ask(self, statement: str, *values: Any, before: str = "") -> list[Any]:
        """The rows of a statement, which is undone."""
        connection = psycopg2.connect(make_url(self.address).set(drivername="postgresql").render_as_string(False))
        try:
            with connection.cursor() as cursor:
                if before:
                    cursor.execute(before)
                cursor.execute(statement, values or None)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def copied(self, source: str) -> str:
        """What COPY gives of a table or query."""
        connection = psycopg2.connect(make_url(self.address).set(drivername="postgresql").render_as_string(False))
        sink = io.StringIO()
        with connection.cursor() as cursor:
            cursor.copy_expert(f"COPY {source} TO STDOUT", sink)
        connection.close()
        return sink.getvalue()

    def refusal(self, statement: str, *values: Any) -> str:
        """The whole error of a statement, detail and all, without what it was asked itself."""
        with pytest.raises(psycopg2.Error) as caught:
            self.ask(statement, *values)
        return re.sub(r'".*?"', '""', str(caught.value))

    def told(self, queries: list[str], before: str) -> list[str]:
        """All that EXPLAIN ANALYZE tells of each, in one session, which is warm by then."""
        connection = psycopg2.connect(make_url(self.address).set(drivername="postgresql").render_as_string(False))
        told = []
        try:
            with connection.cursor() as cursor:
                cursor.execute(before or "SELECT")
                for query in [*queries, *queries]:
                    cursor.execute(f"EXPLAIN (ANALYZE, TIMING OFF, SUMMARY OFF, BUFFERS) {query}")
                    lines = [line for (line,) in cursor.fetchall()]
                    planning = [at for at, line in enumerate(lines) if line.startswith("Planning")]
                    told.append("\n".join(lines[: planning[0] if planning else None]))
        finally:
            connection.close()
        return told[len(queries) :]

    def plan(self, query: str, before: str = "") -> str:
        """What EXPLAIN ANALYZE tells, but for times."""
        explained = self.ask(
            f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF, BUFFERS OFF) {query}", before=before
        )
        return "\n".join(line for (line,) in explained)


@pytest.fixture
def spy(database: Database, people: People) -> Spy:
    """Team A has dataset 1, `secret`, with a speaker Angela; team B has dataset 2."""
    a, b = people.team("a"), people.team("b")
    ann, ben = (people.connect(people.login(name, team)) for name, team in (("ann", a), ("ben", b)))
    entries = [entry(f"angela/{i}.wav", "angela" if i % 2 else f"s{i}") for i in range(SECRETS)]
    for writer, dataset, items in ((ann, "secret", entries), (ben, "own", entries[:20])):
        with writer.begin() as connection:
            queue = fill(connection, items, dataset=dataset)
        finish_all(writer, queue)
    with ann.begin() as connection:
        secret = catalog.get_dataset(connection, "secret")
        catalog.start_run(connection, "extract", secret.dataset_id, 1, {"path": "/angela"})
        connection.exec_driver_sql("UPDATE embstore.extraction SET error = 'angela' WHERE item_id < 9")
    with database.begin() as connection:
        connection.exec_driver_sql("ANALYZE")
    return Spy(people.address(people.name("ben")), b, a, ann, database)


def test_errors_are_the_same_whether_there_is_something_or_not(spy: Spy) -> None:
    insert = "INSERT INTO embstore.item (dataset_id, position, path) VALUES (%s, 0, 'angela/1.wav')"
    assert spy.refusal(insert, 1) == spy.refusal(insert, 99)
    assert "row-level security" in spy.refusal(insert, 1)
    with_key = "INSERT INTO embstore.extraction (dataset_id, model_id, item_id) VALUES (%s, 1, 1)"
    assert spy.refusal(with_key, 1) == spy.refusal(with_key, 99)
    quietly = f"{with_key} ON CONFLICT DO NOTHING"
    assert spy.refusal(quietly, 1) == spy.refusal(quietly, 99)
    share = "INSERT INTO embstore.dataset_share (dataset_id, team) VALUES (%s, %s)"
    assert spy.refusal(share, 1, spy.team) == spy.refusal(share, 99, spy.team)
    run = "INSERT INTO embstore.run (dataset_id, command, parameters, host, version) VALUES (%s, 'x', '{}', '', '')"
    assert spy.refusal(run, 1) == spy.refusal(run, 99)
    theirs = "INSERT INTO embstore.dataset (name, media, root, team) VALUES (%s, 'audio', '/', %s)"
    assert spy.refusal(theirs, "secret", spy.other_team) == spy.refusal(theirs, "nothing", spy.other_team)
    # A name is taken in one's own team alone, and a number cannot be chosen.
    spy.ask(theirs, "secret", spy.team)
    assert "permission denied" in spy.refusal(
        "INSERT INTO embstore.dataset (dataset_id, name, media, root, team) OVERRIDING SYSTEM VALUE"
        " VALUES (1, 'x', 'audio', '/', %s)",
        spy.team,
    )


def test_a_name_that_one_may_not_know_is_like_one_that_nobody_has(spy: Spy) -> None:
    for call in (
        "SELECT embstore.dataset_called(%s)",
        "SELECT count(*) FROM embstore.nearest(CAST('[1,0,0]' AS vector), 'small', 5, %s)",
        "SELECT count(*) FROM embstore.nearest_centroids(CAST('[1,0,0]' AS vector), 'small', 5, %s)",
        "SELECT count(*) FROM embstore.outlier_utterances(%s, 'small')",
        "SELECT count(*) FROM embstore.nearest_speakers(%s, 'angela', 'small')",
        "SELECT count(*) FROM embstore.similar_speakers(%s, 'small', 0.5)",
    ):
        for name in ("secret", f"{spy.other_team}/secret"):
            told = [spy.refusal(call, value).replace(value, "…") for value in (name, "nothing")]
            assert told[0] == told[1]
            assert "such as: 'own'" in told[0]


def test_copy_obeys_the_rules(spy: Spy) -> None:
    for source in ("embstore.item", "(SELECT * FROM embstore.items)", "(SELECT * FROM embstore.embedding)"):
        assert len(spy.copied(source).splitlines()) == 20
    assert "COPY FROM not supported with row-level security" in spy.refusal(
        "COPY embstore.item (dataset_id, position, path) FROM STDIN"
    )


def test_what_others_do_leaves_no_trace_that_one_can_read(spy: Spy) -> None:
    """Commands and their parameters, errors of items, temporary tables, names and comments in the catalogue."""
    assert spy.ask("SELECT count(*) FROM embstore.run WHERE parameters::text ~ 'angela'") == [(0,)]
    assert spy.ask("SELECT count(*) FROM embstore.extraction WHERE error IS NOT NULL") == [(0,)]
    with spy.other.begin() as connection:
        connection.exec_driver_sql("CREATE TEMPORARY TABLE notes AS SELECT path FROM embstore.item")
        place = connection.exec_driver_sql(
            "SELECT nspname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE relname = 'notes'"
        ).scalar_one()
        connection.commit()
        assert "permission denied for schema" in spy.refusal(f"SELECT * FROM {place}.notes")
    for words in (
        "relname FROM pg_class", "conname FROM pg_constraint", "proname FROM pg_proc", "polname FROM pg_policy",
        "description FROM pg_description", "pg_get_expr(polqual, polrelid) FROM pg_policy", "prosrc FROM pg_proc",
        "setconfig::text FROM pg_db_role_setting", "query FROM pg_stat_activity WHERE usename <> current_user",
    ):  # fmt: skip
        found = [str(word) for (word,) in spy.ask(f"SELECT {words}")]
        assert found
        assert not [word for word in found if "secret" in word or "angela" in word], words


def test_an_error_of_an_operator_names_ones_own_values_alone(spy: Spy) -> None:
    for condition in ("path::integer > 0", "speaker::float8 > 0", "CAST(path AS jsonb) IS NOT NULL"):
        with pytest.raises(psycopg2.DataError) as caught:
            spy.ask(f"SELECT count(*) FROM embstore.item WHERE item_id > {SECRETS} AND {condition}")
        spy.ask(f"SELECT count(*) FROM embstore.item WHERE item_id <= {SECRETS} AND {condition}")
        assert "angela/" in str(caught.value) or "s0" in str(caught.value) or "angela" in str(caught.value)


def test_a_function_of_ones_own_sees_no_row_of_others(spy: Spy) -> None:
    """A condition that tells what it is called with comes after the rules, however cheap it says it is."""
    tell = """
    CREATE FUNCTION pg_temp.tell(text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS
    $$ BEGIN IF $1 LIKE '{}' THEN RAISE EXCEPTION 'seen'; END IF; RETURN true; END $$
    """
    for table in ("embstore.item", "embstore.items", "embstore.embeddings_small"):
        query = f"SELECT count(*) FROM {table} WHERE pg_temp.tell(path)"
        assert spy.ask(query, before=tell.format("angela/25%")) == [(20,)]
        with pytest.raises(psycopg2.Error, match="seen"):  # one's own row it does see
            spy.ask(query, before=tell.format("angela/1.wav"))
    # An error in a condition does not come from a row of another's either.
    assert spy.ask("SELECT count(*) FROM embstore.item WHERE 1 / (length(path) - length('angela/250.wav')) > 5") == [
        (0,)
    ]


def test_statistics_and_the_numbers_of_rows_to_come_are_not_shown(spy: Spy) -> None:
    assert spy.ask("SELECT count(*) FROM pg_stats WHERE schemaname = 'embstore' AND tablename = 'item'") == [(0,)]
    assert "permission denied" in spy.refusal("SELECT * FROM pg_statistic")
    assert "permission denied" in spy.refusal("SELECT last_value FROM embstore.item_item_id_seq")
    assert "permission denied" in spy.refusal("SELECT currval('embstore.item_item_id_seq')")
    assert spy.ask("SELECT last_value FROM pg_sequences WHERE sequencename = 'item_item_id_seq'") in ([(None,)], [])
    assert spy.ask("SELECT count(*) FROM pg_stat_activity WHERE query <> '<insufficient privilege>' AND usename"
                   " <> current_user AND usename IS NOT NULL") == [(0,)]  # fmt: skip


def test_rules_cannot_be_set_aside(spy: Spy) -> None:
    assert "would be affected by row-level security" in spy.refusal("SET row_security = off; SELECT FROM embstore.item")
    for statement in ("SET SESSION AUTHORIZATION embstore", f'SET ROLE "{spy.other_team}"', "SET ROLE embstore"):
        assert "permission denied" in spy.refusal(statement)
    counts = ("SELECT count(*) FROM embstore.item", "SELECT sum(items) FROM embstore.progress")
    shadows = "CREATE TEMPORARY TABLE team AS SELECT 1; SET search_path = pg_temp, public, pg_catalog"
    operators = "CREATE FUNCTION pg_temp.pg_has_role(oid, text) RETURNS boolean LANGUAGE sql AS 'SELECT true'"
    for before in ("", shadows, operators, "SET ROLE NONE", "SET embstore.team = 'a'"):
        for query in counts:
            assert spy.ask(query, before=before) == [(20,)]


def test_another_teams_worker_is_seen_by_nobody_who_does_not_see_its_claims(database: Database, spy: Spy) -> None:
    with database.begin() as connection:
        token = connection.exec_driver_sql(
            "INSERT INTO embstore.lease (worker, expires_at) VALUES ('h:1', now() + interval '1 hour') RETURNING token"
        ).scalar_one()
    assert spy.ask("SELECT count(*) FROM embstore.lease WHERE worker = 'h:1'") == [(0,)]
    assert spy.ask("SELECT embstore.is_alive(%s), embstore.is_alive(%s)", token, token + 1) == [(True, False)]
    assert spy.ask("DELETE FROM embstore.lease WHERE token = %s RETURNING 1", token) == []
    tokens = spy.ask("SELECT count(*), count(DISTINCT claim_token >> 40) > 0 FROM embstore.extraction")
    assert tokens == [(20, True)]


BYTES = "public.embstore_bytes(embedding)"

# A condition with `{}`, what team A has, and what nobody has: letter by letter, too.
GUESSES = (
    ("embstore.item", "path = '{}'", "angela/250.wav", "nobody/250.wav"),
    ("embstore.item", "path = ANY ('{{{}}}')", "angela/250.wav", "nobody/250.wav"),
    ("embstore.item", "starts_with(path, '{}')", "angela/29", "angelb/29"),
    ("embstore.item", "path >= '{}' AND path < 'b'", "angela/99.wav", "angela/999.w"),
    ("embstore.item", "greatest(path, 'angela/98') = '{}' IS TRUE", "angela/99.wav", "angela/99.wax"),
    ("embstore.item", "dataset_id = 1 AND path = '{}'", "angela/250.wav", "nobody/250.wav"),
    ("embstore.item", "speaker = '{}'", "s250", "x250"),
    ("embstore.item", "speaker IS NOT NULL AND speaker >= '{}' AND speaker < 't'", "s98", "s99"),
    ("embstore.items", "path = '{}'", "angela/250.wav", "nobody/250.wav"),
    ("embstore.embeddings_small", "speaker = '{}'", "s250", "x250"),
    ("embstore.extraction", "error = '{}'", "angela", "nobody"),
    ("embstore.extraction", "status = 'failed' AND error_code = '{}'", "no_speech", "not_found"),
    ("embstore.dataset", "name = '{}'", "secret", "nothin"),
    ("embstore.dataset", "starts_with(name, '{}')", "sec", "sed"),
    ("embstore.dataset", "team = ANY ('{{{}}}')", "TEAM", "MAET"),
    ("embstore.datasets", "name = '{}'", "secret", "nothin"),
    ("embstore.dataset_share", "dataset_id = {}", "1", "9"),
    ("embstore.dataset_share", "team = ANY ('{{{}}}')", "TEAM", "MAET"),
    ("embstore.run", "dataset = '{}'", "secret", "nothin"),
    ("embstore.run", "dataset_id = {}", "1", "9"),
    ("embstore.centroid", "speaker = ANY ('{{{}}}')", "s250", "x250"),
    ("embstore.speaker_change", "starts_with(speaker, '{}')", "s25", "x25"),
    ("embstore.lease", "worker = '{}'", "angela:1", "nobody:1"),
    ("embstore.embedding_1", f"{BYTES} = '\\x{{}}'", VECTOR.hex(), VECTOR[::-1].hex()),
    ("embstore.embedding_1", f"{BYTES} BETWEEN '\\x{{0}}' AND '\\x{{0}}ff'", VECTOR.hex(), VECTOR[::-1].hex()),
)
MORE = (
    "UPDATE embstore.extraction SET status = 'failed', error_code = 'no_speech' WHERE item_id BETWEEN 100 AND 120",
    "INSERT INTO embstore.centroid (dataset_id, model_id, speaker, average)"
    " SELECT DISTINCT dataset_id, 1, speaker, 'mean' FROM embstore.item",
    "INSERT INTO embstore.lease (worker, expires_at) VALUES ('angela:1', now() + interval '1 hour')",
)
CONSTANTS = r"'[^']*'|dataset_id = \d+"
NO_SEQ = "SET enable_seqscan = off"
PLANS = (
    "",
    "SET enable_indexscan = off; SET enable_bitmapscan = off; SET enable_indexonlyscan = off",
    NO_SEQ,
    f"{NO_SEQ}; SET enable_bitmapscan = off",
    f"{NO_SEQ}; SET enable_indexscan = off; SET enable_indexonlyscan = off; SET work_mem = '64kB'",
    "SET cpu_operator_cost = 0; SET cpu_tuple_cost = 0",
    "SET cpu_operator_cost = 1e300",
    "SET debug_parallel_query = on; SET parallel_setup_cost = 0; SET min_parallel_table_scan_size = 0",
)
ASKED = (
    "SELECT FROM {} WHERE {}",
    "SELECT count(*) FILTER (WHERE {1}) FROM {0} WHERE {1}",
    "SELECT FROM generate_series(1, 2) JOIN LATERAL (SELECT FROM {} WHERE {} OFFSET 0) found ON true",
)
OTHERWISE = (
    "DELETE FROM embstore.item WHERE path = '{}'",
    "UPDATE embstore.item SET size = size WHERE starts_with(path, '{}')",
    "SELECT FROM embstore.item WHERE path = '{}' FOR UPDATE",
    "SELECT FROM embstore.item i JOIN (VALUES ('{}')) g (path) ON i.path = g.path",
    "SELECT FROM (VALUES ('{}')) g (path) WHERE EXISTS (SELECT FROM embstore.item i WHERE i.path = g.path)",
    "SELECT FROM embstore.item WHERE ctid = '(0,1)' AND vanished_at IS NULL AND path <> '{}'",
    "MERGE INTO embstore.item i USING (VALUES ('{}')) g (path) ON i.path = g.path WHEN MATCHED THEN DELETE",
)


def test_a_guess_is_answered_the_same_whether_it_is_right_or_not(spy: Spy) -> None:
    """The rules come first, in every way that PostgreSQL can go: its numbers of rows and pages are the same."""
    with spy.other.begin() as connection:
        for more in MORE:
            connection.exec_driver_sql(more)
    with spy.owner.begin() as connection:
        connection.exec_driver_sql("ANALYZE")
    queries: dict[str, list[str]] = {}
    for table, condition, *guesses in GUESSES:
        guesses = [guess.replace("TEAM", spy.other_team).replace("MAET", spy.other_team[::-1]) for guess in guesses]
        with spy.owner.begin() as connection:
            counts = [f"SELECT count(*) FROM {table} WHERE {condition.format(guess)}" for guess in guesses]
            found = [connection.exec_driver_sql(count).scalar_one() for count in counts]
        assert found[0] > 0 == found[1], (table, condition)
        for asked in ASKED:
            queries[asked.format(table, condition)] = [asked.format(table, condition.format(g)) for g in guesses]
    for asked in OTHERWISE:
        queries[asked] = [asked.format(guess) for guess in ("angela/250.wav", "nobody/250.wav")]
    for before in PLANS:
        told = iter(spy.told([query for pair in queries.values() for query in pair], before))
        for query, pair in queries.items():
            right, wrong = (re.sub(CONSTANTS, "…", next(told)) for _ in pair)
            assert right == wrong, (query, before)


def test_what_postgresql_leaves_open_is_as_the_page_says(spy: Spy, people: People) -> None:
    """How much there is, with whom else, and nearness: see "What it does not protect" in docs/sharing.md."""
    ((rows,),) = spy.ask("SELECT reltuples FROM pg_class WHERE oid = 'embstore.item'::regclass")
    assert rows == SECRETS + 20
    assert f"Rows Removed by Filter: {SECRETS}" in spy.plan("SELECT FROM embstore.item", PLANS[1])
    thought = [spy.ask(f"EXPLAIN SELECT FROM embstore.item WHERE dataset_id = {number}") for number in (1, 9)]
    assert [int(line.partition("rows=")[2].split()[0]) > 50 for ((line,), *_) in thought] == [True, False]
    vectors = "SELECT FROM embstore.embedding_1 WHERE item_id = {}"
    found = [spy.plan(vectors.format(number), PLANS[1]) for number in (1, 10**6)]
    assert ["never executed" in plan for plan in found] == [False, True]
    # With whom else: of a dataset that one sees oneself.
    third = people.team("c")
    with spy.other.begin() as connection:
        for team in (spy.team, third):
            connection.exec_driver_sql("INSERT INTO embstore.dataset_share (dataset_id, team) VALUES (1, %s)", (team,))
    shares = "SELECT FROM embstore.dataset_share WHERE dataset_id = 1 AND team = '{}'"
    found = [spy.plan(shares.format(team), NO_SEQ) for team in (third, third[::-1])]
    assert ["Rows Removed" in plan.partition("\n  InitPlan")[0] for plan in found] == [True, False]
    # Nearness: the index is everybody's, and how far it had to go for one's own rows is told.
    with spy.other.begin() as connection:
        connection.exec_driver_sql("DELETE FROM embstore.dataset_share WHERE team = %s", (spy.team,))
    with spy.owner.begin() as connection:
        connection.exec_driver_sql(
            "CREATE INDEX ON embstore.embedding_1 USING hnsw ((embedding::vector(3)) vector_cosine_ops)"
        )
    nearest = "SELECT FROM embstore.embedding_1 ORDER BY embedding::vector(3) <=> '[1,0,0]'::vector(3) LIMIT 20"
    assert re.search("Rows Removed by Filter: [1-9]", spy.plan(nearest, f"{NO_SEQ}; SET enable_sort = off"))
