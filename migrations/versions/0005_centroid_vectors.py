"""The vectors of centroids in a table of their own: the status is never on a row that holds a vector."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"

# Every claim and every result rewrites a row of the queue, and with the vector in it that was a kilobyte each time; all
# looks at the queue read through the vectors, too. A vector stays in the row where pgvector's own storage would push it
# out of line, so that reading many is one pass over the table.
TABLE = """
CREATE TABLE embstore.centroid_vector (
    dataset_id integer NOT NULL,
    model_id smallint NOT NULL,
    centroid_id bigint NOT NULL,
    embedding vector NOT NULL,
    PRIMARY KEY (dataset_id, model_id, centroid_id)
) WITH (toast_tuple_target = 8160);
"""

CASCADE = """
CREATE FUNCTION embstore.delete_centroids() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    DELETE FROM embstore.centroid_vector v USING gone
    WHERE v.dataset_id = gone.dataset_id AND v.model_id = gone.model_id AND v.centroid_id = gone.centroid_id;
    RETURN NULL;
END $$;
CREATE TRIGGER delete_centroids AFTER DELETE ON embstore.centroid REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION embstore.delete_centroids();
"""

# CLUSTER writes the table anew, which gives back the room of the old vectors.
MOVE = """
INSERT INTO embstore.centroid_vector (dataset_id, model_id, centroid_id, embedding)
SELECT dataset_id, model_id, centroid_id, embedding FROM embstore.centroid WHERE embedding IS NOT NULL
ORDER BY dataset_id, model_id, centroid_id;
{replace}
ALTER TABLE embstore.centroid DROP COLUMN embedding;
CLUSTER embstore.centroid USING centroid_pkey;
ALTER TABLE embstore.centroid SET WITHOUT CLUSTER;
"""
MOVE_BACK = """
ALTER TABLE embstore.centroid ADD COLUMN embedding vector;
UPDATE embstore.centroid c SET embedding = v.embedding FROM embstore.centroid_vector v
WHERE v.dataset_id = c.dataset_id AND v.model_id = c.model_id AND v.centroid_id = c.centroid_id;
"""

# Replaced, not dropped: somebody may have made a view of their own on it.
VIEW = """
CREATE OR REPLACE VIEW embstore.speaker_centroids WITH (security_invoker) AS
    SELECT d.name AS dataset, m.name AS model, c.speaker, c.status, c.num_utterances, c.average, {v}.embedding,
        c.cohesion, c.lowest_item_id, c.lowest_cosine,
        (SELECT count(*) FROM embstore.item i JOIN embstore.extraction x USING (dataset_id, item_id)
         WHERE i.dataset_id = c.dataset_id AND i.speaker = c.speaker AND x.model_id = c.model_id
             AND x.status IN ('failed', 'skipped')) AS failed_utterances,
        (SELECT avg(v) FROM unnest({v}.embedding::real[]) v) AS value_mean,
        (SELECT stddev_pop(v) FROM unnest({v}.embedding::real[]) v) AS value_std,
        (SELECT min(v) FROM unnest({v}.embedding::real[]) v) AS value_min,
        (SELECT max(v) FROM unnest({v}.embedding::real[]) v) AS value_max,
        c.status IN ('pending', 'running') OR (c.status = 'failed' AND {v}.embedding IS NOT NULL) OR EXISTS (
            SELECT FROM embstore.speaker_change g WHERE g.dataset_id = c.dataset_id AND g.model_id = c.model_id
                AND g.speaker = c.speaker) AS stale,
        c.error_code, c.error, c.finished_at, c.run_id
    FROM embstore.centroid c
    {join}
    JOIN embstore.dataset d USING (dataset_id)
    JOIN embstore.model m USING (model_id);
"""

OUTLIERS = """
CREATE OR REPLACE FUNCTION embstore.outlier_utterances(dataset text, model text, k integer DEFAULT 10)
RETURNS TABLE (path text, speaker text, cosine double precision)
LANGUAGE sql STABLE SET search_path = public, embstore, pg_temp AS $$
    SELECT i.path, i.speaker, 1 - (e.embedding <=> {v}.embedding)
    FROM embstore.dataset d
    CROSS JOIN embstore.model m
    JOIN embstore.centroid c ON c.dataset_id = d.dataset_id AND c.model_id = m.model_id{with_vector}
    JOIN embstore.item i ON i.dataset_id = d.dataset_id AND i.speaker = c.speaker
    JOIN embstore.embedding e ON e.dataset_id = d.dataset_id AND e.model_id = m.model_id AND e.item_id = i.item_id
    WHERE d.name = $1 AND m.name = $2
    ORDER BY e.embedding <=> {v}.embedding DESC LIMIT $3
$$;
"""


def _readers(*, in_row: bool) -> str:
    """What reads centroids, with the vector in the row or beside it."""
    if in_row:
        view = VIEW.format(v="c", join="")
        return view + OUTLIERS.format(v="c", with_vector=" AND c.embedding IS NOT NULL")
    view = VIEW.format(v="w", join="LEFT JOIN embstore.centroid_vector w USING (dataset_id, model_id, centroid_id)")
    with_vector = """
    JOIN embstore.centroid_vector w
        ON w.dataset_id = d.dataset_id AND w.model_id = m.model_id AND w.centroid_id = c.centroid_id"""
    return view + OUTLIERS.format(v="w", with_vector=with_vector)


def upgrade() -> None:
    for part in (TABLE, CASCADE, MOVE.format(replace=_readers(in_row=False))):
        op.execute(part.replace(":", r"\:"))


def downgrade() -> None:
    for part in (MOVE_BACK, _readers(in_row=True)):
        op.execute(part.replace(":", r"\:"))
    op.execute("""
    DROP TRIGGER delete_centroids ON embstore.centroid;
    DROP FUNCTION embstore.delete_centroids;
    DROP TABLE embstore.centroid_vector;
    """)
