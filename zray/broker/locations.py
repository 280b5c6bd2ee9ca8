"""Which nodes have a copy of which object, and which objects are wanted here.

Covers objects of which at least one *other* node has a copy: their sizes, the nodes that have them, and whether this node is to have one. Does
not cover moving values (`object_exchange`), who keeps what alive (`lending`), or what becomes of what is lost (`recovery`).

An object that is not in this book is here, or small, or not made yet: its size is 0 and nobody else has it. For one that is in it

    holders(object) - {own}  is not empty
    wanted(object)  implies  own not in holders(object)

Beside it stand the objects that are *lost*: they existed, no copy is left, and they are being made again. None of these is in the book.

Copies are told apart by the attempt of the task that made them: what is heard of an older attempt changes nothing, and a newer one makes all
copies of older ones worthless.
"""

from __future__ import annotations


class _Place:
    """What is known of one object."""

    __slots__ = ("attempt", "holders", "size", "spare", "wanted")

    def __init__(self, size: int, attempt: int) -> None:
        self.size = size
        self.attempt = attempt
        self.holders: dict[bytes, None] = {}
        """In the order in which they got their copies."""
        self.wanted = False
        self.spare = False
        """Whether the copy that is, or comes, here is there for the case only that the others are lost."""


class Locations:
    """One node's book of copies."""

    __slots__ = ("_by_node", "_lost", "_own", "_places")

    def __init__(self, own: bytes) -> None:
        """Args:
        own: id of this node.
        """
        self._own = own
        self._places: dict[bytes, _Place] = {}
        self._by_node: dict[bytes, dict[bytes, None]] = {}
        """The same, by holder; never empty."""
        self._lost: dict[bytes, None] = {}

    def __bool__(self) -> bool:
        return bool(self._places or self._lost)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: bytes) -> bool:
        return name in self._places

    # -- questions -----------------------------------------------------------------------------------------------------

    def size(self, name: bytes) -> int:
        """Return the bytes of an object of which another node has a copy; 0 when none is known to."""
        place = self._places.get(name)
        return 0 if place is None else place.size

    def holders(self, name: bytes) -> tuple[bytes, ...]:
        """Return the nodes where users of an object had better run, as they have a copy (perhaps this one), the oldest copy first; () when no other
        node is known to have one. A spare copy here draws nobody away from where values are made and used."""
        place = self._places.get(name)
        if place is None:
            return ()
        return self.sources(name) if place.spare else tuple(place.holders)

    def elsewhere(self, name: bytes) -> bool:
        """Return whether other nodes have a copy and this one has none."""
        place = self._places.get(name)
        return place is not None and self._own not in place.holders

    def sources(self, name: bytes) -> tuple[bytes, ...]:
        """Return the other nodes that have a copy, the oldest first."""
        place = self._places.get(name)
        return () if place is None else tuple(node for node in place.holders if node != self._own)

    @property
    def any_lost(self) -> bool:
        """Whether there is an object that existed and has to be made again."""
        return bool(self._lost)

    def lost(self, name: bytes) -> bool:
        """Return whether an object existed and has to be made again."""
        return name in self._lost

    def attempt(self, name: bytes) -> int:
        """Return which attempt of its task made the known copies; -1 when none is known."""
        place = self._places.get(name)
        return -1 if place is None else place.attempt

    def wanted(self, name: bytes) -> bool:
        """Return whether a copy of an object that is elsewhere is to come here."""
        place = self._places.get(name)
        return place is not None and place.wanted

    def unwanted(self) -> list[bytes]:
        """Return the objects that are elsewhere and are not to come here."""
        return [name for name, place in self._places.items() if not place.wanted and self._own not in place.holders]

    # -- events --------------------------------------------------------------------------------------------------------

    def made_at(self, name: bytes, node: bytes, size: int, attempt: int = 0) -> bool:
        """A node has a copy of so many bytes, made by that attempt. False when a newer attempt is known: then it is ignored."""
        place = self._places.get(name)
        if place is not None and attempt != place.attempt:
            if attempt < place.attempt:
                return False
            self.forget(name)
            place = None
        self._lost.pop(name, None)
        if place is None:
            if node == self._own:
                return True
            place = self._places[name] = _Place(size, attempt)
        place.holders[node] = None
        self._by_node.setdefault(node, {})[name] = None
        if node == self._own:
            place.wanted = False
        return True

    def lose(self, name: bytes) -> None:
        """No copy of an object is left; it is being made again."""
        self.forget(name)
        self._lost[name] = None

    def found(self, name: bytes) -> None:
        """An object that was lost is here now (as a value, or as the error that it will never be), or nobody needs it."""
        self._lost.pop(name, None)

    def copied_to(self, name: bytes, node: bytes) -> None:
        """A node has a copy, too, of an object that is in the book; of others it is ignored."""
        place = self._places.get(name)
        if place is not None:
            self.made_at(name, node, place.size, place.attempt)

    def dropped_at(self, name: bytes, node: bytes) -> bool:
        """A node has no copy any more. True when that was the last one that is known, this node's included: then the object is lost, or
        must be asked for again."""
        place = self._places.get(name)
        if place is None or node not in place.holders:
            return False
        del place.holders[node]
        self._unlist(name, node)
        if not place.holders:
            del self._places[name]
            return True
        if len(place.holders) == 1 and self._own in place.holders:
            self.forget(name)
        return False

    def want(self, name: bytes, spare: bool = False) -> bool:
        """A copy is to come here; `spare`: nobody here needs it as long as others have one. True when that is new and possible: the object is
        elsewhere."""
        place = self._places.get(name)
        if place is None:
            return False
        new = not place.wanted and self._own not in place.holders
        if new or not spare:
            place.spare = spare
        place.wanted = place.wanted or new
        return new

    def want_no_more(self, name: bytes) -> None:
        """Nothing is under way any more (it has failed, or nobody needs it)."""
        place = self._places.get(name)
        if place is not None:
            place.wanted = False

    def forget(self, name: bytes) -> None:
        """Nobody here refers to an object any more, or all that is known of it is worthless."""
        place = self._places.pop(name, None)
        if place is not None:
            for node in place.holders:
                self._unlist(name, node)

    def node_gone(self, node: bytes) -> list[bytes]:
        """A node is dead; return the objects of which no copy is left, in the order in which they got theirs there."""
        return [name for name in list(self._by_node.get(node, ())) if self.dropped_at(name, node)]

    def _unlist(self, name: bytes, node: bytes) -> None:
        names = self._by_node[node]
        del names[name]
        if not names:
            del self._by_node[node]

    # -- checking ------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check that both sides of the book say the same."""
        assert not self._lost.keys() & self._places.keys(), "what is lost has copies"
        for name, place in self._places.items():
            assert place.holders.keys() - {self._own}, f"{name.hex()} is nowhere else"
            assert not (place.wanted and self._own in place.holders), f"{name.hex()} is wanted and here"
            for node in place.holders:
                assert name in self._by_node.get(node, ()), f"{name.hex()} at {node.hex()} is in one book only"
        for node, names in self._by_node.items():
            assert names, f"{node.hex()} is listed without objects"
            for name in names:
                assert node in self._places[name].holders, f"{name.hex()} at {node.hex()} is in one book only"
