"""The bytes of COPY BINARY, taken apart by hand; that PostgreSQL reads them is shown by test_vectors.py."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embstore.db.copy import PIECE, Column, Decoder, Rows, encode

INT8, FLOAT4, FLOAT8 = np.dtype(np.int64), np.dtype(np.float32), np.dtype(np.float64)


def take_apart(data: bytes) -> list[list[bytes]]:
    """The fields of rows, by the manual: every length is believed, none is assumed."""
    signature, flags, extension = struct.unpack_from(">11sii", data)
    assert (signature, flags, extension) == (b"PGCOPY\n\xff\r\n\0", 0, 0)
    at, rows = 19, list[list[bytes]]()
    while True:
        (fields,) = struct.unpack_from(">h", data, at)
        at += 2
        if fields == -1:
            assert at == len(data)
            return rows
        row = []
        for _ in range(fields):
            (length,) = struct.unpack_from(">i", data, at)
            row.append(data[at + 4 : at + 4 + length])
            at += 4 + length
        rows.append(row)


def put_together(*rows: list[bytes | None]) -> memoryview:
    """Rows as a server sends them, nulls included."""
    data = b"PGCOPY\n\xff\r\n\0" + bytes(8)
    for row in rows:
        data += struct.pack(">h", len(row))
        for field in row:
            data += struct.pack(">i", -1) if field is None else struct.pack(">i", len(field)) + field
    return memoryview(data + b"\xff\xff")


def decode(data: memoryview, columns: dict[str, Column], size: int = 1 << 30) -> Rows:
    """What comes out if `size` bytes are written at a time."""
    pieces: list[Rows] = []
    decoder = Decoder(columns, pieces.append)
    for at in range(0, len(data), size):
        decoder.write(bytes(data[at : at + size]))
    decoder.end()
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in columns}


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("dim", [1, 2, 257])
def test_rows_say_their_own_lengths(count: int, dim: int) -> None:
    vectors = np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32)
    keys: dict[str, NDArray[Any]] = {
        "a": np.arange(count, dtype=np.int16) - 1,
        "b": np.full(count, 2**31 - 1, dtype=np.int32),
        "c": np.full(count, -(2**40), dtype=np.int64),
        "d": np.full(count, 0.1),
    }
    rows = take_apart(encode({"vector": vectors} | keys).read())
    assert [struct.unpack(">hiqd", b"".join(row[1:])) for row in rows] == [
        (i - 1, 2**31 - 1, -(2**40), 0.1) for i in range(count)
    ]
    for row, vector in zip(rows, vectors, strict=True):
        assert struct.unpack_from(">hh", row[0]) == (dim, 0)
        assert row[0][4:] == vector.astype(">f4").tobytes()


def test_a_row_is_what_the_manual_says_byte_for_byte() -> None:
    data = encode({"key": np.array([258], dtype=np.int32), "v": np.array([[1.0, -0.0]], dtype=np.float32)}).read()
    row = "0002 00000004 00000102 0000000c 0002 0000 3f800000 80000000"
    assert data == b"PGCOPY\n\xff\r\n\0" + bytes(8) + bytes.fromhex(row) + b"\xff\xff"


def test_arrays_in_any_order_of_bytes_and_memory_come_out_the_same() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(3, 4)
    keys = np.array([1, 2, 3], dtype=np.int64)
    plain = encode({"key": keys, "v": vectors}).read()
    odd = encode({"key": keys.astype(">i8"), "v": np.asfortranarray(vectors.astype(">f4"))}).read()
    every_other = encode({"key": np.repeat(keys, 2)[::2], "v": np.repeat(vectors, 2, axis=0)[::2]}).read()
    assert plain == odd == every_other


@pytest.mark.parametrize("count", [1, 2, 4])
def test_columns_must_be_of_one_length(count: int) -> None:
    """One row least of all: numpy would repeat it for every key."""
    with pytest.raises(ValueError, match="different lengths"):
        encode({"key": np.arange(3, dtype=np.int32), "v": np.ones((count, 2), dtype=np.float32)})


@pytest.mark.parametrize("count", [0, 1, 5])
def test_what_was_encoded_is_decoded(count: int) -> None:
    dice = np.random.default_rng(count)
    columns: dict[str, NDArray[Any]] = {
        "short": dice.integers(-(2**15), 2**15, count).astype(np.int16),
        "vector": dice.standard_normal((count, 3)).astype(np.float32),
        "number": dice.standard_normal(count),
        "one": dice.standard_normal((count, 1)).astype(np.float32),
    }
    types: dict[str, Column] = {n: (v.dtype, v.shape[1] if v.ndim == 2 else None) for n, v in columns.items()}
    decoded = decode(encode(columns).getbuffer(), types)
    assert list(decoded) == list(columns)
    for name, values in columns.items():
        assert decoded[name].dtype == values.dtype
        assert decoded[name].dtype.isnative
        assert np.array_equal(decoded[name], values)


@pytest.mark.parametrize("size", [1, 18, 19, 20, 1000, PIECE - 1, PIECE, PIECE + 1, 1 << 20])
def test_rows_may_come_in_pieces_of_any_size(size: int) -> None:
    vectors = np.random.default_rng(0).random((70, 2000), np.float32)
    columns: dict[str, NDArray[Any]] = {"key": np.arange(70, dtype=np.int64), "v": vectors}
    decoded = decode(encode(columns).getbuffer(), {"key": (INT8, None), "v": (FLOAT4, 2000)}, size)
    assert all(np.array_equal(decoded[name], columns[name]) for name in columns)


def test_rows_are_handed_on_as_they_come() -> None:
    pieces: list[Rows] = []
    decoder = Decoder({"v": (FLOAT4, 100)}, pieces.append)
    data = encode({"v": np.ones((2 * PIECE // 410, 100), dtype=np.float32)}).read()
    decoder.write(data[:PIECE])
    assert [len(piece["v"]) for piece in pieces] == [(PIECE - 19) // 410]
    decoder.write(data[PIECE:])
    decoder.end()
    assert sum(len(piece["v"]) for piece in pieces) == 2 * PIECE // 410


@pytest.mark.parametrize("cut", [0, 10, 18, 19, 20, -1, -2, -3, -30])
def test_data_that_is_cut_off_is_refused(cut: int) -> None:
    data = encode({"key": np.arange(3, dtype=np.int64)}).getbuffer()
    with pytest.raises(ValueError, match="expected"):
        decode(data[:cut], {"key": (INT8, None)})


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([[bytes(8), None], [bytes(8), bytes(8)]], id="a null"),
        pytest.param([[None, None]] * 11, id="nulls, and by chance the length of 3 rows without"),
        pytest.param([[bytes(8), bytes(4)]], id="a real for a double"),
        pytest.param([[bytes(4), bytes(12)]], id="two other types that are as long together"),
        pytest.param([[bytes(8)]], id="a column too few"),
        pytest.param([[bytes(8), bytes(8), b""]], id="a column too many"),
        pytest.param([[bytes(4), bytes(4), bytes(4)]], id="another number of columns, as long together"),
    ],
)
def test_rows_of_other_types_than_expected_are_refused(rows: list[list[bytes | None]]) -> None:
    with pytest.raises(ValueError, match=r"expected|null"):
        decode(put_together(*rows), {"key": (INT8, None), "number": (FLOAT8, None)})


def test_vectors_of_another_dimension_are_refused() -> None:
    data = encode({"v": np.ones((4, 3), dtype=np.float32)}).getbuffer()
    assert decode(data, {"v": (FLOAT4, 3)})["v"].shape == (4, 3)
    for dim in (1, 2, 4, 5):
        with pytest.raises(ValueError, match=r"expected|null"):
            decode(data, {"v": (FLOAT4, dim)})
