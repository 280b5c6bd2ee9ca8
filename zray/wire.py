"""EVERY message between zray processes: fields, sender, receiver, reason; how frames are made and read.

Covers the protocol of one node and the part of it that crosses nodes unchanged. Does not cover sockets (`zray.transport`), what the
receivers decide (`zray.broker`), the control store's own requests (`zray.gcs.messages`, which travel inside `GcsRequest`), or the protocol of
the shared segment (`_store_core.h`), to which four rules below refer.

A frame is one ZeroMQ message part: version byte, kind byte, msgpack array of the fields. Unknown versions and kinds and malformed bodies raise
`FrameError`; receivers count, log and drop them.

Who listens: the broker binds ROUTER `b`, every worker and actor binds ROUTER `w<number>`; everyone sends through DEALERs. A driver receives
nothing: *a reply is an object*. Whoever asks makes a pending object, names it in `reply`, and waits on it in the shared store.

**Attempts.** A task's results carry an attempt number in the store. An executor claims (id, attempt) before it runs, and only the claimant can
seal; so one spec may be handed to several workers (stealing back prefetched tasks needs no message) and a superseded executor changes nothing.
Only the broker raises attempts.

**References.** Results are made pending, and hold their arguments, before the spec is sent. No message carries reference counts.

**Blocking.** A worker that waits longer than a moment sends `Blocked` and, when it goes on, `Unblocked`. The broker lends its CPU and hands its
unclaimed tasks to others.

**Death.** The fork parent reports the exit of a worker to the broker, which retries or fails (a) the tasks it had assigned to it and (b) the entries in
the store that name the dead process as their target (calls that went straight to it; their specs are kept there). A caller that addresses a dead
process is refused by the store (ZS_GONE) and goes through the broker instead. A broker that dies takes the node along.
"""

from __future__ import annotations

from typing import Final

import msgspec

from zray.placing import GroupSpec
from zray.task import ActorSpec, CallShape, JobSpec, LaneTag, TaskSpec

VERSION: Final = 1

# How one execution ended, in `TasksDone.statuses`.
DONE_OK: Final = 0
DONE_ERROR: Final = 1
"""User code raised; the error is sealed as the result."""
DONE_RETRY: Final = 2
"""User code raised an exception listed in retry_exceptions: not sealed, the broker decides."""
DONE_CANCELLED: Final = 3
DONE_SKIPPED: Final = 4
"""Another worker had claimed it, or the attempt was superseded."""
DONE_LOST_ARGUMENT: Final = 5
"""An argument could not be read (lost object); sealed as error."""


class FrameError(ValueError):
    """A frame that is not of this protocol: wrong version, unknown kind, or a body that does not fit."""


class Message(msgspec.Struct, array_like=True, frozen=True):
    """Base of all messages; `KINDS` numbers them."""


# -- to the broker ---------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """Driver -> broker, first message: here is my job. Reply: the job's number and what the driver must know of the node."""

    process: int
    job: JobSpec
    reply: bytes
    version: str
    python: str


class Goodbye(Message, frozen=True):
    """Driver -> broker: the job is over; end its tasks and non-detached actors."""

    process: int
    job: int


class WorkerReady(Message, frozen=True):
    """Worker -> broker: inbox bound, ready for work."""

    worker: int
    process: int


class DefineShapes(Message, frozen=True):
    """Any sender -> broker or worker: shapes that later messages on this connection name by key."""

    shapes: list[CallShape]


class SubmitTasks(Message, frozen=True):
    """Driver, worker or actor -> broker: run these. Several specs a frame when the sender has more than it can send."""

    process: int
    job: int
    parent: bytes
    tasks: list[TaskSpec]


class TasksDone(Message, frozen=True):
    """Worker -> broker, batched: what became of tasks, in the order of their ends."""

    worker: int
    ids: bytes
    """16 bytes each."""
    statuses: bytes
    """One byte each: DONE_*."""
    micros: list[int]
    """Run time of each in microseconds."""
    idle: bool
    """Nothing is left in the worker's queue."""


class Blocked(Message, frozen=True):
    """Worker or actor -> broker: its thread waits for an object; lend its CPU."""

    worker: int


