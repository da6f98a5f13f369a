"""Tables as .npz files: one array a column, without pickles, readable by numpy.load and written and read as a stream.

An array of vectors goes straight into the archive; other columns wait in temporary files beside it, as an archive takes
one array after the other. Texts are arrays of fixed width, as numpy has them, in which null is an empty text; in
numbers it is NaN. The facts are a text, `embstore`, and the model's name is one, `model`.
"""

from __future__ import annotations

import math
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from embstore.errors import UsageError
from embstore.transfer.files import unreadable, whole
from embstore.transfer.reading import Tell, batch_rows, find_columns, read_facts, root_of
from embstore.transfer.table import Batch, Facts, Field, Table

_FACTS = "embstore"
_DTYPES: dict[str, np.dtype[Any]] = {
    "int": np.dtype("<i8"),
    "double": np.dtype("<f8"),
    "real": np.dtype("<f4"),
    "vector": np.dtype("<f4"),
}
_WIDEST = 1 << 16
"""Bytes of a row: no vector that can be stored, and no path, has more."""


def write(folder: Path, table: Table) -> Path:
    """Write `KIND.npz` into the folder; returns its path. Columns of lists are left out."""
    path = folder / f"{table.facts.kind}.npz"
    fields = [field for field in table.fields if field.type not in ("ints", "texts") and field.name != "model"]
    vector = next((field for field in fields if field.type == "vector"), None)
    spools = [_Spool(field, folder) for field in fields if field is not vector]
    with ExitStack() as stack:
        for spool in spools:
            stack.enter_context(spool.file)
        archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(whole(path)), "w"))
        if vector is None:
            _spool(table, spools)
        else:
            with archive.open(f"{vector.name}.npy", "w", force_zip64=True) as member:
                _write_header(member, _DTYPES["vector"], (table.rows, table.dim))
                for batch in _spooled(table, spools):
                    member.write(np.ascontiguousarray(batch[vector.name], dtype="<f4").data.cast("B"))
        # Texts of fixed width are mostly zeros.
        archive.compression, archive.compresslevel = zipfile.ZIP_DEFLATED, 1
        for spool in spools:
            spool.write_into(archive, table.rows)
        for name, words in ((_FACTS, table.facts.to_json()), ("model", table.facts.model or "")):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.array(words), allow_pickle=False)
    return path


def _spool(table: Table, spools: list[_Spool]) -> None:
    for _ in _spooled(table, spools):
        pass


def _spooled(table: Table, spools: list[_Spool]) -> Iterator[Batch]:
    for batch in table.batches:
        for spool in spools:
            spool.add(batch[spool.field.name])
        yield batch


class _Spool:
    """A column on disk until its turn comes. Texts are kept as UTF-8 with a NUL, which none of them holds, between."""

    def __init__(self, field: Field, folder: Path) -> None:
        self.field = field
        self.file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (`write` closes it)
        self._longest = 1
        self._sizes: list[int] = []

    def add(self, values: Any) -> None:
        if self.field.type == "text":
            texts = [value or "" for value in values]
            self._longest = max(self._longest, *map(len, texts))
            piece = "\0".join(texts).encode()
        else:
            piece = np.asarray(values, dtype=_DTYPES[self.field.type]).tobytes()
        self._sizes.append(len(piece))
        self.file.write(piece)

    def write_into(self, archive: zipfile.ZipFile, rows: int) -> None:
        is_text = self.field.type == "text"
        dtype = np.dtype(f"<U{self._longest}") if is_text else _DTYPES[self.field.type]
        self.file.seek(0)
        with archive.open(f"{self.field.name}.npy", "w", force_zip64=True) as member:
            _write_header(member, dtype, (rows,))
            for size in self._sizes:
                piece = self.file.read(size)
                member.write(np.array(piece.decode().split("\0"), dtype=dtype).tobytes() if is_text else piece)


def _write_header(member: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)


