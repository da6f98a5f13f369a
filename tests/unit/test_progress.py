"""Counts that add up, and what a person reads of them: in a log, in a terminal, at the end."""

from __future__ import annotations

import io
import random
import re
import sys
from collections import Counter

import pytest

from embstore import progress
from embstore.progress import LiveDisplay, PlainDisplay, Tally, display, duration, summary


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("embstore.progress.time.monotonic", clock)
    return clock


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def tally(done: int = 0, skipped: int = 0, failed: int = 0) -> Tally:
    return Tally(done, Counter(too_short=skipped), Counter(decode_error=failed), audio_seconds=2.5 * done)


def test_tallies_add_up_in_any_order() -> None:
    dice = random.Random(1)
    codes = ["too_short", "no_speech", "decode_error"]
    parts = [
        Tally(
            dice.randint(0, 9),
            Counter(dice.choices(codes, k=dice.randint(0, 5))),
            Counter(dice.choices(codes, k=dice.randint(0, 5))),
            dice.randint(0, 50) / 4,
        )
        for _ in range(20)
    ]
    total, backwards = Tally(), Tally()
    for part in parts:
        total.add(part)
    for part in reversed(parts):
        backwards.add(part)
    assert total == backwards
    assert total.processed == sum(part.processed for part in parts)
    assert total.processed == total.done + sum(total.skipped.values()) + sum(total.failed.values())
    assert total.as_dict()["processed"] == total.processed
    assert total.audio_seconds == sum(part.audio_seconds for part in parts)


def test_adding_leaves_the_other_tally_alone() -> None:
    total, part = Tally(), tally(1, 2, 3)
    total.add(part)
    total.add(part)
    assert part == tally(1, 2, 3)
    assert total == tally(2, 4, 6)


def test_a_tally_as_json() -> None:
    assert tally(3, 1, 2).as_dict() == {
        "processed": 6,
        "embedded": 3,
        "skipped": {"too_short": 1},
        "failed": {"decode_error": 2},
        "audio_seconds": 7.5,
    }


def test_a_log_gets_a_line_now_and_then(clock: Clock) -> None:
    stream = io.StringIO()
    with PlainDisplay(2000, stream) as shown:
        shown.update(2000, [Tally(), Tally()])
        clock.now += 4  # loading the model
        shown.update(1900, [tally(60, 10, 0), tally(30, 0, 0)])
        clock.now += 5
        shown.update(1500, [tally(290, 10, 0), tally(190, 0, 10)])
        assert stream.getvalue() == ""
        clock.now += 1
        shown.update(1400, [tally(390, 10, 0), tally(190, 0, 10)])
        shown.update(1300, [tally(490, 10, 0), tally(190, 0, 10)])
        clock.now += 10
        shown.update(0, [tally(1790, 10, 0), tally(190, 0, 10)])
        shown.say("done")
    # 600 items, less the 100 that were there when the first were heard of, in 6 s.
    assert stream.getvalue().splitlines() == [
        "600 of 2,000 (30%); this run: 580 done, 10 skipped, 10 failed, 83.3/s, about 17 s left",
        "2,000 of 2,000 (100%); this run: 1,980 done, 10 skipped, 10 failed, 118.8/s",
        "done",
    ]


def test_progress_counts_other_runs_too_and_never_goes_back_or_beyond(clock: Clock) -> None:
    shown = progress._Progress(100)
    seen = []
    for remaining, done in [(100, 0), (100, 5), (60, 6), (80, 7), (80, 50), (0, 120)]:
        clock.now += 1
        shown.update(remaining, [tally(done)])
        seen.append(shown.completed)
    assert seen == [0, 5, 40, 40, 50, 100]


def test_nothing_is_said_of_speed_before_there_is_any(clock: Clock) -> None:
    shown = progress._Progress(10)
    shown.update(10, [])
    clock.now += 60
    assert (shown.rate, shown.seconds_left) == (0.0, None)


def test_the_display_fits_the_stream() -> None:
    assert isinstance(display(1, io.StringIO()), PlainDisplay)
    assert isinstance(display(1, Terminal()), LiveDisplay)
    assert isinstance(display(1, io.StringIO(), live=True), LiveDisplay)
    assert isinstance(display(1, Terminal(), live=False), PlainDisplay)


def test_a_terminal_gets_a_bar_and_a_row_for_each_worker(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    with display(4000, stream) as shown:
        shown.update(4000, [Tally(), Tally()])
        clock.now += 1
        shown.update(4000, [tally(1), Tally()])
        clock.now += 10
        shown.update(2000, [tally(1201, 30, 0), tally(790, 0, 5)])
        shown.say("not [bold]markup[/] but :cat: '/data/[a]/1.wav'")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "not [bold]markup[/] but :cat: '/data/[a]/1.wav'" in plain
    last = plain[plain.rindex("worker") :].splitlines()
    assert last[0].split() == ["worker", "done", "skipped", "failed"]
    assert last[1].split() == ["0", "1,201", "30", "0"]
    assert last[2].split() == ["1", "790", "0", "5"]
    assert re.match(r" *51% .*2026/4000 202\.5/s, 9\.7 s left", last[3])
    assert all(len(line) < 100 for line in last)


def test_before_the_first_result_the_model_is_loading() -> None:
    stream = Terminal()
    with display(4, stream) as shown:
        shown.update(4, [Tally()])
    assert "loading the model" in stream.getvalue()


def test_the_summary_names_every_reason_with_its_number() -> None:
    total = Tally(1200, Counter(no_speech=2, too_short=10), Counter(decode_error=1), audio_seconds=7200)
    assert summary(total, 100).splitlines() == [
        "processed 1,213 utterances in 1 min 40 s",
        "  embedded 1,200",
        "  skipped  12 (too_short 10, no_speech 2)",
        "  failed   1 (decode_error 1)",
        "  12.1 utterances a second, 72.0 hours of audio an hour",
    ]
    assert summary(Tally(), 0.0, unit="speaker", done="averaged").splitlines() == [
        "processed 0 speakers in 0.0 s",
        "  averaged 0",
        "  skipped  0",
        "  failed   0",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (0.84, "0.8 s"),
        (9.94, "9.9 s"),
        (42.4, "42 s"),
        (99.4, "99 s"),
        (100, "1 min 40 s"),
        (119.6, "2 min 0 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (5 * 3600 + 12 * 60 + 59, "5 h 12 min"),
        (400_000, "111 h 6 min"),
    ],
)
def test_a_duration_is_said_as_people_say_it(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_notebook_shows_one_line_that_is_written_over(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shell:
        kernel = object()

    ipython = type(sys)("IPython")
    ipython.get_ipython = Shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    out = Terminal()  # as the streams of a notebook say of themselves
    with display(20, out) as shown:
        shown.update(20, [tally()])
        for done in (5, 6, 12):
            clock.now += 0.7
            shown.update(20 - done, [tally(done)])
        shown.say("finishing what is on the devices")
        shown.update(0, [tally(20)])
    pieces = out.getvalue().split("\r")
    assert [piece.split(" of ")[0].strip() for piece in pieces] == ["", "6", "finishing what is on the devices", "20"]
    assert [piece.count("\n") for piece in pieces] == [0, 0, 1, 1]
    assert len(pieces[2]) > len(pieces[1])  # nothing of the line is left behind
