"""The log of an actor with checkpoints: alone, and in a small world in which process and node are killed at every step."""

from __future__ import annotations

import random
from typing import Any

import pytest

from zray.broker.actor_log import ActorLog, Entry, OutOfOrder
from zray.task import TaskSpec


def spec(number: int, args: bytes = b"") -> TaskSpec:
    return TaskSpec(number.to_bytes(16, "little"), bytes(16), args)


def entries(first: int, last: int) -> list[Entry]:
    return [Entry(spec(number)) for number in range(first, last + 1)]


def numbers(specs: list[TaskSpec]) -> list[int]:
    return [int.from_bytes(one.id, "little") for one in specs]


@pytest.fixture
def log() -> ActorLog:
    """Of an actor that saves its state after every four calls, and has done so once, with nothing in it."""
    found = ActorLog(4)
    found.saving(0, b"state 0", "held 0")
    return found


def test_calls_are_confirmed_when_they_are_in_the_log(log: ActorLog) -> None:
    assert (log.confirmed, log.saved) == (0, 0)
    log.calls(1, entries(1, 3))
    assert (log.confirmed, log.last, log.number) == (3, 3, 0)
    assert numbers(log.begun()) == [1, 2, 3]
    assert log.replayed == 3
    log.validate()


def test_a_checkpoint_ends_the_log_before_it(log: ActorLog) -> None:
    log.calls(1, entries(1, 4))
    log.saving(4, b"state 4", "held 4")
    assert (log.checkpoint, log.held, log.number, log.saved) == (b"state 4", "held 4", 4, 4)
    log.calls(5, entries(5, 5))
    assert numbers(log.begun()) == [5]
    assert (log.longest, log.checkpoints) == (4, 2)
    log.validate()


def test_news_count_when_their_objects_are_here_and_in_order(log: ActorLog) -> None:
    log.calls(1, entries(1, 1), [b"a", b"b"])
    log.saving(1, b"state 1", None, [b"state 1"])
    log.calls(2, entries(2, 2))
    assert not log.ready(b"state 1")
    assert not log.ready(b"a")
    assert (log.confirmed, log.saved) == (0, 0)
    assert log.ready(b"b")
    assert (log.confirmed, log.saved, log.last) == (2, 1, 2)
    log.validate()


def test_what_waited_when_the_actor_was_lost_never_was(log: ActorLog) -> None:
    log.calls(1, entries(1, 2))
    log.saving(2, b"state 2", None, [b"state 2"])
    log.calls(3, entries(3, 3))
    assert numbers(log.lost([spec(2), spec(3), spec(4)])) == [3, 4]
    assert numbers(list(log.unsealed.values())) == [2]
    assert not log.ready(b"state 2")
    assert numbers(log.begun()) == [1, 2]
    log.calls(3, entries(3, 3))
    log.validate()


def test_a_checkpoint_that_cannot_be_kept_leaves_the_log(log: ActorLog) -> None:
    log.calls(1, entries(1, 4))
    log.saving(4, b"state 4", None, [b"state 4"])
    assert log.spoiled(b"state 9") == -1
    assert log.spoiled(b"state 4") == 4
    assert (log.checkpoint, log.saved, log.last) == (b"state 0", 0, 4)
    log.saving(4, b"state 4 again", None)
    assert (log.checkpoint, log.saved) == (b"state 4 again", 4)
    log.validate()


def test_a_call_that_is_in_the_checkpoint_only(log: ActorLog) -> None:
    log.calls(1, entries(1, 1))
    log.saving(2, b"state 2", None)  # the second was cancelled half-way
    log.calls(3, entries(3, 3))
    assert (log.number, log.last, numbers(log.begun())) == (2, 3, [3])
    log.validate()


def test_news_that_do_not_continue_it_are_refused(log: ActorLog) -> None:
    log.calls(1, entries(1, 1))
    for first in (1, 3):
        with pytest.raises(OutOfOrder, match="1 is the last"):
            log.calls(first, entries(first, first))
    for number in (0, 3):
        with pytest.raises(OutOfOrder, match="1 is the last"):
            log.saving(number, b"state", None)
    assert log.last == 1


def test_a_copy_confirms_nothing_by_itself() -> None:
    copy = ActorLog(4, follows=True)
    copy.seed(b"state 4", "held", 4, entries(5, 6), [spec(6).id])
    assert (copy.confirmed, copy.saved, list(copy.unsealed)) == (6, 4, [spec(6).id])
    copy.calls(7, entries(7, 8))
    copy.saving(8, b"state 8", "held")
    assert (copy.confirmed, copy.saved, copy.last) == (6, 4, 8)
    copy.confirm(8, 4)
    assert (copy.confirmed, copy.saved) == (8, 4)
    copy.confirm(7, 8)
    assert (copy.confirmed, copy.saved) == (8, 8)
    copy.validate()
    copy.close()
    assert (copy.checkpoint, copy.held, len(copy.entries), copy.unsealed, copy.bytes) == (b"", None, 0, {}, 0)


