/* Many processes do random things to one small segment and are killed at any time, thousands of times; nothing may be lost or corrupted.
 *
 * Usage: kills [--kills N] [--seed N] [--workers N] [--fault N]. Exit status 0: survived. 1: a violation, described on stdout.
 *
 * Half of the workers die at a chosen crash point inside the store (mostly with its lock held), the other half by a kill -9 out of the blue. After every
 * death the coordinator gives back what the dead held and checks every invariant. Values follow from (id, attempt), so that any reader can tell whether a
 * block still holds what its entry says. Ids are numbered, and an object contains, or a task depends on, lower numbers only: no cycles, so that in the
 * end everything must go. The coordinator keeps some objects of its own all the time, whose bytes must never change.
 */
#define _GNU_SOURCE
#include "_store_core.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { KEYS = 400, MOST_REFS = 48, MOST_PINS = 8, GOLDEN = 12, CAPACITY = 2 << 20, ENTRIES = 4096 };
/* What a key is for. SHARED: made by all that want it, and found whole or not at all. */
enum { SMALL, BLOCK, LIST, TASK, LIFE, SHARED, KINDS };

#ifdef ZS_FAULTS
void zs_set_fault(int n);
extern int zs_fault;
#endif

typedef struct { uint32_t slot, key; } held;
typedef struct { uint32_t slot, key, attempt; zs_view view; } pinned;

static zs_store s;
static uint64_t random_state;
static held refs[MOST_REFS];
static pinned pins[MOST_PINS];
static int n_refs, n_pins;
static const char *role = "coordinator";
static uint64_t steps;

/* Pages of its own, outside the segment: what workers report. */
typedef struct { volatile int failed; char text[400]; volatile zs_proc procs[64]; volatile uint64_t counts[32]; } board;
static board *shared;

static void fail(const char *format, ...) {
    char text[300];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (!shared->failed) {
        snprintf(shared->text, sizeof shared->text, "%s %d, step %llu: %s", role, (int)getpid(), (unsigned long long)steps, text);
        shared->failed = 1;
    }
    if (strcmp(role, "coordinator") == 0) {
        printf("%s\n", shared->text);
        fflush(stdout);
        exit(1);
    }
    _exit(1);
}

#define MUST(condition, ...) do { if (!(condition)) fail(__VA_ARGS__); } while (0)

static uint64_t any(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state * 0x2545f4914f6cdd1dull;
}

static uint32_t below(uint32_t n) { return (uint32_t)((any() >> 32) * (uint64_t)n >> 32); }

static int kind_of(uint32_t key) { return (int)(key % KINDS); }

static void id_of(uint32_t key, uint8_t *id) {
    static const uint8_t parent[16] = "kill test parent";
    zs_derive_id(parent, key, id);
    memcpy(id + 12, &key, 4);
}

static uint32_t key_of(uint32_t slot) {
    uint8_t id[16], again[16];
    uint32_t key;
    if (zs_id_of(&s, slot, id) != ZS_OK) return ~0u;
    memcpy(&key, id + 12, 4);
    id_of(key, again);
    return memcmp(id, again, 16) == 0 ? key : ~0u;
}

static uint64_t word_of(uint32_t key, uint32_t attempt, uint64_t i) {
    uint64_t x = ((uint64_t)key << 40 ^ (uint64_t)attempt << 32 ^ i) * 0x9e3779b97f4a7c15ull;
    return x ^ x >> 31;
}

static void fill(uint8_t *data, uint64_t size, uint32_t key, uint32_t attempt) {
    uint64_t i = 0;
    for (; i + 8 <= size; i += 8) {
        uint64_t w = word_of(key, attempt, i);
        memcpy(data + i, &w, 8);
    }
    if (i < size) {
        uint64_t w = word_of(key, attempt, i);
        memcpy(data + i, &w, size - i);
    }
}

