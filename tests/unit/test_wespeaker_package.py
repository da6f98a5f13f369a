"""Model folders through a package called wespeaker: a tiny one that lies in the test's folder, and the real one.

The tiny one has an architecture of its own in the place where WeSpeaker has them, and an `__init__` that fails, as the
real one's does where a package is missing that no embedding needs.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from embstore.errors import ModelError
from embstore.models import fbank
from embstore.models.base import Prepared
from embstore.models.wespeaker import WespeakerRecipe, compiled, families, package, proof, recipe
from embstore.models.wespeaker.model import Wespeaker
from embstore.models.wespeaker.network import Network

REAL = importlib.util.find_spec("wespeaker") is not None

INIT = "raise ImportError('a package that no embedding needs')\n"
POOLING = """
import torch
from torch import nn

class TSTP(nn.Module):
    def forward(self, x):
        return torch.cat([x.mean(-1).flatten(1), (x.var(-1) + 1e-7).sqrt().flatten(1)], 1)

class Last(nn.Module):
    def forward(self, x):
        return x[..., -1:].repeat(1, 1, 1, 2).flatten(1)
"""
RESNET = """
from torch import nn
import wespeaker.models.pooling_layers as pooling_layers

class ResNetTiny(nn.Module):
    def __init__(self, feat_dim, embed_dim, pooling_func="TSTP"):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.pool = getattr(pooling_layers, pooling_func)()
        self.seg_1 = nn.Linear(2 * 4 * feat_dim // 2, embed_dim)

    def forward(self, x):
        return 0.0, self.seg_1(self.pool(self.bn(self.conv(x.permute(0, 2, 1).unsqueeze_(1)))))
"""


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "wespeaker"]:
        del sys.modules[name]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model folder, and the package it needs."""
    models = tmp_path / "site" / "wespeaker" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").write_text(INIT)
    (models / "__init__.py").write_text("")
    (models / "pooling_layers.py").write_text(POOLING)
    (models / "resnet.py").write_text(RESNET)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    forget()
    folder = tmp_path / "tiny"
    folder.mkdir()
    config(folder)
    torch.save(weights(), folder / "avg_model.pt")
    yield folder
    forget()


def config(folder: Path, pooling: str = "TSTP") -> None:
    arguments = f"{{feat_dim: 80, embed_dim: 16, pooling_func: {pooling}}}"
    (folder / "config.yaml").write_text(f"model: ResNetTiny\nmodel_args: {arguments}\n")


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return trained(package.architecture("resnet", "ResNetTiny")(80, 16)).state_dict()


def trained(network: Any) -> Any:
    """Norms that do something, in place."""
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
            if part.affine:
                torch.nn.init.uniform_(part.weight, 0.7, 1.3)
                torch.nn.init.normal_(part.bias, 0, 0.1)
    return network.eval()


def load_error(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        recipe({"model_dir": str(folder)}).load("cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_loaded_without_the_packages_init(tiny: Path, tmp_path: Path) -> None:
    model = recipe({"model_dir": str(tiny), "precision": "fp32"}).load("cpu")
    samples = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    row = model.embed([model.prepare(tmp_path / "a.wav", None, None)])[0]
    network = package.architecture("resnet", "ResNetTiny")(80, 16).eval()
    network.load_state_dict(weights())
    features, _ = fbank.Fbank(fbank.Settings(), "cpu")([samples])
    with torch.inference_mode():
        assert np.allclose(row, network(features)[1][0], rtol=1e-4, atol=1e-4)
    assert "wespeaker" not in sys.modules


def test_the_training_classifier_and_a_wrapping_are_no_fault(tiny: Path) -> None:
    state = weights()
    del state["bn.num_batches_tracked"]
    torch.save({"state_dict": {**state, "projection.weight": torch.zeros(7, 16)}}, tiny / "avg_model.pt")
    assert recipe({"model_dir": str(tiny)}).load("cpu").embed([]).shape == (0, 16)


def test_weights_that_are_missing_or_left_over(tiny: Path) -> None:
    state = weights()
    state["seg_2.weight"] = state.pop("seg_1.weight")
    torch.save(state, tiny / "avg_model.pt")
    words = load_error(tiny)
    assert "seg_1.weight missing" in words
    assert "seg_2.weight left over" in words


def test_weights_of_another_shape(tiny: Path) -> None:
    torch.save({**weights(), "seg_1.bias": torch.zeros(3)}, tiny / "avg_model.pt")
    assert "seg_1.bias" in load_error(tiny)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must not run",)


def test_a_checkpoint_that_would_run_code(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({**weights(), "seg_1.bias": Evil()}, tiny / "avg_model.pt")
    assert "can't be read as a WeSpeaker checkpoint" in load_error(tiny)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_a_checkpoint_that_is_none(tiny: Path, content: bytes) -> None:
    (tiny / "avg_model.pt").write_bytes(content)
    assert "can't be read as a WeSpeaker checkpoint" in load_error(tiny)


def test_arguments_and_architectures_that_the_package_does_not_know(tiny: Path) -> None:
    (tiny / "config.yaml").write_text("model: ResNetTiny\nmodel_args: {feat_dim: 80, embed_dim: 16, depth: 3}\n")
    assert "model_args of config.yaml" in load_error(tiny)
    (tiny / "config.yaml").write_text("model: ResNet9000\nmodel_args: {feat_dim: 80, embed_dim: 16}\n")
    assert "has no model 'ResNet9000'; get a newer one" in load_error(tiny)


def test_a_hub_that_has_gone(tiny: Path) -> None:
    with pytest.raises(ModelError, match="can't be used"):
        recipe({"variant": "english"})


def test_pooling_that_cannot_be_masked_batches_equal_lengths(tiny: Path) -> None:
    build = package.architecture("resnet", "ResNetTiny")
    torch.manual_seed(0)
    for pooling, batching in (("TSTP", "masked"), ("Last", "equal")):
        network = Network(trained(build(80, 16, pooling)), 80, batching="masked", device="cpu", precision="fp32")
        assert network.batching == batching


@pytest.mark.skipif(not compiled.is_installed(), reason="openvino is not installed")
class TestCompiled:
    """By OpenVINO, on the processor."""

    def rows(self, encoder: Any, bins: int = 80) -> list[torch.Tensor]:
        return [encoder.encode(one, [one.shape[1]]) for one in proof.examples(bins)]

    def plain(self, network: Any) -> list[torch.Tensor]:
        with torch.inference_mode():
            outputs = [network(one.clone()) for one in proof.examples(80)]
        return [output[-1] if isinstance(output, tuple) else output for output in outputs]

    def test_it_is_what_the_default_takes(self, tiny: Path) -> None:
        default, asked = (recipe({"model_dir": str(tiny), **options}) for options in ({}, {"runtime": "openvino"}))
        for made in (default, asked):
            model = made.load("cpu")
            assert isinstance(model, Wespeaker)
            assert isinstance(model._encoder, compiled.Compiled)
        assert isinstance(default, WespeakerRecipe)
        assert default.faster("cpu") is None

    def test_the_pooling_layer_stays_in_float32(self, tiny: Path) -> None:
        """Its variance of large numbers that hardly differ is lost in bfloat16."""
        network = trained(package.architecture("resnet", "ResNetTiny")(80, 16))
        network.bn.bias.data += 30
        encoder = compiled.of_module(network, 80, "f32", 1)
        assert len(encoder._requests) == 2
        assert proof.lowest_cosine(self.rows(encoder), self.plain(network)) > 0.999999

    def test_another_way_to_pool(self, tiny: Path) -> None:
        """A network with no known pooling layer, or with two, is compiled as it is."""
        network = trained(package.architecture("resnet", "ResNetTiny")(80, 16, "Last"))
        assert len(compiled.of_module(network, 80, "f32", 1)._requests) == 2
        network.pool = torch.nn.Sequential(network.pool, torch.nn.Identity())
        network.spare = package.architecture("pooling_layers", "TSTP")()
        encoder = compiled.of_module(network, 80, "f32", 1)
        assert len(encoder._requests) == 1
        assert proof.lowest_cosine(self.rows(encoder), self.plain(network)) > 0.999999

    def test_averages_over_a_hundred_frames(self) -> None:
        network = Segments().eval()
        encoder = compiled.of_module(network, 80, "f32", 1)
        with torch.inference_mode():
            for frames in (1, 30, 99, 100, 101, 199, 200, 250):
                x = torch.randn(1, frames, 80)
                assert torch.allclose(encoder.encode(x, [frames]), network(x), atol=1e-4)

    def test_what_it_gets_wrong_is_left_to_pytorch(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(*_: object) -> Any:
            return Wrong()

        def broken(*_: object) -> Any:
            raise RuntimeError("no such\noperation")

        for fault, words in ((wrong, "are not those of the network"), (broken, "RuntimeError: no such operation")):
            monkeypatch.setattr(compiled, "of_module", fault)
            model = recipe({"model_dir": str(tiny)}).load("cpu")
            assert isinstance(model, Wespeaker)
            assert isinstance(model._encoder, Network)
            with pytest.raises(ModelError, match=words) as caught:
                recipe({"model_dir": str(tiny), "runtime": "openvino"}).load("cpu")
            assert "\n" not in str(caught.value)


class Wrong:
    """An encoder that takes one recording for another."""

    batching = "single"

    def encode(self, features: torch.Tensor, lengths: Any) -> torch.Tensor:
        return features[:, -1, :16]


class CAMLayer(torch.nn.Module):
    """As WeSpeaker's of that name, as far as it averages."""

    def seg_pooling(self, x: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.avg_pool1d(x, kernel_size=100, stride=100, ceil_mode=True)
        return means.unsqueeze(-1).expand(*means.shape, 100).reshape(*means.shape[:-1], -1)[..., : x.shape[-1]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seg_pooling(x)


class Segments(torch.nn.Module):
    """Something of each frame's distance from its segment's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = CAMLayer()

    def by_segment(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.transpose(1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.transpose(1, 2) - self.by_segment(x)).square().mean(2)


def test_without_openvino_pytorch_computes_and_the_advice_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "is_installed", lambda: False)
    made = recipe({"model_dir": str(tiny)})
    model = made.load("cpu")
    assert isinstance(made, WespeakerRecipe)
    assert isinstance(model, Wespeaker)
    assert isinstance(model._encoder, Network)
    assert "pip install 'embstore[wespeaker-openvino]'" in str(made.faster("cpu"))
    with pytest.raises(ModelError, match="it is not installed; type: pip install"):
        recipe({"model_dir": str(tiny), "runtime": "openvino"}).load("cpu")
    with pytest.raises(ModelError, match="is for processors, not for cuda:0"):
        recipe({"model_dir": str(tiny), "runtime": "openvino"}).load("cuda:0")


def test_pooling_in_a_lower_precision(tiny: Path) -> None:
    """In bfloat16 too a network pools in float32, so that what is left of the variance is right."""
    network = trained(package.architecture("resnet", "ResNetTiny")(80, 16))
    network.bn.bias.data += 30
    with torch.inference_mode():
        plain = [network(one.clone())[-1] for one in proof.examples(80)]
        with torch.autocast("cpu", torch.bfloat16):
            crude = [network(one.clone())[-1] for one in proof.examples(80)]
    lower = Network(network, 80, batching="single", device="cpu", precision="bf16")
    rows = [lower.encode(one, [one.shape[1]]) for one in proof.examples(80)]
    assert 1 - proof.lowest_cosine(rows, plain) < (1 - proof.lowest_cosine(crude, plain)) / 2


REAL_MODELS = {
    "ResNet18": {"feat_dim": 80, "embed_dim": 256},
    "ResNet34": {"feat_dim": 80, "embed_dim": 256},
    "SimAM_ResNet34_ASP": {"embed_dim": 256},
    "ECAPA_TDNN_c512": {"feat_dim": 80, "embed_dim": 192},
    "ECAPA_TDNN_GLOB_c512": {"feat_dim": 80, "embed_dim": 192},
    "CAMPPlus": {"feat_dim": 80, "embed_dim": 512},
    "ERes2Net34_Base": {"feat_dim": 80, "embed_dim": 512},
    "Res2Net34_Base": {"feat_dim": 80, "embed_dim": 256},
    "Gemini_DF_ResNet60": {"feat_dim": 80, "embed_dim": 256},
    "XVEC": {"feat_dim": 80, "embed_dim": 512},
    "ReDimNetB0": {"feat_dim": 60, "embed_dim": 192},
}


def noise(seconds: float, seed: int) -> NDArray[np.float32]:
    """Noise whose colour changes, so that its frames differ."""
    random = np.random.default_rng(seed).normal(0, 0.1, round(seconds * 16_000))
    return (random * (1.2 + np.sin(np.arange(len(random)) / 2000))).astype(np.float32)


@pytest.mark.skipif(not REAL, reason="the package wespeaker is not installed")
@pytest.mark.parametrize("name", REAL_MODELS)
def test_real_architectures_in_mixed_batches(name: str, tmp_path: Path) -> None:
    """A folder with random weights: in batches as on a GPU, the vectors of the package's module one by one."""
    arguments: dict[str, Any] = REAL_MODELS[name]
    family = families.find(name)
    assert family is not None
    torch.manual_seed(0)
    network = trained(package.architecture(family.module, name)(**arguments))
    torch.save(network.state_dict(), tmp_path / "avg_model.pt")
    (tmp_path / "config.yaml").write_text(f"model: {name}\nmodel_args: {arguments}\n")
    made = recipe({"model_dir": str(tmp_path), "precision": "fp32"})
    model = made.load("cpu")
    assert isinstance(model, Wespeaker)
    bins = int(arguments.get("feat_dim", 80))
    model._encoder = Network(network, bins, batching=family.batching, device="cpu", precision="fp32")
    assert model._encoder.batching == family.batching

    items = [noise(seconds, i) for i, seconds in enumerate([2.0, 1.99, 1.5, 1.1, 1.5, 1.01])]
    rows = model.embed([Prepared(samples, 0.0, len(samples) // 160) for samples in items])
    plain = package.architecture(family.module, name)(**arguments).eval()
    plain.load_state_dict(torch.load(tmp_path / "avg_model.pt", weights_only=True))
    bank = fbank.Fbank(fbank.Settings(16_000, bins, family.window, family.sample_scale), "cpu")
    for row, samples in zip(rows, items, strict=True):
        with torch.inference_mode():
            output = plain(bank([samples])[0].clone())
        expected = (output[-1] if isinstance(output, tuple) else output)[0].numpy()
        assert row @ expected / np.linalg.norm(row) / np.linalg.norm(expected) > 0.99999
