"""The actors of a node: from the wish to make one to the last call that must be told it is dead.

Covers the life of an actor (table `MOVES`), incarnations and restarts, names, calls that wait until it lives, and what
becomes of the calls it leaves behind. Does not cover placing it and its process (`dispatch`, `worker_pool`) nor
ordinary tasks. The order of each caller's calls inside a living actor is the actor's own business (`zray.call_order`).

    WAITING -> QUEUED -> STARTING -> CONSTRUCTING -> ALIVE        arguments, resources, process, constructor
    STARTING, CONSTRUCTING, ALIVE -> QUEUED                       its process died and it may be restarted: incarnation
    + 1 any -> DEAD

Incarnations are numbered from 0. Callers number their calls to each incarnation from 1 and send them straight to its
process; only calls made while there was no process to send to come through here. Those are kept under the incarnation
they are meant for. If that incarnation is over before it could get them, they are replayed to the next, before all
others, and cost no retry: they never ran.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from zray.broker import actions
from zray.broker.actor_log import ActorLog
from zray.broker.worker_pool import IllegalMove

if TYPE_CHECKING:
    from zray.broker.dependencies import Waiting
    from zray.broker.jobs import Job
    from zray.broker.ledger import Demand
    from zray.broker.task_table import ShapeState
    from zray.broker.worker_pool import Worker
    from zray.task import ActorSpec, LaneTag, TaskSpec

WAITING: Final = 0
QUEUED: Final = 1
STARTING: Final = 2
CONSTRUCTING: Final = 3
ALIVE: Final = 4
DEAD: Final = 5

STATE_NAMES: Final = ("WAITING", "QUEUED", "STARTING", "CONSTRUCTING", "ALIVE", "DEAD")

MOVES: Final[frozenset[tuple[int, int]]] = frozenset(
    [
        (WAITING, QUEUED),
        (QUEUED, STARTING),
        (STARTING, CONSTRUCTING),
        (CONSTRUCTING, ALIVE),
        *((state, QUEUED) for state in (STARTING, CONSTRUCTING, ALIVE)),
        *((state, DEAD) for state in range(DEAD)),
    ]
)

_TOMBSTONES: Final = 10_000
"""Dead actors whose cause of death is remembered for late callers."""

Calls = list[tuple[int, int, "list[TaskSpec]"]]
"""(process of the caller, its job, its calls), in the order of arrival."""


class ActorRecord:
    """One actor in all its incarnations."""

    __slots__ = (
        "before",
        "deadline",
        "ending",
        "held",
        "id",
        "incarnation",
        "job",
        "log",
        "replay",
        "restarts",
        "running",
        "shape",
        "spec",
        "start_failures",
        "state",
        "verdict",
        "waiting",
        "worker",
    )

    def __init__(self, spec: ActorSpec, job: Job, shape: ShapeState, running: Demand) -> None:
        self.id: bytes = spec.creation.id
        self.spec = spec
        self.job = job
        self.shape = shape
        """Of its constructor: what it needs while it is made."""
        self.running = running
        """What it occupies when it lives."""
        self.state: int = WAITING
        self.incarnation: int = 0
        self.restarts: int = 0
        """Restarts used."""
        self.start_failures: int = 0
        """Processes in a row that could not be started or died before they were ready."""
        self.worker: Worker | None = None
        self.waiting: Waiting | None = None
        self.held: dict[int, Calls] = {}
        """Calls by the incarnation they are meant for."""
        self.replay: list[TaskSpec] = []
        """Calls of earlier incarnations that the next one runs first."""
        self.before: dict[bytes, None] = {}
        """Calls that were sent to the present incarnation ahead of its callers' own numbering, in order."""
        self.ending = False
        """No handle is left: it ends when it has done what it was sent."""
        self.deadline: float = 0.0
        """When an actor that ends is killed if it has not gone and has nothing to do."""
        self.log = ActorLog(spec.checkpoint_every, follows=job.guest) if spec.checkpoint_every else None
        """What makes its state again, when it is to have checkpoints."""
        self.verdict = ""
        """Why it must not come back, if it must not: a name of errors.DeathCause."""

    def __repr__(self) -> str:
        return (
            f"<Actor {self.id.hex()[:12]} {self.shape.name} {STATE_NAMES[self.state]} incarnation {self.incarnation}>"
        )

    def fields(self, cause: str, worker: Worker | None, status: int | None) -> dict[str, Any]:
        """What errors about it say."""
        found: dict[str, Any] = {
            "actor_id": self.id.hex(),
            "class_name": self.shape.name,
            "name": self.spec.name,
            "namespace": self.spec.namespace,
            "cause": cause,
        }
        if worker is None:
            found["never_started"] = True
        else:
            found["worker"] = worker.number
            found["pid"] = worker.pid
            if status is not None:
                found["status"] = status
        return found


