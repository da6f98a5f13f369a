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
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

from common import Times, arguments, in_turns, server, show, show_ratio, start, temporary_folder
from pipeline import SPEECH, Alone, end_to_end, replicate, run_workers

from embstore.errors import ItemError
from embstore.extract import devices
from embstore.media import audio
from embstore.models.base import Prepared
from embstore.models.resemblyzer import Resemblyzer, ResemblyzerRecipe
from embstore.workers import Channel


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
                taken, used = end_to_end(
                    settings, ResemblyzerRecipe(), folder / "audio", f"round-{next(numbers)}", plan
                )
            else:
                ((_, _, (taken, used)),) = run_workers(embed_decoded, [Alone(files, plan, how)], plan)
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
