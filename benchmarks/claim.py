"""Claim time at the last 1% of a queue against the first 1%, with an old snapshot held open all the while.

An old snapshot (a backup, a forgotten reader) keeps the index entries of every row that was claimed before alive. Two
datasets of --items each lie in one table; the first is worked off but for its last 1%, by claims and finishes of 1024.
Then claims of 256 are timed in turns:

first 1%    of the dataset that nobody has worked on
last 1%     of the one that is almost done, by the worker that came all the way: it goes on after its last key
newcomer    the same as last 1%, by a worker that has just begun and so searches from the first key; only its first
            claim is like this. Shown, and no part of the ratio

A time is that of the claim's statement, without the commit, whose fsync would hide a difference.
"""

from __future__ import annotations

from common import arguments, in_turns, ratio, seconds, server, show, show_ratio
from sqlalchemy import Connection, create_engine, text

from embstore.db.engine import Database
from embstore.queue import Queue, take_lease

BATCH = 256
WALK = 1024

_PENDING = """
INSERT INTO embstore.extraction (dataset_id, model_id, item_id) SELECT :dataset_id, 1, generate_series(1, :items)
"""


class _Worker:
    """Claims from one dataset, always after its last key."""

    def __init__(self, database: Database, dataset_id: int) -> None:
        self._database = database
        self._queue = Queue("embstore.extraction", "item_id", {"dataset_id": dataset_id, "model_id": 1})
        self.after = 0
        with database.begin() as connection:
            self._token = take_lease(connection)

    def work_off(self, last: int) -> None:
        """Claim and finish up to the key `last`."""
        while self.after < last:
            with self._database.begin() as connection:
                keys = self._queue.claim(connection, self._token, min(WALK, last - self.after), self.after)
            self.after = keys[-1]
            with self._database.begin() as connection:
                self._queue.finish(connection, self._token, keys)

    def claim(self) -> float:
        """Claim a batch; returns the seconds."""
        with self._database.begin() as connection:
            keys: list[int] = []
            taken = seconds(lambda: keys.extend(self._claimed(connection)))
        self.after = keys[-1]
        return taken

    def claim_as_newcomer(self) -> float:
        """Claim a batch from the first key on, and undo it; returns the seconds."""
        self.after, after = 0, self.after
        with self._database.begin() as connection:
            taken = seconds(lambda: self._claimed(connection))
            connection.rollback()
        self.after = after
        return taken

    def _claimed(self, connection: Connection) -> list[int]:
        return self._queue.claim(connection, self._token, BATCH, self.after)


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, items=1_000_000, rounds=30).parse_args()
    # 1% of the items is the span in which claims are timed; a tiny trial run needs room for at least its rounds.
    span = max(options.items // 100, BATCH * options.rounds)
    with server() as settings:
        database = Database(settings)
        with database.begin() as connection:
            for dataset_id in (1, 2):
                connection.execute(text(_PENDING), {"dataset_id": dataset_id, "items": max(options.items, 2 * span)})
        with database.begin() as connection:
            connection.execute(text("ANALYZE embstore.extraction"))
        old = create_engine(database.url, isolation_level="REPEATABLE READ").connect()
        old.execute(text("SELECT count(*) FROM embstore.extraction"))
        almost_done, begun = _Worker(database, 1), _Worker(database, 2)
        almost_done.work_off(max(options.items, 2 * span) - span)
        claims = {"first 1%": begun.claim, "last 1%": almost_done.claim, "newcomer": almost_done.claim_as_newcomer}
        times = in_turns(options.rounds, claims)
        old.close()
        database.close()
    print(f"{options.items:,} items, claims of {BATCH}, {options.rounds} of each in turns")
    show(times, BATCH)
    show_ratio("claim time at the last 1% / at the first 1%", ratio(times, "last 1%", "first 1%"), "2 or less")


if __name__ == "__main__":
    main()
