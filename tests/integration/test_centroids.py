"""Centroids: equal to numpy, whoever computes them, and computed again only where utterances changed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psycopg2
import pytest
from helpers import Facts, ask, entry, fill, vectors_of, wait_until_blocked
from numpy.typing import NDArray
from sqlalchemy import make_url, text

from embstore import averages, catalog, centroids, claims, vectors
from embstore.averages import Average, centroid_queue
from embstore.catalog import Dataset, StoredModel
from embstore.centroids import Options, Task
from embstore.claims import Claimant
from embstore.db.engine import Database
from embstore.errors import DatabaseError
from embstore.progress import PlainDisplay
from embstore.queue import _CLAIM, Queue, Refusal, take_lease
from embstore.register import enqueue, register
from embstore.settings import Settings
from embstore.supervise import Outcome

Matrix = NDArray[np.float32]
Speakers = dict[str, Matrix]


class Store:
    """One dataset and one model; vectors go in by speaker, and centroids come out."""

    def __init__(self, database: Database, settings: Settings, dim: int, dataset: str = "calls") -> None:
        self.database = database
        self.settings = settings
        self._name = dataset
        self._model = Facts(dim=dim)
        self._entries: dict[str, str | None] = {}

    def add(self, speaker: str | None, matrix: Matrix) -> list[str]:
        """Register and embed so many utterances; returns their paths."""
        paths = [f"{len(self._entries) + i:05}.wav" for i in range(len(matrix))]
        self._entries |= dict.fromkeys(paths, speaker)
        self.scan()
        self.embed(matrix)
        return paths

    def scan(self, changed: Iterable[str] = ()) -> None:
        """Register what is there; `changed` files have another time than before."""
        changed = set(changed)
        with self.database.begin() as connection:
            dataset = catalog.ensure_dataset(connection, self._name, "audio", f"/data/{self._name}")
            entries = [entry(path, who, mtime_ns=2 if path in changed else 1) for path, who in self._entries.items()]
            register(connection, dataset.dataset_id, entries)
            enqueue(connection, dataset.dataset_id, catalog.ensure_model(connection, self._model))

    def rename(self, path: str, speaker: str | None) -> None:
        self._entries[path] = speaker
        self.scan()

    def embed(self, matrix: Matrix) -> None:
        """Give the pending items their vectors."""
        with self.database.begin() as connection:
            queue = Queue("embstore.extraction", "item_id", {"dataset_id": self.dataset_id, "model_id": self.model_id})
            token = take_lease(connection)
            keys = queue.claim(connection, token, len(matrix))
            assert len(keys) == len(matrix)
            vectors.write(connection, queue, token, keys, matrix)

    @property
    def dataset_id(self) -> int:
        return int(ask(self.database, "SELECT dataset_id FROM embstore.dataset WHERE name = :n", n=self._name)[0][0])

    @property
    def model_id(self) -> int:
        return int(ask(self.database, "SELECT model_id FROM embstore.model WHERE name = :n", n=self._model.name)[0][0])

    def compute(self, workers: int = 1, **options: Any) -> Outcome:
        """As the command does it, with real worker processes."""
        return centroids.compute(
            self.database,
            self.settings,
            StoredModel(self.model_id, self._model.name, self._model.dim),
            [Dataset(self.dataset_id, self._name, "audio", f"/data/{self._name}")],
            Options(**options),
            workers,
            show=lambda pending, _workers: PlainDisplay(pending, _Quiet()),  # type: ignore[arg-type]
            parameters={},
        )

    def refresh(self, average: Average = "mean") -> None:
        with self.database.begin() as connection:
            averages.refresh(connection, centroid_queue(self.dataset_id, self.model_id), average=average)

    def bits(self) -> dict[str, bytes]:
        rows = ask(
            self.database,
            "SELECT speaker, vector_send(embedding) FROM embstore.centroid"
            " JOIN embstore.centroid_vector USING (dataset_id, model_id, centroid_id) WHERE dataset_id = :d",
            d=self.dataset_id,
        )
        return {speaker: bytes(sent)[4:] for speaker, sent in rows}

    def read(self) -> Speakers:
        return {speaker: np.frombuffer(sent, dtype=">f4").astype(np.float32) for speaker, sent in self.bits().items()}

    def column(self, name: str) -> dict[str, Any]:
        """A column of the view, by speaker."""
        return dict(ask(self.database, f"SELECT speaker, {name} FROM embstore.speaker_centroids ORDER BY 1"))  # type: ignore[arg-type]


class _Quiet:
    def write(self, _words: str) -> None:
        """Nobody reads it."""

    def flush(self) -> None:
        """Nothing to do."""


@pytest.fixture
def store(database: Database, settings: Settings) -> Store:
    """Vectors of three dimensions."""
    return Store(database, settings, 3)


def expected(matrix: Matrix, average: Average) -> NDArray[np.float64]:
    wide = matrix.astype(np.float64)
    if average == "mean":
        return wide.mean(axis=0)
    mean = unit(wide).mean(axis=0)
    return mean / np.linalg.norm(mean)


def unit(matrix: NDArray[Any]) -> NDArray[np.float64]:
    wide = matrix.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=-1, keepdims=True)


def random_speakers(count: int, dim: int) -> Speakers:
    """1 to 12 vectors each, of every length from 0.1 to 10, around a direction of their own."""
    dice = np.random.default_rng(1)
    made = {}
    for number in range(count):
        size = int(dice.integers(1, 13))
        made[f"speaker {number:03}"] = (
            (dice.standard_normal(dim) + dice.standard_normal((size, dim))) * dice.uniform(0.1, 10, (size, 1))
        ).astype(np.float32)
    return made


def put(store: Store, speakers: Speakers) -> None:
    """Utterances of all speakers, mixed."""
    longest = max(map(len, speakers.values()))
    for turn in range(longest):
        there = {name: matrix[turn] for name, matrix in speakers.items() if turn < len(matrix)}
        first = len(store._entries)
        store._entries |= {f"{first + i:05}.wav": name for i, name in enumerate(there)}
        store.scan()
        store.embed(np.stack(list(there.values())))


def check(store: Store, speakers: Speakers, average: Average) -> None:
    """Vector, cohesion and lowest utterance of every speaker against numpy in float64."""
    found = store.read()
    assert set(found) == set(speakers)
    cohesion, lowest = store.column("cohesion"), store.column("lowest_cosine")
    for name, matrix in speakers.items():
        mean = expected(matrix, average)
        assert np.abs(found[name] - mean).max() <= 1e-6 * max(1.0, np.abs(mean).max()), name
        cosines = unit(matrix) @ unit(mean)
        assert cohesion[name] == pytest.approx(cosines.mean(), abs=2e-6)
        assert lowest[name] == pytest.approx(cosines.min(), abs=2e-6)
    assert store.column("num_utterances") == {name: len(matrix) for name, matrix in speakers.items()}


@pytest.mark.parametrize("average", ["mean", "unit"])
def test_real_speech_equals_numpy(average: Average, database: Database, settings: Settings, test_data: Path) -> None:
    golden = np.load(test_data / "resemblyzer-golden.npz")
    speakers: Speakers = {
        str(name): golden["emb"][golden["speaker"] == name] for name in dict.fromkeys(golden["speaker"])
    }
    assert len(speakers) >= 20
    store = Store(database, settings, 256)
    put(store, speakers)
    outcome = store.compute(2, average=average)
    assert outcome.tally.done == len(speakers)
    check(store, speakers, average)


@pytest.mark.parametrize("average", ["mean", "unit"])
def test_vectors_of_any_length_equal_numpy(average: Average, database: Database, settings: Settings) -> None:
    speakers = random_speakers(25, 40)
    store = Store(database, settings, 40)
    put(store, speakers)
    store.compute(average=average)
    check(store, speakers, average)
    for name, vector in store.read().items():
        wide = vector.astype(np.float64)
        row = [store.column(f"value_{what}")[name] for what in ("mean", "std", "min", "max")]
        assert row == pytest.approx([wide.mean(), wide.std(), wide.min(), wide.max()], rel=1e-6)
        if average == "unit":
            assert np.linalg.norm(wide) == pytest.approx(1, abs=1e-6)


def test_the_lowest_utterance_is_named(store: Store) -> None:
    paths = store.add("ann", np.array([[1, 0, 0], [1, 0.1, 0], [0, 1, 0], [1, 0, 0.1]], dtype=np.float32))
    store.compute()
    rows = ask(
        store.database,
        "SELECT i.path FROM embstore.speaker_centroids c JOIN embstore.item i ON i.item_id = c.lowest_item_id",
    )
    assert rows == [(paths[2],)]


def test_the_same_bits_whoever_computes(database: Database, settings: Settings) -> None:
    store = Store(database, settings, 40)
    put(store, random_speakers(60, 40))
    store.compute(1)
    first = store.bits(), store.column("cohesion"), store.column("lowest_cosine"), store.column("lowest_item_id")
    assert len(first[0]) == 60
    for workers, chunk in ((1, 1), (2, 1), (4, 7), (4, 1000), (2, None)):
        outcome = store.compute(workers, chunk_size=chunk, recompute=True)
        assert outcome.tally.done == 60
        again = store.bits(), store.column("cohesion"), store.column("lowest_cosine"), store.column("lowest_item_id")
        assert again == first


def test_the_same_bits_after_the_rows_have_moved_and_with_and_without_statistics(
    database: Database, settings: Settings
) -> None:
    store = Store(database, settings, 40)
    put(store, random_speakers(30, 40))
    store.compute()
    first = store.bits()
    for statement in (
        "UPDATE embstore.item SET position = position WHERE item_id % 2 = 0",
        "ANALYZE embstore.item",
        f"ANALYZE embstore.embedding_{store.model_id}",
    ):
        with database.begin() as connection:
            connection.execute(text(statement))
        assert store.compute(recompute=True).tally.done == 30
        assert store.bits() == first


def test_no_more_workers_than_ranges(store: Store) -> None:
    for name in ("ann", "bob", "cem"):
        store.add(name, vectors_of(2))
    assert len(store.compute(4).workers) == 1
    assert len(store.compute(4, recompute=True, chunk_size=2).workers) == 2
    assert store.compute(4).workers == []


def test_status_changes_need_no_entry_in_any_index(store: Store) -> None:
    for name in ("ann", "bob", "cem"):
        store.add(name, vectors_of(2))
    store.refresh()
    queue = centroid_queue(store.dataset_id, store.model_id)
    refusal = "too_few_utterances"
    with store.database.begin() as connection:
        token = take_lease(connection)
        keys = queue.claim(connection, token, 2)
        queue.refuse(connection, token, [Refusal(key, "skipped", refusal, "few") for key in keys])
        queue.retry(connection, ["skipped"])
        counts = [
            f"pg_stat_get_xact_tuples_{kind}('embstore.centroid'::regclass)" for kind in ("updated", "hot_updated")
        ]
        assert connection.exec_driver_sql(f"SELECT {', '.join(counts)}").one() == (6, 6)


def test_a_claim_walks_the_index_whatever_the_statistics_say(store: Store) -> None:
    for name in ("ann", "bob", "cem"):
        store.add(name, vectors_of(2))
    store.compute()
    with store.database.begin() as connection:
        connection.exec_driver_sql("ANALYZE embstore.centroid")  # none is pending
        connection.exec_driver_sql("UPDATE embstore.centroid SET status = 'pending'")
    queue = centroid_queue(store.dataset_id, store.model_id)
    claim = _CLAIM.replace("UPDATE", "EXPLAIN UPDATE", 1).format(**queue._names)
    plan = "\n".join(line for (line,) in ask(store.database, claim, **queue.scope, token=1, limit=2, after=0))
    assert "Index Scan using centroid_pkey" in plan
    assert "Sort" not in plan


# What changed since


@pytest.fixture
def crowd(store: Store) -> tuple[Store, dict[str, list[str]]]:
    """Three speakers with three utterances each, whose centroids are up to date; and the paths."""
    paths = {name: store.add(name, vectors_of(3, seed=i)) for i, name in enumerate(("ann", "bob", "cem"))}
    assert store.compute().tally.done == 3
    return store, paths


Crowd = tuple[Store, dict[str, list[str]]]


def touched(store: Store, **options: Any) -> set[str]:
    """The speakers that a run computes anew: those whose time and run have changed."""
    before = store.column("(finished_at, run_id, average)::text")
    outcome = store.compute(**options)
    after = store.column("(finished_at, run_id, average)::text")
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert outcome.tally.processed == len(changed & after.keys())
    return changed


def stale(store: Store) -> set[str]:
    return {name for name, is_stale in store.column("stale").items() if is_stale}


def test_nothing_changed_nothing_done(crowd: Crowd) -> None:
    store, _ = crowd
    store.scan()
    assert touched(store) == set()
    assert ask(store.database, "SELECT count(*) FROM embstore.run WHERE command = 'centroids'") == [(1,)]


def test_added_utterances(crowd: Crowd) -> None:
    store, _ = crowd
    more = vectors_of(2, seed=9)
    store.add("bob", more)
    assert stale(store) == {"bob"}
    assert touched(store) == {"bob"}
    assert stale(store) == set()
    wanted = expected(np.concatenate([vectors_of(3, seed=1), more]), "mean")
    assert np.abs(store.read()["bob"] - wanted).max() <= 1e-6
    assert touched(store) == set()


def test_a_new_speaker(crowd: Crowd) -> None:
    store, _ = crowd
    store.add("dan", vectors_of(1, seed=5))
    assert touched(store) == {"dan"}


def test_a_file_that_changed_is_left_out_until_it_is_embedded_again(crowd: Crowd) -> None:
    store, paths = crowd
    store.scan(changed=[paths["bob"][1]])
    assert touched(store) == {"bob"}
    assert store.column("num_utterances") == {"ann": 3, "bob": 2, "cem": 3}
    store.embed(np.array([[7, 8, 9]], dtype=np.float32))
    assert touched(store) == {"bob"}
    matrix = vectors_of(3, seed=1)
    matrix[1] = [7, 8, 9]
    assert np.abs(store.read()["bob"] - expected(matrix, "mean")).max() <= 1e-6


def test_removed_items_and_speakers(crowd: Crowd) -> None:
    store, paths = crowd
    gone = [paths["ann"][0], *paths["cem"]]
    with store.database.begin() as connection:
        connection.execute(text("DELETE FROM embstore.item WHERE path = ANY (:paths)"), {"paths": gone})
    assert stale(store) == {"ann", "cem"}
    assert touched(store) == {"ann", "cem"}
    assert set(store.column("speaker")) == {"ann", "bob"}
    assert ask(store.database, "SELECT count(*) FROM embstore.centroid_vector") == [(2,)]
    assert np.abs(store.read()["ann"] - expected(vectors_of(3, seed=0)[1:], "mean")).max() <= 1e-6


def test_extractions_removed_alone(crowd: Crowd) -> None:
    store, paths = crowd
    with store.database.begin() as connection:
        connection.execute(
            text(
                "DELETE FROM embstore.extraction x USING embstore.item i WHERE i.item_id = x.item_id AND i.path = :path"
            ),
            {"path": paths["bob"][2]},
        )
    assert touched(store) == {"bob"}
    assert store.column("num_utterances")["bob"] == 2


def test_a_renamed_speaker_touches_both(crowd: Crowd) -> None:
    store, paths = crowd
    store.rename(paths["ann"][0], "bob")
    assert stale(store) == {"ann", "bob"}
    assert touched(store) == {"ann", "bob"}
    ann, bob = vectors_of(3, seed=0), vectors_of(3, seed=1)
    found = store.read()
    assert np.abs(found["ann"] - expected(ann[1:], "mean")).max() <= 1e-6
    assert np.abs(found["bob"] - expected(np.concatenate([ann[:1], bob]), "mean")).max() <= 1e-6


def test_a_speaker_renamed_as_a_whole(crowd: Crowd) -> None:
    store, paths = crowd
    for path in paths["ann"]:
        store.rename(path, "eva")
    before = store.bits()
    assert touched(store) == {"ann", "eva"}
    assert set(store.column("speaker")) == {"bob", "cem", "eva"}
    assert store.bits()["eva"] == before["ann"]


def test_utterances_that_lose_their_speaker_and_such_without_one(crowd: Crowd) -> None:
    store, paths = crowd
    store.add(None, vectors_of(4))
    assert touched(store) == set()
    store.rename(paths["cem"][0], None)
    assert touched(store) == {"cem"}
    assert set(store.column("speaker")) == {"ann", "bob", "cem"}


def test_a_speaker_who_failed_and_then_disappeared_is_forgotten(crowd: Crowd) -> None:
    store, paths = crowd
    (path,) = store.add("dan", vectors_of(1))
    store.compute()
    store.scan(changed=[path])
    store.compute()
    assert store.column("status")["dan"] == "skipped"
    store.rename(path, "ann")  # it has no vector now, so no centroid changes
    store.compute()
    assert set(store.column("speaker")) == {"ann", "bob", "cem"}
    assert paths


def test_a_deleted_dataset_takes_its_centroids_with_it(crowd: Crowd, settings: Settings) -> None:
    store, _ = crowd
    other = Store(store.database, settings, 3, dataset="books")
    other.add("ann", vectors_of(2))
    other.compute()
    store.add("bob", vectors_of(1))
    with store.database.begin() as connection:
        connection.execute(text("DELETE FROM embstore.dataset WHERE name = 'calls'"))
    assert ask(store.database, "SELECT dataset, speaker FROM embstore.speaker_centroids") == [("books", "ann")]
    assert ask(store.database, "SELECT count(*) FROM embstore.centroid_vector") == [(1,)]
    assert ask(store.database, "SELECT count(*) FROM embstore.speaker_change") == [(0,)]


def test_another_minimum_judges_again_only_whom_it_concerns(crowd: Crowd) -> None:
    store, _ = crowd
    store.add("dan", vectors_of(1, seed=7))
    store.compute()
    before = store.bits()
    assert touched(store, min_utterances=3) == {"dan"}
    assert store.column("(status, error_code)::text")["dan"] == "(skipped,too_few_utterances)"
    assert store.column("error")["dan"] == "fewer utterances (1) than the minimum (3)"
    assert "dan" not in store.bits()
    assert touched(store, min_utterances=3) == set()
    assert touched(store, min_utterances=4) == {"ann", "bob", "cem"}
    assert store.bits() == {}
    assert touched(store, min_utterances=1) == {"ann", "bob", "cem", "dan"}
    assert store.bits() == before


def test_another_average_computes_all_and_recompute_does_too(crowd: Crowd) -> None:
    store, _ = crowd
    assert touched(store, average="unit") == {"ann", "bob", "cem"}
    assert set(store.column("average").values()) == {"unit"}
    assert touched(store, average="unit") == set()
    assert touched(store, average="unit", recompute=True) == {"ann", "bob", "cem"}


def test_two_runs_that_want_different_averages_do_not_mix_them(crowd: Crowd) -> None:
    """The one that came later has its way, even where a worker of the other one computes."""
    store, _ = crowd
    store.refresh("unit")
    with store.database.begin() as connection:
        run_id = catalog.start_run(connection, "centroids", store.dataset_id, store.model_id, {})
    assert store.read() == {}
    job = centroids.Job(store.settings, store.model_id, (Task(store.dataset_id, run_id, 10),), 1)
    centroids.work(_Channel(), job)  # type: ignore[arg-type]
    for i, vector in enumerate(store.read().values()):
        assert np.abs(vector - expected(vectors_of(3, seed=i), "unit")).max() <= 1e-6


class _Channel:
    """A worker's line to a parent that is not there."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.sent: list[object] = []

    def send(self, message: object) -> None:
        self.sent.append(message)


