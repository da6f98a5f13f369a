"""A WeSpeaker model folder (config.yaml, avg_model.pt) as a torch module, every weight of it accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embstore.errors import ModelError, described, first_line
from embstore.models.wespeaker import package

if TYPE_CHECKING:
    import torch

_TRAINING_ONLY = "projection."
"""The classifier over the training speakers (bin/train.py adds it to the model), which no embedding needs."""
_COUNTER = "num_batches_tracked"
"""Batch norm's count of training steps, which old checkpoints lack."""
_SHOWN = 3


def load(file: Path, module: str, model: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
    """`wespeaker.models.<module>.<model>(**arguments)` with the weights of `file`, in eval mode. Raises ModelError."""
    build = package.architecture(module, model)
    try:
        network: torch.nn.Module = build(**arguments)
    # Somebody else's code with arguments from a file.
    except Exception as error:
        reason = described(error)
        raise ModelError(f"model {model}: wespeaker can't build it from model_args of config.yaml: {reason}") from error
    _fill(network, _read(file), file)
    return network.eval()


def _read(file: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, without what only training needs. Raises ModelError."""
    import torch

    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        state = checkpoint.get("state_dict", checkpoint)
        return {name: value for name, value in state.items() if not name.startswith(_TRAINING_ONLY)}
    # Of a file that is something else, the unpickler raises whatever it stumbles over.
    except Exception as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ModelError(f"{file} can't be read as a WeSpeaker checkpoint: {reason}") from error


def _fill(network: torch.nn.Module, weights: dict[str, torch.Tensor], file: Path) -> None:
    """Load weights, all of them and no other. Raises ModelError."""
    wanted = network.state_dict().keys()
    missing = sorted(name for name in wanted - weights.keys() if not name.endswith(_COUNTER))
    left_over = sorted(weights.keys() - wanted)
    if missing or left_over:
        raise ModelError(
            f"{file} does not fit its config.yaml: {_some(missing)} missing, {_some(left_over)} left over;"
            " correct model and model_args there, or get the checkpoint that belongs to it"
        )
    try:
        network.load_state_dict(weights, strict=False)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"{file} does not fit its config.yaml: {' '.join(str(error).split())}") from error


def _some(names: list[str]) -> str:
    """The first few names and how many there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) + more) or "nothing"
