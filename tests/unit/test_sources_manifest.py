from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from embstore.errors import UsageError
from embstore.sources import Entry, Source, open_source

DATA = Path(os.environ.get("EMBSTORE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
AUDIO = frozenset({".wav"})


def manifest(folder: Path, text: str | bytes, name: str = "list.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def opened(path: Path, root: Path | None = None, speaker_from: str = "parent") -> tuple[Source, list[Entry]]:
    source = open_source(path, extensions=AUDIO, root=root, speaker_from=speaker_from)
    return source, list(source.entries())


def told(source: Source) -> list[str]:
    return [str(problem) for problem in source.problems]


def facts(entries: list[Entry]) -> list[tuple[object, ...]]:
    return [(entry.path, entry.speaker, entry.start, entry.duration) for entry in entries]


def test_csv_in_its_own_order(tmp_path: Path) -> None:
    (tmp_path / "b.wav").write_bytes(b"12345")
    path = manifest(
        tmp_path, "path,speaker,start,duration,text\nb.wav,ben,1.5,2,hm\na.wav,,,,\nb.wav,anna,4,,\n", "train.csv"
    )
    source, entries = opened(path)
    assert facts(entries) == [("b.wav", "ben", 1.5, 2.0), ("a.wav", None, None, None), ("b.wav", "anna", 4.0, None)]
    assert [entry.size for entry in entries] == [5, None, 5]
    assert entries[0].mtime_ns == (tmp_path / "b.wav").stat().st_mtime_ns
    assert (source.kind, source.root, source.name) == ("manifest", tmp_path.resolve(), "train")
    assert not source.problems


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.jsonl", "list.ndjson", "LIST.CSV"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_says_the_same(tmp_path: Path, name: str, packed: bool) -> None:
    rows = [{"path": "a b.wav", "speaker": "änna", "start": 0.25}, {"path": 'say "hi", now.wav', "speaker": "b"}]
    lines = [json.dumps(row) + "\r\n" for row in rows]
    if name.lower().endswith("csv"):
        lines = ["path,speaker,start\r\n", "a b.wav,änna,0.25\r\n", '"say ""hi"", now.wav",b,\r\n']
    if name.endswith("tsv"):
        lines = ["path\tspeaker\tstart\r\n", 'a b.wav\tänna\t"0.25"\r\n', 'say "hi", now.wav\tb\t\r\n']
    raw = ("\N{BYTE ORDER MARK}" + "".join(lines)).encode()
    path = manifest(tmp_path, gzip.compress(raw) if packed else raw, name + ".gz" if packed else name)
    source, entries = opened(path)
    assert facts(entries) == [("a b.wav", "änna", 0.25, None), ('say "hi", now.wav', "b", None, None)]
    assert not source.problems
    assert source.name.lower() == "list"


@pytest.mark.parametrize(
    "header",
    [
        "path,speaker,start,duration",
        "audio_filepath,speaker_id,offset,duration_s",
        " Filename , SPK,Start,dur",
        "wav,spk",
    ]
    + [f"{name},speaker" for name in ("audio", "file", "audio_path")],
)
def test_other_names_of_the_columns(tmp_path: Path, header: str) -> None:
    row = ["a.wav", "anna", "1", "2"][: header.count(",") + 1]
    _, entries = opened(manifest(tmp_path, f"{header}\n{','.join(row)}\n"))
    assert facts(entries) == [("a.wav", "anna", *([1.0, 2.0] if len(row) > 2 else [None, None]))]


def test_the_name_itself_goes_before_its_aliases(tmp_path: Path) -> None:
    _, entries = opened(manifest(tmp_path, "file,path\nwrong.wav,right.wav\n"))
    assert [entry.path for entry in entries] == ["right.wav"]


def test_a_manifest_without_a_path_column_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    path = manifest(tmp_path, "utterance,speaker\na.wav,anna\n")
    with pytest.raises(UsageError) as error:
        open_source(path, extensions=AUDIO)
    for part in (str(path), "utterance, speaker", "audio_filepath", "path"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"path\n", "nothing to embed in"),
        (b"path\n,\n", r"nothing to embed in .*line 2: the path is empty"),
        (b"path,speaker\na.wav,anna\nb\xff.wav,ben\n", "line 3 is not UTF-8"),
        ("path\na.wav\n".encode("utf-16"), "line 1 is not UTF-8"),
        (b'"path\na.wav\n', "header of .* cannot be read"),
    ],
)
def test_a_manifest_that_is_no_use_is_refused(tmp_path: Path, text: bytes, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        opened(manifest(tmp_path, text))


def test_broken_compression_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"path\n" + os.urandom(20_000).hex().encode() + b".wav\n" * 2)
    with pytest.raises(UsageError, match=r"list.csv.gz' cannot be read"):
        opened(manifest(tmp_path, whole[: len(whole) // 2], "list.csv.gz"))
    with pytest.raises(UsageError, match="cannot be read"):
        opened(manifest(tmp_path, b"path\na.wav\n", "list.csv.gz"))


@pytest.mark.parametrize("number", ["nan", "-1", "x", "inf", "1e999", "1,5"])
@pytest.mark.parametrize("column", ["start", "duration"])
def test_a_bad_number_costs_its_line_only(tmp_path: Path, number: str, column: str) -> None:
    source, entries = opened(manifest(tmp_path, f'path,{column}\na.wav,1\nb.wav,"{number}"\nc.wav, \n'))
    assert [entry.path for entry in entries] == ["a.wav", "c.wav"]
    assert told(source) == [f"list.csv line 3: {column} '{number}' is not a number of seconds, 0 or more"]


def test_problems_name_their_lines_in_order(tmp_path: Path) -> None:
    lines = [
        "path,speaker,start,duration",
        "a.wav,x,,",
        "a.wav,y,,3",
        ",x,,",
        "",
        "b.wav,x,1,0",
        "c.wav,x",
        "d.wav,x,,,9",
    ]
    lines += ["s/../a.wav,x,,", "folder,x,,", "e.wav,x,,,", "e.wav,x,2,"]
    (tmp_path / "folder").mkdir()
    source, entries = opened(manifest(tmp_path, "\n".join(lines)))
    assert [(entry.path, entry.start) for entry in entries] == [("a.wav", None), ("e.wav", None), ("e.wav", 2.0)]
    assert told(source) == [
        "list.csv line 3: 'a.wav' stands here twice; only the first counts",
        "list.csv line 4: the path is empty",
        "list.csv line 6: duration 0: there is nothing to embed",
        "list.csv line 7: 2 cells under a header of 4; quote a cell with a separator",
        "list.csv line 8: 5 cells under a header of 4; quote a cell with a separator",
        "list.csv line 9: 'a.wav' stands here twice; only the first counts",
        "list.csv line 10: 'folder' is not a regular file",
    ]


def test_a_quotation_mark_that_is_never_closed_does_not_swallow_the_rest_in_silence(tmp_path: Path) -> None:
    source, entries = opened(manifest(tmp_path, 'path,text\na.wav,yes\nb.wav,"no\nc.wav,yes\n'))
    assert [entry.path for entry in entries] == ["a.wav"]
    assert told(source) == ["list.csv line 3: broken CSV (up to line 4): unexpected end of data"]


def test_a_text_over_several_lines_is_fine_beside_the_path(tmp_path: Path) -> None:
    source, entries = opened(manifest(tmp_path, 'path,text\na.wav,"one\ntwo"\nb.wav,x\n"c\n.wav",x\n'))
    assert [entry.path for entry in entries] == ["a.wav", "b.wav"]
    assert [problem.line for problem in source.problems] == [5]


def test_jsonl_problems(tmp_path: Path) -> None:
    lines = ['{"path": "a.wav", "speaker": 7, "duration": 1}', "{", "[1]", '{"text": "x"}', '{"path": 3}', ""]
    lines += [
        '{"path": "b.wav", "speaker": ["x"]}',
        '{"path": "c\\u0000.wav"}',
        '{"path": "\\ud800.wav"}',
        "[" * 100_000,
    ]
    lines += [
        '{"path": "d.wav", "start": true}',
        '{"path": "e.wav", "start": NaN}',
        '{"path": "f.wav", "offset": null}',
    ]
    source, entries = opened(manifest(tmp_path, "\n".join(lines), "list.jsonl"))
    assert facts(entries) == [("a.wav", "7", None, 1.0), ("f.wav", None, None, None)]
    assert [problem.line for problem in source.problems] == [2, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    assert "".join(told(source)).encode()


def test_paths_are_put_under_the_root(tmp_path: Path) -> None:
    rows = ["./a.wav", "b//c.wav", "d/../e.wav", f"{tmp_path}/f.wav", f"{tmp_path}/g/./h.wav", "..i.wav", ".j.wav"]
    source, entries = opened(manifest(tmp_path, "path\n" + "\n".join(rows)))
    assert [entry.path for entry in entries] == ["a.wav", "b/c.wav", "e.wav", "f.wav", "g/h.wav", "..i.wav", ".j.wav"]
    assert not source.problems


@pytest.mark.parametrize("path", ["../a.wav", "a/../../b.wav", "/etc/passwd", "//etc/passwd", ".", "..", "/", "a/.."])
def test_paths_that_leave_the_root_are_refused(tmp_path: Path, path: str) -> None:
    source, entries = opened(manifest(tmp_path, f"path\nok.wav\n{path}\n"))
    assert [entry.path for entry in entries] == ["ok.wav"]
    assert len(source.problems) == 1
    assert source.problems[0].line == 3
    assert "--root" in source.problems[0].reason


def test_a_sibling_whose_name_begins_like_the_root_is_outside(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    source, _ = opened(manifest(tmp_path / "data", f"path\nok.wav\n{tmp_path}/data2/a.wav\n"))
    assert [problem.line for problem in source.problems] == [3]


def test_a_root_of_its_own(tmp_path: Path) -> None:
    for folder in ("lists", "audio", "elsewhere"):
        (tmp_path / folder).mkdir()
    path = manifest(tmp_path / "lists", f"path\n../audio/a.wav\nb.wav\n{tmp_path}/audio/c.wav\n/d.wav\n")
    source, entries = opened(path, root=tmp_path)
    assert source.root == tmp_path.resolve()
    assert [entry.path for entry in entries] == ["audio/a.wav", "lists/b.wav", "audio/c.wav"]
    assert [problem.line for problem in source.problems] == [5]

    path = manifest(tmp_path / "elsewhere", f"path\na.wav\n{tmp_path}/audio/c.wav\n../d.wav\n")
    source, entries = opened(path, root=tmp_path / "audio")
    assert [entry.path for entry in entries] == ["a.wav", "c.wav"]
    assert [problem.line for problem in source.problems] == [4]

    with pytest.raises(UsageError, match=r"--root .* is not a folder"):
        opened(path, root=path)


def test_the_whole_file_system_may_be_the_root(tmp_path: Path) -> None:
    path = manifest(tmp_path, f"path\n{tmp_path}/a.wav\nb.wav\n/\n//c.wav\n")
    (tmp_path / "a.wav").write_bytes(b"1")
    source, entries = opened(path, root=Path("/"))
    here = str(tmp_path.resolve())[1:]
    assert [(entry.path, entry.size) for entry in entries] == [
        (f"{here}/a.wav", 1),
        (f"{here}/b.wav", None),
        ("c.wav", None),
    ]
    assert [problem.line for problem in source.problems] == [4]


def test_absolute_paths_may_go_through_a_link_to_the_root(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    text = f"path\n{tmp_path}/link/a.wav\n{tmp_path}/real/b.wav\n"
    source, entries = opened(manifest(tmp_path / "link", text))
    assert [entry.path for entry in entries] == ["a.wav", "b.wav"]
    assert source.root == (tmp_path / "real").resolve()


def test_speaker_from_overrides_the_column(tmp_path: Path) -> None:
    path = manifest(tmp_path, "path,speaker\nx/1.wav,anna\n2.wav,ben\n")
    assert [entry.speaker for entry in opened(path)[1]] == ["anna", "ben"]
    assert [entry.speaker for entry in opened(path, speaker_from="parent-name")[1]] == ["x", None]
    assert [entry.speaker for entry in opened(path, speaker_from="none")[1]] == [None, None]


def test_more_lines_than_are_looked_up_at_once(tmp_path: Path) -> None:
    lines = "".join(f"{number}.wav\n" for number in range(5000))
    source, entries = opened(manifest(tmp_path, "path\n" + lines + "7.wav\n"))
    assert [entry.path for entry in entries] == [f"{number}.wav" for number in range(5000)]
    assert [problem.line for problem in source.problems] == [5002]


garbage = st.binary(max_size=300) | st.lists(
    st.sampled_from(
        [b"path", b"speaker", b"start", b",", b"\t", b'"', b"\n", b"\r", b"a.wav", b"1.5", b"\x00", b"\xff"]
    )
    | st.sampled_from(
        [b"{", b"}", b"[", b":", b'"path"', b'"start"', b"1e999", b"-", b"\\u0000", b"\\ud800", b"\xef\xbb\xbf"]
    )
    | st.binary(max_size=4),
    max_size=40,
).map(b"".join)


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.csv.gz"])
@example(text=b"path\n" + b"," * 140_000 + b'"' + b"x" * 140_000 + b"\na.wav\n")
@example(text=b'{"path": ' + b"9" * 5000 + b"}")
@example(text=b"path\na\x00.wav\n")
@given(text=garbage)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_raise_anything_but_a_usage_error(tmp_path: Path, name: str, text: bytes) -> None:
    try:
        source, entries = opened(manifest(tmp_path, text, name))
    except UsageError:
        return
    assert all(entry.path.encode() and not entry.path.startswith(("/", "../")) for entry in entries)
    assert all("\n" not in line and line.encode() for line in told(source))


def test_the_manifest_of_real_speech() -> None:
    path = DATA / "speech" / "manifest.csv"
    if not path.exists():
        pytest.skip(f"no test data at {DATA}; set EMBSTORE_TEST_DATA")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    source, entries = opened(path)
    assert not source.problems
    assert [(entry.path, entry.speaker, entry.duration) for entry in entries] == [
        (row["path"], row["speaker"], float(row["duration_s"])) for row in rows
    ]
    assert all(entry.size and entry.size > 44 for entry in entries)
