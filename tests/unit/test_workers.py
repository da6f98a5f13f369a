"""A crew of real processes: heard, replaced, drained, killed, and none of them left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import crew_targets
import psutil
import pytest
from commands import PATIENCE, wait_until

from embstore.errors import EmbstoreError, ModelError, UsageError, WorkerError
from embstore.workers import DEATHS_IN_A_ROW, ONE_WISH, Channel, Crew, prepare


class Heard:
    """Everything that a crew has told its parent."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, Any]] = []
        self.deaths: list[int] = []
        self.ticks = 0
        self.progress = True

    def run(self, target: Callable[[Channel, Any], None], jobs: list[Any], **more: Any) -> bool:
        """Run a crew to its end."""

        def on_message(index: int, message: Any) -> bool:
            self.messages.append((index, message))
            return self.progress

        def on_tick() -> None:
            self.ticks += 1

        crew = Crew(target, jobs, on_message=on_message, on_death=self.deaths.append, on_tick=on_tick, **more)
        return crew.run()


@pytest.fixture
def heard() -> Iterator[Heard]:
    """An empty ear; afterwards, no process that was started is left, and signals are as they were."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    yield Heard()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    children = psutil.Process().children()
    assert not [child for child in children if "spawn_main" in "".join(child.cmdline())]


def test_every_message_arrives_in_order(heard: Heard) -> None:
    assert heard.run(crew_targets.count, [500, 0, 3])
    assert [m for i, m in heard.messages if i == 0] == list(range(500))
    assert Counter(i for i, _ in heard.messages) == {0: 500, 2: 3}
    assert heard.deaths == []
    assert heard.ticks > 0


def test_a_killed_forked_worker_is_replaced(heard: Heard, tmp_path: Path) -> None:
    prepare("crew_targets")
    assert heard.run(crew_targets.die_at_first, [tmp_path / "mark"], forked=True)
    pids = [message for _, message in heard.messages]
    assert len(set(pids)) == 3
    assert pids[2] == "alive"
    assert heard.deaths == [0]


def test_forked_workers_have_a_parent_of_their_own_and_say_what_went_wrong(heard: Heard) -> None:
    prepare("crew_targets")
    heard.run(crew_targets.tell_parent, [None, None], forked=True)
    (helper,) = {parent for _, parent in heard.messages}
    assert helper != os.getpid()
    with pytest.raises(ModelError, match="the weights in 'x'"):
        heard.run(crew_targets.raise_error, [ModelError], forked=True)


def test_what_is_set_for_workers_is_set_for_them_alone(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "11")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    environ = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "3"}
    heard.run(crew_targets.thread_count, ["OMP_NUM_THREADS", "MKL_NUM_THREADS"], environ=environ)
    assert sorted(heard.messages) == [(0, "2"), (1, "3")]
    assert os.environ["OMP_NUM_THREADS"] == "11"
    assert "MKL_NUM_THREADS" not in os.environ


def test_a_killed_worker_is_cleared_up_after_and_replaced(heard: Heard, tmp_path: Path) -> None:
    assert heard.run(crew_targets.die_at_first, [tmp_path / "mark"])
    pids = [message for _, message in heard.messages]
    assert len(set(pids)) == 3
    assert pids[2] == "alive"
    assert heard.deaths == [0]


def test_a_worker_that_lost_its_lease_is_replaced(heard: Heard, tmp_path: Path) -> None:
    assert heard.run(crew_targets.lose_lease_at_first, [tmp_path / "mark"])
    assert heard.messages == [(0, "alive")]
    assert heard.deaths == [0]


@pytest.mark.parametrize(("how", "words"), [(-signal.SIGKILL, "SIGKILL"), ("exit", "exit code 3")])
def test_a_place_whose_workers_keep_dying_is_given_up(heard: Heard, how: int | str, words: str) -> None:
    heard.progress = False
    with pytest.raises(WorkerError, match=rf"worker 0 died {DEATHS_IN_A_ROW} times in a row .*\({words}\)"):
        heard.run(crew_targets.die, [how])
    assert heard.messages == [(0, how)] * DEATHS_IN_A_ROW
    assert heard.deaths == [0] * DEATHS_IN_A_ROW


def test_deaths_count_only_while_nothing_gets_done(heard: Heard) -> None:
    def on_message(index: int, message: Any) -> bool:
        heard.messages.append((index, message))
        return len(heard.messages) == DEATHS_IN_A_ROW - 1

    crew = Crew(crew_targets.die, ["exit"], on_message=on_message, on_death=heard.deaths.append)
    with pytest.raises(WorkerError):
        crew.run()
    assert len(heard.deaths) == DEATHS_IN_A_ROW - 2 + DEATHS_IN_A_ROW


@pytest.mark.parametrize("error", [UsageError, ModelError, WorkerError])
def test_a_workers_error_comes_out_as_what_it_was(heard: Heard, error: type[EmbstoreError]) -> None:
    with pytest.raises(EmbstoreError, match="the weights in 'x'") as caught:
        heard.run(crew_targets.raise_error, [error])
    assert type(caught.value) is error
    assert "in raise_error" in "".join(caught.value.__notes__)
    assert heard.deaths == [0]


def test_a_surprise_in_a_worker_is_told_in_one_line(heard: Heard) -> None:
    with pytest.raises(WorkerError) as caught:
        heard.run(crew_targets.raise_error, [ZeroDivisionError])
    words = "a worker stopped at ZeroDivisionError: the weights in 'x'; type the same command with --debug"
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)
    assert "in raise_error" in "".join(caught.value.__notes__)


def test_an_error_of_one_worker_lets_the_others_drain(heard: Heard) -> None:
    with pytest.raises(ModelError, match="no weights"):
        heard.run(crew_targets.one_fails, [0, 1])
    assert heard.deaths.count(0) == 1
    told = [m for i, m in heard.messages if i == 1]
    assert told == [] or told[-1] == "draining"  # it may not have been up yet


class Parent:
    """A supervising process of its own, in a process group of its own, as a shell starts it."""

    def __init__(self, process: subprocess.Popen[str], out: IO[str]) -> None:
        self.process = process
        self._out = out
        self.words: list[str] = []

    def read_until(self, text: str, times: int = 1) -> None:
        """Read on until a line that begins with `text` has come so often."""
        while sum(line.startswith(text) for line in self.words) < times:
            line = self._out.readline()
            assert line, f"it ended without saying '{text}': {self.words}"
            self.words.append(line.strip())

    def pids(self) -> list[int]:
        """Of its workers, from their first messages."""
        return [int(line.split()[2]) for line in self.words if line.startswith("message") and line.split()[2].isdigit()]

    def children(self) -> list[psutil.Process]:
        """Every process under it: workers, and Python's resource tracker."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> tuple[str, str]:
        """What else it says, and what came on standard error."""
        out, errors = self.process.communicate(timeout=PATIENCE)
        self.words += out.split("\n")
        return "\n".join(self.words), errors


