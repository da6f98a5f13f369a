"""Vector indexes, one a model: built beside running work, watched, dropped, and cleared away where a build was cut off.

An index is on the model's partition, and on an expression with the model's dimension, as the column has none:

    full   embedding::vector(dim)                            what the typed view shows, so that plain queries use it too
    half   l2_normalize(embedding::vector(dim))::halfvec(dim)  0.6 of the size; ranked again by embstore.nearest. At
                                                             unit length, as 16 bits hold no number beyond 65,504
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from embstore import faults
from embstore.catalog import StoredModel
from embstore.db.engine import IDLE_SECONDS, Database, driver_of, require_session
from embstore.errors import DatabaseError, UsageError
from embstore.progress import duration

Kind = Literal["hnsw", "ivfflat"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Precision = Literal["full", "half"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

LONGEST = {"full": 2000, "half": 4000}
"""Dimensions that pgvector can index."""
SECONDS_A_ROW = {"insert": 1.1e-3, "build": 2.7e-4}
"""With 256 dimensions and 200,000 rows on 2 cores: what a vector costs that is written under an HNSW index (from the
ratio of such a load to one without), and what it costs in a build of the whole (measured). For estimates alone."""
MANY = 10_000
"""Vectors under which no word is lost about an index in place."""

_POLL = 0.3
_LOCK = 0x656D6278
"""With the model's number, the key of an advisory lock: two builds at once would be one too many."""
_GRAPH_BYTES = 190
_LINK_BYTES = 34
"""In memory HNSW takes, for each row beside its vector, so much and m times so much: measured with m = 16 by the row at
which pgvector says that the graph no longer fits."""
_IVFFLAT_MEMORY = 256 << 20

_EXPRESSIONS = {
    "full": ("(embedding::vector({dim}))", "vector_cosine_ops"),
    "half": ("(l2_normalize(embedding::vector({dim}))::halfvec({dim}))", "halfvec_cosine_ops"),
}

_FIND = """
SELECT m.model_id, m.name AS model, m.dim, c.relname AS name, a.amname AS kind, x.indisvalid AS valid,
    CASE o.opcname WHEN 'halfvec_cosine_ops' THEN 'half' ELSE 'full' END AS precision,
    pg_relation_size(c.oid) AS size, p.pid, p.phase,
    coalesce(p.blocks_done::float / nullif(p.blocks_total, 0), p.tuples_done::float / nullif(p.tuples_total, 0)) AS part
FROM embstore.model m
JOIN pg_index x ON x.indrelid = to_regclass('embstore.embedding_' || m.model_id)
JOIN pg_class c ON c.oid = x.indexrelid
JOIN pg_am a ON a.oid = c.relam AND a.amname IN ('hnsw', 'ivfflat')
JOIN pg_opclass o ON o.oid = x.indclass[0]
LEFT JOIN pg_stat_progress_create_index p ON p.index_relid = c.oid
WHERE CAST(:model_id AS smallint) IS NULL OR m.model_id = :model_id
ORDER BY m.name, c.relname
"""

_LIMITS = """
SELECT current_setting('max_parallel_workers')::int AS workers,
    current_setting('max_parallel_maintenance_workers')::int AS default_workers,
    pg_size_bytes(current_setting('maintenance_work_mem')) AS memory,
    pg_size_bytes(current_setting('effective_cache_size')) AS cache
"""


@dataclass(frozen=True)
class Index:
    """A vector index as the server has it."""

    model_id: int
    model: str
    dim: int
    name: str
    kind: Kind
    valid: bool
    precision: Precision
    size: int
    """Bytes on disk."""
    pid: int | None
    """The server's process that builds it now."""
    phase: str | None
    part: float | None
    """How much of the phase is done, 0 to 1."""

    @property
    def state(self) -> str:
        """In a word or two: `ready`, `being built`, `broken`."""
        return "being built" if self.pid is not None else "ready" if self.valid else "broken"


