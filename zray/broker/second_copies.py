"""Which large values get a second copy, so that no death of a node costs more than a bounded time.

Covers the *rebuild cost* of what this node's tasks made on other nodes: how long making a value again would take at least, which values are to be
copied here before it is too long, and which copies must not go although nobody refers to them any more. Does not cover which tasks run again
(`recovery`), where copies are (`locations`), or fetching (`object_sharing`).

Theory. A value is *exposed* when one death may take it: one node that is not this one has it, or none has it any more. This node is no danger to
it, since the programs that wait for it end with this node. Of a task, tasks of recovery's lineage being what counts,

    cost(task) = its run time + max(cost(maker(input)) for its inputs that are exposed to the same death, or are gone)

or less than is true where several tasks would run again one after another for want of room. When it exceeds a bound, what the task made is copied
here; from then on the value costs its descendants nothing. A chain of short tasks is copied once per bound, whatever its length. This is the Edge
algorithm of Tachyon (Li et al., Tachyon: reliable, memory speed storage for cluster computing frameworks, SoCC 2014, section 4.1): checkpoint the edge of
the lineage, so that recovery takes a bounded time; what is copied is chosen by what it would cost to do without, and by whether copying is cheap
beside that.

A chain gives up each value when the next one is there, so a copy that ended with its last reference would protect nothing. A copy is therefore *held*

    held(value)   =  this machine had it copied  and  one of its children is needy
    needy(task)   =  it runs  or  one of its results is exposed and (referenced or an input of a needy task)

which ends when the next copy downstream is there. What was not copied is never held. A copy is no promise: should one go, costs are what they
were without it, and lineage makes again what it always could.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Final, NamedTuple

from zray import ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

CHEAP: Final = 0.1
"""Copying may take this share of the time that it saves."""
UNDER_WAY: Final = 32 << 20
"""No copy is begun while so many bytes are on their way: what somebody waits for comes after them."""


class Copy(NamedTuple):
    """Bring a copy of a value here, unless it is about to go; `SecondCopies.placed` tells how that ends."""

    object: bytes


class Hold(NamedTuple):
    """Keep a reference to an object."""

    object: bytes


class Release(NamedTuple):
    """Keep it no more."""

    object: bytes


Action = Copy | Hold | Release


class _Value:
    """A result that is large, or that a task of the books needs."""

    __slots__ = ("children", "copying", "held", "live", "needy", "ours", "places", "size", "tried")

    def __init__(self) -> None:
        self.places: tuple[bytes, ...] = ()
        """Nodes that have it."""
        self.size = 0
        self.live = True
        """Whether something here refers to it; our own hold may be all."""
        self.children: dict[bytes, None] = {}
        """Tasks that need it."""
        self.needy = 0
        """How many of them are."""
        self.ours = False
        """Whether it was copied, or is being copied, because this machine said so."""
        self.copying = False
        self.held = False
        self.tried = False
        """Whether a copy did not come: this attempt's value is not tried again."""


class _Task:
    """A task that may have to run again."""

    __slots__ = ("cost", "inputs", "needy", "number", "results", "running", "seconds")

    def __init__(self, number: int, inputs: list[bytes]) -> None:
        self.number = number
        """Greater than those of the makers of its inputs."""
        self.inputs = inputs
        """Those whose makers are in the books."""
        self.results: dict[bytes, _Value] = {}
        self.running = False
        self.seconds = 0.0
        self.cost = 0.0
        self.needy = False


