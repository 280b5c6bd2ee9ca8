"""Actors in slots of other nodes: placing, calls, restarts when a node is lost, deaths, what is booked."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.bench import Bench, make_shape, peer_id
from zray.broker import actions as a
from zray.broker import events as e
from zray.broker.actor_log import Entry
from zray.broker.settings import SchedulerConfig
from zray.task import ACTOR_CREATION, ACTOR_METHOD, LANE_BIT, ActorSpec, JobSpec, LaneTag, TaskSpec

BIG = make_shape("Big", ACTOR_CREATION, CPU=1, wheels=2)
METHOD = make_shape("method", ACTOR_METHOD, nothing=0)


@pytest.fixture
def bench() -> Bench:
    """A node without wheels that knows two that have some."""
    found = Bench(SchedulerConfig(debug=True, cluster_may_grow=True))
    found.start_all()
    found.define(BIG)
    found.see_peer(7, CPU=2, wheels=2)
    return found


def call(bench: Bench, spec: ActorSpec, count: int = 1, job: int = 1) -> list[TaskSpec]:
    calls = bench.specs(count, METHOD)
    bench.tell(e.ActorCallsQueued(1001, job, spec.creation.id, 0, calls))
    return calls


def hosted(bench: Bench, **options: Any) -> tuple[ActorSpec, int]:
    spec = bench.create_actor(BIG, **options)
    return spec, bench.of(a.HostActor)[-1].slot


def test_one_that_fits_only_there_is_sent_there_with_its_calls(bench: Bench) -> None:
    spec, slot = hosted(bench)
    found = call(bench, spec, 3)
    assert [(sent.node, sent.incarnation) for sent in bench.of(a.HostActor)] == [(peer_id(7), 0)]
    assert [sent.calls for sent in bench.of(a.CallAt)] == [found]
    bench.tell(e.ActorHosted(slot, spec.creation.id, 0))
    peer = bench.machine.node.peers[peer_id(7)]
    assert peer.available == {"CPU": 2 * 10000, "wheels": 2 * 10000}, "it occupies what a living actor does: nothing"
    assert not bench.of(a.StartWorker)[2:], "no process was asked for here"


def test_calls_made_before_it_was_placed_go_with_it_and_keep_their_job(bench: Bench) -> None:
    first = bench.create_actor(BIG)
    second = bench.create_actor(BIG)
    bench.tell(e.JobStarted(JobSpec(2, peer_id(2), 1, "", [], "/"), 2000))
    calls = call(bench, second, 2, job=2)
    assert not bench.of(a.CallAt)
    bench.tell(e.ActorHosted(bench.of(a.HostActor)[0].slot, first.creation.id, 0))
    assert [sent.spec for sent in bench.of(a.HostActor)] == [first, second]
    assert [(sent.job, sent.calls) for sent in bench.of(a.CallAt)] == [(2, calls)]


def test_when_its_node_dies_it_comes_back_elsewhere_with_its_calls(bench: Bench) -> None:
    spec, slot = hosted(bench, max_restarts=3, max_task_retries=1)
    bench.tell(e.ActorHosted(slot, spec.creation.id, 1))  # it was restarted once there
    calls = call(bench, spec, 2)
    bench.tell(e.PeerGone(peer_id(7), "killed", {spec.creation.id: calls}))
    assert [(down.next, down.incarnation) for down in bench.of(a.ActorDown)] == [(True, 0)]
    assert len(bench.of(a.HostActor)) == 1, "there is no other node yet"
    bench.see_peer(8, CPU=2, wheels=2)
    again = bench.of(a.HostActor)[-1]
    assert (again.node, again.incarnation, again.replay) == (peer_id(8), 2, calls)
    assert [reopened.task for reopened in bench.of(a.Reopen)] == calls


def test_with_checkpoints_what_is_logged_costs_no_retry_and_is_not_sent_again(bench: Bench) -> None:
    spec, _ = hosted(bench, max_restarts=3, max_task_retries=0, checkpoint_every=5)
    log = bench.machine.node.actors.actors[spec.creation.id].log
    assert log is not None
    calls = call(bench, spec, 4)
    log.saving(0, b"state", None)
    log.calls(1, [Entry(calls[0]), Entry(calls[1])])
    bench.tell(e.PeerGone(peer_id(7), "killed", {spec.creation.id: calls[1:]}))
    assert [reopened.task for reopened in bench.of(a.Reopen)] == [calls[1]]
    assert [sealed.task for sealed in bench.of(a.SealError)] == [calls[2].id, calls[3].id], "no retries"
    bench.see_peer(8, CPU=2, wheels=2)
    again = bench.of(a.HostActor)[-1]
    assert (again.node, again.replay) == (peer_id(8), [])
    assert log.begun() == calls[:2]
    bench.tell(e.ActorKill(spec.creation.id, True))
    bench.tell(e.ActorGoneAway(again.slot, spec.creation.id, "ActorDiedError", "KILLED", b""))
    assert bench.of(a.SealError)[-1].task == calls[1].id
    assert not log.entries


def test_without_restarts_left_it_dies_with_its_node(bench: Bench) -> None:
    spec, slot = hosted(bench, max_restarts=1)
    bench.tell(e.ActorHosted(slot, spec.creation.id, 1))
    calls = call(bench, spec)
    bench.tell(e.PeerGone(peer_id(7), "killed", {spec.creation.id: calls}))
    assert [(down.next, down.fields["cause"]) for down in bench.of(a.ActorDown)] == [(False, "NODE_DIED")]
    assert [sealed.task for sealed in bench.of(a.SealError)] == [calls[0].id]
    assert not bench.machine.node.pool.busy
    assert len(bench.machine.node.pool.workers) == 2


def test_its_death_there_is_final(bench: Bench) -> None:
    spec, slot = hosted(bench, name="axle", max_restarts=5)
    bench.tell(e.ActorGoneAway(slot, spec.creation.id, "ActorDiedError", "SIGKILL", b"packed"))
    (down,) = bench.of(a.ActorDown)
    assert (down.next, down.fields["error"], down.fields["cause"]) == (False, b"packed", "SIGKILL")
    assert [(freed.namespace, freed.name) for freed in bench.of(a.NameFreed)] == [("", "axle")]
    late = call(bench, spec)
    assert [sealed.task for sealed in bench.of(a.SealError)] == [late[0].id]
    peer = bench.machine.node.peers[peer_id(7)]
    assert peer.available == peer.total
    bench.tell(e.ActorGoneAway(slot, spec.creation.id, "ActorDiedError", "SIGKILL", b"packed"))
    assert len(bench.of(a.ActorDown)) == 1, "said twice, it changes nothing"


def test_a_report_of_another_slot_changes_nothing(bench: Bench) -> None:
    spec, slot = hosted(bench)
    bench.tell(e.ActorHosted(slot + 1, spec.creation.id, 0))
    bench.tell(e.ActorGoneAway(slot + 1, spec.creation.id, "ActorDiedError", "SIGKILL", b""))
    bench.tell(e.ActorGoneAway(slot, peer_id(9), "ActorDiedError", "SIGKILL", b""))
    assert spec.creation.id in bench.machine.node.actors.actors


def test_killing_it_waits_for_the_confirmation(bench: Bench) -> None:
    spec, slot = hosted(bench, name="axle")
    bench.tell(e.ActorKill(spec.creation.id, False))
    bench.tell(e.ActorKill(spec.creation.id, True))
    bench.tell(e.ActorKill(spec.creation.id, True))
    assert [(kill.node, kill.no_restart) for kill in bench.of(a.KillAt)] == [(peer_id(7), False), (peer_id(7), True)]
    assert not bench.of(a.ActorDown)
    assert bench.of(a.NameFreed)
    peer = bench.machine.node.peers[peer_id(7)]
    assert peer.available != peer.total
    bench.tell(e.ActorGoneAway(slot, spec.creation.id, "ActorDiedError", "KILLED", b""))
    assert peer.available == peer.total


def test_without_handles_it_is_told_to_end_and_is_never_killed(bench: Bench) -> None:
    spec, slot = hosted(bench)
    bench.tell(e.ActorUnreferenced(spec.creation.id))
    assert [end.actor for end in bench.of(a.EndActorAt)] == [spec.creation.id]
    for _ in range(5):
        bench.tick(10.0)
    assert not bench.of(a.KillAt), "whether it still has work to do is known there only"
    bench.tell(e.ActorGoneAway(slot, spec.creation.id, "ActorDiedError", "HANDLES_GONE", b""))
    assert not bench.machine.node.actors.actors


def test_the_end_of_its_job_kills_it_unless_it_is_detached(bench: Bench) -> None:
    bench.see_peer(8, CPU=2, wheels=2)
    mortal, slot = hosted(bench)
    bench.create_actor(BIG, detached=True)
    bench.tell(e.JobEnded(1, "enough"))
    assert [kill.actor for kill in bench.of(a.KillAt)] == [mortal.creation.id]
    bench.tell(e.ActorGoneAway(slot, mortal.creation.id, "ActorDiedError", "JOB_ENDED", b""))
    assert len(bench.machine.node.actors.actors) == 1


def test_a_guest_is_never_sent_on(bench: Bench) -> None:
    bench.tell(e.JobStarted(JobSpec(9, peer_id(2), 1, "", [], "/"), 0, guest=True))
    spec = bench.create_actor(BIG, job=9)
    assert not bench.of(a.HostActor)
    assert spec.creation.id in bench.machine.node.actors.queued


def test_calls_of_a_lane_go_on_as_they_are(bench: Bench) -> None:
    spec, slot = hosted(bench)
    bench.tell(e.ActorHosted(slot, spec.creation.id, 0))
    calls = bench.specs(2, METHOD)
    tag = LaneTag(LANE_BIT | 3, 0, True)
    bench.tell(e.ActorCallsQueued(0, 1, spec.creation.id, 0, calls, tag))
    [sent] = bench.of(a.CallAt)
    assert (sent.node, sent.calls, sent.lane) == (peer_id(7), calls, tag)
