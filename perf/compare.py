"""zray beside its peers and beside the floors of this machine, all sides in turn in one run.

Covers who is compared on which rows, in which order, with which statistics, and the report. Does not cover the rows
(`rows.py`), the sides' processes (`sides.py`), the timer (`timing.py`) or the bounds (`targets.py`).

`python -m perf.compare` installs each peer (its newest release) into an environment of its own under `--envs`, then
takes one peer after another: zray, the peer and the floors are up at once, and each row is measured block by block in
turn (zray, peer, floors; peer, zray, floors; ...). A ratio is that of the medians of blocks, with a 95 % bootstrap
interval. Start-up, idle node and a million queued tasks take fresh processes, also in turn. The result is printed and
written to `perf/results/<date>-compare.json`. What a peer uses while it idles is not stopped while zray is measured:
if it matters, it matters against zray.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import startup, timing
from .accounting import mark_environment, undisturbed
from .floors import FLOORS
from .remote_rows import REMOTE_FLOORS
from .rows import Row, select
from .sides import ROOT, Side, SideError, can_run, environment
from .targets import Key, Verdict, describe, judge

PACKAGES = {"ray": ["ray", "numpy"], "distributed": ["distributed", "numpy"], "loky": ["loky"]}
"""What to install for a peer; peers that are not here are in the standard library and run in zray's own environment."""

PEERS = ("ray", "distributed", "multiprocessing.Pool", "ProcessPoolExecutor", "loky")

WHOLE = ("startup", "idle", "queued")
"""Measurements that need processes of their own; names that `--rows` takes beside those of rows."""

SLOW_ROWS = ("50k tasks drained", "20 actors created")
"""Rows left out of `--quick`: a block of them takes Ray several seconds."""

OURS = "zray"


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to measure: blocks of a row, seconds of a block, runs of whole processes, seconds of idling.

    A block during which other processes used more than `limit` of the machine is taken again, up to `tries` times.
    """

    blocks: int = 5
    seconds: float = 0.5
    runs: int = 7
    idle_seconds: float = 10.0
    patience: float = 300.0
    limit: float = 0.05
    tries: int = 3


# ---- environments


def python_of(peer: str, directory: Path, *, refresh: bool = False) -> str:
    """Return the interpreter that has `peer`, installing its newest release first if need be (or to `refresh` it)."""
    if peer not in PACKAGES:
        return sys.executable
    home = directory / peer
    python = home / "bin" / "python"
    done = home / "installed"
    if refresh or not done.exists():
        print(f"installing {peer} into {home}", file=sys.stderr, flush=True)
        if not python.exists():
            venv.create(home, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--upgrade", *PACKAGES[peer]], check=True)
        done.touch()
    return str(python)


def default_environments() -> Path:
    """Return where environments go: the user's cache directory, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zray-perf"


# ---- rows


class Bench:
    """The sides that are up. A side that failed is started afresh for the next row."""

    def __init__(self, pythons: dict[str, str], patience: float) -> None:
        self._pythons = pythons
        self._patience = patience
        self._up: dict[str, Side] = {}
        self.mark = mark_environment()
        self.versions: dict[str, dict[str, str]] = {}

    def side(self, name: str) -> Side:
        """Return a side, starting it if it is not up."""
        if name not in self._up:
            self._up[name] = Side(name, self._pythons[name], patience=self._patience)
            self.versions[name] = self._up[name].versions
        return self._up[name]

    def drop(self, name: str) -> None:
        """End a side, if it is up."""
        side = self._up.pop(name, None)
        if side is not None:
            side.end()

    def end(self) -> None:
        """End all sides."""
        for name in list(self._up):
            self.drop(name)


@contextlib.contextmanager
def opened(bench: Bench, places: list[tuple[str, Row]], seconds: float) -> Iterator[None]:
    """Open and warm up rows on their sides; close them afterwards. A side that fails at it is dropped."""
    done: list[tuple[str, Row]] = []
    try:
        for name, row in places:
            bench.side(name).ask("open", row.name, seconds=seconds, warm_calls=row.warm_calls)
            done.append((name, row))
        yield
    except SideError:
        for name in {name for name, _ in places}:
            bench.drop(name)
        done.clear()
        raise
    finally:
        for name, row in done:
            try:
                bench.side(name).ask("close", row.name)
            except SideError:
                bench.drop(name)


