/* The shared-memory object store of one node: contract.
 *
 * Covers: the layout of the segment, who may call what, locks, return codes and how long every result lives.
 * Does not cover: pickling, file I/O of spilling, policy (which objects go, when to retry): those are Python's.
 * Neighbours: _store_core.c implements this; _store_core.pxd repeats it for Cython; _store.pyx wraps it.
 *
 * READ THESE FIRST
 *  - A segment is one file descriptor (memfd, or an unlinked file) mapped MAP_SHARED by every process of the node. Nothing in it is an
 *    address: links are slot numbers or offsets in 64-byte granules. Slot 0, hold 0 and granule 0 mean "none".
 *  - Any process may die at any instruction. Truth is kept in four arrays only: processes, entries, holds, and the extents named by
 *    entries. Everything else (free lists, hash chains, hold lists, the least-recently-used list, counters, `held_by_objects`) can be and is
 *    rebuilt from them by whoever finds the robust lock orphaned. So each call orders its writes such that the array element becomes valid
 *    (or invalid) by ONE aligned store at the end of (or the beginning of) its changes; the comment "commit" marks these stores.
 *  - One robust, process-shared mutex guards table and allocator (`lock`); a second one (`grow_lock`) serialises only those who add memory to the
 *    segment, so that allocating pages never stops the others. Order: grow_lock before lock. No call holds a lock while copying user data, while
 *    sleeping, or while making a system call other than futex/kill/gettid.
 *  - A *reference* keeps an entry (and, through its contained list, other entries) alive. A *pin* keeps its bytes in place. Both are counted
 *    per process in hold records, so that a dead process's share can be given back exactly.
 *  - No block, slot or process record is reused while its previous owner may still write: a process is reaped only after its exit was confirmed
 *    (pid gone, or a different start time), and sealing is a compare-and-swap on the attempt number, so whoever was superseded writes only into
 *    a block of its own that is then dropped.
 *  - Lock-free reads are allowed for `state`, `attempt`, inline data of a sealed entry and process words, only while the caller holds a
 *    reference: the slot cannot be reused then, a sealed value never changes, and any other change is re-checked (state, attempt) after reading.
 *
 * LIFE OF AN ENTRY
 *
 *      zs_expect                zs_create+zs_seal (put)
 *   FREE ------> PENDING          FREE ------> OPEN -----> SEALED
 *                  | zs_claim       (writer is a process; given back if it dies)
 *                  v
 *               CLAIMED --zs_seal/zs_seal_inline--> SEALED <--> SPILLED     any --last reference--> FREE (or ZOMBIE when NOTIFY)
 *                  | zs_retry (attempt+1)
 *                  +-----> PENDING
 *
 *   PENDING/CLAIMED entries live even without references until somebody seals them: the producer is a holder of its own.
 *   In a cluster the value of a PENDING entry may be made or kept on another node: the broker says so with zs_elsewhere, which ends its being held by a
 *   producer. Whoever wants the value here says so with zs_want, before it sleeps: to the store when the value is not there yet, and by a message to
 *   the broker when zs_want tells that it is elsewhere. The mark survives zs_retry and goes when the value is sealed here.
 *   An error is a sealed object with ZS_KIND_ERROR. A sealed error of kind "system" may be taken back by zs_retry (its task runs again).
 *
 * TASKS
 *   The submitter makes the return entries with zs_expect before it sends the spec: this takes a reference for the caller, references on the
 *   arguments (held by the entry until it is sealed), and optionally keeps a copy of the spec in the entry for recovery. `target` names the process
 *   that must seal it; when that process has been reaped the call fails with ZS_GONE, so a call made after the broker scanned for the dead cannot be
 *   forgotten. An executor calls zs_claim(slot, attempt) before running: exactly one claimant wins, so a task may be offered to several workers.
 *
 * WAITING
 *   A wait for one entry spins for up to 200 us when the thread's previous one was shorter than that, one process for every two CPUs at a time.
 *   Each process has one doorbell (a futex word in its record). zs_wait marks the caller's holds as watching, re-checks, and sleeps on the bell;
 *   sealing rings the bells of all watching holders. A sleeper wakes at least every 100 ms and checks that the broker is alive, so a sealer that died between
 *   state change and wake, or a dead broker, delays it by that much at most. Entries watched by the broker (zs_watch_broker) make zs_seal report
 *   ZS_SEALED_TELL_BROKER: the sealer then sends it a message (the broker sleeps in poll, not on its bell).
 */
