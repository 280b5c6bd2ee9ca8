"""Large values between simulated nodes: the seam of `zray.broker.transfer`, without its pieces.

Covers that a value comes after a while, from whichever of its sources lives, can be reached and still has that version of it; or does not. Does not
cover pieces, checksums, several sources at once: those have simulations and tests of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tests.simulation.cluster_store import Ref
from tests.simulation.world import World
from zray._store import STATE_SEALED

TRANSFERS = 998
"""Descriptor that is ready when something has come."""


class Whole:
    """A value that has come: `zray.object_store.Place`."""

    def __init__(self, ref: Ref, data: bytes) -> None:
        self.ref = ref
        self.data = data

    def seal(self, kind: int, flags: int, refs: list[Ref]) -> bool:
        """Make it visible."""
        return self.ref.store.seal_copy(self.ref, self.data, kind, flags, refs)


class _Pull:
    """A value on its way here."""

    def __init__(self, ref: Ref, version: int, sources: list[bytes]) -> None:
        self.ref = ref
        self.version = version
        self.sources = sources


class SimTransfer:
    """One broker's large values on their way."""

    def __init__(self, world: World, own: bytes, receiver: Any, ready: Callable[[int], None]) -> None:
        self.world = world
        self.own = own
        self.receiver = receiver
        self.ready = ready
        self.find: Callable[[bytes], SimTransfer | None] = lambda node: None
        """The other end, if it can be reached."""
        self.store: Any = None
        self.by_link = self
        self.descriptors = {TRANSFERS}
        self.wake_at = float("inf")
        self.sent_bytes = 0
        self._versions: dict[bytes, int] = {}
        self._last = 0
        self._pulling: dict[bytes, _Pull] = {}
        self._ends: list[Callable[[], None]] = []

    # -- the seam --------------------------------------------------------------------------------------------------------

    def version_of(self, name: bytes) -> int:
        """The number that stands for the bytes of a value that is here."""
        if name not in self._versions:
            self._last += 1
            self._versions[name] = self._last * 1000 + self.own[0]
        return self._versions[name]

    def pull(self, ref: Ref, version: int, size: int, contained: int, sources: Iterable[bytes]) -> None:
        """Get a value; called again it adds sources."""
        name = ref.binary()
        known = self._pulling.get(name)
        if known is not None:
            known.sources += [node for node in sources if node not in known.sources]
            return
        self._pulling[name] = _Pull(ref, version, list(sources))
        self._try_next(name)

    def _try_next(self, name: bytes) -> None:
        self.world.at(self.world.delay() * self.world.rng.choice([2, 20]), self._try, self._pulling[name])

    def _try(self, pull: _Pull) -> None:
        name = pull.ref.binary()
        if self._pulling.get(name) is not pull:
            return
        if not pull.sources:
            del self._pulling[name]
            self._end(lambda: self.receiver.not_arrived(name, "no source has it", False))
            return
        other = self.find(pull.sources[0])
        if other is None:  # it may come back: who is dead is told of by `node_gone`
            self.world.at(0.5, self._try, pull)
            return
        entry = other.store.entries.get(name)
        if entry is None or entry.state != STATE_SEALED or other._versions.get(name) != pull.version:
            pull.sources.pop(0)
            self._try_next(name)
            return
        del self._pulling[name]
        self._versions[name] = pull.version
        self._end(lambda: self.receiver.arrived(name, Whole(pull.ref, entry.data)))

    def _end(self, tell: Callable[[], None]) -> None:
        self._ends.append(tell)
        self.ready(TRANSFERS)

    def pulling(self, name: bytes) -> bool:
        """Whether a value is on its way."""
        return name in self._pulling

    def unwanted(self) -> list[bytes]:
        """What is on its way and nothing else refers to."""
        return [name for name, pull in self._pulling.items() if self.store.references(pull.ref) <= 1]

    def forget(self, name: bytes) -> None:
        """Nothing more of it is got or given."""
        self._pulling.pop(name, None)
        self._versions.pop(name, None)

    def node_gone(self, node: bytes, reason: str) -> None:
        """A node is dead."""
        for name, pull in list(self._pulling.items()):
            if node in pull.sources:
                pull.sources.remove(node)
                self._try_next(name)

    def fetching(self, name: bytes) -> bool:
        """Nothing comes over links."""
        return False

    def stream_wanted(self, node: bytes) -> None:
        """Nobody asks: values are not got in pieces here."""
        raise AssertionError

    def stream_is(self, node: bytes, message: Any) -> None:
        """As `stream_wanted`."""
        raise AssertionError

    def take_in(self) -> None:
        """Tell of what has come."""
        ends, self._ends = self._ends, []
        for end in ends:
            end()

    def pump(self) -> None:
        """Nothing waits for a turn."""

    def tick(self, now: float) -> None:
        """Nothing is due."""

    def close(self) -> None:
        """End all."""
        self._pulling.clear()

    def _never(self, *message: Any) -> None:
        raise AssertionError(f"nobody asks for pieces here: {message}")

    asked = took = chunk = not_fetched = _never
