"""Chains of tasks while nodes die and come: throughput over time, what ran again, and what the death of a node costs.

Covers two experiments on node processes of this machine (tasks sleep, so that two cores are enough; places for them are a resource of each node):

    elastic   chains of 100 ms tasks while nodes go 5 -> 3 -> 1 -> 5, by `kill -9` and by starting new ones. Tasks that end for the first time
              and tasks that ran again are counted apart, in time slots; every chain's last value is compared, byte for byte, with what one
              process computes.
    one lost  the same chains on four nodes, of which three would suffice, for 10 s; in every second run one node is killed in the middle.
              Reported is by how much longer the job takes: with small values, which are safe at their owner when a task has ended, and with
              large ones, which lie where they were made. The scheduler sends a task to its large input, so a chain of these lives on one node,
              and what dies with it is all that was done so far, but for second copies (docs/durability.md): what was made since the last
              one has to run again. With ZRAY_REBUILD_S=0 in the environment there are none.

Does not cover what recovery costs when nothing is lost (the rows of `cluster.py` include it). Large values are larger than what travels with the
news of an end, so each lies only where it was made and where it was used. The program holds the last `WINDOW` values of each chain; of what lies
before them only the lineage is kept.

`python -m perf.fault_tolerance` writes `<date>-fault-tolerance.json` and `.png` into `perf/results/`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import zray
from zray.cluster_utils import Cluster

from . import timing

if TYPE_CHECKING:
    from collections.abc import Iterable

RESULTS = Path(__file__).parent / "results"
LINK_S = 0.1
"""Seconds that a task sleeps."""
LARGE = 40_000
"""int64 in a large value: 320 kB."""
SMALL = 1_000
WINDOW = 3
SLOT_S = 0.5
LANES = 4
"""Tasks that a node runs at a time."""


def link(value: Any, chain: int, step: int, numbers: int, log: str) -> Any:
    """One task of a chain: sleep, say so, compute."""
    time.sleep(LINK_S)
    with open(log, "ab", buffering=0) as file:
        file.write(b"%d %d %.4f\n" % (chain, step, time.time()))
    return compute(value, chain, step, numbers)


def compute(value: Any, chain: int, step: int, numbers: int) -> Any:
    """The next value of a chain."""
    if value is None:
        value = np.arange(numbers, dtype=np.int64)
    return value * 6364136223846793005 + (chain << 32 | step)


def digest_of(chain: int, length: int, numbers: int) -> str:
    """What the last value of a chain must be, computed in this process."""
    value = None
    for step in range(length):
        value = compute(value, chain, step, numbers)
    return hashlib.sha256(value.tobytes()).hexdigest()


class Chain:
    """A chain under way: all its tasks are submitted, its last values are held."""

    def __init__(self, number: int, length: int, numbers: int, log: str) -> None:
        self.number = number
        self.numbers = numbers
        self.length = length
        task = zray.remote(num_cpus=0, resources={"lane": 1}, max_retries=-1)(link)
        ref = None
        self.refs: list[Any] = []
        for step in range(length):
            ref = task.remote(ref, number, step, numbers, log)
            self.refs.append(ref)

    def look(self) -> bool:
        """Let go of values that the window has passed; True when the last one is there."""
        done, _ = zray.wait(self.refs, num_returns=len(self.refs), timeout=0, fetch_local=False)
        if len(self.refs) - len(done) <= 0:
            return True
        passed = len(done) - WINDOW
        if passed > 0:
            del self.refs[:passed]
        return False

    def is_right(self) -> bool:
        """Fetch the last value and compare it."""
        value = zray.get(self.refs[-1], timeout=120)
        return hashlib.sha256(value.tobytes()).hexdigest() == digest_of(self.number, self.length, self.numbers)


def ends(log: str) -> list[tuple[float, bool]]:
    """(time, whether the task had ended before) of each end of a task, in order."""
    seen: Counter[tuple[int, int]] = Counter()
    found = []
    lines = [line.split() for line in Path(log).read_text().splitlines()]
    for chain, step, at in sorted(lines, key=lambda fields: float(fields[2])):
        key = int(chain), int(step)
        found.append((float(at), seen[key] > 0))
        seen[key] += 1
    return found


def add_node(cluster: Cluster) -> None:
    """Start a node with lanes."""
    cluster.add_node(num_cpus=0, resources={"lane": LANES})


def kill_node(cluster: Cluster) -> None:
    """Kill the youngest node."""
    cluster.remove_node(cluster.worker_nodes[-1], allow_graceful=False)


class Feeder(threading.Thread):
    """Keeps so many chains under way, beside whoever starts and kills nodes."""

    def __init__(self, at_a_time: int, length: int, log: str) -> None:
        super().__init__(name="feeder")
        self.at_a_time = at_a_time
        self.length = length
        self.log = log
        self.enough = threading.Event()
        self.finished = 0
        self.wrong = 0

    def run(self) -> None:
        """Until it is enough; then let those that are under way end."""
        running: list[Chain] = []
        number = 0
        while running or not self.enough.is_set():
            while len(running) < self.at_a_time and not self.enough.is_set():
                running.append(Chain(number, self.length, LARGE, self.log))
                number += 1
            for chain in list(running):
                if chain.look():
                    running.remove(chain)
                    self.finished += 1
                    self.wrong += not chain.is_right()
            time.sleep(0.02)


# -- nodes come and go -----------------------------------------------------------------------------------------------


def elastic(phase_s: float, length: int) -> dict[str, Any]:
    """Run chains while nodes go 5 -> 3 -> 1 -> 5, each for `phase_s` seconds."""
    plan = [5, 3, 1, 5]
    nodes: list[tuple[float, int]] = []
    with (
        tempfile.TemporaryDirectory() as directory,
        Cluster(initialize_head=True, head_node_args={"num_cpus": 0}) as cluster,
    ):
        log = os.path.join(directory, "ends")
        Path(log).touch()
        for _ in range(plan[0]):
            add_node(cluster)
        cluster.connect()
        cluster.wait_for_nodes()
        began = time.time()
        nodes.append((0.0, plan[0]))
        phases = [0.0]
        """When each number of nodes was reached."""
        feeder = Feeder(plan[0] * LANES, length, log)
        feeder.start()
        for count in plan[1:]:
            time.sleep(phase_s)
            while len(cluster.worker_nodes) > count:
                kill_node(cluster)
            while len(cluster.worker_nodes) < count:
                add_node(cluster)
                nodes.append((time.time() - began, len(cluster.worker_nodes)))
            nodes.append((time.time() - began, count))
            phases.append(time.time() - began)
        time.sleep(phase_s)
        feeder.enough.set()
        feeder.join()
        found = [(at - began, again) for at, again in ends(log)]
    end = phases[-1] + phase_s
    slots = int(end / SLOT_S)
    first, again = [0] * slots, [0] * slots
    for at, repeated in found:
        if 0 <= at < slots * SLOT_S:
            (again if repeated else first)[int(at / SLOT_S)] += 1
    return {
        "nodes": nodes,
        "slot_seconds": SLOT_S,
        "first_per_second": [count / SLOT_S for count in first],
        "again_per_second": [count / SLOT_S for count in again],
        "possible_per_second_and_node": LANES / LINK_S,
        "chains": feeder.finished,
        "wrong_chains": feeder.wrong,
        "tasks": sum(1 for _, repeated in found if not repeated),
        "tasks_run_again": sum(1 for _, repeated in found if repeated),
        "share_of_possible": shares(phases, found, phase_s, plan),
    }


def shares(
    phases: list[float], found: list[tuple[float, bool]], phase_s: float, plan: list[int]
) -> list[dict[str, float]]:
    """Of each phase: tasks per second, without its first two seconds, and which share of what its nodes could do that is."""
    out = []
    for phase, count in zip(phases, plan, strict=True):
        begin, end = phase + 2.0, phase + phase_s
        rate = sum(begin <= at < end for at, _ in found) / (end - begin)
        out.append({"nodes": count, "per_second": rate, "share": rate / (count * LANES / LINK_S)})
    return out


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw throughput over time, stacked, and nodes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    times = [(index + 0.5) * found["slot_seconds"] for index in range(len(found["first_per_second"]))]
    axes.stackplot(
        times,
        found["first_per_second"],
        found["again_per_second"],
        labels=["tasks", "tasks run again"],
        colors=["#d9534f", "#337ab7"],
    )
    end = times[-1] + found["slot_seconds"] / 2
    steps = [*found["nodes"], (end, found["nodes"][-1][1])]
    possible = found["possible_per_second_and_node"]
    axes.step(
        [at for at, _ in steps],
        [count * possible for _, count in steps],
        where="post",
        color="black",
        linestyle="--",
        label="what the nodes could do",
    )
    axes.set(xlabel="seconds", ylabel="tasks per second", xlim=(0, end), ylim=(0, 5.6 * possible))
    other = axes.secondary_yaxis("right", functions=(lambda rate: rate / possible, lambda count: count * possible))
    other.set_ylabel("nodes")
    axes.legend(loc="lower left")
    axes.set_title("Chains of 100 ms tasks while nodes are killed and started")
    figure.savefig(path, dpi=120)


# -- one of four nodes -------------------------------------------------------------------------------------------------


def chain_job(kill: bool, chains: int, length: int, numbers: int) -> tuple[float, int]:
    """Run chains on four nodes; return (seconds, tasks that ran again). With `kill` one node dies in the middle."""
    with (
        tempfile.TemporaryDirectory() as directory,
        Cluster(initialize_head=True, head_node_args={"num_cpus": 0}) as cluster,
    ):
        log = os.path.join(directory, "ends")
        Path(log).touch()
        for _ in range(4):
            add_node(cluster)
        cluster.connect()
        cluster.wait_for_nodes()
        warm = zray.remote(num_cpus=0, resources={"lane": 1})(time.sleep)
        zray.get([warm.remote(0.3) for _ in range(4 * LANES)], timeout=60)
        began = time.monotonic()
        running = [Chain(number, length, numbers, log) for number in range(chains)]
        while running:
            if kill and time.monotonic() - began >= length * LINK_S / 2:
                kill_node(cluster)
                kill = False
            for chain in list(running):
                if chain.look():
                    if not chain.is_right():
                        raise AssertionError(f"chain {chain.number} has another value than it should")
                    running.remove(chain)
            time.sleep(0.02)
        seconds = time.monotonic() - began
        return seconds, sum(repeated for _, repeated in ends(log))


def one_lost(runs: int, numbers: int) -> dict[str, Any]:
    """Compare jobs of 10 s with and without the death of a node, with values of so many numbers."""
    chains, length = 3 * LANES - 2, 100
    whole, lost, again = [], [], []
    for _ in range(runs):
        whole.append(chain_job(False, chains, length, numbers)[0])
        seconds, repeated = chain_job(True, chains, length, numbers)
        lost.append(seconds)
        again.append(repeated)
    return {
        "chains": chains,
        "links": length,
        "seconds_whole": whole,
        "seconds_with_a_death": lost,
        "tasks_run_again": again,
        "added_seconds": timing.quantile(sorted(lost), 0.5) - timing.quantile(sorted(whole), 0.5),
    }


def main(arguments: Iterable[str] | None = None) -> None:
    """Run both experiments and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--phase", type=float, default=10.0, help="seconds for each number of nodes")
    parser.add_argument("--length", type=int, default=20, help="tasks in a chain")
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs with and without a death")
    parser.add_argument("--directory", type=Path, default=RESULTS)
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    found = {
        "elastic": elastic(chosen.phase, chosen.length),
        "one_lost_small": one_lost(chosen.runs, SMALL),
        "one_lost_large": one_lost(chosen.runs, LARGE),
    }
    path = timing.write_result(timing.document("fault-tolerance", found), chosen.directory)
    draw(found["elastic"], path.with_suffix(".png"))
    for phase in found["elastic"]["share_of_possible"]:
        print(f"{phase['nodes']} nodes: {phase['per_second']:6.1f} tasks/s, {phase['share']:4.0%} of what they could")
    chains = found["elastic"]
    print(
        f"{chains['tasks']} tasks, {chains['tasks_run_again']} run again, {chains['wrong_chains']} of {chains['chains']} chains wrong"
    )
    for size in ("small", "large"):
        job = found[f"one_lost_{size}"]
        whole, added = job["seconds_whole"][0], job["added_seconds"]
        again = timing.quantile(sorted(job["tasks_run_again"]), 0.5)
        print(
            f"one node of four killed in a job of {whole:.1f} s, {size} values: {added:+.2f} s, {again:.0f} tasks run again"
        )
    print(path)


if __name__ == "__main__":
    main()