#ifndef ZRAY_STORE_CORE_H
#define ZRAY_STORE_CORE_H

#include <stddef.h>
#include <stdint.h>

#define ZS_VERSION 1u
#define ZS_GRANULE 64u
#define ZS_INLINE_MAX 48u        /* bytes of a value kept in the entry itself */
#define ZS_MAX_PROCS 4096u       /* process records */
#define ZS_ID_SIZE 16

/* return codes: 0 and positive are outcomes, negative are refusals; no call ever ends the process */
enum {
    ZS_OK = 0,
    ZS_SEALED_TELL_BROKER = 1,   /* sealed, and the broker waits for it */
    ZS_EXISTS = 2,               /* the id has an entry already (its slot is returned, a reference is taken) */
    ZS_TIMEOUT = 3,
    ZS_INTERRUPTED = 4,          /* a signal arrived: run handlers, call again */
    ZS_LAST = 5,                 /* iteration is over */
    ZS_NOT_FOUND = -1,
    ZS_FULL = -2,                /* no room: free or spill something, then try again */
    ZS_TOO_LARGE = -3,           /* larger than the whole store */
    ZS_STALE = -4,               /* attempt or claimant does not match: the caller was superseded */
    ZS_BAD_STATE = -5,
    ZS_GONE = -6,                /* the target process has been reaped */
    ZS_BROKER_GONE = -7,
    ZS_NO_MEMORY = -8,           /* the kernel refused pages (ENOSPC, ENOMEM) */
    ZS_TOO_MANY = -9,            /* entries, holds or process records are exhausted */
    ZS_BAD_SEGMENT = -10,        /* magic, version or sizes do not fit */
    ZS_SYSTEM = -11,             /* a system call failed; errno tells */
    ZS_BAD_ARGUMENT = -12,
    ZS_PINNED = -13
};

/* Codes below -99 never leave the store. */

enum zs_state { ZS_FREE = 0, ZS_OPEN, ZS_PENDING, ZS_CLAIMED, ZS_SEALED, ZS_SPILLED, ZS_ZOMBIE };

/* `kind` of a sealed value: free for Python except that bit ZS_KIND_ERROR marks errors */
#define ZS_KIND_ERROR 0x80u

/* entry flags; bits from 0x10 on are the store's own and are not reported */
#define ZS_FLAG_NOTIFY 0x01u        /* with the last reference the entry turns ZOMBIE and is kept for zs_next_zombie (actor life objects) */
#define ZS_FLAG_BROKER_WATCH 0x02u
#define ZS_FLAG_FILE 0x04u          /* the value lives in a file of its own (larger than the store): the data holds its name */
#define ZS_FLAG_SYSTEM_ERROR 0x08u  /* sealed by the system, not by user code: zs_retry may reopen it */

/* marks of a PENDING entry whose value is made, or kept, on another node; bit 0x08 is the store's own */
#define ZS_MARK_REMOTE 0x01u        /* nobody on this node makes it: unlike other PENDING entries it goes with its last reference (to ZOMBIE) */
#define ZS_MARK_ELSEWHERE 0x02u     /* the value exists, on another node */
#define ZS_MARK_WANTED 0x04u        /* somebody here waits for the value: it is to be brought as soon as it exists */
#define ZS_MARK_SENT 0x10u          /* its task was sent to another node: this attempt is not for anybody here */

/* modes of zs_wait */
#define ZS_WAIT_STOP_ON_RING 0x01   /* return when the process's bell rings, too */
#define ZS_WAIT_ANYWHERE 0x02       /* what is ZS_MARK_ELSEWHERE counts as done */

