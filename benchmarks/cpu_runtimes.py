"""One recording at a time through ResNet34 on a processor: PyTorch, torch.compile and OpenVINO, one thread and more.

Networks as embstore loads them (`embstore.models.wespeaker`), with random weights (`networks.py`); the features are
made before the clock starts. torch.compile runs with dynamic shapes, as every recording has another length; what it
takes until each length has come twice is printed first. Cosines are to PyTorch in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import networks
import torch
from common import arguments, in_turns, seconds, show

from embstore.models.wespeaker import compiled, proof
from embstore.models.wespeaker.model import Encoder
from embstore.models.wespeaker.network import Network, Precision, has_bf16

BINS = 80


@dataclass(frozen=True)
class Way:
    """A network in a runtime."""

    encoder: Encoder
    threads: int

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Embed [1, frames, bins]."""
        torch.set_num_threads(self.threads)
        return self.encoder.encode(features, [features.shape[1]])


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--frames", type=int, nargs="+", default=[98, 200, 400], help="default: 98 200 400")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    options = parser.parse_args()
    examples = [torch.randn(1, frames, BINS) for frames in options.frames]
    ways = {name: way for threads in options.threads for name, way in _ways(threads).items()}
    for name, way in ways.items():
        print(f"{name}: warm after {seconds(partial(_embed, way, examples * 2)):.1f} s", flush=True)
    (first, plain), *_ = ways.items()
    for example in examples:
        print(f"\n{example.shape[1]} frames")
        times = in_turns(options.rounds, {name: partial(seconds, partial(way, example)) for name, way in ways.items()})
        show(times)
        for name, way in ways.items():
            cosine = proof.lowest_cosine([way(example)], [plain(example)])
            print(f"{name}: {median(times[first]) / median(times[name]):.2f} times the speed, cosine {cosine:.7f}")


def _embed(way: Way, examples: Sequence[torch.Tensor]) -> None:
    for example in examples:
        way(example)


def _ways(threads: int) -> dict[str, Way]:
    torch.set_num_threads(threads)
    ways: dict[str, Encoder] = {}
    precisions: list[tuple[Precision, str]] = [("fp32", "f32"), ("bf16", "bf16")]
    for precision, dtype in precisions[: 1 + has_bf16()]:
        plain, graph = (
            Network(networks.build("ResNet34"), BINS, batching="single", device="cpu", precision=precision)
            for _ in range(2)
        )
        graph._module.compile(dynamic=True)
        ways |= {f"PyTorch {precision}": plain, f"torch.compile {precision}": graph}
        if compiled.is_installed():
            ways[f"OpenVINO {precision}"] = compiled.of_module(networks.build("ResNet34"), BINS, dtype, threads)
    return {f"{name}, threads: {threads}": Way(encoder, threads) for name, encoder in ways.items()}


if __name__ == "__main__":
    main()
