"""Several nodes on one machine, for tests of programs: the name is kept for programs written for Ray; this version has one node only."""

from __future__ import annotations

from typing import Any


class Cluster:
    """A cluster of several node processes. Not available yet: constructing one raises NotImplementedError."""

    def __init__(self, *_args: Any, **_options: Any) -> None:
        raise NotImplementedError("clusters of several nodes are not available yet: use zray.init()")
