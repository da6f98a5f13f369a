"""Saving the store to a file and getting it back: pg_dump and pg_restore, complete or not at all."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from sqlalchemy import text

from embstore import sharing
from embstore.db.engine import Database, require_session
from embstore.db.migrate import EXTENSION, State, inspect
from embstore.db.schema import HEAD, SCHEMA
from embstore.errors import DatabaseError, DatabaseNotReady, UsageError
from embstore.words import plural

from .programs import SEARCH_PATH, Programs

_BEGIN = f"""
BEGIN;
SET LOCAL client_min_messages = warning;
{EXTENSION}
DROP SCHEMA IF EXISTS {SCHEMA} CASCADE;
"""

_RULE = re.compile(r"\d+; \d+ \d+ (POLICY|ROW SECURITY) ")

# The script of pg_restore has emptied the search path, and statistics are not part of it.
_COMMIT = f"""
ANALYZE {SCHEMA}.item, {SCHEMA}.extraction, {SCHEMA}.embedding;
DO $$ BEGIN
    EXECUTE format('ALTER ROLE %I IN DATABASE %I SET search_path = {SEARCH_PATH}', current_user, current_database());
END $$;
COMMIT;
"""


def backup(database: Database, programs: Programs, target: Path, *, force: bool) -> None:
    """Write schema `embstore` into a new file, in pg_dump's custom format.

    Raises UsageError if the file exists, unless `force` replaces it, or for a role that does not see everything;
    DatabaseError with pg_dump's words.
    """
    _require_all(database)
    if target.exists() and not force:
        raise UsageError(f"'{target}' exists: choose another name, or add --force to replace it")
    unfinished = _unfinished(target)
    try:
        arguments: list[str | Path] = ["--format=custom", f"--schema={SCHEMA}", "--no-password", "--file", unfinished]
        arguments.append("--enable-row-security")  # without it, an owner who is no superuser is refused
        with tempfile.TemporaryFile() as said:
            process = programs.run(
                "pg_dump", arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
            )
            if _finished(process) != 0:
                raise DatabaseError(f"pg_dump failed: {_first_error(said)}")
        if force:
            unfinished.replace(target)
        else:
            _link(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _require_all(database: Database) -> None:
    """Raise UsageError for a role whose backup would silently hold no more than it sees."""
    with database.begin() as connection:
        require_session(connection, "a backup")
        identity = sharing.identify(connection)
    if identity.kind != "owner":
        raise UsageError(
            f"a backup by '{identity.role}' would lack what others have: only the owner of the database makes one"
        )


def _unfinished(target: Path) -> Path:
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        raise UsageError(f"cannot write to '{target.parent}': {error.strerror}") from None
    os.close(handle)
    return Path(name)


def _link(unfinished: Path, target: Path) -> None:
    """Give the file its name, but not if another has taken it meanwhile."""
    try:
        target.hardlink_to(unfinished)
    except FileExistsError:
        raise UsageError(f"'{target}' exists: choose another name, or add --force to replace it") from None
    except OSError:  # a file system without hard links
        unfinished.replace(target)


def restore(database: Database, programs: Programs, archive: Path, *, force: bool) -> str:
    """Put a backup in the place of schema `embstore`, in one transaction; returns the revision it is at.

    Raises UsageError for a file that is no backup, or if the database holds datasets, unless `force` drops them;
    DatabaseNotReady for a backup that a newer embstore made; DatabaseError with the words of pg_restore or psql.
    """
    revision = _revision(programs, archive)
    if revision > HEAD:
        raise DatabaseNotReady(
            f"'{archive}' was made by a newer embstore (revision {revision}, this one knows {HEAD}): "
            "type 'pip install --upgrade embstore'"
        )
    _check_target(database, force)
    # Open connections would wait for the lock, or be waited for.
    database.close()
    with tempfile.TemporaryFile() as said:
        arguments = ["--no-psqlrc", "--quiet", "--no-password", "--set=ON_ERROR_STOP=1", "--file=-"]
        psql = programs.run("psql", arguments, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said)
        assert psql.stdin is not None
        with suppress(BrokenPipeError), psql.stdin as script:
            _write_script(script, programs, archive)
        if _finished(psql) != 0:
            raise DatabaseError(f"the backup was not restored: {_first_error(said)}")
    return revision


def _contents(programs: Programs, archive: Path) -> str:
    """The archive's list of contents without the rules of row-level security, which name the role that owned it.

    `embstore.secure` sets them anew. Raises DatabaseError.
    """
    listing = subprocess.run(
        [programs.folder / "pg_restore", "--list", archive], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if listing.returncode != 0:
        raise DatabaseError(f"'{archive}' is damaged, nothing was changed: {listing.stderr.strip().splitlines()[-1]}")
    return "".join(line for line in listing.stdout.splitlines(True) if not _RULE.match(line))


def _write_script(script: IO[bytes], programs: Programs, archive: Path) -> None:
    """Begin, what pg_restore makes of the archive, and only if it made all of it: commit."""
    script.write(_BEGIN.encode())
    script.flush()
    with tempfile.NamedTemporaryFile("w") as contents, tempfile.TemporaryFile() as said:
        contents.write(_contents(programs, archive))
        contents.flush()
        command: list[str | Path] = [
            programs.folder / "pg_restore",
            "--no-owner",
            "--no-privileges",
            f"--use-list={contents.name}",
            "--file=-",
            archive,
        ]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=script, stderr=said)
        # If it stops half-way, psql reads to the end of what there is, and the server rolls it back.
        if _finished(process) != 0 and process.returncode != -signal.SIGPIPE:
            raise DatabaseError(f"'{archive}' is damaged, nothing was changed: {_first_error(said)}")
    script.write(_COMMIT.encode())


def _check_target(database: Database, force: bool) -> None:
    with database.begin() as connection:
        require_session(connection, "a restore")
        state = inspect(connection)
        _check_server(state)
        if connection.execute(text(f"SELECT to_regclass('{SCHEMA}.dataset')")).scalar() is None:
            return
        names = connection.execute(text(f"SELECT name FROM {SCHEMA}.dataset ORDER BY name")).scalars().all()
        at_work = connection.execute(
            text(f"SELECT string_agg(worker, ', ') FROM {SCHEMA}.lease WHERE expires_at > clock_timestamp()")
        ).scalar()
    if at_work:
        raise UsageError(f"workers are using the database ({at_work}): end 'embstore extract' first")
    if names and not force:
        raise UsageError(
            f"{database} holds {plural(len(names), 'dataset')} ('{names[0]}'"
            f"{', …' if len(names) > 1 else ''}): restore into an empty database, or add --force to drop what it holds"
        )


def _check_server(state: State) -> None:
    """Only what a restore does not bring along."""
    after = replace(state, pgvector=state.pgvector or state.pgvector_available, revision=HEAD)
    if after.problem is not None:
        raise DatabaseNotReady(after.problem)


def _revision(programs: Programs, archive: Path) -> str:
    """The revision of a backup's tables, read from the file. Raises UsageError if it is no backup of embstore's."""
    try:
        with archive.open("rb"):
            pass
    except OSError as error:
        raise UsageError(f"cannot read '{archive}': {error.strerror}") from None
    command: list[str | Path] = [
        programs.folder / "pg_restore",
        "--data-only",
        f"--schema={SCHEMA}",
        "--table=alembic_version",
        "--file=-",
    ]
    result = subprocess.run([*command, archive], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = re.search(r"^COPY \S+alembic_version .*\n(\S+)\n\\\.$", result.stdout, re.MULTILINE)
    if result.returncode != 0 or found is None:
        raise UsageError(f"'{archive}' is no backup made by 'embstore db backup'")
    return found[1]


def _finished(process: subprocess.Popen[bytes]) -> int:
    """Wait for a program's end; if we are interrupted, it ends too."""
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _first_error(said: IO[bytes]) -> str:
    said.seek(0)
    lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower() or "fatal:" in line.lower()]
    return (errors or lines or ["it said nothing"])[0].strip()
