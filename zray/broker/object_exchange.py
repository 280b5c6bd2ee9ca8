"""Values between nodes: sending and receiving them.

Covers how a value gets from the store of one node into that of another. Does not cover which values are wanted, who has them, and what becomes of
lost ones (`object_sharing`), how messages travel (`links`), or how large values do (`transfer`).

Who wants a value asks one of its holders (`GetValues`), which answers with a `Value`. Values up to `INLINE_BYTES` travel in that message; it tells of larger
ones, which are then got piece by piece from whoever has that version of them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from zray import _store, errors
from zray.broker import peer_messages as pm
from zray.broker.transfer import Transfer
from zray.node_port import VALUES, socket_behind_door

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zray.broker.cluster import Cluster
    from zray.broker.object_sharing import ObjectSharing
    from zray.broker.server import Broker
    from zray.object_store import ObjectRef, Place

INLINE_BYTES: Final = 256 << 10


class _Incoming:
    """A large value that is on its way here."""

    __slots__ = ("header", "ref", "refs")

    def __init__(self, header: pm.Value, ref: ObjectRef, refs: list[ObjectRef]) -> None:
        self.header = header
        self.ref = ref
        self.refs = refs
        """What it refers to."""


class ObjectExchange:
    """One broker's dealings in values with other nodes."""

    def __init__(self, broker: Broker, cluster: Cluster, sharing: ObjectSharing) -> None:
        self._broker = broker
        self._store = broker.store
        self._cluster = cluster
        self._sharing = sharing
        self._pulling: dict[bytes, list[bytes]] = {}
        """Objects that are on their way here, and the nodes that have them, the one that was asked first."""
        self._incoming: dict[bytes, _Incoming] = {}
        """Those of them that are got piece by piece."""
        path = "" if cluster.is_outside else os.path.join(broker.config.directory, socket_behind_door(VALUES))
        self.transfer = Transfer(cluster.own, cluster.links, broker.objects, self, broker.poller.add, path)

    # -- sending ------------------------------------------------------------------------------------------------------

    def size(self, ref: ObjectRef) -> int:
        """The bytes of a finished object's value; 0 when it cannot be read."""
        _, _, _, flags, size = self._store.describe(ref)
        if not flags & _store.FLAG_FILE:
            return size
        try:
            return len(self._broker.objects.readable(ref))
        except (errors.ZrayError, OSError):
            return 0

    def tiny(self, ref: ObjectRef) -> pm.Value | None:
        """Make the message with a value that lies in its entry in the store: no other refers to objects or needs looking for. None: see `value`."""
        found = self._store.read_inline(ref)
        if found is None or found[1] & _store.FLAG_FILE:
            return None
        kind, flags, data = found
        return pm.Value(ref.binary(), kind, flags & _store.FLAG_SYSTEM_ERROR, len(data), data, [])

    def value(self, node: bytes, ref: ObjectRef) -> pm.Value | pm.Lost:
        """Make the message with a value for a node, or (a large one) that tells of it."""
        name = ref.binary()
        try:
            data = self._broker.objects.readable(ref)
            _, _, kind, flags, _ = self._store.describe(ref)
            contained = self._sharing.lend(node, self._store.contained(ref))
        except (errors.ZrayError, OSError) as error:
            return pm.Lost(name, str(error))
        flags &= _store.FLAG_SYSTEM_ERROR
        size = len(data)
        if size <= INLINE_BYTES:
            return pm.Value(name, kind, flags, size, bytes(data), contained)
        return pm.Value(name, kind, flags, size, None, contained, self.transfer.version_of(name))

    # -- receiving ----------------------------------------------------------------------------------------------------

    def pull(self, name: bytes, sources: Sequence[bytes], size: int) -> None:
        """Get a value of `size` bytes from nodes that have it. `ObjectSharing.arrived`, `not_brought` or `no_room` tells how it ends."""
        if name not in self._pulling:
            self._pulling[name] = list(sources)
            self._cluster.send(sources[0], pm.GetValues([name]))

    def forget(self, name: bytes) -> None:
        """Nobody here wants a value any more, or it is not here any more."""
        self._pulling.pop(name, None)
        self._incoming.pop(name, None)
        self.transfer.forget(name)

    def received(self, node: bytes, message: pm.Value) -> None:
        """A value has come, or can be got."""
        name = message.id
        if message.data is not None:
            self._fill(node, message, message.data)
            return
        ref = self._store.reference(name)
        asked = self._pulling.get(name)
        if ref is None or not asked or asked[0] != node or name in self._incoming:
            if message.contained:
                self._cluster.send(node, pm.GiveBack(message.contained))
            return
        self._incoming[name] = _Incoming(message, ref, self._sharing.borrow(node, message.contained))
        self.transfer.pull(ref, message.version, message.size, len(message.contained), asked)

    def arrived(self, object_: bytes, place: Place) -> None:
        """The transfer has got a value: seal it."""
        self._pulling.pop(object_, None)
        found = self._incoming.pop(object_, None)
        if found is None:
            return
        try:
            place.seal(found.header.kind, found.header.flags, found.refs)
        except errors.ZrayError as error:
            self._sharing.no_room(object_, error)
        else:
            self._sharing.arrived(object_)

    def not_arrived(self, object_: bytes, reason: str, full: bool) -> None:
        """The transfer cannot get a value."""
        sources = self._pulling.pop(object_, [])
        found = self._incoming.pop(object_, None)
        if found is None:
            return
        if full:
            error = errors.ObjectStoreFullError(f"no room for a copy of a value from another node: {reason}")
            self._sharing.no_room(object_, error)
        else:
            self._store.retry(found.ref, 0)  # pending again, not being filled
            self._sharing.not_brought(object_, sources, reason)

    def give_up_unwanted(self) -> list[bytes]:
        """Give up what is on its way here and nothing refers to any more; return these objects, which are pending as before."""
        unwanted = [name for name in self.transfer.unwanted() if name in self._incoming]
        for name in unwanted:
            ref = self._incoming[name].ref
            self.forget(name)
            self._store.retry(ref, 0)
        return unwanted

    def no_copy(self, node: bytes, message: pm.NoCopy) -> None:
        """A node that was asked for a value has it not."""
        asked = self._pulling.get(message.id)
        if asked and asked[0] == node and message.id not in self._incoming:
            self.forget(message.id)
            self._sharing.not_brought(message.id, [node], message.reason)

    def _fill(self, node: bytes, message: pm.Value, data: bytes) -> None:
        self._pulling.pop(message.id, None)
        refs = self._sharing.borrow(node, message.contained)
        ref = self._store.reference(message.id)
        if ref is None:
            return
        try:
            while True:
                try:
                    self._store.seal_copy(ref, data, message.kind, message.flags, refs)
                    break
                except _store.StoreFull as full:
                    if not self._broker.objects.make_room(full.size):
                        raise errors.ObjectStoreFullError(f"no room for a copy of {len(data)} bytes") from None
        except errors.ZrayError as error:
            self._sharing.no_room(message.id, error)
        else:
            self._sharing.arrived(message.id)

    def node_gone(self, node: bytes, reason: str) -> None:
        """A node is dead. What is being got from it comes from its other sources, or the transfer will say that it does not come."""
        reason = f"node {node.hex()[:8]}, which sent it, is dead: {reason}"
        self.transfer.node_gone(node, reason)
        for name in [name for name, asked in self._pulling.items() if asked[0] == node and name not in self._incoming]:
            self.forget(name)
            self._sharing.not_brought(name, [node], reason)

    def close(self) -> None:
        """End all transfers."""
        self._pulling.clear()
        self._incoming.clear()
        self.transfer.close()
