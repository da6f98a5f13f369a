"""Centroids out of the database into files: one pickle a speaker, or one .npz or .parquet for all.

Rows come through a cursor on the server, so that memory does not grow with their number; a file gets its name when it
is whole.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from embstore.catalog import StoredModel
from embstore.errors import UsageError

Format = Literal["pkl", "npz", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)

MARKER = ".embstore-export.json"
"""In a folder that holds an export: it may be written into again."""
_PIECE = 1000
_LONGEST_NAME = 200

_WHERE = """
FROM embstore.centroid c
JOIN embstore.centroid_vector v USING (dataset_id, model_id, centroid_id)
JOIN embstore.dataset d USING (dataset_id)
WHERE c.model_id = :model_id AND (CAST(:dataset AS text) IS NULL OR d.name = :dataset)
"""
_COUNT = f"""
SELECT count(*), count(*) FILTER (WHERE c.status <> 'done' OR EXISTS (SELECT FROM embstore.speaker_change g
    WHERE g.dataset_id = c.dataset_id AND g.model_id = c.model_id AND g.speaker = c.speaker))
{_WHERE}
"""
_ROWS = f"""
SELECT d.name, c.speaker, vector_send(c.embedding), c.average, c.num_utterances, c.cohesion,
    (SELECT count(*) FROM embstore.item i JOIN embstore.extraction x USING (dataset_id, item_id)
     WHERE i.dataset_id = c.dataset_id AND i.speaker = c.speaker AND x.model_id = c.model_id
         AND x.status IN ('failed', 'skipped')),
    u.ids, u.paths
FROM (SELECT c.*, v.embedding, d.name AS dataset, d.root {_WHERE}) c
JOIN embstore.dataset d USING (dataset_id)
CROSS JOIN LATERAL (
    SELECT array_agg(i.item_id ORDER BY i.item_id) AS ids,
        array_agg(rtrim(c.root, '/') || '/' || i.path ORDER BY i.item_id) AS paths
    FROM embstore.item i JOIN embstore.extraction x USING (dataset_id, item_id)
    WHERE :with_utterances AND i.dataset_id = c.dataset_id AND i.speaker = c.speaker AND x.model_id = c.model_id
        AND x.status = 'done') u
ORDER BY d.name, c.centroid_id
"""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    speakers: int
    stale: int
    """Of these, computed before their utterances changed."""
    place: Path


@dataclass(frozen=True)
class Row:
    """One speaker's centroid, and what it was made of."""

    dataset: str
    speaker: str
    embedding: NDArray[np.float32]
    """float32 [dim]."""
    average: str
    num_utterances: int
    cohesion: float
    failed_utterances: int
    item_ids: list[int]
    paths: list[str]


def export_centroids(
    connection: Connection, folder: Path, form: Format, model: StoredModel, dataset: str | None, *, force: bool = False
) -> Exported:
    """Write all centroids of a model, or those of one dataset, below `folder`.

    Let the caller's transaction be REPEATABLE READ. Raises UsageError if there are none, if the folder holds something
    else and `force` is not given, or if it cannot be written to.
    """
    values = {"model_id": model.model_id, "dataset": dataset}
    count, stale = connection.execute(text(_COUNT), values).one()
    if not count:
        of = f" of dataset '{dataset}'" if dataset is not None else ""
        raise UsageError(f"there are no centroids{of} by model '{model.name}': type 'embstore centroids' first")
    write = {"pkl": _write_pickles, "npz": _write_npz, "parquet": _parquet_writer}[form]
    if form == "parquet":
        _pyarrow()
    try:
        _claim(folder, force)
        rows = _rows(connection, values | {"with_utterances": form != "npz"})
        place = write(folder, rows, count, model)
    except OSError as error:
        raise UsageError(f"cannot write to '{error.filename or folder}': {error.strerror}") from None
    return Exported(count, stale, place)


def speaker_file(dataset: str, speaker: str) -> Path:
    """Relative path of a speaker's pickle: a `/` in the name makes folders, and nothing leads out of the export."""
    *folders, name = (_component(part) for part in speaker.split("/"))
    # A folder of that name would be in the way of the file of another speaker.
    folders = [part[:-4] + "%2Epkl" if part.endswith(".pkl") else part for part in folders]
    return Path(_component(dataset), *folders, name + ".pkl")


def _component(part: str) -> str:
    """A name as a file name; what is escaped is so that no two names become one."""
    part = part.replace("%", "%25").replace("/", "%2F")
    if part.startswith("."):
        part = "%2E" + part[1:]
    if len(part.encode()) > _LONGEST_NAME:
        raise UsageError(f"the speaker name '{part[:40]}…' is too long for a file name: use --format npz or parquet")
    return part or "%"


