"""PostgreSQL's own programs - psql, pg_dump, pg_restore - run against the database of the settings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embstore.db import embedded
from embstore.db.address import password_of, without_password
from embstore.db.engine import Database, driver_of, is_pooled
from embstore.errors import DatabaseError

SEARCH_PATH = "public, embstore"


@dataclass(frozen=True)
class Programs:
    """Where the programs are, and how they reach the database. The password is in the environment, never in argv."""

    folder: Path
    address: str
    environment: dict[str, str]

    def run(self, program: str, arguments: Sequence[str | Path], **options: Any) -> subprocess.Popen[bytes]:
        """Start a program on this database."""
        return subprocess.Popen(
            [self.folder / program, "--dbname", self.address, *arguments], env=self.environment, **options
        )


def programs(database: Database) -> Programs:
    """Find the programs that suit a database, which is connected to for this. Raises DatabaseError."""
    with database.begin() as connection:
        driver = driver_of(connection)
        encrypted, major = driver.info.ssl_in_use, driver.server_version // 10000
        pooled = is_pooled(connection)
    # The ones of the wheel know no TLS.
    folder = _system_folder(major) if encrypted else embedded.binary("psql").parent
    environment = os.environ | {"PGAPPNAME": "embstore"}
    if not pooled:  # PgBouncer takes no options; that path is what the owner and members find set anyway
        # Spaces are escaped, as libpq splits the options at them.
        path = SEARCH_PATH.replace(" ", "\\ ")
        environment["PGOPTIONS"] = f"{os.environ.get('PGOPTIONS', '')} -c search_path={path}".strip()
    if password := password_of(database.url):
        environment["PGPASSWORD"] = password
    return Programs(folder, without_password(database.url), environment)


def _system_folder(major: int) -> Path:
    """The folder of this machine's own programs, which must not be older than the server."""
    need = f"the connection is encrypted, and for that PostgreSQL's client programs, version {major} or later, must be"
    found = shutil.which("pg_dump")
    if found is None:
        raise DatabaseError(f"{need} on the PATH: install the package postgresql-client-{major}")
    said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"(\d+)", said)
    if version is None or int(version[1]) < major:
        raise DatabaseError(f"{need} on the PATH, where {found} is {said.strip()}: install postgresql-client-{major}")
    return Path(found).parent
