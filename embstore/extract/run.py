"""The main job: register what a path holds, and have workers embed whatever is pending.

`register_source` and `extract` are the two halves; either may be run alone, killed, and run again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from embstore import catalog
from embstore.catalog import Dataset
from embstore.db.engine import PATIENCE, Database
from embstore.extract.devices import Plan
from embstore.extract.pipeline import Job, Task, extraction_queue, work
from embstore.extract.watchdog import STUCK_SECONDS
from embstore.models.base import Recipe
from embstore.progress import Display
from embstore.register import Registered, enqueue, register
from embstore.settings import Settings
from embstore.sources import Source
from embstore.supervise import Outcome, Run, Share


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
    tasks = tuple(Task(dataset.dataset_id, dataset.root) for dataset in datasets)
    limits = _limits()
    jobs = [
        Job(settings, recipe, model_id, tasks, device, plan.decoders, plan.tuning, *limits) for device in plan.devices
    ]
    shares = [Share(dataset, extraction_queue(dataset.dataset_id, model_id)) for dataset in datasets]
    run = Run(database, "extract", model_id, shares, parameters)
    return run.go(work, lambda _runs: jobs, show=show, environ=plan.environ)


def _limits() -> tuple[float, float]:
    """Seconds of patience with the database, and until work hangs; tests that wait for them have less."""
    patience = float(os.environ.get("EMBSTORE_TEST_PATIENCE_SECONDS", PATIENCE))
    stuck = float(os.environ.get("EMBSTORE_TEST_STUCK_SECONDS", STUCK_SECONDS))
    return patience, stuck
