"""Where there are teams, no statistics of names: EXPLAIN shows everybody what the planner makes of them.

They hold the most frequent values of a column and some hundred others as bounds, of everybody's rows, and PostgreSQL
uses them for comparisons that it trusts: asked letter by letter, EXPLAIN told the names of another team's speakers.
"""

from __future__ import annotations

from alembic import op

revision = "0015"
down_revision = "0014"

# Status is no name, and claims are planned by it. Of how many different values there are, the planner takes from here
# what any corpus has, where the server (18 or later) lets that be said; elsewhere it supposes 200. A table's old
# statistics cannot be taken away by a plain owner before 18; a superuser's come away.
HIDE = """
CREATE FUNCTION embstore.hide_names() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    place name;
    field name;
    stale boolean;
    different real;
BEGIN
    FOR place, field, stale, different IN
        SELECT c.relname, a.attname, coalesce(a.attstattarget, -1) <> 0,
            CASE WHEN a.attname = 'path' OR a.attname = 'speaker' AND c.relname = 'centroid' THEN -1
                WHEN a.attname = 'speaker' THEN -0.02 END
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relnamespace = 'embstore'::regnamespace AND c.relkind IN ('r', 'p') AND c.relrowsecurity
            AND a.attnum > 0 AND NOT a.attisdropped AND a.atttypid = 'text'::regtype AND a.attname <> 'status'
    LOOP
        IF stale THEN
            EXECUTE format('ALTER TABLE embstore.%I ALTER %I SET STATISTICS 0', place, field);
        END IF;
        IF current_setting('server_version_num')::integer >= 180000 THEN
            EXECUTE 'SELECT pg_clear_attribute_stats(''embstore'', $1, $2, false)' USING place::text, field::text;
            IF different IS NOT NULL THEN
                EXECUTE 'SELECT pg_restore_attribute_stats(''schemaname'', ''embstore'', ''relname'', $1,
                    ''attname'', $2, ''inherited'', false, ''null_frac'', 0::real, ''avg_width'', 24,
                    ''n_distinct'', $3)' USING place::text, field::text, different;
            END IF;
        ELSIF (SELECT rolsuper FROM pg_roles WHERE rolname = CURRENT_USER) THEN
            DELETE FROM pg_statistic s USING pg_attribute a
            WHERE a.attrelid = format('embstore.%I', place)::regclass AND a.attname = field
                AND s.starelid = a.attrelid AND s.staattnum = a.attnum;
        END IF;
    END LOOP;
END $$;
COMMENT ON FUNCTION embstore.hide_names IS 'keeps names out of the statistics, by which EXPLAIN would tell them';
"""

SHOW = """
DO $$ DECLARE place regclass; field name; BEGIN
    FOR place, field IN
        SELECT a.attrelid, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relnamespace = 'embstore'::regnamespace AND c.relkind IN ('r', 'p') AND a.attstattarget = 0
    LOOP
        EXECUTE format('ALTER TABLE %s ALTER %I SET STATISTICS -1', place, field);
    END LOOP;
END $$;
DROP FUNCTION embstore.hide_names;
"""

# The function as it is, with one statement and one name more.
CHANGES = (
    (
        "    GRANT USAGE ON SCHEMA embstore TO embstore_reader, embstore_writer;\n",
        "    GRANT USAGE ON SCHEMA embstore TO embstore_reader, embstore_writer;\n    PERFORM embstore.hide_names();\n",
    ),
    ("('protect', 'grant_rights',", "('protect', 'hide_names', 'grant_rights',"),
)
FUNCTION = """
DO $$ DECLARE
    made text := pg_get_functiondef('embstore.secure'::regproc);
    changed text := replace(made, $b${old}$b$, $a${new}$a$);
BEGIN
    ASSERT changed <> made;
    EXECUTE changed;
END $$;
"""


def upgrade() -> None:
    op.execute(HIDE.replace(":", r"\:"))
    for old, new in CHANGES:
        op.execute(FUNCTION.format(old=old, new=new).replace(":", r"\:"))


def downgrade() -> None:
    for old, new in CHANGES:
        op.execute(FUNCTION.format(old=new, new=old).replace(":", r"\:"))
    op.execute(SHOW.replace(":", r"\:"))
