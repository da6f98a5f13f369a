"""`embstore models`: the list, and recipes that the database keeps under a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import write_tones
from conftest import Cli
from sqlalchemy import text

from embstore import vectors
from embstore.db import schema
from embstore.db.engine import Database
from embstore.queue import Queue, take_lease


def folder(place: Path, weights: bytes = b"weights") -> Path:
    """A model folder, as far as the recipe reads it."""
    place.mkdir(parents=True)
    (place / "config.yaml").write_text("model: ResNet34\nmodel_args: {feat_dim: 80, embed_dim: 256}\n")
    (place / "avg_model.pt").write_bytes(weights)
    return place


def add(cli: Cli, name: str, place: Path, *more: str) -> Any:
    return cli("models", "add", name, "--family", "wespeaker", "--model-dir", str(place), *more)


def line_of(result: Any, code: int) -> str:
    """The one line that a command which failed has said."""
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


def listed(cli: Cli) -> dict[str, Any]:
    return {one["name"]: one for one in json.loads(cli("models", "--json").stdout)}


def test_stored_and_installed(store: Database, cli: Cli) -> None:
    models = listed(cli)
    assert models["small"] == {
        "name": "small",
        "media": "audio",
        "dim": 3,
        "fingerprint": "0123456789abcdef",
        "vectors": 4,
        "family": None,
        "stored": True,
        "installed": False,
    }
    assert (models["statistical"]["stored"], models["statistical"]["installed"]) == (False, True)
    lines = [" ".join(line.split()) for line in cli("models").stdout.splitlines()]
    assert "small audio 3 4 0123456789ab stored, not installed here" in lines


def test_a_recipe_is_kept_under_a_name(database: Database, cli: Cli, tmp_path: Path) -> None:
    result = add(cli, "vox", folder(tmp_path / "resnet"), "--max-window", "60")
    assert result.exit_code == 0, result.output
    assert "model 'vox' (audio, 256 dimensions, fingerprint " in result.stdout
    assert listed(cli)["vox"]["family"] == "wespeaker"
    shown = json.loads(cli("models", "show", "vox", "--json").stdout)
    assert shown["options"] == {"model_dir": str(tmp_path / "resnet"), "max_window": "60"}
    assert shown["settings"]["max_window"] == 60
    assert (shown["vectors"], shown["views"], shown["weights_here"]) == (0, ["embstore.embeddings_vox"], "the same")
    assert "max_window=60" in cli("models", "show", "vox").stdout


def test_a_relative_folder_is_kept_as_an_absolute_one(
    database: Database, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "resnet")
    monkeypatch.chdir(tmp_path)
    assert add(cli, "vox", Path("resnet")).exit_code == 0
    monkeypatch.chdir("/")
    assert json.loads(cli("models", "show", "vox", "--json").stdout)["weights_here"] == "the same"


def test_other_weights_under_the_name_are_refused(database: Database, cli: Cli, tmp_path: Path) -> None:
    """When it is kept again, and when it is used: another folder, another option, a file that has changed."""
    first, same = folder(tmp_path / "first"), folder(tmp_path / "same")
    other = folder(tmp_path / "other", b"other weights")
    assert add(cli, "vox", first).exit_code == 0
    assert "other weights or settings" in line_of(add(cli, "vox", other), 2)
    assert "other weights or settings" in line_of(add(cli, "vox", first, "--model-option", "window=povey"), 2)
    assert "is replaced; its weights are the same" in add(cli, "vox", same, "--precision", "fp32").stdout
    shown = json.loads(cli("models", "show", "vox", "--json").stdout)
    assert shown["options"] == {"model_dir": str(same), "precision": "fp32"}
    write_tones(tmp_path / "sound", 1)
    used = ("extract", str(tmp_path / "sound"), "--model", "vox")
    assert "other weights or settings" in line_of(cli(*used, "--model-dir", str(other)), 2)
    (same / "avg_model.pt").write_bytes(b"changed")
    assert "other weights or settings" in line_of(cli(*used), 2)
    assert json.loads(cli("models", "show", "vox", "--json").stdout)["weights_here"].startswith("others")
    assert "dry run" in cli(*used, "--model-dir", str(first), "--dry-run").stdout


def test_weights_that_lie_elsewhere_on_this_machine(database: Database, cli: Cli, tmp_path: Path) -> None:
    place = folder(tmp_path / "there")
    assert add(cli, "vox", place).exit_code == 0
    moved = place.rename(tmp_path / "here")
    write_tones(tmp_path / "sound", 1)
    used = ("extract", str(tmp_path / "sound"), "--model", "vox")
    line = line_of(cli(*used), 2)
    assert f"'vox' is kept with model_dir={place}; give --model-dir if it lies elsewhere here" in line
    assert cli("models", "show", "vox").stdout.count("not usable: ") == 1
    assert cli(*used, "--model-dir", str(moved), "--dry-run").exit_code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("vox", "--family", "wespeakr", "--model-dir", "."), "Did you mean wespeaker?"),
        (("vox", "--family", "wespeaker"), "either model_dir="),
        (("vox", "--family", "statistical", "--precision", "fp32"), "has no option 'precision'"),
        (("vox", "--family", "statistical", "--model-option", "fp32"), "is not NAME=VALUE"),
        (("wespeaker", "--family", "statistical"), "is the name of a family of models"),
        (("resemblyzer:x", "--family", "statistical"), "is the name of a family of models"),
        ((" vox", "--family", "statistical"), "has spaces around it"),
        (("vox", "--model-dir", "."), "Missing option '--family'"),
    ],
)
def test_what_cannot_be_kept(database: Database, cli: Cli, words: tuple[str, ...], said: str) -> None:
    assert said in line_of(cli("models", "add", *words), 2)
    assert not any(one["stored"] for one in listed(cli).values())


def test_names_that_nobody_knows(database: Database, cli: Cli, tmp_path: Path) -> None:
    assert add(cli, "vox", folder(tmp_path / "resnet")).exit_code == 0
    write_tones(tmp_path / "sound", 1)
    line = line_of(cli("extract", str(tmp_path / "sound"), "--model", "vx"), 2)
    assert "there is no model 'vx'. Installed: " in line
    assert "kept in the database: 'vox'" in line
    for command in ("show", "remove"):
        assert "no model 'vx' in the database: did you mean 'vox'?" in line_of(cli("models", command, "vx"), 2)


def test_everybody_else_types_the_name_alone(database: Database, cli: Cli, tmp_path: Path) -> None:
    """A real run by a kept name; one without PATH then goes on with it."""
    write_tones(tmp_path / "sound", 4)
    assert cli("models", "add", "bands", "--family", "statistical").exit_code == 0
    result = cli("extract", str(tmp_path / "sound"), "--model", "bands")
    assert "'sound' by bands: 4 done" in result.stdout, result.output
    write_tones(tmp_path / "sound", 2, first=4)
    assert cli("extract", str(tmp_path / "sound"), "--model", "bands", "--dry-run").exit_code == 0
    with database.begin() as connection:
        connection.execute(text("UPDATE embstore.extraction SET status = 'pending' WHERE item_id = 1"))
        connection.execute(text("DELETE FROM embstore.embedding WHERE item_id = 1"))
    assert "'sound' by bands: 4 done" in cli("extract").stdout


def test_removing_takes_all_that_was_computed_and_nothing_else(store: Database, cli: Cli) -> None:
    assert cli("models", "add", "bands", "--family", "statistical").exit_code == 0
    assert cli("centroids").exit_code == 0
    assert "model 'small' has 4 vectors: add --with-vectors" in line_of(cli("models", "remove", "small"), 2)
    result = cli("models", "remove", "small", "--with-vectors")
    assert result.stdout == "model 'small' is removed, with 4 vectors\n", result.output
    assert {name for name, one in listed(cli).items() if one["stored"]} == {"bands"}
    with store.begin() as connection:
        for table in schema.metadata.sorted_tables:
            if "model_id" in table.c and table not in (schema.model, schema.run):
                assert connection.execute(table.select()).all() == [], table.name
        assert connection.execute(text("SELECT count(*) FROM embstore.item")).scalar() == 13
        # What was run stays on record.
        assert connection.execute(text("SELECT command, model FROM embstore.run")).all() == [("centroids", "small")]
        assert connection.execute(text("SELECT to_regclass('embstore.embeddings_small')")).scalar() is None
        assert connection.execute(text("SELECT to_regclass('embstore.embeddings_bands')")).scalar() is not None
    assert cli("models", "remove", "bands").stdout == "model 'bands' is removed\n"
    assert cli("models", "add", "small", "--family", "statistical").exit_code == 0


def test_what_is_in_use_is_not_removed(store: Database, cli: Cli) -> None:
    """By a run, by a view of somebody's own."""
    words = ("models", "remove", "small", "--with-vectors")
    with store.begin() as connection:
        connection.execute(text("CREATE VIEW public.mine AS SELECT * FROM embstore.embedding_1"))
    assert "drop it first: view mine depends on" in line_of(cli(*words), 2)
    with store.begin() as connection:
        connection.execute(text("DROP VIEW public.mine"))
        queue = Queue("embstore.extraction", "item_id", {"dataset_id": 1, "model_id": 1})
        token = take_lease(connection)
        keys = queue.claim(connection, token, limit=1)
    assert "a run is using model 'small': stop it first" in line_of(cli(*words), 2)
    with store.begin() as connection:
        vectors.write(connection, queue, token, keys, np.ones((1, 3), np.float32))
    assert cli(*words).exit_code == 0
