"""From lost objects back to the tasks to run again.

Covers the *lineage* of what this node's tasks made on other nodes: which tasks are remembered, for how long, and which of them run again, in
which order, when values are lost. Does not cover where copies are (`locations`), reopening results and submitting tasks (`object_sharing`), or
what else a lost thing may be (an actor, a put value: those are not made again).

Theory. A task that was sent to another node is remembered as long as

    it has not ended,  or  one of its large results is referenced here,  or  a remembered task had one of its results as an argument

and so are, by the last clause, all from which a referenced value was made: not their values, only what must be run. An argument that has no
lineage of its own (it was put, or made here) is *held* instead: its value is kept as long as the task is remembered, so a task that is
remembered can run again whenever all its arguments with lineage exist or can be made again. Values are lost with their nodes; what is lost is
planned backwards, only as far as arguments do not exist, and each task once; a task that runs already is waited for. What is remembered and held
is bounded: the oldest is forgotten first, and what it made cannot be made again.

Each run after the first costs a retry (`max_retries`), whether it replaces one that was cut short or one whose results were lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from zray import ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zray.task import TaskSpec

_NOTHING: Final[frozenset[bytes]] = frozenset()
_OVERHEAD: Final = 600
"""Bytes that the books need for a task besides its arguments."""

PUT: Final = "it was put, and not made by a task that could run again"
FORGOTTEN: Final = "how it was made is not known (any more): it is the result of an actor's call, or its lineage grew too large and was forgotten"


class Rerun(NamedTuple):
    """Run a task again: reopen its lost results, keep its arguments, submit it. Those of its arguments that are lost come earlier."""

    task: TaskSpec
    job: int
    num_returns: int


class Unrecoverable(NamedTuple):
    """A lost object cannot be made again."""

    object: bytes
    kind: str
    """Name of the exception."""
    reason: str


class _Lineage:
    """What is remembered of a task."""

    __slots__ = (
        "bytes",
        "dependents",
        "job",
        "live",
        "max_retries",
        "name",
        "num_returns",
        "parents",
        "planned",
        "retries",
        "running",
        "spec",
    )

    def __init__(self, spec: TaskSpec, job: int, num_returns: int, max_retries: int, name: str) -> None:
        self.spec = spec
        self.job = job
        self.num_returns = num_returns
        self.max_retries = max_retries
        self.name = name
        self.retries = 0
        self.running = True
        self.planned = False
        """Whether it is about to be run again, so that its next sending is no retry of its own."""
        self.live: frozenset[bytes] = _NOTHING
        """Large results that are referenced here."""
        self.parents: tuple[bytes, ...] = ()
        """Remembered tasks of which this one has results as arguments."""
        self.dependents = 0
        """Remembered tasks that have this one among their parents."""
        self.bytes = _OVERHEAD + len(spec.args) + 32 * (len(spec.deps) + len(spec.borrowed))


class Recovery:
    """The lineage of one node's tasks on other nodes."""

    __slots__ = ("_limit", "_tasks", "bytes", "forgotten", "reruns")

    def __init__(self, limit: int) -> None:
        """Args:
        limit: bytes of specs and held values that may be remembered.
        """
        self._limit = limit
        self._tasks: dict[bytes, _Lineage] = {}
        """By task, the oldest first."""
        self.bytes = 0
        self.forgotten = 0
        """Tasks forgotten before their time."""
        self.reruns = 0

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, task: bytes) -> bool:
        return task in self._tasks

    # -- remembering ---------------------------------------------------------------------------------------------------

    def sent(
        self, spec: TaskSpec, job: int, num_returns: int, max_retries: int, name: str, size_of: Callable[[bytes], int]
    ) -> tuple[list[bytes], list[bytes]]:
        """A task is sent to another node.

        Args:
            spec: the task, of the attempt that is sent.
            job: that submitted it.
            num_returns: how many results it has.
            max_retries: from its shape; -1 without limit.
            name: for people.
            size_of: tells the bytes of a value that is to be held.

        Returns:
            (its arguments that are to be held as long as it is remembered, tasks that are forgotten for its sake).
        """
        known = self._tasks.get(spec.id)
        if known is not None:
            known.spec = spec
            known.running = True
            known.retries += not known.planned
            known.planned = False
            return [], []
        lineage = self._tasks[spec.id] = _Lineage(spec, job, num_returns, max_retries, name)
        if not (spec.deps or spec.borrowed):
            self.bytes += lineage.bytes
            return [], self._keep_within_limit(spec.id) if self.bytes > self._limit else []
        parents: dict[bytes, None] = {}
        held: dict[bytes, None] = {}
        for argument in (*spec.deps, *spec.borrowed):
            task = ids.task_of(argument)
            if not ids.is_put(argument) and task in self._tasks and task != spec.id:
                parents[task] = None
            elif argument not in held:
                held[argument] = None
                lineage.bytes += size_of(argument)
        lineage.parents = tuple(parents)
        for parent in parents:
            self._tasks[parent].dependents += 1
        self.bytes += lineage.bytes
        return list(held), self._keep_within_limit(spec.id)

    def _keep_within_limit(self, but: bytes) -> list[bytes]:
        dropped: list[bytes] = []
        while self.bytes > self._limit:
            oldest = next((task for task, lineage in self._tasks.items() if not lineage.running and task != but), None)
            if oldest is None:
                break
            self.forgotten += 1
            self._drop(oldest, dropped)
        return dropped

    def ended(self, task: bytes, live: Iterable[bytes]) -> list[bytes]:
        """A task has ended; `live`: its results that stayed on other nodes and are referenced here. Returns the tasks that are not remembered
        any more: what was held for them need not be held."""
        lineage = self._tasks.get(task)
        if lineage is None:
            return []
        lineage.running = lineage.planned = False
        lineage.live = frozenset(live)
        return self._settle(task)

    def unreferenced(self, name: bytes) -> list[bytes]:
        """Nothing here refers to an object any more; returns as `ended`."""
        task = ids.task_of(name)
        lineage = self._tasks.get(task)
        if lineage is None or name not in lineage.live:
            return []
        lineage.live -= {name}
        return self._settle(task)

    def job_over(self, job: int) -> list[bytes]:
        """A job has ended; returns as `ended`."""
        dropped: list[bytes] = []
        for task in [task for task, lineage in self._tasks.items() if lineage.job == job]:
            if task in self._tasks:
                self._drop(task, dropped)
        return dropped

    def _settle(self, task: bytes) -> list[bytes]:
        lineage = self._tasks[task]
        if lineage.running or lineage.live or lineage.dependents:
            return []
        dropped: list[bytes] = []
        self._drop(task, dropped)
        return dropped

    def _drop(self, task: bytes, dropped: list[bytes]) -> None:
        """Forget a task, and those that were remembered for its sake only."""
        left = [task]
        while left:
            lineage = self._tasks.pop(left.pop())
            self.bytes -= lineage.bytes
            dropped.append(lineage.spec.id)
            for name in lineage.parents:
                parent = self._tasks.get(name)
                if parent is None:
                    continue  # it was forgotten
                parent.dependents -= 1
                if not (parent.dependents or parent.running or parent.live):
                    left.append(name)

    # -- recovering ----------------------------------------------------------------------------------------------------

    def lost(self, names: Iterable[bytes], exists: Callable[[bytes], bool]) -> list[Rerun | Unrecoverable]:
        """Values are lost: plan what makes them again.

        Args:
            names: objects that are referenced here and of which no copy is left.
            exists: tells of an argument whether its value is somewhere, or is being made.

        Returns:
            What is to be done, in this order.
        """
        verdicts: dict[bytes, Unrecoverable | None] = {}
        """By task: None when it is run again, or runs."""
        actions: list[Rerun | Unrecoverable] = []
        for name in names:
            failure = self._plan(name, exists, verdicts, actions)
            if failure is not None:
                actions.append(Unrecoverable(name, failure.kind, failure.reason))
        return actions

    def _plan(
        self,
        name: bytes,
        exists: Callable[[bytes], bool],
        verdicts: dict[bytes, Unrecoverable | None],
        actions: list[Rerun | Unrecoverable],
    ) -> Unrecoverable | None:
        """Plan the task that makes `name`, its arguments first; not recursively, as chains may be long."""
        stack = [name]
        failures: dict[bytes, Unrecoverable] = {}
        """Objects without a task that could be run."""
        while stack:
            wanted = stack[-1]
            task = ids.task_of(wanted)
            if task in verdicts or wanted in failures:
                stack.pop()
                continue
            failure = self._why_not(wanted)
            if failure is None and self._tasks[task].running:
                verdicts[task] = None
            elif failure is None:
                missing = [dep for dep in self._needs(task) if not exists(dep)]
                open_ = [dep for dep in missing if ids.task_of(dep) not in verdicts and dep not in failures]
                if open_:
                    stack.extend(reversed(open_))
                    continue
                failed = next(
                    (f for dep in missing if (f := failures.get(dep) or verdicts.get(ids.task_of(dep)))), None
                )
                if failed is None:
                    verdicts[task] = None
                    actions.append(self._run_again(task))
                else:
                    reason = (
                        failed.reason
                        if failed.reason.startswith("its argument")
                        else f"its argument {failed.object.hex()} is lost: {failed.reason}"
                    )
                    verdicts[task] = Unrecoverable(wanted, "ObjectReconstructionFailedError", reason)
            elif task in self._tasks:
                verdicts[task] = failure
            else:
                failures[wanted] = failure
            stack.pop()
        return failures.get(name) or verdicts.get(ids.task_of(name))

    def _needs(self, task: bytes) -> list[bytes]:
        """Arguments of a task that are not held for it."""
        lineage = self._tasks[task]
        spec = lineage.spec
        parents = lineage.parents
        return [name for name in (*spec.deps, *spec.borrowed) if not ids.is_put(name) and ids.task_of(name) in parents]

    def _why_not(self, name: bytes) -> Unrecoverable | None:
        """Why the task of an object cannot run again, if it cannot."""
        if ids.is_put(name):
            return Unrecoverable(name, "ObjectLostError", PUT)
        lineage = self._tasks.get(ids.task_of(name))
        if lineage is None:
            return Unrecoverable(name, "ObjectLostError", FORGOTTEN)
        if lineage.running or lineage.max_retries < 0 or lineage.retries < lineage.max_retries:
            return None
        if not lineage.max_retries:
            reason = f"its task {lineage.name} has max_retries=0, so it is not run again"
            return Unrecoverable(name, "ObjectReconstructionFailedError", reason)
        reason = (
            f"its task {lineage.name} was run again {lineage.retries} times already, as often as max_retries allows"
        )
        return Unrecoverable(name, "ObjectReconstructionFailedMaxAttemptsExceededError", reason)

    def _run_again(self, task: bytes) -> Rerun:
        lineage = self._tasks[task]
        lineage.running = lineage.planned = True
        lineage.retries += 1
        self.reruns += 1
        return Rerun(lineage.spec, lineage.job, lineage.num_returns)

    # -- checking ------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check counts; AssertionError names what does not hold."""
        dependents: dict[bytes, int] = {}
        for lineage in self._tasks.values():
            for parent in lineage.parents:
                dependents[parent] = dependents.get(parent, 0) + 1
        for task, lineage in self._tasks.items():
            assert lineage.dependents == dependents.get(task, 0), f"{task.hex()} counts {lineage.dependents} dependents"
            assert lineage.running or lineage.live or lineage.dependents, f"{task.hex()} is remembered for nothing"
            assert lineage.running or not lineage.planned, f"{task.hex()} is planned and does not run"
        assert self.bytes == sum(lineage.bytes for lineage in self._tasks.values()), "bytes are miscounted"
