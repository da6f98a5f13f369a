"""Making teams and logins: roles, and what they are granted. For the owner of the database, who needs CREATEROLE too.

All in the caller's one transaction. A password never leaves this process: what is sent is the verifier that the server
keeps of it (SCRAM-SHA-256, RFC 5803), which nobody can log in with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from psycopg2 import sql
from psycopg2.extensions import encrypt_password
from sqlalchemy import Connection, Row, text

from embstore import sharing
from embstore.db.engine import driver_of
from embstore.errors import DatabaseError, UsageError

READER, WRITER = "embstore_reader", "embstore_writer"

READER_TIMEOUT = "5min"
"""How long a query of a reader may take, unless somebody says otherwise."""

LONGEST_NAME = 63
"""Bytes of a role's name; PostgreSQL cuts longer ones, and two could become one."""

_RESERVED = {"public", "none", "current_user", "current_role", "session_user", "user"}

_ROLE = "SELECT oid, rolcanlogin, rolsuper FROM pg_roles WHERE rolname = :name"
_ADD_TEAM = """
INSERT INTO embstore.team (team, role) SELECT rolname, oid FROM pg_roles WHERE rolname = :name
ON CONFLICT (team) DO UPDATE SET role = excluded.role
"""
_NAMED_SO = "SELECT name FROM embstore.dataset WHERE starts_with(name, :prefix) ORDER BY name LIMIT 1"
_OTHER_TEAMS = """
SELECT count(*) FROM embstore.team t
WHERE t.team <> :team AND pg_has_role(:login, t.role, 'USAGE') AND pg_get_userbyid(t.role) = t.team
"""
# Whoever made a role without being a superuser may administer it, which is not to be a member.
_MEMBERS = """
SELECT r.rolname FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member JOIN pg_roles t ON t.oid = m.roleid
WHERE t.rolname = :team AND (m.inherit_option OR m.set_option)
"""

# A superuser's to set; otherwise the log has the verifier, if it has statements at all.
_SILENCE = """
SELECT set_config(name, value, true) FROM (VALUES ('log_statement', 'none'), ('log_min_duration_statement', '-1'),
    ('log_min_error_statement', 'panic'), ('track_activities', 'off')) AS s (name, value)
WHERE (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
"""

# What a login finds set when it connects. With an index, an ordered search gives up after a while if it sees few of the
# rows: a login that sees a hundredth of them would get fewer results than there are.
_SETTINGS = {
    "search_path": "public, embstore",
    "hnsw.iterative_scan": "strict_order",
    "hnsw.max_scan_tuples": "2147483647",
    "hnsw.scan_mem_multiplier": "1000",
    "ivfflat.iterative_scan": "relaxed_order",
}


@dataclass(frozen=True)
class Limits:
    """What a login is held to."""

    connections: int | None = None
    """None: as it is."""
    statement_timeout: str | None = None
    """As PostgreSQL writes it, `5min`; `0` for none; None: as it is."""


def create_team(connection: Connection, name: str, *, adopt: bool = False) -> None:
    """Make a team, or with `adopt` one out of a role that is there. Raises UsageError."""
    _require_owner(connection)
    check_name(name, "team")
    if "/" in name:
        raise UsageError(f"team name '{name}' holds a '/', which stands between a team and its dataset")
    taken = connection.execute(text(_NAMED_SO), {"prefix": f"{name}/"}).scalar()
    if taken is not None:
        raise UsageError(f"dataset '{taken}' would seem to be one of team '{name}': choose another name")
    role = _role(connection, name)
    if role is None:
        _execute(connection, "CREATE ROLE {} NOLOGIN", name)
    elif name in sharing.team_names(connection) and not adopt:
        raise UsageError(f"team '{name}' exists; add --adopt if its role was made anew")
    elif role.rolcanlogin or role.rolsuper:
        raise UsageError(f"role '{name}' is {'a superuser' if role.rolsuper else 'a login'}; a team is neither")
    elif not adopt:
        raise UsageError(f"there is a role '{name}': add --adopt to make it a team, or choose another name")
    for group in (READER, WRITER):
        if _role(connection, group) is None:
            _execute(connection, "CREATE ROLE {} NOLOGIN", group)
            if group == WRITER:
                _execute(connection, "GRANT {} TO {}", READER, WRITER)
    connection.execute(text(_ADD_TEAM), {"name": name})
    connection.execute(text("SELECT embstore.secure()"))


def drop_team(connection: Connection, name: str, *, give_to: str | None = None) -> None:
    """Drop a team and its role; its datasets go to another team first. Raises UsageError."""
    _require_owner(connection)
    sharing.require_team(connection, name)
    owned = connection.execute(
        text("SELECT dataset_id, name FROM embstore.dataset WHERE team = :team ORDER BY name"), {"team": name}
    ).all()
    if owned and give_to is None:
        names = ", ".join(f"'{row.name}'" for row in owned[:5]) + (", …" if len(owned) > 5 else "")
        raise UsageError(f"team '{name}' has datasets ({names}): add --give-to TEAM")
    for row in owned:
        sharing.give(connection, row.dataset_id, row.name, give_to)
    for login in connection.execute(text(_MEMBERS), {"team": name}).scalars().all():
        remove_member(connection, name, login)
    connection.execute(text("DELETE FROM embstore.dataset_share WHERE team = :team"), {"team": name})
    connection.execute(text("DELETE FROM embstore.team WHERE team = :team"), {"team": name})
    if _role(connection, name) is not None:
        _execute(connection, "DROP ROLE {}", name)


