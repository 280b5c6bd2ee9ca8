"""What tests of programs may want to observe and public names do not show: values in the store, counts of references."""

from __future__ import annotations

import gc
from typing import Any

from zray import _store, api, failures, serialization
from zray.object_store import ObjectRef


def object_exists(ref: ObjectRef) -> bool:
    """Whether the value is in this node's store (a value, not an error; in memory or spilled)."""
    session = api.current_session()
    state, _, kind, _, _ = session.store.describe(ref)
    return state in (_store.STATE_SEALED, _store.STATE_SPILLED) and not kind & _store.KIND_ERROR_FLAG


def free(refs: ObjectRef | list[ObjectRef], local_only: bool = False) -> None:
    """Drop values although they are referenced; getting them raises ObjectFreedError from then on."""
    session = api.current_session()
    for ref in [refs] if isinstance(refs, ObjectRef) else refs:
        session.store.discard(ref, failures.FREED_DATA, serialization.KIND_ERROR)


def object_store_stats() -> dict[str, int]:
    """Bytes in memory, spilled, restored, and in files of their own."""
    session = api.current_session()
    return {
        "used_bytes": int(session.store.statistics()["used"]),
        "spilled_bytes": session.objects.spilled_bytes,
        "restored_bytes": session.objects.restored_bytes,
        "fallback_bytes": session.objects.file_bytes,
    }


def global_gc() -> None:
    """Collect garbage in this process."""
    gc.collect()


def reference_counts() -> dict[str, dict[str, Any]]:
    """References of this process by object id (hex)."""
    return {}
