"""Whose voice a file holds, read from its path: the values of `--speaker-from`."""

from __future__ import annotations

import re
from collections.abc import Callable

from embstore.errors import UsageError

SpeakerRule = Callable[[str], str | None]
"""From a path relative to the root to the speaker; None where the path does not say."""

DEFAULT = "parent"
CHOICES = "parent, parent-name, root, none, or regex:PATTERN with one group"


def speaker_rule(spec: str) -> SpeakerRule:
    """The rule that a value of `--speaker-from` stands for, of `a/b/1.wav`:

    `parent` a/b, so that `a/1` and `b/1` are two people; `parent-name` b; `root` a; `none` nobody;
    `regex:PATTERN` what the group (the only one, or the one named `speaker`) finds in the path.
    Raises UsageError on any other value.
    """
    if spec.startswith("regex:"):
        return _by_pattern(spec.removeprefix("regex:"))
    try:
        return _RULES[spec]
    except KeyError:
        raise UsageError(f"--speaker-from '{spec}' is not known; choose {CHOICES}") from None


def _parent(path: str) -> str | None:
    return path.rpartition("/")[0] or None


def _parent_name(path: str) -> str | None:
    return path.rpartition("/")[0].rpartition("/")[2] or None


def _root(path: str) -> str | None:
    first, slash, _ = path.partition("/")
    return first if slash else None


def _none(_path: str) -> str | None:
    return None


_RULES: dict[str, SpeakerRule] = {"parent": _parent, "parent-name": _parent_name, "root": _root, "none": _none}


def _by_pattern(text: str) -> SpeakerRule:
    try:
        pattern = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(
            f"--speaker-from 'regex:{text}' is not a regular expression ({error}); choose {CHOICES}"
        ) from None
    if "speaker" in pattern.groupindex:
        group = pattern.groupindex["speaker"]
    elif pattern.groups == 1:
        group = 1
    else:
        raise UsageError(
            f"--speaker-from 'regex:{text}' has {pattern.groups} groups; "
            "put one pair of parentheses around the speaker, or name the group: (?P<speaker>…)"
        )
    search = pattern.search

    def rule(path: str) -> str | None:
        match = search(path)
        return (match[group] or None) if match else None

    return rule
