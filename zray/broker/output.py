"""Output of tasks and actors on its way to a driver on another node.

Covers reading what workers of foreign jobs have written and sending it to the nodes of their drivers, and keeping there what comes. Does not cover
writing the logs (`zray.execution`) or printing them (`zray.log_tail`, which finds what came from afar beside the logs of its own node).

What a task wrote leaves before the report of its end, on the same link: it is on the driver's terminal before `get` returns, wherever the task ran.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Final

from zray import wire
from zray.broker import peer_messages as pm

if TYPE_CHECKING:
    from zray.broker.cluster import Cluster
    from zray.broker.processes import WorkerProcess
    from zray.broker.remote_tasks import RemoteTasks
    from zray.broker.server import Broker

_CHUNK: Final = 256 << 10
"""Bytes of a log that leave in one message."""
_KEPT: Final = 16 << 20
"""Bytes of a file with output from afar; it then begins anew. Drivers have long printed it."""
_SUFFIXES: Final = ("out", "err")


def mark_origin(text: bytes, host: bytes) -> bytes:
    """Add the host to lines that name the task whose output follows."""
    if b"\x1e" not in text:
        return text
    lines = text.split(b"\n")
    return b"\n".join(line + b", ip=" + host if line.startswith(b"\x1e") else line for line in lines)


class RemoteOutput:
    """One broker's dealings in output with other nodes."""

    def __init__(self, broker: Broker, cluster: Cluster, tasks: RemoteTasks) -> None:
        self._broker = broker
        self._cluster = cluster
        self._tasks = tasks
        self._directory = os.path.join(broker.config.directory, "logs")
        self._host = cluster.address.rpartition(":")[0].strip("[]").encode()
        self._offsets: dict[str, int] = {}
        """Of each file of a worker of a foreign job: how much of it has left."""
        self._events = 0
        cluster.serve_also(pm.Output, self._came)

    def send_new(self) -> None:
        """Send what workers of foreign jobs have written and said so."""
        events = self._broker.store.global_word(wire.GLOBAL_LOG_EVENTS)
        if events != self._events:
            self._events = events
            self.send_all()

    def send_all(self) -> None:
        """Send whatever workers of foreign jobs have written."""
        for worker in self._broker.workers.values():
            self._send(worker)

    def _send(self, worker: WorkerProcess) -> None:
        job = self._tasks.driver_job(worker.job)
        home = self._tasks.home_of(job)
        if home == self._cluster.own:
            return
        for suffix in _SUFFIXES:
            path = f"{worker.log_file}.{suffix}"
            try:
                size = os.stat(path).st_size
            except OSError:
                continue
            offset = self._offsets.get(path, 0)
            if size < offset:  # it became too long, and began anew
                offset = 0
            if size > offset:
                with contextlib.suppress(OSError):  # no descriptors: the next time
                    self._offsets[path] = self._send_file(path, offset, home, job, f"{worker.number}.{suffix}")

    def _send_file(self, path: str, offset: int, home: bytes, job: int, name: str) -> int:
        """Send whole lines from an offset on; return where the next ones begin."""
        with open(path, "rb") as file:
            file.seek(offset)
            while chunk := file.read(_CHUNK):
                whole = chunk.rfind(b"\n") + 1
                if not whole and len(chunk) < _CHUNK:
                    break  # a line that goes on
                text = chunk[: whole or len(chunk)]
                offset += len(text)
                file.seek(offset)
                self._cluster.send(home, pm.Output(job, name, mark_origin(text, self._host)))
        return offset

    def ended(self, worker: WorkerProcess) -> None:
        """A worker is gone: send its last words."""
        self._send(worker)
        for suffix in _SUFFIXES:
            self._offsets.pop(f"{worker.log_file}.{suffix}", None)

    def say(self, job: int, text: str) -> bool:
        """Write a line of this broker's own for a driver on another node; False when it is on this one."""
        job = self._tasks.driver_job(job)
        home = self._tasks.home_of(job)
        if home == self._cluster.own:
            return False
        self._cluster.send(home, pm.Output(job, "0.err", f"\x1ezray\x1f\n{text}\n".encode()))
        return True

    def _came(self, node: bytes, message: pm.Output) -> None:
        """Keep output of a job whose driver is here where the driver looks for it."""
        if message.job not in self._broker.jobs or not message.name.replace(".", "").isalnum():
            return
        number, _, suffix = message.name.partition(".")
        path = os.path.join(self._directory, f"n{node.hex()[:8]}-{number}.{message.job}.{suffix}")
        try:
            with open(path, "ab") as file:
                if file.tell() > _KEPT:
                    file.truncate(0)
                file.write(message.text)
        except OSError as error:  # no descriptors, or a full disk: output is lost, and nothing else
            print(f"[zray] output of job {message.job} is lost: {error}", file=sys.stderr, flush=True)
        self._broker.store.add_global(wire.GLOBAL_LOG_EVENTS, 1)

    def job_over(self, job: int) -> None:
        """A driver of this node has ended: nobody reads its output from afar."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self._directory):
                if name.startswith("n") and name.endswith(tuple(f".{job}.{suffix}" for suffix in _SUFFIXES)):
                    os.unlink(os.path.join(self._directory, name))
