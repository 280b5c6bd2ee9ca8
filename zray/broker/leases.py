"""Workers lent to callers.

Covers requests that wait, and the rule when a lease may be granted at all. Does not cover which worker is lent and what
it holds (`scheduler`), nor the calls
themselves: those go from the lessee straight to the worker and are known only to the store.

A lease is (worker, epoch): the lessee compares its epoch with a word of the worker's process record before each call,
so taking a lease back needs no message. A call that passed the check a moment before may still arrive: the worker is
DRAINING until the store says that nothing targets it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zray.broker.worker_pool import DRAINING, LEASED

if TYPE_CHECKING:
    from zray.broker.jobs import Job
    from zray.broker.task_table import ShapeState
    from zray.broker.worker_pool import Worker


class LeaseRequest:
    """A caller that would like a worker for calls of one shape."""

    __slots__ = ("job", "process", "reply", "shape")

    def __init__(self, process: int, job: Job, shape: ShapeState, reply: bytes) -> None:
        self.process = process
        self.job = job
        self.shape = shape
        self.reply = reply


class LeaseTable:
    """Requests that wait, in order, and the leases that are out."""

    __slots__ = ("draining", "leased", "not_before", "pending")

    def __init__(self) -> None:
        self.pending: dict[tuple[int, bytes], LeaseRequest] = {}
        """One per (process, shape)."""
        self.leased: dict[int, Worker] = {}
        """Workers in state LEASED, in the order of their grants."""
        self.draining: dict[int, Worker] = {}
        """Workers in state DRAINING."""
        self.not_before: float = 0.0
        """No grant before this time."""

    def request(self, request: LeaseRequest) -> LeaseRequest | None:
        """Let a request wait. A newer one of the same process and shape takes the place of an older, which is
        returned."""
        key = (request.process, request.shape.key)
        older = self.pending.pop(key, None)
        self.pending[key] = request
        return older

    def forget_process(self, process: int) -> None:
        """Drop what a dead process asked for."""
        for key in [key for key in self.pending if key[0] == process]:
            del self.pending[key]

    def forget_job(self, job: Job) -> None:
        """Drop what a job that ended asked for."""
        for key in [key for key, request in self.pending.items() if request.job is job]:
            del self.pending[key]

    def validate(self, workers: dict[int, Worker]) -> None:
        """Check the books against the workers."""
        for state, book in ((LEASED, self.leased), (DRAINING, self.draining)):
            numbers = {worker.number for worker in workers.values() if worker.state == state}
            assert numbers == set(book), f"leases: {sorted(numbers)} by state {state}, {sorted(book)} by the book"
