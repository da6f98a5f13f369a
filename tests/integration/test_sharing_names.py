"""Two datasets of one name: every function, view and command takes the one that is meant, or says why not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ask, entry, fill, vectors_of
from people import People
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from embstore import catalog, lookup, recall, vectors
from embstore.boundaries import labels
from embstore.db.engine import Database
from embstore.errors import DatabaseError, UsageError
from embstore.queue import take_lease
from embstore.search import search
from embstore.transfer import export

ITEMS = 8
VECTOR = "CAST('[1,0,0]' AS vector)"


@dataclass
class Store:
    """Teams a and b and the owner have a dataset `train` each, and b has `secret`. Ann is in a, cas in both."""

    owner: Database
    ann: Database
    cas: Database
    a: str
    b: str


@pytest.fixture
def store(database: Database, people: People) -> Store:
    a, b = people.team("a"), people.team("b")
    ann, ben = (people.connect(people.login(name, team)) for name, team in (("ann", a), ("ben", b)))
    cas = people.login("cas", a)
    people.execute("GRANT {} TO {}", b, cas)
    for writer, name, letter in (
        (database, "train", "o"), (ann, "train", "a"), (ben, "train", "b"), (ben, "secret", "s"),
    ):  # fmt: skip
        with writer.begin() as connection:
            _fill(connection, name, letter)
    return Store(database, ann, people.connect(cas), a, b)


_AVERAGE = """
WITH made AS (
    INSERT INTO embstore.centroid (dataset_id, model_id, speaker, status, average, num_utterances)
    SELECT dataset_id, 1, speaker, 'done', 'mean', count(*) FROM embstore.item WHERE dataset_id = :d GROUP BY 1, 3
    RETURNING dataset_id, model_id, centroid_id, speaker)
INSERT INTO embstore.centroid_vector
SELECT m.dataset_id, m.model_id, m.centroid_id, avg(e.embedding)
FROM made m JOIN embstore.item i USING (dataset_id, speaker) JOIN embstore.embedding_1 e USING (dataset_id, item_id)
GROUP BY 1, 2, 3
"""
_BOUNDARIES = """
WITH made AS (
    INSERT INTO embstore.boundary_run (dataset_id, model_id, method, parameters, status, found, items)
    VALUES (:d, 1, 'auto', '{}', 'done', '{}', 1) RETURNING dataset_id, boundary_run_id)