static int intact(const uint8_t *data, uint64_t size, uint32_t key, uint32_t attempt) {
    uint64_t i = 0;
    for (; i + 8 <= size; i += 8) {
        uint64_t w = word_of(key, attempt, i);
        if (memcmp(data + i, &w, 8)) return 0;
    }
    uint64_t w = word_of(key, attempt, i);
    return memcmp(data + i, &w, size - i) == 0;
}

static uint64_t size_for(uint32_t key) {
    switch (below(4)) {
    case 0: return below(40);
    case 1: return 1 + below(300);
    case 2: return 1 + below(9000);
    default: return key % 7 ? 1 + below(30000) : 1 + below(200000);
    }
}

/* -- what the process holds -- */

static void keep(uint32_t slot, uint32_t key) {
    MUST(key_of(slot) == key, "reference to %u leads to %u", key, key_of(slot));
    if (n_refs == MOST_REFS) {
        int i = (int)below(MOST_REFS);
        held old = refs[i];
        refs[i] = (held){slot, key};
        MUST(key_of(old.slot) == old.key, "entry of %u was reused for %u while referenced", old.key, key_of(old.slot));
        MUST(zs_release(&s, old.slot) == ZS_OK, "a reference to %u was lost", old.key);
        return;
    }
    refs[n_refs++] = (held){slot, key};
}

static held *any_ref(void) { return n_refs ? &refs[below((uint32_t)n_refs)] : NULL; }

static void drop(held *r) {
    held old = *r;
    *r = refs[--n_refs];
    MUST(key_of(old.slot) == old.key, "entry of %u was reused for %u while referenced", old.key, key_of(old.slot));
    MUST(zs_release(&s, old.slot) == ZS_OK, "a reference to %u was lost", old.key);
}

/* Slots of own references with keys below `key`. */
static uint32_t lower(uint32_t key, uint32_t *slots, uint32_t most) {
    uint32_t n = 0;
    for (int i = 0; i < n_refs && n < most; i++)
        if (refs[i].key < key && below(2)) slots[n++] = refs[i].slot;
    return n;
}

/* Room by spilling: values follow from their ids, so that "reading the file" is filling again. */
static void make_room(void) {
    for (int i = 0; i < 4; i++) {
        uint32_t slot;
        zs_view view;
        if (zs_spill_candidate(&s, 1, &slot, &view) != ZS_OK) return;
        uint32_t key = key_of(slot);
        MUST(view.kind & ZS_KIND_ERROR || intact(view.data, view.size, key, view.attempt), "value of %u is corrupt when spilled", key);
        if (below(8) == 0) MUST(zs_spill_abort(&s, slot) == ZS_OK, "giving up a candidate");
        else {
            int rc = zs_spilled(&s, slot);
            MUST(rc == ZS_OK || rc == ZS_PINNED, "spilling: %d", rc);
        }
    }
}

static int acceptable(int rc) {
    if (rc == ZS_FULL) make_room();
    return rc == ZS_FULL || rc == ZS_TOO_MANY;
}

/* -- operations -- */

static void op_put_small(uint32_t key, int life) {
    uint8_t id[16], data[ZS_INLINE_MAX];
    uint32_t slot, size = below(ZS_INLINE_MAX + 1);
    id_of(key, id);
    fill(data, size, key, 0);
    int rc = life ? zs_put_life(&s, id, data, size, 1, &slot) : zs_put_inline(&s, id, data, size, 0, 1, &slot);
    if (acceptable(rc)) return;
    MUST(rc == ZS_OK || rc == ZS_EXISTS, "put: %d", rc);
    keep(slot, key);
}

static void op_put(uint32_t key) {
    uint8_t id[16], *data;
    uint32_t slot, lists[40], n = kind_of(key) == LIST ? lower(key, lists, 40) : 0;
    uint64_t size = size_for(key);
    id_of(key, id);
    int rc = zs_create(&s, id, size, n + below(2), 1, &slot, &data);
    if (acceptable(rc)) return;
    MUST(rc == ZS_OK || rc == ZS_EXISTS, "create: %d", rc);
    if (rc == ZS_EXISTS) {
        keep(slot, key);
        return;
    }
    fill(data, size, key, 0);
    if (below(8) == 0) {
        MUST(zs_abort(&s, slot) == ZS_OK, "abort");
    } else {
        if (below(4) == 0) sched_yield();
        MUST(intact(data, size, key, 0), "an open block of %u was written by somebody else", key);
        rc = zs_seal(&s, slot, 0, 0, lists, n);
        MUST(rc == ZS_OK || rc == ZS_SEALED_TELL_BROKER, "seal: %d", rc);
    }
    keep(slot, key);
}

