"""Streams for values between nodes: records as in `zray.sealed_stream`, of which some are pieces of values that go straight from store to store.

Covers the two ends of such a connection (`ValueStream`) and the connections that a node has made to get values (`DialledStreams`). Does not cover who
asks for which piece (`zray.broker.pull`, `zray.broker.serving`), or the threads of both ends (`zray.broker.bulk`, `zray.broker.giver`).

The first byte of a record's plaintext says whether it is a frame alone, or a frame whose data is all of the next record. Data is encrypted from where it
lies and decrypted to where it belongs: nothing else is copied but by the kernel. Where that is, is asked when the data is there, not before: another source
may have brought the same meanwhile, or nobody want it any more. Data that is not wanted is left as it came: its number is used up. (Records of
64 to 512 KiB, for the sake of the processor's caches, made no difference that could be measured.)
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import select
import socket
from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography.exceptions import InvalidTag

from zray.peer_transport import Arrived, Connected, Disconnected
from zray.sealed_stream import LENGTH_BYTES, TAG_BYTES, cipher_for_called, cipher_for_caller, connecting, preface

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MOST_DATA: Final = 1 << 20
"""Bytes of the longest data."""
_MOST_FRAME: Final = 60 << 10
_ALONE: Final = b"\0"
_WITH_DATA: Final = b"\1"
_TURN: Final = 4 << 20
"""Bytes that one stream moves before others have their turn."""
_BUFFER: Final = _MOST_FRAME + MOST_DATA + 4 * (LENGTH_BYTES + TAG_BYTES)


class Brought(NamedTuple):
    """A frame has come, and its data is in the place that was named for it."""

    node: bytes
    frame: bytes


Event = Arrived | Brought | Connected | Disconnected


class _Outgoing(NamedTuple):
    frame: bytes
    data: memoryview | None
    token: object
    """Let go of with the data."""


class ValueStream:
    """One end of a stream. Never blocks. `send` may be called by one thread and everything else by another."""

    def __init__(self, connection: socket.socket, secret: bytes, *, calling: bool, opening: bytes = b"") -> None:
        """
        Args:
            connection: which is closed with this.
            secret: of the stream.
            calling: this end has dialled.
            opening: sent before all else, as it is.
        """
        connection.setblocking(False)
        self._connection = connection
        mine, theirs = cipher_for_caller(secret), cipher_for_called(secret)
        if not calling:
            mine, theirs = theirs, mine
        self._seal, self._open = mine, theirs
        self._sent = self.received = 0
        """Records."""
        self._queue: collections.deque[_Outgoing] = collections.deque()
        self._out = memoryview(bytearray(_BUFFER))
        self._out[: len(opening)] = opening
        self._out_at, self._out_end = 0, len(opening)
        """What of it is still to leave."""
        self._in = memoryview(bytearray(max(MOST_DATA, _MOST_FRAME) + TAG_BYTES))
        self._have, self._need = 0, LENGTH_BYTES
        """Bytes of the record, or its length, that is coming."""
        self._length = 0
        """Of the record that is coming; 0: that comes first."""
        self._announced: bytes | None = None
        """The frame whose data is next."""
        self.ended = self.damaged = False

    def fileno(self) -> int:
        """Descriptor that is readable when `receive` is worth calling, and writable when `pump` is."""
        return self._connection.fileno()

    # -- out -----------------------------------------------------------------------------------------------------------

    def send(self, frame: bytes, data: memoryview | None = None, token: object = None) -> None:
        """Queue a frame, and data, which stays as it is until `token` is let go of. `pump` sends it."""
        self._queue.append(_Outgoing(frame, data, token))

    def waits_to_write(self) -> bool:
        """Whether `pump` has something to do."""
        return not self.ended and (self._out_at < self._out_end or bool(self._queue))

    def pump(self) -> None:
        """Send what the connection takes, up to a turn's worth."""
        left = _TURN
        while left > 0 and not self.ended:
            if self._out_at < self._out_end:
                try:
                    sent = self._connection.send(self._out[self._out_at : self._out_end])
                except OSError as error:
                    # The last two: it is still being made.
                    if error.errno not in (errno.EAGAIN, errno.ENOTCONN, errno.EINPROGRESS):
                        self.ended = True
                    return
                self._out_at += sent
                left -= sent
            elif self._queue:
                self._fill(self._queue.popleft())
            else:
                return

    def _fill(self, outgoing: _Outgoing) -> None:
        """Seal what is next."""
        frame, data, _ = outgoing
        sealed = self._seal.encrypt(self._number_sent(), (_ALONE if data is None else _WITH_DATA) + frame, None)
        end = self._put(0, sealed)
        if data is not None:
            length = len(data) + TAG_BYTES
            self._out[end : end + LENGTH_BYTES] = length.to_bytes(LENGTH_BYTES, "little")
            end += LENGTH_BYTES
            self._seal.encrypt_into(self._number_sent(), data, None, self._out[end : end + length])
            end += length
        self._out_at, self._out_end = 0, end

    def _number_sent(self) -> bytes:
        self._sent += 1
        return (self._sent - 1).to_bytes(12, "little")

    def _put(self, at: int, sealed: bytes) -> int:
        self._out[at : at + LENGTH_BYTES] = len(sealed).to_bytes(LENGTH_BYTES, "little")
        end = at + LENGTH_BYTES + len(sealed)
        self._out[at + LENGTH_BYTES : end] = sealed
        return end

    # -- in ------------------------------------------------------------------------------------------------------------

    def receive(self, place_for: Callable[[bytes, int], memoryview | None]) -> Iterator[tuple[bytes, bool]]:
        """Yield (frame, whether its data came) for what has come, up to a turn's worth.

        Args:
            place_for: given a frame and the size of its data, returns where that belongs; None: it is not wanted.
        """
        left = _TURN
        while left > 0 and not self.ended:
            try:
                got = self._connection.recv_into(self._in[self._have : self._need])
            except BlockingIOError:
                return
            except OSError:
                got = 0
            if not got:
                self.ended = True
                return
            self._have += got
            left -= got
            if self._have == self._need:
                if not self._length:
                    self._begin()
                elif (found := self._record(place_for)) is not None:
                    yield found

    def _begin(self) -> None:
        """The length of a record has come."""
        self._length = int.from_bytes(self._in[:LENGTH_BYTES], "little")
        self._have, self._need = 0, self._length
        if not TAG_BYTES < self._length <= len(self._in):
            self.ended = self.damaged = True

    def _record(self, place_for: Callable[[bytes, int], memoryview | None]) -> tuple[bytes, bool] | None:
        """A record has come whole."""
        record, number = self._in[: self._length], self.received.to_bytes(12, "little")
        self._have, self._need, self._length = 0, LENGTH_BYTES, 0
        announced, self._announced = self._announced, None
        try:
            if announced is None:
                plain = self._open.decrypt(number, record, None)
                self.received += 1
                if plain[:1] == _WITH_DATA:
                    self._announced = plain[1:]
                    return None
                return plain[1:], False
            place = place_for(announced, len(record) - TAG_BYTES)
            if place is not None:
                self._open.decrypt_into(number, record, None, place)
        except InvalidTag:
            self.ended = self.damaged = True
            return None
        self.received += 1
        return (announced, True) if place is not None else None

    def close(self) -> None:
        """End the stream; nothing that waits is sent."""
        self.ended = True
        self._queue.clear()
        self._connection.close()


