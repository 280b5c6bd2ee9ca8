"""Values that come from other nodes into the store, beside runs that make the same objects anew (`Store.fill`, `ObjectStore.place`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from zray import _store
from zray._store import PROC_BROKER, Store
from zray.object_store import FilePlace, ObjectStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CAPACITY = 4 << 20
TASK = bytes(range(12)) + bytes(4)
NAME = _store.with_index(TASK, 1)
OLD, NEW = b"o" * 9000, b"n" * 9000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open(tmp_path / "store", "w+b") as file:
        Store.format(file.fileno(), CAPACITY, 100)
        made = Store(file.fileno())
        made.register(PROC_BROKER)
        yield made


def run_again(store: Store, ref: _store.ObjectRef) -> tuple[int, int]:
    """Reopen an object and begin to make it here; return its slot and the attempt."""
    attempt = store.retry(ref, 0)
    assert attempt is not None
    slots = store.claim(TASK, 1, attempt)
    assert slots is not None
    return (slots if isinstance(slots, int) else slots[0]), attempt


def sealed(store: Store, ref: _store.ObjectRef) -> bytes:
    return bytes(store.read(ref)[2])


def test_only_what_is_elsewhere_is_filled(store: Store) -> None:
    ref = store.expect(NAME, 0, None, None, "")
    assert store.fill(ref, 9000, 0) is None
    store.elsewhere(ref, False)
    assert store.fill(ref, 9000, 0) is None, "it is made on another node, and does not exist yet"
    store.elsewhere(ref, True)
    filling = store.fill(ref, 9000, 0)
    assert filling is not None
    filling.part(0, len(OLD))[:] = OLD
    assert filling.seal(0, 0, [])
    assert sealed(store, ref) == OLD
    assert store.fill(ref, 9000, 0) is None


def test_a_transfer_that_begins_late_leaves_the_run_alone(store: Store) -> None:
    ref = store.expect(NAME, 0, None, None, "")
    store.elsewhere(ref, True)
    slot, attempt = run_again(store, ref)
    assert store.fill(ref, 9000, 0) is None
    assert not store.take_copy(ref)
    assert store.seal_result(slot, attempt, NEW, [], 0, len(NEW), []) >= 0
    assert sealed(store, ref) == NEW


def test_a_transfer_that_ends_late_changes_nothing(store: Store) -> None:
    ref = store.expect(NAME, 0, None, None, "")
    store.elsewhere(ref, True)
    filling = store.fill(ref, 9000, 0)
    assert filling is not None
    slot, attempt = run_again(store, ref)
    filling.part(0, len(OLD))[:] = OLD
    assert not filling.seal(0, 0, [])
    del filling
    assert store.seal_result(slot, attempt, NEW, [], 0, len(NEW), []) >= 0
    assert sealed(store, ref) == NEW


def test_who_drops_a_transfer_late_does_not_end_the_next(store: Store) -> None:
    ref = store.expect(NAME, 0, None, None, "")
    store.elsewhere(ref, True)
    first = store.fill(ref, 9000, 0)
    second = store.fill(ref, 9000, 0)
    assert second is not None
    second.part(0, len(NEW))[:] = NEW
    del first
    assert second.seal(0, 0, [])
    assert sealed(store, ref) == NEW


@pytest.mark.parametrize("ends", ["reopened", "failed", "filled again", "sealed late"])
def test_a_transfer_that_is_over_writes_where_nothing_else_is(store: Store, ends: str) -> None:
    """A thread may be writing a piece, and another sending one, while it is decided that the transfer is over."""
    before = store.statistics()["used"]
    ref = store.expect(NAME, 0, None, None, "")
    store.elsewhere(ref, True)
    filling = store.fill(ref, 9000, 0)
    assert filling is not None
    part, view = filling.part(0, len(OLD)), filling.view()
    second = None
    if ends == "filled again":
        second = store.fill(ref, 9000, 0)
    elif ends == "failed":
        store.seal_forced(ref, b"why", 3, 0)
    else:
        assert store.retry(ref, 0) is not None
    if ends == "sealed late":
        assert not filling.seal(0, 0, [])
    del filling
    others = [store.put(bytes([i]) * 12 + bytes(4), NEW, [], 0, len(NEW), []) for i in range(1, 20)]
    part[:] = OLD
    assert [sealed(store, other) for other in others] == [NEW] * len(others)
    assert bytes(view) == OLD, "what others are sent of it is what was written"
    store.check()
    del part, view, second, others, ref
    assert store.statistics()["used"] == before, "nothing is left of it"
    store.check()


def test_what_does_not_fit_is_opened_in_a_file_under_the_same_rule(store: Store, tmp_path: Path) -> None:
    files = tmp_path / "spill"
    files.mkdir()
    objects = ObjectStore(store, str(files))
    ref = store.expect(NAME, 0, None, None, "")
    assert objects.place(ref, 2 * CAPACITY, 0) is None
    (files / f"{NAME.hex()}.value").write_text("what a run here has just written")
    assert objects.place(ref, 2 * CAPACITY, 0) is None
    assert [path.read_text() for path in files.iterdir()] == ["what a run here has just written"]
    store.elsewhere(ref, True)
    place = objects.place(ref, 2 * CAPACITY, 0)
    assert isinstance(place, FilePlace)
    place.part(0, 2 * CAPACITY)[:] = b"x" * 2 * CAPACITY
    assert place.seal(0, 0, [])


def test_who_drops_a_file_late_does_not_remove_the_next(store: Store, tmp_path: Path) -> None:
    files = tmp_path / "spill"
    files.mkdir()
    objects = ObjectStore(store, str(files))
    ref = store.expect(NAME, 0, None, None, "")
    store.elsewhere(ref, True)
    first = objects.place(ref, 2 * CAPACITY, 0)
    second = objects.place(ref, 2 * CAPACITY, 0)
    assert isinstance(second, FilePlace)
    del first
    second.part(0, 2 * CAPACITY)[:] = b"x" * 2 * CAPACITY
    assert second.seal(0, 0, [])
    assert bytes(objects.raw(ref)[:9]) == b"x" * 9
    third = store.expect(_store.with_index(TASK, 2), 0, None, None, "")
    store.elsewhere(third, True)
    place = objects.place(third, 2 * CAPACITY, 0)
    assert len(list(files.iterdir())) == 2
    del place
    assert len(list(files.iterdir())) == 1
