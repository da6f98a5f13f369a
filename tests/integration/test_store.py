"""The Python API: what it reads, in which processes it may be used, and how it ends."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import PATIENCE, Watcher, install_probe, wait_until, write_tones
from helpers import entry, fill, finish_all, vectors_of
from loader_targets import Extracts, Vectors

import embstore
from embstore import errors
from embstore.db.engine import Database
from embstore.settings import Settings
from embstore.store import Store

ROOT = Path(__file__).parents[2]
PEOPLE = ("ann", "bob", "cy")


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    with embstore.connect(settings, progress=False) as store:
        yield store


@pytest.fixture
def filled(database: Database, store: Store) -> Store:
    """Dataset `calls`: 12 items of three speakers, whose order is not that of their ids; the last has no vector."""
    with database.begin() as connection:
        queue = fill(connection, [entry(f"{i:02}.wav", PEOPLE[i % 3]) for i in range(11)])
    finish_all(database, queue)
    with database.begin() as connection:
        fill(connection, [entry(f"{i:02}.wav", PEOPLE[i % 3]) for i in (5, *range(5), *range(6, 12))])
    return store


def test_vectors_in_order_whole_in_pieces_and_by_id(filled: Store) -> None:
    ids, vectors = filled.vectors("calls", "small", order_by="position")
    order = [6, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert ids.tolist() == order
    assert (vectors.dtype, vectors.shape) == (np.float32, (11, 3))
    assert (vectors == vectors_of(11)[np.array(order) - 1]).all()
    by_id = filled.vectors(order_by="item_id")
    assert (by_id.ids.tolist(), (by_id.vectors == vectors_of(11)).all()) == (list(range(1, 12)), True)
    for how in ("position", "item_id"):
        chunks = list(filled.chunks("calls", size=5, order_by=how))
        assert [len(chunk.ids) for chunk in chunks] == [5, 5, 1]
        assert (np.concatenate([c.vectors for c in chunks]) == filled.vectors(order_by=how).vectors).all()
    some = filled.vectors(ids=[9, 2])
    assert (some.ids.tolist(), (some.vectors == vectors_of(11)[[8, 1]]).all()) == ([9, 2], True)
    assert filled.vectors(ids=[]).vectors.shape == (0, 3)


def test_chunks_see_one_state_and_leave_room_for_others(filled: Store) -> None:
    chunks = filled.chunks(size=4)
    first = next(chunks)
    filled.sql("update item set position = 100 - position", write=True)
    rest = [chunk.ids.tolist() for chunk in chunks]
    assert [first.ids.tolist(), *rest] == [[6, 1, 2, 3], [4, 5, 7, 8], [9, 10, 11]]
    assert filled.vectors().ids.tolist()[:2] == [11, 10]


def test_as_arrow(filled: Store) -> None:
    table = filled.arrow("calls")
    assert table.column("item_id").to_pylist() == filled.vectors().ids.tolist()
    assert table.column("path").to_pylist()[0] == "05.wav"
    flat = table.column("embedding").combine_chunks().flatten().to_numpy()
    assert (flat.reshape(-1, 3) == filled.vectors().vectors).all()


def test_sql_reads_and_writes_and_binds(filled: Store) -> None:
    rows = filled.sql("select speaker, count(*) as n, '%s:x' as odd from items group by 1 order by 1")
    assert [tuple(row) for row in rows] == [(name, 4, "%s:x") for name in PEOPLE]
    assert (rows[0].speaker, rows.columns, rows.said) == ("ann", ("speaker", "n", "odd"), "SELECT 3")
    hostile = "ann' or true --"
    assert len(filled.sql("select from items where speaker = %(who)s", {"who": hostile})) == 0
    assert len(filled.sql("select from items where speaker = %s", ["bob"])) == 4
    vector = filled.sql("select embedding from embeddings_small where item_id = 1")[0].embedding
    assert (vector == vectors_of(11)[0]).all()
    for wrong, said in (
        ("delete from item", "read-only transaction: say write=True"),
        ("commit; delete from item", "read-only transaction"),
        ("selec 1", "syntax error"),
        ("select * from itemz", "does not exist"),
        (" -- nothing", "empty"),
    ):
        with pytest.raises(errors.UsageError, match=said):
            filled.sql(wrong)
    # The session is as it was, for whatever comes next on it.
    assert filled.sql("update item set speaker = 'dee' where speaker = 'cy'", write=True).said == "UPDATE 4"
    assert len(filled.sql("select from items where speaker = 'dee'")) == 4


def test_what_is_wrong_is_an_error_of_embstore(filled: Store, store: Store) -> None:
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: store.vectors("cals"), errors.UsageError, "did you mean 'calls'"),
        (lambda: store.vectors(model="smal"), errors.ModelError, "did you mean 'small'"),
        (lambda: store.vectors(ids=[1, 12]), errors.UsageError, "item 12 is none of the dataset"),
        (lambda: store.vectors(ids=[1, 1]), errors.UsageError, "named twice"),
        (lambda: store.vectors(order_by="path"), errors.UsageError, "position and item_id"),  # type: ignore[arg-type]
        (lambda: next(store.chunks(size=0)), errors.UsageError, "size is 1 or more"),
        (lambda: store.boundaries(), errors.UsageError, "no finished boundary run"),
        (lambda: store.boundaries(run=7), errors.UsageError, "no boundary run 7"),
        (lambda: store.extract("/no/such/folder"), errors.UsageError, "no folder or manifest"),
        (lambda: store.extract(workers=99), errors.UsageError, "DB_MAX_CONNECTIONS"),
        (lambda: embstore.connect(store.settings, home="x"), errors.UsageError, "not both"),
        (lambda: embstore.connect("postgresql://nobody@127.0.0.1:1/none"), errors.DatabaseError, "no database at"),
    ]
    for call, kind, said in calls:
        with pytest.raises(kind, match=said):
            call()


def test_a_store_can_be_pickled_and_shows_no_password(filled: Store) -> None:
    other = pickle.loads(pickle.dumps(filled))
    assert other.vectors().ids.tolist() == filled.vectors().ids.tolist()
    pids = {one.sql("select pg_backend_pid() as pid")[0].pid for one in (filled, other)}
    assert len(pids) == 2
    other.close()
    secret = Store(Settings(database_url="postgresql+psycopg2://ann:s3cret@db/x", home=Path("/")))
    assert "s3cret" not in repr(secret)
    assert "ann" in repr(secret)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_of_a_dataloader_have_connections_of_their_own(filled: Store, how: str) -> None:
    from torch.utils.data import DataLoader

    ids, vectors = filled.vectors()
    mine = filled.sql("select pg_backend_pid() as pid")[0].pid
    loader = DataLoader(Vectors(filled, ids.tolist()), batch_size=1, num_workers=2, multiprocessing_context=how)
    for _ in range(2):  # workers of the second round are forked from a process whose connection was used meanwhile
        found = list(loader)
        assert [int(one["id"]) for one in found] == ids.tolist()
        assert (np.concatenate([one["vector"].numpy() for one in found]) == vectors).all()
        pairs = {(int(one["worker"]), int(one["backend"])) for one in found}
        assert len({worker for worker, _ in pairs} - {os.getpid()}) == 2
        assert len({backend for _, backend in pairs} - {mine}) == 2
        assert filled.sql("select pg_backend_pid() as pid")[0].pid == mine
        if how == "spawn":
            break


def test_a_worker_of_a_dataloader_starts_no_workers(filled: Store) -> None:
    from torch.utils.data import DataLoader

    (said,) = next(iter(DataLoader(Extracts(filled), num_workers=1, multiprocessing_context="fork")))
    assert said.startswith("UsageError: a process that is itself a worker")


def test_from_a_thread(filled: Store) -> None:
    """Only the main thread hears signals, and a notebook may have its own reasons for another."""
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(filled.compute_centroids("calls")))
    thread.start()
    thread.join()
    assert done[0]["small"].statuses == {"calls": {"done": 3}}
    speakers, vectors, counts, stale = filled.centroids()
    assert (speakers, counts.tolist(), stale.tolist()) == (list(PEOPLE), [4, 4, 3], [False] * 3)
    ids, whole = filled.vectors()
    expected = [whole[(ids - 1) % 3 == place].mean(axis=0) for place in range(3)]
    np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-6)
    filled.sql("update item set speaker = 'cy' where item_id = 1", write=True)
    assert filled.centroids().stale.tolist() == [True, False, True]


SCRIPT = """
import embstore, sys
store = embstore.connect()
print("started", flush=True)
try:
    print(store.extract(sys.argv[1], model="probe", workers=2)["probe"].tally.done)
