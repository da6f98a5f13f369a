"""FaceNet: 512 numbers a face, by facenet-pytorch's MTCNN and InceptionResnetV1.

Method: F. Schroff et al., FaceNet: A Unified Embedding for Face Recognition and Clustering, CVPR 2015; detector:
K. Zhang et al., Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks, 2016. Both
networks, their parameters and the cropping are the package's own, so the vectors are those of
`InceptionResnetV1(pretrained="vggface2").eval()(MTCNN()(picture))`.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embstore.errors import ItemSkipped, ModelError, UsageError, first_line
from embstore.models.base import Face, Media, Model, Prepared, Recipe
from embstore.models.common import fingerprint, require_known, unusable
from embstore.models.faces import facenet_package as package

if TYPE_CHECKING:
    import torch

DIM = 512
SIDE = 160
"""Pixels of both sides of a face."""
DEFAULT = "vggface2"

_OPTIONS = ("model_dir", "variant", "min_face", "margin")
_TRAINING_ONLY = "logits."
"""The classifier over the people of the training set."""
_COUNTER = "num_batches_tracked"
_CPU_FACES = 16
_CUDA_FACES = 256


def recipe(options: Mapping[str, str]) -> Recipe:
    """The recipe of `variant` (vggface2, casia-webface), which is downloaded once, or of `model_dir`.

    `model_dir` is a file of weights, or a folder that holds the variant's. `min_face` is the side of the smallest face
    to find and `margin` what is added round it, in pixels, as in the package. Raises UsageError and ModelError.
    """
    require_known("facenet", options, _OPTIONS)
    variant = options.get("variant", DEFAULT)
    place = options.get("model_dir")
    if variant not in package.WEIGHTS:
        raise UsageError(f"there is no model facenet:{variant}; there are: {', '.join(package.WEIGHTS)}")
    weights = None if place is None else _weights(Path(place).expanduser().resolve(), variant)
    return FacenetRecipe(variant, weights, _pixels(options, "min_face", 20, 12), _pixels(options, "margin", 0, 0))


def _weights(place: Path, variant: str) -> Path:
    file = place / package.WEIGHTS[variant] if place.is_dir() else place
    if not file.is_file():
        raise UsageError(f"model facenet: there is no file of weights {file}; correct model_dir")
    return file


def _pixels(options: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = options.get(name, str(default))
    if not (text.isdecimal() and least <= int(text) <= 1000):
        raise UsageError(f"model facenet: {name}={text} is not a number of pixels, {least} to 1000")
    return int(text)


@dataclass(frozen=True)
class FacenetRecipe:
    """FaceNet with the weights of a variant."""

    media: ClassVar[Media] = "image"
    dim: ClassVar[int] = DIM

    variant: str
    weights: Path | None
    """None: those that the package downloads."""
    min_face: int
    margin: int

    @property
    def name(self) -> str:
        """`facenet`, or with the variant where that is not the default."""
        return "facenet" if self.variant == DEFAULT else f"facenet:{self.variant}"

    @property
    def settings(self) -> Mapping[str, Any]:
        """Preprocessing, as JSON."""
        return {
            "detector": {"name": "mtcnn", "min_face": self.min_face, "thresholds": [0.6, 0.7, 0.7], "factor": 0.709},
            "face": {
                "which": "largest",
                "side": SIDE,
                "margin": self.margin,
                "alignment": "none",
                "scaling": "bilinear",
            },
            "transparent": "white",
            "pixels": "(value - 127.5) / 128",
            "normalized": True,
        }

    def fingerprint(self) -> str:
        """SHA-256 of the settings and of all weights, the detector's too; downloads them. Raises ModelError."""
        return fingerprint("facenet", self.settings, (*package.detector_files(), self.weights_file()))

    def weights_file(self) -> Path:
        """Where the weights are; downloads them if nobody has. Raises ModelError."""
        return self.weights or package.downloaded(self.variant)

    def load(self, device: str) -> Model:
        """Load it on `cpu` or `cuda:N`. Raises ModelError."""
        return Facenet(self.weights_file(), device, self.min_face, self.margin)


