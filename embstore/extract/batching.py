"""From prepared items to batches and from batches to outcomes; knows nothing of the database."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embstore.errors import ItemError, ItemFailed, WorkerError
from embstore.models.base import Face, Model, Prepared

_SYSTEMATIC = 4
"""When a batch of at least this many items fails and so does each of them alone, no item is to blame."""

_BY_THE_MODEL = ("model_error", "out_of_memory")
"""Reasons that may not be the item's fault at all."""
_NO_MEMORY = ("OutOfMemoryError", "MemoryError")
"""Names of what is raised where memory runs out: PyTorch's, which is not imported here, and Python's."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A prepared item, with the key of its row."""

    key: int
    prepared: Prepared


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one item: a vector, float32 [dim], or the reason why there is none."""

    key: int
    seconds: float
    result: NDArray[np.float32] | ItemError
    face: Face | None = None


def embed_each(model: Model, batch: Sequence[Ready], dim: int, proof: Prepared | None = None) -> Iterator[Outcome]:
    """Embed a batch; one that fails is halved until the item that makes it fail is alone.

    `proof` is an item that the model could embed before. Raises WorkerError when it is the model, the device or the
    memory: when what fails now is the proof too, or, without one, every single item.
    """
    outcomes = list(_halving(model, batch, dim))
    errors = [o.result for o in outcomes if isinstance(o.result, ItemFailed) and o.result.code in _BY_THE_MODEL]
    if errors and proof is not None:
        _require_works(model, proof, errors[0])
    elif len(errors) == len(batch) >= _SYSTEMATIC:
        raise WorkerError(f"the model failed on each of {len(batch)} items, so no item is to blame: {errors[0].detail}")
    yield from outcomes


def embeddable(batch: Sequence[Ready], outcomes: Sequence[Outcome]) -> Prepared | None:
    """The cheapest item of a batch on which the model did not fail."""
    failed = {o.key for o in outcomes if isinstance(o.result, ItemFailed) and o.result.code in _BY_THE_MODEL}
    return min((item.prepared for item in batch if item.key not in failed), key=lambda p: p.cost, default=None)


def _require_works(model: Model, proof: Prepared, error: ItemFailed) -> None:
    try:
        model.embed([proof])
    except BaseException:  # noqa: BLE001 - as in _halving
        raise WorkerError(
            f"the model fails even on what it has embedded before, so no item is to blame: {error.detail}"
        ) from None


def _halving(model: Model, batch: Sequence[Ready], dim: int) -> Iterator[Outcome]:
    try:
        vectors = model.embed([item.prepared for item in batch])
    # Whatever a model raises is about these items, and is recorded with them. Not only an Exception: libraries call
    # sys.exit, and those in Rust panic.
    except BaseException as error:  # noqa: BLE001
        if len(batch) == 1:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            code = "out_of_memory" if type(error).__name__ in _NO_MEMORY else "model_error"
            yield _outcome(batch[0], ItemFailed(code, reason))
            return
        middle = len(batch) // 2
        yield from _halving(model, batch[:middle], dim)
        yield from _halving(model, batch[middle:], dim)
        return
    if vectors.shape != (len(batch), dim):
        raise WorkerError(f"the model gave vectors of shape {vectors.shape} instead of {(len(batch), dim)}")
    for item, vector in zip(batch, vectors, strict=True):
        yield _outcome(item, _checked(vector))


def _checked(vector: NDArray[np.float32]) -> NDArray[np.float32] | ItemError:
    # Of the squares, as pgvector computes norms and cosines in float32 too: what overflows there is of no use.
    with np.errstate(over="ignore"):
        vector = vector.astype(np.float32, copy=False)
        norm = float(np.dot(vector, vector))
    if not np.isfinite(norm):
        return ItemFailed("not_finite", "the model's vector holds NaN, infinity or numbers whose squares overflow")
    if norm == 0:
        return ItemFailed("zero_vector", "the model's vector is all zeros, or numbers whose squares vanish")
    return vector


def _outcome(item: Ready, result: NDArray[np.float32] | ItemError) -> Outcome:
    return Outcome(item.key, item.prepared.seconds, result, item.prepared.face)


class Waiting:
    """Prepared items on their way from the decoding threads to the device, bounded in memory."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._items: list[Ready] = []
        self._expected = 0
        self._changed = threading.Condition()
        self._closed = False

    @property
    def expected(self) -> int:
        """How many items are on their way: announced, and neither put nor missed yet."""
        return self._expected

    def expect(self, count: int) -> None:
        """Announce items that are about to be decoded."""
        with self._changed:
            self._expected += count

    def miss(self) -> None:
        """Take back the announcement of an item that cannot be embedded."""
        with self._changed:
            self._expected -= 1
            self._changed.notify_all()

    def wait_for_room(self) -> bool:
        """Block a decoding thread while too much is waiting; False when there is no use in decoding any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._bytes < self._max_bytes)
            return not self._closed

    def put(self, item: Ready) -> None:
        """Add a prepared item."""
        with self._changed:
            self._items.append(item)
            self._expected -= 1
            self._bytes += item.prepared.array.nbytes
            self._changed.notify_all()

    def take(
        self,
        max_cost: int,
        over: Callable[[], bool],
        patience: float = math.inf,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> list[Ready]:
        """The next batch: what is waiting, up to `max_cost`, at least one item.

        Empty as soon as it is `over`, and when nothing has come for `patience` seconds.
        It does not wait for a batch to fill up: a device that is idle is worse than a batch that is small.
        Every wait, of a twentieth of a second at most, is within a `waiting()`.
        """
        with self._changed:
            until = time.monotonic() + patience
            while not over() and not self._items and time.monotonic() < until:
                with waiting():
                    self._changed.wait(0.05)
            if over():
                return []
            count, cost = 0, 0
            for item in self._items:
                cost += item.prepared.cost
                if count and cost > max_cost:
                    break
                count += 1
            batch, self._items = self._items[:count], self._items[count:]
            self._bytes -= sum(item.prepared.array.nbytes for item in batch)
            self._changed.notify_all()
            return batch

    def close(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
