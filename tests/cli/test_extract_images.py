"""Pictures through `embstore extract`: which model, which files, which words; and the questions of `--interactive`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Command, Start, Watcher, wait_until, write_tones
from pictures import BREAKS, picture, write_pictures

COUNT = 40


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of all formats by four people, some of them broken, and a text beside them."""
    write_pictures(tmp_path / "photos", COUNT, broken=True, people=4)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path / "photos"


def finish(command: Command, code: int) -> str:
    assert command.wait() == code, command.err
    return command.out


def test_a_folder_of_pictures_once_and_nothing_the_second_time(start: Start, photos: Path, watcher: Watcher) -> None:
    out = finish(start("extract", "photos", "--media", "image", "--workers", "2"), 1)
    assert f"dataset 'photos': {COUNT} items" in out
    assert "1 other file: no images by the name (.txt 1)" in out
    assert f"processed {COUNT} images in" in out
    assert " images a second, " in out
    assert " s an image" in out
    assert "'photos' by statistical-image: 37 done + 3 failed + 0 skipped + 0 running + 0 pending = 40 images" in out
    assert sorted(watcher.refused().values()) == sorted(BREAKS.values())
    assert "nothing to do: all images are embedded" in finish(start("extract", "photos", "--media", "image"), 1)
    rows = watcher.rows("SELECT DISTINCT speaker, vector_dims(embedding) FROM embstore.embeddings_statistical_image")
    assert sorted(rows) == [(f"person-{number}", 240) for number in range(4)]


def test_one_name_is_two_models_by_the_media(start: Start, photos: Path, tmp_path: Path, watcher: Watcher) -> None:
    write_tones(tmp_path / "sound", 3)
    finish(start("extract", "photos", "--model", "statistical", "--media", "image"), 1)
    finish(start("extract", "sound", "--model", "statistical"), 0)
    assert watcher.rows("SELECT name, media, dim FROM embstore.model ORDER BY 1") == [
        ("statistical", "audio", 80),
        ("statistical-image", "image", 240),
    ]
    # Nobody needs to say it twice: what is pending says of which media it is.
    watcher.rows("UPDATE embstore.extraction SET status = 'pending', error_code = NULL, error = NULL")
    watcher.rows("DELETE FROM embstore.embedding")
    out = finish(start("extract"), 1)
    assert "'photos' by statistical-image: 37 done" in out
    assert "'sound' by statistical: 3 done" in out
    assert "3 done" in finish(start("extract", "--dataset", "sound", "--model", "statistical"), 0)
    assert "37 done" in finish(start("extract", "--dataset", "photos", "--model", "statistical"), 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["photos"], "none of them .3gp"),
        (["photos"], "; for images, type --media image"),
        (["sound", "--media", "image"], "; for utterances, type --media audio"),
        (["photos", "--media", "image", "--model", "probe"], "model 'probe' embeds audio, not image: name another"),
        (["photos", "--media", "image", "--model", "statistcal"], "Did you mean statistical?"),
        (["photos", "--model", "statistical-image", "--media", "audio"], "embeds image, not audio"),
        (["photos", "--media", "picture"], "'picture' is not one of 'audio', 'image'"),
        (["--interactive"], "--interactive asks questions, and there is no terminal: type 'embstore extract PATH'"),
    ],
)
def test_a_wrong_word_is_one_line_that_helps(
    words: list[str], says: str, start: Start, photos: Path, tmp_path: Path, watcher: Watcher
) -> None:
    write_tones(tmp_path / "sound", 1)
    run = start("extract", *words)
    assert run.wait() == 2
    (line,) = run.err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert watcher.rows("SELECT count(*) FROM embstore.dataset") == [(0,)]


def test_a_dataset_is_of_one_media(start: Start, photos: Path, tmp_path: Path) -> None:
    write_tones(photos / "sound", 2)
    finish(start("extract", "photos", "--media", "image"), 1)
    run = start("extract", "photos", "--model", "statistical")
    assert run.wait() == 2
    assert "'photos' holds image, not audio: type --media image, or give --dataset another name" in run.err
    run = start("extract", "--dataset", "photos", "--model", "probe")
    assert run.wait() == 2
    assert "model 'probe' embeds audio, not image" in run.err


