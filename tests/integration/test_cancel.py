"""Cancelling: queued and running tasks, by force, with their children, and calls of actors."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.helpers import alive, cpus_are_free, query, wait_for
from zray import exceptions
from zray.exceptions import TaskCancelledError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers import Gate, Tally

WARM = {"num_cpus": 2}
pytestmark = pytest.mark.usefixtures("warm")


def cancelled(ref: Any) -> None:
    with pytest.raises(TaskCancelledError):
        zray.get(ref, timeout=30)


def started(tally: Tally, count: int) -> None:
    wait_for(lambda: len(tally) >= count, what=f"{count} have started: {tally.lines}")


def test_a_queued_task_never_runs(gate: Callable[[str], Gate], tally: Tally) -> None:
    hold = gate("hold")
    running = [zray.remote(hold.wait).remote() for _ in range(2)]
    queued = [zray.remote(tally.add).remote(i) for i in range(10)]
    for ref in queued[:5]:
        zray.cancel(ref)
    for ref in queued[:5]:
        cancelled(ref)
    hold.open()
    zray.get([*running, *queued[5:]])
    assert sorted(tally.lines) == ["5", "6", "7", "8", "9"]


def test_a_task_that_waits_for_arguments(gate: Callable[[str], Gate], tally: Tally) -> None:
    hold = gate("hold")
    argument = zray.remote(num_cpus=0)(hold.wait).remote()
    waiting = zray.remote(tally.add).remote(argument)
    after = zray.remote(tally.add).remote(waiting)
    zray.cancel(waiting)
    cancelled(waiting)
    cancelled(after)
    hold.open()
    assert zray.get(argument) is None
    assert len(tally) == 0


def test_a_running_task_is_interrupted(tally: Tally) -> None:
    @zray.remote
    def endless() -> None:
        tally.add()
        try:
            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            tally.add("interrupted")
            raise

    ref = endless.remote()
    started(tally, 1)
    zray.cancel(ref)
    cancelled(ref)
    assert tally.lines[-1] == "interrupted"
    assert zray.get(zray.remote(lambda: 1).remote()) == 1


def test_a_task_that_sleeps_long_or_computes(tally: Tally) -> None:
    @zray.remote
    def sleeper() -> None:
        tally.add()
        time.sleep(1000)

    @zray.remote
    def thinker() -> None:
        tally.add()
        while True:
            pass

    refs = [sleeper.remote(), thinker.remote()]
    started(tally, 2)
    for ref in refs:
        zray.cancel(ref)
    for ref in refs:
        cancelled(ref)


def test_a_task_that_waits_in_get_and_in_wait(gate: Callable[[str], Gate], tally: Tally) -> None:
    hold = gate("hold")
    pending = zray.remote(num_cpus=0)(hold.wait).remote()

    @zray.remote
    def get_it(box: list[Any]) -> None:
        tally.add()
        zray.get(box[0])

    @zray.remote
    def wait_for_it(box: list[Any]) -> None:
        tally.add()
        zray.wait(box)

    refs = [get_it.remote([pending]), wait_for_it.remote([pending])]
    started(tally, 2)
    for ref in refs:
        zray.cancel(ref, recursive=False)
    for ref in refs:
        cancelled(ref)
    hold.open()
    assert zray.get(pending) is None


def test_a_task_that_refuses_is_ended_by_force(tally: Tally) -> None:
    @zray.remote(max_retries=5)
    def stubborn() -> None:
        tally.add(os.getpid())
        while True:
            try:
                time.sleep(1000)
            except KeyboardInterrupt:
                tally.add("no")

    ref = stubborn.remote()
    started(tally, 1)
    zray.cancel(ref)
    wait_for(lambda: "no" in tally.lines)
    pid = int(tally.lines[0])
    zray.cancel(ref, force=True)
    with pytest.raises((TaskCancelledError, exceptions.WorkerCrashedError)) as raised:
        zray.get(ref, timeout=30)
    assert isinstance(raised.value, TaskCancelledError)
    wait_for(lambda: not alive(pid))
    assert tally.lines.count("no") == len(tally) - 1, "it was not started again"
    assert zray.get(zray.remote(lambda: 1).remote()) == 1


def test_others_in_the_queue_of_a_worker_ended_by_force_still_run(tally: Tally) -> None:
    @zray.remote
    def block() -> None:
        tally.add()
        time.sleep(1000)

    blocked = [block.remote() for _ in range(2)]
    started(tally, 2)
    echo = zray.remote(lambda x: x)
    refs = [echo.remote(i) for i in range(100)]
    for ref in blocked:
        zray.cancel(ref, force=True)
    assert zray.get(refs, timeout=60) == list(range(100))
    for ref in blocked:
        cancelled(ref)


def test_children_are_cancelled_with_their_parent(tally: Tally) -> None:
    @zray.remote(num_cpus=0)
    def child(depth: int) -> None:
        tally.add("child")
        if depth:
            zray.get([child.remote(depth - 1) for _ in range(2)])
        time.sleep(1000)

    @zray.remote(num_cpus=0)
    def parent() -> None:
        zray.get(child.remote(1))

    ref = parent.remote()
    started(tally, 3)
    zray.cancel(ref)
    cancelled(ref)
    wait_for(lambda: not [row for row in query("objects") if row["state"] == "CLAIMED"], what="no child runs")
    assert len(tally) <= 4


def test_children_go_on_without_recursive(gate: Callable[[str], Gate], tally: Tally) -> None:
    hold = gate("hold")

    @zray.remote(num_cpus=0)
    def child() -> int:
        tally.add("child")
        hold.wait()
        return tally.add("child went on")

    @zray.remote(num_cpus=0)
    def parent() -> None:
        zray.get(child.remote())

    ref = parent.remote()
    started(tally, 1)
    zray.cancel(ref, recursive=False)
    cancelled(ref)
    hold.open()
    wait_for(lambda: "child went on" in tally.lines)


def test_cancelling_what_is_done_changes_nothing() -> None:
    ref = zray.remote(lambda: 5).remote()
    assert zray.get(ref) == 5
    zray.cancel(ref)
    zray.cancel(ref, force=True)
    assert zray.get(ref) == 5


def test_cancelling_twice_and_with_several_results(tally: Tally) -> None:
    @zray.remote(num_returns=2)
    def endless() -> Any:
        tally.add()
        time.sleep(1000)

    a, b = endless.remote()
    started(tally, 1)
    zray.cancel(b)
    zray.cancel(a)
    zray.cancel(b)
    cancelled(a)
    cancelled(b)


def test_a_cancelled_task_is_not_retried(tally: Tally) -> None:
    @zray.remote(max_retries=10, retry_exceptions=True)
    def endless() -> None:
        tally.add()
        time.sleep(1000)

    ref = endless.remote()
    started(tally, 1)
    zray.cancel(ref)
    cancelled(ref)
    wait_for(cpus_are_free)
    assert len(tally) == 1


def test_waiters_learn_of_it(gate: Callable[[str], Gate], tally: Tally) -> None:
    @zray.remote
    def endless() -> None:
        tally.add()
        time.sleep(1000)

    ref = endless.remote()
    future = ref.future()
    started(tally, 1)
    zray.cancel(ref)
    ready, rest = zray.wait([ref], timeout=30)
    assert (ready, rest) == ([ref], [])
    with pytest.raises(TaskCancelledError):
        future.result(30)


def test_an_interrupt_hits_only_its_own_task(tally: Tally) -> None:
    """Short tasks are cancelled at about the time they end; their neighbours must not feel it."""
    quick = zray.remote(lambda i: i)
    for _ in range(30):
        refs = [quick.remote(i) for i in range(20)]
        for ref in refs[::2]:
            zray.cancel(ref)
        assert zray.get(refs[1::2], timeout=30) == list(range(1, 20, 2))
        for i, ref in zip(range(0, 20, 2), refs[::2]):
            try:
                assert zray.get(ref, timeout=30) == i
            except TaskCancelledError:
                pass


def test_a_queued_call_of_an_actor(gate: Callable[[str], Gate], tally: Tally) -> None:
    class Worker:
        def wait(self, gate: Gate) -> None:
            gate.wait()

        def work(self, i: int) -> int:
            return tally.add(i)

    hold = gate("hold")
    actor = zray.remote(Worker).remote()
    running = actor.wait.remote(hold)
    queued = [actor.work.remote(i) for i in range(4)]
    zray.cancel(queued[1])
    cancelled(queued[1])
    hold.open()
    assert zray.get([running, queued[0], queued[2], queued[3]], timeout=30) == [None, 1, 2, 3]
    assert tally.lines == ["0", "2", "3"]


def test_a_task_cancels_its_own_child(tally: Tally) -> None:
    @zray.remote(num_cpus=0)
    def endless() -> None:
        tally.add()
        time.sleep(1000)

    @zray.remote
    def parent() -> str:
        ref = endless.remote()
        wait_for(lambda: len(tally) > 0)
        zray.cancel(ref)
        try:
            zray.get(ref, timeout=30)
        except TaskCancelledError:
            return "cancelled"
        return "lived"

    assert zray.get(parent.remote(), timeout=60) == "cancelled"


def test_a_task_is_cancelled_while_its_function_is_being_loaded(gate: Callable[[str], Gate], tally: Tally) -> None:
    loading = gate("loading")

    class Heavy:
        def __reduce__(self) -> Any:
            return load, ()

    def load() -> None:
        tally.add()
        loading.wait()

    heavy = Heavy()

    @zray.remote
    def endless() -> None:
        assert heavy is None
        while True:
            time.sleep(0.01)

    ref = endless.remote()
    wait_for(lambda: len(tally) == 1, what="the function is being loaded")
    zray.cancel(ref)
    wait_for(lambda: query("statistics")["jobs"])  # the broker has dealt with the request before this one
    loading.open()
    with pytest.raises(TaskCancelledError):
        zray.get(ref, timeout=30)