enum zs_process_kind { ZS_PROC_NONE = 0, ZS_PROC_BROKER, ZS_PROC_DRIVER, ZS_PROC_WORKER, ZS_PROC_ACTOR, ZS_PROC_FORK, ZS_PROC_TEST };

/* A process handle: generation << 16 | index. 0 is nobody. Handles of reaped processes never match again (until 65,536 reuses of one record). */
typedef uint32_t zs_proc;

#define ZS_WORDS 8
/* One record per process, 128 bytes. `words` are free for Python (atomic 64-bit): counters that a peer may read without a message. */
typedef struct {
    uint32_t pid;                /* commit: nonzero = in use */
    uint32_t generation;
    uint64_t start_time;         /* /proc/<pid>/stat field 22: with pid the identity of a process */
    uint32_t kind;
    uint32_t bell;               /* futex word */
    uint32_t sleepers;           /* threads asleep on the bell (a hint: a wake is skipped when 0) */
    uint32_t expected;           /* PENDING/CLAIMED entries that target this process (derived) */
    uint32_t parent;             /* index of the process that prepared this record before a fork */
    uint32_t holds;              /* hold records in use (derived) */
    uint32_t writing;            /* entries that are OPEN, claimed with a block, or being restored by it (derived) */
    uint32_t rings;              /* counts zs_ring, which wakes even those whose objects are not done */
    uint64_t words[ZS_WORDS];
    uint8_t reserved[16];
} zs_process;

/* One entry per object, 128 bytes. */
typedef struct {
    uint8_t id[ZS_ID_SIZE];
    uint32_t state;              /* commit; enum zs_state */
    uint32_t attempt;
    uint64_t size;               /* bytes of the value, or of the spec while PENDING/CLAIMED */
    union {
        uint64_t open_size;      /* while OPEN, or open_block != 0: bytes of the value being written | slots of its list << 40 */
        struct {                 /* else: list of sealed, unpinned blocks, of zombies, or (older only) of entries to be freed (derived) */
            uint32_t older, newer;
        };
    };
    uint32_t block;              /* granule of the value, or of dependency list + spec while PENDING/CLAIMED; 0 = inline */
    uint32_t open_block;         /* granule of the block that `writer` fills */
    uint32_t next;               /* hash chain / free list / limbo list (derived) */
    uint32_t holds;              /* first hold record (derived) */
    uint32_t held_by_objects;    /* references from other entries' lists (derived) */
    uint32_t contained;          /* slots in this entry's list: contained objects, or arguments while PENDING/CLAIMED */
    zs_proc writer;              /* who fills open_block / who claimed */
    zs_proc target;              /* who must seal it; 0 = the broker */
    uint8_t flags, kind;
    uint8_t inline_size;
    uint8_t marks;               /* ZS_MARK_*; lock-free looks at it are hints */
    uint32_t job;                /* small number of the job, for accounting; free for Python */
    uint8_t inline_data[ZS_INLINE_MAX - 8];
    uint8_t inline_tail[8];
} zs_entry;

/* Where an entry's list of slots lies. Extents follow from the fields, so that repair can tell them without the allocator:
 *   SEALED           value, zeros up to a multiple of 4, list; in `block`, or in inline_data when all fits there
 *   SPILLED          block is 0 without a list, else the last granules of the former block: list at byte round4(size) % 64
 *   PENDING/CLAIMED  list, spec; in `block` or in inline_data
 *   open_block       value, zeros, room for the list (as it will be when SEALED); an OPEN entry without open_block is written inline
 * A claimant's open_block that was superseded while its writer lives moves into an entry of its own (OPEN, no id, target = slot of the claim),
 * until that writer seals in vain, aborts or is reaped. */

/* A process's share in an object. */
typedef struct {
    uint32_t slot;               /* commit: nonzero = in use */
    uint16_t proc;
    uint16_t watching;           /* threads of that process waiting for the object */
    uint32_t references;
    uint32_t pins;
    uint32_t next;               /* next hold of the same entry / free list (derived) */
    uint32_t reserved;
} zs_hold;

