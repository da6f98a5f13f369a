"""Batches: the bad item is found, the model is told from the item, and what waits is bounded."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embstore.errors import ItemError, ItemFailed, WorkerError
from embstore.extract.batching import Outcome, Ready, Waiting, embed_each, embeddable
from embstore.models.base import Prepared

DIM = 3


def ready(key: int, size: int = 2, cost: int = 1) -> Ready:
    return Ready(key, Prepared(np.full(size, key, dtype=np.float32), seconds=key / 2, cost=cost))


class Sums:
    """Embeds an item as (first sample, number of samples, 1); breaks at the samples in `bad`."""

    max_cost = 100

    def __init__(self, bad: Sequence[int] = ()) -> None:
        self.bad = bad
        self.calls = 0

    def prepare(self, path: Path, start: float | None, duration: float | None) -> Prepared:
        raise NotImplementedError

    def embed(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        self.calls += 1
        if any(item.array[0] in self.bad for item in batch):
            raise ValueError("cannot add up\nthis")
        return np.array([[item.array[0], len(item.array), 1] for item in batch], dtype=np.float32)


class Gives(Sums):
    """Embeds every batch as the same matrix."""

    def __init__(self, matrix: Any) -> None:
        super().__init__()
        self.matrix = matrix

    def embed(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        return np.asarray(self.matrix)[: len(batch)]


def code(outcome: Outcome) -> str | None:
    return outcome.result.code if isinstance(outcome.result, ItemError) else None


def test_every_item_gets_its_own_vector_in_one_call() -> None:
    model = Sums()
    outcomes = list(embed_each(model, [ready(key, size=key + 1) for key in (5, 3, 9)], DIM))
    assert [(o.key, o.seconds, list(o.result)) for o in outcomes if not isinstance(o.result, ItemError)] == [
        (5, 2.5, [5, 6, 1]),
        (3, 1.5, [3, 4, 1]),
        (9, 4.5, [9, 10, 1]),
    ]
    assert model.calls == 1


@pytest.mark.parametrize("bad", [[0], [31], [16], [7, 8], [0, 31], [3, 19, 20]])
def test_halving_finds_the_bad_items_and_the_rest_succeed(bad: list[int]) -> None:
    model = Sums(bad)
    outcomes = list(embed_each(model, [ready(key) for key in range(32)], DIM))
    assert [o.key for o in outcomes] == list(range(32))
    assert [o.key for o in outcomes if code(o)] == bad
    for outcome in outcomes:
        if isinstance(outcome.result, ItemError):
            assert isinstance(outcome.result, ItemFailed)
            assert (code(outcome), outcome.result.detail) == ("model_error", "ValueError: cannot add up")
        else:
            assert outcome.result[0] == outcome.key
    assert model.calls <= 1 + 10 * len(bad)


def test_when_every_item_fails_none_is_to_blame() -> None:
    with pytest.raises(WorkerError, match=r"each of 4 items, .*: ValueError: cannot add up$"):
        list(embed_each(Sums(range(4)), [ready(key) for key in range(4)], DIM))
    assert [code(o) for o in embed_each(Sums(range(3)), [ready(key) for key in range(3)], DIM)] == ["model_error"] * 3


def test_what_the_model_could_embed_before_tells_whether_it_still_works() -> None:
    """Four items in a row may well be bad; a device that is lost fails on what it has embedded before, too."""
    proof = ready(9).prepared
    bad = [ready(key) for key in range(4)]
    assert [code(o) for o in embed_each(Sums(range(4)), bad, DIM, proof)] == ["model_error"] * 4
    with pytest.raises(WorkerError, match=r"even on what it has embedded before, .*: ValueError: cannot add up$"):
        list(embed_each(Sums(range(10)), bad[:1], DIM, proof))
    unneeded = Sums()
    list(embed_each(unneeded, bad, DIM, proof))
    assert unneeded.calls == 1


def test_the_cheapest_item_that_the_model_did_not_fail_on_is_the_proof() -> None:
    batch = [ready(0, cost=1), ready(1, cost=7), ready(2, cost=5)]
    proof = embeddable(batch, list(embed_each(Sums([0]), batch, DIM)))
    assert proof is batch[2].prepared
    assert embeddable(batch[:1], list(embed_each(Sums([0]), batch[:1], DIM))) is None


@pytest.mark.parametrize(
    ("vector", "expected"),
    [
        ([1, float("nan"), 0], "not_finite"),
        ([float("inf"), 0, 0], "not_finite"),
        ([0, 0, float("-inf")], "not_finite"),
        ([2e19, 0, 0], "not_finite"),  # its square is more than float32 holds, where pgvector computes cosines
        ([1e19, 1e19, 1e19], None),
        ([0, -0.0, 0], "zero_vector"),
        ([1e-30, 0, 0], "zero_vector"),
        ([1e-18, 0, 0], None),
    ],
)
def test_a_vector_of_no_use_is_a_fault_of_its_item_alone(vector: list[float], expected: str | None) -> None:
    model = Gives(np.array([[1, 2, 3], vector, [4, 5, 6]], dtype=np.float32))
    outcomes = list(embed_each(model, [ready(0), ready(1), ready(2)], DIM))
    assert [code(o) for o in outcomes] == [None, expected, None]


def test_vectors_are_judged_as_they_will_be_stored() -> None:
    """A model that computes in float64 may hold more than the float32 that is stored."""
    outcomes = list(embed_each(Gives([[1e300, 0, 0], [0.1, 0, 0]]), [ready(0), ready(1)], DIM))
    assert [code(o) for o in outcomes] == ["not_finite", None]
    assert isinstance(outcomes[1].result, np.ndarray)
    assert outcomes[1].result.dtype == np.float32


@pytest.mark.parametrize("matrix", [np.ones((0, DIM)), np.ones((1, DIM + 1)), np.ones(DIM), np.ones((1, DIM, 1))])
def test_vectors_of_another_shape_are_a_fault_of_the_model(matrix: Any) -> None:
    with pytest.raises(WorkerError, match=r"the model gave vectors of shape \(.*\) instead of \(1, 3\)"):
        list(embed_each(Gives(matrix), [ready(0)], DIM))


def never() -> bool:
    return False


def test_batches_are_bounded_by_cost_and_keep_the_order() -> None:
    waiting = Waiting(10**6)
    for key, cost in enumerate([4, 4, 3, 50, 1, 9, 9]):
        waiting.put(ready(key, cost=cost))
    batches = [[item.key for item in waiting.take(10, never)] for _ in range(5)]
    assert batches == [[0, 1], [2], [3], [4, 5], [6]]


def test_taking_waits_for_an_item_or_for_the_end() -> None:
    waiting = Waiting(10**6)
    over = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        taken = thread.submit(waiting.take, 10, over.is_set)
        waiting.put(ready(7))
        assert [item.key for item in taken.result()] == [7]
        taken = thread.submit(waiting.take, 10, over.is_set)
        over.set()
        assert taken.result() == []
    waiting.put(ready(8))
    assert waiting.take(10, over.is_set) == []


def test_taking_gives_up_when_nothing_comes() -> None:
    assert Waiting(10**6).take(10, never, patience=0.1) == []


def test_what_waits_is_bounded_in_bytes() -> None:
    """Four threads put 200 items of 4,000 bytes; never more than the bound and one item a thread wait."""
    waiting = Waiting(20_000)
    numbers = iter(range(200))
    lock = threading.Lock()

    def decode() -> None:
        while waiting.wait_for_room():
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            waiting.put(ready(number, size=1000))

    with ThreadPoolExecutor(4) as threads:
        decoders = [threads.submit(decode) for _ in range(4)]
        taken: list[int] = []
        while len(taken) < 200:
            batch = waiting.take(1000, never)
            assert sum(item.prepared.array.nbytes for item in batch) < 20_000 + 4 * 4000
            taken += [item.key for item in batch]
        for decoder in decoders:
            decoder.result()
    assert sorted(taken) == list(range(200))


def test_closing_frees_those_who_wait_for_room() -> None:
    waiting = Waiting(1)
    waiting.put(ready(0))
    with ThreadPoolExecutor(2) as threads:
        blocked = [threads.submit(waiting.wait_for_room) for _ in range(2)]
        waiting.close()
        assert [each.result() for each in blocked] == [False, False]
    assert waiting.wait_for_room() is False
