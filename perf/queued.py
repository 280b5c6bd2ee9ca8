"""Many tasks waiting at once: how fast they are accepted, what one costs in memory, how fast they drain.

Covers the two queue figures: "50k tasks submitted then drained" (`--tasks 50000 --open`) and "1 million queued" (the
default). Does not cover the rate of tasks that never pile up (`rows.py`).

For the memory of a queued task the workers are held (each runs a task that waits for a file), everything is submitted,
the memory of all processes is read, then the workers are let go and every result is fetched. Memory is what every
process holds outside of shared memory (pages that several map are shared out among them), the driver with its
references included, plus what memory files hold; the same sum before the first submission is taken off. The sums of USS
and of PSS are given beside it. `--open` does not hold the workers and reads no memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import timing
from .accounting import mark_environment, memory_files, processes_of, usages
from .remotely import small_value
from .rows import BATCH
from .sides import CPUS, start

MILLION = 1_000_000


def _hold_until(path: str) -> int:
    """Occupy a worker until a file appears."""
    while not os.path.exists(path):
        time.sleep(0.01)
    return os.getpid()


def _announce_and_hold(directory: str, number: int) -> int:
    Path(directory, f"held{number}").touch()
    return _hold_until(os.path.join(directory, "go"))


def bytes_in_use(mark: str) -> dict[str, int]:
    """Return the bytes that driver and node hold now: without shared memory, private, proportional, in memory files."""
    here = os.getpid()
    pids = [here, *processes_of(mark, here)]
    found = usages(pids)
    return {
        "own": sum(usage.own for usage in found),
        "uss": sum(usage.uss for usage in found),
        "pss": sum(usage.pss for usage in found),
        "files": memory_files(pids),
        "driver": next((usage.own for usage in found if usage.pid == here), 0),
        "processes": len(found),
    }


def _hold_workers(api: Any, directory: str, patience: float = 60.0) -> list[Any]:
    hold = api.remote(_announce_and_hold)
    held = [hold.remote(directory, number) for number in range(CPUS)]
    deadline = time.monotonic() + patience
    while not all(Path(directory, f"held{number}").exists() for number in range(CPUS)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {patience:.0f} s not all {CPUS} workers had started their holding task")
        time.sleep(0.01)
    return held


def measure(api_name: str, tasks: int, *, held: bool = True) -> dict[str, object]:
    """Submit `tasks` small tasks, drain them, and return seconds and, with `held` workers, bytes a queued task."""
    mark = mark_environment()
    with start(api_name) as api, tempfile.TemporaryDirectory(prefix="zray-perf-") as directory:
        run = api.remote(small_value)
        api.get([run.remote() for _ in range(BATCH)])
        holding = _hold_workers(api, directory) if held else []
        before = bytes_in_use(mark) if held else {}
        references: list[Any] = []
        keep = references.append
        submit = run.remote
        begin = time.perf_counter()
        for _ in range(tasks):
            keep(submit())
        submitted = time.perf_counter()
        during = bytes_in_use(mark) if held else {}
        Path(directory, "go").touch()
        released = time.perf_counter()
        api.get(holding)
        values = api.get(references)
        drained = time.perf_counter()
        if values != [b"ok"] * tasks:
            raise AssertionError("a queued task gave a wrong value")
        del keep, references, values
        found: dict[str, object] = {
            "tasks": tasks,
            "submit_seconds": round(submitted - begin, 3),
            "drain_seconds": round(drained - released, 3),
            "seconds": round(submitted - begin + drained - released, 3),
        }
        if held:
            found.update(
                {
                    "bytes_a_task": round((_whole(during) - _whole(before)) / tasks, 1),
                    "proportional_bytes_a_task": round((during["pss"] - before["pss"]) / tasks, 1),
                    "private_bytes_a_task": round((during["uss"] - before["uss"]) / tasks, 1),
                    "driver_bytes_a_task": round((during["driver"] - before["driver"]) / tasks, 1),
                    "file_bytes_a_task": round((during["files"] - before["files"]) / tasks, 1),
                    "processes": during["processes"],
                }
            )
    return found


def _whole(used: dict[str, int]) -> int:
    return used["own"] + used["files"]


def main(arguments: list[str] | None = None) -> int:
    """Measure queued tasks from the command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.queued", description=__doc__.split("\n")[0])
    parser.add_argument("--api", default="zray")
    parser.add_argument("--tasks", type=int, default=MILLION)
    parser.add_argument("--open", action="store_true", help="do not hold the workers; no memory figures")
    parser.add_argument("--once", action="store_true", help="print a JSON line and nothing else")
    chosen = parser.parse_args(arguments)
    found = measure(chosen.api, chosen.tasks, held=not chosen.open)
    if chosen.once:
        timing.print_json(found)
        return 0
    for key, value in found.items():
        print(f"{key:28s} {value:>12,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
