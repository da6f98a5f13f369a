"""Commands about people: teams, who sees which dataset, who is asking, and who did what."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import click
from sqlalchemy import Connection

from embstore import catalog, members, sharing
from embstore.errors import UsageError
from embstore.settings import Settings
from embstore.words import plural

from .options import opened, pass_settings, reading, writing
from .output import FORMATS, write_json, write_pairs, write_rows

_MOST_PASSWORD = 4096
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_password_fd = click.option(
    "--password-fd", metavar="N", type=click.IntRange(min=0), help="Read the password from this file descriptor."
)


@click.group()
def team() -> None:
    """Make teams, and put logins into them; for the owner of the database.

    A team is a PostgreSQL role that nobody logs in as. A dataset belongs to one, and its members see it.

    \b
      embstore team create phonetics
      embstore team add-member phonetics ann --writer
      embstore team list
    """


@team.command("create")
@click.argument("name")
@click.option("--adopt", is_flag=True, help="Make a team out of a role that is there already.")
@pass_settings
def create(name: str, adopt: bool, settings: Settings) -> None:
    """Make a team.

    \b
      embstore team create phonetics
    """
    with writing(settings) as connection:
        members.create_team(connection, name, adopt=adopt)
    click.echo(f"team '{name}' is made: type 'embstore team add-member {name} LOGIN --writer' or '--reader'")


@team.command("list")
@_json_option
@pass_settings
def list_teams(as_json: bool, settings: Settings) -> None:
    """List the teams, and who is in them, as the server has it now."""
    with reading(settings) as connection:
        found = sharing.teams(connection)
    if as_json:
        write_json([one._asdict() for one in found], sys.stdout)
        return
    if not found:
        click.echo("there is no team yet: type 'embstore team create NAME'")
        return
    rows = [
        (one.name, ", ".join(one.members) if one.is_there else "its role is gone", one.datasets, one.shared)
        for one in found
    ]
    write_rows(("team", "members", "datasets", "shared with it"), rows, "table", sys.stdout)


@team.command("drop")
@click.argument("name")
@click.option("--give-to", metavar="TEAM", help="The team that gets its datasets.")
@pass_settings
def drop(name: str, give_to: str | None, settings: Settings) -> None:
    """Drop a team; its members' logins stay, without the rights they had from it."""
    with writing(settings) as connection:
        members.drop_team(connection, name, give_to=give_to)
    click.echo(f"team '{name}' is dropped" + (f", its datasets belong to '{give_to}'" if give_to else ""))


@team.command("add-member")
@click.argument("team")
@click.argument("login")
@click.option("--writer", "kind", flag_value="writer", help="It extracts into what its teams may write to.")
@click.option("--reader", "kind", flag_value="reader", help="It only reads.")
@_password_fd
@click.option("--no-password", is_flag=True, help="A new login has none, as with certificates or LDAP.")
@click.option("--connections", metavar="N", type=click.IntRange(min=1), help="At most so many at a time.")
@click.option("--statement-timeout", metavar="TIME", help="End its queries after this, as 10min; 0: never.")
@pass_settings
def add_member(
    team: str,
    login: str,
    kind: Literal["writer", "reader"] | None,
    password_fd: int | None,
    no_password: bool,
    connections: int | None,
    statement_timeout: str | None,
    settings: Settings,
) -> None:
    """Put LOGIN into TEAM; a login that is not there yet is made, and its password asked for.

    A login is a reader or a writer in all its teams. Queries of a reader end after 5 minutes unless you say otherwise.

    \b
      embstore team add-member phonetics ann --writer
      embstore team add-member phonetics bob --reader --no-password --connections 5
    """
    if kind is None:
        raise UsageError("add --writer or --reader: what the login may do in all its teams")
    with reading(settings) as connection:
        sharing.require_team(connection, team)
        is_new = not members.has_login(connection, login)
    password = None
    if password_fd is not None or (is_new and not no_password):
        password = _password(login, password_fd)
    timeout = statement_timeout or (members.READER_TIMEOUT if kind == "reader" else None)
    with writing(settings) as connection:
        made = None if password is None else members.verifier(connection, password, login)
        limits = members.Limits(connections, timeout)
        members.add_member(connection, team, login, kind, verifier=made, limits=limits)
    click.echo(f"'{login}' is a {kind} in team '{team}'" + (", and a new login" if is_new else ""))


