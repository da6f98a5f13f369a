"""The main job's benchmarks run from start to end at a tiny size, so that they don't rot; no figure is looked at."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import open_folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "centroids": ["--items", "2000", "--rounds", "1", "--speakers", "20"],
    "claim": ["--items", "2000", "--rounds", "2"],
    "extract": ["--items", "6", "--rounds", "1"],
    "images": ["--items", "12", "--rounds", "1", "--width", "200"],
    "register": ["--items", "3000", "--rounds", "1"],
    "sharing": ["--items", "2000", "--rounds", "1"],
    "search": ["--items", "3000", "--rounds", "1", "--queries", "3", "--part", "filters"],
    "startup": ["--rounds", "1"],
    "transfer": ["--items", "1000", "--rounds", "1"],
    "write": ["--items", "600", "--rounds", "2"],
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that the server's account may enter."""
    with open_folder() as folder:
        yield folder


def run(name: str, *more: str) -> str:
    result = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", *SMALL[name], *more], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_make_bench_runs_scripts_that_are_there() -> None:
    shown = subprocess.run(
        ["make", "--dry-run", "bench"], cwd=BENCHMARKS.parent, capture_output=True, text=True, check=True
    )
    named = re.findall(r"benchmarks/\w+\.py", shown.stdout)
    assert len(named) > 5
    assert all((BENCHMARKS.parent / name).is_file() for name in named)


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"extract"}))
def test_a_benchmark_prints_its_ratio(name: str) -> None:
    assert "(target: " in run(name)


def test_the_scale_benchmark_prints_exponents_and_goes_on_where_it_was(folder: Path) -> None:
    words = [sys.executable, BENCHMARKS / "scale.py", "--sizes", "1000", "2000", "--folder", folder]
    stopped = subprocess.run([*words, "--seconds", "0"], capture_output=True, text=True, check=False)
    assert stopped.returncode == 75, stopped.stderr
    assert "1,000 items: register is measured" in stopped.stdout
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "exponents: register " in result.stdout


def start(name: str, *words: str | Path) -> str:
    """The output of a benchmark that is measured in a way of its own."""
    command = [sys.executable, BENCHMARKS / f"{name}.py", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_boundaries_beside_ruptures() -> None:
    lines = start("boundaries", "--items", "300", "--segment", "60", "--ruptures", "300").splitlines()
    assert [line.split()[0] for line in lines] == ["auto", "cosine", "KernelCPD", "Pelt"]
    assert all(line.endswith(" 0 wrong") for line in lines[:2])


def test_boundaries_beside_the_bare_read() -> None:
    output = start("boundary_command", "--items", "600", "--rounds", "1", "--methods", "cosine")
    assert "cosine / bare: " in output
    assert "exponents: bare " in output


def test_the_accuracy_of_boundaries(test_data: Path, tmp_path: Path) -> None:
    """From recordings to the table: the two speakers of digits, whose 40 files are short."""
    source = "free-spoken-digits"
    shutil.copytree(test_data / "speech" / source, tmp_path / source)
    file = tmp_path / "kept.npz"
    words = [tmp_path, "--embeddings", file, "--sets", "1", "--kinds", "digits/30/", "digits/60~", "digits/500/"]
    lines = start("boundary_accuracy", *words).splitlines()[2:]
    assert [line[36:42].strip() for line in lines] == ["auto", "auto", "cosine", "gmm", "auto"]
    assert "false boundaries in" in lines[-1]
    assert len(lines[0].split()) == 4 + 9
    kept = start("boundary_accuracy", "nowhere", "--embeddings", file, "--sets", "1", "--kinds", "digits/30/")
    assert kept.splitlines()[2:] == lines[:1]


def test_the_endurance_benchmark_compares_before_and_after(folder: Path) -> None:
    words = [sys.executable, BENCHMARKS / "endurance.py", "--minutes", "4", "--minute", "0.1", "--items", "40"]
    words += ["--figures", folder / "figures.csv"]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "(target: " in result.stdout
    assert len((folder / "figures.csv").read_text().splitlines()) == 5


def test_the_benchmark_for_gpus_runs_on_a_processor() -> None:
    """Every way that it measures; on a GPU it runs in the same way."""
    words = [sys.executable, BENCHMARKS / "gpu_extract.py", "--miniature", "--device", "cpu"]
    result = subprocess.run([*words, "--networks", "ResNet34"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    _, _, part = result.stdout.partition("ResNet34, 1 to 15 s\n")
    lines = part.split("\n\n")[0].splitlines()
    ways = ["one by one", "bare", "embed", "decoded", "files", "extract"]
    assert [line.split(",")[0].strip() for line in lines] == ways
    assert "masked" in lines[1]


def test_the_benchmark_of_wespeaker_runs_without_the_package(test_data: Path) -> None:
    model = test_data / "wespeaker-golden" / "model" / "model.onnx"
    words = [sys.executable, BENCHMARKS / "wespeaker_cpu.py", model, "--without-package"]
    words += ["--items", "4", "--rounds", "1", "--data", test_data / "speech"]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "two workers' speed / one's: " in result.stdout


def test_the_extraction_benchmark_prints_its_ratio(test_data: Path) -> None:
    assert "end-to-end speed" in run("extract", "--data", str(test_data / "speech"))
