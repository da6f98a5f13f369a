"""A loaded WeSpeaker model: recordings to vectors, in batches that do not change them."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from embstore.errors import ItemSkipped, ModelError, first_line
from embstore.media import audio
from embstore.models import fbank, vad
from embstore.models.base import Prepared
from embstore.models.wespeaker.families import Batching

if TYPE_CHECKING:
    import torch

_CPU_FRAMES = 2000
"""Frames a call on a processor, where the items go one by one anyway: a worker that is told to stop then soon does."""
_MOST_FRAMES = 120_000
_BYTES_A_FRAME = 300_000
"""Memory that a frame takes on a GPU at most: SimAM-ResNet's first layers hold 64 × 80 numbers of it in some copies."""
_ENOUGH_FRAMES = 30_000
"""Frames that keep a GPU busy for longer than it takes to launch the next batch."""
_SPREAD = 0.5
"""The shortest recording of a masked batch, as a share of the longest: more padding costs more than another batch."""
_NARROW = 0.9
"""The same, of a batch that is large enough: of recordings of 1 to 15 s, 4% of what is computed is then padding."""
_LONGEST_PROBE = 64


class Encoder(Protocol):
    """Features to vectors on one device."""

    batching: Batching

    def encode(self, features: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Features [rows, frames, bins] on the device, of which `lengths` are valid: float32 [rows, dim].

        The vectors may be on the device and not computed yet: to copy them waits for them.
        """


@dataclass(frozen=True, slots=True)
class _Window:
    """A stretch of one item that is embedded in one go."""

    item: int
    samples: NDArray[np.float32]
    frames: int


class Wespeaker:
    """The model on one device."""

    max_cost: int
    """Frames a batch, padding included; halved whenever the device runs out of memory."""

    def __init__(
        self,
        encoder: Encoder,
        dim: int,
        features: fbank.Settings,
        channel: audio.Channels,
        max_window: float,
        device: str,
        trim: bool = False,
    ) -> None:
        """`trim` cuts long silences out before anything else (16 kHz only).

        Raises ModelError if the encoder does not take such features or gives vectors of another length."""
        self._encoder = encoder
        self._dim = dim
        self._features = features
        self._fbank = fbank.Fbank(features, device)
        self._channel = channel
        self._trim = trim
        self._longest = round(max_window * features.sample_rate)
        self.min_frames = _fewest_frames(encoder, dim, features.num_mel_bins, device)
        self.max_cost = _budget(device)

    def prepare(self, path: Path, start: float | None, duration: float | None) -> Prepared:
        """Decode one item to its samples, float32 [n]; the features are computed on the device.

        Raises ItemFailed, and ItemSkipped `too_short` (fewer frames than the network pools), `silent` (no sample
        differs from another) or, where silences are cut out, `no_speech` (less than that is left).
        """
        sound = audio.read(path, start, duration, self._features.sample_rate, self._channel, "sinc")
        frames = self._features.frames(len(sound.samples))
        if frames < self.min_frames:
            needed = self._features.width + (self.min_frames - 1) * self._features.hop
            seconds = needed / self._features.sample_rate
            raise ItemSkipped("too_short", f"{sound.seconds:.3g} s; this model pools frames of {seconds:.3g} s or more")
        if _is_flat(sound.samples):
            raise ItemSkipped("silent", f"{sound.seconds:.3g} s without any sound")
        samples = sound.samples
        if self._trim:
            samples = vad.trimmed(samples)
            frames = self._features.frames(len(samples))
            if frames < self.min_frames or _is_flat(samples):
                raise ItemSkipped("no_speech", f"of {sound.seconds:.3g} s nothing that can be pooled is speech")
        return Prepared(samples, sound.seconds, frames)

    def embed(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """Embed a batch: float32 [len(batch), dim], not normalised.

        An item longer than `max_window` is the mean of its windows, weighted by their frames.
        """
        sums = np.zeros((len(batch), self._dim))
        frames = np.zeros(len(batch))
        windows = [window for i, item in enumerate(batch) for window in self._windows(i, item.array)]
        # All of it is on its way to a GPU before the first vector is waited for.
        encoded = [
            pair for group in _groups(windows, self._encoder.batching, self.max_cost) for pair in self._encode(group)
        ]
        for group, rows in encoded:
            for window, vector in zip(group, rows.cpu().numpy(), strict=True):
                sums[window.item] += vector.astype(np.float64) * window.frames
                frames[window.item] += window.frames
        return (sums / frames[:, np.newaxis]).astype(np.float32)

    def _encode(self, group: Sequence[_Window]) -> Iterator[tuple[Sequence[_Window], torch.Tensor]]:
        """A group's vectors; if it does not fit in the device's memory, those of its halves, and so on.

        Raises torch.OutOfMemoryError if a single window is too large.
        """
        import torch

        try:
            width = _width(group) if self._encoder.batching == "masked" else None
            features, lengths = self._fbank([window.samples for window in group], width)
            yield group, self._encoder.encode(features, lengths)
            return
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            frames = max(window.frames for window in group)
            if len(group) == 1:
                reason = f"a stretch of {frames} frames does not fit in the device's memory; give a smaller max_window"
                raise torch.cuda.OutOfMemoryError(reason) from error
        # Here, and not above: the error's traceback holds on to the tensors of the failed pass.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.max_cost = max(_CPU_FRAMES, min(self.max_cost, len(group) * frames // 2))
        middle = len(group) // 2
        yield from self._encode(group[:middle])
        yield from self._encode(group[middle:])

    def _windows(self, item: int, samples: NDArray[np.float32]) -> list[_Window]:
        """The fewest windows of equal length that are not too long; those without any sound are left out."""
        count = math.ceil(len(samples) / self._longest)
        edges = [len(samples) * i // count for i in range(count + 1)]
        pieces = [samples[begin:end] for begin, end in itertools.pairwise(edges)]
        audible = [piece for piece in pieces if count == 1 or not _is_flat(piece)]
        return [_Window(item, piece, self._features.frames(len(piece))) for piece in audible or pieces]


def _is_flat(samples: NDArray[np.float32]) -> bool:
    """Whether all samples are alike: their features would be those of any other such recording."""
    return bool(samples.min() == samples.max())


def _groups(windows: Sequence[_Window], batching: Batching, budget: int) -> Iterator[list[_Window]]:
    """Windows that go through the network together, longest first; padded, a group has at most `budget` frames.

    A masked group is closed at the first window that would be padded too much: soon if the group is large already. It
    then has a round number of windows, and those beyond go into the next.
    """
    if batching == "single":
        yield from ([window] for window in windows)
        return
    group: list[_Window] = []
    for window in (*sorted(windows, key=lambda window: -window.frames), None):
        while group and (window is None or not _fits(window, group, batching, budget)):
            rows = _round(len(group)) if batching == "masked" else len(group)
            yield group[:rows]
            group = group[rows:]
        if window is not None:
            group.append(window)


def _fits(window: _Window, group: Sequence[_Window], batching: Batching, budget: int) -> bool:
    """Whether a group takes another window, which is no longer than any in it."""
    longest = group[0].frames
    least = _NARROW if len(group) * longest >= _ENOUGH_FRAMES else _SPREAD
    least = 1.0 if batching == "equal" else least
    return (len(group) + 1) * longest <= budget and window.frames >= least * longest


def _round(count: int) -> int:
    """The largest of 1, 2, 3, 4, 6, 8, 12, 16, 24, … that is not larger: few shapes come, so most have come before.

    On an H100, the first batch of a shape takes two to four times as long as those that follow.
    """
    power = 1 << (count.bit_length() - 1)
    return power * 3 // 2 if count >= power * 3 // 2 else power


def _width(group: Sequence[_Window]) -> int:
    """Frames that a masked group is padded to: some 2% more than the longest has, as few widths as that allows.

    Windows that are all alike are not padded: they come from files of one length, whose shape comes again.
    """
    longest = group[0].frames
    if all(window.frames == longest for window in group):
        return longest
    step = max(1, 1 << (longest.bit_length() - 5))
    return -(-longest // step) * step


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device's memory was too small; libraries have their own words for it."""
    import torch

    words = str(error)
    return isinstance(error, torch.cuda.OutOfMemoryError) or "ALLOC_FAILED" in words or "ailed to allocate" in words


def _budget(device: str) -> int:
    """Frames a batch: what half of a GPU's free memory holds, up to a number that keeps any GPU busy."""
    import torch

    if device == "cpu":
        return _CPU_FRAMES
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return max(_CPU_FRAMES, min(_MOST_FRAMES, int(free / 2 / _BYTES_A_FRAME)))


def _fewest_frames(encoder: Encoder, dim: int, bins: int, device: str) -> int:
    """The fewest frames (2 or more) of which the network makes a finite vector: it is tried out.

    Two, as of one frame nothing is left once the mean is subtracted. Raises ModelError.
    """
    import torch

    random = torch.Generator().manual_seed(0)
    reason = "its vectors are not finite"
    for frames in range(2, _LONGEST_PROBE + 1):
        features = torch.randn(1, frames, bins, generator=random).to(device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a deviation without degrees of freedom
                vectors = encoder.encode(features, [frames])
        # A frame too few is an error of any kind in a strange network or in ONNX Runtime.
        except Exception as error:  # noqa: BLE001
            reason = first_line(error)
            continue
        if vectors.shape != (1, dim):
            raise ModelError(f"model wespeaker: it gives vectors of shape {vectors.shape[1:]}, its config says {dim}")
        if vectors.isfinite().all():
            return frames
    raise ModelError(f"model wespeaker: it gives no vector of {_LONGEST_PROBE} frames of {bins} bins: {reason}")
