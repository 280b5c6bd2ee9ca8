"""EVERY message between brokers: fields, sender, receiver, reason; how their frames are made and read.

Covers what crosses nodes. Does not cover messages within a node (`zray.wire`), how frames find their way
(`zray.peer_transport`), or how numbered ones arrive once and in order (`reliable`).

A frame is version byte, PLAIN or NUMBERED, the first 8 bytes of the receiver's id (zeros: whoever listens there), and

    PLAIN      kind byte, msgpack array of the fields                    may be lost: said again, or soon out of date
    NUMBERED   header of `reliable`, kind byte, msgpack array            arrives once, in order

A broker that is addressed by another's name (its port was that one's before) answers with `NotMe`.
"""

from __future__ import annotations

from typing import Final

import msgspec

from zray.broker.membership import Change, NodeInfo, NodeLoad

VERSION: Final = 1
PLAIN: Final = 0
NUMBERED: Final = 1
ANYBODY: Final = bytes(8)
_ENVELOPE: Final = 10


class PeerFrameError(ValueError):
    """A frame that is not of this protocol."""


class PeerMessage(msgspec.Struct, array_like=True, frozen=True):
    """Base of all messages between brokers; `KINDS` numbers them."""


# -- plain -----------------------------------------------------------------------------------------------------------


class Join(PeerMessage, frozen=True):
    """Newcomer -> head, until it is answered."""

    info: NodeInfo


class Joined(PeerMessage, frozen=True):
    """Head -> newcomer: you belong to the cluster; these do, too."""

    cluster: str
    head: NodeInfo
    members: list[NodeInfo]


class Rejected(PeerMessage, frozen=True):
    """Head -> newcomer, or anyone -> a node that was declared dead: you do not belong to the cluster (any more)."""

    reason: str


class Beat(PeerMessage, frozen=True):
    """Node -> head: I live, and this is free here."""

    load: NodeLoad


class Loads(PeerMessage, frozen=True):
    """Head -> all: what is free where."""

    loads: dict[bytes, NodeLoad]


class NotMe(PeerMessage, frozen=True):
    """Broker -> sender of a frame for another: that one is not here (any more)."""

    node: bytes
    """Who is here."""


# -- numbered ----------------------------------------------------------------------------------------------------------


class NodeUp(PeerMessage, frozen=True):
    """Head -> all: a node has joined."""

    info: NodeInfo


class NodeChanged(PeerMessage, frozen=True):
    """Head -> all: a node fell silent, is heard again, or is dead."""

    change: Change


class Leave(PeerMessage, frozen=True):
    """Node -> head: I end now."""

    reason: str


class Gone(PeerMessage, frozen=True):
    """Node -> head: the port of that node refuses connections, or another node is behind it."""

    node: bytes
    reason: str


class StoreRequest(PeerMessage, frozen=True):
    """Node -> head: a request to the control store (`zray.gcs.messages`)."""

    number: int
    body: bytes


class StoreReply(PeerMessage, frozen=True):
    """Head -> node: the answer to the request with that number."""

    number: int
    body: bytes


KINDS: Final[dict[int, type[PeerMessage]]] = {
    1: Join,
    2: Joined,
    3: Rejected,
    4: Beat,
    5: Loads,
    6: NotMe,
    20: NodeUp,
    21: NodeChanged,
    22: Leave,
    23: Gone,
    24: StoreRequest,
    25: StoreReply,
}
_FIRST_NUMBERED: Final = 20

_encode = msgspec.msgpack.Encoder().encode
_NUMBER_OF: Final = {cls: kind for kind, cls in KINDS.items()}
_DECODERS: Final = {kind: msgspec.msgpack.Decoder(cls).decode for kind, cls in KINDS.items()}


def is_numbered(message: PeerMessage) -> bool:
    """Whether a message must arrive once and in order."""
    return _NUMBER_OF[type(message)] >= _FIRST_NUMBERED


def encode(message: PeerMessage) -> bytes:
    """Return kind byte and fields of a message."""
    return bytes((_NUMBER_OF[type(message)],)) + _encode(message)


def decode(body: bytes | memoryview) -> PeerMessage:
    """Return the message; PeerFrameError (never anything else) when it is none."""
    if not len(body):
        raise PeerFrameError("an empty message")
    decoder = _DECODERS.get(body[0])
    if decoder is None:
        raise PeerFrameError(f"unknown kind {body[0]}")
    try:
        return decoder(memoryview(body)[1:])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerFrameError(f"malformed {KINDS[body[0]].__name__}: {error}") from None


def envelope(way: int, to: bytes, payload: bytes) -> bytes:
    """Return a frame. `way`: PLAIN or NUMBERED; `to`: id of the receiver, b"" when it is not known."""
    return bytes((VERSION, way)) + (to[:8] or ANYBODY) + payload


def open_envelope(frame: bytes) -> tuple[int, bytes, bytes]:
    """Return (PLAIN or NUMBERED, first 8 bytes of the receiver's id, payload); PeerFrameError when it is no frame."""
    if len(frame) <= _ENVELOPE or frame[0] != VERSION or frame[1] not in (PLAIN, NUMBERED):
        raise PeerFrameError(f"not a frame of version {VERSION} between brokers: {frame[:12]!r}")
    return frame[1], frame[2:_ENVELOPE], frame[_ENVELOPE:]
