"""A network compiled by OpenVINO for the processor: twice as fast as PyTorch there, where it has bfloat16 three times.

The network is cut in front of its pooling layer. What lies before it is nearly all of the work, and may be done in
bfloat16; the pooling takes differences of large numbers and stays in float32 (SimAM-ResNet34 with attentive pooling:
cosine 0.9997 without the cut, 0.99999 with it).

One recording at a time: batches are no faster there. A length that has not come for a while takes 10 ms more, and those
that have are remembered: 0.9 MB each, for some 400 of them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embstore.models.wespeaker.families import Batching

if TYPE_CHECKING:
    import torch

INSTALL = "pip install 'embstore[wespeaker-openvino]'"
_EXAMPLE_FRAMES = 187
_SEGMENT = 100
"""Frames over which CAM++ averages."""


def is_installed() -> bool:
    """Whether there is OpenVINO."""
    return importlib.util.find_spec("openvino") is not None


class Compiled:
    """One or two compiled parts, in a row."""

    batching: Batching = "single"

    def __init__(self, parts: Sequence[Any]) -> None:
        self._requests = [part.create_infer_request() for part in parts]

    def encode(self, features: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:  # noqa: ARG002
        """Features [1, frames, bins], all frames valid: float32 [1, dim]."""
        import torch

        value = features.numpy()
        for request in self._requests:
            request.infer([value], share_inputs=True)
            value = request.get_output_tensor(0).data
        return torch.from_numpy(value.copy())


def of_module(module: torch.nn.Module, bins: int, dtype: str, threads: int) -> Compiled:
    """A module in eval mode, compiled in `f32` or `bf16`. What goes wrong in there may be any exception."""
    with warnings.catch_warnings(), _safe_segments(module):
        warnings.simplefilter("ignore")  # of tracing
        first, *rest = _converted(module, bins)
    first.reshape([1, -1, bins])
    return Compiled([_compile(first, dtype, threads), *(_compile(part, "f32", threads) for part in rest)])


def of_graph(file: Path, dtype: str, threads: int) -> Compiled:
    """An ONNX file, compiled in `f32` or `bf16`. What goes wrong in there may be any exception."""
    return Compiled([_compile(_core().read_model(file), dtype, threads)])


@functools.cache
def _core() -> Any:
    """The only one of this process, which stays.

    Each gives its thread a stack for handling signals. When several go, not the last one first, the thread is left with
    a stack that is gone: the next signal, be it Ctrl+C or the end of a child, would kill the process without a word.
    """
    import openvino

    return openvino.Core()


def _compile(model: Any, dtype: str, threads: int) -> Any:
    options = {
        "INFERENCE_PRECISION_HINT": dtype,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        # Several workers would all be bound to the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    return _core().compile_model(model, "CPU", options)


def _converted(module: torch.nn.Module, bins: int) -> list[Any]:
    """A module as OpenVINO's models: cut in front of its pooling layer, or whole if that cannot be done."""
    import torch

    # Not `openvino.convert_model`: that one may report its use over the network.
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    example = torch.randn(1, _EXAMPLE_FRAMES, bins, generator=torch.Generator().manual_seed(1))
    traced = _traceable(module, _pooling(module))
    frontend = FrontEndManager().load_by_framework("pytorch")
    with torch.no_grad():
        outputs = traced(example)
        decoder = TorchScriptPythonDecoder(traced, example_input=(example,))  # has to outlive the conversion
        model = frontend.convert(frontend.load(decoder))
    return _cut(model, outputs[1].shape) if len(outputs) == 2 else [model]


def _cut(model: Any, shape: Sequence[int]) -> list[Any]:
    """A model with the outputs `embedding` and `before pooling`, of which the last axis is time, cut at the second."""
    import openvino

    embedding, before = (output.get_node() for output in model.outputs)
    between = openvino.opset13.parameter([*shape[:-1], -1], openvino.Type.f32)
    for place in before.input_value(0).get_target_inputs():
        if place.get_node() != before:
            place.replace_source_output(between.output(0))
    return [openvino.Model([before], model.get_parameters()), openvino.Model([embedding], [between])]


def _pooling(module: torch.nn.Module) -> torch.nn.Module | None:
    """The one pooling layer of a network, which may have others inside it; None if it has several, or none."""
    found: list[torch.nn.Module] = []
    for child in module.modules():  # from the outside in
        if type(child).__module__.endswith(".pooling_layers") and not any(child in other.modules() for other in found):
            found.append(child)
    return found[0] if len(found) == 1 else None


def _traceable(network: torch.nn.Module, pooling: torch.nn.Module | None) -> torch.nn.Module:
    """What gives the embedding, the last of a network's outputs, and what goes into its pooling layer."""
    import torch

    class Traceable(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
            seen: list[torch.Tensor] = []
            if pooling is not None:
                handle = pooling.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            output = self.network(features)
            if pooling is not None:
                handle.remove()
            return output[-1] if isinstance(output, tuple) else output, *seen

    return Traceable().eval()


@contextlib.contextmanager
def _safe_segments(module: torch.nn.Module) -> Iterator[None]:
    """CAM++ averages over each 100 frames with `ceil_mode`, which OpenVINO gets wrong below 100 frames."""
    layers: list[Any] = [child for child in module.modules() if type(child).__name__ == "CAMLayer"]
    for layer in layers:
        layer.seg_pooling = _by_segment
    try:
        yield
    finally:
        for layer in layers:
            del layer.seg_pooling


def _by_segment(x: torch.Tensor) -> torch.Tensor:
    """The mean of each segment [rows, channels, frames], the last one maybe shorter, repeated over it."""
    from torch.nn.functional import avg_pool1d, pad

    def sums(values: torch.Tensor) -> torch.Tensor:
        return avg_pool1d(pad(values, (0, _SEGMENT - 1)), _SEGMENT, _SEGMENT)

    means = sums(x) / sums(x[:, :1] * 0 + 1)
    return means.repeat_interleave(_SEGMENT, -1)[..., : x.shape[-1]]
