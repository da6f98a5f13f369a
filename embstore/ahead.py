"""Make the next thing while the one before is still worked on."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from queue import Full, Queue
from typing import TypeVar

T = TypeVar("T")

_TICK = 0.05


class _End:
    """Nothing follows; if an error was the reason, it is here."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


@contextmanager
def ahead(items: Generator[T], depth: int = 1) -> Iterator[Iterator[T]]:
    """The same items, made in a thread of their own, up to `depth` and one more in advance.

    However the block is left, the thread has ended then, so that what the items are read from may be closed.
    """
    made: Queue[T | _End] = Queue(depth)
    leaving = threading.Event()

    def put(item: T | _End) -> bool:
        while not leaving.is_set():
            try:
                made.put(item, timeout=_TICK)
            except Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(item):
                    break
        except BaseException as error:  # noqa: BLE001 - raised again where the items are waited for
            put(_End(error))
        else:
            put(_End())
        finally:
            items.close()

    def take() -> Iterator[T]:
        while not isinstance(item := made.get(), _End):
            yield item
        if item.error is not None:
            raise item.error

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        leaving.set()
        thread.join()
