"""deepface (MIT): its own choice of detectors and networks, through the package itself.

The vectors are those of `DeepFace.represent(picture, max_faces=1)`. Of the three engines that its networks come for,
the ONNX graphs are taken: the same weights without TensorFlow, and with nothing to convert.

Source of the steps: `deepface/modules/representation.py` of deepface 0.0.103.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embstore.errors import ItemSkipped, ModelError, UsageError, described
from embstore.models import onnx
from embstore.models.base import Face, Media, Model, Prepared, Recipe
from embstore.models.common import fingerprint, require_known

DEFAULT = "VGG-Face"
INSTALL = "type: pip install 'embstore[deepface]'"

NETWORKS = {
    "VGG-Face": ("vgg_face_weights.onnx", 4096),
    "Facenet": ("facenet_weights.onnx", 128),
    "Facenet512": ("facenet512_weights.onnx", 512),
    "OpenFace": ("openface_weights.onnx", 128),
    "DeepFace": ("VGGFace2_DeepFace_weights_val-0.9034.onnx", 4096),
    "DeepID": ("deepid_weights.onnx", 160),
    "ArcFace": ("arcface_weights.onnx", 512),
    "SFace": ("face_recognition_sface_2021dec.onnx", 128),
    "GhostFaceNet": ("ghostfacenet_v1.onnx", 512),
}
"""File and length of vectors of the networks that are ONNX graphs (`models/facial_recognition/onnx`)."""
NORMALIZATIONS = ("base", "raw", "Facenet", "Facenet2018", "VGGFace", "VGGFace2", "ArcFace")

_OPTIONS = ("model_dir", "variant", "detector", "normalization")
_WEIGHTS = Path(".deepface") / "weights"
_CPU_FACES = 8
_CUDA_FACES = 64


def recipe(options: Mapping[str, str]) -> Recipe:
    """The recipe of the network `variant`, whose weights the package downloads once, or that lie in `model_dir`.

    `model_dir` is deepface's home (DEEPFACE_HOME) or the folder `.deepface/weights` in it; `detector` and
    `normalization` are as in `DeepFace.represent`. Raises UsageError.
    """
    require_known("deepface", options, _OPTIONS)
    variant, normalization = options.get("variant", DEFAULT), options.get("normalization", "base")
    if variant not in NETWORKS:
        raise UsageError(f"there is no model deepface:{variant}; there are: {', '.join(NETWORKS)}")
    if normalization not in NORMALIZATIONS:
        raise UsageError(f"model deepface: normalization={normalization} is not one of: {', '.join(NORMALIZATIONS)}")
    return DeepfaceRecipe(variant, _home(options.get("model_dir")), options.get("detector", "opencv"), normalization)


def _home(place: str | None) -> Path:
    if place is None:
        return Path(os.environ.get("DEEPFACE_HOME") or "~").expanduser()
    folder = Path(place).expanduser().resolve()
    if not folder.is_dir():
        raise UsageError(f"model deepface: there is no folder {folder}; correct model_dir")
    return folder.parents[1] if folder.parts[-2:] == _WEIGHTS.parts else folder


@dataclass(frozen=True)
class DeepfaceRecipe:
    """One network of deepface with one of its detectors."""

    media: ClassVar[Media] = "image"

    variant: str
    home: Path
    detector: str
    normalization: str

    @property
    def name(self) -> str:
        """`deepface`, or with the network where that is not deepface's default."""
        return "deepface" if self.variant == DEFAULT else f"deepface:{self.variant}"

    @property
    def dim(self) -> int:
        """Length of its vectors."""
        return NETWORKS[self.variant][1]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Preprocessing, as JSON."""
        return {
            "network": self.variant,
            "engine": "onnx",
            "detector": self.detector,
            "face": {"which": "largest", "alignment": "eyes", "expand_percentage": 0},
            "transparent": "white",
            "normalization": self.normalization,
            "normalized": self.variant == "VGG-Face",
        }

    def fingerprint(self) -> str:
        """SHA-256 of the settings and of the network's file, which is downloaded if need be. Raises ModelError.

        The detector is in it by its name: deepface has one file for each.
        """
        return fingerprint(self.name, self.settings, (self.weights_file(),))

    def weights_file(self) -> Path:
        """Where the network's weights are; deepface downloads them if nobody has. Raises ModelError."""
        file = self.home / _WEIGHTS / NETWORKS[self.variant][0]
        if not file.is_file():
            _built("facial_recognition", self.variant, self.home)
        return file

    def load(self, device: str) -> Model:
        """Load it on `cpu` or `cuda:N`. Raises ModelError."""
        return Deepface(self, device)