INSERT INTO embstore.boundary SELECT dataset_id, boundary_run_id, 4, 1, 1 FROM made
"""


def _fill(connection: Connection, name: str, letter: str) -> None:
    """Speakers `a0` and `a1`, if that is the letter, in turns."""
    queue = fill(connection, [entry(f"{i}.wav", f"{letter}{i % 2}") for i in range(ITEMS)], dataset=name)
    token = take_lease(connection)
    matrix = vectors_of(ITEMS, seed=ord(letter))
    vectors.write(connection, queue, token, queue.claim(connection, token, ITEMS), matrix)
    for statement in (_AVERAGE, _BOUNDARIES):
        connection.execute(text(statement), {"d": queue.scope["dataset_id"]})


CALLS = {
    "nearest": f"embstore.nearest({VECTOR}, 'small', 100, :name)",
    "nearest exactly, by a condition": f"embstore.nearest({VECTOR}, 'small', 100, :name, NULL, 'position >= 0', true)",
    "nearest_centroids": f"embstore.nearest_centroids({VECTOR}, 'small', 100, :name)",
    "outlier_utterances": "embstore.outlier_utterances(:name, 'small', 100)",
    "similar_speakers": "embstore.similar_speakers(:name, 'small', -1)",
    "nearest_speakers": "embstore.nearest_speakers(:name, '{letter}0', 'small', 100)",
}


def speakers(database: Database, call: str, name: str) -> set[str]:
    """Whose rows a function gives, by the letter of their dataset."""
    return {speaker[0] for (speaker,) in ask(database, f"SELECT speaker FROM {call}", name=name)}


@pytest.mark.parametrize("call", [c for c in CALLS if c != "nearest_speakers"])
def test_a_function_takes_the_dataset_that_is_meant(store: Store, call: str) -> None:
    assert speakers(store.ann, CALLS[call], "train") == {"a"}
    assert speakers(store.ann, CALLS[call], f"{store.a}/train") == {"a"}
    assert speakers(store.cas, CALLS[call], f"{store.a}/train") == {"a"}
    assert speakers(store.cas, CALLS[call], f"{store.b}/train") == {"b"}
    assert speakers(store.owner, CALLS[call], "train") == {"o"}  # his is the one that is shown so


def test_the_speakers_nearest_to_one_are_told_apart_by_their_datasets(store: Store) -> None:
    call = f"SELECT other_dataset, other_speaker FROM {CALLS['nearest_speakers']}".format(letter="a")
    assert ask(store.ann, call, name="train") == [("train", "a1")]
    mine, theirs = f"{store.a}/train", f"{store.b}/train"
    found = {(mine, "a1"), (theirs, "b0"), (theirs, "b1"), ("secret", "s0"), ("secret", "s1")}
    assert set(ask(store.cas, call, name=mine)) == found


def test_a_name_that_means_several_or_none_is_refused_with_those_one_sees(store: Store) -> None:
    for call in CALLS.values():
        statement = f"SELECT count(*) FROM {call}".format(letter="a")
        both = f"several datasets are called 'train': say '{store.a}/train' or '{store.b}/train'"
        with pytest.raises(DatabaseError, match=both):
            ask(store.cas, statement, name="train")
        for unknown in ("secret", f"{store.b}/train", "", "train "):
            with pytest.raises(DatabaseError, match=f"no dataset '{unknown}'") as caught:
                ask(store.ann, statement, name=unknown)
            assert caught.value.__cause__ is not None
            assert "such as: 'train'\n" in f"{caught.value.__cause__.orig}\n"  # type: ignore[attr-defined]


def test_in_sql_a_name_means_what_it_means_to_a_command(store: Store) -> None:
    names = ["train", "secret", "nothing", "", "%", *(f"{team}/{name}" for team in (store.a, store.b, "c")
                                                      for name in ("train", "secret"))]  # fmt: skip
    for database in (store.owner, store.ann, store.cas):
        known = 0
        for name in names:
            found: list[Any] = []
            for look in (_by_command, _by_sql):
                with database.begin() as connection:
                    found.append(look(connection, name))
            assert found[0] == found[1], name
            known += isinstance(found[0], int)
        assert known == {store.owner: 5, store.ann: 2, store.cas: 4}[database]


def _by_command(connection: Connection, name: str) -> int | str:
    try:
        return catalog.get_dataset(connection, name).dataset_id
    except UsageError as error:
        return str(error).split(":")[0]


def _by_sql(connection: Connection, name: str) -> int | str:
    with connection.begin_nested() as attempt:
        try:
            return int(connection.execute(text("SELECT embstore.dataset_called(:n)"), {"n": name}).scalar_one())
        except DBAPIError as error:
            attempt.rollback()
            return str(error.orig.diag.message_primary).split(":")[0]  # type: ignore[union-attr]


def test_no_team_takes_a_name_under_which_a_dataset_would_seem_to_be_its(store: Store, people: People) -> None:
    name = people.name("corpora")
    with store.owner.begin() as connection:
        fill(connection, 1, dataset=f"{name}/train")
    with pytest.raises(UsageError, match=f"dataset '{name}/train' would seem to be one of team '{name}'"):
        people.team("corpora")


def test_every_view_tells_them_apart(store: Store) -> None:
    views = ask(
        store.owner,
        "SELECT table_name FROM information_schema.columns WHERE table_schema = 'embstore' AND column_name = 'dataset'"
        " AND table_name IN (SELECT viewname FROM pg_views)",
    )
    assert {("items",), ("embeddings_small",), ("speaker_centroids",), ("boundaries",), ("progress",)} <= set(views)
    mine, theirs = f"{store.a}/train", f"{store.b}/train"
    for (view,) in views:
        found = {name for (name,) in ask(store.cas, f"SELECT DISTINCT dataset FROM embstore.{view}")}
        assert found in ({mine, theirs, "secret"}, set()), view
        assert {name for (name,) in ask(store.ann, f"SELECT DISTINCT dataset FROM embstore.{view}")} <= {"train"}, view
    for name, number in ((mine, ITEMS), ("train", 0)):
        assert ask(store.cas, f"SELECT count(*) FROM embstore.embeddings_small WHERE dataset = '{name}'") == [(number,)]


def test_a_condition_speaks_of_the_names_that_are_shown(store: Store) -> None:
    call = f"embstore.nearest({VECTOR}, 'small', 100, condition => :name)"
    assert speakers(store.cas, call, f"dataset = '{store.b}/train'") == {"b"}
    assert speakers(store.cas, call, "dataset = 'train'") == set()
    assert speakers(store.ann, call, "dataset = 'train'") == {"a"}


def test_search_and_the_check_of_an_index_go_by_the_same_names(store: Store) -> None:
    query = np.array([1, 0, 0], dtype=np.float32)
    for name, letter in ((f"{store.a}/train", "a"), (f"{store.b}/train", "b")):
        for of in ("utterances", "speakers"):
            hits = search(store.cas, query, dataset=name, of=of, k=100)  # type: ignore[arg-type]
            assert {(hit.dataset, str(hit.speaker)[0]) for hit in hits} == {(name, letter)}
        # What was asked about is not among what is found.
        hits = search(store.cas, f"{letter}0", of="speakers", query_dataset=name, dataset=name)
        assert [hit.speaker for hit in hits] == [f"{letter}1"]
    with pytest.raises(UsageError, match="several datasets are called 'train'"):
        search(store.cas, query, dataset="train")
    with store.cas.begin() as connection:
        model = catalog.get_model(connection, "small")
        datasets = catalog.datasets(connection, "audio")
        found = lookup.find(connection, "b1", model, None, None)
    assert found.dataset == f"{store.b}/train"
    checked = list(recall.check(store.cas, model, datasets, queries=5, k=3))
    assert {f"dataset '{store.a}/train'", f"dataset '{store.b}/train'"} <= {one.scope for one in checked}
    assert {one.recall for one in checked} == {1.0}


def test_an_export_is_of_the_dataset_that_is_meant(store: Store, tmp_path: Path) -> None:
    with store.cas.begin() as connection:
        model = catalog.get_model(connection, "small")
        for letter, team in (("a", store.a), ("b", store.b)):
            dataset = catalog.get_dataset(connection, f"{team}/train")
            export.export_centroids(connection, tmp_path / letter, "npz", model, dataset)
            with np.load(tmp_path / letter / "centroids.npz") as found:
                assert found["speaker"].tolist() == [f"{letter}0", f"{letter}1"]
            run = labels.newest(connection, dataset.dataset_id, model.model_id)
            assert ask(store.cas, "SELECT dataset FROM embstore.boundary_runs WHERE run = :r", r=run) == [
                (dataset.name,)
            ]
