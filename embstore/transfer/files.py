"""Names of files, files that appear whole, and folders that are an export's."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import unquote

from embstore.errors import UsageError

MARKER = ".embstore-export.json"
"""In a folder that holds an export: it may be written into again."""
_LONGEST_NAME = 200


@contextmanager
def claimed(folder: Path, force: bool) -> Iterator[None]:
    """Make the folder an export's, and keep other exports out of it.

    Raises UsageError if it holds something else, or if another export is writing into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / MARKER
    if not force and not marker.exists() and any(folder.iterdir()):
        raise UsageError(f"'{folder}' holds other files: name a new folder, or add --force")
    with marker.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another export is writing into '{folder}': wait for it, or name another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        if not marker.stat().st_size:
            file.write(json.dumps({"made by": "embstore export"}) + "\n")
            file.flush()
        yield


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that has its name only when all of it is written. What a killed export has left is written over."""
    temporary = path.with_name(f".{path.name[:100]}.part")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def component(part: str) -> str:
    """A name as a file name; what is escaped is so that no two names become one. Raises UsageError."""
    part = part.replace("%", "%25").replace("/", "%2F")
    if part.startswith("."):
        part = "%2E" + part[1:]
    if len(part.encode()) > _LONGEST_NAME:
        raise UsageError(f"the name '{part[:40]}…' is too long for a file name: use --format npz or parquet")
    return part or "%"


def folders_and_name(name: str, ending: str) -> Path:
    """A name with slashes as a relative path: a `/` makes folders, and nothing leads out of the export."""
    *folders, last = (component(part) for part in name.split("/"))
    # A folder of that name would be in the way of the file of another name.
    folders = [part[: -len(ending)] + "%2E" + ending[1:] if part.endswith(ending) else part for part in folders]
    return Path(*folders, last + ending)


_not_plain = re.compile(r"[%@\s\x00-\x1f\x7f]")


def utterance_id(path: str, start: float | None) -> str:
    """One word that stands for an item: its path, and `@START` for a stretch, which is in seconds.

    `%`, `@` and blanks in the path are written `%25`, `%40`, `%20`, as in a URL.
    """
    word = _not_plain.sub(lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), path)
    return word if start is None else f"{word}@{start!r}"


def of_utterance_id(word: str) -> tuple[str, float | None]:
    """The path and the start that `utterance_id` made the word of. Raises ValueError."""
    path, at, start = word.partition("@")
    return unquote(path, errors="strict"), float(start) if at else None


def one_word(name: str) -> str:
    """A speaker's name as one word."""
    return utterance_id(name, None)


def unwritable(error: OSError, folder: Path) -> UsageError:
    """What to say where a file cannot be written."""
    return UsageError(f"cannot write to '{error.filename or folder}': {error.strerror}")


def unreadable(error: OSError, path: Path) -> UsageError:
    """What to say where a file cannot be read."""
    return UsageError(f"cannot read '{os.fspath(error.filename or path)}': {error.strerror or error}")
