"""`embstore forget`: a person's items, vectors, centroids, labels and name out of the database."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from embstore import forget as forgetting
from embstore import removal
from embstore.db.migrate import require_ready
from embstore.errors import UsageError
from embstore.forget import Proof, Trace, Vacuumed
from embstore.progress import bar
from embstore.settings import Settings
from embstore.words import plural

from .options import opened, pass_settings
from .remove import agreed, yes_option


@click.command()
@click.argument("speaker")
@click.option("--dataset", "names", metavar="NAME", multiple=True, help="Only in this dataset; may be repeated.")
@click.option("--dry-run", is_flag=True, help="Show what there is of them, and do nothing.")
@click.option("--no-vacuum", is_flag=True, help="Leave deleted rows in the server's files until it clears them.")
@yes_option
@pass_settings
def forget(speaker: str, names: tuple[str, ...], dry_run: bool, no_vacuum: bool, yes: bool, settings: Settings) -> None:
    """Remove a person from all datasets: items, vectors, faces, centroids, boundary labels; and prove it.

    SPEAKER is the name in the database. The recordings themselves, backups and the server's write-ahead log are not
    touched, and the next 'embstore extract' of the same folder finds the recordings again: remove them first.

    \b
      embstore forget annie --dry-run
      embstore forget annie
    """
    with opened(settings) as database:
        require_ready(database)
        with database.reading() as connection:
            found = forgetting.find(connection, speaker)
            traces = _chosen(found, names)
            if not dry_run:
                for trace in traces:
                    removal.require_idle(connection, trace.dataset)
        _show(speaker, traces, [trace for trace in found if not trace.dataset.can_write])
        if dry_run:
            click.echo("dry run: nothing was removed")
            return
        if not traces:
            raise UsageError(f"'{speaker}' is in no dataset that you may change: nothing was removed")
        if not agreed(f"Forget '{speaker}'?", yes):
            return
        with bar(sum(trace.counts.items for trace in traces), "removing", sys.stderr) as tick:
            proof = forgetting.forget(database, speaker, traces, tick=tick)
        _say_proof(speaker, proof)
        _say_vacuum(None if no_vacuum else forgetting.vacuum(database, traces))
    _say_what_is_left(traces)


def _chosen(found: Sequence[Trace], names: Sequence[str]) -> list[Trace]:
    """The datasets that may be changed, or those named of them."""
    known = {trace.dataset.name: trace for trace in found}
    for name in names:
        if name not in known:
            raise UsageError(f"they are not in a dataset '{name}', but in {', '.join(map(repr, known))}")
        if not known[name].dataset.can_write:
            raise UsageError(f"dataset '{name}' is shared for reading: its team can forget them there")
    return [trace for trace in found if trace.dataset.can_write and (not names or trace.dataset.name in names)]


def _show(speaker: str, traces: Sequence[Trace], others: Sequence[Trace]) -> None:
    for trace in traces:
        counts = trace.counts
        vectors = [f"{plural(number, 'vector')} by {model}" for model, number in counts.vectors.items()]
        more = [plural(n, noun) for n, noun in ((counts.faces, "face"), (counts.runs, "boundary run")) if n]
        click.echo(f"'{speaker}' in dataset '{trace.dataset.name}':")
        click.echo(f"  {', '.join([plural(counts.items, 'item'), *vectors, *more])}, and the centroids")
        if trace.labels:
            click.echo(f"  some are called {', '.join(trace.labels)} by now")
    for trace in others:
        click.echo(
            f"also in '{trace.dataset.name}' ({plural(trace.counts.items, 'item')}), which you may not change: its team"
            " can type the same command"
        )


def _say_proof(speaker: str, proof: Proof) -> None:
    places = ", ".join(place for place in proof.looked_at if place != "search")
    click.echo(f"'{speaker}' is removed. Counted again: 0 rows in {places}")
    if not proof.nearest:
        click.echo("  searched for: there is no other vector that could be near to theirs")
    for near in proof.nearest:
        who = f"'{near.speaker}'" if near.speaker else "nobody in particular"
        click.echo(
            f"  searched for as {near.model} knew them from '{near.dataset}': nearest is now {near.path} of {who} in"
            f" '{near.of}', {near.similarity:.4f}"
        )
        if near.similarity >= near.own:
            click.echo(
                f"    as near as their own were ({near.own:.4f} on the average):"
                " it may be the same person under another name"
            )


def _say_vacuum(vacuumed: Vacuumed | None) -> None:
    if vacuumed is None:
        click.echo("deleted rows are still in the server's files, until it vacuums")
    elif not vacuumed.done:
        click.echo("deleted rows are still in the server's files; the owner of the database can type in psql:")
        click.echo(f"  {vacuumed.statement}")
    elif vacuumed.held:
        click.echo(
            f"vacuumed, but {plural(vacuumed.held, 'open transaction')} of others may still see the rows and keep them:"
            " when these have ended, type in 'embstore db psql':"
        )
        click.echo(f"  {vacuumed.statement}")
    else:
        click.echo("vacuumed: the rows are out of the server's tables and indexes")


def _say_what_is_left(traces: Sequence[Trace]) -> None:
    click.echo("not touched: backups, the write-ahead log and replicas of the server, exports, and the recordings in")
    for root in sorted({trace.dataset.root for trace in traces}):
        click.echo(f"  {root}")
    click.echo(
        "'embstore extract' of that folder would register them anew: remove them there, or list the others in a"
        " manifest"
    )
