"""What runs in workers: functions and actors that do as little as they can.

Covers only those that need no API; `rows.py` says how they are called. Imports nothing, because every new worker imports
this file, and a figure for creating actors is not a figure for importing other people's modules.
"""

from __future__ import annotations


def small_value() -> bytes:
    """Do as little as a task can."""
    return b"ok"


def small_value_of(_argument: object) -> bytes:
    """Do as little as a task with an argument can."""
    return b"ok"


class Server:
    """An actor that answers."""

    def small_value(self) -> bytes:
        """Do as little as a method can."""
        return b"ok"

    def small_value_of(self, _argument: object) -> bytes:
        """Do as little as a method with an argument can."""
        return b"ok"


class AsyncServer:
    """An actor whose methods are coroutines."""

    async def small_value(self) -> bytes:
        """Do as little as a coroutine can."""
        return b"ok"

    async def small_value_of(self, _argument: object) -> bytes:
        """Do as little as a coroutine with an argument can."""
        return b"ok"
