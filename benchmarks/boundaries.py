"""Speaker boundaries: time and memory of `auto` and `cosine` as the set grows, beside `ruptures` where it can run.

The vectors are synthetic, 256-d, and made window by window: their making is timed alone and subtracted. Segments have
N(1000, 100) files unless `--segment` says otherwise. Every run is a process of its own, so that its peak memory is its
own. `ruptures` gets all vectors at once; it is measured if it is installed (`pip install ruptures`), up to `--ruptures`
items: KernelCPD (PELT in C) looks at every place, and Pelt computes the cost of each pair in Python, minutes for 2,000
items.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np

from embstore.boundaries import changepoint, similarity
from embstore.boundaries.evaluate import matches
from embstore.boundaries.result import Window

DIM = 256
NOISE = 0.12
METHODS = ("auto", "cosine", "KernelCPD", "Pelt")


def windows(items: int, segment: float, cuts: list[int], size: int = 20_000) -> Iterator[Window]:
    """Speakers with a common part, as embeddings have it, and noise around each; notes in `cuts` where they change."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=DIM) / np.sqrt(DIM)
    mean, left = common, 0
    for begin in range(0, items, size):
        count = min(size, items - begin)
        rows = rng.standard_normal((count, DIM), dtype=np.float32) * np.float32(np.sqrt(NOISE / DIM))
        at = 0
        while at < count:
            if not left:
                left = max(3, int(rng.normal(segment, segment / 10)))
                mean = common + rng.normal(size=DIM) / np.sqrt(DIM)
                mean /= np.linalg.norm(mean)
                cuts.append(begin + at)
            step = min(left, count - at)
            rows[at : at + step] += mean.astype(np.float32)
            at, left = at + step, left - step
        yield np.arange(begin, begin + count), rows


def measure(method: str, items: int, segment: float) -> None:
    """One line: seconds beyond the making of the vectors, peak memory, boundaries that are right within one file."""
    begin = time.perf_counter()
    cuts: list[int] = []
    for _ in windows(items, segment, cuts):
        pass
    making = time.perf_counter() - begin
    held = [window[1] for window in windows(items, segment, [])] if method in METHODS[2:] else []
    if held:
        importlib.import_module("ruptures")  # Its import takes seconds, which are not the method's.
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begin = time.perf_counter()
    found = with_ruptures(method, np.concatenate(held)) if held else places(method, items, segment)
    took = time.perf_counter() - begin - (0 if held else making)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    right = matches(found, cuts[1:], 1)
    print(
        f"{method:10} {items:>10,} items   {took:>8.2f} s   {1e6 * took / items:>7.1f} µs an item"
        f"   {peak:>7,.0f} MB at most, {peak - base:>6,.0f} more than before"
        f"   {right:,} of {len(cuts) - 1:,} found, {len(found) - right:,} wrong",
        flush=True,
    )


def places(method: str, items: int, segment: float) -> list[int]:
    """Boundaries by embstore."""
    made = windows(items, segment, [])
    if method == "auto":
        result = changepoint.detect(made, items)
    else:
        result = similarity.detect(made, items, segment_size=round(segment))
    return [boundary.position for boundary in result.boundaries]


def with_ruptures(method: str, vectors: np.ndarray) -> list[int]:
    """Boundaries by ruptures, at the penalty that `auto` would charge."""
    import ruptures

    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    penalty = 0.5 * changepoint.BETA * NOISE * np.log(len(units))
    if method == "KernelCPD":
        search = ruptures.KernelCPD(kernel="linear", min_size=changepoint.LEAST)
    else:
        search = ruptures.Pelt(model="l2", min_size=changepoint.LEAST, jump=1)
    return list(search.fit(units).predict(pen=penalty)[:-1])


def main() -> None:
    """Measure every method at every size, each in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="sizes of the set")
    parser.add_argument("--segment", type=float, default=1000, help="files in a segment (default: 1000)")
    parser.add_argument("--ruptures", type=int, default=10_000, help="up to so many items (default: 10000)")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        measure(chosen.one, chosen.items[0], chosen.segment)
        return
    here = importlib.util.find_spec("ruptures") is not None
    for method in METHODS if here else METHODS[:2]:
        for items in chosen.items:
            if method in METHODS[:2] or items <= chosen.ruptures:
                command = [sys.executable, __file__, "--one", method, "--items", str(items)]
                subprocess.run([*command, "--segment", str(chosen.segment)], check=True)
    if not here:
        print("ruptures is not installed: not measured")


if __name__ == "__main__":
    main()
