"""embstore sql."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from embstore.db.engine import Database

Cli = Callable[..., Result]

SPEAKERS = "select speaker, count(*) as n from items where dataset = 'calls' group by speaker order by speaker"


def test_a_table_with_the_number_of_rows_beside_it(store: Database, cli: Cli) -> None:
    result = cli("sql", SPEAKERS)
    assert result.exit_code == 0
    assert result.stdout == "speaker  n\n-------  -\nann      5\nböb      5\n"
    assert result.stderr == "(2 rows)\n"


def test_csv_and_json(store: Database, cli: Cli) -> None:
    assert cli("sql", SPEAKERS, "--format", "csv").stdout == "speaker,n\nann,5\nböb,5\n"
    assert (
        cli("sql", SPEAKERS, "--format", "jsonl").stdout == '{"speaker": "ann", "n": 5}\n{"speaker": "böb", "n": 5}\n'
    )
    assert json.loads(cli("sql", SPEAKERS, "--format", "json").stdout) == [
        {"speaker": "ann", "n": 5},
        {"speaker": "böb", "n": 5},
    ]


def test_vectors_are_brief_in_tables_and_whole_elsewhere(store: Database, cli: Cli) -> None:
    query = "select embedding from embeddings_small order by position desc limit 1"
    assert cli("sql", query.replace("embedding ", "embedding || embedding ")).stdout.splitlines()[2].endswith("… 6]")
    assert json.loads(cli("sql", query, "--format", "jsonl").stdout) == {"embedding": [3e-8, 1, 2e9]}
    assert cli("sql", query, "--format", "csv").stdout == 'embedding\n"[3e-08,1,2e+09]"\n'


def test_nearest_neighbours_through_the_view(store: Database, cli: Cli) -> None:
    query = "select path from embeddings_small order by embedding <=> '[1,0,0.2]' limit 1"
    assert cli("sql", query, "--format", "csv").stdout == "path\nann/00.wav\n"


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "table"])
def test_percent_and_colon_are_the_querys_own(cli: Cli, form: str) -> None:
    result = cli("sql", "select 7 % 4 as m, ':a %s %(b)s %%' as t, '[1]'::json as j", "--format", form)
    assert result.exit_code == 0
    assert ":a %s %(b)s %%" in result.stdout
    assert "3" in result.stdout


def test_from_a_file_and_from_standard_input(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "query.sql"
    file.write_text("-- a comment; with a semicolon\nselect 5 as five -- and one at the end", encoding="utf-8")
    assert cli("sql", "-f", str(file), "--format", "csv").stdout == "five\n5\n"
    assert cli("sql", "-", "--format", "csv", stdin="select 6 as six;\n").stdout == "six\n6\n"


@pytest.mark.parametrize(
    ("query", "streams"),
    [
        ("select name from pg_cursors", True),
        ("/* why */ (select name from pg_cursors)", True),
        ("with c as (select name from pg_cursors) select * from c;", True),
        ("select 1; select name from pg_cursors", False),
    ],
)
def test_a_reading_query_streams_through_a_cursor_of_the_server(cli: Cli, query: str, streams: bool) -> None:
    assert cli("sql", query, "--format", "jsonl").stdout == ('{"name": "embstore_rows"}\n' if streams else "")
    assert cli("sql", query).stderr == "(0 rows)\n"


def test_many_rows_all_come_out(cli: Cli) -> None:
    lines = cli("sql", "select generate_series(1, 10001) as n", "--format", "csv").stdout.splitlines()
    assert lines == ["n", *map(str, range(1, 10002))]


@pytest.mark.parametrize(
    "query",
    [
        "delete from item",
        "with gone as (delete from item returning 1) select * from gone",
        "commit; delete from item",
        "select 1; delete from item",
    ],
)
@pytest.mark.parametrize("form", ["table", "jsonl"])
def test_nothing_is_changed_without_write(store: Database, cli: Cli, query: str, form: str) -> None:
    result = cli("sql", query, "--format", form)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: cannot execute ")
    assert result.stderr.endswith(" in a read-only transaction: add --write to change the database\n")
    with store.begin() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM embstore.item").scalar() == 13


def test_write_changes_and_says_how_much(store: Database, cli: Cli) -> None:
    result = cli("sql", "--write", "update item set speaker = 'carl' where speaker = 'ann'")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "UPDATE 7\n")
    query = "with gone as (delete from item where speaker = 'carl' returning path) select count(*) as n from gone"
    assert cli("sql", "--write", query, "--format", "jsonl").stdout == '{"n": 7}\n'
    assert cli("sql", "select count(*) as n from items", "--format", "csv").stdout == "n\n6\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["selec 1"], 'error: syntax error at or near "selec" at character 1\n'),
        (["select spaeker from items"], 'column "spaeker" does not exist at character 8; Perhaps'),
        (["select * from itemz"], 'error: relation "itemz" does not exist at character 15\n'),
        (["select 1/0"], "error: division by zero\n"),
        (["vacuum", "--write"], "error: VACUUM cannot run inside a transaction block: type it in 'embstore db psql'\n"),
        ([], "error: give one query: as an argument, with -f FILE, or - to read it from standard input\n"),
        (["select 1", "-f", "x.sql"], "error: give one query"),
        (["-f", "no such.sql"], "error: cannot read 'no such.sql': No such file or directory\n"),
        ([" ; -- nothing"], "error: the query is empty\n"),
    ],
)
@pytest.mark.parametrize("form", ["table", "csv"])
def test_a_wrong_query_is_one_line(cli: Cli, words: list[str], error: str, form: str) -> None:
    result = cli("sql", *words, "--format", form)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert error in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_database_that_is_not_migrated_is_named(bare_url: str, cli_at: Callable[[str], Cli]) -> None:
    result = cli_at(bare_url)("sql", "select * from items")
    assert result.exit_code == 2
    assert (
        "relation \"items\" does not exist; the database is not migrated: type 'embstore db upgrade'" in result.stderr
    )
    assert cli_at(bare_url)("sql", "select 1 as one").exit_code == 0


def test_what_an_old_pgvector_is_told_to_type_works(cli: Cli) -> None:
    result = cli("sql", "--write", "ALTER EXTENSION vector UPDATE")
    assert (result.exit_code, result.stderr) == (0, "ALTER EXTENSION\n")


def test_ctrl_c_ends_the_query_on_the_server(database: Database, database_url: str) -> None:
    command = [sys.executable, "-m", "embstore", "sql", "select pg_sleep(600)", "--database-url", database_url]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not sleepers(database):
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    out, errors = program.communicate()
    assert (program.returncode, out, errors.strip()) == (130, "", "interrupted")
    while sleepers(database):
        time.sleep(0.05)


def sleepers(database: Database) -> int:
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query = 'select pg_sleep(600)'"
    )
    with database.begin() as connection:
        return int(connection.exec_driver_sql(f"{query} AND state = 'active'").scalar_one())
