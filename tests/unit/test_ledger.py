"""zray.broker.ledger: taking, giving back, lending; GPUs one by one."""

from __future__ import annotations

import pytest

from zray import resources
from zray.broker.ledger import Demand, Ledger


def demand(ledger: Ledger, **amounts: float) -> Demand:
    return ledger.demand(resources.pack(resources.parse(amounts)))


def test_equal_demands_are_one_object() -> None:
    ledger = Ledger({"CPU": 2})
    assert demand(ledger, CPU=1) is demand(ledger, CPU=1)


def test_take_and_give_back() -> None:
    ledger = Ledger({"CPU": 2, "licence": 1})
    need = demand(ledger, CPU=0.5, licence=1)
    assert ledger.fits(need)
    ledger.take(need)
    assert not ledger.fits(need)
    assert ledger.fits(demand(ledger, CPU=1.5))
    ledger.give_back(need)
    assert ledger.available == ledger.total


def test_only_the_cpu_is_lent_and_taken_back_by_force() -> None:
    ledger = Ledger({"CPU": 1, "licence": 1})
    need = demand(ledger, CPU=1, licence=1)
    ledger.take(need)
    ledger.lend(need)
    assert ledger.available == {"CPU": 10_000, "licence": 0}
    ledger.take(demand(ledger, CPU=1))
    ledger.take_back(need)
    assert ledger.available["CPU"] == -10_000
    assert ledger.available_floats()["CPU"] == 0.0


def test_thirds_add_up() -> None:
    ledger = Ledger({"CPU": 1})
    third = demand(ledger, CPU=1 / 3)
    for _ in range(3):
        assert ledger.fits(third)
        ledger.take(third)
    assert not ledger.fits(third)


@pytest.mark.parametrize(("free", "times"), [(2.0, 4), (1.9, 3), (0.4, 0)])
def test_how_often_it_fits(free: float, times: int) -> None:
    ledger = Ledger({"CPU": free})
    assert ledger.times(demand(ledger, CPU=0.5), 10) == times
    assert ledger.times(demand(ledger), 10) == 10


def test_what_is_never_there_is_named() -> None:
    ledger = Ledger({"CPU": 2, "GPU": 1})
    need = demand(ledger, CPU=3, unicorn=2)
    assert not ledger.feasible(need)
    text = ledger.why_never(need)
    assert "CPU: 3 asked for, 2 here" in text
    assert "unicorn: 2 asked for, 0 here" in text
    assert ledger.feasible(demand(ledger, CPU=2, GPU=0.3))


def test_fractions_share_the_fullest_gpu_they_fit_on() -> None:
    ledger = Ledger({"GPU": 3})
    half = demand(ledger, GPU=0.5)
    ledger.take(half, (1,))
    assert ledger.choose_gpus(half) == (1,)
    assert ledger.choose_gpus(demand(ledger, GPU=0.6)) == (0,)
    assert ledger.choose_gpus(demand(ledger, GPU=2)) == (0, 2)
    assert ledger.choose_gpus(demand(ledger, GPU=3)) is None
    assert ledger.emptiest_gpus(demand(ledger, GPU=3)) == (0, 1, 2)
    assert ledger.emptiest_gpus(demand(ledger, GPU=1)) == (0,)


def test_a_whole_gpu_does_not_fit_on_two_halves() -> None:
    ledger = Ledger({"GPU": 2})
    half = demand(ledger, GPU=0.5)
    ledger.take(half, (0,))
    ledger.take(half, (1,))
    assert ledger.available["GPU"] == 10_000
    assert not ledger.fits(demand(ledger, GPU=1))
    assert ledger.fits(half)


def test_a_copy_is_apart() -> None:
    ledger = Ledger({"CPU": 1, "GPU": 1})
    other = ledger.copy()
    other.take(demand(ledger, CPU=1, GPU=1), (0,))
    assert ledger.available == ledger.total
    assert ledger.gpu_free == [10_000]


@pytest.mark.parametrize(("cpus", "threads"), [(0.0, 1), (0.5, 1), (1.0, 1), (3.9, 3)])
def test_threads_follow_the_cpus(cpus: float, threads: int) -> None:
    ledger = Ledger({"CPU": 4})
    assert demand(ledger, CPU=cpus).threads == threads


def test_an_idle_process_on_an_empty_gpu_does_not_suit_a_fraction_that_fits_on_a_fuller_one() -> None:
    ledger = Ledger({"GPU": 2})
    half = demand(ledger, GPU=0.5)
    assert ledger.suits(half, (0,))
    assert ledger.suits(half, (1,))
    ledger.take(half, (0,))
    assert ledger.suits(half, (0,))
    assert not ledger.suits(half, (1,))
    assert ledger.suits(demand(ledger, GPU=1), (1,))
    assert not ledger.suits(demand(ledger, GPU=1), (0,))
    assert not ledger.suits(demand(ledger, GPU=2), (0, 1))
