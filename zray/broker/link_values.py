"""Large values between nodes of which the receiver cannot connect to the sender: over the ordinary link, in chunks.

Covers asking for such values, sending them at a pace that leaves room for other messages, and putting them together; all from the broker's loop. Does
not cover which values travel (`object_exchange`), those that travel over bulk connections (`transfer`, `bulk`), or how frames find
their way, through the head perhaps (`links`).

Links neither lose nor repeat messages, so that a value's chunks come once and in order. They stop with the sender's death (the receiver then
asks the next source) or when they are not wanted any more (the receiver says so).
"""

from __future__ import annotations

import collections
import time
from typing import TYPE_CHECKING, NamedTuple

from zray import errors
from zray.broker import peer_messages as pm
from zray.broker.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zray.broker.links import Links
    from zray.broker.transfer import Receiver
    from zray.object_store import ObjectRef, ObjectStore, Place


class _Fetch:
    """A value on its way here."""

    __slots__ = ("contained", "filled", "place", "ref", "size", "sources", "version")

    def __init__(self, ref: ObjectRef, version: int, size: int, contained: int, sources: list[bytes]) -> None:
        self.ref = ref
        self.version = version
        self.size = size
        self.contained = contained
        self.sources = sources
        """Who is to be asked; the first one has been."""
        self.place: Place | None = None
        self.filled = 0


class _Outgoing(NamedTuple):
    """A value on its way to another node."""

    node: bytes
    object: bytes
    version: int
    view: memoryview
    sent: int


class LinkValues:
    """One broker's values that travel over ordinary links."""

    def __init__(
        self,
        links: Links,
        objects: ObjectStore,
        receiver: Receiver,
        offer: Callable[[bytes, int], memoryview | None],
    ) -> None:
        """
        Args:
            links: the links.
            objects: where values are written.
            receiver: told of the end of each.
            offer: returns a view of a version of a value, None when it is not here.
        """
        self._links = links
        self._objects = objects
        self._receiver = receiver
        self._offer = offer
        self._fetches: dict[bytes, _Fetch] = {}
        self._outgoing: collections.deque[_Outgoing] = collections.deque()
        self._paces: dict[bytes, Pace] = {}

    def _send(self, node: bytes, message: pm.PeerMessage) -> None:
        self._links.send(node, message, time.monotonic())

    # -- getting ---------------------------------------------------------------------------------------------------------

    def pull(self, ref: ObjectRef, version: int, size: int, contained: int, sources: Iterable[bytes]) -> None:
        """Get the value of a pending object, as `Transfer.pull`; its end is told by the receiver's callbacks, perhaps at once."""
        name = ref.binary()
        found = self._fetches.get(name)
        if found is not None:
            found.sources += [node for node in sources if node not in found.sources and version == found.version]
            return
        self._fetches[name] = _Fetch(ref, version, size, contained, list(sources))
        self._ask(name, self._fetches[name])

    def fetching(self, object_: bytes) -> bool:
        """Whether a value is on its way here over a link."""
        return object_ in self._fetches

    def _ask(self, name: bytes, fetch: _Fetch) -> None:
        """Ask the first source for the whole of it."""
        try:
            fetch.place = self._objects.place(fetch.ref, fetch.size, fetch.contained)
            reason, full = "it has a value already", False
        except errors.ZrayError as error:
            fetch.place, reason, full = None, str(error), True
        fetch.filled = 0
        if fetch.place is None:
            del self._fetches[name]
            self._receiver.not_arrived(name, reason, full)
        else:
            self._send(fetch.sources[0], pm.Fetch(name, fetch.version))

    def chunk(self, node: bytes, message: pm.Chunk) -> None:
        """The next piece of a value."""
        name, data = message.id, memoryview(message.data)
        fetch = self._fetches.get(name)
        if fetch is None or fetch.place is None or node != fetch.sources[0] or message.version != fetch.version:
            return  # it was asked for, and is not wanted any more
        if message.offset != fetch.filled or fetch.filled + len(data) > fetch.size:
            self._next_source(name, fetch, "its bytes were not those of the value")
            return
        fetch.place.part(fetch.filled, len(data))[:] = data
        fetch.filled += len(data)
        if fetch.filled == fetch.size:
            del self._fetches[name]
            self._receiver.arrived(name, fetch.place)

    def not_fetched(self, node: bytes, message: pm.NotFetched) -> None:
        """A source has not that version of a value."""
        fetch = self._fetches.get(message.id)
        if fetch is not None and node == fetch.sources[0] and message.version == fetch.version:
            self._next_source(message.id, fetch, message.reason)

    def _next_source(self, name: bytes, fetch: _Fetch, reason: str) -> None:
        fetch.sources.pop(0)
        fetch.place = None
        if fetch.sources:
            self._ask(name, fetch)
        else:
            del self._fetches[name]
            self._receiver.not_arrived(name, reason, False)

    # -- giving ----------------------------------------------------------------------------------------------------------

    def asked(self, node: bytes, message: pm.Fetch) -> None:
        """A node that cannot connect to this one asks for a value."""
        view = self._offer(message.id, message.version)
        if view is None:
            self._send(node, pm.NotFetched(message.id, message.version, "it has not that version of it"))
            return
        self._outgoing.append(_Outgoing(node, message.id, message.version, view, 0))
        self.pump()

    def unwanted(self, node: bytes, message: pm.Unfetch) -> None:
        """A node needs no more of a value."""
        self._outgoing = collections.deque(
            item
            for item in self._outgoing
            if (item.node, item.object, item.version) != (node, message.id, message.version)
        )

    def pump(self) -> None:
        """Send chunks as far as receivers keep up; values for one node take turns."""
        for _ in range(len(self._outgoing)):
            item = self._outgoing.popleft()
            while item.sent < len(item.view) and self._may_send(item.node):
                item = self._send_chunk(item)
            if item.sent < len(item.view):
                self._outgoing.append(item)

    def _may_send(self, node: bytes) -> bool:
        pace = self._paces.setdefault(node, Pace())
        return pace.may_send(self._links.unacked_bytes(node), time.monotonic())

    def _send_chunk(self, item: _Outgoing) -> _Outgoing:
        pace = self._paces[item.node]
        data = bytes(item.view[item.sent : item.sent + pace.chunk])
        self._send(item.node, pm.Chunk(item.object, item.version, item.sent, data))
        pace.sent(len(data), time.monotonic())
        return item._replace(sent=item.sent + len(data))

    # -- ends ------------------------------------------------------------------------------------------------------------

    def forget(self, object_: bytes) -> None:
        """A value is not wanted here any more: nobody is told but its source."""
        fetch = self._fetches.pop(object_, None)
        if fetch is not None:
            self._send(fetch.sources[0], pm.Unfetch(object_, fetch.version))

    def not_here(self, object_: bytes, reason: str) -> None:
        """A value is not here any more."""
        gone = [item for item in self._outgoing if item.object == object_]
        for item in gone:
            self._outgoing.remove(item)
            self._send(item.node, pm.NotFetched(object_, item.version, reason))

    def node_gone(self, node: bytes, reason: str) -> None:
        """A node is dead."""
        self._outgoing = collections.deque(item for item in self._outgoing if item.node != node)
        self._paces.pop(node, None)
        for name, fetch in list(self._fetches.items()):
            if fetch.sources[0] == node:
                self._next_source(name, fetch, reason)
            elif node in fetch.sources:
                fetch.sources.remove(node)

    def close(self) -> None:
        """Drop everything."""
        self._outgoing.clear()
        self._fetches.clear()
