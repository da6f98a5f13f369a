"""Every error that embstore raises on purpose.

    EmbstoreError                 one clear line for a person; the command line prints it and exits with `exit_code`
      UsageError                  2   a flag, a setting, a path or a name is wrong
      ModelError                  2   a model is unknown, cannot be loaded, or is not the one the name stands for
      DatabaseError               3   the database cannot be reached or used
        DatabaseUnavailable           nothing answers, or the password is wrong
        DatabaseNotReady              too old, no pgvector, not migrated, or migrated by a newer embstore
        LeaseLost                     another worker has taken over; what this one wrote late was refused
      WorkerError                 4   worker processes keep dying or report an error that no item explains
    ItemError                     one item has no embedding; the run goes on
      ItemFailed                      a fault: unreadable, broken, not finite
      ItemSkipped                     nothing to embed: too short, no speech

A message names the object, the cause and what to type next.
"""

from __future__ import annotations


class EmbstoreError(Exception):
    """Base of every error meant for a person. Its text is one line."""

    exit_code = 1


class UsageError(EmbstoreError):
    """A flag, a setting, a path or a name is wrong; nothing was done."""

    exit_code = 2


class ModelError(EmbstoreError):
    """A model is unknown, cannot be loaded, or is not the one that its name stands for."""

    exit_code = 2


class DatabaseError(EmbstoreError):
    """The database cannot be reached or used."""

    exit_code = 3


class DatabaseUnavailable(DatabaseError):
    """Nothing answers at the address, or it refuses this user."""


class DatabaseNotReady(DatabaseError):
    """The server answers, but is too old, lacks pgvector, or is at another revision than this embstore."""


class LeaseLost(DatabaseError):
    """Rows that this worker had claimed belong to another one by now; its write was rolled back."""


class WorkerError(EmbstoreError):
    """Worker processes keep dying, or report an error that no single item explains."""

    exit_code = 4


class ItemError(Exception):
    """One item has no embedding, and why. `code` is a short word for tables and summaries; the text is the detail."""

    status: str

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail

    def __reduce__(self) -> tuple[type[ItemError], tuple[str, str]]:
        return type(self), (self.code, self.detail)


class ItemFailed(ItemError):
    """A fault of the item: `not_found`, `no_permission`, `decode_error`, `empty_audio`, `not_finite`, …"""

    status = "failed"


class ItemSkipped(ItemError):
    """There is nothing in the item to embed: `too_short`, `no_speech`, `silent`, …"""

    status = "skipped"


def first_line(error: BaseException | None) -> str:
    """The first line of what an error says; the name of its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def described(error: BaseException) -> str:
    """The type of an error and all that it says, in one line; for those of other people's code."""
    return " ".join(f"{type(error).__name__}: {error}".split())
