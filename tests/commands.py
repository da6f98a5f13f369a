"""The real command as a real process with real workers, which tests may kill; sound and a model for it to work on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import psycopg2
import soundfile
from sqlalchemy import make_url

RATE = 16_000
PATIENCE = 300.0
"""Seconds after which something that a test waits for will not happen any more, however slow the machine is."""


def wait_until(holds: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    """Look again and again until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.02)


class Command:
    """An `embstore …` that runs, in a process group and session of its own; in a terminal of its own, if wanted."""

    def __init__(self, words: tuple[str, ...], folder: Path, env: Mapping[str, str], *, terminal: bool = False) -> None:
        self._out = folder / f"out-{time.monotonic_ns()}"
        self._err = self._out.with_name(self._out.name.replace("out", "err"))
        program = [sys.executable, "-m", "embstore"] if words[0] not in ("timeout", "nohup") else []
        command, options = [*program, *words], {"cwd": folder, "env": os.environ | env, "start_new_session": True}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            if terminal:
                self._terminal = _Terminal(self._out)
                self.process = self._terminal.start(command, options)
            else:
                self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, **options)
        self.pid = self.process.pid

    def type(self, keys: str) -> None:
        """As somebody does at its terminal; a new line is the return key."""
        self._terminal.type(keys)

    def close_terminal(self) -> None:
        """As somebody does who closes the window."""
        self._terminal.close()

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return self._out.read_text(errors="replace")  # the last character may be half written

    @property
    def err(self) -> str:
        """What it has said beside that so far."""
        return self._err.read_text(errors="replace")

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait until it ends; its exit code. A traceback is never right."""
        code = self.process.wait(seconds)
        assert "Traceback" not in self.out + self.err, self.err
        return code

    def members(self) -> list[psutil.Process]:
        """All live processes of its group: itself, its workers, their helpers."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def workers(self) -> list[psutil.Process]:
        """Its worker processes, the oldest first."""
        found = []
        for process in self.members():
            try:
                if _is_worker(process):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return sorted(found, key=lambda worker: worker.pid)

    def press_ctrl_c(self) -> None:
        """As a terminal does: to every process of the group."""
        os.killpg(self.pid, signal.SIGINT)

    def kill_group(self) -> None:
        """End everything at once."""
        os.killpg(self.pid, signal.SIGKILL)


def _is_worker(process: psutil.Process) -> bool:
    """Whether it was spawned as a worker, or forked as one from the helper that has imported everything."""
    if "spawn_main" in " ".join(process.cmdline()):
        return True
    above = process.parent()
    return above is not None and _is_helper(above) and _is_helper(process)


def _is_helper(process: psutil.Process) -> bool:
    return "multiprocessing.forkserver" in " ".join(process.cmdline())


