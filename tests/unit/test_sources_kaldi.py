from __future__ import annotations

from pathlib import Path

import pytest

from embstore.errors import UsageError
from embstore.sources import Entry, Source, open_source


def kaldi(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("wav_scp", "wav.scp")).write_text(text)
    return folder


def opened(folder: Path, root: Path | None = None, speaker_from: str = "parent") -> tuple[Source, list[Entry]]:
    source = open_source(folder, extensions=frozenset({".wav"}), root=root, speaker_from=speaker_from)
    return source, list(source.entries())


def told(source: Source) -> list[str]:
    return [str(problem) for problem in source.problems]


def test_wav_scp_with_speakers(tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    (audio / "x").mkdir(parents=True)
    (audio / "x" / "two words.wav").write_bytes(b"123")
    scp = f"u2 {audio}/x/two words.wav\nu1 {audio}/y/1.wav\nu3\t{audio}/z.wav\n"
    source, entries = opened(kaldi(tmp_path / "train", wav_scp=scp, utt2spk="u1 anna\nu2 ben\n"))
    assert [(entry.path, entry.speaker, entry.size) for entry in entries] == [
        ("x/two words.wav", "ben", 3),
        ("y/1.wav", "anna", None),
        ("z.wav", None, None),
    ]
    assert (source.kind, source.root, source.name) == ("kaldi", audio.resolve(), "train")
    assert not source.problems


def test_segments_give_the_order_and_the_stretches(tmp_path: Path) -> None:
    folder = kaldi(
        tmp_path,
        wav_scp=f"r1 {tmp_path}/1.wav\nr2 {tmp_path}/2.wav\n",
        segments="b r2 10.1 10.3\na r1 0 2.5\n\nc r2 4 -1\n",
        utt2spk="a anna\nb ben\nc ben\n",
    )
    _, entries = opened(folder)
    assert [(entry.path, entry.speaker, entry.start, entry.duration) for entry in entries] == [
        ("2.wav", "ben", 10.1, 0.2),
        ("1.wav", "anna", 0.0, 2.5),
        ("2.wav", "ben", 4.0, None),
    ]


def test_problems_name_file_and_line(tmp_path: Path) -> None:
    scp = ["r1 1.wav", "r2 sph2pipe -f wav x.sph |", "r3", "r4 feats.ark:123", "r1 other.wav", "", "r5 5.wav"]
    segments = ["a r1 0 1", "b r2 0 1", "c r1 3 2", "d r1 x 2", "e r1 0", "f r1 0 1", "g r5 nan 1", "h r5 0 1"]
    source, entries = opened(kaldi(tmp_path, wav_scp="\n".join(scp), segments="\n".join(segments)))
    assert [entry.path for entry in entries] == ["1.wav", "5.wav"]
    assert [(problem.path, problem.line) for problem in source.problems] == [
        *(("segments", line) for line in (2, 3, 4, 5, 6, 7)),
        *(("wav.scp", line) for line in (2, 3, 4, 5)),
    ]
    assert "is a command, and embstore runs none from data" in told(source)[6]


def test_reading_a_second_time_gives_the_same(tmp_path: Path) -> None:
    source = open_source(kaldi(tmp_path, wav_scp="a 1.wav\nb cat x |\n"), extensions=frozenset({".wav"}))
    first, problems = list(source.entries()), list(source.problems)
    assert list(source.entries()) == first
    assert source.problems == problems
    assert len(problems) == 1


def test_a_relative_path_begins_at_the_folder_or_else_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kaldi(tmp_path / "recipe" / "data" / "train", wav_scp="a near.wav\nb data/far.wav\nc nowhere.wav\n")
    (folder / "near.wav").write_bytes(b"1")
    (tmp_path / "recipe" / "data" / "far.wav").write_bytes(b"22")
    monkeypatch.chdir(tmp_path / "recipe")
    source, entries = opened(folder)
    assert source.root == (tmp_path / "recipe" / "data").resolve()
    assert [(entry.path, entry.size) for entry in entries] == [
        ("train/near.wav", 1),
        ("far.wav", 2),
        ("train/nowhere.wav", None),
    ]


def test_a_root_of_its_own_refuses_what_lies_outside(tmp_path: Path) -> None:
    folder = kaldi(tmp_path / "k", wav_scp=f"a {tmp_path}/audio/x/1.wav\nb {tmp_path}/audio/../2.wav\nc /etc/passwd\n")
    (tmp_path / "audio").mkdir()
    source, entries = opened(folder, root=tmp_path / "audio")
    assert [entry.path for entry in entries] == ["x/1.wav"]
    assert [problem.line for problem in source.problems] == [2, 3]


def test_speaker_from_overrides_utt2spk(tmp_path: Path) -> None:
    folder = kaldi(tmp_path, wav_scp="a s1/1.wav\nb s2/1.wav\n", utt2spk="a anna\nb ben\n")
    assert [entry.speaker for entry in opened(folder, speaker_from="root")[1]] == ["s1", "s2"]


def test_a_folder_without_a_usable_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing to embed in the Kaldi folder .*wav.scp line 1: 'cat x \|'"):
        opened(kaldi(tmp_path, wav_scp="a cat x |\n"))


def test_unreadable_text_is_refused(tmp_path: Path) -> None:
    folder = kaldi(tmp_path, wav_scp="a 1.wav\n", utt2spk="a\n")
    with pytest.raises(UsageError, match="utt2spk' line 1 is not an utterance and its speaker"):
        opened(folder)
    (folder / "wav.scp").write_bytes(b"a 1.wav\nb \xff.wav\n")
    with pytest.raises(UsageError, match=r"wav.scp' line 2 is not UTF-8"):
        opened(folder)
