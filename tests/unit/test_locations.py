"""Who has a copy of what: `zray.broker.locations`."""

from __future__ import annotations

import random

from zray.broker.locations import Locations

OWN, A, B, C = b"own", b"A", b"B", b"C"
X, Y = b"x" * 16, b"y" * 16


def _book() -> Locations:
    return Locations(OWN)


def test_a_spare_copy_here_draws_nobody() -> None:
    """Unless somebody here came to want it while it was on its way."""
    book = Locations(OWN)
    for name, wanted_too in ((X, False), (Y, True)):
        book.made_at(name, A, 10)
        assert book.want(name, True)
        assert not book.want(name, True)
        if wanted_too:
            assert not book.want(name), "it is coming already"
        book.made_at(name, OWN, 10)
        assert not book.elsewhere(name)
        book.validate()
    assert book.holders(X) == book.sources(X) == (A,)
    assert book.holders(Y) == (A, OWN)


def test_an_unknown_object_is_here_or_small() -> None:
    book = _book()
    assert book.size(X) == 0
    assert book.holders(X) == ()
    assert not book.elsewhere(X)
    assert not book.want(X)


def test_a_made_object_is_elsewhere_until_it_was_copied_here() -> None:
    book = _book()
    assert book.made_at(X, A, 100)
    assert book.elsewhere(X)
    assert book.size(X) == 100
    book.copied_to(X, B)
    assert book.holders(X) == (A, B)
    book.made_at(X, OWN, 100)
    assert not book.elsewhere(X)
    assert book.sources(X) == (A, B)
    assert book.holders(X) == (A, B, OWN)
    book.validate()


def test_it_is_wanted_once_and_until_it_is_here() -> None:
    book = _book()
    book.made_at(X, A, 100)
    assert book.want(X)
    assert not book.want(X)
    assert book.wanted(X)
    book.want_no_more(X)
    assert book.want(X)
    book.made_at(X, OWN, 100)
    assert not book.wanted(X)
    assert not book.want(X)


def test_the_last_copy_is_told() -> None:
    book = _book()
    book.made_at(X, A, 100)
    book.copied_to(X, B)
    assert not book.dropped_at(X, A)
    assert not book.dropped_at(X, A)
    assert book.dropped_at(X, B)
    assert X not in book
    book.validate()


def test_a_copy_here_is_a_copy() -> None:
    book = _book()
    book.made_at(X, A, 100)
    book.made_at(X, OWN, 100)
    assert not book.dropped_at(X, A)
    assert X not in book, "here and nowhere else: not in the book"
    book.made_at(X, A, 100)
    assert book.elsewhere(X), "this node's copy is not remembered where there was no other"


def test_copies_of_an_object_that_is_nowhere_else_are_not_believed() -> None:
    book = _book()
    book.copied_to(X, A)
    assert X not in book


def test_a_dead_node_takes_its_copies_along() -> None:
    book = _book()
    book.made_at(X, A, 100)
    book.made_at(Y, A, 50)
    book.copied_to(Y, B)
    assert book.node_gone(A) == [X]
    assert book.holders(Y) == (B,)
    assert book.node_gone(A) == []
    book.validate()


def test_a_newer_attempt_makes_older_copies_worthless() -> None:
    book = _book()
    book.made_at(X, A, 100, attempt=0)
    book.want(X)
    assert book.made_at(X, B, 120, attempt=1)
    assert book.holders(X) == (B,)
    assert book.size(X) == 120
    assert not book.made_at(X, C, 100, attempt=0)
    assert book.holders(X) == (B,)
    book.validate()


def test_any_order_of_events_keeps_the_book_whole() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        book = _book()
        truth: dict[bytes, dict[bytes, None]] = {}
        names = [bytes([i]) * 16 for i in range(5)]
        nodes = [OWN, A, B, C]
        for _ in range(60):
            name, node = rng.choice(names), rng.choice(nodes)
            known = truth.get(name, {})
            match rng.randrange(5):
                case 0:
                    book.made_at(name, node, 10)
                    if known or node != OWN:
                        truth.setdefault(name, {})[node] = None
                case 1:
                    book.copied_to(name, node)
                    if known:
                        known[node] = None
                case 2:
                    assert book.dropped_at(name, node) == (list(known) == [node])
                    known.pop(node, None)
                case 3:
                    expected = bool(known) and OWN not in known and not book.wanted(name)
                    assert book.want(name) == expected
                case _:
                    gone = book.node_gone(node)
                    assert set(gone) == {n for n, at in truth.items() if list(at) == [node]}
                    for at in truth.values():
                        at.pop(node, None)
            truth = {n: at for n, at in truth.items() if at.keys() - {OWN}}
            book.validate()
            assert {n: set(book.holders(n)) for n in names if n in book} == {n: set(at) for n, at in truth.items()}
