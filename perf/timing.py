"""The only timer of `perf/`: warm-up, blocks, medians, spread, ratios with intervals, JSON with machine facts.

Covers how long something takes and how sure we are. Does not cover what is measured (`rows.py`, `floors.py`) or who is
compared with whom (`compare.py`). Standard library only, so that it runs in every peer's environment.

A *block* is a stretch of wall time in which one workload is called over and over; its rate is one number. Comparisons
take blocks of both sides in turn and use medians of blocks, so that a slow minute of the machine hits both sides
alike.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import repeat
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of the JSON documents below; grows when the meaning of a field changes."""

PACKAGES = ("zray", "ray", "distributed", "loky", "pyzmq", "msgspec", "cloudpickle", "numpy", "cython")
"""Packages whose versions belong to a result, where they are installed."""

BATCHES_A_BLOCK = 16
"""The clock is read about this often in a block: its cost (some 50 ns) must not show in rows of a microsecond."""


@dataclass(frozen=True, slots=True)
class Block:
    """What one block measured: how long it really took and how many operations ended in it."""

    seconds: float
    operations: float

    @property
    def rate(self) -> float:
        """Return operations per second."""
        return self.operations / self.seconds


@dataclass(frozen=True, slots=True)
class Summary:
    """Blocks in short. `low` and `high` are the quartiles; `spread` is their distance over the median."""

    median: float
    low: float
    high: float
    spread: float
    best: float
    count: int


