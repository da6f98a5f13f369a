"""A look at the database's health: what is wrong or will be, and what to do about it. Changes nothing.

Each check reads the server's own books, so that all of them together take seconds on any size of store; only the recall
of a vector index has to be measured, with a few searches.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, Row, text

from embstore import catalog, indexes, recall
from embstore.db.engine import Database
from embstore.db.migrate import State, inspect
from embstore.db.schema import HEAD, MINIMUM_SERVER
from embstore.settings import Settings
from embstore.words import plural

Level = Literal["ok", "warning", "problem"]

DEAD_SHARE, DEAD_ROWS = 0.3, 50_000
"""From how many dead rows on, beside the living, a table is called bloated."""
OLD_SNAPSHOT_SECONDS = 3600
RECALL_QUERIES, LOW_RECALL = 10, 0.9
CLOCK_SECONDS = 5.0
SPARE_CONNECTIONS = 3
LOW_DISK_SHARE, LOW_DISK_BYTES = 0.05, 2 << 30

_CONNECTIONS = """
SELECT current_setting('max_connections')::int AS allowed,
    current_setting('superuser_reserved_connections')::int + current_setting('reserved_connections')::int AS reserved,
    (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()) AS used
"""

_ABANDONED = """
SELECT d.dataset, m.name AS model, count(*) AS rows
FROM {table} q JOIN embstore.datasets d USING (dataset_id) JOIN embstore.model m USING (model_id)
WHERE q.status = 'running' AND NOT embstore.is_alive(q.claim_token)
GROUP BY 1, 2 ORDER BY 1, 2
"""
_QUEUES = {"embstore.extraction": "extract", "embstore.centroid": "centroids", "embstore.boundary_run": "boundaries"}

# Read off the counts alone, which an index gives; which rows they are is for a query of one's own.
_UNEVEN = """
SELECT d.dataset, m.name AS model, coalesce(x.done, 0) AS done, coalesce(e.vectors, 0) AS vectors
FROM (SELECT dataset_id, model_id, count(*) AS done FROM embstore.extraction WHERE status = 'done' GROUP BY 1, 2) x
FULL JOIN (SELECT dataset_id, model_id, count(*) AS vectors FROM embstore.embedding GROUP BY 1, 2) e
    USING (dataset_id, model_id)
JOIN embstore.datasets d USING (dataset_id) JOIN embstore.model m USING (model_id)
WHERE x.done IS DISTINCT FROM e.vectors ORDER BY 1, 2
"""

_PARTITIONS = """
SELECT coalesce(m.model_id, p.id) AS id, m.name AS model, p.name AS partition
FROM embstore.model m
FULL JOIN (
    SELECT c.relname AS name, substring(c.relname FROM '^embedding_([0-9]+)$')::int AS id
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = 'embstore' AND c.relkind = 'r' AND c.relname ~ '^embedding_[0-9]+$'
        AND (c.relispartition OR NOT EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid))) p
    ON p.id = m.model_id
WHERE m.model_id IS NULL OR p.name IS NULL ORDER BY 1
"""

# An index that is being built at this moment is not valid either, and is nothing to worry about.
_INVALID_INDEXES = """
SELECT c.relname AS index, t.relname AS table, a.amname IN ('hnsw', 'ivfflat') AS of_vectors
FROM pg_index x JOIN pg_class c ON c.oid = x.indexrelid JOIN pg_class t ON t.oid = x.indrelid
JOIN pg_am a ON a.oid = c.relam JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = 'embstore' AND c.relkind = 'i' AND NOT x.indisvalid
    AND NOT EXISTS (SELECT FROM pg_stat_progress_create_index b WHERE b.index_relid = x.indexrelid)
ORDER BY 1
"""

_BLOAT = """
SELECT relname AS table, n_dead_tup AS dead, n_live_tup AS live FROM pg_stat_user_tables
WHERE schemaname = 'embstore' AND n_dead_tup > :rows AND n_dead_tup > :share * n_live_tup ORDER BY 1
"""
_AUTOVACUUM = "SELECT current_setting('autovacuum') = 'on' AND current_setting('track_counts') = 'on'"

_OLD_SNAPSHOTS = """
SELECT pid, coalesce(nullif(application_name, ''), backend_type) AS program, state,
    extract(epoch FROM clock_timestamp() - xact_start)::bigint AS seconds
FROM pg_stat_activity
WHERE datname = current_database() AND backend_xmin IS NOT NULL
    AND clock_timestamp() - xact_start > make_interval(secs => :seconds) ORDER BY seconds DESC
