"""Deciding the configuration of the next epoch: votes that are kept, leases that are waited for, and proposing.

Covers one member of a council (`Voter`) and one attempt to have something decided (`Campaign`). Does not cover who should
propose what and when (`member`), or what a configuration means (`chain`).

Theory. For each epoch there is one instance of Paxos (Lamport, Paxos Made Simple, 2001) whose acceptors are the council of
the epoch before; so two configurations of one epoch are never decided, whoever proposes, is killed, or comes back. A member
keeps, for the epoch after the newest that it knows to be decided:

    promised   highest ballot heard of: nothing lower is accepted any more
    accepted   (ballot, configuration) of the last proposal taken          accepted ballot <= promised

and saves both before it answers: a restarted member has the same votes, or must not have the same id.

Leases. A member that has accepted nothing for the next epoch may grant the head and the tail of the newest one a lease: for
`Timing.held()` it accepts no configuration without the holder, unless the holder is known to have ended. Holders need a
majority. So when a configuration without the holder is decided, some member of a majority for it was in the majority of
the lease, and has waited until it ran out: nobody serves beside its successor. (Gray and Cheriton, Leases, 1989.)

A holder that stays in the next configuration may not hear of it, and go on under its old lease; the members of the next council
may be others than those that granted it. So whoever learns a configuration takes each of its replicas for the holder of a
lease that was granted just now: none of an older epoch can be younger. What was granted is not saved either: a member that
is started again accepts nothing without all replicas for as long as any lease could still last.
"""

from __future__ import annotations

from typing import Final, Protocol

import msgspec

from zray.gcs.replication.configuration import Configuration, Place, is_same_life, why_not_successor
from zray.gcs.replication.faults import NO_CHAIN_FAULTS, ChainFault, ChainFaults
from zray.gcs.replication.messages import (
    NO_BALLOT,
    Accept,
    Accepted,
    AnyMessage,
    Ballot,
    Decided,
    Declined,
    Here,
    LeaseAsk,
    LeaseGrant,
    Outgoing,
    Prepare,
    Promised,
)
from zray.gcs.replication.timing import NEVER, Timing


class Votes(msgspec.Struct, frozen=True, array_like=True):
    """What a member must not forget."""

    decided: Configuration | None = None
    """The newest that it knows; what follows is for the epoch after it."""
    promised: Ballot = NO_BALLOT
    accepted_ballot: Ballot = NO_BALLOT
    accepted: Configuration | None = None


class VoteStore(Protocol):
    """Where votes outlive their process."""

    def load(self) -> Votes | None:
        """Return what was saved last; None: nothing ever."""
        ...

    def save(self, votes: Votes) -> None:
        """Keep votes: when this returns, `load` gives them, whatever happens. OSError: they are not kept."""
        ...


class NoVoteStore:
    """For members whose id ends with their process, as that of a node does: nobody ever votes again under it."""

    __slots__ = ()

    def load(self) -> Votes | None:
        """Nothing."""
        return None

    def save(self, votes: Votes) -> None:
        """Do nothing."""


