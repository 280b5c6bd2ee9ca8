"""The thread that gets values from other nodes: connections, pieces into the store, checksums.

Covers carrying out what `pull` decides: it alone touches the bulk connections that this node has made, and writes into values that are not whole.
Does not cover the decisions, sealing (the broker's loop does it: `object_exchange`), or sending to others (their requests come to
the node's one port, which is the loop's, too).

A thread of its own, because copying a piece into memory that was never touched, and making room by writing to disk, take long; both happen without
the interpreter's lock. It is started with the first value.
"""

from __future__ import annotations

import collections
import os
import threading
import time
import traceback
from typing import TYPE_CHECKING, Final, NamedTuple

from zray import errors
from zray.broker import peer_messages as pm
from zray.broker import pull as p
from zray.peer_transport import Arrived, Brought, BulkSockets, Connected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zray.object_store import ObjectRef, ObjectStore, Place
    from zray.peer_transport import ClusterKey

_IDLE_S: Final = 60.0
_CLOSE_S: Final = 5.0


class Half(NamedTuple):
    """A value of which some pieces are there."""

    version: int
    size: int
    piece_bytes: int
    there: bytearray
    """1 for each piece that is."""
    place: Place


class Got(NamedTuple):
    """A value is whole: to be sealed. Its `Half` stays until `Bulk.sealed`."""

    object: bytes
    place: Place


class NotGot(NamedTuple):
    """A value cannot be had."""

    object: bytes
    reason: str
    full: bool
    """There is no room for it here; else: no node has it any more."""


class More(NamedTuple):
    """Pieces have come of a value that `Bulk.watch` was called for."""

    object: bytes


Outcome = Got | NotGot | More


class _Want(NamedTuple):
    """What to get, as the loop knows it."""

    ref: ObjectRef
    version: int
    size: int
    contained: int


