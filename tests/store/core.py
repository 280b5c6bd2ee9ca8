"""The store's calls through ctypes, for tests that want Python on top: a thin mirror of `_store_core.h`.

Covers loading the library that `build.py` compiles and the structures a test reads. Does not cover the extension module (`zray._store`).
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from typing import Any

from tests.store import build

OK, TELL, EXISTS, TIMEOUT, INTERRUPTED, LAST = range(6)
NOT_FOUND, FULL, TOO_LARGE, STALE, BAD_STATE, GONE, BROKER_GONE, NO_MEMORY, TOO_MANY = range(-1, -10, -1)
BAD_ARGUMENT, PINNED = -12, -13
FREE, OPEN, PENDING, CLAIMED, SEALED, SPILLED, ZOMBIE = range(7)
ERROR = 0x80
NOTIFY, SYSTEM_ERROR = 1, 8
REMOTE, ELSEWHERE, WANTED, SENT = 1, 2, 4, 16
WAIT_ANYWHERE = 2
PROC_TEST = 6
INLINE_MAX = 48


class Handle(ctypes.Structure):
    _fields_ = [
        ("base", c_void_p),
        ("mapped", c_uint64),
        ("fd", c_int),
        ("pid", c_uint32),
        ("cpus", c_uint32),
        ("self", c_uint32),
    ]


class View(ctypes.Structure):
    _fields_ = [
        ("state", c_uint32),
        ("attempt", c_uint32),
        ("kind", c_uint8),
        ("flags", c_uint8),
        ("inline_size", ctypes.c_uint16),
        ("size", c_uint64),
        ("data", c_void_p),
        ("offset", c_uint64),
    ]


_COUNTS = """
    capacity committed used free_bytes largest_free high_water inline_bytes
    entries entry_limit pending open sealed spilled zombies holds processes pins
    puts gets seals deletes claims stale_seals repairs reaped wakes grows spins
"""


class Statistics(ctypes.Structure):
    _fields_ = [(name, c_uint64) for name in _COUNTS.split()]


_SLOT, _SLOTS, _DATA = POINTER(c_uint32), POINTER(c_uint32), POINTER(c_void_p)
_S = POINTER(Handle)
_SIGNATURES: dict[str, list[Any]] = {
    "zs_format": [c_int, c_uint64, c_uint32],
    "zs_attach": [_S, c_int],
    "zs_detach": [_S],
    "zs_register": [_S, c_uint32],
    "zs_unregister": [_S],
    "zs_reference": [_S, c_char_p, _SLOT],
    "zs_reference_contained": [_S, c_uint32, _SLOTS, c_char_p, c_size_t, POINTER(c_size_t)],
    "zs_release": [_S, c_uint32],
    "zs_put_inline": [_S, c_char_p, c_char_p, c_uint32, c_uint8, c_uint32, _SLOT],
    "zs_put_life": [_S, c_char_p, c_char_p, c_uint32, c_uint32, _SLOT],
    "zs_create": [_S, c_char_p, c_uint64, c_uint32, c_uint32, _SLOT, _DATA],
    "zs_seal": [_S, c_uint32, c_uint8, c_uint8, _SLOTS, c_uint32],
    "zs_seal_as": [_S, _SLOT, c_char_p, c_uint8, c_uint8, _SLOTS, c_uint32],
    "zs_abort": [_S, c_uint32],
    "zs_abort_result": [_S, c_uint32, c_uint32],
    "zs_expect": [_S, c_char_p, c_uint32, c_uint32, c_uint8, _SLOTS, c_uint32, c_char_p, c_uint32, _SLOT],
    "zs_claim": [_S, c_char_p, c_uint32, _SLOT],
    "zs_seal_inline": [_S, c_uint32, c_uint32, c_char_p, c_uint32, c_uint8, c_uint8],
    "zs_open_result": [_S, c_uint32, c_uint32, c_uint64, c_uint32, _DATA],
    "zs_seal_result": [_S, c_uint32, c_uint32, c_uint8, c_uint8, _SLOTS, c_uint32],
    "zs_retry": [_S, c_uint32, c_uint32, _SLOT],
    "zs_retarget": [_S, c_uint32, c_uint32],
    "zs_seal_forced": [_S, c_uint32, c_char_p, c_uint32, c_uint8, c_uint8],
    "zs_take_over": [_S, c_uint32, _SLOT],
    "zs_take_copy": [_S, c_uint32, _SLOT],
    "zs_spec": [_S, c_uint32, c_char_p, _SLOT, _SLOT],
    "zs_expected": [_S, c_uint32],
    "zs_elsewhere": [_S, c_uint32, c_int, POINTER(c_int)],
    "zs_send_away": [_S, c_uint32],
    "zs_want": [_S, _SLOTS, c_size_t, _SLOTS],
    "zs_marks": [_S, c_uint32],
    "zs_pin": [_S, c_uint32, POINTER(View)],
    "zs_unpin": [_S, c_uint32],
    "zs_describe": [_S, c_uint32, POINTER(View)],
    "zs_wait": [_S, _SLOTS, c_size_t, c_size_t, c_int64, c_int, POINTER(c_size_t)],
    "zs_spill_candidate": [_S, c_uint64, _SLOT, POINTER(View)],
    "zs_spilled": [_S, c_uint32],
    "zs_spill_abort": [_S, c_uint32],
    "zs_restore": [_S, c_uint32, _DATA, POINTER(c_uint64)],
    "zs_restored": [_S, c_uint32, c_int],
    "zs_discard": [_S, c_uint32, c_char_p, c_uint32, c_uint8],
    "zs_next_zombie": [_S, c_char_p],
    "zs_stats": [_S, POINTER(Statistics)],
    "zs_check": [_S, c_char_p, c_size_t],
}


@functools.cache
def library() -> ctypes.CDLL:
    """Return the loaded library with its signatures set."""
    lib = ctypes.CDLL(str(build.shared_library()), use_errno=True)
    for name, arguments in _SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes = arguments
        function.restype = c_int
    return lib


def new_segment(capacity: int, entries: int) -> int:
    """Return the descriptor of an empty segment."""
    fd = os.memfd_create("store")
    assert library().zs_format(fd, capacity, entries) == OK
    return fd


class Process:
    """One registered user of a segment. Several may live in one process of the system: to the store they are different ones."""

    def __init__(self, fd: int) -> None:
        self.lib = library()
        self.handle = Handle()
        self.at = byref(self.handle)
        assert self.lib.zs_attach(self.at, fd) == OK
        assert self.lib.zs_register(self.at, PROC_TEST) == OK

    @property
    def proc(self) -> int:
        return int(self.handle.self)

    def call(self, name: str, *arguments: Any) -> int:
        """Call `zs_<name>` with this process's handle."""
        return int(getattr(self.lib, f"zs_{name}")(self.at, *arguments))

    def close(self) -> None:
        assert self.call("unregister") == OK
        self.lib.zs_detach(self.at)

    def check(self) -> None:
        """Every invariant of the segment holds."""
        text = ctypes.create_string_buffer(400)
        assert self.call("check", text, 400) == OK, text.value.decode()

    def statistics(self) -> Statistics:
        out = Statistics()
        assert self.call("stats", byref(out)) == OK
        return out


def slots_of(slots: list[int]) -> Any:
    """Return a C array."""
    return (c_uint32 * max(1, len(slots)))(*slots)
