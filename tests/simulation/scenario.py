"""What happens in a simulation: a node of random size, drivers that do random things, processes that die at random.

Covers making a scenario from a seed and running it to its end. Does not cover what must hold (`invariants`).
"""

from __future__ import annotations

from random import Random
from typing import Final

from tests.simulation import invariants
from tests.simulation.node import SimNode
from tests.simulation.processes import Driver, Plan
from tests.simulation.world import Get, Program, World
from zray import resources as amounts
from zray import wire
from zray.broker import events
from zray.broker.scheduler import SchedulerConfig
from zray.ids import return_id
from zray.task import ACTOR_CREATION, ACTOR_METHOD, TASK, ActorSpec, CallShape, TaskSpec

PATIENCE = 60.0
"""Simulated seconds after which a program that has not ended is stuck."""


def shape(name: str, kind: int, needs: dict[str, float], max_retries: int = 0) -> CallShape:
    """A shape whose key is its name."""
    packed = amounts.pack(amounts.parse(needs))
    return CallShape(name.encode().ljust(16, b"."), kind, b"f" * 16, name, resources=packed, max_retries=max_retries)


class Scenario:
    """One seed's story."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.world = World(seed)
        rng = self.rng = Random(seed * 7919 + 1)
        self.cpus = rng.choice([1, 2, 2, 3, 4])
        self.gpus = rng.choice([0, 0, 0, 1, 2])
        total: dict[str, float] = {"CPU": self.cpus, "slot": 8}
        if self.gpus:
            total["GPU"] = self.gpus
        config = SchedulerConfig(
            debug=True,
            max_prefetch=rng.choice([1, 4, 256]),
            prestart=rng.choice([-1, 0]),
            worker_idle=rng.choice([0.05, 2.0]),
            lease_idle=rng.choice([0.02, 1.0]),
            max_workers=rng.choice([150, 2048]),
            stop_grace=0.5,
        )
        self.node = SimNode(self.world, total, config, rng.choice([0.0, 0.0, 0.05]))
        self.node.crash_probability = rng.choice([0.0, 0.0, 0.02, 0.08])
        self.task_shapes = self._task_shapes()
        self.plain = [self.task_shapes[0], self.task_shapes[1], self.task_shapes[2]]
        self.method = shape("method", ACTOR_METHOD, {})
        self.creation = shape("Actor", ACTOR_CREATION, {"CPU": 1})
        self.light = shape("LightActor", ACTOR_CREATION, {"slot": 0.5})
        self.drivers_left = 0
        self.checker = invariants.Invariants(self.node)

    def _task_shapes(self) -> list[CallShape]:
        rng = self.rng
        shapes = [
            shape("one", TASK, {"CPU": 1}, rng.choice([0, 1, 3, -1])),
            shape("two", TASK, {"CPU": 1}, rng.choice([0, 1, 3, -1])),
            shape("half", TASK, {"CPU": 0.5}, rng.choice([0, 3])),
            shape("none", TASK, {}, rng.choice([0, 2])),
            shape("slot", TASK, {"CPU": 1, "slot": 1}, 3),
            shape("whole", TASK, {"CPU": self.cpus}, 3),
            shape("never", TASK, {"CPU": 1000}, 3),
        ]
        if self.gpus:
            shapes.append(shape("gpu_half", TASK, {"CPU": 0.5, "GPU": 0.5}, 3))
            shapes.append(shape("gpu_all", TASK, {"CPU": 0.5, "GPU": self.gpus}, 3))
        return shapes

    # -- plans ---------------------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Mostly tiny, sometimes long."""
        rng = self.rng
        return rng.choice([5e-6, 20e-6, 200e-6, 200e-6, 0.003, 0.05]) * rng.uniform(0.5, 1.5)

    def plan(self, depth: int = 0, shapes: list[CallShape] | None = None) -> Plan:
        """A random plan of a task."""
        rng = self.rng
        chosen = rng.choice(shapes if shapes is not None else self.task_shapes)
        kind = rng.choices(["ok", "error", "retry", "crash", "nested"], [14, 1, 1, 1, 2 if depth < 2 else 0])[0]
        plan = Plan(kind, self.seconds(), rng.randint(1, 3), (), chosen.key)
        if kind == "nested":
            plan.children = tuple(self.plan(depth + 1, self.plain) for _ in range(rng.randint(1, 4)))
        return plan

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Everything, to the end; AssertionError when something does not hold."""
        try:
            self._run()
        except AssertionError as error:
            raise AssertionError(self.explain(error)) from error

    def _run(self) -> None:
        world, node = self.world, self.node
        jobs = self.rng.choice([1, 1, 2, 3])
        self.drivers_left = jobs
        for number in range(1, jobs + 1):
            world.at(self.rng.choice([0.0, 0.01, 0.1]) * number, self._start, number)
        self._until(lambda: self.drivers_left == 0, PATIENCE)
        self._until(lambda: False, 5.0, quiet=True)
        self.checker.programs_ended()
        for number in list(node.drivers):
            node.end_job(number, "the driver has ended")
        self._until(lambda: False, 8.0, quiet=True)
        self.checker.all_over()

    def _start(self, number: int) -> None:
        driver = self.node.start_job(number)
        self.node.define([*self.task_shapes, self.method, self.creation, self.light])
        driver.run(Play(self, driver).program())

    def _until(self, done: object, seconds: float, quiet: bool = False) -> None:
        world = self.world
        end = world.now + seconds
        while not done():  # type: ignore[operator]
            if not world.heap or world.heap[0][0] > end:
                world.now = end
                assert quiet, f"stuck: {self.drivers_left} programs wait for ever; {self.checker.waiting()}"
                return
            world.step()

    def explain(self, error: AssertionError) -> str:
        """All that is needed to look into a failure."""
        lines = [f"seed {self.seed}, step {self.world.steps}, time {self.world.now:.6f}: {error}"]
        lines += ["", "the last events:", *list(self.world.log)[-60:]]
        lines += ["", "state:", repr(self.node.scheduler.statistics())]
        for task in self.checker.suspects(str(error))[:3]:
            lines += [f"story of {task.hex()}:", *("    " + line for line in self.node.scheduler.story(task))]
        return "\n".join(lines)


class Play:
    """What one driver does: acts in random order, then it waits for all results and leaves, or is killed."""

    ACTS: Final = {
        "batch": 4,
        "like": 3,
        "mixed": 2,
        "chain": 4,
        "sync": 3,
        "cancel": 2,
        "actor": 4,
        "call": 8,
        "use": 1,
        "kill": 2,
        "wait": 1,
        "sleep": 2,
        "servers": 1,
    }
    """Acts and how often they are chosen: one method each."""

    def __init__(self, scenario: Scenario, driver: Driver) -> None:
        self.scenario = scenario
        self.driver = driver
        self.node = scenario.node
        self.world = scenario.world
        self.rng = scenario.rng
        self.refs: list[bytes] = []
        """Results that come by themselves."""
        self.endless: list[bytes] = []
        """Results that come when this driver seals the end signal."""
        self.tasks: list[bytes] = []
        self.actors: list[bytes] = []

    def program(self) -> Program:
        """The whole play."""
        rng, driver = self.rng, self.driver
        for _ in range(rng.randint(2, 10)):
            act = rng.choices(list(self.ACTS), list(self.ACTS.values()))[0]
            yield from getattr(self, act)()
        if self.world.chance(0.15):
            driver.die()
            self.world.at(0.002, self.node.end_job, driver.job, "the driver has died")
            self.scenario.drivers_left -= 1
            return
        self.world.at(0.01, self.node.store.force, self.node.end_signal, "end")
        yield Get(self.refs + self.endless)
        for actor in self.actors:
            if rng.random() < 0.7:
                self.drop_actor(actor)
        self.scenario.drivers_left -= 1

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def submit(self, plans: list[Plan], deps: tuple[bytes, ...] = ()) -> list[bytes]:
        """Submit tasks with these plans in one frame."""
        driver = self.driver
        specs = [driver.new_task(driver.root, plan, deps) for plan in plans]
        self.tasks.extend(spec.id for spec in specs)
        return driver.submit(driver.root, specs)

    def batch(self) -> Program:
        """Tasks of all kinds."""
        self.refs.extend(self.submit([self.scenario.plan() for _ in range(self.rng.randint(1, 40))]))
        yield 1e-6

    def like(self) -> Program:
        """Tasks of one shape."""
        shapes = [self.rng.choice(self.scenario.task_shapes)]
        self.refs.extend(self.submit([self.scenario.plan(0, shapes) for _ in range(self.rng.randint(1, 40))]))
        yield 1e-6

    def mixed(self) -> Program:
        """Tiny tasks among which some wait for what the driver does only when the others are done."""
        key = self.scenario.plain[0].key
        plans = [Plan("endless" if self.rng.random() < 0.1 else "ok", 5e-6, 0, (), key) for _ in range(60)]
        specs = [self.driver.new_task(self.driver.root, plan) for plan in plans]
        results = self.driver.submit(self.driver.root, specs)
        self.endless.extend(results)
        yield Get([result for result, plan in zip(results, plans, strict=True) if plan.kind == "ok"])

    def chain(self) -> Program:
        """Tasks that use the results of those before; sometimes one of them is cancelled."""
        first = len(self.tasks)
        for _ in range(self.rng.randint(1, 8)):
            recent = self.refs[-6:]
            deps = tuple(self.rng.sample(recent, min(len(recent), self.rng.randint(0, 2))))
            self.refs.extend(self.submit([self.scenario.plan(0, self.scenario.plain)], deps))
        if self.rng.random() < 0.3:
            self.cancel_task(self.rng.choice(self.tasks[first:]))
        yield 1e-6

    def sync(self) -> Program:
        """Calls one after another: what leases are for."""
        like = self.rng.choice(self.scenario.plain)
        for _ in range(self.rng.randint(3, 25)):
            kind = self.rng.choices(["ok", "crash"], [40, 1])[0]
            plan = Plan(kind, self.scenario.seconds() / 4, 1, (), like.key)
            self.refs.append((yield from self.driver.synchronous_call(plan)))

    def servers(self) -> Program:
        """Tasks that end when the driver does, or when they are cancelled, wherever they are by then."""
        plan = Plan("endless", 1e-5, 0, (), self.scenario.plain[0].key)
        specs = [self.driver.new_task(self.driver.root, plan) for _ in range(self.rng.randint(1, 5))]
        results = self.driver.submit(self.driver.root, specs)
        self.endless.extend(results)
        yield 1e-6
        if self.rng.random() < 0.5:
            yield self.rng.choice([1e-5, 1e-4, 0.003, 0.1])
            self.cancel_task(specs[0].id)
            yield Get(results[:1])

    def cancel(self) -> Program:
        """Cancel some task."""
        calls = [ref[:12] + bytes(4) for ref in self.refs[-20:]]
        known = self.tasks if self.rng.random() < 0.7 else calls
        if known:
            self.cancel_task(self.rng.choice(known))
        yield 1e-6

    def cancel_task(self, task: bytes) -> None:
        """Cancel a task in any of the ways there are."""
        self.node.cancelled.add(task)
        force, recursive = self.rng.random() < 0.3, self.rng.random() < 0.5
        self.driver.to_broker.send(wire.CancelTask(task, force, recursive))

    def wait(self) -> Program:
        """Wait for some."""
        yield Get(self.rng.sample(self.refs, min(len(self.refs), 5)))

    def sleep(self) -> Program:
        """Do nothing."""
        yield self.rng.choice([1e-4, 0.002, 0.05, 0.3])

    # -- actors --------------------------------------------------------------------------------------------------------

    def actor(self) -> Program:
        """Create an actor."""
        rng, node, driver, scenario = self.rng, self.node, self.driver, self.scenario
        made = rng.choice([scenario.creation, scenario.light])
        kind = rng.choices(["ok", "crash", "error"], [10, 2, 1])[0]
        plan = Plan(kind, scenario.seconds(), rng.randint(1, 2), (), made.key)
        spec = driver.new_task(driver.root, plan)
        name = rng.choice(["", "", "name"])
        actor = ActorSpec(
            TaskSpec(spec.id, made.key),
            driver.job,
            name=name,
            namespace="ns",
            max_restarts=rng.choice([0, 1, 3, -1]),
            max_task_retries=rng.choice([0, 1, -1]),
            running_resources=made.resources if made is scenario.light else b"",
            get_if_exists=rng.random() < 0.5,
        )
        node.actor_specs[spec.id] = actor
        node.store.expect(return_id(spec.id, 0), 0)
        node.replies.add(return_id(spec.id, 0))
        driver.to_broker.send(wire.CreateActor(driver.handle, actor, driver.new_reply() if name else b""))
        self.actors.append(spec.id)
        yield 1e-6

    def call_plan(self) -> Plan:
        """A method call: sometimes it kills its actor."""
        kind = self.rng.choices(["ok", "error", "crash"], [30, 1, 2])[0]
        return Plan(kind, self.scenario.seconds() / 4, 1, (), self.scenario.method.key)

    def call(self) -> Program:
        """Call an actor a few times."""
        if self.actors:
            actor = self.rng.choice(self.actors)
            for _ in range(self.rng.randint(1, 15)):
                self.refs.append(self.driver.call_actor(actor, self.driver.root, self.call_plan()))
                if self.rng.random() < 0.1:
                    yield 1e-4
        yield 1e-6

    def use(self) -> Program:
        """Tasks that call an actor and wait."""
        if self.actors:
            key, actor = self.scenario.plain[0].key, self.rng.choice(self.actors)
            plans = [Plan("actor", 1e-4, 0, (self.call_plan(),), key, actor) for _ in range(self.rng.randint(1, 5))]
            self.refs.extend(self.submit(plans))
        yield 1e-6

    def kill(self) -> Program:
        """Kill an actor."""
        if self.actors:
            actor = self.rng.choice(self.actors)
            self.node.kills.add(actor)
            self.driver.to_broker.send(wire.KillActor(actor, self.rng.random() < 0.4))
        yield 1e-6

    def drop_actor(self, actor: bytes) -> None:
        """The last handle goes; the broker sees it some time later."""
        self.node.kills.add(actor)
        self.world.at(self.rng.uniform(0.0, 0.1), self.node.tell, events.ActorUnreferenced(actor))
