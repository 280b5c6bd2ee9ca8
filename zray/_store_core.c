/* The shared-memory object store: implementation of _store_core.h, which is the contract and is not repeated here.
 *
 * Covers, in this order: layout, locks, room for more, the block allocator, holds and lists, entries, repair, public calls, walk and check; what the
 * operating system must provide comes last. Does not cover pickling, files and policy. Neighbours: _store.pyx wraps the public calls.
 *
 * HOW DEATH AT ANY INSTRUCTION IS SURVIVED
 *  - Everything shared changes under `lock`, a robust mutex. Whoever finds it orphaned runs repair().
 *  - The truth is in processes, entries and holds. An element becomes valid by the last store (entry.state, hold.slot, process.pid) and
 *    invalid by the first. An entry whose several fields must change together is copied to the journal first (`undo`); repair puts the copy back
 *    unless the entry's state, which is stored last, has changed already.
 *  - Everything else is derived, and repair() recomputes it: hash chains, free lists, hold lists, the least-recently-used list, counters, tags.
 *  - A killed process has made its stores in program order as far as others can see (they synchronise with its death through the kernel), so
 *    compiler barriers suffice for repair; release stores are for lock-free readers.
 *
 * MEMORY
 *  Blocks are runs of granules between 1 and `top`; what lies above is the wilderness. A free block never touches another free block or the
 *  wilderness: 1 + used + free == top <= committed <= granules. Freed memory is taken first (last freed first), then committed wilderness, then
 *  new pages. Tags (one word per granule, used only at both ends of a block) lie outside the data, so that blocks keep their alignment; pages of the
 *  tag array are allocated when the first tag in them is written.
 */
#define _GNU_SOURCE
#include "_store_core.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

#ifdef ZS_FAULTS
/* Planted faults, one at a time: tests/store/test_faults.py proves that each is found. */
int zs_fault;
void zs_set_fault(int n) { zs_fault = n; }
#define FAULT(n) (zs_fault == (n))
#else
#define FAULT(n) 0
#endif

#ifdef ZS_CRASH_POINTS
static void crash_point(void);
#define CRASH_POINT() crash_point()
#else
#define CRASH_POINT() ((void)0)
#endif

/* ---- the operating system, implemented at the end ---------------------------------------------------------------------------- */

static int os_truncate(int fd, uint64_t size);
static int os_commit(int fd, uint64_t offset, uint64_t length);
static void os_populate(void *data, uint64_t length);
static int os_start_time(uint32_t pid, uint64_t *start_time);
static uint32_t os_pid(void);
static uint32_t os_cpus(void);
static int os_sleep(uint32_t *word, uint32_t seen, int64_t ns);
static void os_wake(uint32_t *word);
static int os_poll(int fd, int64_t ns);
static int64_t os_now(void);
static void *os_map(int fd, uint64_t size);
static void os_unmap(void *base, uint64_t size);
static uint64_t os_size(int fd);
static void os_advise(void *data, uint64_t size);

/* ---- layout ------------------------------------------------------------------------------------------------------------------ */

#define MAGIC 0x31305a5241595354ull
#define PAGE 4096ull
#define PIECE (1u << 20)             /* bytes by which the arrays grow */
#define DATA_PIECE (32ull << 20)     /* most bytes of data committed at once: signals and other growers get their turn in between */
#define DATA_STEP (2ull << 20)       /* least bytes of data committed at once */
#define FIRST_BUCKETS 16384u
#define FIRST_PROCS 256u
#define TAG_FREE 0x80000000u
#define TAGS_PER_PAGE (PAGE / 4)
#define SUB_BITS 5
#define SUBS (1u << SUB_BITS)
#define CLASSES 28u
#define RELEASE_BUDGET 1000          /* entries freed under one hold of the lock */
#define SLICE_NS 100000000ll
#define SPIN_NS 200000ll
#define SPINNERS 32u
#define SPINS 100
#define OPEN_SIZE_BITS 40
#define OPEN_SIZE_MASK ((1ull << OPEN_SIZE_BITS) - 1)
#define MOST_CONTAINED ((1u << 24) - 1)

/* internal return codes and states */
#define NEED (-100)                  /* the array or the data must grow: `wanted` says which; unlock, grow(), try again */
#define CHANGING 7u                  /* a sealed entry between two values: lock-free readers take the lock instead */
#define STATES 8

/* internal entry flags */
#define LIMBO 0x10u                  /* holds a superseded open_block; has no id */
#define LISTED 0x20u                 /* in the least-recently-used list (derived) */
#define DOOMED 0x40u                 /* in the list of entries to be freed (derived) */
#define DYING 0x80u                  /* being freed, out of its hash chain already (derived) */
#define PUBLIC_FLAGS 0x0fu

/* internal mark */
#define FILED 0x08u                  /* a ZOMBIE whose value lay on disk: laid out as SPILLED */

typedef struct {
    uint64_t magic;
    uint32_t version, entry_limit, hold_limit, bucket_limit;
    uint64_t total, capacity, granules;                  /* granules: one past the last */
    uint64_t at_procs, at_buckets, at_entries, at_holds, at_tag_pages, at_tags, at_data;

    _Alignas(64) pthread_mutex_t lock;
    _Alignas(64) pthread_mutex_t grow_lock;

    /* truth */
    _Alignas(64) uint32_t undo_slot;                     /* commit: nonzero = `undo` is the entry as it was */
    uint32_t broker;
    uint32_t entry_bump, entry_committed;                /* elements ever used, elements with pages */
    uint32_t hold_bump, hold_committed;
    uint32_t bucket_committed, proc_bump;
    uint64_t committed;                                  /* granules with pages */
    _Alignas(64) zs_entry undo;

    /* derived */
    _Alignas(64) uint32_t entry_free, hold_free, hold_free_count, bucket_count;
    uint32_t oldest, newest;
    uint32_t zombie, doomed, limbo;
    uint32_t growable;                                   /* cleared when no page for more buckets could be had */
    uint64_t top, used, high_water;
    uint64_t count[STATES], hold_count, pin_count, inline_bytes, process_count;
    uint64_t free_granules;

    /* counters, for people */
    _Alignas(64) uint64_t puts, gets, seals, deletes, claims, stale_seals, repairs, reaped, wakes, grows, spins;
    _Alignas(64) uint64_t words[ZS_WORDS];

    uint32_t spinners[SPINNERS];                         /* processes that wait without sleeping; names of the dead are overwritten */

    /* free blocks by size: class (power of two), then 32 equal parts */
    _Alignas(64) uint32_t class_map;
    uint32_t sub_map[CLASSES];
    uint32_t lists[CLASSES][SUBS];
} head;

_Static_assert(sizeof(zs_process) == 128, "process record");
_Static_assert(sizeof(zs_entry) == 128, "entry");
_Static_assert(sizeof(zs_hold) == 28 || sizeof(zs_hold) == 24, "hold");
_Static_assert(offsetof(zs_entry, inline_tail) == offsetof(zs_entry, inline_data) + ZS_INLINE_MAX - 8, "inline bytes are contiguous");
_Static_assert(ZS_MAX_PROCS <= 65536, "a hold names its process with 16 bits");

#define LOAD(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define STORE(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define BARRIER() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define ADD(p, v) __atomic_add_fetch((p), (v), __ATOMIC_SEQ_CST)
#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

/* What `NEED` needs; read by grow() right after the unlock. */
enum { WANT_ENTRIES, WANT_HOLDS, WANT_BUCKETS, WANT_DATA, WANT_TAGS };
static _Thread_local struct { int what; uint64_t amount; } wanted;

static inline head *head_of(const zs_store *s) { return (head *)s->base; }
static inline zs_process *process_at(const zs_store *s, uint32_t i) { return (zs_process *)(s->base + head_of(s)->at_procs) + i; }
static inline zs_entry *entry_at(const zs_store *s, uint32_t i) { return (zs_entry *)(s->base + head_of(s)->at_entries) + i; }
static inline zs_hold *hold_at(const zs_store *s, uint32_t i) { return (zs_hold *)(s->base + head_of(s)->at_holds) + i; }
static inline uint32_t *buckets_of(const zs_store *s) { return (uint32_t *)(s->base + head_of(s)->at_buckets); }
static inline uint32_t *tags_of(const zs_store *s) { return (uint32_t *)(s->base + head_of(s)->at_tags); }
static inline uint64_t *tag_pages_of(const zs_store *s) { return (uint64_t *)(s->base + head_of(s)->at_tag_pages); }
static inline uint8_t *data_at(const zs_store *s, uint32_t granule) { return s->base + head_of(s)->at_data + (uint64_t)granule * ZS_GRANULE; }
static inline uint32_t index_of(zs_proc proc) { return proc & 0xffffu; }
static inline uint32_t self_of(const zs_store *s) { return s->self & 0xffffu; }
static inline uint64_t round_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }
static inline uint64_t round4(uint64_t n) { return (n + 3) & ~3ull; }
static inline uint64_t granules_for(uint64_t bytes) { return (bytes + ZS_GRANULE - 1) / ZS_GRANULE; }

/* The record of a handle, or NULL when that process has been reaped. */
static inline zs_process *current(const zs_store *s, zs_proc proc) {
    uint32_t i = index_of(proc);
    if (i == 0 || i >= ZS_MAX_PROCS) return NULL;
    zs_process *p = process_at(s, i);
    return p->pid && p->generation == proc >> 16 ? p : NULL;
}

static inline zs_proc handle_of(const zs_store *s, uint32_t i) { return process_at(s, i)->generation << 16 | i; }

/* ---- locks ------------------------------------------------------------------------------------------------------------------- */

static void repair(zs_store *s);

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static void lock_contended(zs_store *s, int rc) {
    head *h = head_of(s);
    /* Sections last a fraction of a microsecond: spin a little before the kernel is asked. */
    for (int i = 0; rc == EBUSY && i < SPINS; i++) {
        pause_briefly();
        rc = pthread_mutex_trylock(&h->lock);
    }
    if (rc == EBUSY) rc = pthread_mutex_lock(&h->lock);
    if (rc == EOWNERDEAD) {
        repair(s);
        pthread_mutex_consistent(&h->lock);
    }
}

static inline void lock(zs_store *s) {
    int rc = pthread_mutex_trylock(&head_of(s)->lock);
    if (UNLIKELY(rc != 0)) lock_contended(s, rc);
    CRASH_POINT();
}

static inline void unlock(zs_store *s) {
    CRASH_POINT();
    pthread_mutex_unlock(&head_of(s)->lock);
}

static void lock_growth(zs_store *s) {
    /* What it guards is idempotent: nothing to repair. */
    if (pthread_mutex_lock(&head_of(s)->grow_lock) == EOWNERDEAD) pthread_mutex_consistent(&head_of(s)->grow_lock);
}

/* ---- room for more ----------------------------------------------------------------------------------------------------------- */

static int need(int what, uint64_t amount) {
    wanted.what = what;
    wanted.amount = amount;
    return NEED;
}

/* Give pages to `bytes` more bytes of an array of `limit` elements, of which *committed have pages. */
static int grow_array(zs_store *s, uint64_t at, uint32_t *committed, uint64_t limit, uint64_t element, uint64_t bytes) {
    uint64_t have = *committed, want = have + bytes / element;
    if (want > limit) want = limit;
    if (want == have) return ZS_OK;
    int rc = os_commit(s->fd, at + have * element, (want - have) * element);
    if (rc != ZS_OK) return rc;
    lock(s);
    STORE(committed, (uint32_t)want);
    head_of(s)->grows++;
    unlock(s);
    return ZS_OK;
}

static int grow_data(zs_store *s, uint64_t end) {
    head *h = head_of(s);
    uint64_t have = LOAD(&h->committed);
    if (have >= end) return ZS_OK;
    uint64_t step = (end - have) * ZS_GRANULE;
    step = step > DATA_PIECE ? DATA_PIECE : round_up(step, DATA_STEP);
    uint64_t want = have + step / ZS_GRANULE;
    if (want > h->granules) want = h->granules;
    if (!FAULT(7)) {
        int rc = os_commit(s->fd, h->at_data + have * ZS_GRANULE, (want - have) * ZS_GRANULE);
        if (rc != ZS_OK) return rc;
    }
    lock(s);
    STORE(&h->committed, want);
    h->grows++;
    unlock(s);
    return ZS_OK;
}

static int grow_tags(zs_store *s, uint64_t granule) {
    head *h = head_of(s);
    uint64_t page = granule / TAGS_PER_PAGE;
    uint64_t *word = &tag_pages_of(s)[page / 64];
    if (LOAD(word) >> (page % 64) & 1) return ZS_OK;
    int rc = os_commit(s->fd, h->at_tags + page * PAGE, PAGE);
    if (rc != ZS_OK) return rc;
    lock(s);
    STORE(word, *word | 1ull << (page % 64));
    unlock(s);
    return ZS_OK;
}

/* Satisfy `wanted`; called without `lock`. Another process may have done it, or may take what it gives: callers try again from the start. */
static int grow(zs_store *s) {
    head *h = head_of(s);
    int rc = ZS_OK;
    lock_growth(s);
    CRASH_POINT();
    switch (wanted.what) {
    case WANT_ENTRIES:
        if (LOAD(&h->entry_bump) + wanted.amount > LOAD(&h->entry_committed))
            rc = grow_array(s, h->at_entries, &h->entry_committed, (uint64_t)h->entry_limit + 1, sizeof(zs_entry), PIECE);
        break;
    case WANT_HOLDS:
        if (LOAD(&h->hold_bump) + wanted.amount > LOAD(&h->hold_committed))
            rc = grow_array(s, h->at_holds, &h->hold_committed, (uint64_t)h->hold_limit + 1, sizeof(zs_hold), PIECE);
        break;
    case WANT_BUCKETS:
        if (LOAD(&h->bucket_count) >= LOAD(&h->bucket_committed)) {
            rc = grow_array(s, h->at_buckets, &h->bucket_committed, h->bucket_limit, 4, PIECE / 16);
            if (rc != ZS_OK) STORE(&h->growable, 0u);    /* longer chains are no reason to fail */
            rc = ZS_OK;
        }
        break;
    case WANT_DATA: rc = grow_data(s, wanted.amount); break;
    default: rc = grow_tags(s, wanted.amount); break;
    }
    CRASH_POINT();
    pthread_mutex_unlock(&h->grow_lock);
    return rc;
}

/* Evaluate `attempt` under the lock until it does not ask for growth. The lock is not held afterwards. */
#define UNDER_LOCK(s, code, attempt)                                    \
    do {                                                                \
        lock(s);                                                        \
        (code) = (attempt);                                             \
        finish(s);                                                      \
    } while ((code) == NEED && ((code) = grow(s)) == ZS_OK)

/* ---- blocks ------------------------------------------------------------------------------------------------------------------ */

/* A free block's first bytes. */
typedef struct { uint32_t next, previous; } free_links;

static inline free_links *links_at(const zs_store *s, uint32_t granule) { return (free_links *)data_at(s, granule); }

static inline int tag_ready(const zs_store *s, uint64_t granule) {
    uint64_t page = granule / TAGS_PER_PAGE;
    return tag_pages_of(s)[page / 64] >> (page % 64) & 1;
}

static inline void set_tags(const zs_store *s, uint32_t granule, uint32_t n, uint32_t bit) {
    uint32_t *tags = tags_of(s);
    tags[granule] = n | bit;
    tags[granule + n - 1] = n | bit;
}

static inline void class_of(uint32_t n, uint32_t *c, uint32_t *sub) {
    if (n < SUBS) {
        *c = 0;
        *sub = n;
    } else {
        uint32_t log = 31u - (uint32_t)__builtin_clz(n);
        *c = log - SUB_BITS + 1;
        *sub = (n >> (log - SUB_BITS)) & (SUBS - 1);
    }
}

static void list_free(zs_store *s, uint32_t granule, uint32_t n) {
    head *h = head_of(s);
    uint32_t c, sub;
    class_of(n, &c, &sub);
    free_links *links = links_at(s, granule);
    uint32_t first = h->lists[c][sub];
    links->next = first;
    links->previous = 0;
    if (first) links_at(s, first)->previous = granule;
    h->lists[c][sub] = granule;
    h->class_map |= 1u << c;
    h->sub_map[c] |= 1u << sub;
    h->free_granules += n;
    set_tags(s, granule, n, TAG_FREE);
}

static void unlist_free(zs_store *s, uint32_t granule, uint32_t n) {
    head *h = head_of(s);
    uint32_t c, sub;
    class_of(n, &c, &sub);
    free_links *links = links_at(s, granule);
    if (links->next) links_at(s, links->next)->previous = links->previous;
    if (links->previous) links_at(s, links->previous)->next = links->next;
    else if ((h->lists[c][sub] = links->next) == 0) {
        h->sub_map[c] &= ~(1u << sub);
        if (!h->sub_map[c]) h->class_map &= ~(1u << c);
    }
    h->free_granules -= n;
}

/* A free block of at least n granules, or 0. Its own class first, a few steps deep: equal sizes come back to back. Then any larger class. */
static uint32_t find_free(zs_store *s, uint32_t n) {
    head *h = head_of(s);
    uint32_t c, sub;
    class_of(n, &c, &sub);
    uint32_t granule = h->lists[c][sub];
    for (int i = 0; granule && i < 8; i++, granule = links_at(s, granule)->next)
        if ((tags_of(s)[granule] & ~TAG_FREE) >= n) return granule;
    uint32_t map = sub + 1 < SUBS ? h->sub_map[c] & (~0u << (sub + 1)) : 0;
    if (!map) {
        uint32_t classes = c + 1 < CLASSES ? h->class_map & (~0u << (c + 1)) : 0;
        if (!classes) return 0;
        c = (uint32_t)__builtin_ctz(classes);
        map = h->sub_map[c];
    }
    return h->lists[c][__builtin_ctz(map)];
}

