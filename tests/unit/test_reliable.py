"""Frames between nodes over links that lose, repeat, delay and reorder them."""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING

import pytest

from zray.broker import reliable
from zray.broker.reliable import MalformedFrame, ReliableLink

if TYPE_CHECKING:
    from collections.abc import Callable


class Wire:
    """Two ends and what is under way between them; time stands still unless a test moves it."""

    MOST_STEPS = 1_000_000

    def __init__(self, seed: int = 0, lose: float = 0.0, repeat: float = 0.0, swap: float = 0.0) -> None:
        self.ends = ReliableLink(), ReliableLink()
        self.under_way: tuple[deque[bytes], deque[bytes]] = deque(), deque()
        """Towards end 0, towards end 1."""
        self.arrived: tuple[list[bytes], list[bytes]] = [], []
        self.draw = random.Random(seed)
        self.lose, self.repeat, self.swap = lose, repeat, swap
        self.now = 0.0

    def put(self, to: int, frames: list[bytes]) -> None:
        for frame in frames:
            if self.draw.random() < self.lose:
                continue
            self.under_way[to].append(frame)
            if self.draw.random() < self.repeat:
                self.under_way[to].append(frame)
            if len(self.under_way[to]) > 1 and self.draw.random() < self.swap:
                self.under_way[to][-1], self.under_way[to][-2] = self.under_way[to][-2], self.under_way[to][-1]

    def send(self, end: int, body: bytes) -> None:
        self.put(1 - end, [self.ends[end].send(body, self.now)])

    def deliver(self, to: int) -> None:
        end = self.ends[to]
        body, again = end.receive(self.under_way[to].popleft(), self.now)
        if body is not None:
            self.arrived[to].append(body)
        self.put(1 - to, again)
        self.put(1 - to, end.tick(self.now))

    def settle(self, until: float = 1e9) -> None:
        """Let everything happen, in order of time, until nothing is owed."""
        for _ in range(self.MOST_STEPS):
            while any(self.under_way):
                for to in (0, 1):
                    if self.under_way[to]:
                        self.deliver(to)
            for end in self.ends:
                end.validate()
            self.now = min(end.wake_at for end in self.ends)
            if self.now > until:
                return
            if self.now == reliable.NEVER:
                return
            for index, end in enumerate(self.ends):
                self.put(1 - index, end.tick(self.now))
        raise AssertionError("it never settles")


def bodies(count: int, mark: bytes = b"") -> list[bytes]:
    return [mark + str(number).encode() for number in range(count)]


def test_a_good_link_carries_each_frame_once() -> None:
    wire = Wire()
    for body in bodies(1000):
        wire.send(0, body)
    wire.settle()
    assert wire.arrived[1] == bodies(1000)
    assert wire.ends[0].unacked == wire.ends[0].unacked_bytes == wire.ends[0].resent == 0
    assert wire.ends[0].wake_at == wire.ends[1].wake_at == reliable.NEVER


def test_acknowledgements_travel_with_frames_or_after_a_moment() -> None:
    near, far = ReliableLink(), ReliableLink()
    assert far.receive(near.send(b"a", 0.0), 0.0) == (b"a", [])
    assert far.wake_at == reliable.ACK_S
    answer = far.send(b"b", 0.001)
    assert near.receive(answer, 0.001) == (b"b", [])
    assert near.unacked == 0
    assert far.tick(0.02) == [], "the answer has told it"
    [bare] = near.tick(0.03)
    assert far.receive(bare, 0.03) == (None, [])
    assert far.unacked == 0


def test_many_frames_are_acknowledged_without_delay() -> None:
    near, far = ReliableLink(), ReliableLink()
    for number in range(reliable.ACK_FRAMES):
        far.receive(near.send(b"x", 0.0), 0.0)
        assert bool(far.tick(0.0)) == (number == reliable.ACK_FRAMES - 1)


def converse(seed: int) -> None:
    """Two ends talk at random over a link that is as bad as the seed says; everything must arrive once, in order."""
    draw = random.Random(seed)
    wire = Wire(seed, lose=draw.choice([0, 0.05, 0.4]), repeat=draw.choice([0, 0.2]), swap=draw.choice([0, 0.3]))
    sent = bodies(draw.randrange(1, 400), b"a"), bodies(draw.randrange(0, 400), b"b")
    left = deque(sent[0]), deque(sent[1])
    while any(left):
        end = draw.randrange(2)
        if left[end]:
            wire.send(end, left[end].popleft())
        if draw.random() < 0.3:
            to = draw.randrange(2)
            if wire.under_way[to]:
                wire.deliver(to)
        if draw.random() < 0.01:  # the connection breaks: what was under way is gone
            for to in (0, 1):
                wire.under_way[to].clear()
                wire.put(to, wire.ends[1 - to].reconnected(wire.now))
    wire.settle()
    assert wire.arrived == (sent[1], sent[0])
    assert wire.ends[0].unacked == wire.ends[1].unacked == 0


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_lost_repeated_or_reordered(seed: int) -> None:
    converse(seed)


