"""Encrypted TCP between the brokers of a cluster: one listening port a node, connections by node id, both directions on each.

Covers CURVE keys, who is let in, connecting, and events of connections. Does not cover what a frame means (`zray.broker.peer_messages`),
numbering and sending again (`zray.broker.reliable`), or sockets within a node (`zray.transport`).

Every connection is CURVE (https://rfc.zeromq.org/spec/26) with the cluster's key pair on both sides: whoever does not have it is refused
during the handshake, before one byte of a message is read, gets no answer, and is counted. ZeroMQ asks for the verdict over an inner socket
(ZAP, https://rfc.zeromq.org/spec/27) that is served here, between other events: no thread is needed. Repeated, changed and cut frames fail
CURVE's own checks (nonce, authenticator) and end the connection.

Values travel over connections of their own to the same port (`zray.value_streams`), so that other messages never queue behind them. Encrypting is the
work of ZeroMQ's I/O threads: a node's own connections and those that others make to it have one each.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Final, NamedTuple

import zmq
from zmq.utils import z85

from zray.node_port import BROKER, NodePort, source_endpoint
from zray.transport import _Socket, bracketed, has_input, ipc_endpoint

if TYPE_CHECKING:
    from zray.transport import Context, Poller

MAX_FRAME: Final = 64 << 20
"""Bytes of the largest frame between nodes; a longer one ends the connection. Values travel in chunks far smaller."""
_HANDSHAKE_MS: Final = 4000
"""A handshake that takes longer is given up, and begun anew."""
_LINGER_MS: Final = 200
_RECONNECT_MS: Final = 20
_RECONNECT_MAX_MS: Final = 1000
_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
_ZAP_DOMAIN: Final = b"zray"
_FAILED_HANDSHAKES: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class ClusterKey(NamedTuple):
    """The key pair that all nodes of a cluster share: who has it belongs to the cluster. Z85 text, 40 characters each."""

    public: str
    secret: str

    @classmethod
    def new(cls) -> ClusterKey:
        """Draw a key pair (Curve25519, https://cr.yp.to/ecdh.html, by libsodium)."""
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    @classmethod
    def read(cls, path: str) -> ClusterKey:
        """Read a key file.

        Raises:
            OSError: it cannot be read.
            ValueError: it holds no key, or others may read it.
        """
        with open(path, encoding="ascii") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise ValueError(f"{path} can be read by others: chmod 600 {path}")
            try:
                found = json.load(file)
                key = cls(found["public"], found["secret"])
                matching = zmq.curve_public(key.secret.encode()).decode() == key.public
            except (ValueError, KeyError, TypeError, AttributeError, zmq.ZMQError):
                matching = False
        if not matching:
            raise ValueError(f"{path} holds no cluster key: copy the file from the node where the cluster was started")
        return key

    def write(self, path: str) -> None:
        """Write a key file with mode 0600; one that exists is replaced as a whole. OSError: it cannot be written."""
        part = f"{path}.{os.getpid()}.part"
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w", encoding="ascii") as file:
                json.dump({"public": self.public, "secret": self.secret}, file)
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise


class Connected(NamedTuple):
    """A connection that this node made is there (again): what was under way on the last one may be lost."""

    node: bytes


class Disconnected(NamedTuple):
    """A connection broke. `node` is empty for one that the other side had made (and that got beyond its handshake: to look whether a
    port is open must not look like a broken connection, or nodes would go on looking at one another for ever)."""

    node: bytes


class Arrived(NamedTuple):
    """A frame of a node that has the cluster's key. `node` is what it calls itself."""

    node: bytes
    frame: bytes


PeerEvent = Connected | Disconnected | Arrived


class PeerSockets:
    """A node's TCP sockets. Not thread-safe. What is called `node` is a 16-byte id."""

    def __init__(self, context: Context, own: bytes, key: ClusterKey, poller: Poller) -> None:
        """`poller` tells when `receive` is worth calling."""
        self._zmq = context.zmq
        self._own = own
        self._key = key
        self._members_key = z85.decode(key.public)
        self._poller = poller
        self._accepting = 1 << (context.io_threads - 1)
        """The I/O thread of connections that others make, bulk among them: what this process says of itself goes through the first."""
        self._port: NodePort | None = None
        self._listener: zmq.Socket[bytes] | None = None
        self._judge: zmq.Socket[bytes] | None = None
        self._watcher: zmq.Socket[bytes] | None = None
        """Monitor of the listener."""
        self._dialled: dict[bytes, tuple[zmq.Socket[bytes], zmq.Socket[bytes]]] = {}
        """Connections that this node made: socket and its monitor."""
        self._nodes: dict[zmq.Socket[bytes], bytes] = {}
        """Whose these sockets and monitors are."""
        self._accepted: set[bytes] = set()
        """Nodes that were heard over connections of their making."""
        self._was_none = False
        """The listener's connection that is about to be told of as ended never was one."""
        self.refused = 0
        """Handshakes that failed: strangers, wrong keys, bytes that are no handshake."""
        self.malformed = 0
        """Messages of several parts, or of senders without an id."""

    # -- connecting ---------------------------------------------------------------------------------------------------

    def listen(self, host: str, port: int) -> int:
        """Listen on host:port (0: any free port); return the port. OSError: the address cannot be had."""
        listener = self._listen()
        try:
            listener.bind(f"tcp://{bracketed(host)}:{port or '*'}")
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
        return int(listener.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    def listen_behind_door(self, host: str, port: int, directory: str) -> int:
        """The same for the one port of a node, through which other sockets of its runtime directory are reached as well (`zray.node_port`)."""
        listener = self._listen()
        listener.bind(ipc_endpoint(directory, BROKER))
        self._port = NodePort(host, port, directory)
        descriptor = self._port.take_listener()
        if descriptor >= 0:
            listener.setsockopt(zmq.USE_FD, descriptor)
            listener.bind(f"tcp://{bracketed(host)}:{self._port.port}")
        return self._port.port

    def close_door(self) -> None:
        """Let nobody in any more. After all that was to leave has left: it goes through there."""
        if self._port is not None:
            self._port.close()
            self._port = None

    def _listen(self) -> zmq.Socket[bytes]:
        """Make the socket for connections of others."""
        judge = self._judge = self._zmq.socket(zmq.ROUTER, _Socket)
        judge.setsockopt(zmq.LINGER, 0)
        judge.bind(_ZAP_ENDPOINT)
        listener = self._listener = self._socket(zmq.ROUTER)
        listener.setsockopt(zmq.ROUTER_MANDATORY, 1)
        listener.setsockopt(zmq.ROUTER_HANDOVER, 1)
        listener.setsockopt(zmq.CURVE_SERVER, 1)
        listener.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
        listener.setsockopt(zmq.AFFINITY, self._accepting)
        self._watcher = listener.get_monitor_socket(_FAILED_HANDSHAKES | zmq.EVENT_DISCONNECTED)
        for socket in (judge, listener, self._watcher):
            self._poller.watch(socket)
        return listener

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        # No heartbeats of ZeroMQ's: when one falls due on a connection that broke while its input was stopped, libzmq 4.3.5 aborts the
        # process. Connections that have stalled are noticed by who has something to say (`zray.broker.links`).
        return _secret_socket(self._zmq, kind, self._key)

    def dial(self, node: bytes, address: str) -> None:
        """Connect to a node's host:port, again and again until `hang_up`; does nothing when that was asked for before, or when this process
        has no descriptors left (then `reaches` is false)."""
        if node in self._dialled:
            return
        try:
            socket = self._socket(zmq.DEALER)
        except zmq.ZMQError:
            return
        socket.setsockopt(zmq.AFFINITY, 1)
        try:
            monitor = _connect(socket, self._own, self._key, address)
        except zmq.ZMQError:
            socket.close(0)
            return
        self._dialled[node] = socket, monitor
        for made in (socket, monitor):
            self._nodes[made] = node
            self._poller.watch(made)

    def rename(self, node: bytes, now: bytes) -> None:
        """A node that was dialled under a stand-in for its id has told its name."""
        self._dialled[now] = self._dialled.pop(node)
        for socket in self._dialled[now]:
            self._nodes[socket] = now

    def hang_up(self, node: bytes) -> None:
        """Close the connection to a node, if this one made any; nothing that waits is sent."""
        self._accepted.discard(node)
        self._hang_up(node, linger=0)

    def _hang_up(self, node: bytes, linger: int) -> None:
        found = self._dialled.pop(node, None)
        if found is not None:
            socket, monitor = found
            for made in found:
                del self._nodes[made]
                self._poller.forget(made)
            socket.disable_monitor()
            monitor.close(0)
            socket.close(linger)

    def reaches(self, node: bytes) -> bool:
        """Whether there is, or may be, a connection to a node."""
        return node in self._dialled or node in self._accepted

    # -- frames -------------------------------------------------------------------------------------------------------

    def send(self, node: bytes, frame: bytes) -> bool:
        """Send a frame, or let it wait until the node is connected; False when there is no connection to it."""
        found = self._dialled.get(node)
        if found is not None:
            try:
                found[0].send(frame, zmq.DONTWAIT)
            except zmq.Again:
                # ZeroMQ makes a connection anew when the other side ended it, not when this side did because of damaged bytes.
                self._hang_up(node, linger=0)
                return False
            self._poller.used(found[0])
            return True
        if node not in self._accepted:
            return False
        assert self._listener is not None
        self._poller.used(self._listener)
        try:
            self._listener.send(node, zmq.SNDMORE | zmq.DONTWAIT)
            self._listener.send(frame, zmq.DONTWAIT)
        except zmq.ZMQError:  # EHOSTUNREACH: it has gone
            self._accepted.discard(node)
            return False
        return True

    def receive(self, most: int = 256) -> list[PeerEvent]:
        """Return what has come on the sockets that the poller found ready, at most about `most` events a connection, without waiting."""
        events: list[PeerEvent] = []
        ready = self._poller.ready
        if self._judge is not None and self._judge in ready:
            self._serve_judge(self._judge)
        dialled = [(self._nodes[socket], socket) for socket in ready if socket in self._nodes]
        for node, socket in dialled:
            if socket is self._dialled[node][1]:
                self._read_monitor(socket, node, events)
        for node, socket in dialled:
            for taken in range(most if socket is self._dialled[node][0] else 0):
                parts = _next(socket, taken > 0)
                if parts is None:
                    break
                if len(parts) == 1:
                    events.append(Arrived(node, parts[0]))
                else:
                    self.malformed += 1
        if self._watcher is not None and self._watcher in ready:
            self._read_monitor(self._watcher, b"", events)
        if self._listener is not None and self._listener in ready:
            for taken in range(most):
                parts = _next(self._listener, taken > 0)
                if parts is None:
                    break
                if len(parts) == 2 and len(parts[0]) == len(self._own):
                    self._accepted.add(parts[0])
                    events.append(Arrived(parts[0], parts[1]))
                else:
                    self.malformed += 1
        return events

    def wait(self, seconds: float) -> None:
        """Wait until there may be something to receive, at most so long; for when nobody waits with the poller."""
        poller = zmq.Poller()
        sockets = [socket for socket in (self._judge, self._listener, self._watcher) if socket is not None]
        for socket in (*sockets, *self._nodes):
            poller.register(socket, zmq.POLLIN)
            self._poller.used(socket)
        self._poller.ready.update(socket for socket, _ in poller.poll(int(seconds * 1000) + 1))

    def _read_monitor(self, monitor: zmq.Socket[bytes], node: bytes, events: list[PeerEvent]) -> None:
        while (parts := _next(monitor)) is not None:
            kind = _monitored(parts)
            if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                events.append(Connected(node))
            elif kind != zmq.EVENT_DISCONNECTED:
                self.refused += 1
                # ZeroMQ tells of this failure right before it tells that the connection has ended.
                if kind == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and not node:
                    self._was_none = True
            elif self._was_none and not node:
                self._was_none = False  # nobody was connected: somebody only looked whether the port is open
            else:
                events.append(Disconnected(node))

    def _serve_judge(self, judge: zmq.Socket[bytes]) -> None:
        own = self._members_key
        while (parts := _next(judge)) is not None:
            sender, empty, version, request, domain, _, _, mechanism, *credentials = [*parts, *[b""] * 8]
            good = mechanism == b"CURVE" and domain == _ZAP_DOMAIN and credentials[0] == own
            status, text = (b"200", b"OK") if good else (b"400", b"not a member")
            judge.send_multipart([sender, empty, version, request, status, text, b"", b""])

    def close(self) -> None:
        """Close all sockets; what was sent last has a moment to leave."""
        for node in list(self._dialled):
            self._hang_up(node, _LINGER_MS)
        if self._listener is not None:
            self._listener.disable_monitor()
        for socket in (self._watcher, self._listener, self._judge):
            if socket is not None:
                self._poller.forget(socket)
                socket.close()
        self._watcher = self._listener = self._judge = None


def _secret_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, key: ClusterKey) -> zmq.Socket[bytes]:
    """A socket that speaks CURVE with the cluster's key."""
    socket = context.socket(kind, _Socket)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
    socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, key.public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, key.secret.encode())
    return socket


def _connect(socket: zmq.Socket[bytes], name: bytes, key: ClusterKey, address: str) -> zmq.Socket[bytes]:
    """Connect to host:port under a name; return what tells of the connection."""
    socket.setsockopt(zmq.ROUTING_ID, name)
    socket.setsockopt(zmq.CURVE_SERVERKEY, key.public.encode())
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
    monitor = socket.get_monitor_socket(_FAILED_HANDSHAKES | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    host, _, port = address.rpartition(":")
    socket.connect(f"tcp://{source_endpoint(address)}{bracketed(host)}:{port}")
    return monitor


def _next(socket: zmq.Socket[bytes], ask: bool = True) -> list[bytes] | None:
    """Return the next message, if there is one; `ask` first where there may well be none."""
    if ask and not has_input(socket):
        return None
    try:
        return socket.recv_multipart(zmq.DONTWAIT)
    except zmq.Again:
        return None


def _monitored(parts: list[bytes]) -> int:
    """Return the kind of a monitor's message (https://libzmq.readthedocs.io/en/latest/zmq_socket_monitor.html): the first 16 bits of its first part.
    (PyZMQ's own reader of them would load asyncio for it.)"""
    return int.from_bytes(parts[0][:2], sys.byteorder)
