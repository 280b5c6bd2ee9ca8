"""Programs on the cluster's hosts: `exec`, `submit`, `logs`, `cancel`, and the shell of `attach`.

Covers the launcher's side. Does not cover the hosts' side (`remote.jobs`). What runs under `exec` ends with the launcher; a submitted job does not.
"""

from __future__ import annotations

import io
import os
import re
import sys
import tarfile
from typing import TYPE_CHECKING, Any, Final

from zray.launcher import ssh
from zray.launcher.output import Output
from zray.launcher.running import HostRun, Interrupted, Run
from zray.launcher.ssh import HostError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from zray.launcher.config import ClusterFile, Host
    from zray.launcher.display import Board

_LEFT_OUT: Final = ("__pycache__", ".git", ".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache")
_MAX_FILES: Final = 256 << 20
"""Bytes of a working directory; more is better sent by rsync-up."""
_PLAIN: Final = r"[A-Za-z0-9_./-]+"


class TooLarge(ValueError):
    """A working directory is too large to be sent with a job."""


def exit_code(status: int) -> int:
    """Return what a shell would: 128 + number for a program that a signal ended."""
    return 128 - status if status < 0 else status


def pack(script: Path, working_directory: Path | None) -> tuple[str, bytes]:
    """Pack what a job needs.

    Args:
        script: the program.
        working_directory: all of it is sent, and the script must lie in it; None: the script alone.

    Returns:
        The script's path within, and a compressed tar archive.

    Raises:
        OSError: something cannot be read.
        TooLarge: it is more than 256 MiB, compressed.
        ValueError: the script is not in the working directory.
    """

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if os.path.basename(member.name) in _LEFT_OUT else member

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        if working_directory is None:
            name = script.name
            archive.add(script, name)
        else:
            name = str(script.resolve().relative_to(working_directory.resolve()))
            archive.add(working_directory, ".", filter=wanted)
    if buffer.tell() > _MAX_FILES:
        raise TooLarge(
            f"{working_directory or script} is more than {_MAX_FILES >> 20} MiB, compressed: send it by rsync-up"
        )
    return name, buffer.getvalue()


class Programs(Run):
    """Runs programs on hosts, or reads what they have printed; output goes to this process's own."""

    def __init__(self, cluster: ClusterFile, hosts: Iterable[Host], board: Board) -> None:
        super().__init__(cluster, hosts, board)
        self._output = Output([host.host.name for host in self.hosts])
        self.statuses: dict[str, int] = {}
        """Exit statuses of programs by host; negative: signal."""
        self.states: dict[str, str] = {}
        """Of jobs by host: running, ended, killed."""

    async def execute(self, command: Sequence[str]) -> None:
        """Run a command on all hosts and show what it prints."""

        async def each(host: HostRun) -> None:
            self.statuses[host.host.name] = await self._stream(host, {"do": "run", "command": list(command)})

        await self._do(each)

    async def submit(self, job: dict[str, Any], files: bytes) -> None:
        """Start a job on the only host."""

        async def each(host: HostRun) -> None:
            host.column = "ssh"
            await host.ask("submit", payload=files, job=job)

        await self._do(each)

    async def follow(self, job: str, lines: int | None, follow: bool) -> None:
        """Show a job's output; with `follow` until it ends."""

        async def each(host: HostRun) -> None:
            found = await self._stream(host, {"do": "job", "job": job, "lines": lines, "follow": follow})
            self.states[host.host.name] = found["state"]
            if found["status"] is not None:
                self.statuses[host.host.name] = found["status"]

        await self._do(each)

    async def logs(self, lines: int | None, follow: bool) -> None:
        """Show logs of nodes and workers."""

        async def each(host: HostRun) -> None:
            await self._stream(host, {"do": "logs", "lines": lines, "follow": follow})

        await self._do(each)

    async def cancel(self, job: str) -> None:
        """End a job."""

        async def each(host: HostRun) -> None:
            ended = await host.ask("end_job", job=job)
            self.states[host.host.name] = "cancelled" if ended else "ended before"

        await self._do(each)

    async def _do(self, each: Any) -> None:
        with self.interruptible():
            try:
                await self.run(each)
            finally:
                for stream, data in self._output.rest():
                    _write(stream, data)
                await self.close()

    async def _stream(self, host: HostRun, message: dict[str, Any]) -> Any:
        """A request whose events are output; takes as long as it takes."""

        def show(event: dict[str, Any]) -> None:
            _write(*self._output.feed(host.host.name, event))

        fields = ssh.place_fields(host.host, host.node_python)
        return await self.unless_interrupted(host.conversation.request({**fields, **message}, None, on_event=show))


def _write(stream: str, data: bytes) -> None:
    sink = sys.stdout.buffer if stream == "out" else sys.stderr.buffer
    sink.write(data)
    sink.flush()


class Attach(Run):
    """Finds out how to open a shell on a host."""

    def __init__(self, cluster: ClusterFile, hosts: Iterable[Host], board: Board) -> None:
        super().__init__(cluster, hosts, board)
        self.command: list[str] = []
        """Of ssh: to be executed instead of this process."""

    async def prepare(self) -> None:
        """Look whether there is something to attach to."""

        async def each(host: HostRun) -> None:
            facts = await self.unless_interrupted(host.facts())
            if facts.node is None:
                raise HostError("ssh", "no node runs there: `zray-cluster up` starts it")
            self.command = ssh.command(
                self.cluster.ssh, host.host, shell_command(facts.directory), terminal=sys.stdin.isatty()
            )

        with self.interruptible():
            try:
                await self.run(each)
            except Interrupted:
                pass
            finally:
                await self.close()


def shell_command(directory: str) -> str:
    """Return the remote command that opens the user's shell in a cluster's environment; every login shell reads it alike.

    Raises:
        HostError: the directory has a name that would need quoting.
    """
    if not re.fullmatch(_PLAIN, directory):
        raise HostError("ssh", f"{directory} has characters that a shell would take amiss: set 'directory'")
    return f"sh -c '. {directory}/env.sh; ZRAY_ATTACHED=1; export ZRAY_ATTACHED; exec \"${{SHELL:-/bin/sh}}\" -i'"