# -- a world in which everything dies ---------------------------------------------------------------------------------


class World:
    """An actor whose state is the list of the calls that it has run, on a node other than its owner's; messages take their time, keep their
    order between two parties, and are lost with their sender."""

    def __init__(self, seed: int, every: int, log: type[ActorLog] = ActorLog, fault: str = "") -> None:
        self.rng = random.Random(seed)
        self.every = every
        self.make = log
        self.fault = fault
        """Of the process. early: results are sealed before they are logged; hasty: states are saved before all results are sealed; busy: calls are
        run while a checkpoint is on its way."""
        self.owner = log(every)
        self.results: dict[int, int] = {}
        """Place in the state by call: what callers were told."""
        self.objects: dict[bytes, list[int]] = {}
        """States by name: the owner's copies."""
        self.waiting = list(range(1, 41))
        """Calls that have not been sent to the present life, in order."""
        self.at_most = 0
        self.on_its_way: list[tuple[bytes, list[int]]] = []
        """States that the owner was offered and has not got."""
        self.new_node()

    # The node where it lives, and the process in it.

    def new_node(self) -> None:
        """The actor's node, if there was one, is dead; it comes to another."""
        unanswered = [call for call in range(1, 41) if call not in self.results]
        rest = numbers(self.owner.lost([spec(call) for call in unanswered]))
        self.copy = self.make(self.every, follows=True)
        self.local: dict[bytes, list[int]] = dict(self.objects)
        if self.owner.checkpoint:
            kept = [Entry(entry.spec) for entry in self.owner.entries]
            self.copy.seed(self.owner.checkpoint, None, self.owner.number, kept, list(self.owner.unsealed))
        self.to_owner: list[tuple[Any, ...]] = []
        self.sealed_there: dict[int, int] = {}
        self.new_process(rest)

    def new_process(self, rest: list[int]) -> None:
        self.inbox = rest
        self.again = numbers(self.copy.begun())
        self.at_most = max(self.at_most, len(self.again))
        self.state = list(self.local[self.copy.checkpoint]) if self.copy.checkpoint else []
        self.number = self.base = self.copy.number
        self.sent = self.copy.last
        self.held: list[tuple[int, int, int]] = []
        self.saving = -1
        if not self.copy.checkpoint:
            self.save()

    def kill_process(self) -> None:
        """What it has sealed was seen by its node, and is told; the node's copy of the log makes the next one."""
        self.report()
        answered = {*self.results, *self.sealed_there}
        rest = self.copy.lost([spec(call) for call in range(1, 41) if call not in answered])
        self.new_process(numbers(rest))

    def save(self) -> None:
        name = b"state %d %d" % (self.number, self.rng.getrandbits(60))
        self.local[name] = list(self.state)
        self.report()
        self.copy.saving(self.number, name, None)
        self.to_owner.append(("saving", self.number, name, list(self.state)))
        self.saving = self.number

    def report(self) -> None:
        """Tell the owner of results that were sealed here."""
        for call, place in self.sealed_there.items():
            if call not in self.results:
                self.to_owner.append(("ended", call, place))

    def step_process(self) -> None:
        """One step of `zray.checkpointing`."""
        while self.held and (self.fault == "early" or self.held[0][0] <= self.copy.confirmed):
            _, call, place = self.held.pop(0)
            self.sealed_there.setdefault(call, place)
        if self.saving >= 0 and self.copy.saved >= self.saving:
            self.base, self.saving = self.saving, -1
        if self.again:
            self.run(self.again.pop(0), logged=True)
        elif self.saving >= 0 and self.fault != "busy":
            pass
        elif self.number - self.base >= self.every and self.saving < 0:
            if not self.held or self.fault == "hasty":
                self.save()
        elif self.inbox:
            self.run(self.inbox.pop(0), logged=False)

    def run(self, call: int, logged: bool) -> None:
        self.state.append(call)
        self.number += 1
        if not logged:
            self.copy.calls(self.number, [Entry(spec(call))])
            self.to_owner.append(("calls", self.number, call))
        self.held.append((self.number, call, len(self.state)))

    def step_owner(self) -> None:
        """One message arrives, or the value of a checkpoint does."""
        if self.on_its_way and self.rng.random() < 0.5:
            name, value = self.on_its_way.pop(0)
            self.objects[name] = value
            self.owner.ready(name)
        elif self.to_owner:
            kind, *rest = self.to_owner.pop(0)
            if kind == "calls":
                self.owner.calls(rest[0], [Entry(spec(rest[1]))])
            elif kind == "saving":
                self.on_its_way.append((rest[1], rest[2]))
                self.owner.saving(rest[0], rest[1], None, [rest[1]])
            else:
                assert self.results.setdefault(rest[0], rest[1]) == rest[1], f"call {rest[0]} was answered twice"
        if self.rng.random() < 0.7:
            self.copy.confirm(self.owner.confirmed, self.owner.saved)
        self.owner.validate()

    def live(self, kills: int) -> None:
        """Let everything happen until all calls are answered."""
        for _ in range(100_000):
            if len(self.results) == 40:
                return
            chance = self.rng.random()
            if chance < 0.02 and kills:
                kills -= 1
                if self.rng.random() < 0.5:
                    self.on_its_way = []
                    self.new_node()
                else:
                    self.kill_process()
            elif chance < 0.5:
                self.step_process()
            elif chance < 0.6:
                self.report()
            else:
                self.step_owner()
            self.check()
        raise AssertionError("it does not end")

    def check(self) -> None:
        """What was told holds, whenever all but the owner is lost."""
        assert self.owner.checkpoint or not self.owner.entries
        made = list(self.objects[self.owner.checkpoint]) if self.owner.checkpoint else []
        made += numbers([entry.spec for entry in self.owner.entries])
        assert len(set(made)) == len(made), f"a call had its effect twice: {made}"
        for call, place in {**self.sealed_there, **self.results}.items():
            assert made[place - 1 : place] == [call], (
                f"call {call} was answered as the {place}th, but {made} would be made again"
            )
        assert len(self.owner.entries) <= self.every
        assert self.at_most <= self.every


