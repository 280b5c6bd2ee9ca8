"""Simulated drivers, workers and actors.

Covers what these processes do as far as the broker sees it: claiming, running, sealing, reporting in batches, waiting,
leases, numbered actor calls, dying. Does not cover real code or sockets. Each follows the rules of its original
(`zray.worker`, `zray.actor_runtime`, `zray.submission`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from tests.simulation.store import TargetGone
from tests.simulation.world import Get, Link, Message, Program, Runner
from zray import wire
from zray.call_order import CallOrder
from zray.ids import return_id, task_id
from zray.task import ActorSpec, TaskSpec

if TYPE_CHECKING:
    from tests.simulation.node import SimNode


class Plan(msgspec.Struct):
    """What a simulated call does; known to the world by the call's id."""

    kind: str = "ok"
    """ok, error, retry (raises an exception to be retried), crash (its process dies), nested (submits tasks and waits),
    actor (calls an actor and waits), endless (waits until an object is sealed that the driver seals at its end)."""
    seconds: float = 0.0
    crash_attempts: int = 0
    """crash: executions that crash; later ones succeed."""
    children: tuple[Plan, ...] = ()
    shape: bytes = b""
    actor: bytes = b""


class Cancelled(Exception):
    """The task was interrupted."""


def copy_of(spec: TaskSpec) -> TaskSpec:
    """A spec as it comes out of a frame: later changes by the sender do not reach it."""
    return msgspec.structs.replace(spec)


class Process:
    """Anything that lives, waits for objects and sends to the broker."""

    def __init__(self, node: SimNode, job: int) -> None:
        self.node = node
        self.world = node.world
        self.job = job
        self.alive = True
        self.handle = node.new_handle(self)
        self.to_broker = Link(node.world, node.receive)
        self.links: list[Link] = [self.to_broker]
        self.children = 0
        self.actor_links: dict[bytes, ActorLink] = {}
        self.peers: dict[int, Link] = {}

    def wait_for(self, ids: list[bytes], then: Callable[[], None]) -> None:
        """Call `then` once all these are sealed."""
        missing = [self.node.store.entries[i] for i in ids if not self.node.store.sealed(i)]
        if not missing:
            self.world.at(2e-6, then)
            return
        left = len(missing)

        def one() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self.world.at(self.world.rng.uniform(5e-6, 50e-6), then)

        for entry in missing:
            entry.wakes.append(one)

    def peer(self, worker: int) -> Link:
        """The way to another process."""
        link = self.peers.get(worker)
        if link is None:
            link = self.peers[worker] = Link(self.world, lambda message: self.node.deliver_to(worker, message))
            self.links.append(link)
        return link

    def die(self) -> None:
        """Kill -9."""
        self.alive = False
        for link in self.links:
            link.cut()

    # -- submitting ----------------------------------------------------------------------------------------------------

    def new_task(self, parent: bytes, plan: Plan, deps: tuple[bytes, ...] = ()) -> TaskSpec:
        """Make a call's spec and let the world know what it will do."""
        self.children += 1
        task = task_id(parent, self.children)
        self.node.plans[task] = plan
        return TaskSpec(task, plan.shape, deps=deps)

    def submit(self, parent: bytes, specs: list[TaskSpec]) -> list[bytes]:
        """Through the broker; returns the ids of the results."""
        node = self.node
        results = []
        for spec in specs:
            results.append(return_id(spec.id, 0))
            node.store.expect(results[-1], 0, None)
            node.submitted(spec, parent, self.job)
        self.to_broker.send(wire.SubmitTasks(self.handle, self.job, parent, [copy_of(spec) for spec in specs]))
        return results

    def call_actor(self, actor: bytes, parent: bytes, plan: Plan) -> bytes:
        """Call a method; returns the id of the result."""
        link = self.actor_links.get(actor)
        if link is None:
            link = self.actor_links[actor] = ActorLink(self, actor)
        return link.call(parent, plan)


