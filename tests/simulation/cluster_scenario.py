"""Random clusters with random programs and random bad luck, each from a seed.

Covers what a scenario consists of: the machines, what the drivers on them do, what is done to machines and network. Does not cover what must
hold (`cluster_invariants`).

A *gentle* scenario loses no process that anybody needs: connections break, links are slow, partitions and pauses are shorter than the time after
which a node counts as dead, also all together where one follows upon another, nodes join. There every call must end as if nothing had happened.
A *violent* one kills workers and nodes, too, and pauses nodes for longer than that.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from random import Random
from typing import Any, Final

import msgspec

from tests.simulation.cluster_invariants import Invariants, Known
from tests.simulation.cluster_machine import Doors, Machine, Site
from tests.simulation.cluster_processes import ActorLink, Driver, Plan, Worker
from tests.simulation.world import Get, Program
from zray import resources, wire
from zray._store import with_index
from zray.broker.membership import CannotJoin
from zray.ids import task_id
from zray.task import ACTOR_CREATION, ACTOR_METHOD, TASK, ActorSpec, CallShape, JobSpec, TaskSpec

PATIENCE: Final = 240.0
"""Simulated seconds after which a program that still waits hangs."""
STEPS: Final = 300_000
"""Steps that no scenario needs."""
QUIET: Final = 12.0
"""... in which all that is under way when the programs end has settled: the longest pause of a link that sends again, and a moment."""

BEARABLE: Final = 0.6
"""The part of a node's timeout for which a node may be cut off: the rest is for connecting again and being heard."""
HEARD_AGAIN: Final = 2.0
"""Seconds after which a node that was cut off has been heard again: the longest pause of a connection that is made anew, a beat, a slow link."""

LENT: Final = ("one", "half", "none")
"""Shapes whose resources are lent while a task waits. A task that waits for one that needs what it holds itself would wait for ever."""

MORE: Final = 0.2
"""The part of scenarios whose programs do what was thought of last."""

_DIRECTORY = tempfile.TemporaryDirectory(prefix="zray-simulation-")


def shape(name: str, kind: int, needs: dict[str, float], retries: int, function: bytes = b"") -> CallShape:
    """A kind of call."""
    key = name.encode().ljust(16, b".")
    return CallShape(key, kind, function, name, resources=resources.pack(resources.parse(needs)), max_retries=retries)


