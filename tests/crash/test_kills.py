"""Ctrl+C, SIGTERM, kill -9 and SIGSTOP at known moments of a run: nothing is lost, doubled or left behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from audit import ITEMS, SHORT_LEASE, Vectors, audit, read_vectors
from commands import (
    PATIENCE,
    Command,
    Gate,
    Start,
    Watcher,
    run_in_the_middle,
    wait_until,
    write_tone,
    write_tones,
)

from embstore.workers import ONE_WISH

INTERRUPTED = 130
FOR_EVER = 10 * PATIENCE
"""Seconds that an item takes which nobody is to wait for: whoever ends within PATIENCE did not."""

Runs = list[Command]


@pytest.fixture
def begin(start: Start, tones: Path, gate: Gate) -> Start:
    """Start the main job on `tones`, with a gate before the device: about six seconds of work for two workers."""

    def begin(**env: object) -> Command:
        own = {"PROBE_SLEEP": 0.05, "PROBE_GATE": gate.path}
        return start("extract", str(tones), "--model", "probe", "--workers", "2", **own, **env)

    return begin


def test_ctrl_c_at_several_moments_and_going_on(
    begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs
) -> None:
    for more, held_back in ((0, 180), (1, 120), (20, 60), (40, 1)):
        before = watcher.count("done")
        watcher.hold_back(held_back)
        run = begin()
        watcher.wait_for_claims(before)
        watcher.wait_for_done(done := before + more)
        run.press_ctrl_c()
        assert run.wait() == INTERRUPTED
        assert "interrupted; nothing that was finished is lost" in run.out
        statuses = audit(watcher, runs, expected=undisturbed)
        assert done <= statuses.get("done", 0) <= ITEMS - held_back
    watcher.let_go()
    assert begin().wait() == 0
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


def test_ctrl_c_while_workers_are_starting(begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs) -> None:
    watcher.hold_back(1)
    run = begin()
    wait_until(run.workers, "the first worker")
    run.press_ctrl_c()
    assert run.wait() == INTERRUPTED
    watcher.let_leases_run_out()
    assert audit(watcher, runs).get("running") is None
    watcher.let_go()
    assert begin().wait() == 0
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


def test_what_is_on_the_device_is_finished_after_one_sigterm(
    begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    watcher.hold_back(1)
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
    watcher.hold_back(1)
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
    watcher.hold_back(1)
    run = start("nohup", *words, terminal=True, PROBE_SLEEP=0.01)
    watcher.wait_for_done(20)
    run.close_terminal()
    watcher.let_go()
    assert run.wait() == 0
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_does_not_wait_for_the_device(
    number: signal.Signals, begin: Start, watcher: Watcher, runs: Runs, gate: Gate
) -> None:
    run, _ = run_in_the_middle(begin, watcher, gate, done=8, items=ITEMS)
    run.process.send_signal(number)
    wait_until(lambda: "again leaves at once" in run.err, "the word that it stops")
    assert run.process.poll() is None
    time.sleep(2 * ONE_WISH)
    run.process.send_signal(number)
    assert run.wait() == INTERRUPTED
    gate.open()
    statuses = audit(watcher, runs)
    assert statuses["pending"] >= 1
    assert set(watcher.rows("SELECT attempts FROM embstore.extraction WHERE status = 'pending'")) == {(0,)}


def test_timeout_in_a_loop_gets_there(
    start: Start, tones: Path, watcher: Watcher, undisturbed: Vectors, runs: Runs, tmp_path: Path
) -> None:
    words = (sys.executable, "-m", "embstore", "extract", str(tones), "--model", "probe")
    # However long `timeout` itself is held up between its two signals.
    env = {"PROBE_SLEEP": 0.03, "EMBSTORE_TEST_WISH_SECONDS": PATIENCE}
    seconds, codes, done = 3, [124], [0]
    while codes[-1] == 124:
        embedded = tmp_path / f"log-{len(codes)}"
        embedded.touch()
        run = start("timeout", f"{seconds}s", *words, PROBE_LOG=embedded, **env)
        codes.append(run.wait())
        watcher.let_leases_run_out()  # of those that were killed while they were loading
        done.append(audit(watcher, runs, expected=undisturbed).get("done", 0))
        # It drains, although `timeout` signals twice: the command, and then its whole group.
        assert done[-1] - done[-2] == len(embedded.read_text().splitlines())
        seconds *= 1 + (done[-1] == done[-2])  # a busy machine may take that long to begin
    assert codes[-1] == 0
    assert codes.count(124) > 1
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


@pytest.mark.parametrize("done", [0, 100])
def test_a_killed_worker_is_replaced_and_the_run_finishes(
    done: int, begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs, gate: Gate
) -> None:
    run, worker = run_in_the_middle(begin, watcher, gate, done=done, items=ITEMS)
    os.kill(worker, signal.SIGKILL)
    gate.open()
    watcher.let_go()
    assert run.wait() == 0
    assert f"{ITEMS} done + 0 failed + 0 skipped + 0 running + 0 pending = {ITEMS} utterances" in run.out
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


def test_a_worker_that_somebody_terminates_is_replaced_too(
    start: Start, tones: Path, watcher: Watcher, undisturbed: Vectors, runs: Runs
) -> None:
    watcher.hold_back(1)
    run = start("extract", str(tones), "--model", "probe", "--workers", "1", PROBE_SLEEP=0.01)
    watcher.wait_for_done(20)
    run.workers()[0].terminate()
    watcher.let_go()
    assert run.wait() == 0
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


@pytest.mark.parametrize("done", [0, 100])
def test_workers_of_a_killed_parent_write_what_they_have_and_leave(
    done: int, begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs, gate: Gate
) -> None:
    patient = partial(begin, EMBSTORE_TEST_ORPHAN_SECONDS=PATIENCE)
    run, _ = run_in_the_middle(patient, watcher, gate, done=done, items=ITEMS)
    run.process.kill()
    gate.open()
    assert run.wait() == -signal.SIGKILL
    statuses = audit(watcher, runs, expected=undisturbed)
    assert done < statuses["done"] < ITEMS
    watcher.let_go()
    assert begin().wait() == 0
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


def test_workers_of_a_killed_parent_do_not_wait_for_a_slow_device(
    start: Start, watcher: Watcher, tmp_path: Path, runs: Runs
) -> None:
    write_tones(tmp_path / "sound", 5)
    write_tone(tmp_path / "sound" / "zz-slow.wav", 99)
    run = start("extract", "sound", "--model", "probe", PROBE_SLOW=FOR_EVER, PROBE_BATCH=1, **SHORT_LEASE)
    watcher.wait_for_done(4)  # of two decoders, one may bring the slow file before the last of the others
    run.process.kill()
    wait_until(lambda: not run.members(), "the worker to leave")
    assert start("extract", PROBE_SLOW=0).wait() == 0
    assert audit(watcher, runs) == {"done": 6}


@pytest.mark.parametrize("done", [0, 100])
def test_a_run_goes_on_after_everything_was_killed_at_once(
    done: int, begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs, gate: Gate
) -> None:
    run, _ = run_in_the_middle(partial(begin, **SHORT_LEASE), watcher, gate, done=done, items=ITEMS)
    run.kill_group()
    assert run.wait() == -signal.SIGKILL
    assert watcher.count("running") > 0
    gate.open()
    watcher.let_go()
    again = begin()
    assert again.wait() == 0, again.err
    assert audit(watcher, runs, expected=undisturbed) == {"done": ITEMS}


def test_what_a_sleeper_writes_after_its_lease_is_refused(
    begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs, gate: Gate
) -> None:
    first, worker = run_in_the_middle(partial(begin, **SHORT_LEASE), watcher, gate, done=40, items=ITEMS)
    sleeper = psutil.Process(worker)
    sleeper.suspend()
    gate.open()
    watcher.let_go()
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
    begin: Start, watcher: Watcher, undisturbed: Vectors, runs: Runs, tmp_path: Path, gate: Gate
) -> None:
    gate.close()
    first, second = (begin(PROBE_LOG=tmp_path / name) for name in ("first", "second"))
    for run in (first, second):
        gate.wait_for(run)
    gate.open()
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
        write_tone(tmp_path / changed.name, 1000 + done).replace(changed)  # never half of it
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
    watcher.let_leases_run_out()  # had it been killed before it could tell the number of its own
    statuses = audit(watcher, runs)
    golden = np.load(test_data / "resemblyzer-golden.npz")
    expected = {path.removeprefix("librispeech/"): emb for path, emb in zip(golden["path"], golden["emb"], strict=True)}
    found = read_vectors(watcher)
    assert len(found) == statuses["done"] == sum(statuses.values())
    assert min(float(vector @ expected[path]) for path, vector in found.items()) > 0.999
