"""The bytes of COPY BINARY, taken apart by hand; that PostgreSQL reads them is shown by test_vectors.py."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from numpy.typing import NDArray

from embstore.db.copy import decode as embstore_decode
from embstore.db.copy import encode


def decode(data: bytes, keys: int) -> list[tuple[list[int], NDArray[np.float32]]]:
    """Rows of integer keys and a vector, by the manual: every length is believed, none is assumed."""
    signature, flags, extension = struct.unpack_from(">11sii", data)
    assert (signature, flags, extension) == (b"PGCOPY\n\xff\r\n\0", 0, 0)
    at, rows = 19, []
    while True:
        (fields,) = struct.unpack_from(">h", data, at)
        at += 2
        if fields == -1:
            assert at == len(data)
            return rows
        assert fields == keys + 1
        values = []
        for _ in range(fields):
            (length,) = struct.unpack_from(">i", data, at)
            values.append(data[at + 4 : at + 4 + length])
            at += 4 + length
        dim, unused = struct.unpack_from(">hh", values[-1])
        assert unused == 0
        vector = np.frombuffer(values[-1][4:], dtype=">f4")
        assert len(vector) == dim
        rows.append(([int.from_bytes(value, "big", signed=True) for value in values[:-1]], vector))


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("dim", [1, 2, 257])
def test_rows_say_their_own_lengths(count: int, dim: int) -> None:
    vectors = np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32)
    keys: dict[str, NDArray[np.integer]] = {
        "a": np.arange(count, dtype=np.int16) - 1,
        "b": np.full(count, 2**31 - 1, dtype=np.int32),
        "c": np.full(count, -(2**40), dtype=np.int64),
    }
    rows = decode(encode({**keys, "embedding": vectors}).read(), keys=3)
    assert [key for key, _ in rows] == [[i - 1, 2**31 - 1, -(2**40)] for i in range(count)]
    assert all(np.array_equal(got, want) for (_, got), want in zip(rows, vectors, strict=True))


def test_a_row_is_what_the_manual_says_byte_for_byte() -> None:
    data = encode({"key": np.array([258], dtype=np.int32), "vector": np.array([[1.0, -0.0]], dtype=np.float32)}).read()
    row = "0002 00000004 00000102 0000000c 0002 0000 3f800000 80000000"
    assert data == b"PGCOPY\n\xff\r\n\0" + bytes(8) + bytes.fromhex(row) + b"\xff\xff"


def test_arrays_in_any_order_of_bytes_and_memory_come_out_the_same() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(3, 4)
    keys = np.array([1, 2, 3], dtype=np.int64)
    plain = encode({"key": keys, "vector": vectors}).read()
    odd = encode({"key": keys.astype(">i8"), "vector": np.asfortranarray(vectors.astype(">f4"))}).read()
    every_other = encode({"key": np.repeat(keys, 2)[::2], "vector": np.repeat(vectors, 2, axis=0)[::2]}).read()
    assert plain == odd == every_other


@pytest.mark.parametrize("count", [2, 4])
def test_keys_and_vectors_must_be_as_many(count: int) -> None:
    with pytest.raises(ValueError, match="broadcast"):
        encode({"key": np.arange(count, dtype=np.int32), "vector": np.ones((3, 2), dtype=np.float32)})


def test_what_is_written_can_be_read_back() -> None:
    columns = {
        "id": np.array([1, 2], dtype=np.int64),
        "score": np.array([0.5, -1.25], dtype=np.float32),
        "vector": np.array([[1.0, 2.0, 3.0], [4.0, 5.0, np.inf]], dtype=np.float32),
    }
    shapes = {
        "id": (np.dtype(np.int64), None),
        "score": (np.dtype(np.float32), None),
        "vector": (np.dtype(np.float32), 3),
    }
    back = embstore_decode(encode(columns).getbuffer(), shapes)
    assert all(np.array_equal(back[name], values) for name, values in columns.items())
    with pytest.raises(ValueError, match="rows of"):
        embstore_decode(encode(columns).getbuffer(), {**shapes, "vector": (np.dtype(np.float32), 4)})
