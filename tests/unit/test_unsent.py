"""What becomes of calls that a dead process made and may not have sent."""

from __future__ import annotations

from zray.broker.unsent import GRACE, MadeResult, UnsentCalls, sort_out
from zray.task import TaskSpec

A, B, C = (bytes([n]) * 16 for n in (1, 2, 3))


def call(task: bytes, sequence: int) -> TaskSpec:
    return TaskSpec(task, b"s" * 16, sequence=sequence)


def made(task: bytes, target: int = 0, spec: TaskSpec | None = None) -> MadeResult:
    return MadeResult(task[:12] + b"\1\0\0\0", task, target, spec)


def test_each_death_is_looked_at_once_when_all_was_heard() -> None:
    unsent = UnsentCalls()
    assert not unsent
    unsent.died(7, 100.0)
    unsent.died(8, 100.5)
    assert len(unsent) == 2
    assert unsent.due(100.5) == []
    assert unsent.due(100.0 + GRACE) == [7]
    assert unsent.due(200.0) == [8]
    assert not unsent
    assert unsent.due(1000.0) == []


def test_what_the_broker_never_heard_of_is_lost() -> None:
    verdict = sort_out([made(A), made(B), made(C, 0, call(C, 1))], {B}.__contains__, lambda _: True)
    assert verdict.lost == [made(A).id, made(C).id]
    assert not verdict.resend


def test_straight_calls_go_again_in_their_order() -> None:
    results = [made(A, 5, call(A, 2)), made(B, 5, call(B, 1)), made(C, 6, call(C, 9)), made(C, 6)]
    verdict = sort_out(results, lambda _: False, lambda _: True)
    assert {target: [spec.id for spec in calls] for target, calls in verdict.resend.items()} == {5: [B, A], 6: [C]}
    assert not verdict.lost


def test_what_was_expected_of_another_dead_process_is_not_touched() -> None:
    verdict = sort_out([made(A, 5, call(A, 1)), made(B, 5)], lambda _: False, lambda _: False)
    assert not verdict.resend
    assert not verdict.lost


def test_further_results_of_a_straight_call_go_with_the_first() -> None:
    further = MadeResult(A[:12] + b"\2\0\0\0", A, 0, None)
    verdict = sort_out([further, made(A, 5, call(A, 1))], lambda _: False, lambda _: True)
    assert {target: [spec.id for spec in calls] for target, calls in verdict.resend.items()} == {5: [A]}
    assert not verdict.lost
