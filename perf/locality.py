"""Tasks with large inputs on two nodes: where the policy puts them, beside the best and the worst that could be done.

Covers the experiment of Ray's paper (Moritz et al., OSDI 2018, Fig. 8a) at the size of this machine. Each task adds up an array of its own; half of the
arrays lie on each of two nodes with one CPU each. Three ways, in turn, with fresh arrays each time: *by the policy* (no word about nodes), *at the
input* (node affinity to where its array lies: the bound) and *anywhere* (node affinity to a node drawn at random: what a scheduler does that does not
know where inputs are). Measured is the time from the first submission to the last result.

    python -m perf.locality [--mb 10 30 100] [--rounds 5] [--total-mb 600]

writes `perf/results/<date>-locality.json` and `.png` (matplotlib).
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from . import timing
from .sides import ROOT

WAYS = ("by the policy", "at the input", "anywhere")
ASKED = 1.2
"""How many times the time at the input the policy may take."""


def round_of(zray: Any, affinity: Any, nodes: list[str], size: int, count: int, way: str, rng: random.Random) -> float:
    """Make `count` arrays of `size` bytes, half on each node, run a task on each, and return the seconds that the tasks took."""

    @zray.remote(num_cpus=1)
    def make(number: int) -> Any:
        return np.full(size // 8, float(number))

    @zray.remote(num_cpus=1)
    def total(array: Any) -> float:
        return float(array.sum())

    places = [nodes[number % len(nodes)] for number in range(count)]
    arrays = [
        make.options(scheduling_strategy=affinity(place, False)).remote(number) for number, place in enumerate(places)
    ]
    zray.wait(arrays, num_returns=count, fetch_local=False)
    begun = time.perf_counter()
    results = []
    for array, place in zip(arrays, places, strict=True):
        if way == "by the policy":
            results.append(total.remote(array))
        else:
            where = place if way == "at the input" else rng.choice(nodes)
            results.append(total.options(scheduling_strategy=affinity(where, False)).remote(array))
    found = zray.get(results)
    seconds = time.perf_counter() - begun
    assert found == [number * (size // 8) for number in range(count)], "wrong sums"
    return seconds


def measure(sizes: list[int], rounds: int, total: int) -> dict[str, Any]:
    """Return the seconds of each round, by size and way."""
    import zray
    from zray.cluster_utils import Cluster
    from zray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    rng = random.Random(7)
    found: dict[str, dict[str, list[float]]] = {}
    # The driver's own node has no CPU: neither node of the experiment is nearer to it.
    with Cluster(initialize_head=True, head_node_args={"num_cpus": 0}) as cluster:
        store = 4 * total
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=store).node_id for _ in range(2)]
        cluster.connect()
        cluster.wait_for_nodes()
        for size in sizes:
            count = max(8, total // size)
            taken: dict[str, list[float]] = {way: [] for way in WAYS}
            for turn in range(rounds + 1):
                for way in WAYS if turn % 2 else WAYS[::-1]:
                    seconds = round_of(zray, NodeAffinitySchedulingStrategy, nodes, size, count, way, rng)
                    if turn:  # the first warms up
                        taken[way].append(count / seconds)
            found[f"{size // 1_000_000} MB"] = taken
            print(line(f"{size // 1_000_000} MB", taken), flush=True)
        zray.shutdown()
    return {"facts": timing.machine_facts(), "tasks_per_second": found}


def line(size: str, taken: dict[str, list[float]]) -> str:
    """Return a size's figures as text."""
    rates = {way: statistics.median(found) for way, found in taken.items()}
    slower = rates["at the input"] / rates["by the policy"]
    text = ", ".join(f"{way} {rate:.4g}" for way, rate in rates.items())
    met = "met" if slower <= ASKED else "SHORT"
    gain = rates["by the policy"] / rates["anywhere"]
    return (
        f"{size:>7}: tasks/s {text}; {slower:.2f} of the time at the input (asked {ASKED}: {met}), {gain:.1f}x anywhere"
    )


def draw(found: dict[str, Any], path: Path) -> None:
    """Plot rates against sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    sizes = list(found["tasks_per_second"])
    for way, mark in zip(WAYS, ("o-", "s--", "^-"), strict=True):
        rates = [statistics.median(found["tasks_per_second"][size][way]) for size in sizes]
        axes.plot([float(size.split()[0]) for size in sizes], rates, mark, label=way)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("input of a task (MB)")
    axes.set_ylabel("tasks per second, two nodes of one CPU")
    axes.set_title("Where tasks with large inputs run")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, and keep the record."""
    parser = argparse.ArgumentParser(prog="python -m perf.locality", description=__doc__.split("\n")[0])
    parser.add_argument("--mb", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--total-mb", type=int, default=600, help="bytes of all arrays of a round")
    parser.add_argument("--out", type=Path, help="where the record goes (.json; the picture beside it)")
    chosen = parser.parse_args()
    found = measure([size * 1_000_000 for size in chosen.mb], chosen.rounds, chosen.total_mb * 1_000_000)
    place = chosen.out or ROOT / "perf" / "results" / f"{datetime.date.today().isoformat()}-locality.json"
    place.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, place.with_suffix(".png"))


if __name__ == "__main__":
    main()
