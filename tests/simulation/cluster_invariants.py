"""What must hold in every simulation of a cluster.

During a run: the machines' own `validate()`, nothing is owed to the dead, no attempt is executed twice. For each result that a program looks
at: the value that its plan says, or an error for which there is a reason. At the end: no reference, loan, guest or slot is left anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tests.simulation.cluster_processes import ERROR, Plan, failure_of, value_of
from zray import failures
from zray._store import STATE_SEALED, with_index

if TYPE_CHECKING:
    from tests.simulation.cluster_machine import Machine
    from tests.simulation.cluster_processes import Driver, Worker
    from tests.simulation.cluster_scenario import Scenario
    from zray.task import ActorSpec, TaskSpec


LOST = frozenset(
    {
        "ObjectLostError",
        "OwnerDiedError",
        "ObjectReconstructionFailedError",
        "ObjectReconstructionFailedMaxAttemptsExceededError",
        "ObjectReconstructionFailedLineageEvictedError",
    }
)
"""Errors that say that a value is nowhere, and cannot be made again."""


COPIES: Final = 10
"""Copies of a task that workers of one node are offered in vain, at most: some, because who runs it says so later. (Of 250 seeds none needed more than 2.)"""
SOON: Final = 0.2
"""Seconds after which a broker has heard that a value exists which it has lost."""


class Known(NamedTuple):
    """What is known of an object from outside."""

    plan: Plan | None
    """None: it was put."""
    deps: tuple[bytes, ...]
    data: bytes = b""
    actor: bytes = b""


class Invariants:
    """Checks one scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.site = scenario.site
        self.known: dict[bytes, Known] = {}
        self.cancelled: set[bytes] = set()
        self.killed: set[bytes] = set()
        """Actors."""
        self.crashing: set[bytes] = set()
        """Actors that calls make crash."""
        self.let_go: set[bytes] = set()
        self.inner: set[bytes] = set()
        """Results of calls that tasks made, and drivers found in boxes."""
        self.actors: dict[bytes, tuple[ActorSpec, Plan, tuple[bytes, ...]]] = {}
        self.callers: dict[bytes, tuple[bytes, int, int]] = {}
        """Of each call: actor, caller, number."""
        self.order: dict[tuple[bytes, int], int] = {}
        self.calls = 0
        self.executions: dict[bytes, list[int]] = {}
        self.refusals: dict[tuple[int, bytes, int], int] = {}
        """By machine, task and attempt."""
        self.found_since: dict[tuple[int, bytes], float] = {}
        """Values that a machine has, though it takes them for lost."""
        self.living: dict[bytes, Worker] = {}
        self.results = 0
        self.failures: dict[str, int] = {}

    # -- during the run ------------------------------------------------------------------------------------------------

    def called(
        self, result: bytes, plan: Plan, deps: tuple[bytes, ...], actor: bytes, caller: int, machine: Machine
    ) -> None:
        """A driver called an actor."""
        self.known[result] = Known(plan, deps, b"", actor)
        self.calls += 1
        self.callers[with_index(result, 0)] = (actor, caller | machine.index << 20, self.calls)
        if plan.kind == "crash":
            self.crashing.add(actor)

    def executed(self, machine: Machine, task: bytes, attempt: int) -> None:
        """A worker begins to execute a call."""
        if machine.verdict or not self.scenario.gentle:
            return
        attempts = self.executions.setdefault(task, [])
        assert attempt not in attempts, f"{task.hex()}: attempt {attempt} is executed a second time"
        attempts.append(attempt)
        known = self.known.get(with_index(task, 1))
        if known is None or known.plan is None:
            return
        if known.actor:
            limit = self.actors[known.actor][0].max_task_retries
        else:
            limit = self.site.shapes[known.plan.shape].max_retries
        assert limit < 0 or len(attempts) <= limit + 1, f"{task.hex()}: executed {len(attempts)} times, {limit} retries"
        self._in_order(task, attempts)

    def refused(self, machine: Machine, spec: TaskSpec) -> None:
        """A worker was given a copy of what somebody runs, or has run."""
        key = machine.index, spec.id, spec.attempt
        self.refusals[key] = self.refusals.get(key, 0) + 1
        assert self.refusals[key] <= COPIES, f"{machine}: {spec.id.hex()} is offered again and again"

    def _in_order(self, task: bytes, attempts: list[int]) -> None:
        call = self.callers.get(task)
        if call is None or len(attempts) > 1 or call[0] in self.crashing | self.killed:
            return
        actor, caller, number = call
        last = self.order.get((actor, caller), 0)
        assert number > last, (
            f"call {number} of {task.hex()} to {actor.hex()} begins after call {last} of the same caller"
        )
        self.order[actor, caller] = number

    def began(self, worker: Worker, actor: bytes, incarnation: int) -> None:
        """A process has become an actor."""
        other = self.living.get(actor)
        if self.scenario.gentle and other is not None:
            assert not (other.alive and other.machine.alive), f"actor {actor.hex()} lives twice"
        self.living[actor] = worker

    def died(self, machine: Machine) -> None:
        """A machine was ended: nobody waits for the programs on it."""
        for driver in self.scenario.drivers:
            if driver.machine is machine:
                self.scenario.lost(driver)

    def look(self) -> None:
        """What must hold at every moment."""
        for machine in self.site.machines:
            if machine.alive:
                self._look_at(machine)
            else:
                assert not (self.scenario.gentle and machine.serving), f"{machine} could have borne what was done to it"
                self.died(machine)

    def _look_at(self, machine: Machine) -> None:
        broker = machine.broker
        cluster, sharing, remote = broker.cluster, broker.sharing, broker.remote
        assert cluster is not None
        assert sharing is not None
        assert remote is not None
        for link in cluster.links._links.values():
            link.validate()
        self._look_for_found(machine, sharing.locations._lost)
        dead = cluster.neighbours.dead
        if not dead:
            return
        lending = sharing.lending
        owed = {
            "lent to": [name for name, nodes in lending.lent.items() if not dead.keys().isdisjoint(nodes)],
            "borrowed from": [name for name, lender in lending.borrowed.items() if lender in dead],
            "running for": [task for task, guest in remote._guests.items() if guest.node in dead],
            "under way to": [task for node, calls in remote._away.items() if node in dead for task in calls],
            "placed on": [peer for peer in broker.scheduler.node.nodes[1:] if peer.id in dead],  # type: ignore[attr-defined]
        }
        for what, found in owed.items():
            assert not found, f"{machine}: {len(found)} things are {what} the dead: {found[:2]}"

    def _look_for_found(self, machine: Machine, lost: dict[bytes, None]) -> None:
        """What a broker takes for lost is not there, or it will be told so soon."""
        now, entries = self.scenario.world.now, machine.store.entries
        found = {name for name in lost if name in entries and entries[name].state == STATE_SEALED}
        for key in [key for key in self.found_since if key[0] == machine.index and key[1] not in found]:
            del self.found_since[key]
        for name in sorted(found):
            since = self.found_since.setdefault((machine.index, name), now)
            if machine.paused:
                self.found_since[machine.index, name] = now
            assert now - since <= SOON or machine.paused, f"{machine} takes {name.hex()} for lost, which is there"

    # -- results -------------------------------------------------------------------------------------------------------

    def result(self, driver: Driver, name: bytes) -> bytes:
        """A program looks at a finished result; returns the object in a box, which it holds from now on."""
        entry = driver.store.entries[name]
        assert entry.state == STATE_SEALED
        known = self.known[name]
        self.results += 1
        kind = failure_of(entry)
        if kind:
            self.failures[kind] = self.failures.get(kind, 0) + 1
            excuses = self.excuses(name)
            text = entry.data if kind == "user" else failure_text(entry)
            assert kind in excuses, (
                f"{name.hex()} ({known.plan and known.plan.kind}) failed: {text!r}; excuses: {excuses}"
            )
            return b""
        assert not entry.kind & ERROR
        expected = self.value(known)
        assert expected is not None, f"{name.hex()} has a value though its plan is to fail"
        assert entry.data == expected, f"{name.hex()}: {entry.data[:20].hex()} is not the value of its plan"
        if known.plan is not None and known.plan.kind == "box":
            assert len(entry.list) == 1, f"{name.hex()}: a box with {len(entry.list)} references"
            inner = entry.list[0].binary()
            driver.held[inner] = driver.reference(inner)
            self.known[inner] = Known(known.plan.children[0], ())
            self.inner.add(inner)
            return inner
        return b""

    def value(self, known: Known) -> bytes | None:
        """What a call returns; None when it cannot succeed."""
        if known.plan is None:
            return known.data
        inputs: list[bytes] = []
        for dep in known.deps:
            found = self.value(self.known[dep])
            if found is None:
                return None
            inputs.append(found)
        return self._planned(known.plan, inputs)

    def _planned(self, plan: Plan, inputs: list[bytes]) -> bytes | None:
        if plan.kind == "error":
            return None
        if plan.kind in ("nested", "call", "own"):
            for child in plan.children:
                found = self._planned(child, [])
                if found is None:
                    return None
                inputs = [*inputs, found]
        return value_of(plan, inputs)

    def excuses(self, name: bytes) -> set[str]:
        """Errors for which there is a reason."""
        known = self.known[name]
        if known.plan is None:
            return set() if self.scenario.gentle else set(LOST)
        found = self._reasons(known.plan, known.actor)
        task = with_index(name, 0)
        if task in self.cancelled or known.plan.kind == "ok":
            found |= {"TaskCancelledError"} if self._is_cancelled(name) else set()
        for dep in known.deps:
            found |= self.excuses(dep)
        if self._is_cancelled(name):
            found |= {"TaskCancelledError", "user"}
        return found

    def _is_cancelled(self, name: bytes) -> bool:
        """Whether somebody cancelled it, or (recursively) what made it."""
        return with_index(name, 0) in self.cancelled or (bool(self.cancelled) and name in self.inner)

    def _reasons(self, plan: Plan, actor: bytes) -> set[str]:
        found: set[str] = set()
        violent = not self.scenario.gentle
        if actor:
            found |= self._reasons_of_actor(actor)
        elif violent:
            found |= {"WorkerCrashedError", "NodeDiedError", *LOST}
        if plan.kind == "error":
            found.add("user")
        if plan.kind == "crash" and not actor:
            limit = self.site.shapes[plan.shape].max_retries
            if 0 <= limit < plan.crashes:
                found.add("WorkerCrashedError")
        if plan.kind == "own" and (violent or self.cancelled):
            found.add("user")
        if plan.kind in ("nested", "call", "box"):
            below: set[str] = set()
            for child in plan.children:
                below |= self._reasons(child, plan.actor)
            if below and plan.kind != "box":
                found.add("user")
            if self.cancelled and plan.kind != "box":
                found.add("user")
        return found

    def _reasons_of_actor(self, actor: bytes) -> set[str]:
        _, plan, deps = self.actors[actor]
        found: set[str] = set()
        if (
            actor in self.killed
            or actor in self.crashing
            or plan.kind in ("crash", "error")
            or not self.scenario.gentle
        ):
            found |= {"ActorDiedError", "ActorUnavailableError"}
        if not self.scenario.gentle:
            found |= LOST
        for dep in deps:
            if self.excuses(dep):
                found |= {"ActorDiedError", *self.excuses(dep)}
        return found

    # -- when all programs have ended ----------------------------------------------------------------------------------

    def all_acknowledged(self) -> bool:
        """No frame is under way just now. (Some are sent now and then, whatever happens.)"""
        clusters = [machine.broker.cluster for machine in self.site.machines if machine.alive]
        return not any(link.unacked for cluster in clusters if cluster for link in cluster.links._links.values())

    def programs_ended(self) -> None:
        """All handles are gone: so is everything they stood for, on every node."""
        self.look()
        head = self.site.machines[0]
        assert head.alive, f"the head has ended: {head.verdict}"
        alive = {machine.id for machine in self.site.machines if machine.alive}
        for machine in self.site.machines:
            if not machine.alive:
                continue
            cluster = machine.broker.cluster
            assert cluster is not None
            known = {machine.id, *cluster.neighbours.members}
            assert known == alive, f"{machine} knows {len(known)} living nodes of {len(alive)}"
            for member in cluster.neighbours.members.values():
                assert member.state.name == "ALIVE", f"{machine} takes {member} for {member.state.name}"
            for node, link in cluster.links._links.items():
                assert node in alive, f"{machine} keeps a link to the dead {node.hex()[:8]}"
                assert not link.unacked, f"{machine} has {link.unacked} frames that {node.hex()[:8]} never acknowledged"
            self._nothing_is_owed(machine)

    def _nothing_is_owed(self, machine: Machine) -> None:
        for process in machine.by_handle.values():
            process.sweep_links()
        broker = machine.broker
        sharing, remote, actors = broker.sharing, broker.remote, broker.remote_actors
        assert sharing is not None
        assert remote is not None
        assert actors is not None
        node = broker.scheduler.node
        left: dict[str, Any] = {
            "lent": sharing.lending.lent,
            "borrowed": sharing.lending.borrowed,
            "kept": sharing._kept,
            "asked for": [name for name, nodes in sharing._asked.items() if nodes],
            "debts": sharing._debts,
            "held for making again": sharing._held,
            "second copies": sharing._spares,
            "rebuild costs": sharing.copies._tasks,
            "being made again": sharing._inputs,
            "lost": sharing.locations._lost,
            "on their way": sharing.exchange._pulling,
            "incoming": sharing.exchange._incoming,
            "guests": remote._guests,
            "calls under way": [task for calls in remote._away.values() for task in calls],
            "hosted actors": actors._hosted,
            "questions": actors._asked,
            "tasks": node.tasks.home,
            "objects awaited": node.dependencies.waiters,
            "interrupted": node.interrupted,
            "actors": node.actors.actors,
            "addresses": broker.performer.addresses,
            "arguments": broker.performer.arguments,
            "early": broker._early,
            "entries of the store": machine.store.entries,
            "zombies": machine.store.zombies,
        }
        for what, found in left.items():
            assert not found, f"{machine}: {len(found)} {what} are left: {list(found)[:2]}"
        for peer in node.nodes[1:]:
            assert peer.available == peer.total, f"{machine} still has something on {peer}: {peer.available}"
        for worker in node.pool.workers.values():
            assert worker.held is None, f"{machine}: {worker} holds {worker.held} though nothing runs"
        assert node.ledger.available == node.ledger.total, f"{machine}: resources are not back"

    def all_over(self) -> None:
        """The jobs are over: nothing is left of them."""
        for machine in self.site.machines:
            if not machine.alive:
                continue
            self._nothing_is_owed(machine)
            broker = machine.broker
            node = broker.scheduler.node
            for what, found in {
                "jobs": node.jobs.jobs,
                "workers": node.pool.workers,
                "processes": node.by_process,
            }.items():
                assert not found, f"{machine}: {what} are left when all jobs are over: {list(found)[:3]}"
            running = [worker for worker in machine.workers.values() if worker.alive]
            assert not running, f"{machine}: {len(running)} processes live though all jobs are over"

    # -- explaining ----------------------------------------------------------------------------------------------------

    def waiting(self) -> str:
        """What is not sealed."""
        found = []
        for machine in self.site.machines:
            if machine.alive:
                pending = [e.id.hex() for e in machine.store.entries.values() if e.state != STATE_SEALED and e.count]
                found.append(f"{machine}: {len(pending)} pending {pending[:4]} {machine.broker.scheduler.statistics()}")
        return "\n".join(found)


def failure_text(entry: Any) -> str:
    """The text of a system error."""
    return str(failures.rebuild(failures.load(entry.data)))
