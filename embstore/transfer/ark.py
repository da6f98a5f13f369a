"""Kaldi archives of vectors, read without a single call into what they name.

An archive is, for each entry, `key`, a blank, `\\0B`, `FV ` (float32) or `DV ` (float64), the byte 4, the length as
int32 and the values, all little-endian; or in text `key  [ 0.1 0.2 ]`. A script file (.scp) has lines
`key FILE:OFFSET`. Not with kaldiio, which is made for files of one's own: it runs what an .scp names with `|`, and
unpickles entries that say so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from embstore.errors import UsageError
from embstore.sources.listed import read_lines
from embstore.transfer.decimals import to_float32
from embstore.transfer.files import unreadable

_LONGEST_KEY = 10_000
_LONGEST_VECTOR = 1 << 20
_LONGEST_LINE = 32 << 20
_TYPES: dict[bytes, np.dtype[Any]] = {b"FV ": np.dtype("<f4"), b"DV ": np.dtype("<f8")}
_place = re.compile(r"(.+):([0-9]{1,18})").fullmatch

Entry = tuple[str, NDArray[np.floating]]


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


def read(path: Path) -> Iterator[Entry]:
    """The entries of an archive, or those that a script file names. Raises UsageError."""
    return _named(path) if path.suffix == ".scp" else _all(path)


def _all(path: Path) -> Iterator[Entry]:
    try:
        with path.open("rb") as file:
            while key := _key(file, path):
                yield key, _vector(file, path, key)
    except OSError as error:
        raise unreadable(error, path) from None


def _named(scp: Path) -> Iterator[Entry]:
    opened: Path | None = None
    file: IO[bytes] | None = None
    try:
        for line, text in enumerate(read_lines(scp), 1):
            if text.isspace():
                continue
            key, ark, offset = _entry(text, f"'{scp}' line {line}")
            found = _find(ark, scp)
            if found != opened:
                if file:
                    file.close()
                opened, file = found, found.open("rb")
            assert file is not None
            file.seek(offset)
            yield key, _vector(file, found, key)
    except OSError as error:
        raise unreadable(error, scp) from None
    finally:
        if file:
            file.close()


def _entry(text: str, where: str) -> tuple[str, str, int]:
    key, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    if rest.startswith("|") or rest.endswith("|"):
        raise UsageError(f"{where} is a command, and embstore runs none from data: write its output to a file")
    place = _place(rest)
    if place is None:
        raise UsageError(f"{where} is not KEY FILE.ark:OFFSET")
    return key, place[1], int(place[2])


def _find(ark: str, scp: Path) -> Path:
    """An archive as a script file names it: from the current folder, as in Kaldi, or else beside the script file."""
    for path in (Path(ark), scp.parent / Path(ark).name):
        if path.is_file():
            return path
    raise UsageError(f"'{scp}' names '{ark}', which is not there, nor is '{Path(ark).name}' beside it")


def _key(file: IO[bytes], path: Path) -> str:
    """The next key; empty at the end of the file."""
    raw = bytearray()
    while (byte := file.read(1)) not in (b" ", b""):
        raw += byte
        if len(raw) > _LONGEST_KEY:
            raise UsageError(f"'{path}' is no Kaldi archive")
    try:
        key = raw.decode().strip()
    except UnicodeDecodeError:
        raise UsageError(f"'{path}' is no Kaldi archive") from None
    if byte == b"" and key:
        raise UsageError(f"'{path}' ends within an entry: it is damaged")
    if byte and not key:
        raise UsageError(f"'{path}' is no Kaldi archive")
    return key


def _vector(file: IO[bytes], path: Path, key: str) -> NDArray[np.floating]:
    mark = file.read(2)
    if mark != b"\0B":
        return _text(mark + file.readline(_LONGEST_LINE), path, key)
    kind, size = file.read(3), file.read(5)
    if kind not in _TYPES:
        raise UsageError(f"'{path}': entry '{key}' is no vector of float32 or float64, but {kind!r}")
    length = int.from_bytes(size[1:], "little")
    if size[:1] != b"\4" or length > _LONGEST_VECTOR:
        raise UsageError(f"'{path}': entry '{key}' is damaged")
    data = file.read(length * _TYPES[kind].itemsize)
    if len(data) != length * _TYPES[kind].itemsize:
        raise UsageError(f"'{path}' ends within entry '{key}': it is damaged")
    return np.frombuffer(data, dtype=_TYPES[kind])


def _text(line: bytes, path: Path, key: str) -> NDArray[np.floating]:
    words = line.split()
    if len(words) < 2 or words[0] != b"[" or words[-1] != b"]":
        raise UsageError(f"'{path}': entry '{key}' is no vector")
    try:
        return to_float32([word.decode() for word in words[1:-1]])
    except (ValueError, UnicodeDecodeError):
        raise UsageError(f"'{path}': entry '{key}' holds what is no number") from None
