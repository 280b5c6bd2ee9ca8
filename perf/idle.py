"""What a node costs while it does nothing: processes, private memory, processor time.

Covers starting a node, letting it settle and watching it. Does not cover how processes and their memory are found and
counted (`accounting.py`) or memory of queued tasks (`queued.py`).

`python -m perf.idle [--api NAME] [--seconds S]` starts a node with two workers in this process, uses both once, waits
until it is quiet and looks at it for S seconds. The driver (this process) is reported beside the node, not in it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from . import timing
from .accounting import mark_environment, memory_files, processes_of, usage_of, usages
from .sides import CPUS, start


def await_quiet(mark: str, *, limit: float = 20.0, below: float = 0.05) -> None:
    """Wait, at most `limit` s, for a second in which the processes stay the same and use `below` of a core at most."""
    deadline = time.monotonic() + limit
    before = {usage.pid: usage.cpu_seconds for usage in usages(processes_of(mark, os.getpid()))}
    while time.monotonic() < deadline:
        time.sleep(1.0)
        now = {usage.pid: usage.cpu_seconds for usage in usages(processes_of(mark, os.getpid()))}
        if now.keys() == before.keys() and sum(now.values()) - sum(before.values()) < below:
            return
        before = now


def look(mark: str, seconds: float) -> dict[str, object]:
    """Watch the node that this process started for `seconds`; return counts, bytes and the share of a core it used."""
    here = os.getpid()
    first = {usage.pid: usage for usage in usages(processes_of(mark, here))}
    driver_before = usage_of(here)
    start_at = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - start_at
    driver = usage_of(here)
    last = usages(processes_of(mark, here))
    used = sum(usage.cpu_seconds - (first[usage.pid].cpu_seconds if usage.pid in first else 0.0) for usage in last)
    assert driver is not None
    assert driver_before is not None
    return {
        "processes": len(last),
        "uss_mb": round(sum(usage.uss for usage in last) / 1e6, 1),
        "pss_mb": round(sum(usage.pss for usage in last) / 1e6, 1),
        "memory_files_mb": round(memory_files([usage.pid for usage in last]) / 1e6, 1),
        "cpu_percent": round(100 * used / elapsed, 2),
        "driver_uss_mb": round(driver.uss / 1e6, 1),
        "driver_cpu_percent": round(100 * (driver.cpu_seconds - driver_before.cpu_seconds) / elapsed, 2),
        "seconds": round(elapsed, 2),
        "each": [
            {"command": usage.command[:120], "uss_mb": round(usage.uss / 1e6, 1), "pss_mb": round(usage.pss / 1e6, 1)}
            for usage in last
        ],
    }


def _hold(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def measure(api_name: str, seconds: float) -> dict[str, object]:
    """Start a node here, make both workers work once, let it settle, watch it."""
    mark = mark_environment()
    with start(api_name) as api:
        hold = api.remote(_hold)
        pids = api.get([hold.remote(0.2) for _ in range(CPUS)])
        await_quiet(mark)
        found = look(mark, seconds)
        found["workers_used"] = len(set(pids))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure an idle node from the command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.idle", description=__doc__.split("\n")[0])
    parser.add_argument("--api", default="zray")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--once", action="store_true", help="print a JSON line and nothing else")
    chosen = parser.parse_args(arguments)
    found = measure(chosen.api, chosen.seconds)
    if chosen.once:
        timing.print_json(found)
        return 0
    each = found.pop("each")
    for key, value in found.items():
        print(f"{key:20s} {value}")
    assert isinstance(each, list)
    for process in each:
        print(f"  USS {process['uss_mb']:8.1f} MB  PSS {process['pss_mb']:8.1f} MB  {process['command']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
