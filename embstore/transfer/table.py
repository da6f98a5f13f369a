"""What is carried: facts about it, and batches of columns of one length."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, get_args

Kind = Literal["embeddings", "centroids", "boundaries"]
Format = Literal["pkl", "npz", "parquet", "kaldi", "csv"]
FORMATS: tuple[Format, ...] = get_args(Format)

FieldType = Literal["text", "int", "double", "real", "vector", "ints", "texts"]

Batch = dict[str, Any]
"""Columns by name: `text` is a list of str or None; `int`, `double` and `real` are int64, float64 and float32 arrays,
in which NaN is null; `vector` is float32 [n, dim]; `ints` and `texts` are lists of lists, which only Parquet and
pickles hold."""


class Field(NamedTuple):
    """A column: its name and its type."""

    name: str
    type: FieldType


FIELDS: Mapping[Kind, tuple[Field, ...]] = {
    "embeddings": (
        Field("position", "int"),
        Field("path", "text"),
        Field("start", "double"),
        Field("duration", "double"),
        Field("speaker", "text"),
        Field("embedding", "vector"),
    ),
    "centroids": (
        Field("dataset", "text"),
        Field("model", "text"),
        Field("speaker", "text"),
        Field("embedding", "vector"),
        Field("average", "text"),
        Field("num_utterances", "int"),
        Field("failed_utterances", "int"),
        Field("cohesion", "real"),
        Field("utterance_list", "ints"),
        Field("original_paths", "texts"),
    ),
    "boundaries": (
        Field("position", "int"),
        Field("path", "text"),
        Field("start", "double"),
        Field("score", "real"),
        Field("confidence", "real"),
        Field("segment", "int"),
        Field("voice", "int"),
    ),
}


@dataclass(frozen=True)
class Facts:
    """What is known of a table as a whole; every file carries it, in itself or beside it."""

    kind: Kind
    dataset: str | None = None
    """None: several, as the column says."""
    root: str | None = None
    media: str | None = None
    model: str | None = None
    fingerprint: str | None = None
    dim: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the model, for people to read."""
    rows: int | None = None
    average: str | None = None
    """Of the centroids, if it is one for all."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """Of a boundary run: method, parameters, found, items, embedded."""

    def to_json(self) -> str:
        """As JSON; its first key says what it is."""
        values = {name: value for name, value in asdict(self).items() if value not in (None, {})}
        return json.dumps({"embstore": values.pop("kind"), "version": 1, **values}, ensure_ascii=False)


@dataclass(frozen=True)
class Table:
    """A table on its way out."""

    facts: Facts
    rows: int
    batches: Iterator[Batch]
    """Read once."""
    segmented: bool = False
    """Whether there are items that are stretches of files."""
    contested: frozenset[str] = frozenset()
    """Names of files that more than one item would have."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """How many items the dataset has, and what became of them."""

    @property
    def fields(self) -> tuple[Field, ...]:
        """Its columns."""
        return FIELDS[self.facts.kind]

    @property
    def dim(self) -> int:
        """Length of its vectors; 0 for none."""
        return self.facts.dim or 0
