"""Values to bytes and back: pickle protocol 5 with large buffers kept out of band, so that they are read in place.

Covers values of objects (`dumps`, `loads`), arguments of calls (`dumps_args`, `loads_args`), code (`dumps_code`),
raised exceptions (`dumps_exception`) and the registry of serializers. Does not cover where the bytes go
(`zray.object_store`), what a failure record is (`zray.failures`), or the explanation of what cannot be pickled
(`zray.serializability`).

What an object's data looks like, by kind:

    KIND_PICKLE    a pickle, nothing else
    KIND_BUFFERS   u32 number of buffers n, u32 length of the pickle, n x (u64 offset, u64 length), the pickle, then
                   each buffer at the next multiple of 64 (offsets from the start of the data; all little-endian)
    KIND_RAW       the bytes of a `bytes` value
    KIND_ERROR     a pickled failure record (`zray.failures`); the store knows this bit

Plain pickle comes first because it is several times faster; cloudpickle takes over where plain pickle fails, or where
it would name something of `__main__` (the driver's script: workers have another `__main__`) or of a module that was
registered to go by value. Buffers below SMALL_BUFFER are copied when they are read, so that a value with none larger
keeps nothing pinned; they, too, come back read-only.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import struct
import sys
from collections import ChainMap
from typing import TYPE_CHECKING, Any, Final

from zray import object_ref
from zray.errors import SerializationError, ZrayError, ZrayInternalError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

KIND_PICKLE: Final = 0
KIND_BUFFERS: Final = 1
KIND_RAW: Final = 3
KIND_ERROR: Final = 0x80
"""The store's error bit; every kind with it is a failure record."""

EMPTY_ARGS: Final = b""
"""What `dumps_args` gives for a call without arguments."""
SMALL_BUFFER: Final = 2048
"""Bytes: smaller buffers are copied at reading instead of being views."""

_ALIGN: Final = 64
_LARGE_BYTES: Final = 32 * 1024
_STREAM_LIMIT: Final = 2**32
_HEAD = struct.Struct("<II")
_PAIR = struct.Struct("<QQ")

# Exact types that contain nothing: no reference, no buffer, nothing of __main__.
_ATOMS = frozenset((type(None), bool, int, float, str))
_BYTES_LIKE = frozenset((bytes, bytearray, memoryview))
_collecting = object_ref.collecting
_pickle_dumps = pickle.dumps
_pickle_loads = pickle.loads
_modules = sys.modules


class Packed:
    """A value ready to be laid out: `size` bytes at a 64-byte aligned place take all of it."""

    __slots__ = ("buffers", "kind", "refs", "size", "stream")

    def __init__(self, kind: int, stream: bytes, buffers: list[memoryview], refs: list[Any]) -> None:
        """Describe a value.

        Args:
            kind: KIND_*.
            stream: the pickle, or the value itself for KIND_RAW.
            buffers: contiguous bytes out of band, in the order of the pickle.
            refs: references found inside.
        """
        self.kind = kind
        self.stream = stream
        self.buffers = buffers
        self.refs = refs
        size = len(stream)
        if buffers:
            size += 8 + 16 * len(buffers)
            for buffer in buffers:
                size = (size + 63 & ~63) + buffer.nbytes
        self.size = size

    def write_into(self, target: memoryview) -> None:
        """Lay the data out at the start of `target` (writable, contiguous bytes, at least `size` of them)."""
        stream = self.stream
        if not self.buffers:
            target[: len(stream)] = stream
            return
        count = len(self.buffers)
        start = 8 + 16 * count
        end = start + len(stream)
        table: list[int] = []
        for buffer in self.buffers:
            offset = end + 63 & ~63
            end = offset + buffer.nbytes
            table += (offset, buffer.nbytes)
            target[offset:end] = buffer
        _HEAD.pack_into(target, 0, count, len(stream))
        struct.pack_into(f"<{2 * count}Q", target, 8, *table)
        target[start : start + len(stream)] = stream

    def to_bytes(self) -> bytes:
        """Return the data as bytes: for values that travel inside a message."""
        if not self.buffers:
            return self.stream
        data = bytearray(self.size)
        self.write_into(memoryview(data))
        return bytes(data)


