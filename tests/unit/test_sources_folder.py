from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from embstore.errors import UsageError
from embstore.sources import Entry, Source, natural_key, open_source
from embstore.sources.stats import Stats

AUDIO = frozenset({".wav", ".flac"})


def make(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"x" * len(path))
    return folder


def opened(folder: Path, speaker_from: str = "parent") -> tuple[Source, list[Entry]]:
    source = open_source(folder, extensions=AUDIO, speaker_from=speaker_from)
    return source, list(source.entries())


def paths(folder: Path) -> list[str]:
    return [entry.path for entry in opened(folder)[1]]


def test_files_and_folders_come_in_one_natural_order(tmp_path: Path) -> None:
    wanted = ["1.wav", "2/a.wav", "3.wav", "10/2.wav", "10/10.wav", "a/b/1.wav", "a/b2.wav", "b.wav"]
    assert paths(make(tmp_path, *reversed(wanted))) == wanted


def test_the_order_is_that_of_the_path_component_by_component(tmp_path: Path) -> None:
    found = paths(make(tmp_path, "a/1.wav", "A/2.wav", "a-b/1.wav", "a b/1.wav", "a1/1.wav", "ab.wav", "a.wav"))
    assert len(found) == 7
    assert found == sorted(found, key=lambda path: [natural_key(part) for part in path.split("/")])


def test_an_entry_holds_speaker_size_and_time(tmp_path: Path) -> None:
    make(tmp_path, "anna/1.wav")
    os.utime(tmp_path / "anna/1.wav", ns=(5, 1_700_000_000_123_456_789))
    source, entries = opened(tmp_path)
    assert entries == [Entry("anna/1.wav", "anna", None, None, 10, 1_700_000_000_123_456_789)]
    assert (source.kind, source.root, source.name) == ("folder", tmp_path.resolve(), tmp_path.name)


@pytest.mark.parametrize(
    ("speaker_from", "speakers"),
    [
        ("parent", ["a/1", "b/1", None]),
        ("parent-name", ["1", "1", None]),
        ("root", ["a", "b", None]),
        ("none", [None, None, None]),
        ("regex:([a-z])_", ["x", "y", None]),
        ("regex:(?P<speaker>^.)/(.)", ["a", "b", None]),
    ],
)
def test_speaker_from(tmp_path: Path, speaker_from: str, speakers: list[str | None]) -> None:
    make(tmp_path, "a/1/x_1.wav", "b/1/y_1.wav", "z.wav")
    assert [entry.speaker for entry in opened(tmp_path, speaker_from)[1]] == speakers


@pytest.mark.parametrize(
    ("speaker_from", "says"),
    [
        ("folder", "choose parent, parent-name, root, none"),
        ("regex:(", "not a regular expression"),
        ("regex:abc", "has 0 groups"),
        ("regex:(a)(b)", "has 2 groups"),
    ],
)
def test_a_bad_speaker_from_is_refused(tmp_path: Path, speaker_from: str, says: str) -> None:
    with pytest.raises(UsageError, match="speaker-from") as error:
        open_source(tmp_path, extensions=AUDIO, speaker_from=speaker_from)
    assert says in str(error.value)


def test_extensions_count_in_any_case_and_others_are_counted(tmp_path: Path) -> None:
    make(tmp_path, "1.WAV", "2.Flac", "notes.TXT", "b/more.txt", "README", "c.wav.bak")
    source, entries = opened(tmp_path)
    assert [entry.path for entry in entries] == ["1.WAV", "2.Flac"]
    assert source.ignored == {".txt": 2, "": 1, ".bak": 1}


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    source, entries = opened(make(tmp_path, "a.wav", "._a.wav", ".cache/b.wav", ".hidden.txt"))
    assert [entry.path for entry in entries] == ["a.wav"]
    assert not source.ignored
    assert not source.problems


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    data = make(tmp_path / "data", "anna/1.wav")
    elsewhere = make(tmp_path / "elsewhere", "2.wav", "deep/3.wav")
    (data / "ben").symlink_to(elsewhere)
    (data / "carl.wav").symlink_to(elsewhere / "2.wav")
    source, entries = opened(data)
    assert [entry.path for entry in entries] == ["anna/1.wav", "ben/2.wav", "ben/deep/3.wav", "carl.wav"]
    assert entries[3].size == len("2.wav")
    assert not source.problems


def test_a_folder_that_two_links_lead_to_is_read_twice(tmp_path: Path) -> None:
    data = make(tmp_path / "data", "a.wav")
    make(tmp_path / "shared", "s.wav")
    (data / "x").symlink_to(tmp_path / "shared")
    (data / "y").symlink_to(tmp_path / "shared")
    source, entries = opened(data)
    assert [entry.path for entry in entries] == ["a.wav", "x/s.wav", "y/s.wav"]
    assert not source.problems


def test_loops_of_links_end_and_are_reported(tmp_path: Path) -> None:
    make(tmp_path, "a/b/1.wav")
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
    (tmp_path / "a/all").symlink_to(tmp_path)
    (tmp_path / "self.wav").symlink_to(tmp_path / "self.wav")
    source, entries = opened(tmp_path)
    assert [entry.path for entry in entries] == ["a/b/1.wav"]
    assert sorted(problem.path for problem in source.problems) == ["a/all", "a/b/up", "self.wav"]


