"""The rules come before whatever somebody asks, and not only before what may tell: names of others could be read.

PostgreSQL makes comparisons that it trusts, such as `=`, `<` and `starts_with` of texts, before the rules where they
are cheaper, and EXPLAIN (ANALYZE) tells whether it got to the rules: whether there is such a row, whosever it is. Asked
letter by letter, that was every path, speaker and name of a dataset.
"""

from __future__ import annotations

from importlib import import_module

from alembic import op

revision = "0014"
down_revision = "0013"

BEFORE: str = import_module("embstore.migrations.versions.0009_sharing").PROTECT

# With the rights of the owner, as it is what the rules on these very tables ask; CURRENT_USER is whoever asks. One row,
# with arrays: no condition of anybody's comes into what they are made of.
VIEW = """
CREATE VIEW embstore.my_numbers WITH (security_barrier) AS
    SELECT ARRAY(SELECT s.dataset_id FROM embstore.dataset_share s WHERE s.team = ANY (my.teams)) AS readable,
        ARRAY(SELECT s.dataset_id FROM embstore.dataset_share s WHERE s.team = ANY (my.teams) AND s.can_write)
            AS writable,
        (SELECT max(d.dataset_id) FROM embstore.dataset d) AS newest,
        ARRAY(SELECT r.run_id FROM embstore.run r WHERE r.role = CURRENT_USER) AS runs,
        ARRAY(SELECT DISTINCT r.dataset_id FROM embstore.run r WHERE r.role = CURRENT_USER) AS run_on
    FROM (SELECT ARRAY(SELECT t.team FROM embstore.team t
                       WHERE pg_has_role(t.role, 'USAGE') AND pg_get_userbyid(t.role) = t.team) AS teams) my;
COMMENT ON VIEW embstore.my_numbers IS 'numbers of the datasets and runs that one sees; of the newest dataset of all';
"""

# In a function, as the rules on a table cannot name a view on that table; and its plan is kept, where that of a
# subquery in a rule is made anew for every table of every query.
#
# Marks: an array of 128 bytes or more is read where it lies, a smaller one is unpacked for every row.
FUNCTIONS = """
CREATE FUNCTION embstore.my_readable() RETURNS integer[] LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp AS $$ BEGIN
    RETURN (SELECT m.readable FROM embstore.my_numbers m);
END $$;
CREATE FUNCTION embstore.my_writable() RETURNS integer[] LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp AS $$ BEGIN
    RETURN (SELECT m.writable FROM embstore.my_numbers m);
END $$;
CREATE FUNCTION embstore.my_runs() RETURNS integer[] LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp AS $$ BEGIN
    RETURN (SELECT m.runs FROM embstore.my_numbers m);
END $$;
CREATE FUNCTION embstore.my_run_on() RETURNS integer[] LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp AS $$ BEGIN
    RETURN (SELECT m.writable || m.run_on FROM embstore.my_numbers m);
END $$;
CREATE FUNCTION embstore.newest_dataset() RETURNS integer LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp AS $$ BEGIN
    RETURN (SELECT coalesce(m.newest, 0) FROM embstore.my_numbers m);
END $$;

CREATE FUNCTION embstore.marks(numbers integer[], newest integer DEFAULT NULL) RETURNS boolean[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    size integer := coalesce(newest, 128);
    marks boolean[];
    number integer;
BEGIN
    FOREACH number IN ARRAY numbers LOOP
        size := greatest(size, number);
    END LOOP;
    marks := array_fill(false, ARRAY[size]) || array_fill(true, ARRAY[greatest(0, 128 - size)]);
    FOREACH number IN ARRAY numbers LOOP
        marks[number] := true;
    END LOOP;
    RETURN marks;
END $$;
COMMENT ON FUNCTION embstore.marks IS 'true at each of the numbers, false elsewhere; behind the newest not false';
"""

