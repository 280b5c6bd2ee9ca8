"""One transfer between two nodes beside two bare sockets, in turn in one run; and what it does to other messages.

Covers two figures: bytes per second from the store of one node into that of another, as a share of what two pyzmq sockets move between two
processes with CURVE and nothing else (the same pieces, dropped where they arrive); and single remote tasks, whose messages take the connections of beats,
while nothing else goes on and during transfers. Does not cover what a program pays to
fetch an array, beside Ray (`cluster.py`), or many nodes (`broadcast.py`).

    python -m perf.transfer [--blocks 7] [--mb 400]

writes `perf/results/<date>-transfer.json`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import zmq

from . import timing
from .sides import ROOT

ASKED = 0.8
"""Of the rate of two bare sockets, at least."""
PIECE = 1 << 20
AHEAD = 8
"""Pieces that the bare sender may be ahead of its socket, as the window of a transfer."""
_PAUSE_S = 0.5


def _socket(context: zmq.Context[Any], kind: int, keys: tuple[bytes, bytes], server: bool) -> zmq.Socket[Any]:
    socket = context.socket(kind)
    socket.linger = 0
    socket.sndhwm = AHEAD
    socket.rcvhwm = AHEAD
    socket.curve_publickey, socket.curve_secretkey = keys
    if server:
        socket.curve_server = True
    else:
        socket.curve_serverkey = keys[0]
    return socket


def bare_sender(port: int, public: str, secret: str) -> None:
    """In a process of its own: connect, and send as many pieces as each request says."""
    with zmq.Context() as context:
        socket = _socket(context, zmq.DEALER, (public.encode(), secret.encode()), False)
        socket.connect(f"tcp://127.0.0.1:{port}")
        data = memoryview(np.random.default_rng(1).bytes(AHEAD * PIECE))
        socket.send(b"here")
        while count := int(socket.recv()):
            for number in range(count):
                at = number % AHEAD * PIECE
                socket.send(data[at : at + PIECE], copy=False)
        socket.close()


@contextmanager
def bare() -> Iterator[Callable[[int], float]]:
    """Two sockets in two processes: a function that moves so many pieces and returns the seconds it took."""
    public, secret = zmq.curve_keypair()
    with zmq.Context() as context:
        socket = _socket(context, zmq.DEALER, (public, secret), True)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        arguments = ["--bare", str(port), public.decode(), secret.decode()]
        process = subprocess.Popen([sys.executable, "-m", "perf.transfer", *arguments], cwd=ROOT)
        socket.recv()

        def move(count: int) -> float:
            began = time.perf_counter()
            socket.send(b"%d" % count)
            size = sum(len(socket.recv(copy=False).buffer) for _ in range(count))
            seconds = time.perf_counter() - began
            assert size == count * PIECE
            return seconds

        yield move
        socket.send(b"0")
        process.wait()
        socket.close()


def transfer_once(zray: Any, arrived: Any, size: int) -> float:
    """Put an array here and let a task on the other node have it: seconds from submitting the task until it runs."""
    ref = zray.put(np.random.default_rng(size).integers(0, 255, size, dtype=np.uint8))
    time.sleep(_PAUSE_S)
    began = time.monotonic()
    at, length = zray.get(arrived.remote(ref))
    assert length == size
    return float(at - began)


def latencies(zray: Any, there: Any, until: Callable[[], bool]) -> list[int]:
    """Single remote tasks, one after another: nanoseconds of each."""
    found = []
    while not until():
        began = time.perf_counter_ns()
        zray.get(there.remote())
        found.append(time.perf_counter_ns() - began)
    return found


def measure(blocks: int, mb: int) -> dict[str, Any]:
    """Return all figures."""
    import zray
    from zray.cluster_utils import Cluster

    @zray.remote(num_cpus=0)
    def arrived(array: Any) -> tuple[float, int]:
        return time.monotonic(), len(array)

    @zray.remote(num_cpus=0)
    def there() -> None:
        return None

    pieces = mb * 1_000_000 // PIECE
    size = pieces * PIECE
    rates: dict[str, list[float]] = {"bare": [], "zray": []}
    store = {"object_store_memory": 3 * size + (1 << 30)}
    with bare() as move, Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **store}) as cluster:
        cluster.add_node(num_cpus=2, resources={"there": 1}, **store)
        cluster.connect()
        cluster.wait_for_nodes()
        on = {"resources": {"there": 0.001}}
        fetch, task = arrived.options(**on), there.options(**on)
        zray.get([task.remote() for _ in range(10)])
        transfer_once(zray, fetch, size)
        move(pieces)
        for block in range(blocks):
            for side in ("bare", "zray") if block % 2 else ("zray", "bare"):
                seconds = move(pieces) if side == "bare" else transfer_once(zray, fetch, size)
                rates[side].append(size / seconds)
                time.sleep(_PAUSE_S)
        end = time.monotonic() + 3.0
        quiet = latencies(zray, task, lambda: time.monotonic() > end)
        busy: list[int] = []
        for _ in range(blocks):
            ref = zray.put(np.ones(size, np.uint8))
            time.sleep(_PAUSE_S)
            moving = fetch.remote(ref)
            busy += latencies(zray, task, lambda moving=moving: bool(zray.wait([moving], timeout=0)[0]))
            del ref, moving
    return {
        "bytes": size,
        "rates": rates,
        "ratio": timing.ratio(rates["zray"], rates["bare"]),
        "remote task, quiet": timing.latency(quiet),
        "remote task, during transfers": timing.latency(busy),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the table."""
    medians = {side: statistics.median(rates) / 1e6 for side, rates in found["rates"].items()}
    ratio = found["ratio"]
    met = "met" if ratio.value >= ASKED else "SHORT"
    text = [
        f"transfer {medians['zray']:,.0f} MB/s, bare sockets {medians['bare']:,.0f} MB/s: "
        f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}], asked {ASKED}: {met}"
    ]
    for name in ("remote task, quiet", "remote task, during transfers"):
        single = found[name]
        text.append(f"{name:<30} p50 {single.p50:,.0f} us  p99 {single.p99:,.0f} us  most {single.most:,.0f} us")
    return text


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and keep the record."""
    parser = argparse.ArgumentParser(prog="python -m perf.transfer", description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--mb", type=int, default=400, help="size of each transfer")
    parser.add_argument("--bare", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.bare:
        port, public, secret = chosen.bare
        bare_sender(int(port), public, secret)
        return 0
    facts = timing.machine_facts()
    found = measure(chosen.blocks, chosen.mb)
    print("\n".join(lines(found)))
    print(timing.write_result(timing.document("transfer", found, facts), ROOT / "perf" / "results"))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    sys.exit(main())
