"""`embstore export`: what is in the database, as files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from embstore import catalog
from embstore.boundaries import labels
from embstore.progress import bar
from embstore.settings import Settings
from embstore.transfer import export as transfer
from embstore.transfer.table import FORMATS, Format
from embstore.words import plural

from .options import Command, pass_settings, snapshot

_begin = partial(bar, words="writing", stream=sys.stderr)


@click.group()
def export() -> None:
    """Write what is in the database to files."""


def _options(form: Format) -> Callable[[Command], Command]:
    """The flags of every export, and the database's."""

    def add(command: Command) -> Command:
        for option in (
            click.option("--force", is_flag=True, help="Write into a folder that holds other files."),
            click.option("--model", metavar="NAME", help="By this model; may be left out if there is but one."),
            click.option("--dataset", metavar="NAME", help="Of this dataset."),
            click.option(
                "--format", "form", type=click.Choice(FORMATS), default=form, show_default=True, help="See below."
            ),
            click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path)),
        ):
            command = option(command)
        return pass_settings(command)

    return add


@export.command()
@_options("npz")
def embeddings(
    folder: Path, form: Format, dataset: str | None, model: str | None, force: bool, settings: Settings
) -> None:
    """Write all vectors of a dataset to DIR, in the dataset's order.

    \b
    npz       DIR/embeddings.npz, one array of all vectors and one of each column
    parquet   DIR/embeddings.parquet, one row an item; needs pyarrow
    csv       DIR/embeddings.csv, and DIR/embeddings.json, which says what it is
    kaldi     DIR/embeddings.ark and .scp, utt2spk, wav.scp
    pkl       DIR/DATASET/…, one file an item in the folders of the audio

    A folder that this has written before is written over. 'embstore import' reads all of them.

    \b
      embstore export embeddings out --dataset train --format parquet
    """
    with snapshot(settings) as connection:
        chosen, of = catalog.one_pair(connection, dataset, model)
        done = transfer.export_embeddings(connection, folder, form, chosen, of, force=force, begin=_begin)
    click.echo(f"wrote {plural(done.rows, 'vector')} of '{of.name}' by {chosen.name} to {done.place}")


@export.command()
@_options("pkl")
def centroids(
    folder: Path, form: Format, dataset: str | None, model: str | None, force: bool, settings: Settings
) -> None:
    """Write each speaker's centroid to DIR.

    \b
    pkl       DIR/DATASET/SPEAKER.pkl, one file a speaker
    npz       DIR/centroids.npz, one array of all vectors and one of each column
    parquet   DIR/centroids.parquet, one row a speaker; needs pyarrow
    csv       DIR/centroids.csv, and DIR/centroids.json, which says what it is
    kaldi     DIR/centroids.ark and .scp, num_utts

    A folder that this has written before is written over.

    \b
      embstore export centroids --format npz out
    """
    with snapshot(settings) as connection:
        of = None if dataset is None else catalog.get_dataset(connection, dataset)
        chosen = catalog.one_model(
            connection, dataset, model, first="'embstore extract PATH', then 'embstore centroids'"
        )
        done = transfer.export_centroids(connection, folder, form, chosen, of, force=force, begin=_begin)
    click.echo(f"wrote {plural(done.rows, 'centroid')} by {chosen.name} to {done.place}")
    if done.stale:
        click.echo(f"{done.stale:,} of them are stale: type 'embstore centroids' and export again", err=True)


@export.command()
@_options("csv")
@click.option("--run", metavar="RUN", type=int, help="Of this run.  [default: the newest]")
def boundaries(
    folder: Path,
    form: Format,
    dataset: str | None,
    model: str | None,
    force: bool,
    run: int | None,
    settings: Settings,
) -> None:
    """Write what a boundary run found to DIR: each item's score, its segment, and where a boundary is.

    \b
    csv       DIR/boundaries.csv, and DIR/boundaries.json, which says what it is
    npz       DIR/boundaries.npz, one array of each column
    parquet   DIR/boundaries.parquet, one row an item; needs pyarrow
    pkl       DIR/DATASET/boundaries.pkl, one dict of columns
    kaldi     DIR/boundaries.ark and .scp, boundaries.utt2spk

    \b
      embstore export boundaries out --dataset train --format csv
    """
    with snapshot(settings) as connection:
        of = None if dataset is None else catalog.get_dataset(connection, dataset).dataset_id
        by = None if model is None else catalog.get_model(connection, model).model_id
        chosen = run if run is not None else labels.newest(connection, of, by)
        done = transfer.export_boundaries(connection, folder, form, chosen, force=force, begin=_begin)
    click.echo(f"wrote run {chosen}, {plural(done.rows, 'item')}, to {done.place}")
