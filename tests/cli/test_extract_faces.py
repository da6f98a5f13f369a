"""Faces through `embstore extract`, from real photos to the view `faces`; and the commands that come after it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import Command, Start, Watcher
from face_models import packages, photo, write_pack
from pictures import write_pictures

pytestmark = packages("facenet_pytorch", "skimage", "insightface", "onnx", "onnxruntime", "cv2")


def finish(command: Command, code: int) -> str:
    assert command.wait() == code, command.err
    return command.out


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of random weights for the network of `facenet`."""
    import torch

    from embstore.models.faces import facenet_package

    torch.manual_seed(0)
    torch.save(facenet_package.network().state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def test_photos_by_facenet(start: Start, weights: Path, tmp_path: Path, watcher: Watcher) -> None:
    for person, name in (("eileen", "one"), ("friends", "several"), ("nobody", "none")):
        (tmp_path / "photos" / person).mkdir(parents=True)
        shutil.copy(photo(name), tmp_path / "photos" / person)
    out = finish(start("extract", "photos", "--model", "facenet", "--model-dir", str(weights)), 0)
    assert "  skipped  1 (no_face 1)" in out
    assert "2 done + 0 failed + 1 skipped + 0 running + 0 pending = 3 images" in out
    rows = watcher.rows(
        "SELECT speaker, faces, round(x), width > 50, score > 0.99 FROM embstore.faces ORDER BY position"
    )
    assert rows == [("eileen", 1, 181.0, True, True), ("friends", 8, 465.0, True, True)]
    assert watcher.refused() == {"nobody/coffee.png": "no_face"}
    # The recipe is kept: nobody needs to name the weights again.
    shutil.copy(photo("several"), tmp_path / "photos" / "eileen" / "again.jpg")
    out = finish(start("extract", "photos", "--model", "facenet"), 0)
    assert "3 done" in out


def test_centroids_boundaries_search_and_export_take_images_as_they_are(
    start: Start, tmp_path: Path, watcher: Watcher
) -> None:
    pack = write_pack(tmp_path / "packs" / "small")
    write_pictures(tmp_path / "photos", 24, people=3)
    out = finish(start("extract", "photos", "--model", "arcface", "--model-dir", str(pack), "--workers", "2"), 0)
    assert "24 done + 0 failed + 0 skipped + 0 running + 0 pending = 24 images" in out
    assert watcher.rows("SELECT count(*), min(faces) > 0 FROM embstore.faces WHERE model = 'arcface:small'") == [
        (24, True)
    ]
    assert "averaging 3 speakers" in finish(start("centroids"), 0)
    finish(start("boundaries", "--dataset", "photos"), 0)
    shutil.copy(tmp_path / "photos" / "person-1" / "0007.jpg", tmp_path / "visitor.jpg")
    assert "person-1/0007.jpg" in finish(start("search", "visitor.jpg", "-k", "1"), 0)
    assert "person-2" in finish(start("search", "person-1", "--of", "speakers"), 0)
    finish(start("export", "centroids", "--format", "npz", "out"), 0)
    (file,) = (tmp_path / "out").rglob("*.npz")
    with np.load(file) as exported:
        assert any(values.shape == (3, 24) for values in exported.values())