class Unblocked(Message, frozen=True):
    """Worker or actor -> broker: it goes on."""

    worker: int


class Sealed(Message, frozen=True):
    """Worker or actor -> broker: objects that the broker asked the store to be told of now exist."""

    ids: bytes


class Wanted(Message, frozen=True):
    """Anyone of a node in a cluster -> broker: somebody here is about to wait for these objects, which the store says are on other nodes
    (`Store.want`): bring them."""

    ids: bytes


class LeaseRequest(Message, frozen=True):
    """Driver, worker or actor -> broker: lend me a worker for calls of this shape. The reply is sealed when (if ever) one is granted: Lease; a lease is
    taken back by raising word WORD_LEASE of the worker's process record."""

    process: int
    job: int
    shape: bytes
    reply: bytes


class LeaseReturn(Message, frozen=True):
    """Lessee -> broker: no longer needed."""

    process: int
    worker: int
    epoch: int


class CreateActor(Message, frozen=True):
    """Driver, worker or actor -> broker. Failure to construct appears as the error of the actor's address object. `reply` (only for named actors and
    get_if_exists) is sealed with the id of the actor that now bears the name, or an error."""

    process: int
    spec: ActorSpec
    reply: bytes


class SubmitActorCalls(Message, frozen=True):
    """Caller -> broker: calls to an actor that is not (or no longer) reachable; they are forwarded in order once it is."""

    process: int
    job: int
    actor: bytes
    incarnation: int
    calls: list[TaskSpec]
    lane: LaneTag | None = None


class OpenLane(Message, frozen=True):
    """Caller -> broker: let me call this actor, which seems to live on another node, directly. The reply is a `LaneAddress`, or an error: it cannot be."""

    process: int
    actor: bytes
    reply: bytes


class SubmitLaneTasks(Message, frozen=True):
    """Caller -> broker: these went over a lane to a leased worker, and no answer has come: see to them."""

    job: int
    node: bytes
    lane: int
    tasks: list[TaskSpec]


class LaneTasksDone(Message, frozen=True):
    """Caller -> broker, batched and late: tasks that have ended over lanes, for the records."""

    job: int
    ids: bytes
    """16 bytes each."""
    statuses: bytes
    micros: list[int]


class CloseLane(Message, frozen=True):
    """Caller -> broker: it calls no more over this lane."""

    process: int
    node: bytes
    lane: int


class ActorReady(Message, frozen=True):
    """Actor -> broker: constructed."""

    worker: int
    process: int
    actor: bytes


class ActorFailed(Message, frozen=True):
    """Actor -> broker: the constructor raised; `error` is the packed failure."""

    worker: int
    actor: bytes
    error: bytes


class ActorExit(Message, frozen=True):
    """Actor -> broker: it ends by its own will (exit_actor, or after ExitWhenIdle)."""

    worker: int
    actor: bytes


class LogCalls(Message, frozen=True):
    """Actor with checkpoints -> broker: it has run these, in this order. Their results are sealed when CallsLogged has confirmed them."""

    worker: int
    actor: bytes
    first: int
    """Number of the first of them among all calls that the actor has ever run."""
    shapes: list[CallShape]
    """Those that earlier messages of this process did not bring."""
    calls: list[TaskSpec]


class SaveCheckpoint(Message, frozen=True):
    """Actor with checkpoints -> broker: this object is its state after so many calls. It goes on when CallsLogged says that it is safe."""

    worker: int
    actor: bytes
    number: int
    checkpoint: bytes


class CancelTask(Message, frozen=True):
    """Anyone -> broker. Broker -> asynchronous actor: this call, which it has begun (others are interrupted by a signal)."""

    task: bytes
    force: bool
    recursive: bool


class KillActor(Message, frozen=True):
    """Anyone -> broker."""

    actor: bytes
    no_restart: bool


class LookupActor(Message, frozen=True):
    """Anyone -> broker: the id and spec of the actor with this name; the reply is an ActorSpec or an error."""

    name: str
    namespace: str
    reply: bytes


class GcsRequest(Message, frozen=True):
    """Anyone -> broker: a request to the control store; the reply object is its encoded answer."""

    body: bytes
    reply: bytes


