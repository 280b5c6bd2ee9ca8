"""Every unfinished task of the node, and the queues.

Covers where each task is (`home`), queues per job and shape, how long tasks of a shape take, copies handed to several
workers. Does not cover who decides: `scheduler` hands out and retries; `dependencies` knows what waiting tasks lack;
results and claims are the store's.

A task costs as little as can be while it is queued (there may be millions): its spec, one entry in `home`, one place in
a queue; no record of its own. `home[task]` says where it is, by the type of the value:

    Waiting     lacks arguments                                            -> TaskQueue, ended
    TaskQueue   queued                                                     -> Worker, ended
    Worker      handed to exactly this worker                              -> Shared, TaskQueue (death, retry), ended
    Shared      several copies count: with workers, perhaps one queued     -> any of the above, ended
                (or one that is known to be run, though its worker has said nothing)
    (absent)    ended, or never heard of

Whoever claims a task first in the store runs it, so copies are harmless. A copy that no longer counts stays in its
worker's `handed` until that worker reports it; it is a ghost. `spec.attempt` is the number of retries used.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from zray.broker.dependencies import Waiting
from zray.broker.worker_pool import Worker

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zray.broker.jobs import Job, JobTable
    from zray.broker.ledger import Demand
    from zray.broker.settings import SchedulerConfig
    from zray.task import CallShape, TaskSpec


class ShapeState:
    """What the node knows of one shape of call."""

    __slots__ = ("average", "demand", "key", "max_retries", "name", "newest_job", "num_returns", "seen", "shape")

    def __init__(self, shape: CallShape, demand: Demand) -> None:
        self.shape = shape
        self.key: bytes = shape.key
        """The one copy of the key that all queued specs share."""
        self.name: str = shape.name
        self.demand = demand
        self.num_returns: int = shape.num_returns
        self.max_retries: int = shape.max_retries
        self.average: float = 0.0
        """Run time in microseconds: moving average, quick to rise and slow to fall."""
        self.seen: int = 0
        """Run times that went into it."""
        self.newest_job: int = 0
        """The newest job when it was last defined: none that came later relies on it without having defined it
        again."""

    def observe(self, micros: float, count: int) -> None:
        """Take `count` run times with this sum into the average."""
        mean = micros / count
        if not self.seen:
            self.average = mean
        elif mean > self.average:
            self.average += (mean - self.average) * 0.5
        else:
            self.average += (mean - self.average) * (count / (count + 16.0))
        self.seen += count

    def depth(self, config: SchedulerConfig) -> int:
        """How many tasks should lie at a worker: one while nothing is known, then about `target_prefetch` of work, at
        most four times the evidence."""
        if not self.seen:
            return 1
        wanted = int(config.target_prefetch * 1e6 / (self.average + 1.0)) + 1
        evidence = 4 * self.seen
        if wanted > evidence:
            wanted = evidence
        return wanted if wanted < config.max_prefetch else config.max_prefetch


class TaskQueue:
    """Tasks of one job and shape, first in first out."""

    __slots__ = ("count", "dropped", "group", "job", "listed", "parked", "shape", "shared", "specs", "takers")

    def __init__(self, job: Job, shape: ShapeState, group: DemandClass) -> None:
        self.job = job
        self.shape = shape
        self.group = group
        self.specs: deque[TaskSpec] = deque()
        self.dropped: set[bytes] = set()
        """Tasks that ended while their specs are still in `specs`: skipped when their turn comes. count == len(specs) -
        len(dropped)."""
        self.count: int = 0
        self.listed = False
        """It stands in its group's rotation."""
        self.parked = not shape.demand.feasible
        """No node in view can run these: they do not count as queued and wait for the cluster to grow."""
        self.shared: int = 0
        """Queued tasks of which copies are with workers too."""
        self.takers: int = 0
        """Workers that are busy with tasks of this queue."""

    def next(self) -> TaskSpec | None:
        """The first task that has not ended."""
        if self.dropped:
            return next((spec for spec in self.specs if spec.id not in self.dropped), None)
        return self.specs[0] if self.specs else None

    def __repr__(self) -> str:
        return f"<TaskQueue {self.shape.name} of job {self.job.number}: {self.count}>"


class DemandClass:
    """Queues of one job whose tasks have the same demand; they take turns."""

    __slots__ = ("count", "demand", "listed", "queues")

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self.queues: deque[TaskQueue] = deque()
        """Queues with tasks in them (and perhaps some that just ran empty)."""
        self.count: int = 0
        """Tasks in its queues."""
        self.listed = False
        """It stands in its job's rotation."""

    def first(self) -> TaskQueue | None:
        """The queue whose turn it is; empty ones leave the rotation."""
        queues = self.queues
        while queues:
            if queues[0].count:
                return queues[0]
            queues.popleft().listed = False
        return None


