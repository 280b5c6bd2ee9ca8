"""The scheduler of one node: events in, actions out.

Covers what each event means for the books: jobs, submissions, ends, deaths, retries, waiting, leases, cancelling. Does
not cover what runs next (`dispatch`), the life of actors (`actor_table`) nor carrying anything out (`server`). `handle`
is the one way in; it neither blocks nor looks at anything but its arguments and the books, so the same events at the
same times give the same actions.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any, Final

from zray.broker import actions, events
from zray.broker.actor_events import ActorEvents
from zray.broker.cancelling import Canceller
from zray.broker.dispatch import Dispatcher
from zray.broker.group_events import GroupEvents
from zray.broker.jobs import Job
from zray.broker.leases import LeaseRequest
from zray.broker.node import NEVER, Node
from zray.broker.peers import Peer
from zray.broker.placement import LocalPolicy, Locations, Policy
from zray.broker.settings import SchedulerConfig
from zray.broker.task_events import TaskEvents
from zray.broker.task_table import ShapeState
from zray.broker.worker_pool import ACTOR, BUSY, DEAD, DRAINING, DYING, IDLE, LEASED, STARTING, STOPPING, Worker
from zray.placing import SPREAD

if TYPE_CHECKING:
    from collections.abc import Callable


_TICK: Final = 0.1
_SIGNALS: Final = {
    1: "SIGHUP",
    2: "SIGINT",
    3: "SIGQUIT",
    4: "SIGILL",
    5: "SIGTRAP",
    6: "SIGABRT",
    7: "SIGBUS",
    8: "SIGFPE",
    9: "SIGKILL",
    10: "SIGUSR1",
    11: "SIGSEGV",
    12: "SIGUSR2",
    13: "SIGPIPE",
    14: "SIGALRM",
    15: "SIGTERM",
}
"""Names on Linux: written down because the number is all that is known of a signal here."""


def cause_of(status: int, oom: bool, doom: str) -> str:
    """Return the name (errors.DeathCause) of why a process ended: what was decided here, else memory, else what its
    status says."""
    if doom:
        return doom
    if oom:
        return "OOM"
    if status < 0:
        return _SIGNALS.get(-status, f"SIG{-status}")
    return f"EXIT({status})"


class Scheduler:
    """The machine of one node."""

    __slots__ = ("_actors", "_dispatcher", "_groups", "_handlers", "_tasks", "_watch_due", "config", "node")

    def __init__(
        self,
        total_resources: dict[str, float],
        config: SchedulerConfig | None = None,
        policy: Policy | None = None,
        seed: int = 0,
        *,
        own: bytes = b"",
        labels: dict[str, str] | None = None,
        locations: Locations | None = None,
    ) -> None:
        """Make the machine of a node that has these resources.

        Args:
            total_resources: amounts by name (CPU, GPU, memory in bytes, custom ones).
            config: settings.
            policy: replaces `placement.LocalPolicy`.
            seed: of whatever the policy does at random.
            own: id of the node.
            labels: of the node.
            locations: tells where the inputs of tasks are.
        """
        self.config = config if config is not None else SchedulerConfig()
        chosen = policy if policy is not None else LocalPolicy()
        self.node = Node(total_resources, self.config, chosen, Random(seed), own, labels, locations)
        self._dispatcher = Dispatcher(self.node)
        self._actors = ActorEvents(self.node)
        self._watch_due: float = NEVER
        self._tasks = TaskEvents(self.node, self._dispatcher, self._actors)
        self._groups = GroupEvents(self.node, self._tasks)
        actors, tasks, groups = self._actors, self._tasks, self._groups
        self._handlers: dict[type[events.Event], Callable[[Any, float], None]] = {
            events.JobStarted: self._job_started,
            events.JobEnded: self._job_ended,
            events.ShapesDefined: self._shapes_defined,
            events.TasksSubmitted: tasks.submitted,
            events.ObjectsReady: tasks.objects_ready,
            events.ObjectsMade: tasks.objects_made,
            events.ObjectsLost: tasks.objects_lost,
            events.TasksFinished: tasks.finished,
            events.WorkerStarted: self._worker_started,
            events.WorkerIsReady: self._worker_is_ready,
            events.WorkerExited: self._worker_exited,
            events.WorkerStartFailed: self._worker_start_failed,
            events.WorkerBlocked: self._worker_blocked,
            events.WorkerUnblocked: self._worker_unblocked,
            events.LeaseRequested: self._lease_requested,
            events.LeaseReturned: self._lease_returned,
            events.ProcessGone: self._process_gone,
            events.ActorRequested: actors.requested,
            events.ActorConstructed: actors.constructed,
            events.ActorConstructionFailed: actors.construction_failed,
            events.ActorCallsQueued: actors.calls_queued,
            events.ActorUnreferenced: actors.unreferenced,
            events.ActorLeft: actors.left,
            events.ActorKill: actors.kill,
            events.ActorNameTaken: actors.name_taken,
            events.ActorLookup: actors.lookup,
            events.ActorHosted: actors.hosted,
            events.ActorGoneAway: self._actor_gone_away,
            events.TaskCancel: Canceller(self.node, tasks).cancel,
            events.PeerSeen: self._peer_seen,
            events.PeerGone: self._peer_gone,
            events.BundlesWanted: groups.wanted,
            events.BundlesReturned: groups.returned,
            events.GroupPlaced: groups.placed,
            events.GroupEnded: groups.ended,
            events.Tick: self._tick,
        }

    # -- the way in ----------------------------------------------------------------------------------------------------

    def handle(self, event: events.Event, now: float) -> list[actions.Action]:
        """Take in what happened at `now` (monotonic seconds, never less than before) and return what is to be done, in
        order."""
        node = self.node
        out = node.out = []
        self._handlers[type(event)](event, now)
        if node.newly_named or node.refusals or node.bundles.returning:
            self._see_to_strategies(now)
        if out and node.dependencies.waiters:
            self._tasks.wake_after_errors(out)
            while node.tasks.stranded:
                self._tasks.refuse_stranded()
                self._tasks.wake_after_errors(out)
        self._dispatcher.run(now)
        if node.story is not None:
            node.validate()
        return out

    def _see_to_strategies(self, now: float) -> None:
        """What needs to be seen to only where strategies are used."""
        node = self.node
        while node.newly_named:
            self._groups.look_at(node.newly_named.pop(), now)
        if node.refusals:
            self._groups.refuse_actors()
            self._tasks.refuse_stranded()
        if node.bundles.returning:
            self._groups.settle()

    @property
    def wake_at(self) -> float:
        """When a Tick is wanted at the latest (monotonic seconds; infinity when nothing waits for time to pass)."""
        return self.node.wake_at

    def is_idle(self) -> bool:
        """Is nothing unfinished (so that ticks may be rarer)?"""
        node = self.node
        return not (
            node.tasks.home or node.actors.actors or node.leases.leased or node.leases.draining or node.pool.starting
        )

    def keeps_task(self, task: bytes) -> bool:
        """Whether a task is in the books: what becomes of it will be told. (As `keeps`, of what is known to be no call of an actor.)"""
        return task in self.node.tasks.home

    def keeps(self, key: bytes) -> bool:
        """Whether a task, a call or an actor with this id is in the books: what becomes of it will be told."""
        return key in self.node.tasks.home or self.node.actors.keeps(key)

    def story(self, key: bytes) -> list[str]:
        """Return what is remembered of a task or actor (with `config.debug`), oldest first."""
        return [] if self.node.story is None else self.node.story.of(key)

    def validate(self) -> None:
        """Check every book; AssertionError names the first equation that does not hold."""
        self.node.validate()

    def statistics(self) -> dict[str, int]:
        """Return counts for people: tasks by place, workers by state, actors."""
        node = self.node
        return {
            "tasks": len(node.tasks.home),
            "tasks_queued": node.tasks.queued,
            "objects_awaited": len(node.dependencies.waiters),
            "workers": len(node.pool.workers),
            "workers_idle": node.pool.idle_count,
            "workers_busy": len(node.pool.busy),
            "workers_starting": node.pool.starting,
            "leases": len(node.leases.leased),
            "actors": len(node.actors.actors),
            "jobs": len(node.jobs.jobs),
        }

    def available(self) -> dict[str, float]:
        """Return what is free now (never below zero, although the books may be while more runs than there are CPUs)."""
        return self.node.ledger.available_floats()

    def spare(self) -> dict[str, float]:
        """Return what is free, or would be as soon as somebody else wants it: workers that are lent are taken back
        then."""
        node = self.node
        if not node.leases.leased:
            return node.ledger.available_floats()
        room = node.ledger.copy()
        for worker in node.leases.leased.values():
            if worker.held is not None and not worker.lent:
                room.give_back(worker.held, worker.kind[1])
        return room.available_floats()

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def _job_started(self, event: events.JobStarted, now: float) -> None:
        node = self.node
        if event.job.number in node.jobs.jobs:
            return
        alone = not any(not job.ended for job in node.jobs.jobs.values())
        job = node.jobs.jobs[event.job.number] = Job(event.job, event.process)
        job.guest = event.guest
        if alone and event.process and not node.config.runs_nothing:
            wanted = node.config.prestart if node.config.prestart >= 0 else node.cpus
            for _ in range(wanted):
                if not node.pool.may_start(node.max_starting(), now):
                    break
                node.start_worker(job, (1, ()))

    def _job_ended(self, event: events.JobEnded, now: float) -> None:
        node = self.node
        job = node.jobs.jobs.get(event.job)
        if job is None or job.ended:
            return
        job.ended = True
        node.leases.forget_job(job)
        self._actors.job_ended(job)
        self._tasks.end_all(job, "TaskCancelledError", {"message": f"The job of this task is over: {event.reason}"})
        for worker in list(node.pool.workers.values()):
            if worker.job is not job:
                continue
            if worker.peer is not None and worker.actor is None:
                worker.handed.clear()
                worker.ghosts = 0
                node.retire(worker)
            elif worker.actor is None or not worker.actor.spec.detached:
                node.kill_worker(worker, "JOB_ENDED")
        node.dependencies.sweep()
        self._forget_job(job)

    def _forget_job(self, job: Job) -> None:
        """A job that is over vanishes with its last process and actor; then shapes that no job is left to use."""
        node = self.node
        if not job.ended or any(worker.job is job for worker in node.pool.workers.values()):
            return
        if any(actor.job is job for actor in node.actors.actors.values()):
            return
        del node.jobs.jobs[job.number]
        oldest = min(node.jobs.jobs, default=None)
        forgotten = [key for key, shape in node.tasks.shapes.items() if oldest is None or shape.newest_job < oldest]
        for key in forgotten:
            del node.tasks.shapes[key]
        if forgotten:
            node.out.append(actions.ForgetShapes(forgotten))

    def _shapes_defined(self, event: events.ShapesDefined, now: float) -> None:
        node = self.node
        newest = max(node.jobs.jobs, default=0)
        for shape in event.shapes:
            found = node.tasks.shapes.get(shape.key)
            if found is None:
                try:
                    demand = node.demand(shape.resources, shape.strategy)
                except ValueError:
                    continue  # made by no door of ours: what names it fails
                found = node.tasks.shapes[shape.key] = ShapeState(shape, demand)
            found.newest_job = newest

    # -- lives of workers ----------------------------------------------------------------------------------------------

    def _worker_started(self, event: events.WorkerStarted, now: float) -> None:
        worker = self.node.pool.workers.get(event.worker)
        if worker is not None:
            worker.pid = event.pid
            if event.process:
                worker.process = event.process
                self.node.by_process[event.process] = worker

    def _worker_is_ready(self, event: events.WorkerIsReady, now: float) -> None:
        node = self.node
        worker = node.pool.workers.get(event.worker)
        if worker is None or worker.state != STARTING:
            return
        node.pool.start_succeeded()
        worker.job.failed_starts = 0
        if worker.actor is not None:
            node.pool.move(worker, ACTOR)
            node.actors.begin(worker.actor, worker, node.out)
        else:
            worker.idle_since = now
            node.pool.move(worker, IDLE)

    def _worker_start_failed(self, event: events.WorkerStartFailed, now: float) -> None:
        worker = self.node.pool.workers.get(event.worker)
        if worker is not None:
            self._lost_at_start(worker, now, "NOT_STARTED", 0, event.reason)
            self._bury(worker, now)

    def _worker_exited(self, event: events.WorkerExited, now: float) -> None:
        node = self.node
        worker = node.pool.workers.get(event.worker)
        if worker is None:
            return
        cause = cause_of(event.status, event.oom, worker.doom)
        starting = worker.state == STARTING
        actor = worker.actor
        node.end_lease(worker, False)
        node.leave_queue(worker)
        if starting:
            self._lost_at_start(worker, now, cause, event.status, "")
        elif actor is not None:
            self._actors.process_lost(actor, cause, event)
        else:
            fields = {"cause": cause, "worker": worker.number, "pid": worker.pid, "status": event.status}
            kind = "OutOfMemoryError" if event.oom else "WorkerCrashedError"
            self._tasks.recover_handed(worker, event.claimed, kind, fields)
            self._tasks.recover_orphans(worker, event, kind, fields)
        if event.orphans_without_spec:
            error = "ActorDiedError" if actor is not None else "WorkerCrashedError"
            lost = {"cause": cause, "worker": worker.number, "pid": worker.pid, "status": event.status}
            node.out.append(actions.SealEntries(event.orphans_without_spec, error, lost))
        self._bury(worker, now)

    def _bury(self, worker: Worker, now: float) -> None:
        """Its exit is confirmed: give back what it held and forget it."""
        node = self.node
        node.vacate(worker)
        node.pool.move(worker, DEAD)
        node.by_process.pop(worker.process, None)
        worker.handed.clear()
        if node.dependencies.waiters and self._watch_due == NEVER:
            self._watch_due = now + self.config.watch_again
            node.wake(self._watch_due)
        self._forget_job(worker.job)

    def _lost_at_start(self, worker: Worker, now: float, cause: str, status: int, reason: str) -> None:
        """It never became ready. After many of these in a row what its job has waiting cannot be run."""
        node = self.node
        node.pool.start_failed(now)
        node.wake(node.pool.hold_starts_until)
        job = worker.job
        job.failed_starts += 1
        if worker.actor is not None:
            node.actors.start_lost(worker.actor, self.config.start_attempts, cause, status, node.out)
        elif job.failed_starts >= self.config.start_attempts and not job.ended and not job.running:
            job.failed_starts = 0
            text = f"No worker could be started for it: {(job.number and reason) or cause}"
            self._tasks.end_queued(job, {"cause": "NOT_STARTED", "worker": worker.number, "message": text})

    # -- waiting -------------------------------------------------------------------------------------------------------

    def _worker_blocked(self, event: events.WorkerBlocked, now: float) -> None:
        node = self.node
        worker = node.pool.workers.get(event.worker)
        if worker is None or worker.blocked or worker.state not in (BUSY, LEASED, DRAINING, ACTOR, DYING):
            return
        worker.blocked = True
        node.lend(worker)
        if worker.state == BUSY and len(worker.handed) > 1:
            live = [spec for spec in worker.handed if node.tasks.counts(worker, spec.id)]
            node.tasks.offer(worker, live[1:])

    def _worker_unblocked(self, event: events.WorkerUnblocked, now: float) -> None:
        worker = self.node.pool.workers.get(event.worker)
        if worker is not None and worker.blocked:
            self.node.take_back(worker)
            worker.blocked = False

    # -- leases --------------------------------------------------------------------------------------------------------

    def _lease_requested(self, event: events.LeaseRequested, now: float) -> None:
        node = self.node
        job = node.jobs.jobs.get(event.job)
        shape = node.tasks.shapes.get(event.shape)
        if job is None or job.ended or shape is None or not shape.demand.local:
            return
        strategy = shape.demand.strategy
        if strategy.kind == SPREAD or strategy.soft:
            return  # calls of one caller would all stay here
        node.leases.request(LeaseRequest(event.process, job, shape, event.reply))

    def _lease_returned(self, event: events.LeaseReturned, now: float) -> None:
        worker = self.node.pool.workers.get(event.worker)
        if worker is not None and worker.state == LEASED and worker.epoch == event.epoch:
            self.node.revoke(worker, now)

    def _process_gone(self, event: events.ProcessGone, now: float) -> None:
        node = self.node
        node.leases.forget_process(event.process)
        for worker in list(node.leases.leased.values()):
            if worker.lessee == event.process:
                node.revoke(worker, now)

    # -- other nodes ---------------------------------------------------------------------------------------------------

    def _peer_seen(self, event: events.PeerSeen, now: float) -> None:
        node = self.node
        peer = node.peers.get(event.node)
        if peer is None:
            peer = node.peers[event.node] = Peer(event.node, event.total, event.labels)
            for group, placed in node.bundles.placed.items():
                for index, at in enumerate(placed.nodes):
                    if at == event.node:
                        peer.add(group, index, placed.spec.bundles[index])
            node.look_around()
        peer.report(event.available)
        peer.silent = event.silent
        peer.queued = event.queued
        peer.task_seconds = event.task_micros * 1e-6

    def _peer_gone(self, event: events.PeerGone, now: float) -> None:
        node = self.node
        peer = node.peers.pop(event.node, None)
        node.dead[event.node] = event.reason
        self._groups.node_gone(event.node, event.reason)
        if peer is None:
            return
        node.look_around()
        fields = {"node_id": event.node.hex(), "message": f"The node that ran it is dead: {event.reason}"}
        for slot in [slot for slot in node.pool.slots() if slot.peer is peer]:
            if slot.actor is not None:
                self._actors.node_lost(slot.actor, event)
                self._bury(slot, now)
                continue
            sent = [spec.id for spec in slot.handed]
            node.leave_queue(slot)
            self._tasks.recover_handed(slot, sent, "NodeDiedError", fields)
            node.vacate(slot)
            node.pool.move(slot, DEAD)

    def _actor_gone_away(self, event: events.ActorGoneAway, now: float) -> None:
        slot = self.node.pool.workers.get(event.slot)
        if slot is not None and slot.actor is not None and slot.actor.id == event.actor:
            self._actors.gone_away(slot.actor, event)
            self._bury(slot, now)

    # -- time ----------------------------------------------------------------------------------------------------------

    def _tick(self, event: events.Tick, now: float) -> None:
        node = self.node
        node.wake_at = NEVER
        config = self.config
        self._tick_leases(event.leased_busy, now)
        for worker in node.pool.surplus(node.keep_idle(), now - config.worker_idle):
            node.stop_worker(worker, now, "idle")
        for worker in list(node.pool.workers.values()):
            if worker.state == STOPPING and now >= worker.deadline:
                node.kill_worker(worker, "IDLE")
        self._actors.tick(event.leased_busy, now)
        self._groups.tick(now)
        self._replenish(now)
        if now >= self._watch_due:
            self._watch_due = NEVER
            if node.dependencies.waiters:
                node.out.append(actions.WatchObjects(node.dependencies.watched()))
        elif self._watch_due != NEVER:
            node.wake(self._watch_due)
        if node.pool.hold_starts_until > now and (node.tasks.queued or node.actors.queued):
            node.wake(node.pool.hold_starts_until)

    def _replenish(self, now: float) -> None:
        """Actors live in workers that were meant for tasks: keep as many of those as there are CPUs, so that the next
        task or actor need not wait for a start. Only while nothing waits: then all starts are for what does."""
        node = self.node
        if node.config.prestart == 0 or node.tasks.queued or node.actors.queued:
            return
        living = [job for job in node.jobs.jobs.values() if not job.ended]
        if not living:
            return
        ready = sum(
            worker.actor is None and worker.peer is None and not worker.blocked and worker.state < ACTOR
            for worker in node.pool.workers.values()
        )
        while ready < node.keep_idle() and node.pool.may_start(node.max_starting(), now):
            node.start_worker(living[-1], (1, ()))
            ready += 1

    def _tick_leases(self, busy: frozenset[int], now: float) -> None:
        node = self.node
        leases = node.leases
        for worker in list(leases.draining.values()):
            if worker.number not in busy:
                del leases.draining[worker.number]
                node.release(worker, now)
            else:
                # The longer its call has run already, the longer it may go on: look ever more rarely.
                node.wake(now + min(max(self.config.drain_poll, (now - worker.since) / 2), _TICK))
        for worker in list(leases.leased.values()):
            if worker.number in busy:
                worker.last_used = now
            elif now - worker.last_used >= self.config.lease_idle:
                node.revoke(worker, now)


__all__ = ["Scheduler", "SchedulerConfig", "cause_of"]
