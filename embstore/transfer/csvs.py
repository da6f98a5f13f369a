"""Tables as CSV files, with the facts beside them. A vector is a column, as PostgreSQL writes it: `[0.1,0.2]`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from embstore.errors import UsageError
from embstore.sources.listed import read_lines
from embstore.transfer.decimals import to_decimal, to_float32
from embstore.transfer.files import unreadable, whole
from embstore.transfer.reading import Spot, Tell, batch_rows, find_columns, read_facts, root_of
from embstore.transfer.table import Batch, Facts, Field, Table

_DTYPES = {"double": np.float64, "vector": np.float32}
_LONGEST_FIELD = 1 << 20
"""Characters: a vector of 16,000 dimensions has some 200,000."""


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
        return (f"[{to_decimal(row)}]" for row in values)
    if field.type == "double":
        return ("" if math.isnan(value) else repr(value) for value in values.tolist())
    if field.type == "real":
        return ("" if math.isnan(value) else f"{value:.9g}" for value in values.tolist())
    return iter(values if field.type == "text" else values.tolist())


class Reader:
    """A CSV file. Opening it reads its header and its first row. Raises UsageError where it lacks a column."""

    def __init__(self, path: Path) -> None:
        self._path = path
        csv.field_size_limit(_LONGEST_FIELD)
        self.facts = facts_beside(path)
        self.root = root_of(self.facts)
        self.rows = self.facts.rows if self.facts else None
        rows = self._rows()
        _, header = next(rows, (0, []))
        places: dict[str, int] = {}
        for place, name in enumerate(header):
            places.setdefault(name, place)
        self._columns = find_columns(places, f"'{path}' has no column")
        self._width = len(header)
        self.dim = (self.facts.dim if self.facts else None) or self._first_dim(rows)

    def _first_dim(self, rows: Iterator[tuple[int, list[str]]]) -> int:
        place = next(place for place, field in self._columns if field.type == "vector")
        line, first = next(rows, (0, []))
        try:
            return len(_numbers(first[place])) if len(first) > place else 0
        except ValueError as error:
            raise UsageError(f"{self.where(line)}: {error}") from None

    def where(self, row: int) -> str:
        """Name a row."""
        return f"'{self._path.name}' line {row}"

    def batches(self, tell: Tell) -> Iterator[Batch]:
        """The rows; those that cannot be read are left out and told of."""
        size = batch_rows(4 * self.dim + 200)
        rows = self._rows()
        next(rows)
        while piece := list(islice(rows, size)):
            batch = self._batch(piece, tell)
            if batch["row"]:
                yield batch

    def _batch(self, rows: list[tuple[int, list[str]]], tell: Tell) -> Batch:
        batch: Batch = {"row": [], **{field.name: [] for _, field in self._columns}}
        for line, words in rows:
            try:
                if len(words) != self._width:
                    raise ValueError(f"{len(words)} cells under a header of {self._width}")
                values = [self._value(words[place], field) for place, field in self._columns]
            except ValueError as error:
                tell(Spot(self.where(line), str(error)))
                continue
            batch["row"].append(line)
            for (_, field), value in zip(self._columns, values, strict=True):
                batch[field.name].append(value)
        for _, field in self._columns:
            if field.type != "text" and batch["row"]:
                batch[field.name] = np.array(batch[field.name], dtype=_DTYPES[field.type])
        return batch

    def _value(self, word: str, field: Field) -> Any:
        if field.type == "vector":
            numbers = _numbers(word)
            if len(numbers) != self.dim:
                raise ValueError(f"no vector of {self.dim} values")
            return to_float32(numbers)
        if field.type == "text":
            return word or None
        try:
            return float(word) if word else math.nan
        except ValueError:
            raise ValueError(f"{field.name} '{word[:40]}' is no number") from None

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Line and cells of each row that is not blank, the header first."""
        reader = csv.reader(read_lines(self._path), strict=True)
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except csv.Error as error:
            raise UsageError(f"'{self._path}' line {reader.line_num} is no CSV: {error}") from None


def _numbers(word: str) -> list[str]:
    inside = word.strip()
    if not (inside.startswith("[") and inside.endswith("]")):
        raise ValueError("the vector is not written as [0.1,0.2]")
    return inside[1:-1].split(",")


def facts_beside(path: Path) -> Facts | None:
    """What `embeddings.json` beside a file of that name says; None without one."""
    beside = path.with_suffix(".json")
    if path.stem not in ("embeddings", "centroids", "boundaries") or not beside.is_file():
        return None
    try:
        return read_facts(beside.read_bytes(), f"'{beside}'")
    except OSError as error:
        raise unreadable(error, beside) from None
