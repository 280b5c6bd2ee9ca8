"""Asynchronous actors: classes with coroutine methods, whose calls interleave in one event loop."""

from __future__ import annotations

import asyncio
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
def room() -> Any:
    class Room:
        def __init__(self, start: int = 0) -> None:
            self.event = asyncio.Event()
            self.inside = 0
            self.most = 0
            self.log: list[Any] = [start]

        async def wait(self) -> str:
            await self.event.wait()
            return "released"

        async def release(self) -> None:
            self.event.set()

        async def enter(self, wanted: int) -> int:
            self.inside += 1
            self.most = max(self.most, self.inside)
            while self.most < wanted and not self.event.is_set():
                await asyncio.sleep(0.001)
            self.inside -= 1
            return self.most

        async def peak(self) -> int:
            return self.most

        def plain(self, x: int) -> int:
            return x + 1

        async def note(self, item: Any) -> None:
            self.log.append(item)
            await asyncio.sleep(0)

        async def read(self) -> list[Any]:
            return self.log

        async def place(self) -> tuple[int, str]:
            return os.getpid(), threading.current_thread().name

        async def fail(self) -> None:
            await asyncio.sleep(0)
            raise KeyError("inside")

        async def end(self) -> None:
            zray.actor.exit_actor()

        async def identity(self) -> str | None:
            await asyncio.sleep(0.01)
            return zray.get_runtime_context().get_task_id()

    return zray.remote(Room)


def test_calls_interleave(room: Any) -> None:
    actor = room.remote()
    waiting = [actor.wait.remote() for _ in range(10)]
    assert zray.wait(waiting, timeout=0.05)[0] == []
    zray.get(actor.release.remote())
    assert zray.get(waiting) == ["released"] * 10


def test_all_calls_run_in_one_thread(room: Any) -> None:
    actor = room.remote()
    assert len(set(zray.get([actor.place.remote() for _ in range(20)]))) == 1


def test_max_concurrency_is_reached_and_not_passed(room: Any) -> None:
    actor = room.options(max_concurrency=3).remote()
    assert zray.get([actor.enter.remote(3) for _ in range(12)])[-1] == 3
    assert zray.get(actor.peak.remote()) == 3
    wide = room.remote()
    assert zray.get(wide.enter.remote(1)) == 1
    assert set(zray.get([wide.enter.remote(50) for _ in range(50)])) == {50}


def test_calls_of_one_caller_start_in_order(room: Any) -> None:
    actor = room.remote(-1)
    for i in range(500):
        actor.note.remote(i)
    assert zray.get(actor.read.remote()) == list(range(-1, 500))


def test_plain_methods_work_too(room: Any) -> None:
    actor = room.remote()
    assert zray.get([actor.plain.remote(i) for i in range(10)]) == list(range(1, 11))


def test_errors_and_identities(room: Any) -> None:
    actor = room.remote()
    with pytest.raises(KeyError, match="inside"):
        zray.get(actor.fail.remote())
    refs = [actor.identity.remote() for _ in range(10)]
    assert zray.get(refs) == [ref.task_id().hex() for ref in refs]


def test_references_can_be_awaited_inside(gate: Callable[[str], Gate]) -> None:
    class Collector:
        def __init__(self) -> None:
            self.ticks = 0

        async def collect(self, refs: list[Any]) -> Any:
            return await asyncio.gather(*refs)

        async def nested(self, n: int) -> int:
            child = zray.remote(lambda x: x * 2)
            return int(await child.remote(n)) + int(await zray.put(1))

        async def tick(self) -> int:
            self.ticks += 1
            return self.ticks

    hold = gate("hold")

    @zray.remote(num_cpus=0)
    def late(x: int) -> int:
        hold.wait()
        return x

    actor = zray.remote(Collector).remote()
    pending = actor.collect.remote([late.remote(1), zray.put(2), late.remote(3)])
    assert [zray.get(actor.tick.remote()) for _ in range(3)] == [1, 2, 3]
    hold.open()
    assert zray.get(pending) == [1, 2, 3]
    assert zray.get([actor.nested.remote(i) for i in range(10)]) == [2 * i + 1 for i in range(10)]


def test_an_asynchronous_actor_calls_itself(room: Any) -> None:
    class Echo:
        async def outer(self, me: Any) -> str:
            return "outer " + str(await me[0].inner.remote())

        async def inner(self) -> str:
            return "inner"

    actor = zray.remote(Echo).remote()
    assert zray.get(actor.outer.remote([actor])) == "outer inner"


def test_exit_actor_inside_a_coroutine(room: Any) -> None:
    actor = room.remote()
    pid = zray.get(actor.place.remote())[0]
    with pytest.raises(exceptions.ActorDiedError, match="exit_actor"):
        zray.get(actor.end.remote())
    wait_for(lambda: not alive(pid))
    with pytest.raises(exceptions.ActorDiedError):
        zray.get(actor.peak.remote())


def test_it_ends_with_its_last_handle_after_its_calls(room: Any, tally: Tally) -> None:
    class Slow:
        async def work(self, i: int) -> int:
            await asyncio.sleep(0.05)
            tally.add(i)
            return os.getpid()

    actor = zray.remote(Slow).remote()
    refs = [actor.work.remote(i) for i in range(5)]
    del actor
    gc.collect()
    pid = zray.get(refs)[0]
    assert len(tally) == 5
    wait_for(lambda: not alive(pid))


def test_kill_while_calls_wait(room: Any) -> None:
    actor = room.remote()
    waiting = [actor.wait.remote() for _ in range(5)]
    zray.get(actor.peak.remote())
    zray.kill(actor)
    for ref in waiting:
        with pytest.raises(exceptions.ActorDiedError):
            zray.get(ref, timeout=20)


def test_a_coroutine_call_can_be_cancelled(room: Any) -> None:
    actor = room.remote()
    waiting = actor.wait.remote()
    zray.get(actor.peak.remote())
    zray.cancel(waiting)
    with pytest.raises(exceptions.TaskCancelledError):
        zray.get(waiting, timeout=20)
    assert zray.get(actor.plain.remote(1)) == 2


def test_many_cancellations_at_once(room: Any) -> None:
    actor = room.remote()
    waiting = [actor.wait.remote() for _ in range(300)]
    zray.get(actor.peak.remote())
    for ref in waiting:
        zray.cancel(ref)
    for ref in waiting:
        with pytest.raises(exceptions.TaskCancelledError):
            zray.get(ref, timeout=20)
    assert zray.get(actor.plain.remote(1)) == 2


def test_arguments_that_come_late_do_not_stop_the_loop(room: Any, gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")

    @zray.remote(num_cpus=0)
    def late() -> int:
        hold.wait()
        return 4

    actor, other = room.remote(), room.remote()
    waiting = actor.note.remote(late.remote())
    assert zray.get(other.plain.remote(1)) == 2
    hold.open()
    zray.get(waiting)
    assert zray.get(actor.read.remote()) == [0, 4]


def test_many_calls(room: Any) -> None:
    actor = room.remote()
    assert zray.get([actor.plain.remote(i) for i in range(3000)])[-1] == 3000
    zray.get([actor.note.remote(i) for i in range(3000)])
    assert len(zray.get(actor.read.remote())) == 3001
