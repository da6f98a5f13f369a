"""Resemblyzer's encoder gives what its own package gives, one by one or in batches, and refuses what has no speech."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from embstore.errors import ItemSkipped, ModelError, UsageError
from embstore.models import mel, vad
from embstore.models.base import Model, Prepared
from embstore.models.resemblyzer import ResemblyzerRecipe, recipe

DATA = Path(os.environ.get("EMBSTORE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
SPEECH = DATA / "speech"
NOTHING_LEFT = {"arabic-speech-commands/00000008/open_01.wav", "free-spoken-digits/yweweler/6_yweweler_1.wav"}

needs_data = pytest.mark.skipif(not SPEECH.is_dir(), reason=f"no test data in {DATA}")


def weights_are_installed() -> bool:
    try:
        return ResemblyzerRecipe().weights_file().is_file()
    except ModelError:
        return False


needs_weights = pytest.mark.skipif(not weights_are_installed(), reason="pip install --no-deps resemblyzer")


@pytest.fixture(scope="module")
def model() -> Model:
    return recipe({}).load("cpu")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray[Any, Any]]:
    with np.load(DATA / "resemblyzer-golden.npz") as file:
        return dict(zip(file["path"].tolist(), file["emb"], strict=True))


@pytest.fixture(scope="module")
def prepared(model: Model, golden: dict[str, Any]) -> dict[str, Prepared]:
    return {path: model.prepare(SPEECH / path, None, None) for path in golden if path not in NOTHING_LEFT}


@needs_data
@needs_weights
def test_all_files_equal_the_package(model: Model, golden: dict[str, Any], prepared: dict[str, Prepared]) -> None:
    rows = model.embed(list(prepared.values()))
    cosines = {path: float(row @ golden[path]) for path, row in zip(prepared, rows, strict=True)}
    assert {path: cosine for path, cosine in cosines.items() if cosine < 0.9999} == {}
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


@needs_data
@needs_weights
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_row_does_not_depend_on_its_batch(model: Model, prepared: dict[str, Prepared], size: int) -> None:
    items = list(prepared.values())[:130]
    reference = model.embed(items)
    order = np.random.default_rng(size).permutation(len(items))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        rows = model.embed([items[i] for i in part])
        assert np.abs(rows - reference[part]).max() <= 1e-6


@needs_weights
def test_an_item_larger_than_a_call_is_the_mean_of_its_windows(model: Model) -> None:
    windows = np.random.default_rng(0).random((2 * model.max_cost + 5, 160, 40), np.float32)
    ones = model.embed([Prepared(window[np.newaxis], 1.6, 1) for window in windows])
    mean = ones.mean(axis=0)
    whole = model.embed([Prepared(windows, 1.6 * len(windows), len(windows))])
    assert np.allclose(whole[0], mean / np.linalg.norm(mean), atol=1e-6)


@needs_weights
def test_an_empty_batch(model: Model) -> None:
    assert model.embed([]).shape == (0, 256)


@needs_data
@needs_weights
def test_a_stretch_equals_a_file_of_it(model: Model, tmp_path: Path) -> None:
    path = next((SPEECH / "librispeech").glob("*/*.flac"))
    samples, rate = soundfile.read(path, dtype="int16")
    soundfile.write(tmp_path / "cut.wav", samples[rate : 3 * rate], rate)
    item = model.prepare(path, 1.0, 2.0)
    assert item.seconds == 2.0
    assert item.cost == len(item.array)
    assert item.array.shape[1:] == (160, 40)
    assert np.array_equal(item.array, model.prepare(tmp_path / "cut.wav", None, None).array)


def code_of(model: Model, path: Path) -> str:
    with pytest.raises(ItemSkipped) as caught:
        model.prepare(path, None, None)
    return caught.value.code


@needs_weights
@pytest.mark.filterwarnings("error")
def test_nothing_to_embed(model: Model, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 1e-4, 32000)
    for name, samples, code in [
        ("silence", np.zeros(32000), "no_speech"),
        ("hiss", noise, "no_speech"),
        ("constant", np.full(32000, 0.5), "no_speech"),
        ("blink", noise[:480], "too_short"),
        ("sample", noise[:1], "too_short"),
        ("barely", np.zeros(2400), "no_speech"),
    ]:
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000, subtype="FLOAT")
        assert code_of(model, tmp_path / f"{name}.wav") == code, name


@needs_data
@needs_weights
@pytest.mark.filterwarnings("error")
def test_odd_audio(model: Model) -> None:
    assert code_of(model, DATA / "odd-audio" / "very_short_30ms.wav") == "too_short"
    assert code_of(model, DATA / "odd-audio" / "digital_silence_2s.wav") == "no_speech"
    assert {code_of(model, SPEECH / path) for path in NOTHING_LEFT} == {"no_speech"}
    row = model.embed([model.prepare(DATA / "odd-audio" / "dc_offset_clipped.wav", None, None)])[0]
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-6)


def slices(samples: int) -> list[int]:
    """First frames of the windows, as resemblyzer's `compute_partial_slices` finds them, step by step."""
    frames = math.ceil((samples + 1) / 160)
    starts = list(range(0, max(1, frames - 160 + 77 + 1), 77))
    if len(starts) > 1 and (samples - starts[-1] * 160) / 25600 < 0.75:
        starts.pop()
    return starts


