"""A model's recipe in the database, so that whoever embeds with it only types its name."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("""
    ALTER TABLE embstore.model ADD COLUMN family text, ADD COLUMN options jsonb,
        ADD CONSTRAINT model_recipe CHECK ((family IS NULL) = (options IS NULL));
    COMMENT ON COLUMN embstore.model.family IS 'entry in the group embstore.models that makes it; null: not known';
    COMMENT ON COLUMN embstore.model.options IS 'what the family makes it of';
    """)


def downgrade() -> None:
    op.execute("ALTER TABLE embstore.model DROP COLUMN family, DROP COLUMN options")