static void op_put_shared(uint32_t key) {
    uint8_t id[16], draft[16], *data;
    uint32_t slot, lists[40], n = lower(key, lists, 40);
    uint64_t size = size_for(key), random[2] = {any(), any()};
    id_of(key, id);
    memcpy(draft, random, sizeof draft);
    int rc = zs_create(&s, draft, size, n + below(2), 1, &slot, &data);
    if (acceptable(rc)) return;
    MUST(rc == ZS_OK, "create of a draft: %d", rc);
    fill(data, size, key, 0);
    if (below(4) == 0) sched_yield();
    uint32_t own = slot;
    rc = zs_seal_as(&s, &slot, id, 0, 0, lists, n);
    if (rc == ZS_TOO_MANY) {
        MUST(zs_abort(&s, slot) == ZS_OK && zs_release(&s, slot) == ZS_OK, "giving up a draft");
        return;
    }
    MUST(rc == ZS_OK || rc == ZS_SEALED_TELL_BROKER || (rc == ZS_EXISTS && slot != own), "seal_as: %d", rc);
    keep(slot, key);
    MUST(zs_state_of(&s, slot) == ZS_SEALED || zs_state_of(&s, slot) == ZS_SPILLED || zs_state_of(&s, slot) == ZS_PENDING, "%u is not whole", key);
}

static void op_reference(void) {
    uint32_t key = below(KEYS), slot;
    uint8_t id[16];
    id_of(key, id);
    int rc = zs_reference(&s, id, &slot);
    MUST(rc == ZS_OK || rc == ZS_NOT_FOUND || rc == ZS_TOO_MANY, "reference: %d", rc);
    if (rc != ZS_OK) return;
    keep(slot, key);
    MUST(kind_of(key) != SHARED || zs_state_of(&s, slot) != ZS_OPEN, "%u is found before it is whole", key);
}

static void op_expect(uint32_t key) {
    uint8_t id[16], spec[400];
    uint32_t slot, deps[40], n = lower(key, deps, 40), size = below(2) ? below(400) : 0;
    zs_proc target = below(2) ? shared->procs[below(8)] : 0;
    id_of(key, id);
    fill(spec, size, key, 1000);
    int rc = zs_expect(&s, id, target, 1, 0, deps, n, size ? spec : NULL, size, &slot);
    if (acceptable(rc) || rc == ZS_GONE) return;
    MUST(rc == ZS_OK || rc == ZS_EXISTS, "expect: %d", rc);
    keep(slot, key);
}

