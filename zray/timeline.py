"""The broker's history of tasks as Chrome trace events ("Trace Event Format"), which ui.perfetto.dev shows."""

from __future__ import annotations

from typing import Any


def chrome_events(rows: list[Any]) -> list[dict[str, Any]]:
    """Turn history rows (seconds, table, id, what, detail) into trace events with microsecond times."""
    found: list[dict[str, Any]] = []
    for when, table, key, what, detail in rows:
        found.append(
            {
                "name": f"{table}:{what}",
                "cat": table,
                "ph": "i",
                "s": "g",
                "ts": int(when * 1e6),
                "pid": "zray",
                "tid": table,
                "args": {"id": key, "detail": detail},
            }
        )
    return found