class Facenet:
    """The detector and the network on one device."""

    def __init__(self, weights: Path, device: str, min_face: int, margin: int) -> None:
        import torch

        network = _filled(package.network(), weights)
        # TF32, cuDNN's default, has 10 bits: a GPU's vectors would differ from a processor's.
        torch.backends.cudnn.allow_tf32 = False
        try:
            self._device = torch.device(device)
            self._network = network.eval().to(self._device)
            self._detector = package.detector(self._device, min_face, margin)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(unusable("facenet", device, error)) from error
        self._min_face = min_face
        # A GPU works on one picture at a time anyway; side by side they would only take more of its memory.
        on_cpu = self._device.type == "cpu"
        self._turn: contextlib.AbstractContextManager[object] = contextlib.nullcontext() if on_cpu else threading.Lock()
        self._of_thread = threading.local()
        self.max_cost = _CPU_FACES if on_cpu else _CUDA_FACES

    def prepare(self, path: Path, start: float | None, duration: float | None) -> Prepared:  # noqa: ARG002
        """Find the largest face of a picture: float32 [3, 160, 160]. Raises ItemFailed, and ItemSkipped `no_face`."""
        from PIL import Image

        from embstore.media import image

        picture = Image.fromarray(image.read(path))
        self._use_one_core()
        with self._turn:
            boxes, scores = self._detect(picture)
            pixels = self._detector.extract(picture, boxes[:1], None)
        left, top, right, bottom = (float(edge) for edge in boxes[0])
        face = Face(left, top, right - left, bottom - top, float(scores[0]), len(boxes))
        return Prepared(pixels.numpy(), 0.0, 1, face)

    def embed(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """Embed a batch: float32 [len(batch), 512], unit length."""
        import torch

        if not batch:
            return np.empty((0, DIM), np.float32)
        faces = torch.from_numpy(np.stack([item.array for item in batch]))
        with torch.inference_mode():
            rows: NDArray[np.float32] = self._network(faces.to(self._device)).cpu().numpy()
        return rows

    def _detect(self, picture: Any) -> tuple[NDArray[np.float32], Sequence[float]]:
        """Boxes [faces, 4] and scores, the largest face first. Raises ItemSkipped."""
        nothing = ItemSkipped("no_face", f"MTCNN finds no face in {picture.width} × {picture.height} pixels")
        # Of a picture that no face fits in, the package makes an error.
        if min(picture.size) < self._min_face:
            raise nothing
        try:
            boxes, scores = self._detector.detect(picture)
        except (RuntimeError, ValueError) as error:
            # So too where its first network takes something for faces that all lie outside.
            if "non-empty" in str(error):
                raise nothing from error
            raise
        if boxes is None:
            raise nothing
        return np.asarray(boxes, np.float32), scores

    def _use_one_core(self) -> None:
        """Let a decoding thread work alone: there is one for each core, and each would bring threads for all cores."""
        if not hasattr(self._of_thread, "alone"):
            import torch

            torch.set_num_threads(1)
            self._of_thread.alone = True


def _filled(network: torch.nn.Module, file: Path) -> torch.nn.Module:
    """Load weights, all of them and no other. Raises ModelError."""
    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        weights = {name: value for name, value in state.items() if not name.startswith(_TRAINING_ONLY)}
        wanted = network.state_dict().keys()
        missing = [name for name in wanted - weights.keys() if not name.endswith(_COUNTER)]
        if missing or weights.keys() - wanted:
            raise ModelError(
                f"model facenet: {file} is no file of weights of InceptionResnetV1: {len(missing)} missing,"
                f" {len(weights.keys() - wanted)} left over"
            )
        network.load_state_dict(weights, strict=False)
    # Of a file that is something else, the unpickler raises whatever it stumbles over.
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"model facenet: {file} is no file of weights of InceptionResnetV1: {first_line(error)}"
        ) from error
    return network
