"""Ctrl+C that reaches the server: without it libpq sits a query out, and a notebook hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import psycopg2
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

T = TypeVar("T")


def cancellable(connection: Connection, work: Callable[[], T]) -> T:
    """Run `work`, which waits for the server on this connection; Ctrl+C ends its query there, and is raised here.

    In a thread, and not by psycopg2's callback for waiting, which is one for all connections of a process and knows no
    COPY: other threads may be in the middle of one.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()  # no Ctrl+C comes here
    with ThreadPoolExecutor(1, thread_name_prefix="query") as threads:
        result = threads.submit(work)
        try:
            return result.result()
        except KeyboardInterrupt:
            with suppress(psycopg2.Error):
                connection.connection.driver_connection.cancel()  # type: ignore[union-attr]
            with suppress(psycopg2.Error, DBAPIError):
                result.result()
            raise
