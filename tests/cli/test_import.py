"""embstore import embeddings: every format there and back, bit for bit; merging, resuming, models, other programs."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import duckdb
import kaldiio
import numpy as np
import pandas
import pytest
from click.testing import Result
from commands import Start, write_tones
from helpers import Facts, ask, entry, fill, scan, vectors_of
from odd_items import DIM, ENTRIES, MATRIX, WIDE
from people import People

from embstore import catalog, vectors
from embstore.db.engine import Database
from embstore.queue import take_lease
from embstore.settings import load

Cli = Callable[..., Result]
FORMATS = ["npz", "parquet", "csv", "kaldi", "pkl"]

ROWS = """
SELECT i.path, i.start, i.duration, i.speaker, encode(vector_send(e.embedding), 'hex')
FROM embstore.embedding e JOIN embstore.item i USING (dataset_id, item_id)
JOIN embstore.extraction x USING (dataset_id, model_id, item_id)
JOIN embstore.dataset d USING (dataset_id)
WHERE x.status = 'done' AND d.name = 'odd' ORDER BY i.position
"""


@pytest.fixture
def second(second_url: str) -> Iterator[Database]:
    database = Database(load(database_url=second_url), pool_size=2)
    yield database
    database.close()


@pytest.fixture
def typed(second_url: str, cli_at: Callable[[str | None], Cli]) -> Cli:
    """Type a command at the second database."""
    return cli_at(second_url)


def written(cli: Cli, form: str, folder: Path) -> Path:
    result = cli("export", "embeddings", str(folder), "--format", form)
    assert result.exit_code == 0, result.output
    return folder


def npz(path: Path, matrix: np.ndarray, paths: list[str], **more: object) -> str:
    np.savez(path, embedding=matrix, path=np.array(paths), **more)
    return str(path)


@pytest.mark.parametrize("form", FORMATS)
def test_there_and_back_bit_for_bit(
    odd: Database, cli: Cli, second: Database, typed: Cli, tmp_path: Path, form: str
) -> None:
    out = written(cli, form, tmp_path / "out")
    result = typed("import", "embeddings", str(out), "--model", "wide v2")
    assert result.exit_code == 0, result.output
    assert "importing 6 vectors by wide v2, a new model, into dataset 'odd' (/data/odd)" in result.stdout
    assert "  imported     6\n" in result.stdout
    before = ask(odd, ROWS)
    assert [bytes.fromhex(row[4])[4:] for row in before] == [row.astype(">f4").tobytes() for row in MATRIX]
    assert ask(second, ROWS) == before
    assert ask(second, "SELECT name, dim, fingerprint, settings, family FROM embstore.model") == [
        ("wide v2", DIM, WIDE.weights, {"a": 1}, None)
    ]
    assert ask(second, "SELECT position FROM embstore.item ORDER BY 1") == [(i,) for i in range(6)]
    # and out again, to the same files
    again = written(typed, form, tmp_path / "again")
    for path in out.rglob("*"):
        if path.is_file() and path.suffix in (".npz", ".parquet", ".csv", ".ark", ".pkl") and form != "npz":
            assert path.read_bytes() == (again / path.relative_to(out)).read_bytes(), path


def test_parquet_in_a_process_that_has_loaded_nothing_else(
    odd: Database, cli: Cli, start: Start, tmp_path: Path
) -> None:
    out = str(written(cli, "parquet", tmp_path / "out"))
    command = start("import", "embeddings", out, "--dataset", "again", "--root", "/data/odd")
    assert command.wait() == 0, command.err
    assert "  imported     6\n" in command.out


@pytest.mark.parametrize("form", FORMATS)
def test_imported_again_nothing_changes(odd: Database, cli: Cli, tmp_path: Path, form: str) -> None:
    out = written(cli, form, tmp_path / "out")
    versions = "SELECT xmin::text, ctid::text FROM embstore.embedding ORDER BY item_id"
    before = ask(odd, versions), ask(odd, ROWS)
    result = cli("import", "embeddings", str(out), "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["imported"], summary["there"], summary["replaced"]) == (0, 6, 0)
    assert (ask(odd, versions), ask(odd, ROWS)) == before


def test_a_tree_of_pickles_keeps_the_order_of_the_dataset(
    database: Database, cli: Cli, second: Database, typed: Cli, tmp_path: Path
) -> None:
    entries = [entry(f"{name}.wav", "ann") for name in ("z", "10", "2", "a", "m")]
    with database.begin() as connection:
        queue = fill(connection, entries, dataset="odd")
        token = take_lease(connection)
        vectors.write(connection, queue, token, queue.claim(connection, token, 5), vectors_of(5))
    assert typed("import", "embeddings", str(written(cli, "pkl", tmp_path)), "--model", "small").exit_code == 0
    assert [row[0] for row in ask(second, ROWS)] == ["z.wav", "10.wav", "2.wav", "a.wav", "m.wav"]
    assert ask(second, ROWS) == ask(database, ROWS)


def test_the_run_is_on_record_and_centroids_are_stale(odd: Database, cli: Cli, typed: Cli, tmp_path: Path) -> None:
    out = written(cli, "npz", tmp_path / "out")
    assert typed("import", "embeddings", str(out), "--model", "wide v2").exit_code == 0
    rows = json.loads(typed("sql", "select command, status, counts from embstore.run", "--format", "json").stdout)
    assert [row["command"] for row in rows] == ["import"]
    assert rows[0]["status"] == "done"
    assert rows[0]["counts"] == {"imported": 6, "replaced": 0, "there": 0, "refused": 0}
    result = typed("centroids")
    assert result.exit_code == 0, result.output
    found = typed("sql", "select speaker, num_utterances from speaker_centroids order by 1", "--format", "csv").stdout
    assert found.splitlines()[1:] == ["ann,2", "ann b,2", "böb,1"]


def test_another_vector_is_refused_unless_it_is_to_be_replaced(odd: Database, cli: Cli, tmp_path: Path) -> None:
    out = written(cli, "npz", tmp_path / "out") / "embeddings.npz"
    arrays = dict(np.load(out))
    arrays["embedding"][3, 2] = np.nextafter(arrays["embedding"][3, 2], np.float32(1))
    np.savez(out, **arrays)
    before = ask(odd, ROWS)
    result = cli("import", "embeddings", str(out))
    assert result.exit_code == 2
    assert result.stderr == (
        "error: 'embeddings.npz' row 4: 'ann/long talk.wav' has another vector in dataset 'odd': add --replace to take"
        " those of the file, or leave it as it is\n"
    )
    assert ask(odd, ROWS) == before
    dry = cli("import", "embeddings", str(out), "--replace", "--dry-run")
    assert "would import 1 vector by wide v2" in dry.stdout
    assert ask(odd, ROWS) == before
    result = cli("import", "embeddings", str(out), "--replace")
    assert result.exit_code == 0, result.output
    assert "  replaced     1\n  there before 5\n" in result.stdout
    assert bytes.fromhex(ask(odd, ROWS)[3][4])[4:] == arrays["embedding"][3].astype(">f4").tobytes()


def test_what_was_pending_or_had_failed_is_done_by_an_import(store: Database, cli: Cli, tmp_path: Path) -> None:
    """`calls`: items 0 to 3 done, 4 and 5 failed, 6 skipped, 7 running at a dead worker, 8 and 9 pending."""
    paths = [row[0] for row in ask(store, "SELECT path FROM embstore.item WHERE dataset_id = 1 ORDER BY position")]
    matrix = vectors_of(8)
    path = npz(tmp_path / "a.npz", matrix, [*paths[4:], "new/1.wav", "new/2.wav"], speaker=np.array(["x"] * 8))
    result = cli("import", "embeddings", path, "--dataset", "calls", "--model", "small")
    assert result.exit_code == 0, result.output
    rows = ask(
        store,
        "SELECT i.position, i.path, i.speaker, x.status, x.error_code, e.embedding::real[]"
        " FROM embstore.item i JOIN embstore.extraction x USING (dataset_id, item_id)"
        " JOIN embstore.embedding e USING (dataset_id, model_id, item_id) WHERE i.position > 3 ORDER BY 1",
    )
    assert [row[:2] for row in rows] == list(enumerate([*paths[4:], "new/1.wav", "new/2.wav"], start=4))
    assert {row[3:5] for row in rows} == {("done", None)}
    assert rows[0][2] == "ann"  # as it was registered
    assert rows[7][2] == "x"
    assert np.array([row[5] for row in rows], dtype=np.float32).tobytes() == matrix.tobytes()


def test_what_is_just_being_embedded_is_left_alone(store: Database, cli: Cli, tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", vectors_of(1), ["böb/07.wav"])
    with store.begin() as connection:
        queue_token = take_lease(connection)
        connection.exec_driver_sql(
            f"UPDATE embstore.extraction SET claim_token = {queue_token} WHERE status = 'running'"
        )
    result = cli("import", "embeddings", path, "--dataset", "calls", "--model", "small")
    assert result.exit_code == 2
    assert "'böb/07.wav' of dataset 'calls' is just being embedded by this model: wait for that run" in result.stderr


def test_imported_items_whose_files_turn_up_are_not_embedded_again(
    cli: Cli, database: Database, tmp_path: Path
) -> None:
    audio = tmp_path / "audio"
    paths = [path.relative_to(audio).as_posix() for path in write_tones(audio, 4, speakers=2)]
    matrix = vectors_of(3, dim=80)
    file = npz(tmp_path / "a.npz", matrix, paths[:3])
    result = cli("import", "embeddings", file, "--dataset", "tones", "--model", "statistical", "--root", str(audio))
    assert result.exit_code == 0, result.output
    result = cli("extract", str(audio), "--dataset", "tones", "--model", "statistical", "--gpus", "none")
    assert result.exit_code == 0, result.output
    assert "4 items in" in result.stdout
    assert "(1 new)" in result.stdout
    assert "embedding 1 item by statistical" in result.stdout
    stored = ask(
        database,
        "SELECT e.embedding::real[] FROM embstore.embedding e JOIN embstore.item i USING (dataset_id, item_id)"
        " WHERE i.size IS NOT NULL AND i.path = ANY (:paths) ORDER BY array_position(:paths, i.path)",
        paths=paths[:3],
    )
    assert np.array([row[0] for row in stored], dtype=np.float32).tobytes() == matrix.tobytes()


def test_a_later_change_of_an_imported_item_is_seen(cli: Cli, database: Database, tmp_path: Path) -> None:
    file = npz(tmp_path / "a.npz", vectors_of(2), ["a.wav", "b.wav"])
    flags = ("--dataset", "calls", "--model", "small", "--root", "/data/calls")
    assert cli("import", "embeddings", file, *flags).exit_code == 0
    assert scan(database, [entry("a.wav"), entry("b.wav")]).changed == 0
    assert scan(database, [entry("a.wav"), entry("b.wav", size=7)]).changed == 1


# Models


def test_a_known_fingerprint_is_that_model_whatever_it_is_called(
    odd: Database, cli: Cli, second: Database, typed: Cli, tmp_path: Path
) -> None:
    out = str(written(cli, "npz", tmp_path / "out"))
    with second.begin() as connection:
        catalog.ensure_model(connection, Facts(name="theirs", dim=DIM, weights=WIDE.weights))
    result = typed("import", "embeddings", out, "--model", "other")
    assert "the vectors are by model 'theirs', as this database calls it: leave --model out" in result.stderr
    assert typed("import", "embeddings", out).exit_code == 0
    assert ask(second, "SELECT name FROM embstore.model") == [("theirs",)]


def test_an_unknown_fingerprint_needs_a_name_and_another_ones_name_is_refused(
    odd: Database, cli: Cli, second: Database, typed: Cli, tmp_path: Path
) -> None:
    out = str(written(cli, "parquet", tmp_path / "out"))
    result = typed("import", "embeddings", out)
    assert result.exit_code == 2
    assert "a model that is not known here, 'wide v2', fingerprint 0123456789ab: add --model NAME" in result.stderr
    with second.begin() as connection:
        catalog.ensure_model(connection, Facts(name="mine", dim=DIM, weights="ff00"))
    result = typed("import", "embeddings", out, "--model", "mine")
    assert result.exit_code == 2
    assert "model 'mine' here has other weights" in result.stderr or "other weights or settings" in result.stderr
    assert "statistical" in typed("import", "embeddings", out, "--model", "statistical").stderr
    assert ask(second, "SELECT name FROM embstore.model") == [("mine",)]
    assert ask(second, "SELECT count(*) FROM embstore.dataset") == [(0,)]


def test_an_imported_model_cannot_embed_and_says_so(cli: Cli, database: Database, tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    write_tones(audio, 1)
    file = npz(tmp_path / "a.npz", vectors_of(1), ["a.wav"])
    flags = ("--dataset", "audio", "--model", "xvector", "--root", str(audio))
    assert cli("import", "embeddings", file, *flags).exit_code == 0
    result = cli("extract", str(audio), "--model", "xvector")
    assert result.exit_code == 2
    assert "'xvector'" in result.stderr
    assert "imported" in result.stderr


def test_a_model_that_is_installed_is_known_by_its_fingerprint(
    cli: Cli, database: Database, second: Database, typed: Cli, tmp_path: Path
) -> None:
    audio = tmp_path / "audio"
    write_tones(audio, 3)
    assert cli("extract", str(audio), "--model", "statistical", "--gpus", "none").exit_code == 0
    out = written(cli, "kaldi", tmp_path / "out")
    assert typed("import", "embeddings", str(out)).exit_code == 0
    assert ask(second, "SELECT name, family FROM embstore.model") == [("statistical", "statistical")]
    result = typed("extract", str(audio), "--model", "statistical", "--gpus", "none")
    assert "nothing to do: all utterances are embedded" in result.stdout


# Files of other programs


def test_what_a_foreign_file_does_not_say_is_asked_for_at_once(cli: Cli, database: Database, tmp_path: Path) -> None:
    result = cli("import", "embeddings", npz(tmp_path / "a.npz", vectors_of(1), ["a.wav"]))
    assert result.exit_code == 2
    assert "add --dataset NAME and --root FOLDER (of the files that were embedded, there or not) and --model NAME" in (
        result.stderr
    )


def test_parquet_by_pandas_and_duckdb(cli: Cli, database: Database, tmp_path: Path) -> None:
    matrix = vectors_of(4, 6)
    frame = pandas.DataFrame(
        {"wav": ["/corpus/a.wav", "/corpus/b.wav", "c.wav", "d.wav"], "spk": ["x", None, "x", "y"], "emb": list(matrix)}
    )
    frame[:2].to_parquet(tmp_path / "pandas.parquet")
    duckdb.sql(
        f"COPY (SELECT wav AS path, emb::DOUBLE[] AS vectors FROM frame OFFSET 2) TO '{tmp_path}/duckdb.parquet'"
    )
    flags = ("--dataset", "odd", "--model", "x", "--root", "/corpus")
    for name in ("pandas", "duckdb"):
        result = cli("import", "embeddings", str(tmp_path / f"{name}.parquet"), *flags)
        assert result.exit_code == 0, result.output
    rows = ask(database, ROWS)
    assert [row[0] for row in rows] == ["a.wav", "b.wav", "c.wav", "d.wav"]
    assert [row[3] for row in rows] == ["x", None, None, None]
    assert [bytes.fromhex(row[4])[4:] for row in rows] == [row.astype(">f4").tobytes() for row in matrix]


@pytest.mark.parametrize("text", [False, True])
def test_an_archive_by_kaldiio_with_a_data_folder(cli: Cli, database: Database, tmp_path: Path, text: bool) -> None:
    matrix = vectors_of(3, 4)
    keys = ["utt1", "utt2", "utt3"]
    spec = f"ark{',t' if text else ''},scp:{tmp_path}/xvector.ark,{tmp_path}/xvector.scp"
    with kaldiio.WriteHelper(spec) as writer:
        for key, row in zip(keys, matrix, strict=True):
            writer(key, row)
    (tmp_path / "utt2spk").write_text("utt1 ann\nutt2 bob\n")
    (tmp_path / "wav.scp").write_text("rec1 /corpus/1.wav\nrec2 /corpus/b/2.wav\n")
    (tmp_path / "segments").write_text("utt1 rec1 0.5 2.25\nutt2 rec1 3 -1\nutt3 rec2 0 1\n")
    result = cli("import", "embeddings", str(tmp_path), "--dataset", "odd", "--model", "x")
    assert result.exit_code == 0, result.output
    rows = ask(database, ROWS)
    assert [row[:4] for row in rows] == [
        ("1.wav", 0.5, 1.75, "ann"),
        ("1.wav", 3.0, None, "bob"),
        ("b/2.wav", 0.0, 1.0, None),
    ]
    found = np.array([np.frombuffer(bytes.fromhex(row[4])[4:], ">f4") for row in rows])
    assert (
        np.allclose(found, matrix, rtol=1e-4, atol=1e-4) if text else found.astype("f4").tobytes() == matrix.tobytes()
    )


def test_a_tree_of_another_pipeline(cli: Cli, database: Database, tmp_path: Path) -> None:
    """One with a dict each, one with bare arrays; the folders of the audio say who speaks."""
    tree = tmp_path / "tree"
    matrix = vectors_of(3, 4)
    for name, value in {
        "ann/1": {"embedding": matrix[0], "original_path": "/corpus/ann/1.wav", "speaker_id": "ann", "took": 0.1},
        "bob/2": matrix[1].reshape(1, -1),
        "bob/10": {"emb": matrix[2].astype(np.float64), "extra": [1, ("a", {"b": np.arange(3)})]},
    }.items():
        path = tree / f"{name}.pkl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(value, protocol=2))
    (tree / "extraction_stats.json").write_text('{"total": 3, "failed": 0}')
    result = cli("import", "embeddings", str(tree), "--dataset", "odd", "--model", "x", "--root", "/corpus")
    assert result.exit_code == 0, result.output
    rows = ask(database, ROWS)
    assert [(row[0], row[3]) for row in rows] == [("ann/1.wav", "ann"), ("bob/2", "bob"), ("bob/10", "bob")]
    assert [bytes.fromhex(row[4])[4:] for row in rows] == [row.astype(">f4").tobytes() for row in matrix]


def test_a_dataset_of_other_files_under_the_same_name_is_not_mixed_in(
    odd: Database, cli: Cli, second: Database, typed: Cli, tmp_path: Path
) -> None:
    out = str(written(cli, "npz", tmp_path / "out"))
    with second.begin() as connection:
        catalog.ensure_dataset(connection, "odd", "audio", "/elsewhere")
        catalog.ensure_model(connection, replace(WIDE))
    result = typed("import", "embeddings", out)
    assert result.exit_code == 2
    assert "dataset 'odd' here holds the files of '/elsewhere', that of the file those of '/data/odd'" in result.stderr
    assert typed("import", "embeddings", out, "--dataset", "odd").exit_code == 0
    assert [row[0] for row in ask(second, ROWS)] == [one.path for one in ENTRIES[:6]]


def test_centroids_and_boundaries_are_computed_not_imported(odd: Database, cli: Cli, tmp_path: Path) -> None:
    words = "computed and not imported: import the embeddings, then type 'embstore centroids' or 'boundaries'"
    for kind in ("centroids", "boundaries"):
        result = cli("import", kind, str(tmp_path))
        assert result.exit_code == 2
        assert words in result.stderr
    assert cli("centroids").exit_code == 0
    for form in FORMATS:
        out = tmp_path / form
        assert cli("export", "centroids", str(out), "--format", form).exit_code == 0
        result = cli("import", "embeddings", str(out), "--format", form)
        assert result.exit_code == 2
        assert words in result.stderr, result.stderr


# Teams


def test_a_member_of_a_team_imports_into_its_own_dataset(
    odd: Database, cli: Cli, cli_at: Callable[[str | None], Cli], people: People, tmp_path: Path
) -> None:
    out = str(written(cli, "npz", tmp_path / "out"))
    team = people.team("speech")
    ann, eve = people.login("ann", team), people.login("eve", people.team("other"))
    reader = people.login("rea", team, "reader")
    as_ann, as_eve, as_reader = (cli_at(people.address(login)) for login in (ann, eve, reader))
    result = as_ann("import", "embeddings", out, "--dataset", "mine")
    assert result.exit_code == 0, result.output
    count = "SELECT count(*) FROM embeddings_wide_v2 WHERE dataset = 'mine'"
    assert as_ann("sql", count, "--format", "csv").stdout.splitlines()[1] == "6"
    assert as_eve("sql", count, "--format", "csv").stdout.splitlines()[1] == "0"
    again = as_ann("import", "embeddings", out, "--dataset", "mine", "--json")
    assert json.loads(again.stdout)["there"] == 6
    assert as_ann("centroids", "--dataset", "mine").exit_code == 0
    result = as_reader("import", "embeddings", out, "--dataset", "mine")
    assert result.exit_code in (2, 3)
    assert result.stderr.startswith("error: ")
