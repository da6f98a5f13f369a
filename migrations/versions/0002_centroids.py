"""Speaker centroids, and the log of what changed since they were computed."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"

TABLES = """
CREATE TABLE embstore.speaker_change (
    change_id bigint GENERATED ALWAYS AS IDENTITY,
    dataset_id integer NOT NULL,
    model_id smallint NOT NULL,
    speaker text NOT NULL,
    PRIMARY KEY (dataset_id, model_id, change_id)
);
CREATE TABLE embstore.centroid (
    dataset_id integer NOT NULL,
    model_id smallint NOT NULL,
    centroid_id bigint GENERATED ALWAYS AS IDENTITY,
    speaker text NOT NULL,
    status text NOT NULL DEFAULT 'pending'
        CONSTRAINT centroid_status CHECK (status IN ('pending', 'running', 'done', 'failed', 'skipped')),
    attempts smallint NOT NULL DEFAULT 0,
    claim_token bigint,
    error_code text,
    error text,
    finished_at timestamptz,
    average text NOT NULL CONSTRAINT centroid_average CHECK (average IN ('mean', 'unit')),
    embedding vector,
    num_utterances integer,
    cohesion real,
    lowest_item_id bigint,
    lowest_cosine real,
    run_id integer,
    PRIMARY KEY (dataset_id, model_id, centroid_id),
    CONSTRAINT centroid_speaker UNIQUE (dataset_id, model_id, speaker),
    CONSTRAINT centroid_reason CHECK ((error_code IS NOT NULL) = (status IN ('failed', 'skipped')))
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);
CREATE INDEX centroid_pending ON embstore.centroid (dataset_id, model_id, centroid_id) WHERE status = 'pending';
CREATE INDEX centroid_running ON embstore.centroid (dataset_id, model_id, centroid_id) WHERE status = 'running';
COMMENT ON TABLE embstore.speaker_change IS
    'speakers whose utterances changed since their centroid was last considered';
COMMENT ON COLUMN embstore.centroid.cohesion IS 'mean cosine of the utterances to the centroid';
COMMENT ON COLUMN embstore.centroid.lowest_item_id IS 'the utterance that is least like the centroid';
COMMENT ON COLUMN embstore.centroid.attempts IS 'counted when claimed';
COMMENT ON COLUMN embstore.centroid.claim_token IS 'lease of the worker that has it, or that finished it';
"""

# The log is only ever appended to, by the transaction that makes the change: no writer waits for another, and whoever
# takes a row out knows that its change is committed. A mark on the centroid itself would be a lock that all workers who
# write utterances of one speaker fight over.
TRIGGERS = """
CREATE FUNCTION embstore.note_extractions() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    -- Nothing updates what is done but to undo it, so the two need not be held against each other.
    INSERT INTO embstore.speaker_change (dataset_id, model_id, speaker)
    SELECT DISTINCT c.dataset_id, c.model_id, i.speaker
    FROM (SELECT dataset_id, model_id, item_id FROM now_there WHERE status = 'done'
          UNION ALL SELECT dataset_id, model_id, item_id FROM before_it WHERE status = 'done') c
    JOIN embstore.item i USING (dataset_id, item_id)
    WHERE i.speaker IS NOT NULL;
    RETURN NULL;
END $$;
CREATE TRIGGER note_extractions AFTER UPDATE ON embstore.extraction
    REFERENCING OLD TABLE AS before_it NEW TABLE AS now_there
    FOR EACH STATEMENT EXECUTE FUNCTION embstore.note_extractions();

CREATE FUNCTION embstore.note_items() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO embstore.speaker_change (dataset_id, model_id, speaker)
    SELECT DISTINCT r.dataset_id, x.model_id, s.speaker
    FROM (SELECT n.dataset_id, n.item_id, ARRAY[o.speaker, n.speaker] AS speakers
          FROM now_there n JOIN before_it o USING (dataset_id, item_id)
          WHERE n.speaker IS DISTINCT FROM o.speaker) r
    JOIN embstore.extraction x USING (dataset_id, item_id)
    CROSS JOIN LATERAL unnest(r.speakers) AS s (speaker)
    WHERE x.status = 'done' AND s.speaker IS NOT NULL;
    RETURN NULL;
