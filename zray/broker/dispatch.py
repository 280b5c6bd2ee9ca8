"""What runs next: matching tasks, actors and callers with workers and resources.

Covers the passes that follow an event after which something may run: actors are placed, tasks handed out, workers
started, leases taken back or granted, unclaimed tasks offered to idle workers. Does not cover what events mean
(`scheduler`) nor the policy itself (`placement`).

Each pass costs time in proportion to what it does plus the number of different demands that wait, not to the number of
tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zray.broker import actions
from zray.broker.actor_table import STARTING as ACTOR_STARTING
from zray.broker.dependencies import Waiting
from zray.broker.ledger import Demand, Ledger
from zray.broker.peers import Peer
from zray.broker.placement import Inputs, inputs_of
from zray.broker.task_table import Shared
from zray.broker.worker_pool import ACTOR, BUSY, IDLE, Kind, Worker
from zray.placing import SPREAD

if TYPE_CHECKING:
    from zray.broker.actor_table import ActorRecord
    from zray.broker.jobs import Job
    from zray.broker.node import Node
    from zray.broker.task_table import DemandClass, TaskQueue
    from zray.task import TaskSpec

_LOOK_AHEAD = 64
"""Tasks of one demand for which room is looked for in one pass: more workers than that are not started or freed at
once."""
_FETCHING = 2
"""Tasks for each CPU of this node that may wait for arguments on their way from other nodes."""
_LOOK_AGAIN = 0.02
"""Seconds after which a task that waits for the node of its inputs is looked at again."""
_LOOK_INTERVAL = 0.005
"""Seconds between two looks whether a job has its share of workers."""


class Dispatcher:
    """Decides what runs next on one node."""

    __slots__ = ("node",)

    def __init__(self, node: Node) -> None:
        self.node = node

    def run(self, now: float) -> None:
        """Do all that can be done now."""
        node = self.node
        if node.actors.queued:
            self._place_actors(now)
        if node.tasks.queued:
            self._hand_out(now)
        if node.tasks.queued:
            self._start_workers(now)
        if (node.tasks.queued or node.actors.queued) and node.leases.leased:
            self._take_back_leases(now)
        if node.leases.pending and not node.tasks.queued and not node.actors.queued:
            self._grant_leases(now)
        if node.pool.idle_count and node.pool.busy and not node.tasks.queued:
            self._share_out(now)

    # -- actors --------------------------------------------------------------------------------------------------------

    def _place_actors(self, now: float) -> None:
        node = self.node
        refused: set[bytes] = set()
        for actor in list(node.actors.queued.values()):
            demand = actor.shape.demand
            if demand.key in refused:
                continue
            nodes = node.nodes[:1] if actor.job.guest else node.nodes
            place = node.policy.place(demand, nodes, node.rng)
            if place >= 0:
                demand.last = nodes[place].id
            if place > 0:
                self._place_actor_at_peer(actor, place)
            elif place != 0:
                refused.add(demand.key)
            elif not self._place_actor(actor, now):
                return

    def _place_actor_at_peer(self, actor: ActorRecord, place: int) -> None:
        """Let an actor live on another node. Its calls may follow at once: they wait there."""
        node = self.node
        peer = node.nodes[place]
        assert isinstance(peer, Peer)
        actor.worker = node.pool.enter_slot(actor.job, actor.shape.demand, peer, actor)
        node.occupy(actor.worker, actor.shape.demand)
        node.actors.move(actor, ACTOR_STARTING)
        node.actors.host(actor, actor.worker, peer.id, node.out)

    def _place_actor(self, actor: ActorRecord, now: float) -> bool:
        """Give an actor a process of its own: an idle one without a past, or a new one. False when none can be started
        now."""
        node = self.node
        demand = actor.shape.demand
        worker = node.pool.fresh_for(actor.job, demand, node.ledger)
        if worker is not None:
            node.pool.move(worker, ACTOR)
            worker.actor = actor
        else:
            gpus = node.ledger.choose_gpus(demand)
            assert gpus is not None
            kind = (demand.threads, gpus)
            if not node.make_room(actor.job, kind, now):
                return False
            worker = node.start_worker(actor.job, kind, actor)
        node.occupy(worker, demand)
        worker.fresh = False
        actor.worker = worker
        node.actors.move(actor, ACTOR_STARTING)
        if worker.state == ACTOR:
            node.actors.begin(actor, worker, node.out)
        return True

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def _hand_out(self, now: float) -> None:
        """Hand tasks to idle workers, job by job in fairness, until nothing more fits."""
        node = self.node
        waiting = node.jobs.waiting
        if len(waiting) == 1:
            job = next(iter(waiting.values()))
            while job.queued and self._hand_one(job, now):
                pass
            return
        candidates = dict(waiting)
        while candidates:
            best = node.jobs.next(candidates.values())
            assert best is not None
            if not best.queued or not self._hand_one(best, now):
                del candidates[best.number]

    def _hand_one(self, job: Job, now: float) -> bool:
        """Hand one batch of this job's tasks to one idle worker; its kinds of demand take turns. False when nothing
        fits or no worker is idle."""
        node = self.node
        rotation = job.rotation
        if not node.pool.idle_count and not node.peers:
            return False
        for _ in range(len(rotation)):
            group = rotation[0]
            queue = group.first()
            if queue is None:
                rotation.popleft()
                group.listed = False
                continue
            rotation.rotate(-1)
            inputs = None if job.guest else self._inputs(queue, now)
            nodes = node.nodes[:1] if job.guest else node.nodes  # a guest was placed by the node that sent it
            place = node.policy.place(group.demand, nodes, node.rng, inputs)
            if place > 0:
                group.demand.last = node.nodes[place].id
                if self._hand_to_peer(job, group, queue, place, now, inputs is not None):
                    return True
                continue
            if place != 0:
                continue
            worker = node.pool.idle_for(job, group.demand, node.ledger)
            if worker is None:
                continue
            if len(group.queues) > 1:
                group.queues.rotate(-1)
            takers = node.pool.idle_of_kind(job, worker.kind)
            if takers > 1:
                takers = node.ledger.times(group.demand, takers)
            takers += node.pool.starting_for.get((job.number, worker.kind), 0)
            group.demand.last = node.ledger.id
            if self._hand(worker, queue, self._batch(queue, takers, inputs is not None), now):
                return True
        return False

    def _batch(self, queue: TaskQueue, takers: int, one: bool) -> int:
        """How many tasks go to one of so many workers; one where each task is placed for itself."""
        if one or queue.shape.demand.strategy.kind == SPREAD:
            return 1
        return self.node.policy.batch(queue.count, queue.shape.depth(self.node.config), takers)

    def _inputs(self, queue: TaskQueue, now: float) -> Inputs | None:
        """What the policy should know of the inputs of the next task; None when they are small or there is one node."""
        node = self.node
        if len(node.nodes) == 1:
            return None
        spec = queue.next()
        if spec is None or not spec.deps:
            return None
        demand = queue.shape.demand
        node.ledger.queued = node.tasks.queued
        for place in node.nodes:
            if place.fits(demand):
                place.full_since = -1.0
            elif place.full_since < 0:
                place.full_since = now
        found = inputs_of(spec.deps, node.nodes, node.locations, node.bandwidth, now)
        if found is not None:
            node.wake(now + _LOOK_AGAIN)
        return found

    def _hand_to_peer(self, job: Job, group: DemandClass, queue: TaskQueue, place: int, now: float, one: bool) -> bool:
        """Hand a batch of tasks to a new slot of another node. False when nothing came of it."""
        node = self.node
        peer = node.nodes[place]
        assert isinstance(peer, Peer)
        if len(group.queues) > 1:
            group.queues.rotate(-1)
        slot = node.pool.enter_slot(job, group.demand, peer)
        node.occupy(slot, group.demand)
        slot.queue = queue
        slot.since = now
        queue.takers += 1
        job.running += 1
        takers = max(1, peer.times(group.demand, _LOOK_AHEAD))
        found = self._hand(slot, queue, self._batch(queue, takers, one), now)
        if not slot.handed:  # what was queued had ended meanwhile, or lacks arguments
            node.retire(slot)
        return found

    def _hand(self, worker: Worker, queue: TaskQueue, count: int, now: float) -> bool:
        """Hand tasks to a worker or slot. False when nothing in the queue has changed by it."""
        node = self.node
        before = queue.count
        specs = node.tasks.take(queue, count, worker)
        if specs and node.locations:
            specs = self._hold_back(worker, queue, specs)
        if not specs:
            return queue.count < before
        if worker.state == IDLE:
            node.pool.move(worker, BUSY)
            node.occupy(worker, queue.shape.demand)
            worker.queue = queue
            worker.fresh = False
            queue.takers += 1
            queue.job.running += 1
            worker.since = now
        worker.handed.extend(specs)
        if worker.peer is None:
            node.out.append(actions.RunOn(worker.number, specs))
        else:
            node.out.append(actions.RunAt(worker.peer.id, worker.number, worker.job.number, specs))
        if node.story is not None:
            for spec in specs:
                node.story.tell(spec.id, f"{now:.6f} handed to worker {worker.number} (attempt {spec.attempt})")
        return True

    def _hold_back(self, worker: Worker, queue: TaskQueue, specs: list[TaskSpec]) -> list[TaskSpec]:
        """Of tasks that were just taken for a worker, return those that can be handed to it. The others lack arguments: those that were lost
        are waited for; those on other nodes are fetched when the worker is one of this node. So many fetch at a time as keep the CPUs busy;
        what is too much stays queued."""
        node = self.node
        places = node.locations
        local = worker.peer is None
        ready: list[TaskSpec] = []
        too_many: list[TaskSpec] = []
        for spec in specs:
            lost = tuple([dep for dep in spec.deps if places.lost(dep)])
            away = tuple([dep for dep in spec.deps if places.elsewhere(dep)]) if local and not lost else ()
            if not (lost or away) or node.tasks.home.get(spec.id) is not worker:
                ready.append(spec)
            elif away and node.dependencies.fetching >= _FETCHING * node.cpus:
                too_many.append(spec)
            else:
                waiting = Waiting(spec, queue, None, bool(away))
                waiting.fetching = bool(away)
                node.tasks.home[spec.id] = waiting
                node.dependencies.add(waiting, lost or away)
                if away:
                    node.out.append(actions.FetchObjects(list(away)))
        for spec in reversed(too_many):
            node.tasks.requeue(queue, spec)
        return ready

    def top_up(self, worker: Worker, now: float) -> None:
        """Keep a busy worker supplied, so that it need not wait for the broker between tasks; not while others have a
        claim to its CPU."""
        node = self.node
        queue = worker.queue
        if queue is None or not queue.count or worker.blocked or worker.ghosts or queue.parked:
            return
        if worker.peer is not None and worker.peer.silent:
            return
        if queue.shape.demand.strategy.kind == SPREAD or self._inputs(queue, now) is not None:
            return
        if node.tasks.queued != queue.count or node.actors.queued:
            return
        depth = queue.shape.depth(node.config)
        have = len(worker.handed)
        if 2 * have > depth:
            return
        takers = queue.takers + node.pool.idle_of_kind(queue.job, worker.kind)
        self._hand(worker, queue, node.policy.batch(queue.count, depth - have, takers), now)

    # -- processes -----------------------------------------------------------------------------------------------------

    def _start_workers(self, now: float) -> None:
        """Start workers for tasks that would fit, but for which no worker is idle or being started."""
        node = self.node
        room: Ledger | None = None
        spare: dict[tuple[int, Kind], int] = {}
        for job in sorted(node.jobs.waiting.values(), key=_turn):
            for group in job.rotation:
                demand = group.demand
                if not self._may_run_here(job, demand):
                    continue
                if room is None:
                    if not node.ledger.fits(demand):
                        continue
                    room = node.ledger.copy()
                    spare = dict(node.pool.starting_for)
                wanted = min(group.count, _LOOK_AHEAD)
                while wanted and room.fits(demand):
                    kind = _kind(demand, room)
                    if not self._start_or_count(job, kind, demand, spare, now):
                        break
                    room.take(demand, kind[1])
                    wanted -= 1
        if len(node.jobs.jobs) > 1 or any(len(job.rotation) > 1 for job in node.jobs.waiting.values()):
            self._start_for_fairness(now)

    def _may_run_here(self, job: Job, demand: Demand) -> bool:
        return demand.local or (job.guest and demand.refusal is None and self.node.ledger.could_run(demand))

    def _start_for_fairness(self, now: float) -> None:
        """Processes belong to jobs and kinds: a job that has too few could never take its turn when a CPU becomes free.
        Let each waiting job have its share of workers even while others use all CPUs."""
        node = self.node
        active = sum(1 for job in node.jobs.jobs.values() if job.queued or job.running)
        share = max(1, node.cpus // max(1, active))
        for job in sorted(node.jobs.waiting.values(), key=_turn):
            if now < job.next_look:
                continue
            job.next_look = now + _LOOK_INTERVAL
            for group in list(job.rotation):
                if not self._may_run_here(job, group.demand):
                    continue
                count = group.count
                kind = (group.demand.threads, node.ledger.emptiest_gpus(group.demand))
                if count and node.pool.able(job, kind) < min(count, share) and node.make_room(job, kind, now):
                    node.start_worker(job, kind)

    def _start_or_count(
        self, job: Job, kind: Kind, demand: Demand, spare: dict[tuple[int, Kind], int], now: float
    ) -> bool:
        """Count a worker that is being started, or start one. False when none may be started."""
        node = self.node
        key = (job.number, kind)
        if spare.get(key, 0):
            spare[key] -= 1
            return True
        if not demand.cpu and self._running_free(job) >= max(32, 4 * node.cpus):
            return False  # tasks that ask for no CPU fit without limit: processes must be limited in another way
        if not node.make_room(job, kind, now):
            return False
        node.start_worker(job, kind)
        return True

    def _running_free(self, job: Job) -> int:
        return sum(
            worker.job is job and worker.actor is None and worker.peer is None and not worker.blocked
            for worker in self.node.pool.workers.values()
        )

    # -- leases --------------------------------------------------------------------------------------------------------

    def _take_back_leases(self, now: float) -> None:
        """Take back as many leases as what waits needs, the oldest first."""
        node = self.node
        room = node.ledger.copy()
        for worker in node.leases.draining.values():
            _free(room, worker)
        leases = list(node.leases.leased.values())
        for demand, count in self._wanted():
            for _ in range(count):
                while not room.fits(demand):
                    lent = _overlapping(leases, demand)
                    if lent is None:
                        break
                    leases.remove(lent)
                    _free(room, lent)
                    node.revoke(lent, now)
                    node.leases.not_before = now + node.config.lease_cooldown
                if not room.fits(demand):
                    break
                room.take(demand, room.choose_gpus(demand) or ())

    def _wanted(self) -> list[tuple[Demand, int]]:
        node = self.node
        queued = [actor for actor in node.actors.queued.values() if actor.shape.demand.local]
        found = [(actor.shape.demand, 1) for actor in queued[:_LOOK_AHEAD]]
        for job in node.jobs.waiting.values():
            found.extend((group.demand, min(group.count, _LOOK_AHEAD)) for group in job.rotation if group.demand.local)
        return found

    def _grant_leases(self, now: float) -> None:
        """Lend idle workers to callers that asked, in the order in which they asked; start workers where only those
        lack."""
        node = self.node
        leases = node.leases
        if now < leases.not_before:
            node.wake(leases.not_before)
            return
        spare = dict(node.pool.starting_for)
        room = node.ledger.copy()
        for key, request in list(leases.pending.items()):
            demand = request.shape.demand
            if demand.refusal is not None:
                del leases.pending[key]
                continue
            if not room.fits(demand):
                continue
            worker = node.pool.idle_for(request.job, demand, node.ledger) if node.ledger.fits(demand) else None
            if worker is not None:
                del leases.pending[key]
                node.grant(worker, request.shape, request.process, request.reply, now)
                room.take(demand, worker.kind[1])
            else:
                kind = _kind(demand, room)
                if self._start_or_count(request.job, kind, demand, spare, now):
                    room.take(demand, kind[1])

    # -- sharing -------------------------------------------------------------------------------------------------------

    def _share_out(self, now: float) -> None:
        """Give idle workers copies of what others were handed and may not come to soon. Whoever claims first runs
        it."""
        node = self.node
        config = node.config
        late: list[Worker] = []
        for worker in node.pool.busy.values():
            if worker.peer is None and len(worker.handed) - worker.ghosts > 1:
                if worker.blocked or now - worker.since >= config.steal_after:
                    late.append(worker)
                else:
                    node.wake(worker.since + config.steal_after)
        while late:
            victim = node.policy.victim(late)
            if victim is None:
                return
            late.remove(victim)
            self._share_tasks_of(victim, now)

    def _share_tasks_of(self, victim: Worker, now: float) -> None:
        node = self.node
        queue = victim.queue
        assert queue is not None
        demand = queue.shape.demand
        if not node.ledger.fits(demand):
            return
        thief = node.pool.idle_for(queue.job, demand, node.ledger)
        if thief is None:
            return
        live = [spec for spec in victim.handed if node.tasks.counts(victim, spec.id)]
        late = [spec for spec in live[1:] if self._is_late(spec, now)]
        if not late:
            return
        specs = late[len(late) // 2 :]
        for spec in specs:
            node.tasks.share(spec, thief)
        node.pool.move(thief, BUSY)
        node.occupy(thief, demand)
        thief.queue = queue
        thief.fresh = False
        thief.since = now
        thief.handed.extend(specs)
        queue.takers += 1
        queue.job.running += 1
        node.out.append(actions.RunOn(thief.number, specs))
        if node.story is not None:
            for spec in specs:
                node.story.tell(spec.id, f"{now:.6f} copy to worker {thief.number}, also at {victim.number}")

    def _is_late(self, spec: TaskSpec, now: float) -> bool:
        """Do all who have the task lie still, and may it be that none of them runs it?"""
        since = now - self.node.config.steal_after
        home = self.node.tasks.home.get(spec.id)
        if type(home) is Shared and (home.queue is not None or home.begun):
            return False
        return all(
            (worker.blocked or worker.since <= since) and not self._is_first(worker, spec.id)
            for worker in self.node.tasks.holders(spec.id)
        )

    def _is_first(self, worker: Worker, task: bytes) -> bool:
        """Is this what the worker is running, as far as it has said? A further copy would be skipped, and offered again at once."""
        for spec in worker.handed:
            if self.node.tasks.counts(worker, spec.id):
                return spec.id == task
        return False


def _turn(job: Job) -> tuple[int, float]:
    return job.running, job.served


def _kind(demand: Demand, room: Ledger) -> Kind:
    gpus = room.choose_gpus(demand)
    assert gpus is not None
    return demand.threads, gpus


def _free(room: Ledger, worker: Worker) -> None:
    """What the room would be without this worker."""
    if worker.held is not None:
        if worker.lent:
            room.take_back(worker.held)
        room.give_back(worker.held, worker.kind[1])


def _overlapping(leases: list[Worker], demand: Demand) -> Worker | None:
    """The first lease whose worker holds something of what is wanted."""
    names = {name for name, _ in demand.items}
    for worker in leases:
        if worker.held is not None and any(name in names for name, _ in worker.held.items):
            return worker
    return None
