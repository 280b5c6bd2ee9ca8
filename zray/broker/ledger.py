"""What a node has and who holds it: totals, what is available, and the GPUs one by one.

Covers demands (a packed vector and a strategy, unpacked once and interned) and their taking, giving back and lending,
and what is added while bundles of placement groups are reserved. Does not cover who holds what: each worker names the
demand it holds (`worker_pool`), as each bundle does (`bundles`), and

    available + sum(held by workers and bundles) - sum(CPUs lent by blocked workers) == total      (per resource; checked
    by Scheduler.validate)

Amounts are whole numbers of 1/10000 (`zray.resources`). `available` may fall below zero: a blocked worker that goes on
takes its CPU back by force.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from zray import placing, resources

if TYPE_CHECKING:
    from collections.abc import Mapping

CPU: Final = "CPU"
GPU: Final = "GPU"
ONE: Final = resources.UNIT


class Demand:
    """What one execution occupies, and where it may be. Interned by `Ledger.demand`: equal ones are one object."""

    __slots__ = (
        "cpu",
        "feasible",
        "gpu",
        "gpu_names",
        "items",
        "key",
        "last",
        "lendable",
        "local",
        "patient",
        "plain",
        "refusal",
        "strategy",
        "threads",
    )

    def __init__(self, key: bytes, amounts: dict[str, int], strategy: placing.Strategy) -> None:
        self.key = key
        self.strategy = strategy
        self.plain = strategy.kind == placing.DEFAULT and not strategy.hard and not strategy.soft
        """It may be anywhere."""
        self.patient = (
            strategy.kind != placing.DEFAULT and strategy.kind != placing.SPREAD and not strategy.or_elsewhere
        )
        """What it waits for may come although no node in view can run it: a group that is not placed yet, a node that is
        joining. When it never will the demand is refused."""
        self.items: tuple[tuple[str, int], ...] = tuple(sorted(placing.needs(strategy, amounts).items()))
        self.cpu: int = amounts.get(CPU, 0)
        self.gpu: int = amounts.get(GPU, 0)
        self.threads: int = max(1, self.cpu // ONE)
        """Threads that numeric libraries should use in a process that runs this."""
        self.lendable: tuple[tuple[str, int], ...] = tuple(placing.needs(strategy, {CPU: self.cpu}).items())
        """What a process that waits lends: its CPU, or its share of the CPUs of a bundle."""
        if self.cpu:
            self.lendable = tuple((name, units) for name, units in self.lendable if name.startswith(CPU))
        else:
            self.lendable = ()
        self.gpu_names: tuple[str, ...] = ()
        """Under which names its GPUs are booked."""
        if self.gpu:
            self.gpu_names = tuple(name for name in placing.needs(strategy, {GPU: self.gpu}) if name.startswith(GPU))
        self.local = False
        """This node could run it if nothing else ran here."""
        self.feasible = False
        """Some node in view could."""
        self.last = b""
        """The node that was last given one of these."""
        self.refusal: tuple[str, str] | None = None
        """(what is gone, why for people) when none of these can ever run again: see `node.Refusal`."""

    def __repr__(self) -> str:
        where = str(self.strategy)
        shown = resources.shown({name: units for name, units in self.items if not placing.is_of_group(name)})
        return f"{shown} on {where}" if where else shown

    def gpu_share(self) -> int:
        """How much of each of its GPUs it takes: a fraction of one, or whole ones."""
        return self.gpu if self.gpu < ONE else ONE

    def gpu_count(self) -> int:
        """How many GPUs its process sees."""
        return (self.gpu + ONE - 1) // ONE


class Ledger:
    """Resources of one node."""

    __slots__ = (
        "available",
        "demands",
        "full_since",
        "gpu_free",
        "gpu_pools",
        "id",
        "labels",
        "queued",
        "task_seconds",
        "total",
    )

    def __init__(self, total: dict[str, float], node: bytes = b"", labels: Mapping[str, str] | None = None) -> None:
        self.id = node
        self.labels: dict[str, str] = {**(labels or {}), **dict.fromkeys(placing.NODE_ID_LABELS, node.hex())}
        self.total: dict[str, int] = resources.parse(total)
        """While bundles are reserved here: with what they have, too."""
        self.available: dict[str, int] = dict(self.total)
        self.gpu_free: list[int] = [ONE] * (self.total.get(GPU, 0) // ONE)
        self.gpu_pools: dict[str, list[int]] = {GPU: self.gpu_free}
        """What is free of each GPU, by the name under which it is booked."""
        self.demands: dict[bytes, Demand] = {}
        self.queued: int = 0
        """Tasks that wait for a worker here."""
        self.task_seconds: float = 0.0
        """Moving average of the run times of tasks here."""
        self.full_since: float = -1.0
        """Since when (monotonic seconds) nothing more fits here and nothing has ended; negative: it is not so."""

    def available_floats(self) -> dict[str, float]:
        """What is free, for people: never below zero."""
        return {name: max(0, amount) / ONE for name, amount in self.available.items() if name in self.total}

    def copy(self) -> Ledger:
        """Return a ledger of the same contents to try things out on; demands are shared."""
        other = type(self)({})
        other.id = self.id
        other.labels = self.labels
        other.total = self.total
        other.available = dict(self.available)
        other.gpu_pools = {name: list(free) for name, free in self.gpu_pools.items()}
        other.gpu_free = other.gpu_pools[GPU]
        other.demands = self.demands
        return other

    def demand(self, packed: bytes, strategy: bytes = b"") -> Demand:
        """Return the demand of a packed vector and a packed strategy (`zray.placing`); ValueError when they are none."""
        # No vector begins with 255.
        key = b"\xff" + len(strategy).to_bytes(4, "big") + strategy + packed if strategy else packed
        found = self.demands.get(key)
        if found is None:
            amounts = {name: amount for name, amount in resources.unpack(packed).items() if amount}
            found = Demand(key, amounts, placing.unpack(strategy))
            found.local = found.feasible = self.could_run(found)
            self.demands[key] = found
        return found

    def admits(self, demand: Demand) -> bool:
        """Does its strategy allow this node? (A node that is only preferred excludes no other.)"""
        strategy = demand.strategy
        if strategy.kind == placing.NODE and strategy.node != self.id and not strategy.or_elsewhere:
            return False
        return not strategy.hard or placing.meets(self.labels, strategy.hard)

    def could_run(self, demand: Demand) -> bool:
        """Could it run here if nothing else did?"""
        return (demand.plain or self.admits(demand)) and not self.lacking(demand)

    def lacking(self, demand: Demand) -> list[str]:
        """Return the names of which this node has too little even when nothing runs."""
        short = []
        for name, amount in demand.items:
            have = self.total.get(name, 0)
            if amount > have or (name == GPU and amount > ONE and (amount % ONE or amount // ONE > len(self.gpu_free))):
                short.append(name)
        return short

    def why_never(self, demand: Demand) -> str:
        """Say for people what is missing, as the end of a sentence about who asks."""
        parts = []
        for name in self.lacking(demand):
            have = self.total.get(name, 0)
            need = dict(demand.items)[name]
            if need <= have:
                parts.append(f"{name}: {need / ONE:g} asked for, only fractions of one GPU or whole GPUs can be had")
            else:
                parts.append(f"{name}: {need / ONE:g} asked for, {have / ONE:g} here")
        if not self.admits(demand):
            parts.append(f"this is node {self.id.hex()}" + "".join(f", {k}={v}" for k, v in self._own_labels()))
        return f"asks for {demand!r}, which no node here can ever give ({'; '.join(parts)})."

    def _own_labels(self) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.labels.items() if key not in placing.NODE_ID_LABELS]

    def feasible(self, demand: Demand) -> bool:
        """Could it run here if nothing else did, as `Node.survey` found?"""
        return demand.local

    def fits(self, demand: Demand) -> bool:
        """Can it run here now?"""
        available = self.available
        for name, amount in demand.items:
            if available.get(name, 0) < amount:
                return False
        return not demand.gpu or self.choose_gpus(demand) is not None

    def times(self, demand: Demand, limit: int) -> int:
        """How often does it fit beside itself now; at most `limit`."""
        for name, amount in demand.items:
            fit = self.available.get(name, 0) // amount
            if fit < limit:
                limit = fit
        return limit if limit > 0 else 0

    def _gpus_left(self, demand: Demand) -> list[int]:
        """What is left of each GPU for this demand."""
        if demand.gpu_names == (GPU,):
            return self.gpu_free
        nothing = [0] * len(self.gpu_free)
        pools = [self.gpu_pools.get(name, nothing) for name in demand.gpu_names]
        return [min(left) for left in zip(*pools, strict=True)]

    def choose_gpus(self, demand: Demand) -> tuple[int, ...] | None:
        """The GPUs a new process for this demand should be bound to: fractions share the fullest one they fit on. None
        when none are free enough."""
        count, share = demand.gpu_count(), demand.gpu_share()
        if not count:
            return ()
        free = [(left, index) for index, left in enumerate(self._gpus_left(demand)) if left >= share]
        if len(free) < count:
            return None
        free.sort()
        return tuple(sorted(index for _, index in free[:count]))

    def emptiest_gpus(self, demand: Demand) -> tuple[int, ...]:
        """The GPUs on which it will fit soonest, for a process that is started ahead of its turn."""
        left = self._gpus_left(demand)
        order = sorted(range(len(left)), key=lambda index: (-left[index], index))
        return tuple(sorted(order[: demand.gpu_count()]))

    def suits(self, demand: Demand, gpus: tuple[int, ...]) -> bool:
        """Should a process that is bound to these GPUs run it? They must have room; and a fraction goes where
        `choose_gpus` would put it, on a GPU as full as can be, even if a process for that has to be started: whole GPUs
        stay free for those who need them."""
        share = demand.gpu_share()
        if len(gpus) != demand.gpu_count():
            return False
        left = self._gpus_left(demand)
        for index in gpus:
            if left[index] < share:
                return False
        if share < ONE:
            best = self.choose_gpus(demand)
            return best is not None and left[gpus[0]] == left[best[0]]
        return True

    def take(self, demand: Demand, gpus: tuple[int, ...] = ()) -> None:
        """Occupy, by force if need be."""
        available = self.available
        for name, amount in demand.items:
            available[name] = available.get(name, 0) - amount
        if demand.gpu and gpus:
            self._book_gpus(demand, gpus, -demand.gpu_share())

    def give_back(self, demand: Demand, gpus: tuple[int, ...] = ()) -> None:
        """The reverse of `take`."""
        available = self.available
        for name, amount in demand.items:
            available[name] = available.get(name, 0) + amount
        if demand.gpu and gpus:
            self._book_gpus(demand, gpus, demand.gpu_share())

    def _book_gpus(self, demand: Demand, gpus: tuple[int, ...], share: int) -> None:
        for name in demand.gpu_names:
            pool = self.gpu_pools[name]
            for index in gpus:
                pool[index] += share

    def lend(self, demand: Demand) -> None:
        """Its holder waits: others may use the CPU part (nothing else: memory and devices stay in use while a process
        waits)."""
        for name, amount in demand.lendable:
            self.available[name] = self.available.get(name, 0) + amount

    def take_back(self, demand: Demand) -> None:
        """The holder goes on, whether or not the CPU is free."""
        for name, amount in demand.lendable:
            self.available[name] = self.available.get(name, 0) - amount

    # -- bundles -------------------------------------------------------------------------------------------------------

    def add(self, group: bytes, bundle: int, amounts: Mapping[str, int], gpus: tuple[int, ...] = ()) -> None:
        """A bundle is reserved here: calls in its group may take what it has. Its GPUs: those that it holds."""
        found = placing.contents(group, bundle, amounts)
        for name, units in found.items():
            self.total[name] = self.total.get(name, 0) + units
            self.available[name] = self.available.get(name, 0) + units
        self._change_pools(found, amounts, gpus, 1)

    def remove(self, group: bytes, bundle: int, amounts: Mapping[str, int], gpus: tuple[int, ...] = ()) -> None:
        """The reverse of `add`. (Of another node's bundles something may still be held: then less than nothing is
        available until it is given back.)"""
        found = placing.contents(group, bundle, amounts)
        for name, units in found.items():
            self.available[name] -= units
            left = self.total[name] - units
            if left:
                self.total[name] = left
            else:
                del self.total[name]
                if not self.available[name]:
                    del self.available[name]
        self._change_pools(found, amounts, gpus, -1)

    def _change_pools(
        self, names: dict[str, int], amounts: Mapping[str, int], gpus: tuple[int, ...], sign: int
    ) -> None:
        share = min(amounts.get(GPU, 0), ONE)
        if not gpus:
            return
        for name in names:
            if name.startswith(f"{GPU}_group_"):
                pool = self.gpu_pools.setdefault(name, [0] * len(self.gpu_free))
                for index in gpus:
                    pool[index] += sign * share
                if name not in self.total:
                    del self.gpu_pools[name]


class ClosedLedger(Ledger):
    """Of a node that runs nothing, not even what asks for nothing: it connects a driver to a cluster."""

    __slots__ = ()

    def lacking(self, demand: Demand) -> list[str]:
        """All that is asked for, and a place."""
        return [*(name for name, _ in demand.items), "a node"]

    def why_never(self, demand: Demand) -> str:
        """Say for people what is missing, as the end of a sentence about who asks."""
        return f"asks for {demand!r}, which no node of the cluster can ever give."

    def fits(self, demand: Demand) -> bool:
        """Never."""
        return False

    def times(self, demand: Demand, limit: int) -> int:
        """Never."""
        return 0
