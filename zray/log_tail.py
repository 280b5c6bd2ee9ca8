"""The driver's side of worker output: lines that workers wrote appear on the driver's terminal, prefixed.

Covers reading the log files of a job's workers and printing what is new, before `get` returns (asked by the session) and every now and then
(a thread, for tasks that still run). Does not cover writing them (`zray.execution`). A line that starts with 0x1e names the task whose output follows.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Final

_INTERVAL_S: Final = 0.25
_CHUNK: Final = 1 << 20


class _File:
    __slots__ = ("offset", "prefix", "rest")

    def __init__(self) -> None:
        self.offset = 0
        self.prefix = ""
        self.rest = b""


class LogTail:
    """Prints new output of one job's workers."""

    def __init__(self, directory: str, job: int) -> None:
        self.directory = directory
        self.suffixes = (f".{job}.out", f".{job}.err")
        self._files: dict[str, _File] = {}
        self._lock = threading.RLock()
        self._draining = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="zray-log", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self.drain()

    def drain(self) -> None:
        """Print what is new in all files. Does nothing in a finalizer, a signal handler or a stream's `write` that gets values while this thread prints."""
        with self._lock:
            if self._draining:
                return
            self._draining = True
            try:
                self._drain()
            finally:
                self._draining = False

    def _drain(self) -> None:
        try:
            names = [entry.name for entry in os.scandir(self.directory) if entry.name.endswith(self.suffixes)]
        except FileNotFoundError:
            return
        for name in sorted(names):
            self._drain_file(name)
        if len(self._files) > 2 * len(names):  # the broker removes the files of workers that ended long ago
            self._files = {name: self._files[name] for name in names if name in self._files}

    def _drain_file(self, name: str) -> None:
        state = self._files.setdefault(name, _File())
        path = os.path.join(self.directory, name)
        try:
            size = os.stat(path).st_size
            if size == state.offset:
                return
            if size < state.offset:
                state.offset = 0
            with open(path, "rb", buffering=0) as file:
                file.seek(state.offset)
                while chunk := file.read(_CHUNK):
                    state.offset += len(chunk)
                    self._print(name, state, chunk)
        except FileNotFoundError:
            return

    def _print(self, name: str, state: _File, chunk: bytes) -> None:
        lines = (state.rest + chunk).split(b"\n")
        state.rest = lines.pop()
        out: list[str] = []
        for line in lines:
            if line.startswith(b"\x1e"):
                task, _, pid = line[1:].decode("utf-8", "replace").partition("\x1f")
                state.prefix = f"({task} pid={pid}) " if pid else f"[{task}] "
            else:
                out.append(f"{state.prefix}{line.decode('utf-8', 'replace')}\n")
        if out:
            stream = sys.stdout if name.endswith(".out") else sys.stderr
            try:
                stream.write("".join(out))
                stream.flush()
            except (ValueError, OSError):
                pass

    def stop(self) -> None:
        """Print what is left and end the thread."""
        self._stop.set()
        self._thread.join()
        self.drain()
