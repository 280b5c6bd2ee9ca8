"""Placement groups: resources reserved together, for tasks and actors that belong together.

Names and meanings are those of `ray.util.placement_group`. Where bundles go is decided at the head of the cluster
(`zray.broker.placement_groups`); calls go to a group with the option
`scheduling_strategy=PlacementGroupSchedulingStrategy(group, ...)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from zray import api, errors, ids, placing, resources, serialization, wire
from zray.gcs.client import GcsClient
from zray.gcs.tables import GroupState, PlacementGroupRow
from zray.ids import PlacementGroupId

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zray.object_store import ObjectRef
    from zray.session import Session

_ANSWER_S: Final = 0.1
"""Seconds of waiting that may be too short for the broker's answer."""
_MAX_NAME: Final = 180
"""Bytes in the name of a resource in a bundle: on nodes it bears the id of the group as well."""


class PlacementGroup:
    """A handle of a placement group. It can be passed anywhere; the group does not end with it."""

    def __init__(self, group: bytes, bundles: tuple[dict[str, int], ...]) -> None:
        self._group = group
        self._bundles = bundles

    @staticmethod
    def empty() -> PlacementGroup:
        """Return a handle that names no group."""
        return PlacementGroup(ids.NIL, ())

    @property
    def is_empty(self) -> bool:
        """Whether it names no group."""
        return self._group == ids.NIL

    @property
    def id(self) -> PlacementGroupId:
        """Its id, with `.hex()` and `.binary()`."""
        return PlacementGroupId(self._group)

    def binary(self) -> bytes:
        """The 16 bytes of its id."""
        return self._group

    @property
    def bundle_specs(self) -> list[dict[str, float]]:
        """What each bundle has."""
        return [resources.as_floats(bundle) for bundle in self._bundles]

    @property
    def bundle_count(self) -> int:
        return len(self._bundles)

    def bundle_amounts(self) -> tuple[dict[str, int], ...]:
        """What each bundle has, in fixed point."""
        return self._bundles

    def ready(self) -> ObjectRef[PlacementGroup]:
        """Return a reference whose value is this handle, and which is there when all bundles are reserved. It fails with
        TaskPlacementGroupRemoved when the group is removed before (or was)."""
        session = api.current_session()
        packed = serialization.dumps(self)
        reply = session.store.expect(session.next_put_id(), 0, None, None, "")
        session.tell(wire.AwaitGroup(self._group, reply.binary(), packed.kind, packed.to_bytes()))
        return reply

    def wait(self, timeout_seconds: float = 30) -> bool:
        """Wait until all bundles are reserved; return whether they are. timeout_seconds: at most so long.

        Raises:
            TaskPlacementGroupRemoved: the group was removed.
        """
        asked = self.ready()
        ready, _ = api.wait([asked], timeout=timeout_seconds)
        if not ready and timeout_seconds < _ANSWER_S:
            api.query(
                "statistics"
            )  # answered after the question before it: what the broker knows now is told however short the wait
            ready, _ = api.wait([asked], timeout=0)
        if ready:
            api.get(ready[0])
        return bool(ready)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlacementGroup) and other._group == self._group

    def __hash__(self) -> int:
        return hash(self._group)

    def __reduce__(self) -> tuple[Any, ...]:
        return PlacementGroup, (self._group, self._bundles)

    def __repr__(self) -> str:
        return f"PlacementGroup({self._group.hex()}, {self.bundle_specs})"


def placement_group(
    bundles: Sequence[Mapping[str, float]],
    strategy: str = "PACK",
    name: str = "",
    lifetime: str | None = None,
    bundle_label_selector: Sequence[Mapping[str, str]] | None = None,
) -> PlacementGroup:
    """Ask for resources that are reserved together, all or none, as soon as there is room for them.

    Args:
        bundles: for each the amounts by name; a bundle is on one node.
        strategy: "PACK" (few nodes, if possible), "SPREAD" (many, if possible), "STRICT_PACK" (one), "STRICT_SPREAD" (one for each).
        name: finds it again with `get_placement_group`.
        lifetime: None: it ends with the program that made it; "detached": only by `remove_placement_group`.
        bundle_label_selector: for each bundle what is asked of the labels of its node, as the option label_selector.

    Returns:
        A handle, at once; `ready()` and `wait()` tell when the resources are there.

    Raises:
        ValueError, TypeError: bad arguments; the name is taken.
    """
    amounts = tuple(_bundle(index, bundle) for index, bundle in enumerate(_list_of("bundles", bundles)))
    if not amounts:
        raise ValueError("The placement group `bundles` argument cannot contain an empty list")
    if strategy not in placing.GROUP_STRATEGIES:
        raise ValueError(
            f"Invalid placement group strategy {strategy!r}. Supported strategies are: {', '.join(placing.GROUP_STRATEGIES)}."
        )
    if lifetime not in (None, "detached"):
        raise ValueError(f"placement group `lifetime` argument must be either `None` or 'detached', got {lifetime!r}")
    if not isinstance(name, str):
        raise TypeError(f"the name of a placement group is a string, got {name!r}")
    session = api.current_session()
    spec = placing.GroupSpec(
        session.current().next_child_id(),
        session.job,
        strategy,
        amounts,
        _labels(bundle_label_selector, len(amounts)),
        name,
        session.config.namespace if name else "",
        lifetime == "detached",
    )
    problem = _asked(session, lambda reply: wire.CreateGroup(session.store.process, spec, reply))
    if problem:
        raise ValueError(problem)
    return PlacementGroup(spec.id, amounts)


