"""deepface through the package itself: its real default detector, its loaders, small random graphs for its networks."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from face_models import packages, photo, write_network
from pictures import picture

from embstore.errors import ItemFailed, ItemSkipped, ModelError, UsageError
from embstore.media import image
from embstore.models.faces import deepface
from embstore.models.faces.deepface import NETWORKS, Deepface, recipe

pytestmark = packages("deepface", "onnx", "onnxruntime", "cv2", "werkzeug")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """deepface's home, with weights for two networks."""
    folder = tmp_path_factory.mktemp("home")
    for name, side in (("Facenet512", 160), ("VGG-Face", 224)):
        file, dim = NETWORKS[name]
        write_network(folder / ".deepface" / "weights" / file, side=side, dim=dim)
    return folder


@pytest.fixture(autouse=True)
def _nothing_kept_by_deepface() -> Iterator[None]:
    """It keeps the models that it has made, for good."""
    yield
    modeling = sys.modules.get("deepface.modules.modeling")
    for made in getattr(modeling, "cached_models", {}).values():
        made.clear()


def load(home: Path, **options: str) -> Deepface:
    loaded = recipe({"model_dir": str(home), **options}).load("cpu")
    assert isinstance(loaded, Deepface)
    return loaded


@packages("skimage", "insightface")
@pytest.mark.parametrize(
    ("variant", "normalization", "name"),
    [("VGG-Face", "base", "one"), ("Facenet512", "Facenet", "one"), ("Facenet512", "base", "several")],
)
def test_the_largest_face_and_its_vector_are_deepfaces_own(
    variant: str, normalization: str, name: str, home: Path
) -> None:
    model = load(home, variant=variant, normalization=normalization)
    prepared = model.prepare(photo(name), None, None)
    from deepface.modules import representation

    pixels = np.ascontiguousarray(image.read(photo(name))[..., ::-1])
    every = representation.represent(pixels, model_name=variant, normalization=normalization)
    (theirs,) = representation.represent(pixels, model_name=variant, normalization=normalization, max_faces=1)
    area = theirs["facial_area"]
    assert prepared.face == (area["x"], area["y"], area["w"], area["h"], theirs["face_confidence"], len(every))
    vector = np.array(theirs["embedding"], np.float32)
    assert np.abs(model.embed([prepared])[0] - vector).max() < 1e-5 * np.abs(vector).max()


@packages("skimage", "insightface")
def test_a_batch_equals_one_by_one_in_threads_too(home: Path) -> None:
    model = load(home, variant="Facenet512")
    paths = [photo(name) for name in ("one", "several", "one", "several")]
    with ThreadPoolExecutor(4) as threads:
        items = list(threads.map(lambda path: model.prepare(path, None, None), paths))
    rows = model.embed(items)
    assert (rows.shape, rows.dtype) == ((4, 512), np.float32)
    assert np.array_equal(rows[:2], rows[2:])
    assert np.allclose(np.concatenate([model.embed([item]) for item in items]), rows, rtol=1e-4, atol=1e-5)
    assert model.embed([]).shape == (0, 512)


@packages("skimage")
def test_no_face_is_skipped(home: Path, tmp_path: Path) -> None:
    model = load(home)
    picture(1, 3, 3).save(tmp_path / "dot.png")
    for path in (photo("none").with_name("brick.png"), tmp_path / "dot.png"):
        with pytest.raises(ItemSkipped, match="deepface's detector opencv finds no face in") as caught:
            model.prepare(path, None, None)
        assert caught.value.code == "no_face"
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ItemFailed) as failed:
        model.prepare(tmp_path / "empty.jpg", None, None)
    assert failed.value.code == "empty_image"


def test_what_is_chosen_shows_in_name_and_fingerprint(home: Path, tmp_path: Path) -> None:
    plain = recipe({"model_dir": str(home)})
    assert (plain.name, plain.media, plain.dim) == ("deepface", "image", 4096)
    assert pickle.loads(pickle.dumps(plain)).fingerprint() == plain.fingerprint()
    assert recipe({"model_dir": str(home / ".deepface" / "weights")}).fingerprint() == plain.fingerprint()
    assert recipe({"model_dir": str(home), "detector": "yunet"}).fingerprint() != plain.fingerprint()
    other = recipe({"model_dir": str(home), "variant": "Facenet512"})
    assert (other.name, other.dim) == ("deepface:Facenet512", 512)
    for options, words in (
        ({"size": "1"}, "no option 'size'; it knows: model_dir, variant, detector, normalization"),
        ({"variant": "Dlib"}, "there is no model deepface:Dlib; there are: VGG-Face, Facenet, "),
        ({"normalization": "none"}, "normalization=none is not one of: base, raw"),
        ({"model_dir": str(tmp_path / "none")}, "there is no folder"),
    ):
        with pytest.raises(UsageError, match=words):
            recipe(options)


def test_networks_are_those_of_the_package() -> None:
    from deepface.modules.modeling import AVAILABLE_MODELS

    offered = AVAILABLE_MODELS["facial_recognition"]
    assert set(NETWORKS) == {name for name, sources in offered.items() if "onnx" in str(sources)} - {"Buffalo_L"}


@packages("gdown")
def test_weights_are_downloaded_by_the_package_and_a_failure_is_one_line(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepface.commons import weight_utils

    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("DEEPFACE_HOME", str(tmp_path))
    with pytest.raises(
        ModelError, match=r"its network Facenet512 can't be made: .* downloading facenet512_weights"
    ) as caught:
        recipe({"variant": "Facenet512"}).fingerprint()
    assert "\n" not in str(caught.value)
    file = NETWORKS["Facenet512"][0]

    def fetch(_url: str, output: str, **_: Any) -> None:
        Path(output).write_bytes((home / ".deepface" / "weights" / file).read_bytes())

    # The network itself is out of reach here: all but the transfer is deepface's own.
    monkeypatch.setattr(weight_utils, "ensure_source_is_reachable", lambda _url: None)
    monkeypatch.setattr(weight_utils.gdown, "download", fetch)
    made = recipe({"variant": "Facenet512"})
    assert made.fingerprint() == recipe({"variant": "Facenet512", "model_dir": str(home)}).fingerprint()
    assert (tmp_path / ".deepface" / "weights" / file).is_file()
    assert capsys.readouterr().out == ""


def test_a_detector_that_can_not_be_made_is_one_line(home: Path) -> None:
    with pytest.raises(ModelError, match=r"its detector nobody can't be made: .*face_detector/nobody") as caught:
        load(home, detector="nobody")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["deepface.modules.modeling", "cv2"])
def test_what_is_missing_is_named_with_what_to_install(
    missing: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModelError, match=r"pip install 'embstore\[deepface\]'"):
        load(home)


def test_the_environment_is_left_as_it_was(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPFACE_HOME", "/elsewhere")
    monkeypatch.delenv("DEEPFACE_BACKEND_ENGINE", raising=False)
    with deepface._environment(home):
        assert deepface.os.environ["DEEPFACE_HOME"] == str(home)
    assert deepface.os.environ["DEEPFACE_HOME"] == "/elsewhere"
    assert "DEEPFACE_BACKEND_ENGINE" not in deepface.os.environ
