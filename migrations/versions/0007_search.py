"""Search in SQL: the nearest utterances and speakers to a vector, right at any filter."""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"

# What a condition may speak of, under the name `items`.
_ITEMS = """
SELECT i.dataset_id, d.name AS dataset, i.item_id, i.position, i.path, i.start, i.duration, i.speaker, i.size,
    i.vanished_at
FROM embstore.item i JOIN embstore.dataset d USING (dataset_id)
"""

# The server's own parser decides. What it takes between parentheses, and without them too, has none that close the
# ones around it: it is one expression, whatever strings and comments are in it. A cursor takes a single query, which is
# parsed and planned here and never run; more than one are refused before any of them runs.
CONDITION = r"""
CREATE FUNCTION embstore.check_condition(condition text, rows_of text, name text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = public, embstore, pg_temp AS $body$
DECLARE
    probe refcursor;
BEGIN
    OPEN probe NO SCROLL FOR EXECUTE format(E'SELECT FROM (%s) %I WHERE (%s\n)', rows_of, name, condition);
    CLOSE probe;
    OPEN probe NO SCROLL FOR EXECUTE format(E'SELECT %s\nFROM (%s) %I', condition, rows_of, name);
    CLOSE probe;
EXCEPTION WHEN syntax_error_or_access_rule_violation OR data_exception OR feature_not_supported THEN
    RAISE EXCEPTION 'the condition is not one expression that is true or false of %: %', name,
        CASE SQLSTATE WHEN '42P11' THEN 'it holds several statements' ELSE SQLERRM END
        USING ERRCODE = 'invalid_parameter_value', HINT = 'such as: speaker <> ''ann''';
END $body$;
COMMENT ON FUNCTION embstore.check_condition IS
    'raises an error unless the condition is a single boolean expression on these rows; it is not run';
"""

# Settings for a while: what they were before is returned, to be set again. Not the SET clause of a function: for the
# settings of an extension that is not loaded yet, only a superuser may write that down.
SETTINGS = """
CREATE FUNCTION embstore.swap_settings(settings jsonb) RETURNS jsonb LANGUAGE plpgsql STABLE AS $body$
DECLARE
    before jsonb := '{}';
    setting record;
BEGIN
    FOR setting IN SELECT key, value FROM jsonb_each_text(settings) LOOP
        before := before || jsonb_build_object(setting.key, coalesce(current_setting(setting.key, true), ''));
        PERFORM set_config(setting.key, setting.value, true);
    END LOOP;
    RETURN before;
END $body$;
COMMENT ON FUNCTION embstore.swap_settings IS
    'sets parameters until the end of the transaction and returns what they were, in the same form';
"""

