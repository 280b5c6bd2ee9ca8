"""What happens in a simulation: a node of random size, drivers that do random things, processes that die at random.

Covers making a scenario from a seed and running it to its end. Does not cover what must hold (`invariants`).
"""

from __future__ import annotations

from random import Random

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

PATIENCE = 300.0
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
            max_workers=rng.choice([24, 2048]),
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

    # -- programs ------------------------------------------------------------------------------------------------------

    def program(self, driver: Driver) -> Program:
        """What one driver does."""
        rng, node = self.rng, self.node
        refs: list[bytes] = []
        tasks: list[bytes] = []
        actors: list[bytes] = []
        endless: list[bytes] = []
        for _ in range(rng.randint(2, 10)):
            act = rng.choices(
                [
                    "batch",
                    "like",
                    "chain",
                    "sync",
                    "cancel",
                    "actor",
                    "call",
                    "kill",
                    "wait",
                    "sleep",
                    "endless",
                    "use",
                ],
                [4, 3, 2, 3, 2, 2, 4, 1, 1, 2, 1, 1],
            )[0]
            if act in ("batch", "like"):
                shapes = [rng.choice(self.task_shapes)] if act == "like" else None
                specs = [driver.new_task(driver.root, self.plan(0, shapes)) for _ in range(rng.randint(1, 40))]
                tasks.extend(spec.id for spec in specs)
                refs.extend(driver.submit(driver.root, specs))
            elif act == "chain":
                for _ in range(rng.randint(1, 6)):
                    deps = tuple(rng.sample(refs, min(len(refs), rng.randint(0, 2))))
                    spec = driver.new_task(driver.root, self.plan(0, self.plain), deps)
                    tasks.append(spec.id)
                    refs.extend(driver.submit(driver.root, [spec]))
            elif act == "sync":
                like = rng.choice(self.plain)
                for _ in range(rng.randint(3, 25)):
                    plan = Plan(rng.choices(["ok", "crash"], [40, 1])[0], self.seconds() / 4, 1, (), like.key)
                    refs.append((yield from driver.synchronous_call(plan)))
            elif act == "cancel" and tasks:
                self.cancel(driver, rng.choice(tasks), rng.random() < 0.3, rng.random() < 0.5)
            elif act == "actor":
                actors.append(self.new_actor(driver, rng))
            elif act == "call" and actors:
                actor = rng.choice(actors)
                for _ in range(rng.randint(1, 12)):
                    refs.append(driver.call_actor(actor, driver.root, self.call_plan()))
            elif act == "use" and actors:
                plan = Plan("actor", 1e-4, 0, (self.call_plan(),), self.plain[0].key, rng.choice(actors))
                specs = [driver.new_task(driver.root, plan) for _ in range(rng.randint(1, 5))]
                refs.extend(driver.submit(driver.root, specs))
            elif act == "kill" and actors:
                self.kill_actor(driver, rng.choice(actors), rng.random() < 0.5)
            elif act == "wait" and refs:
                yield Get(rng.sample(refs, min(len(refs), 5)))
            elif act == "sleep":
                yield rng.choice([1e-4, 0.002, 0.05, 0.3])
            elif act == "endless":
                plan = Plan("endless", 1e-5, 0, (), self.plain[0].key)
                specs = [driver.new_task(driver.root, plan) for _ in range(rng.randint(1, 5))]
                endless.extend(driver.submit(driver.root, specs))
        if self.world.chance(0.15):
            driver.die()
            node.world.at(0.002, node.end_job, driver.job, "the driver has died")
            self.drivers_left -= 1
            return
        self.world.at(0.01, node.store.force, node.end_signal, "end")
        yield Get(refs + endless)
        for actor in actors:
            if rng.random() < 0.7:
                self.drop_actor(actor)
        self.drivers_left -= 1

    def call_plan(self) -> Plan:
        """A method call: sometimes it kills its actor."""
        rng = self.rng
        kind = rng.choices(["ok", "error", "crash"], [30, 1, 1])[0]
        return Plan(kind, self.seconds() / 4, 1, (), self.method.key)

    def new_actor(self, driver: Driver, rng: Random) -> bytes:
        """Create an actor."""
        node = self.node
        made = rng.choice([self.creation, self.light])
        kind = rng.choices(["ok", "crash", "error"], [10, 2, 1])[0]
        spec = driver.new_task(driver.root, Plan(kind, self.seconds(), rng.randint(1, 2), (), made.key))
        name = rng.choice(["", "", "name"])
        actor = ActorSpec(
            TaskSpec(spec.id, made.key),
            driver.job,
            name=name,
            namespace="ns",
            max_restarts=rng.choice([0, 1, 3, -1]),
            max_task_retries=rng.choice([0, 1, -1]),
            running_resources=made.resources if made is self.light else b"",
            get_if_exists=rng.random() < 0.5,
        )
        node.actor_specs[spec.id] = actor
        node.store.expect(return_id(spec.id, 0), 0)
        node.replies.add(return_id(spec.id, 0))
        driver.to_broker.send(wire.CreateActor(driver.handle, actor, driver.new_reply() if name else b""))
        return spec.id

    def cancel(self, driver: Driver, task: bytes, force: bool, recursive: bool) -> None:
        """Cancel a task."""
        self.node.cancelled.add(task)
        driver.to_broker.send(wire.CancelTask(task, force, recursive))

    def kill_actor(self, driver: Driver, actor: bytes, no_restart: bool) -> None:
        """Kill an actor."""
        self.node.kills.add(actor)
        driver.to_broker.send(wire.KillActor(actor, no_restart))

    def drop_actor(self, actor: bytes) -> None:
        """The last handle goes; the broker sees it some time later."""
        self.node.kills.add(actor)
        self.world.at(self.world.rng.uniform(0.0, 0.1), self.node.tell, events.ActorUnreferenced(actor))

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
        driver.run(self.program(driver))

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
