"""Calls that a dead process made and may not have sent.

A caller makes the pending results first and sends the call afterwards; killed in between, it leaves results that nobody
will make, and somebody else may hold references to them. Covers when the results of a dead caller are looked at, and what
becomes of each. Does not cover calls that their executor took with it when it died (`task_events`, `actor_table`).

- A call that was to go straight to a living process (an actor, a leased worker) is sent to it again from the spec that the
  store keeps: whether it had arrived does not matter, because only one delivery can claim the result.
- A result that nobody knows how to make is lost: it is sealed as an error.

Nothing is decided before all that the dead had sent must have been heard. A task that runs again makes calls of its own,
with ids of their own (`zray.ids`): it needs nothing of what the dead had made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zray.task import TaskSpec

GRACE: Final = 1.0
"""Seconds from a death to the look at what it left."""


@dataclass(frozen=True, slots=True)
class MadeResult:
    """A result that a dead process has made pending and nobody has claimed."""

    id: bytes
    task: bytes
    target: int
    """The process that must make it; 0: whoever the broker chooses."""
    spec: TaskSpec | None


@dataclass(slots=True)
class Verdict:
    """What is to be done."""

    resend: dict[int, list[TaskSpec]] = field(default_factory=dict)
    """Calls by the process they were sent to, in the caller's order."""
    lost: list[bytes] = field(default_factory=list)
    """Results that will never be made."""


class UnsentCalls:
    """Who has died lately, and when to look at what it left."""

    __slots__ = ("_dead",)

    def __init__(self) -> None:
        self._dead: list[tuple[float, int]] = []
        """When each is due, and which; the first first."""

    def __len__(self) -> int:
        return len(self._dead)

    def died(self, process: int, now: float) -> None:
        """A process is dead (confirmed)."""
        self._dead.append((now + GRACE, process))

    def due(self, now: float) -> list[int]:
        """Return the processes to look at now, once."""
        ripe = [process for due, process in self._dead if due <= now]
        del self._dead[: len(ripe)]
        return ripe


def sort_out(made: Iterable[MadeResult], known: Callable[[bytes], bool], alive: Callable[[int], bool]) -> Verdict:
    """Decide what becomes of the results that a dead process had made pending.

    Args:
        made: all of them, in any order.
        known: whether the broker has this task or call, or this actor, and will see to it.
        alive: whether a process lives; what was expected of a dead one was dealt with when that one died.
    """
    verdict = Verdict()
    results = list(made)
    with_target = {result.task for result in results if result.target}  # further results of a call may have none
    for result in results:
        if result.target == 0:
            if result.task not in with_target and not known(result.task):
                verdict.lost.append(result.id)
        elif result.spec is not None and alive(result.target):
            verdict.resend.setdefault(result.target, []).append(result.spec)
    for calls in verdict.resend.values():
        calls.sort(key=lambda spec: spec.sequence)
    return verdict
