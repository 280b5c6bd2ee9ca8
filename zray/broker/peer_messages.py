"""EVERY message between brokers: fields, sender, receiver, reason; how their frames are made and read.

Covers what crosses nodes. Does not cover messages within a node (`zray.wire`), how frames find their way
(`zray.peer_transport`), or how numbered ones arrive once and in order (`reliable`).

A frame is version byte, PLAIN or NUMBERED, the first 8 bytes of the receiver's id (zeros: whoever listens there), and

    PLAIN      kind byte, msgpack array of the fields                    may be lost: said again, or soon out of date
               (a `Piece` is followed by the bytes it tells of, as the second part of one ZeroMQ message)
    NUMBERED   header of `reliable`, kind byte, msgpack array            arrives once, in order
    RELAYED    ids of sender and receiver, mark, a whole frame           to a client or from one, passed on by the head (`relay`)

A broker that is addressed by another's name (its port was that one's before) answers with `NotMe`.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import msgspec

from zray.broker.membership import BEAT_S, Change, NodeInfo, NodeLoad
from zray.broker.placement_groups import Held
from zray.placing import GroupSpec
from zray.task import ActorSpec, CallShape, JobSpec, LaneTag, TaskSpec

VERSION: Final = 1
PLAIN: Final = 0
NUMBERED: Final = 1
RELAYED: Final = 2
ANYBODY: Final = bytes(8)
PIECE_BYTES: Final = 1 << 20
"""Most bytes of a value in one message: what else shares a connection's I/O thread waits no longer than it takes to encrypt so much."""
_ENVELOPE: Final = 10
_PASSAGE: Final = struct.Struct("<16s16sQ")


class PeerFrameError(ValueError):
    """A frame that is not of this protocol."""


class PeerMessage(msgspec.Struct, array_like=True, frozen=True):
    """Base of all messages between brokers; `KINDS` numbers them."""


# -- plain -----------------------------------------------------------------------------------------------------------


class Join(PeerMessage, frozen=True):
    """Newcomer -> head, until it is answered."""

    info: NodeInfo


class Rejoin(PeerMessage, frozen=True):
    """Node that has lost its head -> whoever is at the head's address, until it is answered with `Joined` or `Rejected`."""

    info: NodeInfo
    cluster: str
    """Id of the cluster, in hex: a head that has begun another one knows nothing of this node's."""
    index: int
    """Of this node, as in `Joined`."""
    members: list[NodeInfo]
    """Other nodes that it knows to live: the head may have forgotten some (its machine lost its newest writes)."""


class Serving(PeerMessage, frozen=True):
    """Head -> all, and in `Joined`: these nodes keep the control store's tables now (`zray.gcs.replication`)."""

    epoch: int
    """Counts up with each change; no two heads have the same one."""
    chain: list[tuple[bytes, str]]
    """Replicas: id and host:port of each; the first is the head."""
    council: list[tuple[bytes, str]]
    """Nodes of which most must agree before another becomes the head."""
    wanted: int
    """Replicas that there should be."""


class Joined(PeerMessage, frozen=True):
    """Head -> newcomer, or a node that comes back: you belong to the cluster; these do, too."""

    cluster: str
    """Its id, in hex."""
    head: NodeInfo
    members: list[NodeInfo]
    index: int
    """Of the newcomer among all nodes (or all clients) that ever joined: its jobs get numbers of their own from it."""
    grace: float = 0.0
    """Seconds for which members outlive this head (`zray.broker.head_watch`)."""
    storage: str = ""
    """Kind of storage that its tables are in, for people."""
    node_timeout: float = 0.0
    """Seconds of silence after which the head takes a node for dead. A client takes the head for lost after as many; 0: not told."""
    serving: Serving | None = None
    """None: the head alone keeps the tables."""


class Rejected(PeerMessage, frozen=True):
    """Head -> newcomer, or anyone -> a node that was declared dead: you do not belong to the cluster (any more)."""

    reason: str


class BeReplica(PeerMessage, frozen=True):
    """Head -> node, until it is one: keep a copy of the control store's tables; those keep them now."""

    contacts: list[tuple[bytes, str]]
    wanted: int


class HeadIs(PeerMessage, frozen=True):
    """New head -> all, until they have come to it; or any node -> who takes it for the head: this one is."""

    epoch: int
    head: NodeInfo


class Beat(PeerMessage, frozen=True):
    """Node -> head: I live, and this is free here."""

    load: NodeLoad


