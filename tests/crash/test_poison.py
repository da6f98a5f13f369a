"""Files and models that go wrong in every way: exactly they are to blame, and everything else gets done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from audit import audit
from commands import PATIENCE, Command, Start, Watcher, write_tone, write_tones

Runs = list[Command]
GOOD = 60


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A folder of sound in which nothing is wrong."""
    folder = tmp_path / "sound"
    write_tones(folder, GOOD)
    return folder


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("poison-abort", "worker_died"),
        ("poison-segv", "worker_died"),
        ("poison-hang", "worker_died"),
        ("poison-raise", "model_error"),
        ("poison-oom", "out_of_memory"),
        ("poison-panic", "model_error"),
        ("decoder-panic", "decode_error"),
        ("poison-nan", "not_finite"),
        ("poison-zero", "zero_vector"),
    ],
)
def test_exactly_the_bad_files_fail(
    name: str, code: str, start: Start, sound: Path, watcher: Watcher, runs: Runs
) -> None:
    bad = [write_tone(sound / f"speaker-{i}" / f"{name}.wav", 100 + i).relative_to(sound) for i in (3, 7)]
    hangs = {"EMBSTORE_TEST_STUCK_SECONDS": 2} if name == "poison-hang" else {}
    run = start("extract", str(sound), "--model", "probe", "--workers", "2", PROBE_SLEEP=0.005, **hangs)
    assert run.wait() == 1, run.err
    assert watcher.refused() == {str(path): code for path in bad}
    assert audit(watcher, runs) == {"done": GOOD, "failed": 2}
    assert f"failed   2 ({code} 2)" in run.out
    assert f"{GOOD} done + 2 failed + 0 skipped + 0 running + 0 pending" in run.out


def test_a_handful_of_killers_in_a_row_do_not_stop_the_run(
    start: Start, sound: Path, watcher: Watcher, runs: Runs
) -> None:
    for number in range(6):
        write_tone(sound / "speaker-4" / f"poison-segv-{number}.wav", 200 + number)
    assert start("extract", str(sound), "--model", "probe").wait() == 1
    assert set(watcher.refused().values()) == {"worker_died"}
    assert audit(watcher, runs) == {"done": GOOD, "failed": 6}


def test_the_reason_of_a_failure_is_one_line(start: Start, sound: Path, watcher: Watcher) -> None:
    write_tone(sound / "poison-raise.wav", 1)
    assert start("extract", str(sound), "--model", "probe").wait() == 1
    assert watcher.rows("SELECT error FROM failures") == [("ValueError: two lines of",)]


@pytest.mark.parametrize("decoding", [0, 0.05])
def test_a_model_that_fails_on_everything_is_to_blame_itself(
    decoding: float, start: Start, sound: Path, watcher: Watcher, runs: Runs
) -> None:
    """Also where items come one by one, as decoding is slower than the device."""
    words = ("extract", str(sound), "--model", "probe", "--workers", "2")
    run = start(*words, PROBE_BROKEN="always", PROBE_DECODE=decoding, EMBSTORE_TEST_DOUBT_SECONDS=PATIENCE)
    assert run.wait() == 4
    (line,) = [line for line in run.err.splitlines() if line.startswith("error:")]
    assert "no item is to blame: RuntimeError: the device has fallen off the bus" in line
    assert audit(watcher, runs) == {"pending": GOOD}
    assert set(watcher.rows("SELECT attempts FROM embstore.extraction")) == {(0,)}
    assert start("extract").wait() == 0
    assert audit(watcher, runs) == {"done": GOOD}


@pytest.mark.parametrize("decoding", [0, 0.05])
def test_a_device_that_breaks_in_the_middle_is_no_items_fault(
    decoding: float, start: Start, sound: Path, watcher: Watcher, runs: Runs
) -> None:
    switch = sound.parent / "broken"
    env = {"PROBE_BROKEN": switch, "PROBE_DECODE": decoding, "PROBE_SLEEP": 0.05}
    watcher.hold_back(20)
    run = start("extract", str(sound), "--model", "probe", **env)
    watcher.wait_for_done(10)
    switch.touch()
    watcher.let_go()
    assert run.wait() == 4
    statuses = audit(watcher, runs)
    assert statuses == {"done": statuses["done"], "pending": GOOD - statuses["done"]}
    switch.unlink()
    assert start("extract").wait() == 0
    assert audit(watcher, runs) == {"done": GOOD}


def test_a_bad_file_does_not_move_its_neighbours(start: Start, sound: Path, watcher: Watcher, runs: Runs) -> None:
    words = ("extract", str(sound), "--model", "probe")
    assert start(*words, "--dataset", "clean").wait() == 0
    for kind in ("raise", "nan", "zero"):
        write_tone(sound / "speaker-0" / f"poison-{kind}.wav", 300)
    assert start(*words, "--dataset", "poisoned").wait() == 1
    ((worst, pairs),) = watcher.rows(
        "SELECT max(a.embedding <-> b.embedding), count(*) FROM embeddings_probe a JOIN embeddings_probe b USING (path)"
        " WHERE a.dataset = 'clean' AND b.dataset = 'poisoned'"
    )
    assert pairs == GOOD
    assert np.float64(worst) <= 1e-5