class Voter:
    """A process as a member of councils. It answers only where it is one."""

    __slots__ = ("_faults", "_grants", "_lease_pause", "_quiet_until", "_store", "_timing", "id", "votes")

    def __init__(
        self, own: bytes, store: VoteStore, timing: Timing, now: float, faults: ChainFaults = NO_CHAIN_FAULTS
    ) -> None:
        self.id = own
        self._store = store
        self._timing = timing
        self._faults = faults
        saved = None if ChainFault.VOTE_FORGOTTEN_ON_RESTART in faults else store.load()
        self.votes = saved or Votes()
        self._quiet_until = -NEVER
        """Leases that a former life of this member has granted may last until then."""
        if saved is not None and ChainFault.LEASE_FORGOTTEN_ON_RESTART not in faults:
            self._quiet_until = now + timing.held()
        self._grants: dict[tuple[bytes, int], float] = {}
        """Leases: holder (id, life) and until when."""
        self._lease_pause = -NEVER
        """Somebody is about to propose: no leases until then, or it might wait for them for ever."""

    @property
    def decided(self) -> Configuration | None:
        """The newest configuration that is known here."""
        return self.votes.decided

    def _change(self, **changes: object) -> None:
        votes = msgspec.structs.replace(self.votes, **changes)
        self._store.save(votes)
        self.votes = votes

    def learn(self, configuration: Configuration, now: float) -> bool:
        """Take note of a decision; return whether it is news. OSError: it could not be saved; nothing has changed."""
        known = self.votes.decided
        if known is not None and known.epoch >= configuration.epoch:
            assert known.epoch > configuration.epoch or known == configuration, (
                f"epoch {known.epoch} has two configurations"
            )
            return False
        self._store.save(votes := Votes(configuration))
        self.votes = votes
        # Whoever is not in it has no lease any more: that was waited for.
        self._grants = {(place.id, place.life): now + self._timing.held() for place in configuration.chain}
        if ChainFault.LEASES_END_WITH_EPOCH in self._faults:
            self._grants.clear()
        self._lease_pause = -NEVER
        return True

    def _is_member(self, base: Configuration) -> bool:
        return self.votes.decided == base and self.id in base.members()

    def handle(self, sender: bytes, message: Prepare | Accept | LeaseAsk, now: float) -> list[Outgoing]:
        """Answer who proposes, or who asks for a lease. OSError: votes could not be saved; nothing has changed."""
        answer = self._answer(message, now)
        return [] if answer is None else [(sender, answer)]

    def _answer(self, message: Prepare | Accept | LeaseAsk, now: float) -> AnyMessage | None:
        if isinstance(message, LeaseAsk):
            return self._grant(message, now)
        self.learn(message.base, now)
        decided = self.votes.decided
        assert decided is not None
        if decided.epoch > message.base.epoch:
            return Decided(decided)
        if not self._is_member(message.base):
            return None
        epoch = message.base.epoch + 1
        if message.ballot < self.votes.promised:
            return Declined(epoch, self.votes.promised)
        if isinstance(message, Prepare):
            if message.ballot > self.votes.promised:
                self._change(promised=message.ballot)
            self._lease_pause = now + 2 * self._timing.held()
            return Promised(epoch, message.ballot, self.votes.accepted, self.votes.accepted_ballot)
        return self._accept(message, now)

    def _accept(self, message: Accept, now: float) -> AnyMessage | None:
        proposal = message.proposal
        if why_not_successor(message.base, proposal):
            return None
        wait = self._lease_left(proposal, message.gone, now)
        if wait > 0:
            return Declined(proposal.epoch, message.ballot, wait)
        self._change(promised=message.ballot, accepted_ballot=message.ballot, accepted=proposal)
        return Accepted(proposal.epoch, message.ballot)

    # -- leases --------------------------------------------------------------------------------------------------------

    def _lease_left(self, proposal: Configuration, gone: tuple[Place, ...], now: float) -> float:
        """Seconds for which some holder may go on that the proposal removes."""
        if ChainFault.LEASE_NOT_WAITED_OUT in self._faults:
            return 0.0
        ended = {(place.id, place.life) for place in gone}
        stays = {(place.id, place.life) for place in proposal.chain}
        until = [end for holder, end in self._grants.items() if holder not in ended and holder not in stays]
        base = self.votes.decided
        assert base is not None
        if any((place.id, place.life) not in ended | stays for place in base.chain):
            until.append(self._quiet_until)
        return max([0.0, *(end - now for end in until)])

    def _grant(self, message: LeaseAsk, now: float) -> AnyMessage | None:
        decided = self.votes.decided
        if decided is None:
            return None
        if decided.epoch > message.epoch:
            fenced = ChainFault.FENCED_HOLDER_LEASED not in self._faults
            return Decided(decided) if fenced else LeaseGrant(message.epoch, message.stamp)
        if decided.epoch < message.epoch or not self._is_member(decided):
            return None
        holder = message.holder
        serves = any(is_same_life(holder, place) for place in (decided.head, decided.tail))
        if not serves or self.votes.accepted is not None or now < self._lease_pause:
            return None
        self._grants[holder.id, holder.life] = now + self._timing.held()
        return LeaseGrant(message.epoch, message.stamp)

    def validate(self) -> None:
        """Raise AssertionError when the votes contradict one another."""
        votes = self.votes
        assert votes.accepted_ballot <= votes.promised, "accepted below what was promised"
        assert (votes.accepted is None) == (votes.accepted_ballot == NO_BALLOT), "a ballot without a configuration"
        if votes.accepted is not None:
            assert votes.decided is not None, "accepted without knowing what came before"
            assert not why_not_successor(votes.decided, votes.accepted), "accepted what may not follow"


PREPARING: Final = "preparing"
ACCEPTING: Final = "accepting"
DECIDED: Final = "decided"
BEATEN: Final = "beaten"


