"""COPY BINARY to and from numpy arrays, without a Python object a value; and CSV and text, for names.

The format (PostgreSQL manual, "COPY", "Binary Format"): a signature, then a row as int16 field count and for each
field an int32 length and the bytes, big-endian throughout, and -1 as the trailer. A vector is int16 dim, int16 0 and
dim float32. Where no field is null, all rows are of one length: a numpy record.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import psycopg2
from numpy.typing import NDArray
from sqlalchemy import Connection

_SIGNATURE = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"

PIECE = 1 << 18
"""Bytes that psycopg2 reads at a time; its default of 8 kB makes a COPY take 1.7 times as long."""

Column = tuple[np.dtype[Any], int | None]
"""Type of a column's values, and the dimension if they are vectors. Of a record, what a bytea holds, byte for byte."""

Rows = dict[str, NDArray[Any]]
"""Columns of some rows, by name."""


def copy_rows(connection: Connection, table: str, columns: Mapping[str, NDArray[Any]]) -> None:
    """Append rows to `table`: integers and floats of 2, 4 or 8 bytes, each [n], and vectors, float32 [n, dim].

    `table` and the names are trusted identifiers. Runs within the caller's transaction.
    """
    names = ", ".join(columns)
    with _cursor(connection) as cursor:
        if not is_guarded(connection, table):
            cursor.copy_expert(f"COPY {table} ({names}) FROM STDIN (FORMAT BINARY)", encode(columns), size=PIECE)
            return
        # PostgreSQL has no COPY into a table with row-level security. The way there leads through a temporary one. It
        # stays, as to make one for each batch would bloat the catalogue; and whether it is there is asked each time, as
        # behind a connection pool the session is another one now and then.
        staged = f"pg_temp.embstore_{table.rpartition('.')[2]}"
        cursor.execute(
            f"CREATE TEMPORARY TABLE IF NOT EXISTS {staged}"
            f" (LIKE {table} INCLUDING DEFAULTS INCLUDING IDENTITY INCLUDING STORAGE) ON COMMIT DELETE ROWS"
        )
        cursor.copy_expert(f"COPY {staged} ({names}) FROM STDIN (FORMAT BINARY)", encode(columns), size=PIECE)
        cursor.execute(f"INSERT INTO {table} ({names}) SELECT {names} FROM {staged}; DELETE FROM {staged}")


def is_guarded(connection: Connection, table: str) -> bool:
    """Whether this role's rows are checked one by one, which COPY into `table` does not do; asked once a session."""
    key = ("row security", table)
    if key not in connection.info:
        with _cursor(connection) as cursor:
            cursor.execute("SELECT row_security_active(%s)", (table,))
            connection.info[key] = cursor.fetchone()[0]
    return bool(connection.info[key])


def read_rows(connection: Connection, query: str, columns: Mapping[str, Column]) -> Rows:
    """The rows of a query without parameters, whose columns are of these types, in this order, and never null."""
    pieces: list[Rows] = []
    stream_rows(connection, query, columns, pieces.append)
    return {
        name: np.concatenate([piece[name] for piece in pieces], dtype=dtype) for name, (dtype, _) in columns.items()
    }


def stream_rows(
    connection: Connection, query: str, columns: Mapping[str, Column], take: Callable[[Rows], object]
) -> None:
    """The same, given to `take` as they come, some hundred at a time: meanwhile the server goes on sending.

    Their bytes are in the order of the network, big-endian: whoever puts them elsewhere turns them without a copy more.
    """
    decoder = Decoder(columns, take)
    with _cursor(connection) as cursor:
        cursor.copy_expert(f"COPY ({query}) TO STDOUT (FORMAT BINARY)", decoder)
    decoder.end()


def copy_values(connection: Connection, table: str, rows: Iterable[Sequence[str | float | None]]) -> int:
    """Append rows of any values, made as they are sent; returns their number. `table` may name columns, in brackets.

    An empty text becomes null. Runs within the caller's transaction.
    """
    lines = _Lines(rows)
    try:
        with _cursor(connection) as cursor:
            cursor.copy_expert(f"COPY {table} FROM STDIN (FORMAT csv)", lines, size=PIECE)
    except psycopg2.Error:
        # psycopg2 makes an error of the server out of whatever happens in `read`, a Ctrl+C included.
        if lines.error is not None:
            raise lines.error from None
        raise
    return lines.count


