"""Reading pictures: every format, mode and orientation ends as upright RGB, or as an error that names what is wrong."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import picture
from PIL import Image

from embstore.errors import ItemFailed
from embstore.media import extensions, image

WIDE, HIGH = 160, 120
ORIENTATION = 0x0112

needs_heif = pytest.mark.skipif(not image.HEIF, reason="pillow-heif is not installed")
needs_avif = pytest.mark.skipif("AVIF" not in Image.OPEN, reason="this Pillow reads no AVIF")


@pytest.fixture
def original() -> Image.Image:
    return picture(1, WIDE, HIGH)


def pixels(source: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(source.convert("RGB"))


def code_of(path: Path) -> str:
    with pytest.raises(ItemFailed) as caught:
        image.read(path)
    assert "\n" not in caught.value.detail
    return caught.value.code


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.ppm", {}),
        ("a.tif", {}),
        ("lzw.tif", {"compression": "tiff_lzw"}),
        ("deflate.tiff", {"compression": "tiff_deflate"}),
        ("a.webp", {"lossless": True}),
    ],
)
def test_a_format_that_loses_nothing_gives_the_very_pixels(
    name: str, options: dict[str, object], original: Image.Image, tmp_path: Path
) -> None:
    original.save(tmp_path / name, **options)
    assert np.array_equal(image.read(tmp_path / name), pixels(original))
    assert (tmp_path / name).suffix in extensions.IMAGE


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {"quality": 95}),
        ("progressive.jpeg", {"quality": 95, "progressive": True}),
        ("a.webp", {"quality": 95}),
        ("jpeg.tif", {"compression": "jpeg", "quality": 95}),
        pytest.param("a.heic", {"quality": 95}, marks=needs_heif),
        pytest.param("a.avif", {"quality": 95}, marks=needs_avif),
    ],
)
def test_a_format_that_loses_something_gives_nearly_the_pixels(
    name: str, options: dict[str, object], original: Image.Image, tmp_path: Path
) -> None:
    original.save(tmp_path / name, **options)
    read = image.read(tmp_path / name)
    assert np.abs(read.astype(int) - pixels(original)).mean() < 3
    assert (tmp_path / name).suffix in extensions.IMAGE


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", pytest.param("a.heic", marks=needs_heif)])
def test_orientation_is_honoured(name: str, orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((60, 90, 3), np.uint8)
    upright[:30, :45], upright[:30, 45:], upright[30:, :45] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    # As the camera's chip saw it: what turns the picture upright is the EXIF tag, undone here.
    undo = [None, 0, 3, 1, 5, 2, 6, 4][orientation - 1]
    stored = Image.fromarray(upright)
    if undo is not None:
        stored = stored.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / name, exif=exif.tobytes(), **({"quality": 98} if name != "a.png" else {}))
    read = image.read(tmp_path / name)
    assert read.shape == upright.shape
    assert np.abs(read.astype(int) - upright).mean() < 6


def test_exif_data_that_are_garbage_do_not_matter(original: Image.Image, tmp_path: Path) -> None:
    original.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12garbage")
    assert image.read(tmp_path / "a.jpg").shape == (HIGH, WIDE, 3)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_scaled_and_not_cut(name: str, tmp_path: Path) -> None:
    steps = np.linspace(0, 65535, WIDE).astype(np.uint16)
    Image.fromarray(np.tile(steps, (HIGH, 1))).save(tmp_path / name)
    read = image.read(tmp_path / name)
    assert np.abs(read[0, :, 0] - steps / 257).max() <= 0.51
    assert (read[..., 0] == read[..., 2]).all()


def test_sixteen_bit_colour_is_scaled_and_not_cut(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (4, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    (tmp_path / "a.png").write_bytes(png(5, 4, 16, rows))
    assert np.abs(image.read(tmp_path / "a.png") - deep.astype(int) / 257).max() <= 1


@pytest.mark.parametrize(("full", "scale"), [(1.0, 255.0), (255.0, 1.0)])
def test_floating_point_is_of_scale_1_or_255(full: float, scale: float, tmp_path: Path) -> None:
    values = np.linspace(0, full, WIDE, dtype=np.float32)
    Image.fromarray(np.tile(values, (HIGH, 1))).save(tmp_path / "a.tif")
    assert np.abs(image.read(tmp_path / "a.tif")[0, :, 0] - values * scale).max() <= 0.51


def test_floating_point_that_is_not_finite_fails(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(tmp_path / "a.tif")
    assert code_of(tmp_path / "a.tif") == "decode_error"


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.jpg", "CMYK"),
        ("a.tif", "CMYK"),
        ("a.png", "P"),
        ("a.gif", "P"),
        ("a.png", "L"),
        ("a.tif", "LAB"),
        ("a.jpg", "L"),
        ("a.png", "1"),
        ("a.pbm", "1"),
        ("a.pgm", "L"),
        ("a.bmp", "L"),
        ("a.tif", "1"),
    ],
)
def test_other_modes_become_rgb(name: str, mode: str, original: Image.Image, tmp_path: Path) -> None:
    source = original.convert(mode) if mode != "P" else original.quantize(200)
    source.save(tmp_path / name)
    expected = pixels(source) if mode != "LAB" else pixels(original)
    assert np.abs(image.read(tmp_path / name).astype(int) - expected).mean() < 4


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_transparent_parts_are_white_whatever_colour_hides_there(name: str, tmp_path: Path) -> None:
    source = Image.new("RGBA", (40, 20), (200, 0, 0, 255))
    source.paste((0, 0, 0, 0), (0, 0, 20, 20))
    source.save(tmp_path / name, **({"lossless": True, "exact": True} if name == "a.webp" else {}))
    read = image.read(tmp_path / name)
    assert (read[:, :20] == 255).all()
    assert (read[:, 20:] == (200, 0, 0)).all()


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_one_colour_that_counts_as_transparent_is_white(mode: str, tmp_path: Path) -> None:
    black = {"P": 0, "L": 0, "RGB": (0, 0, 0)}[mode]
    source = Image.new("RGB", (40, 20), (200, 0, 0))
    source.paste((0, 0, 0), (0, 0, 20, 20))
    source = source.quantize(2) if mode == "P" else source.convert(mode)
    if mode == "P":
        black = source.getpixel((0, 0))
    source.save(tmp_path / "a.png", transparency=black)
    read = image.read(tmp_path / "a.png")
    assert (read[:, :20] == 255).all()
    assert not (read[:, 20:] == 255).all()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.tif"])
def test_of_several_pictures_the_first_counts(name: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    red = image.read(tmp_path / name).astype(int)
    assert np.abs(red - (255, 0, 0)).max() < 5


CUTS = (
    "a.jpg",
    "progressive.jpg",
    "a.png",
    "a.webp",
    "a.tif",
    "lzw.tif",
    "jpeg.tif",
    "a.bmp",
    "a.ppm",
    "a.pgm",
    "a.gif",
)


@pytest.mark.parametrize(
    "name", [*CUTS, pytest.param("a.heic", marks=needs_heif), pytest.param("a.avif", marks=needs_avif)]
)
def test_a_file_cut_short_anywhere_fails_or_is_whole(
    name: str, original: Image.Image, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, object] = {"progressive": True} if "progressive" in name else {}
    if name in ("lzw.tif", "jpeg.tif"):
        options["compression"] = {"lzw.tif": "tiff_lzw", "jpeg.tif": "jpeg"}[name]
    path = tmp_path / name
    (original.convert("L") if name == "a.pgm" else original).save(path, **options)
    whole, data = image.read(path), path.read_bytes()
    codes = []
    for cut in [1, 3, *(len(data) * part // 40 for part in range(1, 40)), len(data) - 12, len(data) - 1]:
        path.write_bytes(data[:cut])
        try:
            read = image.read(path)
        except ItemFailed as error:
            codes.append(error.code)
        else:
            assert np.array_equal(read, whole)
    assert set(codes) <= {"decode_error", "not_an_image"}
    assert len(codes) > 36
    assert capfd.readouterr().err == ""


def test_what_is_no_picture_fails_whatever_its_name(tmp_path: Path, original: Image.Image) -> None:
    original.convert("RGB").save(tmp_path / "a.eps")
    (tmp_path / "eps.jpg").write_bytes((tmp_path / "a.eps").read_bytes())
    (tmp_path / "text.png").write_text("no picture\n")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "noise.jpg").write_bytes(np.random.default_rng(0).bytes(5000))
    assert code_of(tmp_path / "eps.jpg") == "not_an_image"
    assert code_of(tmp_path / "text.png") == "not_an_image"
    assert code_of(tmp_path / "noise.jpg") == "not_an_image"
    assert code_of(tmp_path / "empty.jpg") == "empty_image"


def test_a_picture_under_another_formats_name_is_read(tmp_path: Path, original: Image.Image) -> None:
    original.save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert np.array_equal(image.read(tmp_path / "a.jpg"), pixels(original))


def png(width: int, height: int, depth: int, rows: bytes) -> bytes:
    """A PNG file of RGB, of any size it claims to have."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def test_a_decompression_bomb_is_not_decoded(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(200_000, 200_000, 8, bytes(1 << 20)))
    with pytest.raises(ItemFailed, match=r"200000 × 200000 pixels; 178,956,970 in all are decoded") as caught:
        image.read(bomb)
    assert caught.value.code == "too_large"


