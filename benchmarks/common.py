"""What the benchmarks share: a server of their own, timing in turns, and a table of the result."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from statistics import median

import psutil

from embstore.db import embedded, migrate
from embstore.db.engine import Database
from embstore.db.home import Home, is_free
from embstore.settings import Settings

Times = dict[str, list[float]]


def arguments(description: str | None, *, rounds: int, items: int | None = None) -> argparse.ArgumentParser:
    """The flags of a benchmark; `--items` only where it has an amount to do."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if items is not None:
        parser.add_argument("--items", type=int, default=items, help=f"how much to do (default: {items})")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"turns of each (default: {rounds})")
    return parser


def start(script: str) -> None:
    """Run the `main` of a script whose functions run in worker processes, as a module that these can import.

    embstore's workers don't see the program that was started, so that no script is run again in each of them.
    """
    importlib.import_module(Path(script).stem).main()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that other accounts may enter too: as root, PostgreSQL runs under another one."""
    folder = Path(tempfile.mkdtemp(prefix="embstore-benchmark-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def server(kept: Path | None = None) -> Iterator[Settings]:
    """Settings of a migrated embedded server as users have it (fsync on): a new one, which is removed in the end.

    With `kept`, the one in that folder, which is stopped and stays there.
    """
    with nullcontext(kept) if kept else temporary_folder() as folder:
        settings = Settings(home=folder / "home")
        place = Home.at(settings.home)
        try:
            database = Database(settings)
            migrate.require_ready(database)
            database.close()
            yield settings
        finally:
            embedded.stop(settings.home, force=True)
            while not is_free(place, place.keeper_lock):
                time.sleep(0.05)


@contextmanager
def memory_watched(settings: Settings) -> Iterator[dict[str, int]]:
    """Largest resident set meanwhile, in bytes, of each kind of process (`_kind`); shared pages count too."""
    largest: dict[str, int] = {}
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            with suppress(psutil.Error, OSError):
                for process in _processes(settings):
                    with suppress(psutil.Error):
                        if kind := _kind(process):
                            largest[kind] = max(largest.get(kind, 0), process.memory_info().rss)
            stop.wait(0.2)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield largest
    finally:
        stop.set()
        thread.join()


def postmaster(settings: Settings) -> psutil.Process:
    """The server of these settings."""
    return psutil.Process(int((settings.home / "postgres" / "postmaster.pid").read_text().split()[0]))


def _processes(settings: Settings) -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True), *postmaster(settings).children()]


def _kind(process: psutil.Process) -> str | None:
    """This process, a command it started, its workers, the helper that they are forks of, the server's sessions."""
    if process.pid == os.getpid():
        return "client"
    above, words = process.parent(), " ".join(process.cmdline())
    if above is None:
        return None
    if above.pid == os.getpid():
        return "command" if "embstore" in process.cmdline() else None
    if "forkserver" in words:
        return "worker" if "forkserver" in " ".join(above.cmdline()) else "helper"
    if "spawn_main" in words and above.ppid() == os.getpid():
        return "worker"
    return "session" if "postgres: embstore: embstore" in words else None


def command(settings: Settings, *words: str) -> None:
    """Run `embstore WORDS` on the server of these settings, as a process of its own."""
    environment = os.environ | {"EMBSTORE_HOME": str(settings.home)}
    environment.pop("DATABASE_URL", None)
    subprocess.run([sys.executable, "-m", "embstore", *words], env=environment, capture_output=True, check=True)


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def in_turns(rounds: int, tasks: Mapping[str, Callable[[], float]]) -> Times:
    """Run A B C A B C …; each task returns its seconds, and may prepare what it needs outside of them.

    In turns, as the machine's speed drifts: a neighbour's load then falls on all of them alike.
    """
    times: Times = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            times[name].append(task())
    return times


def show(times: Mapping[str, Sequence[float]], items: int | None = None) -> None:
    """Print minimum, median and maximum of each, and items a second at the median."""
    width = max(map(len, times))
    rate = "      items/s" if items else ""
    print(f"{'':{width}}   {'min':>10} {'median':>10} {'max':>10}{rate}")
    for name, taken in times.items():
        figures = " ".join(f"{1000 * value:>7,.1f} ms" for value in (min(taken), median(taken), max(taken)))
        print(f"{name:{width}}   {figures}" + (f"   {items / median(taken):>10,.0f}" if items else ""))


def show_ratio(words: str, value: float, target: str) -> None:
    """Print a ratio beside its target, and how busy the machine was."""
    print(f"\n{words}: {value:.2f}   (target: {target})   load of the last minute: {os.getloadavg()[0]:.1f}\n")


def ratio(times: Times, over: str, under: str) -> float:
    """Ratio of the medians."""
    return median(times[over]) / median(times[under])
