"""Which of the formats a path holds, and a reader for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from embstore.errors import UsageError
from embstore.transfer import csvs, kaldi, npz, parquet, trees
from embstore.transfer.reading import COMPUTED, Reader
from embstore.transfer.table import Format

_BY_ENDING: dict[str, Format] = {
    ".parquet": "parquet",
    ".npz": "npz",
    ".csv": "csv",
    ".ark": "kaldi",
    ".scp": "kaldi",
}
_READERS: dict[Format, Callable[[Path], Reader]] = {
    "parquet": parquet.Reader,
    "npz": npz.Reader,
    "csv": csvs.Reader,
    "kaldi": kaldi.Reader,
    "pkl": trees.Reader,
}


def open_table(path: Path, form: Format | None = None) -> Reader:
    """Open what a path holds: a file, or a folder that an export or another program wrote. Raises UsageError."""
    path = path.absolute()
    if not os.path.exists(path):  # noqa: PTH110 (that of Path raises for what is too long for a name)
        raise UsageError(f"there is no '{path}'")
    if path.is_dir():
        found, place = _in_folder(path, form)
    elif form == "pkl" or path.suffix == ".pkl":
        raise UsageError(f"'{path}' is a single pickle: name the folder of the tree that it belongs to")
    else:
        found, place = form or _of_file(path), path
    reader = _READERS[found](place)
    if not reader.dim:
        raise UsageError(f"there are no vectors in '{place}': nothing to import")
    return reader


def _of_file(path: Path) -> Format:
    try:
        return _BY_ENDING[path.suffix]
    except KeyError:
        raise UsageError(f"'{path}' is none of {', '.join(_BY_ENDING)}, nor a folder of .pkl: add --format") from None


def _in_folder(folder: Path, form: Format | None) -> tuple[Format, Path]:
    found: dict[Format, Path] = {}
    for ending, of in _BY_ENDING.items():
        path = folder / f"embeddings{ending}"
        if path.is_file():
            found.setdefault(of, path)
    if "kaldi" not in found and (archive := _archive(folder)):
        found["kaldi"] = archive
    if next(folder.rglob("*.pkl"), None):
        found["pkl"] = folder
    if form is not None:
        found = {of: path for of, path in found.items() if of == form}
    if len(found) > 1:
        raise UsageError(f"'{folder}' holds embeddings in several formats, {', '.join(found)}: add --format")
    if not found:
        raise UsageError(f"'{folder}' holds no embeddings{f' as {form}' if form else ''}{_instead(folder)}")
    return next(iter(found.items()))


def _archive(folder: Path) -> Path | None:
    """The archive of another program, if there is but one; a script file names only parts of it, perhaps."""
    for ending in (".scp", ".ark"):
        files = [path for path in folder.glob(f"*{ending}") if path.name != "wav.scp"]
        if len(files) == 1:
            return files[0]
    return None


def _instead(folder: Path) -> str:
    """What to do about a folder without embeddings."""
    for kind in ("centroids", "boundaries"):
        if next(folder.glob(f"{kind}.*"), None):
            return f", but {kind}, {COMPUTED}"
    return ": name a file, or a folder that 'embstore export embeddings' has written"