/* Take n granules. ZS_OK, ZS_FULL, NEED. Until an entry names the block it belongs to nobody, and repair would free it. */
static int take_block(zs_store *s, uint64_t bytes, uint32_t *granule) {
    head *h = head_of(s);
    uint64_t wide = granules_for(bytes);
    if (wide >= h->granules || wide >= TAG_FREE) return ZS_TOO_LARGE;
    uint32_t n = (uint32_t)wide, g = find_free(s, n);
    if (g) {
        uint32_t have = tags_of(s)[g] & ~TAG_FREE;
        if (!tag_ready(s, (uint64_t)g + n - 1)) return need(WANT_TAGS, (uint64_t)g + n - 1);
        if (have > n && !tag_ready(s, (uint64_t)g + n)) return need(WANT_TAGS, (uint64_t)g + n);
        unlist_free(s, g, have);
        if (have > n) list_free(s, g + n, have - n);
    } else {
        uint64_t end = h->top + n;
        if (end > h->granules) return ZS_FULL;
        if (end > h->committed) return need(WANT_DATA, end);
        g = (uint32_t)h->top;
        if (!tag_ready(s, g)) return need(WANT_TAGS, g);
        if (!tag_ready(s, end - 1)) return need(WANT_TAGS, end - 1);
        h->top = end;
        if (end > h->high_water) h->high_water = end;
    }
    set_tags(s, g, n, 0);
    h->used += n;
    *granule = g;
    return ZS_OK;
}

/* Give granules [g, g + n) back, joining free neighbours and the wilderness. */
static void give_run(zs_store *s, uint32_t g, uint32_t n) {
    head *h = head_of(s);
    uint32_t *tags = tags_of(s);
    h->used -= n;
    if (g > 1 && (tags[g - 1] & TAG_FREE) && !FAULT(6)) {
        uint32_t before = tags[g - 1] & ~TAG_FREE;
        g -= before;
        n += before;
        unlist_free(s, g, before);
    }
    if (g + (uint64_t)n < h->top && (tags[g + n] & TAG_FREE)) {
        uint32_t after = tags[g + n] & ~TAG_FREE;
        unlist_free(s, g + n, after);
        n += after;
    }
    if (g + (uint64_t)n == h->top) h->top = g;
    else list_free(s, g, n);
}

static void give_block(zs_store *s, uint32_t granule) {
    if (granule) give_run(s, granule, tags_of(s)[granule]);
}

/* Keep only granules [first, first + keep) of a used block. The tags inside lie in pages that may be missing: then nothing is given back now, and
 * the caller's extent must be what was there, so it asks before (NEED). */
static int may_cut(zs_store *s, uint32_t granule, uint32_t first, uint32_t keep) {
    uint64_t end = (uint64_t)first + keep, whole = (uint64_t)granule + tags_of(s)[granule];
    if (first > granule && !tag_ready(s, first - 1)) return need(WANT_TAGS, first - 1);
    if (first > granule && keep && !tag_ready(s, first)) return need(WANT_TAGS, first);
    if (end < whole && !tag_ready(s, end)) return need(WANT_TAGS, end);
    if (end < whole && keep && !tag_ready(s, end - 1)) return need(WANT_TAGS, end - 1);
    return ZS_OK;
}

static void cut_block(zs_store *s, uint32_t granule, uint32_t first, uint32_t keep) {
    uint32_t n = tags_of(s)[granule], before = first - granule, after = n - before - keep;
    if (keep) set_tags(s, first, keep, 0);
    if (before) set_tags(s, granule, before, 0);
    if (after) set_tags(s, first + keep, after, 0);
    if (after) give_run(s, first + keep, after);
    if (before) give_run(s, granule, before);
}

/* ---- what an entry names ----------------------------------------------------------------------------------------------------- */

static inline int is_pending(uint32_t state) { return state == ZS_PENDING || state == ZS_CLAIMED; }
static inline int is_done(uint32_t state) { return state == ZS_SEALED || state == ZS_SPILLED; }
static inline uint64_t open_bytes(const zs_entry *e) { return e->open_size & OPEN_SIZE_MASK; }
static inline uint32_t open_slots(const zs_entry *e) { return (uint32_t)(e->open_size >> OPEN_SIZE_BITS); }
static inline uint64_t value_extent(uint64_t size, uint32_t slots) { return slots ? round4(size) + 4ull * slots : size; }

/* What a zombie was, as far as its layout goes. */
static inline uint32_t layout_of(const zs_entry *e) {
    if (e->state != ZS_ZOMBIE) return e->state;
    return e->marks & FILED ? ZS_SPILLED : ZS_SEALED;
}

/* What a zombie is again when it is found by its id. */
static inline uint32_t former_state(const zs_entry *e) { return e->marks & ZS_MARK_REMOTE ? (uint32_t)ZS_PENDING : layout_of(e); }

/* Bytes of the extent that starts at e->block. */
static uint64_t extent_of(const zs_entry *e) {
    switch (layout_of(e)) {
    case ZS_SEALED: return value_extent(e->size, e->contained);
    case ZS_SPILLED: return (round4(e->size) & (ZS_GRANULE - 1)) + 4ull * e->contained;
    case ZS_PENDING:
    case ZS_CLAIMED: return 4ull * e->contained + e->size;
    default: return 0;
    }
}

/* Bytes of an open block; even an empty result has one, so that its writer is known. */
static inline uint64_t open_extent(const zs_entry *e) {
    uint64_t bytes = value_extent(open_bytes(e), open_slots(e));
    return bytes ? bytes : 1;
}

/* The entry's list of slots. */
static uint32_t *list_of(const zs_store *s, zs_entry *e) {
    uint8_t *at = e->block ? data_at(s, e->block) : e->inline_data;
    uint32_t layout = layout_of(e);
    if (layout == ZS_SEALED) at += round4(e->size);
    else if (layout == ZS_SPILLED) at += round4(e->size) & (ZS_GRANULE - 1);
    return (uint32_t *)at;
}

static inline int has_list(uint32_t state) { return is_done(state) || is_pending(state) || state == ZS_ZOMBIE; }

/* Bytes of a value kept in the entry. */
static inline uint64_t inline_bytes_of(const zs_entry *e) { return (e->state == ZS_SEALED || e->state == ZS_ZOMBIE) && !e->block ? e->inline_size : 0; }

static inline int lists_links(const zs_entry *e) { return (is_done(e->state) || e->state == ZS_ZOMBIE) && e->open_block == 0; }

/* ---- hash chains: linear hashing, one bucket more for each entry that makes them fuller than one ------------------------------- */

static inline uint32_t hash_id(const uint8_t *id) {
    uint64_t a;
    uint32_t b;
    memcpy(&a, id, 8);
    memcpy(&b, id + 12, 4);
    return (uint32_t)(((a ^ (uint64_t)b * 0x9e3779b97f4a7c15ull) * 0xd6e8feb86659fd93ull) >> 32);
}

static inline uint32_t bucket_of(uint32_t hash, uint32_t count) {
    uint32_t level = 1u << (31 - __builtin_clz(count));
    uint32_t i = hash & (2 * level - 1);
    return i < count ? i : hash & (level - 1);
}

static inline int same_id(const uint8_t *a, const uint8_t *b) {
    uint64_t x[2], y[2];
    memcpy(x, a, 16);
    memcpy(y, b, 16);
    return x[0] == y[0] && x[1] == y[1];
}

static uint32_t find(const zs_store *s, const uint8_t *id) {
    uint32_t slot = buckets_of(s)[bucket_of(hash_id(id), head_of(s)->bucket_count)];
    while (slot) {
        zs_entry *e = entry_at(s, slot);
        if (same_id(e->id, id)) return slot;
        slot = e->next;
    }
    return 0;
}

static inline void chain(zs_store *s, uint32_t slot) {
    zs_entry *e = entry_at(s, slot);
    uint32_t *bucket = &buckets_of(s)[bucket_of(hash_id(e->id), head_of(s)->bucket_count)];
    e->next = *bucket;
    *bucket = slot;
}

static void unchain(zs_store *s, uint32_t slot) {
    zs_entry *e = entry_at(s, slot);
    uint32_t *link = &buckets_of(s)[bucket_of(hash_id(e->id), head_of(s)->bucket_count)];
    while (*link && *link != slot) link = &entry_at(s, *link)->next;
    if (*link) *link = e->next;
    e->next = 0;
}

/* Split the next bucket. */
static void add_bucket(zs_store *s) {
    head *h = head_of(s);
    uint32_t fresh = h->bucket_count, level = 1u << (31 - __builtin_clz(fresh));
    uint32_t *link = &buckets_of(s)[fresh - level], *other = &buckets_of(s)[fresh], slot;
    *other = 0;
    while ((slot = *link)) {
        zs_entry *e = entry_at(s, slot);
        if ((hash_id(e->id) & (2 * level - 1)) == fresh) {
            *link = e->next;
            e->next = *other;
            *other = slot;
        } else {
            link = &e->next;
        }
    }
    h->bucket_count = fresh + 1;
}

/* ---- lists over older/newer ----------------------------------------------------------------------------------------------------- */

static int is_pinned(const zs_store *s, const zs_entry *e) {
    for (uint32_t i = e->holds; i; i = hold_at(s, i)->next)
        if (hold_at(s, i)->pins) return 1;
    return 0;
}

/* Into the least-recently-used list, as the newest, when it belongs there. */
static void list_used(zs_store *s, uint32_t slot) {
    head *h = head_of(s);
    zs_entry *e = entry_at(s, slot);
    if (e->state != ZS_SEALED || !e->block || e->flags & (LISTED | DOOMED) || is_pinned(s, e)) return;
    e->older = h->newest;
    e->newer = 0;
    if (h->newest) entry_at(s, h->newest)->newer = slot;
    else h->oldest = slot;
    h->newest = slot;
    e->flags |= LISTED;
}

static void unlist_used(zs_store *s, uint32_t slot) {
    head *h = head_of(s);
    zs_entry *e = entry_at(s, slot);
    if (!(e->flags & LISTED)) return;
    if (e->older) entry_at(s, e->older)->newer = e->newer;
    else h->oldest = e->newer;
    if (e->newer) entry_at(s, e->newer)->older = e->older;
    else h->newest = e->older;
    e->older = e->newer = 0;
    e->flags &= (uint8_t)~LISTED;
}

static void list_zombie(zs_store *s, uint32_t slot) {
    head *h = head_of(s);
    zs_entry *e = entry_at(s, slot);
    e->older = 0;
    e->newer = h->zombie;
    if (h->zombie) entry_at(s, h->zombie)->older = slot;
    h->zombie = slot;
}

static void unlist_zombie(zs_store *s, uint32_t slot) {
    head *h = head_of(s);
    zs_entry *e = entry_at(s, slot);
    if (e->older) entry_at(s, e->older)->newer = e->newer;
    else h->zombie = e->newer;
    if (e->newer) entry_at(s, e->newer)->older = e->older;
    e->older = e->newer = 0;
}

/* ---- entries ------------------------------------------------------------------------------------------------------------------- */

/* The commit of nearly everything. */
static inline void set_state(head *h, zs_entry *e, uint32_t state) {
    CRASH_POINT();
    h->count[e->state < STATES ? e->state : 0]--;
    h->count[state]++;
    STORE(&e->state, state);
    CRASH_POINT();
}

/* Between begin and commit the entry may be changed in any order; state only through commit. */
static inline void begin(zs_store *s, zs_entry *e, uint32_t slot) {
    head *h = head_of(s);
    if (FAULT(15)) return;
    h->undo = *e;
    BARRIER();
    h->undo_slot = slot;
    BARRIER();
    CRASH_POINT();
    if (e->state == ZS_SEALED) set_state(h, e, CHANGING);
}

static inline void commit(zs_store *s, zs_entry *e, uint32_t state) {
    head *h = head_of(s);
    CRASH_POINT();
    set_state(h, e, state);
    BARRIER();
    h->undo_slot = 0;
    BARRIER();
}

/* Are an entry and a hold to be had without growing? */
static inline int room_for(zs_store *s, uint32_t entries, uint32_t holds) {
    head *h = head_of(s);
    if (entries && !h->entry_free && UNLIKELY(h->entry_bump + entries > h->entry_committed)) {
        if (h->entry_committed <= h->entry_limit) return need(WANT_ENTRIES, entries);
        return ZS_TOO_MANY;
    }
    if (UNLIKELY(h->hold_free_count < holds)) {
        uint32_t fresh = holds - h->hold_free_count;
        if (h->hold_bump + fresh > h->hold_committed) {
            if (h->hold_committed <= h->hold_limit) return need(WANT_HOLDS, fresh);
            return ZS_TOO_MANY;
        }
    }
    uint64_t in_use = h->entry_bump - h->count[ZS_FREE];
    if (entries && UNLIKELY(in_use >= h->bucket_count) && h->bucket_count < h->bucket_limit) {
        if (h->bucket_count < h->bucket_committed) add_bucket(s);
        else if (h->growable) return need(WANT_BUCKETS, 1);
    }
    return ZS_OK;
}

/* An entry that is FREE still. count[ZS_FREE] counts those below the bump mark. */
static uint32_t take_entry(zs_store *s) {
    head *h = head_of(s);
    uint32_t slot = h->entry_free;
    zs_entry *e;
    if (slot) {
        e = entry_at(s, slot);
        h->entry_free = e->next;
    } else {
        slot = h->entry_bump;
        e = entry_at(s, slot);
        e->state = ZS_FREE;
        STORE(&h->entry_bump, slot + 1);
        h->count[ZS_FREE]++;
    }
    memset((uint8_t *)e + offsetof(zs_entry, attempt), 0, offsetof(zs_entry, inline_data) - offsetof(zs_entry, attempt));
    return slot;
}

static void give_entry(zs_store *s, uint32_t slot) {
    head *h = head_of(s);
    zs_entry *e = entry_at(s, slot);
    e->holds = 0;
    e->next = h->entry_free;
    h->entry_free = slot;
}

static inline int valid_slot(const zs_store *s, uint32_t slot) { return slot && slot < head_of(s)->entry_bump; }

/* Account for `writing`: entries that a process is filling. */
static void note_writer(zs_store *s, zs_proc writer, int change) {
    zs_process *p = current(s, writer);
    if (p) p->writing += (uint32_t)change;
}

static void note_target(zs_store *s, zs_proc target, int change) {
    zs_process *p = current(s, target);
    if (p && !(FAULT(17) && change < 0)) ADD(&p->expected, (uint32_t)change);
}

/* ---- holds ----------------------------------------------------------------------------------------------------------------------- */

/* The process's hold on an entry, or 0. Comes to the front of the list, so that the next look-up and its removal are short. */
static inline uint32_t find_hold(zs_store *s, zs_entry *e, uint32_t proc) {
    uint32_t i = e->holds;
    if (!i) return 0;
    zs_hold *o = hold_at(s, i);
    if (LIKELY(o->proc == proc)) return i;
    for (;;) {
        zs_hold *before = o;
        if (!(i = o->next)) return 0;
        o = hold_at(s, i);
        if (o->proc == proc) {
            before->next = o->next;
            o->next = e->holds;
            e->holds = i;
            return i;
        }
    }
}

static uint32_t add_hold(zs_store *s, zs_entry *e, uint32_t slot, uint32_t proc) {
    head *h = head_of(s);
    uint32_t i = h->hold_free;
    zs_hold *o;
    if (i) {
        o = hold_at(s, i);
        h->hold_free = o->next;
        h->hold_free_count--;
    } else {
        i = h->hold_bump;
        o = hold_at(s, i);
        o->slot = 0;
        STORE(&h->hold_bump, i + 1);
    }
    o->proc = (uint16_t)proc;
    o->watching = 0;
    o->references = 0;
    o->pins = 0;
    o->next = e->holds;
    STORE(&o->slot, slot);
    CRASH_POINT();
    e->holds = i;
    h->hold_count++;
    process_at(s, proc)->holds++;
    return i;
}

/* The process's hold, made when missing; room_for() was asked. */
static inline zs_hold *hold_for(zs_store *s, zs_entry *e, uint32_t slot, uint32_t proc) {
    uint32_t i = find_hold(s, e, proc);
    return hold_at(s, i ? i : add_hold(s, e, slot, proc));
}

/* Remove hold i, which is the first of the entry's list. */
static void drop_first_hold(zs_store *s, zs_entry *e, uint32_t i) {
    head *h = head_of(s);
    zs_hold *o = hold_at(s, i);
    STORE(&o->slot, 0u);
    CRASH_POINT();
    e->holds = o->next;
    o->next = h->hold_free;
    h->hold_free = i;
    h->hold_free_count++;
    h->hold_count--;
    process_at(s, o->proc)->holds--;
}

/* ---- freeing: entries without holders wait in the list `doomed` until drained ------------------------------------------------- */

static void unreferenced(zs_store *s, uint32_t slot) {
    head *h = head_of(s);
    zs_entry *e = entry_at(s, slot);
    int may_go = is_done(e->state) || (e->state == ZS_PENDING && e->marks & ZS_MARK_REMOTE);
    if (e->holds || e->held_by_objects || !may_go || e->open_block || e->flags & DOOMED) return;
    unlist_used(s, slot);
    if (e->flags & ZS_FLAG_NOTIFY) {
        if (e->state == ZS_SPILLED) e->marks |= FILED;
        set_state(h, e, ZS_ZOMBIE);
        list_zombie(s, slot);
        return;
    }
    e->flags |= DOOMED;
    e->older = h->doomed;
    h->doomed = slot;
}

static inline void release_slots(zs_store *s, const uint32_t *slots, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        zs_entry *e = entry_at(s, slots[i]);
        e->held_by_objects--;
        if (FAULT(9) && e->held_by_objects) e->held_by_objects--;
        if (!e->held_by_objects && !e->holds && !FAULT(21)) unreferenced(s, slots[i]);
    }
}

static inline void hold_slots(zs_store *s, const uint32_t *slots, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) entry_at(s, slots[i])->held_by_objects++;
}

/* Free a done entry that nobody holds; at most *budget of its list. 1: freed, 0: more to do. */
static int free_entry(zs_store *s, uint32_t slot, int *budget) {
    head *h = head_of(s);
    zs_entry *e = entry_at(s, slot);
    if (!(e->flags & DYING)) {
        e->flags |= DYING;
        unchain(s, slot);
    }
    if (e->contained) {
        uint32_t n = e->contained, k = n < (uint32_t)*budget ? n : (uint32_t)*budget;
        const uint32_t *list = list_of(s, e);
        e->contained = n - k;
        CRASH_POINT();
        release_slots(s, list + (n - k), k);
        *budget -= (int)k;
        if (e->contained) return 0;
    }
    h->inline_bytes -= inline_bytes_of(e);
    set_state(h, e, ZS_FREE);
    give_block(s, e->block);
    CRASH_POINT();
    give_entry(s, slot);
    h->deletes++;
    *budget -= 1;
    return 1;
}

