"""`embstore extract`: the main job."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from embstore import catalog, recipes
from embstore.catalog import Dataset
from embstore.db.engine import Database
from embstore.db.migrate import require_ready
from embstore.errors import UsageError
from embstore.extract import devices, run, tuning
from embstore.extract.devices import Plan
from embstore.extract.speed import speed
from embstore.media.audio import EXTENSIONS
from embstore.models.base import Recipe
from embstore.models.named import Named
from embstore.progress import Display
from embstore.register import Registered
from embstore.settings import Settings, load
from embstore.sources import SPEAKER_FROM_CHOICES, Source, open_source
from embstore.supervise import Outcome, check_connections

from .model_options import model_options
from .options import database_options, opened
from .outcome import exit_code, log_option, tell, watch
from .output import write_json

DEFAULT_MODEL = "resemblyzer"
_PROBLEMS_SHOWN = 10

Work = tuple[Recipe, list[Dataset]]


@click.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--dataset", metavar="NAME", help="Name of the dataset.  [default: the folder's or manifest's name]")
@click.option("--model", metavar="NAME", help=f"Embedding model.  [env: EMBEDDING_MODEL; default: {DEFAULT_MODEL}]")
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
    help=f"Where the speaker's name comes from: {', '.join(SPEAKER_FROM_CHOICES)}.  [default: parent]",
)
@click.option(
    "--root",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Folder that holds the files of a manifest.  [default: the manifest's]",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@log_option
@database_options
@click.pass_context
def extract(
    context: click.Context,
    path: Path | None,
    dataset: str | None,
    model: str | None,
    options: dict[str, str],
    workers: int | None,
    gpus: str | None,
    tune: tuple[str, ...],
    speaker_from: str,
    root: Path | None,
    dry_run: bool,
    as_json: bool,
    database_url: str | None,
    home: Path | None,
) -> None:
    """Register audio and embed it; stop and go on at any time.

    PATH is a folder, a manifest (.csv, .tsv, .jsonl) or a Kaldi data folder. Only what is new or has changed is done.
    Without PATH it goes on with whatever is pending.

    \b
      embstore extract /data/audio --workers 4
      embstore extract train.csv --dataset train --gpus 0,1
      embstore extract /data/audio --model wespeaker --model-dir voxceleb_resnet34
      embstore extract
    """
    settings = load(database_url=database_url, home=home, embedding_workers=workers, embedding_model=model)
    plan = devices.plan(settings.embedding_workers, gpus, tuning.parse(tune))
    check_connections(settings, len(plan.devices))
    source = None
    if path is not None:
        source = open_source(path, extensions=EXTENSIONS, speaker_from=speaker_from, root=root)
    say = _Speaker(as_json)
    with opened(settings) as database:
        require_ready(database)
        recipe = _find(database, settings.embedding_model or DEFAULT_MODEL, options)
        works: list[Work]
        if source is not None:
            _check_model(database, recipe)
            found, registered = run.register_source(
                database, source, name=dataset or source.name, media=recipe.media, dry_run=dry_run
            )
            say.registered(found, registered, source)
            works = [(recipe, [found])]
        else:
            works = _open_works(database, dataset, model, recipe)
        if dry_run:
            say.plan(works, plan, new=source is not None)
            if as_json:
                write_json(
                    [{"model": used.name, "datasets": [d.name for d in them]} for used, them in works], sys.stdout
                )
            return
        parameters = {
            "path": str(path) if path else None,
            "devices": list(plan.devices),
            "options": options,
            "tune": list(tune),
        }
        outcomes = _extract_all(database, settings, works, plan, parameters, say)
    if as_json:
        write_json([_as_json(used, outcome, plan) for (used, _), outcome in outcomes], sys.stdout)
    context.exit(exit_code(outcome for _, outcome in outcomes))


def _as_json(recipe: Recipe, outcome: Outcome, plan: Plan) -> dict[str, Any]:
    found = speed(outcome, plan, recipe)
    return {"model": recipe.name, **outcome.as_dict(), "speed": found and found.as_dict()}


def _find(database: Database, name: str, options: dict[str, str]) -> Named:
    """The model of a name that the database keeps, or of an installed family. Raises ModelError, UsageError."""
    with database.begin() as connection:
        return recipes.find(connection, name, options)


def _check_model(database: Database, recipe: Recipe) -> None:
    """Refuse a model before anything is registered for it. Raises ModelError."""
    with database.begin() as connection:
        catalog.stored_model(connection, recipe.name, recipe.fingerprint())


def _open_works(database: Database, name: str | None, model: str | None, recipe: Recipe) -> list[Work]:
    """What is pending, model by model; a dataset and a model named together are begun if need be."""
    with database.begin() as connection:
        chosen = catalog.get_dataset(connection, name) if name is not None else None
        if chosen is not None and model is not None:
            if chosen.media != recipe.media:
                raise UsageError(f"model '{model}' embeds {recipe.media}, dataset '{name}' holds {chosen.media}")
            return [(recipe, [chosen])]
        work = [
            w
            for w in catalog.open_work(connection)
            if (chosen is None or w.dataset == chosen) and (model is None or w.model == recipe.name)
        ]
    return [
        (recipe if model_name == recipe.name else _find(database, model_name, {}), [w.dataset for w in same])
        for model_name, same in groupby(work, key=lambda w: w.model)
    ]


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
            show=partial(say.start, recipe, plan),
            parameters=parameters,
        )
        say.outcome(recipe, outcome, plan)
        outcomes.append(((recipe, datasets), outcome))
        if outcome.interrupted:
            break
    return outcomes


class _Speaker:
    """Says things to the person: on standard output, or beside it when that is for a program."""

    def __init__(self, as_json: bool) -> None:
        self._out = sys.stderr if as_json else sys.stdout

    def line(self, words: str) -> None:
        print(words, file=self._out, flush=True)

    def registered(self, dataset: Dataset, found: Registered, source: Source) -> None:
        news = [f"{found.new:,} new", f"{found.changed:,} changed"] if found.changed else [f"{found.new:,} new"]
        self.line(f"dataset '{dataset.name}': {found.found:,} items in {dataset.root} ({', '.join(news)})")
        if source.ignored:
            kinds = ", ".join(f"{suffix or 'no extension'} {n:,}" for suffix, n in source.ignored.most_common(5))
            self.line(f"  {source.ignored.total():,} other files are no audio by their names ({kinds})")
        for problem in source.problems[:_PROBLEMS_SHOWN]:
            self.line(f"  not registered: {problem}")
        if len(source.problems) > _PROBLEMS_SHOWN:
            self.line(f"  … and {len(source.problems) - _PROBLEMS_SHOWN:,} more problems")
        if found.back:
            self.line(f"  {found.back:,} items that were not found before are there now")
        if found.vanished:
            self.line(f"  {found.vanished:,} items vanished since the last scan; what is known of them is kept")

    def plan(self, works: Sequence[Work], plan: Plan, *, new: bool) -> None:
        for recipe, datasets in works:
            names = ", ".join(f"'{d.name}'" for d in datasets)
            self.line(f"would embed what is pending of {names} by {recipe.name} on {_devices(plan)}")
        if not works:
            self.line("nothing is pending")
        self.line("dry run: nothing was registered" if new else "dry run: nothing was done")

    def start(self, recipe: Recipe, plan: Plan, pending: int) -> Display:
        self.line(f"embedding {pending:,} items by {recipe.name} on {_devices(plan)}")
        return watch(pending)

    def outcome(self, recipe: Recipe, outcome: Outcome, plan: Plan) -> None:
        tell(self.line, outcome, model=recipe.name, command="extract", unit="utterances", done="embedded")
        if found := speed(outcome, plan, recipe):
            for line in found.lines():
                self.line(line)
        if outcome.failed and not outcome.interrupted:
            self.line("'embstore failures' says what failed and why, 'embstore retry' makes it pending again")


def _devices(plan: Plan) -> str:
    number = len(plan.devices)
    return f"{number} worker{'s' if number > 1 else ''} ({', '.join(dict.fromkeys(plan.devices))})"
