"""A scheduler machine on a bench: short words for the events that tests need, and what became of them.

Covers making events and sorting actions. Plays a server that does at once what it is asked, as far as the machine can
tell: workers start when told to, `Reopen` raises the attempt.
"""

from __future__ import annotations

from typing import Any, TypeVar

from zray import placing, resources, wire
from zray.broker import actions as a
from zray.broker import events as e
from zray.broker.scheduler import Scheduler, SchedulerConfig
from zray.ids import return_id, task_id
from zray.placing import Strategy
from zray.task import ACTOR_CREATION, TASK, ActorSpec, CallShape, JobSpec, TaskSpec

A = TypeVar("A", bound=a.Action)
ROOT = task_id(bytes(16), 1)


def make_shape(
    name: str = "f",
    kind: int = TASK,
    max_retries: int = 3,
    num_returns: int = 1,
    strategy: Strategy | None = None,
    **needs: float,
) -> CallShape:
    """A shape whose key is its name; needs {CPU: 1} unless told otherwise."""
    packed = resources.pack(resources.parse(needs or {"CPU": 1}))
    key = name.encode().ljust(16, b".")
    where = b"" if strategy is None else placing.pack(strategy)
    return CallShape(
        key,
        kind,
        b"f" * 16,
        name,
        resources=packed,
        max_retries=max_retries,
        num_returns=num_returns,
        strategy=where,
    )


def peer_id(number: int) -> bytes:
    """Id of another node."""
    return bytes([number]) * 16


