"""The thread that gives values to other nodes: encrypts pieces where they lie, and sends them.

Covers the streams that other nodes have made to get values from this one. Does not cover which piece is next (`serving`), or what is asked for: that is
the broker's loop's (`transfer`), which is told of it. The other side is `bulk`.

A thread of its own, because to encrypt and copy a piece takes 0.3 ms; both happen without the interpreter's lock. It is started when a node first
asks for a stream.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import secrets
import select
import threading
import traceback
from typing import Final

from zray.sealed_stream import Doorway
from zray.value_streams import ValueStream

_CLOSE_S: Final = 5.0
_LOOK_S: Final = 5.0
"""Seconds after which connections that say nothing are looked for."""


class Giver:
    """A node's giving of values. Its methods are the loop's, but for those below "the thread"."""

    def __init__(self, path: str) -> None:
        """path: of the socket where the door hands connections over (`zray.node_port.VALUES`)."""
        self._path = path
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._tickets = itertools.count(1)
        self._expected: collections.deque[tuple[int, bytes, bytes]] = collections.deque()
        """(ticket, secret, node) that the thread has not heard of."""
        self._gone: collections.deque[bytes] = collections.deque()
        self._to_send: collections.deque[bytes] = collections.deque()
        """Nodes for whom something was queued."""
        self._came: collections.deque[tuple[bytes, bytes]] = collections.deque()
        self._streams: dict[bytes, ValueStream] = {}
        """By node, the newest."""
        self._thread: threading.Thread | None = None
        self._running = True
        self._signalled = False
        """The thread was woken, and has not begun to look for what there is."""
        self.refused = 0
        """Connections that did not know a secret."""

    # -- the loop's side -------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Descriptor that becomes readable when `came` has something."""
        return self._news

    def expect(self, node: bytes) -> tuple[int, bytes]:
        """A node wants a stream: return ticket and secret for it. From now on the door finds who takes its connections. OSError: there is no descriptor for
        that now."""
        if self._thread is None:
            doorway = Doorway(self._path)
            self._thread = threading.Thread(target=self._run, args=(doorway,), name="zray-give", daemon=True)
            self._thread.start()
        ticket, secret = next(self._tickets), secrets.token_bytes(32)
        self._expected.append((ticket, secret, node))
        self._wake()
        return ticket, secret

    def came(self) -> list[tuple[bytes, bytes]]:
        """Return (node, frame) of what has come since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._news)
        return [self._came.popleft() for _ in range(len(self._came))]

    def send(self, node: bytes, frame: bytes, data: memoryview | None = None, token: object = None) -> bool:
        """Send a frame, and data with it, over the stream of a node; False when there is none. `token` is let go of with the data."""
        stream = self._streams.get(node)
        if stream is None or stream.ended:
            return False
        stream.send(frame, data, token)
        self._to_send.append(node)
        self._wake()
        return True

    def node_gone(self, node: bytes) -> None:
        """A node is dead."""
        if self._thread is not None:
            self._gone.append(node)
            self._wake()

    def _wake(self) -> None:
        if not self._signalled:
            self._signalled = True
            os.eventfd_write(self._woken, 1)

    def close(self) -> None:
        """End the thread; what is under way is given up."""
        self._running = False
        if self._thread is not None:
            self._wake()
            self._thread.join(_CLOSE_S)
        os.close(self._news)
        os.close(self._woken)

    # -- the thread ------------------------------------------------------------------------------------------------------

    def _run(self, doorway: Doorway) -> None:
        try:
            _Room(self, doorway).serve()
        except BaseException:
            traceback.print_exc()
            raise


class _Room:
    """What the thread alone knows."""

    def __init__(self, giver: Giver, doorway: Doorway) -> None:
        self._giver = giver
        self._doorway = doorway
        self._epoll = select.epoll()
        self._epoll.register(giver._woken, select.EPOLLIN)
        self._epoll.register(self._doorway.fileno(), select.EPOLLIN)
        self._doorway.on_refuse = self._epoll.unregister
        self._nodes: dict[int, bytes] = {}
        """By ticket."""
        self._visitors: dict[int, tuple[int, ValueStream]] = {}
        """By descriptor: ticket and stream."""
        self._writing: set[int] = set()

    def serve(self) -> None:
        giver = self._giver
        try:
            while giver._running:
                ready = self._epoll.poll(_LOOK_S)
                for descriptor, _ in ready:
                    if descriptor == giver._woken:
                        os.eventfd_read(descriptor)
                        giver._signalled = False  # before looking: what is queued from now on wakes it again
                        self._obey()
                    elif descriptor == self._doorway.fileno():
                        for connection in self._doorway.arrivals():
                            self._epoll.register(connection.fileno(), select.EPOLLIN)
                    elif descriptor in self._visitors:
                        self._look(descriptor)
                    elif self._doorway.is_waiting(descriptor):
                        self._admit(descriptor)
                for late in self._doorway.late():
                    self._close(late, genuine=False)
                giver.refused = self._doorway.refused
        finally:
            for descriptor in list(self._visitors):
                self._close(descriptor)
            self._doorway.close()
            self._epoll.close()

    def _obey(self) -> None:
        giver = self._giver
        while giver._expected:
            ticket, secret, node = giver._expected.popleft()
            self._nodes[ticket] = node
            self._doorway.expect(ticket, secret)
        while giver._gone:
            node = giver._gone.popleft()
            for descriptor in [d for d, (ticket, _) in self._visitors.items() if self._nodes.get(ticket) == node]:
                self._close(descriptor)
            for ticket in [ticket for ticket, who in self._nodes.items() if who == node]:
                del self._nodes[ticket]
                self._doorway.use(ticket)
        while giver._to_send:
            stream = giver._streams.get(giver._to_send.popleft())
            if stream is not None and stream.fileno() not in self._writing and not stream.ended:
                self._pump(stream.fileno(), stream)

    def _admit(self, descriptor: int) -> None:
        found = self._doorway.admit(descriptor)
        if found is not None:
            ticket, connection, secret = found
            self._visitors[descriptor] = ticket, ValueStream(connection, secret, calling=False)
            self._look(descriptor)

    def _look(self, descriptor: int) -> None:
        ticket, stream = self._visitors[descriptor]
        giver, node = self._giver, self._nodes.get(ticket, b"")
        if descriptor in self._writing:
            self._pump(descriptor, stream)
        unknown = stream.received == 0
        for frame, _ in stream.receive(lambda _frame, _size: None):
            if unknown:
                unknown = False
                if not self._doorway.is_first(descriptor, ticket):
                    self._close(descriptor, genuine=False)
                    return
                giver._streams[node] = stream
                stream.send(b"")  # it is there
                self._pump(descriptor, stream)
            if frame:
                giver._came.append((node, frame))
        if giver._came:
            os.eventfd_write(giver._news, 1)
        if stream.ended:
            self._close(descriptor, genuine=bool(stream.received) and not stream.damaged)

    def _pump(self, descriptor: int, stream: ValueStream) -> None:
        stream.pump()
        if stream.ended:
            self._close(descriptor)
        elif stream.waits_to_write() != (descriptor in self._writing):
            self._writing ^= {descriptor}
            events = select.EPOLLIN | (select.EPOLLOUT if descriptor in self._writing else 0)
            self._epoll.modify(descriptor, events)

    def _close(self, descriptor: int, *, genuine: bool = True) -> None:
        found = self._visitors.pop(descriptor, None)
        if found is None:
            return
        self._writing.discard(descriptor)
        self._doorway.over(descriptor, genuine)
        ticket, stream = found
        node = self._nodes.get(ticket, b"")
        if self._giver._streams.get(node) is stream:
            del self._giver._streams[node]
            self._nodes.pop(ticket, None)
        stream.close()
