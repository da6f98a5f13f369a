"""Loudness and voice activity, as Resemblyzer prepares its audio, in numpy and WebRTC's detector.

Source: `resemblyzer/audio.py` (Apache-2.0) by Corentin Jemine.
"""

from __future__ import annotations

import math

import numpy as np
import webrtcvad
from numpy.typing import NDArray

from embstore.media import audio

SAMPLE_RATE = 16_000
WINDOW = 480
"""Samples on which the detector decides once: 30 ms."""
AGGRESSIVENESS = 3
"""WebRTC's mode, 0 to 3; 3 takes the least for speech."""
AVERAGE = 8
"""Windows over which the decisions are averaged."""
DILATION = 7
"""Windows to which every voiced one is widened, itself in the middle: up to 6 windows of silence remain."""
TARGET_DBFS = -30.0
_CHUNK = 20_000 * WINDOW
"""Samples that are looked at together: ten minutes."""

_INT16_MAX = 32767


def raise_volume(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Audio [n] amplified to an RMS of -30 dBFS; louder audio as it is, and digital silence too."""
    power = float(np.mean(np.square(samples), dtype=np.float64))
    target = 10 ** (TARGET_DBFS / 10)
    if power == 0 or power >= target:
        return samples
    return samples * np.float32(np.sqrt(target / power))


def keep_speech(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Audio [n] at 16 kHz without its long silences: whole windows of 30 ms, possibly none."""
    count = len(samples) // WINDOW
    if count == 0:
        return samples[:0]
    samples = samples[: count * WINDOW]
    voiced = _smooth(_decide(samples))
    return samples.reshape(count, WINDOW)[voiced].reshape(-1)


def trimmed(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Audio [n] at 16 kHz and of any length without its long silences, at its own level; it is judged at -30 dBFS.

    So it does not matter how loud it is, other than in Resemblyzer, which raises the level and never lowers it.

    In bounded memory: a long result is mapped from a temporary file, as the samples are. Raises ItemFailed `no_space`.
    """
    edges = range(0, len(samples) // WINDOW * WINDOW, _CHUNK)
    chunks = [samples[begin : min(begin + _CHUNK, len(samples) // WINDOW * WINDOW)] for begin in edges]
    if not chunks:
        return samples[:0]
    power = sum(float(np.square(chunk).sum(dtype=np.float64)) for chunk in chunks) / len(samples)
    gain = np.float32(math.sqrt(10 ** (TARGET_DBFS / 10) / power) if power else 1.0)
    detector = webrtcvad.Vad(AGGRESSIVENESS)
    voiced = _smooth(np.concatenate([_decide(chunk * gain, detector) for chunk in chunks]))
    with audio.Pieces() as pieces:
        for number, chunk in enumerate(chunks):
            first = number * _CHUNK // WINDOW
            rows = chunk.reshape(-1, WINDOW)
            pieces.add(rows[voiced[first : first + len(rows)]].reshape(-1))
        return pieces.joined()


def _decide(samples: NDArray[np.float32], detector: webrtcvad.Vad | None = None) -> NDArray[np.bool_]:
    """WebRTC's decision for every window; a detector adapts to what it has heard before."""
    scaled = np.round(samples * np.float32(_INT16_MAX))
    # Resampling overshoots full scale a little; without the clip a peak would wrap around to the other sign.
    pcm = np.clip(scaled, -_INT16_MAX - 1, _INT16_MAX, out=scaled).astype(np.int16).data.cast("B")
    size = 2 * WINDOW
    is_speech = (detector or webrtcvad.Vad(AGGRESSIVENESS)).is_speech
    return np.fromiter((is_speech(pcm[i : i + size], SAMPLE_RATE) for i in range(0, len(pcm), size)), np.bool_)


def _smooth(voiced: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Keep what is near more than half of 8 windows with speech, and 3 windows on both sides of that."""
    # An average of exactly one half rounds to the even 0 in the original, so it takes 5 of 8.
    majority = _windowed_sum(voiced, (AVERAGE - 1) // 2, AVERAGE // 2) > AVERAGE // 2
    return _windowed_sum(majority, DILATION // 2, DILATION // 2) > 0


def _windowed_sum(flags: NDArray[np.bool_], before: int, after: int) -> NDArray[np.intp]:
    """How many of flags[i - before : i + after + 1] are set, for every i."""
    total = np.convolve(flags.astype(np.intp), np.ones(before + after + 1, np.intp))
    return total[after : after + len(flags)]
