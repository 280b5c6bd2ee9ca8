"""An actor for tests of what becomes of actors: it has a state, and tells where it is."""

from __future__ import annotations

import os

import zray


@zray.remote
class Counter:
    """Counts, and tells where."""

    def __init__(self, start: int = 0) -> None:
        self.value = start

    def add(self, amount: int) -> int:
        self.value += amount
        return self.value

    def place(self) -> str:
        return str(zray.get_runtime_context().get_node_id())

    def pid(self) -> int:
        return os.getpid()
