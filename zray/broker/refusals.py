"""Why a demand can never be met again, in words.

Covers the text of errors only. Who refuses, and what becomes of tasks and actors then, is in `group_events` and `task_events`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zray.broker.ledger import Demand


def refusal_text(name: str, demand: Demand) -> str:
    """Say for people why nothing of this demand can run."""
    assert demand.refusal is not None
    what, why = demand.refusal
    if what == "GROUP":
        return f"{name} was to run in placement group {demand.strategy.group.hex()}, which is gone: {why}."
    return (
        f"{name} insists on node {demand.strategy.node.hex()}, which cannot run it: {why}. "
        "With soft=True it would run on another."
    )
