"""Drivers, workers and actors on simulated nodes of a cluster.

Covers what these processes do as far as brokers and stores see it: holding references, submitting, calling actors, claiming, running, sealing,
reporting, waiting, dying. Does not cover real code. Each follows the rules of its original (`zray.submission`, `zray.worker`,
`zray.execution`, `zray.actor_runtime`). What a task does is its *plan*, which travels as its arguments; what its value must be follows from the
plan and the values it uses, so it can be computed again by whoever checks.
"""

from __future__ import annotations

import hashlib
import signal
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from tests.simulation.cluster_store import Entry, Ref
from tests.simulation.world import Get, Link, Message, Program, Runner
from zray import _store, errors, failures, ids, wire
from zray._store import STATE_SEALED, TargetGone, with_index
from zray.broker.fork_parent import Fork
from zray.call_order import CallOrder
from zray.ids import put_id, task_id
from zray.task import ActorSpec, CallShape, TaskSpec

if TYPE_CHECKING:
    from tests.simulation.cluster_machine import Machine

ERROR = _store.KIND_ERROR_FLAG


class Plan(msgspec.Struct, array_like=True):
    """What a simulated call does."""

    kind: str = "ok"
    """ok, error, crash (its process dies), nested (submits tasks and waits), box (submits one and returns the reference), call (calls an
    actor and waits), own (makes an actor, calls it, waits and lets go of it)."""
    salt: int = 0
    seconds: float = 0.0
    size: int = 0
    """Bytes of padding of the value."""
    crashes: int = 0
    """crash: attempts that crash; later ones succeed."""
    children: tuple[Plan, ...] = ()
    shape: bytes = b""
    actor: bytes = b""
    made: bytes = b""
    """own: the shape of its actor."""


_encode = msgspec.msgpack.Encoder().encode
_decode_plan = msgspec.msgpack.Decoder(Plan).decode


def value_of(plan: Plan, inputs: list[bytes]) -> bytes:
    """The value of a call that succeeds."""
    digest = hashlib.sha256(plan.salt.to_bytes(8, "little"))
    for value in inputs:
        digest.update(hashlib.sha256(value).digest())
    return b"v" + digest.digest() + bytes(plan.size)


class Failed(Exception):
    """An object that a program looked at is an error."""


class Cancelled(Exception):
    """The task was interrupted."""


def failure_of(entry: Entry) -> str:
    """Name of the error that an object is, "" when it is none."""
    if not entry.kind & ERROR:
        return ""
    if entry.data.startswith(b"user"):
        return "user"
    return type(failures.rebuild(failures.load(entry.data))).__name__


