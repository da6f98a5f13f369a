"""Teams, who sees which dataset, and who is asking: PostgreSQL's own roles and rules, set up and explained.

A *team* is a role that nobody logs in as; its *members* are logins. What a login may do at all, it has from one of two
group roles: `embstore_reader` or `embstore_writer`. Which rows it sees follows from its teams, by the row-level
security that the migrations set on every table with a `dataset_id`: those of datasets that belong to a team of its, or
were shared with one. Nothing here is a permission system of embstore's own, so psql obeys the same rules.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, text

from embstore.errors import DatabaseError, UsageError

Kind = Literal["owner", "writer", "reader", "none"]

# Whoever may act for the schema's owner is an owner; the other kinds follow from the rights that a role really has. By
# the number of the table: to look it up by name needs a right on the schema.
KIND = """CASE WHEN pg_has_role({role}, n.nspowner, 'USAGE') THEN 'owner'
    WHEN NOT has_schema_privilege({role}, n.oid, 'USAGE') THEN 'none'
    WHEN has_table_privilege({role}, {table}, 'UPDATE') THEN 'writer'
    WHEN has_table_privilege({role}, {table}, 'SELECT') THEN 'reader'
    ELSE 'none' END"""
_TABLE = "(SELECT c.oid FROM pg_class c WHERE c.relname = 'extraction' AND c.relnamespace = n.oid)"

_IDENTITY = f"""
SELECT r.rolname AS role, session_user AS login, {KIND.format(role="r.oid", table=_TABLE)} AS kind,
    has_schema_privilege(n.oid, 'USAGE') AS enters
FROM pg_roles r CROSS JOIN pg_namespace n WHERE r.rolname = current_user AND n.nspname = 'embstore'
"""
# Name and number have to agree, as in the rules: see the migration.
_MINE = "SELECT team FROM embstore.team WHERE pg_has_role(role, 'USAGE') AND pg_get_userbyid(role) = team ORDER BY team"
_TEAM_NAMES = "SELECT team FROM embstore.team ORDER BY team"

_LOGINS = f"""
SELECT array_agg(r.rolname || CASE {KIND.format(role="r.oid", table=_TABLE)} WHEN 'writer' THEN ' (writer)'
    WHEN 'reader' THEN ' (reader)' ELSE ' (no rights)' END ORDER BY r.rolname)
FROM pg_roles r CROSS JOIN pg_namespace n
WHERE n.nspname = 'embstore' AND r.rolcanlogin AND NOT pg_has_role(r.oid, n.nspowner, 'USAGE')
    AND pg_has_role(r.oid, t.role, 'USAGE') AND pg_get_userbyid(t.role) = t.team
"""
_TEAMS = f"""
SELECT t.team, pg_get_userbyid(t.role) = t.team AS is_there, coalesce(({_LOGINS}), '{{}}') AS members,
    (SELECT count(*) FROM embstore.dataset d WHERE d.team = t.team) AS owns,
    (SELECT count(*) FROM embstore.dataset_share s WHERE s.team = t.team AND s.team IS DISTINCT FROM s.owner) AS shared
FROM embstore.team t ORDER BY t.team
"""
_SHARES = f"""
SELECT d.dataset, t.team, CASE WHEN t.team = s.owner THEN 'owner' WHEN s.can_write THEN 'write' ELSE 'read' END,
    coalesce(({_LOGINS}), '{{}}'), s.shared_by, s.shared_at
FROM embstore.datasets d
LEFT JOIN embstore.dataset_share s USING (dataset_id)
LEFT JOIN embstore.team t ON t.team = s.team
WHERE CAST(:dataset_id AS integer) IS NULL OR dataset_id = :dataset_id
ORDER BY d.dataset, s.team IS DISTINCT FROM s.owner, t.team
"""
_SEE_ALL = """
SELECT r.rolname FROM pg_roles r CROSS JOIN pg_namespace n
WHERE n.nspname = 'embstore' AND r.rolcanlogin AND (pg_has_role(r.oid, n.nspowner, 'USAGE') OR r.rolbypassrls)
ORDER BY 1
"""
_SHARE = """
INSERT INTO embstore.dataset_share (dataset_id, team, can_write) VALUES (:dataset_id, :team, :can_write)
ON CONFLICT (dataset_id, team) DO UPDATE SET can_write = excluded.can_write
"""
_UNSHARE = "DELETE FROM embstore.dataset_share WHERE dataset_id = :dataset_id AND team = :team"
_OWNING_TEAM = "SELECT team FROM embstore.dataset WHERE dataset_id = :dataset_id"
_TRANSPORT = """
SELECT (SELECT s.version FROM pg_stat_ssl s WHERE s.pid = pg_backend_pid() AND s.ssl) AS version,
    inet_client_addr() IS NULL OR inet_client_addr() << '127.0.0.0/8' OR inet_client_addr() = '::1' AS local