class Bulk:
    """A node's receiving of values. Its methods are the loop's, but for those below "the thread"."""

    def __init__(
        self, own: bytes, key: ClusterKey, objects: ObjectStore, address_of: Callable[[bytes], str | None]
    ) -> None:
        """
        Args:
            own: id of this node.
            key: of the cluster.
            objects: where values are written.
            address_of: host:port of a node, None when it is not known; called by both threads.
        """
        self._own = own
        self._key = key
        self._objects = objects
        self._address_of = address_of
        self._commands: collections.deque[Callable[[float], list[p.Action]]] = collections.deque()
        self._outcomes: collections.deque[Outcome] = collections.deque()
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None
        self._sockets: BulkSockets | None = None
        self._running = True
        self._halves: dict[bytes, Half] = {}
        self._watched: set[bytes] = set()
        self._wants: dict[bytes, _Want] = {}
        self._addresses: dict[bytes, str] = {}
        """Where nodes are that were named by others."""
        self.pulls = p.Pulls()
        self.received_bytes = 0

    # -- the loop's side -------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Descriptor that becomes readable when there are outcomes."""
        return self._news

    def pull(self, ref: ObjectRef, version: int, size: int, contained: int, sources: Iterable[bytes]) -> None:
        """Get the value of a pending object into the store; a second call for it adds sources.

        Args:
            ref: the object; kept until the outcome.
            version: of the value.
            size: of it in bytes.
            contained: how many objects it refers to at most.
            sources: nodes that have that version, or are getting it.
        """
        name, nodes = ref.binary(), list(sources)
        want = _Want(ref, version, size, contained)

        def begin(now: float) -> list[p.Action]:
            self._wants.setdefault(name, want)
            return self.pulls.want(name, version, size, nodes, now)

        self._command(begin)

    def forget(self, object_: bytes) -> None:
        """Nobody wants a value any more: nothing more of it is got. There is no outcome, unless it is under way already."""

        def drop(now: float) -> list[p.Action]:
            self._drop(object_)
            return self.pulls.forget(object_, now)

        self._command(drop)

    def node_gone(self, node: bytes, reason: str) -> None:
        """A node is dead."""
        if self._thread is not None:
            self._command(lambda now: self._gone(node, reason, now))

    def _command(self, command: Callable[[float], list[p.Action]]) -> None:
        self._commands.append(command)
        if self._thread is None:
            self._sockets = BulkSockets(self._own, self._key)
            self._thread = threading.Thread(target=self._run, args=(self._sockets,), name="zray-bulk", daemon=True)
            self._thread.start()
        if self._sockets is not None:
            self._sockets.wake()

    def outcomes(self) -> list[Outcome]:
        """Return what has become of values since the last call."""
        try:
            os.eventfd_read(self._news)
        except BlockingIOError:
            pass
        return [self._outcomes.popleft() for _ in range(len(self._outcomes))]

    def half(self, object_: bytes) -> Half | None:
        """Return what there is of a value that is being got."""
        return self._halves.get(object_)

    def sealed(self, object_: bytes) -> None:
        """A value that was got is in the store, or given up."""
        self._halves.pop(object_, None)

    def watch(self, object_: bytes) -> None:
        """Tell (once, by `More`) when more pieces of a value have come."""
        self._watched.add(object_)

    def close(self) -> None:
        """End the thread; what is under way is given up."""
        self._running = False
        if self._thread is not None and self._sockets is not None:
            self._sockets.wake()
            self._thread.join(_CLOSE_S)
        self._halves.clear()
        self._wants.clear()
        self._outcomes.clear()
        os.close(self._news)

    # -- the thread ------------------------------------------------------------------------------------------------------

    def _run(self, sockets: BulkSockets) -> None:
        try:
            while self._running:
                now = time.monotonic()
                sockets.wait(max(0.0, min(_IDLE_S, self.pulls.wake_at - now)))
                self._round(sockets)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            self._sockets = None
            sockets.close()

    def _round(self, sockets: BulkSockets) -> None:
        for _ in range(len(self._commands)):
            self._perform(sockets, self._commands.popleft()(time.monotonic()))
        for event in sockets.receive():
            self._perform(sockets, self._take(event))
        now = time.monotonic()
        if now >= self.pulls.wake_at:
            self._perform(sockets, self.pulls.tick(now))

    def _take(self, event: object) -> list[p.Action]:
        now = time.monotonic()
        if isinstance(event, Brought):
            return self._piece(event, now)
        if isinstance(event, Connected):
            return self.pulls.connected(event.node, now)
        if not isinstance(event, Arrived):
            return self.pulls.broken(event.node, now)  # type: ignore[attr-defined]
        try:
            message = pm.decode(event.frame)
        except pm.PeerFrameError:
            return []
        if isinstance(message, pm.NotYet):
            self.pulls.not_yet(event.node, now)
        elif isinstance(message, pm.NotHere):
            return self.pulls.not_here(event.node, message.id, message.version, message.reason, now)
        elif isinstance(message, pm.Elsewhere) and message.node != self._own:
            self._addresses[message.node] = message.address
            return self.pulls.elsewhere(event.node, message.id, message.version, message.node, now)
        return []

    def _piece(self, event: Brought, now: float) -> list[p.Action]:
        try:
            message = pm.decode(event.frame)
        except pm.PeerFrameError:
            return []
        if not isinstance(message, pm.Piece):
            return []
        name, index = message.id, message.index
        offset = self.pulls.place_of(event.node, name, message.version, index, len(event.data), now)
        half = self._halves.get(name)
        if offset is None or half is None:
            return []
        good = half.place.write(offset, event.data) == message.crc
        self.received_bytes += len(event.data)
        actions = self.pulls.came(event.node, name, index, good, now)
        if good and name in self._watched:
            self._watched.discard(name)
            self._tell(More(name))
        return actions

    def _perform(self, sockets: BulkSockets, actions: list[p.Action]) -> None:
        todo = collections.deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, p.SendAsk):
                ask = pm.Ask(action.object, action.version, action.piece_bytes, action.pieces, action.avoid)
                self._send(sockets, action.node, ask)
            elif isinstance(action, p.SendTook):
                self._send(sockets, action.node, pm.Took(action.object, action.version, action.whole))
            elif isinstance(action, p.Dial):
                address = self._address_of(action.node) or self._addresses.get(action.node)
                if address:
                    sockets.dial(action.node, address)
                else:
                    todo.extend(self._gone(action.node, "its address is not known", time.monotonic()))
            elif isinstance(action, p.Open):
                todo.extend(self._open(action))
            elif isinstance(action, p.Whole):
                half = self._halves[action.object]
                self._wants.pop(action.object, None)
                self._tell(Got(action.object, half.place))
            else:
                self._drop(action.object)
                self._tell(NotGot(action.object, action.reason, action.full))

    def _send(self, sockets: BulkSockets, node: bytes, message: pm.PeerMessage) -> None:
        sockets.send(node, pm.envelope(pm.PLAIN, node, pm.encode(message)))

    def _gone(self, node: bytes, reason: str, now: float) -> list[p.Action]:
        if self._sockets is not None:
            self._sockets.hang_up(node)
        return self.pulls.node_gone(node, reason, now)

    def _open(self, action: p.Open) -> list[p.Action]:
        want = self._wants[action.object]
        try:
            place = self._objects.place(want.ref, want.size, want.contained)
            reason = "it has a value already"
        except errors.ZrayError as error:
            place, reason = None, str(error)
        now = time.monotonic()
        if place is None:
            return self.pulls.failed(action.object, reason, now)
        actions = self.pulls.opened(action.object, now)
        found = self.pulls.there(action.object)
        if found is not None:
            version, piece_bytes, there = found
            self._halves[action.object] = Half(version, want.size, piece_bytes, there, place)
        return actions

    def _drop(self, object_: bytes) -> None:
        """Give up what was opened."""
        self._wants.pop(object_, None)
        if object_ in self._watched:
            self._watched.discard(object_)
            self._tell(More(object_))
        self._halves.pop(object_, None)

    def _tell(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        os.eventfd_write(self._news, 1)