class Process:
    """Anything that lives on a machine, holds references, waits, and sends to the broker."""

    is_worker = False

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.world = machine.site.world
        self.store = machine.store
        self.alive = True
        self.job = 0
        self.handle = machine.enter(self)
        self.pid = machine.site.enter(self)
        self.held: dict[bytes, Ref] = {}
        """References in its memory."""
        self.to_broker = Link(self.world, machine.deliver)
        self.links: list[Link] = [self.to_broker]
        self.peers: dict[int, Link] = {}
        self.actor_links: dict[bytes, ActorLink] = {}
        self.defined: set[bytes] = set()
        self.runner: Runner | None = None
        self.puts = 0

    # -- sending and waiting -------------------------------------------------------------------------------------------

    def tell(self, message: wire.Message) -> None:
        """Send to the broker."""
        self.to_broker.send(wire.encode(message))

    def peer(self, worker: int) -> Link:
        """The way to a worker of this machine."""
        link = self.peers.get(worker)
        if link is None:
            machine = self.machine

            def deliver(frame: bytes) -> None:
                target = machine.workers.get(worker)
                if target is not None:
                    target.receive(frame)

            link = self.peers[worker] = Link(self.world, deliver)
            self.links.append(link)
        return link

    def wait_for(self, ids: list[bytes], then: Callable[[], None]) -> None:
        """Call `then` once all these are sealed, here."""
        entries = [self.store.entries[i] for i in ids]
        elsewhere = self.store.want([Ref(self.store, entry) for entry in entries])
        if elsewhere:
            self.tell(wire.Wanted(b"".join(elsewhere)))
        missing = [entry for entry in entries if entry.state != STATE_SEALED]
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

    def drop(self, ids: list[bytes]) -> None:
        """Forget references."""
        for name in ids:
            self.held.pop(name, None)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def define(self, shapes: list[CallShape]) -> None:
        """Shapes travel ahead of what names them."""
        new = [shape for shape in shapes if shape.key not in self.defined]
        if new:
            self.defined.update(shape.key for shape in new)
            self.tell(wire.DefineShapes(new))

    def shape(self, key: bytes) -> CallShape:
        """A shape by its key."""
        return self.machine.site.shapes[key]

    def submit(self, parent: bytes, first: int, plans: list[Plan], deps: tuple[bytes, ...], base: bytes) -> list[bytes]:
        """Submit tasks through the broker; hold and return their results. `base`: what their ids derive from."""
        specs, results = [], []
        for index, plan in enumerate(plans):
            task = task_id(base, first + index)
            result = with_index(task, 1)
            shape = self.shape(plan.shape)
            borrowed = tuple(name for name in (plan.actor, shape.function) if name)
            kept = [self.reference(name) for name in (*deps, *borrowed)]
            self.define([shape, *(self.shape(child.shape) for child in plan.children)])
            self.held[result] = self.store.expect(result, 0, kept, None, "", 0, self.handle)
            specs.append(TaskSpec(task, plan.shape, _encode(plan), 0, deps, borrowed))
            results.append(result)
        self.tell(wire.SubmitTasks(self.handle, self.job, parent, specs))
        return results

    def reference(self, name: bytes) -> Ref:
        """One more reference to something that this process may refer to."""
        ref = self.store.reference(name)
        assert ref is not None, f"{name.hex()} is gone though a process of {self.machine} refers to it"
        return ref

    def create_actor(self, spec: ActorSpec) -> None:
        """Ask for an actor; hold it."""
        creation = spec.creation
        self.held[creation.id] = self.store.put_life(creation.id, b"")
        kept = [self.reference(name) for name in creation.deps]
        self.store.expect(with_index(creation.id, 1), 0, kept, None, "", 0, self.handle)
        self.define([self.shape(creation.shape)])
        self.tell(wire.CreateActor(self.handle, spec, b""))

    def let_go(self, actor: bytes) -> None:
        """Forget an actor."""
        self.held.pop(actor, None)
        self.actor_links.pop(actor, None)

    def call_actor(self, actor: bytes, base: bytes, number: int, plan: Plan, deps: tuple[bytes, ...]) -> bytes:
        """Call a method; hold and return the result."""
        link = self.actor_links.get(actor)
        if link is None:
            link = self.actor_links[actor] = ActorLink(self, actor)
        return link.call(base, number, plan, deps)

    def sweep_links(self) -> None:
        """Let go of connections to actors that nobody refers to any more."""
        self.actor_links = {actor: link for actor, link in self.actor_links.items() if actor in self.store.entries}

    # -- death ---------------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL."""
        if self.alive:
            self.world.say(f"{self.machine} process {self.handle} is killed")
            self._die()
            for link in self.links:
                link.cut()
            self.machine.process_ended(self, -9)

    def exit(self, status: int) -> None:
        """End by its own will: what was sent leaves first."""
        if self.alive:
            self._die()
            self.machine.process_ended(self, status)

    def _die(self) -> None:
        self.alive = False

    def vanish(self) -> None:
        """The whole machine is gone."""
        self._die()
        for link in self.links:
            link.in_flight.clear()
        self.release()

    def release(self) -> None:
        """What it referred to is given back."""
        self.held.clear()
        self.actor_links.clear()
        if self.runner is not None:
            self.runner.token += 1
            self.runner.program.close()

    def signalled(self, number: int) -> None:
        """A signal has come."""


