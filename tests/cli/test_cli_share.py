"""Teams, shares, whoami and history, as their users type them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from click.testing import Result
from commands import wait_until
from people import People
from sqlalchemy import make_url

from embstore.db.engine import Database

Cli = Callable[..., Result]
CliAt = Callable[[str | None], Cli]
PASSWORD = "s3cret wörd"


@pytest.fixture
def teams(store: Database, people: People, cli: Cli) -> dict[str, str]:
    """Team a, with writer ann, has `calls`; team b, with reader bob, has nothing. All of it made by typing commands."""
    names = {short: people.name(short) for short in ("a", "b", "ann", "bob")}
    for words in (
        ("team", "create", names["a"]),
        ("team", "create", names["b"]),
        ("team", "add-member", names["a"], names["ann"], "--writer", "--no-password"),
        ("team", "add-member", names["b"], names["bob"], "--reader", "--no-password", "--connections", "3"),
        ("give", "calls", "--to", names["a"]),
    ):
        result = cli(*words)
        assert result.exit_code == 0, result.output
    return names


@contextmanager
def descriptor(content: bytes) -> Iterator[str]:
    """A pipe that holds this, as a shell makes it."""
    end, other = os.pipe()
    os.write(other, content)
    os.close(other)
    yield str(end)
    os.close(end)


def datasets(cli: Cli) -> list[str]:
    return [one["name"] for one in json.loads(cli("datasets", "--json").stdout)]


def test_a_dataset_is_seen_by_whom_it_was_shared_with(teams: dict[str, str], people: People, cli_at: CliAt) -> None:
    ann, bob = (cli_at(people.address(teams[name])) for name in ("ann", "bob"))
    assert (datasets(ann), datasets(bob)) == (["calls"], [])
    shared = ann("share", "calls", "--with", teams["b"])
    assert shared.stdout == f"team '{teams['b']}' may read 'calls'\n", shared.output
    assert datasets(bob) == ["calls"]
    assert "= 10 registered" in bob("status").stdout
    listed = json.loads(ann("shares", "--json").stdout)["shares"]
    assert [(s["team"], s["access"], s["logins"]) for s in listed] == [
        (teams["a"], "owner", [f"{teams['ann']} (writer)"]),
        (teams["b"], "read", [f"{teams['bob']} (reader)"]),
    ]
    # What bob may know is that his own team was given it.
    assert [s["team"] for s in json.loads(bob("shares", "--json").stdout)["shares"]] == [teams["b"]]
    assert bob("unshare", "calls", "--with", teams["b"]).exit_code == 2
    assert ann("unshare", "calls", "--with", teams["b"]).exit_code == 0
    assert datasets(bob) == []
    assert "is not shared with team" in ann("unshare", "calls", "--with", teams["b"]).stderr


def test_what_a_reader_may_not_do_is_said_in_one_line(
    teams: dict[str, str], people: People, cli: Cli, cli_at: CliAt
) -> None:
    bob = cli_at(people.address(teams["bob"]))
    assert cli("share", "calls", "--with", teams["b"], "--write").exit_code == 0
    for words, said in (
        (("extract", "--dataset", "calls", "--model", "statistical"), "dataset 'calls' is shared for reading"),
        (("share", "calls", "--with", teams["b"]), "can be shared by the writers of team"),
        (("give", "calls", "--to", teams["b"]), "only the owner of the database gives"),
        (("team", "create", "more"), "only the owner of the database makes teams"),
        (("db", "backup", "file"), "would lack what others have"),
        (("sql", "--write", "update items set path = 'x'"), "cannot update view"),
        (("sql", "--write", "delete from embstore.item"), "permission denied for table item"),
    ):
        result = bob(*words)
        assert said in result.stderr, (words, result.output)
        assert (result.exit_code in (2, 3), result.stderr.count("\n")) == (True, 1)


def test_whoami(teams: dict[str, str], people: People, cli: Cli, cli_at: CliAt) -> None:
    ann, bob = (json.loads(cli_at(people.address(teams[n]))("whoami", "--json").stdout) for n in ("ann", "bob"))
    assert (ann["kind"], ann["teams"], ann["reads"], ann["writes"]) == ("writer", [teams["a"]], 1, 1)
    assert (bob["kind"], bob["teams"], bob["reads"], bob["writes"]) == ("reader", [teams["b"]], 0, 0)
    assert (ann["statement timeout"], bob["statement timeout"]) == ("0", "5min")
    assert json.loads(cli("whoami", "--json").stdout)["kind"] == "owner"
    stranger = cli_at(people.address(people.login("stranger")))
    assert "kind               none: ask the owner to type 'embstore team add-member TEAM" in stranger("whoami").stdout
    assert stranger("status").exit_code == 3


def test_history_tells_who_did_what(teams: dict[str, str], people: People, cli: Cli, cli_at: CliAt) -> None:
    ann, bob = (cli_at(people.address(teams[name])) for name in ("ann", "bob"))
    assert ann("share", "calls", "--with", teams["b"]).exit_code == 0
    events = json.loads(ann("history", "--format", "json").stdout)
    assert [(e["login"], e["command"], e["dataset"], e["status"]) for e in events] == [
        (teams["ann"], "share", "calls", "done"),
        ("embstore", "give", "calls", "done"),
    ]
    assert events[0]["parameters"] == {"with": teams["b"], "access": "read"}
    assert json.loads(bob("history", "--format", "json").stdout) == []
    assert "(1 command)" in cli("history", "--login", teams["ann"]).stderr
    # It outlives the dataset, and its subject cannot change it.
    assert "permission denied for table run" in ann("sql", "--write", "delete from embstore.run").stderr
    assert "0" in ann("sql", "--write", "update embstore.run set counts = '{\"done\": 9}'").stderr
    assert cli("sql", "--write", "delete from embstore.dataset where name = 'calls'").exit_code == 0
    assert [e["counts"] for e in json.loads(cli("history", "--format", "json").stdout)] == [{}, {}]


def test_history_has_what_changes_a_dataset_without_a_worker(
    teams: dict[str, str], people: People, cli_at: CliAt
) -> None:
    ann = cli_at(people.address(teams["ann"]))
    retried = ann("retry", "--dataset", "calls")
    assert retried.exit_code == 0, retried.output
    (event,) = [e for e in json.loads(ann("history", "--format", "json").stdout) if e["login"] == teams["ann"]]
    assert (event["command"], event["dataset"], event["parameters"]["status"]) == ("retry", "calls", "failed")
    assert f"{event['parameters']['items']} item" in retried.stdout


def test_members_come_and_go(teams: dict[str, str], people: People, cli: Cli, cli_at: CliAt) -> None:
    ann = cli_at(people.address(teams["ann"]))
    assert cli("team", "add-member", teams["b"], teams["ann"], "--writer").exit_code == 0
    gone = cli("team", "remove-member", teams["a"], teams["ann"])
    assert gone.stdout == f"'{teams['ann']}' is out of team '{teams['a']}'\n"
    assert datasets(ann) == []
    gone = cli("team", "remove-member", teams["b"], teams["ann"])
    assert "its last one, and has no rights left" in gone.stdout
    assert "permission denied for schema embstore" in ann("datasets").stderr
    assert "is no member of team" in cli("team", "remove-member", teams["b"], teams["ann"]).stderr


def test_a_team_that_has_datasets_is_dropped_only_if_another_gets_them(teams: dict[str, str], cli: Cli) -> None:
    assert "has datasets ('calls'): add --give-to TEAM" in cli("team", "drop", teams["a"]).stderr
    assert cli("team", "drop", teams["a"], "--give-to", teams["b"]).exit_code == 0
    (left,) = json.loads(cli("team", "list", "--json").stdout)
    assert (left["name"], left["members"], left["datasets"]) == (teams["b"], [f"{teams['bob']} (reader)"], 1)


def test_a_wrong_name_is_answered_before_a_password_is_asked_for(teams: dict[str, str], cli: Cli) -> None:
    for words, said in (
        (("team", "password", "zoe"), "there is no login 'zoe'"),
        (("team", "add-member", teams["a"][:-1], "zoe", "--writer"), f"did you mean '{teams['a']}'"),
        (("share", "cals", "--with", teams["b"]), "no dataset 'cals': did you mean 'calls'?"),
        (("share", "calls", "--with", "physics"), "no team 'physics': known are "),
    ):
        result = cli(*words)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
        assert said in result.stderr


def test_a_role_that_only_has_a_teams_name_is_not_the_team(
    teams: dict[str, str], people: People, cli: Cli, cli_at: CliAt
) -> None:
    """Dropped behind embstore's back, and made anew by somebody else."""
    people.execute("DROP ROLE {}", teams["a"])
    people.execute("CREATE ROLE {}", teams["a"])
    people.execute("GRANT {} TO {}", teams["a"], teams["bob"])
    bob = cli_at(people.address(teams["bob"]))
    assert datasets(bob) == []
    assert "its role is gone" in cli("team", "list").stdout
    assert cli("team", "create", teams["a"]).exit_code == 2
    assert cli("team", "create", teams["a"], "--adopt").exit_code == 0
    assert datasets(bob) == ["calls"]