# Two conditions that say the same. The first, an element of an array, costs nothing in PostgreSQL's reckoning, and of
# conditions that cost the same those of the rules come first: so nothing is asked of a row of others, not even for a
# comparison, and EXPLAIN tells nothing. The second, a comparison, is part of what is looked up in an index, since every
# index on these tables begins with the dataset: rows of others are not found there.
# Vectors go without the first, which would be a twentieth of a scan of them: their tables hold no names.
_MARKED = "(SELECT embstore.marks({}))[{}]"
_AMONG = "dataset_id = ANY (ARRAY(SELECT unnest(embstore.{}())))"


def _rule(numbers: str) -> str:
    return f"{_MARKED.format(f'embstore.{numbers}()', 'dataset_id')} AND {_AMONG.format(numbers)}"


# A row that is just being added has a number that nobody has seen, and is beyond the end of the marks.
_NEW_TOO = _MARKED.format("embstore.my_readable(), embstore.newest_dataset()", "dataset_id") + " IS NOT FALSE"
_RUN = (
    f"({_MARKED.format('embstore.my_writable()', 'dataset_id')} OR {_MARKED.format('embstore.my_runs()', 'run_id')})"
    f" AND {_AMONG.format('my_run_on')}"
)

# What stands in the function, once each, and what is to stand there.
CHANGES = (
    ("readable text := 'ARRAY(SELECT s.dataset_id FROM embstore.dataset_share s)';\n", None),
    ("writable text := 'ARRAY(SELECT s.dataset_id FROM embstore.dataset_share s WHERE s.can_write)';\n", None),
    (
        "'dataset_id = ANY (' || readable || ')'",
        f"""CASE WHEN EXISTS (SELECT FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
                                      WHERE a.attrelid = target AND t.typname = 'vector')
        THEN '{_AMONG.format("my_readable")}'
        ELSE '{_rule("my_readable")}' END""",
    ),
    ("'dataset_id = ANY (' || writable || ')'", f"'{_AMONG.format('my_writable')}'"),
    (
        "'team = ANY (' || mine || ') OR ' || may_read",
        f"'{_NEW_TOO} AND (team = ANY (' || mine || ') OR {_AMONG.format('my_readable')})'",
    ),
    ("'ARRAY[team, owner] && ' || mine", "may_read || ' AND ARRAY[team, owner] && ' || mine"),
    ("'role = CURRENT_USER OR dataset_id = ANY (' || writable || ')'", f"'{_RUN}'"),
)

PROTECT = BEFORE.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")
for _old, _new in reversed(CHANGES):
    assert PROTECT.count(_old) == 1, _old
    PROTECT = PROTECT.replace(f"    {_old}" if _new is None else _old, _new or "")

ALL = """
DO $$ DECLARE target regclass; BEGIN
    FOR target IN SELECT oid FROM pg_class WHERE relnamespace = 'embstore'::regnamespace AND relrowsecurity LOOP
        PERFORM embstore.protect(target);
    END LOOP;
END $$;
"""

# A lookup by the team could use the index and find rows of others; to hash is nothing that PostgreSQL trusts. And no
# statistics of the hashes, as EXPLAIN shows what the planner makes of them.
INDEX = """
DROP INDEX embstore.dataset_team_name;
CREATE UNIQUE INDEX dataset_team_name ON embstore.dataset ({}, md5(name)) NULLS NOT DISTINCT;
"""
UNCOUNTED = """
ALTER INDEX embstore.dataset_team_name ALTER COLUMN 1 SET STATISTICS 0, ALTER COLUMN 2 SET STATISTICS 0;
"""

DOWN = """
DROP FUNCTION embstore.my_readable, embstore.my_writable, embstore.my_runs, embstore.my_run_on,
    embstore.newest_dataset, embstore.marks;
DROP VIEW embstore.my_numbers;
"""


def upgrade() -> None:
    for part in (VIEW, FUNCTIONS, PROTECT, ALL, INDEX.format("md5(team)"), UNCOUNTED):
        op.execute(part.replace(":", r"\:"))


def downgrade() -> None:
    before = BEFORE.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")
    for part in (before, ALL, DOWN, INDEX.format("team")):
        op.execute(part.replace(":", r"\:"))
