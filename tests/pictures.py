"""Generated pictures: each one different, the same on every machine, and broken ones among them where asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

ENDINGS = (".jpg", ".png", ".webp", ".bmp", ".tif", ".gif", ".ppm")

BREAKS = {7: "decode_error", 21: "empty_image", 33: "not_an_image"}
"""What is wrong with the picture of a number, modulo 40."""


def picture(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """A smooth play of colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_pictures(folder: Path, count: int, *, broken: bool = False, people: int = 10) -> dict[str, str | None]:
    """Pictures of all formats, in a folder for each of the people; for every path the reason why it fails, or None."""
    expected: dict[str, str | None] = {}
    for number in range(count):
        path = folder / f"person-{number % people}" / f"{number:04}{ENDINGS[number % len(ENDINGS)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
        wrong = BREAKS.get(number % 40) if broken else None
        if wrong:
            whole = path.read_bytes()
            path.write_bytes({"decode_error": whole[: len(whole) // 2], "empty_image": b""}.get(wrong, b"a text\n"))
        expected[path.relative_to(folder).as_posix()] = wrong
    return expected
