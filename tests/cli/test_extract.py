"""`embstore extract` as people type it: what it does, what it says, and how it ends."""

from __future__ import annotations

import csv
import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import PATIENCE, Command, Gate, Start, Watcher, run_in_the_middle, write_tone, write_tones

from embstore.db import embedded

TABLES = ("dataset", "item", "model", "extraction", "run", "lease")


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """Twenty short sounds of ten speakers."""
    write_tones(tmp_path / "sound", 20)
    return tmp_path / "sound"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other accounts may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="embstore-tests-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def error_of(command: Command, code: int) -> str:
    """The one line that a command which failed has said."""
    assert command.wait() == code, command.err
    assert command.out == ""
    (line,) = command.err.splitlines()
    assert line.startswith("error: ")
    return line


def is_empty(watcher: Watcher) -> bool:
    return all(watcher.rows(f"SELECT count(*) FROM embstore.{table}") == [(0,)] for table in TABLES)


def test_real_speech_once_and_nothing_the_second_time(start: Start, watcher: Watcher, test_data: Path) -> None:
    words = ("extract", str(test_data / "speech"), "--model", "statistical", "--workers", "2")
    first = start(*words)
    assert first.wait() == 0
    number = len((test_data / "speech" / "manifest.csv").read_text().splitlines()) - 1
    assert f"dataset 'speech': {number} items" in first.out
    assert f"processed {number} utterances in" in first.out
    assert f"'speech' by statistical: {number} done + 0 failed + 0 skipped + 0 running + 0 pending" in first.out
    before = watcher.rows("SELECT item_id, finished_at FROM embstore.extraction ORDER BY 1")
    second = start(*words)
    assert second.wait() == 0
    assert "(0 new)" in second.out
    assert "nothing to do" in second.out
    assert watcher.rows("SELECT item_id, finished_at FROM embstore.extraction ORDER BY 1") == before


def test_odd_audio_ends_as_its_table_says(start: Start, watcher: Watcher, test_data: Path) -> None:
    folder = test_data / "odd-audio"
    assert start("extract", str(folder)).wait() == 1
    with (folder / "expected.csv").open(newline="") as file:
        expected = {row["path"]: row["expectation"] for row in csv.DictReader(file) if "." in row["path"]}
    found = {
        path: (status, code)
        for path, status, code in watcher.rows(
            "SELECT path, status, error_code FROM embstore.extraction JOIN embstore.item USING (dataset_id, item_id)"
        )
    }
    assert found.keys() == expected.keys()
    for path, expectation in expected.items():
        status, code = found[path]
        assert status in {"ok": ("done", "skipped"), "error": ("failed",)}[expectation], path
        assert (code is None) == (status == "done")
    assert found["UPPER CASE & ünïcode 名.WAV"] == ("done", None)
    assert_sane(watcher)


def assert_sane(watcher: Watcher) -> None:
    """No vector of the store holds NaN or infinity, or is zero."""
    rows = watcher.rows("SELECT embedding::text FROM embstore.embedding")
    vectors = np.array([json.loads(row[0]) for row in rows])
    assert len(vectors)
    assert np.isfinite(vectors).all()
    assert np.linalg.norm(vectors, axis=1).min() > 0


def test_names_with_anything_in_them_survive(start: Start, watcher: Watcher, tmp_path: Path) -> None:
    names = [
        "a b.wav",
        "tab\there.wav",
        "line\nbreak.wav",
        "back\\slash.wav",
        "'quote\".wav",
        "名前/ünï.wav",
        "%s{}.wav",
    ]
    for number, name in enumerate(names):
        write_tone(tmp_path / "odd names" / name, number)
    assert start("extract", "odd names", "--model", "statistical").wait() in (0, 1)
    assert set(watcher.rows("SELECT path, status FROM embstore.extraction JOIN embstore.item USING (item_id)")) == {
        (name, "done") for name in names
    }


def test_dry_run_leaves_nothing(start: Start, sound: Path, watcher: Watcher) -> None:
    run = start("extract", "sound", "--model", "probe", "--dry-run")
    assert run.wait() == 0
    assert "dataset 'sound': 20 items" in run.out
    assert "would embed what is pending of 'sound' by probe on 1 worker" in run.out
    assert is_empty(watcher)
    as_json = start("extract", "sound", "--model", "probe", "--dry-run", "--json")
    assert as_json.wait() == 0
    assert json.loads(as_json.out) == [{"model": "probe", "datasets": ["sound"]}]
    assert is_empty(watcher)


