"""Resemblyzer's voice encoder: 256 numbers a recording, from weights that its package carries.

Method: L. Wan et al., Generalized End-to-End Loss for Speaker Verification, ICASSP 2018. Weights and preprocessing:
the package Resemblyzer (Apache-2.0) by Corentin Jemine. Only its weights are used, never its code: the package need
not be importable, and its dependencies need not be there. On 397 recordings the embeddings equal its own to a cosine
of 0.999999.

What speech is left after trimming is embedded, however short. Pieces cut from the trimmed speech of 25 LibriSpeech
readers had an equal error rate of 34% at 0.15 s, 23% at 0.3 s, 9% at 0.6 s, 1.4% at 1.6 s: worse and worse, with no
length below which it is noise (50%). Where nothing is left the package embeds zeros; here the item is skipped.
"""

from __future__ import annotations

import importlib.util
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from embstore.errors import ItemSkipped, ModelError, first_line
from embstore.media import audio
from embstore.models import mel, vad
from embstore.models.base import Media, Model, Prepared, Recipe
from embstore.models.common import fingerprint, require_known, unusable

if TYPE_CHECKING:
    import torch

DIM = 256
LAYERS = 3
FRAMES = 160
"""Frames in one window of the encoder: 1.6 s."""
RATE = 1.3
"""Windows a second."""
STEP = round(mel.SAMPLE_RATE / RATE / mel.HOP)
"""Frames from one window to the next."""
COVERAGE = 0.75
"""A last window that holds less audio than this share is left out, unless it is the only one."""

