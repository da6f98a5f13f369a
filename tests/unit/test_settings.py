from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from embstore.errors import UsageError
from embstore.settings import Settings, default_home, load

REPOSITORY = Path(__file__).parents[2]


def dotenv(folder: Path, text: str) -> Path:
    (folder / ".env").write_text(text)
    return folder


def test_nothing_set_gives_the_defaults(tmp_path: Path) -> None:
    assert load({}, tmp_path) == Settings(None, 10, None, None, default_home({}))


def test_flags_beat_the_environment_and_that_beats_the_file(tmp_path: Path) -> None:
    dotenv(tmp_path, "DB_MAX_CONNECTIONS=11\nEMBEDDING_WORKERS=12\nEMBEDDING_MODEL=file\n")
    env = {"EMBEDDING_WORKERS": "22", "EMBEDDING_MODEL": "environment"}
    settings = load(env, tmp_path, embedding_model="flag")
    assert (settings.db_max_connections, settings.embedding_workers, settings.embedding_model) == (11, 22, "flag")


def test_an_empty_value_is_not_set(tmp_path: Path) -> None:
    dotenv(tmp_path, "DB_MAX_CONNECTIONS=20\nDATABASE_URL=\nEMBEDDING_MODEL\n")
    settings = load({"DB_MAX_CONNECTIONS": "", "EMBEDDING_WORKERS": " "}, tmp_path, embedding_model="")
    assert settings == Settings(None, 20, None, None, default_home({}))


def test_workers_may_be_auto_which_also_overrules(tmp_path: Path) -> None:
    dotenv(tmp_path, "EMBEDDING_WORKERS=4\n")
    assert load({"EMBEDDING_WORKERS": "auto"}, tmp_path).embedding_workers is None


def test_the_file_is_taken_at_its_word(tmp_path: Path) -> None:
    dotenv(
        tmp_path,
        "# a comment\r\n\r\nexport EMBEDDING_MODEL='my model' # why\r\n"
        "DATABASE_URL=postgresql://u:a$HOME${USER}b@h/db\r\nEMBEDDING_WORKERS=1\r\nEMBEDDING_WORKERS=2\r\n",
    )
    settings = load({"HOME": "/x", "USER": "y"}, tmp_path)
    assert settings.embedding_model == "my model"
    assert settings.database_url == "postgresql+psycopg2://u:a$HOME${USER}b@h/db"
    assert settings.embedding_workers == 2


@pytest.mark.parametrize("line", ["POSTGRES_PASSWORD=x", "PGHOST=h", "TEST_DATABASE_URL=x", "EMBSTORE_TEST_DATA=/d"])
def test_names_of_others_in_the_file_are_left_alone(tmp_path: Path, line: str) -> None:
    assert load({}, dotenv(tmp_path, f"{line}\nEMBEDDING_WORKERS=3\n")).embedding_workers == 3


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("EMBSTORE_HOUSE", "the settings are DATABASE_URL"),
        ("EMBEDDING_BATCH", "the settings are"),
        ("DB_HOST", "the settings are"),
        ("DATABASE_PASSWORD", "the settings are"),
        ("EMBEDDING_WORKER", "write EMBEDDING_WORKERS"),
        ("DATABSE_URL", "write DATABASE_URL"),
        ("database_url", "write DATABASE_URL"),
    ],
)
def test_an_unknown_name_in_the_file_is_refused_with_its_line(tmp_path: Path, name: str, hint: str) -> None:
    dotenv(tmp_path, f"# first\n\n\nEMBEDDING_MODEL='a\nb'\n\n{name}=geheim\n")
    with pytest.raises(UsageError) as error:
        load({}, tmp_path)
    assert f"{name} in '{tmp_path}/.env' line 7 is no setting" in str(error.value)
    assert hint in str(error.value)
    assert "geheim" not in str(error.value)


@pytest.mark.parametrize("name", ["EMBSTORE_HOUSE", "EMBEDDING_WORKER", "DATABSE_URL", "DB_MAX_CONNECTION"])
def test_an_unknown_name_in_the_environment_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} in the environment is no setting"):
        load({name: "1"}, tmp_path)


@pytest.mark.parametrize("name", ["DATABASE_URI", "DB_HOST", "EMBEDDING_MODEL_ID", "EMBSTORE_TEST_DATA", "HOME", ""])
def test_names_of_others_in_the_environment_are_left_alone(tmp_path: Path, name: str) -> None:
    assert load({name: "/x"}, tmp_path).db_max_connections == 10


