/* The store's calls one by one: every outcome the header promises, in one process or a few. See kills.c for death at random.
 *
 * Usage: core [--fault N] [NAME ...]. Without names all tests run, each in a process and a segment of its own. Exit status: tests that failed.
 */
#define _GNU_SOURCE
#include "_store_core.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef ZS_FAULTS
void zs_set_fault(int n);
#endif

static zs_store s;
static int fd;

#define MUST(condition)                                                       \
    do {                                                                      \
        if (!(condition)) {                                                   \
            printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);            \
            fflush(stdout);                                                   \
            _exit(1);                                                         \
        }                                                                     \
    } while (0)
#define OK(call)                                                              \
    do {                                                                      \
        int rc_ = (call);                                                     \
        if (rc_ != ZS_OK) printf("%s:%d: %s gave %d\n", __FILE__, __LINE__, #call, rc_); \
        MUST(rc_ == ZS_OK);                                                   \
    } while (0)

static void check(void) {
    char text[300] = "";
    if (zs_check(&s, text, sizeof text) != ZS_OK) printf("check: %s\n", text);
    MUST(!text[0]);
}

static zs_statistics stats(void) {
    zs_statistics t;
    OK(zs_stats(&s, &t));
    return t;
}

static void make(uint64_t capacity, uint32_t entries) {
    fd = memfd_create("store", MFD_CLOEXEC);
    OK(zs_format(fd, capacity, entries));
    memset(&s, 0, sizeof s);
    OK(zs_attach(&s, fd));
    OK(zs_register(&s, ZS_PROC_TEST));
}

/* Nothing may be left when all has been released. */
static void must_be_empty(void) {
    check();
    zs_statistics t = stats();
    MUST(t.entries == 0 && t.holds == 0 && t.used == 0 && t.free_bytes == 0 && t.inline_bytes == 0 && t.pins == 0);
    MUST(t.largest_free == t.capacity);
}

static const uint8_t *id(uint32_t n) {
    static uint8_t ids[16][16];
    static int at;
    static const uint8_t parent[16] = "a parent";
    at = (at + 1) % 16;
    zs_derive_id(parent, n, ids[at]);
    return ids[at];
}

static uint32_t put(uint32_t n, uint64_t size) {
    uint32_t slot;
    uint8_t *data;
    OK(zs_create(&s, id(n), size, 0, 1, &slot, &data));
    memset(data, (int)n, size);
    OK(zs_seal(&s, slot, 0, 0, NULL, 0));
    return slot;
}

static uint32_t put_list(uint32_t n, uint64_t size, const uint32_t *slots, uint32_t count) {
    uint32_t slot;
    uint8_t *data;
    OK(zs_create(&s, id(n), size, count, 1, &slot, &data));
    memset(data, (int)n, size);
    OK(zs_seal(&s, slot, 0, 0, slots, count));
    return slot;
}

static uint32_t expect(uint32_t n, zs_proc target, const uint32_t *deps, uint32_t count) {
    uint32_t slot;
    OK(zs_expect(&s, id(n), target, 1, 0, deps, count, "spec", 4, &slot));
    return slot;
}

static uint32_t claim(uint32_t n, uint32_t attempt) {
    uint32_t slot;
    OK(zs_claim(&s, id(n), attempt, &slot));
    return slot;
}

/* Run `body` in a forked process that joins the segment, and return its handle once it has exited or been killed. */
static zs_proc in_child(void (*body)(void), int *status) {
    int pipes[2];
    zs_proc proc = 0;
    MUST(pipe(pipes) == 0);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);    /* a failed test leaves no process behind */
        zs_detach(&s);
        memset(&s, 0, sizeof s);
        OK(zs_attach(&s, fd));
        OK(zs_register(&s, ZS_PROC_TEST));
        MUST(write(pipes[1], &s.self, 4) == 4);
        body();
        _exit(0);
    }
    close(pipes[1]);
    MUST(read(pipes[0], &proc, 4) == 4);
    close(pipes[0]);
    int ended;
    MUST(waitpid(pid, &ended, 0) == pid);
    if (status) *status = ended;
    else MUST(ended == 0);
    return proc;
}

/* -- values -- */

static void test_derived_ids(void) {
    /* The same bytes as zray.ids.task_id(bytes(range(16)), 0x0102030405060708). */
    static const uint8_t expected[16] = {0xd7, 0xd6, 0x6d, 0xe3, 0x59, 0x85, 0xce, 0xcb, 0xaf, 0x4c, 0x5e, 0xd0, 0x00, 0x00, 0x00, 0x00};
    uint8_t parent[16], child[16];
    for (int i = 0; i < 16; i++) parent[i] = (uint8_t)i;
    zs_derive_id(parent, 0x0102030405060708ull, child);
    MUST(memcmp(child, expected, 16) == 0);
}

static void test_inline_value(void) {
    uint32_t slot, again, size;
    uint8_t data[ZS_INLINE_MAX], kind, flags, value[ZS_INLINE_MAX + 1];
    zs_view view;
    for (uint32_t i = 0; i <= ZS_INLINE_MAX; i++) value[i] = (uint8_t)(i * 7);
    MUST(zs_put_inline(&s, id(1), value, ZS_INLINE_MAX + 1, 3, 1, &slot) == ZS_BAD_ARGUMENT);
    for (uint32_t n = 0; n <= (uint32_t)ZS_INLINE_MAX; n++) {
        OK(zs_put_inline(&s, id(1), value, n, 3, 1, &slot));
        OK(zs_read_inline(&s, slot, data, &size, &kind, &flags));
        MUST(size == n && kind == 3 && flags == 0 && memcmp(data, value, n) == 0);
        OK(zs_pin(&s, slot, &view));
        MUST(view.size == n && memcmp(view.data, value, n) == 0 && view.state == ZS_SEALED);
        MUST(stats().inline_bytes == n && stats().used == 0);
        MUST(zs_put_inline(&s, id(1), "other", 5, 0, 1, &again) == ZS_EXISTS && again == slot);
        check();
        OK(zs_release(&s, slot));
        OK(zs_release(&s, slot));
        MUST(zs_release(&s, slot) == ZS_BAD_ARGUMENT);
        MUST(memcmp(view.data, value, n) == 0 && stats().entries == 1);    /* the pin holds it */
        OK(zs_unpin(&s, slot));
        MUST(zs_unpin(&s, slot) == ZS_BAD_ARGUMENT);
        MUST(zs_reference(&s, id(1), &slot) == ZS_NOT_FOUND);
    }
    must_be_empty();
}

static void test_block_value(void) {
    static const uint64_t sizes[] = {49, 63, 64, 65, 1000, 4096, 65536, 3000001};
    for (int i = 0; i < 8; i++) {
        uint32_t slot, size;
        uint8_t *data, small[ZS_INLINE_MAX], kind, flags;
        zs_view view;
        OK(zs_create(&s, id(2), sizes[i], 0, 9, &slot, &data));
        MUST((uintptr_t)data % 64 == 0);
        MUST(zs_pin(&s, slot, &view) == ZS_BAD_STATE && view.state == ZS_OPEN);
        memset(data, i + 1, sizes[i]);
        OK(zs_seal(&s, slot, 5, ZS_FLAG_FILE, NULL, 0));
        MUST(zs_seal(&s, slot, 5, 0, NULL, 0) == ZS_BAD_STATE);
        MUST(zs_read_inline(&s, slot, small, &size, &kind, &flags) == ZS_BAD_STATE);
        OK(zs_pin(&s, slot, &view));
        MUST(view.data == data && view.size == sizes[i] && view.kind == 5 && view.flags == ZS_FLAG_FILE);
        MUST(view.offset == (uint64_t)(view.data - s.base) && view.data[sizes[i] - 1] == i + 1);
        check();
        OK(zs_unpin(&s, slot));
        OK(zs_release(&s, slot));
    }
    must_be_empty();
}

static void test_open_objects(void) {
    uint32_t slot, other;
    uint8_t *data;
    zs_view view;
    OK(zs_create(&s, id(1), 5000, 0, 1, &slot, &data));
    MUST(zs_create(&s, id(1), 5000, 0, 1, &other, &data) == ZS_EXISTS && other == slot);
    OK(zs_release(&s, other));
    OK(zs_abort(&s, slot));
    check();
    OK(zs_describe(&s, slot, &view));    /* what remains is an empty system error */
    MUST(view.state == ZS_SEALED && view.size == 0 && view.kind == ZS_KIND_ERROR && view.flags == ZS_FLAG_SYSTEM_ERROR);
    MUST(zs_abort(&s, slot) == ZS_BAD_STATE && stats().used == 0);
    OK(zs_release(&s, slot));
    OK(zs_create(&s, id(2), 5000, 0, 1, &slot, &data));
    OK(zs_release(&s, slot));    /* its writer keeps it alive */
    OK(zs_seal(&s, slot, 0, 0, NULL, 0));
    must_be_empty();
    /* fewer contained slots than there is room for: the rest of the block is given back */
    OK(zs_create(&s, id(3), 100, 500, 1, &slot, &data));
    MUST(stats().used == (100 + 2000 + 63) / 64 * 64);
    OK(zs_seal(&s, slot, 0, 0, NULL, 0));
    MUST(stats().used == 128);
    check();
    OK(zs_release(&s, slot));
    must_be_empty();
}

