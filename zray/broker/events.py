"""What can happen to a node, as the scheduler machine is told it: small frozen records, many tasks an event.

Made by `server.py` from messages, exits and the clock; consumed by `scheduler.py`. The reverse direction is
`actions.py`.
"""

from __future__ import annotations

import msgspec

from zray.placing import GroupSpec
from zray.task import ActorSpec, CallShape, JobSpec, LaneTag, TaskSpec


class Event(msgspec.Struct, frozen=True):
    """Base of all events."""


class JobStarted(Event, frozen=True):
    """A driver was admitted."""

    job: JobSpec
    process: int
    guest: bool = False
    """Its tasks were sent here by other nodes."""


class JobEnded(Event, frozen=True):
    """A driver said good-bye or died."""

    job: int
    reason: str


class ShapesDefined(Event, frozen=True):
    """Shapes that later specs name."""

    shapes: list[CallShape]


class TasksSubmitted(Event, frozen=True):
    """New tasks. `missing[i]` are the dependencies of tasks[i] that are not sealed yet; None when nothing at all is
    missing."""

    job: int
    process: int
    parent: bytes
    tasks: list[TaskSpec]
    missing: list[tuple[bytes, ...]] | None


class ObjectsReady(Event, frozen=True):
    """Objects some task waits for are sealed (or turned out to be errors: the executor finds out)."""

    ids: list[bytes]


class ObjectsMade(Event, frozen=True):
    """Objects some task may wait for exist now, on other nodes: it can be placed, and they are fetched when it is placed here."""

    ids: list[bytes]


class ObjectsLost(Event, frozen=True):
    """No copy is left of these objects, and they are made again: tasks that were sent to other nodes and need one of them wait there, and occupy
    nothing."""

    ids: list[bytes]


class TasksFinished(Event, frozen=True):
    """Ends of tasks on one worker, in order; columns of equal length (statuses: wire.DONE_*)."""

    worker: int
    ids: list[bytes]
    statuses: bytes
    micros: list[int]
    idle: bool


class WorkerStarted(Event, frozen=True):
    """The fork parent made the process. May come again when more is known: `process` (its handle in the store) is 0
    until then."""

    worker: int
    pid: int
    process: int


class WorkerIsReady(Event, frozen=True):
    """Its inbox is bound."""

    worker: int


class WorkerExited(Event, frozen=True):
    """Confirmed exit. `status`: as os.waitstatus_to_exitcode (negative: signal). `oom`: the kernel or the memory watch
    killed it."""

    worker: int
    status: int
    oom: bool
    orphans: list[TaskSpec]
    """Specs kept in the store of calls that had gone straight to it (leased tasks or actor calls), in the order of
    their sequence."""
    orphans_without_spec: list[bytes]
    """Ids of entries that targeted it, kept no spec and are not results of a call in `orphans`: they can only fail."""
    claimed: list[bytes] | None = None
    """Ids of the tasks and calls (orphans included) it had claimed and not sealed: what it was running when it died.
    Only these cost a retry. None when the store could not tell: then the first task handed to it that is not known to
    have ended is taken for it."""


class WorkerStartFailed(Event, frozen=True):
    """The process could not be made (no memory, no process ids)."""

    worker: int
    reason: str


class WorkerBlocked(Event, frozen=True):
    worker: int


class WorkerUnblocked(Event, frozen=True):
    worker: int


class LeaseRequested(Event, frozen=True):
    process: int
    job: int
    shape: bytes
    reply: bytes


class LeaseReturned(Event, frozen=True):
    worker: int
    epoch: int


class ProcessGone(Event, frozen=True):
    """A caller (driver, worker or actor) is dead or left: its leases end, its queued lease requests are dropped."""

    process: int


