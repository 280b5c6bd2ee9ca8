"""What programs built on zray may use beyond the core: placement groups, scheduling strategies.

Names and submodules are those of `ray.util`; as there, `placement_group` is the function.
"""

from __future__ import annotations

from zray.util import scheduling_strategies
from zray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

__all__ = [
    "PlacementGroup",
    "get_current_placement_group",
    "get_placement_group",
    "placement_group",
    "placement_group_table",
    "remove_placement_group",
    "scheduling_strategies",
]
