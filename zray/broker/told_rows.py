"""Rows of this node that the head's store must have, too: jobs, named and detached actors.

Covers which row is told when: each change once, the newest wins, one question at a time for each row, again after a refusal. Does not cover
how requests travel, or their repetition to the head's next life (`cluster`). Pure; equations, checked by `validate()`:

    asked <= newest (as keys)        a row is in `newest` until the head has stored its newest value
"""

from __future__ import annotations

from typing import Final

AGAIN_S: Final = 1.0
"""Seconds after which a row that was refused (the head's disk is full, perhaps) is told again."""
Place = tuple[int, bytes]
"""(table, key) of a row."""


class ToldRows:
    """What the head has not stored yet. Methods return the (place, value) pairs to tell it now."""

    __slots__ = ("_again", "_asked", "newest")

    def __init__(self) -> None:
        self.newest: dict[Place, bytes] = {}
        self._asked: dict[Place, bytes] = {}
        """Values that are on their way."""
        self._again: dict[Place, float] = {}
        """When refused ones are told again."""

    def changed(self, place: Place, value: bytes) -> list[tuple[Place, bytes]]:
        """A row has another value now."""
        self.newest[place] = value
        if place in self._asked:
            return []
        return self._tell(place)

    def _tell(self, place: Place) -> list[tuple[Place, bytes]]:
        self._again.pop(place, None)
        value = self._asked[place] = self.newest[place]
        return [(place, value)]

    def answered(self, place: Place, stored: bool, now: float) -> list[tuple[Place, bytes]]:
        """The head has answered."""
        told = self._asked.pop(place, None)
        if told is None:
            return []
        if not stored:
            self._again[place] = now + AGAIN_S
            return []
        if self.newest[place] == told:
            del self.newest[place]
            return []
        return self._tell(place)

    def tick(self, now: float) -> list[tuple[Place, bytes]]:
        """See whether refused rows are due."""
        due = [place for place, when in self._again.items() if when <= now]
        return [pair for place in due for pair in self._tell(place)]

    def validate(self) -> None:
        """Check the books; AssertionError names the equation that does not hold."""
        assert self._asked.keys() <= self.newest.keys(), "a row was told that nobody has"
        assert self.newest.keys() == self._asked.keys() | self._again.keys(), "a row waits, and nobody will tell it"