static void op_run(uint32_t key) {
    uint8_t id[16], *data;
    uint32_t slot, attempt = 0, lists[20];
    id_of(key, id);
    if (zs_reference(&s, id, &slot) != ZS_OK) return;
    keep(slot, key);
    attempt = zs_attempt_of(&s, slot);
    int rc = zs_claim(&s, id, attempt, &slot);
    MUST(rc == ZS_OK || rc == ZS_STALE, "claim: %d", rc);
    if (rc != ZS_OK) return;
    if (below(3) == 0) {
        uint8_t small[ZS_INLINE_MAX];
        uint32_t size = below(ZS_INLINE_MAX + 1);
        fill(small, size, key, attempt);
        rc = zs_seal_inline(&s, slot, attempt, small, size, 0, 0);
    } else {
        uint64_t size = size_for(key);
        uint32_t n = lower(key, lists, 20);
        rc = zs_open_result(&s, slot, attempt, size, n, &data);
        if (rc == ZS_FULL) make_room();
        if (rc == ZS_OK) {
            /* Slowly, so that others supersede it in between; the block must stay this writer's own whatever happens. */
            for (int pass = 0; pass < 3; pass++) {
                fill(data, size, key, attempt);
                if (below(3) == 0) usleep(below(300));
                MUST(intact(data, size, key, attempt), "the open block of %u (attempt %u) was given to somebody else", key, attempt);
            }
            if (below(10) == 0) {
                rc = zs_abort(&s, slot);
                MUST(rc == ZS_OK || rc == ZS_BAD_STATE, "abort of a result: %d", rc);
                return;
            }
            rc = zs_seal_result(&s, slot, attempt, 0, 0, lists, n);
            /* Superseded is the only excuse, and then the attempt has moved on. */
            if (rc == ZS_STALE) MUST(zs_attempt_of(&s, slot) != attempt || zs_state_of(&s, slot) != ZS_CLAIMED, "a valid claim on %u was refused", key);
        }
    }
    MUST(rc == ZS_OK || rc == ZS_STALE || rc == ZS_SEALED_TELL_BROKER || rc == ZS_FULL || rc == ZS_TOO_MANY, "sealing a result: %d", rc);
}

static void op_decide(held *r) {
    uint32_t attempt;
    uint8_t data[16], *room;
    int rc;
    if (!r || kind_of(r->key) != TASK) return;
    uint32_t before = zs_attempt_of(&s, r->slot);
    switch (below(5)) {
    case 0:
    case 1:
        rc = zs_retry(&s, r->slot, below(2) ? shared->procs[below(8)] : 0, &attempt);
        MUST(rc == ZS_OK || rc == ZS_BAD_STATE || rc == ZS_GONE || rc == ZS_TOO_MANY, "retry: %d", rc);
        if (rc == ZS_OK) MUST(attempt > before, "a retry did not raise the attempt of %u", r->key);
        break;
    case 2:
        fill(data, 16, r->key, 7777);
        rc = zs_seal_forced(&s, r->slot, data, 16, ZS_KIND_ERROR, ZS_FLAG_SYSTEM_ERROR);
        MUST(rc >= 0 || rc == ZS_BAD_STATE || rc == ZS_TOO_MANY, "forced seal: %d", rc);
        break;
    case 3:
        if (zs_take_over(&s, r->slot, &attempt) != ZS_OK) break;
        rc = zs_open_result(&s, r->slot, attempt, 500, 0, &room);
        if (rc != ZS_OK) break;
        fill(room, 500, r->key, attempt);
        rc = zs_seal_result(&s, r->slot, attempt, 0, 0, NULL, 0);
        MUST(rc >= 0 || rc == ZS_STALE, "sealing after a take-over: %d", rc);
        break;
    default: zs_retarget(&s, r->slot, shared->procs[below(8)]); break;
    }
}

static void op_spec(held *r) {
    uint8_t spec[400];
    uint32_t size = sizeof spec, attempt;
    if (!r || zs_spec(&s, r->slot, spec, &size, &attempt) != ZS_OK) return;
    MUST(intact(spec, size, r->key, 1000), "the spec of %u is corrupt", r->key);
}

static void check_value(const uint8_t *data, uint64_t size, uint8_t kind, uint32_t key, uint32_t attempt) {
    if (kind & ZS_KIND_ERROR) {
        MUST(size == 0 || (size == 16 && intact(data, 16, key, 7777)) , "the error of %u is corrupt", key);
        return;
    }
    MUST(intact(data, size, key, attempt), "value of %u (attempt %u, %llu bytes) is corrupt", key, attempt, (unsigned long long)size);
}

static void unpin(pinned *p) {
    pinned old = *p;
    *p = pins[--n_pins];
    check_value(old.view.data, old.view.size, old.view.kind, old.key, old.attempt);
    MUST(zs_unpin(&s, old.slot) == ZS_OK, "a pin of %u was lost", old.key);
}

