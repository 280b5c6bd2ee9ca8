"""Threaded actors: `max_concurrency` threads run the calls of one instance."""

from __future__ import annotations

import gc
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.helpers import alive, wait_for
from zray import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers import Gate, Tally

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture
def pool() -> Any:
    class Pool:
        def __init__(self) -> None:
            self.barrier = threading.Barrier(4)
            self.lock = threading.Lock()
            self.inside = 0
            self.most = 0
            self.total = 0

        def meet(self) -> int:
            return self.barrier.wait(30)

        def enter(self, gate: Gate) -> str:
            with self.lock:
                self.inside += 1
                self.most = max(self.most, self.inside)
            gate.wait()
            with self.lock:
                self.inside -= 1
            return threading.current_thread().name

        def peak(self) -> tuple[int, int]:
            return self.inside, self.most

        def add(self, x: int) -> int:
            with self.lock:
                self.total += x
                return self.total

        def fetch(self, refs: list[Any]) -> Any:
            return zray.get(refs[0])

        def task_id(self) -> str | None:
            return zray.get_runtime_context().get_task_id()

        def fail(self) -> None:
            raise ValueError("in a thread")

        def end(self) -> None:
            zray.actor.exit_actor()

        def pid(self) -> int:
            return os.getpid()

    return zray.remote(max_concurrency=4)(Pool)


def test_calls_run_side_by_side(pool: Any) -> None:
    actor = pool.remote()
    assert sorted(zray.get([actor.meet.remote() for _ in range(4)], timeout=40)) == [0, 1, 2, 3]


def test_never_more_than_max_concurrency(pool: Any, gate: Callable[[str], Gate]) -> None:
    actor, hold = pool.remote(), gate("hold")
    refs = [actor.enter.remote(hold) for _ in range(12)]
    probe = pool.options(max_concurrency=5).remote()
    zray.get(probe.pid.remote())
    assert zray.wait(refs, timeout=0.2)[0] == []
    hold.open()
    zray.get(refs)
    assert zray.get(actor.peak.remote()) == (0, 4)


def test_every_call_is_counted_once(pool: Any) -> None:
    actor = pool.remote()
    values = zray.get([actor.add.remote(1) for _ in range(2000)])
    assert sorted(values) == list(range(1, 2001))


def test_waiting_inside_leaves_the_other_threads_free(pool: Any, gate: Callable[[str], Gate]) -> None:
    actor, hold = pool.remote(), gate("hold")

    @zray.remote(num_cpus=0)
    def late() -> str:
        hold.wait()
        return "came"

    refs = [actor.fetch.remote([late.remote()]) for _ in range(3)]
    assert zray.get([actor.add.remote(1) for _ in range(10)], timeout=30)[-1] == 10
    hold.open()
    assert zray.get(refs) == ["came"] * 3


def test_identities_and_errors_belong_to_their_calls(pool: Any) -> None:
    actor = pool.remote()
    refs = [actor.task_id.remote() for _ in range(50)]
    assert zray.get(refs) == [ref.task_id().hex() for ref in refs]
    with pytest.raises(ValueError, match="in a thread"):
        zray.get(actor.fail.remote())
    assert zray.get(actor.add.remote(0)) == 0


def test_exit_actor_in_a_thread(pool: Any) -> None:
    actor = pool.remote()
    pid = zray.get(actor.pid.remote())
    with pytest.raises(exceptions.ActorDiedError, match="exit_actor"):
        zray.get(actor.end.remote())
    wait_for(lambda: not alive(pid))


def test_it_ends_with_its_last_handle_after_its_calls(pool: Any, gate: Callable[[str], Gate]) -> None:
    actor, hold = pool.remote(), gate("hold")
    pid = zray.get(actor.pid.remote())
    refs = [actor.enter.remote(hold) for _ in range(6)]
    del actor
    gc.collect()
    hold.open()
    assert len(zray.get(refs)) == 6
    wait_for(lambda: not alive(pid))


def test_killed_in_the_middle(pool: Any, gate: Callable[[str], Gate], tally: Tally) -> None:
    actor, never = pool.remote(), gate("never")
    refs = [actor.enter.remote(never) for _ in range(8)]
    pid = zray.get(pool.remote().pid.remote())
    assert pid > 0
    zray.kill(actor)
    for ref in refs:
        with pytest.raises(exceptions.ActorDiedError):
            zray.get(ref, timeout=20)


@pytest.mark.slow
def test_threaded_actors_that_leave_on_purpose_do_not_come_back() -> None:
    @zray.remote(num_cpus=0, max_concurrency=3, max_restarts=5)
    class Leaver:
        def ready(self) -> bool:
            return True

        def leave(self) -> None:
            zray.actor.exit_actor()

    for _ in range(60):
        actor = Leaver.remote()
        assert zray.get(actor.ready.remote())
        leaving = [actor.leave.remote() for _ in range(3)]
        for ref in (*leaving, actor.ready.remote()):
            with pytest.raises(exceptions.ActorDiedError):
                zray.get(ref, timeout=30)
        with pytest.raises(exceptions.ActorDiedError):
            zray.get(actor.ready.remote(), timeout=30)
