"""Comparison: targets and verdicts, the report, a side's process and what happens when one fails."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from perf import compare, latency, queued, rows, sides, startup, targets, timing


def record(row: str, ours: list[float], theirs: list[float], floor: list[float]) -> dict[str, Any]:
    return {
        "row": row,
        "unit": "/s",
        "peer": "ray",
        "rates": {"zray": ours, "ray": theirs, "zmq echo": floor},
        "ratios": {
            "ray": {"value": ours[0] / theirs[0], "low": 1.0, "high": 99.0},
            "zmq echo": {"value": ours[0] / floor[0], "low": 0.1, "high": 0.9},
        },
        "latency": {"zray": {"p50": 80.0, "p99": 120.0}, "ray": {"p50": 1300.0, "p99": 1700.0}},
        "disturbed": {"median": 0.03, "most": 0.2},
    }


def test_targets_speak_of_rows_and_figures_that_exist() -> None:
    whole = {*startup.PHASES, "1M tasks queued", "idle node"}
    for target in targets.TARGETS:
        assert target.name in rows.ROWS or target.name in whole
        assert (target.at_least is None) != (target.at_most is None)
    keys = [(target.name, target.figure) for target in targets.TARGETS]
    assert len(keys) == len(set(keys))
    assert {row for row, figure in keys if figure == "x ray"} == rows.ROWS.keys() - {"get 1 MB"}


def test_verdicts_are_met_short_or_not_measured() -> None:
    asked = [
        targets.Target("tasks sync", "x ray", at_least=12),
        targets.Target("tasks sync", "p50 us", at_most=100),
        targets.Target("init", "s", at_most=0.3),
    ]
    sync, p50, init = targets.judge({("tasks sync", "x ray"): 9.0, ("tasks sync", "p50 us"): 80.0}, asked)
    assert (sync.met, sync.share) == (False, 0.75)
    assert targets.describe(sync) == "SHORT (75% of it)"
    assert (p50.met, p50.share) == (True, 1.25)
    assert targets.describe(p50) == "met"
    assert init.met is None
    assert targets.describe(init) == "not measured"
    assert [target.asked for target in asked] == [">= 12", "<= 100", "<= 0.3"]
    assert targets.judge({("idle node", "CPU %"): 0.0}, [targets.Target("idle node", "CPU %", at_most=0.5)])[0].met


def test_figures_come_from_rows_floors_latencies_and_whole_runs() -> None:
    figures = compare.figures_of(
        [
            record("get 80 MB", [90.0], [9.0], [900.0]),
            record("get 1 MB", [100.0], [10.0], [900.0]),
            record("get 80 MB", [1.0], [1.0], [1.0]),
            {"row": "tasks sync", "unit": "/s", "peer": "ray", "error": "died"},
        ],
        {
            "startup": {"runs": {"zray": [dict.fromkeys(startup.PHASES, value) for value in (0.1, 0.3, 0.2)]}},
            "idle": {"runs": {"zray": [{"processes": 4, "uss_mb": 60.0, "cpu_percent": 0.1}]}},
            "queued": {"runs": {"zray": [{"seconds": 9.0, "bytes_a_task": 500.0}]}},
        },
    )
    assert figures["get 80 MB", "x ray"] == 10.0, "the first record counts"
    assert figures["get 80 MB", "x zmq echo"] == 0.1
    assert figures["get 80 MB", "x get 1 MB"] == 0.9
    assert figures["get 80 MB", "p50 us"] == 80.0
    assert figures["init", "s"] == 0.2
    assert figures["idle node", "USS MB"] == 60.0
    assert figures["1M tasks queued", "bytes a task"] == 500.0
    assert ("tasks sync", "x ray") not in figures


def test_the_report_says_what_is_short_and_what_failed() -> None:
    records = [
        record("tasks sync", [10_000.0, 10_500.0, 9_800.0], [1000.0, 1010.0, 990.0], [11_000.0]),
        {"row": "get small", "unit": "/s", "peer": "ray", "error": "Traceback: it burst"},
    ]
    whole = {"startup": {"runs": {"zray": [dict.fromkeys(startup.PHASES, 0.01)], "ray": []}, "errors": {"ray": "no"}}}
    verdicts = targets.judge(compare.figures_of(records, whole))
    found = timing.document("compare", {"versions": {"ray": {"ray": "2.60.0"}}, "rows": records, "whole": whole})
    text = compare.report(found, verdicts)
    line = next(line for line in text.splitlines() if line.startswith("tasks sync"))
    for part in ("10k /s", "1000 /s", "10 [1, 99]", ">= 12", "SHORT (83% of it)", "zmq echo", "11k /s"):
        assert part in line
    [singles] = [line for line in text.splitlines() if "80.0 / 120.0" in line]
    assert singles.split() == ["tasks", "sync", "80.0", "/", "120.0", "ray", "1300.0", "/", "1700.0", "16.2"]
    assert "Traceback: it burst" in text
    assert "5 of 6 measured bounds are met" in text
    assert "; ray: 2.60.0" in text
    assert "import 0.01" in text


def test_settings_and_rows_follow_the_command_line() -> None:
    whole = compare.parse([])
    assert compare.settings_of(whole) == compare.Settings()
    chosen, others = compare.chosen_rows(whole)
    assert [row.name for row in chosen] == list(rows.ROWS)
    assert others == list(compare.WHOLE)
    quick = compare.parse(["--quick", "--blocks", "9"])
    assert compare.settings_of(quick).blocks == 9
    chosen, others = compare.chosen_rows(quick)
    assert not {row.name for row in chosen} & set(compare.SLOW_ROWS)
    assert others == ["startup", "idle"]
    chosen, others = compare.chosen_rows(compare.parse(["--rows", "startup", "tasks sync"]))
    assert ([row.name for row in chosen], others) == (["tasks sync"], ["startup"])
    assert compare.chosen_rows(compare.parse(["--rows", "idle"])) == ([], ["idle"])
    assert isinstance(whole, argparse.Namespace)


def test_peers_of_the_standard_library_need_no_environment(tmp_path: Path) -> None:
    assert compare.python_of("multiprocessing.Pool", tmp_path) == sys.executable
    ready = tmp_path / "loky"
    ready.mkdir()
    (ready / "installed").touch()
    assert compare.python_of("loky", tmp_path) == str(ready / "bin" / "python")
    assert [path.name for path in tmp_path.iterdir()] == ["loky"]


def test_environments_lie_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compare.default_environments() == tmp_path / "zray-perf"


def test_a_side_serves_rows_and_says_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = [
        {"do": "open", "row": "pickle small", "seconds": 0.0},
        {"do": "block", "row": "pickle small", "seconds": 0.0},
        {"do": "sample", "row": "pickle small", "seconds": 0.0},
        {"do": "block", "row": "zmq echo", "seconds": 0.0},
        {"do": "dance", "row": "pickle small"},
        {"do": "close", "row": "pickle small"},
        {"do": "block", "row": "pickle small", "seconds": 0.0},
        {"do": "end"},
        {"do": "open", "row": "fork", "seconds": 0.0},
    ]
    answers = io.StringIO()
    sides.serve("floors", io.StringIO("".join(json.dumps(order) + "\n" for order in orders)), answers)
    said = [json.loads(line) for line in answers.getvalue().splitlines()]
    ready, opened, block, sample, not_open, unknown, closed, gone, ended = said
    assert ready["ready"] == "floors"
    assert (opened, closed, ended) == ({}, {}, {})
    assert block["operations"] == 1000
    assert block["seconds"] > 0
    assert len(sample["nanoseconds"]) == 1
    assert "zmq echo" in not_open["error"]
    assert "dance" in unknown["error"]
    assert "pickle small" in gone["error"]


@pytest.mark.slow
def test_two_sides_take_turns_and_their_processes_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "OURS", "ProcessPoolExecutor")
    names = ("ProcessPoolExecutor", "multiprocessing.Pool", "floors")
    bench = compare.Bench(dict.fromkeys(names, sys.executable), 60.0)
    settings = compare.Settings(blocks=2, seconds=0.02)
    try:
        found = compare.compare_row(bench, rows.ROWS["tasks sync"], "multiprocessing.Pool", settings)
        pids = [bench.side(name)._process.pid for name in names]
        impossible = compare.compare_row(bench, rows.ROWS["put small"], "multiprocessing.Pool", settings)
        again = compare.compare_row(bench, rows.ROWS["tasks sync"], None, settings)
    finally:
        bench.end()
    assert "error" not in found
    assert {name: len(rates) for name, rates in found["rates"].items()} == {
        "ProcessPoolExecutor": 2,
        "multiprocessing.Pool": 2,
        "zmq echo": 2,
        "pipe echo": 2,
        "futex ping-pong": 2,
    }
    assert found["ratios"]["multiprocessing.Pool"]["value"] > 0
    assert found["latency"]["zmq echo"]["p50"] > 0
    assert "put" in impossible["error"], "an executor cannot put, and says so"
    assert "error" not in again, "sides come back after a failure"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_side_that_cannot_start_tells_its_last_words() -> None:
    with pytest.raises(sides.SideError, match="KeyError: 'nobody'"):
        sides.Side("nobody")


@pytest.mark.slow
def test_start_up_is_measured_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pretender.py").write_text(
        "class Remote:\n"
        "    def __init__(self, function):\n"
        "        self.remote = function\n"
        "def init(**options):\n"
        "    assert options == {'num_cpus': 2}, options\n"
        "    print('libraries may print')\n"
        "def remote(function):\n"
        "    return Remote(function)\n"
        "def get(value):\n"
        "    return value\n"
        "def shutdown():\n"
        "    print('and do so late')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    runs = [startup.run_once("pretender") for _ in range(2)]
    found = startup.medians(runs)
    assert list(found) == list(startup.PHASES)
    assert all(summary.count == 2 and summary.median >= 0 for summary in found.values())
    with pytest.raises(RuntimeError, match="No module named 'nobody_has_this'"):
        startup.run_once("nobody_has_this")


def test_histograms_draw_the_body_and_count_the_tail() -> None:
    found = timing.latency([10_000] * 60 + [20_000] * 139 + [5_000_000])
    lines = latency.draw(found, width=10)
    assert lines[-1].split()[:4] == [">", f"{timing.bucket_edge(20_000 / 1000):.1f}", "us", "1"]
    assert lines[-2].endswith(" ##########")
    assert sum(int(line.split()[3]) for line in lines) == 200


def test_workers_are_held_until_the_file_is_there(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    assert queued._announce_and_hold(str(tmp_path), 0) == os.getpid()
    assert (tmp_path / "held0").exists()
