"""Where the microseconds of one synchronous call go: clock readings at every step, in both processes, as a table of medians.

Covers an actor call and a task on a leased worker. Does not cover throughput (`micro.py`) or floors (`floors.py`; they are printed beside).
The clock is CLOCK_MONOTONIC, which all processes of a machine share; reading it costs about 0.1 us, wrapping a function about 0.2 us.

    python -m perf.steps [--calls 3000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import zray

now = time.perf_counter_ns
STEPS = [
    ("pack arguments, make the pending result", "start", "expected"),
    ("encode and hand the frame to ZeroMQ", "expected", "sent"),
    ("under way: I/O threads, socket, wake of the executor", "sent", "received"),
    ("decode, claim the result", "received", "claimed"),
    ("run the function, pack the value", "claimed", "packed"),
    ("seal, wake the caller", "packed", "sealed"),
    ("the caller wakes and reads the value", "sealed", "end"),
]


class Marks:
    """Clock readings of this process, by step, in the order of the calls."""

    def __init__(self) -> None:
        self.at: dict[str, list[int]] = {}

    def wrap(self, owner: Any, name: str, before: str = "", after: str = "") -> None:
        """Note the time before or after each call of a method."""
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            if before:
                self.at.setdefault(before, []).append(now())
            result = inner(*args, **kwargs)
            if after:
                self.at.setdefault(after, []).append(now())
            return result

        setattr(owner, name, outer)


def watch_executor() -> int:
    """In a worker or actor: note the steps of the calls that follow."""
    from zray import worker as home
    from zray.execution import Executor
    from zray.object_store import ObjectStore

    # Kept in a module of the process, not in a global of this one: functions of a script travel by value, each with its own globals.
    marks = home.__dict__.get("step_marks")
    if marks is None:
        marks = home.__dict__["step_marks"] = Marks()
        marks.wrap(home.Worker, "handle", before="received")
        marks.wrap(Executor, "claim", after="claimed")
        marks.wrap(Executor, "_seal_all", before="packed")
        marks.wrap(ObjectStore, "seal_result", after="sealed")
    marks.at.clear()
    return 0


def executor_marks() -> dict[str, list[int]]:
    """In a worker or actor: the readings since `watch_executor`."""
    from zray import worker as home

    return dict(home.__dict__["step_marks"].at)


def nothing() -> None:
    """The task whose calls are timed."""


class Probe:
    """The actor whose calls are timed."""

    def watch(self) -> int:
        return watch_executor()

    def marks(self) -> dict[str, list[int]]:
        return executor_marks()

    def nothing(self) -> None:
        return None


def measure(call: Any, watch: Any, marks: Any, calls: int) -> dict[str, Any]:
    """Time `calls` synchronous calls; `watch` and `marks` run in the executing process."""
    from zray import api

    session = api.current_session()
    mine = Marks()
    submitter = api.submitter_of(session)
    original = submitter._expect
    submitter._expect = _noting(original, mine, "expected")  # type: ignore[method-assign]
    for _ in range(200):
        zray.get(call.remote())
    zray.get(watch.remote())
    starts, sent, ends = [], [], []
    mine.at.clear()
    for _ in range(calls):
        starts.append(now())
        ref = call.remote()
        sent.append(now())
        zray.get(ref)
        ends.append(now())
    expected = mine.at["expected"][:calls]
    theirs = {step: list(times) for step, times in zray.get(marks.remote()).items()}
    submitter._expect = original  # type: ignore[method-assign]
    # The call that asked for the watch ends among the first readings, the one that fetches them among the last.
    received = theirs["received"][:calls]
    columns = {
        "start": starts,
        "expected": expected,
        "sent": sent,
        "received": received,
        "claimed": theirs["claimed"][:calls],
        "packed": theirs["packed"][-calls:],
        "sealed": theirs["sealed"][-calls:],
        "end": ends,
    }
    rows = {}
    for title, first, last in STEPS:
        pairs = zip(columns[first], columns[last])
        rows[title] = statistics.median(b - a for a, b in pairs) / 1000
    whole = sorted((b - a) / 1000 for a, b in zip(starts, ends))
    return {"steps_us": rows, "p50_us": whole[len(whole) // 2], "p99_us": whole[int(len(whole) * 0.99)]}


def _noting(function: Any, marks: Marks, step: str) -> Any:
    def outer(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        marks.at.setdefault(step, []).append(now())
        return result

    return outer


def main() -> None:
    """Print the tables and, as the last line, all figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=3000)
    calls = parser.parse_args().calls
    with zray.init(num_cpus=2):
        actor = zray.remote(Probe).remote()
        found = {"actor call": measure(actor.nothing, actor.watch, actor.marks, calls)}
    with zray.init(num_cpus=1):  # one worker, so that all of these run in the same process
        found["task on a leased worker"] = measure(
            zray.remote(nothing), zray.remote(watch_executor), zray.remote(executor_marks), calls
        )
    for name, result in found.items():
        print(f"{name}: p50 {result['p50_us']:.1f} us, p99 {result['p99_us']:.1f} us")
        for title, micros in result["steps_us"].items():
            print(f"  {micros:7.1f} us  {title}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
