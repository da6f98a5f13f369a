"""Make the sample speech of `examples/speech`: six synthetic voices that read the same six sentences.

    apt-get install espeak-ng            # or the package of your system; 1.51 made the committed files
    .venv/bin/python examples/make_speech.py

The same versions of espeak-ng and libsndfile write the same bytes again (MP3, since an Ogg stream carries a random
serial number, and FLAC takes three times the space). All voices read the same text, so that what two files of one
folder have in common is the voice and not the words.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

SPEECH = Path(__file__).parent / "speech"
SAMPLE_RATE = 16_000
PEAK = 0.5

SENTENCES = [
    "The recording was made on a quiet morning before the traffic began.",
    "She counted every page twice and closed the heavy book.",
    "Nobody remembers who planted the apple trees behind the mill.",
    "A small boat crossed the river while the storm moved north.",
    "Please leave the blue envelope on the table by the window.",
    "The train to the coast departs at seven and stops in every village.",
]


@dataclass(frozen=True)
class Voice:
    """One voice of espeak-ng: its language and variant, pitch (0 to 99) and speed (words a minute)."""

    name: str
    espeak: str
    pitch: int
    speed: int


VOICES = [
    Voice("annie", "en-us+Annie", 50, 150),
    Voice("hugo", "en-gb-x-rp+Hugo", 45, 155),
    Voice("lee", "en-us+Lee", 50, 150),
    Voice("linda", "en-gb-x-rp+linda", 55, 160),
    Voice("quincy", "en-us+quincy", 50, 155),
    Voice("storm", "en-gb-scotland+Storm", 40, 145),
]


def speak(voice: Voice, text: str) -> NDArray[np.float32]:
    """Synthesise one sentence: float32 [samples] at 16 kHz, with its peak at `PEAK`."""
    command = ["espeak-ng", "-v", voice.espeak, "-p", str(voice.pitch), "-s", str(voice.speed), "--stdout", text]
    wav = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    resampled = np.asarray(soxr.resample(samples, rate, SAMPLE_RATE), dtype=np.float32)
    return resampled * np.float32(PEAK / np.abs(resampled).max())


def main() -> int:
    """Write every voice's files anew."""
    if shutil.which("espeak-ng") is None:
        print("espeak-ng is not installed: install your system's package of that name", file=sys.stderr)
        return 1
    shutil.rmtree(SPEECH, ignore_errors=True)
    for voice in VOICES:
        folder = SPEECH / voice.name
        folder.mkdir(parents=True)
        for number, text in enumerate(SENTENCES, start=1):
            soundfile.write(folder / f"{number:02}.mp3", speak(voice, text), SAMPLE_RATE, compression_level=0.6)
    print(f"{len(VOICES) * len(SENTENCES)} files in {SPEECH}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