/* Open a draft of what is to become object `n`. */
static uint32_t draft(uint32_t n, uint64_t size, uint32_t contained) {
    static uint8_t name[16];
    static uint32_t count;
    uint32_t slot;
    uint8_t *data;
    zs_derive_id((const uint8_t *)"drafts.........", count++, name);
    OK(zs_create(&s, name, size, contained, 1, &slot, &data));
    memset(data, (int)n, size);
    return slot;
}

static void test_shared_objects(void) {
    uint32_t slot, inner = put(9, 2000);
    zs_view view;
    for (uint32_t size = 20; size <= 5000; size += 4980) { /* in the entry, and in a block */
        uint32_t first = draft(1, size, 1), second = draft(1, size, 1), late = draft(1, size, 0);
        MUST(zs_reference(&s, id(1), &slot) == ZS_NOT_FOUND);
        OK(zs_seal_as(&s, &first, id(1), 4, 0, &inner, 1));
        check();
        OK(zs_reference(&s, id(1), &slot));
        MUST(slot == first);
        OK(zs_pin(&s, slot, &view));
        MUST(view.kind == 4 && view.size == size);
        for (uint32_t i = 0; i < size; i++) MUST(((const uint8_t *)view.data)[i] == 1);
        OK(zs_unpin(&s, slot));
        /* who comes later gets the first one, and what he wrote is gone */
        MUST(zs_seal_as(&s, &second, id(1), 4, 0, &inner, 1) == ZS_EXISTS && second == first);
        check();
        MUST(zs_references(&s, first) == 3 && zs_references(&s, inner) == 2);
        MUST(zs_seal_as(&s, &second, id(1), 4, 0, NULL, 0) == ZS_BAD_STATE);
        OK(zs_release(&s, first));
        OK(zs_release(&s, second));
        MUST(zs_references(&s, inner) == 2);
        OK(zs_release(&s, slot));
        MUST(zs_references(&s, inner) == 1 && zs_reference(&s, id(1), &slot) == ZS_NOT_FOUND);
        /* nobody holds it any more: the next one is the first again */
        OK(zs_seal_as(&s, &late, id(1), 0, 0, NULL, 0));
        OK(zs_release(&s, late));
        check();
    }
    uint32_t lost = draft(1, 100, 0);
    OK(zs_abort(&s, lost));
    MUST(zs_seal_as(&s, &lost, id(1), 0, 0, NULL, 0) == ZS_BAD_STATE && zs_reference(&s, id(1), &slot) == ZS_NOT_FOUND);
    OK(zs_release(&s, lost));
    OK(zs_release(&s, inner));
    must_be_empty();
}

static void test_contained(void) {
    enum { N = 3000 };
    static uint32_t slots[N], found[N];
    static uint8_t ids[N][16];
    size_t n;
    for (uint32_t i = 0; i < N; i++) slots[i] = put(i + 10, i % 100);
    uint32_t box = put_list(1, 77, slots, N);
    uint32_t small = put_list(2, 3, slots, 5), odd = put_list(3, 41, slots, 1);    /* lists kept inline */
    OK(zs_release_many(&s, slots, N));
    check();
    MUST(stats().entries == N + 3);
    OK(zs_reference_contained(&s, box, found, ids[0], N, &n));
    MUST(n == N && memcmp(found, slots, sizeof slots) == 0);
    for (uint32_t i = 0; i < N; i++) MUST(memcmp(ids[i], id(i + 10), 16) == 0);
    OK(zs_release_many(&s, found, N));
    OK(zs_reference_contained(&s, box, found, NULL, 7, &n));
    MUST(n == 7);
    OK(zs_release_many(&s, found, 7));
    OK(zs_release(&s, box));
    check();
    MUST(stats().entries == 7);    /* five in `small`, of which one also in `odd` */
    OK(zs_release(&s, small));
    MUST(stats().entries == 2);
    OK(zs_release(&s, odd));
    must_be_empty();
}

static void test_long_chain(void) {
    /* Each contains the one before: the release of the last frees all, iteratively. */
    uint32_t before = put(1, 10);
    for (uint32_t i = 2; i < 20000; i++) {
        uint32_t next = put_list(i, 4, &before, 1);
        OK(zs_release(&s, before));
        before = next;
    }
    MUST(stats().entries == 19999);
    check();
    OK(zs_release(&s, before));
    must_be_empty();
}

/* -- room -- */

static void test_allocator(void) {
    enum { N = 600 };
    uint32_t slots[N] = {0}, random = 12345;
    for (int round = 0; round < 20000; round++) {
        random = random * 1664525u + 1013904223u;
        uint32_t i = (random >> 8) % N;
        if (slots[i]) {
            OK(zs_release(&s, slots[i]));
            slots[i] = 0;
        } else {
            uint32_t size = 50 + (random >> 4) % ((random & 15) == 0 ? 60000u : 2000u);
            uint8_t *data;
            int rc = zs_create(&s, id(i), size, 0, 1, &slots[i], &data);
            if (rc == ZS_FULL) slots[i] = 0;
            else {
                OK(rc);
                data[0] = data[size - 1] = (uint8_t)i;
                OK(zs_seal(&s, slots[i], 0, 0, NULL, 0));
            }
        }
        if (round % 1000 == 0) check();
    }
    for (int i = 0; i < N; i++) {
        zs_view view;
        if (!slots[i]) continue;
        OK(zs_pin(&s, slots[i], &view));
        MUST(view.data[0] == (uint8_t)i && view.data[view.size - 1] == (uint8_t)i);
        OK(zs_unpin(&s, slots[i]));
        OK(zs_release(&s, slots[i]));
        if (i % 50 == 0) check();
    }
    must_be_empty();
}

static void test_last_freed_first_used(void) {
    uint32_t fence[4], slot;
    zs_view view;
    uint64_t where[3];
    for (uint32_t i = 0; i < 3; i++) {
        slot = put(i, 100000);
        fence[i] = put(100 + i, 64);
        OK(zs_describe(&s, slot, &view));
        where[i] = view.offset;
        OK(zs_release(&s, slot));
        uint32_t again = put(50 + i, 100000);
        OK(zs_describe(&s, again, &view));
        MUST(view.offset == where[i]);
        fence[3] = again;
        (void)fence;
    }
    uint64_t high = stats().high_water;
    for (uint32_t i = 0; i < 20000; i++) OK(zs_release(&s, put(1000, 3000)));
    MUST(stats().high_water <= high + 3072 && stats().grows < 100);
    check();
}

static void test_full(void) {
    uint32_t slots[64], n = 0, slot;
    uint8_t *data;
    MUST(zs_create(&s, id(1), s.mapped, 0, 1, &slot, &data) == ZS_TOO_LARGE);
    for (; n < 64; n++) {
        int rc = zs_create(&s, id(n + 10), 1 << 20, 0, 1, &slots[n], &data);
        if (rc == ZS_FULL) break;
        OK(rc);
        memset(data, 1, 1 << 20);
        OK(zs_seal(&s, slots[n], 0, 0, NULL, 0));
    }
    MUST(n == 8);
    check();
    MUST(zs_expect(&s, id(5), 0, 1, 0, NULL, 0, s.base, 500, &slot) == ZS_OK || stats().largest_free < 512);
    MUST(zs_reference(&s, id(10 + n), &slot) == ZS_NOT_FOUND);    /* the refused one left nothing */
}

static void test_whole_capacity(void) {
    uint32_t slot;
    zs_statistics t = stats();
    slot = put(1, t.capacity);
    t = stats();
    MUST(t.used == t.capacity && t.largest_free == 0 && t.committed == t.capacity);
    check();
    OK(zs_release(&s, slot));
    must_be_empty();
}

static void test_pages_are_real(void) {
    struct stat st;
    put(1, 5 << 20);
    put(2, 100000);
    OK(fstat(fd, &st));
    MUST((uint64_t)st.st_blocks * 512 >= stats().committed);
    MUST(stats().committed >= (5u << 20) + 100000);
    uint64_t before = stats().committed;
    OK(zs_touch_ahead(&s, 4 << 20));
    while (zs_touch_ahead(&s, 4 << 20) == ZS_OK) {}
    MUST(zs_touch_ahead(&s, 4 << 20) == ZS_LAST && stats().committed > before);
    MUST(stats().committed <= stats().high_water + (6 << 20));
    OK(fstat(fd, &st));
    MUST((uint64_t)st.st_blocks * 512 >= stats().committed);
    check();
}

/* The build hands the store's fallocate to this one (--wrap): a system without pages, or without the call. */
static int refused_with, refusals;
int __real_fallocate(int file, int mode, off_t offset, off_t length);
int __wrap_fallocate(int file, int mode, off_t offset, off_t length);