/* Free what is doomed, about `budget` of it. Whether all is done. */
static int drain(zs_store *s, int budget) {
    head *h = head_of(s);
    while (h->doomed) {
        if (budget <= 0) return 0;
        uint32_t slot = h->doomed;
        zs_entry *e = entry_at(s, slot);
        h->doomed = e->older;
        e->older = e->newer = 0;
        if (e->holds || e->held_by_objects || !is_done(e->state)) {    /* found again by its id in the meantime */
            e->flags &= (uint8_t)~DOOMED;
            list_used(s, slot);
        } else if (!free_entry(s, slot, &budget)) {
            e->older = h->doomed;
            h->doomed = slot;
        }
    }
    return 1;
}

/* Free what has become free, letting others in between, and unlock. */
static inline void finish(zs_store *s) {
    head *h = head_of(s);
    while (UNLIKELY(h->doomed != 0) && !drain(s, RELEASE_BUDGET)) {
        unlock(s);
        lock(s);
    }
    unlock(s);
}

/* Drop the hold when nothing is left in it, and the entry with the last one. i is the first of its list. */
static inline void settle_hold(zs_store *s, zs_entry *e, uint32_t slot, uint32_t i) {
    zs_hold *o = hold_at(s, i);
    if (o->references || (o->pins && !FAULT(2)) || o->watching) return;
    if (FAULT(2)) o->pins = 0;
    drop_first_hold(s, e, i);
    if (!e->holds && !e->held_by_objects) unreferenced(s, slot);
}

/* ---- waking ------------------------------------------------------------------------------------------------------------------------ */

/* Bells to ring after the lock is given back. */
typedef struct { uint32_t n; uint16_t procs[ZS_MAX_PROCS]; } bells;

static inline void ring_watchers(zs_store *s, zs_entry *e, bells *b) {
    if (FAULT(1)) return;
    for (uint32_t i = e->holds; i; i = hold_at(s, i)->next) {
        zs_hold *o = hold_at(s, i);
        if (!o->watching) continue;
        zs_process *p = process_at(s, o->proc);
        ADD(&p->bell, 1);
        /* Pairs with zs_wait: it counts itself a sleeper, then the kernel compares the bell. One of the two sees the other. */
        if (__atomic_load_n(&p->sleepers, __ATOMIC_SEQ_CST) && b->n < ZS_MAX_PROCS) b->procs[b->n++] = o->proc;
    }
}

static inline void wake(zs_store *s, const bells *b) {
    for (uint32_t i = 0; i < b->n; i++) os_wake(&process_at(s, b->procs[i])->bell);
    if (b->n) __atomic_add_fetch(&head_of(s)->wakes, b->n, __ATOMIC_RELAXED);
}

/* ---- limbo: blocks of superseded claimants that may be writing still -------------------------------------------------------------- */

static void free_open_entry(zs_store *s, uint32_t slot) {
    head *h = head_of(s);
    zs_entry *e = entry_at(s, slot);
    uint32_t block = e->open_block;
    note_writer(s, e->writer, -1);
    set_state(h, e, ZS_FREE);
    give_block(s, block);
    give_entry(s, slot);
}

enum { ANY_ATTEMPT = -1 };

/* Kinds of limbo: the block is given up when its writer hears that it lost the claim, or (its own process took the claim from it, and other
 * threads may be at work on the block) when it lets go of that very attempt. */
enum { UNTIL_STALE, UNTIL_ABORTED };

/* Drop the blocks that the caller filled for a claim (of that attempt, or ANY_ATTEMPT) it lost. Whether there was one. */
static int drop_limbo_of(zs_store *s, uint32_t claimed, zs_proc writer, int64_t attempt) {
    head *h = head_of(s);
    uint32_t *link = &h->limbo, slot;
    int found = 0;
    while ((slot = *link)) {
        zs_entry *e = entry_at(s, slot);
        int held = e->kind == UNTIL_ABORTED && claimed && attempt == ANY_ATTEMPT;
        if (e->writer == writer && (e->target == claimed || !claimed) && (attempt == ANY_ATTEMPT || attempt == e->attempt) && !held) {
            *link = e->next;
            free_open_entry(s, slot);
            found = 1;
        } else {
            link = &e->next;
        }
    }
    return found;
}

static int drop_limbo(zs_store *s, uint32_t claimed, zs_proc writer) { return drop_limbo_of(s, claimed, writer, ANY_ATTEMPT); }

/* Before an entry changes hands: may it? An entry is needed when its block must go to limbo. */
static int may_fence(zs_store *s, const zs_entry *e) { return e->open_block && e->state == ZS_CLAIMED ? room_for(s, 1, 0) : ZS_OK; }

/* Part the entry from the block of its claimant; returns what may be freed once the entry's change is committed. */
static uint32_t fence(zs_store *s, zs_entry *e, uint32_t slot) {
    head *h = head_of(s);
    uint32_t block = e->state == ZS_CLAIMED ? e->open_block : 0;
    if (!block) return 0;
    if (!current(s, e->writer) || FAULT(14)) {
        note_writer(s, e->writer, -1);
        return block;
    }
    uint32_t i = take_entry(s);
    zs_entry *l = entry_at(s, i);
    memset(l->id, 0, ZS_ID_SIZE);
    l->attempt = e->attempt;
    l->writer = e->writer;
    l->target = slot;
    l->flags = LIMBO;
    l->kind = e->writer == s->self ? UNTIL_ABORTED : UNTIL_STALE;
    l->open_size = e->open_size;
    l->open_block = block;
    set_state(h, l, ZS_OPEN);    /* named twice until the caller commits: repair drops this one then */
    l->next = h->limbo;
    h->limbo = i;
    return 0;
}

/* ---- repair --------------------------------------------------------------------------------------------------------------------------- */

static void repair_journal(zs_store *s) {
    head *h = head_of(s);
    uint32_t slot = h->undo_slot;
    if (slot && slot < h->entry_bump) {
        zs_entry *e = entry_at(s, slot);
        if (e->state == CHANGING || e->state == h->undo.state) {
            uint32_t state = h->undo.state;
            if (state == ZS_SEALED) STORE(&e->state, CHANGING);
            BARRIER();
            memcpy((uint8_t *)e, &h->undo, offsetof(zs_entry, state));
            memcpy((uint8_t *)e + offsetof(zs_entry, attempt), (uint8_t *)&h->undo + offsetof(zs_entry, attempt),
                   sizeof(zs_entry) - offsetof(zs_entry, attempt));
            STORE(&e->state, state);
        }
    }
    BARRIER();
    h->undo_slot = 0;
}

static void repair_reset(zs_store *s) {
    head *h = head_of(s);
    memset(h->count, 0, sizeof h->count);
    h->hold_count = h->pin_count = h->inline_bytes = h->process_count = 0;
    h->entry_free = h->hold_free = h->hold_free_count = 0;
    h->oldest = h->newest = h->zombie = h->doomed = h->limbo = 0;
    if (h->bucket_count > h->bucket_committed) h->bucket_count = h->bucket_committed;
    memset(buckets_of(s), 0, 4ull * h->bucket_count);
    for (uint32_t i = 1; i < h->proc_bump; i++) {
        zs_process *p = process_at(s, i);
        p->expected = p->holds = p->writing = 0;
        if (p->pid) h->process_count++;
    }
}

/* Entries by state; limbo blocks that their claim names too; holder counts of lists. */
static void repair_entries(zs_store *s) {
    head *h = head_of(s);
    for (uint32_t i = 1; i < h->entry_bump; i++) {
        zs_entry *e = entry_at(s, i);
        if (e->state == ZS_OPEN && e->flags & LIMBO && valid_slot(s, e->target) && entry_at(s, e->target)->state == ZS_CLAIMED &&
            entry_at(s, e->target)->open_block == e->open_block)
            e->state = ZS_FREE;
        e->holds = e->held_by_objects = e->next = 0;
        e->flags &= (uint8_t)~(LISTED | DOOMED | DYING);
        if (lists_links(e)) e->older = e->newer = 0;
        h->count[e->state]++;
        if (e->state == ZS_FREE) give_entry(s, i);
        else if (e->flags & LIMBO) {
            e->next = h->limbo;
            h->limbo = i;
        } else if (!FAULT(16)) chain(s, i);
        h->inline_bytes += inline_bytes_of(e);
        if (e->state == ZS_OPEN || (e->open_block && (e->state == ZS_CLAIMED || e->state == ZS_SPILLED))) note_writer(s, e->writer, 1);
        if (is_pending(e->state)) note_target(s, e->target, 1);
    }
    for (uint32_t i = 1; i < h->entry_bump; i++) {
        zs_entry *e = entry_at(s, i);
        if (e->contained && has_list(e->state)) hold_slots(s, list_of(s, e), e->contained);
    }
}

static void repair_holds(zs_store *s) {
    head *h = head_of(s);
    for (uint32_t i = 1; i < h->hold_bump; i++) {
        zs_hold *o = hold_at(s, i);
        int good = o->slot && valid_slot(s, o->slot) && entry_at(s, o->slot)->state != ZS_FREE && o->proc < ZS_MAX_PROCS &&
                   process_at(s, o->proc)->pid && (o->references || o->pins || o->watching);
        if (good) {
            zs_entry *e = entry_at(s, o->slot);
            uint32_t twin = find_hold(s, e, o->proc);
            if (twin) {
                zs_hold *t = hold_at(s, twin);
                t->references += o->references;
                t->pins += o->pins;
                t->watching = (uint16_t)(t->watching + o->watching);
                good = 0;
            } else {
                o->next = e->holds;
                e->holds = i;
                h->hold_count++;
                h->pin_count += o->pins;
                process_at(s, o->proc)->holds++;
                continue;
            }
        }
        o->slot = 0;
        o->next = h->hold_free;
        h->hold_free = i;
        h->hold_free_count++;
    }
}

/* One extent: its tags, and the end of all. */
static void repair_extent(zs_store *s, uint32_t granule, uint64_t bytes) {
    head *h = head_of(s);
    uint32_t n = (uint32_t)granules_for(bytes);
    set_tags(s, granule, n, 0);
    h->used += n;
    if (granule + (uint64_t)n > h->top) h->top = granule + (uint64_t)n;
}

/* The allocator: extents are what entries name, everything between them is free. */
static void repair_blocks(zs_store *s) {
    head *h = head_of(s);
    uint32_t *tags = tags_of(s);
    uint64_t pages = (h->granules + TAGS_PER_PAGE - 1) / TAGS_PER_PAGE, g = 1;
    for (uint64_t page = 0; page < pages; page++)
        if (tag_ready(s, page * TAGS_PER_PAGE)) memset(tags + page * TAGS_PER_PAGE, 0, PAGE);
    h->class_map = 0;
    memset(h->sub_map, 0, sizeof h->sub_map);
    memset(h->lists, 0, sizeof h->lists);
    h->used = h->free_granules = 0;
    h->top = 1;
    for (uint32_t i = 1; i < h->entry_bump; i++) {
        zs_entry *e = entry_at(s, i);
        if (e->block && has_list(e->state)) {
            uint64_t bytes = extent_of(e);
            if (bytes) repair_extent(s, e->block, bytes);
            else e->block = 0;    /* it was being freed: nothing but its list was in the block, and that is gone */
        }
        if (e->open_block && (e->state == ZS_OPEN || e->state == ZS_CLAIMED || e->state == ZS_SPILLED)) repair_extent(s, e->open_block, open_extent(e));
    }
    while (g < h->top) {
        if (tag_ready(s, g) && tags[g]) {
            g += tags[g];
            continue;
        }
        uint64_t start = g;
        while (!tag_ready(s, g) || !tags[g]) g = tag_ready(s, g) ? g + 1 : (g / TAGS_PER_PAGE + 1) * TAGS_PER_PAGE;
        list_free(s, (uint32_t)start, (uint32_t)(g - start));
    }
}

/* Called with the orphaned lock held. May itself be cut short: the next comer starts again. */
static void repair(zs_store *s) {
    head *h = head_of(s);
    repair_journal(s);
    CRASH_POINT();
    repair_reset(s);
    repair_entries(s);
    CRASH_POINT();
    repair_holds(s);
    repair_blocks(s);
    CRASH_POINT();
    for (uint32_t i = 1; i < h->entry_bump; i++) {
        zs_entry *e = entry_at(s, i);
        /* cut short while it was found again, or taken out */
        if (e->state == ZS_ZOMBIE && !(e->flags & ZS_FLAG_NOTIFY)) set_state(h, e, layout_of(e));
        if (e->state == ZS_ZOMBIE && (e->holds || e->held_by_objects)) set_state(h, e, former_state(e));
        if (e->state != ZS_ZOMBIE) e->marks &= (uint8_t)~FILED;
        if (e->state == ZS_ZOMBIE) list_zombie(s, i);
        list_used(s, i);
        unreferenced(s, i);
    }
    while (!drain(s, RELEASE_BUDGET)) CRASH_POINT();
    for (uint32_t i = 1; i < h->proc_bump; i++) {
        zs_process *p = process_at(s, i);
        if (!p->pid) continue;
        ADD(&p->bell, 1);    /* the dead may have owed somebody a wake */
        if (LOAD(&p->sleepers)) os_wake(&p->bell);
    }
    h->repairs++;
}

/* ---- segment ------------------------------------------------------------------------------------------------------------------------- */

static int init_mutex(pthread_mutex_t *m) {
    pthread_mutexattr_t a;
    int rc = pthread_mutexattr_init(&a);
    if (rc == 0) rc = pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
    if (rc == 0) rc = pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
    if (rc == 0) rc = pthread_mutex_init(m, &a);
    pthread_mutexattr_destroy(&a);
    errno = rc;
    return rc == 0 ? ZS_OK : ZS_SYSTEM;
}

static void lay_out(head *h, uint64_t capacity, uint32_t entry_limit) {
    uint64_t at = round_up(sizeof(head), PAGE);
    h->capacity = round_up(capacity, PAGE);
    h->granules = h->capacity / ZS_GRANULE + 1;
    h->entry_limit = entry_limit;
    h->hold_limit = entry_limit < 0x7fffffffu ? entry_limit * 2 : 0xfffffffeu;
    h->bucket_limit = FIRST_BUCKETS;
    while (h->bucket_limit < entry_limit && h->bucket_limit < 1u << 30) h->bucket_limit *= 2;
    h->at_procs = at;
    at += round_up(ZS_MAX_PROCS * sizeof(zs_process), PAGE);
    h->at_buckets = at;
    at += round_up(4ull * h->bucket_limit, PAGE);
    h->at_entries = at;
    at += round_up((entry_limit + 1ull) * sizeof(zs_entry), PAGE);
    h->at_holds = at;
    at += round_up((h->hold_limit + 1ull) * sizeof(zs_hold), PAGE);
    h->at_tag_pages = at;
    at += round_up(h->granules / TAGS_PER_PAGE / 8 + 64, PAGE);
    h->at_tags = at;
    at += round_up(4 * h->granules, PAGE);
    h->at_data = round_up(at, 2ull << 20);
    h->total = round_up(h->at_data + h->granules * ZS_GRANULE, PAGE);
}

int zs_format(int fd, uint64_t data_capacity, uint32_t entry_limit) {
    head plan = {0};
    if (data_capacity < PAGE || data_capacity > (0xffffffffull - 64) * ZS_GRANULE || entry_limit < 16 || entry_limit > 1u << 30) return ZS_BAD_ARGUMENT;
    lay_out(&plan, data_capacity, entry_limit);
    int rc = os_truncate(fd, 0);
    if (rc == ZS_OK) rc = os_truncate(fd, plan.total);
    if (rc == ZS_OK) rc = os_commit(fd, 0, plan.at_procs + FIRST_PROCS * sizeof(zs_process));
    if (rc == ZS_OK) rc = os_commit(fd, plan.at_buckets, 4 * FIRST_BUCKETS);
    if (rc == ZS_OK) rc = os_commit(fd, plan.at_tag_pages, plan.at_tags - plan.at_tag_pages);
    if (rc != ZS_OK) return rc;
    head *h = os_map(fd, plan.at_procs);
    if (!h) return ZS_SYSTEM;
    *h = plan;
    h->version = ZS_VERSION;
    h->entry_bump = h->hold_bump = h->proc_bump = 1;
    h->entry_committed = h->hold_committed = 0;
    h->bucket_count = h->bucket_committed = FIRST_BUCKETS;
    h->growable = 1;
    h->committed = h->top = h->high_water = 1;
    rc = init_mutex(&h->lock);
    if (rc == ZS_OK) rc = init_mutex(&h->grow_lock);
    if (rc == ZS_OK) STORE(&h->magic, MAGIC);
    os_unmap(h, plan.at_procs);
    return rc;
}

int zs_attach(zs_store *s, int fd) {
    uint64_t size = os_size(fd), first = round_up(sizeof(head), PAGE);
    if (size < first) return ZS_BAD_SEGMENT;
    head *h = os_map(fd, first);
    if (!h) return ZS_SYSTEM;
    head again = *h;
    os_unmap(h, first);
    lay_out(&again, again.capacity, again.entry_limit);
    if (again.magic != MAGIC || again.version != ZS_VERSION || again.total != size) return ZS_BAD_SEGMENT;
    uint8_t *base = os_map(fd, size);
    if (!base) return ZS_SYSTEM;
    s->base = base;
    s->mapped = size;
    s->fd = fd;
    s->pid = os_pid();
    s->cpus = os_cpus();
    s->self = 0;
    os_advise(base + again.at_data, size - again.at_data);
    return ZS_OK;
}

void zs_detach(zs_store *s) {
    if (s->base) os_unmap(s->base, s->mapped);
    s->base = NULL;
    s->self = 0;
}

/* ---- processes ----------------------------------------------------------------------------------------------------------------------------- */

