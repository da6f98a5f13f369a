"""embstore rm and embstore forget, as their users type them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from helpers import SMALL, Facts, ask, at_once, entry, fill, vectors_of, wait_until_blocked
from people import People

from embstore import catalog, centroids, removal, vectors
from embstore.boundaries import job, labels
from embstore.db.engine import Database
from embstore.progress import SilentDisplay
from embstore.queue import end_lease, take_lease
from embstore.settings import Settings

Cli = Callable[..., Result]
CliAt = Callable[[str | None], Cli]

EVERYWHERE = ("item", "extraction", "embedding", "face", "centroid", "centroid_vector", "speaker_change",
    "boundary_run", "boundary", "segment", "boundary_score", "boundary_undo")  # fmt: skip
OTHER = Facts("other", 4, "fedcba98")


def rows(database: Database, name: str) -> dict[str, int]:
    """How many rows each table has of a dataset."""
    return {
        table: ask(
            database,
            f"SELECT count(*) FROM embstore.{table} JOIN embstore.dataset d USING (dataset_id) WHERE d.name = :name",
            name=name,
        )[0][0]
        for table in EVERYWHERE
    }


def embed(database: Database, name: str, people: str, model: Facts = SMALL) -> None:
    """A dataset in which each letter of `people` is one recording of that person, and alike for each person."""
    entries = [entry(f"{who}/{place:02}.wav", who) for place, who in enumerate(people)]
    with database.begin() as connection:
        queue = fill(connection, entries, dataset=name, model=model)
        token = take_lease(connection)
        keys = queue.claim(connection, token, 1000)
        voices = vectors_of(26, model.dim)
        made = np.stack([voices[ord(who) - ord("a")] for who in people]) + vectors_of(len(people), model.dim, 1) / 20
        vectors.write(connection, queue, token, keys, made.astype(np.float32))
        end_lease(connection, token)
        scope = {"d": queue.scope["dataset_id"], "m": queue.scope["model_id"]}
        connection.exec_driver_sql(
            "INSERT INTO embstore.face SELECT dataset_id, model_id, item_id, 1, 1, 1, 1, 1, 1 FROM embstore.extraction"
            " WHERE dataset_id = %(d)s AND model_id = %(m)s", scope,
        )  # fmt: skip


def average(database: Database, settings: Settings) -> None:
    """Centroids of everything."""
    with database.begin() as connection:
        pairs = catalog.embedded(connection, None, None, writing=True)
    for model, datasets in pairs:
        show = lambda _pending, _workers: SilentDisplay()  # noqa: E731
        options = centroids.Options()
        centroids.compute(database, settings, model, datasets, options, 1, show=show, parameters={})


def detect(database: Database, settings: Settings, name: str) -> int:
    """A boundary run with one segment for every three items."""
    with database.begin() as connection:
        dataset, model = catalog.get_dataset(connection, name), catalog.get_model(connection, "small")
    options = job.Options(num_speakers=3)
    _, runs = job.detect(database, settings, [dataset], model, options, 1, show=lambda _: SilentDisplay())
    return runs[dataset.name]


def positions(database: Database, name: str) -> list[tuple[Any, ...]]:
    return ask(database, "SELECT position, path FROM embstore.items WHERE dataset = :name ORDER BY 1", name=name)


@pytest.fixture
def filled(database: Database, settings: Settings) -> Database:
    """`one` and `two`, with all that is computed of them, and something of every table."""
    for name in ("one", "two"):
        embed(database, name, "aaabbbccc")
    embed(database, "one", "aaabbbccc", OTHER)
    average(database, settings)
    run = detect(database, settings, "one")
    with database.begin() as connection:
        labels.apply(connection, labels.get_run(connection, run))
    average(database, settings)
    detect(database, settings, "two")
    ask(database, "UPDATE embstore.item SET speaker = 'c' WHERE path = 'b/05.wav' RETURNING 1")
    assert all(rows(database, "one").values()), rows(database, "one")
    return database


def test_a_dataset_goes_whole_and_alone(filled: Database, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "BATCH", 4)
    before = rows(filled, "two")
    assert "add --yes" in cli("rm", "dataset", "one").stderr
    assert rows(filled, "one")["item"] == 9
    result = cli("rm", "dataset", "one", "--yes")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "dataset 'one', of the files in /data/one, which stay there:"
    for line in ("  9 vectors by other", "  9 vectors by small", "  18 faces", "  1 boundary run"):
        assert line in result.stdout.splitlines()
    assert result.stdout.endswith("dataset 'one' is removed, with 9 items\n")
    assert set(rows(filled, "one").values()) == {0}
    for table in EVERYWHERE:
        assert ask(filled, f"SELECT count(*) FROM embstore.{table}") == [(before[table],)], table
    (event,) = json.loads(cli("history", "--format", "json", "--limit", "1").stdout)
    assert (event["command"], event["dataset"], event["parameters"]) == ("rm dataset", "one", {"items": 9})
    assert "no dataset 'one': known are 'two'" in cli("rm", "dataset", "one").stderr


def test_a_removal_that_was_stopped_goes_on(filled: Database, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "BATCH", 4)

    def stop(_more: int) -> None:
        raise KeyboardInterrupt

    with filled.begin() as connection:
        dataset = catalog.get_dataset(connection, "one")
        ids = removal.choose(connection, dataset, ["a", "b"])
    with pytest.raises(KeyboardInterrupt):
        removal.remove_items(filled, dataset, ids, tick=stop)
    assert rows(filled, "one")["item"] == 5
    assert cli("rm", "items", "one", "--where", "path < 'c'", "--yes").exit_code == 0
    assert positions(filled, "one") == [(0, "c/06.wav"), (1, "c/07.wav"), (2, "c/08.wav")]
    with pytest.raises(KeyboardInterrupt):
        removal.remove_dataset(filled, dataset, tick=stop)
    assert cli("rm", "dataset", "one", "--yes").exit_code == 0
    assert set(rows(filled, "one").values()) == {0}


def test_items_by_path_folder_speaker_condition(filled: Database, cli: Cli) -> None:
    result = cli("rm", "items", "two", "a/01.wav", "b", "--yes")
    assert result.exit_code == 0, result.output
    assert "  4 items of 3 speakers" in result.stdout.splitlines()
    assert "  and 3 centroids will be stale" in result.stdout.splitlines()
    assert result.stdout.endswith("removed 4 items of dataset 'two'\n")
    left = ["a/00.wav", "a/02.wav", "c/06.wav", "c/07.wav", "c/08.wav"]
    assert positions(filled, "two") == list(enumerate(left))
    found = rows(filled, "two")
    assert (found["extraction"], found["embedding"], found["face"], found["boundary_score"]) == (5, 5, 5, 0)
    stale = "SELECT speaker FROM embstore.speaker_centroids WHERE dataset = 'two' AND stale ORDER BY 1"
    assert ask(filled, stale) == [("a",), ("b",), ("c",)]
    assert cli("rm", "items", "two", "--speaker", "a", "--where", "position = 1 -- why", "--yes").exit_code == 0
    assert [path for _, path in positions(filled, "two")] == [left[0], *left[2:]]
    assert "there are no such items" in cli("rm", "items", "two", "--vanished", "--yes").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dataset", "on"], "no dataset 'on': did you mean 'one'?"),
        (["items", "one", "a/10.wav"], "no item or folder 'a/10.wav' in dataset 'one': did you mean 'a/0"),
        (
            ["items", "one", "--speaker", "speaker_01"],
            "no speaker 'speaker_01' in dataset 'one': did you mean 'speaker_0",
        ),
        (["items", "one", "--where", "spaeker = 'a'"], "--where: the condition is not one expression"),
        (["items", "one", "--where", "true) or (true"], "--where: the condition is not one expression"),
        (["items", "one", "--where", "1 / (position - position) = 1"], "--where: division by zero"),
        (["items", "one"], "say which items: PATH, --speaker, --where or --vanished"),
        (["model", "smal"], "no model 'smal' in the database: did you mean 'small'?"),
    ],
)
def test_typos_of_rm(filled: Database, cli: Cli, words: list[str], said: str) -> None:
    result = cli("rm", *words, "--yes")
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert rows(filled, "one")["item"] == 9


def test_a_model_goes_with_all_of_it(filled: Database, cli: Cli) -> None:
    result = cli("rm", "model", "other", "--yes")
    assert result.stdout.splitlines()[0] == "model 'other', 9 vectors of 4 dimensions, with index and views"
    assert result.stdout.endswith("model 'other' is removed, with 9 vectors\n")
    assert ask(filled, "SELECT name FROM embstore.model") == [("small",)]
    assert rows(filled, "one")["embedding"] == 9


def test_nothing_goes_while_workers_are_at_it(filled: Database, cli: Cli) -> None:
    with filled.begin() as connection:
        queue = fill(connection, [entry("late.wav")], dataset="one")
        token = take_lease(connection)
        assert queue.claim(connection, token, 1)
    for words in (["rm", "dataset", "one"], ["rm", "items", "one", "a"], ["forget", "a"], ["rm", "model", "small"]):
        result = cli(*words, "--yes")
        assert result.exit_code == 2, result.output
        assert "'embstore extract' is at work on dataset 'one'" in result.stderr or "is using model" in result.stderr
    assert cli("rm", "items", "two", "a", "--yes").exit_code == 0
    with filled.begin() as connection:
        end_lease(connection, token)
    assert cli("rm", "dataset", "one", "--yes").exit_code == 0


def test_it_asks_and_takes_no_for_an_answer(filled: Database, start: Any) -> None:
    command = start("rm", "items", "two", "a", terminal=True)
    command.type("n\n")
    assert command.wait() == 0
    assert "Remove them? [y/N]" in command.out
    assert "nothing was removed" in command.out
    assert rows(filled, "two")["item"] == 9
    command = start("forget", "b", terminal=True)
    command.type("y\n")
    assert command.wait() == 0
    assert (rows(filled, "one")["item"], rows(filled, "two")["item"]) == (6, 7)


def named(database: Database, name: str) -> list[str]:
    """Every table and column in which a text is, or holds, this name."""
    columns = ask(
        database,
        "SELECT table_name, column_name FROM information_schema.columns c JOIN information_schema.tables t"
        " USING (table_schema, table_name) WHERE table_schema = 'embstore' AND table_type = 'BASE TABLE'"
        " AND c.data_type IN ('text', 'jsonb')",
    )
    return [
        f"{table}.{column}"
        for table, column in columns
        if ask(database, f"SELECT count(*) FROM embstore.{table} WHERE strpos({column}::text, :name) > 0", name=name)
        != [(0,)]
    ]


def test_a_person_is_forgotten_everywhere(database: Database, settings: Settings, cli: Cli) -> None:
    """By name, under a boundary run's label, and as part of other centroids."""
    who = "zacharias"
    for name in ("one", "two", "three"):
        embed(database, name, "aaazzzccc" if name != "three" else "aac")
    ask(
        database,
        "UPDATE embstore.item SET speaker = :who, path = :who || path WHERE speaker = 'z' RETURNING 1",
        who=who,
    )
    average(database, settings)
    run = detect(database, settings, "two")
    with database.begin() as connection:
        labels.apply(connection, labels.get_run(connection, run))
        theirs = catalog.get_dataset(connection, "two").dataset_id
    average(database, settings)  # `speaker_002` has their voice now
    assert set(named(database, who)) >= {"item.path", "item.speaker", "centroid.speaker", "boundary_undo.speaker"}

    dry = cli("forget", who, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert f"'{who}' in dataset 'two':" in dry.stdout
    assert "  some are called speaker_002 by now" in dry.stdout
    assert ask(database, "SELECT count(*) FROM embstore.item") == [(21,)]

    result = cli("forget", who, "--yes")
    assert result.exit_code == 0, result.output
    assert named(database, who) == []
    assert f"'{who}' is removed. Counted again: 0 rows in item, extraction, embedding, face" in result.stdout
    assert "searched for as small knew them from 'one': nearest is now " in result.stdout
    assert "vacuumed: the rows are out of the server's tables and indexes" in result.stdout
    assert "embstore extract' of that folder would register them anew" in result.stdout
    assert ask(database, "SELECT count(*) FROM embstore.item") == [(15,)]
    left = ask(database, "SELECT centroid_id FROM embstore.centroid_vector JOIN embstore.centroid USING"
        " (dataset_id, model_id, centroid_id) WHERE dataset_id = :d AND speaker = 'speaker_002'", d=theirs)  # fmt: skip
    assert left == []
    assert [place for place, _ in positions(database, "two")] == list(range(6))
    # Others have the labels of before back, and what was computed of all is computed again without them.
    assert cli("boundaries", "undo", str(run)).exit_code == 0
    average(database, settings)
    speakers = "SELECT DISTINCT speaker FROM embstore.speaker_centroids WHERE embedding IS NOT NULL ORDER BY 1"
    assert ask(database, speakers) == [("a",), ("c",)]
    again = cli("forget", who, "--yes")
    assert (again.exit_code, again.stderr) == (2, f"error: no speaker '{who}' in any dataset that you may see\n")
    assert who not in json.dumps(json.loads(cli("history", "--format", "json").stdout))


def test_forgetting_that_was_stopped_goes_on(database: Database, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from embstore import forget

    embed(database, "one", "aaazzzzzccc")
    monkeypatch.setattr(removal, "BATCH", 2)

    def stop(_more: int) -> None:
        raise KeyboardInterrupt

    with database.begin() as connection:
        traces = forget.find(connection, "z")
    with pytest.raises(KeyboardInterrupt):
        forget.forget(database, "z", traces, tick=stop)
    assert rows(database, "one")["item"] == 9
    assert cli("forget", "z", "--yes").exit_code == 0
    assert [place for place, _ in positions(database, "one")] == list(range(6))
    assert cli("forget", "q", "--yes").stderr == "error: no speaker 'q' in any dataset that you may see\n"


def test_what_comes_back_in_between_is_an_error(database: Database, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody registers the folder anew before the count."""
    from embstore import forget

    embed(database, "one", "aaz")
    removed = removal.remove_items

    def and_back(*arguments: Any, **more: Any) -> None:
        removed(*arguments, **more)
        with database.begin() as connection:
            fill(connection, [entry("a/00.wav", "a"), entry("a/01.wav", "a"), entry("z/02.wav", "z")], dataset="one")

    monkeypatch.setattr(forget.removal, "remove_items", and_back)
    result = cli("forget", "z", "--yes")
    assert result.exit_code == 3
    assert "something of 'z' is left, or has come back (1 in item" in result.stderr


def test_of_two_teams_each_forgets_what_is_its_own(database: Database, people: People, cli: Cli, cli_at: CliAt) -> None:
    a, b = people.team("a"), people.team("b")
    ann, bob, rea = (
        people.login("ann", a),
        people.login("bob", b),
        people.login("rea", a, "reader"),
    )
    for login, name in ((ann, "hers"), (bob, "his"), (bob, "secret")):
        embed(people.connect(login), name, "aazz")
    bob_types, ann_types, rea_types = (cli_at(people.address(login)) for login in (bob, ann, rea))
    assert bob_types("share", "his", "--with", a, "--read").exit_code == 0

    for words in (["rm", "dataset", "hers"], ["rm", "items", "hers", "a"], ["forget", "z"], ["rm", "model", "small"]):
        assert rea_types(*words, "--yes").exit_code == 2, words
    assert "can be removed by the writers of team" in ann_types("rm", "dataset", "his", "--yes").stderr
    assert "is shared for reading" in ann_types("rm", "items", "his", "a", "--yes").stderr
    assert "only the owner of the database removes one" in ann_types("rm", "model", "small", "--yes").stderr
    assert "is shared for reading" in ann_types("forget", "z", "--dataset", "his", "--yes").stderr
    assert "not in a dataset 'secret'" in ann_types("forget", "z", "--dataset", "secret", "--yes").stderr

    result = ann_types("forget", "z", "--yes")
    assert result.exit_code == 0, result.output
    assert "also in 'his' (2 items), which you may not change" in result.stdout
    assert "secret" not in result.stdout
    assert "the owner of the database can type in psql:\n  VACUUM (ANALYZE) embstore.boundary" in result.stdout
    # Those of others are found by the search, and said to be so near that they may be the same.
    assert "of 'z' in 'his'" in result.stdout
    assert "it may be the same person under another name" in result.stdout
    assert [rows(database, name)["item"] for name in ("hers", "his", "secret")] == [2, 4, 4]
    assert bob_types("share", "his", "--with", a, "--write").exit_code == 0
    assert ann_types("forget", "z", "--yes").exit_code == 0
    assert [rows(database, name)["item"] for name in ("hers", "his", "secret")] == [2, 2, 4]
    assert "can be removed by the writers of team" in ann_types("rm", "dataset", "his", "--yes").stderr
    assert bob_types("rm", "dataset", "his", "--yes").exit_code == 0
    assert cli("forget", "z", "--yes").exit_code == 0
    assert rows(database, "secret")["item"] == 2


def test_a_worker_that_is_just_writing_leaves_no_vector_behind(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may claim after the look at live workers."""
    monkeypatch.setattr(removal, "require_idle", lambda *_: None)
    with database.begin() as connection:
        queue = fill(connection, [entry("z/0.wav", "z"), entry("a/0.wav", "a")], dataset="one")
        dataset = catalog.get_dataset(connection, "one")
        token = take_lease(connection)
        keys = queue.claim(connection, token, 2)

    def write() -> None:
        with database.begin() as connection:
            vectors.write(connection, queue, token, keys, vectors_of(2))
            written.set()
            wait_until_blocked(database)

    def remove() -> None:
        written.wait()
        removal.remove_items(database, dataset, [keys[0]])

    written = threading.Event()
    at_once(write, remove)
    assert ask(database, "SELECT item_id FROM embstore.embedding") == [(keys[1],)]
    assert positions(database, "one") == [(0, "a/0.wav")]
