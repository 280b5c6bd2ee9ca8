"""The broker's loop: socket -> event -> scheduler -> actions -> socket. No decisions here.

Covers the broker's state at the edge (jobs, workers, shapes, connections), the translation of messages into events, and the end of the node. Does not
cover what is decided (`scheduler`), how actions are carried out (`performer`), lives and deaths of processes (`worker_ends`), or answers about state
(`status`).
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, Final

import msgspec

from zray import _store, errors, failures, wire
from zray.broker import actions as a
from zray.broker import events as e
from zray.broker import peer_messages as pm
from zray.broker import status, walk
from zray.broker.checkpoints import Checkpoints
from zray.broker.groups import Groups
from zray.broker.jobs import GUEST_BIT
from zray.broker.membership import NodeLoad, State
from zray.broker.performer import Performer
from zray.broker.processes import ForkChannel, WorkerProcess, kill_group
from zray.broker.records import Records
from zray.broker.scheduler import Scheduler, SchedulerConfig
from zray.broker.worker_ends import WorkerEnds
from zray.object_store import ObjectStore
from zray.session import KIND_REPLY, SessionConfig
from zray.transport import Context, Poller, ipc_endpoint

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from zray.broker.cluster import Cluster
    from zray.broker.config import BrokerConfig
    from zray.broker.lanes import Lanes
    from zray.broker.membership import NodeInfo
    from zray.broker.object_sharing import ObjectSharing
    from zray.broker.output import RemoteOutput
    from zray.broker.remote_actors import RemoteActors
    from zray.broker.remote_tasks import RemoteTasks
    from zray.object_store import ObjectRef
    from zray.task import CallShape, JobSpec, TaskSpec

_TICK_S: Final = 0.1
_IDLE_TICK_S: Final = 0.25
_SWEEP_S: Final = 1.0
_EARLY_S: Final = 5.0
"""Seconds that calls of an actor nobody has asked for yet are kept."""
_FRAMES_PER_ROUND: Final = 256
_TOUCH_FROM: Final = 4 << 20
_TOUCH_AHEAD: Final = 256 << 20
_TOUCH_PIECE: Final = 16 << 20
"""Bytes: see `Broker._touch_ahead`."""


class Job:
    """A driver's program."""

    __slots__ = ("pidfd", "process", "spec", "tail")

    def __init__(self, spec: JobSpec, process: int, pidfd: int) -> None:
        self.spec = spec
        self.process = process
        self.pidfd = pidfd


