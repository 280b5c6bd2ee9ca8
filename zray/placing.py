"""Where a call may run: strategies, requirements on labels, and placement groups, as the records that travel.

Covers the words (`Strategy`, `Requirement`, `GroupSpec`), their bytes, whether labels meet requirements, and how the resources of a group's
bundles are named. Does not cover which node is chosen (`zray.broker.placement`), who reserves bundles (`zray.broker.placement_groups`) or what
users write (`zray.util`).

A call without a strategy has the empty one, b"": it costs nothing on the way. What a bundle has reserved is a resource of its own on that node, under
two names, as in Ray: `CPU_group_<index>_<group>` for calls that name the bundle, `CPU_group_<group>` for those that go to any. A call
to a bundle takes both; so whatever mixture of the two is running, no more is taken than the bundles have. Every bundle also has a little of
`bundle_group_...`, so that calls that ask for nothing go to where the group is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import msgspec

from zray import resources

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEFAULT: Final = 0
"""`Strategy.kind`: where it was submitted if it fits there, else where it fits."""
SPREAD: Final = 1
"""... on one node after the other."""
NODE: Final = 2
"""... on a certain node."""
GROUP: Final = 3
"""... in a placement group."""

ANY_BUNDLE: Final = -1

NODE_ID_LABELS: Final = ("ray.io/node-id", "zray.io/node-id")
"""Labels that every node has: its id in hex."""

IN: Final = 0
NOT_IN: Final = 1
EXISTS: Final = 2
ABSENT: Final = 3

PACK: Final = "PACK"
SPREAD_OUT: Final = "SPREAD"
STRICT_PACK: Final = "STRICT_PACK"
STRICT_SPREAD: Final = "STRICT_SPREAD"
GROUP_STRATEGIES: Final = (PACK, SPREAD_OUT, STRICT_PACK, STRICT_SPREAD)

_MARKER: Final = "bundle"
_MARKER_UNITS: Final = 1000 * resources.UNIT
"""Of `bundle_group_...` in each bundle; a call takes 10 of them, one thousandth."""
_MARKER_NEED: Final = 10


class Requirement(msgspec.Struct, frozen=True, array_like=True):
    """What is asked of one label."""

    key: str
    operator: int
    """IN, NOT_IN, EXISTS or ABSENT."""
    values: tuple[str, ...] = ()

    def met(self, labels: Mapping[str, str]) -> bool:
        """Whether labels meet it. A label that is not there is in no set."""
        value = labels.get(self.key)
        if self.operator == IN:
            return value in self.values
        if self.operator == NOT_IN:
            return value not in self.values
        return (value is not None) == (self.operator == EXISTS)

    def __str__(self) -> str:
        if self.operator == EXISTS:
            return f"label {self.key}"
        if self.operator == ABSENT:
            return f"no label {self.key}"
        return f"label {self.key} {'in' if self.operator == IN else 'not in'} ({', '.join(self.values)})"


class Strategy(msgspec.Struct, frozen=True, array_like=True):
    """How the node of a call is chosen. Requirements on labels hold whatever the kind."""

    kind: int = DEFAULT
    hard: tuple[Requirement, ...] = ()
    """All must be met."""
    soft: tuple[Requirement, ...] = ()
    """Nodes that meet them all are preferred."""
    node: bytes = b""
    """NODE: its id."""
    or_elsewhere: bool = False
    """NODE: when that node is not there, or can never run it, any other will do."""
    group: bytes = b""
    """GROUP: its id."""
    bundle: int = ANY_BUNDLE
    """GROUP: index of the bundle."""
    capture: bool = False
    """GROUP: calls made by this one go to the group as well, unless they say otherwise."""

    def __str__(self) -> str:
        parts = [str(requirement) for requirement in self.hard]
        if self.kind == NODE:
            parts.append(f"node {self.node.hex()}")
        elif self.kind == GROUP:
            parts.append(
                f"placement group {self.group.hex()}" + (f", bundle {self.bundle}" if self.bundle >= 0 else "")
            )
        return ", ".join(parts)


_DEFAULT = Strategy()
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Strategy).decode


def pack(strategy: Strategy) -> bytes:
    """Return the canonical bytes: equal strategies give equal bytes, the default gives b""."""
    return b"" if strategy == _DEFAULT else _encode(strategy)


@lru_cache(maxsize=4096)
def unpack(data: bytes) -> Strategy:
    """Return the strategy that `pack` packed; ValueError for anything else."""
    if not data:
        return _DEFAULT
    try:
        return _decode(data)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ValueError(f"not a packed strategy: {error}") from None


# -- placement groups -----------------------------------------------------------------------------------------------------


class GroupSpec(msgspec.Struct, frozen=True, array_like=True):
    """Resources that are to be reserved together."""

    id: bytes
    job: int
    strategy: str
    """One of GROUP_STRATEGIES."""
    bundles: tuple[dict[str, int], ...]
    """Amounts in fixed point (`zray.resources`)."""
    labels: tuple[tuple[Requirement, ...], ...] = ()
    """What is asked of the node of each bundle; empty: nothing of any."""
    name: str = ""
    namespace: str = ""
    detached: bool = False
    """It outlives its job."""

    def requirements(self, bundle: int) -> tuple[Requirement, ...]:
        """What is asked of the node of a bundle."""
        return self.labels[bundle] if self.labels else ()


def indexed(name: str, group: bytes, bundle: int) -> str:
    """Name of a resource in one bundle of a group."""
    return f"{name}_group_{bundle}_{group.hex()}"


def wildcard(name: str, group: bytes) -> str:
    """Name of a resource in any bundle of a group."""
    return f"{name}_group_{group.hex()}"


def contents(group: bytes, bundle: int, amounts: Mapping[str, int]) -> dict[str, int]:
    """The resources that a node has while a bundle is reserved on it."""
    found: dict[str, int] = {}
    for name, units in {**amounts, _MARKER: _MARKER_UNITS}.items():
        found[indexed(name, group, bundle)] = units
        found[wildcard(name, group)] = units
    return found


def needs(strategy: Strategy, amounts: Mapping[str, int]) -> dict[str, int]:
    """The resources that a call takes which asks for these amounts: for calls in a group, those of its bundles."""
    if strategy.kind != GROUP:
        return dict(amounts)
    found: dict[str, int] = {}
    for name, units in {**amounts, _MARKER: _MARKER_NEED}.items():
        found[wildcard(name, strategy.group)] = units
        if strategy.bundle >= 0:
            found[indexed(name, strategy.group, strategy.bundle)] = units
    return found


def is_of_group(name: str) -> bool:
    """Whether a resource is part of a bundle."""
    return "_group_" in name


def meets(labels: Mapping[str, str], requirements: Sequence[Requirement]) -> bool:
    """Whether labels meet all requirements."""
    return all(requirement.met(labels) for requirement in requirements)
