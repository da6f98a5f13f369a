"""embstore export embeddings and boundaries: read again by each format's own readers, bit for bit."""

from __future__ import annotations

import fcntl
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import kaldiio
import numpy as np
import pandas
import pyarrow.parquet
import pytest
from click.testing import Result
from helpers import Facts, fill
from odd_items import DIM, ENTRIES, MATRIX
from ordered_sets import synthetic

from embstore import faults, vectors
from embstore.db.engine import Database
from embstore.queue import take_lease

Cli = Callable[..., Result]


@pytest.fixture
def export(odd: Database, cli: Cli, tmp_path: Path) -> Callable[[str], Path]:
    def run(form: str) -> Path:
        result = cli("export", "embeddings", str(tmp_path / "out"), "--format", form)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("wrote 6 vectors of 'odd' by wide v2 to ")
        return tmp_path / "out"

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_parquet_by_pyarrow_pandas_and_duckdb(export: Callable[[str], Path]) -> None:
    path = export("parquet") / "embeddings.parquet"
    table = pyarrow.parquet.read_table(path)
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), DIM)
    facts = json.loads(table.schema.metadata[b"embstore"])
    assert (facts["dataset"], facts["model"], facts["fingerprint"], facts["dim"]) == (
        "odd",
        "wide v2",
        "0123456789abcdef",
        DIM,
    )
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(5)
    assert (column.path_in_schema, column.compression) == ("embedding.list.element", "ZSTD")

    frame = pandas.read_parquet(path)
    assert np.stack(frame["embedding"].to_list()).tobytes() == MATRIX.tobytes()
    assert frame["path"].to_list() == [one.path for one in ENTRIES[:6]]
    assert frame["position"].to_list() == list(range(6))
    assert frame["start"].dropna().to_list() == [1.5, 10.1]

    rows = duckdb.sql(f"SELECT path, speaker, start, duration, embedding FROM '{path}' ORDER BY position").fetchall()
    assert [row[:4] for row in rows] == [(e.path, e.speaker, e.start, e.duration) for e in ENTRIES[:6]]
    assert np.array([row[4] for row in rows], dtype=np.float32).tobytes() == MATRIX.tobytes()


def test_npz_by_numpy(export: Callable[[str], Path]) -> None:
    found = np.load(export("npz") / "embeddings.npz", allow_pickle=False)
    assert found["embedding"].dtype == np.float32
    assert found["embedding"].tobytes() == MATRIX.tobytes()
    assert found["path"].tolist() == [one.path for one in ENTRIES[:6]]
    assert found["speaker"].tolist() == ["ann", "ann", "ann b", "ann b", "", "böb"]
    assert found["duration"].tolist()[2:4] == [2.25, 0.2]
    assert np.isnan(found["start"][0])
    assert json.loads(str(found["embstore"]))["root"] == "/data/odd"


def test_kaldi_by_kaldiio(export: Callable[[str], Path]) -> None:
    out = export("kaldi")
    keys = [
        "ann/a.wav",
        "ann/a.flac",
        "ann/long%20talk.wav@1.5",
        "ann/long%20talk.wav@10.1",
        "b%40c/50%25.wav",
        "böb%09x/1.wav",
    ]
    read = dict(kaldiio.load_ark(str(out / "embeddings.ark")))
    assert list(read) == keys
    assert np.stack(list(read.values())).tobytes() == MATRIX.tobytes()
    by_script = kaldiio.load_scp(str(out / "embeddings.scp"))
    assert all(by_script[key].tobytes() == row.tobytes() for key, row in zip(keys, MATRIX, strict=True))
    speakers = dict(line.split() for line in (out / "utt2spk").read_text().splitlines())
    assert speakers == dict(zip(keys[:4] + keys[5:], ["ann", "ann", "ann%20b", "ann%20b", "böb"], strict=True))
    assert (out / "segments").read_text().splitlines()[2] == "ann/long%20talk.wav@1.5 ann/long%20talk.wav 1.5 3.75"
    recordings = dict(line.split(maxsplit=1) for line in (out / "wav.scp").read_text().splitlines())
    assert recordings["ann/long%20talk.wav"] == "/data/odd/ann/long talk.wav"


def test_csv_by_pandas(export: Callable[[str], Path]) -> None:
    frame = pandas.read_csv(export("csv") / "embeddings.csv")
    matrix = np.array([[np.float32(word) for word in row.strip("[]").split(",")] for row in frame["embedding"]])
    assert matrix.astype(np.float32).tobytes() == MATRIX.tobytes()
    assert frame["path"].to_list() == [one.path for one in ENTRIES[:6]]


