"""What to run: the frozen records that travel between processes.

Covers the description of one kind of call (`CallShape`), of one call (`TaskSpec`), of an actor (`ActorSpec`) and of a job (`JobSpec`).
Does not cover one *execution* of a task: its state, worker and attempt are the broker's business (`zray.broker.task_table`).
Neighbours: `zray.wire` puts these records into messages; `zray.ids` says how their ids follow from one another.

A call is split in two because almost everything about it is equal for all calls of `f.remote`: the shape is sent once per
connection and named by its 16-byte key afterwards, so that a spec is an id, a key and the arguments.
"""

from __future__ import annotations

from typing import Final

import msgspec

TASK: Final = 0
"""`CallShape.kind` of an ordinary task."""
ACTOR_CREATION: Final = 1
"""`CallShape.kind` of the construction of an actor."""
ACTOR_METHOD: Final = 2
"""`CallShape.kind` of a method call."""

NO_DEPS: Final[tuple[bytes, ...]] = ()

ARGS_IN_OBJECT: Final = 0x40
"""Flag in `TaskSpec.args_kind`: the packed arguments were too large for a message and are the object named last in `deps`."""


class CallShape(msgspec.Struct, frozen=True, array_like=True):
    """All that is equal for every call made with the same function and options."""

    key: bytes
    """16 bytes: digest of the other fields."""
    kind: int
    """TASK, ACTOR_CREATION or ACTOR_METHOD."""
    function: bytes
    """Id of the object that holds the pickled function or class (empty for methods: the actor has its class)."""
    name: str
    """For people: qualified name of function, class or method, or the option `name`."""
    method: str = ""
    num_returns: int = 1
    resources: bytes = b""
    """Packed vector (`zray.resources`): what one execution occupies."""
    max_retries: int = 0
    """Executions after the first that a death of worker or node may cost; -1 without limit."""
    retry_exceptions: bytes = b""
    """b"" never, b"*" any exception, else a pickled tuple of exception classes."""
    extra: bytes = b""
    """Pickled map of rarer options (environment, concurrency group ...); b"" when there are none."""
    strategy: bytes = b""
    """Packed `zray.placing.Strategy`: where it may run."""


class TaskSpec(msgspec.Struct, array_like=True, gc=False):
    """One call. The ids of its results are `ids.return_id(id, i)`."""

    id: bytes
    shape: bytes
    """Key of its CallShape."""
    args: bytes = b""
    args_kind: int = 0
    """How `args` are packed (`zray.serialization`), perhaps with ARGS_IN_OBJECT."""
    deps: tuple[bytes, ...] = NO_DEPS
    """Objects that must exist before it can run: the arguments passed by reference at top level, in placeholder order."""
    borrowed: tuple[bytes, ...] = NO_DEPS
    """Objects whose references are inside the packed arguments: kept alive, not waited for."""
    attempt: int = 0
    sequence: int = 0
    """Actor calls: place in the order of this caller's calls to this incarnation, from 1; 0 for tasks."""


class LaneTag(msgspec.Struct, frozen=True, array_like=True):
    """How calls stand to the lane of their caller (`zray.lanes`) when they come through the brokers: their `sequence` counts in that lane."""

    number: int
    """Stands for the caller at the actor's node; has LANE_BIT."""
    incarnation: int
    """Of the actor that the lane leads to: calls that are to go to another are outside of the numbering."""
    sent: bool
    """They went over the lane already, so that incarnation may have run them."""


LANE_BIT: Final = 1 << 40
"""Bit of numbers of lanes, which stand where handles of calling processes do, and are none of those."""


class ActorSpec(msgspec.Struct, frozen=True, array_like=True):
    """An actor to be made; `creation.id` is the actor's id."""

    creation: TaskSpec
    job: int
    name: str = ""
    """Empty: anonymous. Unique within the namespace."""
    namespace: str = ""
    detached: bool = False
    max_restarts: int = 0
    """-1: without limit."""
    max_task_retries: int = 0
    max_concurrency: int = 1
    max_pending_calls: int = -1
    running_resources: bytes = b""
    """What the living actor occupies (its construction may need more: the shape's resources)."""
    is_async: bool = False
    get_if_exists: bool = False
    class_name: str = ""
    methods: dict[str, int] = {}
    """Names of the public methods and their num_returns: what a handle made from the actor's name must know."""
    checkpoint_every: int = 0
    """Calls after which its state is saved; 0: never, and its calls are not logged."""


class JobSpec(msgspec.Struct, frozen=True, array_like=True):
    """One driver's program, as workers need to know it."""

    number: int
    id: bytes
    driver_pid: int
    namespace: str
    sys_path: list[str]
    cwd: str
    """Of workers; empty: the driver's was deleted."""
    preload: list[str] = []
    environment: dict[str, str] = {}
    """Variables set in workers before user code."""
