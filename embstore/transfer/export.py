"""Embeddings, centroids and boundaries out of the database into files.

Rows are read page by page in one state of the database, while those before are still written; a file gets its name when
it is whole. An export that was interrupted starts over.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from embstore import faults, vectors
from embstore.ahead import ahead
from embstore.catalog import Dataset, StoredModel
from embstore.db.copy import Column, read_rows, read_texts
from embstore.errors import UsageError
from embstore.transfer import csvs, kaldi, npz, parquet, pickles
from embstore.transfer.files import claimed, unwritable
from embstore.transfer.table import Batch, Facts, Format, Table

Begin = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Shows progress: told how many rows there are, then how many more are done."""

_PIECE = 1000
_WRITERS = {
    "pkl": pickles.write,
    "npz": npz.write,
    "parquet": parquet.write,
    "kaldi": kaldi.write,
    "csv": csvs.write,
}

_MODEL = "SELECT media, fingerprint, settings FROM embstore.model WHERE model_id = :model_id"
_EMBEDDED = """
SELECT count(*), coalesce(bool_or(i.start IS NOT NULL), false)
FROM embstore.embedding_{id} e JOIN embstore.item i USING (dataset_id, item_id)
WHERE e.dataset_id = :dataset_id AND e.model_id = {id}
"""
# Numbers come as arrays, and texts column by column: as rows they would take longer than the vectors.
_ITEMS = """
SELECT {columns} FROM embstore.item
WHERE dataset_id = {dataset} AND position > {last} ORDER BY position LIMIT {size}
"""
_NUMBERS = "position, item_id, coalesce(start, 'NaN'), coalesce(duration, 'NaN')"
_INT, _DOUBLE, _REAL = np.dtype(np.int64), np.dtype(np.float64), np.dtype(np.float32)
_NUMBER_COLUMNS: dict[str, Column] = {
    "position": (_INT, None),
    "item_id": (_INT, None),
    "start": (_DOUBLE, None),
    "duration": (_DOUBLE, None),
}
# Names that would stand for several items: as `pickles.stem` makes them.
_CONTESTED = r"""
SELECT name FROM (
    SELECT item_id, regexp_replace(path, '(?<=[^/])\.[^./]*$', '') AS name FROM embstore.item
    WHERE dataset_id = :dataset_id
    UNION SELECT item_id, path FROM embstore.item WHERE dataset_id = :dataset_id) n
GROUP BY name HAVING count(DISTINCT item_id) > 1
"""
_COUNTS = """
SELECT status, count(*) FROM embstore.extraction
WHERE dataset_id = :dataset_id AND model_id = :model_id AND status <> 'done' GROUP BY status
"""
_REGISTERED = "SELECT count(*) FROM embstore.item WHERE dataset_id = :dataset_id"

_AVERAGED = """
FROM embstore.centroid c
JOIN embstore.centroid_vector v USING (dataset_id, model_id, centroid_id)
JOIN embstore.datasets d USING (dataset_id)
WHERE c.model_id = :model_id AND (CAST(:dataset_id AS integer) IS NULL OR c.dataset_id = :dataset_id)
"""
_CENTROIDS = f"""
SELECT count(*), count(*) FILTER (WHERE c.status <> 'done' OR EXISTS (SELECT FROM embstore.speaker_change g
    WHERE g.dataset_id = c.dataset_id AND g.model_id = c.model_id AND g.speaker = c.speaker)),
    CASE WHEN min(c.average) = max(c.average) THEN min(c.average) END,
    CASE WHEN min(d.dataset) = max(d.dataset) THEN min(d.dataset) END, count(DISTINCT d.dataset_id)
{_AVERAGED}
"""
_CENTROID_ROWS = f"""
SELECT c.dataset, c.speaker, vector_send(c.embedding), c.average, c.num_utterances, c.cohesion,
    (SELECT count(*) FROM embstore.item i JOIN embstore.extraction x USING (dataset_id, item_id)
     WHERE i.dataset_id = c.dataset_id AND i.speaker = c.speaker AND x.model_id = c.model_id
         AND x.status IN ('failed', 'skipped')),
    u.ids, u.paths
FROM (SELECT c.*, v.embedding, d.dataset, d.root {_AVERAGED}) c
CROSS JOIN LATERAL (
    SELECT array_agg(i.item_id ORDER BY i.item_id) AS ids,
        array_agg(rtrim(c.root, '/') || '/' || i.path ORDER BY i.item_id) AS paths
    FROM embstore.item i JOIN embstore.extraction x USING (dataset_id, item_id)
    WHERE :with_utterances AND i.dataset_id = c.dataset_id AND i.speaker = c.speaker AND x.model_id = c.model_id
        AND x.status = 'done') u
ORDER BY c.dataset, c.centroid_id
"""

