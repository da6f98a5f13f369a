"""Hostile input: manifests, Kaldi folders, `.env`, arguments and COPY data end in a result or in one clear error.

Bounded in examples, and the same ones in every run; EMBSTORE_TEST_SOAK tries many more of them, new ones each time.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings

from embstore.cli.main import COMMANDS, embstore
from embstore.db.copy import Column, Decoder, Rows, encode
from embstore.errors import EmbstoreError
from embstore.media.extensions import AUDIO
from embstore.settings import NAMES, load
from embstore.sources import Entry, open_source

SOAK = "EMBSTORE_TEST_SOAK" in os.environ
fuzz = settings(
    max_examples=3000 if SOAK else 60,
    derandomize=not SOAK,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
CELLS = st.one_of(
    WORDS, st.sampled_from(["a.wav", "../up.wav", "/abs.wav", "1e999", "nan", "-1", '"', "\0", "a\tb", "|"])
)
COLUMNS = st.lists(st.sampled_from(["path", "speaker", "start", "duration", "Path", "x", ""]), min_size=1, max_size=5)


def entries(path: Path) -> list[Entry]:
    """All that a source gives, or nothing where it refuses; any other error fails the test."""
    try:
        return list(open_source(path, extensions=AUDIO, speaker_from="parent", root=None).entries())
    except EmbstoreError:
        return []


def check(found: list[Entry]) -> None:
    """What would be registered can be stored, and stays under its root."""
    for entry in found:
        for word in (entry.path, entry.speaker or ""):
            assert "\0" not in word
            word.encode()
        assert ".." not in entry.path.split("/")
        assert not entry.path.startswith("/")
        for value in (entry.start, entry.duration):
            assert value is None or (np.isfinite(value) and value >= 0)


@fuzz
@given(header=COLUMNS, rows=st.lists(st.lists(CELLS, max_size=6), max_size=6), suffix=st.sampled_from([".csv", ".tsv"]))
def test_a_manifest_of_any_cells(header: list[str], rows: list[list[str]], suffix: str, tmp_path: Path) -> None:
    mark = "," if suffix == ".csv" else "\t"
    path = tmp_path / f"manifest{suffix}"
    path.write_text("\n".join(mark.join(row) for row in [header, *rows]), newline="")
    check(entries(path))


@fuzz
@given(data=st.binary(max_size=300), suffix=st.sampled_from([".csv", ".jsonl", ".tsv", ".csv.gz", ".jsonl.gz"]))
def test_a_manifest_of_any_bytes(data: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"manifest{suffix}"
    path.write_bytes(data)
    check(entries(path))


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | WORDS, st.lists, max_leaves=5)


@fuzz
@given(rows=st.lists(st.dictionaries(st.sampled_from(["path", "speaker", "start", "duration", "x"]), JSON), max_size=5))
def test_a_manifest_of_any_json(rows: list[dict[str, object]], tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    check(entries(path))


@fuzz
@given(files=st.fixed_dictionaries({name: st.binary(max_size=120) for name in ("wav.scp", "segments", "utt2spk")}))
def test_a_kaldi_folder_of_any_bytes(files: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    check(entries(tmp_path))


@fuzz
@given(lines=st.lists(st.tuples(st.sampled_from([*NAMES, "DB_MAX", "EMBEDDING_", "OTHER"]), WORDS), max_size=4))
def test_settings_of_any_values(lines: list[tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("\n".join(f"{name}={value}" for name, value in lines))
    with contextlib.suppress(EmbstoreError):
        found = load({}, tmp_path)
        assert found.db_max_connections >= 1


@fuzz
@given(data=st.binary(max_size=200))
def test_an_env_file_of_any_bytes(data: bytes, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(data)
    with contextlib.suppress(EmbstoreError):
        load({}, tmp_path)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No command may get as far as to work: the database is not there, and the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")


ARGUMENTS = st.lists(
    st.one_of(
        WORDS,
        st.sampled_from(
            ["--workers", "--gpus", "--model", "--dataset", "--json", "--limit", "--format", "-1", "0", "--x"]
        ),
    ),
    max_size=5,
)


@fuzz
@given(command=st.sampled_from(sorted(set(COMMANDS) - {"db"})), words=ARGUMENTS)
def test_arguments_of_any_words(nowhere: None, command: str, words: list[str]) -> None:
    result = CliRunner().invoke(embstore, [command, *(word.replace("\0", "") for word in words)])
    assert result.exit_code in (0, 1, 2, 3), result.output
    assert "something unexpected" not in result.output
    assert "Traceback" not in result.output


SHAPES: dict[str, Column] = {"key": (np.dtype(np.int64), None), "vector": (np.dtype(np.float32), 3)}


@fuzz
@given(data=st.binary(max_size=200), place=st.integers(0, 200))
def test_copy_data_of_any_bytes(data: bytes, place: int) -> None:
    """Any bytes, and right ones that were overwritten somewhere: arrays of the right shape, or a ValueError."""
    columns = {"key": np.arange(3, dtype=np.int64), "vector": np.ones((3, 3), dtype=np.float32)}
    right = encode(columns).getvalue()
    for sample in (data, right[:place] + data + right[place + len(data) :]):
        found: list[Rows] = []
        with contextlib.suppress(ValueError):
            decoder = Decoder(SHAPES, found.append)
            decoder.write(sample)
            decoder.end()
        assert all(rows["vector"].shape == (len(rows["key"]), 3) for rows in found)
