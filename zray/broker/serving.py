"""Giving values to other nodes, piece by piece: whose piece is next, and who should rather ask another node.

Covers the order in which what was asked for is sent, how much of it may be on its way to one receiver, and the tree in which a value spreads when
many nodes want it. Does not cover the receiver's side (`pull`), bytes or sockets (`object_exchange`).

`Serving` is a queue for each receiver, served in turn, so that one that asks for much delays nobody; receivers ask for a window at a time, and what
is queued for one beyond `MOST_QUEUED` is dropped: it will be asked for again. Pieces that this node is itself waiting for are set aside
until they are there, so values pass through nodes that have only begun to get them.

`Branches` is kept by a node for the values it is asked for by many. A node that sends a value to k others at a time takes k times as long; one that
gets it through a chain of d nodes has its last piece d pieces' time later. So with n pieces a newcomer, who can ask any node that was told of here
before, is sent to where the estimate

    delay(source) + HOP + n * (receivers of the source)          in pieces' time; delay is 0 where the value is whole

is least (among equals it is who was named least often): that makes a chain, as long as n allows, and where it would get too long, a tree.
"""

from __future__ import annotations

import collections
from typing import Final, NamedTuple

MOST_QUEUED: Final = 256
"""Pieces that wait for one receiver."""
MOST_UNDER_WAY: Final = 16 << 20
"""Bytes given to ZeroMQ for one receiver that it has not sent yet."""
HOP: Final = 4
"""Pieces' time that a value is behind at each node it passes through: asking, checking, waiting for a turn."""


class Request(NamedTuple):
    """A piece that somebody asked for."""

    object: bytes
    version: int
    piece_bytes: int
    piece: int


class Serving:
    """What other nodes have asked this one for, and have not got."""

    def __init__(self) -> None:
        self._queues: dict[bytes, collections.deque[Request]] = {}
        """By receiver, the one whose turn is next first; never empty."""
        self._aside: dict[bytes, dict[tuple[bytes, Request], None]] = {}
        """(receiver, request) that wait for a piece to come here, by object."""
        self._under_way: dict[bytes, int] = {}
        """Bytes by receiver; never 0."""
        self.dropped = 0

    def ask(self, node: bytes, requests: list[Request]) -> None:
        """A node asks for pieces; what it has asked for already counts once."""
        queue = self._queues.setdefault(node, collections.deque())
        for request in requests:
            if request in queue or (node, request) in self._aside.get(request.object, ()):
                continue
            if len(queue) >= MOST_QUEUED:
                self.dropped += 1
                continue
            queue.append(request)
        if not queue:
            del self._queues[node]

    def next(self) -> tuple[bytes, Request] | None:
        """Return whose turn it is and what to send (it is taken out), or None when nobody waits who could be sent more."""
        for node, queue in self._queues.items():
            if self._under_way.get(node, 0) < MOST_UNDER_WAY:
                request = queue.popleft()
                del self._queues[node]
                if queue:
                    self._queues[node] = queue  # behind the others
                return node, request
        return None

    def has_next(self) -> bool:
        """Whether `next` would return something."""
        return any(self._under_way.get(node, 0) < MOST_UNDER_WAY for node in self._queues)

    def sent(self, node: bytes, size: int) -> None:
        """So many bytes were given to ZeroMQ for a receiver."""
        self._under_way[node] = self._under_way.get(node, 0) + size

    def left(self, node: bytes, size: int) -> None:
        """... and it has sent or dropped them."""
        rest = self._under_way.get(node, 0) - size
        if rest > 0:
            self._under_way[node] = rest
        else:
            self._under_way.pop(node, None)

    def set_aside(self, node: bytes, request: Request) -> None:
        """A piece that was next is not here yet."""
        self._aside.setdefault(request.object, {})[node, request] = None

    def look_again(self, object_: bytes) -> None:
        """Pieces of an object have come: what was set aside for it is next."""
        for node, request in reversed(self._aside.pop(object_, {})):
            self._queues.setdefault(node, collections.deque()).appendleft(request)

    def waiting(self) -> dict[bytes, dict[bytes, int]]:
        """Return object -> receiver -> version of what is set aside."""
        return {name: {node: request.version for node, request in kept} for name, kept in self._aside.items()}

    def forget(self, object_: bytes, node: bytes | None = None) -> list[tuple[bytes, int]]:
        """An object is not to be had here any more (or one node wants it no more): return (receiver, version) of who waited for it."""
        waited: dict[tuple[bytes, int], None] = {}
        for receiver, queue in list(self._queues.items()):
            gone = [r for r in queue if r.object == object_ and node in (None, receiver)]
            if gone:
                waited.update(((receiver, r.version), None) for r in gone)
                kept = collections.deque(r for r in queue if r not in gone)
                del self._queues[receiver]
                if kept:
                    self._queues[receiver] = kept
        aside = self._aside.get(object_, {})
        for receiver, request in [key for key in aside if node in (None, key[0])]:
            waited[receiver, request.version] = None
            del aside[receiver, request]
        if not aside:
            self._aside.pop(object_, None)
        return list(waited)

    def node_gone(self, node: bytes) -> None:
        """A receiver is dead, or its connection is gone: it will ask again if it can."""
        self._queues.pop(node, None)
        for object_, aside in list(self._aside.items()):
            for key in [key for key in aside if key[0] == node]:
                del aside[key]
            if not aside:
                del self._aside[object_]

    def objects(self) -> set[bytes]:
        """Objects that somebody waits for."""
        return {r.object for queue in self._queues.values() for r in queue} | self._aside.keys()

    def validate(self) -> None:
        """Check the books; AssertionError names what does not hold."""
        assert all(self._queues.values()), "an empty queue is kept"
        assert all(self._aside.values()), "nothing is set aside, and kept"
        assert all(size > 0 for size in self._under_way.values()), "nothing is under way, and counted"


