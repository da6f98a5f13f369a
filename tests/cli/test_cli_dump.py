"""embstore db backup and restore."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

from embstore import catalog, vectors
from embstore.cli import dump
from embstore.cli.programs import programs
from embstore.db.engine import Database
from embstore.queue import take_lease
from embstore.settings import load

Cli = Callable[..., Result]
CliAt = Callable[[str | None], Cli]

TABLES = ("alembic_version", "dataset", "model", "run", "lease", "item", "extraction", "embedding", "embeddings_small")


def rows(database: Database) -> dict[str, list[str]]:
    """All that is stored, as text, and what the view shows of it."""
    with database.begin() as connection:
        return {
            table: list(connection.exec_driver_sql(f"SELECT t::text FROM embstore.{table} t ORDER BY 1").scalars())
            for table in TABLES
        }


@pytest.fixture
def target(bare_url: str) -> Iterator[Database]:
    """An empty database to restore into."""
    database = Database(load(database_url=bare_url))
    yield database
    database.close()


@pytest.fixture
def to(bare_url: str, cli_at: CliAt) -> Cli:
    """Type a command at `target`."""
    return cli_at(bare_url)


@pytest.fixture
def saved(store: Database, cli: Cli, tmp_path: Path) -> Path:
    file = tmp_path / "my store.dump"
    result = cli("db", "backup", str(file))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"saved 2 datasets, 13 items, 4 vectors to '{file}' (")
    return file


def test_all_of_it_comes_back(store: Database, saved: Path, target: Database, to: Cli) -> None:
    result = to("db", "restore", str(saved))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"restored 2 datasets, 13 items, 4 vectors from '{saved}'\n"
    assert rows(target) == rows(store)
    assert [len(rows(target)[table]) for table in ("item", "extraction", "embedding", "embeddings_small")] == [
        13,
        10,
        4,
        4,
    ]
    assert to("db", "check").exit_code == 0
    with target.begin() as connection:
        as_bytes = "SELECT count(public.embstore_bytes(embedding)) FROM embstore.embedding_1"
        assert connection.exec_driver_sql(as_bytes).scalar_one() == 4


def test_work_goes_on_in_a_restored_database(saved: Path, target: Database, to: Cli) -> None:
    to("db", "restore", str(saved))
    with target.begin() as connection:
        # Keys go on where they were, and the partition checks what comes in.
        assert catalog.ensure_dataset(connection, "more", "audio", "/data/more").dataset_id == 3
        vectors.create_partition(connection, 2, "other", 5)
        path = connection.exec_driver_sql("SHOW search_path").scalar()
        check = connection.exec_driver_sql(
            "SELECT count(*) FROM pg_constraint WHERE conname = 'embedding_1_vector' AND contype = 'c'"
        ).scalar()
    assert (path, check) == ("public, embstore", 1)


def test_into_a_migrated_but_empty_database(saved: Path, target: Database, to: Cli) -> None:
    to("db", "upgrade")
    assert to("db", "restore", str(saved)).exit_code == 0
    assert len(rows(target)["item"]) == 13


def test_what_a_database_holds_is_dropped_by_force_alone(store: Database, saved: Path, cli: Cli) -> None:
    before = rows(store)
    with store.begin() as connection:
        vectors.create_partition(connection, 7, "not in the backup", 4)
        catalog.ensure_dataset(connection, "later", "audio", "/data/later")
    result = cli("db", "restore", str(saved))
    assert result.exit_code == 2
    assert (
        "holds 3 datasets ('books', …): restore into an empty database, or add --force to drop what it holds"
        in result.stderr
    )
    assert len(rows(store)["dataset"]) == 3

    store.close()
    assert cli("db", "restore", str(saved), "--force").exit_code == 0
    assert rows(store) == before
    with store.begin() as connection:
        assert connection.exec_driver_sql("SELECT to_regclass('embstore.embedding_7')").scalar() is None


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.99])
def test_a_damaged_backup_changes_nothing(store: Database, saved: Path, cli: Cli, kept: float) -> None:
    before = rows(store)
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * kept)])
    store.close()
    result = cli("db", "restore", str(saved), "--force")
    assert result.exit_code in (2, 3)
    assert str(saved) in result.stderr
    assert result.stderr.count("\n") == 1
    assert rows(store) == before


def test_a_restore_that_the_server_stops_changes_nothing(
    store: Database, saved: Path, target: Database, to: Cli
) -> None:
    with target.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA embstore; CREATE TABLE embstore.kept (a int)")
        connection.exec_driver_sql(
            "CREATE FUNCTION public.stop() RETURNS event_trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'no views here'; END $$"
        )
        connection.exec_driver_sql(
            "CREATE EVENT TRIGGER stop ON ddl_command_start WHEN TAG IN ('CREATE VIEW') EXECUTE FUNCTION public.stop()"
        )
    result = to("db", "restore", str(saved))
    assert result.exit_code == 3
    assert "the backup was not restored: " in result.stderr
    assert "no views here" in result.stderr
    with target.begin() as connection:
        assert connection.exec_driver_sql("SELECT to_regclass('embstore.kept') IS NOT NULL").scalar()
        assert connection.exec_driver_sql("SELECT to_regclass('embstore.item') IS NULL").scalar()


@pytest.mark.parametrize("content", [b"", b"no dump at all", b"PGDMP and so on"])
def test_another_file_is_no_backup(to: Cli, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "other"
    file.write_bytes(content)
    result = to("db", "restore", str(file))
    assert (result.exit_code, result.stderr) == (2, f"error: '{file}' is no backup made by 'embstore db backup'\n")


def test_a_file_that_is_not_there(to: Cli) -> None:
    result = to("db", "restore", "/no/such.dump")
    assert (result.exit_code, result.stderr) == (2, "error: cannot read '/no/such.dump': No such file or directory\n")


def test_a_newer_embstores_backup_is_refused(database: Database, to: Cli, tmp_path: Path) -> None:
    with database.begin() as connection:
        connection.exec_driver_sql("UPDATE embstore.alembic_version SET version_num = '9999'")
    file = tmp_path / "newer.dump"
    dump.backup(database, programs(database), file, force=False)
    result = to("db", "restore", str(file))
    assert result.exit_code == 3
    assert f"'{file}' was made by a newer embstore (revision 9999, this one knows " in result.stderr


def test_not_while_workers_are_at_it(store: Database, saved: Path, cli: Cli) -> None:
    with store.begin() as connection:
        take_lease(connection)
    result = cli("db", "restore", str(saved), "--force")
    assert result.exit_code == 2
    assert "workers are using the database (" in result.stderr


def test_a_backup_replaces_another_by_force_alone(saved: Path, cli: Cli) -> None:
    saved.write_bytes(b"precious")
    result = cli("db", "backup", str(saved))
    assert result.exit_code == 2
    assert result.stderr == f"error: '{saved}' exists: choose another name, or add --force to replace it\n"
    assert saved.read_bytes() == b"precious"
    assert cli("db", "backup", str(saved), "--force").exit_code == 0
    assert saved.read_bytes().startswith(b"PGDMP")
    assert list(saved.parent.iterdir()) == [saved]


def test_a_backup_that_fails_leaves_no_file(bare_url: str, cli_at: CliAt, cli: Cli, tmp_path: Path) -> None:
    result = cli_at(bare_url)("db", "backup", str(tmp_path / "a.dump"))
    assert (result.exit_code, result.stderr) == (3, "error: the database is not migrated: type 'embstore db upgrade'\n")
    result = cli("db", "backup", str(tmp_path / "no folder" / "a.dump"))
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: cannot write to '{tmp_path / 'no folder'}': No such file or directory\n",
    )
    assert list(tmp_path.iterdir()) == []
