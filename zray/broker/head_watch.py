"""A node's view of its head: there, lost, back, replaced by its next life, or given up.

Covers the decisions of a node that is not the head, about its head alone. Does not cover who else is a member (`membership`), how the
head is reached (`cluster`, `links`), or what becomes of a dead head's tasks and objects (the scheduler).

A head that outlives its process (its rows are stored, see `zray.gcs.storage`) tells each member for how long it may be away: its
*grace*. A member that loses it goes on with its own tasks and actors, asks at the head's address (and where else it may be), and

             joined
               |            lost: port refuses, or no word for `silence_s`
    +--> WITH -+-----------------------------------------------> LOST --grace is over--> GIVEN UP
    |      ^                                                      |  |                      ^
    |      +---- the same head is heard, or answers: Back --------+  +-- it refuses us -----+
    +----------- its next life (another id) answers: Replaced ----+

The old head is declared dead only when its next life has answered: a refusing port may be a tunnel that is being made again, and frames
to a head that comes back under the same id must go on where they were. Where several nodes keep the head's tables, its next life is another of them:
it says so (`succeeded`), or is found by asking all of them. Equations, checked by `validate()`:

    state == LOST  =>  lost_at <= now < lost_at + grace            state == WITH  =>  reason == ""
    asks are at least ASK_S apart, but for what others have said; none is made but in LOST

Time in which this process did not run itself (it was stopped) is nobody's silence: a tick that comes much too late moves all marks.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

ASK_S: Final = 0.5
"""Seconds between two questions at the head's address."""
PAUSE_S: Final = 1.0
"""Ticks are far closer together than this; a larger gap means that this process was stopped."""
NEVER: Final = float("inf")


class Hang(NamedTuple):
    """The head is lost: close the connection to it; whoever is at its address, or may be the next one, will be asked."""

    reason: str


class Ask(NamedTuple):
    """Ask whoever is at the head's address, or may be the next one, to take this node back."""


class Back(NamedTuple):
    """It is the same head as before: what was under way goes on."""


class Replaced(NamedTuple):
    """The head has begun another life: its last one is dead, for the given reason."""

    old: bytes
    reason: str


class GiveUp(NamedTuple):
    """This node belongs to no cluster any more and ends."""

    reason: str


Action = Hang | Ask | Back | Replaced | GiveUp


class State(enum.IntEnum):
    """Of the head, as this node sees it."""

    JOINING = 0
    WITH = 1
    LOST = 2
    GIVEN_UP = 3


class Fault(enum.Enum):
    """One mistake the machine can be told to make, for tests."""

    ASKS_TOO_OFTEN = "every tick asks"
    GRACE_BEGINS_AGAIN = "each question begins the grace time again, so that it never ends"
    OLD_HEAD_LIVES = "the next life of the head is taken for the old one"
    DEAD_TOO_SOON = "a head that comes back under the same id counts as dead"
    PAUSE_COUNTS = "time in which this process was stopped counts as silence of the head"
    GOES_ON_WITHOUT_GRACE = "a head that must not be outlived is waited for"
    SILENCE_IGNORED = "a head that is silent, but whose port is open, is never lost"


