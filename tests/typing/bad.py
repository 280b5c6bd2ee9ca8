"""A program full of type errors: mypy --strict and pyright must report each line marked `# E` and no other. Never run."""

from __future__ import annotations

import zray as ray
from zray import ActorHandle, ObjectRef, RemoteFunction


@ray.remote
def scale(x: int, factor: float = 1.0, *, label: str = "") -> float:
    return x * factor + len(label)


@ray.remote(num_returns=2)
def divide(x: int, y: int) -> tuple[int, int]:
    return divmod(x, y)


integer = ray.put(3)
text = ray.put("abc")

# count, types and names of arguments
scale.remote()  # E
scale.remote("a")  # E
scale.remote(1, "b")  # E
scale.remote(1, 2.0, "c")  # E
scale.remote(1, label=3)  # E
scale.remote(1, unknown=3)  # E
scale.remote(x="a")  # E
scale.remote(1, x=1)  # E
scale.remote(None)  # E
divide.remote(1)  # E

# references to other types
scale.remote(text)  # E
scale.remote(integer, text)  # E
scale.remote(scale.remote(1))  # E
scale.remote([integer])  # E

# results
wrong: str = ray.get(scale.remote(1))  # E
also_wrong: ObjectRef[str] = scale.remote(1)  # E
scale.remote(1).upper()  # E
not_a_value: float = scale.remote(1)  # E
words: list[str] = ray.get([scale.remote(1), scale.remote(2)])  # E
ray.get(3)  # E
ray.get([1, 2])  # E
ray.wait(3)  # E
ray.wait(scale.remote(1))  # E
ready, not_ready = ray.wait([scale.remote(1)])
texts: list[ObjectRef[str]] = ready  # E
ray.get(text).bit_length()  # E
ray.get(scale.remote(1), timeout="soon")  # E
ray.cancel(3)  # E


async def wait_for_it() -> str:
    return await scale.remote(1)  # E


# misuse
scale(1)  # E
ray.no_such_name()  # E
scale.no_such_name()  # E
ray.init(num_cpus="two")  # E

# options
scale.options(num_cpus="two").remote(1)  # E
scale.options(no_such_option=1).remote(1)  # E
scale.options(max_restarts=1).remote(1)  # E
scale.options(num_cpus=1).remote("a")  # E
ray.remote(no_such_option=1)  # E
ray.remote(num_cpus="two")  # E
scale.options(num_returns=2).remote("a")  # E
scale.options(num_returns="streaming")  # E

# map
scale.map(["a"])  # E
scale.map([1], ["b"])  # E
scale.map(1)  # E
scale.map([1], [2.0], [3])  # E
sums: list[ObjectRef[str]] = scale.map([1])  # E


def apply(function: RemoteFunction[[int], float]) -> None:
    function.remote(1)


@ray.remote
def upper(x: str) -> str:
    return x.upper()


apply(upper)  # E


# typed actors
@ray.remote
class Counter(ray.Actor):
    def __init__(self, start: int, step: int = 1) -> None:
        self.value = start

    @ray.method
    def add(self, amount: int, times: int = 1) -> int:
        return self.value + amount * times

    @ray.method
    async def later(self, seconds: float) -> bool:
        return True

    def unmarked(self) -> int:
        return self.value


counter = Counter.remote(1)
Counter.remote()  # E
Counter.remote("a")  # E
Counter.remote(1, stop=3)  # E
Counter.remote(text)  # E
Counter.options(name="c").remote("a")  # E
Counter.options(no_such_option=1)  # E
Counter.options(lifetime="forever")  # E
counter.add.remote()  # E
counter.add.remote("a")  # E
counter.add.remote(text)  # E
counter.add.remote(1, 2, 3)  # E
counter.add.remote(1, time=2)  # E
counter.add.options(name="n").remote("a")  # E
counter.add.options(num_cpus=1)  # E
counter.later.remote("soon")  # E
later: str = ray.get(counter.later.remote(1.0))  # E
counter.unmarked.remote()  # E
counter.no_such_method.remote()  # E
result: str = ray.get(counter.add.remote(1))  # E


# other actors
class Plain:
    def __init__(self, size: int) -> None:
        self.size = size

    @ray.method(no_such_option=1)  # E
    def grow(self) -> int:
        return self.size


PlainActor = ray.remote(Plain)
PlainActor.remote()  # E
PlainActor.remote("a")  # E
PlainActor.remote(text)  # E
PlainActor.options(num_cpus="two")  # E
PlainActor.options(num_cpus=1).remote("a")  # E
PlainActor(3)  # E
handle: ActorHandle[Counter] = PlainActor.remote(1)  # E
ray.kv.put("key", "not bytes")  # E
ray.get_runtime_context().no_such_name()  # E
