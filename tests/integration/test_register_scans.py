"""Any sequence of scans, against what `register` promises, written down in plain Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from helpers import ITEMS, ask, entry, fill, finish_all, scan

from embstore.db.engine import Database
from embstore.register import Registered, enqueue
from embstore.sources import Entry


@dataclass
class Known:
    """An item as plain Python knows it."""

    entry: Entry
    vanished: bool = False
    done: bool = False


class Plain:
    """What `register` promises, in plain Python: items by (path, start), in the order of their positions."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, float | None], Known] = {}

    def scan(self, entries: Sequence[Entry]) -> Registered:
        before, self.items = self.items, {}
        new = changed = 0
        for found in entries:
            known = before.pop((found.path, found.start), None)
            if known is None:
                new += 1
                known = Known(found)
            else:
                old, size_known = known.entry, found.size is not None
                # The first file that is seen is the one that the vectors, imported perhaps, were made of.
                is_first = old.size is None
                file_changed = size_known and not is_first and (found.size, found.mtime_ns) != (old.size, old.mtime_ns)
                if file_changed or found.duration != old.duration:
                    changed += 1
                    known.done = False
                known.vanished = False
                known.entry = found if size_known else replace(found, size=old.size, mtime_ns=old.mtime_ns)
            self.items[found.path, found.start] = known
        vanished = sum(not known.vanished for known in before.values())
        for key, known in before.items():
            known.vanished = True
            self.items[key] = known
        return Registered(len(entries), new, changed, vanished, len(before) - vanished)

    def rows(self) -> list[tuple[Any, ...]]:
        return [
            (e.path, e.start, position, e.speaker, e.duration, e.size, e.mtime_ns, known.vanished,
             "done" if known.done else "pending", known.done)
            for position, known in enumerate(self.items.values())
            for e in [known.entry]
        ]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_scans_does_what_plain_python_does(database: Database, seed: int) -> None:
    dice, plain = random.Random(seed), Plain()
    keys = [(f"{name}.wav", start) for name in "abcdef" for start in (None, 0.0, 1.5)]
    with database.begin() as connection:
        queue = fill(connection, 0)
    for _ in range(25):
        entries = [
            entry(path, dice.choice(["ann", "bob", None]), start=start, duration=dice.choice([None, 1.0, 1.0, 1.0]))
            for path, start in dice.sample(keys, dice.randint(0, len(keys)))
        ]
        for found in entries:
            found.size, found.mtime_ns = dice.choice([(1, 1)] * 4 + [(2, 1), (1, 2)] + [(None, None)])
        assert scan(database, entries) == plain.scan(entries)
        with database.begin() as connection:
            enqueue(connection, queue.scope["dataset_id"], queue.scope["model_id"])
        assert ask(database, ITEMS) == plain.rows()
        if dice.random() < 0.6:
            finish_all(database, queue)
            for known in plain.items.values():
                known.done = True