# -- values ----------------------------------------------------------------------------------------------------------


def dumps(value: Any, *, what: str = "the put value") -> Packed:
    """Pack a value.

    Args:
        value: anything that pickle or cloudpickle can take.
        what: names the value in an error, e.g. "the return value of f".

    Raises:
        SerializationError: (a TypeError) it cannot be pickled; the text names the attribute path and what to do.
    """
    kind = type(value)
    if kind in _ATOMS:
        return Packed(KIND_PICKLE, _pickle_dumps(value, 5), [], [])
    if kind is bytes:
        return Packed(KIND_RAW, value, [], [])
    if kind is bytearray or kind is memoryview:
        value = _box(value)
    elif kind.__name__ == "ndarray":
        value = _box_array(value)
    refs: list[Any] = []
    outer = _collecting.refs
    _collecting.refs = refs
    try:
        return _pack(value, refs)
    except (ZrayError, MemoryError):
        raise
    except Exception as error:
        raise _explained(value, what, "", True, error) from error
    finally:
        _collecting.refs = outer


def dumps_code(code: Any, *, what: str = "the function") -> Packed:
    """Pack a function or class so that another process can run it: by value unless that process can import it.

    Args:
        code: function or class.
        what: names it in an error, e.g. "the function mod.f" or "the actor class mod.A".

    Raises:
        SerializationError: it, or something it uses from outside, cannot be pickled.
    """
    refs: list[Any] = []
    outer = _collecting.refs
    _collecting.refs = refs
    try:
        return Packed(KIND_PICKLE, _dump_by_value(code, None), [], refs)
    except (ZrayError, MemoryError):
        raise
    except Exception as error:
        raise _explained(code, what, getattr(code, "__name__", ""), False, error) from error
    finally:
        _collecting.refs = outer


def loads(kind: int, view: Any, writable: bool = False) -> Any:
    """Rebuild the value whose data lies in `view`.

    Args:
        kind: KIND_*.
        view: bytes, or a memoryview whose exporter keeps the memory in place as long as views of it exist. Large
            buffers of the value are slices of it, at the alignment they were laid out with.
        writable: leave the slices as writable as `view` is (a private mapping); otherwise they are read-only.

    Returns:
        The value; for KIND_ERROR the exception to raise.
    """
    if kind == KIND_PICKLE:
        return _pickle_loads(view)
    if kind == KIND_RAW:
        return bytes(view)
    if kind == KIND_BUFFERS:
        whole = memoryview(view)
        if not writable and not whole.readonly:
            whole = whole.toreadonly()
        count, length = _HEAD.unpack_from(whole)
        table = _PAIR.unpack_from(whole, 8) if count == 1 else struct.unpack_from(f"<{2 * count}Q", whole, 8)
        small = bytearray if writable else bytes
        buffers: list[Any] = []
        for i in range(0, 2 * count, 2):
            offset, size = table[i], table[i + 1]
            part = whole[offset : offset + size]
            buffers.append(part if size >= SMALL_BUFFER else small(part))
        start = 8 + 16 * count
        return _pickle_loads(whole[start : start + length], buffers=buffers)
    if kind & KIND_ERROR:
        from zray import failures

        return failures.rebuild(failures.load(view))
    raise ZrayInternalError(f"an object of unknown kind {kind}")


def dumps_exception(exception: BaseException, **where: Any) -> Packed:
    """Pack an exception that user code raised. Never raises.

    Args:
        exception: as caught, with its traceback.
        where: keyword arguments of `failures.capture`: function_name, task_id ...
    """
    from zray import failures

    refs: list[Any] = []
    outer = _collecting.refs
    _collecting.refs = refs
    try:
        return Packed(KIND_ERROR, failures.dump(failures.capture(exception, **where)), [], refs)
    finally:
        _collecting.refs = outer


