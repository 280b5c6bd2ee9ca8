"""A broker's part in placement groups: messages and rows; no decisions.

Covers the way of a wish to the head and back, carrying out what the head's machine asks for, telling this node's scheduler
where bundles are, and ending the waits for `PlacementGroup.ready()`. Does not cover the decisions (`placement_groups`) or
the books of the node (`group_events`). A single machine is its own head.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from zray import placing, resources
from zray.broker import events as e
from zray.broker import peer_messages as pm
from zray.broker import placement_groups as machine
from zray.gcs.tables import GroupState, PlacementGroupRow

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zray import wire
    from zray.broker import actions as a
    from zray.broker.cluster import Cluster
    from zray.broker.membership import NodeInfo, NodeLoad
    from zray.broker.server import Broker
    from zray.placing import GroupSpec

_UNSWEPT: Final = 64
"""Waits for one group after which it is looked which of them nobody waits for any more."""


class Groups:
    """One broker's dealings in placement groups."""

    def __init__(self, broker: Broker, cluster: Cluster | None) -> None:
        self._broker = broker
        self._cluster = cluster
        self._own = broker.node
        self._head = machine.PlacementGroups() if cluster is None or cluster.is_head else None
        self._requests: dict[int, bytes] = {}
        """Replies to what the head was asked."""
        self._last_request = 0
        self._waiters: dict[bytes, list[wire.AwaitGroup]] = {}
        """Who waits until a group is ready, by group."""
        self._looking = False
        self._heard: dict[bytes, tuple[dict[str, float], dict[str, int]]] = {}
        """At the head: what each other node last said is free there, and how that was taken. Most say the same again."""
        self._do: dict[type[machine.Action], Callable[[Any], None]] = {
            machine.Reserve: self._reserve,
            machine.GiveBack: self._give_back,
            machine.Announce: self._announce,
            machine.Withdraw: self._withdraw,
            machine.Infeasible: self._infeasible,
        }
        if self._head is not None:
            node = broker.scheduler.node.ledger
            self._head.node_seen(self._own, dict(node.total), node.labels)
        if cluster is not None:
            cluster.serve_also(pm.WantGroup, self._wanted_from_afar)
            cluster.serve_also(pm.DropGroup, self._dropped_from_afar)
            cluster.serve_also(pm.GroupAnswer, lambda _, m: self._answer(m.number, m.problem))
            cluster.serve_also(pm.HoldBundles, lambda _, m: self._hold(m))
            cluster.serve_also(pm.BundlesHeld, self._held)
            cluster.serve_also(pm.ReleaseBundles, lambda _, m: broker.tell(e.BundlesReturned(m.group, m.attempt)))
            cluster.serve_also(pm.GroupIs, lambda _, m: self._learn(m.spec, m.nodes))
            cluster.serve_also(pm.GroupGone, lambda _, m: self._forget(m.group, m.reason))
            cluster.serve_also(pm.AskGroup, self._asked_from_afar)

    # -- wishes of processes of this node -----------------------------------------------------------------------------------

    def create(self, message: wire.CreateGroup) -> None:
        """A process wants a group. The reply is what is wrong with the wish, or "" when the head has taken it in."""
        remote = self._broker.remote
        home = self._own if remote is None else remote.home_of(message.spec.job)
        if self._head is None:
            self._ask_head(message.reply, lambda number: pm.WantGroup(number, home, message.spec))
        else:
            self._reply(message.reply, self._create(message.spec, home))

    def remove(self, message: wire.RemoveGroup) -> None:
        """A process wants a group gone."""
        if self._head is None:
            self._ask_head(message.reply, lambda number: pm.DropGroup(number, message.group))
        else:
            self._remove(message.group)
            self._reply(message.reply, "")

    def await_ready(self, message: wire.AwaitGroup) -> None:
        """A process waits until a group is ready: its reply is sealed then."""
        table = self._broker.scheduler.node.bundles
        waiters = self._waiters.setdefault(message.group, [])
        if len(waiters) % _UNSWEPT == _UNSWEPT - 1:  # who has asked again and again has let go of the earlier questions
            waiters[:] = [waiter for waiter in waiters if self._broker.store.reference(waiter.reply) is not None]
        waiters.append(message)
        placed = table.placed.get(message.group)
        if message.group in table.gone:
            self._end_waits(message.group, table.gone[message.group])
        elif placed is None:
            self.ask(message.group)
        elif all(placed.nodes):
            self._end_waits(message.group, "")

    def _ask_head(self, reply: bytes, make: Callable[[int], pm.PeerMessage]) -> None:
        assert self._cluster is not None
        self._last_request += 1
        self._requests[self._last_request] = reply
        self._cluster.send(self._cluster.head, make(self._last_request))

    def _answer(self, number: int, problem: str) -> None:
        reply = self._requests.pop(number, None)
        if reply is not None:
            self._reply(reply, problem)

    def _reply(self, reply: bytes, problem: str) -> None:
        self._broker.reply(reply, msgspec.msgpack.encode(problem))

    # -- what this node is told ----------------------------------------------------------------------------------------------

    def ask(self, group: bytes) -> None:
        """Nothing is known here of a group: ask the head."""
        if self._head is None:
            assert self._cluster is not None
            self._cluster.send(self._cluster.head, pm.AskGroup(group))
            return
        gone = self._head.why_gone(group)
        found = self._head.where(group)
        if gone is not None:
            self._forget(group, gone)
        elif found is not None:
            self._learn(*found)

    def _hold(self, message: pm.HoldBundles) -> None:
        self._broker.tell(e.BundlesWanted(message.group, message.attempt, message.bundles))

    def bundles_answer(self, action: a.BundlesAnswer) -> None:
        """This node holds what the head wants, or does not."""
        if self._head is not None:
            self._head.capacity(self._own, self._free_here())
            self._act(self._head.answered(self._own, action.group, action.attempt, action.accepted, time.monotonic()))
        elif self._cluster is not None:
            load = self._broker._own_load()
            self._cluster.send(self._cluster.head, pm.BundlesHeld(action.group, action.attempt, action.accepted, load))

    def tell_free(self) -> None:
        """Bundles were given back here: groups may wait for it."""
        if self._head is None and self._cluster is not None:
            self._cluster.send(self._cluster.head, pm.Beat(self._broker._own_load()))

    def _learn(self, spec: GroupSpec, nodes: tuple[bytes, ...]) -> None:
        self._broker.tell(e.GroupPlaced(spec, nodes))
        if all(nodes):
            self._end_waits(spec.id, "")

    def _forget(self, group: bytes, reason: str) -> None:
        self._broker.tell(e.GroupEnded(group, reason))
        self._end_waits(group, reason)

    def head_replaced(self) -> None:
        """The head has begun another life: it kept groups in its memory, so those that are known here end."""
        reason = "the head, which kept it, was started again"
        for number in list(self._requests):
            self._answer(number, reason)
        for group in {*self._broker.scheduler.node.bundles.placed, *self._waiters}:
            self._forget(group, reason)

    def become_head(self) -> None:
        """This node is the head from now on. The last one kept groups in its memory: they end."""
        self.head_replaced()
        self._head = machine.PlacementGroups()
        node = self._broker.scheduler.node.ledger
        self._head.node_seen(self._own, dict(node.total), node.labels)
        if self._cluster is not None:
            for member in self._cluster.neighbours.members.values():
                if not member.info.is_client:
                    self.node_seen(member.info, member.load)

    def _end_waits(self, group: bytes, gone: str) -> None:
        performer = self._broker.performer
        for message in self._waiters.pop(group, ()):
            ref = self._broker.store.reference(message.reply)
            if ref is None:
                continue
            if gone:
                text = f"Placement group {group.hex()} is gone: {gone}."
                data = performer.failure("TaskPlacementGroupRemoved", {"message": text})
                performer.seal_failure(ref, data)
            else:
                performer._force(ref, message.data, message.kind, 0)
            self._broker.objects_there([message.reply])

    # -- at the head ----------------------------------------------------------------------------------------------------------

    def _create(self, spec: GroupSpec, home: bytes) -> str:
        assert self._head is not None
        self._head.capacity(self._own, self._free_here())
        problem, actions = self._head.create(spec, home, time.monotonic())
        if not problem:
            self._record(spec, GroupState.PENDING, ())
        self._act(actions)
        return problem

    def _remove(self, group: bytes) -> None:
        assert self._head is not None
        self._act(self._head.remove(group, "it was removed"))

    def _wanted_from_afar(self, node: bytes, message: pm.WantGroup) -> None:
        if self._head is not None and self._cluster is not None:
            problem = self._create(message.spec, message.home)
            self._cluster.send(node, pm.GroupAnswer(message.number, problem))

    def _dropped_from_afar(self, node: bytes, message: pm.DropGroup) -> None:
        if self._head is not None and self._cluster is not None:
            self._remove(message.group)
            self._cluster.send(node, pm.GroupAnswer(message.number, ""))

    def _held(self, node: bytes, message: pm.BundlesHeld) -> None:
        if self._head is None or self._cluster is None:
            return
        self._cluster.load_of(node, message.load)
        self._act(self._head.answered(node, message.group, message.attempt, message.accepted, time.monotonic()))

    def _asked_from_afar(self, node: bytes, message: pm.AskGroup) -> None:
        if self._head is None or self._cluster is None:
            return
        gone = self._head.why_gone(message.group)
        found = self._head.where(message.group)
        if gone is not None:
            self._cluster.send(node, pm.GroupGone(message.group, gone))
        elif found is not None:
            self._cluster.send(node, pm.GroupIs(*found))

    def node_seen(self, info: NodeInfo, load: NodeLoad) -> None:
        """Another node lives, and says what is free there."""
        if self._head is None:
            return
        said, free = self._heard.get(info.id, (None, {}))
        if said != load.available:
            free = _free(resources.parse({name: max(0.0, amount) for name, amount in load.available.items()}))
            self._heard[info.id] = load.available, free
            labels = {**info.labels, **dict.fromkeys(placing.NODE_ID_LABELS, info.id.hex())}
            self._head.node_seen(info.id, resources.parse(info.resources), labels)
        self._head.capacity(info.id, free)
        if self._head.waiting:
            self._act(self._head.tick(time.monotonic()))

    def node_gone(self, node: bytes, reason: str) -> None:
        """Another node is dead."""
        self._heard.pop(node, None)
        if self._head is not None:
            self._act(self._head.node_gone(node, reason, time.monotonic()))

    def job_over(self, job: int) -> None:
        """A driver has ended, here or elsewhere."""
        if self._head is not None:
            self._act(self._head.job_ended(job))

    @property
    def waiting(self) -> bool:
        """Whether `look` may be of use."""
        return self._head is not None and self._head.waiting and not self._looking

    def look(self) -> None:
        """Something has happened here: see whether what waits fits now."""
        assert self._head is not None
        self._looking = True
        try:
            self._head.capacity(self._own, self._free_here())
            self._act(self._head.tick(time.monotonic()))
        finally:
            self._looking = False
        self._broker.scheduler.node.wake(self._head.wake_at)

    def _free_here(self) -> dict[str, int]:
        return _free(self._broker.scheduler.node.ledger.available)

    def _act(self, actions: list[machine.Action]) -> None:
        for action in actions:
            self._do[type(action)](action)

    def _reserve(self, action: machine.Reserve) -> None:
        if action.node == self._own:
            self._broker.tell(e.BundlesWanted(action.group, action.attempt, action.bundles))
        elif self._cluster is not None:
            self._cluster.send(action.node, pm.HoldBundles(action.group, action.attempt, action.bundles))

    def _give_back(self, action: machine.GiveBack) -> None:
        if action.node == self._own:
            self._broker.tell(e.BundlesReturned(action.group, action.attempt))
        elif self._cluster is not None:
            self._cluster.send(action.node, pm.ReleaseBundles(action.group, action.attempt))

    def _announce(self, action: machine.Announce) -> None:
        self._record(action.spec, GroupState.CREATED if action.complete else GroupState.RESCHEDULING, action.nodes)
        if self._cluster is not None:
            self._cluster.tell_all_others(pm.GroupIs(action.spec, action.nodes))
        self._learn(action.spec, action.nodes)

    def _withdraw(self, action: machine.Withdraw) -> None:
        self._record(action.spec, GroupState.REMOVED, ())
        if self._cluster is not None:
            self._cluster.tell_all_others(pm.GroupGone(action.spec.id, action.reason))
        self._forget(action.spec.id, action.reason)

    def _infeasible(self, action: machine.Infeasible) -> None:
        self._broker.warn(action.spec.job, "infeasible " + action.spec.id.hex(), action.text)

    def _record(self, spec: GroupSpec, state: GroupState, nodes: tuple[bytes, ...]) -> None:
        bundles = tuple(resources.as_floats(bundle) for bundle in spec.bundles)
        row = PlacementGroupRow(
            spec.id, spec.job, state, spec.strategy, bundles, nodes, spec.name, spec.namespace, spec.detached
        )
        self._broker.records.tables.put_row(row)


def _free(available: Mapping[str, int]) -> dict[str, int]:
    """What is free outside of groups."""
    return {name: max(0, units) for name, units in available.items() if not placing.is_of_group(name)}
