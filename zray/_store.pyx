# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The object store as Python objects: `Store` (a mapped segment and this process's place in it), `ObjectRef` (a counted reference), `Buffer`
(pinned bytes).

Covers lifetimes and the translation of return codes into exceptions (`raise_code`, the only such place). Does not cover policy: making room,
spilling, retries and words for users are `zray.object_store`'s. Neighbours: `_store_core.h` is the contract, `_store.pyi` the types for readers.

Destructors only drop a reference or a pin in C: they never raise, send or run Python code.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.exc cimport PyErr_CheckSignals
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.buffer cimport PyBUF_READ, PyBUF_WRITE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

cimport cython
from zray._store_core cimport *

cdef extern from *:
    """
    #ifdef __linux__
    #include <signal.h>
    #include <sys/prctl.h>
    static void set_parent_death_signal(void) { prctl(PR_SET_PDEATHSIG, SIGKILL); }
    #else
    static void set_parent_death_signal(void) { }
    #endif
    """
    void set_parent_death_signal()

import os as _os
import pickle as _pickle
import threading as _threading
import time as _time
from types import GenericAlias as _GenericAlias

from zray import errors as _errors
from zray import object_ref as _object_ref
from zray import serialization as _serialization

cdef object _pickle_loads = _pickle.loads
cdef object _loads = _serialization.loads
cdef object _note_contained = _object_ref.note_contained

STATE_FREE, STATE_OPEN, STATE_PENDING, STATE_CLAIMED = ZS_FREE, ZS_OPEN, ZS_PENDING, ZS_CLAIMED
STATE_SEALED, STATE_SPILLED, STATE_ZOMBIE = ZS_SEALED, ZS_SPILLED, ZS_ZOMBIE
KIND_ERROR_FLAG = ZS_KIND_ERROR
FLAG_NOTIFY, FLAG_FILE, FLAG_SYSTEM_ERROR = ZS_FLAG_NOTIFY, ZS_FLAG_FILE, ZS_FLAG_SYSTEM_ERROR
MARK_REMOTE, MARK_ELSEWHERE, MARK_WANTED, MARK_SENT = ZS_MARK_REMOTE, ZS_MARK_ELSEWHERE, ZS_MARK_WANTED, ZS_MARK_SENT
PROC_BROKER, PROC_DRIVER, PROC_WORKER, PROC_FORK = ZS_PROC_BROKER, ZS_PROC_DRIVER, ZS_PROC_WORKER, ZS_PROC_FORK
INLINE_MAX = ZS_INLINE_MAX

OK, TELL_BROKER, EXISTS, TIMEOUT, STALE, GONE = ZS_OK, ZS_SEALED_TELL_BROKER, ZS_EXISTS, ZS_TIMEOUT, ZS_STALE, ZS_GONE

DEF SLICE_NS = 100000000  # a waiter looks up this often: signals, death of the broker


class StoreFull(Exception):
    """No room for a block of `size` bytes: make room and try again (never leaves zray)."""

    def __init__(self, size):
        super().__init__(size)
        self.size = size


class TargetGone(Exception):
    """The process that should make the object has ended (never leaves zray)."""


class NotSealed(Exception):
    """The value is not in memory: pending, or spilled to disk (never leaves zray)."""


cdef object MISSING = object()
NOT_HERE = MISSING


cdef raise_code(int code, what, uint64_t size=0):
    """Raise the exception that stands for a refusal."""
    if code == ZS_FULL:
        raise StoreFull(size)
    if code == ZS_TOO_LARGE:
        raise _errors.ObjectStoreFullError(f"{what}: {size} bytes are more than the whole object store holds")
    if code == ZS_GONE:
        raise TargetGone(what)
    if code == ZS_BROKER_GONE:
        raise _errors.ZraySystemError("the broker of this node has ended; every process of the session ends with it. Call zray.init() again")
    if code == ZS_NO_MEMORY:
        raise _errors.ObjectStoreFullError(f"{what}: the system has no memory left for the object store ({size} bytes wanted)")
    if code == ZS_TOO_MANY:
        raise _errors.ObjectStoreFullError(f"{what}: too many objects, references or processes for this object store")
    if code == ZS_NOT_FOUND:
        raise KeyError(what)
    if code == ZS_BAD_STATE:
        raise NotSealed(what)
    if code == ZS_SYSTEM:
        raise OSError(errno, _os.strerror(errno), what)
    if code == ZS_BAD_SEGMENT:
        raise _errors.ZraySystemError(f"{what}: not an object store of this version of zray")
    if code == ZS_STALE:
        raise _errors.ZrayInternalError(f"{what}: superseded attempt")
    raise _errors.ZrayInternalError(f"{what}: store code {code}")


@cython.no_gc
@cython.final
@cython.freelist(256)
cdef class ObjectRef:
    """A reference to the result of a task, of an actor call or of `put`, which may not exist yet.

    `zray.get(ref)` waits for the value. A reference can be passed to tasks, put inside other objects and pickled; the object lives
    as long as a reference to it exists anywhere. `await ref` and `ref.future()` wait without blocking a thread.
    """

    cdef uint8_t _id[16]
    cdef readonly uint32_t slot
    cdef Store store
    cdef readonly str site
    """Where `.remote()` was called, for error messages ("" when unknown)."""

    def __init__(self):
        raise TypeError("references are made by .remote() and zray.put(), not directly")

    def __dealloc__(self):
        if self.slot and self.store is not None and not self.store.closed:
            zs_release(&self.store.s, self.slot)

    def binary(self):
        """Return the 16 bytes of the id."""
        return PyBytes_FromStringAndSize(<char *>self._id, 16)

    def hex(self):
        """Return the id as 32 hexadecimal digits."""
        return self.binary().hex()

    def is_nil(self):
        return False

    def task_id(self):
        """Return the id of the task that makes the object (16 bytes)."""
        return PyBytes_FromStringAndSize(<char *>self._id, 12) + b"\0\0\0\0"

    def __hash__(self):
        cdef uint64_t a
        cdef uint32_t b
        memcpy(&a, self._id, 8)
        memcpy(&b, self._id + 12, 4)
        return <Py_hash_t>((a ^ (<uint64_t>b << 17)) >> 1)

    def __eq__(self, other):
        if not isinstance(other, ObjectRef):
            return NotImplemented
        return memcmp(self._id, (<ObjectRef>other)._id, 16) == 0

    def __repr__(self):
        return f"ObjectRef({self.hex()})"

    def __reduce__(self):
        _note_contained(self)
        return _restore, (self.binary(),)

    def __await__(self):
        return _hooks.awaiting(self).__await__()

    def future(self):
        """Return a `concurrent.futures.Future` that receives the value or the exception."""
        return _hooks.future(self)

    def as_future(self):
        """Return an `asyncio.Future` of the running event loop that receives the value or the exception."""
        import asyncio

        return asyncio.wrap_future(_hooks.future(self))

    def _on_completed(self, callback):
        """Call `callback` with the value (or the exception) once it is there, in another thread."""
        _hooks.future(self).add_done_callback(lambda f: callback(f.exception() or f.result()))

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    __class_getitem__ = classmethod(_GenericAlias)


