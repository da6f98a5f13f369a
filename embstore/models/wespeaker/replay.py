"""CUDA graphs of small batches that come again and again: one launch in place of a thousand.

A batch of a few seconds takes a GPU less time than the processor takes to launch its kernels. Recorded once for its
shape, it is launched as a whole. Large batches gain nothing. Off unless asked for (`cuda_graphs=on`): no GPU was at
hand to show that it pays, or to run it; `benchmarks/gpu_extract.py --cuda-graphs` measures it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SMALL = 16_000
"""Frames of a batch, padding included, from which on its kernels take longer than their launch."""
_FREQUENT = 3
"""How often a shape has to come before it is recorded."""
_MOST = 64
"""Recordings that are kept."""

Shape = tuple[int, ...]
Run = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


@dataclass
class _Recording:
    graph: Any
    features: torch.Tensor
    lengths: torch.Tensor
    output: torch.Tensor


class Replay:
    """The recordings of one network on one GPU."""

    def __init__(self, run: Run) -> None:
        """`run(features, lengths)` sends a batch through the network; it may not depend on anything else."""
        import torch

        self._run = run
        self._seen: Counter[Shape] = Counter()
        self._recordings: dict[Shape, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The vectors of features [rows, frames, bins] with `lengths`, int64 [rows], both on the GPU."""
        shape = tuple(features.shape)
        recording = self._recordings.get(shape)
        if recording is None:
            self._seen[shape] += 1
            if self._seen[shape] < _FREQUENT or len(self._recordings) >= _MOST:
                return self._run(features, lengths)
            recording = self._recordings[shape] = self._record(features, lengths)
        recording.features.copy_(features)
        recording.lengths.copy_(lengths)
        recording.graph.replay()
        # The recordings share their memory: the next one that is replayed writes over this output.
        return recording.output.clone()

    def _record(self, features: torch.Tensor, lengths: torch.Tensor) -> _Recording:
        import torch

        kept_features, kept_lengths = features.clone(), lengths.clone()
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run(kept_features, kept_lengths)  # libraries set themselves up in the first pass
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._run(kept_features, kept_lengths)
        return _Recording(graph, kept_features, kept_lengths, output)
