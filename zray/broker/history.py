"""What happened to tasks and actors on this node, bounded: the source of `zray.timeline()` and of state listings."""

from __future__ import annotations

import collections
from typing import Final

_ROWS: Final = 100_000


class History:
    """The last events, oldest first."""

    def __init__(self, rows: int = _ROWS) -> None:
        self.rows: collections.deque[tuple[float, str, bytes, str, str]] = collections.deque(maxlen=rows)

    def add(self, when: float, table: str, key: bytes, what: str, detail: str) -> None:
        """Note an event; when: seconds since the epoch."""
        self.rows.append((when, table, key, what, detail))
