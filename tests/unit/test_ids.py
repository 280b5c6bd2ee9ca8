"""Ids: the layout, and the derivation that C repeats byte for byte."""

from __future__ import annotations

import pytest

from zray import ids

# From an independent C program of MurmurHash3_x64_128 (seed 0) over the 24 bytes; `zs_derive_id` must give the same.
VECTORS = [
    ("00000000000000000000000000000000", 0, "46328447a2022b04964f2f6100000000"),
    ("000102030405060708090a0b0c0d0e0f", 1, "ef5efeb27b98f597f921eca900000000"),
    ("ffffffffffffffffffffffffffffffff", 18446744073709551615, "2eee4bb6ee6591c7a05af76e00000000"),
    ("21466b90b5daff24496e93b8dd02274c", 12345, "3ade4f673945dafb7fb72c9200000000"),
    ("2c51769bc0e50a2f54799ec3e80d3257", 4294967296, "fdaa636fb3238afa2716246b00000000"),
    ("375c81a6cbf0153a5f84a9cef3183d62", 7, "4f56f605113d75ad8c2a2eed00000000"),
]


@pytest.mark.parametrize(("parent", "counter", "expected"), VECTORS)
def test_task_id_follows_the_written_mix(parent: str, counter: int, expected: str) -> None:
    assert ids.task_id(bytes.fromhex(parent), counter).hex() == expected


def test_task_id_remembers_no_wrong_parent() -> None:
    """Changing parents back and forth gives what each parent gives alone."""
    a, b = bytes(range(16)), bytes(range(1, 17))
    alone = [ids.task_id(a, n) for n in range(4)]
    mixed = []
    for n in range(4):
        ids.task_id(b, n)
        mixed.append(ids.task_id(a, n))
    assert mixed == alone


def test_children_differ() -> None:
    parents = [ids.task_id(ids.NIL, n) for n in range(100)]
    children = {ids.task_id(parent, n) for parent in parents for n in range(100)}
    assert len(children) == 10_000
    assert all(len(child) == ids.ID_SIZE and child[12:] == b"\0\0\0\0" for child in children)


@pytest.mark.parametrize("parent", [b"", b"x" * 12, b"x" * 17])
def test_task_id_refuses_what_is_no_id(parent: bytes) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        ids.task_id(parent, 0)


def test_layout() -> None:
    task = ids.task_id(ids.NIL, 5)
    assert ids.index_of(task) == 0
    assert not ids.is_put(task)
    for i in (0, 1, 63, 64, 1000, 2**31 - 2):
        returned = ids.return_id(task, i)
        assert len(returned) == 16
        assert ids.index_of(returned) == i + 1
        assert not ids.is_put(returned)
        assert ids.task_of(returned) == task
    for n in (0, 1, 255, 256, 2**31 - 1):
        put = ids.put_id(task, n)
        assert len(put) == 16
        assert ids.index_of(put) == 0x80000000 | n
        assert ids.is_put(put)
        assert ids.task_of(put) == task
    assert ids.return_id(task, 0)[12:] == b"\1\0\0\0"
    assert ids.put_id(task, 1)[12:] == b"\1\0\0\x80"


def test_ranges_end_loudly() -> None:
    task = ids.task_id(ids.NIL, 0)
    with pytest.raises(OverflowError):
        ids.return_id(task, 2**31 - 1)
    with pytest.raises(OverflowError, match="fresh"):
        ids.put_id(task, 2**31)


def test_random_ids() -> None:
    found = {ids.random_id() for _ in range(1000)}
    assert len(found) == 1000
    assert all(ids.index_of(i) == 0 and len(i) == 16 for i in found)


def test_hex_round_trip() -> None:
    some = ids.random_id()
    assert ids.from_hex(some.hex()) == some
    for bad in ("", "12", "zz" * 16, some.hex() + "00"):
        with pytest.raises(ValueError, match="not an id"):
            ids.from_hex(bad)
