"""Topics: numbers for the publisher, gaps for the subscriber.

Covers the numbering of changes, when a beat is due and what it carries (`TopicNumbers`, `BeatTimer`), and a
subscriber's view of one table of one shard (`TopicView`): which notices follow, which repeat, which leave a gap, and
how a re-read closes it. Does not cover sockets (`service` publishes, `client` subscribes) or what a row means.

Theory. PUB keeps order but drops at will: before the subscription has arrived, when a queue is full, when a process is
slow. So notices of a topic are numbered 1, 2, 3 ... within an *epoch* (one life of the service), and a beat names the
newest number of every topic. A view is *synced* while it has taken 1 .. sequence of its epoch, directly or through a
read. It stops being synced when

    a notice comes with a number above sequence + 1         something before it was lost
    a beat names a number above sequence                    the last notice was lost (the link keeps order)
    a notice or beat has another epoch                      the service has begun anew

and is synced again by a read (log or snapshot), after which the notices that came meanwhile are taken in order. Since
beats never end, a view that is fed and that reads whenever it is not synced equals the table as soon as the link lets
one beat through.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from zray.gcs.faults import NO_FAULTS, Fault, Faults
from zray.gcs.tables import Change, Table

BUSY_BEAT_S: Final = 0.1
"""Seconds between a change and the beat that confirms it."""
IDLE_BEAT_S: Final = 1.0
"""Seconds between beats while nothing changes."""
MAX_WAITING: Final = 10_000
"""Notices kept while a view waits for a read; older ones are dropped, which the next read covers."""
NEVER: Final = float("inf")


class TopicNumbers:
    """The newest number of each topic of one shard."""

    __slots__ = ("_faults", "newest")

    def __init__(self, faults: Faults = NO_FAULTS) -> None:
        self.newest: dict[int, int] = {}
        self._faults = faults

    def of(self, table: int) -> int:
        """Return the newest number of a topic; 0 before its first change."""
        return self.newest.get(table, 0)

    def following(self, table: int) -> int:
        """Return the number that the next change of a topic gets."""
        step = 2 if Fault.SKIPPED_SEQUENCE in self._faults and self.of(table) == 2 else 1
        return self.of(table) + step

    def take(self, table: int, number: int) -> None:
        """Note that a change bears `number`."""
        self.newest[table] = number


class BeatTimer:
    """When a shard's next beat is due."""

    __slots__ = ("_due", "_faults", "_old")

    def __init__(self, faults: Faults = NO_FAULTS) -> None:
        self._due = NEVER
        self._old: dict[int, int] = {}
        self._faults = faults

    def changed(self, now: float) -> None:
        """Something was published at `now` (seconds): the beat that confirms it comes soon."""
        self._due = min(self._due, now + BUSY_BEAT_S)

    def due_at(self) -> float:
        """Return when the next beat is due; NEVER before anything was published."""
        return self._due

    def beat(self, numbers: TopicNumbers, opened: Sequence[int], now: float) -> dict[int, int]:
        """Return the newest numbers of the published topics for a beat sent at `now`."""
        self._due = now + IDLE_BEAT_S
        newest = {table: numbers.of(table) for table in opened}
        if Fault.BEAT_WITHOUT_NEWEST in self._faults:
            self._old = self._old or newest
            return self._old
        return newest


class TopicView:
    """One table of one shard, as a subscriber knows it.

    Notices about tasks carry whole batches: they are handed on but not kept as rows, and what neither notice nor log
    could supply is counted in `missed`.
    """

    __slots__ = ("_faults", "_waiting", "duplicates", "epoch", "gaps", "missed", "rows", "sequence", "synced", "table")

    def __init__(self, table: int, faults: Faults = NO_FAULTS) -> None:
        self.table = table
        self.epoch = 0
        """0: nothing was read yet."""
        self.sequence = 0
        self.synced = False
        """When false: read (`messages.Read`) and feed the answer in."""
        self.rows: dict[bytes, tuple[bytes, int]] = {}
        """key -> (value, version)."""
        self.gaps = 0
        """How often a loss was noticed."""
        self.duplicates = 0
        self.missed = 0
        """Notices that no read could replace (tasks only)."""
        self._waiting: deque[tuple[int, Change]] = deque(maxlen=MAX_WAITING)
        self._faults = faults

    def handle_notice(self, epoch: int, change: Change) -> list[Change]:
        """Take a notice; return the changes that are news to the owner of the view."""
        if not self.synced:
            self._waiting.append((epoch, change))
            return []
        if epoch != self.epoch and Fault.EPOCH_IGNORED not in self._faults:
            self._lose_track()
            self._waiting.append((epoch, change))
            return []
        if change.sequence <= self.sequence and Fault.DUPLICATE_APPLIED not in self._faults:
            self.duplicates += 1
            return []
        if change.sequence > self.sequence + 1 and Fault.GAP_IGNORED not in self._faults:
            self._lose_track()
            self._waiting.append((epoch, change))
            return []
        return self._take(change)

    def handle_beat(self, epoch: int, newest: int) -> None:
        """Compare with the newest number that a beat names for this topic (0 when it names none)."""
        if not self.synced:
            return
        if epoch != self.epoch:
            if Fault.EPOCH_IGNORED not in self._faults:
                self._lose_track()
        elif newest > self.sequence:
            self._lose_track()

    def handle_log(self, epoch: int, changes: Sequence[Change]) -> list[Change]:
        """Take the answer to a read that was complete from the log; return what is news."""
        if epoch != self.epoch:
            return []  # the service began anew since it was asked: the view stays unsynced and reads again
        news: list[Change] = []
        for change in changes:
            if change.sequence == self.sequence + 1:
                news += self._take(change)
        return news + self._caught_up()

    def handle_snapshot(self, epoch: int, sequence: int, rows: Sequence[tuple[bytes, bytes, int]]) -> list[Change]:
        """Take all rows of the table; return the differences as changes (several to one row appear as one)."""
        news: list[Change] = []
        if self.table == Table.TASKS:
            if self.epoch:
                self.missed += sequence if epoch != self.epoch else sequence - self.sequence
        else:
            fresh = {key: (value, version) for key, value, version in rows}
            if Fault.DELETION_NOT_SEEN not in self._faults:
                for key in [key for key in self.rows if key not in fresh]:
                    news.append(Change(self.table, key, None, self.rows.pop(key)[1], sequence))
            for key, (value, version) in fresh.items():
                if self.rows.get(key) != (value, version):
                    self.rows[key] = (value, version)
                    news.append(Change(self.table, key, value, version, sequence))
        self.epoch = epoch
        self.sequence = sequence
        return news + self._caught_up()

    def _caught_up(self) -> list[Change]:
        """After a read: take what came meanwhile, in order, as far as it follows."""
        self.synced = True
        waiting = list(self._waiting)
        self._waiting.clear()
        news: list[Change] = []
        for epoch, change in waiting:
            if Fault.WAITING_NOTICES_LOST in self._faults:
                self.sequence = max(self.sequence, change.sequence)
                continue
            if epoch == self.epoch:
                news += self.handle_notice(epoch, change)
        return news

    def _take(self, change: Change) -> list[Change]:
        self.sequence = change.sequence
        if self.table != Table.TASKS:
            if change.value is None:
                self.rows.pop(change.key, None)
            else:
                self.rows[change.key] = (change.value, change.version)
        return [change]

    def _lose_track(self) -> None:
        self.synced = False
        self.gaps += 1
