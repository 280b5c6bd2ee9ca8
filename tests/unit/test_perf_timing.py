"""The timer of perf/: blocks end when they should, summaries and intervals are right, documents are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf import timing


class Tape:
    """A clock, and work that moves it: each call costs what is next in turn (the last cost repeats)."""

    def __init__(self, *costs: float) -> None:
        self.costs = list(costs)
        self.time = 100.0
        self.calls = 0
        self.looks = 0

    def now(self) -> float:
        self.looks += 1
        return self.time

    def work(self) -> None:
        self.time += self.costs[min(self.calls, len(self.costs) - 1)]
        self.calls += 1


def test_a_block_counts_every_call_and_all_of_its_time() -> None:
    tape = Tape(0.001)
    block = timing.run_block(tape.work, 10.0, 1.0, clock=tape.now)
    assert block.operations == tape.calls * 10.0
    assert block.seconds == pytest.approx(tape.time - 100.0)
    assert block.rate == pytest.approx(10_000.0)
    assert 1.0 <= block.seconds < 1.1, "ends near the wanted time"
    assert tape.looks < 60, "the clock is not read at every call"


def test_a_block_of_slow_calls_makes_one() -> None:
    tape = Tape(7.0)
    block = timing.run_block(tape.work, 1.0, 0.5, clock=tape.now)
    assert (tape.calls, block.seconds) == (1, 7.0)


def test_a_block_survives_a_clock_that_stands_still_at_first() -> None:
    tape = Tape(0.0, 0.0, 0.0, 0.3)
    block = timing.run_block(tape.work, 1.0, 0.5, clock=tape.now)
    assert block.operations == tape.calls == 5


def test_a_block_whose_calls_become_slower_does_not_overshoot_by_a_batch_of_fast_ones() -> None:
    tape = Tape(*[0.001] * 100, 0.1)
    block = timing.run_block(tape.work, 1.0, 1.0, clock=tape.now)
    assert block.seconds < 1.0 + 1.0 / timing.BATCHES_A_BLOCK / 0.001 * 0.1


@pytest.mark.parametrize(("calls", "least"), [(0, 0), (1, 1), (4, 4)])
def test_warm_up_makes_the_calls_it_is_told(calls: int, least: int) -> None:
    tape = Tape(0.0)
    timing.warm_up(tape.work, 0.0, calls)
    assert tape.calls == least


def test_measure_takes_blocks() -> None:
    tape = Tape(0.0)
    blocks = timing.measure(tape.work, 2.0, blocks=4, seconds=0.0)
    assert len(blocks) == 4
    assert tape.calls == 1 + sum(block.operations for block in blocks) / 2


def test_sample_times_single_calls_up_to_a_number() -> None:
    taken = timing.sample(lambda: None, 60.0, most=50)
    assert len(taken) == 50
    assert min(taken) > 0
    assert len(timing.sample(lambda: None, 0.0)) == 1


def test_once_returns_the_time_of_one_call() -> None:
    calls: list[int] = []
    assert timing.once(lambda: calls.append(1)) >= 0
    assert calls == [1]


def test_quantiles_lie_between_neighbours() -> None:
    ordered = [1.0, 2.0, 3.0, 4.0]
    assert timing.quantile(ordered, 0.0) == 1.0
    assert timing.quantile(ordered, 0.5) == 2.5
    assert timing.quantile(ordered, 1.0) == 4.0
    assert timing.quantile([7.0], 0.99) == 7.0
    with pytest.raises(ValueError, match="no values"):
        timing.quantile([], 0.5)


def test_summary_has_median_and_quartiles_whatever_the_order() -> None:
    summary = timing.summarize([50.0, 10.0, 30.0, 20.0, 40.0])
    assert (summary.low, summary.median, summary.high) == (20.0, 30.0, 40.0)
    assert summary.spread == pytest.approx(20 / 30)
    assert (summary.best, summary.count) == (50.0, 5)
    assert timing.summarize([0.0]).spread == 0.0


def test_latency_is_in_microseconds_and_its_histogram_holds_every_call() -> None:
    found = timing.latency([1_000] * 98 + [2_000, 64_000])
    assert found.p50 == 1.0
    assert found.most == 64.0
    assert found.count == 100 == sum(count for _, count in found.histogram)
    edges = [edge for edge, _ in found.histogram]
    assert edges == sorted(edges)
    assert edges[0] == 1.0
    assert edges[-1] == 64.0


@pytest.mark.parametrize("microseconds", [0.01, 0.0625, 1.0, 1.1, 99.9, 12_345.0])
def test_bucket_edges_are_at_most_a_quarter_doubling_above(microseconds: float) -> None:
    edge = timing.bucket_edge(microseconds)
    assert edge >= microseconds * 0.9999
    assert edge == 0.0625 or edge <= microseconds * 2**0.25 * 1.0001


def test_ratio_of_steady_sides_has_a_narrow_interval_and_noise_widens_it() -> None:
    steady = timing.ratio([20.0] * 5, [2.0] * 5)
    assert (steady.value, steady.low, steady.high) == (10.0, 10.0, 10.0)
    noisy = timing.ratio([10.0, 20.0, 30.0, 25.0, 15.0], [2.0] * 5)
    assert noisy.value == 10.0
    assert noisy.low < 9.0
    assert noisy.high > 11.0
    assert noisy == timing.ratio([10.0, 20.0, 30.0, 25.0, 15.0], [2.0] * 5), "same seed, same interval"


def test_pairs_of_blocks_share_the_weather() -> None:
    ours, theirs = [10.0, 20.0, 40.0, 80.0, 160.0], [1.0, 2.0, 4.0, 8.0, 16.0]
    paired = timing.ratio(ours, theirs)
    assert (paired.low, paired.value, paired.high) == (10.0, 10.0, 10.0)
    unpaired = timing.ratio(ours, theirs[:4])
    assert unpaired.high > unpaired.low


def test_documents_carry_the_machine_and_are_never_overwritten(tmp_path: Path) -> None:
    found = timing.document("compare", {"rows": [timing.Block(1.0, 2.0)]})
    facts = found["facts"]
    assert {"cpu", "cores", "kernel", "python", "versions", "date", "load", "memory_gib"} <= facts.keys()
    assert "numpy" in facts["versions"]
    first, second = (timing.write_result(found, tmp_path / "results") for _ in range(2))
    assert first.name == f"{facts['date'][:10]}-compare.json"
    assert second.name == f"{facts['date'][:10]}-compare-2.json"
    read = json.loads(first.read_text())
    assert read["format"] == timing.FORMAT
    assert read["rows"] == [{"seconds": 1.0, "operations": 2.0}]
    with pytest.raises(TypeError, match="no place"):
        timing.write_result({**found, "rows": object()}, tmp_path)


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (1.234, "1.23"),
        (123.4, "123"),
        (1234.0, "1234"),
        (12_345.0, "12.3k"),
        (999_499.0, "999k"),
        (1_234_000.0, "1.23M"),
    ],
)
def test_rates_are_written_with_three_digits(rate: float, text: str) -> None:
    assert timing.format_rate(rate) == text
    assert timing.format_rate(rate, "GB/s") == f"{text} GB/s"
