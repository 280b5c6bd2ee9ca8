"""What several processes and threads put alike under one id (`ObjectStore.put_shared`): the code of functions is."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from zray import serialization
from zray._store import PROC_WORKER, Store
from zray.object_store import ObjectRef, ObjectStore
from zray.serialization import Packed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CAPACITY = 4 << 20


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[ObjectStore]:
    with open(tmp_path / "store", "w+b") as file:
        Store.format(file.fileno(), CAPACITY, 1000)
        store = Store(file.fileno())
        store.register(PROC_WORKER)
        yield ObjectStore(store, str(tmp_path))
        store.close()


def code(size: int, refs: list[ObjectRef] | None = None) -> Packed:
    return Packed(serialization.KIND_PICKLE, bytes(size), [], refs or [])


@pytest.mark.parametrize("size", [10, 1000, 200_000, CAPACITY + 100_000], ids=["entry", "block", "without-gil", "file"])
def test_every_thread_finds_it_whole(objects: ObjectStore, size: int) -> None:
    packed = code(size)

    def put(object_id: bytes, gate: threading.Barrier, refs: list[ObjectRef], found: list[bytes]) -> None:
        gate.wait()
        refs.append(objects.put_shared(object_id, packed))
        found.append(bytes(objects.raw(refs[-1])))

    for number in range(20):
        object_id = number.to_bytes(16, "big")
        gate = threading.Barrier(6)
        found: list[bytes] = []
        refs: list[ObjectRef] = []
        threads = [threading.Thread(target=put, args=(object_id, gate, refs, found)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 6
        assert set(found) == {packed.stream}
        assert set(refs) == {refs[0]}
        assert {(ref.slot, ref.binary()) for ref in refs} == {(refs[0].slot, object_id)}
    del refs
    assert objects.store.statistics()["entries"] == 0
    assert objects.store.check() is None


def test_references_inside_are_held_once(objects: ObjectStore) -> None:
    inner = objects.put(b"i" * 16, code(1000))
    for _ in range(3):
        assert objects.put_shared(b"s" * 16, code(500, [inner])).binary() == b"s" * 16
    refs = [objects.put_shared(b"s" * 16, code(500, [inner])) for _ in range(3)]
    assert objects.store.references(inner) == 2
    del refs
    assert objects.store.references(inner) == 1
