"""The entry: help, typos, exit codes, what an error looks like."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner, Result

from embstore.cli.main import COMMANDS, embstore, main
from embstore.errors import DatabaseError, EmbstoreError, UsageError, WorkerError

Cli = Callable[..., Result]

EMBSTORE = [sys.executable, "-m", "embstore"]


def test_help_needs_no_database_no_model_and_no_terminal_library() -> None:
    script = (
        "import sys\n"
        "from embstore.cli.main import embstore\n"
        "try: embstore.main(['--help'])\n"
        "finally: print('LOADED', *sorted({'sqlalchemy', 'torch', 'rich', 'numpy', 'psycopg2'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.endswith("LOADED\n")
    assert "130  interrupted" in result.stdout


def test_the_lines_of_the_help_are_those_of_the_commands() -> None:
    context = click.Context(embstore)
    for name, entry in COMMANDS.items():
        command = embstore.get_command(context, name)
        assert command.name == name
        assert command.get_short_help_str(limit=200) == entry.help


def test_every_command_answers_h_and_help() -> None:
    for words in ([], ["db"], ["db", "restore"], *([name] for name in COMMANDS)):
        short, long = (CliRunner().invoke(embstore, [*words, flag]) for flag in ("-h", "--help"))
        assert short.exit_code == long.exit_code == 0
        assert short.stdout == long.stdout
        assert short.stdout.startswith("Usage: embstore")


def test_version_is_that_of_the_package() -> None:
    result = subprocess.run([*EMBSTORE, "--version"], capture_output=True, text=True)
    assert result.stdout.startswith("embstore 0.")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["statsu"], "No such command 'statsu'. Did you mean 'status'? (type 'embstore --help')"),
        (["frobnicate"], "No such command 'frobnicate'. There are: extract, "),
        (["db", "bakup"], "No such command 'bakup'. Did you mean 'backup'? (type 'embstore db --help')"),
        (
            ["retry", "--stauts", "x"],
            "No such option '--stauts'. Did you mean '--status'? (type 'embstore retry --help')",
        ),
        (["failures", "--limit", "many"], "'many' is not a valid integer range"),
        (["retry", "--status", "done"], "'done' is not one of 'failed', 'skipped', 'all'"),
        (["db", "backup"], "Missing argument 'FILE'. (type 'embstore db backup --help')"),
    ],
)
def test_a_typo_is_one_line_that_helps(words: list[str], error: str) -> None:
    result = CliRunner().invoke(embstore, words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert error in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch, cli_at: Callable[[str | None], Cli]) -> Cli:
    """The program, with commands that raise what they are asked for."""
    errors = {
        "usage": UsageError("no such thing"),
        "database": DatabaseError("gone"),
        "worker": WorkerError("died"),
        "plain": EmbstoreError("odd"),
        "surprise": ZeroDivisionError("division\nby zero"),
        "ctrl-c": KeyboardInterrupt(),
        "pipe": BrokenPipeError("a worker's, not ours"),
    }

    @click.command()
    @click.argument("what")
    def command(what: str) -> None:
        raise errors[what]

    monkeypatch.setattr("embstore.cli.query.status", command)
    return cli_at(None)


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        ("usage", 2, "error: no such thing\n"),
        ("database", 3, "error: gone\n"),
        ("worker", 4, "error: died\n"),
        ("plain", 1, "error: odd\n"),
        (
            "surprise",
            4,
            "error: something unexpected, ZeroDivisionError: division by zero; "
            "type the command again with --debug to see where\n",
        ),
        ("ctrl-c", 130, "\ninterrupted\n"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(breaking: Cli, what: str, code: int, line: str) -> None:
    result = breaking("status", what)
    assert (result.exit_code, result.stderr, result.stdout) == (code, line, "")


@pytest.mark.parametrize("words", [["--debug", "status", "surprise"], ["status", "surprise", "--debug"]])
def test_debug_shows_where_before_and_behind_the_command(breaking: Cli, words: list[str]) -> None:
    result = breaking(*words)
    assert result.exit_code == 4
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError" in result.stderr.splitlines()[-1]


def test_debug_is_accepted_by_subcommands_of_db(cli_at: Callable[[str | None], Cli]) -> None:
    result = cli_at("postgresql://nobody@127.0.0.1:1/none")("db", "check", "--debug")
    assert result.exit_code == 3
    assert "no database at 'postgresql://nobody@127.0.0.1:1/none'" in result.stdout


def test_nobody_reads_on(database_url: str) -> None:
    command = [*EMBSTORE, "sql", "select generate_series(1, 100000)", "--format", "csv", "--database-url", database_url]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout is not None
    assert program.stdout.readline() == b"generate_series\n"
    program.stdout.close()
    assert program.wait() == 141
    assert program.stderr is not None
    assert program.stderr.read() == b""
    program.stderr.close()


def test_a_setting_that_is_none_is_refused(cli: Cli) -> None:
    result = cli("status", DB_MAX_CONNECTION="5")
    assert result.exit_code == 2
    assert "DB_MAX_CONNECTION in the environment is no setting; write DB_MAX_CONNECTIONS" in result.stderr


def test_flags_beat_the_environment(database_url: str, cli_at: Callable[[str | None], Cli]) -> None:
    result = cli_at("postgresql://nobody@127.0.0.1:1/none")("datasets", "--database-url", database_url)
    assert result.exit_code == 0
    assert "nothing is registered yet" in result.stdout


def test_the_entry_point_is_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["embstore", "statsu"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "Did you mean 'status'?" in capsys.readouterr().err