except KeyboardInterrupt:
    print("stopped")
print([(one.done, one.running) for one in store.status()])
"""


def _script(folder: Path, text: str, *words: str, **env: str) -> subprocess.Popen[str]:
    path = folder / "script.py"
    path.write_text(text)
    command = [sys.executable, str(path), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env, cwd=folder
    )


def test_a_script_needs_no_guard_and_ctrl_c_leaves_nothing_behind(tmp_path: Path, database_url: str) -> None:
    write_tones(tmp_path / "tones", 60)
    env = {"DATABASE_URL": database_url, "PYTHONPATH": str(install_probe(tmp_path / "site")), "PROBE_SLEEP": "0.1"}
    watcher = Watcher(database_url)
    watcher.hold_back(1)
    script = _script(tmp_path, SCRIPT, str(tmp_path / "tones"), **env)
    wait_until(lambda: watcher.count("done") > 0, "a vector")
    script.send_signal(signal.SIGINT)
    out, err = script.communicate(timeout=PATIENCE)
    assert "Traceback" not in err, err
    lines = out.splitlines()
    assert lines[:2] == ["started", "stopped"]
    done = watcher.count("done")
    assert 0 < done < 60
    assert lines[2] == f"[({done}, 0)]"
    watcher.let_go()
    script = _script(tmp_path, SCRIPT, str(tmp_path / "tones"), **env | {"PROBE_SLEEP": "0"})
    out, err = script.communicate(timeout=PATIENCE)
    assert out.splitlines() == ["started", str(60 - done), "[(60, 0)]"], err


ASLEEP = """
import embstore
store = embstore.connect()
try:
    QUERY