def test_json_adds_up(start: Start, sound: Path) -> None:
    write_tone(sound / "poison-raise.wav", 1)
    (sound / "broken.wav").write_text("no sound")
    run = start("extract", "sound", "--model", "probe", "--workers", "2", "--json")
    assert run.wait() == 1
    (summary,) = json.loads(run.out)
    assert summary["model"] == "probe"
    assert summary["interrupted"] is False
    assert summary["datasets"] == {"sound": {"done": 20, "failed": 2}}
    assert summary["failed"] == {"model_error": 1, "decode_error": 1}
    assert summary["processed"] == summary["embedded"] + 2 == 22
    assert sum(worker["processed"] for worker in summary["workers"]) == 22
    history = start("history")
    assert history.wait() == 0
    assert "2 failed, 20 embedded, 22 processed" in history.out
    assert summary["audio_seconds"] == pytest.approx(20 * 0.2)


@pytest.mark.parametrize(
    ("slow", "bottleneck", "flag"),
    [({"PROBE_SLEEP": 0.1}, "device", "other cores"), ({"PROBE_DECODE": 0.1}, "decoding", "--tune decoders=2")],
)
def test_the_summary_says_what_held_it_up(
    start: Start, sound: Path, slow: dict[str, float], bottleneck: str, flag: str
) -> None:
    words = ("extract", "sound", "--model", "probe", "--tune", "decoders=1", "--tune", "threads=1", "--json")
    for name in "abcdefgh":  # a machine that stalls may hold it up elsewhere, but not each time
        run = start(*words, "--dataset", name, **slow)
        assert run.wait() == 0, run.err
        speed = json.loads(run.out)[0]["speed"]
        waited = speed["workers"][0]["waited"]
        assert sum(waited.values()) == pytest.approx(1, abs=0.001)
        assert waited[speed["bottleneck"]] == max(waited.values())
        if speed["bottleneck"] == bottleneck:
            break
    assert speed["bottleneck"] == bottleneck
    assert speed["advice"] in run.err
    assert "  worker 0 on cpu waited" in run.err
    # A machine with one core has no other to offer.
    assert flag in speed["advice"] or "another machine" in speed["advice"]


def test_without_a_path_it_goes_on_with_what_is_pending(start: Start, sound: Path, watcher: Watcher) -> None:
    nothing = start("extract")
    assert nothing.wait() == 0
    assert nothing.out.startswith("nothing is pending")
    watcher.hold_back(1)
    first = start("extract", "sound", "--model", "probe", PROBE_SLEEP=0.2, PROBE_BATCH=1)
    watcher.wait_for_done(2)
    first.press_ctrl_c()
    assert first.wait() == 130
    assert watcher.count("pending") > 0
    watcher.let_go()
    assert start("extract").wait() == 0
    assert watcher.statuses() == {"done": 20}


def test_a_second_model_for_a_registered_dataset(start: Start, sound: Path, watcher: Watcher) -> None:
    assert start("extract", "sound", "--model", "probe").wait() == 0
    assert start("extract", "--dataset", "sound", "--model", "statistical").wait() == 0
    by_model = (
        "SELECT name, count(*) FROM embstore.embedding JOIN embstore.model USING (model_id) GROUP BY 1 ORDER BY 1"
    )
    assert watcher.rows(by_model) == [("probe", 20), ("statistical", 20)]


def test_a_model_of_another_package_end_to_end(start: Start, sound: Path, watcher: Watcher) -> None:
    assert start("extract", "sound", "--model", "probe").wait() == 0
    assert watcher.rows("SELECT name, dim FROM embstore.model") == [("probe", 16)]
    pairs = watcher.rows("SELECT count(*) FROM embeddings_probe WHERE vector_dims(embedding) = 16")
    assert pairs == [(20,)]


