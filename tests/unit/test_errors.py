"""Exceptions: their families, their texts, and that all of them survive pickling."""

from __future__ import annotations

import copy
import os
import pickle
import signal

import pytest

from zray import errors
from zray.errors import ActorDiedError, Death, DeathCause, OutOfMemoryError, WorkerCrashedError

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, BaseException) and not value.__name__.startswith("_")
]

EXPECTED_NAMES = [
    "ZrayError",
    "TaskError",
    "ZrayTaskError",
    "ActorError",
    "ZrayActorError",
    "ActorDiedError",
    "ActorUnavailableError",
    "CheckpointError",
    "ActorUnschedulableError",
    "TaskUnschedulableError",
    "TaskCancelledError",
    "WorkerCrashedError",
    "GetTimeoutError",
    "ObjectLostError",
    "ObjectFreedError",
    "OwnerDiedError",
    "ObjectFetchTimedOutError",
    "ObjectReconstructionFailedError",
    "ObjectReconstructionFailedMaxAttemptsExceededError",
    "ReferenceCountingAssertionError",
    "OutOfMemoryError",
    "OutOfDiskError",
    "ObjectStoreFullError",
    "ZraySystemError",
    "RuntimeEnvSetupError",
    "PendingCallsLimitExceeded",
    "AsyncioActorExit",
    "NodeDiedError",
    "ZrayUsageError",
    "ZrayInternalError",
    "SerializationError",
    "ActorClassInheritanceException",
    "DeadlockError",
]


def test_names_that_programs_use_exist() -> None:
    for name in EXPECTED_NAMES:
        assert issubclass(getattr(errors, name), Exception), name


@pytest.mark.parametrize(
    ("cls", "also"),
    [
        (errors.GetTimeoutError, TimeoutError),
        (errors.SerializationError, TypeError),
        (errors.OutOfMemoryError, MemoryError),
        (errors.ReferenceCountingAssertionError, AssertionError),
        (errors.ZrayInternalError, errors.ZraySystemError),
        (errors.ActorDiedError, errors.ActorError),
        (errors.OwnerDiedError, errors.ObjectLostError),
        (errors.ActorClassInheritanceException, TypeError),
    ],
)
def test_families(cls: type, also: type) -> None:
    assert issubclass(cls, also)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("protocol", [2, 5])
def test_every_class_survives_pickling(cls: type[BaseException], protocol: int) -> None:
    for error in (cls("some text"), cls("")):
        error.extra = [1, 2]  # type: ignore[attr-defined]
        back = pickle.loads(pickle.dumps(error, protocol=protocol))
        assert type(back) is cls
        assert str(back) == str(error)
        assert back.args == error.args
        if cls is not errors.TaskError:  # its attributes travel in its failure record
            assert back.extra == [1, 2]
    assert str(copy.copy(cls("text"))) == str(cls("text"))


def test_state_survives_pickling() -> None:
    death = Death(DeathCause.EXIT(3), pid=7, node="n", peak_rss=2**20, fault_stack="f", log_lines=("a", "b"))
    for error in (
        WorkerCrashedError(death=death, function_name="f", task_id="ab"),
        OutOfMemoryError(death=death),
        errors.NodeDiedError(death=death, node="n"),
        ActorDiedError(actor_id="ab", death=death),
        errors.ActorUnavailableError(actor_id="ab", death=death),
    ):
        back = pickle.loads(pickle.dumps(error))
        assert str(back) == str(error)
        assert back.death == death
        assert back.cause is DeathCause.EXIT(3)
        assert back.exit_code == 3
        assert back.signal_name is None
        assert back.log_lines == ("a", "b")
        assert back.fault_stack == "f"
    assert pickle.loads(pickle.dumps(errors.TaskCancelledError(task_id="ff"))).task_id == "ff"
    assert errors.ZrayInternalError("x").args == pickle.loads(pickle.dumps(errors.ZrayInternalError("x"))).args


def test_death_causes_are_single_objects() -> None:
    for cause in (DeathCause.SIGKILL, DeathCause.OOM, DeathCause.EXIT(3), DeathCause.of_signal(40)):
        assert pickle.loads(pickle.dumps(cause)) is cause
        assert DeathCause.parse(str(cause)) is cause
        assert DeathCause(cause.name) is cause
        assert copy.deepcopy(cause) is cause
    assert DeathCause.EXIT(3) is DeathCause.EXIT(3)
    assert DeathCause.EXIT(3) is not DeathCause.EXIT(4)
    assert DeathCause.of_signal(9) is DeathCause.SIGKILL
    assert repr(DeathCause.EXIT(3)) == "DeathCause.EXIT(3)"
    assert DeathCause.SIGSEGV.signal == signal.SIGSEGV
    with pytest.raises(ValueError, match="no such cause"):
        DeathCause.parse("BOREDOM")
    with pytest.raises(AttributeError):
        DeathCause.OOM.code = 3