@team.command("remove-member")
@click.argument("team")
@click.argument("login")
@pass_settings
def remove_member(team: str, login: str, settings: Settings) -> None:
    """Take LOGIN out of TEAM; its next query sees nothing of the team's. The login itself stays."""
    with writing(settings) as connection:
        was_last = members.remove_member(connection, team, login)
    click.echo(f"'{login}' is out of team '{team}'" + (", its last one, and has no rights left" if was_last else ""))


@team.command("password")
@click.argument("login")
@_password_fd
@pass_settings
def password(login: str, password_fd: int | None, settings: Settings) -> None:
    """Give LOGIN another password, asked for at a prompt; anybody may change their own."""
    with reading(settings) as connection:
        members.require_login(connection, login)
    given = _password(login, password_fd)
    with writing(settings) as connection:
        members.set_password(connection, login, members.verifier(connection, given, login))
    click.echo(f"the password of '{login}' is changed")


def _password(login: str, descriptor: int | None) -> str:
    """From a descriptor, its first line; else from the terminal, twice. Never an argument, which others can see."""
    if descriptor is None:
        if not sys.stdin.isatty():
            raise UsageError("there is no terminal to ask for a password: add --password-fd N, or --no-password")
        return str(click.prompt(f"password of '{login}'", hide_input=True, confirmation_prompt=True, err=True))
    try:
        return os.read(descriptor, _MOST_PASSWORD).decode().partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"no password can be read from descriptor {descriptor}: {error}") from None


@contextmanager
def _recorded(
    settings: Settings, command: str, dataset: str, parameters: dict[str, str]
) -> Iterator[tuple[Connection, catalog.Dataset]]:
    """A transaction that does something to a dataset, and notes in the history that it was done."""
    with writing(settings) as connection:
        found = catalog.get_dataset(connection, dataset)
        yield connection, found
        catalog.record(connection, command, found.dataset_id, parameters)


@click.command()
@click.argument("dataset")
@click.option("--with", "team", metavar="TEAM", required=True, help="The team that is to see it.")
@click.option("--read", "access", flag_value="read", default="read", help="It may read it.  [default]")
@click.option("--write", "access", flag_value="write", help="It may also extract into it, and label it.")
@pass_settings
def share(dataset: str, team: str, access: str, settings: Settings) -> None:
    """Let another team see DATASET, with its vectors, centroids and boundaries.

    \b
      embstore share train --with phonetics --read
      embstore share train --with asr --write
    """
    with _recorded(settings, "share", dataset, {"with": team, "access": access}) as (connection, found):
        sharing.share(connection, found.dataset_id, found.name, team, writing=access == "write")
    click.echo(f"team '{team}' may {'read and write' if access == 'write' else 'read'} '{found.name}'")


@click.command()
@click.argument("dataset")
@click.option("--with", "team", metavar="TEAM", required=True, help="The team that is not to see it any more.")
@pass_settings
def unshare(dataset: str, team: str, settings: Settings) -> None:
    """Take DATASET away from a team again; its next query finds nothing of it.

    \b
      embstore unshare train --with phonetics
    """
    with _recorded(settings, "unshare", dataset, {"with": team}) as (connection, found):
        sharing.unshare(connection, found.dataset_id, found.name, team)
    click.echo(f"team '{team}' sees '{found.name}' no more; what it has copied out, it has")


@click.command()
@click.argument("dataset")
@click.option("--to", "team", metavar="TEAM", required=True, help="The team that it is to belong to.")
@pass_settings
def give(dataset: str, team: str, settings: Settings) -> None:
    """Make DATASET another team's; for the owner of the database.

    \b
      embstore give train --to phonetics
    """
    with _recorded(settings, "give", dataset, {"to": team}) as (connection, found):
        sharing.give(connection, found.dataset_id, found.name, team)
    click.echo(f"dataset '{found.name}' belongs to team '{team}'")


