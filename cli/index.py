"""`embstore index`: the index that makes searches fast, and how often it is right."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from sqlalchemy import Connection

from embstore import catalog, indexes, recall
from embstore.catalog import StoredModel
from embstore.db.engine import Database
from embstore.db.migrate import require_ready
from embstore.indexes import KINDS, PRECISIONS, Index, Kind, Plan, Precision
from embstore.progress import PLAIN_SECONDS, duration
from embstore.settings import Settings
from embstore.words import plural

from .options import interruptible, pass_settings, reading
from .output import write_json, write_rows

CONNECTIONS = 2
_OPTIONS: dict[Kind, set[str]] = {"hnsw": {"m", "ef_construction"}, "ivfflat": {"lists"}}
_LOW = 0.95
"""Recall from which down a word is said about it."""
_HOSTS_HERE = (None, "", "localhost", "127.0.0.1", "::1")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

_model_option = click.option("--model", metavar="NAME", help="May be left out if there is but one model.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class _Size(click.ParamType[int]):
    """Bytes, as PostgreSQL writes them: `8GB`, `512 MB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+)\s*([KMGT]?)I?B?", str(value).strip().upper())
        if found is None or not 1 << 20 <= int(found[1]) * _UNITS[found[2]] < 1 << 41:
            self.fail(f"'{value}' is no amount of memory, such as 8GB or 512MB", param, ctx)
        return int(found[1]) * _UNITS[found[2]]


@click.group()
def index() -> None:
    """Build, drop and check the index that makes searches fast.

    Without one a search compares all vectors, which is exact, and takes a tenth of a second for 200,000 of them.

    \b
      embstore index build
      embstore index check
    """


@index.command()
@_model_option
@click.option("--kind", type=click.Choice(KINDS), default="hnsw", help="hnsw is faster to search.  [default: hnsw]")
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="full", help="half takes 0.6 of the space.  [default: full]"
)
@click.option("--m", metavar="N", type=click.IntRange(2, 100), help="Links of a vector in hnsw.  [default: 16]")
@click.option(
    "--ef-construction", metavar="N", type=click.IntRange(4, 1000), help="Care taken with them.  [default: 64]"
)
@click.option(
    "--lists", metavar="N", type=click.IntRange(1, 32768), help="Clusters of ivfflat.  [default: one per 1000 vectors]"
)
@click.option("--memory", metavar="SIZE", type=_Size(), help="Memory for it, such as 8GB.  [default: by size]")
@click.option(
    "--workers", metavar="N", type=click.IntRange(0, 64), help="Parallel processes of the server.  [default: by cores]"
)
@pass_settings
def build(
    model: str | None,
    kind: Kind,
    precision: Precision,
    m: int | None,
    ef_construction: int | None,
    lists: int | None,
    memory: int | None,
    workers: int | None,
    settings: Settings,
) -> None:
    """Build an index on the vectors of a model, while everything else goes on.

    Load first, build afterwards: a vector that is written under an index takes forty times as long. An index of another
    kind or precision is replaced. Plain queries on a view embeddings_MODEL use an index of full precision only.

    \b
      embstore index build
      embstore index build --model wespeaker --precision half --memory 8GB
    """
    options = {"lists": lists, "m": m, "ef_construction": ef_construction}
    given = {name: value for name, value in options.items() if value is not None}
    for name in sorted(given.keys() - _OPTIONS[kind]):
        raise click.UsageError(f"--{name.replace('_', '-')} is not for {kind}: leave it out")
    with _opened(settings) as database:
        with database.begin() as connection, interruptible():
            stored = catalog.one_model(connection, None, model, prefer=settings.embedding_model)
            local = database.embedded or (host := database.url.host) in _HOSTS_HERE or str(host).startswith("/")
            plan = indexes.plan(
                connection, stored, kind, precision, local=local, options=given, memory=memory, workers=workers
            )
        click.echo(_intent(plan))
        if plan.memory < plan.needed:
            click.echo(_advice(plan), err=True)
        begin = time.monotonic()
        with _watching() as watch:
            replaced = indexes.build(database, plan, watch)
        with database.begin() as connection:
            size = next(i.size for i in indexes.find(connection, stored.model_id) if i.name == plan.name)
    click.echo(f"built {plan.name} in {duration(time.monotonic() - begin)}, {_bytes(size)} on disk")
    for name in replaced:
        click.echo(f"dropped {name}, whose place it takes")
    click.echo("'embstore index check' measures how often it is right", err=True)


@index.command()
@_model_option
@pass_settings
def drop(model: str | None, settings: Settings) -> None:
    """Drop the index of a model: searches are exact then, and loading is fast.

    \b
      embstore index drop --model wespeaker
    """
    with _opened(settings) as database:
        with database.begin() as connection:
            stored = catalog.one_model(connection, None, model, prefer=settings.embedding_model)
        dropped = indexes.drop(database, stored)
    for one in dropped:
        click.echo(
            f"dropped {one.name}, {_bytes(one.size)}; 'embstore index build --model {stored.name}' builds it again"
        )
    if not dropped:
        click.echo(f"model '{stored.name}' has no index")


@index.command()
@_model_option
@_json_option
@pass_settings
def status(model: str | None, as_json: bool, settings: Settings) -> None:
    """Show which indexes there are, and how far one is that is being built."""
    with reading(settings) as connection:
        chosen = catalog.get_model(connection, model) if model is not None else None
        found = indexes.find(connection, chosen.model_id if chosen else None)
        without = _without(connection, chosen, found)
    if as_json:
        names = ("model", "name", "kind", "precision", "size", "state", "phase", "part")
        write_json([{name: getattr(one, name) for name in names} for one in found], sys.stdout)
        return
    if found:
        rows = [(i.model, i.name, i.kind, i.precision, _bytes(i.size), _state(i)) for i in found]
        write_rows(("model", "index", "kind", "precision", "size", "state"), rows, "table", sys.stdout)
    for name in without:
        click.echo(f"model '{name}' has no index, and searches are exact: 'embstore index build --model {name}'")
    if any(one.state == "broken" for one in found):
        click.echo("broken: left by a build that was cut off; 'embstore index build' or 'drop' clears it away")
    if not found and not without:
        click.echo("there are no models yet: type 'embstore extract PATH'")


@index.command()
@_model_option
@click.option("--queries", metavar="N", type=click.IntRange(min=1), default=50, help="Vectors to try.  [default: 50]")
@click.option("--k", metavar="N", type=click.IntRange(min=1, max=1000), default=10, help="Neighbours.  [default: 10]")
@_json_option
@pass_settings
def check(model: str | None, queries: int, k: int, as_json: bool, settings: Settings) -> None:
    """Measure how often a search gives what an exact one gives, and how fast it is.

    Stored vectors are searched for, in all datasets, in each, and by filters that keep 50, 10, 1 and 0.1% of the items.

    \b
      embstore index check --queries 100
    """
    with _opened(settings) as database:
        with database.begin() as connection:
            stored = catalog.one_model(connection, None, model, prefer=settings.embedding_model)
            datasets = [one for _, some in catalog.embedded(connection, None, stored.name) for one in some]
        lines = []
        with interruptible():
            for line in recall.check(database, stored, datasets, queries=queries, k=k):
                lines.append(line)
                if sys.stderr.isatty():
                    click.echo(f"\r{line.scope}: {line.recall:.3f}\x1b[K", nl=False, err=True)
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)
    if as_json:
        write_json([vars(line) | {"k": k} for line in lines], sys.stdout)
        return
    if not lines:
        click.echo(f"there are no vectors by model '{stored.name}' to try: type 'embstore extract PATH' first")
        return
    columns = ("among", "queries", f"recall@{k}", "lowest", "queries/s", "exact queries/s", "how")
    rows = [
        (n.scope, n.queries, f"{n.recall:.3f}", f"{n.lowest:.1f}", f"{n.rate:,.0f}", f"{n.exact_rate:,.0f}", n.method)
        for n in lines
    ]
    write_rows(columns, rows, "table", sys.stdout)
    if any(line.recall < _LOW and line.method == "index" for line in lines):
        click.echo(
            "for a higher recall: SET hnsw.ef_search = 200, or build with --m 24 --ef-construction 200", err=True
        )
    if not any(line.method == "index" for line in lines):
        click.echo(f"no index was used: 'embstore index build --model {stored.name}' makes one", err=True)


@contextmanager
def _opened(settings: Settings) -> Iterator[Database]:
    """The database, ready, with one connection to work and one to watch."""
    database = Database(settings, pool_size=CONNECTIONS)
    try:
        require_ready(database)
        yield database
    finally:
        database.close()


def _intent(plan: Plan) -> str:
    options = ", ".join(f"{name} {value}" for name, value in plan.options.items())
    workers = f" and {plural(plan.workers, 'parallel worker')}" if plan.workers else ""
    return (
        f"building {plan.kind} ({options}) at {plan.precision} precision on {plural(plan.rows, 'vector')} by"
        f" {plan.model.name}, with {_bytes(plan.memory)} of memory{workers}"
    )


def _advice(plan: Plan) -> str:
    half = "" if plan.precision == "half" else ", or --precision half for a smaller one"
    return (
        f"the graph takes {_bytes(plan.needed)} and will not fit, so that building takes several times as long: add"
        f" --memory {-(-plan.needed >> 30)}GB if the server has it{half}"
    )


@contextmanager
def _watching() -> Iterator[Callable[[Index], None]]:
    """A bar in a terminal, elsewhere a line every few seconds."""
    if not sys.stderr.isatty():
        yield _plain()
        return
    # Here and not above: rich takes longer to import than a command may take to say what it is doing.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.percentage:>3.0f}%"),
        BarColumn(None),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as progress:
        task = progress.add_task("waiting for the server", total=1.0)
        yield lambda one: progress.update(task, completed=one.part or 0.0, description=one.phase or "")


def _plain() -> Callable[[Index], None]:
    last = time.monotonic()

    def watch(one: Index) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_SECONDS:
            last = time.monotonic()
            print(_state(one), file=sys.stderr, flush=True)

    return watch


def _state(one: Index) -> str:
    if one.pid is None:
        return one.state
    part = "" if one.part is None else f", {100 * one.part:.0f}%"
    return f"being built: {one.phase}{part}"


def _without(connection: Connection, chosen: StoredModel | None, found: list[Index]) -> list[str]:
    models = [chosen] if chosen else [model for model, _ in catalog.embedded(connection, None, None)]
    have = {one.model_id for one in found}
    return [model.name for model in models if model.model_id not in have]


def _bytes(size: int) -> str:
    return f"{size / (1 << 30):.1f} GB" if size >= 1 << 30 else f"{-(-size >> 20):,} MB"
