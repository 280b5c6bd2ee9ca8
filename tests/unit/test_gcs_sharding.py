"""Sharding: the same answer everywhere, spread evenly, and a task beside its results."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zray.gcs.sharding import shard_of, slot_of, slot_table
from zray.gcs.tables import KEYED_BY_ID, Table, event_key, namespaced_key
from zray.ids import put_id, return_id, task_id


def crc32_by_bits(data: bytes) -> int:
    """CRC-32 as its definition reads: the reflected polynomial 0xEDB88320, bit by bit."""
    value = 0xFFFF_FFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0xEDB8_8320 if value & 1 else 0)
    return value ^ 0xFFFF_FFFF


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.binary(max_size=40))
def test_the_slot_of_a_text_key_is_the_written_formula(key: bytes) -> None:
    expected = crc32_by_bits(key) * 0x9E37_79B1 % 2**32 // 2**24
    assert slot_of(Table.KV, key) == expected
    assert slot_of(Table.ACTOR_NAMES, key) == expected


def test_slots_never_change() -> None:
    assert [slot_of(Table.KV, key) for key in (b"", b"a", b"zray", b"\x00" * 16)] == [0, 250, 2, 217]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.binary(min_size=16, max_size=16), st.integers(0, 1000), st.integers(1, 256))
def test_a_task_and_its_results_are_neighbours(parent: bytes, counter: int, shards: int) -> None:
    task = task_id(parent, counter)
    home = shard_of(Table.TASKS, task, shards)
    assert (
        home == shard_of(Table.OBJECTS, return_id(task, 3), shards) == shard_of(Table.OBJECTS, put_id(task, 5), shards)
    )


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7, 64, 256])
def test_every_shard_gets_its_part(shards: int) -> None:
    for table, keys in {
        Table.TASKS: [task_id(bytes(16), i) for i in range(20_000)],
        Table.KV: [namespaced_key(b"", b"key-%d" % i) for i in range(20_000)],
        Table.EVENTS: [event_key(i) for i in range(20_000)],
    }.items():
        counts = [0] * shards
        for key in keys:
            counts[shard_of(table, key, shards)] += 1
        assert min(counts) > 0.5 * len(keys) / shards
        assert max(counts) < 1.7 * len(keys) / shards


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 255, 256])
def test_the_table_agrees_with_the_function(shards: int) -> None:
    table = slot_table(shards)
    assert list(table) == [shard_of(Table.TASKS, bytes((slot,)), shards) for slot in range(256)]
    assert set(table) == set(range(shards))
    assert list(table) == sorted(table)


@pytest.mark.parametrize("shards", [0, -1, 257])
def test_a_number_of_shards_out_of_range_is_refused(shards: int) -> None:
    with pytest.raises(ValueError, match="1 to 256"):
        slot_table(shards)


def test_an_empty_id_has_a_shard_too() -> None:
    assert [slot_of(table, b"") for table in sorted(KEYED_BY_ID)] == [0] * len(KEYED_BY_ID)
