"""What type checkers see where one signature is not enough: `.remote()`, `.options()`, `.map()`, `@zray.remote`, `@zray.method`.

The types are in the stub beside this file. At run time there are only marks that leave what they decorate as it is; to a checker each mark
replaces a plain method or function by the typed object that the stub describes. So the bodies stay where they belong and are checked there.
"""

from __future__ import annotations

from typing import Any


def _mark(target: Any) -> Any:
    return target


task_call = _mark
"""`RemoteFunction.remote`."""
task_map = _mark
"""`RemoteFunction.map`."""
task_options = _mark
"""`RemoteFunction.options`."""
remote_decorator = _mark
"""`zray.remote`."""
method_decorator = _mark
"""`zray.method`."""


class ActorBase:
    """Base of `zray.Actor`: the stub gives it typed `remote` and `options`."""

    __slots__ = ()
