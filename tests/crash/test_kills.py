"""Ctrl+C, SIGTERM, kill -9 and SIGSTOP at known moments of a run: nothing is lost, doubled or left behind."""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from audit import ITEMS, LEASE_SECONDS, Vectors, audit, read_vectors
from commands import Command, Start, Watcher, wait_until, write_tone, write_tones

from embstore.workers import ONE_WISH, ORPHAN_SECONDS

INTERRUPTED = 130
AT_ONCE = 10.0
"""Far less than the items in hand would take: whoever ends within it did not wait for them."""

Runs = list[Command]


@pytest.fixture
def begin(start: Start, tones: Path) -> Start:
    """Start the main job on `tones`: about six seconds of work for two workers."""

    def begin(**env: object) -> Command:
        return start("extract", str(tones), "--model", "probe", "--workers", "2", **{"PROBE_SLEEP": 0.05, **env})

    return begin


def test_ctrl_c_at_several_moments_and_going_on(
    begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs
) -> None:
    for more in (0, 1, 20, 40):
        run = begin()
        watcher.wait_for_claims()
        done = watcher.count("done") + more
        watcher.wait_for_done(done)
        run.press_ctrl_c()
        assert run.wait() == INTERRUPTED
        assert "interrupted; nothing that was finished is lost" in run.out
        statuses = audit(watcher, runs, expected=undisturbed)
        assert done <= statuses["done"] < ITEMS
    assert begin().wait() == 0
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


def test_ctrl_c_while_workers_are_starting(begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs) -> None:
    run = begin()
    wait_until(run.workers, "the first worker")
    run.press_ctrl_c()
    assert run.wait() == INTERRUPTED
    assert audit(watcher, runs, orphans=LEASE_SECONDS).get("running") is None
    assert begin().wait() == 0
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


