"""Which face of a picture was embedded."""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"

TABLE = """
CREATE TABLE embstore.face (
    dataset_id integer NOT NULL,
    model_id smallint NOT NULL,
    item_id bigint NOT NULL,
    x real NOT NULL,
    y real NOT NULL,
    width real NOT NULL,
    height real NOT NULL,
    score real NOT NULL,
    faces integer NOT NULL,
    PRIMARY KEY (dataset_id, model_id, item_id)
);
COMMENT ON TABLE embstore.face IS 'which face of a picture was embedded';
COMMENT ON COLUMN embstore.face.x IS 'pixels of the upright picture, from its left';
COMMENT ON COLUMN embstore.face.y IS 'pixels of the upright picture, from its top';
COMMENT ON COLUMN embstore.face.score IS 'how sure the detector is';
COMMENT ON COLUMN embstore.face.faces IS 'how many it found; this is the largest';
"""

CASCADE = """
CREATE FUNCTION embstore.delete_faces() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    DELETE FROM embstore.face f USING gone
    WHERE f.dataset_id = gone.dataset_id AND f.model_id = gone.model_id AND f.item_id = gone.item_id;
    RETURN NULL;
END $$;
CREATE TRIGGER delete_faces AFTER DELETE ON embstore.extraction REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION embstore.delete_faces();
"""

VIEW = """
CREATE VIEW embstore.faces WITH (security_invoker) AS
    SELECT d.name AS dataset, m.name AS model, f.item_id, i.position, i.path, i.speaker,
        f.x, f.y, f.width, f.height, f.score, f.faces
    FROM embstore.face f
    JOIN embstore.item i USING (dataset_id, item_id)
    JOIN embstore.dataset d USING (dataset_id)
    JOIN embstore.model m USING (model_id);
"""


def upgrade() -> None:
    for part in (TABLE, CASCADE, VIEW):
        op.execute(part)


def downgrade() -> None:
    op.execute("""
    DROP VIEW embstore.faces;
    DROP TRIGGER delete_faces ON embstore.extraction;
    DROP FUNCTION embstore.delete_faces;
    DROP TABLE embstore.face;
    """)
