"""A broker's part in a cluster: joining it, beating, telling others who came and went, and reaching the control store.

Covers what is said between brokers about themselves. Does not cover who is alive (`membership` decides), how messages travel (`links`),
what becomes of tasks and objects (the scheduler), what a node makes of a head that is away (`head_watch` decides), or how another node becomes the
head (`succession`). The head decides about members and holds the control store; every node, the head too, knows all the others.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from zray.broker import head_watch as hw
from zray.broker import peer_messages as pm
from zray.broker.links import Heard, Impostor, LinkEvent, Links, Prober, Reached, Refused
from zray.broker.membership import (
    BEAT_S,
    CannotJoin,
    Change,
    LoadReports,
    Member,
    Membership,
    Neighbours,
    NodeInfo,
    NodeLoad,
    Refusal,
    State,
    beat_seconds,
)
from zray.broker.revival import end_rows_of
from zray.broker.succession import PORT_REFUSES, STAND_INS, Succession
from zray.broker.told_rows import Place, ToldRows
from zray.gcs import messages as gcs_messages
from zray.gcs.replication.state import concerns_tasks
from zray.gcs.replication.timing import MOST_SILENT
from zray.gcs.tables import CLUSTER_KEY, ROW_TABLES, ClusterRow, JobRow, NodeRow, Table, decode_row, encode_row, key_of
from zray.ids import random_id
from zray.peer_transport import ClusterKey, PeerSockets
from zray.transport import bracketed

if TYPE_CHECKING:
    from collections.abc import Callable

    from zray.broker.config import BrokerConfig, ClusterConfig
    from zray.gcs.service import GcsService
    from zray.gcs.tables import GcsRow
    from zray.transport import Context, Poller

_JOIN_S: Final = 10.0
"""Seconds that a newcomer waits for the head's answer."""
_ASK_S: Final = 0.5
"""... and after which it asks again."""
_BREAKS: Final = 6
"""So many connections in a row that the other side ended mean that it does not take the key."""
_PAUSED_S: Final = 1.0
"""Seconds between two rounds of the loop that mean that this process was stopped."""
TUNNEL_S: Final = 5.0
"""Seconds for which a client outlives a head that it cannot reach: what refuses may be a tunnel that is being made again. (Nodes of the cluster
connect to the head's own port, and take a refusal for what it is.)"""
JOB_BITS: Final = 20
"""Jobs of one node are numbered within so many bits; above them stands the node's number in its cluster."""
_CLIENT_JOBS: Final = 3 << 29
"""From here on to bit 31, which marks guests' jobs: room for 8 million clients; below for 1,500 nodes that ever were."""
_CLIENT_JOB_BITS: Final = 6
"""A client has one driver."""
_STAND_IN: Final = b"\0" * 16
"""Names the head as long as its id is not known."""


