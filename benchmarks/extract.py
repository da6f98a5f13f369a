"""End-to-end extraction against the model alone on the same audio, already decoded; resemblyzer on the CPU.

end to end   a worker process of `embstore extract`, one for all cores, from its lease (just before its first claim) to
             its last commit: claim, open, decode, preprocess, embed, write. Starting Python and loading the model are
             before that, and no part of it
alone, overlapped   the model in a process of its own, all audio decoded before the clock starts: preprocessing in as
             many threads as the worker has decoders, and `embed` meanwhile in batches of what is ready, of the same
             size limit and with the same number of threads for the numerics; nothing is read or written
alone, serial       the same in one thread: preprocess a batch, embed it, go on
embed alone  everything preprocessed too before the clock starts: what the device itself needs

The ratio is taken to the faster of the two "alone". The processors' seconds of each are shown too: they hardly depend
on what else the machine does, but they do not see a device that waits for files.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import Times, arguments, in_turns, server, show, show_ratio, start, temporary_folder

from embstore import catalog
from embstore.db.engine import Database
from embstore.errors import ItemError
from embstore.extract import devices
from embstore.extract.devices import Plan
from embstore.extract.pipeline import Job, Task, extraction_queue, work
from embstore.extract.run import register_source
from embstore.media import audio, extensions
from embstore.models.base import Prepared
from embstore.models.registry import find
from embstore.models.resemblyzer import Resemblyzer, ResemblyzerRecipe
from embstore.register import enqueue
from embstore.settings import Settings
from embstore.sources import open_source
from embstore.supervise import Committed, Leased
from embstore.workers import Channel, Crew

SPEECH = Path(os.environ.get("EMBSTORE_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data") / "speech"


@dataclass(frozen=True)
class Alone:
    """What the process that runs the model alone is told."""

    files: Sequence[Path]
    plan: Plan
    how: str


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, items=1_985, rounds=3)
    parser.add_argument("--data", type=Path, default=SPEECH, help="folder of audio, repeated up to --items files")
    options = parser.parse_args()
    processor: Times = {}
    with temporary_folder() as folder, server() as settings:
        files = replicate(options.data, folder / "audio", options.items)
        plan = devices.plan(1, "none")
        numbers = itertools.count(1)

        def run(how: str) -> float:
            if how == "end to end":
                taken, used = end_to_end(settings, folder / "audio", f"round-{next(numbers)}", plan)
            else:
                ((_, _, (taken, used)),) = run_workers(embed_decoded, Alone(files, plan, how), plan)
            processor.setdefault(f"{how}, processors' seconds", []).append(used)
            return float(taken)

        ways = ("end to end", "alone, overlapped", "alone, serial", "embed alone")
        times = in_turns(options.rounds, {how: partial(run, how) for how in ways})
    print(f"{len(files):,} files, {plan.threads} threads, {plan.decoders} decoders, {options.rounds} rounds in turns")
    show(times | processor, len(files))
    best = min(median(times["alone, overlapped"]), median(times["alone, serial"]))
    show_ratio("end-to-end speed / the model's alone", best / median(times["end to end"]), "0.9 or more")
    used = {how: median(values) for how, values in processor.items()}
    least = min(value for how, value in used.items() if how.startswith("alone"))
    show_ratio("processors' seconds of the model alone / end to end", least / used[next(iter(used))], "0.9 or more")


def replicate(source: Path, folder: Path, items: int) -> list[Path]:
    """Copy the folder's audio, over and over, until there are `items` files; real copies, not links.

    If it has more than that, they are taken evenly from the whole of it.
    """
    originals = sorted(path for path in source.rglob("*") if path.suffix.lower() in audio.EXTENSIONS)
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


def end_to_end(
    settings: Settings, folder: Path, name: str, plan: Plan, model: str = "resemblyzer"
) -> tuple[float, float]:
    """Extract the folder as a dataset of its own; seconds, and processors' seconds, from first lease to last commit."""
    database = Database(settings)
    recipe = find(model, {})
    source = open_source(folder, extensions=extensions.BY_MEDIA[recipe.media])
    dataset, registered = register_source(database, source, name=name, media=recipe.media)
    with database.begin() as connection:
        model_id = catalog.ensure_model(connection, recipe)
        enqueue(connection, dataset.dataset_id, model_id)
    task = Task(dataset.dataset_id, dataset.root)
    job = Job(settings, recipe, model_id, (task,), "cpu", plan.decoders)
    messages = run_workers(work_by_the_clock, job, plan)
    leases = {worker: used for worker, _, (used, one) in messages if isinstance(one, Leased)}
    commits = [(worker, moment, used, one) for worker, moment, (used, one) in messages if isinstance(one, Committed)]
    assert sum(one.tally.processed for *_, one in commits) == registered.found
    ends = {worker: used for worker, _, used, _ in commits}
    with database.begin() as connection:
        assert not extraction_queue(dataset.dataset_id, model_id).is_open(connection)
    database.close()
    return commits[-1][1] - messages[0][1], sum(used - leases[worker] for worker, used in ends.items())


def work_by_the_clock(channel: Channel, job: Job) -> None:
    """Body of the worker process: that of `embstore extract`, with the processors' seconds beside every message."""
    send = channel.send
    channel.send = lambda message: send((time.process_time(), message))  # type: ignore[method-assign]
    work(channel, job)


def run_workers(target: Callable[[Channel, Any], None], job: object, plan: Plan) -> list[tuple[int, float, Any]]:
    """Run the plan's workers as `embstore extract` does; their messages, with the worker's number and the time."""
    messages: list[tuple[int, float, Any]] = []

    def note(index: int, message: object) -> bool:
        messages.append((index, time.perf_counter(), message))
        return True

    jobs = [job] * len(plan.devices)
    Crew(target, jobs, environ=plan.environ, on_message=note, on_death=lambda _index: None).run()
    return messages


def embed_decoded(channel: Channel, job: Alone) -> None:
    """Body of the process that runs the model alone: decodes everything first, then preprocesses and embeds."""
    model = ResemblyzerRecipe().load("cpu")
    assert isinstance(model, Resemblyzer)
    with ThreadPoolExecutor(job.plan.decoders) as threads:
        sounds = list(threads.map(lambda path: audio.read(path, None, None, 16_000), job.files))
        model.embed([prepared for sound in sounds[:8] if (prepared := _prepare(model, sound))])  # the first is slow
        ready: Iterator[Prepared | None] = (_prepare(model, sound) for sound in sounds)
        if job.how == "embed alone":
            ready = iter(list(ready))
        begin, before = time.perf_counter(), time.process_time()
        if job.how == "alone, overlapped":
            ready = threads.map(lambda sound: _prepare(model, sound), sounds)
        for batch in _batches(ready, model.max_cost):
            model.embed(batch)
        channel.send((time.perf_counter() - begin, time.process_time() - before))


def _prepare(model: Resemblyzer, sound: audio.Audio) -> Prepared | None:
    try:
        return model.prepare_audio(sound)
    except ItemError:
        return None


def _batches(ready: Iterator[Prepared | None], max_cost: int) -> Iterator[list[Prepared]]:
    """Full batches: the model at its best."""
    batch: list[Prepared] = []
    for item in ready:
        if item is None:
            continue
        if batch and sum(other.cost for other in batch) + item.cost > max_cost:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


if __name__ == "__main__":
    start(__file__)
