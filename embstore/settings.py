"""Settings: what flags, the environment and a `.env` file say, in that order, checked once.

    DATABASE_URL          postgresql://user:password@host:5432/name     default: the embedded server
    DB_MAX_CONNECTIONS    3 to 10000, of the whole command              default: 10
    EMBEDDING_WORKERS     worker processes, 1 or more, or auto          default: auto, by the devices
    EMBEDDING_MODEL       a model's name                                default: the command's own
    EMBSTORE_HOME         folder of the embedded server and its data    default: see `default_home`

An empty value is one that is not set. A name that looks like one of these but is none is refused, as a setting that is
quietly passed over is worse than an error.
"""

from __future__ import annotations

import difflib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dotenv.parser import parse_stream

from embstore.errors import UsageError

NAMES = ("DATABASE_URL", "DB_MAX_CONNECTIONS", "EMBEDDING_WORKERS", "EMBEDDING_MODEL", "EMBSTORE_HOME")

OWN_PREFIXES = ("EMBSTORE_", "EMBEDDING_", "DB_", "DATABASE_")
"""Names in `.env` that can only be meant for embstore."""

NEAR = 0.95
"""Likeness (difflib's ratio) from which an unknown name is taken for a slip of the pen.

DATABSE_URL and EMBEDDING_WORKER have 0.96; other programs' DATABASE_URI and EMBEDDING_MODEL_ID 0.92.
"""

URL_EXAMPLE = "postgresql://user:password@host:5432/name"
_schemes = ("postgresql", "postgres", "postgresql+psycopg2")

# As SQLAlchemy reads it, but strict about host and port: there the rest of a badly quoted password would end up, and
# from there in an error message.
_address = re.compile(
    r"(?:[^:/@]*(?::[^@]*)?@)?(?:\[[^\]/?@\s]+\]|[^:/?@\[\]\s]*)(?::(?P<port>[0-9]{0,5}))?(?:/[^?\s]*)?(?:\?.*)?"
).fullmatch


@dataclass(frozen=True)
class Settings:
    """What holds for one command."""

    database_url: str | None = field(default=None, repr=False)
    """For SQLAlchemy: `postgresql+psycopg2://…`, password and all; None stands for the embedded server."""
    db_max_connections: int = 10
    embedding_workers: int | None = None
    """None: by the devices (`auto`)."""
    embedding_model: str | None = None
    """None: the command's default."""
    home: Path = field(default_factory=lambda: default_home(os.environ))
    """Absolute; it need not exist yet."""


class _Value(NamedTuple):
    """A setting as somebody wrote it."""

    text: str
    place: str
    """Where it stood, for an error: `DB_MAX_CONNECTIONS in the environment`."""


def load(
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    *,
    database_url: str | None = None,
    db_max_connections: int | str | None = None,
    embedding_workers: int | str | None = None,
    embedding_model: str | None = None,
    home: Path | str | None = None,
) -> Settings:
    """Settings from flags (None: not given), or else `env` (the process's own), or else `.env` in `cwd`.

    Raises UsageError, which says where the value stood, if one is malformed or a name is not known.
    """
    env = os.environ if env is None else env
    cwd = Path.cwd() if cwd is None else cwd
    given = {
        "DATABASE_URL": database_url,
        "DB_MAX_CONNECTIONS": db_max_connections,
        "EMBEDDING_WORKERS": embedding_workers,
        "EMBEDDING_MODEL": embedding_model,
        "EMBSTORE_HOME": home,
    }
    values = _file_values(cwd / ".env") | _env_values(env) | _flag_values(given)
    url, model, place = values.get("DATABASE_URL"), values.get("EMBEDDING_MODEL"), values.get("EMBSTORE_HOME")
    connections, workers = values.get("DB_MAX_CONNECTIONS"), values.get("EMBEDDING_WORKERS")
    return Settings(
        database_url=_url(url) if url else None,
        db_max_connections=_whole(connections, 3, 10_000, "3 to 10000") if connections else Settings.db_max_connections,
        embedding_workers=_workers(workers) if workers else None,
        embedding_model=model.text.strip() if model else None,
        home=_folder(place, env, cwd) if place else default_home(env),
    )


def default_home(env: Mapping[str, str]) -> Path:
    """`$XDG_DATA_HOME/embstore`, or `~/.local/share/embstore`; for root `/var/lib/embstore`.

    PostgreSQL does not run as root, and the account that it runs under instead cannot enter root's own home, which is
    closed to others (0700).
    """
    if os.geteuid() == 0:
        return Path("/var/lib/embstore")
    data = env.get("XDG_DATA_HOME", "")
    # The XDG rules: a relative path there is to be ignored.
    base = Path(data) if data.startswith("/") else _home(env) / ".local" / "share"
    return base / "embstore"


