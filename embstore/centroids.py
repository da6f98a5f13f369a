"""Speaker centroids: every speaker's average embedding, computed where the vectors are.

A centroid is a row of a queue. What changes in a speaker's utterances is logged by triggers, in the transaction that
makes the change; `refresh` turns that log into pending rows, and only those are computed. Workers claim ranges of
speakers, and each range is one SQL statement: no vector leaves the database.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from embstore import faults
from embstore.catalog import Dataset, StoredModel
from embstore.claims import Claim, Claimant
from embstore.db.copy import Column, read_rows, read_texts
from embstore.db.engine import Database, limit_idle
from embstore.errors import DatabaseError
from embstore.progress import Display, Tally
from embstore.queue import LEASE_SECONDS, Queue, Refusal
from embstore.settings import Settings
from embstore.supervise import PARENT_CONNECTIONS, Committed, Leased, Outcome, Run, Share, check_connections
from embstore.workers import Channel, count_cores, prepare

Average = Literal["mean", "unit"]

BYTES_A_RANGE = 20_000_000
"""Vectors that a range holds if nobody says otherwise: the claim costs next to nothing beside it."""
MIN_RANGE, MAX_RANGE = 10, 5_000
CONNECTIONS_A_WORKER = 2
"""The second one renews the lease while a statement takes long: a speaker may have millions of utterances."""
MAX_WORKERS = 4
"""If nobody asks for more: the work is done by the server, which has other things to do."""
_SAMPLE = 20_000
_MANY = 1_000
_IDLE = 0.1
_BEAT = 1.0

_PENDING = "status = 'pending', attempts = 0, claim_token = NULL, error_code = NULL, error = NULL"

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


@dataclass(frozen=True)
class Options:
    """How centroids are computed."""

    average: Average = "mean"
    min_utterances: int = 1
    chunk_size: int | None = None
    """Speakers a range; None: as many as hold about BYTES_A_RANGE of vectors."""
    recompute: bool = False
    """All of them, not only those that are new or stale."""


@dataclass(frozen=True)
class Job:
    """All that a worker process is told."""

    settings: Settings
    model_id: int
    tasks: tuple[tuple[int, int, int], ...]
    """For each dataset: its id, the run's id, and how many speakers make a range."""
    min_utterances: int


def centroid_queue(dataset_id: int, model_id: int) -> Queue:
    """The queue of one dataset's speakers for one model."""
    return Queue("embstore.centroid", "centroid_id", {"dataset_id": dataset_id, "model_id": model_id})


