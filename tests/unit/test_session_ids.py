"""Ids of what a task makes: one sequence for each run, without end, and another in a forked child."""

from __future__ import annotations

import itertools

from zray import ids
from zray.session import TaskContext

TASK = ids.random_id()


def made(context: TaskContext, n: int = 100) -> set[bytes]:
    return {context.next_child_id() for _ in range(n)} | {context.next_put_id() for _ in range(n)}


def test_each_run_has_ids_of_its_own_and_the_same_each_time() -> None:
    runs = [made(TaskContext(TASK, attempt=attempt)) for attempt in range(3)]
    assert [len(run) for run in runs] == [200] * 3
    assert len(set.union(*runs)) == 600
    assert runs == [made(TaskContext(TASK, attempt=attempt)) for attempt in range(3)]


def test_a_forked_child_has_ids_of_its_own() -> None:
    context = TaskContext(TASK, "name", 2, b"a" * 16, b"r")
    child = context.in_forked_child()
    assert (child.task, child.name, child.attempt, child.actor, child.resources) == (TASK, "name", 2, b"a" * 16, b"r")
    assert not made(context) & made(child)
    assert not made(context.in_forked_child()) & made(context.in_forked_child())


def test_puts_never_run_out_of_ids() -> None:
    context = TaskContext(TASK)
    context.puts = itertools.count(ids.MAX_PUTS - 3)
    around = [context.next_put_id() for _ in range(6)]
    assert len(set(around)) == 6
    assert around[2] == TASK[:12] + b"\xff\xff\xff\xff"
    context.puts = itertools.count(2 * ids.MAX_PUTS)
    assert not {context.next_put_id() for _ in range(3)} & set(around)
    assert all(ids.index_of(put) & ids.PUT_BIT for put in around)
