"""The entry `embstore`: finds the command, and turns every error into one line and an exit code.

Commands are imported when they are called, so that `embstore --help` needs neither SQLAlchemy nor anything larger.
"""

from __future__ import annotations

import difflib
import importlib
import os
import select
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import click
from click.exceptions import Abort, ClickException, Exit, UsageError

from embstore.errors import EmbstoreError

INTERRUPTED = 130
READER_GONE = 141
UNEXPECTED = 4

EXIT_CODES = """\b
Exit codes:
    0  all done
    1  finished, but some items failed ('embstore failures' names them)
    2  a flag, a setting, a path or a name is wrong; nothing was done
    3  the database cannot be reached or used
    4  workers, or embstore itself, broke
  130  interrupted
"""


class Entry(NamedTuple):
    """Where a command lives, and its line in the help."""

    module: str
    attribute: str
    help: str


COMMANDS = {
    "extract": Entry("extract", "extract", "Register audio or images and embed them; stop and go on at any time."),
    "centroids": Entry("centroids", "command", "Average each speaker's vectors into one; stop and go on at any time."),
    "boundaries": Entry(
        "boundaries", "boundaries", "Find where the speaker changes in a set that is ordered by speaker."
    ),
    "search": Entry("search", "search", "Find the utterances, or the speakers, that are most like one."),
    "index": Entry("index", "index", "Build, drop and check the index that makes searches fast."),
    "export": Entry("export", "export", "Write what is in the database to files."),
    "import": Entry("importing", "import_", "Bring vectors that were computed elsewhere into the database."),
    "status": Entry("query", "status", "Show how far each dataset is, by model."),
    "failures": Entry("query", "failures", "List the items without an embedding, and why."),
    "retry": Entry("query", "retry", "Make failed items pending again."),
    "datasets": Entry("query", "datasets", "List the datasets."),
    "models": Entry("models", "models", "List the models, stored and available; keep a recipe under a name."),
    "rm": Entry("remove", "rm", "Remove a dataset, a model or items, with all that was computed from them."),
    "forget": Entry(
        "forget",
        "forget",
        "Remove a person from all datasets: items, vectors, faces, centroids, boundary labels; and prove it.",
    ),
    "share": Entry("share", "share", "Let another team see DATASET, with its vectors, centroids and boundaries."),
    "unshare": Entry("share", "unshare", "Take DATASET away from a team again; its next query finds nothing of it."),
    "give": Entry("share", "give", "Make DATASET another team's; for the owner of the database."),
    "shares": Entry("share", "shares", "Show who may see which dataset, as the server has it now."),
    "team": Entry("share", "team", "Make teams, and put logins into them; for the owner of the database."),
    "whoami": Entry("share", "whoami", "Show who this connection speaks for, and what it may do."),
    "history": Entry("share", "history", "Show who ran which command on which dataset, and when; the last one first."),
    "sql": Entry("sql", "sql", "Run a query and print its rows."),
    "doctor": Entry("doctor", "doctor", "Check the database, and say what to do about what is wrong."),
    "db": Entry("database", "db", "Start, check, migrate, save and restore the database."),
}


@dataclass
class Invocation:
    """What holds for one run of the program."""

    debug: bool = False
    log_json: bool = False


def _note_debug(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().obj.debug = True


def _debug_option(*, hidden: bool) -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        hidden=hidden,
        callback=_note_debug,
        help="Show where an error came from.",
    )


def _accept_debug(command: click.Command) -> None:
    """Let `--debug` stand behind the command too, where people put it."""
    if not any("--debug" in parameter.opts for parameter in command.params):
        command.params.append(_debug_option(hidden=True))
    if isinstance(command, click.Group):
        for child in command.commands.values():
            _accept_debug(child)


class Program(click.Group):
    """A group that imports a command when it is needed, and reports errors as embstore does."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the command; None if there is none of that name."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(f".{entry.module}", __package__), entry.attribute)
        assert isinstance(command, click.Command)
        _accept_debug(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the help from the table alone: importing all commands would take seconds."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is meant. Raises click's UsageError with the nearest name."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(COMMANDS)}."
            raise UsageError(f"No such command '{args[0]}'. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; end without a word when nobody reads the output any more, as in `| head`."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            if not _reader_is_gone():
                raise
            # Python flushes once more at exit, and would complain then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise Exit(READER_GONE) from None
        return result

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        """Run, report, and exit with a code of EXIT_CODES; a command sets its own through `Context.exit`."""
        invocation = Invocation()
        extra |= {"standalone_mode": False, "obj": invocation}
        try:
            code = super().main(args, prog_name or "embstore", **extra)
        except Exception as error:  # noqa: BLE001
            if invocation.debug and not isinstance(error, ClickException | Abort):
                traceback.print_exc()
            line, code = _explain(error)
            click.echo(line, err=True)
        sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> tuple[str, int]:
    """What to print about an error, and the exit code."""
    if isinstance(error, EmbstoreError):
        return f"error: {error}", error.exit_code
    if isinstance(error, Abort):
        return "interrupted", INTERRUPTED
    if isinstance(error, ClickException):
        context = error.ctx if isinstance(error, UsageError) else None
        hint = f" (type '{context.command_path} --help')" if context else ""
        return f"error: {' '.join(error.format_message().split())}{hint}", error.exit_code
    words = " ".join(str(error).split())
    name = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return f"error: something unexpected, {name}; type the command again with --debug to see where", UNEXPECTED


def _reader_is_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


@click.command(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=[_debug_option(hidden=False)],
    epilog=EXIT_CODES,
    no_args_is_help=True,
)
@click.version_option(package_name="embstore", message="%(prog)s %(version)s")
def embstore() -> None:
    """Embeddings of large speech and face corpora in PostgreSQL with pgvector: resumable, queried in SQL.

    \b
      embstore extract /data/audio --workers 4    # Ctrl+C whenever you like; run it again to go on
      embstore status
      embstore sql "select speaker, count(*) from embeddings_resemblyzer group by speaker"

    The database is the PostgreSQL that comes with embstore, or the one that DATABASE_URL names.
    """


def main() -> NoReturn:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        # A file name that the terminal cannot show must not end the program.
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    embstore.main()