class Cluster:
    """One broker's view of its cluster, and its voice there."""

    def __init__(
        self,
        config: BrokerConfig,
        place: ClusterConfig,
        context: Context,
        poller: Poller,
        gcs: GcsService,
        load: Callable[[], NodeLoad],
        end: Callable[[str], None],
    ) -> None:
        """Listen.

        Args:
            config: of the broker.
            place: its place in the cluster.
            context: what sockets are made in.
            poller: tells when `serve` is worth calling.
            gcs: this node's control store; that of a head which alone keeps the tables is the cluster's.
            load: tells what is free here now.
            end: ends this node, for the given reason: it does not belong to the cluster any more.

        Raises:
            OSError: the address cannot be had, or the key file cannot be read.
            ValueError: the key file holds no key.
        """
        self.own = bytes.fromhex(config.node)
        self.place = place
        self._own_gcs = gcs
        self.gcs = gcs
        """At the head: the cluster's tables."""
        self._load = load
        self.end = end
        self.key = ClusterKey.read(place.key_file)
        self._sockets = PeerSockets(context, self.own, self.key, poller)
        self.is_client = place.serves_one or not place.host
        """It connects one driver, and runs nothing."""
        self.is_outside = not place.host
        """It reaches the head only, over one connection."""
        self.address = ""
        if not self.is_outside:
            port = self._sockets.listen_behind_door(place.host, place.port, config.directory)
            self.address = f"{bracketed(place.host)}:{port}"
        self.links = Links(self._sockets, Prober(poller), self.own, client=self.is_outside)
        self.info = NodeInfo(
            id=self.own,
            address=self.address,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            resources=dict(config.resources),
            labels=dict(config.labels),
            version=place.version,
            python="{}.{}".format(*sys.version_info[:2]),
            session=config.session,
            directory=config.directory,
            serves_one=place.serves_one,
        )
        self.is_head = not place.head
        self.head = self.own if self.is_head else _STAND_IN
        self.links.head = self.own if self.is_head else b""
        self.grace = place.head_grace
        """Seconds for which the head may be away; the head's own word, as far as it is known."""
        self.node_timeout = place.node_timeout
        """Seconds of silence after which a node is dead; the head's own word, too."""
        self.membership = Membership(self.info, place.node_timeout)
        """What the head decides by; of no use elsewhere."""
        self.neighbours = Neighbours(self.own)
        self._next_beat = 0.0
        self._next_report = 0.0
        self._beat_s = BEAT_S
        """Seconds between two beats of this node: longer in large clusters, as the head says."""
        self._reports = LoadReports()
        self._before_joining: list[LinkEvent] = []
        """What came while this node waited for the head's answer: others may hear of it first."""
        self._served = time.monotonic()
        self.watch = hw.HeadWatch(place.node_timeout)
        """Of no use at the head itself."""
        self.id = b""
        """Of the cluster; empty until it is known."""
        self._gone: dict[bytes, str] = {}
        """Nodes that are gone, as this one saw, and whose death the head has not announced yet."""
        self._requests: dict[int, tuple[bytes, Callable[[bytes], None]]] = {}
        """Requests to the head's control store that are not answered, and who waits for each."""
        self._last_request = 0
        self._handlers: dict[type[pm.PeerMessage], Callable[[bytes, Any, float], None]] = {
            pm.Join: self._join,
            pm.Rejoin: self._rejoin,
            pm.Joined: self._taken_back,
            pm.Rejected: self._rejected,
            pm.Beat: self._beat,
            pm.Loads: self._loads,
            pm.NodeUp: self._node_up,
            pm.NodeChanged: self._node_changed,
            pm.Leave: self._left,
            pm.Gone: self._told_gone,
            pm.StoreRequest: self._store_request,
            pm.StoreReply: self._store_reply,
        }
        self.storage = ""
        """Kind of storage that the head keeps its tables in, for people."""
        self.last_head = b""
        """Head, when it has begun another life: its id in the last one."""
        self.on_new_head: Callable[[], None] | None = None
        """Told when the head has begun another life."""
        self._told = ToldRows()
        self.index = 0
        """Of this node among all nodes (or all clients) that ever joined; the head's is 0."""
        self._head_at = place.head
        """host:port at which the head is asked for."""
        self.succession = Succession(self, config.directory, config.gcs_shards, place.node_timeout)
        if self.is_head and place.replicas > 1:
            self.succession.begin(place.replicas, time.monotonic())
            assert self.succession.tables is not None
            self.gcs = self.succession.tables.service
        self.before_sending: Callable[[], None] | None = None
        self.on_peer: Callable[[bytes, NodeInfo, NodeLoad, State, str], None] | None = None
        """Told of each change of another node: id, what it has, what is free, state, reason."""

    def serve_also(self, kind: type[pm.PeerMessage], handler: Callable[[bytes, Any], None]) -> None:
        """Let somebody else deal with a kind of message."""
        self._handlers[kind] = lambda node, message, now: handler(node, message)

    def send(self, node: bytes, message: pm.PeerMessage) -> None:
        """Send a message to another node, after what was put together before."""
        if self.before_sending is not None:
            self.before_sending()
        self.links.send(node, message, time.monotonic())

    def knows(self, node: bytes) -> bool:
        """Whether another node is a member now."""
        return node in self.neighbours.members

    def tell_all_others(self, message: pm.PeerMessage) -> None:
        """Send a message to every other node that lives."""
        for node in list(self.neighbours.members):
            self.send(node, message)

    # -- joining ------------------------------------------------------------------------------------------------------

    def join(self, timeout: float = _JOIN_S) -> None:
        """Become a member: ask the head until it answers (the head itself is one already). timeout in seconds.

        Raises:
            CannotJoin: it refuses, or gives no answer.
        """
        if self.is_head:
            self._begin_life(time.monotonic())
            return
        now = time.monotonic()
        until, ask = now + timeout, now
        self.links.know(_STAND_IN, self.place.head)
        host, _, port = self.place.head.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout).close()
        except OSError as error:
            raise CannotJoin(
                f"cannot connect to {self.place.head} ({error}): is the head running, and is that its address?"
            ) from None
        while self.head == _STAND_IN:
            if now >= ask:
                self.links.send_to_anybody(_STAND_IN, pm.Join(self.info))
                ask = now + _ASK_S
            self._await_answer(min(ask, until) - now)
            now = time.monotonic()
            if self.links.breaks >= _BREAKS:
                raise CannotJoin(
                    f"the node at {self.place.head} does not take the key in {self.place.key_file}: copy the key file of the head"
                )
            if now >= until and self.head == _STAND_IN:
                raise CannotJoin(f"the node at {self.place.head} gave no answer within {timeout:g} s")
        came, self._before_joining = self._before_joining, []
        self._take(came, now)

    def _await_answer(self, seconds: float) -> None:
        self._sockets.wait(max(0.0, seconds))
        for event in self.links.receive(time.monotonic()):
            if isinstance(event, Heard) and isinstance(event.message, pm.Rejected):
                raise CannotJoin(event.message.reason)
            if isinstance(event, Heard) and isinstance(event.message, pm.HeadIs):
                self._look_at(event.message.head)
            elif isinstance(event, Heard) and isinstance(event.message, pm.Joined):
                if self.head == _STAND_IN:
                    self._admitted(event.message)
            else:
                self._before_joining.append(event)

    def _look_at(self, head: NodeInfo) -> None:
        """Who was asked is not the head, but knows it."""
        self._head_at = head.address
        self.links.forget(_STAND_IN)
        self.links.know(_STAND_IN, self._head_at)

    def _admitted(self, message: pm.Joined) -> None:
        now = time.monotonic()
        if self.is_outside and message.node_timeout:
            # The next head cannot connect to a client and tell it: behind a tunnel, only silence tells that the last one is gone.
            most = message.node_timeout if message.serving is None else MOST_SILENT
            self.watch = hw.HeadWatch(min(message.node_timeout, most))
        self._told_by_head(message)
        self.watch.joined(message.head.id, self._grace(message), now)
        self.storage = message.storage
        self.index = message.index
        self.id = bytes.fromhex(message.cluster)
        self._meet(_STAND_IN, message, now)

    def _told_by_head(self, message: pm.Joined) -> None:
        """What every later head has to go by, too."""
        self.grace = message.grace
        self.node_timeout = self.succession.node_timeout = message.node_timeout or self.node_timeout
        self.succession.learn(message.serving)

    def _grace(self, message: pm.Joined) -> float:
        """For how long the head may be away."""
        return max(message.grace, TUNNEL_S) if self.is_outside else message.grace

    def _meet(self, node: bytes, message: pm.Joined, now: float) -> None:
        """A head has taken this node in: talk to it under its name, and learn who else is there. `node`: who has answered, or its stand-in."""
        self.head = message.head.id
        self.links.head = self.head
        if node != self.head:
            # Through a tunnel the head has another address than it knows.
            self._head_at = self.links.address_of(node) or self._head_at
            self.links.rename(node, self.head, now)
        else:
            self._head_at = message.head.address
        for info in (message.head, *message.members):
            self._learn(info, now)
        self.links.know(self.head, self._head_at)
        if node != _STAND_IN:
            self.links.forget(_STAND_IN)
        self.succession.found()

    def _learn(self, info: NodeInfo, now: float) -> None:
        if self.neighbours.learn(info, now):
            self.links.know(info.id, info.address)
            self._tell_of_peer(info.id)

    def _tell_of_peer(self, node: bytes) -> None:
        member = self.neighbours.members.get(node)
        if member is not None and self.on_peer is not None:
            self.on_peer(node, member.info, member.load, member.state, member.reason)

    def load_of(self, node: bytes, load: NodeLoad) -> None:
        """A node says what is free there."""
        self.neighbours.load(node, load, time.monotonic())
        self._tell_of_peer(node)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def serve(self, now: float) -> None:
        """Take in what has come."""
        self._notice_pause(now)
        self._take(self.links.receive(now), now)

    def serve_descriptors(self, descriptors: list[int], now: float) -> None:
        """Take in what became of probes."""
        self._take(self.links.probed(descriptors), now)

    @property
    def wake_at(self) -> float:
        """When `tick`, or `end_round`, is wanted at the latest (monotonic seconds)."""
        return min(self._next_beat, self.links.wake_at, self.succession.wake_at)

    def end_round(self, now: float) -> None:
        """After all that has come was taken in: let other copies of the tables have what was written."""
        self.succession.end_round(now)

    def now(self) -> float:
        """Return the time by which all here goes (monotonic seconds)."""
        return time.monotonic()

    def tick(self, now: float) -> None:
        """Beat, acknowledge, look who is silent."""
        self._notice_pause(now)
        if now >= self._next_beat:
            self._next_beat = now + BEAT_S
            self.succession.tick(now)
            if self.is_head and not self.succession.may_decide(now):
                self.membership.paused(BEAT_S)  # it may be this node that is cut off
            elif self.is_head:
                self._decide(self.membership.tick(now), now)
                for node in self.membership.to_look_at(now):
                    if self.links.probe(node, now):
                        self.lost(node, PORT_REFUSES, now)
            else:
                self.follow(self.watch.tick(now))
            if now >= self._next_report and (not self.is_head or self.succession.may_decide(now)):
                self._next_report = now + self._beat_s - BEAT_S / 2
                self._report(now)
            if not self.is_head:
                self._tell_rows(self._told.tick(now))
        self._take(self.links.tick(now), now)

    def _notice_pause(self, now: float) -> None:
        """When this process was stopped, nobody was silent for so long."""
        if self.is_head and now - self._served > _PAUSED_S:
            self.membership.paused(now - self._served)
        self._served = now

    def _report(self, now: float) -> None:
        """Say what is free here, or (the head) everywhere."""
        if not self.is_head:
            if not self.watch.is_lost:
                self.links.send(self.head, pm.Beat(self._load()), now)
            return
        self._heard_load(self.own, self._load(), now)
        members = [member for member in self.membership.present() if not member.awaited]
        loads = {member.info.id: member.load for member in members if not member.info.is_client}
        self._beat_s = beat_seconds(len(members))
        bodies = [
            pm.encode(pm.Loads({node: loads[node] for node in window}, self._beat_s))
            for window in self._reports.windows(list(loads))
        ]
        for index, member in enumerate(members):
            if member.info.id != self.own:
                self.links.send_encoded(member.info.id, bodies[index % len(bodies)])

    def _heard_load(self, node: bytes, load: NodeLoad, now: float) -> None:
        """At the head: a node (perhaps the head itself) says what is free there."""
        member = self.membership.members.get(node)
        if member is not None and member.load != load:
            self._reports.changed(node)
        self._decide(self.membership.heard(node, load, now), now)

    def _take(self, events: list[LinkEvent], now: float) -> None:
        for event in events:
            if isinstance(event, Heard):
                self._heard(event.node, event.message, now)
            elif isinstance(event, Refused):
                self.lost(event.node, PORT_REFUSES, now)
            elif isinstance(event, Reached):
                if event.stand_in == _STAND_IN or event.stand_in in STAND_INS:
                    self.follow(self.watch.reachable(now))
            elif isinstance(event, Impostor):
                self.lost(event.node, "its broker is gone: another node is at its address", now)
                if event.node in self.neighbours.dead:
                    self.links.forget(event.node)  # what comes over that connection is another's

    def _heard(self, node: bytes, message: pm.PeerMessage, now: float) -> None:
        if isinstance(message, pm.Replicate):
            self.succession.replicate(node, message, now)
            return
        if self.is_head and not isinstance(message, (pm.Rejected, pm.Join, pm.Rejoin, pm.HeadIs)):
            # Late messages of the dead change nothing. It may not know: it was only paused.
            reason = self.membership.why_not_heard(node)
            if reason:
                self.links.send(node, pm.Rejected(reason), now)
                return
        if node in self.neighbours.dead and not isinstance(message, pm.Rejoin):
            return  # (who asks to be taken back is told that it is dead)
        if node == self.head:
            if self.succession.is_replaced:
                return  # it does not know yet that it is no head any more
            self.follow(self.watch.heard(now))
        self._handlers[type(message)](node, message, now)

    def lost(self, node: bytes, reason: str, now: float) -> None:
        """There is no process behind a node's port any more."""
        self.succession.ended(node, now)
        if self.is_head:
            self._decide(self.membership.end(node, reason), now)
        elif node == self.head:
            self.follow(self.watch.lost(reason, now))
        elif node in self.neighbours.members:
            self._gone[node] = reason
            self.links.send(self.head, pm.Gone(node, reason), now)

    # -- at the head: its lives -----------------------------------------------------------------------------------------

    def _begin_life(self, now: float) -> None:
        """Go on with the cluster that is in the storage, or begin one."""
        self.storage = self.place.storage.partition(":")[0] if self.place.replicas == 1 else "replicas"
        last = self.gcs.row(ClusterRow, CLUSTER_KEY)
        if last is None:
            row = ClusterRow(random_id(), self.own)
        else:
            row = msgspec.structs.replace(last, head=self.own, lives=last.lives + 1)
            self.last_head = last.head
        self.id = row.id
        self.gcs.put_row(row)
        self.gcs.put_row(node_row(self.info, 0))
        for node in self.gcs.rows(NodeRow):
            if node.alive and node.index:
                self._expect(info_of(node), now)

    def take_over(self, gcs: GcsService, membership: Membership) -> None:
        """This node is the head from now on: with these tables, and members that `expect_all` names."""
        self.last_head, self.head = self.head, self.own
        self.is_head = True
        self.links.head = self.own
        self.links.forget(_STAND_IN)
        self.gcs = gcs
        self.membership = membership

    def expect_all(self, rows: list[NodeRow], now: float) -> None:
        """These were members of the last head, and should come to this one."""
        for row in rows:
            self._expect(info_of(row), now)

    def ask_itself(self) -> None:
        """This node has become the head: what it has asked the last one, it answers itself. What that one carried out is not done again."""
        requests, self._requests = self._requests, {}
        for number, (body, answer) in requests.items():
            self._serve(body, answer, (self.own, number))
        self.gcs.forget_answers(self.own, 1 << 63)

    def _expect(self, info: NodeInfo, now: float) -> None:
        """A node of the last life that should come back."""
        if self.membership.expect(info, self.grace or self.node_timeout, now):
            self._learn(info, now)
            self.apply(Change(info.id, State.SILENT, "it has not come back to the head yet"))

    # -- at the head --------------------------------------------------------------------------------------------------

    def _join(self, node: bytes, message: pm.Join, now: float) -> None:
        info = message.info
        if self.is_head and not self.succession.may_decide(now):
            return  # it asks again
        try:
            if not self.is_head:
                if self.succession.tell_head(node, now):
                    return
                raise Refusal(f"this node is not the head: join {self._head_at}")
            if info.id != node:
                raise Refusal("the node's id is not the one it connects with")
            changes = self.membership.join(info, now)
        except Refusal as refusal:
            self.links.send(node, pm.Rejected(str(refusal)), now)
            return
        row = self.gcs.row(NodeRow, node)
        index = row.index if row is not None else self._next_index(info)
        self._take_in(info, index, row, changes, now)

    def _next_index(self, info: NodeInfo) -> int:
        """Clients come and go far more often than nodes: they are counted apart, or job numbers would not last."""
        row = self.gcs.row(ClusterRow, CLUSTER_KEY)
        assert row is not None, "the head has begun its life"
        index = (row.clients if info.is_client else row.joined) + 1
        self._indices_reach(info, index)
        return index

    def _indices_reach(self, info: NodeInfo, index: int) -> None:
        """No later node (or client) may get this index."""
        row = self.gcs.row(ClusterRow, CLUSTER_KEY)
        if row is None:
            return
        if info.is_client and row.clients < index:
            self.gcs.put_row(msgspec.structs.replace(row, clients=index))
        elif not info.is_client and row.joined < index:
            self.gcs.put_row(msgspec.structs.replace(row, joined=index))

    def _rejoin(self, node: bytes, message: pm.Rejoin, now: float) -> None:
        """A node that had lost this head, or its last life, comes back."""
        info = message.info
        if self.is_head and not self.succession.may_decide(now):
            return  # it asks again
        try:
            if not self.is_head:
                if self.succession.tell_head(node, now):
                    return
                raise Refusal(f"this node is not the head: join {self._head_at}")
            if message.cluster != self.id.hex():
                raise Refusal(
                    f"the head at {self.address} has begun another cluster, without the storage of the one that this node belonged to: "
                    "start the node again"
                )
            row = self.gcs.row(NodeRow, node)
            if self.succession.tables is not None and row is not None and not row.alive:
                raise Refusal(f"this node was declared dead ({row.reason}): start it again")
            changes = self.membership.rejoin(info, now)
        except Refusal as refusal:
            self.links.send(node, pm.Rejected(str(refusal)), now)
            return
        if self.succession.tables is None:  # else no member is ever forgotten
            for other in message.members:
                self._expect(other, now)
        self._indices_reach(info, message.index)
        self._take_in(info, message.index, self.gcs.row(NodeRow, node), changes, now)

    def _take_in(self, info: NodeInfo, index: int, row: NodeRow | None, changes: list[Change], now: float) -> None:
        """Answer a node that belongs to the cluster, and tell the others."""
        node = info.id
        others = [member.info for member in self.membership.present() if member.info.id not in (self.own, node)]
        self._learn(info, now)
        self.links.know(node, info.address)
        if row is None or not row.alive:
            self.gcs.put_row(node_row(info, index))
            self._tell_all(pm.NodeUp(info), now, but=node)
        joined = pm.Joined(
            self.id.hex(),
            self.info,
            others,
            index,
            self.grace,
            self.storage,
            self.node_timeout,
            self.succession.serving,
        )
        self.gcs.when_stored(lambda: self.links.send(node, joined, time.monotonic()))
        self._decide(changes, now)

    def job_number(self, count: int) -> int:
        """Return the cluster-wide number of a node's job: the `count`th that it has, from 1 on."""
        if self.is_client:
            return _CLIENT_JOBS | self.index << _CLIENT_JOB_BITS | count
        return self.index << JOB_BITS | count

    def _beat(self, node: bytes, message: pm.Beat, now: float) -> None:
        if self.is_head:
            self._heard_load(node, message.load, now)
            self.load_of(node, message.load)

    def _told_gone(self, node: bytes, message: pm.Gone, now: float) -> None:
        """A node says that another is gone: the head looks for itself."""
        if self.is_head and self.links.probe(message.node, now):
            self.lost(message.node, message.reason, now)

    def _left(self, node: bytes, message: pm.Leave, now: float) -> None:
        self.succession.ended(node, now)
        self._decide(self.membership.end(node, message.reason), now)

    def _decide(self, changes: list[Change], now: float) -> None:
        """Carry out what the membership has decided."""
        for change in changes:
            self._tell_all(pm.NodeChanged(change), now, but=change.node)
            if change.state == State.DEAD:
                end_rows_of(self.gcs, change.node, change.reason)
                self.gcs.forget_answers(change.node, 1 << 63)
            self.apply(change)

    def tell_members(self, message: pm.PeerMessage, now: float) -> None:
        """At the head: send a message to all members that have come to this head."""
        self._tell_all(message, now)

    def _tell_all(self, message: pm.PeerMessage, now: float, but: bytes = b"") -> None:
        for member in self.membership.present():
            # Who has not come back from the head's last life yet will be told all when it does.
            if member.info.id not in (self.own, but) and not member.awaited:
                self.links.send(member.info.id, message, now)

    def _store_request(self, node: bytes, message: pm.StoreRequest, now: float) -> None:
        self.gcs.forget_answers(node, message.oldest)
        self._serve(
            message.body,
            lambda reply: self.links.send(node, pm.StoreReply(message.number, reply), time.monotonic()),
            (node, message.number),
        )

    def _serve(self, body: bytes, answer: Callable[[bytes], None], origin: tuple[bytes, int] | None = None) -> None:
        """At the head: carry out a request. Rows of its own node's tasks are no part of tables that several nodes keep."""
        own = self.gcs is not self._own_gcs and concerns_tasks(body)
        (self._own_gcs if own else self.gcs).serve_request(body, answer, origin)

    # -- at the others ------------------------------------------------------------------------------------------------

    def _rejected(self, node: bytes, message: pm.Rejected, now: float) -> None:
        asked = self.watch.is_lost and (node in STAND_INS or self.succession.asks(node))
        if asked or node in (self.head, _STAND_IN):
            self.follow(self.watch.refused(message.reason))

    def follow(self, actions: list[hw.Action]) -> None:
        """Do what the watch over the head has decided."""
        for action in actions:
            if isinstance(action, hw.Hang):
                print(f"[zray] the head is lost: {action.reason}", file=sys.stderr, flush=True)
                self.links.pause(self.head)
                self.links.know(_STAND_IN, self._head_at)
                self.apply(Change(self.head, State.SILENT, action.reason))
            elif isinstance(action, hw.Ask):
                others = [member.info for node, member in self.neighbours.members.items() if node != self.head]
                rejoin = pm.Rejoin(self.info, self.id.hex(), self.index, others)
                self.links.send_to_anybody(_STAND_IN, rejoin)
                self.succession.ask(rejoin, time.monotonic())
            elif isinstance(action, hw.Back):
                self.links.forget(_STAND_IN)
                self.links.know(self.head, self._head_at)
                self.succession.found()
                self.apply(Change(self.head, State.ALIVE))
            elif isinstance(action, hw.Replaced):
                self.apply(Change(action.old, State.DEAD, f"the head began another life: {action.reason}"))
            else:
                self.end(action.reason)

    def _taken_back(self, node: bytes, message: pm.Joined, now: float) -> None:
        """The head that was lost, or its next life, has answered."""
        if self.is_head or not self.watch.is_lost or node not in (_STAND_IN, message.head.id, *STAND_INS):
            return
        if message.serving is not None and message.serving.epoch < self.succession.epoch:
            return  # it does not know yet that it is no head any more
        if message.head.id == self.head and self.succession.is_replaced:
            return
        actions = self.watch.joined(message.head.id, self._grace(message), now)
        if isinstance(actions[0], hw.Back):
            self.follow(actions)
            return
        old = self.head
        self.follow(actions)
        self._told_by_head(message)
        self._meet(node, message, now)
        print(f"[zray] the head {old.hex()[:8]} is replaced by {self.head.hex()[:8]}", file=sys.stderr, flush=True)
        there = {self.own, self.head, *(info.id for info in message.members)}
        for other in [other for other in self.neighbours.members if other not in there]:
            self.apply(Change(other, State.DEAD, "the head did not take it back"))
        for other, reason in self._gone.items():
            self.links.send(self.head, pm.Gone(other, reason), now)
        for number, (body, _) in self._requests.items():
            self.links.send(self.head, pm.StoreRequest(number, body, min(self._requests)), now)
        if self.on_new_head is not None:
            self.on_new_head()

    def _loads(self, node: bytes, message: pm.Loads, now: float) -> None:
        self._beat_s = message.beat
        for other, load in message.loads.items():
            if other != self.own:
                self.load_of(other, load)

    def _node_up(self, node: bytes, message: pm.NodeUp, now: float) -> None:
        self._learn(message.info, now)

    def _node_changed(self, node: bytes, message: pm.NodeChanged, now: float) -> None:
        self.apply(message.change)

    def apply(self, change: Change) -> None:
        if change.node == self.own:
            return
        member = self.neighbours.members.get(change.node)
        if not self.neighbours.change(change) or member is None:
            return
        if change.state == State.DEAD:
            self.links.bury(change.node)
            self._gone.pop(change.node, None)
            if self.on_peer is not None:
                self.on_peer(change.node, member.info, member.load, State.DEAD, change.reason)
        else:
            if change.state == State.ALIVE and not self.links.is_direct(change.node):
                self.links.heard_again(change.node, time.monotonic())  # nobody else tells that it can be reached again
            self._tell_of_peer(change.node)

    def request(self, body: bytes, answer: Callable[[bytes], None]) -> None:
        """Ask the cluster's control store; `answer` is called with the encoded reply (at once on a head that alone keeps the tables in memory)."""
        if self.is_head:
            self._serve(body, answer)
            return
        self._last_request += 1
        number = self._last_request
        self._requests[number] = body, answer
        self.links.send(self.head, pm.StoreRequest(number, body, min(self._requests)), time.monotonic())

    def share(self, row: GcsRow) -> None:
        """Have the head store a row of this node, too, some time soon, whatever becomes of the head meanwhile."""
        self._tell_rows(self._told.changed((ROW_TABLES[type(row)], key_of(row)), encode_row(row)))

    def jobs_over(self) -> list[int]:
        """The jobs of this node that have ended, but of which the head may not know it yet."""
        rows = [decode_row(JobRow, value) for (table, _), value in self._told.newest.items() if table == Table.JOBS]
        return [row.number for row in rows if not row.running]

    @property
    def lives(self) -> int:
        """At the head: its number among all heads that this cluster has had."""
        row = self.gcs.row(ClusterRow, CLUSTER_KEY)
        assert row is not None, "the head has begun its life"
        return row.lives

    def _tell_rows(self, rows: list[tuple[Place, bytes]]) -> None:
        for place, value in rows:
            body = gcs_messages.encode(gcs_messages.Put(Table(place[0]), place[1], value))
            self.request(body, functools.partial(self._row_told, place))

    def _row_told(self, place: Place, answer: bytes) -> None:
        stored = isinstance(gcs_messages.decode_reply(answer), gcs_messages.Written)
        self._tell_rows(self._told.answered(place, stored, time.monotonic()))

    def _store_reply(self, node: bytes, message: pm.StoreReply, now: float) -> None:
        found = self._requests.pop(message.number, None)
        if found is not None:
            found[1](message.body)

    # -- looking ------------------------------------------------------------------------------------------------------

    def present(self) -> list[Member]:
        """All nodes that are not dead, clients left out; this one first, with what is free now."""
        own = Member(self.info, 0.0)
        own.load = self._load()
        return [member for member in (own, *self.neighbours.members.values()) if not member.info.is_client]

    def clients(self) -> list[Member]:
        """The clients that are not dead, as far as this node knows; not itself."""
        return [member for member in self.neighbours.members.values() if member.info.is_client]

    def dead(self) -> list[tuple[NodeInfo | None, bytes, str]]:
        """Nodes that died, clients left out: what is known of each, its id, and why."""
        known = self.membership.members
        return [
            (known[node].info if node in known else None, node, reason)
            for node, reason in self.neighbours.dead.items()
            if node not in self.neighbours.dead_clients
        ]

    def close(self, reason: str) -> None:
        """Leave."""
        if not self.is_head and self.head != _STAND_IN:
            self.links.send(self.head, pm.Leave(reason), time.monotonic())
        self.succession.close()
        self.links.close()

    def close_door(self) -> None:
        """Let nobody in any more. When all sockets are closed: what they sent last goes through there."""
        self._sockets.close_door()


def node_row(info: NodeInfo, index: int) -> NodeRow:
    """Return the row of a node that has joined now."""
    return NodeRow(
        info.id,
        info.address,
        info.hostname,
        info.pid,
        info.resources,
        info.labels,
        started=time.time(),
        index=index,
        version=info.version,
        python=info.python,
        session=info.session,
        directory=info.directory,
        serves_one=info.serves_one,
    )


def info_of(row: NodeRow) -> NodeInfo:
    """Return what a node said of itself when it joined."""
    return NodeInfo(
        row.id,
        row.address,
        row.hostname,
        row.pid,
        row.resources,
        row.labels,
        row.version,
        row.python,
        row.session,
        row.directory,
        row.serves_one,
    )
