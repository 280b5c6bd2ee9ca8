"""zray.call_order: calls of each caller come out once and in order, however they arrive."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from zray.call_order import CallOrder
from zray.task import TaskSpec


def call(number: int, sequence: int) -> TaskSpec:
    return TaskSpec(number.to_bytes(16, "little"), b"shape", sequence=sequence)


def numbers(calls: list[TaskSpec]) -> list[int]:
    return [int.from_bytes(spec.id, "little") for spec in calls]


def test_calls_in_order_are_delivered_at_once() -> None:
    order = CallOrder()
    for sequence in range(1, 5):
        assert numbers(order.arrive(7, call(sequence, sequence))) == [sequence]
    assert order.held() == 0


def test_a_call_that_overtakes_is_held_until_its_turn() -> None:
    order = CallOrder()
    assert order.arrive(7, call(3, 3)) == []
    assert order.arrive(7, call(2, 2)) == []
    assert order.held() == 2
    assert numbers(order.arrive(7, call(1, 1))) == [1, 2, 3]
    assert order.held() == 0


def test_duplicates_are_dropped_before_and_after_delivery() -> None:
    order = CallOrder()
    assert order.arrive(7, call(2, 2)) == []
    assert order.arrive(7, call(2, 2)) == []
    assert numbers(order.arrive(7, call(1, 1))) == [1, 2]
    assert order.arrive(7, call(1, 1)) == []
    assert order.arrive(7, call(2, 2)) == []


def test_callers_do_not_hold_each_other_up() -> None:
    order = CallOrder()
    assert order.arrive(1, call(12, 2)) == []
    assert numbers(order.arrive(2, call(21, 1))) == [21]
    assert order.callers() == [1, 2]


def test_unnumbered_calls_pass() -> None:
    order = CallOrder()
    assert order.arrive(1, call(2, 2)) == []
    assert numbers(order.arrive(1, call(9, 0))) == [9]
    assert numbers(order.arrive(1, call(1, 1))) == [1, 2]


def test_what_a_dead_caller_left_comes_in_order() -> None:
    order = CallOrder()
    for sequence in (5, 3, 4):
        order.arrive(1, call(sequence, sequence))
    assert numbers(order.gone(1)) == [3, 4, 5]
    assert order.gone(1) == []
    assert order.callers() == []


@given(st.lists(st.integers(1, 4), min_size=1, max_size=40), st.integers(0, 2**32))
def test_any_arrival_order_delivers_each_caller_in_order_once(callers: list[int], seed: int) -> None:
    counts: dict[int, int] = {}
    sent = []
    for caller in callers:
        counts[caller] = counts.get(caller, 0) + 1
        sent.append((caller, counts[caller]))
    arrivals = sent + sent
    random.Random(seed).shuffle(arrivals)
    order = CallOrder()
    got: dict[int, list[int]] = {caller: [] for caller in counts}
    for caller, sequence in arrivals:
        got[caller].extend(numbers(order.arrive(caller, call(sequence, sequence))))
        order.validate()
    assert got == {caller: list(range(1, count + 1)) for caller, count in counts.items()}
    assert order.held() == 0
