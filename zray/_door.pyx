# cython: language_level=3
"""The door of a node, for Python: see `_door_core.h`."""

from libc.stdint cimport uint64_t
from libc.string cimport strncpy

import os

cdef extern from "_door_core.h" nogil:
    enum:
        ZD_PATH_MAX
    ctypedef struct zd_door:
        int listener
        int stop
        int greeting_ms
        char prefix[ZD_PATH_MAX]
        char main[ZD_PATH_MAX]
        uint64_t accepted
        uint64_t handed_over
        uint64_t turned_away
        uint64_t open
    int zd_steer(int listener, int family)
    int zd_serve(zd_door *door)


def steer(int listener, int family):
    """Of two sockets that listen on one port, give the first, this one, connections from odd source ports, and the other those from even ones. OSError: this
    kernel cannot."""
    cdef int error = zd_steer(listener, family)
    if error:
        raise OSError(error, os.strerror(error))


cdef class Door:
    """Hands connections to one TCP port over to processes, or carries bytes to a Unix socket, in the thread that calls `serve`."""

    cdef zd_door d

    def __cinit__(self, int listener, str prefix, str main, int greeting_ms=4000):
        """
        Args:
            listener: descriptor of a TCP socket that listens; not closed here, and made not to block.
            prefix: path of the Unix sockets that connections are handed over to, up to their numbers.
            main: path of the one for all connections that do not ask.
            greeting_ms: milliseconds within which a connection must greet.
        """
        self.d.stop = -1
        cdef bytes stem = os.fsencode(prefix), default = os.fsencode(main)
        if max(len(stem) + 5, len(default)) >= ZD_PATH_MAX:
            raise ValueError(f"the runtime directory is too long for a socket address: {prefix}")
        strncpy(self.d.prefix, stem, ZD_PATH_MAX - 1)
        strncpy(self.d.main, default, ZD_PATH_MAX - 1)
        os.set_blocking(listener, False)
        self.d.listener = listener
        self.d.greeting_ms = greeting_ms
        self.d.stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __dealloc__(self):
        self.close()

    def serve(self):
        """Let people in until `stop` is called. OSError: there are no descriptors to begin with."""
        cdef int error
        with nogil:
            error = zd_serve(&self.d)
        if error:
            raise OSError(error, os.strerror(error))

    def stop(self):
        """Have `serve` close all connections and return. From any thread."""
        os.eventfd_write(self.d.stop, 1)

    def close(self):
        """Give back what belongs to the door itself. When `serve` has returned."""
        if self.d.stop >= 0:
            os.close(self.d.stop)
            self.d.stop = -1

    @property
    def accepted(self):
        """Connections that were ever made."""
        return self.d.accepted

    @property
    def handed_over(self):
        """Connections that were given to the processes that they asked for."""
        return self.d.handed_over

    @property
    def turned_away(self):
        """Connections that did not greet in time, or asked for what there is not."""
        return self.d.turned_away

    @property
    def open(self):
        """Connections that there are."""
        return self.d.open
