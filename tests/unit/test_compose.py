"""docker-compose.yml and .env: safe as they are checked in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from dotenv import dotenv_values

from embstore import settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


@pytest.fixture(scope="module")
def postgres(compose: dict[str, Any]) -> dict[str, Any]:
    service: dict[str, Any] = compose["services"]["postgres"]
    return service


def test_port_is_published_on_loopback_alone(postgres: dict[str, Any]) -> None:
    assert postgres["ports"]
    assert all(port.startswith("127.0.0.1:") for port in postgres["ports"])


def test_data_is_on_a_named_volume_where_the_image_keeps_it(compose: dict[str, Any], postgres: dict[str, Any]) -> None:
    volume, target = postgres["volumes"][0].split(":")
    assert volume in compose["volumes"]
    assert target == "/var/lib/postgresql"


def test_password_is_required_and_not_written_down(postgres: dict[str, Any]) -> None:
    assert postgres["environment"]["POSTGRES_PASSWORD"].startswith("${POSTGRES_PASSWORD:?")


def test_health_check_asks_for_the_database_it_creates(postgres: dict[str, Any]) -> None:
    check = postgres["healthcheck"]["test"]
    assert check[:2] == ["CMD", "pg_isready"]
    assert f"--dbname={postgres['environment']['POSTGRES_DB']}" in check
    assert f"--username={postgres['environment']['POSTGRES_USER']}" in check


def test_env_file_spells_out_the_defaults(tmp_path: Path) -> None:
    from_file, built_in = settings.load({}, ROOT), settings.load({}, tmp_path)
    assert from_file.embedding_model == "resemblyzer"
    assert replace(from_file, embedding_model=None) == built_in


def test_env_file_has_the_password_that_compose_asks_for() -> None:
    values = dotenv_values(ROOT / ".env")
    assert values["POSTGRES_PASSWORD"]


def test_database_url_offered_in_the_env_file_fits_the_compose_file(postgres: dict[str, Any], tmp_path: Path) -> None:
    offered = (ROOT / ".env").read_text().replace("# DATABASE_URL=", "DATABASE_URL=")
    (tmp_path / ".env").write_text(offered)
    url = settings.load({}, tmp_path).database_url
    made, password = postgres["environment"], dotenv_values(tmp_path / ".env")["POSTGRES_PASSWORD"]
    assert url == (f"postgresql+psycopg2://{made['POSTGRES_USER']}:{password}@127.0.0.1:5432/{made['POSTGRES_DB']}")
