"""Run here, send there, or wait: the policy of the scheduler as one small replaceable object.

Covers which node runs a demand, how many tasks a worker is handed at once, and whose unclaimed tasks an idle worker is
offered. Does not cover fairness between jobs (`jobs`), which worker of a node (`worker_pool`) nor the arithmetic of
resources (`ledger`). Policies look at views and answer; they keep nothing and change nothing.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final, Protocol

from zray.broker.ledger import CPU

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zray.broker.ledger import Demand, Ledger
    from zray.broker.worker_pool import Worker

WAIT: Final = -1
"""Answer of `Policy.place`: some node could run it, none can now."""
NEVER: Final = -2
"""Answer of `Policy.place`: no node in view is large enough."""


class Policy(Protocol):
    """What may be replaced: the choices that trade one good thing for another."""

    def place(self, demand: Demand, nodes: Sequence[Ledger], rng: Random) -> int:
        """Return the index of the node that should run the demand now (0 is this node), WAIT or NEVER."""
        ...

    def batch(self, queued: int, depth: int, takers: int) -> int:
        """Return how many of `queued` tasks one of `takers` equal workers is handed, at most `depth`; at least 1."""
        ...

    def victim(self, busy: Sequence[Worker]) -> Worker | None:
        """Return the worker whose unclaimed tasks an idle one should be offered, or None."""
        ...


class LocalPolicy:
    """Bottom-up: a task stays where it was born when it fits there, else it goes where it fits.

    Of the other nodes on which it fits two are drawn and the one with more CPUs free is taken: many nodes that choose at the
    same time from the same reports then do not all choose the same one (Mitzenmacher, The power of two choices in
    randomized load balancing, 2001).
    """

    __slots__ = ()

    def place(self, demand: Demand, nodes: Sequence[Ledger], rng: Random) -> int:
        """This node if it fits here now, else the better of two others on which it fits."""
        own = nodes[0]
        if own.fits(demand):
            return 0
        if len(nodes) == 1:
            return WAIT if own.feasible(demand) else NEVER
        fitting = [index for index in range(1, len(nodes)) if nodes[index].fits(demand)]
        if not fitting:
            return WAIT if demand.feasible else NEVER
        if len(fitting) == 1:
            return fitting[0]
        first, second = rng.sample(fitting, 2)
        return first if nodes[first].available.get(CPU, 0) >= nodes[second].available.get(CPU, 0) else second

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