int __wrap_fallocate(int file, int mode, off_t offset, off_t length) {
    if (!refused_with || (refused_with == EINTR && length <= 500000)) return __real_fallocate(file, mode, offset, length);
    refusals++;
    errno = refused_with;
    return -1;
}

static void test_no_memory(void) {
    uint32_t slot, kept = put(1, 1000);
    uint8_t *data;
    refused_with = ENOSPC;
    MUST(zs_create(&s, id(2), 7 << 20, 0, 1, &slot, &data) == ZS_NO_MEMORY && refusals == 1);
    MUST(zs_touch_ahead(&s, 7 << 20) == ZS_NO_MEMORY);
    check();
    MUST(zs_reference(&s, id(2), &slot) == ZS_NOT_FOUND);
    OK(zs_release(&s, put(3, 1000)));    /* the store goes on */
    refused_with = EBADF;
    MUST(zs_create(&s, id(2), 7 << 20, 0, 1, &slot, &data) == ZS_SYSTEM && errno == EBADF);
    refused_with = 0;
    OK(zs_release(&s, put(2, 7 << 20)));
    OK(zs_release(&s, kept));
    must_be_empty();
}

static void test_interrupted_growth(void) {
    refused_with = EINTR;    /* signals come so often that only small pieces are ever finished */
    OK(zs_release(&s, put(1, 5 << 20)));
    MUST(refusals);
    must_be_empty();
}

static void test_without_fallocate(void) {
    struct stat st;
    refused_with = EOPNOTSUPP;
    uint32_t slot = put(1, 5 << 20);
    MUST(refusals);
    OK(fstat(fd, &st));
    MUST((uint64_t)st.st_blocks * 512 >= stats().committed);
    check();
    OK(zs_release(&s, slot));
    must_be_empty();
}

static void test_many_entries(void) {
    enum { N = 50000 };
    static uint32_t slots[N];
    uint32_t slot, n;
    for (n = 0; n < N; n++) {
        int rc = zs_put_inline(&s, id(n), &n, 4, 0, 1, &slots[n]);
        if (rc == ZS_TOO_MANY) break;
        OK(rc);
    }
    MUST(n == 40000);    /* the limit given to zs_format */
    check();
    for (uint32_t i = 0; i < n; i++) {
        OK(zs_reference(&s, id(i), &slot));
        MUST(slot == slots[i]);
        OK(zs_release(&s, slot));
    }
    OK(zs_release_many(&s, slots, n));
    must_be_empty();
    OK(zs_put_inline(&s, id(1), "x", 1, 0, 1, &slot));
}

static void test_put_and_drop(void) {
    uint32_t slot;
    for (uint32_t i = 0; i < 2000; i++) OK(zs_release(&s, put(i, i % 500)));
    zs_statistics before = stats();
    for (uint32_t i = 0; i < 100000; i++) {
        OK(zs_put_inline(&s, id(i), "x", 1, 0, 1, &slot));
        OK(zs_release(&s, slot));
        if (i % 4 == 0) OK(zs_release(&s, put(i, i % 500)));
    }
    zs_statistics after = stats();
    MUST(after.committed == before.committed && after.grows == before.grows && after.high_water == before.high_water);
    must_be_empty();
}

static void test_spilling(void) {
    uint32_t inner = put(1, 200), slot, a = put_list(2, 10000, &inner, 1), b = put(3, 5000), c, pinned = put(4, 9000);
    uint8_t *data;
    uint64_t size;
    zs_view view;
    uint32_t many[200];
    for (int i = 0; i < 200; i++) many[i] = inner;
    c = put_list(5, 100, many, 200);
    OK(zs_release(&s, inner));
    OK(zs_pin(&s, pinned, &view));
    OK(zs_pin(&s, b, &view));    /* used most recently */
    OK(zs_unpin(&s, b));
    uint32_t order[] = {inner, a, c, b};
    for (int i = 0; i < 4; i++) {
        OK(zs_spill_candidate(&s, 1, &slot, &view));
        MUST(slot == order[i] && view.data && view.size);
        OK(zs_spilled(&s, slot));
        check();
    }
    MUST(zs_spill_candidate(&s, 1, &slot, &view) == ZS_LAST);
    MUST(zs_pin(&s, a, &view) == ZS_BAD_STATE && view.state == ZS_SPILLED && view.size == 10000);
    MUST(stats().spilled == 4);
    OK(zs_restore(&s, a, &data, &size));
    MUST(size == 10000 && zs_restore(&s, a, &data, &size) == ZS_BAD_STATE);
    OK(zs_restored(&s, a, 0));
    OK(zs_restore(&s, a, &data, &size));
    memset(data, 42, size);
    OK(zs_restored(&s, a, 1));
    OK(zs_restore(&s, c, &data, &size));
    memset(data, 43, size);
    OK(zs_restored(&s, c, 1));
    check();
    OK(zs_pin(&s, a, &view));
    MUST(view.size == 10000 && view.data[9999] == 42);
    OK(zs_unpin(&s, a));
    size_t n;
    OK(zs_reference_contained(&s, c, many, NULL, 200, &n));
    MUST(n == 200 && many[0] == inner && many[199] == inner);
    OK(zs_release_many(&s, many, 200));
    /* a reader keeps a candidate in memory */
    OK(zs_spill_candidate(&s, 5000, &slot, &view));
    OK(zs_pin(&s, slot, &view));
    MUST(zs_spilled(&s, slot) == ZS_PINNED);
    OK(zs_pin(&s, slot, &view));
    OK(zs_unpin(&s, slot));
    OK(zs_unpin(&s, slot));
    OK(zs_spill_candidate(&s, 5000, &slot, &view));
    OK(zs_spill_abort(&s, slot));
    check();
    OK(zs_unpin(&s, pinned));
    OK(zs_release(&s, pinned));
    OK(zs_release(&s, a));
    OK(zs_release(&s, b));
    OK(zs_release(&s, c));
    must_be_empty();
}

static void test_discard(void) {
    uint32_t inner = put(1, 100), slot = put_list(2, 5000, &inner, 1), size;
    uint8_t data[ZS_INLINE_MAX], kind, flags;
    zs_view view;
    OK(zs_release(&s, inner));
    OK(zs_pin(&s, slot, &view));
    MUST(zs_discard(&s, slot, "gone", 4, ZS_KIND_ERROR) == ZS_PINNED);
    OK(zs_unpin(&s, slot));
    OK(zs_discard(&s, slot, "gone", 4, ZS_KIND_ERROR));
    OK(zs_read_inline(&s, slot, data, &size, &kind, &flags));
    MUST(size == 4 && memcmp(data, "gone", 4) == 0 && kind == ZS_KIND_ERROR && stats().used == 0 && stats().entries == 1);
    check();
    OK(zs_release(&s, slot));
    must_be_empty();
}

/* -- tasks -- */

static void test_task(void) {
    uint32_t arg = put(1, 300), slot = expect(2, s.self, &arg, 1), got, size = 64, attempt;
    uint8_t data[64], kind, flags;
    MUST(zs_expected(&s, s.self) == 1);
    OK(zs_release(&s, arg));
    MUST(stats().entries == 2 && stats().pending == 1);
    OK(zs_spec(&s, slot, data, &size, &attempt));
    MUST(size == 4 && memcmp(data, "spec", 4) == 0 && attempt == 0);
    size = 3;
    MUST(zs_spec(&s, slot, data, &size, &attempt) == ZS_TOO_LARGE && size == 4);
    MUST(zs_claim(&s, id(2), 1, &got) == ZS_STALE && zs_claim(&s, id(9), 0, &got) == ZS_NOT_FOUND);
    MUST(zs_seal_inline(&s, slot, 0, "x", 1, 0, 0) == ZS_STALE);    /* nobody has claimed it */
    MUST(claim(2, 0) == slot && zs_claim(&s, id(2), 0, &got) == ZS_STALE);
    MUST(zs_seal_inline(&s, slot, 1, "x", 1, 0, 0) == ZS_STALE);
    check();
    OK(zs_seal_inline(&s, slot, 0, "result", 6, 2, 0));
    check();
    MUST(stats().entries == 1 && zs_expected(&s, s.self) == 0);    /* the argument went */
    MUST(zs_seal_inline(&s, slot, 0, "x", 1, 0, 0) == ZS_STALE && zs_state_of(&s, slot) == ZS_SEALED);
    OK(zs_read_inline(&s, slot, data, &size, &kind, &flags));
    MUST(size == 6 && kind == 2 && memcmp(data, "result", 6) == 0);
    MUST(zs_spec(&s, slot, data, &size, &attempt) == ZS_NOT_FOUND);
    uint32_t again;
    MUST(zs_expect(&s, id(2), 0, 1, 0, NULL, 0, NULL, 0, &again) == ZS_EXISTS && again == slot);
    OK(zs_release(&s, again));
    OK(zs_release(&s, slot));
    must_be_empty();
}