def test_a_comment_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path: Path, original: Image.Image) -> None:
    original.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    text = b"Comment\0\0" + zlib.compress(bytes(80 << 20))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
    assert code_of(tmp_path / "a.png") == "decode_error"


def test_the_file_system_gets_its_reasons(tmp_path: Path) -> None:
    assert code_of(tmp_path / "nowhere.jpg") == "not_found"
    assert code_of(tmp_path) == "is_a_directory"
    os.mkfifo(tmp_path / "pipe.jpg")
    assert code_of(tmp_path / "pipe.jpg") == "not_a_file"


def test_a_jpeg_may_come_smaller_but_never_below_what_is_asked_for(tmp_path: Path) -> None:
    large = picture(3, 1600, 1200)
    large.save(tmp_path / "a.jpg", quality=95)
    large.save(tmp_path / "a.png")
    small = image.read(tmp_path / "a.jpg", least=256)
    assert small.shape == (300, 400, 3)
    assert np.abs(small.astype(int) - pixels(large.resize((400, 300), Image.Resampling.BOX))).mean() < 2
    assert image.read(tmp_path / "a.png", least=256).shape == (1200, 1600, 3)
    assert image.read(tmp_path / "a.jpg", least=1300).shape == (1200, 1600, 3)


def test_threads_side_by_side_get_the_same(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}{ending}" for number, ending in enumerate([".jpg", ".png", ".tif", ".webp"] * 6)]
    for number, path in enumerate(paths):
        picture(number).save(path)
    alone = [image.read(path) for path in paths]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(3):
            together = list(threads.map(image.read, paths))
            assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@needs_heif
def test_without_pillow_heif_a_heic_says_what_to_install(tmp_path: Path, original: Image.Image) -> None:
    original.save(tmp_path / "a.heic")
    script = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from pathlib import Path\n"
        "from embstore.errors import ItemFailed\n"
        "from embstore.media import image\n"
        "try: image.read(Path(sys.argv[1]))\n"
        "except ItemFailed as error: print(error.code, error.detail)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a.heic"], capture_output=True, text=True)
    assert done.stdout == "no_heif to read HEIC and HEIF, type: pip install 'embstore[heif]'\n"


@pytest.mark.parametrize("make", [lambda: b"\xff\xd8\xff\xe0", lambda: b"GIF89a", lambda: b"BM" + bytes(60)])
def test_a_header_with_nothing_behind_it_fails(make: Callable[[], bytes], tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(make())
    assert code_of(tmp_path / "a.jpg") in ("decode_error", "not_an_image")
