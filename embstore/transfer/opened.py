"""Which of the formats a path holds, and a reader for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from embstore.errors import UsageError
from embstore.transfer import csvs, kaldi, npz, parquet, pickles
from embstore.transfer.table import Format, Kind, Reader

_BY_ENDING: dict[str, Format] = {
    ".parquet": "parquet",
    ".npz": "npz",
    ".csv": "csv",
    ".ark": "kaldi",
    ".scp": "kaldi",
}


def open_table(path: Path, kind: Kind, form: Format | None = None) -> Reader:
    """Open what a path holds: a file, or a folder that an export or another program wrote. Raises UsageError."""
    path = path.absolute()
    if not path.exists():
        raise UsageError(f"there is no '{path}'")
    found, place = _in_folder(path, kind, form) if path.is_dir() else (form or _of_file(path), path)
    if found == "pkl":
        return pickles.Reader(place, kind)
    readers: dict[Format, Callable[[Path, Kind], Reader]] = {
        "parquet": parquet.Reader,
        "npz": npz.Reader,
        "csv": csvs.Reader,
        "kaldi": kaldi.Reader,
    }
    return readers[found](place, kind)


def _of_file(path: Path) -> Format:
    try:
        return _BY_ENDING[path.suffix]
    except KeyError:
        hint = "; of pickles, name their folder" if path.suffix == ".pkl" else ""
        raise UsageError(f"'{path}' is none of {', '.join(_BY_ENDING)}{hint}: add --format") from None


def _in_folder(folder: Path, kind: Kind, form: Format | None) -> tuple[Format, Path]:
    found: dict[Format, Path] = {}
    for ending, of in _BY_ENDING.items():
        path = folder / f"{kind}{ending}"
        if path.is_file():
            found.setdefault(of, path)
    if "kaldi" not in found and (archive := _archive(folder)):
        found["kaldi"] = archive
    if next(folder.rglob("*.pkl"), None):
        found["pkl"] = folder
    if form is not None:
        found = {of: path for of, path in found.items() if of == form}
    if len(found) != 1:
        several = f"{kind} in several formats, {', '.join(found)}: add --format"
        raise UsageError(f"'{folder}' holds {several if found else f'no {kind}' + (f' as {form}' if form else '')}")
    return next(iter(found.items()))


def _archive(folder: Path) -> Path | None:
    """The archive of another program, if there is but one; a script file names only parts of it, perhaps."""
    for ending in (".scp", ".ark"):
        files = [path for path in folder.glob(f"*{ending}") if path.name != "wav.scp"]
        if len(files) == 1:
            return files[0]
    return None
