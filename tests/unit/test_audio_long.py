"""Long recordings: samples beyond a limit lie in a file, and memory stays where it is."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from embstore.errors import ItemFailed
from embstore.media import audio


def write(path: Path, seconds: float, rate: int, channels: int = 1) -> Path:
    samples = np.random.default_rng(0).normal(0, 0.1, (round(seconds * rate), channels))
    soundfile.write(path, samples, rate, subtype="PCM_16")
    return path


@pytest.mark.parametrize("rate", [16_000, 22_050])
@pytest.mark.parametrize("resampling", ["soxr", "sinc"])
def test_the_same_samples_from_memory_and_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int, resampling: audio.Resampling
) -> None:
    path = write(tmp_path / "a.wav", 3.0, rate, channels=2)
    monkeypatch.setattr(audio, "_BLOCK_VALUES", 8000)
    short = audio.read(path, 0.5, None, 16_000, "mean", resampling)
    monkeypatch.setattr(audio, "_MEMORY_BYTES", 20_000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    long = audio.read(path, 0.5, None, 16_000, "mean", resampling)
    assert isinstance(long.samples, np.memmap)
    assert not isinstance(short.samples, np.memmap)
    assert long.seconds == short.seconds == 2.5
    assert np.array_equal(long.samples, short.samples)
    assert not list((tmp_path / "spool").iterdir())


def test_half_an_hour_takes_the_memory_of_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    with soundfile.SoundFile(path, "w", 16_000, 1, "PCM_16") as file:
        minute = np.random.default_rng(0).integers(-3000, 3000, 60 * 16_000, dtype=np.int16)
        for _ in range(40):
            file.write(minute)
    tracemalloc.start()
    try:
        sound = audio.read(path, None, None, 16_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sound.samples.nbytes == 40 * 60 * 16_000 * 4  # 154 MB
    assert peak < 130e6
    assert np.array_equal(sound.samples[-60 * 16_000 :], minute / np.float32(32768))


def test_no_room_for_the_file_is_an_error_of_the_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.wav", 3.0, 16_000)
    monkeypatch.setattr(audio, "_MEMORY_BYTES", 20_000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(ItemFailed, match="TMPDIR") as caught:
        audio.read(path, None, None, 16_000)
    assert caught.value.code == "no_space"
