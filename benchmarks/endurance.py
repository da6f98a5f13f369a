"""An hour of small batches, as a store has it that is fed all the time: do bloat, memory and claim time stay flat?

A round takes one of 20 datasets in turn: it is scanned, with two new files and thirty changed ones, whose vectors go;
what was refused the last time is queued again; all that is pending is claimed, 32 at a time, the 256-d vectors are
written, and one item in fifty is refused. Every minute `embstore centroids` averages the speakers that changed. From a
quarter of the time to two fifths of it a snapshot is held open, as by a forgotten reader, and at the half of it
`embstore db backup` runs. All by one session that is never closed. It sleeps between rounds, for all but --share of the
time.

Every minute: living and dead rows and bytes of each table with its indexes and of the system's catalogue, how often
autovacuum came by, private memory of the processes, and the time of a claim's statement. It is compared with that of
the same claim from a queue of 1,000 items in another database, which is rewritten every minute, taken in turns with it:
what else the machine does falls on both alike. --figures keeps all of them as CSV, --picture draws them.

At the end each is compared, the median of the last tenth of the minutes with that of the tenth before the snapshot;
sizes by the living row, as the store grows. A snapshot makes tables grow: how much is printed too.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from common import command, postmaster, seconds, server
from sqlalchemy import Connection, create_engine, text

from embstore import catalog, vectors
from embstore.db import migrate
from embstore.db.engine import Database
from embstore.queue import Queue, Refusal, renew_lease, take_lease
from embstore.register import enqueue, register
from embstore.settings import Settings, load
from embstore.sources import Entry

DATASETS, DIM, A_SPEAKER, BATCH, YOUNG = 20, 256, 50, 32, 1_000
NEW, CHANGED, REFUSED = 2, 30, 0.02
SNAPSHOT, BACKUP = (0.25, 0.4), 0.5
LEASE_SECONDS = 86_400.0
TABLES = ("item", "extraction", "embedding_1", "speaker_change", "centroid", "centroid_vector", "lease", "run")

_MODEL = """
INSERT INTO embstore.model (name, media, dim, fingerprint, settings) VALUES ('bench', 'audio', :dim, '', '{}')
RETURNING model_id
"""
_TABLES = """
SELECT relname, pg_total_relation_size(relid), n_dead_tup, autovacuum_count FROM pg_stat_user_tables
WHERE schemaname = 'embstore' AND relname = ANY (:tables)
UNION ALL
SELECT 'catalogue', sum(pg_total_relation_size(relid)), sum(n_dead_tup), sum(autovacuum_count) FROM pg_stat_sys_tables
WHERE schemaname = 'pg_catalog'
"""

Sample = dict[str, float]


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=60, help="how many (default: 60)")
    parser.add_argument("--minute", type=float, default=60.0, help="seconds that one of them has, for a trial run")
    parser.add_argument("--items", type=int, default=1_000, help="items that a dataset begins with (default: 1,000)")
    parser.add_argument("--share", type=float, default=1.0, help="of the time that is not slept (default: 1)")
    parser.add_argument("--figures", type=Path, help="CSV to write every minute's figures to")
    parser.add_argument("--picture", type=Path, help="PNG to draw them to")
    options = parser.parse_args()
    with server() as settings:
        database = Database(settings)
        feed = _Feed(database, options.items, _Young(database))
        feed.round_all()
        samples = list(_minutes(settings, feed, options))
        feed.database.close()
        feed.young.close()
    if options.figures:
        with options.figures.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(samples[0]))
            writer.writeheader()
            writer.writerows(samples)
    _compare(samples)
    if options.picture:
        _draw(samples, options.picture)


def _minutes(settings: Settings, feed: _Feed, options: argparse.Namespace) -> Iterator[Sample]:
    """What is seen at the end of every minute of rounds."""
    holder = create_engine(feed.database.url, isolation_level="REPEATABLE READ").connect()
    opens, closes, backup = (round(options.minutes * share) for share in (*SNAPSHOT, BACKUP))
    for minute in range(options.minutes):
        end = time.monotonic() + options.minute
        if minute == opens:
            holder.execute(text("SELECT count(*) FROM embstore.extraction"))
        if minute == closes:
            holder.close()
        if minute == backup:
            command(settings, "db", "backup", str(settings.home.parent / "backup"))
        feed.claims.clear()
        feed.young.renew()
        done = 0
        while done == 0 or time.monotonic() < end:
            time.sleep(seconds(feed.round) * (1 / options.share - 1))
            done += 1
        centroids = seconds(partial(command, settings, "centroids"))
        sample = {"minute": minute, "snapshot": int(opens <= minute < closes), "rounds": done, "centroids_s": centroids}
        sample |= {"claim_ms": 1000 * median(feed.claims), "young_ms": 1000 * median(feed.young.claims)}
        sample["load"] = os.getloadavg()[0]
        sample |= _memory(settings) | feed.look()
        print(_line(sample), flush=True)
        yield sample


class _Young:
    """A queue that is never old, to compare with."""

    def __init__(self, beside: Database) -> None:
        with beside.autocommit() as connection:
            connection.execute(text("CREATE DATABASE young"))
            address = connection.engine.url.set(database="young").render_as_string(hide_password=False)
        self._database = Database(load(database_url=address))
        migrate.upgrade(self._database)
        with self._database.begin() as connection:
            model_id = int(connection.execute(text(_MODEL), {"dim": DIM}).scalar_one())
            dataset_id = catalog.ensure_dataset(connection, "young", "audio", "/young").dataset_id
            register(connection, dataset_id, _entries(dict.fromkeys(range(YOUNG), 0)))
            enqueue(connection, dataset_id, model_id)
            self._token = take_lease(connection, LEASE_SECONDS)
        self._queue = Queue("embstore.extraction", "item_id", {"dataset_id": dataset_id, "model_id": model_id})
        self.claims: list[float] = []

    def renew(self) -> None:
        """Rewrite it, with its indexes."""
        self.claims.clear()
        with self._database.autocommit() as connection:
            connection.execute(text("VACUUM FULL ANALYZE embstore.extraction"))

    def claim(self) -> None:
        """Claim a batch, and put it back; a few times a minute, so that it stays young."""
        if len(self.claims) < YOUNG // BATCH:
            with self._database.begin() as connection:
                self.claims.append(seconds(lambda: self._queue.claim(connection, self._token, BATCH)))
                connection.rollback()

    def close(self) -> None:
        """Disconnect."""
        self._database.close()


class _Feed:
    """The datasets, and the one session that works on them."""

    def __init__(self, database: Database, items: int, young: _Young) -> None:
        self.database = database
        self.young = young
        self.claims: list[float] = []
        """Seconds of each claim that found something."""
        self._dice = random.Random(1)
        self._normal = np.random.default_rng(1)
        with database.begin() as connection:
            self._model_id = int(connection.execute(text(_MODEL), {"dim": DIM}).scalar_one())
            vectors.create_partition(connection, self._model_id, "bench", DIM)
            self._token = take_lease(connection, LEASE_SECONDS)
        self._versions = [dict.fromkeys(range(items), 0) for _ in range(DATASETS)]
        self._turns = itertools.cycle(range(DATASETS))

    def round_all(self) -> None:
        """One round of each dataset, which makes them."""
        for _ in range(DATASETS):
            self.round()

    def round(self) -> None:
        """Scan the dataset whose turn it is, and work off what is to be done for it."""
        number = next(self._turns)
        versions = self._versions[number]
        for changed in self._dice.sample(range(len(versions)), min(CHANGED, len(versions))):
            versions[changed] += 1
        versions |= dict.fromkeys(range(len(versions), len(versions) + NEW), 0)
        with self.database.begin() as connection:
            name = f"feed-{number}"
            dataset_id = catalog.ensure_dataset(connection, name, "audio", f"/{name}").dataset_id
            register(connection, dataset_id, _entries(versions))
        queue = Queue("embstore.extraction", "item_id", {"dataset_id": dataset_id, "model_id": self._model_id})
        with self.database.begin() as connection:
            enqueue(connection, dataset_id, self._model_id)
            queue.retry(connection, ["failed"])
            renew_lease(connection, self._token, LEASE_SECONDS)
        after = 0
        while keys := self._claim(queue, after):
            self._write(queue, keys)
            after = keys[-1]

    def _claim(self, queue: Queue, after: int) -> list[int]:
        keys: list[int] = []
        with self.database.begin() as connection:
            taken = seconds(lambda: keys.extend(queue.claim(connection, self._token, BATCH, after)))
        if keys:
            self.claims.append(taken)
            self.young.claim()
        return keys

    def _write(self, queue: Queue, keys: Sequence[int]) -> None:
        refused = [key for key in keys if self._dice.random() < REFUSED]
        written = [key for key in keys if key not in refused]
        matrix = self._normal.standard_normal((len(written), DIM), dtype=np.float32)
        with self.database.begin() as connection:
            vectors.write(connection, queue, self._token, written, matrix)
            refusals = [Refusal(key, "failed", "decode_error", "made up by the benchmark") for key in refused]
            queue.refuse(connection, self._token, refusals)

    def look(self) -> Sample:
        """Rows and bytes of each table, and what autovacuum did so far."""
        sample: Sample = {}
        with self.database.begin() as connection:
            for table, size, dead, vacuums in connection.execute(text(_TABLES), {"tables": list(TABLES)}):
                sample |= {f"{table}_bytes": int(size), f"{table}_dead": int(dead), f"{table}_vacuums": int(vacuums)}
            sample |= {f"{table}_rows": _count(connection, table) for table in TABLES}
        return sample


def _entries(versions: Mapping[int, int]) -> Iterator[Entry]:
    for number, version in versions.items():
        yield Entry(f"{number:06}.wav", f"s{number // A_SPEAKER:04}", None, None, 32_000, version)


def _count(connection: Connection, table: str) -> int:
    return int(connection.execute(text(f"SELECT count(*) FROM embstore.{table}")).scalar_one())


def _memory(settings: Settings) -> Sample:
    """Megabytes of this process, of its session at the server, and of all other processes of the server.

    What they have mapped is left out: the server's shared buffers would count for who happens to touch them first.
    """
    memory: Sample = {"client_mb": _anonymous(psutil.Process()), "session_mb": 0, "server_mb": 0}
    for process in postmaster(settings).children():
        with suppress(psutil.NoSuchProcess):
            kind = (
                "session_mb" if "postgres: embstore: embstore embstore" in " ".join(process.cmdline()) else "server_mb"
            )
            memory[kind] += _anonymous(process)
    return memory


def _anonymous(process: psutil.Process) -> float:
    memory = process.memory_info()
    return round((memory.rss - memory.shared) / (1 << 20), 2)


def _line(sample: Sample) -> str:
    dead = sum(value for name, value in sample.items() if name.endswith("_dead") and name != "catalogue_dead")
    size = sum(value for name, value in sample.items() if name.endswith("_bytes"))
    vacuums = sum(value for name, value in sample.items() if name.endswith("_vacuums"))
    return (
        f"{sample['minute']:>3.0f}  {sample['rounds']:>4.0f} rounds  "
        f"claim {sample['claim_ms']:5.2f} ms, young {sample['young_ms']:5.2f} ms  "
        f"{sample['embedding_1_rows']:>7,.0f} vectors  {dead:>8,.0f} dead rows  {size / (1 << 20):>6,.0f} MiB  "
        f"{vacuums:>4.0f} vacuums  client {sample['client_mb']:.0f}, session {sample['session_mb']:.0f}, "
        f"server {sample['server_mb']:.0f} MiB  load {sample['load']:.1f}"
        + ("  (snapshot held)" if sample["snapshot"] else "")
    )


_CURVES: dict[str, Callable[[Sample], float]] = {
    "claim, ms": lambda s: s["claim_ms"],
    "claim of a young queue, ms": lambda s: s["young_ms"],
    "claim / young": lambda s: s["claim_ms"] / s["young_ms"],
    "client, MiB": lambda s: s["client_mb"],
    "session, MiB": lambda s: s["session_mb"],
    "server, MiB": lambda s: s["server_mb"],
    "catalogue, MiB": lambda s: s["catalogue_bytes"] / (1 << 20),
    **{
        f"{table}, bytes a row": lambda s, table=table: s[f"{table}_bytes"] / max(s[f"{table}_rows"], 1)  # type: ignore[misc]
        for table in ("item", "extraction", "embedding_1", "centroid", "centroid_vector")
    },
    **{
        f"{table}, dead a living row": lambda s, table=table: s[f"{table}_dead"] / max(s[f"{table}_rows"], 1)  # type: ignore[misc]
        for table in ("item", "extraction", "embedding_1", "centroid", "centroid_vector")
    },
    "speaker_change, MiB": lambda s: s["speaker_change_bytes"] / (1 << 20),
}


def _compare(samples: Sequence[Sample]) -> None:
    """Print each curve before the snapshot, at its height, and in the end."""
    tenth = max(1, len(samples) // 10)
    before = samples[: max(1, next((i for i, s in enumerate(samples) if s["snapshot"]), len(samples)))][-tenth:]
    print(f"\n{'':34} {'before':>10} {'highest':>10} {'in the end':>10}   end / before")
    for name, curve in _CURVES.items():
        first, last = (median(map(curve, part)) for part in (before, samples[-tenth:]))
        ratio = f"{last / first:.2f}" if first else "-"
        print(f"{name:34} {first:>10,.2f} {max(map(curve, samples)):>10,.2f} {last:>10,.2f}   {ratio}")
    last, first = (median(s["claim_ms"] / s["young_ms"] for s in part) for part in (samples[-tenth:], before))
    print(f"\nclaim / a young queue's, in the end / before the snapshot: {last / first:.2f}   (target: 1.5 or less)")


def _draw(samples: Sequence[Sample], picture: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), layout="constrained", sharex=True)
    kinds = ("bytes a row", "dead a living row", "claim, claim of a young queue", "client, session, server")
    held = [s["minute"] for s in samples if s["snapshot"]]
    for axis, kind in zip(axes.flat, kinds, strict=True):
        for name, curve in _CURVES.items():
            thing, _, unit = name.partition(", ")
            if unit == kind or thing in kind.split(", "):
                axis.plot(
                    [s["minute"] for s in samples], [curve(s) for s in samples], label=name.removesuffix(f", {kind}")
                )
        if held:
            axis.axvspan(held[0], held[-1] + 1, alpha=0.15, color="gray")
        axis.axvline(round(len(samples) * BACKUP), color="gray", linestyle=":")
        axis.set(title=kind if kind in ("bytes a row", "dead a living row") else "", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in axes[1]:
        axis.set_xlabel("minutes (gray: a snapshot is held; dotted: a backup)")
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    main()
