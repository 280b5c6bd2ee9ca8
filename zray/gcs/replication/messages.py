"""EVERY message of the replicated store: fields, sender, receiver, reason; encode and decode.

Covers what is said among replicas, members of the council, and clients. Does not cover requests and replies that travel
inside `Write`, `Read` and `Answer` (`zray.gcs.messages`), or how frames find their way. All of them may be lost, repeated,
late or out of order: the machines see to that themselves. Who has sent a message the transport tells.
"""

from __future__ import annotations

from typing import Final

import msgspec

from zray.gcs.replication.configuration import Configuration, Place

Ballot = tuple[int, bytes]
"""Round and id of who proposes: no two are equal, and they have an order."""
NO_BALLOT: Final[Ballot] = (0, b"")


class MalformedMessage(ValueError):
    """Bytes that are no message of the replicated store."""


class ChainMessage(msgspec.Struct, frozen=True, array_like=True):
    """Base of all messages."""


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request that was carried out: what it changed, and what was answered."""

    number: int
    """Place in the history: 1, 2, 3 ..."""
    client: bytes
    """Who asked; empty: nobody waits for an answer."""
    request: int
    """The client's own number of it."""
    floor: int
    """The client has got the answers to all its requests below this one."""
    changes: bytes
    """What `state.StateMachine.apply` takes."""
    answer: bytes


# -- deciding --------------------------------------------------------------------------------------------------------


class Prepare(ChainMessage, frozen=True, array_like=True, tag=1):
    """Who proposes -> council of `base`: let me propose what follows it."""

    base: Configuration
    ballot: Ballot


class Promised(ChainMessage, frozen=True, array_like=True, tag=2):
    """Member -> who proposes: I take no proposal with a lower ballot; and this is what I have accepted."""

    epoch: int
    """Of what is to be decided."""
    ballot: Ballot
    accepted: Configuration | None
    accepted_ballot: Ballot


class Here(ChainMessage, frozen=True, array_like=True, tag=19):
    """Replica that is to stay -> who proposes: I live. Nobody is left out for the sake of one that has ended unnoticed."""

    epoch: int
    """Of what is to be decided."""
    ballot: Ballot
    life: int


class Accept(ChainMessage, frozen=True, array_like=True, tag=3):
    """Who proposes -> council of `base`: accept this."""

    base: Configuration
    ballot: Ballot
    proposal: Configuration
    gone: tuple[Place, ...] = ()
    """Lives that are known to have ended (their port refuses connections): nobody has to wait for their leases."""


class Accepted(ChainMessage, frozen=True, array_like=True, tag=4):
    """Member -> who proposes."""

    epoch: int
    ballot: Ballot


class Declined(ChainMessage, frozen=True, array_like=True, tag=5):
    """Member -> who proposes: not with that ballot, or (wait > 0) not before so many seconds, for a lease has to run out."""

    epoch: int
    ballot: Ballot
    """The one that was promised to somebody; that of the proposal when it only has to wait."""
    wait: float = 0.0


class Decided(ChainMessage, frozen=True, array_like=True, tag=6):
    """Anybody -> anybody who seems not to know: this is the configuration of its epoch. Also to clients: go there."""

    configuration: Configuration


class WhoServes(ChainMessage, frozen=True, array_like=True, tag=7):
    """Client, or somebody who has heard of a newer epoch -> anybody: tell me the newest configuration."""

    epoch: int
    """The newest that is known."""


class LeaseAsk(ChainMessage, frozen=True, array_like=True, tag=8):
    """Head or tail -> council: let no configuration be decided without me for a while."""

    epoch: int
    holder: Place
    stamp: float
    """When it was asked, by the clock of who asks; comes back."""


class LeaseGrant(ChainMessage, frozen=True, array_like=True, tag=9):
    """Member -> head or tail."""

    epoch: int
    stamp: float


class Beat(ChainMessage, frozen=True, array_like=True, tag=10):
    """Everybody -> everybody that the configuration names: I live."""

    epoch: int
    life: int


# -- the chain -------------------------------------------------------------------------------------------------------


class Forward(ChainMessage, frozen=True, array_like=True, tag=11):
    """Replica -> the next one, or tail -> who joins: entries, in order. None: say how far you are."""

    epoch: int
    life: int
    """Of the receiver."""
    entries: list[Entry]


class Ack(ChainMessage, frozen=True, array_like=True, tag=12):
    """Replica -> the one before it: how far I am, and how far the tail is, as far as I know."""

    epoch: int
    life: int
    """Of the sender."""
    received: int
    committed: int


class Join(ChainMessage, frozen=True, array_like=True, tag=13):
    """A process without a place in the chain -> tail: take me in. Said again and again."""

    place: Place
    have: int
    """Number of the last entry that it has of this history; 0: it needs everything."""


class SnapshotPart(ChainMessage, frozen=True, array_like=True, tag=14):
    """Tail -> who joins: all rows as they were after an entry."""

    life: int
    """Of the receiver."""
    number: int
    """Of the entry."""
    index: int
    count: int
    data: bytes


class SnapshotAck(ChainMessage, frozen=True, array_like=True, tag=15):
    """Who joins -> tail: these parts have come, without a hole."""

    number: int
    parts: int


# -- clients ---------------------------------------------------------------------------------------------------------


class Write(ChainMessage, frozen=True, array_like=True, tag=16):
    """Client -> head: carry this out, once, however often you hear it."""

    request: int
    floor: int
    body: bytes


class Read(ChainMessage, frozen=True, array_like=True, tag=17):
    """Client -> tail."""

    request: int
    body: bytes


class Answer(ChainMessage, frozen=True, array_like=True, tag=18):
    """Head or tail -> client: the answer to its request with that number."""

    request: int
    body: bytes


AnyMessage = (
    Prepare
    | Promised
    | Here
    | Accept
    | Accepted
    | Declined
    | Decided
    | WhoServes
    | LeaseAsk
    | LeaseGrant
    | Beat
    | Forward
    | Ack
    | Join
    | SnapshotPart
    | SnapshotAck
    | Write
    | Read
    | Answer
)
Outgoing = tuple[bytes, AnyMessage]
"""Whom to send what."""

_encode = msgspec.msgpack.Encoder().encode
_decoder: Final[msgspec.msgpack.Decoder[AnyMessage]] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: ChainMessage) -> bytes:
    """Return the bytes of a message."""
    return _encode(message)


def decode(data: bytes | memoryview) -> AnyMessage:
    """Return the message; MalformedMessage (never anything else) when it is none."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MalformedMessage(f"not a message of the replicated store: {error}") from None
