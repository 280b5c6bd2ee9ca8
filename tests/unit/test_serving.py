"""Giving values piece by piece: turns, bounds, what is set aside; and the trees in which a value spreads."""

from __future__ import annotations

import random

import pytest

from zray.broker.serving import HOP, MOST_QUEUED, MOST_UNDER_WAY, Branches, Request, Serving

A, B, C, D, E = (bytes([n]) * 16 for n in (1, 2, 3, 4, 5))
X, Y = (bytes([n]) * 16 for n in (101, 102))
OWN = bytes(16)
MIB = 1 << 20


def requests(name: bytes, *pieces: int) -> list[Request]:
    return [Request(name, 7, MIB, piece) for piece in pieces]


def drain(serving: Serving) -> list[tuple[bytes, int]]:
    found = []
    while (item := serving.next()) is not None:
        found.append((item[0], item[1].piece))
        serving.validate()
    return found


def test_receivers_have_turns() -> None:
    serving = Serving()
    serving.ask(A, requests(X, *range(100)))
    serving.ask(B, requests(X, 0, 1))
    serving.ask(C, requests(Y, 5))
    assert drain(serving)[:6] == [(A, 0), (B, 0), (C, 5), (A, 1), (B, 1), (A, 2)]
    assert not serving.has_next()


def test_what_was_asked_twice_is_sent_once() -> None:
    serving = Serving()
    serving.ask(A, requests(X, 0, 1))
    serving.ask(A, requests(X, 1, 2))
    assert drain(serving) == [(A, 0), (A, 1), (A, 2)]


def test_queues_are_bounded() -> None:
    serving = Serving()
    serving.ask(A, requests(X, *range(MOST_QUEUED + 10)))
    assert serving.dropped == 10
    assert len(drain(serving)) == MOST_QUEUED


def test_a_receiver_that_does_not_read_gets_no_more_and_holds_up_nobody() -> None:
    serving = Serving()
    serving.ask(A, requests(X, 0, 1))
    serving.sent(A, MOST_UNDER_WAY)
    serving.ask(B, requests(X, 0))
    assert drain(serving) == [(B, 0)]
    assert not serving.has_next()
    serving.left(A, MIB)
    assert drain(serving) == [(A, 0), (A, 1)]


def test_what_is_not_here_yet_is_next_when_it_comes() -> None:
    serving = Serving()
    serving.ask(A, requests(X, 0, 1, 2))
    for _ in range(2):
        node, request = serving.next() or pytest.fail("nobody waits")
        serving.set_aside(node, request)
    serving.ask(A, requests(X, 0))
    assert serving.waiting() == {X: {A: 7}}
    serving.look_again(Y)
    assert serving.objects() == {X}
    serving.look_again(X)
    assert drain(serving) == [(A, 0), (A, 1), (A, 2)]
    assert serving.objects() == set()


def test_ends_of_values_and_receivers() -> None:
    serving = Serving()
    serving.ask(A, requests(X, 0, 1) + requests(Y, 0))
    serving.ask(B, requests(X, 0))
    node, request = serving.next() or pytest.fail("nobody waits")
    serving.set_aside(node, request)
    assert serving.forget(X, A) == [(A, 7)]
    assert serving.forget(X) == [(B, 7)]
    serving.validate()
    assert drain(serving) == [(A, 0)]
    serving.ask(C, requests(X, 0, 1))
    node, request = serving.next() or pytest.fail("nobody waits")
    serving.set_aside(node, request)
    serving.node_gone(C)
    serving.validate()
    assert serving.objects() == set()


# -- trees ---------------------------------------------------------------------------------------------------------------


def spread(count: int, pieces: int) -> tuple[Branches, dict[bytes, bytes]]:
    """So many nodes ask for a value at the same time: whom each gets it from."""
    branches = Branches(OWN)
    nodes = [bytes([n]) * 16 for n in range(1, count + 1)]
    return branches, {node: branches.source_for(X, 7, pieces, node, []) for node in nodes}


def depth_of(node: bytes, sources: dict[bytes, bytes]) -> int:
    depth = 0
    while node != OWN:
        node = sources[node]
        depth += 1
    return depth