def test_a_link_to_nowhere_is_an_item_without_a_size(tmp_path: Path) -> None:
    make(tmp_path, "a.wav")
    (tmp_path / "b.wav").symlink_to(tmp_path / "not there.wav")
    source, entries = opened(tmp_path)
    assert entries[1] == Entry("b.wav", None, None, None, None, None)
    assert not source.problems


def test_a_pipe_is_no_recording(tmp_path: Path) -> None:
    os.mkfifo(make(tmp_path, "a.wav") / "pipe.wav")
    source, entries = opened(tmp_path)
    assert [entry.path for entry in entries] == ["a.wav"]
    assert [str(problem) for problem in source.problems] == ["pipe.wav: not a regular file"]


def test_a_name_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    make(tmp_path, "grün.wav", "名/1.wav")
    try:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.wav"))).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/c\xfe")).mkdir()
    source, entries = opened(tmp_path)
    assert [entry.path for entry in entries] == ["grün.wav", "名/1.wav"]
    shown = sorted(str(problem) for problem in source.problems)
    assert shown == [
        "b\\xff.wav: the path is not valid UTF-8; rename it",
        "c\\xfe: the path is not valid UTF-8; rename it",
    ]
    assert all(text.encode() for text in shown)


def test_folders_nested_too_deep_for_the_database_are_reported(tmp_path: Path) -> None:
    make(tmp_path, "a.wav")
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(300):  # no deeper: pytest removes it with a function that calls itself
        os.mkdir("name of a folder", dir_fd=here)
        below = os.open("name of a folder", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    source, entries = opened(tmp_path)
    assert [entry.path for entry in entries] == ["a.wav"]
    assert [problem.reason for problem in source.problems] == ["the path is longer than 2500 bytes; rename it"]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every account may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def unprivileged() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def locked(open_folder: Path) -> Iterator[Path]:
    make(open_folder, "a/1.wav", "b/2.wav", "c/3.wav")
    (open_folder / "b").chmod(0)
    yield open_folder
    for folder in (open_folder, open_folder / "b"):
        folder.chmod(0o755)


@pytest.mark.usefixtures("locked", "unprivileged")
def test_an_unreadable_folder_is_reported_and_the_rest_goes_on(locked: Path) -> None:
    source, entries = opened(locked)
    assert [entry.path for entry in entries] == ["a/1.wav", "c/3.wav"]
    assert [str(problem) for problem in source.problems] == ["b: unreadable folder: Permission denied"]


@pytest.mark.usefixtures("locked", "unprivileged")
def test_an_unreadable_root_is_refused(locked: Path) -> None:
    with pytest.raises(UsageError, match="/b' cannot be read: Permission denied"):
        open_source(locked / "b", extensions=AUDIO)


def test_nothing_found_says_where_what_and_how_many(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "b/c.pdf")
    with pytest.raises(UsageError) as error:
        opened(tmp_path)
    assert str(error.value) == f"nothing to embed under '{tmp_path}': 2 files looked at, none of them .flac .wav"


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no folder or manifest at '.*/nowhere'"):
        open_source(tmp_path / "nowhere", extensions=AUDIO)


def test_a_single_recording_points_to_its_folder(tmp_path: Path) -> None:
    make(tmp_path, "a.WAV", "b.txt")
    with pytest.raises(UsageError, match="is a single file; give its folder"):
        open_source(tmp_path / "a.WAV", extensions=AUDIO)
    with pytest.raises(UsageError, match=r"neither a folder nor a manifest \(.csv .tsv .jsonl .ndjson"):
        open_source(tmp_path / "b.txt", extensions=AUDIO)


def test_wav_scp_itself_points_to_its_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give the Kaldi folder that holds it"):
        open_source(make(tmp_path, "wav.scp") / "wav.scp", extensions=AUDIO)


def test_a_root_makes_no_sense_for_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--root"):
        open_source(make(tmp_path, "a.wav"), extensions=AUDIO, root=tmp_path)


def test_reading_a_second_time_gives_the_same(tmp_path: Path) -> None:
    source = open_source(make(tmp_path, "a.wav", "b.txt", "s/c.wav"), extensions=frozenset({"WAV"}))
    assert list(source.entries()) == list(source.entries())
    assert source.ignored == {".txt": 1}


def test_a_folder_of_more_files_than_are_looked_up_at_once(tmp_path: Path) -> None:
    wanted = [f"{number}.wav" for number in range(2500)]
    assert paths(make(tmp_path, *reversed(wanted))) == wanted


def test_threads_look_up_the_same_as_none(tmp_path: Path) -> None:
    names = [str(make(tmp_path, f"{number}.wav") / f"{number}.wav") for number in range(100)]
    names += [str(tmp_path / "missing"), str(tmp_path)]
    with Stats() as alone, Stats(threads=4) as together:
        assert alone(names) == together(names)
        assert alone(names)[-2:] == [(None, None), None]
        assert together([]) == []