def test_pickles_are_as_documented(export: Callable[[str], Path]) -> None:
    out = export("pkl")
    assert names(out / "odd") == sorted(
        [
            "ann/a.flac.pkl",
            "ann/a.wav.pkl",
            "ann/long talk.wav@1.5.pkl",
            "ann/long talk.wav@10.1.pkl",
            "b@c/50%25.pkl",
            "böb\tx/1.pkl",
            "extraction_stats.json",
        ]
    )
    found: dict[str, Any] = pickle.loads((out / "odd" / "ann" / "long talk.wav@1.5.pkl").read_bytes())
    vector = found.pop("embedding")
    assert vector.dtype == np.float32
    assert vector.tobytes() == MATRIX[2].tobytes()
    assert {name: found[name] for name in found if name != "embedding_stats"} == {
        "dataset": "odd",
        "speaker_id": "ann b",
        "utterance_id": "ann/long%20talk.wav@1.5",
        "original_path": "/data/odd/ann/long talk.wav",
        "start": 1.5,
        "duration": 2.25,
        "position": 2,
        "model": "wide v2",
        "embedding_dim": DIM,
    }
    assert set(found["embedding_stats"]) == {"mean", "std", "min", "max"}
    stats = json.loads((out / "odd" / "extraction_stats.json").read_text())
    assert {name: stats[name] for name in ("total_files", "successful", "failed", "skipped", "pending")} == {
        "total_files": 7,
        "successful": 6,
        "failed": 0,
        "skipped": 0,
        "pending": 1,
    }
    assert (stats["model"], stats["embedding_dim"], stats["root"]) == ("wide v2", DIM, "/data/odd")


@pytest.mark.parametrize("form", ["npz", "parquet", "csv", "kaldi", "pkl"])
def test_a_killed_export_leaves_no_name_and_the_next_one_starts_over(
    export: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str
) -> None:
    def stop(_point: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(faults, "reach", stop)
        with pytest.raises(AssertionError):
            export(form)
    left = names(tmp_path / "out")
    whole = {"npz": "embeddings.npz", "parquet": "embeddings.parquet", "csv": "embeddings.csv"}
    assert whole.get(form, "embeddings.ark" if form == "kaldi" else "odd/extraction_stats.json") not in left
    assert not [name for name in left if name.endswith(".part")]
    again = names(export(form))
    assert whole.get(form, "embeddings.ark" if form == "kaldi" else "odd/extraction_stats.json") in again


def test_two_exports_at_once_into_one_folder(export: Callable[[str], Path], cli: Cli) -> None:
    out = export("npz")
    with (out / ".embstore-export.json").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = cli("export", "embeddings", str(out))
        assert result.exit_code == 2
        assert "another export is writing into" in result.stderr
    assert (out / "embeddings.npz").exists()


def test_nothing_to_export_says_what_to_type(odd: Database, cli: Cli, tmp_path: Path) -> None:
    assert "did you mean 'odd'" in cli("export", "embeddings", str(tmp_path), "--dataset", "od").stderr
    result = cli("export", "boundaries", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert result.stderr == "error: there is no finished boundary run: type 'embstore boundaries' first\n"
    assert "no finished boundary run 7" in cli("export", "boundaries", str(tmp_path / "out"), "--run", "7").stderr
    assert not (tmp_path / "out").exists()


def test_boundaries_by_pandas_numpy_and_kaldiio(database: Database, cli: Cli, tmp_path: Path) -> None:
    matrix = synthetic(np.random.default_rng(0), [30, 40, 30])
    with database.begin() as connection:
        queue = fill(connection, len(matrix), model=Facts(dim=matrix.shape[1]))
        token = take_lease(connection)
        vectors.write(connection, queue, token, queue.claim(connection, token, 200), matrix)
    assert cli("boundaries").exit_code == 0
    for form in ("csv", "npz", "parquet", "kaldi", "pkl"):
        result = cli("export", "boundaries", str(tmp_path), "--format", form)
        assert result.exit_code == 0, result.output
    frame = pandas.read_csv(tmp_path / "boundaries.csv")
    assert frame["position"][frame["confidence"].notna()].to_list() == [30, 70]
    assert frame["segment"].to_list() == [1] * 30 + [2] * 40 + [3] * 30
    parquet = pandas.read_parquet(tmp_path / "boundaries.parquet")
    numpy = np.load(tmp_path / "boundaries.npz")
    assert parquet["score"].to_numpy().tobytes() == numpy["score"].tobytes()
    pickled = pickle.loads((tmp_path / "calls" / "boundaries.pkl").read_bytes())
    assert pickled["score"].tobytes() == numpy["score"].tobytes()
    assert pickled["run"]["method"] == "auto"
    read = dict(kaldiio.load_ark(str(tmp_path / "boundaries.ark")))
    assert [key for key, values in read.items() if len(values) == 2] == ["0030.wav", "0070.wav"]
    labels = (tmp_path / "boundaries.utt2spk").read_text().splitlines()
    assert (labels[0], labels[99]) == ("0000.wav speaker_001", "0099.wav speaker_003")
