"""A resampler equal to torchaudio's default (`functional.resample`): a short windowed sinc.

For models that were trained on what it gives. Its stop band is shallow: an 8 kHz recording made 16 kHz keeps faint
mirror images above 4 kHz, and speaker models hear them (cosine 0.997 to the same recording through soxr, which has
none). Method: J. O. Smith, Digital Audio Resampling Home Page, with torchaudio's Hann window over 6 zero crossings.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

_ZERO_CROSSINGS = 6
_ROLL_OFF = 0.99
_CHUNK = 1 << 20  # values of overlapping windows that a multiplication copies at most, times 4 bytes


class SincResampler:
    """One recording's resampler, fed in pieces; used like soxr's `ResampleStream`."""

    def __init__(self, from_rate: int, to_rate: int) -> None:
        divisor = math.gcd(from_rate, to_rate)
        self._from, self._to = from_rate // divisor, to_rate // divisor
        cutoff = min(self._from, self._to) * _ROLL_OFF
        self._width = math.ceil(_ZERO_CROSSINGS * self._from / cutoff)
        self._kernel = _kernel(self._from, self._to, self._width, cutoff)
        self._pending = np.zeros(self._width, np.float32)
        self._received = self._given = 0

    def resample_chunk(self, samples: NDArray[np.float32], last: bool = False) -> NDArray[np.float32]:
        """The next samples, float32 [n], to what is known of the output by now: float32 [m]."""
        self._received += len(samples)
        tail = np.zeros(self._width + self._from if last else 0, np.float32)
        self._pending = np.concatenate([self._pending, samples, tail])
        taps = len(self._kernel)
        count = max(0, (len(self._pending) - taps) // self._from + 1)
        if count == 0:
            return np.empty(0, np.float32)
        windows = sliding_window_view(self._pending, taps)[: count * self._from : self._from]
        output = np.empty((count, self._to), np.float32)
        step = max(1, _CHUNK // taps)
        for i in range(0, count, step):
            np.matmul(windows[i : i + step], self._kernel, out=output[i : i + step])
        self._pending = self._pending[count * self._from :]
        whole = -(-self._to * self._received // self._from) - self._given
        given = output.reshape(-1)[: whole if last else None]
        self._given += len(given)
        return given


def _kernel(from_rate: int, to_rate: int, width: int, cutoff: float) -> NDArray[np.float32]:
    """The filter of each of the `to_rate` phases: float32 [taps, to_rate]."""
    taps: NDArray[np.float64] = np.arange(-width, width + from_rate)[:, np.newaxis] / from_rate
    phases: NDArray[np.float64] = np.arange(0, -to_rate, -1) / to_rate
    time = np.clip((taps + phases) * cutoff, -_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = np.cos(time * np.pi / _ZERO_CROSSINGS / 2) ** 2
    kernel: NDArray[np.float64] = np.sinc(time) * window * (cutoff / from_rate)
    return kernel.astype(np.float32)
