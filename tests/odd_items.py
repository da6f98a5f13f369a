"""Items whose names and stretches need care, with vectors of every kind of finite float32."""

from __future__ import annotations

import numpy as np
from helpers import Facts, entry, fill
from numpy.typing import NDArray

from embstore import vectors
from embstore.db.engine import Database
from embstore.queue import take_lease

DIM = 5
ENTRIES = [
    entry("ann/a.wav", "ann"),
    entry("ann/a.flac", "ann"),
    entry("ann/long talk.wav", "ann b", start=1.5, duration=2.25),
    entry("ann/long talk.wav", "ann b", start=10.1, duration=0.2),
    entry("b@c/50%.wav", None),
    entry("böb\tx/1.wav", "böb"),
    entry("failed.wav", "ann"),
]


def odd_floats(count: int, dim: int = DIM) -> NDArray[np.float32]:
    """Every kind of finite float32: subnormal, huge, negative zero."""
    bits = np.random.default_rng(0).integers(0, 2**32, (count, dim), dtype=np.uint32).view(np.float32)
    matrix = np.where(np.isfinite(bits), bits, np.float32(-0.0))
    matrix[:, 0] = np.resize(np.array([1e-45, 3.4028235e38, -1, 0.1], dtype=np.float32), count)
    return matrix


MATRIX = odd_floats(6)
WIDE = Facts(name="wide v2", dim=DIM, settings={"a": 1})


def fill_odd(database: Database) -> None:
    """Dataset `odd` by model `wide v2`; the last item has no vector."""
    with database.begin() as connection:
        queue = fill(connection, ENTRIES, dataset="odd", model=WIDE)
        token = take_lease(connection)
        keys = queue.claim(connection, token, 7)
        vectors.write(connection, queue, token, keys[:6], MATRIX)
        queue.release(connection, token)
