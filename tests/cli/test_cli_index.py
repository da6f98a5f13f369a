"""`embstore index`, typed as a person does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from click.testing import Result
from commands import PATIENCE, Watcher, wait_until

from embstore.db.engine import Database
from embstore.settings import Settings

Cli = Callable[..., Result]


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_from_none_to_one_and_back(store: Database, cli: Cli) -> None:
    said = "model 'small' has no index, and searches are exact: 'embstore index build --model small'\n"
    assert cli("index", "status").stdout == said
    assert cli("index", "drop").stdout == "model 'small' has no index\n"
    result = cli("index", "build", "--workers", "0", "--memory", "1GB")
    assert result.exit_code == 0, result.output
    built = result.stdout.splitlines()
    assert built[0] == (
        "building hnsw (m 16, ef_construction 64) at full precision on 4 vectors by small, with 1.0 GB of memory"
    )
    assert built[1].startswith("built embedding_1_hnsw in ")
    assert lines(cli("index", "status").stdout)[2] == "small embedding_1_hnsw hnsw full 1 MB ready"
    (one,) = json.loads(cli("index", "status", "--json").stdout)
    assert (one["state"], one["model"], one["part"]) == ("ready", "small", None)
    result = cli("index", "build", "--precision", "half", "--workers", "0")
    assert result.stdout.endswith("dropped embedding_1_hnsw, whose place it takes\n")
    result = cli("index", "drop", "--model", "small")
    assert result.stdout == (
        "dropped embedding_1_hnsw_half, 1 MB; 'embstore index build --model small' builds it again\n"
    )


def test_check_as_a_table_and_as_json(store: Database, cli: Cli) -> None:
    result = cli("index", "check", "--k", "2")
    assert result.exit_code == 0, result.output
    table = lines(result.stdout)
    assert table[0] == "among queries recall@2 lowest queries/s exact queries/s how"
    assert [line.split()[0] for line in table[2:]] == ["all", "50%", "10%", "1%", "0.1%"]
    assert table[2].split()[1:4] == ["4", "1.000", "1.0"]
    assert result.stderr == "no index was used: 'embstore index build --model small' makes one\n"
    first = json.loads(cli("index", "check", "--json", "--queries", "2").stdout)[0]
    assert (first["scope"], first["queries"], first["recall"], first["k"]) == ("all", 2, 1.0, 10)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["build", "--memory", "lots"], "'lots' is no amount of memory, such as 8GB or 512MB"),
        (["build", "--kind", "ivfflat", "--m", "8"], "--m is not for ivfflat"),
        (["build", "--lists", "8"], "--lists is not for hnsw"),
        (["build", "--model", "smal"], "no model 'smal' in the database: did you mean 'small'?"),
        (["biuld"], "No such command 'biuld'."),
    ],
)
def test_a_slip_is_one_line_that_helps(store: Database, cli: Cli, words: list[str], error: str) -> None:
    result = cli("index", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert error in result.stderr
    assert result.stderr.count("\n") == 1


def test_ctrl_c_ends_the_build_on_the_server_and_clears_away(
    store: Database, database_url: str, settings: Settings
) -> None:
    watcher = Watcher(database_url)
    other = Database(settings)
    building = "SELECT count(*) FROM pg_stat_progress_create_index WHERE datname = current_database()"
    with other.begin() as connection:
        connection.exec_driver_sql("DELETE FROM embstore.embedding_1 WHERE item_id = 1")  # the build waits for its end
        command = [sys.executable, "-m", "embstore", "index", "build", "--database-url", database_url]
        program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: watcher.rows(building) == [(1,)], "the build")
        os.kill(program.pid, signal.SIGINT)
        wait_until(lambda: watcher.rows(building) == [(0,)], "its end on the server")
        connection.rollback()
    other.close()
    _, errors = program.communicate(timeout=PATIENCE)
    assert program.returncode == 130
    assert errors.strip() == "interrupted"
    assert watcher.rows("SELECT count(*) FROM pg_class WHERE relname LIKE 'embedding_1_hnsw%%'") == [(0,)]
