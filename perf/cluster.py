"""Two nodes on this machine: zray's beside Ray's and beside the raw hops, in turn in one run.

Covers what is asked and the report. Does not cover the rows (`remote_rows.py`), how blocks are taken in turn (`compare.py`) or timing.

`python -m perf.cluster [--envs DIR] [--blocks N] [--seconds S] [--rows NAME ...]` prints the table and writes `perf/results/<date>-cluster.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import timing
from .compare import Bench, Settings, default_environments, latency_lines, python_of, take_turns
from .remote_rows import FLOOR, REMOTE_ROWS
from .sides import ROOT, SideError

OURS, THEIRS = "zray cluster", "ray cluster"

ASKED = {
    "remote tasks sync": 5.0,
    "remote tasks async": 15.0,
    "remote actor calls sync": 4.0,
    "remote actor calls async": 8.0,
    "100 MB fetched": 3.0,
}
"""How many times Ray's rate each row shall have."""
P50_US = 500.0
FLOORS = 2.0
"""A remote task, one after another: p50 in microseconds, and how many times the p50 of the raw hops, at most."""


def measure(pythons: dict[str, str], names: list[str], settings: Settings) -> dict[str, Any]:
    """Return the records of all rows."""
    records: list[dict[str, Any]] = []
    bench = Bench({**pythons, "floors": sys.executable}, settings.patience)
    try:
        for name in names:
            row = REMOTE_ROWS[name]
            rivals = [side for side in (OURS, THEIRS) if side in pythons]
            record: dict[str, Any] = {"row": name, "unit": row.unit, "peer": THEIRS if THEIRS in pythons else None}
            try:
                record.update(take_turns(bench, row, rivals, settings))
                ours = record["rates"][OURS]
                record["ratios"] = {
                    side: asdict(timing.ratio(ours, rates)) for side, rates in record["rates"].items() if side != OURS
                }
            except SideError as error:
                record["error"] = str(error)
            records.append(record)
            print(line(record), file=sys.stderr, flush=True)
    finally:
        bench.end()
    return {"facts": timing.machine_facts(), "versions": bench.versions, "rows": records}


def line(record: dict[str, Any]) -> str:
    """Return one row of the table: rates, the ratio and what was asked."""
    if "error" in record:
        return f"{record['row']:<26} failed: {record['error'][-300:]}"
    rates = {side: statistics.median(found) for side, found in record["rates"].items()}
    text = f"{record['row']:<26} " + "  ".join(f"{side} {rate:,.4g}/s" for side, rate in rates.items())
    ratio = record["ratios"].get(THEIRS)
    if ratio is not None:
        met = "met" if ratio["value"] >= ASKED[record["row"]] else "SHORT"
        text += (
            f"  {ratio['value']:.3g}x [{ratio['low']:.3g}, {ratio['high']:.3g}], asked {ASKED[record['row']]:g}x: {met}"
        )
    single = record["latency"]
    if OURS in single and FLOOR.name in single:
        ours, floor = single[OURS]["p50"], single[FLOOR.name]["p50"]
        text += f"  p50 {ours:.0f} us, {ours / floor:.2f} of the raw hops"
        if record["row"] == "remote tasks sync":
            text += f" (asked {P50_US:g} us, {FLOORS:g}): {'met' if ours <= min(P50_US, FLOORS * floor) else 'SHORT'}"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and keep the record."""
    parser = argparse.ArgumentParser(prog="python -m perf.cluster", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="*", choices=list(REMOTE_ROWS), default=list(REMOTE_ROWS))
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--envs", type=Path, default=default_environments(), help="where Ray is installed")
    parser.add_argument("--alone", action="store_true", help="without Ray")
    parser.add_argument("--out", type=Path, help="where the record goes")
    chosen = parser.parse_args(arguments)
    pythons = {OURS: sys.executable}
    if not chosen.alone:
        pythons[THEIRS] = python_of("ray", chosen.envs)
    found = measure(pythons, chosen.rows, Settings(blocks=chosen.blocks, seconds=chosen.seconds))
    print("\n".join([*(line(record) for record in found["rows"]), "", *latency_lines(found["rows"])]))
    date = datetime.date.today().isoformat()
    place = chosen.out or ROOT / "perf" / "results" / f"{date}-cluster.json"
    place.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
