"""Kaldi's log-mel filter banks in batched torch, on whatever device the samples are.

Equal to `torchaudio.compliance.kaldi.fbank(dither=0)` and so to Kaldi's compute-fbank-feats: frames of 25 ms every
10 ms that lie inside the audio (snip_edges), mean removed per frame, pre-emphasis 0.97, a window, a power spectrum
padded to a power of two, triangles on the scale 1127·ln(1 + f/700) from 20 Hz to half the sample rate, natural
logarithm of at least 1.2e-7. Source of the steps: Kaldi, feat/feature-window.cc and feat/mel-computations.cc.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Window = Literal["hamming", "povey"]
Scale = Literal["int16", "unit"]

_PREEMPHASIS = 0.97
_LOWEST_HZ = 20.0
_FLOOR = float(np.finfo(np.float32).eps)
_CHUNK = 1 << 16
"""Frames (padding included) transformed at a time: some 0.4 GB of spectra."""


@dataclass(frozen=True)
class Settings:
    """What a model was trained with."""

    sample_rate: int = 16_000
    num_mel_bins: int = 80
    window: Window = "hamming"
    sample_scale: Scale = "int16"
    """`int16`: full scale is 32768; `unit`: it is 1. They differ where the audio is silent, at the floor."""

    @property
    def width(self) -> int:
        """Samples in a frame."""
        return self.sample_rate * 25 // 1000

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return self.sample_rate * 10 // 1000

    def frames(self, samples: int) -> int:
        """Frames in so many samples; 0 if not even one fits."""
        return 0 if samples < self.width else 1 + (samples - self.width) // self.hop


class Fbank:
    """The filter banks of one device."""

    def __init__(self, settings: Settings, device: str) -> None:
        import torch

        self.settings = settings
        self._device = torch.device(device)
        self._size = 1 << (settings.width - 1).bit_length()
        self._window = torch.from_numpy(_window(settings)).to(self._device)
        self._filters = torch.from_numpy(_filters(settings, self._size)).to(self._device)

    def __call__(
        self, recordings: Sequence[NDArray[np.float32]], frames: int | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Features of recordings (each float32 [n], full scale 1, one frame or more) and the frames of each.

        Returns float32 [recordings, frames, bins] on the device; what is beyond a recording's own frames is zero, and
        the mean over its own frames is subtracted. `frames` pads to more than the longest has.
        """
        import torch

        lengths = [self.settings.frames(len(samples)) for samples in recordings]
        width = max(lengths) if frames is None else frames
        padded = self._upload(recordings, lengths, width)
        valid = integers(lengths, self._device)[:, None]
        step = max(1, _CHUNK // width)
        features = torch.empty(len(lengths), width, self.settings.num_mel_bins, device=self._device)
        # The framework's lower precisions would change the features far more than the weights' rounding does.
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            for i in range(0, len(lengths), step):
                for begin in range(0, width, _CHUNK):
                    piece = features[i : i + step, begin : begin + _CHUNK]
                    piece.copy_(self._log_mel(padded[i : i + step], begin, piece.shape[1]))
            mask = torch.arange(width, device=self._device) < valid
            features.mul_(mask[..., None])
            features -= features.sum(1, keepdim=True) / valid[..., None]
            features.mul_(mask[..., None])
        return features, lengths

    def _upload(self, recordings: Sequence[NDArray[np.float32]], lengths: Sequence[int], width: int) -> torch.Tensor:
        """Samples as float32 [recordings, samples of `width` frames] on the device, zero beyond each one's end."""
        import torch

        total = (width - 1) * self.settings.hop + self.settings.width
        cuda = self._device.type == "cuda"
        padded = torch.empty(len(recordings), total, pin_memory=cuda)
        for row, samples, count in zip(padded.numpy(), recordings, lengths, strict=True):
            used = (count - 1) * self.settings.hop + self.settings.width
            row[:used] = samples[:used]
            row[used:] = 0
        return padded.to(self._device, non_blocking=cuda)

    def _log_mel(self, padded: torch.Tensor, begin: int, count: int) -> torch.Tensor:
        """Log-mel of the frames begin … begin + count of every row: float32 [rows, count, bins]."""
        import torch

        hop, width = self.settings.hop, self.settings.width
        part = padded[:, begin * hop : (begin + count - 1) * hop + width]
        if self.settings.sample_scale == "int16":
            part = part * 32768.0
        frames = part.unfold(1, width, hop)
        frames = frames - frames.mean(2, keepdim=True)
        # Kaldi takes a frame's first sample for the one before it.
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)
        frames = (frames - _PREEMPHASIS * before) * self._window
        spectrum = torch.fft.rfft(frames, self._size)
        power = spectrum.real.square() + spectrum.imag.square()
        log_mel: torch.Tensor = (power @ self._filters).clamp_min(_FLOOR).log()
        return log_mel


def integers(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """Whole numbers as int64 [n] on a device, without waiting for what it is computing."""
    import torch

    cuda = device.type == "cuda"
    return torch.tensor(values, pin_memory=cuda).to(device, non_blocking=cuda)


def _window(settings: Settings) -> NDArray[np.float32]:
    """Kaldi's window, float32 [width]; Povey's is Hann's to the power of 0.85."""
    phase: NDArray[np.float64] = 2 * np.pi * np.arange(settings.width) / (settings.width - 1)
    if settings.window == "hamming":
        return (0.54 - 0.46 * np.cos(phase)).astype(np.float32)
    return ((0.5 - 0.5 * np.cos(phase)) ** 0.85).astype(np.float32)


def _filters(settings: Settings, size: int) -> NDArray[np.float32]:
    """Triangles of height 1 on the mel scale, float32 [size / 2 + 1, bins]; half the sample rate itself is left out."""
    edges = np.linspace(_mel(_LOWEST_HZ), _mel(settings.sample_rate / 2), settings.num_mel_bins + 2)
    mels = 1127 * np.log1p(np.arange(size // 2) * settings.sample_rate / size / 700)[:, np.newaxis]
    rising = (mels - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mels) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return np.concatenate([triangles, np.zeros((1, settings.num_mel_bins))]).astype(np.float32)


def _mel(hertz: float) -> float:
    return 1127 * math.log1p(hertz / 700)
