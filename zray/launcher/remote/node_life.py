"""The node of a cluster on this host: is there one, start it, end it.

Covers the node's record, the key file, and ending whatever of the cluster runs here, also after a crash. Does not cover what a node is:
`zray start` makes it. Ending does not need zray, which may be broken or gone by then.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import time
from typing import Any

from . import watched
from .place import Place, is_alive

_TERM_S = 5.0
"""A broker that was asked to end gets so long."""
_VANISH_S = 2.0
"""The processes of a node that has ended are gone after so long."""


class CannotStart(Exception):
    """The node did not start; the text is what it said."""


def fingerprint(path: str) -> str:
    """Return what may be told of a key file to compare it: a digest of its public half; empty when there is none."""
    try:
        with open(path, encoding="ascii") as file:
            return hashlib.sha256(json.load(file)["public"].encode()).hexdigest()[:16]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def running(place: Place) -> dict[str, Any] | None:
    """Return the record of the node that runs here, with the fingerprint of its key; None: there is none."""
    try:
        sessions = os.listdir(place.runtime)
    except OSError:
        return None
    for session in sessions:
        directory = os.path.join(place.runtime, session)
        with contextlib.suppress(OSError, ValueError):
            with open(os.path.join(directory, "node.json"), encoding="utf-8") as file:
                record: dict[str, Any] = json.load(file)
            if _is_held(directory) and record.get("address"):
                return {**record, "fingerprint": fingerprint(record["key_file"])}
    return None


def _is_held(directory: str) -> bool:
    """Whether the session's broker lives: it holds a lock for as long."""
    fd = os.open(os.path.join(directory, "alive"), os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def start(place: Place, key: dict[str, str], arguments: list[str], settings: str, limit: float) -> dict[str, Any]:
    """Start the node.

    Args:
        place: where.
        key: the cluster's key, as its file holds it.
        arguments: of `zray start`, but for the key.
        settings: a digest of what was configured, to be found again.
        limit: seconds it may take.

    Returns:
        The node's record, as `running` tells it.

    Raises:
        CannotStart: it did not; nothing of it is left.
        BadPlace: the directory cannot be used.
    """
    place.make()
    place.write(place.key_file, json.dumps(key))
    command = [place.python, "-m", "zray.cli", "start", *arguments, "--key", place.key_file, "--json"]
    try:
        # Not watched for the end of the conversation: a start is ended or undone as a whole, by whoever called.
        status, _, said = watched.run(None, command, place.environment(), limit)
        found = running(place) if status == 0 else None
        if found is None:
            raise CannotStart(watched.last_lines(said) or f"zray start ended with status {status}")
    except (watched.Late, OSError) as error:
        end(place)
        raise CannotStart(f"zray start: {error}") from None
    except CannotStart:
        end(place)
        raise
    place.write(place.settings_file, settings)
    place.write_environment(found["head"])
    return found


def end(place: Place) -> dict[str, Any]:
    """End all that runs here of the cluster, and remove its directory.

    Returns:
        "ended": how many processes there were; "killed": how many of them had to be killed; "removed": whether there was a directory.
        "left": what could not be ended.
    """
    there = place.check()
    marked = place.processes()
    killed = 0
    record = running(place) if there else None
    if record is not None:
        killed += _end_broker(int(record["broker_pid"]))
        shutil.rmtree(record["spill_directory"], ignore_errors=True)
    if marked:
        _wait_gone(place, _VANISH_S if record is not None else 0.0)
        for number, patience in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 2.0)):
            left = place.processes()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                    os.kill(pid, signal.SIGCONT)
            killed += len(left) if number == signal.SIGKILL else 0
            _wait_gone(place, patience if left else 0.0)
    left = place.processes()
    if there and not left:
        place.remove()
    return {"ended": len(marked), "killed": killed, "removed": there and not left, "left": left}


def _end_broker(pid: int) -> int:
    """Ask a broker to end, and kill it if it does not; return how many were killed."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return 0
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(handle, number)
            signal.pidfd_send_signal(handle, signal.SIGCONT)  # one that is stopped hears nothing else
            if select.select([handle], [], [], _TERM_S)[0]:
                return int(number == signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)
    return 0


def _wait_gone(place: Place, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    left = place.processes()
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [pid for pid in left if is_alive(pid)]


def members(place: Place, limit: float) -> dict[str, Any]:
    """Ask the node here which nodes its cluster has: what `zray status --json` prints. CannotStart: it gives no answer."""
    command = [place.python, "-m", "zray.cli", "status", "--json"]
    try:
        status, out, said = watched.run(None, command, place.environment(), limit)
        if status == 0:
            found: dict[str, Any] = json.loads(out)
            return found
    except (watched.Late, OSError, ValueError) as error:
        raise CannotStart(f"zray status: {error}") from None
    raise CannotStart(watched.last_lines(said))