/* A record for (pid, start_time); *proc its handle. Called under the lock. */
static int enter(zs_store *s, uint32_t kind, uint32_t pid, uint64_t start_time, uint32_t parent, zs_proc *proc) {
    head *h = head_of(s);
    uint32_t i = 1;
    while (i < h->proc_bump && process_at(s, i)->pid) i++;
    if (i >= ZS_MAX_PROCS) return ZS_TOO_MANY;
    zs_process *p = process_at(s, i);
    uint32_t generation = (p->generation + 1) & 0xffffu;
    p->generation = generation ? generation : 1;
    memset((uint8_t *)p + offsetof(zs_process, start_time), 0, sizeof *p - offsetof(zs_process, start_time));
    p->start_time = start_time;
    p->kind = kind;
    p->parent = parent;
    if (i == h->proc_bump) h->proc_bump = i + 1;
    h->process_count++;
    STORE(&p->pid, pid);    /* commit */
    *proc = handle_of(s, i);
    return ZS_OK;
}

/* Records lie beyond the pages given at the start only in very busy segments. */
static int commit_processes(zs_store *s) {
    head *h = head_of(s);
    uint32_t bump = LOAD(&h->proc_bump);
    uint64_t want = bump + FIRST_PROCS < ZS_MAX_PROCS ? bump + FIRST_PROCS : ZS_MAX_PROCS;
    return bump < FIRST_PROCS / 2 ? ZS_OK : os_commit(s->fd, h->at_procs, want * sizeof(zs_process));
}

int zs_register_pid(zs_store *s, uint32_t kind, uint32_t pid, zs_proc *proc) {
    uint64_t start_time;
    if (kind == ZS_PROC_NONE || pid == 0) return ZS_BAD_ARGUMENT;
    if (os_start_time(pid, &start_time) <= 0) return ZS_NOT_FOUND;
    int rc = commit_processes(s);
    if (rc != ZS_OK) return rc;
    lock(s);
    rc = enter(s, kind, pid, start_time, 0, proc);
    if (rc == ZS_OK && kind == ZS_PROC_BROKER) STORE(&head_of(s)->broker, *proc);
    unlock(s);
    return rc;
}

int zs_register(zs_store *s, uint32_t kind) {
    if (s->self) return ZS_BAD_STATE;
    zs_proc proc;
    uint32_t pid = os_pid();
    int rc = zs_register_pid(s, kind, pid, &proc);
    if (rc != ZS_OK) return rc == ZS_NOT_FOUND ? ZS_SYSTEM : rc;
    s->self = proc;
    s->pid = pid;
    return ZS_OK;
}

int zs_adopt(zs_store *s, zs_proc proc) {
    uint32_t pid = os_pid();
    lock(s);
    zs_process *p = current(s, proc);
    int good = p && p->pid == pid;
    unlock(s);
    if (!good) return ZS_BAD_STATE;
    s->self = proc;
    s->pid = pid;
    return ZS_OK;
}

static void reap_hold(zs_store *s, uint32_t i) {
    zs_hold *o = hold_at(s, i);
    uint32_t slot = o->slot, proc = o->proc;
    zs_entry *e = entry_at(s, slot);
    if (find_hold(s, e, proc) != i) return;    /* cannot be: the list is derived from the holds */
    head_of(s)->pin_count -= o->pins;
    drop_first_hold(s, e, i);
    list_used(s, slot);
    if (!e->holds && !e->held_by_objects) unreferenced(s, slot);
}

/* An OPEN object that will never be sealed: free, or an empty system error for those who wait for it. */
static void give_up(zs_store *s, uint32_t slot) {
    head *h = head_of(s);
    zs_entry *e = entry_at(s, slot);
    uint32_t block = e->open_block;
    note_writer(s, e->writer, -1);
    bells b;
    b.n = 0;
    begin(s, e, slot);
    e->block = e->open_block = 0;
    e->size = e->inline_size = 0;
    e->contained = 0;
    e->older = e->newer = 0;
    e->writer = 0;
    e->kind = ZS_KIND_ERROR;
    e->flags = (uint8_t)((e->flags & ZS_FLAG_BROKER_WATCH) | ZS_FLAG_SYSTEM_ERROR);
    commit(s, e, ZS_SEALED);
    give_block(s, block);
    ring_watchers(s, e, &b);
    h->seals++;
    unreferenced(s, slot);
    wake(s, &b);    /* rare enough to be done under the lock */
}

/* Give back what the process was writing. */
static void reap_writing(zs_store *s, uint32_t slot, zs_proc proc) {
    zs_entry *e = entry_at(s, slot);
    if (e->writer != proc || e->state == ZS_FREE) return;
    if (e->flags & LIMBO && e->state == ZS_OPEN) drop_limbo(s, 0, proc);
    else if (e->state == ZS_OPEN) give_up(s, slot);
    else if ((e->state == ZS_CLAIMED || e->state == ZS_SPILLED) && e->open_block) {
        uint32_t block = e->open_block;
        STORE(&e->open_block, 0u);    /* commit */
        CRASH_POINT();
        e->older = e->newer = 0;
        note_writer(s, proc, -1);
        give_block(s, block);
        unreferenced(s, slot);
    }
}

enum { REAP_STEP = 4096 };

/* Give back everything of a process, a few thousand records per hold of the lock, then its record. */
static int give_back(zs_store *s, zs_proc proc) {
    head *h = head_of(s);
    uint32_t skip = FAULT(5) ? 1 : 0;
    for (uint32_t from = 1;; from += REAP_STEP) {
        lock(s);
        zs_process *p = current(s, proc);
        uint32_t end = h->hold_bump, to = from + REAP_STEP < end ? from + REAP_STEP : end;
        for (uint32_t i = from; p && p->holds && i < to; i++)
            if (hold_at(s, i)->slot && hold_at(s, i)->proc == index_of(proc)) {
                if (skip) skip = 0;
                else reap_hold(s, i);
            }
        int more = p && p->holds && to < end;
        finish(s);
        if (!p) return ZS_NOT_FOUND;
        if (!more) break;
    }
    for (uint32_t from = 1;; from += REAP_STEP) {
        lock(s);
        zs_process *p = current(s, proc);
        uint32_t end = h->entry_bump, to = from + REAP_STEP < end ? from + REAP_STEP : end;
        for (uint32_t i = from; p && p->writing && i < to; i++) reap_writing(s, i, proc);
        int more = p && p->writing && to < end;
        if (p && !more) {
            STORE(&p->pid, 0u);    /* commit */
            h->process_count--;
            h->reaped++;
        }
        finish(s);
        if (!p) return ZS_NOT_FOUND;
        if (!more) return ZS_OK;
    }
}

/* Copy (pid, start time) of a handle under the lock: a forked child changes both. */
static int identity(zs_store *s, zs_proc proc, uint32_t *pid, uint64_t *start_time) {
    lock(s);
    zs_process *p = current(s, proc);
    if (p) {
        *pid = p->pid;
        *start_time = p->start_time;
    }
    unlock(s);
    return p != NULL;
}

static int identity_alive(uint32_t pid, uint64_t start_time) {
    uint64_t now;
    int known = os_start_time(pid, &now);
    return known < 0 || (known && now == start_time);    /* whoever takes a living process for dead frees what it uses */
}

int zs_alive(zs_store *s, zs_proc proc) {
    uint32_t pid;
    uint64_t start_time;
    return identity(s, proc, &pid, &start_time) && identity_alive(pid, start_time);
}

int zs_reap(zs_store *s, zs_proc proc) {
    uint32_t pid;
    uint64_t start_time;
    if (!identity(s, proc, &pid, &start_time)) return ZS_NOT_FOUND;
    if (identity_alive(pid, start_time) && !FAULT(19)) return ZS_BAD_STATE;
    /* The record of an embryo whose parent is gone may become a living child's at any moment: from here on it may not. */
    lock(s);
    zs_process *p = current(s, proc);
    int same = p && p->pid == pid && p->start_time == start_time;
    if (same) p->parent = 0;
    unlock(s);
    if (!same) return p ? ZS_BAD_STATE : ZS_NOT_FOUND;
    return give_back(s, proc);
}

int zs_unregister(zs_store *s) {
    if (!s->self) return ZS_BAD_STATE;
    int rc = give_back(s, s->self);
    s->self = 0;
    return rc;
}

int zs_sweep(zs_store *s) {
    int n = 0;
    uint32_t end = LOAD(&head_of(s)->proc_bump);
    for (uint32_t i = 1; i < end; i++) {
        zs_process *p = process_at(s, i);
        if (!LOAD(&p->pid)) continue;    /* a hint: zs_reap looks again under the lock */
        zs_proc proc = handle_of(s, i);
        if (proc != s->self && zs_reap(s, proc) == ZS_OK) n++;
    }
    return n;
}

static int copy_holds(zs_store *s, zs_proc *embryo) {
    head *h = head_of(s);
    zs_process *p = current(s, s->self);
    if (!p) return ZS_BAD_STATE;
    int rc = room_for(s, 0, p->holds);
    if (rc != ZS_OK) return rc;
    rc = enter(s, p->kind, p->pid, p->start_time, self_of(s), embryo);
    if (rc != ZS_OK) return rc;
    uint32_t left = p->holds, end = h->hold_bump;
    for (uint32_t i = 1; left && i < end; i++) {
        zs_hold *o = hold_at(s, i);
        if (!o->slot || o->proc != self_of(s)) continue;
        left--;
        if (!o->references && !o->pins) continue;    /* another thread's watch only */
        zs_hold *copy = hold_at(s, add_hold(s, entry_at(s, o->slot), o->slot, index_of(*embryo)));
        copy->references = o->references;
        copy->pins = o->pins;
        h->pin_count += o->pins;
    }
    return ZS_OK;
}

int zs_fork_prepare(zs_store *s, zs_proc *embryo) {
    int rc = commit_processes(s);
    if (rc != ZS_OK) return rc;
    UNDER_LOCK(s, rc, copy_holds(s, embryo));
    return rc;
}

int zs_fork_child(zs_store *s, zs_proc embryo) {
    uint32_t pid = os_pid();
    uint64_t start_time;
    s->self = 0;
    s->pid = pid;
    if (os_start_time(pid, &start_time) <= 0) return ZS_SYSTEM;
    lock(s);
    zs_process *p = current(s, embryo);
    if (p && p->parent) {
        p->start_time = start_time;
        p->parent = 0;
        STORE(&p->pid, pid);    /* commit; cut short, the mismatch says that this process is gone, which is true */
        s->self = embryo;
    }
    unlock(s);
    return s->self ? ZS_OK : ZS_GONE;
}

int zs_fork_abort(zs_store *s, zs_proc embryo) {
    lock(s);
    zs_process *p = current(s, embryo);
    int good = p && p->parent == self_of(s) && p->pid == s->pid;
    unlock(s);
    return good ? give_back(s, embryo) : ZS_BAD_STATE;
}

int zs_next_orphan(zs_store *s, zs_proc proc, uint32_t *cursor, uint32_t *slot) {
    /* The scan reads without the lock: entries never go away, and a candidate is looked at again under it. */
    for (uint32_t i = *cursor ? *cursor : 1; i < LOAD(&head_of(s)->entry_bump); i++) {
        zs_entry *e = entry_at(s, i);
        if (!is_pending(LOAD(&e->state)) || (e->target != proc && e->writer != proc)) continue;
        lock(s);
        int found = is_pending(e->state) && (e->target == proc || (e->state == ZS_CLAIMED && e->writer == proc));
        unlock(s);
        if (!found) continue;
        *cursor = i + 1;
        *slot = i;
        return ZS_OK;
    }
    return ZS_LAST;
}

int zs_next_made(zs_store *s, zs_proc proc, uint32_t *cursor, uint32_t *slot) {
    for (uint32_t i = *cursor ? *cursor : 1; i < LOAD(&head_of(s)->entry_bump); i++) {
        zs_entry *e = entry_at(s, i);
        if (LOAD(&e->state) != ZS_PENDING || e->writer != proc) continue;
        lock(s);
        int found = e->state == ZS_PENDING && e->writer == proc;
        unlock(s);
        if (!found) continue;
        *cursor = i + 1;
        *slot = i;
        return ZS_OK;
    }
    return ZS_LAST;
}

uint64_t zs_word_get(zs_store *s, zs_proc proc, int word) {
    zs_process *p = current(s, proc);
    return p && word >= 0 && word < ZS_WORDS ? LOAD(&p->words[word]) : 0;
}

int zs_word_set(zs_store *s, zs_proc proc, int word, uint64_t value) {
    zs_process *p = current(s, proc);
    if (word < 0 || word >= ZS_WORDS) return ZS_BAD_ARGUMENT;
    if (!p) return ZS_NOT_FOUND;
    STORE(&p->words[word], value);
    return ZS_OK;
}

uint64_t zs_word_add(zs_store *s, zs_proc proc, int word, uint64_t delta) {
    zs_process *p = current(s, proc);
    return p && word >= 0 && word < ZS_WORDS ? ADD(&p->words[word], delta) : 0;
}

uint32_t zs_expected(zs_store *s, zs_proc proc) {
    zs_process *p = current(s, proc);
    return p ? LOAD(&p->expected) : 0;
}

int zs_ring(zs_store *s, zs_proc proc) {
    zs_process *p = current(s, proc);
    if (!p) return ZS_NOT_FOUND;
    ADD(&p->rings, 1);
    ADD(&p->bell, 1);
    if (__atomic_load_n(&p->sleepers, __ATOMIC_SEQ_CST)) os_wake(&p->bell);
    return ZS_OK;
}

uint64_t zs_global_get(zs_store *s, int word) { return word >= 0 && word < ZS_WORDS ? LOAD(&head_of(s)->words[word]) : 0; }

uint64_t zs_global_add(zs_store *s, int word, uint64_t delta) {
    return word >= 0 && word < ZS_WORDS ? ADD(&head_of(s)->words[word], delta) : 0;
}

/* ---- references ------------------------------------------------------------------------------------------------------------------------------ */

/* One more reference for the caller; room for a hold was asked for. */
static inline void refer(zs_store *s, zs_entry *e, uint32_t slot) { hold_for(s, e, slot, self_of(s))->references++; }

/* An entry was found by its id: a reference, and life again for a zombie. */
static int refer_found(zs_store *s, uint32_t slot) {
    int rc = room_for(s, 0, 1);
    if (rc != ZS_OK) return rc;
    zs_entry *e = entry_at(s, slot);
    if (!(FAULT(18) && e->holds)) refer(s, e, slot);
    if (e->state == ZS_ZOMBIE) {
        unlist_zombie(s, slot);
        set_state(head_of(s), e, former_state(e));
        e->marks &= (uint8_t)~FILED;
        list_used(s, slot);
    }
    return ZS_OK;
}

static int reference_locked(zs_store *s, const uint8_t *id, uint32_t *slot) {
    uint32_t i = find(s, id);
    if (!i) return ZS_NOT_FOUND;
    *slot = i;
    return refer_found(s, i);
}

int zs_reference(zs_store *s, const uint8_t *id, uint32_t *slot) {
    int rc;
    if (!s->self) return ZS_BAD_STATE;
    UNDER_LOCK(s, rc, reference_locked(s, id, slot));
    return rc;
}

static int reference_slot_locked(zs_store *s, uint32_t slot) {
    if (!valid_slot(s, slot) || entry_at(s, slot)->state == ZS_FREE || entry_at(s, slot)->flags & DYING) return ZS_NOT_FOUND;
    return refer_found(s, slot);
}

int zs_reference_slot(zs_store *s, uint32_t slot) {
    int rc;
    if (!s->self) return ZS_BAD_STATE;
    UNDER_LOCK(s, rc, reference_slot_locked(s, slot));
    return rc;
}

int zs_id_of(zs_store *s, uint32_t slot, uint8_t *id) {
    if (!slot || slot >= LOAD(&head_of(s)->entry_bump)) return ZS_NOT_FOUND;
    zs_entry *e = entry_at(s, slot);
    if (LOAD(&e->state) == ZS_FREE) return ZS_NOT_FOUND;
    memcpy(id, e->id, ZS_ID_SIZE);
    return ZS_OK;
}

int zs_makers(zs_store *s, uint32_t slot, zs_proc *target, zs_proc *claimant) {
    *target = *claimant = 0;
    if (!slot || slot >= LOAD(&head_of(s)->entry_bump)) return ZS_BAD_STATE;
    zs_entry *e = entry_at(s, slot);
    uint32_t state = LOAD(&e->state);
    if (state != ZS_PENDING && state != ZS_CLAIMED) return ZS_BAD_STATE;
    *target = LOAD(&e->target);
    if (state == ZS_CLAIMED) *claimant = LOAD(&e->writer);
    return ZS_OK;
}

static int release_locked(zs_store *s, uint32_t slot) {
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    uint32_t i = find_hold(s, e, self_of(s));
    if (!i || !hold_at(s, i)->references) return ZS_BAD_ARGUMENT;
    hold_at(s, i)->references--;
    CRASH_POINT();
    settle_hold(s, e, slot, i);
    return ZS_OK;
}

uint64_t zs_references(zs_store *s, uint32_t slot) {
    uint64_t count = 0;
    lock(s);
    if (valid_slot(s, slot)) {
        zs_entry *e = entry_at(s, slot);
        count = e->held_by_objects;
        for (uint32_t i = e->holds; i; i = hold_at(s, i)->next) count += hold_at(s, i)->references;
    }
    unlock(s);
    return count;
}

int zs_release(zs_store *s, uint32_t slot) {
    lock(s);
    int rc = release_locked(s, slot);
    finish(s);
    return rc;
}

int zs_release_many(zs_store *s, const uint32_t *slots, size_t n) {
    int worst = ZS_OK;
    for (size_t from = 0; from < n; from += 256) {
        lock(s);
        for (size_t i = from; i < n && i < from + 256; i++) {
            int rc = release_locked(s, slots[i]);
            if (rc != ZS_OK) worst = rc;
        }
        finish(s);
    }
    return worst;
}

static int reference_contained_locked(zs_store *s, uint32_t slot, size_t *done, uint32_t *slots, uint8_t *ids, size_t room) {
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    if (!is_done(e->state)) return ZS_BAD_STATE;
    size_t end = *done + 256, total = e->contained < room ? e->contained : room;
    if (end > total) end = total;
    const uint32_t *list = list_of(s, e);
    for (; *done < end; ++*done) {
        int rc = room_for(s, 0, 1);
        if (rc != ZS_OK) return rc;
        uint32_t other = list[*done];
        zs_entry *o = entry_at(s, other);
        refer(s, o, other);
        slots[*done] = other;
        if (ids) memcpy(ids + ZS_ID_SIZE * *done, o->id, ZS_ID_SIZE);
    }
    return *done < total ? ZS_EXISTS : ZS_OK;
}

