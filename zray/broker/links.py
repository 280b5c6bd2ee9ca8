"""Conversations with other brokers: who is where, messages out, messages in, ports that refuse.

Covers the address book, connecting when needed, numbered frames over connections that break, passing frames on to and from
clients (`relay` decides which way they take), and looking whether a process is still behind a port. Does not cover what
messages mean (`cluster`), or sockets themselves (`peer_transport`).
"""

from __future__ import annotations

import errno
import socket
import sys
from typing import TYPE_CHECKING, Final, NamedTuple

from zray.broker import peer_messages as pm
from zray.broker import relay
from zray.broker.reliable import HEADER_BYTES, NEVER, MalformedFrame, ReliableLink
from zray.peer_transport import Arrived, Connected

if TYPE_CHECKING:
    from zray.peer_transport import PeerSockets
    from zray.transport import Poller

_PROBE_S: Final = 1.0
"""Seconds that a port may take to answer a probe."""
_LOOK_AGAIN_S: Final = (0.001, 0.003, 0.008, 0.02, 0.1, 0.5, 2.0)
"""Seconds after a connection broke at which the port is looked at again, unless the node is heard: a process that is being
killed loses its connections before its listening socket."""
STALLED_S: Final = 4.0
"""A connection over which nothing came for so long, although something should have, is ended and made anew: its route is dead, or a damaged
length has it wait for bytes that never come. (A process that is only paused loses nothing by it: frames are sent again.)"""
_REFUSALS: Final = frozenset({errno.ECONNREFUSED})


class Refused(NamedTuple):
    """The port of a node refuses connections: no process is behind it."""

    node: bytes


class Heard(NamedTuple):
    """A message of a node."""

    node: bytes
    message: pm.PeerMessage


class Reached(NamedTuple):
    """A connection to whoever is at an address has been made (`Links.send_to_anybody`)."""

    stand_in: bytes


class Impostor(NamedTuple):
    """Behind a node's address there is another node now."""

    node: bytes


LinkEvent = Refused | Heard | Reached | Impostor


class Prober:
    """Looks whether somebody listens at an address: one connection, made and dropped."""

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._open: dict[int, tuple[socket.socket, bytes, float]] = {}
        """By descriptor: the socket, which node is asked after, until when."""

    def ask(self, node: bytes, address: str, now: float) -> bool | None:
        """Begin a probe; True or False when the answer (refused?) is known at once, else None."""
        if any(asked == node for _, asked, _ in self._open.values()):
            return None
        host, _, port = address.rpartition(":")
        try:
            family, kind, protocol, _, target = socket.getaddrinfo(
                host.strip("[]"), int(port), type=socket.SOCK_STREAM
            )[0]
        except OSError:
            return False
        try:
            probe = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
        except OSError:  # this process has no descriptor to spare: that says nothing about the other
            return False
        code = probe.connect_ex(target)
        if code in (errno.EINPROGRESS, errno.EAGAIN):
            self._open[probe.fileno()] = probe, node, now + _PROBE_S
            self._poller.add(probe.fileno(), writing=True)
            return None
        probe.close()
        return code in _REFUSALS

    def answered(self, descriptors: list[int]) -> list[bytes]:
        """Take those of the ready descriptors that are probes; return the nodes whose port refused."""
        refused = []
        for fd in descriptors:
            found = self._open.pop(fd, None)
            if found is not None:
                probe, node, _ = found
                if probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in _REFUSALS:
                    refused.append(node)
                self._close(fd, probe)
        return refused

    def tick(self, now: float) -> None:
        """Give up probes that nobody answers: that says nothing."""
        for fd, (probe, _, until) in list(self._open.items()):
            if now >= until:
                del self._open[fd]
                self._close(fd, probe)

    def _close(self, fd: int, probe: socket.socket) -> None:
        self._poller.remove(fd)
        probe.close()

    def close(self) -> None:
        """Drop all probes."""
        self.tick(NEVER)


