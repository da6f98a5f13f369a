"""Commands that look at the store, and `retry`, which puts items back into the queue."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from io import StringIO
from typing import Any, TextIO

import click
from sqlalchemy import Connection

from embstore import catalog, reports
from embstore.db.migrate import require_ready
from embstore.queue import Queue
from embstore.reports import Progress, Refused
from embstore.settings import Settings
from embstore.words import plural

from .options import opened, pass_settings, reading, writing
from .output import FORMATS, write_json, write_rows

WATCH_SECONDS = 2.0

_dataset_option = click.option("--dataset", metavar="NAME", help="Only this dataset.")
_model_option = click.option("--model", metavar="NAME", help="Only this model.")
_code_option = click.option("--code", metavar="CODE", help="Only this reason, such as decode_error.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@_dataset_option
@_model_option
@click.option("--watch", is_flag=True, help="Show it again every two seconds, until Ctrl+C.")
@_json_option
@pass_settings
def status(dataset: str | None, model: str | None, watch: bool, as_json: bool, settings: Settings) -> None:
    """Show how far each dataset is, by model."""
    if watch:
        _watch(settings, dataset, model, as_json)
        return
    with reading(settings) as connection:
        progress = _progress(connection, dataset, model)
    _print_progress(progress, as_json, model, sys.stdout)


def _progress(connection: Connection, dataset: str | None, model: str | None) -> list[Progress]:
    return reports.progress(connection, *_scope(connection, dataset, model))


def _watch(settings: Settings, dataset: str | None, model: str | None, as_json: bool) -> None:
    shown = 0
    with opened(settings) as database:
        require_ready(database)
        try:
            while True:
                # Patiently: a database that is restarted must not end the watching.
                progress = database.patiently(lambda connection: _progress(connection, dataset, model))
                frame = StringIO()
                _print_progress(progress, as_json, model, frame)
                shown = _show(frame.getvalue(), shown)
                time.sleep(WATCH_SECONDS)
        except KeyboardInterrupt:
            click.echo(err=True)  # to end the watching is what Ctrl+C is for here: no error


def _show(frame: str, before: int) -> int:
    """Print in the place of the frame before, which had so many lines; returns the lines of this one."""
    over = f"\x1b[{before}F\x1b[J" if before and sys.stdout.isatty() else ""
    sys.stdout.write(over + frame)
    sys.stdout.flush()
    return frame.count("\n")


def _print_progress(progress: Sequence[Progress], as_json: bool, model: str | None, out: TextIO) -> None:
    if as_json:
        write_json([_as_json(one) for one in progress], out)
    elif not progress and model is not None:
        out.write(f"nothing was asked of '{model}' yet: type 'embstore extract PATH --model {shlex.quote(model)}'\n")
    elif not progress:
        out.write("nothing is registered yet: type 'embstore extract PATH'\n")
    else:
        _write_progress(progress, out)


def _write_progress(progress: Sequence[Progress], out: TextIO) -> None:
    columns = ("dataset", "model", "registered", "done", "failed", "skipped", "pending", "running", "finished")
    rows = [
        (p.dataset, p.model, p.registered, p.done, p.failed, p.skipped, p.pending, p.running, f"{p.percent:.1f} %")
        for p in progress
    ]
    write_rows(columns, rows, "table", out)
    out.write("\n" + _sum(progress) + "\n")
    for line in _remarks(progress):
        out.write(line + "\n")


def _sum(progress: Sequence[Progress]) -> str:
    parts = ("done", "failed", "skipped", "pending", "running")
    counts = {name: sum(getattr(one, name) for one in progress) for name in parts}
    equation = " + ".join(f"{count:,} {name}" for name, count in counts.items())
    return f"{equation} = {sum(one.registered for one in progress):,} registered"


def _remarks(progress: Sequence[Progress]) -> Iterable[str]:
    """Reasons, and what to type next."""
    for one in progress:
        if one.reasons:
            reasons = ", ".join(f"{reason.code} {reason.items:,} {reason.status}" for reason in one.reasons)
            yield f"{one.dataset}, {one.model}: {reasons}"
    for one in progress:
        if one.unqueued:
            model = f" --model {shlex.quote(one.model)}" if one.model else ""
            command = f"embstore extract --dataset {shlex.quote(one.dataset)}{model}"
            yield f"{one.dataset}: {plural(one.unqueued, 'pending item')} not queued yet: type '{command}'"
    for one in progress:
        if one.centroids and one.centroids.stale:
            number = plural(one.centroids.stale, "centroid")
            yield f"{one.dataset}, {one.model}: {number} stale: type 'embstore centroids'"
    if abandoned := sum(one.abandoned for one in progress):
        yield f"{plural(abandoned, 'running item')} left by workers that are gone: the next run takes over"
    if any(one.failed for one in progress):
        yield "type 'embstore failures' to see which items failed, and why"
    if any(one.pending > one.unqueued or one.abandoned for one in progress):
        yield "type 'embstore extract' to go on"


def _as_json(one: Progress) -> dict[str, Any]:
    names = ("dataset", "model", "registered", "done", "failed", "skipped", "pending", "running", "percent")
    return {name: getattr(one, name) for name in names} | {
        "unqueued": one.unqueued,
        "abandoned": one.abandoned,
        "reasons": [reason._asdict() for reason in one.reasons],
        "centroids": one.centroids and one.centroids._asdict(),
    }


@click.command()
@_dataset_option
@_model_option
@click.option("--status", "kind", type=click.Choice(["failed", "skipped"]), help="Only these.")
@_code_option
@click.option("--limit", type=click.IntRange(min=0), default=50, show_default=True, help="At most so many; 0: all.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="table", show_default=True, help="How to print.")
@pass_settings
def failures(
    dataset: str | None,
    model: str | None,
    kind: str | None,
    code: str | None,
    limit: int,
    form: str,
    settings: Settings,
) -> None:
    """List the items without an embedding, and why.

    Failed items are broken or could not be read; skipped ones hold nothing to embed.
    """
    with reading(settings) as connection:
        refused = _refused(connection, dataset, model, [kind] if kind else ["failed", "skipped"], code)
        rows = reports.failures(connection, refused, limit or None)
        total = sum(reason.items for reason in reports.reasons(connection, refused))
        if not total:
            click.echo(_none(connection, refused), err=True)
    if rows or form != "table":
        write_rows(reports.Failure._fields, rows, form, sys.stdout)
    if total > len(rows):
        click.echo(f"({len(rows):,} of {total:,}; --limit 0 shows all)", err=True)
    elif form == "table" and total:
        click.echo(f"({plural(total, 'item')})", err=True)


@click.command()
@_dataset_option
@_model_option
@click.option(
    "--status",
    "kind",
    type=click.Choice(["failed", "skipped", "all"]),
    default="failed",
    show_default=True,
    help="Which items.",
)
@_code_option
@pass_settings
def retry(dataset: str | None, model: str | None, kind: str, code: str | None, settings: Settings) -> None:
    """Make failed items pending again.

    Do this after the cause is gone; 'embstore extract' then embeds them.
    """
    with writing(settings) as connection:
        statuses = ["failed", "skipped"] if kind == "all" else [kind]
        refused = _refused(connection, dataset, model, statuses, code)
        count = 0
        for scope in reports.scopes(connection, refused):
            queue = Queue("embstore.extraction", "item_id", scope)
            if again := queue.retry(connection, statuses, None if code is None else [code]):
                catalog.record(connection, "retry", scope["dataset_id"], {"status": kind, "code": code, "items": again})
                count += again
        words = _none(connection, refused) if not count else None
    click.echo(words or f"{plural(count, 'item')} became pending: type 'embstore extract' to go on")


def _none(connection: Connection, refused: Refused) -> str:
    """Say that no item is meant, and of which other reasons there are some."""
    others = reports.reasons(connection, refused._replace(statuses=("failed", "skipped"), code=None))
    what = f"no item is {' or '.join(refused.statuses)}" + (f" with code '{refused.code}'" if refused.code else "")
    if not others:
        return what
    return f"{what}; there are: " + ", ".join(f"{one.items:,} {one.status} with {one.code}" for one in others)


@click.command()
@_json_option
@pass_settings
def datasets(as_json: bool, settings: Settings) -> None:
    """List the datasets."""
    with reading(settings) as connection:
        known = reports.datasets(connection)
        progress = reports.progress(connection)
    if as_json:
        of_dataset = {one.name: [_as_json(p) for p in progress if p.dataset == one.name and p.model] for one in known}
        write_json([one._asdict() | {"models": of_dataset[one.name]} for one in known], sys.stdout)
    elif not known:
        click.echo("nothing is registered yet: type 'embstore extract PATH'")
    else:
        columns = ("name", "media", "items", "speakers", "vanished", "embedded", "root")
        rows = [
            (one.name, one.media, one.items, one.speakers, one.vanished, _embedded(progress, one.name), one.root)
            for one in known
        ]
        write_rows(columns, rows, "table", sys.stdout)


def _embedded(progress: Iterable[Progress], dataset: str) -> str:
    counts = [f"{one.model} {one.done:,}" for one in progress if one.dataset == dataset and one.model]
    return ", ".join(counts) or "nothing"


def _scope(connection: Connection, dataset: str | None, model: str | None) -> tuple[int | None, int | None]:
    """The keys of a dataset and a model by name. Raises UsageError and ModelError with the nearest name, or all."""
    dataset_id = None if dataset is None else catalog.get_dataset(connection, dataset).dataset_id
    model_id = None if model is None else catalog.get_model(connection, model).model_id
    return dataset_id, model_id


def _refused(
    connection: Connection, dataset: str | None, model: str | None, statuses: Sequence[str], code: str | None
) -> Refused:
    dataset_id, model_id = _scope(connection, dataset, model)
    return Refused(dataset_id, model_id, tuple(statuses), code)