int zs_reference_contained(zs_store *s, uint32_t slot, uint32_t *slots, uint8_t *ids, size_t room, size_t *n) {
    int rc;
    *n = 0;
    if (!s->self) return ZS_BAD_STATE;
    do UNDER_LOCK(s, rc, reference_contained_locked(s, slot, n, slots, ids, room));
    while (rc == ZS_EXISTS);
    return rc;
}

/* ---- making objects ------------------------------------------------------------------------------------------------------------------------------ */

/* A fresh entry with the caller's reference, FREE still: fill it, set its state, chain it. The hold comes first: repair drops holds on FREE entries. */
static inline zs_entry *new_entry(zs_store *s, const uint8_t *id, uint32_t job, uint32_t *slot) {
    uint32_t i = take_entry(s);
    zs_entry *e = entry_at(s, i);
    memcpy(e->id, id, ZS_ID_SIZE);
    e->job = job;
    hold_at(s, add_hold(s, e, i, self_of(s)))->references = 1;
    *slot = i;
    return e;
}

static inline void publish(zs_store *s, zs_entry *e, uint32_t slot, uint32_t state) {
    set_state(head_of(s), e, state);
    chain(s, slot);
}

/* Before a new entry: ZS_OK, or ZS_EXISTS with a reference on what is there, or what stands in the way. */
static inline int before_new(zs_store *s, const uint8_t *id, uint32_t *slot) {
    uint32_t i = find(s, id);
    if (UNLIKELY(i != 0)) {
        int rc = refer_found(s, i);
        *slot = i;
        return rc == ZS_OK ? ZS_EXISTS : rc;
    }
    return room_for(s, 1, 1);
}

static int put_inline_locked(zs_store *s, const uint8_t *id, const void *data, uint32_t size, uint8_t kind, uint8_t flags, uint32_t job,
                             uint32_t *slot) {
    head *h = head_of(s);
    int rc = before_new(s, id, slot);
    if (rc != ZS_OK) return rc;
    zs_entry *e = new_entry(s, id, job, slot);
    e->size = e->inline_size = (uint16_t)size;
    e->kind = kind;
    e->flags = flags;
    if (size) memcpy(e->inline_data, data, size);
    publish(s, e, *slot, ZS_SEALED);
    h->inline_bytes += size;
    h->puts++;
    return ZS_OK;
}

int zs_put_inline(zs_store *s, const uint8_t *id, const void *data, uint32_t size, uint8_t kind, uint32_t job, uint32_t *slot) {
    int rc;
    if (size > ZS_INLINE_MAX) return ZS_BAD_ARGUMENT;
    if (!s->self) return ZS_BAD_STATE;
    UNDER_LOCK(s, rc, put_inline_locked(s, id, data, size, kind, 0, job, slot));
    return rc;
}

int zs_put_life(zs_store *s, const uint8_t *id, const void *data, uint32_t size, uint32_t job, uint32_t *slot) {
    int rc;
    if (size > ZS_INLINE_MAX) return ZS_BAD_ARGUMENT;
    if (!s->self) return ZS_BAD_STATE;
    UNDER_LOCK(s, rc, put_inline_locked(s, id, data, size, 0, ZS_FLAG_NOTIFY, job, slot));
    return rc;
}

static int create_locked(zs_store *s, const uint8_t *id, uint64_t size, uint32_t contained, uint32_t job, uint32_t *slot, uint8_t **data) {
    uint64_t bytes = value_extent(size, contained);
    uint32_t block = 0;
    int rc = before_new(s, id, slot);
    if (rc == ZS_OK && bytes > ZS_INLINE_MAX) rc = take_block(s, bytes, &block);
    if (rc != ZS_OK) return rc;
    zs_entry *e = new_entry(s, id, job, slot);
    e->open_size = size | (uint64_t)contained << OPEN_SIZE_BITS;
    e->open_block = block;
    e->writer = s->self;
    publish(s, e, *slot, ZS_OPEN);
    note_writer(s, s->self, 1);
    *data = block ? data_at(s, block) : e->inline_data;
    return ZS_OK;
}

static int size_fits(const zs_store *s, uint64_t size, uint32_t contained) {
    return size <= OPEN_SIZE_MASK && contained <= MOST_CONTAINED && value_extent(size, contained) <= head_of(s)->capacity;
}

int zs_create(zs_store *s, const uint8_t *id, uint64_t size, uint32_t contained, uint32_t job, uint32_t *slot, uint8_t **data) {
    int rc;
    if (!s->self) return ZS_BAD_STATE;
    if (!size_fits(s, size, contained)) return ZS_TOO_LARGE;
    UNDER_LOCK(s, rc, create_locked(s, id, size, contained, job, slot, data));
    return rc;
}

static int all_valid(const zs_store *s, const uint32_t *slots, uint32_t n) {
    for (uint32_t i = 0; i < n; i++)
        if (!valid_slot(s, slots[i]) || entry_at(s, slots[i])->state == ZS_FREE || entry_at(s, slots[i])->flags & (DYING | LIMBO)) return 0;
    return 1;
}

/* A change to SEALED: what to give back and whom to tell afterwards. */
typedef struct {
    uint32_t block, open_block;          /* to be freed */
    uint32_t n, copy[ZS_INLINE_MAX / 4]; /* the former list: in `copy` when it was inline */
    uint32_t tell;
} sealing;

/* Journal the entry and note what it gives up. */
static inline void begin_seal(zs_store *s, zs_entry *e, uint32_t slot, sealing *w) {
    w->block = e->block;
    w->n = has_list(e->state) ? e->contained : 0;
    w->open_block = 0;
    w->tell = e->flags & ZS_FLAG_BROKER_WATCH;
    if (w->n && !w->block) memcpy(w->copy, list_of(s, e), 4ull * w->n);
    begin(s, e, slot);
}

static inline void set_inline(zs_entry *e, const void *data, uint32_t size) {
    if (size) memcpy(e->inline_data, data, size);
    e->size = e->inline_size = (uint8_t)size;
    e->block = 0;
    e->contained = 0;
}

static inline void set_kind(zs_entry *e, uint8_t kind, uint8_t flags) {
    e->kind = kind;
    e->flags = (uint8_t)((flags & PUBLIC_FLAGS & ~ZS_FLAG_BROKER_WATCH) | (e->flags & ZS_FLAG_NOTIFY));
    e->marks = 0;
    e->writer = 0;
    e->open_block = 0;
    e->older = e->newer = 0;
}

/* Commit; then give back the former list and blocks and ring. Returns the code of the call. */
static inline int end_seal(zs_store *s, zs_entry *e, uint32_t slot, sealing *w, zs_proc target, bells *b) {
    head *h = head_of(s);
    commit(s, e, ZS_SEALED);
    CRASH_POINT();
    if (target) note_target(s, target, -1);
    ring_watchers(s, e, b);
    h->seals++;
    if (!e->block) h->inline_bytes += e->inline_size;
    if (w->n && !FAULT(4)) release_slots(s, w->block ? (const uint32_t *)data_at(s, w->block) : w->copy, w->n);
    give_block(s, w->block);
    give_block(s, w->open_block);
    list_used(s, slot);
    if (!e->holds && !e->held_by_objects) unreferenced(s, slot);
    return w->tell ? ZS_SEALED_TELL_BROKER : ZS_OK;
}

/* Make the open block (or the inline bytes of an OPEN entry) the sealed value, under another id when there is a `name`. Fewer slots than asked for leave
 * the block's end unused: cut. */
static int seal_open(zs_store *s, zs_entry *e, uint32_t slot, const uint8_t *name, uint8_t kind, uint8_t flags, const uint32_t *contained, uint32_t n,
                     bells *b) {
    uint32_t block = e->open_block, was = e->state;
    uint64_t size = open_bytes(e);
    zs_proc target = is_pending(was) ? e->target : 0;
    uint32_t keep = (uint32_t)granules_for(value_extent(size, n)), cut = 0;
    sealing w;
    if (n > open_slots(e) || !all_valid(s, contained, n)) return ZS_BAD_ARGUMENT;
    if (block && keep < tags_of(s)[block]) {
        int rc = may_cut(s, block, block, keep);
        if (rc != ZS_OK) return rc;
        cut = 1;
    }
    uint8_t *data = block ? data_at(s, block) : e->inline_data;
    if (n) {
        memset(data + size, 0, round4(size) - size);
        memcpy(data + round4(size), contained, 4ull * n);
    }
    note_writer(s, e->writer, -1);
    if (name) unchain(s, slot);
    begin_seal(s, e, slot, &w);
    if (name) {
        memcpy(e->id, name, ZS_ID_SIZE);
        chain(s, slot);
    }
    e->block = keep ? block : 0;
    e->size = size;
    e->inline_size = e->block ? 0 : (uint8_t)size;
    e->contained = n;
    set_kind(e, kind, flags);
    hold_slots(s, contained, n);
    if (cut && keep) cut_block(s, block, block, keep);
    int rc = end_seal(s, e, slot, &w, target, b);
    if (cut && !keep) give_block(s, block);
    return rc;
}

static int seal_locked(zs_store *s, uint32_t slot, uint8_t kind, uint8_t flags, const uint32_t *contained, uint32_t n, bells *b) {
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    if (e->state != ZS_OPEN) return ZS_BAD_STATE;
    if (e->writer != s->self) return ZS_STALE;
    head_of(s)->puts++;
    return seal_open(s, e, slot, NULL, kind, flags, contained, n, b);
}

int zs_seal(zs_store *s, uint32_t slot, uint8_t kind, uint8_t flags, const uint32_t *contained, uint32_t n) {
    int rc;
    bells b;
    b.n = 0;
    UNDER_LOCK(s, rc, seal_locked(s, slot, kind, flags, contained, n, &b));
    wake(s, &b);
    return rc;
}

static int seal_as_locked(zs_store *s, uint32_t *slot, const uint8_t *id, uint8_t kind, uint8_t flags, const uint32_t *contained, uint32_t n,
                          bells *b) {
    uint32_t draft = *slot, other = FAULT(26) ? 0 : find(s, id);
    if (!valid_slot(s, draft)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, draft);
    if (e->state != ZS_OPEN || e->flags & LIMBO) return ZS_BAD_STATE;
    if (e->writer != s->self) return ZS_STALE;
    if (other) {
        int rc = refer_found(s, other);
        if (rc != ZS_OK) return rc;
        CRASH_POINT();
        reap_writing(s, draft, s->self);
        release_locked(s, draft);
        *slot = other;
        return ZS_EXISTS;
    }
    head_of(s)->puts++;
    return seal_open(s, e, draft, id, kind, flags, contained, n, b);
}

int zs_seal_as(zs_store *s, uint32_t *slot, const uint8_t *id, uint8_t kind, uint8_t flags, const uint32_t *contained, uint32_t n) {
    int rc;
    bells b;
    b.n = 0;
    UNDER_LOCK(s, rc, seal_as_locked(s, slot, id, kind, flags, contained, n, &b));
    wake(s, &b);
    return rc;
}

static int abort_locked(zs_store *s, uint32_t slot) {
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    if (head_of(s)->limbo && drop_limbo(s, slot, s->self)) return ZS_OK;
    if (e->writer != s->self || (e->state != ZS_OPEN && !(e->state == ZS_CLAIMED && e->open_block))) return ZS_BAD_STATE;
    reap_writing(s, slot, s->self);
    return ZS_OK;
}

int zs_abort(zs_store *s, uint32_t slot) {
    lock(s);
    int rc = abort_locked(s, slot);
    finish(s);
    return rc;
}

static int abort_result_locked(zs_store *s, uint32_t slot, uint32_t attempt) {
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    if (head_of(s)->limbo && drop_limbo_of(s, slot, s->self, attempt)) return ZS_OK;
    if (e->writer != s->self || e->state != ZS_CLAIMED || !e->open_block) return ZS_BAD_STATE;
    if (e->attempt != attempt && !FAULT(25)) return ZS_STALE;
    reap_writing(s, slot, s->self);
    return ZS_OK;
}

int zs_abort_result(zs_store *s, uint32_t slot, uint32_t attempt) {
    lock(s);
    int rc = abort_result_locked(s, slot, attempt);
    finish(s);
    return rc;
}

/* ---- results of tasks ------------------------------------------------------------------------------------------------------------------------------ */

typedef struct {
    const uint8_t *id;
    zs_proc target;
    uint32_t job;
    uint8_t flags;
    const uint32_t *deps;
    uint32_t n_deps;
    const void *spec;
    uint32_t spec_size;
} expectation;

static int expect_locked(zs_store *s, const expectation *x, uint32_t *slot) {
    uint64_t bytes = 4ull * x->n_deps + x->spec_size;
    uint32_t block = 0;
    int rc = before_new(s, x->id, slot);
    if (rc != ZS_OK) return rc;
    if (x->target && !current(s, x->target) && !FAULT(22)) return ZS_GONE;
    if (!all_valid(s, x->deps, x->n_deps)) return ZS_BAD_ARGUMENT;
    if (bytes > ZS_INLINE_MAX && (rc = take_block(s, bytes, &block)) != ZS_OK) return rc;
    zs_entry *e = new_entry(s, x->id, x->job, slot);
    uint8_t *at = block ? data_at(s, block) : e->inline_data;
    if (x->n_deps) memcpy(at, x->deps, 4ull * x->n_deps);
    if (x->spec_size) memcpy(at + 4ull * x->n_deps, x->spec, x->spec_size);
    e->size = x->spec_size;
    e->contained = x->n_deps;
    e->block = block;
    e->target = x->target;
    e->writer = s->self;    /* while PENDING: who made the call */
    e->flags = x->flags & PUBLIC_FLAGS;
    publish(s, e, *slot, ZS_PENDING);
    hold_slots(s, x->deps, x->n_deps);
    note_target(s, x->target, 1);
    return ZS_OK;
}

int zs_expect(zs_store *s, const uint8_t *id, zs_proc target, uint32_t job, uint8_t flags, const uint32_t *deps, uint32_t n_deps,
              const void *spec, uint32_t spec_size, uint32_t *slot) {
    expectation x = {id, target, job, flags, deps, n_deps, spec, spec ? spec_size : 0};
    int rc;
    if (!s->self) return ZS_BAD_STATE;
    if (4ull * n_deps + x.spec_size > head_of(s)->capacity) return ZS_TOO_LARGE;
    UNDER_LOCK(s, rc, expect_locked(s, &x, slot));
    return rc;
}

/* (Nobody makes a value once more that another node has, or is making: a copy of its task may be left here.) */
static inline int claimable(const zs_entry *e, uint32_t attempt) {
    if (e->marks & (FAULT(27) ? ZS_MARK_ELSEWHERE : ZS_MARK_ELSEWHERE | ZS_MARK_SENT)) return 0;
    return (e->state == ZS_PENDING || (FAULT(10) && e->state == ZS_CLAIMED)) && e->attempt == attempt;
}

/* Is the value there, or on another node? */
static inline int is_settled(const zs_entry *e) { return is_done(e->state) || (e->state == ZS_PENDING && e->marks & ZS_MARK_ELSEWHERE); }

static inline void claim(zs_store *s, zs_entry *e) {
    e->writer = s->self;
    set_state(head_of(s), e, ZS_CLAIMED);
    head_of(s)->claims++;
}

int zs_claim(zs_store *s, const uint8_t *id, uint32_t attempt, uint32_t *slot) {
    return zs_claim_many(s, id, 1, attempt, slot);
}

int zs_claim_many(zs_store *s, const uint8_t *ids, uint32_t n, uint32_t attempt, uint32_t *slots) {
    int rc = ZS_OK, any = 0;
    if (!s->self) return ZS_BAD_STATE;
    lock(s);
    for (uint32_t i = 0; i < n && rc == ZS_OK; i++) {
        slots[i] = find(s, ids + (size_t)ZS_ID_SIZE * i);
        if (!slots[i]) rc = ZS_NOT_FOUND;
        else if (claimable(entry_at(s, slots[i]), attempt)) any = 1;
        else if (!is_settled(entry_at(s, slots[i]))) rc = ZS_STALE;
    }
    if (rc == ZS_OK && !any) rc = ZS_STALE;
    for (uint32_t i = 0; i < n && rc == ZS_OK; i++) {
        zs_entry *e = entry_at(s, slots[i]);
        if (claimable(e, attempt)) claim(s, e);
        else if (!is_settled(e)) rc = ZS_BAD_ARGUMENT;    /* named twice */
    }
    unlock(s);
    return rc;
}

/* Is the caller the claimant of this attempt? What it wrote in vain is dropped otherwise. */
static int check_claim(zs_store *s, uint32_t slot, uint32_t attempt) {
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    if (e->state == ZS_CLAIMED && e->writer == s->self && (e->attempt == attempt || FAULT(3))) return ZS_OK;
    if (FAULT(11) && e->state == ZS_CLAIMED) return ZS_OK;
    head_of(s)->stale_seals++;
    if (head_of(s)->limbo) drop_limbo(s, slot, s->self);
    return ZS_STALE;
}

static int seal_inline_locked(zs_store *s, uint32_t slot, const void *data, uint32_t size, uint8_t kind, uint8_t flags, bells *b) {
    zs_entry *e = entry_at(s, slot);
    zs_proc target = e->target;
    sealing w;
    if (e->open_block) note_writer(s, e->writer, -1);
    begin_seal(s, e, slot, &w);
    w.open_block = e->open_block;
    set_inline(e, data, size);
    CRASH_POINT();
    set_kind(e, kind, flags);
    return end_seal(s, e, slot, &w, target, b);
}

int zs_seal_inline(zs_store *s, uint32_t slot, uint32_t attempt, const void *data, uint32_t size, uint8_t kind, uint8_t flags) {
    bells b;
    b.n = 0;
    if (size > ZS_INLINE_MAX) return ZS_BAD_ARGUMENT;
    lock(s);
    int rc = check_claim(s, slot, attempt);
    if (rc == ZS_OK) rc = seal_inline_locked(s, slot, data, size, kind, flags, &b);
    finish(s);
    wake(s, &b);
    return rc;
}

