"""Tasks: arguments and results in all their forms, options, batches, where they run."""

from __future__ import annotations

import functools
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zray
from tests.helpers import query, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.helpers import Gate, Tally

pytestmark = pytest.mark.usefixtures("warm")


def test_a_call_runs_in_another_process() -> None:
    pid = zray.get(zray.remote(os.getpid).remote())
    assert pid != os.getpid()


def test_arguments_by_position_and_name() -> None:
    @zray.remote
    def collect(a: int, b: int = 2, *rest: int, c: int = 3, **more: int) -> tuple[Any, ...]:
        return a, b, rest, c, more

    assert zray.get(collect.remote(1)) == (1, 2, (), 3, {})
    assert zray.get(collect.remote(1, 5, 6, 7, c=8, d=9)) == (1, 5, (6, 7), 8, {"d": 9})
    assert zray.get(collect.remote(b=1, a=0)) == (0, 1, (), 3, {})


def test_wrong_arguments_are_a_type_error() -> None:
    @zray.remote
    def two(a: int, b: int) -> int:
        return a + b

    with pytest.raises(TypeError, match="b"):
        zray.get(two.remote(1))
    with pytest.raises(TypeError):
        zray.get(two.remote(1, 2, 3))


def test_references_at_top_level_arrive_as_values() -> None:
    @zray.remote
    def show(a: Any, b: Any, *, c: Any) -> Any:
        return a, b, c

    one, array = zray.put(1), zray.put(np.arange(5))
    a, b, c = zray.get(show.remote(one, zray.remote(lambda: "made").remote(), c=array))
    assert (a, b) == (1, "made")
    assert c.tolist() == [0, 1, 2, 3, 4]
    assert zray.get(show.remote(one, one, c=one)) == (1, 1, 1)


def test_nested_references_stay_references() -> None:
    @zray.remote
    def open_them(items: list[Any], table: dict[str, Any]) -> Any:
        assert all(isinstance(item, zray.ObjectRef) for item in (*items, *table.values()))
        return [zray.get(items), zray.get(table["x"])]

    refs = [zray.put(i) for i in range(3)]
    assert zray.get(open_them.remote(refs, {"x": zray.remote(lambda: "y").remote()})) == [[0, 1, 2], "y"]


def test_a_result_can_hold_references() -> None:
    @zray.remote
    def make() -> list[Any]:
        return [zray.put("put"), zray.remote(lambda: "task").remote()]

    assert zray.get(zray.get(make.remote())) == ["put", "task"]


@pytest.mark.parametrize("size", [0, 1, 47, 48, 49, 4000, 70_000, 3_000_000])
def test_arguments_and_results_of_all_sizes(size: int) -> None:
    @zray.remote
    def mirror(data: bytes, array: Any) -> tuple[int, bytes, Any]:
        return len(data), data, array

    data, array = os.urandom(size), np.arange(size, dtype=np.uint8)
    length, back, same = zray.get(mirror.remote(data, array))
    assert length == size
    assert back == data
    assert np.array_equal(same, array)


def test_many_arguments() -> None:
    @zray.remote
    def total(*numbers: int, **named: int) -> int:
        return sum(numbers) + sum(named.values())

    refs = [zray.put(i) for i in range(200)]
    assert zray.get(total.remote(*refs, **{f"n{i}": ref for i, ref in enumerate(refs[:50])})) == 19900 + 1225


def test_several_results() -> None:
    @zray.remote(num_returns=3)
    def three(n: int) -> Any:
        return n, [n], np.full(1000, n)

    a, b, c = three.remote(7)
    assert zray.get(a) == 7
    assert zray.get([b, a]) == [[7], 7]
    assert zray.get(c).sum() == 7000
    assert len({a, b, c}) == 3


def test_no_result(tally: Tally) -> None:
    assert zray.remote(tally.add).options(num_returns=0).remote("done") is None
    wait_for(lambda: tally.lines == ["done"])


@pytest.mark.parametrize("value", [(1,), (1, 2, 3), 5, None])
def test_a_wrong_count_of_results_fails_all_of_them(value: Any) -> None:
    a, b = zray.remote(lambda: value).options(num_returns=2).remote()
    for ref in (a, b):
        with pytest.raises(ValueError, match="num_returns=2"):
            zray.get(ref)


def test_a_generator_can_give_several_results() -> None:
    def count() -> Any:
        yield from range(4)

    assert zray.get(zray.remote(count).options(num_returns=4).remote()) == [0, 1, 2, 3]