def test_auto_embed_is_all_that_is_pending(start: Start, photos: Path, tmp_path: Path, watcher: Watcher) -> None:
    write_pictures(tmp_path / "more", 5)
    write_tones(tmp_path / "sound", 2)
    assert "nothing is pending" in finish(start("extract", "--auto-embed"), 0)
    for folder, media in (("photos", "image"), ("more", "image"), ("sound", "audio")):
        finish(start("extract", folder, "--media", media, "--model", "statistical"), folder == "photos")
    # Registered since, and never asked of any model; then pending again, as after an interruption.
    watcher.rows("DELETE FROM embstore.extraction WHERE dataset_id = 2")
    watcher.rows("UPDATE embstore.extraction SET status = 'pending' WHERE dataset_id = 3")
    watcher.rows("DELETE FROM embstore.embedding WHERE dataset_id IN (2, 3)")
    out = finish(start("extract", "--auto-embed", "--media", "image", EMBEDDING_MODEL="statistical"), 1)
    assert "embedding 5 items by statistical-image" in out
    assert watcher.rows("SELECT count(*) FROM embstore.extraction WHERE status = 'pending'") == [(2,)]
    assert "'sound' by statistical: 2 done" in finish(start("extract", "--auto-embed"), 0)
    assert watcher.statuses() == {"done": 37 + 5 + 2, "failed": 3}


def test_a_manifest_of_pictures_names_who_is_shown(start: Start, tmp_path: Path, watcher: Watcher) -> None:
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "all.csv").write_text("image_path,person\n0.png,ann\n1.png,bob\n2.png,\n")
    run = start("extract", "all.csv", "--media", "image", "--json")
    (found,) = json.loads(finish(run, 0))
    assert (found["model"], found["embedded"]) == ("statistical-image", 3)
    rows = watcher.rows("SELECT path, speaker FROM embstore.embeddings_statistical_image ORDER BY position")
    assert rows == [("0.png", "ann"), ("1.png", "bob"), ("2.png", None)]


def answer(run: Command, question: str, keys: str) -> None:
    """Type as soon as the question stands there, and not before; then wait for the echo: questions may be alike."""
    wait_until(lambda: run.out.endswith(question) or run.process.poll() is not None, question)
    asked = run.out
    assert asked.endswith(question), asked
    run.type(keys)
    wait_until(lambda: run.out != asked, "what was typed to be echoed")


def test_the_interactive_way(start: Start, photos: Path, tmp_path: Path, watcher: Watcher) -> None:
    run = start("extract", "--interactive", terminal=True, DB_MAX_CONNECTIONS=5)
    answer(run, f"Folder or manifest [{tmp_path}]: ", "fotos\n")
    answer(run, f"Folder or manifest [{tmp_path}]: ", "photos\n")
    answer(run, "Model for images [statistical]: ", "statistcal\n")
    answer(run, "Model for images [statistical]: ", "probe\n")
    answer(run, "Model for images [statistical]: ", "\n")
    answer(run, "Workers, 1 to 4 [1]: ", "9\n")
    answer(run, "Workers, 1 to 4 [1]: ", "2\n")
    answer(run, "Start? [Y/n]: ", "\n")
    assert run.wait() == 1
    assert "no folder or manifest at" in run.out
    assert "Did you mean statistical?" in run.out
    assert "model 'probe' embeds audio, not image" in run.out
    assert f"dataset 'photos': {COUNT} items in {photos} ({COUNT} new)" in run.out
    assert "would embed what is pending of 'photos' by statistical-image on 2 workers (cpu)" in run.out
    assert "37 done + 3 failed + 0 skipped + 0 running + 0 pending = 40 images" in run.out
    assert watcher.statuses() == {"done": 37, "failed": 3}


def test_the_interactive_way_offers_what_is_set_and_does_nothing_without_a_yes(
    start: Start, photos: Path, watcher: Watcher
) -> None:
    words = ("extract", "photos", "--interactive", "--workers", "3")
    run = start(*words, terminal=True, EMBEDDING_MODEL="statistical-image")
    answer(run, f"Folder or manifest [{photos.name}]: ", "\n")
    answer(run, "Model for images [statistical-image]: ", "\n")
    answer(run, "Workers, 1 to 8 [3]: ", "\n")
    answer(run, "Start? [Y/n]: ", "n\n")
    assert run.wait() == 0
    assert "nothing was done" in run.out
    run = start(*words, terminal=True, EMBEDDING_MODEL="probe")
    answer(run, f"Folder or manifest [{photos.name}]: ", "\n")
    answer(run, "Model for images [statistical]: ", "\x03")  # Ctrl+C
    assert run.wait() == 130
    assert watcher.rows("SELECT count(*) FROM embstore.dataset") == [(0,)]
