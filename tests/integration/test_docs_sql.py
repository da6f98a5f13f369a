"""Every query of docs/sql.md runs on the sample speech, and says what the page says it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import Facts, entry, fill, vectors_of
from sqlalchemy import make_url, text

from embstore import catalog, indexes, vectors
from embstore.cli.main import embstore
from embstore.db import embedded
from embstore.db.engine import Database
from embstore.queue import take_lease

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sql.md").read_text(encoding="utf-8")
QUERIES = re.findall(r"```sql\n-- ([^\n]+)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def filled(database: Database, database_url: str) -> Database:
    """The sample speech, embedded and averaged by the commands."""
    for words in (["extract", str(ROOT / "examples" / "speech")], ["centroids"]):
        result = CliRunner().invoke(embstore, [*words, "--database-url", database_url])
        assert result.exit_code == 0, result.output
    return database


def test_every_query_of_the_page_runs(filled: Database) -> None:
    assert len(QUERIES) == len(re.findall("```sql", PAGE)) >= 8
    answers: dict[str, list[Any]] = {}
    for title, sql in QUERIES:
        with filled.begin() as connection:
            connection.execute(text("SET LOCAL search_path = public, embstore"))
            answers[title] = list(connection.exec_driver_sql(sql.replace("%", "%%")).all())
    speakers = sorted(folder.name for folder in (ROOT / "examples" / "speech").iterdir() if folder.is_dir())
    files = len(list((ROOT / "examples" / "speech").rglob("*.mp3")))

    for title in ("the five utterances that sound most like this one", "by the index: the nearest in plain SQL"):
        assert [row.cosine for row in answers[title]] == sorted((row.cosine for row in answers[title]), reverse=True)
    others = answers[next(title for title in answers if title.startswith("the same among other speakers"))]
    assert len(others) == 5
    assert {row.speaker for row in others} <= set(speakers) - {"annie"}
    assert {row.is_exact for row in others} == {True}
    whose = answers["whose centroid is nearest to a vector"]
    assert (len(whose), whose[0].speaker) == (3, "annie")
    ranked = answers["by the index at half precision: forty candidates, ranked again in full"]
    assert [row.path for row in ranked] == [row.path for row in answers["by the index: the nearest in plain SQL"]]
    nearest = answers["the five utterances that sound most like this one"]
    assert len(nearest) == 5
    assert nearest[0].cosine == max(row.cosine for row in nearest)
    same = answers["by the index: how often an utterance's nearest neighbour is of the same speaker"][0]
    assert same.utterances == files
    assert same.same_speaker > 0.9
    assert sorted(row.speaker for row in answers["speakers by number of utterances"]) == speakers
    assert [tuple(row) for row in answers["how far everything is"]] == [("speech", "resemblyzer", "done", files)]
    assert answers["why items have no vector"] == []
    assert answers["items that a model has not embedded"] == []
    steps = answers["how alike each utterance is to the one before it: low where the speaker changes"]
    assert [row.position for row in steps] == list(range(files))

    least = answers["the speakers whose utterances are least alike"]
    assert [row.cohesion for row in least] == sorted(row.cohesion for row in least)
    assert all(row.least_like_the_others.startswith(f"{row.speaker}/") for row in least)
    near = answers["the speakers nearest to one"]
    assert {row.other_speaker for row in near} <= set(speakers) - {"annie"}
    assert [row.cosine for row in near] == sorted((row.cosine for row in near), reverse=True)
    outliers = answers["the utterances farthest from the centroid of their own speaker: likely label errors"]
    assert len(outliers) == 10
    assert outliers[0].cosine == min(row.cosine for row in outliers)
    titles = {title.partition(";")[0]: title for title in answers}
    pairs = answers[titles["pairs of speakers that look like one person"]]
    assert all(row.speaker < row.other_speaker and row.cosine >= 0.8 for row in pairs)
    voices = answers["whose voice is this? the nearest centroid to each utterance"]
    assert len(voices) == files
    assert sum(row.speaker == row.nearest for row in voices) > 0.9 * files
    assert answers["speakers without an up-to-date centroid, and why"] == []


@pytest.fixture
def many(database: Database) -> Database:
    """3,000 vectors under the names that the page uses, so that the planner has a choice to make."""
    entries = [entry(f"annie/{i:02}.mp3", f"s{i % 50}") for i in range(3000)]
    with database.begin() as connection:
        queue = fill(connection, entries, dataset="speech", model=Facts(name="resemblyzer", dim=256))
        token = take_lease(connection)
        keys = queue.claim(connection, token, len(entries))
        vectors.write(connection, queue, token, keys, vectors_of(len(keys), 256))
    return database


@pytest.mark.parametrize("precision", indexes.PRECISIONS)
def test_queries_that_say_so_go_by_the_index(many: Database, precision: indexes.Precision) -> None:
    with many.begin() as connection:
        model = catalog.get_model(connection, "resemblyzer")
        plan = indexes.plan(
            connection, model, "hnsw", precision, local=True, workers=0, options={"m": 8, "ef_construction": 16}
        )
    indexes.build(many, plan, lambda _: None)
    with many.autocommit() as connection:
        connection.exec_driver_sql("ANALYZE embstore.item, embstore.embedding_1, embstore.dataset")
    marked = {title: sql for title, sql in QUERIES if title.startswith("by the index")}
    assert len(marked) == 3
    for title, sql in marked.items():
        with many.begin() as connection:
            connection.execute(text("SET LOCAL search_path = public, embstore"))
            found = "\n".join(connection.exec_driver_sql("EXPLAIN " + sql.replace("%", "%%")).scalars())
        assert (f"Index Scan using {plan.name}" in found) == (("half" in title) == (precision == "half")), found


def test_programs_of_the_page(many: Database, database_url: str) -> None:
    """Its Python as it stands, and its lines for the shell."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    address = make_url(database_url).render_as_string(hide_password=False)
    spaces: list[dict[str, Any]] = [{}, {}]
    for block, names in zip(blocks, spaces, strict=True):
        exec(block.replace("postgresql+psycopg2://…", address), names)
    frame = spaces[0]["frame"]
    assert list(frame.columns) == ["path", "speaker", "embedding"]
    assert (len(frame), len(frame.embedding[0])) == (3000, 256)
    rows = spaces[1]["rows"]
    assert len(rows) == 5
    assert [row.cosine for row in rows] == sorted((row.cosine for row in rows), reverse=True)
    (shell,) = re.findall(r"```sh\n(.*?)```", PAGE[PAGE.index("psql:") :], re.DOTALL)
    folder = Path(sys.executable).parent
    environment = os.environ | {
        "DATABASE_URL": database_url,
        "PATH": f"{folder}:{embedded.binary('psql').parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(["bash", "-ec", shell], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words in ("vector(256)", "annie/04.mp3", "resemblyzer"):
        assert words in done.stdout
