"""Which values get a second copy: `zray.broker.second_copies`, alone and in a small world of nodes that die."""

from __future__ import annotations

import random

import pytest

from zray import ids
from zray.broker.second_copies import UNDER_WAY, Copy, Hold, Release, SecondCopies

OWN, A, B, C = (bytes([number]) * 16 for number in range(4))
SPEED = 200e6
SIZE = 320_000
BOUND = 0.5


def _task(number: int) -> bytes:
    return ids.task_id(b"root" * 4, number)


def _value(number: int) -> bytes:
    return ids.return_id(_task(number), 0)


class Owner:
    """What holds the machine in a test: tasks by number, the values that exist, and which are held."""

    def __init__(self, bound: float = BOUND, room: int = 1 << 40, arrive: bool = True) -> None:
        self.machine = SecondCopies(OWN, bound, room)
        self.arrive = arrive
        """Whether copies come at once."""
        self.seconds: dict[int, float] = {}
        self.inputs: dict[int, tuple[int, ...]] = {}
        self.places: dict[int, tuple[bytes, ...]] = {}
        """Of values that exist."""
        self.referenced: set[int] = set()
        self.remembered: set[bytes] = set()
        """Tasks."""
        self.held: set[int] = set()
        self.copied: list[int] = []

    def obey(self, actions: list[Copy | Hold | Release]) -> None:
        """Do what the machine says; then what is neither referenced nor held goes."""
        numbers = {_value(number): number for number in self.inputs}
        refused: list[int] = []
        """They are about to go, which the machine cannot know."""
        for action in actions:
            number = numbers[action.object]
            if isinstance(action, Copy):
                assert OWN not in self.places.get(number, ()), "nothing is copied twice"
                (self.copied if number in self.referenced else refused).append(number)
            elif isinstance(action, Hold):
                assert number not in self.held
                assert number in self.places, "what is held has not gone"
                self.held.add(number)
            else:
                self.held.discard(number)
        self.machine.validate()
        for number in refused:
            self.obey(self.machine.placed(_value(number), self.places.get(number, ())))
        if self.arrive:
            for action in actions:
                if isinstance(action, Copy):
                    self.come(numbers[action.object])
        self.free()

    def come(self, number: int) -> None:
        if number in self.places:
            self.places[number] = (OWN, *self.places[number])
            self.obey(self.machine.placed(_value(number), self.places[number]))

    def free(self) -> None:
        gone = next((n for n in self.places if n not in self.referenced and n not in self.held), None)
        if gone is not None:
            del self.places[gone]
            self.obey(self.machine.freed(_value(gone)))  # and so on

    def send(self, number: int, *inputs: int, seconds: float = 0.1) -> None:
        self.inputs[number] = inputs
        self.seconds[number] = seconds
        deps = [_value(i) for i in inputs]
        self.remembered.add(_task(number))
        self.obey(self.machine.sent(_task(number), deps, self.remembered.__contains__, lambda name: False))

    def end(self, number: int, node: bytes = A, size: int = SIZE) -> None:
        self.places[number] = (node,)
        self.referenced.add(number)
        kept = {_value(number): (size, (node,))}
        self.obey(self.machine.ended(_task(number), self.seconds[number], kept, SPEED))

    def make(self, number: int, *inputs: int, node: bytes = A, seconds: float = 0.1, size: int = SIZE) -> None:
        self.send(number, *inputs, seconds=seconds)
        self.end(number, node, size)

    def drop(self, *numbers: int) -> None:
        self.referenced -= set(numbers)
        self.free()

    def chain(self, length: int, window: int = 1, first: int = 0, node: bytes = A) -> None:
        for number in range(first, first + length):
            self.make(number, *([number - 1] if number else []), node=node)
            self.drop(*range(number - window + 1))

    def worst(self) -> float:
        """The most seconds until a referenced value is there again after a death, computed from nothing but what is where."""
        worst = 0.0
        for node in (A, B, C):
            rebuild: dict[int, float] = {}
            for number, inputs in self.inputs.items():
                safe = set(self.places.get(number, ())) - {node}
                inputs_s = max([rebuild[i] for i in inputs], default=0.0)
                rebuild[number] = 0.0 if safe else self.seconds[number] + inputs_s
            worst = max([worst, *(rebuild[number] for number in self.referenced)])
        return worst


# -- the bound ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_a_chain_is_copied_once_per_bound(window: int) -> None:
    """Whether its values are dropped at once, or a few are kept; and a copy is held until the next one serves for all."""
    owner = Owner()
    for number in range(100):
        owner.chain(1, window, number)
        assert owner.worst() <= BOUND + 1e-9
        assert len(owner.held) <= (1 if window == 1 else 2)
    assert owner.copied == list(range(5, 100, 6))


def test_what_is_made_quickly_is_not_copied() -> None:
    owner = Owner()
    for number in range(100):
        owner.make(number, seconds=0.4)
    assert not owner.copied


