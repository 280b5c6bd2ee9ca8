"""Programs on this host for the launcher: commands that are watched, jobs that go on alone, and what was logged.

jobs/ID/job.json    what was submitted
jobs/ID/files/      what came with it: its working directory
jobs/ID/output      standard output and standard error
jobs/ID/pid         the supervisor's process id and start time; it leads a session
jobs/ID/status      exit status (negative: signal), written when the program has ended
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import select
import signal
import subprocess
import tarfile
import time
from typing import TYPE_CHECKING, Any

from . import watched
from .channel import Channel, Gone
from .place import Place

if TYPE_CHECKING:
    from collections.abc import Iterator

_POLL_S = 0.05
_CHUNK = 65536
_SUPERVISOR = """\
import json, os, subprocess, sys
place = sys.argv[1]
with open(os.path.join(place, "job.json")) as file:
    job = json.load(file)
try:
    status = subprocess.call(job["command"], cwd=os.path.join(place, "files"), stdin=subprocess.DEVNULL)
except OSError as error:
    print(error, file=sys.stderr)
    status = 127
with open(os.path.join(place, "status.part"), "w") as file:
    file.write(str(status))
os.replace(os.path.join(place, "status.part"), os.path.join(place, "status"))
"""
"""Waits for the program and notes its status: an argument of python -c, as nothing of the launcher is left on the host."""


class NoJob(Exception):
    """There is no job of that name."""


def run(channel: Channel, place: Place, head: str, command: list[str]) -> int:
    """Run a command in the cluster's environment and send what it prints as it comes; return its exit status.

    Raises:
        Gone: the conversation ended, and so did the command.
        OSError: it cannot be started.
    """

    def tell(name: str, data: bytes) -> None:
        channel.send(stream=name, data=base64.b64encode(data).decode())

    return watched.run(channel, command, place.environment(head), None, on_output=tell)[0]


def submit(place: Place, head: str, job: dict[str, Any], files: bytes) -> int:
    """Start a program that goes on by itself; return its supervisor's process id.

    Args:
        place: where.
        head: host:port of the cluster's head.
        job: "id" and "command"; kept with it.
        files: a tar archive that becomes the working directory.

    Raises:
        OSError, tarfile.TarError: it cannot be started.
    """
    directory = os.path.join(place.jobs, job["id"])
    os.makedirs(os.path.join(directory, "files"), mode=0o700)
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        # It is the user's own archive; the filter, where there is one, keeps a warning away.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(os.path.join(directory, "files"), **safe)  # type: ignore[arg-type]
    place.write(os.path.join(directory, "job.json"), json.dumps({**job, "time": time.time()}))
    fd = os.open(os.path.join(directory, "output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            [place.python, "-c", _SUPERVISOR, directory],
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            env={**place.environment(head), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    finally:
        os.close(fd)
    place.write(os.path.join(directory, "pid"), f"{process.pid} {_start_time(process.pid)}")
    process.returncode = 0  # it outlives this program, which must not be warned of that
    return process.pid


def _start_time(pid: int) -> str:
    """Of a process, in clock ticks after boot; empty when there is no such process (a zombie is none)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
            return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
    except (OSError, IndexError):
        return ""


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _supervisor(directory: str) -> int:
    """Process id of a job's supervisor, 0 when it has ended."""
    pid, _, begun = _read(os.path.join(directory, "pid")).partition(" ")
    return int(pid) if pid and begun and _start_time(int(pid)) == begun else 0


def _state(directory: str) -> tuple[str, int | None]:
    # The supervisor is looked at first: one that ends in between has written the status by then.
    lives = _supervisor(directory)
    status = _read(os.path.join(directory, "status"))
    if status:
        return "ended", int(status)
    return ("running", None) if lives else ("killed", None)


def listing(place: Place) -> list[dict[str, Any]]:
    """Return the jobs here, the oldest first: "id", "command", "time", "state" (running, ended, killed) and "status"."""
    found = []
    try:
        names = os.listdir(place.jobs)
    except OSError:
        return []
    for name in names:
        directory = os.path.join(place.jobs, name)
        with contextlib.suppress(OSError, ValueError):
            with open(os.path.join(directory, "job.json")) as file:
                job = json.load(file)
            state, status = _state(directory)
            found.append({**job, "state": state, "status": status})
    found.sort(key=lambda job: float(job["time"]))
    return found


def _directory_of(place: Place, job: str) -> str:
    directory = os.path.join(place.jobs, os.path.basename(job))
    if not os.path.isdir(directory):
        raise NoJob(f"there is no job {job} here")
    return directory


def end(place: Place, job: str, patience: float = 5.0) -> bool:
    """End a job: SIGTERM to its processes, SIGKILL after `patience` seconds. False: it had ended. NoJob."""
    directory = _directory_of(place, job)
    pid = _supervisor(directory)
    if not pid:
        return False
    for number, limit in ((signal.SIGTERM, patience), (signal.SIGKILL, 2.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)
        deadline = time.monotonic() + limit
        while _supervisor(directory) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    return True


def follow_job(channel: Channel, place: Place, job: str, lines: int | None, follow: bool) -> dict[str, Any]:
    """Send a job's output; with `follow` until it ends. Returns "state" and "status". Raises NoJob, Gone."""
    directory = _directory_of(place, job)
    with open(os.path.join(directory, "output"), "rb") as file:
        _skip_to_last(file, lines)
        while True:
            state, status = _state(directory)
            _send_rest(channel, file, {})
            if state != "running" or not follow:
                return {"state": state, "status": status}
            _pause(channel)


def follow_logs(channel: Channel, place: Place, lines: int | None, follow: bool) -> None:
    """Send the logs of the node and its workers, each piece with the file's name; with `follow` until the conversation ends."""
    files: dict[str, io.BufferedReader] = {}
    try:
        while True:
            for path in _log_files(place):
                if path not in files:
                    files[path] = open(path, "rb")  # noqa: SIM115 - closed below, with the others
                    _skip_to_last(files[path], lines)
                _send_rest(channel, files[path], {"file": os.path.basename(path)})
            if not follow:
                return
            _pause(channel)
    finally:
        for file in files.values():
            file.close()


def _log_files(place: Place) -> Iterator[str]:
    for at, _, names in sorted(os.walk(place.runtime)):
        session = os.path.relpath(at, place.runtime).split(os.sep)
        for name in sorted(names):
            if name == "broker.log" or session[1:2] == ["logs"]:
                yield os.path.join(at, name)


def _skip_to_last(file: io.BufferedReader, lines: int | None) -> None:
    """Move to where the last lines begin; None: to the beginning. Reads no more than the end of the file."""
    if lines is None:
        return
    size = file.seek(0, os.SEEK_END)
    at = size
    tail = b""
    while at and tail.count(b"\n") <= lines:
        step = min(_CHUNK, at)
        at -= step
        file.seek(at)
        tail = file.read(step) + tail
    kept = b"".join(tail.splitlines(keepends=True)[-lines:]) if lines else b""
    file.seek(size - len(kept))


def _send_rest(channel: Channel, file: io.BufferedReader, more: dict[str, str]) -> None:
    while data := file.read(_CHUNK):
        channel.send(stream="out", data=base64.b64encode(data).decode(), **more)


def _pause(channel: Channel) -> None:
    if select.select([channel], [], [], _POLL_S * 2)[0] and channel.is_gone():
        raise Gone
