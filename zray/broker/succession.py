"""Who keeps the cluster's tables beside the head, who becomes the head after it, and how the others find that one.

Covers a node's copy of the tables (`replicated_tables`), asking nodes to keep one, what becomes of a node when the council makes it the head or
makes another one the head in its stead, and where a node asks when its head is gone. Does not cover what any node does as a member
(`cluster`), what is decided (`zray.gcs.replication`), or what a new head makes of jobs and actors (`server`, `revival`).

The head of the chain is the head of the cluster. When it dies the council decides on a chain without it; the node that is first then builds its
membership from the replicated rows, says to all that it is the head, and takes them back as a head does that was started again from storage.
Whoever was the head before, and lives, learns of the newer epoch and ends: without the council's lease it had answered nothing meanwhile, and the
others drop what it says, as it is dead to them. Epochs order all claims: of two nodes that say they are the head the one with the later epoch is.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

import msgspec

from zray.broker import peer_messages as pm
from zray.broker.membership import NEVER, Change, Membership, State
from zray.broker.replicated_tables import ReplicatedTables
from zray.broker.revival import end_rows_of
from zray.gcs.replication.timing import of_nodes
from zray.gcs.tables import CLUSTER_KEY, ClusterRow, NodeRow

if TYPE_CHECKING:
    from collections.abc import Callable

    from zray.broker.cluster import Cluster
    from zray.broker.membership import NodeInfo
    from zray.gcs.replication.configuration import Configuration

_INVITE_S: Final = 0.5
"""Seconds between two rounds of asking nodes to keep a copy."""
_OTHERS: Final = 5
"""Other members that a node asks for the head, beside those that keep the tables."""
PORT_REFUSES: Final = "its broker is gone: its port refuses connections"
_REPLACED: Final = "another node has become the head while this one did not answer"
COMES_BACK: Final = (
    "What was on this node has ended, or runs elsewhere; it begins again as an ordinary node of the cluster: "
    "connect to it again, or to any other"
)
_SUCCEEDED: Final = "another node has become the head"
STAND_INS: Final = [bytes(15) + bytes((number,)) for number in range(1, 16)]
"""Names for whoever is at an address at which a client asks for its head."""
_MEND: Final = (
    "Most of the nodes that kept the cluster's tables are gone, or cannot be reached: without them no other node may become the head. "
    "Start the cluster again"
)


class Succession:
    """One node's part."""

    def __init__(self, cluster: Cluster, directory: str, shards: int, node_timeout: float) -> None:
        """Arguments as in `BrokerConfig`, and as the head has told."""
        self._cluster = cluster
        self._directory = directory
        self._shards = shards
        self.node_timeout = node_timeout
        """Seconds of silence after which a node is dead."""
        self.tables: ReplicatedTables | None = None
        """None: this node keeps no copy."""
        self.serving: pm.Serving | None = None
        """Who keeps the tables, as far as is known here; None: the head alone does."""
        self._new_head: NodeInfo | None = None
        """Who says that it is the head now."""
        self._invite_at = 0.0
        self._leased_at = 0.0
        """When this head last knew that it is the only one."""
        self.replaced_by: list[str] = []
        """Once this node was the head and was replaced: host:port of those that keep the tables now, the head first."""
        self.on_become_head: Callable[[], None] | None = None
        """Told when this node has become the head."""
        cluster.serve_also(pm.BeReplica, self._be_replica)
        cluster.serve_also(pm.HeadIs, self._head_is)
        cluster.serve_also(pm.Serving, lambda node, message: self.learn(message))

    @property
    def epoch(self) -> int:
        """The newest epoch that is known here; 0: the head alone keeps the tables."""
        known = 0 if self.serving is None else self.serving.epoch
        configuration = None if self.tables is None else self.tables.configuration
        return known if configuration is None else max(known, configuration.epoch)

    # -- copies --------------------------------------------------------------------------------------------------------

    def begin(self, wanted: int, now: float) -> None:
        """This node is the first head of a cluster whose tables several nodes are to keep."""
        self._keep_copy(wanted, (), now)
        assert self.tables is not None
        self.tables.lead()
        self._leased_at = now
        self.tables.end_round(now)

    def _keep_copy(self, wanted: int, contacts: tuple[tuple[bytes, str], ...], now: float) -> None:
        cluster = self._cluster
        self.tables = ReplicatedTables(
            cluster.own,
            cluster.address,
            cluster.links,
            self._directory,
            self._shards,
            of_nodes(self.node_timeout),
            now,
            wanted=wanted,
            contacts=contacts,
            on_configuration=self._configured,
        )

    def _be_replica(self, node: bytes, message: pm.BeReplica) -> None:
        if self.tables is None and node == self._cluster.head and not self._cluster.is_client:
            self._keep_copy(message.wanted, tuple(message.contacts), self._cluster.now())

    def _invite(self, tables: ReplicatedTables, now: float) -> None:
        """At the head: when there are too few copies, ask the members that have been here longest."""
        configuration = tables.configuration
        if configuration is None or now < self._invite_at:
            return
        self._invite_at = now + _INVITE_S
        named = {place.id for place in configuration.chain}
        able = [
            member.info.id
            for member in self._cluster.membership.present()
            if member.state == State.ALIVE and not member.info.is_client and member.info.id not in named
        ]
        contacts = [(place.id, place.address) for place in configuration.everybody()]
        for node in able[: max(0, tables.wanted - len(configuration.chain))]:
            self._cluster.links.send(node, pm.BeReplica(contacts, tables.wanted), now)

    def learn(self, serving: pm.Serving | None) -> None:
        """The head says who keeps the tables."""
        if serving is None or serving.epoch < self.epoch:
            return
        self.serving = serving
        self._cluster.watch.mend = _MEND

    # -- the loop ------------------------------------------------------------------------------------------------------

    def end_round(self, now: float) -> None:
        """After all that has come was taken in."""
        if self.tables is not None:
            self.tables.end_round(now)

    @property
    def wake_at(self) -> float:
        """When `end_round` is wanted at the latest (monotonic seconds)."""
        return NEVER if self.tables is None else self.tables.wake_at

    def tick(self, now: float) -> None:
        """With each beat."""
        tables, cluster = self.tables, self._cluster
        if tables is None or not cluster.is_head:
            return
        if tables.is_leased(now):
            self._leased_at = now
        elif now - self._leased_at >= cluster.grace:
            cluster.end(
                f"it was the head, and for {cluster.grace:g} s has not reached enough of the nodes that keep the cluster's tables. {_MEND}"
            )
            return
        self._invite(tables, now)
        self._call_members(now)

    def _call_members(self, now: float) -> None:
        """Tell those who is the head that have not come yet; and see whether they are there at all: some may have died with the last one."""
        cluster = self._cluster
        for member in [member for member in cluster.membership.present() if member.awaited]:
            node = member.info.id
            cluster.links.send(node, pm.HeadIs(self.epoch, cluster.info), now)
            if cluster.links.probe(node, now):
                cluster.lost(node, PORT_REFUSES, now)

    def may_decide(self, now: float) -> bool:
        """At the head: whether this node can know who lives. One that was cut off itself cannot."""
        return self.tables is None or self.tables.is_leased(now)

    def ended(self, node: bytes, now: float) -> None:
        """A node's process has ended."""
        if self.tables is not None:
            self.tables.ended(node, now)

    def replicate(self, node: bytes, message: pm.Replicate, now: float) -> None:
        """Another replica says something; it need not be a member: replicas see for themselves to those that were left out."""
        if self.tables is not None:
            self.tables.handle(node, message, now)

    # -- heads come and go ---------------------------------------------------------------------------------------------

    def _configured(self, configuration: Configuration, now: float) -> None:
        """The council has decided."""
        cluster, tables = self._cluster, self.tables
        assert tables is not None
        if self.serving is not None and configuration.epoch < self.serving.epoch:
            return  # the head has told of a newer one
        self.serving = pm.Serving(
            configuration.epoch,
            [(place.id, place.address) for place in configuration.chain],
            [(place.id, place.address) for place in configuration.council],
            tables.wanted,
        )
        cluster.watch.mend = _MEND
        for place in configuration.everybody():
            if place.id in cluster.neighbours.dead:
                cluster.links.forget(place.id)  # one that nobody could take the place of yet
        if tables.leads and not cluster.is_head:
            self._become_head(tables, now)
        elif cluster.is_head and not tables.leads:
            places = dict([*self.serving.chain, *self.serving.council])
            self.replaced_by = [where for node, where in places.items() if node != cluster.own]
            cluster.end(f"{_REPLACED}. {COMES_BACK}")
            return
        elif self.is_replaced:
            cluster.follow(cluster.watch.succeeded(_SUCCEEDED, now))
        if cluster.is_head:
            self._invite_at = now
            cluster.tell_members(self.serving, now)

    def _become_head(self, tables: ReplicatedTables, now: float) -> None:
        """Go on with the cluster that is in the tables."""
        cluster = self._cluster
        old = cluster.head
        reason = cluster.watch.reason or _SUCCEEDED
        print(f"[zray] this node becomes the head instead of {old.hex()[:8]}: {reason}", file=sys.stderr, flush=True)
        tables.lead()
        self._leased_at = now
        gcs = tables.service
        cluster.take_over(gcs, Membership(cluster.info, self.node_timeout))
        row = gcs.row(ClusterRow, CLUSTER_KEY)
        assert row is not None, "the first head has begun the cluster"
        gcs.put_row(msgspec.structs.replace(row, head=cluster.own, lives=row.lives + 1))
        rows = {node.id: node for node in gcs.rows(NodeRow) if node.alive and node.id not in (cluster.own, old)}
        cluster.expect_all(list(rows.values()), now)
        for other in [other for other in cluster.neighbours.members if other not in rows and other != old]:
            cluster.apply(Change(other, State.DEAD, "it was not a member yet when the head died"))
        cluster.apply(Change(old, State.DEAD, reason))
        end_rows_of(gcs, old, reason)
        if self.on_become_head is not None:
            self.on_become_head()
        cluster.ask_itself()
        self._call_members(now)

    def _head_is(self, node: bytes, message: pm.HeadIs) -> None:
        """Somebody is the head now."""
        cluster = self._cluster
        if message.epoch < self.epoch or message.head.id in (cluster.own, cluster.head) or cluster.is_head:
            return
        self._new_head = message.head
        cluster.follow(cluster.watch.succeeded(_SUCCEEDED, cluster.now()))

    @property
    def is_replaced(self) -> bool:
        """Whether another node than this one's head is known to be the head by now."""
        cluster, serving = self._cluster, self.serving
        if cluster.is_head or serving is None:
            return False
        return self._new_head is not None or serving.chain[0][0] != cluster.head

    def tell_head(self, node: bytes, now: float) -> bool:
        """A node takes this one for the head: tell it who is; False when that is not known here, or there are no others that could be."""
        cluster = self._cluster
        if cluster.is_head or self.serving is None:
            return False
        member = cluster.neighbours.members.get(cluster.head)
        if member is not None and not cluster.watch.is_lost and not self.is_replaced:
            cluster.links.send(node, pm.HeadIs(self.epoch, member.info), now)
        return True

    def _heirs(self) -> list[tuple[bytes, str]]:
        """Who may be the head by now, or know it: id and host:port."""
        cluster, serving = self._cluster, self.serving
        if serving is None:
            return []
        # All that kept the tables may have been replaced while this node was cut off.
        members = [member.info for member in cluster.neighbours.members.values() if not member.info.is_client]
        places = {info.id: info.address for info in members[:_OTHERS]}
        places.update([*serving.chain, *serving.council])
        if self._new_head is not None:
            places[self._new_head.id] = self._new_head.address
        return [(node, where) for node, where in places.items() if node not in (cluster.own, cluster.head) and where]

    def asks(self, node: bytes) -> bool:
        """Whether this node asks that one to take it back when its head is gone."""
        return any(node == heir for heir, _ in self._heirs())

    def ask(self, rejoin: pm.Rejoin, now: float) -> None:
        """The head is gone: ask those that may be the head by now to take this node back."""
        cluster, others = self._cluster, self._heirs()
        if not cluster.is_outside:
            for node, where in others:
                if node not in cluster.neighbours.dead:
                    cluster.links.know(node, where)
                    cluster.links.send(node, rejoin, now)
            return
        # A client knows nobody but its head, and whoever is at an address.
        for stand_in, (_, where) in zip(STAND_INS, others):
            cluster.links.know(stand_in, where)
            cluster.links.send_to_anybody(stand_in, rejoin)

    def found(self) -> None:
        """The next head has taken this node in."""
        self._new_head = None
        for stand_in in STAND_INS:
            self._cluster.links.forget(stand_in)

    def close(self) -> None:
        """End."""
        if self.tables is not None:
            self.tables.close()