class ActorTable:
    """All actors of a node that are not dead, and why the dead ones died."""

    __slots__ = ("actors", "dead", "ending", "names", "queued")

    def __init__(self) -> None:
        self.actors: dict[bytes, ActorRecord] = {}
        self.names: dict[tuple[str, str], ActorRecord] = {}
        self.queued: dict[bytes, ActorRecord] = {}
        """Actors in state QUEUED, first come first placed."""
        self.dead: dict[bytes, tuple[str, dict[str, Any]]] = {}
        """(kind, fields) of the error that tells why."""
        self.ending: dict[bytes, ActorRecord] = {}
        """Actors without handles that have not gone yet."""

    def move(self, actor: ActorRecord, state: int) -> None:
        """Change the state of an actor and the books that follow from it."""
        old = actor.state
        if (old, state) not in MOVES:
            raise IllegalMove(f"{actor!r} cannot become {STATE_NAMES[state]}")
        actor.state = state
        if old == QUEUED:
            del self.queued[actor.id]
        if state == QUEUED:
            self.queued[actor.id] = actor
        elif state == DEAD:
            del self.actors[actor.id]
            self.ending.pop(actor.id, None)

    def _free_name(self, actor: ActorRecord, out: list[actions.Action]) -> None:
        key = (actor.spec.namespace, actor.spec.name)
        if self.names.get(key) is actor:
            del self.names[key]
            out.append(actions.NameFreed(*key))

    # -- made ----------------------------------------------------------------------------------------------------------

    def admit(self, actor: ActorRecord, reply: bytes, out: list[actions.Action]) -> bool:
        """Enter a new actor, unless its name is taken: then the reply says who bears it. False when it was not
        entered."""
        spec = actor.spec
        if actor.id in self.actors or actor.id in self.dead:
            return False
        if spec.name and not actor.job.guest:
            other = self.names.get((spec.namespace, spec.name))
            if other is not None:
                self.refuse_name(spec, other.id, reply, out)
                return False
            self.names[spec.namespace, spec.name] = actor
            if reply:
                out.append(actions.SealReply(reply, actor.id))
        self.actors[actor.id] = actor
        return True

    def refuse_name(self, spec: ActorSpec, bearer: bytes, reply: bytes, out: list[actions.Action]) -> None:
        """The name is another actor's: the reply says whose."""
        text = (
            f"The name {spec.name!r} (namespace {spec.namespace!r}) is taken by a living actor. "
            f"Choose another, or get the existing one with get_actor({spec.name!r})."
        )
        fields: dict[str, Any] = {
            "actor_id": spec.creation.id.hex(),
            "class_name": spec.class_name,
            "name": spec.name,
            "namespace": spec.namespace,
            "cause": "NOT_STARTED",
            "never_started": True,
            "message": text,
        }
        self.refuse(spec.creation.id, fields, out)
        if reply:
            out.append(
                actions.SealReply(reply, bearer)
                if spec.get_if_exists
                else actions.SealReply(reply, None, ("ValueError", {"message": text}))
            )

    def refuse(self, actor_id: bytes, fields: dict[str, Any], out: list[actions.Action]) -> None:
        """An actor that never was: whoever calls it learns why."""
        self._remember_death(actor_id, "ActorDiedError", fields)
        out.append(actions.ActorDown(actor_id, 0, False, "ActorDiedError", fields))

    def _remember_death(self, actor_id: bytes, kind: str, fields: dict[str, Any]) -> None:
        self.dead[actor_id] = (kind, fields)
        if len(self.dead) > _TOMBSTONES:
            del self.dead[next(iter(self.dead))]

    def lookup(self, name: str, namespace: str, reply: bytes, out: list[actions.Action]) -> None:
        """Answer who bears a name."""
        actor = self.names.get((namespace, name))
        if actor is not None:
            out.append(actions.SealReply(reply, actor.spec))
        else:
            where = f"actor {name!r} in namespace {namespace!r}"
            text = f"Failed to look up {where}: it was not created, has died, or lives in another namespace."
            out.append(actions.SealReply(reply, None, ("ValueError", {"message": text})))

    def begin(self, actor: ActorRecord, worker: Worker, out: list[actions.Action]) -> None:
        """Its process is ready: send the constructor, and the calls that come before all others."""
        self.move(actor, CONSTRUCTING)
        actor.start_failures = 0
        replay = self._take_replay(actor)
        actor.before = dict.fromkeys(spec.id for spec in replay)
        out.append(actions.BeginActor(worker.number, actor.spec, actor.incarnation, replay))

    def _take_replay(self, actor: ActorRecord) -> list[TaskSpec]:
        """The calls meant for earlier incarnations, in order."""
        replay, actor.replay = actor.replay, []
        for incarnation in sorted(actor.held):
            if incarnation < actor.incarnation:
                for _, _, calls in actor.held.pop(incarnation):
                    replay.extend(calls)
        return replay

    def host(self, actor: ActorRecord, slot: Worker, node: bytes, out: list[actions.Action]) -> None:
        """It shall live on another node: send it there with all calls that wait for it. That node runs it like one of its
        own, restarts included, and says when it lives and when it is gone."""
        replay = self._take_replay(actor)
        self.move(actor, CONSTRUCTING)
        self.move(actor, ALIVE)
        out.append(actions.HostActor(node, slot.number, actor.spec, actor.restarts, replay))
        for _, job, calls in actor.held.pop(actor.incarnation, ()):
            out.append(actions.CallAt(node, job, actor.id, calls))

    def constructed(self, actor: ActorRecord, worker: Worker, out: list[actions.Action]) -> None:
        """It lives: send it what waited, then publish its address, so that calls made from now on come after those."""
        self.move(actor, ALIVE)
        for process, _, calls in actor.held.pop(actor.incarnation, ()):
            out.append(actions.ForwardCalls(worker.number, process, actor.incarnation, calls))
        out.append(actions.ActorAlive(actor.id, actor.incarnation, worker.number))
        where = f"incarnation {actor.incarnation} in worker {worker.number}"
        out.append(actions.RecordEvent("actors", actor.id, "alive", where))

    # -- called --------------------------------------------------------------------------------------------------------

    def calls(
        self,
        actor_id: bytes,
        process: int,
        job: int,
        incarnation: int,
        calls: list[TaskSpec],
        out: list[actions.Action],
        lane: LaneTag | None = None,
    ) -> None:
        """Calls that came through the broker: forward, keep, or answer with the error that says why the actor is
        dead."""
        actor = self.actors.get(actor_id)
        if actor is None:
            kind, fields = self.dead.get(actor_id) or (
                "ActorDiedError",
                {"actor_id": actor_id.hex(), "cause": "UNKNOWN"},
            )
            for spec in calls:
                out.append(actions.SealError(spec.id, actions.UNKNOWN_RETURNS, kind, fields))
        elif actor.worker is not None and actor.worker.peer is not None:
            out.append(actions.CallAt(actor.worker.peer.id, job, actor_id, calls, lane))
        elif lane is not None:
            self._lane_calls(actor, job, calls, lane, out)
        elif actor.state == ALIVE and incarnation == actor.incarnation:
            assert actor.worker is not None
            out.append(actions.ForwardCalls(actor.worker.number, process, incarnation, calls))
        elif actor.state >= CONSTRUCTING and incarnation < actor.incarnation:
            # Meant for an incarnation that was over before they came, and too late to be replayed: outside of the
            # caller's new numbering.
            assert actor.worker is not None
            for spec in calls:
                spec.sequence = 0
                actor.before[spec.id] = None
            out.append(actions.ForwardCalls(actor.worker.number, process, actor.incarnation, calls))
        else:
            actor.held.setdefault(incarnation, []).append((process, job, calls))

    def _lane_calls(
        self, actor: ActorRecord, job: int, calls: list[TaskSpec], lane: LaneTag, out: list[actions.Action]
    ) -> None:
        """Calls of a caller on another node, who numbers those to one incarnation (`zray.lanes`)."""
        if actor.state == ALIVE and lane.incarnation == actor.incarnation:
            assert actor.worker is not None
            out.append(actions.ForwardCalls(actor.worker.number, lane.number, actor.incarnation, calls))
            return
        for spec in calls:
            spec.sequence = 0
        if lane.sent and lane.incarnation < actor.incarnation:
            # The one that is gone may have run them: they are its orphans.
            limit = actor.spec.max_task_retries
            again = []
            fields = actor.fields("UNKNOWN", actor.worker, None)
            for spec in calls:
                if limit >= 0 and spec.attempt >= limit:
                    out.append(actions.SealError(spec.id, actions.UNKNOWN_RETURNS, "ActorUnavailableError", fields))
                else:
                    out.append(actions.Reopen(spec, actions.UNKNOWN_RETURNS))
                    again.append(spec)
            calls = again
        if calls:
            self.calls(actor.id, 0, job, actor.incarnation, calls, out)

    # -- ended ---------------------------------------------------------------------------------------------------------

    def may_restart(self, actor: ActorRecord) -> bool:
        """Has it restarts left, and is it wanted?"""
        if actor.verdict or (actor.job.ended and not actor.spec.detached):
            return False
        return actor.spec.max_restarts < 0 or actor.restarts < actor.spec.max_restarts

    def process_lost(
        self,
        actor: ActorRecord,
        cause: str,
        status: int,
        orphans: list[TaskSpec],
        claimed: list[bytes] | None,
        out: list[actions.Action],
    ) -> None:
        """The process of this incarnation is gone: come back, or die. `orphans` as in events.WorkerExited."""
        worker, actor.worker = actor.worker, None
        if not self.may_restart(actor):
            self.die(actor, "ActorDiedError", actor.fields(actor.verdict or cause, worker, status), orphans, out)
            return
        actor.restarts += 1
        fields = actor.fields(cause, worker, status)
        if actor.log is not None:
            # What is logged is replayed for its effect, whatever it may cost: it may have been acknowledged.
            orphans = actor.log.lost(orphans)
            for spec in actor.log.unsealed.values():
                out.append(actions.Reopen(spec, actions.UNKNOWN_RETURNS))
        out.append(actions.ActorDown(actor.id, actor.incarnation, True, "ActorUnavailableError", fields))
        out.append(
            actions.RecordEvent("actors", actor.id, "restarting", f"incarnation {actor.incarnation} ended: {cause}")
        )
        limit = actor.spec.max_task_retries
        ran = None if claimed is None else set(claimed)
        for spec in self._in_order(actor, orphans):
            if (
                limit >= 0
                and spec.attempt >= limit
                and not (spec.id in actor.before and ran is not None and spec.id not in ran)
            ):
                out.append(actions.SealError(spec.id, actions.UNKNOWN_RETURNS, "ActorUnavailableError", fields))
                continue
            if ran is None or spec.id in ran:
                out.append(actions.Reopen(spec, actions.UNKNOWN_RETURNS))
            actor.replay.append(spec)
        actor.before = {}
        actor.incarnation += 1
        self.move(actor, QUEUED)

    def _in_order(self, actor: ActorRecord, orphans: list[TaskSpec]) -> list[TaskSpec]:
        """What came ahead of the callers' numbering first, in the order in which it was sent; then the rest as it
        stands."""
        if not actor.before:
            return orphans
        early = {spec.id: spec for spec in orphans if spec.id in actor.before}
        return [early[call] for call in actor.before if call in early] + [
            spec for spec in orphans if spec.id not in actor.before
        ]

    def start_lost(self, actor: ActorRecord, attempts: int, cause: str, status: int, out: list[actions.Action]) -> None:
        """Its process could not be started, or died before it was ready: try again, a bounded number of times; no
        restart is used."""
        worker, actor.worker = actor.worker, None
        actor.start_failures += 1
        if actor.verdict or (actor.job.ended and not actor.spec.detached):
            self.die(actor, "ActorDiedError", actor.fields(actor.verdict or cause, None, None), [], out)
        elif actor.start_failures >= attempts:
            fields = actor.fields(cause, worker, status)
            fields["never_started"] = True
            self.die(actor, "ActorDiedError", fields, [], out)
        else:
            self.move(actor, QUEUED)

    def die(
        self, actor: ActorRecord, kind: str, fields: dict[str, Any], orphans: list[TaskSpec], out: list[actions.Action]
    ) -> None:
        """For good: whoever calls, or has called, learns why."""
        self.move(actor, DEAD)
        self._free_name(actor, out)
        self._remember_death(actor.id, kind, fields)
        out.append(actions.ActorDown(actor.id, actor.incarnation, False, kind, fields))
        out.append(actions.RecordEvent("actors", actor.id, "dead", str(fields.get("cause", ""))))
        for spec in orphans:
            out.append(actions.SealError(spec.id, actions.UNKNOWN_RETURNS, kind, fields))
        for spec in actor.replay:
            out.append(actions.SealError(spec.id, actions.UNKNOWN_RETURNS, kind, fields))
        if actor.log is not None:
            for call in actor.log.unsealed:
                out.append(actions.SealError(call, actions.UNKNOWN_RETURNS, kind, fields))
            actor.log.close()
        for waiting in actor.held.values():
            for _, _, calls in waiting:
                for spec in calls:
                    out.append(actions.SealError(spec.id, actions.UNKNOWN_RETURNS, kind, fields))
        actor.replay = []
        actor.held = {}

    def condemn(self, actor: ActorRecord, verdict: str, out: list[actions.Action]) -> None:
        """It will die and not come back: its name is free from now on."""
        if not actor.verdict:
            actor.verdict = verdict
        self._free_name(actor, out)

    def keeps(self, key: bytes) -> bool:
        """Whether `key` is an actor that lives or is to live, or a call that is kept here for one."""
        if key in self.actors:
            return True
        for actor in self.actors.values():
            if actor.replay and any(spec.id == key for spec in actor.replay):
                return True
            if actor.held and any(
                spec.id == key for waiting in actor.held.values() for _, _, calls in waiting for spec in calls
            ):
                return True
        return False

    def wanted(self, actor: ActorRecord) -> bool:
        """Has it calls to answer that are kept here?"""
        return bool(actor.held or actor.replay or (actor.log is not None and actor.log.unsealed))

    # -- checking ------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check states against books and processes."""
        for actor_id, actor in self.actors.items():
            assert actor.id == actor_id
            assert actor.state != DEAD, f"{actor} is dead, but listed"
            assert (actor.state == QUEUED) == (actor_id in self.queued), f"{actor} is queued in one book only"
            assert (actor.state == WAITING) == (actor.waiting is not None), (
                f"{actor} and its missing arguments disagree"
            )
            assert (actor.state >= STARTING) == (actor.worker is not None), f"{actor} and its process disagree"
            if actor.worker is not None:
                assert actor.worker.actor is actor, f"{actor} lives in {actor.worker}, which does not know"
            assert actor.spec.max_restarts < 0 or actor.restarts <= actor.spec.max_restarts, (
                f"{actor} was restarted too often"
            )
            assert actor.restarts >= actor.incarnation, f"{actor} has used {actor.restarts} restarts"
            assert actor.state != ALIVE or actor.incarnation not in actor.held, f"{actor} lives, but calls wait for it"
            if actor.log is not None:
                actor.log.validate()
        for (namespace, name), actor in self.names.items():
            assert self.actors.get(actor.id) is actor, f"{name} is the name of a dead actor"
            assert (actor.spec.namespace, actor.spec.name) == (namespace, name)
        assert len(self.queued) == sum(actor.state == QUEUED for actor in self.actors.values())
        assert not any(actor_id in self.actors for actor_id in self.dead), "an actor is dead and alive"