def test_a_password_is_read_from_a_descriptor_and_never_sent(
    teams: dict[str, str], people: People, cli: Cli, store: Database
) -> None:
    eve = people.name("eve")
    with descriptor(f"{PASSWORD}\n".encode()) as number:
        result = cli("team", "add-member", teams["a"], eve, "--writer", "--password-fd", number)
    assert result.exit_code == 0, result.output
    assert PASSWORD not in result.output
    with store.begin() as connection:
        stored = "SELECT rolpassword FROM pg_authid WHERE rolname = %s"
        first = connection.exec_driver_sql(stored, (eve,)).scalar_one()
    assert first.startswith("SCRAM-SHA-256$4096:")
    with descriptor(b"another") as number:
        assert cli("team", "password", eve, "--password-fd", number).exit_code == 0
    with store.begin() as connection:
        assert connection.exec_driver_sql(stored, (eve,)).scalar_one() != first
    for content, said in ((b"", "is empty"), (b"a\0b", "a NUL"), (b"\xff\xfe", "no password can be read")):
        with descriptor(content) as number:
            assert said in cli("team", "password", eve, "--password-fd", number).stderr
    assert (
        "no terminal to ask for a password"
        in cli("team", "add-member", teams["a"], people.name("x"), "--writer").stderr
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "is empty"),
        ("pg_mine", "means something else"),
        ("embstore_reader", "means something else"),
        ("public", "means something else"),
        ("a/b", "holds a '/'"),
        ("x" * 64, "longer than 63 bytes"),
        ("ü" * 32, "longer than 63 bytes"),
        (" a", "spaces around it"),
        ("a\nb", "do not print"),
        ("embstore", "is a superuser"),
    ],
)
def test_names_that_no_team_can_have(cli: Cli, name: str, said: str) -> None:
    result = cli("team", "create", name)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert said in result.stderr


