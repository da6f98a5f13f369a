"""The job queue: rows with a status column, claimed under a lease.

    pending --claim--> running --finish--> done
       ^                  |  \\--refuse--> failed | skipped     with a reason code
       |--release---------/   \\--rescue--> running, by another worker, when the lease has run out

A worker process takes one *lease* and renews it while it lives; every row that it claims carries the lease's token.
Whatever it writes later is *fenced* by that token: a row that somebody else has claimed since is not touched.

Works on any table with the queue columns of `embstore.db.schema` and an integer key. A *scope* is a set of values for
the columns before that key: one dataset and one model, for extraction.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, TextClause, text

from embstore.errors import LeaseLost
from embstore.words import plural

LEASE_SECONDS = float(os.environ.get("EMBSTORE_TEST_LEASE_SECONDS", 30))
"""How long a worker that went silent keeps its rows. By the server's clock alone: those of workers may be wrong."""
MAX_ATTEMPTS = 3
"""An item that was being worked on when its worker died, this many times, has killed it: it is set aside."""
SUSPECT_GROUP = 16
"""How many rows of a dead worker are tried together, before each is tried alone."""

Scope = Mapping[str, int]

_TAKE_LEASE = """
WITH forgotten AS (DELETE FROM embstore.lease WHERE expires_at < clock_timestamp() - interval '1 day')
INSERT INTO embstore.lease (worker, expires_at) VALUES (:worker, clock_timestamp() + make_interval(secs => :seconds))
RETURNING token
"""
_RENEW_LEASE = """
UPDATE embstore.lease SET expires_at = clock_timestamp() + make_interval(secs => :seconds) WHERE token = :token
"""

# A worker that is stopped in mid-transaction holds the locks of its rows, and nobody could rescue them: the server ends
# its session. For one transaction, as other sessions may share the connection (PgBouncer); sent together with what
# changes rows, for which it costs nothing.
_LIMIT = f"SET LOCAL idle_in_transaction_session_timeout = {round(1000 * LEASE_SECONDS)}; "

# SKIP LOCKED lets workers claim side by side. The keyset (key > :after) keeps a claim cheap while an old snapshot, a
# backup say, keeps the index entries of claimed rows alive: without it each claim would wade through all of them.
# ARRAY(…) and not IN (…): the planner may run a subquery's LIMIT more than once. And it must not believe in statistics
# of a time when hardly a row was pending, and read and sort all of them for each claim.
_CLAIM = """
SET LOCAL enable_sort = off;
UPDATE {table} SET status = 'running', attempts = attempts + 1, claim_token = :token
WHERE {scope} AND {key} = ANY (ARRAY(
    SELECT {key} FROM {table} WHERE {scope} AND status = 'pending' AND {key} > :after
    ORDER BY {key} LIMIT :limit FOR UPDATE SKIP LOCKED))
RETURNING {key} AS key
"""

# A function, as nobody sees another role's leases: it answers for those whose tokens stand in rows that one may see.
_ABANDONED = "{scope} AND status = 'running' AND NOT embstore.is_alive(claim_token)"

_RESCUE = """
UPDATE {table} SET attempts = attempts + 1, claim_token = :token
WHERE {scope} AND {key} = ANY (ARRAY(
    SELECT {key} FROM {table} WHERE {abandoned} AND attempts = :attempts
    ORDER BY {key} LIMIT :limit FOR UPDATE SKIP LOCKED))
RETURNING {key} AS key
"""

_QUARANTINE = """
UPDATE {table} SET status = 'failed', error_code = 'worker_died', finished_at = clock_timestamp(),
    error = 'its worker process died, or hung, each of the ' || attempts || ' times that it was being worked on'
WHERE {scope} AND {key} = ANY (ARRAY(
    SELECT {key} FROM {table} WHERE {abandoned} AND attempts >= :attempts FOR UPDATE SKIP LOCKED))
RETURNING {key} AS key
"""

# Rows that a worker holds locked whose lease has run out: stopped in the middle of a COPY, say, where no time limit of
# the server's reaches. Younger transactions are those of others who are just rescuing the rows; and one may end the
# sessions of one's own role alone.
_EVICT = """
SELECT pg_terminate_backend(l.pid) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'transactionid' AND l.granted AND a.usename = current_user
    AND a.xact_start < clock_timestamp() - make_interval(secs => :seconds)
    AND l.transactionid = ANY (ARRAY(SELECT xmax FROM {table} WHERE {abandoned}))
"""

