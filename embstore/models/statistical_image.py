"""Colour and gradient statistics of a picture: 240 numbers, without any trained weights.

The model to try embstore with on pictures, and the bar that a trained one has to clear: it finds copies, crops and
pictures of one scene, and knows nothing of faces. The picture is scaled to 128 × 128 pixels, whatever its shape, and
its brightness (0.299 R + 0.587 G + 0.114 B) gives the gradients.

    dimensions   0 to  63   colours: for each of 4 × 4 × 4 boxes of the RGB cube, the square root of the share of
                            pixels in it; box 16 r + 4 g + b, with r, g, b from 0 to 3
    dimensions  64 to 111   layout: the mean of R, G and B in each of 4 × 4 cells of the picture, from -1 (none) to 1
                            (full), divided by the square root of 48; cell by cell, row by row, R, G, B for each
    dimensions 112 to 239   edges: for each cell of 4 × 4 and each of 8 directions, the square root of its share of
                            the gradients' length in the whole picture; cell by cell, row by row, directions from 0
                            (edges that stand upright) in steps of 22.5°, opposite ones counted as one

Then the 240 numbers are scaled to unit length. The colours' part has unit length of its own and the edges' part too,
or is zero where there is no edge at all; so a cosine weighs them alike, and no picture gives zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embstore.models.base import Media, Model, Prepared, Recipe
from embstore.models.common import fingerprint, require_known

SIDE = 128
"""Pixels of both sides of what is looked at."""
CELLS = 4
SHADES = 4
DIRECTIONS = 8
DIM = SHADES**3 + 3 * CELLS**2 + DIRECTIONS * CELLS**2

_LUMA: NDArray[np.float32] = np.array([0.299, 0.587, 0.114], np.float32)
_FAINT = 0.5 / 255
"""Brightness (full scale 1) that a gradient has to change from pixel to pixel: rounding to 8 bits is no edge."""


def recipe(options: Mapping[str, str]) -> Recipe:
    """The recipe; it has no options. Raises UsageError for any."""
    require_known("statistical-image", options)
    return StatisticalImageRecipe()


@dataclass(frozen=True)
class StatisticalImageRecipe:
    """Nothing to choose and nothing to load."""

    name: ClassVar[str] = "statistical-image"
    media: ClassVar[Media] = "image"
    dim: ClassVar[int] = DIM

    @property
    def settings(self) -> Mapping[str, Any]:
        """Preprocessing, as JSON."""
        return {
            "side": SIDE,
            "scaling": "box; a JPEG is decoded at half, a quarter or an eighth where that leaves 256 pixels a side",
            "transparent": "white",
            "colours": {"boxes": SHADES**3, "values": "square root of the share"},
            "layout": {"cells": CELLS**2, "values": "mean RGB, -1 to 1, over the square root of 48"},
            "edges": {"cells": CELLS**2, "directions": DIRECTIONS, "values": "square root of the share"},
            "normalized": True,
        }

    def fingerprint(self) -> str:
        """SHA-256 of the settings, which are all there is."""
        return fingerprint(self.name, self.settings)

    def load(self, device: str) -> Model:  # noqa: ARG002  the same on every device
        """The model; it works on the processor, whatever the device."""
        return StatisticalImage()


class StatisticalImage:
    """The statistics are cheap: `prepare` does it all, in the decoding threads."""

    max_cost = 1024

    def prepare(self, path: Path, start: float | None, duration: float | None) -> Prepared:  # noqa: ARG002
        """Decode one picture to its embedding, float32 [240]. Raises ItemFailed."""
        # Not above: the command line knows this module, and does without Pillow.
        from PIL import Image

        from embstore.media import image

        picture = Image.fromarray(image.read(path, least=2 * SIDE))
        small = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
        return Prepared(statistics(np.asarray(small)), 0.0, 1)

    def embed(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """The prepared vectors as rows: float32 [len(batch), 240], unit length."""
        rows = np.empty((len(batch), DIM), np.float32)
        for row, item in zip(rows, batch, strict=True):
            row[:] = item.array
        return rows


def statistics(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Unit vector [240] of pixels [128, 128, 3]."""
    values = pixels.astype(np.float32) / np.float32(255)
    parts = np.concatenate([_colours(pixels), _layout(values), _edges(values @ _LUMA)])
    unit: NDArray[np.float64] = parts / np.linalg.norm(parts)
    return unit.astype(np.float32)


def _colours(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    shades = (pixels // (256 // SHADES)).astype(np.intp)
    boxes = (shades[..., 0] * SHADES + shades[..., 1]) * SHADES + shades[..., 2]
    return np.sqrt(np.bincount(boxes.ravel(), minlength=SHADES**3) / boxes.size)


def _layout(values: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = SIDE // CELLS
    means = values.reshape(CELLS, wide, CELLS, wide, 3).mean(axis=(1, 3), dtype=np.float64)
    layout: NDArray[np.float64] = (2 * means.ravel() - 1) / np.sqrt(means.size)
    return layout


def _edges(bright: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    # Differences of neighbours two apart, so that each belongs to the pixel between; the outermost pixels have none.
    across = (bright[1:-1, 2:] - bright[1:-1, :-2]) / 2
    down = (bright[2:, 1:-1] - bright[:-2, 1:-1]) / 2
    length = np.hypot(across, down)
    length[length < _FAINT] = 0
    direction = np.rint(np.arctan2(down, across) * (DIRECTIONS / np.pi)).astype(np.intp) % DIRECTIONS
    place = np.arange(1, SIDE - 1) // (SIDE // CELLS)
    cell = place[:, np.newaxis] * CELLS + place
    totals = np.bincount((cell * DIRECTIONS + direction).ravel(), length.ravel(), minlength=CELLS**2 * DIRECTIONS)
    shares: NDArray[np.float64] = totals / max(float(totals.sum()), 1e-12)
    return np.sqrt(shares)