def test_what_is_on_the_device_is_finished_after_one_sigterm(
    begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    run = begin(PROBE_LOG=log)
    watcher.wait_for_done(40)
    run.process.terminate()
    assert run.wait() == INTERRUPTED
    statuses = audit(watcher, runs, expected=undisturbed)
    assert statuses == {"done": len(log.read_text().splitlines()), "pending": ITEMS - statuses["done"]}
    assert set(watcher.rows("SELECT attempts FROM embstore.extraction WHERE status = 'pending'")) == {(0,)}


def test_a_closed_terminal_is_as_good_as_ctrl_c(
    start: Start, tones: Path, watcher: Watcher, undisturbed: Vectors, runs: Runs, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    words = ("extract", str(tones), "--model", "probe", "--workers", "2")
    run = start(*words, terminal=True, PROBE_SLEEP=0.05, PROBE_LOG=log)
    watcher.wait_for_done(20)
    run.close_terminal()
    assert run.wait() == INTERRUPTED
    statuses = audit(watcher, runs, expected=undisturbed)
    assert statuses == {"done": len(log.read_text().splitlines()), "pending": ITEMS - statuses["done"]}
    assert watcher.rows("SELECT status FROM embstore.run") == [("interrupted",)]


def test_nohup_goes_on_behind_a_closed_terminal(
    start: Start, tones: Path, watcher: Watcher, undisturbed: Vectors, runs: Runs
) -> None:
    words = (sys.executable, "-m", "embstore", "extract", str(tones), "--model", "probe")
    run = start("nohup", *words, terminal=True, PROBE_SLEEP=0.01)
    watcher.wait_for_done(20)
    run.close_terminal()
    assert run.wait() == 0
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_does_not_wait_for_the_device(
    number: signal.Signals, start: Start, watcher: Watcher, tmp_path: Path, runs: Runs
) -> None:
    write_tones(tmp_path / "sound", 20)
    write_tone(tmp_path / "sound" / "zz-slow.wav", 99)
    run = start("extract", "sound", "--model", "probe", "--workers", "2", PROBE_SLOW=1000)
    watcher.wait_for_done(8)
    run.process.send_signal(number)
    wait_until(lambda: "again leaves at once" in run.err, "the word that it stops")
    assert run.process.poll() is None
    time.sleep(2 * ONE_WISH)
    run.process.send_signal(number)
    assert run.wait(AT_ONCE) == INTERRUPTED
    statuses = audit(watcher, runs)
    assert statuses["pending"] >= 1
    assert set(watcher.rows("SELECT attempts FROM embstore.extraction WHERE status = 'pending'")) == {(0,)}


def test_timeout_in_a_loop_gets_there(
    start: Start, tones: Path, watcher: Watcher, undisturbed: Vectors, runs: Runs, tmp_path: Path
) -> None:
    words = (sys.executable, "-m", "embstore", "extract", str(tones), "--model", "probe")
    seconds, codes, done = 3, [124], [0]
    while codes[-1] == 124:
        embedded = tmp_path / f"log-{len(codes)}"
        embedded.touch()
        run = start("timeout", f"{seconds}s", *words, PROBE_SLEEP=0.03, PROBE_LOG=embedded)
        codes.append(run.wait())
        done.append(audit(watcher, runs, expected=undisturbed, orphans=LEASE_SECONDS).get("done", 0))
        # It drains, although `timeout` signals twice: the command, and then its whole group.
        assert done[-1] - done[-2] == len(embedded.read_text().splitlines())
        seconds += done[-1] == done[-2]  # a busy machine may take that long to begin
    assert codes[-1] == 0
    assert codes.count(124) > 1
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


@pytest.mark.parametrize("done", [0, 100])
def test_a_killed_worker_is_replaced_and_the_run_finishes(
    done: int, begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs
) -> None:
    run = begin()
    watcher.wait_for_done(done)
    watcher.wait_for_claims()
    run.workers()[0].kill()
    assert run.wait() == 0
    assert f"{ITEMS} done + 0 failed + 0 skipped + 0 running + 0 pending = {ITEMS} utterances" in run.out
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


def test_a_worker_that_somebody_terminates_is_replaced_too(
    start: Start, tones: Path, watcher: Watcher, undisturbed: Vectors, runs: Runs
) -> None:
    run = start("extract", str(tones), "--model", "probe", "--workers", "1", PROBE_SLEEP=0.01)
    watcher.wait_for_done(20)
    run.workers()[0].terminate()
    assert run.wait() == 0
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


@pytest.mark.parametrize("done", [0, 100])
def test_workers_of_a_killed_parent_write_what_they_have_and_leave(
    done: int, begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs
) -> None:
    run = begin()
    watcher.wait_for_done(done)
    watcher.wait_for_claims()
    run.process.kill()
    assert run.wait() == -signal.SIGKILL
    statuses = audit(watcher, runs, expected=undisturbed, orphans=ORPHAN_SECONDS + 2)
    assert done <= statuses["done"] < ITEMS
    assert begin().wait() == 0
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


def test_workers_of_a_killed_parent_do_not_wait_for_a_slow_device(
    start: Start, watcher: Watcher, tmp_path: Path, runs: Runs
) -> None:
    write_tones(tmp_path / "sound", 5)
    write_tone(tmp_path / "sound" / "zz-slow.wav", 99)
    run = start("extract", "sound", "--model", "probe", PROBE_SLOW=1000, PROBE_BATCH=1)
    watcher.wait_for_done(4)  # of two decoders, one may bring the slow file before the last of the others
    run.process.kill()
    wait_until(lambda: not run.members(), "the worker to leave", ORPHAN_SECONDS + 2)
    assert start("extract", PROBE_SLOW=0).wait() == 0
    assert audit(watcher, runs) == {"done": 6}


@pytest.mark.parametrize("done", [0, 100])
def test_a_run_goes_on_after_everything_was_killed_at_once(
    done: int, begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs
) -> None:
    run = begin()
    watcher.wait_for_done(done)
    watcher.wait_for_claims()
    run.kill_group()
    assert run.wait() == -signal.SIGKILL
    assert watcher.count("running") > 0
    again = begin()
    assert again.wait() == 0, again.err
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


def put_to_sleep(worker: psutil.Process, watcher: Watcher) -> bool:
    """Stop a worker; False, and it goes on, if it has nothing in hand just then."""
    worker.suspend()
    in_hand = (
        "SELECT count(*) FROM embstore.extraction JOIN embstore.lease ON token = claim_token"
        " WHERE status = 'running' AND worker LIKE %s"
    )
    if watcher.rows(in_hand, f"%:{worker.pid}") > [(0,)]:
        return True
    worker.resume()
    return False


def test_what_a_sleeper_writes_after_its_lease_is_refused(
    begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs
) -> None:
    first = begin()
    watcher.wait_for_done(40)
    sleeper = next(worker for _ in range(1000) for worker in first.workers() if put_to_sleep(worker, watcher))
    ((lease,),) = watcher.rows("SELECT token FROM embstore.lease WHERE worker LIKE %s", f"%:{sleeper.pid}")
    second = begin()
    wait_until(lambda: watcher.statuses() == {"done": ITEMS}, "the others to take over")
    assert second.wait() == 0
    assert first.process.poll() is None
    before = read_vectors(watcher)
    rescued = "SELECT count(*) FROM embstore.extraction WHERE attempts > 1 AND claim_token <> %s"
    assert watcher.rows(rescued, lease) > [(0,)]
    sleeper.resume()
    assert first.wait() == 0, first.err
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}
    after = read_vectors(watcher)
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_two_runs_share_the_work_and_embed_each_item_once(
    begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs, tmp_path: Path
) -> None:
    first, second = begin(PROBE_LOG=tmp_path / "first"), begin(PROBE_LOG=tmp_path / "second")
    assert first.wait() == second.wait() == 0
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}
    shares = [(tmp_path / name).read_text().splitlines() for name in ("first", "second")]
    assert all(shares)
    assert Counter(line.split()[1] for share in shares for line in share).most_common(1)[0][1] == 1
    assert sum(map(len, shares)) == ITEMS


