"""What a worker waits for: every moment is charged once."""

from __future__ import annotations

import threading
from collections import deque

import pytest

from embstore.waits import Cause, Stopwatch, Waits


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("embstore.waits.time.monotonic", clock)
    return clock


def test_a_wait_is_charged_to_what_it_began_for(clock: Clock) -> None:
    causes: deque[Cause] = deque(["database", "decoding", "idle"])
    watch = Stopwatch(lambda: causes[0])
    for seconds in (1.0, 2.0, 4.0):
        with watch.waiting():
            causes.popleft()  # what it waited for has come
            clock.now += seconds
    clock.now += 8
    watch.charge("device")
    assert watch.lap() == Waits(database=1, decoding=2, idle=4, device=8)
    assert watch.lap() == Waits()


def test_no_moment_is_lost_between_laps(clock: Clock) -> None:
    watch = Stopwatch(lambda: "decoding")
    total = Waits()
    for _ in range(10):
        clock.now += 0.75
        watch.charge("device")
        clock.now += 0.25  # spent between two waits: it belongs to the next
        with watch.waiting():
            clock.now += 1
        total.add(watch.lap())
    assert total == Waits(device=7.5, decoding=12.5)


def test_shares_are_of_the_time_in_which_there_was_something_to_do() -> None:
    waits = Waits(decoding=1, device=6, database=3, idle=1000)
    assert waits.seconds == 10
    assert [waits.share(cause) for cause in ("decoding", "device", "database")] == [0.1, 0.6, 0.3]
    assert waits.bottleneck == "device"
    assert Waits(idle=5).share("device") == 0


def test_laps_may_be_taken_from_another_thread() -> None:
    watch = Stopwatch(lambda: "decoding")
    began, done, total = watch._since, threading.Event(), Waits()

    def read() -> None:
        while not done.is_set():
            total.add(watch.lap())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(2000):
        watch.charge("device")
    done.set()
    reader.join()
    total.add(watch.lap())
    assert total.device == pytest.approx(watch._since - began)
