"""What a scan makes of a dataset: new, changed, renamed, moved, vanished and come back; and two scans at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import ITEMS, Facts, ask, at_once, entry, fill, finish_all, scan, vectors_of, wait_until_blocked
from people import People

from embstore import catalog, vectors
from embstore.db.engine import Database
from embstore.errors import UsageError
from embstore.extract.run import register_source
from embstore.queue import Queue, Refusal, take_lease
from embstore.register import Registered, enqueue, register
from embstore.sources import Entry, open_source

BRIEF = "SELECT path, position, vanished_at IS NOT NULL FROM embstore.item ORDER BY position"
STATUS = "SELECT path, status FROM embstore.item JOIN embstore.extraction USING (dataset_id, item_id) ORDER BY path"


def done(database: Database, entries: Sequence[Entry]) -> Queue:
    """The dataset with all of these embedded."""
    with database.begin() as connection:
        queue = fill(connection, entries)
    finish_all(database, queue)
    return queue


def test_a_scan_that_finds_nothing_else_changes_nothing(database: Database) -> None:
    entries = [entry(f"{i}.wav", "ann", start=None if i % 2 else i / 3, duration=0.1 * i) for i in range(50)]
    queue = done(database, entries)
    versions = "SELECT xmin::text, item_id FROM embstore.item ORDER BY 2"
    before = ask(database, versions), ask(database, ITEMS)
    again = scan(database, entries)
    assert again == Registered(found=50, new=0, changed=0, vanished=0, vanished_before=0)
    assert again.unchanged == 50
    with database.begin() as connection:
        assert enqueue(connection, queue.scope["dataset_id"], queue.scope["model_id"]) == 0
    assert (ask(database, versions), ask(database, ITEMS)) == before


@pytest.mark.parametrize("change", [{"size": 1001}, {"mtime_ns": 2}, {"duration": 2.5}])
def test_a_changed_item_is_pending_again_and_its_vectors_are_gone(database: Database, change: dict[str, Any]) -> None:
    queue = done(database, [entry("a.wav"), entry("b.wav")])
    other = Facts(name="other", dim=5)
    with database.begin() as connection:
        both = fill(connection, [entry("a.wav"), entry("b.wav")], model=other)
        token = take_lease(connection)
        first, second = both.claim(connection, token, 2)
        vectors.write(connection, both, token, [first], vectors_of(1, 5))
        both.refuse(connection, token, [Refusal(second, "failed", "decode_error", "no header")])
    assert scan(database, [entry("a.wav", **change), entry("b.wav")]).changed == 1
    assert ask(database, STATUS) == [(p, s) for p, s in ask(database, STATUS) if (p == "a.wav") == (s == "pending")]
    left = "SELECT model_id, item_id FROM embstore.embedding"
    assert ask(database, left) == [(queue.scope["model_id"], second)]
    assert scan(database, [entry("a.wav", **change), entry("b.wav", **change)]).changed == 1
    assert (
        ask(database, "SELECT status, attempts, error_code, claim_token FROM embstore.extraction")
        == [("pending", 0, None, None)] * 4
    )
    finish_all(database, queue)
    assert ask(database, "SELECT count(*) FROM embstore.embedding") == [(2,)]


def test_a_scan_and_a_worker_that_is_just_writing_leave_no_vector_of_the_old_file(database: Database) -> None:
    with database.begin() as connection:
        queue = fill(connection, [entry("a.wav")])
        token = take_lease(connection)
        keys = queue.claim(connection, token, 1)
    with ThreadPoolExecutor(1) as thread:
        with database.begin() as connection:
            vectors.write(connection, queue, token, keys, vectors_of(1))
            scanned = thread.submit(scan, database, [entry("a.wav", size=7)])
            wait_until_blocked(database)
        assert scanned.result().changed == 1
    assert ask(database, "SELECT status FROM embstore.extraction") == [("pending",)]
    assert ask(database, "SELECT count(*) FROM embstore.embedding") == [(0,)]
    finish_all(database, queue)


def test_a_renamed_speaker_and_a_moved_item_keep_their_vectors(database: Database) -> None:
    done(database, [entry("a.wav", "ann"), entry("b.wav", None), entry("c.wav", "bob")])
    before = ask(database, "SELECT item_id, embedding::text FROM embstore.embedding ORDER BY 1")
    moved = scan(database, [entry("c.wav", "bob"), entry("a.wav", "anna"), entry("b.wav", "")])
    assert moved == Registered(found=3, new=0, changed=0, vanished=0, vanished_before=0)
    found = ask(database, "SELECT path, speaker, status FROM embstore.item JOIN embstore.extraction USING (item_id)"
                          " ORDER BY position")  # fmt: skip
    assert found == [("c.wav", "bob", "done"), ("a.wav", "anna", "done"), ("b.wav", None, "done")]
    assert ask(database, "SELECT item_id, embedding::text FROM embstore.embedding ORDER BY 1") == before


def test_the_vanished_are_kept_behind_the_others_and_may_come_back(database: Database) -> None:
    a, b, c, d = (entry(f"{name}.wav", name) for name in "abcd")
    queue = done(database, [a, b, c, d])
    assert scan(database, [b, d]) == Registered(found=2, new=0, changed=0, vanished=2, vanished_before=0)
    when = "SELECT vanished_at FROM embstore.item WHERE path = 'c.wav'"
    first = ask(database, when)
    assert ask(database, BRIEF) == [("b.wav", 0, False), ("d.wav", 1, False), ("a.wav", 2, True), ("c.wav", 3, True)]
    new = entry("0.wav")
    assert scan(database, [new, b, d, a]) == Registered(found=4, new=1, changed=0, vanished=0, vanished_before=1)
    assert [row[0] for row in ask(database, BRIEF)] == ["0.wav", "b.wav", "d.wav", "a.wav", "c.wav"]
    assert ask(database, when) == first
    with database.begin() as connection:
        assert enqueue(connection, queue.scope["dataset_id"], queue.scope["model_id"]) == 1
    assert [row[0] for row in ask(database, STATUS) if row[1] == "pending"] == ["0.wav"]
    assert ask(database, "SELECT count(*) FROM embstore.embedding") == [(4,)]
    assert scan(database, [replace(c, size=5)]).changed == 1
    assert [row[0] for row in ask(database, STATUS) if row[1] == "pending"] == ["0.wav", "c.wav"]


def test_a_file_that_is_missing_keeps_what_is_known_of_it(database: Database) -> None:
    """A manifest names it all the same; it is an item, and its size comes when the file does."""
    done(database, [entry("a.wav"), entry("b.wav", size=None, mtime_ns=None)])
    gone = scan(database, [entry("a.wav", size=None, mtime_ns=None), entry("b.wav", size=3, mtime_ns=3)])
    assert (gone.new, gone.changed, gone.vanished) == (0, 0, 0)
    assert ask(database, STATUS) == [("a.wav", "done"), ("b.wav", "done")]
    assert ask(database, "SELECT size, mtime_ns FROM embstore.item ORDER BY path") == [(1000, 1), (3, 3)]
    assert scan(database, [entry("a.wav"), entry("b.wav", size=4, mtime_ns=3)]).changed == 1


def test_a_file_that_was_missing_and_then_broken_is_tried_again_when_it_is_there(database: Database) -> None:
    with database.begin() as connection:
        queue = fill(connection, [entry("a.wav", size=None, mtime_ns=None)])
        token = take_lease(connection)
        (key,) = queue.claim(connection, token, 1)
        queue.refuse(connection, token, [Refusal(key, "failed", "decode_error", "half of it")])
    assert scan(database, [entry("a.wav")]).changed == 1
    assert ask(database, STATUS) == [("a.wav", "pending")]


def test_a_file_that_turns_up_is_tried_by_the_model_that_missed_it_alone(database: Database) -> None:
    done(database, [entry("a.wav", size=None, mtime_ns=None)])
    with database.begin() as connection:
        other = fill(connection, [entry("a.wav", size=None, mtime_ns=None)], model=Facts(name="other"))
        token = take_lease(connection)
        (key,) = other.claim(connection, token, 1)
        other.refuse(connection, token, [Refusal(key, "failed", "not_found", "no such file")])
    assert scan(database, [entry("a.wav")]) == Registered(1, 0, 0, 0, 0, back=1)
    assert ask(database, "SELECT model_id, status FROM embstore.extraction ORDER BY 1") == [(1, "done"), (2, "pending")]


def test_what_a_worker_did_not_find_is_pending_again_once_it_is_there(database: Database) -> None:
    a, b, _, d = entries = [entry(f"{name}.wav") for name in "abcd"]
    with database.begin() as connection:
        queue = fill(connection, entries)
        token = take_lease(connection)
        keys = queue.claim(connection, token, 4)
        codes = ["not_found", "not_found", "not_found", "decode_error"]
        queue.refuse(
            connection, token, [Refusal(key, "failed", code, "no") for key, code in zip(keys, codes, strict=True)]
        )
    assert scan(database, [a, replace(b, size=None, mtime_ns=None), d]) == Registered(3, 0, 0, 1, 0, back=1)
    assert dict(ask(database, STATUS)) == {
        "a.wav": "pending", "b.wav": "failed", "c.wav": "failed", "d.wav": "failed"
    }  # fmt: skip
    assert scan(database, entries, dry_run=True).back == 2
    assert scan(database, entries).back == 2
    assert scan(database, entries).back == 0
    assert [path for path, status in ask(database, STATUS) if status == "pending"] == ["a.wav", "b.wav", "c.wav"]
    finish_all(database, queue)


def test_a_role_whose_rows_are_checked_one_by_one_registers_too(database: Database, people: People) -> None:
    """COPY is refused where row-level security is at work."""
    entries = [entry(f"{i}.wav") for i in range(3)]
    writer = people.connect(people.login("ann", people.team("asr")))
    with writer.begin() as connection:
        dataset = catalog.ensure_dataset(connection, "calls", "audio", "/data/calls")
        assert register(connection, dataset.dataset_id, entries).new == 3
    assert scan(writer, entries).unchanged == 3
    assert scan(database, entries).unchanged == 3


def test_stretches_of_one_file_are_items_of_their_own(database: Database) -> None:
    stretches = [(None, None), (0.0, None), (0.0001, 1.5), (1.5, 0.1 + 0.2), (1e5, 1e-9)]
    entries = [entry("a.wav", start=start, duration=duration) for start, duration in stretches]
    done(database, entries)
    found = ask(database, "SELECT start, duration FROM embstore.item ORDER BY position")
    assert found == stretches
    assert scan(database, [*entries[1:], entry("a.wav", start=2)]) == Registered(5, 1, 0, 1, 0)
    with database.begin() as connection:
        ids = [row[0] for row in ask(database, "SELECT item_id FROM embstore.item ORDER BY item_id")]
        rows = catalog.items(connection, 1, ids)
    assert [(row.start, row.duration) for row in rows] == [*stretches, (2.0, None)]


@pytest.mark.parametrize("beside", [False, True])
def test_names_come_through_as_they_are(beside: bool, database: Database) -> None:
    names = [
        "a\tb",
        "a\\b",
        "a\\tb",
        "a\nb",
        "a\r\nb",
        "\\N",
        "\\.",
        "'",
        '"',
        ":name %s %(x)s {}",
        "\x01\x7f\x85\u2028",
    ]
    names += ["语音/ё/🎤", "caf\u00e9", "cafe\u0301", " lead and trail ", "a" * 2400]
    entries = [entry(name, name) for name in names] + [entry("no speaker", None), entry("empty", "")]
    expected = [(e.path, e.speaker or None) for e in entries]
    if beside:
        scan(database, [entry("there before")])
        entries = [*entries, entry("there before")]
        expected += [("there before", None)]
    assert scan(database, entries).new == len(names) + 2
    assert ask(database, "SELECT path, speaker FROM embstore.item ORDER BY position") == expected
    assert scan(database, entries).unchanged == len(entries)


def test_names_come_through_whatever_encoding_the_environment_asks_for(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    scan(database, [entry("语音.wav", "ё")])
    assert ask(database, "SELECT path, speaker FROM embstore.item") == [("语音.wav", "ё")]


@pytest.mark.parametrize("error", [UsageError("no audio files"), KeyboardInterrupt()])
def test_what_stops_a_scan_comes_out_as_it_is_and_nothing_is_registered(
    database: Database, error: BaseException
) -> None:
    def entries() -> Iterator[Entry]:
        yield entry("a.wav")
        raise error

    with pytest.raises(type(error)) as caught:
        scan(database, entries())
    assert caught.value is error
    assert ask(database, "SELECT count(*) FROM embstore.item") == [(0,)]
    assert scan(database, [entry("a.wav")]).new == 1


def test_a_dry_run_counts_and_leaves_nothing(database: Database, tmp_path: Path) -> None:
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "1.wav").write_bytes(b"RIFF")
    source = open_source(tmp_path, extensions=frozenset({".wav"}))
    everything = "SELECT (SELECT count(*) FROM embstore.dataset), (SELECT count(*) FROM embstore.item)"
    _, registered = register_source(database, source, name="calls", media="audio", dry_run=True)
    assert registered.new == 1
    assert ask(database, everything) == [(0, 0)]
    register_source(database, source, name="calls", media="audio")
    before = ask(database, ITEMS)
    (tmp_path / "ann" / "1.wav").write_bytes(b"RIFFRAFF")
    (tmp_path / "ann" / "0.wav").write_bytes(b"RIFF")
    _, registered = register_source(database, source, name="calls", media="audio", dry_run=True)
    assert (registered.new, registered.changed) == (1, 1)
    assert ask(database, ITEMS) == before


def test_a_name_stands_for_one_root_and_one_kind_of_media(database: Database) -> None:
    scan(database, [entry("a.wav")])
    for media, root, words in (("audio", "/data/other", "'/data/calls', not of '/data/other'"),
                               ("image", "/data/calls", "audio, not image")):  # fmt: skip
        with pytest.raises(UsageError, match=f"'calls' holds .*{words}.*--dataset"), database.begin() as connection:
            catalog.ensure_dataset(connection, "calls", media, root)
    assert ask(database, "SELECT name, media, root FROM embstore.dataset") == [("calls", "audio", "/data/calls")]


def test_registering_twice_at_once_makes_each_item_once(database: Database) -> None:
    entries = [entry(f"{i:03}.wav") for i in range(300)]
    results = at_once(*[lambda: scan(database, entries)] * 3)
    assert sorted(result.new for result in results) == [0, 0, 300]
    assert ask(database, "SELECT count(*), count(DISTINCT path), max(position) FROM embstore.item") == [(300, 300, 299)]

    def queue_all() -> int:
        with database.begin() as connection:
            return enqueue(connection, dataset_id, model_id)

    with database.begin() as connection:
        dataset_id = catalog.get_dataset(connection, "calls").dataset_id
        model_id = catalog.ensure_model(connection, Facts())
    assert sorted(at_once(queue_all, queue_all, queue_all)) == [0, 0, 300]


def test_a_second_model_gets_all_items_and_leaves_the_first_alone(database: Database) -> None:
    queue = done(database, [entry(f"{i}.wav") for i in range(5)])
    dataset_id = queue.scope["dataset_id"]
    with database.begin() as connection:
        second = catalog.ensure_model(connection, Facts(name="other", dim=7))
        assert enqueue(connection, dataset_id, second) == 5
        assert [(w.dataset.name, w.model) for w in catalog.open_work(connection)] == [("calls", "other")]
    found = ask(database, "SELECT model, status, items FROM embstore.progress ORDER BY model")
    assert found == [("other", "pending", 5), ("small", "done", 5)]
