"""How long single calls take, one at a time: p50, p99 and the whole distribution, beside the raw floors.

Covers the rows of `rows.py` that are one operation a call (synchronous task and actor call, small get and put). Does
not cover rates of many calls in flight (`micro.py`, `compare.py`).

`python -m perf.latency [--api NAME] [--rows ROW ...] [--seconds S]` prints a histogram of each, on a scale of four
buckets to a doubling.
"""

from __future__ import annotations

import argparse
import sys

from . import timing
from .floors import FLOORS
from .rows import Row, select
from .sides import can_run, start

BAR = 40
"""Columns of the fullest bucket."""


def draw(found: timing.Latency, width: int = BAR) -> list[str]:
    """Return a histogram as lines: upper edge in microseconds, count, bar. The thin tail above p99 is one line."""
    shown = [(edge, count) for edge, count in found.histogram if edge <= timing.bucket_edge(found.p99)]
    beyond = found.count - sum(count for _, count in shown)
    most = max(count for _, count in found.histogram)
    lines = [f"  <= {edge:10.1f} us {count:8d} {'#' * round(width * count / most)}" for edge, count in shown]
    if beyond:
        lines.append(f"   > {shown[-1][0]:10.1f} us {beyond:8d} (most: {found.most:.1f} us)")
    return lines


def measure(api: object, row: Row, seconds: float) -> timing.Latency:
    """Warm a row up for half of `seconds`, then time single calls of it for `seconds`."""
    with row.open(api) as call:
        timing.warm_up(call, seconds / 2, row.warm_calls)
        return timing.latency(timing.sample(call, seconds, most=200_000))


def main(arguments: list[str] | None = None) -> int:
    """Measure latencies from the command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.latency", description=__doc__.split("\n")[0])
    parser.add_argument("--api", default="zray")
    parser.add_argument("--rows", nargs="*", help="names of rows or parts of names; all latency rows if not given")
    parser.add_argument("--seconds", type=float, default=2.0)
    chosen = parser.parse_args(arguments)
    rows = [row for row in select(chosen.rows) if row.latency and can_run(chosen.api, row)]
    floors = dict.fromkeys(name for row in rows for name in row.floors if FLOORS[name].latency)
    for name in floors:
        try:
            _print(f"floor: {name}", measure(None, FLOORS[name], chosen.seconds / 2))
        except ModuleNotFoundError as error:
            print(f"floor: {name} is not measured in this environment: {error}")
    with start(chosen.api) as api:
        for row in rows:
            _print(f"{chosen.api}: {row.name}", measure(api, row, chosen.seconds))
    return 0


def _print(title: str, found: timing.Latency) -> None:
    print(f"{title}   p50 {found.p50:.1f} us   p90 {found.p90:.1f} us   p99 {found.p99:.1f} us   ({found.count} calls)")
    print("\n".join(draw(found)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