class Query(Message, frozen=True):
    """Anyone -> broker: state of the node or cluster (`what` names it); the reply is msgpack."""

    what: str
    reply: bytes
    argument: str = ""


class CreateGroup(Message, frozen=True):
    """Anyone -> broker: reserve these resources together. The reply is what is wrong with the wish, or "" when it was taken in."""

    process: int
    spec: GroupSpec
    reply: bytes


class RemoveGroup(Message, frozen=True):
    """Anyone -> broker: end a placement group and what runs in it. The reply is ""."""

    group: bytes
    reply: bytes


class AwaitGroup(Message, frozen=True):
    """Anyone -> broker: seal the reply with this value (packed, of that kind) when all bundles of the group are reserved, or with
    the error that says why it is gone."""

    group: bytes
    reply: bytes
    kind: int
    data: bytes


# -- to a worker or actor --------------------------------------------------------------------------------------------


class BindJob(Message, frozen=True):
    """Broker -> worker, once: whose code it will run."""

    job: JobSpec


class RunTasks(Message, frozen=True):
    """Broker -> worker: run these in order; each must be claimed first."""

    tasks: list[TaskSpec]


class RunDirect(Message, frozen=True):
    """Lessee -> worker: the same, without the broker between. Specs are kept in the store for recovery."""

    process: int
    epoch: int
    tasks: list[TaskSpec]


class StartActor(Message, frozen=True):
    """Broker -> worker: become this actor."""

    spec: ActorSpec
    incarnation: int
    replay: list[TaskSpec]
    """Calls of the previous incarnation to run again, in order, before all others."""
    checkpoint: bytes = b""
    """Object with the state to begin with; b"": what the constructor makes."""
    number: int = 0
    """Calls whose effect is in that state."""
    logged: list[TaskSpec] = []
    """Calls since then, to be run for their effect before everything else."""


class CallActor(Message, frozen=True):
    """Caller (or broker, forwarding) -> actor. `process` is 0 for calls that came from another node."""

    process: int
    incarnation: int
    calls: list[TaskSpec]


class ExpectVisitor(Message, frozen=True):
    """Broker -> actor or worker: a process of another node will come with a stream (`zray.sealed_stream`), to the socket at this path."""

    path: str
    lane: int
    """Its ticket."""
    secret: bytes


class CallOverLane(Message, frozen=True):
    """Process on another node -> actor or leased worker: run these; their `sequence` counts in the lane. Answered with `LaneDone` or `LaneKept`
    each."""

    lane: int
    incarnation: int
    """Of the actor; of a leased worker the epoch of the lease."""
    settled: list[int]
    """Earlier ones whose answers have come: nothing need be kept of them."""
    calls: list[TaskSpec]


class VisitorsRefused(Message, frozen=True):
    """Actor or worker -> broker: connections from elsewhere did not know the secret of any stream."""

    count: int


class GreetOverLane(Message, frozen=True):
    """Process on another node -> actor: is anybody there? Answered with an empty `LaneDone`."""

    lane: int


class LaneDone(Message, frozen=True):
    """Actor -> process on another node: the results of calls that came over the lane."""

    lane: int
    numbers: list[int]
    kinds: bytes
    """One byte each."""
    values: list[bytes]
    micros: list[int]
    """Run time of each in microseconds."""


class LaneKept(Message, frozen=True):
    """Actor or leased worker -> process on another node: the result of this call does not fit the lane, have it brought by the brokers; or it was not
    taken at all."""

    lane: int
    number: int
    taken: bool


class SkipOnLane(Message, frozen=True):
    """Broker -> leased worker: it sees to these tasks, which went over the lane: what has not come is not to be taken any more. Answered with
    DONE_SKIPPED each."""

    lane: int
    numbers: list[int]
    ids: bytes
    """16 bytes each."""


class ExitWhenIdle(Message, frozen=True):
    """Broker -> actor: no handle is left; end after the calls already received."""

    reason: str


class CallerGone(Message, frozen=True):
    """Broker -> actor: this caller is dead, and all that it sent or left has been delivered before this; calls that were held
    for an earlier one of it need not wait any more."""

    process: int


