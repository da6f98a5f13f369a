"""End-to-end extraction of pictures against a plain Pillow loop with the same model; statistical-image on the CPU.

end to end      a worker process of `embstore extract`, one for all cores, from its lease (just before its first claim)
                to its last commit: claim, open, decode, the model's statistics, write; without starting Python
two workers     the same with two of them, which share the cores, from the moment at which both have their lease
Pillow loop     what anybody would write: open a picture with Pillow, convert it to RGB, scale it, the model's
                statistics; one after the other in one thread, and nothing is written
Pillow threads  the same in as many threads as the worker has decoders
the model       its own `prepare` in as many threads, which lets a JPEG come smaller (and turns pictures upright, scales
                16 bits, …); nothing is written

Most of the pictures are JPEG, of the size of a small photo. The processors' seconds of each are shown too. With
`--keep FOLDER` the pictures stay there, and the next run finds them made.
"""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from common import Times, arguments, in_turns, ratio, server, show, show_ratio, start, temporary_folder
from PIL import Image
from pipeline import Alone, end_to_end, run_workers

from embstore.extract import devices
from embstore.models.statistical_image import SIDE, recipe, statistics
from embstore.workers import Channel

ENDINGS = (".jpg", ".jpg", ".jpg", ".jpg", ".png", ".webp")


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, items=1_200, rounds=3)
    parser.add_argument("--width", type=int, default=1024, help="of the pictures, in pixels (default: 1024)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the pictures here")
    options = parser.parse_args()
    plan = devices.plan(1, "none")
    plans = {"end to end": plan, "two workers": devices.plan(2, "none")}
    processor: Times = {}
    numbers = itertools.count(1)
    with temporary_folder() as folder, server() as settings:
        pictures = options.keep.resolve() if options.keep else folder / "pictures"
        files = make_pictures(pictures, options.items, options.width)

        def run(how: str) -> float:
            if how in plans:
                taken, used = end_to_end(settings, recipe({}), pictures, f"{next(numbers)}", plans[how])
            else:
                ((_, _, (taken, used)),) = run_workers(loop, [Alone(files, plan, how)], plan)
            processor.setdefault(f"{how}, processors' seconds", []).append(used)
            return float(taken)

        ways = (*plans, "Pillow loop", "Pillow threads", "the model")
        times = in_turns(options.rounds, {how: partial(run, how) for how in ways})
    print(
        f"{len(files):,} pictures, {options.width} pixels wide, {plan.decoders} decoders,"
        f" {options.rounds} rounds in turns"
    )
    show(times | processor, len(files))
    for how in plans:
        show_ratio(f"speed, {how} / the Pillow loop's", ratio(times, "Pillow loop", how), "1 or more")
    show_ratio("end-to-end speed / the model's alone", ratio(times, "the model", "end to end"), "0.9 or more")


def make_pictures(folder: Path, items: int, width: int) -> list[Path]:
    """Smooth colours with some noise: a JPEG of 1024 pixels' width takes some 150 kB."""
    paths = []
    for number in range(items):
        path = folder / f"person-{number % 40:02}" / f"{number:05}{ENDINGS[number % len(ENDINGS)]}"
        paths.append(path)
        if path.exists():
            continue
        dice = np.random.default_rng(number)
        size = (width, width * 3 // 4)
        smooth = Image.fromarray(dice.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        noise = Image.effect_noise(size, 20).convert("RGB")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.blend(smooth, noise, 0.1).save(path, **({"compress_level": 1} if path.suffix == ".png" else {}))
    if (there := sum(1 for path in folder.rglob("*.*"))) != items:
        raise SystemExit(f"what is kept has {there:,} pictures, not {items:,}: name another folder")
    return paths


def loop(channel: Channel, job: Alone) -> None:
    """Body of the process that only reads and computes."""
    model = recipe({}).load("cpu")
    with ThreadPoolExecutor(job.plan.decoders) as threads:
        begin, before = time.perf_counter(), time.process_time()
        if job.how == "Pillow loop":
            rows = [plainly(path) for path in job.files]
        elif job.how == "Pillow threads":
            rows = list(threads.map(plainly, job.files))
        else:
            rows = [item.array for item in threads.map(lambda path: model.prepare(path, None, None), job.files)]
        taken = time.perf_counter() - begin, time.process_time() - before
    assert len(rows) == len(job.files)
    channel.send(taken)


def plainly(path: Path) -> np.ndarray:
    """The model's vector without embstore's reading of pictures."""
    with Image.open(path) as picture:
        return statistics(np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)))


if __name__ == "__main__":
    start(__file__)
