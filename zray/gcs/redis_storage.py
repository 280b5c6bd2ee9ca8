"""Rows in a Redis server that runs already: one atomic script for each round of the service, one head at a time.

Covers keys, the scripts, the lease that fences heads, a server that is away or has lost writes. Does not cover what is written (`service`).

Keys, all under a prefix in braces, so that a Redis Cluster keeps them together:

    {prefix}:owner      token of the head that has the storage, with a lease
    {prefix}:facts      hash: format, shards, round (how many writes there were), last (id of the newest)
    {prefix}:revisions  hash: shard -> revision          {prefix}:rows:<shard>  hash: table byte + key -> CRC-32, version, ended, value
    {prefix}:records    list: the lineage log, each record behind its CRC-32

Every write is one script, so it happens as a whole or not at all, and it begins with three questions. Is the owner this head, or nobody? Another one
means `StorageTaken`: a head that was stopped for longer than its lease, or cut off, and whose place was taken, can change nothing any more. Is `last` this
very write? Then its answer was lost on the way and it is done. Is `round` what this head knows? If not, the server came back without its newest
writes, and `StorageBehind` has the service write all rows again from memory: nothing that was acknowledged is lost as long as this head lives.

What survives a loss of the server's own machine is the server's business (`appendonly yes`, `appendfsync`). One that may throw keys away when it is full
is refused, because that would be a silent loss.
"""

from __future__ import annotations

import errno
import functools
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from zlib import crc32

from zray.gcs.storage import FORMAT, StorageBehind, StorageError, StorageTaken, newest
from zray.gcs.tables import Change, Row

if TYPE_CHECKING:
    import redis

_T = TypeVar("_T")
LEASE_S: Final = 6.0
"""Seconds for which a head has the storage after each sign of life, of which there are four in that time."""
TIMEOUT_S: Final = 1.0
"""Seconds that the server may take for an answer."""
TRIES: Final = 2
"""Times that a write is tried when the connection breaks."""
AWAY_S: Final = 0.5
"""Seconds for which a server that gave no answer is not asked again: writes are refused at once."""
_PAGE: Final = 1000
_ROW_HEADER: Final = 13
"""Bytes before a value: CRC-32 of key and rest, version, ended."""

_WRITE: Final = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return redis.error_reply('TAKEN ' .. owner) end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
if ARGV[3] == '' then return 0 end
local facts = redis.call('HMGET', KEYS[2], 'round', 'last')
if facts[2] == ARGV[3] then return tonumber(facts[1]) end
local whole = ARGV[5] == '1'
if not whole and (facts[1] or '') ~= ARGV[4] then return redis.error_reply('BEHIND ' .. (facts[1] or 'empty')) end
if whole then
    for i = 3, #KEYS do redis.call('DEL', KEYS[i]) end
    redis.call('HSET', KEYS[2], 'format', ARGV[6], 'shards', ARGV[7])
end
local round = redis.call('HINCRBY', KEYS[2], 'round', 1)
redis.call('HSET', KEYS[2], 'last', ARGV[3])
local i = 8
while i <= #ARGV do
    local kind = ARGV[i]
    if kind == 'p' then
        redis.call('HSET', KEYS[5 + tonumber(ARGV[i + 1])], ARGV[i + 2], ARGV[i + 3])
        i = i + 4
    elseif kind == 'd' then
        redis.call('HDEL', KEYS[5 + tonumber(ARGV[i + 1])], ARGV[i + 2])
        i = i + 3
    elseif kind == 'v' then
        redis.call('HSET', KEYS[3], ARGV[i + 1], ARGV[i + 2])
        i = i + 3
    elseif kind == 'l' then
        redis.call('RPUSH', KEYS[4], ARGV[i + 1])
        i = i + 2
    else
        redis.call('LTRIM', KEYS[4], ARGV[i + 1], -1)
        i = i + 2
    end
