"""One meaning of a dataset's name, wherever it is typed: `name`, or `team/name` where one sees several of that name.

Before, functions and views went by the name alone, and of two datasets of one name took either, or both as one.
"""

from __future__ import annotations

from alembic import op
from sqlalchemy import text

revision = "0012"
down_revision = "0011"

# As `embstore.datasets` shows it. The names that are not unique are an array made once a query, and only where the
# column is asked for: a join with that view would put its window function under every scan.
SHOWN = """CASE WHEN d.team IS NOT NULL AND d.name = ANY (ARRAY(
    SELECT o.name FROM embstore.dataset o GROUP BY o.name HAVING count(*) > 1))
    THEN d.team || '/' || d.name ELSE d.name END"""

CALLED = """
CREATE FUNCTION embstore.datasets_called(name text) RETURNS SETOF integer LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp AS $$
    WITH found AS MATERIALIZED (
        SELECT d.dataset_id, d.dataset, d.dataset = $1 AS is_shown FROM embstore.datasets d
        WHERE $1 IN (d.dataset, d.name, d.team || '/' || d.name))
    SELECT dataset_id FROM found WHERE is_shown OR NOT EXISTS (SELECT FROM found WHERE is_shown) ORDER BY dataset
$$;
COMMENT ON FUNCTION embstore.datasets_called IS
    'the datasets that a name may mean, of those one sees; the one that is shown under it, if there is one';

CREATE FUNCTION embstore.dataset_called(name text) RETURNS integer LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    found integer[] := ARRAY(SELECT embstore.datasets_called($1));
    names text;
BEGIN
    IF cardinality(found) = 1 THEN
        RETURN found[1];
    ELSIF cardinality(found) > 1 THEN
        SELECT string_agg(quote_literal(d.dataset), ' or ' ORDER BY d.dataset) INTO names
        FROM embstore.datasets d WHERE d.dataset_id = ANY (found);
        RAISE EXCEPTION 'several datasets are called ''%'': say %', $1, names
            USING ERRCODE = 'ambiguous_parameter';
    END IF;
    SELECT string_agg(quote_literal(s.dataset), ', ' ORDER BY s.dataset) INTO names
    FROM (SELECT d.dataset FROM embstore.datasets d ORDER BY d.dataset LIMIT 10) s;
    RAISE EXCEPTION 'no dataset ''%''', $1 USING ERRCODE = 'undefined_object',
        HINT = coalesce('such as: ' || names, 'you see none: ask its team for ''embstore share DATASET --with TEAM''');
END $$;
COMMENT ON FUNCTION embstore.dataset_called IS
    'the dataset of this name, or team/name; raises an error, with the names one may have meant, if it is not one';
"""

_CALLED = "(SELECT embstore.dataset_called($1))"
# By a statement of its own: within the query it would only be asked where there are rows to compare with it.
_CHECKED = "SELECT embstore.dataset_called($1);\n"
_SHOWN_ID = "(SELECT s.dataset FROM embstore.datasets s WHERE s.dataset_id = {})"

# What stands in the functions, once each, and what is to stand there.
CHANGES: dict[str, tuple[tuple[str, str], ...]] = {
    "nearest": (
        ("SELECT i.dataset_id, d.name AS dataset,", f"SELECT i.dataset_id, {SHOWN} AS dataset,"),
        ("'SELECT d.name, i.item_id,", "'SELECT " + SHOWN.replace("'", "''") + ", i.item_id,"),
        (
            """SELECT ARRAY[d.dataset_id] INTO datasets FROM embstore.dataset d WHERE d.name = in_dataset;
            IF NOT FOUND THEN
                RAISE EXCEPTION 'no dataset ''%''', in_dataset USING ERRCODE = 'undefined_object';
            END IF;""",
            "datasets := ARRAY[embstore.dataset_called(in_dataset)];",
        ),
    ),
    "nearest_centroids": (
        (
            "USING l2_normalize(query), model, in_dataset, k;",
            "USING l2_normalize(query), model, CASE WHEN in_dataset IS NOT NULL THEN\n            "
            + _SHOWN_ID.format("embstore.dataset_called(in_dataset)")
            + " END, k;",
        ),
    ),
    "nearest_speakers": (
        ("    SELECT o.dataset,", f"    {_CHECKED}    SELECT o.dataset,"),
        ("WHERE c.dataset = $1 AND", f"WHERE c.dataset = {_SHOWN_ID.format(_CALLED)} AND"),
    ),
    "similar_speakers": (
        ("    SELECT a.speaker,", f"    {_CHECKED}    SELECT a.speaker,"),
        ("WHERE a.dataset = $1 AND", f"WHERE a.dataset = {_SHOWN_ID.format(_CALLED)} AND"),
    ),
    "outlier_utterances": (
        ("    SELECT i.path,", f"    {_CHECKED}    SELECT i.path,"),
        ("WHERE d.name = $1 AND", f"WHERE d.dataset_id = {_CALLED} AND"),
    ),
    "create_partition": (("SELECT d.name AS dataset,", "SELECT " + SHOWN.replace("'", "''") + " AS dataset,"),),
}

# Replaced, not dropped: somebody may have made a view of their own on it. `datasets` itself has no such column.
VIEWS = r"""
DO $do$ DECLARE
    id oid;
    view name;
    definition text;
BEGIN
    FOR id, view IN
        SELECT oid, relname FROM pg_class WHERE relnamespace = 'embstore'::regnamespace AND relkind = 'v'
    LOOP
        definition := {changed};
        IF definition <> pg_get_viewdef(id) THEN
            EXECUTE format('CREATE OR REPLACE VIEW embstore.%I WITH (security_invoker) AS %s', view, definition);
        END IF;
    END LOOP;
END $do$;
"""
_TO_SHOWN = "replace(pg_get_viewdef(id), 'd.name AS dataset', $shown$" + SHOWN + " AS dataset$shown$)"
_TO_NAME = (
    r"regexp_replace(pg_get_viewdef(id),"
    r" 'CASE\s+WHEN \(\(d\.team IS NOT NULL\) AND \(d\.name = ANY .*?END AS dataset,', 'd.name AS dataset,')"
)


def _change(function: str, changes: tuple[tuple[str, str], ...]) -> None:
    """Put new text in the place of old in a function; all else of it stays as it is."""
    connection = op.get_bind()
    definition = connection.execute(
        text("SELECT pg_get_functiondef(p.oid) FROM pg_proc p WHERE p.pronamespace = to_regnamespace('embstore')"
             " AND p.proname = :name"),
        {"name": function},
    ).scalar_one()  # fmt: skip
    for old, new in changes:
        assert definition.count(old) == 1, (function, old)
        definition = definition.replace(old, new)
    connection.exec_driver_sql(definition.replace("%", "%%"))


def upgrade() -> None:
    op.execute(CALLED.replace(":", r"\:"))
    for function, changes in CHANGES.items():
        _change(function, changes)
    op.get_bind().exec_driver_sql(VIEWS.format(changed=_TO_SHOWN).replace("%", "%%"))


def downgrade() -> None:
    op.get_bind().exec_driver_sql(VIEWS.format(changed=_TO_NAME).replace("%", "%%"))
    for function, changes in CHANGES.items():
        _change(function, tuple((new, old) for old, new in changes))
    op.execute("DROP FUNCTION embstore.dataset_called, embstore.datasets_called")
