"""Who belongs to the cluster: nodes join, are heard of, fall silent, die, and never come back under the same id.

Covers the decisions of the head about other nodes (`Membership`) and what every other node knows of them (`Neighbours`).
Does not cover how frames travel (`reliable`, `links`) or what becomes of a dead node's tasks and objects (the scheduler).

A node is one life of one broker: it draws its id when it starts. Rules:

    joining --version fits--> ALIVE <--heard--- SILENT      nothing new is placed on a silent node
                                |--SILENT_S-->    |
                                |                 |--DEAD_S--> DEAD     for ever: its late messages are answered with
                                |--its port refuses, or it leaves----^  "you are dead" and change nothing

A process that is paused keeps its port: connections to it are still taken by its kernel, so it is SILENT, not DEAD, and
goes on where it was when it is heard again before DEAD_S. Members of a head that has begun another life are *awaited*: SILENT, for as
long as it was told, until they come back by themselves. A port that *refuses* has no process behind it: that node is dead
at once, as far as the head can be reached by whoever saw it. Who ends while the head cannot be reached is seen by nobody, and says nothing
when it can be: so the head looks at the ports of silent members again and again (`to_look_at`).
"""

from __future__ import annotations

import collections
import enum
import math
from typing import Final

import msgspec

BEAT_S: Final = 0.25
"""Seconds between two beats of a node."""
BEATS_A_SECOND: Final = 3000
"""Beats that the head takes, and reports that it sends, at most: they cost it about 60 microseconds a pair, so a fifth of a core."""
LOOK_S: Final = 1.0
"""Seconds between two looks of the head at the port of a silent node."""
LOOKS_AT_ONCE: Final = 16
"""Ports that it looks at with one beat: when it was the head that was cut off, all nodes are silent."""
LOADS_AT_ONCE: Final = 64
"""Loads in one report. More would be out of date before they are used: who places a task draws among those that it has heard of."""
SILENT_S: Final = 2.0
"""Without a beat for so long (four beats, if that is longer) a node gets nothing new."""
DEAD_S: Final = 30.0
"""Without a beat for so long it is dead: half again as long as the longest pause that should not matter (20 s)."""
DEAD_CLIENTS: Final = 1000
"""Dead clients that are remembered: they come and go with every program. (One that comes back later still is a stranger, whose messages the head
neither takes nor passes on.)"""
NEVER: Final = float("inf")


class NodeInfo(msgspec.Struct, frozen=True, array_like=True):
    """What a node says of itself when it joins."""

    id: bytes
    """16 bytes."""
    address: str
    """host:port of its broker; empty when nobody can connect to it: it is outside of the cluster, and reaches the head only."""
    hostname: str
    pid: int
    """Of its broker."""
    resources: dict[str, float]
    labels: dict[str, str]
    version: str
    """Of zray: major.minor must be that of the head."""
    python: str
    """major.minor, which must be that of the head: pickled code differs between them."""
    session: str = ""
    directory: str = ""
    """Runtime directory, for processes of the same machine."""
    serves_one: bool = False
    """It is the scheduler of one driver's job, and ends with it."""

    @property
    def is_client(self) -> bool:
        """Whether it only connects a driver, from outside the cluster or as the scheduler of its job: no place for tasks."""
        return self.serves_one or not self.address


class NodeLoad(msgspec.Struct, frozen=True, array_like=True):
    """What a node says of itself with every beat."""

    available: dict[str, float]
    queued: int = 0
    """Tasks that wait for a worker there."""
    running: int = 0
    task_micros: int = 0
    """Average run time of its tasks; 0: none has ended yet."""


def beat_seconds(nodes: int) -> float:
    """Return the seconds between two beats of each node in a cluster of so many: a multiple of `BEAT_S`."""
    return BEAT_S * max(1, math.ceil(nodes / BEATS_A_SECOND / BEAT_S))


class State(enum.IntEnum):
    """Of a member."""

    ALIVE = 1
    SILENT = 2
    DEAD = 3


class Change(msgspec.Struct, frozen=True):
    """A member's state is another one now."""

    node: bytes
    state: State
    reason: str = ""


class CannotJoin(Exception):
    """The cluster does not take this node, or is not there; the text says why."""


class Refusal(Exception):
    """A node may not join; the text says why and what would mend it."""


class Member:
    """A node, as the head sees it."""

    __slots__ = ("awaited", "heard", "info", "load", "looked", "reason", "state")

    def __init__(self, info: NodeInfo, now: float) -> None:
        self.info = info
        self.load = NodeLoad(dict(info.resources))
        self.state = State.ALIVE
        self.heard = now
        self.reason = ""
        self.awaited = 0.0
        """Seconds for which a member of the head's last life may take to come back; 0: it is there."""
        self.looked = 0.0
        """When the head last looked at its port because it was silent."""

    def __repr__(self) -> str:
        return f"<Member {self.info.id.hex()[:8]} {self.state.name} at {self.info.address or 'no address'}>"


