"""The tables, as SQLAlchemy Core. Migrations make them; a test holds the two against each other.

Catalogue: `team`, `dataset`, `dataset_share`, `model`, `run`, `lease`. Every table below it carries `dataset_id` in
each of its keys, so that the tables can be spread over several servers by it without a rewrite.

Items, extractions and embeddings are bulk data: what belongs to a deleted row is deleted by statement triggers, not by
foreign keys, whose check of every inserted row costs more than the insert.

Every table with a `dataset_id` has row-level security: the function `embstore.protect` of the migrations sets its
rules, and `embstore.secure`, which every upgrade calls, finds the tables that have none yet.

Status is never on a row that holds a vector: every claim and every result rewrites its row, and under a vector index
inserts the vector there again. So `extraction` and `embedding` are two tables, and `centroid` and `centroid_vector`.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    REAL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, OID
from sqlalchemy.types import UserDefinedType

SCHEMA = "embstore"
HEAD = "0015"
"""The newest migration. Revisions are numbered, so that older and newer can be told apart without loading Alembic."""

MINIMUM_SERVER = 16
MINIMUM_PGVECTOR = (0, 8, 4)
"""Earlier ones have overflow and vacuum bugs in their HNSW index."""

metadata = MetaData(schema=SCHEMA)


class Vector(UserDefinedType[Any]):
    """pgvector's `vector`, of any dimension; its values come and go through COPY and casts, not through this type."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """Name of the type in SQL."""
        return "vector"


def _timestamp(name: str, **more: Any) -> Column[Any]:
    return Column(name, DateTime(timezone=True), **more)


team = Table(
    "team",
    metadata,
    Column("team", Text, primary_key=True),
    Column("role", OID, nullable=False, comment="of the role of that name, when it became a team"),
    _timestamp("created_at", nullable=False, server_default=func.now()),
)
"""Teams are roles. Name and number have to agree: a role made later under the name of a dropped one is not the team."""

dataset = Table(
    "dataset",
    metadata,
    Column("dataset_id", Integer, Identity(always=True), primary_key=True),
    Column("name", Text, nullable=False),
    Column("media", Text, CheckConstraint("media IN ('audio', 'image')", name="dataset_media"), nullable=False),
    Column("root", Text, nullable=False, comment="absolute folder that the paths of the items are relative to"),
    _timestamp("created_at", nullable=False, server_default=func.now()),
    Column(
        "team",
        Text,
        ForeignKey(team.c.team, name="dataset_team"),
        comment="that it belongs to; null: to the owner of the database",
    ),
    # Hashes, as a lookup by the names themselves could use the index before the rows of others are taken out.
    Index("dataset_team_name", text("md5(team)"), text("md5(name)"), unique=True, postgresql_nulls_not_distinct=True),
)

dataset_share = Table(
    "dataset_share",
    metadata,
    Column("dataset_id", Integer, ForeignKey(dataset.c.dataset_id, ondelete="CASCADE"), nullable=False),
    Column("team", Text, ForeignKey(team.c.team), nullable=False),
    Column("can_write", Boolean, nullable=False, server_default=text("false")),
    Column("owner", Text, comment="team of the dataset"),
    Column("shared_by", Text, nullable=False, server_default=text("SESSION_USER")),
    _timestamp("shared_at", nullable=False, server_default=func.now()),
    PrimaryKeyConstraint("dataset_id", "team"),
    comment="which teams see which datasets, their own included",
)

