"""Processes of a node that come and go: what the fork parent reports, and what becomes of the work of those that are dead.

Covers starts and exits of workers, what is remembered of each death, results that a dead process should have made, and calls that it had not sent.
Does not cover what the scheduler decides about all that (`scheduler`), how processes are made (`fork_parent`), or looking at one (`processes`).
"""

from __future__ import annotations

import collections
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Final

import msgspec

from zray import _store, wire
from zray.broker import actions as a
from zray.broker import events as e
from zray.broker.processes import Exited, Failed, Started, death_of, kernel_oom_kills, kill_group, remove_logs
from zray.broker.unsent import MadeResult, UnsentCalls, sort_out
from zray.task import TaskSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from zray.broker.processes import WorkerProcess
    from zray.broker.server import Broker
    from zray.errors import Death

_NEVER_SENT: Final = (
    "The process that made the call for this object died before the call had left it: nobody can make the value."
)
_LAST_WORDS_S: Final = 1.0
"""Seconds that an exit waits for the message in which the process says how it ends."""
_DEATHS_KEPT: Final = 1000
_LOGS_KEPT: Final = 100
"""Workers that have ended whose log files are kept; drivers have printed what is in older ones."""

_decode_spec = msgspec.msgpack.Decoder(TaskSpec).decode