class _Hooks:
    """What references need of the session, set by `zray.session`: they know none themselves."""

    current_store = None
    future = None
    awaiting = None
    exiting = False
    """The interpreter ends."""


_hooks = _Hooks()
hooks = _hooks


cdef keep_silent():
    """Stop a daemon thread of the program that waits while the interpreter ends: what it waits for is being ended, and
    that is no news."""
    while _threading.current_thread() is not _threading.main_thread():
        _time.sleep(1.0)


def _restore(bytes id):
    """Unpickle a reference: find the object in this process's store."""
    cdef Store store = _hooks.current_store
    if store is None:
        raise _errors.ZrayUsageError("a zray reference can be unpickled only while a session is running: call zray.init() first")
    ref = store.reference(id)
    if ref is None:
        raise _errors.ObjectLostError.for_id(id)
    return ref


_object_ref.set_ref_class(ObjectRef)


@cython.final
cdef class Buffer:
    """Pinned, read-only bytes of a sealed object; the pin goes with the last view."""

    cdef Store store
    cdef uint32_t slot
    cdef const uint8_t *data
    cdef Py_ssize_t size

    def __dealloc__(self):
        if self.slot and self.store is not None:
            self.store.buffers -= 1
            if not self.store.closed:
                zs_unpin(&self.store.s, self.slot)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, <void *>self.data, self.size, 1, flags)

    def __len__(self):
        return self.size


@cython.final
cdef class KeepAlive:
    """Exports the memory of one object and keeps another alive as long (a private mapping and the pin of what it maps)."""

    cdef object memory, other

    def __init__(self, memory, other):
        self.memory = memory
        self.other = other

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyObject_GetBuffer(self.memory, view, flags)
        # The view must keep this object, not only the memory: hand the consumer a view whose owner is self.
        cdef void *start = view.buf
        cdef Py_ssize_t length = view.len
        cdef int readonly = view.readonly
        PyBuffer_Release(view)
        PyBuffer_FillInfo(view, self, start, length, readonly, flags)


@cython.final
cdef class Room:
    """Writable bytes of an object that is being made: `store.open(...)`, fill, then `seal` or `abort`; seals nothing by itself."""

    cdef readonly Store store
    cdef readonly uint32_t slot
    cdef readonly ObjectRef ref
    cdef uint8_t *data
    cdef Py_ssize_t size
    cdef bint sealed
    cdef int views

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.sealed:
            raise BufferError("the object is sealed")
        PyBuffer_FillInfo(view, self, <void *>self.data, self.size, 0, flags)

    def seal(self, int kind):
        """Make the object visible. Views made before must not be written through any more."""
        cdef int code = zs_seal(&self.store.s, self.slot, <uint8_t>kind, 0, NULL, 0)
        if code < 0:
            raise_code(code, "sealing an object")
        self.sealed = True
        return self.ref

    def __dealloc__(self):
        if not self.sealed and self.store is not None and not self.store.closed:
            zs_abort(&self.store.s, self.slot)


@cython.final
cdef class Spilling:
    """A value on its way to disk. Dropped before `finish`, wherever an interrupt came, it stays in memory as it was."""

    cdef Store store
    cdef uint32_t slot
    cdef readonly bytes id
    cdef readonly object view
    cdef bint over

    def finish(self):
        """The bytes are on disk: free their block; False when somebody started to read them meanwhile."""
        self.over = True
        return zs_spilled(&self.store.s, self.slot) == ZS_OK

    def give_up(self):
        """Leave the value in memory."""
        if not self.over and self.store is not None and not self.store.closed:
            self.over = True
            zs_spill_abort(&self.store.s, self.slot)

    def __dealloc__(self):
        if not self.over and self.store is not None and not self.store.closed:
            zs_spill_abort(&self.store.s, self.slot)


@cython.final
cdef class Restoring:
    """A spilled value on its way back into memory. Dropped before `finish`, wherever an interrupt came, it stays on disk."""

    cdef Store store
    cdef readonly ObjectRef ref
    cdef readonly object view
    cdef bint over

    def finish(self, bint good):
        """The view is filled, or (not good) cannot be; return whether the value is in memory now."""
        if self.over or self.store is None or self.store.closed:
            return False
        self.over = True
        return zs_restored(&self.store.s, self.ref.slot, good) == ZS_OK and good

    def __dealloc__(self):
        if not self.over and self.store is not None and not self.store.closed:
            zs_restored(&self.store.s, self.ref.slot, 0)


@cython.final
cdef class FillingPart:
    """Where a piece of an object goes (`Filling.part`); keeps the object in place."""

    cdef object whole
    cdef uint8_t *data
    cdef Py_ssize_t size

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, <void *>self.data, self.size, 0, flags)


@cython.final
cdef class Filling:
    """A pending object whose value comes in pieces, in any order: `store.fill(...)`, write each to its `part`, then `seal`.

    Its bytes can be read (as a buffer) before it is sealed, too: whoever reads looks only at what was written. They stay in place
    as long as this object or a view of it lives. Dropped before `seal`, the object is pending as before.
    """

    cdef Store store
    cdef readonly ObjectRef ref
    cdef uint32_t attempt
    cdef uint8_t *data
    cdef Py_ssize_t size
    cdef bint sealed

    def __len__(self):
        return self.size

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, <void *>self.data, self.size, 1, flags)

    def view(self):
        """Return a read-only view of all its bytes."""
        return memoryview(self)

    def part(self, uint64_t offset, uint64_t size):
        """Return a view through which a piece is written to its place. ValueError when it lies outside, or the object is sealed."""
        if self.sealed or offset > <uint64_t>self.size or size > <uint64_t>self.size - offset:
            raise ValueError(f"{size} bytes at {offset} are no piece of an open object of {self.size} bytes")
        cdef FillingPart part = FillingPart.__new__(FillingPart)
        part.whole = self
        part.data = self.data + offset
        part.size = size
        return memoryview(part)

    def seal(self, int kind, int flags, list refs):
        """Make the object visible; `refs`: what it refers to. False when somebody else has sealed it meanwhile."""
        cdef Py_ssize_t n = PyList_GET_SIZE(refs)
        cdef zs_view view
        cdef uint32_t *contained = slots_of(self.store, refs, n)
        cdef int code = zs_seal_result(&self.store.s, self.ref.slot, self.attempt, <uint8_t>kind, <uint8_t>flags, contained, <uint32_t>n)
        PyMem_Free(contained)
        if code < 0:
            return False
        # Views may outlive the reference: from now on a pin keeps the bytes.
        self.sealed = zs_pin(&self.store.s, self.ref.slot, &view) == ZS_OK
        return True

    def __dealloc__(self):
        if self.store is None or self.data == NULL:
            return
        self.store.buffers -= 1
        if self.store.closed:
            return
        if self.sealed:
            zs_unpin(&self.store.s, self.ref.slot)
        else:
            # By its attempt: the next transfer of the same value may have begun.
            zs_abort_result(&self.store.s, self.ref.slot, self.attempt)


