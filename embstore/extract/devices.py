"""Which devices this machine has, and how workers share them; without loading torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from embstore.errors import UsageError
from embstore.extract.tuning import UNTUNED, Tuning
from embstore.workers import count_cores

MAX_DECODERS = 8
"""Decoding threads a worker: more of them wait for Python's lock, not for files.

On 16 cores two threads read 4,700 wav files of 2 s a second, four 3,600, eight 2,600. What is longer or compressed
spends its time outside of the lock.
"""


@dataclass(frozen=True)
class Plan:
    """Workers and what each of them gets."""

    devices: tuple[str, ...]
    """One a worker: `cuda:0` or `cpu`."""
    decoders: int
    """Decoding threads a worker."""
    threads: int
    """Threads a worker that computes on the CPU."""
    tuning: Tuning = UNTUNED
    """What a person has chosen otherwise."""

    @property
    def environ(self) -> dict[str, str]:
        """What the numeric libraries read when they are loaded."""
        threads = str(self.threads)
        return {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # numpy's work is in the decoding threads, of which there are enough.
            "OPENBLAS_NUM_THREADS": "1",
            # By default a thread that waits for the others spins, and so keeps the very core that one of them, or a
            # decoder, would need: on 2 cores with other programs at work, extraction was 8 times slower.
            "OMP_WAIT_POLICY": "PASSIVE",
        }


def plan(workers: int | None, gpus: str | None, tuning: Tuning = UNTUNED) -> Plan:
    """Share devices and cores out. By default one worker a GPU, or one on the CPU.

    `gpus`: "0,1,3", numbered as CUDA_VISIBLE_DEVICES leaves them; "" or "none": use the CPU. Raises UsageError.
    """
    chosen = _chosen(gpus, count_gpus())
    number = workers if workers is not None else max(len(chosen), 1)
    devices = tuple(f"cuda:{chosen[i % len(chosen)]}" if chosen else "cpu" for i in range(number))
    share = max(1, count_cores() // number)
    decoders, threads = tuning.decoders or min(share, MAX_DECODERS), tuning.threads or share
    return Plan(devices, decoders, threads, tuning)


def count_gpus() -> int:
    """CUDA devices that this process may use, asked of the driver itself; 0 without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _chosen(gpus: str | None, available: int) -> Sequence[int]:
    if gpus is None:
        return range(available)
    if gpus.strip().lower() in ("", "none"):
        return []
    try:
        chosen = [int(part) for part in gpus.split(",")]
    except ValueError:
        raise UsageError(f"--gpus '{gpus}' is not a list of numbers: type --gpus \"0,1\", or --gpus none") from None
    missing = [number for number in chosen if not 0 <= number < available]
    if missing:
        seen = f"0 to {available - 1}" if available else "none"
        raise UsageError(
            f"no GPU {missing[0]} on this machine (visible: {seen}): leave --gpus out to use what there is"
        )
    return chosen