@dataclass(frozen=True, slots=True)
class Latency:
    """Single calls in short, in microseconds; `histogram` lists (upper edge, count) of buckets that are not empty."""

    p50: float
    p90: float
    p99: float
    most: float
    count: int
    histogram: list[tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """One side's median rate over the other's, with a 95 % interval."""

    value: float
    low: float
    high: float


def run_block(
    call: Callable[[], object], operations: float, seconds: float, *, clock: Callable[[], float] = time.perf_counter
) -> Block:
    """Call `call` again and again for about `seconds` (at least once) and return what that took.

    `operations` is how many operations one call makes. Calls run in batches without a look at the clock, sized so that
    the last batch ends close to the wanted time.
    """
    calls = 0
    batch = 1
    start = clock()
    while True:
        for _ in repeat(None, batch):
            call()
        calls += batch
        elapsed = clock() - start
        if elapsed >= seconds:
            return Block(elapsed, calls * operations)
        if elapsed > 0:
            rate = calls / elapsed
            batch = max(1, min(int(rate * seconds / BATCHES_A_BLOCK), int(rate * (seconds - elapsed)) + 1))


def warm_up(call: Callable[[], object], seconds: float, calls: int = 1) -> None:
    """Call `call` at least `calls` times and for at least `seconds`, and forget the times. Nothing for 0 calls."""
    if calls == 0:
        return
    for _ in range(max(0, calls - 1)):
        call()
    run_block(call, 1.0, seconds)


def measure(
    call: Callable[[], object], operations: float, *, blocks: int = 5, seconds: float = 0.5, warm_calls: int = 1
) -> list[Block]:
    """Warm up for one block, then return `blocks` blocks of about `seconds` each."""
    warm_up(call, seconds, warm_calls)
    return [run_block(call, operations, seconds) for _ in range(blocks)]


def sample(call: Callable[[], object], seconds: float, most: int = 20_000) -> list[int]:
    """Time single calls for about `seconds`, at most `most` of them; nanoseconds each, in order."""
    clock = time.perf_counter_ns
    taken: list[int] = []
    end = clock() + int(seconds * 1e9)
    while len(taken) < most:
        start = clock()
        call()
        now = clock()
        taken.append(now - start)
        if now >= end:
            break
    return taken


def once(call: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which `share` (0..1) of the ascending `ordered` lies, linear between neighbours."""
    if not ordered:
        raise ValueError("no values, so no quantile")
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarize(rates: Iterable[float]) -> Summary:
    """Put the rates of some blocks in short. ValueError when there are none."""
    ordered = sorted(rates)
    median = quantile(ordered, 0.5)
    low, high = quantile(ordered, 0.25), quantile(ordered, 0.75)
    return Summary(median, low, high, (high - low) / median if median else 0.0, ordered[-1], len(ordered))


def bucket_edge(microseconds: float) -> float:
    """Return the upper edge of the histogram bucket of a time: four buckets to each doubling, from 1/16 us on."""
    if microseconds <= 0.0625:
        return 0.0625
    quarters = math.ceil(4 * math.log2(microseconds) - 1e-9)  # a time on an edge belongs below it
    return round(math.pow(2.0, quarters / 4), 4)


def latency(nanoseconds: Iterable[int]) -> Latency:
    """Put single calls in short. ValueError when there are none."""
    ordered = sorted(value / 1000 for value in nanoseconds)
    counts: dict[float, int] = {}
    edge = 0.0
    for value in ordered:
        if value > edge:
            edge = bucket_edge(value)
        counts[edge] = counts.get(edge, 0) + 1
    return Latency(
        round(quantile(ordered, 0.5), 3),
        round(quantile(ordered, 0.9), 3),
        round(quantile(ordered, 0.99), 3),
        round(ordered[-1], 3),
        len(ordered),
        sorted(counts.items()),
    )


def ratio(ours: Sequence[float], theirs: Sequence[float], *, draws: int = 2000, seed: int = 0) -> Ratio:
    """Return median(ours) / median(theirs) with a 95 % interval by the percentile bootstrap (Efron 1979).

    Blocks were taken in turn, so with equally many on both sides a draw takes the same blocks of both (pairs share the
    machine's weather); otherwise each side is drawn for itself. `seed` makes the interval repeatable.
    """
    rng = random.Random(seed)
    paired = len(ours) == len(theirs)
    found: list[float] = []
    for _ in range(draws):
        mine = [rng.randrange(len(ours)) for _ in ours]
        other = mine if paired else [rng.randrange(len(theirs)) for _ in theirs]
        found.append(statistics.median(ours[i] for i in mine) / statistics.median(theirs[i] for i in other))
    found.sort()
    return Ratio(statistics.median(ours) / statistics.median(theirs), quantile(found, 0.025), quantile(found, 0.975))


def installed_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of those of `packages` that this environment has."""
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.lower().startswith(("model name", "hardware", "cpu model")):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    """Return the commit of the source tree and whether it was changed, or nothing outside of a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return described.stdout.strip()


def machine_facts() -> dict[str, Any]:
    """Return what a reader needs to judge a result: processor, memory, kernel, Python, versions, date, load, commit."""
    memory = next((line for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal")), "")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(int(memory.split()[1]) / 2**20, 1) if memory else None,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "versions": installed_versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": [round(value, 2) for value in os.getloadavg()],
        "commit": _commit(),
    }


def document(kind: str, body: dict[str, Any], facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a result document: its kind, the machine facts (taken at the start of a run, if given) and `body`.

    The load at the end is added: with the one at the start it shows whether the machine was quiet.
    """
    return {
        "format": FORMAT,
        "kind": kind,
        "facts": facts or machine_facts(),
        "load_at_end": [round(value, 2) for value in os.getloadavg()],
        **body,
    }


def write_result(found: dict[str, Any], directory: Path) -> Path:
    """Write a document as `<date>-<kind>.json` (numbered if that exists) into `directory` and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = f"{found['facts']['date'][:10]}-{found['kind']}"
    path = directory / f"{stem}.json"
    number = 2
    while path.exists():
        path = directory / f"{stem}-{number}.json"
        number += 1
    path.write_text(json.dumps(found, indent=1, sort_keys=False, default=_plain) + "\n", encoding="utf-8")
    return path


def _plain(value: object) -> object:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)  # type: ignore[call-overload]
    raise TypeError(f"{type(value).__name__} has no place in a result document")


def format_rate(rate: float, unit: str = "") -> str:
    """Return a rate as people read it: three significant digits, k for thousands, M for millions."""
    if rate >= 999_500:
        text = f"{rate / 1e6:.3g}M"
    elif rate >= 9_995:
        text = f"{rate / 1e3:.3g}k"
    elif rate >= 999.5:
        text = f"{rate:.0f}"
    else:
        text = f"{rate:.3g}"
    return f"{text} {unit}".rstrip()


def print_json(found: object) -> None:
    """Print one JSON line on standard output: how one-shot measurements hand their result to `compare.py`."""
    sys.stdout.write(json.dumps(found, default=_plain) + "\n")
    sys.stdout.flush()
