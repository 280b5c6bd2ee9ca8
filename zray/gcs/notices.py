"""Notices of changes, as the running service sends them: which tables are published, on which sockets, and when beats are due.

Covers publishing and beats. Does not cover numbering or what a subscriber makes of it (`topics`), which changes there are (`service`) or sockets: a PUB
socket is whatever `open_publisher` returns. Nothing is bound before somebody asks for notices, and only tables that were asked for are published.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from zray.gcs import messages as m
from zray.gcs.topics import NEVER, BeatTimer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zray.clock import Clock
    from zray.gcs.faults import Faults
    from zray.gcs.tables import Change, Table


class PublisherLike(Protocol):
    """What is needed of a PUB socket (`zray.transport.Publisher`)."""

    def send(self, topic: bytes, body: bytes) -> None:
        """Publish one message of two frames; never blocks."""
        ...

    def close(self) -> None:
        """Close the socket."""
        ...


def socket_name(shard: int) -> str:
    """Return the name of a shard's PUB socket in the runtime directory."""
    return f"g{shard}"


class Notices:
    """What one service sends of its changes."""

    def __init__(
        self,
        open_publisher: Callable[[str], PublisherLike] | None,
        directory: str,
        clock: Clock,
        shards: int,
        newest: Callable[[int, BeatTimer, Sequence[int], float], dict[int, int]],
        faults: Faults,
    ) -> None:
        """Bind nothing yet.

        Args:
            open_publisher: binds a PUB socket at an endpoint; None: nothing is published.
            directory: where the sockets `g0`, `g1` ... are.
            clock: for beats.
            shards: how many there are.
            newest: tells the newest numbers of some tables of a shard, for a beat of a timer at a time.
            faults: planted mistakes, for tests.
        """
        self._open_publisher = open_publisher
        self._directory = directory
        self._clock = clock
        self._count = shards
        self._newest = newest
        self._publishers: list[PublisherLike] = []
        self._beats = [BeatTimer(faults) for _ in range(shards)]
        self._opened: list[int] = []
        self.published = 0
        """Notices sent."""

    def open(self, table: Table) -> list[str]:
        """Publish the changes of a table from now on. Return the endpoint of each shard ([] when there is no way to publish)."""
        if self._open_publisher is None:
            return []
        endpoints = [f"ipc://{os.path.join(self._directory, socket_name(shard))}" for shard in range(self._count)]
        for endpoint in endpoints[len(self._publishers) :]:
            self._publishers.append(self._open_publisher(endpoint))
        if table not in self._opened:
            self._opened.append(int(table))
        now = self._clock.now()
        for timer in self._beats:
            timer.changed(now)
        return endpoints

    def wants(self, table: int) -> bool:
        """Whether somebody has asked for a table."""
        return table in self._opened

    def publish(self, epoch: int, shard: int, change: Change) -> None:
        """Tell of a change, if its table is published."""
        if change.table in self._opened:
            self._publishers[shard].send(m.topic_name(change.table), m.encode(m.Notice(epoch, change)))
            self.published += 1
            self._beats[shard].changed(self._clock.now())

    def tick(self, now: float, epoch: int) -> float:
        """Send the beats that are due; return when the next one is (infinity: none)."""
        due = NEVER
        for index, publisher in enumerate(self._publishers):
            timer = self._beats[index]
            if timer.due_at() <= now:
                newest = self._newest(index, timer, self._opened, now)
                publisher.send(m.BEAT, m.encode(m.Beat(epoch, newest)))
            due = min(due, timer.due_at())
        return due

    def close(self) -> None:
        """Close the sockets."""
        for publisher in self._publishers:
            publisher.close()
        self._publishers.clear()
        self._opened.clear()
