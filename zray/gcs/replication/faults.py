"""Mistakes that the machines of the replicated store can be told to make, so that tests can prove they would be found.

Covers the list. Does not cover how they are found: `tests/unit/test_chain_faults.py` pairs every member with the worlds
that must notice it. A machine without faults pays one lookup in an empty set.
"""

from __future__ import annotations

import enum
from typing import Final


class ChainFault(enum.Enum):
    """One mistake."""

    ACK_BEFORE_TAIL = "the head answers a write before the tail has it"
    READ_AT_HEAD = "the head answers reads from rows that the tail may not have"
    READ_WITHOUT_LEASE = "a tail reads although its lease has run out"
    LEASE_NOT_WAITED_OUT = "a configuration is accepted while the tail that it removes may still read"
    LEASES_END_WITH_EPOCH = (
        "a member of the council forgets the leases of earlier epochs, whose holders may not know that these are over"
    )
    LEASE_FORGOTTEN_ON_RESTART = "a member of the council forgets with its process the leases that it has granted"
    LEASE_DRIFT_IGNORED = "a lease counts from its arrival and as long as it was granted for"
    VOTE_FORGOTTEN_ON_RESTART = "a member of the council votes again in an epoch in which it has voted"
    ACCEPTED_VALUE_IGNORED = "who proposes does not take up what a member has accepted before"
    MAJORITY_OF_ONE = "one vote is a majority"
    DEAD_REPLICA_KEPT = "a silent replica is left out for the sake of one that has ended, which nobody has asked"
    FENCED_HOLDER_LEASED = "a member of the council answers a head or tail that was left out as if it had not been"
    DUPLICATE_APPLIED = "a request that was sent again is carried out again"
    SESSIONS_NOT_IN_SNAPSHOT = "a joining replica does not learn which requests were carried out"
    SNAPSHOT_WITHOUT_LOG = "a joining replica is taken in before it has what came after its snapshot"
    JOIN_NOT_GATED = "writes are acknowledged without the replica that is just being taken in"
    GAP_TAKEN = "a replica takes an entry that does not follow its last one"
    ORDER_AFTER_ADOPTION = "a replica's numbers begin behind what was acknowledged when the configuration changes"
    UNSENT_AFTER_ADOPTION = "what only the earlier replicas had is not sent on when the configuration changes"
    REMOVED_KEEPS_ROWS = "a replica that was removed keeps rows that nobody else has"
    SAME_LIFE = "a process that was started anew takes the place of its former life in the chain"
    REPLY_LOST_ON_REPEAT = "the answer to a request that was sent again is not given"


ChainFaults = frozenset[ChainFault]
NO_CHAIN_FAULTS: Final[ChainFaults] = frozenset()