# Without RETURNING, and with the keys as one literal instead of an expression for each, it takes 0.7 of the time.
# Nobody waits for the disk: what a crash of the server takes back is done again, as the result and its status go
# together, and the commit that notes the end of the run waits for all before it.
_FINISH = """
SET LOCAL synchronous_commit = off;
UPDATE {table} SET status = 'done', finished_at = clock_timestamp()
WHERE {scope} AND {key} = ANY (CAST(:keys AS bigint[])) AND status = 'running' AND claim_token = :token
"""
_FINISHED_BEFORE = """
SELECT {key} AS key FROM {table} WHERE {scope} AND {key} = ANY (CAST(:keys AS bigint[])) AND status = 'done'
    AND claim_token = :token AND xmin <> pg_current_xact_id()::xid
"""

_REFUSE = """
UPDATE {table} q SET status = r.status, error_code = r.code, error = r.error, finished_at = clock_timestamp()
FROM unnest(CAST(:keys AS bigint[]), CAST(:statuses AS text[]), CAST(:codes AS text[]), CAST(:errors AS text[]))
    AS r (key, status, code, error)
WHERE {scope} AND q.{key} = r.key AND q.status = 'running' AND q.claim_token = :token
"""

# With no attempts, even after a rescue: a row that is claimed among many again must not be one death from quarantine.
_RELEASE = """
UPDATE {table} SET status = 'pending', attempts = 0, claim_token = NULL
WHERE {scope} AND status = 'running' AND claim_token = :token
"""

# One index for each: `IN` would be planned as a look at every row.
_OPEN = """
SELECT EXISTS (SELECT FROM {table} WHERE {scope} AND status = 'pending')
    OR EXISTS (SELECT FROM {table} WHERE {scope} AND status = 'running')
"""

_REMAINING = """
SELECT count(*) FILTER (WHERE status = 'pending') + count(*) FILTER (WHERE status = 'running')
FROM {table} WHERE {scope} AND status IN ('pending', 'running')
"""
_COUNTS = "SELECT status, count(*) FROM {table} WHERE {scope} GROUP BY status"

_RETRY = """
UPDATE {table} SET status = 'pending', attempts = 0, claim_token = NULL, error_code = NULL, error = NULL,
    finished_at = NULL
WHERE {scope} AND status = ANY (:statuses) AND (CAST(:codes AS text[]) IS NULL OR error_code = ANY (:codes))
"""


_QUEUES = {
    "extract": "embstore.extraction",
    "centroids": "embstore.centroid",
    "boundaries": "embstore.boundary_run",
}
_AT_WORK = """
SELECT EXISTS (SELECT FROM {table} WHERE {scope} AND status = 'running' AND embstore.is_alive(claim_token))
"""


@dataclass(frozen=True)
class Refusal:
    """Why a row ends without a result."""

    key: int
    status: str
    code: str
    error: str


def take_lease(connection: Connection, seconds: float = LEASE_SECONDS) -> int:
    """Register this process as a worker; returns the token that fences its writes."""
    worker = f"{socket.gethostname()}:{os.getpid()}"
    return int(connection.execute(text(_TAKE_LEASE), {"worker": worker, "seconds": seconds}).scalar_one())


def renew_lease(connection: Connection, token: int, seconds: float = LEASE_SECONDS) -> None:
    """Push the lease's end into the future. Raises LeaseLost if somebody has ended it."""
    if connection.execute(text(_RENEW_LEASE), {"token": token, "seconds": seconds}).rowcount == 0:
        raise LeaseLost(f"lease {token} was ended from outside: this worker stops, another one goes on")


def end_lease(connection: Connection, token: int) -> None:
    """End a lease, one's own or a dead worker's: what it still has claimed can be rescued at once."""
    connection.execute(text("DELETE FROM embstore.lease WHERE token = :token"), {"token": token})


def at_work(connection: Connection, scope: Scope) -> list[str]:
    """The commands whose workers are at a row of these datasets and models now; rows of dead ones do not count."""
    condition = " AND ".join(f"{name} = :{name}" for name in scope)
    return [
        command
        for command, table in _QUEUES.items()
        if connection.execute(text(_AT_WORK.format(table=table, scope=condition)), scope).scalar_one()
    ]