class Links:
    """One broker's conversations with all others."""

    def __init__(self, sockets: PeerSockets, prober: Prober, own: bytes, *, client: bool = False) -> None:
        """client: this node is outside the cluster, and reaches the head only."""
        self.sockets = sockets
        self._prober = prober
        self._own = own
        self._client = client
        self.head = b""
        """Who passes frames to clients and from them; empty until it is known."""
        self._passed: dict[bytes, relay.Passed] = {}
        """The head's accounts of what it passes on to each node."""
        self._taken = relay.Taken()
        self._links: dict[bytes, ReliableLink] = {}
        self._due = NEVER
        """No link wants `tick` before this time; none may want it then, either."""
        self._addresses: dict[bytes, str] = {}
        self._dead: set[bytes] = set()
        """What they still send has no numbering any more: it is told as it comes, so that they can be told in turn."""
        self._stuck: set[bytes] = set()
        """Nodes that frames could not be sent to: they are when such a node is heard."""
        self._suspects: dict[bytes, list[float]] = {}
        """Nodes that a connection broke to, and when their ports are looked at again."""
        self._silent_since: dict[bytes, float] = {}
        """Since when nothing has come from nodes that should say something."""
        self._nameless: dict[bytes, bool] = {}
        """Stand-ins for nodes whose ids are not known, and whether a connection to them is there."""
        self.malformed = 0
        self.breaks = 0
        """Connections of this node's making that broke since one was made last."""

    def know(self, node: bytes, address: str) -> None:
        """A node's host:port; empty: it is a client."""
        self._addresses[node] = address

    def address_of(self, node: bytes) -> str | None:
        """Return a node's host:port; empty or None when it is not known."""
        return self._addresses.get(node)

    def rename(self, stand_in: bytes, node: bytes, now: float) -> None:
        """A node that was addressed by a stand-in has told its id."""
        self.sockets.rename(stand_in, node)
        self._addresses[node] = self._addresses.pop(stand_in)
        self._nameless.pop(stand_in, None)
        self._again(node, now)

    def pause(self, node: bytes) -> None:
        """Close the connection to a node that is not where it should be. Numbered frames are kept for it, should it come back."""
        self.sockets.hang_up(node)
        self._addresses.pop(node, None)
        self._suspects.pop(node, None)
        self._stuck.add(node)

    def bury(self, node: bytes) -> None:
        """A node is dead, for ever: `forget` it, and begin no new conversation with it."""
        self.forget(node)
        self._dead.add(node)

    def forget(self, node: bytes) -> None:
        """Nothing is sent to a node any more, and what was not acknowledged is dropped."""
        self.sockets.hang_up(node)
        self._links.pop(node, None)
        self._addresses.pop(node, None)
        self._stuck.discard(node)
        self._suspects.pop(node, None)
        self._nameless.pop(node, None)
        self._passed.pop(node, None)

    # -- out ----------------------------------------------------------------------------------------------------------

    def send(self, node: bytes, message: pm.PeerMessage, now: float) -> None:
        """Send a message to a node. Numbered ones arrive once, in order, as long as both live; plain ones may be lost."""
        body = pm.encode(message)
        if pm.is_numbered(message):
            if node in self._dead:
                return  # an answer that came too late: nobody would ever acknowledge it
            link = self._link(node)
            self._put(node, pm.NUMBERED, link.send(body, now))
            self._due = min(self._due, link.wake_at)
        else:
            self._put(node, pm.PLAIN, body)

    def send_encoded(self, node: bytes, body: bytes) -> None:
        """Send a plain message that `peer_messages.encode` has made: for what many nodes are told."""
        self._put(node, pm.PLAIN, body)

    def send_to_anybody(self, stand_in: bytes, message: pm.PeerMessage) -> None:
        """Send a plain message to whoever listens at the address of `stand_in`, a node whose id is not known. Nothing is sent while an
        earlier one waits for a connection."""
        if self._nameless.setdefault(stand_in, True) is False:
            return
        if not self.sockets.reaches(stand_in):
            self._nameless[stand_in] = False
        self._connect(stand_in)
        self.sockets.send(stand_in, pm.envelope(pm.PLAIN, b"", pm.encode(message)))

    def _put(self, node: bytes, way: int, payload: bytes) -> None:
        frame = pm.envelope(way, node, payload)
        by = self._hop(node)
        if by != node:
            frame = pm.envelope(pm.RELAYED, by, pm.passage(self._own, node, 0, frame))
        self._connect(by)
        if not self.sockets.send(by, frame):
            self._stuck.add(node)

    def _hop(self, node: bytes) -> bytes:
        return relay.hop(node, self._addresses.get(node), self._own, self.head, client=self._client)

    def is_direct(self, node: bytes) -> bool:
        """Whether frames for a node go to it at once, not through the head."""
        return self._hop(node) == node

    def is_client(self, node: bytes) -> bool:
        """Whether a node is known to be outside the cluster."""
        return self._addresses.get(node) == ""

    def can_dial(self, node: bytes) -> bool:
        """Whether this node can connect to another one, for bulk say."""
        return bool(self._addresses.get(node)) and self.is_direct(node)

    @property
    def not_passed(self) -> int:
        """Frames for nodes that were too slow, which the head has dropped: their senders send them again."""
        return sum(account.dropped for account in self._passed.values())

    def _connect(self, node: bytes) -> None:
        if not self.sockets.reaches(node):
            address = self._addresses.get(node)
            if address:
                self.sockets.dial(node, address)

    def _link(self, node: bytes) -> ReliableLink:
        link = self._links.get(node)
        if link is None:
            link = self._links[node] = ReliableLink()
        return link

    def unacked_bytes(self, node: bytes) -> int:
        """What a node has not acknowledged."""
        link = self._links.get(node)
        return link.unacked_bytes if link is not None else 0

    # -- in -----------------------------------------------------------------------------------------------------------

    def receive(self, now: float) -> list[LinkEvent]:
        """Return what has come, without waiting."""
        events: list[LinkEvent] = []
        for event in self.sockets.receive():
            if isinstance(event, Arrived):
                self._arrived(event, now, events)
            elif isinstance(event, Connected):
                self.breaks = 0
                self._again(event.node, now)
                if event.node in self._nameless:
                    self._nameless[event.node] = True
                    events.append(Reached(event.node))
            else:
                events += self._broken(event.node, now)
        return events

    def _arrived(self, event: Arrived, now: float, events: list[LinkEvent]) -> None:
        node = event.node
        self._suspects.pop(node, None)
        self._silent_since.pop(node, None)
        try:
            way, to, payload = pm.open_envelope(event.frame)
            if to not in (self._own[:8], pm.ANYBODY):
                self._put(node, pm.PLAIN, pm.encode(pm.NotMe(self._own)))
                return
            if way == pm.RELAYED:
                self._passing(node, pm.open_passage(payload), now, events)
                return
            if node in self._stuck:
                self._stuck.discard(node)
                self._again(node, now)
            body: bytes | None = payload
            if way == pm.NUMBERED:
                if node in self._nameless:
                    return  # before it has said its name: it will be sent again
                if node in self._dead:
                    body = payload[HEADER_BYTES:] or None
                else:
                    link = self._link(node)
                    body, again = link.receive(payload, now)
                    self._due = min(self._due, link.wake_at)
                    for frame in again:
                        self._put(node, pm.NUMBERED, frame)
            if body is None:
                return
            message = pm.decode(body)
        except (pm.PeerFrameError, MalformedFrame) as error:
            self.malformed += 1
            print(f"[zray] broker dropped a frame of node {node.hex()[:8]}: {error}", file=sys.stderr, flush=True)
            return
        if isinstance(message, pm.NotMe):
            if message.node != node:
                events.append(Impostor(node))
            return
        if isinstance(message, pm.Seen):
            if node in self._passed:
                self._passed[node].told(message.mark, now)
            return
        events.append(Heard(node, message))

    def _passing(self, node: bytes, passage: pm.Passage, now: float, events: list[LinkEvent]) -> None:
        """A relayed frame has come: it is for this node, or (at the head) to be passed on."""
        if passage.receiver == self._own:
            if node != self.head or passage.sender in (self._own, node):
                raise pm.PeerFrameError("it came relayed, but not from the head")
            if self._taken.came(passage.mark):
                self._put(node, pm.PLAIN, pm.encode(pm.Seen(passage.mark)))
            self._addresses.setdefault(passage.sender, "")
            self._arrived(Arrived(passage.sender, passage.frame), now, events)
        elif self.head != self._own or passage.sender != node:
            raise pm.PeerFrameError("it is to be passed on, but not by this node or not for its sender")
        elif node in self._addresses and passage.receiver in self._addresses:  # neither of them is dead
            account = self._passed.setdefault(passage.receiver, relay.Passed())
            mark = account.mark(len(passage.frame), now)
            if mark is not None:
                self._put(passage.receiver, pm.RELAYED, pm.passage(node, passage.receiver, mark, passage.frame))

    def _again(self, node: bytes, now: float) -> None:
        """A connection is new: what was under way on the last one may be lost, also to nodes beyond the head."""
        beyond = [other for other in self._links if self._hop(other) != other] if node == self.head else []
        for other in (node, *beyond):
            self.heard_again(other, now)

    def heard_again(self, node: bytes, now: float) -> None:
        """A node that was silent is heard: send it at once what it has not acknowledged."""
        link = self._links.get(node)
        if link is not None:
            for frame in link.reconnected(now):
                self._put(node, pm.NUMBERED, frame)
            self._due = min(self._due, link.wake_at)

    def _broken(self, node: bytes, now: float) -> list[LinkEvent]:
        """A connection broke: is there still a process behind the port? Which node had made it is not known: ask after all."""
        self.breaks += bool(node)
        asked = [node] if node else list(self._addresses)
        if node in self._nameless:
            self._nameless[node] = False
        for other in asked:
            self._suspects[other] = [now + pause for pause in _LOOK_AGAIN_S]
        return [Refused(other) for other in asked if self.probe(other, now)]

    def probe(self, node: bytes, now: float) -> bool:
        """Look whether somebody listens at a node's address; True: nobody, as is known at once. Else see `probed`."""
        address = self._addresses.get(node)
        return bool(address) and self._prober.ask(node, str(address), now) is True

    def probed(self, descriptors: list[int]) -> list[LinkEvent]:
        """What became of probes among the ready descriptors."""
        return [Refused(node) for node in self._prober.answered(descriptors)]

    # -- time ---------------------------------------------------------------------------------------------------------

    @property
    def wake_at(self) -> float:
        """When `tick` is wanted at the latest."""
        if not self._suspects:
            return self._due
        return min(self._due, min(times[0] for times in self._suspects.values()))

    def tick(self, now: float) -> list[LinkEvent]:
        """Acknowledge, send again, and look at ports; return what came of that."""
        self._prober.tick(now)
        refused: list[LinkEvent] = []
        for node, times in list(self._suspects.items()):
            if now >= times[0]:
                times.pop(0)
                if not times:
                    del self._suspects[node]
                if self.probe(node, now):
                    refused.append(Refused(node))
        self._end_stalled(now)
        for node, link in self._links.items():
            if now >= link.wake_at:
                for frame in link.tick(now):
                    self._put(node, pm.NUMBERED, frame)
        self._due = min((link.wake_at for link in self._links.values()), default=NEVER)
        return refused

    def _end_stalled(self, now: float) -> None:
        """Make connections anew over which nothing comes. A node hears its head all the time; any node acknowledges what it is sent."""
        owing = {node for node, link in self._links.items() if link.unacked and self.is_direct(node)}
        owing.update(node for node, is_there in self._nameless.items() if is_there)
        if self.head != self._own and self.sockets.reaches(self.head):
            owing.add(self.head)
        for node in [node for node in self._silent_since if node not in owing]:
            del self._silent_since[node]
        for node in sorted(owing):
            if now - self._silent_since.setdefault(node, now) >= STALLED_S:
                self._silent_since[node] = now
                if node in self._nameless:
                    self._nameless[node] = False
                self.sockets.hang_up(node)
                self._connect(node)

    def close(self) -> None:
        """Close everything."""
        self._prober.close()
        self.sockets.close()