class SecondCopies:
    """Rebuild costs of one node's values on other nodes. Every event returns what is to be done."""

    __slots__ = (
        "_bound",
        "_eased",
        "_last",
        "_own",
        "_room",
        "_speed",
        "_tasks",
        "_under_way",
        "_values",
        "_waiting",
        "bytes",
        "copies",
    )

    def __init__(self, own: bytes, bound: float, room: int) -> None:
        """Args:
        own: id of this node.
        bound: seconds that making any value again may take: it is copied when it would take longer. 0: no copies.
        room: bytes that all copies together may have.
        """
        self._own = own
        self._bound = bound
        self._room = room
        self._speed = 0.0
        self._tasks: dict[bytes, _Task] = {}
        self._values: dict[bytes, _Value] = {}
        self._last = 0
        self._waiting: dict[bytes, None] = {}
        """Values that would have been copied, had there been room."""
        self._eased = False
        """Whether there is more room than when the last of them was put there."""
        self._under_way = 0
        """Bytes that are being copied."""
        self.bytes = 0
        """Of all values that are `ours`."""
        self.copies = 0
        """Copies begun so far."""

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, name: bytes) -> bool:
        return name in self._values

    def ours(self, name: bytes) -> bool:
        """Return whether a value was copied, or is being copied, because this machine said so."""
        value = self._values.get(name)
        return value is not None and value.ours

    def cost(self, task: bytes) -> float:
        """Return the seconds that it would take to run a task again; 0 when nothing is known of it."""
        found = self._tasks.get(task)
        return 0.0 if found is None else found.cost

    # -- events --------------------------------------------------------------------------------------------------------

    def sent(
        self,
        task: bytes,
        inputs: Iterable[bytes],
        is_remembered: Callable[[bytes], bool],
        is_here: Callable[[bytes], bool],
    ) -> list[Action]:
        """A task is sent to another node, for the first time or again; perhaps a moment before the ends of those that made its inputs are told. One
        that needs nothing that may have to be made again is in the books only when it has ended, or others need what it makes.

        Args:
            task: its id.
            inputs: objects that it needs.
            is_remembered: tells whether lineage knows a task.
            is_here: tells whether this node has a value.
        """
        found = self._tasks.get(task)
        if found is None:
            if not self._bound:
                return []
            known = [
                name
                for name in dict.fromkeys(inputs)
                if not ids.is_put(name) and is_remembered(ids.task_of(name)) and ids.task_of(name) != task
            ]
            if not known:
                return []
            found = self._enter(task, known)
        found.running = True
        changed = [task]
        for name in found.inputs:
            value = self._values[name]
            value.live = True
            if not value.places and not self._tasks[ids.task_of(name)].running and is_here(name):
                value.places = (self._own,)
                changed.append(ids.task_of(name))
        return self._settle(changed)

    def ended(
        self, task: bytes, seconds: float, kept: Mapping[bytes, tuple[int, tuple[bytes, ...]]], speed: float
    ) -> list[Action]:
        """A task that lineage remembers has ended.

        Args:
            task: its id.
            seconds: for which it ran; 0: not known.
            kept: those of its results that stay on other nodes: bytes, and which nodes.
            speed: bytes a second at which values come here.
        """
        if not self._bound:
            return []
        self._speed = speed
        found = self._tasks.get(task)
        if found is None:
            found = self._enter(task, [])
        found.running = False
        found.seconds = seconds or found.seconds
        for name in kept:
            if name not in found.results:
                self._values[name] = found.results[name] = _Value()
        for name, value in found.results.items():
            self._not_ours(value)
            value.tried = False
            if name in kept:
                value.size, value.places = kept[name]
                value.live = True
            elif value.live:
                value.places = (self._own,)
        return self._settle([task])

    def placed(self, name: bytes, places: tuple[bytes, ...], coming: bool = False) -> list[Action]:
        """These nodes, perhaps this one, have a value now: a copy has come or gone, or did not come. `coming`: one is on its way here."""
        value = self._values.get(name)
        if value is None:
            return []
        value.places = places
        if self._own in places:
            self._landed(value)
        elif value.ours and not coming:
            value.tried = True
            self._not_ours(value)
        return self._settle([ids.task_of(name)])

    def freed(self, name: bytes) -> list[Action]:
        """Nothing here refers to an object any more: its value goes everywhere."""
        value = self._values.get(name)
        if value is None:
            return []
        value.live = False
        value.places = ()
        self._not_ours(value)
        return self._settle([ids.task_of(name)])

    def node_gone(self, node: bytes) -> list[Action]:
        """A node is dead, and all copies there."""
        changed = []
        for name, value in self._values.items():
            if node in value.places:
                value.places = tuple([place for place in value.places if place != node])
                value.tried = False
                if not value.places:
                    self._not_ours(value)
                changed.append(ids.task_of(name))
        return self._settle(changed)

    def forgotten(self, tasks: Iterable[bytes]) -> list[Action]:
        """Lineage remembers these no more: they will not run again."""
        actions: list[Action] = []
        for task in tasks:
            found = self._tasks.pop(task, None)
            if found is None:
                continue
            changed: dict[bytes, None] = {}
            for name in found.inputs:
                value = self._values[name]
                del value.children[task]
                value.needy -= found.needy
                changed[ids.task_of(name)] = None
            for name, value in found.results.items():
                self._not_ours(value)
                if value.held:
                    actions.append(Release(name))
                del self._values[name]
                self._waiting.pop(name, None)
                for child in value.children:
                    self._tasks[child].inputs.remove(name)
                    changed[child] = None
            actions += self._settle(changed)
        return actions

    def crowded(self) -> list[Action]:
        """The store has little room left: what is only held goes."""
        actions: list[Action] = []
        changed: dict[bytes, None] = {}
        for name, value in self._values.items():
            if value.held:
                # What becomes of it is told by `freed`, unless somebody else refers to it: then it is an ordinary value.
                self._not_ours(value)
                value.tried = True
                value.held = False
                actions.append(Release(name))
                changed[ids.task_of(name)] = None
        return [*actions, *self._settle(changed)]

    # -- books ---------------------------------------------------------------------------------------------------------

    def _enter(self, task: bytes, inputs: list[bytes]) -> _Task:
        for name in inputs:
            if ids.task_of(name) not in self._tasks:
                maker = self._enter(ids.task_of(name), [])
                maker.running = maker.needy = True
        self._last += 1
        found = self._tasks[task] = _Task(self._last, inputs)
        for name in inputs:
            value = self._values.get(name)
            if value is None:
                value = self._values[name] = self._tasks[ids.task_of(name)].results[name] = _Value()
            value.children[task] = None
        return found

    def _landed(self, value: _Value) -> None:
        if value.copying:
            value.copying = False
            self._under_way -= value.size
            self._eased = True

    def _not_ours(self, value: _Value) -> None:
        self._landed(value)
        if value.ours:
            value.ours = False
            self.bytes -= value.size
            self._eased = True

    def _is_exposed(self, value: _Value, node: bytes | None) -> bool:
        """Whether the death of `node` (None: of any other node) leaves a value nowhere, or it is nowhere."""
        places = value.places
        if self._own in places or len(places) > 1:
            return False
        return node is None or not places or node in places

    def _is_needy(self, task: _Task) -> bool:
        return task.running or any(
            (value.live or value.needy > 0) and self._is_exposed(value, None) for value in task.results.values()
        )

    def _cost_of(self, task: _Task) -> float:
        node = next((value.places[0] for value in task.results.values() if value.places), None)
        worst = 0.0
        for name in task.inputs:
            maker = self._tasks[ids.task_of(name)]
            value = self._values[name]
            # A copy that is on its way counts, lest all that is made meanwhile be copied, too.
            if maker.cost > worst and not value.copying and self._is_exposed(value, node):
                worst = maker.cost
        return task.seconds + worst

    # -- deciding ------------------------------------------------------------------------------------------------------

    def _settle(self, changed: Iterable[bytes]) -> list[Action]:
        """What is known of results of these tasks has changed: bring costs and needs up to date, and copy what costs too much."""
        actions: list[Action] = []
        left = [task for task in changed if task in self._tasks]
        while left:
            self._renew_needs(left, actions)
            left = self._renew_costs(left, actions)
            while not left and self._eased and self._waiting:
                name = next(iter(self._waiting))
                del self._waiting[name]
                left = self._renew_costs([ids.task_of(name)], actions)
                self._eased = name not in self._waiting
        return actions

    def _renew_needs(self, changed: Iterable[bytes], actions: list[Action]) -> None:
        """From results to inputs: a task's need is that of its inputs' makers."""
        left = list(changed)
        while left:
            task = self._tasks[left.pop()]
            for name, value in task.results.items():
                self._see_to_hold(name, value, actions)
            needy = self._is_needy(task)
            if needy == task.needy:
                continue
            task.needy = needy
            for name in task.inputs:
                self._values[name].needy += 1 if needy else -1
                left.append(ids.task_of(name))

    @staticmethod
    def _see_to_hold(name: bytes, value: _Value, actions: list[Action]) -> None:
        hold = value.ours and value.needy > 0
        if hold != value.held:
            value.held = hold
            actions.append(Hold(name) if hold else Release(name))

    def _renew_costs(self, changed: Iterable[bytes], actions: list[Action]) -> list[bytes]:
        """From inputs to results, makers before users, so that each task is looked at once. Returns the tasks whose results are being copied."""
        due: dict[bytes, None] = {}
        for name in changed:
            due[name] = None
            for value in self._tasks[name].results.values():
                due.update(value.children)
        heap = [(self._tasks[name].number, name) for name in due]
        heapq.heapify(heap)
        copied: list[bytes] = []
        while heap:
            name = heapq.heappop(heap)[1]
            task = self._tasks[name]
            cost = self._cost_of(task)
            more = cost != task.cost
            task.cost = cost
            if cost > self._bound and not task.running and self._copy(task, actions):
                copied.append(name)
                more = True
            if more:
                for value in task.results.values():
                    for child in value.children:
                        if child not in due:
                            due[child] = None
                            heapq.heappush(heap, (self._tasks[child].number, child))
        return copied

    def _copy(self, task: _Task, actions: list[Action]) -> bool:
        """Have results of a task copied that are referenced, in one place and cheap beside what they cost."""
        begun = False
        for name, value in task.results.items():
            able = value.live and bool(value.places) and not (value.ours or value.tried)
            if not able or not self._is_exposed(value, None) or value.size > CHEAP * task.cost * self._speed:
                continue
            if self.bytes + value.size > self._room or self._under_way >= UNDER_WAY:
                self._waiting[name] = None
                continue
            value.ours = value.copying = True
            self._under_way += value.size
            self.bytes += value.size
            self.copies += 1
            actions.append(Copy(name))
            begun = True
        return begun

    # -- checking ------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check the books; AssertionError names what does not hold."""
        for name, task in self._tasks.items():
            for input_ in task.inputs:
                assert name in self._values[input_].children, f"{name.hex()} is no child of what it needs"
                assert self._tasks[ids.task_of(input_)].number < task.number, f"{name.hex()} is older than an input"
            assert task.needy == self._is_needy(task), f"{name.hex()} is needy, or not"
            assert task.cost == self._cost_of(task), f"{name.hex()} costs {self._cost_of(task)}, not {task.cost}"
        for name, value in self._values.items():
            assert self._tasks[ids.task_of(name)].results[name] is value, f"{name.hex()} has no maker"
            assert value.needy == sum(self._tasks[child].needy for child in value.children), f"{name.hex()} is needed"
            assert value.held == (value.ours and value.needy > 0), f"{name.hex()} is held, or not"
            assert value.ours or not value.copying, f"{name.hex()} is copied for nobody"
        assert self.bytes == sum(value.size for value in self._values.values() if value.ours), "bytes are miscounted"
        assert self._under_way == sum(v.size for v in self._values.values() if v.copying), "under way is miscounted"
        assert self._waiting.keys() <= self._values.keys(), "what waits is not in the books"
