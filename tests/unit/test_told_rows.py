"""Rows that a node tells its head: each change arrives, the newest value wins, refusals are repeated."""

from __future__ import annotations

import random

import pytest

from zray.broker.told_rows import AGAIN_S, Place, ToldRows

JOB: Place = (2, b"j" * 16)


def test_a_row_is_told_once_and_its_newest_value_wins() -> None:
    rows = ToldRows()
    assert rows.changed(JOB, b"1") == [(JOB, b"1")]
    assert rows.changed(JOB, b"2") == []
    assert rows.changed(JOB, b"3") == []
    assert rows.answered(JOB, True, 0.0) == [(JOB, b"3")]
    assert rows.answered(JOB, True, 0.0) == []
    assert rows.newest == {}
    assert rows.answered(JOB, True, 0.0) == [], "nobody has asked"


def test_a_refused_row_is_told_again() -> None:
    rows = ToldRows()
    rows.changed(JOB, b"1")
    assert rows.answered(JOB, False, 5.0) == []
    assert rows.tick(5.0 + AGAIN_S / 2) == []
    assert rows.tick(5.0 + AGAIN_S) == [(JOB, b"1")]
    assert rows.tick(100.0) == []
    rows.answered(JOB, False, 101.0)
    assert rows.changed(JOB, b"2") == [(JOB, b"2")]
    rows.validate()


@pytest.mark.parametrize("seed", range(30))
def test_the_head_ends_up_with_every_row(seed: int) -> None:
    draw = random.Random(seed)
    rows, truth, head = ToldRows(), dict[Place, bytes](), dict[Place, bytes]()
    waiting: list[tuple[Place, bytes]] = []
    now = 0.0
    for step in range(500):
        now += draw.random()
        place = (2, bytes([draw.randrange(6)]))
        if draw.random() < 0.4:
            truth[place] = b"%d" % step
            waiting += rows.changed(place, truth[place])
        elif waiting and draw.random() < 0.8:
            told, value = waiting.pop(0)
            stored = draw.random() < 0.7
            if stored:
                head[told] = value
            waiting += rows.answered(told, stored, now)
        else:
            waiting += rows.tick(now)
        rows.validate()
        assert len({place for place, _ in waiting}) == len(waiting), "one question at a time for each row"
    while rows.newest:
        now += AGAIN_S
        for told, value in waiting:
            head[told] = value
        waiting = [pair for told, _ in waiting for pair in rows.answered(told, True, now)] + rows.tick(now)
    assert head == truth