model = Table(
    "model",
    metadata,
    Column("model_id", SmallInteger, Identity(always=True), primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("media", Text, CheckConstraint("media IN ('audio', 'image')", name="model_media"), nullable=False),
    Column("dim", Integer, CheckConstraint("dim > 0", name="model_dim"), nullable=False),
    Column("fingerprint", Text, nullable=False, comment="hash of weights and settings"),
    Column("settings", JSONB, nullable=False, comment="preprocessing and other facts, for people"),
    _timestamp("created_at", nullable=False, server_default=func.now()),
    Column("family", Text, comment="entry in the group embstore.models that makes it; null: not known"),
    Column("options", JSONB, comment="what the family makes it of"),
    CheckConstraint("(family IS NULL) = (options IS NULL)", name="model_recipe"),
)

run = Table(
    "run",
    metadata,
    Column("run_id", Integer, Identity(always=True), nullable=False),
    Column("dataset_id", Integer, nullable=False),
    Column("model_id", SmallInteger),
    Column("command", Text, nullable=False),
    Column("parameters", JSONB, nullable=False),
    Column("role", Text, nullable=False, server_default=func.current_user()),
    Column("host", Text, nullable=False),
    Column("version", Text, nullable=False, comment="of embstore"),
    Column("status", Text, nullable=False, server_default="running"),
    Column("counts", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    _timestamp("started_at", nullable=False, server_default=func.now()),
    _timestamp("finished_at"),
    Column(
        "login", Text, nullable=False, server_default=text("SESSION_USER"), comment="who connected; role: in whose name"
    ),
    Column("dataset", Text, comment="its name at that time"),
    Column("model", Text, comment="its name"),
    PrimaryKeyConstraint("dataset_id", "run_id"),
    CheckConstraint("status IN ('running', 'done', 'interrupted', 'failed')", name="run_status"),
)
"""The audit trail: a row a command. It outlives its dataset and its model, and its subject can only finish it."""

lease = Table(
    "lease",
    metadata,
    # Not to be guessed: whoever sees a claim may ask whether its worker lives (`embstore.is_alive`), and nobody else.
    Column(
        "token",
        BigInteger,
        primary_key=True,
        autoincrement=False,
        server_default=text(
            r"('x' || left(gen_random_uuid()\:\:text, 8) || right(gen_random_uuid()\:\:text, 8))"
            r"\:\:bit(64)\:\:bigint & 9223372036854775807"
        ),
    ),
    Column("worker", Text, nullable=False, comment="host:pid"),
    _timestamp("expires_at", nullable=False, comment="by the clock of the server"),
    Column("role", Text, nullable=False, server_default=func.current_user()),
)
"""One row a worker process. Renewing it is one small update, however many rows the worker has claimed."""

item = Table(
    "item",
    metadata,
    Column("dataset_id", Integer, nullable=False),
    Column("item_id", BigInteger, Identity(always=True), nullable=False),
    Column("position", BigInteger, nullable=False, comment="place in the order of the dataset, from 0 without gaps"),
    Column("path", Text, nullable=False, comment="relative to the root of the dataset"),
    Column("start", Double, comment="seconds; null: the whole file"),
    Column("duration", Double, comment="seconds; null: to the end"),
    Column("speaker", Text),
    Column("size", BigInteger, comment="bytes, when it was registered; null: was not there"),
    Column("mtime_ns", BigInteger),
    _timestamp("vanished_at", comment="when a scan no longer found it"),
    PrimaryKeyConstraint("dataset_id", "item_id"),
    UniqueConstraint("dataset_id", "path", "start", name="item_path_start", postgresql_nulls_not_distinct=True),
    Index("item_speaker", "dataset_id", "speaker"),
    Index("item_position", "dataset_id", "position"),
)


def _queue_columns() -> list[Column[Any]]:
    """What makes a table a queue; `embstore.queue` works on any table that has them."""
    return [
        Column("status", Text, nullable=False, server_default="pending"),
        Column("attempts", SmallInteger, nullable=False, server_default=text("0"), comment="counted when claimed"),
        Column("claim_token", BigInteger, comment="lease of the worker that has it, or that finished it"),
        Column("error_code", Text),
        Column("error", Text),
        _timestamp("finished_at"),
    ]


STATUSES = "('pending', 'running', 'done', 'failed', 'skipped')"

extraction = Table(
    "extraction",
    metadata,
    Column("dataset_id", Integer, nullable=False),
    Column("model_id", SmallInteger, nullable=False),
    Column("item_id", BigInteger, nullable=False),
    *_queue_columns(),
    PrimaryKeyConstraint("dataset_id", "model_id", "item_id"),
    CheckConstraint(f"status IN {STATUSES}", name="extraction_status"),
    CheckConstraint("(error_code IS NOT NULL) = (status IN ('failed', 'skipped'))", name="extraction_reason"),
)
for _status in ("pending", "running"):
    Index(
        f"extraction_{_status}",
        extraction.c.dataset_id,
        extraction.c.model_id,
        extraction.c.item_id,
        postgresql_where=text(f"status = '{_status}'"),
    )
Index(
    "extraction_refused",
    extraction.c.dataset_id,
    extraction.c.model_id,
    extraction.c.item_id,
    postgresql_where=text("status IN ('failed', 'skipped')"),
)

embedding = Table(
    "embedding",
    metadata,
    Column("dataset_id", Integer, nullable=False),
    Column("model_id", SmallInteger, nullable=False),
    Column("item_id", BigInteger, nullable=False),
    Column("embedding", Vector(), nullable=False),
    PrimaryKeyConstraint("dataset_id", "model_id", "item_id"),
    postgresql_partition_by="LIST (model_id)",
)
"""Partitioned by model: `embstore.vectors` makes one partition for each, where the dimension is checked."""

face = Table(
    "face",
    metadata,
    Column("dataset_id", Integer, nullable=False),
    Column("model_id", SmallInteger, nullable=False),
    Column("item_id", BigInteger, nullable=False),
    Column("x", REAL, nullable=False, comment="pixels of the upright picture, from its left"),
    Column("y", REAL, nullable=False, comment="pixels of the upright picture, from its top"),
    Column("width", REAL, nullable=False),
    Column("height", REAL, nullable=False),
    Column("score", REAL, nullable=False, comment="how sure the detector is"),
    Column("faces", Integer, nullable=False, comment="how many it found; this is the largest"),
    PrimaryKeyConstraint("dataset_id", "model_id", "item_id"),
    comment="which face of a picture was embedded",
)
"""A table of its own and not columns of `extraction`: what has no face, all audio, writes nothing."""

speaker_change = Table(
    "speaker_change",
    metadata,
    Column("change_id", BigInteger, Identity(always=True), nullable=False),
    Column("dataset_id", Integer, nullable=False),
    Column("model_id", SmallInteger, nullable=False),
    Column("speaker", Text, nullable=False),
    PrimaryKeyConstraint("dataset_id", "model_id", "change_id"),
    comment="speakers whose utterances changed since their centroid was last considered",
)
"""Appended to by triggers, in the transaction of the change; emptied when centroids are brought up to date."""

centroid = Table(
    "centroid",
    metadata,
    Column("dataset_id", Integer, nullable=False),
    Column("model_id", SmallInteger, nullable=False),
    Column("centroid_id", BigInteger, Identity(always=True), nullable=False),
    Column("speaker", Text, nullable=False),
    *_queue_columns(),
    Column("average", Text, CheckConstraint("average IN ('mean', 'unit')", name="centroid_average"), nullable=False),
    Column("num_utterances", Integer),
    Column("cohesion", REAL, comment="mean cosine of the utterances to the centroid"),
    Column("lowest_item_id", BigInteger, comment="the utterance that is least like the centroid"),
    Column("lowest_cosine", REAL),
    Column("run_id", Integer),
    PrimaryKeyConstraint("dataset_id", "model_id", "centroid_id"),
    UniqueConstraint("dataset_id", "model_id", "speaker", name="centroid_speaker"),
    CheckConstraint(f"status IN {STATUSES}", name="centroid_status"),
    CheckConstraint("(error_code IS NOT NULL) = (status IN ('failed', 'skipped'))", name="centroid_reason"),
)
"""No index names the status, as `extraction` has them: so that updates of it need no new entry in any index."""

centroid_vector = Table(
    "centroid_vector",
    metadata,
    Column("dataset_id", Integer, nullable=False),
    Column("model_id", SmallInteger, nullable=False),
    Column("centroid_id", BigInteger, nullable=False),
    Column("embedding", Vector(), nullable=False),
    PrimaryKeyConstraint("dataset_id", "model_id", "centroid_id"),
)

boundary_run = Table(
    "boundary_run",
    metadata,
    Column("dataset_id", Integer, nullable=False),
    Column("model_id", SmallInteger, nullable=False),
    Column("boundary_run_id", Integer, Identity(always=True), nullable=False),
    *_queue_columns(),
    Column("method", Text, nullable=False),
    Column("parameters", JSONB, nullable=False, comment="what was asked for"),
    Column("found", JSONB, comment="what was chosen from the data, expected places, and notes"),
    Column("items", BigInteger, comment="positions of the dataset when it was read"),
    Column("embedded", BigInteger, comment="positions of them that had a vector"),
    _timestamp("created_at", nullable=False, server_default=func.now()),
    _timestamp("applied_at"),
    PrimaryKeyConstraint("dataset_id", "model_id", "boundary_run_id"),
    CheckConstraint(f"status IN {STATUSES}", name="boundary_run_status"),
    CheckConstraint("method IN ('auto', 'cosine', 'gmm')", name="boundary_run_method"),
    CheckConstraint("(error_code IS NOT NULL) = (status IN ('failed', 'skipped'))", name="boundary_run_reason"),
)

boundary = Table(
    "boundary",
    metadata,
    Column("dataset_id", Integer, nullable=False),
    Column("boundary_run_id", Integer, nullable=False),
    Column("position", BigInteger, nullable=False, comment="of the first item of the new speaker"),
    Column("score", REAL, nullable=False),
    Column("confidence", REAL, nullable=False),
    PrimaryKeyConstraint("dataset_id", "boundary_run_id", "position"),
)

segment = Table(
    "segment",
    metadata,
    Column("dataset_id", Integer, nullable=False),
    Column("boundary_run_id", Integer, nullable=False),
    Column("segment", Integer, nullable=False, comment="from 1, in order"),
    Column("first_position", BigInteger, nullable=False),
    Column("last_position", BigInteger, nullable=False),
    Column(
        "voice",
        Integer,
        nullable=False,
        comment="number of its voice, from 1: the segment, unless voices were merged",
    ),
    PrimaryKeyConstraint("dataset_id", "boundary_run_id", "segment"),
)

boundary_score = Table(
    "boundary_score",
    metadata,
    Column("dataset_id", Integer, nullable=False),
    Column("boundary_run_id", Integer, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("score", REAL, nullable=False, comment="1 - cosine of what lies before and from the position on"),
    PrimaryKeyConstraint("dataset_id", "boundary_run_id", "position"),
)

boundary_undo = Table(
    "boundary_undo",
    metadata,
    Column("dataset_id", Integer, nullable=False),
    Column("boundary_run_id", Integer, nullable=False),
    Column("item_id", BigInteger, nullable=False),
    Column("speaker", Text),
    PrimaryKeyConstraint("dataset_id", "boundary_run_id", "item_id"),
    comment="speaker labels from before a run was applied",
)