"""
_HISTORY = """
SELECT started_at, login, role, command, dataset, model, status,
    round(extract(epoch FROM coalesce(finished_at, clock_timestamp()) - started_at)::numeric, 1)::float8, host, version,
    parameters, counts
FROM embstore.run
WHERE (CAST(:dataset_id AS integer) IS NULL OR dataset_id = :dataset_id)
    AND (CAST(:login AS text) IS NULL OR :login IN (login, role))
ORDER BY started_at DESC, run_id DESC LIMIT :limit
"""


@dataclass(frozen=True)
class Identity:
    """Who a connection speaks for, as the server knows it."""

    role: str
    login: str
    """Who connected; another one than the role after SET ROLE."""
    kind: Kind
    teams: tuple[str, ...]
    """Whose member it is; of an owner, who may act for any, all."""


class Team(NamedTuple):
    """A team, and what it has."""

    name: str
    is_there: bool
    """False: the role was dropped or renamed behind embstore's back, and nobody is in the team."""
    members: list[str]
    """`ann (writer)`."""
    datasets: int
    shared: int
    """Datasets of others that are shared with it."""


class Share(NamedTuple):
    """What a team may do with a dataset, and which logins that are by now."""

    dataset: str
    team: str | None
    """None: of the dataset's owner alone."""
    access: Literal["owner", "write", "read"]
    logins: list[str]
    shared_by: str | None
    shared_at: datetime | None


class Event(NamedTuple):
    """A command that somebody ran."""

    at: datetime
    login: str
    role: str
    command: str
    dataset: str | None
    model: str | None
    status: str
    seconds: float
    host: str
    version: str
    parameters: dict[str, Any]
    counts: dict[str, Any]


def identify(connection: Connection) -> Identity:
    """Ask the server who this is. Raises DatabaseError if there is no embstore in the database."""
    row = connection.execute(text(_IDENTITY)).one_or_none()
    if row is None:
        raise DatabaseError("the database is not migrated: type 'embstore db upgrade'")
    teams = connection.execute(text(_MINE)).scalars().all() if row.enters else []
    return Identity(row.role, row.login, row.kind, tuple(teams))


def place(connection: Connection, name: str) -> tuple[str | None, str]:
    """The team that a new dataset is to belong to, and its name there. None: to the owner of the database.

    Raises UsageError where the name does not say which of several teams is meant, and where there is none.
    """
    identity = identify(connection)
    known = connection.execute(text(_TEAM_NAMES)).scalars().all()
    team, slash, rest = name.partition("/")
    if slash and rest and team in known:
        if team not in identity.teams:
            raise UsageError(f"dataset '{name}' would belong to team '{team}', in which '{identity.role}' is not")
        return team, rest
    if identity.kind == "owner":
        return None, name
    if identity.kind == "reader":
        raise UsageError(f"'{identity.role}' is a reader, and makes no dataset: 'embstore whoami' says what it may do")
    if not identity.teams:
        raise UsageError(
            f"'{identity.role}' is in no team, and a dataset belongs to one: "
            f"ask the owner of the database to type 'embstore team add-member TEAM {identity.role}'"
        )
    if len(identity.teams) > 1:
        raise UsageError(
            f"'{identity.role}' is in teams {', '.join(identity.teams)}: "
            f"say whose dataset it is to be, as in --dataset '{identity.teams[0]}/{name}'"
        )
    return identity.teams[0], name


def team_names(connection: Connection) -> list[str]:
    """All teams; who they are is no secret on a server, as roles are none."""
    return list(connection.execute(text(_TEAM_NAMES)).scalars())


def require_team(connection: Connection, name: str) -> None:
    """Raise UsageError unless there is a team of this name."""
    known = team_names(connection)
    if name in known:
        return
    if near := difflib.get_close_matches(name, known, n=1):
        raise UsageError(f"no team '{name}': did you mean '{near[0]}'? 'embstore team list' shows all")
    listed = ", ".join(f"'{team}'" for team in known)
    raise UsageError(
        f"no team '{name}': "
        + (f"known are {listed}" if known else "there is none yet: type 'embstore team create NAME'")
    )


