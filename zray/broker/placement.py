"""Run here, send there, or wait: the policy of the scheduler as one small replaceable object.

Covers which node runs a demand, how many tasks a worker is handed at once, and whose unclaimed tasks an idle worker is
offered. Does not cover fairness between jobs (`jobs`), which worker of a node (`worker_pool`), the arithmetic of
resources and whether a strategy allows a node (`ledger`), nor the reservation of placement groups
(`placement_groups`). Policies look at views and answer; they keep nothing and change nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from zray import placing
from zray.broker.ledger import CPU, ONE

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from random import Random

    from zray.broker.ledger import Demand, Ledger
    from zray.broker.worker_pool import Worker

WAIT: Final = -1
"""Answer of `Policy.place`: some node could run it, none can now."""
NEVER: Final = -2
"""Answer of `Policy.place`: no node in view is large enough."""
BANDWIDTH: Final = 200e6
"""Bytes a second between nodes, as long as nothing better is known."""
SMALL_BYTES: Final = 256 << 10
"""Inputs that are smaller than this together do not matter: they travel in one message."""
_MANY: Final = 64
"""With more nodes than this only some are looked at."""
_LOOKS: Final = 16
"""So many, while it fits on one of them."""
_AWAY_S: Final = 0.0005
"""What it costs to send a task to another node, in seconds."""


class Locations(Protocol):
    """What is known of where values are: told by whoever keeps the books of objects (at least of those that other nodes
    have; what only this node has need not be known)."""

    def size(self, object_id: bytes) -> int:
        """Return the bytes of a value; 0 when nothing is known of it."""
        ...

    def holders(self, object_id: bytes) -> Collection[bytes]:
        """Return the ids of nodes that have a copy, this one among them."""
        ...

    def elsewhere(self, object_id: bytes) -> bool:
        """Return whether other nodes have a copy and this one has none."""
        ...

    def lost(self, object_id: bytes) -> bool:
        """Return whether a value existed and has to be made again."""
        ...

    def __bool__(self) -> bool:
        """Return whether anything is known of any object."""
        ...


class NothingKnown:
    """Locations where nothing is known of any object."""

    __slots__ = ()

    def size(self, object_id: bytes) -> int:
        """Not known."""
        return 0

    def holders(self, object_id: bytes) -> Collection[bytes]:
        """Not known."""
        return ()

    def elsewhere(self, object_id: bytes) -> bool:
        """Not known."""
        return False

    def lost(self, object_id: bytes) -> bool:
        """Not known."""
        return False

    def __bool__(self) -> bool:
        """Nothing is known."""
        return False


class Inputs(NamedTuple):
    """Of a task whose inputs are large, for each node in view."""

    fetch: tuple[float, ...]
    """Seconds that it takes to move there what is missing there."""
    wait: tuple[float, ...]
    """Seconds until something may be started there, if nothing more fits now."""


def inputs_of(
    deps: Sequence[bytes], nodes: Sequence[Ledger], locations: Locations, speed: float, now: float
) -> Inputs | None:
    """Return what the policy should know of a task's inputs; None when they are small, or nothing is known of them.

    Args:
        deps: its inputs.
        nodes: those in view.
        locations: where values are.
        speed: bytes a second at which values move between nodes, on average.
        now: monotonic seconds.
    """
    known = [(size, locations.holders(dep)) for dep in deps if (size := locations.size(dep))]
    total = sum(size for size, _ in known)
    if total < SMALL_BYTES:
        return None
    fetch = tuple((total - sum(size for size, at in known if node.id in at)) / speed for node in nodes)
    return Inputs(fetch, tuple(expected_wait(node, now) for node in nodes))


def expected_wait(node: Ledger, now: float) -> float:
    """Return the seconds after which a node on which nothing fits is likely to have room: what waits there times the
    average run time, over its CPUs; at least as long as it has been full without any end, so that who waits for a node
    whose tasks do not end goes elsewhere in time."""
    cpus = max(1, node.total.get(CPU, 0) // ONE)
    stalled = now - node.full_since if node.full_since >= 0 else 0.0
    return max(node.task_seconds * (node.queued + 1) / cpus, stalled)


class Policy(Protocol):
    """What may be replaced: the choices that trade one good thing for another."""

    def place(self, demand: Demand, nodes: Sequence[Ledger], rng: Random, inputs: Inputs | None = None) -> int:
        """Return the index of the node that should run the demand now (0 is this node), WAIT or NEVER.

        Args:
            demand: resources and strategy, which must be kept to.
            nodes: those in view, this one first.
            rng: whatever is drawn is drawn from it.
            inputs: of a task whose inputs are large.
        """
        ...

    def batch(self, queued: int, depth: int, takers: int) -> int:
        """Return how many of `queued` tasks one of `takers` equal workers is handed, at most `depth`; at least 1."""
        ...

    def victim(self, busy: Sequence[Worker]) -> Worker | None:
        """Return the worker whose unclaimed tasks an idle one should be offered, or None."""
        ...


class LocalPolicy:
    """Bottom-up: a task stays where it was born when it fits there and its inputs are there, else it goes where it is
    likely to run soonest.

    Of the other nodes on which it fits two are drawn and the one with the least estimated wait is taken, of equals the
    one with more CPUs free: many nodes that choose at the same time from the same reports then do not all choose the
    same one (Mitzenmacher, The power of two choices in randomized load balancing, 2001). What was sent and not yet
    reported counts as held there.

    The estimate is what waits there times the average run time there plus the time that missing inputs travel (Moritz
    et al., Ray: a distributed framework for emerging AI applications, 2018, section 4.2.2). A task with large inputs
    even waits for the node that has them, for as long as it is likely to have room sooner than the inputs could be
    elsewhere.
    """

    __slots__ = ()

    def place(self, demand: Demand, nodes: Sequence[Ledger], rng: Random, inputs: Inputs | None = None) -> int:
        """As `Policy.place`."""
        if demand.plain:
            if inputs is None and nodes[0].fits(demand):
                return 0
            fitting = [] if inputs is not None or len(nodes) <= _MANY else _drawn(demand, nodes, rng)
            if not fitting:
                fitting = [index for index in range(len(nodes)) if nodes[index].fits(demand)]
        else:
            if demand.refusal is not None:
                return NEVER
            fitting = self._allowed(demand, nodes)
        if inputs is not None:
            return self._nearest(demand, nodes, fitting, rng, inputs)
        if not fitting:
            return WAIT if demand.feasible else NEVER
        if demand.strategy.kind == placing.SPREAD:
            return _next_after(demand.last, nodes, fitting)
        return fitting[0] if fitting[0] == 0 or len(fitting) == 1 else _better_of_two(nodes, fitting, rng)

    def _allowed(self, demand: Demand, nodes: Sequence[Ledger]) -> list[int]:
        """The nodes on which it fits now and that its strategy allows or, among them, prefers."""
        strategy = demand.strategy
        allowed: Sequence[int] = range(len(nodes))
        if strategy.kind == placing.NODE:
            # The node that is wanted is waited for as long as it could run it.
            wanted = [i for i in allowed if nodes[i].id == strategy.node and nodes[i].could_run(demand)]
            allowed = wanted or (allowed if strategy.or_elsewhere else [])
        fitting = [index for index in allowed if nodes[index].fits(demand) and nodes[index].admits(demand)]
        if strategy.soft:
            return [i for i in fitting if placing.meets(nodes[i].labels, strategy.soft)] or fitting
        return fitting

    def _nearest(self, demand: Demand, nodes: Sequence[Ledger], fitting: list[int], rng: Random, inputs: Inputs) -> int:
        """Where inputs and task come together soonest."""
        others = [index for index in fitting if index]
        drawn = others if len(others) < 3 else rng.sample(others, 2)
        near = min(inputs.fetch)
        best, least = WAIT, float("inf")
        for index in fitting:
            if index == 0 or index in drawn or inputs.fetch[index] == near:
                cost = inputs.fetch[index] + (_AWAY_S + nodes[index].queued * nodes[index].task_seconds if index else 0)
                if cost < least:
                    best, least = index, cost
        for index, node in enumerate(nodes):
            if index not in fitting and inputs.fetch[index] + inputs.wait[index] < least and node.could_run(demand):
                return WAIT
        return best if best >= 0 or demand.feasible else NEVER

    def batch(self, queued: int, depth: int, takers: int) -> int:
        """An equal share of what is queued, so that the end of a queue is spread over all workers."""
        share = (queued + takers - 1) // takers if takers > 1 else queued
        if share > depth:
            share = depth
        return share if share > 1 else 1

    def victim(self, busy: Sequence[Worker]) -> Worker | None:
        """The one with the most tasks; the first of equals."""
        best: Worker | None = None
        for worker in busy:
            if best is None or len(worker.handed) > len(best.handed):
                best = worker
        return best


def _drawn(demand: Demand, nodes: Sequence[Ledger], rng: Random) -> list[int]:
    """Those of a few nodes drawn at random on which it fits: two that are good enough need not be looked for among thousands."""
    return [index for index in rng.sample(range(1, len(nodes)), _LOOKS) if nodes[index].fits(demand)]


def _better_of_two(nodes: Sequence[Ledger], fitting: list[int], rng: Random) -> int:
    """Draw two nodes and return the one where a task is likely to wait less."""
    first, second = rng.sample(fitting, 2)
    one, other = nodes[first], nodes[second]
    waits, others = one.queued * one.task_seconds, other.queued * other.task_seconds
    if waits != others:
        return first if waits < others else second
    return first if one.available.get(CPU, 0) >= other.available.get(CPU, 0) else second


def _next_after(last: bytes, nodes: Sequence[Ledger], fitting: list[int]) -> int:
    """The next in turn after the node that had the last one."""
    for index in range(len(nodes)):
        if nodes[index].id == last:
            return next((found for found in fitting if found > index), fitting[0])
    return fitting[0]
