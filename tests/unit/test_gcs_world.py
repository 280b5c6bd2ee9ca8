"""A seeded world around the control store: lossy links, slow reads, restarts; and the proof that it finds planted
faults.

Covers what unit tests of single machines cannot: that a follower is right at every moment about the state it claims to
know, and equal to the store once the link is whole again, whatever was lost; that acknowledged writes and needed specs
are never lost. A world runs from its seed alone. `Fault` lists the mistakes that the machines can be told to make: each
must be found here, or this file is worth nothing.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Iterator, Sequence

import pytest

from zray.clock import ManualClock
from zray.gcs import messages as m
from zray.gcs.client import GcsClient
from zray.gcs.faults import NO_FAULTS, Fault, Faults
from zray.gcs.limits import GcsLimits
from zray.gcs.service import GcsService
from zray.gcs.tables import (
    ANY,
    LIVE,
    ActorRow,
    ActorState,
    Change,
    Row,
    Table,
    TaskRow,
    decode_row,
    encode_row,
    namespaced_key,
)
from zray.gcs.topics import TopicView
from zray.ids import task_id
from zray.task import TaskSpec
from zray.wire import DONE_ERROR, DONE_OK, DONE_RETRY

ROOT = bytes(16)
SHARDS = 2
FOLLOWED = (Table.KV, Table.ACTORS)
LIMITS = GcsLimits(
    ended_tasks=12, lineage_bytes=1 << 30, ended_actors=4, events=6, log_changes=6, log_bytes=1000, kv_bytes=2000
)
State = dict[bytes, tuple[bytes, int]]


class Truth:
    """Storage that survives restarts, and with it what followers are compared with.

    Every state that a table of a shard was ever in.
    """

    def __init__(self) -> None:
        self.rows: dict[int, dict[tuple[int, bytes], Row]] = {shard: {} for shard in range(SHARDS)}
        self.revisions = dict.fromkeys(range(SHARDS), 0)
        self.states: dict[tuple[int, int, int, int], State] = {}
        """(epoch, shard, table, sequence) -> rows."""
        self.epoch = 0

    def begin(self, epoch: int) -> None:
        self.epoch = epoch
        for shard in range(SHARDS):
            for table in FOLLOWED:
                self.states[epoch, shard, table, 0] = self.state(shard, table)

    def state(self, shard: int, table: int) -> State:
        return {key: (row.value, row.version) for (t, key), row in self.rows[shard].items() if t == table}

    def load(self, shard: int) -> tuple[int, list[tuple[int, bytes, Row]]]:
        return self.revisions[shard], [(table, key, row) for (table, key), row in self.rows[shard].items()]

    durable = True

    def load_records(self) -> Iterator[bytes]:
        return iter(())

    def write(self, changes: Sequence[tuple[int, Change]], records: Sequence[bytes] = (), drop: int = 0) -> None:
        for shard, change in changes:
            rows = self.rows[shard]
            rows.pop((change.table, change.key), None)
            if change.value is not None:
                rows[change.table, change.key] = Row(change.value, change.version, change.ended)
            self.revisions[shard] = change.version
            self.states[self.epoch, shard, change.table, change.sequence] = self.state(shard, change.table)

    def rewrite(self, changes: Sequence[tuple[int, Change]]) -> None:
        raise AssertionError("it never loses anything")

    def lapsed(self) -> bool:
        return False

    def tick(self) -> None:
        pass

    def close(self) -> None:
        pass


class Link:
    """From a PUB socket to its followers: keeps order, drops and repeats at will."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.followers: list[deque[tuple[bytes, bytes]]] = []

    def send(self, topic: bytes, body: bytes) -> None:
        rng = self.world.rng
        for queue in self.followers:
            if rng.random() < self.world.loss:
                continue
            queue.append((topic, body))
            if rng.random() < self.world.loss / 3:
                queue.append((topic, body))

    def close(self) -> None:
        pass


