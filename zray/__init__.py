"""zray: tasks, actors and shared objects over all cores of a machine, with one decorator.

The public names and nothing else. They are resolved when first used, so that `import zray` stays quick and imports neither numpy nor
ZeroMQ; nothing in the environment is changed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zray import actor as actor
    from zray import errors as errors
    from zray import exceptions, kv
    from zray import runtime_context as runtime_context
    from zray import util as util
    from zray.actor import Actor, ActorClass, ActorHandle, exit_actor, method
    from zray.api import (
        available_resources,
        cancel,
        cluster_resources,
        create,
        get,
        get_actor,
        get_gpu_ids,
        get_runtime_context,
        init,
        is_initialized,
        kill,
        nodes,
        put,
        remote,
        shutdown,
        timeline,
        wait,
    )
    from zray.object_store import ObjectRef
    from zray.remote_function import RemoteFunction

_HOME = {
    **dict.fromkeys(
        [
            "available_resources",
            "cancel",
            "cluster_resources",
            "create",
            "get",
            "get_actor",
            "get_gpu_ids",
            "get_runtime_context",
            "init",
            "is_initialized",
            "kill",
            "nodes",
            "put",
            "remote",
            "shutdown",
            "timeline",
            "wait",
        ],
        "zray.api",
    ),
    **dict.fromkeys(["Actor", "ActorClass", "ActorHandle", "exit_actor", "method"], "zray.actor"),
    "ObjectRef": "zray.object_store",
    "RemoteFunction": "zray.remote_function",
}
_MODULES = ("actor", "errors", "exceptions", "kv", "runtime_context", "util")

__all__ = [
    "Actor",
    "ActorClass",
    "ActorHandle",
    "ObjectRef",
    "RemoteFunction",
    "__version__",
    "available_resources",
    "cancel",
    "cluster_resources",
    "create",
    "exceptions",
    "exit_actor",
    "get",
    "get_actor",
    "get_gpu_ids",
    "get_runtime_context",
    "init",
    "is_initialized",
    "kill",
    "kv",
    "method",
    "nodes",
    "put",
    "remote",
    "shutdown",
    "timeline",
    "wait",
]


if not TYPE_CHECKING:  # to a checker any name would be there

    def __getattr__(name: str) -> Any:
        home = _HOME.get(name)
        if home is not None:
            value = getattr(importlib.import_module(home), name)
        elif name in _MODULES:
            value = importlib.import_module(f"zray.{name}")
        else:
            raise AttributeError(f"module 'zray' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