static int open_result_locked(zs_store *s, uint32_t slot, uint32_t attempt, uint64_t size, uint32_t contained, uint8_t **data) {
    uint32_t block;
    uint64_t bytes = value_extent(size, contained);
    int rc = check_claim(s, slot, attempt);
    if (rc != ZS_OK) return rc;
    zs_entry *e = entry_at(s, slot);
    if (e->open_block) reap_writing(s, slot, s->self);    /* opened before: a second try with another size */
    rc = take_block(s, bytes ? bytes : 1, &block);
    if (rc != ZS_OK) return rc;
    e->open_size = size | (uint64_t)contained << OPEN_SIZE_BITS;
    CRASH_POINT();
    STORE(&e->open_block, block);    /* commit */
    note_writer(s, s->self, 1);
    *data = data_at(s, block);
    return ZS_OK;
}

int zs_open_result(zs_store *s, uint32_t slot, uint32_t attempt, uint64_t size, uint32_t contained, uint8_t **data) {
    int rc;
    if (!size_fits(s, size, contained)) return ZS_TOO_LARGE;
    UNDER_LOCK(s, rc, open_result_locked(s, slot, attempt, size, contained, data));
    return rc;
}

static int seal_result_locked(zs_store *s, uint32_t slot, uint32_t attempt, uint8_t kind, uint8_t flags, const uint32_t *contained, uint32_t n,
                              bells *b) {
    int rc = check_claim(s, slot, attempt);
    if (rc != ZS_OK) return rc;
    zs_entry *e = entry_at(s, slot);
    if (!e->open_block) return ZS_BAD_STATE;
    return seal_open(s, e, slot, NULL, kind, flags, contained, n, b);
}

int zs_seal_result(zs_store *s, uint32_t slot, uint32_t attempt, uint8_t kind, uint8_t flags, const uint32_t *contained, uint32_t n) {
    int rc;
    bells b;
    b.n = 0;
    UNDER_LOCK(s, rc, seal_result_locked(s, slot, attempt, kind, flags, contained, n, &b));
    wake(s, &b);
    return rc;
}

static int retry_locked(zs_store *s, uint32_t slot, zs_proc target, uint32_t *attempt) {
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    int sealed = e->state == ZS_SEALED && e->flags & ZS_FLAG_SYSTEM_ERROR && !(e->flags & (DOOMED | DYING));
    if (!is_pending(e->state) && !(sealed && !is_pinned(s, e))) return ZS_BAD_STATE;
    if (target && !current(s, target)) return ZS_GONE;
    int rc = may_fence(s, e);
    if (rc != ZS_OK) return rc;
    zs_proc former = e->target;
    uint32_t block = fence(s, e, slot);
    sealing w;
    if (sealed) {
        unlist_used(s, slot);
        head_of(s)->inline_bytes -= inline_bytes_of(e);
    }
    const uint32_t *list = e->block ? list_of(s, e) : w.copy;
    begin_seal(s, e, slot, &w);
    if (!FAULT(20)) STORE(&e->attempt, e->attempt + 1);
    e->open_block = 0;
    e->older = e->newer = 0;
    e->writer = 0;
    e->target = target;
    e->marks &= ZS_MARK_WANTED;
    if (sealed) {
        e->block = 0;
        e->size = e->inline_size = 0;
        e->contained = 0;
        e->kind = 0;
        e->flags &= (uint8_t)~ZS_FLAG_SYSTEM_ERROR;
    }
    commit(s, e, ZS_PENDING);
    if (sealed) {
        release_slots(s, list, w.n);
        give_block(s, w.block);
    } else {
        note_target(s, former, -1);
    }
    note_target(s, target, 1);
    give_block(s, block);
    *attempt = e->attempt;
    return ZS_OK;
}

int zs_retry(zs_store *s, uint32_t slot, zs_proc target, uint32_t *attempt) {
    int rc;
    UNDER_LOCK(s, rc, retry_locked(s, slot, target, attempt));
    return rc;
}

int zs_retarget(zs_store *s, uint32_t slot, zs_proc target) {
    int rc = ZS_BAD_STATE;
    lock(s);
    if (target && !current(s, target)) rc = ZS_GONE;
    else if (valid_slot(s, slot) && entry_at(s, slot)->state == ZS_PENDING) {
        zs_entry *e = entry_at(s, slot);
        note_target(s, e->target, -1);
        STORE(&e->target, target);    /* commit */
        note_target(s, target, 1);
        rc = ZS_OK;
    }
    unlock(s);
    return rc;
}

static int take_over_locked(zs_store *s, uint32_t slot, uint32_t marks, uint32_t *attempt) {
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    if (!is_pending(e->state) || (e->marks & marks) != marks) return ZS_BAD_STATE;
    int rc = may_fence(s, e);
    if (rc != ZS_OK) return rc;
    uint32_t block = fence(s, e, slot);
    begin(s, e, slot);
    STORE(&e->attempt, e->attempt + 1);
    e->open_block = 0;
    e->older = e->newer = 0;
    e->writer = s->self;
    commit(s, e, ZS_CLAIMED);
    give_block(s, block);
    *attempt = e->attempt;
    return ZS_OK;
}

int zs_take_over(zs_store *s, uint32_t slot, uint32_t *attempt) {
    int rc;
    if (!s->self) return ZS_BAD_STATE;
    UNDER_LOCK(s, rc, take_over_locked(s, slot, 0, attempt));
    return rc;
}

int zs_take_copy(zs_store *s, uint32_t slot, uint32_t *attempt) {
    int rc;
    if (!s->self) return ZS_BAD_STATE;
    UNDER_LOCK(s, rc, take_over_locked(s, slot, FAULT(24) ? 0 : ZS_MARK_ELSEWHERE, attempt));
    return rc;
}

static int seal_forced_locked(zs_store *s, uint32_t slot, const void *data, uint32_t size, uint8_t kind, uint8_t flags, bells *b) {
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    if (!is_pending(e->state)) return ZS_BAD_STATE;
    int rc = may_fence(s, e);
    if (rc != ZS_OK) return rc;
    zs_proc target = e->target;
    sealing w;
    uint32_t block = fence(s, e, slot);
    begin_seal(s, e, slot, &w);
    w.open_block = block;
    STORE(&e->attempt, e->attempt + 1);
    set_inline(e, data, size);
    set_kind(e, kind, flags);
    return end_seal(s, e, slot, &w, target, b);
}

int zs_seal_forced(zs_store *s, uint32_t slot, const void *data, uint32_t size, uint8_t kind, uint8_t flags) {
    int rc;
    bells b;
    b.n = 0;
    if (size > ZS_INLINE_MAX) return ZS_BAD_ARGUMENT;
    UNDER_LOCK(s, rc, seal_forced_locked(s, slot, data, size, kind, flags, &b));
    wake(s, &b);
    return rc;
}

/* ---- values on other nodes -------------------------------------------------------------------------------------------------------------------------- */

static int elsewhere_locked(zs_store *s, uint32_t slot, int made, int *wanted, bells *b) {
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    if (e->state != ZS_PENDING) return ZS_BAD_STATE;
    zs_proc target = e->target;
    sealing w;
    begin_seal(s, e, slot, &w);
    e->block = e->open_block = 0;
    e->size = e->inline_size = 0;
    e->contained = 0;
    e->older = e->newer = 0;
    e->writer = e->target = 0;
    e->flags |= ZS_FLAG_NOTIFY;
    e->marks = (uint8_t)((e->marks & ZS_MARK_WANTED) | ZS_MARK_REMOTE | (made ? ZS_MARK_ELSEWHERE : 0));
    commit(s, e, ZS_PENDING);
    if (target) note_target(s, target, -1);
    if (made) ring_watchers(s, e, b);
    if (w.n) release_slots(s, w.block ? (const uint32_t *)data_at(s, w.block) : w.copy, w.n);
    give_block(s, w.block);
    *wanted = (e->marks & ZS_MARK_WANTED) != 0;
    if (!e->holds && !e->held_by_objects) unreferenced(s, slot);
    return ZS_OK;
}

int zs_elsewhere(zs_store *s, uint32_t slot, int made, int *wanted) {
    int rc;
    bells b;
    b.n = 0;
    UNDER_LOCK(s, rc, elsewhere_locked(s, slot, made, wanted, &b));
    wake(s, &b);
    return rc;
}

int zs_send_away(zs_store *s, uint32_t slot) {
    int rc = ZS_BAD_STATE;
    lock(s);
    zs_entry *e = valid_slot(s, slot) ? entry_at(s, slot) : NULL;
    if (e && e->state == ZS_PENDING && !(e->marks & ZS_MARK_SENT)) {
        __atomic_store_n(&e->marks, (uint8_t)(e->marks | ZS_MARK_SENT), __ATOMIC_RELEASE);
        rc = ZS_OK;
    }
    unlock(s);
    return rc;
}

size_t zs_want(zs_store *s, const uint32_t *slots, size_t n, uint32_t *found) {
    size_t count = 0;
    for (size_t from = 0; from < n; from += 256) {
        lock(s);
        for (size_t k = from; k < n && k < from + 256; k++) {
            if (!valid_slot(s, slots[k])) continue;
            zs_entry *e = entry_at(s, slots[k]);
            if (!is_pending(e->state) || e->marks & ZS_MARK_WANTED) continue;
            if (e->marks & ZS_MARK_ELSEWHERE) found[count++] = (uint32_t)k;
            __atomic_store_n(&e->marks, (uint8_t)(e->marks | ZS_MARK_WANTED), __ATOMIC_RELEASE);
        }
        unlock(s);
    }
    return count;
}

uint32_t zs_marks(zs_store *s, uint32_t slot) { return LOAD(&entry_at(s, slot)->marks) & ~FILED; }

int zs_spec(zs_store *s, uint32_t slot, void *buffer, uint32_t *size, uint32_t *attempt) {
    int rc = ZS_NOT_FOUND;
    uint32_t room = *size;
    lock(s);
    if (valid_slot(s, slot)) {
        zs_entry *e = entry_at(s, slot);
        if (attempt) *attempt = e->attempt;
        if (is_pending(e->state) && e->size) {
            *size = (uint32_t)e->size;
            rc = e->size > room ? ZS_TOO_LARGE : ZS_OK;
            if (rc == ZS_OK) memcpy(buffer, (uint8_t *)(list_of(s, e) + e->contained), e->size);
        }
    }
    unlock(s);
    return rc;
}

/* ---- reading ------------------------------------------------------------------------------------------------------------------------------------------ */

static inline uint32_t seen_state(const zs_store *s, uint32_t slot) {
    uint32_t state = LOAD(&entry_at(s, slot)->state);
    return UNLIKELY(state == CHANGING) ? (uint32_t)ZS_PENDING : state;
}

uint32_t zs_state_of(zs_store *s, uint32_t slot) { return seen_state(s, slot); }

uint32_t zs_attempt_of(zs_store *s, uint32_t slot) { return LOAD(&entry_at(s, slot)->attempt); }

static int copy_inline(const zs_entry *e, void *buffer, uint32_t *size, uint8_t *kind, uint8_t *flags) {
    if (e->state != ZS_SEALED || e->block) return ZS_BAD_STATE;
    memcpy(buffer, e->inline_data, ZS_INLINE_MAX);
    *size = e->inline_size;
    *kind = e->kind;
    *flags = e->flags & PUBLIC_FLAGS;
    return ZS_OK;
}

int zs_read_inline(zs_store *s, uint32_t slot, void *buffer, uint32_t *size, uint8_t *kind, uint8_t *flags) {
    zs_entry *e = entry_at(s, slot);
    /* A sealed value is replaced only with another attempt number, or passes through CHANGING: unequal looks take the lock. */
    uint32_t state = LOAD(&e->state), attempt = LOAD(&e->attempt);
    if (state != ZS_SEALED && state != CHANGING) return ZS_BAD_STATE;
    if (LIKELY(state == ZS_SEALED)) {
        int rc = copy_inline(e, buffer, size, kind, flags);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (LIKELY(LOAD(&e->state) == ZS_SEALED && LOAD(&e->attempt) == attempt)) return rc;
    }
    lock(s);
    int rc = copy_inline(e, buffer, size, kind, flags);
    unlock(s);
    return rc;
}

static void fill_view(const zs_store *s, zs_entry *e, zs_view *view) {
    view->state = e->state;
    view->attempt = e->attempt;
    view->kind = e->kind;
    view->flags = e->flags & PUBLIC_FLAGS;
    view->inline_size = e->inline_size;
    view->size = e->state == ZS_OPEN ? open_bytes(e) : e->size;
    view->data = NULL;
    const uint8_t *at = e->block ? data_at(s, e->block) : e->inline_data;
    view->offset = (uint64_t)(at - s->base);
}

static int pin_locked(zs_store *s, uint32_t slot, zs_view *view) {
    head *h = head_of(s);
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    uint32_t i = find_hold(s, e, self_of(s));
    fill_view(s, e, view);
    if (!i) return ZS_BAD_ARGUMENT;
    if (e->state != ZS_SEALED) return ZS_BAD_STATE;
    if (e->flags & LISTED && !FAULT(13)) unlist_used(s, slot);
    hold_at(s, i)->pins++;
    h->pin_count++;
    h->gets++;
    view->data = s->base + view->offset;
    return ZS_OK;
}

int zs_pin(zs_store *s, uint32_t slot, zs_view *view) {
    lock(s);
    int rc = pin_locked(s, slot, view);
    unlock(s);
    return rc;
}

static int unpin_locked(zs_store *s, uint32_t slot) {
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    uint32_t i = find_hold(s, e, self_of(s));
    if (!i || !hold_at(s, i)->pins) return ZS_BAD_ARGUMENT;
    hold_at(s, i)->pins--;
    head_of(s)->pin_count--;
    CRASH_POINT();
    if (e->block) list_used(s, slot);
    settle_hold(s, e, slot, i);
    return ZS_OK;
}

int zs_unpin(zs_store *s, uint32_t slot) {
    lock(s);
    int rc = unpin_locked(s, slot);
    finish(s);
    return rc;
}

int zs_describe(zs_store *s, uint32_t slot, zs_view *view) {
    int rc = ZS_NOT_FOUND;
    lock(s);
    if (valid_slot(s, slot) && entry_at(s, slot)->state != ZS_FREE) {
        fill_view(s, entry_at(s, slot), view);
        rc = ZS_OK;
    }
    unlock(s);
    return rc;
}

size_t zs_count_done(zs_store *s, const uint32_t *slots, size_t n) {
    size_t done = 0;
    for (size_t i = 0; i < n; i++) done += is_done(seen_state(s, slots[i]));
    return done;
}

/* Done, or with ZS_WAIT_ANYWHERE: done on any node. A mark without the lock is a hint that ends a wait; a mark that is just set rings. */
static inline int is_ready(const zs_store *s, uint32_t slot, int mode) {
    uint32_t state = seen_state(s, slot);
    return is_done(state) || (UNLIKELY(mode & ZS_WAIT_ANYWHERE) && is_pending(state) && LOAD(&entry_at(s, slot)->marks) & ZS_MARK_ELSEWHERE);
}

static size_t count_ready(const zs_store *s, const uint32_t *slots, size_t n, int mode) {
    size_t ready = 0;
    for (size_t i = 0; i < n; i++) ready += (size_t)is_ready(s, slots[i], mode);
    return ready;
}

/* Count a thread as watching (or no more) n slots. A slot the process does not hold cannot be watched: its waiter looks every slice. */
static void watch(zs_store *s, const uint32_t *slots, size_t n, int change) {
    if (FAULT(8)) return;
    for (size_t from = 0; from < n; from += 256) {
        lock(s);
        for (size_t k = from; k < n && k < from + 256; k++) {
            if (!valid_slot(s, slots[k])) continue;
            zs_entry *e = entry_at(s, slots[k]);
            uint32_t i = find_hold(s, e, self_of(s));
            if (!i) continue;
            zs_hold *o = hold_at(s, i);
            if (change > 0 && o->watching < 0xffff) o->watching++;
            else if (change < 0 && o->watching) {
                o->watching--;
                settle_hold(s, e, slots[k], i);
            }
        }
        finish(s);
    }
}

static int broker_gone(zs_store *s) {
    zs_proc broker = LOAD(&head_of(s)->broker);
    return broker && broker != s->self && !zs_alive(s, broker);
}

typedef struct {
    const uint32_t *slots;
    size_t n, want;
    int64_t deadline;        /* -1: none */
    int mode;                /* ZS_WAIT_* */
    uint32_t rings;
} waiting;

/* Sleep until `enough` of the given slots are done (all are watched). ZS_OK, ZS_TIMEOUT, ZS_INTERRUPTED, ZS_BROKER_GONE; ZS_LAST when rung. */
static int sleep_for(zs_store *s, zs_process *p, const waiting *w, const uint32_t *slots, size_t n, size_t enough) {
    for (;;) {
        uint32_t bell = LOAD(&p->bell);
        if (count_ready(s, slots, n, w->mode) >= enough) return ZS_OK;
        if (w->mode & ZS_WAIT_STOP_ON_RING && LOAD(&p->rings) != w->rings) return ZS_LAST;
        int64_t slice = SLICE_NS;
        if (w->deadline >= 0) {
            int64_t left = w->deadline - os_now();
            if (left <= 0) return ZS_TIMEOUT;
            if (left < slice) slice = left;
        }
        __atomic_add_fetch(&p->sleepers, 1, __ATOMIC_SEQ_CST);
        int rc = os_sleep(&p->bell, bell, slice);
        __atomic_sub_fetch(&p->sleepers, 1, __ATOMIC_SEQ_CST);
        if (rc == ZS_INTERRUPTED) return count_ready(s, slots, n, w->mode) >= enough ? ZS_OK : ZS_INTERRUPTED;
        if (rc == ZS_TIMEOUT && count_ready(s, slots, n, w->mode) < enough && slice > SLICE_NS / 2 && broker_gone(s)) return ZS_BROKER_GONE;
    }
}

/* All are wanted: watch one pending slot after the other, the last first, because the last asked for is mostly the last made. */
static int wait_all(zs_store *s, zs_process *p, const waiting *w) {
    int rc = ZS_OK;
    for (size_t i = w->n; i-- > 0 && rc == ZS_OK;) {
        const uint32_t *one = &w->slots[i];
        if (is_ready(s, *one, w->mode)) continue;
        watch(s, one, 1, 1);
        rc = sleep_for(s, p, w, one, 1, 1);
        watch(s, one, 1, -1);
    }
    return rc;
}

