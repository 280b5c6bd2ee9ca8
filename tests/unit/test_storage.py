"""Storages in memory and in an SQLite file: the contract, and what only files can suffer."""

from __future__ import annotations

import errno
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.storage_contract import SHARDS, DurableStorageContract, Open, StorageContract, put
from zray.gcs.service import GcsService
from zray.gcs.sqlite_storage import SqliteStorage
from zray.gcs.storage import MemoryStorage, Storage, StorageError, check_name, open_storage
from zray.gcs.tables import Table


class TestMemory(StorageContract):
    @pytest.fixture
    def reopen(self) -> Open:
        return MemoryStorage


class TestSqlite(DurableStorageContract):
    @pytest.fixture(params=["", "?sync=full"])
    def reopen(self, tmp_path: Path, request: pytest.FixtureRequest) -> Open:
        return lambda: open_storage(f"sqlite:{tmp_path / 'gcs.db'}{request.param}", SHARDS)

    @pytest.fixture
    def crash(self) -> Callable[[Storage], None]:
        def drop(storage: Storage) -> None:
            assert isinstance(storage, SqliteStorage)
            # What a killed process leaves: the bytes that its writes have put into the files, and no lock.
            copies = {name: Path(name).read_bytes() for name in (storage.path, storage.path + "-wal")}
            storage.close()
            for name, data in copies.items():
                Path(name).write_bytes(data)

        return drop


@pytest.mark.parametrize("name", ["", "sqlite:", "sqlite", "redis:6379", "mysql://x", "memory:", "redis"])
def test_what_names_no_storage_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no storage is called"):
        check_name(name)


@pytest.mark.parametrize("options", ["sync=off", "sync=", "speed=high"])
def test_options_that_are_none(tmp_path: Path, options: str) -> None:
    with pytest.raises(ValueError, match="sync"):
        open_storage(f"sqlite:{tmp_path / 'x'}?{options}", SHARDS)


def filled(tmp_path: Path) -> Path:
    path = tmp_path / "gcs.db"
    storage = SqliteStorage(str(path), SHARDS)
    storage.write([put(b"key %d" % n, b"value %d " % n * 50, n + 1, n % SHARDS) for n in range(500)], [b"record"])
    storage.close()
    return path


def refusal(path: Path, shards: int = SHARDS) -> str:
    """Why a file is refused; one line."""
    with pytest.raises(StorageError) as caught:
        storage = SqliteStorage(str(path), shards)
        try:
            GcsService(None, "", shards=shards, storage=storage)
        finally:
            storage.close()
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    path = filled(tmp_path)
    assert path.stat().st_mode & 0o077 == 0
    assert os.listdir(tmp_path) == ["gcs.db"], "the log is folded into the file when it is closed"


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("dear diary, today I wrote a control store")
    assert "is not an SQLite file" in refusal(text)
    assert text.read_text().startswith("dear diary")
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE songs (title)")
    db.close()
    before = other.read_bytes()
    assert "belongs to another program" in refusal(other)
    assert other.read_bytes() == before
    assert "cannot open" in refusal(tmp_path / "no" / "such" / "directory")
    assert "Is a directory" in refusal(tmp_path)


def test_a_newer_format_and_another_number_of_shards_are_refused(tmp_path: Path) -> None:
    path = filled(tmp_path)
    assert f"written with {SHARDS} shards, this head has 8" in refusal(path, 8)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    assert "written by a newer zray (format 99" in refusal(path)


@pytest.mark.parametrize("seed", range(10))
def test_flipped_bits_are_found_or_do_no_harm(tmp_path: Path, seed: int) -> None:
    path = filled(tmp_path)
    data = bytearray(path.read_bytes())
    draw = random.Random(seed)
    for _ in range(40):
        data[draw.randrange(100, len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    storage: SqliteStorage | None = None
    try:
        storage = SqliteStorage(str(path), SHARDS)
        found = {key: row.value for shard in range(SHARDS) for _, key, row in storage.load(shard)[1]}
    except StorageError as error:
        words = str(error)
    else:
        words = ""
        assert found == {b"key %d" % n: (b"value %d " % n) * 50 for n in range(500)}, "what nobody has written"
    finally:
        if storage is not None:
            storage.close()
    assert not words or any(word in words for word in ("damaged", "cannot", "belongs"))


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path)
    os.truncate(path, path.stat().st_size // 2)
    assert "damaged" in refusal(path)


def test_a_full_disk_refuses_writes_and_nothing_else(tmp_path: Path) -> None:
    storage = SqliteStorage(str(tmp_path / "gcs.db"), SHARDS)
    storage.write([put(b"a", b"1", 1)])
    pages = storage._pragma("page_count")
    storage._db.execute(f"PRAGMA max_page_count = {pages + 20}")
    with pytest.raises(StorageError, match=r"the disk is full .* free some space") as caught:
        storage.write([put(b"b", bytes(1 << 20), 2)])
    assert caught.value.errno == errno.ENOSPC
    storage.write([put(b"c", b"3", 3)])
    storage._db.execute("PRAGMA max_page_count = 1000000")
    storage.write([put(b"b", bytes(1 << 20), 4)])
    assert [(key, len(row.value)) for _, key, row in storage.load(0)[1]] == [(b"a", 1), (b"c", 1), (b"b", 1 << 20)]
    storage.close()


_WRITER = """
import sys
from zray.gcs.client import GcsClient
from zray.gcs.service import GcsService
from zray.gcs.sqlite_storage import SqliteStorage
gcs = GcsService(None, "", shards=4, storage=SqliteStorage(sys.argv[1], 4))
client = GcsClient(gcs.handle_request)
number = int(client.kv_get("number") or b"0")
while True:
    number += 1
    client.kv_put("number", b"%d" % number)
    client.kv_put("copy %d" % (number % 7), b"%d" % number)
    print(number, flush=True)
"""


def test_nothing_acknowledged_is_lost_when_its_process_is_killed(tmp_path: Path) -> None:
    path = str(tmp_path / "gcs.db")
    said = 0
    for life in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, path],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        assert writer.stdout is not None
        for _ in range(20 + 7 * life):
            said = int(writer.stdout.readline())
        with pytest.raises(StorageError, match="in use by another process"):
            SqliteStorage(path, 4)
        os.kill(writer.pid, signal.SIGKILL)
        said = max([said, *(int(line) for line in writer.stdout.read().split("\n") if line)])
        writer.wait()
        writer.stdout.close()
        storage = SqliteStorage(path, 4)
        values = {
            key[2:]: row.value for shard in range(4) for table, key, row in storage.load(shard)[1] if table == Table.KV
        }
        storage.close()
        assert int(values[b"number"]) in (said, said + 1)
        assert int(values[b"copy %d" % (said % 7)]) >= said
