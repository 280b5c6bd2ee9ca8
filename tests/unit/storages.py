"""Storage for tests of the control store: rows in dictionaries that outlive a service, with refusals on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from zray.gcs.storage import StorageBehind, StorageError
from zray.gcs.tables import Change, Row


class Died(BaseException):
    """The process was killed right after a write had reached the disk."""


class Disk:
    """Keeps rows over the life of a service; refuses when told."""

    durable = True

    def __init__(self) -> None:
        self.rows: dict[int, dict[tuple[int, bytes], Row]] = {}
        self.revisions: dict[int, int] = {}
        self.records: list[bytes] = []
        self.error: StorageError | None = None
        self.refuses: Callable[[Sequence[tuple[int, Change]]], bool] = lambda changes: True
        """Which writes `error` is for."""
        self.writes = 0
        self.has_lapsed = False
        self.dies = False
        """The next write is the last thing that its process does."""
        self.closed = False

    @property
    def full(self) -> bool:
        return self.error is not None

    @full.setter
    def full(self, full: bool) -> None:
        self.error = StorageError("no space left") if full else None

    def load(self, shard: int) -> tuple[int, list[tuple[int, bytes, Row]]]:
        rows = sorted(self.rows.get(shard, {}).items(), key=lambda item: item[1].version)
        return self.revisions.get(shard, 0), [(table, key, row) for (table, key), row in rows]

    def load_records(self) -> Iterator[bytes]:
        return iter(list(self.records))

    def write(self, changes: Sequence[tuple[int, Change]], records: Sequence[bytes] = (), drop: int = 0) -> None:
        if self.error is not None and self.refuses(changes):
            raise self.error
        self.writes += 1
        for shard, change in changes:
            rows = self.rows.setdefault(shard, {})
            rows.pop((change.table, change.key), None)
            if change.value is not None:
                rows[change.table, change.key] = Row(change.value, change.version, change.ended)
            self.revisions[shard] = max(change.version, self.revisions.get(shard, 0))
        del self.records[:drop]
        self.records += records
        if self.dies:
            self.dies = False
            raise Died

    def rewrite(self, changes: Sequence[tuple[int, Change]]) -> None:
        if self.error is not None and not isinstance(self.error, StorageBehind):
            raise self.error
        self.error = None
        self.rows.clear()
        self.records.clear()
        self.write(changes)

    def lapsed(self) -> bool:
        return self.has_lapsed

    def tick(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
