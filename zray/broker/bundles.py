"""Bundles of placement groups as one node knows them: those reserved here, and where those of every known group are.

Covers the books only. Does not cover who decides where bundles go (`placement_groups`, at the head), or what is done with
tasks when a group appears or goes (`group_events`).

A bundle is *held* here (what it asks for is taken) from the answer to the head until it is given back, and *open* (calls
in its group can take what it has) from the moment the whole group is there. When a group is removed its processes are
killed, and only with the exit of the last of them is what its bundles hold free again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from zray.broker.ledger import Demand
    from zray.placing import GroupSpec

_TOMBSTONES: Final = 10_000
"""Removed groups whose reason is remembered for late callers."""


class Bundle:
    """One bundle that this node holds."""

    __slots__ = ("amounts", "attempt", "demand", "gpus", "group", "index", "is_open")

    def __init__(
        self,
        group: bytes,
        index: int,
        attempt: int,
        amounts: dict[str, int],
        demand: Demand,
        gpus: tuple[int, ...],
    ) -> None:
        self.group = group
        self.index = index
        self.attempt = attempt
        """Of the head's, in answer to which it is held."""
        self.amounts = amounts
        self.demand = demand
        """The same amounts, as they are taken from the node."""
        self.gpus = gpus
        self.is_open = False

    def __repr__(self) -> str:
        return f"<Bundle {self.index} of {self.group.hex()[:8]} {'open' if self.is_open else 'held'}>"


class Placed:
    """A group whose bundles are all reserved (or were, and some were lost with their nodes)."""

    __slots__ = ("nodes", "spec")

    def __init__(self, spec: GroupSpec, nodes: tuple[bytes, ...]) -> None:
        self.spec = spec
        self.nodes = nodes
        """Of each bundle; b"" while it has none."""


class BundleTable:
    """All that one node knows of placement groups."""

    __slots__ = ("asked", "gone", "held", "placed", "returning")

    def __init__(self) -> None:
        self.held: dict[tuple[bytes, int], Bundle] = {}
        """By group and index."""
        self.placed: dict[bytes, Placed] = {}
        self.gone: dict[bytes, str] = {}
        """Why each group that was removed is gone."""
        self.asked: set[bytes] = set()
        """Groups of which nothing is known here yet: the head was asked, or has not placed them."""
        self.returning: set[bytes] = set()
        """Removed groups whose processes here have not all exited."""

    def of(self, group: bytes) -> list[Bundle]:
        """The bundles of a group that this node holds."""
        return [bundle for bundle in self.held.values() if bundle.group == group]

    def known(self) -> dict[bytes, None]:
        """The groups of which something is known here, or wanted, and which are not gone."""
        held = (group for group, _ in self.held)
        return {group: None for group in (*self.placed, *self.asked, *held) if group not in self.gone}

    def bury(self, group: bytes, reason: str) -> None:
        """A group is gone for ever."""
        self.placed.pop(group, None)
        self.asked.discard(group)
        self.gone[group] = reason
        if len(self.gone) > _TOMBSTONES:
            del self.gone[next(iter(self.gone))]
