"""The machines of the replicated store one by one: succession, votes, leases, sessions, messages, snapshots."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zray.gcs import messages as m
from zray.gcs.limits import GcsLimits
from zray.gcs.replication import messages as rm
from zray.gcs.replication.client import Router
from zray.gcs.replication.configuration import Configuration, Place, why_not_successor, without
from zray.gcs.replication.council import Campaign, NoVoteStore, Voter, Votes
from zray.gcs.replication.sessions import MAX_SESSIONS, Sessions
from zray.gcs.replication.state import StoreState, is_write
from zray.gcs.replication.timing import Timing
from zray.gcs.replication.vote_file import VoteFile
from zray.gcs.service import GcsService
from zray.gcs.tables import ABSENT, ActorRow, ActorState, Table, encode_row, key_of, namespaced_key

A, B, C, D = (Place(bytes([number]) * 16, 1, f"127.0.0.1:{7000 + number}") for number in range(1, 5))
ABC = Configuration(7, (A, B, C), (A, B, C))
TIMING = Timing()


# -- succession --------------------------------------------------------------------------------------------------------


def test_who_is_missing_leaves_the_chain_and_stays_in_the_council_until_somebody_takes_its_place() -> None:
    two = without(ABC, {B.id}, {B.id})
    assert two is not None
    assert two.chain == (A, C)
    assert set(two.members()) == {A.id, B.id, C.id}
    three = without(two, set(), {B.id}, joining=D)
    assert three is not None
    assert three.chain == (A, C, D)
    assert set(three.members()) == {A.id, C.id, D.id}


def test_a_council_grows_from_one_to_three_at_once() -> None:
    one = Configuration(1, (A,), (A,))
    two = without(one, set(), set(), joining=B)
    assert two is not None
    assert (two.chain, two.members()) == ((A, B), [A.id])
    three = without(two, set(), set(), joining=C)
    assert three is not None
    assert three.members() == [A.id, B.id, C.id]


def test_a_chain_without_a_replica_is_never_wanted() -> None:
    assert without(ABC, {A.id, B.id, C.id}, set()) is None


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (Configuration(9, (A, B, C), (A, B, C)), "does not follow"),
        (Configuration(8, (B, A), (A, B, C)), "change their order"),
        (Configuration(8, (D,), (A, B, C)), "no replica stays"),
        (Configuration(8, (D, A), (A, B, C)), "not at the end"),
        (Configuration(8, (A, D, Place(b"e" * 16)), (A, B, C)), "more than one"),
        (Configuration(8, (A,), ()), "a council has members"),
        (Configuration(8, (A,), (A, A, B)), "each once"),
        (Configuration(8, (Place(A.id, 2),), (A, B, C)), "no replica stays"),
    ],
)
def test_what_may_not_follow(new: Configuration, why: str) -> None:
    assert why in why_not_successor(ABC, new)
    with pytest.raises(ValueError, match="may not follow"):
        Campaign(ABC, new, (1, A.id), (), TIMING)


# -- votes and leases --------------------------------------------------------------------------------------------------


class Disk:
    """Votes that outlive a voter."""

    votes: Votes | None = None

    def load(self) -> Votes | None:
        return self.votes

    def save(self, votes: Votes) -> None:
        self.votes = votes


WITHOUT_C = Configuration(8, (A, B), (A, B, C))
WITHOUT_A = Configuration(8, (B, C), (A, B, C))
WITHOUT_C = Configuration(8, (A, B), (A, B, C))


def asked(voter: Voter, message: rm.Prepare | rm.Accept | rm.LeaseAsk, now: float) -> rm.AnyMessage | None:
    out = voter.handle(A.id, message, now)
    return out[0][1] if out else None


def test_a_vote_is_kept_and_given_once(tmp_path: Path) -> None:
    path = os.path.join(tmp_path, "votes")
    voter = Voter(B.id, VoteFile(path), TIMING, 0.0)
    voter.learn(ABC, -100.0)
    assert asked(voter, rm.Prepare(ABC, (2, A.id)), 0.0) == rm.Promised(8, (2, A.id), None, rm.NO_BALLOT)
    assert asked(voter, rm.Accept(ABC, (1, C.id), WITHOUT_A), 0.0) == rm.Declined(8, (2, A.id))
    assert asked(voter, rm.Accept(ABC, (2, A.id), WITHOUT_C), 0.0) == rm.Accepted(8, (2, A.id))
    again = Voter(B.id, VoteFile(path), TIMING, 50.0)
    assert asked(again, rm.Accept(ABC, (1, C.id), WITHOUT_A), 99.0) == rm.Declined(8, (2, A.id))
    assert asked(again, rm.Prepare(ABC, (3, C.id)), 99.0) == rm.Promised(8, (3, C.id), WITHOUT_C, (2, A.id))
    again.validate()


def test_votes_that_cannot_be_read_are_no_votes(tmp_path: Path) -> None:
    path = tmp_path / "votes"
    path.write_bytes(b"\xc1 nothing of the kind")
    with pytest.raises(ValueError, match="start this member with a new id"):
        VoteFile(str(path)).load()


def test_a_lease_is_waited_for_unless_its_holder_stays_or_has_ended() -> None:
    voter = Voter(B.id, NoVoteStore(), TIMING, 0.0)
    voter.learn(ABC, -100.0)
    granted = asked(voter, rm.LeaseAsk(7, C, 123.0), 10.0)
    assert granted == rm.LeaseGrant(7, 123.0)
    waits = asked(voter, rm.Accept(ABC, (1, A.id), WITHOUT_C), 10.1)
    assert isinstance(waits, rm.Declined)
    assert waits.wait == pytest.approx(TIMING.held() - 0.1)
    for message, now in [
        (rm.Accept(ABC, (1, A.id), WITHOUT_C, gone=(C,)), 10.1),
        (rm.Accept(ABC, (1, A.id), WITHOUT_A), 10.1),
        (rm.Accept(ABC, (1, A.id), WITHOUT_C), 10.0 + TIMING.held()),
    ]:
        voter = Voter(B.id, NoVoteStore(), TIMING, 0.0)
        voter.learn(ABC, -100.0)
        asked(voter, rm.LeaseAsk(7, C, 123.0), 10.0)
        assert isinstance(asked(voter, message, now), rm.Accepted)
        assert asked(voter, rm.LeaseAsk(7, C, 124.0), now) is None, "nobody leases from who has accepted the next epoch"


def test_a_voter_that_begins_again_waits_for_leases_that_it_may_have_granted() -> None:
    disk = Disk()
    Voter(B.id, disk, TIMING, 0.0).learn(ABC, 0.0)
    voter = Voter(B.id, disk, TIMING, 5.0)
    waits = asked(voter, rm.Accept(ABC, (1, A.id), WITHOUT_C), 5.1)
    assert isinstance(waits, rm.Declined)
    assert waits.wait > 0
    assert isinstance(asked(voter, rm.Accept(ABC, (1, A.id), WITHOUT_C), 5.0 + TIMING.held()), rm.Accepted)


def test_only_head_and_tail_get_leases_and_only_of_members_of_the_council() -> None:
    voter = Voter(B.id, NoVoteStore(), TIMING, 0.0)
    voter.learn(ABC, 0.0)
    assert asked(voter, rm.LeaseAsk(7, B, 1.0), 1.0) is None
    assert asked(voter, rm.LeaseAsk(7, Place(C.id, 2), 1.0), 1.0) is None, "another life of the tail"
    assert asked(voter, rm.LeaseAsk(6, C, 1.0), 1.0) == rm.Decided(ABC)
    stranger = Voter(D.id, NoVoteStore(), TIMING, 0.0)
    stranger.learn(ABC, 0.0)
    assert asked(stranger, rm.LeaseAsk(7, C, 1.0), 1.0) is None
    assert asked(stranger, rm.Prepare(ABC, (1, A.id)), 1.0) is None


def test_what_may_have_been_decided_is_proposed_again() -> None:
    campaign = Campaign(ABC, WITHOUT_C, (5, A.id), (C,), TIMING)
    campaign.start(0.0)
    campaign.handle(A.id, rm.Promised(8, (5, A.id), None, rm.NO_BALLOT), 0.0)
    out = campaign.handle(B.id, rm.Promised(8, (5, A.id), WITHOUT_A, (4, C.id)), 0.0)
    assert campaign.value == WITHOUT_A
    assert {message.proposal for _, message in out if isinstance(message, rm.Accept)} == {WITHOUT_A}


def test_nobody_is_left_out_before_those_that_stay_have_answered() -> None:
    campaign = Campaign(ABC, WITHOUT_C, (5, A.id), (), TIMING)
    assert {to for to, _ in campaign.start(0.0)} == {A.id, B.id, C.id}
    for member in (A, C):
        assert campaign.handle(member.id, rm.Promised(8, (5, A.id), None, rm.NO_BALLOT), 0.0) == []
    campaign.handle(A.id, rm.Here(8, (5, A.id), A.life), 0.0)
    assert campaign.handle(B.id, rm.Here(8, (5, A.id), B.life + 1), 0.0) == [], "another life of B"
    assert len(campaign.handle(B.id, rm.Here(8, (5, A.id), B.life), 0.0)) == 3


# -- sessions, messages, clients ---------------------------------------------------------------------------------------


def test_sessions_remember_answers_until_they_have_arrived() -> None:
    sessions = Sessions()
    sessions.note(b"c", 1, 1, 1, b"one")
    sessions.note(b"c", 3, 1, 2, b"three")
    assert sessions.find(b"c", 1) == (1, b"one")
    assert sessions.find(b"c", 2) is None
    sessions.note(b"c", 4, 3, 3, b"four")
    assert sessions.find(b"c", 1) == (0, b""), "it has been answered: nothing is to be done"
    copy = Sessions()
    copy.restore(sessions.encode())
    assert copy.find(b"c", 3) == (2, b"three")
    copy.validate(last=3)
    with pytest.raises(AssertionError, match="not there"):
        copy.validate(last=2)


def test_sessions_are_bounded() -> None:
    sessions = Sessions()
    for number in range(MAX_SESSIONS + 5):
        sessions.note(b"%d" % number, 1, 1, number + 1, b"")
    assert sessions.find(b"0", 1) is None
    assert sessions.find(b"5", 1) == (6, b"")
    sessions.validate(last=MAX_SESSIONS + 5)


MESSAGES: list[rm.AnyMessage] = [
    rm.Prepare(ABC, (3, A.id)),
    rm.Promised(8, (3, A.id), WITHOUT_C, (2, B.id)),
    rm.Here(8, (3, A.id), 9),
    rm.Accept(ABC, (3, A.id), WITHOUT_C, (C,)),
    rm.Accepted(8, (3, A.id)),
    rm.Declined(8, (3, A.id), 0.25),
    rm.Decided(ABC),
    rm.WhoServes(7),
    rm.LeaseAsk(7, C, 1.5),
    rm.LeaseGrant(7, 1.5),
    rm.Beat(7, 1),
    rm.Forward(7, 1, [rm.Entry(4, b"client", 2, 1, b"changes", b"answer")]),
    rm.Ack(7, 1, 4, 3),
    rm.Join(D, 0),
    rm.SnapshotPart(1, 4, 0, 2, b"rows"),
    rm.SnapshotAck(4, 1),
    rm.Write(2, 1, b"body"),
    rm.Read(3, b"body"),
    rm.Answer(3, b"body"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_survive_the_wire_and_damage_is_noticed(message: rm.AnyMessage) -> None:
    data = rm.encode(message)
    assert rm.decode(data) == message
    for cut in range(len(data)):
        with pytest.raises(rm.MalformedMessage):
            rm.decode(data[:cut])


def test_every_message_is_tried_here() -> None:
    assert {type(message) for message in MESSAGES} == set(rm.AnyMessage.__args__)  # type: ignore[attr-defined]


def test_a_client_asks_again_and_goes_where_the_store_went() -> None:
    router = Router([A.id], TIMING)
    first = router.ask(b"write", 0.0, write=True)
    assert router.out == [(A.id, rm.WhoServes(0))]
    router.out.clear()
    router.handle(rm.Decided(ABC), 0.001)
    assert router.out == [(A.id, rm.Write(first, first, b"write"))]
    second = router.ask(b"read", 0.002, write=False)
    assert router.out[1:] == [(C.id, rm.Read(second, b"read"))]
    router.out.clear()
    router.lost(A.id, 0.003)
    assert {to for to, _ in router.out} == {A.id, B.id, C.id}
    router.out.clear()
    router.handle(rm.Decided(WITHOUT_A), 0.004)
    assert router.out == [(B.id, rm.Write(first, first, b"write"))], "the tail is the same: the read is under way"
    router.out.clear()
    router.tick(1.0)
    assert {type(message) for _, message in router.out} >= {rm.Write, rm.Read}, "what is late is asked again"
    router.handle(rm.Answer(first, b"done"), 1.1)
    router.handle(rm.Answer(first, b"done"), 1.2)
    assert router.answers == [(first, b"done")]
    router.forget(second)
    assert router.pending == {}


def test_a_client_does_not_wait_for_what_a_new_tail_could_not_tell_it() -> None:
    """The tail answers writes, and cannot reach a client that has not spoken to it."""
    router = Router([A.id], TIMING)
    router.handle(rm.Decided(ABC), 0.0)
    long_after = 10 * TIMING.retry
    before = router.ask(b"before", long_after, write=True)
    router.out.clear()
    router.handle(rm.Decided(WITHOUT_C), long_after + 0.01)
    assert router.out == [(A.id, rm.Write(before, before, b"before"))], "the head answers what was carried out"
    after = router.ask(b"after", long_after + 0.02, write=True)
    router.out.clear()
    router.tick(long_after + 0.04)
    assert {number for _, message in router.out if isinstance(message, rm.Write) for number in [message.request]} == {
        before,
        after,
    }
    router.handle(rm.Answer(before, b"done"), long_after + 0.05)
    router.handle(rm.Answer(after, b"done"), long_after + 0.05)
    router.ask(b"much later", 3 * long_after, write=True)
    router.out.clear()
    router.tick(3 * long_after + TIMING.retry / 2)
    assert not any(isinstance(message, rm.Write) for _, message in router.out), "the tail knows it by then"


# -- the state ---------------------------------------------------------------------------------------------------------


def store(shards: int = 3) -> StoreState:
    return StoreState(GcsService(None, "/nowhere", shards=shards, limits=GcsLimits(ended_actors=3, events=4), epoch=1))


def key(number: int) -> bytes:
    return namespaced_key(b"", b"key%d" % number)


def actor(number: int, state: ActorState) -> bytes:
    row = ActorRow(bytes([number]) * 16, 1, state)
    return m.encode(m.Put(Table.ACTORS, key_of(row), encode_row(row)))


def requests() -> list[bytes]:
    made = [m.encode(m.Put(Table.KV, key(n % 20), b"v%d" % n, ABSENT if n % 3 == 0 else -1)) for n in range(60)]
    made += [m.encode(m.Delete(Table.KV, key(n))) for n in range(0, 30, 5)]
    made += [actor(n % 11, ActorState.DEAD if n % 2 else ActorState.ALIVE) for n in range(40)]
    made += [m.encode(m.DeletePrefix(Table.KV, namespaced_key(b"", b"key1"))), b"nonsense"]
    return made


def test_a_follower_that_applies_changes_has_the_rows_versions_and_numbers_of_the_head() -> None:
    head, follower = store(), store()
    for body in requests():
        changes, _ = head.execute(body)
        follower.apply(changes)
    assert head.service.image() == follower.service.image()
    follower.service.validate()
    assert sum(len(image.rows) for image in follower.service.image()) > 10


def test_a_snapshot_restores_everything_and_changes_go_on_from_there() -> None:
    head, joiner = store(), store()
    joiner.execute(m.encode(m.Put(Table.KV, key(99), b"an old row that must go")))
    made = requests()
    for body in made[:70]:
        head.execute(body)
    snapshot = head.snapshot()
    later = [head.execute(body)[0] for body in made[70:]]
    joiner.restore([snapshot.part(index) for index in range(snapshot.count)])
    joiner.service.validate()
    for changes in later:
        joiner.apply(changes)
    joiner.service.validate()
    assert joiner.service.image() == head.service.image()
    joiner.restore([])
    assert all(not image.rows for image in joiner.service.image())
    joiner.service.validate()


def test_large_snapshots_come_in_parts() -> None:
    head, joiner = store(), store()
    for number in range(40):
        head.execute(m.encode(m.Put(Table.KV, key(number), bytes(50_000))))
    snapshot = head.snapshot()
    parts = [snapshot.part(index) for index in range(snapshot.count)]
    assert len(parts) > 6
    assert max(len(part) for part in parts) < 400_000
    joiner.restore(parts)
    assert joiner.service.image() == head.service.image()


def test_a_snapshot_of_a_store_with_other_shards_is_refused() -> None:
    snapshot = store(3).snapshot()
    with pytest.raises(ValueError, match="this store has 2 shards"):
        store(2).restore([snapshot.part(index) for index in range(snapshot.count)])


def test_which_requests_change_something() -> None:
    assert is_write(m.encode(m.Put(Table.KV, key(1), b"")))
    assert is_write(m.encode(m.Delete(Table.KV, key(1))))
    assert not is_write(m.encode(m.Get(Table.KV, key(1))))
    assert not is_write(b"nonsense")
