"""A node's watch over its head: what it does when the head is lost, back, replaced, or gone for good."""

from __future__ import annotations

import random

import pytest

from zray.broker.head_watch import ASK_S, Action, Ask, Back, Fault, GiveUp, Hang, HeadWatch, Replaced, State

FIRST, SECOND = b"1" * 16, b"2" * 16
SILENCE, GRACE = 4.0, 20.0
TICK = 0.25


def watch(*faults: Fault, grace: float = GRACE) -> HeadWatch:
    made = HeadWatch(SILENCE, frozenset(faults))
    assert made.joined(FIRST, grace, 0.0) == []
    return made


def ticks(head: HeadWatch, start: float, end: float) -> list[tuple[float, Action]]:
    """What comes of ticks from `start` to `end`."""
    found: list[tuple[float, Action]] = []
    for step in range(int((end - start) / TICK) + 1):
        now = start + step * TICK
        found += [(now, action) for action in head.tick(now)]
    return found


def test_a_head_that_must_not_be_outlived_takes_its_nodes_along() -> None:
    head = watch(grace=0.0)
    assert head.lost("its port refuses connections", 1.0) == [GiveUp("the head is gone: its port refuses connections")]
    assert head.tick(2.0) == head.heard(2.0) == head.joined(SECOND, 5.0, 2.0) == []
    assert head.state == State.GIVEN_UP


def test_a_lost_head_is_asked_for_until_its_time_is_over() -> None:
    head = watch()
    ticks(head, 0.0, 1.0)
    head.heard(1.0)
    assert head.lost("its port refuses connections", 1.0) == [Hang("its port refuses connections"), Ask()]
    assert head.lost("again", 1.1) == [], "it is lost already"
    found = ticks(head, 1.25, 40.0)
    *asks, (when, end) = found
    assert {type(action) for _, action in asks} == {Ask}
    assert [round(now - 1.0, 2) for now, _ in asks[:3]] == [ASK_S, 2 * ASK_S, 3 * ASK_S]
    assert when == 1.0 + GRACE
    assert isinstance(end, GiveUp)
    assert "did not come back within 20 s" in end.reason
    assert "its port refuses" in end.reason


def test_the_same_head_goes_on() -> None:
    head = watch()
    head.lost("a tunnel broke", 1.0)
    assert head.joined(FIRST, GRACE, 3.0) == [Back()]
    head.lost("a tunnel broke", 5.0)
    assert head.heard(6.0) == [Back()]
    assert head.heard(6.1) == []
    assert [action for _, action in ticks(head, 6.25, 6.0 + SILENCE - TICK)] == []


def test_the_next_life_of_the_head_ends_the_last_one() -> None:
    head = watch()
    head.lost("its port refuses connections", 1.0)
    assert head.joined(SECOND, GRACE, 3.0) == [Replaced(FIRST, "its port refuses connections")]
    assert head.head == SECOND
    assert head.joined(SECOND, GRACE, 3.1) == [], "a second answer to the same question"
    head.lost("it has gone, too", 4.0)
    assert head.joined(FIRST, GRACE, 5.0) == [Replaced(SECOND, "it has gone, too")]


def test_silence_is_a_loss_but_not_at_once() -> None:
    head = watch()
    found = ticks(head, 0.0, SILENCE)
    assert [now for now, _ in found] == [SILENCE] * 2
    assert isinstance(found[0][1], Hang)
    assert "not heard of for 4.0 s" in found[0][1].reason
    assert head.heard(SILENCE + 0.1) == [Back()]


def test_a_pause_of_this_process_is_not_the_heads() -> None:
    head = watch()
    ticks(head, 0.0, 2.0)
    assert head.tick(100.0) == []
    head.heard(100.0)
    head.lost("gone", 101.0)
    ticks(head, 101.25, 105.0)
    assert not [action for action in head.tick(500.0) if isinstance(action, GiveUp)]
    assert head.is_lost