static void test_large_result(void) {
    uint32_t inner = put(1, 100), slot = expect(2, 0, NULL, 0);
    uint8_t *data;
    zs_view view;
    MUST(zs_open_result(&s, slot, 0, 1000, 1, &data) == ZS_STALE);
    claim(2, 0);
    OK(zs_open_result(&s, slot, 0, 500, 0, &data));
    OK(zs_open_result(&s, slot, 0, 70000, 2, &data));    /* a second try replaces the first */
    memset(data, 9, 70000);
    check();
    OK(zs_seal_result(&s, slot, 0, 1, 0, &inner, 1));
    OK(zs_release(&s, inner));
    check();
    OK(zs_pin(&s, slot, &view));
    MUST(view.size == 70000 && view.data[69999] == 9 && stats().entries == 2);
    OK(zs_unpin(&s, slot));
    OK(zs_release(&s, slot));
    slot = expect(3, 0, NULL, 0);
    claim(3, 0);
    OK(zs_open_result(&s, slot, 0, 0, 0, &data));
    OK(zs_seal_result(&s, slot, 0, 1, 0, NULL, 0));
    OK(zs_describe(&s, slot, &view));
    MUST(view.size == 0);
    OK(zs_release(&s, slot));
    slot = expect(4, 0, NULL, 0);
    claim(4, 0);
    OK(zs_open_result(&s, slot, 0, 1000, 0, &data));
    OK(zs_abort(&s, slot));
    MUST(zs_state_of(&s, slot) == ZS_CLAIMED && stats().used == 0);
    OK(zs_seal_inline(&s, slot, 0, "", 0, 0, 0));
    OK(zs_release(&s, slot));
    must_be_empty();
}

static void test_many_results(void) {
    uint32_t slots[3], got[3];
    uint8_t ids[3][16];
    for (uint32_t i = 0; i < 3; i++) {
        slots[i] = expect(i, 0, NULL, 0);
        memcpy(ids[i], id(i), 16);
    }
    claim(1, 0);
    MUST(zs_claim_many(&s, ids[0], 3, 0, got) == ZS_STALE);
    MUST(zs_state_of(&s, slots[0]) == ZS_PENDING && zs_state_of(&s, slots[2]) == ZS_PENDING);    /* none */
    uint32_t attempt;
    for (uint32_t i = 0; i < 3; i++) OK(zs_retry(&s, slots[i], 0, &attempt));
    OK(zs_claim_many(&s, ids[0], 3, 1, got));
    MUST(memcmp(got, slots, sizeof got) == 0);
    for (uint32_t i = 0; i < 3; i++) {
        OK(zs_seal_inline(&s, slots[i], 1, "r", 1, 0, 0));
        OK(zs_release(&s, slots[i]));
    }
    must_be_empty();
}

static void test_what_is_elsewhere_is_not_made_again(void) {
    uint32_t slots[2], got[2];
    uint8_t ids[2][16], gone[16];
    int wanted;
    for (uint32_t i = 0; i < 2; i++) {
        slots[i] = expect(i, 0, NULL, 0);
        memcpy(ids[i], id(i), 16);
    }
    OK(zs_elsewhere(&s, slots[0], 1, &wanted));
    MUST(zs_claim(&s, ids[0], 0, got) == ZS_STALE);
    OK(zs_claim_many(&s, ids[0], 2, 0, got));
    MUST(zs_state_of(&s, slots[0]) == ZS_PENDING && zs_seal_inline(&s, slots[0], 0, "r", 1, 0, 0) == ZS_STALE);
    OK(zs_seal_inline(&s, slots[1], 0, "r", 1, 0, 0));
    uint32_t attempt;
    OK(zs_retry(&s, slots[0], 0, &attempt));    /* it is lost */
    OK(zs_claim(&s, ids[0], attempt, got));
    OK(zs_seal_inline(&s, slots[0], attempt, "r", 1, 0, 0));
    for (uint32_t i = 0; i < 2; i++) OK(zs_release(&s, slots[i]));
    while (zs_next_zombie(&s, gone) == ZS_OK) {}
    must_be_empty();
}

static zs_proc former;

static void body_nothing(void) {}

static void body_claim_and_open(void) {
    uint8_t *data;
    OK(zs_open_result(&s, claim(1, 0), 0, 4000, 0, &data));
    zs_word_set(&s, s.self, 0, 1);
}

static void body_expect_three(void) {
    expect(1, 0, NULL, 0);
    expect(2, 0, NULL, 0);
    expect(3, 0, NULL, 0);
    claim(2, 0);
}

static void test_made_by_the_dead(void) {
    uint32_t cursor = 0, slot, found, n = 0, attempt;
    expect(4, 0, NULL, 0);
    zs_proc dead = in_child(body_expect_three, NULL);
    MUST(zs_sweep(&s) == 1);
    for (; zs_next_made(&s, dead, &cursor, &slot) == ZS_OK; n++) {
        OK(zs_reference(&s, id(n ? 3 : 1), &found));    /* 2 is claimed: its call has been received */
        MUST(found == slot);
    }
    MUST(n == 2);
    OK(zs_retry(&s, slot, 0, &attempt));    /* now somebody sees to it */
    cursor = n = 0;
    while (zs_next_made(&s, dead, &cursor, &slot) == ZS_OK) n++;
    MUST(n == 1);
    check();
}

static void test_what_was_sent_is_not_begun_here(void) {
    uint32_t slot = expect(1, 0, NULL, 0), second = expect(2, 0, NULL, 0), attempt, got[2];
    uint8_t ids[2][16];
    memcpy(ids[0], id(1), 16);
    memcpy(ids[1], id(2), 16);
    OK(zs_send_away(&s, slot));
    MUST(zs_send_away(&s, slot) == ZS_BAD_STATE);    /* to one node only */
    MUST(zs_claim(&s, id(1), 0, got) == ZS_STALE && zs_claim_many(&s, ids[0], 2, 0, got) == ZS_STALE);
    MUST(zs_marks(&s, slot) == ZS_MARK_SENT && zs_state_of(&s, slot) == ZS_PENDING);
    OK(zs_retry(&s, slot, 0, &attempt));
    MUST(zs_claim(&s, id(1), 0, got) == ZS_STALE);
    OK(zs_claim_many(&s, ids[0], 1, attempt, got));
    MUST(zs_send_away(&s, slot) == ZS_BAD_STATE);    /* it has begun */
    OK(zs_seal_inline(&s, slot, attempt, "here", 4, 0, 0));
    MUST(zs_send_away(&s, slot) == ZS_BAD_STATE);
    OK(zs_send_away(&s, second));
    OK(zs_seal_forced(&s, second, "from there", 10, 0, 0));
    MUST(zs_marks(&s, second) == 0);
    OK(zs_release(&s, slot));
    OK(zs_release(&s, second));
    must_be_empty();
}

static void test_retry(void) {
    uint32_t arg = put(9, 100), slot = expect(1, 0, &arg, 1), attempt, got, n = 0, cursor = 0, size = 16;
    uint8_t *data, spec[16];
    zs_proc dead = in_child(body_claim_and_open, NULL);
    OK(zs_release(&s, arg));
    MUST(zs_next_orphan(&s, dead, &cursor, &got) == ZS_OK && got == slot);
    MUST(zs_next_orphan(&s, dead, &cursor, &got) == ZS_LAST);
    MUST(stats().used > 4000);
    MUST(zs_expect(&s, id(2), dead, 1, 0, NULL, 0, NULL, 0, &got) == ZS_OK);    /* gone but not reaped */
    MUST(zs_sweep(&s) == 1);
    check();
    MUST(stats().used == 128);    /* argument alone */
    for (cursor = 0; zs_next_orphan(&s, dead, &cursor, &got) == ZS_OK;) n++;
    MUST(n == 2);
    uint32_t other;
    MUST(zs_expect(&s, id(3), dead, 1, 0, NULL, 0, NULL, 0, &other) == ZS_GONE);
    MUST(zs_retarget(&s, got, dead) == ZS_GONE && zs_retry(&s, got, dead, &attempt) == ZS_GONE);
    OK(zs_retarget(&s, got, s.self));
    MUST(zs_expected(&s, s.self) == 1);
    OK(zs_retry(&s, slot, s.self, &attempt));
    MUST(attempt == 1 && zs_expected(&s, s.self) == 2 && zs_attempt_of(&s, slot) == 1);
    OK(zs_spec(&s, slot, spec, &size, &attempt));    /* spec and arguments survive */
    MUST(stats().entries == 3 && size == 4);
    check();
    MUST(zs_claim(&s, id(1), 0, &other) == ZS_STALE);
    claim(1, 1);
    OK(zs_open_result(&s, slot, 1, 4000, 0, &data));
    memset(data, 1, 4000);
    OK(zs_seal_result(&s, slot, 1, ZS_KIND_ERROR, ZS_FLAG_SYSTEM_ERROR, NULL, 0));
    MUST(stats().entries == 2);
    OK(zs_retry(&s, slot, 0, &attempt));    /* a system error may be taken back */
    MUST(attempt == 2 && zs_state_of(&s, slot) == ZS_PENDING && stats().used == 0);
    check();
    claim(1, 2);
    OK(zs_seal_inline(&s, slot, 2, "v", 1, 0, 0));
    MUST(zs_retry(&s, slot, 0, &attempt) == ZS_BAD_STATE);    /* a value may not */
    OK(zs_release(&s, slot));
    MUST(zs_seal_forced(&s, got, "e", 1, ZS_KIND_ERROR, 0) == ZS_OK);
    MUST(zs_seal_forced(&s, got, "e", 1, ZS_KIND_ERROR, 0) == ZS_BAD_STATE);
    OK(zs_release(&s, got));
    must_be_empty();
}