def test_two_teams_have_datasets_of_one_name(
    teams: dict[str, str], people: People, store: Database, cli: Cli, cli_at: CliAt
) -> None:
    assert cli("team", "add-member", teams["b"], teams["bob"], "--writer").exit_code == 0
    bob = cli_at(people.address(teams["bob"]))
    assert "no dataset 'calls': none is registered yet" in bob("history", "--dataset", "calls").stderr
    with people.connect(teams["bob"]).begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO embstore.dataset (name, media, root, team) VALUES ('calls', 'audio', '/b', %s)", (teams["b"],)
        )
    assert datasets(bob) == ["calls"]
    assert datasets(cli) == sorted(["books", f"{teams['a']}/calls", f"{teams['b']}/calls"])
    assert "several datasets are called 'calls': say" in cli("status", "--dataset", "calls").stderr
    assert cli("status", "--dataset", f"{teams['a']}/calls").exit_code == 0
    assert "has a dataset of the same name" in cli("give", f"{teams['a']}/calls", "--to", teams["b"]).stderr


def test_a_backup_brings_teams_back_where_their_roles_are(
    teams: dict[str, str], people: People, cli: Cli, cli_at: CliAt, bare_url: str, tmp_path: object
) -> None:
    file = f"{tmp_path}/all.dump"
    assert cli("db", "backup", file).exit_code == 0
    there = cli_at(bare_url)
    assert there("db", "restore", file).exit_code == 0
    address = make_url(bare_url).set(username=teams["ann"]).render_as_string(hide_password=False)
    assert datasets(cli_at(address)) == ["calls"]
    there("sql", "--write", "drop schema embstore cascade")


def test_a_login_is_held_to_its_limits_and_told_so(
    teams: dict[str, str], people: People, cli: Cli, cli_at: CliAt
) -> None:
    add = ("team", "add-member", teams["b"], teams["bob"], "--reader", "--statement-timeout")
    made = cli(*add, "200ms")
    assert made.exit_code == 0, made.output
    bob = cli_at(people.address(teams["bob"]))
    slow = bob("sql", "select pg_sleep(60)")
    assert slow.exit_code == 3
    assert slow.stderr.startswith("error: canceling statement due to statement timeout, which 'embstore whoami' shows")
    assert cli(*add, "1h").exit_code == 0  # enough for any query of a machine that stalls
    assert "statement timeout  1h" in bob("whoami").stdout
    held = [people.connect(teams["bob"]) for _ in range(3)]  # as many as he may have
    with held[0].begin(), held[1].begin(), held[2].begin():
        full = bob("status")
    for one in held:
        one.close()
    assert (full.exit_code, full.stderr.count("\n")) == (3, 1)
    assert f'too many connections for role "{teams["bob"]}"): end other commands' in full.stderr
    wait_until(lambda: bob("status").exit_code == 0, "the server to see that they are closed")


def test_more_workers_than_the_login_may_have_are_refused_before_they_start(
    teams: dict[str, str], people: People, cli: Cli, cli_at: CliAt
) -> None:
    ann = cli_at(people.address(teams["ann"]))
    for limit, code, said in (
        (
            "2",
            2,
            "1 worker and the command need 3 database connections, and the server lets this login have 2: ask for",
        ),
        ("3", 0, "averaged 2"),
    ):
        assert cli("team", "add-member", teams["a"], teams["ann"], "--writer", "--connections", limit).exit_code == 0
        run = ann("centroids", "--workers", "1")
        assert (run.exit_code, said in run.output) == (code, True), run.output
