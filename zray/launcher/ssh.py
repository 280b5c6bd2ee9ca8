"""The door to a host: the system's ssh program, and one conversation over it.

Covers the command line of ssh, the conversation's beginning, requests with a time limit, and its end. Does not cover what is asked (`running`,
`jobs`) or what runs there (`remote`). One process of ssh per host and command of the launcher: nothing multiplexed, so no control sockets that
could go stale, and hanging up is closing one pipe.

The user's configuration, agent, known hosts and jump hosts count, as ssh itself is called. It never asks anything (BatchMode), never waits
without end (ConnectTimeout, ServerAlive...), and is no member of the terminal's process group: Ctrl-C is the launcher's to handle.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from zray.launcher import bootstrap
from zray.launcher.facts import Chatter

if TYPE_CHECKING:
    from collections.abc import Callable

    from zray.launcher.config import Host, Ssh

_CHUNK: Final = 65536
_HANG_UP_S: Final = 1.0
_MAX_STDERR: Final = 8000
_TRIES: Final = 3
_PAUSE_S: Final = 0.5
_CROWDED: Final = ("kex_exchange_identification", "Connection reset by peer")
"""What ssh says when a server (or a jump host) has too many connections in the making: worth another try."""


class HostError(Exception):
    """A host failed; the text is for people. `column` says where in the table it belongs."""

    def __init__(self, column: str, text: str) -> None:
        super().__init__(text)
        self.column = column


class RequestError(Exception):
    """The program on the host answered that it could not do what was asked. `kind`: name of its exception."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def options(ssh: Ssh, host: Host) -> list[str]:
    """Return the options of ssh for a host. What comes first counts: the file's options are stronger than the launcher's."""
    chosen = ["BatchMode=yes", *host.ssh_options, *ssh.options]
    chosen += [
        f"ConnectTimeout={max(1, round(ssh.connect_timeout))}",
        "ConnectionAttempts=1",
        "ServerAliveInterval=5",
        "ServerAliveCountMax=3",
        # A connection that the user shares (ControlPath) is used; but this process must not become the one that others
        # hang on, as it would stay, holding our pipes.
        "ControlMaster=no",
        "ClearAllForwardings=yes",
        "ForwardX11=no",
        "PermitLocalCommand=no",
        "RemoteCommand=none",
    ]
    found = ["-F", ssh.config] if ssh.config else []
    for option in chosen:
        found += ["-o", option]
    return found


def command(ssh: Ssh, host: Host, remote: str, *, terminal: bool = False) -> list[str]:
    """Return the command line that runs `remote` on a host."""
    return [ssh.program, *options(ssh, host), "-t" if terminal else "-T", "--", host.destination, remote]


def advice(stderr: str) -> str:
    """Return what would mend a failure of ssh, as far as its words tell."""
    for sign, words in _ADVICE:
        if sign in stderr:
            return words
    return ""


_ADVICE: Final = (
    (
        "Host key verification failed",
        "log in once by hand to accept its key, or set ssh.options: [StrictHostKeyChecking=accept-new]",
    ),
    (
        "Permission denied",
        "its sshd does not take your key: try `ssh` by hand; `ssh-add` loads a key with a passphrase",
    ),
    ("Could not resolve hostname", "no such name: set 'destination', or add it to your ssh configuration"),
    ("timed out", "it does not answer: is it running, and is the address right?"),
    ("No route to host", "it is not there: is it running, and is the address right?"),
    ("Connection refused", "no sshd listens there: is the port right?"),
)


