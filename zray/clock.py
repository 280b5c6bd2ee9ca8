"""Time as an argument: what a clock is, the real one, and one that tests and the simulator turn by hand.

Covers: monotonic seconds for deciding and waiting, wall seconds for records that people read. Does not cover timers
or waiting on events. Machines never import this: they are told `now`. Doors and processes hold a `Clock`; this is the
one import of `time` for waiting.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where time comes from."""

    def now(self) -> float:
        """Return monotonic seconds from an arbitrary origin: never goes back, so it may decide deadlines."""
        ...

    def wall(self) -> float:
        """Return seconds since the epoch: may jump, so it is written into records and never compared."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let that many seconds pass (nothing for zero or less)."""
        ...


class SystemClock:
    """The clock of this machine (CLOCK_MONOTONIC: equal in all processes of the machine since its boot)."""

    __slots__ = ()

    now = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    @staticmethod
    def sleep(seconds: float) -> None:
        """Let that many seconds pass (nothing for zero or less)."""
        if seconds > 0:
            time.sleep(seconds)


class ManualClock:
    """A clock that moves only when told. `sleep` moves it at once, so code under test never waits."""

    __slots__ = ("_now", "_origin")

    def __init__(self, start: float = 0.0, wall: float = 1_600_000_000.0) -> None:
        self._now = start
        self._origin = wall - start

    def now(self) -> float:
        """Return the seconds the clock stands at."""
        return self._now

    def wall(self) -> float:
        """Return the wall seconds that belong to `now()`."""
        return self._origin + self._now

    def advance(self, seconds: float) -> None:
        """Move forward. ValueError for a negative step: monotonic time never goes back."""
        if seconds < 0:
            raise ValueError(f"a clock only moves forward, got {seconds}")
        self._now += seconds

    def sleep(self, seconds: float) -> None:
        """Move forward by `seconds` (nothing for zero or less)."""
        if seconds > 0:
            self._now += seconds


def time_left(deadline: float | None, now: float) -> float | None:
    """Return the seconds until `deadline` (never below 0), or None when there is no deadline."""
    return None if deadline is None else max(0.0, deadline - now)
