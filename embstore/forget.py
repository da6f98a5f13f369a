"""Forgetting a person: their items in all datasets, what was computed from them, and their name; and the proof.

A person is known by the name of a speaker. Items may carry another label by now, if a boundary run was applied: the
name is then in what `undo` would restore, and those items are theirs, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from embstore import removal
from embstore.catalog import Dataset
from embstore.db.engine import Database
from embstore.errors import DatabaseError, UsageError
from embstore.removal import Counts, Tick
from embstore.search import search

NEIGHBOURS = 10
"""How many of the nearest are looked at in the proof."""

# Those whose name it is, and those who had it before a run's labels.
_ITEMS = """
SELECT i.dataset_id, i.item_id, i.speaker FROM embstore.item i
WHERE i.dataset_id = :dataset_id AND (i.speaker = :speaker OR i.item_id IN (
    SELECT u.item_id FROM embstore.boundary_undo u WHERE u.dataset_id = :dataset_id AND u.speaker = :speaker))
"""
_DATASETS = """
SELECT d.dataset_id, d.dataset, d.media, d.root, d.can_write FROM embstore.datasets d
WHERE EXISTS (SELECT FROM embstore.item i WHERE i.dataset_id = d.dataset_id AND i.speaker = :speaker)
    OR EXISTS (SELECT FROM embstore.boundary_undo u WHERE u.dataset_id = d.dataset_id AND u.speaker = :speaker)
    OR EXISTS (SELECT FROM embstore.centroid c WHERE c.dataset_id = d.dataset_id AND c.speaker = :speaker)
    OR EXISTS (SELECT FROM embstore.speaker_change g WHERE g.dataset_id = d.dataset_id AND g.speaker = :speaker)
ORDER BY d.dataset
"""
_SPEAKERS = "SELECT DISTINCT speaker FROM embstore.item WHERE speaker IS NOT NULL LIMIT 100000"

_MODELS = """
SELECT DISTINCT m.model_id, m.name FROM embstore.extraction x JOIN embstore.model m USING (model_id)
WHERE x.dataset_id = :dataset_id AND x.item_id = ANY (:item_ids) AND x.status = 'done' ORDER BY m.name
"""
_VOICE = """
WITH theirs AS MATERIALIZED (
    SELECT e.embedding FROM embstore.embedding_{model_id} e
    WHERE e.dataset_id = :dataset_id AND e.model_id = {model_id} AND e.item_id = ANY (:item_ids)
), mean AS MATERIALIZED (SELECT avg(embedding) AS vector FROM theirs)
SELECT vector_send(m.vector), (SELECT avg(1 - (t.embedding <=> m.vector)) FROM theirs t) FROM mean m
"""

# The name's own centroid goes. Others that hold something of theirs lose the vector, and are computed anew: those of
# labels that their items had, and any that was stale, as it may be of a time when a label was theirs.
_CLEAR = (
    "DELETE FROM embstore.speaker_change WHERE dataset_id = :dataset_id AND speaker = :speaker",
    "DELETE FROM embstore.centroid WHERE dataset_id = :dataset_id AND speaker = :speaker",
    "DELETE FROM embstore.boundary_undo WHERE dataset_id = :dataset_id AND speaker = :speaker",
    """
DELETE FROM embstore.centroid_vector v USING embstore.centroid c
WHERE v.dataset_id = :dataset_id AND c.dataset_id = v.dataset_id AND c.model_id = v.model_id
    AND c.centroid_id = v.centroid_id AND (c.speaker = ANY (:labels) OR c.status <> 'done'
        OR NOT EXISTS (SELECT FROM embstore.item i WHERE i.dataset_id = c.dataset_id AND i.speaker = c.speaker)
        OR EXISTS (SELECT FROM embstore.speaker_change g WHERE g.dataset_id = c.dataset_id
            AND g.model_id = c.model_id AND g.speaker = c.speaker))
""",
)

_LEFT = """
SELECT 'item' AS place, count(*) AS number FROM embstore.item
    WHERE dataset_id = :dataset_id AND (speaker = :speaker OR item_id = ANY (:item_ids))
