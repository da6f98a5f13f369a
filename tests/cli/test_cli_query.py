"""status, failures, retry, datasets."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from click.testing import Result

from embstore import reports
from embstore.db.engine import Database
from embstore.reports import Refused

Cli = Callable[..., Result]


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_status_adds_up_and_says_what_to_type(store: Database, cli: Cli) -> None:
    result = cli("status")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert " ".join(lines[0].split()) == "dataset model registered done failed skipped pending running finished"
    assert " ".join(lines[2].split()) == "books 3 0 0 0 3 0 0.0 %"
    assert " ".join(lines[3].split()) == "calls small 10 4 2 1 2 1 70.0 %"
    assert lines[5:] == [
        "4 done + 2 failed + 1 skipped + 5 pending + 1 running = 13 registered",
        "calls, small: decode_error 1 failed, not_found 1 failed, no_speech 1 skipped",
        "books: 3 pending items not queued yet: type 'embstore extract --dataset books'",
        "1 running item left by workers that are gone: the next run takes over",
        "type 'embstore failures' to see which items failed, and why",
        "type 'embstore extract' to go on",
    ]


def test_status_as_json(store: Database, cli: Cli) -> None:
    books, calls = json.loads(cli("status", "--json").stdout)
    assert calls == {
        "dataset": "calls",
        "model": "small",
        "registered": 10,
        "done": 4,
        "failed": 2,
        "skipped": 1,
        "pending": 2,
        "running": 1,
        "percent": 70.0,
        "unqueued": 0,
        "abandoned": 1,
        "reasons": [
            {"status": "failed", "code": "decode_error", "items": 1},
            {"status": "failed", "code": "not_found", "items": 1},
            {"status": "skipped", "code": "no_speech", "items": 1},
        ],
        "centroids": None,
    }
    assert (books["model"], books["pending"], books["unqueued"]) == (None, 3, 3)


def test_status_of_one_dataset_or_model(store: Database, cli: Cli) -> None:
    assert [one["dataset"] for one in json.loads(cli("status", "--json", "--dataset", "books").stdout)] == ["books"]
    assert [one["dataset"] for one in json.loads(cli("status", "--json", "--model", "small").stdout)] == ["calls"]


def test_items_that_came_with_another_models_run_count_as_pending(store: Database) -> None:
    with store.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO embstore.item (dataset_id, position, path)"
            " SELECT dataset_id, 10, 'new.wav' FROM embstore.dataset WHERE name = 'calls'"
        )
        calls = reports.progress(connection)[1]
    assert (calls.registered, calls.pending, calls.unqueued) == (11, 3, 1)
    assert calls.done + calls.failed + calls.skipped + calls.pending + calls.running == calls.registered


def test_all_but_one_of_a_million_is_not_a_hundred_percent() -> None:
    one = reports.Progress("d", "m", 1_000_000, 999_999, 0, 0, 1, 0, 0, 0, ())
    assert one.percent == 99.9


def test_an_empty_store_says_what_to_type(cli: Cli) -> None:
    for command in ("status", "datasets"):
        assert cli(command).stdout == "nothing is registered yet: type 'embstore extract PATH'\n"


@pytest.mark.parametrize("command", ["status", "failures", "retry"])
def test_a_wrong_name_names_the_right_one(store: Database, cli: Cli, command: str) -> None:
    result = cli(command, "--dataset", "cals")
    assert result.exit_code == 2
    assert "no dataset 'cals': did you mean 'calls'?" in result.stderr
    result = cli(command, "--model", "smal")
    assert result.exit_code == 2
    assert (
        result.stderr == "error: no model 'smal' in the database: did you mean 'small'? 'embstore models' lists all\n"
    )


def test_failures_lists_items_with_their_reason(store: Database, cli: Cli) -> None:
    result = cli("failures", "--format", "csv")
    assert result.exit_code == 0
    rows = rows_of(result.stdout)
    assert [(row["path"], row["status"], row["code"], row["error"]) for row in rows] == [
        ("ann/04.wav", "failed", "decode_error", "no header"),
        ("böb/05.wav", "failed", "not_found", "no such file"),
        ("ann/06.wav", "skipped", "no_speech", "nothing left after trimming"),
    ]
    assert {(row["dataset"], row["model"], row["attempts"]) for row in rows} == {("calls", "small", "1")}


@pytest.mark.parametrize(
    ("flags", "paths"),
    [
        (["--status", "skipped"], ["ann/06.wav"]),
        (["--code", "not_found"], ["böb/05.wav"]),
        (["--limit", "2"], ["ann/04.wav", "böb/05.wav"]),
        (["--limit", "0"], ["ann/04.wav", "böb/05.wav", "ann/06.wav"]),
        (["--dataset", "books"], []),
    ],
)
def test_failures_of_a_kind(store: Database, cli: Cli, flags: list[str], paths: list[str]) -> None:
    assert [row["path"] for row in rows_of(cli("failures", "--format", "csv", *flags).stdout)] == paths


def test_failures_says_what_is_left_out(store: Database, cli: Cli) -> None:
    assert cli("failures", "--limit", "2").stderr == "(2 of 3; --limit 0 shows all)\n"
    assert cli("failures").stderr == "(3 items)\n"
    result = cli("failures", "--code", "nothing")
    assert result.stdout == ""
    assert result.stderr == (
        "no item is failed or skipped with code 'nothing'; there are: "
        "1 failed with decode_error, 1 skipped with no_speech, 1 failed with not_found\n"
    )


def statuses(database: Database) -> dict[str, int]:
    with database.begin() as connection:
        rows = connection.exec_driver_sql("SELECT status, count(*) FROM embstore.extraction GROUP BY status")
        return {row.status: row[1] for row in rows}


@pytest.mark.parametrize(
    ("flags", "count", "left"),
    [
        ([], 2, {"failed": 0, "skipped": 1}),
        (["--status", "skipped"], 1, {"failed": 2, "skipped": 0}),
        (["--status", "all", "--dataset", "calls", "--model", "small"], 3, {"failed": 0, "skipped": 0}),
        (["--code", "not_found"], 1, {"failed": 1, "skipped": 1}),
    ],
)
def test_retry(store: Database, cli: Cli, flags: list[str], count: int, left: dict[str, int]) -> None:
    before = statuses(store)
    result = cli("retry", *flags)
    assert result.exit_code == 0
    noun = "item" if count == 1 else "items"
    assert result.stdout == f"{count} {noun} became pending: type 'embstore extract' to go on\n"
    after = statuses(store)
    assert after["pending"] == before["pending"] + count
    assert {name: after.get(name, 0) for name in left} == left
    assert after["done"] == before["done"]


def test_retry_of_nothing_says_so(store: Database, cli: Cli) -> None:
    before = statuses(store)
    result = cli("retry", "--dataset", "books")
    assert (result.exit_code, result.stdout) == (0, "no item is failed\n")
    result = cli("retry", "--code", "worker_died")
    assert result.stdout.startswith("no item is failed with code 'worker_died'; there are: 1 failed with decode_error")
    assert statuses(store) == before


def test_datasets(store: Database, cli: Cli) -> None:
    lines = cli("datasets").stdout.splitlines()
    assert lines[2].split() == ["books", "audio", "3", "2", "0", "nothing", "/data/books"]
    assert lines[3].split() == ["calls", "audio", "10", "2", "0", "small", "4", "/data/calls"]
    _, calls = json.loads(cli("datasets", "--json").stdout)
    assert (calls["items"], calls["speakers"], calls["vanished"], calls["models"][0]["done"]) == (10, 2, 0, 4)


def test_refused_items_are_counted_by_reason(store: Database) -> None:
    with store.begin() as connection:
        assert reports.reasons(connection, Refused(code="no_speech")) == [("skipped", "no_speech", 1)]
        assert len(reports.scopes(connection, Refused())) == 1
        assert reports.scopes(connection, Refused(statuses=["failed"], code="no_speech")) == []


def test_watch_shows_it_again_until_ctrl_c(store: Database, database_url: str) -> None:
    """On a terminal, in place; it ends well."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "embstore", "status", "--watch", "--database-url", database_url]
    program = subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    seen = b""
    while seen.count(b"13 registered") < 2:
        seen += os.read(ours, 4096)
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate()
    os.close(ours)
    assert program.returncode == 0
    assert errors.strip() == b""
    assert b"\x1b[11F\x1b[J" in seen  # up over the eleven lines before
