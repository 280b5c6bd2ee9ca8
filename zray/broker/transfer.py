"""Values between this node and others: got by `bulk`'s thread, given from the loop, straight out of and into the store.

Covers the seam to who decides what travels (`object_exchange`): `version_of`, `pull`, `forget`, and two callbacks; and sending what other nodes
ask for. Values from a node that this one cannot connect to, because it or this one is a client, come over the ordinary link
(`link_values`). Does not cover which values are wanted, announcing them, sealing, or what becomes of lost ones.

A piece is sent from where it lies (the store, a mapped file, or a value that is itself still coming): `giver` reads it there when it encrypts, and
a pin keeps it in place until then.
"""

from __future__ import annotations

import collections
import secrets
import time
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from zray import errors
from zray.broker import peer_messages as pm
from zray.broker.bulk import Bulk, Got, NotGot, WantsStream
from zray.broker.giver import Giver
from zray.broker.link_values import LinkValues
from zray.broker.pull import NEVER, piece_size
from zray.broker.serving import Branches, Request, Serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zray.broker.links import Links
    from zray.object_store import ObjectRef, ObjectStore, Place

PIECES_A_TURN: Final = 8
"""Pieces that are sent before other messages have their turn: about half a millisecond."""
_TICK_S: Final = 1.0


class Receiver(Protocol):
    """Who decides what travels: told of the end of each pull."""

    def arrived(self, object_: bytes, place: Place) -> None:
        """The value of an object is whole: seal it."""

    def not_arrived(self, object_: bytes, reason: str, full: bool) -> None:
        """It cannot be had: there is no room for it (full), or no source has it any more."""


class _Offer(NamedTuple):
    """A value that others ask for."""

    version: int
    view: memoryview
    there: bytearray | None
    """1 for each piece that is here; None: all are."""


class _Beyond(NamedTuple):
    """Sources of a value that this node cannot connect to, in case the others fail."""

    version: int
    size: int
    contained: int
    sources: list[bytes]


class _Token:
    """Tells when `giver` lets go of a piece."""

    __slots__ = ("_left", "_node", "_size")

    def __init__(self, left: collections.deque[tuple[bytes, int]], node: bytes, size: int) -> None:
        self._left = left
        self._node = node
        self._size = size

    def __del__(self) -> None:
        self._left.append((self._node, self._size))