def time_of(sources: dict[bytes, bytes], pieces: int) -> int:
    """Pieces' time until the last has all: each node sends at one piece a time, a piece to each of its receivers in turn."""
    load = {node: list(sources.values()).count(node) for node in (OWN, *sources)}

    def finished(node: bytes) -> int:
        slowest, hops = 1, 0
        while node != OWN:
            node = sources[node]
            slowest = max(slowest, load[node])
            hops += HOP
        return slowest * pieces + hops

    return max(map(finished, sources))


def test_a_large_value_goes_through_a_chain() -> None:
    _, sources = spread(8, 64)
    assert sorted(depth_of(node, sources) for node in sources) == list(range(1, 9))
    assert time_of(sources, 64) < 2 * 64, "the owner alone would take 8 * 64"


def test_a_value_of_few_pieces_goes_through_a_tree() -> None:
    _, sources = spread(100, 4)
    assert max(depth_of(node, sources) for node in sources) <= 10
    assert max(list(sources.values()).count(node) for node in (OWN, *sources)) <= 10


@pytest.mark.parametrize("pieces", [2, 16, 64, 1000])
def test_time_grows_no_faster_than_the_logarithm(pieces: int) -> None:
    for doublings in range(1, 8):
        _, sources = spread(1 << doublings, pieces)
        assert time_of(sources, pieces) <= (pieces + HOP) * (doublings + 1)


def test_who_has_it_all_is_asked_before_who_is_getting_it() -> None:
    branches, sources = spread(2, 64)
    assert sources == {A: OWN, B: A}
    branches.took(X, 7, A, True)
    branches.took(X, 7, B, True)
    assert branches.source_for(X, 7, 64, C, []) == B, "nobody was sent there before"
    assert {branches.source_for(X, 7, 64, node, []) for node in (D, E)} == {OWN, A}, "these two send to nobody now"


def test_one_after_another_get_it_from_one_another() -> None:
    branches, nodes = Branches(OWN), [bytes([number]) * 16 for number in range(1, 9)]
    sources = []
    for node in nodes:
        sources.append(branches.source_for(X, 7, 64, node, []))
        branches.took(X, 7, node, True)
    assert sources == [OWN, *nodes[:-1]]


def test_asking_again_changes_nothing() -> None:
    branches, sources = spread(3, 64)
    assert {node: branches.source_for(X, 7, 64, node, []) for node in sources} == sources


def test_who_was_no_help_is_not_named_again() -> None:
    branches, sources = spread(3, 64)
    assert sources[C] == B
    assert branches.source_for(X, 7, 64, C, [B]) == OWN, "A is as busy, and farther away"
    assert branches.source_for(X, 7, 64, C, [B, A]) == OWN


def test_nobody_is_sent_to_who_waits_for_it() -> None:
    branches, sources = spread(3, 64)
    assert sources == {A: OWN, B: A, C: B}
    branches.source_for(X, 7, 64, A, [])
    assert branches.source_for(X, 7, 64, B, [A]) == OWN, "C waits for B"


def test_the_dead_and_those_who_want_it_no_more_are_not_named() -> None:
    branches, _ = spread(2, 64)
    branches.node_gone(A)
    branches.took(X, 7, B, False)
    assert branches.source_for(X, 7, 64, C, []) == OWN


def test_another_version_begins_anew() -> None:
    branches, _ = spread(2, 64)
    assert branches.source_for(X, 8, 64, C, []) == OWN
    branches.took(X, 7, A, True)
    branches.forget(X)
    assert len(branches) == 0


@pytest.mark.parametrize("seed", range(20))
def test_trees_have_no_rings(seed: int) -> None:
    rng = random.Random(seed)
    nodes = [bytes([n]) * 16 for n in range(1, 12)]
    branches = Branches(OWN)
    sources: dict[bytes, bytes] = {}
    whole: set[bytes] = set()
    for _ in range(300):
        node = rng.choice(nodes)
        what = rng.random()
        if what < 0.7 and node not in whole:
            avoid = rng.sample(nodes, rng.randrange(3))
            sources[node] = branches.source_for(X, 7, 20, node, avoid)
            assert sources[node] == OWN or sources[node] not in [*avoid, node]
        elif what < 0.8:
            branches.took(X, 7, node, True)
            if node in sources:
                whole.add(node)
        elif what < 0.9:
            branches.node_gone(node)
            sources.pop(node, None)
            whole.discard(node)
        for start in sources:
            at, steps = start, 0
            while at in sources and at not in whole:
                at = sources[at]
                steps += 1
                assert steps <= len(nodes), f"{start.hex()} waits for itself"
