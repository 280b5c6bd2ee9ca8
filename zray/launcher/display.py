"""The table of hosts while it changes: live on a terminal, a line for each host that has ended elsewhere.

Covers drawing and time. Does not cover what rows look like (`rows`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live

from zray.launcher import rows as rows_

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from rich.table import Table

_REFRESHES: int = 8
"""A second."""


class Board:
    """Rows of hosts, shown on standard error, so that standard output stays for results. Used in a `with` statement."""

    def __init__(self, hosts: Iterable[str], columns: tuple[str, ...], *, quiet: bool = False) -> None:
        """quiet: show nothing."""
        self.columns = columns
        self.rows = {host: rows_.Row(host, columns) for host in hosts}
        self._begun = dict.fromkeys(self.rows, time.monotonic())
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._live: Live | None = None

    def __enter__(self) -> Board:
        if not self._quiet and self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._table,
                refresh_per_second=_REFRESHES,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self) -> Table:
        now = time.monotonic()
        return rows_.table(self.rows.values(), self.columns, {host: now - begun for host, begun in self._begun.items()})

    def end(self, row: rows_.Row) -> None:
        """A host has ended, well or badly."""
        row.seconds = time.monotonic() - self._begun[row.host]
        if self._live is None and not self._quiet:
            self._console.print(rows_.plain_line(row), highlight=False, markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Tell something that belongs to no host."""
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
