"""The questions of `embstore extract --interactive`. What flags and settings say already is offered as the answer."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import click

from embstore import catalog
from embstore.db.engine import Database
from embstore.db.migrate import require_ready
from embstore.errors import EmbstoreError, UsageError
from embstore.extract import devices
from embstore.extract.works import DEFAULT_MODELS, UNITS, Wanted
from embstore.media import extensions
from embstore.models import registry
from embstore.settings import Settings
from embstore.sources import open_source
from embstore.supervise import PARENT_CONNECTIONS
from embstore.words import many

from .options import opened

MAX_WORKERS = 8
_LOOKED_AT = 5000
"""Files of a folder after which it is clear enough what it holds."""

T = TypeVar("T")


class Answers(NamedTuple):
    """What a person has chosen."""

    path: Path
    wanted: Wanted
    settings: Settings


def questions(path: Path | None, wanted: Wanted, settings: Settings, gpus: str | None) -> Answers:
    """Ask for the folder, the model and the workers. Raises UsageError where nobody can answer."""
    if not sys.stdin.isatty():
        raise UsageError("--interactive asks questions, and there is no terminal: type 'embstore extract PATH'")
    with opened(settings) as database:
        require_ready(database)
        return _questions(database, path, wanted, settings, gpus)


def _questions(database: Database, path: Path | None, wanted: Wanted, settings: Settings, gpus: str | None) -> Answers:
    path = _asked("Folder or manifest", str(path or Path.cwd()), _path)
    media = wanted.media or _media(path)
    wanted = replace(wanted, media=media)
    click.echo(f"models: {', '.join(registry.available())}")
    wanted = _asked(
        f"Model for {many(UNITS[media])}",
        _fitting(database, wanted),
        lambda name: _model(database, replace(wanted, name=name)),
    )
    most = min(MAX_WORKERS, settings.db_max_connections - PARENT_CONNECTIONS)
    number = settings.embedding_workers or len(devices.plan(None, gpus).devices)
    workers: int = click.prompt(
        f"Workers, 1 to {most}", default=min(number, most), type=click.IntRange(1, most), show_default=True
    )
    return Answers(path, wanted, replace(settings, embedding_workers=workers))


def _asked(question: str, offered: str, check: Callable[[str], T]) -> T:
    """Ask until the answer is one that `check` takes."""

    def checked(answer: str) -> T:
        try:
            return check(answer.strip())
        except EmbstoreError as error:
            raise click.UsageError(str(error)) from None

    answer: T = click.prompt(question, default=offered, value_proc=checked)
    return answer


def _path(answer: str) -> Path:
    path = Path(answer).expanduser()
    open_source(path, extensions=extensions.ANY)
    return path


def _model(database: Database, wanted: Wanted) -> Wanted:
    recipe = wanted.find(database)
    with database.begin() as connection:
        catalog.stored_model(connection, recipe.name, recipe.fingerprint())
    return wanted


def _fitting(database: Database, wanted: Wanted) -> str:
    """The model that is set, or the default where that one is for other media."""
    if wanted.name is not None:
        with suppress(EmbstoreError):
            _model(database, wanted)
            return wanted.name
    return DEFAULT_MODELS[str(wanted.media)]


def _media(path: Path) -> str:
    """What most files of a folder are; audio where there is nothing to go by."""
    if not path.is_dir():
        return "audio"
    files = (name for _, _, names in os.walk(path) for name in names)
    counts: Counter[str] = Counter()
    for name in islice(files, _LOOKED_AT):
        ending = os.path.splitext(name)[1].lower()  # noqa: PTH122  a Path for each of thousands
        counts.update(media for media, known in extensions.BY_MEDIA.items() if ending in known)
    return counts.most_common(1)[0][0] if counts else "audio"
