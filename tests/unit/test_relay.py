"""Frames through the head: who takes that way, and what may wait there."""

from __future__ import annotations

import random
from collections import deque

import pytest

from zray.broker.relay import LIMIT_BYTES, SEEN_BYTES, STALLED_S, Passed, Taken, hop

HEAD, A, B, CLIENT, OTHER_CLIENT = (bytes([n]) * 16 for n in range(1, 6))
ADDRESSES = {HEAD: "h:1", A: "a:1", B: "b:1", CLIENT: "", OTHER_CLIENT: ""}


def hop_between(own: bytes, node: bytes, head: bytes = HEAD) -> bytes:
    return hop(node, ADDRESSES[node], own, head, client=not ADDRESSES[own])


@pytest.mark.parametrize(
    ("own", "node", "by"),
    [
        (CLIENT, HEAD, HEAD),
        (HEAD, CLIENT, CLIENT),
        (CLIENT, A, HEAD),
        (A, CLIENT, HEAD),
        (CLIENT, OTHER_CLIENT, HEAD),
        (A, B, B),
        (A, HEAD, HEAD),
        (HEAD, A, A),
    ],
)
def test_who_goes_through_the_head(own: bytes, node: bytes, by: bytes) -> None:
    assert hop_between(own, node) == by


def test_from_everywhere_to_everywhere_in_two_hops() -> None:
    for own in ADDRESSES:
        for node in ADDRESSES:
            if own != node:
                first = hop_between(own, node)
                assert first == node or (first == HEAD and hop_between(HEAD, node) == node)


def test_as_long_as_the_head_is_not_known_there_is_no_way_through_it() -> None:
    assert hop_between(CLIENT, A, head=b"") == A
    assert hop(B, None, A, HEAD, client=False) == B, "nothing is known of it: it has connected to this node, perhaps"


def test_what_waits_is_bounded_and_drains() -> None:
    passed, taken = Passed(), Taken()
    size = 1 << 20
    marks = [mark for _ in range(40) if (mark := passed.mark(size, 0.0)) is not None]
    assert len(marks) == LIMIT_BYTES // size
    assert passed.dropped == 40 - len(marks)
    for mark in marks:
        if taken.came(mark):
            passed.told(mark, 1.0)
    assert passed.waiting < SEEN_BYTES
    assert passed.mark(size, 1.0) is not None


def test_a_frame_that_is_larger_than_the_bound_passes_alone() -> None:
    passed = Passed()
    assert passed.mark(2 * LIMIT_BYTES, 0.0) == 2 * LIMIT_BYTES
    assert passed.mark(1, 0.0) is None


def test_queues_that_were_lost_with_a_connection_count_no_longer() -> None:
    passed = Passed()
    while passed.mark(1 << 20, 0.0) is not None:
        pass
    assert passed.mark(1 << 20, STALLED_S - 0.1) is None
    mark = passed.mark(1 << 20, STALLED_S)
    assert mark is not None
    assert passed.waiting == 1 << 20
    passed.told(mark, STALLED_S)
    assert passed.waiting == 0


def test_marks_of_nobody_change_nothing() -> None:
    passed = Passed()
    passed.mark(100, 0.0)
    passed.told(200, 1.0)
    assert passed.waiting == 100
    passed.told(100, 1.0)
    passed.told(50, 1.0)
    assert passed.waiting == 0


def test_another_head_begins_to_count_anew() -> None:
    taken = Taken()
    assert taken.came(10 * SEEN_BYTES)
    assert not taken.came(10 * SEEN_BYTES + 1)
    assert taken.came(5)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lost_it_never_stops_and_never_grows(seed: int) -> None:
    """Frames of all sizes to a node that is slow at times, whose connection breaks at times, and whose words are lost at times."""
    draw = random.Random(seed)
    passed, taken = Passed(), Taken()
    queue: deque[tuple[int, int]] = deque()
    now, last_passed = 0.0, 0.0
    for _ in range(1500):
        now += draw.random() * 0.02
        size = draw.choice([50, 3000, 300 << 10, 1 << 20])
        mark = passed.mark(size, now)
        if mark is not None:
            queue.append((mark, size))
            last_passed = now
        assert now - last_passed <= STALLED_S + 0.1
        assert passed.waiting <= LIMIT_BYTES
        assert sum(size for _, size in queue) <= passed.waiting + SEEN_BYTES
        for _ in range(draw.choice([0, 0, 1, 1, 4])):
            if queue and taken.came(queue.popleft()[0]) and draw.random() < 0.9:
                passed.told(taken._told, now)
        if draw.random() < 0.003:  # the connection breaks, and the next one is made when this one is known to be broken
            queue.clear()
            if draw.random() < 0.5:
                now += STALLED_S
                last_passed = now
