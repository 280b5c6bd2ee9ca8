"""The window of a sender of values: it follows the link, and never stops."""

from __future__ import annotations

from collections import deque

import pytest

from zray.broker.pace import FIRST_BYTES, LEAST_BYTES, MOST_BYTES, SLOW_S, Pace


def carry(rate: float, size: int, delay: float = 0.001) -> tuple[Pace, float, float]:
    """Send `size` bytes over a link of `rate` bytes a second. Returns the pace, the seconds it took, and the longest that a chunk
    of the second half waited between leaving and being acknowledged."""
    pace = Pace()
    under_way: deque[tuple[float, float, int]] = deque()
    now, free_at, unacked, left, longest = 0.0, 0.0, 0, size, 0.0
    while left or under_way:
        while left and pace.may_send(unacked, now):
            chunk = min(left, pace.chunk)
            free_at = max(free_at, now) + chunk / rate
            under_way.append((now, free_at + delay, chunk))
            pace.sent(chunk, now)
            unacked += chunk
            left -= chunk
        assert under_way, "it neither sends nor waits for anything"
        begun, arrives, chunk = under_way.popleft()
        now = max(now, arrives)
        unacked -= chunk
        if left < size // 2:
            longest = max(longest, now - begun)
        assert LEAST_BYTES <= pace.window <= MOST_BYTES
    return pace, now, longest


@pytest.mark.parametrize("rate", [500e3, 2e6, 20e6, 200e6, 2e9])
def test_a_link_is_used_and_other_messages_wait_not_long(rate: float) -> None:
    size = int(rate * 20)
    _, seconds, longest = carry(rate, size)
    assert seconds < 1.3 * size / rate + 0.5
    assert longest < 2 * SLOW_S


def test_a_link_that_is_too_slow_still_carries() -> None:
    pace, seconds, _ = carry(20e3, 1 << 20)
    assert pace.window == LEAST_BYTES
    assert seconds < 1.2 * (1 << 20) / 20e3


def test_a_fast_link_gets_the_largest_window() -> None:
    assert carry(5e9, 1 << 30)[0].window == MOST_BYTES


def test_small_values_do_not_widen_the_window() -> None:
    pace = Pace()
    for step in range(100):
        assert pace.may_send(0, step * 1.0)
        pace.sent(1000, step * 1.0)
        assert pace.may_send(0, step + 0.01)
    assert pace.window == FIRST_BYTES
