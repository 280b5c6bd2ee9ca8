"""Obeys plans: connects to all hosts at once, performs steps, takes back what an interrupt left half done.

Covers `up`, `down`, `check` and `status`. Does not cover what is to be done (`plan`), how it is said (`ssh`) or shown (`rows`, `display`).
A host that fails never stops another; only the head is waited for. Each host has a budget of seconds, which only installing does not use.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from zray.launcher import plan
from zray.launcher.facts import HostFacts, join_address
from zray.launcher.remote.install import MARK
from zray.launcher.rows import Mark
from zray.launcher.ssh import Conversation, HostError, RequestError, convert, place_fields

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator

    from zray.launcher.config import ClusterFile, Host
    from zray.launcher.display import Board
    from zray.launcher.rows import Row

T = TypeVar("T")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REACH_S: Final = 5.0
_MARGIN_S: Final = 2.0
"""The host gives up so much earlier than the launcher, to say why."""
_SUCCESSION_S: Final = 10.0
"""With replicas, nodes without a head have another one after some milliseconds, or after a sixth of `node_timeout` when it hangs."""
_ASK_AGAIN_S: Final = 0.5
_UNKNOWN: Final = "whether a node runs there now is not known: `up` again, or `down`, settles it"


class Interrupted(Exception):
    """The user wants it to end."""


class Budget:
    """Seconds that a host may cost. What is done under `spend` counts."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._left = limit

    @contextlib.contextmanager
    def spend(self) -> Iterator[float]:
        """Yield what is left; what the block takes is gone then. HostError when nothing is left."""
        if self._left <= 0:
            raise HostError("joined", f"took more than {self.limit:g} s ('timeout' in the file)")
        begun = time.monotonic()
        try:
            yield self._left
        finally:
            self._left -= time.monotonic() - begun


class Payload:
    """What is to be installed: wheels read from this machine, once."""

    def __init__(self, cluster: ClusterFile) -> None:
        """OSError: a wheel cannot be read."""
        install = cluster.install
        self.files: list[tuple[str, bytes]] = []
        for path in install.wheels:
            with open(path, "rb") as file:
                self.files.append((os.path.basename(path), file.read()))
        self.digest = (
            plan.install_digest(self.files, install.requirements, install.pip_options) if install.wanted else ""
        )


class HostRun:
    """One host within a run: its row, its conversation once there is one, what it has left of its time."""

    def __init__(self, cluster: ClusterFile, host: Host, row: Row) -> None:
        self.cluster = cluster
        self.host = host
        self.row = row
        self.budget = Budget(cluster.timeout)
        self.column = "ssh"
        """Where a failure belongs now."""
        self.node = ""
        """Id of the node that runs there, as far as known."""
        self._conversation: Conversation | None = None

    @property
    def connected(self) -> bool:
        """Whether there is a conversation, as far as known."""
        return self._conversation is not None and self._conversation.is_open

    @property
    def conversation(self) -> Conversation:
        """HostError: there is none."""
        if self._conversation is None:
            raise HostError("ssh", "there is no connection")
        return self._conversation

    async def connect(self, crowd: asyncio.Semaphore) -> None:
        """Open the conversation; `crowd` limits how many do at the same time."""
        self.row.set("ssh", Mark.WORKING)
        async with crowd:
            begun = time.monotonic()
            with self.budget.spend() as left:
                self._conversation = await Conversation.open(self.cluster.ssh, self.host, left)
        self.row.set("ssh", Mark.GOOD, f"{time.monotonic() - begun:.1f} s")
        if "python" in self.row.cells:
            self.row.set("python", Mark.GOOD, self._conversation.python)

    @property
    def node_python(self) -> str:
        """Interpreter that runs the node there."""
        install = self.cluster.install
        return f"{install.directory}/bin/python" if install.wanted else self.conversation.executable

    async def ask(self, what: str, *, payload: bytes = b"", **fields: Any) -> Any:
        """Make a request about the cluster's place there, at the cost of the host's budget. Raises as `Conversation.request`."""
        with self.budget.spend() as left:
            message = {
                "do": what,
                **place_fields(self.host, self.node_python),
                "limit": max(1.0, left - _MARGIN_S),
                **fields,
            }
            return await self.conversation.request(message, left, column=self.column, payload=payload)

    async def facts(self) -> HostFacts:
        """Look at the host."""
        install = self.cluster.install
        answer = await self.ask(
            "facts",
            address=self.host.address,
            port=self.host.port,
            installed=f"{install.directory}/{MARK}" if install.wanted else "",
        )
        found: HostFacts = convert(answer, HostFacts)
        return found

    async def install(self, payload: Payload) -> None:
        """Install what the file names; takes its own time."""
        install = self.cluster.install
        message = {
            "do": "install",
            "directory": install.directory,
            "digest": payload.digest,
            "requirements": install.requirements,
            "pip_options": install.pip_options,
            "files": [(name, len(content)) for name, content in payload.files],
            "limit": install.timeout,
            "silence": self.cluster.timeout,
        }
        content = b"".join(content for _, content in payload.files)
        await self.conversation.request(message, install.timeout + 2 * _MARGIN_S, column=self.column, payload=content)

    def failed(self, error: HostError | RequestError | Interrupted) -> None:
        """Note why it ended."""
        column = error.column if isinstance(error, HostError) and error.column in self.row.cells else self.column
        self.row.fail(column, str(error))

    async def close(self) -> None:
        """Hang up."""
        if self._conversation is not None:
            await self._conversation.close()
            self._conversation = None