/* Process-local handle; the caller provides the memory (all zero before zs_attach). Not valid after fork until zs_fork_child. */
typedef struct {
    uint8_t *base;
    uint64_t mapped;
    int fd;
    uint32_t pid;
    uint32_t cpus;               /* that this process may use: spinning before sleeping pays only with several */
    zs_proc self;
} zs_store;

typedef struct {
    uint32_t state, attempt;
    uint8_t kind, flags;
    uint16_t inline_size;
    uint64_t size;
    const uint8_t *data;         /* into the mapping (block) or into the entry (inline); valid while pinned / referenced */
    uint64_t offset;             /* of data in the segment, for private mappings */
} zs_view;

typedef struct {
    uint64_t capacity, committed, used, free_bytes, largest_free, high_water, inline_bytes;
    uint64_t entries, entry_limit, pending, open, sealed, spilled, zombies, holds, processes, pins;
    uint64_t puts, gets, seals, deletes, claims, stale_seals, repairs, reaped, wakes, grows, spins;
} zs_statistics;

/* ---- segment -------------------------------------------------------------------------------------------------------------- */

/* Lay out an empty segment in `fd` (memfd or fresh file; truncated to its full sparse size here; pages are allocated slab by slab later).
 * data_capacity: bytes for blocks, entry_limit: most objects. ZS_OK, ZS_SYSTEM, ZS_NO_MEMORY, ZS_BAD_ARGUMENT. */
int zs_format(int fd, uint64_t data_capacity, uint32_t entry_limit);
/* Map an existing segment. ZS_OK, ZS_SYSTEM, ZS_BAD_SEGMENT. */
int zs_attach(zs_store *s, int fd);
/* Unmap. No view may be alive. Does not unregister. */
void zs_detach(zs_store *s);

/* ---- processes ------------------------------------------------------------------------------------------------------------ */

/* Enter the calling process (pid and start time) and make it s->self. The one of kind BROKER becomes the segment's broker. ZS_OK, ZS_TOO_MANY. */
int zs_register(zs_store *s, uint32_t kind);
/* Enter a child that was just forked and has not run zray code yet, on its behalf (pid known, e.g. by the fork parent). */
int zs_register_pid(zs_store *s, uint32_t kind, uint32_t pid, zs_proc *proc);
/* Become a record entered for this process by zs_register_pid. ZS_BAD_STATE when the pid differs. */
int zs_adopt(zs_store *s, zs_proc proc);
/* A clean good-bye: gives everything back as zs_reap would, for the caller itself. */
int zs_unregister(zs_store *s);
/* Before fork(): duplicate all holds of the caller for the coming child in an embryo record. Then in the child zs_fork_child; on failure of fork
 * in the parent zs_fork_abort. An embryo whose parent is gone is reaped. */
int zs_fork_prepare(zs_store *s, zs_proc *embryo);
int zs_fork_child(zs_store *s, zs_proc embryo);
int zs_fork_abort(zs_store *s, zs_proc embryo);
/* Is that process still there (pid exists and start time matches)? 1, 0. Zombies (unreaped children) count as gone. */
int zs_alive(zs_store *s, zs_proc proc);
/* Give back everything of a process whose exit is confirmed: references, pins, OPEN entries; entries it had CLAIMED stay so (zs_next_orphan finds them).
 * ZS_OK, ZS_NOT_FOUND, ZS_BAD_STATE when it is still alive. */
