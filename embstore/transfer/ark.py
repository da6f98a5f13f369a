"""Kaldi archives of vectors.

An archive is, for each entry, `key`, a blank, `\\0B`, `FV ` for float32, the byte 4, the length as int32 and the
values, all little-endian. A script file (.scp) has lines `key FILE:OFFSET`.
"""

from __future__ import annotations

from typing import IO

import numpy as np
from numpy.typing import NDArray


class Ark:
    """An archive that is written, and its script file."""

    def __init__(self, ark: IO[bytes], scp: IO[bytes], name: str) -> None:
        """`name`: the archive, as the script file is to name it."""
        self._ark, self._scp, self._name = ark, scp, name
        self._at = 0

    def add(self, key: str, vector: NDArray[np.float32]) -> None:
        """Append an entry."""
        begin = key.encode() + b" "
        head = b"\0BFV \4" + len(vector).to_bytes(4, "little")
        self._ark.write(begin + head + np.ascontiguousarray(vector, dtype="<f4").tobytes())
        self._scp.write(begin + f"{self._name}:{self._at + len(begin)}\n".encode())
        self._at += len(begin) + len(head) + 4 * len(vector)
