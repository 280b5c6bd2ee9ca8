"""A broker's part in a cluster: joining it, beating, telling others who came and went, and reaching the control store.

Covers what is said between brokers about themselves. Does not cover who is alive (`membership` decides), how messages travel (`links`), or
what becomes of tasks and objects (the scheduler). The head decides about members and holds the control store; every node, the head too, knows
all the others.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from zray.broker import peer_messages as pm
from zray.broker.links import Heard, Impostor, LinkEvent, Links, Prober, Refused
from zray.broker.membership import (
    BEAT_S,
    Change,
    Member,
    Membership,
    Neighbours,
    NodeInfo,
    NodeLoad,
    Refusal,
    State,
)
from zray.gcs.tables import ActorNameRow, NodeRow, key_of
from zray.peer_transport import ClusterKey, PeerSockets

if TYPE_CHECKING:
    from collections.abc import Callable

    from zray.broker.config import BrokerConfig, ClusterConfig
    from zray.gcs.service import GcsService
    from zray.transport import Context, Poller

_JOIN_S: Final = 10.0
"""Seconds that a newcomer waits for the head's answer."""
_ASK_S: Final = 0.5
"""... and after which it asks again."""
_BREAKS: Final = 6
"""So many connections in a row that the other side ended mean that it does not take the key."""
_STAND_IN: Final = b"\0" * 16
"""Names the head as long as its id is not known."""


