"""How many tasks a second clusters of 1 to 10,000 nodes could run: measured costs, the very brokers in virtual time, and plain arithmetic.

Covers putting the parts together: costs of this machine (`scale_costs`), what the real brokers do with them (`scale_model`), the figure and the
table. `docs/scale.md` says what of it is measured and what is modelled, and what the numbers mean. Does not cover more than empty tasks: they are
the hardest, since nothing but the system costs anything.

    python -m perf.scale [--quick] [--write]

`--write` keeps everything as `perf/results/<date>-scale.json` and `.png`. Runs from a source tree (the simulator of clusters is in `tests/`).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from pathlib import Path
from typing import Any

from zray import _store  # noqa: F401 - a clear error where nothing is built
from zray.broker import scheduler

from . import scale_costs, timing

NODES = (1, 2, 5, 10, 20, 50, 100, 1000, 10_000)
DRIVEN = (1, 2, 5, 10, 20, 50, 100)
"""Sizes for which every broker is run."""
TALK_NODES, TALK_RATE = 100, 1.8e6
"""What the talk says of Ray: tasks a second at so many nodes (of 32 and more cores each)."""
CORES = 2.0
"""Of each node, as of this machine."""
LOCAL_FRAME_S = 10e-6
"""Processor time that a frame between processes of one node costs its broker, for each side; see perf/profile.md."""
MANY_IN_FLIGHT = 20_000


def membership_costs(out: Any, into: Any, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """For each size: what membership costs the head and an ordinary node, as it was and as it is."""
    from . import scale_model

    rows = []
    for nodes in sizes:
        row: dict[str, Any] = {"nodes": nodes}
        head, kept = scale_model.head_load(nodes)
        node = scale_model.node_load(nodes, kept, head.beat)
        row["now"] = _costs(head, node, out, into)
        if nodes <= 1000:
            with scale_model.without_windows():
                head, kept = scale_model.head_load(nodes, 2)
                node = scale_model.node_load(nodes, kept, head.beat)
            row["before"] = _costs(head, node, out, into)
        gc.collect()
        rows.append(row)
        print(f"# membership of {nodes} nodes: {row}", flush=True)
    return rows


def _costs(head: Any, node: Any, out: Any, into: Any) -> dict[str, float]:
    return {
        "head_cores": head.busy(out, into),
        "node_cores": node.busy(out, into),
        "head_bytes_out_per_second": head.bytes_out,
        "head_frames_per_second": head.frames_out + head.frames_in,
        "beat_seconds": head.beat,
    }


def extrapolated(rows: list[dict[str, Any]], nodes: int) -> dict[str, float]:
    """What it was before, for a size at which it cannot be run: everything grows with the square of the nodes for the head, and with their
    number for a node."""
    last = next(row for row in reversed(rows) if "before" in row)
    factor = nodes / last["nodes"]
    before = last["before"]
    return {
        "head_cores": before["head_cores"] * factor**2,
        "node_cores": before["node_cores"] * factor,
        "head_bytes_out_per_second": before["head_bytes_out_per_second"] * factor**2,
        "head_frames_per_second": before["head_frames_per_second"] * factor,
        "beat_seconds": before["beat_seconds"],
    }


def local_submission(task: Any, rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Tasks a second when every node has a driver of its own and tasks stay where they are born. What membership costs is taken off the cores of each
    node; a head that would need more than one core for it cannot keep the cluster together."""
    found = []
    for row in rows:
        cost = row.get(key) or extrapolated(rows, row["nodes"])
        nodes = row["nodes"]
        node_rate = task.capacity(max(0.0, CORES - cost["node_cores"]))
        head_rate = task.capacity(max(0.0, CORES - cost["head_cores"]))
        works = cost["head_cores"] < 1.0 and cost["node_cores"] < 1.0
        rate = node_rate * (nodes - 1) + head_rate if works else 0.0
        found.append({"nodes": nodes, "rate": rate, "works": works, "per_node": node_rate, **cost})
    return found