class ActorLink:
    """A caller's connection to an actor through all its incarnations."""

    def __init__(self, process: Process, actor: bytes) -> None:
        self.process = process
        self.actor = actor
        self.incarnation = 0
        self.sequence = 0
        self.target = 0
        self.worker = 0
        self.dead: Any = None
        self.calls = 0

    def call(self, parent: bytes, plan: Plan) -> bytes:
        """Number a call, make its result pending and send it the way that is open."""
        process, node = self.process, self.process.node
        if not self.target and self.dead is None:
            self._look_up()
        process.children += 1
        task = task_id(parent, process.children)
        node.plans[task] = plan
        self.calls += 1
        node.actor_call(task, self.actor, process.handle, self.calls)
        result = return_id(task, 0)
        while True:
            self.sequence += 1
            spec = TaskSpec(task, plan.shape, sequence=self.sequence)
            try:
                node.store.expect(result, self.target, copy_of(spec))
            except TargetGone:
                self._died()
                continue
            break
        if self.dead is not None:
            node.store.force(result, self.dead)
        elif self.target and not (self.incarnation and self.sequence == 1):
            process.peer(self.worker).send(wire.CallActor(process.handle, self.incarnation, [copy_of(spec)]))
        else:
            process.to_broker.send(
                wire.SubmitActorCalls(process.handle, process.job, self.actor, self.incarnation, [copy_of(spec)])
            )
        return result

    def _look_up(self) -> None:
        store = self.process.node.store
        entry = store.entries.get(return_id(self.actor, self.incarnation))
        if entry is None or entry.state != "SEALED":
            return
        if isinstance(entry.value, wire.ActorAddress):
            address = entry.value
            if address.process in store.gone:
                self._died()
            else:
                self.worker, self.target = address.worker, address.process
        elif return_id(self.actor, self.incarnation + 1) not in store.entries:
            self.dead = entry.value
        else:
            self._died()

    def _died(self) -> None:
        self.worker = self.target = 0
        self.incarnation += 1
        self.sequence = 0
        self._look_up()


class Driver(Process):
    """A user's program."""

    def __init__(self, node: SimNode, job: int, root: bytes) -> None:
        super().__init__(node, job)
        self.root = root
        self.lease: tuple[wire.Lease, bytes] | None = None
        self.lease_reply = b""
        self.replies = 0

    def run(self, program: Program) -> None:
        """Begin its program."""
        self.runner = Runner(self.world, self, program)
        self.runner.start()

    def new_reply(self) -> bytes:
        """A pending object for an answer."""
        self.replies += 1
        reply = return_id(task_id(self.root, (1 << 40) + self.replies), 0)
        self.node.store.expect(reply, 0)
        self.node.replies.add(reply)
        return reply

    def synchronous_call(self, plan: Plan) -> Program:
        """One call and its result: straight to a leased worker when there is one, else through the broker."""
        node, store = self.node, self.node.store
        spec = self.new_task(self.root, plan)
        if self.lease is None and self.lease_reply and store.sealed(self.lease_reply):
            value = store.entries[self.lease_reply].value
            self.lease = (value, plan.shape) if isinstance(value, wire.Lease) else None
            self.lease_reply = b""
        if self.lease is None and not self.lease_reply:
            self.lease_reply = self.new_reply()
            self.to_broker.send(wire.LeaseRequest(self.handle, self.job, plan.shape, self.lease_reply))
        lease = self.lease
        if lease is not None and lease[1] == plan.shape:
            if store.words.get((lease[0].process, wire.WORD_LEASE)) != lease[0].epoch:
                self.lease = None
            elif store.expected(lease[0].process) == 0:
                node.lease_is_used(self, lease[0])
                if self.world.chance(0.2):
                    yield 3e-6  # between looking and leaving the lease may be taken back
                result = return_id(spec.id, 0)
                try:
                    store.expect(result, lease[0].process, copy_of(spec))
                except TargetGone:
                    self.lease = None
                else:
                    node.submitted(spec, self.root, self.job, direct=True)
                    self.peer(lease[0].worker).send(wire.RunDirect(self.handle, lease[0].epoch, [copy_of(spec)]))
                    yield Get([result])
                    return result
        result = self.submit(self.root, [spec])[0]
        yield Get([result])
        return result