class Loads(PeerMessage, frozen=True):
    """Head -> all: what is free on some or all nodes (`membership.LoadReports`)."""

    loads: dict[bytes, NodeLoad]
    beat: float = BEAT_S
    """Seconds between two beats that the head wants now."""


class NotMe(PeerMessage, frozen=True):
    """Broker -> sender of a frame for another: that one is not here (any more)."""

    node: bytes
    """Who is here."""


class Seen(PeerMessage, frozen=True):
    """Receiver of relayed frames -> head: the newest mark among them."""

    mark: int


# -- bulk: plain, over connections of their own; whoever wants values asks again for what did not come (`pull`) ------------


class Ask(PeerMessage, frozen=True):
    """Who wants a value -> who has it, or is getting it: send these pieces. The receiver of the first one may name another source instead."""

    id: bytes
    version: int
    piece_bytes: int
    """Pieces are so long (the last one may be shorter); at most `PIECE_BYTES`."""
    pieces: list[int]
    avoid: list[bytes]
    """Nodes that were named as sources and did not help."""


class Piece(PeerMessage, frozen=True):
    """Source -> who asked: the data that comes with this is this piece of that version of that value."""

    id: bytes
    version: int
    index: int


class NotYet(PeerMessage, frozen=True):
    """Source -> who asked, now and then: what you asked for is on its way to here itself."""

    id: bytes
    version: int


class NotHere(PeerMessage, frozen=True):
    """Source -> who asked: it has not that version of that value, and will not get it."""

    id: bytes
    version: int
    reason: str


class Elsewhere(PeerMessage, frozen=True):
    """Source -> who asked: get it from that node, which has it or is getting it."""

    id: bytes
    version: int
    node: bytes
    address: str


class Took(PeerMessage, frozen=True):
    """Who asked -> each source: nothing more is wanted of that value."""

    id: bytes
    version: int
    whole: bool
    """It is all there now, and could be had from here."""


class Replicate(PeerMessage, frozen=True):
    """Among replicas of the control store and their clients: a message of `zray.gcs.replication.messages`, which sees itself to what is lost."""

    body: bytes


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
    """Node -> head: a request to the control store (`zray.gcs.messages`). Said again to the head's next life when no answer has come."""

    number: int
    body: bytes
    oldest: int = 0
    """The oldest request of this node that is not answered: the head need not remember earlier answers."""


class StoreReply(PeerMessage, frozen=True):
    """Head -> node: the answer to the request with that number."""

    number: int
    body: bytes


class Value(PeerMessage, frozen=True):
    """A value on its way: whole, or (data is None) to be asked for piece by piece. Any node -> who wants it, or who waits for the result."""

    id: bytes
    kind: int
    flags: int
    size: int
    data: bytes | None
    contained: list[bytes]
    """Objects that it refers to: lent to the receiver, each once."""
    version: int = 0
    """Of a value that is to be asked for: the same number stands for the same bytes, wherever they are."""


class Fetch(PeerMessage, frozen=True):
    """Who wants a value, and cannot connect to who has it -> who has it: send it over the link (`link_values`)."""

    id: bytes
    version: int


class Chunk(PeerMessage, frozen=True):
    """The next piece of a value that was asked for by `Fetch`."""

    id: bytes
    version: int
    offset: int
    data: bytes


class NotFetched(PeerMessage, frozen=True):
    """Who was asked by `Fetch` -> who asked: it has not that version of that value (any more)."""

    id: bytes
    version: int
    reason: str


class Unfetch(PeerMessage, frozen=True):
    """Who asked by `Fetch` -> who was asked: no more of that value is wanted."""

    id: bytes
    version: int


class AskStream(PeerMessage, frozen=True):
    """Who wants values -> who has some: may it come for them with a stream (`zray.value_streams`)? Answer: StreamIs."""


class StreamIs(PeerMessage, frozen=True):
    """Who was asked by `AskStream` -> who asked: what to show at the port of this node; an empty secret: none can be had."""

    ticket: int
    secret: bytes


class Located(PeerMessage, frozen=True):
    """Who knows -> who was lent the object, or waits for the result: a large value exists, and these nodes have it. In `TasksEnded` the copy at the
    sender is lent to the receiver."""

    id: bytes
    size: int
    attempt: int
    """Of the task that made it."""
    sources: list[bytes]


class GetValues(PeerMessage, frozen=True):
    """Who wants values -> who has copies: send them."""

    ids: list[bytes]


class NoCopy(PeerMessage, frozen=True):
    """Who was asked to send a value -> who asked: it is not here (any more), or is damaged."""

    id: bytes
    reason: str