UNION ALL SELECT 'extraction', count(*) FROM embstore.extraction
    WHERE dataset_id = :dataset_id AND item_id = ANY (:item_ids)
UNION ALL SELECT 'embedding', count(*) FROM embstore.embedding
    WHERE dataset_id = :dataset_id AND item_id = ANY (:item_ids)
UNION ALL SELECT 'face', count(*) FROM embstore.face WHERE dataset_id = :dataset_id AND item_id = ANY (:item_ids)
UNION ALL SELECT 'centroid', count(*) FROM embstore.centroid WHERE dataset_id = :dataset_id AND speaker = :speaker
UNION ALL SELECT 'speaker_change', count(*) FROM embstore.speaker_change
    WHERE dataset_id = :dataset_id AND speaker = :speaker
UNION ALL SELECT 'boundary_undo', count(*) FROM embstore.boundary_undo
    WHERE dataset_id = :dataset_id AND (speaker = :speaker OR item_id = ANY (:item_ids))
"""

# Tables with dead rows now. Their statistics hold frequent names, which ANALYZE makes anew.
_TABLES = """
SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = 'embstore' AND c.relkind = 'r' AND (c.relname IN ('item', 'extraction', 'face', 'centroid',
    'centroid_vector', 'speaker_change', 'boundary_undo', 'boundary_score') OR c.relname = ANY (:partitions))
ORDER BY 1
"""
_OWNS = """
SELECT pg_has_role(nspowner, 'USAGE') FROM pg_namespace WHERE nspname = 'embstore'
"""
_OTHERS_THAT_SEE = """
SELECT count(*) FROM pg_stat_activity
WHERE pid <> pg_backend_pid() AND datname = current_database() AND backend_type <> 'autovacuum worker'
    AND age(backend_xmin) >= age(CAST(:xid AS xid))
