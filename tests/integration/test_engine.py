"""Connections that are cut, refused or used by many threads: what comes out, and how often the work was done."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg2
import pytest
from helpers import ask, at_once, fill, free_port, vectors_of
from sqlalchemy import Connection, Engine, create_engine, make_url, text
from sqlalchemy.engine import URL

from embstore import vectors
from embstore.db import embedded
from embstore.db.copy import copy_rows
from embstore.db.engine import Database, set_local
from embstore.db.home import Home
from embstore.errors import DatabaseError, DatabaseUnavailable, UsageError
from embstore.queue import take_lease
from embstore.settings import Settings

MOMENTS = ["before a statement", "before a COPY", "before the commit"]
PASSWORD = "s3cret wörd/%"


@pytest.fixture
def admin(server_home: Path) -> Iterator[Callable[[str], None]]:
    """Runs a statement as the server's owner, from outside the test's database."""
    address = make_url(embedded.url(server_home)).set(drivername="postgresql")
    with closing(psycopg2.connect(address.render_as_string(hide_password=False))) as connection:
        connection.autocommit = True

        def execute(statement: str) -> None:
            with connection.cursor() as cursor:
                cursor.execute(statement)

        yield execute


def cut(connection: Connection, admin: Callable[[str], None]) -> None:
    """End the session behind a connection, and wait until it is gone."""
    pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    admin(f"SELECT pg_terminate_backend({pid}, 10000)")


def go_on(connection: Connection, moment: str) -> None:
    """What a piece of work does when its session is gone, before its transaction ends."""
    if moment == "before a statement":
        connection.execute(text("SELECT 1"))
    elif moment == "before a COPY":
        keys = {
            name: np.ones(1, dtype) for name, dtype in (("dataset_id", "i4"), ("model_id", "i2"), ("item_id", "i8"))
        }
        copy_rows(connection, "embstore.embedding", {**keys, "embedding": vectors_of(1)})


def at_url(settings: Settings, url: URL) -> Database:
    return Database(replace(settings, database_url=url.render_as_string(hide_password=False)))


@pytest.mark.parametrize("moment", MOMENTS)
def test_work_that_is_cut_off_is_done_again_and_counts_once(
    database: Database, admin: Callable[[str], None], moment: str
) -> None:
    with database.begin() as connection:
        queue = fill(connection, 4)
        token = take_lease(connection)
        keys = queue.claim(connection, token, 4)
    runs = []

    def work(connection: Connection) -> str:
        runs.append(moment)
        vectors.write(connection, queue, token, keys[:2], vectors_of(2))
        if len(runs) == 1:
            cut(connection, admin)
            go_on(connection, moment)
        return "the answer"

    assert database.patiently(work) == "the answer"
    assert len(runs) == 2
    assert ask(database, "SELECT status, count(*) FROM embstore.extraction GROUP BY 1 ORDER BY 1") == [
        ("done", 2),
        ("running", 2),
    ]
    assert ask(database, "SELECT count(*) FROM embstore.embedding") == [(2,)]


@pytest.mark.parametrize("moment", MOMENTS)
def test_without_patience_a_cut_comes_out_in_one_line_and_the_pool_recovers(
    database: Database, admin: Callable[[str], None], moment: str
) -> None:
    def use() -> None:
        with database.begin() as connection:
            cut(connection, admin)
            go_on(connection, moment)

    with pytest.raises(
        DatabaseError, match=r"^(no database at|the database refused: terminating connection)"
    ) as caught:
        use()
    assert "\n" not in str(caught.value)
    [[pid]] = ask(database, "SELECT pg_backend_pid()")
    admin(f"SELECT pg_terminate_backend({pid}, 10000)")  # while it lies in the pool
    assert ask(database, "SELECT 1") == [(1,)]


def test_patience_waits_for_a_server_that_comes_back(database: Database, admin: Callable[[str], None]) -> None:
    name = ask(database, "SELECT current_database()")[0][0]
    runs = []

    def work(connection: Connection) -> int:
        runs.append(1)
        if len(runs) == 1:
            admin(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            threading.Timer(0.5, admin, [f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"]).start()
            cut(connection, admin)
        return int(connection.execute(text("SELECT 7")).scalar_one())

    assert database.patiently(work) == 7
    assert len(runs) == 2


def test_patience_ends(settings: Settings) -> None:
    nowhere = at_url(
        settings, URL.create("postgresql+psycopg2", "ann", host="127.0.0.1", port=free_port(), database="x")
    )
    with pytest.raises(DatabaseUnavailable):
        nowhere.patiently(lambda _: None, patience=0.3)


def test_a_deadlock_is_tried_again(database: Database) -> None:
    with database.begin() as connection:
        connection.execute(text("CREATE TABLE counter AS SELECT n, 0 AS value FROM generate_series(1, 2) n"))
    both_hold_one = threading.Barrier(2)
    runs: list[int] = []

    def add(first: int, second: int) -> None:
        tried: list[bool] = []

        def work(connection: Connection) -> None:
            runs.append(first)
            set_local(connection, "deadlock_timeout", "20ms")
            connection.execute(text("UPDATE counter SET value = value + 1 WHERE n = :n"), {"n": first})
            if not tried:
                tried.append(True)
                both_hold_one.wait()
            connection.execute(text("UPDATE counter SET value = value + 1 WHERE n = :n"), {"n": second})

        database.patiently(work)

    at_once(lambda: add(1, 2), lambda: add(2, 1))
    assert len(runs) == 3
    assert ask(database, "SELECT n, value FROM counter ORDER BY n") == [(1, 2), (2, 2)]


def test_errors_that_waiting_does_not_mend_come_out_at_once(database: Database) -> None:
    runs = []

    def wrong(connection: Connection) -> None:
        runs.append("wrong")
        connection.execute(text("SELECT 1 / 0"))

    def ours(connection: Connection) -> None:
        runs.append("ours")
        connection.execute(text("CREATE TABLE unwanted ()"))
        raise UsageError("no dataset 'x'")

    with pytest.raises(DatabaseError, match=r"^the database refused: division by zero$"):
        database.patiently(wrong)
    with pytest.raises(UsageError, match=r"^no dataset 'x'$"):
        database.patiently(ours)
    assert runs == ["wrong", "ours"]
    assert ask(database, "SELECT to_regclass('unwanted')") == [(None,)]
    with pytest.raises(DatabaseError, match=r"^permission denied for schema embstore: ask the owner"):
        ask(database, "SET LOCAL ROLE pg_monitor; SELECT FROM embstore.dataset")


@contextmanager
def passwords_asked_for(server_home: Path, database: str, admin: Callable[[str], None]) -> Iterator[None]:
    """Let the server ask for a password at one database, where else its socket's folder is enough."""
    rules = Home.at(server_home).data / "pg_hba.conf"
    before = rules.read_text()
    try:
        rules.write_text(f"local {database} all scram-sha-256\n{before}")
        admin("SELECT pg_reload_conf()")
        yield
    finally:
        rules.write_text(before)
        admin("SELECT pg_reload_conf()")


