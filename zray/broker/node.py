"""What the parts of the scheduler share: the books of one node, and the few changes that touch several of them at once.

Covers occupying and vacating resources together with a worker's state, starting and ending workers, and sealing errors.
Does not cover deciding: `dispatch` decides what runs, `scheduler` what an event means.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from zray import placing
from zray.broker import actions
from zray.broker.actor_table import ActorRecord, ActorTable
from zray.broker.bundles import BundleTable
from zray.broker.dependencies import Dependencies
from zray.broker.jobs import Job, JobTable
from zray.broker.leases import LeaseTable
from zray.broker.ledger import CPU, GPU, ONE, ClosedLedger, Demand, Ledger
from zray.broker.peers import Peer
from zray.broker.placement import BANDWIDTH, Locations, NothingKnown
from zray.broker.settings import SchedulerConfig
from zray.broker.task_table import ShapeState, TaskTable
from zray.broker.worker_pool import (
    ACTOR,
    BUSY,
    DEAD,
    DRAINING,
    DYING,
    IDLE,
    LEASED,
    STARTING,
    STOPPING,
    Kind,
    Worker,
    WorkerPool,
)

if TYPE_CHECKING:
    from zray.broker.placement import Policy

NEVER = float("inf")
_BUNDLE_COOLDOWN_S = 0.2
"""No lease is granted for so long after a bundle found no room: the head tries again sooner."""


class Story:
    """The last things that happened to each task or actor, for people; bounded."""

    __slots__ = ("_lines",)

    KEYS = 20_000
    LINES = 40

    def __init__(self) -> None:
        self._lines: dict[bytes, list[str]] = {}

    def tell(self, key: bytes, line: str) -> None:
        """Add a line to the story of `key`."""
        lines = self._lines.get(key)
        if lines is None:
            if len(self._lines) >= self.KEYS:
                del self._lines[next(iter(self._lines))]
            lines = self._lines[key] = []
        lines.append(line)
        if len(lines) > self.LINES:
            del lines[1]

    def of(self, key: bytes) -> list[str]:
        """Return the story of `key`: its first line, then the latest ones."""
        return list(self._lines.get(key, ()))


class Node:
    """The books of one node."""

    __slots__ = (
        "actors",
        "bandwidth",
        "bundles",
        "by_process",
        "config",
        "cpus",
        "dead",
        "dependencies",
        "interrupted",
        "jobs",
        "leases",
        "ledger",
        "locations",
        "newly_named",
        "nodes",
        "out",
        "peers",
        "policy",
        "pool",
        "refusals",
        "rng",
        "story",
        "tasks",
        "wake_at",
    )

    def __init__(
        self,
        total: dict[str, float],
        config: SchedulerConfig,
        policy: Policy,
        rng: Random,
        own: bytes = b"",
        labels: dict[str, str] | None = None,
        locations: Locations | None = None,
    ) -> None:
        self.config = config
        self.policy = policy
        self.rng = rng
        self.locations: Locations = NothingKnown() if locations is None else locations
        self.bandwidth: float = BANDWIDTH
        """Bytes a second at which values move between nodes, on average."""
        self.ledger = ClosedLedger(total, own, labels) if config.runs_nothing else Ledger(total, own, labels)
        self.peers: dict[bytes, Peer] = {}
        """Other nodes that live, by id."""
        self.dead: dict[bytes, str] = {}
        """Nodes that were seen here and died, and why. Ids never come back, so this grows only by nodes that ever were."""
        self.bundles = BundleTable()
        self.newly_named: list[Demand] = []
        """Demands with a strategy that nobody has looked at yet (`group_events`)."""
        self.refusals = False
        """Some demand was refused, now or earlier."""
        self.nodes: tuple[Ledger, ...] = (self.ledger,)
        """Nodes in view: this one, then `peers` in their order."""
        self.cpus: int = max(1, self.ledger.total.get(CPU, 0) // ONE)
        gpus = len(self.ledger.gpu_free)
        self.pool = WorkerPool(config, config.gpu_names[:gpus] or tuple(str(index) for index in range(gpus)))
        self.by_process: dict[int, Worker] = {}
        self.jobs = JobTable()
        self.tasks = TaskTable(self.jobs)
        self.dependencies = Dependencies()
        self.leases = LeaseTable()
        self.actors = ActorTable()
        self.interrupted: set[bytes] = set()
        """Unfinished tasks that somebody cancelled while they ran: they are not run again."""
        self.out: list[actions.Action] = []
        """Answer to the present event."""
        self.wake_at: float = NEVER
        """When a Tick is wanted at the latest."""
        self.story: Story | None = Story() if config.debug else None

    # -- limits --------------------------------------------------------------------------------------------------------

    def max_starting(self) -> int:
        """Most processes being started at a time."""
        return self.config.max_starting or max(2, self.cpus)

    def keep_idle(self) -> int:
        """Idle workers that are kept."""
        if self.config.runs_nothing:
            return 0
        return self.config.keep_idle if self.config.keep_idle >= 0 else self.cpus

    def wake(self, at: float) -> None:
        """Ask for a Tick at this time at the latest."""
        if at < self.wake_at:
            self.wake_at = at

    # -- other nodes ---------------------------------------------------------------------------------------------------

    def look_around(self) -> None:
        """A node came or went: what can be run at all is another question now."""
        self.nodes = (self.ledger, *self.peers.values())
        for demand in self.ledger.demands.values():
            self.survey(demand)
        for job in self.jobs.jobs.values():
            for queue in job.queues.values():
                if queue.parked and queue.shape.demand.feasible:
                    self.tasks.unpark(queue)

    def survey(self, demand: Demand) -> None:
        """See which nodes in view could run a demand if nothing else ran there."""
        if demand.refusal is not None:
            demand.local = demand.feasible = False
            return
        demand.local = self.ledger.could_run(demand)
        strategy = demand.strategy
        if strategy.kind == placing.NODE and strategy.node != self.ledger.id:
            peer = self.peers.get(strategy.node)
            if peer is not None and peer.could_run(demand):
                demand.local = False  # it is waited for
                demand.feasible = True
                return
        demand.feasible = demand.local or any(peer.could_run(demand) for peer in self.peers.values())

    def demand(self, packed: bytes, strategy: bytes = b"") -> Demand:
        """Return the demand of a packed vector and a packed strategy; ValueError when they are none."""
        count = len(self.ledger.demands)
        demand = self.ledger.demand(packed, strategy)
        if len(self.ledger.demands) != count:
            self.survey(demand)
            if strategy:
                self.newly_named.append(demand)
        return demand

    def refuse(self, demand: Demand, what: str, why: str) -> None:
        """Nothing of this demand can ever run again: what is queued, or comes later, fails."""
        if demand.refusal is not None:
            return
        demand.refusal = what, why
        demand.local = demand.feasible = False
        self.refusals = True
        for job in self.jobs.jobs.values():
            for queue in job.queues.values():
                if queue.shape.demand is demand and queue.count:
                    self.tasks.stranded.append(queue)

    def take_back_leases(self, demand: Demand, now: float) -> None:
        """A bundle has no room: callers who hold something of what it asks for give it back, and get nothing for a while."""
        names = {name for name, _ in demand.items}
        for worker in list(self.leases.leased.values()):
            if worker.held is not None and any(name in names for name, _ in worker.held.items):
                self.revoke(worker, now)
        self.leases.not_before = max(self.leases.not_before, now + _BUNDLE_COOLDOWN_S)

    def retire(self, slot: Worker) -> None:
        """A slot of another node has nothing left."""
        self.leave_queue(slot)
        self.vacate(slot)
        self.pool.move(slot, DEAD)

    # -- resources of workers ------------------------------------------------------------------------------------------

    def occupy(self, worker: Worker, demand: Demand) -> None:
        """The worker holds this from now on."""
        assert worker.held is None, f"{worker} holds {worker.held} already"
        (worker.peer or self.ledger).take(demand, worker.kind[1])
        worker.held = demand

    def vacate(self, worker: Worker) -> None:
        """The worker holds nothing from now on, and waits for nothing."""
        held = worker.held
        if held is not None:
            if worker.lent:
                self.ledger.take_back(held)
            (worker.peer or self.ledger).give_back(held, worker.kind[1])
            worker.held = None
        worker.lent = False
        worker.blocked = False

    def lend(self, worker: Worker) -> None:
        """A worker that waits lends the CPU it holds."""
        if worker.held is not None and not worker.lent:
            worker.lent = True
            self.ledger.lend(worker.held)

    def take_back(self, worker: Worker) -> None:
        """It goes on: by force, so that more may run than there are CPUs, for as long as what was started meanwhile
        takes."""
        if worker.lent:
            worker.lent = False
            assert worker.held is not None
            self.ledger.take_back(worker.held)

    # -- lives of workers ----------------------------------------------------------------------------------------------

    def start_worker(self, job: Job, kind: Kind, actor: ActorRecord | None = None) -> Worker:
        """Ask for a process."""
        worker = self.pool.new_worker(job, kind, actor)
        title = f"zray::{actor.shape.name}" if actor is not None else "zray::idle"
        self.out.append(actions.StartWorker(worker.number, job.number, self.pool.environment(job, kind), title))
        return worker

    def make_room(self, job: Job, kind: Kind, now: float) -> bool:
        """Can one more process be started? When there are as many as may be, an idle one of another sort is ended to
        make room."""
        pool = self.pool
        if pool.may_start(self.max_starting(), now):
            return True
        if now < pool.hold_starts_until:
            self.wake(pool.hold_starts_until)
        elif len(pool.workers) >= self.config.max_workers:
            other = pool.longest_idle(job, kind)
            if other is not None:
                self.stop_worker(other, now, "another kind of worker is needed")
        return False

    def stop_worker(self, worker: Worker, now: float, reason: str) -> None:
        """Ask an idle worker to end."""
        self.pool.move(worker, STOPPING)
        worker.deadline = now + self.config.stop_grace
        self.out.append(actions.StopWorker(worker.number, reason))

    def kill_worker(self, worker: Worker, doom: str) -> None:
        """Kill a process, whatever it does. What it holds stays held until its exit is confirmed."""
        if worker.state == DYING and worker.doom:
            return
        worker.doom = doom
        if worker.state != DYING:
            self.end_lease(worker)
            self.leave_queue(worker)
            self.pool.move(worker, DYING)
        if worker.peer is None:
            self.out.append(actions.KillWorker(worker.number, doom))
        elif worker.actor is not None:
            self.out.append(actions.KillAt(worker.peer.id, worker.actor.id, True))

    def leave_queue(self, worker: Worker) -> None:
        """A worker stops working for a queue."""
        queue = worker.queue
        if queue is not None:
            queue.takers -= 1
            queue.job.running -= 1
            worker.queue = None

    def release(self, worker: Worker, now: float) -> None:
        """A busy or drained worker has nothing left: it is idle."""
        if worker.peer is not None:
            self.retire(worker)
            return
        self.leave_queue(worker)
        self.vacate(worker)
        worker.ghosts = 0
        worker.idle_since = now
        self.pool.move(worker, IDLE)

    # -- leases --------------------------------------------------------------------------------------------------------

    def grant(self, worker: Worker, shape: ShapeState, process: int, reply: bytes, now: float) -> None:
        """Lend an idle worker."""
        self.pool.move(worker, LEASED)
        self.occupy(worker, shape.demand)
        worker.fresh = False
        worker.epoch += 1
        worker.lessee = process
        worker.last_used = now
        self.leases.leased[worker.number] = worker
        self.out.append(actions.GrantLease(reply, worker.number, shape.key, worker.epoch))

    def revoke(self, worker: Worker, now: float) -> None:
        """Take a lease back. A call may be under way still."""
        self.end_lease(worker)
        self.pool.move(worker, DRAINING)
        worker.since = now
        self.leases.draining[worker.number] = worker
        self.wake(now + self.config.drain_poll)

    def end_lease(self, worker: Worker, tell: bool = True) -> None:
        """Whatever follows: the lessee may not use it any more. (Of a dead worker it learns from the store: nothing to
        tell.)"""
        if worker.lessee:
            worker.epoch += 1
            worker.lessee = 0
            if tell:
                self.out.append(actions.RevokeLease(worker.number, worker.epoch))
        self.leases.leased.pop(worker.number, None)
        self.leases.draining.pop(worker.number, None)

    # -- errors --------------------------------------------------------------------------------------------------------

    def seal(self, task: bytes, shape: ShapeState, kind: str, fields: dict[str, Any]) -> None:
        """Seal a task's results with an error."""
        found: dict[str, Any] = {"task_id": task.hex(), "function_name": shape.name}
        found.update(fields)
        self.out.append(actions.SealError(task, shape.num_returns, kind, found))

    # -- checking ------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check every book and every equation between them; AssertionError names the first that does not hold."""
        pool, ledger = self.pool, self.ledger
        pool.validate()
        self.leases.validate(pool.workers)
        self.actors.validate()
        waiting = self.dependencies.validate()
        self.tasks.validate(self.jobs.jobs.values(), list(pool.workers.values()), waiting)
        self._validate_ledger()
        for job in self.jobs.jobs.values():
            running = sum(worker.state == BUSY for worker in pool.workers.values() if worker.job is job)
            assert job.running == running, f"{job}: {running} are busy"
            assert not (job.ended and job.queued), f"{job} has ended, but tasks wait"
        for worker in pool.workers.values():
            assert (worker.queue is not None) == (worker.state == BUSY), f"{worker} and its queue disagree"
            assert worker.job is self.jobs.jobs.get(worker.job.number), f"{worker} belongs to a job that is forgotten"
            if worker.job.ended and worker.actor is None:
                assert worker.state in (STARTING, DYING, STOPPING), f"{worker} works for a job that has ended"
            if worker.actor is not None and worker.state in (STARTING, ACTOR):
                assert worker.actor.worker is worker, f"{worker} is meant for an actor that does not know"
        assert not (ledger.total.get(CPU, 0) and any(job.queued for job in self.jobs.jobs.values() if job.ended))

    def _validate_ledger(self) -> None:
        for peer in self.peers.values():
            left = dict(peer.total)
            base = {name: units for name, units in peer.total.items() if not placing.is_of_group(name)}
            assert peer.total == self._with_bundles(peer.id, base), f"{peer}: its bundles are not those of the groups"
            for slot in self.pool.slots():
                if slot.peer is peer and slot.held is not None:
                    for name, amount in slot.held.items:
                        left[name] = left.get(name, 0) - amount
            names = set(left) | set(peer.available)
            assert all(left.get(name, 0) == peer.available.get(name, 0) for name in names), (
                f"{peer}: {peer.available} available, {left} by what slots hold"
            )
        ledger = self.ledger
        expected = dict(ledger.total)
        gpus = [ONE] * len(ledger.gpu_free)
        for worker in self.pool.workers.values():
            held = worker.held
            if held is None or worker.peer is not None:
                continue
            for name, amount in held.items:
                expected[name] = expected.get(name, 0) - amount
            if worker.lent:
                for name, amount in held.lendable:
                    expected[name] = expected.get(name, 0) + amount
            for index in worker.kind[1] if GPU in held.gpu_names else ():
                gpus[index] -= held.gpu_share()
        for bundle in self.bundles.held.values():
            for name, amount in bundle.demand.items:
                expected[name] = expected.get(name, 0) - amount
            for index in bundle.gpus:
                gpus[index] -= bundle.demand.gpu_share()
        names = set(expected) | set(ledger.available)
        for name in sorted(names):
            have, want = ledger.available.get(name, 0), expected.get(name, 0)
            assert have == want, f"{name}: {have} available, {want} by what workers hold"
        assert gpus == ledger.gpu_free, f"GPUs: {ledger.gpu_free} free, {gpus} by what workers hold"

    def _with_bundles(self, node: bytes, total: dict[str, int]) -> dict[str, int]:
        """What a node has in all, by what is known of groups."""
        found = dict(total)
        for group, placed in self.bundles.placed.items():
            for index, at in enumerate(placed.nodes):
                if at == node:
                    for name, units in placing.contents(group, index, placed.spec.bundles[index]).items():
                        found[name] = found.get(name, 0) + units
        return found