_MIN_SAMPLES = (vad.AVERAGE // 2 + 1) * vad.WINDOW  # in less, the averaged detector can't find speech
_TRAINING_ONLY = {"similarity_weight", "similarity_bias"}  # of the loss
_CPU_WINDOWS = 64
_CUDA_WINDOWS = 1024


def recipe(options: Mapping[str, str]) -> Recipe:
    """The recipe; the one option, `weights`, names another file of weights of the same shape.

    Raises UsageError for other options.
    """
    require_known("resemblyzer", options, ("weights",))
    return ResemblyzerRecipe(Path(options["weights"]).resolve() if "weights" in options else None)


@dataclass(frozen=True)
class ResemblyzerRecipe:
    """Resemblyzer with the weights of its package, or with those in `weights`."""

    name: ClassVar[str] = "resemblyzer"
    media: ClassVar[Media] = "audio"
    dim: ClassVar[int] = DIM

    weights: Path | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """Preprocessing, as JSON."""
        return {
            "sample_rate": mel.SAMPLE_RATE,
            "channels": "mean",
            "volume": {"target_dbfs": vad.TARGET_DBFS, "change": "raise only"},
            "vad": {
                "detector": "webrtc",
                "mode": vad.AGGRESSIVENESS,
                "window_ms": 30,
                "average": vad.AVERAGE,
                "dilation": vad.DILATION,
            },
            "mel": {"bands": mel.BANDS, "window": mel.WINDOW, "hop": mel.HOP, "scale": "slaney", "values": "power"},
            "windows": {"frames": FRAMES, "step": STEP, "coverage": COVERAGE},
            "normalized": True,
        }

    def fingerprint(self) -> str:
        """SHA-256 of the settings and the file of weights. Raises ModelError if there is none."""
        return fingerprint(self.name, self.settings, (self.weights_file(),))

    def weights_file(self) -> Path:
        """Where the weights are. Raises ModelError if no package carries them."""
        if self.weights:
            return self.weights
        spec = importlib.util.find_spec("resemblyzer")
        for folder in (spec and spec.submodule_search_locations) or ():
            file = Path(folder) / "pretrained.pt"
            if file.is_file():
                return file
        raise ModelError("model resemblyzer: its weights are not installed; type: pip install --no-deps resemblyzer")

    def load(self, device: str) -> Model:
        """Load it on `cpu` or `cuda:N`. Raises ModelError."""
        return Resemblyzer(_read_weights(self.weights_file()), device)


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The state of the encoder in a checkpoint, without what only training needs."""
    import torch

    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        return {name: value for name, value in checkpoint["model_state"].items() if name not in _TRAINING_ONLY}
    except FileNotFoundError as error:
        raise ModelError(f"model resemblyzer: there is no file of weights {file}") from error
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise ModelError(f"model resemblyzer: {file} is no checkpoint of it: {first_line(error)}") from error


class Resemblyzer:
    """The encoder on one device."""

    def __init__(self, weights: Mapping[str, torch.Tensor], device: str) -> None:
        import torch

        encoder = torch.nn.ModuleDict(
            {
                "lstm": torch.nn.LSTM(mel.BANDS, DIM, LAYERS, batch_first=True),
                "linear": torch.nn.Linear(DIM, DIM),
            }
        )
        _fill(encoder, weights)
        # TF32, cuDNN's default for an LSTM, has 10 bits: a GPU's vectors would differ from a processor's.
        torch.backends.cudnn.allow_tf32 = False
        try:
            self._device = torch.device(device)
            self._encoder = encoder.eval().to(self._device)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(unusable("resemblyzer", device, error)) from error
        # Windows a second on 1 and 2 cores, by windows a call: 8: 153, 163; 32: 160, 268; 64: 165, 281; 128: 146, 246;
        # 512: 139, 235. A GPU wants larger calls; its number is not measured.
        self.max_cost = _CPU_WINDOWS if self._device.type == "cpu" else _CUDA_WINDOWS

    def prepare(self, path: Path, start: float | None, duration: float | None) -> Prepared:
        """Decode one item to mel windows, float32 [windows, 160, 40] (overlapping views of one spectrogram).

        Raises ItemFailed, and ItemSkipped `too_short` (under 0.15 s) or `no_speech`.
        """
        return self.prepare_audio(audio.read(path, start, duration, mel.SAMPLE_RATE))

    def prepare_audio(self, sound: audio.Audio) -> Prepared:
        """The part of `prepare` that comes after decoding, for audio at 16 kHz. Raises ItemSkipped as it does."""
        if len(sound.samples) < _MIN_SAMPLES:
            raise ItemSkipped("too_short", f"{sound.seconds:.3g} s; speech is found in 0.15 s or more")
        speech = vad.keep_speech(vad.raise_volume(sound.samples))
        if not len(speech):
            raise ItemSkipped("no_speech", f"voice activity detection leaves nothing of {sound.seconds:.3g} s")
        windows = _windows(speech)
        return Prepared(windows, sound.seconds, len(windows))

    def embed(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """Embed a batch: float32 [len(batch), 256], unit length, no value below zero."""
        if not batch:
            return np.empty((0, DIM), np.float32)
        arrays = [item.array for item in batch]
        rows = np.concatenate([self._encode(chunk) for chunk in _chunks(arrays, self.max_cost)])
        counts = np.array([len(array) for array in arrays])
        sums = np.add.reduceat(rows, np.cumsum(counts) - counts, axis=0, dtype=np.float64)
        unit: NDArray[np.float64] = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        return unit.astype(np.float32)

    def _encode(self, windows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Windows [n, 160, 40] to unit vectors [n, 256]."""
        import torch

        with torch.inference_mode():
            _, (hidden, _) = self._encoder["lstm"](torch.from_numpy(windows).to(self._device))
            raw = torch.relu(self._encoder["linear"](hidden[-1]))
            unit: NDArray[np.float32] = (raw / raw.norm(dim=1, keepdim=True)).cpu().numpy()
        return unit


def _fill(encoder: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load weights, all of them and no other. Raises ModelError."""
    wanted = encoder.state_dict().keys()
    missing, left_over = sorted(wanted - weights.keys()), sorted(weights.keys() - wanted)
    if missing or left_over:
        raise ModelError(
            f"model resemblyzer: its weights lack {', '.join(missing) or 'nothing'}"
            f" and have {', '.join(left_over) or 'nothing'} too much"
        )
    try:
        encoder.load_state_dict(dict(weights))
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"model resemblyzer: its weights don't fit: {' '.join(str(error).split())}") from error


def _windows(speech: NDArray[np.float32]) -> NDArray[np.float32]:
    """Windows of the encoder over speech [n], as `VoiceEncoder.compute_partial_slices` places them."""
    frames = math.ceil((len(speech) + 1) / mel.HOP)
    count = len(range(0, max(1, frames - FRAMES + STEP + 1), STEP))
    last = (count - 1) * STEP * mel.HOP
    if count > 1 and (len(speech) - last) / (FRAMES * mel.HOP) < COVERAGE:
        count -= 1
    spectrogram = mel.power_mel(speech, (count - 1) * STEP + FRAMES)
    return sliding_window_view(spectrogram, FRAMES, axis=0)[::STEP].transpose(0, 2, 1)


def _chunks(arrays: Sequence[NDArray[np.float32]], size: int) -> Iterator[NDArray[np.float32]]:
    """The windows of all arrays in order, `size` at a time, so that the longest recording stays within bounds."""
    pending: list[NDArray[np.float32]] = []
    room = size
    for array in arrays:
        while len(array):
            pending.append(array[:room])
            array = array[room:]
            room -= len(pending[-1])
            if room == 0:
                yield np.concatenate(pending)
                pending, room = [], size
    if pending:
        yield np.concatenate(pending)