cdef inline void copy_in(uint8_t *to, const void *source, size_t size) noexcept:
    if size > 65536:
        with nogil:
            zs_copy(to, source, size)
    else:
        memcpy(to, source, size)


cdef int fill(uint8_t *data, bytes stream, list buffers) except -1:
    """Lay a packed value out at `data`; the format is described in `zray.serialization`."""
    cdef Py_ssize_t n = PyList_GET_SIZE(buffers), i, length = PyBytes_GET_SIZE(stream)
    cdef uint64_t offset
    cdef Py_buffer view
    cdef uint32_t header[2]
    cdef uint64_t pair[2]
    if n == 0:
        copy_in(data, PyBytes_AS_STRING(stream), length)
        return 0
    header[0] = <uint32_t>n
    header[1] = <uint32_t>length
    memcpy(data, header, 8)
    memcpy(data + 8 + 16 * n, PyBytes_AS_STRING(stream), length)
    offset = 8 + 16 * n + length
    for i in range(n):
        PyObject_GetBuffer(buffers[i], &view, PyBUF_SIMPLE)
        try:
            offset = (offset + 63) & ~<uint64_t>63
            pair[0] = offset
            pair[1] = view.len
            memcpy(data + 8 + 16 * i, pair, 16)
            copy_in(data + offset, view.buf, view.len)
            offset += view.len
        finally:
            PyBuffer_Release(&view)
    return 0


cdef raise_foreign(ObjectRef ref):
    """Refuse a reference that belongs to another store: its slot means something else here."""
    raise _errors.ZrayUsageError(f"{ref!r} belongs to a zray session that has ended: references are valid in the session that made them")


cdef inline uint32_t slot_in(Store store, ObjectRef ref) except 0:
    """Return the slot of a reference in its store; raise ZrayUsageError when that is another one."""
    if ref.store is not store:
        raise_foreign(ref)
    return ref.slot


cdef uint32_t *slots_of(Store store, list refs, Py_ssize_t n) except? NULL:
    """Return a malloc'ed array of the slots of n references (NULL for none)."""
    cdef uint32_t *slots
    cdef Py_ssize_t i
    if n == 0:
        return NULL
    slots = <uint32_t *>PyMem_Malloc(n * sizeof(uint32_t))
    if slots == NULL:
        raise MemoryError()
    for i in range(n):
        if (<ObjectRef>PyList_GET_ITEM(refs, i)).store is not store:
            PyMem_Free(slots)
            raise_foreign(<ObjectRef>PyList_GET_ITEM(refs, i))
        slots[i] = (<ObjectRef>PyList_GET_ITEM(refs, i)).slot
    return slots


