"""Clocks: the real one moves forward, the manual one only when told."""

from __future__ import annotations

import pytest

from zray.clock import Clock, ManualClock, SystemClock, time_left


def test_manual_clock_moves_only_when_told() -> None:
    clock: Clock
    manual = clock = ManualClock(start=5.0, wall=1000.0)
    assert clock.now() == clock.now() == 5.0
    assert clock.wall() == 1000.0
    manual.advance(2.5)
    assert clock.now() == 7.5
    assert clock.wall() == 1002.5
    clock.sleep(1.5)
    assert clock.now() == 9.0
    clock.sleep(-1.0)
    assert clock.now() == 9.0
    with pytest.raises(ValueError, match="forward"):
        manual.advance(-0.1)


def test_system_clock_never_goes_back() -> None:
    clock: Clock = SystemClock()
    times = [clock.now() for _ in range(1000)]
    assert times == sorted(times)
    clock.sleep(0)
    clock.sleep(-1)
    assert clock.wall() > 1_600_000_000


def test_time_left() -> None:
    assert time_left(None, 3.0) is None
    assert time_left(5.0, 3.0) == 2.0
    assert time_left(5.0, 8.0) == 0.0
