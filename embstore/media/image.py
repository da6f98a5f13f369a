"""Read any picture as upright 8-bit RGB.

Pillow decodes, by the content and not by the file's name, and only the formats listed here: it knows others, some of
which (PostScript) it would have other programs run. It releases the GIL, so that threads of one process decode side
by side. Of several pictures in one file (GIF, WEBP, TIFF) the first counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, _imaging

from embstore.errors import ItemFailed
from embstore.media import files

try:
    import pillow_heif
except ImportError:
    HEIF = False
else:
    pillow_heif.register_heif_opener()
    HEIF = True

MAX_PIXELS = 178_956_970
"""Pixels of the largest picture that is decoded; it takes half a gigabyte. Pillow's own limit."""

Image.init()
_FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "DIB", "PPM", "GIF", "AVIF", "HEIF") if name in Image.OPEN
)
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
_HEAD = 16
"""Bytes by which a format is known."""
_TRANSPARENT = {"RGBA", "RGBa", "LA", "La", "PA"}
_PAPER = (255, 255, 255)
"""What shows where a picture is transparent."""

# The limit is checked here, as Pillow would only warn. What it warns of (odd EXIF data, a palette) is for programmers,
# and would stand between the lines of the progress display, like what libtiff writes to stderr of a broken file.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")
with contextlib.suppress(OSError, AttributeError):  # a Pillow that is built in another way: then it writes
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def read(path: Path, least: int | None = None) -> NDArray[np.uint8]:
    """A picture's pixels, uint8 [height, width, 3], red, green, blue, turned as its EXIF orientation says.

    With `least`, a JPEG may come smaller, by one half, quarter or eighth, as long as neither side falls below it; to
    decode it so takes a fraction of the time. Thread-safe.
    Raises ItemFailed: `not_found`, `no_permission`, `is_a_directory`, `not_a_file`, `read_error`, `empty_image`,
    `not_an_image`, `no_heif`, `too_large`, `decode_error`.
    """
    with files.opened(path) as file:
        head = file.read(_HEAD)
        if not head:
            raise ItemFailed("empty_image", "the file has 0 bytes")
        file.seek(0)
        return _decode(io.BufferedReader(file), head, least)


def _decode(file: IO[bytes], head: bytes, least: int | None) -> NDArray[np.uint8]:
    try:
        with Image.open(file, formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ItemFailed("too_large", f"{width} × {height} pixels; {MAX_PIXELS:,} in all are decoded")
            if least is not None:
                picture.draft("RGB", (least, least))
            picture.load()
            return np.asarray(_rgb(_upright(picture)))
    except UnidentifiedImageError as error:
        raise _unidentified(head) from error
    # Of bytes that are something else than they claim, decoders raise whatever they stumble over.
    except Exception as error:
        if isinstance(error, ItemFailed):
            raise
        words = " ".join(str(error).split())
        raise ItemFailed("decode_error", words or type(error).__name__) from error


def _unidentified(head: bytes) -> ItemFailed:
    """Why Pillow opened it by none of its decoders."""
    for name in _FORMATS:
        accepts = Image.OPEN[name][1]
        if accepts is not None and accepts(head.ljust(_HEAD)) is True:
            return ItemFailed(
                "decode_error", f"it begins like {name}, but is cut short, broken or of a kind that is not read"
            )
    if not HEIF and head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return ItemFailed("no_heif", "to read HEIC and HEIF, type: pip install 'embstore[heif]'")
    return ItemFailed("not_an_image", f"it begins with {head!r}, as none of the image formats that are read does")


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    # What is wrong with the EXIF data says nothing about the pixels.
    except Exception:  # noqa: BLE001
        return picture


def _rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB from any of Pillow's modes; transparent parts are laid on white."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        return _from_deep(picture)
    if picture.mode in _TRANSPARENT or "transparency" in picture.info:
        over = picture.convert("RGBA")
        paper = Image.new("RGBA", over.size, _PAPER)
        return Image.alpha_composite(paper, over).convert("RGB")
    return picture.convert("RGB")


def _from_deep(picture: Image.Image) -> Image.Image:
    """From gray of 16 or 32 bits: whole numbers have the full scale 65535, others 1 if none is larger, else 255.

    Pillow's own conversion would cut everything above 255.
    """
    values = np.asarray(picture).astype(np.float32)
    if not np.isfinite(values).all():
        raise ItemFailed("decode_error", "the pixels contain NaN or infinity")
    scale = 65535.0
    if picture.mode == "F":
        scale = 1.0 if values.max() <= 1 else 255.0
    gray = np.clip(values * (255 / scale) + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(gray).convert("RGB")