class Follower:
    """A process that follows one table of one shard and whose reads take a while.

    Notices arrive between question and answer.
    """

    def __init__(self, world: World, table: Table, shard: int) -> None:
        self.world = world
        self.shard = shard
        self.table = table
        self.view = TopicView(table, world.faults)
        self.queue: deque[tuple[bytes, bytes]] = deque()
        self.answer: bytes | None = None
        self.told: State = {}
        """What somebody knows who only hears the news."""

    def hear(self, news: list[Change]) -> None:
        for change in news:
            if change.value is None:
                self.told.pop(change.key, None)
            else:
                self.told[change.key] = (change.value, change.version)

    def take_message(self) -> None:
        topic, body = self.queue.popleft()
        notice = m.decode_notice(topic, body)
        if isinstance(notice, m.Beat):
            self.view.handle_beat(notice.epoch, notice.newest.get(self.table, 0))
        elif notice.change.table == self.table:
            self.hear(self.view.handle_notice(notice.epoch, notice.change))

    def ask(self) -> None:
        if not self.view.synced and self.answer is None:
            request = m.Read(self.table, self.shard, self.view.epoch, self.view.sequence)
            self.answer = self.world.gcs.handle_request(m.encode(request))

    def take_answer(self) -> None:
        if self.answer is None:
            return
        reply = m.decode_reply(self.answer)
        self.answer = None
        if isinstance(reply, m.Log):
            self.hear(self.view.handle_log(reply.epoch, reply.changes))
        else:
            assert isinstance(reply, m.Snapshot)
            self.hear(self.view.handle_snapshot(reply.epoch, reply.sequence, reply.rows))

    def check(self) -> None:
        """Synced or not, the rows are those of the moment that the numbers name."""
        view = self.view
        assert self.told == view.rows, "the news do not add up to the view"
        if view.epoch:
            state = self.world.truth.states.get((view.epoch, self.shard, self.table, view.sequence))
            assert state is not None, "the view names a moment that never was"
            assert state == view.rows, "the view differs from the moment that it names"