class Run:
    """One command of the launcher on some hosts."""

    def __init__(self, cluster: ClusterFile, hosts: Iterable[Host], board: Board) -> None:
        self.cluster = cluster
        self.board = board
        self.hosts = [HostRun(cluster, host, board.rows[host.name]) for host in hosts]
        self._crowd = asyncio.Semaphore(cluster.ssh.parallel)
        self._interrupt = asyncio.Event()
        self.signal = 0
        """That interrupted it."""

    async def run(self, each: Callable[[HostRun], Coroutine[Any, Any, None]]) -> None:
        """Connect to all hosts and do `each` on every one; failures are noted in its row."""

        async def one(host: HostRun) -> None:
            try:
                await self.unless_interrupted(host.connect(self._crowd))
                await each(host)
            except (HostError, RequestError, Interrupted) as error:
                host.failed(error)
            finally:
                self.host_ended(host)
                self.board.end(host.row)

        await asyncio.gather(*(one(host) for host in self.hosts))

    def host_ended(self, host: HostRun) -> None:
        """Called when nothing more is done for a host."""

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the block the first signal asks for an orderly end; a second one ends the program as usual."""
        loop = asyncio.get_running_loop()

        def interrupt(number: int) -> None:
            if self._interrupt.is_set():
                for other in _SIGNALS:
                    loop.remove_signal_handler(other)
                self.board.say("giving up at once: what was begun is left as it is; `zray-cluster down` ends it")
                os.kill(os.getpid(), number)
                return
            self.signal = number
            self._interrupt.set()

        for number in _SIGNALS:
            loop.add_signal_handler(number, interrupt, number)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    async def unless_interrupted(self, work: Awaitable[T]) -> T:
        """Wait for something that can be broken off anywhere. Raises Interrupted."""
        task = asyncio.ensure_future(work)
        waiter = asyncio.ensure_future(self._interrupt.wait())
        try:
            await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Interrupted("interrupted")
        finally:
            for part in (task, waiter):
                part.cancel()
            with contextlib.suppress(asyncio.CancelledError, HostError, RequestError):
                await task

    def check_interrupt(self) -> None:
        """Raise Interrupted if the user wants the end."""
        if self._interrupt.is_set():
            raise Interrupted("interrupted")

    async def close(self) -> None:
        """Hang up on all hosts."""
        await asyncio.gather(*(host.close() for host in self.hosts))

    @property
    def ok(self) -> bool:
        """Whether all hosts did what they should."""
        return not any(host.row.failed for host in self.hosts) and not self.signal


# -- up --------------------------------------------------------------------------------------------------------------------


class Up(Run):
    """Brings hosts up. Hosts that run already are left alone."""

    def __init__(self, cluster: ClusterFile, hosts: Iterable[Host], board: Board, payload: Payload) -> None:
        super().__init__(cluster, hosts, board)
        self._payload = payload
        self._head: asyncio.Future[plan.HeadView | None] = asyncio.get_running_loop().create_future()
        """None: it did not start."""
        self._head_host = next(host for host in self.hosts if host.host.name == cluster.head)
        self._witness = self._head_host
        """Who is asked what the head sees."""
        loop = asyncio.get_running_loop()
        self._first: dict[HostRun, asyncio.Future[HostFacts | None]] = {
            host: loop.create_future() for host in self.hosts
        }
        """What each host was like at first; None: that cannot be known."""
        self._head_host.row.note = "head"
        self._key: dict[str, str] = {}
        self._begun: list[HostRun] = []
        """Where this run has asked for a start."""
        self.address = ""
        """Of the head that runs."""

    async def bring_up(self) -> None:
        """Do it; rows tell the outcome."""
        with self.interruptible():
            try:
                await self.run(self._converge)
                if self.signal:
                    await self._take_back()
                elif self._head.done() and self._head.result() is not None:
                    await self._confirm()
            finally:
                await self.close()

    def host_ended(self, host: HostRun) -> None:
        """Whoever waits for the head, or for what this host is like, waits no longer."""
        if host is self._head_host and not self._head.done():
            self._head.set_result(None)
        if not self._first[host].done():
            self._first[host].set_result(None)

    async def _converge(self, host: HostRun) -> None:
        is_head = host is self._head_host
        done: set[type] = set()
        head: plan.HeadView | None = None
        host.column = "install"
        facts = await self.unless_interrupted(host.facts())
        self._first[host].set_result(facts)
        if is_head and self.cluster.outlives_head:
            head = await self.unless_interrupted(self._go_on(host, facts))
        while True:
            step = plan.next_step(self.cluster, host.host, facts, head, self._payload.digest, frozenset(done))
            self._show(host.row, facts, step)
            self.check_interrupt()
            done.add(type(step))
            if isinstance(step, plan.Refused):
                raise HostError(step.column, step.reason)
            if isinstance(step, plan.Finished):
                assert facts.node is not None
                host.node = facts.node.node
                host.row.set("joined", Mark.GOOD, "joined" if plan.Start in done else "was joined")
                leads = [] if head is None or head.node != host.node else ["head"]
                host.row.note = "; ".join(filter(None, [*leads, host.row.note, step.note]))
                if is_head and head is None:
                    await self._head_runs(host, facts, step.address)
                return
            host.column = "joined"
            if isinstance(step, plan.AwaitHead):
                host.row.set("joined", Mark.WORKING, "head")
                head = await self.unless_interrupted(asyncio.shield(self._head))
                if head is None:
                    raise HostError("joined", f"not started, as the head ({self.cluster.head}) does not run")
                done.discard(plan.AwaitHead)
            elif isinstance(step, plan.Install):
                host.column = "install"
                host.row.set("install", Mark.WORKING)
                await self.unless_interrupted(host.install(self._payload))
            elif isinstance(step, plan.End):
                host.row.set("joined", Mark.WORKING, "ending")
                await host.ask("end")
            else:
                record = await self._start(host, step, is_head and head is None)
                if head is not None:
                    head = msgspec.structs.replace(head, alive=head.alive | {record["node"]})
            host.column = "install"
            facts = await self.unless_interrupted(host.facts())

    async def _go_on(self, host: HostRun, facts: HostFacts) -> plan.HeadView | None:
        """See whether the cluster goes on without the file's head.

        With replicas another node may lead it: that is the head then, and is returned. With storage nodes may wait for the head's next
        life: it gets the key that they have.
        """
        if facts.node is not None:
            looked: list[tuple[HostRun, HostFacts | None]] = [(host, facts)]
        else:
            host.column = "joined"
            host.row.set("joined", Mark.WORKING, "looking at the others")
            others = [other for other in self.hosts if other is not host]
            looked = [(other, await asyncio.shield(self._first[other])) for other in others]
        for other, found in looked:
            if found is None or found.node is None:
                continue
            try:
                if self.cluster.replicas > 1:
                    head = await self._led(other, found)
                    if head is not None:
                        self._key = await self._key_of(other)
                        self._tell(other, head)
                        return head
                elif other is not host and found.node.head == join_address(facts.address, host.host.port):
                    self._key = await self._key_of(other)
                    return None
            except (HostError, RequestError):
                continue  # it is that host's failure, and told there
        return None

    async def _led(self, host: HostRun, facts: HostFacts) -> plan.HeadView | None:
        """Who leads the cluster of a host's node now; a successor is waited for."""
        until = time.monotonic() + _SUCCESSION_S
        while True:
            head = plan.surviving(facts, await host.ask("members"))
            if head is not None or time.monotonic() > until:
                return head
            await asyncio.sleep(_ASK_AGAIN_S)

    async def _start(self, host: HostRun, step: plan.Start, is_head: bool) -> dict[str, Any]:
        """Start a node. Not to be interrupted: the answer tells whether there is something to be taken back."""
        host.row.set("joined", Mark.WORKING, "starting")
        if is_head and not self._key:
            from zray.peer_transport import ClusterKey

            self._key = ClusterKey.new()._asdict()
        self._begun.append(host)
        try:
            record: dict[str, Any] = await host.ask(
                "start", key=self._key, arguments=step.arguments, settings=step.settings
            )
        except HostError as error:
            raise HostError(error.column, f"{error}\n{_UNKNOWN}") from None
        except RequestError:
            self._begun.remove(host)  # the host has cleaned up
            raise
        return record

    async def _head_runs(self, host: HostRun, facts: HostFacts, address: str) -> None:
        """Tell the others."""
        assert facts.node is not None
        if not self._key:
            # A head that ran before: its key never left its host, and is fetched for those that join now.
            self._key = await self._key_of(host)
        alive = await self._alive(host)
        node = facts.node
        self._tell(host, plan.HeadView(address, node.fingerprint, facts.zray, facts.python, alive, node.node))

    def _tell(self, witness: HostRun, head: plan.HeadView) -> None:
        """Let the others go on."""
        self._witness = witness
        self.address = head.address
        if self._head_host.node != head.node:
            self._head_host.row.note = ""
        self._head.set_result(head)

    async def _key_of(self, host: HostRun) -> dict[str, str]:
        found: dict[str, str] = convert(msgspec.json.decode(await host.ask("key")), dict[str, str])
        return found

    async def _alive(self, head: HostRun) -> frozenset[str]:
        """Ids of the nodes that the head counts among the living."""
        return plan.living((await head.ask("members"))["nodes"])

    async def _confirm(self) -> None:
        """What hosts said of themselves must be what the head sees."""
        head = self._witness
        finished = [host for host in self.hosts if not host.row.failed and host is not head]
        if head.row.failed or not finished:
            return
        head.budget = Budget(self.cluster.timeout)
        try:
            alive = await self._alive(head)
        except (HostError, RequestError) as error:
            head.failed(error)
            return
        for host in finished:
            if host.node not in alive:
                host.row.fail("joined", "its node runs, but the head does not see it")

    def _show(self, row: Row, facts: HostFacts, step: plan.Step) -> None:
        """Fill the cells that facts decide."""
        row.set("python", Mark.GOOD, facts.python)
        if facts.zray:
            row.set("install", Mark.GOOD, facts.zray)
        if facts.node is not None:
            row.set("port", Mark.GOOD, facts.node.address.rpartition(":")[2])
        elif not facts.port_problem:
            row.set("port", Mark.GOOD)

    async def _take_back(self) -> None:
        """End what this run has begun, workers first."""
        self.board.say("interrupted: ending what was begun (once more: leave it as it is)")
        others = [host for host in self._begun if host.host.name != self.cluster.head]
        heads = [host for host in self._begun if host.host.name == self.cluster.head]
        for group in (others, heads):
            await asyncio.gather(*(self._take_back_one(host) for host in group))

    async def _take_back_one(self, host: HostRun) -> None:
        host.budget = Budget(self.cluster.timeout)
        host.column = "joined"
        try:
            if not host.connected:
                await host.connect(self._crowd)
            await host.ask("end")
        except (HostError, RequestError) as error:
            host.row.fail("joined", f"interrupted, and what was begun could not be ended: {error}\n{_UNKNOWN}")
        else:
            host.row.fail("joined", "interrupted; its node was ended again")
        self.board.end(host.row)


