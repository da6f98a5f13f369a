"""What workers count, and how a person watches it: a live display in a terminal, plain lines at intervals elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from embstore.words import many, plural

if TYPE_CHECKING:
    from rich.console import RenderableType

PLAIN_SECONDS = 10.0
"""Between two lines, where the output is no terminal."""


@dataclass
class Tally:
    """What became of items: counts that add up."""

    done: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    audio_seconds: float = 0.0

    @property
    def processed(self) -> int:
        """All items that came to an end."""
        return self.done + self.skipped.total() + self.failed.total()

    def add(self, other: Tally) -> None:
        """Add another tally to this one."""
        self.done += other.done
        self.skipped += other.skipped
        self.failed += other.failed
        self.audio_seconds += other.audio_seconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON and for the table of runs."""
        return {
            "processed": self.processed,
            "embedded": self.done,
            "skipped": dict(self.skipped),
            "failed": dict(self.failed),
            "audio_seconds": round(self.audio_seconds, 3),
        }


class Display(Protocol):
    """Shows a run; every method is cheap and may be called often."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *_: object) -> None: ...

    def say(self, line: str) -> None:
        """Print a line above the moving part."""

    def update(self, remaining: int, tallies: Iterable[Tally]) -> None:
        """Show how many items are left in the database, and what each worker has done."""

    def note(self, event: str, **facts: Any) -> None:
        """Record something that happened, for a machine that reads along; what people see shows it in its own way."""


def display(total: int, stream: TextIO, *, live: bool | None = None, log: bool = False) -> Display:
    """The display that fits the stream, or, with `log`, a log of JSON lines."""
    if log:
        return JsonDisplay(total, stream)
    if _in_notebook():
        return NotebookDisplay(total, stream)
    if stream.isatty() if live is None else live:
        return LiveDisplay(total, stream)
    return PlainDisplay(total, stream)


def _in_notebook() -> bool:
    """Whether what is printed goes into the cell of a notebook; its stream may claim to be a terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


class _Progress:
    """How far a run is, from what its workers report and from what is left in the database."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.completed = 0
        self.tally = Tally()
        self._began = 0.0
        self._before = 0
        """Items that had ended when the first ones were heard of."""

    def update(self, remaining: int, tallies: Iterable[Tally]) -> None:
        self.tally = Tally()
        for tally in tallies:
            self.tally.add(tally)
        # The database is asked now and then, and knows of other runs; the workers are heard at once.
        self.completed = min(max(self.total - remaining, self.tally.processed, self.completed), self.total)
        if not self._began and self.tally.processed:
            self._began = time.monotonic()
            self._before = self.tally.processed

    @property
    def rate(self) -> float:
        """Items a second since the first ones came: loading the model is no part of it."""
        if not self._began:
            return 0.0
        return (self.tally.processed - self._before) / max(time.monotonic() - self._began, 1e-3)

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.completed) / self.rate if self.rate else None


class SilentDisplay:
    """Shows nothing."""

    def __enter__(self) -> SilentDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def say(self, line: str) -> None:
        """Say nothing."""

    def update(self, remaining: int, tallies: Iterable[Tally]) -> None:
        """Show nothing."""

    def note(self, event: str, **facts: Any) -> None:
        """Record nothing."""


class PlainDisplay:
    """A line every few seconds: for logs, pipes and CI."""

    _seconds = PLAIN_SECONDS

    def __init__(self, total: int, stream: TextIO) -> None:
        self._progress = _Progress(total)
        self._stream = stream
        self._last = time.monotonic()

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def say(self, line: str) -> None:
        """Print a line."""
        print(line, file=self._stream, flush=True)

    def update(self, remaining: int, tallies: Iterable[Tally]) -> None:
        """Print a line if the last one is long enough ago."""
        at = self._progress
        at.update(remaining, tallies)
        now = time.monotonic()
        if now - self._last < self._seconds:
            return
        self._last = now
        self._show(at)

    def note(self, event: str, **facts: Any) -> None:
        """Say nothing: the next line shows it."""

    def _show(self, at: _Progress) -> None:
        self.say(self._line(at))

    def _line(self, at: _Progress) -> str:
        left = f", about {duration(at.seconds_left)} left" if at.seconds_left else ""
        return (
            f"{at.completed:,} of {at.total:,} ({100 * at.completed // at.total}%); this run: {at.tally.done:,} done, "
            f"{at.tally.skipped.total():,} skipped, {at.tally.failed.total():,} failed, {at.rate:,.1f}/s{left}"
        )


class NotebookDisplay(PlainDisplay):
    """One line in the cell of a notebook, written over every second: any more would stay there for good."""

    _seconds = 1.0

    def __init__(self, total: int, stream: TextIO) -> None:
        super().__init__(total, stream)
        self._shown = 0
        """Length of the line that is to be written over."""

    def __exit__(self, *_: object) -> None:
        self._show(self._progress)
        print(file=self._stream, flush=True)

    def say(self, line: str) -> None:
        """Print a line, which stays."""
        print("\r" + line.ljust(self._shown), file=self._stream, flush=True)
        self._shown = 0

    def _show(self, at: _Progress) -> None:
        line = self._line(at)
        print("\r" + line.ljust(self._shown), end="", file=self._stream, flush=True)
        self._shown = len(line)


class JsonDisplay(PlainDisplay):
    """A JSON object a line and event, for log collectors: `time` (ISO 8601, UTC), `event`, and its facts."""

    def say(self, line: str) -> None:
        """Log a line that is meant for people."""
        self.note("message", text=line)

    def note(self, event: str, **facts: Any) -> None:
        """Log an event."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        print(json.dumps({"time": now, "event": event, **facts}), file=self._stream, flush=True)

    def _show(self, at: _Progress) -> None:
        facts = {"completed": at.completed, "total": at.total, "rate": round(at.rate, 3)}
        self.note("progress", **facts, **at.tally.as_dict())


