"""What a model is to the pipeline: a recipe that is known without loading anything, and the loaded model.

Another package adds a model through the entry-point group `embstore.models`: the entry's name is what `--model` takes,
its value a function `recipe(options: Mapping[str, str]) -> Recipe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Media = Literal["audio", "image"]


class Face(NamedTuple):
    """The face of a picture that is embedded, in pixels from the upper left corner of the upright picture."""

    x: float
    y: float
    width: float
    height: float
    score: float
    """How sure the detector is, as it says so itself; mostly from 0 to 1."""
    faces: int
    """How many it found in the picture; this is the largest."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One item, decoded and ready for the device."""

    array: NDArray[np.float32]
    """The model's own input: samples, frames, windows or pixels."""
    seconds: float
    """Length of the audio that was read, in seconds, before any trimming; 0 for an image."""
    cost: int
    """Device work in a unit of the model's own (frames, windows); a batch is limited by the sum."""
    face: Face | None = None
    """Which face it is, for a model of faces; kept beside the vector."""


class Model(Protocol):
    """A model that is loaded on one device of one worker process."""

    max_cost: int
    """The largest sum of `Prepared.cost` that one call of `embed` should get. A single item may exceed it.

    Read before every call: a model that runs out of memory may lower it. A person may set it.
    """

    def prepare(self, path: Path, start: float | None, duration: float | None) -> Prepared:
        """Decode one item; runs in several threads at once.

        `start` and `duration` are seconds; None stands for the beginning, and for all of the rest.
        Raises ItemFailed or ItemSkipped.
        """

    def embed(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """Embed a batch, in one thread: float32 [len(batch), dim].

        A row must not depend on the other items of the batch by more than rounding.
        """


class Recipe(Protocol):
    """What identifies a model and how to load it. Picklable, as it travels to spawned workers; imports no torch."""

    @property
    def name(self) -> str:
        """What people type: `resemblyzer`."""

    @property
    def media(self) -> Media:
        """What the model embeds."""

    @property
    def dim(self) -> int:
        """Length of its vectors."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Preprocessing and other facts, as JSON, stored beside the model for people to read."""

    def fingerprint(self) -> str:
        """Hash of weights and settings, in hexadecimal. Raises ModelError if the weights are not there."""

    def load(self, device: str) -> Model:
        """Load it on `cpu` or `cuda:N`. Raises ModelError."""
