"""Installing zray on this host: a virtual environment of the launcher's own, and wheels that came with the request.

Covers making it as a whole or not at all. Does not cover whether it is wanted (`zray.launcher.plan`). Hosts may share a home directory: a
lock beside the environment lets one install and the others find it done.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from typing import Any

from . import watched
from .channel import Channel, Gone

MARK = "zray-cluster-installed"
"""File in the environment that says what was installed; written last."""


class CannotInstall(Exception):
    """The text is what pip (or venv) said."""


def install(channel: Channel, base: str, request: dict[str, Any], files: dict[str, bytes]) -> None:
    """Make the virtual environment and install into it.

    Args:
        channel: all ends with this conversation.
        base: interpreter that makes the environment.
        request: "directory" of the environment, "digest": what to write when all is done, "requirements": what pip is to install (besides
            the files), "pip_options", "limit" and "silence" in seconds.
        files: name -> content of wheels.

    Raises:
        CannotInstall: it did not work; the environment is gone or as it was.
        Gone: the conversation ended.
    """
    directory = os.path.expanduser(request["directory"])
    deadline = time.monotonic() + request["limit"]
    try:
        os.makedirs(os.path.dirname(directory), mode=0o700, exist_ok=True)
        lock = os.open(f"{directory}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotInstall(f"{error.filename}: {error.strerror}") from None
    try:
        _wait_lock(channel, lock, deadline)
        if _installed(directory) != request["digest"]:
            _make(channel, base, directory, request, files, deadline)
    except watched.Late as error:
        raise CannotInstall(str(error)) from None
    except OSError as error:
        raise CannotInstall(f"{error.filename}: {error.strerror}") from None
    finally:
        os.close(lock)


def _wait_lock(channel: Channel, lock: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        if channel.is_gone():
            raise Gone
        if time.monotonic() > deadline:
            raise CannotInstall("another installation into the same directory goes on and on")
        time.sleep(0.1)


def _installed(directory: str) -> str:
    try:
        with open(os.path.join(directory, MARK)) as file:
            return file.read().strip()
    except OSError:
        return ""


def _make(
    channel: Channel, base: str, directory: str, request: dict[str, Any], files: dict[str, bytes], deadline: float
) -> None:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONUNBUFFERED": "1"}

    def run(*command: str) -> None:
        limit = max(1.0, deadline - time.monotonic())
        status, out, said = watched.run(channel, list(command), environment, limit, silence=request["silence"])
        if status:
            raise CannotInstall(watched.last_lines(said) or watched.last_lines(out))

    shutil.rmtree(directory, ignore_errors=True)
    wheels = tempfile.mkdtemp(prefix="zray-wheels-")
    try:
        for name, content in files.items():
            with open(os.path.join(wheels, os.path.basename(name)), "wb") as file:
                file.write(content)
        run(base, "-m", "venv", directory)
        wanted = [os.path.join(wheels, os.path.basename(name)) for name in files if name.startswith("zray-")]
        # -v: each step is a line, so that silence means that nothing goes on.
        run(
            os.path.join(directory, "bin", "python"),
            *("-m", "pip", "install", "-v", "--retries", "1", "--timeout", "10"),
            *(["--find-links", wheels] if files else []),
            *request["pip_options"],
            *wanted,
            *request["requirements"],
        )
        with open(os.path.join(directory, MARK), "w") as mark:
            mark.write(request["digest"])
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(wheels, ignore_errors=True)


def remove(directory: str) -> bool:
    """Remove the environment; return whether there was one. One that this program did not make stays."""
    directory = os.path.expanduser(directory)
    there = bool(_installed(directory))
    if there:
        shutil.rmtree(directory)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{directory}.lock")
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(directory))
    return there
