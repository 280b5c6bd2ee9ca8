"""What events about actors mean for the books of the node.

Covers requests, construction, calls through the broker, kills, handles that go away, exits. Does not cover the actor
machine itself (`actor_table`), nor placing (`dispatch`). A part of the scheduler, apart because tasks and actors share
little but resources and processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from zray.broker import actions, events
from zray.broker.actor_table import ALIVE, CONSTRUCTING, QUEUED, WAITING, ActorRecord
from zray.broker.dependencies import Waiting
from zray.broker.worker_pool import ACTOR, DYING

if TYPE_CHECKING:
    from zray.broker.jobs import Job
    from zray.broker.node import Node

_UNPLACED_GRACE: Final = 0.1
"""An actor without handles that has not been placed yet is dropped after this time: calls made before its last handle
went may be under way."""


class ActorEvents:
    """Handlers of the events that concern actors."""

    __slots__ = ("node",)

    def __init__(self, node: Node) -> None:
        self.node = node

    # -- making --------------------------------------------------------------------------------------------------------

    def requested(self, event: events.ActorRequested, now: float) -> None:
        """A new actor is wanted."""
        node = self.node
        spec = event.spec
        job = node.jobs.jobs.get(spec.job)
        shape = node.tasks.shapes.get(spec.creation.shape)
        if job is None or job.ended or shape is None:
            what = (
                "The job of this actor is over." if shape is not None else "The class of this actor was never defined."
            )
            fields = {
                "actor_id": spec.creation.id.hex(),
                "cause": "NOT_STARTED",
                "never_started": True,
                "message": what,
            }
            node.actors.refuse(spec.creation.id, fields, node.out)
            if event.reply:
                node.out.append(actions.SealReply(event.reply, None, ("ActorDiedError", fields)))
            return
        actor = ActorRecord(spec, job, shape, node.demand(spec.running_resources, shape.shape.strategy))
        actor.incarnation = actor.restarts = event.incarnation
        if not node.actors.admit(actor, event.reply, node.out):
            return
        if not (shape.demand.feasible and actor.running.feasible) and self._refused(actor):
            return
        if event.missing:
            actor.waiting = Waiting(spec.creation, None, actor)
            node.dependencies.add(actor.waiting, event.missing)
        else:
            node.actors.move(actor, QUEUED)

    def _refused(self, actor: ActorRecord) -> bool:
        """No node is large enough: it fails now, or waits for the cluster to grow."""
        node = self.node
        demand = actor.shape.demand if not actor.shape.demand.feasible else actor.running
        if demand.patient:
            return False
        text = f"{actor.shape.name} {node.ledger.why_never(demand)}"
        if node.config.cluster_may_grow:
            node.out.append(
                actions.Warn(
                    actor.job.number, "infeasible " + actor.shape.key.hex(), text + " It waits for a node that can."
                )
            )
            return False
        fields = actor.fields("NOT_STARTED", None, None)
        fields["message"] = text
        node.actors.die(actor, "ActorUnschedulableError", fields, [], node.out)
        return True

    def arguments_ready(self, actor: ActorRecord) -> None:
        """All arguments of its constructor are there."""
        actor.waiting = None
        self.node.actors.move(actor, QUEUED)

    def constructed(self, event: events.ActorConstructed, now: float) -> None:
        """Its constructor returned: it occupies what a living actor does from now on."""
        node = self.node
        actor = node.actors.actors.get(event.actor)
        if actor is None or actor.state != CONSTRUCTING or actor.worker is None or actor.worker.number != event.worker:
            return
        worker = actor.worker
        if worker.state == ACTOR:
            node.vacate(worker)
            node.occupy(worker, actor.running)
        node.actors.constructed(actor, worker, node.out)
        if actor.ending:
            self._end(actor, now)

    def hosted(self, event: events.ActorHosted, now: float) -> None:
        """An actor lives on the node it was sent to: it occupies what a living actor does from now on."""
        node = self.node
        slot = node.pool.workers.get(event.slot)
        if slot is None or slot.actor is None or slot.actor.id != event.actor or slot.state != ACTOR:
            return
        actor = slot.actor
        actor.restarts = max(actor.restarts, event.incarnation)
        if slot.held is not actor.running:
            node.vacate(slot)
            node.occupy(slot, actor.running)
        assert slot.peer is not None
        where = f"incarnation {event.incarnation} on node {slot.peer.id.hex()[:8]}"
        node.out.append(actions.RecordEvent("actors", actor.id, "alive", where))
        if actor.ending and not actor.verdict:  # its last handle went before it had a place
            self._end(actor, now)

    def construction_failed(self, event: events.ActorConstructionFailed, now: float) -> None:
        """Its constructor raised: it is dead, and would be again."""
        node = self.node
        actor = node.actors.actors.get(event.actor)
        if actor is None or actor.state != CONSTRUCTING or actor.worker is None or actor.worker.number != event.worker:
            return
        worker = actor.worker
        fields = actor.fields("INIT_FAILED", worker, None)
        fields["error"] = event.error
        actor.worker = None
        node.actors.die(actor, "ActorDiedError", fields, [], node.out)
        node.kill_worker(worker, "INIT_FAILED")

    def name_taken(self, event: events.ActorNameTaken, now: float) -> None:
        """Another actor of the cluster bears its name."""
        self.node.actors.refuse_name(event.spec, event.bearer, event.reply, self.node.out)

    # -- calling -------------------------------------------------------------------------------------------------------

    def calls_queued(self, event: events.ActorCallsQueued, now: float) -> None:
        """Calls made while the actor could not be reached."""
        self.node.actors.calls(
            event.actor, event.process, event.job, event.incarnation, event.calls, self.node.out, event.lane
        )

    def lookup(self, event: events.ActorLookup, now: float) -> None:
        """Who bears this name?"""
        self.node.actors.lookup(event.name, event.namespace, event.reply, self.node.out)

    # -- ending --------------------------------------------------------------------------------------------------------

    def unreferenced(self, event: events.ActorUnreferenced, now: float) -> None:
        """No handle is left."""
        node = self.node
        actor = node.actors.actors.get(event.actor)
        if actor is None or actor.spec.detached or actor.ending:
            return
        actor.ending = True
        actor.deadline = now + _UNPLACED_GRACE
        node.actors.ending[actor.id] = actor
        if actor.state == ALIVE:
            self._end(actor, now)
        else:
            node.wake(actor.deadline)

    def _end(self, actor: ActorRecord, now: float) -> None:
        """Ask a living actor to go when it has done what it was sent."""
        assert actor.worker is not None
        node = self.node
        node.actors.condemn(actor, "HANDLES_GONE", node.out)
        actor.deadline = now + node.config.stop_grace
        node.wake(actor.deadline)
        if actor.worker.peer is not None:
            node.out.append(actions.EndActorAt(actor.worker.peer.id, actor.id))
        else:
            node.out.append(actions.EndActor(actor.worker.number, "no handle is left"))

    def left(self, event: events.ActorLeft, now: float) -> None:
        """It goes by its own will."""
        node = self.node
        actor = node.actors.actors.get(event.actor)
        if actor is None or actor.worker is None or actor.worker.number != event.worker:
            return
        node.actors.condemn(actor, "EXIT_ACTOR", node.out)
        actor.deadline = now + node.config.stop_grace
        node.actors.ending[actor.id] = actor
        node.wake(actor.deadline)
        if actor.worker.state != DYING:
            node.pool.move(actor.worker, DYING)

    def kill(self, event: events.ActorKill, now: float) -> None:
        """Somebody wants it dead, for good or to be restarted."""
        node = self.node
        actor = node.actors.actors.get(event.actor)
        if actor is not None:
            if event.no_restart:
                self._kill_for_good(actor, "KILLED")
            elif actor.worker is not None and actor.worker.peer is not None:
                node.out.append(actions.KillAt(actor.worker.peer.id, actor.id, False))
            elif actor.worker is not None:
                node.kill_worker(actor.worker, "KILLED")

    def _kill_for_good(self, actor: ActorRecord, verdict: str) -> None:
        node = self.node
        node.actors.condemn(actor, verdict, node.out)
        if actor.worker is not None:
            node.kill_worker(actor.worker, verdict)
            return
        if actor.waiting is not None:
            node.dependencies.forget(actor.waiting)
            actor.waiting = None
        node.actors.die(actor, "ActorDiedError", actor.fields(verdict, None, None), [], node.out)

    def process_lost(self, actor: ActorRecord, cause: str, event: events.WorkerExited) -> None:
        """Its process is gone."""
        node = self.node
        if actor.worker is None or actor.worker.number != event.worker:
            # It died before its process did (its constructor raised): what still went there learns why.
            kind, fields = node.actors.dead.get(actor.id) or ("ActorDiedError", actor.fields(cause, None, None))
            for spec in event.orphans:
                node.out.append(actions.SealError(spec.id, actions.UNKNOWN_RETURNS, kind, fields))
            return
        node.actors.process_lost(actor, cause, event.status, event.orphans, event.claimed, node.out)

    def node_lost(self, actor: ActorRecord, event: events.PeerGone) -> None:
        """The node where it lives is dead: it comes back elsewhere, or dies."""
        if actor.worker is None:
            return
        self.node.actors.process_lost(actor, "NODE_DIED", 0, event.calls.get(actor.id, []), None, self.node.out)

    def gone_away(self, actor: ActorRecord, event: events.ActorGoneAway) -> None:
        """It died on the node where it lived, for good: restarts are that node's business."""
        if actor.worker is None:
            return
        actor.worker = None
        fields: dict[str, object] = {"actor_id": actor.id.hex(), "cause": event.cause, "error": event.error}
        self.node.actors.die(actor, event.kind, fields, [], self.node.out)

    def job_ended(self, job: Job) -> None:
        """Actors die with their job, unless they are detached."""
        for actor in list(self.node.actors.actors.values()):
            if actor.job is job and not actor.spec.detached:
                self._kill_for_good(actor, "JOB_ENDED")

    def tick(self, busy: frozenset[int], now: float) -> None:
        """Actors that should be gone: those never placed are dropped, those that have nothing left to do are killed."""
        node = self.node
        for actor in list(node.actors.ending.values()):
            if now < actor.deadline:
                node.wake(actor.deadline)
            elif actor.state in (WAITING, QUEUED):
                if node.actors.wanted(actor):
                    actor.deadline = now + _UNPLACED_GRACE
                else:
                    self._kill_for_good(actor, "HANDLES_GONE")
            elif actor.worker is not None and actor.worker.peer is None and actor.verdict:
                left = actor.worker.state == DYING and not actor.worker.doom
                if left or (actor.worker.state == ACTOR and actor.worker.number not in busy):
                    node.kill_worker(actor.worker, actor.verdict)
                else:
                    actor.deadline = now + node.config.stop_grace
