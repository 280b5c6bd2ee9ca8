"""What the scheduler machine may ask for: small frozen records that `server.py` carries out without thinking.

The reverse direction is `events.py`. Order matters: actions are performed in the order of the list.
"""

from __future__ import annotations

from typing import Final

import msgspec

from zray.task import ActorSpec, LaneTag, TaskSpec


class Action(msgspec.Struct, frozen=True):
    """Base of all actions."""


class StartWorker(Action, frozen=True):
    """Fork a worker for a job. Answer: WorkerStarted, then WorkerIsReady, or WorkerStartFailed."""

    worker: int
    job: int
    environment: dict[str, str]
    """Set before any user code (CUDA_VISIBLE_DEVICES, thread limits)."""
    title: str = ""


class KillWorker(Action, frozen=True):
    """SIGKILL its whole process group. Answer: WorkerExited."""

    worker: int
    reason: str


class StopWorker(Action, frozen=True):
    """Ask an idle worker to end (Shutdown message). Answer: WorkerExited."""

    worker: int
    reason: str


class RunOn(Action, frozen=True):
    """Hand tasks to a worker, in order (its shapes and job are sent first where it lacks them)."""

    worker: int
    tasks: list[TaskSpec]


class RunAt(Action, frozen=True):
    """Send tasks to another node, in order. Answer: TasksFinished with this slot as the worker, or PeerGone."""

    node: bytes
    slot: int
    job: int
    tasks: list[TaskSpec]


class FetchObjects(Action, frozen=True):
    """A task that was placed here needs these objects, which are on other nodes: bring them. `ObjectsReady` is the answer, whatever becomes of
    them."""

    ids: list[bytes]


class CancelAt(Action, frozen=True):
    """Tell another node that a task it was sent is cancelled: nobody waits for its end."""

    node: bytes
    task: bytes
    force: bool


class HostActor(Action, frozen=True):
    """Have an actor live on another node. `incarnation`: the first it has there; `replay`: calls that it runs before all
    others. Answer: ActorHosted for each incarnation, and ActorGoneAway or PeerGone."""

    node: bytes
    slot: int
    spec: ActorSpec
    incarnation: int
    replay: list[TaskSpec]


class CallAt(Action, frozen=True):
    """Send calls of a job to an actor that lives on another node."""

    node: bytes
    job: int
    actor: bytes
    calls: list[TaskSpec]
    lane: LaneTag | None = None


class KillAt(Action, frozen=True):
    """Have an actor on another node killed. With `no_restart` it is gone for good, and ActorGoneAway follows."""

    node: bytes
    actor: bytes
    no_restart: bool


class NameFreed(Action, frozen=True):
    """An actor of this node does not bear its name any more."""

    namespace: str
    name: str


class EndActorAt(Action, frozen=True):
    """Tell the node of an actor that no handle is left: it ends when it has done what it was sent. Answer: ActorGoneAway."""

    node: bytes
    actor: bytes


UNKNOWN_RETURNS: Final = -1
"""`num_returns` of a call whose shape never passed the broker (calls to actors): all results of it that the store
has."""


class Reopen(Action, frozen=True):
    """Raise the attempt of a task's results in the store (`zs_retry`) and set spec.attempt to it before anything else
    happens with it. Only executions that a death (or retry_exceptions) cost are reopened, so `spec.attempt` counts the
    retries used. Results that are sealed already stay as they are."""

    task: TaskSpec
    num_returns: int


class SealError(Action, frozen=True):
    """Seal all results of a task with a system error, whoever claimed it. `kind` names the exception class in
    zray.errors (or a builtin one), `fields` what is known: ids as hexadecimal `task_id`, `actor_id`; `function_name`,
    `class_name`, `name`, `namespace`; `message` when the text is ready; for deaths `cause` (a name of
    errors.DeathCause), `worker`, `pid`, `status`, to which the server adds what it knows of that process; `error` (a
    packed failure that is used as it
    stands: what a constructor raised)."""

    task: bytes
    num_returns: int
    kind: str
    fields: dict[str, object]


class SealErrors(Action, frozen=True):
    """SealError for many tasks that end for the same reason (their job is over, no worker can be started for it)."""

    tasks: list[bytes]
    num_returns: int
    kind: str
    fields: dict[str, object]


class SealEntries(Action, frozen=True):
    """Seal these pending objects (ids of objects, not of tasks) with a system error; `kind` and `fields` as in
    SealError."""

    ids: list[bytes]
    kind: str
    fields: dict[str, object]


class WatchObjects(Action, frozen=True):
    """Look whether these objects are sealed (`zs_watch_broker` again): a notice may have died with its sender. Answer:
    ObjectsReady for those that are."""

    ids: list[bytes]


class SealReply(Action, frozen=True):
    """Seal a reply object: `value` is a record or plain data to be packed as msgpack; `error` (kind, fields) instead
    when not None."""

    reply: bytes
    value: object
    error: tuple[str, dict[str, object]] | None = None


class GrantLease(Action, frozen=True):
    """Seal the reply with wire.Lease; set WORD_LEASE of the worker's process record to epoch first. The worker gets the
    shape and the job."""

    reply: bytes
    worker: int
    shape: bytes
    epoch: int


class RevokeLease(Action, frozen=True):
    """Raise WORD_LEASE of the worker's process record to epoch."""

    worker: int
    epoch: int


class BeginActor(Action, frozen=True):
    """Send StartActor to the worker (and make its process the target of the replayed calls in the store)."""

    worker: int
    spec: ActorSpec
    incarnation: int
    replay: list[TaskSpec]


class ActorAlive(Action, frozen=True):
    """Seal the address object return_id(actor, incarnation)."""

    actor: bytes
    incarnation: int
    worker: int


class ActorDown(Action, frozen=True):
    """That incarnation is over. When `next` is true make return_id(actor, incarnation+1) pending (it will be
    restarted), else seal the current and the next address object with the error, so that callers learn why."""

    actor: bytes
    incarnation: int
    next: bool
    kind: str
    fields: dict[str, object]


class ForwardCalls(Action, frozen=True):
    """Send queued calls to a living actor (and make its process their target in the store)."""

    worker: int
    process: int
    incarnation: int
    calls: list[TaskSpec]


class EndActor(Action, frozen=True):
    """Send ExitWhenIdle."""

    worker: int
    reason: str


class InterruptTask(Action, frozen=True):
    """Interrupt whoever has claimed this task; when nobody has, seal its results with TaskCancelledError. Only the store
    knows: copies may lie with several workers, and what they report is under way."""

    task: bytes
    function_name: str = ""


class ForgetShapes(Action, frozen=True):
    """A job is over: these shapes are no longer needed."""

    shapes: list[bytes]


class RecordEvent(Action, frozen=True):
    """Tell the control store what happened to a task or actor (bounded, batched by the server)."""

    table: str
    key: bytes
    what: str
    detail: str


class BundlesAnswer(Action, frozen=True):
    """Tell the head whether the bundles of this attempt are held here."""

    group: bytes
    attempt: int
    accepted: bool


class TellFree(Action, frozen=True):
    """Much is free here that was reserved: tell the head at once."""


class AskGroup(Action, frozen=True):
    """Nothing is known of a group that a call names. Answer: GroupPlaced or GroupEnded (nothing while it is pending)."""

    group: bytes


class Warn(Action, frozen=True):
    """One line for the job's driver (or all drivers when job is 0), once per key."""

    job: int
    key: str
    text: str
