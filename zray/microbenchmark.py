"""`zray microbenchmark`: the table of figures for this machine, zray alone beside the raw floors.

Covers the arguments, the loop over rows and the printing. Does not cover rows, floors or timing: those are the files
of `perf/`, which lie beside the package in a source tree and travel inside it (`zray/_perf/`) in a built one, so that
what a user measures is what the project measures. Comparison with other systems needs the source tree:
`perf/compare.py`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

SLOW = ("50k tasks drained", "put 800 MB", "multi-client put 80 MB")
"""Rows that `--quick` leaves out: they take the most time or memory."""

Cells = tuple[str, ...]
HEAD: Cells = ("row", "rate", "spread", "p50 us", "p99 us", "nearest floor", "its rate", "its p50 us")


def perf_module(name: str) -> ModuleType:
    """Return a module of `perf/`, from inside the package or from the source tree around it.

    ModuleNotFoundError when there is neither. A source tree's root goes on `sys.path`, because workers import the
    functions that they run by the name of their module.
    """
    if importlib.util.find_spec("zray._perf") is not None:
        return importlib.import_module(f"zray._perf.{name}")
    root = Path(__file__).resolve().parent.parent
    if not (root / "perf" / "rows.py").exists():
        raise ModuleNotFoundError(
            f"neither zray/_perf nor a source tree with perf/ at {root}: measure from a source tree"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(f"perf.{name}")


def measure_row(api: Any, row: Any, *, blocks: int, seconds: float) -> dict[str, Any]:
    """Measure one row (or floor): rates of its blocks, their summary, and single calls where a row has them."""
    timing = perf_module("timing")
    with row.open(api) as call:
        found = timing.measure(call, row.operations, blocks=blocks, seconds=seconds, warm_calls=row.warm_calls)
        rates = [block.rate for block in found]
        singles = asdict(timing.latency(timing.sample(call, seconds))) if row.latency else None
    return {
        "row": row.name,
        "unit": row.unit,
        "rates": rates,
        "summary": asdict(timing.summarize(rates)),
        "latency": singles,
    }


def cells_of(found: dict[str, Any], floor: dict[str, Any] | None) -> Cells:
    """Return a line of the table."""
    format_rate = perf_module("timing").format_rate

    def single(record: dict[str, Any] | None, which: str) -> str:
        return f"{record['latency'][which]:.1f}" if record and record["latency"] else ""

    return (
        found["row"],
        format_rate(found["summary"]["median"], found["unit"]),
        f"{found['summary']['spread']:.0%}",
        single(found, "p50"),
        single(found, "p99"),
        floor["row"] if floor else "",
        format_rate(floor["summary"]["median"], floor["unit"]) if floor else "",
        single(floor, "p50"),
    )


class Table:
    """Prints lines as they come: with rich where standard output is a terminal, plainly otherwise."""

    def __init__(self, titles: Cells, widths: tuple[int, ...]) -> None:
        self._widths = widths
        self._console: Any = None
        if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
            from rich.console import Console

            self._console = Console()
        self._line(titles, "bold")

    def add(self, cells: Cells) -> None:
        """Print one line."""
        self._line(cells, "")

    def _line(self, cells: Cells, style: str) -> None:
        first = cells[0].ljust(self._widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], self._widths[1:], strict=True)]
        if self._console is None:
            print("  ".join([first, *rest]).rstrip(), flush=True)
            return
        from rich.text import Text

        text = Text(no_wrap=True, overflow="ellipsis", style=style)
        text.append(first, style=style or "cyan")
        for number, cell in enumerate(rest):
            text.append("  ")
            text.append(cell, style=("green", "dim", "", "", "dim", "dim", "dim")[number])
        self._console.print(text)


WIDTHS = (30, 15, 6, 8, 8, 15, 16, 10)


def run(rows: list[Any], *, blocks: int, seconds: float) -> list[dict[str, Any]]:
    """Measure floors, then rows on a node with two workers; print lines as they come; return all records."""
    floors_by_name = perf_module("floors").FLOORS
    sides = perf_module("sides")
    wanted = dict.fromkeys(row.floors[0] for row in rows if row.floors)
    floors = {name: measure_row(None, floors_by_name[name], blocks=3, seconds=seconds / 2) for name in wanted}
    records: list[dict[str, Any]] = []
    table = Table(HEAD, WIDTHS)
    with sides.start("zray") as api:
        for row in rows:
            found = measure_row(api, row, blocks=blocks, seconds=seconds)
            table.add(cells_of(found, floors[row.floors[0]] if row.floors else None))
            records.append(found)
    return [*floors.values(), *records]


def main(arguments: list[str] | None = None) -> int:
    """Measure zray on this machine and print a table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="zray microbenchmark", description="Measure zray on this machine and print a table beside the raw floors."
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="names of rows or parts of names; all if not given")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each row (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds of a block (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="3 blocks of 0.2 s, without the largest rows")
    parser.add_argument("--list", action="store_true", help="print the names of all rows and stop")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the records, with machine facts, to a file"
    )
    chosen = parser.parse_args(arguments)
    try:
        rows = perf_module("rows").select(chosen.rows)
    except ValueError as error:
        parser.error(str(error))
    timing = perf_module("timing")
    if chosen.list:
        print("\n".join(row.name for row in rows))
        return 0
    if chosen.quick:
        rows = [row for row in rows if chosen.rows or row.name not in SLOW]
    blocks, seconds = (3, 0.2) if chosen.quick else (chosen.blocks, chosen.seconds)
    facts = timing.machine_facts()
    where = f"{facts['cpu']}, {facts['usable_cores']} cores, kernel {facts['kernel']}, {facts['python']}"
    print(f"{where}, load {facts['load']}")
    records = run(rows, blocks=blocks, seconds=seconds)
    if chosen.json is not None:
        found = timing.document("microbenchmark", {"rows": records}, facts)
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
