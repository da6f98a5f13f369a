"""Open an item's file, and give every error of the file system its reason code."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from embstore.errors import ItemFailed


@contextmanager
def opened(path: Path) -> Iterator[FileIO]:
    """Open a regular file, unbuffered.

    Raises ItemFailed: `not_found`, `no_permission`, `is_a_directory`, `not_a_file`, `read_error`, the last one for
    any OSError inside the `with` too.
    """
    try:
        # Before opening: to open a named pipe waits for its writer.
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ItemFailed("is_a_directory", f"{path} is a directory")
        if not stat.S_ISREG(mode):
            raise ItemFailed("not_a_file", f"{path} is not a regular file")
        # Unbuffered: libsndfile reads from the descriptor, whose place a buffer would run ahead of.
        with path.open("rb", buffering=0) as file:
            yield file
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ItemFailed("not_found", f"{path} does not exist") from error
    except PermissionError as error:
        raise ItemFailed("no_permission", f"{path} may not be read by this user") from error
    except OSError as error:
        raise ItemFailed("read_error", f"{path}: {error.strerror or error}") from error