end
return round
"""
_LET_GO: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class RedisStorage:
    """A storage under a prefix of a Redis server."""

    __slots__ = (
        "_away_until",
        "_clock",
        "_db",
        "_facts",
        "_let_go",
        "_owner",
        "_owner_key",
        "_records",
        "_renewed",
        "_revisions",
        "_round",
        "_rows",
        "_shards",
        "_token",
        "_write_script",
        "lease_s",
        "place",
    )
    durable = True

    def __init__(
        self,
        url: str,
        shards: int,
        prefix: str = "zray",
        *,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect, and take the storage for this head; waits up to a lease for that of a head that has just died.

        Args:
            url: as the package `redis` takes it.
            shards: of the control store; a storage with another number is refused.
            prefix: of the cluster: two clusters need two.
            lease_s: seconds after which another head may take the storage of one that gives no sign of life.
            clock: monotonic seconds.

        Raises:
            StorageError: it cannot be used; one line says why and what to do.
        """
        try:
            import redis
        except ImportError:
            raise StorageError("storage in Redis needs the package redis: pip install 'zray[redis]'") from None
        self.place = f"{url} (prefix {prefix})"
        self.lease_s = lease_s
        self._clock = clock
        self._shards = shards
        self._db: redis.Redis = redis.Redis.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, health_check_interval=0
        )
        base = f"{{{prefix}}}:"
        self._owner_key, self._facts, self._revisions, self._records = (
            base + name for name in ("owner", "facts", "revisions", "records")
        )
        self._rows = [f"{base}rows:{shard}" for shard in range(shards)]
        self._token = secrets.token_hex(16)
        self._owner = f"{self._token} {_this_process()}"
        self._round = ""
        """Number of the newest write, as the server should know it; empty: none ever."""
        self._renewed = 0.0
        self._away_until = 0.0
        self._write_script = self._db.register_script(_WRITE)
        self._let_go = self._db.register_script(_LET_GO)
        try:
            self._try("cannot open", self._open)
        except BaseException:
            self.close()
            raise

    @classmethod
    def by_name(cls, name: str, shards: int) -> RedisStorage:
        """Open "redis://HOST:PORT/DB?prefix=NAME" and the like. Raises as the constructor."""
        parts = urlsplit(name)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        prefix = options.pop("prefix", "zray")
        if not prefix or any(sign in prefix for sign in "{}"):
            raise ValueError(f"{prefix!r} is no prefix of keys")
        url = urlunsplit(parts._replace(query=urlencode(options)))
        if parts.scheme == "redis+unix":
            url = "unix://" + url.partition(":")[2].removeprefix("//")
        return cls(url, shards, prefix)

    # -- opening -------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._check_server()
        self._take()
        found = {name.decode(): value.decode() for name, value in self._db.hgetall(self._facts).items()}  # type: ignore[union-attr]
        if not found:
            self._run("1", [])
            return
        if int(found.get("format", FORMAT)) > FORMAT:
            raise StorageError(
                f"{self.place} was written by a newer zray (format {found['format']}, this one reads {FORMAT}): install that, or choose "
                "another prefix"
            )
        if int(found.get("shards", 0)) != self._shards:
            raise StorageError(
                f"{self.place} was written with {found.get('shards', 'no')} shards, this head has {self._shards}: choose another prefix"
            )
        self._round = found["round"]

    def _check_server(self) -> None:
        memory: Any = self._db.info("memory")
        policy = str(memory.get("maxmemory_policy", ""))
        if memory.get("maxmemory") and policy.startswith("allkeys"):
            raise StorageError(
                f"the server of {self.place} throws keys away when it is full (maxmemory-policy {policy}), rows of the cluster, too: "
                "set it to noeviction"
            )

    def _take(self) -> None:
        """Become the owner. Whoever is now keeps its lease, unless its process has been on this machine and is gone."""
        until = self._clock() + self.lease_s + 1.0
        while True:
            if self._db.set(self._owner_key, self._owner, nx=True, px=int(self.lease_s * 1000)):
                break
            found: Any = self._db.get(self._owner_key)
            if found == self._owner.encode():
                break  # an earlier try has done it
            if found is not None and _is_gone(found.decode().partition(" ")[2]):
                self._db.register_script(_LET_GO)(keys=[self._owner_key], args=[found])
            elif self._clock() >= until:
                raise StorageTaken(f"{self.place} is in use by another head: end that first, or choose another prefix")
            else:
                time.sleep(0.05)
        self._renewed = self._clock()

    def _try(self, what: str, call: Callable[[], _T]) -> _T:
        """Ask the server; what goes wrong becomes a StorageError, within TRIES times TIMEOUT_S."""
        import redis

        for left in range(TRIES - 1, -1, -1):
            try:
                return call()
            except (redis.ConnectionError, redis.TimeoutError) as error:
                if not left:
                    self._away_until = self._clock() + AWAY_S
                    raise StorageError(
                        f"{what} {self.place}: the server does not answer ({error})", errno.EHOSTUNREACH
                    ) from None
            except redis.exceptions.OutOfMemoryError as error:
                raise StorageError(
                    f"{what} {self.place}: the server is full ({error}): raise its maxmemory", errno.ENOSPC
                ) from None
            except redis.RedisError as error:
                raise self._refused(what, str(error)) from None
        raise AssertionError("unreachable")

    def _refused(self, what: str, text: str) -> StorageError:
        word = text.partition(" ")[0]
        if word == "TAKEN":
            return StorageTaken(
                f"another head has taken {self.place}. Start this machine again as a node of that one: zray start --address HOST:PORT --key FILE"
            )
        if word == "BEHIND":
            return StorageBehind(f"the server of {self.place} has lost writes that it had acknowledged")
        return StorageError(f"{what} {self.place}: {text}")

    # -- reading -------------------------------------------------------------------------------------------------------

    def load(self, shard: int) -> tuple[int, list[tuple[int, bytes, Row]]]:
        """Return (revision, rows) of a shard; StorageError when a row is damaged."""
        return self._try("cannot read", lambda: self._load(shard))

    def _load(self, shard: int) -> tuple[int, list[tuple[int, bytes, Row]]]:
        found: Any = self._db.hget(self._revisions, str(shard))
        rows: list[tuple[int, bytes, Row]] = []
        for field, data in self._db.hscan_iter(self._rows[shard], count=_PAGE):
            if len(data) < _ROW_HEADER or crc32(data[4:], crc32(field)) != int.from_bytes(data[:4], "big"):
                raise StorageError(f"{self.place} is damaged (a row of shard {shard} is not what was written)")
            row = Row(data[_ROW_HEADER:], int.from_bytes(data[4:12], "big"), bool(data[12]))
            rows.append((field[0], field[1:], row))
        rows.sort(key=lambda item: item[2].version)
        return int(found or 0), rows

    def load_records(self) -> Iterator[bytes]:
        """Iterate over the lineage log; StorageError when a record is damaged."""
        start = 0
        while True:
            page = self._try("cannot read", functools.partial(self._page, start))
            for record in page:
                if crc32(record[4:]) != int.from_bytes(record[:4], "big"):
                    raise StorageError(f"{self.place} is damaged (a record of the lineage log is not what was written)")
                yield record[4:]
            if len(page) < _PAGE:
                return
            start += _PAGE

    def _page(self, start: int) -> list[bytes]:
        found: Any = self._db.lrange(self._records, start, start + _PAGE - 1)
        return list(found)

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, changes: Sequence[tuple[int, Change]], records: Sequence[bytes] = (), drop: int = 0) -> None:
        """Store a round; StorageError: nothing of it is stored."""
        if self._clock() < self._away_until:
            raise StorageError(
                f"cannot write to {self.place}: the server did not answer a moment ago", errno.EHOSTUNREACH
            )
        arguments = _arguments(changes)
        if drop:
            arguments += ["t", drop]
        for body in records:
            arguments += ["l", crc32(body).to_bytes(4, "big") + body]
        self._try("cannot write to", _once(self._run, "0", arguments))

    def rewrite(self, changes: Sequence[tuple[int, Change]]) -> None:
        """Store rows in place of all that are there."""
        self._try("cannot write to", _once(self._run, "1", _arguments(changes)))

    def _run(self, whole: str, arguments: list[Any], name: str = "") -> None:
        keys = [self._owner_key, self._facts, self._revisions, self._records, *self._rows]
        name = name or secrets.token_hex(8)
        answer: Any = self._write_script(
            keys=keys,
            args=[self._owner, int(self.lease_s * 1000), name, self._round, whole, FORMAT, self._shards, *arguments],
        )
        self._round = str(int(answer))
        self._renewed = self._clock()

    def lapsed(self) -> bool:
        """Whether the lease may be over."""
        return self._clock() - self._renewed >= self.lease_s

    def tick(self) -> None:
        """Renew the lease now and then; StorageTaken when it is another's, StorageError when the server does not answer."""
        now = self._clock()
        if now - self._renewed < self.lease_s / 4 or now < self._away_until:
            return
        self._try(
            "cannot renew the lease of",
            lambda: self._write_script(keys=[self._owner_key], args=[self._owner, int(self.lease_s * 1000), ""]),
        )
        self._renewed = self._clock()

    def close(self) -> None:
        """Let go of the storage, so that another head can have it at once, and close the connection."""
        import redis

        try:
            self._let_go(keys=[self._owner_key], args=[self._owner])
        except redis.RedisError:
            pass
        self._db.close()


