"""`embstore search`, typed as a person does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from embstore.db.engine import Database

Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_table_and_beside_it_how_exact_it_is(store: Database, cli: Cli) -> None:
    result = cli("search", "ann/00.wav")
    assert result.exit_code == 0, result.output
    assert lines(result.stdout)[0] == "similarity speaker path"
    assert lines(result.stdout)[2:] == ["0.6860 ann ann/02.wav", "0.2425 böb böb/03.wav", "-0.1085 böb böb/01.wav"]
    said = "(3 utterances by small nearest to item 'ann/00.wav', as there are no more; exact, "
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1


def test_explained(store: Database, cli: Cli) -> None:
    result = cli("search", "ann/00.wav", "--where", "speaker = 'böb'", "--explain")
    assert lines(result.stdout)[2:] == ["0.2425 böb böb/03.wav", "-0.1085 böb böb/01.wav"]
    assert lines(result.stderr)[1:3] == [
        "how: what the filter leaves, one by one",
        "why: the filter leaves 5 items, and up to 2796202 are compared one by one",
    ]


def test_as_json(store: Database, cli: Cli) -> None:
    np.save("v.npy", [0.0, 1.0, 0.0])
    result = cli("search", "v.npy", "--k", "1", "--json", "--explain")
    found = json.loads(result.stdout)
    assert result.stderr == ""
    assert (found["model"], found["of"], found["exact"], found["method"]) == ("small", "utterances", True, "scan")
    assert found["query"] == {"kind": "vector", "name": "v.npy"}
    assert found["explain"]["reason"] == "there is no index on the vectors of this model"
    (hit,) = found["results"]
    assert (hit["path"], hit["speaker"], hit["dataset"], hit["start"]) == ("böb/01.wav", "böb", "calls", None)
    assert hit["similarity"] == pytest.approx(2 / 5**0.5)


def test_speakers(store: Database, cli: Cli) -> None:
    result = cli("search", "ann", "--of", "speakers")
    assert (result.exit_code, result.stdout) == (0, "")
    assert lines(result.stderr)[1] == "there are no centroids to compare with: type 'embstore centroids'"
    assert cli("centroids").exit_code == 0
    result = cli("search", "ann", "--of", "speakers")
    assert lines(result.stdout) == ["similarity speaker utterances", "---------- ------- ----------", "0.1562 böb 2"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nobody"], "error: 'nobody' is no file, and neither an item's path or id nor a speaker: check the name"),
        (["ann", "--where", "true; drop table x"], "error: --where: the condition is not one expression"),
        (["ann", "--where", "speeker = 'x'"], 'column "speeker" does not exist (such as: speaker'),
        (["ann", "--dataset", "cals"], "error: no dataset 'cals': did you mean 'calls'?"),
        (["ann", "--from", "books"], "error: speaker 'ann' of dataset 'books' has no vector by model"),
        (["ann", "--model", "smal"], "error: no model 'smal' in the database: did you mean 'small'?"),
        (["ann", "--as", "itm"], "'itm' is not one of 'file', 'item', 'speaker', 'vector'"),
        (["ann", "--k", "0"], "0 is not in the range x>=1"),
        ([], "Missing argument 'FILE|ITEM|SPEAKER|VECTOR.npy'."),
    ],
)
def test_a_slip_is_one_line_that_helps(store: Database, cli: Cli, words: list[str], error: str) -> None:
    result = cli("search", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert error in result.stderr
    assert result.stderr.count("\n") == 1
