"""Pictures, broken ones among them, killed and continued: all accounted for, and the same vectors with any workers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from audit import audit
from commands import PATIENCE, Command, Start, Watcher
from pictures import write_pictures

COUNT = 400

Runs = list[Command]
Vectors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder of pictures, and why some of them fail."""
    folder = tmp_path_factory.mktemp("pictures") / "photos"
    expected = write_pictures(folder, COUNT, broken=True)
    return folder, {path: wrong for path, wrong in expected.items() if wrong}


@pytest.fixture(scope="module")
def alone(photos: tuple[Path, dict[str, str]]) -> Vectors:
    """The vectors, by the model alone."""
    from embstore.models.statistical_image import recipe

    folder, refused = photos
    model = recipe({}).load("cpu")
    paths = [path for path in sorted(folder.rglob("*.*")) if path.relative_to(folder).as_posix() not in refused]
    rows = model.embed([model.prepare(path, None, None) for path in paths])
    return {path.relative_to(folder).as_posix(): row for path, row in zip(paths, rows, strict=True)}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_killed_and_continued(
    workers: int, start: Start, photos: tuple[Path, dict[str, str]], alone: Vectors, watcher: Watcher, runs: Runs
) -> None:
    folder, refused = photos
    words = ("extract", str(folder), "--media", "image", "--workers", str(workers))
    watcher.hold_back(COUNT // 2)
    first = start(*words)
    watcher.wait_for_done(1)
    first.kill_group()
    first.process.wait()
    watcher.let_leases_run_out()
    watcher.hold_back(1)
    done = watcher.count("done")
    second = start(*words)
    watcher.wait_for_done(done + 1)
    second.workers()[-1].kill()
    watcher.let_go()
    assert second.wait() == 1
    watcher.let_leases_run_out()  # had it been killed before it could tell the number of its own
    check(watcher, runs, alone, refused)


def test_timeout_in_a_loop_ends_with_everything_embedded(
    start: Start, photos: tuple[Path, dict[str, str]], alone: Vectors, watcher: Watcher, runs: Runs
) -> None:
    folder, refused = photos
    words = (sys.executable, "-m", "embstore", "extract", str(folder), "--media", "image", "--tune", "decoders=1")
    watcher.hold_back(1)
    seconds, codes = 1.0, [124]
    while codes[-1] == 124:
        codes.append(start("timeout", f"{seconds}s", *words, EMBSTORE_TEST_WISH_SECONDS=PATIENCE).wait())
        watcher.let_leases_run_out()  # of those that were killed while they were loading
        watcher.let_go()
        audit(watcher, runs)
        assert watcher.refused().items() <= refused.items()
        seconds *= 1.5  # a busy machine may take that long to begin
    assert codes[-1] == 1  # some pictures are broken
    assert codes.count(124) > 1
    check(watcher, runs, alone, refused)


def check(watcher: Watcher, runs: Runs, alone: Vectors, refused: dict[str, str]) -> None:
    assert audit(watcher, runs, expected=alone) == {"done": COUNT - len(refused), "failed": len(refused)}
    assert watcher.refused() == refused
