"""Which runtime computes a network: the fastest on the device that is installed and gives the same vectors.

CUDA    PyTorch for a checkpoint, ONNX Runtime for a graph
CPU     OpenVINO, if it is installed, in bfloat16 where the processor has it; else as on CUDA
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, cast

from embstore.errors import ModelError, described
from embstore.models.wespeaker import checkpoint, compiled, graph, proof
from embstore.models.wespeaker.compiled import Compiled
from embstore.models.wespeaker.families import Family
from embstore.models.wespeaker.model import Encoder
from embstore.models.wespeaker.network import Network, Precision, has_bf16
from embstore.models.wespeaker.source import Source

if TYPE_CHECKING:
    import torch

Runtime = Literal["auto", "pytorch", "onnxruntime", "openvino"]


def load(source: Source, bins: int, *, precision: Precision, runtime: Runtime, device: str) -> Encoder:
    """The network of a model's files on a device. Raises ModelError."""
    if runtime == "openvino" and device != "cpu":
        raise ModelError(f"runtime=openvino is for processors, not for {device}: leave it out, or add --gpus none")
    if source.is_onnx:
        return _of_graph(source, bins, precision, runtime, device)
    return _of_checkpoint(source, bins, precision, runtime, device)


def _of_checkpoint(source: Source, bins: int, precision: Precision, runtime: Runtime, device: str) -> Encoder:
    # Only a source with an architecture of a known family has a checkpoint.
    family, architecture = cast(Family, source.family), cast(str, source.architecture)
    network = checkpoint.load(source.weights, family.module, architecture, source.arguments)

    def plain() -> list[torch.Tensor]:
        return [_embedding(network(one)) for one in proof.examples(bins)]

    def make(dtype: str, threads: int) -> Compiled:
        return compiled.of_module(network, bins, dtype, threads)

    if found := _compiled(make, plain, bins, precision, runtime, device):
        return found
    # A batch on a processor is no faster than its items one by one, so nothing needs to be masked there.
    batching = "single" if device == "cpu" else family.batching
    return Network(network, bins, batching=batching, device=device, precision=precision)


def _of_graph(source: Source, bins: int, precision: Precision, runtime: Runtime, device: str) -> Encoder:
    plain = graph.Graph(source.weights, device)

    def expected() -> list[torch.Tensor]:
        return [plain.encode(one, [one.shape[1]]) for one in proof.examples(bins)]

    def make(dtype: str, threads: int) -> Compiled:
        return compiled.of_graph(source.weights, dtype, threads)

    if found := _compiled(make, expected, bins, precision, runtime, device):
        return found
    if precision not in ("auto", "fp32"):
        raise ModelError(f"ONNX Runtime computes {source.weights} as it is: leave precision={precision} out")
    return plain


def _compiled(
    make: Callable[[str, int], Compiled],
    expected: Callable[[], Sequence[torch.Tensor]],
    bins: int,
    precision: Precision,
    runtime: Runtime,
    device: str,
) -> Compiled | None:
    """What OpenVINO makes of a network, in the lowest precision that will do; None if it is not for it to run.

    Raises ModelError if it was asked for and can't.
    """
    if device != "cpu" or runtime not in ("auto", "openvino"):
        return None
    reason = f"it is not installed; type: {compiled.INSTALL}"
    if compiled.is_installed():
        reason = f"it computes no {precision} on this processor"
        for dtype, least in _dtypes(precision):
            try:
                found = _proven(make, expected, bins, dtype, least)
            # Somebody else's compiler on somebody else's network.
            except Exception as error:  # noqa: BLE001
                reason = described(error)[:200]
                continue
            if found:
                return found
            reason = f"its vectors in {dtype} are not those of the network"
    if runtime == "openvino":
        raise ModelError(f"OpenVINO can't run this model ({reason}); leave runtime=openvino out")
    return None


def _dtypes(precision: Precision) -> list[tuple[str, float]]:
    """What to try, in this order, and the cosine that it has to reach."""
    single, half = ("f32", proof.SAME), ("bf16", proof.CLOSE if precision == "auto" else -1.0)
    if precision == "auto":
        return [half, single] if has_bf16() else [single]
    if precision == "bf16":
        return [half] if has_bf16() else []
    return [single] if precision == "fp32" else []


def _proven(
    make: Callable[[str, int], Compiled],
    expected: Callable[[], Sequence[torch.Tensor]],
    bins: int,
    dtype: str,
    least: float,
) -> Compiled | None:
    import torch

    with torch.inference_mode():
        wanted = expected()
    found = make(dtype, torch.get_num_threads())
    rows = [found.encode(one, [one.shape[1]]) for one in proof.examples(bins)]
    return found if proof.lowest_cosine(rows, wanted) >= least else None


def _embedding(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The last of several, as in wespeaker.cli.speaker."""
    return output[-1] if isinstance(output, tuple) else output