class ActorRequested(Event, frozen=True):
    """Create an actor. `missing`: dependencies of the constructor that are not sealed yet. `reply`: see
    wire.CreateActor."""

    process: int
    spec: ActorSpec
    missing: tuple[bytes, ...]
    reply: bytes
    incarnation: int = 0
    """The first it has here: above 0 when it lived on other nodes before."""


class ActorNameTaken(Event, frozen=True):
    """An actor cannot be made: `bearer` has its name, somewhere in the cluster. `reply` as in ActorRequested."""

    spec: ActorSpec
    bearer: bytes
    reply: bytes


class ActorConstructed(Event, frozen=True):
    worker: int
    process: int
    actor: bytes


class ActorConstructionFailed(Event, frozen=True):
    worker: int
    actor: bytes
    error: bytes


class ActorCallsQueued(Event, frozen=True):
    """Calls that come through the broker because the actor was not reachable when they were made."""

    process: int
    job: int
    actor: bytes
    incarnation: int
    calls: list[TaskSpec]
    lane: LaneTag | None = None


class ActorUnreferenced(Event, frozen=True):
    """The last handle is gone (its life object turned zombie). Calls already on their way are still answered."""

    actor: bytes


class ActorLeft(Event, frozen=True):
    """It announced that it ends by its own will; its exit follows."""

    worker: int
    actor: bytes


class ActorKill(Event, frozen=True):
    actor: bytes
    no_restart: bool


class TaskCancel(Event, frozen=True):
    task: bytes
    force: bool
    recursive: bool
    worker: int = 0
    """The worker or actor that the store names as target or claimant of the task's results, 0 for none: how a call that
    went straight to it is found."""
    begun: bool = True
    """Whether somebody had claimed it."""


class ActorLookup(Event, frozen=True):
    name: str
    namespace: str
    reply: bytes


class PeerSeen(Event, frozen=True):
    """Another node is there, or says what is free on it now, or has fallen silent (it gets nothing new)."""

    node: bytes
    total: dict[str, float]
    available: dict[str, float]
    silent: bool = False
    labels: dict[str, str] = {}
    queued: int = 0
    """Tasks that wait for a worker there."""
    task_micros: int = 0
    """Average run time of its tasks."""


class PeerGone(Event, frozen=True):
    """Another node is dead, for ever. What it was sent and did not report costs a retry."""

    node: bytes
    reason: str
    calls: dict[bytes, list[TaskSpec]] = {}
    """By actor: calls that were sent there and have not ended, in order."""


class ActorHosted(Event, frozen=True):
    """An incarnation of an actor lives on the node of this slot."""

    slot: int
    actor: bytes
    incarnation: int


class ActorGoneAway(Event, frozen=True):
    """An actor in a slot of another node is dead for good. `error`: the packed failure that its callers get; `kind` and
    `cause`: class of the error and name of errors.DeathCause."""

    slot: int
    actor: bytes
    kind: str
    cause: str
    error: bytes


class BundlesWanted(Event, frozen=True):
    """The head wants bundles of a placement group held here, all or none. Answer: BundlesAnswer."""

    group: bytes
    attempt: int
    """Numbers the head's attempts to place this group."""
    bundles: dict[int, dict[str, int]]
    """Index to amounts in fixed point."""


class BundlesReturned(Event, frozen=True):
    """The head gives that attempt up: nothing is held for it any more."""

    group: bytes
    attempt: int


class GroupPlaced(Event, frozen=True):
    """All bundles of a group are reserved, or some that were are lost with their nodes."""

    spec: GroupSpec
    nodes: tuple[bytes, ...]
    """Of each bundle; b"": none at present."""


class GroupEnded(Event, frozen=True):
    """A group was removed, or there never was one with that id."""

    group: bytes
    reason: str


class Tick(Event, frozen=True):
    """Time passed (about every 100 ms while anything is going on, and when `Scheduler.wake_at` is reached)."""

    leased_busy: frozenset[int] = frozenset()
    """Workers and actors that have unfinished direct calls (entries that target them), also when the lease was taken
    back meanwhile."""
