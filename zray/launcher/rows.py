"""What is shown of each host: a row of cells, and the report of failures at the end.

Pure but for drawing: rows in, text or a table out. Does not cover where the rows come from (`running`).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

UP: Final = ("ssh", "python", "install", "port", "joined")
DOWN: Final = ("ssh", "python", "ended")
CHECK: Final = ("ssh", "python", "install", "names", "port", "clock")
STATUS: Final = ("ssh", "node", "state", "address", "has")


class Mark(enum.Enum):
    """State of a cell; the value is how it looks."""

    WAITING = "dim"
    WORKING = "yellow"
    GOOD = "green"
    NOTED = "cyan"
    """Good, and there is something to say."""
    BAD = "bold red"


class Row:
    """One host's state."""

    def __init__(self, host: str, columns: tuple[str, ...]) -> None:
        self.host = host
        self.cells: dict[str, tuple[Mark, str]] = dict.fromkeys(columns, (Mark.WAITING, ""))
        self.seconds: float | None = None
        """That it took, when it has ended."""
        self.note = ""
        self.error = ""
        """Why it failed, with what was said there."""

    def set(self, column: str, mark: Mark, text: str = "") -> None:
        """Set a cell."""
        self.cells[column] = (mark, text)

    def fail(self, column: str, error: str) -> None:
        """End it with a failure."""
        self.cells[column] = (Mark.BAD, "failed")
        self.error = error

    @property
    def failed(self) -> bool:
        """Whether it ended with a failure."""
        return bool(self.error)

    def as_json(self) -> dict[str, Any]:
        """Return the row for programs."""
        return {
            "host": self.host,
            "ok": not self.failed,
            **{column: text or mark.name.lower() for column, (mark, text) in self.cells.items()},
            "seconds": self.seconds,
            "note": self.note,
            "error": self.error,
        }


_EMPTY: Final = {Mark.WAITING: "-", Mark.WORKING: "...", Mark.GOOD: "ok", Mark.NOTED: "ok", Mark.BAD: "failed"}


def cell_text(mark: Mark, text: str) -> str:
    """Return what stands in a cell."""
    return f"{text} ..." if mark is Mark.WORKING and text else text or _EMPTY[mark]


def table(rows: Iterable[Row], columns: tuple[str, ...], now: dict[str, float]) -> Table:
    """Draw all rows.

    Args:
        rows: in order.
        columns: to be shown.
        now: seconds so far of hosts that have not ended, by name.
    """
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("host", *columns):
        drawn.add_column(name, no_wrap=name == "host")
    drawn.add_column("seconds", justify="right")
    notes = [row.note for row in rows if row.note]
    if notes:
        drawn.add_column("note")
    for row in rows:
        cells = [Text(cell_text(mark, text), style=mark.value) for mark, text in row.cells.values()]
        seconds = now.get(row.host) if row.seconds is None else row.seconds
        tail = [Text(row.note, style="cyan")] if notes else []
        drawn.add_row(row.host, *cells, "" if seconds is None else f"{seconds:.1f}", *tail)
    return drawn


def plain_line(row: Row) -> str:
    """Return one host's row as a line of text, for outputs that are no terminal."""
    cells = "  ".join(f"{column} {cell_text(*cell)}" for column, cell in row.cells.items())
    seconds = "" if row.seconds is None else f"  {row.seconds:.1f} s"
    return f"{row.host}: {cells}{seconds}{'  ' + row.note if row.note else ''}"


def tables_line(found: dict[str, Any]) -> str:
    """Return in words how the head keeps the cluster's tables, as `zray status --json` tells it of the cluster."""
    if found["replicas"]:
        line = f"tables on {len(found['replicas'])} of {found['replicas_wanted']} nodes"
    else:
        line = f"storage: {found['storage']}"
    wrong = [found["storage_failure"], f"the head is lost: {found['head_lost']}" if found["head_lost"] else ""]
    return "; ".join(filter(None, [line, *wrong]))


def failures(rows: Iterable[Row]) -> str:
    """Return the report of failures: each host's name, and under it what was said there. Empty: there are none."""
    parts = []
    for row in rows:
        if row.failed:
            parts.append("\n".join([f"{row.host}:", *(f"    {line}" for line in row.error.splitlines())]))
    return "\n".join(parts)