def test_a_file_that_changes_in_the_middle_of_a_run_is_embedded_as_it_is_now(
    start: Start, watcher: Watcher, tmp_path: Path, runs: Runs
) -> None:
    folder = tmp_path / "sound"
    paths = write_tones(folder, 60)
    first = start("extract", "sound", "--model", "probe", PROBE_SLEEP=0.05, PROBE_BATCH=4)
    for done, changed in ((4, paths[0]), (10, paths[30]), (16, paths[59]), (22, paths[1])):
        watcher.wait_for_done(done)
        write_tone(changed, 1000 + done)
    second = start("extract", "sound", "--model", "probe")
    assert first.wait() == second.wait() == 0, first.err
    assert "changed" in second.out
    assert audit(watcher, runs) == {"done": 60}
    ((whole,),) = watcher.rows("SELECT count(*) FROM embstore.item WHERE size IS NULL")
    assert whole == 0
    fresh = start("extract", "sound", "--model", "probe", "--dataset", "fresh")
    assert fresh.wait() == 0
    rows = watcher.rows(
        "SELECT max(o.embedding <-> n.embedding) FROM embeddings_probe o JOIN embeddings_probe n USING (path)"
        " WHERE o.dataset = 'sound' AND n.dataset = 'fresh'"
    )
    assert rows[0][0] <= 1e-5


def test_real_speech_by_a_real_model_survives_ctrl_c_and_a_killed_worker(
    start: Start, watcher: Watcher, test_data: Path, runs: Runs
) -> None:
    words = ("extract", str(test_data / "speech" / "librispeech"), "--workers", "2")
    watcher.hold_back(20)
    run = start(*words)
    watcher.wait_for_done(1)
    run.press_ctrl_c()
    assert run.wait() == INTERRUPTED
    before = audit(watcher, runs)
    assert 1 <= before["done"] <= sum(before.values()) - 20
    watcher.hold_back(1)
    run = start(*words)
    watcher.wait_for_done(before["done"] + 1)
    run.workers()[-1].kill()
    watcher.let_go()
    assert run.wait() == 0, run.err
    statuses = audit(watcher, runs)
    golden = np.load(test_data / "resemblyzer-golden.npz")
    expected = {path.removeprefix("librispeech/"): emb for path, emb in zip(golden["path"], golden["emb"], strict=True)}
    found = read_vectors(watcher)
    assert len(found) == statuses["done"] == sum(statuses.values())
    assert min(float(vector @ expected[path]) for path, vector in found.items()) > 0.999
