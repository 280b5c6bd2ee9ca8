"""ROUTER, DEALER, PUB and SUB sockets as zray uses them; the only `import zmq`.

Covers endpoints, high-water marks, closing, and the rule of the house: everyone sends through `Outbox`es (DEALER) and receives on one `Inbox`
(ROUTER) of its own, one frame per message. Does not cover what is in a frame (`zray.wire`).

High-water marks are off: what may be under way is bounded by credits (specs a worker is handed, frames a submitter may be ahead), so that
neither socket ever drops or blocks.
"""

from __future__ import annotations

import os

import zmq

_MAX_IPC_PATH = 100
"""Bytes of a path that fits the kernel's 108-byte socket address everywhere."""


def ipc_endpoint(directory: str, name: str) -> str:
    """Return the endpoint of socket `name` in a session's runtime directory; raise ValueError when the path is too long for the kernel."""
    path = os.path.join(directory, name)
    if len(os.fsencode(path)) > _MAX_IPC_PATH:
        raise ValueError(
            f"the runtime directory is too long for a socket address ({_MAX_IPC_PATH} bytes): {directory}. Set ZRAY_RUNTIME_DIR"
        )
    return f"ipc://{path}"


class _Socket(zmq.Socket[bytes]):
    """A socket that closes when nobody has it any more. An interrupt while it is made or closed leaves such a one, and a context waits
    for all its sockets; what it inherits would rather warn, which where warnings are errors means that it stays open."""

    def __del__(self) -> None:
        if not self._shadow and not self.closed:
            self.close()


class Context:
    """One ZeroMQ context. Not to be made before a fork that should survive it."""

    def __init__(self, io_threads: int = 1) -> None:
        """io_threads: threads that carry messages, and encrypt them; sockets that do not say otherwise use the first."""
        self.io_threads = io_threads
        self.zmq = zmq.Context(io_threads=io_threads)
        self.zmq.setsockopt(zmq.AFFINITY, 1)
        self.pid = os.getpid()

    def outbox(self, endpoint: str) -> Outbox:
        """Connect to a peer's inbox, which need not exist yet. OSError: this process has no descriptors left."""
        try:
            socket = self.zmq.socket(zmq.DEALER, _Socket)
        except zmq.ZMQError as error:
            raise OSError(error.errno, error.strerror) from None
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.LINGER, 500)
        socket.setsockopt(zmq.RECONNECT_IVL, 2)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)  # doubling from 2 ms: a peer that is gone costs next to nothing
        socket.connect(endpoint)
        return Outbox(socket)

    def inbox(self, endpoint: str) -> Inbox:
        """Bind the inbox of this process."""
        socket = self.zmq.socket(zmq.ROUTER, _Socket)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(endpoint)
        return Inbox(socket)

    def publisher(self, endpoint: str) -> Publisher:
        """Bind a PUB socket. Messages to slow or late subscribers are dropped: they carry numbers, so that this is noticed."""
        socket = self.zmq.socket(zmq.PUB, _Socket)
        socket.setsockopt(zmq.SNDHWM, 10_000)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(endpoint)
        return Publisher(socket)

    def subscriber(self, endpoint: str, topics: list[bytes]) -> Subscriber:
        """Connect a SUB socket to a publisher."""
        socket = self.zmq.socket(zmq.SUB, _Socket)
        socket.setsockopt(zmq.RCVHWM, 10_000)
        socket.setsockopt(zmq.LINGER, 0)
        for topic in topics:
            socket.setsockopt(zmq.SUBSCRIBE, topic)
        socket.connect(endpoint)
        return Subscriber(socket)

    def close(self) -> None:
        """Close all sockets and end the I/O thread; in a forked child only forget them (the thread exists in the parent alone)."""
        if self.pid == os.getpid():
            self.zmq.destroy(linger=500)


