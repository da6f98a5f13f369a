"""An embedding store on PostgreSQL and pgvector.

    import embstore

    with embstore.connect() as store:
        ids, vectors = store.vectors("speech", "resemblyzer")

Nothing is imported before it is used: neither SQLAlchemy nor numpy, and torch only where a model is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embstore import errors
    from embstore.settings import Settings
    from embstore.store import Store, connect

__all__ = ["Settings", "Store", "connect", "errors"]

_PLACES = {"Settings": "embstore.settings", "Store": "embstore.store", "connect": "embstore.store"}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("embstore.errors")
    if name not in _PLACES:
        raise AttributeError(f"module 'embstore' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
