"""A WeSpeaker model exported to ONNX (wespeaker/bin/export_onnx.py), run by ONNX Runtime; needs no wespeaker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embstore.errors import ModelError
from embstore.models.wespeaker.families import Batching

if TYPE_CHECKING:
    import torch

INSTALL = "type: pip install 'embstore[wespeaker-onnx]' (on a GPU: pip install onnxruntime-gpu)"


@dataclass(frozen=True)
class Shape:
    """What a graph says of itself."""

    bins: int
    dim: int


def shape(file: Path) -> Shape:
    """Mel bins and length of the vectors, read from the graph; imports ONNX Runtime but no torch. Raises ModelError."""
    session = _session(file, "cpu", threads=1, optimize=False)
    (feats, *others), (embs, *_) = session.get_inputs(), session.get_outputs()
    bins, dim = feats.shape[-1], embs.shape[-1]
    if others or len(feats.shape) != 3 or not isinstance(bins, int) or not isinstance(dim, int):
        raise ModelError(
            f"{file} is no WeSpeaker model: it should take feats [batch, frames, bins] and give embs [batch, dim],"
            f" but takes {feats.shape} and gives {embs.shape}; export it again with wespeaker/bin/export_onnx.py"
        )
    return Shape(bins, dim)


class Graph:
    """One session on one device. Batches hold equal lengths only: nothing can be masked inside a graph."""

    def __init__(self, file: Path, device: str) -> None:
        """Load it. Raises ModelError."""
        import torch

        self._session = _session(file, device, threads=torch.get_num_threads(), optimize=True)
        feats = self._session.get_inputs()[0]
        self._input, self._output = feats.name, self._session.get_outputs()[0].name
        self.batching: Batching = "single" if isinstance(feats.shape[0], int) else "equal"

    def encode(self, features: torch.Tensor, lengths: Sequence[int]) -> NDArray[np.float32]:  # noqa: ARG002
        """Features [rows, frames, bins], all frames valid: float32 [rows, dim]."""
        rows: NDArray[np.float32] = self._session.run([self._output], {self._input: features.cpu().numpy()})[0]
        return rows


def _session(file: Path, device: str, *, threads: int, optimize: bool) -> Any:
    """An inference session. Raises ModelError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError(f"{file} needs ONNX Runtime, which is not installed; {INSTALL}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin while they wait would take the cores from the decoding threads.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    provider: str | tuple[str, dict[str, str]] = "CPUExecutionProvider"
    if device != "cpu":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise ModelError(
                f"{file}: the installed onnxruntime has no CUDA; type: pip uninstall onnxruntime;"
                " pip install onnxruntime-gpu (or run on the CPU with --gpus none)"
            )
        provider = ("CUDAExecutionProvider", {"device_id": device.rpartition(":")[2], "use_tf32": "0"})
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=[provider])
    # ONNX Runtime's own exceptions have no common base but this one.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{file} can't be loaded as an ONNX model on {device}: {reason}") from error
