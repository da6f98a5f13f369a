"""`embstore search`: what sounds like this?"""

from __future__ import annotations

import sys
from typing import Any

import click

from embstore.db.migrate import require_ready
from embstore.lookup import KINDS, Asked, Embedder, Kind
from embstore.search import OF, TIMEOUT, Hit, Of, Results
from embstore.search import search as find
from embstore.settings import Settings
from embstore.words import plural

from .model_options import model_options
from .options import opened, pass_settings
from .output import write_json, write_rows

_WAYS = {
    "prefilter": "what the filter leaves, one by one",
    "scan": "all vectors, one by one",
    "index": "by the index",
}


@click.command()
@click.argument("query", metavar="FILE|ITEM|SPEAKER|VECTOR.npy")
@click.option("-k", "--k", metavar="N", type=click.IntRange(min=1), default=10, help="How many.  [default: 10]")
@click.option("--of", type=click.Choice(OF), default="utterances", help="Among what.  [default: utterances]")
@click.option("--model", metavar="NAME", help="By whose vectors; may be left out if there is but one model.")
@click.option("--dataset", metavar="NAME", help="Only results of this dataset.")
@click.option("--speaker", metavar="NAME", help="Only results of this speaker.")
@click.option("--where", metavar="SQL", help='Only results for which this holds, such as "position < 1000".')
@click.option("--exact", is_flag=True, help="Compare all vectors, even where there is an index.")
@click.option("--as", "kind", type=click.Choice(KINDS), help="What the name means, if it could be several.")
@click.option("--from", "query_dataset", metavar="DATASET", help="Where to look ITEM or SPEAKER up.")
@click.option("--explain", is_flag=True, help="Say how the results were found, and why so.")
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=TIMEOUT,
    help="How long the server may take; 0: no limit.  [default: 60]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@model_options
@pass_settings
def search(
    query: str,
    k: int,
    of: Of,
    model: str | None,
    dataset: str | None,
    speaker: str | None,
    where: str | None,
    exact: bool,
    kind: Kind | None,
    query_dataset: str | None,
    explain: bool,
    timeout: float,
    as_json: bool,
    options: dict[str, str],
    settings: Settings,
) -> None:
    """Find the utterances, or the speakers, that are most like one.

    \b
    FILE         is embedded on the fly; one that is an item already is looked up
    ITEM         an item's path in its dataset, or its number; itself is left out
    SPEAKER      by the centroid, or by the mean of the utterances where it is stale
    VECTOR.npy   an array of numpy's

    --where is one SQL expression on the columns of the view items (with --of speakers: of speaker_centroids): dataset,
    item_id, position, path, start, duration, speaker, size, vanished_at; start and duration are of a stretch, and null
    where an item is a whole file.

    \b
      embstore search visitor.wav
      embstore search annie/01.mp3 --k 5 --where "speaker <> 'annie'"
      embstore search annie --of speakers
    """
    with opened(settings) as database:
        require_ready(database)
        results = find(
            database,
            query,
            model=model,
            prefer_model=settings.embedding_model,
            k=k,
            of=of,
            dataset=dataset,
            speaker=speaker,
            where=where,
            exact=exact,
            kind=kind,
            query_dataset=query_dataset,
            embedder=Embedder(options),
            timeout=timeout,
        )
    if as_json:
        write_json(_as_json(results, explain), sys.stdout)
        return
    if results:
        _write_table(results)
    remarks = [_summary(results, k), *_advice(results, speaker), *(_explanation(results) if explain else [])]
    click.echo("\n".join(remarks), err=True)


def _write_table(results: Results) -> None:
    columns = ["similarity", "speaker", "utterances"] if results.of == "speakers" else ["similarity", "speaker", "path"]
    if any(hit.start is not None for hit in results):
        columns.append("start")
    if len({hit.dataset for hit in results} | {results.asked.dataset or results[0].dataset}) > 1:
        columns.append("dataset")
    values = {"utterances": "num_utterances"}
    rows = [
        [f"{hit.similarity:.4f}" if name == "similarity" else getattr(hit, values.get(name, name)) for name in columns]
        for hit in results
    ]
    write_rows(columns, rows, "table", sys.stdout)


def _summary(results: Results, k: int) -> str:
    found = plural(len(results), results.of.removesuffix("s"))
    fewer = ", as there are no more" if len(results) < k else ""
    how = "exact" if results.exact else "approximate"
    milliseconds = f"{1000 * results.seconds:,.0f} ms"
    return f"({found} by {results.model} nearest to {_called(results.asked)}{fewer}; {how}, {milliseconds})"


def _advice(results: Results, speaker: str | None) -> list[str]:
    """What to type where nothing was found."""
    if results:
        return []
    if results.of == "speakers":
        return ["there are no centroids to compare with: type 'embstore centroids'"]
    if speaker is not None:
        return ['which speakers there are: embstore sql "select distinct dataset, speaker from items"']
    return []


def _called(asked: Asked) -> str:
    if asked.utterances is not None:
        return f"speaker '{asked.name}' ({plural(asked.utterances, 'utterance')})"
    return f"{asked.kind} '{asked.name}'"


def _explanation(results: Results) -> list[str]:
    facts = results.facts
    lines = [f"how: {_WAYS[results.method]}", f"why: {results.reason}"]
    if index := facts.get("index"):
        lines.append(f"index: {index}; 'embstore index check' measures how often it is right")
    if "vectors" in facts:
        lines.append(f"vectors of the model: about {facts['vectors']:,}, as of the last ANALYZE")
    return lines


def _as_json(results: Results, explain: bool) -> dict[str, Any]:
    asked = results.asked
    query = {"kind": asked.kind, "name": asked.name, "dataset": asked.dataset, "item_id": asked.item_id}
    found: dict[str, Any] = {
        "model": results.model,
        "query": {name: value for name, value in query.items() if value is not None},
        "of": results.of,
        "exact": results.exact,
        "method": results.method,
        "seconds": round(results.seconds, 6),
        "results": [_hit_as_json(hit, results.of) for hit in results],
    }
    return found | ({"explain": {"reason": results.reason, **results.facts}} if explain else {})


def _hit_as_json(hit: Hit, of: Of) -> dict[str, Any]:
    names: tuple[str, ...]
    if of == "speakers":
        names = ("similarity", "dataset", "speaker", "num_utterances")
    else:
        names = ("similarity", "dataset", "speaker", "item_id", "position", "path", "start")
    return {name: getattr(hit, name) for name in names}