class ActorLink:
    """A caller's connection to an actor through all its incarnations: the rules of `zray.submission.ActorLink`."""

    def __init__(self, process: Process, actor: bytes) -> None:
        self.process = process
        self.actor = actor
        self.incarnation = 0
        self.killed = -1
        self.address: Ref | None = None
        self.worker = 0
        self.target = 0
        self.sequence = 0
        self.known_dead: bytes | None = None

    def call(self, base: bytes, number: int, plan: Plan, deps: tuple[bytes, ...]) -> bytes:
        """Number a call, make its result pending and send it the way that is open."""
        process, store = self.process, self.process.store
        if not self.target and self.known_dead is None:
            self._look_up()
        task = task_id(base, number)
        result = with_index(task, 1)
        held = [process.reference(name) for name in (*deps, self.actor)]
        while True:
            spec = TaskSpec(task, plan.shape, _encode(plan), 0, deps, (), 0, self.sequence + 1)
            try:
                ref = store.expect(result, self.target, held, _encode(spec), "", 0, process.handle)
                break
            except TargetGone:
                self._died()
        process.held[result] = ref
        self.sequence = spec.sequence
        if self.known_dead is not None:
            store.seal_forced(ref, self.known_dead, ERROR, 0)
        elif self.target and not (self.incarnation and spec.sequence == 1):
            link = process.peer(self.worker)
            process.define([process.shape(plan.shape)])
            link.send(wire.encode(wire.CallActor(process.handle, self.incarnation, [spec])))
        else:
            process.define([process.shape(plan.shape)])
            process.tell(wire.SubmitActorCalls(process.handle, process.job, self.actor, self.incarnation, [spec]))
        return result

    def _look_up(self) -> None:
        store = self.process.store
        if self.killed == self.incarnation:
            if store.reference(with_index(self.actor, self.incarnation + 2)) is not None:
                self._died()
            return
        if self.address is None:
            self.address = store.reference(with_index(self.actor, self.incarnation + 1))
        if self.address is None or not store.done(self.address):
            return
        entry = self.address.entry
        if entry.kind & ERROR:
            if store.reference(with_index(self.actor, self.incarnation + 2)) is None:
                self.known_dead = entry.data
            else:
                self._died()
            return
        address = msgspec.msgpack.decode(entry.data, type=wire.ActorAddress)
        if store.alive(address.process):
            self.worker, self.target = address.worker, address.process
        else:
            self._died()

    def _died(self) -> None:
        self.worker = self.target = 0
        self.incarnation += 1
        self.sequence = 0
        self.address = None
        self._look_up()

    def kill(self, no_restart: bool) -> None:
        """Have the actor killed."""
        self.process.tell(wire.KillActor(self.actor, no_restart))
        self.killed = self.incarnation
        self.target = 0


class Driver(Process):
    """A user's program."""

    def __init__(self, machine: Machine, root: bytes) -> None:
        super().__init__(machine)
        self.root = root
        self.children = 0
        self.replies = 0
        self.over = False
        """The program is."""

    def next_child(self, count: int = 1) -> int:
        """Number of the next call this program makes."""
        first = self.children + 1
        self.children += count
        return first

    def new_reply(self) -> bytes:
        """A pending object for an answer."""
        self.replies += 1
        name = put_id(task_id(self.root, 1 << 40), self.replies)
        self.held[name] = self.store.expect(name, 0, None, None, "", 0, self.handle)
        return name

    def put(self, data: bytes, contained: tuple[bytes, ...] = ()) -> bytes:
        """Store a value."""
        self.puts += 1
        name = put_id(self.root, self.puts)
        self.held[name] = self.store.put(name, data, [self.reference(one) for one in contained])
        return name

    def run(self, program: Program) -> None:
        """Begin."""
        self.runner = Runner(self.world, self, program)
        self.runner.start()


