"""torchaudio's resampler: the same in any pieces, and the tone that went in comes out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from embstore.media.sinc import SincResampler


def tone(rate: int, seconds: float) -> NDArray[np.float32]:
    return np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate).astype(np.float32)


def resampled(samples: NDArray[np.float32], rates: tuple[int, int], piece: int) -> NDArray[np.float32]:
    resampler = SincResampler(*rates)
    pieces = [resampler.resample_chunk(samples[i : i + piece]) for i in range(0, len(samples), piece)]
    return np.concatenate([*pieces, resampler.resample_chunk(np.empty(0, np.float32), last=True)])


@pytest.mark.parametrize("rates", [(8000, 16000), (48000, 16000), (44100, 16000), (11025, 16000), (16000, 8000)])
def test_a_tone_stays_a_tone(rates: tuple[int, int]) -> None:
    result = resampled(tone(rates[0], 0.5), rates, 10**6)
    expected = tone(rates[1], 0.5)
    assert len(result) == math.ceil(rates[0] // 2 * rates[1] / rates[0])
    inner = slice(200, -200)
    assert np.abs(result[: len(expected)][inner] - expected[inner]).max() < 2e-2


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("rates", [(8000, 16000), (44100, 16000), (16000, 11025)])
def test_pieces_make_no_difference(rates: tuple[int, int], piece: int) -> None:
    samples = np.random.default_rng(0).normal(size=3001).astype(np.float32)
    whole = resampled(samples, rates, 3001)
    assert np.allclose(resampled(samples, rates, piece), whole, atol=1e-6)
    assert len(whole) == math.ceil(3001 * rates[1] / rates[0])


def test_values_by_the_definition() -> None:
    """Every output of 8 to 16 kHz by hand: sinc at 0.99 of the band, under a Hann window over six zero crossings."""
    samples = np.random.default_rng(1).normal(size=64).astype(np.float32)
    expected = np.zeros(128)
    for n in range(128):
        for k, sample in enumerate(samples):
            time = (k - n / 2) * 0.99
            if abs(time) < 6:
                expected[n] += sample * np.sinc(time) * np.cos(time * np.pi / 12) ** 2 * 0.99
    assert np.abs(resampled(samples, (8000, 16000), 64) - expected).max() < 1e-5
