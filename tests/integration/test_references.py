"""References wherever they are keep an object; when the last one goes, the object goes within a second."""

from __future__ import annotations

import gc
import os
import pickle
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zray
from tests.helpers import Keeper, object_state, query, wait_for, wait_gone
from zray import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers import Gate

pytestmark = pytest.mark.usefixtures("warm")

SOON = 2.0
"""Seconds: what is promised is one, from the last reference to the end."""


@pytest.fixture
def keeper(warm: None) -> Any:
    return zray.remote(Keeper).remote()


def large() -> Any:
    return zray.put(np.zeros(200_000, np.uint8))


def exists(name: str) -> bool:
    return object_state(name) != ""


def test_a_variable() -> None:
    ref = large()
    same = ref
    name = ref.hex()
    del ref
    assert exists(name)
    del same
    wait_gone(name, timeout=SOON)


def test_many_at_once() -> None:
    refs = [large() for _ in range(50)]
    names = [ref.hex() for ref in refs]
    refs.clear()
    wait_gone(*names, timeout=SOON)


def test_a_closure_of_a_remote_function() -> None:
    def reader(ref: Any) -> Any:
        @zray.remote
        def read() -> int:
            return int(zray.get(ref).nbytes)

        return read

    ref = large()
    name = ref.hex()
    read = reader(ref)
    assert zray.get(read.remote()) == 200_000
    del ref
    assert zray.get([read.remote() for _ in range(20)]) == [200_000] * 20
    assert exists(name)
    last = read.remote()
    del read
    gc.collect()
    assert zray.get(last) == 200_000
    wait_gone(name, timeout=SOON)


def test_a_closure_of_an_actor_class() -> None:
    def reader(ref: Any) -> Any:
        class Reader:
            def read(self) -> int:
                return int(zray.get(ref).nbytes)

        return zray.remote(Reader)

    ref = large()
    name = ref.hex()
    actor = reader(ref).remote()
    del ref
    gc.collect()
    assert zray.get([actor.read.remote() for _ in range(5)]) == [200_000] * 5
    del actor
    wait_gone(name, timeout=10)


def test_inside_another_object() -> None:
    inner = large()
    name = inner.hex()
    outer = zray.put({"deep": [inner]})
    outermost = zray.put([outer])
    names = name, outer.hex(), outermost.hex()
    del inner, outer
    gc.collect()
    assert all(map(exists, names))
    assert zray.get(zray.get(zray.get(outermost)[0])["deep"][0]).nbytes == 200_000
    gc.collect()
    del outermost
    wait_gone(*names, timeout=SOON)


def test_a_reference_taken_out_of_an_object_lives_on() -> None:
    outer = zray.put([large()])
    inner = zray.get(outer)[0]
    outer_name, name = outer.hex(), inner.hex()
    del outer
    wait_gone(outer_name, timeout=SOON)
    assert zray.get(inner).nbytes == 200_000
    del inner
    wait_gone(name, timeout=SOON)


