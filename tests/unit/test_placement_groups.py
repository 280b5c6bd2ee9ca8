"""Placement groups decided at the head and held by nodes: the real machines of both sides, joined by lossless ordered links
whose messages wait in random order; heads that die and are followed by others; what must hold then; and faults planted to see
that it is looked at."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any, NamedTuple

import pytest

from zray.broker import actions as a
from zray.broker import events as e
from zray.broker import placement_groups as pg
from zray.broker.bundles import Bundle
from zray.broker.group_events import GroupEvents
from zray.broker.packing import Room, Wanted, pack
from zray.broker.scheduler import Scheduler, SchedulerConfig
from zray.placing import GroupSpec, is_of_group
from zray.resources import UNIT

CPU = {"CPU": UNIT}


def node_id(number: int) -> bytes:
    return bytes([number + 1]) * 16


def group_id(number: int) -> bytes:
    return b"group" + number.to_bytes(11, "big")


def spec(number: int, *cpus: int, strategy: str = "PACK", job: int = 1, **more: Any) -> GroupSpec:
    return GroupSpec(group_id(number), job, strategy, tuple({"CPU": count * UNIT} for count in cpus), **more)


# -- the head alone -------------------------------------------------------------------------------------------------------


@pytest.fixture
def head() -> pg.PlacementGroups:
    """A head that knows of three nodes with two CPUs each."""
    machine = pg.PlacementGroups()
    for number in range(3):
        machine.node_seen(node_id(number), {"CPU": 2 * UNIT}, {})
    return machine


def wish(head: pg.PlacementGroups, group: GroupSpec, home: bytes = b"driver's") -> list[pg.Action]:
    problem, actions = head.create(group, home, 0.0)
    assert not problem
    head.validate()
    return actions


def reserves(actions: list[pg.Action]) -> list[pg.Reserve]:
    return [action for action in actions if isinstance(action, pg.Reserve)]


def test_a_group_is_announced_when_every_node_holds_its_part(head: pg.PlacementGroups) -> None:
    asked = reserves(wish(head, spec(1, 1, 1, 1, strategy="STRICT_SPREAD")))
    assert {action.node for action in asked} == {node_id(number) for number in range(3)}
    assert head.phase(group_id(1)) == pg.Phase.PREPARING
    for action in asked[:2]:
        assert head.answered(action.node, action.group, action.attempt, True, 1.0) == []
        assert head.where(group_id(1)) is None
    [announced] = head.answered(asked[2].node, asked[2].group, asked[2].attempt, True, 1.0)
    assert isinstance(announced, pg.Announce)
    assert announced.complete
    assert sorted(announced.nodes) == [node_id(number) for number in range(3)]


def test_a_refusal_gives_everything_back_and_is_tried_again(head: pg.PlacementGroups) -> None:
    asked = reserves(wish(head, spec(1, 2, 2)))
    head.answered(asked[0].node, asked[0].group, asked[0].attempt, True, 1.0)
    back = head.answered(asked[1].node, asked[1].group, asked[1].attempt, False, 1.0)
    assert {action.node for action in back if isinstance(action, pg.GiveBack)} == {action.node for action in asked}
    assert head.tick(1.0) == []
    again = reserves(head.tick(2.0))
    assert again
    assert again[0].attempt > asked[0].attempt
    assert head.answered(asked[0].node, asked[0].group, asked[0].attempt, True, 2.0) == [], "an answer of the past"
    assert head.phase(group_id(1)) == pg.Phase.PREPARING


def test_what_is_removed_while_it_is_prepared(head: pg.PlacementGroups) -> None:
    asked = reserves(wish(head, spec(1, 2, 2)))
    out = head.remove(group_id(1), "it was removed")
    assert [type(action) for action in out] == [pg.GiveBack, pg.GiveBack, pg.Withdraw]
    for action in asked:
        assert head.answered(action.node, action.group, action.attempt, True, 1.0) == []
    assert head.why_gone(group_id(1)) == "it was removed"
    assert head.why_gone(group_id(9)) == "there is no placement group with this id"


def test_groups_that_fit_nowhere_are_told_of_once_and_wait(head: pg.PlacementGroups) -> None:
    [warned] = wish(head, spec(1, 3))
    assert isinstance(warned, pg.Infeasible)
    assert "{CPU: 3}" in warned.text
    head.capacity(node_id(0), {"CPU": UNIT})
    head.capacity(node_id(0), {"CPU": 2 * UNIT})
    assert head.tick(1.0) == []
    head.node_seen(node_id(7), {"CPU": 4 * UNIT}, {})
    [reserve] = reserves(head.tick(2.0))
    assert reserve.node == node_id(7)


def test_groups_that_fit_later_wait_without_a_word(head: pg.PlacementGroups) -> None:
    for number in range(3):
        head.capacity(node_id(number), {"CPU": UNIT})
    assert wish(head, spec(1, 2)) == []
    assert head.tick(1.0) == []
    head.capacity(node_id(1), {"CPU": 2 * UNIT})
    assert [action.node for action in reserves(head.tick(1.0))] == [node_id(1)]


def test_lost_bundles_are_placed_again_beside_those_that_are_left(head: pg.PlacementGroups) -> None:
    asked = reserves(wish(head, spec(1, 1, 1, strategy="STRICT_SPREAD")))
    for action in asked:
        head.answered(action.node, action.group, action.attempt, True, 1.0)
    lost, kept = asked[0].node, asked[1].node
    out = head.node_gone(lost, "its port refuses", 2.0)
    assert isinstance(out[0], pg.Announce)
    assert not out[0].complete
    assert out[0].nodes.count(b"") == 1
    [again] = reserves(out)
    assert again.node not in (lost, kept), "strictly spread: not where the other one is"
    assert len(again.bundles) == 1
    [announced] = head.answered(again.node, again.group, again.attempt, True, 3.0)
    assert isinstance(announced, pg.Announce)
    assert announced.complete
    head.validate()


def test_groups_end_with_their_jobs_and_with_the_nodes_of_their_drivers(head: pg.PlacementGroups) -> None:
    wish(head, spec(1, 1, job=5))
    wish(head, spec(2, 1, job=5, detached=True), node_id(0))
    wish(head, spec(3, 1, job=6), node_id(0))
    gone = [action.spec.id for action in head.job_ended(5) if isinstance(action, pg.Withdraw)]
    assert gone == [group_id(1)]
    gone = [action.spec.id for action in head.node_gone(node_id(0), "gone", 1.0) if isinstance(action, pg.Withdraw)]
    assert gone == [group_id(3)]
    assert head.phase(group_id(2)) is not None


def test_wishes_that_are_wrong(head: pg.PlacementGroups) -> None:
    wish(head, spec(1, 1, name="one"))
    for wrong, text in (
        (spec(2, 1, name="one"), "taken"),
        (spec(3), "bundles"),
        (spec(4, 1, strategy="SOMEHOW"), "STRICT_PACK"),
        (spec(5, 1, labels=((), ())), "selectors"),
    ):
        problem, actions = head.create(wrong, node_id(0), 0.0)
        assert text in problem
        assert actions == []
    head.remove(group_id(1), "it was removed")
    assert head.create(spec(2, 1, name="one"), node_id(0), 0.0)[0] == "", "the name is free again"
    assert "gone" in head.create(spec(1, 1), node_id(0), 0.0)[0], "ids never come back"


# -- a head that follows another one ----------------------------------------------------------------------------------------


def follow(kept: list[pg.Kept], nodes: int = 3, there: tuple[bytes, ...] = (b"driver's",)) -> tuple[Any, list[Any]]:
    """The second head of a cluster, to which these nodes still have to report, and what it did at once."""
    machine = pg.PlacementGroups(2)
    names = [node_id(number) for number in range(nodes)]
    for name in names:
        machine.node_seen(name, {"CPU": 2 * UNIT}, {})
    out = machine.take_over(kept, [*names, *there], 10.0)
    machine.validate()
    return machine, out


def kept(number: int, *nodes: int | None, home: bytes = b"driver's", gone: str = "", **more: Any) -> pg.Kept:
    """A group with bundles of one CPU; `nodes` is empty for one that was not placed, None stands for a lost bundle."""
    places = tuple(b"" if node is None else node_id(node) for node in nodes)
    return pg.Kept(spec(number, *[1] * max(2, len(nodes)), **more), home, places, gone)


def held(number: int, index: int, attempt: int = 1, is_open: bool = True) -> pg.Held:
    return pg.Held(group_id(number), index, attempt, is_open)


def test_groups_on_living_nodes_go_on_under_the_next_head() -> None:
    head, out = follow([kept(1, 0, 1), kept(2, gone="it was removed"), kept(3, name="three")])
    assert out == []
    assert head.where(group_id(1)) == (spec(1, 1, 1), (node_id(0), node_id(1)))
    assert head.phase(group_id(1)) == pg.Phase.CREATED
    assert head.why_gone(group_id(2)) == "it was removed"
    assert "taken" in head.create(spec(4, 1, name="three"), b"driver's", 10.0)[0]
    assert head.reported(node_id(0), [held(1, 0)], [], 10.0) == []
    assert head.reported(node_id(1), [held(1, 1)], [], 10.0) == []
    assert head.phase(group_id(3)) == pg.Phase.PENDING, "one node has not reported, which may have the most room"
    assert reserves(head.reported(node_id(2), [], [], 10.1)), "all have reported"


def test_bundles_of_the_dead_head_are_placed_again() -> None:
    head, [announced] = follow([kept(1, 7, 1)])
    assert announced.nodes == (b"", node_id(1))
    assert not announced.complete
    head.reported(node_id(0), [], [], 10.0)
    head.reported(node_id(1), [held(1, 1)], [], 10.0)
    assert head.wake_at == 12.0
    assert head.tick(11.9) == []
    [again] = reserves(head.tick(12.0))
    assert again.node in (node_id(0), node_id(1)), "nothing is placed where nobody has said what is held"
    assert again.attempt > 2 * pg.ATTEMPTS_A_LIFE
    [announced] = head.answered(again.node, again.group, again.attempt, True, 12.0)
    assert announced.complete


def test_what_the_last_head_prepared_is_given_back() -> None:
    head, _ = follow([kept(1), kept(2, 0, None)])
    out = head.reported(node_id(0), [held(1, 0, 5, False), held(2, 0)], [], 10.0)
    out += head.reported(node_id(1), [held(1, 1, 5, False), held(2, 1, 6, False)], [], 10.0)
    assert [(action.node, action.group, action.attempt) for action in out] == [
        (node_id(0), group_id(1), 5),
        (node_id(1), group_id(1), 5),
        (node_id(1), group_id(2), 6),
    ]
    assert {action.group for action in reserves(head.reported(node_id(2), [], [], 10.0))} == {group_id(1), group_id(2)}


def test_what_the_last_head_had_stored_but_not_announced_counts() -> None:
    head, _ = follow([kept(1, 0, 1)])
    assert head.reported(node_id(0), [held(1, 0, 5, False)], [], 10.0) == [], "it will be opened"
    assert head.phase(group_id(1)) == pg.Phase.CREATED


def test_bundles_that_are_not_where_the_row_says_and_the_other_way_round() -> None:
    head, _ = follow([kept(1, 0, 1), kept(2)])
    out = head.reported(node_id(0), [], [], 10.0)
    assert [action.nodes for action in out if isinstance(action, pg.Announce)] == [(b"", node_id(1))]
    out = head.reported(node_id(1), [held(1, 1), held(2, 0), held(2, 1)], [], 10.0)
    assert [action.complete for action in out if isinstance(action, pg.Announce)] == [False, True]
    assert head.where(group_id(2)) == (spec(2, 1, 1), (node_id(1), node_id(1)))
    head.validate()


def test_jobs_that_ended_while_there_was_no_head_and_drivers_that_died_with_it() -> None:
    head, out = follow(
        [kept(1, 0, 1, home=node_id(8)), kept(2, 0, 1, home=node_id(8), detached=True), kept(3, 1, 1, job=5)]
    )
    assert [action.spec.id for action in out] == [group_id(1)]
    assert isinstance(out[0], pg.Withdraw)
    assert "driver is dead" in str(head.why_gone(group_id(1)))
    [withdrawn] = head.reported(node_id(0), [held(1, 0), held(2, 0)], [5], 10.0)
    assert (withdrawn.spec.id, withdrawn.reason) == (group_id(3), "its job is over")
    assert head.phase(group_id(2)) == pg.Phase.CREATED


def test_a_node_that_dies_instead_of_reporting_is_not_waited_for() -> None:
    head, _ = follow([kept(1, 0, 2)])
    head.reported(node_id(0), [held(1, 0)], [], 10.0)
    head.reported(node_id(1), [], [], 10.0)
    out = head.node_gone(node_id(2), "its port refuses", 10.1)
    assert [type(action) for action in out] == [pg.Announce, pg.Reserve]


def test_a_client_that_dies_takes_its_groups_along(head: pg.PlacementGroups) -> None:
    wish(head, spec(1, 1), b"a client's node,")
    gone = [
        action.spec.id for action in head.node_gone(b"a client's node,", "gone", 1.0) if isinstance(action, pg.Withdraw)
    ]
    assert gone == [group_id(1)]


# -- head and nodes ---------------------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """What a node tells the next head."""

    held: list[pg.Held]
    known: list[bytes]
    free: dict[str, int]


class World:
    """A head and its nodes. Messages between two of them keep their order; nothing else is sure."""

    def __init__(self, seed: int, nodes: int, head: pg.PlacementGroups) -> None:
        self.rng = Random(seed)
        self.now = 1.0
        self.head = head
        self.nodes: dict[bytes, Scheduler] = {}
        self.to_node: dict[bytes, deque[Any]] = {}
        self.to_head: dict[bytes, deque[Any]] = {}
        self.complete: dict[bytes, GroupSpec] = {}
        self.busy: dict[bytes, int] = {}
        self.rows: dict[bytes, pg.Kept] = {}
        """What the next head finds."""
        self.life = 0
        for number in range(nodes):
            self.add(number)

    def add(self, number: int) -> None:
        node = node_id(number)
        machine = Scheduler({"CPU": 3}, SchedulerConfig(debug=True, cluster_may_grow=True), own=node)
        self.nodes[node] = machine
        self.to_node[node], self.to_head[node] = deque(), deque()
        self.busy[node] = 0
        self.head.node_seen(node, {"CPU": 3 * UNIT}, {})

    def create(self, wanted: GroupSpec, home: bytes) -> None:
        problem, actions = self.head.create(wanted, home, self.now)
        assert not problem
        self.rows[wanted.id] = pg.Kept(wanted, home, ())
        self.do(actions)

    def do(self, actions: list[pg.Action]) -> None:
        for action in actions:
            if isinstance(action, pg.Announce):
                self.rows[action.spec.id] = self.rows[action.spec.id]._replace(nodes=action.nodes)
            elif isinstance(action, pg.Withdraw):
                self.rows[action.spec.id] = self.rows[action.spec.id]._replace(nodes=(), gone=action.reason)
            if isinstance(action, pg.Reserve):
                self.to_node[action.node].append(e.BundlesWanted(action.group, action.attempt, action.bundles))
            elif isinstance(action, pg.GiveBack):
                self.to_node[action.node].append(e.BundlesReturned(action.group, action.attempt))
            elif isinstance(action, pg.Announce):
                if action.complete:
                    self.complete[action.spec.id] = action.spec
                    for index, node in enumerate(action.nodes):
                        held = self.nodes[node].node.bundles.held if node in self.nodes else None
                        assert held is None or (action.spec.id, index) in held, "announced, but it is not held"
                else:
                    self.complete.pop(action.spec.id, None)
                for queue in self.to_node.values():
                    queue.append(e.GroupPlaced(action.spec, action.nodes))
            elif isinstance(action, pg.Withdraw):
                self.complete.pop(action.spec.id, None)
                for queue in self.to_node.values():
                    queue.append(e.GroupEnded(action.spec.id, action.reason))
        self.head.validate()

    def free(self, node: bytes) -> dict[str, int]:
        found = self.nodes[node].node.ledger.available
        return {name: max(0, units) for name, units in found.items() if not is_of_group(name)}

    def deliver(self) -> bool:
        """One message; False when none is under way."""
        ways = [(self.to_node, node) for node in self.nodes if self.to_node[node]]
        ways += [(self.to_head, node) for node in self.nodes if self.to_head[node]]
        if not ways:
            return False
        queues, node = self.rng.choice(ways)
        message = queues[node].popleft()
        self.now += 0.001
        if queues is self.to_head and isinstance(message, Report):
            self.take_report(node, message)
        elif queues is self.to_node:
            for action in self.nodes[node].handle(message, self.now):
                if isinstance(action, a.BundlesAnswer):
                    self.to_head[node].append((action, self.free(node)))
                elif isinstance(action, a.TellFree):
                    self.to_head[node].append((None, self.free(node)))
        else:
            answer, free = message
            self.head.capacity(node, free)
            if answer is not None:
                self.do(self.head.answered(node, answer.group, answer.attempt, answer.accepted, self.now))
        return True

    def load(self, node: bytes) -> None:
        """Something else begins or ends on a node, of which the head hears later."""
        ledger = self.nodes[node].node.ledger
        demand = ledger.demand(b"\1\x90N")  # one CPU
        bundles = self.nodes[node].node.bundles
        if self.busy[node] and self.rng.random() < 0.5:
            self.busy[node] -= 1
            bundles.held.pop((b"load", self.busy[node]))
            ledger.give_back(demand)
        elif ledger.fits(demand):
            ledger.take(demand)
            bundles.held[b"load", self.busy[node]] = Bundle(b"load", self.busy[node], 0, CPU, demand, ())
            self.busy[node] += 1
        self.to_head[node].append((None, self.free(node)))

    def kill(self, node: bytes) -> None:
        del self.nodes[node], self.to_node[node], self.to_head[node]
        self.do(self.head.node_gone(node, "killed", self.now))
        for queue in self.to_node.values():
            queue.append(e.PeerGone(node, "killed"))

    def succeed(self, victim: bytes) -> None:
        """The head dies with its node; what it has said arrives in part. Another one begins with the rows, and the nodes report."""
        del self.nodes[victim], self.to_node[victim], self.to_head[victim]
        self.life += 1
        self.head = type(self.head)(self.life)
        for node, machine in self.nodes.items():
            queue = self.to_node[node]
            for _ in range(self.rng.randint(0, len(queue))):
                machine.handle(queue.popleft(), self.now)
            queue.clear()
            self.to_head[node].clear()
            queue.append(e.PeerGone(victim, "killed"))
            self.head.node_seen(node, {"CPU": 3 * UNIT}, {})
        self.do(self.head.take_over(list(self.rows.values()), list(self.nodes), self.now))
        self.complete = {row.spec.id: row.spec for row in self.rows.values() if row.nodes and all(row.nodes)}
        for node, machine in self.nodes.items():
            table = machine.node.bundles
            own = [bundle for bundle in table.held.values() if bundle.group != b"load"]
            bundles = [pg.Held(bundle.group, bundle.index, bundle.attempt, bundle.is_open) for bundle in own]
            known = [group for group in table.known() if group != b"load"]
            self.to_head[node].append(Report(bundles, known, self.free(node)))

    def take_report(self, node: bytes, report: Report) -> None:
        self.head.capacity(node, report.free)
        self.do(self.head.reported(node, report.held, [], self.now))
        for group in report.known:
            gone, placed = self.head.why_gone(group), self.head.where(group, or_nowhere=True)
            if gone is not None:
                self.to_node[node].append(e.GroupEnded(group, gone))
            elif placed is not None:
                self.to_node[node].append(e.GroupPlaced(*placed))

    def settle(self) -> None:
        """Let everything end that is under way; other load goes."""
        for node in self.nodes:
            while self.busy[node]:
                self.load(node)
        for _ in range(40):
            while self.deliver():
                pass
            self.now += 5.0
            for node in self.nodes:
                self.head.capacity(node, self.free(node))
            self.do(self.head.tick(self.now))
        while self.deliver():
            pass

    def check(self) -> None:
        """What nodes hold is what the head has announced, no more and no less, and everybody knows where it is."""
        held = {
            (group, index): node
            for node, machine in self.nodes.items()
            for (group, index), bundle in machine.node.bundles.held.items()
            if bundle.is_open or group != b"load"
        }
        count = sum(len(machine.node.bundles.held) for machine in self.nodes.values())
        assert count == len(held), "a bundle is held twice"
        wanted: dict[tuple[bytes, int], bytes] = {}
        for group in self.head._groups:
            placed = self.head.where(group)
            for index, node in enumerate(placed[1] if placed else ()):
                if node:
                    wanted[group, index] = node
        assert held == wanted, "what is held is not what is announced"
        for machine in self.nodes.values():
            machine.validate()
            assert all(bundle.is_open for bundle in machine.node.bundles.held.values()), "a bundle waits for nobody"
            known = {group: placed.nodes for group, placed in machine.node.bundles.placed.items()}
            for group, spec in self.complete.items():
                # (What the last head did not come to say, a node asks for when a call names the group.)
                assert group in known or self.life, f"nobody was told of {spec}"
            for group, nodes in known.items():
                placed = self.head.where(group)
                assert self.head.phase(group) is not None, "a node believes in a group that is gone"
                found = placed[1] if placed is not None else (b"",) * len(nodes)  # all its nodes died
                assert found == nodes, "a node looks for a bundle where it is not"


def live(seed: int, head: pg.PlacementGroups | None = None, steps: int = 150, heads_die: bool = False) -> World:
    """A random life: groups come and go, nodes (and heads) die and join, other load comes and goes; then everything settles."""
    world = World(seed, 4, head or pg.PlacementGroups())
    rng = world.rng
    groups = fresh = 0
    for _ in range(steps):
        draw = rng.random()
        if draw < 0.12:
            groups += 1
            sizes = [rng.randint(1, 2) for _ in range(rng.randint(1, 3))]
            strategy = rng.choice(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"])
            home = rng.choice(list(world.nodes))
            wanted = spec(groups, *sizes, strategy=strategy, job=rng.randint(1, 3), detached=rng.random() < 0.5)
            world.create(wanted, home)
        elif draw < 0.2 and groups:
            world.do(world.head.remove(group_id(rng.randint(1, groups)), "it was removed"))
        elif draw < 0.23 and len(world.nodes) > 2:
            world.kill(rng.choice(list(world.nodes)))
        elif draw < 0.25 and len(world.nodes) > 2 and heads_die:
            world.succeed(rng.choice(list(world.nodes)))
        elif draw < 0.28:
            fresh += 1
            world.add(10 + fresh)
            for known in list(world.head._groups):
                placed = world.head.where(known)
                if placed:  # a newcomer asks when it hears of a group; here it is told
                    world.to_node[node_id(10 + fresh)].append(e.GroupPlaced(*placed))
        elif draw < 0.29:
            world.do(world.head.job_ended(rng.randint(1, 3)))
        elif draw < 0.45:
            world.load(rng.choice(list(world.nodes)))
        elif draw < 0.5:
            world.now += 0.1
            world.do(world.head.tick(world.now))
        else:
            world.deliver()
    world.settle()
    world.check()
    return world


@pytest.mark.parametrize("seed", range(60))
def test_random_lives_end_in_agreement(seed: int) -> None:
    live(seed)


@pytest.mark.parametrize("seed", range(100))
def test_random_lives_with_heads_that_die_end_in_agreement(seed: int) -> None:
    live(seed, heads_die=True)


@pytest.mark.parametrize("heads_die", [False, True])
def test_whatever_fits_is_there_in_the_end(heads_die: bool) -> None:
    complete = waiting = 0
    for seed in range(60):
        world = live(1000 + seed, heads_die=heads_die)
        complete += len(world.complete)
        rooms = [Room(node, world.free(node), {}) for node in world.nodes]
        for group in world.head._groups.values():
            assert group.phase in (pg.Phase.CREATED, pg.Phase.PENDING, pg.Phase.RESCHEDULING)
            if group.phase != pg.Phase.CREATED:
                waiting += 1
                wanted = [Wanted(index, group.spec.bundles[index]) for index in group.missing()]
                present = [node for node in group.nodes if node]
                assert pack(group.spec.strategy, wanted, rooms, present) is None, f"{group} would fit"
    assert complete > 100
    assert waiting > 5


class LeaksAfterRefusal(pg.PlacementGroups):
    def _give_up(self, group: Any, refuser: bytes = b"") -> list[pg.Action]:
        return super()._give_up(group, refuser)[1:]


class ReadyBeforeAllAnswered(pg.PlacementGroups):
    def answered(self, node: bytes, group_id: bytes, attempt: int, accepted: bool, now: float) -> list[pg.Action]:
        group = self._groups.get(group_id)
        if group is not None and accepted and group.attempt == attempt:
            group.unanswered = {node} & group.unanswered
        return super().answered(node, group_id, attempt, accepted, now)


class TakesAnswersOfThePast(pg.PlacementGroups):
    def answered(self, node: bytes, group_id: bytes, attempt: int, accepted: bool, now: float) -> list[pg.Action]:
        group = self._groups.get(group_id)
        return super().answered(node, group_id, group.attempt if group is not None else attempt, accepted, now)


class ForgetsWhatItPreparesOnRemoval(pg.PlacementGroups):
    def remove(self, group_id: bytes, reason: str) -> list[pg.Action]:
        return [action for action in super().remove(group_id, reason) if not isinstance(action, pg.Withdraw)]


class BelievesInTheDead(pg.PlacementGroups):
    def node_gone(self, node: bytes, reason: str, now: float) -> list[pg.Action]:
        if any(node in group.nodes for group in self._groups.values()):
            self._members.pop(node, None)
            return []
        return super().node_gone(node, reason, now)


class TellsNobodyOfLosses(pg.PlacementGroups):
    def node_gone(self, node: bytes, reason: str, now: float) -> list[pg.Action]:
        found = super().node_gone(node, reason, now)
        return [action for action in found if not isinstance(action, pg.Announce)]


@pytest.mark.parametrize(
    "faulty",
    [
        LeaksAfterRefusal,
        ReadyBeforeAllAnswered,
        TakesAnswersOfThePast,
        ForgetsWhatItPreparesOnRemoval,
        BelievesInTheDead,
        TellsNobodyOfLosses,
    ],
)
def test_planted_faults_of_the_head_are_found(faulty: type[pg.PlacementGroups]) -> None:
    for seed in range(100):
        try:
            live(seed, faulty())
        except (AssertionError, KeyError):
            return
    pytest.fail(f"{faulty.__name__} was not found in 100 lives")


def _keeps_what_is_returned(self: GroupEvents, event: e.BundlesReturned, now: float) -> None:
    pass


def _ends_only_what_is_open(self: GroupEvents, event: e.GroupEnded, now: float) -> None:
    if any(bundle.is_open for bundle in self.node.bundles.of(event.group)):
        _ended(self, event, now)


_ended = GroupEvents.ended


@pytest.mark.parametrize(
    ("method", "fault"),
    [("returned", _keeps_what_is_returned), ("ended", _ends_only_what_is_open)],
)
def test_planted_faults_of_nodes_are_found(monkeypatch: pytest.MonkeyPatch, method: str, fault: Any) -> None:
    monkeypatch.setattr(GroupEvents, method, fault)
    for seed in range(100):
        try:
            live(seed)
        except (AssertionError, KeyError):
            return
    pytest.fail(f"{fault.__name__} was not found in 100 lives")


class KeepsWhatTheLastHeadPrepared(pg.PlacementGroups):
    def _settle(self, *_: Any) -> list[pg.Action]:
        return []


class CountsAttemptsFromTheBeginning(pg.PlacementGroups):
    def __init__(self, life: int = 0) -> None:
        super().__init__(0)


class BelievesRowsMoreThanDeaths(pg.PlacementGroups):
    def take_over(self, kept: Any, there: Any, now: float) -> list[pg.Action]:
        for group in kept:
            for node in group.nodes:
                if node:
                    self.node_seen(node, {"CPU": 3 * UNIT}, {})
        return super().take_over(kept, there, now)


class PlacesBeforeNodesHaveReported(pg.PlacementGroups):
    def take_over(self, kept: Any, there: Any, now: float) -> list[pg.Action]:
        out = super().take_over(kept, there, now)
        for member in self._members.values():
            member.reported = True
        return out + self._try_all(now)

    def reported(self, node: bytes, held: Any, over: Any, now: float) -> list[pg.Action]:
        return []


@pytest.mark.parametrize(
    "faulty",
    [
        KeepsWhatTheLastHeadPrepared,
        CountsAttemptsFromTheBeginning,
        BelievesRowsMoreThanDeaths,
        PlacesBeforeNodesHaveReported,
    ],
)
def test_planted_faults_of_heads_that_follow_are_found(faulty: type[pg.PlacementGroups]) -> None:
    for seed in range(100):
        try:
            live(seed, faulty(), heads_die=True)
        except (AssertionError, KeyError):
            return
    pytest.fail(f"{faulty.__name__} was not found in 100 lives")