# Three ways, of which the first that fits is taken:
#   prefilter   a filter (or row-level security) leaves few items, by default as many as have 32 MB of vectors: find
#               them, and compare their vectors one by one.
#               They are counted for it, up to a bound, so that no estimate can be wrong; the keys go on as arrays,
#               whose number the planner knows.
#   scan        it has to be exact, there is no index, or so many are wanted that the index would be no faster
#   index       the vector index goes on until enough rows have passed the filter (iterative scan), or until that has
#               cost as much as a scan. Then, with fewer than k, a scan gives the answer: never fewer than there are.
# Rows from the index are ranked again by their vectors in full precision.
# The column has no dimension and the index is on an expression that has one, so a scan cannot take the index.
NEAREST = f"""
CREATE FUNCTION embstore.nearest(
    query vector, model text, k integer DEFAULT 10, in_dataset text DEFAULT NULL, by_speaker text DEFAULT NULL,
    condition text DEFAULT NULL, exact boolean DEFAULT false)
RETURNS TABLE (dataset text, item_id bigint, "position" bigint, path text, start double precision, speaker text,
    cosine double precision, is_exact boolean)
LANGUAGE plpgsql STABLE ROWS 10 SET search_path = public, embstore, pg_temp AS $body$
DECLARE
    items CONSTANT text := $items${_ITEMS}$items$;
    answer CONSTANT text := 'SELECT d.name, i.item_id, i.position, i.path, i.start, i.speaker, 1 - f.distance, $4'
        ' FROM (%s) f JOIN embstore.item i USING (dataset_id, item_id) JOIN embstore.dataset d USING (dataset_id)'
        ' ORDER BY f.distance, f.dataset_id, f.item_id';
    of embstore.model;
    part regclass;
    vectors bigint;
    bound integer;
    filter text := '';
    filtered boolean;
    datasets integer[];
    keys bigint[];
    distances double precision[];
    index record;
    candidates integer;
    before jsonb;
    number bigint;
    reason text;
BEGIN
    SELECT * INTO of FROM embstore.model m WHERE m.name = nearest.model;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no model ''%''', model USING ERRCODE = 'undefined_object';
    ELSIF query IS NULL OR vector_dims(query) <> of.dim THEN
        RAISE EXCEPTION 'a vector by model ''%'' has % dimensions, this one has %', model, of.dim,
            coalesce(vector_dims(query), 0) USING ERRCODE = 'invalid_parameter_value';
    ELSIF vector_norm(query) = 0 THEN
        RAISE EXCEPTION 'a vector of zeros has no direction' USING ERRCODE = 'invalid_parameter_value';
    ELSIF coalesce(k, 0) < 1 THEN
        RAISE EXCEPTION 'k is %, and has to be 1 or more', k USING ERRCODE = 'invalid_parameter_value';
    END IF;
    query := l2_normalize(query);
    part := format('embstore.embedding_%s', of.model_id)::regclass;
    SELECT greatest(c.reltuples, 0) INTO vectors FROM pg_class c WHERE c.oid = part;
    bound := coalesce(nullif(current_setting('embstore.search_bound', true), '')::integer,
        greatest(1000, (32 << 20) / (4 * of.dim)));

    IF condition IS NOT NULL THEN
        PERFORM embstore.check_condition(condition, items, 'items');
        filter := format(E' AND (%s\\n)', condition);
    END IF;
    IF by_speaker IS NOT NULL THEN
        filter := filter || format(' AND items.speaker = %L', by_speaker);
    END IF;
    filtered := filter <> '' OR in_dataset IS NOT NULL OR row_security_active(part)
        OR row_security_active('embstore.item');
    IF filtered THEN
        IF in_dataset IS NULL THEN
            EXECUTE format('SELECT array_agg(d.dataset_id) FROM embstore.dataset d'
                ' WHERE EXISTS (SELECT FROM %s e WHERE e.dataset_id = d.dataset_id)', part) INTO datasets;
        ELSE
            SELECT ARRAY[d.dataset_id] INTO datasets FROM embstore.dataset d WHERE d.name = in_dataset;
            IF NOT FOUND THEN
                RAISE EXCEPTION 'no dataset ''%''', in_dataset USING ERRCODE = 'undefined_object';
            END IF;
        END IF;
        filter := format('(SELECT items.dataset_id, items.item_id FROM (%s) items WHERE items.dataset_id = ANY (%L)%s)',
            items, coalesce(datasets, '{{}}'), filter);
        EXECUTE format('SELECT array_agg(n.dataset_id), array_agg(n.item_id) FROM (SELECT * FROM %s n LIMIT %s) n',
            filter, bound + 1) INTO datasets, keys;
        number := coalesce(cardinality(keys), 0);
        IF number <= bound THEN
            reason := format('the filter leaves %s items, and up to %s are compared one by one', number, bound);
            PERFORM set_config('embstore.search', jsonb_build_object('method', 'prefilter', 'reason', reason,
                'items', number, 'bound', bound, 'vectors', vectors)::text, true);
            RETURN QUERY EXECUTE format(answer, format(
                'SELECT e.dataset_id, e.item_id, e.embedding <=> $1 AS distance'
                ' FROM unnest($2, $3) n (dataset_id, item_id) JOIN %s e'
                ' ON e.dataset_id = n.dataset_id AND e.model_id = %s AND e.item_id = n.item_id'
                ' ORDER BY 3, 1, 2 LIMIT %s', part, of.model_id, k)) USING query, datasets, keys, true;
            RETURN;
        END IF;
        reason := format('the filter leaves more than %s items, too many to compare one by one', bound);
        filter := format(' JOIN %s n ON n.dataset_id = e.dataset_id AND n.item_id = e.item_id', filter);
    END IF;

    SELECT c.relname, a.amname, o.opcname = 'halfvec_cosine_ops' AS half,
        (SELECT max(option_value) FROM pg_options_to_table(c.reloptions) WHERE option_name = 'lists')::integer AS lists
    INTO index
    FROM pg_index x JOIN pg_class c ON c.oid = x.indexrelid JOIN pg_am a ON a.oid = c.relam
    JOIN pg_opclass o ON o.oid = x.indclass[0]
    WHERE x.indrelid = part AND x.indisvalid AND x.indpred IS NULL AND a.amname IN ('hnsw', 'ivfflat')
        AND (o.opcname, pg_get_expr(x.indexprs, x.indrelid)) IN (
            ('vector_cosine_ops', format('(embedding)::vector(%s)', of.dim)),
            ('halfvec_cosine_ops', format('(l2_normalize((embedding)::vector(%s)))::halfvec(%1$s)', of.dim)))
    ORDER BY a.amname, half LIMIT 1;

    IF exact THEN
        reason := 'an exact answer was asked for';
    ELSIF index.relname IS NULL THEN
        reason := 'there is no index on the vectors of this model';
    ELSIF k > greatest(vectors, bound) / 12 THEN
        reason := format('%s is too large a part of %s vectors for the index', k, vectors);
    ELSE
        candidates := CASE WHEN filtered OR index.half THEN 4 * k ELSE k END;
        before := embstore.swap_settings(jsonb_build_object(
            'enable_seqscan', 'off', 'enable_bitmapscan', 'off', 'enable_sort', 'off', 'enable_hashjoin', 'off',
            'enable_mergejoin', 'off',
            'hnsw.ef_search', least(1000, greatest(100, current_setting('hnsw.ef_search', true)::integer)),
            'hnsw.iterative_scan', 'relaxed_order',
            'hnsw.max_scan_tuples', greatest(20000, vectors / 50, 4 * candidates),
            'hnsw.scan_mem_multiplier', 16,
            'ivfflat.probes', greatest(2 * sqrt(index.lists)::integer,
                current_setting('ivfflat.probes', true)::integer),
            'ivfflat.iterative_scan', 'relaxed_order'));
        reason := coalesce(reason || ', and ', 'nothing is filtered, and ') || 'there is an index';
        PERFORM set_config('embstore.search', jsonb_build_object('method', 'index', 'reason', reason,
            'index', index.relname, 'bound', bound, 'vectors', vectors)::text, true);
        EXECUTE format(
            'WITH near AS MATERIALIZED (SELECT e.dataset_id, e.item_id, e.embedding <=> $1 AS distance FROM %s e%s'
            ' ORDER BY ' || CASE WHEN index.half
                THEN 'l2_normalize(e.embedding::vector(%3$s))::halfvec(%3$s) <=> $1::halfvec(%3$s)'
                ELSE 'e.embedding::vector(%3$s) <=> $1::vector(%3$s)' END || ' LIMIT %4$s)'
            ' SELECT array_agg(n.dataset_id), array_agg(n.item_id), array_agg(n.distance)'
            ' FROM (SELECT * FROM near ORDER BY distance, dataset_id, item_id LIMIT %5$s) n',
            part, filter, of.dim, candidates, k) USING query INTO datasets, keys, distances;
        PERFORM embstore.swap_settings(before);
        number := coalesce(cardinality(keys), 0);
        IF number >= k THEN
            RETURN QUERY EXECUTE format(answer, 'SELECT * FROM unnest($1, $2, $3) n (dataset_id, item_id, distance)')
                USING datasets, keys, distances, false;
            RETURN;
        END IF;
        reason := format('the index gave %s rows of %s that are wanted', number, k);
    END IF;
    PERFORM set_config('embstore.search', jsonb_build_object('method', 'scan', 'reason', reason, 'bound', bound,
        'vectors', vectors)::text, true);
    RETURN QUERY EXECUTE format(answer, format(
        'SELECT e.dataset_id, e.item_id, e.embedding <=> $1 AS distance FROM %s e%s ORDER BY 3, 1, 2 LIMIT %s',
        part, filter, k)) USING query, NULL, NULL, true;
END $body$;
COMMENT ON FUNCTION embstore.nearest IS
    'the k utterances nearest to a vector, never fewer than there are; embstore.search then says how it went';
"""