_RUN = """
SELECT d.dataset_id, d.dataset, d.media, d.root, m.model_id, m.name, m.dim, r.status, r.method, r.parameters, r.found,
    r.items, r.embedded,
    (SELECT count(*) FROM embstore.boundary_score s
     WHERE s.dataset_id = r.dataset_id AND s.boundary_run_id = r.boundary_run_id) AS scores
FROM embstore.boundary_run r JOIN embstore.datasets d USING (dataset_id) JOIN embstore.model m USING (model_id)
WHERE r.boundary_run_id = :run
"""
_SCORES = """
SELECT {columns}
FROM embstore.boundary_score s
JOIN embstore.item i ON i.dataset_id = s.dataset_id AND i.position = s.position
LEFT JOIN embstore.boundary b
    ON b.dataset_id = s.dataset_id AND b.boundary_run_id = s.boundary_run_id AND b.position = s.position
JOIN embstore.segment g ON g.dataset_id = s.dataset_id AND g.boundary_run_id = s.boundary_run_id
    AND s.position BETWEEN g.first_position AND g.last_position
WHERE s.dataset_id = {dataset} AND s.boundary_run_id = {run} AND s.position > {last}
ORDER BY s.position LIMIT {size}
"""
_SCORE_NUMBERS = """s.position, coalesce(i.start, 'NaN'), s.score, coalesce(b.confidence, 'NaN'),
    CAST(g.segment AS bigint), CAST(g.voice AS bigint)"""
_SCORE_COLUMNS: dict[str, Column] = {
    "position": (_INT, None),
    "start": (_DOUBLE, None),
    "score": (_REAL, None),
    "confidence": (_REAL, None),
    "segment": (_INT, None),
    "voice": (_INT, None),
}


@dataclass(frozen=True)
class Exported:
    """What was written."""

    rows: int
    place: Path
    stale: int = 0
    """Centroids of these that were computed before their utterances changed."""


