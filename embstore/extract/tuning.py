"""What can be tuned of a worker without changing a vector: `--tune NAME=VALUE`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from embstore.errors import UsageError


@dataclass(frozen=True)
class Tuning:
    """Sizes of the pipeline in one worker; None: it depends on the machine, or on the model."""

    decoders: int | None = None
    """Decoding threads."""
    threads: int | None = None
    """Threads that compute on the CPU."""
    batch: int | None = None
    """The most that goes to the device at once, in the model's unit: frames, windows."""
    ahead: int = 2
    """Seconds of work that is claimed ahead: enough to hide a slow claim, little enough that workers end together."""
    commit: int = 256
    """Vectors a transaction: 64 make it half as fast, 1024 no faster."""
    buffer: int = 512
    """MB of decoded items that may wait for the device."""


UNTUNED = Tuning()
NAMES = tuple(field.name for field in fields(Tuning))


def parse(pairs: Iterable[str]) -> Tuning:
    """The tuning that `NAME=VALUE` pairs ask for. Raises UsageError."""
    tuning = UNTUNED
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"--tune '{pair}': there is no '{name}': {hint}there are: {', '.join(NAMES)}")
        if not value.isascii() or not value.isdigit() or int(value) < 1:
            raise UsageError(f"--tune '{pair}': give a whole number of 1 or more, such as {name}=4")
        tuning = replace(tuning, **{name: int(value)})
    return tuning