class Conversation:
    """A running program of the launcher's on one host. Requests are answered one after another."""

    def __init__(self, host: Host, process: asyncio.subprocess.Process, token: str) -> None:
        self.host = host
        self._process = process
        self._chatter = Chatter(token)
        self._messages: list[dict[str, Any]] = []
        self._stderr = bytearray()
        self._reading = asyncio.ensure_future(self._read_stderr())
        self.python = ""
        self.executable = ""
        self.is_open = True

    @classmethod
    async def open(cls, ssh: Ssh, host: Host, limit: float) -> Conversation:
        """Connect and start the program there.

        Args:
            ssh: how.
            host: to which.
            limit: seconds it may take.

        Raises:
            HostError: it did not work, and nothing of it is left here.
        """
        deadline = time.monotonic() + limit
        for attempt in range(1, _TRIES + 1):
            try:
                return await cls._open(ssh, host, deadline - time.monotonic(), limit)
            except HostError as error:
                left = deadline - time.monotonic()
                if attempt == _TRIES or left < 2 * _PAUSE_S or not any(sign in str(error) for sign in _CROWDED):
                    raise
                await asyncio.sleep(_PAUSE_S * attempt * (0.5 + secrets.randbelow(1000) / 1000))
        raise AssertionError("unreachable")

    @classmethod
    async def _open(cls, ssh: Ssh, host: Host, left: float, limit: float) -> Conversation:
        token = "zray" + secrets.token_hex(8)
        remote, text = bootstrap.introduction(token, host.python)
        try:
            process = await asyncio.create_subprocess_exec(
                *command(ssh, host, remote),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise HostError("ssh", f"{ssh.program} cannot be run: {error.strerror}") from None
        made = cls(host, process, token)
        try:
            await asyncio.wait_for(made._introduce(text), left)
        except asyncio.TimeoutError:
            await made.close(kill=True)
            raise HostError("ssh", made._with_words(f"no answer within {limit:.0f} s")) from None
        except BaseException:
            await made.close(kill=True)
            raise
        return made

    async def _introduce(self, text: bytes) -> None:
        await self._write(text)
        message = await self._next("ssh")
        if bootstrap.NO_PYTHON in message:
            found = message[bootstrap.NO_PYTHON].strip().rstrip(";")
            wanted = f" called {self.host.python}" if self.host.python else ""
            raise HostError(
                "python",
                f"no Python{wanted} of version 3.10 or later ({found or 'none at all'}): install one, or set 'python'",
            )
        self.python, self.executable = message["python"], message["executable"]

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        while data := await self._process.stderr.read(_CHUNK):
            self._stderr += data
            del self._stderr[:-_MAX_STDERR]

    async def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            pass  # why, is told when the answer is read

    async def _next(self, column: str) -> dict[str, Any]:
        """The next message. HostError: the connection has ended."""
        assert self._process.stdout is not None
        while not self._messages:
            data = await self._process.stdout.read(_CHUNK)
            if not data:
                self.is_open = False
                raise HostError(column, await self._last_words())
            self._messages += self._chatter.feed(data)
        return self._messages.pop(0)

    async def _last_words(self) -> str:
        """What is to be said about a connection that has ended."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._reading), _HANG_UP_S)
            await asyncio.wait_for(self._process.wait(), _HANG_UP_S)
        status = self._process.returncode
        return self._with_words("" if status == 255 else f"the connection ended (status {status})")

    def _with_words(self, text: str) -> str:
        said = bytes(self._stderr).decode("utf-8", "replace").strip()
        rest = self._chatter.rest()
        parts = [text, said, f"it printed: {rest}" if rest and not said else "", advice(said)]
        return "\n".join(filter(None, parts)) or "the connection ended without a word"

    async def request(
        self,
        message: dict[str, Any],
        limit: float | None,
        *,
        column: str = "ssh",
        payload: bytes = b"",
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> Any:
        """Ask for something and wait for the answer.

        Args:
            message: "do" is what (`zray.launcher.remote.main`), the rest are its fields.
            limit: seconds; None: as long as it takes (connections that die are noticed by ssh).
            column: where in the table a failure belongs.
            payload: bytes that go with it.
            on_event: called with what comes before the answer.

        Returns:
            The answer.

        Raises:
            RequestError: the host answered that it cannot.
            HostError: no answer came; the conversation is closed then.
        """

        async def ask() -> dict[str, Any]:
            head = json.dumps({**message, "payload": len(payload)}).encode() + b"\n"
            await self._write(head + payload)
            while True:
                found = await self._next(column)
                if "ok" in found or "error" in found:
                    return found
                if on_event is not None:
                    on_event(found)

        try:
            answer = await asyncio.wait_for(ask(), limit)
        except asyncio.TimeoutError:
            await self.close(kill=True)
            raise HostError(column, self._with_words(f"no answer ({message['do']}) within {limit:.0f} s")) from None
        except BaseException:
            await self.close(kill=True)
            raise
        if "error" in answer:
            raise RequestError(answer.get("kind", ""), answer["error"])
        return answer["ok"]

    async def close(self, *, kill: bool = False) -> None:
        """Hang up: the program there ends when its input does. kill: do not wait for it."""
        self.is_open = False
        process = self._process
        if process.stdin is not None:
            process.stdin.close()
        try:
            if kill:
                raise asyncio.TimeoutError
            await asyncio.wait_for(process.wait(), _HANG_UP_S)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading
        # asyncio closes pipes when the process has ended and their ends were read; what nobody reads any more is closed here.
        process._transport.close()  # type: ignore[attr-defined]


def place_fields(host: Host, python: str = "") -> dict[str, Any]:
    """Return the fields of a request that say where the cluster lives on a host; python: interpreter of the node."""
    return {"directory": host.directory, "python": python, "env": host.env}


def convert(answer: Any, kind: type[Any]) -> Any:
    """Check an answer. HostError: it is not what was expected (another version of the launcher's program there cannot be: it was just sent)."""
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise HostError("ssh", f"an answer that makes no sense: {error}") from None
