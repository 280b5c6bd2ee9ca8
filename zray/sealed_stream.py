"""Encrypted streams between two processes of different nodes: what ZeroMQ's sockets are too slow for.

Covers records on a TCP connection, the preface that names whom it is for, dialling, and taking in connections that the door of a node hands over
(`zray.node_port`). Does not cover what a frame means, or who is given the secret of a stream (`zray.broker.lanes`, `zray.broker.giver`).

A stream is one TCP connection with one secret of 32 random bytes, which was drawn for it alone and told to both ends over connections between brokers,
which are CURVE: whoever knows it belongs to the cluster. It begins with a preface in clear, which says where it leads and which secret it uses (its
`ticket`); all that follows are records:

    length (4 bytes, little-endian)   of what follows
    ciphertext                        AES-256-GCM (NIST SP 800-38D), the authenticator its last 16 bytes

Each direction has a key of its own, HMAC-SHA-256(secret, direction), and numbers its records from 0: the number is the nonce, and is not sent. So a
record that was changed, cut, repeated, left out or moved, or comes from who has not the secret, fails its authenticator, and the connection ends
without an answer. The called end uses up a ticket with the first record that is genuine: a connection that is played again leads nowhere. No two
records share key and nonce: a caller whose connection was refused sends the same bytes again, not others.

Why not ZeroMQ, as everywhere else: its threads stand between a process and the kernel, four changes of thread for a call and its answer where two do,
and its cipher (XSalsa20-Poly1305) moves 1.4 GB/s where AES does 9 (`perf/profile.md`).

To be imported where it is needed only: its cipher takes 50 ms to load, and a single machine does without.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

if TYPE_CHECKING:
    from collections.abc import Callable

SECRET_BYTES: Final = 32
MAGIC: Final = b"zray/1"
"""What a stream begins with, which is no greeting of ZeroMQ's; then come the door's number and the ticket."""
_PREFACE: Final = struct.Struct("<6sH2xQ")
PREFACE_HEARD: Final = 10
"""Bytes of the preface that the door has read before it hands the connection over."""
_TICKET: Final = struct.Struct("<Q")
TAG_BYTES: Final = 16
LENGTH_BYTES: Final = 4
_MOST_BYTES: Final = 2 << 20
"""Of the longest record: calls or results of a lane that leave together fit, 1 MiB and what is said about each (`zray.lanes`, `zray.lane_ends`)."""
_READ_BYTES: Final = 64 << 10
_FIRST_RECORD_S: Final = 4.0
"""Seconds within which one who was let in must have shown that he knows the secret. Else he makes room as soon as somebody else comes."""
_MOST_WAITING: Final = 64
"""Connections that have not; the oldest makes room."""


def cipher_for_caller(secret: bytes) -> AESGCM:
    """The cipher of what the end says that has dialled."""
    return AESGCM(hmac.digest(secret, b"zray caller", "sha256"))


def cipher_for_called(secret: bytes) -> AESGCM:
    """The cipher of what the other end says."""
    return AESGCM(hmac.digest(secret, b"zray called", "sha256"))


def preface(door: int, ticket: int) -> bytes:
    """Return what a connection begins with that asks for the process with that number, and shows it a ticket."""
    return _PREFACE.pack(MAGIC, door, ticket)


class SealedStream:
    """One end of a stream, for small frames. Never blocks. Used by one thread at a time."""

    __slots__ = ("_connection", "_decrypt", "_encrypt", "_partial", "_received", "_sent", "_unsent", "damaged", "ended")

    def __init__(self, connection: socket.socket, secret: bytes, *, calling: bool) -> None:
        """calling: this end has dialled."""
        connection.setblocking(False)
        self._connection = connection
        caller, called = cipher_for_caller(secret), cipher_for_called(secret)
        self._encrypt = (caller if calling else called).encrypt
        self._decrypt = (called if calling else caller).decrypt
        self._sent = 0
        self._received = 0
        self._unsent = bytearray()
        self._partial = b""
        """The beginning of a record that has not come whole."""
        self.ended = False
        """Nothing more comes, or leaves."""
        self.damaged = False
        """It ended with a record that the other end has not sent so."""

    @property
    def received(self) -> int:
        """Records that have come and were genuine."""
        return self._received

    def fileno(self) -> int:
        """Descriptor that is readable when `receive` is worth calling."""
        return self._connection.fileno()

    def waits_to_write(self) -> bool:
        """Whether `flush` is wanted once the descriptor is writable."""
        return bool(self._unsent) and not self.ended

    def send(self, frame: bytes) -> None:
        """Send a frame, or keep it until `flush`; it is lost when the stream has ended."""
        self._write(self._record(frame))

    def _record(self, frame: bytes) -> bytes:
        sealed = self._encrypt(self._sent.to_bytes(12, "little"), frame, None)
        self._sent += 1
        return len(sealed).to_bytes(LENGTH_BYTES, "little") + sealed

    def _write(self, record: bytes) -> None:
        if self.ended:
            return
        if self._unsent:
            self._unsent += record
            self.flush()
            return
        sent = self._try(record)
        if sent < len(record):
            self._unsent += record[sent:]

    def flush(self) -> None:
        """Send what waits, as far as it goes."""
        if self._unsent and not self.ended:
            del self._unsent[: self._try(self._unsent)]

    def _try(self, data: bytes | bytearray) -> int:
        try:
            return self._connection.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.EINPROGRESS):  # it is still being made
                return 0
            self.ended = True
            return 0

    def receive(self) -> list[bytes]:
        """Return the frames that have come; `ended` says whether any more will."""
        frames: list[bytes] = []
        while not self.ended:
            try:
                data = self._connection.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except OSError:
                self.ended = True
                break
            if not data:
                self.ended = True
                break
            self._open(self._partial + data if self._partial else data, frames)
            if len(data) < _READ_BYTES:
                break
        return frames

    def _open(self, data: bytes, frames: list[bytes]) -> None:
        """Open the records that are whole."""
        at = 0
        while len(data) - at >= LENGTH_BYTES:
            length = int.from_bytes(data[at : at + LENGTH_BYTES], "little")
            if not TAG_BYTES <= length <= _MOST_BYTES:
                self.ended = self.damaged = True
                return
            end = at + LENGTH_BYTES + length
            if end > len(data):
                break
            try:
                frame = self._decrypt(self._received.to_bytes(12, "little"), data[at + LENGTH_BYTES : end], None)
            except InvalidTag:
                self.ended = self.damaged = True
                return
            self._received += 1
            frames.append(frame)
            at = end
        self._partial = data[at:]

    def close(self) -> None:
        """End the stream; what was not sent is not."""
        self.ended = True
        self._connection.close()


class DialledStream(SealedStream):
    """The end that has dialled. Until something genuine has come it can dial anew, and says the same again."""

    __slots__ = ("_address", "_early", "_next_at", "_pause")

    def __init__(self, address: str, door: int, ticket: int, secret: bytes) -> None:
        """
        Args:
            address: host:port of a node.
            door: number of a process there.
            ticket: of the stream.
            secret: of the stream.

        Raises:
            OSError: this process has no descriptors left, or there is no such host.
        """
        super().__init__(connecting(address), secret, calling=True)
        self._address = address
        self._early = bytearray(preface(door, ticket))
        """All that was said before the first answer."""
        self._next_at = 0.0
        self._pause = 0.01
        super()._write(bytes(self._early))

    def _write(self, record: bytes) -> None:
        if not self._received:
            self._early += record
        super()._write(record)

    def may_dial_again(self) -> bool:
        """Whether it ended before anything genuine had come."""
        return self.ended and not self._received and not self.damaged

    def dial_again(self, now: float) -> bool:
        """Connect once more, if a while has passed since the last time; whether there is a new descriptor."""
        if now < self._next_at:
            return False
        self._next_at = now + self._pause
        self._pause = min(2 * self._pause, 0.5)
        try:
            made = connecting(self._address)
        except OSError:
            return False
        made.setblocking(False)
        self._connection.close()
        self._connection = made
        self.ended = False
        self._partial = b""
        self._unsent = bytearray()
        super()._write(bytes(self._early))
        return True


def _prepare(connection: socket.socket, host: str | None = None) -> None:
    """Set what streams want of TCP: nothing waits for more to leave with it, and a peer on a dead host is noticed some day. host: of the other end, if that
    may not be there yet. OSError: the connection is broken.

    Within one host there is no network to be shared, so Reno, which every process may choose (`tcp(7)`), does: what else a system uses may pace what is
    sent (BBR does, with timers), which takes half of the rate between two processes.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if connection.getsockname()[0] == (host or connection.getpeername()[0]):
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def connecting(address: str) -> socket.socket:
    """Begin a connection to host:port."""
    host, _, port = address.rpartition(":")
    family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setblocking(False)
        made.connect_ex(where)  # what it says is heard with the first bytes that do not leave
        _prepare(made, str(where[0]))
    except BaseException:
        made.close()
        raise
    return made


