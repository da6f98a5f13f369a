"""`sslmode` in DATABASE_URL: who the server is gets checked, and what is wrong is said in one line.

The embedded server knows no TLS. So a front that does stands before it, and passes on what it has decrypted; what
connects, checks the certificate and reports is libpq as embstore uses it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from sqlalchemy import URL, make_url

from embstore.db.engine import Database
from embstore.errors import DatabaseUnavailable
from embstore.settings import load

_SSL_REQUEST = bytes.fromhex("0000000804d2162f")
_LENGTH = 8


class Front:
    """Listens on the loopback, with TLS, if it has a certificate; forwards to the Unix socket of a server."""

    def __init__(self, server: str, certificate: trustme.LeafCert | None) -> None:
        self._server = server
        self._context: ssl.SSLContext | None = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(self._context)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError), plain, socket.socket(socket.AF_UNIX) as server:  # SSLError is an OSError
            server.connect(self._server)
            client = self._secured(plain)
            while True:
                waiting = isinstance(client, ssl.SSLSocket) and client.pending()
                ready = [client] if waiting else select.select([client, server], [], [])[0]
                for one, other in ((client, server), (server, client)):
                    if one in ready:
                        data = one.recv(1 << 16)
                        if not data:
                            return
                        other.sendall(data)

    def _secured(self, client: socket.socket) -> socket.socket:
        """Answer the request for TLS that a client begins with, unless it wants none."""
        if client.recv(_LENGTH, socket.MSG_PEEK) != _SSL_REQUEST:
            return client
        client.recv(_LENGTH)
        client.sendall(b"N" if self._context is None else b"S")
        return client if self._context is None else self._context.wrap_socket(client, server_side=True)


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[trustme.CA, Path]]:
    """The authority that everybody trusts here, and one that nobody does; with a file of its certificate each."""
    folder = tmp_path_factory.mktemp("authorities")
    made = {name: (trustme.CA(organization_name=name), folder / f"{name}.pem") for name in ("right", "wrong")}
    for authority, file in made.values():
        authority.cert_pem.write_to_path(str(file))
    return made


@pytest.fixture(params=[])
def front(
    request: pytest.FixtureRequest, database_url: str, authorities: dict[str, tuple[trustme.CA, Path]]
) -> Iterator[URL]:
    """Where the test's database is reached through a front whose certificate names this host; None: without TLS."""
    url, names = make_url(database_url), request.param
    certificate = authorities["right"][0].issue_cert(names) if names else None
    front = Front("{host}/.s.PGSQL.{port}".format(**url.query), certificate)
    yield url.set(host="localhost", port=front.port, query={})
    front.close()


def at(front: URL, **query: str) -> Database:
    return Database(load(database_url=front.set(query=query).render_as_string(hide_password=False)))


def is_encrypted(database: Database) -> bool:
    with database.begin() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        return bool(driver.info.ssl_in_use)


def refusal(database: Database) -> str:
    """How it is refused, in one line; a job at work does not wait for it to change."""
    with pytest.raises(DatabaseUnavailable) as caught, database.begin():
        pass
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    with pytest.raises(DatabaseUnavailable):
        database.patiently(lambda _: None, patience=3600)
    return str(caught.value)


@pytest.mark.parametrize("front", ["localhost"], indirect=True)
def test_a_server_that_is_the_one_it_says(front: URL, authorities: dict[str, tuple[trustme.CA, Path]]) -> None:
    right, wrong = (str(authorities[name][1]) for name in ("right", "wrong"))
    assert is_encrypted(at(front, sslmode="verify-full", sslrootcert=right))
    assert is_encrypted(at(front, sslmode="require"))
    assert is_encrypted(at(front))  # as libpq does where nothing is said: encrypt, and trust anybody
    assert not is_encrypted(at(front, sslmode="disable"))
    for mode in ("verify-full", "verify-ca"):
        refused = refusal(at(front, sslmode=mode, sslrootcert=wrong))
        assert "certificate verify failed" in refused
    missing = refusal(at(front, sslmode="verify-full", sslrootcert="/nowhere/ca.pem"))
    assert 'root certificate file "/nowhere/ca.pem" does not exist' in missing


@pytest.mark.parametrize("front", ["db.example.org"], indirect=True)
def test_a_certificate_for_another_name(front: URL, authorities: dict[str, tuple[trustme.CA, Path]]) -> None:
    right = str(authorities["right"][1])
    refused = refusal(at(front, sslmode="verify-full", sslrootcert=right))
    assert 'server certificate for "db.example.org" does not match host name "localhost"' in refused
    assert is_encrypted(at(front, sslmode="verify-ca", sslrootcert=right))


@pytest.mark.parametrize("front", [None], indirect=True)
def test_a_server_without_tls(front: URL) -> None:
    assert "server does not support SSL, but SSL was required" in refusal(at(front, sslmode="require"))
    assert not is_encrypted(at(front))