def teams(connection: Connection) -> list[Team]:
    """All teams, with their members as the server has them now."""
    return [Team(*row) for row in connection.execute(text(_TEAMS))]


def share(connection: Connection, dataset_id: int, dataset: str, team: str, *, writing: bool) -> None:
    """Let a team read a dataset, or also write to it; what it was allowed before is replaced. Raises UsageError."""
    require_team(connection, team)
    owner = require_own(connection, dataset_id, dataset)
    if team == owner:
        raise UsageError(f"dataset '{dataset}' belongs to team '{team}', which reads and writes it anyway")
    connection.execute(text(_SHARE), {"dataset_id": dataset_id, "team": team, "can_write": writing})


def unshare(connection: Connection, dataset_id: int, dataset: str, team: str) -> None:
    """Take a dataset away from a team; its next query finds nothing of it. Raises UsageError."""
    require_team(connection, team)
    owner = require_own(connection, dataset_id, dataset)
    if team == owner:
        raise UsageError(f"dataset '{dataset}' belongs to team '{team}': 'embstore give' would make it another one's")
    if not connection.execute(text(_UNSHARE), {"dataset_id": dataset_id, "team": team}).rowcount:
        raise UsageError(f"dataset '{dataset}' is not shared with team '{team}': 'embstore shares' lists what is")


def give(connection: Connection, dataset_id: int, dataset: str, team: str | None) -> None:
    """Make a dataset another team's, or the owner's of the database alone. Raises UsageError."""
    identity = identify(connection)
    if identity.kind != "owner":
        raise UsageError(
            f"only the owner of the database gives datasets away, and '{identity.role}' is a {identity.kind}"
        )
    if team is not None:
        require_team(connection, team)
    taken = connection.execute(
        text(
            "SELECT FROM embstore.dataset o JOIN embstore.dataset d ON d.dataset_id = :dataset_id"
            " WHERE o.name = d.name AND o.team IS NOT DISTINCT FROM :team AND o.dataset_id <> d.dataset_id"
        ),
        {"dataset_id": dataset_id, "team": team},
    ).first()
    if taken is not None:
        whose = f"team '{team}'" if team is not None else "the owner of the database"
        raise UsageError(f"{whose} has a dataset of the same name as '{dataset}' already")
    connection.execute(
        text("UPDATE embstore.dataset SET team = :team WHERE dataset_id = :dataset_id"),
        {"dataset_id": dataset_id, "team": team},
    )


def require_own(connection: Connection, dataset_id: int, dataset: str, deed: str = "shared") -> str | None:
    """The dataset's team. Raises UsageError for those whose it is not, and who want it `shared`."""
    identity = identify(connection)
    owner = connection.execute(text(_OWNING_TEAM), {"dataset_id": dataset_id}).scalar()
    if identity.kind == "owner" or (identity.kind == "writer" and owner in identity.teams):
        return owner
    whose = f"the writers of team '{owner}'" if owner else "the owner of the database"
    raise UsageError(f"dataset '{dataset}' can be {deed} by {whose} alone, and '{identity.role}' is none of them")


def shares(connection: Connection, dataset_id: int | None = None) -> list[Share]:
    """Who may do what with which dataset, as far as the role that asks may know."""
    rows = connection.execute(text(_SHARES), {"dataset_id": dataset_id})
    return [Share(*row) for row in rows]


def see_all(connection: Connection) -> Sequence[str]:
    """The logins that no rule holds back: superusers, and those who may act for the owner."""
    return connection.execute(text(_SEE_ALL)).scalars().all()


def visible(connection: Connection) -> tuple[int, int]:
    """How many datasets one may read, and how many of them one may write to."""
    row = connection.execute(text("SELECT count(*), count(*) FILTER (WHERE can_write) FROM embstore.datasets")).one()
    return int(row[0]), int(row[1])


def transport(connection: Connection) -> str:
    """How the connection gets to the server, in words."""
    row = connection.execute(text(_TRANSPORT)).one()
    if row.version is not None:
        return f"encrypted, {row.version}"
    return "within this machine" if row.local else "NOT ENCRYPTED: add ?sslmode=verify-full to DATABASE_URL"


def history(
    connection: Connection, *, dataset_id: int | None = None, login: str | None = None, limit: int | None = None
) -> list[Event]:
    """The commands that were run, the last one first: those on datasets that one's teams write to, and one's own."""
    rows = connection.execute(text(_HISTORY), {"dataset_id": dataset_id, "login": login, "limit": limit})
    return [Event(*row) for row in rows]