class Reader:
    """An .npz file. Opening it reads the heads of its arrays. Raises UsageError where they do not fit each other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _Archive(path) as archive:
            self.facts: Facts | None = None
            if _FACTS in archive.names:
                self.facts = read_facts(archive.text(_FACTS), f"'{path}'")
            self._columns = find_columns({name: name for name in archive.names}, f"'{path}' has no array")
            arrays = {field: archive.array(name) for name, field in self._columns}
        self.root = root_of(self.facts)
        self.dim = 0
        for field, array in arrays.items():
            _check(array, field, path)
            if field.type == "vector":
                self.dim = array.shape[1]
        if len({array.shape[0] for array in arrays.values()}) != 1:
            lengths = ", ".join(f"{field.name} {array.shape[0]:,}" for field, array in arrays.items())
            raise UsageError(f"'{path}': its arrays are of different lengths: {lengths}")
        self.rows: int | None = next(iter(arrays.values())).shape[0]

    def where(self, row: int) -> str:
        """Name a row."""
        return f"'{self._path.name}' row {row}"

    def batches(self, tell: Tell) -> Iterator[Batch]:  # noqa: ARG002 (an array has no broken rows)
        """The rows."""
        with _Archive(self._path) as archive:
            arrays = {field: archive.array(name) for name, field in self._columns}
            rows = next(iter(arrays.values())).shape[0]
            size = batch_rows(sum(array.row_bytes for array in arrays.values()))
            for begin in range(0, rows, size):
                count = min(size, rows - begin)
                batch: Batch = {"row": np.arange(begin + 1, begin + count + 1)}
                for field, array in arrays.items():
                    batch[field.name] = _values(array.read(count), field)
                yield batch
            for array in arrays.values():
                array.end()


def _check(array: _Array, field: Field, path: Path) -> None:
    """Raise UsageError unless the array can be this column."""
    wanted = {"text": "US", "double": "fiu", "vector": "f"}[field.type]
    dimensions = 2 if field.type == "vector" else 1
    if array.dtype.kind not in wanted or len(array.shape) != dimensions or min(array.shape) < 0 or not array.row_bytes:
        shape = " × ".join(map(str, array.shape))
        raise UsageError(f"'{path}': array '{array.name}' cannot be {field.name}: it is {array.dtype} of {shape}")
    if array.row_bytes > _WIDEST:
        raise UsageError(
            f"'{path}': array '{array.name}' has rows of {array.row_bytes:,} bytes: too wide for a {field.name}"
        )


def _values(array: NDArray[Any], field: Field) -> Any:
    if field.type == "text":
        texts = array.tolist()
        return [(text.decode("utf-8", "replace") if isinstance(text, bytes) else text) or None for text in texts]
    return array.astype(_DTYPES["double"]) if field.type == "double" else array


class _Archive:
    """A zip file of arrays, of which several can be read at once. Whatever is wrong with it is UsageError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _Archive:
        try:
            self._zip = zipfile.ZipFile(self._path)
        except OSError as error:
            raise unreadable(error, self._path) from None
        except (zipfile.BadZipFile, ValueError) as error:
            raise UsageError(f"'{self._path}' is no .npz file, or it is damaged: {error}") from None
        self._open = ExitStack()
        self.names = [name[:-4] for name in self._zip.namelist() if name.endswith(".npy")]
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._zip.close()

    def array(self, name: str) -> _Array:
        if self._zip.getinfo(f"{name}.npy").compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UsageError(f"'{self._path}': array '{name}' is packed in a way that NumPy does not write")
        try:
            return _Array(self._open.enter_context(self._zip.open(f"{name}.npy")), name, self._path)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
            raise UsageError(f"'{self._path}': array '{name}' cannot be read: {error}") from None

    def text(self, name: str) -> str:
        array = self.array(name)
        if array.dtype.kind != "U" or array.shape or array.dtype.itemsize > 1 << 24:
            raise UsageError(f"'{self._path}': array '{name}' is no text: it is damaged")
        array.shape = (1,)
        return str(array.read(1)[0])


class _Array:
    """An array in an archive, read row by row. Object arrays, which are pickles, are refused."""

    def __init__(self, member: IO[bytes], name: str, path: Path) -> None:
        self._member, self.name, self._path = member, name, path
        formats = np.lib.format
        try:
            read_header = {(1, 0): formats.read_array_header_1_0, (2, 0): formats.read_array_header_2_0}[
                formats.read_magic(member)
            ]
            shape, fortran, self.dtype = read_header(member)
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise self._damaged(error) from None
        self.shape: tuple[int, ...] = shape
        if self.dtype.hasobject:
            raise UsageError(f"'{path}': array '{name}' holds Python objects, which could run code: refused")
        if fortran and len(shape) > 1:
            raise UsageError(f"'{path}': array '{name}' is stored by columns: save numpy.ascontiguousarray of it")

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, rows: int) -> NDArray[Any]:
        """The next rows. Raises UsageError where the file ends before them."""
        size = rows * self.row_bytes
        try:
            data = self._member.read(size)
        except (EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise self._damaged(error) from None
        if len(data) != size:
            raise self._damaged("it is shorter than it says")
        return np.frombuffer(data, dtype=self.dtype).reshape(rows, *self.shape[1:])

    def end(self) -> None:
        """Read on to the end: only there the checksum is looked at."""
        try:
            rest = self._member.read(1)
        except (EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise self._damaged(error) from None
        if rest:
            raise self._damaged("it is longer than it says")

    def _damaged(self, why: object) -> UsageError:
        return UsageError(f"'{self._path}': array '{self.name}' is damaged: {why}")
