"""The folder of an embedded server: what lies in it, under which account the server runs, and the locks.

postgres/      data directory, 0700                users.lock     shared by everyone who uses the server
socket/        Unix socket, 0700                   server.lock    held round init, start and stop
server.log     what PostgreSQL says                alive.lock     held by PostgreSQL's own processes
keep           if it exists, the server stays up   keeper.lock    held by the keeper
listen         where it listens beside the socket, if it does
server/        a copy of the binaries, only where the server's account cannot enter the folder they came in
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pwd
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embstore.errors import DatabaseNotReady, DatabaseUnavailable, UsageError

ROLE = DATABASE = "embstore"
PORT = 5432
MAJOR = "18"

_SOCKET_PATH_LIMIT = 103  # bytes of sockaddr_un.sun_path on macOS; Linux has 107


@dataclass(frozen=True, slots=True)
class Home:
    """The folder of one embedded server, absolute and without links."""

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> Home:
        """Name it; touches nothing.

        Raises UsageError for a name that PostgreSQL's own files cannot hold, and for a place that one cannot get to.
        """
        if "\n" in str(folder):
            raise UsageError(f"EMBSTORE_HOME {str(folder)!r} has a line break in its name; choose another folder")
        try:
            home = cls(folder.resolve())
            home.folder.exists()
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, until Python 3.13
            why = getattr(error, "strerror", None) or "its links lead in a circle"
            raise UsageError(f"cannot get to {folder}: {why}; set EMBSTORE_HOME to a folder of yours") from None
        return home

    @property
    def data(self) -> Path:
        """PostgreSQL's data directory."""
        return self.folder / "postgres"

    @property
    def socket(self) -> Path:
        """The folder of the Unix socket: inside the home, or a short one in /tmp where libpq could not use that."""
        inside = self.folder / "socket"
        # libpq splits its host at commas, and the kernel limits the length.
        length = len(os.fsencode(inside / ".s.PGSQL.65535"))
        if length <= _SOCKET_PATH_LIMIT and "," not in str(inside) and _is_unicode(inside):
            return inside
        digest = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:16]
        return Path("/tmp") / f"embstore-{Account.of(self).uid}-{digest}"

    @property
    def users_lock(self) -> Path:
        """Shared by every process that uses the server."""
        return self.folder / "users.lock"

    @property
    def server_lock(self) -> Path:
        """Held round init, start and stop."""
        return self.folder / "server.lock"

    @property
    def alive_lock(self) -> Path:
        """Held by PostgreSQL's processes, as long as one of them lives."""
        return self.folder / "alive.lock"

    @property
    def keeper_lock(self) -> Path:
        """Held by the keeper as long as it lives."""
        return self.folder / "keeper.lock"

    @property
    def log(self) -> Path:
        """What PostgreSQL and the keeper say."""
        return self.folder / "server.log"

    @property
    def keep(self) -> Path:
        """Marker: the server stays up when nobody uses it."""
        return self.folder / "keep"

    @property
    def listen(self) -> Path:
        """The address that the server listens on beside its socket; see `network`."""
        return self.folder / "listen"

    def create(self) -> None:
        """Make the folder if it is missing: for its user alone, or enterable by the server's account if we are root.

        Raises UsageError.
        """
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        for folder in reversed(missing):
            try:
                folder.mkdir()
                folder.chmod(0o755 if os.geteuid() == 0 else 0o700)
            except FileExistsError:
                continue  # somebody else was faster; its mode is theirs
            except OSError as error:
                raise UsageError(
                    f"cannot make {folder}: {error.strerror}; set EMBSTORE_HOME to a folder of yours"
                ) from None

    def initialised(self) -> bool:
        """Whether a data directory is there. Raises DatabaseNotReady if it is of another PostgreSQL."""
        try:
            major = (self.data / "PG_VERSION").read_text().strip()
        except FileNotFoundError:
            if self.data.is_dir() and any(self.data.iterdir()):
                raise DatabaseNotReady(
                    f"{self.data} holds files but no database; move it away and run the command again"
                ) from None
            return False
        except PermissionError:
            owner = user_name(self.folder.stat().st_uid)  # of the data it may be the account that root runs it under
            raise UsageError(
                f"the database in {self.data} belongs to user {owner}; run embstore as {owner}, "
                "or set EMBSTORE_HOME to a folder of yours"
            ) from None
        if major != MAJOR:
            raise DatabaseNotReady(
                f"the database in {self.data} was made by PostgreSQL {major}, this embstore runs {MAJOR}; "
                "dump it with the embstore that made it and restore it into a new EMBSTORE_HOME"
            )
        return True

    def open(self, path: Path, flags: int) -> int:
        """Open a lock or the log, made if missing, as the home's owner's even where root came first.

        Returns a descriptor that no program started from here inherits. Raises UsageError.
        """
        try:
            # Never through a link: under root the owner of the home could have us give away any file of the machine.
            descriptor = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise UsageError(
                f"cannot open {path}: {error.strerror}; run embstore as the owner of {self.folder}, "
                "or set EMBSTORE_HOME to a folder of yours"
            ) from None
        if os.geteuid() == 0:
            owner = self.folder.stat()
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        return descriptor


