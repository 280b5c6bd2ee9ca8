"""Other nodes as places where tasks of this one may run.

Covers what is known of each (totals, what it last said is free, what this node has there) and whether a demand fits. Does
not cover who decides (`placement`), or how tasks get there and back (`remote_tasks`).

A peer lends *slots*: a slot is a `Worker` of this node's books whose process is somewhere on the peer, and which is handed
tasks as a local worker is. What slots hold is booked here, so that between two reports nothing is given away twice:

    free(name) == min(total - sum(held by slots of this node),
                      what the peer last said is free - sum(held by slots since) + sum(given back since))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zray import placing, resources
from zray.broker.ledger import Demand, Ledger

if TYPE_CHECKING:
    from collections.abc import Mapping


class Peer(Ledger):
    """Resources of another node. `available` is what this node's slots leave of its total."""

    __slots__ = ("_last", "_parsed", "reported", "silent")

    def __init__(self, node: bytes, total: dict[str, float], labels: Mapping[str, str] | None = None) -> None:
        super().__init__(total, node, labels)
        self.reported: dict[str, int] = dict(self.total)
        """What it last said is free, and what slots took and gave back since."""
        self._last: dict[str, float] = {}
        self._parsed: dict[str, int] = {}
        """The last report as it came and as it was taken: most say the same again."""
        self.silent = False
        """It was not heard of for a moment: it gets nothing new."""

    def __repr__(self) -> str:
        return f"<Peer {self.id.hex()[:8]}{' silent' if self.silent else ''}>"

    def report(self, available: dict[str, float]) -> None:
        """Take what it says is free now. Of bundles that it did not know of when it said so, nothing is taken back."""
        if available != self._last:
            self._last = available
            self._parsed = resources.parse({name: max(0.0, amount) for name, amount in available.items()})
        before = self.reported
        self.reported = dict(self._parsed)
        for name in self.total:
            if placing.is_of_group(name) and name not in available and name in before:
                self.reported[name] = before[name]

    def fits(self, demand: Demand) -> bool:
        """Can it run there now, as far as is known here?"""
        if self.silent:
            return False
        left, said = self.available, self.reported
        return all(amount <= left.get(name, 0) and amount <= said.get(name, 0) for name, amount in demand.items)

    def feasible(self, demand: Demand) -> bool:
        """Could it run there if nothing else did?"""
        return self.could_run(demand)

    def take(self, demand: Demand, gpus: tuple[int, ...] = ()) -> None:
        """A slot holds this from now on. Which GPUs, the peer decides."""
        super().take(demand, ())
        for name, amount in demand.items:
            self.reported[name] = self.reported.get(name, 0) - amount

    def give_back(self, demand: Demand, gpus: tuple[int, ...] = ()) -> None:
        """The reverse of `take`."""
        super().give_back(demand, ())
        for name, amount in demand.items:
            self.reported[name] = min(self.reported.get(name, 0) + amount, self.total.get(name, 0))

    def add(self, group: bytes, bundle: int, amounts: Mapping[str, int], gpus: tuple[int, ...] = ()) -> None:
        """A bundle is reserved there. It may have said so already."""
        super().add(group, bundle, amounts)
        for name, units in placing.contents(group, bundle, amounts).items():
            self.reported[name] = min(self.reported.get(name, 0) + units, self.total[name])

    def remove(self, group: bytes, bundle: int, amounts: Mapping[str, int], gpus: tuple[int, ...] = ()) -> None:
        """It is not any more; no slot holds anything of it."""
        super().remove(group, bundle, amounts)
        for name, units in placing.contents(group, bundle, amounts).items():
            if name in self.total:
                self.reported[name] = self.reported.get(name, 0) - units
            else:
                self.reported.pop(name, None)
