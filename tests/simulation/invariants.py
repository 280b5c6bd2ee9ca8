"""What must hold in every simulation.

During a run: each task is executed at most as often as its retries allow, no attempt twice, no device by two at once,
no actor in two places (`SimNode`), and the machine's own `validate()` after each event. At the end: everything ended,
for a reason that is true, in order, and a quiet node holds nothing.
"""

from __future__ import annotations

from typing import Any

from tests.simulation.node import SimNode
from tests.simulation.store import SEALED, Entry
from zray import resources as amounts
from zray.ids import return_id


class Invariants:
    """Checks one simulated node."""

    def __init__(self, node: SimNode) -> None:
        self.node = node
        node.store.on_claim = self.claimed

    # -- during the run ------------------------------------------------------------------------------------------------

    def claimed(self, entry: Entry, process: int) -> None:
        """Somebody begins to execute a call."""
        task = entry.id[:12] + bytes(4)
        name = task.hex()
        attempts = [attempt for _, _, attempt in entry.claims]
        assert len(set(attempts)) == len(attempts), f"task {name}: attempt {attempts[-1]} was executed twice"
        limit = self._retries(task)
        assert limit < 0 or len(attempts) <= limit + 1, f"task {name}: executed {len(attempts)} times, {limit} retries"
        self._check_gpus(task, process)
        known = self.node.tasks.get(task)
        for dep in known.deps if known is not None else ():
            assert self.node.store.sealed(dep), f"task {name} runs before its argument {dep.hex()} exists"

    def _retries(self, task: bytes) -> int:
        node = self.node
        call = node.calls.get(task)
        if call is not None:
            return int(node.actor_specs[call.actor].max_task_retries)
        return node.shapes[node.tasks[task].shape].max_retries

    def _check_gpus(self, task: bytes, process: int) -> None:
        node = self.node
        if task not in node.tasks:
            return
        share: dict[str, int] = {}
        running = [(worker, spec.shape) for worker, (spec, _) in node.running_now.items() if worker in node.workers]
        claimant = next(worker for worker in node.workers.values() if worker.handle == process)
        for number, key in [*running, (claimant.number, node.tasks[task].shape)]:
            gpu = amounts.unpack(node.shapes[key].resources).get("GPU", 0)
            if gpu:
                visible = node.workers[number].environment["CUDA_VISIBLE_DEVICES"].split(",")
                assert visible != [""], f"task {task.hex()} needs GPUs and sees none"
                assert len(visible) == max(1, gpu // amounts.UNIT), f"task {task.hex()} sees GPUs {visible}"
                for device in visible:
                    share[device] = share.get(device, 0) + min(gpu, amounts.UNIT)
        assert all(used <= amounts.UNIT for used in share.values()), f"a GPU is used by too many: {share}"

    # -- when all programs have ended ----------------------------------------------------------------------------------

    def programs_ended(self) -> None:
        """All that anybody waits for is there, with a true reason where it is an error; nothing is left but idle
        workers and actors."""
        node = self.node
        for task, known in node.tasks.items():
            if known.job in node.ended_jobs or (task not in node.arrived and not known.direct):
                continue
            entry = node.store.entries[return_id(task, 0)]
            assert entry.state == SEALED, f"task {task.hex()} was forgotten: {entry.state}, attempt {entry.attempt}"
            self._check_reason(task, entry)
        self._check_calls()
        self._check_order()
        machine = node.scheduler.node
        assert not machine.tasks.home, f"tasks {[t.hex() for t in machine.tasks.home][:3]} are over, but in the table"
        assert not machine.dependencies.waiters, "objects are awaited though nothing waits"
        assert not machine.interrupted, "interrupted tasks are remembered for ever"
        for worker in machine.pool.workers.values():
            assert worker.actor is not None or worker.held is None, f"{worker} holds {worker.held} though nothing runs"

    def _check_reason(self, task: bytes, entry: Entry) -> None:
        node = self.node
        value = entry.value
        name = task.hex()
        if value == "value":
            assert entry.claims, f"task {name} has a value, but nobody ran it"
            return
        kind, details = value
        shape = node.shapes[node.tasks[task].shape]
        if kind == "error":
            assert entry.claims, f"task {name} failed in user code that nobody ran"
        elif kind == "WorkerCrashedError":
            if details.get("cause") != "NOT_STARTED":
                self._check_crash(task, entry, shape.max_retries)
        elif kind == "TaskCancelledError":
            assert self._was_cancelled(task), f"task {name} was cancelled by nobody"
        elif kind == "TaskUnschedulableError":
            assert shape.name == "never", f"task {name} ({shape.name}) could be run: {details}"
        else:
            raise AssertionError(f"task {name} failed with {value}")

    def _check_crash(self, task: bytes, entry: Entry, limit: int) -> None:
        name = task.hex()
        assert limit >= 0, f"task {name} failed though it may be retried for ever"
        assert len(entry.claims) >= 1, f"task {name} failed by a crash before anybody ran it"
        if not self.node.tasks[task].direct:
            ran = len(entry.claims)
            assert ran == limit + 1, f"task {name} failed after {ran} executions, {limit} retries"

    def _was_cancelled(self, task: bytes) -> bool:
        node = self.node
        while True:
            if task in node.cancelled:
                return True
            known = node.tasks.get(task)
            if known is None:
                return False
            task = known.parent

    def _check_calls(self) -> None:
        node = self.node
        for task, call in node.calls.items():
            entry = node.store.entries[return_id(task, 0)]
            if not node.processes[call.caller].alive or node.processes[call.caller].job in node.ended_jobs:
                continue
            name = f"call {task.hex()}"
            assert entry.state == SEALED, f"{name} was forgotten: {entry.state}, target {entry.target}"
            if entry.value == "value" or entry.value[0] == "error":
                assert entry.claims, f"{name} has a value, but nobody ran it"
                continue
            kind, details = entry.value
            spec = node.actor_specs[call.actor]
            if kind == "ActorUnavailableError":
                assert spec.max_task_retries >= 0, f"{name} failed though it may be retried for ever"
                assert len(entry.claims) >= spec.max_task_retries, f"{name} failed before its retries were used"
            elif kind == "TaskCancelledError":
                assert self._was_cancelled(task), f"{name} was cancelled by nobody"
            elif kind in ("ActorDiedError", "ActorUnschedulableError"):
                assert call.actor in node.killed_actors, f"{name} says that its actor is dead"
                for_ever = spec.max_restarts < 0 and call.actor not in node.kills
                plan = node.plans[call.actor]
                if for_ever and plan.kind != "error" and details.get("cause") not in ("NOT_STARTED", "JOB_ENDED"):
                    assert details.get("never_started"), f"{name}: the actor may be restarted for ever: {details}"
            else:
                raise AssertionError(f"{name} failed with {entry.value}")

    def _check_order(self) -> None:
        """Each caller's calls began in the order in which it made them."""
        node = self.node
        last: dict[tuple[bytes, int], tuple[int, float]] = {}
        for task, call in sorted(node.calls.items(), key=lambda item: item[1].number):
            claims = node.store.entries[return_id(task, 0)].claims
            if claims and not call.unnumbered:
                begun = claims[0][0]
                number, before = last.get((call.actor, call.caller), (0, -1.0))
                assert begun > before, f"call {task.hex()} ({call.number}th) began before the {number}th"
                last[call.actor, call.caller] = (call.number, begun)

    # -- when all is over ----------------------------------------------------------------------------------------------

    def all_over(self) -> None:
        """The jobs are over: nothing is left of them."""
        node = self.node
        machine = node.scheduler.node
        left: dict[str, Any] = {
            "workers": machine.pool.workers,
            "processes": machine.by_process,
            "jobs": machine.jobs.jobs,
            "actors": machine.actors.actors,
            "names": machine.actors.names,
            "tasks": machine.tasks.home,
            "shapes": machine.tasks.shapes,
            "leases": {**machine.leases.leased, **machine.leases.draining, **machine.leases.pending},
            "awaited": machine.dependencies.waiters,
            "interrupted": machine.interrupted,
        }
        for what, found in left.items():
            assert not found, f"{what} are left when all jobs are over: {list(found)[:3]}"
        assert machine.ledger.available == machine.ledger.total, "resources are not back"
        assert not node.workers, f"processes {sorted(node.workers)} live though all jobs are over"

    # -- explaining ----------------------------------------------------------------------------------------------------

    def waiting(self) -> str:
        """What is not sealed."""
        node = self.node
        pending = [entry.id for entry in node.store.entries.values() if entry.state != SEALED]
        return f"not sealed: {[i.hex()[:24] for i in pending if i not in node.replies][:8]}"

    def suspects(self, text: str) -> list[bytes]:
        """Tasks and actors whose ids are named in a message."""
        known = [*self.node.tasks, *self.node.calls, *self.node.actor_specs]
        return [task for task in known if task.hex()[:24] in text]