END $$;
CREATE TRIGGER note_items AFTER UPDATE ON embstore.item
    REFERENCING OLD TABLE AS before_it NEW TABLE AS now_there
    FOR EACH STATEMENT EXECUTE FUNCTION embstore.note_items();

CREATE OR REPLACE FUNCTION embstore.delete_extractions() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO embstore.speaker_change (dataset_id, model_id, speaker)
    SELECT DISTINCT dataset_id, x.model_id, gone.speaker
    FROM gone JOIN embstore.extraction x USING (dataset_id, item_id)
    WHERE x.status = 'done' AND gone.speaker IS NOT NULL AND EXISTS (
        SELECT FROM embstore.dataset d WHERE d.dataset_id = gone.dataset_id);
    DELETE FROM embstore.extraction x USING gone WHERE x.dataset_id = gone.dataset_id AND x.item_id = gone.item_id;
    RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION embstore.delete_items() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    DELETE FROM embstore.item i USING gone WHERE i.dataset_id = gone.dataset_id;
    DELETE FROM embstore.centroid c USING gone WHERE c.dataset_id = gone.dataset_id;
    DELETE FROM embstore.speaker_change c USING gone WHERE c.dataset_id = gone.dataset_id;
    RETURN NULL;
END $$;

-- Where items were deleted this finds none: they have been noted already.
CREATE OR REPLACE FUNCTION embstore.delete_embeddings() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO embstore.speaker_change (dataset_id, model_id, speaker)
    SELECT DISTINCT gone.dataset_id, gone.model_id, i.speaker
    FROM gone JOIN embstore.item i USING (dataset_id, item_id)
    WHERE gone.status = 'done' AND i.speaker IS NOT NULL;
    DELETE FROM embstore.embedding e USING gone
    WHERE e.dataset_id = gone.dataset_id AND e.model_id = gone.model_id AND e.item_id = gone.item_id;
    RETURN NULL;
END $$;

INSERT INTO embstore.speaker_change (dataset_id, model_id, speaker)
SELECT DISTINCT x.dataset_id, x.model_id, i.speaker
FROM embstore.extraction x JOIN embstore.item i USING (dataset_id, item_id)
WHERE x.status = 'done' AND i.speaker IS NOT NULL;
"""

# The statistics of the vector's values and the failed utterances cost nothing until they are asked for, and are never
# out of date.
VIEW = """
CREATE VIEW embstore.speaker_centroids WITH (security_invoker) AS
    SELECT d.name AS dataset, m.name AS model, c.speaker, c.status, c.num_utterances, c.average, c.embedding,
        c.cohesion, c.lowest_item_id, c.lowest_cosine,
        (SELECT count(*) FROM embstore.item i JOIN embstore.extraction x USING (dataset_id, item_id)
         WHERE i.dataset_id = c.dataset_id AND i.speaker = c.speaker AND x.model_id = c.model_id
             AND x.status IN ('failed', 'skipped')) AS failed_utterances,
        (SELECT avg(v) FROM unnest(c.embedding::real[]) v) AS value_mean,
        (SELECT stddev_pop(v) FROM unnest(c.embedding::real[]) v) AS value_std,
        (SELECT min(v) FROM unnest(c.embedding::real[]) v) AS value_min,
        (SELECT max(v) FROM unnest(c.embedding::real[]) v) AS value_max,
        c.status IN ('pending', 'running') OR (c.status = 'failed' AND c.embedding IS NOT NULL) OR EXISTS (
            SELECT FROM embstore.speaker_change g WHERE g.dataset_id = c.dataset_id AND g.model_id = c.model_id
                AND g.speaker = c.speaker) AS stale,
        c.error_code, c.error, c.finished_at, c.run_id
    FROM embstore.centroid c
    JOIN embstore.dataset d USING (dataset_id)
    JOIN embstore.model m USING (model_id);
