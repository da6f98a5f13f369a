"""A recipe under the name that it goes by in the database, and what it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embstore.models.base import Media, Model, Recipe


@dataclass(frozen=True)
class Named:
    """A recipe itself, with all that it takes to make it again elsewhere."""

    name: str
    """What people type: the recipe's own name, or one that somebody has chosen."""
    family: str
    """Its entry in the group `embstore.models`."""
    options: Mapping[str, str]
    recipe: Recipe

    @property
    def media(self) -> Media:
        """What the model embeds."""
        return self.recipe.media

    @property
    def dim(self) -> int:
        """Length of its vectors."""
        return self.recipe.dim

    @property
    def settings(self) -> Mapping[str, Any]:
        """Preprocessing and other facts, as JSON."""
        return self.recipe.settings

    def fingerprint(self) -> str:
        """Hash of weights and settings; the name is no part of it. Raises ModelError."""
        return self.recipe.fingerprint()

    def load(self, device: str) -> Model:
        """Load it. Raises ModelError."""
        return self.recipe.load(device)
