"""`embstore rm`: datasets, models and items out of the database again."""

from __future__ import annotations

import sys

import click

from embstore import catalog, recipes, removal, sharing
from embstore.db.migrate import require_ready
from embstore.errors import UsageError
from embstore.progress import bar
from embstore.removal import Counts
from embstore.settings import Settings
from embstore.words import plural

from .options import opened, pass_settings, writing

yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def agreed(question: str, yes: bool) -> bool:
    """Whether somebody wants it. Raises UsageError where nobody can be asked."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask at: add --yes to do it without a question")
    if click.confirm(question, default=False):
        return True
    click.echo("nothing was removed")
    return False


@click.group("rm")
def rm() -> None:
    """Remove a dataset, a model or items, with all that was computed from them.

    The files stay where they are. What goes is shown first, and asked about.
    """


@rm.command()
@click.argument("name")
@yes_option
@pass_settings
def dataset(name: str, yes: bool, settings: Settings) -> None:
    """Remove the dataset NAME: its items, their vectors, centroids, boundaries and shares.

    \b
      embstore rm dataset train
      embstore rm dataset asr/train --yes
    """
    with opened(settings) as database:
        require_ready(database)
        with database.reading() as connection:
            found = catalog.get_dataset(connection, name)
            removal.require_removable(connection, found)
            counts = removal.counts(connection, found.dataset_id)
            shared = [one.team for one in sharing.shares(connection, found.dataset_id) if one.access != "owner"]
        click.echo(f"dataset '{found.name}', of the files in {found.root}, which stay there:")
        rest = ((counts.centroids, "centroid"), (counts.runs, "boundary run"))
        for line in _lines(counts) + [plural(number, noun) for number, noun in rest if number]:
            click.echo(f"  {line}")
        if teams := [team for team in shared if team is not None]:
            click.echo(f"  shared with {', '.join(teams)}, who lose it, too")
        if not agreed("Remove it?", yes):
            return
        with bar(counts.items, "removing", sys.stderr) as tick:
            removal.remove_dataset(database, found, tick=tick)
    click.echo(f"dataset '{found.name}' is removed, with {plural(counts.items, 'item')}")


def _lines(counts: Counts) -> list[str]:
    """What there is of items, for people."""
    vectors = [f"{plural(number, 'vector')} by {model}" for model, number in counts.vectors.items()]
    faces = [plural(counts.faces, "face")] if counts.faces else []
    return [f"{plural(counts.items, 'item')} of {plural(counts.speakers, 'speaker')}", *vectors, *faces]


@rm.command()
@click.argument("name")
@yes_option
@pass_settings
def model(name: str, yes: bool, settings: Settings) -> None:
    """Remove the model NAME, its vectors in all datasets, and what was computed from them; its weights stay.

    For the owner of the database.

    \b
      embstore rm model statistical
    """
    with opened(settings) as database:
        require_ready(database)
        with database.reading() as connection:
            shown = recipes.show(connection, name)
            _require_owner(sharing.identify(connection))
            datasets = [d.name for _, of in catalog.embedded(connection, None, name) for d in of]
    click.echo(f"model '{name}', {plural(shown.vectors, 'vector')} of {shown.dim} dimensions, with index and views")
    if datasets:
        click.echo(f"  in {', '.join(datasets)}: with their centroids and boundary runs by this model")
    if not agreed("Remove it?", yes):
        return
    with writing(settings) as connection:
        count = recipes.remove(connection, name, with_vectors=True)
    click.echo(f"model '{name}' is removed, with {plural(count, 'vector')}")


def _require_owner(identity: sharing.Identity) -> None:
    if identity.kind != "owner":
        raise UsageError(
            f"a model is everybody's: only the owner of the database removes one, and '{identity.role}' is a"
            f" {identity.kind}"
        )


@rm.command()
@click.argument("dataset")
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@click.option("--speaker", metavar="NAME", help="Only of this speaker.")
@click.option("--where", metavar="SQL", help='Only those for which this holds, such as "size < 2000".')
@click.option("--vanished", is_flag=True, help="Only those that the last scan no longer found.")
@yes_option
@pass_settings
def items(
    dataset: str,
    paths: tuple[str, ...],
    speaker: str | None,
    where: str | None,
    vanished: bool,
    yes: bool,
    settings: Settings,
) -> None:
    """Remove items of DATASET: those of which all that is given holds. PATH is an item's, or a folder of items.

    The next 'embstore extract' of the same folder finds their files again: move those away first. Centroids of their
    speakers become stale, and boundary runs of the dataset go, as they speak of other positions.

    \b
      embstore rm items train annie/01.mp3 hugo
      embstore rm items train --vanished
      embstore rm items train --where "size < 2000"
    """
    with opened(settings) as database:
        require_ready(database)
        with database.reading() as connection:
            found = catalog.get_dataset(connection, dataset, writing=True)
            removal.require_idle(connection, found)
            ids = removal.choose(connection, found, paths, speaker=speaker, where=where, vanished=vanished)
            counts = removal.counts(connection, found.dataset_id, ids)
        if not ids:
            click.echo(f"there are no such items in dataset '{found.name}'")
            return
        click.echo(f"of dataset '{found.name}':")
        runs = [f"{plural(counts.runs, 'boundary run')}, of the whole dataset"] if counts.runs else []
        stale = [f"and {plural(counts.centroids, 'centroid')} will be stale"] if counts.centroids else []
        for line in [*_lines(counts), *runs, *stale]:
            click.echo(f"  {line}")
        if not agreed("Remove them?", yes):
            return
        with bar(len(ids), "removing", sys.stderr) as tick:
            removal.remove_items(database, found, ids, tick=tick)
    click.echo(f"removed {plural(len(ids), 'item')} of dataset '{found.name}'")