def test_fan_in_counts_the_dearest_input() -> None:
    owner = Owner()
    for number in range(10):
        owner.make(number, seconds=0.3)
    owner.make(10, *range(10), seconds=0.1)
    assert owner.machine.cost(_task(10)) == pytest.approx(0.4)
    owner.make(11, 10, 3, seconds=0.2)
    assert owner.copied == [11]
    assert owner.worst() <= BOUND


def test_a_diamond_counts_its_stem_once() -> None:
    owner = Owner()
    owner.make(0, seconds=0.2)
    for number in (1, 2):
        owner.make(number, 0, seconds=0.1)
    owner.make(3, 1, 2, seconds=0.1)
    assert owner.machine.cost(_task(3)) == pytest.approx(0.4)
    owner.drop(0, 1, 2)
    assert owner.machine.cost(_task(3)) == pytest.approx(0.4), "inputs that are gone are lost, too"
    owner.make(4, 3, 3, seconds=0.2)
    assert owner.copied == [4]


def test_an_input_on_another_node_costs_nothing() -> None:
    owner = Owner()
    owner.make(0, seconds=0.4, node=B)
    owner.make(1, 0, seconds=0.4, node=A)
    assert not owner.copied
    owner.drop(0)
    assert owner.copied == [1], "but not once it is gone"


def test_a_copy_at_a_user_protects_while_it_is_there() -> None:
    owner = Owner()
    owner.make(0, seconds=0.4)
    owner.places[0] = (A, B)
    owner.obey(owner.machine.placed(_value(0), (A, B)))
    owner.make(1, 0, seconds=0.3)
    assert not owner.copied
    owner.places[0] = (A,)
    owner.obey(owner.machine.placed(_value(0), (A,)))
    assert owner.copied == [1]


def test_a_value_that_came_for_somebody_here_is_as_good() -> None:
    owner = Owner()
    owner.make(0, seconds=0.4)
    owner.come(0)
    owner.make(1, 0, seconds=0.4)
    assert not owner.copied
    assert not owner.held, "but it is not kept for its children: it was brought for others"


def test_a_task_may_be_sent_before_the_end_of_its_input_is_told() -> None:
    owner = Owner()
    owner.send(0)
    for number in range(1, 30):
        owner.send(number, number - 1)
        owner.end(number - 1)
        owner.drop(*range(number - 1))
    assert owner.copied == [5, 11, 17, 23]
    assert owner.held == {23}


# -- copies under way ----------------------------------------------------------------------------------------------------


def test_nothing_more_is_copied_while_a_copy_comes() -> None:
    """And what comes is held already: its last user may end before it is there."""
    owner = Owner(arrive=False)
    owner.chain(10)
    assert owner.copied == [5]
    assert owner.held == {5}
    owner.come(5)
    assert owner.copied == [5]
    owner.chain(5, 1, 10)
    assert owner.copied == [5, 11]
    assert owner.held == {5, 11}, "until the next one is safe"


def test_a_copy_that_does_not_come_is_made_up_for_downstream() -> None:
    owner = Owner(arrive=False)
    owner.chain(8)
    owner.obey(owner.machine.placed(_value(5), (A,)))
    assert owner.copied == [5, 7]
    assert owner.held == set()


def test_news_of_others_copies_end_no_copy() -> None:
    owner = Owner(arrive=False)
    owner.chain(6)
    owner.obey(owner.machine.placed(_value(5), (A, B), True))
    owner.obey(owner.machine.placed(_value(5), (A,), True))
    assert owner.copied == [5]
    assert owner.machine.ours(_value(5))


def test_what_is_dear_to_copy_is_not() -> None:
    owner = Owner()
    owner.make(0, seconds=1.0, size=int(0.2 * SPEED))
    assert not owner.copied
    owner.make(1, 0, seconds=1.1, size=int(0.2 * SPEED))
    assert owner.copied == [1], "it is cheap beside what it saves"


def test_copies_wait_for_those_under_way() -> None:
    owner = Owner(arrive=False)
    half = UNDER_WAY // 2
    for number in range(4):
        owner.make(number, seconds=100.0, size=half)
    assert owner.copied == [0, 1]
    owner.come(0)
    assert owner.copied == [0, 1, 2]
    owner.drop(3)
    owner.come(1)
    assert owner.copied == [0, 1, 2], "what is gone waits for nothing"


def test_copies_have_so_much_room_and_no_more() -> None:
    owner = Owner(room=3 * SIZE)
    for number in range(10):
        owner.make(number, seconds=1.0)
    assert owner.copied == [0, 1, 2]
    owner.drop(1)
    assert owner.copied == [0, 1, 2, 3]


def test_a_crowded_store_gets_back_what_is_only_held() -> None:
    owner = Owner()
    owner.chain(9)
    assert owner.held == {5}
    owner.obey(owner.machine.crowded())
    assert 5 not in owner.places
    assert owner.copied == [5, 8], "what is referenced costs too much again"
    assert not owner.held
    assert owner.machine.bytes == SIZE


