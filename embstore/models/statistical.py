"""Means and deviations of mel bands over time: 80 numbers a recording, without any trained weights.

The model to try embstore with, and the bar that a trained one has to clear: between readers of LibriSpeech its equal
error rate is 6 to 11%, on one-second words 37%. It hears the room, the microphone and the level as much as the voice.

    dimensions  0 to 39   mean over time of the natural logarithm of the power in mel band 0 to 39
    dimensions 40 to 79   standard deviation over time of the same, band 0 to 39

Then the 80 numbers are scaled to unit length. The bands are Slaney's from 0 to 8 kHz on frames of 25 ms every 10 ms
(`embstore.models.mel`); a power below 1e-10 counts as 1e-10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embstore.errors import ItemSkipped
from embstore.media import audio
from embstore.models import mel
from embstore.models.base import Media, Model, Prepared, Recipe
from embstore.models.common import fingerprint, require_known

DIM = 2 * mel.BANDS
FLOOR = 1e-10


def recipe(options: Mapping[str, str]) -> Recipe:
    """The recipe; it has no options. Raises UsageError for any."""
    require_known("statistical", options)
    return StatisticalRecipe()


@dataclass(frozen=True)
class StatisticalRecipe:
    """Nothing to choose and nothing to load."""

    name: ClassVar[str] = "statistical"
    media: ClassVar[Media] = "audio"
    dim: ClassVar[int] = DIM

    @property
    def settings(self) -> Mapping[str, Any]:
        """Preprocessing, as JSON."""
        return {
            "sample_rate": mel.SAMPLE_RATE,
            "channels": "mean",
            "mel": {"bands": mel.BANDS, "window": mel.WINDOW, "hop": mel.HOP, "scale": "slaney", "values": "log power"},
            "floor": FLOOR,
            "statistics": ["mean", "standard deviation"],
            "normalized": True,
        }

    def fingerprint(self) -> str:
        """SHA-256 of the settings, which are all there is."""
        return fingerprint(self.name, self.settings)

    def load(self, device: str) -> Model:  # noqa: ARG002  the same on every device
        """The model; it works on the processor, whatever the device."""
        return Statistical()


class Statistical:
    """The statistics are cheap: `prepare` does it all, in the decoding threads."""

    max_cost = 1024

    def prepare(self, path: Path, start: float | None, duration: float | None) -> Prepared:
        """Decode one item to its embedding, float32 [80].

        Raises ItemFailed, and ItemSkipped `too_short` (under one frame of 25 ms) or `silent` (nothing but zeros).
        """
        sound = audio.read(path, start, duration, mel.SAMPLE_RATE)
        if len(sound.samples) < mel.WINDOW:
            raise ItemSkipped("too_short", f"{sound.seconds:.3g} s; one frame of 0.025 s is needed")
        if not sound.samples.any():
            raise ItemSkipped("silent", f"{sound.seconds:.3g} s of nothing but zeros")
        return Prepared(_statistics(sound.samples), sound.seconds, 1)

    def embed(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """The prepared vectors as rows: float32 [len(batch), 80], unit length."""
        rows = np.empty((len(batch), DIM), np.float32)
        for row, item in zip(rows, batch, strict=True):
            row[:] = item.array
        return rows


def _statistics(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit vector [80] of samples [n] at 16 kHz."""
    bands = np.log(np.maximum(mel.power_mel(samples, 1 + len(samples) // mel.HOP), FLOOR))
    # In float64: a sum over hours of frames runs out of float32's digits.
    both = np.concatenate([bands.mean(axis=0, dtype=np.float64), bands.std(axis=0, dtype=np.float64)])
    unit: NDArray[np.float64] = both / np.linalg.norm(both)
    return unit.astype(np.float32)
