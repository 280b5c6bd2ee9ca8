"""`await ref` and `ref.future()`: results in event loops and thread pools of the driver."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zray
from tests.helpers import query, wait_for
from zray.exceptions import WorkerCrashedError, ZrayUsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers import Gate

pytestmark = pytest.mark.usefixtures("warm")


def test_await_one_and_many() -> None:
    echo = zray.remote(lambda x: x)

    async def main() -> Any:
        one = await echo.remote(1)
        many = await asyncio.gather(*[echo.remote(i) for i in range(200)])
        return one, many, await zray.put("put")

    assert asyncio.run(main()) == (1, list(range(200)), "put")


def test_await_of_what_comes_later(gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")
    ref = zray.remote(hold.wait).remote()

    async def main() -> list[str]:
        order: list[str] = []

        async def waiter() -> None:
            await ref
            order.append("result")

        task = asyncio.ensure_future(waiter())
        for _ in range(5):
            await asyncio.sleep(0.01)
            order.append("tick")
        hold.open()
        await asyncio.wait_for(task, 30)
        return order

    assert asyncio.run(main()) == ["tick"] * 5 + ["result"]


def test_await_raises_what_the_task_raised() -> None:
    @zray.remote
    def fail() -> None:
        raise KeyError("awaited")

    @zray.remote(max_retries=0)
    def die() -> None:
        import os

        os._exit(1)

    async def main() -> None:
        with pytest.raises(KeyError, match="awaited"):
            await fail.remote()
        with pytest.raises(WorkerCrashedError):
            await die.remote()
        results = await asyncio.gather(fail.remote(), zray.put(1), return_exceptions=True)
        assert isinstance(results[0], KeyError)
        assert results[1] == 1

    asyncio.run(main())


def test_wait_for_with_a_timeout(gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")
    ref = zray.remote(hold.wait).remote()

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(ref.future()), 0.05)
        hold.open()
        assert await asyncio.wait_for(asyncio.wrap_future(ref.future()), 30) is None

    asyncio.run(main())
    assert zray.get(ref) is None


def test_concurrent_futures() -> None:
    echo = zray.remote(lambda x: x)
    futures = {echo.remote(i).future(): i for i in range(50)}
    seen = [(futures[future], future.result()) for future in concurrent.futures.as_completed(futures, timeout=30)]
    assert sorted(seen) == [(i, i) for i in range(50)]
    done, rest = concurrent.futures.wait([zray.put(1).future()], timeout=30)
    assert (len(done), len(rest)) == (1, 0)


def test_callbacks_and_several_futures_of_one_result(gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")

    @zray.remote
    def late() -> str:
        hold.wait()
        return "came"

    ref = late.remote()
    called: list[str] = []
    futures = [ref.future() for _ in range(3)]
    for future in futures:
        future.add_done_callback(lambda f: called.append(f.result()))
    assert not any(future.done() for future in futures)
    hold.open()
    assert [future.result(30) for future in futures] == ["came"] * 3
    wait_for(lambda: called == ["came"] * 3)


def test_a_future_that_is_cancelled_leaves_the_task_alone(gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")
    ref = zray.remote(lambda: hold.wait() or 5).remote()
    future = ref.future()
    assert future.cancel()
    hold.open()
    assert zray.get(ref) == 5
    assert future.cancelled()
    assert ref.future().result(30) == 5


def test_results_that_die_with_their_future(gate: Callable[[str], Gate]) -> None:
    future = zray.remote(lambda: list(range(1000))).remote().future()
    assert future.result(30) == list(range(1000))


def test_futures_from_many_threads() -> None:
    echo = zray.remote(lambda x: x)
    wrong: list[Any] = []

    def work(n: int) -> None:
        for i in range(20):
            if echo.remote((n, i)).future().result(60) != (n, i):
                wrong.append((n, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not wrong


def test_actors_and_futures() -> None:
    class Adder:
        def add(self, a: int, b: int) -> int:
            return a + b

    actor = zray.remote(Adder).remote()

    async def main() -> list[int]:
        return list(await asyncio.gather(*[actor.add.remote(i, i) for i in range(100)]))

    assert asyncio.run(main()) == [2 * i for i in range(100)]


def test_a_value_goes_with_its_future() -> None:
    future = zray.remote(np.zeros).remote(1_000_000).future()
    assert len(future.result(30)) == 1_000_000
    del future
    wait_for(lambda: not [row for row in query("objects") if row["size"] >= 1_000_000], what="the value is gone")


def test_a_future_during_and_after_shutdown(gate: Callable[[str], Gate]) -> None:
    never = gate("never")
    refs = [zray.remote(never.wait).options(num_cpus=0).remote() for _ in range(3)]
    outcomes: list[Any] = []

    def ask() -> None:
        while len(outcomes) < 100_000:
            try:
                outcomes.append(refs[0].future())
            except ZrayUsageError as error:
                outcomes.append(error)
                return

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: len(outcomes) > 10)
    zray.shutdown()
    thread.join(30)
    futures = [outcome for outcome in outcomes if not isinstance(outcome, ZrayUsageError)]
    assert concurrent.futures.wait(futures, 10).not_done == set()


def test_shutdown_ends_the_futures_that_are_open(gate: Callable[[str], Gate]) -> None:
    never = gate("never")
    future = zray.remote(never.wait).remote().future()
    zray.shutdown()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(10)