class Bench:
    """One machine, its clock, and everything it asked for."""

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        policy: Any = None,
        jobs: int = 1,
        labels: dict[str, str] | None = None,
        locations: Any = None,
        **total: float,
    ) -> None:
        self.now = 100.0
        config = config or SchedulerConfig(debug=True)
        total = total or {"CPU": 2}
        self.machine = Scheduler(total, config, policy, own=peer_id(0), labels=labels, locations=locations)
        self.all: list[a.Action] = []
        self.handed: dict[int, list[TaskSpec]] = {}
        self.environments: dict[int, dict[str, str]] = {}
        self.tasks_made = 0
        for number in range(1, jobs + 1):
            self.start_job(number)

    # -- events --------------------------------------------------------------------------------------------------------

    def tell(self, event: e.Event, after: float = 0.0) -> list[a.Action]:
        """One event, `after` seconds from the last."""
        self.now += after
        found = self.machine.handle(event, self.now)
        self.machine.validate()
        for action in found:
            if isinstance(action, a.RunOn):
                self.handed.setdefault(action.worker, []).extend(action.tasks)
            elif isinstance(action, a.RunAt):
                self.handed.setdefault(action.slot, []).extend(action.tasks)
            elif isinstance(action, a.Reopen):
                action.task.attempt += 1
            elif isinstance(action, a.StartWorker):
                self.environments[action.worker] = action.environment
        self.all.extend(found)
        return found

    def start_job(self, number: int, environment: dict[str, str] | None = None) -> list[a.Action]:
        """A driver comes; its process is 1000 + its number."""
        spec = JobSpec(number, task_id(bytes(16), number), 1, "", [], "/", environment=environment or {})
        return self.tell(e.JobStarted(spec, 1000 + number))

    def define(self, *shapes: CallShape) -> None:
        """Shapes travel ahead of what names them."""
        self.tell(e.ShapesDefined(list(shapes)))

    def ready(self, *workers: int) -> list[a.Action]:
        """These workers are up; their processes are 100 + their numbers."""
        found = []
        for worker in workers:
            self.tell(e.WorkerStarted(worker, 5000 + worker, 100 + worker))
            found += self.tell(e.WorkerIsReady(worker))
        return found

    def start_all(self) -> None:
        """Every worker that was asked for comes up, also those asked for meanwhile."""
        done: set[int] = set()
        while True:
            wanted = [x.worker for x in self.of(a.StartWorker) if x.worker not in done]
            if not wanted:
                return
            done.update(wanted)
            alive = self.machine.node.pool.workers
            self.ready(*[worker for worker in wanted if worker in alive and not alive[worker].state])

    def specs(self, count: int, shape: CallShape, parent: bytes = ROOT, deps: tuple[bytes, ...] = ()) -> list[TaskSpec]:
        """New calls."""
        found = []
        for _ in range(count):
            self.tasks_made += 1
            found.append(TaskSpec(task_id(parent, self.tasks_made), shape.key, deps=deps))
        return found

    def submit(self, count: int, shape: CallShape, job: int = 1) -> list[TaskSpec]:
        """Submit new calls of a job's driver; all arguments are there."""
        found = self.specs(count, shape)
        self.tell(e.TasksSubmitted(job, 1000 + job, ROOT, found, None))
        return found

    def finish(
        self, worker: int, count: int = 0, micros: int = 10, status: int = wire.DONE_OK, after: float = 1e-5
    ) -> list[a.Action]:
        """A worker reports its first `count` tasks (0: all)."""
        mine = self.handed[worker]
        done = mine[: count or len(mine)]
        del mine[: len(done)]
        ids = [spec.id for spec in done]
        return self.tell(e.TasksFinished(worker, ids, bytes([status] * len(ids)), [micros] * len(ids), not mine), after)

    def die(
        self, worker: int, status: int = -9, oom: bool = False, claimed: list[TaskSpec] | None = None, **more: Any
    ) -> list[a.Action]:
        """A worker exits; it was running `claimed`."""
        self.handed.pop(worker, None)
        ids = None if claimed is None else [spec.id for spec in claimed]
        return self.tell(
            e.WorkerExited(worker, status, oom, more.get("orphans", []), more.get("without_spec", []), ids)
        )

    def tick(self, after: float = 0.1, busy: tuple[int, ...] = ()) -> list[a.Action]:
        """Time passes."""
        return self.tell(e.Tick(frozenset(busy)), after)

    def create_actor(self, shape: CallShape, missing: tuple[bytes, ...] = (), **options: Any) -> ActorSpec:
        """Ask for an actor."""
        reply = options.pop("reply", b"")
        spec = ActorSpec(self.specs(1, shape)[0], options.pop("job", 1), **options)
        self.tell(e.ActorRequested(1001, spec, missing, reply))
        return spec

    def see_peer(
        self,
        number: int,
        silent: bool = False,
        free: float | None = None,
        labels: dict[str, str] | None = None,
        queued: int = 0,
        micros: int = 0,
        **total: float,
    ) -> list[a.Action]:
        """Another node, whose id has this number, says what is free (CPUs; all unless told otherwise)."""
        available = dict(total) if free is None else {**total, "CPU": free}
        return self.tell(e.PeerSeen(peer_id(number), dict(total), available, silent, labels or {}, queued, micros))

    # -- what came of it -----------------------------------------------------------------------------------------------

    def of(self, kind: type[A]) -> list[A]:
        """All actions of a kind so far."""
        return [action for action in self.all if isinstance(action, kind)]

    def errors(self) -> dict[bytes, str]:
        """Tasks that ended in an error of the system, and its kind."""
        found = {x.task: x.kind for x in self.of(a.SealError)}
        for many in self.of(a.SealErrors):
            found.update(dict.fromkeys(many.tasks, many.kind))
        return found

    def where(self, spec: TaskSpec) -> list[int]:
        """Workers that have a task."""
        return [worker for worker, specs in self.handed.items() if any(s.id == spec.id for s in specs)]


def kinds(actions: list[a.Action], kind: type[A]) -> list[A]:
    """The actions of a kind in an answer."""
    return [action for action in actions if isinstance(action, kind)]


def result(spec: TaskSpec) -> bytes:
    """Id of the first result."""
    return return_id(spec.id, 0)


def warm(bench: Bench, shape: CallShape, micros: int = 10, rounds: int = 4) -> None:
    """Let the machine learn how long calls of a shape take, on every idle worker."""
    for _ in range(rounds):
        bench.submit(8, shape)
        while any(bench.handed.values()):
            for worker, specs in list(bench.handed.items()):
                if specs:
                    bench.finish(worker, micros=micros)


ACTOR = make_shape("Actor", ACTOR_CREATION, CPU=1)
