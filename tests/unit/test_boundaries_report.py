"""The picture, the JSON and the folders; and that no folder of somebody else's is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ordered_sets import synthetic, windows

from embstore.boundaries import changepoint, similarity
from embstore.boundaries.report import PICTURE, SUMMARY, draw, envelope, segments, write
from embstore.boundaries.result import Boundary, Result
from embstore.errors import UsageError

NAMES = {"dataset": "calls", "model": "resemblyzer"}


def _result(*places: int, items: int = 6) -> Result:
    positions = np.arange(items)
    scores = np.zeros(items, np.float32)
    return Result([Boundary(p, 0.5, 0.25) for p in places], positions, scores, "auto", {"beta": 1.5})


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[int, Path]]:
    """Six files; the last two of different folders have the same name."""
    names = ["a/1.wav", "a/2.wav", "a/3.wav", "a/4.wav", "a/5.wav", "b/5.wav"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return [(position, tmp_path / name) for position, name in enumerate(names)]


def _tree(folder: Path) -> dict[str, list[str]]:
    return {
        path.name: sorted(entry.name for entry in path.iterdir() if entry.name != ".embstore")
        for path in sorted(folder.glob("speaker_*"))
        if path.is_dir()
    }


@pytest.mark.parametrize("copy", [False, True])
def test_folders(tmp_path: Path, files: list[tuple[int, Path]], copy: bool) -> None:
    out = tmp_path / "out"
    assert write(out, _result(2, 4), 6, files, **NAMES, copy=copy) == []
    assert _tree(out) == {
        "speaker_001": ["1.wav", "2.wav"],
        "speaker_002": ["3.wav", "4.wav"],
        "speaker_003": ["5.5.wav", "5.wav"],
    }
    assert (out / "speaker_003" / "5.5.wav").read_bytes() == b"b/5.wav"
    assert (out / "speaker_001" / "1.wav").is_symlink() is not copy
    assert (out / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_the_json_says_what_the_docstring_says(tmp_path: Path, files: list[tuple[int, Path]]) -> None:
    files[1][1].unlink()
    missing = write(tmp_path / "out", _result(2), 6, files, **NAMES)
    content = json.loads((tmp_path / "out" / SUMMARY).read_text(encoding="utf-8"))
    assert content == {
        "version": 1,
        "dataset": "calls",
        "model": "resemblyzer",
        "method": "auto",
        "parameters": {"beta": 1.5},
        "total_items": 6,
        "boundaries": [{"position": 2, "score": 0.5, "confidence": 0.25}],
        "segments": [
            {"speaker": "speaker_001", "begin": 0, "end": 2, "items": 2},
            {"speaker": "speaker_002", "begin": 2, "end": 6, "items": 4},
        ],
        "expected": [],
        "notes": [],
        "missing": [str(files[1][1])],
    }
    assert missing == [files[1][1]]


@pytest.mark.parametrize("method", [changepoint, similarity])
def test_what_the_methods_return_fits_into_json(tmp_path: Path, method: object) -> None:
    vectors = synthetic(np.random.default_rng(0), [40, 40])
    result = method.detect(windows(vectors), 80)  # type: ignore[attr-defined]
    write(tmp_path / "out", result, 80, [], **NAMES)
    assert json.loads((tmp_path / "out" / SUMMARY).read_text(encoding="utf-8"))["parameters"] == result.parameters


def test_a_second_run_replaces_the_first(tmp_path: Path, files: list[tuple[int, Path]]) -> None:
    out = tmp_path / "out"
    write(out, _result(1, 2, 3, 4, 5), 6, files, **NAMES)
    write(out, _result(3), 6, files, **NAMES, copy=True)
    assert _tree(out) == {"speaker_001": ["1.wav", "2.wav", "3.wav"], "speaker_002": ["4.wav", "5.5.wav", "5.wav"]}
    assert all(path.is_file() for _, path in files)


def test_folders_of_others_are_left_alone(tmp_path: Path, files: list[tuple[int, Path]]) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "speaker_001").mkdir(parents=True)
    (theirs / "speaker_001" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="embstore did not make the folder"):
        write(theirs, _result(3), 6, files, **NAMES)
    assert [path.name for path in theirs.rglob("*")] == ["speaker_001", "notes.txt"]


def test_what_others_put_into_its_folders_is_left_alone(tmp_path: Path, files: list[tuple[int, Path]]) -> None:
    out = tmp_path / "out"
    write(out, _result(3), 6, files, **NAMES)
    (out / "speaker_002" / "notes.txt").write_text("mine")
    before = _tree(out)
    with pytest.raises(UsageError, match=r"holds 'notes\.txt', which embstore did not put there"):
        write(out, _result(2, 4), 6, files, **NAMES)
    assert _tree(out) == before
    (out / "speaker_002" / "notes.txt").unlink()
    (out / "speaker_009").mkdir()
    with pytest.raises(UsageError, match=r"embstore did not make the folder '.*speaker_009'"):
        write(out, _result(2, 4), 6, files, **NAMES)
    assert (out / "speaker_001" / "1.wav").is_symlink()


def test_a_link_instead_of_a_folder_is_refused(tmp_path: Path, files: list[tuple[int, Path]]) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(UsageError, match="not a folder of its own"):
        write(tmp_path / "link", _result(3), 6, files, **NAMES)


def test_a_file_with_many_items_is_linked_once(tmp_path: Path, files: list[tuple[int, Path]]) -> None:
    same = [(position, files[0][1]) for position in range(6)]
    write(tmp_path / "out", _result(4), 6, same, **NAMES)
    assert _tree(tmp_path / "out") == {"speaker_001": ["1.wav"], "speaker_002": ["1.wav"]}


@pytest.mark.parametrize(("items", "every"), [(0, 1), (1, 1), (2000, 200), (100_000, 10)])
def test_pictures_of_all_sizes(tmp_path: Path, items: int, every: int) -> None:
    result = _result(*range(every, items, every), items=items)
    result.expected[:] = range(every, items, every)
    draw(result, items, tmp_path / "p.png", title="calls")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_the_envelope_hides_no_dip() -> None:
    result = _result(items=100_000)
    result.scores[54_321] = 0.9
    positions, low, mean = envelope(result)
    assert len(positions) <= 1500
    assert low.min() == pytest.approx(0.1)
    assert mean.min() > 0.9


def test_segments_cover_all_items() -> None:
    assert segments(_result(2, 4), 9) == [(0, 2), (2, 4), (4, 9)]
    assert segments(_result(), 9) == [(0, 9)]
    assert segments(_result(items=0), 0) == []


def test_importing_it_is_light() -> None:
    heavy = "sklearn", "matplotlib", "torch", "ruptures"
    code = f"""
import sys
from embstore.boundaries import changepoint, evaluate, mixture, report, similarity, voices
assert not set({heavy}) & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