class World:
    """One service, its surroundings and a model of what it should know."""

    def __init__(self, seed: int, faults: Faults = NO_FAULTS) -> None:
        self.rng = random.Random(seed)
        self.faults = faults
        self.clock = ManualClock(start=10.0)
        self.truth = Truth()
        self.loss = 0.25
        self.links = [Link(self) for _ in range(SHARDS)]
        self.needed: set[bytes] = set()
        self.rows: dict[tuple[Table, bytes], tuple[bytes, int]] = {}
        self.ended: dict[int, dict[bytes, None]] = {shard: {} for shard in range(SHARDS)}
        self.tasks: dict[bytes, tuple[int, TaskSpec | None]] = {}
        """Task -> (status, spec)."""
        self.gcs = self.start()
        self.followers = [Follower(self, table, shard) for table in FOLLOWED for shard in range(SHARDS)]
        for follower in self.followers:
            self.links[follower.shard].followers.append(follower.queue)

    def start(self) -> GcsService:
        epoch = self.truth.epoch + 1
        self.truth.begin(epoch)
        gcs = GcsService(
            lambda endpoint: self.links[int(endpoint[-1])],
            "/run/s",
            shards=SHARDS,
            clock=self.clock,
            limits=LIMITS,
            storage=self.truth,
            referenced=lambda names: self.needed.intersection(names),
            epoch=epoch,
            faults=self.faults,
        )
        for table in FOLLOWED:
            gcs.open_topic(table)
        return gcs

    # -- what can happen ---------------------------------------------------------------------------------------------

    def step(self) -> None:
        moves = [
            self.put_user_key,
            self.put_user_key,
            self.swap_user_key,
            self.put_actor,
            self.put_actor,
            self.delete_row,
            self.submit_tasks,
            self.finish_tasks,
            self.finish_tasks,
            self.pass_time,
            self.deliver,
            self.deliver,
            self.deliver,
        ]
        self.rng.choice(moves)()
        self.gcs.commit()
        self.deliver()
        if self.rng.random() < 0.015:
            self.restart()

    def put_user_key(self) -> None:
        key = namespaced_key(b"", b"k%d" % self.rng.randrange(8))
        value = self.rng.randbytes(self.rng.randrange(12))
        self.written(Table.KV, key, value, self.gcs.put_bytes(Table.KV, key, value))

    def swap_user_key(self) -> None:
        key = namespaced_key(b"", b"k%d" % self.rng.randrange(8))
        version = self.rows.get((Table.KV, key), (b"", 0))[1]
        expected = self.rng.choice([version, version, max(0, version - 1), version + 1])
        reply = self.gcs.put_bytes(Table.KV, key, b"swapped", expected=expected)
        if expected != version:
            assert reply == m.Conflict(version), "a write against another version was taken"
        else:
            self.written(Table.KV, key, b"swapped", reply)

    def put_actor(self) -> None:
        key = task_id(ROOT, self.rng.randrange(16))
        state = self.rng.choice([ActorState.ALIVE, ActorState.RESTARTING, ActorState.DEAD])
        row = ActorRow(key, 1, state, incarnation=self.rng.randrange(99))
        reply = self.gcs.put_row(row, expected=ANY)
        shard = self.gcs.shard_for(Table.ACTORS, key).index
        ended = self.ended[shard]
        ended.pop(key, None)
        if state == ActorState.DEAD:
            ended[key] = None
        self.written(Table.ACTORS, key, encode_row(row), m.Written(reply))
        while len(ended) > LIMITS.share(SHARDS).ended_actors:
            old = next(iter(ended))
            del ended[old], self.rows[Table.ACTORS, old]

    def written(self, table: Table, key: bytes, value: bytes, reply: m.Reply) -> None:
        assert isinstance(reply, m.Written)
        self.rows[table, key] = (value, reply.version)

    def delete_row(self) -> None:
        if self.rows:
            table, key = self.rng.choice(sorted(self.rows))
            assert isinstance(self.gcs.delete_bytes(table, key), m.Written)
            del self.rows[table, key]
            for ended in self.ended.values():
                ended.pop(key, None)

    def submit_tasks(self) -> None:
        names = {task_id(ROOT, self.rng.randrange(40)) for _ in range(self.rng.randint(1, 4))}
        made = [TaskSpec(name, ROOT, b"args") for name in sorted(names)]
        self.gcs.tasks_submitted(1, made)
        for spec in made:
            self.tasks[spec.id] = (LIVE, spec)
            if self.rng.random() < 0.3:
                self.needed.add(spec.id)

    def finish_tasks(self) -> None:
        live = sorted(name for name, (status, _) in self.tasks.items() if status == LIVE)
        names = self.rng.sample(live, min(len(live), self.rng.randint(1, 3)))
        if self.rng.random() < 0.3:
            names.append(task_id(ROOT, self.rng.randrange(60)))  # a late report, or a task that went past the broker
        self.rng.shuffle(names)
        statuses = bytes(self.rng.choice([DONE_OK, DONE_OK, DONE_ERROR, DONE_RETRY]) for _ in names)
        self.gcs.tasks_finished(1, 3, names, statuses, [7] * len(names))
        for name, status in zip(names, statuses):
            if status != DONE_RETRY:
                self.tasks[name] = (status, self.tasks.get(name, (0, None))[1])
        if self.needed and self.rng.random() < 0.2:
            self.needed.discard(min(self.needed))

    def pass_time(self) -> None:
        self.clock.advance(self.rng.choice([0.05, 0.2, 1.5]))
        self.gcs.tick(self.clock.now())

    def deliver(self) -> None:
        follower = self.rng.choice(self.followers)
        for _ in range(self.rng.randint(1, 6)):
            if follower.queue and self.rng.random() < 0.8:
                follower.take_message()
            elif self.rng.random() < 0.5:
                follower.ask()
            else:
                follower.take_answer()
            follower.check()

    def restart(self) -> None:
        self.gcs.close()
        self.tasks.clear()
        self.needed.clear()
        self.gcs = self.start()

    # -- what must hold ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.gcs.validate()
        for table in FOLLOWED:
            found: State = {}
            for shard in self.gcs.shards:
                found.update({key: (row.value, row.version) for key, row in shard.page(table, b"", None, 1000)})
            expected = {key: row for (t, key), row in self.rows.items() if t == table}
            assert found == expected, f"{table.name}: the rows are not those that were acknowledged"
        for name in sorted(self.tasks):
            self.check_task(name, self.gcs.task(name))

    def check_task(self, name: bytes, row: TaskRow | None) -> None:
        status, spec = self.tasks[name]
        if status == LIVE or (name in self.needed and spec is not None):
            assert row is not None, "a task that is needed is not known any more"
        if row is not None:
            assert row.status == status, "a task has not the status of its newest end"
            assert row.spec == spec, "a task has not its spec"
        else:
            del self.tasks[name]  # its spec went with it: a later end could not bring it back

    def heal(self) -> None:
        """A whole link and two beats: every follower must know everything."""
        self.loss = 0.0
        for _ in range(6):
            self.clock.advance(1.5)
            self.gcs.tick(self.clock.now())
            for follower in self.followers:
                follower.take_answer()
                while follower.queue:
                    follower.take_message()
                follower.ask()
                follower.take_answer()
                follower.check()
        for follower in self.followers:
            view = follower.view
            assert view.synced, "a follower does not come to rest"
            assert view.epoch == self.gcs.epoch, "a follower follows a service that is gone"
            assert view.rows == self.truth.state(follower.shard, follower.table), "a follower does not know all rows"

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
            self.check()
        self.heal()


@pytest.mark.parametrize("seed", range(12))
def test_a_world_without_faults_is_right_at_every_step(seed: int) -> None:
    World(seed).run(200)


def test_the_worlds_are_lossy_enough_to_mean_something() -> None:
    world = World(1)
    world.run(400)
    views = [follower.view for follower in world.followers]
    assert sum(view.gaps for view in views) > 10
    assert sum(view.duplicates for view in views) > 5
    assert len(world.truth.states) > 50
    assert world.truth.epoch > 1


