"""Rows in an SQLite file: one transaction for each round of the service, write-ahead log, one head at a time.

Covers the file's format and checks, the transaction, what its errors mean. Does not cover what is written (`service`).

What is promised. When `write` returns, its changes are in the file's write-ahead log: they survive whatever becomes of processes
(`kill -9` of all of them at any instruction), because the kernel has the bytes. With sync "normal" the log is forced to the disk only when
it is folded into the file, every few MiB: a loss of *power* may cost the newest transactions, whole ones, and never damages the file. With sync
"full" each transaction is forced to the disk before `write` returns, which then takes as long as the disk does (the head's loop waits for it).

One head: the file is locked (`locking_mode=EXCLUSIVE`) by the process that has it open, and the kernel lets go when that process is gone,
however it went. A stopped process keeps it. Rows bear a CRC-32, so that flipped bits, too, are found when the file is loaded.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl
from zlib import crc32

from zray.gcs.storage import FORMAT, StorageError, newest
from zray.gcs.tables import Change, Row

_T = TypeVar("_T")
APPLICATION_ID: Final = 0x7A72_6179
"""In the file's header: it is zray's."""
_MAGIC: Final = b"SQLite format 3\0"
_SYNC: Final = {"normal": "NORMAL", "full": "FULL"}
_MEND: Final = "bring back a copy of it, or move it away to begin anew"
_SCHEMA: Final = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL)",
    "CREATE TABLE revisions (shard INTEGER PRIMARY KEY, revision INTEGER NOT NULL)",
    "CREATE TABLE rows (tab INTEGER NOT NULL, key BLOB NOT NULL, shard INTEGER NOT NULL, version INTEGER NOT NULL,"
    " ended INTEGER NOT NULL, crc INTEGER NOT NULL, value BLOB NOT NULL, PRIMARY KEY (tab, key))",
    "CREATE TABLE records (number INTEGER PRIMARY KEY AUTOINCREMENT, crc INTEGER NOT NULL, body BLOB NOT NULL)",
)
_PUT_ROW: Final = (
    "INSERT INTO rows (tab, key, shard, version, ended, crc, value) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (tab, key) DO UPDATE"
    " SET shard = excluded.shard, version = excluded.version, ended = excluded.ended, crc = excluded.crc, value = excluded.value"
)
_PUT_REVISION: Final = (
    "INSERT INTO revisions (shard, revision) VALUES (?, ?) ON CONFLICT (shard) DO UPDATE"
    " SET revision = max(revision, excluded.revision)"
)
_DROP: Final = "DELETE FROM records WHERE number IN (SELECT number FROM records ORDER BY number LIMIT ?)"


class SqliteStorage:
    """A storage in one file (and, while it is open, a log beside it with `-wal` behind its name)."""

    __slots__ = ("_db", "path")
    durable = True

    def __init__(self, path: str, shards: int, sync: str = "normal") -> None:
        """Open a file, or make it with mode 0600.

        Args:
            path: of the file, on a local file system.
            shards: of the control store; a file with another number is refused.
            sync: "normal" or "full", see above.

        Raises:
            StorageError: it cannot be used; one line says why and what to do.
            ValueError: there is no such `sync`.
        """
        if sync not in _SYNC:
            raise ValueError(f"sync={sync!r} of an SQLite storage is none of {', '.join(_SYNC)}")
        self.path = os.path.abspath(path)
        self._look_at_file()
        self._db = sqlite3.connect(self.path, timeout=0.0, isolation_level=None)
        try:
            self._try("cannot open", lambda: self._open(shards, _SYNC[sync]))
        except BaseException:
            self._db.close()
            raise

    @classmethod
    def by_name(cls, name: str, shards: int) -> SqliteStorage:
        """Open "sqlite:PATH" or "sqlite:PATH?sync=full". Raises as the constructor."""
        path, _, query = name.removeprefix("sqlite:").partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        sync = options.pop("sync", "normal")
        if options:
            raise ValueError(f"an SQLite storage has no option {next(iter(options))!r}, only sync")
        return cls(path, shards, sync)

    # -- opening -------------------------------------------------------------------------------------------------------

    def _look_at_file(self) -> None:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"cannot open {self.path}: {error.strerror}", error.errno or errno.EIO) from None
        try:
            start = os.read(fd, len(_MAGIC))
        finally:
            os.close(fd)
        if start and start != _MAGIC:
            raise StorageError(f"{self.path} is not an SQLite file: choose another name, or {_MEND}")

    def _open(self, shards: int, sync: str) -> None:
        db = self._db
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        # The first look takes the lock. In this mode the log's index is in this process's memory, not in a file beside.
        db.execute("BEGIN IMMEDIATE")
        owner, version = self._pragma("application_id"), self._pragma("user_version")
        empty = not self._pragma("schema_version")
        db.execute("ROLLBACK")
        if owner != APPLICATION_ID and not (empty and not owner):
            raise StorageError(f"{self.path} belongs to another program: choose another name")
        if version > FORMAT:
            raise StorageError(
                f"{self.path} was written by a newer zray (format {version}, this one reads {FORMAT}): install that, or choose another name"
            )
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {sync}")
        if empty:
            self._make(shards)
        [(found,)] = db.execute("SELECT value FROM facts WHERE name = 'shards'").fetchall()
        if found != shards:
            raise StorageError(
                f"{self.path} was written with {found} shards, this head has {shards}: start it with {found}"
            )
        [(verdict,)] = db.execute("PRAGMA quick_check(1)").fetchall()
        if verdict != "ok":
            raise StorageError(f"{self.path} is damaged ({verdict}): {_MEND}")

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    def _make(self, shards: int) -> None:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA:
            db.execute(statement)
        db.execute("INSERT INTO facts VALUES ('shards', ?)", (shards,))
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {FORMAT}")
        db.execute("COMMIT")

    def _try(self, what: str, call: Callable[[], _T]) -> _T:
        """Do something with the file; what goes wrong becomes a StorageError."""
        try:
            return call()
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            text = str(error)
            if "is full" in text:
                raise StorageError(
                    f"{what} {self.path}: the disk is full ({text}): free some space", errno.ENOSPC
                ) from None
            if "locked" in text:
                raise StorageError(
                    f"{self.path} is in use by another process, a head that runs (or is stopped) perhaps: end it first",
                    errno.EBUSY,
                ) from None
            if "malformed" in text or "not a database" in text or "no such table" in text:
                raise StorageError(f"{self.path} is damaged ({text}): {_MEND}") from None
            raise StorageError(f"{what} {self.path}: {text}") from None

    # -- reading -------------------------------------------------------------------------------------------------------

    def load(self, shard: int) -> tuple[int, list[tuple[int, bytes, Row]]]:
        """Return (revision, rows) of a shard; StorageError when a row is damaged."""
        return self._try("cannot read", lambda: self._load(shard))

    def _load(self, shard: int) -> tuple[int, list[tuple[int, bytes, Row]]]:
        found = self._db.execute("SELECT revision FROM revisions WHERE shard = ?", (shard,)).fetchone()
        rows: list[tuple[int, bytes, Row]] = []
        query = "SELECT tab, key, version, ended, crc, value FROM rows WHERE shard = ? ORDER BY version"
        for table, key, version, ended, crc, value in self._db.execute(query, (shard,)):
            self._check(crc, [table, key, shard, version, ended], value, f"row {version} of shard {shard}")
            rows.append((table, key, Row(value, version, bool(ended))))
        return (found[0] if found else 0), rows

    def _check(self, crc: Any, fields: Any, value: Any, what: str) -> None:
        if not isinstance(value, bytes) or _checksum(value, *fields) != crc:
            raise StorageError(f"{self.path} is damaged ({what} is not what was written): {_MEND}")

    def load_records(self) -> Iterator[bytes]:
        """Iterate over the lineage log; StorageError when a record is damaged."""
        records = self._try(
            "cannot read", lambda: self._db.execute("SELECT number, crc, body FROM records ORDER BY number").fetchall()
        )
        for number, crc, body in records:
            self._check(crc, [number], body, f"record {number}")
            yield body

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, changes: Sequence[tuple[int, Change]], records: Sequence[bytes] = (), drop: int = 0) -> None:
        """Store a round in one transaction; StorageError: nothing of it is stored."""
        self._try("cannot write to", lambda: self._write(changes, records, drop, whole=False))

    def rewrite(self, changes: Sequence[tuple[int, Change]]) -> None:
        """Store rows in place of all that are there, in one transaction."""
        self._try("cannot write to", lambda: self._write(changes, (), 0, whole=True))

    def _write(
        self, changes: Sequence[tuple[int, Change]], records: Sequence[bytes], drop: int, *, whole: bool
    ) -> None:
        rows, revisions = newest(changes)
        put = [
            (*fields, _checksum(change.value, *fields), change.value)
            for shard, change in rows.values()
            if change.value is not None
            for fields in [(int(change.table), change.key, shard, change.version, int(change.ended))]
        ]
        gone = [(table, key) for (table, key), (_, change) in rows.items() if change.value is None]
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        if whole:
            db.execute("DELETE FROM rows")
            db.execute("DELETE FROM records")
        if gone:
            db.executemany("DELETE FROM rows WHERE tab = ? AND key = ?", gone)
        if put:
            db.executemany(_PUT_ROW, put)
        db.executemany(_PUT_REVISION, list(revisions.items()))
        if drop:
            db.execute(_DROP, (drop,))
        if records:
            [(last,)] = db.execute(
                "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'records'"
            ).fetchall()
            numbered = [(number, _checksum(body, number), body) for number, body in enumerate(records, last + 1)]
            db.executemany("INSERT INTO records (number, crc, body) VALUES (?, ?, ?)", numbered)
        db.execute("COMMIT")

    def lapsed(self) -> bool:
        """The lock lasts as long as this process."""
        return False

    def tick(self) -> None:
        """Nothing needs to be renewed."""

    def close(self) -> None:
        """Fold the log into the file and close it."""
        self._db.close()


def _checksum(value: bytes, *fields: int | bytes) -> int:
    """CRC-32 of a row or record as a whole: a value under another key is damage, too."""
    return crc32(value, crc32(repr(fields).encode()))