class CopyAt(PeerMessage, frozen=True):
    """Who borrows an object -> its lender, and on to the lender's lender: a node has a copy of it now, or has none any more."""

    id: bytes
    node: bytes
    size: int
    attempt: int
    there: bool


class RunTasks(PeerMessage, frozen=True):
    """Where tasks were submitted -> where they shall run. All objects they name are lent to the receiver, each once."""

    job: JobSpec
    home: bytes
    """Node of the job's driver: the job ends with it."""
    slot: int
    shapes: list[CallShape]
    """Those that the receiver may not know."""
    tasks: list[TaskSpec]
    lent: list[bytes]
    places: list[Located]
    """Where those of the lent objects are that are large."""


class CallActorAway(PeerMessage, frozen=True):
    """Where an actor is called -> towards where it lives: whoever lent the handle knows the way. Objects as in `RunTasks`."""

    job: JobSpec
    home: bytes
    actor: bytes
    shapes: list[CallShape]
    calls: list[TaskSpec]
    lent: list[bytes]
    lane: LaneTag | None = None


class AskLane(PeerMessage, frozen=True):
    """Where somebody calls an actor -> towards where it lives: may he call it directly? Answered to `asker` by whoever knows."""

    number: int
    asker: bytes
    actor: bytes


class AskLease(PeerMessage, frozen=True):
    """Where somebody calls a function that cannot run there -> where it can: lend him a worker. Answered with `LaneIs` when one is free. Shapes and objects
    (the code) as in `RunTasks`."""

    number: int
    job: JobSpec
    home: bytes
    shapes: list[CallShape]
    shape: bytes
    lent: list[bytes]


class RunOnLane(PeerMessage, frozen=True):
    """Where tasks were made that went over a lane without an answer -> where they went: see to them. Shapes and objects as in `RunTasks`."""

    job: JobSpec
    home: bytes
    lane: int
    shapes: list[CallShape]
    tasks: list[TaskSpec]
    lent: list[bytes]


class LaneIs(PeerMessage, frozen=True):
    """Node of an actor, or of a leased worker -> who asked: how to call it directly; `door` is 0 when that cannot be."""

    number: int
    door: int = 0
    secret: bytes = b""
    lane: int = 0
    incarnation: int = 0


class LanesOver(PeerMessage, frozen=True):
    """Node of callers -> node of actors: nothing more comes over these lanes."""

    lanes: list[int]


class KillActorAway(PeerMessage, frozen=True):
    """Where somebody wants an actor killed -> towards where it lives."""

    actor: bytes
    no_restart: bool


class HostActor(PeerMessage, frozen=True):
    """Owner of an actor (the node that was asked for it) -> where it shall live. Objects as in `RunTasks`."""

    job: JobSpec
    home: bytes
    slot: int
    shapes: list[CallShape]
    spec: ActorSpec
    incarnation: int
    """The first it has there."""
    replay: list[TaskSpec]
    """Calls that it runs before all others."""
    lent: list[bytes]
    checkpoint: bytes = b""
    """With checkpoints: as in `wire.StartActor`."""
    number: int = 0
    logged: list[TaskSpec] = []
    unsealed: list[bytes] = []
    """Those of `logged` whose results the owner lacks."""


class CallsLoggedAway(PeerMessage, frozen=True):
    """Where an actor with checkpoints lives -> its owner: as `wire.LogCalls`. Objects as in `RunTasks`."""

    actor: bytes
    slot: int
    first: int
    shapes: list[CallShape]
    calls: list[TaskSpec]
    lent: list[bytes]


class CheckpointAway(PeerMessage, frozen=True):
    """Where an actor with checkpoints lives -> its owner: as `wire.SaveCheckpoint`; the object is lent."""

    actor: bytes
    slot: int
    number: int
    checkpoint: bytes


class LogConfirmed(PeerMessage, frozen=True):
    """Owner of an actor with checkpoints -> where it lives: what is safe. `refused`: 1 + number of the checkpoint for which there was no room; else 0."""

    actor: bytes
    logged: int
    saved: int
    refused: int


class Output(PeerMessage, frozen=True):
    """Where a worker runs -> node of its job's driver: what it has written."""

    job: int
    name: str
    """Of the stream: number of the worker, full stop, "out" or "err"."""
    text: bytes


class Step(msgspec.Struct, array_like=True, frozen=True):
    """A step of a task's walk through the cluster (`zray.broker.walk`)."""

    time: float
    node: str
    table: str
    subject: bytes
    what: str
    detail: str