def test_a_change_that_is_committed_while_centroids_run_is_not_lost(crowd: Crowd, database_url: str) -> None:
    """At every moment of a run that another transaction may commit at."""
    store, paths = crowd
    address = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)

    def open_change(path: str) -> Any:
        connection = psycopg2.connect(address)
        connection.cursor().execute("UPDATE embstore.item SET speaker = 'bob' WHERE path = %s", (path,))
        return connection

    early, late, later = (open_change(path) for path in paths["ann"])
    store.refresh()  # sees none of them
    early.commit()
    assert stale(store) == {"ann", "bob"}
    store.refresh()
    queue = centroid_queue(store.dataset_id, store.model_id)
    with store.database.begin() as connection:
        token = take_lease(connection)
        keys = queue.claim(connection, token, 10)
        assert len(keys) == 2
    late.commit()  # after the claim, before it is computed
    with store.database.begin() as connection:
        queue.refuse(connection, token, [Refusal(key, "skipped", "too_few_utterances", "") for key in keys])
    assert stale(store) == {"ann", "bob"}
    later.commit()
    assert touched(store) == {"ann", "bob"}
    assert set(store.column("speaker")) == {"bob", "cem"}
    both = np.concatenate([vectors_of(3, seed=0), vectors_of(3, seed=1)])
    assert np.abs(store.read()["bob"] - expected(both, "mean")).max() <= 1e-6
    for connection in (early, late, later):
        connection.close()


