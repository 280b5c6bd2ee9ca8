"""A broker's part in placement groups: messages and rows; no decisions.

Covers the way of a wish to the head and back, carrying out what the head's machine asks for, telling this node's scheduler
where bundles are, ending the waits for `PlacementGroup.ready()`, and telling the next head what is held here. Does not cover the
decisions (`placement_groups`) or the books of the node (`group_events`). A single machine is its own head.

A group's row is written first, and what it says is told when it is stored (by all replicas, or in the file): so whatever a node
believes, the next head finds in the rows, and what it does not find there nobody has heard of.
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
        self._requests: dict[int, tuple[bytes, pm.WantGroup | pm.DropGroup]] = {}
        """What the head was asked and has not answered: the reply to seal, and the question, for the next head."""
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
            cluster.serve_also(pm.WantGroup, self._wish_from_afar)
            cluster.serve_also(pm.DropGroup, self._wish_from_afar)
            cluster.serve_also(pm.GroupAnswer, lambda _, m: self._answer(m.number, m.problem))
            cluster.serve_also(pm.HoldBundles, lambda _, m: self._hold(m))
            cluster.serve_also(pm.BundlesHeld, self._held)
            cluster.serve_also(pm.ReleaseBundles, lambda _, m: broker.tell(e.BundlesReturned(m.group, m.attempt)))
            cluster.serve_also(pm.GroupIs, lambda _, m: self._learn(m.spec, m.nodes))
            cluster.serve_also(pm.GroupGone, lambda _, m: self._forget(m.group, m.reason))
            cluster.serve_also(pm.AskGroup, self._asked_from_afar)
            cluster.serve_also(pm.BundlesKept, self._kept_from_afar)

    # -- wishes of processes of this node -----------------------------------------------------------------------------------

    def create(self, message: wire.CreateGroup) -> None:
        """A process wants a group. The reply is what is wrong with the wish, or "" when the head has taken it in."""
        remote = self._broker.remote
        home = self._own if remote is None else remote.home_of(message.spec.job)
        self._ask_head(message.reply, lambda number: pm.WantGroup(number, home, message.spec))

    def remove(self, message: wire.RemoveGroup) -> None:
        """A process wants a group gone."""
        self._ask_head(message.reply, lambda number: pm.DropGroup(number, message.group))

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

    def _ask_head(self, reply: bytes, make: Callable[[int], pm.WantGroup | pm.DropGroup]) -> None:
        self._last_request += 1
        number = self._last_request
        message = make(number)
        self._requests[number] = reply, message
        self._send_request(number, message)

    def _send_request(self, number: int, message: pm.WantGroup | pm.DropGroup) -> None:
        if self._head is not None:
            self._carry_out(message, lambda problem: self._answer(number, problem))
        else:
            assert self._cluster is not None
            self._cluster.send(self._cluster.head, message)

    def _answer(self, number: int, problem: str) -> None:
        found = self._requests.pop(number, None)
        if found is not None:
            self._reply(found[0], problem)

    def _reply(self, reply: bytes, problem: str) -> None:
        self._broker.reply(reply, msgspec.msgpack.encode(problem))

    # -- what this node is told ----------------------------------------------------------------------------------------------

    def ask(self, group: bytes) -> None:
        """Nothing is known here of a group: ask the head."""
        if self._head is None:
            assert self._cluster is not None
            self._cluster.send(self._cluster.head, pm.AskGroup(group))
            return
        self._tell_of(group, self._learn, self._forget)

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

    # -- heads come and go ---------------------------------------------------------------------------------------------------

    def head_replaced(self) -> None:
        """Another head has taken this node in: it has the rows of the groups, and must know what was under way here."""
        assert self._cluster is not None
        self._cluster.send(self._cluster.head, self._kept())
        for number, (_, message) in list(self._requests.items()):
            self._send_request(number, message)

    def _kept(self) -> pm.BundlesKept:
        table = self._broker.scheduler.node.bundles
        held = [machine.Held(b.group, b.index, b.attempt, b.is_open) for b in table.held.values()]
        over = [] if self._cluster is None else self._cluster.jobs_over()
        return pm.BundlesKept(
            held, list({**table.known(), **dict.fromkeys(self._waiters)}), over, self._broker._own_load()
        )

    def take_over(self, life: int) -> None:
        """This node is the head from now on, of a cluster that had another one: go on with the groups of which there are rows.
        `life`: number of this head among all that the cluster has had."""
        assert self._cluster is not None
        ledger = self._broker.scheduler.node.ledger
        self._head = machine.PlacementGroups(life)
        self._heard.clear()
        self._head.node_seen(self._own, dict(ledger.total), ledger.labels)
        members = self._cluster.neighbours.members
        for member in members.values():
            if not member.info.is_client:
                self.node_seen(member.info, member.load)
        kept = [
            found
            for row in self._broker.records.tables.rows(PlacementGroupRow)
            if (found := _kept_group(row)) is not None
        ]
        self._act(self._head.take_over(kept, {self._own, *members}, time.monotonic()))
        self._take_report(self._own, self._kept(), self._learn, self._forget)
        for number, (_, message) in list(self._requests.items()):
            self._send_request(number, message)

    def _kept_from_afar(self, node: bytes, message: pm.BundlesKept) -> None:
        cluster = self._cluster
        if self._head is None or cluster is None:
            return
        cluster.load_of(node, message.load)
        self._take_report(
            node,
            message,
            lambda spec, nodes: cluster.send(node, pm.GroupIs(spec, nodes)),
            lambda group, reason: cluster.send(node, pm.GroupGone(group, reason)),
        )

    def _take_report(
        self,
        node: bytes,
        message: pm.BundlesKept,
        tell: Callable[[GroupSpec, tuple[bytes, ...]], None],
        tell_gone: Callable[[bytes, str], None],
    ) -> None:
        """A node says what it holds: settle it, and tell the node what it has missed."""
        assert self._head is not None
        self._act(self._head.reported(node, message.held, message.over, time.monotonic()))
        for group in message.known:
            # (All that the node has heard of where its bundles are may be lost.)
            self._tell_of(group, tell, tell_gone, or_nowhere=True)

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

    def _carry_out(self, message: pm.WantGroup | pm.DropGroup, answer: Callable[[str], None]) -> None:
        """Do what somebody wants, perhaps for the second time: an earlier head may have done it, and died before it answered."""
        assert self._head is not None
        problem = ""
        if isinstance(message, pm.WantGroup):
            problem = self._create(message.spec, message.home)
        else:
            self._act(self._head.remove(message.group, "it was removed"))
        self._when_stored(lambda: answer(problem))

    def _create(self, spec: GroupSpec, home: bytes) -> str:
        assert self._head is not None
        is_new = self._head.phase(spec.id) is None
        self._head.capacity(self._own, self._free_here())
        problem, actions = self._head.create(spec, home, time.monotonic())
        if is_new and not problem:
            bundles = tuple(resources.as_floats(bundle) for bundle in spec.bundles)
            row = PlacementGroupRow(spec.id, spec.job, GroupState.PENDING, spec.strategy, bundles)
            named = msgspec.structs.replace(row, name=spec.name, namespace=spec.namespace, detached=spec.detached)
            self._broker.records.tables.put_row(msgspec.structs.replace(named, spec=spec, home=home))
        self._act(actions)
        return problem

    def _wish_from_afar(self, node: bytes, message: pm.WantGroup | pm.DropGroup) -> None:
        cluster = self._cluster
        if self._head is not None and cluster is not None:
            self._carry_out(message, lambda problem: cluster.send(node, pm.GroupAnswer(message.number, problem)))

    def _held(self, node: bytes, message: pm.BundlesHeld) -> None:
        if self._head is None or self._cluster is None:
            return
        self._cluster.load_of(node, message.load)
        self._act(self._head.answered(node, message.group, message.attempt, message.accepted, time.monotonic()))

    def _asked_from_afar(self, node: bytes, message: pm.AskGroup) -> None:
        if self._head is None or self._cluster is None:
            return
        cluster = self._cluster
        self._tell_of(
            message.group,
            lambda spec, nodes: cluster.send(node, pm.GroupIs(spec, nodes)),
            lambda group, reason: cluster.send(node, pm.GroupGone(group, reason)),
        )

    def _tell_of(
        self,
        group: bytes,
        tell: Callable[[GroupSpec, tuple[bytes, ...]], None],
        tell_gone: Callable[[bytes, str], None],
        *,
        or_nowhere: bool = False,
    ) -> None:
        """Say what is known of a group, when that is stored; of one that waits, nothing now (or_nowhere: that it has no place)."""
        assert self._head is not None
        gone = self._head.why_gone(group)
        found = self._head.where(group, or_nowhere)
        if gone is not None:
            self._when_stored(lambda: tell_gone(group, gone))
        elif found is not None:
            self._when_stored(lambda: tell(*found))

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
        state = GroupState.CREATED if action.complete else GroupState.RESCHEDULING
        self._record(action.spec.id, state=state, nodes=action.nodes)
        self._when_stored(lambda: self._tell_everybody(pm.GroupIs(action.spec, action.nodes)))

    def _withdraw(self, action: machine.Withdraw) -> None:
        self._record(action.spec.id, state=GroupState.REMOVED, nodes=(), reason=action.reason)
        self._when_stored(lambda: self._tell_everybody(pm.GroupGone(action.spec.id, action.reason)))

    def _tell_everybody(self, message: pm.GroupIs | pm.GroupGone) -> None:
        if self._cluster is not None:
            self._cluster.tell_all_others(message)
        if isinstance(message, pm.GroupIs):
            self._learn(message.spec, message.nodes)
        else:
            self._forget(message.group, message.reason)

    def _infeasible(self, action: machine.Infeasible) -> None:
        self._broker.warn(action.spec.job, "infeasible " + action.spec.id.hex(), action.text)

    def _record(self, group: bytes, **fields: object) -> None:
        tables = self._broker.records.tables
        row = tables.row(PlacementGroupRow, group)
        if row is not None:  # else somebody has deleted it
            tables.put_row(msgspec.structs.replace(row, **fields))

    def _when_stored(self, call: Callable[[], None]) -> None:
        """Nobody hears of what the next head might not find in the rows."""
        self._broker.records.tables.when_stored(call)


def _kept_group(row: PlacementGroupRow) -> machine.Kept | None:
    """What a row tells the next head; None: it is of a version whose groups ended with the head."""
    if row.spec is None:
        return None
    gone = (row.reason or "it was removed") if row.state == GroupState.REMOVED else ""
    return machine.Kept(row.spec, row.home, row.nodes, gone)


def _free(available: Mapping[str, int]) -> dict[str, int]:
    """What is free outside of groups."""
    return {name: max(0, units) for name, units in available.items() if not placing.is_of_group(name)}
