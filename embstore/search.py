"""Nearest neighbours: of a file, an item, a speaker or a vector, among utterances or among speakers.

How rows are found, and when that is exact, is decided on the server, in the functions `embstore.nearest` and
`embstore.nearest_centroids` (migration 0007), so that it is the same from SQL, from Python and from a shell.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from embstore import catalog, lookup
from embstore.catalog import StoredModel
from embstore.db.cancel import cancellable
from embstore.db.engine import Database, set_local, sqlstate
from embstore.errors import DatabaseError, UsageError
from embstore.lookup import Asked, Embedder, Kind

Of = Literal["utterances", "speakers"]
OF: tuple[Of, ...] = get_args(Of)
Method = Literal["prefilter", "scan", "index"]

TIMEOUT = 60.0
"""Seconds that the server may take, if nobody says otherwise: a condition can be made to run for ever."""

_UTTERANCES = """
SELECT dataset, item_id, position, path, start, speaker, cosine, is_exact
FROM embstore.nearest(CAST(:query AS vector), :model, :k, CAST(:dataset AS text), CAST(:speaker AS text),
    CAST(:condition AS text), :exact)
"""
_SPEAKERS = """
SELECT dataset, speaker, num_utterances, cosine
FROM embstore.nearest_centroids(CAST(:query AS vector), :model, :k, CAST(:dataset AS text), CAST(:condition AS text))
"""
_HOW = "SELECT current_setting('embstore.search', true)"

_WRONG_CONDITION = "22023"
_CANCELED = "57014"
_OF_THE_CONDITION = ("0A", "21", "22", "25", "2F", "42", "P0")
"""Classes of errors that a condition makes when it runs: a division by zero, no such right, an attempt to write."""


@dataclass(frozen=True)
class Hit:
    """One of the nearest; of a speaker, what is an utterance's is None, and the other way round."""

    similarity: float
    """Cosine, -1 to 1."""
    dataset: str
    speaker: str | None
    item_id: int | None = None
    position: int | None = None
    path: str | None = None
    start: float | None = None
    num_utterances: int | None = None


@dataclass(frozen=True)
class Results(Sequence[Hit]):
    """The nearest first, and how they were found."""

    hits: tuple[Hit, ...]
    of: Of
    model: str
    asked: Asked
    """What was searched for, with its vector."""
    exact: bool
    """Whether no nearer one can have been missed."""
    method: Method
    """`index`: by the vector index; `prefilter`: what a filter leaves, one by one; `scan`: all vectors, one by one."""
    reason: str
    """Why so, for people."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the decision was made from: `vectors` (the server's estimate), `bound`, `items`, `index`."""
    seconds: float = 0.0
    """On the server and the way there; embedding a file is not part of it."""

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Hit]: ...
    def __getitem__(self, index: int | slice) -> Hit | Sequence[Hit]:
        return self.hits[index]

    def __len__(self) -> int:
        return len(self.hits)


def search(
    database: Database,
    query: str | Path | Sequence[float] | NDArray[Any],
    *,
    model: str | None = None,
    prefer_model: str | None = None,
    k: int = 10,
    of: Of = "utterances",
    dataset: str | None = None,
    speaker: str | None = None,
    where: str | None = None,
    exact: bool = False,
    kind: Kind | None = None,
    query_dataset: str | None = None,
    embedder: Embedder | None = None,
    timeout: float = TIMEOUT,
) -> Results:
    """The `k` nearest to `query` by cosine similarity: never fewer than there are, an item itself left out.

    database        open and migrated; its transactions here are read-only, and none is open while a model runs
    query           an array [dim], or the name of a file, an item (path or id), a speaker or a `.npy`; a Path is a file
    model           whose vectors; None: the only model that there is, or of several `prefer_model`
    of              `utterances`, or `speakers` for their centroids (always exact; `embstore centroids` makes them)
    dataset, speaker, where
                    only among these; `where` is one SQL expression on the columns of the view `items` (of `speakers`:
                    of `speaker_centroids`), evaluated with the rights of whoever is connected, in a read-only
                    transaction. It is SQL: not for text from strangers.
    exact           compare all vectors, even where there is an index
    kind            what the name means, where it could be several: `file`, `item`, `speaker`, `vector`
    query_dataset   where to look an item or a speaker up; not a filter
    embedder        embeds files; one that is kept from search to search keeps the model loaded
    timeout         seconds for the server; 0: as long as it takes

    Raises UsageError for what is wrong with the query or a filter, ModelError, DatabaseError.
    """
    _check(k, of, speaker, timeout)
    stored, asked = _asked(database, query, (model, prefer_model), kind, query_dataset, dataset)
    vector = asked.vector
    if vector is None:
        vector = (embedder or Embedder()).embed(database, stored, Path(asked.name))
    asked = replace(asked, vector=lookup.checked(vector, stored.dim, f"'{asked.name}'"))
    with _reading(database, timeout) as connection:
        if dataset is not None:
            catalog.get_dataset(connection, dataset)
        filters = {"dataset": dataset, "speaker": speaker, "condition": where, "exact": exact}
        try:
            return cancellable(connection, lambda: _nearest(connection, asked, stored, of, k, filters))
        except DBAPIError as error:
            raise _explained(error, where, timeout) from error


