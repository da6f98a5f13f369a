"""Two teams extract at once, each by its own login with a password, and are killed: nobody touches the other's work."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from audit import ITEMS, Vectors, audit
from commands import Command, Gate, Start, Watcher, wait_until
from helpers import extraction, vectors_of
from people import PASSWORD, People, asked_for_passwords
from sqlalchemy import text

from embstore import catalog, members, vectors
from embstore.db.engine import Database
from embstore.errors import DatabaseError, EmbstoreError, LeaseLost
from embstore.queue import Queue, Refusal, end_lease, renew_lease, take_lease

NAMES = ("alpha", "beta")

STATE = """
SELECT item_id, status, attempts, claim_token, error_code, finished_at FROM embstore.extraction
JOIN embstore.dataset USING (dataset_id) WHERE name = %s ORDER BY item_id
"""
VECTORS = """
SELECT i.path, e.embedding::text FROM embstore.embedding e JOIN embstore.item i USING (dataset_id, item_id)
JOIN embstore.dataset d USING (dataset_id) WHERE d.name = %s
"""
STATUSES = """
SELECT status, count(*) FROM embstore.extraction JOIN embstore.dataset USING (dataset_id) WHERE name = %s GROUP BY 1
"""


@dataclass
class Side:
    """One team's writer, and its dataset."""

    login: str
    address: str
    dataset: str
    database: Database


@pytest.fixture
def sides(people: People, database: Database, server_home: Path) -> Iterator[tuple[Side, Side]]:
    """`alpha` is to be the first one's, `beta` the second one's. The server lets neither in without the password."""
    logins = []
    for name in NAMES:
        team, login = people.team(f"team-{name}"), people.name(f"writer-{name}")
        with database.begin() as connection:
            verifier = members.verifier(connection, PASSWORD, login)
            members.add_member(connection, team, login, "writer", verifier=verifier)
        logins.append(login)
    with asked_for_passwords(server_home, database, members.WRITER):
        first, second = (
            Side(login, people.address(login, PASSWORD), name, people.connect(login, password=PASSWORD))
            for login, name in zip(logins, NAMES, strict=True)
        )
        yield first, second


def statuses(watcher: Watcher, dataset: str) -> dict[str, int]:
    return dict(watcher.rows(STATUSES, dataset))


def ids(watcher: Watcher, dataset: str) -> tuple[int, int]:
    """The number of a dataset and of the model, which its owner would never tell the other team."""
    ((dataset_id,),) = watcher.rows("SELECT dataset_id FROM embstore.dataset WHERE name = %s", dataset)
    ((model_id,),) = watcher.rows("SELECT model_id FROM embstore.model")
    return dataset_id, model_id


def refused_by(database: Database, sql: str, **values: Any) -> int | str:
    """What a statement of theirs changes or shows, or `refused`."""
    try:
        with database.begin() as connection:
            result = connection.execute(text(sql), values)
            return len(result.all()) if result.returns_rows else result.rowcount
    except DatabaseError as error:
        return "refused" if re.search("permission denied|row-level security", str(error)) else str(error)


def try_everything(thief: Database, queue: Queue, token: int, keys: list[int]) -> None:
    """With a lease of one's own and with the other's token: by embstore's own calls, and by SQL as psql sends it."""
    with thief.begin() as connection:
        own = take_lease(connection)
        for stolen in (own, token):
            assert queue.claim(connection, stolen, 1000) == []
            assert queue.rescue(connection, stolen) == ([], 0)
            assert queue.release(connection, stolen) == 0
            queue.refuse(connection, stolen, [Refusal(key, "failed", "decode_error", "sabotage") for key in keys])
            with pytest.raises(LeaseLost):
                queue.finish(connection, stolen, keys)
        assert queue.retry(connection, ["running", "pending", "failed", "done"]) == 0
        assert (queue.counts(connection), queue.is_open(connection)) == ({}, False)
        with pytest.raises(LeaseLost):
            renew_lease(connection, token)
        end_lease(connection, token)
        end_lease(connection, own)
    with pytest.raises(EmbstoreError), thief.begin() as connection:
        vectors.write(connection, queue, token, keys, vectors_of(len(keys), 16))
    where = "WHERE dataset_id = :dataset_id"
    values = {"dataset_id": queue.scope["dataset_id"], "token": token, "key": keys[0]}
    for sql, outcome in {
        f"UPDATE embstore.extraction SET status = 'pending', claim_token = NULL {where}": 0,
        "UPDATE embstore.extraction SET status = 'done' WHERE claim_token = :token": 0,
        f"DELETE FROM embstore.extraction {where}": 0,
        f"SELECT 1 FROM embstore.extraction {where}": 0,
        f"SELECT 1 FROM embstore.item {where}": 0,
        f"SELECT 1 FROM embstore.embedding {where}": 0,
        f"SELECT 1 FROM embstore.run {where}": 0,
        f"SELECT 1 FROM embstore.dataset {where}": 0,
        f"SELECT 1 FROM embstore.extraction {where} AND item_id = :key FOR UPDATE": 0,
        "SELECT 1 FROM embstore.lease WHERE token = :token": 0,
        "UPDATE embstore.lease SET expires_at = now() WHERE token = :token": 0,
        "DELETE FROM embstore.lease WHERE token = :token": 0,
        "INSERT INTO embstore.extraction (dataset_id, model_id, item_id) VALUES (:dataset_id, 1, 999999)": "refused",
        "INSERT INTO embstore.embedding (dataset_id, model_id, item_id, embedding) SELECT :dataset_id, 1, :key, "
        "array_fill(1::float4, ARRAY[16])::vector": "refused",
    }.items():
        assert refused_by(thief, sql, **values) == outcome, sql


