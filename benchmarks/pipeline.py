"""What the benchmarks of extraction share: files to embed, workers on a clock, and the model without a database."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embstore import catalog
from embstore.db.engine import Database
from embstore.extract.devices import Plan
from embstore.extract.pipeline import Job, Task, extraction_queue, work
from embstore.extract.run import register_source
from embstore.media import extensions
from embstore.models.base import Recipe
from embstore.register import enqueue
from embstore.settings import Settings
from embstore.sources import open_source
from embstore.supervise import Committed, Leased
from embstore.workers import Channel, Crew

SPEECH = Path(os.environ.get("EMBSTORE_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data") / "speech"


@dataclass(frozen=True)
class Alone:
    """What a process is told that computes without a database."""

    files: Sequence[Path]
    plan: Plan
    how: str
    options: Mapping[str, str] = field(default_factory=dict)
    """Of the model."""


def replicate(source: Path, folder: Path, items: int) -> list[Path]:
    """Copy the folder's audio, over and over, until there are `items` files; real copies, not links.

    If it has more than that, they are taken evenly from the whole of it.
    """
    originals = sorted(path for path in source.rglob("*") if path.suffix.lower() in extensions.AUDIO)
    if not originals:
        raise SystemExit(f"no audio in '{source}': name a folder that has some with --data")
    if items < len(originals):
        originals = [originals[number * len(originals) // items] for number in range(items)]
    copies = []
    for number, path in zip(range(items), itertools.cycle(originals), strict=False):
        copy = folder / f"copy-{number // len(originals):03}" / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copies.append(copy)
    return copies


def run_workers(
    target: Callable[[Channel, Any], None], jobs: Sequence[Any], plan: Plan
) -> list[tuple[int, float, Any]]:
    """Run workers as `embstore extract` does; their messages, with the worker's number and the time at which they came.

    `target` may be a function of the script itself: see `common.start`.
    """
    messages: list[tuple[int, float, Any]] = []

    def note(index: int, message: object) -> bool:
        messages.append((index, time.perf_counter(), message))
        return True

    Crew(target, jobs, environ=plan.environ, on_message=note, on_death=lambda _index: None).run()
    return messages


def end_to_end(settings: Settings, recipe: Recipe, folder: Path, name: str, plan: Plan) -> tuple[float, float]:
    """Extract the folder as a dataset of its own: seconds from when all workers have their lease to the last commit.

    What was committed before counts as if it had taken as long as the rest. And the processors' seconds, of each worker
    from its lease to its last commit.
    """
    database = Database(settings)
    source = open_source(folder, extensions=extensions.BY_MEDIA[recipe.media])
    dataset, registered = register_source(database, source, name=name, media=recipe.media)
    with database.begin() as connection:
        model_id = catalog.ensure_model(connection, recipe)
        enqueue(connection, dataset.dataset_id, model_id)
    tasks = (Task(dataset.dataset_id, dataset.root),)
    jobs = [Job(settings, recipe, model_id, tasks, device, plan.decoders, plan.tuning) for device in plan.devices]
    messages = run_workers(_work_by_the_clock, jobs, plan)
    with database.begin() as connection:
        assert not extraction_queue(dataset.dataset_id, model_id).is_open(connection)
    database.close()
    leases = {worker: (moment, used) for worker, moment, (used, one) in messages if isinstance(one, Leased)}
    commits = [(worker, moment, used, one) for worker, moment, (used, one) in messages if isinstance(one, Committed)]
    assert sum(one.tally.processed for *_, one in commits) == registered.found
    begin = max(moment for moment, _ in leases.values())
    timed = sum(one.tally.processed for _, moment, _, one in commits if moment > begin)
    if not timed:  # so few items that nothing was left for the last worker
        begin, timed = min(moment for moment, _ in leases.values()), registered.found
    last = {worker: used for worker, _, used, _ in commits}
    used = sum(used - leases[worker][1] for worker, used in last.items())
    return (commits[-1][1] - begin) * registered.found / timed, used


def _work_by_the_clock(channel: Channel, job: Job) -> None:
    """Body of a worker process: that of `embstore extract`, with the processors' seconds beside every message."""
    send = channel.send
    channel.send = lambda message: send((time.process_time(), message))  # type: ignore[method-assign]
    work(channel, job)
