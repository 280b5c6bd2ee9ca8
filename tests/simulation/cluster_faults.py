"""Faults to plant in what makes many nodes one cluster, one at a time: mistakes that such protocols are prone to, some of which were made.

Each replaces one method. `test_cluster_faults` demands that the simulation of clusters finds each of them. Does not cover the scheduler of one node
(`faults`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.simulation.cluster_transfer import SimTransfer
from zray.broker import actions, membership
from zray.broker import peer_messages as pm
from zray.broker.actor_events import ActorEvents
from zray.broker.cluster import Cluster
from zray.broker.lending import Lending
from zray.broker.links import Links
from zray.broker.locations import Locations
from zray.broker.membership import Change, Membership, Neighbours, State
from zray.broker.object_exchange import ObjectExchange
from zray.broker.object_sharing import ObjectSharing
from zray.broker.peers import Peer
from zray.broker.performer import Performer
from zray.broker.reliable import HEADER_BYTES, Received, ReliableLink
from zray.broker.remote_actors import RemoteActors
from zray.broker.remote_tasks import RemoteTasks
from zray.broker.server import Broker
from zray.broker.task_events import TaskEvents
from zray.broker.task_table import TaskTable
from zray.broker.worker_ends import WorkerEnds

Plant = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, Plant] = {}


def fault(plant: Plant) -> Plant:
    """Enter a fault under its name."""
    FAULTS[plant.__name__] = plant
    return plant


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace a method by what `make` makes of it."""
    patch.setattr(owner, name, make(getattr(owner, name)))


def nothing(*args: Any, **kwargs: Any) -> None:
    """What a forgotten call does."""


# -- frames ------------------------------------------------------------------------------------------------------------


def _without_order(patch: pytest.MonkeyPatch, wrong: Callable[[int, int], bool]) -> None:
    def make(original: Any) -> Any:
        def receive(self: ReliableLink, frame: bytes, now: float) -> Received:
            number = int.from_bytes(frame[:8], "little")
            if number and wrong(number, self.taken):
                return Received(frame[HEADER_BYTES:], [])
            return original(self, frame, now)  # type: ignore[no-any-return]

        return receive

    wrap(patch, ReliableLink, "receive", make)


@fault
def a_frame_that_came_before_is_handed_on_again(patch: pytest.MonkeyPatch) -> None:
    _without_order(patch, lambda number, taken: number <= taken)


@fault
def a_frame_that_comes_before_its_time_is_handed_on(patch: pytest.MonkeyPatch) -> None:
    _without_order(patch, lambda number, taken: number > taken + 1)


@fault
def lost_frames_are_not_sent_again(patch: pytest.MonkeyPatch) -> None:
    def first_unacked(self: ReliableLink, now: float) -> list[bytes]:
        self._resend_due = now + self._pause if self._unacked else membership.NEVER
        return []

    patch.setattr(ReliableLink, "_first_unacked", first_unacked)


@fault
def the_first_lost_frame_is_left_out(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, ReliableLink, "_first_unacked", lambda original: lambda self, now: original(self, now)[1:])


@fault
def an_acknowledgement_counts_for_the_next_frame_too(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        ReliableLink,
        "_acknowledged",
        lambda original: lambda self, acked, now: original(self, acked and min(acked + 1, self._number), now),
    )


