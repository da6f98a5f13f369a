"""A command's run over queues: starts the workers, counts what they commit, clears up after them, notes how it ended.

Extraction, centroids and boundaries all run through here; what a worker does with its job is theirs.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, text

from embstore import catalog
from embstore.catalog import Dataset
from embstore.db.engine import Database, is_pooled, set_local
from embstore.errors import DatabaseError, UsageError
from embstore.progress import Display, Tally
from embstore.queue import Queue, end_lease
from embstore.settings import Settings
from embstore.waits import Waits
from embstore.words import plural
from embstore.workers import Channel, Crew

PARENT_CONNECTIONS = 1
"""What the supervising process takes of DB_MAX_CONNECTIONS."""
_POLL_SECONDS = 2.0
_LIMIT = "SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user AND rolconnlimit >= 0 AND NOT rolsuper"


@dataclass(frozen=True)
class Leased:
    """From a worker: it has taken a lease, which its parent ends if the worker dies."""

    token: int


@dataclass(frozen=True)
class Committed:
    """From a worker: it has written results of a dataset."""

    dataset_id: int
    tally: Tally


@dataclass(frozen=True)
class Share:
    """One dataset's part in a run."""

    dataset: Dataset
    queue: Queue


@dataclass
class Outcome:
    """How a run over one or more datasets ended."""

    seconds: float = 0.0
    interrupted: bool = False
    workers: list[Tally] = field(default_factory=list)
    waits: list[Waits] = field(default_factory=list)
    """What each worker waited for, where it says so."""
    processor_seconds: float = 0.0
    """Time that the workers computed on this machine's cores, loading included; 0 for forked ones."""
    datasets: dict[str, Tally] = field(default_factory=dict)
    statuses: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of rows by status, for each dataset, when it was over."""

    @property
    def tally(self) -> Tally:
        """What this run did, all workers together."""
        total = Tally()
        for tally in self.datasets.values():
            total.add(tally)
        return total

    @property
    def failed(self) -> int:
        """Rows of these datasets that have failed, now or in an earlier run."""
        return sum(counts.get("failed", 0) for counts in self.statuses.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "interrupted": self.interrupted,
            "seconds": round(self.seconds, 3),
            **self.tally.as_dict(),
            "workers": [tally.as_dict() for tally in self.workers],
            "datasets": self.statuses,
        }


def check_connections(settings: Settings, workers: int, each: int = 1) -> None:
    """Raise UsageError if the workers' pools, of `each` connections, and the parent's could exceed the limit."""
    allowed, needed = settings.db_max_connections, workers * each + PARENT_CONNECTIONS
    if needed > allowed:
        raise UsageError(
            f"{workers} workers need {needed} database connections, DB_MAX_CONNECTIONS allows {allowed}: "
            f"type --workers {(allowed - PARENT_CONNECTIONS) // each}, or set DB_MAX_CONNECTIONS higher"
        )


def check_login(connection: Connection, workers: int, each: int) -> None:
    """Raise UsageError if the login may not hold so many connections; behind a pooler, that is the pooler's to sort."""
    limit = connection.execute(text(_LIMIT)).scalar()
    needed = workers * each + PARENT_CONNECTIONS
    if limit is None or needed <= limit or is_pooled(connection):
        return
    fewer = (limit - PARENT_CONNECTIONS) // each
    raise UsageError(
        f"{plural(workers, 'worker')} and the command need {needed} database connections, and the server lets this"
        f" login have {limit}: {f'type --workers {fewer}, or ' if fewer > 0 else ''}ask for more"
    )