/* The zombie writer: superseded while it fills its block, it may go on writing without harm, and its seal is refused. */
static void body_superseded(void) {
    uint8_t *data;
    uint32_t slot = claim(1, 0);
    OK(zs_open_result(&s, slot, 0, 8000, 0, &data));
    zs_global_add(&s, 0, 1);
    while (zs_global_get(&s, 1) == 0) sched_yield();
    memset(data, 0xee, 8000);
    for (int i = 0; i < 8000; i++) MUST(data[i] == 0xee);
    MUST(zs_seal_result(&s, slot, 0, 0, 0, NULL, 0) == ZS_STALE);
}

static void *supersede(void *slot) {
    uint32_t attempt, first, mine;
    uint8_t *data, *former;
    while (zs_global_get(&s, 0) == 0) sched_yield();
    OK(zs_retry(&s, *(uint32_t *)slot, 0, &first));
    mine = claim(1, first);
    OK(zs_open_result(&s, mine, first, 8000, 0, &former));
    memset(former, 0x11, 8000);
    OK(zs_take_over(&s, mine, &attempt));    /* from oneself: another thread may be writing that block */
    OK(zs_open_result(&s, mine, attempt, 8000, 0, &data));
    memset(data, 0x22, 8000);
    memset(former, 0x33, 8000);
    OK(zs_seal_result(&s, mine, attempt, 0, 0, NULL, 0));
    MUST(zs_seal_result(&s, mine, first, 0, 0, NULL, 0) == ZS_STALE);
    MUST(stats().used == 3 * 8000);
    OK(zs_abort_result(&s, mine, first));
    MUST(zs_abort_result(&s, mine, first) == ZS_BAD_STATE);
    MUST(stats().used == 2 * 8000);
    check();
    zs_global_add(&s, 1, 1);
    return NULL;
}

static void test_superseded_writer(void) {
    pthread_t thread;
    zs_view view;
    uint32_t slot = expect(1, 0, NULL, 0);
    OK(pthread_create(&thread, NULL, supersede, &slot));
    zs_proc writer = in_child(body_superseded, NULL);
    OK(pthread_join(thread, NULL));
    check();
    OK(zs_pin(&s, slot, &view));
    for (int i = 0; i < 8000; i++) MUST(view.data[i] == 0x22);
    MUST(stats().stale_seals == 2 && stats().used == 8000);
    OK(zs_unpin(&s, slot));
    OK(zs_release(&s, slot));
    OK(zs_reap(&s, writer));
    must_be_empty();
}

/* Release the last reference to what was elsewhere: that is to be told of. */
static void release_copy(uint32_t slot) {
    uint8_t gone[16];
    OK(zs_release(&s, slot));
    OK(zs_next_zombie(&s, gone));
    check();
}

/* Values that come from other nodes, while what they are copies of may be made anew here. */
static void test_copies(void) {
    uint8_t *data, *next;
    uint32_t attempt, later, next_attempt;
    int wanted;
    zs_view view;
    uint32_t r = expect(1, 0, NULL, 0);
    MUST(zs_take_copy(&s, r, &attempt) == ZS_BAD_STATE);    /* it is made here */
    OK(zs_elsewhere(&s, r, 0, &wanted));
    MUST(zs_take_copy(&s, r, &attempt) == ZS_BAD_STATE);    /* it is made elsewhere, and does not exist */
    OK(zs_elsewhere(&s, r, 1, &wanted));
    OK(zs_take_copy(&s, r, &attempt));
    OK(zs_open_result(&s, r, attempt, 8000, 0, &data));
    MUST(zs_marks(&s, r) & ZS_MARK_ELSEWHERE);
    /* Lost there, and made anew by a run here, when the transfer begins once more: the run goes on. */
    OK(zs_retry(&s, r, 0, &later));
    MUST(zs_open_result(&s, r, attempt, 8000, 0, &data) == ZS_STALE);
    MUST(zs_take_copy(&s, r, &next_attempt) == ZS_BAD_STATE);
    OK(zs_abort_result(&s, r, attempt));
    claim(1, later);
    OK(zs_open_result(&s, r, later, 8000, 0, &data));
    MUST(zs_take_copy(&s, r, &attempt) == ZS_BAD_STATE);
    memset(data, 7, 8000);
    OK(zs_seal_result(&s, r, later, 0, 0, NULL, 0));
    MUST(zs_take_copy(&s, r, &attempt) == ZS_BAD_STATE);
    release_copy(r);
    /* Two transfers of one value in turn: who drops the first late does not take the block of the second. */
    r = expect(2, 0, NULL, 0);
    OK(zs_elsewhere(&s, r, 1, &wanted));
    OK(zs_take_copy(&s, r, &attempt));
    OK(zs_open_result(&s, r, attempt, 8000, 0, &data));
    OK(zs_take_copy(&s, r, &later));
    OK(zs_open_result(&s, r, later, 8000, 0, &next));
    memset(next, 8, 8000);
    memset(data, 9, 8000);
    OK(zs_abort_result(&s, r, attempt));
    MUST(zs_abort_result(&s, r, attempt) == ZS_STALE);
    OK(zs_seal_result(&s, r, later, 0, 0, NULL, 0));
    MUST(zs_abort_result(&s, r, later) == ZS_BAD_STATE);
    OK(zs_pin(&s, r, &view));
    MUST(view.size == 8000 && view.data[7999] == 8);
    OK(zs_unpin(&s, r));
    release_copy(r);
    /* One that is dropped leaves the value to be got by the next. */
    r = expect(3, 0, NULL, 0);
    OK(zs_elsewhere(&s, r, 1, &wanted));
    OK(zs_take_copy(&s, r, &attempt));
    OK(zs_open_result(&s, r, attempt, 8000, 0, &data));
    OK(zs_abort_result(&s, r, attempt));
    MUST(stats().used == 0);
    OK(zs_take_copy(&s, r, &attempt));
    OK(zs_seal_inline(&s, r, attempt, "copy", 4, 0, 0));
    release_copy(r);
    must_be_empty();
}

static void test_broker_watch(void) {
    uint32_t slot = expect(1, 0, NULL, 0), open;
    uint8_t *data;
    MUST(zs_watch_broker(&s, id(9)) == ZS_NOT_FOUND);
    OK(zs_watch_broker(&s, id(1)));
    claim(1, 0);
    MUST(zs_seal_inline(&s, slot, 0, "x", 1, 0, 0) == ZS_SEALED_TELL_BROKER);
    MUST(zs_watch_broker(&s, id(1)) == ZS_EXISTS);
    OK(zs_create(&s, id(2), 10, 0, 1, &open, &data));
    OK(zs_watch_broker(&s, id(2)));
    MUST(zs_seal(&s, open, 0, 0, NULL, 0) == ZS_SEALED_TELL_BROKER);
    OK(zs_release(&s, slot));
    OK(zs_release(&s, open));
    must_be_empty();
}

/* -- waiting -- */

enum { ROUNDS = 20 };

static void body_wait(void) {
    uint32_t slots[3];
    size_t done;
    for (uint32_t i = 0; i < 3 * ROUNDS; i += 3) {
        for (uint32_t k = 0; k < 3; k++) OK(zs_reference(&s, id(i + k), &slots[k]));
        zs_global_add(&s, 0, 1);
        OK(zs_wait(&s, slots, 3, i % 2 ? 3 : 1, -1, 0, &done));
        MUST(done >= (i % 2 ? 3u : 1u));
        OK(zs_release_many(&s, slots, 3));
    }
}

static int asleep(pid_t pid) {
    char path[40], text[64] = "";
    snprintf(path, sizeof path, "/proc/%d/wchan", (int)pid);
    FILE *f = fopen(path, "r");
    if (!f) return 0;
    int found = fgets(text, sizeof text, f) && strstr(text, "futex");
    fclose(f);
    return found;
}

static void *seal_when_asleep(void *unused) {
    (void)unused;
    for (uint32_t i = 0; i < 3 * ROUNDS; i += 3) {
        while (zs_global_get(&s, 0) < i / 3 + 1) sched_yield();
        zs_proc child = 0;
        uint32_t slot;
        while (!(child = (zs_proc)zs_global_get(&s, 2))) sched_yield();
        while (!asleep((pid_t)child)) sched_yield();
        for (uint32_t k = 3; k-- > 0;) {
            OK(zs_claim(&s, id(i + k), 0, &slot));
            OK(zs_seal_inline(&s, slot, 0, "x", 1, 0, 0));
        }
    }
    return NULL;
}

