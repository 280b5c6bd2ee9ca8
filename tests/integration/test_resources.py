"""What tasks and actors ask for and get: CPUs, GPUs, memory, custom resources, threads."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.helpers import SLACK, cpus_are_free, wait_for
from zray.exceptions import TaskUnschedulableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers import Gate, Tally

WARM = {"num_cpus": 4, "num_gpus": 2, "resources": {"licence": 2, "half": 0.5}, "memory": 4 << 30}
pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture
def crowd(gate: Callable[[str], Gate], tally: Tally) -> Any:
    """Start `count` tasks with some options; return how many come to run at once, then let all end."""

    def run(count: int, expected: int, **options: Any) -> int:
        hold = gate("crowd")

        @zray.remote
        def member() -> None:
            tally.add()
            hold.wait()

        refs = [member.options(**options).remote() for _ in range(count)]
        wait_for(lambda: len(tally) >= expected, what=f"{expected} run: {len(tally)}")
        # Whoever could start beside them would: a task that needs nothing overtakes nobody that could run.
        for _ in range(3):
            zray.get(zray.remote(lambda: 1).options(num_cpus=0).remote())
        found = len(tally)
        hold.open()
        zray.get(refs)
        return found

    return run


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 4),
        ({"num_cpus": 2}, 2),
        ({"num_cpus": 3}, 1),
        ({"num_cpus": 0.5}, 8),
        ({"num_cpus": 0, "resources": {"licence": 1}}, 2),
        ({"num_cpus": 0, "resources": {"half": 0.1}}, 5),
        ({"num_cpus": 0, "num_gpus": 1}, 2),
        ({"num_cpus": 0, "num_gpus": 0.5}, 4),
        ({"num_cpus": 0, "memory": 2 << 30}, 2),
    ],
    ids=str,
)
def test_as_many_run_as_fit(crowd: Any, options: dict[str, Any], expected: int) -> None:
    assert crowd(10, expected, **options) == expected


def test_tasks_that_need_no_cpu_are_not_held_up(gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")
    busy = [zray.remote(hold.wait).remote() for _ in range(4)]
    free = zray.remote(lambda i: i).options(num_cpus=0)
    assert zray.get([free.remote(i) for i in range(20)], timeout=30) == list(range(20))
    hold.open()
    zray.get(busy)


def test_what_is_available_follows(gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")
    wait_for(
        lambda: zray.available_resources().get("CPU") == 4
    )  # the notice of an earlier task's end may be on its way
    before = zray.available_resources()
    assert before["licence"] == 2
    ref = zray.remote(hold.wait).options(num_cpus=1.5, resources={"licence": 0.25}).remote()
    wait_for(lambda: zray.available_resources().get("CPU") == 2.5)
    assert zray.available_resources()["licence"] == 1.75
    assert zray.cluster_resources()["CPU"] == 4
    hold.open()
    zray.get(ref)
    wait_for(lambda: zray.available_resources() == before)


@pytest.mark.slow
def test_a_large_request_is_not_starved_by_small_ones(gate: Callable[[str], Gate], tally: Tally) -> None:
    stop = gate("stop")

    @zray.remote
    def small() -> None:
        time.sleep(0.01)

    hold = gate("hold")
    first = [zray.remote(hold.wait).remote() for _ in range(4)]
    flood = [small.remote() for _ in range(400)]
    large = zray.remote(tally.add).options(num_cpus=4).remote("large")
    flood += [small.remote() for _ in range(400)]
    hold.open()
    assert zray.get(large, timeout=60) == 1
    stop.open()
    zray.get([*first, *flood], timeout=60)


def test_an_actor_holds_what_it_asked_for(gate: Callable[[str], Gate]) -> None:
    class Holder:
        def ready(self) -> dict[str, float]:
            return zray.get_runtime_context().get_assigned_resources()

    actor = zray.remote(num_cpus=3, resources={"licence": 2})(Holder).remote()
    assert zray.get(actor.ready.remote()) == {"CPU": 3, "licence": 2}
    assert zray.available_resources()["CPU"] == 1
    waiting = zray.remote(lambda: 5).options(resources={"licence": 1}).remote()
    assert zray.wait([waiting], timeout=0.2)[0] == []
    zray.kill(actor)
    assert zray.get(waiting, timeout=30) == 5


def test_an_actor_that_asks_for_nothing_takes_nothing_while_it_lives() -> None:
    class Light:
        def pid(self) -> int:
            return os.getpid()

    actors = [zray.remote(Light).remote() for _ in range(10)]
    assert len(set(zray.get([actor.pid.remote() for actor in actors]))) == 10
    wait_for(cpus_are_free)


def test_gpus_are_named_before_user_code(gate: Callable[[str], Gate]) -> None:
    hold = gate("hold")

    @zray.remote(num_gpus=1, num_cpus=0)
    def look(wait: bool) -> tuple[str | None, list[int], list[str]]:
        if wait:
            hold.wait()
        context = zray.get_runtime_context()
        return os.environ.get("CUDA_VISIBLE_DEVICES"), zray.get_gpu_ids(), context.get_accelerator_ids()["GPU"]

    one = look.remote(True)
    wait_for(lambda: zray.available_resources().get("GPU") == 1)
    two = look.remote(False)
    second = zray.get(two)
    hold.open()
    first = zray.get(one)
    for visible, ids, names in (first, second):
        assert visible in ("0", "1")
        assert ids == [int(visible)]
        assert names == [visible]
    assert first[0] != second[0]
    both = zray.get(zray.remote(lambda: os.environ["CUDA_VISIBLE_DEVICES"]).options(num_gpus=2).remote())
    assert sorted(both.split(",")) == ["0", "1"]

    class Holder:
        def visible(self) -> str | None:
            return os.environ.get("CUDA_VISIBLE_DEVICES")

    actor = zray.remote(num_gpus=2)(Holder).remote()
    assert sorted((zray.get(actor.visible.remote()) or "").split(",")) == ["0", "1"]


def test_fractions_of_a_gpu_are_packed(gate: Callable[[str], Gate]) -> None:
    # Workers that served other tests are bound to GPUs of their own.
    zray.shutdown()
    zray.init(num_cpus=4, num_gpus=2)
    hold = gate("hold")

    @zray.remote(num_gpus=0.5, num_cpus=0)
    def look() -> str:
        hold.wait()
        return os.environ["CUDA_VISIBLE_DEVICES"]

    refs = [look.remote()]
    wait_for(lambda: zray.available_resources().get("GPU") == 1.5)
    refs.append(look.remote())
    wait_for(lambda: zray.available_resources().get("GPU") == 1)
    whole = zray.remote(lambda: os.environ["CUDA_VISIBLE_DEVICES"]).options(num_gpus=1, num_cpus=0).remote()
    other = zray.get(whole, timeout=30)
    hold.open()
    used = zray.get(refs)
    assert used[0] == used[1] != other
    zray.shutdown()


def test_thread_limits_follow_num_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    @zray.remote
    def limits() -> list[str | None]:
        return [os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")]

    assert zray.get(limits.remote()) == ["1", "1", "1"]
    assert zray.get(limits.options(num_cpus=3).remote()) == ["3", "3", "3"]
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    "options",
    [
        {"num_cpus": 5},
        {"num_gpus": 3},
        {"resources": {"licence": 3}},
        {"memory": 5 << 30},
        {"resources": {"none": 0.001}},
    ],
    ids=str,
)
def test_what_never_fits_fails_within_a_second(options: dict[str, Any]) -> None:
    start = time.monotonic()
    with pytest.raises(TaskUnschedulableError) as raised:
        zray.get(zray.remote(lambda: 1).options(**options).remote(), timeout=20)
    assert time.monotonic() - start < SLACK
    (name, value), *_ = options.items()
    wanted = next(iter(value)) if isinstance(value, dict) else {"num_cpus": "CPU", "num_gpus": "GPU"}.get(name, name)
    assert wanted in str(raised.value)


def test_tiny_fractions_add_up_exactly() -> None:
    work = zray.remote(lambda: 1).options(num_cpus=0, resources={"half": 0.1})
    zray.get([work.remote() for _ in range(100)])
    wait_for(lambda: zray.available_resources()["half"] == 0.5, what=str(zray.available_resources()))
