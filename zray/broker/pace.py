"""How much of a value may be under way on a link that carries other messages, too.

Covers the window of one sender to one receiver. Does not cover what is sent (`link_values`) or counted as unacknowledged (`reliable`).

Beats and calls to the same node queue behind what is under way, so this is measured in time: a probe is what is under way at a moment; from the
time until all of it is acknowledged,

    longer than SLOW_S       the window is halved, down to LEAST_BYTES
    shorter than QUICK_S     it is doubled, up to MOST_BYTES, if it was all used

which lets what queues take between the two, whatever the bandwidth (down to LEAST_BYTES / SLOW_S, where beats are late).
"""

from __future__ import annotations

from typing import Final

FIRST_BYTES: Final = 512 << 10
LEAST_BYTES: Final = 64 << 10
MOST_BYTES: Final = 8 << 20
QUICK_S: Final = 0.1
SLOW_S: Final = 0.4
_PARTS: Final = 4
"""Chunks in a window."""
_MOST_CHUNK: Final = 1 << 20


class Pace:
    """One sender's window to one receiver."""

    __slots__ = ("_acked", "_begun", "_filled", "_probe", "_sent", "window")

    def __init__(self) -> None:
        self.window = FIRST_BYTES
        """Bytes that may be unacknowledged."""
        self._sent = 0
        self._acked = 0
        self._probe = 0
        """`_sent` when the probe began; 0: there is none."""
        self._begun = 0.0
        self._filled = False
        """The window was all used since the probe began."""

    @property
    def chunk(self) -> int:
        """Bytes of the next chunk."""
        return min(self.window // _PARTS, _MOST_CHUNK)

    def may_send(self, unacked: int, now: float) -> bool:
        """Whether a chunk may leave while so many bytes are not acknowledged."""
        self._acked = max(self._acked, self._sent - unacked)
        if self._probe and self._acked >= self._probe:
            self._judge(now - self._begun)
        if unacked >= self.window:
            self._filled = True
            return False
        return True

    def _judge(self, seconds: float) -> None:
        self._probe = 0
        if seconds > SLOW_S:
            self.window = max(LEAST_BYTES, self.window // 2)
        elif seconds < QUICK_S and self._filled:
            self.window = min(MOST_BYTES, self.window * 2)
        self._filled = False

    def sent(self, size: int, now: float) -> None:
        """A chunk has left."""
        self._sent += size
        if not self._probe:
            self._probe = self._sent
            self._begun = now