@fault
def what_was_received_is_never_acknowledged(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def receive(self: ReliableLink, frame: bytes, now: float) -> Received:
            return original(self, frame[:8] + bytes(8) + frame[16:], now)  # type: ignore[no-any-return]

        return receive

    wrap(patch, ReliableLink, "receive", make)


@fault
def frames_of_a_head_without_a_name_are_counted(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def arrived(self: Links, event: Any, now: float, events: Any) -> None:
            nameless, self._nameless = self._nameless, {}
            original(self, event, now, events)
            self._nameless.update(nameless)

        return arrived

    wrap(patch, Links, "_arrived", make)


@fault
def what_comes_before_the_head_has_answered_is_dropped(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def wait(self: Cluster, seconds: float) -> None:
            original(self, seconds)
            self._before_joining.clear()

        return wait

    wrap(patch, Cluster, "_await_answer", make)


# -- members -----------------------------------------------------------------------------------------------------------


@fault
def late_messages_of_the_dead_count(patch: pytest.MonkeyPatch) -> None:
    def heard(self: Cluster, node: bytes, message: pm.PeerMessage, now: float) -> None:
        if node == self.head:
            self.watch.heard(now)
        self._handlers[type(message)](node, message, now)

    patch.setattr(Cluster, "_heard", heard)


@fault
def a_node_that_was_declared_dead_is_not_told(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cluster, "_rejected", nothing)


@fault
def the_dead_come_back_when_they_are_heard(patch: pytest.MonkeyPatch) -> None:
    def heard(self: Membership, node: bytes, load: Any, now: float) -> list[Change]:
        member = self.members.get(node)
        if member is None:
            return []
        member.heard = now
        if member.state != State.ALIVE:
            member.state = State.ALIVE
            return [Change(node, State.ALIVE)]
        return []

    patch.setattr(Membership, "heard", heard)
    patch.setattr(Membership, "is_dead", lambda self, node: False)


@fault
def nodes_of_other_versions_are_admitted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(membership, "_minor", lambda version: ("0",))


@fault
def a_silent_node_stays_silent(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        Neighbours,
        "change",
        lambda original: lambda self, change: change.state != State.ALIVE and original(self, change),
    )


@fault
def ports_of_silent_nodes_are_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Membership, "to_look_at", lambda self, now: [])


@fault
def nobody_is_told_of_newcomers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cluster, "_node_up", nothing)


@fault
def a_short_pause_is_taken_for_death(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Membership, "__init__", lambda original: lambda self, head, dead_after: original(self, head, 0.4))


# -- references --------------------------------------------------------------------------------------------------------


@fault
def what_is_lent_is_not_kept(patch: pytest.MonkeyPatch) -> None:
    def lend(self: ObjectSharing, node: bytes, refs: Any) -> list[bytes]:
        names = list({ref.binary(): ref for ref in refs})
        self.lending.lend(node, names)
        return names

    patch.setattr(ObjectSharing, "lend", lend)


@fault
def what_was_here_already_is_not_given_back(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def borrow(self: ObjectSharing, *args: Any) -> Any:
            cluster, self._cluster = self._cluster, _Deaf(self._cluster, pm.GiveBack)  # type: ignore[assignment]
            try:
                return original(self, *args)
            finally:
                self._cluster = cluster

        return borrow

    wrap(patch, ObjectSharing, "borrow", make)


class _Deaf:
    """A cluster that does not send one kind of message."""

    def __init__(self, cluster: Any, kind: type[pm.PeerMessage]) -> None:
        self.cluster = cluster
        self.kind = kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cluster, name)

    def send(self, node: bytes, message: pm.PeerMessage) -> None:
        if type(message) is not self.kind:
            self.cluster.send(node, message)


@fault
def borrowed_objects_are_kept_for_ever(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def unreferenced(self: ObjectSharing, name: bytes) -> bool:
            cluster, self._cluster = self._cluster, _Deaf(self._cluster, pm.GiveBack)  # type: ignore[assignment]
            try:
                return bool(original(self, name))
            finally:
                self._cluster = cluster

        return unreferenced

    wrap(patch, ObjectSharing, "unreferenced", make)


@fault
def a_return_counts_for_all_loans_of_a_node(patch: pytest.MonkeyPatch) -> None:
    def given_back(self: Lending, node: bytes, objects: list[bytes]) -> list[bytes]:
        free = []
        for name in objects:
            nodes = self.lent.get(name, {})
            if nodes.pop(node, 0) and not nodes:
                del self.lent[name]
                free.append(name)
        return free

    patch.setattr(Lending, "given_back", given_back)


@fault
def what_a_value_refers_to_is_not_lent(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        ObjectExchange,
        "received",
        lambda original: (
            lambda self, node, message: original(self, node, msgspec.structs.replace(message, contained=[]))
        ),
    )


@fault
def loans_to_the_dead_are_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lending, "node_gone", lambda self, node: ([], []))


@fault
def values_that_are_made_later_are_not_told_of(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ObjectSharing, "sealed", nothing)


@fault
def a_loan_that_comes_back_ends_the_pull_of_the_value(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Locations, "wanted", lambda self, name: False)


@fault
def results_that_stay_where_they_were_made_are_given_up_there(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def unreferenced(self: ObjectSharing, name: bytes) -> bool:
            self._debts.pop(name, None)
            return bool(original(self, name))

        return unreferenced

    wrap(patch, ObjectSharing, "unreferenced", make)


@fault
def lost_values_are_not_made_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ObjectSharing, "_recover", nothing)


@fault
def values_that_were_made_again_here_stay_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ObjectSharing, "found", nothing)


