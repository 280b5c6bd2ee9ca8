"""A million of everything, and no process grows. Each test prints its curve (`pytest -s`)."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.helpers import broker_pid, children, cpus_are_free, private_bytes, query, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

MILLION = 1_000_000
ROUNDS = 10
MIB = 1 << 20

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]


def memory() -> dict[str, float]:
    """Private memory in MiB: of this driver, of the broker, of the fork parent and the workers; and what the store holds."""
    gc.collect()
    node = broker_pid()
    below = [pid for child in children(node) for pid in (child, *children(child))]
    statistics = query("statistics")
    return {
        "driver": private_bytes(os.getpid()) / MIB,
        "broker": private_bytes(node) / MIB,
        "workers": sum(private_bytes(pid) for pid in below) / MIB,
        "entries": float(statistics["entries"]),
        "used": statistics["used"] / MIB,
    }


def endure(what: str, one_round: Callable[[int], None]) -> None:
    """Run a tenth of a million ten times; after the third round (caches and bounded tables are full) nothing may grow."""
    curve: list[dict[str, float]] = []
    for i in range(ROUNDS):
        one_round(MILLION // ROUNDS)
        wait_for(cpus_are_free)
        curve.append(memory())
        print(f"{what}, {(i + 1) * MILLION // ROUNDS}:", {name: round(value, 1) for name, value in curve[-1].items()})
    settled, last = curve[2], curve[-1]
    for name in ("driver", "broker", "workers"):
        assert last[name] < settled[name] * 1.05 + 8, f"{name} grew: {[round(point[name], 1) for point in curve]}"
    assert last["entries"] <= settled["entries"] + 100
    assert last["used"] <= settled["used"] + 1


def test_a_million_tasks(zray_session: Callable[..., Any]) -> None:
    zray_session()

    @zray.remote
    def increase(x: int) -> int:
        return x + 1

    def one_round(n: int) -> None:
        for start in range(0, n, 10_000):
            assert sum(zray.get([increase.remote(i) for i in range(start, start + 10_000)])) == sum(
                range(start + 1, start + 10_001)
            )

    endure("tasks", one_round)


def test_a_million_actor_calls(zray_session: Callable[..., Any]) -> None:
    zray_session()

    class Counter:
        def __init__(self) -> None:
            self.total = 0

        def add(self, amount: int) -> int:
            self.total += amount
            return self.total

    counter = zray.remote(Counter).remote()
    calls = 0

    def one_round(n: int) -> None:
        nonlocal calls
        for _ in range(n // 10_000):
            calls += 10_000
            assert zray.get([counter.add.remote(1) for _ in range(10_000)])[-1] == calls

    endure("actor calls", one_round)


def test_a_million_puts(zray_session: Callable[..., Any]) -> None:
    zray_session()

    def one_round(n: int) -> None:
        for i in range(n):
            assert zray.get(zray.put(i)) == i

    endure("puts", one_round)
