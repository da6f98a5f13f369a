"""What is said of a run's speed: shares, the bottleneck, and a flag that exists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from helpers import SMALL, Facts

from embstore.cli.extract import extract
from embstore.errors import UsageError
from embstore.extract import speed as speeds
from embstore.extract.devices import Plan
from embstore.extract.speed import speed
from embstore.extract.tuning import NAMES, UNTUNED, Tuning, parse
from embstore.models.named import Named
from embstore.progress import Tally
from embstore.supervise import Outcome
from embstore.waits import Waits


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "count_cores", lambda: 4)


def plan(devices: Sequence[str] = ("cpu",), decoders: int = 2, threads: int = 1) -> Plan:
    return Plan(tuple(devices), decoders, threads)


def outcome(*waits: Waits, busy: float = 0.5, audio: float = 3600.0) -> Outcome:
    tallies = [Tally(done=10, audio_seconds=audio) for _ in waits]
    return Outcome(seconds=10.0, workers=tallies, waits=list(waits), processor_seconds=10 * 4 * busy)


def test_shares_add_up_and_hours_are_by_device() -> None:
    waits = Waits(decoding=1, device=8, database=1), Waits(decoding=0, device=5, database=0, idle=5)
    found = speed(outcome(*waits), plan(["cuda:0", "cuda:0"]), SMALL)
    assert found is not None
    assert found.bottleneck == "device"
    assert [sum(worker.as_dict()["waited"].values()) for worker in found.workers] == [1, 1]
    assert [worker.audio_hours_per_hour for worker in found.workers] == [360, 360]
    assert found.audio_hours_per_device_hour == 720
    apart = speed(outcome(*waits), plan(["cuda:0", "cuda:1"]), SMALL)
    assert apart is not None
    assert apart.audio_hours_per_device_hour == 360
    assert found.lines()[0] == (
        "  worker 0 on cuda:0 waited 10% for decoding, 80% for the device, 10% for the database;"
        " 360.0 hours of audio an hour"
    )


def test_threads_that_wait_for_each_other_want_workers() -> None:
    found = speed(outcome(Waits(decoding=9, device=1)), plan(["cuda:0"], decoders=8), SMALL)
    assert found is not None
    assert found.advice == "more workers, as threads wait for each other (--workers 2)"


def test_a_worker_without_work_waited_for_nothing() -> None:
    both = replace(outcome(Waits(device=9), Waits(database=1)), workers=[Tally(done=1), Tally()])
    found = speed(both, plan(["cpu", "cpu"]), SMALL)
    assert found is not None
    assert found.lines()[1] == "  worker 1 on cpu found nothing to do"


def test_images_have_no_hours() -> None:
    waits = Waits(decoding=8, device=2), Waits(decoding=5, idle=5)
    found = speed(outcome(*waits, audio=0), plan(["cuda:0", "cuda:1"]), Facts(media="image"))
    assert found is not None
    assert found.lines()[0].endswith(" 0% for the database; 1.0 images a second")
    assert found.lines()[-1].startswith("  1.0 images a device-second; the bottleneck is decoding: ")
    assert found.as_dict()["items_per_device_second"] == 1.0


def test_of_a_moment_nothing_can_be_said() -> None:
    assert speed(outcome(Waits(device=0.2, idle=100)), plan(), SMALL) is None
    assert speed(Outcome(), plan(), SMALL) is None


@pytest.mark.parametrize(
    ("waits", "devices", "busy", "words"),
    [
        (Waits(decoding=9, device=1), ["cuda:0"], 0.3, "--tune decoders=4; it was 2"),
        (Waits(decoding=9, device=1), ["cuda:0"], 0.95, "on another machine too"),
        (Waits(database=9, device=1), ["cpu"], 0.3, "--tune ahead=10"),
        (Waits(device=9, database=1), ["cpu"], 0.3, "--workers 4"),
        (Waits(device=9, database=1), ["cpu"], 0.95, "on another machine too"),
        (Waits(device=9, database=1), ["cuda:0", "cuda:1"], 0.1, "--workers 4"),
        (Waits(device=9, database=1), ["cuda:0", "cuda:0"], 0.1, "--workers 4"),
        (Waits(device=9, database=1), ["cuda:0"] * 4, 0.1, "on another machine too"),
    ],
)
def test_the_flag_that_would_help_exists(waits: Waits, devices: list[str], busy: float, words: str) -> None:
    found = speed(outcome(waits, busy=busy), plan(devices), SMALL)
    assert found is not None
    assert words in found.lines()[-1]
    flags = {option for parameter in extract.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", found.advice)) <= flags
    assert set(re.findall(r"--tune ([a-z]+)=", found.advice)) <= set(NAMES)


class Advised:
    """A recipe that knows better."""

    def __getattr__(self, name: str) -> Any:
        return getattr(SMALL, name)

    def faster(self, device: str) -> str | None:
        return "buy a GPU" if device == "cpu" else None


def test_a_model_may_know_what_makes_it_faster() -> None:
    recipe = Named("small", "small", {}, Advised())
    for waits, words in ((Waits(device=9), "buy a GPU"), (Waits(decoding=9), "--tune decoders")):
        found = speed(outcome(waits), plan(), recipe)
        assert found is not None
        assert words in found.advice
    on_gpu = speed(outcome(Waits(device=9)), plan(["cuda:0"]), recipe)
    assert on_gpu is not None
    assert "--gpus" in on_gpu.advice


def test_tuning() -> None:
    assert parse([]) == UNTUNED
    assert parse(["decoders=8", "threads=2", "decoders=9"]) == Tuning(decoders=9, threads=2)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("decoder=8", "did you mean decoders?"),
        ("x=1", "there are: decoders, threads, batch, ahead, commit, buffer"),
        ("decoders", "such as decoders=4"),
        ("decoders=0", "1 or more"),
        ("decoders=1.5", "whole number"),
        ("batch=-3", "whole number"),
        ("batch=³", "whole number"),
    ],
)
def test_tuning_that_is_none(pair: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse([pair])
    assert words in str(caught.value)