# -- down --------------------------------------------------------------------------------------------------------------------


class Down(Run):
    """Ends nodes and removes what the launcher has put on hosts."""

    def __init__(self, cluster: ClusterFile, hosts: Iterable[Host], board: Board, *, purge: bool) -> None:
        """purge: what was installed goes as well."""
        super().__init__(cluster, hosts, board)
        self._purge = purge
        self._workers = {host.host.name for host in self.hosts} - {cluster.head}
        self._workers_gone = asyncio.Event()
        """The head is ended last: nodes that leave tell it, and are not taken for dead."""
        if not self._workers:
            self._workers_gone.set()

    async def bring_down(self) -> None:
        """Do it; rows tell the outcome."""
        with self.interruptible():
            try:
                await self.run(self._end)
            finally:
                await self.close()

    def host_ended(self, host: HostRun) -> None:
        """Once no worker is left the head may go."""
        self._workers.discard(host.host.name)
        if not self._workers:
            self._workers_gone.set()

    async def _end(self, host: HostRun) -> None:
        host.column = "ended"
        host.row.set("ended", Mark.WORKING)
        if host.host.name == self.cluster.head:
            await self.unless_interrupted(self._workers_gone.wait())
        found = await host.ask("end")
        if found["left"]:
            raise HostError("ended", f"these processes cannot be ended: {', '.join(map(str, found['left']))}")
        count = found["ended"]
        words = [f"{count} process{'es' if count != 1 else ''}"] if count else []
        words += [f"{found['killed']} killed"] if found["killed"] else []
        words += ["files"] if found["removed"] and not count else []
        if self._purge and self.cluster.install.wanted:
            message = {"do": "uninstall", "directory": self.cluster.install.directory}
            with host.budget.spend() as left:
                words += ["installation"] if await host.conversation.request(message, left, column="ended") else []
        host.row.set("ended", Mark.GOOD, ", ".join(words) or "nothing was there")


