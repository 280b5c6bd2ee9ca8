"""Evolution strategies for a linear policy: policy, perturbations and update, all pure and made from seeds.

The method is that of Salimans, Ho, Chen, Sidor and Sutskever, "Evolution Strategies as a Scalable Alternative to
Reinforcement Learning" (2017, arXiv:1703.03864): Gaussian perturbations named by a seed alone (its Algorithm 2),
mirrored in pairs, returns replaced by centred ranks, and the gradient estimate fed to Adam (Kingma and Ba, 2014,
arXiv:1412.6980). Linear policies were shown to suffice for tasks far harder than CartPole by Mania, Guy and Recht
(2018, arXiv:1803.07055).

Does not cover environments (`simulation`) nor who computes what where (`training`). Same arguments, same numbers: no
clock, no global generator, and the order in which episodes end has no influence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

TRAINING: Final = 0
"""First word after the run's seed for the seeds of training episodes."""
EVALUATION: Final = 1
"""The same for evaluation episodes: no evaluation ever sees an episode that training saw, or another evaluation."""


@dataclass(frozen=True)
class Spaces:
    """What a policy must know of its environment."""

    inputs: int
    """Length of the flattened observation."""
    outputs: int
    """Number of actions to choose from, or of components of a continuous action."""
    low: tuple[float, ...] = ()
    """Lower bounds of a continuous action; empty when actions are discrete."""
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Settings:
    """Constants of the method. The defaults solve CartPole-v1 in 15 to 60 generations from every seed tried."""

    pairs: int = 32
    """Mirrored pairs of perturbations in a generation: each costs two episodes."""
    noise: float = 0.1
    """Standard deviation of a perturbation, in units of the weights (sigma in the paper)."""
    step: float = 0.05
    """Step size of Adam, in units of the weights."""
    decay_mean: float = 0.9
    """Decay of Adam's average of gradients (beta 1; the default of its paper)."""
    decay_square: float = 0.999
    """Decay of Adam's average of squared gradients (beta 2; the default of its paper)."""


@dataclass(frozen=True)
class Learner:
    """The policy and what the update remembers from one generation to the next."""

    policy: Array
    """Weights, one row per output; the last column is the bias."""
    mean: Array
    """Decaying average of gradient estimates."""
    square: Array
    """Decaying average of their squares."""
    generation: int = 0
    """Updates made so far."""


def initial_learner(spaces: Spaces) -> Learner:
    """Return a learner whose policy is all zeros, as linear policies start in both papers."""
    zeros = np.zeros((spaces.outputs, spaces.inputs + 1))
    return Learner(zeros, zeros, zeros)


def choose_action(spaces: Spaces, policy: Array, observation: NDArray[np.floating[Any]]) -> int | Array:
    """Return the policy's action: the output with the largest score, or scores squashed into the action's bounds."""
    scores: Array = policy[:, :-1] @ observation + policy[:, -1]
    if not spaces.low:
        return int(scores.argmax())
    low, high = np.asarray(spaces.low), np.asarray(spaces.high)
    squashed: Array = low + (high - low) * (np.tanh(scores) + 1.0) / 2.0
    return squashed


def perturbation(policy: Array, seed: int) -> Array:
    """Return the standard normal direction that `seed` names; worker and learner both make it, so it is never sent."""
    return np.random.default_rng(seed).standard_normal(policy.shape)


def generate_seeds(seed: int, purpose: int, round_number: int, count: int) -> list[int]:
    """Return `count` 32-bit seeds for one generation (purpose TRAINING) or one evaluation (EVALUATION) of a run."""
    words = np.random.SeedSequence([seed, purpose, round_number]).generate_state(count)
    return [int(word) for word in words]


def centred_ranks(returns: Array) -> Array:
    """Return ranks scaled to [-0.5, 0.5]; equal returns share their mean rank, so that all-equal returns give zeros."""
    flat = returns.ravel()
    ordered = np.sort(flat)
    ranks = (np.searchsorted(ordered, flat, "left") + np.searchsorted(ordered, flat, "right") - 1) / 2.0
    scaled: Array = (ranks / (flat.size - 1) - 0.5).reshape(returns.shape)
    return scaled


def compute_update(learner: Learner, returns: Array, seeds: list[int], settings: Settings) -> Learner:
    """Return the learner after one generation.

    Args:
        learner: the learner that the episodes were run with.
        returns: one row per seed: the return with the perturbation added, then with it subtracted.
        seeds: the seed of each pair, in the order of `returns`.
        settings: constants of the method.

    Raises:
        ValueError: the shapes of `returns` and `seeds` do not belong together.
    """
    if returns.shape != (len(seeds), 2):
        raise ValueError(f"expected {len(seeds)} rows of two returns, got an array of shape {returns.shape}")
    ranks = centred_ranks(returns)
    gradient = np.zeros_like(learner.policy)
    for seed, weight in zip(seeds, ranks[:, 0] - ranks[:, 1], strict=True):
        gradient += weight * perturbation(learner.policy, seed)
    gradient /= 2 * len(seeds) * settings.noise
    count = learner.generation + 1
    mean = settings.decay_mean * learner.mean + (1 - settings.decay_mean) * gradient
    square = settings.decay_square * learner.square + (1 - settings.decay_square) * gradient**2
    unbiased_mean = mean / (1 - settings.decay_mean**count)
    unbiased_square = square / (1 - settings.decay_square**count)
    policy = learner.policy + settings.step * unbiased_mean / (np.sqrt(unbiased_square) + 1e-8)
    return Learner(policy, mean, square, count)
