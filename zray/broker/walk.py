"""The walk of tasks through the cluster, as events of the control store: who decided what, where inputs were, what was copied.

Covers noting steps while `ZRAY_TRACE` is set, and gathering those of all nodes in the head's event table. Does not cover what is noted (the callers
say it), nor the timeline of run times (`zray.timeline`). Off by default: an event costs some microseconds, and a task that crosses nodes has about ten.

The steps are those of the published walk of `add(a, b)` with inputs on two nodes (Moritz et al., Ray: a distributed framework for emerging AI
applications, OSDI 2018, Fig. 7).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from zray.broker import peer_messages as pm

if TYPE_CHECKING:
    from zray.broker.server import Broker

CODE_SENT: Final = "code sent"
SUBMITTED: Final = "submitted"
LACKS: Final = "lacks"
LOCATED: Final = "located"
PLACED: Final = "placed"
RECEIVED: Final = "received"
COPIED: Final = "copied"
RAN: Final = "ran"
RETURNED: Final = "returned"


class Walk:
    """Notes steps; a broker that does not trace has none of these."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._node = broker.node.hex()
        self._unsent: list[pm.Step] = []

    def note(self, table: str, subject: bytes, step: str, detail: str = "") -> None:
        """Note a step: `subject` is the id of a task, object or function (`table`)."""
        self._keep(pm.Step(time.time(), self._node, table, subject, step, detail))

    def _keep(self, step: pm.Step) -> None:
        cluster = self._broker.cluster
        if cluster is None or cluster.is_head:
            detail = f"{step.time:.6f} {step.node} {step.detail}".rstrip()
            self._broker.records.event(step.table, step.subject, step.what, detail)
        else:
            self._unsent.append(step)

    def send(self) -> None:
        """Let the head know of the steps that were noted here."""
        cluster = self._broker.cluster
        if self._unsent and cluster is not None:
            steps, self._unsent = self._unsent, []
            cluster.send(cluster.head, pm.Steps(steps))

    def came(self, message: pm.Steps) -> None:
        """Another node noted these."""
        for step in message.steps:
            self._keep(step)

    def lacking(self, task: bytes, inputs: tuple[bytes, ...]) -> None:
        """Note which inputs of a task this node has not, and where they are as far as it knows."""
        sharing = self._broker.sharing
        if sharing is None:
            return
        for name in inputs:
            if sharing.locations.elsewhere(name):
                self.note("tasks", task, LACKS, name.hex())
                holders = " ".join(node.hex() for node in sharing.locations.holders(name))
                self.note("objects", name, LOCATED, holders)