class Broker:
    """One node's broker."""

    def __init__(
        self, config: BrokerConfig, store: _store.Store, fd: int, channel: socket.socket, fork_parent_pid: int
    ) -> None:
        self.config = config
        self.store = store
        self.fd = fd
        store.register(_store.PROC_BROKER)
        self.objects = ObjectStore(store, config.spill_directory)
        self.context = Context(1 if config.cluster is None else 2)
        self.inbox = self.context.inbox(ipc_endpoint(config.directory, "b"))
        self.forks = ForkChannel(channel, fork_parent_pid)
        self.poller = Poller(self.inbox)
        self.poller.add(self.forks.fileno())
        self.node = bytes.fromhex(config.node)
        self.jobs: dict[int, Job] = {}
        self.job_specs: dict[int, JobSpec] = {}
        """Of ended jobs, too: their detached actors may be started again."""
        self.workers: dict[int, WorkerProcess] = {}
        self.shapes: dict[bytes, CallShape] = {}
        self.watched: dict[bytes, None] = {}
        self.started = time.time()
        self.malformed = 0
        self.running = True
        self._told_to_stop = False
        self._jobs_seen = 0
        self._early: dict[bytes, list[tuple[float, e.Event]]] = {}
        self._warned: set[tuple[int, str]] = set()
        self._next_sweep = 0.0
        self._next_tick = time.monotonic() + _TICK_S
        grows = config.cluster_may_grow or config.cluster is not None
        runs_nothing = config.cluster is not None and (config.cluster.serves_one or not config.cluster.host)
        self.scheduler = Scheduler(
            dict(config.resources),
            SchedulerConfig(cluster_may_grow=grows, runs_nothing=runs_nothing),
            own=self.node,
            labels=dict(config.labels),
        )
        self.records = Records(self.context.publisher, config, store)
        self.records.gcs.on_taken = self._end_because
        self.performer = Performer(self)
        self.checkpoints = Checkpoints(self)
        self.ends = WorkerEnds(self, self._knows)
        self.cluster: Cluster | None = None
        self.sharing: ObjectSharing | None = None
        self.walk = walk.Walk(self) if config.trace else None
        self.remote: RemoteTasks | None = None
        self.remote_actors: RemoteActors | None = None
        self.lanes: Lanes | None = None
        self.output: RemoteOutput | None = None
        if config.cluster is not None:
            # Imported here, as all that only clusters need: a node alone starts some 10 ms sooner without.
            from zray.broker.cluster import Cluster

            self.cluster = Cluster(
                config, config.cluster, self.context, self.poller, self.records.gcs, self._own_load, self._end_because
            )
            self._work_with(self.cluster)
        self.groups = Groups(self, self.cluster)
        self.driver_pidfd = os.pidfd_open(config.driver_pid) if config.driver_pid else -1
        if self.driver_pidfd >= 0:
            self.poller.add(self.driver_pidfd)
        signal.signal(signal.SIGTERM, lambda *_: self.stop())
        self._handlers: dict[type[wire.Message], Callable[[Any], None]] = {
            wire.Hello: self._hello,
            wire.Goodbye: self._goodbye,
            wire.WorkerReady: self._worker_ready,
            wire.DefineShapes: self._define_shapes,
            wire.SubmitTasks: self._submit_tasks,
            wire.TasksDone: self._tasks_done,
            wire.Blocked: lambda m: self.tell(e.WorkerBlocked(m.worker)),
            wire.Unblocked: lambda m: self.tell(e.WorkerUnblocked(m.worker)),
            wire.Sealed: self._sealed,
            wire.Wanted: self._wanted,
            wire.LeaseRequest: self._lease_requested,
            wire.LeaseReturn: lambda m: self.tell(e.LeaseReturned(m.worker, m.epoch)),
            wire.CreateActor: self._create_actor,
            wire.SubmitActorCalls: self._actor_calls,
            wire.ActorReady: lambda m: self.tell(e.ActorConstructed(m.worker, m.process, m.actor)),
            wire.ActorFailed: lambda m: self.tell(e.ActorConstructionFailed(m.worker, m.actor, m.error)),
            wire.ActorExit: lambda m: self.tell(e.ActorLeft(m.worker, m.actor)),
            wire.LogCalls: self.checkpoints.logged,
            wire.SaveCheckpoint: self.checkpoints.saving,
            wire.CancelTask: self.cancel,
            wire.KillActor: self._kill_actor,
            wire.LookupActor: self._lookup_actor,
            wire.OpenLane: self._open_lane,
            wire.CloseLane: lambda m: None if self.lanes is None else self.lanes.close(m),
            wire.VisitorsRefused: self._visitors_refused,
            wire.SubmitLaneTasks: lambda m: None if self.lanes is None else self.lanes.hand_over(m),
            wire.LaneTasksDone: self._lane_tasks_done,
            wire.CreateGroup: self.groups.create,
            wire.RemoveGroup: self.groups.remove,
            wire.AwaitGroup: self.groups.await_ready,
            wire.GcsRequest: self._gcs_request,
            wire.Query: self._query,
        }

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the session ends, then leave nothing behind."""
        try:
            while self.running:
                self.round(max(0.0, self.wake_at - time.monotonic()))
        except BaseException:
            # Whoever started the node shows the log, and removes what is left.
            traceback.print_exc()
            self._end(keep_log=True)
            raise
        self._end(keep_log=bool(self.heirs))

    @property
    def wake_at(self) -> float:
        """When a round is wanted at the latest (monotonic seconds), whatever comes."""
        found = min(self._next_tick, self.scheduler.wake_at)
        if self.cluster is not None:
            found = min(found, self.cluster.wake_at)
        return found if self.sharing is None else min(found, self.sharing.exchange.transfer.wake_at)

    def round(self, wait: float) -> None:
        """Wait at most so many seconds for something to happen, and see to all that has."""
        cluster = self.cluster
        exchange = None if self.sharing is None else self.sharing.exchange
        has_messages, descriptors, has_news = self.poller.wait(int(wait * 1000) + 1)
        if has_messages:
            self._serve_inbox()
            if self.remote is not None:
                self.remote.flush()
            if self.ends.ahead:
                self.ends.serve_ahead()
        elif self.ends.unsent:
            self.ends.settle_unsent()
        if descriptors:
            self._serve_descriptors(descriptors)
        now = time.monotonic()
        if cluster is not None:
            if has_news:
                cluster.serve(now)
                if self.remote is not None:
                    self.remote.flush()
                if exchange is not None:
                    exchange.transfer.by_link.pump()
            if now >= cluster.wake_at:
                cluster.tick(now)
        if exchange is not None and now >= exchange.transfer.wake_at:
            exchange.transfer.tick(now)
        if now >= self._next_tick or now >= self.scheduler.wake_at:
            self._tick(now)
            self._next_tick = now + (_IDLE_TICK_S if self.scheduler.is_idle() else _TICK_S)
        self.records.gcs.commit()
        if cluster is not None:
            cluster.end_round(time.monotonic())
            if self.remote is not None:
                self.remote.flush()

    def _serve_inbox(self) -> None:
        for _ in range(_FRAMES_PER_ROUND):
            frame = self.inbox.next_frame_nowait()
            if frame is None:
                return
            try:
                message = wire.decode(frame)
                handler = self._handlers[type(message)]
            except (wire.FrameError, KeyError) as error:
                self.malformed += 1
                print(f"[zray] broker dropped a frame: {error}", file=sys.stderr, flush=True)
                continue
            handler(message)

    def tell(self, event: e.Event) -> None:
        """Let the scheduler know, and do what it asks for."""
        actions = self.scheduler.handle(event, time.monotonic())
        if actions:
            self.performer.perform(actions)
        if self.groups.waiting:
            self.groups.look()

    def reply(self, reply: bytes, data: bytes) -> None:
        """Seal a reply object with packed bytes."""
        ref = self.store.reference(reply)
        if ref is not None:
            self.performer._force(ref, data, KIND_REPLY, 0)

    # -- messages -----------------------------------------------------------------------------------------------------

    def _hello(self, message: wire.Hello) -> None:
        self._jobs_seen += 1
        number = self._jobs_seen if self.cluster is None else self.cluster.job_number(self._jobs_seen)
        spec = msgspec.structs.replace(message.job, number=number)
        try:
            pidfd = os.pidfd_open(spec.driver_pid)
        except OSError:
            return
        self.jobs[number] = Job(spec, message.process, pidfd)
        self.job_specs[number] = spec
        self.poller.add(pidfd)
        self.records.job_started(spec)
        self.tell(e.JobStarted(spec, message.process))
        reply = wire.HelloReply(number, self.node, self.config.session, dict(self.config.resources))
        # No number is given twice, whatever becomes of this process now.
        self.records.tables.when_stored(lambda: self.reply(message.reply, msgspec.msgpack.encode(reply)))

    def _goodbye(self, message: wire.Goodbye) -> None:
        self._end_job(message.job, "the driver has ended")

    def _end_job(self, number: int, reason: str) -> None:
        job = self.jobs.get(number)
        if job is None:
            return
        self.process_gone(job.process)
        self.tell(e.JobEnded(number, reason))
        self.groups.job_over(number)
        if self.cluster is not None:
            self.cluster.tell_all_others(pm.JobOver(number, reason))
        if self.remote is not None:
            self.remote.job_over(number, reason)
        if self.output is not None:
            self.output.job_over(number)
        self.records.job_ended(job.spec, reason)
        self.poller.remove(job.pidfd)
        os.close(job.pidfd)
        del self.jobs[number]

    def process_gone(self, process: int) -> None:
        """A driver has ended, or a worker is dead."""
        self.tell(e.ProcessGone(process))
        if self.lanes is not None:
            self.lanes.process_gone(process)

    def _worker_ready(self, message: wire.WorkerReady) -> None:
        worker = self.workers.get(message.worker)
        if worker is not None:
            worker.process = message.process
            # Its place in the store is known only now: the machine is told of the start again, completed.
            self.tell(e.WorkerStarted(message.worker, worker.pid, message.process))
            self.tell(e.WorkerIsReady(message.worker))

    def _define_shapes(self, message: wire.DefineShapes) -> None:
        for shape in message.shapes:
            self.shapes[shape.key] = shape
        self.records.shapes_defined(message.shapes)
        self.tell(e.ShapesDefined(message.shapes))

    def _missing(self, deps: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """The dependencies that are not sealed here, where they are needed: those on other nodes are brought. The store will tell when they are."""
        missing = self._unsealed(deps)
        if missing and self.sharing is not None:
            self.sharing.fetch(missing)
        return missing

    def _not_made(self, deps: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """The dependencies that do not exist anywhere yet."""
        missing = self._unsealed(deps)
        if missing and self.sharing is not None:
            elsewhere = self.sharing.locations.elsewhere
            return tuple([dep for dep in missing if not elsewhere(dep)])
        return missing

    def _unsealed(self, deps: tuple[bytes, ...]) -> tuple[bytes, ...]:
        unsealed = tuple([dep for dep in deps if self.store.watch(dep) is True])
        for dep in unsealed:
            self.watched[dep] = None
        return unsealed

    def submit_again(self, job: int, spec: TaskSpec) -> None:
        """Run a task of this node again: its results are lost."""
        self.tell(e.TasksSubmitted(job, 0, b"", [spec], [self._not_made(spec.deps)]))

    def _submit_tasks(self, message: wire.SubmitTasks) -> None:
        missing: list[tuple[bytes, ...]] | None = None
        for index, spec in enumerate(message.tasks):
            if spec.deps:
                lacking = self._not_made(spec.deps)
                if lacking:
                    if missing is None:
                        missing = [()] * len(message.tasks)
                    missing[index] = lacking
        self.store.add_word(message.process, wire.WORD_CONSUMED, 1)
        self.records.tasks_submitted(message.job, message.tasks)
        if self.walk is not None:
            for spec in message.tasks:
                self.walk.note("tasks", spec.id, walk.SUBMITTED)
                self.walk.lacking(spec.id, spec.deps)
        self.tell(e.TasksSubmitted(message.job, message.process, message.parent, message.tasks, missing))

    def _tasks_done(self, message: wire.TasksDone) -> None:
        done = message.ids
        names = [done[i : i + 16] for i in range(0, len(done), 16)]
        worker = self.workers.get(message.worker)
        if worker is not None and names and not worker.job & GUEST_BIT:  # rows of guests are where they came from
            self.records.tasks_finished(worker.job, message.worker, names, message.statuses, message.micros)
        if self.sharing is not None and len(self.sharing.recovery):
            self.sharing.ended_here(names, message.statuses, message.micros)
        self.tell(e.TasksFinished(message.worker, names, message.statuses, message.micros, message.idle))
        if self.remote is not None:
            self.remote.told(message.worker, names)
            self.remote.look_at(names, message.statuses, message.micros)

    def _sealed(self, message: wire.Sealed) -> None:
        self.objects_there([message.ids[i : i + 16] for i in range(0, len(message.ids), 16)])

    def objects_there(self, done: list[bytes]) -> None:
        """These are sealed: tasks here and nodes elsewhere may wait for them."""
        if self.watched:
            for object_id in done:
                self.watched.pop(object_id, None)
        if self.sharing is not None:
            self.sharing.found(done)
        self.tell(e.ObjectsReady(done))
        self.checkpoints.objects_there(done)
        if self.sharing is not None and self.remote is not None:
            self.sharing.sealed(done)
            if self.remote.guests:
                self.remote.look_at([_store.with_index(object_id, 0) for object_id in done])

    def objects_made(self, names: list[bytes]) -> None:
        """These exist, on other nodes."""
        self.tell(e.ObjectsMade(names))
        if self.remote is not None:
            self.remote.look_at([_store.with_index(name, 0) for name in names])

    def _wanted(self, message: wire.Wanted) -> None:
        if self.sharing is not None:
            self.sharing.want([message.ids[i : i + 16] for i in range(0, len(message.ids), 16)])

    def look_again(self, objects: list[bytes]) -> None:
        """Tell the scheduler which of these are sealed although no notice came (its sender may have died)."""
        done = [object_id for object_id in objects if self.store.watch(object_id) is not True]
        if done:
            self.objects_there(done)

    def _lease_requested(self, message: wire.LeaseRequest) -> None:
        if self.lanes is None or not self.lanes.lease(message):
            self.tell(e.LeaseRequested(message.process, message.job, message.shape, message.reply))

    def _lane_tasks_done(self, message: wire.LaneTasksDone) -> None:
        names = [message.ids[i : i + 16] for i in range(0, len(message.ids), 16)]
        if not message.job & GUEST_BIT:
            self.records.tasks_finished(message.job, 0, names, message.statuses, message.micros)

    def _open_lane(self, message: wire.OpenLane) -> None:
        if self.lanes is None:
            self.reply(message.reply, b"")
        else:
            self.lanes.open(message)

    def _visitors_refused(self, message: wire.VisitorsRefused) -> None:
        if self.lanes is not None:
            self.lanes.refused += message.count

    def _create_actor(self, message: wire.CreateActor) -> None:
        if self.remote_actors is None:
            self.admit_actor(message)
        else:
            self.remote_actors.create(message)

    def _lookup_actor(self, message: wire.LookupActor) -> None:
        if self.remote_actors is None:
            self.tell(e.ActorLookup(message.name, message.namespace, message.reply))
        else:
            self.remote_actors.lookup(message)

    def admit_actor(self, message: wire.CreateActor) -> None:
        """Make an actor, whose name is its own by now."""
        actor = message.spec.creation.id
        self.performer.expect_address(actor, 0)
        self.records.actor_requested(message.spec)
        self.tell(
            e.ActorRequested(message.process, message.spec, self._missing(message.spec.creation.deps), message.reply)
        )
        if actor in self.scheduler.node.actors.actors:  # not when its name was taken
            self.performer.hold_for(message.spec)
        for _, event in self._early.pop(actor, ()):
            self._tell_of_actor(actor, event)

    def _actor_calls(self, message: wire.SubmitActorCalls) -> None:
        if self.remote is not None and self.is_elsewhere(message.actor):
            self.remote.call_away(message.job, message.actor, message.calls, message.lane)
            return
        if self.remote_actors is not None and message.actor in self.remote_actors.behind_broker:
            for call in message.calls:
                call.sequence = 0
        self.queue_calls(
            e.ActorCallsQueued(
                message.process, message.job, message.actor, message.incarnation, message.calls, message.lane
            )
        )

    def queue_calls(self, event: e.ActorCallsQueued) -> None:
        """Calls that come through the broker."""
        self._actor_event(event.actor, event)

    def is_elsewhere(self, actor: bytes) -> bool:
        """Whether an actor lives on another node, as far as is known here."""
        known = self.scheduler.node.actors
        if self.sharing is None or actor in known.actors or actor in known.dead:
            return False
        return actor in self.sharing.lending.borrowed

    def _kill_actor(self, message: wire.KillActor) -> None:
        self.kill_actor(message.actor, message.no_restart)

    def kill_actor(self, actor: bytes, no_restart: bool) -> None:
        """Kill an actor, wherever it lives."""
        if self.remote is None or not self.is_elsewhere(actor) or not self.remote.kill_away(actor, no_restart):
            self._actor_event(actor, e.ActorKill(actor, no_restart))

    def _actor_event(self, actor: bytes, event: e.Event) -> None:
        """Tell the scheduler what concerns an actor, after the request for that actor."""
        if not self._is_early(actor, event):
            self._tell_of_actor(actor, event)

    def _tell_of_actor(self, actor: bytes, event: e.Event) -> None:
        self.tell(event)
        if isinstance(event, e.ActorUnreferenced):
            self.performer.actor_unreferenced(actor)

    def _is_early(self, actor: bytes, event: e.Event) -> bool:
        """Keep an event that overtook the request for its actor.

        A handle travels through the store, the request over the maker's own socket: whoever gets the handle may be heard
        first, and the store may report that no handle is left. That the actor is to come shows in its pending address.
        """
        known = self.scheduler.node.actors
        if actor in known.actors or actor in known.dead:
            return False
        address = self.store.reference(_store.with_index(actor, 1))
        if address is None or self.store.done(address):
            return False
        self._early.setdefault(actor, []).append((time.monotonic() + _EARLY_S, event))
        return True

    def _repeat_early(self, now: float) -> None:
        """Events whose actor never came (its maker died on the way) go their ordinary way."""
        for actor in [actor for actor, kept in self._early.items() if kept[0][0] <= now]:
            for _, event in self._early.pop(actor):
                self._tell_of_actor(actor, event)

    def cancel(self, message: wire.CancelTask, results: Sequence[ObjectRef] = (), error: bytes = b"") -> None:
        """Nobody waits for a task any more. Its `results`, as far as they are not there, say `error`; else that it was cancelled."""
        worker = self.executor_of(message.task)
        ref = self.store.reference(_store.with_index(message.task, 1))
        begun = ref is not None and self.store.state(ref) != _store.STATE_PENDING
        for result in results:
            if not self.store.done(result):
                self.performer.seal_failure(result, error)
        self.tell(e.TaskCancel(message.task, message.force, message.recursive, worker, begun))
        if self.remote is not None:
            self.remote.cancel_call(message.task, message.force)

    def executor_of(self, task: bytes) -> int:
        """The worker that the store names as target or claimant of a task's first result; 0 for none."""
        ref = self.store.reference(_store.with_index(task, 1))
        if ref is None:
            return 0
        makers = self.store.makers(ref)
        for worker in self.workers.values():
            if worker.process and worker.process in makers:
                return worker.number
        return 0

    def _gcs_request(self, message: wire.GcsRequest) -> None:
        if self.cluster is None:
            self.records.gcs.serve_request(message.body, lambda answer: self.reply(message.reply, answer))
        else:
            self.cluster.request(message.body, lambda answer: self.reply(message.reply, answer))

    def _query(self, message: wire.Query) -> None:
        if message.what == "named_actors" and self.remote_actors is not None:
            self.remote_actors.list_names(
                message.argument, lambda names: self.reply(message.reply, msgspec.msgpack.encode(names))
            )
            return
        self.reply(message.reply, status.answer(self, message.what, message.argument))

    # -- processes ----------------------------------------------------------------------------------------------------

    def _serve_descriptors(self, descriptors: list[int]) -> None:
        if self.cluster is not None:
            self.cluster.serve_descriptors(descriptors, time.monotonic())
        for fd in descriptors:
            if fd == self.driver_pidfd:
                self.running = False
            elif fd == self.forks.fileno():
                self.ends.serve_fork_parent()
            elif self.sharing is not None and fd in self.sharing.exchange.transfer.descriptors:
                self.sharing.exchange.transfer.take_in()
            else:
                for number, job in list(self.jobs.items()):
                    if job.pidfd == fd:
                        self._driver_died(number, job)

    def _driver_died(self, number: int, job: Job) -> None:
        self._end_job(number, "the driver has died")
        self.ends.driver_died(job.process)

    def _knows(self, key: bytes) -> bool:
        if self.scheduler.keeps(key) or self.checkpoints.keeps(key):
            return True
        return (self.remote is not None and self.remote.keeps(key)) or any(
            spec.id == key
            for kept in self._early.values()
            for _, event in kept
            if isinstance(event, e.ActorCallsQueued)
            for spec in event.calls
        )

    # -- time ---------------------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        while (name := self.store.next_zombie()) is not None:
            if self.sharing is None or not self.sharing.unreferenced(name):
                self._actor_event(name, e.ActorUnreferenced(name))
            elif self.remote_actors is not None:
                self.remote_actors.unreferenced(name)
        if self.watched:
            self.look_again(list(self.watched))
        if self.performer.interrupts:
            self.performer.repeat_interrupts()
        self._repeat_early(now)
        if self.sharing is not None:
            self.sharing.look_for_unwanted()
        if self.ends.ahead:
            self.ends.serve_ahead()
        busy = frozenset(w.number for w in self.workers.values() if w.process and self.store.expected(w.process))
        self.tell(e.Tick(busy))
        self.records.gcs.tick(now)
        if self.remote_actors is not None:
            self.remote_actors.tick(now)
        if self.output is not None:
            self.output.send_all()
        if self.walk is not None:
            self.walk.send()
        self._touch_ahead()
        if now >= self._next_sweep:
            self._next_sweep = now + _SWEEP_S
            self.store.sweep()
            with contextlib.suppress(OSError):  # no directory, or no descriptors: the next time
                self.objects.remove_stale_files()

    def _touch_ahead(self) -> None:
        """While a core is idle, allocate memory that objects will want: first touch is most of its price. Nothing before the store was used in
        earnest, at most as much again as was used, and a small piece at a time, so that no message waits."""
        figures = self.store.statistics()
        used, committed = figures["high_water"], figures["committed"]
        if used < _TOUCH_FROM or self.scheduler.statistics()["workers_busy"] >= self.scheduler.node.cpus:
            return
        if self.sharing is not None and self.sharing.exchange.transfer.is_moving():
            return  # its threads encrypt and copy as fast as they can
        if committed - used < min(used, _TOUCH_AHEAD):
            self.store.touch_ahead(committed - used + _TOUCH_PIECE)

    # -- lives of the head ---------------------------------------------------------------------------------------------

    def begin_life(self) -> None:
        """Join the cluster, or (the head) go on with the one whose rows are stored. Raises CannotJoin."""
        if self.cluster is None:
            return
        from zray.broker import revival
        from zray.broker.cluster import JOB_BITS

        self.cluster.join()
        if self.cluster.is_head:
            gcs = self.records.tables = self.cluster.gcs
            self._jobs_seen = revival.newest_job(gcs, JOB_BITS)
            if self.cluster.last_head:
                revival.end_rows_of(gcs, self.cluster.last_head, "the head was started again")
                revival.end_old_groups(gcs)
                self.groups.take_over(self.cluster.lives)
                self.records.gcs.abandon_tasks()
                revival.make_again(self)
            self.records.on_alive = lambda actor: revival.keep_creation(self, actor)
            if gcs is not self.records.gcs:
                self.records.share = self.cluster.share
            gcs.commit()
        else:
            self.records.share = self.cluster.share
            self.cluster.on_new_head = self._head_replaced
            self.cluster.succession.on_become_head = self._become_head

    def _head_replaced(self) -> None:
        """The head has begun another life, and knows of this node what is stored."""
        self.records.share_all()
        self.groups.head_replaced()

    def _become_head(self) -> None:
        """This node is the head from now on; the last one is dead, and what it owned ends or is made again here."""
        from zray.broker import revival

        assert self.cluster is not None
        gcs = self.records.tables = self.cluster.gcs
        self.records.on_alive = lambda actor: revival.keep_creation(self, actor)
        revival.end_old_groups(gcs)
        self.groups.take_over(self.cluster.lives)
        self.records.share_all()
        revival.make_again(self)

    # -- the cluster --------------------------------------------------------------------------------------------------

    def _work_with(self, cluster: Cluster) -> None:
        """Take part in what nodes do for one another."""
        from zray.broker.lanes import Lanes
        from zray.broker.object_sharing import ObjectSharing
        from zray.broker.output import RemoteOutput
        from zray.broker.remote_actors import RemoteActors
        from zray.broker.remote_tasks import RemoteTasks

        self.store.add_global(wire.GLOBAL_CLUSTER, 1)
        sharing = self.sharing = ObjectSharing(self, cluster)
        exchange = sharing.exchange
        remote = self.remote = RemoteTasks(self, cluster, sharing)
        self.remote_actors = RemoteActors(self, cluster, sharing, remote)
        self.lanes = Lanes(self, cluster)
        self.output = RemoteOutput(self, cluster, remote)
        self.scheduler.node.locations = sharing.locations
        cluster.on_peer = self._peer_changed
        cluster.serve_also(pm.RunTasks, remote.run)
        cluster.serve_also(pm.TasksEnded, self._ended_elsewhere)
        cluster.serve_also(pm.CancelAway, remote.cancel)
        cluster.serve_also(pm.CallActorAway, remote.call)
        cluster.serve_also(pm.KillActorAway, lambda _, m: self.kill_actor(m.actor, m.no_restart))
        cluster.serve_also(pm.JobOver, self._job_over_elsewhere)
        cluster.serve_also(pm.Steps, lambda _, m: None if self.walk is None else self.walk.came(m))
        cluster.serve_also(pm.Want, lambda node, m: sharing.wanted(node, m.ids))
        cluster.serve_also(pm.Located, lambda node, m: sharing.located(node, m, False))
        cluster.serve_also(pm.GetValues, lambda node, m: sharing.fetch_for(node, m.ids))
        cluster.serve_also(pm.CopyAt, sharing.copy_at)
        cluster.serve_also(pm.Lost, lambda _, m: sharing.lost_at_lender(m))
        cluster.serve_also(pm.GiveBack, lambda node, m: sharing.given_back(node, m.ids))
        cluster.serve_also(pm.Value, exchange.received)
        cluster.serve_also(pm.AskStream, lambda node, _: exchange.transfer.stream_wanted(node))
        cluster.serve_also(pm.StreamIs, exchange.transfer.stream_is)
        by_link = exchange.transfer.by_link
        cluster.serve_also(pm.Fetch, by_link.asked)
        cluster.serve_also(pm.Chunk, by_link.chunk)
        cluster.serve_also(pm.NotFetched, by_link.not_fetched)
        cluster.serve_also(pm.Unfetch, by_link.unwanted)
        cluster.serve_also(pm.NoCopy, exchange.no_copy)

    def _ended_elsewhere(self, node: bytes, message: pm.TasksEnded) -> None:
        assert self.remote is not None
        assert self.cluster is not None
        self.remote.ended(node, message)
        self.cluster.load_of(node, message.load)

    def _job_over_elsewhere(self, node: bytes, message: pm.JobOver) -> None:
        assert self.remote is not None
        self.remote.job_over(message.job, message.reason)
        self.groups.job_over(message.job)

    def _peer_changed(self, node: bytes, info: NodeInfo, load: NodeLoad, state: State, reason: str) -> None:
        if state != State.DEAD and info.is_client:
            return  # no place for tasks
        if state != State.DEAD:
            silent = state == State.SILENT
            self.tell(
                e.PeerSeen(node, info.resources, load.available, silent, info.labels, load.queued, load.task_micros)
            )
            self.groups.node_seen(info, load)
            return
        if self.sharing is None or self.remote is None or self.remote_actors is None:
            return
        lost = self.sharing.mark_lost(node)
        if lost:
            self.tell(e.ObjectsLost(lost))
        self.tell(e.PeerGone(node, reason, self.remote.take_away_calls(node, self.scheduler.node.actors.actors)))
        self.remote.node_gone(node, reason)
        self.remote_actors.node_gone(node)
        if self.lanes is not None:
            self.lanes.node_gone(node)
        self.sharing.node_gone(node, reason, lost)
        self.groups.node_gone(node, reason)

    def _own_load(self) -> NodeLoad:
        node = self.scheduler.node
        micros = int(node.ledger.task_seconds * 1e6)
        return NodeLoad(self.scheduler.spare(), node.tasks.queued, len(node.pool.busy), micros)

    def _end_because(self, reason: str) -> None:
        if not self.running:
            return
        print(f"[zray] the node ends: {reason}", file=sys.stderr, flush=True)
        self.running = False
        # Whoever waits learns why.
        states = (_store.STATE_PENDING, _store.STATE_CLAIMED)
        waiting = [row[0] for row in self.store.walk() if row[1] in states]
        outside = self.cluster is not None and self.cluster.is_outside
        what = "the connection to the cluster" if outside else "this node"
        error = failures.dump(failures.from_error(errors.ZraySystemError(f"{what} has ended: {reason}")))
        fields: dict[str, object] = {"error": error}
        self.performer.seal_entries(a.SealEntries(waiting, "ZraySystemError", fields))

    # -- the rest -----------------------------------------------------------------------------------------------------

    def session_config(self, job: JobSpec) -> SessionConfig:
        """What a worker of a job must know of the session."""
        return SessionConfig(
            self.config.directory,
            self.config.spill_directory,
            self.node,
            job.number,
            job.id,
            job.namespace,
            self.config.log_to_driver,
        )

    def warn(self, job: int, key: str, text: str) -> None:
        """Write a line for a job's driver (all drivers: 0), once per key."""
        if (job, key) in self._warned:
            return
        self._warned.add((job, key))
        if job and self.output is not None and self.output.say(job, text):
            return
        for number in [job] if job else list(self.jobs):
            path = os.path.join(self.config.directory, "logs", f"w0.{number}.err")
            with contextlib.suppress(OSError), open(path, "a") as file:
                file.write(f"\x1ezray\x1f\n{text}\n")
        self.store.add_global(wire.GLOBAL_LOG_EVENTS, 1)

    @property
    def heirs(self) -> list[str]:
        """host:port of the nodes that know who is the head instead of this one, which was replaced: among them it may come back. Empty when it
        was not, or is to end."""
        return [] if self.cluster is None or self._told_to_stop else self.cluster.succession.replaced_by

    def stop(self) -> None:
        """End the node after the current round."""
        self.running = False
        self._told_to_stop = True
        self.poller.interrupt()

    def _end(self, keep_log: bool = False) -> None:
        """Leave nothing: no worker, no socket, no file. The segment goes with the last process that maps it."""
        for worker in self.workers.values():
            kill_group(worker.pid)
        kill_group_of_fork_parent(self.forks.pid)
        if self.sharing is not None:
            self.sharing.exchange.close()
        if self.cluster is not None:
            self.cluster.close("it was ended")
        self.records.gcs.close()
        self.poller.close()
        self.context.close(linger=0)  # what is left was for workers, who are dead
        if self.cluster is not None:
            self.cluster.close_door()
        self.store.close()
        shutil.rmtree(self.config.spill_directory, ignore_errors=True)
        if not keep_log:
            shutil.rmtree(self.config.directory, ignore_errors=True)
            if self.config.first_directory:
                shutil.rmtree(self.config.first_directory, ignore_errors=True)


def kill_group_of_fork_parent(pid: int) -> None:
    """End the fork parent (its children, the workers, are signalled by the kernel when it goes) and reap it."""
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def open_file_limit() -> int:
    """Raise the soft limit of descriptors to the hard one; return it. Each worker costs the broker a few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