@needs_data
@needs_weights
def test_windows_overlap_one_spectrogram(model: Model) -> None:
    path = "librispeech-cut/1970/1970-10594-0000_00.flac"
    item = model.prepare(SPEECH / path, None, None)
    samples, _ = soundfile.read(SPEECH / path, dtype="float32")
    speech = vad.keep_speech(vad.raise_volume(samples))
    starts = slices(len(speech))
    spectrogram = mel.power_mel(speech, starts[-1] + 160)
    assert len(item.array) == len(starts) > 1
    for window, start in zip(item.array, starts, strict=True):
        assert np.array_equal(window, spectrogram[start : start + 160])


def test_mel_of_a_tone_lies_in_its_band_and_beyond_the_end_is_nothing() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)
    power = mel.power_mel(tone, 3000)  # more frames than one chunk, and than there is audio
    # Slaney: 1 kHz is mel 15 of 45.245, and band i peaks at (i + 1) · 45.245 / 41.
    assert (power[2:98].argmax(axis=1) == 13).all()
    assert (power[103:] == 0).all()


def test_volume_only_rises() -> None:
    quiet = np.full(1000, 0.001, np.float32)
    loud = np.full(1000, 0.5, np.float32)
    assert np.sqrt(np.mean(vad.raise_volume(quiet) ** 2)) == pytest.approx(10 ** (-30 / 20), rel=1e-5)
    assert vad.raise_volume(loud) is loud
    assert (vad.raise_volume(np.zeros(10, np.float32)) == 0).all()


@needs_weights
def test_the_recipe_travels_and_tells_weights_apart(tmp_path: Path) -> None:
    plain = recipe({})
    assert (plain.name, plain.media, plain.dim) == ("resemblyzer", "audio", 256)
    assert pickle.loads(pickle.dumps(plain)) == plain
    other = tmp_path / "other.pt"
    other.write_bytes(ResemblyzerRecipe().weights_file().read_bytes())
    assert recipe({"weights": str(other)}).fingerprint() == plain.fingerprint()
    other.write_bytes(b"something else")
    assert recipe({"weights": str(other)}).fingerprint() != plain.fingerprint()


def test_unknown_option() -> None:
    with pytest.raises(UsageError, match=r"no option 'wieghts'; it knows: weights"):
        recipe({"wieghts": "x"})


def test_missing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = recipe({"weights": str(tmp_path / "none.pt")})
    with pytest.raises(ModelError, match=r"none\.pt"):
        missing.fingerprint()
    with pytest.raises(ModelError, match=r"none\.pt"):
        missing.load("cpu")
    # A package of that name without the file: what an unrelated or broken installation looks like.
    (tmp_path / "resemblyzer").mkdir()
    (tmp_path / "resemblyzer" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="type: pip install --no-deps resemblyzer"):
        recipe({}).fingerprint()


@needs_weights
def test_weights_must_be_complete_and_no_more(tmp_path: Path) -> None:
    import torch

    state = torch.load(ResemblyzerRecipe().weights_file(), map_location="cpu", weights_only=True)["model_state"]
    del state["lstm.bias_hh_l2"]
    state["surplus.weight"] = torch.zeros(1)
    torch.save({"model_state": state}, tmp_path / "odd.pt")
    with pytest.raises(ModelError, match=r"lack lstm\.bias_hh_l2 and have surplus\.weight too much"):
        recipe({"weights": str(tmp_path / "odd.pt")}).load("cpu")


class Attack:
    def __reduce__(self) -> Any:
        return os.mkdir, ("attacked",)


@needs_weights
@pytest.mark.parametrize("kind", ["text", "pickle", "list", "shape", "attack"])
def test_weights_that_are_none(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "odd.pt"
    if kind == "text":
        path.write_text("no weights")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"model_state": {}}, protocol=2))
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "attack":
        torch.save({"model_state": {}, "x": Attack()}, path)
    else:
        state = torch.load(ResemblyzerRecipe().weights_file(), map_location="cpu", weights_only=True)["model_state"]
        torch.save({"model_state": {name: value[:1] for name, value in state.items()}}, path)
    with pytest.raises(ModelError) as caught:
        recipe({"weights": str(path)}).load("cpu")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "attacked").exists()


@needs_weights
def test_a_device_that_is_none() -> None:
    with pytest.raises(ModelError, match="device cuda:99 can't be used"):
        recipe({}).load("cuda:99")


def test_the_recipe_imports_neither_torch_nor_the_package() -> None:
    code = (
        "import sys, contextlib, embstore.models.resemblyzer as r, embstore.errors as e\n"
        "with contextlib.suppress(e.ModelError): r.recipe({}).fingerprint()\n"
        "assert not {'torch', 'resemblyzer'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