CENTROIDS = """
CREATE FUNCTION embstore.nearest_centroids(
    query vector, model text, k integer DEFAULT 10, in_dataset text DEFAULT NULL, condition text DEFAULT NULL)
RETURNS TABLE (dataset text, speaker text, num_utterances integer, cosine double precision)
LANGUAGE plpgsql STABLE ROWS 10 SET search_path = public, embstore, pg_temp AS $body$
DECLARE
    centroids CONSTANT text := 'SELECT * FROM embstore.speaker_centroids';
    of embstore.model;
BEGIN
    SELECT * INTO of FROM embstore.model m WHERE m.name = nearest_centroids.model;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no model ''%''', model USING ERRCODE = 'undefined_object';
    ELSIF query IS NULL OR vector_dims(query) <> of.dim THEN
        RAISE EXCEPTION 'a vector by model ''%'' has % dimensions, this one has %', model, of.dim,
            coalesce(vector_dims(query), 0) USING ERRCODE = 'invalid_parameter_value';
    ELSIF vector_norm(query) = 0 THEN
        RAISE EXCEPTION 'a vector of zeros has no direction' USING ERRCODE = 'invalid_parameter_value';
    ELSIF coalesce(k, 0) < 1 THEN
        RAISE EXCEPTION 'k is %, and has to be 1 or more', k USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF condition IS NOT NULL THEN
        PERFORM embstore.check_condition(condition, centroids, 'speaker_centroids');
    END IF;
    RETURN QUERY EXECUTE format(
        E'SELECT dataset, speaker, num_utterances, 1 - (embedding <=> $1) FROM (%s) speaker_centroids'
        ' WHERE model = $2 AND embedding IS NOT NULL AND ($3 IS NULL OR dataset = $3) AND (%s\\n)'
        ' ORDER BY embedding <=> $1, dataset, speaker LIMIT $4', centroids, coalesce(condition, 'true'))
        USING l2_normalize(query), model, in_dataset, k;
END $body$;
COMMENT ON FUNCTION embstore.nearest_centroids IS 'the k speakers whose centroids are nearest to a vector';
"""


def upgrade() -> None:
    for part in (CONDITION, SETTINGS, NEAREST, CENTROIDS):
        op.execute(part.replace(":", r"\:"))


def downgrade() -> None:
    op.execute(
        "DROP FUNCTION embstore.nearest, embstore.nearest_centroids, embstore.swap_settings, embstore.check_condition"
    )
