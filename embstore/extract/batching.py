"""From prepared items to batches and from batches to outcomes; knows nothing of the database."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embstore.errors import ItemError, ItemFailed, WorkerError
from embstore.models.base import Model, Prepared

_SYSTEMATIC = 4
"""When a batch of at least this many items fails and so does each of them alone, no item is to blame."""


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


def embed_each(model: Model, batch: Sequence[Ready], dim: int) -> Iterator[Outcome]:
    """Embed a batch; one that fails is halved until the item that makes it fail is alone.

    Raises WorkerError when every single item fails: then it is the model, the device or the memory.
    """
    outcomes = list(_halving(model, batch, dim))
    errors = [o.result for o in outcomes if isinstance(o.result, ItemFailed) and o.result.code == "model_error"]
    if len(errors) == len(batch) >= _SYSTEMATIC:
        raise WorkerError(f"the model failed on each of {len(batch)} items, so no item is to blame: {errors[0].detail}")
    yield from outcomes


def _halving(model: Model, batch: Sequence[Ready], dim: int) -> Iterator[Outcome]:
    try:
        vectors = model.embed([item.prepared for item in batch])
    except Exception as error:  # noqa: BLE001 - whatever a model raises is about these items, and is recorded with them
        if len(batch) == 1:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            yield _outcome(batch[0], ItemFailed("model_error", reason))
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
    norm = float(np.dot(vector, vector))
    if not np.isfinite(norm):
        return ItemFailed("not_finite", "the model's vector holds NaN or infinity")
    if norm == 0:
        return ItemFailed("zero_vector", "the model's vector is all zeros")
    return vector


def _outcome(item: Ready, result: NDArray[np.float32] | ItemError) -> Outcome:
    return Outcome(item.key, item.prepared.seconds, result)


class Waiting:
    """Prepared items on their way from the decoding threads to the device, bounded in memory."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._items: list[Ready] = []
        self._changed = threading.Condition()
        self._closed = False

    def wait_for_room(self) -> bool:
        """Block a decoding thread while too much is waiting; False when there is no use in decoding any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._bytes < self._max_bytes)
            return not self._closed

    def put(self, item: Ready) -> None:
        """Add a prepared item."""
        with self._changed:
            self._items.append(item)
            self._bytes += item.prepared.array.nbytes
            self._changed.notify_all()

    def take(self, max_cost: int, over: Callable[[], bool]) -> list[Ready]:
        """The next batch: what is waiting, up to `max_cost`, at least one item. Empty as soon as it is `over`.

        It does not wait for a batch to fill up: a device that is idle is worse than a batch that is small.
        """
        with self._changed:
            while not over() and not self._items:
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
