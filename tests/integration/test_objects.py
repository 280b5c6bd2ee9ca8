"""put and get: what comes back, where it lies, arrays built in place, copy-on-write."""

from __future__ import annotations

import collections
import copy
import datetime
import decimal
import gc
import os
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zray
from tests.helpers import object_state, private_bytes, query, wait_for, wait_gone
from zray import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("warm")

MB = 1 << 20
Pair = collections.namedtuple("Pair", "a b")


def address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -1,
        2**200,
        1.5,
        float("inf"),
        "text",
        "ünïcödé \U0001f600",
        b"bytes",
        b"x" * 100_000,
        bytearray(b"abc"),
        bytearray(100_000),
        [],
        [1, [2, [3]]],
        (1, "a"),
        {"k": {1, 2}},
        frozenset("ab"),
        range(10),
        slice(1, 2),
        Pair(1, 2),
        decimal.Decimal("1.1"),
        datetime.datetime(2020, 1, 2, 3, 4, tzinfo=datetime.timezone.utc),
        complex(1, 2),
        int,
        len,
        "x" * 1_000_000,
        list(range(10_000)),
        NotImplemented,
        Ellipsis,
    ],
    ids=lambda value: f"{type(value).__name__}-{repr(value)[:12]}",
)
def test_values_come_back_equal(value: Any) -> None:
    back = zray.get(zray.put(value))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(10),
        np.array(5.0),
        np.zeros((0, 3)),
        np.arange(1_000_000).reshape(100, 100, 100),
        np.asfortranarray(np.random.default_rng(1).random((300, 400))),
        np.arange(100_000)[::3],
        np.arange(60_000).reshape(300, 200).T,
        np.array(["a", "bcd"]),
        np.array([True, False] * 5000),
        np.array([(1, 2.5)] * 3000, dtype=[("a", "i4"), ("b", "f8")]),
        np.array(["2020-01-01"] * 2000, dtype="datetime64[D]"),
        np.array([1, "x", None] * 1000, dtype=object),
        np.arange(50_000, dtype=">i4"),
        np.broadcast_to(np.arange(1000), (50, 1000)),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_arrays_come_back_equal(array: Any) -> None:
    back = zray.get(zray.put(array))
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert np.array_equal(back, array)


def test_large_arrays_are_read_in_place_and_aligned() -> None:
    array = np.arange(4 * MB, dtype=np.uint8)
    ref = zray.put({"data": [array, array[: 2 * MB + 1]]})
    first, second = zray.get(ref), zray.get(ref)
    for a, b, original in zip(first["data"], second["data"], (array, array[: 2 * MB + 1])):
        assert address(a) == address(b)
        assert address(a) % 64 == 0
        assert np.array_equal(a, original)


def test_getting_a_large_array_takes_no_memory_and_many_readers_share_it() -> None:
    ref = zray.put(np.ones(64 * MB, np.uint8))

    @zray.remote
    def look(array: Any) -> tuple[int, int]:
        before = private_bytes(os.getpid())
        total = int(array[::4096].sum())
        return total, private_bytes(os.getpid()) - before

    before = private_bytes(os.getpid())
    views = [zray.get(ref) for _ in range(20)]
    assert sum(int(view[::4096].sum()) for view in views) == 20 * 64 * MB // 4096
    assert private_bytes(os.getpid()) - before < 16 * MB
    for total, grown in zray.get([look.remote(ref) for _ in range(4)]):
        assert total == 64 * MB // 4096
        assert grown < 16 * MB


def test_arrays_are_read_only_and_say_so() -> None:
    ref = zray.put(np.zeros(100_000))
    array = zray.get(ref)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    small = zray.get(zray.put(np.zeros(3)))
    with pytest.raises(ValueError, match="read-only"):
        small[0] = 1

    @zray.remote
    def write(x: Any) -> None:
        x[0] = 1

    with pytest.raises(ValueError, match="read-only"):
        zray.get(write.remote(ref))
    assert zray.get(ref)[0] == 0


