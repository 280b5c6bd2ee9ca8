"""Errors of user code and of wrong use: what can be caught, and what the text says."""

from __future__ import annotations

import pickle
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

import zray
from tests.helpers import SLACK
from zray import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("warm")


def failure_of(ref: Any) -> Any:
    """Return the error that `get` raises for a reference."""
    with pytest.raises(BaseException) as raised:
        zray.get(ref, timeout=30)
    return raised.value


def test_the_users_own_exception_is_caught_by_its_type() -> None:
    class OwnError(ValueError):
        pass

    @zray.remote
    def fail() -> None:
        raise OwnError("mine", 5)

    error = failure_of(fail.remote())
    assert isinstance(error, OwnError)
    assert isinstance(error, ValueError)
    assert isinstance(error, exceptions.TaskError)
    assert isinstance(error, exceptions.ZrayTaskError)
    assert isinstance(error.cause, OwnError)
    assert error.cause.args == ("mine", 5)


@pytest.mark.parametrize(
    "kind", [ValueError, KeyError, ZeroDivisionError, OSError, StopIteration, AssertionError, UnicodeError, MemoryError]
)
def test_built_in_exceptions(kind: type[Exception]) -> None:
    def fail() -> None:
        raise kind("of this kind")

    error = failure_of(zray.remote(fail).remote())
    assert isinstance(error, kind)
    assert "of this kind" in str(error)


def test_the_text_joins_remote_traceback_and_call_site() -> None:
    def inner_function_of_the_test() -> None:
        raise RuntimeError("the innermost message")

    @zray.remote
    def task_of_the_test() -> None:
        inner_function_of_the_test()

    line = threading.current_thread() and __import__("sys")._getframe().f_lineno + 1
    ref = task_of_the_test.remote()
    error = failure_of(ref)
    text = str(error)
    assert "task_of_the_test" in text
    assert "inner_function_of_the_test" in text
    assert "the innermost message" in text
    assert f"{__file__}:{line}" in text
    assert f"pid={error.pid}" in text
    assert "zray/execution.py" not in text, "frames of zray are of no use to the user"
    assert error.task_id == ref.task_id().hex()
    assert error.traceback_str.strip() in text


def test_each_hop_is_shown() -> None:
    @zray.remote
    def third_hop() -> None:
        raise KeyError("deep")

    @zray.remote
    def second_hop() -> Any:
        return zray.get(third_hop.remote())

    @zray.remote
    def first_hop(x: Any) -> Any:
        return x

    error = failure_of(first_hop.remote(second_hop.remote()))
    assert isinstance(error, KeyError)
    text = str(error)
    assert text.index("first_hop") < text.index("second_hop") < text.index("third_hop")
    assert "deep" in text


def test_causes_and_contexts_travel() -> None:
    @zray.remote
    def fail() -> None:
        try:
            _ = {}["missing key"]
        except KeyError as error:
            raise RuntimeError("because of it") from error

    error = failure_of(fail.remote())
    assert isinstance(error.cause, RuntimeError)
    assert isinstance(error.cause.__cause__, KeyError)
    assert "missing key" in str(error)
    assert "because of it" in str(error)


def test_exceptions_that_are_hard_to_move() -> None:
    class NeedsTwo(Exception):
        def __init__(self, first: int, second: int) -> None:
            super().__init__(f"{first} and {second}")
            self.first, self.second = first, second

    class HoldsLock(Exception):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.lock = threading.Lock()
            self.number = 5

    class RefusesPickle(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("not me")

    def fail(which: int) -> None:
        raise (NeedsTwo(1, 2), HoldsLock("locked"), RefusesPickle("stubborn"))[which]

    errors = [failure_of(zray.remote(fail).remote(i)) for i in range(3)]
    assert isinstance(errors[0], NeedsTwo)
    assert (errors[0].first, errors[0].second) == (1, 2)
    for error, name, text in zip(errors, ("NeedsTwo", "HoldsLock", "RefusesPickle"), ("1 and 2", "locked", "stubborn")):
        assert isinstance(error, exceptions.TaskError)
        assert name in str(error)
        assert text in str(error)


def test_errors_can_be_pickled_and_raised_again() -> None:
    @zray.remote
    def fail() -> None:
        raise LookupError("again")

    error = failure_of(fail.remote())
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, LookupError)
    assert str(copy) == str(error)
    ref = zray.put(error)
    assert isinstance(zray.get(ref), LookupError)

    @zray.remote
    def pass_on(box: list[Any]) -> None:
        raise box[0]

    assert isinstance(failure_of(pass_on.remote([error])), LookupError)


def test_every_get_raises_anew() -> None:
    @zray.remote
    def fail() -> None:
        raise ValueError("each time")

    ref = fail.remote()
    first, second = failure_of(ref), failure_of(ref)
    assert first is not second
    assert isinstance(failure_of([zray.put(1), ref, zray.put(2)]), ValueError)


def test_the_first_failure_does_not_wait_for_the_rest(gate: Callable[[str], Any]) -> None:
    hold = gate("hold")
    waiting = zray.remote(hold.wait).remote()

    @zray.remote
    def fail() -> None:
        raise ValueError("early")

    with pytest.raises(ValueError, match="early"):
        zray.get([fail.remote(), waiting], timeout=30)
    assert not hold.is_open
    hold.open()
    zray.get(waiting)