class WorkerEnds:
    """One broker's dealings in the lives of its processes."""

    def __init__(self, broker: Broker, knows: Callable[[bytes], bool]) -> None:
        """knows: whether a task, a call or an actor is in somebody's books here, who will tell of its end."""
        self._broker = broker
        self._store = broker.store
        self._knows = knows
        self.deaths: dict[object, Death] = {}
        """By number of the worker, the newest `_DEATHS_KEPT`."""
        self.ahead: list[tuple[float, Exited]] = []
        """Exits whose announcement is still on its way, with the time until which it is waited for."""
        self.unsent = UnsentCalls()
        self._by_pid: dict[int, int] = {}
        self._logs: collections.deque[str] = collections.deque()
        self._oom_kills = kernel_oom_kills()

    def serve_fork_parent(self) -> None:
        """Take in what the fork parent tells."""
        broker = self._broker
        reports = broker.forks.reports()
        if reports is None:
            print("[zray] the fork parent is gone: the node ends", file=sys.stderr, flush=True)
            broker.stop()
            return
        for report in reports:
            if isinstance(report, Started):
                worker = broker.workers[report.worker]
                worker.pid = report.pid
                self._by_pid[report.pid] = report.worker
                broker.tell(e.WorkerStarted(report.worker, report.pid, 0))
                if worker.kill_reason:
                    kill_group(report.pid)
            elif isinstance(report, Failed):
                broker.workers.pop(report.worker, None)
                broker.tell(e.WorkerStartFailed(report.worker, report.reason))
            else:
                self._exited(report)

    def serve_ahead(self) -> None:
        """Look again at exits whose announcement was not there."""
        waiting, self.ahead = self.ahead, []
        for deadline, report in waiting:
            self._exited(report, deadline)

    def driver_died(self, process: int) -> None:
        """A driver's process is dead; its job has ended."""
        self._store.reap(process)
        self.unsent.died(process, time.monotonic())

    # -- exits -----------------------------------------------------------------------------------------------------------

    def _is_ahead(self, worker: WorkerProcess) -> bool:
        """Whether a worker's exit was reported before its last words were heard, which say how it ended."""
        if not worker.process or not self._store.word(worker.process, wire.WORD_LAST_WORDS):
            return False
        actor = self._broker.scheduler.node.actors.actors.get(worker.actor)
        return actor is not None and not actor.verdict

    def _exited(self, report: Exited, deadline: float = 0.0) -> None:
        broker = self._broker
        number = self._by_pid.get(report.pid, 0)
        worker = broker.workers.get(number)
        if worker is not None and self._is_ahead(worker):
            now = time.monotonic()
            if now < (deadline or now + _LAST_WORDS_S):
                self.ahead.append((deadline or now + _LAST_WORDS_S, report))
                return
        self._by_pid.pop(report.pid, None)
        if worker is None:
            return
        oom = self._killed_for_memory(report)
        self._remember(number, worker, report, oom)
        claimed: list[bytes] = []
        orphans: list[TaskSpec] = []
        bare: list[bytes] = []
        if worker.process:
            self._store.reap(worker.process)
            orphans, bare, claimed = self._orphans(worker)
            self.unsent.died(worker.process, time.monotonic())
            broker.process_gone(worker.process)
            if broker.sharing is not None:
                broker.sharing.look_at_wants()
        broker.tell(e.WorkerExited(number, report.status, oom, orphans, bare, claimed))
        if broker.remote is not None:
            broker.remote.worker_gone(number)
        if broker.lanes is not None:
            broker.lanes.worker_gone(number)
        if worker.outbox is not None:
            worker.outbox.close()
        del broker.workers[number]
        try:
            os.unlink(os.path.join(broker.config.directory, f"w{number}"))
        except OSError:
            pass

    def _remember(self, number: int, worker: WorkerProcess, report: Exited, oom: bool) -> None:
        """Keep what errors will say of this death, and the log of its output for a while."""
        self.deaths[number] = death_of(worker, report, oom, self._broker.config.node[:8])
        if len(self.deaths) > _DEATHS_KEPT:
            del self.deaths[next(iter(self.deaths))]
        if self._broker.output is not None:
            self._broker.output.ended(worker)
        self._logs.append(worker.log_file)
        if len(self._logs) > _LOGS_KEPT:
            remove_logs(self._logs.popleft())

    def _killed_for_memory(self, report: Exited) -> bool:
        """Whether the kernel killed it: the count of such kills in this control group has grown."""
        if report.status != -signal.SIGKILL:
            return False
        before, self._oom_kills = self._oom_kills, kernel_oom_kills()
        return self._oom_kills > before >= 0

    # -- what the dead leave ---------------------------------------------------------------------------------------------

    def _orphans(self, worker: WorkerProcess) -> tuple[list[TaskSpec], list[bytes], list[bytes]]:
        """What a dead process should have made: (calls whose specs are kept, results without a spec, tasks it had claimed)."""
        specs: dict[bytes, TaskSpec] = {}
        bare: list[bytes] = []
        claimed: dict[bytes, None] = {}
        for object_id, attempt, body, was_claimed, targeted in self._store.orphans(worker.process):
            task = _store.with_index(object_id, 0)
            if was_claimed:
                claimed[task] = None
            if not targeted:
                continue
            if body:
                spec = _decode_spec(body)
                spec.attempt = attempt
                specs[task] = spec
            else:
                bare.append(object_id)
        specs |= worker.undelivered
        bare = [object_id for object_id in bare if _store.with_index(object_id, 0) not in specs]
        return sorted(specs.values(), key=lambda spec: spec.sequence), bare, list(claimed)

    def settle_unsent(self) -> None:
        """See to the calls of processes that died a while ago. The inbox is empty: all that they had sent has been heard."""
        for process in self.unsent.due(time.monotonic()):
            made: list[MadeResult] = []
            for object_id, attempt, body, target in self._store.made_by(process):
                spec = _decode_spec(body) if body else None
                if spec is not None:
                    spec.attempt = attempt
                made.append(MadeResult(object_id, _store.with_index(object_id, 0), target, spec))
            verdict = sort_out(made, self._knows, self._store.alive)
            for target, calls in verdict.resend.items():
                self._broker.performer.send_again(process, target, calls)
            if verdict.lost:
                self._broker.performer.seal_entries(
                    a.SealEntries(verdict.lost, "OwnerDiedError", {"message": _NEVER_SENT})
                )