int zs_reap(zs_store *s, zs_proc proc);
/* Reap every process found dead; returns how many (>= 0). Cheap: one kill(pid, 0) each. Only for processes that no one else waits for, or any time. */
int zs_sweep(zs_store *s);
/* Iterate PENDING/CLAIMED entries whose target (or claimant) is `proc`: *cursor starts at 0. ZS_OK with *slot (no reference taken), ZS_LAST. */
int zs_next_orphan(zs_store *s, zs_proc proc, uint32_t *cursor, uint32_t *slot);
/* The same over PENDING entries that the process made with zs_expect and nobody has claimed: the call may never have been sent. */
int zs_next_made(zs_store *s, zs_proc proc, uint32_t *cursor, uint32_t *slot);
/* Atomic words of a process record. */
uint64_t zs_word_get(zs_store *s, zs_proc proc, int word);
int zs_word_set(zs_store *s, zs_proc proc, int word, uint64_t value);
uint64_t zs_word_add(zs_store *s, zs_proc proc, int word, uint64_t delta);
uint32_t zs_expected(zs_store *s, zs_proc proc);    /* entries that wait for this process */
/* Wake every sleeper of that process so that it looks around. */
int zs_ring(zs_store *s, zs_proc proc);
/* Segment-wide atomic words (log events and the like); word < ZS_WORDS. */
uint64_t zs_global_get(zs_store *s, int word);
uint64_t zs_global_add(zs_store *s, int word, uint64_t delta);

/* ---- references ------------------------------------------------------------------------------------------------------------ */

/* Find an entry and take a reference. ZS_OK, ZS_NOT_FOUND, ZS_TOO_MANY. */
int zs_reference(zs_store *s, const uint8_t *id, uint32_t *slot);
/* Take another reference on an entry the caller (or an entry it pins) already references. */
int zs_reference_slot(zs_store *s, uint32_t slot);
/* Copy the id of an entry that the caller references or has claimed. ZS_OK, ZS_NOT_FOUND. Lock-free. */
int zs_id_of(zs_store *s, uint32_t slot, uint8_t *id);
/* Who must seal a PENDING/CLAIMED entry, and who has claimed it (0: nobody). Lock-free; a hint unless the caller knows the entry cannot change. ZS_OK, ZS_BAD_STATE. */
int zs_makers(zs_store *s, uint32_t slot, zs_proc *target, zs_proc *claimant);
/* How many references there are to a referenced entry: those of all processes, and those of other entries' lists (each list counts). */
uint64_t zs_references(zs_store *s, uint32_t slot);
/* Drop one. The last one of all frees the entry and, iteratively, what only it contained. */
int zs_release(zs_store *s, uint32_t slot);
/* Drop one in each of n slots under one lock. */
int zs_release_many(zs_store *s, const uint32_t *slots, size_t n);
/* Take references on all entries contained in a sealed, referenced entry; at most `room` slots and their ids (room x 16 bytes) are written. *n = how many. */
int zs_reference_contained(zs_store *s, uint32_t slot, uint32_t *slots, uint8_t *ids, size_t room, size_t *n);

/* ---- making objects --------------------------------------------------------------------------------------------------------- */

/* Create and seal at once a value of at most ZS_INLINE_MAX bytes, with no contained references. Takes a reference. ZS_OK, ZS_EXISTS, ZS_TOO_MANY, ZS_NO_MEMORY. */
int zs_put_inline(zs_store *s, const uint8_t *id, const void *data, uint32_t size, uint8_t kind, uint32_t job, uint32_t *slot);
/* Open a new object of `size` bytes (plus 4 per contained slot): *data is where to write them. Takes a reference. The block is 64-byte aligned and
 * backed by pages. ZS_OK, ZS_EXISTS, ZS_FULL, ZS_TOO_LARGE, ZS_NO_MEMORY, ZS_TOO_MANY. */
int zs_create(zs_store *s, const uint8_t *id, uint64_t size, uint32_t contained, uint32_t job, uint32_t *slot, uint8_t **data);
/* memcpy into a block, without a lock. From 16 MiB on the bytes pass the caches by: a reader would find few of them there anyway. */
void zs_copy(void *to, const void *from, size_t size);
/* Seal what zs_create opened. `contained`: the slots the value refers to (referenced by the caller now; the entry takes its own references).
 * ZS_OK, ZS_SEALED_TELL_BROKER, ZS_STALE, ZS_BAD_STATE. */
int zs_seal(zs_store *s, uint32_t slot, uint8_t kind, uint8_t flags, const uint32_t *contained, uint32_t n);
/* As zs_seal, under another id than it was opened with, which nobody has seen before then: what several processes make alike is found whole or not at all.
 * ZS_EXISTS when an object of that id is there already: what was opened goes, with the caller's reference to it, and *slot is the other, referenced. */
