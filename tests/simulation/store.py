"""A twin of the shared store, as far as scheduling depends on it: entries with attempts, claims and targets.

Follows the rules of `_store_core.h` for expect, claim, seal, retry, forced seal, watching and the dead; and remembers
more than the real one, so that the invariants can be checked: who claimed what and when. Memory, references and pins
are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PENDING, CLAIMED, SEALED = "PENDING", "CLAIMED", "SEALED"


class TargetGone(Exception):
    """The process that should make an object has been reaped."""


class Entry:
    """One object."""

    def __init__(self, object_id: bytes, target: int, spec: Any, made: float) -> None:
        self.made = made
        self.id = object_id
        self.state = PENDING
        self.attempt = 0
        self.target = target
        self.claimant = 0
        self.value: Any = None
        self.spec = spec
        self.watched = False
        self.wakes: list[Callable[[], None]] = []
        self.claims: list[tuple[float, int, int]] = []
        """(time, process, attempt) of each claim that was won."""


class Store:
    """All objects of a node."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.entries: dict[bytes, Entry] = {}
        self.gone: set[int] = set()
        self.words: dict[tuple[int, int], int] = {}
        self.on_claim: Callable[[Entry, int], None] | None = None

    def expect(self, object_id: bytes, target: int, spec: Any = None) -> Entry:
        """Make a pending entry; TargetGone when its maker has been reaped."""
        if target in self.gone:
            raise TargetGone
        found = self.entries.get(object_id)
        if found is None:
            found = self.entries[object_id] = Entry(object_id, target, spec, self.clock())
        return found

    def claim(self, object_id: bytes, attempt: int, process: int) -> bool:
        """Become the one executor."""
        entry = self.entries.get(object_id)
        if entry is None or entry.state != PENDING or entry.attempt != attempt:
            return False
        entry.state = CLAIMED
        entry.claimant = process
        entry.claims.append((self.clock(), process, attempt))
        if self.on_claim is not None:
            self.on_claim(entry, process)
        return True

    def seal(self, object_id: bytes, attempt: int, process: int, value: Any) -> str:
        """As the claimant: "stale", "ok", or "tell" when the broker waits for it."""
        entry = self.entries[object_id]
        if entry.state != CLAIMED or entry.attempt != attempt or entry.claimant != process:
            return "stale"
        return self._done(entry, value)

    def put(self, object_id: bytes, value: Any) -> None:
        """Create and seal at once."""
        self._done(self.expect(object_id, 0), value)

    def force(self, object_id: bytes, value: Any) -> str:
        """Seal whatever the claim."""
        entry = self.entries.get(object_id)
        if entry is None or entry.state == SEALED:
            return "stale"
        entry.attempt += 1
        return self._done(entry, value)

    def _done(self, entry: Entry, value: Any) -> str:
        entry.state = SEALED
        entry.value = value
        entry.target = entry.claimant = 0
        wakes, entry.wakes = entry.wakes, []
        for wake in wakes:
            wake()
        if entry.watched:
            entry.watched = False
            return "tell"
        return "ok"

    def retry(self, object_id: bytes, target: int) -> int | None:
        """From pending or claimed to pending with the next attempt."""
        entry = self.entries.get(object_id)
        if entry is None or entry.state == SEALED:
            return None
        entry.state = PENDING
        entry.claimant = 0
        entry.target = target
        entry.attempt += 1
        return entry.attempt

    def retarget(self, object_id: bytes, target: int) -> None:
        """Change who must seal a pending entry."""
        if target in self.gone:
            raise TargetGone
        entry = self.entries.get(object_id)
        if entry is not None and entry.state == PENDING:
            entry.target = target

    def watch(self, object_id: bytes) -> bool:
        """By the broker: True when it will be told."""
        entry = self.entries.get(object_id)
        if entry is None or entry.state == SEALED:
            return False
        entry.watched = True
        return True

    def sealed(self, object_id: bytes) -> bool:
        """Is it there?"""
        entry = self.entries.get(object_id)
        return entry is not None and entry.state == SEALED

    def expected(self, process: int) -> int:
        """Entries that this process must seal, other than by a claim of what the broker handed out."""
        return sum(entry.target == process and entry.state != SEALED for entry in self.entries.values())

    def orphans(self, process: int) -> tuple[list[Entry], list[bytes]]:
        """(entries that target a dead process, ids of those it had claimed)."""
        targeted, claimed = [], []
        for entry in self.entries.values():
            if entry.state == CLAIMED and entry.claimant == process:
                claimed.append(entry.id)
            if entry.state != SEALED and entry.target == process:
                targeted.append(entry)
        return targeted, claimed
