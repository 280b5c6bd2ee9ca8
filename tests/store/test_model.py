"""Random calls by three users of a segment, each compared with a model that is a dict and a few rules.

Covers return codes, values, who keeps what alive, counts. Does not cover concurrency and death (`kills.c`), nor the size at which a store is full: the
segment is roomy. A failure is replayed by its seed.
"""

from __future__ import annotations

import ctypes
import os
import random
from collections import Counter
from ctypes import byref, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field

import pytest

from tests.store import core
from tests.store.core import (
    BAD_ARGUMENT,
    BAD_STATE,
    CLAIMED,
    ELSEWHERE,
    ERROR,
    EXISTS,
    INLINE_MAX,
    LAST,
    NOT_FOUND,
    NOTIFY,
    OK,
    OPEN,
    PENDING,
    PINNED,
    REMOTE,
    SEALED,
    SENT,
    SPILLED,
    STALE,
    SYSTEM_ERROR,
    TIMEOUT,
    WAIT_ANYWHERE,
    WANTED,
    ZOMBIE,
)  # fmt: skip

STEPS = 4000
KEYS = 60


@dataclass
class Thing:
    """What the model knows of one object."""

    key: int
    slot: int
    state: int
    value: bytes = b""
    kind: int = 0
    flags: int = 0
    marks: int = 0
    before: int = 0
    """State before it became a zombie."""
    attempt: int = 0
    list: list[int] = field(default_factory=list)
    """Keys: contained objects, or arguments while pending."""
    spec: bytes = b""
    target: int = 0
    writer: int = -1
    """Index of the user that writes or has claimed it."""
    opened: bytes | None = None
    """What the writer has put into the open block."""
    opened_at: int = 0
    in_block: bool = False
    refs: Counter[int] = field(default_factory=Counter)
    pins: Counter[int] = field(default_factory=Counter)

    def held(self) -> bool:
        return self.refs.total() + self.pins.total() > 0


