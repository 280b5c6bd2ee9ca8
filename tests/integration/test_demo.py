"""Tests of `zray demo`: five seeds solve CartPole, numbers do not depend on scheduling, files are whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gymnasium", reason="gymnasium is not installed (extra: demo)")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: demo)")

import gymnasium
from click.testing import CliRunner

import zray
from zray import cli
from zray.demo import evolution, report, training
from zray.demo.evolution import Settings
from zray.demo.simulation import Simulator
from zray.demo.training import Generation, Outcome

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `zray demo` as a user would, in a process of its own where warnings are errors."""
    command = [sys.executable, "-W", "error", "-m", "zray.cli", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, stdin=subprocess.DEVNULL)


def read_rows(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / report.CURVE_ROWS).read_text().splitlines()]


def learned(directory: Path) -> list[tuple[float, ...]]:
    """Return what the seed decides of each generation, without times."""
    names = ("generation", "mean", "best", "episodes", "tasks", "evaluation")
    return [tuple(row[name] for name in names) for row in read_rows(directory)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_cartpole_is_solved_from_every_seed(seed: int, tmp_path: Path) -> None:
    done = run_demo("--seed", str(seed), "--out", str(tmp_path), "--no-progress")
    assert done.returncode == 0, done.stderr
    assert "CartPole-v1 solved (threshold 475)" in done.stdout
    result = json.loads((tmp_path / report.RESULT).read_text())
    assert result["solved"]
    assert result["evaluation"] >= 475
    assert result["seed"] == seed
    rows = read_rows(tmp_path)
    assert [row["generation"] for row in rows] == list(range(1, result["generations"] + 1))
    assert all(row["mean"] <= row["best"] <= 500 for row in rows)
    assert rows[-1]["evaluation"] == result["evaluation"]
    assert (tmp_path / report.CURVE_PICTURE).read_bytes().startswith(PNG_SIGNATURE)
    # The policy that was stored is the one that was evaluated: run it here, on episodes of the test's own.
    simulator = Simulator("CartPole-v1")
    returns = [simulator.run_episode(np.array(result["policy"]), 10_000 + episode) for episode in range(20)]
    assert np.mean(returns) >= 450


@pytest.mark.slow
def test_numbers_do_not_depend_on_the_count_of_workers(tmp_path: Path) -> None:
    for workers in ("1", "3"):
        done = run_demo("--workers", workers, "--generations", "4", "--out", str(tmp_path / workers), "--no-progress")
        assert done.returncode == 1, done.stderr  # four generations do not solve it
        assert "CartPole-v1 NOT solved" in done.stdout
    assert learned(tmp_path / "1") == learned(tmp_path / "3")
    results = [json.loads((tmp_path / workers / report.RESULT).read_text()) for workers in ("1", "3")]
    assert results[0]["policy"] == results[1]["policy"]
    assert [result["simulators"] for result in results] == [1, 3]


@pytest.mark.slow
def test_actors_learn_what_a_plain_loop_learns() -> None:
    settings = Settings(pairs=4)
    with zray.init(num_cpus=2):
        outcome = training.train("CartPole-v1", seed=11, simulators=2, generations=3, settings=settings)
    simulator = Simulator("CartPole-v1")
    spaces, _ = simulator.describe()
    learner = evolution.initial_learner(spaces)
    for generation in range(3):
        seeds = evolution.generate_seeds(11, evolution.TRAINING, generation, settings.pairs)
        returns = np.array([simulator.do_simulation(learner.policy, seed, settings.noise) for seed in seeds])
        learner = evolution.compute_update(learner, returns, seeds, settings)
    np.testing.assert_array_equal(outcome.policy, learner.policy)
    seeds = evolution.generate_seeds(11, evolution.EVALUATION, 0, training.EVALUATION_EPISODES)
    assert outcome.evaluation == np.mean([simulator.run_episode(learner.policy, seed) for seed in seeds])
    assert outcome.tasks == 3 * settings.pairs + training.EVALUATION_EPISODES
    assert outcome.episodes == 3 * 2 * settings.pairs + training.EVALUATION_EPISODES


@pytest.mark.slow
def test_continuous_actions_without_a_threshold_run_to_the_end(tmp_path: Path) -> None:
    done = run_demo("--env", "Pendulum-v1", "--generations", "2", "--out", str(tmp_path), "--no-progress")
    assert done.returncode == 0, done.stderr
    assert "Pendulum-v1 trained (no published threshold)" in done.stdout
    assert len(read_rows(tmp_path)) == 2


def test_an_unknown_environment_is_named_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(gymnasium.error.Error, match="NoSuchThing"):
        training.train("NoSuchThing-v9", simulators=1, generations=1)
    for environment in ("NoSuchThing-v9", "FrozenLake-v1"):
        result = CliRunner().invoke(cli.main, ["demo", "--env", environment, "--out", str(tmp_path / "none")])
        assert result.exit_code == 2
        assert "Invalid value for --env" in result.output
    assert not (tmp_path / "none").exists()
    assert not zray.is_initialized()


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one generation"):
        training.train("CartPole-v1", simulators=1, generations=0)
    with pytest.raises(ValueError, match="at least one generation"):
        training.train("CartPole-v1", simulators=0)


def test_an_environment_that_does_not_suit_is_refused() -> None:
    with pytest.raises(TypeError, match="reads arrays"):
        Simulator("FrozenLake-v1")


def test_an_episode_follows_from_policy_and_seed() -> None:
    simulator = Simulator("CartPole-v1")
    # Lean towards the side that the pole falls to: angle, and a little of its speed.
    policy = np.array([[0.0, 0.0, -1.0, -0.5, 0.0], [0.0, 0.0, 1.0, 0.5, 0.0]])
    first = simulator.run_episode(policy, 3)
    assert first > 100
    assert simulator.run_episode(-policy, 3) < 20
    assert simulator.run_episode(policy, 3) == first
    plus, minus = simulator.do_simulation(policy, 3, 0.0)
    assert plus == minus == first


def a_generation(number: int, evaluation: float | None = None) -> Generation:
    return Generation(number, 20.0 * number, 30.0 * number, 64 * number, 32 * number, 0.5 * number, evaluation)


def test_plain_lines_show_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    with report.display(10, live=False) as display:
        display.show(a_generation(2))
        display.show(a_generation(3, 55.5))
    first, second = capsys.readouterr().err.splitlines()
    assert " ".join(first.split()) == "gen 2 mean 40.0 best 60.0 128 episodes/s 64 tasks/s"
    assert second.endswith("evaluated 55.5")


def test_the_live_bar_shows_every_figure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with report.display(10, live=True) as display:
        display.show(a_generation(4))
    assert "gen   4  mean   80.0  best  120.0   128 episodes/s    64 tasks/s" in capsys.readouterr().err


def test_a_broken_off_run_leaves_its_rows(tmp_path: Path) -> None:
    curve = report.CurveWriter(tmp_path / "new" / "directory")
    curve.add(a_generation(1))
    curve.add(a_generation(2, 9.0))
    assert [row["mean"] for row in read_rows(tmp_path / "new" / "directory")] == [20.0, 40.0]


def test_an_outcome_without_a_threshold_is_never_solved() -> None:
    outcome = Outcome("Some-v0", 0, 2, None, 1e9, 5, 100, 50, 1.0, np.zeros((2, 3)))
    assert not outcome.solved
    assert "no published threshold" in report.describe_outcome(outcome)


def test_help_and_bad_options_start_nothing() -> None:
    runner = CliRunner()
    assert "evolution strategies" in runner.invoke(cli.main, ["demo", "--help"]).output
    assert runner.invoke(cli.main, ["demo", "--workers", "0"]).exit_code == 2
    assert runner.invoke(cli.main, ["demo", "--generations", "0"]).exit_code == 2
    assert not zray.is_initialized()


def test_version_names_the_package() -> None:
    output = CliRunner().invoke(cli.main, ["version"]).output
    assert output.startswith("zray 0.")
    assert "msgspec" in output