class Deepface:
    """A detector, on the processor, and a network on one device."""

    def __init__(self, made: DeepfaceRecipe, device: str) -> None:
        """Load them. Raises ModelError."""
        self._made = made
        self._network = _built("facial_recognition", made.variant, made.home)
        _built("face_detector", made.detector, made.home)
        # In the place of its own session, which takes every core of the machine, and the first GPU.
        threads = onnx.worker_threads()
        self._network.model = onnx.session(made.weights_file(), device, threads=threads, install=INSTALL)
        _module("cv2").setNumThreads(threads)
        # deepface keeps one detector for all threads, and OpenCV's cascades bear but one at a time.
        self._turn = threading.Lock()
        self.max_cost = _CPU_FACES if device == "cpu" else _CUDA_FACES

    def prepare(self, path: Path, start: float | None, duration: float | None) -> Prepared:  # noqa: ARG002
        """Find the largest face: float32 [height, width, 3], blue first. Raises ItemFailed, ItemSkipped `no_face`."""
        from embstore.media import image

        pixels = image.read(path)
        with self._turn:
            found = self._faces(np.ascontiguousarray(pixels[..., ::-1]))
        largest = max(found, key=lambda one: one["facial_area"]["w"] * one["facial_area"]["h"])
        area = largest["facial_area"]
        box = (float(area["x"]), float(area["y"]), float(area["w"]), float(area["h"]))
        preprocessing = _module("deepface.modules.preprocessing")
        width, height = self._network.input_shape
        scaled = preprocessing.resize_image(img=largest["face"][:, :, ::-1], target_size=(height, width))
        ready = preprocessing.normalize_input(img=scaled, normalization=self._made.normalization)
        return Prepared(np.asarray(ready[0], np.float32), 0.0, 1, Face(*box, float(largest["confidence"]), len(found)))

    def embed(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """Embed a batch: float32 [len(batch), dim]; only VGG-Face's are of unit length, as deepface gives them."""
        if not batch:
            return np.empty((0, self._made.dim), np.float32)
        rows = self._network.forward(np.stack([item.array for item in batch]))
        return np.asarray(rows, np.float32).reshape(len(batch), -1)  # of one face it gives no list of lists

    def _faces(self, pixels: NDArray[np.uint8]) -> list[dict[str, Any]]:
        """deepface's faces of pixels [height, width, 3], blue first. Raises ItemSkipped."""
        exceptions = _module("deepface.modules.exceptions")
        try:
            found: list[dict[str, Any]] = _module("deepface.modules.detection").extract_faces(
                img_path=pixels, detector_backend=self._made.detector, align=True, enforce_detection=True
            )
        except (exceptions.FaceNotDetected, exceptions.ImgNotFound) as error:
            height, width = pixels.shape[:2]
            words = f"deepface's detector {self._made.detector} finds no face in {width} × {height} pixels"
            raise ItemSkipped("no_face", words) from error
        return found


def _built(task: str, name: str, home: Path) -> Any:
    """deepface's model of a task, made once a process; it downloads what is missing. Raises ModelError."""
    folders, modeling = _module("deepface.commons.folder_utils"), _module("deepface.modules.modeling")
    # Its notes belong on stderr: stdout is for results.
    with _environment(home), contextlib.redirect_stdout(sys.stderr):
        try:
            folders.initialize_folder()
            return modeling.build_model(task=task, model_name=name)
        # Network, disk, a package that a detector needs, another name: it is one line for a person.
        except Exception as error:
            reason = described(error)
            what = "detector" if task == "face_detector" else "network"
            raise ModelError(f"model deepface: its {what} {name} can't be made: {reason}") from error


@contextlib.contextmanager
def _environment(home: Path) -> Iterator[None]:
    """What deepface reads while it makes a model."""
    values = {"DEEPFACE_HOME": str(home), "DEEPFACE_BACKEND_ENGINE": "onnx", "DEEPFACE_ONNX_PROVIDERS": "cpu"}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _module(name: str) -> ModuleType:
    """A module of the package or of what it needs. Raises ModelError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"model deepface can't be used ({error}); {INSTALL}") from error
