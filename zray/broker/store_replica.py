"""A broker's replica of the control store, and its way to the others: the machines of `zray.gcs.replication` over links.

Covers encoding, addresses, and handing events to the machines and what they say to the links. Does not cover decisions (the
machines), or sockets (`links`). Whoever runs the loop calls `flush` when it has handed in all that has come.
"""

from __future__ import annotations

import sys
from random import Random
from typing import TYPE_CHECKING

from zray.broker import peer_messages as pm
from zray.gcs.replication import messages as rm
from zray.gcs.replication.client import Router
from zray.gcs.replication.member import Member

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zray.broker.links import Links
    from zray.gcs.replication.configuration import Configuration, Place
    from zray.gcs.replication.council import VoteStore
    from zray.gcs.replication.state import StateMachine
    from zray.gcs.replication.timing import Timing


class StoreReplica:
    """A member of the replicated store in this process."""

    def __init__(
        self,
        place: Place,
        state: StateMachine,
        votes: VoteStore,
        links: Links,
        timing: Timing,
        now: float,
        *,
        first: bool,
        contacts: Sequence[Place] = (),
        wanted: int = 3,
    ) -> None:
        """Begin; arguments as those of `Member`, whose contacts have addresses here."""
        self._links = links
        for contact in contacts:
            links.know(contact.id, contact.address)
        self.member = Member(
            place,
            state,
            votes,
            timing,
            now,
            Random(),
            first=first,
            contacts=[contact.id for contact in contacts],
            wanted=wanted,
        )
        self._known: Configuration | None = None
        self.malformed = 0
        self.on_configuration: Callable[[Configuration], None] | None = None
        """Told of each configuration that is adopted here."""

    def handle(self, node: bytes, message: pm.Replicate, now: float) -> None:
        """Take what another process says."""
        try:
            said = rm.decode(message.body)
        except rm.MalformedMessage as error:
            self.malformed += 1
            print(f"[zray] broker dropped a message of {node.hex()[:8]}: {error}", file=sys.stderr, flush=True)
            return
        if (
            isinstance(said, rm.Join) and said.place.id == node
        ):  # else it came over a connection to one that was there before
            self._links.know(node, said.place.address)
        self.member.handle(node, said, now)

    def refused(self, node: bytes, now: float) -> None:
        """Nobody listens any more where a process was."""
        self.member.refused(node, now)

    @property
    def wake_at(self) -> float:
        """When `tick` is wanted at the latest."""
        return self.member.wake_at

    def tick(self, now: float) -> None:
        """Let time pass."""
        self.member.tick(now)

    def flush(self, now: float) -> None:
        """Send what is to be sent."""
        out = self.member.flush(now)
        configuration = self.member.configuration
        if configuration is not self._known and configuration is not None:
            self._known = configuration
            learn_addresses(self._links, configuration, self.member.place.id)
            if self.on_configuration is not None:
                self.on_configuration(configuration)
        for node, said in out:
            self._links.send(node, pm.Replicate(rm.encode(said)), now)


class StoreAccess:
    """A client of the replicated store in this process."""

    def __init__(self, links: Links, contacts: Sequence[Place], timing: Timing) -> None:
        """`contacts`: processes that may know who serves."""
        self._links = links
        for contact in contacts:
            links.know(contact.id, contact.address)
        self.router = Router([contact.id for contact in contacts], timing)
        self._waiting: dict[int, Callable[[bytes], None]] = {}
        self._known: Configuration | None = None
        self.malformed = 0

    def ask(self, body: bytes, now: float, answer: Callable[[bytes], None], *, write: bool) -> int:
        """Send an encoded request; `answer` is called with the encoded reply, some time. Return its number (`forget`)."""
        number = self.router.ask(body, now, write=write)
        self._waiting[number] = answer
        return number

    def forget(self, number: int) -> None:
        """Nobody waits any more."""
        self.router.forget(number)
        self._waiting.pop(number, None)

    def handle(self, node: bytes, message: pm.Replicate, now: float) -> None:
        """Take what a replica says."""
        try:
            self.router.handle(rm.decode(message.body), now)
        except rm.MalformedMessage:
            self.malformed += 1

    def lost(self, node: bytes, now: float) -> None:
        """The port of a node refuses."""
        self.router.lost(node, now)

    @property
    def wake_at(self) -> float:
        """When `tick` is wanted at the latest."""
        return self.router.wake_at

    def tick(self, now: float) -> None:
        """Let time pass."""
        self.router.tick(now)

    def flush(self, now: float) -> None:
        """Send what is to be sent, and hand out the answers that came."""
        configuration = self.router.configuration
        if configuration is not self._known and configuration is not None:
            self._known = configuration
            learn_addresses(self._links, configuration, b"")
        out, self.router.out = self.router.out, []
        for node, said in out:
            self._links.send(node, pm.Replicate(rm.encode(said)), now)
        answers, self.router.answers = self.router.answers, []
        for number, body in answers:
            waiting = self._waiting.pop(number, None)
            if waiting is not None:
                waiting(body)


def learn_addresses(links: Links, configuration: Configuration, own: bytes) -> None:
    """Where those are that serve now."""
    for place in configuration.everybody():
        if place.id != own and place.address:
            links.know(place.id, place.address)
