"""ArcFace by the real loaders, with small random graphs; held against the package insightface."""

from __future__ import annotations

import io
import pickle
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from face_models import packages, photo, write_detector, write_pack, write_recogniser
from pictures import picture

from embstore.errors import ItemFailed, ItemSkipped, ModelError, UsageError
from embstore.media import image
from embstore.models.faces import align, arcface_pack
from embstore.models.faces.arcface import Arcface, recipe

pytestmark = packages("onnx", "onnxruntime", "cv2")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(tmp_path_factory.mktemp("packs") / "small")


@pytest.fixture(scope="module")
def model(pack: Path) -> Arcface:
    loaded = recipe({"model_dir": str(pack)}).load("cpu")
    assert isinstance(loaded, Arcface)
    return loaded


def insightface_app(folder: Path) -> Any:
    from insightface.app import FaceAnalysis

    app = FaceAnalysis(
        name=str(folder), allowed_modules=["detection", "recognition"], providers=["CPUExecutionProvider"]
    )
    app.prepare(ctx_id=-1)
    return app


@packages("insightface", "skimage")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["one", "several"])
def test_boxes_points_and_vectors_are_those_of_insightface(name: str, model: Arcface, pack: Path) -> None:
    app = insightface_app(pack)
    pixels = image.read(photo(name))
    theirs = np.ascontiguousarray(pixels[..., ::-1])
    boxes, points = app.det_model.detect(theirs)
    found = model._detector.detect(pixels)
    assert np.array_equal(np.column_stack([found.boxes, found.scores]), boxes)
    assert np.array_equal(found.points, points)
    prepared = model.prepare(photo(name), None, None)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left, top, right, bottom, score = (float(value) for value in boxes[areas.argmax()])
    assert prepared.face == (left, top, right - left, bottom - top, score, len(boxes))
    from insightface.app.common import Face

    face = Face(bbox=boxes[areas.argmax(), :4], kps=points[areas.argmax()], det_score=score)
    app.models["recognition"].get(theirs, face)
    assert np.abs(model.embed([prepared])[0] - face.normed_embedding).max() < 1e-5


@packages("skimage")
def test_the_similarity_is_that_of_scikit_image() -> None:
    from skimage.transform import SimilarityTransform

    dice = np.random.default_rng(0)
    for _ in range(20):
        points = dice.normal(50, 30, (5, 2)).astype(np.float32)
        theirs = SimilarityTransform.from_estimate(points, align.POINTS).params[:2]
        assert np.allclose(align.similarity(points, align.POINTS), theirs, atol=1e-5)


def test_a_face_that_stands_right_already_is_left_alone() -> None:
    pixels = np.asarray(picture(1, 112, 112))
    assert np.array_equal(align.upright(pixels, align.POINTS, 112), pixels)
    wide = align.upright(pixels, align.POINTS, 128)
    assert wide.shape == (128, 128, 3)
    assert np.array_equal(wide[:112, 8:120], pixels)
    assert not wide[:, :7].any()


def test_a_batch_equals_one_by_one_and_so_does_a_graph_that_takes_one(model: Arcface, tmp_path: Path) -> None:
    items = []
    for number in range(5):
        picture(number, 300, 200).save(tmp_path / f"{number}.png")
        items.append(model.prepare(tmp_path / f"{number}.png", None, None))
    rows = model.embed(items)
    assert rows.shape == (5, 24)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert np.allclose(np.concatenate([model.embed([item]) for item in items]), rows, atol=1e-6)
    assert model.embed([]).shape == (0, 24)
    (tmp_path / "single").mkdir()
    write_detector(tmp_path / "single" / "det.onnx")
    write_recogniser(tmp_path / "single" / "rec.onnx", batch=1)
    single = recipe({"model_dir": str(tmp_path / "single")}).load("cpu")
    assert np.allclose(single.embed(items), rows, atol=1e-6)


def test_no_face_is_skipped_and_a_broken_picture_fails(tmp_path: Path) -> None:
    write_detector(tmp_path / "det.onnx", bias=-50)
    write_recogniser(tmp_path / "rec.onnx")
    model = recipe({"model_dir": str(tmp_path)}).load("cpu")
    picture(1).save(tmp_path / "a.png")
    picture(1, 1000, 1).save(tmp_path / "line.png")
    for name in ("a.png", "line.png"):
        with pytest.raises(ItemSkipped, match=r"det\.onnx finds no face in") as caught:
            model.prepare(tmp_path / name, None, None)
        assert caught.value.code == "no_face"
    (tmp_path / "b.jpg").touch()
    with pytest.raises(ItemFailed) as failed:
        model.prepare(tmp_path / "b.jpg", None, None)
    assert failed.value.code == "empty_image"