int zs_seal_as(zs_store *s, uint32_t *slot, const uint8_t *id, uint8_t kind, uint8_t flags, const uint32_t *contained, uint32_t n);
/* Take back an OPEN object (or a block made by zs_open_result). References stay: as long as somebody has one, what was OPEN is a sealed, empty
 * system error (size 0, ZS_KIND_ERROR, ZS_FLAG_SYSTEM_ERROR). The same happens to it when its writer is reaped. */
int zs_abort(zs_store *s, uint32_t slot);
/* Take back the block of that attempt of a result, which may have been superseded, also by the caller: a later attempt's block stays. The entry stays
 * claimed. ZS_OK, ZS_STALE (the caller has a block of another attempt), ZS_BAD_STATE (it has none). */
int zs_abort_result(zs_store *s, uint32_t slot, uint32_t attempt);
/* A small entry with NOTIFY, state SEALED, holding `data` inline: an actor's life object. Takes a reference. */
int zs_put_life(zs_store *s, const uint8_t *id, const void *data, uint32_t size, uint32_t job, uint32_t *slot);

/* ---- results of tasks -------------------------------------------------------------------------------------------------------- */

/* Make the PENDING entry of a result. deps: slots of argument objects, held until the entry is sealed or freed. spec: kept for recovery (may be NULL).
 * An id that exists: SEALED/SPILLED/PENDING/CLAIMED -> ZS_EXISTS (reference taken). Takes a reference. ZS_OK, ZS_EXISTS, ZS_GONE, ZS_FULL, ZS_TOO_MANY, ZS_NO_MEMORY. */
int zs_expect(zs_store *s, const uint8_t *id, zs_proc target, uint32_t job, uint8_t flags, const uint32_t *deps, uint32_t n_deps,
              const void *spec, uint32_t spec_size, uint32_t *slot);
/* Become the one executor. ZS_OK, ZS_STALE (attempt differs, claimed already, not pending any more, sent to another node, or its value is there), ZS_NOT_FOUND. Takes no reference; *slot is valid while claimed. */
int zs_claim(zs_store *s, const uint8_t *id, uint32_t attempt, uint32_t *slot);
/* As the claimant: result of at most ZS_INLINE_MAX bytes. Releases the arguments. ZS_OK, ZS_SEALED_TELL_BROKER, ZS_STALE. */
int zs_seal_inline(zs_store *s, uint32_t slot, uint32_t attempt, const void *data, uint32_t size, uint8_t kind, uint8_t flags);
/* As the claimant (or the broker, for errors): get a block for a larger result; fill it, then zs_seal_result. A block left by a killed claimant is given back by zs_reap. */
int zs_open_result(zs_store *s, uint32_t slot, uint32_t attempt, uint64_t size, uint32_t contained, uint8_t **data);
int zs_seal_result(zs_store *s, uint32_t slot, uint32_t attempt, uint8_t kind, uint8_t flags, const uint32_t *contained, uint32_t n);
/* Further results of the same task (num_returns > 1) share its fate: claim them by id with the same attempt as well; this claims n at once or none. Those
 * that have their values, of an earlier run whose other results were lost, are passed over: to seal them is ZS_STALE. One at least must be claimable. */
int zs_claim_many(zs_store *s, const uint8_t *ids, uint32_t n, uint32_t attempt, uint32_t *slots);
/* By the broker: from PENDING/CLAIMED (or a sealed system error) to PENDING with attempt+1 and a new target; wakes nobody. ZS_OK with *attempt, ZS_BAD_STATE, ZS_GONE. */
int zs_retry(zs_store *s, uint32_t slot, zs_proc target, uint32_t *attempt);
/* Change who must seal a PENDING entry. ZS_OK, ZS_BAD_STATE, ZS_GONE. */
int zs_retarget(zs_store *s, uint32_t slot, zs_proc target);
/* By anyone allowed to decide (the broker): seal whatever the claim, fencing the claimant (attempt+1). Inline only; a larger error goes through zs_open_forced. */
int zs_seal_forced(zs_store *s, uint32_t slot, const void *data, uint32_t size, uint8_t kind, uint8_t flags);
/* The same with a block: fences the claimant (attempt+1, writer = caller), after which zs_open_result / zs_seal_result with *attempt work for the caller. */
int zs_take_over(zs_store *s, uint32_t slot, uint32_t *attempt);
/* The same for a value that comes from another node: only an entry that is ZS_MARK_ELSEWHERE (and stays so) is taken over, which is seen under the
 * lock. One that was reopened since (zs_retry) is made anew, perhaps by a claimant who is at work: that one is not fenced, and this is ZS_BAD_STATE. */