def test_writable_gives_a_private_copy_on_write() -> None:
    size = 32 * MB
    ref = zray.put(np.zeros(size, np.uint8))
    reader = zray.get(ref)
    before = private_bytes(os.getpid())
    mine = zray.get(ref, writable=True)
    other = zray.get(ref, writable=True)
    assert private_bytes(os.getpid()) - before < 4 * MB
    mine[0] = 7
    mine[size // 2] = 8
    assert (mine[0], mine[size // 2]) == (7, 8)
    assert private_bytes(os.getpid()) - before < 4 * MB, "only touched pages may take memory"
    assert (reader[0], other[0], zray.get(ref)[0]) == (0, 0, 0)
    assert zray.get(zray.remote(lambda array: int(array.max())).remote(ref)) == 0
    other[:] = 9
    assert private_bytes(os.getpid()) - before > 24 * MB
    assert (mine[1], reader[1]) == (0, 0)


def test_a_writable_view_outlives_its_reference() -> None:
    ref = zray.put(np.arange(MB))
    mine = zray.get(ref, writable=True)
    name = ref.hex()
    del ref
    zray.put(np.zeros(MB))  # would take the freed block
    mine[0] = -1
    assert mine[1:].sum() == sum(range(MB))
    del mine
    gc.collect()
    wait_gone(name)


@pytest.mark.parametrize("value", [np.arange(3), {"a": np.arange(5000), "b": [1]}, [1, 2], b"abc", "x"])
def test_writable_works_for_every_value(value: Any) -> None:
    back = zray.get(zray.put(value), writable=True)
    assert str(back) == str(value)
    array = back["a"] if isinstance(back, dict) else back
    if isinstance(array, np.ndarray):
        array[0] = 100
        assert array[0] == 100


def test_memory_stays_while_a_view_exists() -> None:
    ref = zray.put(np.arange(MB, dtype=np.int64))
    name = ref.hex()
    part = zray.get(ref)[10:20]
    del ref
    gc.collect()
    for _ in range(5):
        zray.put(np.full(MB, -1, dtype=np.int64))
    assert part.tolist() == list(range(10, 20))
    del part
    gc.collect()
    wait_gone(name)


def test_create_and_seal_build_an_array_in_the_store() -> None:
    building = zray.create((1000, 500), "float32")
    assert building.array.shape == (1000, 500)
    assert building.array.dtype == np.float32
    before = private_bytes(os.getpid())
    building.array[:] = 2.5
    where = address(building.array)
    ref = building.seal()
    assert private_bytes(os.getpid()) - before < MB
    array = zray.get(ref)
    assert address(array) == where
    assert address(array) % 64 == 0
    assert (array == 2.5).all()
    with pytest.raises(ValueError, match="read-only"):
        building.array[0, 0] = 1
    with pytest.raises(exceptions.ZrayUsageError, match="sealed"):
        building.seal()
    assert zray.get(zray.remote(lambda a: float(a.sum())).remote(ref)) == 2.5 * 500_000


def test_create_in_a_task() -> None:
    @zray.remote
    def build(n: int) -> Any:
        building = zray.create(n, "int64")
        building.array[:] = np.arange(n)
        return building.seal()

    assert zray.get(zray.get(build.remote(100_000)))[-1] == 99_999


def test_create_refuses_what_cannot_be_in_shared_memory() -> None:
    with pytest.raises(TypeError, match="object"):
        zray.create(1000, object)
    with pytest.raises(ValueError, match="negative"):
        zray.create((5, -1))
    with pytest.raises(ValueError, match="put"):
        zray.create(1)


def test_an_array_that_is_never_sealed_is_given_back() -> None:
    before = query("statistics")["used"]
    building = zray.create(8 * MB, "uint8")
    assert query("statistics")["used"] >= before + 8 * MB
    del building
    gc.collect()
    wait_for(lambda: query("statistics")["used"] <= before + MB, what="its block is free again")


def test_get_of_lists_and_tuples() -> None:
    refs = [zray.put(i) for i in range(5)]
    assert zray.get(refs) == [0, 1, 2, 3, 4]
    assert zray.get(tuple(refs)) == [0, 1, 2, 3, 4]
    assert zray.get([]) == []
    assert zray.get([refs[0], refs[0]]) == [0, 0]


@pytest.mark.parametrize("wrong", [5, "x", None, [1], {"a": 1}, object()], ids=lambda value: type(value).__name__)
def test_get_of_something_else_is_refused(wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="reference"):
        zray.get(wrong)


def test_get_of_a_list_with_something_else_names_it() -> None:
    with pytest.raises(ValueError, match=r"item 1 .*str"):
        zray.get([zray.put(1), "no"])


def test_get_with_a_timeout(gate: Callable[[str], Any]) -> None:
    hold = gate("hold")
    ref = zray.remote(hold.wait).remote()
    for timeout in (0, 0.05):
        with pytest.raises(exceptions.GetTimeoutError, match=r"1 of 1 .*test_objects"):
            zray.get(ref, timeout=timeout)
    with pytest.raises(TimeoutError):
        zray.get([zray.put(1), ref], timeout=0.05)
    with pytest.raises(ValueError, match="negative"):
        zray.get([ref], timeout=-1)
    hold.open()
    assert zray.get(ref, timeout=30) is None
    assert zray.get(ref, timeout=0) is None


def test_put_of_a_reference_is_refused() -> None:
    with pytest.raises(TypeError, match="list"):
        zray.put(zray.put(1))


def test_references_are_values() -> None:
    a, b = zray.put(1), zray.put(1)
    assert a != b
    assert a == copy.copy(a) == copy.deepcopy(a)
    assert len({a, b, copy.copy(a)}) == 2
    assert a != 5
    assert bytes.fromhex(a.hex()) == a.binary()
    assert a.hex() in repr(a)
    same = pickle.loads(pickle.dumps(a))
    assert same == a
    assert zray.get(same) == 1
    with pytest.raises(TypeError):
        zray.ObjectRef()


def test_each_get_of_a_mutable_value_is_a_new_one() -> None:
    ref = zray.put([1, {"a": 2}])
    one, two = zray.get(ref), zray.get(ref)
    one[1]["a"] = 3
    assert two == zray.get(ref) == [1, {"a": 2}]


def test_later_changes_of_what_was_put_do_not_show() -> None:
    data, array = [1], np.zeros(100_000)
    refs = zray.put(data), zray.put(array)
    data.append(2)
    array[:] = 1
    assert zray.get(refs[0]) == [1]
    assert zray.get(refs[1]).sum() == 0


def test_large_results_lie_in_the_store() -> None:
    @zray.remote
    def make() -> Any:
        return {"array": np.full(16 * MB, 3, np.uint8), "name": "large"}

    ref = make.remote()
    before = private_bytes(os.getpid())
    value = zray.get(ref)
    assert int(value["array"].sum()) == 48 * MB
    assert private_bytes(os.getpid()) - before < 4 * MB
    assert object_state(ref.hex()) == "SEALED"


def test_many_objects_at_once() -> None:
    refs = [zray.put(i) for i in range(20_000)]
    assert sum(zray.get(refs)) == sum(range(20_000))


def test_an_object_that_holds_ten_thousand_references() -> None:
    refs = [zray.put(i) for i in range(10_000)]
    back = zray.get(zray.put(refs))
    assert back == refs
    assert zray.get(back[-1]) == 9_999
    assert zray.get(zray.remote(lambda held: sum(zray.get(held))).remote(zray.put(refs))) == sum(range(10_000))


def test_values_with_custom_reduction_and_by_value_classes() -> None:
    class Point:
        def __init__(self, x: int) -> None:
            self.x = x
            self.array = np.full(5000, x)

        def __eq__(self, other: object) -> bool:
            return vars(self)["x"] == vars(other)["x"]

        __hash__ = None  # type: ignore[assignment]

    point = Point(5)
    assert zray.get(zray.put(point)) == point
    moved = zray.get(zray.remote(lambda p: type(p)(p.x + 1)).remote(point))
    assert (moved.x, int(moved.array[0])) == (6, 6)


def test_views_in_tasks_do_not_keep_objects() -> None:
    ref = zray.put(np.zeros(4 * MB, np.uint8))
    name = ref.hex()
    assert zray.get([zray.remote(lambda array: array.nbytes).remote(ref) for _ in range(8)]) == [4 * MB] * 8
    del ref
    gc.collect()
    wait_gone(name)
