"""Child processes that never outlive their welcome: a limit in seconds, a limit of silence, and an end with the conversation.

Covers running one program and gathering what it says. Does not cover processes that are to stay (`node_life`, `jobs`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from typing import TYPE_CHECKING

from .channel import Channel, Gone

if TYPE_CHECKING:
    from collections.abc import Callable

_CHUNK = 65536


class Late(Exception):
    """A program did not end in time, and was ended."""


def kill_group(process: subprocess.Popen[bytes], patience: float = 1.0) -> None:
    """End a process that leads a session, and its group: SIGTERM, then SIGKILL after `patience` seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    process.wait()


def run(
    channel: Channel | None,
    command: list[str],
    environment: dict[str, str],
    limit: float | None,
    *,
    silence: float | None = None,
    cwd: str | None = None,
    on_output: Callable[[str, bytes], None] | None = None,
) -> tuple[int, bytes, bytes]:
    """Run a program to its end.

    Args:
        channel: the program ends with this conversation; None: it does not.
        command: program and arguments.
        environment: all of it.
        limit: seconds it may take.
        silence: seconds for which it may say nothing.
        cwd: where it runs.
        on_output: called with "out" or "err" and bytes as they come; then nothing is gathered.

    Returns:
        Its exit status (negative: signal), and what it wrote to standard output and standard error.

    Raises:
        Late: it took too long and was ended; the text tells the end of what it said.
        Gone: the conversation ended, and so was the program.
        OSError: it cannot be started.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=cwd,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    names = {process.stdout.fileno(): "out", process.stderr.fileno(): "err"}
    gathered: dict[str, bytearray] = {"out": bytearray(), "err": bytearray()}
    begun = heard = time.monotonic()
    try:
        # The pipes may stay open in children that it left behind, so its end counts as well as theirs.
        while names and (process.poll() is None or select.select(list(names), [], [], 0)[0]):
            now = time.monotonic()
            if limit is not None and now - begun > limit:
                raise Late(f"ended after {limit:.0f} s{_said(gathered)}")
            if silence is not None and now - heard > silence:
                raise Late(f"ended after {silence:.0f} s without a word{_said(gathered)}")
            other = -1 if channel is None else channel.fileno()
            watched = [*names, other] if channel is not None else list(names)
            for source in select.select(watched, [], [], 0.1)[0]:
                if source == other:
                    if channel is not None and channel.is_gone():
                        raise Gone
                    continue
                data = os.read(source, _CHUNK)
                heard = time.monotonic()
                if not data:
                    del names[source]
                elif on_output is not None:
                    on_output(names[source], data)
                else:
                    gathered[names[source]] += data
        return process.wait(), bytes(gathered["out"]), bytes(gathered["err"])
    finally:
        if process.returncode is None:
            kill_group(process)
        process.stdout.close()
        process.stderr.close()


def _said(gathered: dict[str, bytearray]) -> str:
    text = last_lines(bytes(gathered["out"] + gathered["err"]))
    return f": {text}" if text else ""


def last_lines(text: bytes, count: int = 12) -> str:
    """Return the last lines of what a program said, for a report of its failure."""
    return "\n".join(text.decode("utf-8", "replace").strip().splitlines()[-count:])
