"""A folder of links or copies for each segment, and a marker that says which folders are embstore's own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from embstore.errors import UsageError

MARKER = ".embstore"
"""In every folder that embstore made here; it lists what embstore put into it."""


def claim(folder: Path) -> None:
    """Make `folder`, or take it again if embstore made it or it is empty.

    Raises UsageError if it holds anything and is not embstore's.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"'{folder}' is not a folder of its own; name a new or an empty folder")
    if folder.is_dir() and not (folder / MARKER).is_file() and any(folder.iterdir()):
        raise UsageError(
            f"embstore did not make the folder '{folder}' and leaves it alone; name a new or an empty folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MARKER).exists():
            _write_marker(folder, [])
    except OSError as error:
        raise UsageError(f"cannot write to '{folder}': {error.strerror}; name another folder") from error


def name_of(number: int, segments: int) -> str:
    """Name of a segment's folder: `speaker_001`; as many digits as the last one needs, but three at least."""
    return f"speaker_{number:0{max(3, len(str(segments)))}d}"


def clear(folder: Path) -> None:
    """Remove the segments' folders of an earlier run from a claimed folder.

    Raises UsageError, before anything is removed, where one of them is not embstore's or holds something else by now.
    """
    old = sorted(p for p in folder.glob("speaker_*") if p.is_symlink() or p.is_dir())
    contents = [(path, _own(path)) for path in old]
    for path, names in contents:
        for name in names:
            (path / name).unlink(missing_ok=True)
        (path / MARKER).unlink()
        path.rmdir()


def _own(path: Path) -> list[str]:
    refusal = "; move it away or name another folder"
    if path.is_symlink() or not (path / MARKER).is_file():
        raise UsageError(f"embstore did not make the folder '{path}' and leaves it alone{refusal}")
    try:
        names = [str(name) for name in json.loads((path / MARKER).read_text(encoding="utf-8"))["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the marker of '{path}' cannot be read: {error}{refusal}") from error
    others = {entry.name for entry in path.iterdir()} - set(names) - {MARKER}
    if others:
        raise UsageError(f"'{path}' holds '{min(others)}', which embstore did not put there{refusal}")
    return names


def fill(folder: Path, files: Iterable[tuple[int, Path]], *, copy: bool) -> list[Path]:
    """Make one segment's folder with a link to (or a copy of) each file; returns the files that are not there.

    `files`: positions and paths. A file with several items in the segment is linked once; of different files with the
    same name, the later ones get their position into it.
    """
    chosen: dict[str, Path] = {}
    seen: set[Path] = set()
    missing: list[Path] = []
    for position, path in files:
        path = Path(os.path.abspath(path))  # noqa: PTH100  (resolve() would follow a link and lose the file's own name)
        if path in seen:
            continue
        seen.add(path)
        if path.is_file():
            chosen[path.name if path.name not in chosen else f"{path.stem}.{position}{path.suffix}"] = path
        else:
            missing.append(path)
    folder.mkdir()
    # First the list, then the files: a killed run leaves nothing behind that the next one would not know as its own.
    _write_marker(folder, list(chosen))
    for name, path in chosen.items():
        if copy:
            shutil.copy2(path, folder / name)
        else:
            (folder / name).symlink_to(path)
    return missing


def _write_marker(folder: Path, names: list[str]) -> None:
    text = json.dumps({"made by": "embstore boundaries", "files": names}, ensure_ascii=False, indent=1)
    (folder / MARKER).write_text(text + "\n", encoding="utf-8")