def _home(env: Mapping[str, str]) -> Path:
    return Path(env["HOME"]) if env.get("HOME") else Path.home()


def _flag_values(given: Mapping[str, object]) -> dict[str, _Value]:
    texts = {name: str(value) for name, value in given.items() if value is not None}
    return {name: _Value(text, f"{name}, given as a flag,") for name, text in texts.items() if text.strip()}


def _env_values(env: Mapping[str, str]) -> dict[str, _Value]:
    """Other programs' names stand there too: refused is only what is embstore's by its prefix, or a near miss."""
    for name in env:
        if name in NAMES or name.startswith("EMBSTORE_TEST_"):
            continue
        meant = _near(name)
        if meant or name.startswith("EMBSTORE_"):
            raise UsageError(f"{name} in the environment is no setting; {_hint(meant)}")
    return {name: _Value(env[name], f"{name} in the environment") for name in NAMES if env.get(name, "").strip()}


def _file_values(path: Path) -> dict[str, _Value]:
    values: dict[str, _Value] = {}
    for name, text, line in _assignments(path):
        if name not in NAMES:
            meant = _near(name)
            if meant or (name.startswith(OWN_PREFIXES) and not name.startswith("EMBSTORE_TEST_")):
                raise UsageError(f"{name} in '{path}' line {line} is no setting; {_hint(meant)}")
            continue
        values.pop(name, None)
        if text and text.strip():
            values[name] = _Value(text, f"{name} in '{path}' line {line}")
    return values


def _assignments(path: Path) -> list[tuple[str, str | None, int]]:
    """Name, value and line of each assignment in a `.env` file; none where there is no file.

    By python-dotenv's parser, as its `dotenv_values` forgets the lines. `$` and `${…}` stay as they are: a password may
    hold them.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        raise UsageError(f"'{path}' is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror}") from None
    found = []
    for binding in parse_stream(io.StringIO(text)):
        # A binding begins with the blank lines before it.
        written = binding.original.string
        line = binding.original.line + written[: len(written) - len(written.lstrip())].count("\n")
        if binding.error:
            raise UsageError(f"'{path}' line {line} is not NAME=value; correct it, or put a # in front")
        if binding.key is not None:
            found.append((binding.key, binding.value, line))
    return found


def _near(name: str) -> str | None:
    """The setting that an unknown name was probably meant to be."""
    found = difflib.get_close_matches(name.upper(), NAMES, n=1, cutoff=NEAR)
    return found[0] if found else None


def _hint(meant: str | None) -> str:
    return f"write {meant}" if meant else f"the settings are {', '.join(NAMES)}"


def _url(value: _Value) -> str:
    """For SQLAlchemy, which from 2.1 on takes a plain `postgresql://` for psycopg 3. Errors never show the URL."""
    text = value.text.strip()
    scheme, separator, rest = text.partition("://")
    if not separator or scheme.lower() not in _schemes:
        raise UsageError(f"{value.place} is not an address of PostgreSQL; it looks like {URL_EXAMPLE}")
    found = _address(rest)
    if not found or int(found["port"] or 0) > 65535:
        raise UsageError(
            f"{value.place} has a host or port that cannot be read; it looks like {URL_EXAMPLE}, "
            "and in a password @ : / are written %40 %3A %2F"
        )
    return f"postgresql+psycopg2://{rest}"


def _workers(value: _Value) -> int | None:
    if value.text.strip().lower() == "auto":
        return None
    return _whole(value, 1, 10_000, "1 or more, or auto")


def _whole(value: _Value, least: int, most: int, allowed: str) -> int:
    text = value.text.strip()
    # No int() of just anything: it takes 1_0 and Arabic digits, and refuses more than 4,300 digits in its own way.
    number = int(text) if re.fullmatch("[0-9]{1,9}", text) else -1
    if not least <= number <= most:
        raise UsageError(f"{value.place} is '{text[:40]}'; allowed is a whole number, {allowed}")
    return number


def _folder(value: _Value, env: Mapping[str, str], cwd: Path) -> Path:
    text = value.text.strip()
    if "\0" in text:
        raise UsageError(f"{value.place} holds a NUL character; allowed is the path of a folder")
    if text == "~" or text.startswith("~/"):
        text = os.fspath(_home(env)) + text[1:]
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"{value.place} names a user whose home is not known; write the whole path") from None
    return Path(os.path.normpath(cwd.absolute() / path))