/* A sleeper takes tens of microseconds to come back (the halted core, in a virtual machine its host, the scheduler): often longer than what it waits
 * for. So whoever waits for one entry and last waited briefly looks at it for a while before it sleeps. At most one process for every two CPUs does
 * so: those that it waits for need a core. */
static _Thread_local int64_t last_wait_ns;

/* Take one of the places of those who spin, or NULL. */
static uint32_t *begin_spinning(zs_store *s) {
    uint32_t places = s->cpus / 2 < SPINNERS ? s->cpus / 2 : SPINNERS;
    for (uint32_t i = 0; i < places; i++) {
        uint32_t *place = &head_of(s)->spinners[i], holder = LOAD(place);
        if (holder && (current(s, holder) || FAULT(23))) continue;
        if (__atomic_compare_exchange_n(place, &holder, s->self, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return place;
    }
    return NULL;
}

/* Look at the one wanted entry until it is done (1) or it is time to sleep (0). */
static int spin(zs_store *s, zs_process *p, const waiting *w, int64_t began) {
    int64_t end = began + SPIN_NS;
    int found = 0;
    if (w->deadline >= 0 && w->deadline < end) end = w->deadline;
    uint32_t *place = begin_spinning(s);
    if (!place) return 0;
    CRASH_POINT();
    do {
        for (int i = 0; i < SPINS / 4; i++) pause_briefly();
        found = is_ready(s, w->slots[0], w->mode);
    } while (!found && !(w->mode & ZS_WAIT_STOP_ON_RING && LOAD(&p->rings) != w->rings) && os_now() < end);
    STORE(place, 0u);
    if (found) ADD(&head_of(s)->spins, 1);
    return found;
}

static int wait_asleep(zs_store *s, zs_process *p, const waiting *w) {
    int rc;
    if (w->want == w->n) {
        do rc = wait_all(s, p, w);    /* again when one was opened for a retry behind its back */
        while (rc == ZS_OK && count_ready(s, w->slots, w->n, w->mode) < w->n);
    } else {
        watch(s, w->slots, w->n, 1);
        rc = sleep_for(s, p, w, w->slots, w->n, w->want);
        watch(s, w->slots, w->n, -1);
    }
    return rc;
}

uint32_t zs_rings(zs_store *s) {
    zs_process *p = current(s, s->self);
    return p ? LOAD(&p->rings) : 0;
}

int zs_wait(zs_store *s, const uint32_t *slots, size_t n, size_t want, int64_t timeout_ns, int mode, size_t *done) {
    return zs_wait_since(s, slots, n, want, timeout_ns, mode, zs_rings(s), done);
}

int zs_wait_since(zs_store *s, const uint32_t *slots, size_t n, size_t want, int64_t timeout_ns, int mode, uint32_t rings, size_t *done) {
    zs_process *p = current(s, s->self);
    waiting w = {slots, n, want, timeout_ns < 0 ? -1 : 0, mode, rings};
    if (want > n && (n || !(mode & ZS_WAIT_STOP_ON_RING))) w.want = n;    /* of nothing at all only a ring can be waited for */
    *done = count_ready(s, slots, n, mode);
    if (*done >= w.want) return ZS_OK;
    if (timeout_ns == 0) return ZS_TIMEOUT;
    if (!p) return ZS_BAD_STATE;
    int64_t began = os_now();
    if (timeout_ns > 0) w.deadline = began + timeout_ns;
    int rc = ZS_OK, alone = n == 1 && w.want == 1;
    if (!(alone && last_wait_ns < SPIN_NS && spin(s, p, &w, began))) rc = wait_asleep(s, p, &w);
    if (alone) last_wait_ns = os_now() - began;
    *done = count_ready(s, slots, n, mode);
    return rc == ZS_LAST || *done >= w.want ? ZS_OK : rc;
}

static _Thread_local int64_t last_fd_wait_ns;

int zs_wait_fd(zs_store *s, int fd, int64_t timeout_ns) {
    int64_t began = os_now(), end = began + SPIN_NS;
    int rc = os_poll(fd, 0);
    if (rc != ZS_TIMEOUT || timeout_ns == 0) {
        last_fd_wait_ns = 0;
        return rc;
    }
    if (timeout_ns > 0 && began + timeout_ns < end) end = began + timeout_ns;
    uint32_t *place = last_fd_wait_ns < SPIN_NS && current(s, s->self) ? begin_spinning(s) : NULL;
    if (place) {
        do {
            for (int i = 0; i < SPINS / 4; i++) pause_briefly();
            rc = os_poll(fd, 0);
        } while (rc == ZS_TIMEOUT && os_now() < end);
        STORE(place, 0u);
    }
    if (rc == ZS_TIMEOUT) {
        int64_t left = timeout_ns < 0 ? -1 : began + timeout_ns - os_now();
        if (timeout_ns < 0 || left > 0) rc = os_poll(fd, left);
    }
    last_fd_wait_ns = os_now() - began;
    return rc;
}

int zs_watch_broker(zs_store *s, const uint8_t *id) {
    int rc = ZS_NOT_FOUND;
    lock(s);
    uint32_t slot = find(s, id);
    if (slot) {
        zs_entry *e = entry_at(s, slot);
        if (is_done(e->state)) rc = ZS_EXISTS;
        else if (is_pending(e->state) || e->state == ZS_OPEN) {
            e->flags |= ZS_FLAG_BROKER_WATCH;
            rc = ZS_OK;
        }
    }
    unlock(s);
    return rc;
}

/* ---- room ------------------------------------------------------------------------------------------------------------------------------------------------ */

static int spill_candidate_locked(zs_store *s, uint64_t min_size, uint32_t *slot, zs_view *view) {
    head *h = head_of(s);
    int rc = room_for(s, 0, 1), steps = 65536;
    if (rc != ZS_OK) return rc;
    for (uint32_t i = h->oldest; i && steps--; i = entry_at(s, i)->newer) {
        zs_entry *e = entry_at(s, i);
        if (e->size < min_size) continue;
        refer(s, e, i);
        *slot = i;
        return pin_locked(s, i, view);
    }
    return ZS_LAST;
}

int zs_spill_candidate(zs_store *s, uint64_t min_size, uint32_t *slot, zs_view *view) {
    int rc;
    if (!s->self) return ZS_BAD_STATE;
    UNDER_LOCK(s, rc, spill_candidate_locked(s, min_size, slot, view));
    return rc;
}

/* Drop the candidate's pin and reference. */
static void drop_candidate(zs_store *s, uint32_t slot) {
    unpin_locked(s, slot);
    release_locked(s, slot);
}

static int only_pin_is_own(zs_store *s, zs_entry *e) {
    for (uint32_t i = e->holds; i; i = hold_at(s, i)->next)
        if (hold_at(s, i)->pins != (hold_at(s, i)->proc == self_of(s) ? 1u : 0u)) return 0;
    return 1;
}

static int spilled_locked(zs_store *s, uint32_t slot) {
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    uint32_t own = find_hold(s, e, self_of(s));
    if (!own || !hold_at(s, own)->pins || !hold_at(s, own)->references) return ZS_BAD_ARGUMENT;
    if (e->state != ZS_SEALED || !e->block || (!only_pin_is_own(s, e) && !FAULT(12))) {
        drop_candidate(s, slot);
        return ZS_PINNED;
    }
    uint32_t block = e->block, whole = tags_of(s)[block], first = block + whole, keep = 0;
    if (e->contained) {
        first = block + (uint32_t)(round4(e->size) / ZS_GRANULE);
        keep = block + whole - first;
        int rc = may_cut(s, block, first, keep);
        if (rc != ZS_OK) return rc;
    }
    unlist_used(s, slot);
    begin(s, e, slot);
    e->block = keep ? first : 0;
    e->older = e->newer = 0;
    commit(s, e, ZS_SPILLED);
    CRASH_POINT();
    if (keep) cut_block(s, block, first, keep);
    else give_block(s, block);
    drop_candidate(s, slot);
    return ZS_OK;
}

int zs_spilled(zs_store *s, uint32_t slot) {
    int rc;
    UNDER_LOCK(s, rc, spilled_locked(s, slot));
    return rc;
}

int zs_spill_abort(zs_store *s, uint32_t slot) {
    int rc = ZS_BAD_ARGUMENT;
    lock(s);
    if (valid_slot(s, slot)) {
        uint32_t own = find_hold(s, entry_at(s, slot), self_of(s));
        if (own && hold_at(s, own)->pins && hold_at(s, own)->references) {
            drop_candidate(s, slot);
            rc = ZS_OK;
        }
    }
    finish(s);
    return rc;
}

static int restore_locked(zs_store *s, uint32_t slot, uint8_t **data, uint64_t *size) {
    uint32_t block;
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    *size = e->size;
    if (e->state != ZS_SPILLED || e->open_block || e->flags & DOOMED) return ZS_BAD_STATE;
    int rc = take_block(s, value_extent(e->size, e->contained), &block);
    if (rc != ZS_OK) return rc;
    e->open_size = e->size | (uint64_t)e->contained << OPEN_SIZE_BITS;
    e->writer = s->self;
    CRASH_POINT();
    STORE(&e->open_block, block);    /* commit */
    note_writer(s, s->self, 1);
    *data = data_at(s, block);
    return ZS_OK;
}

int zs_restore(zs_store *s, uint32_t slot, uint8_t **data, uint64_t *size) {
    int rc;
    if (!s->self) return ZS_BAD_STATE;
    UNDER_LOCK(s, rc, restore_locked(s, slot, data, size));
    return rc;
}

static int restored_locked(zs_store *s, uint32_t slot, int good) {
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    if (e->state != ZS_SPILLED || !e->open_block || e->writer != s->self) return ZS_BAD_STATE;
    if (!good) {
        reap_writing(s, slot, s->self);
        return ZS_OK;
    }
    uint32_t list = e->block, block = e->open_block;
    if (e->contained) {
        uint8_t *at = data_at(s, block);
        memset(at + e->size, 0, round4(e->size) - e->size);
        memcpy(at + round4(e->size), list_of(s, e), 4ull * e->contained);
    }
    note_writer(s, s->self, -1);
    begin(s, e, slot);
    e->block = block;
    e->open_block = 0;
    e->writer = 0;
    e->older = e->newer = 0;
    commit(s, e, ZS_SEALED);
    give_block(s, list);
    list_used(s, slot);
    if (!e->holds && !e->held_by_objects) unreferenced(s, slot);
    return ZS_OK;
}

int zs_restored(zs_store *s, uint32_t slot, int good) {
    lock(s);
    int rc = restored_locked(s, slot, good);
    finish(s);
    return rc;
}

static int discard_locked(zs_store *s, uint32_t slot, const void *data, uint32_t size, uint8_t kind) {
    if (!valid_slot(s, slot)) return ZS_BAD_ARGUMENT;
    zs_entry *e = entry_at(s, slot);
    if (!is_done(e->state)) return ZS_BAD_STATE;
    if (e->open_block || is_pinned(s, e)) return ZS_PINNED;
    uint32_t n = e->contained, block = e->block, copy[ZS_INLINE_MAX / 4];
    const uint32_t *list = list_of(s, e);
    if (n && !block) list = memcpy(copy, list, 4ull * n);
    head_of(s)->inline_bytes -= inline_bytes_of(e);
    unlist_used(s, slot);
    begin(s, e, slot);
    STORE(&e->attempt, e->attempt + 1);
    CRASH_POINT();
    set_inline(e, data, size);
    set_kind(e, kind, 0);
    commit(s, e, ZS_SEALED);
    head_of(s)->inline_bytes += size;
    release_slots(s, list, n);
    give_block(s, block);
    return ZS_OK;
}

int zs_discard(zs_store *s, uint32_t slot, const void *data, uint32_t size, uint8_t kind) {
    if (size > ZS_INLINE_MAX) return ZS_BAD_ARGUMENT;
    lock(s);
    int rc = discard_locked(s, slot, data, size, kind);
    finish(s);
    return rc;
}

int zs_touch_ahead(zs_store *s, uint64_t bytes) {
    head *h = head_of(s);
    uint64_t goal = LOAD(&h->high_water) + bytes / ZS_GRANULE;
    if (goal > h->granules) goal = h->granules;
    uint64_t before = LOAD(&h->committed);
    if (before >= goal) return ZS_LAST;
    wanted.what = WANT_DATA;
    wanted.amount = goal;
    int rc = grow(s);
    /* The kernel clears pages when they are first touched, which is most of their price: touch them here, where nobody waits. */
    if (rc == ZS_OK) os_populate(data_at(s, 0) + before * ZS_GRANULE, (LOAD(&h->committed) - before) * ZS_GRANULE);
    return rc;
}

/* ---- the dead and the living ---------------------------------------------------------------------------------------------------------------------------- */

int zs_next_zombie(zs_store *s, uint8_t *id) {
    head *h = head_of(s);
    if (!LOAD(&h->zombie)) return ZS_LAST;    /* a stale look only delays it to the next call */
    lock(s);
    uint32_t slot = h->zombie;
    if (slot) {
        zs_entry *e = entry_at(s, slot);
        int budget = RELEASE_BUDGET;
        memcpy(id, e->id, ZS_ID_SIZE);
        unlist_zombie(s, slot);
        e->flags &= (uint8_t)~ZS_FLAG_NOTIFY;
        set_state(h, e, layout_of(e));
        e->flags |= DOOMED;
        if (!free_entry(s, slot, &budget)) {
            e->older = h->doomed;
            h->doomed = slot;
        }
    }
    finish(s);
    return slot ? ZS_OK : ZS_LAST;
}

int zs_walk(zs_store *s, uint32_t *cursor, zs_entry *copy) {
    for (uint32_t i = *cursor ? *cursor : 1; i < LOAD(&head_of(s)->entry_bump); i++) {
        zs_entry *e = entry_at(s, i);
        if (LOAD(&e->state) == ZS_FREE) continue;    /* looked at again under the lock */
        lock(s);
        *copy = *e;
        unlock(s);
        if (copy->state == ZS_FREE || copy->flags & LIMBO) continue;
        copy->flags &= PUBLIC_FLAGS;
        if (copy->state == ZS_OPEN) copy->size = open_bytes(copy);
        *cursor = i + 1;
        return ZS_OK;
    }
    return ZS_LAST;
}

static uint64_t largest_free(zs_store *s) {
    head *h = head_of(s);
    uint64_t largest = h->granules - h->top;
    if (!h->class_map) return largest;
    uint32_t c = 31u - (uint32_t)__builtin_clz(h->class_map), sub = 31u - (uint32_t)__builtin_clz(h->sub_map[c]), steps = 1024;
    for (uint32_t g = h->lists[c][sub]; g && steps--; g = links_at(s, g)->next)
        if ((tags_of(s)[g] & ~TAG_FREE) > largest) largest = tags_of(s)[g] & ~TAG_FREE;
    return largest;
}

int zs_stats(zs_store *s, zs_statistics *out) {
    head *h = head_of(s);
    memset(out, 0, sizeof *out);
    lock(s);
    out->capacity = h->capacity;
    out->committed = (h->committed - 1) * ZS_GRANULE;
    out->used = h->used * ZS_GRANULE;
    out->free_bytes = h->free_granules * ZS_GRANULE;
    out->largest_free = largest_free(s) * ZS_GRANULE;
    out->high_water = (h->high_water - 1) * ZS_GRANULE;
    out->inline_bytes = h->inline_bytes;
    out->entries = h->entry_bump - 1 - h->count[ZS_FREE];
    out->entry_limit = h->entry_limit;
    out->pending = h->count[ZS_PENDING] + h->count[ZS_CLAIMED];
    out->open = h->count[ZS_OPEN];
    out->sealed = h->count[ZS_SEALED];
    out->spilled = h->count[ZS_SPILLED];
    out->zombies = h->count[ZS_ZOMBIE];
    out->holds = h->hold_count;
    out->processes = h->process_count;
    out->pins = h->pin_count;
    out->puts = h->puts;
    out->gets = h->gets;
    out->seals = h->seals;
    out->deletes = h->deletes;
    out->claims = h->claims;
    out->stale_seals = h->stale_seals;
    out->repairs = h->repairs;
    out->reaped = h->reaped;
    out->wakes = h->wakes;
    out->grows = h->grows;
    out->spins = h->spins;
    unlock(s);
    return ZS_OK;
}

/* -- check: every function returns the first violation, or NULL -- */

#define MUST(condition, words) do { if (!(condition)) return (words); } while (0)

/* Sums over blocks, by which named and tagged extents are compared as sets. */
typedef struct { uint64_t blocks, granules, mix; } extents;

static void note_extent(extents *x, uint64_t granule, uint64_t n) {
    uint64_t k = (granule << 32 ^ n) * 0x9e3779b97f4a7c15ull;
    x->blocks++;
    x->granules += n;
    x->mix += (k ^ k >> 29) * 0xbf58476d1ce4e5b9ull;
}

static const char *check_blocks(zs_store *s) {
    head *h = head_of(s);
    uint32_t *tags = tags_of(s);
    extents tagged = {0, 0, 0}, named = {0, 0, 0};
    uint64_t free_blocks = 0, free_granules = 0, listed = 0;
    int before_free = 0;
    MUST(h->top <= h->committed && h->committed <= h->granules, "top, committed and capacity are out of order");
    for (uint64_t g = 1; g < h->top;) {
        MUST(tag_ready(s, g), "a block starts where no tag can be");
        uint32_t n = tags[g] & ~TAG_FREE, is_free = tags[g] & TAG_FREE;
        MUST(n && g + n <= h->top, "a tag's length is impossible");
        MUST(tags[g + n - 1] == tags[g], "boundary tags disagree");
        MUST(!(is_free && before_free), "two free blocks are neighbours");
        if (is_free) {
            free_blocks++;
            free_granules += n;
        } else {
            note_extent(&tagged, g, n);
        }
        before_free = is_free != 0;
        g += n;
    }
    MUST(!before_free, "a free block touches the wilderness");
    MUST(free_granules == h->free_granules && tagged.granules == h->used, "used or free is miscounted");
    MUST(1 + h->used + h->free_granules == h->top, "used + free is not the whole");
    for (uint32_t i = 1; i < h->entry_bump; i++) {
        zs_entry *e = entry_at(s, i);
        if (e->block && has_list(e->state)) note_extent(&named, e->block, granules_for(extent_of(e)));
        if (e->open_block && (e->state == ZS_OPEN || e->state == ZS_CLAIMED || e->state == ZS_SPILLED))
            note_extent(&named, e->open_block, granules_for(open_extent(e)));
    }
    MUST(named.blocks >= tagged.blocks, "a used block belongs to no entry");
    MUST(named.blocks <= tagged.blocks && named.mix == tagged.mix, "extents overlap, or an entry names a free block");
    for (uint32_t c = 0; c < CLASSES; c++) {
        MUST(!(h->class_map >> c & 1) == !h->sub_map[c], "the map of classes is wrong");
        for (uint32_t sub = 0; sub < SUBS; sub++) {
            uint32_t before = 0;
            MUST(!(h->sub_map[c] >> sub & 1) == !h->lists[c][sub], "the map of lists is wrong");
            for (uint32_t g = h->lists[c][sub]; g; before = g, g = links_at(s, g)->next) {
                uint32_t found_class, found_sub;
                MUST(g < h->top && tag_ready(s, g) && tags[g] & TAG_FREE, "a used block is in a free list");
                class_of(tags[g] & ~TAG_FREE, &found_class, &found_sub);
                MUST(found_class == c && found_sub == sub, "a free block is in the wrong list");
                MUST(links_at(s, g)->previous == before, "a free list is torn");
                MUST(++listed <= free_blocks, "a free list runs in circles");
            }
        }
    }
    MUST(listed == free_blocks, "a free block is in no list");
    return NULL;
}

static const char *check_holds(zs_store *s, const zs_entry *e, uint32_t slot, uint64_t *holds, uint64_t *pins) {
    head *h = head_of(s);
    for (uint32_t i = e->holds; i; i = hold_at(s, i)->next) {
        MUST(i < h->hold_bump && ++*holds <= h->hold_bump, "a hold list runs away");
        zs_hold *o = hold_at(s, i);
        MUST(o->slot == slot, "a hold is in another entry's list");
        MUST(o->references || o->pins || o->watching, "an empty hold is kept");
        MUST(process_at(s, o->proc)->pid, "a hold belongs to nobody");
        *pins += o->pins;
    }
    return NULL;
}

static const char *check_entry(zs_store *s, uint32_t slot) {
    zs_entry *e = entry_at(s, slot);
    int listed = (e->flags & LISTED) != 0;
    MUST(e->state < CHANGING, "an entry is half changed");
    MUST(!(e->flags & (DOOMED | DYING)), "an entry waits to be freed");
    MUST(listed == (e->state == ZS_SEALED && e->block && !is_pinned(s, e)), "the least-recently-used list does not hold exactly what may go");
    MUST(!is_done(e->state) || e->holds || e->held_by_objects || e->open_block, "a finished entry has no holder");
    MUST(e->state != ZS_ZOMBIE || (!e->holds && !e->held_by_objects && e->flags & ZS_FLAG_NOTIFY), "a zombie has a holder");
    MUST(!(e->marks & FILED) || e->state == ZS_ZOMBIE, "what is no zombie is laid out like one");
    MUST(!(e->marks & ZS_MARK_REMOTE) || (e->flags & ZS_FLAG_NOTIFY && (is_pending(e->state) || e->state == ZS_ZOMBIE)), "a remote entry is done, or would go unnoticed");
    MUST(!(e->marks & ZS_MARK_REMOTE) || e->state != ZS_PENDING || e->holds || e->held_by_objects, "a remote entry has no holder");
    MUST(e->state != ZS_SEALED || !e->open_block, "a sealed entry is being written");
    MUST(e->state != ZS_SEALED || e->block || e->inline_size == e->size, "an inline value has two sizes");
    MUST(!(e->flags & LIMBO) || (e->state == ZS_OPEN && e->open_block), "limbo holds something else");
    if (!(e->flags & LIMBO)) MUST(find(s, e->id) == slot, "an entry cannot be found by its id, or an id has two");
    return NULL;
}

static const char *check_counts(zs_store *s) {
    head *h = head_of(s);
    uint64_t count[STATES] = {0}, holds = 0, used_holds = 0, pins = 0, inline_bytes = 0, chained = 0, hashed = 0, listed = 0;
    uint32_t before = 0, n = 0;
    for (uint32_t i = 1; i < h->entry_bump; i++) {
        zs_entry *e = entry_at(s, i);
        const char *words;
        count[e->state < STATES ? e->state : 0]++;
        if (e->state == ZS_FREE) continue;
        if ((words = check_entry(s, i)) || (words = check_holds(s, e, i, &holds, &pins))) return words;
        if (!(e->flags & LIMBO)) hashed++;
        if (e->flags & LISTED) listed++;
        inline_bytes += inline_bytes_of(e);
    }
    for (uint32_t b = 0; b < h->bucket_count; b++)
        for (uint32_t i = buckets_of(s)[b]; i; i = entry_at(s, i)->next) MUST(++chained <= hashed, "hash chains run in circles");
    MUST(chained == hashed, "a hash chain misses an entry");
    for (uint32_t i = h->oldest; i; before = i, i = entry_at(s, i)->newer) {
        MUST(entry_at(s, i)->flags & LISTED && entry_at(s, i)->older == before, "the least-recently-used list is torn");
        MUST(listed-- > 0, "the least-recently-used list runs in circles");
    }
    MUST(listed == 0 && h->newest == before, "the least-recently-used list misses an entry");
    MUST(memcmp(count, h->count, sizeof count) == 0, "entries are miscounted");
    for (uint32_t i = 1; i < h->hold_bump; i++) used_holds += hold_at(s, i)->slot != 0;
    MUST(holds == used_holds && holds == h->hold_count, "a hold is in no list, or miscounted");
    MUST(pins == h->pin_count && inline_bytes == h->inline_bytes, "pins or inline bytes are miscounted");
    for (uint32_t i = h->hold_free; i; i = hold_at(s, i)->next) n++;
    MUST(n == h->hold_free_count && holds + n + 1 == h->hold_bump, "a hold is lost");
    n = 0;
    for (uint32_t i = h->entry_free; i; i = entry_at(s, i)->next) MUST(++n <= count[ZS_FREE] && entry_at(s, i)->state == ZS_FREE, "the list of free entries is wrong");
    MUST(n == count[ZS_FREE], "an entry is lost");
    n = 0;
    for (uint32_t i = h->zombie; i; i = entry_at(s, i)->newer) MUST(++n <= count[ZS_ZOMBIE], "the list of zombies is wrong");
    MUST(n == count[ZS_ZOMBIE], "a zombie is lost");
    return NULL;
}

/* held_by_objects: take away every occurrence, look for zeros, put them back. Cut short, repair counts anew. */
static const char *check_lists(zs_store *s) {
    head *h = head_of(s);
    const char *words = NULL;
    for (uint32_t i = 1; i < h->entry_bump; i++) {
        zs_entry *e = entry_at(s, i);
        if (!has_list(e->state) || !e->contained) continue;
        const uint32_t *list = list_of(s, e);
        for (uint32_t k = 0; k < e->contained; k++) MUST(valid_slot(s, list[k]) && entry_at(s, list[k])->state != ZS_FREE, "a list names a free entry");
    }
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t i = 1; i < h->entry_bump; i++) {
            zs_entry *e = entry_at(s, i);
            if (!has_list(e->state)) continue;
            const uint32_t *list = list_of(s, e);
            for (uint32_t k = 0; k < e->contained; k++) entry_at(s, list[k])->held_by_objects += pass ? 1u : ~0u;
        }
        for (uint32_t i = 1; !pass && i < h->entry_bump; i++)
            if (entry_at(s, i)->state != ZS_FREE && entry_at(s, i)->held_by_objects) words = "held_by_objects is not the number of lists that name the entry";
    }
    return words;
}