class Scenario:
    """One cluster and all that happens to it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        os.makedirs(f"{_DIRECTORY.name}/logs", exist_ok=True)
        self.site = Site(seed, _DIRECTORY.name, 6.0)
        self.world, self.rng = self.site.world, self.site.world.rng
        self.gentle = self.rng.random() < 0.5
        self.luck = Random(f"desks {seed}")
        """Of what was thought of last: seeds of scenarios without it go on standing for what they stood for."""
        self.more = self.luck.random() < MORE
        self.site.node_timeout = 30.0 if self.rng.random() < 0.1 else 6.0
        self.site.make_worker = Worker
        self.drivers: list[Driver] = []
        self.playing = 0
        self.shapes = self._shapes()
        self.site.shapes = {one.key: one for one in self.shapes.values()}
        self.checker = Invariants(self)
        self.site.executed = self.checker.executed
        self.site.began = self.checker.began
        self.site.refused = self.checker.refused
        self.story: list[str] = []

    def _shapes(self) -> dict[str, CallShape]:
        rng = self.rng
        found = [
            shape("one", TASK, {"CPU": 1}, rng.choice([0, 1, 3, -1])),
            shape("half", TASK, {"CPU": 0.5}, rng.choice([0, 3])),
            shape("none", TASK, {}, rng.choice([0, 2])),
            shape("wheel", TASK, {"CPU": 1, "wheels": 1}, rng.choice([0, 3, -1])),
            shape("method", ACTOR_METHOD, {}, 0),
            shape("actor", ACTOR_CREATION, {"CPU": 1}, 0),
            shape("rolling", ACTOR_CREATION, {"hubs": 0.01}, 0),
            shape("owner", TASK, {"desks": 0.1}, 2),
            shape("owned", ACTOR_CREATION, {"sheds": 0.01}, 0),
        ]
        return {one.name: one for one in found}

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Everything, to the end; AssertionError when something does not hold."""
        try:
            with Doors(self.site):
                self._run()
        except AssertionError as error:
            raise AssertionError(self.explain(error)) from error
        finally:
            for machine in self.site.machines:
                machine.store.closed = True

    def _run(self) -> None:
        rng, world, site = self.rng, self.world, self.site
        head = Machine(site, {"CPU": float(rng.choice([0, 1, 2])), **self._has()})
        head.start("")
        for _ in range(rng.randint(1, 3)):
            self.join()
        for index in range(rng.choice([1, 1, 2, 3])):
            self.playing += 1
            machine = head if index == 0 and rng.random() < 0.6 else rng.choice(site.machines)
            world.at(rng.choice([0.0, 0.01, 0.3]), self._begin, machine, index + 1)
        trouble = Trouble(self)
        trouble.plan()
        world.at(0.25, self._look)
        self._until(lambda: self.playing == 0, PATIENCE)
        ended = world.now
        while trouble.waits or world.now < max(ended, trouble.over_at) + QUIET:
            self._until(lambda: False, 1.0, quiet=True)
        self._until(self.checker.all_acknowledged, 2.0, quiet=True)
        self.checker.programs_ended()
        for driver in self.drivers:
            if driver.alive and driver.machine.alive:
                driver.tell(wire.Goodbye(driver.handle, driver.job))
                driver.exit(0)
        self._until(lambda: False, QUIET, quiet=True)
        self.checker.all_over()

    def join(self, needs: dict[str, float] | None = None) -> Machine:
        """One more machine."""
        rng = self.rng
        has = needs or {"CPU": float(rng.choice([1, 1, 2, 4])), "wheels": float(rng.choice([0, 1, 2])), "hubs": 1.0}
        has |= self._has(needs is not None)
        machine = Machine(self.site, {name: amount for name, amount in has.items() if amount})
        try:
            machine.start(self.site.machines[0].sockets.address)  # type: ignore[union-attr]
        except CannotJoin as error:
            self.world.say(f"{machine} cannot join: {error}")
        return machine

    def _has(self, all_of_it: bool = False) -> dict[str, float]:
        """What a new machine has for tasks that make actors, and for these actors: no machine but the one that helps has both."""
        if not self.more:
            return {}
        if all_of_it:
            return {"desks": 1.0, "sheds": 1.0}
        others = [machine for machine in self.site.machines[1:] if machine.alive]
        desks = bool(self.site.machines) and not any("desks" in machine.resources for machine in others)
        return {"desks": 1.0} if desks or (others and self.luck.random() < 0.5) else {"sheds": 1.0}

    def _begin(self, machine: Machine, number: int) -> None:
        if not machine.alive:
            self.playing -= 1
            return
        driver = Driver(machine, task_id(bytes(16), number))
        self.drivers.append(driver)
        driver.run(Play(self, driver).program())

    def _look(self) -> None:
        self.checker.look()
        self.world.at(0.25, self._look)

    def _until(self, done: Callable[[], bool], seconds: float, quiet: bool = False) -> None:
        world = self.world
        end = world.now + seconds
        while not done():
            assert world.steps < STEPS, f"it goes on and on: {self.checker.waiting()}"
            if not world.heap or world.heap[0][0] > end:
                world.now = end
                assert quiet, f"stuck: {self.playing} programs wait for ever; {self.checker.waiting()}"
                return
            world.step()

    def lost(self, driver: Driver) -> None:
        """A driver's program is over, or its machine dead: nobody waits for it."""
        if not driver.over:
            driver.over = True
            self.playing -= 1

    def explain(self, error: AssertionError) -> str:
        """All that is needed to look into a failure."""
        lines = [f"seed {self.seed}, step {self.world.steps}, time {self.world.now:.6f}: {error}"]
        lines += ["", f"machines {self.site.machines}, gentle {self.gentle}", "what was done:", *self.story]
        lines += ["", "the last events:", *list(self.world.log)[-40:]]
        return "\n".join(lines)