@packages("insightface")
def test_a_recogniser_that_scales_its_input_gets_it_unscaled(tmp_path: Path) -> None:
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX

    write_detector(tmp_path / "det.onnx")
    write_recogniser(tmp_path / "rec.onnx", scales_itself=True)
    made = recipe({"model_dir": str(tmp_path)})
    assert made.settings["pixels"] == "0 to 255"
    model = made.load("cpu")
    picture(3, 200, 200).save(tmp_path / "a.png")
    prepared = model.prepare(tmp_path / "a.png", None, None)
    aligned = prepared.array.transpose(1, 2, 0).astype(np.uint8)
    (theirs,) = ArcFaceONNX(str(tmp_path / "rec.onnx")).get_feat(np.ascontiguousarray(aligned[..., ::-1]))
    assert np.abs(model.embed([prepared])[0] - theirs / np.linalg.norm(theirs)).max() < 1e-5


def test_faces_may_be_searched_at_one_size(pack: Path, tmp_path: Path) -> None:
    both, one = (recipe({"model_dir": str(pack), **more}) for more in ({}, {"det_size": "320"}))
    assert both.fingerprint() != one.fingerprint()
    assert one.settings["detector"]["sizes"] == [320]
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    write_detector(fixed / "det.onnx", side=160)
    write_recogniser(fixed / "rec.onnx")
    picture(1, 200, 100).save(tmp_path / "a.png")
    found = recipe({"model_dir": str(fixed)})
    assert found.settings["detector"]["sizes"] == [160]
    assert found.load("cpu").prepare(tmp_path / "a.png", None, None).face is not None
    with pytest.raises(UsageError, match="its detector takes 160 pixels a side"):
        recipe({"model_dir": str(fixed), "det_size": "640"})


def test_names_options_and_files_that_can_not_be_used(pack: Path, tmp_path: Path) -> None:
    made = recipe({"model_dir": str(pack)})
    assert (made.name, made.media, made.dim) == ("arcface:small", "image", 24)
    assert pickle.loads(pickle.dumps(made)).fingerprint() == made.fingerprint()
    assert recipe({"model_dir": str(write_pack(tmp_path / "buffalo_l"))}).name == "arcface"
    for options, words in (
        ({"size": "1"}, "no option 'size'; it knows: model_dir, variant, det_size"),
        ({"variant": "../x"}, "is not the name of a pack"),
        ({"variant": "small", "model_dir": str(pack)}, "not both"),
        ({"model_dir": str(tmp_path / "none")}, "there is no folder"),
        ({"model_dir": str(pack), "det_size": "100"}, "neither auto nor a multiple of 32"),
    ):
        with pytest.raises(UsageError, match=words):
            recipe(options)
    odd = tmp_path / "odd"
    odd.mkdir()
    with pytest.raises(ModelError, match=r"of the 0 \.onnx files .* none is a detector"):
        recipe({"model_dir": str(odd)})
    write_detector(odd / "det.onnx", points=False)
    with pytest.raises(ModelError, match="none is a recogniser"):
        recipe({"model_dir": str(odd)})
    write_recogniser(odd / "rec.onnx")
    with pytest.raises(ModelError, match="finds no eyes, nose and mouth"):
        recipe({"model_dir": str(odd)})
    (odd / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match=r"broken\.onnx can't be read as an ONNX model"):
        recipe({"model_dir": str(odd)})


@pytest.mark.parametrize(("missing", "step"), [("onnx", "recipe"), ("onnxruntime", "load"), ("cv2", "load")])
def test_what_is_missing_is_named_with_what_to_install(
    missing: str, step: str, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe({"model_dir": str(pack)})
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModelError, match=r"pip install 'embstore\[arcface\]'") as caught:
        recipe({"model_dir": str(pack)}) if step == "recipe" else made.load("cpu")
    assert "\n" not in str(caught.value)


def test_a_gpu_that_is_not_there_is_one_line(pack: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ModelError, match="the installed onnxruntime has no CUDA"):
        recipe({"model_dir": str(pack)}).load("cuda:0")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """Address of a server on this machine that offers tmp_path/site."""
    (tmp_path / "site").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "site")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@packages("insightface")
def test_a_pack_is_downloaded_by_the_package_and_then_found(
    site: str, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from insightface.utils import storage

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(storage, "model_zoo_download_url", lambda name: f"{site}/{name}")
    with pytest.raises(ModelError, match=r"buffalo_l can't be downloaded \(.*\); unpack .*/buffalo_l\.zip yourself"):
        recipe({})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in pack.iterdir():
            archive.write(file, file.name)
    (tmp_path / "site" / "buffalo_s.zip").write_bytes(packed.getvalue())
    made = recipe({"variant": "buffalo_s"})
    assert made.name == "arcface:buffalo_s"
    assert made.fingerprint() == recipe({"model_dir": str(pack)}).fingerprint()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(storage, "model_zoo_download_url", None)
    assert recipe({"variant": "buffalo_s"}).dim == 24


def test_without_the_package_it_is_said_where_a_pack_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(arcface_pack.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(
        ModelError, match=r"there is no .*/\.insightface/models/buffalo_l; unpack https://.*buffalo_l\.zip"
    ):
        recipe({})
