"""`embstore centroids`: every speaker's average embedding."""

from __future__ import annotations

import shlex
from typing import get_args

import click

from embstore import catalog, centroids
from embstore.averages import Average
from embstore.centroids import Options
from embstore.db.migrate import require_ready
from embstore.progress import Display
from embstore.settings import load
from embstore.supervise import Outcome
from embstore.words import plural

from .options import database_options, opened
from .outcome import Speaker, exit_code, log_option, watch


@click.command("centroids")
@click.option("--dataset", metavar="NAME", help="Only this dataset.")
@click.option("--model", metavar="NAME", help="Only this model's vectors.")
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(min=1),
    help="Worker processes.  [env: EMBEDDING_WORKERS; default: one a core, at most 4]",
)
@click.option(
    "--chunk-size",
    metavar="N",
    type=click.IntRange(min=1),
    help="Speakers a worker takes at a time.  [default: by size]",
)
@click.option(
    "--min-utterances",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    help="Skip speakers with fewer.  [default: 1]",
)
@click.option("--average", type=click.Choice(get_args(Average)), default="mean", help="See below.  [default: mean]")
@click.option(
    "--skip-existing/--recompute", default=True, help="Only what is new or stale, or everything.  [default: skip]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@log_option
@database_options
@click.pass_context
def command(
    context: click.Context,
    dataset: str | None,
    model: str | None,
    workers: int | None,
    chunk_size: int | None,
    min_utterances: int,
    average: Average,
    skip_existing: bool,
    as_json: bool,
    database_url: str | None,
    home: str | None,
) -> None:
    """Average each speaker's vectors into one; stop and go on at any time.

    \b
    mean   the plain average of the vectors as they are stored
    unit   the average of the vectors at unit length, at unit length again: every
           utterance counts the same. Take this one for scoring by cosine.

    Only speakers whose utterances changed since are computed again.

    \b
      embstore centroids
      embstore centroids --dataset train --average unit --min-utterances 3
      embstore sql "select speaker, num_utterances, cohesion from speaker_centroids"
    """
    settings = load(database_url=database_url, home=home, embedding_workers=workers)
    number = centroids.count_workers(settings, asked=workers)
    options = Options(average, min_utterances, chunk_size, recompute=not skip_existing)
    say = Speaker(as_json)
    outcomes: list[tuple[str, Outcome]] = []
    with opened(settings) as database:
        require_ready(database)
        with database.begin() as connection:
            pairs = catalog.embedded(connection, dataset, model, writing=True)
        if not pairs:
            say.line(_nothing(dataset, model))
        for found, datasets in pairs:

            def show(pending: int, workers: int, name: str = found.name) -> Display:
                say.line(f"averaging {plural(pending, 'speaker')} by {name} with {plural(workers, 'worker')}")
                return watch(pending)

            parameters = {"average": average, "min_utterances": min_utterances, "recompute": options.recompute}
            outcome = centroids.compute(
                database, settings, found, datasets, options, number, show=show, parameters=parameters
            )
            say.ended(outcome, model=found.name, command="centroids", unit="speaker", done="averaged")
            _remark(say, outcome)
            outcomes.append((found.name, outcome))
            if outcome.interrupted:
                break
    say.json([{"model": name, **outcome.as_dict()} for name, outcome in outcomes])
    context.exit(exit_code(outcome for _, outcome in outcomes))


def _nothing(dataset: str | None, model: str | None) -> str:
    """Say what has no vectors, and what to type."""
    what = f" of dataset '{dataset}'" if dataset is not None else ""
    by = f" by model '{model}'" if model is not None else ""
    words = ["embstore extract", f"--dataset {shlex.quote(dataset)}" if dataset is not None else "PATH"]
    if model is not None:
        words.append(f"--model {shlex.quote(model)}")
    return f"there are no vectors{what}{by} to average: type '{' '.join(words)}' first"


def _remark(say: Speaker, outcome: Outcome) -> None:
    for name, counts in outcome.statuses.items():
        if not counts:
            say.line(
                f"'{name}' has no vector of a known speaker: register it with --speaker-from, or a manifest's column"
            )
    if outcome.failed:
        say.line("type 'embstore centroids --recompute' to try failed speakers again; why they failed:")
        say.line("  embstore sql \"select speaker, error from speaker_centroids where status = 'failed'\"")
