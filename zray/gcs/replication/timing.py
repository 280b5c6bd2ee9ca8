"""Every period of the replicated store in one record.

Covers the numbers and how they depend on one another. Does not cover clocks: machines are told the time. Times are seconds
of the process's own monotonic clock; two clocks may differ in their rate by `drift` at most, and need agree in nothing else.
"""

from __future__ import annotations

from typing import Final

import msgspec

NEVER = float("inf")
MOST_SILENT: Final = 5.0
"""Most seconds for which a node that keeps tables may be silent, however patient its cluster is with nodes: writes wait so long."""


class Timing(msgspec.Struct, frozen=True):
    """How long things take and last. The defaults suit processes on one network that share their cores with others."""

    beat: float = 0.1
    """Between two signs of life."""
    silent: float = 1.0
    """Without a sign of life for so long a process is taken for missing. A killed one is found at once, by its port."""
    lease: float = 0.6
    """A head or tail may go on alone for so long after it has asked. When one is cut off, and not known to have ended, its
    successors wait for this: with `silent` it bounds the gap that a partition makes."""
    drift: float = 0.02
    """Most by which the rate of a clock differs from true time."""
    resend: float = 0.05
    """After which a replica repeats what its successor has not acknowledged, and who proposes what was not answered."""
    stagger: float = 0.02
    """By which each further candidate waits for the ones before it to propose."""
    retry: float = 0.15
    """After which a client repeats a request; doubles up to `retry_most`."""
    retry_most: float = 2.0

    def held(self) -> float:
        """How long a lease binds who has granted it, from then on."""
        return self.lease * (1 + self.drift)

    def usable(self) -> float:
        """How long a lease serves its holder, from when it was asked for."""
        return self.lease * (1 - self.drift)


def of_nodes(node_timeout: float) -> Timing:
    """Return the periods for replicas that are nodes of a cluster, with a lot of other work to do.

    Args:
        node_timeout: seconds of silence after which a node counts as dead.
    """
    silent = min(MOST_SILENT, node_timeout / 2)
    return Timing(beat=min(0.25, silent / 8), silent=silent, lease=0.6 * silent, resend=min(0.2, silent / 10))
