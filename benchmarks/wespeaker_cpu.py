"""WeSpeaker's models on processors: its own loop, the bare model, and the whole pipeline with one worker and with two.

own loop     `extract_embedding` of the package wespeaker, file by file
bare         embstore's model alone: features and network, from samples that were decoded before the clock starts
one worker   a worker process of `embstore extract`: claim, open, decode, embed, write; from its lease to its last
             commit
two workers  two of them, from the moment at which both have their lease

Each has one thread to compute with, and a process of its own in every round, so that nothing is left over from the
round before. Loading is no part of any. The processors' seconds of each are shown too, of all threads and workers: they
hardly depend on what else the machine does. The files are taken evenly from the whole folder. The first way needs the
package wespeaker; `--without-package` leaves it out.

Every turn is printed when it is over. `--notes FILE` writes them down too, and what was written by earlier runs with
the same files counts as earlier rounds: so the rounds may be spread over several runs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from common import Times, arguments, in_turns, ratio, server, show, show_ratio, start, temporary_folder
from numpy.typing import NDArray
from pipeline import SPEECH, Alone, end_to_end, replicate, run_workers

from embstore.extract import devices
from embstore.extract.tuning import Tuning
from embstore.models.wespeaker import recipe
from embstore.workers import Channel

ONE_THREAD = Tuning(threads=1, decoders=1)


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, items=200, rounds=3)
    parser.add_argument("model_dir", type=Path, help="model folder, or an .onnx file")
    parser.add_argument("--data", type=Path, default=SPEECH, help="folder of audio, repeated up to --items files")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="option of the model")
    parser.add_argument("--notes", type=Path, metavar="FILE", help="write the times down, and go on from those in it")
    parser.add_argument("--without-package", action="store_true", help="leave WeSpeaker's own loop out")
    options = parser.parse_args()
    given = {"model_dir": str(options.model_dir), **dict(pair.split("=", 1) for pair in options.option)}
    vectors: dict[str, NDArray[np.float32]] = {}
    with temporary_folder() as folder, server() as settings:
        files = replicate(options.data, folder / "audio", options.items)
        made = recipe(given)
        numbers = itertools.count(1)

        def alone(name: str, target: Any) -> tuple[float, float]:
            plan = devices.plan(1, "none", ONE_THREAD)
            ((_, _, (taken, used, vectors[name])),) = run_workers(target, [Alone(files, plan, name, given)], plan)
            return taken, used

        def pipeline(workers: int) -> tuple[float, float]:
            plan = devices.plan(workers, "none", ONE_THREAD)
            return end_to_end(settings, made, folder / "audio", f"round-{next(numbers)}", plan)

        ways = {
            "bare": partial(alone, "bare", bare),
            "one worker": partial(pipeline, 1),
            "two workers": partial(pipeline, 2),
        }
        if not options.without_package:
            ways = {"own loop": partial(alone, "own loop", own_loop), **ways}
        notes = Notes(options.notes)
        in_turns(options.rounds, {name: partial(notes.turn, name, way) for name, way in ways.items()})
    if "own loop" in vectors:
        print(f"lowest cosine to the own loop's vectors: {lowest_cosine(vectors['bare'], vectors['own loop']):.7f}")
    conclude(notes, len(files))


class Notes:
    """Seconds, and processors' seconds, of each turn of each way; written to a file as they come."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.times: Times = {}
        self.used: Times = {}
        for line in file.read_text().splitlines() if file is not None and file.exists() else ():
            self._add(*json.loads(line))

    def turn(self, name: str, way: Callable[[], tuple[float, float]]) -> float:
        """Take a turn."""
        taken, used = way()
        self._add(name, taken, used)
        print(f"{name}: {taken:.2f} s, processors {used:.2f} s, load {os.getloadavg()[0]:.1f}", flush=True)
        if self._file is not None:
            with self._file.open("a") as out:
                out.write(json.dumps([name, taken, used]) + "\n")
        return taken

    def _add(self, name: str, taken: float, used: float) -> None:
        self.times.setdefault(name, []).append(taken)
        self.used.setdefault(name, []).append(used)


def conclude(notes: Notes, items: int) -> None:
    """Print all times, and the ratios for which there are targets."""
    show(notes.times, items)
    print("\nprocessors' seconds")
    show(notes.used, items)
    for words, times in (("", notes.times), (", by processors' seconds", notes.used)):
        if "own loop" in times:
            show_ratio(f"one worker's speed / own loop's{words}", ratio(times, "own loop", "one worker"), "2, bf16")
        show_ratio(f"one worker's speed / bare{words}", ratio(times, "bare", "one worker"), "0.95 or more")
    show_ratio("two workers' speed / one's", ratio(notes.times, "one worker", "two workers"), "1.8 or more, two cores")


def lowest_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The lowest cosine of two matrices, row by row."""
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def own_loop(channel: Channel, job: Alone) -> None:
    """Body of a process that does what WeSpeaker's users do."""
    with contextlib.redirect_stdout(sys.stderr):
        import torch
        import wespeaker

        speaker = wespeaker.load_model(job.options["model_dir"])
    torch.set_num_threads(1)
    speaker.extract_embedding(str(job.files[0]))  # the first is slow
    begin, before = perf_counter(), process_time()
    rows = [speaker.extract_embedding(str(file)).numpy() for file in job.files]
    channel.send((perf_counter() - begin, process_time() - before, np.stack(rows)))


def bare(channel: Channel, job: Alone) -> None:
    """Body of a process that decodes everything first, then embeds in batches as the pipeline takes them."""
    model = recipe(job.options).load("cpu")
    items = [model.prepare(file, None, None) for file in job.files]
    model.embed(items[:1])  # the first is slow
    begin, before = perf_counter(), process_time()
    rows = [model.embed([item]) for item in items]
    channel.send((perf_counter() - begin, process_time() - before, np.concatenate(rows)))


if __name__ == "__main__":
    start(__file__)