class Membership:
    """The head's decisions. Methods return the changes that everybody must hear of, in order."""

    __slots__ = ("_dead_after", "_dead_clients", "_head", "_silent_after", "members")

    def __init__(self, head: NodeInfo, dead_after: float = DEAD_S) -> None:
        """The head is a member that is never silent to itself. `dead_after`: seconds of silence."""
        self._head = head
        self._dead_after = dead_after
        self._silent_after = min(SILENT_S, dead_after / 2)
        self.members: dict[bytes, Member] = {head.id: Member(head, 0.0)}
        self._dead_clients: collections.deque[bytes] = collections.deque()

    def join(self, info: NodeInfo, now: float) -> list[Change]:
        """Admit a node. One that is a member already (its answer was lost) is admitted again.

        Raises:
            Refusal: it does not fit this cluster, or was declared dead.
        """
        if len(info.id) != 16:
            raise Refusal("a node's id has 16 bytes")
        member = self.members.get(info.id)
        if member is not None:
            if member.state == State.DEAD:
                raise Refusal(f"this node was declared dead ({member.reason}): start it again")
            return self.heard(info.id, None, now)
        self._check(info)
        self.members[info.id] = Member(info, now)
        return [Change(info.id, State.ALIVE)]

    def _check(self, info: NodeInfo) -> None:
        """Refusal when a node does not fit the head."""
        head = self._head
        if _minor(info.version) != _minor(head.version):
            raise Refusal(
                f"the cluster runs zray {head.version}, this node {info.version}: install {head.version} on it"
            )
        if _minor(info.python) != _minor(head.python):
            raise Refusal(
                f"the cluster runs Python {head.python}, this node {info.python}: start it with Python {head.python}"
            )

    def expect(self, info: NodeInfo, patience: float, now: float) -> bool:
        """A member of this head's last life, which should come back within `patience` seconds. False when it is known already."""
        if info.id in self.members:
            return False
        member = self.members[info.id] = Member(info, now)
        member.state = State.SILENT
        member.reason = "it has not come back to the head yet"
        member.awaited = patience
        return True

    def rejoin(self, info: NodeInfo, now: float) -> list[Change]:
        """Take back a member that had lost this head, or its last life.

        Raises:
            Refusal: it was declared dead, or does not fit (the head was started anew with another version).
        """
        member = self.members.get(info.id)
        if member is None:
            return self.join(info, now)
        if member.state == State.DEAD:
            raise Refusal(f"this node was declared dead ({member.reason}): start it again")
        self._check(info)
        member.info = info
        return self.heard(info.id, None, now)

    def paused(self, seconds: float) -> None:
        """The head itself did not run for so long: that is nobody's silence."""
        for member in self.members.values():
            member.heard += seconds

    def heard(self, node: bytes, load: NodeLoad | None, now: float) -> list[Change]:
        """A beat, or any other sign of life. Of the dead and of strangers nothing is heard."""
        member = self.members.get(node)
        if member is None or member.state == State.DEAD:
            return []
        member.heard = now
        member.awaited = 0.0
        if load is not None:
            member.load = load
        if member.state == State.SILENT:
            member.state = State.ALIVE
            return [Change(node, State.ALIVE)]
        return []

    def is_dead(self, node: bytes) -> bool:
        """Whether messages of this node must change nothing because it was declared dead."""
        member = self.members.get(node)
        return member is not None and member.state == State.DEAD

    def why_not_heard(self, node: bytes) -> str:
        """Why messages of this node must change nothing; empty: it is a member."""
        member = self.members.get(node)
        if member is None:
            return "this node is no member of the cluster: start it again"
        return f"this node was declared dead: {member.reason}" if member.state == State.DEAD else ""

    def end(self, node: bytes, reason: str) -> list[Change]:
        """It has left, or its port refuses connections, or somebody removes it."""
        member = self.members.get(node)
        if member is None or member.state == State.DEAD or node == self._head.id:
            return []
        member.state = State.DEAD
        member.reason = reason
        if member.info.is_client:
            self._dead_clients.append(node)
            if len(self._dead_clients) > DEAD_CLIENTS:
                del self.members[self._dead_clients.popleft()]
        return [Change(node, State.DEAD, reason)]

    def tick(self, now: float) -> list[Change]:
        """See who has fallen silent, and who for too long."""
        changes: list[Change] = []
        silent_after = max(self._silent_after, 4 * beat_seconds(len(self.members)))
        for node, member in list(self.members.items()):
            if node == self._head.id:
                member.heard = now
                continue
            silence = now - member.heard
            if member.state == State.ALIVE and silence >= silent_after:
                member.state = State.SILENT
                changes.append(Change(node, State.SILENT, f"silent for {silence:.1f} s"))
            if member.state == State.SILENT and silence >= (member.awaited or self._dead_after):
                changes += self.end(node, f"not heard of for {silence:.1f} s")
        return changes

    def to_look_at(self, now: float) -> list[bytes]:
        """Silent members at whose ports the head should look now, who was not looked at for longest first. (Nobody can connect to a client;
        how those that are awaited are called is another matter.)"""
        due = [
            member
            for member in self.members.values()
            if member.state == State.SILENT
            and not member.awaited
            and not member.info.is_client
            and now - member.looked >= LOOK_S
        ]
        due.sort(key=lambda member: member.looked)
        del due[LOOKS_AT_ONCE:]
        for member in due:
            member.looked = now
        return [member.info.id for member in due]

    def present(self) -> list[Member]:
        """Those that are not dead, in the order in which they joined."""
        return [member for member in self.members.values() if member.state != State.DEAD]