class _Lines:
    """A file, to psycopg2, of rows as CSV; made piece by piece, so that any number of them streams.

    CSV because its writer is in C: to put together the lines of COPY's own form here took longer than to read them in a
    manifest and to look at the files. The writer makes the same of null and of an empty text.
    """

    def __init__(self, rows: Iterable[Sequence[str | float | None]]) -> None:
        self._rows = iter(rows)
        self.count = 0
        self.error: BaseException | None = None

    def read(self, _size: int = -1) -> str:
        """The next few thousand lines; psycopg2 takes pieces of any length. Empty at the end."""
        try:
            piece = io.StringIO(newline="")
            rows = list(islice(self._rows, 2000))
            # A name with a line end of either kind in it is quoted only if both are in the writer's own.
            csv.writer(piece, lineterminator="\r\n").writerows(rows)
            self.count += len(rows)
            return piece.getvalue()
        except BaseException as error:
            self.error = error
            raise


_NULL = r"\N"
_SIGNS = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


def read_texts(connection: Connection, query: str) -> list[str | None]:
    """The one column, of texts or nulls, of a query without parameters."""
    sink = io.BytesIO()
    with _cursor(connection) as cursor:
        cursor.copy_expert(f"COPY ({query}) TO STDOUT", sink)
    text = sink.getvalue().decode()
    lines = text.split("\n")[:-1]
    if "\\" not in text:
        return list(lines)
    # Nearly always backslashes are nulls and nothing else.
    if text.count("\\") == text.count(_NULL):
        return [None if line == _NULL else line for line in lines]
    return [None if line == _NULL else _unescaped(line) for line in lines]


def _unescaped(value: str) -> str:
    return re.sub(r"\\(.)", lambda found: _SIGNS.get(found[1], found[1]), value) if "\\" in value else value


def encode(columns: Mapping[str, NDArray[Any]]) -> io.BytesIO:
    """Rows in PostgreSQL's binary form. Raises ValueError if the columns are not of one length."""
    if len({len(values) for values in columns.values()}) > 1:
        raise ValueError(f"columns of different lengths: { {name: len(values) for name, values in columns.items()} }")
    shapes: dict[str, Column] = {
        name: (values.dtype, None if values.ndim == 1 else values.shape[1]) for name, values in columns.items()
    }
    rows = np.zeros(len(next(iter(columns.values()))), dtype=_record(shapes))
    rows["fields"] = len(columns)
    for name, values in columns.items():
        if values.ndim == 2:
            rows[f"{name} length"] = 4 + 4 * values.shape[1]
            rows[f"{name} dim"] = values.shape[1]
        else:
            rows[f"{name} length"] = values.dtype.itemsize
        rows[name] = values
    return io.BytesIO(b"".join((_SIGNATURE, rows.tobytes(), _TRAILER)))


class Decoder:
    """A file, to psycopg2: what is written into it are rows in PostgreSQL's binary form, and `take` gets their columns.

    Raises ValueError if they are not of these types.
    """

    def __init__(self, columns: Mapping[str, Column], take: Callable[[Rows], object]) -> None:
        self._columns = columns
        self._take = take
        self._record = _record(columns)
        self._begin = len(_SIGNATURE)
        self._waiting: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> int:
        """Take note of more of it: a row, as the server sends them."""
        self._waiting.append(data)
        self._size += len(data)
        if self._size >= PIECE:
            self._hand_on()
        return len(data)

    def end(self) -> None:
        """That was all of it."""
        self._hand_on()
        if self._waiting != [_TRAILER]:
            raise ValueError(f"rows of {self._record.itemsize} bytes expected: a null, or another type")

    def _hand_on(self) -> None:
        data = b"".join(self._waiting)
        count = max(0, len(data) - self._begin) // self._record.itemsize
        self._take(self._decode(np.frombuffer(data, self._record, count, self._begin if count else 0)))
        rest = data[self._begin + count * self._record.itemsize :]
        self._waiting, self._size, self._begin = [rest], len(rest), 0

    def _decode(self, rows: NDArray[Any]) -> Rows:
        if (rows["fields"] != len(self._columns)).any():
            raise ValueError(f"{len(self._columns)} columns expected")
        for name, (dtype, dim) in self._columns.items():
            if (rows[f"{name} length"] != (dtype.itemsize if dim is None else 4 + 4 * dim)).any():
                raise ValueError(f"column '{name}' holds a null, or is of another type than {dtype}")
        return {name: rows[name] for name in self._columns}


def _record(columns: Mapping[str, Column]) -> np.dtype[Any]:
    fields: list[Any] = [("fields", ">i2")]
    for name, (dtype, dim) in columns.items():
        fields.append((f"{name} length", ">i4"))
        if dim is None:
            fields.append((name, dtype if dtype.names else dtype.newbyteorder(">")))
        else:
            fields += [(f"{name} dim", ">i2"), (f"{name} unused", ">i2"), (name, ">f4", (dim,))]
    return np.dtype(fields)


def _cursor(connection: Connection) -> Any:
    driver = connection.connection.driver_connection
    assert driver is not None
    return driver.cursor()
