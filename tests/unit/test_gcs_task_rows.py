"""Task rows: bulk writes, the newest end wins, bounded memory, held lineage; and all of it against a plain model."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from zray.gcs.limits import GcsLimits
from zray.gcs.sharding import shard_of
from zray.gcs.tables import ABANDONED, FAILED, LIVE, RowError, Table, TaskRow
from zray.gcs.task_batches import EndedBatch
from zray.gcs.task_rows import GATHERED, TaskRows, TaskTable
from zray.ids import task_id
from zray.task import TaskSpec
from zray.wire import DONE_ERROR, DONE_OK, DONE_RETRY, DONE_SKIPPED

ROOT = bytes(16)
SHAPE = bytes(range(16))


def ids(count: int, start: int = 0) -> list[bytes]:
    return [task_id(ROOT, i) for i in range(start, start + count)]


def spec(task: bytes, args: bytes = b"args") -> TaskSpec:
    return TaskSpec(task, SHAPE, args)


def table(shards: int = 1, **bounds: int) -> TaskTable:
    limits = GcsLimits(**bounds).share(shards)
    return TaskTable([TaskRows(limits) for _ in range(shards)])


def settle(tasks: TaskTable, keep: Collection[bytes] = ()) -> list[EndedBatch]:
    """Settle, flush what is due, check, and return what was flushed."""
    tasks.settle()
    flushed = []
    for rows in tasks.shards:
        while rows.due() is not None:
            flushed.append(rows.flush(keep))
        rows.validate()
    return flushed


def finish(tasks: TaskTable, names: list[bytes], *, status: int = DONE_OK, job: int = 1, now: float = 1.0) -> None:
    tasks.finished(job, 7, names, bytes((status,)) * len(names), [250] * len(names), now)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_task_is_live_and_then_ended(shards: int) -> None:
    tasks = table(shards)
    names = ids(20)
    tasks.submitted(1, [spec(name) for name in names])
    for name in names:
        assert tasks.rows_of(name).read(name) == TaskRow(name, 1, LIVE, spec=spec(name))
    finish(tasks, names[:10], status=DONE_ERROR, now=5.5)
    settle(tasks)
    for name in names[:10]:
        assert tasks.rows_of(name).read(name) == TaskRow(name, 1, DONE_ERROR, 7, 250, 5.5, spec(name))
        assert tasks.shards.index(tasks.rows_of(name)) == shard_of(Table.TASKS, name, shards)
    assert sum(rows.counts()[0] for rows in tasks.shards) == 10
    assert tasks.rows_of(ROOT).read(ROOT) is None


def test_a_task_that_went_straight_to_a_worker_has_a_row_without_a_spec() -> None:
    tasks = table()
    (name,) = ids(1)
    finish(tasks, [name], now=2.0)
    settle(tasks)
    assert tasks.shards[0].read(name) == TaskRow(name, 1, DONE_OK, 7, 250, 2.0, None)


def test_executions_that_end_nothing_are_left_out() -> None:
    tasks = table()
    names = ids(4)
    tasks.submitted(1, [spec(name) for name in names])
    tasks.finished(1, 7, names, bytes((DONE_OK, DONE_RETRY, DONE_SKIPPED, FAILED)), [1, 2, 3, 4], 1.0)
    assert tasks.gathered == 2
    settle(tasks)
    assert [tasks.shards[0].read(name).status for name in names] == [DONE_OK, LIVE, LIVE, FAILED]  # type: ignore[union-attr]
    assert tasks.shards[0].totals == {DONE_OK: 1, FAILED: 1}
    tasks.finished(1, 7, names[:1], bytes((DONE_RETRY,)), [1], 1.0)
    assert tasks.settle() == []


def test_columns_of_unequal_length_are_refused() -> None:
    tasks = table()
    with pytest.raises(ValueError, match="unequal"):
        tasks.finished(1, 7, ids(2), bytes(1), [1, 2], 1.0)
    with pytest.raises(ValueError, match="unequal"):
        tasks.finished(1, 7, ids(2), bytes(2), [1], 1.0)
    with pytest.raises(RowError, match="16 bytes"):
        tasks.rows_of(b"short")


def test_absurd_run_times_are_brought_into_range() -> None:
    tasks = table()
    names = ids(3)
    tasks.finished(1, -4, names, bytes(3), [-1, 2**70, 9], 1.0)
    settle(tasks)
    rows = [tasks.shards[0].read(name) for name in names]
    assert [row.micros for row in rows if row] == [0, 2**64 - 1, 9]
    assert [row.worker for row in rows if row] == [0, 0, 0]


def test_ends_are_due_for_settling_when_many_are_gathered() -> None:
    tasks = table()
    names = ids(GATHERED)
    ok = bytes(GATHERED)
    assert not tasks.finished(1, 7, names[:-1], ok[1:], [0] * (GATHERED - 1), 1.0)
    assert tasks.finished(1, 7, names[-1:], ok[:1], [0], 1.0)
    assert [len(batch) for _, batch in tasks.settle()] == [GATHERED]


def test_the_oldest_batches_are_flushed_whole() -> None:
    tasks = table(ended_tasks=25)
    flushed = []
    for start in range(0, 100, 10):
        names = ids(10, start)
        tasks.submitted(1, [spec(name) for name in names])
        finish(tasks, names)
        flushed += settle(tasks)
    rows = tasks.shards[0]
    assert [name for batch in flushed for name in batch.names()] == ids(80)
    assert [rows.read(name) is not None for name in ids(100)] == [False] * 80 + [True] * 20
    assert (rows.flushed, rows.counts()) == (80, (0, 20, 0))
    assert [row.id for row in flushed[0].ends(with_specs=True).rows()] == ids(10)
    assert flushed[0].ends(with_specs=True).rows()[3].spec == spec(ids(10)[3])


def test_large_specs_are_flushed_by_their_bytes() -> None:
    tasks = table(ended_task_bytes=10_000)
    for name in ids(8):
        tasks.submitted(1, [spec(name, bytes(3000))])
        finish(tasks, [name])
        settle(tasks)
    assert [tasks.shards[0].read(name) is not None for name in ids(8)] == [False] * 5 + [True] * 3


def test_the_newest_end_of_a_task_stays_when_the_older_is_flushed() -> None:
    tasks = table(ended_tasks=3)
    first, other, third, fourth = ids(4)
    tasks.submitted(1, [spec(first)])
    for name, status in [(first, FAILED), (other, DONE_OK), (first, DONE_OK), (third, DONE_OK), (fourth, DONE_OK)]:
        finish(tasks, [name], status=status)
        settle(tasks)
    row = tasks.shards[0].read(first)
    assert row is not None
    assert row.status == DONE_OK
    assert row.spec == spec(first)  # the second report came without a spec: the first one's stays
    assert tasks.shards[0].flushed == 2


def test_a_task_reported_twice_in_one_batch_has_its_last_end() -> None:
    tasks = table()
    (name,) = ids(1)
    tasks.submitted(1, [spec(name)])
    finish(tasks, [name], status=DONE_ERROR)
    finish(tasks, [name], status=DONE_OK)
    settle(tasks)
    row = tasks.shards[0].read(name)
    assert row is not None
    assert row.status == DONE_OK
    assert row.spec == spec(name)
    assert [row.status for row in tasks.shards[0].newest(None, 9)] == [DONE_OK, DONE_ERROR]


def test_a_task_submitted_again_is_live_again() -> None:
    tasks = table()
    (name,) = ids(1)
    tasks.submitted(1, [spec(name)])
    finish(tasks, [name])
    settle(tasks)
    tasks.submitted(1, [spec(name, b"again")])
    assert tasks.shards[0].read(name) == TaskRow(name, 1, LIVE, spec=spec(name, b"again"))


def test_a_place_is_not_found_across_two_ids() -> None:
    one, two = b"\x01" * 8 + b"\x02" * 8, b"\x03" * 8 + b"\x04" * 8
    across = one[8:] + two[:8]
    batch = EndedBatch(1, 1, one + two + one, bytes(3), [0] * 3, [0] * 3, [0.0] * 3, b"\x93\xc0\xc0\xc0")
    assert (batch.place(one), batch.place(two), batch.place(across)) == (2, 1, -1)
    assert batch.place(bytes(16)) == -1


def test_specs_of_referenced_tasks_are_held_until_they_are_released() -> None:
    tasks = table(ended_tasks=1)
    names = ids(6)
    keep = set(names[1:4])
    for name in names:
        tasks.submitted(1, [spec(name)])
        finish(tasks, [name], now=3.0)
        settle(tasks, keep)
    rows = tasks.shards[0]
    assert rows.counts() == (0, 1, 3)
    assert rows.read(names[2]) == TaskRow(names[2], 1, DONE_OK, 7, 250, 3.0, spec(names[2]))
    assert rows.read(names[0]) is None
    assert (rows.held_batches, rows.oldest_held()) == (3, [names[1]])
    rows.settle_held(())
    assert rows.read(names[1]) is None
    assert rows.oldest_held() == [names[2]]
    rows.settle_held({names[2]})
    assert rows.oldest_held() == [names[3]]
    assert rows.read(names[2]) is not None
    rows.validate()


def test_only_the_needed_rows_of_a_batch_are_held() -> None:
    tasks = table(ended_tasks=1)
    names = ids(10)
    tasks.submitted(1, [spec(name) for name in names[:8]])
    finish(tasks, names, now=3.0)
    settle(tasks, set(names[2:9]))
    rows = tasks.shards[0]
    assert rows.counts() == (0, 0, 6)  # names[8] is needed, but has no spec that could be of use
    assert rows.oldest_held() == names[2:8]
    assert rows.read(names[5]) == TaskRow(names[5], 1, DONE_OK, 7, 250, 3.0, spec(names[5]))
    finish(tasks, [names[3]], status=DONE_ERROR)
    tasks.settle()
    assert rows.read(names[3]).spec == spec(names[3])  # type: ignore[union-attr]
    rows.settle_held({names[3], names[4]})
    assert rows.oldest_held() == [names[4]]
    assert rows.read(names[3]).status == DONE_ERROR  # type: ignore[union-attr]
    rows.validate()


def test_batches_without_specs_hold_nothing() -> None:
    tasks = table(ended_tasks=1)
    names = ids(100)
    finish(tasks, names)
    settle(tasks, names)
    assert tasks.shards[0].counts() == (0, 0, 0)
    assert tasks.shards[0].oldest_held() == []


def test_held_specs_have_a_bound_of_their_own() -> None:
    tasks = table(ended_tasks=1, lineage_bytes=1300)
    names = ids(9)
    for name in names:
        tasks.submitted(1, [spec(name, bytes(300))])
        finish(tasks, [name])
        settle(tasks, names)
    rows = tasks.shards[0]
    assert rows.oldest_held() == [names[6]]
    assert rows.counts() == (0, 1, 2)
    assert rows.lineage_lost == 6
    assert 1000 < rows.held_bytes <= 1300


@pytest.mark.parametrize("shards", [1, 3])
def test_the_end_of_a_job_ends_its_live_tasks(shards: int) -> None:
    tasks = table(shards)
    names = ids(12)
    tasks.submitted(1, [spec(name) for name in names[:8]])
    tasks.submitted(2, [spec(name) for name in names[8:]])
    finish(tasks, names[:2])
    tasks.job_ended(1, 9.0)
    settle(tasks)
    tasks.drop_job(1)
    found = [tasks.rows_of(name).read(name) for name in names]
    assert [row.status for row in found if row] == [DONE_OK] * 2 + [ABANDONED] * 6 + [LIVE] * 4
    assert [row.ended for row in found if row][2:8] == [9.0] * 6
    finish(tasks, names[:1], job=1)  # a late report of a job that is gone
    settle(tasks)
    tasks.submitted(1, [spec(names[0])])
    assert tasks.rows_of(names[0]).read(names[0]) == TaskRow(names[0], 1, LIVE, spec=spec(names[0]))


def test_lists_are_cut_and_chosen_by_job() -> None:
    tasks = table()
    names = ids(10)
    tasks.submitted(1, [spec(name) for name in names[:5]])
    tasks.submitted(2, [spec(name) for name in names[5:]])
    rows = tasks.shards[0]
    assert [row.id for row in rows.live(None, 7)] == names[:7]
    assert [row.id for row in rows.live(2, 2)] == names[5:7]
    finish(tasks, names[:5], job=1)
    settle(tasks)
    finish(tasks, names[5:8], job=2)
    settle(tasks)
    assert [row.id for row in rows.newest(None, 6)] == [names[i] for i in (7, 6, 5, 4, 3, 2)]
    assert [row.id for row in rows.newest(1, 2)] == [names[4], names[3]]
    assert rows.newest(None, 0) == rows.live(1, 5) == []


def test_the_ring_answers_as_the_log_of_its_topic() -> None:
    tasks = table(ended_tasks=2)
    for name in ids(5):
        finish(tasks, [name])
        settle(tasks)
    rows = tasks.shards[0]
    assert rows.sequence == 5
    found = rows.ends_since(3)
    assert found is not None
    assert [batch.sequence for batch in found] == [4, 5]
    assert rows.ends_since(5) == []
    assert rows.ends_since(2) is None
    assert rows.ends_since(6) is None


class TasksAgainstModel(RuleBasedStateMachine):
    """Whatever happens, a task reads as the model says, or it was flushed and nobody needed it."""

    BOUND = 12

    def __init__(self) -> None:
        super().__init__()
        self.tasks = table(3, ended_tasks=self.BOUND, lineage_bytes=1 << 30)
        self.live: dict[bytes, int] = {}
        self.ends: list[tuple[bytes, int, float]] = []
        self.needed: set[bytes] = set()
        self.now = 0.0

    @staticmethod
    def job_of(name: bytes) -> int:
        return 1 + name[1] % 2

    some = st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True)

    @rule(which=some)
    def submit(self, which: list[int]) -> None:
        self.tasks.settle()
        for name in (task_id(ROOT, i) for i in which):
            if name not in self.live:
                self.live[name] = self.job_of(name)
                self.tasks.submitted(self.live[name], [spec(name)])

    @rule(which=some, status=st.sampled_from([DONE_OK, DONE_ERROR, DONE_RETRY, FAILED]))
    def end(self, which: list[int], status: int) -> None:
        for name in (task_id(ROOT, i) for i in which):
            self.now += 1
            finish(self.tasks, [name], status=status, job=self.job_of(name), now=self.now)
            if status != DONE_RETRY:
                self.live.pop(name, None)
                self.ends.append((name, status, self.now))

    @rule(which=some)
    def need(self, which: list[int]) -> None:
        self.needed = {task_id(ROOT, i) for i in which}

    @rule(job=st.integers(1, 2))
    def end_job(self, job: int) -> None:
        settle(self.tasks, self.needed)
        self.now += 1
        self.tasks.job_ended(job, self.now)
        settle(self.tasks, self.needed)
        self.tasks.drop_job(job)
        for name in [name for name, owner in self.live.items() if owner == job]:
            del self.live[name]
            self.ends.append((name, ABANDONED, self.now))

    @invariant()
    def reads_are_right(self) -> None:
        before = {name for name in self.needed if (row := self.tasks.rows_of(name).read(name)) and row.spec}
        settle(self.tasks, self.needed)
        newest = {name: (status, when) for name, status, when in self.ends}
        for name in (task_id(ROOT, i) for i in range(41)):
            row = self.tasks.rows_of(name).read(name)
            if name in self.live:
                assert row == TaskRow(name, self.live[name], LIVE, spec=spec(name))
            elif name not in newest:
                assert row is None
            elif row is not None:
                assert (row.status, row.ended) == newest[name]
            if name in before:
                assert row is not None
                assert row.spec == spec(name)
        for rows in self.tasks.shards:
            for job in (1, 2):
                here = [row.id for row in rows.newest(job, 1000)]
                ends = [name for name, _, _ in reversed(self.ends) if self.job_of(name) == job]
                order = list(dict.fromkeys([name for name in ends if self.tasks.rows_of(name) is rows]))
                assert here == order[: len(here)]


TestTasksAgainstModel = TasksAgainstModel.TestCase
TestTasksAgainstModel.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
