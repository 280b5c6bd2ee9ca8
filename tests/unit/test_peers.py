"""Tasks that go to other nodes: when, to which, and what becomes of them when those end, fall silent or die."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from tests.unit.bench import Bench, make_shape, peer_id
from zray import wire
from zray.broker import actions as a
from zray.broker import events as e
from zray.broker.peers import Peer
from zray.broker.placement import NEVER, WAIT, LocalPolicy
from zray.broker.settings import SchedulerConfig
from zray.task import JobSpec

F = make_shape("f")
WHEELS = make_shape("wheels", CPU=1, wheels=2)
GROWING = SchedulerConfig(debug=True, cluster_may_grow=True)


@pytest.fixture
def bench() -> Bench:
    """A node with two CPUs, both with a worker that is ready."""
    found = Bench(GROWING)
    found.start_all()
    found.define(F, WHEELS)
    return found


def sent(bench: Bench) -> Counter[bytes]:
    """How many tasks were sent to which node."""
    count: Counter[bytes] = Counter()
    for action in bench.of(a.RunAt):
        count[action.node] += len(action.tasks)
    return count


def test_what_fits_at_home_stays_there(bench: Bench) -> None:
    bench.see_peer(7, CPU=16)
    bench.submit(2, F)
    assert not bench.of(a.RunAt)
    assert len(bench.of(a.RunOn)) == 2


def test_what_does_not_fit_at_home_goes_where_it_fits(bench: Bench) -> None:
    bench.see_peer(7, CPU=2)
    tasks = bench.submit(5, F)
    assert sent(bench) == {peer_id(7): 2}
    slots = [action.slot for action in bench.of(a.RunAt)]
    assert len(set(slots)) == 2, "each CPU there is a slot of its own"
    bench.finish(slots[0])
    assert sent(bench) == {peer_id(7): 3}, "the next goes there when one has ended"
    for worker in list(bench.handed):
        bench.finish(worker)
    assert not [task for task in tasks if bench.machine.keeps(task.id)]
    assert not bench.machine.node.pool.busy
    assert len(bench.machine.node.pool.workers) == 2, "slots without tasks are gone"


def test_small_tasks_go_in_batches(bench: Bench) -> None:
    bench.submit(2, F)
    for worker in list(bench.handed):
        bench.finish(worker, micros=10)
    bench.submit(1, F)
    bench.see_peer(7, CPU=1)
    bench.submit(500, F)
    assert max(len(action.tasks) for action in bench.of(a.RunAt)) > 1


def test_what_only_another_node_can_run_waits_for_it(bench: Bench) -> None:
    bench.submit(3, WHEELS)
    assert len(bench.of(a.Warn)) == 1
    assert "wheels: 2 asked for, 0 here" in bench.of(a.Warn)[0].text
    bench.see_peer(7, CPU=4)
    assert not bench.of(a.RunAt)
    bench.see_peer(8, CPU=4, wheels=4)
    assert sent(bench) == {peer_id(8): 2}, "4 wheels, 2 each"
    bench.finish(bench.of(a.RunAt)[0].slot)
    assert sent(bench) == {peer_id(8): 3}
    bench.submit(1, make_shape("more", wheels=1))  # a shape nobody has defined
    assert len(bench.of(a.SealError)) == 1


def test_a_demand_of_a_peer_that_is_there_already(bench: Bench) -> None:
    bench.see_peer(8, CPU=4, spokes=4)
    spokes = make_shape("spokes", CPU=1, spokes=4)
    bench.define(spokes)
    bench.submit(1, spokes)
    assert sent(bench) == {peer_id(8): 1}
    assert not bench.of(a.Warn)


def test_waiting_for_wheels_takes_back_no_lease(bench: Bench) -> None:
    bench.tell(e.LeaseRequested(1001, 1, F.key, b"r" * 16))
    assert len(bench.of(a.GrantLease)) == 1
    bench.see_peer(8, CPU=4, wheels=2)
    bench.submit(2, WHEELS)
    bench.tick()
    assert sent(bench) == {peer_id(8): 1}
    assert not bench.of(a.RevokeLease)


def test_silent_nodes_get_nothing_new(bench: Bench) -> None:
    bench.see_peer(7, CPU=2)
    bench.submit(3, F)
    bench.see_peer(7, silent=True, CPU=2)
    bench.submit(5, F)
    slot = bench.of(a.RunAt)[0].slot
    assert sent(bench) == {peer_id(7): 1}
    bench.finish(slot, micros=10_000_000)
    assert sent(bench) == {peer_id(7): 1}
    bench.see_peer(7, CPU=2)
    assert sent(bench) == {peer_id(7): 3}


def test_what_others_run_there_is_respected(bench: Bench) -> None:
    bench.see_peer(7, free=1, CPU=4)
    bench.submit(6, F)
    assert sent(bench) == {peer_id(7): 1}, "what it said is free may be taken before it says so again"
    bench.see_peer(7, free=0, CPU=4)
    bench.see_peer(7, free=3, CPU=4)
    assert sent(bench) == {peer_id(7): 4}, "3 more: what it says does not count what is held there from here"


def test_tasks_of_a_dead_node_run_elsewhere_and_cost_a_retry(bench: Bench) -> None:
    bench.see_peer(7, CPU=2)
    bench.submit(4, F)
    lost = [spec for action in bench.of(a.RunAt) for spec in action.tasks]
    bench.tell(e.PeerGone(peer_id(7), "its port refuses"))
    assert [action.task.id for action in bench.of(a.Reopen)] == [spec.id for spec in lost]
    assert [spec.attempt for spec in lost] == [1, 1]
    for worker in list(bench.handed):
        if worker in bench.machine.node.pool.workers:
            bench.finish(worker)
    for worker in list(bench.handed):
        if worker in bench.machine.node.pool.workers and bench.handed[worker]:
            bench.finish(worker)
    assert not bench.machine.node.tasks.home
    assert not bench.of(a.SealError)


def test_a_task_without_retries_fails_with_its_node(bench: Bench) -> None:
    fragile = make_shape("fragile", max_retries=0)
    bench.define(fragile)
    bench.see_peer(7, CPU=1)
    bench.submit(3, fragile)
    bench.tell(e.PeerGone(peer_id(7), "its port refuses"))
    [error] = bench.of(a.SealError)
    assert error.kind == "NodeDiedError"
    assert "its port refuses" in str(error.fields["message"])


def test_what_is_cancelled_there_ends_here_at_once(bench: Bench) -> None:
    bench.see_peer(7, CPU=1)
    bench.submit(3, F)
    [away] = bench.of(a.RunAt)
    task = away.tasks[0].id
    bench.tell(e.TaskCancel(task, True, True))
    assert bench.of(a.CancelAt) == [a.CancelAt(peer_id(7), task, True)]
    assert [action.task for action in bench.of(a.SealError)] == [task]
    assert not bench.of(a.KillWorker)
    bench.finish(away.slot)  # its end comes all the same
    assert not bench.machine.keeps(task)
    assert len(bench.machine.node.pool.workers) == 2


def test_a_job_that_ends_leaves_no_slot(bench: Bench) -> None:
    bench.see_peer(7, CPU=2)
    bench.submit(8, F)
    bench.tell(e.JobEnded(1, "over"))
    assert not [worker for worker in bench.machine.node.pool.workers.values() if worker.peer is not None]
    assert bench.machine.node.peers[peer_id(7)].available == bench.machine.node.peers[peer_id(7)].total


def test_guests_are_not_sent_on(bench: Bench) -> None:
    bench.see_peer(7, CPU=16)
    bench.tell(e.JobStarted(JobSpec(1 << 31, b"j" * 16, 0, "", [], "/"), 0, guest=True))
    guests = bench.specs(6, F)
    bench.tell(e.TasksSubmitted(1 << 31, 0, b"", guests, None))
    bench.start_all()
    assert not bench.of(a.RunAt)
    for _ in range(6):
        for worker in list(bench.handed):
            if bench.handed[worker]:
                bench.finish(worker)
    assert not [spec for spec in guests if bench.machine.keeps(spec.id)]


def test_copies_are_never_made_of_what_is_elsewhere(bench: Bench) -> None:
    """Who claims a copy first runs it, but claims are made in the store of one node."""
    bench.submit(2, F)
    for worker in list(bench.handed):
        bench.finish(worker, micros=10)
    bench.submit(2, F)
    bench.see_peer(7, CPU=1)
    bench.submit(40, F)
    away = {spec.id for action in bench.of(a.RunAt) for spec in action.tasks}
    for _ in range(50):
        bench.tick(0.01)
        for worker in list(bench.handed):
            if bench.machine.node.pool.workers[worker].peer is None and bench.handed[worker]:
                bench.finish(worker)
    local = {spec.id for action in bench.of(a.RunOn) for spec in action.tasks}
    assert away
    assert not away & local


def test_an_end_that_comes_from_there_is_an_end(bench: Bench) -> None:
    bench.see_peer(7, CPU=1)
    tasks = bench.submit(3, F)
    [away] = bench.of(a.RunAt)
    bench.finish(away.slot, status=wire.DONE_ERROR)
    assert not bench.machine.keeps(away.tasks[0].id)
    assert len([task for task in tasks if bench.machine.keeps(task.id)]) == 2


def test_actors_stay_where_they_were_asked_for(bench: Bench) -> None:
    bench.see_peer(8, CPU=4, wheels=4)
    bench.define(make_shape("actor", kind=1, wheels=1))
    bench.create_actor(make_shape("actor", kind=1, wheels=1))
    assert not bench.of(a.RunAt)


# -- the policy ----------------------------------------------------------------------------------------------------------------


def test_of_two_drawn_the_emptier_is_taken() -> None:
    own = Bench(CPU=1)
    demand = own.machine.node.ledger.demand(F.resources)
    full = Peer(b"0" * 16, {"CPU": 0.5})
    peers = [Peer(bytes([n]) * 16, {"CPU": float(n)}) for n in range(1, 9)]
    policy, draw = LocalPolicy(), Random(1)
    own.machine.node.ledger.take(demand)
    chosen = Counter(policy.place(demand, [own.machine.node.ledger, full, *peers], draw) for _ in range(4000))
    assert set(chosen) <= set(range(3, 10)), "never the full one, nor the emptier of no two"
    assert chosen[9] > chosen[6] > chosen[3] > 0


def test_whether_it_can_ever_run_is_told() -> None:
    own = Bench(CPU=1).machine.node.ledger
    demand = own.demand(make_shape(CPU=4).resources)
    other = Peer(b"1" * 16, {"CPU": 8.0})
    policy = LocalPolicy()
    assert policy.place(demand, [own], Random(1)) == NEVER
    demand.feasible = True
    other.report({"CPU": 1.0})
    assert policy.place(demand, [own, other], Random(1)) == WAIT
    other.report({"CPU": 4.0})
    assert policy.place(demand, [own, other], Random(1)) == 1