def test_errors_of_methods_name_actor_and_method() -> None:
    class Clumsy:
        def __repr__(self) -> str:
            return "Clumsy(7)"

        def trip(self) -> None:
            raise IndexError("stairs")

    actor = zray.remote(Clumsy).remote()
    error = failure_of(actor.trip.remote())
    assert isinstance(error, IndexError)
    assert "Clumsy.trip" in str(error)
    assert actor._actor_id.hex() in str(error)
    assert error.actor_id == actor._actor_id.hex()
    assert f"{__file__}:" in str(error)


def test_generators_that_fail_while_several_results_are_taken() -> None:
    def broken() -> Any:
        yield 1
        raise OSError("half way")

    a, b = zray.remote(broken).options(num_returns=2).remote()
    for ref in (a, b):
        assert isinstance(failure_of(ref), OSError)


# -- what cannot be pickled -----------------------------------------------------------------------------------------------


class Inner:
    def __init__(self) -> None:
        self.lock = threading.Lock()


class Outer:
    def __init__(self) -> None:
        self.parts = {"engine": [1, Inner()]}


def test_unserialisable_arguments_name_the_path() -> None:
    work = zray.remote(lambda *args, **kwargs: None)
    with pytest.raises(exceptions.SerializationError) as raised:
        work.remote(1, Outer())
    text = str(raised.value)
    assert "args[1]" in text
    assert "parts['engine'][1].lock" in text
    assert raised.value.path
    assert raised.value.path in text
    assert isinstance(raised.value, TypeError)
    with pytest.raises(exceptions.SerializationError, match=r"model.*lock"):
        work.remote(model=Inner())
    with pytest.raises(exceptions.SerializationError, match=r"\.lock"):
        zray.put(Inner())
    with pytest.raises(TypeError):
        zray.put(threading.Lock())


def test_unserialisable_closures_name_the_variable() -> None:
    lock = threading.Lock()

    @zray.remote
    def use() -> None:
        with lock:
            pass

    with pytest.raises(exceptions.SerializationError, match="lock"):
        use.remote()


def test_unserialisable_constructor_arguments_and_method_arguments() -> None:
    class Plain:
        def __init__(self, x: Any = None) -> None:
            self.x = x

        def take(self, x: Any) -> None:
            self.x = x

    plain = zray.remote(Plain)
    with pytest.raises(exceptions.SerializationError, match="lock"):
        plain.remote(Inner())
    actor = plain.remote()
    with pytest.raises(exceptions.SerializationError, match="lock"):
        actor.take.remote(Inner())
    assert zray.get(actor.take.remote(1)) is None


def test_unserialisable_results_are_errors_of_the_task() -> None:
    @zray.remote
    def make() -> Any:
        import threading

        return {"deep": [threading.Lock()]}

    error = failure_of(make.remote())
    assert isinstance(error, TypeError)
    assert "make" in str(error)
    assert "['deep'][0]" in str(error)


def test_results_that_cannot_be_unpickled_fail_in_get_only() -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return _explode, ()

    ref = zray.put([Bomb()])
    with pytest.raises(ArithmeticError, match="boom"):
        zray.get(ref)
    assert zray.get(zray.put(1)) == 1
    error = failure_of(zray.remote(lambda x: x).remote(ref))
    assert isinstance(error, ArithmeticError)


def _explode() -> None:
    raise ArithmeticError("boom")


# -- ends that user code asks for -------------------------------------------------------------------------------------------


def test_base_exceptions_of_user_code_are_errors_too() -> None:
    @zray.remote
    def interrupt() -> None:
        raise KeyboardInterrupt

    class Odd(BaseException):
        pass

    @zray.remote
    def odd() -> None:
        raise Odd("base")

    assert isinstance(failure_of(interrupt.remote()), (KeyboardInterrupt, exceptions.TaskError))
    assert "base" in str(failure_of(odd.remote()))
    assert zray.get(zray.remote(lambda: 1).remote()) == 1


# -- misuse --------------------------------------------------------------------------------------------------------------------


def test_infeasible_requests_fail_within_a_second() -> None:
    work = zray.remote(lambda: None)
    for options, word in (
        ({"num_cpus": 64_000}, "CPU"),
        ({"num_gpus": 3}, "GPU"),
        ({"resources": {"unobtainium": 1}}, "unobtainium"),
        ({"memory": 1 << 60}, "memory"),
    ):
        start = time.monotonic()
        error = failure_of(work.options(**options).remote())
        assert time.monotonic() - start < SLACK
        assert isinstance(error, exceptions.TaskUnschedulableError)
        assert word in str(error)


def test_a_worker_that_cannot_load_the_function_says_which_module(tmp_path: Any, monkeypatch: Any) -> None:
    import importlib
    import sys

    (tmp_path / "module_only_here.py").write_text("def f():\n    return 1\n")
    sys.path.insert(0, str(tmp_path))
    try:
        function = importlib.import_module("module_only_here").f
    finally:
        sys.path.remove(str(tmp_path))
    error = failure_of(zray.remote(function).remote())
    assert isinstance(error, exceptions.ZrayError)
    assert "module_only_here" in str(error)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda: zray.get("x"), "reference"),
        (lambda: zray.wait(zray.put(1)), "list"),
        (lambda: zray.wait([1]), "reference"),
        (lambda: zray.cancel(1), "reference"),
        (lambda: zray.cancel(zray.put(1)), "nothing runs"),
        (lambda: zray.kill(1), "handle"),
        (lambda: zray.remote(5), "function or a class"),
        (lambda: zray.get_actor(5), "name"),
        (lambda: zray.remote(lambda: 1)(), r"\.remote\(\)"),
        (lambda: zray.kv.put("a", 5), "bytes"),
    ],
)
def test_misuse_raises_at_once_with_the_mend(use: Callable[[], Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        use()
