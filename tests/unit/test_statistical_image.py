"""Colour and gradient statistics, each dimension as it is documented."""

from __future__ import annotations

import importlib.util
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import picture
from PIL import Image

from embstore.errors import ItemFailed, UsageError
from embstore.models.base import Model
from embstore.models.statistical_image import DIM, SIDE, recipe, statistics

SKIMAGE = importlib.util.find_spec("skimage")


@pytest.fixture
def model() -> Model:
    return recipe({}).load("cpu")


def slowly(pixels: np.ndarray) -> np.ndarray:
    """The documentation, word by word and pixel by pixel."""
    colours, layout, edges = [0.0] * 64, [0.0] * 48, [0.0] * 128
    bright = [[0.299 * r + 0.587 * g + 0.114 * b for r, g, b in row] for row in (pixels / 255).tolist()]
    for y in range(128):
        for x in range(128):
            r, g, b = (int(value) for value in pixels[y, x])
            colours[16 * (r // 64) + 4 * (g // 64) + b // 64] += 1 / 128**2
            cell = (y // 32) * 4 + x // 32
            for channel, value in enumerate((r, g, b)):
                layout[3 * cell + channel] += value / 255 / 32**2
            if 0 < y < 127 and 0 < x < 127:
                across = (bright[y][x + 1] - bright[y][x - 1]) / 2
                down = (bright[y + 1][x] - bright[y - 1][x]) / 2
                length = math.hypot(across, down)
                if length >= 0.5 / 255:
                    direction = round(math.degrees(math.atan2(down, across)) / 22.5) % 8
                    edges[8 * cell + direction] += length
    total = sum(edges) or 1.0
    vector = [math.sqrt(share) for share in colours]
    vector += [(2 * mean - 1) / math.sqrt(48) for mean in layout]
    vector += [math.sqrt(length / total) for length in edges]
    return np.array(vector) / np.linalg.norm(vector)


@pytest.mark.parametrize("seed", [1, 2])
def test_it_is_what_the_documentation_says(seed: int) -> None:
    pixels = np.asarray(picture(seed, SIDE, SIDE))
    assert np.abs(statistics(pixels) - slowly(pixels)).max() < 1e-3
    assert statistics(pixels) @ slowly(pixels) == pytest.approx(1, abs=1e-5)


def test_one_colour_has_one_box_a_layout_and_no_edges() -> None:
    vector = statistics(np.full((SIDE, SIDE, 3), (255, 0, 70), np.uint8))
    vector /= vector[16 * 3 + 4 * 0 + 1]
    assert np.flatnonzero(vector[:64]).tolist() == [49]
    assert np.allclose(vector[64:112].reshape(16, 3) * math.sqrt(48), [1, -1, 2 * 70 / 255 - 1])
    assert not vector[112:].any()


@pytest.mark.parametrize(("axis", "direction"), [(1, 0), (0, 4)])
def test_an_edge_stands_in_its_cells_and_its_direction(axis: int, direction: int) -> None:
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    (pixels[:, 50:] if axis == 1 else pixels[50:])[:] = 255
    edges = statistics(pixels)[112:].reshape(4, 4, 8)
    assert set(np.argwhere(edges)[:, 2]) == {direction}
    assert set(np.argwhere(edges)[:, axis]) == {1}
    assert np.allclose(edges[edges > 0] ** 2, (edges**2).sum() / 4, rtol=0.1)


def test_any_picture_has_a_vector_of_length_one(model: Model, tmp_path: Path) -> None:
    for number, source in enumerate([Image.new("RGB", (9, 5), shade) for shade in ("black", "#808080", "white")]):
        source.save(tmp_path / f"{number}.png")
    picture(1, 1, 1).save(tmp_path / "3.png")
    picture(2, 3000, 20).save(tmp_path / "4.jpg")
    rows = model.embed([model.prepare(path, None, None) for path in sorted(tmp_path.iterdir())])
    assert rows.shape == (5, DIM)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert model.embed([]).shape == (0, DIM)


def test_size_and_format_hardly_matter(model: Model, tmp_path: Path) -> None:
    original = picture(5, 640, 480)
    original.save(tmp_path / "a.png")
    original.save(tmp_path / "a.jpg", quality=80)
    original.resize((2000, 1500)).save(tmp_path / "large.jpg")
    original.resize((200, 150)).save(tmp_path / "small.webp")
    picture(6, 640, 480).save(tmp_path / "other.png")
    vectors = {path.name: model.prepare(path, None, None).array for path in tmp_path.iterdir()}
    for name in ("a.jpg", "large.jpg", "small.webp"):
        assert vectors["a.png"] @ vectors[name] > 0.99
    assert vectors["a.png"] @ vectors["other.png"] < 0.9


@pytest.mark.skipif(SKIMAGE is None, reason="scikit-image, whose wheel carries pictures, is not installed")
def test_of_real_pictures_those_of_one_scene_are_nearest(model: Model) -> None:
    assert SKIMAGE is not None
    assert SKIMAGE.origin is not None
    folder = Path(SKIMAGE.origin).parent / "data"
    names = [
        "astronaut",
        "brick",
        "camera",
        "chelsea",
        "coffee",
        "grass",
        "motorcycle_left",
        "motorcycle_right",
        "text",
    ]
    rows = model.embed([model.prepare(folder / f"{name}.png", None, None) for name in names])
    cosines = rows @ rows.T - 2 * np.eye(len(rows))
    assert names[cosines[6].argmax()] == "motorcycle_right"
    assert names[cosines[7].argmax()] == "motorcycle_left"


def test_what_can_not_be_read_fails(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no picture")
    with pytest.raises(ItemFailed) as caught:
        model.prepare(tmp_path / "a.jpg", None, None)
    assert caught.value.code == "not_an_image"


def test_the_recipe_travels_and_has_no_options() -> None:
    plain = recipe({})
    assert (plain.name, plain.media, plain.dim) == ("statistical-image", "image", 240)
    assert pickle.loads(pickle.dumps(plain)).fingerprint() == plain.fingerprint()
    with pytest.raises(UsageError, match="no option 'side'"):
        recipe({"side": "64"})


def test_the_recipe_needs_no_pillow_and_the_model_no_torch(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    code = (
        "import sys, pathlib; from embstore.models.statistical_image import recipe\n"
        "plain = recipe({}); plain.fingerprint()\n"
        "assert 'PIL' not in sys.modules\n"
        f"plain.load('cpu').prepare(pathlib.Path({str(tmp_path / 'a.png')!r}), None, None)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
