"""What commands with workers show while they run, what they say when they end, and the exit code that follows."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import click

from embstore.progress import Display, display, summary
from embstore.supervise import Outcome
from embstore.words import many, plural

from .main import INTERRUPTED
from .output import write_json

SOME_FAILED = 1


def _note_log(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    context.find_root().obj.log_json = value


log_option = click.option(
    "--log-json",
    is_flag=True,
    expose_value=False,
    callback=_note_log,
    help="Log events to stderr as JSON lines, with run and worker ids.",
)


def watch(pending: int) -> Display:
    """The display of a run: as `--log-json` says, or as fits where stderr goes."""
    return display(pending, sys.stderr, log=click.get_current_context().find_root().obj.log_json)


class Speaker:
    """Says things to the person: on standard output, or beside it when that is for a program."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json

    def line(self, words: str) -> None:
        """Say something to the person."""
        print(words, file=sys.stderr if self._as_json else sys.stdout, flush=True)

    def json(self, value: Any) -> None:
        """Say it to the program, if there is one."""
        if self._as_json:
            write_json(value, sys.stdout)

    def ended(self, outcome: Outcome, *, model: str, command: str, unit: str, done: str) -> None:
        """Say what a run did, that the counts add up, and what to type next. `unit` and `done` are as in `summary`."""
        if outcome.tally.processed:
            self.line(summary(outcome.tally, outcome.seconds, unit=unit, done=done))
        elif not outcome.interrupted:
            self.line(f"nothing to do: all {many(unit)} are {done}, or have failed or been skipped before")
        for dataset, counts in outcome.statuses.items():
            parts = " + ".join(f"{counts.get(s, 0):,} {s}" for s in ("done", "failed", "skipped", "running", "pending"))
            self.line(f"'{dataset}' by {model}: {parts} = {plural(sum(counts.values()), unit)}")
        if outcome.interrupted:
            self.line(f"interrupted; nothing that was finished is lost: type 'embstore {command}' to go on")


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """130 if any was interrupted, else 1 if anything has failed, else 0."""
    ended = list(outcomes)
    if any(outcome.interrupted for outcome in ended):
        return INTERRUPTED
    return SOME_FAILED if any(outcome.failed for outcome in ended) else 0