except KeyboardInterrupt:
    print(store.sql("select 1 as one")[0].one)
"""


@pytest.mark.parametrize(
    "query",
    [
        'store.sql("select pg_sleep(600)")',
        'store.search([1.0, 2.0, 3.0], where="(select pg_sleep(600)) is null", timeout=0)',
    ],
    ids=["sql", "search"],
)
def test_ctrl_c_ends_a_query_on_the_server(filled: Store, tmp_path: Path, database_url: str, query: str) -> None:
    watcher = Watcher(database_url)
    asleep = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    script = _script(tmp_path, ASLEEP.replace("QUERY", query), DATABASE_URL=database_url)
    wait_until(lambda: watcher.rows(asleep), "the query")
    script.send_signal(signal.SIGINT)
    out, err = script.communicate(timeout=PATIENCE)
    assert (out, err) == ("1\n", "")
    wait_until(lambda: not watcher.rows(asleep), "the query's end on the server")


READS = """
import embstore
store = embstore.connect()
try:
    store.vectors("calls", "small")
except KeyboardInterrupt:
    print(store.sql("select 1 as one")[0].one)
"""


def test_ctrl_c_ends_a_read_of_vectors_on_the_server(tmp_path: Path, filled: Store, database_url: str) -> None:
    watcher = Watcher(database_url)
    reading = "SELECT pid FROM pg_stat_activity WHERE starts_with(query, 'COPY') AND wait_event_type = 'Lock'"
    with filled.database.begin() as connection:  # it is in the middle of its work, as the vectors are locked
        connection.exec_driver_sql("LOCK embstore.embedding_1")
        script = _script(tmp_path, READS, DATABASE_URL=database_url)
        wait_until(lambda: watcher.rows(reading), "the read")
        script.send_signal(signal.SIGINT)
        out, err = script.communicate(timeout=PATIENCE)
        wait_until(lambda: not watcher.rows(reading), "the read's end on the server")  # it waits for the lock no more
    assert (out, err) == ("1\n", "")


def test_importing_it_imports_nothing() -> None:
    code = "import embstore, sys, json; print(json.dumps([len(dir(embstore)), *sys.modules]))"
    names, *modules = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert names == len(embstore.__all__) == 4
    assert not {"numpy", "sqlalchemy", "psycopg2", "torch", "click", "embstore.settings"} & set(modules)
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        embstore.conect  # type: ignore[attr-defined]  # noqa: B018


USER = """
from pathlib import Path
import numpy as np
from numpy.typing import NDArray
import embstore

def read(address: str) -> NDArray[np.float32]:
    with embstore.connect(address, home=Path("x")) as store:
        ids, vectors = store.vectors("speech", "resemblyzer", order_by="position")
        first: int = ids.tolist()[0]
        done: int = store.extract("x", workers=2)["resemblyzer"].tally.done + first
        best: float = max(hit.similarity for hit in store.search("annie", k=done))
        places: list[int] = store.boundaries().positions
        reveal_type(store.chunks())
        print(best, places, store.sql("select 1 as one")[0].one)
    return vectors

def refused(error: embstore.errors.UsageError, store: embstore.Store) -> None:
    store.vectors(order_by="size")
"""


def test_its_types_are_of_use(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    # An editable install is not found by mypy, and what it finds by a path it would check, too.
    flags = ["--strict", "--follow-imports=silent", "--config-file=", f"--cache-dir={tmp_path}"]
    command, env = [sys.executable, "-m", "mypy", *flags, "user.py"], os.environ | {"MYPYPATH": str(ROOT)}
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, env=env).stdout
    assert "fallback=embstore.vectors.Vectors" in said, said
    assert 'Argument "order_by" to "vectors" of "Store" has incompatible type' in said
    assert "Found 1 error in 1 file" in said