class Steps(PeerMessage, frozen=True):
    """Node that traces -> head: what it has noted."""

    steps: list[Step]


class ActorUp(PeerMessage, frozen=True):
    """Where an actor lives -> its owner: this incarnation has been constructed."""

    actor: bytes
    slot: int
    incarnation: int
    pid: int
    replayed: int = 0
    """Logged calls that it was given to run again."""


class ActorGone(PeerMessage, frozen=True):
    """Where an actor lived -> its owner: it is dead for good. `error`: the packed failure that its callers get."""

    actor: bytes
    slot: int
    kind: str
    cause: str
    error: bytes


class EndActorAway(PeerMessage, frozen=True):
    """Owner of an actor -> where it lives: no handle is left; it ends when it has done what it was sent."""

    actor: bytes


class AdoptActor(PeerMessage, frozen=True):
    """Where a detached actor is asked for -> head: be its owner, so that it outlives the node that asked. Objects as in
    `RunTasks`."""

    number: int
    job: JobSpec
    home: bytes
    shapes: list[CallShape]
    spec: ActorSpec
    lent: list[bytes]


class Adopted(PeerMessage, frozen=True):
    """Head -> who asked: done; or `bearer` has the actor's name already, an actor of `owner`."""

    number: int
    bearer: bytes
    owner: bytes


class AskActor(PeerMessage, frozen=True):
    """Where somebody looks an actor up by name -> its owner: lend a handle."""

    number: int
    actor: bytes


class ActorIs(PeerMessage, frozen=True):
    """Owner of an actor -> who asked: what a handle is made of, and the actor itself, lent; None: it is dead."""

    number: int
    spec: ActorSpec | None
    lent: list[bytes]


class TasksEnded(PeerMessage, frozen=True):
    """Where tasks ran -> where they were submitted: ends, with the results that are small; larger ones stay where they are."""

    ids: list[bytes]
    slots: list[int]
    statuses: bytes
    """One byte each: wire.DONE_OK or wire.DONE_ERROR."""
    micros: list[int]
    values: list[Value]
    kept: list[Located]
    """Large results: each is lent to the receiver, once."""
    load: NodeLoad

    def of_slot(self, slot: int) -> tuple[list[bytes], bytes, list[int]]:
        """The ends of what a slot had: (ids, statuses, micros)."""
        if self.slots.count(slot) == len(self.slots):
            return self.ids, self.statuses, self.micros
        mine = [index for index, other in enumerate(self.slots) if other == slot]
        return [self.ids[i] for i in mine], bytes([self.statuses[i] for i in mine]), [self.micros[i] for i in mine]


class CancelAway(PeerMessage, frozen=True):
    """Where a task was submitted -> where it runs: nobody waits for it any more."""

    task: bytes
    force: bool


class JobOver(PeerMessage, frozen=True):
    """Node of a driver -> all: end what is left of its job."""

    job: int
    reason: str


class WantGroup(PeerMessage, frozen=True):
    """Where a placement group is wanted -> head. Answer: GroupAnswer."""

    number: int
    home: bytes
    """Node of the job's driver: the group ends with it, unless it is detached."""
    spec: GroupSpec


class DropGroup(PeerMessage, frozen=True):
    """Where somebody wants a group gone -> head. Answer: GroupAnswer."""

    number: int
    group: bytes


class GroupAnswer(PeerMessage, frozen=True):
    """Head -> who asked: what is wrong with the request of that number, or ""."""

    number: int
    problem: str


class HoldBundles(PeerMessage, frozen=True):
    """Head -> a node: hold these bundles (index to amounts in fixed point), all or none. Answer: BundlesHeld."""

    group: bytes
    attempt: int
    bundles: dict[int, dict[str, int]]


class BundlesHeld(PeerMessage, frozen=True):
    """Node -> head: the bundles of that attempt are held here, or (not accepted) none of them; and what is free now."""

    group: bytes
    attempt: int
    accepted: bool
    load: NodeLoad


class ReleaseBundles(PeerMessage, frozen=True):
    """Head -> a node: what is held for that attempt is not needed."""

    group: bytes
    attempt: int


class GroupIs(PeerMessage, frozen=True):
    """Head -> all, or who asked: where the bundles of a group are (b"": lost with its node). Who holds some opens them."""

    spec: GroupSpec
    nodes: tuple[bytes, ...]


class GroupGone(PeerMessage, frozen=True):
    """Head -> all, or who asked: a group was removed, or never was; whatever runs in it ends."""

    group: bytes
    reason: str