class Shared:
    """A task of which several copies count, or that is known to be run."""

    __slots__ = ("begun", "queue", "spec", "workers")

    def __init__(self, spec: TaskSpec, workers: list[Worker], queue: TaskQueue | None) -> None:
        self.spec = spec
        self.workers = workers
        """Those that have a copy; no worker twice."""
        self.queue = queue
        """Where it is queued as well."""
        self.begun = False
        """One more copy was refused: one of these workers runs it, or has ended it, and has not said so yet."""


class TaskTable:
    """Where every unfinished task is."""

    __slots__ = ("home", "jobs", "newly_parked", "queued", "shapes", "stranded")

    def __init__(self, jobs: JobTable) -> None:
        self.home: dict[bytes, Waiting | TaskQueue | Worker | Shared] = {}
        self.shapes: dict[bytes, ShapeState] = {}
        self.jobs = jobs
        self.queued: int = 0
        """Tasks in queues that are not parked."""
        self.newly_parked: list[TaskQueue] = []
        """Parked queues that nobody has been warned of yet."""
        self.stranded: list[TaskQueue] = []
        """Queues with tasks whose demand was refused: they fail before anything else happens."""

    def queue_for(self, job: Job, shape: ShapeState) -> TaskQueue:
        """The queue for a job's tasks of a shape."""
        queue = job.queues.get(shape.key)
        if queue is None:
            group = job.classes.get(shape.demand.key)
            if group is None:
                group = job.classes[shape.demand.key] = DemandClass(shape.demand)
            queue = job.queues[shape.key] = TaskQueue(job, shape, group)
            if queue.parked:
                self.newly_parked.append(queue)
        return queue

    def unpark(self, queue: TaskQueue) -> None:
        """A node that can run its tasks is in view now: they count."""
        count, queue.count = queue.count, 0
        queue.parked = False
        if count:
            self._grow(queue, count)

    # -- into queues ---------------------------------------------------------------------------------------------------

    def _grow(self, queue: TaskQueue, count: int) -> None:
        queue.count += count
        if queue.shape.demand.refusal is not None:
            self.stranded.append(queue)
        if queue.parked:
            return
        self.queued += count
        queue.group.count += count
        job = queue.job
        if not job.queued:
            self.jobs.begins_to_wait(job)
        job.queued += count
        if not queue.listed:
            queue.listed = True
            queue.group.queues.append(queue)
            if not queue.group.listed:
                queue.group.listed = True
                job.rotation.append(queue.group)

    def _shrink(self, queue: TaskQueue, count: int) -> None:
        queue.count -= count
        if not queue.parked:
            self.queued -= count
            queue.group.count -= count
            queue.job.queued -= count
            if not queue.job.queued:
                self.jobs.waiting.pop(queue.job.number, None)

    def submit(self, job: Job, tasks: list[TaskSpec], refuse: bool) -> list[TaskSpec]:
        """Queue new tasks that lack nothing; one that is here already is ignored. Returns those whose shape is not
        known and, when asked to `refuse` them, those that no node can run."""
        home = self.home
        queues = job.queues
        queue: TaskQueue | None = None
        count = 0
        refused: list[TaskSpec] = []
        for spec in tasks:
            if queue is None or spec.shape != queue.shape.key:
                if queue is not None and count:
                    self._grow(queue, count)
                count = 0
                queue = queues.get(spec.shape)
                if queue is None:
                    shape = self.shapes.get(spec.shape)
                    if shape is None:
                        refused.append(spec)
                        continue
                    queue = self.queue_for(job, shape)
            if spec.id in home:
                continue
            if refuse and queue.parked and not queue.shape.demand.patient:
                refused.append(spec)
                continue
            spec.shape = queue.shape.key
            home[spec.id] = queue
            queue.specs.append(spec)
            count += 1
        if queue is not None and count:
            self._grow(queue, count)
        return refused

    def enqueue(self, queue: TaskQueue, spec: TaskSpec) -> None:
        """Queue one task, last: its arguments have come."""
        self.home[spec.id] = queue
        queue.specs.append(spec)
        self._grow(queue, 1)

    def requeue(self, queue: TaskQueue, spec: TaskSpec) -> None:
        """Queue one task again, first: it has waited its turn before."""
        self._clean(queue, spec.id)
        self.home[spec.id] = queue
        queue.specs.appendleft(spec)
        self._grow(queue, 1)

    def offer(self, worker: Worker, specs: list[TaskSpec]) -> None:
        """Queue copies of what this worker has, first and in their order, unless somebody who does not wait has a copy
        too."""
        for spec in reversed(specs):
            queue = worker.job.queues.get(spec.shape)
            if queue is not None and self._lies_behind_waiting(spec.id):
                self._clean(queue, spec.id)
                home = self.home[spec.id]
                if type(home) is Shared:
                    home.queue = queue
                else:
                    self.home[spec.id] = Shared(spec, [worker], queue)
                queue.specs.appendleft(spec)
                queue.shared += 1
                self._grow(queue, 1)

    def _lies_behind_waiting(self, task: bytes) -> bool:
        """Does everyone who has the task wait for something (and perhaps for this very task)?"""
        home = self.home.get(task)
        if type(home) is Worker:
            return home.blocked
        if type(home) is Shared and home.queue is None:
            return all(worker.blocked for worker in home.workers)
        return False

    def holders(self, task: bytes) -> list[Worker]:
        """The workers whose copies of the task count."""
        home = self.home.get(task)
        if type(home) is Worker:
            return [home]
        return list(home.workers) if type(home) is Shared else []

    def _clean(self, queue: TaskQueue, task: bytes) -> None:
        """A task that is queued anew must not be skipped for a spec of it that was dropped: take that spec out."""
        if task in queue.dropped:
            queue.dropped.discard(task)
            for index, spec in enumerate(queue.specs):
                if spec.id == task:
                    del queue.specs[index]
                    return

    # -- out of queues -------------------------------------------------------------------------------------------------

    def take(self, queue: TaskQueue, count: int, worker: Worker) -> list[TaskSpec]:
        """Take the first `count` tasks for a worker: their home is the worker then."""
        home = self.home
        specs = queue.specs
        found: list[TaskSpec] = []
        taken = 0
        while taken < count and specs:
            spec = specs.popleft()
            if queue.dropped and spec.id in queue.dropped:
                queue.dropped.discard(spec.id)
                continue
            taken += 1
            if not queue.shared or type(home[spec.id]) is not Shared:
                home[spec.id] = worker
            elif not self._take_shared(queue, spec, worker):
                continue
            found.append(spec)
        self._shrink(queue, taken)
        return found

    def _take_shared(self, queue: TaskQueue, spec: TaskSpec, worker: Worker) -> bool:
        """Take a queued copy of a task that workers have too. False when it need not be sent: this worker has it."""
        shared = self.home[spec.id]
        assert type(shared) is Shared
        queue.shared -= 1
        shared.queue = None
        if worker in shared.workers:
            self._settle(spec.id, shared)
            return False
        shared.workers.append(worker)
        self._settle(spec.id, shared)
        return True

    def drop(self, queue: TaskQueue, task: bytes) -> None:
        """A queued task ended: its spec is skipped when its turn comes."""
        queue.dropped.add(task)
        self._shrink(queue, 1)
        if len(queue.dropped) > 64 and len(queue.dropped) > queue.count:
            queue.specs = deque(spec for spec in queue.specs if spec.id not in queue.dropped)
            queue.dropped.clear()

    # -- copies --------------------------------------------------------------------------------------------------------

    def counts(self, worker: Worker, task: bytes) -> bool:
        """Does this worker's copy of the task count (is it no ghost)?"""
        home = self.home.get(task)
        return home is worker or (type(home) is Shared and worker in home.workers)

    def share(self, spec: TaskSpec, worker: Worker) -> None:
        """A second worker gets a copy of a task that another has."""
        home = self.home[spec.id]
        if type(home) is Shared:
            home.workers.append(worker)
        else:
            self.home[spec.id] = Shared(spec, [home, worker], None)  # type: ignore[list-item]

    def refused(self, spec: TaskSpec) -> None:
        """A copy was withdrawn because somebody had claimed the task: any further one would be refused as well. That holds until a worker that
        has it is gone, or the task gets a new home."""
        home = self.home[spec.id]
        if type(home) is Worker:
            home = self.home[spec.id] = Shared(spec, [home], None)
        if type(home) is Shared:
            home.begun = True

    def _settle(self, task: bytes, shared: Shared) -> None:
        """Forget that a task was shared when one copy is left."""
        if shared.queue is None and len(shared.workers) == 1 and not shared.begun:
            self.home[task] = shared.workers[0]
        elif shared.queue is not None and not shared.workers:
            shared.queue.shared -= 1
            self.home[task] = shared.queue

    def withdraw(self, worker: Worker, task: bytes) -> bool:
        """This worker's copy, which counted, will not end the task. True while other copies remain."""
        home = self.home[task]
        if type(home) is not Shared:
            return False
        home.workers.remove(worker)
        home.begun = False
        if not home.workers and home.queue is None:
            return False
        self._settle(task, home)
        return True

    def end(self, task: bytes, by: Worker | None) -> bool:
        """The task is over. Copies elsewhere become ghosts. False when it was over already."""
        home = self.home.pop(task, None)
        if home is None:
            return False
        if home is not by:
            self._abandon(task, home, by)
        return True

    def supersede(self, task: bytes) -> None:
        """The task gets a new attempt: all copies that are with workers become ghosts; the caller gives it a new
        home."""
        home = self.home.pop(task, None)
        if home is not None:
            self._abandon(task, home, None)

    def _abandon(self, task: bytes, home: Waiting | TaskQueue | Worker | Shared, by: Worker | None) -> None:
        if type(home) is Shared:
            for worker in home.workers:
                if worker is not by:
                    worker.ghosts += 1
            if home.queue is not None:
                home.queue.shared -= 1
                self.drop(home.queue, task)
        elif type(home) is TaskQueue:
            self.drop(home, task)
        elif type(home) is Worker:
            home.ghosts += 1

    # -- checking ------------------------------------------------------------------------------------------------------

    def validate(self, jobs: Iterable[Job], workers: Iterable[Worker], waiting: dict[int, Waiting]) -> None:
        """Check that each task is in exactly the place that `home` names, and the counts."""
        places = 0
        queued = 0
        for job in jobs:
            in_job = 0
            for queue in job.queues.values():
                places += self._validate_queue(queue)
                in_job += 0 if queue.parked else queue.count
                busy = sum(worker.queue is queue for worker in workers)
                assert queue.takers == busy, f"{queue} has {queue.takers} takers, but {busy} workers are busy with it"
            for group in job.classes.values():
                waiting_here = sum(queue.count for queue in group.queues)
                assert group.count == waiting_here, (
                    f"{group.count} tasks counted in a class of {job}, {waiting_here} queued"
                )
            assert job.queued == in_job, f"{job} counts {job.queued}, its queues {in_job}"
            assert (job.number in self.jobs.waiting) == (in_job > 0), f"{job} waits in one book only"
            queued += in_job
        assert queued == self.queued, f"{self.queued} tasks counted, {queued} queued"
        for worker in workers:
            places += self._validate_worker(worker)
        for record in waiting.values():
            if record.actor is None:
                assert self.home.get(record.spec.id) is record, f"{record} is elsewhere too"
                places += 1
        expected = 0
        for task, home in self.home.items():
            if type(home) is Shared:
                assert home.workers, f"{task.hex()} is shared by nobody"
                places_of = len(home.workers) + (home.queue is not None)
                assert places_of > 1 or home.begun, f"{task.hex()} is shared but has one place"
                expected += places_of
            else:
                expected += 1
        assert places == expected, f"tasks have {places} places, their table names {expected}"

    def _validate_queue(self, queue: TaskQueue) -> int:
        live = shared = 0
        seen: set[bytes] = set()
        for spec in queue.specs:
            assert spec.id not in seen, f"{spec.id.hex()} is queued twice"
            seen.add(spec.id)
            if spec.id not in queue.dropped:
                live += 1
                home = self.home.get(spec.id)
                if type(home) is Shared:
                    shared += 1
                    assert home.queue is queue, f"{spec.id.hex()} is queued, its table does not know"
                else:
                    assert home is queue, f"{spec.id.hex()} is queued, but its home is {home!r}"
        assert queue.dropped <= seen, "a dropped task is not in its queue"
        assert live == queue.count, f"{queue} holds {live}"
        assert shared == queue.shared, f"{queue} has {shared} shared tasks, counted {queue.shared}"
        assert not live or queue.parked or (queue.listed and queue in queue.group.queues), f"{queue} is not listed"
        assert not queue.listed or queue.group.listed, f"{queue} is listed in a class that is not"
        assert (queue.group in queue.job.rotation) == queue.group.listed, f"class of {queue} and rotation disagree"
        return live

    def _validate_worker(self, worker: Worker) -> int:
        seen: set[bytes] = set()
        live = 0
        for spec in worker.handed:
            assert spec.id not in seen, f"{worker} has {spec.id.hex()} twice"
            seen.add(spec.id)
            live += self.counts(worker, spec.id)
        assert worker.ghosts == len(worker.handed) - live, (
            f"{worker} has {len(worker.handed) - live} ghosts, counted {worker.ghosts}"
        )
        return live