def test_in_flight_as_an_argument(gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")

    @zray.remote
    def later(array: Any, nested: list[Any], _: Any) -> int:
        return int(array.nbytes + zray.get(nested[0]).nbytes)

    top, nested = large(), large()
    names = top.hex(), nested.hex()
    result = later.remote(top, [nested], zray.remote(hold.wait).remote())
    del top, nested
    gc.collect()
    assert all(map(exists, names))
    hold.open()
    assert zray.get(result) == 400_000
    wait_gone(*names, timeout=SOON)


def test_in_flight_as_an_argument_of_an_actors_constructor() -> None:
    class Holder:
        def __init__(self, array: Any, nested: list[Any]) -> None:
            self.size = array.nbytes + zray.get(nested[0]).nbytes

        def read(self) -> int:
            return int(self.size)

    refs = [large(), large()]
    names = [ref.hex() for ref in refs]
    actor = zray.remote(Holder).remote(refs[0], [refs[1]])
    refs.clear()
    assert zray.get(actor.read.remote()) == 400_000
    del actor
    wait_gone(*names, timeout=10)


def test_a_result_nobody_waits_for() -> None:
    ref = zray.remote(lambda: np.zeros(200_000, np.uint8)).remote()
    name = ref.hex()
    del ref
    wait_gone(name)


def test_results_with_references_of_the_task_that_put_them() -> None:
    @zray.remote
    def make() -> list[Any]:
        return [zray.put(np.zeros(200_000, np.uint8))]

    outer = make.remote()
    inner = zray.get(outer)[0]
    names = outer.hex(), inner.hex()
    del outer
    assert zray.get(inner).nbytes == 200_000
    del inner
    gc.collect()
    wait_gone(*names, timeout=SOON)


def test_held_by_an_actor(keeper: Any) -> None:
    ref = large()
    name = ref.hex()
    zray.get(keeper.keep.remote([ref]))
    del ref
    gc.collect()
    assert exists(name)
    assert zray.get(keeper.read.remote()).nbytes == 200_000
    zray.get(keeper.forget.remote())
    wait_gone(name, timeout=SOON)


def test_a_value_held_by_an_actor_keeps_the_memory(keeper: Any) -> None:
    ref = large()
    name = ref.hex()
    zray.get(keeper.keep_value.remote(ref))
    del ref
    gc.collect()
    assert exists(name)
    zray.get(keeper.forget.remote())
    wait_gone(name, timeout=SOON)


def test_in_a_killed_actor() -> None:
    actor = zray.remote(Keeper).remote()
    ref = large()
    name = ref.hex()
    zray.get(actor.keep.remote([ref]))
    zray.get(actor.keep_value.remote(ref))
    del ref
    gc.collect()
    assert exists(name)
    os.kill(zray.get(actor.pid.remote()), signal.SIGKILL)
    wait_gone(name)
    with pytest.raises(exceptions.ActorDiedError):
        zray.get(actor.pid.remote())


def test_in_an_actor_whose_last_handle_went() -> None:
    actor = zray.remote(Keeper).remote()
    ref = large()
    name = ref.hex()
    zray.get(actor.keep.remote([ref]))
    del ref
    gc.collect()
    assert exists(name)
    del actor
    gc.collect()
    wait_gone(name)


def test_a_handle_inside_an_object_keeps_the_actor() -> None:
    actor = zray.remote(Keeper).remote()
    zray.get(actor.keep.remote(1))
    ref = zray.put([actor])
    del actor
    gc.collect()
    again = zray.get(ref)[0]
    assert zray.get(again.pid.remote()) > 0


def test_a_task_that_is_killed_gives_back_what_it_held(gate: Callable[[str], Gate]) -> None:
    started = gate("started")

    @zray.remote(max_retries=0)
    def hold(array: Any, nested: list[Any]) -> None:
        views = [zray.get(nested[0]), array, zray.put(array)]
        started.open()
        os.kill(os.getpid(), signal.SIGKILL)
        del views

    refs = [large(), large()]
    names = [ref.hex() for ref in refs]
    result = hold.remote(refs[0], [refs[1]])
    with pytest.raises(exceptions.WorkerCrashedError):
        zray.get(result)
    assert started.is_open
    assert [zray.get(ref).nbytes for ref in refs] == [200_000] * 2
    del refs
    gc.collect()
    wait_gone(*names)
    wait_for(lambda: not [row for row in query("objects") if row["size"] >= 200_000], what="what it had put is gone")


def test_an_error_keeps_nothing() -> None:
    ref = large()
    name = ref.hex()

    @zray.remote
    def fail(array: Any) -> None:
        raise ValueError(array.nbytes)

    result = fail.remote(ref)
    with pytest.raises(ValueError, match="200000"):
        zray.get(result)
    del ref
    gc.collect()
    wait_gone(name, timeout=SOON)


def test_an_error_in_a_cycle_with_its_frame_keeps_nothing() -> None:
    @zray.remote
    def fail() -> None:
        error = ValueError()
        error.held = zray.put(np.ones(200_000))  # type: ignore[attr-defined]
        raise error

    for _ in range(5):
        with pytest.raises(ValueError):
            zray.get(fail.remote())
    gc.collect()
    wait_for(
        lambda: not [row for row in query("objects") if row["size"] >= 1_000_000], 5, "what the error held is gone"
    )


def test_references_passed_on_through_several_tasks() -> None:
    @zray.remote
    def pass_on(box: list[Any], times: int) -> Any:
        return box if times == 0 else pass_on.remote(box, times - 1)

    inner = large()
    name = inner.hex()
    result = pass_on.remote([inner], 5)
    del inner
    value: Any = result
    while isinstance(value, zray.ObjectRef):
        value = zray.get(value)
    assert zray.get(value[0]).nbytes == 200_000
    del value, result
    gc.collect()
    wait_gone(name)


def test_unpickling_a_reference_to_what_is_gone_says_so() -> None:
    ref = large()
    data, name = pickle.dumps(ref), ref.hex()
    assert zray.get(pickle.loads(data)).nbytes == 200_000
    del ref
    gc.collect()
    wait_gone(name, timeout=SOON)
    with pytest.raises(exceptions.ObjectLostError, match=name):
        pickle.loads(data)


@pytest.mark.slow
def test_lineage_and_books_do_not_grow_with_tasks() -> None:
    echo = zray.remote(lambda x: x)

    def counts() -> tuple[int, int]:
        found = query("statistics")
        return found["entries"], found["holds"]

    zray.get([echo.remote(i) for i in range(2000)])
    before = counts()
    for _ in range(5):
        zray.get([echo.remote(zray.put(i)) for i in range(2000)])
    wait_for(lambda: all(now - then < 20 for now, then in zip(counts(), before)), what=f"{counts()} are near {before}")