"""


@dataclass(frozen=True)
class Trace:
    """What one dataset holds of a person."""

    dataset: Dataset
    item_ids: list[int]
    labels: list[str]
    """Other names that their items carry now."""
    models: dict[int, str]
    counts: Counts


@dataclass(frozen=True)
class Voice:
    """How a person sounded, or looked: the mean of their vectors in one dataset by one model."""

    dataset: str
    model: str
    vector: NDArray[np.float32]
    own: float
    """Mean cosine of their vectors to it."""


@dataclass(frozen=True)
class Neighbour:
    """What is nearest now to how a person sounded, or looked."""

    dataset: str
    """Of the person."""
    model: str
    similarity: float
    speaker: str | None
    path: str | None
    of: str
    """Its dataset."""
    own: float
    """How alike their own recordings were to this, on the average."""


@dataclass(frozen=True)
class Proof:
    """What is left: nothing, or it would be an error; and who is nearest now."""

    looked_at: Mapping[str, int]
    """Rows of the person by table, of all their datasets: all 0."""
    nearest: list[Neighbour] = field(default_factory=list)


def find(connection: Connection, speaker: str) -> list[Trace]:
    """What there is of a person, in every dataset that one may see. Raises UsageError if nobody is called so."""
    datasets = [Dataset(*row) for row in connection.execute(text(_DATASETS), {"speaker": speaker})]
    if not datasets:
        known = connection.execute(text(_SPEAKERS)).scalars().all()
        raise UsageError(f"no speaker '{speaker}' in any dataset that you may see{removal.near(speaker, known)}")
    return [_trace(connection, dataset, speaker) for dataset in datasets]


def _trace(connection: Connection, dataset: Dataset, speaker: str) -> Trace:
    rows = connection.execute(text(_ITEMS), {"dataset_id": dataset.dataset_id, "speaker": speaker}).all()
    ids = [row.item_id for row in rows]
    labels = sorted({row.speaker for row in rows} - {speaker, None})
    models = connection.execute(text(_MODELS), {"dataset_id": dataset.dataset_id, "item_ids": ids})
    counts = removal.counts(connection, dataset.dataset_id, ids)
    return Trace(dataset, ids, labels, {row.model_id: row.name for row in models}, counts)


def forget(database: Database, speaker: str, traces: Sequence[Trace], *, tick: Tick = lambda _: None) -> Proof:
    """Remove a person from these datasets, and prove it. Stopped in between, the same call goes on with what is left.

    Raises UsageError while workers are at one of them, DatabaseError if anything is left.
    """
    with database.begin() as connection:
        for trace in traces:
            removal.require_idle(connection, trace.dataset)
        voices = [_voice(connection, trace, *model) for trace in traces for model in trace.models.items()]
    for trace in traces:
        clear = _clearing(trace, speaker)
        if trace.item_ids:
            removal.remove_items(database, trace.dataset, trace.item_ids, command="forget", tick=tick, also=clear)
        else:
            database.patiently(clear)
    return _prove(database, speaker, traces, voices)


def _voice(connection: Connection, trace: Trace, model_id: int, model: str) -> Voice:
    """What is to be searched for when they are gone."""
    values = {"dataset_id": trace.dataset.dataset_id, "item_ids": trace.item_ids}
    sent, own = connection.execute(text(_VOICE.format(model_id=model_id)), values).one()
    vector = np.frombuffer(bytes(sent), dtype=">f4", offset=4).astype(np.float32)
    return Voice(trace.dataset.name, model, vector, own)


def _clearing(trace: Trace, speaker: str) -> Callable[[Connection], None]:
    values: dict[str, Any] = {"dataset_id": trace.dataset.dataset_id, "speaker": speaker, "labels": trace.labels}

    def clear(connection: Connection) -> None:
        for statement in _CLEAR:
            connection.execute(text(statement), values)

    return clear


def _prove(database: Database, speaker: str, traces: Sequence[Trace], voices: Sequence[Voice]) -> Proof:
    """Count what is left of a person, and search for them."""
    left: dict[str, int] = {}
    gone: set[int] = set()
    with database.reading() as connection:
        for trace in traces:
            gone.update(trace.item_ids)
            values = {"dataset_id": trace.dataset.dataset_id, "speaker": speaker, "item_ids": trace.item_ids}
            for place, number in connection.execute(text(_LEFT), values):
                left[place] = left.get(place, 0) + number
    nearest = []
    for voice in voices:
        # Vectors that cancel each other out leave nothing to search for.
        if not voice.vector.any():
            continue
        hits = search(database, voice.vector, model=voice.model, k=NEIGHBOURS, exact=True, timeout=0)
        left["search"] = left.get("search", 0) + sum(hit.item_id in gone for hit in hits)
        nearest += [
            Neighbour(voice.dataset, voice.model, hit.similarity, hit.speaker, hit.path, hit.dataset, voice.own)
            for hit in hits[:1]
        ]
    if any(left.values()):
        places = ", ".join(f"{number:,} in {place}" for place, number in left.items() if number)
        raise DatabaseError(f"something of '{speaker}' is left, or has come back ({places}): type the command again")
    return Proof(left, nearest)


@dataclass(frozen=True)
class Vacuumed:
    """What became of the rows that are deleted, and still in the server's files."""

    statement: str
    done: bool
    """False: only the owner of the database may."""
    held: int = 0
    """Transactions of others that may still see them, and keep them there."""


def vacuum(database: Database, traces: Sequence[Trace]) -> Vacuumed:
    """Have the server clear deleted rows out of its tables and indexes, if this is the owner of the database."""
    partitions = [f"embedding_{model_id}" for trace in traces for model_id in trace.models]
    with database.begin() as connection:
        tables = connection.execute(text(_TABLES), {"partitions": partitions}).scalars().all()
        owns = bool(connection.execute(text(_OWNS)).scalar_one())
        xid = str(connection.execute(text("SELECT CAST(pg_current_xact_id() AS xid)")).scalar_one())
        held = int(connection.execute(text(_OTHERS_THAT_SEE), {"xid": xid}).scalar_one()) if owns else 0
    statement = f"VACUUM (ANALYZE) {', '.join(f'embstore.{table}' for table in tables)}"
    if owns:
        with database.autocommit() as connection:
            connection.exec_driver_sql(statement)
    return Vacuumed(statement, owns, held)
