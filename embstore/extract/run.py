"""The main job: register what a path holds, and have workers embed whatever is pending.

`register_source` and `extract` are the two halves; either may be run alone, killed, and run again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embstore import catalog
from embstore.catalog import Dataset
from embstore.db.engine import Database
from embstore.errors import DatabaseError, UsageError
from embstore.extract.devices import Plan
from embstore.extract.pipeline import Committed, Job, Leased, Task, work
from embstore.models.base import Recipe
from embstore.progress import Display, Tally
from embstore.queue import end_lease
from embstore.register import Registered, enqueue, register
from embstore.settings import Settings
from embstore.sources import Source
from embstore.workers import Crew

PARENT_CONNECTIONS = 1
"""What the supervising process takes of DB_MAX_CONNECTIONS."""
_POLL_SECONDS = 2.0


@dataclass
class Outcome:
    """How a run over one or more datasets ended."""

    seconds: float = 0.0
    interrupted: bool = False
    workers: list[Tally] = field(default_factory=list)
    datasets: dict[str, Tally] = field(default_factory=dict)
    statuses: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of extractions by status, for each dataset, when it was over."""

    @property
    def tally(self) -> Tally:
        """What this run did, all workers together."""
        total = Tally()
        for tally in self.datasets.values():
            total.add(tally)
        return total

    @property
    def failed(self) -> int:
        """Items of these datasets that have failed, now or in an earlier run."""
        return sum(counts.get("failed", 0) for counts in self.statuses.values())


def check_connections(settings: Settings, workers: int) -> None:
    """Raise UsageError if the workers' pools and the parent's could exceed DB_MAX_CONNECTIONS."""
    allowed = settings.db_max_connections
    if workers + PARENT_CONNECTIONS > allowed:
        raise UsageError(
            f"{workers} workers need {workers + PARENT_CONNECTIONS} database connections, DB_MAX_CONNECTIONS allows "
            f"{allowed}: type --workers {allowed - PARENT_CONNECTIONS}, or set DB_MAX_CONNECTIONS higher"
        )


def register_source(
    database: Database, source: Source, *, name: str, media: str, dry_run: bool = False
) -> tuple[Dataset, Registered]:
    """Bring a dataset in line with its source, in one transaction. A dry run changes nothing."""
    with database.begin() as connection:
        dataset = catalog.ensure_dataset(connection, name, media, str(source.root))
        registered = register(connection, dataset.dataset_id, source.entries(), dry_run=dry_run)
        if dry_run:
            connection.rollback()
    return dataset, registered


def extract(
    database: Database,
    settings: Settings,
    recipe: Recipe,
    datasets: Sequence[Dataset],
    plan: Plan,
    *,
    show: Callable[[int], Display],
    parameters: Mapping[str, Any],
) -> Outcome:
    """Embed every pending item of the datasets by one model; resumes, and shares the work with other runs.

    `show(pending)` makes the display, once it is known how much there is to do.
    """
    with database.begin() as connection:
        model_id = catalog.ensure_model(connection, recipe)
        for dataset in datasets:
            enqueue(connection, dataset.dataset_id, model_id)
    return _Run(database, settings, recipe, model_id, datasets, plan, parameters).run(show)


class _Run:
    def __init__(
        self,
        database: Database,
        settings: Settings,
        recipe: Recipe,
        model_id: int,
        datasets: Sequence[Dataset],
        plan: Plan,
        parameters: Mapping[str, Any],
    ) -> None:
        self._database = database
        self._model_id = model_id
        self._datasets = {d.dataset_id: d for d in datasets}
        self._plan = plan
        self._parameters = parameters
        tasks = tuple(Task(d.dataset_id, d.root) for d in datasets)
        self._jobs = [Job(settings, recipe, model_id, tasks, device, plan.decoders) for device in plan.devices]
        self._tokens: dict[int, int] = {}
        self._outcome = Outcome(datasets={d.name: Tally() for d in datasets})
        self._polled = 0.0
        self._remaining = 0

    def run(self, show: Callable[[int], Display]) -> Outcome:
        """Start the workers, watch them, and write down how it ended."""
        start = time.monotonic()
        self._remaining = self._count_remaining()
        if self._remaining:
            jobs = self._jobs[: self._remaining]
            self._outcome.workers = [Tally() for _ in jobs]
            runs = self._start_runs()
            status = "failed"
            try:
                with show(self._remaining) as self._display:
                    status = "done" if self._watch(jobs) else "interrupted"
            except KeyboardInterrupt:
                status = "interrupted"
            finally:
                self._outcome.seconds = time.monotonic() - start
                self._outcome.interrupted = status == "interrupted"
                self._end_runs(runs, status)
        with self._database.begin() as connection:
            for dataset in self._datasets.values():
                counts = catalog.counts(connection, dataset.dataset_id, self._model_id)
                self._outcome.statuses[dataset.name] = counts
        return self._outcome

    def _watch(self, jobs: Sequence[Job]) -> bool:
        crew = Crew(
            work,
            jobs,
            environ=self._plan.environ,
            on_message=self._on_message,
            on_death=self._on_death,
            on_tick=self._on_tick,
            on_stop=lambda: self._display.say("finishing what is on the devices; Ctrl+C again leaves at once"),
        )
        return crew.run()

    def _on_message(self, index: int, message: object) -> bool:
        if isinstance(message, Leased):
            self._tokens[index] = message.token
            return False
        assert isinstance(message, Committed)
        self._outcome.workers[index].add(message.tally)
        self._outcome.datasets[self._datasets[message.dataset_id].name].add(message.tally)
        return True

    def _on_death(self, index: int) -> None:
        """Let the dead worker's items be picked up at once, not when its lease runs out."""
        token = self._tokens.pop(index, None)
        if token is not None:
            self._database.patiently(lambda c: end_lease(c, token))

    def _on_tick(self) -> None:
        if time.monotonic() - self._polled > _POLL_SECONDS:
            self._polled = time.monotonic()
            try:
                self._remaining = self._count_remaining()
            except DatabaseError:
                self._database.close()  # the workers wait for it and say so if it stays away
        self._display.update(self._remaining, self._outcome.workers)

    def _count_remaining(self) -> int:
        scopes = [{"dataset_id": d, "model_id": self._model_id} for d in self._datasets]
        with self._database.begin() as connection:
            return catalog.remaining(connection, scopes)

    def _start_runs(self) -> dict[int, int]:
        with self._database.begin() as connection:
            return {
                d: catalog.start_run(connection, "extract", d, self._model_id, self._parameters) for d in self._datasets
            }

    def _end_runs(self, runs: Mapping[int, int], status: str) -> None:
        # If the database is what ended the run, that error is the one to show.
        with contextlib.suppress(DatabaseError), self._database.begin() as connection:
            for dataset_id, run_id in runs.items():
                tally = self._outcome.datasets[self._datasets[dataset_id].name]
                catalog.end_run(connection, run_id, dataset_id, status, tally.as_dict())
