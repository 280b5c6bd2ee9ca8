"""Who uses how much of this machine: processes of a run, their memory and processor time, and what all others use
meanwhile.

Covers finding every process of a run (also those that went their own way), private, proportional and file memory, and
the disturbance of a stretch of time by processes that are not of the run. Read from /proc; Linux only. Does not cover
what is measured with it (`idle.py`, `queued.py`, `compare.py`).

Memory: USS are pages that nobody else maps; PSS shares the others out among those that map them; what memory files (the
segment of an object store) hold is counted once, by file, mapped or not.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")

MARK = "ZRAY_PERF_MARK"
"""Environment variable by which processes of a run are known even when they are no descendants any more."""

KIB = 1024
FOLDERS = re.compile(r"(?:/[^/\s'\"=:,]+)+/")
"""Folders in command lines: where things lie is of no interest in a result, and nobody else's business."""
KERNEL = 2
"""Process id of the parent of all kernel threads."""
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """One process: its command, memory in bytes, processor time in seconds since its start.

    `own` is the proportional share of everything but shared memory: added to what memory files hold, nothing is counted
    twice.
    """

    pid: int
    command: str
    uss: int
    pss: int
    own: int
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
    own = sizes["Pss"] - sizes.get("Pss_Shmem", 0)
    return Usage(pid, FOLDERS.sub("", command), uss, sizes["Pss"], own, nanoseconds / 1e9)


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


def _cpu_ticks() -> dict[int, tuple[int, int, int]]:
    """Return, by process, (parent, own ticks, own and reaped children's ticks). Kernel threads are left out."""
    found: dict[int, tuple[int, int, int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            parent = int(fields[1])
            if parent != KERNEL and int(entry) != KERNEL:
                own = int(fields[11]) + int(fields[12])
                found[int(entry)] = (parent, own, own + int(fields[13]) + int(fields[14]))
    return found


class Disturbance:
    """Watches what processes that are not of this run use of the machine.

    A process belongs to the run when it descends from this one or carries the mark. What a stranger's child used and
    its parent reaped counts as the stranger's; time stolen by the host counts too. Resolution is the clock tick (10 ms).
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._before = _cpu_ticks()
        self._stolen = _stolen_ticks()
        self._at = time.monotonic()

    def share(self) -> float:
        """Return the share (0..1) of all cores that others used since this object was made."""
        elapsed = time.monotonic() - self._at
        now = _cpu_ticks()
        ours = {os.getpid(), *processes_of(self._mark, os.getpid())}
        ticks = _stolen_ticks() - self._stolen
        for pid, (_, own, whole) in now.items():
            if pid in ours:
                continue
            before = self._before.get(pid)
            ticks += own if before is None else whole - before[2]
        cores = os.cpu_count() or 1
        return max(0.0, ticks / TICKS_A_SECOND / max(elapsed, 1e-9) / cores)


def _stolen_ticks() -> int:
    return int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8])


def undisturbed(measure: Callable[[], Found], mark: str, *, limit: float, tries: int) -> tuple[Found, float]:
    """Call `measure` until others used at most `limit` of the machine meanwhile, at most `tries` times.

    Return the result of the least disturbed try and its disturbance: which result is kept never depends on the result.
    """
    best: tuple[Found, float] | None = None
    for _ in range(max(1, tries)):
        watch = Disturbance(mark)
        found = measure()
        share = watch.share()
        if best is None or share < best[1]:
            best = (found, share)
        if share <= limit:
            break
    assert best is not None
    return best