def one_driver(times: Any, quick: bool) -> list[dict[str, Any]]:
    """Tasks a second of a single driver, every broker run."""
    from . import scale_model

    found = []
    for nodes in DRIVEN[:4] if quick else DRIVEN:
        runs = []
        for _ in range(1 if quick else 3):  # the fastest is the one that strangers disturbed least
            gc.collect()
            runs.append(scale_model.one_driver(nodes, times, 10_000 if quick else 40_000, MANY_IN_FLIGHT))
        run = max(runs, key=lambda one: one.rate)
        found.append({**dataclasses.asdict(run), "rate": run.rate, "saturated": saturated(run)})
        print(f"# one driver, {nodes} nodes: {run.rate:.0f} tasks a second, {found[-1]['saturated']}", flush=True)
    return found


def saturated(run: Any) -> str:
    """Which component is busiest, and how busy."""
    shares = {"driver": run.driver, "its broker": min(1.0, run.broker), "another broker": min(1.0, run.others)}
    name = max(shares, key=lambda one: shares[one])
    return f"{name} {shares[name]:.0%} busy" if shares[name] > 0.5 else "nothing: tasks wait for workers and links"


def store_limits(row_seconds: float) -> dict[str, float]:
    """Writes a second that the control store takes: one process, and split over processes, a shard and a replica chain each."""
    one = 1 / row_seconds
    return {"one_process": one, "4_shards_in_4_processes": 4 * one, "16_shards_in_16_processes": 16 * one}


def draw(found: dict[str, Any], path: Path) -> None:
    """The figure: tasks a second against nodes, and what the head is busy with."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    local, driven = found["local_submission"], found["one_driver"]
    works = [row for row in local if row["works"]]
    left.loglog(
        [row["nodes"] for row in works], [row["rate"] for row in works], "o-", label="a driver on every node (modelled)"
    )
    left.loglog(
        [row["nodes"] for row in driven], [row["rate"] for row in driven], "s-", label="one driver (brokers run)"
    )
    left.loglog([TALK_NODES], [TALK_RATE], "k*", markersize=12, label="Ray's talk: 1.8 million at 100 nodes")
    left.set_xlabel("nodes")
    left.set_ylabel("empty tasks a second")
    left.legend(fontsize=8)
    for key, style, name in (("before", "s--", "all loads to all"), ("now", "o-", "windows, rarer beats")):
        rows = [(row["nodes"], row[key]["head_cores"]) for row in found["membership"] if key in row]
        right.loglog(*zip(*rows), style, label=f"head, {name}")
        rows = [(row["nodes"], row[key]["node_cores"]) for row in found["membership"] if key in row]
        right.loglog(*zip(*rows), style, alpha=0.5, label=f"a node, {name}")
    right.axhline(1.0, color="k", linewidth=0.5)
    right.set_xlabel("nodes")
    right.set_ylabel("cores busy with membership")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(True, which="major", alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, model, print; keep with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes")
    parser.add_argument("--write", action="store_true", help="keep the result in perf/results/")
    chosen = parser.parse_args()
    facts = timing.machine_facts()
    from . import scale_model

    gc.disable()  # as brokers do; else what else is in this process would be collected on their time

    out, into = scale_costs.link_costs()
    task = min((scale_costs.task_cost() for _ in range(1 if chosen.quick else 5)), key=lambda cost: cost.processor)
    row = min(scale_costs.row_cost() for _ in range(3))
    print(f"# a frame out {out}, in {into}; a task {task}; a row {row * 1e6:.1f} us", flush=True)
    rows = membership_costs(out, into, NODES[:-1] if chosen.quick else NODES)
    times = scale_model.Times(task.driver, task.workers, LOCAL_FRAME_S, out, into)
    body: dict[str, Any] = {
        "compiled": not scheduler.__file__.endswith(".py"),
        "costs": {"frame_out": out, "frame_in": into, "task": task, "row_seconds": row},
        "membership": rows,
        "local_submission": local_submission(task, rows, "now"),
        "local_submission_before": local_submission(task, rows, "before"),
        "one_driver": one_driver(times, chosen.quick),
        "store_writes_per_second": store_limits(row),
        "talk": {"nodes": TALK_NODES, "rate": TALK_RATE},
    }
    for name in ("local_submission_before", "local_submission", "one_driver"):
        for line in body[name]:
            print(f"{name:24} {line['nodes']:6} nodes {timing.format_rate(line['rate']):>8} tasks/s")
    if chosen.write:
        path = timing.write_result(timing.document("scale", body, facts), Path(__file__).parent / "results")
        draw(body, path.with_suffix(".png"))
        print(f"written to {path.name}")


if __name__ == "__main__":
    main()
