"""The flags that say how a model is made, shared by the commands that make one."""

from __future__ import annotations

import functools
from typing import Any

import click

from embstore import recipes
from embstore.errors import UsageError

from .options import Command


def model_options(command: Command) -> Command:
    """Add the model's flags; the command gets `options`, by name, in their place."""

    @functools.wraps(command)
    def with_options(
        *args: Any,
        model_dir: str | None,
        precision: str | None,
        max_window: str | None,
        pairs: tuple[str, ...],
        **values: Any,
    ) -> Any:
        flags = {"model_dir": model_dir, "precision": precision, "max_window": max_window}
        options = {name: value for name, value in flags.items() if value is not None}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not (name and equals):
                raise UsageError(f"--model-option '{pair}' is not NAME=VALUE, such as channel=mean")
            options[name] = value
        return command(*args, options=recipes.with_whole_paths(options), **values)

    for add in reversed(_FLAGS):
        with_options = add(with_options)
    return with_options


_FLAGS = (
    click.option("--model-dir", metavar="DIR", help="Folder or file of the model, for wespeaker."),
    click.option("--precision", metavar="WHICH", help="auto, fp32, bf16 or fp16, for wespeaker.  [default: auto]"),
    click.option("--max-window", metavar="SECONDS", help="Longest stretch embedded in one go, for wespeaker."),
    click.option(
        "--model-option", "pairs", metavar="NAME=VALUE", multiple=True, help="Any other option that the model takes."
    ),
)
