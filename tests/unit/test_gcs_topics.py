"""Topics: numbers, beats, and a view that notices whatever it did not get."""

from __future__ import annotations

import pytest

from zray.gcs.tables import Change, Table
from zray.gcs.topics import BUSY_BEAT_S, IDLE_BEAT_S, MAX_WAITING, NEVER, BeatTimer, TopicNumbers, TopicView


def change(sequence: int, key: bytes = b"k", value: bytes | None = b"v", table: int = Table.JOBS) -> Change:
    return Change(table, key, value, sequence, sequence)


def synced(sequence: int = 5, epoch: int = 9) -> TopicView:
    view = TopicView(Table.JOBS)
    view.handle_snapshot(epoch, sequence, [(b"k", b"old", 3)])
    return view


def test_numbers_are_counted_for_each_topic() -> None:
    numbers = TopicNumbers()
    assert numbers.of(Table.JOBS) == 0
    for expected in (1, 2, 3):
        assert numbers.following(Table.JOBS) == expected
        numbers.take(Table.JOBS, expected)
    assert numbers.following(Table.KV) == 1
    assert numbers.newest == {Table.JOBS: 3}


def test_beats_come_soon_after_a_change_and_slowly_otherwise() -> None:
    timer, numbers = BeatTimer(), TopicNumbers()
    assert timer.due_at() == NEVER
    timer.changed(10.0)
    timer.changed(10.05)
    assert timer.due_at() == 10.0 + BUSY_BEAT_S
    numbers.take(Table.JOBS, 4)
    numbers.take(Table.KV, 2)
    assert timer.beat(numbers, [Table.JOBS, Table.NODES], 10.1) == {Table.JOBS: 4, Table.NODES: 0}
    assert timer.due_at() == 10.1 + IDLE_BEAT_S
    timer.changed(10.2)
    assert timer.due_at() == 10.2 + BUSY_BEAT_S


def test_a_view_follows_notices_that_follow() -> None:
    view = synced()
    assert view.rows == {b"k": (b"old", 3)}
    assert view.handle_notice(9, change(6)) == [change(6)]
    assert view.handle_notice(9, change(7, b"l")) == [change(7, b"l")]
    assert view.handle_notice(9, change(8, b"k", None)) == [change(8, b"k", None)]
    assert view.rows == {b"l": (b"v", 7)}
    assert (view.sequence, view.synced, view.gaps) == (8, True, 0)


def test_repeated_notices_are_dropped() -> None:
    view = synced()
    assert view.handle_notice(9, change(5)) == view.handle_notice(9, change(2)) == []
    assert (view.duplicates, view.synced, view.rows) == (2, True, {b"k": (b"old", 3)})


@pytest.mark.parametrize(
    ("epoch", "sequence"), [(9, 7), (9, 100), (8, 6), (10, 1)], ids=["one lost", "many", "old epoch", "new epoch"]
)
def test_a_notice_that_does_not_follow_is_a_gap(epoch: int, sequence: int) -> None:
    view = synced()
    assert view.handle_notice(epoch, change(sequence)) == []
    assert (view.synced, view.gaps, view.sequence) == (False, 1, 5)
    view.handle_notice(epoch, change(sequence + 5))
    view.handle_beat(epoch, sequence + 7)
    assert view.gaps == 1  # it knows already


@pytest.mark.parametrize(
    ("epoch", "newest", "is_gap"), [(9, 5, False), (9, 4, False), (9, 0, False), (9, 6, True), (8, 5, True)]
)
def test_a_beat_tells_the_loss_of_the_last_notice(epoch: int, newest: int, is_gap: bool) -> None:
    view = synced()
    view.handle_beat(epoch, newest)
    assert view.synced is not is_gap
    assert view.gaps == is_gap


def test_a_log_closes_the_gap_and_what_came_meanwhile_follows() -> None:
    view = synced()
    for sequence in (8, 9):
        view.handle_notice(9, change(sequence, b"n%d" % sequence))
    log = [change(sequence, b"n%d" % sequence) for sequence in (6, 7, 8)]
    news = view.handle_log(9, log)
    assert [item.sequence for item in news] == [6, 7, 8, 9]
    assert (view.sequence, view.synced) == (9, True)
    assert sorted(view.rows) == [b"k", b"n6", b"n7", b"n8", b"n9"]


def test_a_gap_after_the_read_asks_for_another_read() -> None:
    view = synced()
    for sequence in (7, 9):
        view.handle_notice(9, change(sequence))
    assert [item.sequence for item in view.handle_log(9, [change(6), change(7)])] == [6, 7]
    assert (view.synced, view.sequence, view.gaps) == (False, 7, 2)
    assert [item.sequence for item in view.handle_log(9, [change(8), change(9)])] == [8, 9]
    assert view.synced


def test_a_log_of_another_epoch_is_not_taken() -> None:
    view = synced()
    view.handle_beat(10, 1)
    assert view.handle_log(10, [change(6)]) == []
    assert not view.synced


def test_a_snapshot_tells_differences() -> None:
    view = TopicView(Table.JOBS)
    rows = [(b"a", b"1", 1), (b"b", b"2", 2), (b"c", b"3", 3)]
    assert [item.key for item in view.handle_snapshot(9, 3, rows)] == [b"a", b"b", b"c"]
    view.handle_beat(10, 0)
    news = view.handle_snapshot(10, 2, [(b"a", b"1", 1), (b"b", b"new", 4), (b"d", b"5", 5)])
    assert [(item.key, item.value) for item in news] == [(b"c", None), (b"b", b"new"), (b"d", b"5")]
    assert view.rows == {b"a": (b"1", 1), b"b": (b"new", 4), b"d": (b"5", 5)}
    assert (view.epoch, view.sequence, view.synced) == (10, 2, True)


def test_notices_that_wait_are_bounded_and_the_next_read_covers_what_fell_out() -> None:
    view = TopicView(Table.JOBS)
    for sequence in range(1, MAX_WAITING + 11):
        view.handle_notice(9, change(sequence, b"%d" % sequence))
    news = view.handle_snapshot(9, 4, [])
    assert news == []
    assert not view.synced  # 5 .. 10 fell out
    log = [change(sequence, b"%d" % sequence) for sequence in range(5, MAX_WAITING + 11)]
    assert view.handle_log(9, log) == log
    assert view.synced
    assert len(view.rows) == MAX_WAITING + 6  # type: ignore[unreachable]


def test_task_notices_are_handed_on_but_not_kept_and_what_is_gone_is_counted() -> None:
    view = TopicView(Table.TASKS)
    view.handle_snapshot(9, 5, [])
    assert view.missed == 0  # nothing was asked for before
    six = change(6, b"", b"batch", Table.TASKS)
    assert view.handle_notice(9, six) == [six]
    assert view.rows == {}
    view.handle_beat(9, 20)
    assert view.handle_snapshot(9, 20, []) == []
    assert view.missed == 14
    view.handle_beat(10, 3)
    view.handle_snapshot(10, 3, [])
    assert view.missed == 17
