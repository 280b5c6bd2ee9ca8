"""Ids of what a task makes: one sequence for each run, without end, and another in a forked child."""

from __future__ import annotations

import itertools

from zray import ids
from zray.session import TaskContext

TASK = ids.random_id()


def made(context: TaskContext, n: int = 100) -> set[bytes]:
    return {context.next_child_id() for _ in range(n)} | {context.next_put_id() for _ in range(n)}


def test_each_run_has_ids_of_its_own() -> None:
    runs = [made(TaskContext(TASK, attempt=attempt)) for attempt in (0, 1, 2)]
    assert [len(run) for run in runs] == [200] * 3
    assert len(set.union(*runs)) == 600


def test_ids_of_the_first_run_follow_from_the_task() -> None:
    context = TaskContext(TASK)
    assert made(context) == made(TaskContext(TASK))
    assert context.next_child_id() == ids.task_id(TASK, 101)


def test_runs_of_the_same_number_share_no_ids() -> None:
    """Two nodes may count alike: the second run there, on a node that dies, and the second one for who submitted the task."""
    assert not made(TaskContext(TASK, attempt=1)) & made(TaskContext(TASK, attempt=1))


def test_the_origin_of_a_repeat_is_what_it_is_given() -> None:
    assert ids.origin_of(TASK, 0, lambda: b"f" * 16) == TASK
    assert ids.origin_of(TASK, 3, lambda: b"f" * 16) == b"f" * 16


def test_who_goes_apart_has_ids_of_its_own() -> None:
    context = TaskContext(TASK, "name", 2, b"a" * 16, b"r")
    child = context.apart()
    assert (child.task, child.name, child.attempt, child.actor, child.resources) == (TASK, "name", 2, b"a" * 16, b"r")
    assert not made(context) & made(child)
    assert not made(context.apart()) & made(context.apart())


def test_puts_never_run_out_of_ids() -> None:
    context = TaskContext(TASK)
    context.puts = itertools.count(ids.MAX_PUTS - 3)
    around = [context.next_put_id() for _ in range(6)]
    assert len(set(around)) == 6
    assert around[2] == TASK[:12] + b"\xff\xff\xff\xff"
    context.puts = itertools.count(2 * ids.MAX_PUTS)
    assert not {context.next_put_id() for _ in range(3)} & set(around)
    assert all(ids.index_of(put) & ids.PUT_BIT for put in around)
