"""Autovacuum by each table's own pace: vectors that were replaced are gone before they are a fifth of the table."""

from __future__ import annotations

from alembic import op

revision = "0013"
down_revision = "0012"

# By default it comes by when a fifth of a table is dead: of ten million vectors, two gigabytes, which every search by
# an index would wade through. The queues have had a share of their own from the start.
PACE = "autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05"
NAMES = "autovacuum_vacuum_scale_factor, autovacuum_analyze_scale_factor"
TABLES = ("item", "centroid_vector")

PARTITIONS = """
DO $$ DECLARE place regclass; BEGIN
    FOR place IN SELECT inhrelid FROM pg_inherits WHERE inhparent = 'embstore.embedding'::regclass LOOP
        EXECUTE format('ALTER TABLE %s {change}', place);
    END LOOP;
END $$;
"""

# The function as it is, with one statement more, whatever else other migrations have made of it.
BEFORE = "    PERFORM embstore.protect(place::regclass);"
STATEMENT = f"    EXECUTE format('ALTER TABLE %s SET ({PACE})', place);\n"
FUNCTION = """
DO $$ DECLARE
    made text := pg_get_functiondef('embstore.create_partition'::regproc);
    changed text := replace(made, $b${old}$b$, $a${new}$a$);
BEGIN
    ASSERT changed <> made;
    EXECUTE changed;
END $$;
"""


def upgrade() -> None:
    for table in TABLES:
        op.execute(f"ALTER TABLE embstore.{table} SET ({PACE})")
    op.execute(PARTITIONS.format(change=f"SET ({PACE})"))
    op.execute(FUNCTION.format(old=BEFORE, new=STATEMENT + BEFORE).replace(":", r"\:"))


def downgrade() -> None:
    op.execute(FUNCTION.format(old=STATEMENT + BEFORE, new=BEFORE).replace(":", r"\:"))
    op.execute(PARTITIONS.format(change=f"RESET ({NAMES})"))
    for table in TABLES:
        op.execute(f"ALTER TABLE embstore.{table} RESET ({NAMES})")
