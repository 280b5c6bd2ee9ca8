"""Placement groups decided at the head and held by nodes: the real machines of both sides, joined by lossless ordered links
whose messages wait in random order; what must hold then; and faults planted to see that it is looked at."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any

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


# -- head and nodes ---------------------------------------------------------------------------------------------------------


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
        for number in range(nodes):
            self.add(number)

    def add(self, number: int) -> None:
        node = node_id(number)
        machine = Scheduler({"CPU": 3}, SchedulerConfig(debug=True, cluster_may_grow=True), own=node)
        self.nodes[node] = machine
        self.to_node[node], self.to_head[node] = deque(), deque()
        self.busy[node] = 0
        self.head.node_seen(node, {"CPU": 3 * UNIT}, {})

    def do(self, actions: list[pg.Action]) -> None:
        for action in actions:
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
        if queues is self.to_node:
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
            known = {group: placed.nodes for group, placed in machine.node.bundles.placed.items()}
            for group, spec in self.complete.items():
                assert group in known, f"nobody was told of {spec}"
            for group, nodes in known.items():
                placed = self.head.where(group)
                assert self.head.phase(group) is not None, "a node believes in a group that is gone"
                found = placed[1] if placed is not None else (b"",) * len(nodes)  # all its nodes died
                assert found == nodes, "a node looks for a bundle where it is not"


def live(seed: int, head: pg.PlacementGroups | None = None, steps: int = 150) -> World:
    """A random life: groups come and go, nodes die and join, other load comes and goes; then everything settles."""
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
            problem, actions = world.head.create(wanted, home, world.now)
            assert not problem
            world.do(actions)
        elif draw < 0.2 and groups:
            world.do(world.head.remove(group_id(rng.randint(1, groups)), "it was removed"))
        elif draw < 0.23 and len(world.nodes) > 2:
            world.kill(rng.choice(list(world.nodes)))
        elif draw < 0.26:
            fresh += 1
            world.add(10 + fresh)
            for known in list(world.head._groups):
                placed = world.head.where(known)
                if placed:  # a newcomer asks when it hears of a group; here it is told
                    world.to_node[node_id(10 + fresh)].append(e.GroupPlaced(*placed))
        elif draw < 0.27:
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


def test_whatever_fits_is_there_in_the_end() -> None:
    complete = waiting = 0
    for seed in range(60):
        world = live(1000 + seed)
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