# -- arguments -------------------------------------------------------------------------------------------------------


def dumps_args(
    args: tuple[Any, ...], kwargs: dict[str, Any], function: str = ""
) -> tuple[bytes | Packed, list[Any], list[Any]]:
    """Pack the arguments of a call. References at top level are left out: the executor puts their values in.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        function: names the called function in an error.

    Returns:
        (data, top, nested): data is a pickle (EMPTY_ARGS without arguments), or a Packed when there are buffers; top
        are the references left out, in the order in which `loads_args` wants their values; nested are those inside.

    Raises:
        SerializationError: an argument cannot be pickled.
    """
    if not args and not kwargs:
        return EMPTY_ARGS, [], []
    ref = object_ref.ref_class
    top: list[Any] = []
    for value in args:
        kind = type(value)
        if kind is ref:
            top.append(value)
        elif kind not in _ATOMS and (kind is not bytes or len(value) > _LARGE_BYTES):
            return _dumps_any_args(args, kwargs, function, ref)
    if kwargs:
        for value in kwargs.values():
            kind = type(value)
            if kind is ref:
                top.append(value)
            elif kind not in _ATOMS and (kind is not bytes or len(value) > _LARGE_BYTES):
                return _dumps_any_args(args, kwargs, function, ref)
    # Atoms and references only: nothing to collect, nothing that needs more than plain pickle.
    if top:
        return _pickle_dumps(_with_places(args, kwargs, ref), 5), top, []
    return _pickle_dumps([args, kwargs] if kwargs else args, 5), top, []


def _with_places(args: tuple[Any, ...], kwargs: dict[str, Any], ref: type) -> list[Any]:
    """Return what is pickled when references are left out: [args, kwargs, their places, their names]."""
    return [
        [None if type(value) is ref else value for value in args],
        {name: None if type(value) is ref else value for name, value in kwargs.items()} if kwargs else kwargs,
        [i for i, value in enumerate(args) if type(value) is ref],
        [name for name, value in kwargs.items() if type(value) is ref] if kwargs else (),
    ]


def _dumps_any_args(
    args: tuple[Any, ...], kwargs: dict[str, Any], function: str, ref: type
) -> tuple[bytes | Packed, list[Any], list[Any]]:
    top: list[Any] = []
    boxing = False
    for values in (args, kwargs.values()) if kwargs else (args,):
        for value in values:
            kind = type(value)
            if kind is ref:
                top.append(value)
            elif kind in _BYTES_LIKE or kind.__name__ == "ndarray":
                boxing = True
    boxed, named = args, kwargs
    if boxing:
        boxed = tuple([_argument(value) for value in args])
        named = {name: _argument(value) for name, value in kwargs.items()}
    if top:
        payload: Any = _with_places(boxed, named, ref)
    else:
        payload = [boxed, named] if named else boxed
    nested: list[Any] = []
    outer = _collecting.refs
    _collecting.refs = nested
    try:
        packed = _pack(payload, nested)
    except (ZrayError, MemoryError):
        raise
    except Exception as error:
        raise _explained_argument(args, kwargs, function, error) from error
    finally:
        _collecting.refs = outer
    return packed if packed.buffers else packed.stream, top, nested


def _argument(value: Any) -> Any:
    """Return what is pickled for one argument: large bytes and arrays go out of band."""
    kind = type(value)
    if kind in _BYTES_LIKE:
        return _box(value) if len(value) > _LARGE_BYTES else value
    return _box_array(value) if kind.__name__ == "ndarray" else value


