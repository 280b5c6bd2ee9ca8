# The header of the store as Cython declarations, nothing more: meanings, codes and lifetimes are in _store_core.h.
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "_store_core.h" nogil:
    enum:
        ZS_VERSION
        ZS_GRANULE
        ZS_INLINE_MAX
        ZS_MAX_PROCS
        ZS_ID_SIZE
        ZS_WORDS

    enum:
        ZS_OK
        ZS_SEALED_TELL_BROKER
        ZS_EXISTS
        ZS_TIMEOUT
        ZS_INTERRUPTED
        ZS_LAST
        ZS_NOT_FOUND
        ZS_FULL
        ZS_TOO_LARGE
        ZS_STALE
        ZS_BAD_STATE
        ZS_GONE
        ZS_BROKER_GONE
        ZS_NO_MEMORY
        ZS_TOO_MANY
        ZS_BAD_SEGMENT
        ZS_SYSTEM
        ZS_BAD_ARGUMENT
        ZS_PINNED

    enum:
        ZS_FREE
        ZS_OPEN
        ZS_PENDING
        ZS_CLAIMED
        ZS_SEALED
        ZS_SPILLED
        ZS_ZOMBIE

    enum:
        ZS_KIND_ERROR
        ZS_FLAG_NOTIFY
        ZS_FLAG_BROKER_WATCH
        ZS_FLAG_FILE
        ZS_FLAG_SYSTEM_ERROR
        ZS_MARK_REMOTE
        ZS_MARK_ELSEWHERE
        ZS_MARK_WANTED
        ZS_MARK_SENT
        ZS_WAIT_STOP_ON_RING
        ZS_WAIT_ANYWHERE

    enum:
        ZS_PROC_NONE
        ZS_PROC_BROKER
        ZS_PROC_DRIVER
        ZS_PROC_WORKER
        ZS_PROC_ACTOR
        ZS_PROC_FORK
        ZS_PROC_TEST

    ctypedef uint32_t zs_proc

    ctypedef struct zs_entry:
        uint8_t id[16]
        uint32_t state
        uint32_t attempt
        uint64_t size
        uint32_t block
        uint32_t held_by_objects
        uint32_t contained
        zs_proc writer
        zs_proc target
        uint8_t flags
        uint8_t kind
        uint8_t inline_size
        uint8_t marks
        uint32_t job

    ctypedef struct zs_store:
        uint8_t *base
        uint64_t mapped
        int fd
        uint32_t pid
        zs_proc self

    ctypedef struct zs_view:
        uint32_t state
        uint32_t attempt
        uint8_t kind
        uint8_t flags
        uint16_t inline_size
        uint64_t size
        const uint8_t *data
        uint64_t offset

    ctypedef struct zs_statistics:
        uint64_t capacity, committed, used, free_bytes, largest_free, high_water, inline_bytes
        uint64_t entries, entry_limit, pending, open, sealed, spilled, zombies, holds, processes, pins
        uint64_t puts, gets, seals, deletes, claims, stale_seals, repairs, reaped, wakes, grows, spins

    int zs_format(int fd, uint64_t data_capacity, uint32_t entry_limit)
    int zs_attach(zs_store *s, int fd)
    void zs_detach(zs_store *s)

    int zs_register(zs_store *s, uint32_t kind)
    int zs_register_pid(zs_store *s, uint32_t kind, uint32_t pid, zs_proc *proc)
    int zs_adopt(zs_store *s, zs_proc proc)
    int zs_unregister(zs_store *s)
    int zs_fork_prepare(zs_store *s, zs_proc *embryo)
    int zs_fork_child(zs_store *s, zs_proc embryo)
    int zs_fork_abort(zs_store *s, zs_proc embryo)
    int zs_alive(zs_store *s, zs_proc proc)
    int zs_reap(zs_store *s, zs_proc proc)
    int zs_sweep(zs_store *s)
    int zs_next_made(zs_store *s, zs_proc proc, uint32_t *cursor, uint32_t *slot)
    int zs_next_orphan(zs_store *s, zs_proc proc, uint32_t *cursor, uint32_t *slot)
    uint64_t zs_word_get(zs_store *s, zs_proc proc, int word)
    int zs_word_set(zs_store *s, zs_proc proc, int word, uint64_t value)
    uint64_t zs_word_add(zs_store *s, zs_proc proc, int word, uint64_t delta)
    uint32_t zs_expected(zs_store *s, zs_proc proc)
    int zs_ring(zs_store *s, zs_proc proc)
    uint64_t zs_global_get(zs_store *s, int word)
    uint64_t zs_global_add(zs_store *s, int word, uint64_t delta)

    int zs_reference(zs_store *s, const uint8_t *id, uint32_t *slot)
    int zs_reference_slot(zs_store *s, uint32_t slot)
    int zs_id_of(zs_store *s, uint32_t slot, uint8_t *id)
    int zs_makers(zs_store *s, uint32_t slot, zs_proc *target, zs_proc *claimant)
    uint64_t zs_references(zs_store *s, uint32_t slot)
    int zs_release(zs_store *s, uint32_t slot)
    int zs_release_many(zs_store *s, const uint32_t *slots, size_t n)
    int zs_reference_contained(zs_store *s, uint32_t slot, uint32_t *slots, uint8_t *ids, size_t room, size_t *n)

    int zs_put_inline(zs_store *s, const uint8_t *id, const void *data, uint32_t size, uint8_t kind, uint32_t job, uint32_t *slot)
    int zs_create(zs_store *s, const uint8_t *id, uint64_t size, uint32_t contained, uint32_t job, uint32_t *slot, uint8_t **data)
    void zs_copy(void *to, const void *from_, size_t size)
    int zs_seal(zs_store *s, uint32_t slot, uint8_t kind, uint8_t flags, const uint32_t *contained, uint32_t n)
    int zs_seal_as(zs_store *s, uint32_t *slot, const uint8_t *id, uint8_t kind, uint8_t flags, const uint32_t *contained, uint32_t n)
    int zs_abort(zs_store *s, uint32_t slot)
    int zs_abort_result(zs_store *s, uint32_t slot, uint32_t attempt)
    int zs_put_life(zs_store *s, const uint8_t *id, const void *data, uint32_t size, uint32_t job, uint32_t *slot)

    int zs_expect(zs_store *s, const uint8_t *id, zs_proc target, uint32_t job, uint8_t flags, const uint32_t *deps,
                  uint32_t n_deps, const void *spec, uint32_t spec_size, uint32_t *slot)
    int zs_claim(zs_store *s, const uint8_t *id, uint32_t attempt, uint32_t *slot)
    int zs_seal_inline(zs_store *s, uint32_t slot, uint32_t attempt, const void *data, uint32_t size, uint8_t kind, uint8_t flags)
    int zs_open_result(zs_store *s, uint32_t slot, uint32_t attempt, uint64_t size, uint32_t contained, uint8_t **data)
    int zs_seal_result(zs_store *s, uint32_t slot, uint32_t attempt, uint8_t kind, uint8_t flags, const uint32_t *contained,
                       uint32_t n)
    int zs_claim_many(zs_store *s, const uint8_t *ids, uint32_t n, uint32_t attempt, uint32_t *slots)
    int zs_retry(zs_store *s, uint32_t slot, zs_proc target, uint32_t *attempt)
    int zs_retarget(zs_store *s, uint32_t slot, zs_proc target)
    int zs_seal_forced(zs_store *s, uint32_t slot, const void *data, uint32_t size, uint8_t kind, uint8_t flags)
    int zs_take_over(zs_store *s, uint32_t slot, uint32_t *attempt)
    int zs_take_copy(zs_store *s, uint32_t slot, uint32_t *attempt)
    int zs_elsewhere(zs_store *s, uint32_t slot, int made, int *wanted)
    int zs_send_away(zs_store *s, uint32_t slot)
    size_t zs_want(zs_store *s, const uint32_t *slots, size_t n, uint32_t *found)
    uint32_t zs_marks(zs_store *s, uint32_t slot)
    int zs_spec(zs_store *s, uint32_t slot, void *buffer, uint32_t *size, uint32_t *attempt)

    uint32_t zs_state_of(zs_store *s, uint32_t slot)
    uint32_t zs_attempt_of(zs_store *s, uint32_t slot)
    int zs_read_inline(zs_store *s, uint32_t slot, void *buffer, uint32_t *size, uint8_t *kind, uint8_t *flags)
    int zs_pin(zs_store *s, uint32_t slot, zs_view *view)
    int zs_unpin(zs_store *s, uint32_t slot)
    int zs_describe(zs_store *s, uint32_t slot, zs_view *view)
    int zs_wait(zs_store *s, const uint32_t *slots, size_t n, size_t want, int64_t timeout_ns, int mode, size_t *done)
    int zs_wait_since(zs_store *s, const uint32_t *slots, size_t n, size_t want, int64_t timeout_ns, int mode, uint32_t rings, size_t *done)
    uint32_t zs_rings(zs_store *s)
    int zs_wait_fd(zs_store *s, int fd, int64_t timeout_ns)
    size_t zs_count_done(zs_store *s, const uint32_t *slots, size_t n)
    int zs_watch_broker(zs_store *s, const uint8_t *id)

    int zs_spill_candidate(zs_store *s, uint64_t min_size, uint32_t *slot, zs_view *view)
    int zs_spilled(zs_store *s, uint32_t slot)
    int zs_spill_abort(zs_store *s, uint32_t slot)
    int zs_restore(zs_store *s, uint32_t slot, uint8_t **data, uint64_t *size)
    int zs_restored(zs_store *s, uint32_t slot, int good)
    int zs_discard(zs_store *s, uint32_t slot, const void *data, uint32_t size, uint8_t kind)
    int zs_touch_ahead(zs_store *s, uint64_t bytes)

    int zs_next_zombie(zs_store *s, uint8_t *id)
    int zs_walk(zs_store *s, uint32_t *cursor, zs_entry *copy)
    int zs_stats(zs_store *s, zs_statistics *out)
    int zs_check(zs_store *s, char *text, size_t room)
    void zs_derive_id(const uint8_t *parent, uint64_t counter, uint8_t *id)
