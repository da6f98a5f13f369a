"""The package facenet-pytorch (MIT): its networks, its detector's weights and its download, and nothing else of it.

It is installed without its dependencies, as its last release (2.6.0, 2024) wants a PyTorch, a Pillow and a NumPy from
before that; its code works with today's. Of torchvision it needs two small functions, which are here: torchvision only
loads beside the very build of PyTorch that it was made for.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embstore.errors import ModelError, described

if TYPE_CHECKING:
    import torch

INSTALL = "type: pip install 'embstore[facenet]'; pip install --no-deps facenet-pytorch"

WEIGHTS = {
    "vggface2": "20180402-114759-vggface2.pt",
    "casia-webface": "20180408-102900-casia-webface.pt",
}
"""Files of `InceptionResnetV1(pretrained=…)`, in its `load_weights`."""
_RELEASE = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"

_NAME = "facenet_pytorch"


def detector_files() -> list[Path]:
    """The detector's weights, which come with the package. Raises ModelError."""
    folder = _folder() / "data"
    return [folder / f"{net}net.pt" for net in "pro"]


def downloaded(variant: str) -> Path:
    """The weights of a variant in PyTorch's cache, downloaded if they are not there yet. Raises ModelError."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or str(Path(cache) / "torch")
    file = Path(home).expanduser() / "checkpoints" / WEIGHTS[variant]
    if file.is_file():
        return file
    download = _imported("models.utils.download")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        download.download_url_to_file(_RELEASE + file.name, str(file))
    # Network, disk, the address's answer: whatever goes wrong in there, it is one line for a person.
    except Exception as error:
        reason = described(error)
        raise ModelError(
            f"model facenet: {file.name} can't be downloaded ({reason}); get it from {_RELEASE} yourself, and type"
            " --model-dir with its path"
        ) from error
    return file


def network() -> torch.nn.Module:
    """InceptionResnetV1 that gives unit vectors [n, 512] of faces [n, 3, 160, 160], without weights yet."""
    found: torch.nn.Module = _imported("models.inception_resnet_v1").InceptionResnetV1()
    return found


def detector(device: torch.device, min_face: int, margin: int) -> Any:
    """MTCNN with its weights: `detect` gives boxes and scores, the largest first, `extract` aligned faces."""
    return _imported("models.mtcnn").MTCNN(min_face_size=min_face, margin=margin, device=device)


def _folder() -> Path:
    spec = importlib.util.find_spec(_NAME)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model facenet: the package facenet-pytorch is not installed; {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def _imported(name: str) -> ModuleType:
    """One module of the package. Raises ModelError if it or what it imports is missing."""
    folder = _folder()
    try:
        with _alone(folder):
            return importlib.import_module(f"{_NAME}.{name}")
    except ImportError as error:
        raise ModelError(f"model facenet: facenet-pytorch can't be used ({error}); {INSTALL}") from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let the package's modules be imported without its own `__init__`, and with these functions for torchvision."""
    hollow = ModuleType(_NAME)
    hollow.__path__ = [str(folder)]
    functional, boxes = ModuleType("torchvision.transforms.functional"), ModuleType("torchvision.ops.boxes")
    functional.to_tensor = _to_tensor  # type: ignore[attr-defined]
    boxes.batched_nms = _batched_nms  # type: ignore[attr-defined]
    transforms = ModuleType("torchvision.transforms")
    transforms.functional = functional  # type: ignore[attr-defined]
    put = {module.__name__: module for module in (hollow, transforms, functional, boxes)}
    put |= {name: ModuleType(name) for name in ("torchvision", "torchvision.ops")}
    before = {name: sys.modules.get(name) for name in put}
    sys.modules.update(put)
    try:
        yield
    finally:
        # Who imports the packages later gets all of them.
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _to_tensor(pixels: NDArray[np.float32]) -> torch.Tensor:
    """[height, width, 3] as [3, height, width]: what torchvision does with floating point."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _batched_nms(boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, limit: float) -> torch.Tensor:
    """Indices of the boxes that no better one of their group covers by more than `limit`, the best first.

    As torchvision's: intersection over union, equal scores in their order, groups kept apart by moving them away from
    each other.
    """
    import torch

    if not len(boxes):
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    apart = boxes + (groups.to(boxes) * (boxes.max() + 1))[:, None]
    left, top, right, bottom = apart.cpu().numpy().T
    areas = (right - left) * (bottom - top)
    order = np.argsort(-scores.cpu().numpy(), kind="stable")
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        wide = np.minimum(right[best], right[rest]) - np.maximum(left[best], left[rest])
        high = np.minimum(bottom[best], bottom[rest]) - np.maximum(top[best], top[rest])
        shared = np.maximum(wide, 0) * np.maximum(high, 0)
        order = rest[shared <= limit * (areas[best] + areas[rest] - shared)]
    return torch.as_tensor(np.array(kept), device=boxes.device)
