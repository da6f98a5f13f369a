"""FaceNet through facenet-pytorch's own networks: its detector with its real weights, its network with random ones."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from face_models import packages, photo
from pictures import picture
from PIL import Image

from embstore.errors import ItemFailed, ItemSkipped, ModelError, UsageError
from embstore.media import image
from embstore.models.faces import facenet_package as package
from embstore.models.faces.facenet import Facenet, recipe

pytestmark = packages("facenet_pytorch", "requests", "tqdm")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in half precision, with the classifier that released ones have."""
    import torch

    torch.manual_seed(0)
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in package.network().state_dict().items()
    }
    state |= {"logits.weight": torch.zeros(3, 512), "logits.bias": torch.zeros(3)}
    file = tmp_path_factory.mktemp("weights") / package.WEIGHTS["vggface2"]
    torch.save(state, file)
    return file


@pytest.fixture(scope="module")
def model(weights: Path) -> Facenet:
    loaded = recipe({"model_dir": str(weights)}).load("cpu")
    assert isinstance(loaded, Facenet)
    return loaded


@packages("skimage", "insightface")
@pytest.mark.parametrize(("name", "faces"), [("one", 1), ("several", 8)])
def test_the_largest_face_is_found_cropped_and_embedded_as_the_package_does(
    name: str, faces: int, model: Facenet, weights: Path
) -> None:
    import torch

    prepared = model.prepare(photo(name), None, None)
    assert prepared.face is not None
    assert prepared.face.faces == faces
    assert prepared.face.score > 0.99
    mtcnn = package.detector(torch.device("cpu"), 20, 0)
    source = Image.fromarray(image.read(photo(name)))
    boxes, scores = mtcnn.detect(source)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left, top, right, bottom = boxes[areas.argmax()]
    assert prepared.face[:4] == pytest.approx((left, top, right - left, bottom - top))
    assert prepared.face.score == pytest.approx(scores[areas.argmax()])
    theirs, probability = mtcnn(source, return_prob=True)
    assert probability == pytest.approx(prepared.face.score)
    assert np.array_equal(prepared.array, theirs.numpy())
    network = package.network()
    network.load_state_dict({k: v for k, v in torch.load(weights).items() if not k.startswith("logits.")})
    with torch.no_grad():
        vector = network.eval()(theirs[np.newaxis])[0].numpy()
    assert np.abs(model.embed([prepared])[0] - vector).max() < 1e-6


@packages("skimage")
def test_a_picture_on_its_side_is_upright_before_a_face_is_sought(model: Facenet, tmp_path: Path) -> None:
    with Image.open(photo("one")) as source:
        upright = source.convert("RGB")
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "aside.png", exif=exif)
    first, second = (model.prepare(tmp_path / f"{name}.png", None, None) for name in ("upright", "aside"))
    assert first.face == second.face
    assert np.array_equal(first.array, second.array)


@packages("skimage")
def test_no_face_is_skipped(model: Facenet, tmp_path: Path) -> None:
    picture(1, 19, 300).save(tmp_path / "narrow.png")
    picture(1, 1, 1).save(tmp_path / "dot.png")
    for path in (photo("none"), tmp_path / "narrow.png", tmp_path / "dot.png"):
        with pytest.raises(ItemSkipped, match="MTCNN finds no face in") as caught:
            model.prepare(path, None, None)
        assert caught.value.code == "no_face"
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ItemFailed) as failed:
        model.prepare(tmp_path / "text.jpg", None, None)
    assert failed.value.code == "not_an_image"


@packages("skimage", "insightface")
def test_a_batch_equals_one_by_one(model: Facenet) -> None:
    items = [model.prepare(photo(name), None, None) for name in ("one", "several", "one")]
    rows = model.embed(items)
    assert rows.shape == (3, 512)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert np.allclose(np.concatenate([model.embed([item]) for item in items]), rows, atol=1e-6)
    assert model.embed([]).shape == (0, 512)


