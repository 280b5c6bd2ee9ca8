"""Each mistake that the machines of the replicated store can be told to make is found: in worlds, or by a story told for it.

Covers the proof that `chain_world` and the equations of the machines are worth something. Mistakes that need several rare things at
once have a story; the others are found by chance, within `WORLDS` worlds from the seed that is named.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.simulation.chain_world import Disk, TracedState, planted
from zray.gcs.replication import messages as rm
from zray.gcs.replication.configuration import Configuration, Place
from zray.gcs.replication.council import Campaign, Voter, Votes
from zray.gcs.replication.faults import NO_CHAIN_FAULTS, ChainFault, ChainFaults
from zray.gcs.replication.member import Member
from zray.gcs.replication.timing import Timing

WORLDS = 8

IN_WORLDS: dict[ChainFault, int] = {
    ChainFault.ACK_BEFORE_TAIL: 0,
    ChainFault.READ_AT_HEAD: 18,
    ChainFault.READ_WITHOUT_LEASE: 17,
    ChainFault.LEASE_NOT_WAITED_OUT: 0,
    ChainFault.MAJORITY_OF_ONE: 2,
    ChainFault.DUPLICATE_APPLIED: 0,
    ChainFault.SESSIONS_NOT_IN_SNAPSHOT: 24,
    ChainFault.SNAPSHOT_WITHOUT_LOG: 18,
    ChainFault.JOIN_NOT_GATED: 0,
    ChainFault.GAP_TAKEN: 0,
    ChainFault.ORDER_AFTER_ADOPTION: 4,
    ChainFault.UNSENT_AFTER_ADOPTION: 0,
    ChainFault.SAME_LIFE: 0,
    ChainFault.REPLY_LOST_ON_REPEAT: 0,
    ChainFault.REMOVED_KEEPS_ROWS: 24,
}
"""Mistakes that worlds find, and from which seed on they are looked for."""

A, B, C, D = (Place(bytes([number]) * 16, 1) for number in range(1, 5))
ABC = Configuration(7, (A, B, C), (A, B, C))
WITHOUT_A = Configuration(8, (B, C), (A, B, C))
WITHOUT_C = Configuration(8, (A, B), (A, B, C))
TIMING = Timing()


def a_member_that_has_voted_is_started_again(faults: ChainFaults) -> None:
    disk = Disk()
    voter = Voter(B.id, disk, TIMING, 0.0)
    voter.learn(ABC, -100.0)
    voter.handle(A.id, rm.Accept(ABC, (2, A.id), WITHOUT_C), 0.0)
    again = Voter(B.id, disk, TIMING, 1.0, faults)
    again.learn(ABC, 1.0)
    [(_, answer)] = again.handle(C.id, rm.Accept(ABC, (1, C.id), WITHOUT_A), 99.0)
    assert not isinstance(answer, rm.Accepted), "it has voted for two configurations of one epoch"


def a_member_that_has_granted_a_lease_is_started_again(faults: ChainFaults) -> None:
    disk = Disk()
    voter = Voter(B.id, disk, TIMING, 0.0)
    voter.learn(ABC, -100.0)
    assert voter.handle(C.id, rm.LeaseAsk(7, C, 5.0), 10.0)
    again = Voter(B.id, disk, TIMING, 10.1, faults)
    [(_, answer)] = again.handle(A.id, rm.Accept(ABC, (1, A.id), WITHOUT_C), 10.2)
    assert not isinstance(answer, rm.Accepted), "the tail that it removes has a lease"


def a_holder_does_not_hear_of_the_next_epoch(faults: ChainFaults) -> None:
    voter = Voter(B.id, Disk(), TIMING, 0.0, faults)
    voter.learn(ABC, -100.0)
    assert voter.handle(A.id, rm.LeaseAsk(7, A, 5.0), 10.0)
    voter.learn(Configuration(8, (A, C, D), (B, C, D)), 10.1)
    removal = Configuration(9, (C, D), (B, C, D))
    [(_, answer)] = voter.handle(C.id, rm.Accept(Configuration(8, (A, C, D), (B, C, D)), (1, C.id), removal), 10.2)
    assert not isinstance(answer, rm.Accepted), "the head that it removes has a lease of the epoch before"


def a_grant_is_late(faults: ChainFaults) -> None:
    disk = Disk()
    disk.save(Votes(ABC))
    head = Member(A, TracedState(), disk, TIMING, 100.0, random.Random(1), faults=faults)
    head.tick(100.0)
    [stamp] = {message.stamp for _, message in head.flush(100.0) if isinstance(message, rm.LeaseAsk)}
    head.handle(B.id, rm.LeaseGrant(7, stamp), 100.0 + TIMING.lease * 0.9)
    assert head.is_leased_head(100.0 + TIMING.lease * 0.95)
    assert not head.is_leased_head(100.0 + TIMING.lease * 1.1), "a lease lasts longer than its members wait"


def somebody_else_was_about_to_decide(faults: ChainFaults) -> None:
    campaign = Campaign(ABC, WITHOUT_C, (5, A.id), (C,), TIMING, faults)
    campaign.start(0.0)
    for place in (A, B):
        campaign.handle(place.id, rm.Here(8, (5, A.id), place.life), 0.0)
    campaign.handle(A.id, rm.Promised(8, (5, A.id), None, rm.NO_BALLOT), 0.0)
    campaign.handle(B.id, rm.Promised(8, (5, A.id), WITHOUT_A, (4, C.id)), 0.0)
    assert campaign.value == WITHOUT_A, "what may have been decided is not what is proposed"


def a_replica_has_ended_unnoticed(faults: ChainFaults) -> None:
    campaign = Campaign(ABC, Configuration(8, (B,), (A, B, C)), (5, A.id), (), TIMING, faults)
    campaign.start(0.0)
    out = campaign.handle(A.id, rm.Promised(8, (5, A.id), None, rm.NO_BALLOT), 0.0)
    out += campaign.handle(C.id, rm.Promised(8, (5, A.id), None, rm.NO_BALLOT), 0.0)
    assert not out, "all others are left out for the sake of one that did not answer"


def a_tail_that_was_left_out_asks_for_its_lease(faults: ChainFaults) -> None:
    voter = Voter(B.id, Disk(), TIMING, 0.0, faults)
    voter.learn(WITHOUT_C, 10.0)
    [(_, answer)] = voter.handle(C.id, rm.LeaseAsk(7, C, 5.0), 20.0)
    assert answer == rm.Decided(WITHOUT_C), "a late message of one that was left out is answered as if it had not been"


STORIES: dict[ChainFault, Callable[[ChainFaults], None]] = {
    ChainFault.VOTE_FORGOTTEN_ON_RESTART: a_member_that_has_voted_is_started_again,
    ChainFault.LEASE_FORGOTTEN_ON_RESTART: a_member_that_has_granted_a_lease_is_started_again,
    ChainFault.LEASES_END_WITH_EPOCH: a_holder_does_not_hear_of_the_next_epoch,
    ChainFault.LEASE_DRIFT_IGNORED: a_grant_is_late,
    ChainFault.ACCEPTED_VALUE_IGNORED: somebody_else_was_about_to_decide,
    ChainFault.FENCED_HOLDER_LEASED: a_tail_that_was_left_out_asks_for_its_lease,
    ChainFault.DEAD_REPLICA_KEPT: a_replica_has_ended_unnoticed,
}


def test_the_list_of_faults_is_complete() -> None:
    assert IN_WORLDS.keys() | STORIES.keys() == set(ChainFault)
    assert not IN_WORLDS.keys() & STORIES.keys()


@pytest.mark.parametrize("fault", list(IN_WORLDS), ids=lambda fault: fault.name)
def test_worlds_find_a_planted_fault(fault: ChainFault) -> None:
    first = IN_WORLDS[fault]
    assert any(planted(fault, seed) for seed in range(first, first + WORLDS)), f"not found: {fault.value}"


@pytest.mark.parametrize("fault", list(STORIES), ids=lambda fault: fault.name)
def test_a_story_finds_a_planted_fault(fault: ChainFault) -> None:
    STORIES[fault](NO_CHAIN_FAULTS)
    with pytest.raises(AssertionError):
        STORIES[fault](frozenset({fault}))
