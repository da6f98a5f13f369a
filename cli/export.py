"""`embstore export`: what is in the database, as files."""

from __future__ import annotations

from pathlib import Path

import click
from sqlalchemy import Connection

from embstore import catalog, transfer
from embstore.catalog import StoredModel
from embstore.errors import UsageError
from embstore.settings import Settings
from embstore.transfer import Format

from .options import pass_settings, reading
from .output import plural


@click.group()
def export() -> None:
    """Write what is in the database to files."""


@export.command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(transfer.FORMATS), default="pkl", show_default=True, help="See below."
)
@click.option("--dataset", metavar="NAME", help="Only this dataset.")
@click.option("--model", metavar="NAME", help="Centroids of this model; may be left out if there is but one.")
@click.option("--force", is_flag=True, help="Write into a folder that holds other files.")
@pass_settings
def centroids(
    folder: Path, form: Format, dataset: str | None, model: str | None, force: bool, settings: Settings
) -> None:
    """Write each speaker's centroid to DIR.

    \b
    pkl       DIR/DATASET/SPEAKER.pkl, one file a speaker
    npz       DIR/centroids.npz, one array of all vectors and one of each column
    parquet   DIR/centroids.parquet, one row a speaker; needs pyarrow

    A folder that this has written before is written over.

    \b
      embstore export centroids --format npz out
    """
    with reading(settings) as connection:
        if dataset is not None:
            catalog.get_dataset(connection, dataset)
        chosen = _model(connection, dataset, model)
        done = transfer.export_centroids(connection, folder, form, chosen, dataset, force=force)
    click.echo(f"wrote {plural(done.speakers, 'centroid')} by {chosen.name} to {done.place}")
    if done.stale:
        click.echo(f"{done.stale:,} of them are stale: type 'embstore centroids' and export again", err=True)


def _model(connection: Connection, dataset: str | None, model: str | None) -> StoredModel:
    if model is not None:
        return catalog.get_model(connection, model)
    models = [found for found, _ in catalog.embedded(connection, dataset, None)]
    if len(models) != 1:
        names = ", ".join(f"'{found.name}'" for found in models)
        raise UsageError(
            f"there are vectors by several models, {names}: add --model NAME"
            if models
            else "there are no vectors: type 'embstore extract PATH', then 'embstore centroids'"
        )
    return models[0]