class HeadWatch:
    """One node's watch over its head. Methods return what to do, in order; `now` is monotonic seconds."""

    __slots__ = (
        "_ask_at",
        "_faults",
        "_heard",
        "_silence_s",
        "_ticked",
        "grace",
        "head",
        "lost_at",
        "mend",
        "reason",
        "state",
    )

    def __init__(self, silence_s: float, faults: frozenset[Fault] = frozenset()) -> None:
        """`silence_s`: seconds without a word after which the head is lost although its port is open."""
        self.state = State.JOINING
        self.head = b""
        """Its id; empty before it has answered for the first time."""
        self.grace = 0.0
        """Seconds for which it may be away, as it said itself; 0: its members end with it."""
        self.lost_at = NEVER
        self.reason = ""
        """Why it is lost, for people."""
        self.mend = "Start it again with the same storage, address and key, and then this node"
        """What to do when it does not come back, for people."""
        self._silence_s = silence_s
        self._heard = 0.0
        self._ask_at = NEVER
        self._ticked = 0.0
        self._faults = faults

    # -- what happens --------------------------------------------------------------------------------------------------

    def joined(self, head: bytes, grace: float, now: float) -> list[Action]:
        """A head has taken this node in: for the first time, or again."""
        if self.state == State.GIVEN_UP:
            return []
        actions: list[Action] = []
        if self.state == State.LOST:
            if head == self.head or Fault.OLD_HEAD_LIVES in self._faults:
                actions.append(Replaced(head, "") if Fault.DEAD_TOO_SOON in self._faults else Back())
            else:
                actions.append(Replaced(self.head, self.reason))
        elif self.state == State.WITH and head != self.head:
            actions.append(Replaced(self.head, "another has taken its place"))
        self.head, self.grace = head, grace
        self._found(now)
        return actions

    def heard(self, now: float) -> list[Action]:
        """A message of the head this node belongs to."""
        if self.state not in (State.WITH, State.LOST):
            return []
        was_lost = self.state == State.LOST
        self._found(now)
        return [Back()] if was_lost else []

    def _found(self, now: float) -> None:
        self.state = State.WITH
        self.reason = ""
        self.lost_at = self._ask_at = NEVER
        self._heard = self._ticked = now

    def lost(self, reason: str, now: float) -> list[Action]:
        """No process is behind its port, or another node is."""
        if self.state != State.WITH:
            return []
        if self.grace <= 0 and Fault.GOES_ON_WITHOUT_GRACE not in self._faults:
            return self._give_up(f"the head is gone: {reason}")
        self.state = State.LOST
        self.reason = reason
        self.lost_at = now
        self._ask_at = now
        return [Hang(reason), *self._ask(now)]

    def succeeded(self, reason: str, now: float) -> list[Action]:
        """Another node says that it is the head now: ask it without waiting for the next turn."""
        if self.state == State.LOST:
            return self._ask(now)
        return self.lost(reason, now)

    def refused(self, reason: str) -> list[Action]:
        """The head, or who is at its address now, says that this node does not belong to its cluster (any more)."""
        return [] if self.state in (State.JOINING, State.GIVEN_UP) else self._give_up(reason)

    def reachable(self, now: float) -> list[Action]:
        """Somebody is at the head's address (again): ask without waiting for the next turn."""
        return self._ask(now) if self.state == State.LOST and now >= self._ask_at - ASK_S / 2 else []

    def tick(self, now: float) -> list[Action]:
        """See whether the head is silent for too long, whether to ask again, and whether to give up."""
        gap, self._ticked = now - self._ticked, now
        if gap > PAUSE_S and Fault.PAUSE_COUNTS not in self._faults:
            self._heard = min(self._heard + gap, now)
            if self.state == State.LOST:
                self.lost_at = min(self.lost_at + gap, now)
        if self.state == State.WITH:
            silence = now - self._heard
            if silence < self._silence_s or Fault.SILENCE_IGNORED in self._faults:
                return []
            return self.lost(f"it was not heard of for {silence:.1f} s", now)
        if self.state != State.LOST:
            return []
        if now >= self.lost_at + self.grace:
            return self._give_up(
                f"the head is gone ({self.reason}) and did not come back within {self.grace:g} s. {self.mend}"
            )
        return self._ask(now) if now >= self._ask_at or Fault.ASKS_TOO_OFTEN in self._faults else []

    def _ask(self, now: float) -> list[Action]:
        self._ask_at = now + ASK_S
        if Fault.GRACE_BEGINS_AGAIN in self._faults:
            self.lost_at = now
        return [Ask()]

    def _give_up(self, reason: str) -> list[Action]:
        self.state = State.GIVEN_UP
        self.lost_at = self._ask_at = NEVER
        return [GiveUp(reason)]

    # -- looking -------------------------------------------------------------------------------------------------------

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be sent to it now."""
        return self.state == State.LOST

    def validate(self, now: float) -> None:
        """Check the books after a tick at `now`; AssertionError names the equation that does not hold."""
        if self.state == State.LOST:
            assert self.lost_at <= now < self.lost_at + self.grace, "the grace time is over, and nobody has given up"
            assert self._ask_at <= now + ASK_S, "nobody asks"
        else:
            assert self.lost_at == self._ask_at == NEVER, "a head that is not lost is asked for"
        assert self.state != State.WITH or not self.reason, "a head that is there has a reason to be lost"
