"""What is to be embedded, by what: from the words of whoever asks, to models and the datasets that each works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby

from embstore import catalog, recipes
from embstore.catalog import Dataset
from embstore.db.engine import Database
from embstore.errors import UsageError
from embstore.extract.run import register_source
from embstore.media import extensions
from embstore.models.base import Recipe
from embstore.models.named import Named
from embstore.register import Registered
from embstore.sources import Source
from embstore.words import many

DEFAULT_MODELS = {"audio": "resemblyzer", "image": "statistical"}
UNITS = {"audio": "utterance", "image": "image"}

Work = tuple[Recipe, list[Dataset]]
"""A model, and the datasets that it is to embed what is pending of."""


@dataclass(frozen=True)
class Wanted:
    """A model by the words of flags and settings."""

    name: str | None
    """None: the default of the media."""
    media: str | None
    """None: what the model embeds, or audio."""
    options: Mapping[str, str]

    def find(self, database: Database, media: str | None = None) -> Named:
        """The model of a name that the database keeps, or of an installed family.

        `media` is what it is to embed, if nothing else was said. Raises ModelError and UsageError.
        """
        media = self.media or media
        with database.begin() as connection:
            return recipes.find(connection, self.name or DEFAULT_MODELS[media or "audio"], self.options, media)


def register(
    database: Database, source_of: Callable[..., Source], name: str | None, wanted: Wanted, *, dry_run: bool = False
) -> tuple[Work, Registered, Source]:
    """Register what a source holds for a model, unless that is refused.

    `source_of(extensions=…)` opens the source; `name` is the dataset's, None: the source's. Raises ModelError and
    UsageError.
    """
    recipe = wanted.find(database)
    with database.begin() as connection:
        catalog.stored_model(connection, recipe.name, recipe.fingerprint())
    source = source_of(extensions=extensions.BY_MEDIA[recipe.media])
    try:
        dataset, found = register_source(
            database, source, name=name or source.name, media=recipe.media, dry_run=dry_run
        )
    except UsageError as error:
        other = "image" if recipe.media == "audio" else "audio"
        if source.ignored.keys() & extensions.BY_MEDIA[other]:
            raise UsageError(f"{error}; for {many(UNITS[other])}, type --media {other}") from None
        raise
    return (recipe, [dataset]), found, source


def every_dataset(database: Database, wanted: Wanted) -> list[Work]:
    """All datasets that a model can embed, whether it was asked to before or not."""
    recipe = wanted.find(database)
    with database.begin() as connection:
        datasets = catalog.datasets(connection, recipe.media)
    return [(recipe, datasets)] if datasets else []


def open_works(database: Database, name: str | None, wanted: Wanted, *, named: bool) -> list[Work]:
    """What is pending, model by model; a dataset and a model `named` together are begun if need be."""
    with database.begin() as connection:
        chosen = catalog.get_dataset(connection, name, writing=True) if name is not None else None
        work = catalog.open_work(connection)
    recipe = wanted.find(database, chosen.media if chosen is not None and named else None)
    if chosen is not None and named:
        return [(recipe, [chosen])]
    work = [
        w
        for w in work
        if (chosen is None or w.dataset == chosen)
        and (not named or w.model == recipe.name)
        and wanted.media in (None, w.dataset.media)
    ]
    return [
        (recipe if model == recipe.name else Wanted(model, None, {}).find(database), [w.dataset for w in same])
        for model, same in groupby(work, key=lambda w: w.model)
    ]
