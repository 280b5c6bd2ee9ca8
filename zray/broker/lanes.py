"""Lanes: connections over which a process calls an actor on another node without the brokers between.

Covers asking for lanes and granting them, what the node of each end remembers, and their ends. Does not cover what goes over a lane and what comes
through the brokers nevertheless (`zray.lanes`, the caller's side), the actor's end (`zray.lane_ends`), or the port that all lanes of a node come
through (`zray.node_port`).

A lane is a number, given by the actor's node. To that node it is a calling process like its own: calls are numbered in it, and its end is told to the
actor as the death of a caller. Whoever knows the secret of a lane belongs to the cluster: it is drawn for that lane, and told over connections between
brokers, which have shown the cluster's key.
"""

from __future__ import annotations

import itertools
import os
import random
import secrets
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from zray import wire
from zray.broker import events as e
from zray.broker import peer_messages as pm
from zray.broker.actor_table import ALIVE
from zray.broker.jobs import GUEST_BIT
from zray.ids import random_id
from zray.node_port import NUMBERS, socket_behind_door
from zray.placing import DEFAULT, NODE
from zray.task import LANE_BIT, TaskSpec

if TYPE_CHECKING:
    from zray.broker.actor_table import ActorRecord
    from zray.broker.cluster import Cluster
    from zray.broker.ledger import Demand
    from zray.broker.server import Broker

_NOWHERE: Final = b""


class _Question(NamedTuple):
    """A process of this node wants a lane."""

    process: int
    reply: bytes
    node: bytes
    """Who was asked first."""
    is_lease: bool


class _Granted(NamedTuple):
    """A lane to an actor or a leased worker of this node."""

    caller: bytes
    """Its node."""
    worker: int
    is_lease: bool


class _Wanted(NamedTuple):
    """A process of another node wants a worker of this one."""

    caller: bytes
    """Its node."""
    number: int
    """Of its question."""
    lane: int
    job: int


