"""One process of the replicated store: its replica, its vote, whom it misses, and what it proposes then.

Covers signs of life, leases for head and tail, who proposes when, and finding the newest configuration. Does not cover the
parts themselves (`chain`, `council`), clients (`client`), or sockets: whoever runs it hands in what has come (`handle`), what a
port has said (`refused`) and the time (`tick`), and sends what `flush` returns.

Missing. A process whose port refuses connections has ended: it is missing at once, and its lease need not be waited for. One
that is silent for `Timing.silent` is missing as well, though it may live, cut off or paused: then its lease is waited for. The
first one of chain and council that is not missing proposes at once, the others later, each `Timing.stagger` after the one
before: ballots make any number of proposers safe, and few of them quick. Replicas are added by the tail alone (`chain`).
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any, Final

from zray.gcs.replication.chain import Replica
from zray.gcs.replication.configuration import Configuration, Place, is_same, without
from zray.gcs.replication.council import ACCEPTING, BEATEN, DECIDED, Campaign, Voter, VoteStore
from zray.gcs.replication.faults import NO_CHAIN_FAULTS, ChainFault, ChainFaults
from zray.gcs.replication.messages import (
    Accept,
    Accepted,
    Ack,
    AnyMessage,
    Beat,
    Decided,
    Declined,
    Forward,
    Here,
    Join,
    LeaseAsk,
    LeaseGrant,
    Outgoing,
    Prepare,
    Promised,
    Read,
    SnapshotAck,
    SnapshotPart,
    WhoServes,
    Write,
)
from zray.gcs.replication.timing import NEVER, Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zray.gcs.replication.state import StateMachine

_KEPT_STAMPS: Final = 16
"""Requests for a lease whose answers still count."""


class Member:
    """One process's part."""

    def __init__(
        self,
        place: Place,
        state: StateMachine,
        store: VoteStore,
        timing: Timing,
        now: float,
        rng: Random,
        *,
        first: bool = False,
        contacts: Sequence[bytes] = (),
        wanted: int = 3,
        faults: ChainFaults = NO_CHAIN_FAULTS,
    ) -> None:
        """Begin.

        Args:
            place: this life of this process. A later life of the same id has a larger `life`.
            state: what is replicated; empty, except for the first.
            store: where votes are kept.
            timing: periods.
            now: seconds of the clock that all other calls use.
            rng: spreads proposals that meet.
            first: there is no configuration yet: this process is the whole chain and the whole council.
            contacts: ids of processes that may know the configuration.
            wanted: replicas that the chain shall have.
            faults: planted mistakes, for tests.
        """
        self.place = place
        self.timing = timing
        self._rng = rng
        self._faults = faults
        self._contacts = [contact for contact in contacts if contact != place.id]
        self.voter = Voter(place.id, store, timing, now, faults)
        self.replica = Replica(place, state, timing, wanted, faults)
        self.out: list[Outgoing] = []
        self._heard: dict[bytes, float] = {}
        self._lives: dict[bytes, int] = {}
        """Newest life that was heard of each process."""
        self._ended: dict[bytes, int] = {}
        """Newest life of each process that is known to have ended."""
        self._down: set[bytes] = set()
        """Processes whose port refused, and that were not heard in a later life."""
        self.campaign: Campaign | None = None
        self._round = 0
        self._propose_at = NEVER
        self._tries = 0
        self._next_beat = now
        self._next_lease = NEVER
        self._leased_last = now
        """When a lease was asked for that was granted, or the epoch began."""
        self._stamps: dict[float, set[bytes]] = {}
        self.failures = 0
        """Votes that could not be saved: nothing was answered then."""
        self._handlers: dict[type[AnyMessage], Callable[[bytes, Any, float], None]] = {
            Prepare: self._vote,
            Accept: self._vote,
            LeaseAsk: self._vote,
            Promised: self._campaigning,
            Accepted: self._campaigning,
            Declined: self._campaigning,
            Here: self._campaigning,
            Decided: lambda sender, message, now: self._learn(message.configuration, now),
            WhoServes: self._who_serves,
            LeaseGrant: self._granted,
            Beat: self._beat,
            Forward: self.replica.forward,
            Ack: self.replica.ack,
            Join: self._join,
            SnapshotPart: self.replica.snapshot_part,
            SnapshotAck: self.replica.snapshot_ack,
            Write: self.replica.write,
            Read: self.replica.read,
        }
        if first:
            self._learn(Configuration(1, (place,), (place,)), now)
        elif self.voter.decided is not None:
            self._learn(self.voter.decided, now)

    # -- what it knows -------------------------------------------------------------------------------------------------

    @property
    def configuration(self) -> Configuration | None:
        """The newest that is known here."""
        return self.replica.configuration

    def is_leased_head(self, now: float) -> bool:
        """Whether this process, and no other, may act as head of the cluster now."""
        return self.replica.is_head and self.replica.has_lease(now)

    def _learn(self, configuration: Configuration, now: float) -> None:
        try:
            self.voter.learn(configuration, now)
        except OSError:
            self.failures += 1
        if configuration.epoch <= self.replica.epoch:
            return
        self.campaign = None
        self._propose_at = NEVER
        self._tries = 0
        self._stamps.clear()
        self._leased_last = now
        for place in configuration.everybody():
            if place.id not in self._heard:
                self._heard[place.id] = now
            self._lives[place.id] = max(place.life, self._lives.get(place.id, -1))
        self.replica.adopt(configuration, now)
        self._next_lease = now if self.replica.is_head or self.replica.is_tail else NEVER
        self._next_beat = now

    # -- messages ------------------------------------------------------------------------------------------------------

    def handle(self, sender: bytes, message: AnyMessage, now: float) -> None:
        """Take what has come from a process or a client; `flush` says what to send."""
        if not isinstance(message, (Write, Read)):
            self._heard[sender] = now
        handler = self._handlers.get(type(message))
        if handler is not None:
            handler(sender, message, now)

    def append_own(self, changes: bytes) -> None:
        """At the head: rows were changed by the process itself."""
        self.replica.append_own(changes)

    def flush(self, now: float) -> list[Outgoing]:
        """Return what is to be sent: to be called after each batch of messages, and after `tick`."""
        self._consider(now)
        self._deliver_own(now)
        self.replica.flush(now)
        self._deliver_own(now)
        out, self.out = self.out, []
        return out

    def _deliver_own(self, now: float) -> None:
        """What this process says to itself needs no socket."""
        while True:
            self.out += self.replica.out
            self.replica.out.clear()
            own = [message for to, message in self.out if to == self.place.id]
            if not own:
                return
            self.out = [(to, message) for to, message in self.out if to != self.place.id]
            for message in own:
                self.handle(self.place.id, message, now)

    def _vote(self, sender: bytes, message: Prepare | Accept | LeaseAsk, now: float) -> None:
        if not isinstance(message, LeaseAsk):
            self._learn(message.base, now)
        if isinstance(message, Prepare):
            self.out.append((sender, Here(message.base.epoch + 1, message.ballot, self.place.life)))
        try:
            self.out += self.voter.handle(sender, message, now)
        except OSError:
            self.failures += 1

    def _who_serves(self, sender: bytes, message: WhoServes, now: float) -> None:
        configuration = self.configuration
        if configuration is not None and configuration.epoch > message.epoch:
            self.out.append((sender, Decided(configuration)))

    def _beat(self, sender: bytes, message: Beat, now: float) -> None:
        self._hear_life(sender, message.life)
        configuration = self.configuration
        epoch = 0 if configuration is None else configuration.epoch
        if message.epoch > epoch:
            self.out.append((sender, WhoServes(epoch)))
        elif message.epoch < epoch and configuration is not None:
            self.out.append((sender, Decided(configuration)))

    def _join(self, sender: bytes, message: Join, now: float) -> None:
        if message.place.id == sender:
            self._hear_life(sender, message.place.life)
            self.replica.join(sender, message, now)

    def _hear_life(self, process: bytes, life: int) -> None:
        """A process is there in some life: all earlier ones have ended."""
        if life > self._ended.get(process, -1):
            self._down.discard(process)
            self._lives[process] = max(life, self._lives.get(process, -1))
            self._ended[process] = max(life - 1, self._ended.get(process, -1))

    # -- leases --------------------------------------------------------------------------------------------------------

    def _granted(self, sender: bytes, message: LeaseGrant, now: float) -> None:
        configuration = self.configuration
        voters = self._stamps.get(message.stamp)
        if configuration is None or message.epoch != configuration.epoch or voters is None:
            return
        if sender in configuration.members():
            voters.add(sender)
            majority = 1 if ChainFault.MAJORITY_OF_ONE in self._faults else configuration.majority
            if len(voters) >= majority:
                until = message.stamp + self.timing.usable()
                if ChainFault.LEASE_DRIFT_IGNORED in self._faults:
                    until = now + self.timing.lease
                self.replica.lease_until = max(self.replica.lease_until, until)
                self._leased_last = max(self._leased_last, message.stamp)

    def _ask_for_lease(self, now: float) -> None:
        configuration = self.configuration
        assert configuration is not None
        self._next_lease = now + self.timing.lease / 4
        self._stamps[now] = set()
        while len(self._stamps) > _KEPT_STAMPS:
            del self._stamps[next(iter(self._stamps))]
        ask = LeaseAsk(configuration.epoch, self.place, now)
        self.out += [(member, ask) for member in configuration.members()]

    # -- who is missing ------------------------------------------------------------------------------------------------

    def refused(self, process: bytes, now: float) -> None:
        """Nobody listens any more where a process was: the life of it that was heard last has ended."""
        if process == self.place.id:
            return
        self._down.add(process)
        self._ended[process] = max(self._lives.get(process, 0), self._ended.get(process, -1))

    def _has_ended(self, place: Place) -> bool:
        return place.life <= self._ended.get(place.id, -1)

    def _is_silent(self, process: bytes, now: float) -> bool:
        return process != self.place.id and now - self._heard.get(process, now) >= self.timing.silent

    def missing_replicas(self, now: float) -> set[bytes]:
        """Ids of the replicas that have ended, or are silent."""
        configuration = self.configuration
        if configuration is None:
            return set()
        missing = {place.id for place in configuration.chain if self._is_silent(place.id, now)}
        if ChainFault.SAME_LIFE in self._faults:
            return missing | {place.id for place in configuration.chain if place.id in self._down}
        for place in configuration.chain:
            if self._has_ended(place):
                missing.add(place.id)
            if place.id == self.place.id and place.life != self.place.life:
                missing.add(place.id)  # a former life of this very process
        return missing

    def missing_members(self, now: float) -> set[bytes]:
        """Ids of members of the council that do not answer."""
        configuration = self.configuration
        if configuration is None:
            return set()
        return {name for name in configuration.members() if name in self._down or self._is_silent(name, now)}

    def _gone(self) -> tuple[Place, ...]:
        """Replicas whose lives are known to have ended."""
        configuration = self.configuration
        assert configuration is not None
        return tuple(
            [
                place
                for place in configuration.chain
                if self._has_ended(place) or (place.id == self.place.id and place.life < self.place.life)
            ]
        )

    # -- proposing -----------------------------------------------------------------------------------------------------

    def _consider(self, now: float) -> None:
        """Propose what should follow, if anything should, and it is this process's turn."""
        configuration = self.configuration
        if configuration is None or not self._takes_part(configuration):
            return
        if self.campaign is not None:
            self._go_on(self.campaign, now)
            return
        missing = self.missing_replicas(now)
        absent = self.missing_members(now)
        joiner = self.replica.joiner
        if joiner is not None and (self._has_ended(joiner.place) or self._is_silent(joiner.place.id, now)):
            self.replica.give_up_joiner([joiner.place.id])
        wanted = self._wanted(configuration, missing, absent, now)
        if wanted is None:
            self._propose_at = NEVER
        elif self._propose_at == NEVER:
            self._propose_at = now + self._rank(configuration, missing | absent) * self.timing.stagger
        if now >= self._propose_at and wanted is not None:
            self._propose(configuration, wanted, now)

    def _takes_part(self, configuration: Configuration) -> bool:
        return self.replica.index >= 0 or self.place.id in configuration.members()

    def _wanted(
        self, configuration: Configuration, missing: set[bytes], absent: set[bytes], now: float
    ) -> Configuration | None:
        joining = self.replica.ready_to_join()
        if joining is not None and (self._has_ended(joining) or self._is_silent(joining.id, now)):
            joining = None
        wanted = without(configuration, missing, absent, joining)
        if wanted is None:
            return None
        if is_same(wanted, configuration) and not self.replica.must_decide and not self._lacks_lease():
            return None
        return wanted

    def _lacks_lease(self) -> bool:
        """No lease for long: a member may have accepted a proposal whose proposer is gone. Deciding anything ends that."""
        return self._next_lease < NEVER and self._next_lease - self._leased_last > 4 * self.timing.held()

    def _rank(self, configuration: Configuration, missing: set[bytes]) -> int:
        if self.replica.must_decide or self.replica.ready_to_join() is not None:
            return 0
        present = [
            place.id for place in configuration.everybody() if place.id not in missing or place.id == self.place.id
        ]
        return present.index(self.place.id) if self.place.id in present else len(present)

    def _propose(self, configuration: Configuration, wanted: Configuration, now: float) -> None:
        self._round += 1
        self._propose_at = NEVER
        if configuration.position(wanted.tail) < 0 and self.replica.ready_to_join() is not None:
            self.replica.proposed()
        campaign = Campaign(
            configuration, wanted, (self._round, self.place.id), self._gone(), self.timing, self._faults
        )
        self.campaign = campaign
        self.out += campaign.start(now)

    def _campaigning(self, sender: bytes, message: Promised | Accepted | Declined | Here, now: float) -> None:
        if self.campaign is not None:
            self.out += self.campaign.handle(sender, message, now)
            self._end_campaign(now)

    def _go_on(self, campaign: Campaign, now: float) -> None:
        self.out += campaign.learn_gone(self._gone(), now)
        configuration = self.configuration
        if campaign.state == ACCEPTING or configuration is None:
            return
        wanted = self._wanted(configuration, self.missing_replicas(now), self.missing_members(now), now)
        if wanted is not None and not is_same(wanted, campaign.wanted):
            # Somebody else fell away before anything was proposed: begin again with what is known now.
            self.campaign = None
            self._propose_at = now

    def _end_campaign(self, now: float) -> None:
        campaign, configuration = self.campaign, self.configuration
        if campaign is None or configuration is None:
            return
        if campaign.state == DECIDED:
            value = campaign.value
            told = dict.fromkeys(place.id for place in [*value.everybody(), *configuration.everybody()])
            self.out += [(process, Decided(value)) for process in told if process != self.place.id]
            self._learn(value, now)
        elif campaign.state == BEATEN:
            self._round = max(self._round, campaign.highest[0])
            self._tries += 1
            self.campaign = None
            self._propose_at = now + self._rng.uniform(0.2, 1.0) * self.timing.stagger * min(self._tries, 8)

    # -- time ----------------------------------------------------------------------------------------------------------

    @property
    def wake_at(self) -> float:
        """When `tick` is wanted at the latest."""
        campaign = NEVER if self.campaign is None else self.campaign.wake_at
        return min(self._next_beat, self._next_lease, self._propose_at, campaign, self.replica.wake_at)

    def tick(self, now: float) -> None:
        """Beat, ask for the lease again, repeat what was not answered; `flush` says what to send."""
        configuration = self.configuration
        if now >= self._next_beat:
            self._next_beat = now + self.timing.beat
            self._say_that_it_lives(configuration)
        if now >= self._next_lease and configuration is not None:
            self._ask_for_lease(now)
        if self.campaign is not None:
            self.out += self.campaign.tick(now)
        self.replica.tick(now)

    def _say_that_it_lives(self, configuration: Configuration | None) -> None:
        if configuration is None:
            self.out += [(contact, WhoServes(0)) for contact in self._contacts]
            return
        beat = Beat(configuration.epoch, self.place.life)
        known = dict.fromkeys(place.id for place in configuration.everybody())
        joiner = self.replica.joiner
        if joiner is not None:
            known[joiner.place.id] = None
        self.out += [(process, beat) for process in known if process != self.place.id]

    # -- checking ------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise AssertionError naming what does not hold."""
        self.voter.validate()
        self.replica.validate()
        configuration, decided = self.configuration, self.voter.decided
        if configuration is not None and decided is not None and not self.failures:
            assert configuration == decided, "the replica and the vote are of different epochs"