class CallsLogged(Message, frozen=True):
    """Broker -> actor with checkpoints: look at the words WORD_LOGGED, WORD_SAVED and WORD_REFUSED."""


class Shutdown(Message, frozen=True):
    """Broker -> worker: end now."""

    reason: str


# -- replies (sealed objects, not messages) --------------------------------------------------------------------------


class HelloReply(msgspec.Struct, array_like=True, frozen=True):
    """What a driver learns when it is admitted."""

    job: int
    node: bytes
    session: str
    resources: dict[str, float]


class LaneAddress(msgspec.Struct, array_like=True, frozen=True):
    """How to reach an actor or a leased worker on another node directly."""

    address: str
    """host:port of its node."""
    door: int
    """Number to ask for there (`zray.node_port`)."""
    secret: bytes
    """Of the stream there (`zray.sealed_stream`), drawn for this lane alone."""
    node: bytes
    lane: int
    """A number that its node has given; the ticket of the stream, too."""
    incarnation: int
    """Of the actor; of a leased worker the epoch of the lease."""


class Lease(msgspec.Struct, array_like=True, frozen=True):
    """A worker lent to a caller until WORD_LEASE of its process record differs from `epoch`; one on another node looks at that itself."""

    worker: int
    process: int
    epoch: int
    far: LaneAddress | None = None
    """How to reach it when it is on another node."""


class ActorAddress(msgspec.Struct, array_like=True, frozen=True):
    """Value of an actor's address object `ids.return_id(actor, incarnation)`: where that incarnation lives."""

    worker: int
    process: int
    incarnation: int


WORD_LEASE: Final = 0
"""Word of a worker's process record: the current lease epoch; raised to take a lease back."""
WORD_CONSUMED: Final = 1
"""Word of a sender's process record: submit frames the broker has taken from it (a sender that is not ahead sends at once, else packs)."""
WORD_CANCEL: Final = 2
"""Word of a worker's process record: first 8 bytes of the id of the task that should be interrupted; 0 none."""
WORD_LAST_WORDS: Final = 3
"""Word of an actor's process record: not 0 once it has sent the message that says why it ends. Its exit may be reported sooner."""
WORD_LOGGED: Final = 4
"""Word of an actor's process record: the last of its calls that is safe in the log of its owner; results up to it may be sealed."""
WORD_SAVED: Final = 5
"""Word of an actor's process record: 1 + number of calls in its newest safe checkpoint; 0 while there is none."""
WORD_REFUSED: Final = 6
"""Word of an actor's process record: 1 + number of calls in a checkpoint for which its owner had no room; 0 none."""
GLOBAL_LOG_EVENTS: Final = 0
"""Segment-wide word: raised whenever a worker wrote output."""
GLOBAL_CLUSTER: Final = 1
"""Segment-wide word: not 0 when the node belongs to a cluster, so that values may be on other nodes."""

KINDS: Final[dict[int, type[Message]]] = {
    1: Hello,
    2: Goodbye,
    3: WorkerReady,
    4: DefineShapes,
    5: SubmitTasks,
    6: TasksDone,
    7: Blocked,
    8: Unblocked,
    9: Sealed,
    10: LeaseRequest,
    11: LeaseReturn,
    12: CreateActor,
    13: SubmitActorCalls,
    14: ActorReady,
    15: ActorFailed,
    16: ActorExit,
    17: CancelTask,
    18: KillActor,
    19: LookupActor,
    20: GcsRequest,
    21: Query,
    22: Wanted,
    23: LogCalls,
    24: SaveCheckpoint,
    25: OpenLane,
    26: CloseLane,
    27: SubmitLaneTasks,
    28: LaneTasksDone,
    29: VisitorsRefused,
    30: CreateGroup,
    31: RemoveGroup,
    32: AwaitGroup,
    40: BindJob,
    41: RunTasks,
    42: RunDirect,
    43: StartActor,
    44: CallActor,
    45: ExitWhenIdle,
    46: Shutdown,
    47: CallerGone,
    48: CallsLogged,
    49: ExpectVisitor,
    50: CallOverLane,
    51: GreetOverLane,
    52: LaneDone,
    53: LaneKept,
    54: SkipOnLane,
}