def test_other_weights_under_the_same_name_are_refused(start: Start, sound: Path, watcher: Watcher) -> None:
    assert start("extract", "sound", "--model", "probe").wait() == 0
    before = watcher.rows("SELECT count(*) FROM embstore.item")
    write_tones(sound.parent / "more", 3)
    for words in (("extract", "more", "--model", "probe"), ("extract", "more", "--model", "probe", "--dry-run")):
        assert "model 'probe' here has other weights" in error_of(start(*words, PROBE_WEIGHTS=2), 2)
    assert watcher.rows("SELECT count(*) FROM embstore.item") == before
    assert watcher.rows("SELECT name FROM embstore.dataset") == [("sound",)]
    assert "other weights" in error_of(start("extract", "--dataset", "sound", "--model", "probe", PROBE_WEIGHTS=2), 2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "no folder or manifest at "),
        (["empty"], "nothing to embed under "),
        (["sound/speaker-0/0000.wav"], "is a single file; give its folder"),
        (["sound", "--model", "statistcal"], "no model 'statistcal'. Did you mean statistical?"),
        (["--dataset", "nope"], "no dataset 'nope'"),
        (["sound", "--workers", "0"], "Invalid value for '--workers'"),
        (["sound", "--workers", "many"], "Invalid value for '--workers'"),
        (["sound", "--workers", "99"], "DB_MAX_CONNECTIONS allows 10: type --workers 9"),
        (["sound", "--gpus", "70"], "no GPU 70 on this machine"),
        (["sound", "--gpus", "x"], "--gpus 'x' is not a list of numbers"),
        (["sound", "--speaker-from", "wherever"], "--speaker-from 'wherever' is not known; choose parent"),
        (["sound", "--speaker-from", "regex:("], "--speaker-from 'regex:(' is not a regular expression"),
        (["sound", "--root", "empty"], "--root is for a manifest"),
        (["sound", "--wrkers", "2"], "No such option"),
        (["sound", "--tune", "decoder=2"], "there is no 'decoder': did you mean decoders?"),
    ],
)
def test_a_wrong_word_is_named_in_one_line_and_nothing_is_registered(
    words: list[str], says: str, start: Start, sound: Path, tmp_path: Path, watcher: Watcher
) -> None:
    (tmp_path / "empty").mkdir()
    model = [] if "--model" in words else ["--model", "statistical"]
    assert says in error_of(start("extract", *words, *model), 2)
    assert is_empty(watcher)


def test_a_database_that_is_not_there_is_one_line_without_its_password(start: Start, sound: Path) -> None:
    nowhere = "postgresql://user:secret-word@127.0.0.1:1/name"
    line = error_of(start("extract", "sound", "--model", "statistical", DATABASE_URL=nowhere), 3)
    assert "no database at 'postgresql://user:***@127.0.0.1:1/name'" in line
    assert "secret-word" not in line


def test_debug_shows_where_an_error_came_from(start: Start, tmp_path: Path) -> None:
    run = start("extract", "nowhere", "--debug")
    assert run.process.wait(PATIENCE) == 2
    assert "Traceback" in run.err


def test_links_in_a_circle_are_reported_and_left(start: Start, sound: Path, watcher: Watcher) -> None:
    (sound / "speaker-0" / "round").symlink_to(sound)
    (sound / "nowhere.wav").symlink_to(sound / "gone.wav")
    run = start("extract", "sound", "--model", "statistical")
    assert run.wait() == 1
    assert "not registered: speaker-0/round: a link back to a folder above it" in run.out
    assert watcher.statuses() == {"done": 20, "failed": 1}
    assert watcher.refused() == {"nowhere.wav": "not_found"}


