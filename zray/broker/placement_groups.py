"""Placement groups, as the head decides about them: which are wanted, where their bundles are, what happens when nodes die.

Covers the life of every group of the cluster. Does not cover which nodes suit (`packing`), the books of the nodes that hold
bundles (`bundles`, `group_events`), or how anything is said (`groups`).

    PENDING --a place for all--> PREPARING --all nodes hold theirs--> CREATED --a node died--> RESCHEDULING
       ^                             |  one refused, or died             ^                          |
       |-----------------------------|                                   |------- as PENDING -------|
    any --removed, or its job is over--> REMOVED, for ever

Two phases: every node is asked to hold its bundles, and only when all do is the group announced, which opens them. An
attempt that fails is given back everywhere, also where no answer has come yet: messages to a node arrive in order, so a
bundle that it takes after all is given back right after. Attempts are numbered; answers to earlier ones change nothing.

The machine trusts what nodes say is free only for choosing: a node that has less refuses, and the group waits.

A head may follow another one. It begins with the groups as their rows have them (`take_over`), and every node tells it what it holds
(`reported`). A row says that a bundle is somewhere only when a node holds it, and it is stored before anybody hears of it, so

    open on a node  =>  the row of the group has the node for that bundle, or says that the group is gone
    held on a node for an attempt of an earlier head, and not that node's by the row  =>  the attempt died with that head: it is given back

Attempts of later heads have higher numbers than those of earlier ones. Nothing is placed on a node before it has reported.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from zray.broker.packing import Room, Wanted, pack
from zray.placing import GROUP_STRATEGIES, GroupSpec
from zray.resources import shown

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

_REFUSED_S: Final = 0.01
"""A node refused (what it has said was out of date): the group is tried again after this time, ..."""
_REFUSED_MAX_S: Final = 1.0
"""... which doubles up to this."""
_TOMBSTONES: Final = 10_000
_GATHER_S: Final = 2.0
"""A new head places nothing for so long, unless all nodes have reported before: the first to report would get everything."""
ATTEMPTS_A_LIFE: Final = 1 << 32
"""Attempts that one head makes at most; those of the next one have higher numbers."""
NEVER: Final = float("inf")


class Phase(enum.IntEnum):
    """Of a group."""

    PENDING = 0
    PREPARING = 1
    CREATED = 2
    RESCHEDULING = 3
    """Some bundles were lost with their nodes and have no others yet."""


class Kept(NamedTuple):
    """A group, as its row has it."""

    spec: GroupSpec
    home: bytes
    nodes: tuple[bytes, ...]
    """As in `PlacementGroupRow`."""
    gone: str = ""
    """Why it is gone; empty: it is not."""


class Held(msgspec.Struct, frozen=True, array_like=True):
    """A bundle that a node holds."""

    group: bytes
    index: int
    attempt: int
    is_open: bool


class Action(msgspec.Struct, frozen=True):
    """Base of what the machine asks for."""


class Reserve(Action, frozen=True):
    """Have a node hold bundles. Answer: `answered`."""

    node: bytes
    group: bytes
    attempt: int
    bundles: dict[int, dict[str, int]]


class GiveBack(Action, frozen=True):
    """Have a node give back what it holds for an attempt."""

    node: bytes
    group: bytes
    attempt: int


class Announce(Action, frozen=True):
    """Tell all nodes where the bundles are; `complete` when none is missing."""

    spec: GroupSpec
    nodes: tuple[bytes, ...]
    complete: bool


class Withdraw(Action, frozen=True):
    """Tell all nodes that a group is gone."""

    spec: GroupSpec
    reason: str


class Infeasible(Action, frozen=True):
    """Tell the group's job that no nodes that are here could ever hold it; it waits for others."""

    spec: GroupSpec
    text: str


class _Group:
    __slots__ = ("attempt", "home", "nodes", "phase", "plan", "refused", "retry_at", "spec", "unanswered", "warned")

    def __init__(self, spec: GroupSpec, home: bytes) -> None:
        self.spec = spec
        self.home = home
        """Node of its job's driver."""
        self.phase = Phase.PENDING
        self.nodes: list[bytes] = [b""] * len(spec.bundles)
        """Of the bundles that are open; b"" for the others."""
        self.attempt = 0
        self.plan: dict[int, bytes] = {}
        """PREPARING: where the missing ones shall go."""
        self.unanswered: set[bytes] = set()
        """PREPARING: nodes whose answer has not come."""
        self.refused = 0
        self.retry_at = 0.0
        self.warned = False

    def __repr__(self) -> str:
        return f"<group {self.spec.id.hex()[:8]} {self.phase.name}>"

    def missing(self) -> list[int]:
        return [index for index, node in enumerate(self.nodes) if not node]


