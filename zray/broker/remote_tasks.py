"""Tasks and calls that go to other nodes, and those that came from there.

Covers sending what the scheduler gives to a slot of another node and calls to actors that live elsewhere, running what other nodes sent
(*guests*), and reporting ends. Does not cover which task goes where (the scheduler), the actors themselves (`remote_actors`), objects
(`object_exchange`), or who is alive (`cluster`).

A guest is an ordinary task of this node's scheduler, of a job of its own (number with `GUEST_BIT`): its results are pending objects here, its
retries are used here, and when it has ended, however it did, the node that sent it gets the results and this one forgets them.

A call to an actor that is not here goes to the node that lent the handle, which runs it or sends it on in the same way: the actor's owner, at the
latest, knows where it lives. All calls of a node to an actor take one way and keep their order; so the actor is given them without numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from zray import _store, errors, failures, wire
from zray.broker import actions as a
from zray.broker import events as e
from zray.broker import peer_messages as pm
from zray.broker import walk
from zray.broker.jobs import GUEST_BIT
from zray.ids import return_id, task_of
from zray.task import TaskSpec

if TYPE_CHECKING:
    from collections.abc import Container

    from zray.broker.actor_table import ActorRecord
    from zray.broker.cluster import Cluster
    from zray.broker.object_sharing import ObjectSharing
    from zray.broker.server import Broker
    from zray.object_store import ObjectRef
    from zray.task import CallShape, LaneTag

_NO_ACTOR: Final = b""
_NEVER: Final = -1
"""An incarnation that no actor has."""
FROM_AFAR: Final = 0
"""Stands for the calling process where calls come from another node."""

Wrapped: TypeAlias = "pm.RunTasks | pm.CallActorAway | pm.HostActor | pm.AdoptActor | pm.AskLease | pm.RunOnLane"
"""Messages with which shapes and objects travel."""

_encode = msgspec.msgpack.Encoder().encode


class _Guest:
    """A task that another node sent."""

    __slots__ = ("inputs", "job", "node", "results", "slot")

    def __init__(self, node: bytes, slot: int, job: int, results: list[ObjectRef], inputs: list[ObjectRef]) -> None:
        self.node = node
        self.slot = slot
        self.job = job
        self.results = results
        self.inputs = inputs
        """What it needs. New results hold this as well; those that were known before do not."""


def _specs(message: Wrapped) -> list[TaskSpec]:
    """The tasks and calls in a message."""
    if isinstance(message, (pm.RunTasks, pm.RunOnLane)):
        return message.tasks
    if isinstance(message, pm.AskLease):
        return [TaskSpec(b"", message.shape)]
    if isinstance(message, pm.CallActorAway):
        return message.calls
    if isinstance(message, pm.HostActor):
        return [message.spec.creation, *message.logged, *message.replay]
    return [message.spec.creation]


class _Away:
    """A call that was sent to an actor on another node, or (without an actor) a task that went there over a lane."""

    __slots__ = ("actor", "call", "job", "num_returns")

    def __init__(self, actor: bytes, call: TaskSpec, num_returns: int, job: int) -> None:
        self.actor = actor
        self.call = call
        self.num_returns = num_returns
        self.job = job


class RemoteTasks:
    """One broker's dealings in tasks with other nodes."""

    def __init__(self, broker: Broker, cluster: Cluster, sharing: ObjectSharing) -> None:
        self._broker = broker
        self._store = broker.store
        self._cluster = cluster
        self._sharing = sharing
        self._guests: dict[bytes, _Guest] = {}
        self._homes: dict[int, bytes] = {}
        """Node of the driver of each job that has had guests here."""
        self._functions: dict[int, dict[bytes, ObjectRef]] = {}
        """Code of each such job."""
        self._away: dict[bytes, dict[bytes, _Away]] = {}
        """Calls to actors that were sent to each node and have not ended, in order."""
        self._packed: tuple[bytes, int, bytes, LaneTag | None, list[TaskSpec]] | None = None
        """(node, job, actor, lane, calls): calls that leave in one message, unless something else is sent before."""
        cluster.before_sending = self.flush
        self._twofold: dict[bytes, tuple[int, list[ObjectRef]]] = {}
        """Calls and tasks that may come to a worker here over a lane as well: which one, and the results, which are kept until it has said what became of
        them there. Without them it would take what comes later for something new, were the first ended by somebody else."""
        self._over: dict[int, str] = {}
        """Jobs that are over, and why: what other nodes had sent for them before they heard of it may come later."""
        self._told: dict[bytes, set[bytes]] = {}
        """Shapes that each node was told of."""
        self._code_at: dict[tuple[bytes, int], set[bytes]] = {}
        """Code that each node was lent for each job: it keeps that as long as the job lasts."""

    @property
    def guests(self) -> int:
        """Tasks of other nodes that have not ended here."""
        return len(self._guests)

    def describe(self) -> list[str]:
        """What other nodes sent here and what was sent to them, as far as it has not ended."""
        return [
            *(
                f"{task.hex()} came from {guest.node.hex()[:8]}: {[self._told_of(ref) for ref in guest.results]}"
                for task, guest in self._guests.items()
            ),
            *(f"{call.hex()} went to {node.hex()[:8]}" for node, calls in self._away.items() for call in calls),
        ]

    def _told_of(self, ref: ObjectRef) -> str:
        if self._exists(ref):
            return "there"
        target, claimant = self._store.makers(ref)
        return f"missing, attempt {self._store.attempt(ref)} for process {target}, claimed by {claimant}"

    @property
    def code_borrowed(self) -> int:
        """Borrowed objects that are code: kept for as long as its job lasts, whoever refers to it."""
        borrowed = self._sharing.lending.borrowed
        return len({name for code in self._functions.values() for name in code if name in borrowed})

    # -- sending ------------------------------------------------------------------------------------------------------

    def run_at(self, action: a.RunAt) -> None:
        """Send tasks to another node: those that nobody here has begun, or ended before he could say so."""
        broker = self._broker
        tasks: list[TaskSpec] = []
        begun: list[TaskSpec] = []
        for spec in action.tasks:
            (tasks if self._leave(spec) else begun).append(spec)
        if begun:
            names, skipped = [spec.id for spec in begun], bytes([wire.DONE_SKIPPED]) * len(begun)
            broker.tell(e.TasksFinished(action.slot, names, skipped, [0] * len(begun), False))
        if not tasks:
            return
        job = broker.job_specs[action.job]
        for spec in tasks:
            self._sharing.sent(spec, action.job)
            if broker.walk is not None:
                broker.walk.note("tasks", spec.id, walk.PLACED, action.node.hex())
        shapes, lent = self.wrap(action.node, job.number, tasks)
        places = self._sharing.places_of(lent)
        self._cluster.send(
            action.node, pm.RunTasks(job, self.home_of(job.number), action.slot, shapes, tasks, lent, places)
        )

    def _results_of(self, spec: TaskSpec) -> list[ObjectRef]:
        return self._broker.performer.results(spec.id, self._broker.shapes[spec.shape].num_returns)

    def _leave(self, spec: TaskSpec) -> bool:
        """Let nobody here begin a task any more: it is about to be sent away. False when it has begun, or all its results are there.

        A worker that waits may have a copy behind what it runs, and may go on at any time."""
        left = [self._store.send_away(ref) for ref in self._results_of(spec)]  # of all
        return any(left)

    def _is_open(self, spec: TaskSpec) -> bool:
        """Whether any result of a task is neither there nor being made by somebody here."""
        return any(self._store.state(ref) == _store.STATE_PENDING for ref in self._results_of(spec))

    @staticmethod
    def driver_job(job: int) -> int:
        """The job of the driver for which a job of guests works; any other is one itself."""
        return job & ~GUEST_BIT

    def home_of(self, job: int) -> bytes:
        """The node of a job's driver."""
        return self._homes.get(job, self._cluster.own)

    def wrap(self, node: bytes, job: int, tasks: list[TaskSpec]) -> tuple[list[CallShape], list[bytes]]:
        """What must travel with tasks of a job: shapes that the node was not told of, and objects, which are lent to it. The message must be the next
        one to the node: later ones count on it. (So what is packed leaves first.)"""
        self.flush()
        told = self._told.setdefault(node, set())
        code = self._code_at.setdefault((node, job), set())
        shapes: list[CallShape] = []
        names: dict[bytes, None] = {}
        for spec in tasks:
            shape = self._broker.shapes.get(spec.shape)
            if shape is None:
                continue
            if spec.shape not in told:
                told.add(spec.shape)
                shapes.append(shape)
            if shape.function not in code:
                code.add(shape.function)
                names[shape.function] = None
                if self._broker.walk is not None and shape.function:
                    self._broker.walk.note("functions", shape.function, walk.CODE_SENT, node.hex())
            for name in (*spec.deps, *spec.borrowed):
                names[name] = None
        refs = [ref for name in names if name and (ref := self._store.reference(name)) is not None]
        return shapes, self._sharing.lend(node, refs)

    def call_away(self, job: int, actor: bytes, calls: list[TaskSpec], lane: LaneTag | None = None) -> bool:
        """Send calls to an actor on their way to another node; False when it is not on another node, as far as is known."""
        node = self._sharing.lending.borrowed.get(actor)
        if node is None or job not in self._broker.job_specs:
            return False
        self.call_at(node, job, actor, calls, lane)
        return True

    def call_at(self, node: bytes, job: int, actor: bytes, calls: list[TaskSpec], lane: LaneTag | None = None) -> None:
        """Send calls of a job to an actor on a node, or on their way to it."""
        packed = self._packed
        if packed is not None and packed[:4] == (node, job, actor, lane):
            packed[4].extend(calls)
        else:
            self.flush()
            self._packed = node, job, actor, lane, list(calls)

    def flush(self) -> None:
        """Let packed calls leave."""
        if self._packed is None:
            return
        (node, job, actor, lane, calls), self._packed = self._packed, None
        spec = self._broker.job_specs[job]
        shapes, lent = self.wrap(node, spec.number, calls)
        self.note_away(node, actor, calls, job)
        self._cluster.send(node, pm.CallActorAway(spec, self.home_of(spec.number), actor, shapes, calls, lent, lane))

    def note_away(self, node: bytes, actor: bytes, calls: list[TaskSpec], job: int) -> None:
        """These calls of a job are about to be sent to a node."""
        under_way = self._away.setdefault(node, {})
        for call in calls:
            under_way[call.id] = _Away(actor, call, self._broker.shapes[call.shape].num_returns, self.driver_job(job))

    def went_over_lane(self, node: bytes, job: int, lane: int, tasks: list[TaskSpec]) -> None:
        """Tasks of a job went over a lane to a leased worker of a node, and their caller has had no answer."""
        tasks = [spec for spec in tasks if self._is_open(spec)]
        if not self._cluster.knows(node):
            for spec in tasks:
                self._lost_with_node(spec, job, "it is not in the cluster any more")
            return
        job_spec = self._broker.job_specs.get(job)
        if job_spec is None or not tasks:
            return
        for spec in tasks:
            self._sharing.sent(spec, job)
        shapes, lent = self.wrap(node, job_spec.number, tasks)
        self.note_away(node, _NO_ACTOR, tasks, job)
        home = self.home_of(job_spec.number)
        self._cluster.send(node, pm.RunOnLane(job_spec, home, lane, shapes, tasks, lent))

    def _lost_with_node(self, spec: TaskSpec, job: int, reason: str) -> None:
        """A task went over a lane to a node that is dead: run it again, if it may."""
        shape = self._broker.shapes[spec.shape]
        if shape.max_retries < 0 or spec.attempt < shape.max_retries:
            spec.attempt += 1
            spec.sequence = 0
            for ref in self._results_of(spec):
                self._store.retry(ref, 0)
            self._broker.submit_again(job, spec)
        else:
            text = f"The node that ran it is dead: {reason}"
            fields: dict[str, object] = {"message": text, "function_name": shape.name}
            self._broker.performer.seal_error(a.SealError(spec.id, shape.num_returns, "NodeDiedError", fields))

    def keeps(self, call: bytes) -> bool:
        """Whether a call is under way to another node: its end will be told."""
        self.flush()
        return any(call in calls for calls in self._away.values())

    def take_away_calls(self, node: bytes, actors: Container[bytes]) -> dict[bytes, list[TaskSpec]]:
        """A node is dead: take out the calls to these actors that were sent there and have not ended, by actor, in order."""
        self.flush()
        found: dict[bytes, list[TaskSpec]] = {}
        calls = self._away.get(node, {})
        for away in [away for away in calls.values() if away.actor in actors]:
            found.setdefault(away.actor, []).append(away.call)
            del calls[away.call.id]
        return found

    def kill_away(self, actor: bytes, no_restart: bool) -> bool:
        """Have an actor on another node killed; False when it is not on another node."""
        node = self._sharing.lending.borrowed.get(actor)
        if node is not None:
            self._cluster.send(node, pm.KillActorAway(actor, no_restart))
        return node is not None

    def cancel_call(self, task: bytes, force: bool) -> None:
        """A call may be under way to another node: tell it that nobody waits."""
        self.flush()
        for node, calls in self._away.items():
            if task in calls:
                self._cluster.send(node, pm.CancelAway(task, force))

    def cancel_at(self, action: a.CancelAt) -> None:
        """Tell the node that runs a task that nobody waits for it."""
        self._cluster.send(action.node, pm.CancelAway(action.task, action.force))

    # -- running what others sent ---------------------------------------------------------------------------------------

    def run(self, node: bytes, message: pm.RunTasks) -> None:
        """Take in tasks of another node."""
        broker = self._broker
        job = message.job.number
        guest_job = GUEST_BIT | job
        if self._is_over_for(message):
            for shape in message.shapes:  # they are not told again, whichever job names them
                broker.shapes[shape.key] = shape
            if message.lent:
                self._cluster.send(node, pm.GiveBack(message.lent))
            return
        lent = self.unwrap(node, message)
        missing = []
        code: dict[bytes, tuple[bytes, ...]] = {}
        """By function: its code, if that is not here yet."""
        for spec in message.tasks:
            shape = broker.shapes[spec.shape]
            held = [lent[name] for name in (*spec.deps, *spec.borrowed) if name in lent] if lent else []
            results = self._expect(spec, shape.num_returns, held, None)
            self._guests[spec.id] = _Guest(node, message.slot, guest_job, results, held)
            if shape.function not in code:
                self.keep_function(job, shape.function, lent)
                code[shape.function] = broker._missing((shape.function,))
            if broker.walk is not None:
                broker.walk.note("tasks", spec.id, walk.RECEIVED, node.hex())
                broker.walk.lacking(spec.id, spec.deps)
            lacking = code[shape.function]
            missing.append((*lacking, *broker._missing(spec.deps)) if spec.deps else lacking)
        broker.tell(e.TasksSubmitted(guest_job, 0, b"", message.tasks, missing if any(missing) else None))
        self.look_at([spec.id for spec in message.tasks])  # what cannot run has ended already

    def keep_function(self, job: int, function: bytes, lent: dict[bytes, ObjectRef]) -> None:
        """Keep code for as long as its job lasts."""
        if function in lent:
            self._functions.setdefault(job, {})[function] = lent[function]

    def unwrap(self, node: bytes, message: Wrapped) -> dict[bytes, ObjectRef]:
        """Take in what travels with tasks; return the objects that were lent."""
        broker = self._broker
        self._admit(message)
        for shape in message.shapes:
            broker.shapes[shape.key] = shape
        # The scheduler may have forgotten shapes of jobs that are over; the other node does not say again what it said once.
        known = broker.scheduler.node.tasks.shapes
        forgotten = {spec.shape for spec in _specs(message) if spec.shape not in known} - {
            s.key for s in message.shapes
        }
        shapes = [*message.shapes, *(broker.shapes[key] for key in sorted(forgotten) if key in broker.shapes)]
        if shapes:
            broker.records.shapes_defined(shapes)
            broker.tell(e.ShapesDefined(shapes))
        places = message.places if isinstance(message, pm.RunTasks) else []
        return {ref.binary(): ref for ref in self._sharing.borrow(node, message.lent, places)}

    def call(self, node: bytes, message: pm.CallActorAway) -> None:
        """Take in calls of another node to an actor that lives here, or further on."""
        broker = self._broker
        lent = self.unwrap(node, message)
        self.expect_calls(node, message.job.number, message.actor, message.calls, lent, message.lane is not None)
        # Who has lent a handle to this node may have sent the actor itself here since.
        elsewhere = broker.is_elsewhere(message.actor)
        if not elsewhere or not self.call_away(message.job.number, message.actor, message.calls, message.lane):
            actor = broker.scheduler.node.actors.actors.get(message.actor)
            incarnation = 0 if actor is None else actor.incarnation
            lane = message.lane
            if lane is not None and actor is not None and self._is_over(lane, actor):
                lane = msgspec.structs.replace(lane, incarnation=_NEVER)  # its numbers are forgotten
            elif lane is not None and lane.sent and actor is not None and actor.worker is not None:
                for call in message.calls:
                    self._twofold[call.id] = actor.worker.number, self._guests[call.id].results
            broker.queue_calls(
                e.ActorCallsQueued(FROM_AFAR, message.job.number, message.actor, incarnation, message.calls, lane)
            )
        self.end_again(message.job.number)
        self.look_at([call.id for call in message.calls])

    def _is_over(self, lane: LaneTag, actor: ActorRecord) -> bool:
        """Whether a lane to an actor that lives here has ended: its caller is dead, and what it had sent through its broker comes later."""
        here = actor.worker is not None and actor.worker.peer is None
        return here and self._broker.lanes is not None and not self._broker.lanes.leads_here(lane.number)

    def expect_calls(
        self,
        node: bytes,
        job: int,
        actor: bytes,
        calls: list[TaskSpec],
        lent: dict[bytes, ObjectRef],
        numbered: bool = False,
    ) -> None:
        """Make the pending results of calls that another node has sent. They have come in order, unless they are `numbered`."""
        life = self._store.reference(actor)
        for call in calls:
            if not numbered:
                call.sequence = 0
            held = [lent[name] for name in (*call.deps, *call.borrowed) if name in lent]
            if life is not None:
                held.append(life)
            results = self._expect(call, self._broker.shapes[call.shape].num_returns, held, _encode(call))
            self._guests[call.id] = _Guest(node, 0, GUEST_BIT | job, results, held)

    def take_over(self, node: bytes, message: pm.RunOnLane, worker: int) -> None:
        """See to tasks that went to a worker of this node over a lane: it runs them, has run them, or they never came. `worker`: 0 when it is dead."""
        broker = self._broker
        job = message.job.number
        guest_job = GUEST_BIT | job
        lent = self.unwrap(node, message)
        for spec in message.tasks:
            shape = broker.shapes[spec.shape]
            ref = self._store.reference(return_id(spec.id, 0))
            taken = ref is not None and not self._store.marks(ref) & _store.MARK_REMOTE
            spec.sequence = 0
            if not taken and not worker:  # it may have been run
                spec.attempt += 1
            results = self._expect(spec, shape.num_returns, [], _encode(spec))
            self._guests[spec.id] = _Guest(node, 0, guest_job, results, [])
            self.keep_function(job, shape.function, lent)
            if taken:
                continue
            if worker:
                self._twofold[spec.id] = worker, results
            if shape.max_retries >= 0 and spec.attempt > shape.max_retries:
                fields: dict[str, object] = {"task_id": spec.id.hex(), "function_name": shape.name}
                error = a.SealError(spec.id, shape.num_returns, "WorkerCrashedError", fields)
                broker.performer.seal_error(error)
            else:
                broker.tell(e.TasksSubmitted(guest_job, 0, b"", [spec], None))
        self.end_again(job)
        self.look_at([spec.id for spec in message.tasks])

    def _admit(self, message: Wrapped) -> None:
        """Let the job of guests be known: as a job of guests, and for what they submit themselves."""
        broker = self._broker
        job = message.job.number
        guest_job = GUEST_BIT | job
        self._is_over_for(message)
        if guest_job in broker.scheduler.node.jobs.jobs:
            return
        if job not in broker.scheduler.node.jobs.jobs:
            self._homes[job] = message.home
            broker.job_specs[job] = message.job
            broker.tell(e.JobStarted(message.job, 0))
        broker.job_specs[guest_job] = message.job
        broker.tell(e.JobStarted(msgspec.structs.replace(message.job, number=guest_job), 0, guest=True))

    def _is_over_for(self, message: Wrapped) -> bool:
        """Whether the job of what has come is over: it was told, or the node of its driver is dead, which the sender may not know yet."""
        job = message.job.number
        if job not in self._over:
            reason = self._cluster.neighbours.dead.get(message.home)
            if reason is None:
                return False
            self._over[job] = f"the node of its driver is dead: {reason}"
        return True

    def _expect(self, spec: TaskSpec, num_returns: int, held: list[ObjectRef], body: bytes | None) -> list[ObjectRef]:
        """Make the pending results of a guest, of one attempt. Those that this node has borrowed are its own to make from now on; they may have come
        to a later attempt than the task: then it is of that one here."""
        refs = []
        newest = spec.attempt
        known = False
        for index in range(num_returns or 1):
            name = return_id(spec.id, index)
            ref = self._sharing.make_here(name)
            if ref is None:
                ref = self._store.expect(name, 0, [] if index else held, None if index else body, "")
                newest += self._store.attempt(ref)  # it may have come over a lane just now
            else:
                known = True
            refs.append(ref)
        if not known and not newest:
            return refs
        pending = [ref for ref in refs if not self._store.done(ref)]
        spec.attempt = max([spec.attempt, *(self._store.attempt(ref) for ref in pending)])
        for ref in pending:
            while self._store.attempt(ref) < spec.attempt and self._store.retry(ref, 0) is not None:
                pass
        return refs

    def look_at(self, tasks: list[bytes], statuses: bytes = b"", micros: list[int] | None = None) -> None:
        """Some tasks may have ended: report those that are guests. One whose results are there, but whose worker has not said so,
        still occupies what it needs: it is reported a moment later, with what is free then."""
        if not self._guests:
            return
        scheduler = self._broker.scheduler
        ended: dict[bytes, list[tuple[bytes, int, int]]] = {}
        for task, index in {task: index for index, task in enumerate(tasks)}.items():  # one may be told of twice
            guest = self._guests.get(task)
            if guest is None or (guest.slot and scheduler.keeps_task(task)):
                continue
            results = guest.results
            if not self._exists(results[0]) or (len(results) > 1 and not all(self._exists(ref) for ref in results)):
                continue
            if guest.slot or not scheduler.keeps(task):
                status = statuses[index] if statuses else wire.DONE_ERROR
                ended.setdefault(guest.node, []).append((task, status, micros[index] if micros else 0))
        if ended and self._broker.output is not None:
            self._broker.output.send_new()
        for node, ends in ended.items():
            self._report(node, ends)

    def _exists(self, ref: ObjectRef) -> bool:
        """Whether a result is there, or (of a call that was sent on) kept on another node."""
        return self._store.done(ref) or self._sharing.locations.elsewhere(ref.binary())

    def told(self, worker: int, tasks: list[bytes]) -> None:
        """A worker has said what became of these."""
        if self._twofold:
            for task in tasks:
                if task in self._twofold and self._twofold[task][0] == worker:
                    del self._twofold[task]

    def worker_gone(self, worker: int) -> None:
        """A worker has died: what it had ended, its reports may have died with it. (Tasks that the scheduler keeps are handed out once more,
        and reported as what they are. Calls that went straight to an actor nobody else remembers.)"""
        for task in [task for task, (number, _) in self._twofold.items() if number == worker]:
            del self._twofold[task]
        self.look_at(list(self._guests))

    def _report(self, node: bytes, ends: list[tuple[bytes, int, int]]) -> None:
        results: list[ObjectRef] = []
        slots = []
        for task, _, micros in ends:
            if self._broker.walk is not None:
                self._broker.walk.note("tasks", task, walk.RAN, f"{micros} us")
            guest = self._guests.pop(task)
            slots.append(guest.slot)
            results += guest.results
        values, kept = self._sharing.results(node, results)
        self._cluster.send(
            node,
            pm.TasksEnded(
                [task for task, _, _ in ends],
                slots,
                bytes(status for _, status, _ in ends),
                [micros for _, _, micros in ends],
                values,
                kept,
                self._broker._own_load(),
            ),
        )

    def cancel(self, node: bytes, message: pm.CancelAway) -> None:
        """Nobody waits for a guest any more."""
        guest = self._guests.get(message.task)
        if guest is not None and guest.node == node:
            self._broker.cancel(wire.CancelTask(message.task, message.force, True))
            self.look_at([message.task])

    # -- ends of what was sent ------------------------------------------------------------------------------------------

    def ended(self, node: bytes, message: pm.TasksEnded) -> None:
        """Tasks that were sent to a node have ended there."""
        calls = self._away.get(node)
        if calls:
            for task in message.ids:
                calls.pop(task, None)
        self._sharing.gather()
        try:
            for value in message.values:
                self._sharing.exchange.received(node, value)
        finally:
            self._sharing.tell_gathered()
        kept: dict[bytes, list[bytes]] = {}
        for place in message.kept:
            kept.setdefault(task_of(place.id), []).append(place.id)
            self._sharing.located(node, place, True)
        self._sharing.tasks_ended(message.ids, kept, message.micros)
        if self._broker.walk is not None:
            for task in message.ids:
                self._broker.walk.note("tasks", task, walk.RETURNED, node.hex())
        for slot in dict.fromkeys(message.slots):
            ids, statuses, micros = message.of_slot(slot)
            worker = self._broker.scheduler.node.pool.workers.get(slot)  # none: these were calls to an actor
            if worker is not None:
                self._broker.records.tasks_finished(worker.job.number, slot, ids, statuses, micros)
            self._broker.tell(e.TasksFinished(slot, ids, statuses, micros, False))

    # -- ends of jobs and nodes -----------------------------------------------------------------------------------------

    def job_over(self, job: int, reason: str) -> None:
        """A driver has ended, here or on another node: so do the tasks here that others sent for it."""
        self._over[job] = reason
        self._functions.pop(job, None)
        self.forget_code(job)
        self._sharing.job_over(job)
        if self._broker.lanes is not None:
            self._broker.lanes.job_over(job)
        for task in [task for task, guest in self._guests.items() if guest.job == GUEST_BIT | job]:
            del self._guests[task]
        self.end_again(job)
        self._end_calls(job, reason)

    def end_again(self, job: int) -> bool:
        """If a job is over that what has just been taken in has begun anew, end it: nobody will tell of that once more. Whether it is."""
        reason = self._over.get(job)
        if reason is None:
            return False
        self._homes.pop(job, None)
        for number in (GUEST_BIT | job, job):
            if number in self._broker.job_specs:
                self._broker.tell(e.JobEnded(number, reason))
        return True

    def _end_calls(self, job: int, reason: str) -> None:
        """A job is over: where its calls went nobody will tell of their ends."""
        self.flush()
        fields: dict[str, object] = {"message": f"The job of this call is over: {reason}"}
        for calls in self._away.values():
            for away in [away for away in calls.values() if away.job == job]:
                del calls[away.call.id]
                self._broker.performer.seal_error(
                    a.SealError(away.call.id, away.num_returns, "TaskCancelledError", fields)
                )

    def forget_code(self, job: int) -> None:
        """A job is over: no node keeps its code."""
        for key in [key for key in self._code_at if key[1] == job]:
            del self._code_at[key]

    def node_gone(self, node: bytes, reason: str) -> None:
        """A node is dead: the jobs of its drivers end, and so does what else it sent, unless somebody here waits for it."""
        self._told.pop(node, None)
        for key in [key for key in self._code_at if key[0] == node]:
            del self._code_at[key]
        for job in [job for job, home in self._homes.items() if home == node]:
            self.job_over(job, f"the node of its driver is dead: {reason}")
        for task, away in self._away.pop(node, {}).items():
            if not away.actor:
                self._lost_with_node(away.call, away.job, reason)
                continue
            fields: dict[str, object] = {"message": f"The actor's node is dead: {reason}"}
            self._broker.performer.seal_error(a.SealError(task, away.num_returns, "ActorDiedError", fields))
        for task in [task for task, guest in self._guests.items() if guest.node == node]:
            self._orphaned(task, self._guests.pop(task), reason)

    def _orphaned(self, task: bytes, guest: _Guest, reason: str) -> None:
        """The node that sent a guest is dead. Somebody here may have got references to its results: then it runs on for him. Else it ends."""
        if any(self._store.references(ref) > 1 for ref in guest.results):
            return
        # A reference may be on its way here still.
        error = errors.OwnerDiedError.for_id(guest.results[0].binary(), f"the node that asked for it is dead: {reason}")
        self._broker.cancel(wire.CancelTask(task, True, True), guest.results, failures.dump(failures.from_error(error)))
