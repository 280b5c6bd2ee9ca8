"""The exceptions under the module name that programs written for Ray use; they are defined in `zray.errors`."""
from __future__ import annotations

from zray.errors import *  # noqa: F403
from zray.errors import __all__ as __all__