class Queue:
    """The rows of one queue table that lie in `scope`. Every method runs in the caller's transaction."""

    def __init__(self, table: str, key: str, scope: Scope) -> None:
        self.scope = dict(scope)
        names = {"table": table, "key": key, "scope": " AND ".join(f"{name} = :{name}" for name in scope)}
        names["abandoned"] = _ABANDONED.format(**names)
        self._names = names
        self._statements: dict[str, TextClause] = {}

    def claim(self, connection: Connection, token: int, limit: int, after: int = 0) -> list[int]:
        """Claim up to `limit` pending rows with keys above `after`, in the order of the keys."""
        return self._keys(connection, _CLAIM, token=token, limit=limit, after=after)

    def rescue(self, connection: Connection, token: int) -> tuple[list[int], int]:
        """Take over rows whose lease has run out: (keys, number of rows that were set aside as killers of workers).

        One of the rows may be what killed the worker. So they come in small groups, then one by one, and the caller
        must work on nothing else meanwhile: only then does a row's number of attempts tell killer from bystander.
        Where there are none, sessions that keep such rows locked are ended, for the next call.
        """
        quarantined = self._keys(connection, _QUARANTINE, attempts=MAX_ATTEMPTS)
        for attempts in range(MAX_ATTEMPTS):
            limit = SUSPECT_GROUP if attempts < MAX_ATTEMPTS - 1 else 1
            keys = self._keys(connection, _RESCUE, token=token, attempts=attempts, limit=limit)
            if keys:
                return keys, len(quarantined)
        self._execute(connection, _EVICT, seconds=LEASE_SECONDS)
        return [], len(quarantined)

    def finish(self, connection: Connection, token: int, keys: Sequence[int]) -> list[int]:
        """Mark claimed rows done; returns those marked by this call, in the order given.

        Rows that an earlier call has marked already, in a commit whose answer got lost, are left out of the result.
        Raises LeaseLost if any row belongs to somebody else by now.
        """
        literal = "{" + ",".join(map(str, keys)) + "}"
        marked = int(self._execute(connection, _FINISH, token=token, keys=literal).rowcount)
        if marked == len(keys):
            return list(keys)
        before = set(self._keys(connection, _FINISHED_BEFORE, token=token, keys=literal))
        if (lost := len(keys) - marked - len(before)) > 0:
            raise LeaseLost(f"{lost} of {plural(len(keys), 'row')} went to another worker by now")
        return [key for key in keys if key not in before]

    def refuse(self, connection: Connection, token: int, refusals: Sequence[Refusal]) -> None:
        """Mark claimed rows failed or skipped. Rows that somebody else has claimed since are left alone."""
        self._execute(
            connection,
            _REFUSE,
            token=token,
            keys=[r.key for r in refusals],
            statuses=[r.status for r in refusals],
            codes=[r.code for r in refusals],
            errors=[r.error for r in refusals],
        )

    def release(self, connection: Connection, token: int) -> int:
        """Give all rows that the token still holds back as pending, as if never claimed; returns their number."""
        return int(self._execute(connection, _RELEASE, token=token).rowcount)

    def is_open(self, connection: Connection) -> bool:
        """Whether any row is still pending, or running at any worker."""
        return bool(self._execute(connection, _OPEN).scalar_one())

    def remaining(self, connection: Connection) -> int:
        """How many rows are still pending or running."""
        return int(self._execute(connection, _REMAINING).scalar_one())

    def counts(self, connection: Connection) -> dict[str, int]:
        """Number of rows by status."""
        return {status: int(number) for status, number in self._execute(connection, _COUNTS)}

    def retry(self, connection: Connection, statuses: Sequence[str], codes: Sequence[str] | None = None) -> int:
        """Make refused rows pending again, all of them or those with the given reason codes; returns their number."""
        return int(self._execute(connection, _RETRY, statuses=list(statuses), codes=codes).rowcount)

    def _keys(self, connection: Connection, sql: str, **values: Any) -> list[int]:
        rows: Sequence[Row[Any]] = self._execute(connection, sql, **values).all()
        return sorted(row.key for row in rows)

    def _execute(self, connection: Connection, sql: str, **values: Any) -> Any:
        # Kept, as to take a statement apart anew takes as long as to send it.
        statement = self._statements.get(sql)
        if statement is None:
            limit = _LIMIT if "UPDATE" in sql else ""
            statement = self._statements[sql] = text(limit + sql.format(**self._names))
        return connection.execute(statement, {**self.scope, **values})
