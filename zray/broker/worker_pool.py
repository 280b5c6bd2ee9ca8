"""The processes of one node and what state each is in.

Covers the life of a worker (table `MOVES`), idle workers by job and kind, how many may be started, backing off when
starts fail, and which idle workers are surplus. Does not cover what they run (`scheduler`, `task_table`,
`actor_table`), leases (`leases`) or forking (`zray.broker.processes`).

    STARTING -> IDLE -> BUSY -> IDLE ...          runs tasks handed to it
                 |----> LEASED -> DRAINING -> IDLE  a caller sends it calls directly; DRAINING: taken back, perhaps one
                 call left
    STARTING, IDLE ---> ACTOR                      for good
    IDLE -> STOPPING                               asked to end (not idle any more, nothing may be handed to it)
    any  -> DYING                                  killed, or announced its end; exit not confirmed, so it still holds
    its resources
    any  -> DEAD                                   exit confirmed

A worker belongs to one job and one *kind* (thread limit, GPUs): both are fixed before user code runs in it. `blocked`
is apart from the state: a busy, leased or actor process that waits lends its CPU.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zray.broker.actor_table import ActorRecord
    from zray.broker.jobs import Job
    from zray.broker.ledger import Demand, Ledger
    from zray.broker.peers import Peer
    from zray.broker.settings import SchedulerConfig
    from zray.broker.task_table import TaskQueue
    from zray.task import TaskSpec

STARTING: Final = 0
IDLE: Final = 1
BUSY: Final = 2
LEASED: Final = 3
DRAINING: Final = 4
ACTOR: Final = 5
STOPPING: Final = 6
DYING: Final = 7
DEAD: Final = 8

STATE_NAMES: Final = ("STARTING", "IDLE", "BUSY", "LEASED", "DRAINING", "ACTOR", "STOPPING", "DYING", "DEAD")

MOVES: Final[frozenset[tuple[int, int]]] = frozenset(
    [
        (STARTING, IDLE),
        (STARTING, ACTOR),
        (IDLE, BUSY),
        (IDLE, LEASED),
        (IDLE, ACTOR),
        (IDLE, STOPPING),
        (BUSY, IDLE),
        (LEASED, DRAINING),
        (DRAINING, IDLE),
        *((state, DYING) for state in (STARTING, IDLE, BUSY, LEASED, DRAINING, ACTOR, STOPPING)),
        *((state, DEAD) for state in range(DEAD)),
    ]
)

THREAD_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
"""What numeric libraries read when they are loaded."""

Kind = tuple[int, tuple[int, ...]]
"""(thread limit, GPU indices)."""
_ELSEWHERE: Final = (-1,)
"""Stands for GPUs in the kind of a slot of another node: no local worker has it."""


class IllegalMove(RuntimeError):
    """A machine was about to make a move that its table does not have: a fault in zray."""


class Worker:
    """One process, from the wish to start it to its confirmed exit."""

    __slots__ = (
        "actor",
        "blocked",
        "deadline",
        "doom",
        "epoch",
        "fresh",
        "ghosts",
        "handed",
        "held",
        "idle_since",
        "job",
        "kind",
        "last_used",
        "lent",
        "lessee",
        "number",
        "peer",
        "pid",
        "process",
        "queue",
        "since",
        "state",
    )

    def __init__(self, number: int, job: Job, kind: Kind) -> None:
        self.number = number
        self.job = job
        self.kind = kind
        self.state: int = STARTING
        self.pid: int = 0
        self.process: int = 0
        self.held: Demand | None = None
        """What it occupies in the ledger (less the CPU while `lent`)."""
        self.blocked = False
        self.lent = False
        self.handed: deque[TaskSpec] = deque()
        """Tasks sent to it whose end it has not reported, in order. Copies that no longer count (ended or superseded
        elsewhere) are *ghosts*."""
        self.ghosts: int = 0
        self.queue: TaskQueue | None = None
        """Where its tasks come from while BUSY: one shape, so one demand."""
        self.since: float = 0.0
        """Last sign of progress while BUSY."""
        self.idle_since: float = 0.0
        self.fresh = True
        """No user code has run in it."""
        self.epoch: int = 0
        """Last value of WORD_LEASE; each grant and each taking back raises it."""
        self.lessee: int = 0
        """Process that has it on lease."""
        self.last_used: float = 0.0
        """Last time its lease carried a call."""
        self.actor: ActorRecord | None = None
        self.peer: Peer | None = None
        """The node that it is a slot of (see `peers`): BUSY with tasks and gone when it has none left, or ACTOR for as long as
        one lives there. None: a process of this node."""
        self.doom = ""
        """Why it is being ended: a name of errors.DeathCause."""
        self.deadline: float = 0.0
        """STOPPING: when to kill it."""

    def __repr__(self) -> str:
        waits = " blocked" if self.blocked else ""
        return f"<Worker {self.number} {STATE_NAMES[self.state]}{waits} {len(self.handed)} handed>"


class WorkerPool:
    """All workers of a node."""

    __slots__ = (
        "busy",
        "config",
        "failures",
        "gpu_names",
        "hold_starts_until",
        "idle",
        "idle_count",
        "next_number",
        "starting",
        "starting_for",
        "workers",
    )

    def __init__(self, config: SchedulerConfig, gpu_names: tuple[str, ...]) -> None:
        self.config = config
        self.gpu_names = gpu_names
        self.workers: dict[int, Worker] = {}
        self.idle: dict[tuple[int, Kind], dict[int, Worker]] = {}
        """Idle workers, the last to have worked last: it is taken first, its caches are warm."""
        self.idle_count: int = 0
        self.busy: dict[int, Worker] = {}
        """Workers in state BUSY."""
        self.starting: int = 0
        self.starting_for: dict[tuple[int, Kind], int] = {}
        """Of these, the ones for tasks (an actor's are meant for it alone)."""
        self.next_number: int = 1
        self.failures: int = 0
        """Starts in a row that failed."""
        self.hold_starts_until: float = 0.0

    # -- moves ---------------------------------------------------------------------------------------------------------

    def move(self, worker: Worker, state: int) -> None:
        """Change the state of a worker and the books that follow from it."""
        old = worker.state
        if (old, state) not in MOVES:
            raise IllegalMove(f"{worker!r} cannot become {STATE_NAMES[state]}")
        worker.state = state
        if old == STARTING:
            self._started(worker)
        elif old == IDLE:
            key = (worker.job.number, worker.kind)
            group = self.idle[key]
            del group[worker.number]
            if not group:
                del self.idle[key]
            self.idle_count -= 1
        elif old == BUSY:
            del self.busy[worker.number]
        if state == IDLE:
            self.idle.setdefault((worker.job.number, worker.kind), {})[worker.number] = worker
            self.idle_count += 1
        elif state == BUSY:
            self.busy[worker.number] = worker
        elif state == DEAD:
            del self.workers[worker.number]

    def _started(self, worker: Worker) -> None:
        self.starting -= 1
        if worker.actor is None:
            key = (worker.job.number, worker.kind)
            left = self.starting_for[key] - 1
            if left:
                self.starting_for[key] = left
            else:
                del self.starting_for[key]

    # -- starting ------------------------------------------------------------------------------------------------------

    def may_start(self, limit: int, now: float) -> bool:
        """Is there room for one more start (at most `limit` at a time)?"""
        return self.starting < limit and len(self.workers) < self.config.max_workers and now >= self.hold_starts_until

    def new_worker(self, job: Job, kind: Kind, actor: ActorRecord | None = None) -> Worker:
        """Enter a worker that is about to be started."""
        worker = Worker(self.next_number, job, kind)
        self.next_number += 1
        worker.actor = actor
        self.workers[worker.number] = worker
        self.starting += 1
        if actor is None:
            key = (job.number, kind)
            self.starting_for[key] = self.starting_for.get(key, 0) + 1
        return worker

    def enter_slot(self, job: Job, demand: Demand, peer: Peer, actor: ActorRecord | None = None) -> Worker:
        """Enter a slot of another node, which is about to be handed tasks, or to be where an actor lives."""
        worker = Worker(self.next_number, job, (demand.threads, _ELSEWHERE))
        self.next_number += 1
        worker.peer = peer
        worker.fresh = False
        worker.actor = actor
        self.workers[worker.number] = worker
        if actor is None:
            worker.state = BUSY
            self.busy[worker.number] = worker
        else:
            worker.state = ACTOR
        return worker

    def slots(self) -> Iterator[Worker]:
        """Those that are slots of other nodes."""
        return (worker for worker in self.workers.values() if worker.peer is not None)

    def start_failed(self, now: float) -> None:
        """A start failed: wait before the next, longer each time."""
        config = self.config
        pause = min(config.start_backoff * 2 ** min(self.failures, 16), config.start_backoff_max)
        self.failures += 1
        self.hold_starts_until = now + pause

    def start_succeeded(self) -> None:
        """A worker is ready: starts are sound again."""
        self.failures = 0
        self.hold_starts_until = 0.0

    def environment(self, job: Job, kind: Kind) -> dict[str, str]:
        """Variables for a new process: thread limits the user has not set, and which GPUs it may see."""
        threads, gpus = kind
        found: dict[str, str] = {}
        given = job.spec.environment
        for name in THREAD_VARIABLES:
            if name not in given and name not in self.config.keep_environment:
                found[name] = str(threads)
        if self.gpu_names:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpu_names[index] for index in gpus)
        return found

    # -- choosing ------------------------------------------------------------------------------------------------------

    def idle_for(self, job: Job, demand: Demand, ledger: Ledger) -> Worker | None:
        """The idle worker of this job that last worked and suits the demand (it stays idle until moved), or None."""
        if not demand.gpu:
            group = self.idle.get((job.number, (demand.threads, ())))
            return next(reversed(group.values())) if group else None
        for key, group in self.idle.items():
            if key[0] == job.number and key[1][0] == demand.threads and ledger.suits(demand, key[1][1]):
                return next(reversed(group.values()))
        return None

    def idle_of_kind(self, job: Job, kind: Kind) -> int:
        """How many idle workers of this job and kind there are."""
        group = self.idle.get((job.number, kind))
        return len(group) if group else 0

    def able(self, job: Job, kind: Kind) -> int:
        """How many workers of this job and kind could take its turn: busy, idle or being started, and not waiting."""
        count = self.starting_for.get((job.number, kind), 0) + self.idle_of_kind(job, kind)
        for worker in self.busy.values():
            if worker.job is job and worker.kind == kind and not worker.blocked:
                count += 1
        return count

    def fresh_for(self, job: Job, demand: Demand, ledger: Ledger) -> Worker | None:
        """An idle worker in which no user code has run, for an actor to live in."""
        for key, group in self.idle.items():
            if key[0] != job.number or key[1][0] != demand.threads:
                continue
            if not (ledger.suits(demand, key[1][1]) if demand.gpu else not key[1][1]):
                continue
            for worker in group.values():
                if worker.fresh:
                    return worker
        return None

    def surplus(self, keep: int, before: float) -> list[Worker]:
        """Idle workers to stop: beyond `keep`, idle since before that time, longest idle first."""
        extra = self.idle_count - keep
        if extra <= 0:
            return []
        old = [worker for group in self.idle.values() for worker in group.values() if worker.idle_since <= before]
        old.sort(key=_idle_order)
        return old[:extra]

    def longest_idle(self, job: Job, kind: Kind) -> Worker | None:
        """An idle worker of any other job or kind, to make room when the node has all the processes it may have."""
        best: Worker | None = None
        for key, group in self.idle.items():
            if key != (job.number, kind):
                for worker in group.values():
                    if best is None or _idle_order(worker) < _idle_order(best):
                        best = worker
        return best

    # -- checking ------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check the books against the workers themselves."""
        idle = starting = 0
        for worker in self.workers.values():
            assert worker.state != DEAD, worker
            assert (worker.state == IDLE) == (worker.number in self.idle.get((worker.job.number, worker.kind), {})), (
                f"{worker} is idle in one book only"
            )
            assert (worker.state == BUSY) == (worker.number in self.busy), f"{worker} is busy in one book only"
            assert 0 <= worker.ghosts <= len(worker.handed), f"{worker} has {worker.ghosts} ghosts"
            assert not worker.lent or worker.blocked, f"{worker} lends its CPU though it is not blocked"
            if worker.state in (BUSY, LEASED, DRAINING):
                waits = worker.peer is not None and worker.blocked
                assert worker.held is not None or waits, f"{worker} works but holds nothing"
            if worker.state in (IDLE, LEASED, DRAINING, STOPPING):
                assert not worker.handed, f"{worker} has tasks in this state"
            if worker.state in (IDLE, STOPPING):
                assert worker.held is None, f"{worker} holds {worker.held} but does nothing"
                assert not worker.blocked, f"{worker} waits but does nothing"
            assert (worker.state == BUSY) <= bool(worker.handed), f"{worker} is busy with nothing"
            assert bool(worker.lessee) == (worker.state == LEASED), f"{worker} and its lease disagree"
            assert worker.peer is None or worker.state in ((BUSY,) if worker.actor is None else (ACTOR, DYING)), (
                f"{worker} is a slot in another state"
            )
            assert (worker.actor is not None) or worker.state != ACTOR, f"{worker} is an actor without one"
            idle += worker.state == IDLE
            starting += worker.state == STARTING
        assert idle == self.idle_count == sum(len(group) for group in self.idle.values()), "idle workers miscounted"
        assert starting == self.starting, "starting workers miscounted"
        meant = sum(self.starting_for.values())
        assert meant == sum(worker.state == STARTING and worker.actor is None for worker in self.workers.values()), (
            "workers being started for tasks miscounted"
        )


def _idle_order(worker: Worker) -> tuple[float, int]:
    return worker.idle_since, worker.number