@pytest.mark.parametrize("every", [1, 2, 5, 100])
@pytest.mark.parametrize("seed", range(12))
def test_what_was_acknowledged_is_made_again_once(seed: int, every: int) -> None:
    world = World(seed, every)
    world.live(kills=12)
    assert sorted(world.results) == list(range(1, 41))
    assert sorted(world.results.values()) == list(range(1, 41)), "every call has a place of its own in the state"


class TrimsTooEarly(ActorLog):
    """Forgets the log as soon as it hears of a checkpoint."""

    def saving(self, number: int, name: bytes, held: object, missing: Any = ()) -> None:
        super().saving(number, name, held, missing)
        while self.entries and self.number < number:
            self.bytes -= self.entries.popleft().size
            self.number += 1


class Reverses(ActorLog):
    """Gives the calls in another order."""

    def begun(self) -> list[TaskSpec]:
        return super().begun()[::-1]


class NeverTrims(ActorLog):
    """Keeps the log behind a checkpoint."""

    def _take_in(self, news: Any) -> None:
        kept = list(self.entries) if news.name else []
        super()._take_in(news)
        self.entries.extendleft(reversed(kept))
        self.bytes = sum(entry.size for entry in self.entries)


class RunsAgain(ActorLog):
    """Takes what was logged and not answered for what never ran."""

    def lost(self, orphans: list[TaskSpec]) -> list[TaskSpec]:
        super().lost(orphans)
        return orphans


class ConfirmsWhatWaits(ActorLog):
    """Confirms a checkpoint before its value is there."""

    def saving(self, number: int, name: bytes, held: object, missing: Any = ()) -> None:
        super().saving(number, name, held)


class OvertakesCheckpoints(ActorLog):
    """Confirms calls that wait behind a checkpoint."""

    def calls(self, first: int, entries: list[Entry], missing: Any = ()) -> None:
        super().calls(first, entries, missing)
        self.confirm(first + len(entries) - 1, self.saved)


@pytest.mark.parametrize(
    ("log", "fault"),
    [
        (TrimsTooEarly, ""),
        (Reverses, ""),
        (NeverTrims, ""),
        (RunsAgain, ""),
        (ConfirmsWhatWaits, ""),
        (OvertakesCheckpoints, ""),
        (ActorLog, "early"),
        (ActorLog, "hasty"),
        (ActorLog, "busy"),
    ],
)
def test_faults_are_found(log: type[ActorLog], fault: str) -> None:
    found = 0
    for seed in range(8):
        world = World(seed, 5, log, fault)
        try:
            world.live(kills=12)
        except (AssertionError, OutOfOrder, KeyError):
            found += 1
    assert found, "nobody noticed"
