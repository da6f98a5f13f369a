"""What must hold after any run, however it ended."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from commands import Command, Watcher, wait_until
from numpy.typing import NDArray

ITEMS = 240
"""Sounds in the fixture `tones`."""
SHORT_LEASE = {"EMBSTORE_TEST_LEASE_SECONDS": 3.0}
"""For runs that leave rows behind, to be taken over when their leases have run out.

All others have leases that last longer than any test: a machine that stalls takes nobody's rows away.
"""

Vectors = dict[str, NDArray[np.float32]]

_UNDONE_VECTORS = """
SELECT count(*) FROM embstore.embedding e LEFT JOIN embstore.extraction x USING (dataset_id, model_id, item_id)
WHERE x.status IS DISTINCT FROM 'done'
"""
_MISSING_VECTORS = """
SELECT count(*) FROM embstore.extraction x LEFT JOIN embstore.embedding e USING (dataset_id, model_id, item_id)
WHERE x.status = 'done' AND e.item_id IS NULL
"""
_LIVE_LEASES = "SELECT worker FROM embstore.lease WHERE expires_at > clock_timestamp()"
_DUPLICATES = """
SELECT count(*) FROM (
    SELECT FROM embstore.embedding JOIN embstore.item USING (dataset_id, item_id)
    GROUP BY dataset_id, model_id, path, start HAVING count(*) > 1) twice
"""


def audit(
    database: Watcher, runs: Iterable[Command] = (), *, expected: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Check a database that no run works on any more; returns the number of extractions by status.

    `expected` are the vectors of an undisturbed run: what is done must equal them to 1e-5. Processes of a run may need
    a moment to notice that their parent was killed. A lease whose owner was killed before it could tell its number
    lives on until it runs out, without rows: see `Watcher.let_leases_run_out`, and SHORT_LEASE.
    """
    for run in runs:
        wait_until(lambda run=run: not run.members(), "its processes to end")  # type: ignore[misc]
    statuses = database.statuses()
    assert statuses.get("running", 0) == 0, statuses
    ((registered,),) = database.rows("SELECT count(*) FROM embstore.item CROSS JOIN embstore.model")
    assert sum(statuses.values()) == registered
    assert database.rows(_UNDONE_VECTORS) == [(0,)], "a vector without done"
    assert database.rows(_MISSING_VECTORS) == [(0,)], "done without a vector"
    assert database.rows(_DUPLICATES) == [(0,)]
    wait_until(lambda: database.rows(_LIVE_LEASES) == [], "leases to end")
    if expected is not None:
        compare(read_vectors(database), expected)
    return statuses


def read_vectors(database: Watcher) -> Vectors:
    """Every vector by its path."""
    rows = database.rows(
        "SELECT i.path, e.embedding::text FROM embstore.embedding e JOIN embstore.item i USING (dataset_id, item_id)"
    )
    return {path: np.array(json.loads(vector), dtype=np.float32) for path, vector in rows}


def compare(found: Vectors, expected: Mapping[str, Any]) -> None:
    """Fail unless what was found is part of what was expected, and equal to it."""
    assert set(found) <= set(expected)
    worst = max((float(np.abs(vector - expected[path]).max()) for path, vector in found.items()), default=0.0)
    assert worst <= 1e-5