class Worker(Process):
    """A process that runs tasks one at a time, or becomes an actor."""

    is_worker = True

    def __init__(self, machine: Machine, number: int, fork: Fork) -> None:
        super().__init__(machine)
        self.number = number
        self.job = fork.config.job.number
        self.inbox: deque[tuple[str, TaskSpec]] = deque()
        self.reports: list[tuple[bytes, int, int]] = []
        self.current = b""
        self.interruptible = False
        self.blocked = False
        self.stopping = False
        self.actor: wire.StartActor | None = None
        self.made = False
        self.exiting = False
        self.order = CallOrder()
        self.last_flush = 0.0
        self.from_broker = Link(self.world, self.receive)
        self.runner = Runner(self.world, self, self.main())

    def begin(self) -> None:
        """The process comes up."""
        if self.alive and self.runner is not None:
            self.runner.start()

    # -- messages ------------------------------------------------------------------------------------------------------

    def receive(self, frame: bytes) -> None:
        """A frame came."""
        if not self.alive:
            return
        message = wire.decode(frame)
        if isinstance(message, wire.RunTasks):
            self.inbox.extend(("task", spec) for spec in message.tasks)
        elif isinstance(message, wire.StartActor):
            assert self.actor is None, f"worker {self.number} is told to become a second actor"
            self.actor = message
        elif isinstance(message, wire.CallActor):
            if self.actor is not None and message.incarnation == self.actor.incarnation:
                for spec in message.calls:
                    self.inbox.extend(("call", ready) for ready in self.order.arrive(message.process, spec))
        elif isinstance(message, wire.CallerGone):
            self.inbox.extend(("call", ready) for ready in self.order.gone(message.process))
        elif isinstance(message, wire.ExitWhenIdle):
            self.exiting = True
        elif isinstance(message, wire.Shutdown):
            self.stopping = True
        assert self.runner is not None
        self.runner.wake()

    def signalled(self, number: int) -> None:
        """SIGUSR2: the cancel word names a task."""
        if not self.alive or number != signal.SIGUSR2:
            return
        word = self.store.word(self.handle, wire.WORD_CANCEL)
        self.store.set_word(self.handle, wire.WORD_CANCEL, 0)
        if self.interruptible and int.from_bytes(self.current[:8], "little") == word:
            self.interruptible = False
            assert self.runner is not None
            self.runner.throw(Cancelled())

    # -- the program ---------------------------------------------------------------------------------------------------

    def main(self) -> Program:
        """Serve until told to stop."""
        self.tell(wire.WorkerReady(self.number, self.handle))
        while True:
            if self.actor is not None and not self.made:
                yield from self.construct(self.actor)
                if not self.made:
                    return
            if not self.inbox:
                self.flush(True)
                if self.actor is not None and self.exiting:
                    self.leave()
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

    def leave(self) -> None:
        """End as an actor, announced."""
        assert self.actor is not None
        self.store.set_word(self.handle, wire.WORD_LAST_WORDS, 1)
        self.tell(wire.ActorExit(self.number, self.actor.spec.creation.id))
        self.exit(0)

    def construct(self, start: wire.StartActor) -> Program:
        """Become an actor, or fail to."""
        creation = start.spec.creation
        plan = _decode_plan(creation.args)
        for dep in creation.deps:
            assert self.store.done(self.reference(dep)), f"an actor is made before its argument {dep.hex()} exists"
        yield max(1e-6, plan.seconds)
        if plan.kind == "crash" and start.incarnation < plan.crashes:
            self.kill()
            yield Message()
        elif plan.kind == "error":
            error = errors.ActorDiedError(actor_id=creation.id.hex(), class_name="A")
            self.store.set_word(self.handle, wire.WORD_LAST_WORDS, 1)
            self.tell(wire.ActorFailed(self.number, creation.id, failures.dump(failures.from_error(error))))
            self.exit(0)
        else:
            self.made = True
            self.machine.site.began(self, creation.id, start.incarnation)
            self.tell(wire.ActorReady(self.number, self.handle, creation.id))
            self.inbox.extendleft(("call", spec) for spec in reversed(start.replay))

    def flush(self, idle: bool) -> None:
        """Report ends."""
        self.last_flush = self.world.now
        if self.reports:
            ids = b"".join(report[0] for report in self.reports)
            statuses = bytes(report[1] for report in self.reports)
            micros = [report[2] for report in self.reports]
            self.reports.clear()
            self.tell(wire.TasksDone(self.number, ids, statuses, micros, idle))

    def execute(self, kind: str, spec: TaskSpec) -> Program:
        """Claim, run, seal, report."""
        store = self.store
        yield self.world.rng.uniform(1e-6, 4e-6)
        entry = store.claim(spec.id, 1, spec.attempt, self.handle)
        if entry is None:
            self.machine.site.refused(self.machine, spec)
            self.reports.append((spec.id, wire.DONE_SKIPPED, 0))
            return
        begun = self.world.now
        self.current = spec.id
        self.interruptible = False
        kept: list[Ref] = []
        inputs = [self.reference(dep) for dep in spec.deps]
        others = [self.reference(name) for name in spec.borrowed]
        try:
            self.interruptible = kind == "task"
            if kind == "call" and inputs:
                yield from self.get(list(spec.deps))  # an actor waits for arguments itself
            for ref in inputs:
                assert store.done(ref), f"{spec.id.hex()} runs before its argument {ref.binary().hex()} exists"
            bad = [ref for ref in inputs if ref.entry.kind & ERROR]
            if bad:
                status, data, flag = wire.DONE_ERROR, bad[0].entry.data, ERROR
            else:
                plan = _decode_plan(spec.args)
                data = yield from self.body(plan, spec, [ref.entry.data for ref in inputs], kept)
                status, flag = wire.DONE_OK, 0
        except Failed as error:
            status, data, flag = wire.DONE_ERROR, b"user " + str(error).encode(), ERROR
            kept = []
        except Cancelled:
            problem = errors.TaskCancelledError(task_id=spec.id.hex())
            status, data, flag = wire.DONE_CANCELLED, failures.dump(failures.from_error(problem)), ERROR
            kept = []
        self.interruptible = False
        self.current = b""
        self.unblock()
        answer = store.seal(entry, spec.attempt, self.handle, data, flag, kept)
        if answer == _store.STALE:
            status = wire.DONE_SKIPPED
        elif answer == _store.TELL_BROKER:
            self.tell(wire.Sealed(with_index(spec.id, 1)))
        self.reports.append((spec.id, status, int((self.world.now - begun) * 1e6)))
        del inputs, others

    def body(self, plan: Plan, spec: TaskSpec, inputs: list[bytes], kept: list[Ref]) -> Program:
        """What the call does; returns its value."""
        if plan.seconds:
            yield from self.idle(plan.seconds)
        if plan.kind == "crash" and spec.attempt < plan.crashes:
            self.kill()
            yield Message()
        if plan.kind == "error":
            raise Failed("as planned")
        if plan.kind in ("nested", "box", "call", "own"):
            base = ids.origin_of(spec.id, spec.attempt, self.fresh_id)
            inputs = [*inputs, *(yield from self.with_children(plan, spec, base, kept))]
        return value_of(plan, inputs)

    def fresh_id(self) -> bytes:
        """An id that nobody else has."""
        return self.world.rng.randbytes(12) + bytes(4)

    def with_children(self, plan: Plan, spec: TaskSpec, base: bytes, kept: list[Ref]) -> Program:
        """Make calls; return their values, unless they are only put into a box. A repeat makes another one before them, as no other run does."""
        if plan.kind == "own":
            return (yield from self.with_actor(plan, base))
        wild: list[Plan] = []
        if spec.attempt and plan.kind == "nested":
            wild = [Plan(salt=self.world.rng.getrandbits(40), shape=plan.children[0].shape)]
        if plan.kind == "call":
            results = [
                self.call_actor(plan.actor, base, number, child, ()) for number, child in enumerate(plan.children, 1)
            ]
        else:
            results = self.submit(spec.id, 1, [*wild, *plan.children], (), base)
        refs = [self.held.pop(result) for result in results]
        if plan.kind == "box":
            kept += refs
            return []
        yield from self.get(results)
        for child in wild:
            ref = refs.pop(0)
            assert failure_of(ref.entry) or ref.entry.data == value_of(child, []), "what another run made has its id"
        return self.values(refs)

    def with_actor(self, plan: Plan, base: bytes) -> Program:
        """Make an actor, which is gone when all is over; return the values of its calls."""
        actor = task_id(base, 1)
        creation = TaskSpec(actor, plan.made, _encode(Plan(shape=plan.made, seconds=plan.seconds / 4)))
        try:
            self.create_actor(ActorSpec(creation, self.job, max_restarts=1, max_task_retries=1))
            results = [self.call_actor(actor, base, number, child, ()) for number, child in enumerate(plan.children, 2)]
            refs = [self.held.pop(result) for result in results]
            yield from self.get(results)
        finally:
            self.let_go(actor)
        return self.values(refs)

    def values(self, refs: list[Ref]) -> list[bytes]:
        """What calls have returned."""
        failed = [name for ref in refs if (name := failure_of(ref.entry))]
        if failed:
            raise Failed(",".join(failed))
        return [ref.entry.data for ref in refs]

    def idle(self, seconds: float) -> Program:
        """Let time pass."""
        yield seconds

    def get(self, ids: list[bytes]) -> Program:
        """Wait for objects, and let the broker know that this process does."""
        self.flush(False)
        if any(self.store.entries[name].state != STATE_SEALED for name in ids):
            self.blocked = True
            self.tell(wire.Blocked(self.number))
        yield Get(ids)
        self.unblock()

    def unblock(self) -> None:
        """It goes on."""
        if self.blocked:
            self.blocked = False
            self.tell(wire.Unblocked(self.number))