static void op_pin(held *r) {
    zs_view view;
    if (!r) return;
    if (n_pins == MOST_PINS) unpin(&pins[below(MOST_PINS)]);
    int rc = zs_pin(&s, r->slot, &view);
    MUST(rc == ZS_OK || rc == ZS_BAD_STATE, "pin: %d", rc);
    if (rc == ZS_OK) {
        check_value(view.data, view.size, view.kind, r->key, view.attempt);
        pins[n_pins++] = (pinned){r->slot, r->key, view.attempt, view};
    } else if (view.state == ZS_SPILLED) {
        uint8_t *data;
        uint64_t size;
        rc = zs_restore(&s, r->slot, &data, &size);
        if (acceptable(rc)) return;
        MUST(rc == ZS_OK || rc == ZS_BAD_STATE, "restore: %d", rc);
        if (rc != ZS_OK) return;
        int good = below(5) != 0;
        if (view.kind & ZS_KIND_ERROR) fill(data, size, r->key, 7777);
        else fill(data, size, r->key, view.attempt);
        MUST(zs_restored(&s, r->slot, good) == ZS_OK, "restored");
    }
}

static void op_read(held *r) {
    uint8_t data[ZS_INLINE_MAX], kind, flags;
    uint32_t size, before;
    if (!r) return;
    MUST(key_of(r->slot) == r->key, "entry of %u was reused for %u while referenced", r->key, key_of(r->slot));
    before = zs_attempt_of(&s, r->slot);
    if (zs_read_inline(&s, r->slot, data, &size, &kind, &flags) != ZS_OK) return;
    MUST(size <= ZS_INLINE_MAX, "inline size %u", size);
    if (zs_attempt_of(&s, r->slot) == before) check_value(data, size, kind, r->key, before);
}

static void op_contained(held *r) {
    uint32_t slots[64];
    uint8_t ids[64 * 16], id[16];
    size_t n;
    if (!r || zs_reference_contained(&s, r->slot, slots, ids, 64, &n) != ZS_OK) return;
    for (size_t i = 0; i < n; i++) {
        uint32_t key = key_of(slots[i]);
        MUST(key < r->key, "%u contains %u", r->key, key);
        id_of(key, id);
        MUST(memcmp(id, ids + 16 * i, 16) == 0, "contained ids are wrong");
    }
    MUST(zs_release_many(&s, slots, n) == ZS_OK, "references to contained objects were lost");
}

static void op_discard(held *r) {
    uint8_t data[16];
    if (!r) return;
    fill(data, 16, r->key, 7777);
    int rc = zs_discard(&s, r->slot, data, 16, ZS_KIND_ERROR);
    MUST(rc == ZS_OK || rc == ZS_BAD_STATE || rc == ZS_PINNED, "discard: %d", rc);
}

static void op_wait(void) {
    uint32_t slots[MOST_REFS];
    size_t done, n = 0;
    for (int i = 0; i < n_refs; i++) slots[n++] = refs[i].slot;
    if (!n) return;
    int rc = zs_wait(&s, slots, n, 1 + below((uint32_t)n), below(500000), 0, &done);
    MUST(rc == ZS_OK || rc == ZS_TIMEOUT || rc == ZS_INTERRUPTED, "wait: %d", rc);
}

static void op_fork(void) {
    zs_proc embryo;
    int rc = zs_fork_prepare(&s, &embryo);
    if (rc == ZS_TOO_MANY) return;
    MUST(rc == ZS_OK, "fork_prepare: %d", rc);
    if (below(3) == 0) {
        MUST(zs_fork_abort(&s, embryo) == ZS_OK, "fork_abort");
        return;
    }
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        zs_crash_after(below(2) ? 1 + below(300) : 0);
        if (zs_fork_child(&s, embryo) != ZS_OK) _exit(0);
        while (n_pins) unpin(&pins[0]);
        for (int i = 0; i < 5; i++) op_read(any_ref());
        while (n_refs > 3) drop(&refs[0]);
        if (below(2)) zs_unregister(&s);
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status)) _exit(1);
    rc = zs_reap(&s, embryo);
    /* When the child died before it became the embryo, the record is still this process's and lives as long. */
    if (rc == ZS_BAD_STATE) rc = zs_fork_abort(&s, embryo);
    MUST(rc == ZS_OK || rc == ZS_NOT_FOUND, "reaping a forked child: %d", rc);
}