@dataclass(frozen=True)
class Plan:
    """A build, with what it takes."""

    model: StoredModel
    kind: Kind
    precision: Precision
    options: dict[str, int]
    rows: int
    needed: int
    """Bytes of memory with which it is fast."""
    memory: int
    """Bytes that it gets."""
    workers: int
    """Parallel processes of the server, beside the one that answers."""

    @property
    def name(self) -> str:
        """`embedding_1_hnsw`, `embedding_1_hnsw_half`."""
        return f"embedding_{self.model.model_id}_{self.kind}" + ("_half" if self.precision == "half" else "")

    @property
    def statement(self) -> str:
        """What is typed to the server."""
        expression, operators = _EXPRESSIONS[self.precision]
        options = ", ".join(f"{name} = {value}" for name, value in self.options.items())
        return (
            f"CREATE INDEX CONCURRENTLY {self.name} ON embstore.embedding_{self.model.model_id} USING {self.kind}"
            f" ({expression.format(dim=self.model.dim)} {operators}) WITH ({options})"
        )


@dataclass(frozen=True)
class Loading:
    """What it costs to write many vectors under an index."""

    index: Index
    rows: int
    under: float
    """Seconds of the server, with the index in place."""
    after: float
    """Seconds of the server to build it anew when they are there."""

    def advice(self, model: str, then: str) -> str:
        """What to say of it; `then` is what to do without the index."""
        return (
            f"there is an index on these vectors: writing {self.rows:,} more under it takes the server about"
            f" {duration(self.under)}, building it anew afterwards about {duration(self.after)}; to do that, press"
            f" Ctrl+C and type 'embstore index drop --model {model}', {then}, and"
            f" 'embstore index build --model {model}'"
        )


def find(connection: Connection, model_id: int | None = None) -> list[Index]:
    """The vector indexes there are, broken ones and those being built included."""
    return [Index(**row._mapping) for row in connection.execute(text(_FIND), {"model_id": model_id})]