"""

FUNCTIONS = """
CREATE FUNCTION embstore.nearest_speakers(dataset text, speaker text, model text, k integer DEFAULT 10)
RETURNS TABLE (other_dataset text, other_speaker text, cosine double precision)
LANGUAGE sql STABLE SET search_path = public, embstore, pg_temp AS $$
    SELECT o.dataset, o.speaker, 1 - (o.embedding <=> c.embedding)
    FROM embstore.speaker_centroids c
    JOIN embstore.speaker_centroids o ON o.model = c.model AND (o.dataset, o.speaker) <> (c.dataset, c.speaker)
    WHERE c.dataset = $1 AND c.speaker = $2 AND c.model = $3 AND o.embedding IS NOT NULL AND c.embedding IS NOT NULL
    ORDER BY o.embedding <=> c.embedding LIMIT $4
$$;
COMMENT ON FUNCTION embstore.nearest_speakers IS 'the k speakers, of any dataset, whose centroids are nearest to one';

CREATE FUNCTION embstore.outlier_utterances(dataset text, model text, k integer DEFAULT 10)
RETURNS TABLE (path text, speaker text, cosine double precision)
LANGUAGE sql STABLE SET search_path = public, embstore, pg_temp AS $$
    SELECT i.path, i.speaker, 1 - (e.embedding <=> c.embedding)
    FROM embstore.dataset d
    CROSS JOIN embstore.model m
    JOIN embstore.centroid c ON c.dataset_id = d.dataset_id AND c.model_id = m.model_id AND c.embedding IS NOT NULL
    JOIN embstore.item i ON i.dataset_id = d.dataset_id AND i.speaker = c.speaker
    JOIN embstore.embedding e ON e.dataset_id = d.dataset_id AND e.model_id = m.model_id AND e.item_id = i.item_id
    WHERE d.name = $1 AND m.name = $2
    ORDER BY e.embedding <=> c.embedding DESC LIMIT $3
$$;
COMMENT ON FUNCTION embstore.outlier_utterances IS
    'the k utterances that lie farthest from the centroid of their speaker';

CREATE FUNCTION embstore.similar_speakers(dataset text, model text, threshold double precision)
RETURNS TABLE (speaker text, other_speaker text, cosine double precision)
LANGUAGE sql STABLE SET search_path = public, embstore, pg_temp AS $$
    SELECT a.speaker, b.speaker, 1 - (a.embedding <=> b.embedding)
    FROM embstore.speaker_centroids a
    JOIN embstore.speaker_centroids b ON b.dataset = a.dataset AND b.model = a.model AND b.speaker > a.speaker
    WHERE a.dataset = $1 AND a.model = $2 AND 1 - (a.embedding <=> b.embedding) >= $3
    ORDER BY a.embedding <=> b.embedding
$$;
COMMENT ON FUNCTION embstore.similar_speakers IS
    'pairs of speakers whose centroids have at least this cosine similarity';
"""


def upgrade() -> None:
    for part in (TABLES, TRIGGERS, VIEW, FUNCTIONS):
        op.execute(part.replace(":", r"\:"))


def downgrade() -> None:
    op.execute(r"""
    DROP FUNCTION embstore.nearest_speakers, embstore.outlier_utterances, embstore.similar_speakers;
    DROP VIEW embstore.speaker_centroids;
    DROP TRIGGER note_extractions ON embstore.extraction;
    DROP TRIGGER note_items ON embstore.item;
    DROP FUNCTION embstore.note_extractions, embstore.note_items;
    DROP TABLE embstore.centroid, embstore.speaker_change;
    CREATE OR REPLACE FUNCTION embstore.delete_extractions() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        DELETE FROM embstore.extraction x USING gone WHERE x.dataset_id = gone.dataset_id AND x.item_id = gone.item_id;
        RETURN NULL;
    END $$;
    CREATE OR REPLACE FUNCTION embstore.delete_items() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        DELETE FROM embstore.item i USING gone WHERE i.dataset_id = gone.dataset_id;
        RETURN NULL;
    END $$;
    CREATE OR REPLACE FUNCTION embstore.delete_embeddings() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        DELETE FROM embstore.embedding e USING gone
        WHERE e.dataset_id = gone.dataset_id AND e.model_id = gone.model_id AND e.item_id = gone.item_id;
        RETURN NULL;
    END $$;
    """)
