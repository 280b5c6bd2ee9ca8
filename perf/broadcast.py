"""One value to many nodes over slow links: how the time grows with the number of nodes.

Covers nodes in network namespaces of their own, joined by a bridge; each has one link, limited in both directions by a token bucket (`tc tbf`), so
that what a node sends and receives is bounded as by a network card. Measured is the time from submitting a task on every node, with one large
argument that lies at the head, until all have ended. Beside it the same with a value of its own for each node: then the head's link carries all of
them, as it would if it sent one value to everybody itself.

    python -m perf.broadcast [--mbit 200] [--mib 64] [--nodes 2 4 8] [--rounds 3]

writes `perf/results/<date>-broadcast.json` and `.png`. Needs root, iproute2 and (for the picture) matplotlib. Everything that it sets up is removed
again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import timing
from .sides import ROOT

SPACE = f"zb{os.getpid() % 10000}"
PORT = 7878
_START_S = 60.0
_DRIVER_S = 600.0


def run(*command: str) -> None:
    """Run a command of iproute2; RuntimeError with what it said when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def address(number: int) -> str:
    """Return the address of a node; 0 is the head."""
    return f"10.77.0.{number + 1}"


@contextlib.contextmanager
def network(nodes: int, mbit: int) -> Iterator[None]:
    """Namespaces `SPACE`-0 .. `SPACE`-nodes on one bridge, which is in a namespace, too."""
    switch = f"{SPACE}-s"
    made = [switch, *(f"{SPACE}-{number}" for number in range(nodes + 1))]
    try:
        for name in made:
            run("ip", "netns", "add", name)
        run("ip", "-n", switch, "link", "add", "name", "lan", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "lan", "up")
        limit = ("root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "100ms")
        for number in range(nodes + 1):
            name, port = f"{SPACE}-{number}", f"p{number}"
            run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "-n", switch, "link", "set", port, "master", "lan", "up")
            run("ip", "-n", name, "addr", "add", f"{address(number)}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("tc", "-n", switch, "qdisc", "add", "dev", port, *limit)
            run("tc", "-n", name, "qdisc", "add", "dev", "eth0", *limit)
        yield
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def inside(number: int, *arguments: str) -> list[str]:
    """The command that runs this Python with arguments on a node."""
    return ["ip", "netns", "exec", f"{SPACE}-{number}", sys.executable, *arguments]


@contextlib.contextmanager
def cluster(nodes: int, runtime: str) -> Iterator[str]:
    """A head without CPUs and so many nodes; the address of the head."""
    environment = {**os.environ, "ZRAY_RUNTIME_DIR": runtime, "PYTHONPATH": str(ROOT)}
    command = ("-c", "from zray.cli import main; main()", "start", "--object-store-memory", str(1 << 30))
    head = f"{address(0)}:{PORT}"

    def start(number: int, *arguments: str) -> None:
        subprocess.run(
            inside(number, *command, "--host", address(number), "--port", str(PORT), *arguments),
            check=True,
            env=environment,
            capture_output=True,
            timeout=_START_S,
        )

    try:
        start(0, "--head", "--num-cpus", "0")
        [key] = Path(runtime).glob("*/cluster.key")
        for number in range(1, nodes + 1):
            resources = json.dumps({f"n{number}": 1})
            start(number, "--address", head, "--key", str(key), "--num-cpus", "1", "--resources", resources)
        yield head
    finally:
        subprocess.run(
            [sys.executable, "-c", "from zray.cli import main; main()", "stop"],
            env=environment,
            capture_output=True,
            check=False,
        )


def drive(head: str, nodes: int, mib: int, rounds: int) -> dict[str, Any]:
    """In the head's namespace: measure, and return what was found."""
    import numpy as np

    import zray

    @zray.remote
    def touch(array: Any) -> int:
        return int(array[::65536].sum())

    zray.init(address=head)
    on = [touch.options(resources={f"n{number}": 1}) for number in range(1, nodes + 1)]
    rng = np.random.default_rng(nodes)
    size = mib << 20
    zray.get([f.remote(np.zeros(1 << 20, np.uint8)) for f in on])  # workers, connections
    found: dict[str, list[float]] = {"one value": [], "a value for each": []}
    for _ in range(rounds):
        for name, count in (("one value", 1), ("a value for each", nodes)):
            arrays = [rng.integers(0, 255, size, dtype=np.uint8) for _ in range(count)]
            refs = [zray.put(array) for array in arrays]
            began = time.perf_counter()
            totals = zray.get([f.remote(refs[i % count]) for i, f in enumerate(on)])
            found[name].append(time.perf_counter() - began)
            assert totals == [int(arrays[i % count][::65536].sum()) for i in range(nodes)]
            del refs
            time.sleep(0.5)
    zray.shutdown()
    return found


def measure(nodes: list[int], mbit: int, mib: int, rounds: int) -> list[dict[str, Any]]:
    """Return a record for each number of nodes."""
    records = []
    for count in nodes:
        with tempfile.TemporaryDirectory(prefix="zb", dir="/tmp") as runtime, network(count, mbit):
            with cluster(count, runtime) as head:
                command = ("-m", "perf.broadcast", "--drive", head, "--nodes", str(count), "--mib", str(mib))
                done = subprocess.run(
                    inside(0, *command, "--rounds", str(rounds)),
                    env={**os.environ, "ZRAY_RUNTIME_DIR": runtime},
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    timeout=_DRIVER_S,
                    check=False,
                )
            if done.returncode:
                raise RuntimeError(done.stderr)
        seconds = json.loads(done.stdout.splitlines()[-1])
        records.append({"nodes": count, "seconds": seconds})
        print(line(records[-1]), file=sys.stderr, flush=True)
    return records


def line(record: dict[str, Any]) -> str:
    """Return one row of the table."""
    medians = {name: statistics.median(found) for name, found in record["seconds"].items()}
    return f"{record['nodes']:>3} nodes  " + "  ".join(f"{name} {median:6.2f} s" for name, median in medians.items())


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = found["records"]
    nodes = [record["nodes"] for record in records]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
    for name, style in (("a value for each", "s--"), ("one value", "o-")):
        axes.plot(nodes, [statistics.median(record["seconds"][name]) for record in records], style, label=name)
    once = found["bytes"] * 8 / (found["mbit"] * 1e6)
    axes.axhline(once, color="grey", linewidth=0.8, label="one transfer at the links' rate")
    axes.set_xscale("log", base=2)
    axes.set_xticks(nodes, [str(count) for count in nodes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("nodes that want it")
    axes.set_ylabel("seconds until all have it")
    axes.set_title(f"{found['bytes'] >> 20} MiB over links of {found['mbit']} Mbit/s")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and keep the record and its picture."""
    parser = argparse.ArgumentParser(prog="python -m perf.broadcast", description=__doc__.split("\n")[0])
    parser.add_argument("--mbit", type=int, default=200, help="rate of each link, both ways")
    parser.add_argument("--mib", type=int, default=64, help="size of the value")
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drive", metavar="HOST:PORT", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.drive:
        print(json.dumps(drive(chosen.drive, chosen.nodes[0], chosen.mib, chosen.rounds)))
        return 0
    records = measure(chosen.nodes, chosen.mbit, chosen.mib, chosen.rounds)
    body = {"mbit": chosen.mbit, "bytes": chosen.mib << 20, "records": records}
    path = timing.write_result(timing.document("broadcast", body), ROOT / "perf" / "results")
    draw(body, path.with_suffix(".png"))
    print("\n".join(map(line, records)))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
