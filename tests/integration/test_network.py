"""Who gets to the embedded server: over the network with a password alone, by the socket only its owner and root."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import psycopg2
import pytest
from helpers import free_port, own_home

from embstore import members
from embstore.db import embedded, migrate, network
from embstore.db.engine import Database
from embstore.db.home import Home
from embstore.errors import DatabaseUnavailable, UsageError
from embstore.settings import Settings

PASSWORD = "s3cret wörd/%"
STRANGER = 61_234
"""A user id that nobody has: neither the server's account nor, under root, `nobody`, which that is."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

# Everything is imported first, as that user may be unable to enter the folder of the packages.
AS_STRANGER = """
import os, sys
import psycopg2, sqlalchemy.dialects.postgresql.psycopg2, embstore.cli.database, embstore.cli.query
from embstore.cli.main import embstore
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """The home of a server with the login ann, who has a password."""
    with own_home() as home:
        database = Database(Settings(home=home))
        migrate.upgrade(database)
        with database.begin() as connection:
            members.create_team(connection, "phonetics")
            verifier = members.verifier(connection, PASSWORD, "ann")
            members.add_member(connection, "phonetics", "ann", "reader", verifier=verifier)
        database.close()
        yield home


@pytest.fixture
def address(home: Path) -> Iterator[network.Address]:
    """Where it listens until the end of the test."""
    address = network.Address("127.0.0.1", free_port())
    embedded.listen(home, address, force=True)
    yield address
    embedded.listen(home, None, force=True)


def enters(address: network.Address, **given: str) -> str:
    """Connect by TCP; who one is then, or why not."""
    try:
        with (
            closing(psycopg2.connect(host=address.host, port=address.port, dbname="embstore", **given)) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("SELECT current_user")
            (name,) = cursor.fetchone() or ("",)
            return str(name)
    except psycopg2.OperationalError as error:
        return str(error)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:5433", "127.0.0.1:5433"),
        (" 5433\n", "127.0.0.1:5433"),
        (":5433", "127.0.0.1:5433"),
        ("localhost:1024", "localhost:1024"),
        ("[::1]:65535", "[::1]:65535"),
        ("0.0.0.0:5433", "0.0.0.0:5433"),
    ],
)
def test_addresses(text: str, address: str) -> None:
    found = network.parse(text)
    assert (str(found), network.parse(str(found))) == (address, found)
    assert found.is_loopback is (address != "0.0.0.0:5433")
    assert found.url.endswith(f"{address.replace('0.0.0.0', '127.0.0.1')}/embstore")


@pytest.mark.parametrize(
    "text", ["", "on", "80", "65536", "127.0.0.1", "1.2.3:5433", "example.org:5433", "*:5433", "x' y:5433", "::1:٥٤٣٣"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="is no address to listen on: write HOST:PORT"):
        network.parse(text)


def test_no_password_no_entry(home: Path, address: network.Address) -> None:
    assert enters(address, user="ann", password=PASSWORD) == "ann"
    assert "no password supplied" in enters(address, user="ann")
    assert 'password authentication failed for user "ann"' in enters(address, user="ann", password="wrong")
    assert "password" in enters(address, user="embstore")  # the owner has none
    assert "authentication failed" in enters(address, user="embstore", password="embstore")
    assert "authentication failed" in enters(address, user="nosuch", password=PASSWORD)
    refused = enters(address, user="ann", password=PASSWORD, replication="true")
    assert "pg_hba.conf rejects replication" in refused
    ports = psutil.Process(embedded.status(home).pid).net_connections("inet")
    assert [(c.laddr.ip, c.laddr.port) for c in ports if c.status == psutil.CONN_LISTEN] == [
        ("127.0.0.1", address.port)
    ]


def test_a_rule_that_trusts_the_network_is_not_reached(home: Path, address: network.Address) -> None:
    rules = Home.at(home).data / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text(f"host all all all trust\n{before}")
    try:
        embedded.listen(home, None, force=True)
        embedded.listen(home, address, force=True)
        assert "no password supplied" in enters(address, user="ann")
        assert enters(address, user="ann", password=PASSWORD) == "ann"
    finally:
        rules.write_text(before)


def test_it_is_remembered_until_it_is_taken_back(home: Path, address: network.Address) -> None:
    assert embedded.status(home).listens == str(address)
    assert embedded.stop(home, force=True)
    assert network.recall(Home.at(home)) == address
    embedded.ensure_running(home)
    assert enters(address, user="ann", password=PASSWORD) == "ann"
    embedded.listen(home, None, force=True)
    assert (embedded.status(home).listens, network.recall(Home.at(home))) == (None, None)
    assert "Connection refused" in enters(address, user="ann", password=PASSWORD)


def test_a_server_that_is_in_use_is_not_started_anew_without_force(home: Path, address: network.Address) -> None:
    other = psycopg2.connect(host=address.host, port=address.port, dbname="embstore", user="ann", password=PASSWORD)
    elsewhere = network.Address("127.0.0.1", free_port())
    with pytest.raises(UsageError, match=r"database sessions? (is|are) open"):
        embedded.listen(home, elsewhere)
    assert (embedded.status(home).listens, network.recall(Home.at(home))) == (str(address), address)
    embedded.listen(home, elsewhere, force=True)
    assert enters(elsewhere, user="ann", password=PASSWORD) == "ann"
    other.close()


def test_a_port_that_another_program_has(home: Path, address: network.Address) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = network.Address("127.0.0.1", other.getsockname()[1])
        with pytest.raises(UsageError, match=f"cannot listen on {taken}: Address already in use; choose another"):
            embedded.listen(home, taken, force=True)
        assert embedded.status(home).listens == str(address)
        embedded.stop(home, force=True)
        network.remember(Home.at(home), taken)
        with pytest.raises(DatabaseUnavailable, match=f"'embstore db up --listen off' ends that it listens on {taken}"):
            embedded.ensure_running(home)
        embedded.listen(home, None)
    assert embedded.status(home).running


def stranger(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run code as another user of the machine."""
    command = [sys.executable, "-c", AS_STRANGER + code, str(STRANGER), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


@needs_root
def test_another_user_of_the_machine_gets_neither_to_the_socket_nor_to_the_data(home: Path) -> None:
    embedded.ensure_running(home)
    place = Home.at(home)
    for folder in (place.data, place.socket):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.stat().st_uid not in (0, STRANGER)
    for file in (place.log, place.users_lock, place.server_lock, place.alive_lock, place.keeper_lock):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    looks = "for path in sys.argv[2:]:\n try: print(os.listdir(path))\n except OSError as e: print(e.strerror)"
    assert stranger(looks, str(place.data), str(place.socket)).stdout == "Permission denied\n" * 2
    connects = "psycopg2.connect(host=sys.argv[2], user='embstore', dbname='embstore')"
    assert "Permission denied" in stranger(connects, str(place.socket)).stderr
    assert stranger(looks, "/").stdout.startswith("['")  # it is not the stranger who fails at everything


@needs_root
@pytest.mark.parametrize("words", [("db", "url"), ("db", "status"), ("db", "down", "--force"), ("status",)])
def test_another_user_of_the_machine_is_told_so_in_one_line(home: Path, words: tuple[str, ...]) -> None:
    embedded.ensure_running(home)
    typed = stranger("embstore(sys.argv[2:])", *words, "--home", str(home))
    assert (typed.returncode, typed.stdout, typed.stderr.count("\n")) == (2, "", 1), typed.stderr
    assert "set EMBSTORE_HOME to a folder of yours" in typed.stderr
    assert embedded.status(home).running


@needs_root
def test_a_home_behind_a_closed_folder_is_nobody_else_s(home: Path) -> None:
    closed = home.with_name("closed")
    closed.mkdir(mode=0o700)
    for words in (("db", "status"), ("db", "up"), ("status",)):
        typed = stranger("embstore(sys.argv[2:])", *words, "--home", str(closed / "home"))
        said = f"error: cannot get to {closed}/home: Permission denied; set EMBSTORE_HOME to a folder of yours\n"
        assert (typed.returncode, typed.stderr) == (2, said)


def test_links_in_a_circle_lead_to_no_home(tmp_path: Path) -> None:
    for link, target in (("a", "b"), ("b", "a")):
        (tmp_path / link).symlink_to(target)
    with pytest.raises(UsageError, match=r"(?i)links.*; .*set EMBSTORE_HOME to a folder of yours$"):
        embedded.ensure_running(tmp_path / "a" / "home")


def test_the_command_line(home: Path, typed: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    port = free_port()
    refused = typed("db", "up", "--listen", f"0.0.0.0:{port}")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "the embedded server knows no TLS" in refused.stderr
    assert "network     none: its socket alone\n" in typed("db", "status").stdout
    up = typed("db", "up", "--listen", str(port), "--force")
    assert f"with passwords and without TLS: postgresql://LOGIN@127.0.0.1:{port}/embstore\n" in up.stdout, up.stderr
    assert f"network     listens on 127.0.0.1:{port}, with passwords" in typed("db", "status").stdout
    url = f"postgresql://ann@127.0.0.1:{port}/embstore"
    assert typed("whoami", DATABASE_URL=url).returncode == 3
    who = typed("whoami", DATABASE_URL=url, PGPASSWORD=PASSWORD)
    assert "reader: reads what its teams may read" in who.stdout, who.stderr
    everywhere = typed("db", "up", "--listen", f"0.0.0.0:{port}", "--unencrypted", "--force")
    assert everywhere.returncode == 0, everywhere.stderr
    assert typed("whoami", DATABASE_URL=url).returncode == 3
    assert typed("db", "up", "--listen", "off", "--force").returncode == 0
    assert "network     none: its socket alone\n" in typed("db", "status").stdout


@pytest.fixture
def typed(home: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Type a command as the owner of the home."""

    def typed(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "embstore", *words]
        environment = os.environ | {"EMBSTORE_HOME": str(home)} | env
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return typed