class LiveDisplay:
    """A bar with rate and time left, and a row a worker."""

    def __init__(self, total: int, stream: TextIO) -> None:
        # Here and not above: rich takes longer to import than `embstore --help` may take.
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = _Progress(total)
        self._tallies: list[Tally] = []
        self._bar = Progress(
            TextColumn("{task.percentage:>3.0f}%"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            expand=True,
        )
        self._task = self._bar.add_task("", total=total, speed="loading the model")
        self._console = Console(file=stream)
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, markup=False, emoji=False, highlight=False)

    def update(self, remaining: int, tallies: Iterable[Tally]) -> None:
        """Set what the next refresh shows."""
        self._tallies = list(tallies)
        at = self._progress
        at.update(remaining, self._tallies)
        speed = "loading the model"
        if at.tally.processed:
            left = f", {duration(at.seconds_left)} left" if at.seconds_left else ""
            speed = f"{at.rate:,.1f}/s{left}"
        self._bar.update(self._task, completed=at.completed, speed=speed)

    def note(self, event: str, **facts: Any) -> None:
        """Say nothing: the next refresh shows it."""

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.constrain import Constrain
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("worker", "done", "skipped", "failed"):
            table.add_column(name, justify="right")
        for index, tally in enumerate(self._tallies):
            failed = tally.failed.total()
            table.add_row(
                str(index), f"{tally.done:,}", f"{tally.skipped.total():,}", f"[red]{failed:,}[/]" if failed else "0"
            )
        # Room at the right: the terminal's own "^C" must not wrap, which would shift everything by a line.
        return Constrain(Group(table, self._bar), self._console.width - 4)


@contextmanager
def bar(total: int | None, words: str, stream: TextIO) -> Iterator[Callable[[int], None]]:
    """A bar for something that is counted alone, up to `total` if that is known; gives what to call with how many more
    are done.

    Where the output is no terminal there is none: what is counted so is done in minutes.
    """
    if not stream.isatty():
        yield lambda _more: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        task = progress.add_task(words, total=total)
        yield lambda more: progress.advance(task, more)


def summary(tally: Tally, seconds: float, *, unit: str = "utterance", done: str = "embedded") -> str:
    """The lines that end a run: `unit` is the noun of what was counted, `done` what became of those that went well."""
    lines = [
        f"processed {plural(tally.processed, unit)} in {duration(seconds)}",
        f"  {done:8} {tally.done:,}",
        f"  skipped  {_reasons(tally.skipped)}",
        f"  failed   {_reasons(tally.failed)}",
    ]
    if tally.processed and seconds > 0:
        speed = f"  {tally.processed / seconds:,.1f} {many(unit)} a second"
        if tally.audio_seconds:
            speed += f", {tally.audio_seconds / seconds:,.1f} hours of audio an hour"
        if unit == "image":
            speed += f", {seconds / tally.processed:.3g} s an image"
        lines.append(speed)
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0.8 s, 42 s, 3 min 20 s, 5 h 12 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _reasons(counts: Counter[str]) -> str:
    if not counts:
        return "0"
    return f"{counts.total():,} ({', '.join(f'{code} {n:,}' for code, n in counts.most_common())})"
