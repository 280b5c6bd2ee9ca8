"""Interrupts at any point of zray's own code: Ctrl-C and other signal handlers that raise in drivers, cancellations in workers.

Each test interrupts so often that every step of a submission and of a wait is hit many times; afterwards everything must work as before.
"""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

import zray
from tests.helpers import cpus_are_free, query, until_interrupted, wait_for
from zray.exceptions import TaskCancelledError

WARM = {"num_cpus": 2}
LARGE = 100_000
"""Bytes of an argument that is missed when it stays."""
pytestmark = [
    pytest.mark.usefixtures("warm"),
    pytest.mark.timeout(method="thread"),  # SIGALRM is taken
]


@zray.remote(num_cpus=0)
class Counter:
    def __init__(self) -> None:
        self.count = 0

    def increase(self) -> int:
        self.count += 1
        return self.count

    def pair(self) -> tuple[int, int]:
        return self.count, self.count


@zray.remote(num_cpus=0)
class Held:
    def __init__(self, value: Any) -> None:
        self.value = value

    def get(self) -> Any:
        return self.value


@zray.remote
def plain(value: int) -> int:
    return value


@zray.remote(num_returns=2)
def two(value: int) -> tuple[int, int]:
    return value, -value


def test_calls_of_an_actor_while_they_are_submitted() -> None:
    counter = Counter.remote()
    draw = random.Random(1)
    before = zray.get(counter.increase.remote())
    for _ in range(1500):
        refs: list[Any] = []

        def step(refs: list[Any] = refs) -> None:
            refs.append(counter.increase.remote())
            counter.pair.options(num_returns=2).remote()

        until_interrupted(0.0001 + draw.random() * 0.0005, step)
        values = [before, *zray.get(refs, timeout=30)]
        before = zray.get(counter.increase.remote(), timeout=30)
        values.append(before)
        assert values == sorted(set(values))


def test_tasks_while_they_are_submitted() -> None:
    draw = random.Random(2)
    for turn in range(1000):
        refs: list[Any] = []
        pairs: list[Any] = []

        def step(turn: int = turn, refs: list[Any] = refs, pairs: list[Any] = pairs) -> None:
            refs.append(plain.remote(turn))
            pairs.append(two.remote(turn))

        until_interrupted(0.0001 + draw.random() * 0.0005, step)
        assert set(zray.get(refs, timeout=30)) <= {turn}
        assert all(zray.get(pair, timeout=30) == [turn, -turn] for pair in pairs)
    wait_for(cpus_are_free, what="all CPUs are free")


def test_single_tasks_on_a_worker_of_their_own() -> None:
    draw = random.Random(3)

    def step() -> None:
        assert zray.get(plain.remote(7), timeout=30) == 7

    for _ in range(1000):
        until_interrupted(0.0001 + draw.random() * 0.0005, step)
        step()
    wait_for(cpus_are_free, what="all CPUs are free")


def test_puts_waits_and_futures() -> None:
    draw = random.Random(4)
    value = b"x" * 5000

    def step() -> None:
        refs = [zray.put(value), plain.remote(7)]
        zray.wait(refs, num_returns=2, timeout=30)
        refs[1].future()

    for turn in range(500):
        until_interrupted(0.0001 + draw.random() * 0.0005, step)
        assert zray.get([zray.put(value), plain.remote(turn)], timeout=30) == [value, turn]
    assert plain.remote(5).future().result(30) == 5


def test_actors_while_they_are_created() -> None:
    draw = random.Random(6)
    assert zray.get(Held.remote(5).get.remote()) == 5  # from now on a creation is so short that some are whole

    def step() -> None:
        Held.remote(zray.put(b"x" * LARGE)).get.remote()
        time.sleep(0.01)

    for _ in range(300):
        until_interrupted(0.0001 + draw.random() * 0.0005, step)
        time.sleep(0.01)  # actors do not come faster than they go
    wait_for(lambda: not [row for row in query("objects") if row["size"] >= LARGE], 30, "no argument is left")
    assert zray.get(Held.remote(5).get.remote(), timeout=30) == 5


def test_requests() -> None:
    draw = random.Random(7)
    counter = Counter.options(name="requests").remote()
    zray.kv.put("key", b"value")

    def step() -> None:
        assert zray.kv.get("key") == b"value"
        assert zray.get_actor("requests") == counter

    for _ in range(300):
        until_interrupted(0.0001 + draw.random() * 0.0005, step)
        step()
    zray.kv.delete("key")


@zray.remote
def waits_again_and_again(how: str) -> None:
    while True:
        refs = [plain.remote(1), plain.remote(2)]
        if how == "get":
            zray.get(refs)
        else:
            zray.wait(refs, num_returns=2)


@zray.remote
def depth(levels: int) -> int:
    return 0 if levels == 0 else 1 + zray.get(depth.remote(levels - 1))


@pytest.mark.parametrize("how", ["get", "wait"])
def test_cancelled_while_they_wait(how: str) -> None:
    draw = random.Random(5)
    for _ in range(100):
        refs = [waits_again_and_again.remote(how) for _ in range(4)]
        time.sleep(draw.random() * 0.02)
        for ref in refs:
            zray.cancel(ref)
        for ref in refs:
            with pytest.raises(TaskCancelledError):
                zray.get(ref, timeout=30)
    assert zray.get(depth.remote(8), timeout=30) == 8
    wait_for(cpus_are_free, what="all CPUs are free")


@zray.remote
def calls_without_end(counter: Any) -> None:
    while True:
        counter.increase.remote()


@zray.remote
def one_call(counter: Any) -> int:
    return zray.get(counter.increase.remote(), timeout=30)  # type: ignore[no-any-return]


def test_cancelled_while_they_call_an_actor() -> None:
    counter = Counter.remote()
    draw = random.Random(6)
    for _ in range(60):
        refs = [calls_without_end.remote(counter) for _ in range(2)]
        time.sleep(0.005 + draw.random() * 0.01)
        for ref in refs:
            zray.cancel(ref)
        for ref in refs:
            with pytest.raises(TaskCancelledError):
                zray.get(ref, timeout=30)
        assert len(set(zray.get([one_call.remote(counter) for _ in range(4)], timeout=60))) == 4
    wait_for(cpus_are_free, what="all CPUs are free")


def test_a_task_that_lies_in_its_workers_inbox() -> None:
    for _ in range(300):
        ref = waits_again_and_again.remote("get")
        zray.cancel(ref)
        with pytest.raises(TaskCancelledError):
            zray.get(ref, timeout=30)
    wait_for(cpus_are_free, what="all CPUs are free")