class _Ends:
    """Tells a `Transfer` of the values that came over links."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer

    def arrived(self, object_: bytes, place: Place) -> None:
        self._transfer._got(object_, place)
        self._transfer.serving.look_again(object_)

    def not_arrived(self, object_: bytes, reason: str, full: bool) -> None:
        self._transfer._not_got(object_, reason, full)


class Transfer:
    """One broker's values on their way to and from other nodes."""

    def __init__(
        self,
        own: bytes,
        links: Links,
        objects: ObjectStore,
        receiver: Receiver,
        watch: Callable[[int], object],
        path: str,
    ) -> None:
        """
        Args:
            own: id of this node.
            links: to others.
            objects: where values are, and come.
            receiver: told of the ends of pulls.
            watch: called with the descriptors that become readable when `take_in` is worth calling.
            path: of the socket where the door hands over connections of those who want values; empty: there is no door.
        """
        self._own = own
        self._links = links
        self._objects = objects
        self._store = objects.store
        self._receiver = receiver
        self.bulk = Bulk(own, objects, links.address_of)
        self.giver = Giver(path) if path else None
        self.descriptors = {self.bulk.fileno()}
        if self.giver is not None:
            self.descriptors.add(self.giver.fileno())
        for descriptor in self.descriptors:
            watch(descriptor)
        self.serving = Serving()
        self.branches = Branches(own)
        self._versions: dict[bytes, int] = {}
        """Of values here that others were told of, or that came from others."""
        self._pulling: dict[bytes, tuple[ObjectRef, int]] = {}
        """Reference and version of what is on its way here."""
        self._beyond: dict[bytes, _Beyond] = {}
        self.by_link = LinkValues(links, objects, _Ends(self), self._whole)
        self._offers: dict[bytes, _Offer] = {}
        """Of values that somebody waits for."""
        self._left: collections.deque[tuple[bytes, int]] = collections.deque()
        """(node, bytes) of pieces that `giver` has let go of; appended to by its thread."""
        self._next_tick = 0.0
        self.sent_bytes = 0

    # -- the seam --------------------------------------------------------------------------------------------------------

    def version_of(self, object_: bytes) -> int:
        """Return the number that stands for the bytes of a value that is here, in what other nodes are told of it."""
        version = self._versions.get(object_)
        if version is None:
            version = self._versions[object_] = secrets.randbits(62) + 1
        return version

    def pull(self, ref: ObjectRef, version: int, size: int, contained: int, sources: Iterable[bytes]) -> None:
        """Get the value of a pending object. Called again while it is under way, this adds sources of the same version.

        Args:
            ref: the object.
            version: as its source calls it (`version_of`).
            size: in bytes.
            contained: how many objects it refers to.
            sources: nodes that have it; they may know of others.
        """
        name, nodes = ref.binary(), list(sources)
        near = [node for node in nodes if self._links.can_dial(node)]
        beyond = [node for node in nodes if node not in near]
        by_bulk = bool(near) if name not in self._pulling else not self.by_link.fetching(name)
        self._pulling.setdefault(name, (ref, version))
        if not by_bulk:
            self.by_link.pull(ref, version, size, contained, nodes)
            return
        if near:
            self.bulk.pull(ref, version, size, contained, near)
        if beyond:
            self._beyond[name] = _Beyond(version, size, contained, [*self._beyond_of(name, version), *beyond])

    def _beyond_of(self, name: bytes, version: int) -> list[bytes]:
        found = self._beyond.get(name)
        return found.sources if found is not None and found.version == version else []

    def pulling(self, object_: bytes) -> bool:
        """Whether a value is on its way here."""
        return object_ in self._pulling

    def is_moving(self) -> bool:
        """Whether values are on their way here, or others have asked for values from here a moment ago."""
        return bool(self._pulling or self._offers)

    def unwanted(self) -> list[bytes]:
        """Return the objects that are on their way here and that nothing but this refers to any more."""
        return [name for name, (ref, _) in self._pulling.items() if self._store.references(ref) <= 1]

    def forget(self, object_: bytes) -> None:
        """A value is not here any more, or not wanted: nothing more of it is got or given, and nobody is told."""
        if self._pulling.pop(object_, None) is not None:
            self._forget_pull(object_)
        self._versions.pop(object_, None)
        self.branches.forget(object_)
        self._not_here(object_, "it is not needed there any more")

    def _forget_pull(self, object_: bytes) -> None:
        self._beyond.pop(object_, None)
        if self.by_link.fetching(object_):
            self.by_link.forget(object_)
        else:
            self.bulk.forget(object_)

    def node_gone(self, node: bytes, reason: str) -> None:
        """A node is dead."""
        self.serving.node_gone(node)
        self.branches.node_gone(node)
        self.bulk.node_gone(node, reason)
        if self.giver is not None:
            self.giver.node_gone(node)
        self.by_link.node_gone(node, reason)

    # -- getting ---------------------------------------------------------------------------------------------------------

    def take_in(self) -> None:
        """Tell of what has come, and of what cannot be had; and see to what others ask for."""
        for outcome in self.bulk.outcomes():
            if isinstance(outcome, WantsStream):
                self._links.send(outcome.node, pm.AskStream(), time.monotonic())
            elif isinstance(outcome, Got):
                self._got_by_bulk(outcome)
            elif isinstance(outcome, NotGot):
                self._try_beyond(outcome.object, outcome)
            else:
                self.serving.look_again(outcome.object)
        if self.giver is not None:
            for node, frame in self.giver.came():
                self._asked_by(node, frame)
        self.pump()

    def stream_is(self, node: bytes, message: pm.StreamIs) -> None:
        """A node that has values has answered to `AskStream`."""
        self.bulk.stream(node, message.ticket, message.secret)

    def _try_beyond(self, name: bytes, outcome: NotGot) -> None:
        """No node that this one can connect to has a value (any more): others may."""
        found = self._pulling.get(name)
        if found is None or found[0] is not outcome.ref:
            return
        beyond = self._beyond.pop(name, None)
        if outcome.full or beyond is None:
            self._not_got(name, outcome.reason, outcome.full)
        else:
            self.by_link.pull(found[0], beyond.version, beyond.size, beyond.contained, beyond.sources)

    def _not_got(self, name: bytes, reason: str, full: bool) -> None:
        if self._pulling.pop(name, None) is not None:
            self._not_here(name, reason)
            self._receiver.not_arrived(name, reason, full)

    def _got_by_bulk(self, outcome: Got) -> None:
        name, place = outcome.object, outcome.place
        found = self._pulling.get(name)
        # Else it was forgotten as it came, and perhaps asked for again.
        if found is not None and found[0] is outcome.ref:
            self._got(name, place)
        self.bulk.sealed(name, place)
        self.serving.look_again(name)

    def _got(self, name: bytes, place: Place) -> None:
        found = self._pulling.pop(name, None)
        self._beyond.pop(name, None)
        if found is not None:
            self._versions[name] = found[1]
            self._receiver.arrived(name, place)

    # -- giving ----------------------------------------------------------------------------------------------------------

    def stream_wanted(self, node: bytes) -> None:
        """A node wants to come for values."""
        try:
            ticket, secret = (0, b"") if self.giver is None else self.giver.expect(node)
        except OSError:
            return  # it asks again when it has waited long enough
        self._links.send(node, pm.StreamIs(ticket, secret), time.monotonic())

    def _asked_by(self, node: bytes, frame: bytes) -> None:
        try:
            message = pm.decode(frame)
        except pm.PeerFrameError:
            return
        if isinstance(message, pm.Ask):
            self.asked(node, message)
        elif isinstance(message, pm.Took):
            self.took(node, message)

    def _answer(
        self, node: bytes, message: pm.PeerMessage, data: memoryview | None = None, token: object = None
    ) -> bool:
        return self.giver is not None and self.giver.send(node, pm.encode(message), data, token)

    def asked(self, node: bytes, message: pm.Ask) -> None:
        """A node asks for pieces of a value."""
        name = message.id
        offer = self._offer(name, message.version)
        if offer is None or message.piece_bytes != piece_size(len(offer.view)):
            self._answer(node, pm.NotHere(name, message.version, "it has not that version of it"))
            return
        count = -(-len(offer.view) // message.piece_bytes)
        if offer.there is None and not self._links.is_client(node):  # a client can get it from here only
            # A value that is itself still coming is given to whoever was sent here: who sent them has weighed that.
            source = self.branches.source_for(name, message.version, count, node, message.avoid)
            address = self._links.address_of(source) if source != self._own else None
            if address:
                self._answer(node, pm.Elsewhere(name, message.version, source, address))
                return
        pieces = [index for index in message.pieces if 0 <= index < count]
        self.serving.ask(node, [Request(name, message.version, message.piece_bytes, index) for index in pieces])
        self.pump()

    def took(self, node: bytes, message: pm.Took) -> None:
        """A node that asked for a value needs no more of it."""
        if not self._links.is_client(node):  # from a client nobody can get it
            self.branches.took(message.id, message.version, node, message.whole)
        self.serving.forget(message.id, node)

    def pump(self) -> None:
        """Send a few pieces."""
        while self._left:
            self.serving.left(*self._left.popleft())
        for _ in range(PIECES_A_TURN):
            found = self.serving.next()
            if found is None:
                return
            self._send(*found)

    def _send(self, node: bytes, request: Request) -> None:
        name, version, piece_bytes, index = request
        offer = self._offer(name, version)
        if offer is None:
            self._answer(node, pm.NotHere(name, version, "it has it no more"))
            return
        if offer.there is not None and not offer.there[index]:
            self.bulk.watch(name)
            if not offer.there[index]:  # it may have come just before that
                self.serving.set_aside(node, request)
                return
        piece = offer.view[index * piece_bytes : (index + 1) * piece_bytes]
        message = pm.Piece(name, version, index)
        token = _Token(self._left, node, len(piece))
        self.serving.sent(node, len(piece))
        self.sent_bytes += len(piece)
        if not self._answer(node, message, piece, token):
            self.serving.node_gone(node)

    def _offer(self, name: bytes, version: int) -> _Offer | None:
        """What there is here of a version of a value."""
        found = self._offers.get(name)
        if found is None:
            found = self._find(name)
            if found is None:
                return None
            self._offers[name] = found
        return found if found.version == version else None

    def _whole(self, name: bytes, version: int) -> memoryview | None:
        """A version of a value, if all of it is here."""
        found = self._find(name)
        return found.view if found is not None and found.version == version and found.there is None else None

    def _find(self, name: bytes) -> _Offer | None:
        half = self.bulk.half(name)
        if half is not None:
            return _Offer(half.version, half.place.view(), half.there)
        version, ref = self._versions.get(name), self._store.reference(name)
        if version is None or ref is None or not self._store.done(ref):
            return None
        try:
            return _Offer(version, memoryview(self._objects.readable(ref)), None)
        except errors.ZrayError:
            return None

    def _not_here(self, name: bytes, reason: str) -> None:
        self._offers.pop(name, None)
        self.by_link.not_here(name, reason)
        for node, version in self.serving.forget(name):
            self._answer(node, pm.NotHere(name, version, reason))

    # -- time ------------------------------------------------------------------------------------------------------------

    @property
    def wake_at(self) -> float:
        """When `tick` is wanted at the latest: at once while pieces wait for their turn."""
        if self.serving.has_next():
            return 0.0
        return self._next_tick if self._offers else NEVER

    def tick(self, now: float) -> None:
        """Send more, let go of what nobody asks for, and tell who waits that this node waits, too."""
        self.pump()
        if now < self._next_tick:
            return
        self._next_tick = now + _TICK_S
        asked = self.serving.objects()
        for name in [name for name in self._offers if name not in asked]:
            del self._offers[name]
        for name, receivers in self.serving.waiting().items():
            for node, version in receivers.items():
                self._answer(node, pm.NotYet(name, version))

    def close(self) -> None:
        """End all transfers."""
        self.bulk.close()
        if self.giver is not None:
            self.giver.close()
        self._beyond.clear()
        self.by_link.close()
        self._offers.clear()
        self._pulling.clear()
