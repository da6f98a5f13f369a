"""Datasets for torch's DataLoader; spawned workers have to import them."""

from __future__ import annotations

import os
from typing import Any

from torch.utils.data import Dataset

from embstore.store import Store


class Vectors(Dataset[Any]):
    """Each item is a vector, with the worker that has read it and the server's process that it has read it from."""

    def __init__(self, store: Store, ids: list[int]) -> None:
        self.store = store
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> dict[str, Any]:
        found = self.store.vectors("calls", "small", ids=[self.ids[place]])
        backend = self.store.sql("select pg_backend_pid() as pid")[0].pid
        return {"id": self.ids[place], "vector": found.vectors[0], "worker": os.getpid(), "backend": backend}


class Extracts(Dataset[Any]):
    """What a worker may not do."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return 1

    def __getitem__(self, place: int) -> str:
        try:
            self.store.extract()
        except Exception as error:  # noqa: BLE001
            return f"{type(error).__name__}: {error}"
        return "it did"
