"""Storage of the control store: what an acknowledged write costs in memory, in an SQLite file and in a Redis server.

    python -m perf.storage [--place DIRECTORY] [--seconds 3] [--write]

For each storage, in one process and without sockets: writes one after another, each a round of its own (what a lone caller sees), in blocks
with latencies; writes in rounds of 64 (what many callers see together); task rows in frames of 64, with a tick of the service every 50 ms, against the
same without storage; and loading 50,000 rows. Values have 100 bytes, keys 10,000 different ones. Redis is a server of this program's own on a
Unix socket, without persistence: the figures are those of zray and the way to the server. The file lies in `--place` (default: a directory for
temporary files), whose disk decides what "sync=full" costs. `--write` keeps everything as `perf/results/<date>-storage.json`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zray.gcs import messages as m
from zray.gcs.service import GcsService
from zray.gcs.storage import open_storage
from zray.gcs.tables import Table, namespaced_key
from zray.ids import task_id
from zray.task import TaskSpec

from . import timing

SHARDS = 4
KEYS = 10_000
VALUE = bytes(100)
ROUND = 64
FRAMES = 1500
LOADED = 50_000


@contextmanager
def redis_server(place: str) -> Iterator[str]:
    """Run a redis-server on a socket in `place`; give the socket's path, "" when it is not installed."""
    if shutil.which("redis-server") is None:
        yield ""
        return
    path = os.path.join(place, "redis")
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--dir", place], stdout=subprocess.DEVNULL
    )
    try:
        while not os.path.exists(path):
            time.sleep(0.01)
        yield path
    finally:
        server.terminate()
        server.wait()


def writes(gcs: GcsService, seconds: float) -> dict[str, Any]:
    """Measure single writes and rounds of many."""
    keys = itertools.cycle([namespaced_key(b"", b"key %d" % number) for number in range(KEYS)])
    answers: list[bytes] = []

    def ask() -> None:
        gcs.serve_request(m.encode(m.Put(Table.KV, next(keys), VALUE)), answers.append)

    def one() -> None:
        ask()
        gcs.commit()

    def many() -> None:
        for _ in range(ROUND):
            ask()
        gcs.commit()

    for _ in range(KEYS // ROUND):
        many()
    taken = timing.sample(one, seconds, 100_000)
    blocks = timing.measure(many, ROUND, seconds=seconds / 5)
    refused = [reply for reply in answers if not isinstance(m.decode_reply(reply), m.Written)]
    assert not refused, m.decode_reply(refused[0])
    ordered = sorted(value / 1000 for value in taken)
    return {
        "one_us_p50": round(timing.quantile(ordered, 0.5), 1),
        "one_us_p99": round(timing.quantile(ordered, 0.99), 1),
        "one_us_max": round(ordered[-1], 1),
        "one_per_s": round(len(ordered) / (sum(ordered) / 1e6)),
        "rounds_of_64_per_s": round(timing.summarize(block.rate for block in blocks).median),
    }


def tasks(gcs: GcsService) -> float:
    """Return the microseconds of wall time for a task row (submission and end), with ticks as the broker makes them."""
    root = os.urandom(16)
    made = [
        [TaskSpec(task_id(root, frame * ROUND + i), bytes(16), bytes(32)) for i in range(ROUND)]
        for frame in range(FRAMES)
    ]
    start = due = time.perf_counter()
    for specs in made:
        gcs.tasks_submitted(1, specs)
        gcs.tasks_finished(1, 1, [spec.id for spec in specs], bytes(ROUND), [100] * ROUND)
        gcs.commit()
        if time.perf_counter() >= due:
            due += 0.05
            gcs.tick(time.monotonic())
    gcs.tick(time.monotonic() + 1.0)
    return round((time.perf_counter() - start) / (FRAMES * ROUND) * 1e6, 3)


def loading(name: str) -> dict[str, float]:
    """Return the seconds that a service takes to begin with LOADED rows, and again to begin without any."""
    gcs = GcsService(None, "", shards=SHARDS, storage=open_storage(name, SHARDS))
    for number in range(LOADED):
        gcs.put_bytes(Table.KV, namespaced_key(b"", b"key %d" % number), VALUE)
    gcs.close()
    start = time.perf_counter()
    gcs = GcsService(None, "", shards=SHARDS, storage=open_storage(name, SHARDS))
    taken = time.perf_counter() - start
    assert gcs.statistics().rows["KV"] >= LOADED
    gcs.close()
    return {"load_50k_rows_s": round(taken, 3)}


def measured(name: str, seconds: float) -> dict[str, Any]:
    """Measure one storage."""
    gcs = GcsService(None, "", shards=SHARDS, storage=open_storage(name, SHARDS))
    found = {**writes(gcs, seconds), "task_row_us": tasks(gcs)}
    gcs.close()
    return {**found, **({} if name == "memory" else loading(name))}


def main() -> None:
    """Measure, print, and perhaps keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--place", default=None, help="directory for the files")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    parser.add_argument("--write", action="store_true", help="keep the result in perf/results")
    options = parser.parse_args()
    facts = timing.machine_facts()
    body: dict[str, Any] = {"shards": SHARDS, "value_bytes": len(VALUE)}
    with tempfile.TemporaryDirectory(dir=options.place) as place, redis_server(place) as socket:
        names = {"memory": "memory", "sqlite": f"sqlite:{place}/a.db", "sqlite_full": f"sqlite:{place}/b.db?sync=full"}
        if socket:
            names["redis"] = f"redis+unix://{socket}"
        for label, name in names.items():
            body[label] = measured(name, options.seconds)
            timing.print_json({label: body[label]})
    if options.write:
        found = timing.document("storage", body, facts)
        timing.print_json({"written": str(timing.write_result(found, Path(__file__).parent / "results"))})


if __name__ == "__main__":
    main()