def test_options_leave_the_original_alone() -> None:
    @zray.remote(num_cpus=1)
    def resources() -> dict[str, float]:
        return zray.get_runtime_context().get_assigned_resources()

    changed = resources.options(num_cpus=2, name="other")
    assert zray.get(changed.remote())["CPU"] == 2
    assert zray.get(resources.remote())["CPU"] == 1
    assert zray.get(changed.options(num_cpus=0.5).remote())["CPU"] == 0.5


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_cpus": -1}, ValueError),
        ({"num_cpus": "1"}, (TypeError, ValueError)),
        ({"num_returns": -1}, ValueError),
        ({"max_retries": -2}, ValueError),
        ({"retry_exceptions": 5}, (TypeError, ValueError)),
        ({"resources": {"apple": -1}}, ValueError),
        ({"no_such_option": 1}, (TypeError, ValueError)),
        ({"max_restarts": 1}, (TypeError, ValueError)),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], error: Any) -> None:
    name = "apple" if "resources" in options else next(iter(options))
    with pytest.raises(error, match=name):
        zray.remote(**options)(lambda: None)
    with pytest.raises(error, match=name):
        zray.remote(lambda: None).options(**options)


def test_map_keeps_order_and_takes_several_iterables() -> None:
    assert zray.get(zray.remote(lambda x: x * x).map(range(50))) == [x * x for x in range(50)]
    assert zray.get(zray.remote(pow).map([2, 3, 4], [5, 4, 3])) == [32, 81, 64]
    assert zray.remote(lambda x: x).map([]) == []
    assert zray.get(zray.remote(lambda x: x + 1).map(zray.put(i) for i in range(5))) == [1, 2, 3, 4, 5]


def test_what_can_be_remote() -> None:
    base = 10

    class Multiplier:
        def __init__(self, factor: int) -> None:
            self.factor = factor

        def __call__(self, x: int) -> int:
            return self.factor * x

        def method(self, x: int) -> int:
            return self.factor + x

    assert zray.get(zray.remote(lambda x: base + x).remote(1)) == 11
    assert zray.get(zray.remote(len).remote([1, 2])) == 2
    assert zray.get(zray.remote(Multiplier(3).method).remote(4)) == 7
    assert zray.get(zray.remote(functools.partial(max, 5)).remote(4)) == 5
    with pytest.raises(TypeError):
        zray.remote(5)


def test_modules_next_to_the_program_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helper_module_of_a_test.py").write_text("def answer():\n    return 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from helper_module_of_a_test import answer  # type: ignore[import-not-found]

    zray.shutdown()
    zray.init(num_cpus=2)
    try:
        assert zray.get(zray.remote(answer).remote()) == 42
        assert zray.get(zray.remote(os.getcwd).remote()) == os.getcwd()
    finally:
        zray.shutdown()


def test_workers_have_the_programs_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARIABLE_OF_A_TEST", "seen")
    zray.shutdown()
    zray.init(num_cpus=1)
    try:
        assert zray.get(zray.remote(lambda: os.environ["VARIABLE_OF_A_TEST"]).remote()) == "seen"
    finally:
        zray.shutdown()


def test_tasks_run_side_by_side(gate: Callable[[str], Gate]) -> None:
    gates = [gate(str(i)) for i in range(4)]

    @zray.remote
    def meet(mine: int) -> int:
        gates[mine].open()
        for other in gates:
            other.wait()
        return os.getpid()

    assert len(set(zray.get([meet.remote(i) for i in range(4)]))) == 4


def test_many_small_tasks_in_one_batch() -> None:
    @zray.remote
    def echo(x: int) -> int:
        return x

    assert zray.get([echo.remote(i) for i in range(5000)]) == list(range(5000))


def test_one_call_after_the_other() -> None:
    @zray.remote
    def increase(x: int) -> int:
        return x + 1

    value = 0
    for _ in range(300):
        value = zray.get(increase.remote(value))
    assert value == 300


def test_a_chain_of_dependent_calls() -> None:
    @zray.remote
    def increase(x: int) -> int:
        return x + 1

    ref = zray.put(0)
    for _ in range(300):
        ref = increase.remote(ref)
    assert zray.get(ref) == 300


def test_a_tree_of_dependent_calls() -> None:
    @zray.remote
    def add(*numbers: int) -> int:
        return sum(numbers)

    level = [zray.put(i) for i in range(256)]
    while len(level) > 1:
        level = [add.remote(*level[i : i + 4]) for i in range(0, len(level), 4)]
    assert zray.get(level[0]) == sum(range(256))


