"""The control store alone: memory and time over many task rows, and the cost of its other calls.

    python -m perf.gcs [--rows 5000000] [--shards 4] [--batch 64] [--write]

Task rows come as the broker gets them: specs decoded from submit frames, ends in batches of another size and another
order. Only calls to the store are on the clock; making and decoding frames is not, but is part of the memory. One JSON
line per sample: rows written so far, resident memory, and microseconds of wall and of processor time per row (submission
and end together) since the sample before. Then one line per other call. `--write` keeps everything as
`perf/results/<date>-gcs.json`. What to look for: the curve is flat, and a row costs a microsecond or less.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zray import wire
from zray.gcs import messages as m
from zray.gcs.client import GcsClient
from zray.gcs.service import GcsService
from zray.gcs.tables import JobRow, Table
from zray.ids import task_id
from zray.task import TaskSpec

from . import timing

QUEUED = 10_000
"""Tasks that are submitted before the first of them ends: a queue, as brokers have one."""
ARGUMENTS = 32
"""Bytes of packed arguments in a spec."""
ROUND = 16
"""Submit frames that are decoded before the clock runs."""
SAMPLES = 50


def resident() -> int:
    """Return the bytes of memory this process has resident."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def frames(parent: bytes, rows: int, batch: int) -> Iterator[bytes]:
    """Iterate over submit frames that hold `rows` specs together, `batch` in each."""
    shape = bytes(range(16))
    for start in range(0, rows, batch):
        count = min(batch, rows - start)
        tasks = [TaskSpec(task_id(parent, start + i), shape, bytes(ARGUMENTS)) for i in range(count)]
        yield wire.encode(wire.SubmitTasks(1, 1, parent, tasks))


