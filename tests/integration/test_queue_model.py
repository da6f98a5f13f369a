"""The queue against a model of it: workers that claim, finish, refuse, die, wake up late and are rescued, in any order.

Every step is one transaction on a real PostgreSQL. After each, all rows must be what the model says, a vector must be
there exactly where a row is done, and the counts must add up. A second test lets threads do the same at once, where no
model can say what comes out: there, only what must never happen is looked for.
"""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from dataclasses import dataclass, field

import hypothesis.strategies as st
from helpers import ask, at_once, entry, fill, vectors_of
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from embstore import vectors
from embstore.db.engine import Database
from embstore.errors import LeaseLost
from embstore.queue import MAX_ATTEMPTS, SUSPECT_GROUP, Queue, Refusal, end_lease, renew_lease, take_lease
from embstore.settings import Settings

EXAMPLES = 400 if "EMBSTORE_TEST_SOAK" in os.environ else 25
STEPS = 40
ROWS = st.integers(1, 40)
SHARE = st.integers(0, 3)
"""Which of the rows that a worker has in hand are meant: all, every second one, …"""

_STATE = """
SELECT x.item_id, x.status, x.attempts, x.claim_token, x.error_code, e.item_id IS NOT NULL
FROM embstore.extraction x LEFT JOIN embstore.embedding e USING (dataset_id, model_id, item_id)
"""


@dataclass
class Row:
    """What the model knows of a row."""

    status: str = "pending"
    attempts: int = 0
    owner: int | None = None
    code: str | None = None

    def refuse(self, status: str, code: str) -> None:
        self.status, self.code = status, code


@dataclass
class Worker:
    """What the model knows of a worker: its lease, and the rows that it believes to have."""

    token: int
    alive: bool = True
    ended: bool = False
    in_hand: set[int] = field(default_factory=set)

    def some(self, share: int) -> list[int]:
        return sorted(self.in_hand)[:: share + 1]


