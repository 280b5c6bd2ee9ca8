"""zray.broker.dependencies: who waits for which object."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zray.broker.dependencies import Dependencies, Waiting
from zray.task import TaskSpec

X, Y, Z = b"x" * 16, b"y" * 16, b"z" * 16


def waiting(number: int = 0) -> Waiting:
    return Waiting(TaskSpec(number.to_bytes(16, "little"), b"s" * 16), None, None)


def test_free_when_the_last_object_comes() -> None:
    books, task = Dependencies(), waiting()
    books.add(task, (X, Y))
    assert books.ready(X) == []
    assert books.ready(X) == []
    assert books.ready(Y) == [task]
    assert books.watched() == []


def test_an_object_named_twice_counts_once() -> None:
    books, task = Dependencies(), waiting()
    books.add(task, (X, X))
    assert books.ready(X) == [task]


def test_all_who_wait_are_freed_in_order() -> None:
    books = Dependencies()
    tasks = [waiting(number) for number in range(5)]
    for task in tasks:
        books.add(task, (X,))
    assert books.ready(X) == tasks


def test_the_forgotten_are_not_woken_and_are_swept() -> None:
    books = Dependencies()
    one, two = waiting(1), waiting(2)
    books.add(one, (X, Y))
    books.add(two, (X,))
    books.forget(one)
    books.validate()
    books.sweep()
    assert books.watched() == [X]
    assert books.ready(X) == [two]


def test_counts_that_do_not_agree_are_found() -> None:
    books, task = Dependencies(), waiting()
    books.add(task, (X, Y))
    task.left = 1
    with pytest.raises(AssertionError, match="stands in 2 lists"):
        books.validate()


@given(st.lists(st.sets(st.sampled_from([X, Y, Z]), min_size=1), max_size=20), st.permutations([X, Y, Z]))
def test_each_is_freed_once_when_all_of_its_objects_are_there(needs: list[set[bytes]], order: list[bytes]) -> None:
    books = Dependencies()
    tasks = []
    for number, need in enumerate(needs):
        task = waiting(number)
        books.add(task, tuple(sorted(need)))
        tasks.append(task)
    there: set[bytes] = set()
    freed: list[Waiting] = []
    for object_id in order:
        there.add(object_id)
        freed += books.ready(object_id)
        books.validate()
        assert freed == sorted(freed, key=freed.index)
        assert {id(task) for task in freed} == {id(t) for t, need in zip(tasks, needs, strict=True) if need <= there}
    assert len(freed) == len(tasks)
