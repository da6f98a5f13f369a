"""What is carried: facts about it, and batches of columns of one length."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, get_args

from embstore.errors import UsageError

Kind = Literal["embeddings", "centroids", "boundaries"]
Format = Literal["pkl", "npz", "parquet", "kaldi", "csv"]
FORMATS: tuple[Format, ...] = get_args(Format)

FieldType = Literal["text", "int", "double", "real", "vector", "ints", "texts"]

Batch = dict[str, Any]
"""Columns by name: `text` is a list of str or None; `int`, `double` and `real` are int64, float64 and float32 arrays,
in which NaN is null; `vector` is float32 [n, dim]; `ints` and `texts` are lists of lists, which only Parquet and
pickles hold. A batch that was read has a column `row` too, by which its reader can name a row."""


class Field(NamedTuple):
    """A column: its name, its type, and other names that it goes by in files of other programs."""

    name: str
    type: FieldType
    aliases: tuple[str, ...] = ()
    required: bool = False
    """When a file is read."""
    read: bool = True
    """False: only for people; the facts say it, or it holds for one database alone."""


_PATH = ("paths", "audio_filepath", "audio_path", "audio", "wav", "file", "filename", "original_path", "utterance_id")
_SPEAKER = ("speakers", "speaker_id", "spk")
_EMBEDDING = ("embeddings", "emb", "embs", "vector", "vectors")

FIELDS: Mapping[Kind, tuple[Field, ...]] = {
    "embeddings": (
        Field("position", "int"),
        Field("path", "text", _PATH, required=True),
        Field("start", "double", ("offset",)),
        Field("duration", "double", ("duration_s", "dur")),
        Field("speaker", "text", _SPEAKER),
        Field("embedding", "vector", _EMBEDDING, required=True),
    ),
    "centroids": (
        Field("dataset", "text"),
        Field("model", "text", read=False),
        Field("speaker", "text", _SPEAKER, required=True),
        Field("embedding", "vector", ("centroid", "centroids", *_EMBEDDING), required=True),
        Field("average", "text"),
        Field("num_utterances", "int"),
        Field("failed_utterances", "int"),
        Field("cohesion", "real"),
        Field("utterance_list", "ints", read=False),
        Field("original_paths", "texts", read=False),
    ),
    "boundaries": (
        Field("position", "int"),
        Field("path", "text", required=True),
        Field("start", "double"),
        Field("score", "real", required=True),
        Field("confidence", "real", required=True),
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


_TYPES: Mapping[str, type] = {
    "dataset": str,
    "root": str,
    "media": str,
    "model": str,
    "fingerprint": str,
    "dim": int,
    "settings": dict,
    "rows": int,
    "average": str,
    "run": dict,
}


def read_facts(text: str | bytes, kind: Kind, where: str) -> Facts:
    """The facts that a file carries. Raises UsageError where they are broken, or of another kind of table."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f"what {where} says of itself is no JSON: it is damaged") from None
    if not isinstance(found, dict) or found.get("embstore") not in get_args(Kind):
        raise UsageError(f"{where} was not written by 'embstore export'")
    if found["embstore"] != kind:
        raise UsageError(f"{where} holds {found['embstore']}, not {kind}: type 'embstore import {found['embstore']}'")
    if found.get("version") != 1:
        raise UsageError(f"{where} was written by a newer embstore: type 'pip install --upgrade embstore'")
    values = {name: found[name] for name in _TYPES if found.get(name) is not None}
    for name, value in values.items():
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            raise UsageError(f"what {where} says of itself is damaged: '{name}' is no {_TYPES[name].__name__}")
    return Facts(kind, **values)


def wanted(kind: Kind) -> list[Field]:
    """The columns that are looked for in a file."""
    return [field for field in FIELDS[kind] if field.read]


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


class Spot(NamedTuple):
    """A row that cannot be carried, and why."""

    where: str
    """The file, and the row in it, counted from 1."""
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Reader(Protocol):
    """A table on its way in: a file or files that have been opened."""

    facts: Facts | None
    """None: the file says nothing of itself, as those of other programs."""
    dim: int
    """Length of its vectors; 0 for none."""

    def where(self, row: Any) -> str:
        """Name a row, by what stands for it in the column `row` of a batch."""

    def batches(self, spot: Callable[[Spot], None]) -> Iterator[Batch]:
        """The rows, in the same order and batches each time. `spot` is told of those that cannot be carried.

        Raises UsageError where a file is damaged as a whole.
        """
