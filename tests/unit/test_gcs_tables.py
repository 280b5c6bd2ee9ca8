"""Row types: keys follow their rules, rows survive encoding, what is no row is refused, and ends are recognised."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zray.gcs.tables import (
    KEYED_BY_ID,
    ROW_TABLES,
    ActorNameRow,
    ActorRow,
    ActorState,
    ClusterRow,
    CreationRow,
    EventRow,
    FunctionRow,
    GcsRow,
    GroupState,
    JobRow,
    NodeRow,
    ObjectRow,
    PlacementGroupRow,
    RowError,
    StoredValue,
    Table,
    check_entry,
    decode_row,
    encode_row,
    event_key,
    is_ended,
    key_of,
    namespaced_key,
    split_key,
)
from zray.task import ActorSpec, CallShape, JobSpec, TaskSpec

ID = bytes(range(16))
SHAPE = CallShape(ID, 0, b"", "f")
ROWS: list[GcsRow] = [
    NodeRow(ID, "tcp://10.0.0.1:7000", "host", 7, {"CPU": 2.0}, {"zone": "a"}),
    JobRow(ID, 3, ID, 99, "default", entrypoint="main.py"),
    FunctionRow(SHAPE, 3),
    ActorRow(ID, 3, ActorState.ALIVE, "Counter", spec=ActorSpec(TaskSpec(ID, ID), 3)),
    ActorNameRow("default", "counter", ID),
    ObjectRow(ID, 1 << 40, (ID, ID)),
    PlacementGroupRow(ID, 3, GroupState.CREATED, "SPREAD", ({"CPU": 1.0}, {"GPU": 0.5}), (ID, ID)),
    ClusterRow(ID, ID, 4, 2),
    CreationRow(
        ID, JobSpec(1, ID, 1, "", [], "/"), ActorSpec(TaskSpec(ID, ID), 3), SHAPE, [StoredValue(ID, 1, 0, b"code")]
    ),
    EventRow(12, 1.5, "tasks", ID, "retried", "worker 3 died"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_rows_survive_encoding_and_stand_under_their_key(row: GcsRow) -> None:
    value = encode_row(row)
    assert decode_row(type(row), value) == row
    table = ROW_TABLES[type(row)]
    assert check_entry(table, key_of(row), value) == is_ended(row)
    with pytest.raises(RowError, match="belongs under"):
        check_entry(table, key_of(row)[:-1] + b"?", value)


def test_every_table_but_tasks_and_user_keys_has_a_row_type() -> None:
    assert set(ROW_TABLES.values()) == set(Table) - {Table.TASKS, Table.KV, Table.ANSWERS}
    assert {type(row) for row in ROWS} == set(ROW_TABLES)


@pytest.mark.parametrize("value", [b"", b"\xc1", b"\x90", msgspec.msgpack.encode([1, 2, 3]), b"\x91" * 5000])
def test_what_is_no_row_is_refused(value: bytes) -> None:
    for row_type in ROW_TABLES:
        with pytest.raises(RowError):
            decode_row(row_type, value)


def test_an_id_of_another_length_is_refused() -> None:
    with pytest.raises(RowError, match="16 bytes"):
        key_of(NodeRow(b"short", "", "", 1, {}))
    with pytest.raises(RowError, match="belongs to no table"):
        key_of(GcsRow())
    with pytest.raises(RowError, match="one by one"):
        check_entry(Table.TASKS, ID, b"")
    with pytest.raises(RowError, match="no number"):
        event_key(-1)


def test_user_entries_may_hold_any_bytes_but_need_a_namespaced_key() -> None:
    assert not check_entry(Table.KV, namespaced_key(b"n", b"k"), b"\xc1")
    for key in (b"", b"\x00", b"\x00\x05abc"):
        with pytest.raises(RowError, match="namespaced"):
            check_entry(Table.KV, key, b"")


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.tuples(st.binary(max_size=8), st.binary(max_size=8)), st.tuples(st.binary(max_size=8), st.binary(max_size=8)))
def test_namespaced_keys_are_different_for_different_pairs(
    one: tuple[bytes, bytes], other: tuple[bytes, bytes]
) -> None:
    assert split_key(namespaced_key(*one)) == one
    assert (namespaced_key(*one) == namespaced_key(*other)) == (one == other)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.binary(max_size=4), st.binary(max_size=4), st.binary(max_size=4))
def test_a_prefix_stays_inside_its_namespace(namespace: bytes, prefix: bytes, key: bytes) -> None:
    assert namespaced_key(namespace, key).startswith(namespaced_key(namespace, prefix)) == key.startswith(prefix)
    assert not namespaced_key(namespace + b"x", key).startswith(namespaced_key(namespace, b""))


def test_a_namespace_has_a_greatest_length() -> None:
    assert split_key(namespaced_key(bytes(0xFFFF), b"k")) == (bytes(0xFFFF), b"k")
    with pytest.raises(RowError, match="65535"):
        namespaced_key(bytes(0x10000), b"k")


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1)))
def test_event_keys_are_ordered_as_their_numbers(numbers: list[int]) -> None:
    assert sorted(numbers) == [int.from_bytes(key, "big") for key in sorted(map(event_key, numbers))]


def test_ends_are_recognised() -> None:
    node, job, _, actor, name, thing, group, cluster, creation, event = ROWS
    assert not any(map(is_ended, (node, job, actor, name, thing, group, cluster, creation)))
    assert is_ended(event)
    assert not is_ended(cluster)
    replace = msgspec.structs.replace
    assert is_ended(replace(node, alive=False))
    assert is_ended(replace(job, running=False))
    assert is_ended(replace(actor, state=ActorState.DEAD))
    assert not is_ended(replace(actor, state=ActorState.RESTARTING))
    assert is_ended(replace(group, state=GroupState.REMOVED))


def test_tables_keyed_by_id_are_those_whose_rows_have_one() -> None:
    by_id = {ROW_TABLES[type(row)] for row in ROWS if len(key_of(row)) == 16 and not isinstance(row, ActorNameRow)}
    assert by_id | {Table.TASKS} == KEYED_BY_ID