class QueueMachine(RuleBasedStateMachine):
    """Runs each step on the database and on the model."""

    steps = 0
    """Of all machines together."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.database = database
        self.rows: dict[int, Row] = {}
        self.workers: list[Worker] = []
        self.queue: Queue

    @initialize(count=ROWS)
    def begin(self, count: int) -> None:
        with self.database.begin() as connection:
            connection.exec_driver_sql("DELETE FROM embstore.dataset")
            connection.exec_driver_sql("DELETE FROM embstore.lease")
            self.queue = fill(connection, count)
        self.rows = {key: Row() for (key,) in ask(self.database, "SELECT item_id FROM embstore.extraction")}

    @rule(count=st.integers(1, 20))
    def register_more(self, count: int) -> None:
        with self.database.begin() as connection:
            fill(connection, [entry(f"{n:04}.wav") for n in range(len(self.rows) + count)])
        for (key,) in ask(self.database, "SELECT item_id FROM embstore.extraction"):
            self.rows.setdefault(key, Row())

    @rule()
    @precondition(lambda self: len(self.workers) < 5)
    def join(self) -> None:
        with self.database.begin() as connection:
            self.workers.append(Worker(take_lease(connection)))

    @rule(data=st.data(), limit=ROWS, restart=st.booleans())
    @precondition(lambda self: self.workers)
    def claim(self, data: st.DataObject, limit: int, restart: bool) -> None:
        worker = self._one(data)
        after = 0 if restart or not worker.in_hand else max(worker.in_hand)
        with self.database.begin() as connection:
            keys = self.queue.claim(connection, worker.token, limit, after)
        expected = sorted(key for key, row in self.rows.items() if row.status == "pending" and key > after)[:limit]
        assert keys == expected
        self._give(worker, keys)

    @rule(data=st.data())
    @precondition(lambda self: self.workers)
    def rescue(self, data: st.DataObject) -> None:
        worker = self._one(data)
        with self.database.begin() as connection:
            keys, quarantined = self.queue.rescue(connection, worker.token)
        abandoned = [key for key, row in sorted(self.rows.items()) if self._is_abandoned(row)]
        killers = [key for key in abandoned if self.rows[key].attempts >= MAX_ATTEMPTS]
        assert quarantined == len(killers)
        for key in killers:
            self.rows[key].refuse("failed", "worker_died")
        for attempts in range(MAX_ATTEMPTS):
            limit = SUSPECT_GROUP if attempts < MAX_ATTEMPTS - 1 else 1
            if expected := [key for key in abandoned if self.rows[key].attempts == attempts][:limit]:
                assert keys == expected
                self._give(worker, keys)
                return
        assert keys == []

    @rule(data=st.data(), share=SHARE)
    @precondition(lambda self: self.workers)
    def finish(self, data: st.DataObject, share: int) -> None:
        """Also a second time, as after a commit whose answer got lost."""
        worker = self._one(data)
        keys = worker.some(share)
        lost = [key for key in keys if not self._holds(worker, key, ("running", "done"))]
        try:
            with self.database.begin() as connection:
                vectors.write(connection, self.queue, worker.token, keys, vectors_of(len(keys)))
        except LeaseLost:
            assert lost
        else:
            assert not lost
            for key in keys:
                self.rows[key].status = "done"

    @rule(data=st.data(), share=SHARE, status=st.sampled_from(["failed", "skipped"]))
    @precondition(lambda self: self.workers)
    def refuse(self, data: st.DataObject, share: int, status: str) -> None:
        worker = self._one(data)
        keys = worker.some(share)
        with self.database.begin() as connection:
            refusals = [Refusal(key, status, "reason", "words") for key in keys]
            self.queue.refuse(connection, worker.token, refusals)
        for key in keys:
            if self._holds(worker, key, ("running",)):
                self.rows[key].refuse(status, "reason")

    @rule(data=st.data())
    @precondition(lambda self: self.workers)
    def release(self, data: st.DataObject) -> None:
        worker = self._one(data)
        with self.database.begin() as connection:
            self.queue.release(connection, worker.token)
        for row in self.rows.values():
            if row.status == "running" and row.owner == worker.token:
                row.status, row.attempts, row.owner = "pending", 0, None

    @rule(data=st.data())
    @precondition(lambda self: self.workers)
    def fall_silent(self, data: st.DataObject) -> None:
        """Its lease runs out; it may wake up and go on as if nothing had happened."""
        worker = self._one(data)
        expire(self.database, worker.token)
        worker.alive = False

    @rule(data=st.data())
    @precondition(lambda self: self.workers)
    def renew(self, data: st.DataObject) -> None:
        worker = self._one(data)
        try:
            with self.database.begin() as connection:
                renew_lease(connection, worker.token)
        except LeaseLost:
            assert worker.ended
        else:
            assert not worker.ended
            worker.alive = True

    @rule(data=st.data())
    @precondition(lambda self: self.workers)
    def parent_sees_it_die(self, data: st.DataObject) -> None:
        worker = self._one(data)
        with self.database.begin() as connection:
            end_lease(connection, worker.token)
        worker.alive, worker.ended = False, True

    @rule()
    def retry(self) -> None:
        with self.database.begin() as connection:
            self.queue.retry(connection, ["failed"])
        for key, row in self.rows.items():
            if row.status == "failed":
                self.rows[key] = Row()

    @invariant()
    def rows_are_what_the_model_says(self) -> None:
        QueueMachine.steps += 1
        found = {key: tuple(rest) for key, *rest in ask(self.database, _STATE)}
        assert found == {
            key: (row.status, row.attempts, row.owner, row.code, row.status == "done") for key, row in self.rows.items()
        }

    @invariant()
    def counts_add_up(self) -> None:
        if self.rows:
            with self.database.begin() as connection:
                counts = self.queue.counts(connection)
                assert sum(counts.values()) == len(self.rows)
                assert self.queue.remaining(connection) == counts.get("pending", 0) + counts.get("running", 0)

    def _one(self, data: st.DataObject) -> Worker:
        return data.draw(st.sampled_from(self.workers))

    def _give(self, worker: Worker, keys: list[int]) -> None:
        for key in keys:
            row = self.rows[key]
            row.status, row.attempts, row.owner = "running", row.attempts + 1, worker.token
        worker.in_hand |= set(keys)

    def _holds(self, worker: Worker, key: int, statuses: tuple[str, ...]) -> bool:
        row = self.rows[key]
        return row.status in statuses and row.owner == worker.token

    def _is_abandoned(self, row: Row) -> bool:
        alive = {worker.token for worker in self.workers if worker.alive}
        return row.status == "running" and row.owner not in alive


def expire(database: Database, token: int) -> None:
    with database.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE embstore.lease SET expires_at = clock_timestamp() - interval '1 s' WHERE token = %s", (token,)
        )


def test_any_order_of_steps_leaves_what_the_model_says(database: Database) -> None:
    run_state_machine_as_test(
        lambda: QueueMachine(database),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize="EMBSTORE_TEST_SOAK" not in os.environ,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{EXAMPLES} interleavings, {QueueMachine.steps:,} steps")  # shown by pytest -rP


def test_threads_at_once_never_finish_a_row_twice(database: Database, settings: Settings) -> None:
    """Four workers whose leases run out at random moments, as if each were stopped and woken again and again."""
    with database.begin() as connection:
        queue = fill(connection, 300)
    finished: Counter[int] = Counter()
    counting = threading.Lock()

    def work(seed: int) -> None:
        rng, own = random.Random(seed), Database(settings)
        token = own.patiently(take_lease)
        while own.patiently(queue.is_open):
            keys = own.patiently(lambda c: queue.claim(c, token, rng.randint(1, 12)))
            keys = keys or own.patiently(lambda c: queue.rescue(c, token))[0]
            if rng.random() < 0.3:
                expire(own, token)
            mine = keys[:: rng.randint(1, 2)]
            try:
                with own.begin() as connection:
                    vectors.write(connection, queue, token, mine, vectors_of(len(mine)))
            except LeaseLost:
                continue
            own.patiently(lambda c: renew_lease(c, token))
            with counting:
                finished.update(mine)
            if rng.random() < 0.3:
                own.patiently(lambda c: queue.release(c, token))
        own.close()

    at_once(*(lambda seed=seed: work(seed) for seed in range(4)))  # type: ignore[misc]
    with database.begin() as connection:
        counts = queue.counts(connection)
    assert counts["done"] == len(finished)
    assert set(finished.values()) == {1}
    assert counts["done"] + counts.get("failed", 0) == 300
    assert ask(database, "SELECT count(*), count(DISTINCT item_id) FROM embstore.embedding") == [(counts["done"],) * 2]
