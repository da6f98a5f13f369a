"""Speaker centroids: every speaker's average embedding, computed where the vectors are.

A centroid is a row of a queue. What changes in a speaker's utterances is logged by triggers, in the transaction that
makes the change; `refresh` turns that log into pending rows, and only those are computed. Workers claim ranges of
speakers, and each range is one SQL statement: no vector leaves the database.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, text

from embstore.catalog import Dataset
from embstore.claims import Claim, Claimant
from embstore.db.engine import Database, set_local
from embstore.errors import DatabaseError, DatabaseUnavailable
from embstore.progress import Display, Tally
from embstore.queue import Queue, Refusal
from embstore.settings import Settings
from embstore.supervise import Committed, Leased, Outcome, Run, Share
from embstore.workers import Channel

Average = Literal["mean", "unit"]

UTTERANCES_A_RANGE = 20_000
"""What a range holds if nobody says otherwise: 20 MB of 256-d vectors, and the claim costs next to nothing."""
MIN_RANGE, MAX_RANGE = 10, 5_000
_IDLE = 0.3

# l2_normalize leaves a zero vector as it is; the norm tells afterwards.
_AVERAGES: dict[Average, str] = {
    "mean": "avg(embedding)",
    "unit": "l2_normalize(avg(l2_normalize(embedding)))",
}

_TAKE_CHANGES = """
WITH taken AS (
    DELETE FROM embstore.speaker_change WHERE dataset_id = :dataset_id AND model_id = :model_id RETURNING speaker)
INSERT INTO embstore.centroid AS c (dataset_id, model_id, speaker)
SELECT :dataset_id, :model_id, speaker FROM taken GROUP BY speaker ORDER BY speaker
ON CONFLICT (dataset_id, model_id, speaker) DO UPDATE
SET status = 'pending', attempts = 0, claim_token = NULL, error_code = NULL, error = NULL
"""

# Computed in another way than this run wants it: by another average, or judged by another minimum.
_MARK = """
UPDATE embstore.centroid SET status = 'pending', attempts = 0, claim_token = NULL, error_code = NULL, error = NULL
WHERE dataset_id = :dataset_id AND model_id = :model_id AND status IN ('done', 'failed', 'skipped') AND (
    CAST(:recompute AS boolean) OR average IS DISTINCT FROM :average
    OR (status = 'done' AND num_utterances < :min_utterances)
    OR (status = 'skipped' AND num_utterances >= :min_utterances))
"""

_FORGET = """
DELETE FROM embstore.centroid c
WHERE c.dataset_id = :dataset_id AND c.model_id = :model_id AND c.status = 'pending' AND NOT EXISTS (
    SELECT FROM embstore.item i WHERE i.dataset_id = c.dataset_id AND i.speaker = c.speaker)
"""

# MATERIALIZED: the vectors are fetched once, and read twice, for the average and for the cosines to it.
_COMPUTE = """
WITH utterance AS MATERIALIZED (
    SELECT c.centroid_id, i.item_id, e.embedding
    FROM embstore.centroid c
    JOIN embstore.item i ON i.dataset_id = c.dataset_id AND i.speaker = c.speaker
    JOIN embstore.embedding_{model_id} e ON e.dataset_id = i.dataset_id AND e.item_id = i.item_id
    WHERE c.dataset_id = :dataset_id AND c.model_id = :model_id AND c.centroid_id = ANY (CAST(:keys AS bigint[]))
), average AS MATERIALIZED (
    SELECT centroid_id, count(*) AS utterances, {average} AS vector FROM utterance GROUP BY centroid_id
), compared AS (
    SELECT centroid_id, u.item_id, 1 - (u.embedding <=> a.vector) AS cosine
    FROM utterance u JOIN average a USING (centroid_id) WHERE vector_norm(a.vector) > 0
), summary AS (
    SELECT centroid_id, avg(cosine) AS cohesion, min(cosine) AS lowest_cosine,
        (array_agg(item_id ORDER BY cosine, item_id))[1] AS lowest_item_id
    FROM compared GROUP BY centroid_id
)
UPDATE embstore.centroid c SET
    status = CASE WHEN coalesce(a.utterances, 0) < :min_utterances THEN 'skipped'
        WHEN vector_norm(a.vector) = 0 THEN 'failed' ELSE 'done' END,
    error_code = CASE WHEN coalesce(a.utterances, 0) < :min_utterances THEN 'too_few_utterances'
        WHEN vector_norm(a.vector) = 0 THEN 'zero_vector' END,
    error = CASE WHEN coalesce(a.utterances, 0) < :min_utterances
            THEN format('%s utterances are fewer than the minimum of %s', coalesce(a.utterances, 0), :min_utterances)
        WHEN vector_norm(a.vector) = 0 THEN 'the utterances cancel each other out' END,
    embedding = CASE WHEN a.utterances >= :min_utterances AND vector_norm(a.vector) > 0 THEN a.vector END,
    num_utterances = coalesce(a.utterances, 0), average = :average, cohesion = s.cohesion,
    lowest_item_id = s.lowest_item_id, lowest_cosine = s.lowest_cosine,
    run_id = :run_id, finished_at = clock_timestamp()