class Curve:
    """Runs task rows through a store and takes samples on the way."""

    def __init__(self, gcs: GcsService, rows: int, batch: int) -> None:
        self.gcs = gcs
        self.rows = rows
        self.batch = batch
        self.samples: list[dict[str, float]] = []
        self.done = 0
        self._wall = self.cpu = 0.0
        self._since = 0

    def clocked(self, calls: list[Callable[[], object]]) -> None:
        """Do some calls and add their time. The clocks cost microseconds themselves, hence many calls at once."""
        wall, cpu = time.perf_counter(), time.thread_time()
        for call in calls:
            call()
        self.cpu += time.thread_time() - cpu
        self._wall += time.perf_counter() - wall

    def end(self, ids: list[bytes], worker: int) -> Callable[[], object]:
        """Return the call that notes ends, as a frame from a worker brings them."""
        statuses, micros = bytes(len(ids)), [100 + i for i in range(len(ids))]
        self.done += len(ids)
        return functools.partial(self.gcs.tasks_finished, 1, worker, ids, statuses, micros)

    def sample(self) -> None:
        """Take a sample and print it."""
        rows = self.done - self._since
        found = {
            "rows": self.done,
            "rss_mib": round(resident() / 2**20, 2),
            "wall_us_per_row": round(self._wall / rows * 1e6, 4),
            "cpu_us_per_row": round(self.cpu / rows * 1e6, 4),
        }
        self.samples.append(found)
        timing.print_json(found)
        self._wall = self.cpu = 0.0
        self._since = self.done

    def run(self) -> None:
        """Write all rows: submit `QUEUED` ahead, end them in frames of a third of the batch."""
        waiting: deque[bytes] = deque()
        step = max(1, self.rows // SAMPLES)
        part = max(1, self.batch // 3)
        source = frames(os.urandom(16), self.rows, self.batch)
        while submits := [wire.decode(frame) for frame in itertools.islice(source, ROUND)]:
            calls: list[Callable[[], object]] = []
            for message in submits:
                assert isinstance(message, wire.SubmitTasks)
                calls.append(functools.partial(self.gcs.tasks_submitted, 1, message.tasks))
                # An id that arrives in another frame is another object.
                waiting.extend([bytes(bytearray(spec.id)) for spec in message.tasks])
                while len(waiting) > QUEUED:
                    calls.append(self.end([waiting.popleft() for _ in range(part)], worker=1 + len(calls) % 2))
            del submits
            self.clocked(calls)
            if self.done - self._since >= step:
                self.clocked([functools.partial(self.gcs.tick, 0.0)])
                self.sample()
        rest: list[Callable[[], object]] = []
        while waiting:
            rest.append(self.end([waiting.popleft() for _ in range(min(part, len(waiting)))], worker=1))
        self.clocked([*rest, self.gcs.settle_tasks])
        self.sample()


def single_tasks(gcs: GcsService, rows: int = 100_000) -> float:
    """Return the processor microseconds for a task that is submitted and ends in frames of its own."""
    parent = os.urandom(16)
    specs = [[TaskSpec(task_id(parent, i), bytes(16), bytes(ARGUMENTS))] for i in range(rows)]
    ids = [[bytes(bytearray(one[0].id))] for one in specs]
    start = time.thread_time()
    for one, names in zip(specs, ids):
        gcs.tasks_submitted(1, one)
        gcs.tasks_finished(1, 1, names, b"\0", [100])
    return (time.thread_time() - start) / rows * 1e6


def held_tasks(shards: int, rows: int = 400_000) -> dict[str, float]:
    """Return what it costs when somebody refers to every result: time and memory per row, the question itself left out."""
    gcs = GcsService(None, "", shards=shards, referenced=lambda names: names)
    before = resident()
    curve = Curve(gcs, rows, 64)
    curve.sample = lambda: None  # type: ignore[method-assign]
    curve.run()
    statistics = gcs.statistics()
    kept = statistics.tasks_held + statistics.tasks_ended
    gcs.validate()
    return {
        "held_tasks_us_per_row": round(curve.cpu / rows * 1e6, 3),
        "held_tasks_bytes_per_row": round((resident() - before) / kept, 1),
        "held_tasks": statistics.tasks_held,
    }


def calls(shards: int) -> dict[str, float]:
    """Return the processor microseconds of the other calls, each over a warm store."""
    gcs = GcsService(None, "", shards=shards)
    client = GcsClient(gcs.handle_request)
    jobs = [JobRow(task_id(bytes(16), i), i, bytes(16), 1, "default") for i in range(1000)]
    for job in jobs:
        gcs.put_row(job)
    get = m.encode(m.Get(Table.JOBS, jobs[0].id))
    spec = TaskSpec(task_id(bytes(16), 1), bytes(16), bytes(ARGUMENTS))
    gcs.tasks_submitted(1, [spec])

    def measured(call: Callable[[], object], times: int = 20_000) -> float:
        for _ in range(times // 10):
            call()
        start = time.thread_time()
        for _ in range(times):
            call()
        return round((time.thread_time() - start) / times * 1e6, 3)

    return {
        "one_task_a_frame_us": round(single_tasks(gcs), 3),
        "put_row_us": measured(lambda: gcs.put_row(jobs[0])),
        "read_row_us": measured(lambda: gcs.row(JobRow, jobs[0].id)),
        "read_task_us": measured(lambda: gcs.task(spec.id)),
        "record_event_us": measured(lambda: gcs.record_event("tasks", spec.id, "retried", "worker 3 died")),
        "handle_get_us": measured(lambda: gcs.handle_request(get)),
        "client_kv_put_us": measured(lambda: client.kv_put("key", b"value")),
        "client_kv_get_us": measured(lambda: client.kv_get("key")),
        "idle_tick_us": measured(lambda: gcs.tick(0.0)),
        **held_tasks(shards),
    }


def startup_us(shards: int) -> float:
    """Return the best of some times to make a service, in microseconds."""
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        GcsService(None, "", shards=shards)
        taken.append(time.perf_counter() - start)
    return round(min(taken) * 1e6, 1)


def main() -> None:
    """Measure, print, and perhaps keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=5_000_000, help="task rows to write")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64, help="specs in a submit frame")
    parser.add_argument("--write", action="store_true", help="keep the result in perf/results")
    options = parser.parse_args()
    facts = timing.machine_facts()
    gcs = GcsService(None, "", shards=options.shards)
    empty = resident()
    curve = Curve(gcs, options.rows, options.batch)
    curve.run()
    gcs.validate()
    samples = curve.samples
    full = [found for found in samples if found["rows"] >= 300_000] or samples
    body: dict[str, Any] = {
        "rows": options.rows,
        "shards": options.shards,
        "batch": options.batch,
        "empty_rss_mib": round(empty / 2**20, 2),
        "rss_growth_after_warm_up_mib": round(full[-1]["rss_mib"] - full[0]["rss_mib"], 2),
        "rss_highest_mib": max(found["rss_mib"] for found in samples),
        "cpu_us_per_row_median": sorted(found["cpu_us_per_row"] for found in samples)[len(samples) // 2],
        "cpu_us_per_row_best": min(found["cpu_us_per_row"] for found in samples),
        "wall_us_per_row_median": sorted(found["wall_us_per_row"] for found in samples)[len(samples) // 2],
        "start_us": startup_us(options.shards),
        "calls": calls(options.shards),
        "statistics": {name: getattr(gcs.statistics(), name) for name in gcs.statistics().__struct_fields__},
    }
    timing.print_json(body)
    if options.write:
        found = timing.document("gcs", {**body, "curve": samples}, facts)
        timing.print_json({"written": str(timing.write_result(found, Path(__file__).parent / "results"))})


if __name__ == "__main__":
    main()
