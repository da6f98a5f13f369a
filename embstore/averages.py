"""Averages of speakers' vectors, as the server computes them: which are due, a range of them, and all that there are.

A centroid is a row of a queue. What changes in a speaker's utterances is logged by triggers, in the transaction that
makes the change; `refresh` turns that log into pending rows, and only those are computed. Each range of speakers is one
SQL statement: no vector leaves the database.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from embstore import faults
from embstore.db.copy import Column, read_rows, read_texts
from embstore.db.engine import limit_idle
from embstore.progress import Tally
from embstore.queue import LEASE_SECONDS, Queue

Average = Literal["mean", "unit"]

_MANY = 1_000
"""Speakers that changed at once, from which on the table's statistics are worth taking anew."""

_PENDING = "status = 'pending', attempts = 0, claim_token = NULL, error_code = NULL, error = NULL"

_CHANGED = "SELECT EXISTS (SELECT FROM embstore.speaker_change WHERE dataset_id = :dataset_id AND model_id = :model_id)"

# The row says by which average it is to be computed: two runs at once that want different ones cannot mix them.
_TAKE_CHANGES = f"""
WITH taken AS (
    DELETE FROM embstore.speaker_change WHERE dataset_id = :dataset_id AND model_id = :model_id RETURNING speaker)
INSERT INTO embstore.centroid AS c (dataset_id, model_id, speaker, average)
SELECT :dataset_id, :model_id, speaker, :average FROM taken GROUP BY speaker ORDER BY speaker
ON CONFLICT (dataset_id, model_id, speaker) DO UPDATE SET {_PENDING}
"""

# A vector by the other average goes at once, so that what is there is always what its row says. After the rows, which
# takes them away from workers that may be writing it.
_OTHER_AVERAGE = f"""
UPDATE embstore.centroid SET {_PENDING}, average = :average
WHERE dataset_id = :dataset_id AND model_id = :model_id AND average <> :average RETURNING centroid_id
"""
_FORGET_VECTORS = """
DELETE FROM embstore.centroid_vector
WHERE dataset_id = :dataset_id AND model_id = :model_id AND centroid_id = ANY (:centroid_ids)
"""

_MARK = f"""
UPDATE embstore.centroid SET {_PENDING}
WHERE dataset_id = :dataset_id AND model_id = :model_id AND (
    (CAST(:recompute AS boolean) AND status IN ('done', 'failed', 'skipped'))
    OR (status = 'done' AND num_utterances < :min_utterances)
    OR (status = 'skipped' AND num_utterances >= :min_utterances))
"""

_FORGET = """
DELETE FROM embstore.centroid c
WHERE c.dataset_id = :dataset_id AND c.model_id = :model_id AND c.status IN ('pending', 'failed', 'skipped')
    AND NOT EXISTS (SELECT FROM embstore.item i WHERE i.dataset_id = c.dataset_id AND i.speaker = c.speaker)
"""

_ANALYZE = "ANALYZE embstore.centroid (dataset_id, model_id, centroid_id, speaker, status)"