static void step(void) {
    uint32_t key = below(KEYS);
    steps++;
    if (shared->failed) _exit(1);
    switch (below(20)) {
    case 0: case 1: case 2: case 3:
        if (kind_of(key) == SMALL || kind_of(key) == LIFE) op_put_small(key, kind_of(key) == LIFE);
        else if (kind_of(key) == TASK) op_expect(key);
        else if (kind_of(key) == SHARED) op_put_shared(key);
        else op_put(key);
        break;
    case 4: op_expect(key / KINDS * KINDS + TASK); break;
    case 5: case 6: op_run(key / KINDS * KINDS + TASK); break;
    case 7: op_reference(); break;
    case 8: case 9: if (n_refs) drop(any_ref()); break;
    case 10: op_decide(any_ref()); break;
    case 11: op_spec(any_ref()); break;
    case 12: case 13: op_pin(any_ref()); break;
    case 14: if (n_pins) unpin(&pins[below((uint32_t)n_pins)]); break;
    case 15: op_read(any_ref()); break;
    case 16: op_contained(any_ref()); break;
    case 17: if (below(4) == 0) op_discard(any_ref()); else make_room(); break;
    case 18: if (below(8) == 0) op_wait(); else if (n_refs > 40) while (n_refs > 10) drop(&refs[0]); break;
    default:
        if (below(30) == 0) op_fork();
        else {
            uint8_t id[16];
            zs_next_zombie(&s, id);
            id_of(key, id);
            zs_watch_broker(&s, id);
        }
    }
}

static void work(int place, uint64_t seed, int fd, uint64_t crash) {
    role = "worker";
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    random_state = seed | 1;
    n_refs = n_pins = 0;
    zs_detach(&s);
    memset(&s, 0, sizeof s);
    MUST(zs_attach(&s, fd) == ZS_OK, "attach");
    zs_crash_after(crash);
    MUST(zs_register(&s, ZS_PROC_WORKER) == ZS_OK, "register");
    shared->procs[place] = s.self;
    for (;;) step();
}

/* -- the coordinator -- */

static void check(const char *when) {
    char text[300] = "";
    MUST(zs_check(&s, text, sizeof text) == ZS_OK, "%s: %s", when, text);
}

static void make_golden(void) {
    for (uint32_t i = 0; i < GOLDEN; i++) {
        uint8_t id[16], *data;
        uint32_t slot, key = KEYS + i;
        uint64_t size = i % 3 == 0 ? 20 : 100 + 700 * i;
        id_of(key, id);
        MUST(zs_create(&s, id, size, i > 0, 1, &slot, &data) == ZS_OK, "golden create");
        fill(data, size, key, 0);
        MUST(zs_seal(&s, slot, 0, 0, &refs[i > 0 ? i - 1 : 0].slot, i > 0) == ZS_OK, "golden seal");
        refs[n_refs++] = (held){slot, key};
        if (i % 2) {
            zs_view view;
            MUST(zs_pin(&s, slot, &view) == ZS_OK, "golden pin");
            pins[n_pins++] = (pinned){slot, key, 0, view};
        }
    }
}

static void check_golden(void) {
    for (int i = 0; i < n_pins; i++) check_value(pins[i].view.data, pins[i].view.size, 0, pins[i].key, 0);
    for (int i = 0; i < n_refs; i++) {
        zs_view view;
        MUST(key_of(refs[i].slot) == refs[i].key, "golden entry %d was lost", i);
        MUST(zs_describe(&s, refs[i].slot, &view) == ZS_OK && (view.state == ZS_SEALED || view.state == ZS_SPILLED), "golden state");
    }
}