def test_no_bound_no_copies() -> None:
    owner = Owner(bound=0.0)
    owner.chain(100)
    assert not owner.copied
    assert not len(owner.machine)


# -- deaths ------------------------------------------------------------------------------------------------------------


def test_after_a_death_the_chain_goes_on_from_the_copy() -> None:
    owner = Owner()
    owner.chain(10)
    owner.places = {number: tuple(p for p in at if p != A) for number, at in owner.places.items()}
    owner.places = {number: at for number, at in owner.places.items() if at}
    owner.obey(owner.machine.node_gone(A))
    for number in range(6, 10):
        owner.make(number, number - 1, node=B)
        owner.drop(*range(number))
    owner.chain(20, 1, 10, B)
    assert owner.worst() <= BOUND + 1e-9
    assert owner.copied == [5, 11, 17, 23, 29]


def test_the_death_of_a_source_ends_its_copies() -> None:
    owner = Owner(arrive=False)
    owner.make(0, seconds=1.0)
    assert owner.copied == [0]
    owner.places.clear()
    owner.obey(owner.machine.node_gone(A))
    assert owner.machine.bytes == 0
    owner.make(0, seconds=1.0, node=B)
    assert owner.copied == [0, 0]


# -- growth --------------------------------------------------------------------------------------------------------------


def test_what_lineage_forgets_is_forgotten() -> None:
    owner = Owner()
    owner.chain(20)
    assert len(owner.machine) == 20
    owner.obey(owner.machine.forgotten([_task(number) for number in range(20)]))
    assert len(owner.machine) == 0
    assert owner.machine.bytes == 0
    assert not owner.held
    assert not any(_value(number) in owner.machine for number in range(20))


def test_tasks_whose_inputs_last_are_not_even_entered() -> None:
    machine = SecondCopies(OWN, BOUND, 1 << 40)
    put = ids.put_id(b"root" * 4, 1)
    assert machine.sent(_task(1), [put, _value(7)], lambda task: False, lambda name: True) == []
    assert not len(machine)


@pytest.mark.parametrize("seed", range(24))
def test_random_graphs(seed: int) -> None:
    """With copies that come late or not at all, deaths, and lineage that is forgotten: the books hold, and nothing is left at the end."""
    rng = random.Random(seed)
    owner = Owner(arrive=False, room=rng.choice([4 * SIZE, 1 << 40]))
    reliable = seed % 2 == 0
    running: dict[int, bytes] = {}
    remembered: list[int] = []
    for number in range(80):
        there = sorted(owner.referenced & owner.places.keys())
        inputs = rng.sample(there, min(len(there), rng.choice([0, 1, 1, 1, 2, 3])))
        owner.send(number, *inputs, seconds=rng.choice([0.01, 0.1, 0.3]))
        remembered.append(number)
        running[number] = rng.choice([A, A, A, B, C])
        while len(running) > 3:
            ended = rng.choice(sorted(running))
            owner.end(ended, running.pop(ended))
        in_use = {name for task in running for name in owner.inputs[task]}
        owner.drop(*[name for name in sorted(owner.referenced - in_use) if rng.random() < 0.15])
        for name in sorted(owner.places):
            if owner.machine.ours(_value(name)) and OWN not in owner.places[name]:
                if reliable or rng.random() < 0.5:
                    owner.come(name)
                elif rng.random() < 0.3:
                    owner.obey(owner.machine.placed(_value(name), owner.places[name]))
        if reliable and owner.machine.bytes + SIZE <= owner.machine._room:
            assert owner.worst() <= 2 * BOUND + 0.3, "a bound, and what an input elsewhere may cost that is gone"
        if not reliable and rng.random() < 0.03:
            dead = rng.choice([A, B, C])
            lost = [name for name, at in owner.places.items() if dead in at]
            owner.places.update({name: tuple(p for p in owner.places[name] if p != dead) for name in lost})
            owner.obey(owner.machine.node_gone(dead))
            for name in lost:
                if not owner.places[name] and name in owner.referenced and name in remembered and name not in running:
                    owner.send(name, *owner.inputs[name], seconds=owner.seconds[name])
                    owner.end(name, rng.choice([A, B, C]))
        if not reliable and rng.random() < 0.05:
            oldest = [number for number in remembered if number not in running][:10]
            owner.remembered -= {_task(number) for number in oldest}
            owner.obey(owner.machine.forgotten([_task(number) for number in oldest]))
            remembered = [number for number in remembered if number not in oldest]
    for ended, node in running.items():
        owner.end(ended, node)
    owner.drop(*owner.inputs)
    owner.obey(owner.machine.forgotten([_task(number) for number in remembered]))
    assert len(owner.machine) == 0
    assert owner.machine.bytes == 0
    assert not owner.held
