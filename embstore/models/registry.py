"""Find a model by name among those that installed packages offer (entry-point group `embstore.models`)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from embstore.errors import EmbstoreError, ModelError, UsageError, described
from embstore.models.base import Recipe

GROUP = "embstore.models"


def available() -> dict[str, EntryPoint]:
    """The families of models that are installed, by name in alphabetical order; nothing is imported.

    Raises ModelError if two packages offer the same name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise ModelError(
                f"model {entry.name}: two packages offer it, {_package(other)} and {_package(entry)}; uninstall one"
            )
    return found


def find(name: str, options: Mapping[str, str], media: str | None = None) -> Recipe:
    """The recipe of the model `family` or `family:variant`, where the variant is an option too.

    `media` is what it has to embed, if not None: see `name_for`. Raises ModelError if there is none or its package is
    broken, UsageError for options it does not know and for a model of other media.
    """
    recipe = build(*resolve(name_for(name, media), options))
    check_media(recipe, media)
    return recipe


def name_for(name: str, media: str | None) -> str:
    """The name of the model that people call `name` when they speak of media.

    A name stands for one set of weights and settings, and so for one kind of media. Where two models would be called
    alike, the second is offered as `family-media`: `statistical`, asked for with `image`, is `statistical-image`.
    """
    family, colon, variant = name.partition(":")
    return f"{family}-{media}{colon}{variant}" if f"{family}-{media}" in available() else name


def check_media(recipe: Recipe, media: str | None) -> None:
    """Raise UsageError if a model embeds something else than `media`, if that is not None."""
    if media not in (None, recipe.media):
        raise UsageError(f"model '{recipe.name}' embeds {recipe.media}, not {media}: name another one with --model")


def resolve(name: str, options: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The family of `family` or `family:variant`, and its options, of which the variant is one. Raises UsageError."""
    family, colon, variant = name.partition(":")
    if colon and "variant" in options:
        raise UsageError(f"model {name}: the variant is given twice, in the name and as an option; leave one out")
    return family, {**options, "variant": variant} if colon else dict(options)


def build(family: str, options: Mapping[str, str]) -> Recipe:
    """The recipe that a family makes of its options. Raises as `find` does."""
    entry = available().get(family)
    if entry is None:
        raise ModelError(_unknown(family))
    try:
        recipe = entry.load()
        found: Recipe = recipe(dict(options))
    except EmbstoreError:
        raise
    # A stranger's code runs here, and may raise anything.
    except Exception as error:
        cause = described(error)
        raise ModelError(f"model {family}: package {_package(entry)} can't be used: {cause}") from error
    return found


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def _unknown(family: str) -> str:
    """What to say of a name that nobody offers."""
    known = list(available())
    near = difflib.get_close_matches(family, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"there is no model {family!r}.{hint} Installed: {', '.join(known) or 'none'}"
