"""`embstore extract`: the main job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from embstore import catalog, indexes
from embstore.catalog import Dataset
from embstore.db.engine import Database
from embstore.db.migrate import require_ready
from embstore.extract import devices, run, tuning
from embstore.extract import works as works_of
from embstore.extract.devices import Plan
from embstore.extract.speed import speed
from embstore.extract.works import DEFAULT_MODELS, UNITS, Wanted, Work
from embstore.media import extensions
from embstore.models.base import Recipe
from embstore.progress import Display
from embstore.register import Registered
from embstore.settings import Settings, load
from embstore.sources import SPEAKER_FROM_CHOICES, Source, open_source
from embstore.supervise import Outcome, check_connections
from embstore.words import plural

from . import ask
from .model_options import model_options
from .options import database_options, opened
from .outcome import Speaker, exit_code, log_option, watch

_PROBLEMS_SHOWN = 10


@click.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--dataset", metavar="NAME", help="Name of the dataset.  [default: the folder's or manifest's name]")
@click.option(
    "--media",
    type=click.Choice(tuple(DEFAULT_MODELS)),
    help="What is embedded.  [default: what the model embeds, or audio]",
)
@click.option(
    "--model",
    metavar="NAME",
    help="Embedding model.  [env: EMBEDDING_MODEL; default: "
    f"{DEFAULT_MODELS['audio']}, for images {DEFAULT_MODELS['image']}]",
)
@model_options
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(min=1),
    help="Worker processes.  [env: EMBEDDING_WORKERS; default: one a GPU, or one]",
)
@click.option("--gpus", metavar="LIST", help='GPUs to use, as "0,1,3", or "none".  [default: all]')
@click.option(
    "--tune",
    metavar="NAME=VALUE",
    multiple=True,
    help=f"Size of a part of the pipeline: {', '.join(tuning.NAMES)}.",
)
@click.option(
    "--speaker-from",
    metavar="RULE",
    default="parent",
    help=f"Where the speaker's name comes from: {SPEAKER_FROM_CHOICES}.  [default: parent]",
)
@click.option(
    "--root",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Folder that holds the files of a manifest.  [default: the manifest's]",
)
@click.option(
    "--auto-embed",
    is_flag=True,
    help="Embed all that is pending: by the model, if one is named or set, in every dataset of its media.",
)
@click.option("--interactive", is_flag=True, help="Ask for the folder, the model and the workers.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@log_option
@database_options
@click.pass_context
def extract(
    context: click.Context,
    path: Path | None,
    dataset: str | None,
    media: str | None,
    model: str | None,
    options: dict[str, str],
    workers: int | None,
    gpus: str | None,
    tune: tuple[str, ...],
    speaker_from: str,
    root: Path | None,
    auto_embed: bool,
    interactive: bool,
    dry_run: bool,
    as_json: bool,
    database_url: str | None,
    home: Path | None,
) -> None:
    """Register audio or images and embed them; stop and go on at any time.

    PATH is a folder, a manifest (.csv, .tsv, .jsonl) or a Kaldi data folder. Only what is new or has changed is done.
    Without PATH it goes on with whatever is pending.

    \b
      embstore extract /data/audio --workers 4
      embstore extract train.csv --dataset train --gpus 0,1
      embstore extract /data/audio --model wespeaker --model-dir voxceleb_resnet34
      embstore extract /data/photos --media image --model statistical
      embstore extract --interactive
      embstore extract
    """
    settings = load(database_url=database_url, home=home, embedding_workers=workers, embedding_model=model)
    wanted = Wanted(settings.embedding_model, media, options)
    if interactive:
        path, wanted, settings = ask.questions(path, wanted, settings, gpus)
    plan = devices.plan(settings.embedding_workers, gpus, tuning.parse(tune))
    check_connections(settings, len(plan.devices))
    say = _Speaker(as_json)
    source_of = None if path is None else _checked_source(path, speaker_from, root)
    with opened(settings) as database:
        require_ready(database)
        if source_of is not None:
            register = partial(_register, database, source_of, dataset, wanted, say)
            works = register(dry_run=dry_run or interactive)
            if interactive and not dry_run:
                _confirm(works, plan, say)
                works = register(dry_run=False, quiet=True)
        elif auto_embed and dataset is None and wanted.name is not None:
            works = works_of.every_dataset(database, wanted)
        else:
            works = works_of.open_works(database, dataset, wanted, named=model is not None)
        if dry_run:
            say.dry_run(works, plan, undone="done" if source_of is None else "registered")
            return
        path_name = None if path is None else str(path)
        parameters = {"path": path_name, "devices": list(plan.devices), "options": options, "tune": list(tune)}
        outcomes = _extract_all(database, settings, works, plan, parameters, say)
    say.json([_as_json(recipe, outcome, plan) for (recipe, _), outcome in outcomes])
    context.exit(exit_code(outcome for _, outcome in outcomes))


def _checked_source(path: Path, speaker_from: str, root: Path | None) -> Callable[..., Source]:
    """What opens the source; what is wrong with it is said now, before the database is asked."""
    source_of = partial(open_source, path, speaker_from=speaker_from, root=root)
    source_of(extensions=extensions.ANY)
    return source_of


def _confirm(works: Sequence[Work], plan: Plan, say: _Speaker) -> None:
    """Ask whether to start; a no ends the command."""
    say.plan(works, plan)
    if not click.confirm("Start?", default=True):
        say.line("nothing was done")
        click.get_current_context().exit()


def _as_json(recipe: Recipe, outcome: Outcome, plan: Plan) -> dict[str, Any]:
    found = speed(outcome, plan, recipe)
    return {"model": recipe.name, **outcome.as_dict(), "speed": found and found.as_dict()}


def _register(
    database: Database,
    source_of: Callable[..., Source],
    name: str | None,
    wanted: Wanted,
    say: _Speaker,
    *,
    dry_run: bool,
    quiet: bool = False,
) -> list[Work]:
    """Register what PATH holds for a model, and say what that was."""
    work, found, source = works_of.register(database, source_of, name, wanted, dry_run=dry_run)
    if not quiet:
        say.registered(work[1][0], found, source)
    return [work]


def _extract_all(
    database: Database, settings: Settings, works: Sequence[Work], plan: Plan, parameters: dict[str, Any], say: _Speaker
) -> list[tuple[Work, Outcome]]:
    if not works:
        say.line("nothing is pending: give a PATH to register more, or 'embstore retry' to try failed items again")
    outcomes: list[tuple[Work, Outcome]] = []
    for recipe, datasets in works:
        outcome = run.extract(
            database,
            settings,
            recipe,
            datasets,
            plan,
            show=partial(_start, database, recipe, plan, say),
            parameters=parameters,
        )
        say.outcome(recipe, outcome, plan)
        outcomes.append(((recipe, datasets), outcome))
        if outcome.interrupted:
            break
    return outcomes


def _start(database: Database, recipe: Recipe, plan: Plan, say: _Speaker, pending: int) -> Display:
    with database.begin() as connection:
        costs = indexes.loading(connection, catalog.get_model(connection, recipe.name).model_id, pending)
    if costs is not None:
        say.line(costs.advice(recipe.name, "extract"))
    return say.start(recipe, plan, pending)


class _Speaker(Speaker):
    def registered(self, dataset: Dataset, found: Registered, source: Source) -> None:
        news = [f"{found.new:,} new", f"{found.changed:,} changed"] if found.changed else [f"{found.new:,} new"]
        self.line(f"dataset '{dataset.name}': {plural(found.found, 'item')} in {dataset.root} ({', '.join(news)})")
        if source.ignored:
            kinds = ", ".join(f"{suffix or 'no extension'} {n:,}" for suffix, n in source.ignored.most_common(5))
            what = {"audio": "no audio", "image": "no images"}[dataset.media]
            self.line(f"  {plural(source.ignored.total(), 'other file')}: {what} by the name ({kinds})")
        for problem in source.problems[:_PROBLEMS_SHOWN]:
            self.line(f"  not registered: {problem}")
        if len(source.problems) > _PROBLEMS_SHOWN:
            self.line(f"  … and {plural(len(source.problems) - _PROBLEMS_SHOWN, 'more problem')}")
        if found.back:
            self.line(f"  {plural(found.back, 'item')} not found before: there now")
        if found.vanished:
            self.line(f"  {plural(found.vanished, 'item')} vanished since the last scan; what is known of them is kept")

    def plan(self, works: Sequence[Work], plan: Plan) -> None:
        for recipe, datasets in works:
            names = ", ".join(f"'{d.name}'" for d in datasets)
            self.line(f"would embed what is pending of {names} by {recipe.name} on {_devices(plan)}")
        if not works:
            self.line("nothing is pending")

    def dry_run(self, works: Sequence[Work], plan: Plan, *, undone: str) -> None:
        self.plan(works, plan)
        self.line(f"dry run: nothing was {undone}")
        self.json([{"model": recipe.name, "datasets": [d.name for d in datasets]} for recipe, datasets in works])

    def start(self, recipe: Recipe, plan: Plan, pending: int) -> Display:
        self.line(f"embedding {plural(pending, 'item')} by {recipe.name} on {_devices(plan)}")
        return watch(pending)

    def outcome(self, recipe: Recipe, outcome: Outcome, plan: Plan) -> None:
        self.ended(outcome, model=recipe.name, command="extract", unit=UNITS[recipe.media], done="embedded")
        if found := speed(outcome, plan, recipe):
            for line in found.lines():
                self.line(line)
        if outcome.failed and not outcome.interrupted:
            self.line("'embstore failures' says what failed and why, 'embstore retry' makes it pending again")


def _devices(plan: Plan) -> str:
    number = len(plan.devices)
    return f"{plural(number, 'worker')} ({', '.join(dict.fromkeys(plan.devices))})"
