"""Mel spectrograms in numpy, equal to librosa's `feature.melspectrogram` (Slaney scale and norm, zero padding).

They run in decoding threads: no torch here, whose thread pool per calling thread would crowd the processor.
Source of the mel scale: M. Slaney, Auditory Toolbox, technical report 1998-010, Interval Research, as in librosa.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

SAMPLE_RATE = 16_000
WINDOW = 400
"""Samples in a frame: 25 ms."""
HOP = 160
"""Samples from one frame to the next: 10 ms."""
BANDS = 40

_CHUNK = 1024  # frames transformed at a time, so that hours of audio don't stand in memory as windows


def power_mel(samples: NDArray[np.float32], frames: int) -> NDArray[np.float32]:
    """Power in 40 mel bands: samples [n] at 16 kHz to float32 [frames, 40].

    Frame i is centred on sample 160·i; beyond both ends the audio is taken as zero.
    """
    padded = np.zeros(max((frames - 1) * HOP + WINDOW, WINDOW), np.float32)
    half = WINDOW // 2
    inside = samples[: len(padded) - half]
    padded[half : half + len(inside)] = inside
    windows = sliding_window_view(padded, WINDOW)[::HOP]
    mel = np.empty((frames, BANDS), np.float32)
    for i in range(0, frames, _CHUNK):
        spectrum = np.fft.rfft(windows[i : min(i + _CHUNK, frames)] * _hann(), axis=1)
        power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32, copy=False)
        np.matmul(power, _filters(), out=mel[i : i + len(power)])
    return mel


@cache
def _hann() -> NDArray[np.float32]:
    """Periodic Hann window, float32 [400]."""
    phase: NDArray[np.float64] = 2 * np.pi * np.arange(WINDOW) / WINDOW
    return (0.5 - 0.5 * np.cos(phase)).astype(np.float32)


@cache
def _filters() -> NDArray[np.float32]:
    """Triangular filters of equal area from 0 to 8 kHz, float32 [201, 40]."""
    bins = np.arange(WINDOW // 2 + 1) * SAMPLE_RATE / WINDOW
    top = _hertz_to_mel(SAMPLE_RATE / 2)
    edges = _mel_to_hertz(np.linspace(0.0, top, BANDS + 2))
    widths = np.diff(edges)
    rising = (bins[:, np.newaxis] - edges[:-2]) / widths[:-1]
    falling = (edges[2:] - bins[:, np.newaxis]) / widths[1:]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    area = 2.0 / (edges[2:] - edges[:-2])
    return (triangles * area).astype(np.float32)


_LINEAR_HZ = 200.0 / 3  # one mel, below 1 kHz
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _LINEAR_HZ
_LOG_STEP = np.log(6.4) / 27.0  # one mel, above 1 kHz


def _hertz_to_mel(hertz: float) -> float:
    """Slaney's mel scale above its break at 1 kHz."""
    return float(_BREAK_MEL + np.log(hertz / _BREAK_HZ) / _LOG_STEP)


def _mel_to_hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slaney's mel scale: linear to 1 kHz, logarithmic above."""
    above = _BREAK_HZ * np.exp(_LOG_STEP * (mel - _BREAK_MEL))
    return np.where(mel < _BREAK_MEL, _LINEAR_HZ * mel, above)
