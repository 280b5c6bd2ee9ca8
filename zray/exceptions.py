"""The exceptions under the module name that programs written for Ray use; they are defined in `zray.errors`."""

from __future__ import annotations

from zray import errors
from zray.errors import *  # noqa: F403

__all__ = [
    name
    for name, value in vars(errors).items()
    if getattr(value, "__module__", "") == "zray.errors" and not name.startswith("_")
]

# Names that programs written for Ray catch.
RayError = errors.ZrayError
RayTaskError = errors.TaskError
RayActorError = errors.ActorError
RaySystemError = errors.ZraySystemError
__all__ += ["RayActorError", "RayError", "RaySystemError", "RayTaskError"]