class LoadReports:
    """Which loads the head tells whom. In a small cluster everybody hears of all, with every beat. In a large one that would be a number of
    loads that grows with the square of the nodes: there each node hears of a window of `LOADS_AT_ONCE` at a time, most of them loads that
    have changed, and the windows go round.

    Reports may be lost, so loads that have not changed take turns in what room is left (a quarter at least): whoever missed one hears it again.
    """

    __slots__ = ("_changed", "_resting", "_round", "_windows")

    def __init__(self) -> None:
        self._changed: dict[bytes, None] = {}
        self._resting: collections.deque[bytes] = collections.deque()
        """Everybody, in the order in which they are told of without having changed."""
        self._windows: list[list[bytes]] = []
        self._round = 0

    def changed(self, node: bytes) -> None:
        """A node says something else than before (or is new)."""
        self._changed[node] = None

    def windows(self, present: list[bytes]) -> list[list[bytes]]:
        """Return the windows to be told now, for `present`, the nodes that are there: the k-th node is told the window with index k modulo
        their number."""
        if len(present) <= LOADS_AT_ONCE:
            self._changed.clear()
            return [present]
        if self._round >= len(self._windows):
            self._windows, self._round = self._new_windows(present), 0
        turn = self._round
        self._round += 1
        there = set(present)
        windows = [[node for node in window if node in there] for window in self._windows]
        return windows[turn:] + windows[:turn]

    def _new_windows(self, present: list[bytes]) -> list[list[bytes]]:
        there = set(present)
        fresh = [node for node in self._changed if node in there]
        self._changed.clear()
        if there != set(self._resting):
            self._resting = collections.deque(present)
        room = LOADS_AT_ONCE - LOADS_AT_ONCE // 4
        windows = [fresh[at : at + room] for at in range(0, len(fresh), room)] or [[]]
        for window in windows:
            for _ in range(min(LOADS_AT_ONCE - len(window), len(self._resting))):
                window.append(self._resting[0])
                self._resting.rotate(-1)
        return windows


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


class Neighbours:
    """The other nodes, as one node knows them from the head."""

    __slots__ = ("_own", "dead", "dead_clients", "members")

    def __init__(self, own: bytes) -> None:
        self._own = own
        self.members: dict[bytes, Member] = {}
        """Alive or silent, the head among them."""
        self.dead: dict[bytes, str] = {}
        """Why each died. Ids never come back, so that this only grows by nodes that ever were (of clients the newest are kept)."""
        self.dead_clients: dict[bytes, None] = {}

    def learn(self, info: NodeInfo, now: float) -> bool:
        """A node is there; return whether that is news."""
        if info.id == self._own or info.id in self.members or info.id in self.dead:
            return False
        self.members[info.id] = Member(info, now)
        return True

    def change(self, change: Change) -> bool:
        """The head has decided; return whether that is news."""
        member = self.members.get(change.node)
        if change.state == State.DEAD:
            known = change.node in self.dead
            self.members.pop(change.node, None)
            self.dead.setdefault(change.node, change.reason)
            if member is not None and member.info.is_client:
                self._bury_client(change.node)
            return not known
        if member is None or member.state == change.state:
            return False
        member.state = change.state
        member.reason = change.reason
        return True

    def _bury_client(self, node: bytes) -> None:
        self.dead_clients[node] = None
        if len(self.dead_clients) > DEAD_CLIENTS:
            oldest = next(iter(self.dead_clients))
            del self.dead_clients[oldest], self.dead[oldest]

    def load(self, node: bytes, load: NodeLoad, now: float) -> None:
        """What a node has free now."""
        member = self.members.get(node)
        if member is not None:
            member.load = load
            member.heard = now