static void body_wait_named(void) {
    zs_global_add(&s, 2, (uint64_t)getpid());
    body_wait();
}

static void test_wake(void) {
    pthread_t thread;
    uint32_t slots[3 * ROUNDS];
    for (uint32_t i = 0; i < 3 * ROUNDS; i++) slots[i] = expect(i, 0, NULL, 0);
    OK(pthread_create(&thread, NULL, seal_when_asleep, NULL));
    zs_proc child = in_child(body_wait_named, NULL);
    OK(pthread_join(thread, NULL));
    check();
    /* Each round found the child asleep on its bell (but for the instant between two slices): the kernel was asked to wake it. */
    MUST(stats().wakes >= ROUNDS / 2);
    OK(zs_reap(&s, child));
    OK(zs_release_many(&s, slots, 3 * ROUNDS));
    must_be_empty();
}

static void on_alarm(int number) { (void)number; }

static void test_wait_outcomes(void) {
    uint32_t slots[3] = {put(1, 5), expect(2, 0, NULL, 0), put(3, 5000)};
    size_t done;
    MUST(zs_wait(&s, slots, 3, 3, 0, 0, &done) == ZS_TIMEOUT && done == 2);
    OK(zs_wait(&s, slots, 3, 2, -1, 0, &done));
    MUST(zs_wait(&s, slots, 3, 3, 2000000, 0, &done) == ZS_TIMEOUT && done == 2);
    MUST(zs_wait(&s, slots + 1, 2, 2, 2000000, 0, &done) == ZS_TIMEOUT && done == 1);
    OK(zs_wait(&s, slots, 3, 1000, 0, 0, &done) == ZS_TIMEOUT ? ZS_OK : 1);
    check();
    struct sigaction action = {.sa_handler = on_alarm};
    struct itimerval timer = {{0, 2000}, {0, 2000}}, none = {{0, 0}, {0, 0}};
    OK(sigaction(SIGALRM, &action, NULL));
    OK(setitimer(ITIMER_REAL, &timer, NULL));
    MUST(zs_wait(&s, slots, 3, 3, -1, 0, &done) == ZS_INTERRUPTED && done == 2);
    OK(setitimer(ITIMER_REAL, &none, NULL));
    OK(zs_seal_forced(&s, slots[1], "e", 1, ZS_KIND_ERROR, 0));
    OK(zs_wait(&s, slots, 3, 3, -1, 0, &done));
    MUST(zs_count_done(&s, slots, 3) == 3 && done == 3);
    OK(zs_release_many(&s, slots, 3));
    must_be_empty();
}

static void body_die_spinning(void) {
    uint32_t slot = expect(2000000, 0, NULL, 0);
    size_t done;
    s.cpus = 2;
    zs_crash_after(1);
    OK(zs_wait(&s, &slot, 1, 1, -1, 0, &done));
}

enum { SHORT_WAITS = 20000 };

static void *seal_at_once(void *unused) {
    (void)unused;
    for (uint32_t i = 0; zs_global_get(&s, 3) == 0; i++) {
        uint32_t slot;
        while (zs_global_get(&s, 0) < i + 1 && zs_global_get(&s, 3) == 0) sched_yield();
        if (zs_claim(&s, id(i), 0, &slot) == ZS_OK) OK(zs_seal_inline(&s, slot, 0, "x", 1, 0, 0));
    }
    return NULL;
}

static void test_spin(void) {
    pthread_t thread;
    size_t done;
    int status;
    s.cpus = 2;    /* one place for those who spin; its holder dies */
    zs_proc dead = in_child(body_die_spinning, &status);
    MUST(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    OK(zs_reap(&s, dead));
    OK(pthread_create(&thread, NULL, seal_at_once, NULL));
    for (uint32_t i = 0; i < SHORT_WAITS && stats().spins == 0; i++) {
        uint32_t slot = expect(i, 0, NULL, 0);
        zs_global_add(&s, 0, 1);
        OK(zs_wait(&s, &slot, 1, 1, -1, 0, &done));
        MUST(done == 1);
        OK(zs_release(&s, slot));
    }
    zs_global_add(&s, 3, 1);
    OK(pthread_join(thread, NULL));
    MUST(stats().spins > 0);
    check();
}

static void test_wait_fd(void) {
    int ends[2];
    char byte = 0;
    MUST(pipe(ends) == 0);
    MUST(zs_wait_fd(&s, ends[0], 0) == ZS_TIMEOUT);
    for (int i = 0; i < 3; i++) MUST(zs_wait_fd(&s, ends[0], 300000) == ZS_TIMEOUT);    /* spins, then sleeps; after a long wait it only sleeps */
    MUST(write(ends[1], &byte, 1) == 1);
    OK(zs_wait_fd(&s, ends[0], -1));
    OK(zs_wait_fd(&s, ends[0], 0));
    MUST(close(ends[0]) == 0 && close(ends[1]) == 0);
    MUST(zs_wait_fd(&s, ends[0], 0) == ZS_BAD_ARGUMENT);
    check();
}

static void *ring_later(void *unused) {
    (void)unused;
    while (zs_global_get(&s, 0) == 0) sched_yield();
    for (int i = 0; i < 1000 && zs_global_get(&s, 3) == 0; i++) {
        OK(zs_ring(&s, s.self));
        usleep(1000);
    }
    return NULL;
}

static void test_ring(void) {
    pthread_t thread;
    uint32_t slot = expect(1, 0, NULL, 0);
    size_t done;
    OK(pthread_create(&thread, NULL, ring_later, NULL));
    MUST(zs_wait(&s, NULL, 0, 1, 2000000, 1, &done) == ZS_TIMEOUT && done == 0);    /* only a ring ends a wait for nothing */
    OK(zs_wait(&s, NULL, 0, 1, 0, 0, &done));
    zs_global_add(&s, 0, 1);
    OK(zs_wait(&s, NULL, 0, 1, -1, 1, &done));
    OK(zs_wait(&s, &slot, 1, 1, -1, 1, &done));
    MUST(done == 0);
    zs_global_add(&s, 3, 1);
    OK(pthread_join(thread, NULL));
    uint32_t seen = zs_rings(&s);    /* a ring between a look around and the wait is not missed */
    OK(zs_ring(&s, s.self));
    MUST(zs_rings(&s) == seen + 1);
    OK(zs_wait_since(&s, &slot, 1, 1, -1, 1, seen, &done));
    OK(zs_wait_since(&s, NULL, 0, 1, -1, 1, seen, &done));
    MUST(zs_wait_since(&s, NULL, 0, 1, 2000000, 1, zs_rings(&s), &done) == ZS_TIMEOUT);
    check();
}

static void body_broker(void) {
    OK(zs_unregister(&s));
    OK(zs_register(&s, ZS_PROC_BROKER));
    kill(getpid(), SIGKILL);
}

static void test_broker_gone(void) {
    uint32_t slot = expect(1, 0, NULL, 0);
    size_t done;
    in_child(body_broker, &(int){0});
    MUST(zs_wait(&s, &slot, 1, 1, -1, 0, &done) == ZS_BROKER_GONE);
    check();
}

/* -- processes -- */

static void body_hold_much(void) {
    uint32_t slot;
    uint8_t *data;
    zs_view view;
    for (uint32_t i = 1; i <= 5; i++) OK(zs_reference(&s, id(i), &slot));
    OK(zs_pin(&s, slot, &view));
    put(100, 7000);
    OK(zs_create(&s, id(101), 9000, 0, 1, &slot, &data));
    OK(zs_create(&s, id(102), 9000, 0, 1, &slot, &data));
    zs_global_add(&s, 0, 1);
    while (zs_global_get(&s, 1) == 0) sched_yield();
    kill(getpid(), SIGKILL);
}

static void *reap_too_early(void *found) {
    while (zs_global_get(&s, 0) == 0) sched_yield();
    zs_entry e;
    uint32_t cursor = 0, waiting;
    OK(zs_reference(&s, id(102), &waiting));
    *(uint32_t *)found = waiting;
    zs_proc writer = 0;
    while (zs_walk(&s, &cursor, &e) == ZS_OK)
        if (e.state == ZS_OPEN) writer = e.writer;
    MUST(writer && zs_alive(&s, writer));
    int rc = zs_reap(&s, writer);
    zs_global_add(&s, 1, 1);
    MUST(rc == ZS_BAD_STATE);    /* it lives */
    return NULL;
}

static void test_reap(void) {
    pthread_t thread;
    uint32_t slots[5], waiting;
    zs_view view;
    for (uint32_t i = 1; i <= 5; i++) slots[i - 1] = put(i, 1000 * i);
    OK(pthread_create(&thread, NULL, reap_too_early, &waiting));
    zs_proc dead = in_child(body_hold_much, &(int){0});
    OK(pthread_join(thread, NULL));
    OK(zs_release_many(&s, slots, 5));
    MUST(!zs_alive(&s, dead) && stats().entries == 8 && stats().pins == 1);
    OK(zs_reap(&s, dead));
    MUST(zs_reap(&s, dead) == ZS_NOT_FOUND);
    check();
    OK(zs_describe(&s, waiting, &view));    /* the one somebody else refers to has become an error */
    MUST(view.state == ZS_SEALED && view.kind == ZS_KIND_ERROR && view.size == 0 && stats().entries == 1);
    OK(zs_release(&s, waiting));
    MUST(stats().processes == 1);
    must_be_empty();
}

static void test_fork(void) {
    uint32_t a = put(1, 5000), b = put(2, 10);
    zs_view view;
    zs_proc embryo;
    int status;
    OK(zs_pin(&s, a, &view));
    OK(zs_fork_prepare(&s, &embryo));
    OK(zs_fork_abort(&s, embryo));
    MUST(zs_fork_abort(&s, embryo) == ZS_BAD_STATE);
    check();
    OK(zs_fork_prepare(&s, &embryo));
    pid_t pid = fork();
    if (pid == 0) {
        OK(zs_fork_child(&s, embryo));
        MUST(s.self == embryo && zs_alive(&s, embryo));
        while (zs_global_get(&s, 0) == 0) sched_yield();
        MUST(view.data[4999] == 1);
        OK(zs_unpin(&s, a));
        OK(zs_release(&s, a));
        MUST(zs_release(&s, a) == ZS_BAD_ARGUMENT);    /* what was inherited is not released twice */
        _exit(0);    /* b is left to the reaper */
    }
    OK(zs_unpin(&s, a));
    OK(zs_release(&s, a));
    OK(zs_release(&s, b));
    MUST(stats().entries == 2);
    zs_global_add(&s, 0, 1);
    MUST(waitpid(pid, &status, 0) == pid && status == 0);
    MUST(stats().entries == 1);
    OK(zs_reap(&s, embryo));
    must_be_empty();
}

static void test_embryo_of_the_dead(void) {
    /* The parent dies between prepare and the child's first call: the record goes, and the child is told. */
    int pipes[2];
    zs_proc embryo = 0, parent = 0;
    uint32_t slot = put(1, 100);
    MUST(pipe(pipes) == 0);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        zs_store own = {0};
        OK(zs_attach(&own, fd));
        OK(zs_register(&own, ZS_PROC_TEST));
        OK(zs_reference(&own, id(1), &slot));
        OK(zs_fork_prepare(&own, &embryo));
        MUST(write(pipes[1], &own.self, 4) == 4 && write(pipes[1], &embryo, 4) == 4);
        _exit(0);
    }
    MUST(read(pipes[0], &parent, 4) == 4 && read(pipes[0], &embryo, 4) == 4);
    MUST(waitpid(pid, NULL, 0) == pid);
    MUST(zs_sweep(&s) == 2);
    zs_store late = s;
    MUST(zs_fork_child(&late, embryo) == ZS_GONE && late.self == 0);
    OK(zs_release(&s, slot));
    must_be_empty();
}

