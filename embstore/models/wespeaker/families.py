"""WeSpeaker's architectures: where its package defines them, what they were trained on, how they batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from embstore.models.fbank import Scale, Window

Batching = Literal["single", "equal", "masked"]
"""One item at a time, items of equal length together, or any lengths together with the padding masked."""


@dataclass(frozen=True)
class Family:
    """Architectures whose names in config.yaml start alike."""

    prefix: str
    module: str
    """The module under `wespeaker.models`, as in its `get_speaker_model`."""
    batching: Batching
    """The most that a GPU may do; `masking.py` takes part in `masked`."""
    default_dim: int | None = None
    """Length of its vectors where `model_args` leaves embed_dim out."""
    window: Window = "hamming"
    sample_scale: Scale = "int16"


# The window and the scale: wespeaker/cli/speaker.py (`Speaker.__init__`, and `main` for CAM++ and ERes2Net, whose
# released weights come from a toolkit that uses Povey's window on samples in [-1, 1]).
# "equal": ReDimNet attends over all frames, RepVGG (its D2SE) and xi-vectors average over them in ways of their own.
FAMILIES = (
    Family("ResNet", "resnet", "masked"),
    Family("SimAM_ResNet", "samresnet", "masked", 256),
    Family("ECAPA_TDNN", "ecapa_tdnn", "masked", 192),
    Family("CAMPPlus", "campplus", "masked", 512, "povey", "unit"),
    Family("ERes2Net", "eres2net", "masked", None, "povey", "unit"),
    Family("Res2Net", "res2net", "masked"),
    Family("Gemini_DF_ResNet", "gemini_dfresnet", "masked"),
    Family("XVEC", "tdnn", "masked", 512),
    Family("ReDimNetB", "redimnet", "equal", 192),
    Family("REPVGG", "repvgg", "equal"),
    Family("XI_VEC", "xi_vector", "equal"),
)

HUB = ("english", "chinese", "campplus", "eres2net", "vblinkp", "vblinkf")
"""Names in WeSpeaker's own hub (wespeaker/cli/hub.py) whose models work on filter banks."""


def find(model: str) -> Family | None:
    """The family of config.yaml's `model`, None for one that is not known here."""
    return next((family for family in FAMILIES if model.startswith(family.prefix)), None)
