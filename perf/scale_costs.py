"""What things cost on this machine, measured with real processes: the numbers that the model of `scale.py` starts from.

Covers a frame between two brokers (encrypted, both sides, by size), an empty task on one node (wall time and processor time of each kind of process),
and a write to a shard of the control store. Does not cover what a broker does with a message: the model runs the very machines and times them.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import psutil

import zray
from zray.broker.peer_messages import PLAIN, envelope
from zray.gcs.service import GcsService
from zray.gcs.tables import JobRow
from zray.peer_transport import Arrived, ClusterKey, PeerSockets
from zray.transport import Context, Poller, ipc_endpoint

SIZES = (300, 3_000, 30_000)
"""Bytes of frames."""
_A, _B = b"a" * 16, b"b" * 16


@dataclass(frozen=True)
class LinkCost:
    """Processor seconds that a frame costs one side, the I/O thread's work included: `frame + bytes * byte`."""

    frame: float
    byte: float

    def of(self, frames: float, size: float) -> float:
        """Seconds for so many frames with so many bytes together."""
        return frames * self.frame + size * self.byte


@dataclass(frozen=True)
class TaskCost:
    """Of an empty task on one node, many in flight."""

    rate: float
    """Tasks a second."""
    driver: float
    broker: float
    workers: float
    """Processor seconds a task of each kind of process, all of the kind together."""
    cores: float
    """Cores that were busy."""

    def capacity(self, cores: float) -> float:
        """Tasks a second that so many cores have the time for: what is measured on a quiet machine, and what others leave no room to measure here."""
        return cores / self.processor

    @property
    def processor(self) -> float:
        """Processor seconds a task, of all processes."""
        return self.driver + self.broker + self.workers


def _sockets(own: bytes, key: ClusterKey, directory: str) -> tuple[PeerSockets, Poller, Context]:
    context = Context()
    poller = Poller(context.inbox(ipc_endpoint(directory, own[:1].decode())))
    return PeerSockets(context, own, key, poller), poller, context


def _sink(key: ClusterKey, directory: str, counts: list[int], pipe: Any) -> None:
    """The receiving process: say for each batch what it cost."""
    sockets, poller, context = _sockets(_B, key, directory)
    pipe.send(sockets.listen("127.0.0.1", 0))
    for count in counts:
        begun, left = 0.0, count
        while left:
            poller.wait(1000)
            for event in sockets.receive():
                if isinstance(event, Arrived):
                    begun = begun or time.process_time()
                    left -= 1
        pipe.send(time.process_time() - begun)
    sockets.close()
    context.close()


def link_costs() -> tuple[LinkCost, LinkCost]:
    """Measure (sending, receiving) one frame between two processes."""
    counts = [max(1000, 30_000_000 // size // 10) for size in SIZES]
    with tempfile.TemporaryDirectory(prefix="zs", dir="/tmp") as directory:
        key = ClusterKey.new()
        ours, theirs = multiprocessing.Pipe()
        child = multiprocessing.get_context("spawn").Process(target=_sink, args=(key, directory, counts, theirs))
        child.start()
        sockets, _, context = _sockets(_A, key, directory)
        sockets.dial(_B, f"127.0.0.1:{ours.recv()}")
        out, into = [], []
        for size, count in zip(SIZES, counts, strict=True):
            frame = envelope(PLAIN, _B, os.urandom(size))
            begun = time.process_time()
            for _ in range(count):
                sockets.send(_B, frame)
            into.append(ours.recv() / count)  # all have arrived: the I/O thread's work is done
            out.append((time.process_time() - begun) / count)
        child.join()
        sockets.close()
        context.close()
    return _line(out), _line(into)


def _line(costs: list[float]) -> LinkCost:
    """The straight line through the smallest and the largest size."""
    byte = max(0.0, (costs[-1] - costs[0]) / (SIZES[-1] - SIZES[0]))
    return LinkCost(costs[0] - SIZES[0] * byte, byte)


@zray.remote
def _nothing() -> None:
    return None


def _processor(processes: list[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def task_cost(seconds: float = 3.0, cores: int = 2) -> TaskCost:
    """Measure empty tasks of one node, a thousand in flight, workers on so many cores."""
    with zray.init(num_cpus=cores):
        zray.get([_nothing.remote() for _ in range(5000)])
        node = psutil.Process(int(zray.nodes()[0]["broker_pid"]))
        workers = node.children(recursive=True)
        kinds = {"driver": [psutil.Process()], "broker": [node], "workers": workers}
        before = {kind: _processor(processes) for kind, processes in kinds.items()}
        begun, done = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            zray.get([_nothing.remote() for _ in range(1000)])
            done += 1000
        took = time.perf_counter() - begun
        spent = {kind: _processor(processes) - before[kind] for kind, processes in kinds.items()}
    each = {kind: value / done for kind, value in spent.items()}
    return TaskCost(done / took, each["driver"], each["broker"], each["workers"], sum(spent.values()) / took)


class _Nobody:
    """A publisher without subscribers."""

    def send(self, *parts: bytes) -> None:
        """Drop it."""

    def close(self) -> None:
        """Nothing to close."""


def row_cost(rows: int = 20_000) -> float:
    """Seconds that one write of a row costs the control store, in the process that has it."""
    with tempfile.TemporaryDirectory() as directory:
        store = GcsService(lambda endpoint: _Nobody(), directory, shards=4)
        begun = time.process_time()
        for number in range(rows):
            store.put_row(JobRow(number.to_bytes(16, "little"), number, b"n" * 16, 1, "", started=1.0))
        return (time.process_time() - begun) / rows
