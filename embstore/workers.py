"""A crew of worker processes: started, watched, replaced when they die, told to stop, never left behind.

    parent: Crew(target, jobs).run(...)          child: target(channel, job)
       "stop" ------------------------------------> channel.stopping is set
       messages <---------------------------------- channel.send(message)
       end of file on the pipe  <----- either side died ----->  the child drains, then leaves

Children ignore Ctrl+C and the end of a terminal, which it sends to all of them: the parent tells them. They die with
their parent, even a killed one, as its end of the pipe closes.

A child is a new interpreter, or a fork of a helper process that has imported what it needs: see `prepare`. Neither
runs the program's main script again, so a script needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess, SpawnProcess
from types import FrameType, ModuleType
from typing import Any

from embstore.errors import EmbstoreError, LeaseLost, WorkerError

DEATHS_IN_A_ROW = 5
"""How often a worker's place is filled again while nothing gets done in between."""
ORPHAN_SECONDS = float(os.environ.get("EMBSTORE_TEST_ORPHAN_SECONDS", 5))
"""How long a worker whose parent died may take to write what it has and to release the rest."""
_TICK = 0.2
_TERMINATED = 128 + signal.SIGTERM
_STOPPERS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
ONE_WISH = float(os.environ.get("EMBSTORE_TEST_WISH_SECONDS", 0.1))
"""Seconds. `timeout` signals the command and then its whole group, the command again: that is no second Ctrl+C."""


@dataclass(frozen=True)
class _Failure:
    """What a child says last, when it ends by an exception."""

    error: EmbstoreError
    details: str


class Channel:
    """A worker's line to its parent."""

    def __init__(self, pipe: Connection) -> None:
        self.stopping = threading.Event()
        """Set when the worker is to finish what it has begun, and leave."""
        self.dismissed = False
        """Whether it was the parent who said so, or its death; and not somebody with a SIGTERM."""
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        """Tell the parent. If there is none any more, say nothing: `stopping` is about to be set."""
        with self._lock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._pipe.send(message)

    def listen(self) -> None:
        """Set `stopping` when told so or when the parent is gone; runs in a thread of its own."""
        try:
            while True:
                self._pipe.recv()
                self.dismissed = True
                self.stopping.set()
        except (EOFError, OSError):
            self.dismissed = True
            timer = threading.Timer(ORPHAN_SECONDS, os._exit, args=(1,))
            timer.daemon = True
            timer.start()
        self.stopping.set()


def _child(target: Callable[[Channel, Any], None], pipe: Connection, job: Any) -> None:
    channel = Channel(pipe)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: channel.stopping.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPERS)
    threading.Thread(target=channel.listen, daemon=True, name="parent").start()
    try:
        target(channel, job)
    except EmbstoreError as error:
        channel.send(_Failure(error, traceback.format_exc()))
    except Exception as error:  # noqa: BLE001 - the parent gets it whole, and stops the crew
        summary = f"{type(error).__name__}: {error}".splitlines()[0]
        failure = WorkerError(f"a worker stopped at {summary}; type the same command with --debug for the traceback")
        channel.send(_Failure(failure, traceback.format_exc()))
    else:
        if channel.stopping.is_set() and not channel.dismissed:
            sys.exit(_TERMINATED)  # there may be work left, so the parent fills the place again


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(*modules: str) -> None:
    """Have a helper process import these, without waiting for it, so that `Crew(forked=True)` starts in no time.

    The modules must neither start threads nor open connections when they are imported. The helper ends with this
    process.
    """
    multiprocessing.set_forkserver_preload(list(modules))
    resource_tracker.ensure_running()  # it unblocks signals when it starts, so it starts before they are blocked
    with _signals_blocked():
        forkserver.ensure_running()


@dataclass
class _Worker:
    index: int
    process: SpawnProcess | ForkServerProcess
    pipe: Connection
    failure: _Failure | None = None
    spoke: bool = False
    """Before its first message a worker is still loading, and has nothing to lose."""
    killed: bool = False
    """By this crew, as it had not spoken."""


