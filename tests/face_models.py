"""Small face models with random weights in the files that the real loaders read; photos out of installed packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest


def packages(*names: str) -> pytest.MarkDecorator:
    """Skip a test where a package that only developers have is absent."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def photo(name: str) -> Path:
    """A photo with a face, or a group of them, out of a package that carries it."""
    package, path = {
        "one": ("skimage", "data/astronaut.png"),
        "several": ("insightface", "data/images/t1.jpg"),
        "none": ("skimage", "data/coffee.png"),
    }[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package}, whose wheel carries the photo, is not installed")
    return Path(spec.origin).parent / path


def write_detector(file: Path, *, points: bool = True, side: int | None = None, bias: float = -1.5) -> Path:
    """A detector as SCRFD is exported: scores, boxes and points for three strides, two anchors a place."""
    from onnx import TensorProto, helper, numpy_helper, save

    dice = np.random.default_rng(7)
    nodes, weights, outputs = [], [], []
    for kind, width in (("score", 1), ("box", 4), ("kps", 10))[: 3 if points else 2]:
        for stride in (8, 16, 32):
            name = f"{kind}_{stride}"
            shape = (2 * width, 3, stride, stride)
            kernel = dice.normal(0, 1.5 / stride, shape).astype(np.float32)
            offset = np.full(2 * width, bias if kind == "score" else 0.0, np.float32)
            if kind == "box":
                kernel, offset = kernel / 10, np.full(2 * width, 2.5, np.float32)
            weights += [
                numpy_helper.from_array(kernel, f"{name}_w"),
                numpy_helper.from_array(offset, f"{name}_b"),
                numpy_helper.from_array(np.array([-1, width]), f"{name}_shape"),
            ]
            nodes += [
                helper.make_node(
                    "Conv", ["input.1", f"{name}_w", f"{name}_b"], [f"{name}_c"], strides=[stride, stride], name=name
                ),
                helper.make_node("Transpose", [f"{name}_c"], [f"{name}_t"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [f"{name}_t", f"{name}_shape"], [f"{name}_r"]),
                helper.make_node("Sigmoid" if kind == "score" else "Identity", [f"{name}_r"], [name]),
            ]
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]))
    size = [side or "h", side or "w"]
    taken = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, *size])
    graph = helper.make_graph(nodes, "detector", [taken], outputs, weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(file))
    return file


def write_recogniser(
    file: Path, *, side: int = 112, dim: int = 24, batch: int | None = None, scales_itself: bool = False
) -> Path:
    """A recogniser as ArcFace is exported: a convolution, its mean, and a vector that is not normalised."""
    from onnx import TensorProto, helper, numpy_helper, save

    dice = np.random.default_rng(8)
    places = (side // 7 // 4) ** 2
    weights = [
        numpy_helper.from_array(dice.normal(0, 0.1, (12, 3, 7, 7)).astype(np.float32), "w"),
        numpy_helper.from_array(dice.normal(0, 1, (12 * places, dim)).astype(np.float32), "m"),
    ]
    nodes = []
    into = "data"
    if scales_itself:
        weights += [numpy_helper.from_array(np.float32(127.5), "k"), numpy_helper.from_array(np.float32(1 / 128), "s")]
        nodes += [
            helper.make_node("Sub", ["data", "k"], ["minus"], name="_minusscalar0"),
            helper.make_node("Mul", ["minus", "s"], ["scaled"], name="_mulscalar0"),
        ]
        into = "scaled"
    nodes += [
        helper.make_node("Conv", [into, "w"], ["c"], strides=[7, 7], name="Conv_0"),
        helper.make_node("Tanh", ["c"], ["t"]),
        helper.make_node("AveragePool", ["t"], ["p"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["out"]),
    ]
    taken = helper.make_tensor_value_info("data", TensorProto.FLOAT, [batch or "n", 3, side, side])
    given = helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch or "n", dim])
    graph = helper.make_graph(nodes, "recogniser", [taken], [given], weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(file))
    return file


def write_pack(folder: Path) -> Path:
    """A pack as InsightFace's: a detector and a recogniser, and files for other purposes that come before them."""
    folder.mkdir(parents=True)
    write_recogniser(folder / "1k3d68.onnx", side=192, dim=30)
    write_recogniser(folder / "genderage.onnx", side=96, dim=3)
    write_detector(folder / "det_10g.onnx")
    write_recogniser(folder / "w600k_r50.onnx")
    return folder


def write_network(file: Path, *, side: int = 160, dim: int = 512) -> Path:
    """A network as deepface exports its own: pixels [n, side, side, 3] to a vector that is not normalised."""
    from onnx import TensorProto, helper, numpy_helper, save

    dice = np.random.default_rng(9)
    weights = [
        numpy_helper.from_array(dice.normal(0, 0.1, (12, 3, 8, 8)).astype(np.float32), "w"),
        numpy_helper.from_array(dice.normal(0, 1, (12, dim)).astype(np.float32), "m"),
    ]
    nodes = [
        helper.make_node("Transpose", ["input"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "w"], ["c"], strides=[8, 8]),
        helper.make_node("Tanh", ["c"], ["h"]),
        helper.make_node("GlobalAveragePool", ["h"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["out"]),
    ]
    taken = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", side, side, 3])
    given = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", dim])
    graph = helper.make_graph(nodes, "network", [taken], [given], weights)
    file.parent.mkdir(parents=True, exist_ok=True)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(file))
    return file