@click.command()
@click.argument("dataset", required=False)
@_json_option
@pass_settings
def shares(dataset: str | None, as_json: bool, settings: Settings) -> None:
    """Show who may see which dataset, as the server has it now.

    \b
      embstore shares
      embstore shares train
    """
    with reading(settings) as connection:
        dataset_id = None if dataset is None else catalog.get_dataset(connection, dataset).dataset_id
        found = sharing.shares(connection, dataset_id)
        everything = list(sharing.see_all(connection))
    if as_json:
        write_json({"shares": [one._asdict() for one in found], "see_everything": everything}, sys.stdout)
        return
    write_rows(("dataset", "team", "access", "logins", "shared by", "since"), _share_rows(found), "table", sys.stdout)
    click.echo(f"\nsuperusers and the owner of the database see everything: {', '.join(everything)}")


def _share_rows(found: Iterable[sharing.Share]) -> Iterable[tuple[Any, ...]]:
    for one in found:
        if one.team is None:
            yield one.dataset, None, "owner of the database", None, None, None
        else:
            yield one.dataset, one.team, one.access, ", ".join(one.logins) or "nobody", one.shared_by, one.shared_at


@click.command()
@_json_option
@pass_settings
def whoami(as_json: bool, settings: Settings) -> None:
    """Show who this connection speaks for, and what it may do.

    \b
      embstore whoami
    """
    with opened(settings) as database, database.begin() as connection:
        identity = sharing.identify(connection)
        facts = _facts(connection, identity)
    if as_json:
        write_json({**vars(identity), **facts}, sys.stdout)
        return
    words = {
        "owner": "owner: migrates, and sees everything",
        "writer": "writer: extracts into what its teams may write to",
        "reader": "reader: reads what its teams may read",
        "none": f"none: ask the owner to type 'embstore team add-member TEAM {identity.role}'",
    }
    pairs = {
        "role": identity.role
        if identity.role == identity.login
        else f"{identity.role} (logged in as {identity.login})",
        "kind": words[identity.kind],
        "teams": ", ".join(identity.teams) or "none",
        **{name: str(value) for name, value in facts.items()},
    }
    write_pairs(pairs, sys.stdout)


def _facts(connection: Connection, identity: sharing.Identity) -> dict[str, Any]:
    facts: dict[str, Any] = {"connection": sharing.transport(connection)}
    facts["statement timeout"] = connection.exec_driver_sql("SHOW statement_timeout").scalar_one()
    if identity.kind != "none":
        facts["reads"], facts["writes"] = sharing.visible(connection)
    return facts


@click.command()
@click.option("--dataset", metavar="NAME", help="Only this dataset.")
@click.option("--login", metavar="LOGIN", help="Only what this login did.")
@click.option("--limit", type=click.IntRange(min=0), default=50, show_default=True, help="At most so many; 0: all.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="table", show_default=True, help="How to print.")
@pass_settings
def history(dataset: str | None, login: str | None, limit: int, form: str, settings: Settings) -> None:
    """Show who ran which command on which dataset, and when; the last one first.

    \b
      embstore history --dataset train
    """
    with reading(settings) as connection:
        dataset_id = None if dataset is None else catalog.get_dataset(connection, dataset).dataset_id
        found = sharing.history(connection, dataset_id=dataset_id, login=login, limit=limit or None)
    if form != "table":
        write_rows(sharing.Event._fields, found, form, sys.stdout)
        return
    columns = ("at", "login", "command", "dataset", "model", "status", "seconds", "what", "host")
    rows = [(e.at, e.login, e.command, e.dataset, e.model, e.status, e.seconds, _what(e), e.host) for e in found]
    write_rows(columns, rows, "table", sys.stdout)
    click.echo(f"({plural(len(found), 'command')})", err=True)


def _what(event: sharing.Event) -> str:
    """What a run counted, in a few words: each whole number that is not 0, and the sum over reasons."""
    counts = {name: sum(n.values()) if isinstance(n, dict) else n for name, n in event.counts.items()}
    return ", ".join(f"{number:,} {name}" for name, number in counts.items() if number and isinstance(number, int))
