"""Where acknowledged writes go, and where flushed task rows may go.

Covers the interface of durable storage, the default that has none (rows live as long as the service), and the archive
file of flushed tasks. Does not cover what is written or when it counts: `service` calls `write` before a change is
applied, so a change that storage refused never happened. A door: the only file of this package that opens files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Final, Protocol
from zlib import crc32

import msgspec

from zray.gcs.tables import Change, Row
from zray.gcs.task_batches import TaskEnds


class Storage(Protocol):
    """What a backend must do. Task rows are not its business: they come back from the brokers, or from the archive."""

    def load(self, shard: int) -> tuple[int, list[tuple[int, bytes, Row]]]:
        """Return (revision, rows as (table, key, row)) of a shard.

        The revision of its newest stored change, also of a deletion.
        """
        ...

    def write(self, shard: int, changes: Sequence[Change]) -> None:
        """Store changes, all or none, so that they survive when this returns. OSError: they are not stored."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


class MemoryStorage:
    """Stores nothing: the rows in the shards are all there is."""

    __slots__ = ()

    def load(self, shard: int) -> tuple[int, list[tuple[int, bytes, Row]]]:
        """Return an empty shard."""
        return 0, []

    def write(self, shard: int, changes: Sequence[Change]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


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
