"""A TCP relay in a process of its own: a tunnel, or a bad network, between who connects to it and one address.

Covers passing bytes, and (told line by line on its standard input) holding them back, slowing them down, cutting connections and refusing new ones.
Does not cover what the bytes are. `Relay` starts and steers it; run as a program, the module is the relay:

    hold in|out|both   pass nothing (in: to the target; out: from it); connections stay, new ones are taken and hear nothing
    pass               pass everything again
    rate N             pass about N bytes a second each way, in pieces and pauses drawn from the seed; 0: as fast as it comes
    damage P           change a byte of a piece with probability P
    cut                end all connections
    refuse             end all connections and the listening socket
    accept             listen again, at the same port
"""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path


class Relay:
    """The relay, as a test steers it."""

    def __init__(self, target: str, seed: int = 0) -> None:
        """target: host:port."""
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), target, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.port = int(self._line())
        self.address = f"127.0.0.1:{self.port}"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self, command: str) -> int:
        """Have it do something; return how many connections pass through it. When this returns, it is done."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        return int(self._line())

    @property
    def connections(self) -> int:
        """How many connections pass through it."""
        return self.tell("count")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


class _Network:
    """What becomes of bytes, in the relay's process."""

    def __init__(self, host: str, port: int, seed: int) -> None:
        self.target = host, port
        self.draw = random.Random(seed)
        self.open = {"in": asyncio.Event(), "out": asyncio.Event()}
        self.rate = 0.0
        self.damage = 0.0
        self.port = 0
        self.server: asyncio.Server | None = None
        self.ends: set[asyncio.StreamWriter] = set()

    async def listen(self) -> None:
        if self.server is None:
            # Small buffers, so that what is held back is felt at both ends.
            self.server = await asyncio.start_server(self.connect, "127.0.0.1", self.port, limit=1 << 16)
            self.port = self.server.sockets[0].getsockname()[1]

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ends.add(writer)
        far: asyncio.StreamWriter | None = None
        try:
            await self.open["in"].wait()
            far_reader, far = await asyncio.open_connection(*self.target, limit=1 << 16)
            self.ends.add(far)
            for end in (writer, far):
                end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pumps = [
                asyncio.ensure_future(self.pump(reader, far, "in")),
                asyncio.ensure_future(self.pump(far_reader, writer, "out")),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass
        finally:
            for end in (writer, far):
                if end is not None:
                    self.ends.discard(end)
                    end.transport.abort()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        while data := await reader.read(self.draw.randrange(500, 8000) if self.rate else 1 << 16):
            if self.rate:
                await asyncio.sleep(len(data) / self.rate * self.draw.uniform(0.5, 1.5))
            if self.damage and self.draw.random() < self.damage:
                at = self.draw.randrange(len(data))
                data = data[:at] + bytes((data[at] ^ 255,)) + data[at + 1 :]
            await self.open[way].wait()
            writer.write(data)
            await writer.drain()

    def cut(self) -> None:
        for end in list(self.ends):
            end.transport.abort()

    async def obey(self, command: str) -> None:
        word, _, argument = command.partition(" ")
        if word == "hold":
            for way in ("in", "out") if argument == "both" else (argument,):
                self.open[way].clear()
        elif word == "pass":
            for event in self.open.values():
                event.set()
        elif word == "rate":
            self.rate = float(argument)
        elif word == "damage":
            self.damage = float(argument)
        elif word == "cut":
            self.cut()
        elif word == "refuse" and self.server is not None:
            server, self.server = self.server, None
            server.close()
            self.cut()
        elif word == "accept":
            await self.listen()


async def _serve(target: str, seed: int) -> None:
    host, _, port = target.rpartition(":")
    network = _Network(host, int(port), seed)
    await network.obey("pass")
    await network.listen()
    print(network.port, flush=True)
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[str] = asyncio.Queue()

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(lines.put_nowait, line.strip())
        loop.call_soon_threadsafe(lines.put_nowait, "")

    threading.Thread(target=read, daemon=True).start()
    while command := await lines.get():
        await network.obey(command)
        print(len(network.ends) // 2, flush=True)
    network.cut()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