# -- check -------------------------------------------------------------------------------------------------------------------


class Check(Run):
    """Looks at hosts, starts nothing, changes nothing."""

    def __init__(self, cluster: ClusterFile, hosts: Iterable[Host], board: Board, payload: Payload) -> None:
        super().__init__(cluster, hosts, board)
        self._payload = payload
        self._looked: dict[str, plan.Looked] = {}

    async def check(self) -> None:
        """Do it; rows tell what was found."""
        with self.interruptible():
            try:
                await self.run(self._look)
                self._judge(plan.check_together(self.cluster, self._looked))
                self.check_interrupt()
                await self._try_ports()
            except Interrupted:
                pass
            finally:
                await self.close()

    def _judge(self, findings: Iterable[plan.Finding]) -> None:
        rows = {host.host.name: host.row for host in self.hosts}
        for finding in findings:
            row = rows[finding.host]
            if not finding.fatal:
                row.set(finding.column, Mark.NOTED, finding.text)
            elif row.failed:
                row.fail(finding.column, f"{row.error}\n{finding.text}")
            else:
                row.fail(finding.column, finding.text)

    async def _look(self, host: HostRun) -> None:
        host.column = "install"
        before = time.time()
        facts = await self.unless_interrupted(host.facts())
        looked = plan.Looked(facts, before, time.time())
        self._looked[host.host.name] = looked
        row = host.row
        row.set("python", Mark.GOOD, facts.python)
        row.set("install", Mark.GOOD, facts.zray)
        row.set("clock", Mark.GOOD, f"{plan.clock_offset(looked):+.1f} s")
        row.set("port", Mark.GOOD, "in use" if facts.node is not None else str(host.host.port))
        row.set("names", Mark.GOOD, facts.address)
        if host.host.name == self.cluster.head and self.cluster.tables:
            row.note = f"head, {self.cluster.tables}"
        self._judge(plan.check_host(self.cluster, host.host, looked, self._payload.digest))

    async def _try_ports(self) -> None:
        """Each host listens where its node is to, and each tries all the others: nodes exchange objects in any pairing."""
        targets = plan.targets(self.cluster, self._looked)
        able = [host for host in self.hosts if host.host.name in self._looked and host.connected]
        listening = [
            host for host in able if host.host.name in targets and self._looked[host.host.name].facts.node is None
        ]
        reached: dict[str, dict[str, str]] = {}

        async def listen(host: HostRun) -> None:
            address = self._looked[host.host.name].facts.address
            message = {"do": "listen", "address": address, "port": host.host.port}
            problem = await self._ask(host, message)
            if problem:
                targets.pop(host.host.name, None)
                self._judge([plan.Finding(host.host.name, "port", str(problem))])

        async def reach(host: HostRun) -> None:
            others = [address for name, address in targets.items() if name != host.host.name]
            pairs = [(host_.strip("[]"), int(port)) for host_, _, port in (one.rpartition(":") for one in others)]
            found = await self._ask(host, {"do": "reach", "addresses": pairs, "limit": _REACH_S})
            # The host there writes IPv6 addresses without brackets.
            reached[host.host.name] = (
                {address: found.get(f"{pair[0]}:{pair[1]}", "") for address, pair in zip(others, pairs)}
                if found
                else {}
            )

        await asyncio.gather(*map(listen, listening))
        await asyncio.gather(*map(reach, able))
        await asyncio.gather(*(self._ask(host, {"do": "close"}) for host in listening))
        self._judge(plan.check_reach(targets, reached))

    async def _ask(self, host: HostRun, message: dict[str, Any]) -> Any:
        """A request whose failure is the host's, and ends nothing else."""
        try:
            with host.budget.spend() as left:
                return await host.conversation.request(message, left, column="port")
        except (HostError, RequestError) as error:
            host.failed(error)
            return None