class Crew:
    """One worker process for each job."""

    def __init__(
        self,
        target: Callable[[Channel, Any], None],
        jobs: Sequence[Any],
        *,
        environ: Mapping[str, str] | None = None,
        forked: bool = False,
        on_message: Callable[[int, Any], bool],
        on_death: Callable[[int], None],
        on_kill: Callable[[int], None] | None = None,
        on_tick: Callable[[], None] = lambda: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """`forked` workers come from the helper that `prepare` starts, with the environment that it was started in.

        `on_message(index, message)` says whether the message means progress; `on_death(index)` clears up after a
        worker that died before it is replaced; `on_kill(index)` after one that this crew has killed, by default in the
        same way; `on_tick` is called several times a second; `on_stop` at the first Ctrl+C. All run in the parent's
        main thread.
        """
        self._target = target
        self._jobs = list(jobs)
        self._environ = dict(environ or {})
        self._forked = forked
        self._on_message = on_message
        self._on_death = on_death
        self._on_kill = on_kill or on_death
        self._on_tick = on_tick
        self._on_stop = on_stop
        self._workers: dict[int, _Worker] = {}
        self._deaths = dict.fromkeys(range(len(self._jobs)), 0)
        self._signals = 0
        self._signalled = 0.0
        self._stopping = False
        self._error: _Failure | None = None

    def run(self) -> bool:
        """Work until every worker has left by itself; False if it was interrupted.

        Raises the error that a worker reported, or WorkerError if one keeps dying.
        """
        with self._signals_handled():
            try:
                for index in range(len(self._jobs)):
                    self._start(index)
                while self._workers:
                    self._watch()
                    self._on_tick()
            finally:
                self._kill()
        if self._error is not None:
            self._error.error.add_note(self._error.details)
            raise self._error.error
        return self._signals == 0

    def _start(self, index: int) -> None:
        context = multiprocessing.get_context("forkserver") if self._forked else multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # as in `prepare`
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_child, args=(self._target, theirs, self._jobs[index]), name=f"worker-{index}", daemon=True
        )
        with _signals_blocked(), _environment(self._environ), _without_main():
            process.start()
        theirs.close()
        self._workers[index] = _Worker(index, process, ours)

    def _watch(self) -> None:
        workers = list(self._workers.values())
        ready = wait([w.pipe for w in workers] + [w.process.sentinel for w in workers], timeout=_TICK)
        if self._signals == 1 and not self._stopping:
            self._stop()
            self._on_stop()
        for worker in workers:
            if worker.pipe in ready:
                self._receive(worker)
            if worker.process.sentinel in ready:
                self._receive(worker)
                self._left(worker)

    def _receive(self, worker: _Worker) -> None:
        with contextlib.suppress(EOFError, OSError):
            while worker.pipe.poll():
                message = worker.pipe.recv()
                worker.spoke = True
                if isinstance(message, _Failure):
                    worker.failure = message
                elif self._on_message(worker.index, message):
                    self._deaths[worker.index] = 0

    def _left(self, worker: _Worker) -> None:
        worker.process.join()
        worker.pipe.close()
        del self._workers[worker.index]
        failure = worker.failure
        if failure is None and worker.process.exitcode == 0:
            return
        (self._on_kill if worker.killed else self._on_death)(worker.index)
        if failure is not None and not isinstance(failure.error, LeaseLost):
            self._give_up(failure)
        elif not self._stopping:
            self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        self._deaths[worker.index] += 1
        if self._deaths[worker.index] < DEATHS_IN_A_ROW:
            self._start(worker.index)
            return
        code = worker.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._give_up(
            _Failure(
                WorkerError(
                    f"worker {worker.index} died {DEATHS_IN_A_ROW} times in a row without finishing an item ({how}); "
                    "is there enough memory? try fewer --workers, then run the same command again"
                ),
                "",
            )
        )

    def _give_up(self, failure: _Failure) -> None:
        self._error = self._error or failure
        self._stop()

    def _stop(self) -> None:
        self._stopping = True
        for worker in self._workers.values():
            self._receive(worker)  # it may have spoken a while ago, if this process was held up
            if not worker.spoke:
                worker.killed = True
                worker.process.kill()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                worker.pipe.send("stop")

    def _kill(self) -> None:
        for worker in self._workers.values():
            worker.process.kill()
        for index, worker in list(self._workers.items()):
            worker.process.join()
            worker.pipe.close()
            self._on_kill(index)
        self._workers.clear()

    @contextlib.contextmanager
    def _signals_handled(self) -> Iterator[None]:
        """First Ctrl+C, SIGTERM or end of the terminal: drain. Second: leave at once. In another thread: neither."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread hears signals
            return

        def count(number: int, _frame: FrameType | None) -> None:
            if number == signal.SIGHUP:
                _forget_closed_terminal()
            last, self._signalled = self._signalled, time.monotonic()
            # A shell passes the end of its terminal on, and the kernel tells of it too: that may take a while.
            if self._signals and (self._signalled - last < ONE_WISH or number == signal.SIGHUP):
                return
            self._signals += 1
            if self._signals > 1:
                raise KeyboardInterrupt

        heard = _STOPPERS if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else _STOPPERS - {signal.SIGHUP}  # nohup
        before = {number: signal.signal(number, count) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A child inherits the mask, so that a Ctrl+C in the second that Python takes to start does not reach it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPERS)


def _forget_closed_terminal() -> None:
    """Let what is still printed go nowhere: on a terminal that is gone, each line of it would be an error."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Let a child not run the main script, from which it needs nothing: multiprocessing asks this module what it is.

    A script that calls embstore outside `if __name__ == "__main__"` would start the same run in each of its workers.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Thread counts are read from the environment when numpy and torch are imported: they must be there before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