@contextlib.contextmanager
def parent_of(target: str, *jobs: str) -> Iterator[Parent]:
    tests = str(Path(crew_targets.__file__).parent)
    code = f"import sys; sys.path.insert(0, {tests!r}); import crew_targets as c; c.run_parent(c.{target}, {[*jobs]!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    with process:
        children: list[psutil.Process] = []
        try:
            parent = Parent(process, process.stdout)
            yield parent
        finally:
            if process.poll() is None:
                children = psutil.Process(process.pid).children(recursive=True)
                process.kill()
            for child in children:
                child.kill()


def gone(pids: list[int]) -> bool:
    """Whether the processes are gone."""
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_drains(number: signal.Signals) -> None:
    with parent_of("drain", "willing", "willing") as parent:
        parent.read_until("message", 2)
        os.killpg(parent.process.pid, number)  # as a terminal does: the workers get it too
        out, errors = parent.end()
    assert out.count("draining") == 2
    assert out.count("stopping") == 1
    if number != signal.SIGTERM:  # at a SIGTERM they need not wait for the parent to tell them, and then leave as told
        assert "death" not in out
    assert "interrupted" in out
    assert errors == ""
    assert parent.process.returncode == 0


def test_the_second_signal_leaves_at_once_and_takes_the_workers_along() -> None:
    with parent_of("drain", "stubborn", "stubborn") as parent:
        parent.read_until("message", 2)
        pids = parent.pids()
        os.killpg(parent.process.pid, signal.SIGINT)
        parent.read_until("message", 4)
        time.sleep(2 * ONE_WISH)  # since it was told first
        os.killpg(parent.process.pid, signal.SIGINT)
        out, errors = parent.end()
    assert "left at once" in out
    assert sorted(line for line in out.split("\n") if line.startswith("death")) == ["death 0", "death 1"]
    assert gone(pids)
    assert errors == ""


def test_a_signal_while_the_model_is_loading_stops_at_once() -> None:
    with parent_of("load_for_ever", "", "") as parent:
        parent.read_until("started")
        while len(parent.children()) < 3:
            time.sleep(0.01)
        os.killpg(parent.process.pid, signal.SIGINT)
        out, errors = parent.end()
    assert "interrupted" in out
    assert errors == ""


def test_who_has_spoken_is_not_taken_for_one_that_is_loading(heard: Heard, tmp_path: Path) -> None:
    """Although the parent was held up, and has not heard it yet."""
    ask, spoken = tmp_path / "ask", tmp_path / "spoken"

    def held_up() -> None:
        if not ask.exists():
            ask.touch()
            wait_until(spoken.exists, "the worker to have spoken")
            signal.raise_signal(signal.SIGINT)

    crew = Crew(
        crew_targets.speak_when_asked,
        [tmp_path],
        on_message=lambda *message: bool(heard.messages.append(message)),
        on_death=heard.deaths.append,
        on_tick=held_up,
    )
    assert not crew.run()
    assert heard.messages == [(0, "up"), (0, "draining")]
    assert heard.deaths == []


def test_ctrl_c_at_any_moment_of_a_workers_start_does_not_reach_it() -> None:
    """It has to hold while Python itself starts, before any of our code in it could be asked."""
    up = threading.Event()
    with parent_of("drain", "willing", "willing") as parent, ThreadPoolExecutor(1) as thread:

        def pester() -> None:
            while not up.is_set():
                for child in parent.children():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.send_signal(signal.SIGINT)

        parent.read_until("started")
        pestering = thread.submit(pester)
        try:
            parent.read_until("message", 2)
        finally:
            up.set()
            pestering.result()
        os.killpg(parent.process.pid, signal.SIGINT)
        out, errors = parent.end()
    assert "death" not in out
    assert "interrupted" in out
    assert errors == ""


def test_no_worker_outlives_a_killed_parent() -> None:
    """Neither one that takes no notice, nor one that had been told to stop before, nor one that is still loading."""
    stubborn = ("drain", "willing", "stubborn")
    with parent_of(*stubborn) as working, parent_of(*stubborn) as draining, parent_of("load_for_ever", "") as loading:
        working.read_until("message", 2)
        draining.read_until("message", 2)
        pids = working.pids() + draining.pids()
        os.kill(draining.process.pid, signal.SIGINT)
        draining.read_until("message", 4)
        while len(loading.children()) < 2:
            time.sleep(0.01)
        pids += [child.pid for child in loading.children()]
        for parent in (working, draining, loading):
            parent.process.kill()
            parent.process.wait()
        wait_until(lambda: gone(pids), "the workers to leave")
