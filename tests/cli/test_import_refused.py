"""Malicious and damaged imports: one clear line that names file and row, exit code 2, and a database as it was."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from click.testing import Result
from helpers import ask, vectors_of

from embstore.db.engine import Database

Cli = Callable[..., Result]

FLAGS = ("--dataset", "calls", "--model", "x", "--root", "/data/calls")
COUNTS = """
SELECT (SELECT count(*) FROM embstore.dataset), (SELECT count(*) FROM embstore.model),
    (SELECT count(*) FROM embstore.item), (SELECT count(*) FROM embstore.extraction),
    (SELECT count(*) FROM embstore.embedding), (SELECT count(*) FROM embstore.run)
"""
GOOD = vectors_of(4)
PATHS = ["a.wav", "b.wav", "c.wav", "d.wav"]


@pytest.fixture
def refused(cli: Cli, database: Database) -> Callable[..., str]:
    """Import what has to be refused; what was said."""

    def run(path: Path, *flags: str) -> str:
        result = cli("import", "embeddings", str(path), *FLAGS, *flags)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert ask(database, COUNTS) == [(0,) * 6]
        return result.stderr

    return run


Refused = Callable[..., str]


def write(path: Path, matrix: Any, paths: Any = PATHS, **more: Any) -> Path:
    """One table in the format that the name says."""
    if path.suffix == ".npz":
        np.savez(path, embedding=matrix, path=np.array(paths), **more)
    elif path.suffix == ".parquet":
        columns = {"path": pyarrow.array(paths, pyarrow.string()), "embedding": pyarrow.array(list(map(list, matrix)))}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    elif path.suffix == ".csv":
        rows = (f'"{name}","[{",".join(map(str, row))}]"' for name, row in zip(paths, matrix, strict=True))
        path.write_text("path,embedding\n" + "\n".join(rows) + "\n")
    elif path.suffix == ".ark":
        entries = (
            name.encode() + b" \0BFV \4" + struct.pack("<i", len(row)) + np.asarray(row, "<f4").tobytes()
            for name, row in zip(paths, matrix, strict=True)
        )
        path.write_bytes(b"".join(entries))
    else:
        path.mkdir()
        for number, (name, row) in enumerate(zip(paths, matrix, strict=True)):
            value = {"embedding": np.asarray(row, dtype=np.float32), "original_path": name}
            (path / f"{number}.pkl").write_bytes(pickle.dumps(value))
    return path


ENDINGS = ["t.npz", "t.parquet", "t.csv", "t.ark", "t"]
ROW_3 = {
    "t.npz": "'t.npz' row 3",
    "t.parquet": "'t.parquet' row 3",
    "t.csv": "'t.csv' line 4",
    "t.ark": "'t.ark' entry",
    "t": "'2.pkl'",
}


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0])
def test_a_vector_that_is_not_finite_or_zero(refused: Refused, tmp_path: Path, name: str, bad: float) -> None:
    matrix = GOOD.copy()
    matrix[2] = bad
    said = refused(write(tmp_path / name, matrix))
    assert f"{ROW_3[name]}" in said
    assert "the vector is zero, or holds NaN or infinity; nothing was imported" in said


@pytest.mark.parametrize("name", ENDINGS[1:])
def test_a_vector_of_another_length(refused: Refused, tmp_path: Path, name: str) -> None:
    said = refused(write(tmp_path / name, [*GOOD[:2], GOOD[2, :2], GOOD[3]]))
    assert f"{ROW_3[name]}" in said
    assert "3" in said


def test_vectors_of_another_length_than_the_models(cli: Cli, database: Database, tmp_path: Path) -> None:
    assert cli("import", "embeddings", str(write(tmp_path / "a.npz", GOOD)), *FLAGS).exit_code == 0
    result = cli("import", "embeddings", str(write(tmp_path / "b.npz", vectors_of(4, 5))), *FLAGS)
    assert result.exit_code == 2
    words = "the vectors have 5 values, those of model 'x' have 3: give --model another name"
    assert result.stderr == f"error: {words}\n"


def test_a_vector_that_pgvector_cannot_store(refused: Refused, tmp_path: Path) -> None:
    assert "up to 16,000" in refused(write(tmp_path / "a.npz", np.ones((1, 16_001), np.float32), ["a.wav"]))


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("path", ["../up.wav", "x/../../up.wav", "/etc/passwd", "/data/calls/../x", ""])
def test_a_path_that_leads_elsewhere(refused: Refused, tmp_path: Path, name: str, path: str) -> None:
    if name in ("t.ark", "t") and not path:
        pytest.skip("has no empty names")
    said = refused(write(tmp_path / name, GOOD, ["a.wav", "b.wav", path, "d.wav"]))
    assert f"{ROW_3[name]}" in said
    assert "does not lie under '/data/calls'" in said or (not path and "path is" in said)


def test_names_that_the_database_cannot_hold(refused: Refused, tmp_path: Path) -> None:
    frame = {"path": ["a\0b", "c"], "speaker": ["x", "y" * 3000], "embedding": GOOD[:2].tolist()}
    pyarrow.parquet.write_table(pyarrow.table(frame), tmp_path / "t.parquet")
    said = refused(tmp_path / "t.parquet")
    assert "row 1: the path 'a\\x00b' holds a NUL character (and 1 more)" in said


@pytest.mark.parametrize("name", ENDINGS)
def test_an_item_that_is_named_twice(refused: Refused, tmp_path: Path, name: str) -> None:
    said = refused(write(tmp_path / name, GOOD, ["a.wav", "b.wav", "./a.wav", "d.wav"]))
    assert f"{ROW_3[name]}" in said
    assert "'a.wav' stands there twice, the first time in" in said


def test_bad_rows_are_left_out_if_that_is_wanted(cli: Cli, database: Database, tmp_path: Path) -> None:
    matrix = vectors_of(40)
    matrix[5:35] = np.nan
    path = write(tmp_path / "t.npz", matrix, [f"{i}.wav" for i in range(40)])
    result = cli("import", "embeddings", str(path), *FLAGS)
    assert result.exit_code == 2
    assert "'t.npz' row 6: the vector is zero, or holds NaN or infinity (and at least 19 more)" in result.stderr
    result = cli("import", "embeddings", str(path), *FLAGS, "--skip-bad")
    assert result.exit_code == 1
    assert "left out: 't.npz' row 6: the vector is zero, or holds NaN or infinity\n" in result.stderr
    assert "… and 20 more\n" in result.stderr
    assert "  imported     10\n" in result.stdout
    assert "  left out     30\n" in result.stdout
    assert ask(database, "SELECT array_agg(position ORDER BY position) FROM embstore.item") == [(list(range(10)),)]


# Damage


@pytest.mark.parametrize("name", ENDINGS)
def test_a_file_that_is_cut_off_anywhere(cli: Cli, database: Database, tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, GOOD)
    target = path / "2.pkl" if path.is_dir() else path
    data = target.read_bytes()
    for keep in sorted({0, 1, 10, *range(len(data) // 6, len(data) - 1, len(data) // 6), len(data) - 2}):
        if name == "t.csv" and b"\n" in data[keep - 1 : keep + 1]:  # between two rows
            continue
        target.write_bytes(data[:keep])
        result = cli("import", "embeddings", str(path), *FLAGS)
        assert result.exit_code == 2, (keep, result.output)
        assert result.stderr.count("\n") == 1
        assert path.name in result.stderr or "2.pkl" in result.stderr
    assert ask(database, COUNTS) == [(0,) * 6]


@pytest.mark.parametrize("form", ["csv", "kaldi", "pkl"])
def test_an_export_that_lacks_its_last_row(odd: Database, cli: Cli, tmp_path: Path, form: str) -> None:
    assert cli("export", "embeddings", str(tmp_path), "--format", form).exit_code == 0
    if form == "csv":
        path = tmp_path / "embeddings.csv"
        path.write_text("".join(path.read_text().splitlines(True)[:-1]))
    elif form == "kaldi":
        path = tmp_path / "embeddings.ark"
        path.write_bytes(path.read_bytes()[: path.read_bytes().rindex("böb".encode())])
    else:
        next((tmp_path / "odd" / "ann").glob("*.pkl")).unlink()
    result = cli("import", "embeddings", str(tmp_path), "--dataset", "other", "--root", "/data/odd")
    assert result.exit_code == 2
    assert (
        "the file says that it has 6 vectors, and holds 5: it is not whole, and nothing was imported" in result.stderr
    )
    assert ask(odd, "SELECT name FROM embstore.dataset") == [("odd",)]
    result = cli("import", "embeddings", str(tmp_path), "--dataset", "other", "--root", "/data/odd", "--skip-bad")
    assert "  imported     5\n" in result.stdout


@pytest.mark.parametrize("name", ["t.npz", "t.parquet"])
def test_a_bit_that_has_changed(refused: Refused, tmp_path: Path, name: str) -> None:
    matrix = vectors_of(500, 32)
    path = tmp_path / name
    if name == "t.npz":
        np.savez(path, embedding=matrix, path=np.array([f"{i}.wav" for i in range(500)]))
    else:
        table = pyarrow.table({"path": [f"{i}.wav" for i in range(500)], "embedding": matrix.tolist()})
        pyarrow.parquet.write_table(table, path, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    assert "damaged" in refused(path)


def test_what_is_no_table_at_all(refused: Refused, tmp_path: Path) -> None:
    for name in ("t.npz", "t.parquet", "t.ark", "t.scp", "t.csv"):
        (tmp_path / name).write_bytes(os.urandom(3000))
        assert name in refused(tmp_path / name)
    (tmp_path / "t.bin").write_bytes(b"")
    assert "is none of .parquet" in refused(tmp_path / "t.bin")
    assert "there is no" in refused(tmp_path / "missing.npz")
    (tmp_path / "empty").mkdir()
    assert "holds no embeddings" in refused(tmp_path / "empty")
    assert "has no array 'embedding'; it has 'x', 'path'" in refused(
        write_npz(tmp_path / "x.npz", x=GOOD, path=np.array(PATHS))
    )


def write_npz(file: Path, /, **arrays: Any) -> Path:
    np.savez(file, **arrays)
    return file


def test_arrays_that_do_not_fit_each_other(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    names = np.array(PATHS)
    assert "different lengths" in refused(write_npz(path, embedding=GOOD, path=names[:3]))
    assert "cannot be embedding" in refused(write_npz(path, embedding=GOOD[0], path=names))
    assert "cannot be embedding" in refused(write_npz(path, embedding=GOOD.astype(int), path=names))
    assert "by columns" in refused(write_npz(path, embedding=np.asfortranarray(GOOD), path=names))
    assert "cannot be embedding" in refused(write_npz(path, embedding=GOOD[:, :0], path=names))


# Malice


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_pickles_with_code(refused: Refused, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    tree = write(tmp_path / "t", GOOD)
    (tree / "2.pkl").write_bytes(pickle.dumps({"embedding": GOOD[2], "x": Runs(mark)}))
    said = refused(tree)
    assert said.startswith("error: '2.pkl': it holds posix.system, which is neither an array nor built in;")
    np.savez(tmp_path / "t.npz", embedding=GOOD, path=np.array([Runs(mark)] * 4, dtype=object))
    assert "array 'path' holds Python objects, which could run code: refused" in refused(tmp_path / "t.npz")
    assert not mark.exists()


def test_a_script_file_with_commands_or_files_elsewhere(refused: Refused, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for text in (f"utt1 touch {mark} |\n", f"utt1 | touch {mark}\n"):
        (tmp_path / "t.scp").write_text(text)
        assert "line 1 is a command, and embstore runs none from data" in refused(tmp_path / "t.scp")
    (tmp_path / "t.scp").write_text("utt1 /etc/passwd\n")
    assert "line 1 is not KEY FILE.ark:OFFSET" in refused(tmp_path / "t.scp")
    (tmp_path / "t.scp").write_text("utt1 /etc/passwd:0\n")
    assert "is no vector" in refused(tmp_path / "t.scp")
    assert not mark.exists()


def npy(shape: tuple[int, ...], descr: str) -> bytes:
    """The head of an array that may be as large as it likes."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape!r}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def test_a_small_archive_that_unpacks_to_more_than_there_is_room_for(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"

    def bomb(embedding: bytes, names: bytes) -> Path:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, head in (("embedding", embedding), ("path", names)):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    member.write(head)
                    for _ in range(64):
                        member.write(bytes(1 << 20))
        return path

    rows = 10**9
    assert "vector is zero" in refused(bomb(npy((rows, 256), "<f4"), npy((rows,), "<U5")))
    assert "too wide for a path" in refused(bomb(npy((4, 3), "<f4"), npy((4,), "<U1000000")))
    assert "too wide" in refused(bomb(npy((4, 10**8), "<f4"), npy((4,), "<U5")))
    assert path.stat().st_size < 1 << 20


def test_a_small_parquet_file_that_unpacks_to_a_vector_without_end(refused: Refused, tmp_path: Path) -> None:
    table = pyarrow.table({"path": ["a.wav"], "embedding": [np.zeros(5_000_000, np.float32)]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", compression="zstd")
    assert "holds vectors of more than 16,000 values" in refused(tmp_path / "t.parquet")


def test_links_in_a_tree_are_not_followed(cli: Cli, database: Database, tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere", GOOD, ["e.wav", "f.wav", "g.wav", "h.wav"])
    tree = write(tmp_path / "t", GOOD)
    (tree / "link").symlink_to(elsewhere)
    (tree / "loop").symlink_to(tree)
    result = cli("import", "embeddings", str(tree), *FLAGS)
    assert result.exit_code == 0, result.output
    assert ask(database, "SELECT count(*) FROM embstore.item") == [(4,)]
