"""SCRFD and RetinaFace, InsightFace's face detectors, as ONNX files.

Method: J. Guo et al., Sample and Computation Redistribution for Efficient Face Detection, ICLR 2022. What goes in and
how boxes and points come out is that of the package (`model_zoo/scrfd.py`): two sizes, 128 and 640 pixels a side,
scores of 0.5 or more, and of boxes that overlap by more than 0.4 the better one.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embstore.models import onnx

SIZES = (128, 640)
"""Sides of the squares that a picture is fitted into, for a graph that takes any."""
LEAST_SCORE = 0.5
MOST_OVERLAP = 0.4

LAYOUTS = {9: ((8, 16, 32), 2), 15: ((8, 16, 32, 64, 128), 1)}
"""By the number of a graph's outputs: its strides, and anchors a place. Graphs of 6 and 10 give no points."""


class Found(NamedTuple):
    """Faces, the best score first."""

    boxes: NDArray[np.float32]
    """[faces, 4]: left, top, right, bottom, in pixels."""
    scores: NDArray[np.float32]
    """[faces]."""
    points: NDArray[np.float32]
    """[faces, 5, 2]: eyes, nose, corners of the mouth."""


class Detector:
    """One session, run by all decoding threads."""

    def __init__(self, file: Path, device: str, sizes: tuple[int, ...], install: str) -> None:
        """Load it. Raises ModelError."""
        # A thread a run: there are as many runs at a time as there are decoding threads.
        self._session = onnx.session(file, device, threads=1, install=install)
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._strides, self._anchors = LAYOUTS[len(self._outputs)]
        self._sizes = sizes
        self._centers: dict[int, list[NDArray[np.float32]]] = {}
        self._lock = threading.Lock()

    def detect(self, pixels: NDArray[np.uint8]) -> Found:
        """Faces in pixels [height, width, 3], red first."""
        parts = [self._candidates(pixels, size) for size in self._sizes]
        found = Found(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        order = np.argsort(-found.scores, kind="stable")
        kept = order[_apart(found.boxes[order])]
        return Found(found.boxes[kept], found.scores[kept], found.points[kept])

    def _candidates(self, pixels: NDArray[np.uint8], side: int) -> Found:
        """All boxes at one size that score enough, the best first, in pixels of the picture."""
        fitted, scale = _fitted(pixels, side)
        blob = (fitted.astype(np.float32).transpose(2, 0, 1)[np.newaxis] - np.float32(127.5)) / np.float32(128)
        raw = [np.asarray(output) for output in self._session.run(self._outputs, {self._input: blob})]
        outputs = [output[0] if output.ndim == 3 else output for output in raw]
        levels = len(self._strides)
        boxes, scores, points = [], [], []
        for level, (stride, centers) in enumerate(zip(self._strides, self._centers_at(side), strict=True)):
            score = outputs[level].ravel()
            good = np.flatnonzero(score >= LEAST_SCORE)
            middle = centers[good]
            away = outputs[level + levels][good] * np.float32(stride)
            boxes.append(np.hstack([middle - away[:, :2], middle + away[:, 2:]]))
            scores.append(score[good])
            offset = outputs[level + 2 * levels][good] * np.float32(stride)
            points.append(offset.reshape(len(good), 5, 2) + middle[:, np.newaxis])
        order = np.argsort(-np.concatenate(scores), kind="stable")
        larger = np.float32(scale)
        return Found(
            np.asarray(np.concatenate(boxes)[order] / larger, np.float32),
            np.concatenate(scores)[order],
            np.asarray(np.concatenate(points)[order] / larger, np.float32),
        )

    def _centers_at(self, side: int) -> list[NDArray[np.float32]]:
        """The places [n, 2] that the outputs of each stride belong to, row by row, each for every anchor."""
        with self._lock:
            if side not in self._centers:
                self._centers[side] = [
                    np.repeat(
                        np.mgrid[: side // stride, : side // stride][::-1].reshape(2, -1).T, self._anchors, axis=0
                    ).astype(np.float32)
                    * np.float32(stride)
                    for stride in self._strides
                ]
            return self._centers[side]


def _fitted(pixels: NDArray[np.uint8], side: int) -> tuple[NDArray[np.uint8], float]:
    """The picture in the upper left of a black square, as large as fits, and its scale there."""
    import cv2

    height, width = pixels.shape[:2]
    ratio = height / width
    high, wide = (side, int(side / ratio)) if ratio > 1 else (int(side * ratio), side)
    square = np.zeros((side, side, 3), np.uint8)
    if high and wide:  # of a picture that is a line, nothing is left
        square[:high, :wide] = cv2.resize(pixels, (wide, high))
    return square, max(high, 1) / height


def _apart(boxes: NDArray[np.float32]) -> list[int]:
    """Which boxes, given the best first, no better one covers too much."""
    left, top, right, bottom = boxes.T
    areas = (right - left + 1) * (bottom - top + 1)
    order = np.arange(len(boxes))
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(int(best))
        wide = np.maximum(0.0, np.minimum(right[best], right[rest]) - np.maximum(left[best], left[rest]) + 1)
        high = np.maximum(0.0, np.minimum(bottom[best], bottom[rest]) - np.maximum(top[best], top[rest]) + 1)
        shared = wide * high
        order = rest[shared / (areas[best] + areas[rest] - shared) <= MOST_OVERLAP]
    return kept