def plan(
    connection: Connection,
    model: StoredModel,
    kind: Kind = "hnsw",
    precision: Precision = "full",
    *,
    local: bool,
    options: dict[str, int] | None = None,
    memory: int | None = None,
    workers: int | None = None,
) -> Plan:
    """What building an index takes: rows are counted, memory and workers are chosen if they are not given.

    `local`: the server is on this machine, so that its memory and cores are known. Raises UsageError for a model whose
    vectors are too long.
    """
    if model.dim > LONGEST[precision]:
        hint = "add --precision half" if precision == "full" and model.dim <= LONGEST["half"] else "search is exact"
        raise UsageError(
            f"vectors of {model.dim:,} dimensions cannot be indexed at {precision} precision, pgvector's limit is"
            f" {LONGEST[precision]:,}: {hint}"
        )
    rows = connection.exec_driver_sql(f"SELECT count(*) FROM embstore.embedding_{model.model_id}").scalar_one()
    chosen = {"lists": max(10, rows // 1000)} if kind == "ivfflat" else {"m": 16, "ef_construction": 64}
    chosen |= options or {}
    needed = _needed(kind, rows, model.dim * (4 if precision == "full" else 2), chosen)
    limits = connection.execute(text(_LIMITS)).one()
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if local else limits.cache // 2
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores - 1, limits.workers) if local else limits.default_workers
    given = max(min(needed, most), limits.memory) if memory is None else memory
    return Plan(model, kind, precision, chosen, rows, needed, given, workers)


def build(database: Database, plan: Plan, watch: Callable[[Index], None]) -> list[str]:
    """Build an index beside whatever else is going on; returns the names of those that it takes the place of.

    `watch` is called several times a second. Needs two connections. Ctrl+C ends the build on the server and clears what
    it left. Raises UsageError if there is one already, or if somebody is building one.
    """
    with _building(database, plan.model) as (connection, pid):
        others = _clear(connection, plan)
        for name, value in (("maintenance_work_mem", f"{plan.memory >> 10}kB"), ("statement_timeout", "0")):
            connection.execute(text("SELECT set_config(:name, :value, false)"), {"name": name, "value": value})
        connection.exec_driver_sql(f"SET max_parallel_maintenance_workers = {plan.workers}")
        try:
            _run(connection, plan.statement, lambda: _look(database, plan, pid, watch))
        except BaseException:
            with contextlib.suppress(SQLAlchemyError):  # the connection itself may be what was lost
                _drop(connection, plan.name)
            raise
        for other in others:
            _drop(connection, other.name)
    return [other.name for other in others]


def drop(database: Database, model: StoredModel) -> list[Index]:
    """Drop a model's indexes, broken ones too; returns them. Searches go on meanwhile, and are exact afterwards."""
    with _building(database, model) as (connection, _):
        indexes = find(connection, model.model_id)
        for index in indexes:
            _drop(connection, index.name)
    return indexes


def _drop(connection: Connection, name: str) -> None:
    connection.exec_driver_sql(f'DROP INDEX CONCURRENTLY IF EXISTS embstore."{name}"')


def loading(connection: Connection, model_id: int, pending: int) -> Loading | None:
    """What it costs to write so many vectors now, if it were cheaper to drop the index and build it afterwards."""
    index = next((index for index in find(connection, model_id) if index.valid and index.kind == "hnsw"), None)
    if index is None or pending < MANY:
        return None
    there = connection.exec_driver_sql(f"SELECT count(*) FROM embstore.embedding_{model_id}").scalar_one()
    under, after = pending * SECONDS_A_ROW["insert"], (there + pending) * SECONDS_A_ROW["build"]
    return Loading(index, pending, under, after) if under > after else None


def _needed(kind: Kind, rows: int, size: int, options: dict[str, int]) -> int:
    if kind == "ivfflat":
        return _IVFFLAT_MEMORY
    return int(1.05 * rows * (size + _GRAPH_BYTES + _LINK_BYTES * options["m"])) + (16 << 20)


@contextlib.contextmanager
def _building(database: Database, model: StoredModel) -> Iterator[tuple[Connection, int]]:
    """A connection of one's own outside of transactions, and its number, while nobody else builds for this model."""
    with database.autocommit() as connection:
        require_session(connection, "an index build")
        key = {"family": _LOCK, "model_id": model.model_id}
        locked = connection.execute(text("SELECT pg_try_advisory_lock(:family, :model_id)"), key).scalar_one()
        busy = next((index for index in find(connection, model.model_id) if index.pid is not None), None)
        if not locked or busy is not None:
            process = f" (process {busy.pid} of the server)" if busy is not None else ""
            raise UsageError(
                f"an index of model '{model.name}' is being built or dropped right now{process}: "
                "'embstore index status' shows how far it is"
            )
        try:
            # Statement follows statement, unless this process is stopped: nobody else could ever build an index then.
            connection.exec_driver_sql(f"SET idle_session_timeout = '{IDLE_SECONDS}s'")
            yield connection, connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        finally:
            # Closed, not returned to the pool: the lock and the settings are the session's.
            connection.invalidate()


def _clear(connection: Connection, plan: Plan) -> list[Index]:
    """Drop what an earlier build left; the valid indexes that are there. Raises UsageError if it is there already."""
    valid = []
    for index in find(connection, plan.model.model_id):
        if not index.valid:
            _drop(connection, index.name)
        elif index.name == plan.name:
            raise UsageError(
                f"model '{index.model}' has this index already, {index.name}: to build it anew, "
                f"type 'embstore index drop --model {index.model}' first"
            )
        else:
            valid.append(index)
    return valid


def _run(connection: Connection, statement: str, look: Callable[[], None]) -> None:
    """Run a statement in a thread of its own and look at it meanwhile. Whatever stops the looking cancels it."""
    errors: list[BaseException] = []
    done = threading.Event()  # Thread.join, when Ctrl+C interrupts it, takes the thread for ended (until Python 3.12)
    driver = driver_of(connection)

    def work() -> None:
        try:
            connection.exec_driver_sql(statement)
        except DBAPIError as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=work, name="build", daemon=True).start()
    faults.reach("index_build")
    try:
        while not done.wait(_POLL):
            look()
    except BaseException:
        driver.cancel()
        while not done.wait(_POLL):
            driver.cancel()
        raise
    if errors:
        if "shared memory segment" in str(errors[0]):
            raise DatabaseError(
                "the server has too little shared memory (/dev/shm) for a parallel build: add --workers 0, or raise"
                " shm_size if it runs in Docker"
            ) from errors[0]
        raise errors[0]


def _look(database: Database, plan: Plan, pid: int, watch: Callable[[Index], None]) -> None:
    with database.begin() as connection:
        for index in find(connection, plan.model.model_id):
            if index.pid == pid:
                watch(index)
