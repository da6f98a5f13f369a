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
OVER_NETWORK = "docker-compose.tls.yml"


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


def test_with_tls_nobody_comes_in_without(postgres: dict[str, Any]) -> None:
    over = yaml.safe_load((ROOT / OVER_NETWORK).read_text())
    service = over["services"]["postgres"]
    assert set(over["services"]) == {"postgres"}
    # Compose adds ports and volumes to those of the first file, and puts the rest in its place.
    assert not {port.split(":")[-2] for port in service["ports"]} & {port.split(":")[-2] for port in postgres["ports"]}
    assert not service.keys() & {"image", "environment", "healthcheck"}
    given = dict(value.split("=") for value in service["command"] if "=" in value)
    assert (given["ssl"], given["ssl_min_protocol_version"]) == ("on", "TLSv1.2")
    mounted = {volume.split(":")[1] for volume in service["volumes"]}
    assert str(Path(given["ssl_cert_file"]).parent) in mounted
    assert f"-m 600 /certs/server.key {given['ssl_key_file']}" in service["entrypoint"][2]
    (config,) = service["configs"]
    assert config["target"] == given["hba_file"]
    rules = [line.split() for line in over["configs"][config["source"]]["content"].splitlines()]
    assert rules == [["local", "all", "all", "trust"], ["hostssl", "all", "all", "all", "scram-sha-256"]]


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
