"""A program without type errors: mypy --strict and pyright must accept every line of it. Only read by checkers, never run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar, cast

from typing_extensions import assert_type

import zray as ray
from zray import ActorHandle, ObjectRef, RemoteFunction, exceptions
from zray.actor import ActorClass

T = TypeVar("T")

ray.init(num_cpus=2, resources={"disk": 1.0})

# -- functions ---------------------------------------------------------------------------------------------------------


@ray.remote
def scale(x: int, factor: float = 1.0, *, label: str = "") -> float:
    return x * factor + len(label)


@ray.remote
def nothing() -> None:
    return None


@ray.remote
def total(*numbers: int) -> int:
    return sum(numbers)


@ray.remote
def join(first: str, second: str, third: str, fourth: str) -> str:
    return first + second + third + fourth


@ray.remote
def lengths(words: list[str], by: dict[str, int] | None = None) -> list[int]:
    return [len(word) for word in words]


@ray.remote
def first_of(items: list[T]) -> T:
    return items[0]


integer: ObjectRef[int] = ray.put(3)
number: ObjectRef[float] = ray.put(2.5)
text = ray.put("abc")
assert_type(text, ObjectRef[str])

assert_type(scale.remote(1), ObjectRef[float])
assert_type(scale.remote(x=1), ObjectRef[float])
assert_type(scale.remote(1, 2.0, label="a"), ObjectRef[float])
assert_type(scale.remote(1, factor=2.0), ObjectRef[float])
assert_type(scale.remote(integer), ObjectRef[float])
assert_type(scale.remote(integer, 2.0), ObjectRef[float])
assert_type(scale.remote(1, number), ObjectRef[float])
assert_type(scale.remote(integer, number), ObjectRef[float])
assert_type(scale.remote(integer, number, label="a"), ObjectRef[float])
assert_type(scale.remote(integer, factor=2.0), ObjectRef[float])
assert_type(scale.remote(1, scale.remote(2)), ObjectRef[float])
assert_type(scale.remote(integer, cast(float, number), label=cast(str, text)), ObjectRef[float])
assert_type(nothing.remote(), ObjectRef[None])
assert_type(first_of.remote([1, 2]), ObjectRef[int])
assert_type(total.remote(1, integer, 3), ObjectRef[int])
assert_type(join.remote("a", text, text, "d"), ObjectRef[str])
assert_type(join.remote(text, second="b", third="c", fourth="d"), ObjectRef[str])
assert_type(lengths.remote(["a"], {"a": 1}), ObjectRef[list[int]])
assert_type(lengths.remote(ray.put(["a"]), None), ObjectRef[list[int]])

assert_type(scale.options(num_cpus=2, name="s").remote(1), ObjectRef[float])
assert_type(scale.options(max_retries=0, retry_exceptions=[ValueError]).remote(integer), ObjectRef[float])
assert_type(scale.map([1, 2, 3]), list[ObjectRef[float]])
assert_type(scale.map(range(3), [1.0, number, 3.0]), list[ObjectRef[float]])
assert_type(scale.options(num_cpus=0.5).map([integer, 2]), list[ObjectRef[float]])


@ray.remote(num_cpus=0.5, max_retries=2, resources={"disk": 0.1})
def halve(x: int) -> float:
    return x / 2


assert_type(halve.remote(integer), ObjectRef[float])
assert_type(halve.options(num_returns=1).remote(3), ObjectRef[float])


@ray.remote(num_returns=2)
def divide(x: int, y: int) -> tuple[int, int]:
    return divmod(x, y)


quotient, remainder = divide.remote(7, integer)
assert_type(quotient, ObjectRef[Any])
assert_type(divide.options(num_returns=1).remote(7, 2), ObjectRef[tuple[int, int]])
assert_type(halve.options(num_returns=3).remote(1), list[ObjectRef[Any]])
assert_type(halve.options(num_returns=3).options(num_cpus=1).remote(1), list[ObjectRef[Any]])
halve.options(num_returns=0).remote(1)


def apply(function: RemoteFunction[[int], float], x: int) -> float:
    return ray.get(function.remote(x))


apply(halve, 3)
square: RemoteFunction[[int], int] = ray.remote(lambda x: x * x)


def at_run_time(function: Callable[[int], float]) -> ObjectRef[float]:
    return ray.remote(function).remote(3)


# -- results -----------------------------------------------------------------------------------------------------------

assert_type(ray.get(scale.remote(1)), float)
assert_type(ray.get(scale.remote(1), timeout=3.0), float)
assert_type(ray.get(lengths.remote(["a"]), writable=True), list[int])
assert_type(ray.get([scale.remote(1), scale.remote(2)]), list[float])
assert_type(ray.get([scale.remote(i) for i in range(3)], timeout=1.0), list[float])
assert_type(ray.get(scale.map(range(3))), list[float])
assert_type(ray.get((total.remote(1), total.remote(2))), list[int])
mixed: list[int | str] = ray.get([total.remote(1), text])

refs = [scale.remote(i) for i in range(3)]
ready, not_ready = ray.wait(refs, num_returns=2, timeout=None)
assert_type(ready, list[ObjectRef[float]])
assert_type(not_ready, list[ObjectRef[float]])
assert_type(scale.remote(1).future(), Future[float])
anything: ObjectRef = scale.remote(1)
assert_type(ray.get(anything), Any)
ray.cancel(refs[0], force=True)
seen: dict[ObjectRef[float], int] = {ref: i for i, ref in enumerate(refs)}
digits: str = refs[0].hex()


async def wait_for_it() -> None:
    assert_type(await scale.remote(1), float)
    assert_type(await asyncio.gather(scale.remote(1), total.remote(1)), tuple[float, int])


# -- typed actors --------------------------------------------------------------------------------------------------------


@ray.remote
class Counter(ray.Actor):
    """Derived from `Actor`: the name stays usable as a type, constructor and methods are checked."""

    def __init__(self, start: int, step: int = 1) -> None:
        self.value = start
        self.step = step

    @ray.method
    def add(self, amount: int, times: int = 1) -> int:
        self.value += amount * times
        return self.value

    @ray.method(num_returns=2)
    def both(self) -> tuple[int, int]:
        return self.value, self.step

    @ray.method(max_task_retries=2)
    def name(self, prefix: str) -> str:
        return prefix + str(self.add(0))

    @ray.method
    async def later(self, seconds: float) -> bool:
        await asyncio.sleep(seconds)
        return True


counter = Counter.remote(1)
assert_type(counter, Counter)
assert_type(Counter.remote(integer, step=2), Counter)
assert_type(counter.add.remote(2), ObjectRef[int])
assert_type(counter.add.remote(integer, times=3), ObjectRef[int])
assert_type(counter.add.remote(1, total.remote(2)), ObjectRef[int])
assert_type(counter.name.remote(text), ObjectRef[str])
assert_type(counter.later.remote(0.1), ObjectRef[bool])
assert_type(counter.both.remote(), list[ObjectRef[Any]])
assert_type(counter.add.options(name="first").remote(1), ObjectRef[int])
assert_type(ray.get(counter.add.remote(2)), int)
assert_type(Counter.options(name="c", lifetime="detached", get_if_exists=True).remote(1), Counter)
ray.get(counter.__ray_ready__.remote())


def use(which: Counter, others: list[Counter]) -> int:
    return ray.get(which.add.remote(1)) + sum(ray.get([other.add.remote(1) for other in others]))


use(counter, [counter])


@ray.remote
def drive(which: Counter, amount: int) -> int:
    return ray.get(which.add.remote(amount))


assert_type(drive.remote(counter, integer), ObjectRef[int])


class Base(ray.Actor):
    @ray.method
    def describe(self, prefix: str) -> str:
        return prefix

    @ray.method
    def collect(self, *numbers: int, **named: str) -> dict[str, int]:
        return dict.fromkeys(named, sum(numbers))


@ray.remote(num_cpus=1, max_restarts=-1)
class Derived(Base):
    @ray.method
    def describe(self, prefix: str, suffix: str = "") -> str:
        return super().describe(prefix) + suffix

    @ray.method
    def ask(self, peer: Base) -> str:
        return self.describe("a") + ray.get(peer.describe.remote("b"))


derived = Derived.remote()
assert_type(derived, Derived)
assert_type(derived.describe.remote(text), ObjectRef[str])
assert_type(derived.collect.remote(1, 2, a="b"), ObjectRef[dict[str, int]])
assert_type(derived.ask.remote(derived), ObjectRef[str])
as_base: Base = derived

found: Counter = ray.get_actor("c")
ray.get_actor("c", namespace="other").anything.remote(1, x=2)
ray.kill(counter, no_restart=False)

# -- other actors --------------------------------------------------------------------------------------------------------


class Plain:
    def __init__(self, size: int, name: str = "") -> None:
        self.size = size

    def grow(self, by: int) -> int:
        return self.size + by


PlainActor = ray.remote(Plain)
handle = PlainActor.remote(3)
assert_type(handle, ActorHandle[Plain])
assert_type(PlainActor.remote(integer, name="p"), ActorHandle[Plain])
assert_type(PlainActor.options(num_cpus=1, max_concurrency=4).remote(3), ActorHandle[Plain])
assert_type(ray.remote(num_gpus=1)(Plain).remote(3), ActorHandle[Plain])
as_class: ActorClass[Plain] = PlainActor
grown: ObjectRef[int] = handle.grow.remote(1)
first, second = handle.grow.options(num_returns=2).remote(1)
bare: ActorHandle = handle


def accept(one: ActorHandle[Plain], two: ActorHandle) -> None:
    one.grow.remote(1)
    two.anything.remote(1)


accept(handle, counter_handle := ray.get_actor("x"))

# -- the rest --------------------------------------------------------------------------------------------------------------

with ray.init(ignore_reinit_error=True) as context:
    node_id = context["node_id"]
key: bytes | None = ray.kv.get("key")
ray.kv.put("key", b"value", overwrite=False)
nodes: list[dict[str, Any]] = ray.nodes()
cpus: float = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0)
task: str | None = ray.get_runtime_context().get_task_id()
running: bool = ray.is_initialized()
try:
    ray.get(refs, timeout=0.1)
except exceptions.GetTimeoutError as error:
    print(error)
except ray.exceptions.TaskError:
    pass
array = ray.create((1000, 1000))
array.array[:] = 0
sealed: ObjectRef = array.seal()
ray.timeline("trace.json")
ray.shutdown()