def test_the_same_seed_gives_the_same_world() -> None:
    def history(seed: int) -> list[tuple[object, State]]:
        world = World(seed)
        world.run(80)
        return list(world.truth.states.items())

    assert history(7) == history(7) != history(8)


FOUND_BY = {
    Fault.SKIPPED_SEQUENCE: "the log has a hole",
    Fault.NO_VERSION_BUMP: "versions in the log do not grow",
    Fault.VERSION_REUSED: r"changes, but revision|a version that was never given",
    Fault.STALE_WRITE_ACCEPTED: "a write against another version was taken",
    Fault.KEY_INDEX_KEPT: "the ordered index differs from the rows",
    Fault.BYTES_NOT_RETURNED: r"\d+ bytes counted, \d+ there",
    Fault.LIVE_ROW_RETIRED: "the rows are not those that were acknowledged",
    Fault.RETENTION_FORGOTTEN: "ACTORS: more ended rows than allowed",
    Fault.LOG_UNBOUNDED: "the log is longer than allowed",
    Fault.LOG_LOSES_CHANGE: "the log has a hole",
    Fault.ENDED_TASK_LOST: "ended task .* has no row",
    Fault.TASK_END_DROPPED_WITH_OLD: "ended task .* has no row",
    Fault.TASK_RING_UNBOUNDED: "^more ended rows than allowed",
    Fault.TASK_BYTES_NOT_RETURNED: "bytes of the ring are miscounted",
    Fault.LINEAGE_FLUSHED: "a task that is needed is not known any more",
    Fault.BEAT_WITHOUT_NEWEST: "a follower does not know all rows",
    Fault.GAP_IGNORED: "the view differs from the moment that it names",
    Fault.DUPLICATE_APPLIED: "the view differs from the moment that it names",
    Fault.EPOCH_IGNORED: "a moment that never was|a service that is gone",
    Fault.SNAPSHOT_TOO_NEW: "the view names a moment that never was",
    Fault.WAITING_NOTICES_LOST: "the view differs from the moment that it names",
    Fault.DELETION_NOT_SEEN: "the view differs from the moment that it names",
}
"""Which check notices which mistake, as a pattern of its message."""

WORLDS_PER_FAULT = 30


def test_the_list_of_faults_is_complete() -> None:
    assert FOUND_BY.keys() == set(Fault)


@pytest.mark.parametrize("fault", list(Fault), ids=lambda fault: fault.name)
def test_every_planted_fault_is_found_by_its_check(fault: Fault) -> None:
    for seed in range(WORLDS_PER_FAULT):
        try:
            World(seed, frozenset({fault})).run(200)
        except AssertionError as error:
            if re.search(FOUND_BY[fault], str(error)):
                return
    pytest.fail(f"{WORLDS_PER_FAULT} worlds did not find out that {fault.value}")


# -- the subscription of a client, over the same links -----------------------------------------------------------------


class LossySocket:
    """A SUB socket at the end of a lossy link."""

    def __init__(self, link: Link, topics: list[bytes]) -> None:
        self.queue: deque[tuple[bytes, bytes]] = deque()
        self.topics = tuple(topics)
        link.followers.append(self.queue)

    def receive(self, timeout_ms: int) -> tuple[bytes, bytes] | None:
        while self.queue:
            topic, body = self.queue.popleft()
            if topic.startswith(self.topics):
                return topic, body
        return None

    def close(self) -> None:
        self.queue.clear()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("loss", [0.0, 0.3, 1.0])
def test_a_subscription_ends_up_with_every_row(seed: int, loss: float) -> None:
    world = World(seed)
    world.followers.clear()
    world.loss = loss
    client = GcsClient(lambda body: world.gcs.handle_request(body))
    subscription = client.subscribe(Table.ACTORS, lambda at, topics: LossySocket(world.links[int(at[-1])], topics))
    heard: dict[bytes, bytes] = {}

    def poll() -> None:
        for change in subscription.poll():
            if change.value is None:
                heard.pop(change.key)
            else:
                heard[change.key] = change.value

    for _ in range(150):
        world.rng.choice([world.put_actor, world.delete_row, world.pass_time, world.put_user_key])()
        if world.rng.random() < 0.5:
            poll()
        if world.rng.random() < 0.02:
            world.restart()
    world.loss = 0.0
    world.clock.advance(2.0)
    world.gcs.tick(world.clock.now())
    poll()
    expected = {key: value for (table, key), (value, _) in world.rows.items() if table == Table.ACTORS}
    assert subscription.rows == heard == expected
    assert {decode_row(ActorRow, value).id for value in heard.values()} == set(expected)
    if loss:
        assert subscription.gaps > 0
    subscription.close()
