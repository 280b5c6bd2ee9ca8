"""Laws that hold whatever runs where: remote execution gives what local execution gives.

Random programs of puts, tasks, actor calls and drops are run twice, by zray and by a plain model, and must agree.
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zray
from tests.helpers import query, wait_for

pytestmark = [pytest.mark.usefixtures("warm"), pytest.mark.slow]

law = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=5000),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5) | st.tuples(inner, inner)
    ),
    max_leaves=20,
)


@law
@given(st.lists(values, max_size=8))
def test_get_of_put_is_the_identity(items: list[Any]) -> None:
    refs = [zray.put(item) for item in items]
    assert zray.get(refs) == items
    assert [zray.get(ref) for ref in refs] == items


@law
@given(st.lists(values, max_size=6), st.dictionaries(st.text("abc", min_size=1, max_size=3), values, max_size=3))
def test_arguments_arrive_as_they_were(args: list[Any], kwargs: dict[str, Any]) -> None:
    echo = zray.remote(lambda *a, **k: (a, k))
    assert zray.get(echo.remote(*args, **kwargs)) == (tuple(args), kwargs)
    by_reference = echo.remote(*map(zray.put, args), **{name: zray.put(value) for name, value in kwargs.items()})
    assert zray.get(by_reference) == (tuple(args), kwargs)


@law
@given(
    st.sampled_from(["u1", "i4", "f8", "?", ">u2", "c16"]),
    st.lists(st.integers(0, 12), min_size=0, max_size=4),
    st.sampled_from(["C", "F"]),
    st.booleans(),
)
def test_arrays_keep_type_shape_and_content(dtype: str, shape: list[int], order: Any, step: bool) -> None:
    array = np.asarray(np.arange(int(np.prod(shape))).reshape(shape), dtype=dtype, order=order)
    if step and array.ndim:
        array = array[::2]
    back = zray.get(zray.put(array))
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)
    same = zray.get(zray.remote(lambda a: a).remote(array))
    assert same.dtype == array.dtype
    assert np.array_equal(same, array)


@law
@given(
    st.lists(
        st.tuples(st.integers(0, 1 << 30), st.integers(0, 1 << 30), st.sampled_from("+*-")), min_size=1, max_size=40
    )
)
def test_a_random_graph_of_tasks_gives_what_plain_calls_give(steps: list[tuple[int, int, str]]) -> None:
    def apply(a: int, b: int, sign: str) -> int:
        return {"+": a + b, "*": a * b % 10007, "-": a - b}[sign]

    remote = zray.remote(apply)
    plain: list[int] = [1, 2, 3]
    refs: list[Any] = [zray.put(1), 2, zray.put(3)]
    for left, right, sign in steps:
        i, j = left % len(plain), right % len(plain)
        plain.append(apply(plain[i], plain[j], sign))
        refs.append(remote.remote(refs[i], refs[j], sign))
    assert zray.get([ref for ref in refs if isinstance(ref, zray.ObjectRef)]) == [plain[0], *plain[2:]]


@law
@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "peek"]), st.integers()), max_size=40), st.integers(1, 3))
def test_an_actor_is_an_object(steps: list[tuple[str, int]], callers: int) -> None:
    class Stack:
        def __init__(self) -> None:
            self.items: list[int] = []

        def push(self, x: int) -> int:
            self.items.append(x)
            return len(self.items)

        def pop(self, _: int) -> int:
            return self.items.pop()

        def peek(self, _: int) -> list[int]:
            return list(self.items)

    local, actor = Stack(), zray.remote(num_cpus=0)(Stack).remote()
    refs = [getattr(actor, name).remote(x) for name, x in steps]
    for (name, x), ref in zip(steps, refs):
        try:
            expected: Any = getattr(local, name)(x)
        except IndexError:
            with pytest.raises(IndexError):
                zray.get(ref)
        else:
            assert zray.get(ref) == expected


@law
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.data())
def test_wait_splits_its_list(kinds: list[bool], data: Any) -> None:
    echo = zray.remote(lambda x: x)
    refs = [echo.remote(i) if kind else zray.put(i) for i, kind in enumerate(kinds)]
    count = data.draw(st.integers(1, len(refs)))
    ready, rest = zray.wait(refs, num_returns=count, timeout=60)
    assert len(ready) == count
    assert sorted([*ready, *rest], key=refs.index) == refs
    assert ready == [ref for ref in refs if ref in set(ready)]
    assert rest == [ref for ref in refs if ref in set(rest)]
    assert zray.get(refs) == list(range(len(refs)))


@law
@given(st.lists(st.tuples(st.sampled_from(["put", "nest", "drop", "read"]), st.integers(0, 1 << 30)), max_size=60))
def test_puts_nests_and_drops_follow_a_model(steps: list[tuple[str, int]]) -> None:
    before = len(query("objects"))
    held: list[tuple[Any, Any]] = []
    for action, number in steps:
        if action == "put" or not held:
            value: Any = np.full(number % 5000, number % 256, np.uint8) if number % 2 else number
            held.append((zray.put(value), value if not isinstance(value, np.ndarray) else value.tolist()))
            continue
        ref, value = held[number % len(held)]
        if action == "nest":
            held.append((zray.put([ref]), [value]))
        elif action == "drop":
            del held[number % len(held)]
        else:
            assert unfold(zray.get(ref)) == value
        del ref
    for ref, value in held:
        assert unfold(zray.get(ref)) == value
    held.clear()
    ref = None
    gc.collect()
    wait_for(lambda: len(query("objects")) <= before + 3, 10, "everything that was dropped has gone")


def unfold(value: Any) -> Any:
    """Return a value with the references in it replaced by what they refer to."""
    if isinstance(value, zray.ObjectRef):
        return unfold(zray.get(value))
    if isinstance(value, list):
        return [unfold(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


@law
@given(st.lists(st.integers(-5, 5), max_size=30))
def test_map_is_map_and_errors_stay_with_their_call(numbers: list[int]) -> None:
    def inverse(x: int) -> float:
        return 1 / x

    refs = zray.remote(inverse).map(numbers)
    for number, ref in zip(numbers, refs):
        if number == 0:
            with pytest.raises(ZeroDivisionError):
                zray.get(ref)
        else:
            assert zray.get(ref) == 1 / number