class DialledStreams:
    """The streams over which a node gets values. Belongs to the thread that made it, but for `wake`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._woken, select.EPOLLIN)
        self._streams: dict[bytes, ValueStream] = {}
        self._nodes: dict[int, bytes] = {}
        """By descriptor."""
        self._writing: set[bytes] = set()
        """Nodes whose streams are waited for to become writable."""
        self._ready: list[tuple[int, int]] = []
        self._failed: list[bytes] = []

    def connect(self, node: bytes, address: str, door: int, ticket: int, secret: bytes) -> None:
        """Connect to host:port; a connection that there is already ends."""
        self.hang_up(node)
        try:
            made = connecting(address)
        except OSError:
            self._failed.append(node)
            return
        stream = ValueStream(made, secret, calling=True, opening=preface(door, ticket))
        self._streams[node] = stream
        self._nodes[stream.fileno()] = node
        self._epoll.register(stream.fileno(), select.EPOLLIN)
        self.send(node, b"")

    def hang_up(self, node: bytes) -> None:
        """Close the connection to a node, if there is one."""
        stream = self._streams.pop(node, None)
        self._writing.discard(node)
        if stream is not None:
            del self._nodes[stream.fileno()]
            stream.close()  # and epoll forgets it

    def send(self, node: bytes, frame: bytes) -> None:
        """Send a frame; it is lost when there is no connection."""
        stream = self._streams.get(node)
        if stream is not None:
            stream.send(frame)
            self._pump(node, stream)

    def _pump(self, node: bytes, stream: ValueStream) -> None:
        stream.pump()
        if stream.waits_to_write() != (node in self._writing):
            self._writing ^= {node}
            events = select.EPOLLIN | (select.EPOLLOUT if node in self._writing else 0)
            self._epoll.modify(stream.fileno(), events)

    def wake(self) -> None:
        """Let `wait` return. From any thread."""
        with contextlib.suppress(OSError):
            os.eventfd_write(self._woken, 1)

    def wait(self, seconds: float) -> None:
        """Wait until there may be something to receive, or `wake` was called, at most so long."""
        self._ready = self._epoll.poll(min(seconds, 3600.0))

    def receive(self, place_for: Callable[[bytes, bytes, int], memoryview | None]) -> Iterator[Event]:
        """Yield what has come, without waiting. Connections may be made and closed in between.

        Args:
            place_for: see `ValueStream.receive`; the node comes first.
        """
        while self._failed:
            yield Disconnected(self._failed.pop())
        ready, self._ready = self._ready, []
        for descriptor, _ in ready:
            if descriptor == self._woken:
                os.eventfd_read(self._woken)
                continue
            node = self._nodes.get(descriptor)
            if node is None:
                continue
            stream = self._streams[node]
            if node in self._writing:
                self._pump(node, stream)
            unknown = stream.received == 0
            for frame, brought in stream.receive(lambda frame, size, node=node: place_for(node, frame, size)):  # type: ignore[misc]
                if unknown:
                    unknown = False
                    yield Connected(node)
                if frame:
                    yield Brought(node, frame) if brought else Arrived(node, frame)
                if stream.ended:
                    break
            if stream.ended and self._streams.get(node) is stream:
                self.hang_up(node)
                yield Disconnected(node)

    def close(self) -> None:
        """Close all connections."""
        for node in list(self._streams):
            self.hang_up(node)
        self._epoll.close()
        os.close(self._woken)
