"""`embstore models`: which models there are, and recipes kept under a name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from embstore import recipes, reports
from embstore.errors import EmbstoreError
from embstore.models import registry
from embstore.recipes import Shown
from embstore.settings import Settings, load
from embstore.words import plural

from .model_options import model_options
from .options import database_options, pass_settings, reading, writing
from .output import write_json, write_pairs, write_rows

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("models", invoke_without_command=True)
@_json_option
@database_options
@click.pass_context
def models(context: click.Context, as_json: bool, database_url: str | None, home: Path | None) -> None:
    """List the models, stored and available; keep a recipe under a name.

    \b
      embstore models
      embstore models add vox --family wespeaker --model-dir /models/voxceleb_resnet34
      embstore extract /data/audio --model vox
    """
    if context.invoked_subcommand is not None:
        return
    with reading(load(database_url=database_url, home=home)) as connection:
        stored = reports.models(connection)
    installed = list(registry.available())
    rows: list[dict[str, Any]] = [
        one._asdict() | {"stored": True, "installed": (one.family or one.name.partition(":")[0]) in installed}
        for one in stored
    ]
    unused = {
        "media": None,
        "dim": None,
        "fingerprint": None,
        "family": None,
        "vectors": 0,
        "stored": False,
        "installed": True,
    }
    names = {one.name for one in stored}
    rows += [{"name": name} | unused | {"family": name} for name in installed if name not in names]
    if as_json:
        write_json(rows, sys.stdout)
        return
    columns = ("name", "media", "dim", "vectors", "fingerprint", "state")
    write_rows(columns, [_row(row) for row in rows], "table", sys.stdout)


def _row(row: dict[str, Any]) -> tuple[Any, ...]:
    state = (
        ("stored" if row["installed"] else "stored, not installed here") if row["stored"] else "installed, not used yet"
    )
    fingerprint = row["fingerprint"] and row["fingerprint"][:12]
    return row["name"], row["media"], row["dim"], row["vectors"], fingerprint, state


@models.command("add")
@click.argument("name")
@click.option("--family", metavar="FAMILY", required=True, help="What makes it, such as wespeaker.")
@model_options
@pass_settings
def add(name: str, family: str, options: dict[str, str], settings: Settings) -> None:
    """Keep a model's recipe under a name; everybody else types only the name.

    The weights stay where they are. Where they lie elsewhere on another machine, it names the place: other weights
    are refused by their fingerprint. Under a name that is there already, the place and options are replaced.

    \b
      embstore models add vox --family wespeaker --model-dir /models/voxceleb_resnet34
      embstore models add english --family wespeaker --model-option variant=english
      embstore extract /data/audio --model vox
      embstore extract /data/audio --model vox --model-dir /mnt/models/voxceleb_resnet34
    """
    with writing(settings) as connection:
        recipe, new = recipes.add(connection, name, family, options)
    done = "kept" if new else "replaced; its weights are the same as before"
    click.echo(
        f"model '{name}' ({recipe.media}, {recipe.dim} dimensions, fingerprint {recipe.fingerprint()[:12]}) is {done}:"
        f" type 'embstore extract PATH --model {name}'"
    )


@models.command("show")
@click.argument("name")
@_json_option
@pass_settings
def show(name: str, as_json: bool, settings: Settings) -> None:
    """Show what the database knows of a model, and whether its weights are at hand.

    \b
      embstore models show resemblyzer
    """
    with reading(settings) as connection:
        shown = recipes.show(connection, name)
        state = _weights(lambda: recipes.find(connection, name, {}).fingerprint(), shown)
    if as_json:
        write_json({**vars(shown), "weights_here": state}, sys.stdout)
        return
    options = "".join(f" {key}={value}" for key, value in (shown.options or {}).items())
    pairs = {
        "name": shown.name,
        "recipe": f"{shown.family}{options}" if shown.family else "not kept: name the model's own options",
        "embeds": f"{shown.media}, {shown.dim} dimensions",
        "vectors": f"{shown.vectors:,}, in {', '.join(shown.views)}",
        "fingerprint": shown.fingerprint,
        "weights here": state,
        "since": shown.created_at.isoformat(" ", "seconds"),
        "settings": json.dumps(dict(shown.settings), ensure_ascii=False),
    }
    write_pairs(pairs, sys.stdout)


def _weights(fingerprint: Callable[[], str], shown: Shown) -> str:
    """In words, whether this machine has what the stored vectors were made with."""
    try:
        return "the same" if fingerprint() == shown.fingerprint else "others: their vectors can't be compared"
    except EmbstoreError as error:
        return f"not usable: {error}"


@models.command("remove")
@click.argument("name")
@click.option("--with-vectors", is_flag=True, help="Remove its vectors too, and all that was computed from them.")
@pass_settings
def remove(name: str, with_vectors: bool, settings: Settings) -> None:
    """Take a model out of the database; its weights stay where they are.

    \b
      embstore models remove vox
      embstore models remove vox --with-vectors
    """
    with writing(settings) as connection:
        count = recipes.remove(connection, name, with_vectors=with_vectors)
    click.echo(f"model '{name}' is removed" + (f", with {plural(count, 'vector')}" if count else ""))
