"""The log of an actor with checkpoints: which of its calls are acknowledged, and from where its state can be made again.

Covers what an actor's owner (and the node where it lives, which has a copy) keeps of the actor: the newest safe checkpoint, the calls
since then in the order in which they ran, news that wait for objects, and what a new incarnation runs again. Does not cover
objects, processes and messages (`zray.broker.checkpoints`), nor pickling and sealing (`zray.checkpointing`).

The calls that an actor runs are numbered from 1, through all incarnations. At any moment

    the checkpoint        holds the effect of calls 1 .. number
    the log               holds calls number + 1 .. last, in order
    last - number         is at most `every`: the actor does not begin call number + every + 1 before a checkpoint is safe

A result may be seen only when its call is in the log (`confirmed`), and a checkpoint is offered only when the results of all calls that are in it
have been seen: so an unanswered call whose effect is in the checkpoint, which nobody could tell from one that never ran, does not exist. Whatever
the actor has acknowledged is made again by loading the checkpoint and running the log, each call once. News are applied strictly in the order in which they
came: a checkpoint whose value is still on its way holds up the calls behind it, and is forgotten together with them when the actor is lost.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zray.task import CallShape, TaskSpec

_ENTRY_BYTES: Final = 200
"""What an entry takes beside its arguments, about."""


class OutOfOrder(ValueError):
    """News that do not continue what is known: their sender is not the actor that is logged here."""


class Entry:
    """One call in the log."""

    __slots__ = ("held", "spec")

    def __init__(self, spec: TaskSpec, held: object = None) -> None:
        self.spec = spec
        self.held = held
        """Keeps the objects alive that the call needs."""

    @property
    def size(self) -> int:
        """Bytes, about."""
        return _ENTRY_BYTES + len(self.spec.args)


class _News:
    """Calls (`entries`) or a checkpoint (`name`), and the objects that must be here before they count."""

    __slots__ = ("entries", "held", "missing", "name", "number")

    def __init__(self, number: int, entries: list[Entry], name: bytes, held: object, missing: Iterable[bytes]) -> None:
        self.number = number
        """Of the last call that they tell of."""
        self.entries = entries
        self.name = name
        self.held = held
        self.missing = set(missing)


class ActorLog:
    """What makes one actor's state again."""

    __slots__ = (
        "_news",
        "bytes",
        "checkpoint",
        "checkpoints",
        "confirmed",
        "entries",
        "every",
        "follows",
        "held",
        "longest",
        "number",
        "replayed",
        "saved",
        "shapes",
        "unsealed",
    )

    def __init__(self, every: int, follows: bool = False) -> None:
        """Begin the log of an actor that has not been made yet.

        Args:
            every: calls after which the actor makes a checkpoint.
            follows: the actor's owner is another node, which confirms (`confirm`).
        """
        self.every = every
        self.follows = follows
        self.checkpoint = b""
        """Object with the newest safe state; b"" while there is none, and the constructor makes it."""
        self.held: object = None
        """Keeps that object alive."""
        self.number = 0
        """Calls whose effect is in it."""
        self.entries: collections.deque[Entry] = collections.deque()
        self.bytes = 0
        self.unsealed: dict[bytes, TaskSpec] = {}
        """Calls in the log whose results nobody has seen: the next incarnation seals them."""
        self.confirmed = 0
        """Results of calls up to this one may be seen."""
        self.saved = -1
        """The actor may go on from the checkpoint after this many calls; -1 while there is none."""
        self.shapes: dict[bytes, CallShape] = {}
        """Of all calls that were ever logged: whoever made them may be gone when they run again."""
        self.replayed = 0
        """Logged calls that incarnations were given to run again, in all."""
        self.checkpoints = 0
        self.longest = 0
        """Most calls that were in the log at a time."""
        self._news: collections.deque[_News] = collections.deque()

    @property
    def last(self) -> int:
        """Number of the last call in the log."""
        return self.number + len(self.entries)

    @property
    def _heard(self) -> int:
        """Number of the last call that anybody told of."""
        return self._news[-1].number if self._news else self.last

    # -- news ----------------------------------------------------------------------------------------------------------

    def calls(self, first: int, entries: list[Entry], missing: Iterable[bytes] = ()) -> None:
        """The actor has run calls; they count when the objects `missing` are here. Raises OutOfOrder."""
        if first != self._heard + 1:
            raise OutOfOrder(f"calls from {first} on, but {self._heard} is the last that is known")
        self._news.append(_News(first + len(entries) - 1, entries, b"", None, missing))
        self._apply()

    def saving(self, number: int, name: bytes, held: object, missing: Iterable[bytes] = ()) -> None:
        """The actor has made a checkpoint after call `number`; it is safe when `missing` are here. The last call may be one that was cancelled
        half-way: then it is not in the log. Raises OutOfOrder."""
        if not self._heard <= number <= self._heard + 1:
            raise OutOfOrder(f"a checkpoint after call {number}, but {self._heard} is the last that is known")
        self._news.append(_News(number, [], name, held, missing))
        self._apply()

    def ready(self, name: bytes) -> bool:
        """An object is here. Returns whether anything counts now that did not before."""
        for news in self._news:
            news.missing.discard(name)
        return self._apply()

    def spoiled(self, name: bytes) -> int:
        """A checkpoint cannot be kept here: forget it, and keep the log. Returns its number, -1 when it is none that is waited for."""
        for news in self._news:
            if news.name and news.name == name:
                self._news.remove(news)
                self._apply()
                return news.number
        return -1

    def _apply(self) -> bool:
        changed = False
        while self._news and not self._news[0].missing:
            self._take_in(self._news.popleft())
            changed = True
        return changed

    def _take_in(self, news: _News) -> None:
        if news.name:
            while self.entries and self.number < news.number:
                gone = self.entries.popleft()
                self.bytes -= gone.size
                self.unsealed.pop(gone.spec.id, None)
                self.number += 1
            self.number = news.number
            self.checkpoint, self.held = news.name, news.held
            self.checkpoints += 1
        else:
            self.entries.extend(news.entries)
            self.bytes += sum(entry.size for entry in news.entries)
            self.longest = max(self.longest, len(self.entries))
        if not self.follows:
            self.confirm(self.last, self.number if self.checkpoint else -1)

    def confirm(self, logged: int, saved: int) -> None:
        """The owner has in its log, or in a checkpoint, all calls up to `logged`; its checkpoint is the one after call `saved`."""
        self.confirmed = max(self.confirmed, logged)
        self.saved = max(self.saved, saved)

    # -- lives ---------------------------------------------------------------------------------------------------------

    def lost(self, orphans: list[TaskSpec]) -> list[TaskSpec]:
        """The actor's process is gone, and with it all that is not in the log.

        Args:
            orphans: calls that it should have answered and has not.

        Returns:
            Those of them that have had no effect.
        """
        self._news.clear()
        logged = {entry.spec.id: entry.spec for entry in self.entries}
        self.unsealed = {spec.id: logged[spec.id] for spec in orphans if spec.id in logged}
        return [spec for spec in orphans if spec.id not in logged]

    def begun(self) -> list[TaskSpec]:
        """A new incarnation begins with the checkpoint: return the calls that it runs again, in order."""
        self.replayed += len(self.entries)
        return [entry.spec for entry in self.entries]

    def seed(
        self, checkpoint: bytes, held: object, number: int, entries: list[Entry], unsealed: Iterable[bytes]
    ) -> None:
        """The owner sends the actor here with all that makes its state."""
        self.checkpoint, self.held, self.number = checkpoint, held, number
        self.entries = collections.deque(entries)
        self.bytes = sum(entry.size for entry in entries)
        wanted = set(unsealed)
        self.unsealed = {entry.spec.id: entry.spec for entry in entries if entry.spec.id in wanted}
        self.confirm(self.last, number if checkpoint else -1)

    def close(self) -> None:
        """The actor is dead for good."""
        self._news.clear()
        self.entries.clear()
        self.unsealed = {}
        self.bytes = 0
        self.checkpoint, self.held = b"", None

    # -- checking ------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check the invariants; AssertionError names what does not hold."""
        assert len(self.entries) <= self.every, (
            f"{len(self.entries)} calls are logged, a checkpoint was due at {self.every}"
        )
        assert self.checkpoint or not self.entries, "calls are logged, but there is no state to begin with"
        assert self.follows or self.confirmed <= self.last, (
            f"{self.confirmed} is confirmed, the log ends at {self.last}"
        )
        assert self.follows or self.saved <= self.number, f"checkpoint {self.saved} is confirmed, {self.number} is kept"
        assert self.bytes == sum(entry.size for entry in self.entries), "the bytes of the log are miscounted"
        assert set(self.unsealed) <= {entry.spec.id for entry in self.entries}, "a call is to be sealed, but not logged"
