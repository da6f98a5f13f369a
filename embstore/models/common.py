"""What models have in common: the options that they know, the hash of what they are made of, a device that fails."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from embstore.errors import ModelError, UsageError, first_line


def require_known(model: str, options: Iterable[str], known: Sequence[str] = ()) -> None:
    """Raise UsageError for an option that a model does not know."""
    for option in options:
        if option not in known:
            hint = f"it knows: {', '.join(known)}" if known else "leave it out"
            raise UsageError(f"model {model} has no option {option!r}; {hint}")


def fingerprint(model: str, identity: Mapping[str, Any], files: Iterable[Path] = ()) -> str:
    """SHA-256 of what a model is (values for JSON) and of its files, in hexadecimal.

    Raises ModelError for a file that cannot be read.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for path in files:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ModelError(f"model {model}: {path}: {error.strerror}") from error
    return digest.hexdigest()


def unusable(model: str, device: str, error: Exception) -> str:
    """What to say of a device that a model could not be put on."""
    return f"model {model}: device {device} can't be used: {first_line(error)}; --gpus none computes on the processor"
