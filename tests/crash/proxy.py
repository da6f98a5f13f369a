"""A proxy between embstore and PostgreSQL that loses connections at a chosen message."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import make_url

Cut = Callable[[bytes], bool]


class Proxy:
    """Listens on the loopback; forwards every connection to an embedded server, until one is to be cut.

    `cut` is asked about every piece that a client sends; where it says yes, the connection is cut: before the piece
    reaches the server (`before`), or when the server's answer to it is there, which the client never gets (`after`). Or
    it stalls: both ends stay connected, and nothing goes through any more (`never`).
    """

    def __init__(self, address: str, cut: Cut, *, when: str) -> None:
        self._server = make_url(address)
        self._cut = cut
        self._when = when
        self._closing = False
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._url = self._server.set(host="127.0.0.1", port=self._listener.getsockname()[1], query={})
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        """The database's address by way of the proxy."""
        return self._url.render_as_string(hide_password=False)

    def close(self) -> None:
        """Take no more connections."""
        self._closing = True
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = self._connect()
        with client, server, contextlib.suppress(OSError):
            self._forward(client, server)

    def _connect(self) -> socket.socket:
        server = socket.socket(socket.AF_UNIX)
        server.connect("{host}/.s.PGSQL.{port}".format(**self._server.query))
        return server

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        doomed = False
        while True:
            ready, _, _ = select.select([client, server], [], [])
            if server in ready:
                data = server.recv(1 << 16)
                if doomed or not data:
                    return
                client.sendall(data)
            if client in ready:
                data = client.recv(1 << 16)
                if not data:
                    return
                if self._cut(data):
                    self.cuts += 1
                    if self._when == "before":
                        return
                    if self._when == "never":
                        select.select([server], [], [])
                        return
                    doomed = True
                server.sendall(data)


@contextmanager
def proxy(address: str, cut: Cut, *, when: str) -> Iterator[Proxy]:
    """A proxy to the database at `address`, until the end of the block."""
    made = Proxy(address, cut, when=when)
    try:
        yield made
    finally:
        made.close()


def some(share: float, holds: Cut, seed: int = 1) -> Cut:
    """Cut at a share of the pieces of which something holds, at random, the same ones in every run of a test."""
    rng = random.Random(seed)
    lock = threading.Lock()

    def cut(data: bytes) -> bool:
        if not holds(data):
            return False
        with lock:
            return rng.random() < share

    return cut
