"""Filter banks: equal to the golden ones, alone and in a batch, and to the definition where there is no golden one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embstore.media import audio
from embstore.models.fbank import Fbank, Settings

DATA = Path(os.environ.get("EMBSTORE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
GOLDEN = DATA / "wespeaker-golden" / "fbank.npz"
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason=f"no golden features in {DATA}")


def noise(seconds: float, seed: int = 0, rate: int = 16_000) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate)).astype(np.float32)


def by_definition(samples: NDArray[np.float32], settings: Settings) -> NDArray[np.float64]:
    """Kaldi's steps one frame after the other in float64, before the mean is subtracted."""
    width, rate = settings.width, settings.sample_rate
    size = 2 ** int(np.ceil(np.log2(width)))
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / (width - 1))
    window = hann**0.85 if settings.window == "povey" else 0.08 + 0.92 * hann
    scale = 32768.0 if settings.sample_scale == "int16" else 1.0

    def mel(hertz: float) -> float:
        return 1127 * np.log(1 + hertz / 700)

    step = (mel(rate / 2) - mel(20)) / (settings.num_mel_bins + 1)
    rows = []
    for i in range(settings.frames(len(samples))):
        frame = samples[i * settings.hop : i * settings.hop + width].astype(np.float64) * scale
        frame -= frame.mean()
        frame[1:] -= 0.97 * frame[:-1].copy()
        frame[0] *= 1 - 0.97
        power = np.abs(np.fft.rfft(frame * window, size)) ** 2
        row = []
        for band in range(settings.num_mel_bins):
            centre = mel(20) + (band + 1) * step
            weights = [max(0, 1 - abs(mel(k * rate / size) - centre) / step) for k in range(size // 2)]
            row.append(np.log(max(np.dot(weights, power[:-1]), np.finfo(np.float32).eps)))
        rows.append(row)
    return np.array(rows)


@needs_golden
def test_golden_features_in_one_batch() -> None:
    golden = np.load(GOLDEN)
    recordings = [audio.read(DATA / "speech" / name, None, None, 16_000, "first").samples for name in golden]
    features, lengths = Fbank(Settings(), "cpu")(recordings)
    for row, length, name in zip(features.numpy(), lengths, golden, strict=True):
        assert golden[name].shape == (length, 80)
        assert np.abs(row[:length] - golden[name]).max() < 1e-3
        assert not row[length:].any()


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(window="povey", sample_scale="unit"),
        Settings(num_mel_bins=40, sample_scale="unit"),
        Settings(sample_rate=8000, num_mel_bins=60, window="povey"),
    ],
)
def test_every_setting_is_kaldis(settings: Settings) -> None:
    samples = noise(0.2, rate=settings.sample_rate)
    features, lengths = Fbank(settings, "cpu")([samples])
    expected = by_definition(samples, settings)
    assert lengths == [len(expected)]
    assert np.abs(features[0].numpy() - (expected - expected.mean(axis=0))).max() < 1e-3


def test_a_row_does_not_depend_on_the_others() -> None:
    recordings = [noise(seconds, seed) for seed, seconds in enumerate([0.5, 0.025, 1.0, 0.3])]
    fbank = Fbank(Settings(), "cpu")
    together, lengths = fbank(recordings, 120)
    assert together.shape == (4, 120, 80)
    for row, length, recording in zip(together, lengths, recordings, strict=True):
        alone, _ = fbank([recording])
        assert np.allclose(row[:length], alone[0], atol=1e-4)
        assert not row[length:].any()


def test_many_frames_are_transformed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    recordings = [noise(0.5), noise(0.4, 1), noise(0.45, 2)]
    whole, _ = Fbank(Settings(), "cpu")(recordings)
    for chunk in (20, 100):  # less than one recording, and two of them
        monkeypatch.setattr("embstore.models.fbank._CHUNK", chunk)
        pieces, _ = Fbank(Settings(), "cpu")(recordings)
        assert np.allclose(pieces, whole, atol=1e-5)


def test_frames_lie_inside_the_audio() -> None:
    counts = [Settings().frames(samples) for samples in (0, 399, 400, 559, 560, 16_000)]
    assert counts == [0, 0, 1, 1, 2, 98]
