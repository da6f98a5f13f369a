"""Which model a command line asks for, and of what media."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from embstore import recipes
from embstore.db.engine import Database
from embstore.models.named import Named

DEFAULT_MODELS = {"audio": "resemblyzer", "image": "statistical"}
UNITS = {"audio": "utterances", "image": "images"}


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
