"""ArcFace: InsightFace's recognisers and detectors, by ONNX Runtime from the same files.

Method: J. Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, CVPR 2019. Detection, alignment
by five points and scaling are those of the package insightface (2.1), so the vectors are its `normed_embedding` of the
largest face. Its files are used without it, because it recognises every face of a picture, one at a time, and brings a
dozen packages along (OpenCV with windows, SciPy, scikit-image) that no embedding needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embstore.errors import ItemSkipped, ModelError, UsageError
from embstore.models import onnx
from embstore.models.base import Face, Media, Model, Prepared, Recipe
from embstore.models.common import fingerprint, require_known
from embstore.models.faces import align, arcface_pack, scrfd
from embstore.models.faces.arcface_pack import INSTALL, Pack

DEFAULT = "buffalo_l"

_OPTIONS = ("model_dir", "variant", "det_size")
_CPU_FACES = 8
_CUDA_FACES = 128


def recipe(options: Mapping[str, str]) -> Recipe:
    """The recipe of the pack `variant` (buffalo_l, buffalo_s, antelopev2, …) or of the folder `model_dir`.

    `det_size` is the side, in pixels, of the square in which faces are searched, or auto: 128 and 640, as the package
    does by itself. Raises UsageError and ModelError.
    """
    require_known("arcface", options, _OPTIONS)
    variant, place = options.get("variant", DEFAULT), options.get("model_dir")
    if not variant or Path(variant).name != variant:
        raise UsageError(
            f"arcface:{variant} is not the name of a pack, such as arcface:{DEFAULT}; for a folder: --model-dir"
        )
    if place is not None and "variant" in options:
        raise UsageError("model arcface needs either model_dir=FOLDER or the name of a pack, not both")
    folder = Path(place).expanduser().resolve() if place is not None else arcface_pack.folder_of(variant)
    pack = arcface_pack.read(folder)
    return ArcfaceRecipe(pack, _sizes(options.get("det_size", "auto"), pack))


def _sizes(text: str, pack: Pack) -> tuple[int, ...]:
    if pack.detector_side is not None:
        if text not in ("auto", str(pack.detector_side)):
            raise UsageError(
                f"model arcface: its detector takes {pack.detector_side} pixels a side; leave det_size out"
            )
        return (pack.detector_side,)
    if text == "auto":
        return scrfd.SIZES
    if not (text.isdecimal() and 32 <= int(text) <= 4096 and int(text) % 32 == 0):
        raise UsageError(f"model arcface: det_size={text} is neither auto nor a multiple of 32, 32 to 4096")
    return (int(text),)


@dataclass(frozen=True)
class ArcfaceRecipe:
    """One pack."""

    media: ClassVar[Media] = "image"

    pack: Pack
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        """`arcface`, or with the name of the pack or its folder where that is not the default."""
        return "arcface" if self.pack.name == DEFAULT else f"arcface:{self.pack.name}"

    @property
    def dim(self) -> int:
        """Length of its vectors."""
        return self.pack.dim

    @property
    def settings(self) -> Mapping[str, Any]:
        """Preprocessing, as JSON."""
        return {
            "detector": {"sizes": list(self.sizes), "score": scrfd.LEAST_SCORE, "overlap": scrfd.MOST_OVERLAP},
            "face": {"which": "largest", "side": self.pack.side, "alignment": "five points", "outside": "black"},
            "transparent": "white",
            "pixels": "0 to 255" if self.pack.scales_itself else "(value - 127.5) / 127.5",
            "normalized": True,
        }

    def fingerprint(self) -> str:
        """SHA-256 of the settings and of both files. Raises ModelError if one is gone."""
        return fingerprint(self.name, self.settings, (self.pack.detector, self.pack.recogniser))

    def load(self, device: str) -> Model:
        """Load it on `cpu` or `cuda:N`. Raises ModelError."""
        return Arcface(self.pack, self.sizes, device)


class Arcface:
    """Detector and recogniser on one device."""

    def __init__(self, pack: Pack, sizes: tuple[int, ...], device: str) -> None:
        """Load them. Raises ModelError."""
        try:
            import cv2
        except ImportError as error:
            raise ModelError(f"model arcface needs OpenCV, which is not installed; {INSTALL}") from error
        # There are as many decoding threads as cores, and each would bring threads for all of them.
        cv2.setNumThreads(1)
        self._pack = pack
        self._detector = scrfd.Detector(pack.detector, device, sizes, INSTALL)
        self._session = onnx.session(pack.recogniser, device, threads=onnx.worker_threads(), install=INSTALL)
        taken = self._session.get_inputs()[0]
        self._input, self._one_by_one = taken.name, taken.shape[0] == 1
        self.max_cost = _CPU_FACES if device == "cpu" else _CUDA_FACES

    def prepare(self, path: Path, start: float | None, duration: float | None) -> Prepared:  # noqa: ARG002
        """Find the largest face of a picture: float32 [3, side, side]. Raises ItemFailed, ItemSkipped `no_face`."""
        from embstore.media import image

        pixels = image.read(path)
        found = self._detector.detect(pixels)
        if not len(found.boxes):
            height, width = pixels.shape[:2]
            raise ItemSkipped("no_face", f"{self._pack.detector.name} finds no face in {width} × {height} pixels")
        areas = (found.boxes[:, 2] - found.boxes[:, 0]) * (found.boxes[:, 3] - found.boxes[:, 1])
        largest = int(areas.argmax())
        left, top, right, bottom = (float(edge) for edge in found.boxes[largest])
        face = Face(left, top, right - left, bottom - top, float(found.scores[largest]), len(found.boxes))
        aligned = align.upright(pixels, found.points[largest], self._pack.side)
        return Prepared(self._scaled(aligned), 0.0, 1, face)

    def embed(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """Embed a batch: float32 [len(batch), dim], unit length."""
        if not batch:
            return np.empty((0, self._pack.dim), np.float32)
        faces = np.stack([item.array for item in batch])
        parts = [faces[i : i + 1] for i in range(len(faces))] if self._one_by_one else [faces]
        rows = np.concatenate([self._session.run(None, {self._input: part})[0] for part in parts])
        # Where a row is zero or not finite, it stays so: whoever writes it refuses it, and says why.
        unit = rows.astype(np.float64)
        norms = np.linalg.norm(unit, axis=1, keepdims=True)
        np.divide(unit, norms, where=norms > 0, out=unit)
        return unit.astype(np.float32)

    def _scaled(self, face: NDArray[np.uint8]) -> NDArray[np.float32]:
        values = face.astype(np.float32).transpose(2, 0, 1)
        if not self._pack.scales_itself:
            values = (values - np.float32(127.5)) * np.float32(1 / 127.5)
        return np.ascontiguousarray(values)