@cython.final
cdef class Store:
    """A mapped segment and this process's place in it."""

    cdef zs_store s
    cdef readonly bint closed      # no more operations; references drop nothing (the record was given back as a whole)
    cdef bint detached             # unmapped
    cdef readonly uint32_t buffers # live Buffer objects: the mapping must outlive them
    cdef readonly uint32_t job

    def __cinit__(self, int fd):
        memset(&self.s, 0, sizeof(zs_store))
        cdef int code = zs_attach(&self.s, fd)
        if code != ZS_OK:
            self.closed = self.detached = True
            raise_code(code, "mapping the object store")

    def __dealloc__(self):
        if not self.detached and self.buffers == 0:
            zs_detach(&self.s)

    @staticmethod
    def format(int fd, uint64_t capacity, uint32_t entries):
        """Lay out an empty store of `capacity` bytes for at most `entries` objects in a fresh file descriptor."""
        cdef int code = zs_format(fd, capacity, entries)
        if code != ZS_OK:
            raise_code(code, "creating the object store", capacity)

    # -- processes ----------------------------------------------------------------------------------------------------

    def register(self, int kind):
        """Enter this process; return its handle."""
        cdef int code = zs_register(&self.s, kind)
        if code != ZS_OK:
            raise_code(code, "entering the object store")
        return self.s.self

    def register_pid(self, int kind, uint32_t pid):
        """Enter a child that does not run zray code yet; return its handle."""
        cdef zs_proc proc
        cdef int code = zs_register_pid(&self.s, kind, pid, &proc)
        if code != ZS_OK:
            raise_code(code, "entering a process")
        return proc

    def adopt(self, uint32_t proc):
        """Become a process that `register_pid` entered."""
        cdef int code = zs_adopt(&self.s, proc)
        if code != ZS_OK:
            raise_code(code, "adopting a process record")

    @property
    def process(self):
        """Handle of this process."""
        return self.s.self

    @property
    def fd(self):
        return self.s.fd

    def set_job(self, uint32_t job):
        """Number under which objects made from now on are counted."""
        self.job = job

    def close(self):
        """Give everything back and forget the segment; unmapping waits for the last Buffer."""
        if self.closed:
            return
        self.closed = True
        zs_unregister(&self.s)

    def fork_prepare(self):
        cdef zs_proc embryo = 0
        if self.closed:
            return 0
        return embryo if zs_fork_prepare(&self.s, &embryo) == ZS_OK else 0

    def fork_child(self, uint32_t embryo):
        if embryo == 0 or zs_fork_child(&self.s, embryo) != ZS_OK:
            self.closed = True

    def alive(self, uint32_t proc):
        return bool(zs_alive(&self.s, proc))

    def reap(self, uint32_t proc):
        """Give back all that a process held whose exit is confirmed; return whether there was such a process."""
        return zs_reap(&self.s, proc) == ZS_OK

    def sweep(self):
        """Reap every process found dead; return how many."""
        cdef int n
        with nogil:
            n = zs_sweep(&self.s)
        return n

    def expected(self, uint32_t proc):
        """Number of pending results that wait for this process."""
        return zs_expected(&self.s, proc)

    def orphans(self, uint32_t proc):
        """Return [(id, attempt, kept spec or None, claimed by proc, targeted at proc)] of pending results whose maker is that process."""
        cdef uint32_t cursor = 0, slot = 0
        cdef zs_proc target = 0, claimant = 0
        cdef list found = []
        while zs_next_orphan(&self.s, proc, &cursor, &slot) == ZS_OK:
            attempt, spec = self._kept_spec(slot)
            zs_makers(&self.s, slot, &target, &claimant)
            found.append((self._id_of(slot), attempt, spec, claimant == proc, target == proc))
        return found

    def made_by(self, uint32_t proc):
        """Return [(id, attempt, kept spec or None, target)] of pending results that the process made and nobody has claimed."""
        cdef uint32_t cursor = 0, slot = 0
        cdef zs_proc target = 0, claimant = 0
        cdef list found = []
        while zs_next_made(&self.s, proc, &cursor, &slot) == ZS_OK:
            attempt, spec = self._kept_spec(slot)
            zs_makers(&self.s, slot, &target, &claimant)
            found.append((self._id_of(slot), attempt, spec, target))
        return found

    cdef tuple _kept_spec(self, uint32_t slot):
        """(attempt, spec or None) of a pending entry."""
        cdef bytearray room = bytearray(1 << 14)
        cdef char *space
        cdef uint32_t size, attempt
        cdef int code
        while True:
            space = room
            size = <uint32_t>len(room)
            attempt = 0
            code = zs_spec(&self.s, slot, space, &size, &attempt)
            if code != ZS_TOO_LARGE:
                return attempt, bytes(room[:size]) if code == ZS_OK else None
            room = bytearray(size + 64)

    def makers(self, ObjectRef ref):
        """Return (target, claimant) of a pending result: handles of the process that must make it and of the one that runs it (0: none)."""
        cdef zs_proc target = 0, claimant = 0
        zs_makers(&self.s, ref.slot, &target, &claimant)
        return target, claimant

    def id_of(self, uint32_t slot):
        """The id at a slot that this process references or has claimed."""
        return self._id_of(slot)

    cdef bytes _id_of(self, uint32_t slot):
        cdef uint8_t id[16]
        if zs_id_of(&self.s, slot, id) != ZS_OK:
            return b""
        return PyBytes_FromStringAndSize(<char *>id, 16)

    def word(self, uint32_t proc, int word):
        return zs_word_get(&self.s, proc, word)

    def own_word(self, int word):
        return zs_word_get(&self.s, self.s.self, word)

    def set_word(self, uint32_t proc, int word, uint64_t value):
        zs_word_set(&self.s, proc, word, value)

    def add_word(self, uint32_t proc, int word, uint64_t delta):
        return zs_word_add(&self.s, proc, word, delta)

    def ring(self, uint32_t proc):
        zs_ring(&self.s, proc)

    def global_word(self, int word):
        return zs_global_get(&self.s, word)

    def add_global(self, int word, uint64_t delta):
        return zs_global_add(&self.s, word, delta)

    # -- references ---------------------------------------------------------------------------------------------------

    cdef ObjectRef _ref(self, const uint8_t *id, uint32_t slot, str site):
        cdef ObjectRef ref = ObjectRef.__new__(ObjectRef)
        memcpy(ref._id, id, 16)
        ref.slot = slot
        ref.store = self
        ref.site = site
        return ref

    def reference(self, bytes id):
        """Return a new reference to an object that has an entry here, else None."""
        cdef uint32_t slot = 0
        cdef int code
        if self.closed:
            raise _errors.ZrayUsageError("the zray session was shut down: call zray.init() first")
        code = zs_reference(&self.s, <const uint8_t *>PyBytes_AS_STRING(id), &slot)
        if code == ZS_NOT_FOUND:
            return None
        if code != ZS_OK:
            raise_code(code, "referencing an object")
        return self._ref(<const uint8_t *>PyBytes_AS_STRING(id), slot, "")

    # -- making objects -----------------------------------------------------------------------------------------------

    def put(self, bytes id, bytes stream, list buffers, int kind, uint64_t size, list refs):
        """Create and seal an object from its packed parts; return its reference. Raises StoreFull."""
        cdef const uint8_t *key = <const uint8_t *>PyBytes_AS_STRING(id)
        cdef uint32_t slot = 0
        cdef int code
        if size <= ZS_INLINE_MAX and PyList_GET_SIZE(refs) == 0 and PyList_GET_SIZE(buffers) == 0:
            code = zs_put_inline(&self.s, key, PyBytes_AS_STRING(stream), <uint32_t>size, <uint8_t>kind, self.job, &slot)
            if code == ZS_OK or code == ZS_EXISTS:
                return self._ref(key, slot, "")
            raise_code(code, "putting an object", size)
        return self._put(key, NULL, stream, buffers, kind, 0, size, refs)

    def put_shared(self, bytes id, bytes stream, list buffers, int kind, int flags, uint64_t size, list refs):
        """As `put`, for what several processes and threads put alike under one id: whoever finds it there finds all of it, though one that writes it be
        late or die. `flags`: of the entry."""
        cdef bytes draft = _os.urandom(ZS_ID_SIZE)
        return self._put(<const uint8_t *>PyBytes_AS_STRING(draft), <const uint8_t *>PyBytes_AS_STRING(id), stream, buffers, kind, flags, size, refs)

    cdef ObjectRef _put(self, const uint8_t *key, const uint8_t *name, bytes stream, list buffers, int kind, int flags, uint64_t size, list refs):
        """Write an object under `key` and seal it, under `name` unless that is NULL."""
        cdef uint32_t slot = 0
        cdef uint8_t *data = NULL
        cdef int code
        cdef Py_ssize_t n = PyList_GET_SIZE(refs)
        cdef uint32_t *contained
        cdef ObjectRef ref
        with nogil:
            code = zs_create(&self.s, key, size, <uint32_t>n, self.job, &slot, &data)
        if code == ZS_EXISTS:
            return self._ref(key, slot, "")
        if code != ZS_OK:
            raise_code(code, "putting an object", size)
        ref = self._ref(key, slot, "")
        try:
            fill(data, stream, buffers)
            contained = slots_of(self, refs, n)
        except BaseException:
            zs_abort(&self.s, slot)
            raise
        if name == NULL:
            code = zs_seal(&self.s, slot, <uint8_t>kind, <uint8_t>flags, contained, <uint32_t>n)
        else:
            code = zs_seal_as(&self.s, &slot, name, <uint8_t>kind, <uint8_t>flags, contained, <uint32_t>n)
        PyMem_Free(contained)
        if code < 0:
            zs_abort(&self.s, slot)
            raise_code(code, "sealing an object", size)
        if name != NULL:
            ref.slot = slot
            memcpy(ref._id, name, ZS_ID_SIZE)
        return ref

    def put_exported(self, bytes id, bytes data, int kind, int flags, list refs):
        """As `put` of plain bytes with entry flags (names of mapped files)."""
        return self._put(<const uint8_t *>PyBytes_AS_STRING(id), NULL, data, [], kind, flags, PyBytes_GET_SIZE(data), refs)

    def put_life(self, bytes id, bytes data):
        """Make the life object of an actor: when its last reference goes, the broker is told."""
        cdef const uint8_t *key = <const uint8_t *>PyBytes_AS_STRING(id)
        cdef uint32_t slot = 0
        cdef int code = zs_put_life(&self.s, key, PyBytes_AS_STRING(data), <uint32_t>PyBytes_GET_SIZE(data), self.job, &slot)
        if code != ZS_OK and code != ZS_EXISTS:
            raise_code(code, "making an actor")
        return self._ref(key, slot, "")

    def open(self, bytes id, uint64_t size):
        """Open an object of `size` bytes to be filled in place; return its Room. Raises StoreFull."""
        cdef const uint8_t *key = <const uint8_t *>PyBytes_AS_STRING(id)
        cdef uint32_t slot = 0
        cdef uint8_t *data = NULL
        cdef int code
        cdef Room room
        with nogil:
            code = zs_create(&self.s, key, size, 0, self.job, &slot, &data)
        if code != ZS_OK:
            raise_code(code, "creating an object", size)
        room = Room.__new__(Room)
        room.store = self
        room.slot = slot
        room.data = data
        room.size = size
        room.ref = self._ref(key, slot, "")
        return room

    # -- results of tasks ---------------------------------------------------------------------------------------------

    def expect(self, bytes id, uint32_t target, list deps, bytes spec, str site, int flags=0):
        """Make the pending result of a task before its spec is sent; return its reference. Raises TargetGone, StoreFull."""
        cdef const uint8_t *key = <const uint8_t *>PyBytes_AS_STRING(id)
        cdef uint32_t slot = 0, small[8]
        cdef uint32_t *slots
        cdef int code
        cdef Py_ssize_t i, n = 0 if deps is None else PyList_GET_SIZE(deps)
        if n <= 8:
            slots = small
            for i in range(n):
                small[i] = slot_in(self, <ObjectRef>PyList_GET_ITEM(deps, i))
        else:
            slots = slots_of(self, deps, n)
        code = zs_expect(&self.s, key, target, self.job, <uint8_t>flags, slots, <uint32_t>n,
                         NULL if spec is None else PyBytes_AS_STRING(spec), 0 if spec is None else <uint32_t>PyBytes_GET_SIZE(spec), &slot)
        if n > 8:
            PyMem_Free(slots)
        if code == ZS_OK or code == ZS_EXISTS:
            return self._ref(key, slot, site)
        raise_code(code, "expecting a result", 0 if spec is None else PyBytes_GET_SIZE(spec))

    def claim(self, bytes task, uint32_t num_returns, uint32_t attempt):
        """Become the one executor of a task: return the slots of its results, or None when somebody else is, or the attempt is superseded."""
        cdef uint8_t ids[16]
        cdef uint8_t *many
        cdef uint32_t slot = 0, i
        cdef uint32_t *slots
        cdef int code
        if num_returns <= 1:
            memcpy(ids, PyBytes_AS_STRING(task), 12)
            i = 1
            memcpy(ids + 12, &i, 4)
            code = zs_claim(&self.s, ids, attempt, &slot)
            return slot if code == ZS_OK else None
        many = <uint8_t *>PyMem_Malloc(num_returns * 20)
        if many == NULL:
            raise MemoryError()
        slots = <uint32_t *>(many + 16 * num_returns)
        try:
            for i in range(num_returns):
                memcpy(many + 16 * i, PyBytes_AS_STRING(task), 12)
                slot = i + 1
                memcpy(many + 16 * i + 12, &slot, 4)
            code = zs_claim_many(&self.s, many, num_returns, attempt, slots)
            if code != ZS_OK:
                return None
            return tuple([slots[i] for i in range(num_returns)])
        finally:
            PyMem_Free(many)

    def seal_small(self, uint32_t slot, uint32_t attempt, bytes stream, int kind, int flags=0):
        """As the claimant: seal an inline result (<= INLINE_MAX bytes). Returns OK, TELL_BROKER or STALE."""
        cdef int code = zs_seal_inline(&self.s, slot, attempt, PyBytes_AS_STRING(stream), <uint32_t>PyBytes_GET_SIZE(stream), <uint8_t>kind, <uint8_t>flags)
        if code < 0 and code != ZS_STALE:
            raise_code(code, "sealing a result")
        return code

    def seal_result(self, uint32_t slot, uint32_t attempt, bytes stream, list buffers, int kind, uint64_t size, list refs, int flags=0):
        """As the claimant: seal a result of any size. Returns OK, TELL_BROKER or STALE. Raises StoreFull."""
        cdef uint8_t *data = NULL
        cdef int code
        cdef Py_ssize_t n = PyList_GET_SIZE(refs)
        cdef uint32_t *contained
        if size <= ZS_INLINE_MAX and n == 0 and PyList_GET_SIZE(buffers) == 0:
            return self.seal_small(slot, attempt, stream, kind, flags)
        with nogil:
            code = zs_open_result(&self.s, slot, attempt, size, <uint32_t>n, &data)
        if code == ZS_STALE:
            return ZS_STALE
        if code != ZS_OK:
            raise_code(code, "sealing a result", size)
        fill(data, stream, buffers)
        contained = slots_of(self, refs, n)
        code = zs_seal_result(&self.s, slot, attempt, <uint8_t>kind, <uint8_t>flags, contained, <uint32_t>n)
        PyMem_Free(contained)
        if code < 0 and code != ZS_STALE:
            raise_code(code, "sealing a result", size)
        return code

    # -- the broker's decisions ---------------------------------------------------------------------------------------

    def retry(self, ObjectRef ref, uint32_t target):
        """Open a result for its next attempt; return the attempt's number, or None when it is sealed for good."""
        cdef uint32_t attempt = 0
        return attempt if zs_retry(&self.s, ref.slot, target, &attempt) == ZS_OK else None

    def retarget(self, ObjectRef ref, uint32_t target):
        """Change who must make a pending result; False when it is not pending; raises TargetGone."""
        cdef int code = zs_retarget(&self.s, ref.slot, target)
        if code == ZS_GONE:
            raise TargetGone("the new target has ended")
        return code == ZS_OK

    def seal_forced(self, ObjectRef ref, bytes stream, int kind, int flags):
        """Seal a pending result whoever has claimed it; False when it was sealed already. Raises StoreFull."""
        cdef uint32_t attempt = 0
        cdef uint8_t *data = NULL
        cdef uint64_t size = PyBytes_GET_SIZE(stream)
        cdef int code
        if size <= ZS_INLINE_MAX:
            return zs_seal_forced(&self.s, ref.slot, PyBytes_AS_STRING(stream), <uint32_t>size, <uint8_t>kind, <uint8_t>flags) >= 0
        if zs_take_over(&self.s, ref.slot, &attempt) != ZS_OK:
            return False
        code = zs_open_result(&self.s, ref.slot, attempt, size, 0, &data)
        if code != ZS_OK:
            raise_code(code, "sealing an error", size)
        memcpy(data, PyBytes_AS_STRING(stream), size)
        return zs_seal_result(&self.s, ref.slot, attempt, <uint8_t>kind, <uint8_t>flags, NULL, 0) >= 0

    def elsewhere(self, ObjectRef ref, bint made):
        """Broker: a pending object is made on another node, or (made) kept there. Return whether somebody here waits for the value; None when the
        object is not pending."""
        cdef int wanted = 0
        if zs_elsewhere(&self.s, slot_in(self, ref), made, &wanted) != ZS_OK:
            return None
        return wanted != 0

    def send_away(self, ObjectRef ref):
        """Broker: the task of a pending result is about to be sent to another node; nobody here can claim this attempt any more. False when it is not
        pending, or was sent before."""
        return zs_send_away(&self.s, slot_in(self, ref)) == ZS_OK

    def want(self, list refs):
        """Mark those of the references that are not done as wanted on this node; return the ids of those whose values are on other nodes and were
        not wanted before: the broker must be told."""
        cdef Py_ssize_t i, n = PyList_GET_SIZE(refs)
        cdef size_t count
        cdef uint32_t *slots
        cdef uint32_t *found
        if n == 0:
            return []
        slots = slots_of(self, refs, n)
        found = <uint32_t *>PyMem_Malloc(n * sizeof(uint32_t))
        try:
            if found == NULL:
                raise MemoryError()
            count = zs_want(&self.s, slots, n, found)
            return [(<ObjectRef>PyList_GET_ITEM(refs, found[i])).binary() for i in range(<Py_ssize_t>count)]
        finally:
            PyMem_Free(slots)
            PyMem_Free(found)

    def marks(self, ObjectRef ref):
        """Return the MARK_ bits of an object."""
        return zs_marks(&self.s, slot_in(self, ref))

    def seal_copy(self, ObjectRef ref, data, int kind, int flags, list refs):
        """Seal a pending object with packed bytes that another node has made, whoever has claimed it; `refs`: what they refer to.
        False when it was sealed already. Raises StoreFull."""
        cdef uint32_t attempt = 0
        cdef uint8_t *room = NULL
        cdef uint32_t *contained
        cdef Py_ssize_t n = PyList_GET_SIZE(refs)
        cdef Py_buffer view
        cdef int code
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if n == 0 and view.len <= ZS_INLINE_MAX:
                return zs_seal_forced(&self.s, slot_in(self, ref), view.buf, <uint32_t>view.len, <uint8_t>kind, <uint8_t>flags) >= 0
            if zs_take_over(&self.s, slot_in(self, ref), &attempt) != ZS_OK:
                return False
            code = zs_open_result(&self.s, ref.slot, attempt, view.len, <uint32_t>n, &room)
            if code != ZS_OK:
                raise_code(code, "copying an object", view.len)
            copy_in(room, view.buf, view.len)
        finally:
            PyBuffer_Release(&view)
        contained = slots_of(self, refs, n)
        code = zs_seal_result(&self.s, ref.slot, attempt, <uint8_t>kind, <uint8_t>flags, contained, <uint32_t>n)
        PyMem_Free(contained)
        return code >= 0

    def take_copy(self, ObjectRef ref):
        """Claim an object whose value is elsewhere, for that value; False as for `fill`."""
        cdef uint32_t attempt = 0
        return zs_take_copy(&self.s, slot_in(self, ref), &attempt) == ZS_OK

    def fill(self, ObjectRef ref, uint64_t size, uint32_t contained):
        """Open an object whose value is elsewhere, to be filled with that value: `size` bytes that refer to at most `contained` objects.
        Return its Filling, or None when it is sealed, or made anew (it was reopened). Raises StoreFull, ObjectStoreFullError (larger than the
        whole store)."""
        cdef uint32_t attempt = 0
        cdef uint8_t *data = NULL
        cdef int code
        cdef Filling filling
        if zs_take_copy(&self.s, slot_in(self, ref), &attempt) != ZS_OK:
            return None
        with nogil:
            code = zs_open_result(&self.s, ref.slot, attempt, size, contained, &data)
        if code == ZS_STALE:
            return None
        if code != ZS_OK:
            raise_code(code, "receiving an object", size)
        filling = Filling.__new__(Filling)
        filling.store = self
        filling.ref = ref
        filling.attempt = attempt
        filling.data = data
        filling.size = size
        self.buffers += 1
        return filling

    def references(self, ObjectRef ref):
        """How many references there are to an object, in all processes and inside other objects."""
        return zs_references(&self.s, slot_in(self, ref))

    def contained(self, ObjectRef ref):
        """Return references to all objects that a sealed value refers to."""
        cdef size_t n = 0, room = 16, i
        cdef uint32_t *slots
        cdef uint8_t *ids
        cdef list found = []
        cdef int code
        while True:
            slots = <uint32_t *>PyMem_Malloc(room * 20)
            if slots == NULL:
                raise MemoryError()
            ids = <uint8_t *>(slots + room)
            try:
                code = zs_reference_contained(&self.s, slot_in(self, ref), slots, ids, room, &n)
                found = [self._ref(ids + 16 * i, slots[i], "") for i in range(n)]
            finally:
                PyMem_Free(slots)
            if code != ZS_OK:
                raise_code(code, "reading what an object refers to")
            if n < room:
                return found
            room *= 8

    def watch(self, bytes id):
        """Broker: ask to be told when the object is sealed. True: it will be; False: it is sealed; None: no such object."""
        cdef int code = zs_watch_broker(&self.s, <const uint8_t *>PyBytes_AS_STRING(id))
        return True if code == ZS_OK else False if code == ZS_EXISTS else None

    def next_zombie(self):
        """Return the id of an actor whose last handle is gone, or None."""
        cdef uint8_t id[16]
        if zs_next_zombie(&self.s, id) != ZS_OK:
            return None
        return PyBytes_FromStringAndSize(<char *>id, 16)

    # -- reading ------------------------------------------------------------------------------------------------------

    def state(self, ObjectRef ref):
        return zs_state_of(&self.s, ref.slot)

    def attempt(self, ObjectRef ref):
        return zs_attempt_of(&self.s, ref.slot)

    def slot_pending(self, uint32_t slot):
        """Whether the entry at a slot is pending. A hint: the slot may belong to another object by now."""
        cdef uint32_t state = zs_state_of(&self.s, slot)
        return state == ZS_PENDING or state == ZS_CLAIMED

    def done(self, ObjectRef ref):
        """Whether the object is made (a value or an error, in memory or spilled)."""
        cdef uint32_t state = zs_state_of(&self.s, slot_in(self, ref))
        return state == ZS_SEALED or state == ZS_SPILLED

    def read(self, ObjectRef ref):
        """Return (kind, flags, value bytes or memoryview) of a sealed object in memory, else NOT_HERE. Views pin it."""
        found = self.read_inline(ref)
        return self._pinned(ref) if found is None else found

    cpdef object read_inline(self, ObjectRef ref):
        """Return (kind, flags, value bytes) of a sealed object that lies in its entry, as small values do that refer to nothing, else None."""
        cdef char space[ZS_INLINE_MAX]
        cdef uint32_t size = 0
        cdef uint8_t kind = 0, flags = 0
        if zs_read_inline(&self.s, slot_in(self, ref), space, &size, &kind, &flags) != ZS_OK:
            return None
        return kind, flags, PyBytes_FromStringAndSize(space, size)

    cdef object _pinned(self, ObjectRef ref):
        cdef zs_view view
        cdef Buffer buffer
        cdef int code = zs_pin(&self.s, ref.slot, &view)
        if code != ZS_OK:
            return MISSING
        buffer = Buffer.__new__(Buffer)
        buffer.store = self
        buffer.slot = ref.slot
        buffer.data = view.data
        buffer.size = view.size
        self.buffers += 1
        return view.kind, view.flags, memoryview(buffer)

    cpdef object value(self, ObjectRef ref):
        """Return the value of a sealed object, an error as `Failed`, or NOT_HERE. The fast way to read."""
        cdef char space[ZS_INLINE_MAX]
        cdef uint32_t size = 0
        cdef uint8_t kind = 0, flags = 0
        if self.closed:
            raise _errors.ZrayUsageError("the zray session was shut down: call zray.init() first")
        if zs_read_inline(&self.s, slot_in(self, ref), space, &size, &kind, &flags) == ZS_OK:
            if kind == 0:
                return _pickle_loads(PyBytes_FromStringAndSize(space, size))
            return _value(kind, flags, PyBytes_FromStringAndSize(space, size))
        found = self._pinned(ref)
        if found is MISSING:
            return MISSING
        return _value(found[0], found[1], found[2])

    def segment_range(self, ObjectRef ref):
        """Pin a sealed object in memory and return (pinning memoryview, offset in the segment, kind), else NOT_HERE."""
        cdef zs_view view
        found = self._pinned(ref)
        if found is MISSING:
            return MISSING
        if zs_describe(&self.s, ref.slot, &view) != ZS_OK:
            return MISSING
        return found[2], view.offset, found[0]

    def describe(self, ObjectRef ref):
        """Return (state, attempt, kind, flags, size)."""
        cdef zs_view view
        cdef int code = zs_describe(&self.s, ref.slot, &view)
        if code != ZS_OK:
            raise_code(code, "describing an object")
        return view.state, view.attempt, view.kind, view.flags, view.size

    def values(self, list refs):
        """Return the list of values of references, with NOT_HERE and Failed as `value` gives them."""
        cdef Py_ssize_t i, n = PyList_GET_SIZE(refs)
        cdef list out = [None] * n
        for i in range(n):
            out[i] = self.value(<ObjectRef>PyList_GET_ITEM(refs, i))
        return out

    def last_pending(self, list refs, Py_ssize_t end):
        """Index of the last reference before `end` that is not done, or -1."""
        cdef uint32_t state
        while end > 0:
            end -= 1
            state = zs_state_of(&self.s, slot_in(self, <ObjectRef>PyList_GET_ITEM(refs, end)))
            if state != ZS_SEALED and state != ZS_SPILLED:
                return end
        return -1

    def wait_fd(self, int fd, double timeout):
        """Wait until a descriptor is readable, at most so many seconds (negative: for ever); whether it is. Spins for a moment where the last such wait of
        this thread was short: to be woken takes longer. Signal handlers run; returns False when one did. OSError: it is no descriptor."""
        cdef int code
        cdef int64_t left = -1 if timeout < 0 else <int64_t>(timeout * 1e9)
        with nogil:
            code = zs_wait_fd(&self.s, fd, left)
        if code == ZS_OK:
            return True
        if code == ZS_INTERRUPTED:
            PyErr_CheckSignals()
        elif code != ZS_TIMEOUT:
            raise OSError(f"cannot wait for descriptor {fd}")
        return False

    def wait(self, list refs, Py_ssize_t want, double timeout, bint stop_on_ring=False, bint anywhere=False, object rings=None):
        """Sleep until `want` of the references are done; return how many are. timeout in seconds, negative: none.

        With `anywhere`, objects whose values exist on other nodes only count as done. Returns early (with fewer) when the time is over or, with stop_on_ring, when this process's
        bell rings (has rung since `rings` gave that number). Signal handlers run; raises
        ZraySystemError when the broker is gone.
        """
        cdef Py_ssize_t n = PyList_GET_SIZE(refs)
        cdef size_t done = 0
        cdef int code
        cdef int64_t left = -1 if timeout < 0 else <int64_t>(timeout * 1e9)
        cdef int64_t piece
        cdef int mode = (ZS_WAIT_STOP_ON_RING if stop_on_ring else 0) | (ZS_WAIT_ANYWHERE if anywhere else 0)
        cdef uint32_t one, since = zs_rings(&self.s) if rings is None else <uint32_t>rings
        cdef uint32_t *slots
        if n == 1:
            one = slot_in(self, <ObjectRef>PyList_GET_ITEM(refs, 0))
            slots = &one
        else:
            slots = slots_of(self, refs, n)
        try:
            while True:
                piece = SLICE_NS if left < 0 or left > SLICE_NS else left
                with nogil:
                    code = zs_wait_since(&self.s, slots, n, want, piece, mode, since, &done)
                if _hooks.exiting and not stop_on_ring:
                    keep_silent()
                if code == ZS_OK:
                    return done
                if self.closed:
                    raise _errors.ZrayUsageError("the zray session was shut down while this thread waited for an object")
                if code == ZS_BROKER_GONE:
                    raise_code(code, "waiting")
                PyErr_CheckSignals()
                if left >= 0:
                    left -= piece
                    if left <= 0:
                        return done
                if stop_on_ring and code != ZS_INTERRUPTED:
                    return done
        finally:
            if n > 1:
                PyMem_Free(slots)

    def rings(self):
        """How often this process's bell has rung."""
        return zs_rings(&self.s)

    def wait_ring(self, double timeout, object rings=None):
        """Sleep until this process's bell rings (has rung since `rings` gave that number), at most `timeout` seconds. Raises ZraySystemError when the
        broker is gone, which is looked for about every tenth of a second."""
        cdef size_t done = 0
        cdef int64_t left = <int64_t>(timeout * 1e9)
        cdef uint32_t since = zs_rings(&self.s) if rings is None else <uint32_t>rings
        cdef int code
        with nogil:
            code = zs_wait_since(&self.s, NULL, 0, 1, left, ZS_WAIT_STOP_ON_RING, since, &done)
        PyErr_CheckSignals()
        if code == ZS_BROKER_GONE:
            raise_code(code, "waiting")

    def split(self, list refs, Py_ssize_t want, bint anywhere=False):
        """Return (ready, not_ready) with at most `want` ready, both in the order of `refs`; with `anywhere`, values on other nodes are ready, too.
        Does not wait."""
        cdef Py_ssize_t i, n = PyList_GET_SIZE(refs), found = 0
        cdef list ready = [], pending
        cdef uint32_t state
        for i in range(n):
            state = zs_state_of(&self.s, slot_in(self, <ObjectRef>PyList_GET_ITEM(refs, i)))
            if state == ZS_SEALED or state == ZS_SPILLED or (
                anywhere and zs_marks(&self.s, (<ObjectRef>PyList_GET_ITEM(refs, i)).slot) & ZS_MARK_ELSEWHERE
            ):
                if found == 0:
                    pending = refs[:i]
                ready.append(<object>PyList_GET_ITEM(refs, i))
                found += 1
                if found == want:
                    pending += refs[i + 1:]
                    return ready, pending
            elif found:
                pending.append(<object>PyList_GET_ITEM(refs, i))
        if found == 0:
            return ready, list(refs)
        return ready, pending

    # -- room ---------------------------------------------------------------------------------------------------------

    def spill_candidate(self, uint64_t min_size):
        """Begin to spill the least recently used object in memory that nobody reads: return a Spilling, or None when there is none."""
        cdef uint32_t slot = 0
        cdef zs_view view
        cdef Spilling spilling
        if zs_spill_candidate(&self.s, min_size, &slot, &view) != ZS_OK:
            return None
        spilling = Spilling.__new__(Spilling)
        spilling.store = self
        spilling.slot = slot
        spilling.id = self._id_of(slot)
        spilling.view = PyMemoryView_FromMemory(<char *>view.data, view.size, PyBUF_READ)
        return spilling

    def restore(self, ObjectRef ref):
        """Open a block for a spilled value: return a Restoring, or None when somebody else restores it. Raises StoreFull."""
        cdef uint8_t *data = NULL
        cdef uint64_t size = 0
        cdef int code
        cdef Restoring restoring
        with nogil:
            code = zs_restore(&self.s, ref.slot, &data, &size)
        if code == ZS_BAD_STATE:
            return None
        if code != ZS_OK:
            raise_code(code, "restoring an object", size)
        restoring = Restoring.__new__(Restoring)
        restoring.ref = ref
        restoring.store = self
        restoring.view = PyMemoryView_FromMemory(<char *>data, size, PyBUF_WRITE)
        return restoring

    def discard(self, ObjectRef ref, bytes stream, int kind):
        """Replace a value by a small error although it is referenced; False while somebody reads it."""
        return zs_discard(&self.s, ref.slot, PyBytes_AS_STRING(stream), <uint32_t>PyBytes_GET_SIZE(stream), <uint8_t>kind) == ZS_OK

    def touch_ahead(self, uint64_t size):
        """Allocate pages ahead of need; False when there is nothing to do."""
        cdef int code
        with nogil:
            code = zs_touch_ahead(&self.s, size)
        return code == ZS_OK

    # -- watching -----------------------------------------------------------------------------------------------------

    def statistics(self):
        """Return the counters of the segment as a dict."""
        cdef zs_statistics t
        zs_stats(&self.s, &t)
        return t

    def check(self):
        """Verify every invariant of the segment; raise ZrayInternalError naming the first violation."""
        cdef char text[512]
        memset(text, 0, 512)
        if zs_check(&self.s, text, 512) != ZS_OK:
            raise _errors.ZrayInternalError("object store: " + text.decode())

    def walk(self):
        """Return [(id, state, attempt, size, kind, flags, target, writer, held_by_objects, job)] of all objects."""
        cdef uint32_t cursor = 0
        cdef zs_entry e
        cdef list rows = []
        while zs_walk(&self.s, &cursor, &e) == ZS_OK:
            rows.append((PyBytes_FromStringAndSize(<char *>e.id, 16), e.state, e.attempt, e.size, e.kind, e.flags, e.target, e.writer,
                         e.held_by_objects, e.job))
        return rows


