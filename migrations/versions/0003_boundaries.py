"""Speaker boundaries in ordered sets: runs, boundaries, segments, and the score at every position."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"

TABLES = """
CREATE INDEX item_position ON embstore.item (dataset_id, position);
CREATE TABLE embstore.boundary_run (
    dataset_id integer NOT NULL,
    model_id smallint NOT NULL,
    boundary_run_id integer GENERATED ALWAYS AS IDENTITY,
    status text NOT NULL DEFAULT 'pending'
        CONSTRAINT boundary_run_status CHECK (status IN ('pending', 'running', 'done', 'failed', 'skipped')),
    attempts smallint NOT NULL DEFAULT 0,
    claim_token bigint,
    error_code text,
    error text,
    finished_at timestamptz,
    method text NOT NULL CONSTRAINT boundary_run_method CHECK (method IN ('auto', 'cosine', 'gmm')),
    parameters jsonb NOT NULL,
    found jsonb,
    items bigint,
    embedded bigint,
    created_at timestamptz NOT NULL DEFAULT now(),
    applied_at timestamptz,
    PRIMARY KEY (dataset_id, model_id, boundary_run_id),
    CONSTRAINT boundary_run_reason CHECK ((error_code IS NOT NULL) = (status IN ('failed', 'skipped')))
);
COMMENT ON COLUMN embstore.boundary_run.parameters IS 'what was asked for';
COMMENT ON COLUMN embstore.boundary_run.found IS 'what was chosen from the data, expected places, and notes';
COMMENT ON COLUMN embstore.boundary_run.items IS 'positions of the dataset when it was read';
COMMENT ON COLUMN embstore.boundary_run.embedded IS 'positions of them that had a vector';
COMMENT ON COLUMN embstore.boundary_run.attempts IS 'counted when claimed';
COMMENT ON COLUMN embstore.boundary_run.claim_token IS 'lease of the worker that has it, or that finished it';
CREATE TABLE embstore.boundary (
    dataset_id integer NOT NULL,
    boundary_run_id integer NOT NULL,
    position bigint NOT NULL,
    score real NOT NULL,
    confidence real NOT NULL,
    PRIMARY KEY (dataset_id, boundary_run_id, position)
);
COMMENT ON COLUMN embstore.boundary.position IS 'of the first item of the new speaker';
CREATE TABLE embstore.segment (
    dataset_id integer NOT NULL,
    boundary_run_id integer NOT NULL,
    segment integer NOT NULL,
    first_position bigint NOT NULL,
    last_position bigint NOT NULL,
    voice integer NOT NULL,
    PRIMARY KEY (dataset_id, boundary_run_id, segment)
);
COMMENT ON COLUMN embstore.segment.segment IS 'from 1, in order';
COMMENT ON COLUMN embstore.segment.voice IS 'number of its voice, from 1: the segment, unless voices were merged';
CREATE TABLE embstore.boundary_score (
    dataset_id integer NOT NULL,
    boundary_run_id integer NOT NULL,
    position bigint NOT NULL,
    score real NOT NULL,
    PRIMARY KEY (dataset_id, boundary_run_id, position)
);
COMMENT ON COLUMN embstore.boundary_score.score IS '1 - cosine of what lies before and from the position on';
CREATE TABLE embstore.boundary_undo (
    dataset_id integer NOT NULL,
    boundary_run_id integer NOT NULL,
    item_id bigint NOT NULL,
    speaker text,
    PRIMARY KEY (dataset_id, boundary_run_id, item_id)
);
COMMENT ON TABLE embstore.boundary_undo IS 'speaker labels from before a run was applied';
"""

CASCADES = """
CREATE FUNCTION embstore.delete_boundaries() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    DELETE FROM embstore.boundary b USING gone
    WHERE b.dataset_id = gone.dataset_id AND b.boundary_run_id = gone.boundary_run_id;
    DELETE FROM embstore.segment s USING gone
    WHERE s.dataset_id = gone.dataset_id AND s.boundary_run_id = gone.boundary_run_id;
    DELETE FROM embstore.boundary_score s USING gone
    WHERE s.dataset_id = gone.dataset_id AND s.boundary_run_id = gone.boundary_run_id;
    DELETE FROM embstore.boundary_undo u USING gone
    WHERE u.dataset_id = gone.dataset_id AND u.boundary_run_id = gone.boundary_run_id;
    RETURN NULL;
END $$;
CREATE TRIGGER delete_boundaries AFTER DELETE ON embstore.boundary_run REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION embstore.delete_boundaries();
CREATE FUNCTION embstore.delete_boundary_runs() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    DELETE FROM embstore.boundary_run r USING gone WHERE r.dataset_id = gone.dataset_id;
    RETURN NULL;
END $$;
CREATE TRIGGER delete_boundary_runs AFTER DELETE ON embstore.dataset REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION embstore.delete_boundary_runs();
"""

VIEWS = """
CREATE VIEW embstore.boundary_runs WITH (security_invoker) AS
    SELECT r.boundary_run_id AS run, d.name AS dataset, m.name AS model, r.method, r.parameters, r.found, r.status,
        r.error, r.items, r.embedded, r.created_at, r.finished_at, r.applied_at
    FROM embstore.boundary_run r
    JOIN embstore.dataset d USING (dataset_id)
    JOIN embstore.model m USING (model_id);
CREATE VIEW embstore.boundaries WITH (security_invoker) AS
    SELECT b.boundary_run_id AS run, d.name AS dataset, b.position, i.path, b.score, b.confidence
    FROM embstore.boundary b
    JOIN embstore.dataset d USING (dataset_id)
    LEFT JOIN embstore.item i USING (dataset_id, position);
CREATE VIEW embstore.segments WITH (security_invoker) AS
    SELECT s.boundary_run_id AS run, d.name AS dataset, s.segment, s.first_position, s.last_position,
        s.last_position - s.first_position + 1 AS items, s.voice
    FROM embstore.segment s
    JOIN embstore.dataset d USING (dataset_id);
CREATE VIEW embstore.boundary_scores WITH (security_invoker) AS
    SELECT s.boundary_run_id AS run, d.name AS dataset, s.position, s.score
    FROM embstore.boundary_score s
    JOIN embstore.dataset d USING (dataset_id);
"""


def upgrade() -> None:
    for part in (TABLES, CASCADES, VIEWS):
        op.execute(part)


def downgrade() -> None:
    op.execute("""
    DROP VIEW embstore.boundary_scores, embstore.segments, embstore.boundaries, embstore.boundary_runs;
    DROP TRIGGER delete_boundary_runs ON embstore.dataset;
    DROP TABLE embstore.boundary_undo, embstore.boundary_score, embstore.segment, embstore.boundary,
        embstore.boundary_run;
    DROP FUNCTION embstore.delete_boundary_runs, embstore.delete_boundaries;
    DROP INDEX embstore.item_position;
    """)
