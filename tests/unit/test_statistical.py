"""The model without weights: the statistics are the documented ones, and tell speakers apart better than chance."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from embstore.errors import ItemSkipped, UsageError
from embstore.models import mel
from embstore.models.statistical import recipe

DATA = Path(os.environ.get("EMBSTORE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_dimensions_are_means_then_deviations(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    model = recipe({}).load("cpu")
    item = model.prepare(tmp_path / "a.wav", None, None)
    row = model.embed([item])[0]
    logs = np.log(mel.power_mel(samples, 101))
    expected = np.concatenate([logs.mean(axis=0), logs.std(axis=0)])
    assert row.shape == (recipe({}).dim,) == (80,)
    assert row.dtype == np.float32
    assert item.seconds == 1.0
    assert np.allclose(row, expected / np.linalg.norm(expected), atol=1e-5)


def test_rows_keep_the_order_of_the_batch(tmp_path: Path) -> None:
    model = recipe({}).load("cpu")
    items = []
    for i in range(5):
        soundfile.write(tmp_path / f"{i}.wav", np.random.default_rng(i).normal(0, 0.01 * (i + 1), 8000), 16000)
        items.append(model.prepare(tmp_path / f"{i}.wav", None, None))
    rows = model.embed(items)
    assert rows.shape == (5, 80)
    assert np.array_equal(model.embed(items[::-1]), rows[::-1])
    assert len(np.unique(rows, axis=0)) == 5
    assert model.embed([]).shape == (0, 80)


def test_nothing_to_embed(tmp_path: Path) -> None:
    model = recipe({}).load("cpu")
    for name, samples, code in [("short", np.ones(399), "too_short"), ("silent", np.zeros(16000), "silent")]:
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000)
        with pytest.raises(ItemSkipped) as caught:
            model.prepare(tmp_path / f"{name}.wav", None, None)
        assert caught.value.code == code
    soundfile.write(tmp_path / "enough.wav", np.full(400, 0.1), 16000)
    row = model.embed([model.prepare(tmp_path / "enough.wav", None, None)])[0]
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-6)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no test data in {DATA}")
def test_readers_are_told_apart() -> None:
    paths = sorted((DATA / "speech" / "librispeech").glob("*/*.flac"))
    model = recipe({}).load("cpu")
    rows = model.embed([model.prepare(path, None, None) for path in paths])
    speakers = np.array([path.parent.name for path in paths])
    cosines = rows @ rows.T - 2 * np.eye(len(rows))
    assert np.mean(speakers[cosines.argmax(axis=1)] == speakers) > 0.9


def test_the_recipe_travels_and_has_no_options() -> None:
    plain = recipe({})
    assert (plain.name, plain.media, plain.dim) == ("statistical", "audio", 80)
    assert pickle.loads(pickle.dumps(plain)).fingerprint() == plain.fingerprint()
    with pytest.raises(UsageError, match="no option 'bands'"):
        recipe({"bands": "80"})


def test_it_needs_no_torch(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(1600, 0.1), 16000)
    code = (
        "import sys, pathlib; from embstore.models.statistical import recipe\n"
        "model = recipe({}).load('cpu')\n"
        f"model.embed([model.prepare(pathlib.Path({str(tmp_path / 'a.wav')!r}), None, None)])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
