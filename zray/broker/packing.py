"""Which nodes the bundles of a placement group go to.

Covers one question: given what is free on each node, where does each bundle go, by the group's strategy. Does not cover
when it is asked or what is done with the answer (`placement_groups`).

PACK uses as few nodes as it can and SPREAD as many, by a quick rule first, and by a bounded search where the rule finds no
place for all bundles (or, PACK, might do with fewer nodes). STRICT_PACK needs one node for all. STRICT_SPREAD gives each
bundle a node of its own, which is a matching in a bipartite graph: it is found whenever there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from zray.placing import PACK, STRICT_PACK, STRICT_SPREAD, Requirement, meets

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SEARCH_STEPS: Final = 30_000
"""Nodes looked at in one search: some ten milliseconds at most."""
_SEARCH_BUNDLES: Final = 300
"""Larger groups are placed by the quick rule only."""
_FILL_KINDS: Final = 32
"""Different nodes that are compared when one is to be filled; equal ones count once."""

Amounts = dict[str, int]


class Room:
    """What is free on a node, and its labels."""

    __slots__ = ("free", "id", "labels")

    def __init__(self, node: bytes, free: Mapping[str, int], labels: Mapping[str, str]) -> None:
        self.id = node
        self.free: Amounts = dict(free)
        self.labels = labels

    def fits(self, amounts: Mapping[str, int]) -> bool:
        """Whether there is enough of everything."""
        return all(self.free.get(name, 0) >= units for name, units in amounts.items())

    def take(self, amounts: Mapping[str, int], sign: int = 1) -> None:
        """Take amounts (or give them back: sign -1)."""
        for name, units in amounts.items():
            self.free[name] = self.free.get(name, 0) - sign * units


class Wanted:
    """A bundle that needs a node."""

    __slots__ = ("amounts", "index", "requirements")

    def __init__(self, index: int, amounts: Amounts, requirements: tuple[Requirement, ...] = ()) -> None:
        self.index = index
        self.amounts = amounts
        self.requirements = requirements

    def may_be_at(self, room: Room) -> bool:
        """Whether it fits there now."""
        return room.fits(self.amounts) and meets(room.labels, self.requirements)


def pack(
    strategy: str, wanted: Sequence[Wanted], rooms: Sequence[Room], present: Sequence[bytes] = ()
) -> dict[int, bytes] | None:
    """Return the node of each wanted bundle; None when there is no place for all of them (or the search found none).

    Args:
        strategy: of the group (`zray.placing`).
        wanted: bundles without a node.
        rooms: all nodes that live; they are left as they are.
        present: nodes of the bundles that the group has already.
    """
    free = [Room(room.id, room.free, room.labels) for room in rooms]
    if _too_much(wanted, free):
        return None
    order = _hardest_first(wanted, free)
    if strategy == STRICT_PACK:
        return _all_on_one(wanted, free, present)
    if strategy == STRICT_SPREAD:
        return _one_each(order, [room for room in free if room.id not in present])
    counts = {room.id: 0 for room in free}
    for node in present:
        counts[node] = counts.get(node, 0) + 1
    if strategy == PACK:
        return _on_few(order, free, counts)
    found = _spread(order, free, dict(counts))
    if found is None:
        found = _Search(order, free, counts, len(free)).run(_SEARCH_STEPS)
    return found


def _too_much(wanted: Sequence[Wanted], rooms: list[Room]) -> bool:
    """Whether all nodes together have too little of something."""
    total = _sum(wanted)
    return any(units > sum(max(0, room.free.get(name, 0)) for room in rooms) for name, units in total.items())


def _sum(wanted: Sequence[Wanted]) -> Amounts:
    total: Amounts = {}
    for bundle in wanted:
        for name, units in bundle.amounts.items():
            total[name] = total.get(name, 0) + units
    return total


def _hardest_first(wanted: Sequence[Wanted], rooms: Sequence[Room]) -> list[Wanted]:
    """Bundles by the largest share that they take of what is free anywhere."""
    most: Amounts = {}
    for room in rooms:
        for name, units in room.free.items():
            most[name] = max(most.get(name, 0), units)

    def share(bundle: Wanted) -> float:
        return max((units / most[name] if most.get(name, 0) > 0 else 2.0 for name, units in bundle.amounts.items()))

    return sorted(wanted, key=lambda bundle: (-share(bundle), -len(bundle.requirements), bundle.index))


def _all_on_one(wanted: Sequence[Wanted], rooms: list[Room], present: Sequence[bytes]) -> dict[int, bytes] | None:
    """On the node where the least is left over."""
    total = _sum(wanted)
    fitting = [
        room
        for room in rooms
        if room.fits(total)
        and (not present or room.id in present)
        and all(meets(room.labels, bundle.requirements) for bundle in wanted)
    ]
    if not fitting:
        return None
    best = min(fitting, key=lambda room: sum(room.free.get(name, 0) - units for name, units in total.items()))
    return {bundle.index: best.id for bundle in wanted}


def _one_each(wanted: list[Wanted], rooms: list[Room]) -> dict[int, bytes] | None:
    """A matching of bundles and nodes, by augmenting paths."""
    if len(rooms) < len(wanted):
        return None
    guest: dict[bytes, Wanted] = {}
    for bundle in wanted:
        if not _seat(bundle, rooms, guest):
            return None
    return {bundle.index: node for node, bundle in guest.items()}


def _seat(first: Wanted, rooms: list[Room], guest: dict[bytes, Wanted]) -> bool:
    """Find a node for one more bundle, moving others on if need be."""
    came_from: dict[bytes, Wanted] = {}
    """For each node that was reached: the bundle that would take it."""
    at: dict[int, bytes] = {bundle.index: node for node, bundle in guest.items()}
    pending = [first]
    for bundle in pending:
        for room in rooms:
            if room.id in came_from or not bundle.may_be_at(room):
                continue
            came_from[room.id] = bundle
            if room.id in guest:
                pending.append(guest[room.id])
                continue
            node = room.id
            while True:
                mover = came_from[node]
                guest[node] = mover
                if mover is first:
                    return True
                node = at[mover.index]
    return False


def _spread(wanted: list[Wanted], rooms: list[Room], counts: dict[bytes, int]) -> dict[int, bytes] | None:
    """Each to the fitting node that has the fewest."""
    rooms = [Room(room.id, room.free, room.labels) for room in rooms]
    found: dict[int, bytes] = {}
    for bundle in wanted:
        fitting = [room for room in rooms if bundle.may_be_at(room)]
        if not fitting:
            return None
        best = min(fitting, key=lambda room: counts[room.id])
        best.take(bundle.amounts)
        counts[best.id] += 1
        found[bundle.index] = best.id
    return found


def _on_few(wanted: list[Wanted], rooms: list[Room], counts: dict[bytes, int]) -> dict[int, bytes] | None:
    """Fill one node after the other, always the one that takes the most; then see whether fewer would do."""
    found = _fill(wanted, rooms, counts)
    used = {node for node, count in counts.items() if count}
    steps = _SEARCH_STEPS
    limit = len(rooms) if found is None else len(used | set(found.values())) - 1
    lowest = max(1, len(used), _fewest(wanted, rooms))
    for nodes in range(lowest, limit + 1):
        search = _Search(wanted, rooms, counts, nodes)
        better = search.run(steps)
        if better is not None:
            return better
        steps -= search.steps
        if steps <= 0:
            break
    return found


def _fewest(wanted: list[Wanted], rooms: list[Room]) -> int:
    """So many nodes at least have what is wanted of each resource."""
    fewest = 0
    for name, units in _sum(wanted).items():
        left = units
        for number, free in enumerate(sorted((room.free.get(name, 0) for room in rooms), reverse=True), 1):
            left -= free
            if left <= 0:
                fewest = max(fewest, number)
                break
    return fewest


def _fill(wanted: list[Wanted], rooms: list[Room], counts: dict[bytes, int]) -> dict[int, bytes] | None:
    found: dict[int, bytes] = {}
    left = list(wanted)
    rest = [Room(room.id, room.free, room.labels) for room in rooms]
    asked = list({bundle.requirements for bundle in wanted if bundle.requirements})
    while left:
        tries = []
        for room in _different(rest, counts, asked):
            taken = []
            trial = Room(room.id, room.free, room.labels)
            for bundle in left:
                if bundle.may_be_at(trial):
                    trial.take(bundle.amounts)
                    taken.append(bundle)
            tries.append((bool(counts[room.id]), len(taken), room, taken))
        if not tries:
            return None
        _, number, best, taken = max(tries, key=lambda one: (one[0] and one[1] > 0, one[1]))
        if not number:
            return None
        for bundle in taken:
            found[bundle.index] = best.id
        left = [bundle for bundle in left if bundle.index not in found]
        rest.remove(best)
    return found


def _different(rooms: list[Room], counts: Mapping[bytes, int], asked: list[tuple[Requirement, ...]]) -> list[Room]:
    """One of each kind of node, those that the group uses already and those with most free first."""
    kinds: dict[object, Room] = {}
    for room in rooms:
        labels = tuple(meets(room.labels, requirements) for requirements in asked)
        kinds.setdefault((counts[room.id] > 0, labels, *sorted(room.free.items())), room)
    if len(kinds) <= _FILL_KINDS:
        return list(kinds.values())
    order = sorted(kinds.values(), key=lambda room: (-counts[room.id], -sum(room.free.values())))
    return order[:_FILL_KINDS]


class _Search:
    """Tries all ways, with a limit of steps, to place bundles on at most so many nodes (those used already among them)."""

    def __init__(self, wanted: list[Wanted], rooms: list[Room], counts: Mapping[bytes, int], nodes: int) -> None:
        self._wanted = wanted
        self._rooms = [Room(room.id, room.free, room.labels) for room in rooms]
        self._counts = dict(counts)
        self._nodes = nodes
        self.steps = 0

    def run(self, limit: int) -> dict[int, bytes] | None:
        """Return the first way found within so many steps."""
        if len(self._wanted) > _SEARCH_BUNDLES:
            return None
        found: dict[int, bytes] = {}
        used = sum(count > 0 for count in self._counts.values())
        return found if self._place(0, used, found, limit) else None

    def _place(self, at: int, used: int, found: dict[int, bytes], limit: int) -> bool:
        if at == len(self._wanted):
            return True
        bundle = self._wanted[at]
        for room in self._rooms:
            self.steps += 1
            if self.steps > limit:
                return False
            fresh = not self._counts[room.id]
            if (fresh and used >= self._nodes) or not bundle.may_be_at(room):
                continue
            room.take(bundle.amounts)
            self._counts[room.id] += 1
            found[bundle.index] = room.id
            if self._place(at + 1, used + fresh, found, limit):
                return True
            del found[bundle.index]
            self._counts[room.id] -= 1
            room.take(bundle.amounts, -1)
        return False
