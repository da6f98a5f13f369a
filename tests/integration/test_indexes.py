"""Vector indexes: built beside running work, used, replaced, cleared away when a build was cut off, and checked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from commands import wait_until
from helpers import Facts, ask, entry, fill, vectors_of
from sqlalchemy import text

from embstore import catalog, indexes, recall, vectors
from embstore.catalog import StoredModel
from embstore.db.engine import Database
from embstore.errors import DatabaseError, UsageError
from embstore.indexes import Plan
from embstore.queue import take_lease
from embstore.search import search
from embstore.settings import Settings

DIM, ITEMS = 16, 2000


@pytest.fixture
def model(database: Database) -> StoredModel:
    """A model with 2,000 vectors in two datasets."""
    with database.begin() as connection:
        for dataset, seed in (("calls", 0), ("books", 1)):
            entries = [entry(f"{i:04}.wav", f"s{i % 10}") for i in range(ITEMS // 2)]
            queue = fill(connection, entries, dataset=dataset, model=Facts(dim=DIM))
            token = take_lease(connection)
            keys = queue.claim(connection, token, ITEMS)
            vectors.write(connection, queue, token, keys, vectors_of(len(keys), DIM, seed))
        return catalog.get_model(connection, "small")


def planned(database: Database, model: StoredModel, *words: str, **more: int) -> Plan:
    with database.begin() as connection:
        return indexes.plan(connection, model, *words, local=True, workers=0, options=more)  # type: ignore[arg-type]


def build(database: Database, plan: Plan) -> list[str]:
    return indexes.build(database, plan, lambda _: None)


def states(database: Database) -> dict[str, str]:
    with database.begin() as connection:
        return {index.name: index.state for index in indexes.find(connection)}


def plan_of(database: Database, query: str) -> str:
    with database.begin() as connection:
        return "\n".join(connection.exec_driver_sql(f"EXPLAIN {query}").scalars())


@pytest.mark.parametrize("kind", indexes.KINDS)
@pytest.mark.parametrize("precision", indexes.PRECISIONS)
def test_an_index_is_built_and_used(database: Database, model: StoredModel, kind: str, precision: str) -> None:
    plan = planned(database, model, kind, precision)
    assert build(database, plan) == []
    assert states(database) == {plan.name: "ready"}
    same = []
    for query in vectors_of(20, DIM, seed=2):
        found, exact = search(database, query), search(database, query, exact=True)
        assert (found.method, found.facts["index"]) == ("index", plan.name)
        same.append(len({hit.item_id for hit in found} & {hit.item_id for hit in exact}) / len(exact))
    # Random vectors have no clusters for ivfflat's lists to follow, whose centres are drawn at random too.
    assert np.mean(same) >= (0.8 if kind == "hnsw" else 0.4)
    with pytest.raises(UsageError, match=f"has this index already, {plan.name}: to build it anew, type"):
        build(database, plan)


def test_another_precision_takes_the_place(database: Database, model: StoredModel) -> None:
    build(database, planned(database, model, "hnsw", "full", m=4, ef_construction=16))
    assert build(database, planned(database, model, "hnsw", "half", m=4, ef_construction=16)) == ["embedding_1_hnsw"]
    assert states(database) == {"embedding_1_hnsw_half": "ready"}
    assert [index.name for index in indexes.drop(database, model)] == ["embedding_1_hnsw_half"]
    assert (states(database), indexes.drop(database, model)) == ({}, [])


def test_memory_is_by_size_and_within_bounds(database: Database, model: StoredModel) -> None:
    small = planned(database, model, "hnsw", "full")
    assert (small.rows, small.memory, small.workers) == (ITEMS, 64 << 20, 0)  # no less than the server's own
    large = indexes._needed("hnsw", 10_000_000, 1024, {"m": 16})
    assert 18e9 < large < 20e9  # 1,758 bytes a row
    with database.begin() as connection:
        given = indexes.plan(connection, model, local=False, memory=5 << 30, workers=3)
    assert (given.memory, given.workers) == (5 << 30, 3)


def test_vectors_that_are_too_long_are_refused(database: Database) -> None:
    with database.begin() as connection:
        for dim in (2001, 4001):
            catalog.ensure_model(connection, Facts(name=f"d{dim}", dim=dim))
        wide, wider = (catalog.get_model(connection, name) for name in ("d2001", "d4001"))
    with pytest.raises(UsageError, match=r"2,001 dimensions .* at full precision, .* 2,000: add --precision half"):
        planned(database, wide, "hnsw", "full")
    with pytest.raises(UsageError, match=r"4,001 dimensions .* at half precision, .* 4,000: search is exact"):
        planned(database, wider, "hnsw", "half")
    build(database, planned(database, wide, "hnsw", "half"))
    assert states(database) == {"embedding_1_hnsw_half": "ready"}


@pytest.fixture
def old_snapshot(settings: Settings, model: StoredModel) -> Iterator[Callable[[], None]]:
    """A transaction that has written to the model's partition, and for whose end a concurrent build waits."""
    other = Database(settings)
    context = other.begin()
    connection = context.__enter__()
    connection.execute(text("DELETE FROM embstore.embedding_1 WHERE item_id = 1"))
    ended = threading.Event()

    def end() -> None:
        if not ended.is_set():
            ended.set()
            context.__exit__(None, None, None)

    yield end
    end()
    other.close()


