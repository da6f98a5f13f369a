"""`embstore doctor`: is the database well, and what to do if not."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from embstore.doctor import Finding, examine
from embstore.settings import Settings
from embstore.words import plural

from .options import opened, pass_settings
from .output import write_json, write_rows

NEEDS_ATTENTION = 1


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_settings
@click.pass_context
def doctor(context: click.Context, as_json: bool, settings: Settings) -> None:
    """Check the database, and say what to do about what is wrong.

    It changes nothing.

    \b
    For monitoring, the exit code:
      0  all is well; warnings are printed
      1  there is a problem
      3  the database cannot be reached
    """
    with opened(settings) as database:
        findings = list(examine(database, settings))
    if as_json:
        write_json([asdict(finding) for finding in findings], sys.stdout)
    else:
        _tell(findings)
    context.exit(NEEDS_ATTENTION if any(finding.level == "problem" for finding in findings) else 0)


def _tell(findings: list[Finding]) -> None:
    write_rows(("check", "level", "found"), [(f.check, f.level, f.found) for f in findings], "table", sys.stdout)
    click.echo()
    for finding in findings:
        if finding.advice:
            click.echo(f"{finding.check}: {finding.advice}")
    problems, warnings = (sum(f.level == level for f in findings) for level in ("problem", "warning"))
    click.echo(f"{plural(problems, 'problem')}, {plural(warnings, 'warning')}")
