"""Frames that reach their receiver through the head: who takes that way, and how much may wait there.

Covers the decision which node a frame is handed to, and the head's bound on what waits for a slow receiver. Does not cover frames
(`peer_messages`), sockets (`links`), or numbering: that is between the two ends; what is dropped on the way is sent again by its sender.

A *client* is a node outside the cluster: it has no address, and reaches the head only (through one tunnelled port, perhaps). So

    hop(node) == node     to and from the head; between nodes that have addresses
    hop(node) == head     from a client to any other node; from any other node to a client

The head knows nothing of what it passes on but its length. Each frame that it passes to a node carries a *mark*, the bytes passed to that
node so far, and the receiver tells the newest mark that it has seen, now and then:

    waiting == passed - seen <= LIMIT_BYTES (and one frame)      what lies in queues between the head and the receiver

What would go beyond is dropped. That is what slows senders down: they have a bound of their own on what is not acknowledged, and wait longer
each time before they send again (`reliable`). Marks that are lost with a connection are overtaken by later ones; a receiver that
says nothing for `STALLED_S` has lost its connection, and the queues with it: they count as empty.
"""

from __future__ import annotations

from typing import Final

LIMIT_BYTES: Final = 32 << 20
"""Most that waits for one node: four times what one sender of values keeps under way (`object_exchange.AHEAD_BYTES`)."""
SEEN_BYTES: Final = 256 << 10
"""A receiver tells its mark after so many bytes."""
STALLED_S: Final = 5.0
"""Longer than a connection over which nothing comes lives (4 s, `zray.peer_transport`)."""


def hop(node: bytes, address: str | None, own: bytes, head: bytes, *, client: bool) -> bytes:
    """Return the node to which a frame for `node` is handed.

    Args:
        node: the receiver.
        address: its host:port; empty: it is a client; None: nothing is known of it.
        own: this node.
        head: the head; empty when it is not known yet.
        client: whether this node is one.
    """
    if not head or head in (own, node):
        return node
    return head if client or address == "" else node


class Passed:
    """The head's account of what it passes on to one node."""

    __slots__ = ("_heard", "dropped", "passed", "seen")

    def __init__(self) -> None:
        self.passed = 0
        """Bytes, dropped ones left out."""
        self.seen = 0
        """Newest mark that the node has told."""
        self._heard = 0.0
        """When it told one, or when something was passed on after nothing had waited."""
        self.dropped = 0
        """Frames."""

    @property
    def waiting(self) -> int:
        """Bytes that the node has not told to have seen."""
        return self.passed - self.seen

    def mark(self, size: int, now: float) -> int | None:
        """A frame of `size` bytes is to be passed on: return its mark; None: drop it."""
        if self.waiting and now - self._heard >= STALLED_S:
            self.seen = self.passed
        if self.waiting + size > max(LIMIT_BYTES, size):
            self.dropped += 1
            return None
        if not self.waiting:
            self._heard = now
        self.passed += size
        return self.passed

    def told(self, mark: int, now: float) -> None:
        """The node has seen the frame with this mark (of an older mark, or of one that was never given, nothing follows)."""
        if self.seen < mark <= self.passed:
            self.seen = mark
            self._heard = now


class Taken:
    """A receiver's account of what has come through the head."""

    __slots__ = ("_told",)

    def __init__(self) -> None:
        self._told = 0

    def came(self, mark: int) -> bool:
        """A frame with this mark has come; return whether the head should be told now."""
        if 0 <= mark - self._told < SEEN_BYTES:
            return False
        self._told = mark  # smaller than the last one: it is another head, or another life of this one
        return True