# One speaker after the other (LATERAL), so that no more than one speaker's vectors are held at a time, each fetched
# once; and its utterances in the order of their ids, so that sums are the same bits whatever else is in the range. All
# ids of a speaker go to the index at once: a join would descend it anew for each, and take three times as long.
# pgvector's inner product calculates in float32, and is wrong where squares leave its range: only there are vectors
# brought to unit length first. An average of unit vectors that is shorter than float32's rounding has no direction.
# By ctid: of the indexes, the planner takes the wrong one where statistics are old. The fence is that of the row as it
# is once it is locked; a vector is written or removed for rows inside the fence alone.
_COMPUTE = """
WITH marked AS (
    UPDATE embstore.centroid c SET
        status = r.status, error_code = r.code,
        error = CASE r.code WHEN 'zero_vector' THEN 'the utterances cancel each other out'
            WHEN 'too_few_utterances'
            THEN format('fewer utterances (%s) than the minimum (%s)', s.utterances, :min_utterances) END,
        num_utterances = s.utterances, cohesion = s.cohesion,
        lowest_item_id = s.lowest_item_id, lowest_cosine = s.lowest,
        run_id = :run_id, finished_at = clock_timestamp()
    FROM embstore.centroid o
    CROSS JOIN LATERAL (
        WITH utterance AS MATERIALIZED (
            SELECT e.item_id, e.embedding, -(e.embedding <#> e.embedding) AS square
            FROM embstore.embedding_{model_id} e
            WHERE e.dataset_id = :dataset_id AND e.model_id = :model_id AND e.item_id = ANY (ARRAY(
                SELECT i.item_id FROM embstore.item i WHERE i.dataset_id = :dataset_id AND i.speaker = o.speaker))
            ORDER BY e.item_id
        ), average AS MATERIALIZED (
            SELECT utterances, l2_normalize(vector) AS direction,
                CASE o.average WHEN 'unit' THEN l2_normalize(vector) ELSE vector END AS vector,
                vector_norm(vector) <= CASE o.average WHEN 'unit' THEN 1e-6 ELSE 0 END AS is_zero
            FROM (SELECT count(*) AS utterances,
                      avg(CASE o.average WHEN 'unit' THEN l2_normalize(embedding) ELSE embedding END) AS vector
                  FROM utterance) a
        ), compared AS MATERIALIZED (
            SELECT item_id, greatest(-1, least(1, CASE WHEN square BETWEEN 1e-30 AND 1e30
                THEN -(embedding <#> direction) / sqrt(square)
                ELSE -(l2_normalize(embedding) <#> direction) END)) AS cosine
            FROM utterance CROSS JOIN average WHERE NOT is_zero
        )
        SELECT utterances, vector, is_zero, cohesion, lowest,
            (SELECT item_id FROM compared WHERE cosine = lowest LIMIT 1) AS lowest_item_id
        FROM average CROSS JOIN (SELECT avg(cosine) AS cohesion, min(cosine) AS lowest FROM compared) m
    ) s
    CROSS JOIN LATERAL (
        SELECT CASE WHEN s.utterances < :min_utterances THEN 'skipped' WHEN s.is_zero THEN 'failed' ELSE 'done' END,
            CASE WHEN s.utterances < :min_utterances THEN 'too_few_utterances' WHEN s.is_zero THEN 'zero_vector' END
    ) AS r (status, code)
    WHERE o.dataset_id = :dataset_id AND o.model_id = :model_id AND o.centroid_id = ANY (CAST(:keys AS bigint[]))
        AND c.ctid = o.ctid AND c.dataset_id = :dataset_id AND c.status = 'running' AND c.claim_token = :token
    RETURNING c.centroid_id, c.status, c.error_code, s.vector
), written AS (
    INSERT INTO embstore.centroid_vector (dataset_id, model_id, centroid_id, embedding)
    SELECT :dataset_id, :model_id, centroid_id, vector FROM marked WHERE status = 'done'
    ON CONFLICT (dataset_id, model_id, centroid_id) DO UPDATE SET embedding = excluded.embedding
), removed AS (
    DELETE FROM embstore.centroid_vector v USING marked
    WHERE v.dataset_id = :dataset_id AND v.model_id = :model_id AND v.centroid_id = marked.centroid_id
        AND marked.status <> 'done'
)
SELECT status, error_code FROM marked
"""

# Everything is read by index, whatever the statistics say, which lag behind a bulk load. Compiling the plan takes
# longer than running it. A worker that was killed must not leave its query behind on the server, nor a stopped one its
# locks. Nobody waits for the disk: a range that a crash of the server takes back is computed again, as its status goes
# with it, and the commit that notes the end of the run waits for all before it.
_PLAN = f"""
SELECT set_config(name, value, true) FROM (VALUES ('enable_seqscan', 'off'), ('enable_hashjoin', 'off'),
    ('enable_mergejoin', 'off'), ('jit', 'off'), ('work_mem', '64MB'), ('client_connection_check_interval', '2s'),
    ('synchronous_commit', 'off'), ('idle_in_transaction_session_timeout', '{round(1000 * LEASE_SECONDS)}')
) AS s (name, value)
"""

