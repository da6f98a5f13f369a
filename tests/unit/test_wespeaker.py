"""WeSpeaker models: the golden vectors in any batch, what is refused, and options that say what is wrong with them."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from embstore.errors import ItemFailed, ItemSkipped, ModelError, UsageError
from embstore.extract.batching import Ready, embed_each
from embstore.models import fbank, registry, vad
from embstore.models.base import Prepared
from embstore.models.wespeaker import WespeakerRecipe, compiled, recipe
from embstore.models.wespeaker import model as wespeaker_model
from embstore.models.wespeaker.compiled import Compiled
from embstore.models.wespeaker.families import Batching
from embstore.models.wespeaker.model import Wespeaker
from embstore.models.wespeaker.network import has_bf16

DATA = Path(os.environ.get("EMBSTORE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
GOLDEN = DATA / "wespeaker-golden"
ONNX = GOLDEN / "model" / "model.onnx"
pytestmark = [
    pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden WeSpeaker model in {DATA}"),
    pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed"),
]
HAS_PACKAGE = importlib.util.find_spec("wespeaker") is not None
needs_openvino = pytest.mark.skipif(not compiled.is_installed(), reason="openvino is not installed")
needs_package = pytest.mark.skipif(not HAS_PACKAGE, reason="the package wespeaker is not installed")


def load(**options: str) -> Wespeaker:
    return cast(Wespeaker, recipe({"model_dir": str(ONNX), **options}).load("cpu"))


@pytest.fixture(scope="module")
def model() -> Wespeaker:
    return load()


def write(path: Path, samples: NDArray[Any], rate: int = 16_000) -> Path:
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


def noise(seconds: float, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    products: NDArray[np.float32] = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return products


PT = GOLDEN / "model"


@pytest.mark.parametrize(
    ("place", "runtime"),
    [
        (ONNX, "onnxruntime"),
        pytest.param(ONNX, "openvino", marks=needs_openvino),
        pytest.param(PT, "pytorch", marks=needs_package),
        pytest.param(PT, "openvino", marks=[needs_package, needs_openvino]),
    ],
    ids=lambda value: getattr(value, "suffix", value) or "pt",
)
def test_golden_vectors(place: Path, runtime: str) -> None:
    """All 18, those at 8 kHz too; not only their direction, as they are not normalised."""
    golden = np.load(GOLDEN / "embeddings.npz")
    model = load(model_dir=str(place), precision="fp32", runtime=runtime)
    items = [model.prepare(DATA / "speech" / name, None, None) for name in golden]
    rows, expected = model.embed(items), np.stack([golden[name] for name in golden])
    assert len(golden) == 18
    assert rows.dtype == np.float32
    assert cosines(rows, expected).min() > 0.99999
    assert np.allclose(np.linalg.norm(rows, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-4)


def test_golden_vectors_in_the_precision_that_is_the_default() -> None:
    """Whatever this processor is good at: bfloat16 where it has it."""
    golden = np.load(GOLDEN / "embeddings.npz")
    model = load()
    rows = model.embed([model.prepare(DATA / "speech" / name, None, None) for name in golden])
    assert cosines(rows, np.stack([golden[name] for name in golden])).min() > 0.9999


@needs_openvino
@pytest.mark.skipif(not has_bf16(), reason="this processor has no bfloat16")
def test_the_default_takes_what_the_processor_has() -> None:
    assert isinstance(load()._encoder, Compiled)
    path = DATA / "speech" / next(iter(np.load(GOLDEN / "embeddings.npz")))
    rows = [
        (model := load(**options)).embed([model.prepare(path, None, None)])[0]
        for options in ({}, {"precision": "bf16"}, {"precision": "fp32"})
    ]
    assert np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])


SIGNALLED = """
import os, signal, sys
from embstore.models.wespeaker import recipe
load = lambda: recipe({"model_dir": sys.argv[1], "runtime": "openvino", "precision": "fp32"}).load("cpu")
models = [load(), load()]
while models:
    del models[0]