int zs_take_copy(zs_store *s, uint32_t slot, uint32_t *attempt);
/* By the broker: the value of a PENDING entry is made on another node (made = 0), or kept there (made = 1: wakes whoever waits for it anywhere). Releases
 * the arguments, sets NOTIFY. *wanted: whether somebody here waits for the value. The caller holds a reference. ZS_OK, ZS_BAD_STATE. */
int zs_elsewhere(zs_store *s, uint32_t slot, int made, int *wanted);
/* By the broker: the task of a PENDING entry is about to be sent to another node. Copies of it may lie here: from now on they are not begun (zs_claim), until
 * zs_retry gives it another attempt. ZS_OK, ZS_BAD_STATE (claimed, done, or sent before). */
int zs_send_away(zs_store *s, uint32_t slot);
/* Mark those of n referenced slots that are not done as wanted here; the indices of those that are elsewhere and were not wanted before come into
 * `found` (room for n). Returns how many: the broker must be told of these. */
size_t zs_want(zs_store *s, const uint32_t *slots, size_t n, uint32_t *found);
/* Lock-free: ZS_MARK_* of a referenced slot. */
uint32_t zs_marks(zs_store *s, uint32_t slot);
/* Copy the kept spec of a PENDING/CLAIMED entry: *size on entry the room, on return the size. ZS_OK, ZS_NOT_FOUND (none kept), ZS_TOO_LARGE (room too small). */
int zs_spec(zs_store *s, uint32_t slot, void *buffer, uint32_t *size, uint32_t *attempt);

/* ---- reading ------------------------------------------------------------------------------------------------------------------- */

/* Lock-free: state (and attempt) of a referenced slot. */
uint32_t zs_state_of(zs_store *s, uint32_t slot);
uint32_t zs_attempt_of(zs_store *s, uint32_t slot);
/* Lock-free copy of an inline value: ZS_OK with *size and kind (buffer has ZS_INLINE_MAX bytes), ZS_BAD_STATE when not sealed or not inline. */
int zs_read_inline(zs_store *s, uint32_t slot, void *buffer, uint32_t *size, uint8_t *kind, uint8_t *flags);
/* Pin a SEALED value and describe it; touches the least-recently-used list. ZS_OK, ZS_BAD_STATE (not sealed, or spilled: see view->state). The slot must be referenced. */
int zs_pin(zs_store *s, uint32_t slot, zs_view *view);
/* Drop a pin. Never fails on a live pin; safe from destructors. */
int zs_unpin(zs_store *s, uint32_t slot);
/* Describe any referenced entry without pinning (data is NULL). */
int zs_describe(zs_store *s, uint32_t slot, zs_view *view);
/* Wait until at least `want` of the n referenced slots are done (SEALED or SPILLED), or timeout_ns passed (< 0: no limit), or someone rings this
 * process's bell (zs_ring) with ZS_WAIT_STOP_ON_RING in `mode`. *done = how many are. Returns ZS_OK (done, or rung), ZS_TIMEOUT, ZS_INTERRUPTED, ZS_BROKER_GONE.
 * Call without the GIL. */