def silent(_rows: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show no progress."""
    return nullcontext(lambda _more: None)


def export_embeddings(
    connection: Connection,
    folder: Path,
    form: Format,
    model: StoredModel,
    dataset: Dataset,
    *,
    force: bool = False,
    begin: Begin = silent,
) -> Exported:
    """Write all vectors of a dataset by a model, in the order of the dataset, into `folder`.

    Let the caller's transaction be REPEATABLE READ. Raises UsageError if there are none, if the folder holds something
    else and `force` is not given, or if it cannot be written to.
    """
    values = {"dataset_id": dataset.dataset_id, "model_id": model.model_id}
    rows, segmented = connection.execute(text(_EMBEDDED.format(id=model.model_id)), values).one()
    if not rows:
        raise UsageError(
            f"there are no vectors of dataset '{dataset.name}' by model '{model.name}': type 'embstore extract' first"
        )
    facts = replace(_facts(connection, model), kind="embeddings", dataset=dataset.name, root=dataset.root, rows=rows)
    table = Table(facts, rows, iter(()), segmented)
    if form == "pkl":
        contested = frozenset(connection.execute(text(_CONTESTED), values).scalars())
        table = replace(table, contested=contested, counts=_counts(connection, values, rows))
    return _write(folder, form, table, embedding_batches(connection, dataset, model), force, begin)


def _facts(connection: Connection, model: StoredModel) -> Facts:
    media, fingerprint, settings = connection.execute(text(_MODEL), {"model_id": model.model_id}).one()
    return Facts("embeddings", media=media, model=model.name, fingerprint=fingerprint, dim=model.dim, settings=settings)


def _counts(connection: Connection, values: dict[str, int], done: int) -> dict[str, int]:
    """As `extraction_stats.json` has them."""
    registered = int(connection.execute(text(_REGISTERED), values).scalar_one())
    refused = {status: int(number) for status, number in connection.execute(text(_COUNTS), values)}
    failed, skipped = refused.get("failed", 0), refused.get("skipped", 0)
    return {
        "total_files": registered,
        "successful": done,
        "failed": failed,
        "skipped": skipped,
        "pending": registered - done - failed - skipped,
    }


def embedding_batches(connection: Connection, dataset: Dataset, model: StoredModel) -> Generator[Batch]:
    """All vectors of a dataset in its order, with what is known of their items: the columns of a table, and `item_id`.

    Let the caller's transaction be REPEATABLE READ.
    """
    size, last = vectors.page_size(model.dim), -1
    while True:
        page = {"dataset": dataset.dataset_id, "last": last, "size": size}
        numbers = read_rows(connection, _ITEMS.format(columns=_NUMBERS, **page), _NUMBER_COLUMNS)
        item_ids = numbers["item_id"]
        if not len(item_ids):
            return
        there, matrix = vectors.of_items(connection, dataset.dataset_id, model.model_id, model.dim, item_ids)
        texts = {name: read_texts(connection, _ITEMS.format(columns=name, **page)) for name in ("path", "speaker")}
        if there.any():
            chosen = {
                name: column if there.all() else _chosen(column, there) for name, column in (numbers | texts).items()
            }
            yield {**chosen, "embedding": matrix}
        if len(item_ids) < size:
            return
        last = int(numbers["position"][-1])


def _chosen(column: Any, rows: NDArray[np.bool_]) -> Any:
    if isinstance(column, list):
        return [value for value, keep in zip(column, rows.tolist(), strict=True) if keep]
    return column[rows]


def export_centroids(
    connection: Connection,
    folder: Path,
    form: Format,
    model: StoredModel,
    dataset: Dataset | None,
    *,
    force: bool = False,
    begin: Begin = silent,
) -> Exported:
    """Write all centroids of a model, or those of one dataset; raises as `export_embeddings` does."""
    values = {"model_id": model.model_id, "dataset_id": None if dataset is None else dataset.dataset_id}
    rows, stale, average, only, datasets = connection.execute(text(_CENTROIDS), values).one()
    if not rows:
        of = f" of dataset '{dataset.name}'" if dataset is not None else ""
        raise UsageError(f"there are no centroids{of} by model '{model.name}': type 'embstore centroids' first")
    if form == "kaldi" and datasets > 1:
        raise UsageError("an archive for Kaldi holds the speakers of one dataset: add --dataset NAME")
    facts = replace(_facts(connection, model), kind="centroids", dataset=only, rows=rows, average=average)
    batches = _centroids(connection, {**values, "with_utterances": form in ("pkl", "parquet")}, model.name)
    return replace(_write(folder, form, Table(facts, rows, iter(())), batches, force, begin), stale=stale)


def _centroids(connection: Connection, values: dict[str, Any], model: str) -> Generator[Batch]:
    result = connection.execution_options(stream_results=True, max_row_buffer=_PIECE).execute(
        text(_CENTROID_ROWS), values
    )
    for rows in result.partitions(_PIECE):
        datasets, speakers, sent, averages, numbers, cohesions, failed, ids, paths = zip(*rows, strict=True)
        yield {
            "dataset": list(datasets),
            "model": [model] * len(rows),
            "speaker": list(speakers),
            "embedding": np.stack([np.frombuffer(bytes(v), ">f4", offset=4) for v in sent]).astype(np.float32),
            "average": list(averages),
            "num_utterances": np.array([-1 if n is None else n for n in numbers], dtype=np.int64),
            "failed_utterances": np.array(failed, dtype=np.int64),
            "cohesion": np.array(cohesions, dtype=np.float32),
            "utterance_list": [list(found or ()) for found in ids],
            "original_paths": [list(found or ()) for found in paths],
        }


def export_boundaries(
    connection: Connection, folder: Path, form: Format, run: int, *, force: bool = False, begin: Begin = silent
) -> Exported:
    """Write a finished boundary run, a row for each position that had a vector; raises as `export_embeddings` does."""
    row = connection.execute(text(_RUN), {"run": run}).one_or_none()
    if row is None or row.status != "done":
        raise UsageError(
            f"no finished boundary run {run}: 'embstore sql \"select run, dataset, method, status from"
            " boundary_runs\"' lists all"
        )
    dataset, model = Dataset(*row[:4]), StoredModel(*row[4:7])
    known = {name: getattr(row, name) for name in ("method", "parameters", "found", "items", "embedded")}
    facts = replace(
        _facts(connection, model),
        kind="boundaries",
        dataset=dataset.name,
        root=dataset.root,
        media=dataset.media,
        rows=row.scores,
        run=known,
    )
    batches = _boundaries(connection, dataset.dataset_id, run)
    return _write(folder, form, Table(facts, row.scores, iter(())), batches, force, begin)


def _boundaries(connection: Connection, dataset_id: int, run: int, size: int = 20_000) -> Generator[Batch]:
    last = -1
    while True:
        page = {"dataset": dataset_id, "run": run, "last": last, "size": size}
        numbers = read_rows(connection, _SCORES.format(columns=_SCORE_NUMBERS, **page), _SCORE_COLUMNS)
        if not len(numbers["position"]):
            return
        yield {**numbers, "path": read_texts(connection, _SCORES.format(columns="i.path", **page))}
        last = int(numbers["position"][-1])


def _write(folder: Path, form: Format, table: Table, batches: Generator[Batch], force: bool, begin: Begin) -> Exported:
    if form == "parquet":
        parquet.pyarrow()
    try:
        with claimed(folder, force), begin(table.rows) as tick, ahead(batches) as made:
            place = _WRITERS[form](folder, replace(table, batches=_told(made, tick)))
    except OSError as error:
        raise unwritable(error, folder) from None
    return Exported(table.rows, place)


def _told(batches: Iterator[Batch], tick: Callable[[int], None]) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        faults.reach("export")
        tick(len(next(iter(batch.values()))))
