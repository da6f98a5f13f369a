"""Find a model's files and read what they say about it, without torch and without wespeaker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from embstore.errors import ModelError, UsageError
from embstore.models.wespeaker import families, graph
from embstore.models.wespeaker.families import Family

CONFIG, CHECKPOINT = "config.yaml", "avg_model.pt"
_BINS = 80
"""What wespeaker/cli/speaker.py computes, whatever the model."""


@dataclass(frozen=True)
class Source:
    """A model's files, and what config.yaml or the graph says."""

    weights: Path
    """The checkpoint or the ONNX file."""
    architecture: str | None
    """`model` of config.yaml; an ONNX file may do without."""
    arguments: Mapping[str, Any]
    """`model_args` of config.yaml; empty for an ONNX file."""
    dim: int
    bins: int
    sample_rate: int

    @property
    def is_onnx(self) -> bool:
        """Whether ONNX Runtime runs it."""
        return self.weights.suffix == ".onnx"

    @property
    def family(self) -> Family | None:
        """The architecture's family, None for an ONNX file without config.yaml."""
        return families.find(self.architecture) if self.architecture else None


def find(place: Path) -> Source:
    """The model in a folder, or in an ONNX file. A folder's checkpoint comes before an ONNX file beside it.

    Raises UsageError if nothing is there, ModelError for what is no such model.
    """
    if place.suffix == ".onnx" and place.is_file():
        return _onnx(place)
    if not place.is_dir():
        raise UsageError(f"model wespeaker: {place} is neither a folder nor an .onnx file; correct model_dir")
    if (place / CHECKPOINT).is_file():
        return _checkpoint(place)
    graphs = sorted(place.glob("*.onnx"))
    if len(graphs) == 1:
        return _onnx(graphs[0])
    if graphs:
        raise UsageError(f"model wespeaker: {place} has {len(graphs)} .onnx files; give model_dir the path of one")
    raise UsageError(f"model wespeaker: {place} has neither {CHECKPOINT} nor an .onnx file; correct model_dir")


def _checkpoint(folder: Path) -> Source:
    config = _config(folder / CONFIG)
    architecture, family = _architecture(config, folder / CONFIG)
    arguments = _section(config, "model_args", folder / CONFIG)
    dim = arguments.get("embed_dim", family.default_dim)
    if not isinstance(dim, int) or dim < 1:
        raise ModelError(f"{folder / CONFIG} has no embed_dim under model_args; add it")
    bins = arguments.get("feat_dim", arguments.get("acoustic_dim", _BINS))
    return Source(folder / CHECKPOINT, architecture, arguments, dim, int(bins), _sample_rate(config, folder / CONFIG))


def _onnx(file: Path) -> Source:
    """A graph, with what a config.yaml beside it adds: the family's preprocessing."""
    shape = graph.shape(file)
    beside = file.with_name(CONFIG)
    config = _config(beside) if beside.is_file() else {}
    architecture = _architecture(config, beside)[0] if config else None
    return Source(file, architecture, {}, shape.dim, shape.bins, _sample_rate(config, beside))


def _architecture(config: Mapping[str, Any], file: Path) -> tuple[str, Family]:
    name = str(config.get("model"))
    family = families.find(name)
    if family is None:
        known = ", ".join(f"{family.prefix}…" for family in families.FAMILIES)
        raise ModelError(f"{file}: embstore does not know the model {name!r}; it knows {known}")
    frontend = _section(config, "dataset_args", file).get("frontend", "fbank")
    if frontend != "fbank":
        raise ModelError(f"{file}: the front end {frontend!r} is not supported; models on filter banks are")
    return name, family


def _sample_rate(config: Mapping[str, Any], file: Path) -> int:
    rate = _section(config, "dataset_args", file).get("resample_rate", 16_000)
    if not isinstance(rate, int) or not 1000 <= rate <= 192_000:
        raise ModelError(f"{file}: resample_rate {rate!r} under dataset_args is no sample rate; correct it")
    return rate


def _section(config: Mapping[str, Any], name: str, file: Path) -> Mapping[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, Mapping):
        raise ModelError(f"{file}: {name} should be a list of names with values; correct it")
    return section


def _config(file: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file} can't be read ({error.strerror}); a model folder needs it") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise ModelError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, Mapping):
        raise ModelError(f"{file} is no WeSpeaker configuration: it has no names with values")
    return config
