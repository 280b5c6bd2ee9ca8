"""Strategies and policies, through the scheduler machine: spread, affinity, labels, locality, bundles; and a policy of another mind."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.unit.bench import ACTOR, Bench, make_shape, peer_id
from zray import placing
from zray.broker import actions as a
from zray.broker import events as e
from zray.broker.ledger import Ledger
from zray.broker.peers import Peer
from zray.broker.placement import NEVER, WAIT, Inputs, LocalPolicy, NothingKnown, expected_wait
from zray.broker.settings import SchedulerConfig
from zray.placing import ABSENT, EXISTS, GROUP, IN, NODE, NOT_IN, SPREAD, GroupSpec, Requirement, Strategy
from zray.resources import UNIT
from zray.task import ACTOR_CREATION

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from zray.broker.ledger import Demand

GROWING = SchedulerConfig(debug=True, cluster_may_grow=True)
F = make_shape("f")
G = b"group" + bytes(11)


def places(bench: Bench) -> list[int]:
    """Number of the node (0: this one) of each task handed out, in order."""
    found = []
    for action in bench.all:
        if isinstance(action, a.RunOn):
            found += [0] * len(action.tasks)
        elif isinstance(action, a.RunAt):
            found += [action.node[0]] * len(action.tasks)
    return found


def bench_with(*peers: int, **more: float) -> Bench:
    """A node with two CPUs and workers, and others with so many CPUs, numbered from 1."""
    bench = Bench(GROWING, **more)
    bench.start_all()
    for number, cpus in enumerate(peers, 1):
        bench.see_peer(number, CPU=cpus)
    return bench


# -- records ----------------------------------------------------------------------------------------------------------------


def test_strategies_survive_their_bytes() -> None:
    assert placing.pack(Strategy()) == b""
    assert placing.unpack(b"") == Strategy()
    strange = Strategy(GROUP, (Requirement("zone", IN, ("a", "b")),), (), b"", False, G, 3, True)
    assert placing.unpack(placing.pack(strange)) == strange
    with pytest.raises(ValueError, match="not a packed strategy"):
        placing.unpack(b"\xc1")


@pytest.mark.parametrize(
    ("operator", "values", "met"),
    [(IN, ("east",), "east"), (NOT_IN, ("east",), "west none"), (EXISTS, (), "east west"), (ABSENT, (), "none")],
)
def test_requirements(operator: int, values: tuple[str, ...], met: str) -> None:
    for zone in ("east", "west", "none"):
        labels = {} if zone == "none" else {"zone": zone}
        assert Requirement("zone", operator, values).met(labels) == (zone in met.split())


def test_equal_resources_with_different_strategies_are_different_demands() -> None:
    ledger = Ledger({"CPU": 2}, peer_id(0))
    spread = placing.pack(Strategy(SPREAD))
    demands = {ledger.demand(F.resources), ledger.demand(F.resources, spread), ledger.demand(F.resources, spread)}
    assert len({demand.key for demand in demands}) == len(demands) == 2


# -- spread -------------------------------------------------------------------------------------------------------------------


def test_spread_rotates_over_nodes_and_comes_home_in_turn() -> None:
    bench = bench_with(2, 2)
    spread = make_shape("spread", strategy=Strategy(SPREAD))
    bench.define(spread)
    bench.submit(6, spread)
    assert places(bench) == [0, 1, 2, 0, 1, 2]
    bench.submit(2, spread)
    assert len(places(bench)) == 6, "all are full"
    bench.finish(next(action.slot for action in bench.of(a.RunAt) if action.node == peer_id(2)))
    assert places(bench)[6:] == [2]


def test_spread_leaves_full_nodes_out() -> None:
    bench = bench_with(1, 4)
    bench.see_peer(1, free=0, CPU=1)
    spread = make_shape("spread", strategy=Strategy(SPREAD))
    bench.define(spread)
    bench.submit(6, spread)
    assert Counter(places(bench)) == {0: 2, 2: 4}


def test_no_lease_for_calls_that_are_spread() -> None:
    bench = bench_with(2)
    spread = make_shape("spread", strategy=Strategy(SPREAD))
    bench.define(spread, F)
    bench.tell(e.LeaseRequested(1001, 1, spread.key, b"r" * 16))
    assert not bench.of(a.GrantLease)
    bench.tell(e.LeaseRequested(1001, 1, F.key, b"r" * 16))
    assert bench.of(a.GrantLease)


# -- nodes ----------------------------------------------------------------------------------------------------------------------


def test_a_task_for_a_node_waits_for_that_node() -> None:
    bench = bench_with(1, 8)
    there = make_shape("there", strategy=Strategy(NODE, node=peer_id(1)))
    bench.define(there)
    bench.submit(3, there)
    assert places(bench) == [1]
    bench.finish(bench.of(a.RunAt)[0].slot, micros=10_000)
    assert places(bench) == [1, 1]
    assert not bench.of(a.StartWorker)[2:], "no worker is started here for what must not run here"


@pytest.mark.parametrize("soft", [False, True])
def test_a_task_for_a_node_that_dies(soft: bool) -> None:
    bench = bench_with(1)
    there = make_shape("there", strategy=Strategy(NODE, node=peer_id(1), or_elsewhere=soft))
    bench.define(there)
    tasks = bench.submit(3, there)
    assert places(bench) == [1]
    bench.tell(e.PeerGone(peer_id(1), "its port refuses"))
    if soft:
        assert Counter(places(bench)) == {1: 1, 0: 2}
        assert not bench.errors()
    else:
        assert bench.errors() == {spec.id: "TaskUnschedulableError" for spec in tasks}
        later = bench.submit(1, there)
        assert bench.errors()[later[0].id] == "TaskUnschedulableError"
        assert "its port refuses" in str(bench.of(a.SealErrors)[-1].fields["message"])
        assert not [spec for spec in tasks if bench.machine.keeps(spec.id)]


def test_a_node_nobody_knows_is_waited_for_a_moment() -> None:
    bench = bench_with()
    there = make_shape("there", strategy=Strategy(NODE, node=peer_id(3)))
    early = make_shape("early", strategy=Strategy(NODE, node=peer_id(4)))
    bench.define(there, early)
    tasks = bench.submit(1, there) + bench.submit(1, early)
    bench.tick()
    assert not bench.errors()
    bench.see_peer(4, CPU=1)
    assert places(bench) == [4]
    bench.tick(5.0)
    assert bench.errors() == {tasks[0].id: "TaskUnschedulableError"}


def test_actors_that_insist_on_a_dead_node_die() -> None:
    bench = bench_with()
    bench.tell(e.PeerGone(peer_id(3), "gone"))
    shape = make_shape("actor", ACTOR_CREATION, strategy=Strategy(NODE, node=peer_id(3)))
    bench.define(shape)
    bench.create_actor(shape)
    [down] = bench.of(a.ActorDown)
    assert down.kind == "ActorUnschedulableError"
    assert not bench.machine.node.actors.actors


def test_on_one_machine_another_node_is_refused_at_once() -> None:
    bench = Bench()
    hard, soft = Strategy(NODE, node=peer_id(3)), Strategy(NODE, node=peer_id(3), or_elsewhere=True)
    bench.define(make_shape("hard", strategy=hard), make_shape("soft", strategy=soft))
    bench.start_all()
    refused = bench.submit(1, make_shape("hard"))
    bench.submit(1, make_shape("soft"))
    assert bench.errors() == {refused[0].id: "TaskUnschedulableError"}
    assert places(bench) == [0]


def test_guests_are_run_by_the_node_that_they_were_sent_to() -> None:
    """Even when that node would have chosen otherwise."""
    from zray.task import JobSpec

    for strategy in (Strategy(SPREAD), Strategy(NODE, node=peer_id(1), or_elsewhere=True)):
        bench = bench_with(4)
        guest = make_shape("guest", strategy=strategy)
        bench.define(guest)
        bench.tell(e.JobStarted(JobSpec(1 << 31, b"j" * 16, 0, "", [], "/"), 0, guest=True))
        for _ in range(2):
            bench.tell(e.TasksSubmitted(1 << 31, 0, b"", bench.specs(1, guest), None))
        bench.start_all()
        assert places(bench) == [0, 0]


# -- labels -----------------------------------------------------------------------------------------------------------------------


def test_labels_are_a_filter_or_a_wish() -> None:
    bench = Bench(GROWING, labels={"zone": "here"})
    bench.start_all()
    bench.see_peer(1, CPU=2, labels={"zone": "east", "disk": "fast"})
    bench.see_peer(2, CPU=1, labels={"zone": "west"})
    east = make_shape("east", strategy=Strategy(hard=(Requirement("zone", IN, ("east",)),)))
    fast = make_shape("fast", strategy=Strategy(soft=(Requirement("disk", EXISTS),)))
    nowhere = make_shape("nowhere", strategy=Strategy(hard=(Requirement("zone", IN, ("moon",)),)))
    bench.define(east, fast, nowhere)
    bench.submit(1, east)
    bench.submit(3, fast)
    assert places(bench) == [1, 1, 0, 0]
    bench.submit(1, nowhere)
    assert "label zone in (moon)" in bench.of(a.Warn)[-1].text
    bench.see_peer(3, CPU=1, labels={"zone": "moon"})
    assert places(bench)[4:] == [3]


# -- least wait and locality ---------------------------------------------------------------------------------------------------


class Atlas(NothingKnown):
    """Where objects are."""

    def __init__(self, **known: tuple[float, Collection[int]]) -> None:
        self.known = {name.encode().ljust(16, b"."): found for name, found in known.items()}

    def size(self, object_id: bytes) -> int:
        return int(self.known.get(object_id, (0, ()))[0] * (1 << 20))

    def holders(self, object_id: bytes) -> Collection[bytes]:
        return [peer_id(number) for number in self.known.get(object_id, (0, ()))[1]]


def with_input(bench: Bench, name: str) -> None:
    spec = bench.specs(1, F, deps=(name.encode().ljust(16, b"."),))
    bench.tell(e.TasksSubmitted(1, 1001, b"p" * 16, spec, None))


def atlas_bench(**known: tuple[float, Collection[int]]) -> Bench:
    bench = Bench(GROWING, locations=Atlas(**known))
    bench.machine.node.bandwidth = 100 << 20
    bench.start_all()
    bench.define(F)
    for number in (1, 2, 3):
        bench.see_peer(number, CPU=2)
    return bench


def test_a_task_goes_to_its_large_input() -> None:
    bench = atlas_bench(large=(50, [2]), small=(0.1, [2]), both=(50, [0, 2]), unknown=(0, []))
    with_input(bench, "large")
    assert places(bench) == [2], "although it would fit here"
    with_input(bench, "small")
    with_input(bench, "both")
    assert places(bench) == [2, 0, 0], "home is nearest"


def test_a_task_waits_for_the_node_of_its_input_but_not_for_ever() -> None:
    """50 MiB take half a second. Node 2 is full, and its tasks are short, as far as is known."""
    bench = atlas_bench(large=(50, [2]))
    bench.see_peer(2, free=0, micros=1000, CPU=2)
    with_input(bench, "large")
    assert places(bench) == []
    bench.tick(0.1)
    assert places(bench) == []
    bench.see_peer(2, free=1, micros=1000, CPU=2)
    assert places(bench) == [2]
    bench.see_peer(2, free=0, micros=1000, CPU=2)
    with_input(bench, "large")
    for _ in range(8):
        bench.tick(0.1)
        bench.see_peer(2, free=0, micros=1000, CPU=2)
    assert places(bench) == [2, 0], "nothing ended there for longer than the input travels"


def test_a_task_does_not_wait_where_the_queue_is_long() -> None:
    bench = atlas_bench(large=(50, [2]))
    bench.see_peer(2, free=0, queued=10, micros=1_000_000, CPU=2)
    with_input(bench, "large")
    assert places(bench) == [0]


def test_the_estimate() -> None:
    node = Peer(peer_id(1), {"CPU": 4})
    node.queued, node.task_seconds = 7, 0.5
    assert expected_wait(node, 10.0) == pytest.approx(1.0)
    node.full_since = 2.0
    assert expected_wait(node, 10.0) == pytest.approx(8.0)


def test_of_two_drawn_the_one_with_the_shorter_queue_is_taken() -> None:
    policy, rng = LocalPolicy(), Random(1)
    here = Ledger({"CPU": 1}, peer_id(0))
    demand = here.demand(F.resources)
    here.take(demand)
    peers = [Peer(peer_id(number), {"CPU": 8}) for number in range(1, 5)]
    for number, peer in enumerate(peers):
        peer.queued, peer.task_seconds = number, 1.0
    chosen = Counter(policy.place(demand, [here, *peers], rng) for _ in range(600))
    assert set(chosen) == {1, 2, 3}, "the one with the longest queue loses every draw"
    assert chosen[1] > chosen[2] > chosen[3]


def test_many_who_choose_at_once_do_not_all_choose_the_same() -> None:
    """40 nodes, each with the same old report of 40 others, send one task each: no node gets a tenth of them all."""
    chosen: Counter[int] = Counter()
    for seed in range(400):
        here = Ledger({"CPU": 1}, peer_id(0))
        demand = here.demand(F.resources)
        here.take(demand)
        peers = [Peer(bytes([number]) * 16, {"CPU": 4 + number % 3}) for number in range(1, 41)]
        chosen[LocalPolicy().place(demand, [here, *peers], Random(seed))] += 1
    assert max(chosen.values()) < 40


# -- bundles ------------------------------------------------------------------------------------------------------------------------


def group(*cpus: int, nodes: tuple[int, ...]) -> e.GroupPlaced:
    spec = GroupSpec(G, 1, "SPREAD", tuple({"CPU": count * UNIT} for count in cpus))
    return e.GroupPlaced(spec, tuple(peer_id(number) for number in nodes))


def inside(bundle: int = -1) -> Strategy:
    return Strategy(GROUP, group=G, bundle=bundle)


def test_bundles_are_held_opened_used_and_given_back() -> None:
    bench = bench_with(2)
    node = bench.machine.node
    first, second, away, anywhere = (
        make_shape("first", strategy=inside(0)),
        make_shape("second", strategy=inside(1), CPU=0.5),
        make_shape("away", strategy=inside(2)),
        make_shape("anywhere", strategy=inside(), CPU=0.5),
    )
    bench.define(first, second, away, anywhere)
    assert bench.of(a.AskGroup) == [a.AskGroup(G)], "asked once"
    bench.submit(1, first)
    assert not bench.of(a.Warn), "it is only not there yet"
    bench.tell(e.BundlesWanted(G, 4, {0: {"CPU": UNIT}, 1: {"CPU": UNIT}}))
    assert bench.of(a.BundlesAnswer) == [a.BundlesAnswer(G, 4, True)]
    assert bench.machine.available()["CPU"] == 0
    assert places(bench) == [], "held, but not open"
    bench.tell(group(1, 1, 2, nodes=(0, 0, 1)))
    assert places(bench) == [0]
    bench.submit(2, away)
    bench.submit(1, away)
    assert places(bench) == [0, 1, 1]
    bench.submit(4, anywhere)
    bench.start_all()
    assert Counter(places(bench)[3:]) == {0: 2}, "half a CPU each of the one that is left here"
    bench.submit(1, second)
    assert len(places(bench)) == 5, "its bundle is in use by calls to any"
    local = [worker for worker in node.pool.busy.values() if worker.peer is None]
    bench.tell(e.GroupEnded(G, "it was removed"))
    assert {action.worker for action in bench.of(a.KillWorker)} == {worker.number for worker in local}
    assert set(bench.errors().values()) == {"TaskPlacementGroupRemoved"}
    assert bench.machine.available()["CPU"] == 0, "their processes live still"
    for worker in local:
        bench.die(worker.number)
    assert bench.machine.available() == {"CPU": 2.0}
    assert not node.bundles.held
    assert len(bench.errors()) == bench.tasks_made
    assert node.peers[peer_id(1)].total == {"CPU": 2 * UNIT}
    late = bench.submit(1, first)
    assert bench.errors()[late[0].id] == "TaskPlacementGroupRemoved"


def test_all_bundles_or_none() -> None:
    bench = bench_with()
    bench.tell(e.BundlesWanted(G, 1, {0: {"CPU": UNIT}, 1: {"CPU": 2 * UNIT}}))
    assert bench.of(a.BundlesAnswer) == [a.BundlesAnswer(G, 1, False)]
    assert bench.machine.available()["CPU"] == 2
    bench.tell(e.BundlesWanted(G, 2, {0: {"CPU": UNIT}}))
    bench.tell(e.BundlesReturned(G, 1))
    assert bench.machine.available()["CPU"] == 1, "what was given up is another attempt"
    bench.tell(e.BundlesReturned(G, 2))
    assert bench.machine.available()["CPU"] == 2
    bench.tell(e.GroupEnded(G, "it was removed"))
    bench.tell(e.BundlesWanted(G, 3, {0: {"CPU": UNIT}}))
    assert bench.of(a.BundlesAnswer)[-1] == a.BundlesAnswer(G, 3, False), "too late"


def test_leases_give_way_to_bundles() -> None:
    bench = bench_with()
    bench.define(F)
    bench.tell(e.LeaseRequested(1001, 1, F.key, b"r" * 16))
    bench.tell(e.BundlesWanted(G, 1, {0: {"CPU": 2 * UNIT}}))
    assert not bench.of(a.BundlesAnswer)[-1].accepted
    assert bench.of(a.RevokeLease)
    bench.tick(0.01)
    bench.tell(e.LeaseRequested(1001, 1, F.key, b"s" * 16))
    assert len(bench.of(a.GrantLease)) == 1
    bench.tell(e.BundlesWanted(G, 2, {0: {"CPU": 2 * UNIT}}))
    assert bench.of(a.BundlesAnswer)[-1].accepted


def test_who_waits_in_a_bundle_lends_its_share_of_it() -> None:
    bench = bench_with()
    shape = make_shape("inside", strategy=inside(0))
    bench.define(shape, F)
    bench.tell(e.BundlesWanted(G, 1, {0: {"CPU": UNIT}}))
    bench.tell(group(1, nodes=(0,)))
    bench.submit(2, shape)
    assert len(places(bench)) == 1
    bench.tell(e.WorkerBlocked(bench.of(a.RunOn)[0].worker))
    bench.start_all()
    assert len(places(bench)) == 2
    assert bench.machine.available()["CPU"] == 1, "nobody else gets it"
    bench.tell(e.WorkerUnblocked(bench.of(a.RunOn)[0].worker))


def test_gpus_of_bundles_are_theirs_alone() -> None:
    ledger = Ledger({"CPU": 4, "GPU": 2}, peer_id(0))
    gpu = b"\1\x90N\2\x90N"  # one CPU, one GPU
    plain = ledger.demand(gpu)
    bundle = ledger.demand(gpu)
    taken = ledger.choose_gpus(bundle)
    assert taken == (0,)
    ledger.take(bundle, taken)
    ledger.add(G, 0, {"CPU": UNIT, "GPU": UNIT}, taken)
    half = ledger.demand(b"\2\x88'", placing.pack(inside()))
    indexed = ledger.demand(b"\2\x88'", placing.pack(inside(0)))
    assert ledger.choose_gpus(plain) == (1,)
    assert ledger.choose_gpus(half) == ledger.choose_gpus(indexed) == (0,)
    ledger.take(half, (0,))
    ledger.take(indexed, (0,))
    assert ledger.choose_gpus(half) is ledger.choose_gpus(indexed) is None
    assert not ledger.fits(half)
    assert ledger.choose_gpus(plain) == (1,)
    ledger.give_back(half, (0,))
    ledger.give_back(indexed, (0,))
    ledger.remove(G, 0, {"CPU": UNIT, "GPU": UNIT}, taken)
    ledger.give_back(bundle, taken)
    assert ledger.gpu_free == [UNIT, UNIT]
    assert ledger.available == ledger.total == {"CPU": 4 * UNIT, "GPU": 2 * UNIT}


def test_actors_of_a_removed_group_die() -> None:
    bench = bench_with()
    shape = make_shape("actor", ACTOR_CREATION, strategy=inside(0))
    bench.define(shape)
    bench.tell(e.BundlesWanted(G, 1, {0: {"CPU": UNIT}}))
    bench.tell(group(1, nodes=(0,)))
    bench.create_actor(shape, max_restarts=-1)
    bench.create_actor(shape, max_restarts=-1)
    bench.tell(e.GroupEnded(G, "it was removed"))
    assert [action.kind for action in bench.of(a.ActorDown)] == ["ActorPlacementGroupRemoved"], "the one that waited"
    [killed] = bench.of(a.KillWorker)
    bench.die(killed.worker)
    assert len(bench.of(a.ActorDown)) == 2
    assert not bench.of(a.ActorDown)[-1].next, "it does not come back"
    assert not bench.machine.node.actors.actors
    assert bench.machine.available() == {"CPU": 2.0}


# -- another policy -----------------------------------------------------------------------------------------------------------------


class FarFirst(LocalPolicy):
    """The reverse of bottom-up: the last node in view on which it fits, home last; one task at a time."""

    def place(self, demand: Demand, nodes: Sequence[Ledger], rng: Random, inputs: Inputs | None = None) -> int:
        for index in reversed(range(len(nodes))):
            if nodes[index].fits(demand) and nodes[index].admits(demand):
                return index
        return WAIT if demand.feasible else NEVER

    def batch(self, queued: int, depth: int, takers: int) -> int:
        return 1


def test_the_policy_can_be_replaced() -> None:
    bench = Bench(GROWING, FarFirst())
    bench.start_all()
    for number in (1, 2):
        bench.see_peer(number, CPU=2)
    bench.define(F, ACTOR)
    bench.submit(7, F)
    assert places(bench) == [2, 2, 1, 1, 0, 0]
    bench.finish(bench.of(a.RunAt)[0].slot)
    assert places(bench)[6:] == [2]
    bench.finish(bench.of(a.RunAt)[2].slot)
    bench.create_actor(ACTOR)
    assert [action.node for action in bench.of(a.HostActor)] == [peer_id(1)], "actors are placed by the same policy"
