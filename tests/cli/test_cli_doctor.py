"""doctor: every kind of trouble that it knows, made for real."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from click.testing import Result
from helpers import ask
from sqlalchemy import text

from embstore import doctor
from embstore.db.engine import Database
from embstore.settings import Settings

Cli = Callable[..., Result]


def findings(cli: Cli, code: int) -> dict[str, list[tuple[str, str, str | None]]]:
    """Level, words and advice of all that was found, by check."""
    result = cli("doctor", "--json")
    assert result.exit_code == code, result.output
    found: dict[str, list[tuple[str, str, str | None]]] = {}
    for one in json.loads(result.stdout):
        found.setdefault(one["check"], []).append((one["level"], one["found"], one["advice"]))
    return found


def execute(database: Database, *statements: str) -> None:
    with database.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def test_a_database_that_is_well(database: Database, cli: Cli) -> None:
    found = findings(cli, 0)
    assert list(found) == [
        *("server", "pgvector", "migrations", "clock", "connections", "leases"),
        *("vectors", "partitions", "indexes", "bloat", "snapshots", "disk", "recall"),
    ]
    assert {level for checks in found.values() for level, _, _ in checks} == {"ok"}
    assert cli("doctor").stdout.splitlines()[-1] == "0 problems, 0 warnings"


def test_rows_of_a_worker_that_is_gone(store: Database, cli: Cli) -> None:
    result = cli("doctor")
    assert result.exit_code == 0
    assert "leases: type 'embstore extract': it takes them over" in result.stdout
    assert "0 problems, 1 warning" in result.stdout


def test_vectors_that_were_deleted_by_hand(store: Database, cli: Cli) -> None:
    execute(store, "DELETE FROM embstore.embedding WHERE item_id = (SELECT min(item_id) FROM embstore.embedding)")
    [(level, found, _)] = findings(cli, 1)["vectors"]
    assert (level, found) == ("problem", "'calls' by small: 4 extractions done, 3 vectors there")


def test_partitions_without_a_model_and_a_model_without_a_partition(store: Database, cli: Cli) -> None:
    ((number,),) = ask(store, "SELECT model_id FROM embstore.model")
    execute(store, "CREATE TABLE embstore.embedding_77 PARTITION OF embstore.embedding FOR VALUES IN (77)")
    [(level, found, advice)] = findings(cli, 0)["partitions"]
    assert (level, found) == ("warning", "embstore.embedding_77 belongs to no model")
    assert advice == "look at it, then: DROP TABLE embstore.embedding_77"
    execute(store, "DROP TABLE embstore.embedding_77", f"DROP TABLE embstore.embedding_{number} CASCADE")
    [(level, found, _)] = findings(cli, 1)["partitions"]
    assert (level, found) == ("problem", f"model 'small' has no table embstore.embedding_{number}")


def test_an_index_whose_build_was_interrupted(store: Database, cli: Cli) -> None:
    ((number,),) = ask(store, "SELECT model_id FROM embstore.model")
    execute(store, f"CREATE INDEX broken ON embstore.embedding_{number} ((embedding::vector(3)))")
    execute(store, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'embstore.broken'::regclass")
    [(level, found, advice)] = findings(cli, 1)["indexes"]
    assert level == "problem"
    assert found.startswith(f"embstore.broken on embedding_{number} is not valid")
    assert advice == "it is not embstore's own: DROP INDEX embstore.broken"


def test_the_recall_of_an_index(store: Database, cli: Cli) -> None:
    assert findings(cli, 0)["recall"] == [("ok", "no vector index: every search is exact", None)]
    assert cli("index", "build", "--model", "small").exit_code == 0
    [(level, found, _)] = findings(cli, 0)["recall"]
    assert level == "ok"
    assert found.startswith("'small': 1.000 of the ten nearest are found, ")


def test_dead_rows_and_a_snapshot_that_holds_them(store: Database, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEAD_ROWS", 5)
    monkeypatch.setattr(doctor, "OLD_SNAPSHOT_SECONDS", 0)
    with store.begin() as reader:
        reader.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.exec_driver_sql("SELECT count(*) FROM embstore.item")
        for _ in range(2):
            execute(store, "UPDATE embstore.item SET size = size", "SELECT pg_stat_force_next_flush()")
        found = findings(cli, 0)
    [(level, words, advice)] = found["bloat"]
    assert level == "warning"
    assert words.startswith("embstore.item: ")
    assert advice == "VACUUM embstore.item; if they stay, an old snapshot holds them"
    assert any("has held a snapshot" in words for _, words, _ in found["snapshots"])


def test_connections_that_are_used_up(store: Database, cli: Cli, settings: Settings) -> None:
    ((allowed,),) = ask(store, "SELECT current_setting('max_connections')::int")
    greedy = replace(settings, db_max_connections=allowed)
    found = {finding.check: finding for finding in doctor.examine(store, greedy)}
    assert found["connections"].level == "warning"
    assert found["connections"].advice is not None
    assert "set DB_MAX_CONNECTIONS to " in found["connections"].advice


def test_a_clock_that_is_wrong(database: Database, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    hours_ago = doctor.time.time() - 7200
    monkeypatch.setattr(doctor.time, "time", lambda: hours_ago)
    [(level, found, _)] = findings(cli, 0)["clock"]
    assert level == "warning"
    assert found.startswith("the server is 7,2")
    assert found.endswith(" s ahead of this machine")


def test_a_full_disk(database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with database.begin() as connection:
        monkeypatch.setattr(doctor, "LOW_DISK_BYTES", 1 << 60)
        [finding] = doctor._disk(connection, settings)
    assert finding.level == "problem"


def test_a_database_that_is_not_migrated_or_not_there(bare_url: str, cli_at: Callable[[str], Cli]) -> None:
    found = findings(cli_at(bare_url), 1)
    assert list(found) == ["server", "pgvector", "migrations", "clock"]
    assert found["migrations"][0][2] == "the database is not migrated: type 'embstore db upgrade'"
    assert cli_at("postgresql://nobody@127.0.0.1:1/none")("doctor").exit_code == 3


def test_a_database_of_a_newer_embstore(database: Database, cli: Cli) -> None:
    execute(database, "UPDATE embstore.alembic_version SET version_num = '9999'")
    found = findings(cli, 1)
    assert [(check, one[0][0]) for check, one in found.items()] == [
        *(("server", "ok"), ("pgvector", "ok"), ("migrations", "problem"), ("clock", "ok"))
    ]
    assert str(found["migrations"][0][2]).endswith("type 'pip install --upgrade embstore'")
