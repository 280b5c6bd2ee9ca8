"""What goes over a lane and what becomes of it: numbers, patience, silence, ends."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from zray import wire
from zray.call_order import CallOrder
from zray.lane_ends import LaneEnds
from zray.lanes import PATIENCE_S, Lane, LaneReader, Sent
from zray.task import LANE_BIT, CallShape, LaneTag, TaskSpec

SHAPE = CallShape(bytes(16), 2, b"", "method")
NUMBER = LANE_BIT | 7


class World:
    """A lane whose results are there when the test says so."""

    def __init__(self, opened: bool = True) -> None:
        self.done: set[Any] = set()
        self.lane = Lane(bytes(16), NUMBER, 3, lambda slot: slot not in self.done, 100.0)
        if opened:
            self.lane.open = True

    def send(self, now: float) -> int:
        self.lane.last += 1
        ref: Any = SimpleNamespace(slot=f"result {self.lane.last}", task_id=lambda: bytes(16))
        self.lane.sent(Sent(self.lane.last, SHAPE, b"body", ref, now))
        return self.lane.last

    def answer(self, number: int, now: float) -> bool:
        """An answer over the lane; returns whether it made the result."""
        call = self.lane.answered(number, now)
        if call is None:
            return False
        self.done.add(call.slot)
        return True

    def overdue(self, now: float) -> list[int]:
        return [call.number for call in self.lane.overdue(now)]


def test_nothing_is_handed_over_while_answers_come() -> None:
    world = World()
    now = 100.0
    for _ in range(10):
        number = world.send(now)
        now += PATIENCE_S / 2
        assert world.overdue(now) == []
        assert world.answer(number, now)
    assert world.lane.all_done()
    assert world.lane.may_send()
    assert world.lane.take_settled() == list(range(1, 11))
    assert world.lane.take_settled() == []


def test_all_that_waits_is_handed_over_when_nothing_comes() -> None:
    world = World()
    for _ in range(3):
        world.send(100.0)
    assert world.overdue(100.0 + PATIENCE_S / 2) == []
    assert world.answer(1, 100.004)
    assert world.overdue(100.0 + PATIENCE_S) == [], "an answer has just come"
    assert world.overdue(100.004 + PATIENCE_S) == [2, 3]
    assert world.overdue(200.0) == [], "once"
    assert not world.lane.may_send()


def test_a_late_answer_opens_the_lane_again() -> None:
    world = World()
    number = world.send(100.0)
    assert world.overdue(101.0) == [number]
    assert world.answer(number, 102.0)
    assert world.lane.may_send()
    assert not world.lane.broken(200.0)


def test_an_answer_after_the_brokers_is_only_a_sign_of_life() -> None:
    world = World()
    number = world.send(100.0)
    assert world.overdue(101.0) == [number]
    world.done.add(f"result {number}")
    assert world.lane.all_done()
    assert not world.answer(number, 101.2)
    assert world.lane.may_send()


def test_a_lane_that_stays_silent_is_broken_when_all_has_come_otherwise() -> None:
    world = World()
    number = world.send(100.0)
    assert world.overdue(101.0) == [number]
    assert not world.lane.broken(150.0), "the call may take long"
    world.done.add(f"result {number}")
    assert not world.lane.broken(150.0), "its answer may come a moment later"
    assert not world.lane.broken(150.1)
    assert world.lane.broken(151.0)


def test_a_lane_that_nobody_answers_is_broken() -> None:
    world = World(opened=False)
    assert not world.lane.may_send()
    assert not world.lane.broken(100.5)
    assert world.lane.broken(110.0)


def test_a_lane_that_was_cut_is_used_no_more_and_over_when_all_has_come_otherwise() -> None:
    world = World()
    number = world.send(100.0)
    world.lane.cut = True
    assert not world.lane.may_send()
    assert [call.number for call in world.lane.all_unanswered()] == [number]
    assert not world.lane.broken(200.0)
    world.done.add(f"result {number}")
    assert world.lane.broken(200.0)


def test_the_first_call_waits_for_the_dialling() -> None:
    world = World(opened=False)
    number = world.send(100.0)
    assert world.overdue(100.0 + 2 * PATIENCE_S) == []
    assert world.overdue(101.0) == [number]


def test_what_the_brokers_must_bring_or_was_not_taken_is_under_way_no_more() -> None:
    world = World()
    number = world.send(100.0)
    call = world.lane.kept(number, 100.001)
    assert call is not None
    assert call.number == number
    assert world.lane.kept(number, 100.002) is None
    assert world.overdue(200.0) == []
    assert world.lane.may_send()
    assert world.lane.all_done()
    number = world.send(100.0)
    assert world.overdue(101.0) == [number]
    assert world.lane.kept(number, 101.1) is None, "the brokers see to it"
    assert world.lane.may_send()


def test_what_the_brokers_see_to_is_not_kept_here() -> None:
    world = World()
    world.send(100.0)
    [call] = world.lane.overdue(101.0)
    assert call.ref is None
    assert not world.lane.all_done()


def test_whoever_asks_the_brokers_has_them_know_of_all() -> None:
    world = World()
    world.send(100.0)
    world.send(100.0)
    world.done.add("result 1")
    assert [call.number for call in world.lane.all_unanswered()] == [2]
    assert world.lane.all_unanswered() == []


def test_calls_say_which_lane_they_are_of() -> None:
    assert World().lane.tag(True) == LaneTag(NUMBER, 3, True)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 1, 3), (1, 1, 2, 2, 3, 3), (2, 3, 1, 2, 3)])
def test_numbers_run_once_and_in_order_whichever_way_they_come(order: tuple[int, ...]) -> None:
    actor = CallOrder()
    ran: list[int] = []
    for number in order:
        if actor.is_new(NUMBER, number):
            ran += [spec.sequence for spec in actor.arrive(NUMBER, TaskSpec(bytes(16), bytes(16), sequence=number))]
        assert not actor.is_new(NUMBER, number)
    assert ran == [1, 2, 3]


def ends_of_an_actor() -> tuple[LaneEnds, Any, list[Any]]:
    """The far end of lanes, its actor, and what it answers."""
    sent: list[Any] = []
    inbox = SimpleNamespace(sender=b"x", answer=lambda _sender, frame: sent.append(wire.decode(frame)))
    store = SimpleNamespace(process=1, expect=lambda *_: object(), marks=lambda _: 0)
    worker: Any = SimpleNamespace(inbox=inbox, session=SimpleNamespace(store=store))
    actor: Any = SimpleNamespace(order=CallOrder(), incarnation=0, exiting=False)
    return LaneEnds(worker), actor, sent


def test_a_call_that_has_come_through_the_brokers_before_is_answered_all_the_same() -> None:
    ends, actor, sent = ends_of_an_actor()
    calls = deque[TaskSpec]()
    lane, spec = LANE_BIT | 5, TaskSpec(bytes(16), bytes(16), sequence=1)
    through_broker = wire.CallActor(lane, 0, [spec])
    ends.came_otherwise(through_broker, actor.order)
    assert [ready.sequence for ready in actor.order.arrive(lane, spec)] == [1]
    ends.take(wire.CallOverLane(lane, 0, [], [spec]), actor, calls)
    assert sent == [wire.LaneKept(lane, 1, True)]
    assert not calls


def test_lanes_that_are_over_are_remembered_in_little_space() -> None:
    ends, actor, sent = ends_of_an_actor()
    calls: Any = deque()

    def take(lane: int) -> bool:
        """Whether a call over a lane is taken."""
        sent.clear()
        ends.take(wire.CallOverLane(lane, 0, [], [TaskSpec(bytes(16), bytes(16), sequence=1)]), actor, calls)
        return not any(isinstance(message, wire.LaneKept) and not message.taken for message in sent)

    alive = LANE_BIT | 500
    assert take(alive)
    for number in range(10_000):
        if LANE_BIT | number != alive:
            ends.over(LANE_BIT | number)
    assert not take(LANE_BIT | 3)
    assert not take(LANE_BIT | 9_999)
    assert take(alive)
    assert take(LANE_BIT | 10_000)
    ends.over(alive)
    ends.over(LANE_BIT | 10_001)
    assert len(ends._over) < 1100


def test_a_stream_that_ends_again_and_again_while_it_is_dialled() -> None:
    """Its end may be seen by who sends, before the thread hears of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        told: list[Any] = []
        session = SimpleNamespace(tell=told.append, store=SimpleNamespace(process=1), take_in_until=None)
        submitter: Any = SimpleNamespace(session=session, lock=threading.RLock())
        reader = LaneReader(submitter)
        address = wire.LaneAddress(f"127.0.0.1:{listener.getsockname()[1]}", 1, bytes(32), bytes(16), LANE_BIT | 1, 0)
        now = time.monotonic()
        lane = Lane(address.node, address.lane, 0, lambda _: True, now)
        route: Any = None
        with reader._lock:
            reader.add(lane, route, address)
            [connection] = reader._connections.values()
            for number in range(1, 7):
                connection.stream.ended = True
                assert reader._look_after(connection, now + number / 4), "it is dialled again"
                assert not connection.stream.ended
                assert reader._by_descriptor == {connection.stream.fileno(): connection}
        reader.stop()