def test_a_refresh_takes_a_running_speaker_away_from_a_worker_with_older_vectors(crowd: Crowd) -> None:
    store, _ = crowd
    store.add("bob", vectors_of(1, seed=4))
    store.refresh()
    queue = centroid_queue(store.dataset_id, store.model_id)
    with store.database.begin() as connection:
        token = take_lease(connection)
        keys = queue.claim(connection, token, 10)
    store.add("bob", vectors_of(1, seed=5))
    store.refresh()
    statement = text(averages._COMPUTE.format(model_id=store.model_id))
    values = {**queue.scope, "keys": keys, "min_utterances": 1, "run_id": 1, "token": token}
    assert ask(store.database, str(statement), **values) == []
    assert store.compute().tally.done == 1
    assert store.column("num_utterances")["bob"] == 5


def test_a_range_that_takes_longer_than_a_lease_keeps_it(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a speaker with millions of utterances; here another transaction holds the row."""
    store, _ = crowd
    store.add("bob", vectors_of(1, seed=4))
    store.refresh()
    monkeypatch.setattr(centroids, "Claimant", partial(Claimant, lease_seconds=1.0))
    monkeypatch.setattr(claims, "_BEAT", 0.05)
    job = centroids.Job(store.settings, store.model_id, (Task(store.dataset_id, 1, 10),), 1)
    lease = "SELECT expires_at FROM embstore.centroid JOIN embstore.lease ON token = claim_token WHERE speaker = 'bob'"
    with ThreadPoolExecutor(1) as threads:
        with store.database.begin() as connection:
            # Not the claim's lock, which comes first, but that of the worker's UPDATE.
            connection.exec_driver_sql(_WAIT)
        with store.database.begin() as connection:
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(1)")
            working = threads.submit(centroids.work, _Channel(), job)  # type: ignore[arg-type]
            wait_until_blocked(store.database)
            first = ask(store.database, lease)[0][0]
            while (ask(store.database, lease)[0][0] - first).total_seconds() < 1.5:
                assert not working.done()
        working.result()
    assert store.column("(status, num_utterances)::text")["bob"] == "(done,4)"
    assert ask(store.database, "SELECT attempts FROM embstore.centroid WHERE speaker = 'bob'") == [(1,)]


_WAIT = """
CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.status = 'done' THEN PERFORM pg_advisory_xact_lock(1); END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER linger BEFORE UPDATE ON embstore.centroid FOR EACH ROW EXECUTE FUNCTION linger();
"""


# Speakers whose vectors cannot be averaged


def test_utterances_that_cancel_each_other_out_fail_alone(crowd: Crowd) -> None:
    store, _ = crowd
    store.add("zed", np.array([[1, 2, 3], [-1, -2, -3]], dtype=np.float32))
    outcome = store.compute()
    assert (outcome.tally.done, dict(outcome.tally.failed)) == (0, {"zero_vector": 1})
    assert store.column("(status, error)::text")["zed"] == '(failed,"the utterances cancel each other out")'
    assert set(store.bits()) == {"ann", "bob", "cem"}
    assert touched(store) == set()


def test_unit_vectors_without_a_common_direction_have_no_unit_average(store: Store) -> None:
    angles = np.arange(7) * 2 * np.pi / 7
    star = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1).astype(np.float32)
    assert np.linalg.norm(unit(star).mean(axis=0)) > 0
    store.add("star", star)
    store.add("ann", vectors_of(3))
    outcome = store.compute(average="unit")
    assert (outcome.tally.done, dict(outcome.tally.failed)) == (1, {"zero_vector": 1})


@pytest.mark.parametrize("average", ["mean", "unit"])
@pytest.mark.parametrize("scale", [3e38, 1e25, 1e-25, 1e-40])
def test_values_at_the_ends_of_float32_are_averaged(store: Store, scale: float, average: Average) -> None:
    matrix = (np.array([[1, 0.5, 0.25], [1, -0.5, 0.5], [0.9, 0.9, -0.9]]) * scale).astype(np.float32)
    store.add("vast", matrix)
    assert store.compute(average=average).tally.done == 1
    mean = expected(matrix, average)
    assert np.abs(store.read()["vast"] / mean - 1).max() <= 1e-4
    cosines = unit(matrix) @ unit(mean)
    assert store.column("cohesion")["vast"] == pytest.approx(cosines.mean(), abs=1e-4)
    assert store.column("lowest_cosine")["vast"] == pytest.approx(cosines.min(), abs=1e-4)


_BREAK = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.status = 'done' AND NEW.speaker = 'speaker 007' THEN
        RAISE EXCEPTION 'value out of range: overflow' USING ERRCODE = '{code}';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER refuse BEFORE UPDATE ON embstore.centroid FOR EACH ROW EXECUTE FUNCTION refuse();
"""


def test_a_speaker_that_the_server_cannot_compute_fails_alone(store: Store) -> None:
    speakers = random_speakers(20, 3)
    put(store, speakers)
    with store.database.begin() as connection:
        connection.exec_driver_sql(_BREAK.format(code="22003"))
    outcome = store.compute(2)
    assert (outcome.tally.done, dict(outcome.tally.failed)) == (19, {"not_averaged": 1})
    assert "value out of range: overflow" in store.column("error")["speaker 007"]
    assert store.column("num_utterances")["speaker 006"] == len(speakers["speaker 006"])


def test_a_fault_of_the_server_is_nobodys_failure(store: Store) -> None:
    """A full disk, say: the run ends with it, and no speaker is to blame."""
    put(store, random_speakers(20, 3))
    with store.database.begin() as connection:
        connection.exec_driver_sql(_BREAK.format(code="53100"))
    for _ in range(4):
        with pytest.raises(DatabaseError, match="the disk of the database is full"):
            store.compute(1)
        assert set(ask(store.database, "SELECT status, attempts FROM embstore.centroid")) == {("pending", 0)}
    with store.database.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER refuse ON embstore.centroid")
    assert store.compute().tally.done == 20


def test_mixed_dimensions_are_impossible(store: Store) -> None:
    store.add("ann", vectors_of(2))
    insert = (
        "INSERT INTO embstore.embedding (dataset_id, model_id, item_id, embedding)"
        " SELECT dataset_id, model_id, item_id + 1000, '[1,2]' FROM embstore.embedding"
    )
    with pytest.raises(DatabaseError, match="violates check constraint"), store.database.begin() as connection:
        connection.exec_driver_sql(insert)
    update = "UPDATE embstore.embedding SET embedding = '[1,2,3,4]'"
    with pytest.raises(DatabaseError, match="violates check constraint"), store.database.begin() as connection:
        connection.exec_driver_sql(update)


# For people


def test_the_view_counts_what_failed(store: Store) -> None:
    paths = store.add("ann", vectors_of(2))
    with store.database.begin() as connection:
        entries = [*(entry(path, "ann") for path in paths), entry("bad.wav", "ann"), entry("mute.wav", "ann")]
        queue = fill(connection, entries)
        token = take_lease(connection)
        bad, mute = queue.claim(connection, token, 10)
        refusals = [Refusal(bad, "failed", "decode_error", ""), Refusal(mute, "skipped", "no_speech", "")]
        queue.refuse(connection, token, refusals)
    store.compute()
    rows = ask(store.database, "SELECT num_utterances, failed_utterances, stale FROM embstore.speaker_centroids")
    assert rows == [(2, 2, False)]


@pytest.fixture
def scored(database: Database, settings: Settings) -> tuple[Store, Speakers, Speakers]:
    """Store, vectors and centroids of 12 speakers, of whom two are nearly one person."""
    store = Store(database, settings, 40)
    speakers = random_speakers(12, 40)
    speakers["speaker 011"] = (speakers["speaker 003"] + vectors_of(1, 40, seed=8) * 0.02).astype(np.float32)
    put(store, speakers)
    store.compute(average="unit")
    return store, speakers, store.read()


Scored = tuple[Store, Speakers, Speakers]


def test_nearest_speakers(scored: Scored) -> None:
    store, _, found = scored
    rows = ask(store.database, "SELECT * FROM embstore.nearest_speakers('calls', 'speaker 003', 'small', 4)")
    mine = unit(found["speaker 003"])
    cosines = {name: float(unit(vector) @ mine) for name, vector in found.items() if name != "speaker 003"}
    best = sorted(cosines, key=lambda name: -cosines[name])[:4]
    assert [row[:2] for row in rows] == [("calls", name) for name in best]
    assert [row[2] for row in rows] == pytest.approx([cosines[name] for name in best], abs=1e-6)
    assert best[0] == "speaker 011"


def test_outlier_utterances(scored: Scored) -> None:
    store, speakers, found = scored
    rows = ask(store.database, "SELECT * FROM embstore.outlier_utterances('calls', 'small', 5)")
    cosines = [(float(unit(v) @ unit(found[name])), name) for name, matrix in speakers.items() for v in matrix]
    worst = sorted(cosines)[:5]
    assert [row[1] for row in rows] == [name for _, name in worst]
    assert [row[2] for row in rows] == pytest.approx([cosine for cosine, _ in worst], abs=1e-6)


def test_similar_speakers(scored: Scored) -> None:
    store, _, found = scored
    names = sorted(found)
    pairs = {(a, b): float(unit(found[a]) @ unit(found[b])) for i, a in enumerate(names) for b in names[i + 1 :]}
    threshold = sorted(pairs.values())[-4] - 1e-4
    rows = ask(store.database, "SELECT * FROM embstore.similar_speakers('calls', 'small', :t)", t=threshold)
    best = sorted(pairs, key=lambda pair: -pairs[pair])[:4]
    assert [row[:2] for row in rows] == best
    assert [row[2] for row in rows] == pytest.approx([pairs[pair] for pair in best], abs=1e-6)


def test_helpers_know_nothing_of_speakers_without_a_centroid(crowd: Crowd) -> None:
    store, _ = crowd
    store.add("zed", np.array([[1, 2, 3], [-1, -2, -3]], dtype=np.float32))
    store.compute()
    rows = ask(store.database, "SELECT * FROM embstore.nearest_speakers('calls', 'ann', 'small')")
    assert {row[1] for row in rows} == {"bob", "cem"}
    assert ask(store.database, "SELECT * FROM embstore.nearest_speakers('calls', 'zed', 'small')") == []


def test_a_run_is_noted_with_its_counts(crowd: Crowd) -> None:
    store, _ = crowd
    rows: Sequence[tuple[Any, ...]] = ask(
        store.database, "SELECT status, counts FROM embstore.run WHERE command = 'centroids'"
    )
    assert [(status, counts["processed"]) for status, counts in rows] == [("done", 3)]
    assert json.dumps(rows[0][1])
