"""Tests of `zray.demo.evolution`: the method is deterministic, its update climbs, and its ranks are what they claim."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zray.demo import evolution
from zray.demo.evolution import Settings, Spaces

CHOICE = Spaces(inputs=3, outputs=2)
BOUNDED = Spaces(inputs=3, outputs=2, low=(-1.0, 0.0), high=(1.0, 10.0))


def test_a_zero_policy_chooses_the_first_action_and_the_middle_of_bounds() -> None:
    observation = np.array([1.0, 2.0, 3.0])
    assert evolution.choose_action(CHOICE, evolution.initial_learner(CHOICE).policy, observation) == 0
    middle = evolution.choose_action(BOUNDED, evolution.initial_learner(BOUNDED).policy, observation)
    np.testing.assert_array_equal(middle, [0.0, 5.0])


def test_an_action_follows_weights_and_bias() -> None:
    policy = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5]])
    assert evolution.choose_action(CHOICE, policy, np.array([1.0, 0.0, 0.0])) == 0
    assert evolution.choose_action(CHOICE, policy, np.array([0.4, 9.0, 9.0])) == 1


@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), st.integers(0, 2**32 - 1))
def test_continuous_actions_stay_within_bounds(observation: list[float], seed: int) -> None:
    policy = 100 * evolution.perturbation(np.zeros((2, 4)), seed)
    action = evolution.choose_action(BOUNDED, policy, np.array(observation))
    assert (np.asarray(action) >= BOUNDED.low).all()
    assert (np.asarray(action) <= BOUNDED.high).all()


def test_a_seed_names_one_perturbation_of_unit_variance() -> None:
    policy = np.zeros((100, 100))
    first, again, other = (evolution.perturbation(policy, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.std() == pytest.approx(1.0, abs=0.05)


def test_seeds_repeat_for_the_same_round_and_differ_between_rounds_runs_and_purposes() -> None:
    rounds = [
        tuple(evolution.generate_seeds(seed, purpose, number, 20))
        for seed in range(3)
        for purpose in (evolution.TRAINING, evolution.EVALUATION)
        for number in range(3)
    ]
    assert evolution.generate_seeds(1, evolution.TRAINING, 2, 20) == list(rounds[8])
    assert len(set(rounds)) == len(rounds)
    assert len({seed for one in rounds for seed in one}) == 20 * len(rounds)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=20).map(lambda xs: [*xs, *xs]))
def test_ranks_keep_order_sum_to_zero_and_share_ties(values: list[int]) -> None:
    returns = np.array(values, dtype=float).reshape(-1, 2)
    ranks = evolution.centred_ranks(returns)
    assert ranks.shape == returns.shape
    assert ranks.sum() == pytest.approx(0.0)
    for a, rank_a in zip(returns.ravel(), ranks.ravel()):
        for b, rank_b in zip(returns.ravel(), ranks.ravel()):
            assert np.sign(a - b) == np.sign(rank_a - rank_b)


def test_ranks_of_different_returns_span_minus_half_to_half() -> None:
    np.testing.assert_allclose(
        evolution.centred_ranks(np.array([[3.0, -1.0], [7.0, 5.0]])), [[-1 / 6, -0.5], [0.5, 1 / 6]]
    )


def test_equal_returns_teach_nothing() -> None:
    learner = evolution.initial_learner(CHOICE)
    seeds = evolution.generate_seeds(0, evolution.TRAINING, 0, 4)
    updated = evolution.compute_update(learner, np.full((4, 2), 500.0), seeds, Settings())
    np.testing.assert_array_equal(updated.policy, learner.policy)
    assert updated.generation == 1


def test_the_first_step_goes_towards_the_better_of_a_pair() -> None:
    learner = evolution.initial_learner(CHOICE)
    settings = Settings()
    direction = evolution.perturbation(learner.policy, 9)
    towards = evolution.compute_update(learner, np.array([[1.0, 0.0]]), [9], settings)
    away = evolution.compute_update(learner, np.array([[0.0, 1.0]]), [9], settings)
    # Adam's first step has the step size in every component, with the sign of the gradient.
    np.testing.assert_allclose(towards.policy, settings.step * np.sign(direction), rtol=1e-5)
    np.testing.assert_allclose(away.policy, -towards.policy)


def test_updates_climb_a_hill_whose_top_is_known() -> None:
    top = np.array([[0.5, -0.3, 0.2, 0.1], [-0.4, 0.6, 0.0, 0.3]])
    settings = Settings()
    learner = evolution.initial_learner(CHOICE)
    for generation in range(80):
        seeds = evolution.generate_seeds(3, evolution.TRAINING, generation, settings.pairs)
        changes = [settings.noise * evolution.perturbation(learner.policy, seed) for seed in seeds]
        returns = np.array(
            [[-np.sum((learner.policy + sign * change - top) ** 2) for sign in (1, -1)] for change in changes]
        )
        learner = evolution.compute_update(learner, returns, seeds, settings)
    assert learner.generation == 80
    assert np.abs(learner.policy - top).max() < 0.1


def test_returns_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 3 rows of two returns"):
        evolution.compute_update(evolution.initial_learner(CHOICE), np.zeros((2, 2)), [1, 2, 3], Settings())