def refusal_of(settings: Settings, url: URL) -> DatabaseUnavailable:
    database = at_url(settings, url)
    with pytest.raises(DatabaseUnavailable) as caught, database.begin():
        pass
    whole = "".join(traceback.format_exception(caught.value)) + str(database)
    for secret in (PASSWORD, str(url.set(host=None)).partition("@")[0], "s3cret"):
        assert secret not in whole
    assert "\n" not in str(caught.value)
    assert "check DATABASE_URL" in str(caught.value)
    assert caught.value.exit_code == 3
    return caught.value


def test_a_server_that_is_not_there_or_refuses_is_named_without_the_password(
    settings: Settings, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited"))
    good = make_url(database_url).set(password=PASSWORD)
    port = free_port()
    closed = refusal_of(settings, good.set(host="127.0.0.1", port=port, query={}))
    assert f"@127.0.0.1:{port}/" in str(closed)
    assert "Connection refused" in str(closed)
    assert "/nowhere" in str(refusal_of(settings, good.set(query={"host": "/nowhere"})))
    assert 'database "missing" does not exist' in str(refusal_of(settings, good.set(database="missing")))
    assert 'role "nobody-here" does not exist' in str(refusal_of(settings, good.set(username="nobody-here")))


def test_a_wrong_password_is_not_shown(
    settings: Settings, database_url: str, server_home: Path, admin: Callable[[str], None]
) -> None:
    good = make_url(database_url).set(password=PASSWORD)
    assert good.database is not None
    with passwords_asked_for(server_home, good.database, admin):
        while True:  # the server reads its rules again a moment after it is told to
            try:
                ask(at_url(settings, good), "SELECT 1")
            except DatabaseUnavailable:
                break
        assert "password authentication failed" in str(refusal_of(settings, good))
        refused = refusal_of(settings, good.set(password=None, query=dict(good.query) | {"password": PASSWORD}))
        assert "password authentication failed" in str(refused)
        database = at_url(settings, good)
        with pytest.raises(DatabaseUnavailable, match="password authentication failed"):
            database.patiently(lambda _: None, patience=3600)  # would wait an hour for a server that went away


def test_many_threads_use_no_more_connections_than_the_pool_has(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*args: Any, **more: Any) -> Engine:
        time.sleep(0.1)  # the very first use is everybody's at once, too
        return create_engine(*args, **more)

    monkeypatch.setattr("embstore.db.engine.create_engine", slowly)
    database = Database(settings, pool_size=3)
    ours = "backend_type = 'client backend'"  # and not autovacuum's
    sessions = f"SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND {ours}"

    def work() -> int:
        most = 0
        for _ in range(5):
            with database.begin() as connection:
                connection.execute(text("SELECT pg_sleep(0.01)"))
                most = max(most, connection.execute(text(sessions)).scalar_one())
        return most

    assert max(at_once(*[work] * 10)) <= 3
    database.close()