def repetitions_are_handed_on(patch: pytest.MonkeyPatch) -> None:
    original = ReliableLink.receive

    def receive(self: ReliableLink, frame: bytes, now: float) -> reliable.Received:
        found = original(self, frame, now)
        known = len(frame) > reliable.HEADER_BYTES and found.body is None
        return reliable.Received(frame[reliable.HEADER_BYTES :], found.again) if known else found

    patch.setattr(ReliableLink, "receive", receive)


def nothing_is_sent_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReliableLink, "_first_unacked", lambda self, now: setattr(self, "_resend_due", now + 1.0) or [])


def frames_are_forgotten_when_sent(patch: pytest.MonkeyPatch) -> None:
    original = ReliableLink.send

    def send(self: ReliableLink, body: bytes, now: float) -> bytes:
        frame = original(self, body, now)
        self._unacked.clear()
        self.unacked_bytes = 0
        self._resend_due = reliable.NEVER
        return frame

    patch.setattr(ReliableLink, "send", send)


def what_came_before_its_time_is_taken(patch: pytest.MonkeyPatch) -> None:
    original = ReliableLink.receive

    def receive(self: ReliableLink, frame: bytes, now: float) -> reliable.Received:
        number = int.from_bytes(frame[:8], "little")
        if number > self.taken:
            self.taken = number - 1
        return original(self, frame, now)

    patch.setattr(ReliableLink, "receive", receive)


def acknowledgements_are_never_sent_alone(patch: pytest.MonkeyPatch) -> None:
    original = ReliableLink.tick

    def tick(self: ReliableLink, now: float) -> list[bytes]:
        return [frame for frame in original(self, now) if len(frame) > reliable.HEADER_BYTES]

    patch.setattr(ReliableLink, "tick", tick)


@pytest.mark.parametrize(
    "fault",
    [
        repetitions_are_handed_on,
        nothing_is_sent_again,
        frames_are_forgotten_when_sent,
        what_came_before_its_time_is_taken,
        acknowledgements_are_never_sent_alone,
    ],
)
def test_planted_faults_are_found(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    monkeypatch.setattr(Wire, "MOST_STEPS", 20_000)
    with pytest.raises(AssertionError):
        for seed in range(20):
            converse(seed)


def test_a_peer_that_sleeps_is_not_flooded() -> None:
    link = ReliableLink()
    for body in bodies(10_000):
        link.send(body, 0.0)
    now, frames = 0.0, 0
    while now < 20.0:
        now = link.wake_at
        frames += len(link.tick(now))
    assert frames <= 6 * reliable.RESEND_FRAMES


def test_a_new_connection_makes_good_what_was_lost_without_waiting() -> None:
    wire = Wire()
    for body in bodies(3000):
        wire.send(0, body)
    wire.under_way[1].clear()
    wire.put(1, wire.ends[0].reconnected(wire.now))
    wire.settle(until=0.1)
    assert wire.arrived[1] == bodies(3000)
    assert wire.ends[0].resent == 3000


def test_large_frames_are_sent_again_piece_by_piece() -> None:
    link = ReliableLink()
    for _ in range(10):
        link.send(bytes(reliable.RESEND_BYTES // 2 + 1), 0.0)
    assert len(link.reconnected(1.0)) == 1
    assert link.unacked_bytes == 10 * (reliable.RESEND_BYTES // 2 + 1)


@pytest.mark.parametrize("frame", [b"", b"short", bytes(15)])
def test_what_is_no_frame_is_refused(frame: bytes) -> None:
    link = ReliableLink()
    with pytest.raises(MalformedFrame, match="no frame"):
        link.receive(frame, 0.0)


def test_an_acknowledgement_of_what_was_never_sent_is_refused() -> None:
    near, other = ReliableLink(), ReliableLink()
    other.receive(ReliableLink().send(b"x", 0.0), 0.0)
    [forged] = other.tick(1.0)
    with pytest.raises(MalformedFrame, match="acknowledges frame 1, and 0 were sent"):
        near.receive(forged, 0.0)
    near.validate()