class _Member:
    """A node that asked for a value."""

    __slots__ = ("delay", "source", "whole")

    def __init__(self, source: bytes, delay: int) -> None:
        self.source = source
        self.delay = delay
        self.whole = False


class Branches:
    """The trees in which the values of one node spread to those that ask it."""

    def __init__(self, own: bytes) -> None:
        self._own = own
        self._trees: dict[bytes, tuple[int, dict[bytes, _Member]]] = {}
        """By object: version, and who asked for it in that order."""

    def source_for(self, object_: bytes, version: int, pieces: int, node: bytes, avoid: list[bytes]) -> bytes:
        """Return whom a node that asks this one for a value should get it from: this node's own id, or another that is asked by nobody in `avoid`.

        Args:
            object_: the value.
            version: of it; another version's tree is forgotten.
            pieces: that it has.
            node: who asks.
            avoid: nodes that were no help to it.
        """
        known, members = self._trees.get(object_, (version, {}))
        if known != version:
            members = {}
        self._trees[object_] = version, members
        member = members.get(node)
        for other in avoid:
            if other in members and members[other].whole:
                del members[other]  # it has dropped its copy
        if member is not None and (
            member.source == self._own or (member.source in members and member.source not in avoid)
        ):
            return member.source
        load = collections.Counter(m.source for name, m in members.items() if not m.whole and name != node)
        # Among those that are as near, who was named least: they get it one after another as often as all at once.
        named = collections.Counter(m.source for name, m in members.items() if name != node)
        best, least = self._own, (HOP + pieces * load[self._own], named[self._own])
        for other, candidate in members.items():
            if other == node or other in avoid or self._is_behind(members, other, node):
                continue
            delay = (0 if candidate.whole else candidate.delay) + HOP + pieces * load[other]
            estimate = delay, named[other]
            if estimate < least:
                best, least = other, estimate
        members[node] = _Member(best, least[0])
        return best

    def _is_behind(self, members: dict[bytes, _Member], node: bytes, other: bytes) -> bool:
        """Whether a node gets the value, directly or not, from another: that one cannot get it from this."""
        seen = 0
        while node in members and not members[node].whole and seen <= len(members):
            node = members[node].source
            if node == other:
                return True
            seen += 1
        return False

    def took(self, object_: bytes, version: int, node: bytes, whole: bool) -> None:
        """A node that asked has the value now (whole), or wants it no more."""
        known, members = self._trees.get(object_, (version, {}))
        if known == version and node in members:
            if whole:
                members[node].whole = True
            else:
                del members[node]

    def node_gone(self, node: bytes) -> None:
        """A node is dead."""
        for _, members in self._trees.values():
            members.pop(node, None)

    def forget(self, object_: bytes) -> None:
        """A value is not here any more."""
        self._trees.pop(object_, None)

    def __len__(self) -> int:
        return len(self._trees)