static inline int is_being_written(const zs_entry *e) {
    return e->state == ZS_OPEN || (e->open_block && (e->state == ZS_CLAIMED || e->state == ZS_SPILLED));
}

static const char *check_processes(zs_store *s) {
    head *h = head_of(s);
    uint32_t n = 0, expected[ZS_MAX_PROCS] = {0}, writing[ZS_MAX_PROCS] = {0}, holds[ZS_MAX_PROCS] = {0};
    for (uint32_t i = 1; i < h->entry_bump; i++) {
        zs_entry *e = entry_at(s, i);
        if (is_pending(e->state) && current(s, e->target)) expected[index_of(e->target)]++;
        if (is_being_written(e) && current(s, e->writer)) writing[index_of(e->writer)]++;
    }
    for (uint32_t i = 1; i < h->hold_bump; i++)
        if (hold_at(s, i)->slot) holds[hold_at(s, i)->proc]++;
    for (uint32_t i = 1; i < h->proc_bump; i++) {
        zs_process *p = process_at(s, i);
        if (!p->pid) continue;
        n++;
        MUST(expected[i] == p->expected, "expected is not the number of entries that target the process");
        MUST(writing[i] == p->writing, "a process's open blocks are miscounted");
        MUST(holds[i] == p->holds, "a process's holds are miscounted");
    }
    MUST(n == h->process_count, "processes are miscounted");
    return NULL;
}

int zs_check(zs_store *s, char *text, size_t room) {
    const char *words;
    lock(s);
    while (!drain(s, RELEASE_BUDGET)) {}
    words = head_of(s)->undo_slot ? "the journal was left open" : check_blocks(s);
    if (!words) words = check_lists(s);
    if (!words) words = check_counts(s);
    if (!words) words = check_processes(s);
    unlock(s);
    if (!words) return ZS_OK;
    if (text && room) snprintf(text, room, "%s", words);
    return ZS_BAD_STATE;
}

/* ---- ids -------------------------------------------------------------------------------------------------------------------------------------------------- */

static inline uint64_t rotate(uint64_t x, int r) { return x << r | x >> (64 - r); }

static inline uint64_t finalise(uint64_t k) {
    k = (k ^ k >> 33) * 0xff51afd7ed558ccdull;
    k = (k ^ k >> 33) * 0xc4ceb9fe1a85ec53ull;
    return k ^ k >> 33;
}

void zs_derive_id(const uint8_t *parent, uint64_t counter, uint8_t *id) {
    /* MurmurHash3_x64_128 (Austin Appleby, public domain) of parent and counter, seed 0; spelled out in zray/ids.py. */
    const uint64_t c1 = 0x87c37b91114253d5ull, c2 = 0x4cf5ad432745937full;
    uint64_t p[2], h1, h2;
    memcpy(p, parent, 16);
    h1 = rotate(rotate(p[0] * c1, 31) * c2, 27) * 5 + 0x52dce729;
    h2 = (rotate(rotate(p[1] * c2, 33) * c1, 31) + h1) * 5 + 0x38495ab5;
    h1 ^= rotate(counter * c1, 31) * c2;
    h1 ^= 24;
    h2 ^= 24;
    h1 += h2;
    h2 += h1;
    h1 = finalise(h1);
    h2 = finalise(h2);
    h1 += h2;
    h2 += h1;
    uint32_t low = (uint32_t)h2, zero = 0;
    memcpy(id, &h1, 8);
    memcpy(id + 8, &low, 4);
    memcpy(id + 12, &zero, 4);
}

/* ---- copying --------------------------------------------------------------------------------------------------------------------------------------------- */

#ifdef __SSE2__
#include <emmintrin.h>

/* Stores that bypass the caches save reading every line of the target before it is overwritten; C libraries begin with them only at sizes that virtual
 * machines with large shared caches hardly see. Measured on AMD EPYC with 32 MiB of last-level cache: 22 against 13 GB/s, and faster than memcpy for who
 * reads the copy at once, too, from half of that cache on. perf/profile.md has the table. */
enum { STREAM_MIN = 16 << 20, LINE = 64, PREFETCH = 8 * LINE };

static void stream_lines(uint8_t *to, const uint8_t *from, size_t lines) {
    for (; lines; lines--, to += LINE, from += LINE) {
        _mm_prefetch((const char *)from + PREFETCH, _MM_HINT_NTA); /* beyond the end it is ignored */
        __m128i a = _mm_loadu_si128((const __m128i *)from), b = _mm_loadu_si128((const __m128i *)from + 1);
        __m128i c = _mm_loadu_si128((const __m128i *)from + 2), d = _mm_loadu_si128((const __m128i *)from + 3);
        _mm_stream_si128((__m128i *)to, a);
        _mm_stream_si128((__m128i *)to + 1, b);
        _mm_stream_si128((__m128i *)to + 2, c);
        _mm_stream_si128((__m128i *)to + 3, d);
    }
    _mm_sfence(); /* before the object is sealed */
}

void zs_copy(void *to, const void *from, size_t size) {
    if (size < STREAM_MIN) {
        memcpy(to, from, size);
        return;
    }
    size_t head = -(uintptr_t)to % LINE, tail = (size - head) % LINE, body = size - head - tail;
    memcpy(to, from, head);
    stream_lines((uint8_t *)to + head, (const uint8_t *)from + head, body / LINE);
    memcpy((uint8_t *)to + head + body, (const uint8_t *)from + head + body, tail);
}
#else
void zs_copy(void *to, const void *from, size_t size) { memcpy(to, from, size); }
#endif

/* ---- the operating system ------------------------------------------------------------------------------------------------------------------------------- */

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#else
#error "processes are identified through /proc: give os_start_time another body on this system"
#endif

static int os_truncate(int fd, uint64_t size) { return ftruncate(fd, (off_t)size) == 0 ? ZS_OK : ZS_SYSTEM; }

/* For a file system without fallocate. Only ever used beyond what is in use, so that writing zeros destroys nothing. */
static int write_zeros(int fd, uint64_t offset, uint64_t length) {
    static const char zeros[65536];
    while (length) {
        ssize_t n = pwrite(fd, zeros, length < sizeof zeros ? length : sizeof zeros, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return errno == ENOSPC || errno == EDQUOT || errno == EFBIG ? ZS_NO_MEMORY : ZS_SYSTEM;
        offset += (uint64_t)n;
        length -= (uint64_t)n;
    }
    return ZS_OK;
}

/* Give pages to a part of the file, so that touching it can never fail. Once more is harmless. */
static int os_commit(int fd, uint64_t offset, uint64_t length) {
    uint64_t piece = length;
    while (length) {
        if (piece > length) piece = length;
        if (fallocate(fd, 0, (off_t)offset, (off_t)piece) == 0) {
            offset += piece;
            length -= piece;
            continue;
        }
        switch (errno) {
        case EINTR:    /* a signal undoes the whole call: with a profiler's timer only smaller ones come to an end */
            if (piece > 65536) piece = round_up(piece / 2, PAGE);
            break;
        case ENOSPC:
        case ENOMEM:
        case EDQUOT:
        case EFBIG: return ZS_NO_MEMORY;
        case EOPNOTSUPP:
        case ENOSYS: return write_zeros(fd, offset, length);
        default: return ZS_SYSTEM;
        }
    }
    return ZS_OK;
}

/* Touch pages without changing them; a hint. */
static void os_populate(void *data, uint64_t length) {
#ifdef MADV_POPULATE_WRITE
    uintptr_t start = (uintptr_t)data & ~(uintptr_t)(PAGE - 1);
    if (madvise((void *)start, (uintptr_t)data + length - start, MADV_POPULATE_WRITE) == 0) return;
#endif
    (void)data;
    (void)length;
}

static void *os_map(int fd, uint64_t size) {
    void *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return base == MAP_FAILED ? NULL : base;
}

static void os_unmap(void *base, uint64_t size) { munmap(base, size); }

static uint64_t os_size(int fd) {
    struct stat st;
    return fstat(fd, &st) == 0 ? (uint64_t)st.st_size : 0;
}

static void os_advise(void *data, uint64_t size) {
    /* Forked children map the segment anyway; core dumps of gigabytes help nobody. */
    madvise(data, size, MADV_DONTDUMP);
}

static uint32_t os_pid(void) { return (uint32_t)getpid(); }

/* CPUs that this process may run on. */
static uint32_t os_cpus(void) {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? (uint32_t)CPU_COUNT(&set) : 1;
}

/* Start time of a process that exists and has not exited (field 22 of its stat): 1; 0: there is none; -1: this process cannot tell, because it has
 * no descriptors left, say. A zombie has exited when no thread of it is left to run. */
static int os_start_time(uint32_t pid, uint64_t *start_time) {
    char path[40], text[1024];
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno == ENOENT || errno == ESRCH ? 0 : -1;
    ssize_t n;
    do n = read(fd, text, sizeof text - 1);
    while (n < 0 && errno == EINTR);
    close(fd);
    if (n <= 0) return 0;
    text[n] = 0;
    char *at = strrchr(text, ')');    /* the command name may hold anything */
    char state;
    unsigned long long threads, started;
    if (!at || sscanf(at + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %llu %*d %llu", &state, &threads, &started) != 3)
        return 0;
    if ((state == 'Z' || state == 'X' || state == 'x') && threads <= 1) return 0;
    *start_time = started;
    return 1;
}

static int64_t os_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Sleep while *word == seen, at most ns. ZS_OK, ZS_TIMEOUT, ZS_INTERRUPTED. */
static int os_sleep(uint32_t *word, uint32_t seen, int64_t ns) {
    struct timespec t = {ns / 1000000000, ns % 1000000000};
    if (syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, NULL, 0) == 0 || errno == EAGAIN) return ZS_OK;
    return errno == EINTR ? ZS_INTERRUPTED : errno == ETIMEDOUT ? ZS_TIMEOUT : ZS_OK;
}

static void os_wake(uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); }

static int os_poll(int fd, int64_t ns) {
    struct timespec t = {ns / 1000000000, ns % 1000000000};
    struct pollfd one = {.fd = fd, .events = POLLIN};
    int n = ppoll(&one, 1, ns < 0 ? NULL : &t, NULL);
    if (n == 0) return ZS_TIMEOUT;
    if (n < 0) return errno == EINTR ? ZS_INTERRUPTED : ZS_SYSTEM;
    return one.revents & POLLNVAL ? ZS_BAD_ARGUMENT : ZS_OK;
}

#ifdef ZS_CRASH_POINTS
/* Per process, and not inherited on purpose: a forked child starts with the parent's countdown unless it sets its own. */
static uint64_t crash_left, crash_passed;

static void crash_point(void) {
    crash_passed++;
    if (crash_left && --crash_left == 0) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
}

void zs_crash_after(uint64_t n) { crash_left = n; }
uint64_t zs_crash_count(void) { return crash_passed; }
#endif