int zs_wait(zs_store *s, const uint32_t *slots, size_t n, size_t want, int64_t timeout_ns, int mode, size_t *done);
/* The same; with ZS_WAIT_STOP_ON_RING any ring since zs_rings gave `rings` ends it, so that none between a look around and the wait is missed. */
int zs_wait_since(zs_store *s, const uint32_t *slots, size_t n, size_t want, int64_t timeout_ns, int mode, uint32_t rings, size_t *done);
/* How often this process's bell has rung. */
uint32_t zs_rings(zs_store *s);
/* Wait until a descriptor is readable, as briefly as `zs_wait` waits for one entry (it spins under the same rule). A negative timeout waits for ever.
 * ZS_OK, ZS_TIMEOUT, ZS_INTERRUPTED; ZS_BAD_ARGUMENT for what is no descriptor. */
int zs_wait_fd(zs_store *s, int fd, int64_t timeout_ns);
/* Count the done ones, lock-free. */
size_t zs_count_done(zs_store *s, const uint32_t *slots, size_t n);
/* By the broker: ask to be told when the id is sealed. ZS_OK: will be told; ZS_EXISTS: done already; ZS_NOT_FOUND: no such entry. */
int zs_watch_broker(zs_store *s, const uint8_t *id);

/* ---- room ------------------------------------------------------------------------------------------------------------------------ */

/* The least recently used sealed, unpinned block of at least min_size bytes, pinned for the caller and referenced. ZS_OK, ZS_LAST when there is none. */
int zs_spill_candidate(zs_store *s, uint64_t min_size, uint32_t *slot, zs_view *view);
/* After its bytes are in a file: give the block back if only the caller's pin is left. Drops the candidate's pin and reference. ZS_OK, ZS_PINNED (somebody reads it: stays). */
int zs_spilled(zs_store *s, uint32_t slot);
/* Give up on a candidate: drops pin and reference. */
int zs_spill_abort(zs_store *s, uint32_t slot);
/* Open a block to read a SPILLED value back into (one restorer at a time: ZS_BAD_STATE for a second one while the first lives); then zs_restored. */
int zs_restore(zs_store *s, uint32_t slot, uint8_t **data, uint64_t *size);
int zs_restored(zs_store *s, uint32_t slot, int good);
/* Drop the value of a sealed object although it is referenced (user asked to free it): it becomes an error object of that inline data. ZS_PINNED if pinned. */
int zs_discard(zs_store *s, uint32_t slot, const void *data, uint32_t size, uint8_t kind);
/* Allocate pages ahead of need, a piece per call, until `bytes` beyond the highest block in use have them (never over capacity). Returns ZS_OK, ZS_LAST (nothing to do), ZS_NO_MEMORY. */
int zs_touch_ahead(zs_store *s, uint64_t bytes);

/* ---- the dead and the living -------------------------------------------------------------------------------------------------------- */

/* Next ZOMBIE entry: copies its id and takes it out (freed). ZS_OK, ZS_LAST. */
int zs_next_zombie(zs_store *s, uint8_t *id);
/* Iterate all entries in use: *cursor starts at 0. Copies the entry. ZS_OK, ZS_LAST. */
int zs_walk(zs_store *s, uint32_t *cursor, zs_entry *copy);
int zs_stats(zs_store *s, zs_statistics *out);
/* Verify every invariant under the lock; writes the first violation into text. ZS_OK, ZS_BAD_STATE. Invariants:
 *   committed == used + free + wilderness;  no two extents overlap; boundary tags agree; no two neighbouring free blocks;
 *   every entry is in exactly its hash chain; every hold in exactly its entry's list;
 *   held_by_objects == number of occurrences in the lists of other entries;  expected == entries that target the process;
 *   sealed & unpinned & has block <=> in the least-recently-used list;  an entry in SEALED/SPILLED has a holder. */
int zs_check(zs_store *s, char *text, size_t room);
/* 96 bits of a new id: MurmurHash3-style mix of (parent, counter), identical to zray.ids.task_id. Writes 16 bytes (index 0). */
void zs_derive_id(const uint8_t *parent, uint64_t counter, uint8_t *id);

#ifdef ZS_CRASH_POINTS
/* Test builds: the n-th crash point from now kills the process (0 = off); each store operation passes several, between any two commits. */
void zs_crash_after(uint64_t n);
uint64_t zs_crash_count(void);
#endif

#endif