def _processor_seconds() -> float:
    """What child processes that have ended took of the cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Run:
    """One command at work on the shares of one model."""

    def __init__(
        self,
        database: Database,
        command: str,
        model_id: int,
        shares: Sequence[Share],
        parameters: Mapping[str, Any],
        *,
        each: int = 1,
    ) -> None:
        """`each` is how many connections a worker may hold."""
        self._database = database
        self._each = each
        self._command = command
        self._model_id = model_id
        self._shares = {share.dataset.dataset_id: share for share in shares}
        self._parameters = parameters
        self._tokens: dict[int, int] = {}
        self._outcome = Outcome(datasets={share.dataset.name: Tally() for share in shares})
        self._polled = 0.0
        self._remaining = 0
        self._display: Display
        self._runs: dict[str, int] = {}
        """The run of each dataset, by the dataset's name."""

    def go(
        self,
        target: Callable[[Channel, Any], None],
        jobs: Callable[[Mapping[int, int]], Sequence[Any]],
        *,
        show: Callable[[int], Display],
        environ: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Run a crew of `target` until nothing is pending; `jobs(run ids by dataset)` makes a job for each worker.

        `show(pending)` makes the display; `environ` is set for the workers, None: they are forked from the helper
        that `workers.prepare` starts. Fewer workers than jobs are started where there is less to do.
        """
        start, before = time.monotonic(), _processor_seconds()
        self._remaining = self._count_remaining()
        if self._remaining:
            runs = self._start_runs()
            crew_jobs = jobs(runs)[: self._remaining]
            self._outcome.workers = [Tally() for _ in crew_jobs]
            self._outcome.waits = [Waits() for _ in crew_jobs]
            status = "failed"
            self._display = show(self._remaining)
            try:
                with self._database.begin() as connection:
                    check_login(connection, len(crew_jobs), self._each)
                with self._display:
                    self._note_start(runs, len(crew_jobs))
                    status = "done" if self._watch(target, crew_jobs, environ) else "interrupted"
            except KeyboardInterrupt:
                status = "interrupted"
            finally:
                self._outcome.seconds = time.monotonic() - start
                self._outcome.processor_seconds = _processor_seconds() - before
                self._outcome.interrupted = status == "interrupted"
                self._display.note("run_ended", status=status, runs=self._runs, **self._outcome.tally.as_dict())
                self._end_runs(runs, status)
        with self._database.begin() as connection:
            for share in self._shares.values():
                self._outcome.statuses[share.dataset.name] = share.queue.counts(connection)
        return self._outcome

    def _note_start(self, runs: Mapping[int, int], workers: int) -> None:
        self._runs = {share.dataset.name: runs[dataset_id] for dataset_id, share in self._shares.items()}
        self._display.note(
            "run_started", command=self._command, runs=self._runs, workers=workers, pending=self._remaining
        )

    def _watch(
        self, target: Callable[[Channel, Any], None], jobs: Sequence[Any], environ: Mapping[str, str] | None
    ) -> bool:
        crew = Crew(
            target,
            jobs,
            environ=environ,
            forked=environ is None,
            on_message=self._on_message,
            on_death=self._on_death,
            on_kill=self._on_kill,
            on_tick=self._on_tick,
            on_stop=lambda: self._display.say("finishing what is on the devices; Ctrl+C again leaves at once"),
        )
        return crew.run()

    def _on_message(self, index: int, message: object) -> bool:
        if isinstance(message, Leased):
            self._tokens[index] = message.token
            self._display.note("worker_started", worker=index, lease=message.token)
            return False
        if isinstance(message, Waits):
            self._outcome.waits[index].add(message)
            return False
        assert isinstance(message, Committed)
        dataset = self._shares[message.dataset_id].dataset.name
        self._outcome.workers[index].add(message.tally)
        self._outcome.datasets[dataset].add(message.tally)
        facts = message.tally.as_dict()
        self._display.note("committed", worker=index, dataset=dataset, run=self._runs[dataset], **facts)
        return True

    def _on_death(self, index: int) -> None:
        """Let the dead worker's rows be picked up at once, not when its lease runs out."""
        token = self._tokens.pop(index, None)
        self._display.note("worker_died", worker=index, lease=token, runs=self._runs)
        if token is not None:
            self._try(lambda c: end_lease(c, token))

    def _on_kill(self, index: int) -> None:
        """Give back what a worker had that was killed from here: none of its rows is suspected of having done it."""
        token = self._tokens.get(index)
        self._on_death(index)
        if token is not None:
            self._try(lambda c: self._release(c, token))

    def _release(self, connection: Connection, token: int) -> None:
        # The dead worker's last statement may still be running on the server, and hold its rows.
        set_local(connection, "lock_timeout", "1s")
        for share in self._shares.values():
            share.queue.release(connection, token)

    def _try(self, work: Callable[[Connection], object]) -> None:
        """Clear up, if the database is there. If it is not, leases run out by themselves, and nobody has to wait."""
        try:
            with self._database.begin() as connection:
                work(connection)
        except DatabaseError:
            self._database.close()

    def _on_tick(self) -> None:
        if time.monotonic() - self._polled > _POLL_SECONDS:
            self._polled = time.monotonic()
            try:
                self._remaining = self._count_remaining()
            except DatabaseError:
                self._database.close()  # the workers wait for it, and say so if it stays away
        self._display.update(self._remaining, self._outcome.workers)

    def _count_remaining(self) -> int:
        with self._database.begin() as connection:
            return sum(share.queue.remaining(connection) for share in self._shares.values())

    def _start_runs(self) -> dict[int, int]:
        with self._database.begin() as connection:
            return {
                dataset_id: catalog.start_run(connection, self._command, dataset_id, self._model_id, self._parameters)
                for dataset_id in self._shares
            }

    def _end_runs(self, runs: Mapping[int, int], status: str) -> None:
        # If the database is what ended the run, that error is the one to show.
        with contextlib.suppress(DatabaseError), self._database.begin() as connection:
            for dataset_id, run_id in runs.items():
                tally = self._outcome.datasets[self._shares[dataset_id].dataset.name]
                catalog.end_run(connection, run_id, dataset_id, status, tally.as_dict())
