"""Datasets that somebody else may hold for long: whoever waits for one is told so, and can leave with Ctrl+C.

libpq sits a wait for a lock out, deaf to Ctrl+C; so a lock is asked for again and again, a second at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import psycopg2.errors
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from embstore.db.engine import set_local

_log = logging.getLogger(__name__)

_LOCK = "SELECT FROM embstore.dataset WHERE dataset_id = :dataset_id FOR UPDATE"
# A row that is locked has its locker's transaction as `xmax`; a stranger's session shows none of its own.
_HOLDER = """
SELECT d.name, a.pid, a.usename, extract(epoch FROM clock_timestamp() - a.xact_start)::integer AS seconds
FROM embstore.dataset d LEFT JOIN pg_stat_activity a ON a.backend_xid = d.xmax
WHERE d.dataset_id = :dataset_id
"""


def lock_dataset(connection: Connection, dataset_id: int) -> None:
    """Have a dataset's items to oneself until the transaction ends: nobody registers, imports or removes meanwhile."""
    values = {"dataset_id": dataset_id}

    def held() -> str:
        found = connection.execute(text(_HOLDER), values).one()
        by = (
            f"{found.usename}, process {found.pid} of the server, for {found.seconds} s" if found.pid else "another run"
        )
        return f"dataset '{found.name}' is being changed ({by})"

    run_when_free(connection, _LOCK, values, held)


def run_when_free(connection: Connection, statement: str, values: Mapping[str, Any], held: Callable[[], str]) -> None:
    """Run a statement as soon as what it locks is free; `held()` says what one waits for, if one has to."""
    before = connection.execute(text("SHOW lock_timeout")).scalar_one()
    told = False
    while True:
        try:
            with connection.begin_nested():
                set_local(connection, "lock_timeout", "1s")
                connection.execute(text(statement), values)
        except DBAPIError as error:
            if not isinstance(error.orig, psycopg2.errors.LockNotAvailable):
                raise
            if not told:
                _log.warning("%s: waiting for that to end; Ctrl+C leaves", held())
            told = True
        else:
            set_local(connection, "lock_timeout", before)
            return