def test_a_task_waits_for_arguments_and_others_pass_it(gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")

    @zray.remote(num_cpus=0)
    def slow() -> int:
        hold.wait()
        return 1

    echo = zray.remote(lambda x: x)
    waiting = [echo.remote(slow.remote()) for _ in range(20)]
    assert zray.get([echo.remote(i) for i in range(20)]) == list(range(20))
    assert zray.wait(waiting, timeout=0) == ([], waiting)
    hold.open()
    assert zray.get(waiting) == [1] * 20


def test_an_error_passes_to_those_who_need_the_value() -> None:
    @zray.remote
    def fail() -> None:
        raise KeyError("lost")

    echo = zray.remote(lambda *x: x)
    ref = echo.remote(1, echo.remote(fail.remote()))
    with pytest.raises(KeyError, match="lost"):
        zray.get(ref)


def test_tasks_of_threads_that_a_task_starts() -> None:
    @zray.remote
    def parent() -> list[int]:
        child = zray.remote(lambda x: x * 10)
        found: list[int] = []

        def work(i: int) -> None:
            found.append(zray.get(child.remote(i)))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(found)

    assert zray.get(parent.remote()) == [0, 10, 20, 30]


def test_workers_have_random_numbers_of_their_own(gate: Callable[[str], Gate]) -> None:
    gates = [gate(str(i)) for i in range(4)]

    @zray.remote
    def draw(mine: int) -> tuple[int, int, float]:
        import random

        gates[mine].open()
        for other in gates:
            other.wait()
        return os.getpid(), random.getrandbits(64), float(np.random.random())

    drawn = zray.get([draw.remote(i) for i in range(4)])
    assert all(len({row[column] for row in drawn}) == 4 for column in range(3))


def test_a_workers_state_lasts_from_task_to_task_but_is_not_the_drivers() -> None:
    import tests.helpers as module

    @zray.remote(num_cpus=4)
    def mark(text: str) -> Any:
        before = getattr(module, "mark_of_a_test", None)
        module.mark_of_a_test = text  # type: ignore[attr-defined]
        return before

    zray.get(mark.remote("first"))
    assert not hasattr(module, "mark_of_a_test")


def test_calling_directly_is_refused_with_the_mend() -> None:
    @zray.remote
    def work() -> int:
        return 1

    with pytest.raises(TypeError, match=r"work\.remote\(\)"):
        work()
    assert work.__name__ == "work"


def test_a_function_that_is_too_large_is_refused() -> None:
    blob = bytes(100 << 20)

    @zray.remote
    def heavy() -> int:
        return len(blob)

    with pytest.raises(ValueError, match=r"The remote function .*heavy is too large.*zray\.put"):
        heavy.remote()


def test_redefining_a_function_uses_the_new_one() -> None:
    results = []
    for value in range(5):

        @zray.remote
        def same_name(bound: int = value) -> int:
            return bound

        results.append(zray.get(same_name.remote()))
    assert results == [0, 1, 2, 3, 4]


def test_remote_functions_travel_in_closures_and_arguments() -> None:
    @zray.remote
    def inner(x: int) -> int:
        return x + 1

    @zray.remote
    def outer(f: Any, x: int) -> int:
        return zray.get(f.remote(x)) + zray.get(inner.remote(x))

    assert zray.get(outer.remote(inner, 1)) == 4


def test_mistaken_use_of_the_decorator() -> None:
    with pytest.raises(TypeError, match=r"parentheses|options"):
        zray.remote()
    with pytest.raises(TypeError, match="name"):
        zray.remote(1, 2)


def test_a_task_cannot_end_or_start_sessions() -> None:
    assert zray.get(zray.remote(zray.shutdown).remote()) is None
    zray.get(zray.remote(lambda: zray.init(ignore_reinit_error=True) and None).remote())
    assert zray.is_initialized()
    assert zray.get(zray.remote(zray.is_initialized).remote())


def test_code_is_pickled_once_whatever_the_options() -> None:
    state = {"seen": 0}

    @zray.remote
    def see() -> int:
        return state["seen"]

    assert zray.get(see.remote()) == 0
    before = query("statistics")["entries"]
    for i in range(20):
        state["seen"] = i
        assert zray.get(see.options(num_cpus=0.5).remote()) == 0
    assert query("statistics")["entries"] < before + 10
