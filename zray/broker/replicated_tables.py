"""The control store's tables as one node of several keeps them: its copy, and (at the head) the rounds that wait for the other copies.

Covers handing rounds of writes to the chain, which of them all replicas have, and telling of each new configuration. Does not cover what a
configuration means for the node (`cluster`), decisions of replicas (`zray.gcs.replication`) or sockets (`links`).

A round is an entry of the chain (a large one several). It counts when the tail has it; answers leave then, in order, and only while the
council's lease lasts: a head that was paused or cut off cannot know whether another has taken its place, and says nothing.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from zray.broker.store_replica import StoreReplica
from zray.gcs.limits import GcsLimits
from zray.gcs.replication.configuration import Place
from zray.gcs.replication.council import NoVoteStore
from zray.gcs.replication.state import StoreState
from zray.gcs.service import GcsService
from zray.gcs.tables import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from zray.broker import peer_messages as pm
    from zray.broker.links import Links
    from zray.gcs.replication.configuration import Configuration
    from zray.gcs.replication.timing import Timing
    from zray.gcs.tables import Change

_encode: Final = msgspec.msgpack.Encoder().encode


VALUE_BYTES: Final = 32 << 20
"""Bytes of the largest value: an entry has to fit into one frame between nodes."""
_ENTRY_BYTES: Final = 1 << 20
"""Bytes of values after which another entry begins."""


def pieces(changes: list[tuple[int, Change]]) -> Iterator[list[tuple[int, Change]]]:
    """Cut a round into entries that fit into frames. What a request has changed and the note of its answer stay together, or a repetition of
    it would be carried out again by a head that has the one without the other."""
    begin = size = 0
    for index, (_, change) in enumerate(changes):
        if size >= _ENTRY_BYTES and change.table != Table.ANSWERS:
            yield changes[begin:index]
            begin, size = index, 0
        size += len(change.key) + len(change.value or b"")
    if changes:
        yield changes[begin:]


class ReplicatedTables:
    """One node's copy of the tables."""

    def __init__(
        self,
        own: bytes,
        address: str,
        links: Links,
        directory: str,
        shards: int,
        timing: Timing,
        now: float,
        *,
        wanted: int,
        contacts: Sequence[tuple[bytes, str]] = (),
        on_configuration: Callable[[Configuration, float], None],
    ) -> None:
        """Begin a store, or a copy of one.

        Args:
            own: id of this node, which ends with its process: its votes need no file.
            address: host:port of this node.
            links: to the others.
            directory: runtime directory of the node.
            shards: of the store; the same everywhere.
            timing: periods; the same everywhere.
            now: monotonic seconds.
            wanted: replicas that there should be.
            contacts: id and host:port of nodes that keep the tables already; none: this is the first.
            on_configuration: told of each new configuration, and the time.
        """
        self.service = GcsService(None, directory, shards=shards, limits=GcsLimits(value_bytes=VALUE_BYTES))
        self.wanted = wanted
        self._replica = StoreReplica(
            Place(own, time.time_ns(), address),
            StoreState(self.service),
            NoVoteStore(),
            links,
            timing,
            now,
            first=not contacts,
            contacts=[Place(node, 0, where) for node, where in contacts],
            wanted=wanted,
        )
        self._member = self._replica.member
        self._on_configuration = on_configuration
        self._news: list[Configuration] = []
        self._replica.on_configuration = self._news.append
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        """Rounds that not all replicas have: number of the entry, and what to do then."""

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def configuration(self) -> Configuration | None:
        """The newest that is known here."""
        return self._member.configuration

    @property
    def leads(self) -> bool:
        """Whether writes go in here, as far as is known here."""
        return self._member.replica.is_head

    def is_leased(self, now: float) -> bool:
        """Whether this node, and no other, is the head until the council's lease ends."""
        return self._member.is_leased_head(now)

    def lead(self) -> None:
        """This node is the head: carry what is written here to the others."""
        self.service.lead(self)

    # -- rounds, at the head -------------------------------------------------------------------------------------------

    def carry(self, changes: list[tuple[int, Change]], then: Callable[[], None]) -> None:
        """Let every replica have these changes (`zray.gcs.service.Copies`)."""
        if not self.leads:
            return  # another leads: nothing that is said here counts any more
        for piece in pieces(changes):
            self._member.append_own(_encode(piece))
        self._waiting.append((self._member.replica.last, then))

    @property
    def settled(self) -> bool:
        """Whether all replicas have everything, and this node is the only head (`zray.gcs.service.Copies`)."""
        replica = self._member.replica
        return not self._waiting and replica.committed == replica.last and self.is_leased(time.monotonic())

    def _answer(self, now: float) -> bool:
        """Let go of what waits no longer; return whether there was anything."""
        replica = self._member.replica
        found = False
        while self._waiting and self._waiting[0][0] <= replica.committed and self.is_leased(now):
            self._waiting.popleft()[1]()
            found = True
        return found

    # -- the loop ------------------------------------------------------------------------------------------------------

    def handle(self, node: bytes, message: pm.Replicate, now: float) -> None:
        """Take what another replica says."""
        self._replica.handle(node, message, now)

    def ended(self, node: bytes, now: float) -> None:
        """A node's process has ended."""
        self._replica.refused(node, now)

    @property
    def wake_at(self) -> float:
        """When `end_round` is wanted at the latest (monotonic seconds)."""
        return self._replica.wake_at

    def end_round(self, now: float) -> None:
        """After all that has come was taken in: let the others know, and answer what they have."""
        if now >= self._replica.wake_at:
            self._replica.tick(now)
        while True:
            self.service.commit()
            self._replica.flush(now)
            if self._news:
                news, self._news[:] = list(self._news), []
                for configuration in news:
                    self._on_configuration(configuration, now)
            elif not self._answer(now):
                return

    def close(self) -> None:
        """End."""
        self._waiting.clear()
