"""Objects between nodes: lending, wanting, sending and receiving their values.

Covers what a broker does about objects that other nodes have or need. Does not cover counts (`lending`) or how messages travel (`links`).

An object that this node has only been lent is an entry of its store like any other: pending until the value has come. It is made with the flag
that has the store tell when its last reference goes. Values up to `INLINE_BYTES` travel in one message, larger ones in chunks, as fast as the
receiver acknowledges them.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Final

from zray import _store, errors, failures
from zray.broker import peer_messages as pm
from zray.broker.lending import Lending

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zray.broker.cluster import Cluster
    from zray.broker.server import Broker
    from zray.object_store import ObjectRef

INLINE_BYTES: Final = 256 << 10
CHUNK_BYTES: Final = 1 << 20
AHEAD_BYTES: Final = 8 << 20
"""Bytes that a node may be behind in acknowledging before chunks for it wait."""


class _Incoming:
    """A value that comes in chunks."""

    __slots__ = ("data", "filled", "header", "node")

    def __init__(self, node: bytes, header: pm.Value) -> None:
        self.node = node
        self.header = header
        self.data = bytearray(header.size)
        self.filled = 0


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
        self._outgoing: collections.deque[tuple[bytes, bytes, memoryview | bytes, int]] = collections.deque()
        """(node, object, bytes, how many have left): values that leave in chunks."""

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
        """Make the message with a value for a node; a large one follows in chunks by itself."""
        name = ref.binary()
        try:
            data = self._broker.objects.raw(ref)
            _, _, kind, flags, _ = self._store.describe(ref)
            contained = self.lend(node, self._store.contained(ref))
        except errors.ZrayError as error:
            return pm.Lost(name, str(error))
        flags &= _store.FLAG_SYSTEM_ERROR
        size = len(data)
        if size <= INLINE_BYTES:
            return pm.Value(name, kind, flags, size, bytes(data), contained)
        self._outgoing.append((node, name, data, 0))
        return pm.Value(name, kind, flags, size, None, contained)

    def pump(self) -> None:
        """Send chunks as far as their receivers keep up."""
        for _ in range(len(self._outgoing)):
            node, name, data, sent = self._outgoing.popleft()
            while sent < len(data) and self._cluster.links.unacked_bytes(node) < AHEAD_BYTES:
                self._cluster.send(node, pm.Chunk(name, bytes(data[sent : sent + CHUNK_BYTES])))
                sent += CHUNK_BYTES
            if sent < len(data):
                self._outgoing.append((node, name, data, sent))

    # -- receiving ----------------------------------------------------------------------------------------------------

    def received(self, node: bytes, message: pm.Value) -> None:
        """A value has come, or begins to."""
        if message.data is None:
            self._incoming[message.id] = _Incoming(node, message)
        else:
            self._fill(node, message, message.data)

    def chunk(self, message: pm.Chunk) -> None:
        """The next piece of a value."""
        found = self._incoming.get(message.id)
        if found is None:
            return
        end = found.filled + len(message.data)
        if end > found.header.size:
            return
        found.data[found.filled : end] = message.data
        found.filled = end
        if end == found.header.size:
            del self._incoming[message.id]
            self._fill(found.node, found.header, found.data)

    def _fill(self, node: bytes, message: pm.Value, data: bytes | bytearray) -> None:
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
        self._outgoing = collections.deque(item for item in self._outgoing if item[0] != node)
        for name in [name for name, item in self._incoming.items() if item.node == node]:
            del self._incoming[name]
        pending = []
        for name in orphans:
            ref = self._store.reference(name)
            if ref is not None and not self._store.done(ref):
                self._fail(name, errors.ObjectLostError.for_id(name, f"the node that had it is dead: {reason}"))
                pending.append(name)
        if pending:
            self._tell_of(pending)

    def busy(self) -> bool:
        """Whether chunks wait to leave."""
        return bool(self._outgoing)
