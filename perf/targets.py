"""What is asked of zray, in one table, and how a set of figures is judged by it.

Covers the asked multiples of peers, shares of floors, and absolute bounds. Does not cover measuring (`compare.py`).

A figure has a key of two words: whose figure, and which. `("tasks sync", "x ray")` is our rate over Ray's in the same
run, `("put 800 MB", "x memcpy")` over a floor's, `("get 80 MB", "x get 1 MB")` over another row of our own, `("tasks
sync", "p50 us")` a latency, `("init", "s")` seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on one figure: at least or at most so much (exactly one of the two)."""

    name: str
    figure: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def asked(self) -> str:
        """Return the bound as words."""
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target and what was found: `met` is None if it was not measured; `share` is 1 at the bound, more is better."""

    target: Target
    found: float | None
    met: bool | None
    share: float | None


def _times_ray(multiples: dict[str, float]) -> list[Target]:
    return [Target(name, "x ray", at_least=multiple) for name, multiple in multiples.items()]


TARGETS: list[Target] = [
    *_times_ray(
        {
            "get small": 20,
            "put small": 100,
            "multi-client put small": 100,
            "put 800 MB": 5,
            "multi-client put 80 MB": 1.5,
            "get 80 MB": 8,
            "get 10k references": 6,
            "wait 1k references": 20,
            "1000 tasks and get": 20,
            "tasks sync": 12,
            "tasks async": 25,
            "tasks async with argument": 25,
            "multi-client tasks async": 20,
            "1:1 actor sync": 10,
            "1:1 actor async": 10,
            "1:1 actor concurrent": 5,
            "1:n actor async": 10,
            "n:n actor async": 10,
            "n:n actor async with argument": 20,
            "1:1 async-actor sync": 10,
            "1:1 async-actor async": 15,
            "1:1 async-actor with argument": 15,
            "n:n async-actor async": 15,
            "20 actors created": 40,
            "50k tasks drained": 25,
        }
    ),
    Target("put 800 MB", "x memcpy", at_least=0.8),
    Target("get 80 MB", "x get 1 MB", at_least=0.8),
    Target("tasks async", "x multiprocessing.Pool", at_least=1),
    Target("tasks sync", "x ProcessPoolExecutor", at_least=1.5),
    Target("tasks sync", "p50 us", at_most=100),
    Target("import", "s", at_most=0.1),
    Target("init", "s", at_most=0.3),
    Target("first task", "s", at_most=0.05),
    Target("shutdown", "s", at_most=0.2),
    Target("1M tasks queued", "s", at_most=30),
    Target("1M tasks queued", "bytes a task", at_most=800),
    Target("idle node", "processes", at_most=5),
    Target("idle node", "USS MB", at_most=120),
    Target("idle node", "CPU %", at_most=0.5),
]
"""Every bound there is. "Independent of size" is a get of 80 MB at no less than 0.8 of the rate of one of 1 MB."""


def judge(figures: Mapping[Key, float], targets: list[Target] | None = None) -> list[Verdict]:
    """Hold figures against targets (all of them if not given), in the order of the table."""
    verdicts: list[Verdict] = []
    for target in TARGETS if targets is None else targets:
        found = figures.get((target.name, target.figure))
        if found is None:
            verdicts.append(Verdict(target, None, None, None))
        elif target.at_least is not None:
            verdicts.append(Verdict(target, found, found >= target.at_least, found / target.at_least))
        else:
            assert target.at_most is not None
            share = target.at_most / found if found > 0 else float("inf")
            verdicts.append(Verdict(target, found, found <= target.at_most, share))
    return verdicts


def describe(verdict: Verdict) -> str:
    """Return a verdict in one or two words: met, short (and by how much of the bound), or not measured."""
    if verdict.met is None or verdict.share is None:
        return "not measured"
    return "met" if verdict.met else f"SHORT ({verdict.share:.0%} of it)"
