"""The numbers that shape the scheduler machine's decisions: one frozen record per broker.

Covers limits, targets and delays, with the reason for each default. Does not cover the node's resources (an argument of
`Scheduler`) nor anything about sockets and directories (`zray.broker.config`).
"""

from __future__ import annotations

import msgspec


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one scheduler machine. Times are in seconds."""

    target_prefetch: float = 0.002
    """Work that should lie ready at a busy worker. About twenty times the way from worker to broker and back (about 0.1
    ms), so that fetching costs a few per cent at most, and short enough that no task waits long behind others while a
    worker elsewhere falls idle."""
    max_prefetch: int = 256
    """Most tasks at one worker, however small they are: bounds what a death throws back."""
    steal_after: float = 0.002
    """A worker that reported nothing for so long shares its unclaimed tasks with idle workers."""
    max_workers: int = 2048
    """Most processes at a time; the store has records for 4,096."""
    max_starting: int = 0
    """Most processes being started at a time; 0: one per CPU, at least two. More would only compete for the same cores
    while they start."""
    prestart: int = -1
    """Workers started when a job comes to an empty node; -1: one per CPU."""
    keep_idle: int = -1
    """Idle workers that are kept for ever (of all jobs together); -1: one per CPU."""
    worker_idle: float = 2.0
    """Idle workers beyond `keep_idle` are stopped after this time."""
    stop_grace: float = 5.0
    """A worker that was asked to end and did not is killed after this time."""
    start_backoff: float = 0.1
    """Pause after a worker could not be started, or died before it was ready; doubles up to `start_backoff_max`."""
    start_backoff_max: float = 5.0
    start_attempts: int = 5
    """So many workers of a job in a row died before they were ready: what the job has waiting fails."""
    lease_idle: float = 1.0
    """A lease that carries no call for so long ends."""
    lease_cooldown: float = 0.02
    """No lease is granted for so long after one was taken back for queued tasks: callers that compete would otherwise
    push each other out at each call."""
    drain_poll: float = 0.001
    """How soon to look again whether a worker whose lease was taken back has finished its last direct call."""
    watch_again: float = 0.05
    """Objects that tasks wait for are looked at again this long after a process died: its notice may have died with
    it."""
    cluster_may_grow: bool = False
    """Nodes may join: what no present node can ever run waits with a warning. False: it fails at once."""
    runs_nothing: bool = False
    """The node only connects a driver to a cluster: all tasks and actors go to other nodes."""
    keep_environment: frozenset[str] = frozenset()
    """Variables the user has set for the whole session: thread limits among them are not overridden."""
    gpu_names: tuple[str, ...] = ()
    """What CUDA_VISIBLE_DEVICES calls the GPUs of this node; empty: "0", "1", ..."""
    debug: bool = False
    """Keep the stories of tasks and actors and run `validate()` after each event."""
