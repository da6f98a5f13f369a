"""Models are found by name in embstore itself and in other packages, here in real ones made for the test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from embstore.errors import ModelError, UsageError
from embstore.models import registry

MODULE = """
from dataclasses import dataclass

import numpy as np

from embstore.errors import UsageError
from embstore.models.base import Prepared


def recipe(options):
    if set(options) - {"variant", "size"}:
        raise UsageError("model loudness has options variant and size")
    return Loudness(options.get("variant", "plain"), options.get("size", ""))


@dataclass(frozen=True)
class Loudness:
    variant: str
    size: str
    name = "loudness"
    media = "audio"
    dim = 2

    def load(self, device):
        return self

    def embed(self, batch):
        return np.array([[item.array.max(), item.array.min()] for item in batch], np.float32)
"""


def install(folder: Path, package: str, models: dict[str, str], module: str = MODULE) -> None:
    """Put a distribution into a folder, as an installer leaves it."""
    (folder / f"{package}.py").write_text(module)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in models.items())
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{lines}")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("loud_models", "other_models", "broken_models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_own_models_are_found() -> None:
    assert {"resemblyzer", "statistical"} <= registry.available().keys()
    assert list(registry.available()) == sorted(registry.available())
    assert registry.find("statistical", {}).dim == 80
    assert registry.find("resemblyzer", {"weights": "w.pt"}).dim == 256


def test_a_model_of_another_package(site: Path) -> None:
    import numpy as np

    from embstore.models.base import Prepared

    install(site, "loud_models", {"loudness": "loud_models:recipe"})
    recipe = registry.find("loudness", {})
    assert (recipe.name, recipe.media, recipe.dim) == ("loudness", "audio", 2)
    batch = [Prepared(np.array([1, -2], np.float32), 1.0, 1)]
    assert recipe.load("cpu").embed(batch).tolist() == [[1.0, -2.0]]


def test_what_follows_the_colon_is_the_variant(site: Path) -> None:
    install(site, "loud_models", {"loudness": "loud_models:recipe"})
    assert vars(registry.find("loudness:a:b", {"size": "9"})) == {"variant": "a:b", "size": "9"}
    assert vars(registry.find("loudness", {"size": "9"})) == {"variant": "plain", "size": "9"}
    with pytest.raises(UsageError, match="variant is given twice"):
        registry.find("loudness:a", {"variant": "b"})


def test_one_name_for_two_media_stands_for_two_models() -> None:
    assert registry.find("statistical", {}).name == "statistical"
    assert registry.find("statistical", {}, "audio").name == "statistical"
    assert registry.find("statistical", {}, "image").name == "statistical-image"
    assert registry.find("statistical-image", {}).media == "image"
    with pytest.raises(UsageError, match="model 'statistical-image' embeds image, not audio: name another one"):
        registry.find("statistical-image", {}, "audio")
    with pytest.raises(UsageError, match="model 'resemblyzer' embeds audio, not image"):
        registry.find("resemblyzer", {}, "image")


def test_options_that_the_model_refuses(site: Path) -> None:
    install(site, "loud_models", {"loudness": "loud_models:recipe"})
    with pytest.raises(UsageError, match="has options variant and size"):
        registry.find("loudness", {"colour": "red"})
    with pytest.raises(UsageError, match="no option 'variant'"):
        registry.find("resemblyzer:large", {})


def test_unknown_names(site: Path) -> None:
    install(site, "loud_models", {"loudness": "loud_models:recipe"})
    with pytest.raises(ModelError, match=r"no model 'resemblizer'\. Did you mean resemblyzer\? Installed: .*loudness"):
        registry.find("resemblizer", {})
    with pytest.raises(ModelError, match=r"no model 'xyz'\. Installed: .*statistical") as caught:
        registry.find("xyz:english", {})
    assert "Did you mean" not in str(caught.value)
    with pytest.raises(ModelError, match="no model ''"):
        registry.find("", {})


@pytest.mark.parametrize(
    ("module", "value", "cause"),
    [
        ("import no_such_thing", "broken_models:recipe", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("recipe = None", "broken_models:recipe", "TypeError"),
        ("", "broken_models:recipe", "AttributeError"),
        ("def recipe(options):\n    raise ValueError('two\\nlines')", "broken_models:recipe", "ValueError: two lines"),
    ],
)
def test_a_broken_package_is_named(site: Path, module: str, value: str, cause: str) -> None:
    install(site, "broken_models", {"broken": value}, module)
    with pytest.raises(ModelError, match=rf"model broken: package broken_models can't be used: {cause}"):
        registry.find("broken", {})
    assert registry.find("statistical", {}).dim == 80


def test_a_name_that_two_packages_offer(site: Path) -> None:
    install(site, "loud_models", {"loudness": "loud_models:recipe"})
    install(site, "other_models", {"loudness": "other_models:recipe"})
    with pytest.raises(ModelError, match=r"model loudness: two packages offer it, .*loud_models.*; uninstall one"):
        registry.find("loudness", {})


def test_listing_imports_no_model(site: Path) -> None:
    install(site, "broken_models", {"broken": "broken_models:recipe"}, "raise SystemExit('imported')")
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from embstore.models import registry\n"
        "assert 'broken' in registry.available()\n"
        "assert not {'torch', 'soundfile', 'broken_models'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
