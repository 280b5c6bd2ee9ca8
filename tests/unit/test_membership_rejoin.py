"""Members of a head's last life: awaited, back, or dead when their time is over; and pauses of the head itself."""

from __future__ import annotations

import pytest

from tests.unit.test_membership import HEAD, A, B, info
from zray.broker.membership import DEAD_S, SILENT_S, Change, Membership, Refusal, State


def test_a_member_of_the_last_life_is_awaited_and_comes_back() -> None:
    cluster = Membership(HEAD)
    assert cluster.expect(A, 60.0, 0.0)
    assert not cluster.expect(A, 60.0, 0.0)
    assert cluster.members[A.id].state == State.SILENT
    assert cluster.tick(59.0) == [], "longer than an ordinary node may be silent"
    assert cluster.to_look_at(59.0) == []
    moved = info(2, address="127.0.0.1:9")
    assert cluster.rejoin(moved, 59.0) == [Change(A.id, State.ALIVE)]
    assert cluster.members[A.id].info.address == "127.0.0.1:9"
    assert [change.state for change in cluster.tick(59.0 + DEAD_S)] == [State.SILENT, State.DEAD]


def test_who_does_not_come_back_in_time_is_dead_for_ever() -> None:
    cluster = Membership(HEAD)
    cluster.expect(A, 60.0, 0.0)
    [change] = cluster.tick(60.0)
    assert (change.node, change.state) == (A.id, State.DEAD)
    with pytest.raises(Refusal, match="declared dead"):
        cluster.rejoin(A, 61.0)


def test_a_member_that_the_head_forgot_is_taken_in() -> None:
    cluster = Membership(HEAD)
    assert cluster.rejoin(B, 1.0) == [Change(B.id, State.ALIVE)]
    assert cluster.rejoin(B, 1.1) == [], "its answer was lost: it asks again"


def test_a_head_of_another_version_takes_nobody_back() -> None:
    cluster = Membership(info(1, version="0.2.0"))
    cluster.expect(A, 60.0, 0.0)
    with pytest.raises(Refusal, match=r"the cluster runs zray 0\.2\.0"):
        cluster.rejoin(A, 1.0)


def test_a_pause_of_the_head_is_nobodys_silence() -> None:
    cluster = Membership(HEAD)
    cluster.join(A, 0.0)
    cluster.paused(100.0)
    assert cluster.tick(100.0 + SILENT_S / 2) == []
    assert [change.state for change in cluster.tick(100.0 + SILENT_S)] == [State.SILENT]
