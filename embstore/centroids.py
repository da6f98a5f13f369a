"""The job of speaker centroids: workers claim ranges of speakers, and have the server average each.

The SQL, and what makes a speaker's average due, is in `averages`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from embstore import averages
from embstore.averages import Average, centroid_queue
from embstore.catalog import Dataset, StoredModel
from embstore.claims import Claim, Claimant
from embstore.db.engine import Database, sqlstate
from embstore.errors import DatabaseError
from embstore.progress import Display, Tally
from embstore.queue import Queue, Refusal
from embstore.settings import Settings
from embstore.supervise import PARENT_CONNECTIONS, Committed, Leased, Outcome, Run, Share, check_connections
from embstore.workers import Channel, count_cores, prepare

BYTES_A_RANGE = 20_000_000
"""Vectors that a range holds if nobody says otherwise: the claim costs next to nothing beside it."""
MIN_RANGE, MAX_RANGE = 10, 5_000
CONNECTIONS_A_WORKER = 2
"""The second one renews the lease while a statement takes long: a speaker may have millions of utterances."""
MAX_WORKERS = 4
"""If nobody asks for more: the work is done by the server, which has other things to do."""
_SAMPLE = 20_000
"""Utterances that are counted to learn how many a speaker has."""
_IDLE = 0.1
"""Seconds between looks at what other workers still have."""


@dataclass(frozen=True)
class Options:
    """How centroids are computed."""

    average: Average = "mean"
    min_utterances: int = 1
    chunk_size: int | None = None
    """Speakers a range; None: as many as hold about BYTES_A_RANGE of vectors."""
    recompute: bool = False
    """All of them, not only those that are new or stale."""


class Task(NamedTuple):
    """One dataset's part in a job."""

    dataset_id: int
    run_id: int
    limit: int
    """Speakers a range."""


@dataclass(frozen=True)
class Job:
    """All that a worker process is told."""

    settings: Settings
    model_id: int
    tasks: tuple[Task, ...]
    min_utterances: int


def count_workers(settings: Settings, *, asked: int | None = None) -> int:
    """How many workers to start, of those that may be. Raises UsageError if more are `asked` for, or set."""
    number = asked or settings.embedding_workers or min(MAX_WORKERS, count_cores())
    if asked is None:
        number = min(number, (settings.db_max_connections - PARENT_CONNECTIONS) // CONNECTIONS_A_WORKER)
    check_connections(settings, number, CONNECTIONS_A_WORKER)
    return number


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
        if options.recompute or any(averages.is_due(connection, share.queue) for share in shares):
            prepare(__name__)
    refresh = partial(
        averages.refresh,
        average=options.average,
        min_utterances=options.min_utterances,
        recompute=options.recompute,
    )
    limits: dict[int, int] = {}
    ranges = 0
    for dataset_id, queue in ((share.dataset.dataset_id, share.queue) for share in shares):
        # Patiently: workers of another run may be writing the same rows in another order, which is a deadlock.
        database.patiently(partial(refresh, queue=queue))
        with database.begin() as connection:
            limits[dataset_id] = options.chunk_size or _range(connection, queue, model.dim)
            ranges += -(-queue.remaining(connection) // limits[dataset_id])
    number = max(1, min(workers, ranges))

    def jobs(runs: Mapping[int, int]) -> list[Job]:
        tasks = tuple(Task(dataset_id, run_id, limits[dataset_id]) for dataset_id, run_id in runs.items())
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
        self._claimant.keep()
        tasks = [(centroid_queue(task.dataset_id, self._job.model_id), task) for task in self._job.tasks]
        try:
            self._serve(tasks)
        except DatabaseError:
            # No speaker is to blame, so none is to be counted as one at whom a worker died.
            with contextlib.suppress(DatabaseError), self._database.begin() as connection:
                for queue, _ in tasks:
                    queue.release(connection, self._claimant.token)
            raise
        self._claimant.leave()

    def _serve(self, tasks: Sequence[tuple[Queue, Task]]) -> None:
        while tasks and not self._channel.stopping.is_set():
            for queue, task in tasks:
                self._claimant.start()
                while not self._channel.stopping.is_set():
                    claim = self._claimant.claim(queue, task.limit, idle=True)
                    self._work_on(queue, task.run_id, claim)
                    if not claim.keys:
                        break
            tasks = [task for task in tasks if self._database.patiently(task[0].is_open)]
            if tasks:
                self._channel.stopping.wait(_IDLE)

    def _work_on(self, queue: Queue, run_id: int, claim: Claim) -> None:
        if claim.quarantined:
            self._report(queue, Tally(failed=Counter(worker_died=claim.quarantined)))
        if claim.keys:
            self._compute(queue, run_id, claim.keys)

    def _compute(self, queue: Queue, run_id: int, keys: Sequence[int]) -> None:
        """Compute one range; one that fails is halved until the speaker that makes it fail is alone."""
        self._claimant.renew()
        average = partial(averages.compute_range, min_utterances=self._job.min_utterances, run_id=run_id)
        try:
            tally = self._database.patiently(lambda c: average(c, queue, self._claimant.token, keys))
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

    def _report(self, queue: Queue, tally: Tally) -> None:
        self._channel.send(Committed(queue.scope["dataset_id"], tally))


def _is_about_data(error: DatabaseError) -> bool:
    """Whether values or their storage are at fault, and not the server, its disk or a missing right."""
    return sqlstate(error.__cause__)[:2] in ("22", "XX")


def _range(connection: Connection, queue: Queue, dim: int) -> int:
    """Speakers that hold about BYTES_A_RANGE of vectors, by a sample of the pending ones."""
    count = text(
        "SELECT count(*), count(DISTINCT centroid_id) FROM (SELECT c.centroid_id FROM embstore.centroid c"
        " JOIN embstore.item i ON i.dataset_id = c.dataset_id AND i.speaker = c.speaker"
        f" WHERE c.dataset_id = :dataset_id AND model_id = :model_id AND status = 'pending' LIMIT {_SAMPLE}) s"
    )
    utterances, speakers = connection.execute(count, queue.scope).one()
    return int(max(MIN_RANGE, min(MAX_RANGE, BYTES_A_RANGE * speakers // max(utterances * dim * 4, 1))))
