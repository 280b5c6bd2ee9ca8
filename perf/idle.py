"""What a node costs while it does nothing: processes, private memory, processor time. And the accounting for it.

Covers finding every process of a system (also those that went their own way), their memory and processor time, read
from /proc. Does not cover memory of queued tasks (`queued.py`, which uses this accounting).

`python -m perf.idle [--api NAME] [--seconds S]` starts a node with two workers in this process, uses both once, waits
until it is quiet and looks at it for S seconds. The driver (this process) is reported beside the node, not in it.

Memory: USS are pages that nobody else maps; PSS shares the others out among those that map them; what memory files (the
segment of an object store) hold is counted once, by file, mapped or not.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from . import timing
from .sides import CPUS, start

MARK = "ZRAY_PERF_MARK"
"""Environment variable by which processes of a run are known even when they are no descendants any more."""

KIB = 1024


@dataclass(frozen=True, slots=True)
class Usage:
    """One process: its command, private and proportional memory in bytes, processor time in seconds since its start."""

    pid: int
    command: str
    uss: int
    pss: int
    cpu_seconds: float


def mark_environment() -> str:
    """Mark this process and all that it starts from now on; return the mark."""
    mark = uuid.uuid4().hex
    os.environ[MARK] = mark
    return mark


def _parents() -> dict[int, int]:
    found: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] not in "ZX":
                found[int(entry)] = int(fields[1])
    return found


def processes_of(mark: str, root: int) -> list[int]:
    """Return the ids of all living processes that descend from `root` or carry `mark`, and of theirs; without `root`.

    Two ways, because daemons leave the family and libraries that set process titles overwrite their environment.
    """
    parents = _parents()
    needle = f"{MARK}={mark}".encode()
    members = {root}
    for pid in parents:
        try:
            if needle in Path(f"/proc/{pid}/environ").read_bytes():
                members.add(pid)
        except OSError:
            continue
    grown = True
    while grown:
        new = {pid for pid, parent in parents.items() if parent in members} - members
        members |= new
        grown = bool(new)
    return sorted(members - {root})


def usage_of(pid: int) -> Usage | None:
    """Return what a process uses now, or None when it has ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        nanoseconds = 0
        for thread in os.listdir(f"/proc/{pid}/task"):
            nanoseconds += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    sizes: dict[str, int] = {}
    for line in rollup.splitlines()[1:]:
        name, _, rest = line.partition(":")
        sizes[name] = int(rest.split()[0]) * KIB
    uss = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return Usage(pid, command, uss, sizes["Pss"], nanoseconds / 1e9)


def memory_files(pids: list[int]) -> int:
    """Return the bytes that the memory files (memfd, /dev/shm) opened by these processes hold, each file once."""
    held: dict[tuple[int, int], int] = {}
    for pid in pids:
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for descriptor in descriptors:
            path = f"/proc/{pid}/fd/{descriptor}"
            try:
                if os.readlink(path).startswith(("/memfd:", "/dev/shm/")):
                    status = os.stat(path)
                    held[status.st_dev, status.st_ino] = status.st_blocks * 512
            except OSError:
                continue
    return sum(held.values())


def usages(pids: list[int]) -> list[Usage]:
    """Return the usage of those of `pids` that live."""
    return [usage for pid in pids if (usage := usage_of(pid)) is not None]


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