def extract(start: Start, side: Side, *words: str, **env: object) -> Command:
    return start("extract", *words, "--workers", "2", DATABASE_URL=side.address, PROBE_SLEEP=0.03, **env)


def embed(start: Start, side: Side, tones: Path, gate: Gate) -> Command:
    return extract(start, side, str(tones), "--dataset", side.dataset, "--model", "probe", PROBE_GATE=gate.path)


def test_each_resumes_its_own_and_neither_can_touch_the_other_s(
    sides: tuple[Side, Side],
    start: Start,
    tones: Path,
    watcher: Watcher,
    undisturbed: Vectors,
    runs: list[Command],
    gate: Gate,
) -> None:
    watcher.hold_back(ITEMS - 40)
    for side in sides:
        embed(start, side, tones, gate)
    for side in sides:
        wait_until(lambda s=side: statuses(watcher, s.dataset).get("done", 0) >= 10, "both to be at it")  # type: ignore[misc]
    gate.close()
    watcher.hold_back(1)
    for run in runs:
        gate.wait_for(run)
    for run in runs:
        run.kill_group()
    for run in runs:
        assert run.wait() == -signal.SIGKILL
    left = {side.dataset: watcher.rows(STATE, side.dataset) for side in sides}
    assert all({"running", "pending", "done"} <= {row[1] for row in rows} for rows in left.values())

    def sabotage() -> None:
        for thief, victim in (sides, sides[::-1]):
            dataset_id, model_id = ids(watcher, victim.dataset)
            keys = [row[0] for row in left[victim.dataset] if row[1] == "running"]
            token = next(row[3] for row in left[victim.dataset] if row[1] == "running")
            try_everything(thief.database, extraction(dataset_id, model_id), token, keys)
            assert watcher.rows(STATE, victim.dataset) == left[victim.dataset]

    sabotage()  # while the dead workers' leases last
    watcher.let_leases_run_out()
    sabotage()  # and when anybody who sees the rows may rescue them

    gate.open()
    watcher.let_go()
    first, second = sides
    alone = extract(start, second)
    assert alone.wait() == 0, alone.err
    assert f"{ITEMS} done + 0 failed + 0 skipped + 0 running + 0 pending = {ITEMS} utterances" in alone.out
    assert (statuses(watcher, second.dataset), watcher.rows(STATE, first.dataset)) == ({"done": ITEMS}, left["alpha"])
    nothing = extract(start, second)
    assert nothing.wait() == 0
    assert "nothing is pending" in nothing.out
    assert watcher.rows(STATE, first.dataset) == left["alpha"]

    rest = extract(start, first)
    assert rest.wait() == 0, rest.err
    assert f"{ITEMS} done + 0 failed + 0 skipped + 0 running + 0 pending = {ITEMS} utterances" in rest.out
    assert audit(watcher, runs, expected=undisturbed) == {"done": 2 * ITEMS}
    finished = {row[0]: row for row in left["alpha"] if row[1] == "done"}
    assert [row for row in watcher.rows(STATE, "alpha") if row[0] in finished] == list(finished.values())
    for side in sides:
        with side.database.begin() as connection:
            assert [one.name for one in catalog.datasets(connection, "audio")] == [side.dataset]


def test_two_that_run_side_by_side_keep_to_themselves(
    sides: tuple[Side, Side], start: Start, tones: Path, watcher: Watcher, gate: Gate
) -> None:
    """One is killed in the middle; the other goes on to its end and takes up nothing of it."""
    gate.close()
    both = [embed(start, side, tones, gate) for side in sides]
    for run in both:
        gate.wait_for(run)
    killed = both[0].workers()
    both[0].kill_group()
    assert both[0].wait() == -signal.SIGKILL
    watcher.let_leases_run_out(*killed)
    left = watcher.rows(STATE, "alpha")
    gate.open()
    assert both[1].wait() == 0, both[1].err
    assert (statuses(watcher, "beta"), watcher.rows(STATE, "alpha")) == ({"done": ITEMS}, left)
    for command in ("status", "failures", "history"):
        shown = start(command, DATABASE_URL=sides[1].address)
        assert shown.wait() == 0, shown.err
        assert "alpha" not in shown.out + shown.err
    shown, nothing = (refusal(start, sides[1], "extract", "--dataset", name) for name in ("alpha", "nosuch"))
    assert shown.replace("alpha", "nosuch") == nothing


def refusal(start: Start, side: Side, *words: str) -> str:
    """The one line by which a command is refused."""
    run = start(*words, DATABASE_URL=side.address)
    assert run.wait() == 2, run.err
    return run.err


def test_without_the_password_nobody_gets_in(sides: tuple[Side, Side], people: People, start: Start) -> None:
    for password in (None, "wrong"):
        run = start("extract", DATABASE_URL=people.address(sides[0].login, password))
        assert run.wait() == 3
        assert run.err.count("\n") == 1, run.err
        assert PASSWORD not in run.err
    with pytest.raises(psycopg2.OperationalError, match="password"):
        psycopg2.connect(people.address(sides[0].login).replace("+psycopg2", ""))
