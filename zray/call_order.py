"""The order of calls inside a living actor: each caller's calls run in the order in which it made them.

Covers numbering per caller: what may be delivered, what is held until an earlier call has come, what came twice. Does
not cover running calls (`zray.actor_runtime`), nor what becomes of them when the actor dies
(`zray.broker.actor_table`).

A caller numbers its calls to one incarnation of an actor from 1. They come over two ways, through the broker while the
actor could not be reached and straight afterwards, so a later one may overtake an earlier. Number 0 means: outside of
the numbering, deliver at once (calls that an earlier incarnation left behind).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zray.task import TaskSpec


class _Caller:
    """One caller: the number that is next, and calls that came before their turn."""

    __slots__ = ("held", "next")

    def __init__(self) -> None:
        self.next: int = 1
        self.held: dict[int, TaskSpec] = {}


class CallOrder:
    """Puts the calls of many callers into order. Invariant for each caller: min(held) > next."""

    __slots__ = ("_callers",)

    def __init__(self) -> None:
        self._callers: dict[int, _Caller] = {}

    def arrive(self, caller: int, call: TaskSpec) -> list[TaskSpec]:
        """Return the calls that may run now, in order: none while an earlier one is missing, or when this one came
        before.

        Args:
            caller: whose numbering; a process handle.
            call: its `sequence` is its place in that numbering, from 1; 0 for none.
        """
        sequence = call.sequence
        if sequence == 0:
            return [call]
        found = self._callers.get(caller)
        if found is None:
            found = self._callers[caller] = _Caller()
        if sequence != found.next:
            if sequence > found.next:
                found.held.setdefault(sequence, call)
            return []
        found.next = sequence + 1
        ready = [call]
        while found.held and found.next in found.held:
            ready.append(found.held.pop(found.next))
            found.next += 1
        return ready

    def is_new(self, caller: int, sequence: int) -> bool:
        """Whether no call with this number has come from a caller."""
        found = self._callers.get(caller)
        return found is None or (sequence >= found.next and sequence not in found.held)

    def gone(self, caller: int) -> list[TaskSpec]:
        """Forget a caller that is dead; return what it sent before its turn, in order: what is missing will not
        come."""
        found = self._callers.pop(caller, None)
        return [] if found is None else [found.held[sequence] for sequence in sorted(found.held)]

    def held(self) -> int:
        """Return how many calls wait for an earlier one."""
        return sum(len(caller.held) for caller in self._callers.values())

    def callers(self) -> list[int]:
        """Return whose numberings are known, in the order in which they appeared."""
        return list(self._callers)

    def validate(self) -> None:
        """Check the invariant; AssertionError names the caller."""
        for name, caller in self._callers.items():
            assert caller.next >= 1, f"caller {name}: the next call is {caller.next}"
            early = [sequence for sequence in caller.held if sequence <= caller.next]
            assert not early, f"caller {name}: calls {early} are held back, {caller.next} is next"