def test_who_says_that_it_is_the_head_is_asked_at_once() -> None:
    head = watch()
    assert head.succeeded("another has become the head", 1.0) == [Hang("another has become the head"), Ask()]
    assert head.succeeded("another has become the head", 1.1) == [Ask()], (
        "it was not lost for nothing: it may answer now"
    )
    head.validate(1.1)
    assert head.joined(SECOND, GRACE, 1.2) == [Replaced(FIRST, "another has become the head")]
    assert head.head == SECOND
    head.refused("declared dead")
    assert head.succeeded("another still", 2.0) == []


def test_who_is_refused_gives_up() -> None:
    head = watch()
    head.lost("gone", 1.0)
    assert head.refused("this node was declared dead") == [GiveUp("this node was declared dead")]
    assert head.refused("again") == []


def test_somebody_at_the_address_is_asked_at_once_but_not_more_often() -> None:
    head = watch()
    head.lost("gone", 1.0)
    assert head.reachable(1.1) == []
    assert head.reachable(1.3) == [Ask()]
    assert head.reachable(1.4) == []
    assert watch().reachable(1.0) == []


# -- planted faults ------------------------------------------------------------------------------------------------------------


def run(seed: int, *faults: Fault) -> None:
    """Heads that live, pause, die and come back at random; AssertionError when the watch breaks a promise."""
    draw = random.Random(seed)
    grace = draw.choice([0.0, 3.0, 10.0])
    head = watch(*faults, grace=grace)
    truth, up, silent = FIRST, True, False
    lives = 1
    now = away_since = lost_since = silent_for = 0.0
    asked = -9.0
    known_dead: list[bytes] = []
    stopped = 0.0
    for _ in range(400):
        now += TICK
        if draw.random() < 0.01:  # this process is stopped for a while
            stopped = draw.uniform(5.0, 30.0)
            now += stopped
            away_since += stopped
            lost_since += stopped
            silent_for -= TICK  # the tick after it moves the marks by the whole gap
        chance = draw.random()
        actions: list[Action] = []
        was = head.state
        if up and chance < 0.02:
            up, away_since = False, now
            actions += head.lost("its port refuses", now)
        elif not up and chance < 0.05:
            up, silent = True, False
            if draw.random() < 0.7:
                lives += 1
                truth = bytes([lives]) * 16
        elif up and chance < 0.04:
            silent = not silent
        if not up or silent:
            silent_for += TICK
        elif head.state == State.WITH:
            silent_for = 0.0
            actions += head.heard(now)
        actions += head.tick(now)
        for action in actions:
            if isinstance(action, Ask):
                assert now - asked >= ASK_S - 1e-9 or isinstance(actions[0], Hang), "asked too often"
                asked = now
        if any(isinstance(action, Ask) for action in actions) and up and not silent:
            before = head.head
            actions += (answer := head.joined(truth, grace, now))
            silent_for = 0.0
            assert answer == ([Back()] if before == truth else [Replaced(before, answer[0].reason)])  # type: ignore[union-attr]
            assert head.head == truth
        for action in actions:
            if isinstance(action, Replaced):
                known_dead.append(action.old)
                assert action.old != truth, "the living head was declared dead"
            if isinstance(action, GiveUp):
                assert was == State.LOST or grace == 0, "given up without a loss"
                assert grace == 0 or now - lost_since >= grace - 1e-9, "given up too soon"
            if isinstance(action, Hang):
                lost_since = now
        head.validate(now)
        if not up and head.state == State.LOST:
            assert now - away_since < grace + TICK + stopped, "the grace time does not end"
        if head.state == State.WITH:
            assert silent_for < SILENCE + 2 * TICK, "a silent head is not noticed"
        if head.state == State.GIVEN_UP:
            break
    assert len(set(known_dead)) == len(known_dead), "declared dead twice"


@pytest.mark.parametrize("seed", range(200))
def test_whatever_heads_do_a_node_keeps_its_promises(seed: int) -> None:
    run(seed)


@pytest.mark.parametrize("fault", Fault)
def test_planted_faults_are_found(fault: Fault) -> None:
    if fault is Fault.PAUSE_COUNTS:
        head = watch(fault)
        ticks(head, 0.0, 2.0)
        assert head.tick(100.0) != [], "this one shows only against the ordinary machine"
        return
    with pytest.raises((AssertionError, AttributeError)):
        for seed in range(200):
            run(seed, fault)