def _check(k: int, of: Of, speaker: str | None, timeout: float) -> None:
    if k < 1:
        raise UsageError(f"{k} neighbours cannot be searched for: k is 1 or more")
    if of not in OF:
        raise UsageError(f"nothing is searched for among '{of}': there are {' and '.join(OF)}")
    if of == "speakers" and speaker is not None:
        raise UsageError("a search among speakers cannot be limited to one: leave --speaker out")
    if timeout < 0:
        raise UsageError(f"{timeout:g} seconds are no time to wait: give 0 or more")


def _asked(
    database: Database,
    query: str | Path | Sequence[float] | NDArray[Any],
    model: tuple[str | None, str | None],
    kind: Kind | None,
    query_dataset: str | None,
    dataset: str | None,
) -> tuple[StoredModel, Asked]:
    """The model of that name, or of several the preferred one; and what is searched for."""
    name, prefer = model
    with database.reading() as connection:
        stored = catalog.one_model(connection, None, name, prefer=prefer)
        if isinstance(query, str | Path):
            kind = kind or ("file" if isinstance(query, Path) and query.suffix != ".npy" else None)
            return stored, lookup.find(connection, str(query), stored, kind, query_dataset, prefer=dataset)
    return stored, Asked("vector", "vector", np.asarray(query))


@contextmanager
def _reading(database: Database, timeout: float) -> Iterator[Connection]:
    with database.reading() as connection:
        if timeout:
            set_local(connection, "statement_timeout", f"{max(1, round(1000 * timeout))}ms")
        yield connection


def _nearest(
    connection: Connection, asked: Asked, model: StoredModel, of: Of, k: int, filters: dict[str, Any]
) -> Results:
    """Ask for one more where one of them may be what was asked about, and leave that out."""
    assert asked.vector is not None
    itself = asked.item_id is not None if of == "utterances" else asked.kind == "speaker"
    query = "[" + ",".join(map(repr, asked.vector.tolist())) + "]"
    begin = time.perf_counter()
    statement = text(_UTTERANCES if of == "utterances" else _SPEAKERS)
    rows = connection.execute(statement, {"query": query, "model": model.name, "k": k + itself, **filters}).all()
    if of == "utterances":
        hits = [Hit(r.cosine, r.dataset, r.speaker, r.item_id, r.position, r.path, r.start) for r in rows]
        hits = [hit for hit in hits if asked.item_id is None or hit.item_id != asked.item_id]
        facts = json.loads(connection.execute(text(_HOW)).scalar_one())
    else:
        hits = [Hit(r.cosine, r.dataset, r.speaker, num_utterances=r.num_utterances) for r in rows]
        hits = [hit for hit in hits if not itself or (hit.dataset, hit.speaker) != (asked.dataset, asked.name)]
        facts = {"method": "scan", "reason": "the centroids of speakers are few, and have no index"}
    method, reason = facts.pop("method"), facts.pop("reason")
    seconds = time.perf_counter() - begin
    return Results(tuple(hits[:k]), of, model.name, asked, method != "index", method, reason, facts, seconds)


def _explained(error: DBAPIError, where: str | None, timeout: float) -> Exception:
    """What the server says of a condition, or of the time it took, for the person who typed it; the rest as it is."""
    code = sqlstate(error)
    diagnosis = getattr(error.orig, "diag", None)
    words = " ".join((getattr(diagnosis, "message_primary", None) or str(error.orig)).split())
    hint = getattr(diagnosis, "message_hint", None)
    if code == _CANCELED and "statement timeout" in words:
        return DatabaseError(f"the search took longer than {timeout:g} s: add --timeout SECONDS, or narrow it down")
    if where is not None and code == _WRONG_CONDITION:
        return UsageError(f"--where: {words}" + (f" ({hint})" if hint else ""))
    if where is not None and code[:2] in _OF_THE_CONDITION:
        return UsageError(f"--where: {words}")
    return error
