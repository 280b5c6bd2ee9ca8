"""Objects between nodes: lending, wanting, sending and receiving their values.

Covers what a broker does about objects that other nodes have or need. Does not cover counts (`lending`), how messages travel (`links`), or how
large values do (`transfer`).

An object that this node has only been lent is an entry of its store like any other: pending until the value has come. It is made with the flag
that has the store tell when its last reference goes. Values up to `INLINE_BYTES` travel in the message that tells of them; larger ones are got from
who has them, piece by piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from zray import _store, errors, failures
from zray.broker import peer_messages as pm
from zray.broker.lending import Lending
from zray.broker.transfer import Transfer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zray.broker.cluster import Cluster
    from zray.broker.server import Broker
    from zray.object_store import ObjectRef, Place

INLINE_BYTES: Final = 256 << 10


class _Incoming:
    """A value that is on its way here."""

    __slots__ = ("header", "lenders", "ref", "refs")

    def __init__(self, header: pm.Value, ref: ObjectRef, refs: list[ObjectRef]) -> None:
        self.header = header
        self.ref = ref
        self.refs = refs
        """What it refers to."""
        self.lenders: list[bytes] = []
        """Nodes that keep it for this one until it is here."""


class ObjectExchange:
    """One broker's dealings in objects with other nodes."""

    def __init__(self, broker: Broker, cluster: Cluster) -> None:
        self._broker = broker
        self._store = broker.store
        self._cluster = cluster
        self.lending = Lending()
        self._kept: dict[bytes, ObjectRef] = {}
        """References to what is lent."""
        self._wanted: dict[bytes, set[bytes]] = {}
        """Objects that are not there yet, and the nodes that want them."""
        self._incoming: dict[bytes, _Incoming] = {}
        self.transfer = Transfer(cluster.own, cluster.key, cluster.links, broker.objects, self)

    # -- lending ------------------------------------------------------------------------------------------------------

    def lend(self, node: bytes, refs: Iterable[ObjectRef]) -> list[bytes]:
        """A message to `node` is about to name these objects: keep them. Returns their ids."""
        by_id = {ref.binary(): ref for ref in refs}
        for name in self.lending.lend(node, list(by_id)):
            self._kept[name] = by_id[name]
        return list(by_id)

    def given_back(self, node: bytes, objects: list[bytes]) -> None:
        """A node needs these no more."""
        for name in self.lending.given_back(node, objects):
            self._kept.pop(name, None)
            self._wanted.pop(name, None)
            if name not in self.lending.borrowed:
                self.transfer.forget(name)

    def borrow(self, node: bytes, objects: Iterable[bytes]) -> list[ObjectRef]:
        """A message of `node` lends these: return references, and ask for the values that are not here."""
        refs, want, back = [], [], []
        for name in objects:
            ref = self._store.reference(name)
            if ref is None:
                ref = self._store.expect(name, 0, None, None, "", _store.FLAG_NOTIFY)
                self.lending.borrow(node, name)
                want.append(name)
            else:
                back.append(name)
            refs.append(ref)
        if want:
            self._cluster.send(node, pm.Want(want))
        if back:
            self._cluster.send(node, pm.GiveBack(back))
        return refs

    def unreferenced(self, name: bytes) -> bool:
        """The store tells that nothing refers to an object any more; False when it was not borrowed."""
        lender = self.lending.done_with(name)
        if lender is None:
            return False
        self._end_incoming(name)
        self.transfer.forget(name)
        self._cluster.send(lender, pm.GiveBack([name]))
        return True

    # -- sending ------------------------------------------------------------------------------------------------------

    def wanted(self, node: bytes, objects: list[bytes]) -> None:
        """A node wants these values, now or as soon as they are there."""
        for name in objects:
            ref = self._kept.get(name)
            if ref is None:
                self._cluster.send(node, pm.Lost(name, "it was not lent to that node"))
            elif self._store.done(ref):
                self._send(node, ref)
            else:
                self._wanted.setdefault(name, set()).add(node)
                if self._store.watch(name) is True:
                    self._broker.watched[name] = None
                else:
                    self.sealed([name])

    def sealed(self, objects: list[bytes]) -> None:
        """These are there now."""
        for name in objects:
            for node in sorted(self._wanted.pop(name, ())):
                ref = self._kept.get(name)
                if ref is not None:
                    self._send(node, ref)

    def _send(self, node: bytes, ref: ObjectRef) -> None:
        self._cluster.send(node, self.value(node, ref))

    def value(self, node: bytes, ref: ObjectRef) -> pm.Value | pm.Lost:
        """Make the message with a value for a node, or (a large one) that tells of it."""
        name = ref.binary()
        try:
            data = self._broker.objects.readable(ref)
            _, _, kind, flags, _ = self._store.describe(ref)
            contained = self.lend(node, self._store.contained(ref))
        except errors.ZrayError as error:
            return pm.Lost(name, str(error))
        flags &= _store.FLAG_SYSTEM_ERROR
        size = len(data)
        if size <= INLINE_BYTES:
            return pm.Value(name, kind, flags, size, bytes(data), contained)
        self.lend(node, [ref])  # until it has been got
        return pm.Value(name, kind, flags, size, None, contained, self.transfer.version_of(name))

    # -- receiving ----------------------------------------------------------------------------------------------------

    def received(self, node: bytes, message: pm.Value) -> None:
        """A value has come, or can be got from that node."""
        if message.data is not None:
            self._fill(node, message, message.data)
            return
        refs = self.borrow(node, message.contained)
        ref = self._store.reference(message.id)
        if ref is None or self._store.done(ref):
            self._cluster.send(node, pm.GiveBack([message.id]))
            return
        incoming = self._incoming.setdefault(message.id, _Incoming(message, ref, refs))
        incoming.lenders.append(node)
        self.transfer.pull(incoming.ref, message.version, message.size, len(message.contained), [node])

    def arrived(self, object_: bytes, place: Place) -> None:
        """The transfer has got a value: seal it."""
        found = self._end_incoming(object_)
        if found is None:
            return
        try:
            place.seal(found.header.kind, found.header.flags, found.refs)
        except errors.ZrayError as error:
            self._fail(object_, error)
        self._tell_of([object_])

    def not_arrived(self, object_: bytes, reason: str, full: bool) -> None:
        """The transfer cannot get a value."""
        if self._end_incoming(object_) is None:
            return
        if full:
            self._fail(
                object_, errors.ObjectStoreFullError(f"no room for a copy of a value from another node: {reason}")
            )
        else:
            self._fail(object_, errors.ObjectLostError.for_id(object_, reason))
        self._tell_of([object_])

    def _end_incoming(self, object_: bytes) -> _Incoming | None:
        """A value is not on its way any more: those that offered it need not keep it for this node."""
        found = self._incoming.pop(object_, None)
        if found is not None:
            for node in found.lenders:
                self._cluster.send(node, pm.GiveBack([object_]))
        return found

    def look_for_unwanted(self) -> None:
        """Give up what is on its way here and nobody waits for any more."""
        for name in self.transfer.unwanted():
            self._end_incoming(name)
            self.transfer.forget(name)
            self._fail(name, errors.ObjectLostError.for_id(name, "nobody here needed it any more"))

    def _fill(self, node: bytes, message: pm.Value, data: bytes) -> None:
        refs = self.borrow(node, message.contained)
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
            self._fail(message.id, error)
        self._tell_of([message.id])

    def lost(self, message: pm.Lost) -> None:
        """The lender has no value to send."""
        error = errors.ObjectLostError.for_id(message.id, message.reason)
        self._fail(message.id, error)
        self._tell_of([message.id])

    def _fail(self, name: bytes, error: Exception) -> None:
        ref = self._store.reference(name)
        if ref is not None:
            data = failures.dump(failures.from_error(error))
            self._broker.performer._force(ref, data, _store.KIND_ERROR_FLAG, _store.FLAG_SYSTEM_ERROR)

    def _tell_of(self, objects: list[bytes]) -> None:
        """Tasks here, and other nodes, may wait for these."""
        self._broker.objects_there(objects)

    def node_gone(self, node: bytes, reason: str) -> None:
        """A node is dead: what was lent to it is free, what it lent and had not sent is lost."""
        free, orphans = self.lending.node_gone(node)
        for name in free:
            self._kept.pop(name, None)
        for nodes in self._wanted.values():
            nodes.discard(node)
        self.transfer.node_gone(node, f"it is dead: {reason}")
        pending = []
        for name in orphans:
            ref = self._store.reference(name)
            # What is on its way may have other sources.
            if ref is not None and name not in self._incoming and not self._store.done(ref):
                self._fail(name, errors.ObjectLostError.for_id(name, f"the node that had it is dead: {reason}"))
                pending.append(name)
        if pending:
            self._tell_of(pending)

    def close(self) -> None:
        """End all transfers."""
        self._incoming.clear()
        self.transfer.close()
