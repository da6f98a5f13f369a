"""The keeper: a small process that stops the embedded server when nobody uses it any more.

Started by `embedded.ensure_running`, which hands it the locked `keeper.lock`; there is one at a time for each home.

Why this cannot race with somebody who is just arriving:

- Who wants to use the server shares `users.lock` first and only then looks whether the server answers.
- The keeper stops it only while it holds `users.lock` exclusively, so there is no user then, and whoever arrives waits
  until the stop is over, finds that nothing answers, and starts it anew.
- Between two looks the keeper holds nothing, so nobody waits for it but during a stop.
- Before it goes, it lets go of `keeper.lock` first and of `users.lock` last: whoever is let in next finds the keeper's
  place free and fills it. The other way round a server could be left without a keeper.
- If it is killed, the next user finds its lock free and starts another, which takes over the running server.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

from embstore.db import embedded
from embstore.db.home import Home, same_file, server_locked, take
from embstore.errors import EmbstoreError

PERIOD = 1.0
"""Seconds between two looks."""


def watch(home: Home, linger: float, keeper_lock: int) -> None:
    """Look every second; return when the server has been stopped, has gone with nobody using it, or the home has."""
    users = home.open(home.users_lock, os.O_RDWR)
    idle_since, last_arrival = time.monotonic(), 0
    while same_file(users, home.users_lock):
        arrival = os.fstat(users).st_mtime_ns
        if not take(users, fcntl.LOCK_EX, limit=0):
            idle_since = time.monotonic()
        else:
            if arrival != last_arrival or _wanted(home):
                idle_since = time.monotonic()
            if _over(home, time.monotonic() - idle_since >= linger):
                os.close(keeper_lock)  # before users.lock, which falls when this process ends
                return
            fcntl.flock(users, fcntl.LOCK_UN)
        last_arrival = arrival
        time.sleep(min(PERIOD, linger))


def _wanted(home: Home) -> bool:
    """Whether something speaks for the server though no embstore process uses it; a doubt counts as a yes."""
    try:
        return home.keep.exists() or embedded.sessions(home) > 0
    except EmbstoreError:
        return True


def _over(home: Home, due: bool) -> bool:
    """Whether there is no server any more; stops it if that is due. The caller holds users.lock exclusively."""
    if not embedded.alive(home):
        return True
    if not due:
        return False
    try:
        with server_locked(home, embedded.START_LIMIT):
            embedded.stop_server(home)
    except EmbstoreError as error:
        print(f"keeper: {error}", file=sys.stderr, flush=True)
        return False
    return True


def main() -> None:
    """Run as `python -m embstore.db.keeper HOME LINGER KEEPER_LOCK`: a folder, seconds, an inherited descriptor."""
    folder, linger, descriptor = sys.argv[1:]
    keeper_lock = int(descriptor)
    os.set_inheritable(keeper_lock, False)
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]  # libpq would believe them
    try:
        watch(Home.at(Path(folder)), float(linger), keeper_lock)
    except EmbstoreError as error:
        sys.exit(f"keeper: {error}")


if __name__ == "__main__":
    main()
