"""What of the `wespeaker` package is needed: the modules that define architectures, and its hub's download.

Only those modules are imported, never the package itself, whose `__init__` pulls in voice activity detection,
clustering and self-supervised front ends: 6 to 28 s, and a dozen packages that no embedding needs. So it may be
installed without its dependencies.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from embstore.errors import ModelError, described

INSTALL = "in a clone of its repository (wenet-e2e/wespeaker) type: pip install --no-deps ."


def is_installed() -> bool:
    """Whether there is a package called wespeaker."""
    return importlib.util.find_spec("wespeaker") is not None


def architecture(module: str, name: str) -> Any:
    """The class or function `name` of `wespeaker.models.<module>`. Raises ModelError."""
    found = getattr(_imported(f"wespeaker.models.{module}"), name, None)
    if found is None:
        raise ModelError(f"the installed wespeaker has no model {name!r}; get a newer one: {INSTALL}")
    return found


def download(variant: str) -> Path:
    """The folder of a model of WeSpeaker's hub, which downloads what is not there yet. Raises ModelError."""
    hub = getattr(_imported("wespeaker.cli.hub"), "Hub", None)
    if hub is None or variant not in hub.Assets:
        raise ModelError(f"the hub of the installed wespeaker has no model {variant!r}; get a newer one: {INSTALL}")
    try:
        # Its progress bar and notes belong on stderr: stdout is for results.
        with contextlib.redirect_stdout(sys.stderr):
            folder = Path(hub.get_model(variant))
    # Network, disk, archive, the address's answer: whatever goes wrong in there, it is one line for a person.
    except Exception as error:
        reason = described(error)
        raise ModelError(
            f"model wespeaker:{variant}: can't be downloaded ({reason}); unpack it yourself and give model_dir=FOLDER"
        ) from error
    return folder


def _imported(name: str) -> ModuleType:
    """One module of the package. Raises ModelError if it or the package is missing or can't be imported."""
    if not is_installed():
        raise ModelError(f"the package wespeaker is not installed; {INSTALL} (or use the model's ONNX file)")
    try:
        with _without_init():
            return importlib.import_module(name)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the installed wespeaker can't be used ({reason}); get a newer one: {INSTALL}") from error


@contextlib.contextmanager
def _without_init() -> Iterator[None]:
    """Let submodules be imported while the package's own `__init__` is left out."""
    if "wespeaker" in sys.modules:
        yield
        return
    spec = importlib.util.find_spec("wespeaker")
    hollow = ModuleType("wespeaker")
    hollow.__path__ = list(spec.submodule_search_locations or ()) if spec else []
    sys.modules["wespeaker"] = hollow
    try:
        yield
    finally:
        # Who imports the package later gets all of it.
        sys.modules.pop("wespeaker", None)