class Worker(Process):
    """A process made by the fork parent: runs tasks one at a time, or becomes an actor."""

    def __init__(self, node: SimNode, number: int, job: int, environment: dict[str, str]) -> None:
        super().__init__(node, job)
        self.number = number
        self.environment = environment
        self.inbox: deque[tuple[str, TaskSpec]] = deque()
        self.reports: list[tuple[bytes, int, int]] = []
        self.current: bytes = b""
        self.cancel_word = b""
        self.interruptible = False
        self.blocked = False
        self.stopping = False
        self.actor: SimActor | None = None
        self.pid = 1000 + number
        self.last_flush = 0.0
        self.from_broker = Link(self.world, self.receive)
        self.runner = Runner(self.world, self, self.main())

    def die(self) -> None:
        """Kill -9: everything not sealed by now stays as it is."""
        if self.alive:
            super().die()
            self.node.world.say(f"worker {self.number} dies")

    # -- messages ------------------------------------------------------------------------------------------------------

    def receive(self, message: Any) -> None:
        """A frame came."""
        if not self.alive:
            return
        if isinstance(message, wire.RunTasks):
            self.inbox.extend(("task", spec) for spec in message.tasks)
        elif isinstance(message, wire.RunDirect):
            self.inbox.extend(("direct", spec) for spec in message.tasks)
        elif isinstance(message, wire.StartActor):
            assert self.actor is None, f"worker {self.number} is told to become a second actor"
            self.actor = SimActor(self, message)
        elif isinstance(message, wire.CallActor):
            if self.actor is not None and message.incarnation == self.actor.incarnation:
                for spec in message.calls:
                    for ready in self.actor.order.arrive(message.process, spec):
                        self.inbox.append(("call", ready))
        elif isinstance(message, wire.ExitWhenIdle):
            assert self.actor is not None
            self.actor.exiting = True
        elif isinstance(message, wire.Shutdown):
            self.stopping = True
        self.runner.wake()

    def interrupt(self, task: bytes) -> None:
        """The broker set WORD_CANCEL and sent a signal."""
        self.cancel_word = task
        if self.current == task and self.interruptible:
            self.interruptible = False
            self.runner.throw(Cancelled())

    # -- the program ---------------------------------------------------------------------------------------------------

    def main(self) -> Program:
        """Serve until told to stop."""
        self.to_broker.send(wire.WorkerReady(self.number, self.handle))
        while True:
            if self.actor is not None and not self.actor.made:
                yield from self.actor.construct()
            if not self.inbox:
                self.flush(True)
                if self.actor is not None and self.actor.exiting:
                    self.to_broker.send(wire.ActorExit(self.number, self.actor.spec.creation.id))
                    self.exit(0)
                    return
                if self.stopping:
                    self.exit(0)
                    return
                yield Message()
                continue
            kind, spec = self.inbox.popleft()
            yield from self.execute(kind, spec)
            if self.world.now - self.last_flush > 0.001:
                self.flush(not self.inbox)

    def exit(self, status: int) -> None:
        """End by its own will: what was sent leaves first."""
        self.alive = False
        self.node.process_exited(self, status)

    def flush(self, idle: bool) -> None:
        """Report ends."""
        self.last_flush = self.world.now
        if self.reports:
            ids = b"".join(report[0] for report in self.reports)
            statuses = bytes(report[1] for report in self.reports)
            micros = [report[2] for report in self.reports]
            self.reports.clear()
            self.to_broker.send(wire.TasksDone(self.number, ids, statuses, micros, idle))

    def execute(self, kind: str, spec: TaskSpec) -> Program:
        """Claim, run, seal, report."""
        node, store = self.node, self.node.store
        result = return_id(spec.id, 0)
        yield self.world.rng.uniform(1e-6, 4e-6)
        if not store.claim(result, spec.attempt, self.handle):
            self.reports.append((spec.id, wire.DONE_SKIPPED, 0))
            return
        node.running(self, spec, kind)
        begun = self.world.now
        self.current = spec.id
        self.children = 0  # ids follow from the parent: run again, it makes the same ones
        try:
            if self.cancel_word == spec.id:
                raise Cancelled
            self.interruptible = kind != "call"
            status, value = yield from self.body(kind, spec)
        except Cancelled:
            status, value = wire.DONE_CANCELLED, ("error", "cancelled by its worker")
        self.interruptible = False
        self.current = b""
        if self.blocked:
            self.blocked = False
            self.to_broker.send(wire.Unblocked(self.number))
        node.stopped_running(self, spec)
        if status != wire.DONE_RETRY:
            answer = store.seal(result, spec.attempt, self.handle, value)
            if answer == "stale":
                status = wire.DONE_SKIPPED
            elif answer == "tell":
                self.to_broker.send(wire.Sealed(result))
                if self.world.chance(node.crash_probability):
                    node.kill_process(self)
                    yield Message()
        self.reports.append((spec.id, status, int((self.world.now - begun) * 1e6)))

    def body(self, kind: str, spec: TaskSpec) -> Program:
        """Do what the call's plan says."""
        plan = self.node.plans[spec.id]
        if plan.kind == "crash" and spec.attempt < plan.crash_attempts:
            yield plan.seconds
            self.flush(False) if self.world.chance(0.5) else None
            self.die()
            self.node.process_exited(self, -11)
            yield Message()
        yield plan.seconds
        if plan.kind == "error":
            return wire.DONE_ERROR, ("error", "user code")
        if plan.kind == "retry":
            shape = self.node.shapes[spec.shape]
            if shape.max_retries < 0 or spec.attempt < shape.max_retries:
                if spec.attempt >= plan.crash_attempts:
                    return wire.DONE_OK, "value"
                return wire.DONE_RETRY, None
            return wire.DONE_ERROR, ("error", "retries used up")
        if plan.kind == "nested":
            yield from self.nested(spec.id, plan)
        elif plan.kind == "actor":
            result = self.call_actor(plan.actor, spec.id, plan.children[0])
            yield from self.get([result])
        elif plan.kind == "endless":
            yield from self.get([self.node.end_signal])
        return wire.DONE_OK, "value"

    def nested(self, parent: bytes, plan: Plan) -> Program:
        """Submit tasks and wait for them, perhaps one after another."""
        specs = [self.new_task(parent, child) for child in plan.children]
        if self.world.chance(0.3):
            for spec in specs:
                yield from self.get(self.submit(parent, [spec]))
        else:
            yield from self.get(self.submit(parent, specs))

    def get(self, ids: list[bytes]) -> Program:
        """Wait; tell the broker when it takes longer than a moment."""
        store = self.node.store
        if all(store.sealed(i) for i in ids):
            return
        self.flush(False)
        task = self.current
        self.world.at(0.0005, self.tell_blocked, ids, task)
        yield Get(ids)
        if self.blocked:
            self.blocked = False
            self.to_broker.send(wire.Unblocked(self.number))

    def tell_blocked(self, ids: list[bytes], task: bytes) -> None:
        """Still waiting?"""
        here = self.alive and self.current == task and not self.blocked
        if here and not all(self.node.store.sealed(i) for i in ids):
            self.blocked = True
            self.flush(False)
            self.to_broker.send(wire.Blocked(self.number))


class SimActor:
    """What a worker becomes."""

    def __init__(self, worker: Worker, message: wire.StartActor) -> None:
        self.worker = worker
        self.spec: ActorSpec = message.spec
        self.incarnation = message.incarnation
        self.replay = message.replay
        self.order = CallOrder()
        self.made = False
        self.exiting = False
        worker.node.actor_began(worker, self.spec, self.incarnation)

    def construct(self) -> Program:
        """Run the constructor, then the calls that come before all others."""
        worker, world = self.worker, self.worker.world
        plan = worker.node.plans[self.spec.creation.id]
        yield plan.seconds
        if plan.kind == "crash" and self.incarnation < plan.crash_attempts:
            worker.die()
            worker.node.process_exited(worker, -6)
            yield Message()
        self.made = True
        if plan.kind == "error":
            worker.to_broker.send(wire.ActorFailed(worker.number, self.spec.creation.id, b"why"))
            yield Message()
        worker.to_broker.send(wire.ActorReady(worker.number, worker.handle, self.spec.creation.id))
        worker.inbox.extendleft(("call", spec) for spec in reversed(self.replay))
        name = self.spec.creation.id.hex()[:8]
        world.say(f"actor {name} incarnation {self.incarnation} made in worker {worker.number}")