static void body_adopt(void) {
    while (zs_global_get(&s, 1) == 0) sched_yield();
    zs_proc given = (zs_proc)zs_global_get(&s, 2);
    zs_store own = {0};
    OK(zs_attach(&own, fd));
    OK(zs_adopt(&own, given));
    MUST(zs_word_add(&own, given, 3, 5) == 12);
    MUST(zs_word_set(&own, given, ZS_WORDS, 0) == ZS_BAD_ARGUMENT);
    zs_detach(&own);
}

static void *enter_by_pid(void *proc) {
    zs_proc child;
    uint64_t pid;
    while (!(pid = zs_global_get(&s, 0))) sched_yield();
    OK(zs_register_pid(&s, ZS_PROC_WORKER, (uint32_t)pid, &child));
    MUST(zs_adopt(&s, child) == ZS_BAD_STATE);    /* it is another process's */
    OK(zs_word_set(&s, child, 3, 7));
    *(zs_proc *)proc = child;
    zs_global_add(&s, 2, child);
    zs_global_add(&s, 1, 1);
    return NULL;
}

static void body_named_adopt(void) {
    zs_global_add(&s, 0, (uint64_t)getpid());
    body_adopt();
}

static void test_register_pid(void) {
    pthread_t thread;
    zs_proc given = 0;
    OK(pthread_create(&thread, NULL, enter_by_pid, &given));
    in_child(body_named_adopt, NULL);
    OK(pthread_join(thread, NULL));
    MUST(zs_word_get(&s, given, 3) == 12);
    MUST(zs_sweep(&s) == 2 && zs_word_get(&s, given, 3) == 0 && zs_ring(&s, given) == ZS_NOT_FOUND);
    MUST(zs_register_pid(&s, ZS_PROC_WORKER, 0x3fffffff, &given) == ZS_NOT_FOUND);
    MUST(zs_register(&s, ZS_PROC_TEST) == ZS_BAD_STATE);
    must_be_empty();
}

static void test_many_processes(void) {
    for (int i = 0; i < 300; i++) {
        zs_proc proc = in_child(body_nothing, NULL);
        MUST(proc != former && !zs_alive(&s, proc));
        former = proc;
        if (i % 7 == 0) zs_sweep(&s);
    }
    zs_sweep(&s);
    MUST(stats().processes == 1 && stats().reaped == 300);
    must_be_empty();
}

static void test_life_objects(void) {
    uint32_t slot, box;
    uint8_t gone[16];
    OK(zs_put_life(&s, id(1), "actor", 5, 1, &slot));
    box = put_list(2, 1, &slot, 1);
    OK(zs_release(&s, slot));
    MUST(zs_next_zombie(&s, gone) == ZS_LAST);
    OK(zs_release(&s, box));
    MUST(stats().zombies == 1);
    check();
    OK(zs_reference(&s, id(1), &slot));    /* found again before anybody was told */
    MUST(stats().zombies == 0 && zs_next_zombie(&s, gone) == ZS_LAST);
    check();
    OK(zs_release(&s, slot));
    OK(zs_next_zombie(&s, gone));
    MUST(memcmp(gone, id(1), 16) == 0 && zs_next_zombie(&s, gone) == ZS_LAST);
    must_be_empty();
}

static void test_bad_segments(void) {
    zs_store other = {0};
    int file = memfd_create("other", MFD_CLOEXEC);
    MUST(zs_attach(&other, file) == ZS_BAD_SEGMENT);
    MUST(ftruncate(file, 1 << 20) == 0 && zs_attach(&other, file) == ZS_BAD_SEGMENT);
    MUST(zs_format(file, 100, 1000) == ZS_BAD_ARGUMENT && zs_format(file, 1 << 20, 1) == ZS_BAD_ARGUMENT);
    MUST(zs_format(-1, 1 << 20, 1000) == ZS_SYSTEM);
    MUST(zs_attach(&other, -1) == ZS_BAD_SEGMENT);
    OK(zs_format(file, 1 << 20, 1000));
    OK(zs_attach(&other, file));
    MUST(zs_put_inline(&other, id(1), "x", 1, 0, 1, &(uint32_t){0}) == ZS_BAD_STATE);    /* not registered */
    zs_detach(&other);
    zs_detach(&other);
}

static void test_bad_arguments(void) {
    uint32_t wild[] = {0, 5, 1000000, 0xffffffff}, slot = put(1, 100), n;
    zs_view view;
    uint8_t *data;
    for (int i = 0; i < 4; i++) {
        MUST(zs_release(&s, wild[i]) < 0 && zs_unpin(&s, wild[i]) < 0 && zs_pin(&s, wild[i], &view) < 0);
        MUST(zs_reference_slot(&s, wild[i]) < 0 && zs_seal(&s, wild[i], 0, 0, NULL, 0) < 0 && zs_abort(&s, wild[i]) < 0);
        MUST(zs_retry(&s, wild[i], 0, &n) < 0 && zs_spilled(&s, wild[i]) < 0 && zs_discard(&s, wild[i], "", 0, 0) < 0);
        MUST(zs_describe(&s, wild[i], &view) < 0 && zs_seal_inline(&s, wild[i], 0, "", 0, 0, 0) < 0);
        MUST(zs_expect(&s, id(9), 0, 1, 0, &wild[i], 1, NULL, 0, &n) == ZS_BAD_ARGUMENT);
        MUST(zs_id_of(&s, wild[i], view.data ? NULL : (uint8_t[16]){0}) < 0);
    }
    MUST(zs_restore(&s, slot, &data, &view.size) == ZS_BAD_STATE && zs_retry(&s, slot, 0, &n) == ZS_BAD_STATE);
    check();
    OK(zs_release(&s, slot));
    must_be_empty();
}

/* -- death at every crash point of a story that passes through nearly all calls -- */