class Failed:
    """An error read from the store (never leaves zray): `record` is the unpickled failure."""

    __slots__ = ("record",)

    def __init__(self, record):
        self.record = record


cdef object _value(int kind, int flags, data):
    if kind & ZS_KIND_ERROR:
        return Failed(_pickle_loads(data))
    if flags & ZS_FLAG_FILE:
        return _hooks.load_file(kind, bytes(data))
    if kind == 0:
        return _pickle_loads(data)
    return _loads(kind, data)


def has_duplicates(list refs):
    """Whether a list names an object twice (all must be ObjectRef)."""
    cdef Py_ssize_t n = PyList_GET_SIZE(refs), i, size = 16
    cdef uint32_t *table
    cdef uint32_t slot
    cdef size_t at
    while size < 2 * n:
        size *= 2
    table = <uint32_t *>PyMem_Malloc(size * 4)
    if table == NULL:
        raise MemoryError()
    memset(table, 0, size * 4)
    try:
        for i in range(n):
            slot = (<ObjectRef>PyList_GET_ITEM(refs, i)).slot
            at = (slot * <uint32_t>2654435761u) & (size - 1)
            while table[at]:
                if table[at] == slot:
                    return True
                at = (at + 1) & (size - 1)
            table[at] = slot
        return False
    finally:
        PyMem_Free(table)


def all_refs(list items):
    """Index of the first item that is not an ObjectRef, or -1."""
    cdef Py_ssize_t i
    for i in range(PyList_GET_SIZE(items)):
        if type(<object>PyList_GET_ITEM(items, i)) is not ObjectRef:
            return i
    return -1


def derive_id(bytes parent, uint64_t counter):
    """As `zray.ids.task_id`, in C."""
    cdef uint8_t id[16]
    zs_derive_id(<const uint8_t *>PyBytes_AS_STRING(parent), counter, id)
    return PyBytes_FromStringAndSize(<char *>id, 16)


def die_with_parent():
    """Have the kernel kill this process (SIGKILL) when its parent ends; does nothing where there is no such service."""
    set_parent_death_signal()


def with_index(bytes id, uint32_t index):
    """The id with its last four bytes (little-endian index) replaced."""
    cdef uint8_t out[16]
    memcpy(out, PyBytes_AS_STRING(id), 12)
    memcpy(out + 12, &index, 4)
    return PyBytes_FromStringAndSize(<char *>out, 16)