class Outbox:
    """A DEALER that only sends. Not thread-safe."""

    __slots__ = ("_send", "socket")

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self._send = socket.send

    def send(self, frame: bytes) -> None:
        """Queue a frame; never blocks."""
        self._send(frame, zmq.DONTWAIT)

    def close(self) -> None:
        self.socket.close()


class Inbox:
    """A ROUTER that only receives. Not thread-safe."""

    __slots__ = ("_more", "_recv", "malformed", "socket", "timeout_ms")

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self._recv = socket.recv
        self._more = socket.getsockopt
        self.malformed = 0
        self.timeout_ms = -1

    def wait_frame(self, timeout_ms: int = -1) -> bytes | None:
        """Return the next frame; None when `timeout_ms` (negative: none) passed. Messages that are not one frame are counted and dropped."""
        if timeout_ms != self.timeout_ms:
            self.socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
            self.timeout_ms = timeout_ms
        return self._next(0)

    def next_frame_nowait(self) -> bytes | None:
        """Return the next frame if one is there."""
        return self._next(zmq.DONTWAIT)

    def _next(self, flags: int) -> bytes | None:
        receive, more = self._recv, self._more
        while True:
            try:
                receive(flags)  # whose it is; what was sent follows
            except zmq.Again:
                return None
            frame = receive()
            if not more(zmq.RCVMORE):
                return frame
            while more(zmq.RCVMORE):
                receive()
            self.malformed += 1

    def fileno(self) -> int:
        """Descriptor that becomes readable when there may be something; edge-triggered: drain the inbox after each event."""
        return int(self.socket.getsockopt(zmq.FD))

    def close(self) -> None:
        self.socket.close()


class Publisher:
    """A PUB socket."""

    __slots__ = ("socket",)

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket

    def send(self, topic: bytes, body: bytes) -> None:
        """Publish one message of two frames."""
        self.socket.send(topic, zmq.SNDMORE | zmq.DONTWAIT)
        self.socket.send(body, zmq.DONTWAIT)

    def close(self) -> None:
        self.socket.close()


class Subscriber:
    """A SUB socket."""

    __slots__ = ("socket",)

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket

    def receive(self, timeout_ms: int) -> tuple[bytes, bytes] | None:
        """Return the next (topic, body), or None after `timeout_ms`."""
        if not self.socket.poll(timeout_ms, zmq.POLLIN):
            return None
        topic, body = self.socket.recv_multipart()
        return topic, body

    def close(self) -> None:
        self.socket.close()


class Poller:
    """Waits for an inbox, plain file descriptors, and sockets that somebody else reads, together."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox.socket
        self.ready: set[zmq.Socket[bytes]] = set()
        """Watched sockets that the last wait has found to have something."""
        self._poller = zmq.Poller()
        self._poller.register(self._inbox, zmq.POLLIN)

    def add(self, fd: int, *, writing: bool = False) -> None:
        """Wait for a descriptor, too, to become readable (or writable)."""
        self._poller.register(fd, zmq.POLLOUT if writing else zmq.POLLIN)

    def remove(self, fd: int) -> None:
        self._poller.unregister(fd)

    def watch(self, socket: zmq.Socket[bytes]) -> None:
        """Wait for a socket, too."""
        self._poller.register(socket, zmq.POLLIN)

    def forget(self, socket: zmq.Socket[bytes]) -> None:
        self._poller.unregister(socket)
        self.ready.discard(socket)

    def wait(self, timeout_ms: int) -> tuple[bool, list[int], bool]:
        """Return (the inbox may have something, ready descriptors, some watched socket may have something)."""
        self.ready.clear()
        has_messages = False
        descriptors: list[int] = []
        for item, _ in self._poller.poll(timeout_ms):
            if item is self._inbox:
                has_messages = True
            elif isinstance(item, int):
                descriptors.append(item)
            else:
                self.ready.add(item)
        return has_messages, descriptors, bool(self.ready)


__all__ = ["Context", "Inbox", "Outbox", "Poller", "Publisher", "Subscriber", "ipc_endpoint"]