class AskGroup(PeerMessage, frozen=True):
    """Where a call names a group of which nothing is known -> head. Answer: GroupIs, GroupGone, or (pending) nothing now."""

    group: bytes


class BundlesKept(PeerMessage, frozen=True):
    """Node -> the next head, when it has taken the node back: which bundles are held here. Answer: for each known group GroupIs or
    GroupGone; and ReleaseBundles for what the last head did not bring to an end."""

    held: list[Held]
    known: list[bytes]
    """Groups of which something is known here, or waited for."""
    over: list[int]
    """Jobs that have ended here, which the last head may not have heard of."""
    load: NodeLoad


class Want(PeerMessage, frozen=True):
    """Who was lent objects -> who lent them: as soon as they are there, send small values, and say where large ones are."""

    ids: list[bytes]


class Lost(PeerMessage, frozen=True):
    """Who lent an object -> who wants it: it has no value to send."""

    id: bytes
    reason: str


class GiveBack(PeerMessage, frozen=True):
    """Who was lent objects -> who lent them: no longer needed, each as often as it is named."""

    ids: list[bytes]


KINDS: Final[dict[int, type[PeerMessage]]] = {
    1: Join,
    2: Joined,
    3: Rejected,
    4: Beat,
    5: Loads,
    6: NotMe,
    7: Ask,
    8: Piece,
    9: NotYet,
    10: NotHere,
    11: Elsewhere,
    12: Took,
    13: Rejoin,
    14: BeReplica,
    15: HeadIs,
    18: Seen,
    16: Replicate,
    20: NodeUp,
    21: NodeChanged,
    22: Leave,
    23: Gone,
    24: StoreRequest,
    25: StoreReply,
    26: Value,
    27: Chunk,
    28: RunTasks,
    29: TasksEnded,
    30: CancelAway,
    31: JobOver,
    32: Want,
    33: Lost,
    34: GiveBack,
    35: CallActorAway,
    36: KillActorAway,
    37: HostActor,
    38: ActorUp,
    39: ActorGone,
    40: EndActorAway,
    41: AdoptActor,
    42: Adopted,
    43: AskActor,
    44: ActorIs,
    48: AskLane,
    49: LaneIs,
    70: LanesOver,
    71: AskLease,
    72: RunOnLane,
    45: Output,
    46: Steps,
    47: Serving,
    80: CallsLoggedAway,
    81: CheckpointAway,
    82: LogConfirmed,
    50: WantGroup,
    51: DropGroup,
    52: GroupAnswer,
    53: HoldBundles,
    54: BundlesHeld,
    55: ReleaseBundles,
    56: GroupIs,
    57: GroupGone,
    58: AskGroup,
    59: BundlesKept,
    90: Fetch,
    91: NotFetched,
    92: Unfetch,
    93: AskStream,
    94: StreamIs,
    60: Located,
    61: GetValues,
    62: NoCopy,
    63: CopyAt,
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
    """Return a frame. `way`: PLAIN, NUMBERED or RELAYED; `to`: id of the receiver, b"" when it is not known."""
    return bytes((VERSION, way)) + (to[:8] or ANYBODY) + payload


def open_envelope(frame: bytes) -> tuple[int, bytes, bytes]:
    """Return (PLAIN, NUMBERED or RELAYED, first 8 bytes of the receiver's id, payload); PeerFrameError when it is no frame."""
    if len(frame) <= _ENVELOPE or frame[0] != VERSION or frame[1] not in (PLAIN, NUMBERED, RELAYED):
        raise PeerFrameError(f"not a frame of version {VERSION} between brokers: {frame[:12]!r}")
    return frame[1], frame[2:_ENVELOPE], frame[_ENVELOPE:]


class Passage(NamedTuple):
    """What is in a relayed frame."""

    sender: bytes
    receiver: bytes
    mark: int
    """Of the head's account with the receiver (`relay.Passed`); 0 on the way to the head."""
    frame: bytes
    """As its sender made it."""


def passage(sender: bytes, receiver: bytes, mark: int, frame: bytes) -> bytes:
    """Return the payload of a relayed frame."""
    return _PASSAGE.pack(sender, receiver, mark) + frame


def open_passage(payload: bytes) -> Passage:
    """Read the payload of a relayed frame; PeerFrameError when it is none."""
    if len(payload) <= _PASSAGE.size:
        raise PeerFrameError(f"{len(payload)} bytes are no relayed frame")
    sender, receiver, mark = _PASSAGE.unpack_from(payload)
    return Passage(sender, receiver, mark, payload[_PASSAGE.size :])