static void story(void) {
    uint32_t a, b, slots[40], attempt, slot, life;
    uint8_t *data, ids[3][16], gone[16];
    uint64_t size;
    zs_view view;
    zs_proc embryo;
    size_t n;
    zs_put_inline(&s, id(1), "value", 5, 0, 1, &a);
    b = put(2, 5000);
    slots[0] = a;
    slots[1] = b;
    slot = put_list(3, 300, slots, 2);
    OK(zs_reference_contained(&s, slot, slots, NULL, 40, &n));
    OK(zs_release_many(&s, slots, n));
    OK(zs_pin(&s, b, &view));
    OK(zs_fork_prepare(&s, &embryo));
    OK(zs_fork_abort(&s, embryo));
    OK(zs_unpin(&s, b));
    OK(zs_put_life(&s, id(4), "life", 4, 1, &life));
    slots[0] = slot;
    slots[1] = life;
    uint32_t r = expect(5, s.self, slots, 2);
    OK(zs_release(&s, life));
    OK(zs_release(&s, slot));
    claim(5, 0);
    OK(zs_open_result(&s, r, 0, 3000, 1, &data));
    memset(data, 5, 3000);
    OK(zs_retry(&s, r, 0, &attempt));
    claim(5, 1);
    OK(zs_open_result(&s, r, 1, 3000, 3, &data));
    memset(data, 5, 3000);
    OK(zs_seal_result(&s, r, 1, 0, 0, &b, 1));
    uint32_t t = expect(6, 0, &r, 1);
    OK(zs_take_over(&s, t, &attempt));
    OK(zs_seal_inline(&s, t, attempt, "t", 1, ZS_KIND_ERROR, ZS_FLAG_SYSTEM_ERROR));
    OK(zs_retry(&s, t, 0, &attempt));
    OK(zs_seal_forced(&s, t, "forced", 6, ZS_KIND_ERROR, 0));
    while (zs_spill_candidate(&s, 1, &slot, &view) == ZS_OK) OK(zs_spilled(&s, slot));
    if (zs_restore(&s, r, &data, &size) == ZS_OK) {
        memset(data, 5, size);
        OK(zs_restored(&s, r, 1));
    }
    OK(zs_discard(&s, r, "gone", 4, ZS_KIND_ERROR));
    OK(zs_create(&s, id(7), 100, 0, 1, &slot, &data));
    OK(zs_abort(&s, slot));
    OK(zs_release(&s, slot));
    uint32_t shared = draft(8, 700, 1), again = draft(8, 700, 0);
    OK(zs_seal_as(&s, &shared, id(8), 0, 0, &b, 1));
    MUST(zs_seal_as(&s, &again, id(8), 0, 0, NULL, 0) == ZS_EXISTS);
    OK(zs_release(&s, shared));
    OK(zs_release(&s, again));
    for (uint32_t i = 0; i < 3; i++) {
        slots[i] = expect(20 + i, 0, NULL, 0);
        memcpy(ids[i], id(20 + i), 16);
    }
    uint32_t got[3];
    OK(zs_claim_many(&s, ids[0], 3, 0, got));
    for (uint32_t i = 0; i < 3; i++) OK(zs_seal_inline(&s, got[i], 0, "many", 4, 0, 0));
    OK(zs_wait(&s, slots, 3, 3, -1, 0, &n));
    OK(zs_release_many(&s, slots, 3));
    OK(zs_release(&s, a));
    OK(zs_release(&s, b));
    OK(zs_release(&s, r));
    OK(zs_release(&s, t));
    while (zs_next_zombie(&s, gone) == ZS_OK) {}
}

static uint64_t crash_at;

static void body_story(void) {
    zs_crash_after(crash_at);
    story();
    zs_crash_after(0);
    zs_global_add(&s, 0, 1);
}

static void test_every_crash_point(void) {
    uint32_t kept = put(90, 3000), small = put(91, 7), box = put_list(92, 60, &kept, 1), crashed = 0;
    uint8_t gone[16];
    zs_view view;
    for (crash_at = 1; zs_global_get(&s, 0) == 0; crash_at++) {
        int status;
        zs_entry e;
        uint32_t cursor = 0;
        in_child(body_story, &status);
        MUST(WIFSIGNALED(status) || status == 0);
        crashed += WIFSIGNALED(status) != 0;
        check();
        if (zs_reference(&s, id(8), &cursor) == ZS_OK) { /* whole, though its maker is dead */
            OK(zs_pin(&s, cursor, &view));
            for (int i = 0; i < 700; i++) MUST(((const uint8_t *)view.data)[i] == 8);
            OK(zs_unpin(&s, cursor));
            OK(zs_release(&s, cursor));
        }
        cursor = 0;
        zs_sweep(&s);
        check();
        while (zs_walk(&s, &cursor, &e) == ZS_OK)
            if (e.state == ZS_PENDING || e.state == ZS_CLAIMED) MUST(zs_seal_forced(&s, cursor - 1, "", 0, 0, 0) >= 0);
        while (zs_next_zombie(&s, gone) == ZS_OK) {}
        check();
        MUST(stats().entries == 3 && stats().holds == 3 && stats().processes == 1);
        OK(zs_describe(&s, kept, &view));
        const uint8_t *at = s.base + view.offset;
        if (view.state == ZS_SEALED) for (int i = 0; i < 3000; i++) MUST(at[i] == 90);
    }
    MUST(crashed > 200 && stats().repairs > 100);
    OK(zs_release(&s, kept));
    OK(zs_release(&s, small));
    OK(zs_release(&s, box));
    must_be_empty();
}

/* -- copying -- */

static void test_copy(void) {
    enum { ROOM = (16 << 20) + 4096 };
    static const size_t sizes[] = {0, 1, 63, 64, 65, 4096, (16 << 20) - 1, 16 << 20, (16 << 20) + 1, (16 << 20) + 63, (16 << 20) + 129};
    uint8_t *from = malloc(ROOM), *to = malloc(ROOM);
    MUST(from && to);
    uint32_t x = 1;
    for (size_t i = 0; i < ROOM; i++) from[i] = (uint8_t)((x = x * 1664525u + 1013904223u) >> 24);
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
        for (size_t shift = 0; shift < 200; shift += 67) { /* of both, differently */
            size_t at = 64 + shift, n = sizes[k];
            memset(to, 7, ROOM);
            zs_copy(to + at, from + 3 * shift, n);
            MUST(memcmp(to + at, from + 3 * shift, n) == 0);
            for (size_t i = 0; i < at; i++) MUST(to[i] == 7);
            for (size_t i = at + n; i < ROOM; i++) MUST(to[i] == 7);
        }
    free(from);
    free(to);
}

/* -- all of them -- */

typedef struct { const char *name; void (*run)(void); uint64_t capacity; uint32_t entries; } test;

#define TEST(name) {#name, test_##name, 32 << 20, 50000}
static const test tests[] = {
    TEST(derived_ids), TEST(inline_value), TEST(block_value), TEST(open_objects), TEST(shared_objects), TEST(contained), TEST(long_chain), TEST(last_freed_first_used),
    {"allocator", test_allocator, 1 << 20, 5000}, {"full", test_full, (8 << 20) + 4096, 5000}, {"whole_capacity", test_whole_capacity, 40 << 20, 100},
    TEST(pages_are_real), {"no_memory", test_no_memory, 8 << 20, 1000},
    {"interrupted_growth", test_interrupted_growth, 8 << 20, 1000}, {"without_fallocate", test_without_fallocate, 8 << 20, 1000}, {"many_entries", test_many_entries, 1 << 20, 40000}, TEST(put_and_drop),
    TEST(spilling), TEST(discard), TEST(task), TEST(large_result), TEST(many_results), TEST(what_is_elsewhere_is_not_made_again), TEST(what_was_sent_is_not_begun_here), TEST(retry), TEST(made_by_the_dead), TEST(superseded_writer), TEST(copies), TEST(broker_watch),
    TEST(wake), TEST(wait_outcomes), TEST(spin), TEST(wait_fd), TEST(ring), TEST(broker_gone), TEST(reap), TEST(fork), TEST(embryo_of_the_dead), TEST(register_pid),
    TEST(many_processes), TEST(life_objects), TEST(bad_segments), TEST(bad_arguments), TEST(every_crash_point), TEST(copy),
};

int main(int argc, char **argv) {
    int failed = 0, first = 1;
    if (argc > 2 && strcmp(argv[1], "--fault") == 0) {
#ifdef ZS_FAULTS
        zs_set_fault(atoi(argv[2]));
#endif
        first = 3;
    }
    if (argc > 1 && strcmp(argv[1], "--list") == 0) {
        for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) printf("%s\n", tests[i].name);
        return 0;
    }
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        int wanted = argc <= first, status = 0;
        for (int k = first; k < argc; k++) wanted |= strcmp(argv[k], tests[i].name) == 0;
        if (!wanted) continue;
        fflush(stdout);
        pid_t pid = fork();
        if (pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            alarm(100);
            make(tests[i].capacity, tests[i].entries);
            tests[i].run();
            if (s.self) OK(zs_unregister(&s));
            zs_detach(&s);
            close(fd);
            exit(0);
        }
        waitpid(pid, &status, 0);
        if (status) printf("FAILED %s (status %x)\n", tests[i].name, status);
        failed += status != 0;
    }
    return failed;
}