def take_turns(bench: Bench, row: Row, rivals: list[str], settings: Settings) -> dict[str, Any]:
    """Measure `row` on `rivals` in turn, its floors after each round, and return rates and single calls of all.

    "disturbed" is how much of the machine other processes used: the median over blocks, and the most.
    SideError when a side fails; the others' blocks are then worth nothing and are dropped too.
    """
    floors = [{**FLOORS, **REMOTE_FLOORS}[name] for name in row.floors]
    places = [(name, row) for name in rivals] + [("floors", floor) for floor in floors]
    rates: dict[str, list[float]] = {name: [] for name in [*rivals, *row.floors]}
    calls: dict[str, list[int]] = {name: [] for name in rates}
    disturbed: list[float] = []

    def take(side: Side, name: str, seconds: float, single: bool) -> tuple[timing.Block, list[int]]:
        return side.block(name, seconds), side.sample(name, seconds / 2) if single else []

    with opened(bench, places, settings.seconds):
        for turn in range(settings.blocks):
            order = [(name, name, row) for name in (rivals if turn % 2 == 0 else rivals[::-1])]
            order += [("floors", floor.name, floor) for floor in floors]
            for side_name, key, measured in order:
                share = 0.4 if side_name == "floors" else 1.0
                side = bench.side(side_name)
                (block, singles), share_of_others = undisturbed(
                    functools.partial(
                        take, side, measured.name, settings.seconds * share, row.latency and measured.latency
                    ),
                    bench.mark,
                    limit=settings.limit,
                    tries=settings.tries,
                )
                disturbed.append(share_of_others)
                rates[key].append(block.rate)
                calls[key] += singles
    return {
        "rates": rates,
        "latency": {name: asdict(timing.latency(taken)) for name, taken in calls.items() if taken},
        "disturbed": {"median": round(statistics.median(disturbed), 3), "most": round(max(disturbed), 3)},
    }


def compare_row(bench: Bench, row: Row, peer: str | None, settings: Settings) -> dict[str, Any]:
    """Return the record of one row against one peer (or against floors only, for None)."""
    rivals = [OURS] if peer is None else [OURS, peer]
    record: dict[str, Any] = {"row": row.name, "unit": row.unit, "peer": peer}
    try:
        record.update(take_turns(bench, row, rivals, settings))
    except SideError as error:
        return {**record, "error": str(error)}
    ours = record["rates"][OURS]
    record["ratios"] = {
        name: asdict(timing.ratio(ours, rates)) for name, rates in record["rates"].items() if name != OURS
    }
    return record


# ---- whole processes


