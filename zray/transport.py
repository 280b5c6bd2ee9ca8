"""ROUTER, DEALER, PUB and SUB sockets as zray uses them; the only `import zmq`.

Covers endpoints, high-water marks, closing, and the rule of the house: everyone sends through `Outbox`es (DEALER) and receives on one `Inbox`
(ROUTER) of its own, one frame per message. Does not cover what is in a frame (`zray.wire`), or streams between processes of different nodes, which
are no ZeroMQ (`zray.sealed_stream`).

High-water marks are off: what may be under way is bounded by credits (specs a worker is handed, frames a submitter may be ahead), so that
neither socket ever drops or blocks.
"""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING, Final

import zmq

if TYPE_CHECKING:
    from collections.abc import Callable

    from zray.sealed_stream import SealedStream, Visitors

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


def bracketed(host: str) -> str:
    """IPv6 addresses stand in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


class _Socket(zmq.Socket[bytes]):
    """A socket that closes when nobody has it any more. An interrupt while it is made or closed leaves such a one, and a context waits
    for all its sockets; what it inherits would rather warn, which where warnings are errors means that it stays open."""

    def __del__(self) -> None:
        if not self._shadow and not self.closed:
            self.close()


_LINGER_MS: Final = 500
"""How long the end of a process may wait for its last messages to be taken."""
_INPUT: Final = int(zmq.POLLIN)
"""As a plain number: the operators of flags cost more than the question."""


def has_input(socket: zmq.Socket[bytes]) -> bool:
    """Whether a socket has a message. To ask costs a third of what it costs to be refused one."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & _INPUT)


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
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
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

    def close(self, linger: int = _LINGER_MS) -> None:
        """Close all sockets and end the I/O thread; in a forked child only forget them (the thread exists in the parent alone).

        Args:
            linger: milliseconds for which what was sent and nobody has taken may hold this up.
        """
        if self.pid == os.getpid():
            self.zmq.destroy(linger)


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
    """A ROUTER that receives, and the streams of other nodes' processes, once it is open to them. Not thread-safe."""

    __slots__ = ("_more", "_recv", "malformed", "sender", "socket", "timeout_ms", "visitors")

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self._recv = socket.recv
        self._more = socket.getsockopt
        self.malformed = 0
        self.sender: SealedStream | None = None
        """To whom an answer to the newest frame goes; None when it came from this node."""
        self.timeout_ms = -1
        self.visitors: Visitors | None = None

    def open(self, path: str, wait: Callable[[int, float], object] | None = None) -> Visitors:
        """Receive from other nodes as well: the door hands over connections at this socket (`zray.sealed_stream`). `wait`: waits for a descriptor, at
        most so many seconds (negative: for ever). OSError: it cannot be had."""
        from zray.sealed_stream import Visitors

        self.visitors = Visitors(path, self.fileno(), wait)
        return self.visitors

    def answer(self, sender: SealedStream, frame: bytes) -> None:
        """Send a frame to one who has sent some; it is lost when he is gone. Never blocks."""
        assert self.visitors is not None
        self.visitors.answer(sender, frame)

    def wait_frame(self, timeout_ms: int = -1) -> bytes | None:
        """Return the next frame; None when `timeout_ms` (negative: none) passed. Messages that are not one frame are counted and dropped."""
        if self.visitors is not None:
            return self._wait_for_any(self.visitors, timeout_ms)
        if timeout_ms != self.timeout_ms:
            self.socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
            self.timeout_ms = timeout_ms
        return self._next(0)

    def _wait_for_any(self, visitors: Visitors, timeout_ms: int) -> bytes | None:
        until = time.monotonic() + timeout_ms * 1e-3
        while True:
            frame = self.next_frame_nowait()
            left = until - time.monotonic() if timeout_ms >= 0 else -1.0
            if frame is not None or (timeout_ms >= 0 and left <= 0):
                return frame
            visitors.wait(left)

    def next_frame_nowait(self) -> bytes | None:
        """Return the next frame if one is there."""
        if has_input(self.socket):
            return self._next(zmq.DONTWAIT)
        if self.visitors is not None:
            found = self.visitors.next_frame()
            if found is not None:
                frame, self.sender = found
                return frame
        return None

    def _next(self, flags: int) -> bytes | None:
        receive, more = self._recv, self._more
        while True:
            try:
                receive(flags)
            except zmq.Again:
                return None
            frame = receive()
            if not more(zmq.RCVMORE):
                self.sender = None
                return frame
            while more(zmq.RCVMORE):
                receive()
            self.malformed += 1

    def fileno(self) -> int:
        """Descriptor that becomes readable when there may be something from this node; edge-triggered: drain the inbox after each event."""
        return int(self.socket.getsockopt(zmq.FD))

    def close(self) -> None:
        if self.visitors is not None:
            self.visitors.close()
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
    """Waits for an inbox, plain file descriptors, and sockets that somebody else reads, together; its price does not grow with their number.

    ZeroMQ signals news of a socket on a descriptor (ZMQ_FD, https://libzmq.readthedocs.io/en/latest/zmq_getsockopt.html), for which epoll waits. Whoever
    sends or receives may take such a signal away together with what it tells of, so after each use a socket is asked before the next sleep: those
    that were found ready, and those that are reported by `used`.
    """

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox.socket
        self.ready: set[zmq.Socket[bytes]] = set()
        """Watched sockets that the last wait has found to have something."""
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        """By the descriptor of each."""
        self._descriptors: dict[zmq.Socket[bytes], int] = {}
        self._unsure: set[zmq.Socket[bytes]] = set()
        """Sockets that may have something although their descriptors are silent."""
        self.watch(self._inbox)

    def add(self, fd: int, *, writing: bool = False) -> None:
        """Wait for a descriptor, too, to become readable (or writable)."""
        self._epoll.register(fd, select.EPOLLOUT if writing else select.EPOLLIN)

    def remove(self, fd: int) -> None:
        self._epoll.unregister(fd)

    def watch(self, socket: zmq.Socket[bytes]) -> None:
        """Wait for a socket, too."""
        fd = int(socket.getsockopt(zmq.FD))
        self._epoll.register(fd, select.EPOLLIN)
        self._sockets[fd] = socket
        self._descriptors[socket] = fd
        self._unsure.add(socket)

    def forget(self, socket: zmq.Socket[bytes]) -> None:
        fd = self._descriptors.pop(socket)
        del self._sockets[fd]
        self._epoll.unregister(fd)
        self.ready.discard(socket)
        self._unsure.discard(socket)

    def used(self, socket: zmq.Socket[bytes]) -> None:
        """A watched socket that was not found ready was sent through, or read."""
        self._unsure.add(socket)

    def interrupt(self) -> None:
        """End the wait that goes on, or else the next one. For signal handlers: by itself a wait goes on after them."""
        if not self._epoll.closed:
            os.eventfd_write(self._bell, 1)

    def wait(self, timeout_ms: int) -> tuple[bool, list[int], bool]:
        """Return (the inbox has something, ready descriptors, some watched socket has something). It may be that nothing has."""
        ready, unsure = self.ready, self._unsure
        ready.clear()
        for socket in unsure:
            if has_input(socket):
                ready.add(socket)
        unsure.clear()
        descriptors: list[int] = []
        for fd, _ in self._epoll.poll(0 if ready else timeout_ms * 1e-3):
            found = self._sockets.get(fd)
            if fd == self._bell:
                os.eventfd_read(fd)
            elif found is None:
                descriptors.append(fd)
            elif has_input(found):
                ready.add(found)
        unsure.update(ready)
        has_messages = self._inbox in ready
        ready.discard(self._inbox)
        return has_messages, descriptors, bool(ready)

    def close(self) -> None:
        """Wait for nothing any more. What was waited for stays open."""
        if not self._epoll.closed:
            self._epoll.close()
            os.close(self._bell)


__all__ = [
    "Context",
    "Inbox",
    "Outbox",
    "Poller",
    "Publisher",
    "Subscriber",
    "bracketed",
    "has_input",
    "ipc_endpoint",
]
