"""What every storage must do: inherited by a test class for each, with a fixture that opens it.

Covers the behaviour that the control store relies on. Does not cover what is special to one storage (files, servers).
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from zray.gcs import messages as m
from zray.gcs.client import GcsClient
from zray.gcs.service import GcsService
from zray.gcs.storage import Storage, StorageError
from zray.gcs.tables import ABSENT, Change, JobRow, Row, Table, namespaced_key
from zray.ids import task_id
from zray.task import TaskSpec

SHARDS = 4
ROOT = bytes(16)
Open = Callable[[], Storage]


def put(key: bytes, value: bytes, version: int, shard: int = 0, *, ended: bool = False) -> tuple[int, Change]:
    return shard, Change(Table.KV, key, value, version, 1, ended)


def gone(key: bytes, version: int, shard: int = 0) -> tuple[int, Change]:
    return shard, Change(Table.KV, key, None, version, 1)


class StorageContract:
    """Tests of any storage. `reopen` opens it: empty for the first time, with what was stored later."""

    def test_a_new_one_is_empty(self, reopen: Open) -> None:
        storage = reopen()
        assert [storage.load(shard) for shard in range(SHARDS)] == [(0, [])] * SHARDS
        assert list(storage.load_records()) == []
        assert not storage.lapsed()
        storage.tick()
        storage.close()

    def test_a_service_over_it_keeps_its_promises(self, reopen: Open) -> None:
        gcs = GcsService(None, "", shards=SHARDS, storage=reopen())
        client = GcsClient(gcs.handle_request)
        assert client.kv_put("a", b"1")
        assert not client.kv_put("a", b"2", overwrite=False)
        assert client.kv_get("a") == b"1"
        assert client.kv_put("b", bytes(3 << 20))
        assert client.kv_keys() == [b"a", b"b"]
        row = JobRow(task_id(ROOT, 1), 1, ROOT, 7, "default")
        version = client.write(row, expected=ABSENT)
        with pytest.raises(m.VersionConflict):
            client.write(row, expected=ABSENT)
        assert client.versioned(JobRow, row.id) == (row, version)
        assert client.delete(JobRow, row.id)
        assert client.kv_delete_prefix("") == 2
        gcs.validate()
        gcs.close()


class DurableStorageContract(StorageContract):
    """Tests of storages from which rows come back."""

    def test_rows_come_back_in_the_order_of_their_versions(self, reopen: Open) -> None:
        storage = reopen()
        storage.write([put(b"a", b"1", 1), put(b"b", b"2", 2, ended=True), put(b"c", b"", 9, 3)])
        storage.write([put(b"a", b"11", 3), put(b"\0\xff", bytes(range(256)), 4), gone(b"b", 5)])
        storage.write([put(b"d", b"4", 6), gone(b"d", 7)])
        storage.close()
        storage = reopen()
        assert storage.load(0) == (
            7,
            [(Table.KV, b"a", Row(b"11", 3)), (Table.KV, b"\0\xff", Row(bytes(range(256)), 4))],
        )
        assert storage.load(3) == (9, [(Table.KV, b"c", Row(b"", 9))])
        storage.close()

    def test_tables_are_kept_apart(self, reopen: Open) -> None:
        storage = reopen()
        storage.write([(0, Change(table, b"k" * 16, bytes([table]), int(table), 1)) for table in Table])
        storage.close()
        storage = reopen()
        assert {table: row.value for table, _, row in storage.load(0)[1]} == {table: bytes([table]) for table in Table}
        storage.close()

    def test_what_was_stored_is_there_although_nobody_closed_it(
        self, reopen: Open, crash: Callable[[Storage], None]
    ) -> None:
        storage = reopen()
        storage.write([put(b"a", b"1", 1)], [b"record"])
        crash(storage)
        storage = reopen()
        assert storage.load(0) == (1, [(Table.KV, b"a", Row(b"1", 1))])
        assert list(storage.load_records()) == [b"record"]
        storage.close()

    def test_records_are_kept_in_order_and_dropped_from_the_old_end(self, reopen: Open) -> None:
        storage = reopen()
        storage.write([], [b"%d" % n for n in range(5)])
        storage.write([], [b"5", b"6"], 3)
        storage.close()
        storage = reopen()
        assert list(storage.load_records()) == [b"3", b"4", b"5", b"6"]
        storage.write([], [], 4)
        storage.write([], [b"7"])
        assert list(storage.load_records()) == [b"7"]
        storage.close()

    def test_everything_can_be_written_anew(self, reopen: Open) -> None:
        storage = reopen()
        storage.write([put(b"a", b"1", 1), put(b"b", b"2", 2)], [b"record"])
        storage.rewrite([put(b"b", b"3", 5)])
        storage.close()
        storage = reopen()
        assert storage.load(0) == (5, [(Table.KV, b"b", Row(b"3", 5))])
        assert list(storage.load_records()) == []
        storage.close()

    def test_a_second_head_is_refused(self, reopen: Open) -> None:
        storage = reopen()
        storage.write([put(b"a", b"1", 1)])
        with pytest.raises(StorageError, match="in use by another"):
            reopen()
        storage.write([put(b"a", b"2", 2)])
        storage.close()
        reopen().close()

    @pytest.mark.parametrize("seed", range(5))
    def test_a_service_comes_back_as_it_was(self, reopen: Open, seed: int) -> None:
        draw = random.Random(seed)
        gcs = GcsService(None, "", shards=SHARDS, storage=reopen())
        for number in range(200):
            key = b"k%d" % draw.randrange(40)
            if draw.random() < 0.2:
                gcs.delete_bytes(Table.KV, namespaced_key(b"", key))
            else:
                gcs.put_bytes(Table.KV, namespaced_key(b"", key), draw.randbytes(draw.randrange(200)))
            gcs.put_row(JobRow(task_id(ROOT, number), number, ROOT, 7, "", running=draw.random() < 0.5))
            spec = TaskSpec(task_id(ROOT, number), ROOT, b"args")
            gcs.tasks_submitted(1, [spec])
            if draw.random() < 0.5:
                gcs.tasks_finished(1, 2, [spec.id], b"\0", [number])
            if draw.random() < 0.3:
                gcs.commit()
        entries = list(GcsClient(gcs.handle_request).entries(Table.KV))
        jobs, tasks = gcs.rows(JobRow), {row.id: row for row in gcs.tasks()}
        gcs.close()
        gcs = GcsService(None, "", shards=SHARDS, storage=reopen())
        assert list(GcsClient(gcs.handle_request).entries(Table.KV)) == entries
        assert gcs.rows(JobRow) == jobs
        assert {row.id: row for row in gcs.tasks()} == tasks
        gcs.validate()
        gcs.close()
