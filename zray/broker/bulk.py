"""The thread that gets values from other nodes: connections, and pieces into the store.

Covers carrying out what `pull` decides: it alone touches the streams that this node has made for values (`zray.value_streams`), and writes into values
that are not whole. Does not cover the decisions, sealing (the broker's loop does it: `object_exchange`), or giving to others (`giver`).

A thread of its own, because decrypting a piece into memory that was never touched, and making room by writing to disk, take long; both happen without
the interpreter's lock. It is started with the first value. A stream needs a secret, for which the loop asks the other node (`Wanted`).
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
from zray.node_port import VALUES
from zray.peer_transport import Arrived, Connected
from zray.value_streams import Brought, DialledStreams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zray.object_store import ObjectRef, ObjectStore, Place
    from zray.value_streams import Event

_IDLE_S: Final = 60.0
_CLOSE_S: Final = 5.0
_AGAIN_S: Final = (0.01, 1.0)
"""After a connection that broke or could not be made: seconds until the next try, doubling up to the second."""


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
    ref: ObjectRef
    """With which it was asked for: what was forgotten and asked for again since has another one."""


class NotGot(NamedTuple):
    """A value cannot be had."""

    object: bytes
    reason: str
    full: bool
    """There is no room for it here; else: no node has it any more."""
    ref: ObjectRef
    """As in `Got`."""


class More(NamedTuple):
    """Pieces have come of a value that `Bulk.watch` was called for."""

    object: bytes


class WantsStream(NamedTuple):
    """A stream to a node is wanted: `Bulk.stream` is the answer."""

    node: bytes


Outcome = Got | NotGot | More | WantsStream


class _Want(NamedTuple):
    """What to get, as the loop knows it."""

    ref: ObjectRef
    version: int
    size: int
    contained: int


class Bulk:
    """A node's receiving of values. Its methods are the loop's, but for those below "the thread"."""

    def __init__(self, own: bytes, objects: ObjectStore, address_of: Callable[[bytes], str | None]) -> None:
        """
        Args:
            own: id of this node.
            objects: where values are written.
            address_of: host:port of a node, None when it is not known; called by both threads.
        """
        self._own = own
        self._objects = objects
        self._address_of = address_of
        self._commands: collections.deque[Callable[[float], list[p.Action]]] = collections.deque()
        self._outcomes: collections.deque[Outcome] = collections.deque()
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None
        self._streams: DialledStreams | None = None
        self._asked: set[bytes] = set()
        """Nodes from whom a secret is awaited."""
        self._again_at: dict[bytes, float] = {}
        """When nodes that could not be reached are tried again."""
        self._pauses: dict[bytes, float] = {}
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

    def stream(self, node: bytes, ticket: int, secret: bytes) -> None:
        """A node has given a secret for a stream (empty: it has none to give)."""
        if self._thread is not None:
            self._command(lambda now: self._connect(node, ticket, secret, now))

    def _command(self, command: Callable[[float], list[p.Action]]) -> None:
        self._commands.append(command)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="zray-bulk", daemon=True)
            self._thread.start()
        streams = self._streams
        if streams is not None:
            streams.wake()

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

    def sealed(self, object_: bytes, place: Place) -> None:
        """A value that was got in that place is in the store, or given up."""
        half = self._halves.get(object_)
        if half is not None and half.place is place:  # else it is being got once more
            del self._halves[object_]

    def watch(self, object_: bytes) -> None:
        """Tell (once, by `More`) when more pieces of a value have come."""
        self._watched.add(object_)

    def close(self) -> None:
        """End the thread; what is under way is given up."""
        self._running = False
        if self._thread is not None:
            streams = self._streams
            if streams is not None:
                streams.wake()
            self._thread.join(_CLOSE_S)
        self._halves.clear()
        self._wants.clear()
        self._outcomes.clear()
        os.close(self._news)

    # -- the thread ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        streams = self._streams = DialledStreams()
        try:
            while self._running:
                if not self._commands:
                    wake_at = min(self.pulls.wake_at, *self._again_at.values(), time.monotonic() + _IDLE_S)
                    streams.wait(max(0.0, wake_at - time.monotonic()))
                self._round(streams)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            self._streams = None
            streams.close()

    def _round(self, streams: DialledStreams) -> None:
        for _ in range(len(self._commands)):
            self._perform(self._commands.popleft()(time.monotonic()))
        for event in streams.receive(self._place_for):
            self._perform(self._take(event))
        now = time.monotonic()
        if now >= self.pulls.wake_at:
            self._perform(self.pulls.tick(now))
        for node in [node for node, when in self._again_at.items() if when <= now]:
            del self._again_at[node]
            self._dial(node)

    def _take(self, event: Event) -> list[p.Action]:
        now = time.monotonic()
        if isinstance(event, Connected):
            self._pauses.pop(event.node, None)
            return self.pulls.connected(event.node, now)
        if not isinstance(event, (Arrived, Brought)):
            self._later(event.node, now)
            return self.pulls.broken(event.node, now)
        try:
            message = pm.decode(event.frame)
        except pm.PeerFrameError:
            return []
        if isinstance(event, Brought):
            return self._piece(event.node, message, now) if isinstance(message, pm.Piece) else []
        if isinstance(message, pm.NotYet):
            self.pulls.not_yet(event.node, now)
        elif isinstance(message, pm.NotHere):
            return self.pulls.not_here(event.node, message.id, message.version, message.reason, now)
        elif isinstance(message, pm.Elsewhere) and message.node != self._own:
            self._addresses[message.node] = message.address
            return self.pulls.elsewhere(event.node, message.id, message.version, message.node, now)
        return []

    def _place_for(self, node: bytes, frame: bytes, size: int) -> memoryview | None:
        """Where the piece belongs that comes with a frame; None when it is not wanted."""
        try:
            message = pm.decode(frame)
        except pm.PeerFrameError:
            return None
        if not isinstance(message, pm.Piece):
            return None
        self.received_bytes += size
        offset = self.pulls.place_of(node, message.id, message.version, message.index, size, time.monotonic())
        half = self._halves.get(message.id)
        return None if offset is None or half is None else half.place.part(offset, size)

    def _piece(self, node: bytes, message: pm.Piece, now: float) -> list[p.Action]:
        """A piece is where it belongs."""
        actions = self.pulls.came(node, message.id, message.index, now)
        if message.id in self._watched:
            self._watched.discard(message.id)
            self._tell(More(message.id))
        return actions

    # -- connections -----------------------------------------------------------------------------------------------------

    def _dial(self, node: bytes) -> None:
        """Connect to a node, anew if there is a connection: ask for a secret first."""
        self._again_at.pop(node, None)
        self._asked.add(node)
        self._tell(WantsStream(node))

    def _connect(self, node: bytes, ticket: int, secret: bytes, now: float) -> list[p.Action]:
        if node not in self._asked or self._streams is None:
            return []
        self._asked.discard(node)
        address = self._address_of(node) or self._addresses.get(node)
        if not secret:
            return self._gone(node, "it gives no values", now)
        if not address:
            self._later(node, now)
            return []
        self._streams.connect(node, address, VALUES, ticket, secret)
        return self.pulls.broken(node, now)  # what was under way on the last one

    def _later(self, node: bytes, now: float) -> None:
        pause = self._pauses.get(node, _AGAIN_S[0])
        self._pauses[node] = min(2 * pause, _AGAIN_S[1])
        self._again_at[node] = now + pause

    # -- what is decided -------------------------------------------------------------------------------------------------

    def _perform(self, actions: list[p.Action]) -> None:
        todo = collections.deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, p.SendAsk):
                ask = pm.Ask(action.object, action.version, action.piece_bytes, action.pieces, action.avoid)
                self._send(action.node, ask)
            elif isinstance(action, p.SendTook):
                self._send(action.node, pm.Took(action.object, action.version, action.whole))
            elif isinstance(action, p.Dial):
                if self._address_of(action.node) or self._addresses.get(action.node):
                    self._dial(action.node)
                else:
                    todo.extend(self._gone(action.node, "its address is not known", time.monotonic()))
            elif isinstance(action, p.Open):
                todo.extend(self._open(action))
            elif isinstance(action, p.Whole):
                want = self._wants.pop(action.object)
                self._tell(Got(action.object, self._halves[action.object].place, want.ref))
            else:
                want = self._wants[action.object]
                self._drop(action.object)
                self._tell(NotGot(action.object, action.reason, action.full, want.ref))

    def _send(self, node: bytes, message: pm.PeerMessage) -> None:
        if self._streams is not None:
            self._streams.send(node, pm.encode(message))

    def _gone(self, node: bytes, reason: str, now: float) -> list[p.Action]:
        if self._streams is not None:
            self._streams.hang_up(node)
        self._asked.discard(node)
        self._again_at.pop(node, None)
        self._pauses.pop(node, None)
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
