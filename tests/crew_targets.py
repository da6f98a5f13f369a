"""What the workers of test_workers.py do, and the parents that it kills: importable by the processes it starts."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embstore.errors import LeaseLost, ModelError
from embstore.workers import Channel, Crew


def count(channel: Channel, number: int) -> None:
    """Say so many numbers, and leave."""
    for i in range(number):
        channel.send(i)


def tell_parent(channel: Channel, _: None) -> None:
    channel.send(os.getppid())


def thread_count(channel: Channel, name: str) -> None:
    channel.send(os.environ.get(name))


def die_at_first(channel: Channel, mark: Path) -> None:
    """Be killed, unless somebody was before."""
    channel.send(os.getpid())
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    channel.send("alive")


def die(channel: Channel, how: int | str) -> None:
    """Get something done first, if told to, and end by a signal or with an exit code."""
    channel.send(how)
    if isinstance(how, int) and how < 0:
        os.kill(os.getpid(), -how)
    sys.exit(3)


def raise_error(channel: Channel, error: type[Exception]) -> None:
    channel.send("about to raise")
    raise error("the weights in 'x'\nare not there")


def lose_lease_at_first(channel: Channel, mark: Path) -> None:
    if not mark.exists():
        mark.touch()
        raise LeaseLost("rows belong to another worker by now")
    channel.send("alive")


def drain(channel: Channel, what: str) -> None:
    """Say who this is; when told to stop, say so and leave, or ("stubborn") do not leave."""
    channel.send(os.getpid())
    channel.stopping.wait()
    channel.send("draining")
    while what == "stubborn":
        time.sleep(0.1)


def speak_when_asked(channel: Channel, folder: Path) -> None:
    """Say something as soon as there is a file `ask`, and then leave one `spoken`; drain when told to stop."""
    while not (folder / "ask").exists():
        time.sleep(0.01)
    channel.send("up")
    (folder / "spoken").touch()
    channel.stopping.wait()
    channel.send("draining")


def one_fails(channel: Channel, index: int) -> None:
    """Worker 0 fails when the other has come up; that one drains."""
    if index:
        drain(channel, "willing")
        return
    channel.send("up")
    channel.stopping.wait(1.0)
    raise ModelError("no weights")


def load_for_ever(channel: Channel, _: object) -> None:
    """Never get as far as a first message."""
    while True:
        time.sleep(0.1)


def run_parent(target: Callable[[Channel, Any], None], jobs: list[Any]) -> None:
    """A whole supervising process: prints each message, each death, and how it ended."""

    def say(*words: object) -> None:
        print(*words, flush=True)

    def on_message(index: int, message: object) -> bool:
        say("message", index, message)
        return True

    say("started", os.getpid())
    crew = Crew(
        target,
        jobs,
        on_message=on_message,
        on_death=lambda index: say("death", index),
        on_stop=lambda: say("stopping"),
        on_tick=lambda: None,
    )
    try:
        say("finished" if crew.run() else "interrupted")
    except KeyboardInterrupt:
        say("left at once")
