"""asyncio tasks that make their first step at once instead of in the next round of the event loop.

A method that awaits nothing, or only what is there already, has then ended before the loop sleeps again: its caller hears of it two rounds
earlier. Covers starting such tasks on every supported Python. Does not cover what asynchronous actors do with them (`zray.actor_runtime`).

Python 3.12 has this (`eager_start` of `asyncio.Task`). For 3.11 it is made of what asyncio documents for other implementations of tasks
("Extending": `_enter_task`, `_leave_task`): the task is given a coroutine object that hands on what the first step has yielded. 3.10 cannot
run a step in the context of a task; there it is an ordinary task.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Generator

_HANDED_ON: Final = object()


def start(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """Run a coroutine up to its first suspension, as the task that it is from then on.

    Args:
        loop: the running event loop; the caller is in one of its callbacks or tasks.
        coroutine: not begun.

    Returns:
        The task; None when the coroutine has returned already.

    Raises:
        Whatever the first step raises, on Python 3.11; on others it becomes the task's exception.
    """
    if sys.version_info >= (3, 12):
        task = asyncio.Task(coroutine, loop=loop, eager_start=True)
        return None if task.done() and not task.cancelled() and task.exception() is None else task
    elif sys.version_info >= (3, 11):
        begun = _Begun(coroutine)
        context = contextvars.copy_context()
        task = loop.create_task(begun, context=context)
        outer = asyncio.current_task(loop)
        if outer is not None:
            asyncio._leave_task(loop, outer)
        asyncio._enter_task(loop, task)
        try:
            begun.yielded = context.run(coroutine.send, None)
        except StopIteration:
            begun.over = True
            return None
        except BaseException:
            begun.over = True
            raise
        finally:
            asyncio._leave_task(loop, task)
            if outer is not None:
                asyncio._enter_task(loop, outer)
        return task
    else:
        return loop.create_task(coroutine)


class _Begun(Coroutine[Any, Any, None]):
    """A coroutine that has made its first step, for a task that is about to make it."""

    __slots__ = ("coroutine", "over", "yielded")

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.coroutine = coroutine
        self.yielded: Any = _HANDED_ON
        """What the first step has yielded (a future, or None), until the task has it."""
        self.over = False

    def send(self, value: Any) -> Any:
        if self.over:
            raise StopIteration
        if self.yielded is not _HANDED_ON:
            first, self.yielded = self.yielded, _HANDED_ON
            return first
        return self.coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        if self.over:
            raise StopIteration
        self.yielded = _HANDED_ON
        return self.coroutine.throw(*error)

    def close(self) -> None:
        self.coroutine.close()

    def __await__(self) -> Generator[Any, Any, None]:
        return self.coroutine.__await__()