def test_death_cause_of_a_real_process() -> None:
    for end, expected in (
        (lambda: os._exit(3), DeathCause.EXIT(3)),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), DeathCause.SIGKILL),
    ):
        child = os.fork()
        if child == 0:
            end()
            os._exit(99)
        assert DeathCause.of_wait_status(os.waitpid(child, 0)[1]) is expected


def test_a_crash_says_why() -> None:
    death = Death(
        DeathCause.SIGSEGV,
        pid=42,
        node="left",
        detail="while running f",
        peak_rss=300 * 2**20,
        fault_stack="Current thread 0x1:\n  File x.py, line 3 in f",
        log_lines=("hello", "world"),
        log_path="/logs/w1",
    )
    text = str(WorkerCrashedError(death=death, function_name="f"))
    assert text.startswith("The worker died unexpectedly while executing this task (f).")
    for part in (
        "SIGSEGV",
        "signal 11",
        "pid 42",
        "node left",
        "300.0 MiB",
        "line 3 in f",
        "hello",
        "world",
        "/logs/w1",
    ):
        assert part in text
    error = WorkerCrashedError(death=death)
    assert error.signal_name == "SIGSEGV"
    assert error.exit_code is None
    assert WorkerCrashedError().cause is DeathCause.UNKNOWN


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (DeathCause.SIGKILL, "The actor is dead because its worker process has died"),
        (DeathCause.EXIT(0), "exit code 0"),
        (DeathCause.KILLED, "it was killed by `zray.kill`"),
        (DeathCause.OWNER_DIED, "The actor is dead because its owner has died"),
        (DeathCause.NODE_DIED, "The actor died because its node has died."),
        (DeathCause.EXIT_ACTOR, "exit_actor"),
        (DeathCause.PREEMPTED, "the actor's node was preempted"),
        (DeathCause.PLACEMENT_GROUP_REMOVED, "placement group was removed"),
    ],
)
def test_texts_of_dead_actors(cause: DeathCause, text: str) -> None:
    error = ActorDiedError(actor_id="abcd", class_name="A", name="joe", death=Death(cause, pid=3))
    assert text in str(error)
    assert "The actor died unexpectedly before finishing this task." in str(error)
    assert "abcd" in str(error)
    assert "joe" in str(error)
    assert error.error_msg == str(error)
    assert error.actor_id == "abcd"
    assert error.cause is cause
    assert not error.actor_init_failed
    assert error.preempted is (cause is DeathCause.PREEMPTED)


def test_texts_that_programs_match_on() -> None:
    failed = ActorDiedError(actor_id="ab", creation_error="zray::A.__init__() (pid=1)\nValueError: 3")
    assert "an error raised in its creation task, zray::A.__init__()" in str(failed)
    assert failed.actor_init_failed
    assert failed.cause is DeathCause.INIT_FAILED
    assert "was cancelled" in str(errors.TaskCancelledError(task_id="c0ffee"))
    assert "c0ffee" in str(errors.TaskCancelledError(task_id="c0ffee"))
    assert "unavailable" in str(errors.ActorUnavailableError(actor_id="ab", detail="it is restarting"))
    lost = errors.ObjectLostError.for_id(bytes(16), "its spilled file is gone", "x.py:3")
    assert bytes(16).hex() in str(lost)
    assert "its spilled file is gone" in str(lost)
    assert "x.py:3" in str(lost)
    assert type(errors.OwnerDiedError.for_id(bytes(16))) is errors.OwnerDiedError
    assert "please report" in str(errors.ZrayInternalError("odd"))


def test_what_the_broker_knows_of_any_call_is_accepted() -> None:
    """It names errors by class and gives each what it knows, whether or not a ready text comes with it."""
    death = Death(DeathCause.SIGKILL, pid=3)
    task = {"task_id": "ab", "function_name": "f"}
    actor = {"actor_id": "ab", "class_name": "A", "name": "n", "namespace": "s"}
    for made in (
        WorkerCrashedError(death=death, **task),
        OutOfMemoryError(death=death, **task),
        errors.NodeDiedError(death=death, **task),
        errors.TaskCancelledError(**task),
        errors.TaskUnschedulableError(**task),
        ActorDiedError(death=death, never_started=True, **actor),
        errors.ActorUnavailableError(death=death, **actor),
        errors.ActorUnschedulableError(**actor),
    ):
        assert str(made)
        assert "None" not in str(made)
        assert "  " not in str(made).splitlines()[0]
    assert str(OutOfMemoryError("ready", death=death, **task)) == "ready"
    assert ActorDiedError(creation_error=ValueError(3)).creation_error.args == (3,)  # type: ignore[union-attr]


def test_task_error_made_by_hand() -> None:
    error = errors.TaskError("text", ValueError(3))
    assert str(error) == "text"
    assert isinstance(error.cause, ValueError)
    assert error.as_instanceof_cause() is error
    assert error.failure is None
    with pytest.raises(AttributeError, match="nothing"):
        _ = error.nothing
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == "text"
    assert isinstance(back.cause, ValueError)
