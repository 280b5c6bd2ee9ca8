"""Worker processes as the broker sees them: asking the fork parent for one, ending whole groups, and why one died.

A door: it forks nothing itself, decides nothing, and knows the fork parent's protocol and /proc. Neighbours: `fork_parent` is the other end of the
channel; `server` turns reports into events.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from typing import TYPE_CHECKING, Final

from zray.broker import fork_parent
from zray.broker.fork_parent import Exited, Failed, Fork, Report, Started
from zray.errors import Death, DeathCause

if TYPE_CHECKING:
    from zray.task import TaskSpec
    from zray.transport import Outbox

_PACKET: Final = 1 << 16
_LAST_LINES: Final = 20
_TAIL_BYTES: Final = 16 << 10


class WorkerProcess:
    """One worker: its process, its inbox, and what was sent to it once."""

    __slots__ = (
        "actor",
        "job",
        "kill_reason",
        "log_file",
        "number",
        "outbox",
        "pid",
        "process",
        "shapes",
        "undelivered",
    )

    def __init__(self, number: int, job: int, log_file: str) -> None:
        self.number = number
        self.job = job
        self.log_file = log_file
        self.pid = 0
        self.process = 0
        """Handle in the store; 0 until it has entered itself."""
        self.outbox: Outbox | None = None
        self.shapes: set[bytes] = set()
        self.kill_reason = ""
        """Why the broker itself ended it, "" when it did not."""
        self.actor = b""
        self.undelivered: dict[bytes, TaskSpec] = {}
        """Calls for which it was gone already, though nobody had heard of its exit: the store does not name them among what it should have made."""

    @property
    def fault_file(self) -> str:
        return self.log_file + ".fault"


def remove_logs(log_file: str) -> None:
    """Remove the files of a worker that has ended."""
    for suffix in (".out", ".err", ".fault"):
        with contextlib.suppress(OSError):
            os.unlink(log_file + suffix)


class ForkChannel:
    """The broker's end of the channel to the fork parent."""

    def __init__(self, channel: socket.socket, pid: int) -> None:
        self.channel = channel
        self.pid = pid
        channel.setblocking(False)

    def fileno(self) -> int:
        return self.channel.fileno()

    def request(self, fork: Fork) -> None:
        """Ask for a worker; the answer is a report."""
        self.channel.setblocking(True)
        try:
            self.channel.send(fork_parent.encode_fork(fork))
        finally:
            self.channel.setblocking(False)

    def reports(self) -> list[Report] | None:
        """Return what the fork parent said since the last call; None when it is gone."""
        found: list[Report] = []
        while True:
            try:
                packet = self.channel.recv(_PACKET)
            except BlockingIOError:
                return found
            except OSError:
                return None
            if not packet:
                return None
            found.append(fork_parent.decode_report(packet))


def kill_group(pid: int) -> None:
    """SIGKILL a worker and every process it started that did not leave its group."""
    if pid <= 1:
        return
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def cause_of(status: int, killed_by_broker: str, oom: bool) -> DeathCause:
    """Return why a process ended, from its wait status (negative: signal)."""
    if killed_by_broker:
        return DeathCause.KILLED
    if oom:
        return DeathCause.OOM
    if status < 0:
        return DeathCause.of_signal(-status)
    return DeathCause.EXIT(status)


def death_of(worker: WorkerProcess, report: Exited, oom: bool, node: str) -> Death:
    """Gather what is known of the end of a worker: cause, memory, fault stack, last lines of output."""
    return Death(
        cause_of(report.status, worker.kill_reason, oom),
        pid=worker.pid,
        node=node,
        detail="" if worker.kill_reason == DeathCause.KILLED.name else worker.kill_reason,
        peak_rss=report.peak_rss,
        fault_stack=_read_tail(worker.fault_file).strip(),
        log_lines=tuple(_last_lines(worker.log_file)),
        log_path=worker.log_file,
    )


def _read_tail(path: str) -> str:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _last_lines(path: str) -> list[str]:
    lines: list[str] = []
    for suffix in (".out", ".err"):
        lines += [line for line in _read_tail(path + suffix).split("\n") if line and not line.startswith("\x1e")][
            -_LAST_LINES:
        ]
    return lines[-_LAST_LINES:]


def kernel_oom_kills() -> int:
    """Return how many processes the kernel has killed for memory in this control group (cgroup v2, then v1); -1 when it does not tell."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        try:
            with open(path) as file:
                for line in file:
                    name, _, value = line.partition(" ")
                    if name == "oom_kill":
                        return int(value)
        except (OSError, ValueError):
            continue
    return -1


__all__ = [
    "Exited",
    "Failed",
    "ForkChannel",
    "Started",
    "WorkerProcess",
    "cause_of",
    "death_of",
    "kernel_oom_kills",
    "kill_group",
]