def count_workers(settings: Settings, *, asked: int | None = None) -> int:
    """How many workers to start, of those that may be. Raises UsageError if more are `asked` for, or set."""
    number = asked or settings.embedding_workers or min(MAX_WORKERS, count_cores())
    if asked is None:
        number = min(number, (settings.db_max_connections - PARENT_CONNECTIONS) // CONNECTIONS_A_WORKER)
    check_connections(settings, number, CONNECTIONS_A_WORKER)
    return number


def refresh(connection: Connection, dataset_id: int, model_id: int, options: Options) -> None:
    """Make pending what is new, stale, or computed otherwise than `options` says; forget speakers without items."""
    values = {
        "dataset_id": dataset_id,
        "model_id": model_id,
        "average": options.average,
        "min_utterances": options.min_utterances,
        "recompute": options.recompute,
    }
    limit_idle(connection)
    changed = connection.execute(text(_TAKE_CHANGES), values).rowcount
    if changed >= _MANY:
        connection.execute(text(_ANALYZE))  # or claims, too, would be planned for the few rows of before
    connection.execute(text(_FORGET), values)
    others = list(connection.execute(text(_OTHER_AVERAGE), values).scalars())
    if others:
        connection.execute(text(_FORGET_VECTORS), values | {"centroid_ids": others})
    connection.execute(text(_MARK), values)


def read(connection: Connection, dataset_id: int, model: StoredModel) -> Centroids:
    """The centroids that there are. Let the caller's transaction be REPEATABLE READ."""
    scope = {"dataset": dataset_id, "model": model.model_id}
    int4 = np.dtype(np.int32), None
    columns: dict[str, Column] = {"number": int4, "stale": int4, "vector": (np.dtype(np.float32), model.dim)}
    found = read_rows(connection, _NUMBERS.format(**scope), columns)
    speakers = [str(speaker) for speaker in read_texts(connection, _SPEAKERS.format(**scope))]
    return Centroids(speakers, found["vector"], found["number"].astype(np.int64), found["stale"].astype(np.bool_))


def compute(
    database: Database,
    settings: Settings,
    model: StoredModel,
    datasets: Sequence[Dataset],
    options: Options,
    workers: int,
    *,
    show: Callable[[int, int], Display],
    parameters: Mapping[str, Any],
) -> Outcome:
    """Bring the centroids of the datasets up to date; resumes, and shares the work with other runs.

    `show(pending, workers)` makes the display; fewer workers are started where there are fewer ranges.
    """
    shares = [Share(dataset, centroid_queue(dataset.dataset_id, model.model_id)) for dataset in datasets]
    with database.begin() as connection:
        if options.recompute or any(_is_due(connection, share.queue) for share in shares):
            prepare(__name__)
    limits: dict[int, int] = {}
    ranges = 0
    for dataset_id, queue in ((share.dataset.dataset_id, share.queue) for share in shares):
        # Patiently: workers of another run may be writing the same rows in another order, which is a deadlock.
        database.patiently(partial(refresh, dataset_id=dataset_id, model_id=model.model_id, options=options))
        with database.begin() as connection:
            limits[dataset_id] = options.chunk_size or _range(connection, queue, model.dim)
            ranges += -(-queue.remaining(connection) // limits[dataset_id])
    number = max(1, min(workers, ranges))

    def jobs(runs: Mapping[int, int]) -> list[Job]:
        tasks = tuple((dataset_id, run_id, limits[dataset_id]) for dataset_id, run_id in runs.items())
        return [Job(settings, model.model_id, tasks, options.min_utterances)] * number

    run = Run(database, "centroids", model.model_id, shares, parameters, each=CONNECTIONS_A_WORKER)
    return run.go(work, jobs, show=lambda pending: show(pending, number))


def work(channel: Channel, job: Job) -> None:
    """Body of a worker process: until no speaker of the job is pending, or until told to stop."""
    database = Database(job.settings, pool_size=CONNECTIONS_A_WORKER)
    try:
        _Worker(channel, job, database).run()
    finally:
        database.close()


class _Worker:
    def __init__(self, channel: Channel, job: Job, database: Database) -> None:
        self._channel = channel
        self._job = job
        self._database = database
        self._claimant = Claimant(database)
        channel.send(Leased(self._claimant.token))

    def run(self) -> None:
        threading.Thread(target=self._beat, daemon=True, name="lease").start()
        tasks = [(centroid_queue(task[0], self._job.model_id), task) for task in self._job.tasks]
        try:
            self._serve(tasks)
        except DatabaseError:
            # No speaker is to blame, so none is to be counted as one at whom a worker died.
            with contextlib.suppress(DatabaseError), self._database.begin() as connection:
                for queue, _ in tasks:
                    queue.release(connection, self._claimant.token)
            raise
        self._claimant.leave()

    def _serve(self, tasks: Sequence[tuple[Queue, tuple[int, int, int]]]) -> None:
        while tasks and not self._channel.stopping.is_set():
            for queue, (_, run_id, limit) in tasks:
                self._claimant.start()
                while not self._channel.stopping.is_set():
                    claim = self._claimant.claim(queue, limit, idle=True)
                    self._work_on(queue, run_id, claim)
                    if not claim.keys:
                        break
            tasks = [task for task in tasks if self._database.patiently(task[0].is_open)]
            if tasks:
                self._channel.stopping.wait(_IDLE)

    def _beat(self) -> None:
        """Renew the lease, in a thread of its own; if it is lost, what is written under it is refused anyway."""
        with contextlib.suppress(DatabaseError):
            while True:
                time.sleep(_BEAT)
                self._claimant.renew()

    def _work_on(self, queue: Queue, run_id: int, claim: Claim) -> None:
        if claim.quarantined:
            self._report(queue, Tally(failed=Counter(worker_died=claim.quarantined)))
        if claim.keys:
            self._compute(queue, run_id, claim.keys)

    def _compute(self, queue: Queue, run_id: int, keys: Sequence[int]) -> None:
        """Compute one range; one that fails is halved until the speaker that makes it fail is alone."""
        self._claimant.renew()
        try:
            tally = self._database.patiently(lambda c: self._aggregate(c, queue, run_id, keys))
        except DatabaseError as error:
            if not _is_about_data(error):
                raise
            if len(keys) == 1:
                refusal = Refusal(keys[0], "failed", "not_averaged", str(error)[:500])
                self._database.patiently(lambda c: queue.refuse(c, self._claimant.token, [refusal]))
                self._report(queue, Tally(failed=Counter(not_averaged=1)))
                return
            middle = len(keys) // 2
            self._compute(queue, run_id, keys[:middle])
            self._compute(queue, run_id, keys[middle:])
        else:
            self._report(queue, tally)

    def _aggregate(self, connection: Connection, queue: Queue, run_id: int, keys: Sequence[int]) -> Tally:
        connection.execute(text(_PLAN))
        values = {
            **queue.scope,
            "keys": "{" + ",".join(map(str, keys)) + "}",
            "min_utterances": self._job.min_utterances,
            "run_id": run_id,
            "token": self._claimant.token,
        }
        tally = Tally()
        for status, code in connection.execute(text(_COMPUTE.format(model_id=self._job.model_id)), values):
            if status == "done":
                tally.done += 1
            else:
                (tally.failed if status == "failed" else tally.skipped)[code] += 1
        faults.reach("centroid_range")
        return tally

    def _report(self, queue: Queue, tally: Tally) -> None:
        self._channel.send(Committed(queue.scope["dataset_id"], tally))


def _is_about_data(error: DatabaseError) -> bool:
    """Whether values or their storage are at fault, and not the server, its disk or a missing right."""
    cause = error.__cause__
    code = getattr(getattr(cause, "orig", cause), "pgcode", None) or ""
    return code[:2] in ("22", "XX")


def _is_due(connection: Connection, queue: Queue) -> bool:
    """Whether there is most likely something to compute: workers can then get ready while it is worked out what."""
    changed = (
        "SELECT EXISTS (SELECT FROM embstore.speaker_change WHERE dataset_id = :dataset_id AND model_id = :model_id)"
    )
    return queue.is_open(connection) or bool(connection.execute(text(changed), queue.scope).scalar_one())


def _range(connection: Connection, queue: Queue, dim: int) -> int:
    """Speakers that hold about BYTES_A_RANGE of vectors, by a sample of the pending ones."""
    count = text(
        "SELECT count(*), count(DISTINCT centroid_id) FROM (SELECT c.centroid_id FROM embstore.centroid c"
        " JOIN embstore.item i ON i.dataset_id = c.dataset_id AND i.speaker = c.speaker"
        f" WHERE c.dataset_id = :dataset_id AND model_id = :model_id AND status = 'pending' LIMIT {_SAMPLE}) s"
    )
    utterances, speakers = connection.execute(count, queue.scope).one()
    return int(max(MIN_RANGE, min(MAX_RANGE, BYTES_A_RANGE * speakers // max(utterances * dim * 4, 1))))