class Campaign:
    """One attempt to have a configuration decided. When somebody else's is, that ends it as well.

    Nothing is proposed before each replica that is to stay has said that it is there, in answer to this very attempt: who
    proposes may not know yet that one has ended, and leave out the only other one that has the rows, for being silent.
    """

    __slots__ = (
        "_accepted",
        "_adopted",
        "_base",
        "_faults",
        "_here",
        "_promised",
        "_resend_at",
        "_timing",
        "_waiting",
        "ballot",
        "gone",
        "highest",
        "state",
        "value",
        "wanted",
    )

    def __init__(
        self,
        base: Configuration,
        wanted: Configuration,
        ballot: Ballot,
        gone: tuple[Place, ...],
        timing: Timing,
        faults: ChainFaults = NO_CHAIN_FAULTS,
    ) -> None:
        """`gone`: lives that are known to have ended. Raises ValueError when `wanted` may not follow `base`."""
        broken = why_not_successor(base, wanted)
        if broken:
            raise ValueError(f"{wanted} may not follow {base}: {broken}")
        self._base = base
        self._timing = timing
        self._faults = faults
        self.ballot = ballot
        self.gone = gone
        self.highest = ballot
        """Highest ballot heard of."""
        self.wanted = wanted
        self.value = wanted
        """What is proposed: `wanted`, or what a member has accepted before."""
        self.state = PREPARING
        self._adopted = False
        """The value is somebody else's."""
        self._here: set[tuple[bytes, int]] = set()
        """Replicas, as (id, life), that live."""
        self._promised: dict[bytes, Ballot] = {}
        self._accepted: set[bytes] = set()
        self._waiting: dict[bytes, float] = {}
        """Members for which a lease has to run out, and when they are asked again."""
        self._resend_at = NEVER

    @property
    def _majority(self) -> int:
        return 1 if ChainFault.MAJORITY_OF_ONE in self._faults else self._base.majority

    def start(self, now: float) -> list[Outgoing]:
        """Ask the council."""
        self._resend_at = now + self._timing.resend
        return self._prepare()

    def _prepare(self) -> list[Outgoing]:
        lacking = [member for member in self._base.members() if member not in self._promised]
        lacking += [place.id for place in self.value.chain if not self._is_here(place)]
        message = Prepare(self._base, self.ballot)
        return [(process, message) for process in dict.fromkeys(lacking)]

    def _is_here(self, place: Place) -> bool:
        return (place.id, place.life) in self._here

    def handle(self, sender: bytes, message: Promised | Accepted | Declined | Here, now: float) -> list[Outgoing]:
        """Take a member's answer; `state` tells whether it is over."""
        if message.epoch != self._base.epoch + 1:
            return []
        if isinstance(message, Here):
            if message.ballot == self.ballot:
                self._here.add((sender, message.life))
            return self._try_to_propose(now)
        if sender not in self._base.members():
            return []
        if isinstance(message, Declined):
            if message.ballot > self.ballot:
                self.highest = max(self.highest, message.ballot)
                self.state = BEATEN
            elif message.wait > 0 and self.state == ACCEPTING and message.ballot == self.ballot:
                self._waiting[sender] = now + message.wait
            return []
        if message.ballot != self.ballot:
            return []
        if isinstance(message, Promised):
            return self._take_promise(sender, message, now)
        if self.state == ACCEPTING:
            self._accepted.add(sender)
            if len(self._accepted) >= self._majority:
                self.state = DECIDED
        return []

    def _take_promise(self, sender: bytes, message: Promised, now: float) -> list[Outgoing]:
        if self.state != PREPARING:
            return []
        newest = max(self._promised.values(), default=NO_BALLOT)
        ignored = ChainFault.ACCEPTED_VALUE_IGNORED in self._faults
        if message.accepted is not None and message.accepted_ballot > newest and not ignored:
            # Whatever may have been decided already is what the highest accepted ballot of a majority names.
            self.value = message.accepted
            self._adopted = True
        self._promised[sender] = message.accepted_ballot
        return self._try_to_propose(now)

    def _try_to_propose(self, now: float) -> list[Outgoing]:
        if self.state != PREPARING or len(self._promised) < self._majority:
            return []
        unheard = not all(self._is_here(place) for place in self.value.chain)
        if unheard and not self._adopted and ChainFault.DEAD_REPLICA_KEPT not in self._faults:
            return []
        self.state = ACCEPTING
        self._resend_at = now + self._timing.resend
        return [(member, self._proposal()) for member in self._base.members()]

    def _proposal(self) -> Accept:
        return Accept(self._base, self.ballot, self.value, self.gone)

    @property
    def wake_at(self) -> float:
        """When `tick` is wanted."""
        return min(self._resend_at, *self._waiting.values(), NEVER)

    def tick(self, now: float) -> list[Outgoing]:
        """Ask again who did not answer, and who had to wait for a lease."""
        out: list[Outgoing] = []
        due = [member for member, at in self._waiting.items() if now >= at]
        for member in due:
            del self._waiting[member]
        if now >= self._resend_at:
            self._resend_at = now + self._timing.resend
            if self.state == PREPARING:
                out += self._prepare()
            for member in self._base.members():
                if self.state == ACCEPTING and member not in self._accepted and member not in self._waiting:
                    due.append(member)
        out += [(member, self._proposal()) for member in dict.fromkeys(due) if self.state == ACCEPTING]
        return out

    def learn_gone(self, gone: tuple[Place, ...], now: float) -> list[Outgoing]:
        """More lives are known to have ended: ask those again who wait for their leases."""
        if gone == self.gone:
            return []
        self.gone = gone
        if self.state != ACCEPTING:
            return []
        waiting, self._waiting = list(self._waiting), {}
        return [(member, self._proposal()) for member in waiting]
