"""From lost objects back to tasks: `zray.broker.recovery`, alone and in a small world of nodes that die."""

from __future__ import annotations

import random

import pytest

from zray import ids
from zray.broker.recovery import Recovery, Rerun, Unrecoverable
from zray.task import TaskSpec

SHAPE = b"s" * 16
JOB = 1


def _task(number: int) -> bytes:
    return ids.task_id(b"root" * 4, number)


def _result(number: int, index: int = 0) -> bytes:
    return ids.return_id(_task(number), index)


class Owner:
    """What holds the machine in a test: tasks by number, their results, and which of these are somewhere."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.machine = Recovery(limit)
        self.here: set[bytes] = set()
        """Results that are somewhere, or being made."""
        self.held: dict[bytes, list[bytes]] = {}

    def send(
        self, number: int, *inputs: bytes, retries: int = 3, nested: tuple[bytes, ...] = (), size: int = 0
    ) -> None:
        spec = TaskSpec(_task(number), SHAPE, b"", 0, inputs, nested)
        held, forgotten = self.machine.sent(spec, JOB, 1, retries, f"task{number}", lambda name: size)
        self.held[spec.id] = held
        self.forget(forgotten)
        self.here.add(_result(number))
        self.machine.validate()

    def end(self, number: int, live: bool = True) -> None:
        self.forget(self.machine.ended(_task(number), [_result(number)] if live else []))

    def make(self, number: int, *inputs: bytes, retries: int = 3, nested: tuple[bytes, ...] = ()) -> bytes:
        self.send(number, *inputs, retries=retries, nested=nested)
        self.end(number)
        return _result(number)

    def unreference(self, *names: bytes) -> None:
        """Nothing refers to these: their values go."""
        for name in names:
            self.forget(self.machine.unreferenced(name))
            self.here.discard(name)

    def forget(self, tasks: list[bytes]) -> None:
        for task in tasks:
            self.held.pop(task, None)
        self.machine.validate()

    def lose(self, *names: bytes) -> list[Rerun | Unrecoverable]:
        self.here -= set(names)
        actions = self.machine.lost(names, self.here.__contains__)
        self.machine.validate()
        return actions

    def again(self, *names: bytes) -> list[bytes]:
        """The tasks that run again, in order."""
        actions = self.lose(*names)
        assert all(isinstance(action, Rerun) for action in actions), actions
        return [action.task.id for action in actions if isinstance(action, Rerun)]

    def settle(self) -> None:
        """Everything that is referenced goes: nothing is left."""
        for lineage in list(self.machine._tasks.values()):
            if lineage.running and lineage.spec.id in self.machine:
                self.forget(self.machine.ended(lineage.spec.id, []))
        for lineage in list(self.machine._tasks.values()):
            for name in list(lineage.live):
                self.unreference(name)
        assert len(self.machine) == 0
        assert self.machine.bytes == 0
        assert not any(self.held.values())


@pytest.fixture
def owner() -> Owner:
    return Owner()


def test_a_lost_result_is_made_again(owner: Owner) -> None:
    x = owner.make(1)
    assert owner.again(x) == [_task(1)]
    assert owner.again(x) == [], "it runs already"
    owner.send(1)
    owner.end(1)
    assert owner.again(x) == [_task(1)]
    owner.settle()


def test_small_results_leave_no_lineage(owner: Owner) -> None:
    owner.send(1)
    owner.end(1, live=False)
    assert len(owner.machine) == 0


def test_arguments_without_lineage_are_held(owner: Owner) -> None:
    put = ids.put_id(b"driver" + bytes(10), 3)
    local = _result(99)
    x = owner.make(1, put, local, put)
    assert owner.held[_task(1)] == [put, local]
    owner.make(2, x)
    assert owner.held[_task(2)] == []
    owner.unreference(x)
    assert owner.held[_task(1)] == [put, local], "as long as something could need it"
    owner.unreference(_result(2))
    assert owner.held == {}
    owner.settle()


def test_chains_are_made_again_from_the_last_link_that_exists(owner: Owner) -> None:
    links = [owner.make(0)]
    for number in range(1, 8):
        links.append(owner.make(number, links[-1]))
    owner.unreference(*links[4:7])  # values gone, lineage kept
    assert owner.again(links[7]) == [_task(number) for number in (4, 5, 6, 7)]
    owner.settle()


def test_long_chains_are_planned(owner: Owner) -> None:
    last = owner.make(0)
    for number in range(1, 20_000):
        before, last = last, None  # type: ignore[assignment]
        spec = TaskSpec(_task(number), SHAPE, b"", 0, (before,))
        owner.machine.sent(spec, JOB, 1, 3, "", lambda name: 0)
        last = _result(number)
        owner.machine.ended(_task(number), [last])
        owner.machine.unreferenced(before)
    actions = owner.machine.lost([last], lambda name: False)
    assert [action.task.id for action in actions if isinstance(action, Rerun)] == [_task(n) for n in range(20_000)]
    for number in range(20_000):
        owner.machine.ended(_task(number), [last] if number == 19_999 else [])
    assert len(owner.machine) == 20_000
    owner.machine.unreferenced(last)
    assert len(owner.machine) == 0
    owner.machine.validate()


def test_diamonds_are_made_once(owner: Owner) -> None:
    top = owner.make(0)
    left, right = owner.make(1, top), owner.make(2, top)
    bottom = owner.make(3, left, right)
    owner.unreference(top, left, right)
    assert owner.again(bottom) == [_task(0), _task(1), _task(2), _task(3)]
    owner.settle()


def test_wide_fan_ins_make_only_what_is_missing(owner: Owner) -> None:
    inputs = [owner.make(number) for number in range(100)]
    total = owner.make(100, *inputs)
    lost = inputs[10:20]
    owner.unreference(*lost)
    assert owner.again(total) == [*(_task(number) for number in range(10, 20)), _task(100)]
    owner.settle()


def test_objects_inside_objects_are_arguments_too(owner: Owner) -> None:
    inner = owner.make(0)
    outer = owner.make(1, nested=(inner,))
    owner.unreference(inner)
    assert owner.again(outer) == [_task(0), _task(1)]
    owner.settle()


def test_several_losses_at_once_come_in_order(owner: Owner) -> None:
    x = owner.make(0)
    y = owner.make(1, x)
    z = owner.make(2, y)
    assert owner.again(z, x, y) == [_task(0), _task(1), _task(2)]
    owner.settle()


def test_what_is_lost_again_on_its_way_is_waited_for(owner: Owner) -> None:
    x = owner.make(0)
    y = owner.make(1, x)
    assert owner.again(x) == [_task(0)]
    assert owner.again(y) == [_task(1)], "its argument is being made: the scheduler lets it wait"
    owner.send(0)
    owner.end(0)
    assert owner.again(x) == [_task(0)], "lost again before the other was made"
    owner.settle()


def test_without_retries_nothing_runs_again(owner: Owner) -> None:
    x = owner.make(0, retries=0)
    y = owner.make(1, x)
    [first, second] = owner.lose(x, y)
    assert isinstance(first, Unrecoverable)
    assert first.object == x
    assert "max_retries=0" in first.reason
    assert isinstance(second, Unrecoverable)
    assert second.object == y
    assert x.hex() in second.reason
    assert "max_retries=0" in second.reason
    owner.settle()


@pytest.mark.parametrize("retries", [1, 2, 5])
def test_retries_are_counted_whatever_they_are_for(owner: Owner, retries: int) -> None:
    x = owner.make(0, retries=retries)
    for round in range(retries):
        assert owner.again(x) == [_task(0)]
        owner.send(0)
        if round == 0 and retries > 1:
            owner.send(0)  # the node that ran it died: the scheduler sent it to another
            retries -= 1
        owner.end(0)
        if round + 1 >= retries:
            break
    [failure] = owner.lose(x)
    assert isinstance(failure, Unrecoverable)
    assert failure.kind == "ObjectReconstructionFailedMaxAttemptsExceededError"
    owner.settle()


def test_endless_retries_do_not_end(owner: Owner) -> None:
    x = owner.make(0, retries=-1)
    for _ in range(50):
        assert owner.again(x) == [_task(0)]
        owner.send(0)
        owner.end(0)
    owner.settle()


def test_put_values_and_unknown_results_say_why(owner: Owner) -> None:
    put = ids.put_id(b"driver" + bytes(10), 3)
    [of_put, of_call] = owner.lose(put, _result(7))
    assert isinstance(of_put, Unrecoverable)
    assert "put" in of_put.reason
    assert isinstance(of_call, Unrecoverable)
    assert "actor" in of_call.reason


def test_what_is_remembered_is_bounded() -> None:
    owner = Owner(limit=20_000)
    names = [owner.make(number) for number in range(100)]
    assert owner.machine.bytes <= 20_000
    assert owner.machine.forgotten == 100 - len(owner.machine)
    [failure] = owner.lose(names[0])
    assert isinstance(failure, Unrecoverable)
    assert "grew too large" in failure.reason
    assert owner.again(names[99]) == [_task(99)]
    owner.settle()


def test_held_values_count() -> None:
    owner = Owner(limit=20_000)
    owner.make(0)
    owner.send(1, ids.put_id(b"driver" + bytes(10), 3), size=30_000)
    assert _task(0) not in owner.machine
    assert _task(1) in owner.machine, "what runs is not forgotten"
    owner.end(1)
    owner.send(2)
    assert owner.held.get(_task(1)) is None
    owner.settle()


def test_a_job_takes_its_lineage_along(owner: Owner) -> None:
    x = owner.make(0)
    owner.make(1, x)
    owner.send(2, x)
    owner.forget(owner.machine.job_over(JOB))
    assert len(owner.machine) == 0
    assert owner.held == {}
    owner.end(2)


class World:
    """An owner whose tasks run on nodes that die, at random: oracle for what must be made again.

    Every task's value is a function of its inputs; a run whose inputs do not exist, a task that runs twice at a time, or a value that is
    referenced and neither exists nor is being made (nor was given up for a reason) is a fault.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.machine = Recovery(1 << 40)
        self.inputs: dict[bytes, tuple[bytes, ...]] = {}
        self.at: dict[bytes, set[int]] = {}
        """Copies of each result."""
        self.running: dict[bytes, int] = {}
        self.queued: list[bytes] = []
        self.specs: dict[bytes, TaskSpec] = {}
        self.referenced: dict[bytes, None] = {}
        self.count = 0
        self.runs: dict[bytes, int] = {}

    def exists(self, name: bytes) -> bool:
        task = ids.task_of(name)
        return bool(self.at.get(name)) or task in self.running or task in self.queued

    def submit(self) -> None:
        self.count += 1
        known = [name for name in self.referenced if self.at.get(name)]
        inputs = tuple(self.rng.sample(known, min(len(known), self.rng.choice([0, 1, 1, 2, 5]))))
        spec = TaskSpec(_task(self.count), SHAPE, b"", 0, inputs)
        self.specs[spec.id] = spec
        self.inputs[spec.id] = inputs
        self.referenced[_result(self.count)] = None
        self.queued.append(spec.id)

    def start(self) -> None:
        ready = [task for task in self.queued if all(self.at.get(name) for name in self.inputs[task])]
        if ready:
            task = self.rng.choice(ready)
            self.queued.remove(task)
            assert task not in self.running, "it runs twice at a time"
            held, _ = self.machine.sent(self.specs[task], JOB, 1, -1, "", lambda name: 0)
            assert not held, "all inputs have lineage"
            self.running[task] = self.rng.randrange(4)
            self.runs[task] = self.runs.get(task, 0) + 1

    def finish(self) -> None:
        if self.running:
            task = self.rng.choice(sorted(self.running))
            node = self.running.pop(task)
            name = ids.return_id(task, 0)
            self.at[name] = {node}
            self.machine.ended(task, [name])
            self.drop_unneeded()

    def drop_unneeded(self) -> None:
        """Values go when neither the program nor a task that will run refers to them."""
        needed = {name for task in (*self.queued, *self.running) for name in self.inputs[task]}
        for name in list(self.at):
            if name not in self.referenced and name not in needed:
                del self.at[name]
                self.machine.unreferenced(name)

    def copy(self) -> None:
        known = [name for name, nodes in self.at.items() if nodes]
        if known:
            self.at[self.rng.choice(known)].add(self.rng.randrange(4))

    def unreference(self) -> None:
        if self.referenced:
            name = self.rng.choice(list(self.referenced))
            if self.at.get(name):
                del self.referenced[name]
                self.drop_unneeded()

    def kill(self) -> None:
        node = self.rng.randrange(4)
        lost = []
        for name, nodes in self.at.items():
            if nodes == {node}:
                lost.append(name)
            nodes.discard(node)
        for task in [task for task, at in self.running.items() if at == node]:
            del self.running[task]
            self.queued.append(task)
        lost = [name for name in lost if name in self.referenced or self.is_input(name)]
        actions = self.machine.lost(lost, self.exists)
        done: set[bytes] = set()
        for action in actions:
            assert isinstance(action, Rerun), action
            assert action.task.id not in done, "planned twice"
            assert not self.at.get(ids.return_id(action.task.id, 0)), "what exists is made again"
            assert action.task.id not in self.running
            assert action.task.id not in self.queued
            for name in self.inputs[action.task.id]:
                assert self.exists(name) or ids.task_of(name) in done, "an input comes too late"
            done.add(action.task.id)
            self.queued.append(action.task.id)

    def is_input(self, name: bytes) -> bool:
        return any(name in self.inputs[task] for task in (*self.queued, *self.running))

    def check(self) -> None:
        self.machine.validate()
        for name in self.referenced:
            assert self.exists(name), "a referenced value is nowhere, and nobody makes it"
        for task in self.queued:
            assert all(self.exists(name) for name in self.inputs[task]), "a queued task waits for ever"


@pytest.mark.parametrize("seed", range(40))
def test_nodes_die_and_everything_that_is_referenced_is_made_again(seed: int) -> None:
    world = World(seed)
    steps = [world.submit, world.start, world.start, world.finish, world.finish, world.copy, world.unreference]
    for _ in range(600):
        world.rng.choice(steps)()
        if world.rng.random() < 0.03:
            world.kill()
        world.check()
    while world.queued or world.running:
        world.start()
        world.finish()
        world.check()
    assert max(world.runs.values()) > 1
    while world.referenced:
        world.unreference()
    assert len(world.machine) == 0


def test_a_planner_that_forgets_inputs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recovery, "_needs", lambda self, task: [])
    with pytest.raises(AssertionError):
        for seed in range(40):
            test_nodes_die_and_everything_that_is_referenced_is_made_again(seed)


def test_a_machine_that_forgets_dependents_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(self: Recovery, task: bytes) -> list[bytes]:
        dropped: list[bytes] = []
        lineage = self._tasks[task]
        if not (lineage.running or lineage.live):
            self._drop(task, dropped)
        return dropped

    monkeypatch.setattr(Recovery, "_settle", settle)
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(40):
            test_nodes_die_and_everything_that_is_referenced_is_made_again(seed)