# -- status ------------------------------------------------------------------------------------------------------------------


class Status(Run):
    """Asks hosts what runs there, and the head what it sees."""

    def __init__(self, cluster: ClusterFile, hosts: Iterable[Host], board: Board) -> None:
        super().__init__(cluster, hosts, board)
        self._nodes: dict[str, HostRun] = {}
        self.strangers: list[dict[str, Any]] = []
        """Living nodes of the cluster on no host of the file, as the head tells them."""
        self.totals: dict[str, Any] = {}
        """"total" and "available" resources."""
        self.jobs: list[dict[str, Any]] = []
        """With "host"."""
        self.tables: dict[str, Any] = {}
        """Where the tables are kept, and how that goes: what the head tells of its cluster."""

    async def ask(self) -> None:
        """Do it; rows tell what was found."""
        with self.interruptible():
            try:
                await self.run(self._look)
                # With replicas any node knows who leads, which need not be the file's head.
                able = [host for host in self.hosts if host.connected and host.node]
                heads = [host for host in able if host.host.name == self.cluster.head]
                others = able if self.cluster.replicas > 1 else []
                for host in [*heads, *others][:1]:
                    await self._ask_head(host)
            finally:
                await self.close()

    async def _look(self, host: HostRun) -> None:
        host.column = "node"
        facts = await self.unless_interrupted(host.facts())
        if facts.node is None:
            raise HostError("node", "no node runs there")
        host.node = facts.node.node
        self._nodes[host.node] = host
        host.row.set("node", Mark.GOOD, host.node[:8])
        host.row.set("address", Mark.GOOD, facts.node.address)
        if host.host.name == self.cluster.head:
            host.row.note = "head"
        self.jobs += [{**job, "host": host.host.name} for job in await self.unless_interrupted(host.ask("jobs"))]

    async def _ask_head(self, head: HostRun) -> None:
        head.column = "state"
        try:
            found = await head.ask("members")
        except (HostError, RequestError) as error:
            head.failed(error)
            return
        self.totals = {"total": found["total"], "available": found["available"]}
        self.tables = found["cluster"]
        seen = set()
        for node in found["nodes"]:
            host = self._nodes.get(node["NodeID"])
            if host is None:
                if node["state"] != "DEAD":
                    self.strangers.append(node)
                continue
            seen.add(node["NodeID"])
            host.row.note = "head" if node["is_head"] else ""
            _fill_status(host.row, node)
        for node_id, host in self._nodes.items():
            if node_id not in seen:
                host.row.fail("state", "its node runs, but the head does not know it")


def _fill_status(row: Row, node: dict[str, Any]) -> None:
    state = node["state"]
    if state == "DEAD":
        row.fail("state", f"the head counts it among the dead: {node.get('reason', '')}")
    else:
        row.set("state", Mark.GOOD if state == "ALIVE" else Mark.WORKING, state)
    shown = {name: amount for name, amount in node.get("Resources", {}).items() if not name.startswith("node:")}
    words = [f"{name} {amount:g}" for name, amount in sorted(shown.items()) if "memory" not in name]
    row.set("has", Mark.GOOD, ", ".join(words))
