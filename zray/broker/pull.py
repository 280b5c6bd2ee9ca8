"""Getting values from other nodes, piece by piece: which piece is asked of whom, and when again.

Covers the receiver's decisions about all values that this node is getting: windows, several sources at once, sources that name others, pieces
that are lost, sources that fall silent or die. Does not cover bytes or sockets (`bulk`), the other side (`serving`), or which values
are wanted and what becomes of lost ones (`object_exchange`).

Theory. A value of a version is `count` pieces, each of which is

    MISSING --asked of a source--> ASKED --its bytes came--> THERE
       ^                             |
       +-----------------------------+   the connection broke (damaged bytes break it, too), the source fell silent, or has it not

and it is whole when all are THERE. What is ASKED of one source is at most a window, for all values together, and nobody sends what was not
asked for: so a slow receiver, or a slow disk below it, holds up its sources and nothing else. Values are begun in the order in which they were
wanted, and pieces are asked for in order: so a source that is itself still getting the value has them in the order in which others want them.

A source that has been asked may name another (`Elsewhere`): it is asked for nothing more unless the other fails. The bytes of a piece belong to
(object, version), and two versions never mix: pieces of another one are dropped, and a source that has another one is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from zray.broker.peer_messages import PIECE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

WINDOW_BYTES: Final = 8 << 20
"""Most that is asked of one source at a time; more is asked for when half of it has come, several pieces at once."""
STALL_S: Final = 5.0
"""Seconds after which a source that was asked and is not heard is asked no more, as long as there are others; then it is connected to anew."""
PATIENCE_S: Final = 15.0
"""Seconds for which a source that was named by another, and is itself waiting for a piece, is waited for: it may be waiting for this node."""
_STALL_MAX_S: Final = 20.0
LATE_S: Final = 0.5
"""Seconds after which a piece is also asked of a source that has nothing else to send, when only such pieces are left."""
_SMALLEST_PIECE: Final = 128 << 10
_PIECES: Final = 16
"""A value travels in so many pieces at least, as far as its size allows: the next one is encrypted while the last is decrypted."""
NEVER: Final = float("inf")


def piece_size(size: int) -> int:
    """Return the bytes of each piece of a value of `size` bytes but the last."""
    wanted = -(-size // _PIECES)
    rounded = -(-wanted // _SMALLEST_PIECE) * _SMALLEST_PIECE
    return max(_SMALLEST_PIECE, min(PIECE_BYTES, rounded))


class Open(NamedTuple):
    """Make room for a value; `Pulls.opened` or `Pulls.failed` is the answer."""

    object: bytes
    size: int


class Dial(NamedTuple):
    """Connect to a node, anew if there is a connection."""

    node: bytes


class SendAsk(NamedTuple):
    """Ask a source for pieces."""

    node: bytes
    object: bytes
    version: int
    piece_bytes: int
    pieces: list[int]
    avoid: list[bytes]


class SendTook(NamedTuple):
    """Tell a source that nothing more is wanted of it."""

    node: bytes
    object: bytes
    version: int
    whole: bool


class Whole(NamedTuple):
    """All pieces are there: seal the value."""

    object: bytes


class Failed(NamedTuple):
    """Give up what was opened."""

    object: bytes
    reason: str
    full: bool
    """There is no room; else: no source is left."""


Action = Open | Dial | SendAsk | SendTook | Whole | Failed


class _Source:
    """What is known of a node as a source, whatever the value."""

    __slots__ = ("asked_bytes", "connected", "heard", "pieces", "stall_s")

    def __init__(self, now: float) -> None:
        self.connected = False
        self.asked_bytes = 0
        self.heard = now
        """When it was heard last, or first had something to answer."""
        self.stall_s = STALL_S
        self.pieces: dict[tuple[bytes, int], float] = {}
        """(object, index) of what is ASKED of it, oldest first, and since when."""


class _Pull:
    """One value that is being got."""

    __slots__ = (
        "bad",
        "count",
        "left",
        "missing",
        "named",
        "object",
        "opened",
        "opening",
        "origins",
        "piece_bytes",
        "reasons",
        "size",
        "sources",
        "there",
        "told",
        "version",
    )

    def __init__(self, object_: bytes, version: int, size: int) -> None:
        self.object = object_
        self.version = version
        self.size = size
        self.piece_bytes = piece_size(size)
        self.count = -(-size // self.piece_bytes)
        self.there = bytearray(self.count)
        self.left = self.count
        self.missing = list(range(self.count - 1, -1, -1))
        """MISSING pieces, the next one last."""
        self.origins: dict[bytes, None] = {}
        """Sources that were given, not named by others: only when they say so, or are dead, are they none."""
        self.sources: dict[bytes, None] = {}
        """Nodes that may be asked."""
        self.named: dict[bytes, bytes] = {}
        """Sources that named another, and whom."""
        self.bad: dict[bytes, None] = {}
        """Nodes that were named and did not help."""
        self.told: dict[bytes, None] = {}
        """Nodes that were asked, to be told of the end."""
        self.reasons: dict[bytes, str] = {}
        self.opening = self.opened = False

    def asking(self) -> list[bytes]:
        """Nodes that may be asked and have not named another."""
        return [node for node in self.sources if node not in self.named]

    def length(self, index: int) -> int:
        return min(self.piece_bytes, self.size - index * self.piece_bytes)


class Pulls:
    """All values that one node is getting from others. Every method that returns actions may change what is wanted next."""

    def __init__(self, window_bytes: int = WINDOW_BYTES) -> None:
        self._window = window_bytes
        self._pulls: dict[bytes, _Pull] = {}
        """In the order in which they were wanted."""
        self._sources: dict[bytes, _Source] = {}
        self.repeated = 0
        """Pieces that came although they were there."""
        self.strays = 0
        """Pieces of values or versions that are not (any more) wanted."""

    def __contains__(self, object_: bytes) -> bool:
        return object_ in self._pulls

    def __len__(self) -> int:
        return len(self._pulls)

    # -- what is wanted ------------------------------------------------------------------------------------------------

    def want(self, object_: bytes, version: int, size: int, sources: Iterable[bytes], now: float) -> list[Action]:
        """Get a value; when it is being got already, this names more sources of the same version."""
        pull = self._pulls.get(object_)
        if pull is None:
            pull = self._pulls[object_] = _Pull(object_, version, size)
        elif pull.version != version:
            return []
        for node in sources:
            pull.sources[node] = pull.origins[node] = None
            pull.bad.pop(node, None)
        return self._next(now)

    def opened(self, object_: bytes, now: float) -> list[Action]:
        """There is room for a value."""
        pull = self._pulls.get(object_)
        if pull is None:
            return []
        pull.opened = True
        return self._next(now)

    def failed(self, object_: bytes, reason: str, now: float) -> list[Action]:
        """There is no room for a value."""
        pull = self._pulls.get(object_)
        return [] if pull is None else [*self._end(pull, Failed(object_, reason, True)), *self._next(now)]

    def forget(self, object_: bytes, now: float) -> list[Action]:
        """Nobody wants a value any more."""
        pull = self._pulls.get(object_)
        return [] if pull is None else [*self._end(pull, None), *self._next(now)]

    def _end(self, pull: _Pull, how: Whole | Failed | None) -> list[Action]:
        del self._pulls[pull.object]
        for source in self._sources.values():
            for object_, index in [key for key in source.pieces if key[0] == pull.object]:
                del source.pieces[object_, index]
                source.asked_bytes -= pull.length(index)
        whole = isinstance(how, Whole)
        told: list[Action] = [SendTook(node, pull.object, pull.version, whole) for node in pull.told]
        return told if how is None else [*told, how]

    # -- what comes ----------------------------------------------------------------------------------------------------

    def place_of(self, node: bytes, object_: bytes, version: int, index: int, size: int, now: float) -> int | None:
        """A piece of `size` bytes has come: return the offset where it belongs, or None when it is not wanted."""
        source = self._sources.get(node)
        if source is not None:
            source.heard = now
            source.stall_s = STALL_S
        pull = self._pulls.get(object_)
        if (
            pull is None
            or not pull.opened
            or pull.version != version
            or index >= pull.count
            or size != pull.length(index)
        ):
            self.strays += 1
            return None
        if pull.there[index]:
            self.repeated += 1
            self._not_asked(node, pull, index)
            return None
        return index * pull.piece_bytes

    def came(self, node: bytes, object_: bytes, index: int, now: float) -> list[Action]:
        """The piece that `place_of` had a place for is in it."""
        pull = self._pulls.get(object_)
        if pull is None:
            return []
        if not self._not_asked(node, pull, index) and index in pull.missing:
            pull.missing.remove(index)  # it was given up, and came all the same
        pull.there[index] = 1
        pull.left -= 1
        if not pull.left:
            return [*self._end(pull, Whole(object_)), *self._next(now)]
        return self._next(now)

    def _not_asked(self, node: bytes, pull: _Pull, index: int) -> bool:
        """A piece is not asked of a node any more; False when it was not."""
        source = self._sources.get(node)
        if source is None or source.pieces.pop((pull.object, index), None) is None:
            return False
        source.asked_bytes -= pull.length(index)
        return True

    def _missing_again(self, pull: _Pull, index: int) -> None:
        if pull.there[index] or any((pull.object, index) in source.pieces for source in self._sources.values()):
            return
        pull.missing.append(index)
        pull.missing.sort(reverse=True)

    def not_yet(self, node: bytes, now: float) -> None:
        """A source waits itself for what it was asked for."""
        source = self._sources.get(node)
        if source is not None:
            source.heard = now
            source.stall_s = STALL_S

    def not_here(self, node: bytes, object_: bytes, version: int, reason: str, now: float) -> list[Action]:
        """A source has not that version of a value."""
        pull = self._pulls.get(object_)
        if pull is None or pull.version != version or node not in pull.sources:
            return []
        return self._no_source(pull, node, reason, now)

    def elsewhere(self, node: bytes, object_: bytes, version: int, other: bytes, now: float) -> list[Action]:
        """A source names another."""
        pull = self._pulls.get(object_)
        if pull is None or pull.version != version or node not in pull.sources or other in pull.bad:
            return []
        self._take_back(node, pull)
        pull.named[node] = other
        pull.sources[other] = None
        return self._next(now)

    def _no_source(self, pull: _Pull, node: bytes, reason: str, now: float) -> list[Action]:
        """A node cannot be asked for a value any more."""
        pull.origins.pop(node, None)
        pull.reasons[node] = reason
        self._no_help(pull, node)
        pull.sources.pop(node, None)
        if pull.sources:
            return self._next(now)
        reasons = "; ".join(f"node {who.hex()[:8]}: {text}" for who, text in pull.reasons.items())
        failed = Failed(pull.object, f"no node has it any more ({reasons})", False)
        return [*self._end(pull, failed), *self._next(now)]

    def _no_help(self, pull: _Pull, node: bytes) -> None:
        """A node that was named does not help: those that named it are asked again, and told to name another."""
        self._take_back(node, pull)
        pull.named.pop(node, None)
        pull.bad[node] = None
        if node not in pull.origins and len(pull.sources) > 1:
            del pull.sources[node]
        for who in [who for who, other in pull.named.items() if other == node]:
            del pull.named[who]

    def _take_back(self, node: bytes, pull: _Pull | None = None) -> None:
        """What is asked of a node (for one value, or all) is MISSING again."""
        source = self._sources.get(node)
        if source is None:
            return
        for object_, index in [key for key in source.pieces if pull is None or key[0] == pull.object]:
            of = self._pulls[object_]
            del source.pieces[object_, index]
            source.asked_bytes -= of.length(index)
            self._missing_again(of, index)

    # -- connections and time ------------------------------------------------------------------------------------------

    def connected(self, node: bytes, now: float) -> list[Action]:
        """There is a connection to a node."""
        source = self._sources.get(node)
        if source is None:
            return []
        source.connected = True
        source.heard = now
        return self._next(now)

    def broken(self, node: bytes, now: float) -> list[Action]:
        """The connection to a node is gone, and will be made again."""
        source = self._sources.get(node)
        if source is None:
            return []
        source.connected = False
        self._take_back(node)
        return self._next(now)

    def node_gone(self, node: bytes, reason: str, now: float) -> list[Action]:
        """A node is dead."""
        actions: list[Action] = []
        for pull in list(self._pulls.values()):
            pull.told.pop(node, None)
            if node in pull.sources:
                actions += self._no_source(pull, node, reason, now)
        self._sources.pop(node, None)
        return actions

    @property
    def wake_at(self) -> float:
        """When `tick` is wanted at the latest; NEVER while nothing is asked."""
        stalls = [s.heard + s.stall_s for node, s in self._sources.items() if s.pieces or self._waits_for(node)]
        oldest = [next(iter(s.pieces.values())) + PATIENCE_S for s in self._sources.values() if s.pieces]
        return min([*stalls, *oldest, *(self._late_at(pull) for pull in self._pulls.values())], default=NEVER)

    def _waits_for(self, node: bytes) -> bool:
        """Whether something would be asked of a node if it were connected."""
        return not self._sources[node].connected and any(node in pull.asking() for pull in self._pulls.values())

    def _late_at(self, pull: _Pull) -> float:
        """When `_ask_again` will have something to ask for; NEVER: not before something else happens."""
        if pull.missing or not pull.opened or not any(self._is_idle(node) for node in pull.asking()):
            return NEVER
        return LATE_S + min(
            (
                since
                for s in self._sources.values()
                for (object_, _), since in s.pieces.items()
                if object_ == pull.object
            ),
            default=NEVER,
        )

    def _is_idle(self, node: bytes) -> bool:
        source = self._sources.get(node)
        return source is not None and source.connected and not source.pieces

    def tick(self, now: float) -> list[Action]:
        """Give up sources that were asked and are not heard."""
        actions: list[Action] = []
        for node, source in list(self._sources.items()):
            self._lose_patience(node, source, now)
            if now < source.heard + source.stall_s or not (source.pieces or self._waits_for(node)):
                continue
            source.stall_s = min(2 * source.stall_s, _STALL_MAX_S)
            source.heard = now
            source.connected = False
            self._take_back(node)
            actions.append(Dial(node))
            for pull in self._pulls.values():
                if node in pull.named.values():
                    self._no_help(pull, node)
        return [*actions, *self._next(now)]

    def _lose_patience(self, node: bytes, source: _Source, now: float) -> None:
        late: dict[bytes, None] = {}
        for key, since in list(source.pieces.items()):
            if now >= since + PATIENCE_S:
                del source.pieces[key]
                source.pieces[key] = now
                late[key[0]] = None
        for object_ in late:
            if node in self._pulls[object_].named.values():
                self._no_help(self._pulls[object_], node)

    # -- asking --------------------------------------------------------------------------------------------------------

    def _next(self, now: float) -> list[Action]:
        """Ask for what windows allow, of the values that were wanted first."""
        actions: list[Action] = []
        to_come: dict[bytes, int] = {}
        """Bytes that are missing of the values for which there is room, by source."""
        for pull in self._pulls.values():
            asking = pull.asking()
            for node in asking:
                if node not in self._sources:
                    self._sources[node] = _Source(now)
                    actions.append(Dial(node))
            if not pull.opened and not pull.opening:
                # Room is made when pieces are soon to come, not for all that is wanted.
                if not any(
                    self._sources[node].connected and to_come.get(node, 0) < 2 * self._window for node in asking
                ):
                    continue
                pull.opening = True
                actions.append(Open(pull.object, pull.size))
            for node in asking:
                to_come[node] = to_come.get(node, 0) + pull.left * pull.piece_bytes
            if not pull.opened:
                continue
            if pull.missing:
                actions += self._ask(pull, asking, now)
            elif len(asking) > 1:
                actions += self._ask_again(pull, asking, now)
        return actions

    def _has_room(self, node: bytes) -> bool:
        source = self._sources[node]
        return source.connected and source.asked_bytes < self._window

    def _may_be_asked(self, node: bytes) -> bool:
        """Whether to ask a source for more now, as much as it has room for."""
        source = self._sources[node]
        return source.connected and source.asked_bytes <= self._window // 2

    def _ask(self, pull: _Pull, asking: list[bytes], now: float) -> Iterator[Action]:
        asks: dict[bytes, list[int]] = {}
        ready = [node for node in asking if self._may_be_asked(node)]
        while ready and pull.missing:
            node = min(ready, key=lambda node: self._sources[node].asked_bytes)
            index = pull.missing.pop()
            self._asked(node, pull, index, now)
            asks.setdefault(node, []).append(index)
            if not self._has_room(node):
                ready.remove(node)
        return (self._ask_action(node, pull, pieces) for node, pieces in asks.items())

    def _ask_again(self, pull: _Pull, asking: list[bytes], now: float) -> Iterator[Action]:
        """Nothing is MISSING, but some pieces are late: sources that have nothing else to send are asked, too."""
        asks: dict[bytes, list[int]] = {}
        for node in asking:
            if not self._is_idle(node):
                continue
            mine = self._sources[node]
            for source in self._sources.values():
                for (object_, index), since in source.pieces.items():
                    late = object_ == pull.object and now >= since + LATE_S
                    if source is not mine and late and (object_, index) not in mine.pieces and self._has_room(node):
                        self._asked(node, pull, index, now)
                        asks.setdefault(node, []).append(index)
        return (self._ask_action(node, pull, pieces) for node, pieces in asks.items())

    def _asked(self, node: bytes, pull: _Pull, index: int, now: float) -> None:
        source = self._sources[node]
        if not source.pieces:
            source.heard = now
        source.pieces[pull.object, index] = now
        source.asked_bytes += pull.length(index)
        pull.told[node] = None

    def _ask_action(self, node: bytes, pull: _Pull, pieces: list[int]) -> SendAsk:
        return SendAsk(node, pull.object, pull.version, pull.piece_bytes, pieces, list(pull.bad))

    # -- looking -------------------------------------------------------------------------------------------------------

    def there(self, object_: bytes) -> tuple[int, int, bytearray] | None:
        """(version, bytes of a piece, 1 for each piece that is THERE) of a value that is being got and has room, else None."""
        pull = self._pulls.get(object_)
        return (pull.version, pull.piece_bytes, pull.there) if pull is not None and pull.opened else None

    def validate(self) -> None:
        """Check the books; AssertionError names what does not hold."""
        for pull in self._pulls.values():
            asked = {i for s in self._sources.values() for (o, i) in s.pieces if o == pull.object}
            missing = set(pull.missing)
            there = {i for i in range(pull.count) if pull.there[i]}
            assert len(missing) == len(pull.missing), "a piece is missing twice"
            assert not missing & there, "a piece is there and missing"
            assert not missing & asked, "a piece is asked for and missing"
            assert missing | there | asked == set(range(pull.count)), (
                "a piece is neither there nor asked for nor missing"
            )
            assert pull.left == pull.count - len(there) > 0, "a whole value is still being got"
            assert pull.sources, "nobody can be asked"
        for source in self._sources.values():
            assert all(object_ in self._pulls for object_, _ in source.pieces), "asked for what nobody wants"
            total = sum(self._pulls[object_].length(index) for object_, index in source.pieces)
            assert source.asked_bytes == total, "asked_bytes != sum of what is asked"
