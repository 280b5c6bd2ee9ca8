"""Frames between two nodes: each arrives once and in order, whatever becomes of the connection below.

Covers numbering, acknowledging, sending again, and what a receiver drops. Does not cover sockets (`links`), who is a member
(`membership`) or bulk data, which has connections of its own and is asked for again piece by piece.

Theory. ZeroMQ keeps order on one connection, but what lay in the kernel's buffers when that broke is gone, and what lay in
its own queues may come twice. So every frame from one node to another bears a number, 1, 2, 3 ..., and names the newest
number that its sender has taken from the other side:

    unacked == frames sent with number > acked by the peer        (kept until then)
    taken   == newest n such that 1 .. n were all handed on       (a frame with any other number than taken + 1 is dropped)

A sender sends again from the first unacknowledged frame when the connection is a new one, and when nothing was
acknowledged for a while (go-back-N; Tanenbaum, Computer Networks, section 3.4), a piece at a time: the next piece leaves
when the last has arrived. Both ends are one life of one node: a
broker that starts anew is another node with another id, so numbers never begin again.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Final, NamedTuple

ACK_S: Final = 0.02
"""Seconds that an acknowledgement may wait for a frame to travel with."""
ACK_FRAMES: Final = 64
"""Frames after which it leaves at once."""
RESEND_S: Final = 0.5
"""Seconds without progress after which frames are sent again; doubles up to `RESEND_MAX_S`."""
RESEND_MAX_S: Final = 8.0
RESEND_FRAMES: Final = 256
RESEND_BYTES: Final = 1 << 20
"""Most that is sent again at a time: a peer that is only slow should not get everything twice."""
NEVER: Final = float("inf")

_HEADER = struct.Struct("<QQ")
HEADER_BYTES: Final = _HEADER.size


class MalformedFrame(ValueError):
    """Bytes that no node sends: shorter than a header, or an acknowledgement of what was never sent."""


class Received(NamedTuple):
    """What came of a frame."""

    body: bytes | None
    """To be handed on; None: it was a bare acknowledgement, a repetition, or one that came before its time."""
    again: list[bytes]
    """Frames to send now."""


class ReliableLink:
    """One node's end of its conversation with another."""

    __slots__ = (
        "_ack_due",
        "_acked_told",
        "_number",
        "_pause",
        "_recover_to",
        "_resend_due",
        "_resent_to",
        "_unacked",
        "dropped",
        "resent",
        "taken",
        "unacked_bytes",
    )

    def __init__(self) -> None:
        self._number = 0
        """Of the newest frame sent."""
        self._unacked: deque[tuple[int, bytes]] = deque()
        self._pause = RESEND_S
        self._resend_due = NEVER
        self._recover_to = 0
        """Newest frame that the last loss may have concerned; 0: none is being made good."""
        self._resent_to = 0
        """Newest frame of the last piece that was sent again."""
        self._ack_due = NEVER
        self._acked_told = 0
        """Newest number that the peer was told of."""
        self.taken = 0
        self.unacked_bytes = 0
        """Bodies that the peer has not acknowledged: what slows senders down when it grows."""
        self.dropped = 0
        """Repetitions, and frames that came before their time."""
        self.resent = 0

    # -- the way out ---------------------------------------------------------------------------------------------------

    def send(self, body: bytes, now: float) -> bytes:
        """Return the frame that carries `body`, and keep it until the peer has acknowledged it."""
        self._number += 1
        if not self._unacked:
            self._resend_due = now + self._pause
        self._unacked.append((self._number, body))
        self.unacked_bytes += len(body)
        return self._frame(self._number, body)

    def _frame(self, number: int, body: bytes) -> bytes:
        self._ack_due = NEVER
        self._acked_told = self.taken
        return _HEADER.pack(number, self.taken) + body

    @property
    def unacked(self) -> int:
        """Frames that the peer has not acknowledged."""
        return len(self._unacked)

    # -- the way in ----------------------------------------------------------------------------------------------------

    def receive(self, frame: bytes, now: float) -> Received:
        """Take a frame from the peer.

        Raises:
            MalformedFrame: it is none; nothing has changed.
        """
        if len(frame) < HEADER_BYTES:
            raise MalformedFrame(f"{len(frame)} bytes are no frame between nodes")
        number, acked = _HEADER.unpack_from(frame)
        if acked > self._number:
            raise MalformedFrame(f"it acknowledges frame {acked}, and {self._number} were sent")
        again = self._acknowledged(acked, now)
        if number == 0:
            return Received(None, again)
        if number != self.taken + 1:
            self.dropped += 1
            # The peer sends again because it does not know what was taken, or does not know what is missing: tell it.
            self._ack_due = now
            return Received(None, again)
        self.taken = number
        if self._ack_due == NEVER:
            self._ack_due = now + ACK_S
        if self.taken - self._acked_told >= ACK_FRAMES:
            self._ack_due = now
        return Received(frame[HEADER_BYTES:], again)

    def _acknowledged(self, acked: int, now: float) -> list[bytes]:
        """Forget what has arrived; return the next piece of what is being sent again."""
        unacked = self._unacked
        if not unacked or unacked[0][0] > acked:
            return []
        while unacked and unacked[0][0] <= acked:
            self.unacked_bytes -= len(unacked.popleft()[1])
        self._pause = RESEND_S
        self._resend_due = now + self._pause if unacked else NEVER
        if acked < self._resent_to or not unacked or unacked[0][0] > self._recover_to:
            return []
        return self._first_unacked(now)

    # -- time and new connections --------------------------------------------------------------------------------------

    @property
    def wake_at(self) -> float:
        """When `tick` is wanted at the latest; NEVER while nothing is owed."""
        return min(self._ack_due, self._resend_due)

    def tick(self, now: float) -> list[bytes]:
        """Return the frames to send because time has passed."""
        frames = []
        if now >= self._resend_due:
            self._pause = min(2 * self._pause, RESEND_MAX_S)
            self._recover_to = self._number
            frames = self._first_unacked(now)
        if now >= self._ack_due:
            frames.append(self._frame(0, b""))
        return frames

    def reconnected(self, now: float) -> list[bytes]:
        """The connection is a new one: return the frames to send again at once."""
        self._pause = RESEND_S
        self._recover_to = self._number
        return self._first_unacked(now)

    def _first_unacked(self, now: float) -> list[bytes]:
        frames: list[bytes] = []
        size = 0
        for number, body in self._unacked:
            if len(frames) == RESEND_FRAMES or (frames and size + len(body) > RESEND_BYTES):
                break
            size += len(body)
            self._resent_to = number
            frames.append(self._frame(number, body))
        self._resend_due = now + self._pause if frames else NEVER
        self.resent += len(frames)
        return frames

    # -- checking ------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check the books; AssertionError names the equation that does not hold."""
        numbers = [number for number, _ in self._unacked]
        expected = list(range(self._number - len(numbers) + 1, self._number + 1))
        assert numbers == expected, f"unacknowledged {numbers[:3]}.. of {self._number} sent are not the last ones"
        assert self.unacked_bytes == sum(len(body) for _, body in self._unacked), "unacked_bytes != sum of bodies"
        assert (self._resend_due == NEVER) == (not self._unacked), "frames wait, and nobody will send them again"
        assert self._acked_told <= self.taken, "more was acknowledged than taken"