_encode = msgspec.msgpack.Encoder().encode
_PREFIX: Final[dict[type[Message], bytes]] = {cls: bytes((VERSION, kind)) for kind, cls in KINDS.items()}
_DECODERS: Final = [
    msgspec.msgpack.Decoder(KINDS[kind]).decode if kind in KINDS else None for kind in range(max(KINDS) + 1)
]


def encode(message: Message) -> bytes:
    """Return the frame of a message."""
    return _PREFIX[type(message)] + _encode(message)


def decode(frame: bytes) -> Message:
    """Return the message in a frame; raise `FrameError` (never anything else) when it is none."""
    if len(frame) < 3 or frame[0] != VERSION:
        raise FrameError(f"not a frame of version {VERSION}: {frame[:8]!r}")
    kind = frame[1]
    decoder = _DECODERS[kind] if kind < len(_DECODERS) else None
    if decoder is None:
        raise FrameError(f"unknown kind {kind}")
    try:
        message = decoder(memoryview(frame)[2:])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FrameError(f"malformed {KINDS[kind].__name__}: {error}") from None
    _check(message)
    return message


def _check(message: Message) -> None:
    """Refuse what msgpack types cannot express: ids of a wrong length, columns of unequal length."""
    if isinstance(message, (SubmitTasks, RunTasks, RunDirect, SubmitLaneTasks)):
        for spec in message.tasks:
            if len(spec.id) != 16 or len(spec.shape) != 16:
                raise FrameError("a task or shape id is not 16 bytes long")
    elif isinstance(message, (TasksDone, LaneTasksDone)):
        n = len(message.statuses)
        if len(message.ids) != 16 * n or len(message.micros) != n:
            raise FrameError(f"columns of {type(message).__name__} differ in length")
    elif isinstance(message, (CallActor, SubmitActorCalls, LogCalls, CallOverLane)):
        for spec in message.calls:
            if len(spec.id) != 16 or len(spec.shape) != 16:
                raise FrameError("a call or shape id is not 16 bytes long")
    elif isinstance(message, LaneDone):
        if not len(message.numbers) == len(message.kinds) == len(message.values) == len(message.micros):
            raise FrameError("columns of LaneDone differ in length")
    elif isinstance(message, SkipOnLane):
        if len(message.ids) != 16 * len(message.numbers):
            raise FrameError("columns of SkipOnLane differ in length")
    elif isinstance(message, (Sealed, Wanted)):
        if len(message.ids) % 16:
            raise FrameError(f"ids of {type(message).__name__} are not a multiple of 16 bytes")
    else:
        for name, value in _ids_of(message):
            if len(value) != 16:
                raise FrameError(f"{name} of {type(message).__name__} is not 16 bytes long")


def _ids_of(message: Message) -> list[tuple[str, bytes]]:
    """The ids in a message that comes rarely."""
    if isinstance(message, DefineShapes):
        return [("a key", shape.key) for shape in message.shapes]
    if isinstance(message, (CreateActor, StartActor)):
        creation = message.spec.creation
        return [("the actor's id", creation.id), ("its shape", creation.shape)]
    if isinstance(message, (Hello, BindJob)):
        return [("the job's id", message.job.id)]
    if isinstance(message, (LeaseRequest, LookupActor, GcsRequest, Query)):
        return [("the reply", message.reply)]
    if isinstance(message, CreateGroup):
        return [("the group", message.spec.id), ("the reply", message.reply)]
    if isinstance(message, (RemoveGroup, AwaitGroup)):
        return [("the group", message.group), ("the reply", message.reply)]
    if isinstance(message, CancelTask):
        return [("the task", message.task)]
    if isinstance(message, OpenLane):
        return [("the actor", message.actor), ("the reply", message.reply)]
    if isinstance(message, CloseLane):
        return [("the node", message.node)]
    if isinstance(message, SaveCheckpoint):
        return [("the actor", message.actor), ("the checkpoint", message.checkpoint)]
    if isinstance(message, (KillActor, ActorReady, ActorFailed, ActorExit)):
        return [("the actor", message.actor)]
    return []
