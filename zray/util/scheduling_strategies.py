"""Where tasks and actors run: values of the option `scheduling_strategy`, and conditions on labels.

Names and meanings are those of `ray.util.scheduling_strategies`. Besides these, the option takes "DEFAULT" and "SPREAD". What they become on
the way to the scheduler is `zray.placing.Strategy`; what is done by it, `zray.broker.placement`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from zray import ids, options, placing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zray.util.placement_group import PlacementGroup


class _Values:
    """Base of conditions that name values."""

    def __init__(self, *values: str) -> None:
        if not values or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{type(self).__name__} needs one or more values, all strings, got {values!r}")
        self.values = list(values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.values))})"


class In(_Values):
    """The label has one of these values."""


class NotIn(_Values):
    """The label has none of these values, or is not there."""


class Exists:
    """The label is there."""

    def __repr__(self) -> str:
        return "Exists()"


class DoesNotExist:
    """The label is not there."""

    def __repr__(self) -> str:
        return "DoesNotExist()"


Condition = In | NotIn | Exists | DoesNotExist


@options.register_scheduling_strategy
class NodeAffinitySchedulingStrategy:
    """Run on a certain node."""

    def __init__(self, node_id: str, soft: bool) -> None:
        """Name the node.

        Args:
            node_id: in hex, as `zray.nodes()` and `get_runtime_context().get_node_id()` tell it.
            soft: run elsewhere when that node does not exist (any more) or can never run it. Otherwise the task fails with
                TaskUnschedulableError (an actor with ActorUnschedulableError). A node that is only busy is waited for in any case.

        Raises:
            TypeError, ValueError: not an id, or soft is no bool.
        """
        if not isinstance(node_id, str):
            raise TypeError(f"NodeAffinitySchedulingStrategy: node_id is a string in hex, got {node_id!r}")
        if not isinstance(soft, bool):
            raise TypeError(f"NodeAffinitySchedulingStrategy: soft is True or False, got {soft!r}")
        ids.from_hex(node_id)
        self.node_id = node_id
        self.soft = soft

    def as_record(self) -> placing.Strategy:
        """As it travels."""
        return placing.Strategy(placing.NODE, node=bytes.fromhex(self.node_id), or_elsewhere=self.soft)


@options.register_scheduling_strategy
class NodeLabelSchedulingStrategy:
    """Run on nodes with certain labels."""

    def __init__(
        self, hard: Mapping[str, Condition] | None = None, *, soft: Mapping[str, Condition] | None = None
    ) -> None:
        """Name the conditions.

        Args:
            hard: label to condition; only nodes that meet all of them are used.
            soft: of those, nodes that meet all of these are preferred while the task fits there.

        Raises:
            TypeError, ValueError: something else than labels and conditions, or none at all.
        """
        if not hard and not soft:
            raise ValueError("NodeLabelSchedulingStrategy needs conditions in hard, soft, or both")
        self.hard = dict(hard or {})
        self.soft = dict(soft or {})
        self._record = placing.Strategy(hard=_requirements("hard", self.hard), soft=_requirements("soft", self.soft))

    def as_record(self) -> placing.Strategy:
        """As it travels."""
        return self._record


def _requirements(name: str, conditions: Mapping[str, Condition]) -> tuple[placing.Requirement, ...]:
    found = []
    for key, condition in sorted(conditions.items()):
        if not isinstance(key, str) or not key:
            raise TypeError(f"NodeLabelSchedulingStrategy: the labels in {name} are strings, got {key!r}")
        if isinstance(condition, (In, NotIn)):
            operator = placing.IN if isinstance(condition, In) else placing.NOT_IN
            found.append(placing.Requirement(key, operator, tuple(condition.values)))
        elif isinstance(condition, (Exists, DoesNotExist)):
            found.append(placing.Requirement(key, placing.EXISTS if isinstance(condition, Exists) else placing.ABSENT))
        else:
            raise TypeError(
                f"NodeLabelSchedulingStrategy: the condition on {key!r} in {name} must be In(...), NotIn(...), Exists() or "
                f"DoesNotExist(), got {condition!r}"
            )
    return tuple(found)


@options.register_scheduling_strategy
class PlacementGroupSchedulingStrategy:
    """Run with resources that a placement group has reserved."""

    def __init__(
        self,
        placement_group: PlacementGroup,
        placement_group_bundle_index: int = -1,
        placement_group_capture_child_tasks: bool | None = None,
    ) -> None:
        """Name the group.

        Args:
            placement_group: what `zray.util.placement_group` returned.
            placement_group_bundle_index: which of its bundles; -1: any.
            placement_group_capture_child_tasks: tasks and actors that it makes go to the group as well (any bundle), unless
                they have a strategy of their own.

        Raises:
            TypeError, ValueError: not a group, or it has no such bundle.
        """
        from zray.util.placement_group import PlacementGroup

        if not isinstance(placement_group, PlacementGroup):
            raise TypeError(f"PlacementGroupSchedulingStrategy needs a PlacementGroup, got {placement_group!r}")
        count = placement_group.bundle_count
        if not isinstance(placement_group_bundle_index, int) or not -1 <= placement_group_bundle_index < count:
            raise ValueError(
                f"placement group bundle index {placement_group_bundle_index!r} is invalid. "
                f"Valid placement group indexes: 0-{count - 1}, or -1 for any"
            )
        self.placement_group = placement_group
        self.placement_group_bundle_index = placement_group_bundle_index
        self.placement_group_capture_child_tasks = placement_group_capture_child_tasks

    def as_record(self) -> placing.Strategy:
        """As it travels."""
        return placing.Strategy(
            placing.GROUP,
            group=self.placement_group.binary(),
            bundle=self.placement_group_bundle_index,
            capture=bool(self.placement_group_capture_child_tasks),
        )

    def check(self, amounts: Mapping[str, int], what: str) -> None:
        """Raise ValueError when no bundle could ever hold these amounts."""
        bundles = self.placement_group.bundle_amounts()
        index = self.placement_group_bundle_index
        for bundle in bundles if index < 0 else bundles[index : index + 1]:
            if all(bundle.get(name, 0) >= units for name, units in amounts.items()):
                return
        where = "any bundle" if index < 0 else f"bundle {index}"
        from zray import resources

        raise ValueError(
            f"Cannot schedule {what} with the placement group because the resource request {resources.shown(amounts)} cannot fit into "
            f"{where} of it: {', '.join(map(resources.shown, bundles))}"
        )


_SELECTOR = re.compile(r"(!?)in\((.*)\)\Z", re.DOTALL)


def selector(labels: Mapping[str, str]) -> tuple[placing.Requirement, ...]:
    """Return what a label selector asks for: label to "value", "!value", "in(a, b)" or "!in(a, b)"."""
    found = []
    for key, text in sorted(labels.items()):
        match = _SELECTOR.match(text)
        if match:
            negated, values = bool(match[1]), tuple(value.strip() for value in match[2].split(","))
        else:
            negated, values = text.startswith("!"), (text.removeprefix("!"),)
        if not all(values):
            raise ValueError(
                f"label_selector: {key!r} must be 'value', '!value', 'in(a, b)' or '!in(a, b)', got {text!r}"
            )
        found.append(placing.Requirement(key, placing.NOT_IN if negated else placing.IN, values))
    return tuple(found)


def record_of(chosen: Mapping[str, Any], amounts: Mapping[str, int], what: str) -> bytes:
    """Return the packed strategy that resolved options make.

    Args:
        chosen: options (`zray.options.resolve`).
        amounts: what one execution takes, in fixed point.
        what: who asks, for people.

    Raises:
        ValueError: it fits into no bundle of its group, or the label selector is none.
    """
    strategy, labels = chosen.get("scheduling_strategy"), chosen.get("label_selector")
    if strategy is None and not labels:
        return b""
    if strategy is None or strategy == "DEFAULT":
        record = placing.Strategy()
    elif strategy == "SPREAD":
        record = placing.Strategy(placing.SPREAD)
    else:
        record = strategy.as_record()
        if isinstance(strategy, PlacementGroupSchedulingStrategy):
            strategy.check(amounts, what)
    if labels:
        import msgspec

        record = msgspec.structs.replace(record, hard=(*record.hard, *selector(labels)))
    return placing.pack(record)
