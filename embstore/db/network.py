"""Where an embedded server listens beside its socket: at an address that its home remembers; by default nowhere.

Whoever comes that way needs a login with a password, from this machine too. The server that comes with embstore knows
no TLS, so an address that other machines reach is taken only when somebody says that this is meant.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from dataclasses import dataclass

from embstore.db.home import DATABASE, Account, Home
from embstore.errors import UsageError

EXAMPLE = "127.0.0.1:5433"
_LOWEST, _HIGHEST = 1024, 65535
_RULES = "listen_hba.conf"

# The first rule that fits decides: so no rule of pg_hba.conf lets anybody in from a network without a password. For
# the socket, whose folder is closed to others, that file is asked.
_PASSWORDS = """\
# Written by `embstore db up --listen` each time the server starts.
host  all          all  all  scram-sha-256
host  replication  all  all  reject
include pg_hba.conf
"""


@dataclass(frozen=True, slots=True)
class Address:
    """A host of this machine, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether no other machine reaches it."""
        return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback

    @property
    def url(self) -> str:
        """What a login connects to; of a server that listens everywhere, on this machine."""
        everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        return f"postgresql://LOGIN@{Address(everywhere.get(self.host, self.host), self.port)}/{DATABASE}"


def parse(text: str) -> Address:
    """`HOST:PORT`, with an IP address or localhost for HOST, or `PORT` for one on the loopback. Raises UsageError."""
    host, _, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    try:
        if host != "localhost":
            host = str(ipaddress.ip_address(host))
        number = int(port) if port.isascii() and port.isdigit() and len(port) < 6 else 0
        if not _LOWEST <= number <= _HIGHEST:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"'{text}' is no address to listen on: write HOST:PORT, as {EXAMPLE}, with an IP address of this machine "
            f"and a port from {_LOWEST} to {_HIGHEST}; or off"
        ) from None
    return Address(host, number)


def check_free(address: Address) -> None:
    """Raise UsageError unless a program could listen there."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        socket.create_server((address.host, address.port), family=family).close()
    except OSError as error:
        raise UsageError(f"cannot listen on {address}: {os.strerror(error.errno or 0)}; choose another one") from None


def recall(home: Home) -> Address | None:
    """The address that the server of this home listens on from its next start on; None: no network."""
    try:
        return parse(home.listen.read_text())
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise UsageError(f"cannot read {home.listen}: {error.strerror}; run embstore as its owner") from None


def remember(home: Home, address: Address | None) -> None:
    """Have the server listen there from its next start on."""
    if address is None:
        home.listen.unlink(missing_ok=True)
        return
    descriptor = home.open(home.listen, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(descriptor, f"{address}\n".encode())
    finally:
        os.close(descriptor)


def write_rules(home: Home, account: Account) -> None:
    """Write who is let in from the network, for the server to read when it starts."""
    path = home.data / _RULES
    with suppress(FileNotFoundError):
        path.unlink()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, _PASSWORDS.encode())
        if os.geteuid() == 0:
            os.fchown(descriptor, account.uid, account.gid)
    finally:
        os.close(descriptor)


def arguments(home: Home, address: Address) -> list[str]:
    """What tells the server to listen there."""
    return [
        *("-c", f"listen_addresses={address.host}", "-c", f"port={address.port}"),
        *("-c", f"hba_file={home.data / _RULES}", "-c", "password_encryption=scram-sha-256"),
    ]
