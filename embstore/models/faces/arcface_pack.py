"""InsightFace's packs of ONNX files: which file does what, read from the graphs themselves."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embstore.errors import ModelError, UsageError, described, first_line
from embstore.models.faces import scrfd

INSTALL = "type: pip install 'embstore[arcface]'"
HOME = "~/.insightface/models"
"""Where the package keeps its packs."""
_RELEASE = "https://github.com/deepinsight/insightface/releases/download/model-zoo"
_FIRST = 8
"""Nodes at a graph's beginning among which those that scale its input are."""


@dataclass(frozen=True)
class Pack:
    """A detector and a recogniser."""

    name: str
    detector: Path
    detector_side: int | None
    """Side of the square that the detector takes; None: any."""
    recogniser: Path
    side: int
    """Side of a face, in pixels."""
    dim: int
    scales_itself: bool
    """Whether the recogniser takes values from 0 to 255; else from -1 to 1."""


@dataclass(frozen=True)
class _Graph:
    """What routes a file, as in the package's `model_zoo.py`."""

    file: Path
    input: tuple[int, ...]
    """Shape of the first input; 0 where it is any."""
    outputs: int
    dim: int
    scales_itself: bool


def folder_of(variant: str) -> Path:
    """The folder of a pack that was downloaded, or is now, if the package insightface is there. Raises ModelError."""
    folder = Path(HOME).expanduser() / variant
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("insightface") is None:
        raise ModelError(
            f"model arcface: there is no {folder}; unpack {_RELEASE}/{variant}.zip there, or elsewhere and type"
            " --model-dir (or: pip install insightface, which downloads it)"
        )
    try:
        # Its notes belong on stderr: stdout is for results.
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module("insightface.utils.storage").ensure_available("models", variant)
    # Network, disk, archive, the address's answer: whatever goes wrong in there, it is one line for a person.
    except Exception as error:
        reason = described(error)
        raise ModelError(
            f"model arcface: {variant} can't be downloaded ({reason}); unpack {_RELEASE}/{variant}.zip yourself, and"
            " type --model-dir with the folder"
        ) from error
    return folder


def read(folder: Path) -> Pack:
    """The pack in a folder: of several files for one purpose, the first by name. Raises UsageError and ModelError."""
    if not folder.is_dir():
        raise UsageError(f"model arcface: there is no folder {folder}; correct model_dir")
    inner = folder / folder.name  # some packs are zipped with a folder round them
    graphs = [_graph(file) for file in sorted((inner if inner.is_dir() else folder).glob("*.onnx"))]
    detector = next((graph for graph in graphs if graph.outputs >= 5), None)
    recogniser = next((graph for graph in graphs if _is_recogniser(graph)), None)
    if detector is None or recogniser is None:
        missing = "detector" if detector is None else "recogniser"
        raise ModelError(f"model arcface: of the {len(graphs)} .onnx files in {folder}, none is a {missing}")
    if detector.outputs not in scrfd.LAYOUTS:
        raise ModelError(
            f"model arcface: the detector {detector.file} finds no eyes, nose and mouth, without which a face can't be"
            " aligned; take one that has 9 or 15 outputs"
        )
    if not recogniser.dim:
        raise ModelError(f"model arcface: {recogniser.file} does not say how long its vectors are")
    return Pack(
        folder.name,
        detector.file,
        detector.input[-1] or None,
        recogniser.file,
        recogniser.input[2],
        recogniser.dim,
        recogniser.scales_itself,
    )


def _is_recogniser(graph: _Graph) -> bool:
    *_, high, wide = graph.input
    return graph.outputs == 1 and high == wide >= 112 and (high % 112 == 0 or high % 128 == 0)


def _graph(file: Path) -> _Graph:
    """What a file says of itself. Raises ModelError."""
    try:
        import onnx
    except ImportError as error:
        raise ModelError(f"{file} needs the package onnx to be read, which is not installed; {INSTALL}") from error
    try:
        graph = onnx.load(str(file), load_external_data=False).graph
        shapes = [_shape(value) for value in (graph.input[0], graph.output[0])]
    # Of a file that is something else, it raises whatever it stumbles over.
    except Exception as error:
        reason = first_line(error)
        raise ModelError(f"{file} can't be read as an ONNX model: {reason}") from error
    first = [node.name for node in graph.node[:_FIRST]]
    # The package's own way to tell models from MXNet, which begin with `_minusscalar0` and `_mulscalar0`.
    scales = all(any(name.startswith(starts) for name in first) for starts in (("Sub", "_minus"), ("Mul", "_mul")))
    return _Graph(file, shapes[0], len(graph.output), shapes[1][-1] if shapes[1] else 0, scales)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(dimension.dim_value) for dimension in value.type.tensor_type.shape.dim)
