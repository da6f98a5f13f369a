"""pyproject.toml lists packages by hand, as `cli` and `migrations` move into embstore; none may be forgotten."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_of_the_tree_is_installed() -> None:
    tops = {"embstore": "embstore", "cli": "embstore.cli", "migrations": "embstore.migrations"}
    found = {
        ".".join((name, *init.parent.relative_to(ROOT / top).parts))
        for top, name in tops.items()
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line and not line.startswith("#")}
    needed = PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]
    assert {need.partition(">")[0] for need in needed} <= pinned
