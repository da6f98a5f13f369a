"""How often a search by the index gives what an exact one gives, and how fast it is: measured on what is stored."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text

from embstore.catalog import Dataset, StoredModel
from embstore.db.engine import Database

SECONDS = 20.0
"""How long one line of the result may take: of a large set, fewer queries are made."""
_LEAST = 5
_SAME = 1e-6
"""Cosines that are nearer to each other than this are one: which of two equals is tenth does not matter."""

# A row of each filter in a thousand, whatever order the items have.
_SHARES = (500, 100, 10, 1)
_FILTER = "abs(hashint8(item_id) % 1000) < {share}"

_SAMPLE = """
SELECT item_id, embedding::text AS vector FROM embstore.embedding_{model_id} TABLESAMPLE BERNOULLI ({percent})
ORDER BY random() LIMIT {queries}
"""
_NEAREST = """
SELECT item_id, cosine FROM embstore.nearest(CAST(:vector AS vector), :model, :k, CAST(:dataset AS text),
    condition => CAST(:condition AS text), exact => :exact)
"""
_METHOD = "SELECT CAST(current_setting('embstore.search') AS json) ->> 'method'"


@dataclass(frozen=True)
class Checked:
    """Searches within one dataset or by one filter."""

    scope: str
    queries: int
    recall: float
    """Mean share of the right k neighbours that were found."""
    lowest: float
    """That of the worst query."""
    rate: float
    """Queries a second, one after another, as `embstore.nearest` answers them."""
    exact_rate: float
    method: str
    """How most of them were answered: `index`, `prefilter`, `scan`."""


def check(
    database: Database, model: StoredModel, datasets: Sequence[Dataset], *, queries: int = 50, k: int = 10
) -> Iterator[Checked]:
    """Search for stored vectors with and without the index: among all, in each dataset, and by filters of 50 to 0.1%.

    A vector itself is not counted among its neighbours.
    """
    scopes: list[tuple[str, dict[str, Any]]] = [("all", {})]
    if len(datasets) > 1:
        scopes += [(f"dataset '{dataset.name}'", {"dataset": dataset.name}) for dataset in datasets]
    scopes += [(f"{share / 10:g}% of all", {"condition": _FILTER.format(share=share)}) for share in _SHARES]
    with database.reading() as connection:
        sample = _sample(connection, model, queries)
        for scope, values in scopes if sample else ():
            yield _checked(connection, scope, {"model": model.name, "k": k + 1, **_NO_FILTER, **values}, sample)


_NO_FILTER = {"dataset": None, "condition": None}


def _sample(connection: Connection, model: StoredModel, queries: int) -> Sequence[Row[Any]]:
    rows = connection.exec_driver_sql(f"SELECT count(*) FROM embstore.embedding_{model.model_id}").scalar_one()
    percent = min(100.0, 100 * 5 * (queries + 10) / max(rows, 1))
    return connection.execute(text(_SAMPLE.format(model_id=model.model_id, percent=percent, queries=queries))).all()


def _checked(connection: Connection, scope: str, values: dict[str, Any], sample: Sequence[Row[Any]]) -> Checked:
    recalls: list[float] = []
    methods: Counter[str] = Counter()
    taken = {False: 0.0, True: 0.0}
    found: dict[bool, Sequence[Row[Any]]] = {}
    for row in sample:
        for exact in (True, False):
            begin = time.perf_counter()
            asked = values | {"vector": row.vector, "exact": exact}
            found[exact] = connection.execute(text(_NEAREST), asked).all()
            taken[exact] += time.perf_counter() - begin
        methods[connection.exec_driver_sql(_METHOD).scalar_one()] += 1
        right, got = ([r.cosine for r in found[exact] if r.item_id != row.item_id] for exact in (True, False))
        right, got = right[: values["k"] - 1], got[: values["k"] - 1]
        if right:
            recalls.append(sum(cosine >= right[-1] - _SAME for cosine in got) / len(right))
        if sum(taken.values()) > SECONDS and len(recalls) >= _LEAST:
            break
    number = methods.total()
    return Checked(
        scope,
        number,
        sum(recalls) / len(recalls) if recalls else 1.0,
        min(recalls, default=1.0),
        number / taken[False],
        number / taken[True],
        methods.most_common(1)[0][0],
    )