/* Everything is dead: what remains must go when the last holders do. */
static void wind_up(void) {
    zs_statistics t;
    zs_entry e;
    uint32_t cursor = 0;
    zs_stats(&s, &t);
    for (int i = 0; i < 5000 && t.processes > 1; i++) {    /* a forked child may outlive its parent by a moment */
        if (zs_sweep(&s) == 0) usleep(1000);
        zs_stats(&s, &t);
    }
    check("after the last sweep");
    while (zs_walk(&s, &cursor, &e) == ZS_OK)
        if (e.state == ZS_PENDING || e.state == ZS_CLAIMED)
            MUST(zs_seal_forced(&s, cursor - 1, "end", 3, ZS_KIND_ERROR, 0) >= 0, "sealing what is left");
    while (n_pins) unpin(&pins[0]);
    while (n_refs) drop(&refs[0]);
    uint8_t id[16];
    while (zs_next_zombie(&s, id) == ZS_OK) {}
    check("at the end");
    zs_stats(&s, &t);
    MUST(t.entries == 0 && t.holds == 0 && t.used == 0 && t.free_bytes == 0 && t.pins == 0 && t.inline_bytes == 0,
         "left over: %llu entries, %llu holds, %llu bytes, %llu pins", (unsigned long long)t.entries, (unsigned long long)t.holds,
         (unsigned long long)t.used, (unsigned long long)t.pins);
    MUST(t.processes == 1, "%llu process records are left", (unsigned long long)t.processes);
    printf("repairs %llu, reaped %llu, puts %llu, seals %llu, stale seals %llu, deletes %llu, grows %llu\n", (unsigned long long)t.repairs,
           (unsigned long long)t.reaped, (unsigned long long)t.puts, (unsigned long long)t.seals, (unsigned long long)t.stale_seals,
           (unsigned long long)t.deletes, (unsigned long long)t.grows);
}

int main(int argc, char **argv) {
    long kills = 300, workers = 4, seed = 1;
    for (int i = 1; i + 1 < argc; i += 2) {
        long value = atol(argv[i + 1]);
        if (!strcmp(argv[i], "--kills")) kills = value;
        else if (!strcmp(argv[i], "--workers")) workers = value < 8 ? value : 8;
        else if (!strcmp(argv[i], "--seed")) seed = value;
#ifdef ZS_FAULTS
        else if (!strcmp(argv[i], "--fault")) zs_set_fault((int)value);
#endif
        else return 2;
    }
    random_state = (uint64_t)seed * 0x9e3779b97f4a7c15ull | 1;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int fd = memfd_create("kills", 0);
    MUST(zs_format(fd, CAPACITY, ENTRIES) == ZS_OK, "format");
    MUST(zs_attach(&s, fd) == ZS_OK && zs_register(&s, ZS_PROC_BROKER) == ZS_OK, "attach");
    make_golden();
    pid_t pids[8] = {0};
    int crashing[8] = {0};
    for (long killed = 0; killed < kills;) {
        int place = (int)below((uint32_t)workers);
        if (!pids[place]) {
            uint64_t own = any();
            crashing[place] = (int)below(2);
            uint64_t crash = crashing[place] ? 1 + below(below(2) ? 200 : 20000) : 0;
            fflush(stdout);
            pids[place] = fork();
            if (pids[place] == 0) work(place, own, fd, crash);
            continue;
        }
        int status = 0;
        if (!crashing[place]) {
            usleep(below(2000));
            kill(pids[place], SIGKILL);
        }
        pid_t gone;
        while ((gone = waitpid(pids[place], &status, crashing[place] ? WNOHANG : 0)) < 0 && errno == EINTR) {}
        if (gone == 0) {
            usleep(50);
            MUST(!shared->failed, "%s", shared->text);
            continue;
        }
        if (shared->failed || !WIFSIGNALED(status)) {
            printf("worker ended with status %x: %s\n", status, shared->text);
            return 1;
        }
        pids[place] = 0;
        killed++;
        zs_sweep(&s);
        check("after a kill");
        check_golden();
    }
    for (int i = 0; i < workers; i++)
        if (pids[i]) {
            kill(pids[i], SIGKILL);
            waitpid(pids[i], NULL, 0);
        }
    wind_up();
    printf("survived %ld kills\n", kills);
    return 0;
}