signal.signal(signal.SIGUSR1, lambda *_: print("heard"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


@needs_openvino
def test_signals_are_heard_when_models_are_gone() -> None:
    result = subprocess.run([sys.executable, "-c", SIGNALLED, ONNX], capture_output=True, text=True, check=False)
    assert (result.stdout, result.returncode) == ("heard\n", 0), result.stderr


def test_batches_and_order_make_no_difference(model: Wespeaker, tmp_path: Path) -> None:
    lengths = [0.4, 1.0, 0.7, 1.0, 2.0, 1.0, 0.7, 0.31]
    paths = [write(tmp_path / f"{i}.wav", noise(seconds, i)) for i, seconds in enumerate(lengths)]
    items = [model.prepare(path, None, None) for path in paths]
    alone = np.concatenate([model.embed([item]) for item in items])
    assert np.allclose(model.embed(items), alone, rtol=1e-3, atol=1e-4)
    assert np.allclose(model.embed(items[::-1])[::-1], alone, rtol=1e-3, atol=1e-4)
    assert np.linalg.matrix_rank(alone) == len(alone)
    assert model.embed([]).shape == (0, 256)


@pytest.mark.parametrize(("batching", "groups"), [("single", 6), ("equal", 4), ("masked", 2)])
def test_what_goes_through_the_network_together(batching: Any, groups: int) -> None:
    samples = np.zeros(0, np.float32)
    windows = [wespeaker_model._Window(i, samples, n) for i, n in enumerate([100, 200, 100, 90, 60, 200])]
    made = list(wespeaker_model._groups(windows, batching, 1000))
    assert len(made) == groups
    assert sorted(window.item for group in made for window in group) == list(range(6))
    assert all(len(group) * group[0].frames <= 1000 for group in made)
    narrow = list(wespeaker_model._groups(windows, batching, 200))
    assert all(len(group) * group[0].frames <= 200 for group in narrow)


def test_large_batches_have_little_padding() -> None:
    """Of recordings of 1 to 15 s, in batches that keep a GPU busy; few of them make one batch all the same."""
    samples = np.zeros(0, np.float32)
    frames = np.random.default_rng(0).integers(98, 1499, 3000)

    def padding(count: int, batch: int) -> float:
        computed = 0
        for i in range(0, count, batch):
            windows = [wespeaker_model._Window(i, samples, int(n)) for n in frames[i : i + batch]]
            groups = wespeaker_model._groups(windows, "masked", 120_000)
            computed += sum(len(group) * group[0].frames for group in groups)
        return 1 - float(frames[:count].sum()) / computed

    assert padding(3000, 150) < 0.15
    assert padding(3000, 3000) < 0.05


class Small:
    """An encoder on a device on which not many frames find room at a time."""

    batching: Batching = "masked"

    def __init__(self, room: int, words: str | None = None) -> None:
        self.room, self.words = room, words
        self.passed: list[int] = []

    def encode(self, features: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        taken = features.shape[0] * features.shape[1]
        if taken > self.room:
            raise RuntimeError(self.words) if self.words else torch.cuda.OutOfMemoryError("CUDA out of memory.")
        self.passed.append(taken)
        return torch.stack([row[:n].std(0)[:4] for row, n in zip(features, lengths, strict=True)])


def small(room: int, words: str | None = None) -> tuple[Wespeaker, Small]:
    encoder = Small(room, words)
    model = Wespeaker(encoder, 4, fbank.Settings(), "first", 120.0, "cpu")
    model.max_cost = 1_000_000
    return model, encoder


@pytest.mark.parametrize("words", [None, "CUDNN_STATUS_ALLOC_FAILED", "Failed to allocate memory for requested buffer"])
def test_a_batch_that_does_not_fit_is_halved_and_so_are_those_that_follow(words: str | None) -> None:
    items = [Prepared(noise(1.0 + 0.01 * (i % 7), i), 1.0, 98) for i in range(40)]
    expected = small(1_000_000)[0].embed(items)
    model, encoder = small(1000, words)
    assert np.array_equal(model.embed(items), expected)
    assert max(encoder.passed) <= 1000
    assert model.max_cost < 4000
    tried = len(encoder.passed)
    encoder.room = 2000  # as much as it asks for by now
    assert np.array_equal(model.embed(items), expected)
    assert len(encoder.passed) <= 2 * tried


def test_what_does_not_fit_alone_fails_alone() -> None:
    """Through the pipeline's own halving, with the reason that says what to do; other errors are not taken for it."""
    model, _ = small(300)
    seconds = [1.0, 9.0, 2.0, 2.5]
    batch = [Ready(i, Prepared(noise(s, i), s, round(98 * s))) for i, s in enumerate(seconds)]
    outcomes = {o.key: o.result for o in embed_each(model, batch, 4)}
    assert isinstance(outcomes[1], ItemFailed)
    assert outcomes[1].code == "out_of_memory"
    assert "give a smaller max_window" in outcomes[1].detail
    assert [key for key, result in outcomes.items() if isinstance(result, np.ndarray)] == [0, 2, 3]
    model, _ = small(300, "an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        model.embed([item.prepared for item in batch])


def test_silences_are_cut_out_if_asked_for(test_data: Path, tmp_path: Path) -> None:
    """Not by default. What is cut is not loud: the same speech, ten times fainter, is cut in the same places."""
    plain, trimming = load(), load(vad="on")
    speech, rate = soundfile.read(next((test_data / "speech" / "librispeech").rglob("*.flac")), dtype="float32")
    assert rate == 16_000
    padded = np.concatenate([np.zeros(48_000), speech[:64_000], np.zeros(48_000)]).astype(np.float32)
    padded += np.random.default_rng(0).normal(0, 1e-5, len(padded)).astype(np.float32)
    loud, faint = write(tmp_path / "loud.wav", padded), write(tmp_path / "faint.wav", padded / 10)
    kept = trimming.prepare(loud, None, None)
    assert len(plain.prepare(loud, None, None).array) == len(padded)
    assert 16_000 < len(kept.array) < 80_000
    assert kept.seconds == len(padded) / rate
    assert set(kept.array.tolist()) <= set(padded.tolist())
    assert len(trimming.prepare(faint, None, None).array) == len(kept.array)
    assert trimming.embed([kept]).shape == (1, 256)
    with pytest.raises(ItemSkipped) as skipped:
        trimming.prepare(write(tmp_path / "hum.wav", noise(2.0) * 1e-4), None, None)
    assert skipped.value.code == "no_speech"


def test_silences_are_cut_out_of_long_recordings_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as all at once, and as Resemblyzer's, where the audio is faint."""
    samples = np.concatenate([noise(3.0), np.zeros(40_000, np.float32), noise(2.0, 1)]) * 0.3
    together = vad.trimmed(samples)
    monkeypatch.setattr(vad, "_CHUNK", 7 * vad.WINDOW)
    assert np.array_equal(vad.trimmed(samples), together)
    assert np.array_equal(vad.trimmed(samples[:100]), samples[:0])
    faint = samples / 100
    assert len(vad.trimmed(faint)) == len(vad.keep_speech(vad.raise_volume(faint))) == len(together)


def test_a_long_recording_is_the_mean_of_its_windows(tmp_path: Path) -> None:
    model = load(max_window="2")
    samples = noise(5.0)
    whole = model.prepare(write(tmp_path / "long.wav", samples), None, None)
    edges = [len(samples) * i // 3 for i in range(4)]
    parts = [samples[a:b] for a, b in itertools.pairwise(edges)]
    thirds = [model.prepare(write(tmp_path / f"{i}.wav", part), None, None) for i, part in enumerate(parts)]
    weights = np.array([third.cost for third in thirds], np.float32)
    expected = (model.embed(thirds) * weights[:, np.newaxis]).sum(0) / weights.sum()
    assert np.allclose(model.embed([whole])[0], expected, rtol=1e-3, atol=1e-4)
    assert not np.allclose(load().embed([whole])[0], expected, rtol=1e-2)


def test_windows_without_sound_count_for_nothing(tmp_path: Path) -> None:
    model = load(max_window="2")
    speech = noise(2.0)
    item = model.prepare(write(tmp_path / "a.wav", np.concatenate([speech, np.zeros(64_000)])), None, None)
    alone = model.prepare(write(tmp_path / "b.wav", speech), None, None)
    assert np.allclose(model.embed([item]), model.embed([alone]), rtol=1e-4, atol=1e-5)


def test_nothing_to_embed(model: Wespeaker, tmp_path: Path) -> None:
    """A ResNet pools eighths of frames and needs two of them: nine frames, 1680 samples."""
    assert model.min_frames == 9
    for name, samples, code in [
        ("one sample", noise(1)[:1], "too_short"),
        ("almost", noise(1)[:1679], "too_short"),
        ("zeros", np.zeros(16_000), "silent"),
        ("constant", np.full(16_000, 0.25), "silent"),
    ]:
        with pytest.raises(ItemSkipped) as skipped:
            model.prepare(write(tmp_path / f"{name}.wav", samples), None, None)
        assert skipped.value.code == code
    with pytest.raises(ItemFailed) as failed:
        model.prepare(write(tmp_path / "nan.wav", np.full(16_000, np.nan)), None, None)
    assert failed.value.code == "not_finite"
    enough = model.prepare(write(tmp_path / "enough.wav", noise(1)[:1680]), None, None)
    assert np.isfinite(model.embed([enough])).all()


def test_a_stretch_is_the_cut_file(model: Wespeaker, tmp_path: Path) -> None:
    samples = noise(3.0)
    stretch = model.prepare(write(tmp_path / "a.wav", samples), 1.0, 1.5)
    cut = model.prepare(write(tmp_path / "b.wav", samples[16_000:40_000]), None, None)
    assert np.array_equal(model.embed([stretch]), model.embed([cut]))
    assert stretch.seconds == 1.5
    assert stretch.cost == 148


def test_channels(tmp_path: Path) -> None:
    left, right = noise(1.0, 1), noise(1.0, 2)
    both = write(tmp_path / "both.wav", np.stack([left, right], axis=1))
    expected = {"first": left, "mean": (left + right) / 2}
    for channel, samples in expected.items():
        model = load(channel=channel)
        alone = model.prepare(write(tmp_path / f"{channel}.wav", samples), None, None)
        assert np.allclose(model.embed([model.prepare(both, None, None)]), model.embed([alone]), rtol=1e-3, atol=1e-4)


def test_window_and_scale_change_the_vector(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(1.0) * np.linspace(0, 1, 16_000, dtype=np.float32) ** 8)
    rows = [
        (model := load(**options)).embed([model.prepare(path, None, None)])[0]
        for options in ({}, {"window": "povey"}, {"sample_scale": "unit"})
    ]
    assert not np.allclose(rows[0], rows[1], rtol=1e-3)
    assert not np.allclose(rows[0], rows[2], rtol=1e-3)


def test_the_recipe_says_all_without_torch(tmp_path: Path) -> None:
    code = f"""
import pickle, sys
from embstore.models.wespeaker import recipe
made = recipe({{"model_dir": {str(GOLDEN / "model")!r}}})
assert (made.name, made.media, made.dim) == ("wespeaker:model", "audio", 256)
assert pickle.loads(pickle.dumps(made)) == made
print(made.fingerprint())
assert not {{"torch", "wespeaker", "onnxruntime"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == recipe({"model_dir": str(GOLDEN / "model")}).fingerprint()


def test_names() -> None:
    assert recipe({"model_dir": str(ONNX)}).name == "wespeaker:model"
    assert registry.find("wespeaker", {"model_dir": str(ONNX)}).dim == 256


def test_fingerprint_is_of_weights_and_preprocessing(tmp_path: Path) -> None:
    same = recipe({"model_dir": str(ONNX)}).fingerprint()
    assert recipe({"model_dir": str(shutil.copy(ONNX, tmp_path / "other.onnx"))}).fingerprint() == same
    assert pickle.loads(pickle.dumps(recipe({"model_dir": str(ONNX)}))).fingerprint() == same
    assert recipe({"model_dir": str(ONNX), "precision": "fp32"}).fingerprint() == same
    assert recipe({"model_dir": str(ONNX), "runtime": "onnxruntime"}).fingerprint() == same
    others = [
        {"window": "povey"},
        {"sample_scale": "unit"},
        {"channel": "mean"},
        {"max_window": "60"},
        {"vad": "on"},
    ]
    prints = {recipe({"model_dir": str(ONNX), **options}).fingerprint() for options in others}
    # Without the permissions of the files, which may be read-only.
    folder = shutil.copytree(GOLDEN / "model", tmp_path / "model", copy_function=shutil.copyfile)
    prints.add(recipe({"model_dir": str(folder)}).fingerprint())
    (folder / "avg_model.pt").write_bytes((folder / "avg_model.pt").read_bytes() + b"x")
    prints.add(recipe({"model_dir": str(folder)}).fingerprint())
    assert len(prints | {same}) == 8


def test_families_bring_their_preprocessing(tmp_path: Path) -> None:
    (tmp_path / "avg_model.pt").write_bytes(b"not read by the recipe")

    def made(config: str) -> WespeakerRecipe:
        (tmp_path / "config.yaml").write_text(config)
        return cast(WespeakerRecipe, recipe({"model_dir": str(tmp_path)}))

    resnet = made("model: ResNet34\nmodel_args: {feat_dim: 80, embed_dim: 256}\n")
    assert (resnet.features.window, resnet.features.sample_scale, resnet.dim) == ("hamming", "int16", 256)
    campplus = made("model: CAMPPlus\nmodel_args: {feat_dim: 80}\n")
    assert (campplus.features.window, campplus.features.sample_scale, campplus.dim) == ("povey", "unit", 512)
    redimnet = made("model: ReDimNetB2\nmodel_args: {feat_dim: 72}\ndataset_args: {resample_rate: 8000}\n")
    assert (redimnet.features.num_mel_bins, redimnet.features.sample_rate, redimnet.dim) == (72, 8000, 192)
    simam = made("model: SimAM_ResNet34_ASP\nmodel_args: {acoustic_dim: 64}\n")
    assert (simam.features.num_mel_bins, simam.dim) == (64, 256)
    over = cast(WespeakerRecipe, recipe({"model_dir": str(tmp_path), "window": "povey", "channel": "mean"}))
    assert (over.features.window, over.channel) == ("povey", "mean")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either model_dir="),
        ({"model_dir": str(ONNX), "variant": "english"}, "either model_dir="),
        ({"variant": "klingon"}, "english, chinese"),
        ({"model_dir": "/nowhere"}, "neither a folder nor an .onnx file"),
        ({"model_dir": str(GOLDEN)}, "neither avg_model.pt nor"),
        ({"model_dir": str(ONNX), "windw": "povey"}, "no option 'windw'"),
        ({"model_dir": str(ONNX), "window": "hann"}, "hamming, povey"),
        ({"model_dir": str(ONNX), "sample_scale": "8bit"}, "int16, unit"),
        ({"model_dir": str(ONNX), "channel": "last"}, "first, mean"),
        ({"model_dir": str(ONNX), "precision": "int8"}, "auto, fp32, bf16, fp16"),
        ({"model_dir": str(ONNX), "precision": "fp16"}, "leave precision=fp16 out"),
        ({"model_dir": str(ONNX), "runtime": "pytorch"}, "is an ONNX graph, not for pytorch"),
        ({"model_dir": str(GOLDEN / "model"), "runtime": "onnxruntime"}, "is a checkpoint, not for onnxruntime"),
        ({"model_dir": str(ONNX), "runtime": "tensorrt"}, "auto, pytorch, onnxruntime, openvino"),
        ({"model_dir": str(ONNX), "vad": "yes"}, "off, on"),
        ({"model_dir": str(ONNX), "num_mel_bins": "many"}, "not a number"),
        ({"model_dir": str(ONNX), "num_mel_bins": "40"}, "takes 80 mel bins, not 40"),
        ({"model_dir": str(ONNX), "max_window": "0.1"}, "max_window=0.1"),
        ({"model_dir": str(ONNX), "max_window": "nan"}, "max_window=nan"),
    ],
)
def test_options_that_are_wrong(options: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe(options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("model: Whisper\n", "does not know the model 'Whisper'"),
        ("- a\n- b\n", "no names with values"),
        ("model: [", "no YAML"),
        ("model: ResNet34\nmodel_args: {feat_dim: 80}\n", "no embed_dim"),
        ("model: ResNet34\nmodel_args: 3\n", "model_args should be"),
        ("model: ECAPA_TDNN_c512\ndataset_args: {frontend: s3prl}\n", "front end 's3prl'"),
        ("model: XVEC\ndataset_args: {resample_rate: fast}\n", "resample_rate 'fast'"),
        ("model: !!python/object/apply:os.getcwd []\n", "no YAML"),
    ],
)
def test_folders_that_are_wrong(tmp_path: Path, config: str, words: str) -> None:
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "avg_model.pt").write_bytes(b"")
    with pytest.raises(ModelError) as caught:
        recipe({"model_dir": str(tmp_path)})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(ModelError, match=r"broken\.onnx can't be loaded"):
        recipe({"model_dir": str(tmp_path)})


@pytest.mark.skipif(HAS_PACKAGE, reason="the package wespeaker is installed")
@pytest.mark.parametrize("options", [{"model_dir": str(GOLDEN / "model")}, {"variant": "english"}])
def test_without_the_package_one_line_says_how_to_get_it(options: dict[str, str]) -> None:
    with pytest.raises(ModelError, match=r"not installed; .*pip install --no-deps") as caught:
        recipe(options).load("cpu")
    assert "\n" not in str(caught.value)
