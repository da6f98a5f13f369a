"""Tables, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from embstore.cli.output import Vector, write_rows

ROWS: list[Sequence[Any]] = [
    ('a,"b"\n', 1, 0.5, Vector("[1,2.5,-3e-08,4]"), True, None),
    ("漢字", 1000, -1.25, Vector("[1,2]"), False, datetime(2024, 5, 6, 7, 8, 9, 500, tzinfo=UTC)),
]
COLUMNS = ("text", "whole", "real", "vector", "truth", "when")


def written(form: str, columns: Sequence[str] = COLUMNS, rows: Sequence[Sequence[Any]] = ROWS) -> str:
    out = io.StringIO()
    assert write_rows(columns, iter(rows), form, out) == len(rows)
    return out.getvalue()


def test_a_table_is_aligned_also_where_letters_are_wide() -> None:
    assert written("table").splitlines() == [
        "text     whole   real  vector                 truth  when",
        "-------  -----  -----  ---------------------  -----  -------------------------",
        'a,"b"\\n      1    0.5  [1, 2.5, -3e-08, … 4]  true',
        "漢字      1000  -1.25  [1, 2]                 false  2024-05-06 07:08:09+00:00",
    ]


def test_csv_reads_back() -> None:
    rows = list(csv.reader(io.StringIO(written("csv"), newline="")))
    assert rows == [
        list(COLUMNS),
        ['a,"b"\n', "1", "0.5", "[1,2.5,-3e-08,4]", "true", ""],
        ["漢字", "1000", "-1.25", "[1,2]", "false", "2024-05-06 07:08:09.000500+00:00"],
    ]


def test_json_and_jsonl_hold_the_same_rows() -> None:
    rows = json.loads(written("json"))
    assert rows == [json.loads(line) for line in written("jsonl").splitlines()]
    assert rows[0] == {
        "text": 'a,"b"\n',
        "whole": 1,
        "real": 0.5,
        "vector": [1, 2.5, -3e-08, 4],
        "truth": True,
        "when": None,
    }
    assert rows[1]["when"] == "2024-05-06T07:08:09.000500+00:00"


def test_json_without_rows_is_an_empty_list() -> None:
    assert json.loads(written("json", rows=[])) == []
    assert written("jsonl", rows=[]) == ""


def test_json_is_valid_whatever_the_numbers_are() -> None:
    row = (float("nan"), [float("inf"), 1.0], Decimal("7"), Decimal("0.5"), Decimal("NaN"))
    values = json.loads(written("jsonl", "abcde", [row]), parse_constant=pytest.fail)
    assert values == {"a": "nan", "b": ["inf", 1.0], "c": 7, "d": 0.5, "e": "NaN"}


def test_columns_of_one_name_all_reach_json() -> None:
    assert json.loads(written("jsonl", ["a", "a", "a"], [(1, 2, 3)])) == {"a": 1, "a_2": 2, "a_3": 3}


def test_a_file_name_cannot_command_the_terminal() -> None:
    assert "\x1b" not in written("table", ["path"], [("\x1b[2J\x07.wav",)])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [30, 50, 100])
def test_wide_columns_are_cut_to_the_terminal_and_only_there(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [(1, "p" * 200, "漢" * 20), (2, "q", "r")]
    terminal = Terminal()
    write_rows(("n", "path", "speaker"), rows, "table", terminal)
    lines = terminal.getvalue().splitlines()
    assert len(lines[1]) == width  # the rule: what the columns take
    assert "p…" in lines[2]
    assert "p" * 200 in written("table", ("n", "path", "speaker"), rows)
