"""Carrying out the scheduler's actions: sockets, store and processes; no decisions.

One method per action, found by its class. Neighbours: `actions` lists them, `server` calls `perform` after each event.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from zray import _store, errors, failures, wire
from zray.broker import actions as a
from zray.broker.fork_parent import Fork
from zray.broker.processes import WorkerProcess, kill_group
from zray.object_store import ObjectRef
from zray.session import KIND_REPLY
from zray.task import ActorSpec, CallShape, TaskSpec
from zray.transport import ipc_endpoint
from zray.worker import WorkerConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zray.broker.server import Broker

_encode = msgspec.msgpack.Encoder().encode


class Performer:
    """Does what the scheduler asks for, on behalf of one broker."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.store = broker.store
        self.addresses: dict[bytes, list[ObjectRef]] = {}
        """Address objects of each actor, one per incarnation; kept until the actor is forgotten."""
        self.arguments: dict[bytes, list[ObjectRef]] = {}
        self.unreferenced: set[bytes] = set()
        """Actors without handles that have not ended yet."""
        self.detached: dict[bytes, ObjectRef] = {}
        self.interrupts: list[tuple[int, bytes]] = []
        """Workers to be signalled, and for which task, that have not yet taken an earlier one."""
        self._do: dict[type[a.Action], Callable[[Any], None]] = {
            a.StartWorker: self.start_worker,
            a.KillWorker: self.kill_worker,
            a.StopWorker: self.stop_worker,
            a.RunOn: self.run_on,
            a.RunAt: self.run_at,
            a.CancelAt: self.cancel_at,
            a.FetchObjects: self.fetch_objects,
            a.Reopen: self.reopen,
            a.SealError: self.seal_error,
            a.SealErrors: self.seal_errors,
            a.SealEntries: self.seal_entries,
            a.WatchObjects: self.watch_objects,
            a.SealReply: self.seal_reply,
            a.GrantLease: self.grant_lease,
            a.RevokeLease: self.revoke_lease,
            a.HostActor: self.host_actor,
            a.CallAt: self.call_at,
            a.KillAt: self.kill_at,
            a.EndActorAt: self.end_actor_at,
            a.NameFreed: self.name_freed,
            a.BeginActor: self.begin_actor,
            a.ActorAlive: self.actor_alive,
            a.ActorDown: self.actor_down,
            a.ForwardCalls: self.forward_calls,
            a.EndActor: self.end_actor,
            a.InterruptTask: self.interrupt_task,
            a.ForgetShapes: self.forget_shapes,
            a.BundlesAnswer: lambda action: broker.groups.bundles_answer(action),
            a.TellFree: lambda action: broker.groups.tell_free(),
            a.AskGroup: lambda action: broker.groups.ask(action.group),
            a.RecordEvent: self.record_event,
            a.Warn: self.warn,
        }

    def perform(self, actions: Iterable[a.Action]) -> None:
        """Carry out actions in order."""
        for action in actions:
            self._do[type(action)](action)

    # -- workers ------------------------------------------------------------------------------------------------------

    def start_worker(self, action: a.StartWorker) -> None:
        broker = self.broker
        spec = broker.job_specs[action.job]
        log_file = os.path.join(broker.config.directory, "logs", f"w{action.worker}.{action.job}")
        worker = broker.workers[action.worker] = WorkerProcess(action.worker, action.job, log_file)
        session = broker.session_config(spec)
        config = WorkerConfig(action.worker, session, spec, broker.fd, worker.fault_file)
        broker.forks.request(Fork(config, action.environment, log_file, action.title))

    def kill_worker(self, action: a.KillWorker) -> None:
        worker = self.broker.workers.get(action.worker)
        if worker is not None:
            worker.kill_reason = worker.kill_reason or action.reason or "killed"
            if worker.pid:
                kill_group(worker.pid)

    def stop_worker(self, action: a.StopWorker) -> None:
        self.send(action.worker, wire.Shutdown(action.reason))

    def send(self, number: int, message: wire.Message) -> None:
        """Send a message to a worker; whoever is gone gets none."""
        worker = self.broker.workers.get(number)
        if worker is None:
            return
        if worker.outbox is None:
            try:
                worker.outbox = self.broker.context.outbox(ipc_endpoint(self.broker.config.directory, f"w{number}"))
            except (
                OSError
            ) as error:  # no descriptors: without a word it is of no use; another is started a little later
                print(f"[zray] worker {number} cannot be reached: {error}", file=sys.stderr, flush=True)
                kill_group(worker.pid)
                return
        worker.outbox.send(wire.encode(message))

    def _define(self, number: int, keys: Iterable[bytes]) -> None:
        """Tell a worker of the shapes that what follows names."""
        worker = self.broker.workers.get(number)
        if worker is None:
            return
        missing: list[CallShape] = []
        for key in keys:
            if key not in worker.shapes:
                shape = self.broker.shapes.get(key)
                if shape is not None:
                    missing.append(shape)
                    worker.shapes.add(key)
        if missing:
            self.send(number, wire.DefineShapes(missing))

    # -- tasks --------------------------------------------------------------------------------------------------------

    def run_on(self, action: a.RunOn) -> None:
        worker = self.broker.workers.get(action.worker)
        if worker is None:
            return
        known = worker.shapes
        for spec in action.tasks:
            if spec.shape not in known:
                self._define(action.worker, [spec.shape])
        self.send(action.worker, wire.RunTasks(action.tasks))

    def run_at(self, action: a.RunAt) -> None:
        if self.broker.remote is not None:
            self.broker.remote.run_at(action)

    def fetch_objects(self, action: a.FetchObjects) -> None:
        if self.broker.sharing is not None:
            self.broker.sharing.fetch(action.ids)

    def cancel_at(self, action: a.CancelAt) -> None:
        if self.broker.remote is not None:
            self.broker.remote.cancel_at(action)

    def results(self, task: bytes, num_returns: int) -> list[ObjectRef]:
        """References to the results of a task that the store knows."""
        found = []
        index = 1
        while num_returns < 0 or index <= max(1, num_returns):
            ref = self.store.reference(_store.with_index(task, index))
            if ref is not None:
                found.append(ref)
            elif num_returns < 0:
                break
            index += 1
        return found

    def reopen(self, action: a.Reopen) -> None:
        for ref in self.results(action.task.id, action.num_returns):
            attempt = self.store.retry(ref, 0)
            if attempt is not None:
                action.task.attempt = attempt

    def failure(self, kind: str, fields: dict[str, object]) -> bytes:
        """Pack the error that an action names; a `worker` among the fields is replaced by what is known of its death."""
        fields = dict(fields)
        packed = fields.pop("error", None)
        if isinstance(packed, bytes):
            return packed
        death = self._death(fields)
        cls = getattr(errors, kind, None)
        if cls is None:
            cls = {"ValueError": ValueError, "TypeError": TypeError}.get(kind, errors.ZraySystemError)
        if death is not None and issubclass(
            cls, (errors.WorkerCrashedError, errors.ActorError, errors.OutOfMemoryError)
        ):
            fields.setdefault("death", death)
        message = fields.pop("message", None)
        try:
            if issubclass(cls, errors.ZrayError):
                accepted = inspect.signature(cls).parameters
                fields = {name: value for name, value in fields.items() if name in accepted}
            error = cls(message, **fields) if message is not None else cls(**fields)
        except TypeError:
            error = cls(str(message or kind))
        return failures.dump(failures.from_error(error))

    def _death(self, fields: dict[str, object]) -> errors.Death | None:
        """Take what is said of a death out of an error's fields; None when it is not about one."""
        cause, worker, pid = fields.pop("cause", None), fields.pop("worker", None), fields.pop("pid", 0)
        fields.pop("status", None)
        if cause is None:
            return None
        known = self.broker.ends.deaths.get(worker)
        if known is None:
            return errors.Death(errors.DeathCause.parse(str(cause)), pid=pid if isinstance(pid, int) else 0)
        known.cause = errors.DeathCause.parse(str(cause))
        return known

    def _force(self, ref: ObjectRef, data: bytes, kind: int, flags: int) -> None:
        """Seal an object whoever has claimed it; where there is no room for the data, with a small error that says so."""
        try:
            while True:
                try:
                    self.store.seal_forced(ref, data, kind, flags)
                    return
                except _store.StoreFull as full:
                    if not self.broker.objects.make_room(full.size):
                        break
        except (errors.ObjectStoreFullError, errors.OutOfDiskError, errors.ZraySystemError):
            pass
        self.store.seal_forced(ref, failures.NO_ROOM_DATA, _store.KIND_ERROR_FLAG, _store.FLAG_SYSTEM_ERROR)

    def seal_error(self, action: a.SealError) -> None:
        data = self.failure(action.kind, action.fields)
        refs = self.results(action.task, action.num_returns)
        for ref in refs:
            self.seal_failure(ref, data)
        if self.broker.sharing is not None:
            self.broker.sharing.found([ref.binary() for ref in refs])
            self.broker.sharing.tasks_ended([action.task], {}, [0])
        if self.broker.remote is not None:
            self.broker.remote.look_at([action.task])

    def seal_failure(self, ref: ObjectRef, failure: bytes) -> None:
        """Seal a packed failure that is not the task's own, whoever has claimed the object."""
        self._force(ref, failure, _store.KIND_ERROR_FLAG, _store.FLAG_SYSTEM_ERROR)

    def seal_errors(self, action: a.SealErrors) -> None:
        for task in action.tasks:
            self.seal_error(a.SealError(task, action.num_returns, action.kind, action.fields))

    def seal_entries(self, action: a.SealEntries) -> None:
        data = self.failure(action.kind, action.fields)
        for object_id in action.ids:
            ref = self.store.reference(object_id)
            if ref is not None:
                self.seal_failure(ref, data)
        if self.broker.sharing is not None:
            self.broker.sharing.found(action.ids)

    def watch_objects(self, action: a.WatchObjects) -> None:
        self.broker.look_again(action.ids)

    def seal_reply(self, action: a.SealReply) -> None:
        ref = self.store.reference(action.reply)
        if ref is None:
            return
        if action.error is not None:
            kind, fields = action.error
            self._force(ref, self.failure(kind, fields), _store.KIND_ERROR_FLAG, 0)
        else:
            self._force(ref, _encode(action.value), KIND_REPLY, 0)

    # -- leases -------------------------------------------------------------------------------------------------------

    def grant_lease(self, action: a.GrantLease) -> None:
        worker = self.broker.workers[action.worker]
        self.store.set_word(worker.process, wire.WORD_LEASE, action.epoch)
        self._define(action.worker, [action.shape])
        lanes = self.broker.lanes
        if lanes is not None and lanes.takes(action.reply):
            lanes.leased(action.reply, action.worker, action.epoch)
            return
        lease = wire.Lease(action.worker, worker.process, action.epoch)
        self.seal_reply(a.SealReply(action.reply, lease))

    def revoke_lease(self, action: a.RevokeLease) -> None:
        worker = self.broker.workers.get(action.worker)
        if worker is not None and worker.process:
            self.store.set_word(worker.process, wire.WORD_LEASE, action.epoch)

    # -- actors -------------------------------------------------------------------------------------------------------

    def expect_address(self, actor: bytes, incarnation: int) -> ObjectRef:
        """Make the address object of an incarnation."""
        refs = self.addresses.setdefault(actor, [])
        while len(refs) <= incarnation:
            refs.append(self.store.expect(_store.with_index(actor, len(refs) + 1), 0, None, None, ""))
        return refs[incarnation]

    def skip_incarnations(self, actor: bytes, first: int) -> None:
        """An actor has had incarnations on other nodes: `first` is the first here. Whoever looks for an earlier one goes on to it."""
        self.expect_address(actor, first)
        for incarnation in range(first):
            self._force(
                self.expect_address(actor, incarnation),
                self.failure("ActorUnavailableError", {}),
                _store.KIND_ERROR_FLAG,
                0,
            )

    def hold_for(self, spec: ActorSpec) -> None:
        """Keep the arguments of a constructor for as long as the actor may be started again, and a detached actor without
        any handle."""
        creation = spec.creation
        held = [ref for dep in (*creation.deps, *creation.borrowed) if (ref := self.store.reference(dep)) is not None]
        if held:
            self.arguments[creation.id] = held
        if spec.detached and (life := self.store.reference(creation.id)) is not None:
            self.detached[creation.id] = life

    def actor_unreferenced(self, actor: bytes) -> None:
        """No handle and no call is left anywhere: once it is dead nobody will look at its address objects."""
        if actor in self.broker.scheduler.node.actors.actors:
            self.unreferenced.add(actor)
        else:
            self._forget_actor(actor)

    def _forget_actor(self, actor: bytes) -> None:
        self.addresses.pop(actor, None)
        self.arguments.pop(actor, None)
        self.unreferenced.discard(actor)

    def begin_actor(self, action: a.BeginActor) -> None:
        worker = self.broker.workers[action.worker]
        worker.actor = action.spec.creation.id
        self.expect_address(action.spec.creation.id, action.incarnation)
        start = wire.StartActor(action.spec, action.incarnation, action.replay)
        if action.spec.checkpoint_every:
            start = self.broker.checkpoints.start(action, worker.process) or start
        calls = [*start.logged, *action.replay]
        self._define(action.worker, [action.spec.creation.shape, *[call.shape for call in calls]])
        self._retarget(calls, worker)
        self.send(action.worker, start)

    def _retarget(self, calls: list[TaskSpec], worker: WorkerProcess) -> None:
        for call in calls:
            for ref in self.results(call.id, a.UNKNOWN_RETURNS):
                try:
                    self.store.retarget(ref, worker.process)
                except _store.TargetGone:
                    if self.store.state(ref) == _store.STATE_PENDING:
                        worker.undelivered[call.id] = call

    def actor_alive(self, action: a.ActorAlive) -> None:
        worker = self.broker.workers[action.worker]
        ref = self.expect_address(action.actor, action.incarnation)
        remote = self.broker.remote_actors
        if remote is not None:
            remote.alive(action.actor, action.incarnation, worker.pid)
            if action.actor in remote.behind_broker:
                return
        self.broker.records.actor_alive(
            action.actor, action.incarnation, action.worker, worker.pid, bytes.fromhex(self.broker.config.node)
        )
        address = wire.ActorAddress(action.worker, worker.process, action.incarnation)
        # Who gets an answer of a detached actor may rely on it to come back with the head.
        self.broker.records.tables.when_stored(lambda: self._force(ref, _encode(address), KIND_REPLY, 0))

    def actor_down(self, action: a.ActorDown) -> None:
        self.broker.records.actor_down(action.actor, action.next, str(action.fields.get("cause", action.kind)))
        if action.next:
            self.expect_address(action.actor, action.incarnation + 1)
            current = self.expect_address(action.actor, action.incarnation)
            self._force(current, self.failure("ActorUnavailableError", {}), _store.KIND_ERROR_FLAG, 0)
            return
        data = self.failure(action.kind, action.fields)
        for incarnation in (action.incarnation, action.incarnation + 1):
            self._force(self.expect_address(action.actor, incarnation), data, _store.KIND_ERROR_FLAG, 0)
        if self.broker.remote_actors is not None:
            cause = str(action.fields.get("cause", ""))
            self.broker.remote_actors.dead(action.actor, action.kind, cause, data)
        self.detached.pop(action.actor, None)
        self.arguments.pop(action.actor, None)
        if action.actor in self.unreferenced:
            self._forget_actor(action.actor)

    def forward_calls(self, action: a.ForwardCalls) -> None:
        worker = self.broker.workers.get(action.worker)
        if worker is None:
            return
        self._define(action.worker, [call.shape for call in action.calls])
        self._retarget(action.calls, worker)
        self.send(action.worker, wire.CallActor(action.process, action.incarnation, action.calls))

    def send_again(self, caller: int, target: int, calls: list[TaskSpec]) -> None:
        """Send the unclaimed calls of a dead caller to the living process they were meant for: they may never have left."""
        number = next((n for n, w in self.broker.workers.items() if w.process == target), 0)
        if not number:
            return
        actor = self.broker.scheduler.node.actors.actors.get(self.broker.workers[number].actor)
        self._define(number, [call.shape for call in calls])
        if actor is None:
            self.send(number, wire.RunTasks(calls))
        else:
            self.send(number, wire.CallActor(caller, actor.incarnation, calls))
            self.send(number, wire.CallerGone(caller))

    def end_actor(self, action: a.EndActor) -> None:
        self.send(action.worker, wire.ExitWhenIdle(action.reason))

    # -- actors on other nodes ----------------------------------------------------------------------------------------

    def host_actor(self, action: a.HostActor) -> None:
        if self.broker.remote_actors is not None:
            self.broker.remote_actors.host_at(action)

    def call_at(self, action: a.CallAt) -> None:
        if self.broker.remote is not None:
            self.broker.remote.call_at(action.node, action.job, action.actor, action.calls, action.lane)

    def kill_at(self, action: a.KillAt) -> None:
        if self.broker.remote_actors is not None:
            self.broker.remote_actors.kill_at(action)

    def end_actor_at(self, action: a.EndActorAt) -> None:
        if self.broker.remote_actors is not None:
            self.broker.remote_actors.end_at(action)

    def name_freed(self, action: a.NameFreed) -> None:
        if self.broker.remote_actors is not None:
            self.broker.remote_actors.name_freed(action.namespace, action.name)

    # -- the rest -----------------------------------------------------------------------------------------------------

    def interrupt_task(self, action: a.InterruptTask) -> None:
        ref = self.store.reference(_store.with_index(action.task, 1))
        if ref is None:
            return
        # Claimed here, it cannot be begun any more.
        if self.store.claim(action.task, 1, self.store.attempt(ref)) is not None:
            fields: dict[str, object] = {"task_id": action.task.hex(), "function_name": action.function_name}
            self.seal_error(a.SealError(action.task, a.UNKNOWN_RETURNS, "TaskCancelledError", fields))
            self.broker.look_again([result.binary() for result in self.results(action.task, a.UNKNOWN_RETURNS)])
        else:
            self._signal(self.broker.executor_of(action.task), action.task)

    def _signal(self, number: int, task: bytes) -> None:
        """Have a worker interrupt a task that it has claimed."""
        worker = self.broker.workers.get(number)
        if worker is None or not worker.process:
            return
        actor = self.broker.scheduler.node.actors.actors.get(worker.actor)
        if actor is not None and (actor.spec.is_async or actor.spec.max_concurrency > 1):
            self.send(number, wire.CancelTask(task, False, False))
            return
        if self.store.word(worker.process, wire.WORD_CANCEL):
            self.interrupts.append((number, task))  # it has not taken the last one
            return
        self.store.set_word(worker.process, wire.WORD_CANCEL, int.from_bytes(task[:8], "little"))
        try:
            os.kill(worker.pid, signal.SIGUSR2)
        except ProcessLookupError:
            pass

    def repeat_interrupts(self) -> None:
        """Try again those that had to wait."""
        waiting, self.interrupts = self.interrupts, []
        for number, task in waiting:
            self._signal(number, task)

    def forget_shapes(self, action: a.ForgetShapes) -> None:
        # In a cluster other nodes say once what a shape is, and name it ever after.
        shapes = self.broker.shapes if self.broker.cluster is None else {}
        for key in action.shapes:
            if shapes.pop(key, None) is not None:
                self.broker.records.shape_forgotten(key)

    def record_event(self, action: a.RecordEvent) -> None:
        self.broker.records.event(action.table, action.key, action.what, action.detail)

    def warn(self, action: a.Warn) -> None:
        self.broker.warn(action.job, action.key, action.text)
