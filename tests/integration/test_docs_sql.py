"""Every query of docs/sql.md runs on the sample speech, and says what the page says it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import text

from embstore.cli.main import embstore
from embstore.db.engine import Database

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
            answers[title] = list(connection.exec_driver_sql(sql).all())
    speakers = sorted(folder.name for folder in (ROOT / "examples" / "speech").iterdir() if folder.is_dir())
    files = len(list((ROOT / "examples" / "speech").rglob("*.mp3")))

    nearest = answers["the five utterances that sound most like this one"]
    assert len(nearest) == 5
    assert nearest[0].cosine == max(row.cosine for row in nearest)
    same = answers["how often an utterance's nearest neighbour is of the same speaker"][0]
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