class Lanes:
    """One broker's dealings in lanes."""

    def __init__(self, broker: Broker, cluster: Cluster) -> None:
        self._broker = broker
        self._cluster = cluster
        self._may_dial = not cluster.is_outside
        """Programs outside of the cluster need not reach its nodes: one connection, to the head, is enough for them."""
        self._numbers = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._used: dict[int, set[tuple[bytes, int]]] = {}
        """By process of this node: the node that each of its lanes leads to, and the number that this one has given."""
        self._granted: dict[int, _Granted] = {}
        self._doors: dict[int, int] = {}
        """By worker that receives from other nodes: the number to ask for."""
        self._free = list(reversed(NUMBERS))
        """Those that none of them has."""
        self.refused = 0
        """Connections to processes of this node that did not know the secret of any stream."""
        self._wanted: dict[bytes, _Wanted] = {}
        """By the reply that the scheduler will be asked to seal."""
        cluster.serve_also(pm.AskLane, lambda _, m: self._asked_for(m))
        cluster.serve_also(pm.AskLease, self._asked_for_lease)
        cluster.serve_also(pm.RunOnLane, self._see_to_tasks)
        cluster.serve_also(pm.LaneIs, self._answered)
        cluster.serve_also(pm.LanesOver, lambda _, m: self._over(m.lanes))

    def describe(self) -> list[str]:
        """The lanes that begin or end here."""
        return [
            *(
                f"lane {number & ~LANE_BIT} of process {process} leads to {node.hex()[:8]}"
                for process, lanes in self._used.items()
                for node, number in sorted(lanes)
            ),
            *(
                f"lane {n & ~LANE_BIT} of {to.caller.hex()[:8]} leads to worker {to.worker}"
                for n, to in self._granted.items()
            ),
        ]

    # -- where calls are made -----------------------------------------------------------------------------------------

    def open(self, message: wire.OpenLane) -> None:
        """A process wants to call an actor directly, which seems to live elsewhere."""
        node = self._towards(message.actor)
        if not self._may_dial or not node or not self._cluster.knows(node):
            self._refuse(message.reply)
            return
        number = next(self._numbers)
        self._questions[number] = _Question(message.process, message.reply, node, False)
        self._cluster.send(node, pm.AskLane(number, self._cluster.own, message.actor))

    def lease(self, message: wire.LeaseRequest) -> bool:
        """A process wants a worker for calls of one shape: ask another node for it when they cannot run here; False when they can."""
        broker = self._broker
        shape = broker.scheduler.node.tasks.shapes.get(message.shape)
        if shape is None or shape.demand.local or message.job not in broker.job_specs:
            return False
        node = self._node_for(shape.demand) if self._may_dial else _NOWHERE
        if not node:
            self._refuse(message.reply)
            return True
        assert broker.remote is not None
        job = broker.job_specs[message.job]
        shapes, lent = broker.remote.wrap(node, job.number, [TaskSpec(b"", message.shape)])
        number = next(self._numbers)
        self._questions[number] = _Question(message.process, message.reply, node, True)
        home = broker.remote.home_of(job.number)
        self._cluster.send(node, pm.AskLease(number, job, home, shapes, message.shape, lent))
        return True

    def _node_for(self, demand: Demand) -> bytes:
        """The node with the least to do that could run a demand; b"" when calls had better go through the scheduler one by one."""
        strategy = demand.strategy
        if strategy.kind not in (DEFAULT, NODE) or strategy.soft:
            return _NOWHERE
        peers = [
            peer
            for peer in self._broker.scheduler.node.peers.values()
            if peer.could_run(demand) and not peer.silent and self._cluster.knows(peer.id)
        ]
        return min(peers, key=lambda peer: (peer.queued, random.random())).id if peers else _NOWHERE

    def _towards(self, actor: bytes) -> bytes:
        """The node where an actor lives, or that knows more; b"": it does not live on another one."""
        record = self._broker.scheduler.node.actors.actors.get(actor)
        if record is not None:
            worker = record.worker
            return worker.peer.id if worker is not None and worker.peer is not None else _NOWHERE
        assert self._broker.sharing is not None
        return self._broker.sharing.lending.borrowed.get(actor, _NOWHERE)

    def _answered(self, node: bytes, message: pm.LaneIs) -> None:
        question = self._questions.pop(message.number, None)
        address = self._cluster.links.address_of(node)
        alive = question is not None and self._broker.store.alive(question.process)
        if question is None or not alive or not message.lane or not address:
            if message.lane:
                self._cluster.send(node, pm.LanesOver([message.lane]))
            if question is not None:
                self._refuse(question.reply)
            return
        self._used.setdefault(question.process, set()).add((node, message.lane))
        far = wire.LaneAddress(address, message.door, message.secret, node, message.lane, message.incarnation)
        found = wire.Lease(0, 0, message.incarnation, far) if question.is_lease else far
        self._broker.reply(question.reply, msgspec.msgpack.encode(found))

    def _refuse(self, reply: bytes) -> None:
        self._broker.reply(reply, b"")

    def close(self, message: wire.CloseLane) -> None:
        """A process does not use a lane any more."""
        lanes = self._used.get(message.process, set())
        if (message.node, message.lane) in lanes:
            lanes.remove((message.node, message.lane))
            self._cluster.send(message.node, pm.LanesOver([message.lane]))

    def hand_over(self, message: wire.SubmitLaneTasks) -> None:
        """Tasks went over a lane, and no answer has come: the node there sees to them, or this one when that is dead."""
        remote = self._broker.remote
        assert remote is not None
        remote.went_over_lane(message.node, message.job, message.lane, message.tasks)

    def process_gone(self, process: int) -> None:
        """A process of this node is dead: what it had sent through the brokers goes ahead of this."""
        by_node: dict[bytes, list[int]] = {}
        for node, lane in sorted(self._used.pop(process, set())):
            by_node.setdefault(node, []).append(lane)
        for node, lanes in by_node.items():
            self._cluster.send(node, pm.LanesOver(lanes))

    # -- where actors live --------------------------------------------------------------------------------------------

    def _asked_for(self, message: pm.AskLane) -> None:
        """A process of another node wants to call an actor directly: grant it, or pass it on to who knows where that one lives."""
        record = self._broker.scheduler.node.actors.actors.get(message.actor)
        if record is not None and record.state == ALIVE and record.worker is not None and record.worker.peer is None:
            self._cluster.send(message.asker, self._grant(message, record))
            return
        onwards = self._towards(message.actor)
        if onwards and onwards != message.asker and self._cluster.knows(onwards):
            self._cluster.send(onwards, message)
        else:
            self._cluster.send(message.asker, pm.LaneIs(message.number))

    def _grant(self, message: pm.AskLane, record: ActorRecord) -> pm.LaneIs:
        assert record.worker is not None
        number, spec = record.worker.number, record.spec
        # Threads cannot share the stream on which answers leave; what is logged is answered when it is safe.
        by_threads = spec.max_concurrency > 1 and not spec.is_async
        if by_threads or spec.checkpoint_every or self._cluster.is_client:
            return pm.LaneIs(message.number)
        lane = LANE_BIT | next(self._numbers)
        return self._admit(_Granted(message.asker, number, False), message.number, lane, record.incarnation)

    def _admit(self, granted: _Granted, question: int, lane: int, incarnation: int) -> pm.LaneIs:
        """Have a worker expect a process of another node."""
        door = self._doors.get(granted.worker)
        if door is None:
            if not self._free:
                return pm.LaneIs(question)
            door = self._doors[granted.worker] = self._free.pop()
        secret = secrets.token_bytes(32)
        path = os.path.join(self._broker.config.directory, socket_behind_door(door))
        self._granted[lane] = granted
        self._broker.performer.send(granted.worker, wire.ExpectVisitor(path, lane, secret))
        return pm.LaneIs(question, door, secret, lane, incarnation)

    def _asked_for_lease(self, node: bytes, message: pm.AskLease) -> None:
        """A process of another node wants a worker for itself: have the scheduler lend one, as to a process of this node."""
        broker = self._broker
        assert broker.remote is not None
        lent = broker.remote.unwrap(node, message)
        shape = broker.shapes.get(message.shape)
        if broker.remote.end_again(message.job.number) or shape is None:
            self._cluster.send(node, pm.LaneIs(message.number))
            return
        broker.remote.keep_function(message.job.number, shape.function, lent)
        if broker._missing((shape.function,)):  # it comes: the next time
            self._cluster.send(node, pm.LaneIs(message.number))
            return
        lane, reply = LANE_BIT | next(self._numbers), random_id()
        self._wanted[reply] = _Wanted(node, message.number, lane, message.job.number)
        broker.tell(e.LeaseRequested(lane, GUEST_BIT | message.job.number, message.shape, reply))

    def takes(self, reply: bytes) -> bool:
        """Whether the answer to a request for a lease is for another node."""
        return reply in self._wanted

    def leased(self, reply: bytes, worker: int, epoch: int) -> None:
        """A worker was lent to a process of another node."""
        wanted = self._wanted.pop(reply)
        found = pm.LaneIs(wanted.number)
        if self._cluster.knows(wanted.caller):
            found = self._admit(_Granted(wanted.caller, worker, True), wanted.number, wanted.lane, epoch)
        if not found.lane:
            self._broker.tell(e.ProcessGone(wanted.lane))
        self._cluster.send(wanted.caller, found)

    def _see_to_tasks(self, node: bytes, message: pm.RunOnLane) -> None:
        """Tasks of another node went to a worker of this one, and their caller has had no answer."""
        granted = self._granted.get(message.lane)
        alive = granted is not None and granted.worker in self._broker.workers
        numbers = [spec.sequence for spec in message.tasks]
        assert self._broker.remote is not None
        self._broker.remote.take_over(node, message, granted.worker if granted is not None and alive else 0)
        # Only now: the worker keeps the results until it is told that they are kept here.
        if granted is not None and alive:
            names = b"".join([spec.id for spec in message.tasks])
            self._broker.performer.send(granted.worker, wire.SkipOnLane(message.lane, numbers, names))

    def leads_here(self, lane: int) -> bool:
        """Whether there is a lane with this number to an actor or a leased worker of this node."""
        return lane in self._granted

    def _over(self, lanes: list[int]) -> None:
        for lane in lanes:
            granted = self._granted.pop(lane, None)
            if granted is None or granted.worker not in self._broker.workers:
                continue
            self._broker.performer.send(granted.worker, wire.CallerGone(lane))
            if granted.is_lease:
                self._broker.tell(e.ProcessGone(lane))

    def worker_gone(self, number: int) -> None:
        """A worker of this node is dead."""
        door = self._doors.pop(number, None)
        if door is not None:
            self._free.append(door)
            for lane in [lane for lane, granted in self._granted.items() if granted.worker == number]:
                del self._granted[lane]
            try:
                os.unlink(os.path.join(self._broker.config.directory, socket_behind_door(door)))
            except OSError:
                pass

    def job_over(self, job: int) -> None:
        """A job has ended: none of its callers gets a worker."""
        for reply in [reply for reply, wanted in self._wanted.items() if wanted.job == job]:
            del self._wanted[reply]

    # -- ends of nodes ------------------------------------------------------------------------------------------------

    def node_gone(self, node: bytes) -> None:
        """A node is dead: nobody there calls any more, or answers."""
        self._over([lane for lane, granted in self._granted.items() if granted.caller == node])
        for reply in [reply for reply, wanted in self._wanted.items() if wanted.caller == node]:
            self._broker.tell(e.ProcessGone(self._wanted.pop(reply).lane))
        for number in [number for number, question in self._questions.items() if question.node == node]:
            self._refuse(self._questions.pop(number).reply)
        for lanes in self._used.values():
            lanes.difference_update([lane for lane in lanes if lane[0] == node])
