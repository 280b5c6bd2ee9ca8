"""Planted faults: one named mistake each, switched on by tests to prove that the checks would find it.

Covers the list of mistakes; the machines take a set of them and make the mistake where it belongs. Does not cover how
they are found (the tests pair every member with the check that must notice). A machine without faults pays one lookup
in an empty set.
"""

from __future__ import annotations

import enum
from typing import Final


class Fault(enum.Enum):
    """One mistake a machine of the control store can be told to make."""

    SKIPPED_SEQUENCE = "a topic's numbers leave one out"
    NO_VERSION_BUMP = "an overwrite keeps the old version"
    VERSION_REUSED = "versions start again when a row was deleted"
    STALE_WRITE_ACCEPTED = "compare-and-swap does not compare"
    KEY_INDEX_KEPT = "a deleted key stays in the ordered index"
    BYTES_NOT_RETURNED = "a deleted row's bytes stay counted"
    LIVE_ROW_RETIRED = "retention takes a row that has not ended"
    RETENTION_FORGOTTEN = "ended rows are kept for ever"
    LOG_UNBOUNDED = "the change log is never cut"
    LOG_LOSES_CHANGE = "a change is applied but not logged"
    ENDED_TASK_LOST = "a task that ends is not kept"
    TASK_END_DROPPED_WITH_OLD = "flushing the first end of a task takes its second end along"
    TASK_RING_UNBOUNDED = "ended task rows are never flushed"
    TASK_BYTES_NOT_RETURNED = "a flushed batch stays counted"
    LINEAGE_FLUSHED = "the spec of a task whose result is still referenced is flushed"
    BEAT_WITHOUT_NEWEST = "beats carry old numbers, so the loss of the last notice stays unseen"
    GAP_IGNORED = "a subscriber takes a notice that does not follow the one before"
    DUPLICATE_APPLIED = "a subscriber takes an old notice once more"
    EPOCH_IGNORED = "a subscriber does not notice that the service has begun anew"
    SNAPSHOT_TOO_NEW = "a snapshot claims changes that it does not hold"
    WAITING_NOTICES_LOST = (
        "notices that came during a re-read are dropped, and the numbers go on as if they had been taken"
    )
    DELETION_NOT_SEEN = "a snapshot does not remove rows that are gone"


Faults = frozenset[Fault]
NO_FAULTS: Final[Faults] = frozenset()