"""

_SIZE = "SELECT pg_database_size(current_database())"


@dataclass(frozen=True)
class Finding:
    """What a check found: one thing, in words, and what to do about it."""

    check: str
    level: Level
    found: str
    advice: str | None = None


def examine(database: Database, settings: Settings) -> Iterator[Finding]:
    """Every check in turn, at least one finding each; a database that is not fit for embstore ends it early.

    Raises DatabaseError if the database cannot be reached, or becomes unreachable on the way.
    """
    before = time.time()
    with database.begin() as connection:
        state = inspect(connection)
        clock = connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
    yield _server(state)
    yield _pgvector(state)
    yield _migrations(state, migrates_itself=database.embedded)
    yield _clock(float(clock), before, time.time())
    if state.problem is not None:
        return
    checks: Sequence[Callable[[Connection], list[Finding]]] = (
        lambda c: _connections(c, settings),
        _leases,
        _vectors,
        _partitions,
        _indexes,
        _bloat,
        _snapshots,
        lambda c: _disk(c, settings if database.embedded else None),
    )
    for check in checks:
        with database.begin() as connection:
            found = check(connection)
        yield from found
    yield from _recall(database)


def _server(state: State) -> Finding:
    found = f"PostgreSQL {state.server}"
    if state.server_major < MINIMUM_SERVER:
        return Finding("server", "problem", found, state.problem)
    return Finding("server", "ok", found)


def _pgvector(state: State) -> Finding:
    """What an upgrade of the schema, or of embstore, mends is said there."""
    found = f"pgvector {state.pgvector}" if state.pgvector else "not installed in this database yet"
    if replace(state, revision=None).can_migrate or state.server_major < MINIMUM_SERVER:
        return Finding("pgvector", "ok", found)
    return Finding("pgvector", "problem", found, state.problem)


def _migrations(state: State, *, migrates_itself: bool) -> Finding:
    found = f"revision {state.revision or 'none'}, this embstore's is {HEAD}"
    if state.revision == HEAD:
        return Finding("migrations", "ok", found)
    if migrates_itself and state.can_migrate:
        return Finding("migrations", "warning", found, "nothing: the next command that needs it migrates it")
    return Finding("migrations", "problem", found, state.problem)


def _clock(server: float, before: float, after: float) -> Finding:
    ahead = server - after if server > after else min(server - before, 0.0)
    if abs(ahead) < CLOCK_SECONDS:
        return Finding("clock", "ok", "this machine and the server agree")
    way = "ahead of" if ahead > 0 else "behind"
    return Finding(
        "clock",
        "warning",
        f"the server is {abs(ahead):,.0f} s {way} this machine",
        "set both by NTP: leases go by the server's clock alone and are safe, but times in logs will not agree",
    )


def _connections(connection: Connection, settings: Settings) -> list[Finding]:
    row = connection.execute(text(_CONNECTIONS)).one()
    free = row.allowed - row.reserved - row.used
    found = (
        f"{row.used} of {row.allowed} in use, {row.reserved} reserved; a command here may take"
        f" {settings.db_max_connections}"
    )
    if free < SPARE_CONNECTIONS:
        return [Finding("connections", "problem", found, "close sessions, or raise max_connections on the server")]
    if settings.db_max_connections > free:
        advice = f"set DB_MAX_CONNECTIONS to {free} or less, or raise max_connections on the server"
        return [Finding("connections", "warning", found, advice)]
    return [Finding("connections", "ok", found)]


def _leases(connection: Connection) -> list[Finding]:
    findings = []
    for table, command in _QUEUES.items():
        for row in connection.execute(text(_ABANDONED.format(table=table))):
            left = f"{plural(row.rows, 'row')} of {table}"
            found = f"'{row.dataset}' by {row.model}: workers that are gone have left {left}"
            findings.append(Finding("leases", "warning", found, f"type 'embstore {command}': it takes them over"))
    return findings or [Finding("leases", "ok", "no row waits for a worker that is gone")]


def _vectors(connection: Connection) -> list[Finding]:
    return [
        Finding(
            "vectors",
            "problem",
            f"'{row.dataset}' by {row.model}: {plural(row.done, 'extraction')} done,"
            f" {plural(row.vectors, 'vector')} there",
            f"rows were changed by hand: restore a backup, or type 'embstore rm model {row.model}' and extract again",
        )
        for row in connection.execute(text(_UNEVEN))
    ] or [Finding("vectors", "ok", "as many vectors as extractions that are done, for each dataset and model")]


def _partitions(connection: Connection) -> list[Finding]:
    return [_partition(row) for row in connection.execute(text(_PARTITIONS))] or [
        Finding("partitions", "ok", "one for each model")
    ]


def _partition(row: Row[Any]) -> Finding:
    if row.model is None:
        found = f"embstore.{row.partition} belongs to no model"
        return Finding("partitions", "warning", found, f"look at it, then: DROP TABLE embstore.{row.partition}")
    found = f"model '{row.model}' has no table embstore.embedding_{row.id}"
    advice = f"it was dropped by hand: restore a backup, or type 'embstore rm model {row.model}'"
    return Finding("partitions", "problem", found, advice)


def _indexes(connection: Connection) -> list[Finding]:
    return [
        Finding(
            "indexes",
            "problem",
            f"embstore.{row.index} on {row.table} is not valid: its build was interrupted, and it only costs",
            "type 'embstore index drop', or 'embstore index build' to build it again"
            if row.of_vectors
            else f"it is not embstore's own: DROP INDEX embstore.{row.index}",
        )
        for row in connection.execute(text(_INVALID_INDEXES))
    ] or [Finding("indexes", "ok", "all are valid")]


def _recall(database: Database) -> Iterator[Finding]:
    with database.begin() as connection:
        built = [index.model for index in indexes.find(connection) if index.valid]
        models = [catalog.get_model(connection, name) for name in dict.fromkeys(built)]
    for model in models:
        for checked in islice(recall.check(database, model, [], queries=RECALL_QUERIES), 1):
            speed = f"{checked.rate:,.0f} searches a second"
            found = f"'{model.name}': {checked.recall:.3f} of the ten nearest are found, {speed}"
            if checked.recall < LOW_RECALL:
                advice = f"type 'embstore index check --model {model.name}', and build it anew with a larger --m"
                yield Finding("recall", "warning", found, advice)
            else:
                yield Finding("recall", "ok", found)
    if not models:
        yield Finding("recall", "ok", "no vector index: every search is exact")


def _bloat(connection: Connection) -> list[Finding]:
    findings = [
        Finding(
            "bloat",
            "warning",
            f"embstore.{row.table}: {plural(row.dead, 'dead row')} beside {plural(row.live, 'living one')}",
            f"VACUUM embstore.{row.table}; if they stay, an old snapshot holds them",
        )
        for row in connection.execute(text(_BLOAT), {"rows": DEAD_ROWS, "share": DEAD_SHARE})
    ]
    if not connection.execute(text(_AUTOVACUUM)).scalar_one():
        advice = "set autovacuum and track_counts to on: every claim leaves a dead row"
        findings.append(Finding("bloat", "problem", "autovacuum is off", advice))
    return findings or [Finding("bloat", "ok", "few dead rows, and autovacuum is on")]


def _snapshots(connection: Connection) -> list[Finding]:
    return [
        Finding(
            "snapshots",
            "warning",
            f"session {row.pid} ({row.program}, {row.state}) has held a snapshot for {row.seconds / 3600:,.1f} h",
            f"if it is forgotten: SELECT pg_terminate_backend({row.pid}); no dead row goes while it lives",
        )
        for row in connection.execute(text(_OLD_SNAPSHOTS), {"seconds": OLD_SNAPSHOT_SECONDS})
    ] or [Finding("snapshots", "ok", "none is older than an hour")]


def _disk(connection: Connection, settings: Settings | None) -> list[Finding]:
    """`settings` are those of an embedded server: of another one, the disk cannot be seen from here."""
    size = int(connection.execute(text(_SIZE)).scalar_one())
    if settings is None:
        return [
            Finding("disk", "ok", f"the database takes {_gigabytes(size)}; the server's disk is not seen from here")
        ]
    usage = shutil.disk_usage(_existing(settings.home))
    found = f"the database takes {_gigabytes(size)}, {_gigabytes(usage.free)} are free"
    if usage.free < LOW_DISK_BYTES or usage.free < LOW_DISK_SHARE * usage.total:
        return [Finding("disk", "problem", found, f"free some space on the disk of '{settings.home}'")]
    if usage.free < size:
        return [Finding("disk", "warning", found, "free some space: an index, a backup and a VACUUM FULL need room")]
    return [Finding("disk", "ok", found)]


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def _gigabytes(size: int) -> str:
    return f"{size / (1 << 30):,.1f} GB"