class Doorway:
    """Where the door of a node hands over connections for this process. Used by one thread at a time."""

    def __init__(self, path: str) -> None:
        """path: of the socket that the door knows (`zray.node_port`). OSError: it cannot be had."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            self._socket.bind(path)
        except BaseException:
            self._socket.close()
            raise
        self._secrets: dict[int, bytes] = {}
        """By ticket that nobody has used."""
        self._waiting: dict[int, tuple[socket.socket, float, bytearray]] = {}
        """By descriptor: connections whose ticket has not come, until when it must, and what has come of it. (It cannot stay in the kernel: the descriptor
        would be readable all the time.)"""
        self._unproven: dict[int, float] = {}
        """By descriptor: connections that were admitted and have shown nothing genuine, and until when they must."""
        self.refused = 0
        """Connections that showed no ticket, one that was used or never given, or not its secret."""
        self.on_refuse: Callable[[int], object] | None = None
        """Told of a descriptor that `arrivals` has returned and that will be closed at once."""

    def fileno(self) -> int:
        """Descriptor that is readable when somebody has come."""
        return self._socket.fileno()

    def expect(self, ticket: int, secret: bytes) -> None:
        """Somebody was told a secret."""
        self._secrets[ticket] = secret

    def use(self, ticket: int) -> bool:
        """He has come, or will not: nobody else is let in with that ticket. Whether nobody was before."""
        return self._secrets.pop(ticket, None) is not None

    def arrivals(self) -> list[socket.socket]:
        """Return connections that have come since the last call; each is to be shown to `admit` when it is readable."""
        found = []
        for _ in range(_MOST_WAITING):  # not more at once: so none of these is the one that makes room
            try:
                _, rights, _, _ = self._socket.recvmsg(
                    PREFACE_HEARD, socket.CMSG_LEN(struct.calcsize("i")), socket.MSG_CMSG_CLOEXEC
                )
            except OSError:
                break
            for level, kind, data in rights:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    made = socket.socket(fileno=struct.unpack("i", data)[0])
                    made.setblocking(False)
                    with contextlib.suppress(OSError):  # as will be seen when it is read
                        _prepare(made)
                    if len(self._waiting) >= _MOST_WAITING:
                        self._refuse(next(iter(self._waiting)))
                    self._waiting[made.fileno()] = made, time.monotonic() + _FIRST_RECORD_S, bytearray()
                    found.append(made)
        return found

    def is_waiting(self, descriptor: int) -> bool:
        """Whether a connection with that descriptor has not shown its ticket."""
        return descriptor in self._waiting

    def admit(self, descriptor: int) -> tuple[int, socket.socket, bytes] | None:
        """Read the ticket of a connection: return it, the connection, whose first record is still to be judged (`is_first`), and the secret for that;
        `over` must follow. None: it was refused, or more is to come (then `is_waiting`)."""
        connection, _, shown = self._waiting[descriptor]
        try:
            data = connection.recv(_TICKET.size - len(shown))
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        shown += data
        if data and len(shown) < _TICKET.size:
            return None
        ticket = _TICKET.unpack(shown)[0] if data else 0
        secret = self._secrets.get(ticket) if data else None
        if secret is None:
            self._refuse(descriptor)
            return None
        del self._waiting[descriptor]
        self._unproven[descriptor] = time.monotonic() + _FIRST_RECORD_S
        return ticket, connection, secret

    def is_first(self, descriptor: int, ticket: int) -> bool:
        """A connection has shown that it knows the secret: whether it is the first that has. Others play it again."""
        self._unproven.pop(descriptor, None)
        return self.use(ticket)

    def over(self, descriptor: int, genuine: bool) -> None:
        """A connection that was admitted is about to be closed; `genuine`: it knew the secret, and all that came was as it was sent."""
        self._unproven.pop(descriptor, None)
        if not genuine:
            self.refused += 1

    def late(self) -> list[int]:
        """Refuse those who have shown no ticket for too long. Return those who have, and nothing genuine for too long, or the oldest of too many: to
        be closed."""
        now = time.monotonic()
        for descriptor in [descriptor for descriptor, (_, limit, _) in self._waiting.items() if limit < now]:
            self._refuse(descriptor)
        too_many = len(self._unproven) - _MOST_WAITING
        return [at for index, (at, limit) in enumerate(self._unproven.items()) if limit < now or index < too_many]

    def _refuse(self, descriptor: int) -> None:
        connection, _, _ = self._waiting.pop(descriptor)
        if self.on_refuse is not None:
            self.on_refuse(descriptor)
        connection.close()
        self.refused += 1

    def close(self) -> None:
        """Let nobody in any more."""
        for connection, _, _ in self._waiting.values():
            connection.close()
        self._waiting.clear()
        self._socket.close()


class Visitors:
    """All streams that come to this process, and one descriptor for them. Used by one thread at a time."""

    def __init__(self, path: str, besides: int, wait: Callable[[int, float], object] | None = None) -> None:
        """
        Args:
            path: see `Doorway`.
            besides: a descriptor that is waited for as well.
            wait: see `zray.transport.Inbox.open`; None: the kernel's way.
        """
        self._wait = wait
        self._doorway = Doorway(path)
        self._epoll = select.epoll()
        self._epoll.register(self._doorway.fileno(), select.EPOLLIN)
        self._epoll.register(besides, select.EPOLLIN)
        self._doorway.on_refuse = self._unwatch
        self._besides = besides
        self._streams: dict[int, tuple[int, SealedStream]] = {}
        """By descriptor: the ticket, too."""
        self._frames: list[tuple[bytes, SealedStream]] = []
        """What has come, the newest first."""
        self.on_refused: Callable[[int], None] | None = None
        """Told how many were refused."""

    def expect(self, ticket: int, secret: bytes) -> None:
        """Somebody was told a secret, and will come with that ticket."""
        self._doorway.expect(ticket, secret)

    def forget(self, ticket: int) -> None:
        """Close the stream with a ticket; nobody is let in with it any more."""
        self._doorway.use(ticket)
        for descriptor, (used, _) in list(self._streams.items()):
            if used == ticket:
                self._close(descriptor)

    def fileno(self) -> int:
        """Descriptor that is readable when `next_frame` may have something, or the descriptor besides is."""
        return self._epoll.fileno()

    def wait(self, seconds: float) -> None:
        """Wait until the descriptor is readable, at most so long (negative: for ever)."""
        if self._frames:
            return
        if self._wait is None:
            self._look(self._epoll.poll(seconds if seconds >= 0 else -1))
        else:
            self._wait(self._epoll.fileno(), seconds)
            self._look(self._epoll.poll(0))

    def next_frame(self) -> tuple[bytes, SealedStream] | None:
        """Return a frame that has come, and the stream for an answer."""
        if not self._frames:
            self._look(self._epoll.poll(0))
        return self._frames.pop() if self._frames else None

    def answer(self, stream: SealedStream, frame: bytes) -> None:
        """Send a frame to one who has come."""
        stream.send(frame)
        if stream.waits_to_write() and stream.fileno() in self._streams:
            self._epoll.modify(stream.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _look(self, ready: list[tuple[int, int]]) -> None:
        frames: list[tuple[bytes, SealedStream]] = []
        before = self._doorway.refused
        for descriptor, events in ready:
            if descriptor == self._besides:
                continue
            if descriptor == self._doorway.fileno():
                for connection in self._doorway.arrivals():
                    self._epoll.register(connection.fileno(), select.EPOLLIN)
                for late in self._doorway.late():
                    self._close(late, genuine=False)
            elif descriptor in self._streams:
                self._take_in(descriptor, events, frames)
            elif self._doorway.is_waiting(descriptor):
                self._admit(descriptor, frames)
        if self._doorway.refused != before and self.on_refused is not None:
            self.on_refused(self._doorway.refused - before)
        if frames:
            frames.reverse()
            self._frames = frames + self._frames

    def _admit(self, descriptor: int, frames: list[tuple[bytes, SealedStream]]) -> None:
        found = self._doorway.admit(descriptor)
        if found is not None:
            ticket, connection, secret = found
            self._streams[descriptor] = ticket, SealedStream(connection, secret, calling=False)
            self._take_in(descriptor, select.EPOLLIN, frames)

    def _take_in(self, descriptor: int, events: int, frames: list[tuple[bytes, SealedStream]]) -> None:
        ticket, stream = self._streams[descriptor]
        if events & select.EPOLLOUT:
            stream.flush()
            if not stream.waits_to_write():
                self._epoll.modify(descriptor, select.EPOLLIN)
        unknown = stream.received == 0
        found = [(frame, stream) for frame in stream.receive()]
        if unknown and found and not self._doorway.is_first(descriptor, ticket):
            self._close(descriptor, genuine=False)
            return
        frames += found
        if stream.ended:
            self._close(descriptor, genuine=bool(stream.received) and not stream.damaged)

    def _close(self, descriptor: int, *, genuine: bool = True) -> None:
        _, stream = self._streams.pop(descriptor)
        self._doorway.over(descriptor, genuine)
        self._unwatch(descriptor)
        stream.close()

    def _unwatch(self, descriptor: int) -> None:
        """Before a descriptor is closed. That alone is not enough while a child that was forked has it, too: epoll would tell of it for ever."""
        with contextlib.suppress(FileNotFoundError):  # who was interrupted may not have come to watch it
            self._epoll.unregister(descriptor)

    def close(self) -> None:
        """Close all streams."""
        for descriptor in list(self._streams):
            self._close(descriptor)
        self._doorway.close()
        self._epoll.close()
