"""Every row, the floors and start-up as pytest-benchmark tests: `pytest perf/micro.py --benchmark-only`.

Covers one system alone (zray; the environment variable PERF_API names another one) in a few minutes, for watching
a change. Does not cover comparison in turn with peers: `compare.py`.

pytest-benchmark repeats and reports; how many calls make a round is found here, once: long beside the clock, short
beside a coffee. Rates in the row's own unit are in `extra_info`, as the machine facts are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from perf import startup, timing
from perf.floors import FLOORS
from perf.rows import ROWS, Row
from perf.sides import can_run, start

API = os.environ.get("PERF_API", "zray")

ROUND_SECONDS = 0.25
ROUNDS = 7
SLOW_CALL_SECONDS = 1.0
"""A row whose single call takes longer than this gets SLOW_ROUNDS rounds of one call."""
SLOW_ROUNDS = 3
STARTUPS = 5


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """The machine facts, once for all."""
    return timing.machine_facts()


@pytest.fixture(scope="module")
def api() -> Iterator[Any]:
    """The system with two workers."""
    with start(API) as started:
        yield started


def run(benchmark: Any, api: Any, row: Row, facts: dict[str, Any]) -> None:
    """Measure one row: find out how many calls fill a round, repeat, note the rate."""
    with row.open(api) as call:
        timing.warm_up(call, ROUND_SECONDS / 2, row.warm_calls)
        first = timing.run_block(call, 1.0, ROUND_SECONDS / 5)
        calls = max(1, round(ROUND_SECONDS * first.rate))
        rounds = ROUNDS if first.seconds / first.operations < SLOW_CALL_SECONDS else SLOW_ROUNDS
        benchmark.pedantic(call, rounds=rounds, iterations=calls)
        if row.latency:
            found = timing.latency(timing.sample(call, ROUND_SECONDS))
            benchmark.extra_info.update({"p50_us": found.p50, "p99_us": found.p99})
    benchmark.extra_info.update({"unit": row.unit, "operations": row.operations, "facts": facts})
    if benchmark.stats is not None:
        benchmark.extra_info["rate"] = row.operations / benchmark.stats.stats.median


@pytest.mark.benchmark(group="floors")
@pytest.mark.parametrize("name", FLOORS)
def test_floor(benchmark: Any, name: str, facts: dict[str, Any]) -> None:
    """What the machine can do."""
    run(benchmark, None, FLOORS[name], facts)


class ReplayClock:
    """A timer that shows what another process measured: it stands still but for what is put in."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        """Return the seconds put in so far."""
        return self.seconds


REPLAY = ReplayClock()


@pytest.fixture(scope="module")
def startups() -> list[dict[str, float]]:
    """Fresh processes, each with all phases."""
    return [startup.run_once(API) for _ in range(STARTUPS)]


@pytest.mark.benchmark(group="start-up", timer=REPLAY.now)
@pytest.mark.parametrize("phase", startup.PHASES)
def test_startup(benchmark: Any, phase: str, facts: dict[str, Any], startups: list[dict[str, float]]) -> None:
    """One phase of a fresh process, as the clock inside that process saw it."""
    taken = iter(startups)

    def call() -> None:
        REPLAY.seconds += next(taken)[phase]

    benchmark.pedantic(call, rounds=len(startups), iterations=1)
    benchmark.extra_info.update({"unit": "s", "facts": facts})


@pytest.mark.benchmark(group="rows")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if can_run(API, row)])
def test_row(benchmark: Any, api: Any, name: str, facts: dict[str, Any]) -> None:
    """What the system does with it."""
    run(benchmark, api, ROWS[name], facts)
