"""A shard: versions, compare-and-swap, listing, log, bounds; and against a plain dictionary whatever is done to it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from zray.gcs.limits import GcsLimits
from zray.gcs.shard import CONFLICT, FULL, MISSING, Refusal, Shard
from zray.gcs.tables import ABSENT, ANY, Change, Row, Table

LIMITS = GcsLimits(events=3, ended_actors=2, log_changes=5, log_bytes=40, kv_bytes=60, value_bytes=20)


def put(shard: Shard, key: bytes, value: bytes = b"v", *, table: Table = Table.JOBS, expected: int = ANY) -> Change:
    change = shard.plan_put(table, key, value, expected=expected, ended=table == Table.EVENTS)
    assert isinstance(change, Change)
    shard.apply(change)
    return change


def delete(shard: Shard, key: bytes, *, table: Table = Table.JOBS) -> Change:
    change = shard.plan_delete(table, key)
    assert isinstance(change, Change)
    shard.apply(change)
    return change


def test_a_plan_changes_nothing() -> None:
    shard = Shard(0, LIMITS)
    plan = shard.plan_put(Table.JOBS, b"k", b"v")
    assert shard.get(Table.JOBS, b"k") is None
    assert shard.revision == 0
    assert isinstance(plan, Change)
    shard.apply(plan)
    assert shard.get(Table.JOBS, b"k") == Row(b"v", 1)


def test_a_plan_is_out_of_date_once_something_else_was_applied() -> None:
    shard = Shard(0, LIMITS)
    plan = shard.plan_put(Table.JOBS, b"k", b"v")
    assert isinstance(plan, Change)
    put(shard, b"other")
    with pytest.raises(ValueError, match="planned before"):
        shard.apply(plan)


def test_versions_grow_over_all_tables_and_numbers_in_each() -> None:
    shard = Shard(0, LIMITS)
    first, second, third = put(shard, b"a"), put(shard, b"a", table=Table.KV), delete(shard, b"a")
    assert [first.version, second.version, third.version] == [1, 2, 3]
    assert [first.sequence, second.sequence, third.sequence] == [1, 1, 2]
    assert put(shard, b"a").version == 4  # not 1 again: a version names one write for ever
    shard.validate()


def test_compare_and_swap() -> None:
    shard = Shard(0, LIMITS)
    made = put(shard, b"k", expected=ABSENT)
    assert shard.plan_put(Table.JOBS, b"k", b"w", expected=ABSENT) == Refusal(CONFLICT, made.version)
    assert shard.plan_put(Table.JOBS, b"k", b"w", expected=made.version + 1) == Refusal(CONFLICT, made.version)
    changed = put(shard, b"k", b"w", expected=made.version)
    assert shard.plan_delete(Table.JOBS, b"k", expected=made.version) == Refusal(CONFLICT, changed.version)
    assert shard.plan_delete(Table.JOBS, b"none") == Refusal(MISSING)
    assert shard.plan_delete(Table.JOBS, b"none", expected=7) == Refusal(CONFLICT, 0)


def test_pages_are_in_key_order_and_keep_to_prefix_and_start() -> None:
    shard = Shard(0, GcsLimits())
    keys = [b"a", b"ab", b"abc", b"b", b"\xff", b"\xff\xff"]
    for key in reversed(keys):
        put(shard, key)

    def listed(prefix: bytes, after: bytes | None = None, most: int = 10) -> list[bytes]:
        return [key for key, _ in shard.page(Table.JOBS, prefix, after, most)]

    assert listed(b"") == keys
    assert listed(b"a") == [b"a", b"ab", b"abc"]
    assert listed(b"a", b"ab") == [b"abc"]
    assert listed(b"b", b"a") == [b"b"]
    assert listed(b"a", b"z") == []
    assert listed(b"\xff") == [b"\xff", b"\xff\xff"]
    assert listed(b"", None, 2) == [b"a", b"ab"]
    assert listed(b"x") == []


def test_the_log_gives_what_came_after_a_number_or_nothing() -> None:
    shard = Shard(0, LIMITS)
    changes = [put(shard, b"%d" % i) for i in range(8)]
    assert shard.changes_since(Table.JOBS, 8) == []
    assert shard.changes_since(Table.JOBS, 3) == changes[3:]
    assert shard.changes_since(Table.JOBS, 2) is None  # cut
    assert shard.changes_since(Table.JOBS, 9) is None  # never given
    assert shard.changes_since(Table.KV, 0) == []


def test_the_log_is_bounded_in_bytes() -> None:
    shard = Shard(0, LIMITS)
    for _ in range(4):
        put(shard, b"k", bytes(15))
    assert shard.changes_since(Table.JOBS, 1) is None
    found = shard.changes_since(Table.JOBS, 2)
    assert found is not None
    assert len(found) == 2
    shard.validate()


def test_a_snapshot_is_all_rows_and_the_newest_number() -> None:
    shard = Shard(0, LIMITS)
    put(shard, b"b", b"1")
    put(shard, b"a", b"2")
    delete(shard, b"b")
    assert shard.snapshot(Table.JOBS) == (3, [(b"a", b"2", 2)])
    assert shard.snapshot(Table.KV) == (0, [])


def test_retention_takes_the_oldest_ended_rows_only() -> None:
    shard = Shard(0, LIMITS)
    actors = Table.ACTORS
    for key, ended in [(b"a", True), (b"b", False), (b"c", True), (b"a", False), (b"d", True)]:
        shard.apply(shard.plan_put(actors, key, b"v", ended=ended))  # type: ignore[arg-type]
        assert shard.plan_retention(actors) is None
    shard.apply(shard.plan_put(actors, b"a", b"v", ended=True))  # type: ignore[arg-type]
    old = shard.plan_retention(actors)
    assert old is not None
    assert (old.key, old.value) == (b"c", None)
    shard.apply(old)
    assert shard.plan_retention(actors) is None
    assert [key for key, _ in shard.page(actors, b"", None, 9)] == [b"a", b"b", b"d"]
    shard.validate()


def test_user_bytes_are_refused_when_full_but_may_shrink() -> None:
    shard = Shard(0, LIMITS)
    for key in (b"a", b"b"):
        put(shard, key, bytes(20), table=Table.KV)
    put(shard, b"c", bytes(17), table=Table.KV)
    full = shard.plan_put(Table.KV, b"d", b"")
    assert isinstance(full, Change) is False
    assert full.reason == FULL  # type: ignore[union-attr]
    put(shard, b"a", bytes(19), table=Table.KV)
    put(shard, b"d", b"", table=Table.KV)
    delete(shard, b"a", table=Table.KV)
    put(shard, b"e", bytes(19), table=Table.KV)
    large = shard.plan_put(Table.JOBS, b"k", bytes(21))
    assert isinstance(large, Refusal)
    assert large.reason == FULL
    shard.validate()


def test_stored_rows_come_back_and_versions_go_on() -> None:
    shard = Shard(0, LIMITS)
    shard.load(9, [(Table.JOBS, b"k", Row(b"v", 7)), (Table.EVENTS, b"e", Row(b"w", 8, True))])
    shard.validate()
    assert shard.get(Table.JOBS, b"k") == Row(b"v", 7)
    assert put(shard, b"k").version == 10
    shard.validate()


class ShardAgainstDictionary(RuleBasedStateMachine):
    """Whatever is done, the shard answers as two dictionaries do: key -> (value, version), and key -> end."""

    def __init__(self) -> None:
        super().__init__()
        self.shard = Shard(0, LIMITS)
        self.model: dict[tuple[Table, bytes], tuple[bytes, int]] = {}
        self.ended: dict[bytes, None] = {}
        self.changes: dict[Table, list[Change]] = {Table.KV: [], Table.ACTORS: []}
        self.writes = 0

    tables = st.sampled_from([Table.KV, Table.ACTORS])
    keys = st.binary(max_size=2)

    def applied(self, plan: Change | Refusal) -> None:
        assert isinstance(plan, Change)
        self.shard.apply(plan)
        self.writes += 1
        assert plan.version == self.writes
        self.changes[Table(plan.table)].append(plan)

    @rule(table=tables, key=keys, value=st.binary(max_size=22), ended=st.booleans(), guess=st.sampled_from([ANY, 0, 1]))
    def write(self, table: Table, key: bytes, value: bytes, ended: bool, guess: int) -> None:
        there = self.model.get((table, key))
        expected = there[1] if there is not None and guess == 1 else guess
        plan = self.shard.plan_put(table, key, value, expected=expected, ended=ended and table == Table.ACTORS)
        if expected not in (ANY, there[1] if there else ABSENT):
            assert plan == Refusal(CONFLICT, there[1] if there else 0)
            return
        size = sum(len(k) + len(v) for (t, k), (v, _) in self.model.items() if t == Table.KV)
        grown = size + len(value) + (len(key) if there is None else -len(there[0]))
        if len(value) > LIMITS.value_bytes or (table == Table.KV and grown > max(size, LIMITS.kv_bytes)):
            assert isinstance(plan, Refusal)
            assert plan.reason == FULL
            return
        self.applied(plan)
        self.model[table, key] = (value, self.writes)
        if table == Table.ACTORS:
            self.ended.pop(key, None)
            if ended:
                self.ended[key] = None

    @rule(table=tables, key=keys)
    def remove(self, table: Table, key: bytes) -> None:
        plan = self.shard.plan_delete(table, key)
        if (table, key) not in self.model:
            assert plan == Refusal(MISSING)
            return
        self.applied(plan)
        del self.model[table, key]
        if table == Table.ACTORS:
            self.ended.pop(key, None)

    @rule()
    def retain(self) -> None:
        while (plan := self.shard.plan_retention(Table.ACTORS)) is not None:
            assert plan.key == next(iter(self.ended))
            self.applied(plan)
            del self.ended[plan.key], self.model[Table.ACTORS, plan.key]
        assert len(self.ended) <= LIMITS.ended_actors

    @rule(table=tables, prefix=keys, after=st.none() | keys, most=st.integers(1, 5))
    def read_page(self, table: Table, prefix: bytes, after: bytes | None, most: int) -> None:
        keys = sorted(key for t, key in self.model if t == table and key.startswith(prefix))
        expected = [key for key in keys if after is None or key > after][:most]
        assert [key for key, _ in self.shard.page(table, prefix, after, most)] == expected

    @rule(table=tables, back=st.integers(0, 8))
    def read_log(self, table: Table, back: int) -> None:
        made = self.changes[table]
        start = max(0, len(made) - back)
        found = self.shard.changes_since(table, start)
        if found is None:
            assert len(made) - start > LIMITS.log_changes or sum(len(c.value or b"") for c in made[start:]) > 40
        else:
            assert found == made[start:]

    @invariant()
    def rows_are_equal(self) -> None:
        for table in (Table.KV, Table.ACTORS):
            found = {key: (row.value, row.version) for key, row in self.shard.page(table, b"", None, 1000)}
            assert found == {key: row for (t, key), row in self.model.items() if t == table}
            assert self.shard.snapshot(table)[0] == len(self.changes[table])
            assert self.shard.count(table) == len(found)
        if len(self.ended) <= LIMITS.ended_actors:
            self.shard.validate()


TestShardAgainstDictionary = ShardAgainstDictionary.TestCase
TestShardAgainstDictionary.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
