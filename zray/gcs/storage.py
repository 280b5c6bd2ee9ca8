"""Where acknowledged writes go, and where flushed task rows may go.

Covers the interface of durable storage, its errors, the default that has none (rows live as long as the service), how a
storage is named, and the archive file of flushed tasks. Does not cover what is written or when it counts (`service`), or
the storages themselves (`sqlite_storage`, `redis_storage`). A door: with those two the only files of this package that
open files or connections.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Protocol
from zlib import crc32

import msgspec

from zray.gcs.tables import Change, Row
from zray.gcs.task_batches import TaskEnds

FORMAT: Final = 1
"""Of what storages hold; one with a higher number is not touched."""


class StorageError(OSError):
    """A storage cannot be opened, or does not take a write: nothing of that write is stored. The text says what to do."""

    def __init__(self, message: str, number: int = errno.EIO) -> None:
        super().__init__(number, message)

    def __str__(self) -> str:
        return str(self.strerror)


class StorageTaken(StorageError):
    """Another head has the storage now: this one must not go on."""


class StorageBehind(StorageError):
    """The storage has lost what it had acknowledged (its server came back without its newest writes): everything must be
    written again with `rewrite`."""


class Storage(Protocol):
    """What a backend must do. Not thread-safe. Backends are told apart by their constructors only."""

    durable: bool
    """Whether anything survives: False means that `write` need not be called."""

    def load(self, shard: int) -> tuple[int, list[tuple[int, bytes, Row]]]:
        """Return (revision, rows as (table, key, row), oldest version first) of a shard.

        The revision of its newest stored change, also of a deletion.
        """
        ...

    def load_records(self) -> Iterator[bytes]:
        """Iterate over the records of the lineage log that have not been dropped, oldest first."""
        ...

    def write(self, changes: Sequence[tuple[int, Change]], records: Sequence[bytes] = (), drop: int = 0) -> None:
        """Store changes of rows as (shard, change), all or none, so that they survive when this returns.

        Args:
            changes: in order; of several changes of one row the last one counts.
            records: to be added to the lineage log.
            drop: so many of the oldest records of the log go.

        Raises:
            StorageError: nothing is stored. StorageTaken, StorageBehind: and that is not a passing state.
        """
        ...

    def rewrite(self, changes: Sequence[tuple[int, Change]]) -> None:
        """As `write`, in place of all that is stored."""
        ...

    def lapsed(self) -> bool:
        """Whether another head may have taken the storage meanwhile: nothing may be read before the next `write` has succeeded."""
        ...

    def tick(self) -> None:
        """Called some times a second: keep the storage for this head. Raises as `write`."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


class MemoryStorage:
    """Stores nothing: the rows in the shards are all there is."""

    __slots__ = ()
    durable = False

    def load(self, shard: int) -> tuple[int, list[tuple[int, bytes, Row]]]:
        """Return an empty shard."""
        return 0, []

    def load_records(self) -> Iterator[bytes]:
        """Return nothing."""
        return iter(())

    def write(self, changes: Sequence[tuple[int, Change]], records: Sequence[bytes] = (), drop: int = 0) -> None:
        """Do nothing."""

    def rewrite(self, changes: Sequence[tuple[int, Change]]) -> None:
        """Do nothing."""

    def lapsed(self) -> bool:
        """Nobody else can have it."""
        return False

    def tick(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def check_name(name: str) -> str:
    """Return the kind of storage that a name means ("memory", "sqlite" or "redis"); nothing is opened.

    Raises:
        ValueError: it names none.
    """
    scheme, _, rest = name.partition(":")
    if name == "memory":
        return "memory"
    if scheme == "sqlite" and rest:
        return "sqlite"
    if scheme in ("redis", "rediss", "redis+unix") and rest.startswith("//"):
        return "redis"
    raise ValueError(
        f"no storage is called {name!r}: memory, sqlite:PATH, redis://HOST:PORT/DB or redis+unix:///SOCKET"
    )


def open_storage(name: str, shards: int) -> Storage:
    """Open a storage by name.

    Args:
        name: "memory"; "sqlite:PATH", with "?sync=full" behind it also against power loss; "redis://HOST:PORT/DB?prefix=NAME",
            "rediss://..." or "redis+unix:///SOCKET?db=N&prefix=NAME".
        shards: of the control store.

    Raises:
        ValueError: it names none.
        StorageError: it cannot be had: damaged, foreign, of a newer version, in use, not there.
    """
    kind = check_name(name)
    if kind == "memory":
        return MemoryStorage()
    if kind == "sqlite":
        from zray.gcs.sqlite_storage import SqliteStorage

        return SqliteStorage.by_name(name, shards)
    from zray.gcs.redis_storage import RedisStorage

    return RedisStorage.by_name(name, shards)


def newest(changes: Iterable[tuple[int, Change]]) -> tuple[dict[tuple[int, bytes], tuple[int, Change]], dict[int, int]]:
    """Return the last change of each row, by (table, key), and the highest version of each shard among changes."""
    rows: dict[tuple[int, bytes], tuple[int, Change]] = {}
    revisions: dict[int, int] = {}
    for shard, change in changes:
        rows[change.table, change.key] = shard, change
        revisions[shard] = max(revisions.get(shard, 0), change.version)
    return rows, revisions


_HEADER: Final = 8
"""Bytes before each record: its length and its CRC-32, both little-endian."""
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(TaskEnds).decode


class TaskArchive:
    """An append-only file of flushed task batches.

    When it is full it becomes `<path>.1` (replacing the last such) and a new one begins.
    """

    __slots__ = ("_fd", "_size", "failures", "max_bytes", "path")

    def __init__(self, path: str, max_bytes: int = 1 << 30) -> None:
        """`max_bytes`.

        Size after which a new file begins, so that at most twice that is on disk. OSError: the file cannot be opened.
        """
        self.path = path
        self.max_bytes = max_bytes
        self.failures = 0
        """Batches that could not be written (full disk): an archive is a convenience, and tasks go on without it."""
        self._fd = -1
        self._size = 0
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size

    def append(self, ends: TaskEnds) -> None:
        """Write a batch behind the others; failures are counted, never raised."""
        body = _encode(ends)
        record = len(body).to_bytes(4, "little") + crc32(body).to_bytes(4, "little") + body
        try:
            if self._size and self._size + len(record) > self.max_bytes:
                os.close(self._fd)
                os.replace(self.path, self.path + ".1")
                self._open()
            written = os.write(self._fd, record)
            if written < len(record):
                os.ftruncate(self._fd, self._size)  # a torn record would hide what follows it
                self.failures += 1
            else:
                self._size += written
        except OSError:
            self.failures += 1

    def close(self) -> None:
        """Close the file; what was appended stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_archive(path: str) -> Iterator[TaskEnds]:
    """Iterate over the batches of an archive file, oldest first, up to its end or the first damaged record."""
    with open(path, "rb") as file:
        while True:
            header = file.read(_HEADER)
            if len(header) < _HEADER:
                return
            body = file.read(int.from_bytes(header[:4], "little"))
            if crc32(body) != int.from_bytes(header[4:], "little"):
                return
            try:
                yield _decode(body)
            except msgspec.MsgspecError:
                return
