"""WeSpeaker's models on processors: its own loop, the bare model, and the whole pipeline with one worker and with two.

own loop     `extract_embedding` of the package wespeaker, file by file
bare         embstore's model alone: features and network, from samples that were decoded before the clock starts
one worker   a worker process of `embstore extract`: claim, open, decode, embed, write; from its lease to its last
             commit
two workers  two of them, from the moment at which both have their lease

Each has one thread to compute with, and a process of its own in every round, so that nothing is left over from the
round before. Loading is no part of any. The first needs the package wespeaker; `--without-package` leaves it out.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from common import arguments, in_turns, server, show, show_ratio, temporary_folder
from extract import SPEECH, replicate
from numpy.typing import NDArray

from embstore import catalog
from embstore.db.engine import Database
from embstore.extract import devices
from embstore.extract.devices import Plan
from embstore.extract.pipeline import Job, Task, work
from embstore.extract.run import register_source
from embstore.extract.tuning import Tuning
from embstore.media.extensions import AUDIO
from embstore.models.base import Recipe
from embstore.models.wespeaker import recipe
from embstore.register import enqueue
from embstore.settings import Settings
from embstore.sources import open_source
from embstore.supervise import Committed, Leased
from embstore.workers import Channel, Crew

ONE_THREAD = Tuning(threads=1, decoders=1)


@dataclass(frozen=True)
class Alone:
    """What a process without a database is told."""

    files: Sequence[Path]
    model_dir: Path
    options: dict[str, str]


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, items=200, rounds=3)
    parser.add_argument("model_dir", type=Path, help="model folder, or an .onnx file")
    parser.add_argument("--data", type=Path, default=SPEECH, help="folder of audio, repeated up to --items files")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="option of the model")
    parser.add_argument("--without-package", action="store_true", help="leave WeSpeaker's own loop out")
    options = parser.parse_args()
    chosen = dict(pair.split("=", 1) for pair in options.option)
    vectors: dict[str, NDArray[np.float32]] = {}
    with temporary_folder() as folder, server() as settings:
        files = replicate(options.data, folder / "audio", options.items)
        made = recipe({"model_dir": str(options.model_dir), **chosen})
        job = Alone(files, options.model_dir, chosen)
        numbers = itertools.count(1)

        def alone(name: str, target: Any) -> float:
            taken, vectors[name] = run_crew(target, [job], devices.plan(1, "none", ONE_THREAD))[-1][1]
            return float(taken)

        def pipeline(workers: int) -> float:
            plan = devices.plan(workers, "none", ONE_THREAD)
            return options.items / end_to_end(settings, made, folder / "audio", f"round-{next(numbers)}", plan)

        ways = {
            "bare": partial(alone, "bare", bare),
            "one worker": partial(pipeline, 1),
            "two workers": partial(pipeline, 2),
        }
        if not options.without_package:
            ways = {"own loop": partial(alone, "own loop", own_loop), **ways}
        times = in_turns(options.rounds, ways)
    show(times, len(files))
    middle = {name: median(values) for name, values in times.items()}
    if "own loop" in middle:
        show_ratio("utterances a second: one worker / own loop", middle["own loop"] / middle["one worker"], "2, bf16")
        print(f"lowest cosine to the own loop's vectors: {lowest_cosine(vectors['bare'], vectors['own loop']):.7f}")
    show_ratio("one worker / bare", middle["bare"] / middle["one worker"], "0.95 or more")
    show_ratio("two workers / one", middle["one worker"] / middle["two workers"], "1.8 or more, two cores")


def lowest_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The lowest cosine of two matrices, row by row."""
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def run_crew(target: Any, jobs: Sequence[Any], plan: Plan) -> list[tuple[float, Any]]:
    """Run workers as `embstore extract` does; their messages, with the time at which they came."""
    messages: list[tuple[float, Any]] = []

    def note(_index: int, message: object) -> bool:
        messages.append((perf_counter(), message))
        return True

    Crew(target, jobs, environ=plan.environ, on_message=note, on_death=lambda _index: None).run()
    return messages


def end_to_end(settings: Settings, made: Recipe, folder: Path, name: str, plan: Plan) -> float:
    """Items a second from the moment at which all workers have their lease to the last commit."""
    database = Database(settings)
    dataset, registered = register_source(database, open_source(folder, extensions=AUDIO), name=name, media="audio")
    with database.begin() as connection:
        model_id = catalog.ensure_model(connection, made)
        enqueue(connection, dataset.dataset_id, model_id)
    database.close()
    tasks = (Task(dataset.dataset_id, dataset.root),)
    jobs = [Job(settings, made, model_id, tasks, device, plan.decoders, plan.tuning) for device in plan.devices]
    messages = run_crew(work, jobs, plan)
    commits = [(moment, one.tally.processed) for moment, one in messages if isinstance(one, Committed)]
    assert sum(count for _, count in commits) == registered.found
    begin = max(moment for moment, one in messages if isinstance(one, Leased))
    return sum(count for moment, count in commits if moment > begin) / (commits[-1][0] - begin)


def own_loop(channel: Channel, job: Alone) -> None:
    """Body of a process that does what WeSpeaker's users do."""
    with contextlib.redirect_stdout(sys.stderr):
        import torch
        import wespeaker

        speaker = wespeaker.load_model(str(job.model_dir))
    torch.set_num_threads(1)
    speaker.extract_embedding(str(job.files[0]))  # the first is slow
    begin = perf_counter()
    rows = [speaker.extract_embedding(str(file)).numpy() for file in job.files]
    channel.send((perf_counter() - begin, np.stack(rows)))


def bare(channel: Channel, job: Alone) -> None:
    """Body of a process that decodes everything first, then embeds in batches as the pipeline takes them."""
    model = recipe({"model_dir": str(job.model_dir), **job.options}).load("cpu")
    items = [model.prepare(file, None, None) for file in job.files]
    model.embed(items[:1])  # the first is slow
    begin = perf_counter()
    rows = [model.embed([item]) for item in items]
    channel.send((perf_counter() - begin, np.concatenate(rows)))


if __name__ == "__main__":
    main()