FROM unnest(CAST(:keys AS bigint[])) AS k (centroid_id)
LEFT JOIN average a USING (centroid_id)
LEFT JOIN summary s USING (centroid_id)
WHERE c.dataset_id = :dataset_id AND c.model_id = :model_id AND c.centroid_id = k.centroid_id
    AND c.status = 'running' AND c.claim_token = :token
RETURNING c.status, c.error_code
"""


@dataclass(frozen=True)
class Options:
    """How centroids are computed."""

    average: Average = "mean"
    min_utterances: int = 1
    chunk_size: int | None = None
    """Speakers a range; None: as many as hold about UTTERANCES_A_RANGE utterances."""
    recompute: bool = False
    """All of them, not only those that are new or stale."""


@dataclass(frozen=True)
class Job:
    """All that a worker process is told."""

    settings: Settings
    model_id: int
    tasks: tuple[tuple[int, int, int], ...]
    """For each dataset: its id, the run's id, and how many speakers make a range."""
    options: Options


def centroid_queue(dataset_id: int, model_id: int) -> Queue:
    """The queue of one dataset's speakers for one model."""
    return Queue("embstore.centroid", "centroid_id", {"dataset_id": dataset_id, "model_id": model_id})


def refresh(connection: Connection, dataset_id: int, model_id: int, options: Options) -> None:
    """Make pending what is new, stale, or computed otherwise than `options` says; forget speakers without items."""
    values = {
        "dataset_id": dataset_id,
        "model_id": model_id,
        "average": options.average,
        "min_utterances": options.min_utterances,
        "recompute": options.recompute,
    }
    for sql in (_TAKE_CHANGES, _MARK, _FORGET):
        connection.execute(text(sql), values)


def compute(
    database: Database,
    settings: Settings,
    datasets: Sequence[Dataset],
    model_id: int,
    options: Options,
    workers: int,
    *,
    show: Callable[[int], Display],
    parameters: Mapping[str, Any],
) -> Outcome:
    """Bring the centroids of the datasets up to date; resumes, and shares the work with other runs."""
    with database.begin() as connection:
        for dataset in datasets:
            refresh(connection, dataset.dataset_id, model_id, options)
        ranges = {d.dataset_id: options.chunk_size or _range(connection, d.dataset_id, model_id) for d in datasets}
    shares = [Share(dataset, centroid_queue(dataset.dataset_id, model_id)) for dataset in datasets]

    def jobs(runs: Mapping[int, int]) -> list[Job]:
        tasks = tuple((dataset_id, run_id, ranges[dataset_id]) for dataset_id, run_id in runs.items())
        return [Job(settings, model_id, tasks, options)] * workers

    run = Run(database, "centroids", model_id, shares, parameters)
    return run.go(work, jobs, show=show, environ={})


def work(channel: Channel, job: Job) -> None:
    """Body of a worker process: until no speaker of the job is pending, or until told to stop."""
    database = Database(job.settings, pool_size=1)
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
        tasks = [(centroid_queue(task[0], self._job.model_id), task) for task in self._job.tasks]
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
        self._claimant.leave()

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
        except DatabaseUnavailable:
            raise
        except DatabaseError as error:
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
        options = self._job.options
        # A range is read by index, and fits in memory. Statistics that lag behind a bulk load must not make the planner
        # read the whole table for it instead.
        set_local(connection, "enable_seqscan", "off")
        set_local(connection, "enable_hashjoin", "off")
        set_local(connection, "enable_mergejoin", "off")
        set_local(connection, "work_mem", "64MB")
        sql = _COMPUTE.format(model_id=self._job.model_id, average=_AVERAGES[options.average])
        values = {
            **queue.scope,
            "keys": "{" + ",".join(map(str, keys)) + "}",
            "min_utterances": options.min_utterances,
            "average": options.average,
            "run_id": run_id,
            "token": self._claimant.token,
        }
        tally = Tally()
        for status, code in connection.execute(text(sql), values):
            if status == "done":
                tally.done += 1
            else:
                (tally.failed if status == "failed" else tally.skipped)[code] += 1
        return tally

    def _report(self, queue: Queue, tally: Tally) -> None:
        self._channel.send(Committed(queue.scope["dataset_id"], tally))


def _range(connection: Connection, dataset_id: int, model_id: int) -> int:
    """Speakers that hold about UTTERANCES_A_RANGE utterances."""
    pending = centroid_queue(dataset_id, model_id).remaining(connection)
    if pending <= MIN_RANGE * 10:
        return MIN_RANGE
    count = "SELECT count(*), count(DISTINCT speaker) FROM embstore.item WHERE dataset_id = :dataset_id"
    items, speakers = connection.execute(text(count), {"dataset_id": dataset_id}).one()
    return int(max(MIN_RANGE, min(MAX_RANGE, UTTERANCES_A_RANGE * speakers // max(items, 1))))
