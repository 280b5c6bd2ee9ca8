"""zray.eager_tasks: tasks that make their first step at once are tasks like any other."""

from __future__ import annotations

import asyncio
import contextvars
import sys
from typing import TYPE_CHECKING, Any

import pytest

from zray import eager_tasks

if TYPE_CHECKING:
    from collections.abc import Coroutine

EAGER = sys.version_info >= (3, 11)
variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="outside")


def start(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    return eager_tasks.start(asyncio.get_running_loop(), coroutine)


def test_what_awaits_nothing_ends_at_once() -> None:
    seen: list[str] = []

    async def method() -> None:
        seen.append("ran")

    async def main() -> None:
        task = start(method())
        assert seen == (["ran"] if EAGER else [])
        if task is not None:
            await task
        await asyncio.sleep(0)
        assert seen == ["ran"]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_task_is_itself_before_and_after_it_waits() -> None:
    tasks: list[object] = []

    async def method(gate: asyncio.Future[str]) -> None:
        tasks.append(asyncio.current_task())
        variable.set("inside")
        await asyncio.sleep(0)
        tasks.append(asyncio.current_task())
        assert await gate == "open"
        tasks.append(asyncio.current_task())
        assert variable.get() == "inside"

    async def main() -> None:
        gate: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        task = start(method(gate))
        assert task is not None
        assert len(tasks) == (1 if EAGER else 0)
        assert asyncio.current_task() is not task
        assert variable.get() == "outside"
        await asyncio.sleep(0)
        gate.set_result("open")
        await task
        assert tasks == [task] * 3

    asyncio.run(main())


def test_started_in_a_callback() -> None:
    async def method(done: asyncio.Event) -> None:
        await asyncio.sleep(0)
        done.set()

    async def main() -> None:
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: eager_tasks.start(loop, method(done)))
        await done.wait()

    asyncio.run(main())


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_cancellation_reaches_the_coroutine_wherever_it_is(rounds: int) -> None:
    ended: list[str] = []

    async def method() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def main() -> None:
        task = start(method())
        assert task is not None
        if not EAGER:
            await asyncio.sleep(0)
        for _ in range(rounds):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["cancelled"]

    asyncio.run(main())


def test_one_that_survives_its_cancellation() -> None:
    async def method() -> None:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(3600)
        await asyncio.sleep(0)

    async def main() -> None:
        task = start(method())
        assert task is not None
        if not EAGER:
            await asyncio.sleep(0)
        task.cancel()
        await task

    asyncio.run(main())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.timeout came with Python 3.11")
def test_a_time_limit_that_begins_in_the_first_step() -> None:
    async def method() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.sleep(3600)

    async def main() -> None:
        task = start(method())
        assert task is not None
        await task

    asyncio.run(main())


def test_an_exception_of_the_first_step() -> None:
    async def method() -> None:
        raise LookupError

    async def main() -> None:
        with pytest.raises(LookupError):
            task = start(method())
            if task is not None:
                await task
        await asyncio.sleep(0)

    asyncio.run(main())


def test_a_future_that_is_there_already_and_one_that_fails() -> None:
    async def method() -> None:
        loop = asyncio.get_running_loop()
        there: asyncio.Future[int] = loop.create_future()
        there.set_result(3)
        assert await there == 3
        failed: asyncio.Future[int] = loop.create_future()
        loop.call_soon(failed.set_exception, LookupError())
        with pytest.raises(LookupError):
            await failed

    async def main() -> None:
        task = start(method())
        assert task is not None
        await task

    asyncio.run(main())
