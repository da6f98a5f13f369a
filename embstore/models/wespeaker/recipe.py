"""What a person chooses of a WeSpeaker model; known, checked and hashed without loading it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from embstore.errors import UsageError
from embstore.media.audio import Channels
from embstore.models import fbank, vad
from embstore.models.base import Media, Model, Recipe
from embstore.models.common import fingerprint, require_known
from embstore.models.wespeaker import compiled, families, package, runtime, source
from embstore.models.wespeaker.model import Wespeaker
from embstore.models.wespeaker.network import Precision, has_bf16
from embstore.models.wespeaker.runtime import Runtime
from embstore.models.wespeaker.source import Source

MAX_WINDOW = 120.0
"""Seconds up to which a recording is embedded whole; nearly every utterance of a speech corpus is shorter."""
_LEAST_WINDOW = 1.0
_OPTIONS = (
    "model_dir",
    "variant",
    "num_mel_bins",
    "window",
    "sample_scale",
    "channel",
    "precision",
    "max_window",
    "runtime",
    "vad",
)

_T = TypeVar("_T")


def recipe(options: Mapping[str, str]) -> Recipe:
    """The recipe of `model_dir` (a folder or an .onnx file) or `variant` (a name in WeSpeaker's hub, downloaded once).

    The other options override what the model's family was trained with: `num_mel_bins`, `window` (hamming, povey),
    `sample_scale` (int16, unit), `channel` (first, mean), `precision` (auto, fp32, bf16, fp16), `max_window` (seconds),
    `runtime` (auto, openvino, and pytorch for a checkpoint or onnxruntime for a graph), `vad` (off, on).

    Raises UsageError for an option, ModelError for a model that can't be used.
    """
    require_known("wespeaker", options, _OPTIONS)
    name, found = _model(options)
    family = found.family
    features = fbank.Settings(
        found.sample_rate,
        _parsed(options, "num_mel_bins", int, found.bins),
        _choice(options, "window", fbank.Window, family.window if family else "hamming"),
        _choice(options, "sample_scale", fbank.Scale, family.sample_scale if family else "int16"),
    )
    if features.num_mel_bins != found.bins:
        raise UsageError(
            f"model {name} takes {found.bins} mel bins, not {features.num_mel_bins}; leave num_mel_bins out"
        )
    precision: Precision = _choice(options, "precision", Precision, "auto")
    if found.is_onnx and precision not in ("auto", "fp32") and not (precision == "bf16" and compiled.is_installed()):
        raise UsageError(f"model {name} is an ONNX graph, which has its own precision; leave precision={precision} out")
    runs: Runtime = _choice(options, "runtime", Runtime, "auto")
    if runs == ("pytorch" if found.is_onnx else "onnxruntime"):
        raise UsageError(f"model {name} is {'an ONNX graph' if found.is_onnx else 'a checkpoint'}, not for {runs}")
    max_window = _parsed(options, "max_window", float, MAX_WINDOW)
    if not _LEAST_WINDOW <= max_window < math.inf:
        raise UsageError(f"model {name}: max_window={max_window:g} is not {_LEAST_WINDOW:g} second or more")
    channel: Channels = _choice(options, "channel", Channels, "first")
    trim = _choice(options, "vad", Literal["off", "on"], "off") == "on"
    if trim and features.sample_rate != vad.SAMPLE_RATE:
        raise UsageError(
            f"model {name}: vad=on works at {vad.SAMPLE_RATE} Hz, not at {features.sample_rate}; leave it out"
        )
    return WespeakerRecipe(name, found, features, channel, precision, max_window, runs, trim)


def _model(options: Mapping[str, str]) -> tuple[str, Source]:
    """Name and files of the model that is asked for."""
    variant, folder = options.get("variant"), options.get("model_dir")
    if (variant is None) == (folder is None):
        hub = ", ".join(f"wespeaker:{name}" for name in families.HUB)
        raise UsageError(f"model wespeaker needs either model_dir=FOLDER (or FILE.onnx) or one of the names {hub}")
    if folder is not None:
        found = source.find(Path(folder).expanduser().resolve())
        return f"wespeaker:{_label(found)}", found
    if variant not in families.HUB:
        raise UsageError(f"there is no model wespeaker:{variant}; there are: {', '.join(families.HUB)}")
    return f"wespeaker:{variant}", source.find(package.download(variant).resolve())


def _label(found: Source) -> str:
    """A short name for people: the folder's, or that of the ONNX file unless it is called like all the others."""
    stem = found.weights.stem
    return stem if found.is_onnx and stem not in ("model", "avg_model") else found.weights.parent.name


def _choice(options: Mapping[str, str], name: str, allowed: Any, default: str) -> Any:
    """An option that is one of a few words."""
    value = options.get(name, default)
    if value not in get_args(allowed):
        raise UsageError(f"model wespeaker: {name}={value} is not one of: {', '.join(get_args(allowed))}")
    return value


def _parsed(options: Mapping[str, str], name: str, parse: Callable[[str], _T], default: _T) -> _T:
    """An option that is a number."""
    if name not in options:
        return default
    try:
        return parse(options[name])
    except ValueError:
        raise UsageError(f"model wespeaker: {name}={options[name]} is not a number") from None


@dataclass(frozen=True)
class WespeakerRecipe:
    """One model with its preprocessing."""

    media: ClassVar[Media] = "audio"

    name: str
    """`wespeaker:` and the hub's name, the folder's or the ONNX file's: several models are told apart by it in SQL."""
    source: Source
    features: fbank.Settings
    channel: Channels
    precision: Precision
    max_window: float
    runtime: Runtime = "auto"
    trim: bool = False
    """Cut long silences out."""

    @property
    def dim(self) -> int:
        """Length of its vectors, as config.yaml or the graph says."""
        return self.source.dim

    @property
    def settings(self) -> Mapping[str, Any]:
        """Preprocessing, as JSON."""
        return {**self._identity(), "precision": self.precision, "runs_on": self.runtime}

    def fingerprint(self) -> str:
        """SHA-256 of the architecture, the preprocessing and the file of weights. Raises ModelError if it is gone.

        Precision, runtime, device and batch size are not in it: they change a vector by less than a cosine of 0.0001,
        so vectors that a CPU and a GPU computed may stand side by side.
        """
        return fingerprint(self.name, self._identity(), (self.source.weights,))

    def load(self, device: str) -> Model:
        """Load it on `cpu` or `cuda:N`. Raises ModelError."""
        encoder = runtime.load(
            self.source,
            self.features.num_mel_bins,
            precision=self.precision,
            runtime=self.runtime,
            device=device,
        )
        return Wespeaker(encoder, self.dim, self.features, self.channel, self.max_window, device, self.trim)

    def faster(self, device: str) -> str | None:
        """What to type for more speed on a device, None if nothing is known."""
        if device == "cpu" and self.runtime == "auto" and not compiled.is_installed():
            return f"OpenVINO computes this two to three times as fast on a processor ({compiled.INSTALL})"
        if self.precision == "fp32" and (device != "cpu" or has_bf16()):
            return "compute in bfloat16 (--precision auto), at a cosine of 0.9999 or more to these vectors"
        return None

    def _identity(self) -> dict[str, Any]:
        trimming = {"vad": "webrtc"} if self.trim else {}
        return {
            **trimming,
            "sample_rate": self.features.sample_rate,
            "resampling": "sinc",
            "channel": self.channel,
            "fbank": {
                "num_mel_bins": self.features.num_mel_bins,
                "window": self.features.window,
                "sample_scale": self.features.sample_scale,
                "frame_ms": 25,
                "shift_ms": 10,
                "dither": 0,
                "mean": "subtracted over the window",
            },
            "max_window": self.max_window,
            # A graph is its own architecture, whether config.yaml lies beside it or not.
            "architecture": None if self.source.is_onnx else self.source.architecture,
            "model_args": dict(self.source.arguments),
            "runtime": "onnx" if self.source.is_onnx else "pytorch",
            "normalized": False,
        }