_AVERAGED = """
FROM embstore.centroid c JOIN embstore.centroid_vector v USING (dataset_id, model_id, centroid_id)
WHERE c.dataset_id = {dataset} AND c.model_id = {model} ORDER BY c.centroid_id
"""
_NUMBERS = f"""
SELECT c.num_utterances, CAST(c.status <> 'done' OR EXISTS (SELECT FROM embstore.speaker_change g
    WHERE g.dataset_id = c.dataset_id AND g.model_id = c.model_id AND g.speaker = c.speaker) AS integer), v.embedding
{_AVERAGED}
"""
_SPEAKERS = f"SELECT c.speaker {_AVERAGED}"


class Centroids(NamedTuple):
    """The centroids of a dataset's speakers by one model, in the same order throughout."""

    speakers: list[str]
    vectors: NDArray[np.float32]
    """float32 [n, dim]."""
    num_utterances: NDArray[np.int64]
    """int64 [n]: how many each is the average of."""
    stale: NDArray[np.bool_]
    """bool [n]: whether its utterances have changed since."""


def centroid_queue(dataset_id: int, model_id: int) -> Queue:
    """The queue of one dataset's speakers for one model."""
    return Queue("embstore.centroid", "centroid_id", {"dataset_id": dataset_id, "model_id": model_id})


def is_due(connection: Connection, queue: Queue) -> bool:
    """Whether there is most likely something to compute: workers can then get ready while it is worked out what."""
    return queue.is_open(connection) or bool(connection.execute(text(_CHANGED), queue.scope).scalar_one())


def refresh(
    connection: Connection, queue: Queue, *, average: Average = "mean", min_utterances: int = 1, recompute: bool = False
) -> None:
    """Make pending what is new, stale, or computed otherwise than asked for; forget speakers without items."""
    values = {**queue.scope, "average": average, "min_utterances": min_utterances, "recompute": recompute}
    limit_idle(connection)
    changed = connection.execute(text(_TAKE_CHANGES), values).rowcount
    if changed >= _MANY:
        connection.execute(text(_ANALYZE))  # or claims, too, would be planned for the few rows of before
    connection.execute(text(_FORGET), values)
    others = list(connection.execute(text(_OTHER_AVERAGE), values).scalars())
    if others:
        connection.execute(text(_FORGET_VECTORS), values | {"centroid_ids": others})
    connection.execute(text(_MARK), values)


def compute_range(
    connection: Connection, queue: Queue, token: int, keys: Sequence[int], *, min_utterances: int, run_id: int
) -> Tally:
    """Average the speakers that `keys` name, claimed with `token`; what somebody else has claimed since is left alone.

    Says how they ended: without a direction failed as `zero_vector`, with too few skipped as `too_few_utterances`.
    """
    connection.execute(text(_PLAN))
    values = {
        **queue.scope,
        "keys": "{" + ",".join(map(str, keys)) + "}",
        "min_utterances": min_utterances,
        "run_id": run_id,
        "token": token,
    }
    tally = Tally()
    for status, code in connection.execute(text(_COMPUTE.format(model_id=queue.scope["model_id"])), values):
        if status == "done":
            tally.done += 1
        else:
            (tally.failed if status == "failed" else tally.skipped)[code] += 1
    faults.reach("centroid_range")
    return tally


def read(connection: Connection, dataset_id: int, model_id: int, dim: int) -> Centroids:
    """The centroids that there are. Let the caller's transaction be REPEATABLE READ."""
    scope = {"dataset": dataset_id, "model": model_id}
    int4 = np.dtype(np.int32), None
    columns: dict[str, Column] = {"number": int4, "stale": int4, "vector": (np.dtype(np.float32), dim)}
    found = read_rows(connection, _NUMBERS.format(**scope), columns)
    speakers = [str(speaker) for speaker in read_texts(connection, _SPEAKERS.format(**scope))]
    return Centroids(speakers, found["vector"], found["number"].astype(np.int64), found["stale"].astype(np.bool_))
