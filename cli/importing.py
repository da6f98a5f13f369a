"""`embstore import`: vectors that were computed elsewhere, into the database."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import click

from embstore import catalog, indexes
from embstore.db.engine import Database
from embstore.db.migrate import require_ready
from embstore.errors import UsageError
from embstore.progress import bar, duration
from embstore.settings import Settings
from embstore.transfer import load
from embstore.transfer.incoming import Counts
from embstore.transfer.load import Options, Outcome
from embstore.transfer.opened import open_table
from embstore.transfer.origin import Origin, Wanted
from embstore.transfer.reading import COMPUTED
from embstore.transfer.table import FORMATS, Format
from embstore.words import plural

from .main import INTERRUPTED
from .options import opened, pass_settings
from .outcome import SOME_FAILED, Speaker


class _Kinds(click.Group):
    """Says why what `export` writes besides embeddings is not imported, and what to type for a bare path."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in ("centroids", "boundaries"):
            raise UsageError(f"there is no import of {args[0]}, {COMPUTED}")
        if os.path.exists(args[0]) and args[0] not in self.commands:  # noqa: PTH110 (as in opened.py)
            raise UsageError(f"say what '{args[0]}' holds: type 'embstore import embeddings {args[0]}'")
        return super().resolve_command(ctx, args)


@click.group("import", cls=_Kinds)
def import_() -> None:
    """Bring vectors that were computed elsewhere into the database."""


@import_.command()
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(FORMATS), help="See below.  [default: as the names of files say]")
@click.option("--dataset", metavar="NAME", help="Into this dataset.  [default: as the file says]")
@click.option(
    "--model", metavar="NAME", help="They were made by this model.  [default: as the file's fingerprint says]"
)
@click.option(
    "--root", metavar="FOLDER", type=click.Path(path_type=Path), help="Folder of the items' files, there or not."
)
@click.option("--media", type=click.Choice(("audio", "image")), help="What was embedded.  [default: as the file says]")
@click.option("--replace", is_flag=True, help="Take the file's vector where the database has another one.")
@click.option("--skip-bad", is_flag=True, help="Leave out rows that cannot come in, instead of importing nothing.")
@click.option("--dry-run", is_flag=True, help="Check all of it, show what would be done, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@pass_settings
@click.pass_context
def embeddings(
    context: click.Context,
    path: Path,
    form: Format | None,
    dataset: str | None,
    model: str | None,
    root: Path | None,
    media: Literal["audio", "image"] | None,
    replace: bool,
    skip_bad: bool,
    dry_run: bool,
    as_json: bool,
    settings: Settings,
) -> None:
    """Bring the vectors that PATH holds into the database; stop and go on at any time.

    PATH is a file, or a folder that 'embstore export' or another program wrote:

    \b
    npz       an array 'embedding' of all vectors, and one of each column: path, speaker, start, duration
    parquet   the same as columns; needs pyarrow
    csv       the same; a vector is written [0.1,0.2,…]
    kaldi     an .ark or .scp; beside it, if you like, utt2spk, wav.scp, segments
    pkl       a tree of pickles, in the folders of the audio; nothing but arrays and built-ins is read from them

    All of it is checked before any of it is imported. What the database has already is left as it is.

    \b
      embstore import embeddings out
      embstore import embeddings xvectors.scp --dataset train --model xvector --root /data/train
    """
    say = _Speaker(as_json)
    reader = open_table(path, form)
    parameters = {"path": str(path.absolute()), "replace": replace, "skip_bad": skip_bad}
    with opened(settings) as database, _sigterm_as_ctrl_c():
        require_ready(database)
        outcome = load.import_embeddings(
            database,
            reader,
            Wanted(dataset, model, root, media),
            Options(replace, skip_bad, dry_run),
            begin=_begin,
            started=partial(say.start, database, dry_run),
            parameters=parameters,
        )
        say.json(_as_json(outcome))
        say.outcome(outcome, dry_run)
    context.exit(INTERRUPTED if outcome.interrupted else SOME_FAILED if outcome.refused else 0)


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "dataset": outcome.dataset,
        "model": outcome.model,
        "interrupted": outcome.interrupted,
        "seconds": round(outcome.seconds, 3),
        **outcome.as_dict(),
    }


def _begin(words: str, rows: int | None) -> AbstractContextManager[Any]:
    return bar(rows, words, sys.stderr)


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Speaker(Speaker):
    def start(self, database: Database, dry_run: bool, origin: Origin, counts: Counts, is_new: bool) -> None:
        new = counts.imported + counts.replaced
        if not new:
            self.line(f"nothing to import: all of them are in dataset '{origin.dataset}' by {origin.model.name}")
            return
        begin = "would import" if dry_run else "importing"
        model = f"{origin.model.name}, a new model," if is_new else origin.model.name
        self.line(f"{begin} {plural(new, 'vector')} by {model} into dataset '{origin.dataset}' ({origin.root})")
        with database.begin() as connection:
            model_id = catalog.stored_model(connection, origin.model.name, origin.model.fingerprint())
            costs = None if model_id is None else indexes.loading(connection, model_id, new)
        if costs is not None:
            self.line(costs.advice(origin.model.name, "import"))

    def outcome(self, outcome: Outcome, dry_run: bool) -> None:
        for spot in outcome.spots:
            click.echo(f"left out: {spot}", err=True)
        if outcome.refused > len(outcome.spots):
            click.echo(f"… and {outcome.refused - len(outcome.spots):,} more", err=True)
        counts = outcome.counts
        if dry_run:
            self.line("dry run: nothing was imported")
            return
        self.line(f"processed {plural(counts.all + outcome.refused, 'vector')} in {duration(outcome.seconds)}")
        for name, number in (
            ("imported", counts.imported),
            ("replaced", counts.replaced),
            ("there before", counts.there),
            ("left out", outcome.refused),
        ):
            self.line(f"  {name:12} {number:,}")
        if outcome.interrupted:
            self.line("interrupted; nothing that was imported is lost: type the same command to go on")
