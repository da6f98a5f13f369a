"""What only a GPU can show: golden vectors on it, in any batch, out of memory, by workers that are killed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Command, Watcher
from numpy.typing import NDArray

from embstore.media import audio
from embstore.models import fbank, registry
from embstore.models.base import Model, Prepared
from embstore.models.wespeaker.model import Wespeaker
from embstore.models.wespeaker.network import Network, Precision

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from networks import build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICE = "cuda:0"
NETWORKS = ["ResNet34", "SimAM_ResNet34"]
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("wespeaker") is None, reason="the package wespeaker is not installed"
)
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("resemblyzer") is None, reason="the weights of resemblyzer are not installed"
)


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    products: NDArray[np.float32] = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return products


def noise(seconds: Sequence[float]) -> list[Prepared]:
    random = np.random.default_rng(0)
    settings = fbank.Settings()
    samples = [random.normal(0, 0.1, round(length * 16_000)).astype(np.float32) for length in seconds]
    return [Prepared(one, len(one) / 16_000, settings.frames(len(one))) for one in samples]


def load(name: str, precision: Precision) -> Wespeaker:
    network = Network(build(name), 80, batching="masked", device=DEVICE, precision=precision)
    assert network.batching == "masked"
    return Wespeaker(network, 256, fbank.Settings(), "first", 120.0, DEVICE)


@pytest.fixture
def mixed() -> list[Prepared]:
    """Lengths of 0.3 to 15 seconds in random order."""
    return noise(np.random.default_rng(1).uniform(0.3, 15, 24).tolist())


def test_features_equal_the_golden_ones(test_data: Path) -> None:
    golden = np.load(test_data / "wespeaker-golden" / "fbank.npz")
    compute = fbank.Fbank(fbank.Settings(), DEVICE)
    sounds = [audio.read(test_data / "speech" / name, None, None, 16_000).samples for name in golden]
    features, lengths = compute(sounds)
    for name, row, length in zip(golden, features.cpu().numpy(), lengths, strict=True):
        assert np.abs(row[:length] - golden[name]).max() < 1e-3
        assert not row[length:].any()


@needs_package
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 0.99999), ("auto", 0.9999)])
def test_golden_vectors_of_wespeaker(test_data: Path, precision: str, bound: float) -> None:
    folder = test_data / "wespeaker-golden"
    golden = np.load(folder / "embeddings.npz")
    model = registry.find("wespeaker", {"model_dir": str(folder / "model"), "precision": precision}).load(DEVICE)
    items = [model.prepare(test_data / "speech" / name, None, None) for name in golden]
    found = cosines(model.embed(items), np.stack([golden[name] for name in golden]))
    print(f"wespeaker, {precision}: lowest cosine {found.min():.8f}")
    assert found.min() > bound


@needs_weights
def test_golden_vectors_of_resemblyzer(test_data: Path) -> None:
    golden = np.load(test_data / "resemblyzer-golden.npz")
    rows = dict(zip(golden["path"].tolist(), golden["emb"], strict=True))
    names = [name for name in rows if name.startswith("librispeech/")]
    model: Model = registry.find("resemblyzer", {}).load(DEVICE)
    items = [model.prepare(test_data / "speech" / name, None, None) for name in names]
    found = cosines(model.embed(items), np.stack([rows[name] for name in names]))
    print(f"resemblyzer: lowest cosine {found.min():.8f}")
    assert found.min() > 0.99999


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 0.99999), ("bf16", 0.9999), ("fp16", 0.9999)])
def test_a_batch_changes_nothing(name: str, precision: Precision, bound: float, mixed: list[Prepared]) -> None:
    """Against one by one in float32 on the processor."""
    expected = _plain(name, mixed)
    model = load(name, precision)
    together, alone = model.embed(mixed), np.concatenate([model.embed([item]) for item in mixed])
    print(f"{name}, {precision}: lowest cosine {cosines(together, expected).min():.8f}")
    assert cosines(together, expected).min() > bound
    assert cosines(alone, expected).min() > bound


def _plain(name: str, items: Sequence[Prepared]) -> NDArray[np.float32]:
    module, compute = build(name), fbank.Fbank(fbank.Settings(), "cpu")
    with torch.inference_mode():
        rows = [module(compute([item.array])[0]) for item in items]
    return torch.cat([row[-1] if isinstance(row, tuple) else row for row in rows]).numpy()


def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same_vectors(mixed: list[Prepared]) -> None:
    model = load("SimAM_ResNet34", "fp32")
    expected = model.embed(mixed)
    before = model.max_cost
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (1 << 30)) / total)
    try:
        assert cosines(model.embed(mixed), expected).min() > 0.99999
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert model.max_cost < before


@needs_weights
def test_workers_that_share_a_gpu_are_killed_and_continued(database_url: str, test_data: Path, tmp_path: Path) -> None:
    """The vectors are those of an undisturbed run on the processor."""
    env = {"DATABASE_URL": database_url, "EMBSTORE_TEST_LEASE_SECONDS": "3"}
    words = ("extract", str(test_data / "speech"))
    killed = Command((*words, "--workers", "4", "--tune", "commit=8"), tmp_path, env)
    watcher = Watcher(database_url)
    watcher.wait_for_done(1)
    killed.workers()[0].kill()
    assert killed.wait(300) == 0, killed.err
    on_gpu = _vectors(watcher)
    assert len(on_gpu) == 395
    again = Command((*words, "--dataset", "cpu", "--gpus", "none", "--workers", "4"), tmp_path, env)
    assert again.wait(300) == 0, again.err
    both = _vectors(watcher)
    for (dataset, path), vector in both.items():
        assert float(vector @ both["speech", path]) > 0.99999, (dataset, path)


def _vectors(watcher: Watcher) -> dict[tuple[str, str], NDArray[np.float32]]:
    rows = watcher.rows(
        "SELECT d.name, i.path, e.embedding::real[] FROM embstore.embedding e"
        " JOIN embstore.item i USING (dataset_id, item_id) JOIN embstore.dataset d USING (dataset_id)"
    )
    return {(name, path): np.array(vector, np.float32) for name, path, vector in rows}
