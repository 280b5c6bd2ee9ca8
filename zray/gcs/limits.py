"""How much the control store keeps: every bound in one record.

Covers the bounds of all shards together and each shard's part of them. Does not cover what happens at a bound (`shard`,
`task_rows`). Memory stays flat because everything that a running cluster produces without end (ended tasks, events,
ended jobs and actors) has a bound here; what users store (key-value) is refused when full, because throwing it away
would lose an acknowledged write.
"""

from __future__ import annotations

from typing import Final

import msgspec

from zray.gcs.tables import Table


class GcsLimits(msgspec.Struct, frozen=True):
    """Bounds of the whole store; `share` divides them among shards. All are at least one after the division."""

    ended_tasks: int = 100_000
    """Rows of ended tasks that stay readable."""
    ended_task_bytes: int = 64 << 20
    """Bytes of their columns and specs."""
    lineage_bytes: int = 256 << 20
    """Bytes of specs kept beyond that because a result is still referenced."""
    ended_nodes: int = 1_000
    ended_jobs: int = 10_000
    ended_actors: int = 10_000
    ended_groups: int = 1_000
    events: int = 20_000
    log_changes: int = 4_096
    """Changes kept per table, so that a subscriber that missed some need not read the whole table."""
    log_bytes: int = 8 << 20
    """Bytes of values in those logs, per table."""
    kv_bytes: int = 1 << 30
    """Bytes of user keys and values."""
    value_bytes: int = 64 << 20
    """Bytes of one value."""

    def share(self, shards: int) -> GcsLimits:
        """Return the bounds of one of `shards` shards.

        Per-row and per-log bounds are not divided: a log covers a time, not a volume.
        """
        parts = {name: max(1, getattr(self, name) // shards) for name in _DIVIDED}
        return msgspec.structs.replace(self, **parts)

    def ended_rows(self, table: int) -> int:
        """Return how many ended rows of a table are kept; unbounded tables have none that end."""
        name = _ENDED.get(table)
        return UNBOUNDED if name is None else int(getattr(self, name))


UNBOUNDED: Final = 1 << 62

_ENDED: Final[dict[int, str]] = {
    Table.NODES: "ended_nodes",
    Table.JOBS: "ended_jobs",
    Table.ACTORS: "ended_actors",
    Table.PLACEMENT_GROUPS: "ended_groups",
    Table.EVENTS: "events",
}
_DIVIDED: Final = (
    "ended_tasks",
    "ended_task_bytes",
    "lineage_bytes",
    "ended_nodes",
    "ended_jobs",
    "ended_actors",
    "ended_groups",
    "events",
    "kv_bytes",
)
