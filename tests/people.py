"""Teams and logins on the test's server, and a way to connect as one."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from psycopg2 import sql
from sqlalchemy import make_url

from embstore import members
from embstore.db.engine import Database
from embstore.db.home import Home
from embstore.settings import Settings

_numbers = itertools.count(1)

PASSWORD = "s3cret wörd/%"


class People:
    """Makes teams and logins. Their names are this test's own, as roles belong to the server and not to a database."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._suffix = f"_{os.getpid()}_{next(_numbers)}"
        self._roles: list[str] = []
        self._opened: list[Database] = []

    def name(self, short: str) -> str:
        """The name of a role, which is dropped in the end."""
        name = short + self._suffix
        if name not in self._roles:
            self._roles.append(name)
        return name

    def team(self, short: str) -> str:
        """Make a team; returns its name."""
        name = self.name(short)
        with self._database.begin() as connection:
            members.create_team(connection, name)
        return name

    def login(self, short: str, team: str | None = None, kind: Literal["reader", "writer"] = "writer") -> str:
        """Make a login, in a team or in none; returns its name."""
        name = self.name(short)
        if team is None:
            self.execute("CREATE ROLE {} LOGIN", name)
        else:
            with self._database.begin() as connection:
                members.add_member(connection, team, name, kind)
        return name

    def address(self, login: str, password: str | None = None) -> str:
        """Where a login connects to: by the Unix socket, which needs no password unless `asked_for_passwords`."""
        assert self._settings.database_url is not None
        url = make_url(self._settings.database_url).set(username=login, password=password)
        return url.render_as_string(hide_password=False)

    def connect(self, login: str, pool_size: int = 2, password: str | None = None) -> Database:
        """The database, as a login sees it."""
        database = Database(replace(self._settings, database_url=self.address(login, password)), pool_size=pool_size)
        self._opened.append(database)
        return database

    def settings(self, login: str) -> Settings:
        """Settings by which a command connects as a login."""
        return replace(self._settings, database_url=self.address(login))

    def execute(self, statement: str, *names: str) -> None:
        """Run a statement as the superuser; names go in the place of the braces, quoted."""
        with self._database.begin() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            with driver.cursor() as cursor:
                cursor.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def leave(self) -> None:
        """Close what was opened, and drop the roles."""
        for database in self._opened:
            database.close()
        with self._database.begin() as connection:
            there = "SELECT rolname FROM pg_roles WHERE rolname = ANY (%s)"
            names = connection.exec_driver_sql(there, (self._roles,)).scalars().all()
        for name in names:
            self.execute("DROP OWNED BY {} CASCADE", name)
        for name in names:
            self.execute("DROP ROLE {}", name)


@contextmanager
def people_of(database: Database, settings: Settings) -> Iterator[People]:
    """Teams and logins that are gone in the end."""
    people = People(database, settings)
    try:
        yield people
    finally:
        people.leave()


@contextmanager
def asked_for_passwords(home: Path, database: Database, role: str) -> Iterator[None]:
    """Have the server of `home` ask the members of `role` for their passwords, in this database."""
    rules = Home.at(home).data / "pg_hba.conf"
    before = rules.read_text()

    def tell(text: str) -> None:
        rules.write_text(text)
        with database.begin() as connection:
            loaded = "SELECT pg_conf_load_time()"
            then = connection.exec_driver_sql(loaded).scalar_one()
            connection.exec_driver_sql("SELECT pg_reload_conf()")
            connection.exec_driver_sql("COMMIT")
            while connection.exec_driver_sql(loaded).scalar_one() == then:
                time.sleep(0.01)

    tell(f'local "{database.url.database}" +{role} scram-sha-256\n{before}')
    try:
        yield
    finally:
        tell(before)
