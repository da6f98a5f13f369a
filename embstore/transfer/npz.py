"""Tables as .npz files: one array a column, without pickles, readable by numpy.load and written as a stream.

An array of vectors goes straight into the archive; other columns wait in temporary files beside it, as an archive takes
one array after the other. Texts are arrays of fixed width, as numpy has them, in which null is an empty text; in
numbers it is NaN. The facts are a text, `embstore`, and the model's name is one, `model`.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from embstore.transfer.files import whole
from embstore.transfer.table import Batch, Field, Table

_FACTS = "embstore"
_DTYPES: dict[str, np.dtype[Any]] = {
    "int": np.dtype("<i8"),
    "double": np.dtype("<f8"),
    "real": np.dtype("<f4"),
    "vector": np.dtype("<f4"),
}


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
