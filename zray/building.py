"""Arrays built inside the object store: `zray.create`."""

from __future__ import annotations

import mmap
import pickle
import struct
from typing import TYPE_CHECKING, Any

import numpy

from zray import errors, serialization

if TYPE_CHECKING:
    from zray.object_store import ObjectRef
    from zray.session import Session


class UnsealedArray:
    """A numpy array in shared memory that only this process sees until it is sealed."""

    array: Any
    """The writable array. Not to be used after `seal`."""

    def __init__(self, session: Session, shape: int | tuple[int, ...], dtype: Any) -> None:
        kind = numpy.dtype(dtype)
        if kind.hasobject:
            raise TypeError(
                f"zray.create() needs a plain dtype, not {kind}: Python objects cannot live in shared memory"
            )
        # Lay out what `put` of such an array would: pickle an array of the same shape without owning its memory.
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        count = 1
        for extent in shape:
            if extent < 0:
                raise ValueError(f"zray.create(): negative extent in shape {shape}")
            count *= extent
        size = count * kind.itemsize
        if size < serialization.SMALL_BUFFER:
            raise ValueError(
                f"zray.create() is for arrays of at least {serialization.SMALL_BUFFER} bytes; put() a small one"
            )
        if size > session.objects.capacity:
            raise errors.ObjectStoreFullError(
                f"zray.create(): {size} bytes are more than the whole object store holds ({session.objects.capacity}). "
                "Give init(object_store_memory=...) more, or make several arrays"
            )
        stream = _stream_of(shape, kind, size)
        start = 8 + 16 + len(stream)
        offset = start + (-start) % 64
        self._room = session.objects.open(session.next_put_id(), offset + size)
        whole = memoryview(self._room)
        whole[:24] = struct.pack("<IIQQ", 1, len(stream), offset, size)  # the layout of serialization.KIND_BUFFERS
        whole[24:start] = stream
        self.array = numpy.frombuffer(whole, kind, count, offset).reshape(shape)
        self._sealed: ObjectRef | None = None

    def seal(self) -> ObjectRef:
        """Make it an object and return its reference; the array becomes read-only. Raises ZrayUsageError the second time."""
        if self._sealed is not None:
            raise errors.ZrayUsageError("this array was sealed already")
        self.array.flags.writeable = False
        self._sealed = self._room.seal(serialization.KIND_BUFFERS)
        return self._sealed


def _stream_of(shape: tuple[int, ...], kind: Any, size: int) -> bytes:
    """The pickle of an array of this shape with its buffer out of band."""
    kept: list[pickle.PickleBuffer] = []
    # A view with the right shape over a lazily mapped region costs no memory: only its description is pickled.
    array = numpy.frombuffer(mmap.mmap(-1, size), kind).reshape(shape)
    return pickle.dumps(array, protocol=5, buffer_callback=kept.append)
