"""COPY BINARY from numpy arrays, without a Python object a value.

The format (PostgreSQL manual, "COPY", "Binary Format"): a signature, then a row as int16 field count and for each
field an int32 length and the bytes, big-endian throughout, and -1 as the trailer. A vector is int16 dim, int16 0 and
dim float32.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection

_SIGNATURE = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"

PIECE = 1 << 18
"""Bytes that psycopg2 reads at a time; its default of 8 kB makes a COPY take 1.7 times as long."""


def copy_vectors(
    connection: Connection, table: str, keys: Mapping[str, NDArray[np.integer]], name: str, vectors: NDArray[np.float32]
) -> None:
    """Append rows of integer keys (int16, int32 or int64, each [n]) and one vector [n, dim] to `table`.

    `table` and the names are trusted identifiers. Runs within the caller's transaction.
    """
    columns = ", ".join([*keys, name])
    driver = connection.connection.driver_connection
    assert driver is not None
    with driver.cursor() as cursor:
        cursor.copy_expert(f"COPY {table} ({columns}) FROM STDIN (FORMAT BINARY)", encode(keys, vectors), size=PIECE)


def encode(keys: Mapping[str, NDArray[np.integer]], vectors: NDArray[np.float32]) -> io.BytesIO:
    """Rows in PostgreSQL's binary form: the integer keys, each [n], then the vector [n, dim]."""
    count, dim = vectors.shape
    fields: list[tuple[str, str] | tuple[str, str, tuple[int]]] = [("fields", ">i2")]
    for name, column in keys.items():
        fields += [(f"{name}_length", ">i4"), (name, f">i{column.dtype.itemsize}")]
    fields += [("length", ">i4"), ("dim", ">i2"), ("unused", ">i2"), ("vector", ">f4", (dim,))]
    rows = np.zeros(count, dtype=fields)
    rows["fields"] = len(keys) + 1
    for name, column in keys.items():
        rows[f"{name}_length"] = column.dtype.itemsize
        rows[name] = column
    rows["length"] = 4 + 4 * dim
    rows["dim"] = dim
    rows["vector"] = vectors
    return io.BytesIO(b"".join((_SIGNATURE, rows.tobytes(), _TRAILER)))
