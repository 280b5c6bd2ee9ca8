"""What events about placement groups, and about nodes that calls insist on, mean for the books of the node.

Covers holding and giving back bundles, opening them, where the bundles of other nodes are, and the end of what can never
run again: calls in a removed group, and calls that insist on a node that is dead. Does not cover where bundles go
(`placement_groups`) or what runs next (`dispatch`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from zray import placing, resources
from zray.broker import actions, events
from zray.broker.actor_table import QUEUED, WAITING
from zray.broker.bundles import Bundle, Placed
from zray.broker.refusals import refusal_text

if TYPE_CHECKING:
    from zray.broker.ledger import Demand
    from zray.broker.node import Node
    from zray.broker.task_events import TaskEvents
    from zray.broker.worker_pool import Worker

_UNKNOWN_NODE_S: Final = 2.0
"""A node that a call insists on and that was never heard of may have joined just now: news of it is on its way."""
GROUP_REMOVED: Final = "PLACEMENT_GROUP_REMOVED"
"""`Worker.doom` of processes that are killed with their group."""


class GroupEvents:
    """Handlers of the events that concern placement groups."""

    __slots__ = ("_due", "_tasks", "_unknown", "node")

    def __init__(self, node: Node, tasks: TaskEvents) -> None:
        self.node = node
        self._tasks = tasks
        self._unknown: dict[bytes, tuple[Demand, float]] = {}
        """Demands that insist on a node nobody has heard of, and until when it is waited for."""

    # -- bundles of this node ------------------------------------------------------------------------------------------

    def wanted(self, event: events.BundlesWanted, now: float) -> None:
        """The head wants bundles held here: all of them, or none."""
        node = self.node
        table = node.bundles
        accepted = event.group not in table.gone
        taken: list[Bundle] = []
        for index, amounts in event.bundles.items() if accepted else ():
            if (event.group, index) in table.held:
                continue
            demand = node.ledger.demand(resources.pack(amounts))
            gpus = node.ledger.choose_gpus(demand) if node.ledger.fits(demand) else None
            if gpus is None:
                accepted = False
                node.take_back_leases(demand, now)
                break
            node.ledger.take(demand, gpus)
            bundle = Bundle(event.group, index, event.attempt, dict(amounts), demand, gpus)
            table.held[event.group, index] = bundle
            taken.append(bundle)
        if not accepted:
            for bundle in taken:
                self._let_go(bundle)
        node.out.append(actions.BundlesAnswer(event.group, event.attempt, accepted))

    def returned(self, event: events.BundlesReturned, now: float) -> None:
        """The head gives an attempt up: what was held for it is free. (What is open stays: only `ended` ends it.)"""
        for bundle in self.node.bundles.of(event.group):
            if bundle.attempt == event.attempt and not bundle.is_open:
                self._let_go(bundle)

    def _let_go(self, bundle: Bundle) -> None:
        ledger = self.node.ledger
        if bundle.is_open:
            ledger.remove(bundle.group, bundle.index, bundle.amounts, bundle.gpus)
        ledger.give_back(bundle.demand, bundle.gpus)
        del self.node.bundles.held[bundle.group, bundle.index]

    # -- groups --------------------------------------------------------------------------------------------------------

    def placed(self, event: events.GroupPlaced, now: float) -> None:
        """All bundles of a group are reserved (some may have been before), or some were lost with their nodes."""
        node = self.node
        table = node.bundles
        group = event.spec.id
        if group in table.gone:
            return
        before = table.placed.get(group)
        table.placed[group] = Placed(event.spec, event.nodes)
        table.asked.discard(group)
        for index, at in enumerate(event.nodes):
            bundle = table.held.get((group, index))
            if at == node.ledger.id:
                if bundle is not None and not bundle.is_open:
                    bundle.is_open = True
                    node.ledger.add(group, index, bundle.amounts, bundle.gpus)
            elif before is None or before.nodes[index] != at:
                peer = node.peers.get(at)
                if peer is not None:
                    peer.add(group, index, event.spec.bundles[index])
        node.look_around()

    def ended(self, event: events.GroupEnded, now: float) -> None:
        """A group was removed, or never was: what runs in it ends, what waits for it fails."""
        node = self.node
        table = node.bundles
        known = table.placed.get(event.group)
        if event.group in table.gone:
            return
        for demand in list(node.ledger.demands.values()):
            if demand.strategy.group == event.group:
                node.refuse(demand, "GROUP", event.reason)
        for worker in [worker for worker in node.pool.workers.values() if _in_group(worker, event.group)]:
            self._end_worker(worker)
        if known is not None:
            for index, at in enumerate(known.nodes):
                peer = node.peers.get(at)
                if peer is not None:
                    peer.remove(event.group, index, known.spec.bundles[index])
        table.bury(event.group, event.reason)
        for bundle in table.of(event.group):
            if not bundle.is_open:
                self._let_go(bundle)
        if table.of(event.group):
            table.returning.add(event.group)
        node.look_around()

    def _end_worker(self, worker: Worker) -> None:
        node = self.node
        if worker.actor is not None:
            node.actors.condemn(worker.actor, GROUP_REMOVED, node.out)
            node.kill_worker(worker, GROUP_REMOVED)
        elif worker.peer is not None:
            specs = list(worker.handed)
            queue = worker.queue
            assert queue is not None
            for spec in specs:
                if node.tasks.counts(worker, spec.id):
                    node.tasks.end(spec.id, worker)
                    self._tasks.refuse_one(spec, queue.shape)
            worker.handed.clear()
            worker.ghosts = 0
            node.retire(worker)
        else:
            node.kill_worker(worker, GROUP_REMOVED)

    def settle(self) -> None:
        """See which removed groups have no process left here: what they held is free."""
        node = self.node
        for group in list(node.bundles.returning):
            if not any(_in_group(worker, group) for worker in node.pool.workers.values()):
                for bundle in node.bundles.of(group):
                    self._let_go(bundle)
                node.out.append(actions.TellFree())
                node.bundles.returning.discard(group)
                node.ledger.demands = {
                    key: demand for key, demand in node.ledger.demands.items() if demand.strategy.group != group
                }

    # -- demands that can never be met ---------------------------------------------------------------------------------

    def look_at(self, demand: Demand, now: float) -> None:
        """A demand with a strategy was named for the first time: ask for its group, doubt its node."""
        node = self.node
        strategy = demand.strategy
        if strategy.kind == placing.GROUP:
            table = node.bundles
            reason = table.gone.get(strategy.group)
            if reason is not None:
                node.refuse(demand, "GROUP", reason)
            elif strategy.group not in table.placed and strategy.group not in table.asked:
                table.asked.add(strategy.group)
                node.out.append(actions.AskGroup(strategy.group))
        elif strategy.kind == placing.NODE and not strategy.or_elsewhere:
            if strategy.node in node.dead:
                node.refuse(demand, "NODE", node.dead[strategy.node])
            elif strategy.node != node.ledger.id and strategy.node not in node.peers:
                if not node.config.cluster_may_grow:
                    node.refuse(demand, "NODE", "there is no such node")
                else:
                    self._unknown[demand.key] = demand, now + _UNKNOWN_NODE_S
                    node.wake(now + _UNKNOWN_NODE_S)

    def node_gone(self, node: bytes, reason: str) -> None:
        """What insists on a dead node can never run."""
        for demand in list(self.node.ledger.demands.values()):
            strategy = demand.strategy
            if strategy.kind == placing.NODE and strategy.node == node and not strategy.or_elsewhere:
                self.node.refuse(demand, "NODE", reason)

    def tick(self, now: float) -> None:
        """Nodes that were never heard of are not waited for for ever."""
        for key, (demand, until) in list(self._unknown.items()):
            if demand.strategy.node in self.node.peers:
                del self._unknown[key]
            elif now >= until:
                del self._unknown[key]
                self.node.refuse(demand, "NODE", "there is no such node")
            else:
                self.node.wake(until)

    def refuse_actors(self) -> None:
        """Actors that are to be placed where nothing can be any more die."""
        node = self.node
        for actor in list(node.actors.actors.values()):
            demand = actor.shape.demand
            if demand.refusal is None or actor.state not in (WAITING, QUEUED):
                continue
            if actor.waiting is not None:
                node.dependencies.forget(actor.waiting)
                actor.waiting = None
            kind = "ActorPlacementGroupRemoved" if demand.refusal[0] == "GROUP" else "ActorUnschedulableError"
            fields = actor.fields("NOT_STARTED", None, None)
            fields["message"] = refusal_text(actor.shape.name, demand)
            node.actors.die(actor, kind, fields, [], node.out)


def _in_group(worker: Worker, group: bytes) -> bool:
    return worker.held is not None and worker.held.strategy.group == group