def _once(run: Callable[[str, list[Any], str], None], whole: str, arguments: list[Any]) -> Callable[[], None]:
    """A write that may be tried again: under one name, so that it happens once."""
    name = secrets.token_hex(8)
    return lambda: run(whole, arguments, name)


def _arguments(changes: Sequence[tuple[int, Change]]) -> list[Any]:
    rows, revisions = newest(changes)
    found: list[Any] = []
    for (table, key), (shard, change) in rows.items():
        field = bytes((table,)) + key
        if change.value is None:
            found += ["d", shard, field]
        else:
            body = change.version.to_bytes(8, "big") + bytes((change.ended,)) + change.value
            found += ["p", shard, field, crc32(body, crc32(field)).to_bytes(4, "big") + body]
    for shard, revision in revisions.items():
        found += ["v", shard, revision]
    return found


def _this_process() -> str:
    """Names this process among all that this machine ever had: boot, namespace of process ids, process id, start time."""
    return f"{_boot()} {os.getpid()} {_start_time(os.getpid())}"


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return "?"


def _start_time(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


def _is_gone(process: str) -> bool:
    """Whether a process (`_this_process`) was one of this machine and has ended. Where that cannot be known it has not."""
    boot, _, rest = process.partition(" ")
    pid, _, started = rest.partition(" ")
    if boot == "?" or boot != _boot() or not pid.isdigit() or not started:
        return False
    return _start_time(int(pid)) != started