def _list_of(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"`{name}` must be a list, got {type(value).__name__}")
    return value


def _bundle(index: int, bundle: Any) -> dict[str, int]:
    if not isinstance(bundle, dict):
        raise ValueError(f"The type of bundle must be dict, got {bundle!r} as bundle {index}")
    found = resources.parse(bundle)
    if not found:
        raise ValueError(
            f"Bundle {index} asks for nothing: a bundle needs at least one resource that is greater than 0"
        )
    for name in found:
        if len(name.encode()) > _MAX_NAME or placing.is_of_group(name):
            raise ValueError(
                f"Bundle {index} cannot have the resource {name!r}: its name is too long, or that of a bundle"
            )
    return found


def _labels(selectors: Any, count: int) -> tuple[tuple[placing.Requirement, ...], ...]:
    from zray.util.scheduling_strategies import selector

    if not selectors:
        return ()
    if len(_list_of("bundle_label_selector", selectors)) != count:
        raise ValueError(f"bundle_label_selector needs one entry for each bundle ({count}), got {len(selectors)}")
    return tuple(selector(one) for one in selectors)


def _asked(session: Session, make: Any) -> str:
    """Send a request; return what is wrong with it."""
    return msgspec.msgpack.decode(session.request(make), type=str)


def remove_placement_group(placement_group: PlacementGroup) -> None:
    """End a group: its resources are free again, its tasks fail with TaskPlacementGroupRemoved, its actors die. One that is gone
    already is no error. Raises TypeError for anything but a handle."""
    if not isinstance(placement_group, PlacementGroup):
        raise TypeError(f"remove_placement_group needs a PlacementGroup, got {placement_group!r}")
    _asked(api.current_session(), lambda reply: wire.RemoveGroup(placement_group.binary(), reply))


def get_placement_group(placement_group_name: str) -> PlacementGroup:
    """Return the group with that name in the namespace of this program. Raises ValueError when there is none."""
    if not placement_group_name:
        raise ValueError("Please supply a non-empty value to get_placement_group")
    namespace = api.current_session().config.namespace
    for row in _client().rows(PlacementGroupRow):
        if row.name == placement_group_name and row.namespace == namespace and row.state != GroupState.REMOVED:
            return PlacementGroup(row.id, tuple(resources.parse(bundle) for bundle in row.bundles))
    raise ValueError(
        f"Failed to look up placement group with name: {placement_group_name!r} in namespace {namespace!r}"
    )


def placement_group_table(placement_group: PlacementGroup | None = None) -> dict[str, Any]:
    """Return what is known of a group (or, by id in hex, of all): placement_group_id, name, bundles, bundles_to_node_id,
    strategy, state (PENDING, CREATED, RESCHEDULING, REMOVED). {} for a group that was forgotten."""
    if placement_group is None:
        return {row.id.hex(): _row(row) for row in _client().rows(PlacementGroupRow)}
    row = _client().row(PlacementGroupRow, placement_group.binary())
    return {} if row is None else _row(row)


def _row(row: PlacementGroupRow) -> dict[str, Any]:
    return {
        "placement_group_id": row.id.hex(),
        "name": row.name,
        "bundles": dict(enumerate(row.bundles)),
        "bundles_to_node_id": {index: node.hex() for index, node in enumerate(row.nodes)},
        "strategy": row.strategy,
        "state": row.state.name,
        "is_detached": row.detached,
    }


def _client() -> GcsClient:
    session = api.current_session()
    return GcsClient(lambda body: session.request(lambda reply: wire.GcsRequest(body, reply)))


def get_current_placement_group() -> PlacementGroup | None:
    """Return the group in which this task or actor runs; None in a driver, and where there is none."""
    strategy = placing.unpack(api.current_session().current().strategy)
    if strategy.kind != placing.GROUP:
        return None
    row = _client().row(PlacementGroupRow, strategy.group)
    if row is None:
        raise errors.ZraySystemError(f"nothing is known of placement group {strategy.group.hex()} any more")
    return PlacementGroup(row.id, tuple(resources.parse(bundle) for bundle in row.bundles))


__all__ = [
    "PlacementGroup",
    "PlacementGroupId",
    "get_current_placement_group",
    "get_placement_group",
    "placement_group",
    "placement_group_table",
    "remove_placement_group",
]
