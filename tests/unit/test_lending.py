"""Who was lent which object: counts that no order of messages upsets."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest

from zray.broker.lending import Lending

A, B, C = (bytes([n]) * 16 for n in (1, 2, 3))
X, Y = b"x" * 16, b"y" * 16


def test_what_is_lent_is_kept_until_all_of_it_came_back() -> None:
    here = Lending()
    assert here.lend(B, [X, Y]) == [X, Y]
    assert here.lend(B, [X]) == []
    assert here.lend(C, [X]) == []
    assert here.given_back(B, [X]) == []
    assert here.given_back(B, [X, Y]) == [Y]
    assert here.given_back(B, [X]) == [], "more than was lent is ignored"
    assert here.given_back(C, [X]) == [X]
    assert not here.lent


def test_an_object_is_borrowed_from_one() -> None:
    here = Lending()
    here.borrow(A, X)
    with pytest.raises(AssertionError, match="borrowed twice"):
        here.borrow(B, X)
    assert here.done_with(X) == A
    assert here.done_with(X) is None


def test_the_dead_give_everything_back_and_owe_nothing() -> None:
    here = Lending()
    here.lend(B, [X, X, Y])
    here.lend(C, [Y])
    here.borrow(B, b"z" * 16)
    assert here.node_gone(B) == ([X], [b"z" * 16])
    assert here.given_back(B, [Y]) == []
    assert here.given_back(C, [Y]) == [Y]


@pytest.mark.parametrize("seed", range(40))
def test_nothing_goes_while_somebody_has_it_and_nothing_stays(seed: int) -> None:
    """Three nodes pass references to an object of the first around; messages are slow."""
    draw = random.Random(seed)
    nodes = [A, B, C]
    state = {node: Lending() for node in nodes}
    uses = Counter({A: 1})
    """How often something on a node refers to the object; on A: the program that made it."""
    kept: set[bytes] = set()
    """Nodes whose broker keeps it because it is lent."""
    under_way: dict[tuple[bytes, bytes], deque[str]] = {(a, b): deque() for a in nodes for b in nodes if a != b}

    def has(node: bytes) -> bool:
        return (node == A and (uses[A] > 0 or A in kept)) or (node != A and X in state[node].borrowed)

    def settle(node: bytes) -> None:
        """Nothing refers to it on this node any more: it is given back."""
        if node != A and uses[node] == 0 and node not in kept:
            lender = state[node].done_with(X)
            if lender is not None:
                under_way[node, lender].append("back")

    def send(node: bytes, to: bytes) -> None:
        if state[node].lend(to, [X]):
            kept.add(node)
        under_way[node, to].append("lend")

    def deliver(node: bytes, to: bytes) -> None:
        if under_way[node, to].popleft() == "back":
            if state[to].given_back(node, [X]):
                kept.discard(to)
            settle(to)
            return
        assert has(A), "it went while a reference to it was under way"
        uses[to] += 1
        if to == A or X in state[to].borrowed:
            under_way[to, node].append("back")
        else:
            state[to].borrow(node, X)

    for _ in range(300):
        node = draw.choice(nodes)
        if uses[node] and draw.random() < 0.4:
            send(node, draw.choice([other for other in nodes if other != node]))
        elif uses[node] and draw.random() < 0.5:
            uses[node] -= 1
            settle(node)
        ways = [way for way, queue in under_way.items() if queue]
        if ways and draw.random() < 0.7:
            deliver(*draw.choice(ways))
    for node in nodes:
        while uses[node]:
            uses[node] -= 1
            settle(node)
    while ways := [way for way, queue in under_way.items() if queue]:
        deliver(*draw.choice(ways))
        for node in nodes:
            while uses[node]:
                uses[node] -= 1
            settle(node)
    assert not kept
    assert not any(lending.lent or lending.borrowed for lending in state.values())