@fault
def what_was_pulled_from_a_dead_node_is_waited_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimTransfer, "node_gone", nothing)


# -- tasks -------------------------------------------------------------------------------------------------------------


@fault
def tasks_that_a_dead_node_had_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def recover(self: TaskEvents, worker: Any, *args: Any) -> None:
            if worker.peer is None:
                original(self, worker, *args)
            else:
                for spec in worker.handed:
                    self.node.tasks.end(spec.id, None)
                worker.handed.clear()

        return recover

    wrap(patch, TaskEvents, "recover_handed", make)


@fault
def a_task_is_sent_away_although_somebody_here_runs_it(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RemoteTasks, "_is_open", lambda self, spec: True)


@fault
def slots_on_other_nodes_are_not_given_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Peer, "give_back", nothing)


@fault
def jobs_of_dead_nodes_go_on(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def gone(self: RemoteTasks, node: bytes, reason: str) -> None:
            self._homes = {job: home for job, home in self._homes.items() if home != node}
            original(self, node, reason)

        return gone

    wrap(patch, RemoteTasks, "node_gone", make)


@fault
def guests_at_the_home_of_their_job_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        RemoteTasks,
        "job_over",
        lambda original: lambda self, job, reason: job in self._homes and original(self, job, reason),
    )


@fault
def tasks_of_jobs_that_are_over_are_taken_in(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        RemoteTasks,
        "run",
        lambda original: lambda self, node, message: (self._over.clear(), original(self, node, message))[1],
    )


@fault
def calls_of_jobs_that_are_over_stay_under_way(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RemoteTasks, "_end_calls", nothing)


@fault
def shapes_that_other_nodes_will_name_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    def forget(self: Performer, action: Any) -> None:
        for key in action.shapes:
            self.broker.shapes.pop(key, None)

    def make(original: Any) -> Any:
        def init(self: Performer, broker: Any) -> None:
            original(self, broker)
            self._do[actions.ForgetShapes] = lambda action: forget(self, action)

        return init

    wrap(patch, Performer, "__init__", make)


@fault
def what_a_dead_driver_had_not_sent_is_waited_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WorkerEnds, "driver_died", lambda self, process: self._store.reap(process))


@fault
def ends_whose_report_died_with_the_worker_are_not_told(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RemoteTasks, "worker_gone", nothing)


@fault
def only_the_first_end_of_a_batch_is_reported(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, RemoteTasks, "_report", lambda original: lambda self, node, ends: original(self, node, ends[:1]))


@fault
def what_runs_is_offered_again_and_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TaskTable, "refused", nothing)


# -- actors ------------------------------------------------------------------------------------------------------------


@fault
def calls_from_afar_keep_the_numbers_of_their_caller(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def expect(self: RemoteTasks, node: bytes, job: int, actor: bytes, calls: Any, *how: Any) -> None:
            numbers = [call.sequence for call in calls]
            original(self, node, job, actor, calls, *how)
            for call, number in zip(calls, numbers, strict=True):
                call.sequence = number

        return expect

    wrap(patch, RemoteTasks, "expect_calls", make)


@fault
def calls_go_back_to_where_the_handle_came_from(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Broker,
        "is_elsewhere",
        lambda self, actor: self.sharing is not None and actor in self.sharing.lending.borrowed,
    )


@fault
def actors_of_dead_nodes_are_not_brought_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ActorEvents, "node_lost", nothing)


@fault
def actors_whose_owner_is_dead_live_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RemoteActors, "node_gone", nothing)


@fault
def an_actor_whose_handles_went_before_it_had_a_place_lives_for_ever(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def hosted(self: ActorEvents, event: Any, now: float) -> None:
            actor = self.node.actors.actors.get(event.actor)
            ending = actor is not None and actor.ending
            if actor is not None:
                actor.ending = False
            original(self, event, now)
            if actor is not None:
                actor.ending = ending

        return hosted

    wrap(patch, ActorEvents, "hosted", make)


@fault
def nobody_is_told_that_an_actor_is_gone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RemoteActors, "_gone", nothing)


@fault
def addresses_of_actors_of_other_nodes_stay(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def dead(self: RemoteActors, actor: bytes, kind: str, cause: str, error: bytes) -> None:
            refs = list(self._broker.performer.addresses.get(actor, ()))
            original(self, actor, kind, cause, error)
            if refs:
                self._broker.performer.addresses[actor] = refs

        return dead

    wrap(patch, RemoteActors, "dead", make)