class Model:
    """The store as a dict, and the same calls on both."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.fd = core.new_segment(64 << 20, 4000)
        self.users = [core.Process(self.fd) for _ in range(3)]
        self.things: dict[int, Thing] = {}
        self.used_at: dict[int, int] = {}
        self.clock = 0

    # -- rules --

    def settle(self) -> None:
        """Free what nobody holds any more, until nothing changes."""
        again = True
        while again:
            again = False
            inside = Counter(key for thing in self.things.values() for key in thing.list)
            for thing in list(self.things.values()):
                if (
                    (thing.state in (SEALED, SPILLED) or (thing.state == PENDING and thing.marks & REMOTE))
                    and not thing.held()
                    and not inside[thing.key]
                    and thing.opened is None
                ):
                    if thing.flags & NOTIFY:
                        thing.before, thing.state = thing.state, ZOMBIE
                    else:
                        del self.things[thing.key]
                    again = True

    def touch(self, thing: Thing) -> None:
        self.clock += 1
        self.used_at[thing.key] = self.clock

    def spillable(self) -> list[Thing]:
        """Least recently used first."""
        found = [t for t in self.things.values() if t.state == SEALED and t.in_block and not t.pins.total()]
        return sorted(found, key=lambda thing: self.used_at[thing.key])

    def seal(self, thing: Thing, value: bytes, kind: int, flags: int, contained: list[int], in_block: bool) -> None:
        thing.state, thing.value, thing.kind, thing.list, thing.in_block = SEALED, value, kind, contained, in_block
        thing.flags = flags | (thing.flags & NOTIFY)
        thing.marks = 0
        thing.writer, thing.opened, thing.spec, thing.target = -1, None, b"", 0
        self.touch(thing)

    # -- choices --

    def id(self, key: int) -> bytes:
        return b"model-%06d" % key + key.to_bytes(4, "little")

    def referenced(self, who: int) -> list[Thing]:
        return [thing for thing in self.things.values() if thing.refs[who]]

    def lower(self, who: int, key: int) -> list[Thing]:
        """Objects that `key` may contain: lower keys, so that there are no cycles."""
        found = [thing for thing in self.referenced(who) if thing.key < key]
        return self.rng.sample(found, min(len(found), self.rng.choice([0, 0, 1, 3, 20])))

    def bytes(self) -> bytes:
        return self.rng.randbytes(self.rng.choice([0, 1, 7, 47, 48, 49, 100, 1000, 20000]))

    # -- calls --

    def step(self) -> None:
        who = self.rng.randrange(3)
        user = self.users[who]
        name = self.rng.choice([n for n in dir(self) if n.startswith("do_")])
        chosen = self.rng.choice(self.referenced(who) or [None])
        if name in ("do_put", "do_put_shared", "do_life", "do_expect", "do_reference", "do_claim"):
            getattr(self, name)(who, user, self.rng.randrange(KEYS))
        elif chosen is not None or name in ("do_zombie", "do_spill", "do_leave"):
            getattr(self, name)(who, user, chosen)
        self.settle()

    def found(self, who: int, key: int, code: int, slot: c_uint32) -> bool:
        """Handle ZS_EXISTS: a reference on what is there."""
        thing = self.things.get(key)
        if thing is None:
            assert code == OK
            return False
        assert code == EXISTS
        assert slot.value == thing.slot
        thing.refs[who] += 1
        if thing.state == ZOMBIE:
            thing.state = thing.before
            if thing.state == SEALED:
                self.touch(thing)
        return True

    def do_put(self, who: int, user: core.Process, key: int) -> None:
        value, contained, slot, data = self.bytes(), self.lower(who, key), c_uint32(), c_void_p()
        if len(value) <= INLINE_MAX and not contained and self.rng.random() < 0.7:
            code = user.call("put_inline", self.id(key), value, len(value), 4, 1, byref(slot))
            if not self.found(who, key, code, slot):
                thing = self.things[key] = Thing(key, slot.value, SEALED)
                thing.refs[who] = 1
                self.seal(thing, value, 4, 0, [], False)
            return
        room = len(contained) + self.rng.choice([0, 0, 3])
        code = user.call("create", self.id(key), len(value), room, 1, byref(slot), byref(data))
        if self.found(who, key, code, slot):
            return
        thing = self.things[key] = Thing(key, slot.value, OPEN, writer=who, opened=value)
        thing.refs[who] = 1
        ctypes.memmove(data, value, len(value))
        thing.in_block = (-(-len(value) // 4) * 4 + 4 * room if room else len(value)) > INLINE_MAX
        if self.rng.random() < 0.1:
            return  # left open for another step
        slots = core.slots_of([inner.slot for inner in contained])
        assert user.call("seal", slot, 2, 0, slots, len(contained)) == OK
        in_block = thing.in_block and bool(value or contained)
        self.seal(thing, value, 2, 0, [inner.key for inner in contained], in_block)

    def do_put_shared(self, who: int, user: core.Process, key: int) -> None:
        value, contained, slot, data = self.bytes(), self.lower(who, key), c_uint32(), c_void_p()
        room = len(contained) + self.rng.choice([0, 0, 3])
        assert user.call("create", self.rng.randbytes(16), len(value), room, 1, byref(slot), byref(data)) == OK
        ctypes.memmove(data, value, len(value))
        in_block = (-(-len(value) // 4) * 4 + 4 * room if room else len(value)) > INLINE_MAX
        slots = core.slots_of([inner.slot for inner in contained])
        code = user.call("seal_as", byref(slot), self.id(key), 7, 0, slots, len(contained))
        if not self.found(who, key, code, slot):
            thing = self.things[key] = Thing(key, slot.value, OPEN)
            thing.refs[who] = 1
            self.seal(thing, value, 7, 0, [inner.key for inner in contained], in_block and bool(value or contained))

    def do_finish(self, who: int, user: core.Process, thing: Thing) -> None:
        """Seal or abort what was left open."""
        if thing.state != OPEN:
            assert user.call("seal", thing.slot, 0, 0, None, 0) == BAD_STATE
        elif thing.writer != who:
            assert user.call("seal", thing.slot, 0, 0, None, 0) == STALE
        elif self.rng.random() < 0.5:
            assert user.call("abort", thing.slot) == OK
            self.seal(thing, b"", ERROR, SYSTEM_ERROR, [], False)
        else:
            assert thing.opened is not None
            assert user.call("seal", thing.slot, 3, 0, None, 0) == OK
            self.seal(thing, thing.opened, 3, 0, [], thing.in_block and bool(thing.opened))

    def do_life(self, who: int, user: core.Process, key: int) -> None:
        slot = c_uint32()
        if not self.found(who, key, user.call("put_life", self.id(key), b"life", 4, 1, byref(slot)), slot):
            thing = self.things[key] = Thing(key, slot.value, SEALED)
            thing.refs[who] = 1
            self.seal(thing, b"life", 0, NOTIFY, [], False)

    def do_zombie(self, who: int, user: core.Process, thing: Thing) -> None:
        zombies = [thing for thing in self.things.values() if thing.state == ZOMBIE]
        name = ctypes.create_string_buffer(16)
        code = user.call("next_zombie", name)
        assert (code == OK) == bool(zombies)
        if zombies:
            [gone] = [thing for thing in zombies if self.id(thing.key) == name.raw]
            del self.things[gone.key]
        else:
            assert code == LAST

    def do_reference(self, who: int, user: core.Process, key: int) -> None:
        slot = c_uint32()
        code = user.call("reference", self.id(key), byref(slot))
        if code == OK:
            assert self.found(who, key, EXISTS, slot)
        else:
            assert code == NOT_FOUND
            assert key not in self.things

    def do_release(self, who: int, user: core.Process, thing: Thing) -> None:
        if self.rng.random() < 0.02:
            while thing.refs[who] > 1:
                assert user.call("release", thing.slot) == OK
                thing.refs[who] -= 1
        assert user.call("release", thing.slot) == OK
        thing.refs[who] -= 1
        if not thing.refs[who]:
            assert user.call("release", thing.slot) == BAD_ARGUMENT

    do_release_more = do_release

    def do_contained(self, who: int, user: core.Process, thing: Thing) -> None:
        slots, names, n = (c_uint32 * 64)(), ctypes.create_string_buffer(16 * 64), c_size_t()
        code = user.call("reference_contained", thing.slot, slots, names, 64, byref(n))
        if thing.state not in (SEALED, SPILLED):
            assert code == BAD_STATE
            return
        assert code == OK
        assert [self.things[key].slot for key in thing.list] == slots[: n.value]
        for i, key in enumerate(thing.list):
            assert names.raw[16 * i : 16 * i + 16] == self.id(key)
            self.things[key].refs[who] += 1

    def do_expect(self, who: int, user: core.Process, key: int) -> None:
        deps, spec, slot = self.lower(who, key), self.bytes()[:2000], c_uint32()
        target = self.rng.choice([0, *(other.proc for other in self.users)])
        slots = core.slots_of([dep.slot for dep in deps])
        code = user.call("expect", self.id(key), target, 1, 0, slots, len(deps), spec, len(spec), byref(slot))
        if not self.found(who, key, code, slot):
            thing = Thing(key, slot.value, PENDING, list=[dep.key for dep in deps], spec=spec, target=target)
            thing.refs[who] = 1
            self.things[key] = thing

    def do_claim(self, who: int, user: core.Process, key: int) -> None:
        thing, slot = self.things.get(key), c_uint32()
        attempt = self.rng.choice([0, thing.attempt if thing else 1, thing.attempt if thing else 2])
        code = user.call("claim", self.id(key), attempt, byref(slot))
        if thing is None:
            assert code == NOT_FOUND
        elif thing.state != PENDING or thing.attempt != attempt or thing.marks & (ELSEWHERE | SENT):
            assert code == STALE
        else:
            assert code == OK
            assert slot.value == thing.slot
            thing.state, thing.writer = CLAIMED, who

    def do_seal_result(self, who: int, user: core.Process, thing: Thing) -> None:
        value, data = self.bytes(), c_void_p()
        attempt = thing.attempt + self.rng.choice([0, 0, 0, 1])
        mine = thing.state == CLAIMED and thing.writer == who and thing.attempt == attempt
        if len(value) <= INLINE_MAX and self.rng.random() < 0.7:
            code = user.call("seal_inline", thing.slot, attempt, value, len(value), 5, 0)
            assert code == (OK if mine else STALE)
            if mine:
                self.seal(thing, value, 5, 0, [], False)
            return
        contained = self.lower(who, thing.key)
        code = user.call("open_result", thing.slot, attempt, len(value), len(contained) + 1, byref(data))
        assert code == (OK if mine else STALE)
        if not mine:
            return
        ctypes.memmove(data, value, len(value))
        thing.opened, thing.opened_at = value, attempt
        if self.rng.random() < 0.3:
            return  # left for another step; the claim may be superseded in between
        slots = core.slots_of([inner.slot for inner in contained])
        assert user.call("seal_result", thing.slot, attempt, 6, SYSTEM_ERROR, slots, len(contained)) == OK
        self.seal(thing, value, 6, SYSTEM_ERROR, [inner.key for inner in contained], bool(value or contained))

    def do_retry(self, who: int, user: core.Process, thing: Thing) -> None:
        attempt, target = c_uint32(), self.rng.choice([0, user.proc])
        code = user.call("retry", thing.slot, target, byref(attempt))
        reopened = thing.state == SEALED and thing.flags & SYSTEM_ERROR and not thing.pins.total()
        if thing.state not in (PENDING, CLAIMED) and not reopened:
            assert code == BAD_STATE
            return
        assert code == OK
        if reopened:
            thing.list, thing.spec, thing.value, thing.flags = [], b"", b"", thing.flags & ~SYSTEM_ERROR
        thing.state, thing.attempt, thing.target, thing.writer, thing.opened = (
            PENDING,
            thing.attempt + 1,
            target,
            -1,
            None,
        )
        thing.marks &= WANTED
        assert attempt.value == thing.attempt

    def do_elsewhere(self, who: int, user: core.Process, thing: Thing) -> None:
        made, wanted = self.rng.randrange(2), ctypes.c_int(-1)
        code = user.call("elsewhere", thing.slot, made, byref(wanted))
        assert code == (OK if thing.state == PENDING else BAD_STATE)
        if code == OK:
            assert wanted.value == bool(thing.marks & WANTED)
            thing.marks = (thing.marks & WANTED) | REMOTE | (ELSEWHERE if made else 0)
            thing.flags |= NOTIFY
            thing.list, thing.spec, thing.target, thing.writer = [], b"", 0, -1

    def do_send_away(self, who: int, user: core.Process, thing: Thing) -> None:
        code = user.call("send_away", thing.slot)
        assert code == (OK if thing.state == PENDING and not thing.marks & SENT else BAD_STATE)
        if code == OK:
            thing.marks |= SENT

    def do_want(self, who: int, user: core.Process, thing: Thing) -> None:
        several = [thing, *self.lower(who, KEYS)]
        found = (c_uint32 * len(several))()
        count = user.call("want", core.slots_of([t.slot for t in several]), len(several), found)
        expected = []
        for index, other in enumerate(several):
            if other.state in (PENDING, CLAIMED) and not other.marks & WANTED:
                if other.marks & ELSEWHERE:
                    expected.append(index)
                other.marks |= WANTED
            assert user.call("marks", other.slot) == other.marks
        assert list(found[:count]) == expected

    def do_take_over(self, who: int, user: core.Process, thing: Thing) -> None:
        attempt = c_uint32()
        code = user.call("take_over", thing.slot, byref(attempt))
        assert code == (OK if thing.state in (PENDING, CLAIMED) else BAD_STATE)
        if code == OK:
            thing.state, thing.attempt, thing.writer, thing.opened = CLAIMED, thing.attempt + 1, who, None

    def do_take_copy(self, who: int, user: core.Process, thing: Thing) -> None:
        attempt = c_uint32()
        code = user.call("take_copy", thing.slot, byref(attempt))
        pending = thing.state in (PENDING, CLAIMED) and thing.marks & ELSEWHERE
        assert code == (OK if pending else BAD_STATE)
        if code == OK:
            thing.state, thing.attempt, thing.writer, thing.opened = CLAIMED, thing.attempt + 1, who, None

    def do_force(self, who: int, user: core.Process, thing: Thing) -> None:
        code = user.call("seal_forced", thing.slot, b"forced", 6, ERROR, 0)
        assert code == (OK if thing.state in (PENDING, CLAIMED) else BAD_STATE)
        if code == OK:
            thing.attempt += 1
            self.seal(thing, b"forced", ERROR, 0, [], False)

    def do_spec(self, who: int, user: core.Process, thing: Thing) -> None:
        room, size, attempt = ctypes.create_string_buffer(2000), c_uint32(2000), c_uint32()
        code = user.call("spec", thing.slot, room, byref(size), byref(attempt))
        assert attempt.value == thing.attempt
        if thing.state in (PENDING, CLAIMED) and thing.spec:
            assert code == OK
            assert room.raw[: size.value] == thing.spec
        else:
            assert code == NOT_FOUND

    def do_pin(self, who: int, user: core.Process, thing: Thing) -> None:
        view = core.View()
        code = user.call("pin", thing.slot, byref(view))
        assert code == (OK if thing.state == SEALED else BAD_STATE)
        assert view.state == thing.state
        if code == OK:
            assert ctypes.string_at(view.data, view.size) == thing.value
            assert (view.kind, view.flags, view.attempt) == (thing.kind, thing.flags, thing.attempt)
            thing.pins[who] += 1

    def do_unpin(self, who: int, user: core.Process, thing: Thing) -> None:
        code = user.call("unpin", thing.slot)
        assert code == (OK if thing.pins[who] else BAD_ARGUMENT)
        if code == OK:
            thing.pins[who] -= 1
            if not thing.pins.total():
                self.touch(thing)

    do_unpin_more = do_unpin

    def do_discard(self, who: int, user: core.Process, thing: Thing) -> None:
        code = user.call("discard", thing.slot, b"gone", 4, ERROR)
        if thing.state not in (SEALED, SPILLED):
            assert code == BAD_STATE
        elif thing.pins.total() or thing.opened is not None:
            assert code == PINNED
        else:
            assert code == OK
            thing.attempt += 1
            self.seal(thing, b"gone", ERROR, 0, [], False)

    def do_spill(self, who: int, user: core.Process, thing: Thing) -> None:
        candidates, slot, view = self.spillable(), c_uint32(), core.View()
        code = user.call("spill_candidate", 1, byref(slot), byref(view))
        if not candidates or all(not c.value for c in candidates):
            assert code == LAST
            return
        assert code == OK
        oldest = next(self.used_at[c.key] for c in candidates if c.value)
        equal = {c.slot: c for c in candidates if self.used_at[c.key] == oldest}  # several after a user's leaving
        first = equal[slot.value]
        assert ctypes.string_at(view.data, view.size) == first.value
        if self.rng.random() < 0.3:
            assert user.call("spill_abort", slot) == OK
            self.touch(first)
        else:
            assert user.call("spilled", slot) == OK
            first.state = SPILLED

    def do_restore(self, who: int, user: core.Process, thing: Thing) -> None:
        data, size = c_void_p(), c_uint64()
        if thing.state == SPILLED and thing.writer == who and thing.opened is not None:
            good = self.rng.random() < 0.8
            assert user.call("restored", thing.slot, int(good)) == OK
            thing.writer, thing.opened = -1, None
            if good:
                thing.state = SEALED
                self.touch(thing)
            return
        code = user.call("restore", thing.slot, byref(data), byref(size))
        if thing.state != SPILLED or thing.opened is not None:
            assert code == BAD_STATE
            return
        assert code == OK
        assert size.value == len(thing.value)
        ctypes.memmove(data, thing.value, size.value)
        thing.writer, thing.opened = who, thing.value

    def do_wait(self, who: int, user: core.Process, thing: Thing) -> None:
        several, done = self.referenced(who), c_size_t()
        mode = self.rng.choice([0, WAIT_ANYWHERE])
        finished = sum(t.state in (SEALED, SPILLED) or bool(mode and t.marks & ELSEWHERE) for t in several)
        want = self.rng.randint(1, len(several))
        code = user.call(
            "wait",
            core.slots_of([t.slot for t in several]),
            len(several),
            want,
            self.rng.choice([0, 1000]),
            mode,
            byref(done),
        )
        assert done.value == finished
        assert code == (OK if finished >= want else TIMEOUT)

    def do_leave(self, who: int, user: core.Process, thing: Thing) -> None:
        """Now and then a user leaves and comes back: all it held and wrote is given back."""
        if self.rng.random() > 0.05:
            return
        assert user.call("unregister") == OK
        assert user.call("register", core.PROC_TEST) == OK
        self.clock += 1
        for other in list(self.things.values()):
            if other.pins[who] == other.pins.total() > 0:
                self.used_at[other.key] = self.clock
            other.refs[who] = other.pins[who] = 0
            if other.writer == who:
                other.opened = None
                if other.state == OPEN:
                    self.seal(other, b"", ERROR, SYSTEM_ERROR, [], False)
                elif other.state == CLAIMED:
                    other.writer = -2  # nobody: stays claimed until the broker decides

    # -- comparison --

    def compare(self) -> None:
        self.users[0].check()
        seen = self.users[0].statistics()
        states = Counter(thing.state for thing in self.things.values())
        assert seen.sealed == states[SEALED]
        assert seen.spilled == states[SPILLED]
        assert seen.zombies == states[ZOMBIE]
        assert seen.pending == states[PENDING] + states[CLAIMED]
        assert seen.open - states[OPEN] == seen.entries - len(self.things)  # the rest: blocks of superseded writers
        assert seen.pins == sum(thing.pins.total() for thing in self.things.values())
        assert seen.holds == sum(
            1 for thing in self.things.values() for who in range(3) if thing.refs[who] or thing.pins[who]
        )
        for user in self.users:
            waiting = [t for t in self.things.values() if t.state in (PENDING, CLAIMED) and t.target == user.proc]
            assert user.call("expected", user.proc) == len(waiting)

    def wind_up(self) -> None:
        """With its holders everything goes."""
        for thing in self.things.values():
            if thing.state in (PENDING, CLAIMED):
                assert self.users[0].call("seal_forced", thing.slot, b"", 0, ERROR, 0) == OK
        for user in self.users[1:]:
            user.close()
        assert self.users[0].call("unregister") == OK
        assert self.users[0].call("register", core.PROC_TEST) == OK
        while self.users[0].call("next_zombie", ctypes.create_string_buffer(16)) == OK:
            pass
        self.users[0].check()
        seen = self.users[0].statistics()
        assert (seen.entries, seen.used, seen.holds, seen.inline_bytes) == (0, 0, 0, 0)
        self.users[0].close()
        os.close(self.fd)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_calls_agree_with_the_model(seed: int) -> None:
    model = Model(seed)
    for step in range(STEPS):
        model.step()
        if step % 20 == 0:
            model.compare()
    model.compare()
    model.wind_up()


@pytest.mark.soak
def test_many_seeds_agree_with_the_model() -> None:
    for seed in range(100, 400):
        test_random_calls_agree_with_the_model(seed)
