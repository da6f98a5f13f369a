"""Tables as CSV files, with the facts beside them. A vector is a column, as PostgreSQL writes it: `[0.1,0.2]`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.transfer.files import whole
from embstore.transfer.table import Field, Table


def write(folder: Path, table: Table) -> Path:
    """Write `KIND.csv`, and `KIND.json` with the facts, into the folder; returns the path of the first."""
    path = folder / f"{table.facts.kind}.csv"
    fields = [field for field in table.fields if field.type not in ("ints", "texts")]
    with whole(path.with_suffix(".json")) as facts, whole(path) as file:
        facts.write(table.facts.to_json().encode() + b"\n")
        file.write(_lines([[field.name for field in fields]]))
        for batch in table.batches:
            columns = [_to_words(batch[field.name], field) for field in fields]
            file.write(_lines(zip(*columns, strict=True)))
    return path


def _lines(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _to_words(values: Any, field: Field) -> Iterator[Any]:
    if field.type == "vector":
        return (f"[{_to_decimal(row)}]" for row in values)
    if field.type == "double":
        return ("" if math.isnan(value) else repr(value) for value in values.tolist())
    if field.type == "real":
        return ("" if math.isnan(value) else f"{value:.9g}" for value in values.tolist())
    return iter(values if field.type == "text" else values.tolist())


def _to_decimal(vector: NDArray[np.float32]) -> str:
    """Numbers with commas between; nine digits tell each float32 from every other."""
    return ",".join(["%.9g"] * len(vector)) % tuple(vector.tolist())
