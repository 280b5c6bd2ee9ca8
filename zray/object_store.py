"""The store as the rest of zray uses it: put, get, make room, spill to disk, restore, private copies, objects in files of their own.

Covers policy around the shared segment: what happens when it is full, where spilled bytes lie, how values larger than the store are kept.
Does not cover memory management (`_store_core.c`), pickling (`zray.serialization`) or waiting for tasks (`zray.session`).
The only module that imports `_store`.

Spilled values are files `<id in hex>` in the session's spill directory. A file is written under the name `<id>.part`, then the entry becomes
SPILLED, then the file gets its name: a reader that comes between finds the other name. Files whose object is gone are removed by the broker
(`remove_stale_files`), so a process may die at any point of a spill without leaving anything.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import msgspec

from zray import _store, errors, serialization
from zray._store import NOT_HERE, Failed, ObjectRef, Store, StoreFull

if TYPE_CHECKING:
    from collections.abc import Callable

    from zray.serialization import Packed

_T = TypeVar("_T")
_SPILL_AT_ONCE: Final = 16 << 20
"""Make at least this much room when spilling, so that small puts do not spill one object each."""
_PAGE: Final = mmap.PAGESIZE


class _FileValue(msgspec.Struct, array_like=True):
    """Data of an entry whose value lies in a file of its own."""

    name: str
    size: int


class Place(Protocol):
    """Where a value comes in pieces, in any order (`ObjectStore.place`). Dropped before it is sealed, the object is pending as before."""

    def part(self, offset: int, size: int) -> memoryview:
        """Return the bytes where a piece belongs, to be written; used before the object is sealed only."""

    def view(self) -> memoryview:
        """Return a view of all bytes, written or not, which keeps them in place."""

    def seal(self, kind: int, flags: int, refs: list[ObjectRef]) -> bool:
        """Make the object visible; `refs`: what it refers to. False when it is sealed already."""


class ObjectStore:
    """One process's door to the node's store. Thread-safe as far as the segment is: all state is there."""

    def __init__(self, store: Store, spill_directory: str) -> None:
        self.store = store
        self.spill_directory = spill_directory
        self.capacity: int = store.statistics()["capacity"]
        self.spilled_bytes = 0
        self.restored_bytes = 0
        self.file_bytes = 0

    # -- putting ------------------------------------------------------------------------------------------------------

    def put(self, object_id: bytes, packed: Packed) -> ObjectRef:
        """Store a packed value under an id and return its reference.

        Raises ObjectStoreFullError when memory is exhausted and OutOfDiskError when the disk is; the store stays usable.
        """
        store = self.store
        try:
            return store.put(object_id, packed.stream, packed.buffers, packed.kind, packed.size, packed.refs)
        except (StoreFull, errors.ObjectStoreFullError):
            pass
        if packed.size > self.capacity:
            return self._put_file(object_id, packed)
        return self._with_room(
            packed.size,
            lambda: store.put(object_id, packed.stream, packed.buffers, packed.kind, packed.size, packed.refs),
            lambda: self._put_file(object_id, packed),
        )

    def put_shared(self, object_id: bytes, packed: Packed) -> ObjectRef:
        """As `put`, for what several processes and threads put alike under one id: who finds it there finds all of it. Raises as `put`."""
        store = self.store
        found = store.reference(object_id)
        if found is not None:
            return found

        def put() -> ObjectRef:
            return store.put_shared(object_id, packed.stream, packed.buffers, packed.kind, 0, packed.size, packed.refs)

        def put_file() -> ObjectRef:
            return self._write_file(
                object_id,
                packed,
                lambda data: store.put_shared(
                    object_id, data, [], packed.kind, _store.FLAG_FILE, len(data), packed.refs
                ),
                lambda: store.reference(object_id),
            )

        return put_file() if packed.size > self.capacity else self._with_room(packed.size, put, put_file)

    def open(self, object_id: bytes, size: int) -> _store.Room:
        """Open an object to be filled in place. Raises ObjectStoreFullError, OutOfDiskError."""
        return self._with_room(size, lambda: self.store.open(object_id, size), None)

    def seal_result(self, slot: int, attempt: int, packed: Packed, flags: int = 0) -> int:
        """Seal the result of a claimed task; return the store's code. Raises as `put`."""
        store = self.store

        def seal() -> int:
            return store.seal_result(
                slot, attempt, packed.stream, packed.buffers, packed.kind, packed.size, packed.refs, flags
            )

        try:
            return seal()
        except (StoreFull, errors.ObjectStoreFullError):
            pass
        if packed.size > self.capacity:
            return self._seal_file(slot, attempt, packed, flags)
        return self._with_room(packed.size, seal, lambda: self._seal_file(slot, attempt, packed, flags))

    def _with_room(self, size: int, attempt: Callable[[], _T], otherwise: Callable[[], _T] | None) -> _T:
        """Call `attempt` until it does not raise StoreFull, spilling in between; `otherwise` when nothing can be spilled."""
        while True:
            try:
                return attempt()
            except StoreFull:
                if not self.make_room(size):
                    break
        if otherwise is not None:
            return otherwise()
        raise errors.ObjectStoreFullError(
            f"no room for {size} bytes in the object store ({self.capacity} bytes): everything in it is being read. "
            "Drop arrays that were read from it, or give init(object_store_memory=...) more"
        )

    def place(self, ref: ObjectRef, size: int, contained: int) -> Place | None:
        """Open an object whose value is elsewhere, to be filled with that value: `size` bytes that come in pieces and refer to at most `contained`
        objects. In memory, or where that cannot be in a file of its own. None when it is sealed, or made anew.

        Raises ObjectStoreFullError, OutOfDiskError.
        """

        def in_file() -> FilePlace | None:
            # Who makes it anew may be about to write a file of that name.
            return FilePlace(self, ref, size) if self.store.take_copy(ref) else None

        if size > self.capacity:
            return in_file()
        return self._with_room(size, lambda: self.store.fill(ref, size, contained), in_file)

    # -- making room --------------------------------------------------------------------------------------------------

    def make_room(self, size: int) -> bool:
        """Spill least recently used values until about `size` bytes were freed; False when none could be. Raises OutOfDiskError."""
        wanted, freed = max(size, min(_SPILL_AT_ONCE, self.capacity // 16)), 0
        while freed < wanted:
            # Small values free next to nothing: they go only when nothing else is left.
            candidate = self.store.spill_candidate(_PAGE) or self.store.spill_candidate(1)
            if candidate is None:
                break
            if self._spill(candidate):
                freed += len(candidate.view)
        return freed > 0

    def _spill(self, value: _store.Spilling) -> bool:
        # The file is whole and has its name before the entry says that it is there. Several processes may write the same value
        # in turn: each into a file of its own, and whichever comes last under the name holds the same bytes.
        path = os.path.join(self.spill_directory, value.id.hex())
        part = f"{path}.{os.getpid()}-{threading.get_ident()}.part"
        try:
            with open(part, "wb", buffering=0) as file:
                remaining = value.view
                while remaining:
                    remaining = remaining[file.write(remaining) :]
            os.replace(part, path)
        except BaseException as error:
            value.give_up()
            self._remove(part)
            if isinstance(error, OSError):
                raise self._disk_error(error, len(value.view)) from error
            raise
        if not value.finish():
            return False  # in use again: the file stays until the value goes (another process may just have spilled it)
        self.spilled_bytes += len(value.view)
        return True

    def _disk_error(self, error: OSError, size: int) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return errors.OutOfDiskError(
                f"the object store is full and the disk has no room to spill {size} bytes to {self.spill_directory}: {error.strerror}. "
                "Free disk space, set ZRAY_SPILL_DIR to a larger disk, or drop references to large objects"
            )
        return errors.ZraySystemError(f"cannot spill to {self.spill_directory}: {error}")

    @staticmethod
    def _remove(path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass

    def _restore(self, ref: ObjectRef) -> bool:
        """Read a spilled value back into memory; False when it must be read from its file (no room, or another process is at it)."""
        try:
            value = self._with_room(self.store.describe(ref)[4], lambda: self.store.restore(ref), lambda: None)
        except (errors.ObjectStoreFullError, errors.OutOfDiskError):
            return False
        if value is None:
            return False
        good = False
        try:
            with self._open_spilled(ref) as file:
                done = 0
                while done < len(value.view):
                    count = file.readinto(value.view[done:])
                    if not count:
                        break
                    done += count
                good = done == len(value.view)
        finally:
            good = value.finish(good)
        self.restored_bytes += len(value.view)
        return good

    def _open_spilled(self, ref: ObjectRef) -> Any:
        try:
            return open(os.path.join(self.spill_directory, ref.hex()), "rb", buffering=0)
        except FileNotFoundError:
            raise errors.ObjectLostError.for_id(ref.binary(), "its spilled file is gone") from None

    def remove_stale_files(self) -> None:
        """Broker: remove files of objects that no longer exist."""
        for name in os.listdir(self.spill_directory):
            try:
                object_id = bytes.fromhex(name.partition(".")[0])
            except ValueError:
                continue
            if self.store.reference(object_id) is None:
                self._remove_unlocked(os.path.join(self.spill_directory, name), object_id)

    def _remove_unlocked(self, path: str, object_id: bytes) -> None:
        """Remove a file unless somebody writes it, or has made its entry meanwhile."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.store.reference(object_id) is None:
                self._remove(path)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)

    # -- values in files ----------------------------------------------------------------------------------------------

    def _write_file(
        self,
        object_id: bytes,
        packed: Packed,
        enter: Callable[[bytes], _T],
        entered: Callable[[], _T | None] = lambda: None,
    ) -> _T:
        """Write a packed value into a mapped file of its own, then let `enter` make the entry with the data that names it, unless it has been
        `entered` by another writer.

        The file is locked until its entry exists: a file without an entry and without a lock is stale. The entry itself may be
        spilled like any other, so the file has another name than a spilled value.
        """
        name = f"{object_id.hex()}.value"
        path = os.path.join(self.spill_directory, name)
        fd = -1
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            found = entered()  # the lock was its writer's: before it no entry, after it a whole file
            if found is not None:
                return found
            os.ftruncate(fd, 0)
            os.posix_fallocate(fd, 0, packed.size)
            with mmap.mmap(fd, packed.size) as mapping:
                packed.write_into(memoryview(mapping))
            data = msgspec.msgpack.encode(_FileValue(name, packed.size))
            self.file_bytes += packed.size
            return self._with_room(len(data), lambda: enter(data), None)
        except OSError as error:
            self._remove(path)
            raise self._disk_error(error, packed.size) from error
        finally:
            if fd >= 0:
                os.close(fd)

    def _put_file(self, object_id: bytes, packed: Packed) -> ObjectRef:
        return self._write_file(
            object_id,
            packed,
            lambda data: self.store.put_exported(object_id, data, packed.kind, _store.FLAG_FILE, packed.refs),
        )

    def _seal_file(self, slot: int, attempt: int, packed: Packed, flags: int) -> int:
        return self._write_file(
            self.store.id_of(slot),
            packed,
            lambda data: self.store.seal_result(
                slot, attempt, data, [], packed.kind, len(data), packed.refs, flags | _store.FLAG_FILE
            ),
        )

    def load_file(self, kind: int, data: bytes) -> Any:
        """Return the value of an entry whose bytes lie in a file; arrays are views of the mapped file."""
        value = msgspec.msgpack.decode(data, type=_FileValue)
        return serialization.loads(kind, self._map_file(value.name, value.size))

    def _map_file(self, name: str, size: int) -> memoryview:
        path = os.path.join(self.spill_directory, name)
        with open(path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))

    # -- getting ------------------------------------------------------------------------------------------------------

    def value(self, ref: ObjectRef) -> Any:
        """Return the value of a finished object, `Failed`, or NOT_HERE when it is still pending. Restores spilled values."""
        found = self.store.value(ref)
        while found is NOT_HERE:
            state, _, kind, _, size = self.store.describe(ref)
            if state == _store.STATE_SPILLED:
                if not self._restore(ref):
                    with self._open_spilled(ref) as file:
                        view = (
                            memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
                            if size
                            else memoryview(b"")
                        )
                    return serialization.loads(kind, view)
            elif state != _store.STATE_SEALED:
                return NOT_HERE
            found = self.store.value(ref)
        return found

    def raw(self, ref: ObjectRef) -> Any:
        """The packed bytes of a finished object (bytes or a pinning view). Restores spilled ones; raises ObjectLostError when it has none."""
        while True:
            found = self.store.read(ref)
            if found is not NOT_HERE:
                _, flags, data = found
                if flags & _store.FLAG_FILE:
                    value = msgspec.msgpack.decode(data, type=_FileValue)
                    return self._map_file(value.name, value.size)
                return data
            state, _, _, _, size = self.store.describe(ref)
            if state == _store.STATE_SEALED:  # another thread has restored it meanwhile
                continue
            if state != _store.STATE_SPILLED:
                raise errors.ObjectLostError.for_id(ref.binary(), "it has no value")
            if not self._restore(ref):
                with self._open_spilled(ref) as file:
                    return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))

    def readable(self, ref: ObjectRef) -> Any:
        """As `raw`, but what was spilled is read where it is: it is wanted elsewhere, not here."""
        if self.store.describe(ref)[0] == _store.STATE_SPILLED:
            with self._open_spilled(ref) as file:
                size = os.fstat(file.fileno()).st_size
                found = memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)) if size else memoryview(b"")
            _, _, _, flags, _ = self.store.describe(ref)
            if not flags & _store.FLAG_FILE:
                return found
        return self.raw(ref)

    def writable_value(self, ref: ObjectRef) -> Any:
        """As `value`, but large buffers lie in a private copy-on-write mapping of the segment: writing to them changes nobody else's view, and only
        pages that are written take memory."""
        found = self.value(ref)
        if found is NOT_HERE or isinstance(found, Failed):
            return found
        located = self.store.segment_range(ref)
        if located is NOT_HERE:  # spilled, and no room to bring it back
            _, _, kind, _, size = self.store.describe(ref)
            with self._open_spilled(ref) as file:
                return self._private_value(kind, file, size) if size else found
        pin, offset, kind = located
        size = len(pin)
        if kind == serialization.KIND_PICKLE or size == 0:
            return found
        if self.store.describe(ref)[3] & _store.FLAG_FILE:
            value = msgspec.msgpack.decode(pin, type=_FileValue)
            with open(os.path.join(self.spill_directory, value.name), "rb") as file:
                return self._private_value(kind, file, value.size)
        first = offset - offset % _PAGE
        mapping = mmap.mmap(
            self.store.fd, offset + size - first, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=first
        )
        whole = memoryview(mapping)[offset - first : offset - first + size]
        return serialization.loads(kind, _store.KeepAlive(whole, pin), writable=True)

    @staticmethod
    def _private_value(kind: int, file: Any, size: int) -> Any:
        """The value in a file; what is written to its buffers stays in this process."""
        return serialization.loads(
            kind, memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)), writable=True
        )


class FilePlace:
    """A place in a mapped file, for what does not fit the store."""

    def __init__(self, objects: ObjectStore, ref: ObjectRef, size: int) -> None:
        """Raises OutOfDiskError."""
        self._objects = objects
        self._ref = ref
        self._value = _FileValue(f"{ref.hex()}.value", size)
        self._path = os.path.join(objects.spill_directory, self._value.name)
        self._sealed = False
        # Not replaced in place: whoever has mapped a former one keeps it.
        objects._remove(self._path)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._identity = os.fstat(fd).st_ino
        try:
            os.posix_fallocate(fd, 0, size)
            self._view = memoryview(mmap.mmap(fd, size))
        except OSError as error:
            objects._remove(self._path)
            raise objects._disk_error(error, size) from error
        finally:
            os.close(fd)

    def part(self, offset: int, size: int) -> memoryview:
        """As `Place.part`."""
        return self._view[offset : offset + size]

    def view(self) -> memoryview:
        """As `Place.view`."""
        return self._view.toreadonly()

    def seal(self, kind: int, flags: int, refs: list[ObjectRef]) -> bool:
        """As `Place.seal`."""
        data = msgspec.msgpack.encode(self._value)
        objects = self._objects
        objects.file_bytes += self._value.size
        self._sealed = objects._with_room(
            len(data), lambda: objects.store.seal_copy(self._ref, data, kind, flags | _store.FLAG_FILE, refs), None
        )
        return self._sealed

    def __del__(self) -> None:
        if self._sealed:
            return
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._identity:  # else another place of the same object has that name now
                self._objects._remove(self._path)


__all__ = ["NOT_HERE", "Failed", "FilePlace", "ObjectRef", "ObjectStore", "Place", "Store", "StoreFull"]
