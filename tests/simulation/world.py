"""Time, chance and links of a simulated node.

Covers one seeded heap of (time, event), links between processes that keep order and lose what a dying sender had not
let go of, and programs written as generators. Does not cover what the processes are (`processes`) or what must hold
(`invariants`).

Everything that happens follows from the seed: nothing iterates over sets, nothing looks at a clock.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Generator
from random import Random
from typing import Any

Program = Generator[Any, Any, Any]


class World:
    """One simulated machine."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.now = 0.0
        self.steps = 0
        self.heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self.pushed = 0
        self.log: deque[str] = deque(maxlen=400)
        self.after_step: Callable[[], None] | None = None

    def at(self, delay: float, what: Callable[..., object], *args: Any) -> None:
        """Let something happen `delay` seconds from now."""
        self.pushed += 1
        heapq.heappush(self.heap, (self.now + delay, self.pushed, what, args))

    def step(self) -> bool:
        """Let the next thing happen; False when nothing is left."""
        if not self.heap:
            return False
        self.now, _, what, args = heapq.heappop(self.heap)
        self.steps += 1
        what(*args)
        return True

    def say(self, line: str) -> None:
        """Remember a line for the story of a failure."""
        self.log.append(f"{self.now:.6f} {line}")

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability

    def delay(self) -> float:
        """How long a message or a wake takes: mostly about 60 us, sometimes much longer."""
        if self.rng.random() < 0.03:
            return self.rng.uniform(0.001, 0.03)
        return self.rng.uniform(30e-6, 120e-6)


class Link:
    """An ordered, reliable way from one process to another. What a process has sent when it dies arrives up to some
    point, and nothing after it."""

    def __init__(self, world: World, deliver: Callable[[Any], None]) -> None:
        self.world = world
        self.deliver = deliver
        self.in_flight: deque[Any] = deque()
        self.last = 0.0
        self.dropped = 0

    def send(self, message: Any) -> None:
        """Send; it arrives after all that was sent before."""
        world = self.world
        arrival = max(self.last, world.now + world.delay())
        self.last = arrival
        self.in_flight.append(message)
        world.at(arrival - world.now, self._arrive)

    def _arrive(self) -> None:
        if self.in_flight:
            self.deliver(self.in_flight.popleft())

    def cut(self) -> None:
        """The sender died: some of what is under way was still in its memory."""
        keep = self.world.rng.randint(0, len(self.in_flight))
        while len(self.in_flight) > keep:
            self.in_flight.pop()


class Get:
    """Yielded by a program: wait until all these objects are sealed."""

    def __init__(self, ids: list[bytes]) -> None:
        self.ids = ids


class Message:
    """Yielded by a program: wait until `arrived` is called."""


class Runner:
    """Runs one program of one process; stops for ever when the process is dead."""

    def __init__(self, world: World, process: Any, program: Program) -> None:
        self.world = world
        self.process = process
        self.program = program
        self.token = 0
        self.sleeping = False
        """Waits for a message."""
        self.done = False

    def start(self) -> None:
        """Begin."""
        self._go(self.token, None)

    def wake(self) -> None:
        """A message has come."""
        if self.sleeping:
            self.sleeping = False
            self.world.at(5e-6, self._go, self.token, None)

    def throw(self, error: BaseException) -> None:
        """Raise in the program wherever it waits."""
        self.token += 1
        self.sleeping = False
        self._advance(lambda: self.program.throw(error))

    def _go(self, token: int, value: Any) -> None:
        if token == self.token and self.process.alive and not self.done:
            self.token += 1
            self._advance(lambda: self.program.send(value))

    def _advance(self, resume: Callable[[], Any]) -> None:
        try:
            wish = resume()
        except StopIteration:
            self.done = True
            return
        if not self.process.alive:
            return
        token = self.token
        if isinstance(wish, float):
            self.world.at(wish, self._go, token, None)
        elif isinstance(wish, Get):
            self.process.wait_for(wish.ids, lambda: self._go(token, None))
        elif isinstance(wish, Message):
            self.sleeping = True
        else:
            raise TypeError(f"a program yielded {wish!r}")
