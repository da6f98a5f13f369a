"""Search: right at every filter, by whichever way; what a query may be; conditions that are meant to harm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Facts, ask, entry, fill
from numpy.typing import NDArray
from people import People
from sqlalchemy import Connection, text

from embstore import catalog, lookup, sharing, vectors
from embstore.db.engine import Database
from embstore.errors import DatabaseError, ModelError, UsageError
from embstore.queue import take_lease
from embstore.search import Results, search
from embstore.settings import Settings

DIM, ITEMS, SPEAKERS = 8, 3000, 20
FULL = f"CREATE INDEX ON embstore.embedding_1 USING hnsw ((embedding::vector({DIM})) vector_cosine_ops)"
HALF = (
    "CREATE INDEX ON embstore.embedding_1 USING hnsw"
    f" ((l2_normalize(embedding::vector({DIM}))::halfvec({DIM})) halfvec_cosine_ops)"
)
IVFFLAT = (
    f"CREATE INDEX ON embstore.embedding_1 USING ivfflat ((embedding::vector({DIM})) vector_cosine_ops)"
    " WITH (lists = 10)"
)


class Store:
    """Dataset `calls`, a speaker in every place modulo 20; the last ten items have no vector. And `books`, with ten."""

    def __init__(self, database: Database) -> None:
        dice = np.random.default_rng(5)
        self.vectors = dice.standard_normal((ITEMS, DIM)).astype(np.float32)
        self.database = database
        entries = [entry(f"{i:04}.wav", f"s{i % SPEAKERS}", duration=float(i % 100)) for i in range(ITEMS)]
        self._write("calls", entries, self.vectors[: ITEMS - 10])
        self._write("books", [entry(f"{i}.wav", "s1") for i in range(10)], self.vectors[:10] + 0.5)
        with database.begin() as connection:
            connection.exec_driver_sql("ANALYZE embstore.item, embstore.embedding_1")

    def _write(self, dataset: str, entries: Sequence[Any], matrix: NDArray[np.float32]) -> None:
        with self.database.begin() as connection:
            queue = fill(connection, entries, dataset=dataset, model=Facts(dim=DIM))
            token = take_lease(connection)
            vectors.write(connection, queue, token, queue.claim(connection, token, len(matrix)), matrix)

    def index(self, statement: str) -> None:
        with self.database.begin() as connection:
            connection.exec_driver_sql(statement)

    def bound(self, rows: int) -> None:
        """From how many rows on the index is used. For the sessions to come."""
        with self.database.begin() as connection:
            name = connection.exec_driver_sql("SELECT current_database()").scalar_one()
            connection.exec_driver_sql(f"ALTER DATABASE {name} SET embstore.search_bound = {rows}")
        self.database.close()

    def nearest(self, query: NDArray[np.float32], keep: NDArray[np.bool_], k: int = 10) -> list[float]:
        """The right cosines, by numpy, among the positions of `calls` that are kept."""
        kept = self.vectors[: ITEMS - 10][keep[: ITEMS - 10]].astype(np.float64)
        unit = kept / np.linalg.norm(kept, axis=1, keepdims=True)
        cosines: NDArray[np.float64] = unit @ (query / np.linalg.norm(query.astype(np.float64)))
        return sorted(cosines.tolist(), reverse=True)[:k]


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)


QUERY = np.random.default_rng(9).standard_normal(DIM).astype(np.float32)
PLACES = np.arange(ITEMS)
FILTERS: dict[str, tuple[dict[str, str], NDArray[np.bool_]]] = {
    "none": ({"dataset": "calls"}, PLACES >= 0),
    "half": ({"dataset": "calls", "where": "position % 2 = 0"}, PLACES % 2 == 0),
    "speaker": ({"dataset": "calls", "speaker": "s3"}, PLACES % SPEAKERS == 3),
    "one percent": ({"dataset": "calls", "where": "duration = 7"}, PLACES % 100 == 7),
    "three": ({"dataset": "calls", "where": "position IN (5, 6, 7)"}, np.isin(PLACES, [5, 6, 7])),
    "nothing": ({"dataset": "calls", "where": "speaker = 'nobody'"}, PLACES < 0),
    "both": ({"dataset": "calls", "speaker": "s4", "where": "duration < 50"}, (PLACES % 20 == 4) & (PLACES % 100 < 50)),
}


def centroids(connection: Connection, speakers: int) -> None:
    """Make centroids of `s1` and so on, as if of one utterance, of two, ..."""
    connection.exec_driver_sql(
        "WITH made AS (INSERT INTO embstore.centroid (dataset_id, model_id, speaker, status, average, num_utterances)"
        f" SELECT 1, 1, 's' || n, 'done', 'mean', n FROM generate_series(1, {speakers}) n"
        " RETURNING centroid_id, num_utterances)"
        " INSERT INTO embstore.centroid_vector SELECT 1, 1, centroid_id, e.embedding"
        " FROM made JOIN embstore.embedding_1 e ON e.item_id = num_utterances"
    )


def cosines(results: Results) -> list[float]:
    return [hit.similarity for hit in results]


@pytest.mark.parametrize("index", [None, FULL, HALF, IVFFLAT])
def test_every_filter_gives_what_numpy_says(store: Store, index: str | None) -> None:
    if index is not None:
        store.index(index)
    for bound in (None, 20):
        if bound is not None:
            store.bound(bound)
        for name, (filters, keep) in FILTERS.items():
            expected = store.nearest(QUERY, keep)
            results = search(store.database, QUERY, **filters)
            exact = search(store.database, QUERY, exact=True, **filters)
            few = keep.sum() <= (bound or 1 << 30)
            assert results.method == ("prefilter" if few else "index" if index else "scan"), (name, bound)
            assert (results.exact, exact.exact) == (results.method != "index", True)
            assert cosines(exact) == pytest.approx(expected, abs=1e-6), (name, bound)
            assert len(results) == len(expected), (name, bound)
            # At this size a graph misses next to nothing; rows that it gives are compared in full precision. The lists
            # of ivfflat have centres drawn at random, and random vectors no clusters for them to follow.
            if expected and (index != IVFFLAT or results.exact):
                assert np.isclose(cosines(results), expected, atol=1e-6).mean() >= 0.8, (name, bound)


def test_a_filter_may_leave_items_of_several_datasets(store: Store) -> None:
    results = search(store.database, QUERY, where="position < 8", k=30)
    assert (len(results), results.method, {hit.dataset for hit in results}) == (16, "prefilter", {"calls", "books"})
    together = np.concatenate([store.vectors[:8], store.vectors[:8] + 0.5]).astype(np.float64)
    right = together @ QUERY / np.linalg.norm(together, axis=1) / np.linalg.norm(QUERY)
    assert cosines(results) == pytest.approx(sorted(right.tolist(), reverse=True), abs=1e-6)


def test_never_fewer_than_there_are(store: Store) -> None:
    """All that pass lie on the far side, where the index comes last."""
    store.index(FULL)
    store.bound(20)
    with store.database.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE embstore.item SET speaker = 'far' WHERE dataset_id = 1 AND item_id IN (SELECT item_id FROM"
            f" embstore.embeddings_small ORDER BY embedding <=> '{QUERY.tolist()}' DESC LIMIT 25)"
        )
    everywhere = search(store.database, QUERY, where="speaker = 'far'", k=25)
    assert (len(everywhere), everywhere.method) == (25, "index")
    assert everywhere[0].similarity < -0.5
    assert cosines(everywhere) == cosines(search(store.database, QUERY, where="speaker = 'far'", k=25, exact=True))
    more = search(store.database, QUERY, k=ITEMS + 100)
    assert (len(more), more.exact, more.method) == (ITEMS, True, "scan")
    assert "too large a part" in more.reason


def test_with_too_few_from_the_index_a_scan_answers(store: Store) -> None:
    store.index(FULL)
    store.bound(5)
    results = search(store.database, QUERY, where="position >= 2985 AND dataset = 'calls'")  # ten of 15 have no vector
    assert (len(results), results.method) == (5, "scan")
    assert results.reason == "the index gave 5 rows of 10 that are wanted"
    assert cosines(results) == pytest.approx(store.nearest(QUERY, PLACES >= 2985), abs=1e-6)


def test_a_reader_who_sees_one_percent_gets_k_rows(store: Store, people: People) -> None:
    """Row-level security filters after the index: it counts as a filter."""
    few = store.vectors[PLACES % 100 == 7]
    store._write("few", [entry(f"{i}.wav", "s1") for i in range(len(few))], few)
    store.index(FULL)
    team = people.team("guests")
    reader = people.connect(people.login("rea", team, "reader"))
    with store.database.begin() as connection:
        sharing.share(connection, catalog.get_dataset(connection, "few").dataset_id, "few", team, writing=False)
    results = search(reader, QUERY)
    assert (len(results), results.exact, results.method) == (10, True, "prefilter")
    assert cosines(results) == pytest.approx(store.nearest(QUERY, PLACES % 100 == 7), abs=1e-6)
    # In SQL too, and where the index is taken: a login's own settings let it go on until there are k.
    with reader.begin() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM embeddings_small").scalar_one() == len(few)
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off; SET LOCAL enable_sort = off")
        nearest = f"SELECT 1 - (embedding <=> '{QUERY.tolist()}') FROM embeddings_small ORDER BY 1 DESC LIMIT 10"
        by_index = f"SELECT 1 - (embedding <=> '{QUERY.tolist()}') FROM (SELECT embedding FROM embeddings_small"
        by_index += f" ORDER BY embedding <=> '{QUERY.tolist()}' LIMIT 10) n"
        plan = "\n".join(connection.exec_driver_sql(f"EXPLAIN {by_index}").scalars())
        assert "Order By: ((embedding)::vector" in plan
        found = connection.exec_driver_sql(by_index).scalars().all()
        assert list(found) == pytest.approx(list(connection.exec_driver_sql(nearest).scalars()), abs=1e-6)


def test_settings_are_as_before_and_the_users_own_are_kept(store: Store) -> None:
    store.index(FULL)
    with store.database.begin() as connection:
        connection.exec_driver_sql("SET LOCAL hnsw.ef_search = 7")
        connection.execute(
            text("SELECT * FROM embstore.nearest(CAST(:q AS vector), 'small')"), {"q": str(QUERY.tolist())}
        )
        names = ("hnsw.ef_search", "hnsw.iterative_scan", "enable_sort", "enable_seqscan")
        values = [connection.exec_driver_sql(f"SHOW {name}").scalar() for name in names]
    assert values == ["7", "off", "on", "on"]


HARMFUL = [
    "",
    ";",
    "true;",
    "true; DELETE FROM embstore.item",
    "true); DELETE FROM embstore.item; SELECT (true",
    "true); COMMIT; DELETE FROM embstore.item; SELECT (true",
    "true) OR (true",
    "false) UNION SELECT 1, 2 WHERE (true",
    "true) --",
    "true -- )\n) OR (true",
    "true /*",
    "true */ OR true",
    "true FROM pg_user --",
    "'",
    "E'\\'",
    "$$",
    "$1",
    "$4",
    ":k",
    "speaker",
    "1",
    "true, true",
    "SELECT true",
    "count(*) > 1",
    "(DELETE FROM embstore.item RETURNING true)",
    "(WITH gone AS (DELETE FROM embstore.item RETURNING 1) SELECT true)",
    "nextval('embstore.item_item_id_seq') > 0",
    "setval('embstore.item_item_id_seq', 1) > 0",
    "set_config('transaction_read_only', 'off', true) = 'off'",
    "lo_create(0) > 0",
    "query_to_xml('DELETE FROM embstore.item', true, true, '') IS NOT NULL",
    "claim_token IS NULL",
    "mtime_ns > 0",
    "pg_advisory_lock(1) IS NULL AND 1 / 0 = 1",
    "%s",
    "\\x",
]


@pytest.mark.parametrize("of", ["utterances", "speakers"])
def test_conditions_that_are_meant_to_harm_are_refused(store: Store, of: Any) -> None:
    before = ask(store.database, "SELECT count(*), max(item_id) FROM embstore.item")
    with store.database.begin() as connection:
        last = connection.exec_driver_sql("SELECT last_value FROM embstore.item_item_id_seq").scalar()
        centroids(connection, 1)
    for condition in HARMFUL:
        with pytest.raises(UsageError, match=r"^--where: ") as refused:
            search(store.database, QUERY, where=condition, of=of)
        assert "\n" not in str(refused.value)
    assert ask(store.database, "SELECT count(*), max(item_id) FROM embstore.item") == before
    assert ask(store.database, "SELECT last_value FROM embstore.item_item_id_seq") == [(last,)]


@pytest.mark.parametrize(
    "condition",
    [
        "speaker = 's1' OR speaker = 's2'",
        "true -- all of them",
        "/* all */ true",
        "path LIKE '%;%' OR path LIKE '%)%' OR path = '--' OR true",
        "$$;)$$ <> path",
        "items.speaker IN (SELECT 's' || generate_series(1, 2))",
        "position BETWEEN 0 AND 100 AND vanished_at IS NULL",
        "speaker SIMILAR TO 's(1|2)' AND (dataset, path) <> ('x', 'y')",
    ],
)
def test_conditions_that_look_odd_and_are_fine(store: Store, condition: str) -> None:
    results = search(store.database, QUERY, where=condition)
    assert len(results) == 10
    counted = ask(store.database, f"SELECT count(*) FROM items WHERE {condition}\n".replace(":", r"\:"))
    assert results.facts["items"] == counted[0][0]


def test_a_condition_or_that_never_ends_is_ended(store: Store) -> None:
    with pytest.raises(DatabaseError, match=r"took longer than 0.2 s: add --timeout"):
        search(store.database, QUERY, where="pg_sleep(1) IS NOT NULL", timeout=0.2)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_item_by_path_or_number_is_itself_left_out(store: Store, home: Path) -> None:
    keep = PLACES != 5
    for word in ("0005.wav", "6"):
        results = search(store.database, word, dataset="calls")
        assert (results.asked.kind, results.asked.item_id, results.asked.dataset) == ("item", 6, "calls")
        assert cosines(results) == pytest.approx(store.nearest(store.vectors[5], keep), abs=1e-6)
        assert 6 not in {hit.item_id for hit in results}


def test_a_speaker_is_the_mean_of_its_utterances_or_its_centroid(store: Store, home: Path) -> None:
    mine = store.vectors[: ITEMS - 10][3::SPEAKERS]
    results = search(store.database, "s3", dataset="calls")
    assert (results.asked.kind, results.asked.utterances) == ("speaker", len(mine))
    assert results.asked.vector == pytest.approx(mine.mean(axis=0), abs=1e-6)
    with store.database.begin() as connection:
        connection.exec_driver_sql("DELETE FROM embstore.speaker_change")
        centroids(connection, 5)
    assert search(store.database, "s3", dataset="calls").asked.utterances == 3
    near = search(store.database, "s3", of="speakers", k=3, query_dataset="calls")
    assert (len(near), near.exact) == (3, True)
    assert "s3" not in {hit.speaker for hit in near}
    some = search(store.database, QUERY, of="speakers", where="num_utterances > 3")
    assert {hit.speaker for hit in some} == {"s4", "s5"}
    assert [hit.num_utterances for hit in some] == [int(str(hit.speaker)[1:]) for hit in some]


def test_names_that_could_be_several_things(store: Store, home: Path) -> None:
    with store.database.begin() as connection:
        connection.exec_driver_sql("UPDATE embstore.item SET speaker = '0007.wav' WHERE item_id = 3")
    Path("0008.wav").write_bytes(b"RIFF")
    for word, words in (
        ("0007.wav", r"'0007.wav' is the name of an item and of a speaker: add --as item or --as speaker"),
        ("0008.wav", r"'0008.wav' is the name of a file and of an item: add --as file or --as item"),
        ("s1", r"speaker 's1' is in the datasets 'books', 'calls': add --from DATASET"),
        ("0009.wa", r"'0009.wa' is no file, and neither an item's path or id nor a speaker: check the name"),
        ("2995.wav", r"item '2995.wav' of dataset 'calls' has no vector by model 'small': 'embstore failures'"),
    ):
        with pytest.raises(UsageError, match=words):
            search(store.database, word)
    assert search(store.database, "0007.wav", kind="speaker").asked.utterances == 1
    assert search(store.database, "0008.wav", kind="item").asked.item_id == 9
    assert search(store.database, "s1", query_dataset="books").asked.utterances == 10
    assert search(store.database, "s1", dataset="calls").asked.dataset == "calls"


def test_stretches_of_one_file_are_told_apart_by_number(database: Database, home: Path) -> None:
    with database.begin() as connection:
        queue = fill(connection, [entry("a.wav", start=float(i), duration=1.0) for i in range(2)])
        token = take_lease(connection)
        keys = queue.claim(connection, token, 2)
        vectors.write(connection, queue, token, keys, np.eye(2, 3, dtype=np.float32))
    words = r"'a.wav' is 2 items: 1 \('calls', a.wav from 0 s\), 2 \('calls', a.wav from 1 s\); name one by its number"
    with pytest.raises(UsageError, match=words):
        search(database, "a.wav")
    assert search(database, str(keys[1])).asked.name == "a.wav from 1 s"


def test_arrays(store: Store, home: Path) -> None:
    np.save("v.npy", QUERY.astype(np.float64)[None])
    for query in (QUERY, QUERY.tolist(), QUERY * 1e20, "v.npy", Path("v.npy")):
        results = search(store.database, query, dataset="calls")
        assert cosines(results) == pytest.approx(store.nearest(QUERY, PLACES >= 0), abs=1e-6)
    np.save("object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez("several.npz", a=QUERY)
    for wrong, words in (
        (QUERY[:7], r"'vector' has 7 dimensions, the model's vectors have 8"),
        (np.zeros(8), r"holds only zeros"),
        (np.full(8, np.nan), r"values that are not finite"),
        (np.ones((2, 8)), r"one vector of numbers is needed"),
        (["a"] * 8, r"one vector of numbers is needed"),
        ("object.npy", r"'object.npy' is no array of numpy's"),
    ):
        with pytest.raises(UsageError, match=words):
            search(store.database, wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"'several.npz' holds several arrays"):
        search(store.database, "several.npz", kind="vector")
    with pytest.raises(UsageError, match=r"cannot read 'none.npy'"):
        search(store.database, "none.npy", kind="vector")


def test_what_is_wrong_is_said(store: Store) -> None:
    with pytest.raises(ModelError, match="no model 'smal' in the database: did you mean 'small'"):
        search(store.database, QUERY, model="smal")
    with pytest.raises(UsageError, match="no dataset 'cals': did you mean 'calls'"):
        search(store.database, QUERY, dataset="cals")
    with pytest.raises(UsageError, match="k is 1 or more"):
        search(store.database, QUERY, k=0)
    with pytest.raises(UsageError, match="leave --speaker out"):
        search(store.database, QUERY, of="speakers", speaker="s1")


def test_without_vectors_and_with_several_models(database: Database) -> None:
    with pytest.raises(UsageError, match="there are no vectors: type 'embstore extract PATH'"):
        search(database, [1.0, 0, 0])
    with database.begin() as connection:
        fill(connection, 2)
        fill(connection, 2, model=Facts(name="other"))
    with pytest.raises(UsageError, match="by several models, 'small', 'other': add --model NAME"):
        search(database, [1.0, 0, 0])
    assert len(search(database, [1.0, 0, 0], prefer_model="other")) == 0


SQL = "SELECT * FROM embstore.nearest(CAST(:q AS vector), :model, :k, in_dataset => :dataset)"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"q": "[1,2]"}, "a vector by model 'small' has 8 dimensions, this one has 2"),
        ({"q": None}, "has 8 dimensions, this one has 0"),
        ({"q": str([0] * 8)}, "a vector of zeros has no direction"),
        ({"model": "nope"}, "no model 'nope'"),
        ({"dataset": "nope"}, "no dataset 'nope'"),
        ({"k": 0}, "k is 0, and has to be 1 or more"),
    ],
)
def test_the_function_says_what_is_wrong(store: Store, values: dict[str, Any], words: str) -> None:
    right = {"q": str(QUERY.tolist()), "model": "small", "k": 10, "dataset": None}
    with pytest.raises(DatabaseError, match=words):
        ask(store.database, SQL, **right | values)


def test_a_file_that_is_an_item_is_looked_up_and_else_embedded(
    database: Database, settings: Settings, tmp_path: Path
) -> None:
    """With the model that needs no weights, on files that are made here."""
    from commands import write_tones

    from embstore.extract import devices, run
    from embstore.progress import display
    from embstore.recipes import find
    from embstore.sources import open_source

    folder = tmp_path / "sound"
    paths = write_tones(folder, 4, speakers=2)
    source = open_source(folder, extensions={".wav", ".flac"}, speaker_from="parent", root=None)
    with database.begin() as connection:
        recipe = find(connection, "statistical", {})
    dataset, _ = run.register_source(database, source, name="sound", media="audio")
    plan = devices.plan(1, "none")

    def show(pending: int) -> Any:
        return display(pending, (tmp_path / "log").open("w"), live=False)

    run.extract(database, settings, recipe, [dataset], plan, show=show, parameters={})
    looked_up = search(database, paths[0])
    assert (looked_up.asked.kind, len(looked_up)) == ("item", 3)
    copy = tmp_path / "copy.wav"
    copy.write_bytes(paths[0].read_bytes())
    embedder = lookup.Embedder()
    embedded = search(database, str(copy), embedder=embedder)
    assert (embedded.asked.kind, len(embedded)) == ("file", 4)
    assert embedded[0].path == paths[0].relative_to(folder).as_posix()
    assert embedded[0].similarity == pytest.approx(1)
    paths[0].write_bytes(paths[1].read_bytes())  # changed since
    assert search(database, paths[0], embedder=embedder).asked.kind == "file"
    (tmp_path / "noise.wav").write_bytes(b"no sound at all")
    with pytest.raises(UsageError, match=r"noise.wav' has no embedding by statistical: decode_error"):
        search(database, str(tmp_path / "noise.wav"))
    with pytest.raises(UsageError, match=r"there is no file 'nowhere.wav'"):
        search(database, Path("nowhere.wav"))