@dataclass(frozen=True, slots=True)
class Account:
    """Under whom PostgreSQL runs: ourselves, or, since it refuses root, somebody without rights."""

    uid: int
    gid: int

    @classmethod
    def of(cls, home: Home) -> Account:
        """As root the owner of the data, else of the home, else nobody. Raises DatabaseUnavailable."""
        if os.geteuid() != 0:
            return cls(os.geteuid(), os.getegid())
        for folder in (home.data, home.folder):
            if folder.exists() and (owner := folder.stat()).st_uid != 0:
                return cls(owner.st_uid, _group(owner.st_uid, owner.st_gid))
        try:
            nobody = pwd.getpwnam("nobody")
        except KeyError:
            raise DatabaseUnavailable(
                f"PostgreSQL does not run as root and there is no user nobody; give {home.folder} to another user: "
                f"chown USER {home.folder}"
            ) from None
        return cls(nobody.pw_uid, nobody.pw_gid)

    def options(self) -> dict[str, Any]:
        """What makes `subprocess` run a program under this account."""
        # Not our working folder: the account may be unable to enter it.
        options: dict[str, Any] = {"cwd": "/", "env": server_environment()}
        if os.geteuid() == 0:
            options |= {"user": self.uid, "group": self.gid, "extra_groups": []}
        return options


def server_environment() -> dict[str, str]:
    """Little of ours, as another account may read it: no passwords, no PGDATA, and messages in English."""
    kept = {name: os.environ[name] for name in ("PATH", "TZ", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"LC_ALL": "C"}


def is_free(home: Home, path: Path) -> bool:
    """Whether nobody holds this lock exclusively. Asks by sharing it, so that two who ask do not see each other."""
    descriptor = home.open(path, os.O_RDWR)
    try:
        return take(descriptor, fcntl.LOCK_SH, limit=0)
    finally:
        os.close(descriptor)


def take(descriptor: int, kind: int, limit: float) -> bool:
    """Take a lock of `kind` (LOCK_SH or LOCK_EX) within `limit` seconds; False if somebody else holds on to it.

    Raises UsageError on a file system without locks.
    """
    deadline = time.monotonic() + limit
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        except OSError as error:
            raise UsageError(
                f"the file system of EMBSTORE_HOME does not lock files ({error.strerror}); "
                "set EMBSTORE_HOME to a folder on a local disk"
            ) from None
        else:
            return True


def same_file(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the file that was opened: a deleted and remade home has other locks."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def server_locked(home: Home, limit: float) -> Iterator[int]:
    """Hold `server.lock`: one process at a time makes, starts or stops the server. Raises DatabaseUnavailable."""
    descriptor = home.open(home.server_lock, os.O_RDWR)
    try:
        if not take(descriptor, fcntl.LOCK_EX, limit):
            raise DatabaseUnavailable(
                f"another process has been starting or stopping PostgreSQL in {home.folder} for {limit:.0f} s; "
                f"see {home.log}"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def _is_unicode(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _group(uid: int, default: int) -> int:
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError:
        return default


def user_name(uid: int) -> str:
    """The name of a user for messages; the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