def _claim(folder: Path, force: bool) -> None:
    """Make the folder an export's. Raises UsageError if it holds something else."""
    folder.mkdir(parents=True, exist_ok=True)
    if not force and not (folder / MARKER).exists() and any(folder.iterdir()):
        raise UsageError(f"'{folder}' holds other files: name a new folder, or add --force")
    with _whole(folder / MARKER) as file:
        file.write(json.dumps({"embstore": "centroids"}).encode() + b"\n")


def _rows(connection: Connection, values: dict[str, Any]) -> Iterator[Row]:
    result = connection.execution_options(stream_results=True, max_row_buffer=_PIECE).execute(text(_ROWS), values)
    for dataset, speaker, sent, average, number, cohesion, failed, ids, paths in result:
        vector = np.frombuffer(bytes(sent), dtype=">f4", offset=4).astype(np.float32)
        yield Row(dataset, speaker, vector, average, number, cohesion, failed, ids or [], paths or [])


def _write_pickles(folder: Path, rows: Iterator[Row], _count: int, _model: StoredModel) -> Path:
    for row in rows:
        path = folder / speaker_file(row.dataset, row.speaker)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _whole(path) as file:
            pickle.dump(_as_dict(row), file, protocol=4)
    return folder


def _as_dict(row: Row) -> dict[str, Any]:
    values = row.embedding.astype(np.float64)
    return {
        "embedding": row.embedding,
        "dataset": row.dataset,
        "speaker_id": row.speaker,
        "num_utterances": row.num_utterances,
        "failed_utterances": row.failed_utterances,
        "utterance_list": row.item_ids,
        "original_paths": row.paths,
        "embedding_dim": len(values),
        "embedding_stats": {
            "mean": float(values.mean()),
            "std": float(values.std()),
            "min": float(values.min()),
            "max": float(values.max()),
        },
    }


def _write_npz(folder: Path, rows: Iterator[Row], count: int, model: StoredModel) -> Path:
    """Vectors go straight into the archive; names and numbers are kept until the end."""
    path = folder / "centroids.npz"
    kept: list[tuple[str, str, int, int, float]] = []
    with _whole(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("embedding.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, model.dim)}
            np.lib.format.write_array_header_1_0(member, header)
            for row in rows:
                member.write(row.embedding.astype("<f4").tobytes())
                kept.append((row.dataset, row.speaker, row.num_utterances, row.failed_utterances, row.cohesion))
        datasets, speakers, numbers, failed, cohesions = zip(*kept, strict=True)
        _add(archive, "dataset", np.array(datasets))
        _add(archive, "speaker", np.array(speakers))
        _add(archive, "num_utterances", np.array(numbers, dtype=np.int64))
        _add(archive, "failed_utterances", np.array(failed, dtype=np.int64))
        _add(archive, "cohesion", np.array(cohesions, dtype=np.float32))
        _add(archive, "model", np.array(model.name))
    return path


def _add(archive: zipfile.ZipFile, name: str, values: NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, values, allow_pickle=False)


def _parquet_writer(folder: Path, rows: Iterator[Row], _count: int, model: StoredModel) -> Path:
    arrow, parquet = _pyarrow()
    schema = arrow.schema(
        [
            ("dataset", arrow.string()),
            ("model", arrow.string()),
            ("speaker", arrow.string()),
            ("embedding", arrow.list_(arrow.float32(), model.dim)),
            ("average", arrow.string()),
            ("num_utterances", arrow.int64()),
            ("failed_utterances", arrow.int64()),
            ("cohesion", arrow.float32()),
            ("utterance_list", arrow.list_(arrow.int64())),
            ("original_paths", arrow.list_(arrow.string())),
        ]
    )
    path = folder / "centroids.parquet"
    with _whole(path) as file, parquet.ParquetWriter(file, schema) as writer:
        for piece in _pieces(rows):
            writer.write_table(arrow.Table.from_pylist([_as_record(row, model.name) for row in piece], schema))
    return path


def _as_record(row: Row, model: str) -> dict[str, Any]:
    return {
        "dataset": row.dataset,
        "model": model,
        "speaker": row.speaker,
        "embedding": row.embedding,
        "average": row.average,
        "num_utterances": row.num_utterances,
        "failed_utterances": row.failed_utterances,
        "cohesion": row.cohesion,
        "utterance_list": row.item_ids,
        "original_paths": row.paths,
    }


def _pieces(rows: Iterator[Row]) -> Iterator[list[Row]]:
    piece: list[Row] = []
    for row in rows:
        piece.append(row)
        if len(piece) == _PIECE:
            yield piece
            piece = []
    if piece:
        yield piece


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("--format parquet needs pyarrow: type 'pip install pyarrow', or use --format npz") from None
    return pyarrow, pyarrow.parquet


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that has its name only when all of it is written."""
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