def loads_args(kind: int, view: Any, resolved: Sequence[Any] = ()) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Rebuild the arguments of a call.

    Args:
        kind: KIND_PICKLE, or the kind of the Packed.
        view: the data.
        resolved: values of the references that were left out, in the order `dumps_args` gave them.
    """
    if not len(view):
        return (), {}
    found = _pickle_loads(view) if kind == KIND_PICKLE else loads(kind, view)
    if type(found) is tuple:
        return found, {}
    if len(found) == 2:
        return found[0], found[1]
    args, kwargs, places, names = found
    for place, value in zip(places, resolved):
        args[place] = value
    if names:
        kwargs.update(zip(names, resolved[len(places) :]))
    return tuple(args), kwargs


# -- pickling --------------------------------------------------------------------------------------------------------


def _pack(value: Any, refs: list[Any]) -> Packed:
    """Pickle plainly if that will do, else by value. `refs` is what the active collector fills."""
    found: list[pickle.PickleBuffer] = []
    try:
        if _reducers or "torch" in _modules:
            stream = _dump_reduced(value, found.append)
        else:
            stream = _pickle_dumps(value, 5, buffer_callback=found.append)
        plain = b"__main__" not in stream
        if _modules_by_value and plain:
            plain = not any(name in stream for name in _modules_by_value)
    except Exception:  # whatever it was: if it was the value's fault, the second try raises it again
        plain = False
    if not plain:
        found.clear()
        refs.clear()
        stream = _dump_by_value(value, found.append)
    if not found:
        return Packed(KIND_PICKLE, stream, [], refs)
    if len(stream) >= _STREAM_LIMIT:
        refs.clear()
        return Packed(KIND_PICKLE, _dump_by_value(value, None), [], refs)
    return Packed(KIND_BUFFERS, stream, [buffer.raw() for buffer in found], refs)


def _dump_reduced(value: Any, keep: Callable[[pickle.PickleBuffer], Any]) -> bytes:
    """Pickle plainly, with the registered serializers."""
    if not _torch_seen and "torch" in _modules:
        _see_torch()
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 5, buffer_callback=keep)
    pickler.dispatch_table = {**copyreg.dispatch_table, **_reducers}
    pickler.dump(value)
    return file.getvalue()


_by_value_pickler: Any = None


def _dump_by_value(value: Any, keep: Callable[[pickle.PickleBuffer], Any] | None) -> bytes:
    """Pickle with cloudpickle: functions and classes of `__main__`, of functions and of registered modules by value."""
    global _by_value_pickler
    if _by_value_pickler is None:
        import cloudpickle

        class ByValuePickler(cloudpickle.CloudPickler):  # type: ignore[misc]
            # A class attribute: the C pickler reads it once, when an instance is initialised.
            dispatch_table = ChainMap(_reducers, cloudpickle.CloudPickler.dispatch_table)

        _by_value_pickler = ByValuePickler
    file = io.BytesIO()
    _by_value_pickler(file, protocol=5, buffer_callback=keep).dump(value)
    return file.getvalue()


def why_not(value: Any) -> Exception | None:
    """Return the exception that pickling the value raises, or None when it can be pickled."""
    outer = _collecting.refs
    _collecting.refs = []
    try:
        _pack(value, _collecting.refs)
    except Exception as error:
        return error
    finally:
        _collecting.refs = outer
    return None


class _Box:
    """Pickled in place of a bytes-like value or array at top level: its bytes out of band, and what to make of them."""

    __slots__ = ("reduced", "value")

    def __init__(self, value: Any, reduced: tuple[Any, ...]) -> None:
        self.value = value
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def _box(value: bytes | bytearray | memoryview) -> Any:
    """Box a bytes-like value; a memoryview becomes bytes, as pickling it by cloudpickle would make it."""
    if isinstance(value, memoryview):
        return _Box(value, (bytes, (pickle.PickleBuffer(value),))) if value.contiguous else value.tobytes()
    return _Box(value, (type(value), (pickle.PickleBuffer(value),)))


def _box_array(value: Any) -> Any:
    """Box an array of a simple dtype: numpy's own pickling gives the same array but takes three times as long."""
    numpy = _modules.get("numpy")
    if numpy is None or type(value) is not numpy.ndarray:
        return value
    dtype, flags = value.dtype, value.flags
    if dtype.kind not in "biufc" or not dtype.isnative or dtype.metadata is not None or not flags.forc:
        return value
    order = "C" if flags.c_contiguous else "F"
    return _Box(value, (_restore_array, (pickle.PickleBuffer(value), dtype.str, value.shape, order)))