class _Member:
    __slots__ = ("free", "labels", "reported", "total")

    def __init__(self, total: Mapping[str, int], labels: Mapping[str, str]) -> None:
        self.total = dict(total)
        self.free = dict(total)
        self.labels = dict(labels)
        self.reported = True
        """False: what it holds was asked for by an earlier head, and it has not told this one yet."""


class PlacementGroups:
    """The machine. Methods return actions, to be carried out in order."""

    def __init__(self, life: int = 0) -> None:
        """life: of the head; each has a higher number than those before."""
        self._members: dict[bytes, _Member] = {}
        self._groups: dict[bytes, _Group] = {}
        self._names: dict[tuple[str, str], bytes] = {}
        self._gone: dict[bytes, str] = {}
        self._first = self._attempts = life * ATTEMPTS_A_LIFE
        self._changed = False
        """Something may fit now that did not."""
        self._gather_until = 0.0
        """Until when nothing is placed unless all nodes have reported; 0: that is over."""

    # -- heads that follow others --------------------------------------------------------------------------------------------

    def take_over(self, kept: Sequence[Kept], there: Collection[bytes], now: float) -> list[Action]:
        """Go on with the groups of an earlier head. All nodes that were seen (and no others) may hold bundles, and have to report.

        Args:
            kept: all groups of which there is a row, oldest first.
            there: all nodes that are not dead, also those that only connect drivers.
            now: seconds.
        """
        for member in self._members.values():
            member.reported = False
        self._gather_until = now + _GATHER_S
        self._changed = True
        out: list[Action] = []
        for spec, home, nodes, gone in kept:
            if gone:
                self._bury(spec.id, gone)
                continue
            group = self._groups[spec.id] = _Group(spec, home)
            if spec.name:
                self._names[spec.namespace, spec.name] = spec.id
            if home not in there and not spec.detached:
                out += self.remove(spec.id, "the node of its job's driver is dead")
                continue
            if nodes:
                group.nodes = [node if node in self._members else b"" for node in nodes]
                group.phase = Phase.CREATED if all(group.nodes) else Phase.RESCHEDULING
                if tuple(group.nodes) != nodes:
                    out.append(Announce(spec, tuple(group.nodes), False))
        return out

    def reported(self, node: bytes, held: Sequence[Held], over: Sequence[int], now: float) -> list[Action]:
        """A node says what it holds for an earlier head, and which of its drivers' jobs have ended without that head knowing, perhaps.

        Groups that are gone are not given back here: whoever names one is told that it is gone.
        """
        member = self._members.get(node)
        out = [action for job in over for action in self.job_ended(job)]
        if member is None:
            return out
        member.reported = True
        self._changed = True
        there = {(bundle.group, bundle.index) for bundle in held}
        for group in self._groups.values():
            mine = [index for index, at in enumerate(group.nodes) if at == node]
            out += self._lose(group, [index for index in mine if (group.spec.id, index) not in there])
        for bundle in held:
            out += self._settle(node, member, bundle)
        return out + self._try_all(now)

    def _lose(self, group: _Group, indices: Sequence[int]) -> list[Action]:
        """Bundles are not where they were."""
        if not indices:
            return []
        out = self._give_up(group) if group.phase == Phase.PREPARING else []
        for index in indices:
            group.nodes[index] = b""
        group.phase = Phase.RESCHEDULING
        self._changed = True
        return [*out, Announce(group.spec, tuple(group.nodes), False)]

    def _settle(self, node: bytes, member: _Member, bundle: Held) -> list[Action]:
        """See whether a bundle that a node holds is one that it should hold."""
        group = self._groups.get(bundle.group)
        if group is None or bundle.attempt > self._first or group.nodes[bundle.index] == node:
            return []  # gone, or asked for by this head, or as it should be
        if not bundle.is_open:
            for name, units in group.spec.bundles[bundle.index].items():
                member.free[name] = member.free.get(name, 0) + units
            return [GiveBack(node, bundle.group, bundle.attempt)]
        if group.phase == Phase.PREPARING or group.nodes[bundle.index]:
            return []
        # The storage has lost its newest rows (its machine has lost power), and with them what everybody was told.
        group.nodes[bundle.index] = node
        complete = all(group.nodes)
        group.phase = Phase.CREATED if complete else Phase.RESCHEDULING
        return [Announce(group.spec, tuple(group.nodes), complete)]

    @property
    def _is_gathering(self) -> bool:
        return self._gather_until > 0 and not all(member.reported for member in self._members.values())

    # -- what is there ----------------------------------------------------------------------------------------------------

    def phase(self, group: bytes) -> Phase | None:
        """Return where a group is in its life; None when it is gone or never was."""
        found = self._groups.get(group)
        return None if found is None else found.phase

    def where(self, group: bytes, or_nowhere: bool = False) -> tuple[GroupSpec, tuple[bytes, ...]] | None:
        """Return a group and the nodes of its bundles, if it is not gone and has some, or (or_nowhere) even if it has none."""
        found = self._groups.get(group)
        if found is None or not (any(found.nodes) or or_nowhere):
            return None
        return found.spec, tuple(found.nodes)

    def why_gone(self, group: bytes) -> str | None:
        """Return why a group is no more, or never was; None when it is."""
        if group in self._groups:
            return None
        return self._gone.get(group, "there is no placement group with this id")

    @property
    def wake_at(self) -> float:
        """When `tick` is wanted at the latest (seconds)."""
        if self._is_gathering:
            return self._gather_until
        if self._changed and any(group.phase != Phase.CREATED for group in self._groups.values()):
            return 0.0
        return min((group.retry_at for group in self._groups.values() if group.retry_at), default=NEVER)

    @property
    def waiting(self) -> bool:
        """Whether some group lacks bundles."""
        return any(group.phase != Phase.CREATED for group in self._groups.values())

    # -- nodes --------------------------------------------------------------------------------------------------------------

    def node_seen(self, node: bytes, total: Mapping[str, int], labels: Mapping[str, str]) -> None:
        """A node lives. What it has never changes."""
        if node not in self._members:
            self._members[node] = _Member(total, labels)
            self._changed = True

    def capacity(self, node: bytes, free: Mapping[str, int]) -> None:
        """A node says what is free on it."""
        member = self._members.get(node)
        if member is not None and member.free != free:
            if any(units > member.free.get(name, 0) for name, units in free.items()):
                self._changed = True
            member.free = dict(free)

    def node_gone(self, node: bytes, reason: str, now: float) -> list[Action]:
        """A node is dead, and with it the bundles that it held and the groups of drivers on it."""
        self._members.pop(node, None)
        out: list[Action] = []
        for group in list(self._groups.values()):
            if group.home == node and not group.spec.detached:
                out += self.remove(group.spec.id, f"the node of its job's driver is dead: {reason}")
                continue
            if group.phase == Phase.PREPARING and node in group.plan.values():
                out += self._give_up(group)
            out += self._lose(group, [index for index, at in enumerate(group.nodes) if at == node])
        return out + self._try_all(now)

    # -- groups --------------------------------------------------------------------------------------------------------------

    def create(self, spec: GroupSpec, home: bytes, now: float) -> tuple[str, list[Action]]:
        """A group is wanted; return (what is wrong with the wish, or "", actions)."""
        problem = self._problem(spec)
        if problem:
            return problem, []
        if spec.id in self._groups:
            return "", []
        self._groups[spec.id] = _Group(spec, home)
        if spec.name:
            self._names[spec.namespace, spec.name] = spec.id
        return "", self._try_all(now, self._groups[spec.id])

    def _problem(self, spec: GroupSpec) -> str:
        if spec.id in self._gone:
            return f"this placement group is gone: {self._gone[spec.id]}"
        if spec.strategy not in GROUP_STRATEGIES:
            return f"a placement group's strategy is one of {', '.join(GROUP_STRATEGIES)}, not {spec.strategy!r}"
        if not spec.bundles or not all(spec.bundles):
            return "a placement group needs bundles, each of which asks for something"
        if spec.labels and len(spec.labels) != len(spec.bundles):
            return "a placement group needs as many label selectors as bundles"
        other = self._names.get((spec.namespace, spec.name)) if spec.name else None
        if other is not None and other != spec.id:
            return f"the name {spec.name!r} (namespace {spec.namespace!r}) is taken by another placement group"
        return ""

    def remove(self, group_id: bytes, reason: str) -> list[Action]:
        """Nobody wants a group any more."""
        group = self._groups.pop(group_id, None)
        if group is None:
            return []
        out = self._give_up(group) if group.phase == Phase.PREPARING else []
        self._names.pop((group.spec.namespace, group.spec.name), None)
        self._bury(group_id, reason)
        out.append(Withdraw(group.spec, reason))
        return out

    def _bury(self, group: bytes, reason: str) -> None:
        self._gone[group] = reason
        if len(self._gone) > _TOMBSTONES:
            del self._gone[next(iter(self._gone))]

    def job_ended(self, job: int) -> list[Action]:
        """A job is over, and with it its groups, unless they are detached."""
        out: list[Action] = []
        for group in list(self._groups.values()):
            if group.spec.job == job and not group.spec.detached:
                out += self.remove(group.spec.id, "its job is over")
        return out

    # -- placing -------------------------------------------------------------------------------------------------------------

    def answered(self, node: bytes, group_id: bytes, attempt: int, accepted: bool, now: float) -> list[Action]:
        """A node holds what it was asked for, or refuses."""
        group = self._groups.get(group_id)
        if group is None or group.phase != Phase.PREPARING or group.attempt != attempt or node not in group.unanswered:
            return []
        group.unanswered.discard(node)
        if not accepted:
            out = self._give_up(group, node)
            group.refused += 1
            group.retry_at = now + min(_REFUSED_S * 2**group.refused, _REFUSED_MAX_S)
            return out
        if group.unanswered:
            return []
        for index, at in group.plan.items():
            group.nodes[index] = at
        group.phase = Phase.CREATED
        group.plan = {}
        group.refused = 0
        return [Announce(group.spec, tuple(group.nodes), True)]

    def _give_up(self, group: _Group, refuser: bytes = b"") -> list[Action]:
        """An attempt failed: whoever was asked gives back. What the refuser has it has just said."""
        out: list[Action] = []
        for index, node in group.plan.items():
            member = self._members.get(node)
            if member is not None and node != refuser:
                for name, units in group.spec.bundles[index].items():
                    member.free[name] = member.free.get(name, 0) + units
                self._changed = True
        for node in sorted(set(group.plan.values())):
            if node in self._members:
                out.append(GiveBack(node, group.spec.id, group.attempt))
        group.plan = {}
        group.unanswered = set()
        group.phase = Phase.RESCHEDULING if any(group.nodes) else Phase.PENDING
        return out

    def tick(self, now: float) -> list[Action]:
        """Try again what may fit now."""
        if now >= self._gather_until:
            self._gather_until = 0.0
        return self._try_all(now) if self.wake_at <= now else []

    def _try_all(self, now: float, only: _Group | None = None) -> list[Action]:
        if self._is_gathering:
            return []
        out: list[Action] = []
        changed = self._changed
        for group in [only] if only is not None else list(self._groups.values()):
            due = group.retry_at and now >= group.retry_at
            if group.phase in (Phase.PENDING, Phase.RESCHEDULING) and (due or only or (changed and not group.retry_at)):
                group.retry_at = 0.0
                out += self._try(group)
        if only is None:
            self._changed = False
        return out

    def _try(self, group: _Group) -> list[Action]:
        spec = group.spec
        missing = group.missing()
        wanted = [Wanted(index, spec.bundles[index], spec.requirements(index)) for index in missing]
        present = [node for node in group.nodes if node]
        rooms = [Room(node, member.free, member.labels) for node, member in self._members.items() if member.reported]
        plan = pack(spec.strategy, wanted, rooms, present)
        if plan is None:
            return self._doubt(group, wanted, present)
        self._attempts += 1
        group.attempt = self._attempts
        group.plan = plan
        group.phase = Phase.PREPARING
        by_node: dict[bytes, dict[int, dict[str, int]]] = {}
        for index, node in sorted(plan.items()):
            by_node.setdefault(node, {})[index] = spec.bundles[index]
            free = self._members[node].free
            for name, units in spec.bundles[index].items():
                free[name] = free.get(name, 0) - units
        group.unanswered = set(by_node)
        return [Reserve(node, spec.id, group.attempt, bundles) for node, bundles in by_node.items()]

    def _doubt(self, group: _Group, wanted: list[Wanted], present: list[bytes]) -> list[Action]:
        """There is no place now. Would there be one if nothing else ran?"""
        if group.warned:
            return []
        rooms = [Room(node, member.total, member.labels) for node, member in self._members.items()]
        if pack(group.spec.strategy, wanted, rooms, present) is not None:
            return []
        group.warned = True
        bundles = ", ".join(shown(bundle.amounts) for bundle in wanted[:8]) + (" ..." if len(wanted) > 8 else "")
        text = (
            f"Placement group {group.spec.name or group.spec.id.hex()} ({group.spec.strategy}: {bundles}) fits on no "
            f"nodes that are here ({len(self._members)}), whatever else ends. It waits for nodes that can hold it."
        )
        return [Infeasible(group.spec, text)]

    # -- checking ------------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check the books; AssertionError names what does not hold."""
        for group in self._groups.values():
            complete = all(group.nodes)
            assert complete == (group.phase == Phase.CREATED), f"{group} has bundles at {group.nodes}"
            assert (group.phase == Phase.PREPARING) == bool(group.plan), f"{group} has the plan {group.plan}"
            assert group.unanswered <= set(group.plan.values()), f"{group} waits for strangers"
            for node in (*group.nodes, *group.plan.values()):
                assert not node or node in self._members, f"{group} has a bundle on a node that is dead"
            assert group.spec.id not in self._gone, f"{group} is gone and is not"
            if group.spec.name:
                assert self._names.get((group.spec.namespace, group.spec.name)) == group.spec.id
