"""What ran when, as Chrome trace events ("Trace Event Format"), which ui.perfetto.dev shows."""

from __future__ import annotations

from typing import Any


def chrome_events(tasks: list[dict[str, Any]], events: list[Any]) -> list[dict[str, Any]]:
    """Turn ended tasks (a bar each, in the row of its worker) and events of actors into trace events; times in microseconds."""
    found: list[dict[str, Any]] = []
    for task in tasks:
        if not task["ended"]:
            continue
        found.append(
            {
                "name": task["name"] or "call",
                "cat": "task",
                "ph": "X",
                "ts": int(task["ended"] * 1e6) - task["micros"],
                "dur": task["micros"],
                "pid": f"job {task['job']}",
                "tid": f"worker {task['worker']}",
                "args": {"task_id": task["task_id"], "status": task["status"]},
            }
        )
    for when, table, key, what, detail in events:
        found.append(
            {
                "name": f"{table}: {what}",
                "cat": table,
                "ph": "i",
                "s": "g",
                "ts": int(when * 1e6),
                "pid": "node",
                "tid": table,
                "args": {"id": key, "detail": detail},
            }
        )
    return found