def _restore_array(buffer: Any, dtype: str, shape: tuple[int, ...], order: Any) -> Any:
    import numpy

    return numpy.ndarray(shape, dtype, buffer, 0, None, order)


# -- what users register ---------------------------------------------------------------------------------------------

_reducers: dict[type, Callable[[Any], Any]] = {}
_modules_by_value: dict[bytes, str] = {}
_torch_seen = False


def register_serializer(cls: type, *, serializer: Callable[[Any], Any], deserializer: Callable[[Any], Any]) -> None:
    """Pickle instances of exactly `cls` as `deserializer(serializer(instance))`, in this process from now on."""
    if not isinstance(cls, type):
        raise TypeError(f"register_serializer needs a class, got {type(cls).__name__}")

    def reduce(value: Any) -> tuple[Any, ...]:
        return deserializer, (serializer(value),)

    _reducers[cls] = reduce


def deregister_serializer(cls: type) -> None:
    """Forget what `register_serializer` said of `cls`; nothing happens if it said nothing."""
    _reducers.pop(cls, None)


def register_by_value(module: ModuleType) -> None:
    """Send functions and classes of this module by value: for modules that workers cannot import."""
    import cloudpickle

    cloudpickle.register_pickle_by_value(module)
    _modules_by_value[module.__name__.encode()] = module.__name__


def unregister_by_value(module: ModuleType) -> None:
    """Send functions and classes of this module by name again."""
    import cloudpickle

    if _modules_by_value.pop(module.__name__.encode(), None) is not None:
        cloudpickle.unregister_pickle_by_value(module)


# -- PyTorch ---------------------------------------------------------------------------------------------------------
# Tensors pickle their storage by copying it several times and in band. Dense CPU tensors go out of band here instead.
# There are no read-only tensors: read from shared memory they are copied once; in a private mapping (writable) they are
# views.


def _see_torch() -> None:
    global _torch_seen
    torch = sys.modules["torch"]
    tensor = getattr(torch, "Tensor", None)
    if tensor is not None and hasattr(torch, "frombuffer"):  # else its import is still under way
        _torch_seen = True
        _reducers[tensor] = _reduce_tensor


def _reduce_tensor(value: Any) -> Any:
    torch = sys.modules["torch"]
    dense = (
        value.device.type == "cpu"
        and value.layout is torch.strided
        and not value.requires_grad
        and not value.is_quantized
        and not value.is_conj()
        and not value.is_neg()
        and value.numel() > 0
        and value.is_contiguous()
        and value.untyped_storage().nbytes() == value.numel() * value.element_size()
        and not value.__dict__
    )
    if not dense:
        return value.__reduce_ex__(5)
    raw = value.detach().reshape(-1).view(torch.uint8).numpy()
    return _restore_tensor, (pickle.PickleBuffer(raw), value.dtype, tuple(value.shape))


def _restore_tensor(buffer: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    import torch

    if memoryview(buffer).readonly:
        buffer = bytearray(buffer)
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


# -- errors ----------------------------------------------------------------------------------------------------------


def _explained(value: Any, what: str, name: str, show: bool, error: Exception) -> SerializationError:
    from zray import serializability

    if type(value) is _Box:
        value = value.value
    return serializability.explain(value, what=what, name=name, show=show, error=error)


def _explained_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], function: str, error: Exception
) -> SerializationError:
    """Find the argument that is to blame and explain it."""
    what = f"the argument {{}} for a task or actor {function}" if function else "the argument"
    for name, value in [*((f"args[{i}]", v) for i, v in enumerate(args)), *kwargs.items()]:
        problem = why_not(value)
        if problem is not None:
            return _explained(value, what, name, True, problem)
    return _explained((args, kwargs), "the arguments", "", True, error)