def test_a_second_build_at_the_same_time_is_refused(
    database: Database, settings: Settings, model: StoredModel, old_snapshot: Callable[[], None]
) -> None:
    plan = planned(database, model)
    seen: list[str] = []
    first = threading.Thread(target=lambda: indexes.build(database, plan, lambda index: seen.append(index.phase or "")))
    first.start()
    wait_until(lambda: states(database) == {plan.name: "being built"}, "the build")
    second = Database(settings, pool_size=2)
    for again in (lambda: build(second, plan), lambda: indexes.drop(second, model)):
        with pytest.raises(UsageError, match=r"is being built or dropped right now \(process \d+ of the server\)"):
            again()
    second.close()
    wait_until(lambda: "waiting for writers before build" in seen, "a look at what it waits for")
    old_snapshot()
    first.join()
    assert states(database) == {plan.name: "ready"}


def test_interrupted_it_leaves_nothing(
    database: Database, model: StoredModel, old_snapshot: Callable[[], None]
) -> None:
    plan = planned(database, model)
    release = threading.Timer(2.0, old_snapshot)  # clearing away waits for it, too

    def interrupt(_index: object) -> None:
        release.start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        indexes.build(database, plan, interrupt)
    assert states(database) == {}
    assert build(database, plan) == []


def test_cut_off_it_leaves_a_broken_one_which_the_next_build_clears(
    database: Database, settings: Settings, model: StoredModel, old_snapshot: Callable[[], None]
) -> None:
    plan = planned(database, model)

    def kill(index: indexes.Index) -> None:
        ask(database, "SELECT pg_terminate_backend(:pid)", pid=index.pid)

    victim = Database(settings, pool_size=2)
    with pytest.raises(DatabaseError):
        indexes.build(victim, plan, kill)
    victim.close()
    wait_until(lambda: states(database) == {plan.name: "broken"}, "the end of the build")
    old_snapshot()
    assert search(database, vectors_of(1, DIM)[0]).method == "scan"
    assert build(database, plan) == []
    assert states(database) == {plan.name: "ready"}


def test_loading_under_an_index_is_spoken_of_where_it_costs_more(database: Database, model: StoredModel) -> None:
    with database.begin() as connection:
        assert indexes.loading(connection, 1, 1_000_000) is None
    build(database, planned(database, model))
    with database.begin() as connection:
        assert indexes.loading(connection, 1, 9_999) is None
        costs = indexes.loading(connection, 1, 1_000_000)
    assert costs is not None
    assert costs.under > costs.after > 0


def test_a_check_tells_a_poor_index_from_a_good_one(database: Database, model: StoredModel) -> None:
    with database.begin() as connection:
        datasets = [one for _, some in catalog.embedded(connection, None, None) for one in some]
        name = connection.exec_driver_sql("SELECT current_database()").scalar_one()
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET embstore.search_bound = 100")
    database.close()
    unindexed = list(recall.check(database, model, datasets, queries=5))
    assert {(line.recall, line.method) for line in unindexed if "of all" not in line.scope} == {(1.0, "scan")}
    build(database, planned(database, model, "hnsw", "full"))
    good = {line.scope: line for line in recall.check(database, model, datasets, queries=20)}
    assert list(good) == [
        *("all", "dataset 'calls'", "dataset 'books'", "50% of all", "10% of all", "1% of all", "0.1% of all")
    ]
    assert [good[scope].method for scope in ("all", "dataset 'books'", "50% of all")] == ["index"] * 3
    assert [good[scope].method for scope in ("1% of all", "0.1% of all")] == ["prefilter"] * 2
    assert [good[scope].recall for scope in ("1% of all", "0.1% of all")] == [1.0] * 2
    assert good["all"].recall >= 0.95
    assert all(line.queries == 20 and line.rate > 0 and line.exact_rate > 0 for line in good.values())
    indexes.drop(database, model)
    build(database, planned(database, model, "hnsw", "full", m=2, ef_construction=4))
    poor = next(iter(recall.check(database, model, datasets, queries=20)))
    assert poor.lowest <= poor.recall < good["all"].recall
