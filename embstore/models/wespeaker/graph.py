"""A WeSpeaker model exported to ONNX (wespeaker/bin/export_onnx.py), run by ONNX Runtime; needs no wespeaker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from embstore.errors import ModelError
from embstore.models import onnx
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
    session = onnx.session(file, "cpu", threads=1, install=INSTALL, optimize=False)
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

        self._session = onnx.session(file, device, threads=torch.get_num_threads(), install=INSTALL)
        feats = self._session.get_inputs()[0]
        self._input, self._output = feats.name, self._session.get_outputs()[0].name
        self.batching: Batching = "single" if isinstance(feats.shape[0], int) else "equal"

    def encode(self, features: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:  # noqa: ARG002
        """Features [rows, frames, bins], all frames valid: float32 [rows, dim] in memory."""
        import torch

        return torch.from_numpy(self._session.run([self._output], {self._input: features.cpu().numpy()})[0])