class CannotJoin(Exception):
    """The cluster does not take this node, or is not there; the text says why."""


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
            gcs: this node's control store; the head's is the cluster's.
            load: tells what is free here now.
            end: ends this node, for the given reason: it does not belong to the cluster any more.

        Raises:
            OSError: the address cannot be had, or the key file cannot be read.
            ValueError: the key file holds no key.
        """
        self.own = bytes.fromhex(config.node)
        self.place = place
        self._gcs = gcs
        self._load = load
        self._end = end
        self.key = ClusterKey.read(place.key_file)
        self._sockets = PeerSockets(context, self.own, self.key, poller)
        port = self._sockets.listen(place.host, place.port)
        self.address = f"{place.host}:{port}"
        self.links = Links(self._sockets, Prober(poller), self.own)
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
        )
        self.is_head = not place.head
        self.head = self.own if self.is_head else _STAND_IN
        self._membership = Membership(self.info, place.node_timeout)
        """What the head decides by; of no use elsewhere."""
        self.neighbours = Neighbours(self.own)
        self._next_beat = 0.0
        self._head_heard = time.monotonic()
        self._requests: dict[int, Callable[[bytes], None]] = {}
        """Who waits for an answer of the head's control store."""
        self._handlers: dict[type[pm.PeerMessage], Callable[[bytes, Any, float], None]] = {
            pm.Join: self._join,
            pm.Joined: lambda node, message, now: None,
            pm.Rejected: self._rejected,
            pm.Beat: self._beat,
            pm.Loads: self._loads,
            pm.NodeUp: self._node_up,
            pm.NodeChanged: self._node_changed,
            pm.Leave: lambda node, message, now: self._decide(self._membership.end(node, message.reason), now),
            pm.Gone: self._gone,
            pm.StoreRequest: self._store_request,
            pm.StoreReply: self._store_reply,
        }
        self._joined = 0
        """Nodes that ever joined this head."""
        self.index = 0
        """Of this node among all that ever joined; the head's is 0."""
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

    def _await_answer(self, seconds: float) -> None:
        self._sockets.wait(max(0.0, seconds))
        for event in self.links.receive(time.monotonic()):
            if isinstance(event, Heard) and isinstance(event.message, pm.Rejected):
                raise CannotJoin(event.message.reason)
            if isinstance(event, Heard) and isinstance(event.message, pm.Joined):
                self._admitted(event.message)
                return

    def _admitted(self, message: pm.Joined) -> None:
        now = time.monotonic()
        self.head = message.head.id
        self.links.rename(_STAND_IN, self.head)
        for info in (message.head, *message.members):
            self._learn(info, now)
        self.links.know(self.head, self.place.head)  # through a tunnel the head has another address than it knows
        self._head_heard = now
        self.index = message.index

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
        self._take(self.links.receive(now), now)

    def serve_descriptors(self, descriptors: list[int], now: float) -> None:
        """Take in what became of probes."""
        self._take(self.links.probed(descriptors), now)

    @property
    def wake_at(self) -> float:
        """When `tick` is wanted at the latest (monotonic seconds)."""
        return min(self._next_beat, self.links.wake_at)

    def tick(self, now: float) -> None:
        """Beat, acknowledge, look who is silent."""
        if now >= self._next_beat:
            self._next_beat = now + BEAT_S
            if self.is_head:
                self._decide(self._membership.tick(now), now)
                self._membership.heard(self.own, self._load(), now)
                loads = {member.info.id: member.load for member in self._membership.present()}
                self._tell_all(pm.Loads(loads), now)
            else:
                self.links.send(self.head, pm.Beat(self._load()), now)
                if now - self._head_heard >= self.place.node_timeout:
                    self._end(f"the head was not heard of for {now - self._head_heard:.1f} s")
        self._take(self.links.tick(now), now)

    def _take(self, events: list[LinkEvent], now: float) -> None:
        for event in events:
            if isinstance(event, Heard):
                self._heard(event.node, event.message, now)
            elif isinstance(event, Refused):
                self._lost(event.node, "its broker is gone: its port refuses connections", now)
            elif isinstance(event, Impostor):
                self._lost(event.node, "its broker is gone: another node is at its address", now)

    def _heard(self, node: bytes, message: pm.PeerMessage, now: float) -> None:
        if self.is_head and self._membership.is_dead(node) and not isinstance(message, (pm.Rejected, pm.Join)):
            # Late messages of the dead change nothing. It may not know: it was only paused.
            reason = self._membership.members[node].reason
            self.links.send(node, pm.Rejected(f"this node was declared dead: {reason}"), now)
            return
        if node in self.neighbours.dead:
            return
        if node == self.head:
            self._head_heard = now
        self._handlers[type(message)](node, message, now)

    def _lost(self, node: bytes, reason: str, now: float) -> None:
        """There is no process behind a node's port any more."""
        if self.is_head:
            self._decide(self._membership.end(node, reason), now)
        elif node == self.head:
            self._end(f"the head is gone: {reason}")
        elif node in self.neighbours.members:
            self.links.send(self.head, pm.Gone(node, reason), now)

    # -- at the head --------------------------------------------------------------------------------------------------

    def _join(self, node: bytes, message: pm.Join, now: float) -> None:
        info = message.info
        try:
            if not self.is_head:
                raise Refusal(f"this node is not the head: join {self.place.head}")
            if info.id != node:
                raise Refusal("the node's id is not the one it connects with")
            changes = self._membership.join(info, now)
        except Refusal as refusal:
            self.links.send(node, pm.Rejected(str(refusal)), now)
            return
        others = [member.info for member in self._membership.present() if member.info.id not in (self.own, node)]
        self._learn(info, now)
        self._joined += bool(changes)
        self.links.send(node, pm.Joined(self.place.host, self.info, others, self._joined), now)
        if changes and changes[0].state == State.ALIVE and self._gcs.row(NodeRow, node) is None:
            self._gcs.put_row(
                NodeRow(node, info.address, info.hostname, info.pid, info.resources, info.labels, started=time.time())
            )
            self._tell_all(pm.NodeUp(info), now, but=node)
        else:
            self._decide(changes, now)

    def _beat(self, node: bytes, message: pm.Beat, now: float) -> None:
        if self.is_head:
            self._decide(self._membership.heard(node, message.load, now), now)
            self.load_of(node, message.load)

    def _gone(self, node: bytes, message: pm.Gone, now: float) -> None:
        """A node says that another is gone: the head looks for itself."""
        if self.is_head and self.links.probe(message.node, now):
            self._lost(message.node, message.reason, now)

    def _decide(self, changes: list[Change], now: float) -> None:
        """Carry out what the membership has decided."""
        for change in changes:
            self._tell_all(pm.NodeChanged(change), now, but=change.node)
            if change.state == State.DEAD:
                row = self._gcs.row(NodeRow, change.node)
                if row is not None:
                    self._gcs.put_row(
                        msgspec.structs.replace(row, alive=False, ended=time.time(), reason=change.reason)
                    )
                for name in [name for name in self._gcs.rows(ActorNameRow) if name.node == change.node]:
                    self._gcs.delete_row(ActorNameRow, key_of(name))
            self._apply(change)

    def _tell_all(self, message: pm.PeerMessage, now: float, but: bytes = b"") -> None:
        for member in self._membership.present():
            if member.info.id not in (self.own, but):
                self.links.send(member.info.id, message, now)

    def _store_request(self, node: bytes, message: pm.StoreRequest, now: float) -> None:
        self.links.send(node, pm.StoreReply(message.number, self._gcs.handle_request(message.body)), now)

    # -- at the others ------------------------------------------------------------------------------------------------

    def _rejected(self, node: bytes, message: pm.Rejected, now: float) -> None:
        if node == self.head:
            self._end(message.reason)

    def _loads(self, node: bytes, message: pm.Loads, now: float) -> None:
        for other, load in message.loads.items():
            if other != self.own:
                self.load_of(other, load)

    def _node_up(self, node: bytes, message: pm.NodeUp, now: float) -> None:
        self._learn(message.info, now)

    def _node_changed(self, node: bytes, message: pm.NodeChanged, now: float) -> None:
        self._apply(message.change)

    def _apply(self, change: Change) -> None:
        if change.node == self.own:
            return
        member = self.neighbours.members.get(change.node)
        if not self.neighbours.change(change) or member is None:
            return
        if change.state == State.DEAD:
            self.links.forget(change.node)
            if self.on_peer is not None:
                self.on_peer(change.node, member.info, member.load, State.DEAD, change.reason)
        else:
            self._tell_of_peer(change.node)

    def request(self, body: bytes, answer: Callable[[bytes], None]) -> None:
        """Ask the cluster's control store; `answer` is called with the encoded reply (at once on the head)."""
        if self.is_head:
            answer(self._gcs.handle_request(body))
            return
        number = len(self._requests) + 1
        while number in self._requests:
            number += 1
        self._requests[number] = answer
        self.links.send(self.head, pm.StoreRequest(number, body), time.monotonic())

    def _store_reply(self, node: bytes, message: pm.StoreReply, now: float) -> None:
        answer = self._requests.pop(message.number, None)
        if answer is not None:
            answer(message.body)

    # -- looking ------------------------------------------------------------------------------------------------------

    def present(self) -> list[Member]:
        """All nodes that are not dead; this one first, with what is free now."""
        own = Member(self.info, 0.0)
        own.load = self._load()
        return [own, *self.neighbours.members.values()]

    def dead(self) -> list[tuple[NodeInfo | None, bytes, str]]:
        """Nodes that died: what is known of each, its id, and why."""
        known = self._membership.members
        return [
            (known[node].info if node in known else None, node, reason) for node, reason in self.neighbours.dead.items()
        ]

    def close(self, reason: str) -> None:
        """Leave."""
        if not self.is_head and self.head != _STAND_IN:
            self.links.send(self.head, pm.Leave(reason), time.monotonic())
        self.links.close()
