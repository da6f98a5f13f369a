"""embstore export centroids: files that hold the very bits of the database; and centroids in `status`."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from helpers import SMALL, Facts
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sqlalchemy import text

from embstore import catalog, vectors
from embstore.db.engine import Database
from embstore.queue import Queue, take_lease
from embstore.register import enqueue, register
from embstore.sources import Entry
from embstore.transfer import export
from embstore.transfer.files import MARKER
from embstore.transfer.pickles import speaker_file
from embstore.transfer.table import FORMATS

Cli = Callable[..., Result]


@pytest.fixture
def averaged(store: Database, cli: Cli) -> Database:
    """Dataset `calls` with the centroids of ann and böb."""
    result = cli("centroids")
    assert result.exit_code == 0, result.output
    return store


def stored(database: Database) -> dict[str, NDArray[np.float32]]:
    with database.begin() as connection:
        rows = connection.execute(text("SELECT speaker, vector_send(embedding) FROM embstore.speaker_centroids"))
        return {speaker: np.frombuffer(bytes(sent)[4:], ">f4").astype(np.float32) for speaker, sent in rows}


def name_speakers(database: Database, *names: str) -> None:
    """Another dataset, `odd`, of one utterance each of speakers with these names."""
    with database.begin() as connection:
        dataset_id = catalog.ensure_dataset(connection, "odd", "audio", "/data/odd").dataset_id
        register(connection, dataset_id, [Entry(f"{i}.wav", name, None, None, 1, 1) for i, name in enumerate(names)])
        model_id = catalog.ensure_model(connection, SMALL)
        enqueue(connection, dataset_id, model_id)
        queue = Queue("embstore.extraction", "item_id", {"dataset_id": dataset_id, "model_id": model_id})
        token = take_lease(connection)
        keys = queue.claim(connection, token, 100)
        matrix = np.random.default_rng(0).standard_normal((len(keys), 3)).astype(np.float32)
        vectors.write(connection, queue, token, keys, matrix)


def load(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return dict(pickle.load(file))


def test_pickles_are_the_old_layout(averaged: Database, cli: Cli, tmp_path: Path) -> None:
    result = cli("export", "centroids", str(tmp_path / "out"), "--format", "pkl")
    assert result.stdout == f"wrote 2 centroids by small to {tmp_path / 'out'}\n"
    assert result.stderr == ""
    ann = load(tmp_path / "out" / "calls" / "ann.pkl")
    assert list(ann) == [
        "embedding",
        "dataset",
        "speaker_id",
        "num_utterances",
        "failed_utterances",
        "utterance_list",
        "original_paths",
        "embedding_dim",
        "embedding_stats",
    ]
    assert ann["embedding"].dtype == np.float32
    assert ann["embedding"].tobytes() == stored(averaged)["ann"].tobytes()
    assert np.abs(ann["embedding"] - [0.75, 0.25, 0.125]).max() <= 1e-6
    assert (ann["dataset"], ann["speaker_id"], ann["num_utterances"]) == ("calls", "ann", 2)
    assert (ann["failed_utterances"], ann["embedding_dim"]) == (2, 3)
    assert ann["original_paths"] == ["/data/calls/ann/00.wav", "/data/calls/ann/02.wav"]
    with averaged.begin() as connection:
        query = "SELECT item_id FROM embstore.items WHERE dataset = 'calls' AND path IN ('ann/00.wav', 'ann/02.wav')"
        ids = connection.execute(text(query))
        assert ann["utterance_list"] == sorted(ids.scalars())
    wide = ann["embedding"].astype(np.float64)
    assert ann["embedding_stats"] == {"mean": wide.mean(), "std": wide.std(), "min": wide.min(), "max": wide.max()}
    assert load(tmp_path / "out" / "calls" / "böb.pkl")["speaker_id"] == "böb"


def test_npz(averaged: Database, cli: Cli, tmp_path: Path) -> None:
    assert cli("export", "centroids", str(tmp_path), "--format", "npz", "--model", "small").exit_code == 0
    found = np.load(tmp_path / "centroids.npz", allow_pickle=False)
    assert list(found["speaker"]) == ["ann", "böb"]
    assert list(found["dataset"]) == ["calls", "calls"]
    assert found["embedding"].dtype == np.float32
    assert found["embedding"].tobytes() == np.stack(list(stored(averaged).values())).tobytes()
    assert list(found["num_utterances"]) == [2, 2]
    assert list(found["failed_utterances"]) == [2, 1]
    assert found["cohesion"].dtype == np.float32
    assert str(found["model"]) == "small"


def test_parquet(averaged: Database, cli: Cli, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert cli("export", "centroids", str(tmp_path), "--format", "parquet").exit_code == 0
    rows = parquet.read_table(tmp_path / "centroids.parquet").to_pylist()
    assert [(row["dataset"], row["model"], row["speaker"]) for row in rows] == [
        ("calls", "small", "ann"),
        ("calls", "small", "böb"),
    ]
    vectors = {row["speaker"]: np.array(row["embedding"], dtype=np.float32) for row in rows}
    assert {name: v.tobytes() for name, v in vectors.items()} == {
        name: v.tobytes() for name, v in stored(averaged).items()
    }
    assert rows[1]["original_paths"] == ["/data/calls/böb/01.wav", "/data/calls/böb/03.wav"]


def test_parquet_without_pyarrow(averaged: Database, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = cli("export", "centroids", str(tmp_path / "out"), "--format", "parquet")
    assert result.exit_code == 2
    assert result.stderr == ("error: --format parquet needs pyarrow: type 'pip install pyarrow', or use --format npz\n")
    assert not (tmp_path / "out").exists()


def test_more_speakers_than_one_piece(store: Database, cli: Cli, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(export, "_PIECE", 7)
    name_speakers(store, *(f"speaker {i}" for i in range(50)))
    assert cli("centroids").exit_code == 0
    wanted = {name: vector.tobytes() for name, vector in stored(store).items()}
    for form in FORMATS:
        flags = ("--dataset", "odd") if form == "kaldi" else ()
        assert cli("export", "centroids", str(tmp_path), *flags, "--format", form).exit_code == 0
    found = np.load(tmp_path / "centroids.npz")
    both = zip(found["speaker"], found["embedding"], strict=True)
    assert {str(name): vector.tobytes() for name, vector in both} == wanted
    pickles = [load(path) for path in tmp_path.rglob("*.pkl")]
    assert {one["speaker_id"]: one["embedding"].tobytes() for one in pickles} == wanted


def test_names_that_could_lead_out_of_the_folder(store: Database, cli: Cli, tmp_path: Path) -> None:
    names = ["../../evil", "/etc/passwd", "a/b", "a", "a.pkl/b", "..", ".", "%2E.", ".hidden", "a//b", "50%", " ", "\n"]
    name_speakers(store, *names)
    assert cli("centroids", "--dataset", "odd").exit_code == 0
    out = tmp_path / "deep" / "out"
    result = cli("export", "centroids", str(out), "--dataset", "odd")
    assert result.exit_code == 0, result.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.is_relative_to(out) for path in files)
    assert {load(path)["speaker_id"] for path in files if path.suffix == ".pkl"} == set(names)
    assert (out / "odd" / "a" / "b.pkl").exists()


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20), unique=True))
def test_every_name_has_a_file_of_its_own(names: list[str]) -> None:
    files = {speaker_file("../data", name) for name in names}
    assert len(files) == len(names)
    for file in files:
        assert not file.is_absolute()
        assert not {"..", ".", ""} & set(file.parts)
        assert file.parts[0] == "%2E.%2Fdata"
        assert not any(other in file.parents for other in files)


def test_a_name_that_no_file_can_have(store: Database, cli: Cli, tmp_path: Path) -> None:
    name_speakers(store, "x" * 300)
    cli("centroids")
    result = cli("export", "centroids", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "too long for a file name: use --format npz or parquet" in result.stderr
    assert cli("export", "centroids", str(tmp_path / "out"), "--format", "npz").exit_code == 0


def test_a_folder_with_other_files_is_refused_and_ones_own_is_written_over(
    averaged: Database, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = cli("export", "centroids", str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr == f"error: '{tmp_path}' holds other files: name a new folder, or add --force\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert cli("export", "centroids", str(tmp_path), "--force").exit_code == 0
    pickled = tmp_path / "calls" / "ann.pkl"
    whole = pickled.read_bytes()
    pickled.write_bytes(whole[:10])
    assert cli("export", "centroids", str(tmp_path)).exit_code == 0
    assert pickled.read_bytes() == whole
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_file_in_the_place_of_the_folder(averaged: Database, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert cli("export", "centroids", str(tmp_path / "out")).exit_code == 2
    result = cli("export", "centroids", str(tmp_path / "out" / "below"))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: cannot write to '")


_SHORTEN = """
UPDATE embstore.centroid_vector v SET embedding = '[1]' FROM embstore.centroid c
WHERE v.centroid_id = c.centroid_id AND c.speaker = 'böb'
"""


def test_what_fails_in_the_middle_leaves_no_half_file(averaged: Database, cli: Cli, tmp_path: Path) -> None:
    assert cli("export", "centroids", str(tmp_path), "--format", "npz").exit_code == 0
    before = (tmp_path / "centroids.npz").read_bytes()
    with averaged.begin() as connection:
        # One vector has another dimension than the rest, which no vector that embstore computes has.
        connection.execute(text(_SHORTEN))
    result = cli("export", "centroids", str(tmp_path), "--format", "parquet")
    assert result.exit_code != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARKER, "centroids.npz"]
    assert (tmp_path / "centroids.npz").read_bytes() == before


def test_nothing_to_export_says_what_to_type(store: Database, cli: Cli, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    result = cli("export", "centroids", out, "--dataset", "calls")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: there are no centroids of dataset 'calls' by model 'small': type 'embstore centroids' first\n"
    )
    assert "did you mean 'calls'" in cli("export", "centroids", out, "--dataset", "cals").stderr
    assert "did you mean 'small'" in cli("export", "centroids", out, "--model", "smal").stderr
    assert not (tmp_path / "out").exists()


def test_nothing_extracted_says_what_to_type(cli: Cli, tmp_path: Path) -> None:
    result = cli("export", "centroids", str(tmp_path))
    assert result.exit_code == 2
    assert "there are no vectors: type 'embstore extract PATH', then 'embstore centroids'" in result.stderr


def test_several_models(averaged: Database, cli: Cli, tmp_path: Path) -> None:
    with averaged.begin() as connection:
        model_id = catalog.ensure_model(connection, Facts(name="other"))
        enqueue(connection, catalog.get_dataset(connection, "calls").dataset_id, model_id)
    result = cli("export", "centroids", str(tmp_path))
    assert result.exit_code == 2
    assert "there are vectors by several models, 'small', 'other': add --model NAME" in result.stderr


def test_stale_centroids_are_counted_by_status_and_by_export(averaged: Database, cli: Cli, tmp_path: Path) -> None:
    assert json.loads(cli("status", "--json").stdout)[1]["centroids"] == {"computed": 2, "stale": 0}
    assert "stale" not in cli("status").stdout
    with averaged.begin() as connection:
        connection.execute(text("UPDATE embstore.item SET speaker = 'cem' WHERE path = 'ann/00.wav'"))
        connection.execute(text("UPDATE embstore.item SET speaker = 'cem' WHERE path = 'ann/02.wav'"))
    assert json.loads(cli("status", "--json").stdout)[1]["centroids"] == {"computed": 2, "stale": 2}
    assert "calls, small: 2 centroids stale: type 'embstore centroids'" in cli("status").stdout.splitlines()
    result = cli("export", "centroids", str(tmp_path))
    assert result.stderr == "1 of them are stale: type 'embstore centroids' and export again\n"
    assert cli("centroids").exit_code == 0
    assert json.loads(cli("status", "--json").stdout)[1]["centroids"] == {"computed": 2, "stale": 0}


def test_centroids_of_nothing_say_so(store: Database, cli: Cli) -> None:
    with store.begin() as connection:
        connection.execute(text("UPDATE embstore.item SET speaker = NULL"))
    result = cli("centroids")
    assert result.exit_code == 0
    words = "'calls' has no vector of a known speaker: register it with --speaker-from, or a manifest's column"
    assert words in result.stdout.splitlines()
    result = cli("centroids", "--dataset", "books", "--model", "small")
    assert result.stdout == (
        "there are no vectors of dataset 'books' by model 'small' to average: "
        "type 'embstore extract --dataset books --model small' first\n"
    )
