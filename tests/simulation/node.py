"""A simulated broker: the real scheduler machine, with a twin of the store, of the fork parent and of the server around
it.

Covers carrying out actions as `zray.broker.performer` does, and making events as `zray.broker.server` does. Decides
nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.simulation.processes import Driver, Plan, Process, Worker, copy_of
from tests.simulation.store import Store, TargetGone
from tests.simulation.world import World
from zray import wire
from zray.broker import actions as a
from zray.broker import events as e
from zray.broker.scheduler import Scheduler, SchedulerConfig
from zray.broker.worker_pool import DYING
from zray.ids import return_id, task_id
from zray.task import CallShape, JobSpec, TaskSpec

TICK = 0.1


class Submitted:
    """What is known of a task from outside."""

    def __init__(self, spec: TaskSpec, parent: bytes, job: int, direct: bool) -> None:
        self.id = spec.id
        self.shape = spec.shape
        self.parent = parent
        self.job = job
        self.direct = direct
        self.deps = spec.deps


class ActorCall:
    """What is known of a call to an actor from outside."""

    def __init__(self, actor: bytes, caller: int, number: int) -> None:
        self.actor = actor
        self.caller = caller
        self.number = number
        self.unnumbered = False


class SimNode:
    """One node."""

    def __init__(
        self, world: World, resources: dict[str, float], config: SchedulerConfig, faulty_starts: float
    ) -> None:
        self.world = world
        self.resources = resources
        self.scheduler = Scheduler(resources, config, seed=world.seed)
        self.store = Store(lambda: world.now)
        self.faulty_starts = faulty_starts
        self.crash_probability = 0.0
        self.processes: dict[int, Process] = {}
        self.workers: dict[int, Worker] = {}
        """Started and not known to have exited."""
        self.starting: dict[int, a.StartWorker] = {}
        self.kill_at_start: set[int] = set()
        self.drivers: dict[int, Driver] = {}
        self.plans: dict[bytes, Plan] = {}
        self.shapes: dict[bytes, CallShape] = {}
        self.tasks: dict[bytes, Submitted] = {}
        self.calls: dict[bytes, ActorCall] = {}
        self.replies: set[bytes] = set()
        self.arrived: set[bytes] = set()
        """Tasks whose submission has come to the broker."""
        self.cancelled: set[bytes] = set()
        self.live_actors: dict[bytes, Worker] = {}
        """Incarnation that runs of each actor."""
        self.actor_specs: dict[bytes, Any] = {}
        self.killed_actors: set[bytes] = set()
        """Dead for good."""
        self.kills: set[bytes] = set()
        """Actors that somebody killed or let go."""
        self.running_now: dict[int, tuple[TaskSpec, str]] = {}
        self.ended_jobs: set[int] = set()
        self.watched: dict[bytes, None] = {}
        self.end_signal = return_id(task_id(bytes(16), 99), 0)
        self.store.expect(self.end_signal, 0)
        self.replies.add(self.end_signal)
        self.history: list[str] = []
        self._next_tick = 0.0
        self._wanted = float("inf")
        self._fork_ready = 0.0
        self._do: dict[type[a.Action], Callable[[Any], object]] = {
            a.StartWorker: self._start_worker,
            a.KillWorker: self._kill_worker,
            a.StopWorker: lambda x: self._send(x.worker, wire.Shutdown(x.reason)),
            a.RunOn: self._run_on,
            a.Reopen: self._reopen,
            a.SealError: lambda x: self._seal(x.task, x.num_returns, x.kind, x.fields),
            a.SealErrors: self._seal_many,
            a.SealEntries: self._seal_entries,
            a.WatchObjects: lambda x: self._look_again(x.ids),
            a.SealReply: lambda x: self.store.force(x.reply, x.value if x.error is None else ("error", x.error)),
            a.GrantLease: self._grant_lease,
            a.RevokeLease: self._revoke_lease,
            a.BeginActor: self._begin_actor,
            a.ActorAlive: self._actor_alive,
            a.ActorDown: self._actor_down,
            a.ForwardCalls: self._forward_calls,
            a.EndActor: lambda x: self._send(x.worker, wire.ExitWhenIdle(x.reason)),
            a.InterruptTask: self._interrupt,
            a.ForgetShapes: lambda x: None,
            a.NameFreed: lambda x: None,
            a.RecordEvent: lambda x: None,
            a.NameFreed: lambda x: None,
            a.Warn: lambda x: None,
        }
        self._on: dict[type[Any], Callable[[Any], object]] = {
            wire.Goodbye: lambda m: self.end_job(m.job, "the driver has ended"),
            wire.WorkerReady: self._worker_ready,
            wire.SubmitTasks: self._submit_tasks,
            wire.TasksDone: self._tasks_done,
            wire.Blocked: lambda m: self.tell(e.WorkerBlocked(m.worker)),
            wire.Unblocked: lambda m: self.tell(e.WorkerUnblocked(m.worker)),
            wire.Sealed: lambda m: self._look_again([m.ids]),
            wire.LeaseRequest: lambda m: self.tell(e.LeaseRequested(m.process, m.job, m.shape, m.reply)),
            wire.LeaseReturn: lambda m: self.tell(e.LeaseReturned(m.worker, m.epoch)),
            wire.CreateActor: self._create_actor,
            wire.SubmitActorCalls: lambda m: self.tell(
                e.ActorCallsQueued(m.process, m.job, m.actor, m.incarnation, m.calls)
            ),
            wire.ActorReady: lambda m: self.tell(e.ActorConstructed(m.worker, m.process, m.actor)),
            wire.ActorFailed: lambda m: self.tell(e.ActorConstructionFailed(m.worker, m.actor, m.error)),
            wire.ActorExit: lambda m: self.tell(e.ActorLeft(m.worker, m.actor)),
            wire.CancelTask: self._cancel,
            wire.KillActor: lambda m: self.tell(e.ActorKill(m.actor, m.no_restart)),
            wire.LookupActor: lambda m: self.tell(e.ActorLookup(m.name, m.namespace, m.reply)),
        }
        self._schedule_tick()

    # -- books of the world --------------------------------------------------------------------------------------------

    def new_handle(self, process: Process) -> int:
        """Enter a process in the store."""
        handle = len(self.processes) + 1
        self.processes[handle] = process
        return handle

    def submitted(self, spec: TaskSpec, parent: bytes, job: int, direct: bool = False) -> None:
        """A task was submitted."""
        self.tasks[spec.id] = Submitted(spec, parent, job, direct)

    def actor_call(self, task: bytes, actor: bytes, caller: int, number: int) -> None:
        """An actor was called."""
        repeated = task in self.calls  # by a task that runs again: it may have begun under its first caller
        self.calls[task] = ActorCall(actor, caller, number)
        self.calls[task].unnumbered = repeated

    def actor_began(self, worker: Worker, spec: Any, incarnation: int) -> None:
        """A process becomes an actor: no other may be the same one."""
        other = self.live_actors.get(spec.creation.id)
        assert other is None or not other.alive, f"two live incarnations of actor {spec.creation.id.hex()[:8]}"
        self.live_actors[spec.creation.id] = worker

    def running(self, worker: Worker, spec: TaskSpec, kind: str) -> None:
        """A worker claimed a call."""
        self.running_now[worker.number] = (spec, kind)
        call = self.calls.get(spec.id)
        if call is not None and spec.sequence == 0:
            call.unnumbered = True
        if self.world.chance(self.crash_probability):
            self.world.at(self.world.rng.uniform(0, 0.003), self.kill_process, worker)

    def stopped_running(self, worker: Worker, spec: TaskSpec) -> None:
        """It goes on to the next."""
        self.running_now.pop(worker.number, None)

    # -- events --------------------------------------------------------------------------------------------------------

    def tell(self, event: e.Event) -> None:
        """One event for the machine; what it asks for is done at once."""
        self.world.say(f"event {_short(event)}")
        actions = self.scheduler.handle(event, self.world.now)
        for action in actions:
            self.world.say(f"    {_short(action)}")
            self._do[type(action)](action)
        self._schedule_tick()

    def receive(self, message: Any) -> None:
        """A frame came to the broker's inbox."""
        self._on[type(message)](message)

    def _schedule_tick(self) -> None:
        due = min(self._next_tick, self.scheduler.wake_at)
        if due < self._wanted:
            self._wanted = due
            self.world.at(max(0.0, due - self.world.now) + 1e-6, self._tick, due)

    def _tick(self, due: float) -> None:
        if due != self._wanted:
            return
        self._wanted = float("inf")
        self._next_tick = self.world.now + TICK
        busy = frozenset(w.number for w in self.workers.values() if self.store.expected(w.handle))
        self.tell(e.Tick(busy))

    def _submit_tasks(self, message: wire.SubmitTasks) -> None:
        self.arrived.update(spec.id for spec in message.tasks)
        missing: list[tuple[bytes, ...]] | None = None
        for index, spec in enumerate(message.tasks):
            lacking = tuple(dep for dep in spec.deps if self.store.watch(dep))
            if lacking:
                if missing is None:
                    missing = [()] * len(message.tasks)
                missing[index] = lacking
        self.tell(e.TasksSubmitted(message.job, message.process, message.parent, message.tasks, missing))

    def _look_again(self, ids: list[bytes]) -> None:
        done = [i for i in ids if not self.store.watch(i)]
        if done:
            self.tell(e.ObjectsReady(done))

    def _tasks_done(self, message: wire.TasksDone) -> None:
        ids = [message.ids[i : i + 16] for i in range(0, len(message.ids), 16)]
        self.tell(e.TasksFinished(message.worker, ids, message.statuses, message.micros, message.idle))

    def _create_actor(self, message: wire.CreateActor) -> None:
        missing = tuple(dep for dep in message.spec.creation.deps if self.store.watch(dep))
        self.tell(e.ActorRequested(message.process, message.spec, missing, message.reply))

    def _cancel(self, message: wire.CancelTask) -> None:
        entry = self.store.entries.get(return_id(message.task, 0))
        number, begun = 0, True
        if entry is not None and entry.state != "SEALED":
            begun = entry.state == "CLAIMED"
            for worker in self.workers.values():
                if worker.handle in (entry.target, entry.claimant):
                    number = worker.number
        self.tell(e.TaskCancel(message.task, message.force, message.recursive, number, begun))

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def start_job(self, number: int) -> Driver:
        """Admit a driver."""
        root = task_id(bytes(16), number)
        driver = self.drivers[number] = Driver(self, number, root)
        spec = JobSpec(number, root, 1, "ns", [], "/")
        self.tell(e.JobStarted(spec, driver.handle))
        return driver

    def define(self, shapes: list[CallShape]) -> None:
        """Shapes travel ahead of what names them."""
        for shape in shapes:
            self.shapes[shape.key] = shape
        self.tell(e.ShapesDefined(shapes))

    def end_job(self, number: int, reason: str) -> None:
        """Good-bye, or the death of a driver."""
        driver = self.drivers[number]
        if number in self.ended_jobs:
            return
        self.ended_jobs.add(number)
        driver.alive = False
        self.store.gone.add(driver.handle)
        self.tell(e.ProcessGone(driver.handle))
        self.tell(e.JobEnded(number, reason))

    # -- processes -----------------------------------------------------------------------------------------------------

    def _start_worker(self, action: a.StartWorker) -> None:
        self.starting[action.worker] = action
        world = self.world
        self._fork_ready = max(self._fork_ready, world.now) + world.rng.uniform(0.001, 0.006)
        world.at(self._fork_ready - world.now, self._forked, action)

    def _forked(self, action: a.StartWorker) -> None:
        del self.starting[action.worker]
        if self.world.chance(self.faulty_starts):
            self.tell(e.WorkerStartFailed(action.worker, "no memory"))
            return
        worker = self.workers[action.worker] = Worker(self, action.worker, action.job, action.environment)
        self.tell(e.WorkerStarted(action.worker, worker.pid, 0))
        if action.worker in self.kill_at_start:
            self.kill_process(worker)
        elif self.world.chance(self.faulty_starts):
            self.world.at(self.world.rng.uniform(0, 0.004), self.kill_process, worker)
        self.world.at(self.world.rng.uniform(0.001, 0.004), worker.runner.start)

    def _worker_ready(self, message: wire.WorkerReady) -> None:
        worker = self.workers.get(message.worker)
        if worker is not None:
            self.tell(e.WorkerStarted(message.worker, worker.pid, message.process))
            self.tell(e.WorkerIsReady(message.worker))

    def _kill_worker(self, action: a.KillWorker) -> None:
        worker = self.workers.get(action.worker)
        if worker is None:
            self.kill_at_start.add(action.worker)
        else:
            # A process that is stopped, or deep in the kernel, dies some time after the signal.
            late = self.world.rng.uniform(0, 0.01) if self.world.chance(0.2) else 0.0
            self.world.at(late, self.kill_process, worker)

    def kill_process(self, worker: Worker) -> None:
        """SIGKILL."""
        if worker.alive:
            worker.die()
            self.process_exited(worker, -9)

    def process_exited(self, worker: Worker, status: int) -> None:
        """The fork parent will notice."""
        self.running_now.pop(worker.number, None)
        self.world.at(self.world.rng.uniform(0.0001, 0.004), self._exit_confirmed, worker, status)

    def _exit_confirmed(self, worker: Worker, status: int) -> None:
        store = self.store
        store.gone.add(worker.handle)
        del self.workers[worker.number]
        targeted, claimed_ids = store.orphans(worker.handle)
        orphans, bare = [], []
        for entry in targeted:
            if entry.spec is None:
                bare.append(entry.id)
            else:
                spec = copy_of(entry.spec)
                spec.attempt = entry.attempt
                orphans.append(spec)
        orphans.sort(key=lambda spec: spec.sequence)
        claimed = [task[:12] + bytes(4) for task in claimed_ids]
        self.tell(e.ProcessGone(worker.handle))
        self.tell(e.WorkerExited(worker.number, status, False, orphans, bare, claimed))

    def deliver_to(self, number: int, message: Any) -> None:
        """A frame for a worker's inbox."""
        worker = self.workers.get(number)
        if worker is not None and worker.alive:
            worker.receive(message)

    def _send(self, number: int, message: Any) -> None:
        worker = self.workers.get(number)
        if worker is not None:
            worker.from_broker.send(message)

    # -- actions -------------------------------------------------------------------------------------------------------

    def _run_on(self, action: a.RunOn) -> None:
        """A worker that was on lease must be done with what it got directly (but for a call that left just before the
        lease was taken back)."""
        worker = self.workers.get(action.worker)
        if worker is not None:
            for entry in self.store.entries.values():
                if entry.target == worker.handle and entry.state != "SEALED" and entry.made < self.world.now - 0.002:
                    raise AssertionError(f"worker {action.worker} gets tasks beside direct call {entry.id.hex()}")
        self._send(action.worker, wire.RunTasks([copy_of(spec) for spec in action.tasks]))

    def lease_is_used(self, driver: Driver, lease: wire.Lease) -> None:
        """A lessee is about to call: the machine must agree that it may."""
        worker = self.scheduler.node.pool.workers.get(lease.worker)
        if worker is not None and worker.state != DYING:
            assert worker.lessee == driver.handle, f"{worker} is called by {driver.handle} without a lease"

    def _reopen(self, action: a.Reopen) -> None:
        attempt = self.store.retry(return_id(action.task.id, 0), 0)
        if attempt is not None:
            action.task.attempt = attempt

    def _seal(self, task: bytes, num_returns: int, kind: str, fields: dict[str, Any]) -> None:
        self.store.force(return_id(task, 0), (kind, fields))

    def _seal_many(self, action: a.SealErrors) -> None:
        for task in action.tasks:
            self._seal(task, action.num_returns, action.kind, action.fields)

    def _seal_entries(self, action: a.SealEntries) -> None:
        for object_id in action.ids:
            self.store.force(object_id, (action.kind, action.fields))

    def _grant_lease(self, action: a.GrantLease) -> None:
        worker = self.workers[action.worker]
        self.store.words[worker.handle, wire.WORD_LEASE] = action.epoch
        self.store.force(action.reply, wire.Lease(action.worker, worker.handle, action.epoch))

    def _revoke_lease(self, action: a.RevokeLease) -> None:
        worker = self.workers.get(action.worker)
        if worker is not None:
            self.store.words[worker.handle, wire.WORD_LEASE] = action.epoch

    def _address(self, actor: bytes, incarnation: int) -> bytes:
        address = return_id(actor, incarnation)
        self.store.expect(address, 0)
        self.replies.add(address)
        return address

    def _retarget(self, calls: list[TaskSpec], process: int) -> None:
        for call in calls:
            try:
                self.store.retarget(return_id(call.id, 0), process)
            except TargetGone:
                return

    def _begin_actor(self, action: a.BeginActor) -> None:
        worker = self.workers[action.worker]
        self._address(action.spec.creation.id, action.incarnation)
        self._retarget(action.replay, worker.handle)
        replay = [copy_of(spec) for spec in action.replay]
        self._send(action.worker, wire.StartActor(action.spec, action.incarnation, replay))

    def _actor_alive(self, action: a.ActorAlive) -> None:
        worker = self.workers[action.worker]
        address = wire.ActorAddress(action.worker, worker.handle, action.incarnation)
        self.store.force(self._address(action.actor, action.incarnation), address)

    def _actor_down(self, action: a.ActorDown) -> None:
        error = (action.kind, action.fields)
        if action.next:
            self._address(action.actor, action.incarnation + 1)
            self.store.force(self._address(action.actor, action.incarnation), error)
            return
        self.killed_actors.add(action.actor)
        self.store.force(self._address(action.actor, action.incarnation), error)
        self.store.force(self._address(action.actor, action.incarnation + 1), error)

    def _forward_calls(self, action: a.ForwardCalls) -> None:
        worker = self.workers.get(action.worker)
        if worker is None:
            return
        self._retarget(action.calls, worker.handle)
        calls = [copy_of(spec) for spec in action.calls]
        self._send(action.worker, wire.CallActor(action.process, action.incarnation, calls))

    def _interrupt(self, action: a.InterruptTask) -> None:
        entry = self.store.entries.get(return_id(action.task, 0))
        if entry is None or entry.state == "SEALED":
            return
        if entry.state != "CLAIMED":
            self._seal(action.task, a.UNKNOWN_RETURNS, "TaskCancelledError", {"task_id": action.task.hex()})
            self._look_again([return_id(action.task, 0)])
            return
        for worker in self.workers.values():
            if worker.handle == entry.claimant:
                self.world.at(20e-6, self._signal, worker, action.task)

    def _signal(self, worker: Worker, task: bytes) -> None:
        if worker.alive:
            worker.interrupt(task)


def _short(record: Any) -> str:
    text = repr(record)
    return text if len(text) <= 300 else text[:297] + "..."
