"""One replica of the chain: writes go in at the head, are passed on in order, and count when the tail has them.

Covers a replica's part in each configuration, the history and its acknowledgements, reads under a lease, requests that come
twice, and taking in a new replica. Does not cover which configuration there is (`council`), who suspects whom (`member`), or
what a request changes (`state`).

Theory (van Renesse and Schneider, OSDI 2004). The history is a sequence of entries 1, 2, 3 ...; H(r) is what replica r has of
it. Head r1 carries requests out and appends; each replica applies what comes from the one before it, in order, and passes it
on; the tail answers the client. So at any time, for the chain r1 .. rn of the newest epoch that any of them has adopted,

    H(rj) is a beginning of H(ri) for i < j           acknowledged == in H(tail), so every replica has it
    committed <= last for each replica                entries above `committed` are kept, to be sent again

A replica drops messages of any epoch but its own. When a configuration without some replica is adopted, each one left sends
its successor what that may lack, the new tail answers whatever its predecessor may have left unanswered, and the new head
takes new requests. Nothing acknowledged is lost: it is in the history of all, and one of them stays. Nothing can be
acknowledged in the old epoch any more: that needs every replica of it, and one of those has gone on.

A replica that was left out although it lives has rows that nobody else may have: nothing is added to them any more. It can
join again, and throws them away when it has got a whole snapshot.

Joining. The tail sends who joins a snapshot and then each entry that follows, while writes go on. When that has nearly
everything, the tail closes the *gate*: from then on it acknowledges nothing (and reads nothing out) that the new one has not.
When that has all that was acknowledged before the gate, the tail proposes the chain with it as the new tail, and keeps the gate
closed until the next epoch is decided, whatever it is. So the new tail has every acknowledged entry however late it learns
that it is one. Reads are answered by the tail alone, while it has a lease, and only when everything it has is committed.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Final

from zray.gcs.replication.configuration import Configuration, Place, is_same_life
from zray.gcs.replication.faults import NO_CHAIN_FAULTS, ChainFault, ChainFaults
from zray.gcs.replication.messages import (
    Ack,
    Answer,
    AnyMessage,
    Decided,
    Entry,
    Forward,
    Join,
    Outgoing,
    Read,
    SnapshotAck,
    SnapshotPart,
    WhoServes,
    Write,
)
from zray.gcs.replication.sessions import Sessions
from zray.gcs.replication.timing import NEVER, Timing

if TYPE_CHECKING:
    from zray.gcs.replication.state import SnapshotSource, StateMachine

PIECE: Final = 256
"""Entries in one frame, at most."""
PIECE_BYTES: Final = 1 << 20
WINDOW: Final = 4096
"""Entries a successor may be behind before it is sent no more."""
PARTS_AHEAD: Final = 4
"""Parts of a snapshot on their way at a time."""
NEARLY: Final = 64
"""Entries that who joins may lack when the gate is closed."""
TOLD: Final = 256
"""Clients that are told of a new configuration without asking."""
MOST_WAITING_READS: Final = 10_000


class Role(enum.Enum):
    """What a process is in the newest configuration that it knows."""

    OUTSIDE = "outside"
    HEAD = "head"
    MIDDLE = "middle"
    TAIL = "tail"
    ALONE = "alone"
    """Head and tail."""


class Downstream:
    """Whoever gets entries from this replica: its successor, or who joins."""

    __slots__ = ("pause", "place", "received", "resend_at", "sent")

    def __init__(self, place: Place, received: int) -> None:
        self.place = place
        self.received = received
        """It has told to have the entries up to here."""
        self.sent = received
        self.pause = 0.0
        self.resend_at = NEVER


class Joiner(Downstream):
    """Who joins."""

    __slots__ = ("acked_parts", "gated_at", "heard", "proposed", "sent_parts", "snapshot", "snapshot_number")

    def __init__(self, place: Place, snapshot: SnapshotSource | None, number: int, now: float) -> None:
        """`snapshot` None: it has everything up to entry `number`."""
        super().__init__(place, number)
        self.snapshot = snapshot
        """None: it has come."""
        self.snapshot_number = number
        self.sent_parts = 0
        self.acked_parts = 0
        self.heard = now
        self.gated_at = 0
        """Newest entry when the gate was closed, plus one; 0: it is open."""
        self.proposed = False


class Replica:
    """One process's copy of the state and its place in the chain. Methods append to `out` what is to be sent."""

    __slots__ = (
        "_ack_wanted",
        "_acked_up",
        "_assembled",
        "_assembling",
        "_downstream",
        "_faults",
        "_join_at",
        "_log",
        "_reads",
        "_repeats",
        "_timing",
        "committed",
        "configuration",
        "follows",
        "index",
        "joiner",
        "last",
        "lease_until",
        "out",
        "place",
        "sessions",
        "state",
        "wanted",
    )

    def __init__(
        self,
        place: Place,
        state: StateMachine,
        timing: Timing,
        wanted: int = 3,
        faults: ChainFaults = NO_CHAIN_FAULTS,
    ) -> None:
        """`wanted`: replicas up to which this one takes in others while it is the tail."""
        self.place = place
        self.state = state
        self.wanted = wanted
        self._timing = timing
        self._faults = faults
        self.out: list[Outgoing] = []
        self.configuration: Configuration | None = None
        """The newest that is known."""
        self.index = -1
        """Place in its chain; -1: none."""
        self.last = 0
        """Number of the newest entry that was applied."""
        self.committed = 0
        """Number of the newest entry that is known to be in every replica."""
        self.sessions = Sessions()
        self._log: deque[Entry] = deque()
        """The newest entries: at least those that are not committed, and those that somebody below lacks."""
        self._downstream: Downstream | None = None
        self.joiner: Joiner | None = None
        self.lease_until = -NEVER
        """Until then no other head or tail is there beside this one."""
        self._reads: deque[tuple[bytes, Read, int]] = deque()
        """Reads that wait: of whom, what, and the entry that has to be committed before."""
        self._repeats: dict[tuple[bytes, int], int] = {}
        """Requests that came again before their entries were committed: (client, request) -> entry."""
        self._acked_up = 0
        self._ack_wanted = False
        self.follows = False
        """Outside the chain: these rows are a beginning of the history, which entries can be added to."""
        self._assembling: tuple[bytes, int, int] | None = None
        """Snapshot that is coming: from whom, of which entry, how many parts."""
        self._assembled: dict[int, bytes] = {}
        self._join_at = 0.0

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def role(self) -> Role:
        """Its part in the chain."""
        if self.configuration is None or self.index < 0:
            return Role.OUTSIDE
        if len(self.configuration.chain) == 1:
            return Role.ALONE
        if self.index == 0:
            return Role.HEAD
        return Role.TAIL if self.index == len(self.configuration.chain) - 1 else Role.MIDDLE

    @property
    def is_head(self) -> bool:
        """Whether writes go in here."""
        return self.index == 0

    @property
    def is_tail(self) -> bool:
        """Whether reads are answered here."""
        return self.configuration is not None and self.index == len(self.configuration.chain) - 1 >= 0

    def has_lease(self, now: float) -> bool:
        """Whether it may act as if it alone were head, or tail."""
        return now < self.lease_until

    @property
    def epoch(self) -> int:
        """Of the newest configuration that is known; 0: none."""
        return 0 if self.configuration is None else self.configuration.epoch

    def _previous(self) -> Place | None:
        assert self.configuration is not None
        return self.configuration.chain[self.index - 1] if self.index > 0 else None

    def _send(self, to: bytes, message: AnyMessage) -> None:
        self.out.append((to, message))

    # -- configurations ------------------------------------------------------------------------------------------------

    def adopt(self, configuration: Configuration, now: float) -> None:
        """Take part in a newer configuration, or none in it."""
        assert configuration.epoch > self.epoch
        was = self.index
        before = self._downstream
        tail = None if self.configuration is None else self.configuration.tail
        self.configuration = configuration
        self.index = self._position(configuration)
        self.lease_until = -NEVER
        if tail != configuration.tail:
            self._assembling = None
            self._assembled = {}
        self._ack_wanted = False
        self._acked_up = 0
        self._join_at = now
        if self.index < 0:
            self._stand_outside(removed=was >= 0)
            return
        self.follows = False
        self._find_downstream(before, now)
        self._reads = deque(read for read in self._reads if self.is_tail)
        if ChainFault.ORDER_AFTER_ADOPTION in self._faults and self.is_head and was > 0:
            self.last = self.committed
        self._commit(self._may_commit())
        if self._downstream is not None:
            # Also when there is nothing to send: it answers how far it is.
            self._send_piece(self._downstream, now, probe=True)
        if self.is_head or self.is_tail:
            for client in self.sessions.recent(TOLD):
                self._send(client, Decided(configuration))

    def _position(self, configuration: Configuration) -> int:
        if ChainFault.SAME_LIFE in self._faults:
            return next((i for i, place in enumerate(configuration.chain) if place.id == self.place.id), -1)
        return configuration.position(self.place)

    def _stand_outside(self, *, removed: bool) -> None:
        self._downstream = None
        self.joiner = None
        self._reads.clear()
        self._repeats.clear()
        if removed:
            # Some of these rows nobody else may have: nothing can follow them, and a snapshot will take their place.
            self.follows = ChainFault.REMOVED_KEEPS_ROWS in self._faults

    def _empty(self) -> None:
        self.state.restore([])
        self.sessions.clear()
        self._log.clear()
        self._reads.clear()
        self.last = self.committed = 0
        self.follows = False

    def _find_downstream(self, before: Downstream | None, now: float) -> None:
        assert self.configuration is not None
        chain = self.configuration.chain
        self._downstream = None
        joiner = self.joiner
        if self.index + 1 < len(chain):
            successor = chain[self.index + 1]
            received = self.committed
            for known in (before, joiner):
                if known is not None and is_same_life(known.place, successor):
                    received = max(received, known.received)
            if ChainFault.UNSENT_AFTER_ADOPTION in self._faults:
                received = self.last
            self._downstream = Downstream(successor, received)
            self.joiner = None
        elif joiner is not None:
            # It goes on where it was; what was under way to it bears the old epoch, and is dropped there.
            joiner.proposed = False
            joiner.gated_at = 0
            joiner.sent = joiner.received
            joiner.sent_parts = joiner.acked_parts
            joiner.resend_at = now

    # -- messages ------------------------------------------------------------------------------------------------------

    def write(self, client: bytes, message: Write, now: float) -> None:
        """A client wants something changed."""
        if not self.is_head:
            self._send_elsewhere(client)
            return
        found = self.sessions.find(client, message.request)
        if found is not None and ChainFault.DUPLICATE_APPLIED not in self._faults:
            entry, answer = found
            if ChainFault.REPLY_LOST_ON_REPEAT in self._faults:
                return
            if 0 < entry <= self.committed:
                self._send(client, Answer(message.request, answer))
            elif entry > 0:
                self._repeats[client, message.request] = entry
            return
        changes, answer = self.state.execute(message.body)
        self._append(Entry(self.last + 1, client, message.request, message.floor, changes, answer))
        if ChainFault.ACK_BEFORE_TAIL in self._faults:
            self._send(client, Answer(message.request, answer))

    def append_own(self, changes: bytes) -> None:
        """The process has changed rows of its own accord (at the head only): nobody waits for an answer."""
        assert self.is_head, "only the head changes rows"
        self._append(Entry(self.last + 1, b"", 0, 0, changes, b""))

    def _append(self, entry: Entry) -> None:
        self.last = entry.number
        self._log.append(entry)
        if entry.client:
            self.sessions.note(entry.client, entry.request, entry.floor, entry.number, entry.answer)
        if self.is_tail:
            self._commit(self._may_commit())

    def forward(self, sender: bytes, message: Forward, now: float) -> None:
        """Entries from the replica before this one, or from the tail to who joins."""
        if not self._is_mine(sender, message, now):
            return
        dropped = not message.entries
        for entry in message.entries:
            if entry.number == self.last + 1 or (ChainFault.GAP_TAKEN in self._faults and entry.number > self.last):
                self.state.apply(entry.changes)
                self._append(entry)
            else:
                dropped = True
        while self.index < 0 and len(self._log) > PIECE:
            # Who joins sends nothing on. As the new tail it answers the newest, which the old one may have left to it.
            self._log.popleft()
        self._ack_wanted = self._ack_wanted or dropped or self.index < 0

    def _is_mine(self, sender: bytes, message: Forward, now: float) -> bool:
        if self.configuration is None:
            self._send(sender, WhoServes(0))
            return False
        if message.life != self.place.life:
            return False
        if message.epoch != self.epoch:
            self._mismatch(sender, message.epoch)
            return False
        if self.index < 0:
            return self.follows and sender == self.configuration.tail.id
        previous = self._previous()
        return previous is not None and previous.id == sender

    def _mismatch(self, sender: bytes, epoch: int) -> None:
        assert self.configuration is not None
        self._send(sender, WhoServes(self.epoch) if epoch > self.epoch else Decided(self.configuration))

    def ack(self, sender: bytes, message: Ack, now: float) -> None:
        """The next replica, or who joins, says how far it is."""
        if message.epoch != self.epoch:
            if self.configuration is not None:
                self._mismatch(sender, message.epoch)
            return
        joiner = self.joiner
        if joiner is not None and joiner.place.id == sender and joiner.place.life == message.life:
            joiner.heard = now
            self._take_ack(joiner, message.received, now)
            self._commit(self._may_commit())
        below = self._downstream
        if below is not None and below.place.id == sender and below.place.life == message.life:
            self._take_ack(below, message.received, now)
            self._commit(min(message.committed, self.last))

    def _take_ack(self, below: Downstream, received: int, now: float) -> None:
        if below.received < received <= self.last:
            below.received = received
            below.sent = max(below.sent, received)
            below.pause = self._timing.resend
            below.resend_at = now + below.pause  # nothing may be owed any more: `tick` sees to that

    # -- counting ------------------------------------------------------------------------------------------------------

    def _may_commit(self) -> int:
        """How far entries count, as far as it is this replica's to say."""
        if not self.is_tail:
            return self.committed
        if self._gate_closed and ChainFault.JOIN_NOT_GATED not in self._faults:
            assert self.joiner is not None
            return max(self.committed, min(self.last, self.joiner.received))
        return self.last

    @property
    def _gate_closed(self) -> bool:
        return self.joiner is not None and self.joiner.gated_at > 0

    def _commit(self, number: int) -> None:
        if number <= self.committed:
            return
        if self.is_tail:
            for entry in self._after(self.committed):
                if entry.number > number:
                    break
                if entry.client:
                    self._send(entry.client, Answer(entry.request, entry.answer))
        self.committed = number
        if self.is_head and self._repeats:
            self._answer_repeats()
        self._trim()

    def _answer_repeats(self) -> None:
        for (client, request), entry in list(self._repeats.items()):
            if entry <= self.committed:
                del self._repeats[client, request]
                found = self.sessions.find(client, request)
                if found is not None and found[0]:
                    self._send(client, Answer(request, found[1]))

    def _trim(self) -> None:
        keep = self.committed
        if self.joiner is not None:
            keep = min(keep, self.joiner.received)
        log = self._log
        while log and log[0].number <= keep:
            log.popleft()

    def _after(self, number: int) -> Iterable[Entry]:
        """Kept entries above a number."""
        skip = number + 1 - self._log[0].number if self._log else 0
        return islice(self._log, max(0, skip), None)

    # -- reads ---------------------------------------------------------------------------------------------------------

    def read(self, client: bytes, message: Read, now: float) -> None:
        """A client wants to know something. What is answered was the newest at some time after it asked."""
        if ChainFault.READ_AT_HEAD in self._faults and self.index >= 0:
            self._send(client, Answer(message.request, self.state.read(message.body)))
            return
        if not self.is_tail:
            self._send_elsewhere(client)
            return
        if self._may_read(self.last, now):
            self._send(client, Answer(message.request, self.state.read(message.body)))
        elif len(self._reads) < MOST_WAITING_READS:
            self._reads.append((client, message, self.last))

    def _may_read(self, number: int, now: float) -> bool:
        leased = self.has_lease(now) or ChainFault.READ_WITHOUT_LEASE in self._faults
        # The rows are those of all entries here: each of them must count, not only those there were when it was asked.
        return leased and self.committed == self.last and self.committed >= number

    def _serve_reads(self, now: float) -> None:
        while self._reads and self._may_read(self._reads[0][2], now):
            client, message, _ = self._reads.popleft()
            self._send(client, Answer(message.request, self.state.read(message.body)))

    def _send_elsewhere(self, client: bytes) -> None:
        if self.configuration is not None:
            self._send(client, Decided(self.configuration))

    # -- sending on ----------------------------------------------------------------------------------------------------

    def flush(self, now: float) -> None:
        """Send on what has come together: to be called after each batch of messages."""
        below = self._downstream
        if below is not None:
            self._send_new(below, now)
        joiner = self.joiner
        if joiner is not None:
            if joiner.snapshot is not None:
                self._send_parts(joiner, now)
            else:
                self._send_new(joiner, now)
            self._turn_gate(joiner)
        if self._reads:
            self._serve_reads(now)
        if self.configuration is not None and (self._ack_wanted or self.committed > self._acked_up):
            above = self._previous() if self.index >= 0 else self.configuration.tail if self.follows else None
            self._ack_wanted = False
            self._acked_up = self.committed
            if above is not None:
                self._send(above.id, Ack(self.epoch, self.place.life, self.last, self.committed))

    def _send_new(self, below: Downstream, now: float) -> None:
        while below.sent < min(self.last, below.received + WINDOW):
            self._send_piece(below, now)

    def _send_piece(self, below: Downstream, now: float, *, probe: bool = False) -> None:
        """Send the next entries; `probe`: a frame also when there are none."""
        piece: list[Entry] = []
        size = 0
        for entry in self._after(below.sent):
            if len(piece) == PIECE or (piece and size > PIECE_BYTES):
                break
            size += len(entry.changes) + len(entry.answer)
            piece.append(entry)
        if piece:
            below.sent = piece[-1].number
        elif not probe:
            below.sent = max(below.sent, self.last)
            return
        if below.resend_at == NEVER:
            below.pause = below.pause or self._timing.resend
            below.resend_at = now + below.pause
        self._send(below.place.id, Forward(self.epoch, below.place.life, piece))

    def _owes(self, below: Downstream) -> bool:
        """Whether somebody below has not told yet that it has everything, or the tail has it."""
        return below.received < self.last or (below is self._downstream and self.committed < self.last)

    def _resend(self, below: Downstream, now: float) -> None:
        below.pause = min(2 * (below.pause or self._timing.resend), 10 * self._timing.resend)
        below.resend_at = now + below.pause
        if isinstance(below, Joiner) and below.snapshot is not None:
            below.sent_parts = below.acked_parts
            self._send_parts(below, now)
            return
        below.sent = below.received
        self._send_piece(below, now, probe=True)

    # -- taking somebody in --------------------------------------------------------------------------------------------

    def join(self, sender: bytes, message: Join, now: float) -> None:
        """A process without a place in the chain wants one (at the tail)."""
        configuration = self.configuration
        if configuration is None:
            return
        if not self.is_tail:
            self._send(sender, Decided(configuration))
            return
        place, joiner = message.place, self.joiner
        named = any(
            place.id == other.id for other in configuration.chain
        )  # in a former life, too: that has to go first
        if len(configuration.chain) >= self.wanted or named:
            return
        if joiner is not None:
            if not is_same_life(joiner.place, place):
                if joiner.gated_at or now - joiner.heard < self._timing.silent:
                    return  # one after the other; and once the gate is closed, the council has the next word
            elif joiner.snapshot is not None or message.have >= joiner.received or joiner.gated_at:
                return  # it is being served; `tick` gives it up when it does not say that anything arrives
            elif now - joiner.heard < self._timing.silent:
                return
        if message.have and self._reaches(message.have):
            self.joiner = Joiner(place, None, message.have, now)
        else:
            self.joiner = Joiner(place, self._snapshot(), self.last, now)

    def _reaches(self, have: int) -> bool:
        """Whether everything after an entry is still in the log."""
        return have == self.last or (bool(self._log) and self._log[0].number <= have + 1 and have < self.last)

    def _snapshot(self) -> SnapshotSource:
        sessions = (
            Sessions().encode() if ChainFault.SESSIONS_NOT_IN_SNAPSHOT in self._faults else self.sessions.encode()
        )
        return _WithSessions(sessions, self.state.snapshot())

    def _send_parts(self, joiner: Joiner, now: float) -> None:
        assert joiner.snapshot is not None
        count = joiner.snapshot.count
        while joiner.sent_parts < min(count, joiner.acked_parts + PARTS_AHEAD):
            index, joiner.sent_parts = joiner.sent_parts, joiner.sent_parts + 1
            part = SnapshotPart(joiner.place.life, joiner.snapshot_number, index, count, joiner.snapshot.part(index))
            self._send(joiner.place.id, part)
            if joiner.resend_at == NEVER:
                joiner.pause = joiner.pause or self._timing.resend
                joiner.resend_at = now + joiner.pause

    def snapshot_ack(self, sender: bytes, message: SnapshotAck, now: float) -> None:
        """Who joins has got parts."""
        joiner = self.joiner
        if joiner is None or joiner.place.id != sender or message.number != joiner.snapshot_number:
            return
        joiner.heard = now
        if joiner.snapshot is not None:
            if message.parts > joiner.acked_parts:
                joiner.pause = self._timing.resend
                joiner.resend_at = now + joiner.pause
            # Fewer than before: it has looked to another tail meanwhile, and begun again.
            joiner.acked_parts = message.parts
            joiner.sent_parts = max(joiner.sent_parts, message.parts)
            if message.parts >= joiner.snapshot.count:
                joiner.snapshot = None
                self._trim()

    def _turn_gate(self, joiner: Joiner) -> None:
        if joiner.snapshot is not None or joiner.gated_at:
            return
        early = ChainFault.SNAPSHOT_WITHOUT_LOG in self._faults
        if self.last - joiner.received <= NEARLY or early:
            joiner.gated_at = 1 if early else self.last + 1

    def ready_to_join(self) -> Place | None:
        """Who joins, when it has everything that was acknowledged before the gate was closed: it can be proposed."""
        joiner = self.joiner
        if joiner is None or not joiner.gated_at or joiner.received < joiner.gated_at - 1:
            return None
        return joiner.place

    def proposed(self) -> None:
        """The chain with who joins was proposed: the gate stays closed until the next epoch is decided."""
        assert self.joiner is not None
        self.joiner.proposed = True

    @property
    def must_decide(self) -> bool:
        """Whether a proposal is out that keeps the gate closed."""
        return self.joiner is not None and self.joiner.proposed

    def give_up_joiner(self, ids: Iterable[bytes]) -> None:
        """Those processes are missing: do not wait for them, unless one was proposed."""
        joiner = self.joiner
        if joiner is not None and joiner.place.id in ids and not joiner.proposed:
            self.joiner = None
            self._commit(self._may_commit())

    # -- joining -------------------------------------------------------------------------------------------------------

    def ask_to_join(self, now: float) -> None:
        """Outside of a chain that could be longer: ask its tail."""
        configuration = self.configuration
        if configuration is None or self.index >= 0 or len(configuration.chain) >= self.wanted:
            self._join_at = NEVER
            return
        self._join_at = now + self._timing.resend
        self._send(configuration.tail.id, Join(self.place, self.last if self.follows else 0))

    def snapshot_part(self, sender: bytes, message: SnapshotPart, now: float) -> None:
        """A part of all rows, from the tail."""
        configuration = self.configuration
        if configuration is None or self.index >= 0 or message.life != self.place.life:
            return
        if sender != configuration.tail.id:
            return
        if self.follows and message.number <= self.last:
            self._send(sender, SnapshotAck(message.number, message.count))
            return
        key = (sender, message.number, message.count)
        if self._assembling != key:
            if self._assembling is not None and message.number < self._assembling[1]:
                return
            self._assembling = key
            self._assembled = {}
        self._assembled[message.index] = message.data
        got = 0
        while got in self._assembled:
            got += 1
        self._send(sender, SnapshotAck(message.number, got))
        if got == message.count:
            sessions, *parts = [self._assembled[index] for index in range(got)]
            self._empty()
            self.sessions.restore(sessions)
            self.state.restore(parts)
            self.last = self.committed = message.number
            self.follows = True
            self._assembling = None
            self._assembled = {}

    # -- time ----------------------------------------------------------------------------------------------------------

    @property
    def wake_at(self) -> float:
        """When `tick` is wanted."""
        below = [one.resend_at for one in (self._downstream, self.joiner) if one is not None]
        return min([NEVER, *below, self._join_at if self.configuration is not None and self.index < 0 else NEVER])

    def tick(self, now: float) -> None:
        """Send again what was not acknowledged."""
        joiner = self.joiner
        if joiner is not None and (joiner.snapshot is not None or self._owes(joiner)):
            if now - joiner.heard >= self._timing.silent and not joiner.proposed:
                # Nothing arrives there, although it may be heard. Writes must not wait for it; it can ask again.
                self.give_up_joiner([joiner.place.id])
        elif joiner is not None:
            joiner.heard = now
        for below in (self._downstream, self.joiner):
            if below is not None and now >= below.resend_at:
                waits = isinstance(below, Joiner) and below.snapshot is not None
                if waits or self._owes(below):
                    self._resend(below, now)
                else:
                    below.resend_at = NEVER
        if self.configuration is not None and self.index < 0 and now >= self._join_at:
            self.ask_to_join(now)

    # -- checking ------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise AssertionError naming what does not hold (module docstring)."""
        assert 0 <= self.committed <= self.last, f"committed {self.committed} of {self.last}"
        numbers = [entry.number for entry in self._log]
        assert numbers == list(range(self.last - len(numbers) + 1, self.last + 1)), "the log has a hole"
        if self.index >= 0:
            assert self.last - len(numbers) <= self.committed, "an entry that is not committed is not kept"
        below = self._downstream
        if below is not None:
            assert below.received <= self.last, "a successor has more than this replica"
            assert not self._owes(below) or below.resend_at < NEVER or below.sent < self.last, "nobody sends again"
        if self.is_tail and not self._gate_closed:
            assert self.committed == self.last, "the tail has entries that do not count"
        assert self.joiner is None or self.is_tail, "somebody joins elsewhere than at the tail"
        self.sessions.validate(self.last)


class _WithSessions:
    """A snapshot whose first part says which requests were carried out."""

    __slots__ = ("_sessions", "_state")

    def __init__(self, sessions: bytes, state: SnapshotSource) -> None:
        self._sessions = sessions
        self._state = state

    @property
    def count(self) -> int:
        return self._state.count + 1

    def part(self, index: int) -> bytes:
        return self._sessions if index == 0 else self._state.part(index - 1)
