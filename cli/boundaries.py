"""`embstore boundaries`: where one speaker ends and the next begins."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import click
from click.core import ParameterSource
from sqlalchemy import Connection

from embstore import catalog
from embstore.boundaries import labels
from embstore.boundaries.evaluate import evaluate
from embstore.boundaries.job import Method, Options
from embstore.db.engine import Database
from embstore.db.migrate import require_ready
from embstore.errors import UsageError
from embstore.settings import Settings, load
from embstore.words import plural

from .boundary_runs import Detection
from .options import database_options, finite, opened, pass_settings, reading
from .outcome import Speaker, log_option
from .output import write_json, write_rows


@click.group("boundaries", invoke_without_command=True)
@click.option("--dataset", metavar="NAME", help="Only this dataset.")
@click.option("--model", metavar="NAME", help="Only this model's vectors.")
@click.option("--method", type=click.Choice(get_args(Method)), default="auto", help="See below.  [default: auto]")
@click.option("--num-speakers", metavar="K", type=click.IntRange(min=1), help="auto: exactly so many segments.")
@click.option(
    "--penalty",
    metavar="B",
    type=click.FloatRange(min=0, min_open=True),
    callback=finite,
    help="auto: larger finds fewer boundaries.  [default: 1.5]",
)
@click.option(
    "--segment-size",
    metavar="N",
    type=click.IntRange(min=1),
    default=1000,
    help="cosine, gmm: about how many files a speaker has.  [default: 1000]",
)
@click.option(
    "--boundary-window",
    metavar="N",
    type=click.IntRange(min=1),
    default=10,
    help="cosine, gmm: files to search on each side of an expected place.  [default: 10]",
)
@click.option(
    "--gmm-components",
    metavar="N",
    type=click.IntRange(min=1),
    default=2,
    help="gmm: Gaussians a side.  [default: 2]",
)
@click.option(
    "--workers", metavar="N", type=click.IntRange(min=1), help="Datasets at a time.  [env: EMBEDDING_WORKERS]"
)
@click.option(
    "--output-dir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write a picture, a JSON file and a folder a speaker; with several datasets, into a folder in DIR for each.",
)
@click.option(
    "--link/--copy", default=True, help="Link the files into the speakers' folders, or copy.  [default: link]"
)
@click.option("--debug", "explain", is_flag=True, help="Explain each decision.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@log_option
@database_options
@click.pass_context
def boundaries(
    context: click.Context,
    dataset: str | None,
    model: str | None,
    method: Method,
    num_speakers: int | None,
    penalty: float | None,
    segment_size: int,
    boundary_window: int,
    gmm_components: int,
    workers: int | None,
    output_dir: Path | None,
    link: bool,
    explain: bool,
    as_json: bool,
    database_url: str | None,
    home: Path | None,
) -> None:
    """Find where the speaker changes in a set that is ordered by speaker.

    \b
    auto     change-point detection; needs no segment size
    cosine   the lowest similarity around each place where a change is expected
    gmm      the same search, judged by Gaussian mixtures

    \b
      embstore boundaries --dataset train
      embstore boundaries --method cosine --segment-size 1000
      embstore sql "select * from segments where run = 1"
      embstore boundaries apply 1
    """
    if context.invoked_subcommand is not None:
        return
    settings = load(database_url=database_url, home=home, embedding_workers=workers)
    _warn_of_what_has_no_influence(context, method)
    options = Options(method, segment_size, boundary_window, gmm_components, num_speakers, penalty, explain)
    detection = Detection(settings, options, output_dir, copy=not link, say=Speaker(as_json))
    context.exit(detection.run(dataset, model))


def _warn_of_what_has_no_influence(context: click.Context, method: Method) -> None:
    names = {"num_speakers", "penalty", "segment_size", "boundary_window", "gmm_components"}
    for name in sorted(names - set(Options(method).parameters())):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = f"--{name.replace('_', '-')}"
            print(f"note: {flag} has no influence on method {method}; --method chooses another", file=sys.stderr)


@contextmanager
def _changing(database: Database) -> Iterator[Connection]:
    """A transaction that may COPY, which one that Ctrl+C ends on the server may not."""
    require_ready(database)
    with database.begin() as connection:
        yield connection


@boundaries.command("apply")
@click.argument("run", type=int)
@click.option("--merge-same", is_flag=True, help="Give segments that are the same voice coming back one name.")
@click.option(
    "--threshold",
    metavar="COSINE",
    type=click.FloatRange(-1, 1),
    callback=finite,
    help="How alike two segments' centroids must be to be the same voice.  [default: chosen from the data]",
)
@pass_settings
def apply(run: int, merge_same: bool, threshold: float | None, settings: Settings) -> None:
    """Write the segments of a RUN back as speaker labels; 'undo' takes them away again.

    \b
      embstore boundaries apply 1
      embstore boundaries apply 1 --merge-same
    """
    if threshold is not None and not merge_same:
        raise UsageError("--threshold says which segments are the same voice: it needs --merge-same")
    with opened(settings) as database, _changing(database) as connection:
        found = labels.get_run(connection, run)
        voices = labels.merge_voices(connection, found, threshold) if merge_same else None
        count = labels.apply(connection, found)
        catalog.record(connection, "boundaries apply", found.dataset_id, {"run": run, "merge_same": merge_same})
    merged = f", {plural(voices, 'voice')}" if voices is not None else ""
    print(f"labelled {plural(count, 'item')} of '{found.dataset}' by run {run}{merged}: type 'embstore centroids' next")


@boundaries.command("undo")
@click.argument("run", type=int)
@pass_settings
def undo(run: int, settings: Settings) -> None:
    """Give the items the speakers back that they had before RUN was applied."""
    with opened(settings) as database, _changing(database) as connection:
        found = labels.get_run(connection, run)
        count = labels.undo(connection, found)
        catalog.record(connection, "boundaries undo", found.dataset_id, {"run": run})
    print(f"restored the speakers of {plural(count, 'item')} of '{found.dataset}'")


@boundaries.command("eval")
@click.argument("run", type=int)
@click.option(
    "--truth",
    metavar="FILE.csv",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV in the dataset's order with a column 'speaker', or with a column 'position' of the true boundaries.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_settings
def evaluate_run(run: int, truth: Path, as_json: bool, settings: Settings) -> None:
    """Compare a RUN with the true boundaries: precision, recall, F1, purity and coverage."""
    with reading(settings) as connection:
        found = labels.summary(connection, run)
        positions = labels.positions(connection, run)
    try:
        result = evaluate(positions, _truth(truth), found["items"])
    except ValueError as error:
        raise UsageError(f"{truth}: {error}") from error
    rows = [
        (f"within {a.tolerance}" if a.tolerance else "exact", a.precision, a.recall, a.f1) for a in result.agreements
    ]
    if as_json:
        measures = {name: {"precision": p, "recall": r, "f1": f} for name, p, r, f in rows}
        write_json({"run": run, **measures, "purity": result.purity, "coverage": result.coverage}, sys.stdout)
        return
    table = [(name, f"{p:.4f}", f"{r:.4f}", f"{f:.4f}") for name, p, r, f in rows]
    write_rows(("boundaries", "precision", "recall", "F1"), table, "table", sys.stdout)
    print(f"purity {result.purity:.4f}, coverage {result.coverage:.4f}")


def _truth(path: Path) -> list[int]:
    """Positions of the true boundaries. Raises UsageError."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        if "speaker" in names:
            speakers = [row["speaker"] for row in reader]
            return [i for i in range(1, len(speakers)) if speakers[i] != speakers[i - 1]]
        if "position" in names:
            try:
                return [int(row["position"]) for row in reader]
            except ValueError as error:
                raise UsageError(f"{path} line {reader.line_num}: a position is a whole number ({error})") from error
    raise UsageError(f"{path} has neither a column 'speaker' nor 'position' (found: {', '.join(names)})")
