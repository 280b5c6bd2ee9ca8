"""The jobs of a node: whose turn it is.

Covers the record of a job (its queues, what it has been served, which of its tasks have children) and fairness between
jobs. Does not cover what is in the queues (`task_table`).

Fairness: the job with the fewest busy workers is next; among equals the one that has been served the least CPU time
since it last had work waiting. A job that had nothing waiting starts level with the least served of the others, so that
nobody saves up a claim by being idle.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zray.broker.task_table import DemandClass, TaskQueue
    from zray.task import JobSpec

GUEST_BIT: Final = 1 << 31
"""In the number of a job: what other nodes sent of it."""


class Job:
    """One driver's program."""

    __slots__ = (
        "children",
        "children_limit",
        "classes",
        "ended",
        "failed_starts",
        "guest",
        "next_look",
        "number",
        "process",
        "queued",
        "queues",
        "rotation",
        "running",
        "served",
        "spec",
    )

    def __init__(self, spec: JobSpec, process: int) -> None:
        self.number: int = spec.number
        self.spec = spec
        self.process = process
        self.guest = False
        """Its tasks were sent here by other nodes: they are not sent on."""
        self.ended = False
        self.queues: dict[bytes, TaskQueue] = {}
        """By shape."""
        self.classes: dict[bytes, DemandClass] = {}
        """By demand: queues whose tasks need the same fit or do not fit together."""
        self.rotation: deque[DemandClass] = deque()
        """Classes that have tasks waiting; the first is next."""
        self.queued: int = 0
        """Tasks in `rotation`."""
        self.running: int = 0
        """Its workers in state BUSY."""
        self.next_look: float = 0.0
        """When it is seen to again that it has its share of workers."""
        self.served: float = 0.0
        """Microseconds its tasks have run."""
        self.failed_starts: int = 0
        """Its workers in a row that died before they were ready."""
        self.children: dict[bytes, list[bytes]] = {}
        """Unfinished tasks that submitted tasks, and those: for recursive cancelling."""
        self.children_limit: dict[bytes, int] = {}
        """Length at which a list of children is next cleared of the finished ones."""

    def __repr__(self) -> str:
        return f"<Job {self.number}{' ended' if self.ended else ''} {self.queued} queued, {self.running} running>"


class JobTable:
    """All jobs that have not vanished yet: a job stays until its last worker has exited and its last detached actor is
    dead."""

    __slots__ = ("jobs", "waiting")

    def __init__(self) -> None:
        self.jobs: dict[int, Job] = {}
        self.waiting: dict[int, Job] = {}
        """Jobs with tasks queued."""

    def begins_to_wait(self, job: Job) -> None:
        """Its first task is queued: it starts level with the least served of the others that wait or run."""
        if job.number not in self.waiting:
            level = -1.0
            for other in self.jobs.values():
                if other is not job and (other.queued or other.running) and (level < 0 or other.served < level):
                    level = other.served
            if level > job.served:
                job.served = level
            self.waiting[job.number] = job

    def next(self, among: Iterable[Job]) -> Job | None:
        """Whose turn it is."""
        best: Job | None = None
        for job in among:
            if best is None or job.running < best.running or (job.running == best.running and job.served < best.served):
                best = job
        return best
