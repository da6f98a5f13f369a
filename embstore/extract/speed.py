"""What a run's workers waited for, which of it held them up most, and which flag would help."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from embstore.extract.devices import Plan
from embstore.models.base import Media, Recipe
from embstore.models.named import Named
from embstore.supervise import Outcome
from embstore.waits import CAUSES, Cause, Waits
from embstore.workers import count_cores

_SHORTEST = 1.0
"""Seconds of work, all workers together, of which something can be said."""
_BUSY = 0.8
"""Share of the cores' time from which on another thread would get none."""
_MOST_DECODERS = 64
_ENOUGH_DECODERS = 4
"""Decoding threads of a worker from which on another worker brings more than another thread."""
_MOST_A_GPU = 4
"""Workers on one GPU that were seen to pay: 2.3 to 2.8 times as fast as one, on 16 cores."""


@runtime_checkable
class Adviser(Protocol):
    """A recipe that knows what would make it faster."""

    def faster(self, device: str) -> str | None:
        """What to type for more speed on `cpu` or `cuda:N`, None if nothing is known."""


@dataclass(frozen=True)
class WorkerSpeed:
    """One worker."""

    device: str
    waits: Waits
    audio_hours_per_hour: float
    items_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON: shares from 0 to 1."""
        return {
            "device": self.device,
            "waited": {cause: round(self.waits.share(cause), 4) for cause in CAUSES},
            "audio_hours_per_hour": round(self.audio_hours_per_hour, 2),
            "items_per_second": round(self.items_per_second, 3),
        }


@dataclass(frozen=True)
class Speed:
    """A run's workers, and what to do for more speed."""

    workers: tuple[WorkerSpeed, ...]
    audio_hours_per_device_hour: float
    items_per_device_second: float
    bottleneck: Cause
    advice: str
    media: Media = "audio"

    def lines(self) -> list[str]:
        """For a person."""
        lines = [f"  worker {number} {self._worker(worker)}" for number, worker in enumerate(self.workers)]
        what = "decoding" if self.bottleneck == "decoding" else f"the {self.bottleneck}"
        return [
            *lines,
            f"  {self._rate(self.audio_hours_per_device_hour, self.items_per_device_second, 'device-')}; the bottleneck"
            f" is {what}: {self.advice}",
        ]

    def _worker(self, worker: WorkerSpeed) -> str:
        if not worker.items_per_second:
            return f"on {worker.device} found nothing to do"
        return (
            f"on {worker.device} waited {_percent(worker.waits, 'decoding')} for decoding,"
            f" {_percent(worker.waits, 'device')} for the device, {_percent(worker.waits, 'database')} for the"
            f" database; {self._rate(worker.audio_hours_per_hour, worker.items_per_second, '')}"
        )

    def _rate(self, audio_hours: float, items: float, each: str) -> str:
        if self.media == "image":
            return f"{items:,.1f} images a {each}second"
        return f"{audio_hours:,.1f} hours of audio {f'a {each}' if each else 'an '}hour"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "workers": [worker.as_dict() for worker in self.workers],
            "audio_hours_per_device_hour": round(self.audio_hours_per_device_hour, 2),
            "items_per_device_second": round(self.items_per_device_second, 3),
            "bottleneck": self.bottleneck,
            "advice": self.advice,
        }


def speed(outcome: Outcome, plan: Plan, recipe: Recipe) -> Speed | None:
    """What to say of a run; None if it was too short."""
    total = Waits()
    for waits in outcome.waits:
        total.add(waits)
    if total.seconds < _SHORTEST:
        return None
    workers, hours, items = [], defaultdict[str, float](float), defaultdict[str, float](float)
    for device, waits, tally in zip(plan.devices, outcome.waits, outcome.workers, strict=False):
        alive = waits.seconds + waits.idle
        found = WorkerSpeed(
            device,
            waits,
            tally.audio_seconds / alive if alive else 0.0,
            tally.processed / alive if alive else 0.0,
        )
        workers.append(found)
        hours[device] += found.audio_hours_per_hour
        items[device] += found.items_per_second
    cores_busy = outcome.processor_seconds / (outcome.seconds * count_cores()) if outcome.seconds else 0.0
    return Speed(
        tuple(workers),
        sum(hours.values()) / len(hours),
        sum(items.values()) / len(items),
        total.bottleneck,
        advice(total.bottleneck, plan, recipe, cores_busy),
        recipe.media,
    )


def advice(bottleneck: Cause, plan: Plan, recipe: Recipe, cores_busy: float) -> str:
    """What to type next. `cores_busy` is the share of this machine's cores that the workers kept busy, 0 to 1."""
    if bottleneck == "decoding":
        return _decode_faster(plan, cores_busy)
    if bottleneck == "database":
        return (
            f"claim more at a time (--tune ahead={5 * plan.tuning.ahead}), write more at a time (--tune"
            f" commit={4 * plan.tuning.commit}), and make vector indexes after the run"
        )
    return _compute_faster(plan, recipe, plan.devices, cores_busy)


def _decode_faster(plan: Plan, cores_busy: float) -> str:
    if cores_busy < _BUSY and plan.decoders >= _ENOUGH_DECODERS and _has_room(plan.devices):
        return f"more workers, as threads wait for each other (--workers {2 * len(plan.devices)})"
    if cores_busy < _BUSY and plan.decoders < _MOST_DECODERS:
        return f"read more files at a time (--tune decoders={2 * plan.decoders}; it was {plan.decoders})"
    return "the cores are busy: run the same command on another machine too; both share the work"


def _compute_faster(plan: Plan, recipe: Recipe, devices: Sequence[str], cores_busy: float) -> str:
    inner = recipe.recipe if isinstance(recipe, Named) else recipe
    if isinstance(inner, Adviser) and (hint := inner.faster(devices[0])):
        return hint
    if devices[0] == "cpu" and cores_busy < _BUSY and len(devices) * plan.threads < count_cores():
        return f"use the other cores (--workers {count_cores() // plan.threads})"
    if cores_busy < _BUSY and _has_room(devices):
        return f"more workers on each GPU (--workers {2 * len(devices)}), more GPUs (--gpus), or another machine too"
    return "run the same command on another machine too; both share the work"


def _has_room(devices: Sequence[str]) -> bool:
    """Whether there are GPUs, with few workers on each."""
    return devices[0] != "cpu" and len(devices) < _MOST_A_GPU * len(set(devices))


def _percent(waits: Waits, cause: Cause) -> str:
    return f"{100 * waits.share(cause):.0f}%"
