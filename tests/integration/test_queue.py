"""Claims, leases, fencing and rescue, on a real PostgreSQL and with claimers that are really at it at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from helpers import ask, at_once, fill, vectors_of, wait_until_blocked
from sqlalchemy import text

from embstore import vectors
from embstore.db.engine import Database, set_local
from embstore.errors import LeaseLost
from embstore.queue import MAX_ATTEMPTS, SUSPECT_GROUP, Queue, Refusal, end_lease, renew_lease, take_lease
from embstore.settings import Settings


def pending(database: Database, count: int) -> Queue:
    with database.begin() as connection:
        return fill(connection, count)


def lease(database: Database) -> int:
    with database.begin() as connection:
        return take_lease(connection)


def claim(database: Database, queue: Queue, token: int, limit: int = 1000, after: int = 0) -> list[int]:
    with database.begin() as connection:
        return queue.claim(connection, token, limit, after)


def rescue(database: Database, queue: Queue, token: int) -> tuple[list[int], int]:
    with database.begin() as connection:
        return queue.rescue(connection, token)


def die(database: Database, token: int) -> None:
    """What becomes of a lease whose worker is dead: it runs out."""
    ask(database, "UPDATE embstore.lease SET expires_at = clock_timestamp() WHERE token = :t RETURNING 1", t=token)


def statuses(database: Database) -> list[tuple[object, ...]]:
    return ask(database, "SELECT status, attempts, count(*) FROM embstore.extraction GROUP BY 1, 2 ORDER BY 1, 2")


def state(database: Database, key: int) -> tuple[object, ...]:
    sql = "SELECT status, attempts, claim_token, error_code, error FROM embstore.extraction WHERE item_id = :key"
    return ask(database, sql, key=key)[0]


def test_claims_come_in_the_order_of_the_keys_and_after_the_last_one(database: Database) -> None:
    queue = pending(database, 10)
    token = lease(database)
    first = claim(database, queue, token, 4)
    second = claim(database, queue, token, 4, after=first[-1])
    assert first + second == list(range(first[0], first[0] + 8))
    assert claim(database, queue, token, 4, after=second[-1] + 2) == []
    assert claim(database, queue, token, 4) == [second[-1] + 1, second[-1] + 2]
    assert statuses(database) == [("running", 1, 10)]


def test_a_claim_does_not_wait_for_another_ones_transaction(database: Database) -> None:
    queue = pending(database, 6)
    one, other = lease(database), lease(database)
    with database.begin() as connection:
        first = queue.claim(connection, one, 3)
        with database.begin() as beside:
            set_local(beside, "lock_timeout", "5s")
            second = queue.claim(beside, other, 6)
    assert len(first) == len(second) == 3
    assert not set(first) & set(second)


def test_claimers_that_run_at_once_share_the_rows_without_overlap(database: Database, settings: Settings) -> None:
    queue = pending(database, 1500)
    barrier = threading.Barrier(4)

    def work() -> list[list[int]]:
        own = Database(settings)
        token = lease(own)
        barrier.wait()
        claims, after = [], 0
        while keys := claim(own, queue, token, 13, after):
            claims.append(keys)
            after = keys[-1]
        own.close()
        return claims

    claims = [keys for mine in at_once(work, work, work, work) for keys in mine]
    assert all(keys == sorted(keys) for keys in claims)
    everything = sorted(key for keys in claims for key in keys)
    assert everything == [row[0] for row in ask(database, "SELECT item_id FROM embstore.item ORDER BY 1")]
    assert statuses(database) == [("running", 1, 1500)]


def test_a_claim_keeps_to_its_dataset_and_model(database: Database) -> None:
    queue = pending(database, 3)
    with database.begin() as connection:
        other = fill(connection, 2, dataset="books")
    assert len(claim(database, other, lease(database))) == 2
    assert len(claim(database, queue, lease(database))) == 3


def test_a_late_write_of_rescued_rows_takes_its_whole_batch_back(database: Database) -> None:
    queue = pending(database, SUSPECT_GROUP + 4)
    late, other = lease(database), lease(database)
    keys = claim(database, queue, late)
    die(database, late)
    rescued, _ = rescue(database, queue, other)
    assert rescued == keys[:SUSPECT_GROUP]
    with pytest.raises(LeaseLost, match=f"{SUSPECT_GROUP} of {len(keys)} rows"), database.begin() as connection:
        vectors.write(connection, queue, late, keys, vectors_of(len(keys)))
    assert ask(database, "SELECT count(*) FROM embstore.embedding") == [(0,)]
    assert statuses(database) == [("running", 1, 4), ("running", 2, SUSPECT_GROUP)]
    with database.begin() as connection:  # nobody has taken these: a lease that ran out is no reason to lose them
        vectors.write(connection, queue, late, keys[SUSPECT_GROUP:], vectors_of(4))
    with database.begin() as connection:
        vectors.write(connection, queue, other, rescued, vectors_of(SUSPECT_GROUP))
    assert statuses(database) == [("done", 1, 4), ("done", 2, SUSPECT_GROUP)]
    assert ask(database, "SELECT count(*) FROM embstore.embedding") == [(len(keys),)]


def test_a_late_refusal_of_a_rescued_row_changes_nothing(database: Database) -> None:
    queue = pending(database, 1)
    late, other = lease(database), lease(database)
    [key] = claim(database, queue, late)
    die(database, late)
    assert rescue(database, queue, other) == ([key], 0)
    with database.begin() as connection:
        queue.refuse(connection, late, [Refusal(key, "failed", "decode_error", "no header")])
    assert state(database, key) == ("running", 2, other, None, None)


def test_a_finish_that_waited_for_a_rescue_is_refused(database: Database) -> None:
    queue = pending(database, 1)
    late, other = lease(database), lease(database)
    [key] = claim(database, queue, late)
    die(database, late)

    def finish() -> None:
        with database.begin() as connection:
            vectors.write(connection, queue, late, [key], vectors_of(1))

    with ThreadPoolExecutor(1) as thread:
        with database.begin() as connection:
            queue.rescue(connection, other)
            late_finish = thread.submit(finish)
            wait_until_blocked(database)
        with pytest.raises(LeaseLost):
            late_finish.result()
    assert state(database, key)[2] == other
    assert ask(database, "SELECT count(*) FROM embstore.embedding") == [(0,)]


def test_a_rescue_passes_over_a_row_that_is_being_finished(database: Database) -> None:
    queue = pending(database, 1)
    late, other = lease(database), lease(database)
    keys = claim(database, queue, late)
    die(database, late)
    with database.begin() as connection:
        vectors.write(connection, queue, late, keys, vectors_of(1))
        assert rescue(database, queue, other) == ([], 0)
    assert statuses(database) == [("done", 1, 1)]


def test_a_lease_goes_by_the_clock_of_the_server_at_the_moment_of_the_call(database: Database) -> None:
    left = "SELECT expires_at - now() FROM embstore.lease WHERE token = :token"  # now(): when the transaction began
    with database.begin() as connection:
        connection.execute(text("SELECT pg_sleep(0.3)"))
        token = take_lease(connection, 30)
        taken = connection.execute(text(left), {"token": token}).scalar_one()
        connection.execute(text("SELECT pg_sleep(0.3)"))
        renew_lease(connection, token, 30)
        renewed = connection.execute(text(left), {"token": token}).scalar_one()
    assert taken >= timedelta(seconds=30.3)
    assert renewed >= timedelta(seconds=30.6)


def test_renewing_an_ended_lease_is_refused(database: Database) -> None:
    token = lease(database)
    with database.begin() as connection:
        end_lease(connection, token)
    with pytest.raises(LeaseLost, match=f"lease {token} was ended"), database.begin() as connection:
        renew_lease(connection, token)


@pytest.mark.parametrize("how", ["ran out", "ended"])
def test_only_rows_without_a_living_lease_are_rescued(database: Database, how: str) -> None:
    queue = pending(database, 5)
    dead, living, rescuer = lease(database), lease(database), lease(database)
    lost = claim(database, queue, dead, 2)
    claim(database, queue, living, 2)
    assert rescue(database, queue, rescuer) == ([], 0)
    with database.begin() as connection:
        if how == "ended":
            end_lease(connection, dead)
        else:
            renew_lease(connection, dead, -1)
    assert rescue(database, queue, rescuer) == (lost, 0)
    assert statuses(database) == [("pending", 0, 1), ("running", 1, 2), ("running", 2, 2)]


def test_suspects_come_in_groups_then_alone_and_the_killer_is_set_aside(database: Database) -> None:
    """Workers die of one row; all others end as done, and nobody but the killer has used up its attempts."""
    queue = pending(database, 40)
    token = lease(database)
    keys = claim(database, queue, token)
    killer = keys[20]
    die(database, token)
    sizes, set_aside, killed = [], 0, 0
    while True:
        token = lease(database)
        suspects, quarantined = rescue(database, queue, token)
        set_aside += quarantined
        if not suspects:
            break
        sizes.append(len(suspects))
        if killer in suspects:
            killed = token
            die(database, token)
            continue
        with database.begin() as connection:
            vectors.write(connection, queue, token, suspects, vectors_of(len(suspects)))
    # The second group holds the killer. What it had no part in is done at once, its 16 then one after the other.
    assert sizes == [16, 16, 8] + [1] * 16
    assert set_aside == 1
    words = "its worker process died, or hung, each of the 3 times that it was being worked on"
    assert state(database, killer) == ("failed", MAX_ATTEMPTS, killed, "worker_died", words)
    assert statuses(database) == [("done", 2, 24), ("done", 3, 15), ("failed", 3, 1)]


def test_released_rows_get_their_attempt_back(database: Database) -> None:
    queue = pending(database, 3)
    token = lease(database)
    keys = claim(database, queue, token)
    with database.begin() as connection:
        assert queue.finish(connection, token, keys[:1]) == keys[:1]
        assert queue.release(connection, token) == 2
        assert queue.release(connection, token) == 0
    assert statuses(database) == [("done", 1, 1), ("pending", 0, 2)]
    assert state(database, keys[1]) == ("pending", 0, None, None, None)
    assert claim(database, queue, lease(database)) == keys[1:]


def test_a_finish_that_is_repeated_is_recognised(database: Database) -> None:
    queue = pending(database, 3)
    token = lease(database)
    keys = claim(database, queue, token)
    for expected in (keys[:2], []):
        with database.begin() as connection:
            assert queue.finish(connection, token, keys[:2]) == expected
    with database.begin() as connection:
        assert queue.finish(connection, token, keys) == keys[2:]
    with pytest.raises(LeaseLost), database.begin() as connection:
        queue.finish(connection, lease(database), keys)


def test_refused_rows_are_tried_again_by_status_and_by_code(database: Database) -> None:
    queue = pending(database, 4)
    token = lease(database)
    keys = claim(database, queue, token)
    codes = [("failed", "decode_error"), ("failed", "not_found"), ("skipped", "too_short"), ("skipped", "silent")]
    with database.begin() as connection:
        refusals = [Refusal(key, *code, "because\tof \\ 'it'") for key, code in zip(keys, codes, strict=True)]
        queue.refuse(connection, token, refusals)
        queue.refuse(connection, token, refusals)
    assert state(database, keys[0]) == ("failed", 1, token, "decode_error", "because\tof \\ 'it'")
    with database.begin() as connection:
        assert queue.retry(connection, ["failed"], ["decode_error", "too_short"]) == 1
    assert state(database, keys[0]) == ("pending", 0, None, None, None)
    with database.begin() as connection:
        assert queue.retry(connection, ["failed", "skipped"], ["silent"]) == 1
        assert queue.retry(connection, ["failed", "skipped"]) == 2
        assert queue.retry(connection, ["failed", "skipped"]) == 0
    assert statuses(database) == [("pending", 0, 4)]


def test_a_queue_is_open_while_anything_is_pending_or_running(database: Database) -> None:
    with database.begin() as connection:
        queue = fill(connection, 2)
        token = take_lease(connection)
        seen = [(queue.is_open(connection), queue.remaining(connection), queue.counts(connection))]
        keys = queue.claim(connection, token, 2)
        seen.append((queue.is_open(connection), queue.remaining(connection), queue.counts(connection)))
        queue.finish(connection, token, keys[:1])
        seen.append((queue.is_open(connection), queue.remaining(connection), queue.counts(connection)))
        queue.refuse(connection, token, [Refusal(keys[1], "skipped", "silent", "digital silence")])
        seen.append((queue.is_open(connection), queue.remaining(connection), queue.counts(connection)))
    assert seen == [
        (True, 2, {"pending": 2}),
        (True, 2, {"running": 2}),
        (True, 1, {"done": 1, "running": 1}),
        (False, 0, {"done": 1, "skipped": 1}),
    ]