def has_login(connection: Connection, name: str) -> bool:
    """Whether this login exists. Raises UsageError for a role that nobody logs in as, or a name that can't be one."""
    check_name(name, "login")
    role = _role(connection, name)
    if role is not None and not role.rolcanlogin:
        raise UsageError(f"'{name}' is a role that nobody logs in as: a team's members are logins")
    return role is not None


def add_member(
    connection: Connection,
    team: str,
    login: str,
    kind: Literal["reader", "writer"],
    *,
    verifier: str | None = None,
    limits: Limits | None = None,
) -> None:
    """Put a login into a team; it is made if it is not there, with a password of which this is the verifier.

    Its kind holds in all its teams. Raises UsageError.
    """
    _require_owner(connection)
    sharing.require_team(connection, team)
    if not has_login(connection, login):
        _execute(connection, "CREATE ROLE {} LOGIN", login)
    if verifier is not None:
        set_password(connection, login, verifier)
    _execute(connection, "GRANT {} TO {}", team, login)
    if kind == "reader":
        _revoke(connection, WRITER, login)
    _execute(connection, "GRANT {} TO {}", READER if kind == "reader" else WRITER, login)
    _settle(connection, login, limits or Limits(statement_timeout=READER_TIMEOUT if kind == "reader" else None))


def remove_member(connection: Connection, team: str, login: str) -> bool:
    """Take a login out of a team; returns whether that was its last one, and its rights went with it."""
    _require_owner(connection)
    sharing.require_team(connection, team)
    if login not in connection.execute(text(_MEMBERS), {"team": team}).scalars().all():
        raise UsageError(f"'{login}' is no member of team '{team}': 'embstore team list' shows who is")
    _revoke(connection, team, login)
    if connection.execute(text(_OTHER_TEAMS), {"team": team, "login": login}).scalar_one():
        return False
    for group in (WRITER, READER):
        _revoke(connection, group, login)
    return True


def verifier(connection: Connection, password: str, login: str) -> str:
    """What the server keeps of a password, made on this side of the connection. Raises UsageError."""
    if not password or "\0" in password:
        raise UsageError("the password is empty, or holds a NUL character")
    made: str = encrypt_password(password, login, driver_of(connection), "scram-sha-256")
    return made


def require_login(connection: Connection, name: str) -> None:
    """Raise UsageError unless there is a login of this name."""
    if not has_login(connection, name):
        raise UsageError(f"there is no login '{name}': 'embstore team add-member TEAM {name}' makes it")


def set_password(connection: Connection, login: str, verifier: str) -> None:
    """Give a login a password, by its verifier. Not even that is to stand in the server's log, where that can be."""
    require_login(connection, login)
    connection.execute(text(_SILENCE))
    with driver_of(connection).cursor() as cursor:
        cursor.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(login), sql.Literal(verifier)))


def check_name(name: str, what: str) -> None:
    """Raise UsageError for a name that a role cannot have, or that means something else."""
    if not name or not name.isprintable() or name != name.strip():
        raise UsageError(f"{what} name {name!r} is empty, or has spaces around it or characters that do not print")
    if len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME:
        raise UsageError(f"{what} name '{name[:20]}…' is longer than {LONGEST_NAME} bytes")
    if name.lower() in _RESERVED or name.lower().startswith(("pg_", "embstore_")):
        raise UsageError(f"{what} name '{name}' means something else to PostgreSQL or embstore: choose another one")


def _settle(connection: Connection, login: str, limits: Limits) -> None:
    connection.execute(text("SELECT CAST('[1]' AS vector)"))  # loads pgvector, whose settings are unknown before
    settings = dict(_SETTINGS)
    if limits.statement_timeout is not None:
        settings["statement_timeout"] = limits.statement_timeout
    database = connection.execute(text("SELECT current_database()")).scalar_one()
    with driver_of(connection).cursor() as cursor:
        for name, value in settings.items():
            # A list of names goes in as it is, and anything else as one value.
            given = sql.SQL(value) if name == "search_path" else sql.Literal(value)
            statement = sql.SQL("ALTER ROLE {} IN DATABASE {} SET {} = {}")
            setting = sql.SQL(name)
            cursor.execute(statement.format(sql.Identifier(login), sql.Identifier(database), setting, given))
        if limits.connections is not None:
            cursor.execute(
                sql.SQL("ALTER ROLE {} CONNECTION LIMIT {}").format(
                    sql.Identifier(login), sql.Literal(limits.connections)
                )
            )


def _revoke(connection: Connection, role: str, login: str) -> None:
    if login in connection.execute(text(_MEMBERS), {"team": role}).scalars().all():
        _execute(connection, "REVOKE {} FROM {}", role, login)


def _require_owner(connection: Connection) -> None:
    identity = sharing.identify(connection)
    if identity.kind != "owner":
        raise DatabaseError(
            f"only the owner of the database makes teams and members, and '{identity.role}' is no owner: "
            "connect as the role that typed 'embstore db upgrade'"
        )


def _role(connection: Connection, name: str) -> Row[tuple[int, bool, bool]] | None:
    return connection.execute(text(_ROLE), {"name": name}).one_or_none()


def _execute(connection: Connection, statement: str, *names: str) -> None:
    """Run a statement on roles; their names are quoted. In braces stand the places."""
    with driver_of(connection).cursor() as cursor:
        cursor.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))
