"""Datasets, items, models, the extraction queue, embeddings, and the views for people."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None

CATALOGUE = """
CREATE TABLE embstore.dataset (
    dataset_id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE,
    media text NOT NULL CONSTRAINT dataset_media CHECK (media IN ('audio', 'image')),
    root text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE embstore.model (
    model_id smallint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE,
    media text NOT NULL CONSTRAINT model_media CHECK (media IN ('audio', 'image')),
    dim integer NOT NULL CONSTRAINT model_dim CHECK (dim > 0),
    fingerprint text NOT NULL,
    settings jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE embstore.run (
    run_id integer GENERATED ALWAYS AS IDENTITY,
    dataset_id integer NOT NULL REFERENCES embstore.dataset ON DELETE CASCADE,
    model_id smallint NOT NULL REFERENCES embstore.model ON DELETE CASCADE,
    command text NOT NULL,
    parameters jsonb NOT NULL,
    role text NOT NULL DEFAULT CURRENT_USER,
    host text NOT NULL,
    version text NOT NULL,
    status text NOT NULL DEFAULT 'running'
        CONSTRAINT run_status CHECK (status IN ('running', 'done', 'interrupted', 'failed')),
    counts jsonb NOT NULL DEFAULT '{}',
    started_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    PRIMARY KEY (dataset_id, run_id)
);
CREATE TABLE embstore.lease (
    token bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    worker text NOT NULL,
    expires_at timestamptz NOT NULL
);
CREATE TABLE embstore.item (
    dataset_id integer NOT NULL,
    item_id bigint GENERATED ALWAYS AS IDENTITY,
    position bigint NOT NULL,
    path text NOT NULL,
    start double precision,
    duration double precision,
    speaker text,
    size bigint,
    mtime_ns bigint,
    vanished_at timestamptz,
    PRIMARY KEY (dataset_id, item_id),
    CONSTRAINT item_path_start UNIQUE NULLS NOT DISTINCT (dataset_id, path, start)
);
CREATE INDEX item_speaker ON embstore.item (dataset_id, speaker);
"""

# Every claim and every result rewrites a row of the queue, so autovacuum has to come by after a share of the rows
# that is small even for a large table; otherwise claims would wade through dead index entries.
QUEUE = """
CREATE TABLE embstore.extraction (
    dataset_id integer NOT NULL,
    model_id smallint NOT NULL,
    item_id bigint NOT NULL,
    status text NOT NULL DEFAULT 'pending'
        CONSTRAINT extraction_status CHECK (status IN ('pending', 'running', 'done', 'failed', 'skipped')),
    attempts smallint NOT NULL DEFAULT 0,
    claim_token bigint,
    error_code text,
    error text,
    finished_at timestamptz,
    PRIMARY KEY (dataset_id, model_id, item_id),
    CONSTRAINT extraction_reason CHECK ((error_code IS NOT NULL) = (status IN ('failed', 'skipped')))
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);
CREATE INDEX extraction_pending ON embstore.extraction (dataset_id, model_id, item_id) WHERE status = 'pending';
CREATE INDEX extraction_running ON embstore.extraction (dataset_id, model_id, item_id) WHERE status = 'running';
CREATE INDEX extraction_refused ON embstore.extraction (dataset_id, model_id, item_id)
    WHERE status IN ('failed', 'skipped');
"""

EMBEDDINGS = """
CREATE TABLE embstore.embedding (
    dataset_id integer NOT NULL,
    model_id smallint NOT NULL,
    item_id bigint NOT NULL,
    embedding vector NOT NULL,
    PRIMARY KEY (dataset_id, model_id, item_id)
) PARTITION BY LIST (model_id);
"""

# What belongs to a deleted row goes with it, by one statement for all rows. Foreign keys would do it too, but they are
# checked row by row on every insert, and made registering six times as slow; here the rows of a bulk insert come from
# a SELECT of their parents under the dataset's lock, so there is nothing to check.
CASCADES = """
CREATE FUNCTION embstore.delete_items() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    DELETE FROM embstore.item i USING gone WHERE i.dataset_id = gone.dataset_id;
    RETURN NULL;
END $$;
CREATE FUNCTION embstore.delete_extractions() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    DELETE FROM embstore.extraction x USING gone WHERE x.dataset_id = gone.dataset_id AND x.item_id = gone.item_id;
    RETURN NULL;
END $$;
CREATE FUNCTION embstore.delete_embeddings() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    DELETE FROM embstore.embedding e USING gone
    WHERE e.dataset_id = gone.dataset_id AND e.model_id = gone.model_id AND e.item_id = gone.item_id;
    RETURN NULL;
END $$;
CREATE TRIGGER delete_items AFTER DELETE ON embstore.dataset REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION embstore.delete_items();
CREATE TRIGGER delete_extractions AFTER DELETE ON embstore.item REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION embstore.delete_extractions();
CREATE TRIGGER delete_embeddings AFTER DELETE ON embstore.extraction REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION embstore.delete_embeddings();
"""

VIEWS = """
CREATE VIEW embstore.progress WITH (security_invoker) AS
    SELECT d.name AS dataset, m.name AS model, e.status, e.items
    FROM (SELECT dataset_id, model_id, status, count(*) AS items
          FROM embstore.extraction GROUP BY dataset_id, model_id, status) e
    JOIN embstore.dataset d USING (dataset_id)
    JOIN embstore.model m USING (model_id);
CREATE VIEW embstore.failures WITH (security_invoker) AS
    SELECT d.name AS dataset, m.name AS model, i.path, i.start, e.status, e.error_code, e.error, e.attempts,
           e.finished_at
    FROM embstore.extraction e
    JOIN embstore.item i USING (dataset_id, item_id)
    JOIN embstore.dataset d USING (dataset_id)
    JOIN embstore.model m USING (model_id)
    WHERE e.status IN ('failed', 'skipped');
CREATE VIEW embstore.items WITH (security_invoker) AS
    SELECT d.name AS dataset, i.item_id, i.position, i.path, i.start, i.duration, i.speaker, i.size, i.vanished_at
    FROM embstore.item i JOIN embstore.dataset d USING (dataset_id);
"""

COMMENTS = """
COMMENT ON COLUMN embstore.dataset.root IS 'absolute folder that the paths of the items are relative to';
COMMENT ON COLUMN embstore.model.fingerprint IS 'hash of weights and settings';
COMMENT ON COLUMN embstore.model.settings IS 'preprocessing and other facts, for people';
COMMENT ON COLUMN embstore.run.version IS 'of embstore';
COMMENT ON COLUMN embstore.lease.worker IS 'host:pid';
COMMENT ON COLUMN embstore.lease.expires_at IS 'by the clock of the server';
COMMENT ON COLUMN embstore.item.position IS 'place in the order of the dataset, from 0 without gaps';
COMMENT ON COLUMN embstore.item.path IS 'relative to the root of the dataset';
COMMENT ON COLUMN embstore.item.start IS 'seconds; null: the whole file';
COMMENT ON COLUMN embstore.item.duration IS 'seconds; null: to the end';
COMMENT ON COLUMN embstore.item.size IS 'bytes, when it was registered; null: was not there';
COMMENT ON COLUMN embstore.item.vanished_at IS 'when a scan no longer found it';
COMMENT ON COLUMN embstore.extraction.attempts IS 'counted when claimed';
COMMENT ON COLUMN embstore.extraction.claim_token IS 'lease of the worker that has it, or that finished it';
"""

# Whoever migrates is the one who types queries on a private server: the views are found without a prefix.
SEARCH_PATH = """
DO $$ BEGIN
    EXECUTE format('ALTER ROLE %I IN DATABASE %I SET search_path = public, embstore',
                   current_user, current_database());
END $$;
"""


def upgrade() -> None:
    for part in (CATALOGUE, QUEUE, EMBEDDINGS, CASCADES, VIEWS, COMMENTS, SEARCH_PATH):
        op.execute(part)


def downgrade() -> None:
    op.execute("""
    DO $$ DECLARE name text; BEGIN
        FOR name IN SELECT viewname FROM pg_views WHERE schemaname = 'embstore' LOOP
            EXECUTE format('DROP VIEW embstore.%I', name);
        END LOOP;
        EXECUTE format('ALTER ROLE %I IN DATABASE %I RESET search_path', current_user, current_database());
    END $$;
    DROP TABLE embstore.embedding, embstore.extraction, embstore.item, embstore.lease, embstore.run, embstore.model,
        embstore.dataset;
    DROP FUNCTION embstore.delete_items, embstore.delete_extractions, embstore.delete_embeddings;
    """)