@pytest.mark.parametrize("line", ["no sign of equality", "= 4", "EMBEDDING_MODEL='never closed"])
def test_a_broken_line_in_the_file_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(UsageError, match=r"/.env' line 2 is not NAME=value"):
        load({}, dotenv(tmp_path, f"A=1\n{line}\n"))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"A=\xff\n")
    with pytest.raises(UsageError, match="not UTF-8"):
        load({}, tmp_path)
    (tmp_path / ".env").unlink()
    (tmp_path / ".env").mkdir()
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        load({}, tmp_path)


@pytest.mark.parametrize("text", ["2", "10001", "-5", "ten", "1_0", "1.0", "٣٣", "9" * 5000])
def test_connections_out_of_bounds_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"DB_MAX_CONNECTIONS in the environment is .*whole number, 3 to 10000"):
        load({"DB_MAX_CONNECTIONS": text}, tmp_path)


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_workers_out_of_bounds_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"EMBEDDING_WORKERS, given as a flag, is .*1 or more, or auto"):
        load({}, tmp_path, embedding_workers=text)


def test_a_malformed_value_in_the_file_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"DB_MAX_CONNECTIONS in '.*/.env' line 3 is 'x'"):
        load({}, dotenv(tmp_path, "A=1\n\nDB_MAX_CONNECTIONS=x\n"))


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg2", "PostgreSQL"])
@pytest.mark.parametrize("rest", ["u:p%40w@h:5432/db", "h/db", "/db?host=/run/postgresql", "u@[::1]:5432/db", "h"])
def test_every_form_of_address_becomes_sqlalchemys(tmp_path: Path, scheme: str, rest: str) -> None:
    settings = load({"DATABASE_URL": f"{scheme}://{rest}"}, tmp_path)
    assert settings.database_url == f"postgresql+psycopg2://{rest}"


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u:geheim@h/db",
        "postgresql+asyncpg://u:geheim@h/db",
        "u:geheim@h/db",
        "host=h password=geheim",
        "postgresql://u:ge@heim@geheim/db",
        "postgresql://u:x@h:geheim/db",
        "postgresql://h:99999/geheim",
        "postgresql://u:geheim@h ost/db",
    ],
)
def test_another_address_is_refused_without_showing_it(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match="DATABASE_URL in the environment") as error:
        load({"DATABASE_URL": url}, tmp_path)
    assert "geheim" not in str(error.value)
    assert "postgresql://user:password@host:5432/name" in str(error.value)


def test_no_password_in_the_repr(tmp_path: Path) -> None:
    settings = load({"DATABASE_URL": "postgresql://u:geheim@h/db"}, tmp_path)
    assert "geheim" not in repr(settings)
    assert "geheim" not in str(settings)


def test_home_is_made_absolute(tmp_path: Path) -> None:
    env = {"HOME": "/home/anna"}
    assert load(env, tmp_path, home="~/embeddings").home == Path("/home/anna/embeddings")
    assert load(env, tmp_path, home="~").home == Path("/home/anna")
    assert load(env, tmp_path, home="../data").home == tmp_path.parent / "data"
    assert load({**env, "EMBSTORE_HOME": "/srv/e"}, tmp_path).home == Path("/srv/e")
    with pytest.raises(UsageError, match="EMBSTORE_HOME, given as a flag, names a user"):
        load(env, tmp_path, home="~nobody-of-this-name/x")


def test_the_default_home_is_one_that_the_servers_account_can_enter() -> None:
    program = (
        "import os; from embstore.settings import default_home as d; print(d({'HOME': '/home/a'}));"
        "os.geteuid() == 0 and os.seteuid(65534);"
        "print(d({'HOME': '/home/a'})); print(d({'HOME': '/home/a', 'XDG_DATA_HOME': '/x'}));"
        "print(d({'HOME': '/home/a', 'XDG_DATA_HOME': 'relative'}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.split()
    own = "/home/a/.local/share/embstore"
    assert found == ["/var/lib/embstore" if os.geteuid() == 0 else own, own, "/x/embstore", own]


def test_the_real_environment_and_folder(tmp_path: Path) -> None:
    dotenv(tmp_path, "EMBEDDING_MODEL=from-the-file\nEMBEDDING_WORKERS=2\n")
    program = "from embstore.settings import load; s = load(); print(s.embedding_model, s.embedding_workers, s.home)"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "EMBEDDING_WORKERS": "5", "EMBSTORE_HOME": "here"}
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    )
    assert found.stdout.split() == ["from-the-file", "5", str(tmp_path / "here")]


def test_the_env_file_of_the_repository_is_valid() -> None:
    if not (REPOSITORY / ".env").exists():
        pytest.skip("no .env beside the sources")
    assert load({}, REPOSITORY).db_max_connections >= 3