class Trouble:
    """What is done to machines and network."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.site = scenario.site
        self.world = scenario.world
        self.rng = scenario.rng
        self.waits = 0
        """Disturbances that have not begun."""
        self.over_at = 0.0
        """When the last disturbance that is known of is over."""
        self.timeout = self.site.node_timeout
        self.cut_off: dict[bytes, tuple[float, float]] = {}
        """Since when and until when the head and a machine hear nothing of each other, last time: silences that overlap are one."""

    def plan(self) -> None:
        """Decide what will happen when."""
        self.over_at = self.world.now
        rng, scenario = self.rng, self.scenario
        acts: list[Callable[[], None]] = [
            self.cut,
            self.cut,
            self.slow,
            self.partition,
            self.one_way,
            self.pause,
            self.join,
        ]
        if not scenario.gentle:
            acts += [
                self.kill_worker,
                self.kill_worker,
                self.kill_node,
                self.long_pause,
                self.long_partition,
                self.leave,
            ]
        if rng.random() < 0.3:
            self.site.network.repeat_frames = 0.05
        for _ in range(rng.choice([0, 1, 2, 4, 6])):
            when = rng.choice([0.02, 0.1, 0.5, 2.0]) * rng.uniform(0.2, 2.0)
            self._later(when, rng.choice(acts))
        if rng.random() < 0.15:
            self._later(rng.uniform(0.0, 0.5), self.join_with_another_version)
        # Whatever was lost: in the end there is room for all that waits.
        if not scenario.gentle or not any(m.alive and m.resources.get("wheels") for m in self.site.machines):
            self._later(8.0, self.help)

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        self.waits += 1
        self.world.at(seconds, self._do, act)

    def _do(self, act: Callable[[], None]) -> None:
        self.waits -= 1
        self.over_at = max(self.over_at, self.world.now)
        self.scenario.story.append(f"    {self.world.now:.4f} {act.__name__}")
        act()

    def others(self) -> list[Machine]:
        """Living machines but the head, with whom all ends."""
        return [machine for machine in self.site.machines[1:] if machine.alive]

    def two(self) -> list[Machine]:
        """Two living machines."""
        alive = [machine for machine in self.site.machines if machine.alive]
        return self.rng.sample(alive, 2) if len(alive) > 1 else []

    def short(self) -> float:
        """Seconds that must not matter."""
        return self.rng.choice([0.05, 0.5, BEARABLE * self.timeout]) * self.rng.uniform(0.3, 1.0)

    def bearable(self, machines: list[Machine], seconds: float) -> float:
        """For how many of these seconds the machines (one that stands still, or two that do not reach each other) may do so from now on. In a
        gentle scenario nobody takes a machine for dead: what cuts it off from the head while it still suffers from something else ends earlier.
        """
        head = self.site.machines[0]
        if not self.scenario.gentle or (len(machines) > 1 and head not in machines):
            return seconds
        machine = next(machine for machine in machines if machine is not head)
        now = self.world.now
        since, until = self.cut_off.get(machine.id, (now, now))
        if now >= until + HEARD_AGAIN:
            since = now
        end = min(now + seconds, since + BEARABLE * self.timeout)
        self.cut_off[machine.id] = since, max(until, end)
        return max(0.0, end - now)

    def _end_after(self, seconds: float, end: Callable[..., None], *args: Any) -> None:
        self.over_at = max(self.over_at, self.world.now + seconds)
        self.world.at(seconds, end, *args)

    def cut(self) -> None:
        """Connections break again and again."""
        for machine in self.two()[:1]:
            for other in self.site.machines:
                self.site.network.cut(machine.id, other.id)
        if self.rng.random() < 0.7 and self.world.now < 5:
            self.world.at(self.rng.choice([0.003, 0.03, 0.3]), self.cut)

    def slow(self) -> None:
        """A link is slow from now on."""
        two = self.two()
        if two:
            self.site.network.slow[two[0].id, two[1].id] = self.rng.choice([0.001, 0.02, 0.1])

    def partition(self, seconds: float = 0.0, both: bool = True) -> None:
        """Some do not reach others for a while."""
        two = self.two()
        if two:
            one, other = two[0].id, two[1].id
            pairs = [(one, other), (other, one)] if both else [(one, other)]
            self.site.network.block(pairs)
            self._end_after(self.bearable(two, seconds or self.short()), self.site.network.heal, pairs)

    def one_way(self) -> None:
        """Frames get through in one direction only."""
        self.partition(both=False)

    def pause(self, seconds: float = 0.0) -> None:
        """A broker stands still for a while."""
        found = self.others()
        if found:
            machine = self.rng.choice(found)
            if not machine.paused:
                machine.pause()
                self._end_after(self.bearable([machine], seconds or self.short()), machine.resume)

    def join(self) -> None:
        """A machine more."""
        if self.site.machines[0].alive:
            self.scenario.join()

    def help(self) -> None:
        """A machine with everything."""
        if self.site.machines[0].alive:
            self.scenario.join({"CPU": 4.0, "wheels": 4.0, "hubs": 1.0})

    def join_with_another_version(self) -> None:
        """A machine that must be refused."""
        machine = Machine(self.site, {"CPU": 4.0}, version="0.2.0")
        try:
            machine.start(self.site.machines[0].sockets.address)  # type: ignore[union-attr]
        except CannotJoin as error:
            reason = str(error)
        else:
            reason = ""
        assert "0.2.0" in reason or "no answer" in reason, f"a node of another version was not refused: {reason!r}"

    # -- violence ------------------------------------------------------------------------------------------------------

    def kill_worker(self) -> None:
        """SIGKILL."""
        alive = [m for m in self.site.machines if m.alive and m.workers]
        if alive:
            workers = [worker for worker in self.rng.choice(alive).workers.values() if worker.alive]
            if workers:
                self.rng.choice(workers).kill()

    def kill_node(self) -> None:
        """The machine is gone."""
        found = self.others()
        if found:
            self._end(self.rng.choice(found), lambda machine: machine.die("it was killed"))

    def leave(self) -> None:
        """A node is ended in order."""
        found = [machine for machine in self.others() if not machine.paused]
        if found:
            self._end(self.rng.choice(found), lambda machine: machine.leave())

    def _end(self, machine: Machine, how: Callable[[Machine], None]) -> None:
        how(machine)
        self.scenario.checker.died(machine)

    def long_pause(self) -> None:
        """Until everybody takes it for dead, and then it goes on."""
        self.pause(self.timeout * self.rng.uniform(1.1, 2.0) + 1.0)

    def long_partition(self) -> None:
        """As long."""
        self.partition(self.timeout * self.rng.uniform(1.1, 2.0) + 1.0)


class Play:
    """What one driver does: acts in random order, then it waits for all results, looks at them, drops everything and leaves."""

    ACTS: Final = {
        "batch": 5,
        "chain": 4,
        "put": 3,
        "nested": 3,
        "box": 3,
        "actor": 4,
        "call": 8,
        "use": 3,
        "kill": 1,
        "cancel": 2,
        "forget": 2,
        "sleep": 2,
    }

    def __init__(self, scenario: Scenario, driver: Driver) -> None:
        self.scenario = scenario
        self.driver = driver
        self.world, self.rng = scenario.world, scenario.rng
        self.checker = scenario.checker
        self.refs: list[bytes] = []
        self.values: list[bytes] = []
        self.actors: list[bytes] = []
        self.lives: dict[bytes, Any] = {}

    def program(self) -> Program:
        """The whole play."""
        driver, rng = self.driver, self.rng
        yield from self.hello()
        kept = self.keep()
        for _ in range(rng.randint(2, 9)):
            act = rng.choices(list(self.ACTS), list(self.ACTS.values()))[0]
            yield from getattr(self, act)()
        yield from self.more(kept)
        if rng.random() < 0.12:
            self.leave_at_once()
            return
        while self.refs:
            some = self.refs[:40]
            del self.refs[:40]
            while not all(driver.store.sealed(ref) for ref in some):  # an error of the system may be taken back
                yield Get(some)
            for ref in some:
                inner = self.checker.result(driver, ref)
                if inner:
                    self.refs.append(inner)
            driver.drop(some)
        for actor in self.actors:
            self.checker.let_go.add(actor)
        driver.held.clear()
        driver.actor_links.clear()
        self.scenario.lost(driver)

    def more(self, kept: list[bytes]) -> Program:
        """What only some scenarios have."""
        if not self.scenario.more:
            return
        usual, self.rng = self.rng, self.scenario.luck
        for _ in range(self.rng.randint(1, 4)):
            yield from self.rng.choice([self.own, self.brief])()
        if self.rng.random() < 0.5:
            yield max(1e-6, 5.0 - self.world.now)  # most that happens to machines has happened
        self.refs += kept
        self.rng = usual

    def keep(self) -> list[bytes]:
        """Tasks whose values nobody looks at for long, wherever they are. (Of some scenarios only.)"""
        if not self.scenario.more:
            return []
        usual, self.rng = self.rng, self.scenario.luck
        before = len(self.refs)
        for _ in range(self.rng.randint(1, 3)):
            plans = [self.plan("ok", ("one", "one", "half")) for _ in range(self.rng.randint(2, 6))]
            for plan in plans:
                plan.size = 3000
            self.submit(plans, self.inputs())
        self.rng = usual
        kept = self.refs[before:]
        del self.refs[before:]
        return kept

    def leave_at_once(self) -> None:
        """End, in one of two ways, while calls are under way: nobody waits for them any more."""
        driver = self.driver
        if self.rng.random() < 0.5:
            driver.tell(wire.Goodbye(driver.handle, driver.job))
            driver.exit(0)
        else:
            driver.kill()
        self.scenario.lost(driver)

    def hello(self) -> Program:
        """Be admitted."""
        driver = self.driver
        reply = driver.new_reply()
        job = JobSpec(0, driver.root, driver.pid, "ns", [], "/")
        driver.tell(wire.Hello(driver.handle, job, reply, "0.1.0", "3"))
        yield Get([reply])
        answer = msgspec.msgpack.decode(driver.store.entries[reply].data, type=wire.HelloReply)
        driver.job = answer.job
        driver.drop([reply])

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Mostly tiny, sometimes long."""
        return self.rng.choice([0.0, 2e-5, 2e-4, 0.003, 0.05, 0.5]) * self.rng.uniform(0.5, 1.5)

    def plan(self, kinds: str = "", shapes: tuple[str, ...] = ("one", "one", "half", "none", "wheel")) -> Plan:
        """A random plan of a task."""
        rng = self.rng
        kind = kinds or rng.choices(["ok", "error", "crash"], [14, 1, 1])[0]
        chosen = rng.choice(shapes)
        size = rng.choice([0, 0, 0, 20, 500, 3000])
        return Plan(kind, rng.getrandbits(60), self.seconds(), size, rng.randint(1, 3), (), self.key(chosen))

    def key(self, name: str) -> bytes:
        """Of a shape."""
        return self.scenario.shapes[name].key

    def submit(self, plans: list[Plan], deps: tuple[bytes, ...] = ()) -> list[bytes]:
        """Submit in one frame."""
        driver = self.driver
        first = driver.next_child(len(plans))
        results = driver.submit(driver.root, first, plans, deps, driver.root)
        for result, plan in zip(results, plans, strict=True):
            self.checker.known[result] = Known(plan, deps)
        self.refs += results
        return results

    def inputs(self, of_actor: bool = False) -> tuple[bytes, ...]:
        """Some objects to pass on. An actor waits for the arguments of its calls: what calls the actor cannot be one of them."""
        found = [*([] if of_actor else self.refs[-6:]), *self.values[-3:]]
        return tuple(self.rng.sample(found, min(len(found), self.rng.randint(0, 2))))

    def batch(self) -> Program:
        """Tasks of all kinds."""
        self.submit([self.plan() for _ in range(self.rng.choice([1, 4, 30]))], self.inputs())
        yield 1e-6

    def chain(self) -> Program:
        """Tasks that use the results of those before."""
        for _ in range(self.rng.randint(2, 8)):
            self.submit([self.plan("ok")], (self.refs[-1],) if self.refs else ())
        yield 1e-6

    def put(self) -> Program:
        """A value, perhaps one with references in it, and tasks that use it."""
        data = b"v" + self.rng.randbytes(self.rng.choice([10, 1000, 5000]))
        name = self.driver.put(data)
        self.checker.known[name] = Known(None, (), data)
        self.values.append(name)
        self.submit([self.plan() for _ in range(self.rng.randint(1, 4))], (name,))
        yield 1e-6

    def nested(self) -> Program:
        """Tasks that submit tasks and wait."""
        plan = self.plan("nested")
        plan.children = tuple(self.plan(shapes=LENT) for _ in range(self.rng.randint(1, 5)))
        if self.rng.random() < 0.3:
            inner = self.plan("nested", LENT)
            inner.children = tuple(self.plan("ok", LENT) for _ in range(2))
            plan.children += (inner,)
        self.submit([plan], self.inputs())
        yield 1e-6

    def box(self) -> Program:
        """A task that returns the reference of another's result."""
        plan = self.plan("box")
        plan.children = (self.plan(),)
        self.submit([plan])
        yield 1e-6

    def cancel(self) -> Program:
        """Cancel some task."""
        if self.refs:
            task = with_index(self.rng.choice(self.refs[-20:]), 0)
            self.checker.cancelled.add(task)
            self.driver.tell(wire.CancelTask(task, self.rng.random() < 0.3, self.rng.random() < 0.5))
        yield 1e-6

    def forget(self) -> Program:
        """Drop some references, whether there are values or not."""
        for _ in range(self.rng.randint(1, 5)):
            if self.refs:
                ref = self.refs.pop(self.rng.randrange(len(self.refs)))
                self.driver.drop([ref])
        if self.values and self.rng.random() < 0.5:
            self.driver.drop([self.values.pop()])
        yield 1e-6

    def sleep(self) -> Program:
        """Do nothing."""
        yield self.rng.choice([1e-4, 0.01, 0.3, 1.5])

    # -- actors --------------------------------------------------------------------------------------------------------

    def actor(self, after: tuple[bytes, ...] = ()) -> Program:
        """Create an actor. after: it is made when these exist."""
        rng, driver = self.rng, self.driver
        made = self.scenario.shapes[rng.choice(["actor", "rolling", "rolling"])]
        kind = rng.choices(["ok", "crash", "error"], [12, 1, 1])[0]
        plan = Plan(kind, 0, self.seconds() / 4, 0, rng.randint(1, 2), (), made.key)
        actor = task_id(driver.root, driver.next_child())
        deps = after or (self.inputs(True) if rng.random() < 0.2 else ())
        creation = TaskSpec(actor, made.key, msgspec.msgpack.encode(plan), 0, deps)
        spec = ActorSpec(
            creation,
            driver.job,
            max_restarts=rng.choice([0, 1, 3, -1]),
            max_task_retries=rng.choice([0, 1, -1]),
            running_resources=made.resources if "CPU" not in resources.unpack(made.resources) else b"",
        )
        driver.create_actor(spec)
        self.checker.actors[actor] = (spec, plan, deps)
        self.actors.append(actor)
        yield 1e-6

    def own(self) -> Program:
        """Tasks that make actors of their own, which live for long: these, their owner and mostly the driver are on different nodes."""
        plans = []
        for _ in range(self.rng.randint(1, 3)):
            plan = self.plan("own", ("owner",))
            plan.made = self.key("owned")
            plan.children = tuple(self.method("ok") for _ in range(self.rng.randint(1, 3)))
            plan.children[-1].seconds = self.rng.uniform(0.5, 4.0)
            plans.append(plan)
        self.submit(plans)
        yield 1e-6

    def brief(self) -> Program:
        """Create an actor and let go of it soon: before it has a place, while it is made, or later."""
        after: tuple[bytes, ...] = ()
        if self.rng.random() < 0.7:
            plan = self.plan("ok", ("none",))
            plan.seconds = self.rng.uniform(0.0, 0.6)
            after = tuple(self.submit([plan]))
        yield from self.actor(after)
        yield self.rng.choice([1e-6, 0.02, 0.1, 0.3])
        actor = self.actors.pop()
        self.checker.let_go.add(actor)
        self.driver.let_go(actor)

    def method(self, kinds: str = "") -> Plan:
        """A method call: sometimes it kills its actor."""
        rng = self.rng
        kind = kinds or rng.choices(["ok", "error", "crash"], [30, 1, 1])[0]
        size = rng.choice([0, 0, 900])
        return Plan(kind, rng.getrandbits(60), self.seconds() / 10, size, 1, (), self.key("method"))

    def call(self) -> Program:
        """Call an actor a few times."""
        if self.actors:
            actor = self.rng.choice(self.actors)
            for _ in range(self.rng.choice([1, 3, 15])):
                plan, deps = self.method(), self.inputs(True) if self.rng.random() < 0.1 else ()
                result = self.driver.call_actor(actor, self.driver.root, self.driver.next_child(), plan, deps)
                self.checker.called(result, plan, deps, actor, self.driver.handle, self.driver.machine)
                self.refs.append(result)
                if self.rng.random() < 0.1:
                    yield 1e-4
        yield 1e-6

    def use(self) -> Program:
        """Tasks that call an actor and wait."""
        if self.actors:
            actor = self.rng.choice(self.actors)
            plans = []
            for _ in range(self.rng.randint(1, 3)):
                plan = self.plan("call")
                plan.children = tuple(self.method() for _ in range(self.rng.randint(1, 3)))
                plan.actor = actor
                if any(child.kind == "crash" for child in plan.children):
                    self.checker.crashing.add(actor)
                plans.append(plan)
            self.submit(plans)
        yield 1e-6

    def kill(self) -> Program:
        """Kill an actor."""
        if self.actors:
            actor = self.rng.choice(self.actors)
            self.checker.killed.add(actor)
            link = self.driver.actor_links.setdefault(actor, ActorLink(self.driver, actor))
            link.kill(self.rng.random() < 0.5)
        yield 1e-6
