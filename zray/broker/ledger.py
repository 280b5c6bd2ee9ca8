"""What a node has and who holds it: totals, what is available, and the GPUs one by one.

Covers demands (a packed vector, unpacked once and interned) and their taking, giving back and lending. Does not cover
who holds what: each worker names the demand it holds (`worker_pool`), and

    available + sum(held by workers) - sum(CPUs lent by blocked workers) == total      (per resource; checked by
    Scheduler.validate)

Amounts are whole numbers of 1/10000 (`zray.resources`). `available` may fall below zero: a blocked worker that goes on
takes its CPU back by force.
"""

from __future__ import annotations

from typing import Final

from zray import resources

CPU: Final = "CPU"
GPU: Final = "GPU"
ONE: Final = resources.UNIT


class Demand:
    """What one execution occupies. Interned by `Ledger.demand`: equal vectors are one object."""

    __slots__ = ("cpu", "feasible", "gpu", "items", "key", "local", "threads")

    def __init__(self, key: bytes, items: tuple[tuple[str, int], ...]) -> None:
        self.key = key
        self.items = items
        amounts = dict(items)
        self.cpu: int = amounts.get(CPU, 0)
        self.gpu: int = amounts.get(GPU, 0)
        self.threads: int = max(1, self.cpu // ONE)
        """Threads that numeric libraries should use in a process that runs this."""
        self.local = False
        """This node could run it if nothing else ran here."""
        self.feasible = False
        """Some node in view could."""

    def __repr__(self) -> str:
        return resources.shown(dict(self.items))

    def gpu_share(self) -> int:
        """How much of each of its GPUs it takes: a fraction of one, or whole ones."""
        return self.gpu if self.gpu < ONE else ONE

    def gpu_count(self) -> int:
        """How many GPUs its process sees."""
        return (self.gpu + ONE - 1) // ONE


class Ledger:
    """Resources of one node."""

    __slots__ = ("available", "demands", "gpu_free", "total")

    def __init__(self, total: dict[str, float]) -> None:
        self.total: dict[str, int] = resources.parse(total)
        self.available: dict[str, int] = dict(self.total)
        self.gpu_free: list[int] = [ONE] * (self.total.get(GPU, 0) // ONE)
        self.demands: dict[bytes, Demand] = {}

    def available_floats(self) -> dict[str, float]:
        """What is free, for people: never below zero."""
        return {name: max(0, amount) / ONE for name, amount in self.available.items() if name in self.total}

    def copy(self) -> Ledger:
        """Return a ledger of the same contents to try things out on; demands are shared."""
        other = Ledger({})
        other.total = self.total
        other.available = dict(self.available)
        other.gpu_free = list(self.gpu_free)
        other.demands = self.demands
        return other

    def demand(self, packed: bytes) -> Demand:
        """Return the demand of a packed vector; ValueError when it is none."""
        found = self.demands.get(packed)
        if found is None:
            items = tuple((name, amount) for name, amount in sorted(resources.unpack(packed).items()) if amount)
            found = Demand(packed, items)
            found.local = found.feasible = not self.lacking(found)
            self.demands[packed] = found
        return found

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
        return f"asks for {demand!r}, which no node here can ever give ({'; '.join(parts)})."

    def feasible(self, demand: Demand) -> bool:
        """Could it run here if nothing else did?"""
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

    def choose_gpus(self, demand: Demand) -> tuple[int, ...] | None:
        """The GPUs a new process for this demand should be bound to: fractions share the fullest one they fit on. None
        when none are free enough."""
        count, share = demand.gpu_count(), demand.gpu_share()
        if not count:
            return ()
        free = [(left, index) for index, left in enumerate(self.gpu_free) if left >= share]
        if len(free) < count:
            return None
        free.sort()
        return tuple(sorted(index for _, index in free[:count]))

    def emptiest_gpus(self, demand: Demand) -> tuple[int, ...]:
        """The GPUs on which it will fit soonest, for a process that is started ahead of its turn."""
        order = sorted(range(len(self.gpu_free)), key=lambda index: (-self.gpu_free[index], index))
        return tuple(sorted(order[: demand.gpu_count()]))

    def suits(self, demand: Demand, gpus: tuple[int, ...]) -> bool:
        """Should a process that is bound to these GPUs run it? They must have room; and a fraction goes where
        `choose_gpus` would put it, on a GPU as full as can be, even if a process for that has to be started: whole GPUs
        stay free for those who need them."""
        share = demand.gpu_share()
        if len(gpus) != demand.gpu_count():
            return False
        for index in gpus:
            if self.gpu_free[index] < share:
                return False
        if share < ONE:
            best = self.choose_gpus(demand)
            return best is not None and self.gpu_free[gpus[0]] == self.gpu_free[best[0]]
        return True

    def take(self, demand: Demand, gpus: tuple[int, ...] = ()) -> None:
        """Occupy, by force if need be."""
        available = self.available
        for name, amount in demand.items:
            available[name] = available.get(name, 0) - amount
        if demand.gpu:
            for index in gpus:
                self.gpu_free[index] -= demand.gpu_share()

    def give_back(self, demand: Demand, gpus: tuple[int, ...] = ()) -> None:
        """The reverse of `take`."""
        available = self.available
        for name, amount in demand.items:
            available[name] = available.get(name, 0) + amount
        if demand.gpu:
            for index in gpus:
                self.gpu_free[index] += demand.gpu_share()

    def lend(self, demand: Demand) -> None:
        """Its holder waits: others may use the CPU part (nothing else: memory and devices stay in use while a process
        waits)."""
        if demand.cpu:
            self.available[CPU] += demand.cpu

    def take_back(self, demand: Demand) -> None:
        """The holder goes on, whether or not the CPU is free."""
        if demand.cpu:
            self.available[CPU] -= demand.cpu