def run_module(module: str, python: str, *arguments: str, patience: float) -> dict[str, Any]:
    """Run one of this package's one-shot measurements in a fresh process and return its JSON line."""
    done = subprocess.run(
        [python, "-m", f"perf.{module}", "--once", *arguments],
        capture_output=True,
        text=True,
        timeout=patience,
        check=False,
        cwd=ROOT,
        env=environment(),
    )
    if done.returncode:
        raise SideError(f"perf.{module} {' '.join(arguments)} ended ({done.returncode}): {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def whole_runs(
    what: str, pythons: dict[str, str], settings: Settings, runs: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure start-up, an idle node or queued tasks `runs` times on each side in turn; records by side."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    errors: dict[str, str] = {}
    for _ in range(runs):
        for name, python in pythons.items():
            if name in errors:
                continue
            try:
                if what == "startup":
                    record: dict[str, Any] = startup.run_once(name, python)
                elif what == "idle":
                    seconds = str(settings.idle_seconds)
                    record = run_module("idle", python, "--api", name, "--seconds", seconds, patience=settings.patience)
                else:
                    record = run_module("queued", python, "--api", name, patience=settings.patience)
            except (SideError, RuntimeError, subprocess.TimeoutExpired) as error:
                errors[name] = str(error)
                say(f"{what}, {name}: failed")
                continue
            found[name].append(record)
            say(f"{what}, {name}: " + ", ".join(f"{key} {value}" for key, value in record.items() if key != "each"))
    return {"runs": found, "errors": errors}


# ---- figures


def figures_of(records: list[dict[str, Any]], whole: dict[str, Any]) -> dict[Key, float]:
    """Return every figure that a target may speak of; where several records hold the same one, the first wins."""
    figures: dict[Key, float] = {}
    medians: dict[str, float] = {}
    for record in records:
        if "error" in record:
            continue
        name = record["row"]
        medians.setdefault(name, statistics.median(record["rates"][OURS]))
        for other, found in record["ratios"].items():
            figures.setdefault((name, f"x {other}"), found["value"])
        if OURS in record["latency"]:
            figures.setdefault((name, "p50 us"), record["latency"][OURS]["p50"])
            figures.setdefault((name, "p99 us"), record["latency"][OURS]["p99"])
    for name, rate in medians.items():
        for other, base in medians.items():
            if name != other:
                figures.setdefault((name, f"x {other}"), rate / base)
    fields = {
        "startup": [((phase, "s"), phase) for phase in startup.PHASES],
        "idle": [
            (("idle node", "processes"), "processes"),
            (("idle node", "USS MB"), "uss_mb"),
            (("idle node", "CPU %"), "cpu_percent"),
        ],
        "queued": [(("1M tasks queued", "s"), "seconds"), (("1M tasks queued", "bytes a task"), "bytes_a_task")],
    }
    for what, keys in fields.items():
        runs = whole.get(what, {}).get("runs", {}).get(OURS, [])
        for key, field in keys:
            if runs:
                figures[key] = statistics.median(run[field] for run in runs)
    return figures


# ---- the report


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _times(found: dict[str, float]) -> str:
    return f"{found['value']:.3g} [{found['low']:.3g}, {found['high']:.3g}]"


def _single(latency: dict[str, Any] | None) -> str:
    return f"{latency['p50']:.1f} / {latency['p99']:.1f}" if latency else ""


def rate_lines(records: list[dict[str, Any]], verdicts: list[Verdict]) -> list[str]:
    """Return the table of rates: ours, the peer's, the ratio with its interval, the bound and whether it is met."""
    bounds = {(verdict.target.name, verdict.target.figure): verdict for verdict in verdicts}
    table = [["row", "zray", "peer", "their rate", "ratio [95 %]", "asked", "verdict", "floor", "its rate", "others"]]
    for record in records:
        peer = record["peer"] or ""
        verdict = bounds.get((record["row"], f"x {peer}"))
        asked = verdict.target.asked if verdict else ""
        if "error" in record:
            table.append([record["row"], "failed", peer, "", "", asked, "", "", "", ""])
            continue
        rates = {name: statistics.median(found) for name, found in record["rates"].items()}
        floor = next((name for name in rates if name not in (OURS, peer)), "")
        table.append(
            [
                record["row"],
                timing.format_rate(rates[OURS], record["unit"]),
                peer,
                timing.format_rate(rates[peer], record["unit"]) if peer else "",
                _times(record["ratios"][peer]) if peer else "",
                asked,
                describe(verdict) if verdict else "",
                floor,
                timing.format_rate(rates[floor], FLOORS[floor].unit) if floor else "",
                f"{record['disturbed']['median']:.0%}",
            ]
        )
    return _columns(table)


def latency_lines(records: list[dict[str, Any]]) -> list[str]:
    """Return the table of single calls: p50 / p99 of ours, the peer's, and each floor that has single calls, in us."""
    table = [["p50 / p99 in us", "zray", "peer", "theirs", "p50 ratio", "floors of the same run"]]
    for record in records:
        found = record.get("latency")
        if not found:
            continue
        peer = record["peer"] or ""
        floors = "; ".join(f"{name} {_single(one)}" for name, one in found.items() if name not in (OURS, peer))
        ours, theirs = found.get(OURS), found.get(peer)
        times = f"{theirs['p50'] / ours['p50']:.3g}" if ours and theirs else ""
        table.append([record["row"], _single(ours), peer, _single(theirs), times, floors])
    return _columns(table) if len(table) > 1 else []


def bound_lines(verdicts: list[Verdict]) -> list[str]:
    """Return the table of all bounds that were measured."""
    table = [["bound on", "figure", "asked", "found", "verdict"]]
    for verdict in verdicts:
        if verdict.found is not None:
            target = verdict.target
            table.append([target.name, target.figure, target.asked, f"{verdict.found:.4g}", describe(verdict)])
    return _columns(table) if len(table) > 1 else []


def whole_lines(whole: dict[str, Any]) -> list[str]:
    """Return start-up, idle node and queued tasks: medians of each side."""
    table = [["measurement", "side", "runs", "medians"]]
    for what, found in whole.items():
        for name, runs in found["runs"].items():
            if not runs:
                table.append([what, name, "0", "failed"])
                continue
            numbers = {key: value for key, value in runs[0].items() if isinstance(value, int | float)}
            text = ", ".join(f"{key} {statistics.median(run[key] for run in runs):.4g}" for key in numbers)
            table.append([what, name, str(len(runs)), text])
    return _columns(table) if len(table) > 1 else []


def report(found: dict[str, Any], verdicts: list[Verdict]) -> str:
    """Return the whole report as text."""
    facts = found["facts"]
    versions = "; ".join(
        f"{side}: {versions.get(side, facts['python'])}" for side, versions in found["versions"].items() if versions
    )
    lines = [
        f"{facts['cpu']}, {facts['usable_cores']} cores, kernel {facts['kernel']}, {facts['python']}, {facts['date']}",
        f"load {facts['load']} at the start, {found['load_at_end']} at the end; {versions}",
        "",
        *rate_lines(found["rows"], verdicts),
        "others: share of the machine that processes outside of this run used, median over blocks",
    ]
    for part in (latency_lines(found["rows"]), whole_lines(found["whole"]), bound_lines(verdicts)):
        if part:
            lines += ["", *part]
    short = [verdict for verdict in verdicts if verdict.met is False]
    measured = [verdict for verdict in verdicts if verdict.met is not None]
    lines += ["", f"{len(measured) - len(short)} of {len(measured)} measured bounds are met ({len(verdicts)} in all)"]
    for record in found["rows"]:
        if "error" in record:
            lines += ["", f"{record['row']} with {record['peer']} failed:", record["error"][-1500:]]
    return "\n".join(lines)


# ---- the command


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.compare", description=__doc__.split("\n")[0])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS, help="none: only floors beside zray")
    parser.add_argument(
        "--rows", nargs="*", help=f"rows, parts of their names, or {', '.join(WHOLE)}; all if not given"
    )
    parser.add_argument("--blocks", type=int, help="blocks of each row and side (5)")
    parser.add_argument("--seconds", type=float, help="seconds of a block (0.5)")
    parser.add_argument("--tries", type=int, help="how often a block that others disturbed is taken, at most (3)")
    parser.add_argument("--quick", action="store_true", help="3 short blocks, 3 runs, without the slowest rows")
    parser.add_argument("--envs", type=Path, default=default_environments(), help="where peers are installed")
    parser.add_argument("--refresh", action="store_true", help="install the newest releases of the peers again")
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results", help="directory of the result")
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args(arguments)


def settings_of(chosen: argparse.Namespace) -> Settings:
    """Return what the command line means."""
    base = Settings(blocks=3, seconds=0.2, runs=3, idle_seconds=5.0) if chosen.quick else Settings()
    return Settings(
        blocks=chosen.blocks or base.blocks,
        seconds=chosen.seconds or base.seconds,
        runs=base.runs,
        idle_seconds=base.idle_seconds,
        tries=chosen.tries or base.tries,
    )


def chosen_rows(chosen: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Return the rows and the whole-process measurements that were asked for."""
    if not chosen.rows:
        rows = [row for row in select(None) if not (chosen.quick and row.name in SLOW_ROWS)]
        return rows, [what for what in WHOLE if not (chosen.quick and what == "queued")]
    patterns = [pattern for pattern in chosen.rows if pattern not in WHOLE]
    return select(patterns) if patterns else [], [what for what in WHOLE if what in chosen.rows]


def measure_rows(
    rows: list[Row],
    peers: list[str],
    pythons: dict[str, str],
    settings: Settings,
    versions: dict[str, dict[str, str]],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measure all rows against one peer after another (or against floors only, when there is none)."""
    records: list[dict[str, Any]] = []
    wanted: list[str | None] = [*peers] or [None]
    for peer in wanted:
        bench = Bench(pythons, settings.patience)
        try:
            for row in rows:
                if peer is not None and not can_run(peer, row):
                    continue
                record = compare_row(bench, row, peer, settings)
                records.append(record)
                say(
                    "\n".join(rate_lines([record], [])[2:])
                    if "error" not in record
                    else f"{row.name}: {record['error']}"
                )
        finally:
            bench.end()
            versions.update(bench.versions)
    return records


def main(arguments: list[str] | None = None) -> int:
    """Compare from the command line. Returns 0 also when bounds are short: this measures, it does not gate."""
    chosen = parse(arguments)
    settings = settings_of(chosen)
    rows, wholes = chosen_rows(chosen)
    facts = timing.machine_facts()
    pythons = {peer: python_of(peer, chosen.envs, refresh=chosen.refresh) for peer in chosen.peers}
    pythons |= {OURS: sys.executable, "floors": sys.executable}

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    versions: dict[str, dict[str, str]] = {}
    records = measure_rows(rows, chosen.peers, pythons, settings, versions, say) if rows else []
    whole: dict[str, Any] = {}
    for what in wholes:
        # A million queued tasks take Ray a quarter of an hour and 6 GB: its 50,000 are a row.
        with_ray = "ray" in chosen.peers and what != "queued"
        sides = {name: pythons[name] for name in ([OURS, "ray"] if with_ray else [OURS])}
        runs = settings.runs if what == "startup" else min(settings.runs, 5)
        whole[what] = whole_runs(what, sides, settings, runs, say)
    verdicts = judge(figures_of(records, whole))
    body = {
        "settings": asdict(settings),
        "versions": versions,
        "rows": records,
        "whole": whole,
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
    found = timing.document("compare", body, facts)
    print(report(found, verdicts))
    if not chosen.no_write:
        print(f"\nwrote {timing.write_result(found, chosen.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