def test_what_may_not_be_read_is_reported(start: Start, sound: Path, watcher: Watcher, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    write_tone(closed / "1.wav", 1)
    for path in (closed, sound / "speaker-1", sound / "speaker-2" / "0002.wav"):
        path.chmod(0)
    if os.access(closed, os.R_OK):
        pytest.skip("root may read everything")
    try:
        assert "'closed' is not readable" in error_of(start("extract", "closed"), 2)
        assert is_empty(watcher)
        run = start("extract", "sound", "--model", "statistical")
        assert run.wait() == 1
        assert "not registered: speaker-1: unreadable folder: Permission denied" in run.out
        assert watcher.refused() == {"speaker-2/0002.wav": "no_permission"}
        assert watcher.statuses() == {"done": 17, "failed": 1}
    finally:
        closed.chmod(0o700)
        (sound / "speaker-1").chmod(0o700)


def test_plain_lines_where_there_is_no_terminal(start: Start, sound: Path) -> None:
    run = start("extract", "sound", "--model", "probe", PROBE_SLEEP=0.7, PROBE_BATCH=1)
    assert run.wait() == 0
    lines = run.err.splitlines()
    assert lines
    for line in lines:
        assert " of 20 (" in line
        assert "this run: " in line
    assert "\x1b" not in run.out + run.err
    assert "embedding 20 items by probe on 1 worker (cpu)" in run.out
    assert "processed 20 utterances in" in run.out


def test_a_terminal_gets_a_bar_and_the_summary(sound: Path, database_url: str, probe: Path) -> None:
    ours, terminal = pty.openpty()
    env = os.environ | {"DATABASE_URL": database_url, "PYTHONPATH": str(probe), "PROBE_SLEEP": "0.05", "TERM": "xterm"}
    run = subprocess.Popen(
        [sys.executable, "-m", "embstore", "extract", "sound", "--model", "probe", "--workers", "2"],
        cwd=sound.parent,
        env=env,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    seen = b""
    with suppress(OSError):  # how Linux says that nobody has the terminal open any more
        while piece := os.read(ours, 65536):
            seen += piece
    os.close(ours)
    assert run.wait() == 0
    text = seen.decode()
    for words in ("worker", "skipped", "failed", "20/20", "100%", "━"):
        assert words in text
    end = text.rpartition("━")[2]
    assert "processed 20 utterances in" in end
    assert "20 done + 0 failed + 0 skipped + 0 running + 0 pending = 20" in end


@pytest.fixture
def small_disk(server_home: Path, open_folder: Path) -> Iterator[Path]:
    """A file system of 40 MB that holds nothing but a tablespace."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system to fill")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", open_folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    owner = (server_home / "postgres").stat()
    os.chown(open_folder, owner.st_uid, owner.st_gid)
    yield open_folder
    subprocess.run(["umount", "--lazy", open_folder], check=True)


@pytest.fixture
def crowded(small_disk: Path, server_home: Path, database: object, database_url: str) -> Iterator[str]:
    """The test's database, moved to the small disk."""
    name = database_url.rpartition("/")[2].partition("?")[0]
    main = Watcher(embedded.url(server_home))
    main.rows(f"CREATE TABLESPACE small LOCATION '{small_disk}'")
    main.rows(f"ALTER DATABASE {name} SET TABLESPACE small")
    yield database_url
    main.rows(f"ALTER DATABASE {name} SET TABLESPACE pg_default")
    main.rows("DROP TABLESPACE small")


def test_a_full_disk_under_the_database_is_said_and_nothing_is_lost(
    crowded: str, small_disk: Path, start: Start, tmp_path: Path, watcher: Watcher
) -> None:
    write_tone(tmp_path / "one.wav", 1)
    stretches = "".join(f"one.wav,{number / 50_000}\n" for number in range(3000))
    (tmp_path / "many.csv").write_text("path,start\n" + stretches)
    ballast = small_disk / "ballast"
    words = ["extract", "many.csv", "--model", "probe", "--workers", "2"]
    for done in (50, 800, 1550, 2300):  # more often than an item may kill its worker
        gate = Gate(tmp_path / f"gate{done}")
        begin = partial(start, *words, PROBE_SLEEP=0.005, PROBE_GATE=gate.path)
        # What a run had in hand is done by the next one, before the disk is full again.
        run, _ = run_in_the_middle(begin, watcher, gate, done=done, items=3000, held_back=3000 - done - 700)
        fill(ballast)
        gate.open()
        assert run.wait() == 3, run.err
        *_, line = run.err.splitlines()  # after those of a run that takes its time
        assert line.startswith("error: the disk of the database is full (")
        ballast.unlink()  # to look, one needs a session, which may need a little room
        assert set(watcher.statuses()) <= {"done", "pending", "running"}
        watcher.let_leases_run_out()
        words = ["extract", "--workers", "2"]
    watcher.let_go()
    assert start("extract", "--workers", "2").wait() == 0
    assert watcher.statuses() == {"done": 3000}
    assert watcher.rows("SELECT count(*) FROM embstore.embedding") == [(3000,)]


def fill(ballast: Path) -> None:
    """Write until not a byte fits any more."""
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