def test_overlapping_boxes_are_left_out_group_by_group() -> None:
    import torch

    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 5.0]])
    scores, groups = torch.tensor([0.8, 0.9, 0.7, 0.1, 0.6]), torch.tensor([0, 0, 1, 0, 0])
    assert package._batched_nms(boxes, scores, groups, 0.5).tolist() == [1, 2, 4, 3]
    assert package._batched_nms(boxes, scores, groups, 0.4).tolist() == [1, 2, 3]
    assert package._batched_nms(boxes[:0], scores[:0], groups[:0], 0.5).tolist() == []


def test_what_is_chosen_shows_in_name_and_fingerprint(weights: Path, tmp_path: Path) -> None:
    plain = recipe({"model_dir": str(weights.parent)})
    assert (plain.name, plain.media, plain.dim) == ("facenet", "image", 512)
    assert pickle.loads(pickle.dumps(plain)).fingerprint() == plain.fingerprint()
    other = recipe({"model_dir": str(weights), "variant": "casia-webface"})
    assert other.name == "facenet:casia-webface"
    assert (
        len(
            {
                recipe({"model_dir": str(weights), **more}).fingerprint()
                for more in ({}, {"min_face": "40"}, {"margin": "14"})
            }
        )
        == 3
    )
    for options, words in (
        ({"size": "1"}, "no option 'size'; it knows: model_dir, variant, min_face, margin"),
        ({"variant": "large"}, "there is no model facenet:large; there are: vggface2, casia-webface"),
        ({"model_dir": str(tmp_path)}, r"no file of weights .*20180402-114759-vggface2\.pt"),
        ({"model_dir": str(weights), "min_face": "5"}, "min_face=5 is not a number of pixels, 12 to 1000"),
    ):
        with pytest.raises(UsageError, match=words):
            recipe(options)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    import torch

    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"conv2d_1a.conv.weight": torch.zeros(1)}, tmp_path / "few.pt")
    state = package.network().state_dict()
    state["last_linear.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "shape.pt")
    torch.save(eval, tmp_path / "code.pt")
    for name, words in (("text", ""), ("few", r"\d+ missing, 0 left over"), ("shape", ""), ("code", "")):
        with pytest.raises(
            ModelError, match=rf"{name}\.pt is no file of weights of InceptionResnetV1: .*{words}"
        ) as caught:
            recipe({"model_dir": str(tmp_path / f"{name}.pt")}).load("cpu")
        assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_one_line(weights: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match="device cuda:0 can't be used"):
        recipe({"model_dir": str(weights)}).load("cuda:0")


def test_weights_are_downloaded_once_to_where_the_package_keeps_them(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(package, "_RELEASE", f"{tmp_path.as_uri()}/nowhere/")
    with pytest.raises(
        ModelError, match=r"vggface2\.pt can't be downloaded \(.*\); get it from .* --model-dir"
    ) as caught:
        recipe({}).fingerprint()
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(package, "_RELEASE", f"{weights.parent.as_uri()}/")
    assert recipe({}).fingerprint() == recipe({"model_dir": str(weights)}).fingerprint()
    monkeypatch.setattr(package, "_RELEASE", "")
    assert recipe({}).load("cpu").max_cost > 0


def test_what_is_missing_is_named_with_what_to_install(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install = r"pip install 'embstore\[facenet\]'; pip install --no-deps facenet-pytorch"
    made = recipe({"model_dir": str(weights)})
    for name in [name for name in sys.modules if name.startswith("facenet_pytorch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "requests", None)
    with pytest.raises(ModelError, match=install):
        made.load("cpu")
    monkeypatch.setattr(package, "_NAME", "no_such_package")
    with pytest.raises(ModelError, match=rf"the package facenet-pytorch is not installed; type: {install}"):
        made.fingerprint()


def test_importing_it_leaves_nothing_of_torchvision_behind() -> None:
    package.network()
    assert "torchvision" not in sys.modules
    assert "facenet_pytorch" not in sys.modules