class _Terminal:
    """A terminal whose screen goes into a file."""

    def __init__(self, screen: Path) -> None:
        self._ours, self._theirs = os.openpty()
        self._screen = screen
        self._open = True

    def start(self, command: list[str], options: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        """Run a command in it, as its session's leader."""
        process = subprocess.Popen(
            command,
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            **options,
        )
        os.close(self._theirs)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return process

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def close(self) -> None:
        self._open = False
        self._reader.join()
        os.close(self._ours)

    def _read(self) -> None:
        # No program has it open any more: OSError.
        with self._screen.open("ab", buffering=0) as screen, contextlib.suppress(OSError):
            while self._open:
                if select.select([self._ours], [], [], 0.05)[0]:
                    screen.write(os.read(self._ours, 65536))


Start = Callable[..., Command]
"""Starts a command with these words; keywords are environment, but for `terminal`."""


# A row for which a trigger returns NULL stays as it is, and is not among those that the claim gets.
_HOLD_BACK = """
CREATE OR REPLACE FUNCTION public.hold_back() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF NEW.{key} IN (
        SELECT {key} FROM {table} WHERE dataset_id = NEW.dataset_id ORDER BY {key} DESC LIMIT {number})
    THEN RETURN NULL; END IF;
    RETURN NEW;
END $$
"""
_HOLD = """
CREATE OR REPLACE TRIGGER hold_back BEFORE UPDATE ON {table} FOR EACH ROW
WHEN (OLD.status = 'pending' AND NEW.status = 'running') EXECUTE FUNCTION public.hold_back()
"""


class Watcher:
    """Looks into the database from outside, to strike at a known moment."""

    def __init__(self, address: str) -> None:
        self._address = make_url(address).set(drivername="postgresql").render_as_string(hide_password=False)

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run one statement by itself; its rows, if it has any."""
        connection = psycopg2.connect(self._address, application_name="test")
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql, values)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def count(self, status: str) -> int:
        """Number of extractions in a status; 0 as long as nothing is registered."""
        ((number,),) = self.rows("SELECT count(*) FROM embstore.extraction WHERE status = %s", status)
        return int(number)

    def statuses(self) -> dict[str, int]:
        """Number of extractions by status."""
        return dict(self.rows("SELECT status, count(*) FROM embstore.extraction GROUP BY status"))

    def refused(self) -> dict[str, str]:
        """Path and reason code of all that failed or was skipped."""
        return dict(
            self.rows(
                "SELECT path, error_code FROM embstore.extraction JOIN embstore.item USING (dataset_id, item_id)"
                " WHERE status IN ('failed', 'skipped')"
            )
        )

    def wait_for_done(self, number: int) -> None:
        """Wait until at least that many items are done."""
        wait_until(lambda: self.count("done") >= number, f"{number} items done")

    def wait_for_claims(self, beyond: int = 0) -> None:
        """Wait until more extractions than that have been claimed, if they are not finished by now."""
        wait_until(lambda: sum(self.statuses().values()) - self.count("pending") > beyond, "a claim")

    def let_leases_run_out(self, *workers: psutil.Process) -> None:
        """Have the time pass for which workers that are dead hold what they had: these, or all."""
        pids = [worker.pid for worker in workers]
        sql = "UPDATE embstore.lease SET expires_at = clock_timestamp()"
        if pids:
            self.rows(f"{sql} WHERE split_part(worker, ':', 2)::int = ANY (%s)", pids)
        else:
            self.rows(sql)

    def hold_back(self, number: int, table: str = "embstore.extraction", key: str = "item_id") -> None:
        """Let nobody claim the last so many rows of each dataset: until `let_go`, no run comes to its end.

        However fast its workers are, a strike is in the middle then. Rows that are to be queued later count as well.
        """
        self.rows(_HOLD_BACK.format(number=number, table=table, key=key))
        self.rows(_HOLD.format(table=table))

    def let_go(self, table: str = "embstore.extraction", key: str = "item_id") -> None:
        """Have everything claimed that was held back."""
        self.rows(_HOLD_BACK.format(number=0, table=table, key=key))


class Gate:
    """A gate before the device of model `probe`: whoever comes to it while it is closed stays there, rows in hand.

    For runs that are started with PROBE_GATE=gate.path. Each is closed once, and opened once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def close(self) -> None:
        """Let nothing be embedded any more."""
        self.path.touch()

    def open(self) -> None:
        """Let all go on."""
        self.path.unlink()

    def wait_for(self, run: Command) -> int:
        """Wait until a worker of a run stands before it, as it will until the gate is opened; its process."""
        found: list[int] = []

        def look() -> bool:
            waiting = {int(path.name.rpartition("-")[2]) for path in self.path.parent.glob(f"{self.path.name}-*")}
            found[:] = [worker.pid for worker in run.workers() if worker.pid in waiting]
            return bool(found)

        wait_until(look, "a worker at the gate")
        return found[0]


def run_in_the_middle(
    begin: Callable[[], Command], watcher: Watcher, gate: Gate, *, done: int, items: int, held_back: int = 1
) -> tuple[Command, int]:
    """A run that has the first so many items done, and a worker with later ones in hand at the closed gate.

    Returns the run and that worker's process. The last so many items are held back: `watcher.let_go` lets the run come
    to its end, once the gate is open.
    """
    watcher.hold_back(items - done)
    run = begin()
    watcher.wait_for_done(done)
    gate.close()
    watcher.hold_back(held_back)
    return run, gate.wait_for(run)


def write_tones(folder: Path, count: int, *, speakers: int = 10, first: int = 0) -> list[Path]:
    """Short files of tones in noise, every one different, the same on every machine."""
    paths = []
    for number in range(first, first + count):
        path = folder / f"speaker-{number % speakers}" / f"{number:04}.{'flac' if number % 2 else 'wav'}"
        paths.append(write_tone(path, number))
    return paths


def write_tone(path: Path, seed: int) -> Path:
    """A tone in noise, of 0.2 seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    time_axis = np.arange(RATE // 5) / RATE
    tone = 0.4 * np.sin(2 * np.pi * rng.uniform(100, 4000) * time_axis)
    soundfile.write(path, tone + 0.02 * rng.standard_normal(len(time_axis)), RATE)
    return path


def install_probe(folder: Path) -> Path:
    """Install the package `embstore-probe` into a folder, as an installer would; it is to be put on PYTHONPATH."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).parent / "probe" / "embstore_probe.py", folder)
    info = folder / "embstore_probe-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: embstore-probe\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[embstore.models]\nprobe = embstore_probe:recipe\n")
    return folder
